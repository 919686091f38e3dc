"""The output layer (language-model head): logits, or the cross-entropy loss without storing all logits.

    logits = head(hidden)                           # (B, T, vocab_size)
    loss = head(hidden, targets, loss_mask)         # a scalar, the sum over the targets in the loss
    losses = head(hidden, targets, loss_mask, "none")       # (B, T), one per target

With a large vocabulary the logits are by far the largest tensor of a training step: 16 sequences of 1,024 tokens over a
vocabulary of 50,304 take 3.3 GB in float32, and their gradient as much again. The loss needs them chunk by chunk only.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F


def logits_per_chunk(device: torch.device) -> int:
    """Number of logits (tokens x vocab_size) that the chunked loss stores at a time.

    On a CPU they fit its cache; on a GPU they are a 64th of its memory in half precision, or 134 MB on a small one.
    """
    if device.type == "cpu":
        return 1 << 22
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(1 << 26, memory >> 7)


class Head(nn.Linear):
    """A linear layer without bias from hidden states to logits over the vocabulary."""

    def __init__(self, n_embd: int, vocab_size: int) -> None:
        super().__init__(n_embd, vocab_size, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        reduction: str = "sum",
    ) -> torch.Tensor:
        """Logits (B, T, vocab_size) of hidden states (B, T, n_embd); given targets (B, T), their loss instead.

        The loss is the cross-entropy in nats: a scalar, summed over the targets where loss_mask (B, T) is 1; or, with
        reduction "none", (B, T), 0 where the mask is 0.
        """
        if targets is None:
            return super().forward(hidden)
        if reduction == "none":
            losses = losses_by_chunks(hidden.flatten(0, 1), self.weight, targets.flatten()).view_as(targets)
            return losses if loss_mask is None else losses * loss_mask
        mask = torch.ones_like(targets) if loss_mask is None else loss_mask
        hidden, targets, mask = hidden.flatten(0, 1), targets.flatten(), mask.flatten()  # (N, n_embd), (N,), (N,)
        if loss_mask is not None and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            # in fine-tuning half of the targets are not in the loss, and need no logits; a GPU would have to be waited
            # for until it has counted them
            in_loss = mask.nonzero().squeeze(1)
            hidden, targets, mask = (x.index_select(0, in_loss) for x in (hidden, targets, mask))
        if matmul_dtype(hidden) == torch.float16:
            # float16 needs GradScaler's factor before the gradient of the logits is rounded, or the entries of rare
            # tokens underflow to 0. The factor comes with the backward pass, so the gradient cannot be made before it.
            losses = F.cross_entropy(super().forward(hidden).float(), targets, reduction="none")
            return (losses * mask).sum()
        chunk_size = max(1, logits_per_chunk(hidden.device) // len(self.weight))  # in tokens
        arguments = hidden, self.weight, targets, mask, chunk_size
        if torch.compiler.is_compiling():  # as one operation: traced, the loop would be fixed to one number of tokens
            return chunked_cross_entropy(*arguments, matmul_dtype(hidden))[0]
        return ChunkedCrossEntropy.apply(*arguments)


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision of matrix products with x: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def log_probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, chunk_size: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """log_softmax(hidden @ weight.T), chunk_size tokens at a time: where in N, (chunk_size, vocab_size), no gradients.

    Every chunk is in the memory of the one before. Allocated anew, each would make a process larger: malloc (glibc's)
    seldom has room for an aligned block where one of the same size was freed.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)  # a softmax needs more than half precision
    logits = torch.empty(min(chunk_size, len(hidden)), len(weight), dtype=matmul_dtype(hidden), device=hidden.device)
    log_p = torch.empty_like(logits, dtype=dtype)
    hidden, weight = hidden.to(logits.dtype), weight.to(logits.dtype)  # autocast leaves products with out= alone
    for start in range(0, len(hidden), chunk_size):
        chunk = slice(start, start + chunk_size)
        n = len(hidden[chunk])  # the last one may be shorter
        torch.mm(hidden[chunk], weight.T, out=logits[:n])
        yield chunk, torch.log_softmax(logits[:n], -1, dtype, out=log_p[:n])


def losses_by_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of every target, (N,), of hidden (N, n_embd).

    Without gradients, one chunk of logits exists at a time; with them, autograd keeps the log-probabilities of all.
    """
    if torch.compiler.is_compiling():  # traced, the loop would be fixed to one number of tokens
        # (not as a decorator: that imports the compiler, which takes a second, where nothing is compiled, too)
        return torch.compiler.disable(losses_by_chunks)(hidden, weight, targets)
    chunk_size = max(1, logits_per_chunk(hidden.device) // len(weight))  # in tokens
    if not torch.is_grad_enabled():
        chunks = log_probabilities(hidden, weight, chunk_size)
        return torch.cat([-log_p.gather(1, targets[chunk, None]).squeeze(1) for chunk, log_p in chunks])
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.cat([F.cross_entropy(F.linear(h, weight).float(), t, reduction="none") for h, t in chunks])


def loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    chunk_size: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """sum(mask * cross_entropy(hidden @ weight.T, targets)) and its gradients, chunk_size tokens at a time.

    hidden (N, n_embd), weight (vocab_size, n_embd), targets and mask (N,) with N = B T. The backward pass needs the
    gradient of the logits, softmax(logits) - one_hot(target), which is cheapest to compute while the logits exist. So
    the gradients of hidden and weight are computed with the loss, then the chunk is discarded, as does Liger Kernel
    (Hsu et al. 2024, arXiv:2410.10989). The matrix products stay the same; only memory is saved.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)  # sums need more than half precision
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if needs_hidden else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
    product = torch.empty_like(weight, dtype=matmul_dtype(hidden)) if needs_weight else None  # a chunk's share of it
    for chunk, log_p in log_probabilities(hidden, weight, chunk_size):
        h, target, m = hidden[chunk], targets[chunk, None], mask[chunk, None].to(dtype)  # m: (chunk_size, 1)
        total -= (log_p.gather(1, target) * m).sum()
        if needs_hidden or needs_weight:  # in place: p - one_hot(target), 0 where the mask is 0
            d_logits = log_p.exp_().scatter_add_(1, target, torch.full_like(m, -1.0)).mul_(m).to(matmul_dtype(h))
        if needs_hidden:
            d_hidden[chunk] = d_logits @ weight
        if needs_weight:
            d_weight += torch.mm(d_logits.T, h.to(d_logits.dtype), out=product)
    return total, d_hidden, d_weight


def loss_and_gradients_compiled(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss_and_gradients() for a GPU: the softmax and its gradient as one compiled pass over the logits, in place.

    As separate operations they read and write the logits some ten times, which takes longer than all three products.
    """
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=total.dtype)
    half_hidden, half_weight = (x.to(matmul_dtype(hidden)) for x in (hidden, weight))
    n_chunks = math.ceil(len(hidden) / chunk_size)  # of equal sizes: what is compiled for one fits all
    chunks = (x.chunk(n_chunks) for x in (half_hidden, targets, mask.to(total.dtype), d_hidden))
    for h, target, m, d_h in zip(*chunks, strict=True):
        logits = h @ half_weight.T
        total += compiled_softmax_gradient()(logits, target, m)
        d_h.copy_(logits @ half_weight)
        d_weight += logits.T @ h
    return total, d_hidden, d_weight


def softmax_gradient(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss of logits (N, vocab_size), summed where mask (N,) is 1; puts its gradient in their place."""
    log_p = torch.log_softmax(logits, -1, mask.dtype)
    is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
    loss = -(log_p.gather(1, targets[:, None]).squeeze(1) * mask).sum()
    logits.copy_((log_p.exp() - is_target.to(mask.dtype)) * mask[:, None])
    return loss


@functools.cache
def compiled_softmax_gradient() -> Callable:
    return torch.compile(softmax_gradient)  # (not at import, where it would take a second)


class ChunkedCrossEntropy(torch.autograd.Function):
    """loss_and_gradients() as a function that autograd knows."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, chunk_size: int
    ) -> torch.Tensor:
        needs = ctx.needs_input_grad[:2]
        total, d_hidden, d_weight = loss_and_gradients(hidden, weight, targets, mask, chunk_size, *needs)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The stored gradients times that of the sum: the chain rule, since the sum is a scalar."""
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * d_total).to(dtype) for g, dtype in gradients), None, None, None


@torch.library.custom_op("nano::chunked_cross_entropy", mutates_args=())
def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss_and_gradients() as one operation of a compiled graph; dtype: of the matrix products."""
    with torch.autocast(hidden.device.type, dtype, enabled=dtype != hidden.dtype):
        if hidden.is_cuda:
            return loss_and_gradients_compiled(hidden, weight, targets, mask, chunk_size)
        return loss_and_gradients(hidden, weight, targets, mask, chunk_size, True, True)


@chunked_cross_entropy.register_fake
def _(hidden, weight, targets, mask, chunk_size, dtype):
    full = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=full), torch.empty_like(hidden), torch.empty_like(weight, dtype=full)


def save_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def use_gradients(ctx, d_total, *_):
    (d_hidden, d_weight), (hidden_dtype, weight_dtype) = ctx.saved_tensors, ctx.dtypes
    return (d_hidden * d_total).to(hidden_dtype), (d_weight * d_total).to(weight_dtype), None, None, None, None


chunked_cross_entropy.register_autograd(use_gradients, setup_context=save_gradients)
