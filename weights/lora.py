"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): fine-tuning that trains and saves a small addition.

    base = load_model(...)
    attach(base, settings)      # every target W x becomes W x + alpha / rank * B A x; only A and B are trained
    merge(base)                 # W + alpha / rank * B A: an ordinary model again

An adapter's file is a checkpoint whose weights are the A and B alone. It names its base and carries its fingerprint.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.configuration import UserError
from layers.experts import MixtureOfExperts, grouped_mm, mixture_layers
from model import GPT
from weights.checkpointing import load_checkpoint, load_model

TARGETS = ("qkv", "out", "up", "down")  # the linear layers of a block: of attention, of the MLP or its experts


class LowRank(nn.Module):
    """Trained matrices A (..., rank, in) and B (..., out, rank) beside frozen ones (..., out, in); B begins at zero."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        *groups, n_out, n_in = weight.shape
        options = {"device": weight.device, "dtype": weight.dtype}
        self.A = nn.Parameter(torch.randn(*groups, rank, n_in, **options) / math.sqrt(n_in))
        self.B = nn.Parameter(torch.zeros(*groups, n_out, rank, **options))
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def merge_into(self, weight: torch.Tensor) -> None:
        weight += self.scale * (self.B @ self.A)


class LoRALinear(LowRank):
    """In place of a linear layer: the layer, frozen, and the addition."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base.weight, rank, alpha, dropout)
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(self.dropout(x), self.A), self.B)


class LoRAExperts(LowRank):
    """The addition alone, to one matrix of every expert of a mixture."""

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        A, B = self.A.mT.to(x.dtype), self.B.mT.to(x.dtype)
        return self.scale * grouped_mm(grouped_mm(self.dropout(x), A, counts), B, counts)


def settings_of(config: Any) -> dict[str, Any]:
    """An adapter's shape, from a TrainConfig."""
    return {name: getattr(config, f"lora_{name}") for name in ("rank", "alpha", "dropout", "targets")}


def attach(model: GPT, settings: dict[str, Any]) -> None:
    """Freeze a model and give it a new adapter; raises UserError where the two do not fit."""
    rank, shape = settings["rank"], [settings[name] for name in ("rank", "alpha", "dropout")]
    if not 1 <= rank <= model.config.n_embd:
        raise UserError(f"lora_rank ({rank}) must be between 1 and n_embd ({model.config.n_embd}): it is to be low")
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        for target in settings["targets"]:
            layer = getattr(module, target, None)
            if isinstance(layer, nn.Linear) and not isinstance(module, LoRALinear):
                setattr(module, target, LoRALinear(layer, *shape))
            elif isinstance(module, MixtureOfExperts) and isinstance(layer, nn.Parameter):
                module.adapters[target] = LoRAExperts(layer, *shape)
    if not adapter_weights(model.state_dict()):
        raise UserError(f"lora_targets: the model has no linear layer named {', '.join(settings['targets'])}")


def adapters(model: nn.Module) -> list[tuple[nn.Module, str, LoRALinear]]:
    """(parent, name there, layer) of every linear layer that an adapter was attached to."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, LoRALinear)
    ]


def detach(model: GPT) -> None:
    """The model as it was before attach()."""
    for parent, name, layer in adapters(model):
        setattr(parent, name, layer.base)
    for mixture in mixture_layers(model):
        mixture.adapters.clear()
    model.requires_grad_(True)


def merge(model: GPT) -> None:
    """Make the adapter part of the weights."""
    for _, _, layer in adapters(model):
        layer.merge_into(layer.base.weight)
    for mixture in mixture_layers(model):
        for name, adapter in mixture.adapters.items():
            adapter.merge_into(getattr(mixture, name))
    detach(model)


def adapter_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a model's state dict, what belongs to the adapter."""
    return {name: weight for name, weight in weights.items() if name.endswith((".A", ".B"))}


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights: what an adapter was trained on."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_base(adapter: dict[str, Any], model: GPT, where: str | Path) -> None:
    """Raises UserError unless the adapter's checkpoint was trained on this model."""
    if adapter["lora"].get("fingerprint") != fingerprint(model):
        raise UserError(f"{where}: an adapter of another model ({adapter['lora'].get('base')}), or of other weights")


def load_adapter(adapter: dict[str, Any], model: GPT, where: str | Path) -> None:
    """Attach the adapter of a checkpoint to its base; raises UserError where they do not belong together."""
    if not isinstance(adapter.get("lora"), dict):
        raise UserError(f"{where}: a whole model, not an adapter; -m loads it")
    check_base(adapter, model, where)
    try:
        attach(model, adapter["lora"]["settings"])
        missing, unexpected = model.load_state_dict(adapter["model"], strict=False)
        if unexpected or adapter_weights(dict.fromkeys(missing)):
            raise KeyError("its weights do not fit its settings")
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        detach(model)
        raise UserError(f"{where}: damaged adapter ({str(error).splitlines()[0]})") from None


def load_base(adapter: dict[str, Any], where: str | Path) -> tuple[dict[str, Any], str]:
    """The checkpoint that an adapter was trained on, and its path."""
    path = str(adapter["lora"].get("base"))
    if not Path(path).is_file():
        raise UserError(f"{where}: an adapter of {path}, which is not there")
    return load_checkpoint(path), path


def merged_checkpoint(adapter: dict[str, Any], base: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """An ordinary checkpoint of base and adapter together."""
    model = load_model(base, where)
    load_adapter(adapter, model, where)
    merge(model)
    kept = {name: adapter[name] for name in ("step", "data", "rng", "best_val_loss")}
    config = adapter["train_config"]  # no training can go on from here: it has the weights alone
    config = {**config, "use_lora": False, "stage": f"{config.get('stage')}_merged"}
    return {**base, **kept, "train_config": config, "model": model.state_dict(), "optimizer": {}}
