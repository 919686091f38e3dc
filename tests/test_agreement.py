"""What one process of a job has met, all of them act on at the same step; and an evaluation that is not finite."""

import itertools
import math
import shlex
import signal

import pytest
from conftest import DATA, FAST, TINY, read_log
from processes import end_of, finish, newest_log, start, wait_for, worker

from training import losses
from weights.checkpointing import load_checkpoint, save_checkpoint

PLAIN = ["-t", "pretrain", *FAST, *DATA, "--optimizer", "adamw", "--decay_lr", "false"]
ARGUMENTS = [*PLAIN, *TINY]
RARELY = ["--max_steps", "1000000", "--eval_interval", "1000000", "--save_interval", "5"]


def test_a_signal_to_one_process_ends_all_of_them_with_a_save(prepared):
    """Slurm or a person may signal a single process: the others learn of it with the next step's sums."""
    job = start(2, *ARGUMENTS, *RARELY, "--process_timeout", "0.2", cwd=prepared)
    wait_for(prepared / "checkpoint" / "pretrain_last.pt", job)
    worker(job, 1).send_signal(signal.SIGUSR1)
    status, out, err = finish(job, timeout=60)
    assert status == 0, err
    assert "to go on: python -m torch.distributed.run --standalone --nproc_per_node 2 " in out
    saved = load_checkpoint(prepared / "checkpoint" / "pretrain_last.pt")["step"]
    assert saved == read_log(newest_log(prepared), "train")[-1]["step"]
    assert read_log(newest_log(prepared), "val") == []  # stopped, not evaluated


def test_torchrun_restarts_an_adapter_from_its_own_checkpoint(prepared, call):
    """<stage>_lora_last.pt, beside a <stage>_last.pt of another run that is left alone."""
    assert call("train.py", *ARGUMENTS, "--max_steps", "4").status == 0
    base, other = (prepared / "checkpoint" / name for name in ("pretrain.pt", "pretrain_last.pt"))
    base.rename(prepared / "base.pt")
    before = other.read_bytes()
    adapter = ["--use_lora", "true", "--from_checkpoint", "base.pt", "--lora_rank", "2"]
    job = start(2, *PLAIN, *RARELY, *adapter, "--max_steps", "200", cwd=prepared, launcher=["--max-restarts", "1"])
    wait_for(prepared / "checkpoint" / "pretrain_lora_last.pt", job)
    worker(job, 1).kill()
    status, out, err = finish(job)
    assert status == 0, err
    assert "pretrain_lora_last.pt at step" in out
    assert other.read_bytes() == before and not other.with_name("pretrain_last.pt.bak").exists()
    assert load_checkpoint(prepared / "checkpoint" / "pretrain_lora_last.pt")["step"] == 200


@pytest.fixture
def nan_evaluations(monkeypatch):
    """Makes the losses of some evaluations nan, by their numbers from 0."""

    def breaking(numbers: set[int]) -> None:
        calls = itertools.count()

        def loss(model, batch, reduction):
            value = losses.next_token(model, batch, reduction)
            return value * math.nan if reduction == "none" and next(calls) in numbers else value

        monkeypatch.setattr(losses, "LOSSES", {**losses.LOSSES, "next_token": lambda *_: loss})

    return breaking


def test_an_evaluation_that_is_not_finite_does_not_spoil_the_best(prepared, call, nan_evaluations):
    nan_evaluations({1})
    options = ["--eval_iters", "1", "--eval_interval", "2", "--max_steps", "8", "--learning_rate", "0.003"]
    options += ["--batch_size", "100"]  # an evaluation is one batch
    result = call("train.py", *ARGUMENTS, *options)
    assert result.status == 0, result.err
    records = read_log(newest_log(prepared), "val")
    assert [record["val_loss"] is None for record in records] == [False, True, False, False]
    assert records[1]["not_finite"] and "not finite" in result.out
    assert records[1]["best_val_loss"] == records[0]["val_loss"]
    assert records[3]["best_val_loss"] == min(record["val_loss"] for record in records if record["val_loss"])
    assert load_checkpoint("checkpoint/pretrain.pt")["step"] == 8  # the loss still fell, and that was saved


def test_a_checkpoint_spoilt_by_nan_is_resumed_with_a_new_best(prepared, call):
    assert call("train.py", *ARGUMENTS, "--max_steps", "2").status == 0
    checkpoint = load_checkpoint("checkpoint/pretrain_last.pt")
    checkpoint.pop("format")
    save_checkpoint("checkpoint/pretrain_last.pt", {**checkpoint, "best_val_loss": math.nan})
    resume = ["--max_steps", "4", "--from_checkpoint", "checkpoint/pretrain_last.pt", "--eval_interval", "2"]
    assert call("train.py", *ARGUMENTS, *resume).status == 0
    best = load_checkpoint("checkpoint/pretrain.pt")
    assert best["step"] == 4 and math.isfinite(best["best_val_loss"])


def test_resuming_an_older_checkpoint_keeps_the_newer_one(prepared, call):
    """Going on from the best, behind the last: what was trained since is set aside, and said so."""
    options = ["--eval_interval", "2", "--eval_iters", "1"]
    assert call("train.py", *ARGUMENTS, *options, "--max_steps", "2").status == 0
    last = prepared / "checkpoint" / "pretrain_last.pt"
    assert (
        call("train.py", *ARGUMENTS, "--max_steps", "6", "--from_checkpoint", last, "--eval_interval", "99").status == 0
    )
    best = prepared / "checkpoint" / "old.pt"
    (prepared / "checkpoint" / "pretrain_last.pt.previous").rename(best)  # of step 2
    result = call("train.py", *ARGUMENTS, *options, "--max_steps", "4", "--from_checkpoint", best)
    assert result.status == 0 and "pretrain_last.pt: of an earlier run, kept as pretrain_last.pt.bak" in result.out
    assert load_checkpoint(f"{last}.bak")["step"] == 6 and load_checkpoint(last)["step"] == 4


def test_every_session_renews_the_predecessor(prepared, call):
    last = prepared / "checkpoint" / "pretrain_last.pt"
    assert call("train.py", *ARGUMENTS, "--max_steps", "2").status == 0
    for steps in (4, 6, 8):
        assert call("train.py", *ARGUMENTS, "--max_steps", str(steps), "--from_checkpoint", last).status == 0
        assert load_checkpoint(f"{last}.previous")["step"] == steps - 2


def test_the_command_to_go_on_trains_longer(prepared, call):
    result = call("train.py", *ARGUMENTS, "--max_steps", "3")
    (line,) = [line for line in result.out.splitlines() if line.startswith("to go on: python train.py ")]
    assert call("train.py", *shlex.split(line.removeprefix("to go on: python train.py "))).status == 0
    assert load_checkpoint("checkpoint/pretrain_last.pt")["step"] == 6


def test_the_check_ends_on_all_processes_at_the_same_step(prepared):
    options = ["--check", "--learning_rate", "0.01", "--process_timeout", "0.5"]
    statuses, said = end_of(2, prepared, *ARGUMENTS, *options)
    assert statuses == [0, 0], said
    assert said[0].count("check passed: one batch of 8") == 1 and "check" not in said[1]


def test_the_command_to_try_an_adapter_names_its_base(prepared, call):
    """Also when the run was resumed from the adapter itself."""
    assert call("train.py", *ARGUMENTS, "--max_steps", "2", "--stage", "base").status == 0
    adapter = [*PLAIN, "--use_lora", "true", "--lora_rank", "2"]
    call("train.py", *adapter, "--max_steps", "2", "--from_checkpoint", "checkpoint/base.pt")
    resume = ["--from_checkpoint", "checkpoint/pretrain_lora_last.pt", "--max_steps", "4"]
    result = call("train.py", *adapter, *resume)
    line = "to try it: python inference.py -m checkpoint/base.pt --lora checkpoint/pretrain_lora.pt"
    assert line in result.out.splitlines()
    assert call("inference.py", *line.split()[5:], "-p", "the", "-l", "8").status == 0
