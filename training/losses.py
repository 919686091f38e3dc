"""Training objectives: next token, masked diffusion, distillation, preferences (DPO, IPO, SimPO, ORPO) and GRPO.

    loss = make_loss(config, engine, tokenizer, datasets)       # config.loss names one of LOSSES
    loss(model, batch, "sum")       # for training: a scalar, which the caller divides by the count of the whole step
    loss(model, batch, "none")      # for validation: (B, T), one loss per target; or (B, 1), one per pair or answer

Why a sum: micro-batches hold different numbers of targets, so a mean of their means would not be the mean of the step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from base.configuration import UserError, command_line
from model import GPT
from text.batches import Batch, Pairs, collate_pairs
from text.token_files import describe_images, how_images_are_read
from text.tokenizer import Tokenizer
from training.diffusion import DiffusionLoss
from training.engine import Engine, Loss
from training.grpo import PolicyLoss, balancing_loss, log_probabilities
from weights import lora
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer


def next_token(model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
    """Cross-entropy of the targets in the loss mask: -log p(next token)."""
    inputs = batch.idx, batch.targets, batch.loss_mask, reduction, batch.documents
    return model(*inputs, with_logits=False, images=batch.images)[1]


def load_frozen_model(field: str, path: str, tokenizer: Tokenizer, device: torch.device, block_size: int = 1) -> GPT:
    """The teacher or reference model of the checkpoint that a config field names: evaluation mode, no gradients.

    The checkpoint of an adapter stands for its base model with the adapter merged. block_size: tokens it has to read.
    """
    if not path:
        raise UserError(f"{field} is not set: name a checkpoint with --{field} FILE")
    checkpoint = load_checkpoint(path)
    if load_checkpoint_tokenizer(checkpoint, path).fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"{field}: {path} was trained with a different tokenizer, so its token ids differ; name another {field}, "
            f"or prepare the data for it (`{command_line('data.py', 'FILES', '--tokenizer', path)}`)"
        )
    model = lora.load_merged(checkpoint, path)
    if model.config.block_size < block_size:
        raise UserError(
            f"{field}: the context window of {path} is {model.config.block_size} tokens, the samples have up to "
            f"{block_size}: choose another {field}, or a smaller block_size"
        )
    return model.to(device).eval().requires_grad_(False)


def longest_sample(data: list[Any]) -> int:
    """Tokens that a model reads of the longest sample of some datasets."""
    return max((dataset.block_size for dataset in data), default=1)


# ---------------------------------------------------------------------------------------------------- distillation


class DistillationLoss:
    """Knowledge distillation: match a teacher's distribution besides the data (Hinton et al. 2015, arXiv:1503.02531).

    (1 - weight) cross-entropy + weight T^2 KL(teacher || student), the KL divergence between distributions softened by
    the temperature T. The gradient of the softened KL shrinks as 1 / T^2, which the factor T^2 makes up for. Validation
    measures the cross-entropy alone, so that its loss is comparable with that of other training runs.
    """

    def __init__(self, teacher: GPT, temperature: float, weight: float) -> None:
        self.teacher, self.temperature, self.weight = teacher, temperature, weight

    def __call__(self, model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
        if reduction == "none":
            return next_token(model, batch, reduction)
        inputs = batch.idx, batch.targets, batch.loss_mask, "none", batch.documents
        logits, losses = model(*inputs, images=batch.images)
        cross_entropy = losses.sum()
        with torch.no_grad():
            teacher_logits = self.teacher(batch.idx, documents=batch.documents, images=batch.images)[0]
        T = self.temperature
        kl = F.kl_div(  # kl_div(log q, log p) is KL(p || q): the student's distribution comes first
            (logits.float() / T).log_softmax(-1),
            (teacher_logits.float() / T).log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)  # summed over the vocabulary: one divergence per target, as one cross-entropy
        if batch.loss_mask is not None:
            kl = kl * batch.loss_mask
        learned = (1 - self.weight) * cross_entropy + self.weight * T * T * kl.sum()
        return learned + balancing_loss(model) * batch.count


def check_teacher_images(teacher: GPT, path: str, data: list[Any]) -> None:
    """Raises UserError where the data has images that a teacher does not read as the student does."""
    for file in [dataset.file for dataset in data if dataset.file.images is not None]:
        has, reads = how_images_are_read(file.header), how_images_are_read(teacher.config.to_dict())
        if has != reads:
            sees = f"reads {describe_images(reads)}" if reads["image_size"] else "reads text alone"
            raise UserError(f"teacher: {path} {sees}, and {file.path} has {describe_images(has)}: name another teacher")


def make_distillation(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> DistillationLoss:
    teacher = load_frozen_model("teacher", config.teacher, tokenizer, engine.device, longest_sample(data))
    if not teacher.config.is_causal:
        raise UserError(f"teacher: {config.teacher} has full attention: it sees the next token that it is to teach")
    check_teacher_images(teacher, config.teacher, data)
    teacher.restart_positions = config.restart_positions
    engine.compile(teacher)
    return DistillationLoss(teacher, config.distill_temperature, config.distill_weight)


# ---------------------------------------------------------------------------------------------------- preferences
# All take (pairs,) tensors: log-probabilities of the chosen and the rejected answer, and their margin (see
# PreferenceLoss), and return (pairs,) losses.


def dpo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): -log sigmoid(beta margin).

    Bradley-Terry model: people prefer chosen to rejected with probability sigmoid(difference of rewards). The policy
    that maximises reward - beta KL(policy || reference) has the reward beta log p / p_reference, plus a constant of the
    prompt. Inserted, it gives a loss on the policy itself, without a reward model.
    """
    return -F.logsigmoid(config.dpo_beta * margin)


def ipo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036): regress the margin to 1 / (2 beta).

    DPO's loss falls with every increase of the margin, and so overfits preferences that always go one way.
    """
    return (margin - 1 / (2 * config.dpo_beta)).square()


def simpo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734): no reference; rewards are mean log p per token, target margin gamma.

    The mean per token removes the advantage that a sum gives to short answers.
    """
    return -F.logsigmoid(config.dpo_beta * margin - config.simpo_gamma)


def orpo(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, config: Any) -> torch.Tensor:
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691): -beta log sigmoid(log odds ratio).

    No reference; the cross-entropy of the chosen answer is part of the method (CHOSEN_WEIGHT).
    """
    # log odds = log p - log(1 - p); 1 - exp(log p) by expm1, exact near p = 1
    log_odds = [log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-6))) for log_p in (chosen, rejected)]
    return -config.dpo_beta * F.logsigmoid(log_odds[0] - log_odds[1])


PREFERENCES = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}
NEEDS_REFERENCE = ("dpo", "ipo")  # log p summed over an answer, relative to a reference; the others: mean per token
COMPARES_POLICIES = (*NEEDS_REFERENCE, "grpo")  # ratios of probabilities of two policies: no dropout in either
CHOSEN_WEIGHT = {"dpo": 0.2, "ipo": 0.2, "simpo": 0.2, "orpo": 1.0}  # default weight of the chosen cross-entropy


class PreferenceLoss:
    """Make chosen answers likelier than rejected ones: one of PREFERENCES, plus the cross-entropy of the chosen answer.

    dpo, ipo: margin = log p(chosen) / p(rejected) of the model minus the same of the reference model (frozen, so its
    part is computed once for all pairs). simpo, orpo: log p is the mean per token, without a reference.

    The margin may also grow while both answers become less likely, the rejected one faster. chosen_weight times the
    cross-entropy per token of the chosen answer prevents that (Pang et al. 2024, arXiv:2404.19733).
    """

    def __init__(self, config: Any, sum_over_ranks: Callable[..., list[float]]) -> None:
        """config: loss, dpo_beta, dpo_chosen_weight, simpo_gamma."""
        self.config, self.sum_over_ranks = config, sum_over_ranks
        weight = config.dpo_chosen_weight
        self.chosen_weight = CHOSEN_WEIGHT[config.loss] if weight is None else weight
        self.margins: list[torch.Tensor] = []  # of the pairs evaluated since the last metrics()

    def __call__(self, model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
        per_answer = log_probabilities(model, batch).sum(1)  # (2 pairs,): first the chosen, then the rejected answers
        per_token = per_answer / batch.loss_mask.sum(1).clamp(min=1)  # a dummy batch has no target at all
        needs_reference = self.config.loss in NEEDS_REFERENCE
        chosen, rejected = (per_answer if needs_reference else per_token).chunk(2)  # (pairs,) each
        margin = chosen - rejected - (batch.reference if needs_reference else 0.0)
        losses = PREFERENCES[self.config.loss](margin, chosen, rejected, self.config)
        if reduction == "sum":
            learned = losses.sum() - self.chosen_weight * per_token.chunk(2)[0].sum()
            return learned + balancing_loss(model) * batch.count
        if batch.count:  # 0: a dummy batch of ValidationBatches
            self.margins.append(margin.detach())
        return losses[:, None] * (batch.count > 0)

    def metrics(self) -> dict[str, float]:
        """Of the pairs evaluated since the last call, on all processes: ranking accuracy and mean reward margin.

        The reward margin is beta times the margin: the implicit reward of an answer is beta log p / p_reference.
        """
        margins = torch.cat(self.margins) if self.margins else torch.zeros(0)
        self.margins = []
        right, total, n = self.sum_over_ranks((margins > 0).sum().item(), margins.sum().item(), float(len(margins)))
        return {"preference_accuracy": right / max(1, n), "reward_margin": self.config.dpo_beta * total / max(1, n)}


@torch.no_grad()
def compute_reference_margins(reference: GPT, pairs: Pairs, batch_size: int, engine: Engine) -> None:
    """Store the reference model's log p(chosen) / p(rejected) of every pair in pairs.reference.

    In the precision of training: where policy and reference are the same model, the margin is to be 0.
    """
    for start in range(0, len(pairs), batch_size):
        rows = [pairs.get(i, 0) for i in range(start, min(len(pairs), start + batch_size))]
        batch = collate_pairs(rows, reference.config.block_size, reference.config.vocab_size, 16).to(engine.device)
        with engine.autocast():
            chosen, rejected = log_probabilities(reference, batch).sum(1).chunk(2)
        pairs.reference[start : start + len(rows)] = (chosen - rejected).cpu().numpy()


def make_preference(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> PreferenceLoss:
    if not all(isinstance(dataset, Pairs) for dataset in data):
        raise UserError(
            f"loss {config.loss} needs preference pairs: put jsonl lines with prompt, chosen and rejected into "
            f"dataset/dpo.jsonl, run `{command_line('data.py')}`, then `{command_line('train.py', '-t', 'dpo')}`"
        )
    if config.loss in NEEDS_REFERENCE:
        window = longest_sample(data)
        reference = load_frozen_model("reference", config.reference, tokenizer, engine.device, window)
        for dataset in data:
            compute_reference_margins(reference, dataset, config.batch_size, engine)
    return PreferenceLoss(config, engine.sum_over_ranks)


# ---------------------------------------------------------------------------------------------------- by name


def make_next_token(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> Loss:
    if any(isinstance(dataset, Pairs) for dataset in data):
        raise UserError(
            f"loss {config.loss} cannot train on preference pairs; `{command_line('train.py', '-t', 'dpo')}` can"
        )
    return next_token


def make_diffusion(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> DiffusionLoss:
    return DiffusionLoss(mask_token=tokenizer.vocab_size)


def make_policy(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> PolicyLoss:
    if data:
        trains = command_line("problem.py", "sort", "--loss", "grpo", "--from_checkpoint", "checkpoint/problem_sort.pt")
        raise UserError(f"loss grpo needs answers that can be checked, those of a toy problem: `{trains}`")
    return PolicyLoss(config.grpo_clip, config.grpo_beta)


LOSSES = {
    "next_token": make_next_token,
    "diffusion": make_diffusion,
    "distill": make_distillation,
    **dict.fromkeys(PREFERENCES, make_preference),
    "grpo": make_policy,
}

FIELDS_OF_LOSSES = {  # fields that mean something to some losses only
    "answer_block": ("diffusion",),
    "mask_span": ("diffusion",),
    "teacher": ("distill",),
    "distill_temperature": ("distill",),
    "distill_weight": ("distill",),
    "reference": COMPARES_POLICIES,
    "dpo_beta": (*PREFERENCES,),
    "dpo_chosen_weight": (*PREFERENCES,),
    "simpo_gamma": ("simpo",),
    **dict.fromkeys(("grpo_group", "grpo_updates", "grpo_clip", "grpo_beta"), ("grpo",)),
}

# validation measures the cross-entropy per token, hence perplexity; of diffusion, a bound on it
PER_TOKEN_LOSSES = ("next_token", "distill", "diffusion")


def make_loss(config: Any, engine: Engine, tokenizer: Tokenizer, data: list[Any]) -> Loss:
    """The loss named by config.loss; data: the training and validation datasets (empty if they are generated)."""
    return LOSSES[config.loss](config, engine, tokenizer, data)
