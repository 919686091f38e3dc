"""Optimizers and learning-rate schedules, each looked up by name.

optimizer = make_optimizer(model, config, device)       # config.optimizer: adamw, muon or sgd
scale_learning_rates(optimizer, schedule(...))          # a share of the peak
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from model import GPT, ModelConfig

# ------------------------------------------------------------------------------------------------------ schedules

COOL_DOWN = 0.2  # share of the decay steps that wsd spends going down


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


def wsd(progress: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395)."""
    return min(1.0, (1 - progress) / COOL_DOWN)


def constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}


def schedule(name: str, step: int, warmup_iters: int, lr_decay_iters: int, floor: float) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up, then from 1 down to floor, where it stays."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return floor + (1 - floor) * SCHEDULES[name](progress)


# ------------------------------------------------------------------------------------------------------ optimizers

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, kellerjordan.github.io/posts/muon


def orthogonalise(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices to a stack G (n, rows, columns), by Newton-Schulz iteration.

    Its singular values end between about 0.7 and 1.2, which serves Muon as well as exact ones.
    """
    a, b, c = NEWTON_SCHULZ
    X = G.bfloat16() if G.is_cuda else G.float()
    transposed = X.size(-2) > X.size(-1)
    if transposed:
        X = X.mT.contiguous()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return (X.mT if transposed else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): a matrix moves by its orthogonalised Nesterov momentum.

    The step is scaled by sqrt(max(1, rows / columns)). A parameter may join several matrices, below one another (rows:
    how many each has) or in a stack (experts, rows, columns): each is orthogonalised for itself, or the strongest would
    take what is the others'. Matrices of one shape are orthogonalised together: one batched product instead of many.
    """

    def __init__(
        self,
        parameters: list[torch.Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        rows: list[list[int]] | None = None,
    ) -> None:
        """rows: for every parameter, the rows of the matrices that it joins; None: each is one matrix."""
        self.rows = rows or [[p.size(-2)] for p in parameters]
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        moving = [(p, rows) for p, rows in zip(group["params"], self.rows, strict=True) if p.grad is not None]
        ps = [p for p, _ in moving]
        gradients = [p.grad for p in ps]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in ps]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = [full_tensor(u) for u in torch._foreach_lerp(gradients, momenta, group["momentum"])]
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for update, (_, rows) in zip(updates, moving, strict=True):
            for matrix in update.split(rows, dim=-2):
                by_shape.setdefault(matrix.shape, []).append(matrix)
        for (*_, n_rows, n_columns), matrices in by_shape.items():
            stack = torch.stack(matrices)
            scale = math.sqrt(max(1.0, n_rows / n_columns))
            orthogonal = orthogonalise(stack.view(-1, n_rows, n_columns)).mul_(scale).view_as(stack)
            torch._foreach_copy_(matrices, orthogonal.unbind())
        torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(ps, [shard_like(p, u) for p, u in zip(ps, updates, strict=True)], alpha=-group["lr"])


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded over processes, whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(p: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """This process's share of an update that every process has whole, where p is sharded."""
    if not hasattr(p, "full_tensor"):
        return update
    from torch.distributed.tensor import distribute_tensor  # a second to import, for those who shard

    return distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers that step as one; its groups are theirs."""

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
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def adamw(groups: list[dict[str, Any]], config: Any, device: torch.device) -> torch.optim.AdamW:
    fused = device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def make_adamw(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101); weight decay on matrices only."""
    matrices, others = matrices_and_vectors(model)
    return adamw(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        config,
        device,
    )


def make_sgd(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum beta1; weight decay on matrices only."""
    matrices, others = matrices_and_vectors(model)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.beta1)


def make_muon(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """Muon for the matrices inside the blocks; AdamW, at learning_rate, for embeddings, output layer, norms, router."""
    named = trainable(model)
    matrices = {n: p for n, p in named.items() if p.dim() >= 2 and "blocks." in n and "router" not in n}
    rows = [joined_rows(model.config, name, p.size(-2)) for name, p in matrices.items()]
    muon = Muon([*matrices.values()], config.muon_learning_rate, config.muon_momentum, config.weight_decay, rows)
    others = [p for name, p in named.items() if name not in matrices]
    return CombinedOptimizer(muon, adamw([{"params": others, "weight_decay": 0.0}], config, device))


def joined_rows(config: ModelConfig, name: str, n_rows: int) -> list[int]:
    """Rows of each of the matrices that the weight of this name, of n_rows in all, stores below one another."""
    if name.endswith("qkv.weight"):
        kv = config.n_kv_head * config.head_dim
        return [n_rows - 2 * kv, kv, kv]
    is_gated = config.mlp == "swiglu" and name.endswith((".up", ".up.weight"))
    return [n_rows // 2] * 2 if is_gated else [n_rows]


OPTIMIZERS = {"adamw": make_adamw, "muon": make_muon, "sgd": make_sgd}


def trainable(model: GPT) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def matrices_and_vectors(model: GPT) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Trained parameters that are matrices, and the others (norm weights, biases)."""
    ps = trainable(model).values()
    return [p for p in ps if p.dim() >= 2], [p for p in ps if p.dim() < 2]


def make_optimizer(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that config.optimizer names, over the trainable parameters of the model.

    config: optimizer, learning_rate, weight_decay, beta1, beta2, muon_learning_rate, muon_momentum.
    """
    optimizer = OPTIMIZERS[config.optimizer](model, config, device)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def scale_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set every group's learning rate to its share of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
