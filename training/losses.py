"""What training minimises. A loss takes (model, batch, reduction) and gives

"sum"     a scalar, to be divided by what counts in a whole step
"none"    what validation averages: (B, T) per target, or (pairs, 1) for preferences
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from base.configuration import UserError
from model import GPT
from text.batches import Batch, Pairs, collate_pairs
from text.tokenizer import Tokenizer
from training.engine import Engine, Loss
from training.grpo import PolicyLoss, log_probabilities
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model


def next_token(model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
    """Cross-entropy of the targets that count."""
    with_logits = reduction == "none"
    return model(batch.idx, batch.targets, batch.loss_mask, reduction, batch.documents, with_logits)[1]


def load_frozen_model(field: str, path: str, tokenizer: Tokenizer, device: torch.device) -> GPT:
    """Another model to learn from, of a checkpoint that a config field names."""
    if not path:
        raise UserError(f"{field}: which checkpoint? --{field} names it")
    checkpoint = load_checkpoint(path)
    if load_checkpoint_tokenizer(checkpoint, path).fingerprint() != tokenizer.fingerprint():
        raise UserError(f"{field}: {path} has another tokenizer")
    return load_model(checkpoint, path).to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- distillation


class Distillation:
    """Learn a teacher's probabilities beside the text itself (Hinton et al. 2015, arXiv:1503.02531).

    (1 - weight) cross-entropy + weight T^2 KL(teacher || student), both softened by the temperature T. Validation
    measures the cross-entropy alone, so that its loss compares with that of any other training.
    """

    def __init__(self, teacher: GPT, temperature: float, weight: float) -> None:
        self.teacher, self.temperature, self.weight = teacher, temperature, weight

    def __call__(self, model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
        if reduction == "none":
            return next_token(model, batch, reduction)
        logits, hard = model(batch.idx, batch.targets, batch.loss_mask, "sum", batch.documents)
        with torch.no_grad():
            expected = self.teacher.lm_head(self.teacher.hidden(batch.idx, documents=batch.documents))
        T = self.temperature
        divergence = F.kl_div(
            (logits.float() / T).log_softmax(-1),
            (expected.float() / T).log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        if batch.loss_mask is not None:
            divergence = divergence * batch.loss_mask
        return (1 - self.weight) * hard + self.weight * T * T * divergence.sum()


def distillation(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> Distillation:
    teacher = load_frozen_model("teacher", config.teacher, tokenizer, engine.device)
    teacher.restart_positions = config.restart_positions
    return Distillation(teacher, config.distill_temperature, config.distill_weight)


# ---------------------------------------------------------------------------------------------------- preferences


def dpo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """Rafailov et al. 2023 (arXiv:2305.18290): -log sigmoid(beta margin)."""
    return -F.logsigmoid(config.dpo_beta * margin)


def ipo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """Azar et al. 2023 (arXiv:2310.12036): the margin is to be 1 / (2 beta), no more."""
    return (margin - 1 / (2 * config.dpo_beta)).square()


def simpo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """Meng et al. 2024 (arXiv:2405.14734): dpo without a reference; the margin, per token, is to be gamma / beta."""
    return -F.logsigmoid(config.dpo_beta * margin - config.simpo_gamma)


def orpo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """Hong et al. 2024 (arXiv:2403.07691): beta times -log sigmoid of the odds ratio, beside the cross-entropy."""
    log_odds = [p - torch.log(-torch.expm1(p.clamp(max=-1e-6))) for p in (chosen, rejected)]
    return -config.dpo_beta * F.logsigmoid(log_odds[0] - log_odds[1])


PREFERENCES = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}
NEEDS_REFERENCE = ("dpo", "ipo")  # those that measure from a reference; the others take log-probabilities per token
CHOSEN_WEIGHT = {"dpo": 0.2, "ipo": 0.2, "simpo": 0.2, "orpo": 1.0}  # of the chosen answer's own cross-entropy


class Preference:
    """Make chosen answers likelier than rejected ones.

    dpo and ipo measure from a reference model: the margin is log p(chosen) / p(rejected) of the model, less that of the
    reference, which is computed once for all pairs. The implicit reward of an answer is beta log p / p_reference, the
    reward's margin beta times the margin. simpo and orpo take log p per token and no reference. The margin alone may
    also grow while both answers become unlikely; chosen_weight adds the chosen answer's cross-entropy per token, which
    keeps it likely (Pang et al. 2024, arXiv:2404.19733).
    """

    def __init__(self, config: Any, sum_over_ranks: Callable[..., list[float]]) -> None:
        """config: loss, dpo_beta, dpo_chosen_weight, simpo_gamma."""
        self.config, self.sum_over_ranks = config, sum_over_ranks
        given = config.dpo_chosen_weight
        self.chosen_weight = CHOSEN_WEIGHT[config.loss] if given is None else given
        self.evaluated: list[torch.Tensor] = []

    def __call__(self, model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
        per_answer = log_probabilities(model, batch).sum(1)
        per_token = per_answer / batch.loss_mask.sum(1)
        is_referenced = self.config.loss in NEEDS_REFERENCE
        chosen, rejected = (per_answer if is_referenced else per_token).chunk(2)
        margin = chosen - rejected - (batch.reference if is_referenced else 0.0)
        losses = PREFERENCES[self.config.loss](margin, chosen, rejected, self.config)
        if reduction == "sum":
            return losses.sum() - self.chosen_weight * per_token.chunk(2)[0].sum()
        if batch.count:  # (else it only keeps the processes in step)
            self.evaluated.append(margin.detach())
        return losses[:, None] * (batch.count > 0)

    def metrics(self) -> dict[str, float]:
        """Over the last evaluation: the share of pairs that the model ranks right, and the mean reward margin."""
        margins = torch.cat(self.evaluated) if self.evaluated else torch.zeros(0)
        self.evaluated = []
        right, total, n = self.sum_over_ranks((margins > 0).sum().item(), margins.sum().item(), float(len(margins)))
        return {"preference_accuracy": right / max(1, n), "reward_margin": self.config.dpo_beta * total / max(1, n)}


@torch.no_grad()
def compute_reference_margins(reference: GPT, pairs: Pairs, batch_size: int, device: torch.device) -> None:
    """Compute the reference's log p(chosen) / p(rejected) of all pairs, once."""
    for start in range(0, len(pairs), batch_size):
        rows = [pairs.get(i, 0) for i in range(start, min(len(pairs), start + batch_size))]
        batch = collate_pairs(rows, reference.config.block_size, reference.config.vocab_size, 16).to(device)
        chosen, rejected = log_probabilities(reference, batch).sum(1).chunk(2)
        pairs.reference[start : start + len(rows)] = (chosen - rejected).cpu().numpy()


def preference(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> Preference:
    reference = None
    if config.loss in NEEDS_REFERENCE:
        reference = load_frozen_model("reference", config.reference, tokenizer, engine.device)
    for dataset in data:
        if not isinstance(dataset, Pairs):
            raise UserError(f"loss {config.loss} needs pairs: jsonl lines with prompt, chosen and rejected")
        if reference is not None:
            compute_reference_margins(reference, dataset, config.batch_size, engine.device)
    return Preference(config, engine.sum_over_ranks)


def plain(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> Loss:
    if any(isinstance(dataset, Pairs) for dataset in data):
        raise UserError(f"loss {config.loss} cannot use pairs of answers: --loss dpo does")
    return next_token


def policy(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> PolicyLoss:
    if data:
        raise UserError("loss grpo learns from answers that can be checked: python problem.py NAME --loss grpo")
    return PolicyLoss(config.grpo_clip, config.grpo_beta)


LOSSES = {
    "next_token": plain,
    "distill": distillation,
    **dict.fromkeys(PREFERENCES, preference),
    "grpo": policy,
}


PER_TOKEN_LOSSES = ("next_token", "distill")  # those whose validation is the cross-entropy of a text's tokens


def make_loss(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> Loss:
    """The loss that config.loss names; data: the datasets that it will see."""
    return LOSSES[config.loss](config, engine, tokenizer, data)
