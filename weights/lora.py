"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): fine-tuning that trains a small update of the weights.

    base = load_model(...)
    attach(base, settings)      # every target layer W x becomes W x + alpha / rank * B A x; only A and B are trained
    merge(base)                 # W <- W + alpha / rank * B A: a model without adapter again, at no extra cost

W (out, in) stays frozen; its update B A, of B (out, rank) and A (rank, in), has few parameters. That saves the
gradients and optimizer states of W. An adapter's file is a small checkpoint: its only weights are A and B, and it has
the path of its base model and a fingerprint of that model's weights.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.configuration import UserError
from layers.attention import Attention
from layers.experts import MixtureOfExperts, grouped_mm, mixture_layers
from model import GPT
from weights.checkpointing import check_weights, load_checkpoint, load_model

TARGETS = ("qkv", "out", "up", "down")  # linear layers of a block: attention's, then those of the MLP or its experts


class LowRankUpdate(nn.Module):
    """The update alpha / rank * B A of a frozen weight (..., out, in): A (..., rank, in), B (..., out, rank).

    Leading dimensions are experts. B starts at zero, so that training starts from exactly the base model; A must then
    be random, or both gradients would be zero.
    """

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
        """Add the update to the weight, in place."""
        weight += self.scale * (self.B @ self.A)


class LoRALinear(LowRankUpdate):
    """Replaces a linear layer: the frozen layer plus its low-rank update."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base.weight, rank, alpha, dropout)
        self.base = base

    @property
    def weight(self) -> torch.Tensor:
        """That of the layer with its update, for who does not call it (latent attention, decoding)."""
        return self.base.weight + self.scale * (self.B @ self.A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # B (A x), never (B A) x: two thin products instead of one of the size of W
        update = F.linear(self.scale * F.linear(self.dropout(x), self.A), self.B)
        return update.add_(self.base(x))


class LoRAExperts(LowRankUpdate):
    """The low-rank updates of one matrix of every expert; MixtureOfExperts.project() adds them."""

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows x (N, in), sorted by expert, counts (n_expert,) rows per expert: see grouped_mm()."""
        A, B = self.A.mT.to(x.dtype), self.B.mT.to(x.dtype)
        return grouped_mm(self.scale * grouped_mm(self.dropout(x), A, counts), B, counts)


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a new adapter, from a TrainConfig: rank, alpha, dropout, targets."""
    return {name: getattr(config, f"lora_{name}") for name in ("rank", "alpha", "dropout", "targets")}


def names_of(module: nn.Module, targets: list[str]) -> list[str]:
    """The names that a module's targets have: `qkv` stands for all that makes its queries, keys and values."""
    if not isinstance(module, Attention):
        return targets
    return [name for target in targets for name in (module.PROJECTIONS if target == "qkv" else (target,))]


def attach(model: GPT, settings: dict[str, Any]) -> None:
    """Freeze a model and add a new adapter to its target layers; raises UserError for settings that do not fit it."""
    rank, options = settings["rank"], [settings[name] for name in ("rank", "alpha", "dropout")]
    if not 1 <= rank <= model.config.n_embd:
        raise UserError(f"lora_rank ({rank}) must be between 1 and n_embd ({model.config.n_embd})")
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        for target in names_of(module, settings["targets"]):
            layer = getattr(module, target, None)
            if isinstance(layer, nn.Linear) and not isinstance(module, LoRALinear):
                setattr(module, target, LoRALinear(layer, *options))
            elif isinstance(module, MixtureOfExperts) and isinstance(layer, nn.Parameter):
                module.adapters[target] = LoRAExperts(layer, *options)
    if not adapter_weights(model.state_dict()):
        raise UserError(f"lora_targets: the model has no linear layer named {', '.join(settings['targets'])}")


def adapted_linears(model: nn.Module) -> list[tuple[nn.Module, str, LoRALinear]]:
    """(parent module, attribute name, layer) of every linear layer with an adapter."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, LoRALinear)
    ]


def detach(model: GPT) -> None:
    """Remove the adapter: the model is as it was before attach()."""
    for parent, name, layer in adapted_linears(model):
        setattr(parent, name, layer.base)
    for mixture in mixture_layers(model):
        mixture.adapters.clear()
    model.requires_grad_(True)


def merge(model: GPT) -> None:
    """Add the adapter's updates to the weights and remove it: inference then costs what the base model costs."""
    for _, _, layer in adapted_linears(model):
        layer.merge_into(layer.base.weight)
    for mixture in mixture_layers(model):
        for name, adapter in mixture.adapters.items():
            adapter.merge_into(getattr(mixture, name))
    detach(model)


def adapter_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's part of a model's state dict."""
    return {name: weight for name, weight in weights.items() if name.endswith((".A", ".B"))}


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights, by which an adapter recognises its base model."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_adapter(adapter: dict[str, Any], model: GPT, where: str | Path) -> None:
    """Attach the adapter of a checkpoint to its base model; raises UserError if it was trained on another one."""
    if not isinstance(adapter.get("lora"), dict):
        raise UserError(f"{where}: a full model, not an adapter; load it with -m")
    if adapter["lora"].get("fingerprint") != fingerprint(model):
        base = adapter["lora"].get("base")
        raise UserError(f"{where}: this adapter was trained on another base model ({base}), or on other weights of it")
    check_weights(adapter["model"], where)
    try:
        attach(model, adapter["lora"]["settings"])
        missing, unexpected = model.load_state_dict(adapter["model"], strict=False)
        if unexpected or adapter_weights(dict.fromkeys(missing)):
            raise KeyError("its weights do not match its settings")
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        detach(model)
        raise UserError(f"{where}: damaged adapter ({str(error).splitlines()[0]})") from None


def load_base(adapter: dict[str, Any], where: str | Path) -> tuple[dict[str, Any], str]:
    """The checkpoint of an adapter's base model, and its path."""
    path = str(adapter["lora"].get("base"))
    if not Path(path).is_file():
        raise UserError(f"{where}: the base model of this adapter, {path}, does not exist")
    return load_checkpoint(path), path


def load_merged(checkpoint: dict[str, Any], where: str | Path, **changes: Any) -> GPT:
    """The model of a checkpoint; of an adapter's, its base model with the adapter merged. changes: as of load_model."""
    if "lora" not in checkpoint:
        return load_model(checkpoint, where, **changes)
    model = load_model(*load_base(checkpoint, where), **changes)
    load_adapter(checkpoint, model, where)
    merge(model)
    return model


def merged_checkpoint(adapter: dict[str, Any], base: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """A checkpoint of the base model with the adapter merged into its weights."""
    model = load_model(base, where)
    load_adapter(adapter, model, where)
    merge(model)
    kept = {name: adapter[name] for name in ("step", "data", "rng", "best_val_loss")}
    config = adapter["train_config"]  # under another stage name: without optimizer states it cannot be resumed
    config = {**config, "use_lora": False, "stage": f"{config.get('stage')}_merged"}
    return {**base, **kept, "train_config": config, "model": model.state_dict(), "optimizer": {}}
