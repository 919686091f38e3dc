"""Learning by reward: the formulas, the draws, and that it teaches what no answer was shown for."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT, read_log
from processes import newest_log

from problems.config import SHAPE
from text.tokenizer import EOS
from training import grpo
from training.engine import Engine
from training.grpo import PolicyLoss, group_advantages, policy_loss, reward
from training.setup import make_model, problem_config
from training.sources import ToyProblem
from weights.checkpointing import load_checkpoint

EASY = ["sort", "--length", "3", "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--device", "cpu"]
BY_REWARD = [
    "sort",
    "--length",
    "3",
    "--loss",
    "grpo",
    "--from_checkpoint",
    "checkpoint/problem_sort.pt",
    "--device",
    "cpu",
]


@pytest.fixture
def half_trained(work, call):
    assert call("problem.py", *EASY, "--max_steps", "20", "--eval_interval", "20").status == 0
    return work


def test_policy_loss_is_the_formula():
    rng = np.random.default_rng(0)
    new, old, reference = (rng.normal(-1, 0.5, (3, 4)) for _ in range(3))
    advantage = np.array([1.5, -0.7, 0.0])
    found = policy_loss(*map(torch.tensor, (new, old, reference, advantage)), clip=0.2, beta=0.04)
    for b in range(3):
        for t in range(4):
            ratio = math.exp(new[b, t] - old[b, t])
            clipped = min(max(ratio, 0.8), 1.2)
            surrogate = min(ratio * advantage[b], clipped * advantage[b])
            r = math.exp(reference[b, t] - new[b, t])
            assert found[b, t].item() == pytest.approx(0.04 * (r - math.log(r) - 1) - surrogate)


def test_advantages_are_those_of_the_group():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.9, 0.7, 0.7, 0.9]
    found = group_advantages(torch.tensor(rewards), 4)
    assert found.tolist() == pytest.approx([1, -1, -1, 1, 0, 0, 0, 0, 1, -1, -1, 1], abs=1e-4)


def test_rewards_are_for_what_is_right():
    answers = torch.tensor([[5, 6, 3, 0]] * 4)
    drawn = torch.tensor([[5, 6, 3, 0], [5, 7, 3, 0], [7, 7, 7, 7], [5, 6, 3, 8]])
    assert reward(drawn, answers).tolist() == pytest.approx([1, 1 / 3, 0, 0.5])


def rollouts(name: str, **overrides):
    given = {"loss": "grpo", "device": "cpu", "batch_size": 32, "grpo_group": 8, **overrides}
    asked = problem_config(name, given)
    source = ToyProblem(asked.training, asked.settings, None)
    torch.manual_seed(0)
    shape = {**SHAPE, "is_causal": source.problem.is_causal, "block_size": source.sampler.window()}
    model = make_model(asked.training, shape, source.tokenizer)
    return grpo.Rollouts(source.sampler, model, model, Engine(asked.training))


@pytest.mark.parametrize("name", ["sort", "add", "boolean", "parity"])
def test_answers_are_drawn_from_the_model_and_judged(name):
    made = rollouts(name)
    (batch,) = made.at(0)
    assert batch.count == 32 and batch.loss_mask.sum(1).min() >= 1
    with torch.no_grad():  # what was drawn has the probability that the model gives it
        new = grpo.log_probabilities(made.model, batch)
    torch.testing.assert_close(new, batch.old)
    torch.testing.assert_close(batch.reference, batch.old)
    assert (new[batch.loss_mask == 0] == 0).all()
    prompts = batch.idx[:, :3].view(4, 8, 3)
    assert (prompts == prompts[:, :1]).all()  # a group has one prompt
    again = rollouts(name).at(0)[0]
    assert torch.equal(batch.targets, again.targets)
    assert not torch.equal(batch.targets, rollouts(name, random_seed=2).at(0)[0].targets)


def test_prompts_of_every_length_get_their_turn():
    """A batch has one length; over many batches the lengths come as often as among all instances."""
    made = rollouts("boolean", length="2", grpo_group=16)
    drawn = made.sampler.draw(np.random.default_rng(0), 4000, 2, "train").prompt
    expected = np.bincount((drawn > 0).sum(axis=1), minlength=30) / 4000
    lengths = [made.prompts(np.random.default_rng(i))[0].shape[1] for i in range(300)]
    found = np.bincount(lengths, minlength=30) / 300
    assert (expected > 0).sum() > 2
    assert np.abs(found - expected).max() < 0.1  # three standard errors


def test_prompts_are_of_all_lengths_that_are_trained():
    made = rollouts("sort", length="2-4")
    assert {made.prompts(np.random.default_rng(i))[0].shape[1] for i in range(40)} == {2, 3, 4}


@pytest.mark.parametrize("name", ["add", "parity"])
def test_what_is_learnt_of_a_completion_ends_with_its_first_eos(name):
    (batch,) = rollouts(name, length="3").at(0)
    n_ended = 0
    for targets, mask in zip(batch.targets, batch.loss_mask, strict=True):
        learnt = targets[mask == 1].tolist()
        places = mask.nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1)) and EOS not in learnt[:-1]
        n_ended += learnt[-1] == EOS
        assert learnt[-1] == EOS or places[-1] == len(mask) - 1  # it came to the length of the answer
    assert n_ended > 3


def test_the_loss_of_a_completion_is_the_mean_of_its_tokens():
    """A batch of completions of different lengths: each counts alike."""
    made = rollouts("add", length="3")
    (batch,) = made.at(0)
    torch.manual_seed(1)
    batch = batch._replace(old=batch.old + 0.1 * torch.randn_like(batch.old) * batch.loss_mask)
    new = grpo.log_probabilities(made.model, batch)
    losses = policy_loss(new, batch.old, batch.reference, batch.advantage, 0.2, 0.1)
    expected = sum(row[mask == 1].mean() for row, mask in zip(losses, batch.loss_mask, strict=True))
    assert len(set(batch.loss_mask.sum(1).tolist())) > 1
    assert PolicyLoss(0.2, 0.1)(made.model, batch, "sum").item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_reward_is_that_since_the_last_evaluation():
    made = rollouts("sort")
    made.rewards = [0.25, 0.75]
    assert made.metrics() == {"reward": 0.5} and made.metrics() == {"reward": 0.0}


def test_values_on_the_way_are_not_rewarded():
    """What supervision shows at inner brackets counts neither in training nor in validation."""
    sampler = rollouts("boolean").sampler
    examples = sampler.encode(sampler.draw(np.random.default_rng(0), 8, 3, "val"))
    assert torch.equal(examples.batch.loss_mask.bool(), examples.answer_mask)
    assert (examples.answer_mask.sum(1) == 2).all()  # the value and <|eos|>


def test_steps_may_share_their_answers():
    made = rollouts("sort", grpo_updates=2)
    first, second, third = (made.at(i * made.samples_per_step)[0] for i in range(3))
    assert first is second and third is not first


def test_reward_alone_teaches(half_trained, call):
    before = load_checkpoint("checkpoint/problem_sort.pt")
    result = call(
        "problem.py",
        *BY_REWARD,
        "--max_steps",
        "60",
        "--eval_interval",
        "10",
        "--batch_size",
        "256",
        "--learning_rate",
        "0.002",
    )
    assert result.status == 0, result.err
    records = read_log(newest_log(half_trained), "val")
    rewards, accuracies = ([record[name] for record in records] for name in ("reward", "accuracy"))
    assert rewards[-1] > 1.5 * rewards[0] and max(accuracies) > accuracies[0]
    assert records[-1]["val_loss"] == pytest.approx(1 - records[-1]["accuracy"], abs=1e-6)
    after = load_checkpoint("checkpoint/problem_sort_grpo.pt")
    assert after["train_config"]["reference"] == "checkpoint/problem_sort.pt" and before["step"] <= 20


def test_the_preset_is_the_same_by_train_py(half_trained, call):
    """config/grpo.json names sort; of another length here."""
    options = ["--max_steps", "2", "--batch_size", "32", "--device", "cpu"]
    (half_trained / "g.json").write_text((ROOT / "config" / "grpo.json").read_text().replace("{", '{"length": "3",', 1))
    result = call("train.py", "-t", "g.json", *options)
    assert result.status == 0 and result.out.splitlines()[-1] == (
        "to try it: python problem.py sort --checkpoint checkpoint/problem_sort_grpo.pt"
    ), result.err
    assert call("problem.py", *BY_REWARD, *options, "--stage", "direct").status == 0
    one, two = (load_checkpoint(f"checkpoint/{name}_last.pt")["model"] for name in ("problem_sort_grpo", "direct"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_goes_on_as_if_it_had_not_stopped(half_trained, call):
    args = [*BY_REWARD, "--batch_size", "32", "--eval_interval", "100", "--lr_decay_iters", "6"]
    assert call("problem.py", *args, "--max_steps", "6", "--stage", "whole").status == 0
    assert call("problem.py", *args, "--max_steps", "3", "--stage", "parts").status == 0
    resume = ["--stage", "parts", "--from_checkpoint", "checkpoint/parts_last.pt"]
    assert call("problem.py", *args, "--max_steps", "6", *resume).status == 0
    whole, parts = (load_checkpoint(f"checkpoint/{name}_last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        ("problem.py", [*BY_REWARD, "--batch_size", "30"], "batch_size (30) must be divisible by grpo_group (16)"),
        ("problem.py", [*BY_REWARD, "--from_checkpoint", ""], "from_checkpoint is not set"),
        ("problem.py", ["sort", "--loss", "dpo"], "--loss dpo means nothing here"),
        ("train.py", ["-t", "grpo", "--from_checkpoint", "checkpoint/none.pt"], "no such checkpoint"),
        ("train.py", ["-t", "pretrain", "--loss", "grpo"], "no such file"),
    ],
)
def test_mistakes_are_told(half_trained, call, script, argv, words):
    result = call(script, *argv)
    assert result.status == 1 and words in result.err and "Traceback" not in result.err


def test_validation_is_the_share_of_wrong_answers():
    made = rollouts("sort")
    (batch,) = made.at(0)
    said = made.model(batch.idx)[0].argmax(-1)
    batch = batch._replace(targets=torch.where(torch.arange(32)[:, None] < 8, said, (said + 1) % 16))
    losses = PolicyLoss(0.2, 0.01)(made.model, batch, "none")
    assert losses.shape == (32, 1) and losses.sum() == 24
