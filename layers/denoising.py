"""Generation by a model trained with masked diffusion: all tokens of a block at once, the surest ones first.

    The capital of Zupin is _ _ _ _ _ _ _ _        a block of masks behind the text
    The capital of Zupin is _ _ _ o _ . _ _        a pass predicts all of them: the surest stay
    The capital of Zupin is M _ _ o k . E E        E: the end; nothing follows it

A pass gives every masked position a distribution, from all that stands on both sides of it. The positions whose
distributions are surest (by their largest probability) are drawn and stay; the others are predicted again, now that
more is known (Chang et al. 2022, arXiv:2202.04200; LLaDA, arXiv:2502.09992). Positions that are likeliest to be the end
wait: they are many, and sure, and would take a pass each. A text of several blocks is generated from left to right,
block by block, as far as the end or to the length asked for.

One token a pass is exact: each is drawn from what the model says of it given the others, in an order that does not
depend on what was drawn but on what was seen. (LLaDA compares the probabilities of tokens that are drawn already, which
favours likely ones; at temperature 0 that is the same.) Several tokens a pass are faster, but drawn independently of
each other, although one may decide what the other has to be: "Mira" and "Tolo" can give "Mora".

With full attention there is no cache: every new token changes the keys and values of all the others. A pass costs a
whole text, T tokens; generation of n tokens costs up to n T, where a causal model with a cache reads n. A causal model
that learnt to fill in blocks (training/diffusion.py) has one, of the text before the block: a pass costs the block.
"""

import math
from collections.abc import Callable, Iterator

import torch

from base.configuration import UserError
from layers.cache import KVCache

BLOCK = 32  # tokens
# logits (k, vocab_size), the tokens known so far (k, T), places in the answer (k,) -> tokens (k,)
Draw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.inference_mode()
def denoise(
    model: torch.nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    draw: Draw,
    stop_tokens: tuple[int, ...] = (),
    steps: int | None = None,
    block: int = BLOCK,
    fills_window: bool = True,
    use_cache: bool = True,
) -> Iterator[torch.Tensor]:
    """Continue token ids (1, T): yields, after each pass of the model, the answer so far (n,), up to its end.

    Where nothing is drawn yet the answer has the mask token, vocab_size. steps: passes for a block of tokens; None: one
    for every token. fills_window: of a model with full attention, masks up to the end of the window behind the block,
    as it knows running text; else the text ends with the block, as answers do in fine-tuning. use_cache: of a causal
    one; without, all of the text is read in every pass.
    """
    config, mask_token = model.config, model.config.vocab_size
    stop = torch.tensor(stop_tokens, device=idx.device, dtype=torch.long)
    text, answer = idx[0], idx[0, :0]
    limit = config.block_size + config.is_causal  # of a text and its block: a causal model does not read the last token
    cache = None
    if config.is_causal:  # what a block has in it is taken back until it is full
        cache = KVCache(config, 1, idx.device, model.token_embedding.weight.dtype, spare=block)
    while len(answer) < max_new_tokens:
        if len(text) >= limit:  # the window is full: go on with its newest three quarters
            kept = min(config.block_size - config.block_size // 4, limit - 1)
            text = text[len(text) - kept :]
            if cache is not None:
                cache.lengths[:] = 0
        n = min(block, limit - len(text))
        part = text.new_full((n,), mask_token)
        n_behind = config.block_size - len(text) - n if fills_window and not config.is_causal else 0
        n_steps = min(steps or n, n)
        for step in range(n_steps):
            masked = (part == mask_token).nonzero()[:, 0]  # (m,) places in the block
            if not len(masked):
                break
            if cache is None:
                whole = torch.cat((text, part, text.new_full((n_behind,), mask_token)))
                hidden = model.hidden(whole[None])[0, len(text) :]
            else:
                hidden = block_states(model, text, part, cache, use_cache)
            logits = model.lm_head(hidden[masked])  # (m, vocab_size)
            confidence, likeliest = logits.float().softmax(-1).max(-1)
            # the end last, and its leftmost place first: all places on its right are then known, too
            order = torch.where(torch.isin(likeliest, stop), -1.0 - masked, confidence)
            if cache is not None:  # after them what no other token of the block has seen
                order[masked == n - 1] = -1.0 - n
            most_confident = order.topk(math.ceil(len(masked) / (n_steps - step))).indices
            places, known = masked[most_confident], torch.cat((text, part[part != mask_token]))
            part[places] = draw(logits[most_confident], known.expand(len(places), -1), len(answer) + places)
            ends = torch.isin(part, stop).nonzero()[:, 0]
            if len(ends):
                part[ends[0] :] = part[ends[0]].clone()
            yield torch.cat((answer, part[: ends[0] + 1] if len(ends) else part))
        answer, text = torch.cat((answer, part)), torch.cat((text, part))
        if len(ends):
            return


def block_states(
    model: torch.nn.Module, text: torch.Tensor, part: torch.Tensor, cache: KVCache, use_cache: bool
) -> torch.Tensor:
    """Hidden states (n, n_embd) of a causal model that predict a block (n,) of masked tokens behind a text (T >= 1,).

    Each predicts the token after its own, so the input begins with the text's last token and lacks the block's last.
    The cache keeps the text before it: a pass reads what it does not keep, causal as ever, and the block.
    """
    if not use_cache:
        cache.lengths[:] = 0
    cache.block = n = len(part)
    hidden = model.hidden(torch.cat((text[cache.lengths[0] :], part[:-1]))[None], cache)[0, -n:]
    cache.lengths -= n
    return hidden


def from_the_left(states: Iterator[torch.Tensor], mask_token: int, max_new_tokens: int) -> Iterator[torch.Tensor]:
    """The tokens (1,) of an answer, at most so many, each as soon as all on its left are drawn."""
    n = 0
    for state in states:
        while n < len(state) and state[n] != mask_token:
            n += 1
            yield state[n - 1 : n]
            if n == max_new_tokens:
                return


def check_denoising(idx: torch.Tensor, steps: int | None, block: int) -> None:
    """Raises UserError for what denoise() cannot do."""
    if len(idx) > 1:
        raise UserError("a model of masked diffusion continues one text at a time, shape (1, T)")
    for name, value in {"steps": steps, "block": block}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
