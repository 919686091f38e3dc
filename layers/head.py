"""The output layer: logits, or their loss without ever holding all of them.

The logits of a step are its largest tensor by far where the vocabulary is large: 16 windows of 1,024 tokens over 50,304
tokens take 3.3 GB in float32, and their gradient as much again.
"""

import torch
import torch.nn as nn


def logits_at_once(device: torch.device) -> int:
    """How many logits the loss holds at a time: on a CPU what its caches have room for."""
    return 1 << 22 if device.type == "cpu" else 1 << 26


class Head(nn.Linear):
    """A linear layer from hidden states to logits over the vocabulary."""

    def __init__(self, n_embd: int, vocab_size: int) -> None:
        super().__init__(n_embd, vocab_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, loss_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, T, vocab_size) of hidden states (B, T, n_embd); given targets (B, T), their summed loss instead.

        The cross-entropy in nats of the targets where loss_mask (B, T) is 1; a scalar, whose gradient is made with it.
        """
        if targets is None:
            return super().forward(hidden)
        mask = torch.ones_like(targets) if loss_mask is None else loss_mask
        at_once = max(1, logits_at_once(hidden.device) // len(self.weight))
        return SummedCrossEntropy.apply(hidden.flatten(0, 1), self.weight, targets.flatten(), mask.flatten(), at_once)


class SummedCrossEntropy(torch.autograd.Function):
    """sum(mask * cross_entropy(hidden @ weight.T, targets)), for `at_once` tokens after another.

    The gradient of the logits, softmax less the target, is used as soon as it is there and forgotten (as in Liger
    Kernel, Hsu et al. 2024, arXiv:2410.10989): the same products as ever, in less memory.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, at_once: int
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            h, target, counts = hidden[part], targets[part, None], mask[part, None].to(dtype)
            log_p = (h @ weight.T).to(dtype).log_softmax(-1)  # (at_once, vocab_size)
            total -= (log_p.gather(1, target) * counts).sum()
            if needs_hidden or needs_weight:
                d_logits = log_p.exp_().scatter_add_(1, target, torch.full_like(counts, -1.0)).mul_(counts).to(h.dtype)
            if needs_hidden:
                d_hidden[part] = d_logits @ weight
            if needs_weight:
                d_weight += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if d is None else (d * d_total).to(dtype) for d, dtype in parts), None, None, None
