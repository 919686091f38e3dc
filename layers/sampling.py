"""How the next token is sampled from a model's logits."""

import math

import torch

from base.configuration import UserError


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, repetition_penalty: float
) -> None:
    """Raises UserError for sampling settings that mean nothing."""
    rules = {
        "temperature": (temperature, 0 <= temperature < math.inf, "a number of at least 0"),
        "top_k": (top_k, top_k is None or top_k >= 1, "at least 1"),
        "top_p": (top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        "min_p": (min_p, min_p is None or 0 <= min_p <= 1, "between 0 and 1"),
        "repetition_penalty": (repetition_penalty, 0 < repetition_penalty < math.inf, "above 0"),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise UserError(f"{name} must be {rule}, got {value}")


def check_token_ids(idx: torch.Tensor, vocab_size: int) -> None:
    """Raises UserError unless all token ids are in 0..vocab_size-1."""
    if idx.numel() and not (idx.min() >= 0 and idx.max() < vocab_size):
        low, high = idx.min().item(), idx.max().item()
        raise UserError(f"token ids {low}..{high} are outside the vocabulary 0..{vocab_size - 1}: another tokenizer?")


def sample(
    logits: torch.Tensor,
    context: torch.Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> torch.Tensor:
    """Tokens (B,) drawn from logits (B, vocab_size); context (B, T): the tokens so far, for the repetition penalty."""
    logits = penalise_repetition(logits.float(), context, repetition_penalty)
    if temperature == 0:  # greedy decoding: the limit of a temperature that goes to 0
        return logits.argmax(-1)
    # Below 1 the temperature sharpens the distribution, above 1 it flattens it. The largest logit becomes 0 first: then
    # no temperature, however small, gives inf - inf.
    logits = (logits - logits.max(-1, keepdim=True).values) / max(temperature, torch.finfo(logits.dtype).tiny)
    probabilities = filter_logits(logits, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def penalise_repetition(logits: torch.Tensor, context: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, vocab_size) with those of tokens in the context (B, T) made less likely (CTRL, arXiv:1909.05858)."""
    if penalty == 1.0:
        return logits
    seen = logits.gather(1, context)
    # dividing a negative logit would make its token likelier
    penalised = torch.where(seen > 0, seen / penalty, seen * penalty)
    largest = torch.finfo(logits.dtype).max  # a penalty near 0 gives infinity, and inf - inf is not a number
    return logits.scatter(1, context, penalised.clamp(-largest, largest))


def filter_logits(
    logits: torch.Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> torch.Tensor:
    """Logits (B, vocab_size) with -inf for the tokens that are not to be drawn; the likeliest always stays.

    top_k: only the k likeliest. top_p: the fewest whose probabilities sum to p (nucleus sampling, arXiv:1904.09751).
    min_p: those at least min_p times as likely as the likeliest (arXiv:2407.01082).
    """
    if top_k is not None and top_k < logits.size(-1):
        kept = logits.topk(top_k)  # exactly k, also where several are equally likely
        logits = torch.full_like(logits, -math.inf).scatter(1, kept.indices, kept.values)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens together
        is_outside = before >= max(top_p, torch.finfo(before.dtype).tiny)  # smaller ones are 0 in this dtype
        is_outside = is_outside.scatter(1, order, is_outside)  # back to the vocabulary's order
        logits = logits.masked_fill(is_outside, -math.inf)
    if min_p is not None and min_p > 0.0:
        threshold = logits.max(-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    return logits
