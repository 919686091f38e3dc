"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), with a backward pass of its own on the CPU.

torch has one kernel for it on GPUs; on a CPU it makes some ten small operations of it, and as many again backward.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension; weight: (D,), or (heads, D)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        if weight.dim() == 1:
            return F.rms_norm(x, weight.shape, weight, eps)
        return (F.rms_norm(x, x.shape[-1:], eps=eps) * weight).to(x.dtype)
    if torch.is_grad_enabled():
        return RMSNormFunction.apply(x, weight, eps)
    return (x * inverse_rms(x, eps)).mul_(weight).to(x.dtype)  # a Function costs a seventh of generation's speed


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps), shape (..., 1), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


class RMSNormFunction(torch.autograd.Function):
    """With n = x r, r the inverse of its root mean square: dx = r (w dy - n mean(w dy n)), dw = sum(dy n)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        n = x * r
        product = dy * n
        dw = product.sum(dim=tuple(range(x.dim() - weight.dim())))
        mean = product.mul_(weight).mean(dim=-1, keepdim=True)
        dx = (dy * weight).addcmul_(n, mean, value=-1).mul_(r)
        return dx.to(x.dtype), dw.to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    """torch's module, by the function above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
