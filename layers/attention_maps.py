"""Which tokens attend to which: the weights that fused attention kernels apply without ever storing them."""

import math

import torch


@torch.no_grad()
def attention_maps(model: torch.nn.Module, idx: torch.Tensor) -> torch.Tensor:
    """Attention weights (n_layer, B, n_head, T, T) of a GPT over token ids (B, T); each row, a query's, sums to 1."""
    inputs: list[tuple] = []  # (x, rope, mask, cache) of every layer
    layers = [block.attention for block in model.blocks]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args)) for layer in layers]
    try:
        model.hidden(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([attention_weights(layer, *args[:3]) for layer, args in zip(layers, inputs, strict=True)])


def attention_weights(
    attention: torch.nn.Module,
    x: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) (B, n_head, T, T) of one attention layer on its input (B, T, n_embd)."""
    config = attention.config
    q, k, _ = attention.project(x, rope)
    k = k.repeat_interleave(config.n_head // config.n_kv_head, dim=1)
    scores = q @ k.mT / math.sqrt(config.head_dim)
    if mask is None and config.is_causal:
        mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1)
