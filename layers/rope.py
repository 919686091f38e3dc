"""Rotary position embeddings (RoPE, Su et al. 2021, arXiv:2104.09864), and their scaling to longer windows.

A query and a key are cut into pairs of numbers, and each pair is rotated as a point in the plane by an angle that grows
with the token's position. The product of a query at position m and a key at position n then depends on m - n alone:
attention sees distances, and no parameter is learned. The pairs turn at different frequencies, theta^(-2i/D): the fast
ones tell neighbours apart, the slow ones tell near from far.
"""

import math
from typing import Any

import torch

from base.configuration import UserError

ROPE_SCALING = ("none", "linear", "ntk", "yarn", "llama3")


def check_rope(config: Any) -> None:
    """Raises UserError for what a ModelConfig says of positions and RoPE cannot do."""
    if config.use_rope and config.block_size * config.head_dim > 1 << 28:
        raise UserError(
            f"block_size {config.block_size:,} is too long for a RoPE table of head_dim {config.head_dim:,}"
        )
    if config.rope_scaling != "none" and not config.use_rope:
        raise UserError(f"rope_scaling {config.rope_scaling} needs use_rope: learned positions end where they end")
    if config.rope_scaling == "yarn" and config.rope_theta <= 1:
        raise UserError(f"rope_scaling yarn needs a rope_theta above 1, got {config.rope_theta:g}")


def rope_table(
    block_size: int,
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    trained_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines (block_size, 1, head_dim) of every position's angles, for apply_rope().

    The half-rotation convention of Llama and Qwen: dimension i forms a pair with dimension i + head_dim / 2.
    """
    frequency, scale = rope_frequencies(head_dim, theta, scaling, factor, trained_length or block_size)
    angle = torch.outer(torch.arange(block_size).float(), frequency)[:, None, :]  # (block_size, 1, head_dim / 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, n_head, head_dim) by its positions' angles, cos and signed sin ([B,] T, 1, head_dim).

    For a pair (a, b): (a cos - b sin, b cos + a sin). roll() by half of the dimensions brings b to a's place and a to
    b's; the signs are in the table.
    """
    rolled = x.roll(x.size(-1) // 2, dims=-1).to(cos.dtype)
    return rolled.mul_(sin).addcmul_(x, cos).to(x.dtype)


def rope_frequencies(
    head_dim: int, theta: float, scaling: str, factor: float, trained_length: int
) -> tuple[torch.Tensor, float]:
    """Angles per position (head_dim / 2,), and the factor on queries and keys, by kind of scaling.

    All kinds read `factor` times as far as trained_length, the window of the training; Peng et al. 2023 (YaRN,
    arXiv:2309.00071) describes them. linear: positions are interpolated (Chen et al. 2023, arXiv:2306.15595). ntk: a
    larger base, which stretches the slow pairs and spares the fast ones. yarn: pairs that turn often within the trained
    window stay as they are, those that never complete a turn are interpolated, with a ramp between. llama3: the same
    idea in Llama 3.1 (Llama Team 2024, arXiv:2407.21783), with other bounds and a ramp over the number of turns.
    """
    D = head_dim
    if scaling == "ntk" and D > 2:
        theta = theta * factor ** (D / (D - 2))
    frequency = 1.0 / theta ** (torch.arange(0, D, 2).float() / D)
    if scaling == "linear":
        return frequency / factor, 1.0
    if scaling == "llama3":
        turns = trained_length * frequency / (2 * math.pi)
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)  # 1: four turns or more, stays; 0: one or less, is interpolated
        return frequency * keep + frequency / factor * (1 - keep), 1.0
    if scaling != "yarn":
        return frequency, 1.0

    def pair_that_turns(times: int) -> float:
        """Index of the pair that completes so many turns in the trained window, from theta^(-2i/D) L = 2 pi times."""
        return D * math.log(trained_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(pair_that_turns(32))), min(D - 1, math.ceil(pair_that_turns(1)))
    ramp = ((torch.arange(D // 2) - low) / max(0.001, high - low)).clamp(0, 1)  # 0: stays, 1: is interpolated
    temperature = 0.1 * math.log(factor) + 1  # longer windows flatten the softmax; YaRN sharpens it again
    return frequency * (1 - ramp) + frequency / factor * ramp, temperature
