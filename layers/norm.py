"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): divides a vector by its root mean square; no mean, no bias.

    y = x / sqrt(mean(x^2) + eps) * weight          # the mean over the last dimension, weight is learned

LayerNorm (Ba et al. 2016, arXiv:1607.06450), which GPT-2 has, subtracts the mean first, and may add a bias.

On a GPU torch has one kernel for it. On a CPU autograd would run some ten small operations forward, and as many
backward: there the backward pass is written by hand.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

NORMS = ("rmsnorm", "layernorm")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x (..., D); weight: (D,), or (n_head, D) for a weight per head, x then (..., n_head, D)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        if weight.dim() == 1:
            return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)  # (FSDP gathers weights in half precision)
        return (F.rms_norm(x, x.shape[-1:], eps=eps) * weight).to(x.dtype)
    if torch.is_grad_enabled():
        return RMSNormFunction.apply(x, weight, eps)
    # inference: the overhead of an autograd.Function would cost a seventh of the generation speed
    return (x * inverse_rms(x, eps)).mul_(weight).to(x.dtype)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps), shape (..., 1), in float32 or float64: in float16 the squares overflow."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


class RMSNormFunction(torch.autograd.Function):
    """y = n w with n = x r and r = inverse_rms(x).

    r depends on every component of x, hence the second term: dx = r (w dy - n mean(w dy n)), dw = sum(dy n).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = inverse_rms(x, eps)  # (..., 1)
        ctx.save_for_backward(x, weight, r)  # n is recomputed: one multiplication costs less than storing it
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        n = x * r
        product = dy * n
        dw = product.sum(dim=tuple(range(x.dim() - weight.dim())))  # over batch and time
        mean = product.mul_(weight).mean(dim=-1, keepdim=True)  # mean(w dy n), (..., 1)
        dx = (dy * weight).addcmul_(n, mean, value=-1).mul_(r)
        return dx.to(x.dtype), dw.to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, computed by rms_norm()."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(config: Any) -> nn.Module:
    """The normalisation of the residual stream that a ModelConfig asks for."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.n_embd, eps=config.norm_eps)
