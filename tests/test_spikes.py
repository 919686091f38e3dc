"""on_spike rollback: what counts as a spike, and runs that meet poisoned batches and come back from them."""

import functools
import math
import statistics

import numpy as np
import pytest
import torch
from conftest import DATA, TINY, asked_by, make_text, read_log
from processes import break_loss, curves, fork, newest_log, poison_samples, train_on

import train
from base import logs
from base.configuration import UserError
from text.batches import TrainBatches
from train_deepspeed import DeepSpeedEngine
from training import spikes
from training.config import TrainConfig
from training.spikes import Spikes
from weights.checkpointing import load_checkpoint

# 16 samples a step, poisoned in steps 61 to 66; saves every 25 steps; the rate is that of the other run, too
ARGUMENTS = ["-t", "pretrain", *TINY, *DATA, "--batch_size", "8", "--gradient_accumulation_steps", "2", "--device"]
ARGUMENTS += ["cpu", "--optimizer", "adamw", "--learning_rate", "3e-2", "--decay_lr", "false", "--warmup_iters", "2"]
ARGUMENTS += ["--eval_interval", "16", "--save_interval", "25", "--max_steps", "80", "--rollback_lr_factor", "1"]
ROLLBACK = ["--on_spike", "rollback"]
POISON = 16 * 60, 16 * 66


def spikes_in(losses) -> list[int]:
    """Where a watch over these losses reports a spike; it begins anew after each."""
    found, watch = [], Spikes()
    for i, loss in enumerate(losses):
        if watch.add(i, loss):
            found.append(i)
            watch = Spikes()
    return found


def test_a_loss_that_stays_up_is_a_spike_and_an_odd_batch_is_not():
    losses = np.random.default_rng(0).normal(2, 0.1, 200)
    assert spikes_in(losses) == []
    assert spikes_in([*losses[:100], 9, *losses[100:]]) == []
    assert spikes_in([*losses[:100], 9, math.nan, *losses[100:]]) == []
    assert spikes_in([*losses[:100], 9, math.nan, 9, *losses[100:]]) == [102]
    assert spikes_in([*losses[:100], 9, 9, 2, 9, 9, 2, math.inf, 9, 9]) == [108]
    assert spikes_in([9, math.nan, math.inf, math.nan, *losses]) == []  # nothing is normal yet


def test_the_limit_is_six_standard_deviations_of_noise_and_outliers_do_not_move_it():
    rng = np.random.default_rng(0)
    limits = []
    for _ in range(100):
        watch = Spikes(recent=rng.normal(2, 0.1, 100).tolist())
        limits.append(watch.limit())
        watch.recent[:20] = [1e6] * 20
        assert watch.limit() < 4
    assert statistics.mean(limits) == pytest.approx(2.6, abs=0.02)
    assert Spikes(recent=[2.0] * 20).limit() == pytest.approx(2.1) and Spikes(recent=[2.0] * 19).limit() == math.inf


@pytest.mark.parametrize("noise", ["normal", "laplace"])
def test_healthy_losses_have_no_spike(noise):
    """50,000 steps of a curve that falls as a power of the step, with light and with heavy tails."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, 50_001)
    assert spikes_in(1.5 + 3 * steps**-0.3 + getattr(rng, noise)(0, 0.08, len(steps))) == []


@pytest.fixture
def corpus(prepared, call):
    """A text that is long enough for the steps below."""
    (prepared / "dataset" / "pretrain.txt").write_text(make_text(30_000), encoding="utf-8")
    assert call("data.py", "--block_size", "16").status == 0
    return prepared


@pytest.fixture
def poison(monkeypatch):
    """Random tokens in steps 61 to 66, in this process."""
    monkeypatch.setattr(TrainBatches, "sample", TrainBatches.sample)
    poison_samples(*POISON)


def test_the_rollback_ends_better_than_going_on_and_is_the_same_on_two_processes(corpus, call, poison):
    assert call("train.py", *ARGUMENTS).status == 0
    without = curves(newest_log(corpus))
    result = call("train.py", *ARGUMENTS, *ROLLBACK)
    log = newest_log(corpus)
    spikes = read_log(log, "spike")
    assert "step 63: loss" in result.out and "back to step 50 (rollback 1 of 3)" in result.out
    assert [(spike["step"], spike["first"], spike["back_to"]) for spike in spikes] == [(63, 61, 50), (53, 51, 50)]
    assert all(spike["loss"] > spike["limit"] for spike in spikes)
    steps = [record["step"] for record in read_log(log, "train")]
    assert steps == [*range(1, 63), 51, 52, *range(51, 81)]
    with_rollback = curves(log)
    assert with_rollback["val_loss"][-1] < without["val_loss"][-1] - 0.1
    assert with_rollback["loss"][:60] == without["loss"][:60]
    for options in ([], ["--fsdp", "true"]):
        first = functools.partial(poison_samples, *POISON)
        two = train_on(2, corpus, *ARGUMENTS, *ROLLBACK, *options, first=first)
        assert two["loss"] == pytest.approx(with_rollback["loss"], rel=1e-4)
        assert two["val_loss"] == pytest.approx(with_rollback["val_loss"], rel=1e-4)


def test_readers_of_the_log_see_the_steps_that_count(corpus, call, poison):
    assert call("train.py", *ARGUMENTS, *ROLLBACK).status == 0
    records = logs.read_log(newest_log(corpus))
    assert [record["step"] for record in records["train"]] == list(range(1, 81))
    assert [record["step"] for record in records["val"]] == [16, 32, 48, 64, 80]
    assert max(record["loss"] for record in records["train"][60:]) < 2 and len(records["spike"]) == 2


@pytest.mark.parametrize("options", [
    ["--optimizer", "muon", "--dropout", "0.1"],
    ["--n_expert", "4", "--expert_balance", "bias", "--rollback_lr_factor", "0.5"],
])  # fmt: skip
@pytest.mark.parametrize("stop", [50, 75])
def test_a_resumed_run_rolls_back_as_if_it_had_not_been_stopped(corpus, call, poison, options, stop):
    """Stopped at a save before the spike or after it, with all that a rollback must restore."""
    arguments = [*ARGUMENTS, *ROLLBACK, *options, "--eval_interval", "1000"]
    assert call("train.py", *arguments, "--stage", "whole").status == 0
    assert read_log(newest_log(corpus), "spike")
    rates = {record["lr"] for record in read_log(newest_log(corpus), "train")[-20:]}
    assert rates == {0.015 if "0.5" in options else 0.03}
    newest_log(corpus).rename("whole.txt")
    assert call("train.py", *arguments, "--stage", "parts", "--max_steps", str(stop)).status == 0
    first = read_log(newest_log(corpus), "val")  # where it stops it evaluates, too
    newest_log(corpus).rename("first.txt")
    parts = load_checkpoint("checkpoint/parts_last.pt")
    assert (parts["data"]["spikes"]["rollbacks"] > 0) == (stop == 75)
    resume = ["--from_checkpoint", "checkpoint/parts_last.pt"]
    assert call("train.py", *arguments, "--stage", "parts", *resume).status == 0
    whole, parts = load_checkpoint("checkpoint/whole_last.pt"), load_checkpoint("checkpoint/parts_last.pt")
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    losses = [record["val_loss"] for record in (*first, *read_log(newest_log(corpus), "val"))]
    assert parts["data"].pop("evals_without_gain") == (losses[-1] >= losses[0]) and len(losses) == 2
    assert whole["data"].pop("evals_without_gain") == 0  # its only one
    del whole["data"]["seconds"], parts["data"]["seconds"]
    assert whole["data"] == parts["data"] and whole["step"] == parts["step"] == 80


def test_an_adapter_rolls_back_too(corpus, call, poison):
    assert call("train.py", *ARGUMENTS, "--max_steps", "20", "--stage", "base").status == 0
    lora = ["--from_checkpoint", "checkpoint/base.pt", "--use_lora", "true", "--stage", "run"]
    assert call("train.py", *ARGUMENTS, *lora, *ROLLBACK).status == 0
    assert [spike["back_to"] for spike in read_log(newest_log(corpus), "spike")][:1] == [50]
    records = logs.read_log(newest_log(corpus))["train"]
    assert records[-1]["step"] == 80 and records[-1]["loss"] < records[0]["loss"]


def test_it_goes_back_to_the_best_where_that_is_newer_and_never_to_a_save_of_the_spike(corpus, call, poison):
    arguments = [*ARGUMENTS, *ROLLBACK, "--max_steps", "70"]
    assert call("train.py", *arguments, "--eval_interval", "29").status == 0
    assert read_log(newest_log(corpus), "spike")[0]["back_to"] == 58
    newest_log(corpus).unlink()
    saved_in_it = ["--save_interval", "61", "--eval_interval", "1000"]
    result = call("train.py", *arguments, *saved_in_it, "--stage", "none")
    assert "no rollback: there is no save of before (save_interval)" in result.out
    (spike,) = read_log(newest_log(corpus), "spike")
    assert spike["back_to"] is None and read_log(newest_log(corpus), "train")[-1]["step"] == 70


def test_saves_at_every_step_leave_one_to_go_back_to(corpus, call, poison):
    """The newest is of the step whose loss was the first to spike: the one before it is good."""
    options = ["--save_interval", "1", "--eval_interval", "1000", "--max_steps", "64"]
    assert call("train.py", *ARGUMENTS, *ROLLBACK, *options).status == 0
    assert [spike["back_to"] for spike in read_log(newest_log(corpus), "spike")] == [59, 59]


def test_a_save_that_cannot_be_read_is_left_out(corpus, call, poison, monkeypatch):
    looking = spikes.last_good_save

    def after_damage(*arguments):
        (corpus / "checkpoint" / "pretrain_last.pt").write_bytes(b"damaged")
        return looking(*arguments)

    monkeypatch.setattr(spikes, "last_good_save", after_damage)
    result = call("train.py", *ARGUMENTS, *ROLLBACK, "--max_rollbacks", "1")
    assert result.status == 0 and "pretrain_last.pt: not a checkpoint, or a damaged one" in result.out
    best = [
        record["step"]
        for record in read_log(newest_log(corpus), "val")
        if record["val_loss"] == record["best_val_loss"]
    ]
    assert read_log(newest_log(corpus), "spike")[0]["back_to"] == best[2] == 48


def test_a_run_stopped_amid_a_spike_is_saved_as_it_goes_without_on_spike(corpus, call, poison):
    assert call("train.py", *ARGUMENTS, *ROLLBACK, "--max_steps", "62").status == 0
    assert load_checkpoint("checkpoint/pretrain_last.pt")["data"]["spikes"]["above"] == 2
    resume = ["--from_checkpoint", "checkpoint/pretrain_last.pt", "--save_interval", "5"]
    assert call("train.py", *ARGUMENTS, *resume).status == 0
    assert load_checkpoint("checkpoint/pretrain_last.pt.previous")["step"] == 75


def test_evaluations_that_were_taken_back_do_not_count_for_patience(corpus, call, poison, monkeypatch):
    """Of eight evaluations up to step 80 the first one is the best; that of step 60 was done twice."""
    monkeypatch.setattr(train, "evaluate", lambda run: (2.0, 0.1))
    assert call("train.py", *ARGUMENTS, *ROLLBACK, "--eval_interval", "10", "--patience", "8").status == 0
    assert read_log(newest_log(corpus), "spike")[0]["back_to"] == 50
    last = load_checkpoint("checkpoint/pretrain_last.pt")
    assert (last["step"], last["data"]["evals_without_gain"]) == (80, 7)


def test_rollbacks_are_limited(corpus, call, poison):
    result = call("train.py", *ARGUMENTS, *ROLLBACK, "--max_rollbacks", "1")
    assert result.status == 0 and "no rollback: max_rollbacks (1) is reached" in result.out
    assert [spike["back_to"] for spike in read_log(newest_log(corpus), "spike")] == [50, None]


@pytest.mark.parametrize(("options", "status"), [([], 1), (ROLLBACK, 0)])
def test_losses_that_are_not_finite_are_skipped_and_three_are_a_spike(corpus, options, status):
    """Two micro-batches a step; the third of the bad steps rolls back, before max_skipped_steps would end the run."""
    bad = functools.partial(break_loss, range(120, 140))
    arguments = [*ARGUMENTS, *options, "--max_skipped_steps", "4", "--eval_interval", "1000"]
    job = fork("train.py", *arguments, cwd=corpus, first=bad)
    job.join(60)
    said = (corpus / "output.txt").read_text()
    assert job.exitcode == status, said
    assert ("back to step 50" in said) == (status == 0) == ("4 steps before were skipped too" not in said)
    if status == 0:
        spikes = read_log(newest_log(corpus), "spike")
        assert [(spike["step"], spike["back_to"]) for spike in spikes] == [(63, 50), (53, 50), (53, 50)]
        assert all(math.isfinite(loss) for loss in curves(newest_log(corpus))["loss"][-20:])


def test_where_it_cannot_work_it_is_refused(corpus):
    with pytest.raises(UserError, match="on_spike: the loss of grpo"):
        TrainConfig(loss="grpo", on_spike="rollback")
    engine = functools.partial(DeepSpeedEngine, path=train.__file__)
    asked = asked_by(*ARGUMENTS, *ROLLBACK)
    with pytest.raises(UserError, match=r"not supported on DeepSpeed: use train_ddp\.py"):
        engine(asked.training)
