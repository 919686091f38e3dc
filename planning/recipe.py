"""What a size decides: one family of shapes, and rules for batch, steps and learning rates that hold along it.

    shape = Shape(n_embd=128, window=128)
    recipe(shape, tokens=1_000_000)         # the fields of a config: model and training

With everything else tied to the size of the network and the number of tokens that it reads, a plan has few numbers to
choose, and the scaling law (law.py) few to depend on. How the rules were measured: bench/NOTES.md, "Rules of plan.py".
"""

import math
from dataclasses import dataclass
from typing import Any

# width: depth. Deeper as they get wider: a ratio of 20 to 70 between them, in which losses hardly depend on it
# (Kaplan et al. 2020, arXiv:2001.08361, figure 5)
DEPTHS = {48: 2, 64: 3, 96: 4, 128: 4, 192: 5, 256: 6, 384: 6, 512: 8, 768: 12, 1024: 16}
WINDOWS = (64, 128, 256, 512, 1024)  # block_size


@dataclass(frozen=True)
class Shape:
    """A network of the family."""

    n_embd: int
    window: int

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}, {self.window}"

    @property
    def n_layer(self) -> int:
        return DEPTHS[self.n_embd]

    @property
    def n_head(self) -> int:
        return max(2, self.n_embd // 32) if self.n_embd <= 256 else self.n_embd // 64

    @property
    def n_weights(self) -> int:
        """Weights of the blocks, those of attention and MLP: the N of scaling laws, without embeddings."""
        n_hidden = 32 * math.ceil(8 / 3 * self.n_embd / 32)
        return self.n_layer * self.n_embd * (4 * self.n_embd + 3 * n_hidden)

    def flops_per_token(self, vocab_size: int) -> float:
        """Operations to train on one token, both passes: 6 per weight, and attention's over half the window."""
        weights = self.n_weights + vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_embd * self.window / 2

    def model_fields(self) -> dict[str, Any]:
        return {
            "block_size": self.window,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "rope_theta": 100
            * (self.window / 64) ** 2,  # so that the slowest rotation turns a fair part within the window
        }


def tokens_per_step(tokens: float) -> float:
    """Tokens of a step's batch for a run that reads so many in all.

    The more tokens a run reads, the more can be in a batch before steps are wasted: the critical batch size grows about
    as the square root of the tokens (Zhang et al. 2024, arXiv:2410.21676; Bergsma et al. 2025, arXiv:2505.13738).
    """
    return min(2.0**19, max(768.0, 1152 * (tokens / 180_000) ** 0.4))


def recipe(shape: Shape, tokens: float, micro_batch: int = 1 << 20) -> dict[str, Any]:
    """Model and training fields of a run of this shape that reads so many tokens.

    micro_batch: tokens that fit into memory at once; a larger batch is accumulated.
    """
    samples = max(1, round(tokens_per_step(tokens) / shape.window))
    accumulation = math.ceil(samples * shape.window / micro_batch)
    batch_size = math.ceil(samples / accumulation)
    steps = max(10, round(tokens / (batch_size * accumulation * shape.window)))
    return {
        **shape.model_fields(),
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "optimizer": "muon",
        "learning_rate": 0.012,
        "min_lr": 0.0,
        "muon_learning_rate": 0.025,
        "muon_momentum": min(0.95, max(0.85, 1 - 0.15 * (300 / steps) ** 0.33)),
        "weight_decay": 0.01,
        "lr_schedule": "linear",
        "warmup_iters": max(1, min(100, steps // 15)),
    }
