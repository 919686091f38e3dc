"""Learning from a reward that can be checked: group-relative policy optimization (Shao et al. 2024, arXiv:2402.03300).

    python problem.py sort --loss grpo --from_checkpoint checkpoint/problem_sort.pt

For each prompt the model (the policy) samples a group of completions, and each gets a reward for what is right of it.
Its advantage is its reward relative to the mean of its group: no value network is needed, as in PPO, to say what was to
be expected. Tokens of completions with a positive advantage are made likelier, the others less likely. The model never
sees a right answer: what it gets right now and then, it learns to get right always.
"""

import numpy as np
import torch
import torch.nn.functional as F

from base.configuration import UserError
from model import GPT
from problems.config import parse_length
from problems.instances import InstanceSampler
from text.batches import Batch
from text.tokenizer import EOS, PADDING
from training.engine import Engine


def log_probabilities(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """log p of every target (B, T); 0 where the loss mask is 0."""
    return -model(batch.idx, batch.targets, batch.loss_mask, "none", with_logits=False)[1]


def balancing_loss(model: torch.nn.Module) -> torch.Tensor | float:
    """The weighted load-balancing loss of a mixture's last forward pass, also under DDP's and DeepSpeed's wrappers.

    model(..., "sum") includes it, times the targets; a loss that is made of log-probabilities has to add it.
    """
    while hasattr(model, "module"):
        model = model.module
    return model.router_loss


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards (B,), group after group, standardized within their group: (r - mean) / std."""
    groups = rewards.view(-1, group_size)
    spread = groups.std(dim=1, correction=0, keepdim=True)
    # where all completions of a group got the same reward, all advantages are 0: there is nothing to learn from it
    return ((groups - groups.mean(dim=1, keepdim=True)) / (spread + 1e-6)).flatten()


def reward(completions: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Reward (B,) in 0..1 of completions (B, A): half for the share of right tokens, half for an exact match.

    The share alone would pay for answers that are nearly right; an exact match alone is too rare to begin with.
    """
    is_target = answers != PADDING
    right = (completions == answers) | ~is_target
    share = (right & is_target).sum(1) / is_target.sum(1)
    return (share + (completions == answers).all(1)) / 2


class Rollouts:
    """Training batches of the model's own completions of a problem's prompts, judged by their reward."""

    samples_per_epoch = None
    datasets = ()
    is_on_policy = True  # made by the model as it is at that step, so not to be prefetched

    def __init__(self, sampler: InstanceSampler, model: GPT, reference: GPT, engine: Engine) -> None:
        self.sampler, self.model, self.reference, self.engine = sampler, model, reference, engine
        self.config = config = engine.config
        if config.batch_size % config.grpo_group:
            raise UserError(f"batch_size ({config.batch_size}) must be divisible by grpo_group ({config.grpo_group})")
        if engine.shards_parameters:  # every forward pass would need all processes, and they sample different lengths
            raise UserError("loss grpo needs the whole model on every process: not with fsdp or ZeRO stage 3")
        self.lengths = parse_length(sampler.config.train_length)
        self.samples_per_step = config.batch_size * config.gradient_accumulation_steps
        self.kept: tuple[int, list[Batch]] = (-1, [])  # position of the newest rollouts, and their micro-batches
        self.rewards: list[float] = []  # mean rewards of the micro-batches since the last evaluation

    def at(self, position: int) -> list[Batch]:
        """This process's micro-batches of the step; grpo_updates consecutive steps share one set of completions."""
        config, engine = self.config, self.engine
        first = position - position % (self.samples_per_step * config.grpo_updates)
        if self.kept[0] != first:
            micro_steps = range(engine.rank, config.gradient_accumulation_steps, engine.world_size)
            self.kept = first, [self.roll_out(first + step * config.batch_size) for step in micro_steps]
        return self.kept[1]

    def prompts(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of prompts of one length (n, T), and of their answers (n, A), <|eos|> included if causal."""
        n = self.config.batch_size // self.config.grpo_group
        instances = self.sampler.draw(rng, 16 * n, int(rng.choice(self.lengths)), "train")
        prompts, answers = self.sampler.ids(instances.prompt), self.sampler.ids(instances.answer)
        lengths = (prompts != PADDING).sum(axis=1)
        # generation takes prompts of equal length: those as long as the first drawn one, so that every length
        # occurs as often as it is drawn
        alike = np.resize(np.flatnonzero(lengths == lengths[0]), n)
        prompts, answers = prompts[alike, : lengths[alike[0]]], answers[alike]
        if not self.sampler.problem.is_causal:
            return prompts, answers[:, : prompts.shape[1]]
        answers = np.pad(answers, ((0, 0), (0, 1)), constant_values=PADDING)
        answers[np.arange(n), (answers != PADDING).sum(axis=1)] = EOS
        return prompts, answers

    @torch.no_grad()
    def roll_out(self, place: int) -> Batch:
        """Sample a group of completions of every prompt, and their rewards. place: position in the data, the seed."""
        rng = np.random.default_rng([self.config.random_seed, place])
        group, device = self.config.grpo_group, self.engine.device
        prompts, answers = (torch.from_numpy(ids).repeat_interleave(group, 0).to(device) for ids in self.prompts(rng))
        self.model.eval()
        seed = int(rng.integers(1 << 62))
        sample = self.sample if self.sampler.problem.is_causal else self.sample_in_one_pass
        # In the precision of training, and training is without dropout here: before the first update of these
        # completions the ratio p_new / p_old is to be 1, not 1 and noise.
        with self.engine.uncompiled():
            batch, completions = sample(prompts, answers, seed)
            old, reference = log_probabilities(self.model, batch), log_probabilities(self.reference, batch)
        self.model.train()
        rewards = reward(completions, answers)
        self.rewards.append(rewards.mean().item())
        return batch._replace(reference=reference, old=old, advantage=group_advantages(rewards, group))

    def sample(self, prompts: torch.Tensor, answers: torch.Tensor, seed: int) -> tuple[Batch, torch.Tensor]:
        """Completions (B, A), token by token up to <|eos|> or the answer's length, and the batch to learn from."""
        steps = self.model.generate(prompts, answers.size(1), temperature=1.0, stop_tokens=(EOS,), seed=seed)
        completions = torch.stack(list(steps), dim=1)
        completions = F.pad(completions, (0, answers.size(1) - completions.size(1)), value=EOS)
        is_end = (completions == EOS).int()
        mask = is_end.cumsum(1) - is_end == 0  # 1 up to the first <|eos|>, itself included
        completions = completions * mask  # (PADDING is 0)
        whole = torch.cat((prompts, completions), dim=1)
        loss_mask = torch.cat((torch.zeros_like(prompts[:, 1:]), mask), dim=1).float()
        return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), loss_mask, len(whole)), completions

    def sample_in_one_pass(self, prompts: torch.Tensor, answers: torch.Tensor, seed: int) -> tuple[Batch, torch.Tensor]:
        """With full attention one pass gives a distribution at every position, each sampled independently."""
        mask = answers != PADDING
        probabilities = self.model(prompts)[0].float().softmax(-1)
        generator = torch.Generator(prompts.device).manual_seed(seed)
        completions = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view_as(prompts) * mask
        return Batch(prompts, completions, mask.float(), len(prompts)), completions

    def metrics(self) -> dict[str, float]:
        """The mean reward of the completions sampled since the last call, over all processes."""
        total, n = self.engine.sum_over_ranks(sum(self.rewards), float(len(self.rewards)))
        self.rewards = []
        return {"reward": total / n if n else 0.0}


def policy_loss(
    new: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantage: torch.Tensor, clip: float, beta: float
) -> torch.Tensor:
    """The loss of every token (B, T), from log-probabilities (B, T) and advantages (B,).

    PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347): -min(r A, clip(r, 1 - eps, 1 + eps) A) with the
    ratio r = p_new / p_old, plus beta times an unbiased, non-negative estimate of KL(new || reference):
    q - log q - 1 with q = p_reference / p_new (Schulman 2020, "Approximating KL divergence").
    """
    ratio = (new - old).exp()
    advantage = advantage[:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    log_q = reference - new
    return beta * (log_q.exp() - log_q - 1) - surrogate


class PolicyLoss:
    """policy_loss, averaged over each completion's tokens; validation measures the share of wrong answers."""

    def __init__(self, clip: float, beta: float) -> None:
        self.clip, self.beta = clip, beta

    def __call__(self, model: torch.nn.Module, batch: Batch, reduction: str) -> torch.Tensor:
        if reduction == "none":
            predicted = model(batch.idx)[0].argmax(-1)
            right = (predicted == batch.targets) | (batch.loss_mask == 0)
            return 1 - right.all(1, keepdim=True).float()  # (B, 1)
        new = log_probabilities(model, batch)
        losses = policy_loss(new, batch.old, batch.reference, batch.advantage, self.clip, self.beta)
        per_completion = (losses * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)
        return per_completion.sum() + balancing_loss(model) * batch.count
