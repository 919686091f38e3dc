"""What to type next, for messages: every command here does what the message says when it is typed as it stands."""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from base.configuration import command_line
from text.token_files import TokenFile, arguments_for_all
from training.config import TrainConfig

RAW_FILES = {  # what data.py prepares by itself, by stage: in its output folder
    "pretrain": ("text", "pretrain.txt"),
    "sft": ("questions and answers", "sft.jsonl"),
    "dpo": ("preference pairs", "dpo.jsonl"),
}


def preparing(path: Path, config: TrainConfig) -> str:
    """How a token file that is missing is made."""
    if config.planned_for:
        return "a plan is trained in the folder in which it was made, on the data that was prepared there"
    stage, folder = path.stem.removesuffix("_train").removesuffix("_val"), path.parent
    if stage not in RAW_FILES or stage == path.stem:
        example = '\'[["dataset/pretrain_train.bin", "dataset/pretrain_val.bin"]]\''
        return f"`{command_line('data.py')}` writes dataset/STAGE_train.bin and _val.bin, STAGE is one of " + (
            f"{', '.join(RAW_FILES)}; name them so: --dataset_path {example}"
        )
    contents, name = RAW_FILES[stage]
    found = sorted(file.name for file in folder.glob(f"{stage}.*"))
    name = found[0] if found else name
    arguments = [] if folder == Path("dataset") else ["--output", str(folder)]
    if config.from_checkpoint:  # its vocabulary, not one of this file's own
        arguments = [str(folder / name), *arguments, "--tokenizer", config.from_checkpoint]
    action = "run" if found else f"put {contents} into {folder / name}, then run"
    advice = f"{action} `{command_line('data.py', *arguments)}`"
    beside = folder / "tokenizer.json"
    if config.from_checkpoint or Path(config.tokenizer_path) == beside:
        return advice
    return f"{advice} and train with --tokenizer_path {shlex.quote(str(beside))}"


def preparing_again(file: TokenFile, tokenizer: str) -> str:
    """The command that prepares a token file anew, with the tokenizer of a checkpoint or of a tokenizer file."""
    arguments = file.header.get("arguments")
    return command_line("data.py", *(["FILES"] if arguments is None else arguments), "--tokenizer", tokenizer)


def preparing_all(folder: Path) -> str:
    """The command that prepares the texts of all token files in a folder anew, with one tokenizer."""
    return command_line("data.py", *arguments_for_all(folder), "--tokenizer", "char")


def limits_reached(config: TrainConfig, state: Any) -> dict[str, Any]:
    """Fields that end a run here, by name, each with a value that lets it go on. state: a training.setup.State."""
    reached: dict[str, Any] = {}
    if config.max_steps and state.step >= config.max_steps:
        reached["max_steps"] = 2 * state.step
    if config.decay_over == "time" and state.seconds >= 60 * config.max_minutes:
        used = state.seconds / 60  # the last step may have ended a little later
        reached["max_minutes"] = 2 * (config.max_minutes if used < 1.5 * config.max_minutes else math.ceil(used))
    if config.patience and state.evals_without_gain >= config.patience:
        reached["patience"] = 2 * config.patience
    if config.target_val_loss is not None and state.best_val_loss <= config.target_val_loss:
        reached["target_val_loss"] = "null"
    return reached


def going_on(run: Any, argv: list[str]) -> str:
    """The command that goes on with a run that was started with the arguments argv. run: a training.setup.Run."""
    fields = {**limits_reached(run.config, run.state), "from_checkpoint": run.last_path}
    for name in fields:
        argv = without_flag(argv, f"--{name}")
    added = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    command = f"{run.engine.launcher} {shlex.join([sys.argv[0], *argv, *added])}"
    if run.config.prediction.startswith("predicted") and run.config.decay_over == "steps" and "max_steps" in fields:
        command += "  # but the plan ends here: reading on, a network would learn the text by heart"
    return command


def without_flag(argv: list[str], flag: str) -> list[str]:
    """The arguments less one flag and its value."""
    kept, skip = [], False
    for argument in argv:
        if not skip and argument != flag and not argument.startswith(flag + "="):
            kept.append(argument)
        skip = argument == flag
    return kept
