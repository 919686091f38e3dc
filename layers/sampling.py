"""How the next token is drawn from a model's logits."""

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


def penalise_repetition(logits: torch.Tensor, window: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, vocab_size) with those of tokens in the window (B, T) made less likely (CTRL, arXiv:1909.05858)."""
    if penalty == 1.0:
        return logits
    seen = logits.gather(1, window)
    return logits.scatter(1, window, torch.where(seen > 0, seen / penalty, seen * penalty))


def filter_logits(
    logits: torch.Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> torch.Tensor:
    """Logits (B, vocab_size) with -inf for the tokens that are not to be drawn; the likeliest always stays.

    top_k: only the k likeliest. top_p: the fewest whose probabilities sum to p (arXiv:1904.09751).
    min_p: those at least min_p times as likely as the likeliest (arXiv:2407.01082).
    """
    if top_k is not None and top_k < logits.size(-1):
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of all the likelier ones
        unwanted = (before >= top_p).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(unwanted, -math.inf)
    if min_p is not None and min_p > 0.0:
        threshold = logits.max(-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    return logits
