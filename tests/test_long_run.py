"""What hours of training meet: memory and steps that must not grow, logs that fill disks, terminals that close."""

import fcntl
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import termios
import time

import psutil
import pytest
from conftest import DATA, FAST, ROOT, TINY, default_signals, read_log, start_script
from processes import fork, newest_log

from base import logs
from weights.checkpointing import load_checkpoint

ARGUMENTS = ["-t", "pretrain", *TINY, *FAST, *DATA, "--gradient_accumulation_steps", "1", "--stage", "run"]
ENDLESS = [*ARGUMENTS, "--max_steps", "1000000", "--save_interval", "50"]


@pytest.mark.real("trains for thousands of steps")
def test_memory_and_step_time_stay_flat(prepared, long):
    n = 10_000 if long else 2_000
    options = ["--max_steps", str(n), "--eval_interval", "200", "--save_interval", "500", "--eval_iters", "1"]
    job = fork("train.py", *ARGUMENTS, *options, cwd=prepared)
    process, sizes, seconds, log = psutil.Process(job.pid), {}, {}, None
    while job.is_alive():
        time.sleep(0.05)
        log = log or next(iter(prepared.glob("train_*.log")), None)
        if log is None:
            continue
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 2000))
            steps = re.findall(rb'"step": (\d+)', file.read())
        step = int(steps[-1]) if steps else 0
        try:
            sizes[step], times = process.memory_info().rss, process.cpu_times()
            seconds[step] = times.user + times.system  # of the process: what others do beside it does not count
        except psutil.Error:
            break
    assert job.exitcode == 0, (prepared / "output.txt").read_text()
    early = [size for step, size in sizes.items() if n / 10 <= step < n / 5]
    late = [size for step, size in sizes.items() if step >= n * 0.9]
    assert statistics.median(late) < 1.02 * statistics.median(early)
    assert seconds_per_step(seconds, 0.75 * n, n) < 1.5 * seconds_per_step(seconds, 0.1 * n, 0.4 * n)


def seconds_per_step(seconds: dict[int, float], first: float, last: float) -> float:
    steps = [step for step in seconds if first <= step <= last]
    return (seconds[steps[-1]] - seconds[steps[0]]) / (steps[-1] - steps[0])


def test_a_log_can_be_bounded(prepared, call):
    options = ["--max_steps", "200", "--max_log_mb", "0.02", "--eval_interval", "50"]
    assert call("train.py", *ARGUMENTS, *options).status == 0
    log = newest_log(prepared)
    parts = [log, log.with_name(log.name + ".1")]
    assert all(part.stat().st_size < 21_000 for part in parts)
    assert all(len(read_log(part, "header")) == 1 for part in parts)
    steps = [record["step"] for record in logs.read_log(str(log))["train"]]
    assert steps == list(range(steps[0], 201)) and 40 < len(steps) < 200  # the older ones are gone


@pytest.fixture
def endless():
    """Starts runs that do not end by themselves; whatever comes, none is left behind."""
    jobs = []

    def keep(job):
        jobs.append(job)
        return job

    yield keep
    for job in jobs:
        job.kill()
        job.wait()


def leave_when_trained(job, prepared, leave, steps=10):
    """Take away what a run writes to, once it trains; returns the step at which that was."""
    deadline = time.monotonic() + 150  # (saves wait for the disk)
    last = prepared / "checkpoint" / "run_last.pt"
    while not last.exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    leave()
    step = load_checkpoint(last)["step"]
    while load_checkpoint(last)["step"] < step + steps:
        assert time.monotonic() < deadline and job.poll() is None, job.poll()
        time.sleep(0.05)
    return step


@pytest.mark.parametrize("eval_interval", ["2", "1000"])  # with and without much to say
def test_a_pipe_that_closes_does_not_end_the_run(prepared, endless, eval_interval):
    options = ["--eval_interval", eval_interval, "--eval_iters", "1"]
    job = endless(start_script("train.py", *ENDLESS, *options, cwd=prepared))

    def leave():
        job.stdout.close()
        job.stderr.close()

    leave_when_trained(job, prepared, leave)
    job.send_signal(signal.SIGINT)
    assert job.wait(60) == 0
    assert load_checkpoint("checkpoint/run_last.pt")["step"] == read_log(newest_log(prepared), "train")[-1]["step"]


@pytest.mark.parametrize("launcher", [[], ["nohup"]])
def test_a_terminal_that_closes_ends_the_run_with_a_save_or_under_nohup_not_at_all(prepared, endless, launcher):
    ours, theirs = pty.openpty()

    def take_terminal():
        default_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    job = subprocess.Popen(
        [*launcher, sys.executable, ROOT / "train.py", *ENDLESS, "--eval_interval", "3", "--eval_iters", "1"],
        cwd=prepared,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    endless(job)
    os.close(theirs)
    if launcher:
        leave_when_trained(job, prepared, lambda: os.close(ours))
        job.send_signal(signal.SIGTERM)
    else:
        leave_when_trained(job, prepared, lambda: None)
        os.close(ours)  # the kernel sends SIGHUP to those whose terminal this was
    assert job.wait(60) == 0
    assert load_checkpoint("checkpoint/run_last.pt")["step"] == read_log(newest_log(prepared), "train")[-1]["step"]
