"""Which tokens attend to which: the weights that fused attention kernels apply without ever storing them."""

import math

import torch

from base.configuration import UserError


@torch.no_grad()
def attention_maps(
    model: torch.nn.Module, idx: torch.Tensor, last_only: bool = False, images: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention weights (n_layer, B, n_head, T, T) of a GPT over token ids (B, T); each row, a query's, sums to 1.

    last_only: the weights of the last token alone, (n_layer, B, n_head, 1, T). images: as of GPT.embed().
    """
    if any(attention.IS_RECURRENT for attention in model.config.attention_classes):
        raise UserError(
            f"attention {','.join(model.config.attention)}: a linear layer has no attention weights to show"
        )
    inputs: list[tuple] = []  # (x, rope, mask, cache) of every layer
    layers = [block.attention for block in model.blocks]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args)) for layer in layers]
    try:
        model.hidden(idx, images=images)
    finally:
        for hook in hooks:
            hook.remove()
    layer_inputs = zip(layers, inputs, strict=True)
    return torch.stack([attention_weights(layer, *args[:3], last_only=last_only) for layer, args in layer_inputs])


def attention_weights(
    attention: torch.nn.Module,
    x: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor | None,
    last_only: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) (B, n_head, T, T) of one attention layer on its input (B, T, n_embd)."""
    config = attention.config
    q, k, _ = attention.project(x, rope)
    mask = attention.visible(q, k, mask)
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    if mask is None and config.is_causal:
        T = x.size(1)
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    queries = slice(-1 if last_only else 0, None)
    scores = q[:, :, queries] @ k.mT / math.sqrt(config.head_dim)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., queries, :], -math.inf)
    return scores.softmax(-1)
