"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): learn the next token, and those after it.

With n_future = 3, the model predicts from the hidden state at position i, as ever, token i + 1. Two modules more, which
form a chain, predict the tokens after that; each is also told the token before the one that it predicts:

    position              i                     the text is t_0, t_1, ..., and h^0_i the hidden state of the model
    model                 h^0_i                                              -> t_{i+1}
    module 1              h^1_i = block_1(join_1 [norm h^0_i; norm e(t_{i+1})])  -> t_{i+2}
    module 2              h^2_i = block_2(join_2 [norm h^1_i; norm e(t_{i+2})])  -> t_{i+3}

Embedding e and output layer are those of the model; the block is one like its last, and sees h^k of the positions up to
i. Since no module may look at the token that it predicts, nothing has to be predicted in parallel, and the chain is as
causal as the model.

What it is for: each hidden state has to know more of what comes, a denser signal from the same text; and the modules
guess tokens for speculative decoding (layers/speculative.py). Who wants neither leaves them out: the model alone needs
nothing of them.
"""

import copy
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from layers.attention import RopeAngles
from layers.cache import KVCache
from layers.experts import Routing
from layers.norm import make_norm


def future_config(config: Any) -> Any:
    """The shape of the modules as a model's of their own: a layer each, of the kind of the last one. (No check.)"""
    modules, last = copy.copy(config), config.n_layer - 1
    modules.n_layer, modules.n_future = config.n_future - 1, 1
    modules.attention = [config.attention[last % len(config.attention)]]
    modules.attention_window = [config.windows[last]]
    return modules


class FutureModule(nn.Module):
    """One step further into the future: from hidden states and the tokens that follow, the next hidden states."""

    def __init__(self, config: Any, block: nn.Module) -> None:
        """config: a ModelConfig; block: a Block of the model's."""
        super().__init__()
        self.hidden_norm, self.embedding_norm = make_norm(config), make_norm(config)
        self.join = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.block = block
        self.norm = make_norm(config)  # as the model's last: what goes into the output layer

    def forward(
        self,
        hidden: torch.Tensor,
        embedding: torch.Tensor,
        rope: RopeAngles | None,
        mask: torch.Tensor | BlockMask | None = None,
        cache: KVCache | None = None,
        routing: Routing | None = None,
    ) -> torch.Tensor:
        """h^k (B, T, n_embd) of h^{k-1} (B, T, n_embd) and the embeddings of the tokens k places further, likewise."""
        x = torch.cat((self.hidden_norm(hidden), self.embedding_norm(embedding)), dim=-1)  # (B, T, 2 n_embd)
        return self.norm(self.block(self.join(x), rope, mask, cache, routing))


def shift(x: torch.Tensor, n: int) -> torch.Tensor:
    """x (B, T) moved n places to the left, so that place i holds what place i + n held; zeros at the end."""
    return F.pad(x, (0, n))[:, n:]


def future_targets(
    targets: torch.Tensor, loss_mask: torch.Tensor | None, documents: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Module k's targets (B, T), and 1 where they count: those of the next-token loss, k places further.

    Not beyond the end of the row, nor in another document (B, T) than the position's.
    """
    mask = shift(torch.ones_like(targets) if loss_mask is None else loss_mask, k)
    if documents is not None:
        mask = mask * (shift(documents, k) == documents)
    return shift(targets, k), mask


def future_loss(
    model: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    loss_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    routing: Routing,
) -> torch.Tensor:
    """What is added to the model's summed loss: the modules' summed losses, averaged, times future_loss_weight.

    hidden (B, T, n_embd): the model's; the others as in GPT.forward(). The sum is divided later by the number of the
    model's own targets, as in the paper, although module k has k targets fewer in every row.
    """
    T = targets.size(1)
    rope, mask = model.rope(model.positions(T, documents))[-1], model.masks(T, None, documents, targets.device)
    states, goals = [], []
    with model.attention_kernel():
        for k, module in enumerate(model.future, 1):
            routing.before = None  # with shortcut_experts: a module's experts read what it reads itself
            embedding = model.token_embedding(shift(targets, k - 1))  # of t_{i+k}, which is the target k - 1 places on
            hidden = module(hidden, embedding, rope, mask[model.windows[-1]], None, routing)
            states.append(hidden)
            goals.append(future_targets(targets, loss_mask, documents, k))
    total = model.lm_head(torch.cat(states), *map(torch.cat, zip(*goals, strict=True)))  # all modules' rows at once
    return model.config.future_loss_weight * total / len(states)
