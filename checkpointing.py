"""The one place that writes and reads checkpoints.

A checkpoint is a dict of tensors and plain values: model (state dict), optimizer, step, model_config, train_config,
tokenizer, rng, data, best_val_loss, format. It is read with weights_only=True: a stranger's file cannot run code.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from configuration import UserError, check_fields, fields_of
from files import atomic_write
from model import GPT, ModelConfig
from tokenizer import Tokenizer, tokenizer_from_dict

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


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; a crash at any moment leaves the previous file whole."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **checkpoint}, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory and check its layout; raises UserError that names the file."""
    path = Path(path)
    if not path.is_file():
        others = sorted(p.as_posix() for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        there = f" (there are: {', '.join(others[:8])})" if others else ""
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such checkpoint'}{there}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles, which are refused here anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything at all
        detail = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"{path}: not a checkpoint that can be read: truncated, damaged, or it holds something besides "
            f"tensors and plain values ({type(error).__name__}: {detail})"
        ) from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of this toolkit")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {checkpoint['format']!r} is not the known format {FORMAT}")
    for name, kind in REQUIRED.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: damaged checkpoint: {name} is missing or no {kind.__name__}")
    return checkpoint


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
