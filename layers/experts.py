"""Mixture of experts: several MLPs per layer, of which a router picks a few for every token.

Shazeer et al. 2017 (arXiv:1701.06538); with the router's softmax, renormalised over the chosen, what Mixtral
(arXiv:2401.04088) and Qwen3-MoE compute. Dropless: every token gets the experts that it chose.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F


def grouped_mm(x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows x (N, in), sorted by group, each times its group's matrix of weights (E, in, out); counts (E,): of rows."""
    is_aligned = all(size % 8 == 0 for size in weights.shape[1:])  # to 16 bytes
    if x.device.type == "cpu" or (x.is_cuda and x.dtype == torch.bfloat16 and is_aligned):
        return F.grouped_mm(x, weights, offs=counts.cumsum(0).int())
    parts = x.split(counts.tolist())  # elsewhere there is no kernel for it
    return torch.cat([part @ weight for part, weight in zip(parts, weights.unbind(), strict=True)])


class MixtureOfExperts(nn.Module):
    """n_expert SwiGLU MLPs of width n_hidden, of which n_expert_per_token work on a token; shared ones work on all."""

    def __init__(self, config, shared: nn.Module | None) -> None:
        """config: a ModelConfig; shared: an MLP for every token, or None."""
        super().__init__()
        self.config, self.shared = config, shared
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.up = nn.Parameter(torch.empty(config.n_expert, 2 * config.n_hidden, config.n_embd))  # gate first
        self.down = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.n_hidden))
        self.adapters = nn.ModuleDict()  # of up and down: what LoRA adds
        self.register_buffer("counts", torch.zeros(config.n_expert), persistent=False)  # tokens since the last look
        if config.expert_balance == "bias":
            self.register_buffer("choice_bias", torch.zeros(config.n_expert))
        self.router_loss: torch.Tensor | float = 0.0  # of the last forward pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, k = x.reshape(-1, x.size(-1)), self.config.n_expert_per_token
        probabilities = self.router(tokens).float().softmax(-1)  # (N, E)
        scores = probabilities
        if self.config.expert_balance == "bias":
            scores = scores + self.choice_bias  # who is chosen, not how much it counts
        chosen = scores.topk(k, sorted=False).indices  # (N, k)
        gates = probabilities.gather(1, chosen)
        gates = gates / gates.sum(1, keepdim=True)

        order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs, sorted by expert
        rows = order // k
        counts = torch.bincount(chosen.flatten(), minlength=self.config.n_expert)
        inputs = tokens[rows]
        gate, up = self.project("up", inputs, counts).chunk(2, dim=-1)
        outputs = self.project("down", F.silu(gate) * up, counts)
        outputs = outputs * gates.flatten()[order, None].to(outputs.dtype)
        y = torch.zeros_like(tokens, dtype=outputs.dtype).index_add(0, rows, outputs)
        if self.training:
            self.counts += counts
            # Fedus et al. 2021 (arXiv:2101.03961): 1 when all experts get the same, n_expert when one gets all
            share = counts / counts.sum()
            self.router_loss = self.config.n_expert * (share * probabilities.mean(0)).sum()
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view(x.shape)

    def project(self, name: str, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows x (N, in), sorted by expert, each through its expert's matrix of this name."""
        y = grouped_mm(x, getattr(self, name).mT.to(x.dtype), counts)
        return y + self.adapters[name](x, counts) if name in self.adapters else y

    def rebalance(self, counts: torch.Tensor) -> None:
        """Make experts with more tokens than others less likely to be chosen (Wang et al. 2024, arXiv:2408.15664)."""
        self.choice_bias += self.config.expert_bias_rate * (counts.mean() - counts).sign()


def mixture_layers(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@torch.no_grad()
def count_expert_tokens(model: nn.Module, sum_over_ranks: Callable[..., list[float]]) -> torch.Tensor:
    """Tokens that each expert got since the last call, (layers, experts), on all processes.

    Rebalances where the balance is kept by biases, so it is to be called once after every step.
    """
    layers = mixture_layers(model)
    local = torch.stack([layer.counts for layer in layers])
    counts = torch.tensor(sum_over_ranks(*local.flatten().tolist())).view_as(local)
    for layer, row in zip(layers, counts, strict=True):
        layer.counts.zero_()
        if layer.config.expert_balance == "bias":
            layer.rebalance(row.to(layer.choice_bias))
    return counts
