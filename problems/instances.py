"""Instances of toy problems: sampled from the training, validation or test split, and encoded as batches.

sampler = InstanceSampler(ProblemConfig(problem="sort"), tokenizer)
batches = TrainInstances(sampler, batch_size=256, accumulation_steps=1, seed=1337)
batches.at(position)                                                        # the micro-batches of a step
HeldOut(sampler, "test", lengths, 10_000, batch_size=256, seed=1337)        # instances that training never sees

The split of an instance is a function of its prompt's hash, so the splits are disjoint without being stored.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from base.configuration import UserError
from problems.config import ProblemConfig, find_problem, parse_length
from problems.tasks import BLANK, Instances, close_gaps, join
from text.batches import Batch
from text.tokenizer import EOS, PADDING, CharTokenizer, codepoints


class Examples(NamedTuple):
    """A batch, and which of its targets belong to the answer (B, T); the others are auxiliary."""

    batch: Batch
    answer_mask: torch.Tensor


SPLITS = ("train", "val", "test")
HASH_MULTIPLIERS = np.random.default_rng(0).integers(0, 1 << 63, 4096, dtype=np.uint64) | np.uint64(1)


def hash_rows(codes: np.ndarray) -> np.ndarray:
    """64-bit hashes (n,) of rows of character codes (n, P), left-aligned: trailing blanks do not change the hash."""
    if codes.shape[1] > len(HASH_MULTIPLIERS):
        raise UserError(f"prompts of {codes.shape[1]} characters are too long: at most {len(HASH_MULTIPLIERS)}")
    hashes = codes.astype(np.uint64) @ HASH_MULTIPLIERS[: codes.shape[1]]
    hashes ^= hashes >> np.uint64(31)  # a finaliser like splitmix64's: every bit of the hash depends on all others
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ hashes >> np.uint64(29)


class InstanceSampler:
    """Samples instances of a problem from a split, and encodes them as tokens."""

    def __init__(self, config: ProblemConfig, tokenizer: CharTokenizer, answers_only: bool = False) -> None:
        """answers_only: no auxiliary targets, whatever config.supervise says."""
        self.config, self.problem, self.answers_only = config, find_problem(config.problem), answers_only
        codes = codepoints(tokenizer.characters)
        self.id_of = np.zeros(codes.max() + 1, np.int64)  # look-up table from character codes to token ids
        self.id_of[codes] = tokenizer.encode(tokenizer.characters)

    def ids(self, codes: np.ndarray) -> np.ndarray:
        """Token ids of character codes; BLANK becomes PADDING."""
        ids = self.id_of.take(codes, mode="clip")
        unknown = (ids == PADDING) & (codes != BLANK)
        if unknown.any() or codes.max() >= len(self.id_of):
            character = chr(codes[unknown][0] if unknown.any() else codes.max())
            raise UserError(f"the generator of {self.config.problem} makes {character!r}, which is not in its alphabet")
        return ids

    def split_of(self, hashes: np.ndarray) -> np.ndarray:
        """Index (n,) into SPLITS: train_fraction to training, a fifth of the rest to validation, the others to test."""
        u, fraction = hashes / 2.0**64, self.config.train_fraction  # u is uniform in [0, 1)
        return (u >= fraction).astype(int) + (u >= fraction + (1 - fraction) / 5)

    def generate(self, rng: np.random.Generator, n: int, length: int) -> Instances:
        """n instances of any split; the prompts are left-aligned and end with the problem's separator."""
        prompt, answer, aux_targets = self.problem.generate(rng, n, length, self.config)
        prompt = join(prompt, self.problem.ends)
        if aux_targets is None:
            return Instances(*close_gaps(prompt), answer)
        aux_targets = np.pad(aux_targets, ((0, 0), (0, len(self.problem.ends))))
        prompt, aux_targets = close_gaps(prompt, aux_targets)
        return Instances(prompt, answer, aux_targets)

    def draw(self, rng: np.random.Generator, n: int, length: int, split: str) -> Instances:
        """n instances of a split; held-out ones are distinct, and fewer if the split is too small.

        Rejection sampling: generate more than needed, keep those whose hash is in the split, repeat until there are n.
        """
        found, n_found, seen, misses = [], 0, np.empty(0, np.uint64), 0
        fraction = {"train": self.config.train_fraction}.get(split, (1 - self.config.train_fraction) / 2)
        while n_found < n and misses < 10:
            instances = self.generate(rng, int((n - n_found) / fraction * 1.1) + 16, length)
            hashes = hash_rows(instances.prompt)
            kept = np.flatnonzero(self.split_of(hashes) == SPLITS.index(split))
            if split != "train":
                kept = kept[np.unique(hashes[kept], return_index=True)[1]]
                kept = kept[~np.isin(hashes[kept], seen)]
            kept = np.sort(kept)[: n - n_found]
            seen = np.append(seen, hashes[kept])
            found.append(Instances(*(None if part is None else part[kept] for part in instances)))
            n_found += len(kept)
            misses = 0 if len(kept) else misses + 1
        return Instances(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*found, strict=True)))

    def encode(self, instances: Instances) -> Examples:
        """Token ids, targets and loss mask (B, T).

        Causal: prompt, answer and <|eos|> in one sequence, targets shifted by one; with full attention the input is the
        prompt, and the target at each position is the answer's token. Loss on the answer and on auxiliary targets.
        """
        ids, targets = self.ids(instances.prompt), self.ids(instances.answer)
        has_aux = instances.aux_targets is not None and not self.answers_only
        aux_targets = self.ids(instances.aux_targets) if has_aux else np.zeros_like(ids)
        if self.problem.is_causal:
            end = np.full((len(ids), 1), EOS)
            is_answer = np.repeat([0, 1], [ids.shape[1], targets.shape[1] + 1])[None].repeat(len(ids), 0)
            aux_targets = np.pad(aux_targets, ((0, 0), (0, targets.shape[1] + 1)))
            sequences = np.concatenate([ids, targets, end], axis=1)
            sequences, is_answer, aux_targets = close_gaps(sequences, is_answer, aux_targets)
            longest = (sequences > 0).sum(axis=1).max()
            ids, targets = sequences[:, : longest - 1], sequences[:, 1:longest]
            aux_targets = aux_targets[:, : longest - 1]
            answer_mask = (is_answer[:, 1:longest] == 1) & (targets > 0)
        else:
            answer_mask = targets > 0
        loss_mask = answer_mask | (aux_targets > 0)
        targets = np.where(answer_mask, targets, aux_targets)
        batch = Batch(
            torch.from_numpy(np.ascontiguousarray(ids)),
            torch.from_numpy(targets),
            torch.from_numpy(loss_mask.astype(np.float32)),
            int(loss_mask.sum()),
        )
        return Examples(batch, torch.from_numpy(answer_mask))

    def window(self) -> int:
        """Context window (block_size) that the longest instances need."""
        prompt, answer, _ = self.generate(np.random.default_rng(0), 1, self.config.longest)
        return prompt.shape[1] + (answer.shape[1] if self.problem.is_causal else 0)


class TrainInstances:
    """Endless training batches, each a pure function of its position, so that resuming needs no stored state.

    All instances of a micro-batch have the same length. The micro-batches of a step are dealt to the ranks in turn, so
    the global batch does not depend on the number of processes.
    """

    samples_per_epoch = None
    datasets = ()

    def __init__(
        self,
        sampler: InstanceSampler,
        *,
        batch_size: int,
        accumulation_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sampler, self.batch_size, self.accumulation_steps, self.seed = (
            sampler,
            batch_size,
            accumulation_steps,
            seed,
        )
        self.rank, self.world_size = rank, world_size
        self.lengths = parse_length(sampler.config.train_length)
        self.samples_per_step = batch_size * accumulation_steps
        for length in self.lengths:
            if not len(sampler.draw(np.random.default_rng(0), 1, length, "train").prompt):
                raise UserError(f"no training instance has length {length}; raise train_fraction or length")

    def at(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the step that starts after `position` samples."""
        batches = []
        for micro_step in range(self.rank, self.accumulation_steps, self.world_size):
            rng = np.random.default_rng([self.seed, position + micro_step * self.batch_size])
            length = int(rng.choice(self.lengths))
            instances = self.sampler.draw(rng, self.batch_size, length, "train")
            batches.append(self.sampler.encode(instances).batch)
        return batches


class HeldOut:
    """At most n distinct instances of the validation or test split, the lengths as evenly as possible."""

    def __init__(
        self,
        sampler: InstanceSampler,
        split: str,
        lengths: range,
        n: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sampler, self.batch_size, self.rank, self.world_size = sampler, batch_size, rank, world_size
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        self.by_length: dict[int, Instances] = {}
        for i, length in enumerate(lengths):  # short lengths may have too few instances: longer ones fill up
            quota = -(-n // (len(lengths) - i))  # rounded up
            self.by_length[length] = sampler.draw(rng, quota, length, split)
            n -= len(self.by_length[length].prompt)
        if not len(self):
            raise UserError("the held-out split is empty: raise the length, or lower train_fraction")

    def __len__(self) -> int:
        return sum(len(instances.prompt) for instances in self.by_length.values())

    def examples(self) -> Iterator[tuple[int, Examples]]:
        """This rank's batches, each with the length of its instances.

        Every rank gets the same number of batches, because the forward pass of a sharded model is collective: if there
        are too few, the first batch is repeated with an empty loss mask (count 0).
        """
        slices = [
            (length, start)
            for length, instances in self.by_length.items()
            for start in range(0, len(instances.prompt), self.batch_size)
        ]
        for first in range(0, len(slices), self.world_size):
            is_spare = first + self.rank >= len(slices)
            length, start = slices[0 if is_spare else first + self.rank]
            rows = slice(start, start + self.batch_size)
            parts = [None if part is None else part[rows] for part in self.by_length[length]]
            batch, answer_mask = self.sampler.encode(Instances(*parts))
            if is_spare:
                batch = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask), count=0)
            yield length, Examples(batch, answer_mask)

    def __iter__(self) -> Iterator[Batch]:
        for _, examples in self.examples():
            yield examples.batch


@torch.inference_mode()
def exact_match(model: torch.nn.Module, held_out: HeldOut, engine: Any) -> dict[int, np.ndarray]:
    """Whether each of this rank's held-out answers is exactly right (n,), by length.

    One teacher-forced forward pass gives the same verdict as greedy decoding: up to its first wrong token, greedy
    decoding conditions on the same tokens, and one wrong token makes the answer wrong either way.
    """
    model.eval()
    correct: dict[int, list[np.ndarray]] = {length: [np.empty(0, bool)] for length in held_out.by_length}
    for length, (batch, answer_mask) in held_out.examples():
        batch = batch.to(engine.device)
        with engine.uncompiled():
            predicted = model(batch.idx)[0].argmax(-1)  # (B, T)
        matches = (predicted == batch.targets) | ~answer_mask.to(engine.device)
        if batch.count:
            correct[length].append(matches.all(1).cpu().numpy())
    model.train()
    return {length: np.concatenate(parts) for length, parts in correct.items()}
