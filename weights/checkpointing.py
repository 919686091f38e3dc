"""Writing and reading checkpoints: atomic, checked, and without arbitrary pickles.

    save_checkpoint("checkpoint/pretrain.pt", {"model": model.state_dict(), ...})
    checkpoint = load_checkpoint("checkpoint/pretrain.pt")      # a file, or the folder of a sharded checkpoint
    model = load_model(checkpoint, "checkpoint/pretrain.pt")

A checkpoint is a dict of tensors and plain values: model (state dict), optimizer, step, model_config, train_config,
tokenizer, rng, data, best_val_loss, format. It is loaded with weights_only=True: unpickling an untrusted file could
otherwise run any code.
"""

import itertools
import math
import os
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from base.configuration import CONFIG_FOLDERS, UserError, check_fields, command_line, fields_of, read_json
from base.files import atomic_write
from model import GPT, ModelConfig
from problems.tasks import PROBLEMS
from text.tokenizer import Tokenizer
from text.tokenizer_files import tokenizer_from_dict

FORMAT = 1
REQUIRED = {
    "model": dict,
    "optimizer": dict,
    "step": int,
    "model_config": dict,
    "train_config": dict,
    "tokenizer": dict,
    "rng": dict,
    "data": dict,
    "best_val_loss": float,
}


WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRAINING_FIELDS = {"stage", "loss", "from_checkpoint", "dataset_path", "learning_rate", "max_steps", "max_minutes"}


class SaveError(UserError):
    """A checkpoint could not be written; the previous one is unchanged."""


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a crash leaves the previous file intact. Raises SaveError, as on a full disk."""
    write_tensors(path, {"format": FORMAT, **checkpoint})


def write_tensors(path: str | Path, value: Any) -> None:
    """torch.save() to a file, atomically; raises SaveError if it cannot be written."""
    try:
        with atomic_write(path) as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a write fails
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) and "write" not in str(error):
            raise
        reason = getattr(cause, "strerror", None) or "the disk is full?"
        free = shutil.disk_usage(Path(path).parent).free
        kept = "; the previous file is unchanged" if Path(path).exists() else ""
        raise SaveError(
            f"{path}: not written ({reason}): it needs about {size_of(value):,} bytes, {free:,} are free{kept}"
        ) from None


def size_of(value: Any) -> int:
    """Total size in bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(size_of(item) for item in values)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, by its path or NAME, into CPU memory and check it; raises UserError that names the file."""
    path = find_checkpoint(path)
    if path.is_dir():
        return load_sharded(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such checkpoint'}{hints(path)}")
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        is_nanogpt = isinstance(checkpoint, dict) and "model_args" in checkpoint
        options = "--from", "nanogpt", "--tokenizer", "data/NAME/meta.pkl"
        command = command_line("convert.py", str(path), f"checkpoint/{path.parent.name}.pt", *options)
        raise UserError(
            f"{path}: not a checkpoint of this toolkit" + (f"; one of nanoGPT's: `{command}` reads it" * is_nanogpt)
        )
    return check_layout(checkpoint, path)


def find_checkpoint(name: str | Path) -> Path:
    """The path itself; for a bare NAME under which nothing lies here, checkpoint/NAME.pt, if there is one."""
    path, trained = Path(name), Path("checkpoint", f"{name}.pt")
    return trained if path.name == str(name) and not path.exists() and trained.is_file() else path


def best_val_loss_in(path: Path) -> float:
    """The best validation loss that a checkpoint file knows of, without reading its tensors; nan where that fails."""
    try:
        return float(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["best_val_loss"])
    except Exception:  # no such file, a damaged one, a folder: any exception
        return math.nan


def hints(path: Path) -> str:
    """What an error about a missing checkpoint ends with: the command that trains it, and those that there are."""
    folders = dict.fromkeys((path.parent, Path("checkpoint")))
    files = [file for folder in folders for file in (*folder.glob("*.pt"), *folder.glob("*/latest"))]
    others = sorted((file if file.suffix else file.parent).as_posix() for file in files)  # (a folder of shards)
    return training_command(path) + (f" (there are: {', '.join(others[:8])})" if others else "")


def training_command(path: Path) -> str:
    """The suffix '; `python train.py -t NAME` trains it' for a name that a script of ours gives to its checkpoints."""
    name = path.stem.removesuffix("_last")
    if path.parent != Path("checkpoint") or path.suffix != ".pt":
        return ""
    if name in [f"problem_{problem}" for problem in PROBLEMS]:
        return f"; `{command_line('problem.py', name.removeprefix('problem_'))}` trains it"
    configs = [file for folder in CONFIG_FOLDERS if (file := folder / f"{name}.json").is_file()]
    return f"; `{command_line('train.py', '-t', name)}` trains it" if configs and trains(configs[0], name) else ""


def trains(config: Path, name: str) -> bool:
    """Whether a config file is one of training (not of a model, or DeepSpeed's) whose checkpoints have this name."""
    try:
        values = read_json(config)
    except UserError:
        return False
    if not isinstance(values, dict) or "problem" in values or not values.keys() & TRAINING_FIELDS:
        return False
    return f"{values.get('stage') or name}{'_lora' if values.get('use_lora') else ''}" == name


def set_aside(path: Path) -> Path:
    """Rename a checkpoint, a file or a folder, to the first of NAME.bak, NAME.bak2, NAME.bak3, ... that is free."""
    names = itertools.chain([".bak"], (f".bak{i}" for i in itertools.count(2)))
    backup = next(place for name in names if not (place := path.with_name(path.name + name)).exists())
    os.replace(path, backup)
    return backup


def previous_of(path: Path) -> Path:
    """NAME.previous, where the save before that of a checkpoint file is kept."""
    return path.with_name(path.name + ".previous")


def keep_previous(path: Path, only_if_none: bool = False) -> None:
    """Keep a checkpoint file that is about to be replaced as NAME.previous (a hard link, or a copy)."""
    previous = previous_of(path)
    if only_if_none and previous.is_file():
        return
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without hard links
        shutil.copy2(path, previous)


def load_checkpoint_or_previous(path: str | Path) -> dict[str, Any]:
    """load_checkpoint(), falling back with a warning to NAME.previous if the newest one is damaged."""
    path = find_checkpoint(path)
    previous = path / "previous" if path.is_dir() else previous_of(path)
    try:
        return load_checkpoint(path)
    except UserError as error:
        if not previous.is_file():
            raise
        checkpoint = load_sharded(path, "previous") if path.is_dir() else load_checkpoint(previous)
        print(f"warning: {error}; using the previous checkpoint, step {checkpoint['step']:,}", file=sys.stderr)
        return {**checkpoint, "is_previous": True}


def of_another_program(path: Path) -> str:
    """How to make a checkpoint of a model of llama.cpp's or Hugging Face's; "" for anything else."""
    is_gguf = False
    if path.is_file():
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    if not (is_gguf or (path / "config.json").is_file()):
        return ""
    command = command_line("convert.py", str(path), f"checkpoint/{path.stem}.pt")
    return f"; a model of another program: `{command}` reads it"


def read_tensors(path: Path) -> Any:
    """torch.load() of tensors and plain values, with their checksums verified; raises UserError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path}: compressed, which no checkpoint is")  # a zip bomb could fill the memory
            damaged = archive.testzip()  # torch itself does not verify the checksums
        if damaged:
            raise UserError(f"{path}: damaged: the checksum of its part {damaged} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about pickles, which are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can raise any exception
        if isinstance(error, OSError) and error.filename:  # it cannot even be opened
            raise
        if advice := of_another_program(path):
            raise UserError(f"{path}: not a checkpoint{advice}") from None
        detail = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"{path}: not a checkpoint, or a damaged one: it is truncated, or contains something other than "
            f"tensors and plain values ({type(error).__name__}: {detail})"
        ) from None


def check_layout(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checkpoint itself, if all its entries are there; raises UserError that names what is missing."""
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {checkpoint['format']!r} is not supported, only {FORMAT}")
    for name, kind in REQUIRED.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: damaged checkpoint: {name} is missing or not of type {kind.__name__}")
    shape = checkpoint["model_config"]
    if shape.get("image_size") and "image_last" not in shape:  # of an earlier version
        shape["image_last"] = False
    return checkpoint


# ------------------------------------------------------------------------------------------------------ sharded
#
# A folder into which every process of a job writes its shard:
#     latest, previous        the names of the newest complete folder and of the one before it
#     step_200_of_2/rank_0.pt {parameter: {shape, start, weight, exp_avg, exp_avg_sq}}: parts of the flattened tensors
#     step_200_of_2/values.pt everything that is not sharded, and the number of ranks

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's first and second moment, as both torch and DeepSpeed name them


def shard_folder(folder: Path, step: int, world_size: int) -> Path:
    """Folder of a step's shards; another number of processes gets another folder, so that shards never mix."""
    return folder / f"step_{step}_of_{world_size}"


def save_shard(folder: Path, step: int, rank: int, world_size: int, shard: dict[str, dict[str, Any]]) -> None:
    """Write one rank's shard of every parameter; raises SaveError if that fails."""
    write_tensors(shard_folder(folder, step, world_size) / f"rank_{rank}.pt", shard)


def write_pointer(path: Path, name: str) -> None:
    """Write a file that contains only the name of a folder (latest, previous)."""
    with atomic_write(path) as file:
        file.write(name.encode())


def finish_sharded(folder: Path, world_size: int, values: dict[str, Any]) -> None:
    """Complete a sharded checkpoint, once every rank has written its shard; only the one before it is kept besides."""
    newest = shard_folder(folder, values["step"], world_size)
    write_tensors(newest / "values.pt", {"format": FORMAT, "world_size": world_size, **values})
    latest, previous = folder / "latest", folder / "previous"
    before = latest.read_text(encoding="utf-8") if latest.is_file() else newest.name
    if before != newest.name:
        write_pointer(previous, before)
    write_pointer(latest, newest.name)  # atomic: until here the previous checkpoint counts as the latest
    kept = {newest.name, previous.read_text(encoding="utf-8") if previous.is_file() else ""}
    for older in folder.glob("step_*"):
        if older.name not in kept:
            shutil.rmtree(older, ignore_errors=True)


def load_sharded(folder: Path, which: str = "latest") -> dict[str, Any]:
    """The full checkpoint, assembled from the shards in a folder; raises UserError if one is missing or damaged."""
    latest = folder / which
    if not latest.is_file():
        advice = of_another_program(folder) or " (it has no file named latest)"
        raise UserError(f"{folder}: not a file, nor the folder of a sharded checkpoint{advice}")
    newest = folder / Path(latest.read_text(encoding="utf-8").strip()).name
    where = newest / "values.pt"
    values = read_tensors(where)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{where}: not from a checkpoint of this toolkit, or from another version")
    try:
        shards: dict[str, list[dict[str, Any]]] = {}  # by parameter
        for rank in range(values.pop("world_size")):
            where = newest / f"rank_{rank}.pt"
            if not where.is_file():
                raise UserError(f"{where}: missing: the shards of all hosts must be in one shared folder")
            for name, shard in read_tensors(where).items():
                shards.setdefault(name, []).append(shard)
        where = newest
        full = {name: join_shards(parts) for name, parts in shards.items()}
        names, groups, step = values.pop("names"), values.pop("groups"), values.pop("optimizer_step")
        weights = {name: parts.pop("weight") for name, parts in full.items()}
        state = to_torch_state(weights, full, names, groups, step)
        state["model"] |= values.pop("buffers", {})
        return check_layout({"format": FORMAT, **values, **state}, newest)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{where}: damaged ({type(error).__name__}: {error})") from None


def join_shards(shards: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The full weight and optimizer states of a parameter, concatenated from the shards of all ranks."""
    shards = sorted(shards, key=lambda shard: shard["start"])
    parts = [part for part in shards[0] if part not in ("shape", "start")]
    return {part: torch.cat([s[part] for s in shards]).reshape(shards[0]["shape"]) for part in parts}


def to_torch_state(
    weights: dict[str, torch.Tensor],
    states: dict[str, dict[str, torch.Tensor]],
    names: dict[str, str],
    groups: list[list[str]],
    step: float,
) -> dict[str, Any]:
    """Weights and optimizer states by parameter as torch's state dicts, as one process would have saved them.

    names: from the names in the model's state dict to those of the parameters (tied weights have two names for one);
    groups: the parameter names of each group of the optimizer. With Muon, whose states have no second moment, there are
    two state dicts, as of a CombinedOptimizer: "0" Muon's, "1" AdamW's.
    """

    def state_dict(groups: list[list[str]]) -> dict[str, Any]:
        order = itertools.count()
        members = [name for group in groups for name in group]
        steps = {name: {"step": torch.tensor(step)} if "exp_avg_sq" in states[name] else {} for name in members}
        return {
            "state": {index: {**steps[name], **states[name]} for index, name in enumerate(members)},
            "param_groups": [{"params": [next(order) for _ in group]} for group in groups],
        }

    has_muon = any("momentum" in state for state in states.values())
    return {
        "model": {name: weights[parameter] for name, parameter in names.items() if parameter in weights},
        "optimizer": {str(i): state_dict([group]) for i, group in enumerate(groups)}
        if has_muon
        else state_dict(groups),
    }


def from_torch_state(optimizer: dict[str, Any], groups: list[list[str]]) -> tuple[dict[str, dict[str, Any]], float]:
    """The inverse of to_torch_state(): optimizer states by parameter, and the number of Adam's steps.

    Raises KeyError, TypeError or AttributeError where the states are of other parameters.
    """
    if "state" in optimizer:
        members = {name: (optimizer, i) for i, name in enumerate(name for group in groups for name in group)}
    else:
        members = {name: (optimizer[str(g)], i) for g, group in enumerate(groups) for i, name in enumerate(group)}
    states = {name: dict(state_dict["state"][i]) for name, (state_dict, i) in members.items()}
    steps = [float(state.pop("step")) for state in states.values() if "step" in state]
    return states, max(steps)


# ------------------------------------------------------------------------------------------------------ models


def load_model(checkpoint: dict[str, Any], where: str | Path, sdp_kernel: str = "auto", **changes: Any) -> GPT:
    """The model of a checkpoint, with its weights; changes: model fields to override, such as dropout."""
    values = check_fields(checkpoint["model_config"], fields_of(ModelConfig), f"{where}: model_config")
    try:
        if (
            values.get("n_expert", 0) > 1
            and values.get("n_expert_per_token") == 1
            and "rope_trained_length" not in values
        ):
            raise UserError(
                "n_expert_per_token 1 of an earlier version, whose router was never trained (its gate was always 1): "
                "train it again"
            )
        as_trained = ModelConfig(**values)  # which fills in rope_trained_length where an older checkpoint lacks it
        config = ModelConfig(**{**as_trained.to_dict(), **changes})
    except UserError as error:
        raise UserError(f"{where}: model_config: {error}") from None
    weights = checkpoint["model"]
    check_weights(weights, where)
    left_out = tuple(f"future.{i}." for i in range(config.n_future - 1, as_trained.n_future - 1))  # none, if not asked
    weights = {name: weight for name, weight in weights.items() if not name.startswith(left_out)}
    layers = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    if len(layers) != config.n_layer:  # before anything is allocated by a number from an untrusted file
        raise UserError(f"{where}: its config says {config.n_layer} layers, its weights have {len(layers)}")
    with torch.device("meta"):  # shapes without storage
        expected = {name: tuple(weight.shape) for name, weight in GPT(config).state_dict().items()}
    has_new_mask = config.mask_token and not as_trained.mask_token
    if has_new_mask:
        del expected["mask_embedding.weight"]
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: the weights do not fit the model: {name} has shape {found.get(name)}, "
                f"by its config {expected.get(name)}"
            )
    if has_new_mask:  # a mask is any token at first
        weights["mask_embedding.weight"] = weights["token_embedding.weight"].float().mean(0, keepdim=True)
    model = GPT(config, sdp_kernel)
    model.load_state_dict(weights)
    return model


def check_weights(weights: dict[str, torch.Tensor], where: str | Path) -> None:
    """Raises UserError unless these are plain tensors of floating-point numbers by name."""
    if not all(isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in weights.items()):
        raise UserError(f"{where}: damaged checkpoint: model must be a dict of tensors by name")
    for name, weight in weights.items():
        if weight.dtype not in WEIGHT_DTYPES:
            raise UserError(f"{where}: {name} holds {str(weight.dtype).removeprefix('torch.')}, not floating point")
        is_plain = weight.layout is torch.strided and weight.device.type == "cpu"
        if not is_plain or not weight.is_contiguous():  # an expanded scalar could claim terabytes
            raise UserError(f"{where}: damaged checkpoint: its weights are not stored in full")


def load_checkpoint_tokenizer(checkpoint: dict[str, Any], where: str | Path) -> Tokenizer:
    """The tokenizer stored in a checkpoint; raises UserError if its vocabulary is not the model's."""
    tokenizer = tokenizer_from_dict(checkpoint["tokenizer"], f"{where}: tokenizer")
    if tokenizer.vocab_size != checkpoint["model_config"].get("vocab_size"):
        raise UserError(f"{where}: its tokenizer has {tokenizer.vocab_size} tokens, its model another vocab_size")
    return tokenizer
