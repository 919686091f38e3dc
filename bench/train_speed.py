"""Training speed: tokens/s, FLOP/s relative to the machine's matmul peak (MFU), and the time of each part of a step.

    python bench/train_speed.py                     every model that fits this device
    python bench/train_speed.py --steps 10 tiny     fewer steps, one model
    python bench/train_speed.py wide --dtype float32 bfloat16       in each precision

The speed is that of train.py as users run it, with its log and progress bar: the median step. The parts are timed in a
second run, with synchronisation between them; "forward" holds the gradients of the output layer too, which
layers/head.py computes together with the loss. The peak is measured: a large torch matmul in the training dtype.
A batch is halved until it fits into half of the memory that is free. The last lines are rows for docs/measured.md.
"""

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, device_name, make_text, matmul_flops, newest_records, show, show_row, synchronise

import train
from base.configuration import UserError, run_main
from base.devices import DTYPES, dtype_name, find_device, memory_available
from training.engine import Engine
from training.memory import memory_estimate
from training.setup import Run, build_run, read_configs

WARM_UP = 3
SHAPES = {  # n_layer, n_head, n_embd, block_size, batch_size, vocab_size
    "tiny": (4, 4, 128, 64, 12, 65),
    "wide": (2, 4, 512, 512, 100, 2114),
    "gpt2": (12, 12, 768, 1024, 16, 50304),
}
CPU_BATCH_SIZE = {"wide": 10}  # on a CPU a step of 100 samples would take a minute


def build(arguments: list[str]) -> Run:
    """The run that train.py would build of these arguments."""
    args, overrides = train.make_parser().parse(arguments)
    config = read_configs(args.training, args.model, overrides)
    return build_run(config, Engine(config.training))


def arguments_of(shape: tuple[int, ...], batch_size: int, options: list[str]) -> list[str]:
    """The command line of train.py for a model and batch size."""
    names = ("n_layer", "n_head", "n_embd", "block_size")
    flags = [f for name, value in zip(names, shape, strict=False) for f in (f"--{name}", str(value))]
    flags += ["--batch_size", str(batch_size), "--gradient_accumulation_steps", "1", "--warmup_iters", "1"]
    return ["-t", "pretrain", *flags, *options]


def loop_seconds(arguments: list[str], steps: int) -> float:
    """Median time of a step of train.py in seconds, from its log."""
    never = ["--max_steps", str(steps + WARM_UP), "--eval_interval", "1000000", "--eval_iters", "1"]
    subprocess.run([sys.executable, ROOT / "train.py", *arguments, *never], check=True, capture_output=True)
    times = [record["ms_per_step"] / 1000 for record in newest_records() if record["type"] == "train"]
    return statistics.median(times[WARM_UP:])


def parts_seconds(run: Run, steps: int) -> tuple[dict[str, float], float]:
    """Median time of each part of a step in seconds, and the matmul peak in FLOP/s."""
    engine, times = run.engine, {part: [] for part in ("data", "forward", "backward", "optimizer")}
    peak = matmul_flops(engine.device, engine.dtype)

    def lap(part: str) -> None:
        nonlocal start
        synchronise(engine.device)
        times[part].append(time.perf_counter() - start)
        start = time.perf_counter()

    def timed_loss(*arguments):
        loss = run.loss(*arguments)
        lap("forward")
        return loss

    for step in range(WARM_UP + steps):
        start = time.perf_counter()
        (batch,) = run.batches.at(step * run.batches.samples_per_step)
        lap("data")
        engine.forward_backward(timed_loss, batch, batch.count, is_last=True)
        lap("backward")
        engine.step(0.01)
        lap("optimizer")
    return {part: statistics.median(values[WARM_UP:]) for part, values in times.items()}, peak


def measure(name: str, steps: int, dtype: str, options: list[str]) -> tuple[tuple[str, ...], dict]:
    """The row of a model in the table, and its results for the JSON line."""
    *shape, batch_size, vocabulary = SHAPES[name]
    device = find_device("auto")
    batch_size = CPU_BATCH_SIZE.get(name, batch_size) if device.type == "cpu" else batch_size
    Path("text.txt").write_text(make_text(20 * shape[3] * batch_size + 2 * vocabulary, vocabulary), encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "data.py", "text.txt"], check=True, capture_output=True)
    options = [*options, "--dtype", dtype]
    run, available = build(arguments_of(shape, batch_size, options)), memory_available(device) or math.inf
    while batch_size > 1 and memory_estimate(run, batch_size) > available / 2:
        batch_size //= 2
    arguments = arguments_of(shape, batch_size, options)
    seconds = loop_seconds(arguments, steps)
    run = build(arguments)
    parts, peak = parts_seconds(run, steps)
    parts["the rest"] = max(0.0, seconds - sum(parts.values()) + parts["data"])  # data is prefetched: it overlaps
    tokens = batch_size * shape[3]
    flops = tokens * run.model.flops_per_token() / seconds
    figures = {
        "batch_size": batch_size,
        "dtype": dtype_name(run.engine.dtype),
        "parameters": run.model.parameter_count(),
        "tokens_per_s": tokens / seconds,
        "ms_per_step": 1000 * seconds,
        "gflops": flops / 1e9,
        "matmul_gflops": peak / 1e9,
        "share_of_matmul": flops / peak,
        "ms": {part: 1000 * value for part, value in parts.items()},
    }
    what = f"{name}, batch {batch_size} x {shape[3]}, {figures['dtype']}"
    row = (what, f"{tokens / seconds:,.0f}", f"{1000 * seconds:.1f}", f"{flops / 1e9:,.0f}")
    return (*row, f"{flops / peak:.0%}", *(f"{1000 * value:.1f}" for value in parts.values())), figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="MODEL", help=f"{', '.join(SHAPES)} [those that fit the device]")
    parser.add_argument("--steps", type=int, default=30, help="steps to measure, after the warm-up")
    parser.add_argument("--dtype", nargs="+", default=["auto"], choices=("auto", *DTYPES), help="precisions [auto]")
    args, options = parser.parse_known_args()
    device = find_device("auto")
    unknown = set(args.shapes) - SHAPES.keys()
    if unknown:
        raise UserError(f"no model named {', '.join(unknown)}: there are {', '.join(SHAPES)}")
    names = args.shapes or [name for name in SHAPES if name != "gpt2" or device.type == "cuda"]
    rows = [("model", "tokens/s", "ms/step", "GFLOP/s", "MFU", "data, ms", "forward", "backward", "optimizer", "rest")]
    results = {}
    for name, dtype in itertools.product(names, args.dtype):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            row, results[f"{name}, {dtype}"] = measure(name, args.steps, dtype, options)
            os.chdir(ROOT)
        rows.append(row)
    show(f"training speed on {device_name(device)}", rows, results)
    for what, tokens, _, _, share, *_ in rows[1:]:
        show_row(device, what, f"{tokens} tokens/s", share)


if __name__ == "__main__":
    run_main(main)
