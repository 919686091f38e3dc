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

There is no cache: with full attention every new token changes the keys and values of all the others. A pass costs a
whole text, T tokens; generation of n tokens costs up to n T, where a causal model with a cache reads n.
"""

import math
from collections.abc import Callable, Iterator

import torch

from base.configuration import UserError

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
) -> Iterator[torch.Tensor]:
    """Continue token ids (1, T): yields, after each pass of the model, the answer so far (n,), up to its end.

    Where nothing is drawn yet the answer has the mask token, vocab_size. steps: passes for a block of tokens; None: one
    for every token. fills_window: behind the block, masks up to the end of the window, as a model that was trained on
    running text knows it; else the text ends with the block, as answers do in fine-tuning.
    """
    block_size, mask_token = model.config.block_size, model.config.vocab_size
    stop = torch.tensor(stop_tokens, device=idx.device, dtype=torch.long)
    text, answer = idx[0], idx[0, :0]
    while len(answer) < max_new_tokens:
        if len(text) >= block_size:  # the window is full: go on with its newest three quarters
            text = text[-(block_size - block_size // 4) :] if block_size > 1 else text[:0]
        start, n = len(text), min(block, block_size - len(text))
        n_masks = block_size - start if fills_window else n
        text = torch.cat((text, text.new_full((n_masks,), mask_token)))
        part = text[start : start + n]  # a view: what is written here stands in the text
        n_steps = min(steps or n, n)
        for step in range(n_steps):
            masked = (part == mask_token).nonzero()[:, 0]  # (m,) places in the block
            if not len(masked):
                break
            logits = model.lm_head(model.hidden(text[None])[0, start + masked])  # (m, vocab_size)
            sureness, likeliest = logits.float().softmax(-1).max(-1)
            # the end last, and its leftmost place first: all places on its right are then known, too
            order = torch.where(torch.isin(likeliest, stop), -1.0 - masked, sureness)
            surest = order.topk(math.ceil(len(masked) / (n_steps - step))).indices
            places, known = masked[surest], text[text != mask_token]
            part[places] = draw(logits[surest], known.expand(len(places), -1), len(answer) + places)
            ends = torch.isin(part, stop).nonzero()[:, 0]
            if len(ends):
                part[ends[0] :] = part[ends[0]].clone()
            yield torch.cat((answer, part[: ends[0] + 1] if len(ends) else part))
        answer, text = torch.cat((answer, part)), text[: start + n]
        if len(ends):
            return


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
