"""Distillation and preferences: against formulas written out, and by what is learnt."""

import itertools
import math
import random

import pytest
import torch
from conftest import FAST, TINY, make_text, read_log, write_jsonl
from processes import newest_log, train_on
from test_inference import CHARACTERS, save_model

from base.configuration import UserError
from model import GPT, ModelConfig
from serving.text_generator import GenerationConfig, load_text_generator
from text.batches import TrainBatches, ValidationBatches
from text.token_files import TokenFile
from text.tokenizer import CharTokenizer
from training import losses
from training.config import TrainConfig
from training.engine import Engine
from training.losses import DistillationLoss, PreferenceLoss
from weights.checkpointing import load_checkpoint

FAST_PAIRS = [*FAST, "--gradient_accumulation_steps", "1", "--optimizer", "adamw", "--eval_iters", "0"]


def make_pairs(n: int = 60, seed: int = 0) -> list[dict]:
    """A polite answer is to be chosen; which of two ways of asking comes first says nothing."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        word = "".join(rng.choice("abcdef") for _ in range(4))
        rows.append({"prompt": f"say {word} {i % 10}", "chosen": f"yes {word}", "rejected": f"no {word}"})
    return rows


@pytest.fixture
def pairs(work, call):
    """Prepared pairs, and a model fine-tuned on both kinds of answers alike."""
    (work / "dataset").mkdir()
    rows = make_pairs()
    write_jsonl(work / "dataset" / "dpo.jsonl", rows)
    both = [{"question": row["prompt"], "answer": row[kind]} for row in rows for kind in ("chosen", "rejected")]
    write_jsonl(work / "dataset" / "sft.jsonl", both)
    (work / "dataset" / "pretrain.txt").write_text(make_text(3000), encoding="utf-8")
    assert call("data.py", "--block_size", "32").status == 0
    shape = [*TINY, "--block_size", "32", "--n_embd", "32"]
    args = ["-t", "sft", "--from_checkpoint", "", *shape, *FAST, "--max_steps", "60", "--learning_rate", "0.01"]
    assert call("train.py", *args, "--optimizer", "adamw").status == 0
    return work


def share_of_polite_answers(checkpoint: str) -> float:
    """Of drawn answers to new prompts."""
    generator = load_text_generator(checkpoint, "cpu", True, [])
    prompts = [row["prompt"] for row in make_pairs(40, seed=1)]
    settings = [GenerationConfig(max_length=32, temperature=1.0, seed=i) for i in range(40)]
    answers = ["".join(itertools.islice(generator.answer(*asked), 3)) for asked in zip(prompts, settings, strict=True)]
    return sum(answer.startswith("yes") for answer in answers) / len(answers)


def small_model(vocab_size: int, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(ModelConfig(vocab_size=vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16))
    return model.eval()


def by_hand(model: GPT, tokens: list[int], mask: list[int]) -> float:
    """log p of the tokens that count, one at a time, in float64."""
    probabilities = model(torch.tensor([tokens]))[0][0].double().softmax(-1)
    return sum(math.log(probabilities[t - 1, tokens[t]].item()) for t in range(1, len(tokens)) if mask[t])


def margin_by_hand(kind: str, w: list[float], l: list[float], lengths: tuple[int, int]) -> float:  # noqa: E741
    """log p of the chosen minus that of the rejected answer; relative to the reference, or per token without one."""
    if kind in ("dpo", "ipo"):
        return (w[0] - w[1]) - (l[0] - l[1])
    return w[0] / lengths[0] - l[0] / lengths[1]


def loss_by_hand(kind: str, w: list[float], l: list[float], lengths: tuple[int, int]) -> float:  # noqa: E741
    """Of log p of the chosen and the rejected answer, by the model and by the reference; beta 0.3, gamma 0.7."""
    ratio = (w[0] - w[1]) - (l[0] - l[1])  # as in TRL: policy minus reference, chosen minus rejected
    if kind == "dpo":
        return math.log(1 + math.exp(-0.3 * ratio))
    if kind == "ipo":
        return (ratio - 1 / 0.6) ** 2
    per_token = [w[0] / lengths[0], l[0] / lengths[1]]
    if kind == "simpo":
        return math.log(1 + math.exp(0.7 - 0.3 * (per_token[0] - per_token[1])))
    odds = [math.exp(p) / (1 - math.exp(p)) for p in per_token]
    return 0.3 * math.log(1 + odds[1] / odds[0])  # -log sigmoid(log(a / b)) = log(1 + b / a)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo"])
def test_preference_loss_is_the_formula(pairs, kind):
    file = TokenFile("dataset/dpo_train.bin")
    options = {"block_size": 32, "vocab_size": file.header["vocab_size"], "batch_size": 5, "seed": 1}
    batches = TrainBatches([file], accumulation_steps=1, **options)
    model, reference = (small_model(file.header["vocab_size"], seed) for seed in (0, 1))
    losses.compute_reference_margins(reference, batches.datasets[0], 7, Engine(TrainConfig(device="cpu")))
    (batch,) = batches.at(0)
    total, margins = 0.0, []
    for chosen, rejected, _ in (batches.sample(i) for i in range(5)):
        w, l = ([by_hand(m, t.tolist(), k.tolist()) for m in (model, reference)] for t, k in (chosen, rejected))  # noqa: E741
        lengths = chosen[1].sum(), rejected[1].sum()
        total += loss_by_hand(kind, w, l, lengths)
        margins.append(margin_by_hand(kind, w, l, lengths))
    config = TrainConfig(loss=kind, dpo_beta=0.3, dpo_chosen_weight=0.5, simpo_gamma=0.7)
    loss = PreferenceLoss(config, lambda *values: list(values))
    rows = [batches.sample(i).chosen for i in range(5)]
    likely = sum(by_hand(model, tokens.tolist(), mask.tolist()) / mask.sum() for tokens, mask in rows)
    assert loss(model, batch, "sum").item() == pytest.approx(total - 0.5 * likely, rel=1e-4)
    assert loss(model, batch, "none").sum().item() == pytest.approx(total, rel=1e-4) and batch.count == 5
    found = loss.metrics()
    assert found["preference_accuracy"] == sum(margin > 0 for margin in margins) / 5
    assert found["reward_margin"] == pytest.approx(0.3 * sum(margins) / 5, rel=1e-3)  # beta times the margin
    assert loss.metrics() == {"preference_accuracy": 0, "reward_margin": 0}  # of none since then


@pytest.mark.parametrize(("kind", "weight"), [("dpo", 0.2), ("ipo", 0.2), ("simpo", 0.2), ("orpo", 1.0)])
def test_the_chosen_answers_default_weight_is_the_documented_one(kind, weight):
    idx, targets = torch.randint(1, 20, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    batch = losses.Batch(idx, targets, torch.ones(4, 8), 2, reference=torch.zeros(2))
    values = []
    for given in (None, weight):
        config = TrainConfig(loss=kind, dpo_chosen_weight=given)
        values.append(PreferenceLoss(config, lambda *values: list(values))(small_model(20), batch, "sum").item())
    assert values[0] == values[1]


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_a_batch_that_only_keeps_processes_in_step_is_no_pair(kind):
    idx, targets = torch.randint(1, 20, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    batch = losses.Batch(idx, targets, torch.ones(4, 8), 2, reference=torch.tensor([3.0, -5.0]))
    dummy = batch._replace(loss_mask=torch.zeros(4, 8), count=0)
    found = []
    for batches in ([batch], [batch, dummy]):
        loss = PreferenceLoss(TrainConfig(loss=kind), lambda *values: list(values))
        summed = [loss(small_model(20), each, "none").sum().item() for each in batches]
        found.append(loss.metrics())
    assert found[0] == found[1] and summed[1] == 0


def test_a_frozen_model_neither_drops_nor_learns_and_reads_the_same_tokens(work):
    save_model(work / "m.pt")
    contents = torch.load("m.pt", weights_only=True)
    torch.save({**contents, "model_config": {**contents["model_config"], "dropout": 0.5}}, "m.pt")
    tokenizer = CharTokenizer(CHARACTERS)
    model = losses.load_frozen_model("teacher", "m.pt", tokenizer, torch.device("cpu"))
    idx = torch.randint(0, tokenizer.vocab_size, (2, 32))
    logits = model(idx)[0]
    assert torch.equal(model(idx)[0], logits) and not logits.requires_grad
    other = CharTokenizer(CHARACTERS[::-1])  # as many, in another order
    with pytest.raises(UserError, match="trained with a different tokenizer"):
        losses.load_frozen_model("teacher", "m.pt", other, torch.device("cpu"))


@pytest.mark.parametrize("value", [True, False])
def test_a_teachers_positions_restart_as_the_students_do(monkeypatch, value):
    monkeypatch.setattr(losses, "load_frozen_model", lambda *_: small_model(20))
    settings = TrainConfig(loss="distill", teacher="m.pt", restart_positions=value)
    engine = Engine(TrainConfig(device="cpu"))
    assert losses.make_loss(settings, engine, None, []).teacher.restart_positions == value


@pytest.mark.parametrize(("kind", "beta"), [("dpo", "0.3"), ("simpo", "2"), ("orpo", "0.5")])
def test_preferences_are_learnt_on_pairs_never_seen(pairs, call, kind, beta):
    args = ["-t", "dpo", *FAST_PAIRS, "--batch_size", "16", "--max_steps", "60", "--eval_interval", "20"]
    result = call("train.py", *args, "--learning_rate", "0.003", "--loss", kind, "--dpo_beta", beta)
    assert result.status == 0, result.err
    records = read_log(newest_log(pairs), "val")
    assert records[-1]["preference_accuracy"] >= 0.9 and records[-1]["reward_margin"] > 0.1
    if kind == "dpo":
        assert records[-1]["val_loss"] < math.log(2)  # that of no preference
    before, after = (share_of_polite_answers(f"checkpoint/{name}.pt") for name in ("sft", "dpo"))
    assert after >= 0.9 > 0.8 > before, (before, after)


def test_a_preference_run_goes_on_from_the_same_reference(pairs, call):
    data = ["--dataset_path", '[["dataset/dpo_train.bin", "dataset/dpo_val.bin"]]']
    args = ["-t", "dpo", *FAST_PAIRS, *data, "--lr_decay_iters", "6", "--eval_interval", "3"]
    assert call("train.py", *args, "--max_steps", "6", "--stage", "whole").status == 0
    assert call("train.py", *args, "--max_steps", "3", "--stage", "parts").status == 0
    resume = ["--stage", "parts", "--from_checkpoint", "checkpoint/parts_last.pt"]
    assert call("train.py", *args, "--max_steps", "6", *resume).status == 0
    whole, parts = (load_checkpoint(f"checkpoint/{name}_last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert whole["train_config"]["reference"] == parts["train_config"]["reference"] == "checkpoint/sft.pt"


def test_losses_of_another_beta_are_not_compared(pairs, call):
    args = ["-t", "dpo", *FAST_PAIRS, "--eval_interval", "1"]
    assert call("train.py", *args, "--max_steps", "1").status == 0
    resume = ["--from_checkpoint", "checkpoint/dpo_last.pt", "--max_steps", "2"]
    result = call("train.py", *args, *resume, "--dpo_beta", "0.7")
    assert result.status == 0 and "measured otherwise (dpo_beta 0.1 -> 0.7)" in result.out


def test_preferences_on_two_processes_are_those_of_one(pairs, call):
    args = ["-t", "dpo", *FAST_PAIRS, "--gradient_accumulation_steps", "2", "--max_steps", "4", "--eval_interval", "2"]
    assert call("train.py", *args).status == 0
    one = read_log(newest_log(pairs), "val")
    train_on(2, pairs, *args)
    for record, other in zip(one, read_log(newest_log(pairs), "val"), strict=True):
        for field in ("val_loss", "preference_accuracy", "reward_margin"):
            assert other[field] == pytest.approx(record[field], rel=1e-4, abs=1e-5)


def test_every_pair_is_evaluated_once(pairs):
    file = TokenFile("dataset/dpo_val.bin")
    options = {"block_size": 32, "vocab_size": file.header["vocab_size"], "batch_size": 4, "seed": 1, "world_size": 3}
    counted = sum(
        batch.count for rank in range(3) for batch in ValidationBatches([file], n_samples=0, rank=rank, **options)
    )
    assert counted == (len(file.starts) - 1) // 2


def test_distillation_is_the_formula():
    student, teacher = small_model(20, 0), small_model(20, 1)
    for model in (student, teacher):  # far from uniform: near it the divergence is the same in both directions
        model.token_embedding.weight.data.mul_(40)
    idx, targets = torch.randint(0, 20, (2, 2, 8))
    mask = torch.tensor([[1.0] * 8, [0.0] * 5 + [1.0] * 3])
    batch = losses.Batch(idx, targets, mask, 11)
    expected = 0.0
    for b in range(2):
        p, q = (m(idx)[0][b].double() for m in (student, teacher))
        for t in range(8):
            if mask[b, t]:
                soft_p, soft_q = (p[t] / 3).softmax(-1), (q[t] / 3).softmax(-1)
                divergence = sum(soft_q[i] * (soft_q[i] / soft_p[i]).log() for i in range(20))
                expected += 0.25 * -p[t].log_softmax(-1)[targets[b, t]] + 0.75 * 9 * divergence
    loss = DistillationLoss(teacher, 3.0, 0.75)
    torch.testing.assert_close(loss(student, batch, "sum").double(), expected, rtol=1e-4, atol=1e-5)
    plain = losses.next_token(student, batch, "none")
    assert torch.equal(loss(student, batch, "none"), plain)


def test_a_student_comes_nearer_to_its_teacher(pairs, call):
    """The teacher's probabilities alone (weight 1): the student ends near it where the data alone would not lead."""
    data = ["--dataset_path", '[["dataset/pretrain_train.bin", "dataset/pretrain_val.bin"]]']
    base = [*FAST, *TINY, *data, "--eval_iters", "0", "--learning_rate", "0.01", "--optimizer", "adamw"]
    assert call("train.py", "-t", "pretrain", *base, "--max_steps", "60", "--stage", "teacher").status == 0
    args = ["-t", "distill", *base, "--teacher", "checkpoint/teacher.pt", "--max_steps", "60", "--warmup_iters", "2"]
    assert call("train.py", *args, "--distill_weight", "1").status == 0
    assert read_log(newest_log(pairs), "val")[-1]["val_loss"] < 0.8 * math.log(30)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-t", "distill", "--teacher", ""], "teacher is not set"),
        (["-t", "distill", "--teacher", "checkpoint/none.pt"], "no such checkpoint"),
        (["-t", "dpo", "--loss", "next_token"], "cannot train on preference pairs"),
        (["-t", "sft", "--loss", "dpo", "--from_checkpoint", "checkpoint/sft.pt"], "needs preference pairs"),
        (["-t", "dpo", "--dpo_beta", "0"], "dpo_beta must be above 0"),
    ],
)
def test_mistakes_are_told(pairs, call, argv, words):
    result = call("train.py", *argv, *FAST, "--max_steps", "1")
    assert result.status == 1 and words in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "b", "rejected": "c"}, '"prompt" is missing'),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"},
            "must end with a question",
        ),
        ({"messages": "x", "chosen": "b", "rejected": "c"}, "must be a list"),
    ],
)
def test_bad_preference_lines_are_named(work, call, line, words):
    write_jsonl(work / "p.jsonl", [*make_pairs(20), line])
    result = call("data.py", "p.jsonl", "--max_bad_lines", "0")
    assert result.status == 1 and "line 21" in result.err and words in result.err
