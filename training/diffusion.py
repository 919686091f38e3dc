"""Masked diffusion: learn to fill in masked tokens, few or all of them, and so to write a text in any order.

    the text                      T h e   s u n   r o s e
    masked at a rate of 0.3       T _ e   s u n   _ o s _      noise of these tokens < 0.3
    masked at a rate of 0.8       _ _ _   _ u _   _ _ s _      more of them, never others

    loss = 1 / rate  x  sum of -log p(token | what is not masked) over the masked tokens,  rate ~ U(0, 1)

(MDLM, Sahoo et al. 2024, arXiv:2406.07524; LLaDA, Nie et al. 2025, arXiv:2502.09992.) All masked tokens are predicted
in one pass, from both sides; nothing is shifted, as a token is not told by itself. Generation is layers/denoising.py.

Why 1 / rate: it makes the loss a bound on the likelihood. A token is masked with a probability of the rate, so that
with the weight it counts alike at every rate; and of the n - 1 other tokens any number is then as likely to be masked,
and any ones of them. That is as if the text were generated in an order drawn at random, each token told from those that
came before: the loss is the mean over all orders of -log p(text in this order). By Jensen's inequality it is at least
-log of the mean of p, the likelihood of a model that draws the order (Uria et al. 2014, arXiv:1310.1757; Ou et al.
2024, arXiv:2406.03736).

That is with full attention. A causal model learns to fill in one block of a text after the other (block diffusion:
Arriola et al. 2025, arXiv:2503.09573): each at a rate of its own, predicted from the text before it and, on both
sides, from the block itself. All blocks of a text are learnt in one pass, from a row that holds the text and then its
masked copy (copies_mask() in layers/masks.py):

    the text       T h e   s u n   r o s e       position i predicts token i + 1, as before: so a trained causal
    its copy       T _ e _|s _ n _|r o _ _       model is a start that has nothing to unlearn (Gong et al. 2024,
                                                 arXiv:2410.17891; set block decoding: Gat et al. 2025, 2509.04185)

The first position of a block has the last token before it, which is known. The token that a block's last position
predicts is an input of no other one there, and so drawn last.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from base.configuration import UserError
from layers.head import Head
from text.batches import Batch, Batches, Sample, TrainBatches, ValidationBatches, document_ids, pack
from text.tokenizer import PADDING

NEVER = 2.0  # the noise of what is not masked at any rate: questions, padding
N_RATES = 8  # of each sample in validation
GOLDEN = (math.sqrt(5) - 1) / 2


class NoisySample(NamedTuple):
    """A text or an answer to its question, with what decides which of n targets are masked."""

    idx: np.ndarray  # (n,) the tokens that the model reads
    targets: np.ndarray  # (n,) the same, where a masked token is predicted at its own place; in blocks, the next ones
    counted: np.ndarray  # (n,) 1 for the targets that the loss is divided by
    noise: np.ndarray  # (n,) of the targets
    rate: np.ndarray  # (n,) one for all, or for each block
    block: np.ndarray  # (n,) which block a target is of, from 0
    is_text: bool  # running text, which may have several documents


@functools.cache
def first_rate(seed: int) -> float:
    return np.random.default_rng([seed, 2]).random()


class NoisyBatches(Batches):
    """Batches with noise: a pure function of a sample's position, as the batches are (text/batches.py).

    So a run that is resumed, or distributed, or cut into other micro-batches, masks the same tokens.
    """

    def __init__(
        self,
        *arguments: Any,
        answer_block: int,
        ends: tuple[int, ...],
        mask_span: int,
        in_blocks: bool,
        **shared: Any,
    ) -> None:
        """answer_block: answers are filled to multiples of it; ends: the tokens that end them.

        in_blocks: for a causal model, which learns to fill in one block of a text after the other.
        """
        super().__init__(*arguments, **shared)
        self.answer_block, self.ends, self.mask_span, self.in_blocks = answer_block, ends, mask_span, in_blocks

    def add_noise(self, sample: Sample, position: int, seed: int, trains: bool) -> NoisySample:
        """Noise and rates of a sample; trains: a long answer may end after one of its blocks, spans share their noise.

        Rates are those of a Weyl sequence, multiples of the golden ratio modulo 1: those of any batch are spread evenly
        over (0, 1], however large it is, which takes out the better part of the loss's variance.
        """
        rng = np.random.default_rng([seed, position, 2])
        tokens, loss_mask = sample
        if not isinstance(tokens, np.ndarray):
            raise UserError("loss diffusion cannot train on preference pairs")
        is_text = loss_mask is None
        if is_text:  # the same targets as of a causal model
            start, counted = 1, np.ones(len(tokens))
        else:
            tokens, counted, start = self.choose_answer(tokens, loss_mask, rng, trains)
        first = 1 if is_text or self.in_blocks else 0  # of the tokens that are targets
        targets, counted, start = tokens[first:], counted[first:], max(0, start - first)
        n = len(targets)
        span = rng.integers(min(self.mask_span, n)) + 1 if trains and self.mask_span > 1 else 1
        noise = np.repeat(rng.random(n // span + 2), span)[rng.integers(span) :][:n]
        place = np.arange(n)
        noise = np.where(place < start, NEVER, noise)
        block = np.zeros(n, dtype=np.int64)
        if self.in_blocks:  # an answer begins one; running text may begin within one
            skipped = rng.integers(self.answer_block) if trains and is_text else 0
            block = np.where(place < start, 0, 1 + (place - start + skipped) // self.answer_block)
        rate = 1 - (first_rate(seed) + position * GOLDEN + block * math.sqrt(2)) % 1
        idx = tokens[:-1] if self.in_blocks else targets
        return NoisySample(idx, targets, counted, noise, rate, block, is_text)

    def choose_answer(
        self, tokens: np.ndarray, loss_mask: np.ndarray, rng: np.random.Generator, cuts: bool
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """An answer of a conversation, at random, with what comes before it; what counts, and where it starts.

        Generation appends a block of masks, fills it in, and appends another unless the answer ended. So here, too, the
        answer has whole blocks: what follows its end is filled with the token that ends it, which is learnt but not
        counted, and with `cuts` it is shown up to one of its blocks, whichever, as if it had come so far. (A model that
        fills in blocks sees no later ones, so it learns them all.)
        """
        limit = self.block_size + self.in_blocks  # in blocks the last target needs no place of its own
        edges = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        edges = edges[edges[:, 0] < limit]
        if not len(edges):
            return tokens[:limit], np.zeros(min(len(tokens), limit)), len(tokens)
        start, end = edges[rng.integers(len(edges))]
        n_blocks = math.ceil((end - start) / self.answer_block)
        stop = start + self.answer_block * (rng.integers(n_blocks) + 1 if cuts and not self.in_blocks else n_blocks)
        n_filled = max(0, stop - end) if tokens[end - 1] in self.ends else 0  # one that was cut has no end
        tokens = np.append(tokens[:end], np.full(n_filled, tokens[end - 1]))[: min(stop, limit)]
        place = np.arange(len(tokens))
        return tokens, (start <= place) & (place < end), start

    def collate(self, samples: list[NoisySample]) -> Batch:
        """Samples as a batch of clean tokens with their noise; packed ones in a row."""
        rows = pack(samples, self.block_size, n_unread=0) if self.pack_samples else [[sample] for sample in samples]
        longest = max(sum(len(sample.idx) for sample in row) for row in rows)
        shape = len(rows), min(self.block_size, math.ceil(longest / self.pad_to) * self.pad_to)
        idx, targets, documents, blocks = (np.full(shape, n, dtype=np.int64) for n in (PADDING, PADDING, 0, 0))
        counted, noise, rate = (np.full(shape, value, dtype=np.float32) for value in (0, NEVER, 1))
        for i, row in enumerate(rows):
            start = n_blocks = 0
            for sample in row:
                place = i, slice(start, start := start + len(sample.idx))
                idx[place], targets[place], counted[place], noise[place], rate[place], block, is_text = sample
                has_documents = self.mask_documents and is_text
                ids = document_ids(sample.idx, *self.datasets[0].file.delimiters) if has_documents else 1
                documents[place] = documents[i].max() + ids
                blocks[place] = n_blocks + block
                n_blocks = blocks[i].max() + 1
            blocks[i, start:] = n_blocks
        # with full attention padding has to be masked, too; what is one text throughout needs no mask
        keep = documents.min() == 0 or documents.max() > 1 or (self.is_compiled and samples[0].noise[0] == NEVER)
        arrays = idx, targets, counted, noise, rate, blocks if self.in_blocks else None, documents if keep else None
        idx, targets, counted, noise, rate, blocks, documents = (
            None if array is None else torch.from_numpy(array) for array in arrays
        )
        return Batch(idx, targets, counted, int(counted.sum()), documents, noise=noise, rate=rate, blocks=blocks)


class NoisyTrainBatches(NoisyBatches, TrainBatches):
    def sample(self, position: int) -> NoisySample:
        return self.add_noise(super().sample(position), position, self.seed, trains=True)


class NoisyValidationBatches(NoisyBatches, ValidationBatches):
    def sample(self, n: int) -> NoisySample:
        return self.add_noise(super().sample(n), n, seed=0, trains=False)  # whatever the run's seed


def masked_losses(
    model: torch.nn.Module, batch: Batch, rate: torch.Tensor, mask_token: int, reduction: str, with_logits: bool = False
) -> torch.Tensor:
    """Cross-entropies of the targets masked at a rate (B, T), times 1 / rate: their sum, or (B, T), 0 elsewhere.

    In blocks the next-token loss of the text is in the sum, too: what is before a block goes on being read as a causal
    model reads it. It teaches more than the blocks do.
    """
    is_masked = batch.noise < rate
    weight = is_masked / rate
    if batch.blocks is None:
        idx = batch.targets.masked_fill(is_masked, mask_token)
        return model(idx, batch.targets, weight, reduction, batch.documents, with_logits=with_logits)[1]
    is_inside = batch.blocks[:, 1:] == batch.blocks[:, :-1]  # the token read is the target before it, of this block
    copy = batch.idx.masked_fill(F.pad(is_masked[:, :-1] & is_inside, (1, 0)), mask_token)
    next_token = batch.loss_mask * (reduction == "sum")
    losses = model(
        torch.cat((batch.idx, copy), dim=1),
        batch.targets.repeat(1, 2),
        torch.cat((next_token, weight), dim=1),
        reduction,
        batch.documents,
        with_logits=with_logits,
        blocks=batch.blocks,
    )[1]
    return losses if reduction == "sum" else losses[:, batch.idx.size(1) :]


def bound(
    model: torch.nn.Module, batch: Batch, mask_token: int, n_rates: int = N_RATES, with_logits: bool = False
) -> torch.Tensor:
    """The bound on -log p of each row, as parts (B, T) that add up to it: the mean over rates spread over (0, 1].

    Each of n_rates equal parts of 0..1 has one, at the place that batch.rate has in 0..1: unbiased, and the same every
    time.
    """
    rates = ((k + batch.rate) / n_rates for k in range(n_rates))
    return sum(masked_losses(model, batch, rate, mask_token, "none", with_logits) for rate in rates) / n_rates


def bound_of_windows(
    model: torch.nn.Module, idx: torch.Tensor, targets: torch.Tensor, first: int, block: int
) -> torch.Tensor:
    """The same of windows of a text, token ids (B, T) and the next ones, counted from the number `first`: parts (B, T).

    block: tokens of a block, where the model is causal.
    """
    B, T = idx.shape
    generators = [np.random.default_rng([0, first + i, 2]) for i in range(B)]
    noise = torch.from_numpy(np.stack([rng.random(T, dtype=np.float32) for rng in generators]))
    blocks = np.arange(T) // block if model.config.is_causal else np.zeros(T, dtype=np.int64)
    rates = 1 - ((first + np.arange(B))[:, None] * GOLDEN + blocks * math.sqrt(2)) % 1
    rate, loss_mask = torch.from_numpy(rates.astype(np.float32)), torch.ones(B, T)
    blocks = torch.from_numpy(blocks).expand(B, T) if model.config.is_causal else None
    batch = Batch(idx, targets, loss_mask, B * T, noise=noise, rate=rate, blocks=blocks).to(idx.device)
    is_rounded = not isinstance(model.lm_head, Head)  # to integers: it computes logits alone
    return bound(model, batch, model.config.vocab_size, with_logits=is_rounded)


class DiffusionLoss:
    """The loss of masked diffusion at a rate for each sample; validation is the bound on the likelihood."""

    def __init__(self, mask_token: int) -> None:
        self.mask_token = mask_token

    def __call__(self, model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
        if reduction == "sum":
            return masked_losses(model, batch, batch.rate, self.mask_token, "sum")
        return bound(model, batch, self.mask_token) * (batch.count > 0)  # 0: a dummy batch of ValidationBatches
