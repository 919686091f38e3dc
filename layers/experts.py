"""Mixture of experts (MoE): several MLPs per layer, and a router that sends every token to the top-k of them.

    probabilities = softmax(router(x))                          # over the experts
    y = sum(gate_i * expert_i(x) for i in top-k)                # gates: the k probabilities, renormalised to sum to 1

Many parameters at the compute of few: a token passes through k of the n_expert MLPs (Shazeer et al. 2017,
arXiv:1701.06538). This form is that of Mixtral (arXiv:2401.04088) and Qwen3-MoE. It is dropless: an expert has no
capacity limit, so no token is dropped.

Where experts lie on many GPUs, tokens are sent to them and back, and everything waits. With shortcut_experts (ScMoE,
Cai et al. 2024, arXiv:2404.05019) the experts of a layer read what the layer before gave its MLP, after its attention;
the shared expert, which every token has at hand, reads the layer's own. Both are added to the stream x:

    h = norm(x)                                                 # x after this layer's attention
    x = x + shared(h) + sum(gate_i * expert_i(h of the layer before))

So tokens can travel while this layer's attention and shared expert compute. On one device, as here, nothing travels and
nothing is gained: what can be seen is whether it learns as well. The first layer's experts read its own h.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.configuration import UserError
from layers.head import matmul_dtype


def check_experts(config: Any) -> None:
    """Raises UserError for experts that a ModelConfig cannot have."""
    if config.n_expert and config.n_expert_per_token > config.n_expert:
        raise UserError(
            f"n_expert_per_token ({config.n_expert_per_token}) must not be above n_expert ({config.n_expert})"
        )
    if config.n_expert and (config.mlp != "swiglu" or config.bias):
        raise UserError("experts are swiglu MLPs without biases: mlp must be swiglu, bias false")
    if config.shortcut_experts and not (config.n_expert and config.n_shared_expert and config.n_layer > 1):
        raise UserError("shortcut_experts needs n_expert, n_shared_expert and two layers")


def grouped_mm(x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Grouped matrix product: rows x (N, in), sorted by group, times their group's matrix of weights (E, in, out).

    counts (E,): number of rows per group. Returns (N, out).
    """
    is_aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])  # the kernel reads 16 bytes
    is_compiling = torch.compiler.is_compiling()
    on_cpu = x.device.type == "cpu" and not is_compiling  # (compiled, it takes bfloat16 alone)
    if is_aligned and (on_cpu or (x.is_cuda and x.dtype == torch.bfloat16)):
        return F.grouped_mm(x, weights, offs=counts.cumsum(0).int())
    return product_by_group(x, weights, counts) if is_compiling else loop_over_groups(x, weights, counts)


def loop_over_groups(x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """grouped_mm() for devices, types and sizes without a kernel: one product per group."""
    groups = x.split(counts.tolist())
    return torch.cat([group @ weight for group, weight in zip(groups, weights.unbind(), strict=True)])


@torch.library.custom_op("nano::product_by_group", mutates_args=())
def product_by_group(x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """loop_over_groups() as one operation of a compiled graph: the sizes of the groups differ from step to step."""
    return loop_over_groups(x, weights, counts)


@product_by_group.register_fake
def _(x, weights, counts):
    return x.new_empty(x.size(0), weights.size(2))


@torch.library.custom_op("nano::gradient_by_group", mutates_args=())
def gradient_by_group(x: torch.Tensor, dy: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The gradient of product_by_group's weights: x^T dy of every group, (E, in, out)."""
    sizes = counts.tolist()
    return torch.stack([a.mT @ b for a, b in zip(x.split(sizes), dy.split(sizes), strict=True)])


@gradient_by_group.register_fake
def _(x, dy, counts):
    return x.new_empty(counts.size(0), x.size(1), dy.size(1))


def keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def product_backward(ctx, dy):
    x, weights, counts = ctx.saved_tensors
    dy = dy.contiguous()
    return product_by_group(dy, weights.mT.contiguous(), counts), gradient_by_group(x, dy, counts), None


product_by_group.register_autograd(product_backward, setup_context=keep_inputs)


class Routing:
    """What the mixtures of all layers share in a forward pass.

    is_token (B, T): False where a token is padding, which the balance of experts leaves out; None: nowhere.
    losses: every layer's load-balancing loss. before (N, n_embd): with shortcut_experts, what the experts of the next
    layer read. A class of its own, as FSDP and ZeRO would hand a layer a copy of a list.
    """

    def __init__(self, is_token: torch.Tensor | None = None) -> None:
        self.is_token = is_token
        self.losses: list[torch.Tensor] = []
        self.before: torch.Tensor | None = None


class MixtureOfExperts(nn.Module):
    """n_expert SwiGLU MLPs of width n_hidden, n_expert_per_token of them per token, and optional shared experts."""

    def __init__(self, config, shared: nn.Module | None) -> None:
        """config: a ModelConfig; shared: an MLP that every token passes through (the shared experts), or None."""
        super().__init__()
        self.config, self.shared = config, shared
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.up = nn.Parameter(torch.empty(config.n_expert, 2 * config.n_hidden, config.n_embd))  # gate first
        self.down = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.n_hidden))
        self.adapters = nn.ModuleDict()  # LoRA adapters of "up" and "down"
        self.register_buffer("tokens_per_expert", torch.zeros(config.n_expert), persistent=False)  # since last read
        if config.expert_balance == "bias":
            self.register_buffer("choice_bias", torch.zeros(config.n_expert))
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """x (B, T, n_embd) -> (B, T, n_embd); below, N = B T tokens, E experts, k experts per token.

        In training, the load-balancing loss is added to routing.losses.
        """
        own, k = x.reshape(-1, x.size(-1)), self.config.n_expert_per_token
        tokens = own  # (N, n_embd): what the experts read
        if self.config.shortcut_experts and routing is not None:
            tokens, routing.before = own if routing.before is None else routing.before, own
        probabilities, experts, gates = self.route(tokens)

        # dispatch: a copy of each token per chosen expert, sorted by expert, so that each works on consecutive rows
        order = experts.flatten().argsort(stable=True)  # (N k,) indices of (token, expert) pairs
        rows = order // k  # each pair's token
        counts = self.count(experts)  # (E,) pairs per expert
        gate, up = self.project("up", tokens.index_select(0, rows), counts).chunk(2, dim=-1)  # (N k, n_hidden) each
        outputs = self.project("down", F.silu(gate) * up, counts)  # (N k, n_embd)

        # combine: the weighted sum of each token's k outputs, back in the order of the tokens
        outputs = outputs * gates.flatten()[order, None].to(outputs.dtype)
        y = torch.zeros_like(tokens, dtype=outputs.dtype).index_add_(0, rows, outputs)
        y = self.residual_dropout(y)
        if self.training:
            mean_probabilities = probabilities.mean(0)
            if routing is not None and routing.is_token is not None:
                weight = routing.is_token.flatten().to(probabilities.dtype)  # (N,)
                counts = self.count(experts, weight)
                mean_probabilities = weight @ probabilities / weight.sum().clamp(min=1)
            self.tokens_per_expert += counts
            # load-balancing (auxiliary) loss of Fedus et al. 2021 (arXiv:2101.03961): E sum_i f_i P_i, f_i the fraction
            # of pairs sent to expert i, P_i its mean probability; 1 if uniform, E / k if all tokens take the same k.
            # Without it a router tends to collapse: favoured experts train more and are favoured even more
            fraction = counts / counts.sum().clamp(min=1)
            if routing is not None:
                routing.losses.append(self.config.n_expert * (fraction * mean_probabilities).sum())
        if self.shared is not None:
            y = y + self.shared(own)
        return y.view(x.shape)

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For tokens (N, n_embd): the router's probabilities (N, E), the top-k experts (N, k), their gates (N, k)."""
        k = self.config.n_expert_per_token
        probabilities = self.router(tokens).float().softmax(-1)  # (N, E)
        scores = probabilities
        if self.config.expert_balance == "bias":  # the bias affects which experts are chosen, not their gates
            scores = scores + self.choice_bias
        experts = scores.topk(k, sorted=False).indices  # (N, k)
        gates = probabilities.gather(1, experts)
        if k > 1:  # with one expert the quotient would be 1, and the router would get no gradient: its probability
            gates = gates / gates.sum(1, keepdim=True)  # itself is the gate then (Switch, arXiv:2101.03961)
        return probabilities, experts, gates

    def count(self, experts: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """How many of the pairs (N, k) each expert has, (E,); weight (N,): what each token counts, else 1."""
        ones = torch.ones_like(experts) if weight is None else weight[:, None].expand(experts.shape)
        counts = torch.zeros(self.config.n_expert, dtype=ones.dtype, device=experts.device)
        return counts.scatter_add(0, experts.flatten(), ones.flatten())

    def project(self, name: str, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows x (N k, in), sorted by expert, times their expert's matrix of this name ("up" or "down")."""
        x = x.to(matmul_dtype(x))  # autocast does not know grouped products, whose kernel on a GPU takes bfloat16 alone
        y = grouped_mm(x, getattr(self, name).mT.to(x.dtype), counts)
        return y + self.adapters[name](x, counts) if name in self.adapters else y


def mixture_layers(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@torch.no_grad()
def count_expert_tokens(model: nn.Module, sum_tensor: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Tokens routed to each expert since the last call, (n_layer, n_expert), summed over all processes by sum_tensor.

    Call it once after every optimizer step: with expert_balance "bias" it also updates the router biases.
    """
    layers = mixture_layers(model)
    counts = sum_tensor(torch.stack([layer.tokens_per_expert for layer in layers]))
    for layer, row in zip(layers, counts, strict=True):
        layer.tokens_per_expert.zero_()
        is_frozen = not layer.router.weight.requires_grad  # with LoRA: an adapter's file does not hold the biases
        if (
            layer.config.expert_balance == "bias" and not is_frozen
        ):  # auxiliary-loss-free balancing: Wang et al. 2024, arXiv:2408.15664
            load = row.to(layer.choice_bias)
            layer.choice_bias += layer.config.expert_bias_rate * (load.mean() - load).sign()  # up where underloaded
    return counts
