"""Autoregressive generation: predict, draw a token, append it, again."""

import warnings
from collections.abc import Callable, Iterator

import torch

from base.configuration import UserError
from layers.cache import KVCache, keep_newest
from layers.denoising import BLOCK, check_denoising, denoise, from_the_left
from layers.sampling import check_sampling, check_token_ids, sample
from layers.speculative import Drafter, generate_speculatively


def generate(
    model: torch.nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: tuple[int, ...] = (),
    seed: int | None = None,
    use_cache: bool = True,
    step: Callable[[torch.Tensor, KVCache], torch.Tensor] | None = None,
    drafter: Drafter | None = None,
    denoising_steps: int | None = None,
    block: int = BLOCK,
    fills_window: bool = True,
    images: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Continue token ids (B, T >= 1): yields one (B,) tensor of tokens a step.

    temperature 0 is greedy. A row that drew one of stop_tokens repeats it; generation ends when all rows have.
    Past the context window: when it is full, the newest three quarters of its tokens are kept, read again from
    position 0, and generation goes on; of a longer prompt the newest block_size tokens are read, with a warning.
    step: computes logits (1, vocab_size) from one token (1, 1) and the cache in another way, such as a CompiledStep.
    drafter: guesses tokens, for one sequence: the same tokens from fewer passes (layers/speculative.py).
    A model of masked diffusion continues one sequence; denoising_steps, block, fills_window: as of denoise() in
    layers/denoising.py.
    images (N, 3, image_size, image_size): those in the prompt, see GPT.embed(); generation then ends with the window,
    as images that have half slid out of it cannot be read again.
    """
    is_diffusion = model.config.mask_token
    if not model.config.is_causal and not is_diffusion:
        raise UserError("generate() needs causal attention; a model with is_causal: false answers by predict()")
    if idx.dim() != 2 or idx.size(1) == 0:
        raise UserError("generate() needs a prompt of at least one token, shape (B, T)")
    block_size, n_tokens = model.config.block_size, model.config.vocab_size
    check_token_ids((idx if images is None else idx[idx != n_tokens]).cpu(), n_tokens)
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if images is not None:
        if drafter is not None or idx.size(1) > block_size:
            why = "a drafter guesses from text alone" if drafter is not None else f"{idx.size(1)} tokens are too many"
            raise UserError(f"a prompt with images: {why}")
        max_new_tokens = min(max_new_tokens, block_size - idx.size(1) + 1)
    if idx.size(1) > model.config.block_size:
        warnings.warn(
            f"the prompt has {idx.size(1)} tokens; the model reads the newest {model.config.block_size}",
            stacklevel=2,
        )
    if drafter is not None and (idx.size(0) > 1 or step is not None or not use_cache):
        raise UserError("a drafter guesses for one sequence, with a cache and without a compiled step")
    generator = torch.Generator(device=idx.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    settings = temperature, top_k, top_p, min_p, repetition_penalty

    def draw(logits: torch.Tensor, context: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if images is not None:  # patches are no tokens that could be repeated
            context = torch.where(context == n_tokens, context[:, -1:], context)
        return sample(logits, context, generator, *settings)

    if is_diffusion:
        check_denoising(idx, denoising_steps, block)
        if drafter is not None or step is not None:
            raise UserError("a model of masked diffusion has no next token to guess or to compile: leave that out")
        states = denoise(
            *(model, idx[:, -model.config.block_size :], max_new_tokens, draw, stop_tokens),
            *(denoising_steps, block, fills_window, use_cache),
        )
        return from_the_left(states, model.config.vocab_size, max_new_tokens)
    if drafter is not None:
        return generate_speculatively(model, idx, max_new_tokens, draw, generator, drafter, stop_tokens)
    return generate_tokens(model, idx, max_new_tokens, draw, stop_tokens, use_cache, step, images)


@torch.inference_mode()
def generate_tokens(
    model: torch.nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stop_tokens: tuple[int, ...] = (),
    use_cache: bool = True,
    step: Callable[[torch.Tensor, KVCache], torch.Tensor] | None = None,
    images: torch.Tensor | None = None,
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
        if step is not None and unread.size(1) == 1:
            logits = step(unread, cache)
        else:
            seen = images if unread is context or not use_cache else None  # the first pass reads them, into the cache
            hidden = model.hidden(unread if use_cache else context, cache, images=seen)
            logits = model.lm_head(hidden[:, -1])  # only the last position predicts something new
        drawn = draw(logits, context)
        tokens = torch.where(stopped, tokens, drawn)
        yield tokens
        stopped |= torch.isin(tokens, stop)
        if len(stop_tokens) and stopped.all():
            return
        context = torch.cat((context, tokens[:, None]), dim=1)
        unread = context[:, -1:]
        if context.size(1) > block_size:
            context = unread = keep_newest(context, block_size)
            if use_cache:
                cache.lengths[:] = 0
