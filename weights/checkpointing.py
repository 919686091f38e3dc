"""The one place that writes and reads checkpoints.

A checkpoint is a dict of tensors and plain values: model (state dict), optimizer, step, model_config, train_config,
tokenizer, rng, data, best_val_loss, format. It is read with weights_only=True: a stranger's file cannot run code.
"""

import itertools
import os
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError, check_fields, fields_of
from base.files import atomic_write
from model import GPT, ModelConfig
from text.tokenizer import Tokenizer, tokenizer_from_dict

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


class SaveError(UserError):
    """A checkpoint could not be written; the one that was there before is untouched."""


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; a crash at any moment leaves the previous file whole. Raises SaveError on a full disk."""
    write_tensors(path, {"format": FORMAT, **checkpoint})


def write_tensors(path: str | Path, value: Any) -> None:
    """What read_tensors reads; raises SaveError where it cannot be written."""
    try:
        with atomic_write(path) as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when its file cannot be written to
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) and "write" not in str(error):
            raise
        reason = getattr(cause, "strerror", None) or "the disk is full?"
        free = shutil.disk_usage(Path(path).parent).free
        raise SaveError(
            f"{path}: not written ({reason}): it needs about {size_of(value):,} bytes, {free:,} are free; "
            "what was there before is untouched"
        ) from None


def size_of(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(size_of(item) for item in values)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory and check its layout; raises UserError that names the file."""
    path = Path(path)
    if path.is_dir():
        return load_sharded(path)
    if not path.is_file():
        others = sorted(p.as_posix() for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        there = f" (there are: {', '.join(others[:8])})" if others else ""
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such checkpoint'}{there}")
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of this toolkit")
    return check_layout(checkpoint, path)


def keep_previous(path: Path, only_if_none: bool = False) -> None:
    """Let a checkpoint file that is about to be replaced live on as NAME.previous."""
    previous = path.with_name(path.name + ".previous")
    if only_if_none and previous.is_file():
        return
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without links
        shutil.copy2(path, previous)


def load_checkpoint_or_previous(path: str | Path) -> dict[str, Any]:
    """load_checkpoint; where that one is damaged and NAME.previous is not, the latter, saying so."""
    path = Path(path)
    previous = path / "previous" if path.is_dir() else Path(f"{path}.previous")
    try:
        return load_checkpoint(path)
    except UserError as error:
        if not previous.is_file():
            raise
        checkpoint = load_sharded(path, "previous") if path.is_dir() else load_checkpoint(previous)
        print(f"warning: {error}; going on from its predecessor, step {checkpoint['step']:,}", file=sys.stderr)
        return checkpoint


def read_tensors(path: Path) -> Any:
    """What torch.save wrote, if it is tensors and plain values, and whole; raises UserError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path}: compressed, which no checkpoint is")  # a few bytes could become terabytes
            damaged = archive.testzip()  # torch itself does not look at the checksums
        if damaged:
            raise UserError(f"{path}: damaged: the checksum of its part {damaged} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles, which are refused here anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything at all
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        detail = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"{path}: not a checkpoint that can be read: truncated, damaged, or it holds something besides "
            f"tensors and plain values ({type(error).__name__}: {detail})"
        ) from None


def check_layout(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checkpoint, if it holds what one must; raises UserError that names what is missing."""
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {checkpoint['format']!r} is not the known format {FORMAT}")
    for name, kind in REQUIRED.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: damaged checkpoint: {name} is missing or no {kind.__name__}")
    return checkpoint


# ------------------------------------------------------------------------------------------------------ sharded
#
# A folder into which every process of a job writes its share:
#     latest, previous        the names of the newest folder that is complete and of the one before it
#     step_200_of_2/rank_0.pt {parameter: {shape, start, weight, exp_avg, exp_avg_sq}}: flat pieces, from start on
#     step_200_of_2/values.pt everything else, and how many ranks there are

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's states, by the names that torch and DeepSpeed both use


def shard_folder(folder: Path, step: int, world_size: int) -> Path:
    """Where the shares of a step lie; those of another number of processes are not to be mixed with them."""
    return folder / f"step_{step}_of_{world_size}"


def save_shard(folder: Path, step: int, rank: int, world_size: int, shares: dict[str, dict[str, Any]]) -> None:
    """Write one process's share; raises SaveError where that fails."""
    write_tensors(shard_folder(folder, step, world_size) / f"rank_{rank}.pt", shares)


def write_name(pointer: Path, name: str) -> None:
    with atomic_write(pointer) as file:
        file.write(name.encode())


def finish_sharded(folder: Path, world_size: int, values: dict[str, Any]) -> None:
    """Declare the shares of a step complete, once every process has written its own; of older ones the last is kept."""
    newest = shard_folder(folder, values["step"], world_size)
    write_tensors(newest / "values.pt", {"format": FORMAT, "world_size": world_size, **values})
    latest, previous = folder / "latest", folder / "previous"
    before = latest.read_text(encoding="utf-8") if latest.is_file() else newest.name
    if before != newest.name:
        write_name(previous, before)
    write_name(latest, newest.name)
    kept = {newest.name, previous.read_text(encoding="utf-8") if previous.is_file() else ""}
    for older in folder.glob("step_*"):
        if older.name not in kept:
            shutil.rmtree(older, ignore_errors=True)


def load_sharded(folder: Path, which: str = "latest") -> dict[str, Any]:
    """The checkpoint whose shares are in a folder, put together; raises UserError where one is missing or damaged."""
    latest = folder / which
    if not latest.is_file():
        raise UserError(f"{folder}: not a file, nor the folder of a sharded checkpoint (it has no file named latest)")
    newest = folder / Path(latest.read_text(encoding="utf-8").strip()).name
    where = newest / "values.pt"
    values = read_tensors(where)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{where}: not of a checkpoint of this toolkit, or of another version")
    try:
        shares: dict[str, list[dict[str, Any]]] = {}
        for rank in range(values.pop("world_size")):
            where = newest / f"rank_{rank}.pt"
            if not where.is_file():
                raise UserError(f"{where}: missing: the shares of all hosts must lie in one folder")
            for name, share in read_tensors(where).items():
                shares.setdefault(name, []).append(share)
        where = newest
        whole = {name: join_shares(parts) for name, parts in shares.items()}
        names, groups, step = values.pop("names"), values.pop("groups"), values.pop("optimizer_step")
        weights = {name: parts.pop("weight") for name, parts in whole.items()}
        states = {index: whole[name] for index, name in enumerate(name for group in groups for name in group)}
        return check_layout(
            {"format": FORMAT, **values, **to_torch_state(weights, states, names, groups, step)}, newest
        )
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{where}: damaged ({type(error).__name__}: {error})") from None


def join_shares(shares: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A parameter's weight and moments, of every process's flat pieces."""
    shares = sorted(shares, key=lambda share: share["start"])
    return {part: torch.cat([s[part] for s in shares]).reshape(shares[0]["shape"]) for part in ("weight", *MOMENTS)}


def to_torch_state(
    weights: dict[str, torch.Tensor],
    states: dict[int, dict[str, torch.Tensor]],
    names: dict[str, str],
    groups: list[list[str]],
    step: float,
) -> dict[str, Any]:
    """Weights and Adam's states as torch's own state dicts.

    names: every name of the model's state dict, and the parameter's that it stands for; groups: the optimizer's.
    """
    count = itertools.count()
    return {
        "model": {name: weights[parameter] for name, parameter in names.items() if parameter in weights},
        "optimizer": {
            "state": {index: {"step": torch.tensor(step), **moments} for index, moments in states.items()},
            "param_groups": [{"params": [next(count) for _ in group]} for group in groups],
        },
    }


# ------------------------------------------------------------------------------------------------------ models


def load_model(checkpoint: dict[str, Any], where: str | Path, sdp_kernel: str = "auto", **changes: Any) -> GPT:
    """The network of a checkpoint, with its weights; changes: model fields that need not match, such as dropout."""
    values = check_fields(checkpoint["model_config"], fields_of(ModelConfig), f"{where}: model_config")
    try:
        config = ModelConfig(**{**values, **changes})
    except UserError as error:
        raise UserError(f"{where}: model_config: {error}") from None
    weights = checkpoint["model"]
    if not all(isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in weights.items()):
        raise UserError(f"{where}: damaged checkpoint: model must hold tensors by name")
    if not all(weight.is_contiguous() for weight in weights.values()):  # a few bytes can pose as terabytes
        raise UserError(f"{where}: damaged checkpoint: its weights are not stored whole")
    layers = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    if len(layers) != config.n_layer:  # before anything is allocated by a number from a stranger's file
        raise UserError(f"{where}: its config says {config.n_layer} layers, its weights have {len(layers)}")
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in GPT(config).state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: the weights do not fit the model: {name} has shape {found.get(name)}, "
                f"its config asks for {expected.get(name)}"
            )
    model = GPT(config, sdp_kernel)
    model.load_state_dict(weights)
    return model


def load_checkpoint_tokenizer(checkpoint: dict[str, Any], where: str | Path) -> Tokenizer:
    """The tokenizer that a checkpoint carries; raises UserError where it does not fit the model."""
    tokenizer = tokenizer_from_dict(checkpoint["tokenizer"], f"{where}: tokenizer")
    if tokenizer.vocab_size != checkpoint["model_config"].get("vocab_size"):
        raise UserError(f"{where}: its tokenizer has {tokenizer.vocab_size} tokens, its model another number")
    return tokenizer
