"""The instances of toy problems: drawn from the training, validation or test split, and encoded as batches.

sampler = InstanceSampler(ProblemConfig(problem="sort"), tokenizer)
batches = TrainInstances(sampler, batch_size=256, accumulation_steps=1, seed=1337)
batches.at(position)                                    # the micro-batches of a step
HeldOut(sampler, "test", lengths, 10_000, batch_size=256, seed=1337)        # what training never sees
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from base.configuration import UserError
from problems.config import ProblemConfig, find_problem, parse_length
from problems.tasks import NOTHING, Instances, close_gaps, join
from text.batches import Batch
from text.tokenizer import EOS, PADDING, CharTokenizer, codepoints


class Examples(NamedTuple):
    """A batch, and which of its targets are the answer (B, T): the others are marks on the way."""

    batch: Batch
    answer_mask: torch.Tensor


SPLITS = ("train", "val", "test")
MULTIPLIERS = np.random.default_rng(0).integers(0, 1 << 63, 4096, dtype=np.uint64) | np.uint64(1)


def hash_rows(codes: np.ndarray) -> np.ndarray:
    """64-bit hashes (n,) of rows of character codes (n, P) without gaps; NOTHINGs at the end do not count."""
    if codes.shape[1] > len(MULTIPLIERS):
        raise UserError(f"prompts of {codes.shape[1]} characters are too long: at most {len(MULTIPLIERS)}")
    hashes = codes.astype(np.uint64) @ MULTIPLIERS[: codes.shape[1]]
    hashes ^= hashes >> np.uint64(31)  # the finaliser of splitmix64, so that every bit depends on all
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ hashes >> np.uint64(29)


class InstanceSampler:
    """Draws the instances of a problem from one split or another, and encodes them."""

    def __init__(self, config: ProblemConfig, tokenizer: CharTokenizer, answers_only: bool = False) -> None:
        """answers_only: intermediate results are no targets, whatever config.supervise says."""
        self.config, self.problem, self.answers_only = config, find_problem(config.problem), answers_only
        codes = codepoints(tokenizer.characters)
        self.id_of = np.zeros(codes.max() + 1, np.int64)
        self.id_of[codes] = tokenizer.encode(tokenizer.characters)

    def ids(self, codes: np.ndarray) -> np.ndarray:
        """Token ids of character codes; NOTHING becomes PADDING."""
        ids = self.id_of.take(codes, mode="clip")
        foreign = (ids == PADDING) & (codes != NOTHING)
        if foreign.any() or codes.max() >= len(self.id_of):
            character = chr(codes[foreign][0] if foreign.any() else codes.max())
            raise UserError(f"the generator of {self.config.problem} makes {character!r}, which its alphabet lacks")
        return ids

    def split_of(self, hashes: np.ndarray) -> np.ndarray:
        """Index (n,) into SPLITS: of what training leaves, a fifth is to validate on, the rest to test on."""
        place, share = hashes / 2.0**64, self.config.train_fraction
        return (place >= share).astype(int) + (place >= share + (1 - share) / 5)

    def generate(self, rng: np.random.Generator, n: int, length: int) -> Instances:
        """n instances of any split, their prompts closed and ended."""
        prompt, answer, marks = self.problem.generate(rng, n, length, self.config)
        prompt = join(prompt, self.problem.ends)
        if marks is None:
            return Instances(*close_gaps(prompt), answer)
        marks = np.pad(marks, ((0, 0), (0, len(self.problem.ends))))
        prompt, marks = close_gaps(prompt, marks)
        return Instances(prompt, answer, marks)

    def draw(self, rng: np.random.Generator, n: int, length: int, split: str) -> Instances:
        """n instances of a split; distinct ones outside training, and fewer where there are not so many."""
        found, n_found, seen, fruitless = [], 0, np.empty(0, np.uint64), 0
        share = {"train": self.config.train_fraction}.get(split, (1 - self.config.train_fraction) / 2)
        while n_found < n and fruitless < 10:
            instances = self.generate(rng, int((n - n_found) / share * 1.1) + 16, length)
            hashes = hash_rows(instances.prompt)
            kept = np.flatnonzero(self.split_of(hashes) == SPLITS.index(split))
            if split != "train":
                kept = kept[np.unique(hashes[kept], return_index=True)[1]]
                kept = kept[~np.isin(hashes[kept], seen)]
            kept = np.sort(kept)[: n - n_found]
            seen = np.append(seen, hashes[kept])
            found.append(Instances(*(None if part is None else part[kept] for part in instances)))
            n_found += len(kept)
            fruitless = 0 if len(kept) else fruitless + 1
        return Instances(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*found, strict=True)))

    def encode(self, instances: Instances) -> Examples:
        """Token ids, targets and masks. Causal: prompt, answer, <|eos|>; else the answer stands under the prompt."""
        ids, targets = self.ids(instances.prompt), self.ids(instances.answer)
        is_marked = instances.marks is not None and not self.answers_only
        marks = self.ids(instances.marks) if is_marked else np.zeros_like(ids)
        if self.problem.is_causal:
            end = np.full((len(ids), 1), EOS)
            is_answer = np.repeat([0, 1], [ids.shape[1], targets.shape[1] + 1])[None].repeat(len(ids), 0)
            marks = np.pad(marks, ((0, 0), (0, targets.shape[1] + 1)))
            ids, is_answer, marks = close_gaps(np.concatenate([ids, targets, end], axis=1), is_answer, marks)
            longest = (ids > 0).sum(axis=1).max()
            ids, marks, targets = ids[:, : longest - 1], marks[:, : longest - 1], ids[:, 1:longest]
            answer_mask = (is_answer[:, 1:longest] == 1) & (targets > 0)
        else:
            answer_mask = targets > 0
        loss_mask = answer_mask | (marks > 0)
        targets = np.where(answer_mask, targets, marks)
        batch = Batch(
            torch.from_numpy(np.ascontiguousarray(ids)),
            torch.from_numpy(targets),
            torch.from_numpy(loss_mask.astype(np.float32)),
            int(loss_mask.sum()),
        )
        return Examples(batch, torch.from_numpy(answer_mask))

    def window(self) -> int:
        """The block_size that the longest instances need."""
        prompt, answer, _ = self.generate(np.random.default_rng(0), 1, self.config.longest)
        return prompt.shape[1] + (answer.shape[1] if self.problem.is_causal else 0)


class TrainInstances:
    """Training batches without end, each a pure function of the position in the data; a micro-batch has one length.

    As with token files, the global batch does not depend on the number of processes: the micro-batches of a step are
    dealt to the ranks in turn.
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
                raise UserError(f"no instance of length {length} falls to training; raise train_fraction or length")

    def at(self, position: int) -> list[Batch]:
        """This process's micro-batches of the step that begins after `position` samples."""
        batches = []
        for micro_step in range(self.rank, self.accumulation_steps, self.world_size):
            rng = np.random.default_rng([self.seed, position + micro_step * self.batch_size])
            length = int(rng.choice(self.lengths))
            instances = self.sampler.draw(rng, self.batch_size, length, "train")
            batches.append(self.sampler.encode(instances).batch)
        return batches


class HeldOut:
    """Distinct instances that training never sees, as many of each length as there are, up to a number in all."""

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
        for i, length in enumerate(lengths):  # what the shorter lengths lack, the longer ones give
            quota = -(-n // (len(lengths) - i))
            self.by_length[length] = sampler.draw(rng, quota, length, split)
            n -= len(self.by_length[length].prompt)
        if not any(len(instances.prompt) for instances in self.by_length.values()):
            raise UserError("no instance is held out: raise the length, or lower train_fraction")

    def examples(self) -> Iterator[tuple[int, Examples]]:
        """This process's batches, each with the length of its instances.

        Every process gets equally many, because a sharded model's forward pass needs all of them: where the batches run
        out, a repeated one with an empty loss mask (count 0) fills the place.
        """
        places = [
            (length, start)
            for length, instances in self.by_length.items()
            for start in range(0, len(instances.prompt), self.batch_size)
        ]
        for turn in range(0, len(places), self.world_size):
            is_spare = turn + self.rank >= len(places)
            length, start = places[0 if is_spare else turn + self.rank]
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
    """Whether each of this process's held-out answers is right from first to last character (n,), by length.

    One pass over prompt and true answer tells what greedy decoding would say: as long as every token so far was right,
    decoding has seen the same tokens; and the first wrong token makes the answer wrong in both.
    """
    model.eval()
    right: dict[int, list[np.ndarray]] = {length: [np.empty(0, bool)] for length in held_out.by_length}
    for length, (batch, answer_mask) in held_out.examples():
        batch = batch.to(engine.device)
        with engine.autocast():
            predicted = model(batch.idx)[0].argmax(-1)  # (B, T)
        matches = (predicted == batch.targets) | ~answer_mask.to(engine.device)
        if batch.count:
            right[length].append(matches.all(1).cpu().numpy())
    model.train()
    return {length: np.concatenate(parts) for length, parts in right.items()}
