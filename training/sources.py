"""Where a run's batches come from: one class for every kind of data, looked up in SOURCES by the config.

A source knows its tokenizer and the shape that it needs before there is a model, and makes the batches once there is
one. Training batches have at(position) -> micro-batches of a step, samples_per_step and samples_per_epoch (None: no
end); validation batches are an iterable of the same batches every time.
"""

import functools
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError, command_line
from model import GPT, ModelConfig
from problems.config import SHAPE, ProblemConfig, find_problem, parse_length
from problems.instances import HeldOut, InstanceSampler, TrainInstances, exact_match
from problems.tasks import Problem
from text.batches import TrainBatches, ValidationBatches
from text.token_files import TokenFile, describe_images, how_images_are_read
from text.tokenizer import CharTokenizer, Tokenizer
from text.tokenizer_files import load_tokenizer
from training.advice import preparing, preparing_again
from training.config import TrainConfig
from training.diffusion import NoisyTrainBatches, NoisyValidationBatches
from training.engine import Engine
from training.grpo import Rollouts
from training.losses import PER_TOKEN_LOSSES, load_frozen_model
from weights.checkpointing import load_checkpoint_tokenizer


class TokenFiles:
    """Text, conversations or preferences that data.py prepared: config.dataset_path."""

    settings = None  # a config of its own

    def __init__(self, config: TrainConfig, settings: None, checkpoint: dict[str, Any] | None) -> None:
        self.config = config
        self.resumed = checkpoint["data"] if checkpoint and config.resumes(checkpoint) else {}  # what that run read
        for path in [Path(path) for pair in config.dataset_path for path in pair]:
            if not path.exists():
                raise UserError(f"{path}: no such file; {preparing(path, config)}")
        if checkpoint:
            self.tokenizer = load_checkpoint_tokenizer(checkpoint, config.from_checkpoint)
        else:
            self.tokenizer = find_tokenizer(config)

    def default_shape(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Model fields that a new network for this data takes, where nothing else was asked for."""
        return {}

    def make_batches(self, model: GPT, engine: Engine) -> tuple[TrainBatches, ValidationBatches]:
        """Training and validation batches for a model's window and vocabulary; raises UserError where they do not."""
        config, shape = self.config, model.config
        self.check_attention(shape)
        model.restart_positions = config.restart_positions
        # every host's first process reads the files once for their checksums; a damaged one ends all processes
        is_verified = engine.local_rank == 0
        opened = lambda: [[TokenFile(path, is_verified) for path in pair] for pair in config.dataset_path]  # noqa: E731
        pairs = engine.together(opened)
        train_files, val_files = [train for train, _ in pairs], [val for _, val in pairs]
        self.contents = {
            "sizes": [file.header["n_tokens"] for file in train_files],
            "arguments": [file.header.get("arguments") for file in train_files],
        }
        self.check_contents()
        for file in (*train_files, *val_files):
            check_vocabulary(file, self.tokenizer, config)
            check_images(file, shape, config)
        for train, val in pairs:
            check_preparation(train, val, config)
        shared = {
            "block_size": shape.block_size,
            "vocab_size": shape.vocab_size,
            "batch_size": config.batch_size,
            "seed": config.random_seed,
            "overlong": config.overlong,
            "rank": engine.rank,
            "world_size": engine.world_size,
            "pad_to": pad_to(shape.block_size, engine.use_compile),
            "mask_documents": config.mask_documents,
            "is_compiled": engine.use_compile,
            "image_size": shape.image_size,
        }
        steps, pack_samples = config.gradient_accumulation_steps, config.pack_samples
        makers = TrainBatches, ValidationBatches
        if config.loss == "diffusion":
            makers = NoisyTrainBatches, NoisyValidationBatches
            shared |= {"answer_block": config.answer_block, "mask_span": config.mask_span}
            shared |= {"ends": self.tokenizer.stop_tokens, "in_blocks": shape.is_causal}
        batches = makers[0](train_files, accumulation_steps=steps, pack_samples=pack_samples, **shared)
        validation = makers[1](val_files, n_samples=config.eval_samples, **shared)

        self.evaluated = {
            "validation_tokens": [file.header["n_tokens"] for file in val_files],
            "samples": len(validation.samples),
            **{name: getattr(config, name) for name in ("overlong", "mask_documents", "restart_positions")},
            **({"answer_block": config.answer_block} if config.loss == "diffusion" else {}),
        }
        n_characters = sum(file.header["n_characters"] for file in val_files)
        n_targets = sum(file.header["n_loss_tokens"] for file in val_files)
        self.tokens_per_character = n_targets / max(1, n_characters) if config.loss in PER_TOKEN_LOSSES else None
        self.baselines = mean_baselines([file.header for file in val_files])
        self.has_questions = train_files[-1].starts is not None
        self.has_images = any(file.images is not None for file in train_files)
        return batches, validation

    def check_contents(self) -> None:
        """Raises UserError where a run that is resumed read other files (earlier versions did not note which)."""
        sizes, where = self.contents["sizes"], self.config.from_checkpoint
        if (had := self.resumed.get("sizes", sizes)) == sizes:
            return
        prepared = [files for files in self.resumed.get("arguments", []) if files]
        again = ", ".join(f"`{command_line('data.py', *files, '--tokenizer', where)}`" for files in prepared)
        raise UserError(
            f"dataset_path: the training files have {sizes} tokens, those of {where} had {had}: a run keeps its data"
            + f" (prepared by {again})" * bool(again)
            + "; or give this one another --stage name to start from the weights alone"
        )

    def check_attention(self, shape: ModelConfig) -> None:
        """Raises UserError where the attention of a model is not what the loss needs."""
        is_diffusion, start = self.config.loss == "diffusion", self.config.from_checkpoint
        if not is_diffusion and shape.mask_token:
            what = f"{start} is a model of masked diffusion" if start else "mask_token is for masked diffusion"
            raise UserError(f"{what}, which loss {self.config.loss} cannot train: --loss diffusion does")
        if not is_diffusion and not shape.is_causal:
            raise UserError(
                "is_causal is false: with full attention a model sees the very token it is to predict; set it to true "
                "(--loss diffusion trains with full attention)"
            )
        if is_diffusion and not shape.mask_token:
            raise UserError(f"{start}: has no mask token, as it was not trained by loss diffusion: start anew")

    def metrics(self) -> dict[str, float]:
        """What evaluations measure beside the loss."""
        return {}

    def next_command(self, path: Path, base: str) -> str:
        """How to try the trained model; base: of an adapter, the checkpoint that it belongs to."""
        options = ["-i"] if self.has_questions else []
        options += ["-m", base, "--lora", str(path)] if base else ["-m", str(path)]
        return command_line("inference.py", *options, *(["--image", "FILE"] if self.has_images else []))


def pad_to(block_size: int, is_compiled: bool) -> int:
    """The number of which the lengths of batches are multiples: 16; for a compiled model few lengths, four at most.

    A quarter of the window: another length is compiled anew, one for any length after that, and answers are short.
    """
    return 16 * math.ceil(block_size / 64) if is_compiled else 16


def mean_baselines(headers: list[dict[str, Any]]) -> dict[str, float]:
    """The baselines of all validation files together, where each counts by its targets, as it does in the loss.

    What compressors reach is per character, so there each counts by its characters.
    """
    means = {}
    for name in set.intersection(*(set(header["baselines"]) for header in headers)):
        unit = "n_characters" if name.endswith("_per_character") else "n_loss_tokens"
        total = sum(header["baselines"][name] * header[unit] for header in headers)
        means[name] = total / max(1, sum(header[unit] for header in headers))
    return means


def find_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of the field tokenizer_path; raises UserError where there is none."""
    path, beside = Path(config.tokenizer_path), Path(config.dataset_path[0][0]).with_name("tokenizer.json")
    if path.exists():
        return load_tokenizer(path)
    advice = f"data.py writes one beside the token files: run `{command_line('data.py')}` again"
    if beside.is_file():
        advice = f"use --tokenizer_path {shlex.quote(str(beside))}"
    raise UserError(f"{path}: no such file (tokenizer_path); {advice}")


def check_vocabulary(file: TokenFile, tokenizer: Tokenizer, config: TrainConfig) -> None:
    """Raises UserError unless a file was prepared with this tokenizer: its ids would mean other characters."""
    fingerprint = file.header.get("tokenizer")
    if fingerprint == tokenizer.fingerprint():
        return
    where, beside = config.from_checkpoint or config.tokenizer_path, file.path.with_name("tokenizer.json")
    advice = f"run `{preparing_again(file, where)}`"
    if not config.from_checkpoint and beside.is_file() and load_tokenizer(beside).fingerprint() == fingerprint:
        advice = f"use --tokenizer_path {shlex.quote(str(beside))}"
    raise UserError(
        f"{file.path} was prepared with another vocabulary ({file.header.get('vocab_size')} tokens) "
        f"than that of {where} ({tokenizer.vocab_size}); {advice}"
    )


def check_images(file: TokenFile, shape: ModelConfig, config: TrainConfig) -> None:
    """Raises UserError where a file has images, and of other sizes than the model reads, or in another place."""
    if file.images is None:
        return
    prepared, read = how_images_are_read(file.header), how_images_are_read(shape.to_dict())
    if prepared == read:
        return
    sizes = " ".join(f"--{name} {str(value).lower()}" for name, value in read.items())
    advice = f"run `{preparing_again(file, config.from_checkpoint or config.tokenizer_path)} {sizes}`"
    if not shape.image_size:
        sizes = " ".join(f"--{name} {str(value).lower()}" for name, value in prepared.items())
        advice = f"{sizes} gives a new model an encoder for them"
    raise UserError(
        f"{file.path}: {describe_images(prepared)}, which this model does not read "
        f"(image_size {read['image_size']}, patch_size {read['patch_size']}, image_last {read['image_last']}); {advice}"
    )


def check_preparation(train: TokenFile, val: TokenFile, config: TrainConfig) -> None:
    """Raises UserError where two files of one name are of two runs of data.py: one was ended between writing them."""
    same_name = train.path.with_name(train.path.name.replace("_train", "_val")) == val.path
    if same_name and train.header.get("preparation") != val.header.get("preparation"):
        again = preparing_again(train, config.from_checkpoint or config.tokenizer_path)
        raise UserError(
            f"{val.path} is of another run of data.py than {train.path}: what is in one may be in the other too; "
            f"run `{again}`"
        )


class ToyProblem:
    """Instances of a toy problem, generated as training goes on: the field `problem`."""

    contents = None  # training without end
    has_questions = True
    tokens_per_character = None
    baselines = None

    def __init__(self, config: TrainConfig, settings: ProblemConfig, checkpoint: dict[str, Any] | None) -> None:
        self.config, self.settings = config, settings
        self.problem = find_problem(settings.problem)
        self.tokenizer = problem_tokenizer(self.problem)
        self.sampler = InstanceSampler(settings, self.tokenizer, answers_only=config.loss == "grpo")
        if checkpoint:
            stored = load_checkpoint_tokenizer(checkpoint, config.from_checkpoint)
            trained = checkpoint["train_config"]
            if stored.fingerprint() != self.tokenizer.fingerprint():
                what = f"a model of the problem {trained['problem']}" if "problem" in trained else "a model of a text"
                raise UserError(
                    f"{config.from_checkpoint}: {what}: its alphabet is not that of {settings.problem}; "
                    f"--from_checkpoint {Path('checkpoint', f'problem_{settings.problem}.pt')} has it"
                )
            fraction = trained.get("train_fraction", settings.train_fraction)
            if trained.get("problem") == settings.problem and fraction != settings.train_fraction:
                raise UserError(
                    f"train_fraction is {settings.train_fraction} here, {fraction} in {config.from_checkpoint}: "
                    f"instances that it was trained on would be held out: --train_fraction {fraction}"
                )

    def default_shape(self, asked: dict[str, Any]) -> dict[str, Any]:
        is_causal = self.problem.is_causal
        if asked.get("is_causal", is_causal) != is_causal:
            raise UserError(
                f"{self.settings.problem} is defined with is_causal {str(is_causal).lower()}: see its entry"
            )
        return {**SHAPE, **self.problem.shape, "is_causal": is_causal, "block_size": self.sampler.window()}

    def make_batches(self, model: GPT, engine: Engine) -> tuple[TrainInstances | Rollouts, HeldOut]:
        config = self.config
        if model.config.n_future > 1:
            raise UserError(
                f"n_future {model.config.n_future} is for texts: the targets of a toy problem are not the tokens that "
                "follow; give --n_future 1"
            )
        if model.config.mask_token:
            raise UserError("mask_token is for masked diffusion of texts (--loss diffusion): leave it out")
        check_window(self.sampler, model.config, config.from_checkpoint)
        shared = {
            "batch_size": config.batch_size,
            "seed": config.random_seed,
            "rank": engine.rank,
            "world_size": engine.world_size,
        }
        n = config.eval_samples or 10_000
        validation = HeldOut(self.sampler, "val", parse_length(self.settings.train_length), n, **shared)
        not_evaluated = ("test_length", "test_instances", "length")
        settings = {name: value for name, value in self.settings.to_dict().items() if name not in not_evaluated}
        self.evaluated = {"samples": len(validation), "random_seed": config.random_seed, **settings}
        if config.loss == "grpo":
            if not config.reference:
                name = self.settings.problem
                raise UserError(
                    "from_checkpoint is not set: loss grpo starts from a model that is right now and then; train one "
                    f"with `{command_line('problem.py', name, '--max_steps', '45')}`, then add "
                    f"--from_checkpoint checkpoint/problem_{name}.pt"
                )
            field = "from_checkpoint" if config.reference == config.from_checkpoint else "reference"
            reference = load_frozen_model(field, config.reference, self.tokenizer, engine.device)
            check_window(self.sampler, reference.config, config.reference)
            batches = Rollouts(self.sampler, model, reference, engine)
        else:
            batches = TrainInstances(self.sampler, accumulation_steps=config.gradient_accumulation_steps, **shared)
        self.exact_match = functools.partial(exact_match, model, validation, engine)
        self.engine = engine
        return batches, validation

    def metrics(self) -> dict[str, float]:
        right = np.concatenate(list(self.exact_match().values()))
        n_right, n = self.engine.sum_over_ranks(float(right.sum()), float(len(right)))
        return {"accuracy": n_right / n}

    def next_command(self, path: Path, base: str) -> str:
        return command_line("problem.py", self.settings.problem, "--checkpoint", str(path))


def problem_tokenizer(problem: Problem) -> CharTokenizer:
    """Characters of a problem's alphabet."""
    return CharTokenizer("".join(sorted(set(problem.alphabet))))


def check_window(sampler: InstanceSampler, shape: ModelConfig, where: str) -> None:
    """Raises UserError where a problem's longest instances do not fit a model's context window.

    where: the checkpoint that the model is of, if it is of one.
    """
    if sampler.window() > shape.block_size:
        advice = f"take a smaller --length, or another checkpoint than {where}" if where else "leave it out"
        raise UserError(
            f"{sampler.config.problem}: length {sampler.config.longest} needs a window of {sampler.window()} tokens, "
            f"block_size is {shape.block_size}: {advice}"
        )


SOURCES = {"dataset_path": TokenFiles, "problem": ToyProblem}  # by the field that names the data
