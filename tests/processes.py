"""Jobs of several processes, really started: what the tests of train_ddp.py and train_deepspeed.py share."""

import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, default_signals, read_log

from base.configuration import run_main
from text.batches import TrainBatches
from training import losses

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for when DeepSpeed is imported
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["train_ddp", "train_deepspeed", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer"]
FORKS.set_forkserver_preload(PRELOADED)  # all that takes seconds to import

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus")
LAUNCHERS = {"train_ddp.py": TORCHRUN, "train_deepspeed.py": DEEPSPEED}


def free_port() -> int:
    """A port that nobody uses now; launchers' own default would meet that of a test beside this one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(n_processes, *argv, cwd, script="train_ddp.py", launcher=()):
    """A job under its launcher, in a session of its own, so that signals reach no one else."""
    if script == "train_deepspeed.py":  # (torchrun's --standalone finds its own)
        launcher = [*launcher, "--master_port", str(free_port())]
    command = [sys.executable, "-m", *LAUNCHERS[script], str(n_processes), *launcher]
    return subprocess.Popen(
        [*command, ROOT / script, *map(str, argv)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process, timeout=240):
    """(exit status, output, errors); nothing of it is left running."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        for child in [*children_of(process), process] if process.poll() is None else []:
            child.kill()
    return process.returncode, out, err


def children_of(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def worker(process, rank):
    """The process of a rank, once it is there."""
    for _ in range(600):
        for child in children_of(process):
            try:
                if child.environ().get("RANK") == str(rank):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError(f"no process of rank {rank}")


def wait_for(path: Path, process, timeout=90):
    for _ in range(timeout * 10):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def newest_log(folder: Path) -> Path:
    return max(folder.glob("train_*.log"), key=lambda path: path.stat().st_mtime_ns)


def curves(log: Path) -> dict[str, list[float]]:
    """Everything in a log that must not depend on the number of processes."""
    return {
        field: [record[field] for record in read_log(log, kind)]
        for kind, fields in {"train": ("loss", "grad_norm", "tokens"), "val": ("val_loss",)}.items()
        for field in fields
    }


def break_loss(bad_steps: Container[int]) -> None:
    """Make the training loss of the first process NaN in some of its micro-batches, counted from 0 over the run."""
    if os.environ.get("RANK", "0") != "0":
        return
    calls = itertools.count()

    def loss(model, batch, reduction):
        value = losses.next_token(model, batch, reduction)
        return value * float("nan") if reduction == "sum" and next(calls) in bad_steps else value

    losses.LOSSES["next_token"] = lambda *_: loss


def poison_samples(start: int, end: int) -> None:
    """Make the training samples at these positions random tokens."""
    sample = TrainBatches.sample

    def poisoned(batches, position):
        tokens, mask = sample(batches, position)
        if start <= position < end:
            tokens = np.random.default_rng(position).integers(6, batches.vocab_size, len(tokens)).astype(tokens.dtype)
        return tokens, mask

    TrainBatches.sample = poisoned


def be_script(
    script: str,
    argv: list[str],
    cwd: Path,
    output: Path,
    environment: dict[str, str],
    limits: dict[int, int],
    first: Callable[[], None],
) -> None:
    """A script's run in a process of its own, under limits of the system (resource.RLIMIT_...)."""
    default_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python itself does at its start
    os.chdir(cwd)
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    first()
    module = importlib.import_module(script.removesuffix(".py"))
    sys.argv = [script, *argv]
    run_main(module.main)


def nothing() -> None:
    """What comes before a script's run, if no more is asked for."""


def fork(
    script, *argv, cwd, output="output.txt", environment=None, limits=None, first=nothing
) -> multiprocessing.Process:
    """A process that runs a script, forked where torch is imported already: seconds sooner than a new one."""
    arguments = [str(argument) for argument in argv]
    arguments = (script, arguments, cwd, cwd / output, environment or {}, limits or {}, first)
    job = FORKS.Process(target=be_script, args=arguments)
    job.start()
    return job


def train_on(n_processes, cwd, *argv, script="train_ddp.py", **options) -> dict[str, list[float]]:
    """The curves of a job that comes to its end."""
    statuses, said = end_of(n_processes, cwd, *argv, script=script, **options)
    assert statuses == [0] * n_processes, "\n".join(said)
    assert len(list(cwd.glob("train_*.log"))) == 1  # one process writes
    assert said[0].count("100%|") <= 4 and not any("%|" in text for text in said[1:])  # one bar; messages redraw it
    return curves(newest_log(cwd))


def end_of(n_processes, cwd, *argv, script="train_ddp.py", **options) -> tuple[list[int], list[str]]:
    """Exit statuses and output of a job whose processes are given what a launcher would give them."""
    for log in cwd.glob("train_*.log"):
        log.unlink()
    shared = {"WORLD_SIZE": n_processes, "LOCAL_SIZE": n_processes, "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = free_port()
    jobs = []
    for rank in range(n_processes):
        environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        jobs.append(fork(script, *argv, cwd=cwd, output=f"rank_{rank}.out", environment=environment, **options))
    for job in jobs:
        job.join(timeout=240)
        job.kill()
        job.join()
    said = [(cwd / f"rank_{rank}.out").read_text(encoding="utf-8") for rank in range(n_processes)]
    return [job.exitcode for job in jobs], said


def assert_close(one, other, tolerance=1e-5):
    for field, values in one.items():
        assert other[field] == pytest.approx(values, rel=tolerance), field
