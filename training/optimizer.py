"""Optimizers (AdamW, Muon, SGD) and learning-rate schedules, each looked up by name.

    optimizer = make_optimizer(model, config, device)
    scale_learning_rates(optimizer, schedule("cosine", step, 300, 10_000, 0.1))
    optimizer.step()

Every parameter group has its own peak learning rate; the schedule scales all of them by the same factor.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from base.devices import has_bfloat16
from model import GPT, ModelConfig
from vision.encoder import encoder_shape

# ------------------------------------------------------------------------------------------------------ schedules
# a schedule maps progress through the decay, 0..1, to a factor that falls from 1 to 0

WSD_DECAY = 0.2  # fraction of the steps after the warm-up in which wsd decays


def cosine(progress: float) -> float:
    """Half a cosine (Loshchilov & Hutter 2016, arXiv:1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


def wsd(progress: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): the peak rate for long, then a short linear decay."""
    return min(1.0, (1 - progress) / WSD_DECAY)


def constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}


def schedule(name: str, step: int, warmup_iters: int, lr_decay_iters: int, floor: float) -> float:
    """Learning rate at a step (from 0) as a fraction of the peak: linear warm-up, then decay to floor, constant after.

    Why a warm-up: Adam's first steps rest on the moments of few gradients, too noisy for the full learning rate.
    """
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return floor + (1 - floor) * SCHEDULES[name](progress)


def schedule_over_time(name: str, step: int, warmup_iters: int, share: float, floor: float) -> float:
    """Likewise, but decaying with the share of the time that is used, 0..1: the decay ends when the time does.

    The lower one of the warm-up's line and the decay's curve: so the rate falls in time although the warm-up is long.
    """
    warmup = (step + 1) / (warmup_iters + 1)
    return min(warmup, floor + (1 - floor) * SCHEDULES[name](min(1.0, share)))


# ------------------------------------------------------------------------------------------------------ Muon

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024, kellerjordan.github.io/posts/muon


def orthogonalise(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, U V^T of G = U S V^T, to a batch G (n, rows, columns).

    Computed by a Newton-Schulz iteration, matrix products alone, which a GPU does faster than an SVD: each step applies
    p(s) = a s + b s^3 + c s^5 to the singular values. They end between about 0.7 and 1.2, close enough to 1 for Muon.
    """
    a, b, c = NEWTON_SCHULZ
    # the iteration needs no more than bfloat16; a CPU gains by it from some size on
    is_fast = G.is_cuda or (min(G.shape[-2:]) >= 256 and has_bfloat16(G.device))
    X = G.bfloat16() if is_fast else G.float()
    transposed = X.size(-2) > X.size(-1)
    if transposed:  # so that X X^T is the smaller of the two Gram matrices
        X = X.mT.contiguous()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values in 0..1, where the iteration converges
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return (X.mT if transposed else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): the update of a weight matrix is its orthogonalised Nesterov momentum.

    Gradients of weight matrices are dominated by a few directions; with all singular values near 1, the update moves in
    the weak ones as far as in the strong ones. It is scaled by sqrt(max(1, rows / columns)).

    A parameter may hold several matrices: fused one below the other (queries, keys and values in `qkv`), or stacked
    (n_expert, rows, columns). Each is orthogonalised by itself: together, the one with the largest gradient would
    dominate the update.
    """

    def __init__(
        self,
        parameters: list[torch.Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        rows: list[list[int]] | None = None,
    ) -> None:
        """rows: for every parameter, the number of rows of each matrix fused in it; None: each holds one matrix."""
        self.rows = rows or [[p.size(-2)] for p in parameters]
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        with_grad = [(p, rows) for p, rows in zip(group["params"], self.rows, strict=True) if p.grad is not None]
        ps = [p for p, _ in with_grad]
        gradients = [p.grad for p in ps]
        # momentum m <- mu m + (1 - mu) g; Nesterov's look-ahead: the update is mu m + (1 - mu) g with the new m
        for p in ps:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in ps]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = [full_tensor(u) for u in torch._foreach_lerp(gradients, momenta, group["momentum"])]

        # all processes of a job, if there are several, have the same updates here: they deal the work out
        is_job = dist.is_initialized() and dist.get_world_size() > 1
        method = orthogonalise_together if is_job else orthogonalise
        orthogonalise_matrices(updates, [rows for _, rows in with_grad], method)

        # decoupled weight decay, as in AdamW, then the step
        torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(ps, [shard_like(p, u) for p, u in zip(ps, updates, strict=True)], alpha=-group["lr"])


def orthogonalise_matrices(
    updates: list[torch.Tensor],
    rows: list[list[int]],
    method: Callable[[torch.Tensor], torch.Tensor] = orthogonalise,
) -> None:
    """Orthogonalise, in place, every matrix in the updates; rows: for each update, those of the matrices fused in it.

    All matrices of one shape go through one batched product instead of many small ones.
    """
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for update, sizes in zip(updates, rows, strict=True):
        for matrix in update.split(sizes, dim=-2):  # views of the update
            by_shape.setdefault(matrix.shape, []).append(matrix)
    for (*_, n_rows, n_columns), matrices in by_shape.items():
        stack = torch.stack(matrices)  # (n, rows, columns), or (n, n_expert, rows, columns)
        scale = math.sqrt(max(1.0, n_rows / n_columns))
        orthogonal = method(stack.view(-1, n_rows, n_columns)).mul_(scale).view_as(stack)
        torch._foreach_copy_(matrices, orthogonal.unbind())
        del stack, orthogonal  # before those of the next shape are made


def orthogonalise_together(G: torch.Tensor) -> torch.Tensor:
    """orthogonalise(G), of which every process computes a share; all must have the same G (n, rows, columns).

    What is sent is as much as the weights, half of what averaging the gradients takes.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = math.ceil(len(G) / world_size)  # of a share; the last ones may have fewer matrices, or none
    share = G[rank * size : (rank + 1) * size]
    mine = G.new_zeros(size, *G.shape[1:])
    if len(share):
        mine[: len(share)] = orthogonalise(share)
    shares = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(shares, mine)
    return torch.cat(shares)[: len(G)]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full (unsharded) tensor, gathered from all processes where it is a shard: orthogonality is of all rows."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(p: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The full update, sharded as the parameter p is (if it is); no communication, as every process has all of it."""
    if not hasattr(p, "full_tensor"):
        return update
    from torch.distributed.tensor import distribute_tensor  # takes a second to import: only when it is needed

    return distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)


# ------------------------------------------------------------------------------------------------------ by name


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers for different parameters behind the interface of one; param_groups are those of all."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])
        # torch has replaced the group dicts by new ones: share them again
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def fused_adamw(groups: list[dict[str, Any]], config: Any, device: torch.device) -> torch.optim.AdamW:
    fused = device.type in ("cpu", "cuda", "mps")  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def make_adamw(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), with weight decay on matrices only."""
    matrices, vectors = matrices_and_vectors(model)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return fused_adamw(groups, config, device)


def make_sgd(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum beta1, and weight decay on matrices only."""
    matrices, vectors = matrices_and_vectors(model)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.beta1)


def make_muon(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """Muon for the weight matrices of the blocks; AdamW for embeddings, output layer, norms, biases and routers.

    Its author advises so: Muon is for maps between hidden states; an embedding is a table of rows that are looked up.
    """
    named, matrices = trainable_parameters(model), muon_matrices(model)
    rows = [rows_of_fused_matrices(model.config, name, p.size(-2)) for name, p in matrices.items()]
    muon = Muon([*matrices.values()], config.muon_learning_rate, config.muon_momentum, config.weight_decay, rows)
    others = [p for name, p in named.items() if name not in matrices]
    return CombinedOptimizer(muon, fused_adamw([{"params": others, "weight_decay": 0.0}], config, device))


def muon_matrices(model: GPT) -> dict[str, torch.Tensor]:
    """The trainable parameters that Muon takes, by name."""
    named = trainable_parameters(model).items()
    in_layers = {name: p for name, p in named if name.startswith(("blocks.", "future.", "vision.blocks."))}
    maps = {name: p for name, p in in_layers.items() if p.dim() >= 2 and "router" not in name}
    return {name: p for name, p in maps.items() if not name.endswith("convolution")}


def rows_of_fused_matrices(config: ModelConfig, name: str, n_rows: int) -> list[int]:
    """Number of rows of each matrix fused in the weight of this name (n_rows in all), as queries, keys and values."""
    if found := re.search(r"(?:blocks\.(\d+)|\.block)\.attention\.(\w+)\.weight$", name):
        layer, part = int(found[1] or -1), found[2]  # a block of `future` is one like the last
        config = encoder_shape(config) if name.startswith("vision.") else config
        return config.attention_classes[layer].fused_rows(config).get(part, [n_rows])
    is_gated = config.mlp == "swiglu" and name.endswith((".up", ".up.weight"))
    return [n_rows // 2] * 2 if is_gated else [n_rows]


OPTIMIZERS = {"adamw": make_adamw, "muon": make_muon, "sgd": make_sgd}


def trainable_parameters(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def matrices_and_vectors(model: GPT) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Trainable parameters with two or more dimensions, and the others (norm weights, biases).

    Weight decay keeps the weights of matrix products small; a norm's weight, a scale near 1, is not to decay to 0.
    """
    ps = trainable_parameters(model).values()
    return [p for p in ps if p.dim() >= 2], [p for p in ps if p.dim() < 2]


def make_optimizer(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer named by config.optimizer, for the trainable parameters of the model.

    config: optimizer, learning_rate, weight_decay, beta1, beta2, muon_learning_rate, muon_momentum.
    """
    optimizer = OPTIMIZERS[config.optimizer](model, config, device)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def scale_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set every parameter group's learning rate to this fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
