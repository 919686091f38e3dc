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
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from base.configuration import UserError
from layers.head import Head
from text.batches import Batch, Batches, Sample, TrainBatches, ValidationBatches, document_ids, pack
from text.tokenizer import PADDING

NEVER = 2.0  # the noise of what is not masked at any rate: questions, padding
N_RATES = 8  # of each sample in validation
GOLDEN = (math.sqrt(5) - 1) / 2


class NoisySample(NamedTuple):
    """A text or an answer to its question, n tokens, with what decides which of them are masked."""

    tokens: np.ndarray  # (n,)
    counted: np.ndarray  # (n,) 1 for the tokens that the loss is divided by
    noise: np.ndarray  # (n,)
    rate: float


@functools.cache
def first_rate(seed: int) -> float:
    return np.random.default_rng([seed, 2]).random()


class NoisyBatches(Batches):
    """Batches with noise: a pure function of a sample's position, as the batches are (text/batches.py).

    So a run that is resumed, or distributed, or cut into other micro-batches, masks the same tokens.
    """

    def __init__(
        self, *arguments: Any, answer_block: int, ends: tuple[int, ...], mask_span: int, **shared: Any
    ) -> None:
        """answer_block: answers are filled to multiples of it; ends: the tokens that end them."""
        super().__init__(*arguments, **shared)
        self.answer_block, self.ends, self.mask_span = answer_block, ends, mask_span

    def add_noise(self, sample: Sample, position: int, seed: int, trains: bool) -> NoisySample:
        """Noise and rate of a sample; trains: a longer answer may end after one of its blocks, spans share their noise.

        Rates are those of a Weyl sequence, multiples of the golden ratio modulo 1: those of any batch are spread evenly
        over (0, 1], however large it is, which takes out the better part of the loss's variance.
        """
        rng = np.random.default_rng([seed, position, 2])
        tokens, loss_mask = sample
        if not isinstance(tokens, np.ndarray):
            raise UserError("loss diffusion cannot train on preference pairs")
        if loss_mask is None:  # running text: the same targets as of a causal model
            tokens = tokens[1:]
            start, counted = 0, np.ones(len(tokens))
        else:
            tokens, counted, start = self.choose_answer(tokens, loss_mask, rng, trains)
        span = rng.integers(min(self.mask_span, len(tokens))) + 1 if trains and self.mask_span > 1 else 1
        noise = np.repeat(rng.random(len(tokens) // span + 2), span)[rng.integers(span) :][: len(tokens)]
        noise = np.where(np.arange(len(tokens)) < start, NEVER, noise)
        return NoisySample(tokens, counted, noise, 1 - (first_rate(seed) + position * GOLDEN) % 1)

    def choose_answer(
        self, tokens: np.ndarray, loss_mask: np.ndarray, rng: np.random.Generator, cuts: bool
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """An answer of a conversation, at random, with what comes before it; what counts, and where it starts.

        Generation appends a block of masks, fills it in, and appends another unless the answer ended. So here, too, the
        answer has whole blocks: what follows its end is filled with the token that ends it, which is learnt but not
        counted, and with `cuts` it is shown up to one of its blocks, whichever, as if it had come so far.
        """
        edges = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        edges = edges[edges[:, 0] < self.block_size]  # one that begins with the last target is in no window
        if not len(edges):
            return tokens[: self.block_size], np.zeros(min(len(tokens), self.block_size)), len(tokens)
        start, end = edges[rng.integers(len(edges))]
        n_blocks = math.ceil((end - start) / self.answer_block)
        stop = start + self.answer_block * (rng.integers(n_blocks) + 1 if cuts else n_blocks)
        n_filled = max(0, stop - end) if tokens[end - 1] in self.ends else 0  # one that was cut has no end
        tokens = np.append(tokens[:end], np.full(n_filled, tokens[end - 1]))[: min(stop, self.block_size)]
        place = np.arange(len(tokens))
        return tokens, (start <= place) & (place < end), start

    def collate(self, samples: list[NoisySample]) -> Batch:
        """Samples as a batch of clean tokens, idx and targets alike, with their noise; packed ones in a row."""
        rows = pack(samples, self.block_size, n_unread=0) if self.pack_samples else [[sample] for sample in samples]
        longest = max(sum(len(sample.tokens) for sample in row) for row in rows)
        shape = len(rows), min(self.block_size, math.ceil(longest / self.pad_to) * self.pad_to)
        tokens, documents = np.full(shape, PADDING, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        counted, noise, rate = (np.full(shape, value, dtype=np.float32) for value in (0, NEVER, 1))
        for i, row in enumerate(rows):
            start = 0
            for sample in row:
                place = i, slice(start, start := start + len(sample.tokens))
                tokens[place], counted[place], noise[place], rate[place] = sample
                ids = document_ids(sample.tokens, *self.datasets[0].file.delimiters) if self.mask_documents else 1
                documents[place] = documents[i].max() + ids
        # with full attention padding has to be masked, too; what is one text throughout needs no mask
        keep = documents.min() == 0 or documents.max() > 1 or (self.is_compiled and samples[0].noise[0] == NEVER)
        idx, documents, counted, noise, rate = map(torch.from_numpy, (tokens, documents, counted, noise, rate))
        count, documents = int(counted.sum()), documents if keep else None
        return Batch(idx, idx, counted, count, documents, noise=noise, rate=rate)


class NoisyTrainBatches(NoisyBatches, TrainBatches):
    def sample(self, position: int) -> NoisySample:
        return self.add_noise(super().sample(position), position, self.seed, trains=True)


class NoisyValidationBatches(NoisyBatches, ValidationBatches):
    def sample(self, n: int) -> NoisySample:
        return self.add_noise(super().sample(n), n, seed=0, trains=False)  # whatever the run's seed


def masked_losses(
    model: torch.nn.Module, batch: Batch, rate: torch.Tensor, mask_token: int, reduction: str, with_logits: bool = False
) -> torch.Tensor:
    """Cross-entropies of the tokens masked at a rate (B, T), times 1 / rate: their sum, or (B, T), 0 elsewhere."""
    is_masked = batch.noise < rate
    idx, weight = batch.targets.masked_fill(is_masked, mask_token), is_masked / rate
    return model(idx, batch.targets, weight, reduction, batch.documents, with_logits=with_logits)[1]


def bound(
    model: torch.nn.Module, batch: Batch, mask_token: int, n_rates: int = N_RATES, with_logits: bool = False
) -> torch.Tensor:
    """The bound on -log p of each row, as parts (B, T) that add up to it: the mean over rates spread over (0, 1].

    Each of n_rates equal parts of 0..1 has one, at the place that batch.rate has in 0..1: unbiased, and the same every
    time.
    """
    rates = ((k + batch.rate) / n_rates for k in range(n_rates))
    return sum(masked_losses(model, batch, rate, mask_token, "none", with_logits) for rate in rates) / n_rates


def bound_of_windows(model: torch.nn.Module, idx: torch.Tensor, first: int) -> torch.Tensor:
    """The same of windows of a text, token ids (B, T), counted from the number `first`: parts (B, T)."""
    generators = [np.random.default_rng([0, first + i, 2]) for i in range(len(idx))]
    noise = np.stack([rng.random(idx.size(1), dtype=np.float32) for rng in generators])
    rates = 1 - (first + np.arange(len(idx))) * GOLDEN % 1
    rate = torch.from_numpy(rates.astype(np.float32))[:, None].expand(idx.shape)
    batch = Batch(idx, idx, None, idx.numel(), noise=torch.from_numpy(noise), rate=rate).to(idx.device)
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
