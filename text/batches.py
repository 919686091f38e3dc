"""Batches of samples, as training and evaluation read them from token files.

file = TokenFile("dataset/pretrain_train.bin")
batches = TrainBatches([file], block_size=256, vocab_size=100, batch_size=32, accumulation_steps=1, seed=1337)
micro_batches = batches.at(position)        # a pure function of how many samples came before
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from base.configuration import UserError
from base.prefetching import prefetch
from text.token_files import TokenFile
from text.tokenizer import BOS, EOS, PADDING


class Batch(NamedTuple):
    """A micro-batch: idx and targets (B, T), loss_mask (B, T) or None where all targets count, and how many count.

    documents (B, T): a number for every token's document, where attention is to stay inside; else None.
    reference (B / 2,): of pairs, whose first halves are the chosen answers and second halves the rejected ones; or
    (B, T), with old (B, T) and advantage (B,), of answers that the model drew itself: see losses.py and grpo.py.
    """

    idx: torch.Tensor
    targets: torch.Tensor
    loss_mask: torch.Tensor | None
    count: int
    documents: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    old: torch.Tensor | None = None
    advantage: torch.Tensor | None = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """A batch with all tensors changed."""
        return Batch(*(change(part) if isinstance(part, torch.Tensor) else part for part in self))

    def to(self, device: torch.device) -> "Batch":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self.each(torch.Tensor.pin_memory)


class Windows:
    """Running text as windows of block_size + 1 tokens that overlap by one; each epoch begins at another offset."""

    def __init__(self, file: TokenFile, block_size: int, seed: int) -> None:
        self.tokens, self.block_size, self.seed = file.tokens, block_size, seed
        fitting = (len(self.tokens) - 1) // block_size
        if fitting < 1:
            raise UserError(
                f"{file.path}: {len(self.tokens)} tokens are fewer than one window (block_size {block_size} + 1)"
            )
        self.length = max(1, fitting - 1)  # one window less leaves room for the offset
        self.room = min(block_size - 1, len(self.tokens) - 1 - self.length * block_size)
        self._offset = (-1, 0)

    def __len__(self) -> int:
        return self.length

    def get(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        if self._offset[0] != epoch:
            self._offset = (epoch, int(np.random.default_rng([self.seed, epoch, 1]).integers(self.room + 1)))
        start = self._offset[1] + index * self.block_size
        return self.tokens[start : start + self.block_size + 1], None


class ValidationWindows:
    """Every token of a validation text once, in windows from its start; the last one may be shorter."""

    def __init__(self, file: TokenFile, block_size: int) -> None:
        self.tokens, self.block_size = file.tokens, block_size
        if len(self.tokens) < 2:
            raise UserError(f"{file.path}: too short to evaluate on ({len(self.tokens)} tokens)")

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.block_size)

    def get(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        start = index * self.block_size
        return self.tokens[start : start + self.block_size + 1], None


class Samples:
    """Fine-tuning samples; those longer than block_size + 1 tokens are dropped or cut."""

    def __init__(self, file: TokenFile, block_size: int, overlong: str) -> None:
        self.file, self.block_size = file, block_size
        self.kept = np.arange(len(file.starts) - 1)
        long = np.diff(file.starts) > block_size + 1
        self.n_overlong = int(long.sum())
        if self.n_overlong and overlong == "drop":
            self.kept = self.kept[~long]
        elif self.n_overlong:  # of a cut sample something of the answer must be left
            keeps_answer = [not long[i] or self.get_sample(i)[1][1:].any() for i in self.kept]
            self.kept = self.kept[keeps_answer]
        if not len(self.kept):
            raise UserError(f"{file.path}: no sample fits block_size {block_size}")

    def __len__(self) -> int:
        return len(self.kept)

    def get_sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        start = self.file.starts[i]
        end = min(self.file.starts[i + 1], start + self.block_size + 1)
        return self.file.tokens[start:end], self.file.loss_mask[start:end]

    def get(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.get_sample(self.kept[index])


class Pairs:
    """Preferences: a chosen and a rejected answer to the same prompt, samples 2 i and 2 i + 1 of the file.

    reference: what the reference model thinks of each pair, log p(chosen) / p(rejected); see losses.py.
    """

    def __init__(self, file: TokenFile, block_size: int) -> None:
        self.file = file
        lengths = np.diff(file.starts)
        self.kept = np.flatnonzero(np.maximum(lengths[0::2], lengths[1::2]) <= block_size + 1)
        self.n_overlong = len(lengths) // 2 - len(self.kept)
        if not len(self.kept):
            raise UserError(f"{file.path}: no pair fits block_size {block_size}")
        self.reference = np.zeros(len(self.kept), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.kept)

    def get(self, index: int, epoch: int) -> "Pair":
        starts, first = self.file.starts, 2 * self.kept[index]
        chosen, rejected = (slice(starts[i], starts[i + 1]) for i in (first, first + 1))
        tokens, mask = self.file.tokens, self.file.loss_mask
        return Pair((tokens[chosen], mask[chosen]), (tokens[rejected], mask[rejected]), float(self.reference[index]))


class Pair(NamedTuple):
    chosen: "Sample"
    rejected: "Sample"
    reference: float


def dataset_of(file: TokenFile, block_size: int, overlong: str, windows: type) -> Any:
    """The samples of a file, by what it holds; windows: the class for running text."""
    if file.starts is None:
        return windows(file, block_size)
    return Pairs(file, block_size) if file.header.get("has_pairs") else Samples(file, block_size, overlong)


Sample = tuple[np.ndarray, np.ndarray | None]  # tokens, and 1 where the loss is taken (None: everywhere)


def pack(samples: list[Sample], block_size: int) -> list[list[Sample]]:
    """Samples laid into as few rows of block_size as first-fit-decreasing finds: no compute is spent on padding."""
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample[0])):
        length = len(sample[0]) - 1
        i = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if i == len(rows):
            rows.append([])
            room.append(block_size)
        rows[i].append(sample)
        room[i] -= length
    return rows


def document_numbers(tokens: np.ndarray) -> np.ndarray:
    """A number, from 1, for every token's document: one begins at <|bos|>, and after <|eos|>."""
    begins = tokens == BOS
    begins[1:] |= tokens[:-1] == EOS
    begins[0] = True
    return begins.cumsum()


def collate(
    rows: list[list[Sample]], block_size: int, vocab_size: int, pad_to: int, mask_documents: bool = False
) -> Batch:
    """Rows of samples as one batch, padded to a common length: a multiple of pad_to, at most block_size.

    Samples that share a row do not see each other; with mask_documents, neither do the documents of running text.
    """
    longest = max(sum(len(tokens) - 1 for tokens, _ in row) for row in rows)
    T = min(block_size, math.ceil(longest / pad_to) * pad_to)
    idx, targets = (np.full((len(rows), T), PADDING, dtype=np.int64) for _ in range(2))
    mask = np.zeros((len(rows), T), dtype=np.float32)
    documents = np.zeros((len(rows), T), dtype=np.int64)  # (0: padding)
    for i, row in enumerate(rows):
        start = 0
        for tokens, loss_mask in row:
            end, is_text = start + len(tokens) - 1, loss_mask is None
            idx[i, start:end], targets[i, start:end] = tokens[:-1], tokens[1:]
            mask[i, start:end] = 1 if is_text else loss_mask[1:]
            inner = document_numbers(tokens[:-1]) if mask_documents and is_text and end > start else 1
            documents[i, start:end] = documents[i].max() + inner
            start = end
    if max(idx.max(), targets.max()) >= vocab_size:
        raise UserError(
            f"token id {max(idx.max(), targets.max())} in the data is outside the vocabulary of {vocab_size}: "
            "another tokenizer?"
        )
    count = int(mask.sum())
    has_documents = documents.max() > 1
    return Batch(
        torch.from_numpy(idx),
        torch.from_numpy(targets),
        None if count == mask.size else torch.from_numpy(mask),
        count,
        torch.from_numpy(documents) if has_documents else None,
    )


def collate_pairs(pairs: list[Pair], block_size: int, vocab_size: int, pad_to: int) -> Batch:
    """Pairs as one batch: all chosen answers, then all rejected ones; what counts is pairs."""
    rows = [[pair.chosen] for pair in pairs] + [[pair.rejected] for pair in pairs]
    batch = collate(rows, block_size, vocab_size, pad_to)
    reference = torch.tensor([pair.reference for pair in pairs])
    return batch._replace(count=len(pairs), reference=reference)


class Batches:
    """What training and validation batches share: the shape of a batch, and this process's place among others."""

    def __init__(
        self,
        *,
        block_size: int,
        vocab_size: int,
        batch_size: int,
        seed: int,
        overlong: str = "drop",
        rank: int = 0,
        world_size: int = 1,
        pad_to: int = 16,
        mask_documents: bool = False,
        pack_samples: bool = False,
    ) -> None:
        self.block_size, self.vocab_size, self.batch_size, self.seed = block_size, vocab_size, batch_size, seed
        self.overlong, self.rank, self.world_size, self.pad_to = overlong, rank, world_size, pad_to
        self.mask_documents, self.pack_samples = mask_documents, pack_samples

    def collate(self, samples: list[Any]) -> Batch:
        """Samples or pairs as a batch."""
        if isinstance(samples[0], Pair):
            return collate_pairs(samples, self.block_size, self.vocab_size, self.pad_to)
        rows = pack(samples, self.block_size) if self.pack_samples else [[sample] for sample in samples]
        return collate(rows, self.block_size, self.vocab_size, self.pad_to, self.mask_documents)


class TrainBatches(Batches):
    """Training batches as a pure function of the position in the data, so that resuming is arithmetic.

    An epoch passes over the datasets in order, over each in a new seeded order, every window or sample once. The step
    at position p (samples seen so far) holds samples p, p + 1, ... whatever the number of processes; its micro-batches
    are dealt to the processes in turn.
    """

    def __init__(self, files: list[TokenFile], *, accumulation_steps: int, **shared: Any) -> None:
        super().__init__(**shared)
        windows = functools.partial(Windows, seed=self.seed)
        self.datasets = [dataset_of(file, self.block_size, self.overlong, windows) for file in files]
        self.accumulation_steps = accumulation_steps
        self.samples_per_step = self.batch_size * accumulation_steps
        self.samples_per_epoch = sum(map(len, self.datasets))
        self._order: tuple[int, np.ndarray] = (-1, np.empty((0, 2)))

    def order(self, epoch: int) -> np.ndarray:
        """(dataset, index) pairs of an epoch's samples, shape (samples_per_epoch, 2)."""
        if self._order[0] != epoch:
            parts = []
            for i, dataset in enumerate(self.datasets):
                shuffled = np.random.default_rng([self.seed, epoch, 0, i]).permutation(len(dataset))
                parts.append(np.stack([np.full(len(dataset), i), shuffled], axis=1))
            self._order = (epoch, np.concatenate(parts))
        return self._order[1]

    def sample(self, position: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(tokens, loss mask) of the sample at a position of the endless stream of epochs."""
        epoch, i = divmod(position, self.samples_per_epoch)
        dataset, index = self.order(epoch)[i]
        return self.datasets[dataset].get(int(index), epoch)

    def at(self, position: int) -> list[Batch]:
        """This process's micro-batches of the step that begins after `position` samples."""
        batches = []
        for micro_step in range(self.rank, self.accumulation_steps, self.world_size):
            start = position + micro_step * self.batch_size
            samples = [self.sample(p) for p in range(start, start + self.batch_size)]
            batches.append(self.collate(samples))
        return batches


class ValidationBatches(Batches):
    """A fixed part of the validation data, or all of it: the same batches every time, dealt to the processes."""

    def __init__(self, files: list[TokenFile], *, eval_iters: int, **shared: Any) -> None:
        """eval_iters: how many batches, drawn once by the seed; 0: all, in order."""
        super().__init__(**shared)
        self.datasets = [dataset_of(file, self.block_size, self.overlong, ValidationWindows) for file in files]
        self.samples = [(dataset, i) for dataset in self.datasets for i in range(len(dataset))]
        if 0 < eval_iters * self.batch_size < len(self.samples):
            chosen = np.random.default_rng([self.seed, 2]).permutation(len(self.samples))[
                : eval_iters * self.batch_size
            ]
            self.samples = [self.samples[i] for i in sorted(chosen)]

    def __iter__(self) -> Iterator[Batch]:
        n_batches = math.ceil(len(self.samples) / self.batch_size)
        for i in range(math.ceil(n_batches / self.world_size)):
            start = (i * self.world_size + self.rank) * self.batch_size
            rows = [dataset.get(i, 0) for dataset, i in self.samples[start : start + self.batch_size]]
            if rows:
                yield self.collate(rows)
            else:  # every process gets as many, since they may have to work together on each: this one counts nothing
                dataset, i = self.samples[0]
                spare = self.collate([dataset.get(i, 0)])
                yield spare._replace(loss_mask=torch.zeros(spare.targets.shape), count=0)


def prefetch_steps(batches: Any, position: int, pin_memory: bool = False) -> Iterator[list[Batch]]:
    """batches.at(position) and what follows, made in the background while the caller computes.

    Batches that are made of the model as it is (is_on_policy) cannot be made ahead.
    """
    steps = (batches.at(place) for place in itertools.count(position, batches.samples_per_step))
    if getattr(batches, "is_on_policy", False):
        return steps
    return prefetch([batch.pin_memory() for batch in step] if pin_memory else step for step in steps)
