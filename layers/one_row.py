"""A matrix times one vector, on a CPU: most of the work when tokens are generated one by one.

Every weight is read once and used once, so the time is that of reading. A core waits for its memory less when it reads
several places at a time: so a matrix is cut into four pieces, one below the other, which are multiplied side by side.
PyTorch's own product takes twice as long (docs/measured.md).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers.head import Head

PIECES = 4
LARGE = 1 << 17  # weights: smaller matrices lie in the cache of a core, where pieces gain nothing


def times_one_row(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight (out, in) times x (in,) -> (out,), in float32: to be compiled to one loop."""
    n_pieces = PIECES if weight.size(0) % PIECES == 0 else 1
    pieces = weight.view(n_pieces, -1, weight.size(1))
    return torch.stack([(piece.float() * x.float()).sum(-1) for piece in pieces]).flatten()


class OneRowLinear(nn.Linear):
    """A linear layer for inference, with the same weights: faster where it has one row."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.is_cut = self.weight.numel() >= LARGE and self.out_features % PIECES == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != self.in_features or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            y = times_one_row(self.weight, x.flatten())
        elif self.is_cut and x.dtype == torch.float32:
            pieces = self.weight.view(PIECES, -1, self.in_features)
            y = torch.bmm(pieces, x.reshape(1, -1).T.expand(PIECES, -1, -1)).flatten()  # .T: by columns, the fast way
        else:
            return F.linear(x, self.weight, self.bias)
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


def read_one_row_faster(model: nn.Module) -> None:
    """Replace the linear layers of a model, in place; it computes logits from now on, and no loss."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in (nn.Linear, Head):
                setattr(parent, name, OneRowLinear(layer))
