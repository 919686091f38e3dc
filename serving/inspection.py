"""A look inside a model at one token: what it attends to, and which experts it is sent to."""

from typing import Any

import torch

from layers.attention_maps import attention_maps
from layers.experts import mixture_layers
from model import GPT


@torch.inference_mode()
def inspect_token(model: GPT, ids: list[int]) -> dict[str, Any]:
    """Of the last of the token ids (T,): attention[layer][head][j], j < T, and experts[layer], {"id", "weight"} each.

    experts: None for a dense model.
    """
    inputs = []
    layers = mixture_layers(model)
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][:, -1])) for layer in layers]
    try:
        idx = torch.tensor([ids], device=model.token_embedding.weight.device)
        maps = attention_maps(model, idx, last_only=True)[:, 0, :, -1]  # (n_layer, n_head, T)
    finally:
        for hook in hooks:
            hook.remove()
    chosen = []
    for layer, x in zip(layers, inputs, strict=True):
        _, experts, gates = layer.route(x)  # (1, k) each
        pairs = sorted(zip(gates[0].tolist(), experts[0].tolist(), strict=True), reverse=True)
        chosen.append([{"id": expert, "weight": weight} for weight, expert in pairs])
    return {"attention": maps.float().tolist(), "experts": chosen or None}
