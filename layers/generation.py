"""Autoregressive generation: predict, draw a token, append it, again; GPT.generate() is its front."""

from collections.abc import Callable, Iterator

import torch

from layers.cache import KVCache


@torch.inference_mode()
def generate_tokens(
    model: torch.nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stop_tokens: tuple[int, ...] = (),
    use_cache: bool = True,
) -> Iterator[torch.Tensor]:
    """Continue token ids (B, T): yields tokens (B,), one step at a time; ends when every row drew one of stop_tokens.

    model: a GPT; draw: logits (B, vocab_size) and context (B, T) -> tokens (B,). When the context window is full, the
    newest three quarters of it are kept.
    """
    block_size = model.config.block_size
    context = idx[:, -block_size:]  # (B, up to block_size)
    dtype = model.token_embedding.weight.dtype
    cache = KVCache(model.config, idx.size(0), idx.device, dtype) if use_cache else None
    unread = context  # what the cache has not seen
    stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    stop = torch.tensor(stop_tokens, device=idx.device, dtype=torch.long)
    tokens = context[:, -1]
    for _ in range(max_new_tokens):
        hidden = model.hidden(unread if use_cache else context, cache)
        drawn = draw(model.lm_head(hidden[:, -1]), context)  # only the last position predicts something new
        tokens = torch.where(stopped, tokens, drawn)
        yield tokens
        stopped |= torch.isin(tokens, stop)
        if len(stop_tokens) and stopped.all():
            return
        context = torch.cat((context, tokens[:, None]), dim=1)
        unread = context[:, -1:]
        if context.size(1) > block_size:  # cached keys carry their old positions: read what is kept from 0 again
            context = unread = context[:, -max(1, block_size - block_size // 4) :]
            if use_cache:
                cache.lengths[:] = 0
