"""The data loader: training and validation batches from token files.

    file = TokenFile("dataset/pretrain_train.bin")
    batches = TrainBatches([file], block_size=256, vocab_size=100, batch_size=32, accumulation_steps=4, seed=1337)
    micro_batches = batches.at(position)        # position: number of samples that training has seen before

Batches are a pure function of the position: a run resumes at exactly the next sample by storing one number, and every
process can work out its own part of a global batch without communication.
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
    """A micro-batch of B sequences of T tokens; preference pairs (losses.py) and rollouts (grpo.py) add fields."""

    idx: torch.Tensor  # (B, T) token ids
    targets: torch.Tensor  # (B, T) idx shifted by one: the next tokens
    loss_mask: torch.Tensor | None  # (B, T) 1 for targets in the loss, else 0; None: all are
    count: int  # number of targets in the loss; of preference pairs: number of pairs
    documents: torch.Tensor | None = None  # (B, T) document ids; attention stays within a document
    reference: torch.Tensor | None = None  # reference model: pairs' margins (B / 2,), rollouts' log p (B, T)
    old: torch.Tensor | None = None  # (B, T) rollouts: log p of the policy that sampled them
    advantage: torch.Tensor | None = None  # (B,) rollouts
    noise: torch.Tensor | None = (
        None  # (B, T) in [0, 1): a token is masked where it is below the rate; NEVER: not at all
    )
    rate: torch.Tensor | None = None  # (B, T) masking rates in (0, 1]
    blocks: torch.Tensor | None = None  # (B, T) ascending: targets that are filled in together, after those before
    images: torch.Tensor | None = None  # (N, 3, S, S) uint8, for the places in idx with the id vocab_size, in order

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """A batch with the function applied to every tensor."""
        return Batch(*(function(part) if isinstance(part, torch.Tensor) else part for part in self))

    def to(self, device: torch.device) -> "Batch":
        return self.apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Page-locked memory, from which copies to a GPU run while it computes."""
        return self.apply(torch.Tensor.pin_memory)


# ------------------------------------------------------------------------------------------------------ datasets
# get(index, epoch) returns a sample: its tokens, its loss mask or None, and its image if it has one


class Windows:
    """Running text for training, cut into windows of block_size + 1 tokens that overlap by one: each token is a target.

    Every epoch starts at another random offset, so that the text is cut at different places.
    """

    rows_per_sample = 1

    def __init__(self, file: TokenFile, block_size: int, seed: int) -> None:
        self.file, self.tokens, self.block_size, self.seed = file, file.tokens, block_size, seed
        n_windows = (len(self.tokens) - 1) // block_size
        if n_windows < 1:
            raise UserError(
                f"{file.path}: {len(self.tokens)} tokens are fewer than one window (block_size {block_size} + 1): "
                f"prepare more text, or lower block_size"
            )
        self.length = max(1, n_windows - 1)  # one window less leaves room for the offset
        self.max_offset = min(block_size - 1, len(self.tokens) - 1 - self.length * block_size)
        self._offset = (-1, 0)  # (epoch, its offset)

    def __len__(self) -> int:
        return self.length

    @property
    def lengths(self) -> np.ndarray:
        """Of the samples, in tokens that a model reads."""
        return np.array([self.block_size])

    def get(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        if self._offset[0] != epoch:
            self._offset = (epoch, int(np.random.default_rng([self.seed, epoch, 1]).integers(self.max_offset + 1)))
        start = self._offset[1] + index * self.block_size
        return self.tokens[start : start + self.block_size + 1], None


class ValidationWindows:
    """Running text for validation: every target exactly once, in windows from the start; the last may be shorter."""

    def __init__(self, file: TokenFile, block_size: int) -> None:
        self.file, self.tokens, self.block_size = file, file.tokens, block_size
        if len(self.tokens) < 2:
            raise UserError(f"{file.path}: too short to evaluate on ({len(self.tokens)} tokens)")

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.block_size)

    def get(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        start = index * self.block_size
        return self.tokens[start : start + self.block_size + 1], None


class Samples:
    """Fine-tuning samples with loss masks; those longer than block_size + 1 tokens are dropped or cut (`overlong`)."""

    rows_per_sample = 1

    def __init__(self, file: TokenFile, block_size: int, overlong: str) -> None:
        self.file, self.block_size = file, block_size
        self.kept = np.arange(len(file.starts) - 1)
        long = np.diff(file.starts) > block_size + 1
        self.n_overlong = int(long.sum())
        if self.n_overlong and overlong == "drop":
            self.kept = self.kept[~long]
        elif self.n_overlong:  # a cut sample must still have a target in the loss
            keeps_answer = [not long[i] or self.get_sample(i)[1][1:].any() for i in self.kept]
            self.kept = self.kept[keeps_answer]
        if not len(self.kept):
            shortest = np.diff(file.starts).min() - 1
            raise UserError(f"{file.path}: no sample fits block_size {block_size}: the shortest needs {shortest}")

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> np.ndarray:
        """Of the samples, in tokens that a model reads."""
        return np.minimum(np.diff(self.file.starts)[self.kept] - 1, self.block_size)

    def get_sample(self, i: int) -> "Sample":
        file, start = self.file, self.file.starts[i]
        end = min(file.starts[i + 1], start + self.block_size + 1)
        has_image = file.images is not None and file.image_of[i] >= 0
        image = (file.images[file.image_of[i]],) if has_image else ()
        return file.tokens[start:end], file.loss_mask[start:end], *image

    def get(self, index: int, epoch: int) -> "Sample":
        return self.get_sample(self.kept[index])


class Pairs:
    """Preference pairs: a chosen and a rejected answer to the same prompt, samples 2 i and 2 i + 1 of the file.

    reference: the reference model's log p(chosen) / p(rejected) of every pair; losses.py computes it before training.
    """

    rows_per_sample = 2

    def __init__(self, file: TokenFile, block_size: int) -> None:
        self.file, self.block_size = file, block_size
        lengths = np.diff(file.starts)
        self.kept = np.flatnonzero(np.maximum(lengths[0::2], lengths[1::2]) <= block_size + 1)
        self.n_overlong = len(lengths) // 2 - len(self.kept)
        if not len(self.kept):
            shortest = np.maximum(lengths[0::2], lengths[1::2]).min() - 1
            raise UserError(f"{file.path}: no pair fits block_size {block_size}: the shortest needs {shortest}")
        self.reference = np.zeros(len(self.kept), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> np.ndarray:
        """Of the longer answer of every pair, with its prompt, in tokens that a model reads."""
        lengths = np.diff(self.file.starts) - 1
        return np.maximum(lengths[0::2], lengths[1::2])[self.kept]

    def get(self, index: int, epoch: int) -> "Pair":
        starts, first = self.file.starts, 2 * self.kept[index]
        chosen, rejected = (slice(starts[i], starts[i + 1]) for i in (first, first + 1))
        tokens, mask = self.file.tokens, self.file.loss_mask
        return Pair((tokens[chosen], mask[chosen]), (tokens[rejected], mask[rejected]), float(self.reference[index]))


class Pair(NamedTuple):
    chosen: "Sample"
    rejected: "Sample"
    reference: float


def make_dataset(file: TokenFile, block_size: int, overlong: str, windows: Callable[..., Any]) -> Any:
    """The dataset class for what a file holds; windows: Windows or ValidationWindows, for running text."""
    if file.starts is None:
        return windows(file, block_size)
    return Pairs(file, block_size) if file.header.get("has_pairs") else Samples(file, block_size, overlong)


# ------------------------------------------------------------------------------------------------------ collation

# tokens, their loss mask (None: all are in the loss), and the pixels (3, S, S) of a sample about an image
Sample = tuple[np.ndarray, np.ndarray | None] | tuple[np.ndarray, np.ndarray, np.ndarray]


def pack(samples: list[Sample], block_size: int, n_unread: int = 1) -> list[list[Sample]]:
    """Sequence packing: samples distributed over few rows of at most block_size tokens, so that little is padding.

    n_unread: tokens of each that take no place: the last one, which is a target only.

    Bin packing by first-fit decreasing: the longest sample first, each into the first row with room for it. Attention
    must not cross samples of a row: collate() gives each its own document id, for a block-diagonal mask (Krell et al.
    2021, arXiv:2107.02027).
    """
    rows: list[list[Sample]] = []
    free: list[int] = []  # tokens left in each row
    for sample in sorted(samples, key=lambda sample: -len(sample[0])):
        length = len(sample[0]) - n_unread
        i = next((i for i, n_free in enumerate(free) if n_free >= length), len(rows))
        if i == len(rows):
            rows.append([])
            free.append(block_size)
        rows[i].append(sample)
        free[i] -= length
    return rows


def document_ids(tokens: np.ndarray, bos: int | None = BOS, eos: int = EOS) -> np.ndarray:
    """Every token's document id, counted from 1: a document starts at bos (if there is one), and after eos."""
    is_first = np.zeros(len(tokens), bool) if bos is None else tokens == bos
    is_first[1:] |= tokens[:-1] == eos
    is_first[0] = True
    return is_first.cumsum()


def collate(
    rows: list[list[Sample]],
    block_size: int,
    vocab_size: int,
    pad_to: int,
    mask_documents: bool = False,
    keep_mask: bool = False,
    keep_documents: bool = False,
    delimiters: tuple[int | None, int] = (BOS, EOS),
    image_size: int = 0,
) -> Batch:
    """Rows of samples as one batch, padded to a common length: a multiple of pad_to, at most block_size.

    Samples packed into a row get different document ids, so that attention stays within each; with mask_documents so do
    the documents of running text. Without a loss mask, all targets but padding are in the loss. Masks that say nothing
    are left out, unless they are to be kept: a compiled model is compiled again where an input is missing. With an
    image_size there are always images, perhaps none of them: in DDP every process must use all weights.
    """
    longest = max(sum(len(tokens) - 1 for tokens, *_ in row) for row in rows)
    T = min(block_size, math.ceil(longest / pad_to) * pad_to)
    idx, targets = (np.full((len(rows), T), PADDING, dtype=np.int64) for _ in range(2))
    mask = np.zeros((len(rows), T), dtype=np.float32)
    documents = np.zeros((len(rows), T), dtype=np.int64)  # 0: padding
    images: list[np.ndarray] = []
    for i, row in enumerate(rows):
        start = 0
        for tokens, loss_mask, *image in row:
            images += image
            end, is_text = start + len(tokens) - 1, loss_mask is None
            idx[i, start:end], targets[i, start:end] = tokens[:-1], tokens[1:]  # each token predicts the next
            mask[i, start:end] = 1 if is_text else loss_mask[1:]
            ids = document_ids(tokens[:-1], *delimiters) if mask_documents and is_text and end > start else 1
            documents[i, start:end] = documents[i].max() + ids
            start = end
    if image_size:
        targets[targets == vocab_size] = PADDING  # a patch: what is read there is no token, and not in the loss
    if max(idx.max() - bool(image_size), targets.max()) >= vocab_size:
        raise UserError(
            f"token id {max(idx.max(), targets.max())} in the data is outside the vocabulary of {vocab_size}: "
            "was the data prepared with a different tokenizer?"
        )
    count = int(mask.sum())
    pixels = np.stack(images) if images else np.zeros((0, 3, image_size, image_size), dtype=np.uint8)
    has_documents = documents.max() > 1 or keep_documents
    return Batch(
        torch.from_numpy(idx),
        torch.from_numpy(targets),
        None
        if count == mask.size and not keep_mask
        else torch.from_numpy(mask),  # without a mask there is less to compute
        count,
        torch.from_numpy(documents) if has_documents else None,
        images=torch.from_numpy(pixels) if image_size else None,
    )


def collate_pairs(pairs: list[Pair], block_size: int, vocab_size: int, pad_to: int) -> Batch:
    """Preference pairs as one batch of twice as many rows: all chosen answers, then all rejected ones."""
    rows = [[pair.chosen] for pair in pairs] + [[pair.rejected] for pair in pairs]
    batch = collate(rows, block_size, vocab_size, pad_to)
    reference = torch.tensor([pair.reference for pair in pairs])
    return batch._replace(count=len(pairs), reference=reference)


# ------------------------------------------------------------------------------------------------------ batches


class Batches:
    """Settings and collation that training and validation batches share.

    rank of world_size: this process. pad_to: sequence lengths are padded to multiples of it, for few different shapes.
    is_compiled: the model is, so that every batch is to have the same inputs. image_size: of a model that sees.
    """

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
        is_compiled: bool = False,
        image_size: int = 0,
    ) -> None:
        self.image_size = image_size
        self.block_size, self.vocab_size, self.batch_size, self.seed = block_size, vocab_size, batch_size, seed
        self.overlong, self.rank, self.world_size, self.pad_to = overlong, rank, world_size, pad_to
        self.mask_documents, self.pack_samples, self.is_compiled = mask_documents, pack_samples, is_compiled

    def collate(self, samples: list[Any]) -> Batch:
        """Samples or preference pairs as a batch."""
        if isinstance(samples[0], Pair):
            return collate_pairs(samples, self.block_size, self.vocab_size, self.pad_to)
        rows = pack(samples, self.block_size) if self.pack_samples else [[sample] for sample in samples]
        is_masked = samples[0][1] is not None or self.mask_documents
        keep_mask = self.is_compiled and is_masked
        keep_documents = keep_mask and (self.mask_documents or self.pack_samples)
        shape = self.block_size, self.vocab_size, self.pad_to
        delimiters = self.datasets[0].file.delimiters
        return collate(rows, *shape, self.mask_documents, keep_mask, keep_documents, delimiters, self.image_size)


class TrainBatches(Batches):
    """Training batches as a pure function of the position in the data, the number of samples seen before.

    An epoch goes through the datasets in order (a curriculum), each shuffled anew by the seed, every window or sample
    once. The step at position p takes samples p, p + 1, ..., on any number of processes: its accumulation_steps
    micro-batches of batch_size samples are distributed over the processes round-robin.
    """

    def __init__(self, files: list[TokenFile], *, accumulation_steps: int, **shared: Any) -> None:
        super().__init__(**shared)
        windows = functools.partial(Windows, seed=self.seed)
        self.datasets = [make_dataset(file, self.block_size, self.overlong, windows) for file in files]
        self.accumulation_steps = accumulation_steps
        self.samples_per_step = self.batch_size * accumulation_steps
        self.samples_per_epoch = sum(map(len, self.datasets))
        self._order: tuple[int, np.ndarray] = (-1, np.empty((0, 2)))

    def order(self, epoch: int) -> np.ndarray:
        """The shuffled samples of an epoch as (dataset, index) pairs, shape (samples_per_epoch, 2)."""
        if self._order[0] != epoch:
            parts = []
            for i, dataset in enumerate(self.datasets):
                shuffled = np.random.default_rng([self.seed, epoch, 0, i]).permutation(len(dataset))
                parts.append(np.stack([np.full(len(dataset), i), shuffled], axis=1))
            self._order = (epoch, np.concatenate(parts))
        return self._order[1]

    def sample(self, position: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The sample, or preference pair, at a position in the endless sequence of epochs."""
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
    """A fixed random part of the validation data, or all of it: the same samples at every evaluation.

    Neither the batch size nor the seed decides which, so that the losses of different runs can be compared. The batches
    are distributed over the processes round-robin.
    """

    def __init__(self, files: list[TokenFile], *, n_samples: int, **shared: Any) -> None:
        """n_samples: how many are evaluated, at most; 0: all. A larger part includes every smaller one."""
        super().__init__(**shared)
        self.datasets = [make_dataset(file, self.block_size, self.overlong, ValidationWindows) for file in files]
        self.samples = [(dataset, i) for dataset in self.datasets for i in range(len(dataset))]
        if 0 < n_samples < len(self.samples):
            chosen = np.random.default_rng(0).permutation(len(self.samples))[:n_samples]
            self.samples = [self.samples[i] for i in sorted(chosen)]

    def sample(self, n: int) -> Any:
        """The n-th of those that are evaluated."""
        dataset, i = self.samples[n]
        return dataset.get(i, 0)

    def __iter__(self) -> Iterator[Batch]:
        n_batches = math.ceil(len(self.samples) / self.batch_size)
        for i in range(math.ceil(n_batches / self.world_size)):
            start = (i * self.world_size + self.rank) * self.batch_size
            rows = [self.sample(n) for n in range(start, min(start + self.batch_size, len(self.samples)))]
            if rows:
                yield self.collate(rows)
            else:  # every process runs as many forward passes, as sharded ones are collective: a dummy, not in the loss
                dummy = self.collate([self.sample(0)])
                yield dummy._replace(loss_mask=torch.zeros(dummy.targets.shape), count=0)


def prefetch_steps(batches: Any, position: int, pin_memory: bool = False) -> Iterator[list[Batch]]:
    """The micro-batches of each step from a position on, prepared in a background thread while the model trains.

    Batches sampled from the current model (is_on_policy) cannot be prepared in advance.
    """
    steps = (batches.at(p) for p in itertools.count(position, batches.samples_per_step))
    if getattr(batches, "is_on_policy", False):
        return steps
    return prefetch([batch.pin_memory() for batch in step] if pin_memory else step for step in steps)
