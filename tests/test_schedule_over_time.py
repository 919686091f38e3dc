"""decay_over time: the learning rate follows the clock, whatever the speed, over resumes and processes."""

import functools
import os
from types import SimpleNamespace

import pytest
from conftest import DATA, TINY, read_log
from processes import newest_log, train_on

from base.configuration import UserError
from training.config import TrainConfig
from training.optimizer import SCHEDULES, schedule, schedule_over_time
from training.setup import Run
from weights.checkpointing import load_checkpoint

ARGUMENTS = ["-t", "pretrain", *TINY, *DATA, "--batch_size", "4", "--gradient_accumulation_steps", "2"]
ARGUMENTS += [
    "--device",
    "cpu",
    "--optimizer",
    "adamw",
    "--learning_rate",
    "1e-2",
    "--min_lr",
    "0",
    "--eval_interval",
    "9999",
]
ARGUMENTS += ["--decay_over", "time", "--max_steps", "null", "--stage", "run"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_curve_is_that_of_the_steps_and_ends_with_the_time(name):
    for i in range(101):
        over_steps = schedule(name, i, 0, 100, 0.1)
        assert schedule_over_time(name, 10**6, 0, i / 100, 0.1) == pytest.approx(over_steps)
    end = schedule_over_time(name, 10**6, 20, 1.0, 0.1)
    assert end == schedule_over_time(name, 10**6, 20, 1.5, 0.1) == pytest.approx(1.0 if name == "constant" else 0.1)


def test_the_warm_up_is_counted_in_steps_and_gives_way_where_the_time_is_short():
    """A machine that gets slower: 100 steps in the first half of the time, 10 in the second."""
    shares = [*(i / 200 for i in range(100)), *(0.5 + i / 20 for i in range(11))]
    for warmup_iters in (0, 9, 60, 1000):
        rates = [schedule_over_time("linear", i, warmup_iters, share, 0.0) for i, share in enumerate(shares)]
        assert rates == [min((i + 1) / (warmup_iters + 1), 1 - share) for i, share in enumerate(shares)]
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
        assert rates[-1] == 0


def test_a_run_takes_its_rates_from_the_clock_and_ends_with_it(prepared, call, monkeypatch):
    """Two seconds a step, then six; the step that would begin after the minute is not taken."""

    def seconds(run):
        return 2.0 * min(run.state.step, 15) + 6.0 * max(0, run.state.step - 15)

    monkeypatch.setattr(Run, "seconds", seconds)
    result = call("train.py", *ARGUMENTS, "--lr_schedule", "linear", "--warmup_iters", "0", "--max_minutes", "1")
    assert result.status == 0 and "max_minutes reached" in result.out and "--max_minutes 2.0" in result.out
    records = read_log(newest_log(prepared), "train")
    began = [*range(0, 30, 2), *range(30, 61, 6)]
    assert [record["lr"] for record in records] == pytest.approx([1e-2 * (1 - second / 60) for second in began])
    assert read_log(newest_log(prepared), "val")[-1]["step"] == len(began)
    again = call("train.py", *ARGUMENTS, "--max_minutes", "1", "--from_checkpoint", "checkpoint/run_last.pt")
    assert again.status == 0 and "the run has used 1.1 of 1 minutes (max_minutes): --max_minutes 2" in again.err


def test_a_real_run_in_two_parts_decays_within_its_time(prepared, call):
    """Four seconds in all, of which the first part takes some; an evaluation and a save are among them."""
    arguments = [*ARGUMENTS, "--max_minutes", str(4 / 60), "--warmup_iters", "5", "--save_interval", "20"]
    assert call("train.py", *arguments, "--max_steps", "30").status == 0
    first = read_log(newest_log(prepared), "train")
    saved = load_checkpoint("checkpoint/run_last.pt")["data"]["seconds"]
    assert first[-1]["seconds"] <= saved < 4 and first[-1]["lr"] > 1e-3
    newest_log(prepared).unlink()
    assert call("train.py", *arguments, "--from_checkpoint", "checkpoint/run_last.pt").status == 0
    second = read_log(newest_log(prepared), "train")
    assert second[0]["step"] == 31 and second[0]["seconds"] > saved and second[0]["lr"] <= first[-1]["lr"]
    assert second[-1]["seconds"] == pytest.approx(4, rel=0.05) and second[-1]["lr"] < 0.05 * 1e-2
    assert load_checkpoint("checkpoint/run_last.pt")["data"]["seconds"] == pytest.approx(4, rel=0.1)


def put_clock_ahead() -> None:
    """Have every process but the main one believe that the time is over."""
    if os.environ["RANK"] != "0":
        Run.seconds = lambda run: 1e9


def test_the_main_process_has_the_clock(prepared):
    arguments = [*ARGUMENTS, "--max_minutes", str(3 / 60), "--warmup_iters", "5"]
    train_on(2, prepared, *arguments, first=functools.partial(put_clock_ahead))
    records = read_log(newest_log(prepared), "train")
    assert len(records) > 5 and records[-1]["lr"] < 0.1 * 1e-2
    assert load_checkpoint("checkpoint/run_last.pt")["data"]["seconds"] < 10


def test_over_steps_the_time_counts_from_every_start():
    def limit(**fields):
        return Run.time_limit.fget(SimpleNamespace(config=TrainConfig(**fields), seconds_before=100.0))

    assert limit(max_minutes=2.0) == 220 and limit(max_minutes=2.0, decay_over="time") == 120
    assert limit() == float("inf")


def test_the_time_must_be_given(prepared, call):
    with pytest.raises(UserError, match=r"decay_over time: .* --max_minutes 30"):
        TrainConfig(decay_over="time")
    result = call("train.py", *ARGUMENTS, "--max_minutes", "5", "--max_steps", "2")
    assert "max_steps (2) may end the run before its time is over" in result.err
    assert "the decay is cut off" not in result.err
