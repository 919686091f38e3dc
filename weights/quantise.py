"""Weights for inference in fewer bytes: bfloat16, or 8-bit integers.

    model, kind = with_weights(model, "auto")       # the fastest of float32, bfloat16 and int8 here

To generate a token for one sequence, every weight is read once and used once: the time is that of reading them from
memory. Half or a quarter of the bytes is up to two or four times the speed. What is rounded: the matrices. Norms,
softmax, RoPE's angles and the choice of tokens stay in float32.
"""

import copy
import itertools
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.configuration import UserError
from model import GPT

KINDS = ("float32", "bfloat16", "int8")
FEW_ROWS = 16  # up to so many tokens at once the integers' own kernel is faster than expanding them
TRIAL_TOKENS = 12


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers with a scale per output: W = scale * integers.

    y = scale * (integers x): the scale of a row is its largest magnitude / 127, so that the largest weight is 127. Of
    weights of a normal distribution each is off by 0.3% of the largest of its row (uniform rounding error).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("scale", scale)  # (out,)
        self.register_buffer("integers", (weight / scale[:, None]).round().to(torch.int8))  # (out, in)
        self.register_buffer("ones", torch.ones(len(scale), dtype=torch.bfloat16))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= FEW_ROWS and x.device.type == "cpu":  # multiplies by scales in bfloat16: ours are float32
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.integers, self.ones).to(x.dtype)
        else:
            y = F.linear(rows, self.integers.to(x.dtype))
        y = y * self.scale.to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def to_int8(model: GPT) -> GPT:
    """Replace the linear layers, in place; a tied token embedding stays as it is. (Experts' matrices stay, too.)"""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and not name.endswith("router"):  # a rounded router chooses otherwise
                setattr(parent, name, Int8Linear(layer))
    return model


def to_bfloat16(model: GPT) -> GPT:
    """Round all matrices to bfloat16, in place."""
    angles = {name: buffer for name, buffer in model.named_buffers() if name.startswith("rope_")}
    model.bfloat16()
    for name, buffer in angles.items():
        setattr(model, name, buffer)
    return model


def with_weights(model: GPT, kind: str) -> tuple[GPT, str]:
    """A model for inference with weights of a kind of KINDS, and that kind; "auto": the fastest, by a short trial."""
    convert = {"float32": lambda model: model, "bfloat16": to_bfloat16, "int8": to_int8}
    if kind != "auto":
        return convert[kind](model), kind
    best, best_speed, best_kind = model, 0.0, "float32"
    for name in KINDS:
        candidate = model if name == "float32" else convert[name](copy.deepcopy(model))
        if (speed := tokens_per_second(candidate)) > best_speed:
            best, best_speed, best_kind = candidate, speed, name
    return best, best_kind


def tokens_per_second(model: GPT) -> float:
    """The speed of greedy decoding: the fastest of a few steps counts, as the machine may be busy with others."""
    if model.config.block_size < 2:
        raise UserError("a model with a window of one token generates nothing")
    idx = torch.zeros(1, 1, dtype=torch.long, device=model.token_embedding.weight.device)
    n_tokens = min(TRIAL_TOKENS, model.config.block_size - 1)
    times = []
    for _ in model.generate(idx, n_tokens, temperature=0.0):
        times.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(times)]
    return 1 / max(min(steps, default=1.0), 1e-9)
