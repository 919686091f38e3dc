"""plot_loss.py --explain on the logs of real runs: each has one fault, and the rule of that fault alone speaks."""

import json
import time

import pytest
import torch
from conftest import DATA, make_text
from processes import newest_log, poison_samples

from base import logs
from layers.experts import mixture_layers
from text.batches import TrainBatches
from training import diagnosis, setup

ARGUMENTS = ["-t", "pretrain", *DATA, "--n_layer", "2", "--n_head", "2", "--n_embd", "64", "--block_size", "32"]
ARGUMENTS += ["--batch_size", "16", "--gradient_accumulation_steps", "1", "--device", "cpu", "--optimizer", "adamw"]
ARGUMENTS += ["--learning_rate", "3e-3", "--min_lr", "0", "--warmup_iters", "10", "--max_steps", "80"]
ARGUMENTS += ["--eval_interval", "20", "--eval_iters", "1"]


@pytest.fixture
def corpus(prepared, call, request):
    (prepared / "dataset" / "pretrain.txt").write_text(make_text(60_000), encoding="utf-8")
    assert call("data.py", "--block_size", "32").status == 0
    return prepared


def found_in(path) -> dict[str, str]:
    """The findings of a log, by rule."""
    records = logs.read_log(path)
    log = diagnosis.Log(records["header"][-1], records["train"], records["val"], records.get("spike", []))
    return diagnosis.findings(log)


def learned(call, corpus, *options, status=0) -> dict[str, str]:
    result = call("train.py", *ARGUMENTS, *options)
    assert result.status == status, result.err
    return found_in(newest_log(corpus))


@pytest.mark.parametrize("options", [
    [],
    ["--optimizer", "muon", "--n_expert", "4", "--lr_schedule", "linear"],
    ["--decay_lr", "false", "--learning_rate", "1e-3"],
])  # fmt: skip
def test_a_healthy_run_raises_no_finding(corpus, call, options):
    assert learned(call, corpus, *options) == {}
    result = call("plot_loss.py", "--explain", newest_log(corpus))
    name, facts, verdict = result.out.splitlines()
    assert result.status == 0 and name == f"{newest_log(corpus).stem}: pretrain"
    assert facts.startswith("steps 1 to 80, training loss ") and "best validation loss" in facts
    assert verdict == "- healthy: it learns, and none of the rules finds a fault"
    assert not list(corpus.glob("*.png"))


def test_a_healthy_run_in_two_parts_and_one_that_still_runs(corpus, call):
    assert learned(call, corpus, "--max_steps", "60", "--lr_decay_iters", "60") == {}
    first = newest_log(corpus).rename("first.log")
    log = first.read_text().replace('"max_steps": 60', '"max_steps": 6000').replace('s": 60,', 's": 6000,')
    (corpus / "running.log").write_text(log)
    result = call("plot_loss.py", "--explain", "running.log")
    assert "5,940 steps to go to max_steps" in result.out and "- healthy" in result.out
    last = ["--from_checkpoint", "checkpoint/pretrain_last.pt"]
    assert learned(call, corpus, *last, "--learning_rate", "1e-3") == {}
    result = call("plot_loss.py", "--explain", "first.log", newest_log(corpus))
    assert "first: pretrain\nsteps 1 to 80" in result.out and "- healthy" in result.out


def test_a_healthy_toy_problem_and_a_run_that_is_too_short(work, call):
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "64", "--device", "cpu", "--batch_size", "64"]
    options = ["--length", "3", "--max_steps", "100", "--eval_iters", "1", "--warmup_iters", "10"]
    assert call("train.py", "--problem", "sort", *shape, *options).status == 0
    assert found_in(newest_log(work)) == {}
    newest_log(work).unlink()
    assert call("train.py", "--problem", "sort", *shape, *options, "--max_steps", "20").status == 0
    assert "too short to judge; nothing is wrong so far" in call("plot_loss.py", "--explain", newest_log(work)).out


def test_a_rate_of_nearly_nothing_does_not_learn(corpus, call):
    found = learned(call, corpus, "--learning_rate", "1e-9", "--max_steps", "50")
    assert found.keys() == {"does_not_learn"} and "the learning rate is at most 1e-09" in found["does_not_learn"]


def test_shuffled_labels_cannot_be_learnt(corpus, call, monkeypatch):
    at, generator = TrainBatches.at, torch.Generator().manual_seed(0)

    def shuffled(batches, position):
        def shuffle(targets):
            return targets.flatten()[torch.randperm(targets.numel(), generator=generator)].view_as(targets)

        return [batch._replace(targets=shuffle(batch.targets)) for batch in at(batches, position)]

    monkeypatch.setattr(TrainBatches, "at", shuffled)
    found = learned(call, corpus)
    assert found.keys() == {"does_not_learn"} and "stays at the unigram entropy, 2.8" in found["does_not_learn"]
    assert "train.py --check" in found["does_not_learn"]


def test_a_toy_problem_without_a_rate_does_not_learn(work, call):
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "64", "--device", "cpu", "--batch_size", "64"]
    options = ["--length", "3", "--max_steps", "60", "--eval_iters", "1", "--warmup_iters", "10"]
    options += ["--optimizer", "adamw", "--learning_rate", "1e-9", "--min_lr", "0"]
    assert call("train.py", "--problem", "sort", *shape, *options).status == 0
    found = found_in(newest_log(work))
    assert found.keys() == {"does_not_learn"} and "of the beginning" in found["does_not_learn"]


@pytest.mark.parametrize(("options", "says"), [
    (["--learning_rate", "3", "--max_steps", "40"], "worse than guessing; --learning_rate 0.9"),
    (["--optimizer", "muon", "--learning_rate", "3", "--max_steps", "40"], "0.9 --muon_learning_rate 0.006"),
    # the rate rises to 0.5: the loss falls first, and then rises with it; where it happens to be low again at the end,
    # this is not said: that depends on the seed and on the last bits of what is computed
    (
        ["--learning_rate", "1", "--warmup_iters", "150", "--grad_clip", "0", "--random_seed", "1"],
        "the training loss is lowest around step",
    ),
])  # fmt: skip
def test_a_rate_that_is_far_too_high_diverges(corpus, call, options, says):
    found = learned(call, corpus, *options)
    assert says in found["diverges"] and found.keys() <= {"diverges", "has_spikes", "does_not_learn", "clips_always"}


def test_losses_that_are_not_finite_at_the_end_are_a_divergence(corpus, call):
    sgd = ["--optimizer", "sgd", "--learning_rate", "1e20", "--grad_clip", "0"]
    found = learned(call, corpus, *sgd, status=1)
    assert "it diverged: no finite loss since step" in found["diverges"] and "steps skipped" in found["has_spikes"]


def made_up(losses, interval=1, val=(), **config):
    """A Log of these losses, at every interval-th step; val: losses spread evenly over it."""
    train = [{"step": interval * i, "loss": loss, "lr": 1e-3} for i, loss in enumerate(losses, 1)]
    at = [train[-1]["step"] * (i + 1) // len(val) for i in range(len(val))]
    config = {"learning_rate": 1e-3, "warmup_iters": 0, **config}
    header = {"stage": config.get("stage", "pretrain"), "train_config": config}
    return diagnosis.Log(header, train, [{"step": s, "val_loss": v} for s, v in zip(at, val, strict=True)])


@pytest.mark.parametrize("interval", [1, 10])
def test_a_step_or_two_that_are_skipped_are_no_divergence(interval):
    healthy = [4 - 0.03 * i for i in range(97)]
    for n_missing in range(5):
        found = diagnosis.findings(made_up([*healthy, *[None] * n_missing], interval))
        assert found.keys() == ({"diverges"} if n_missing >= 3 else set())


def test_a_log_without_a_finite_loss_breaks_no_rule():
    assert diagnosis.diverges(made_up([None] * 5)) is None


@pytest.mark.parametrize(("config", "takes", "leaves_out"), [
    ({}, ["take pretrain.pt", "more data, --dropout 0.2, a smaller model"], ["lora"]),
    ({"stage": "sft", "from_checkpoint": "x.pt"}, ["take sft.pt", "--dropout 0.2 or"], ["smaller model"]),
    ({"use_lora": True}, ["pretrain_lora.pt", "--lora_dropout 0.1, a lower lora_rank"], [" --dropout", "smaller"]),
    ({"loss": "dpo", "from_checkpoint": "x.pt"}, ["with more data or fewer steps"], ["dropout", "smaller"]),
])  # fmt: skip
def test_advice_against_overfitting_is_what_the_run_can_follow(config, takes, leaves_out):
    log = made_up([3 - 0.02 * i for i in range(100)], val=[2.5, 2.0, 2.2, 2.4], **config)
    found = diagnosis.findings(log)
    assert found.keys() == {"overfits"}
    assert all(text in found["overfits"] for text in takes)
    assert not any(text in found["overfits"] for text in leaves_out)


@pytest.mark.parametrize("on_spike", ["none", "rollback"])
def test_poisoned_batches_are_found_as_spikes(corpus, call, monkeypatch, on_spike):
    monkeypatch.setattr(TrainBatches, "sample", TrainBatches.sample)
    poison_samples(16 * 60, 16 * 66)
    found = learned(call, corpus, "--on_spike", on_spike)
    assert found.keys() == {"has_spikes"}
    if on_spike == "none":
        assert found["has_spikes"].startswith("1 spike of the loss, at step 63 (learning rate 0.000")
    else:
        assert found["has_spikes"].startswith("2 rollbacks after spikes, at step 61, 61")


def test_a_small_text_is_learnt_by_heart(corpus, call):
    (corpus / "dataset" / "pretrain.txt").write_text(make_text(1500), encoding="utf-8")
    assert call("data.py", "--block_size", "32", "--val_fraction", "0.3").status == 0
    found = learned(call, corpus, "--max_steps", "160")
    assert found.keys() == {"overfits"}
    best = min(logs.read_log(newest_log(corpus))["val"], key=lambda record: record["val_loss"])
    assert f"is lowest at step {best['step']} ({best['val_loss']:.3f})" in found["overfits"]
    assert "take pretrain.pt" in found["overfits"] and "--dropout" in found["overfits"]


def test_a_decay_that_was_cut_off_is_unfinished(corpus, call, monkeypatch):
    found = learned(call, corpus, "--lr_decay_iters", "400")
    assert found.keys() == {"schedule_is_unfinished"}
    assert "where max_steps ended the run" in found["schedule_is_unfinished"]
    assert "--lr_decay_iters 80 (it is 400)" in found["schedule_is_unfinished"]
    monkeypatch.setattr(setup.Run, "seconds", lambda run: run.state.step / 2)  # half a minute for 60 steps
    found = learned(call, corpus, "--max_minutes", "0.5", "--max_steps", "400", "--eval_interval", "30")
    assert found.keys() == {"schedule_is_unfinished"} and "--decay_over time" in found["schedule_is_unfinished"]
    assert "at step 61, where max_minutes ended the run" in found["schedule_is_unfinished"]


def test_a_limit_far_below_the_gradient_clips_it_always(corpus, call):
    found = learned(call, corpus, "--grad_clip", "1e-3", "--max_steps", "50")
    assert found.keys() == {"clips_always"} and "clipped in 100% of the steps" in found["clips_always"]


def test_a_router_that_is_rigged_leaves_experts_dead(corpus, call, monkeypatch):
    """Its biases send every token to expert 0, and none to expert 3."""
    make_model = setup.make_model

    def rigged(*arguments):
        model = make_model(*arguments)
        for layer in mixture_layers(model):
            layer.choice_bias += torch.tensor([10.0, 0.0, 0.0, -10.0])
        return model

    monkeypatch.setattr(setup, "make_model", rigged)
    rigging = ["--n_expert", "4", "--expert_balance", "bias", "--expert_bias_rate", "1e-9"]
    found = learned(call, corpus, *rigging, "--max_steps", "50")
    assert found.keys() == {"experts_are_unbalanced"}
    both = "dead experts: layer 0: 3; layer 1: 3; overloaded: layer 0: 0; layer 1: 0 (up to 2.0 times the mean load)"
    assert both in found["experts_are_unbalanced"]


def test_a_slow_disk_keeps_the_steps_waiting(corpus, call, monkeypatch):
    sample = TrainBatches.sample
    monkeypatch.setattr(TrainBatches, "sample", lambda self, position: time.sleep(0.02) or sample(self, position))
    found = learned(call, corpus, "--max_steps", "42", "--batch_size", "4")
    assert found.keys() == {"waits_for_data"} and "spent waiting for batches" in found["waits_for_data"]


def test_evaluations_at_every_step_take_the_time(corpus, call):
    found = learned(call, corpus, "--eval_interval", "1", "--max_steps", "41")
    assert found.keys() == {"evaluates_too_much"} and "every 1 step of" in found["evaluates_too_much"]


def test_steps_of_a_few_tokens_leave_the_device_idle(corpus, call):
    tiny = ["--n_layer", "1", "--n_embd", "16", "--block_size", "8", "--batch_size", "1", "--eval_interval", "1000"]
    found = learned(call, corpus, *tiny, "--learning_rate", "1e-2")
    assert found["device_is_idle"].startswith("the device is idle most of the time: 0.")
    records = [json.loads(line) for line in newest_log(corpus).read_text().splitlines()]
    records[0]["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    records = [record | ({"mfu": 0.06} if record["type"] == "train" else {}) for record in records]
    (corpus / "gpu.log").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "6.0% of what" in found_in("gpu.log")["device_is_idle"]


def test_a_log_sends_no_commands_to_the_terminal(work, call):
    steps = [{"type": "train", "step": step, "loss": 2.0} for step in range(1, 50)]
    header = {"type": "header", "stage": "\x1b]0;x\x07", "train_config": {"max_steps": 49, "lr_decay_iters": "\x1b"}}
    (work / "a.log").write_text("".join(json.dumps(record) + "\n" for record in [header, *steps]))
    result = call("plot_loss.py", "--explain", "a.log")
    assert result.status == 0 and result.out.startswith("a: ?]0;x?\nsteps 1 to 49") and "\x1b" not in result.out


JUNK = [None, "x", [], float("inf"), -1, 0]


def test_odd_values_in_a_log_end_in_no_traceback(corpus, call):
    """Every field of every kind of record in turn, in all records of that kind."""
    assert call("train.py", *ARGUMENTS, "--max_steps", "50", "--n_expert", "4").status == 0
    records = [json.loads(line) for line in newest_log(corpus).read_text().splitlines()]
    records.append({"type": "spike", "step": 50, "first": 48, "limit": 2.0, "loss": 3.0, "back_to": None})
    header, examples = records[0], {record["type"]: record for record in records}
    places = [(kind, field, None) for kind, example in examples.items() for field in example]
    places += [
        ("header", part, field) for part, values in header.items() if isinstance(values, dict) for field in values
    ]
    kept = {("train", "step"), ("val", "step"), ("train", "loss"), ("spike", "back_to")}  # what read_log() itself reads
    for kind, name, inner in places:
        if name == "type" or (kind, name) in kept:
            continue
        for junk in JUNK:
            odd = [dict(record) for record in records]
            for record in odd:
                if record["type"] == kind:
                    record[name] = junk if inner is None else {**record[name], inner: junk}
            (corpus / "odd.log").write_text("".join(json.dumps(record) + "\n" for record in odd))
            assert len(diagnosis.explain(logs.read_log("odd.log"))) > 1
