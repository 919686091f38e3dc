"""Weights for inference in fewer bytes: bfloat16, or integers of 8 or 4 bits.

    model, kind = with_weights(model, "auto")       # the fastest of float32, bfloat16 and int8 here

To generate a token for one sequence, every weight is read once and used once: the time is that of reading them from
memory. Half, a quarter or a sixth of the bytes is up to two, four or six times the speed.

bfloat16 rounds all that is stored and passed on to 8 bits, but for RoPE's angles; norms and softmax compute in float32
inside. int8 rounds the linear layers alone, and what goes into them and out of them to bfloat16 where they have few
rows; a mixture's experts and its router stay exact. int4 rounds what int8 does, but for the output layer, which stays
at 8 bits.
"""

import copy
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.devices import synchronise
from layers.one_row import times_one_row
from model import GPT

KINDS = ("float32", "bfloat16", "int8", "int4")
TRIED = KINDS[:3]  # by "auto": those that change hardly anything
FEW_ROWS = 16  # up to so many tokens at once the integers' own kernel is faster than expanding them
COLUMNS = 32  # that kernel reads as many at a time, beyond the end of a row that has not a multiple of them
GROUP = 32  # weights of a row that share a scale, with 4 bits each
ROWS = 16  # the kernel of 4-bit integers takes as many outputs at a time
FOUR_BIT_KERNEL = "_weight_int4pack_mm_for_cpu"
TRIAL_TOKENS = 12


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers with a scale per output: W = scale * integers.

    y = scale * (integers x): the scale of a row is its largest magnitude / 127, so that the largest weight is 127 and
    none is off by more than half a scale, 0.4% of the largest of its row.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("scale", scale)  # (out,)
        integers = (weight / scale[:, None]).round().to(torch.int8)
        self.n_padding = -linear.in_features % COLUMNS
        self.register_buffer("integers", F.pad(integers, (0, self.n_padding)))  # (out, in), and zeros
        self.register_buffer("ones", torch.ones(len(scale), dtype=torch.bfloat16))
        self.bias, self.in_features = linear.bias, linear.in_features

    @property
    def weight(self) -> torch.Tensor:
        """What the integers stand for, for who does not call the layer (latent attention, decoding): (out, in)."""
        return self.integers[:, : self.in_features] * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = F.pad(x.reshape(-1, x.size(-1)), (0, self.n_padding))
        if torch.compiler.is_compiling() and len(rows) == 1 and x.device.type == "cpu":
            y = times_one_row(self.integers, rows[0].bfloat16()).bfloat16().to(x.dtype)  # rounded as below
        elif len(rows) <= FEW_ROWS and x.device.type == "cpu":  # multiplies by scales in bfloat16: ours are float32
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.integers, self.ones).to(x.dtype)
        else:
            y = F.linear(rows, self.integers.to(x.dtype))
        y = y * self.scale.to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """A linear layer whose weights are 4-bit integers: W = scale * (integers - 8) + zero, for groups of 32 of a row.

    16 values are few for all weights of a row, the largest of which would leave the others a handful. Of 32 the largest
    is not as far from the rest: the values are spread evenly from the smallest to the largest of a group (round to
    nearest). With scale and zero in bfloat16 a weight takes 5 bits.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, self.in_features, self.out_features = linear.bias, linear.in_features, linear.out_features
        self.n_padding = -linear.in_features % GROUP
        weight = F.pad(linear.weight.detach().float(), (0, self.n_padding, 0, -linear.out_features % ROWS))
        groups = weight.unflatten(1, (-1, GROUP))  # (out, groups, 32)
        low, high = groups.aminmax(dim=-1)  # (out, groups)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()[:, :, None]) / scale.float()[:, :, None]
        integers = (steps.round() + 8).clamp(0, 15).to(torch.int32).flatten(1)  # (out, in)
        self.register_buffer("scale_and_zero", torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous())
        self.has_kernel = weight.device.type == "cpu" and hasattr(torch.ops.aten, FOUR_BIT_KERNEL)
        if self.has_kernel:  # in the order in which the kernel reads them
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        else:
            packed = (integers[:, 0::2] + 16 * integers[:, 1::2]).to(torch.uint8)
        self.register_buffer("packed", packed)  # (out, in / 2): two in a byte

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights that the integers stand for, (out, in); where there is no kernel."""
        integers = torch.stack((self.packed % 16, self.packed // 16), dim=-1).flatten(1).unflatten(1, (-1, GROUP))
        scale, zero = self.scale_and_zero.to(dtype).transpose(0, 1).unsqueeze(2).unbind(-1)  # (out, groups, 1)
        return ((integers.to(dtype) - 8) * scale + zero).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = F.pad(x.reshape(-1, x.size(-1)), (0, self.n_padding))
        if self.has_kernel:  # for many rows as well: it is as fast as the product in float32
            arguments = self.packed, GROUP, self.scale_and_zero
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), *arguments).to(x.dtype)
        else:
            y = F.linear(rows, self.expanded(x.dtype))
        y = y[:, : self.out_features].reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def replace_linears(model: GPT, kind: Callable[[str], type[nn.Module]]) -> GPT:
    """Replace the linear layers, in place; a tied token embedding stays as it is. (Experts' matrices stay, too.)"""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and not name.endswith("router"):  # a rounded router chooses otherwise
                setattr(parent, name, kind(name)(layer))
    return model


def to_int8(model: GPT) -> GPT:
    """8-bit integers for all linear layers, in place."""
    return replace_linears(model, lambda name: Int8Linear)


def to_int4(model: GPT) -> GPT:
    """4-bit integers, in place, but for the output layer, and where the weights themselves are asked for: 8 bits."""
    return replace_linears(model, lambda name: Int8Linear if name in ("lm_head", "kv_up") else Int4Linear)


def to_bfloat16(model: GPT) -> GPT:
    """Round all matrices to bfloat16, in place."""
    angles = {name: buffer for name, buffer in model.named_buffers() if name.startswith("rope_")}
    model.bfloat16()
    for name, buffer in angles.items():
        setattr(model, name, buffer)
    return model


def with_weights(model: GPT, kind: str) -> tuple[GPT, str]:
    """A model for inference with weights of a kind of KINDS, and the kind; "auto": the fastest of TRIED, by a trial."""
    convert = {"float32": lambda model: model, "bfloat16": to_bfloat16, "int8": to_int8, "int4": to_int4}
    if kind != "auto":
        return convert[kind](model), kind
    best, best_speed, best_kind = model, 0.0, "float32"
    for name in TRIED:
        candidate = model if name == "float32" else convert[name](copy.deepcopy(model))
        if (speed := tokens_per_second(candidate)) > best_speed:
            best, best_speed, best_kind = candidate, speed, name
    return best, best_kind


def tokens_per_second(model: GPT) -> float:
    """The speed of greedy decoding: the fastest of a few steps counts, as the machine may be busy with others."""
    device = model.token_embedding.weight.device
    idx = torch.zeros(1, 1, dtype=torch.long, device=device)
    times = []
    for _ in model.generate(idx, min(TRIAL_TOKENS, model.config.block_size), temperature=0.0):
        synchronise(device)  # a GPU is only told what to do
        times.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(times)]
    return 1 / max(min(steps, default=1.0), 1e-9)
