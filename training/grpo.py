"""Learning from a reward that can be checked: group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

    python problem.py sort --loss grpo --from_checkpoint checkpoint/problem_sort.pt

For each prompt the model draws a group of answers. Each is worth what is right of it; its advantage is its reward
against the mean of its group. Tokens of answers with an advantage are made likelier, those of the others less likely.
No answer is ever shown to the model, no second network judges: what it can do now and then, it learns to do always.
"""

import numpy as np
import torch
import torch.nn.functional as F

from base.configuration import UserError
from model import GPT
from problems.instances import Source, parse_length
from text.batches import Batch
from text.tokenizer import EOS, PADDING
from training.engine import Engine


def log_probabilities(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """log p of every target that counts (B, T), else 0."""
    return -model(batch.idx, batch.targets, batch.loss_mask, "none")[1]


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards (B,), group after group, as distances from their group's mean in its standard deviations."""
    groups = rewards.view(-1, group_size)
    spread = groups.std(dim=1, correction=0, keepdim=True)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (spread + 1e-6)).flatten()


def reward(drawn: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """What answers (B, A) are worth, 0 to 1: half for the share of right tokens, half for being right throughout."""
    counts = answers != PADDING
    right = (drawn == answers) | ~counts
    share = (right & counts).sum(1) / counts.sum(1)
    return (share + (drawn == answers).all(1)) / 2


class Rollouts:
    """Training batches made of the model's own answers to a problem's prompts, as it is at that moment."""

    samples_per_epoch = None
    is_live = True  # not to be made ahead

    def __init__(self, source: Source, model: GPT, reference: GPT, engine: Engine) -> None:
        self.source, self.model, self.reference, self.engine = source, model, reference, engine
        self.config = config = source.config
        if config.batch_size % config.grpo_group:
            raise UserError(f"batch_size ({config.batch_size}) must be divisible by grpo_group ({config.grpo_group})")
        self.lengths = parse_length(config.train_length)
        self.samples_per_step = config.batch_size * config.gradient_accumulation_steps
        self.kept: tuple[int, list[Batch]] = (-1, [])
        self.rewards: list[float] = []

    def at(self, position: int) -> list[Batch]:
        """The step's micro-batches; grpo_updates steps in a row learn from the same answers."""
        first = position - position % (self.samples_per_step * self.config.grpo_updates)
        if self.kept[0] != first:
            steps = range(self.config.gradient_accumulation_steps)
            self.kept = first, [self.roll_out(first + step * self.config.batch_size) for step in steps]
        return self.kept[1]

    def prompts(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of prompts of one length (n, T), and of their answers (n, A), with <|eos|> where they are drawn."""
        n = self.config.batch_size // self.config.grpo_group
        instances = self.source.draw(rng, 16 * n, int(rng.choice(self.lengths)), "train")
        prompts, answers = self.source.ids(instances.prompt), self.source.ids(instances.answer)
        lengths = (prompts != PADDING).sum(axis=1)
        alike = np.resize(np.flatnonzero(lengths == lengths[0]), n)  # so that each length comes as often as it is drawn
        prompts, answers = prompts[alike, : lengths[alike[0]]], answers[alike]
        if not self.source.problem.is_causal:
            return prompts, answers[:, : prompts.shape[1]]
        answers = np.pad(answers, ((0, 0), (0, 1)), constant_values=PADDING)
        answers[np.arange(n), (answers != PADDING).sum(axis=1)] = EOS
        return prompts, answers

    @torch.no_grad()
    def roll_out(self, place: int) -> Batch:
        """Draw a group of answers to every prompt, and judge them."""
        rng = np.random.default_rng([self.config.random_seed, place])
        group, device = self.config.grpo_group, self.engine.device
        prompts, answers = (torch.from_numpy(ids).repeat_interleave(group, 0).to(device) for ids in self.prompts(rng))
        self.model.eval()
        seed = int(rng.integers(1 << 62))
        draw = self.draw if self.source.problem.is_causal else self.draw_at_once
        batch, drawn = draw(prompts, answers, seed)
        rewards = reward(drawn, answers)
        self.rewards.append(rewards.mean().item())
        old, reference = log_probabilities(self.model, batch), log_probabilities(self.reference, batch)
        self.model.train()
        return batch._replace(reference=reference, old=old, advantage=group_advantages(rewards, group))

    def draw(self, prompts: torch.Tensor, answers: torch.Tensor, seed: int) -> tuple[Batch, torch.Tensor]:
        """Answers drawn token by token, up to <|eos|> or the right answer's length; and the batch to learn from."""
        steps = self.model.generate(prompts, answers.size(1), temperature=1.0, stop_tokens=(EOS,), seed=seed)
        drawn = torch.stack(list(steps), dim=1)
        drawn = F.pad(drawn, (0, answers.size(1) - drawn.size(1)), value=EOS)
        is_end = (drawn == EOS).int()
        mask = is_end.cumsum(1) - is_end == 0  # up to the first <|eos|>, itself included
        drawn = drawn * mask  # (PADDING is 0)
        whole = torch.cat((prompts, drawn), dim=1)
        loss_mask = torch.cat((torch.zeros_like(prompts[:, 1:]), mask), dim=1).float()
        return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), loss_mask, len(whole)), drawn

    def draw_at_once(self, prompts: torch.Tensor, answers: torch.Tensor, seed: int) -> tuple[Batch, torch.Tensor]:
        """With full attention an answer is one pass: every position of it is drawn for itself."""
        mask = answers != PADDING
        probabilities = self.model(prompts)[0].float().softmax(-1)
        generator = torch.Generator(prompts.device).manual_seed(seed)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view_as(prompts) * mask
        return Batch(prompts, drawn, mask.float(), len(prompts)), drawn

    def figures(self) -> dict[str, float]:
        """The mean reward of the answers drawn since the last call."""
        rewards, self.rewards = self.rewards, []
        return {"reward": float(np.mean(rewards)) if rewards else 0.0}


def policy_loss(
    new: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantage: torch.Tensor, clip: float, beta: float
) -> torch.Tensor:
    """The loss of every token (B, T), of log-probabilities (B, T) and advantages (B,).

    The clipped surrogate of PPO (Schulman et al. 2017, arXiv:1707.06347), and beta times an estimate of the divergence
    from the reference that is never negative: r - log r - 1, with r = p_reference / p.
    """
    ratio = (new - old).exp()
    advantage = advantage[:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    away = reference - new
    return beta * (away.exp() - away - 1) - surrogate


class PolicyLoss:
    """policy_loss, the mean over each answer's tokens; validation measures the share of wrong answers."""

    def __init__(self, clip: float, beta: float) -> None:
        self.clip, self.beta = clip, beta

    def __call__(self, model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
        if reduction == "none":
            said = model(batch.idx)[0].argmax(-1)
            right = (said == batch.targets) | (batch.loss_mask == 0)
            return 1 - right.all(1, keepdim=True).float()
        new = log_probabilities(model, batch)
        losses = policy_loss(new, batch.old, batch.reference, batch.advantage, self.clip, self.beta)
        return ((losses * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)).sum()
