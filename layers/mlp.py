"""The MLP (feed-forward network) of a block: what is done to every token by itself."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

MLP_HIDDEN = {"swiglu": 8 / 3, "gelu": 4, "gelu_tanh": 4, "relu2": 4}  # width over n_embd: equal parameter counts


class MLP(nn.Module):
    """Two linear layers around a nonlinearity, for every token by itself.

    swiglu: silu(gate) * up, with a third matrix for the gate (Shazeer 2020, arXiv:2002.05202); gelu (gelu_tanh: GPT-2's
    approximation of it); or relu2, the square of relu (So et al. 2021, arXiv:2109.08668).
    """

    def __init__(self, config: Any, n_hidden: int) -> None:
        super().__init__()
        self.kind = config.mlp
        # swiglu: gate and up projections in one matrix, gate first
        self.up = nn.Linear(config.n_embd, n_hidden * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.down = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.kind in ("gelu", "gelu_tanh"):
            x = F.gelu(x, approximate="none" if self.kind == "gelu" else "tanh")
        else:
            x = F.relu(x).square()
        return self.residual_dropout(self.down(x))
