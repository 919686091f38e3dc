"""Training speed: tokens and operations per second, against the machine's own rate, and where a step's time goes.

    python bench/train_speed.py                     every shape that this device has room for
    python bench/train_speed.py --steps 10 tiny     fewer steps, one shape

The headline is train.py's own, a process with its log and progress bar, the median step. The parts are timed one by one
in a second run. The machine's rate is that of torch's matrix product in the training dtype, measured just before.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, device_name, make_text, matmul_flops, newest_records, show, synchronise

import train
from base.configuration import UserError, run_main
from base.devices import find_device
from training.engine import Engine
from training.setup import Run, build_run, read_configs

WARM_UP = 3
SHAPES = {  # layers, heads, width, block, batch, vocabulary
    "tiny": (4, 4, 128, 64, 12, 65),
    "wide": (2, 4, 512, 512, 100, 2114),
    "gpt2": (12, 12, 768, 1024, 16, 50304),
}
CPU_BATCH = {"wide": 10}  # a step of 100 would take a minute


def arguments_of(shape: tuple[int, ...], batch_size: int, options: list[str]) -> list[str]:
    names = ("n_layer", "n_head", "n_embd", "block_size")
    flags = [f for name, value in zip(names, shape, strict=False) for f in (f"--{name}", str(value))]
    flags += ["--batch_size", str(batch_size), "--gradient_accumulation_steps", "1", "--warmup_iters", "1"]
    return ["-t", "pretrain", *flags, *options]


def loop_seconds(arguments: list[str], steps: int) -> float:
    """Median seconds of a step of train.py, as its log has them."""
    never = ["--max_steps", str(steps + WARM_UP), "--eval_interval", "1000000", "--eval_iters", "1"]
    subprocess.run([sys.executable, ROOT / "train.py", *arguments, *never], check=True, capture_output=True)
    times = [record["ms_per_step"] / 1000 for record in newest_records() if record["type"] == "train"]
    return statistics.median(times[WARM_UP:])


def parts_seconds(arguments: list[str], steps: int) -> tuple[dict[str, float], float, Run]:
    """Median seconds of a step's parts, the matrix product's FLOP/s, and the run."""
    args, overrides = train.make_parser().parse(arguments)
    asked = read_configs(args.training, args.model, overrides)
    training = build_run(asked, Engine(asked.training))
    engine, times = training.engine, {part: [] for part in ("data", "forward", "backward", "optimizer")}
    peak = matmul_flops(engine.device, engine.dtype)

    def lap(part: str) -> None:
        nonlocal began
        synchronise(engine.device)
        times[part].append(time.perf_counter() - began)
        began = time.perf_counter()

    def timed_loss(*arguments):
        loss = training.loss(*arguments)
        lap("forward")
        return loss

    for step in range(WARM_UP + steps):
        began = time.perf_counter()
        (batch,) = training.batches.at(step * training.batches.samples_per_step)
        lap("data")
        engine.forward_backward(timed_loss, batch, batch.count, is_last=True)
        lap("backward")
        engine.step(0.01)
        lap("optimizer")
    return {part: statistics.median(values[WARM_UP:]) for part, values in times.items()}, peak, training


def measure(name: str, steps: int, on_cpu: bool, options: list[str]) -> tuple[tuple[str, ...], dict]:
    """A row of the table, and the same as figures."""
    *shape, batch_size, vocabulary = SHAPES[name]
    batch_size = CPU_BATCH.get(name, batch_size) if on_cpu else batch_size
    Path("text.txt").write_text(make_text(20 * shape[3] * batch_size + 2 * vocabulary, vocabulary), encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "data.py", "text.txt"], check=True, capture_output=True)
    arguments = arguments_of(shape, batch_size, options)
    seconds = loop_seconds(arguments, steps)
    parts, peak, training = parts_seconds(arguments, steps)
    parts["the rest"] = max(0.0, seconds - sum(parts.values()) + parts["data"])  # data is made meanwhile
    tokens = batch_size * shape[3]
    flops = tokens * training.model.flops_per_token() / seconds
    figures = {
        "batch_size": batch_size,
        "parameters": training.model.parameter_count(),
        "tokens_per_s": tokens / seconds,
        "ms_per_step": 1000 * seconds,
        "gflops": flops / 1e9,
        "matmul_gflops": peak / 1e9,
        "share_of_matmul": flops / peak,
        "ms": {part: 1000 * value for part, value in parts.items()},
    }
    row = (f"{name}, batch {batch_size}", f"{tokens / seconds:,.0f}", f"{1000 * seconds:.1f}", f"{flops / 1e9:,.0f}")
    return (*row, f"{flops / peak:.0%}", *(f"{1000 * value:.1f}" for value in parts.values())), figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--steps", type=int, default=30, help="steps that count")
    args, options = parser.parse_known_args()
    device = find_device("auto")
    unknown = set(args.shapes) - SHAPES.keys()
    if unknown:
        raise UserError(f"no shape named {', '.join(unknown)}: there are {', '.join(SHAPES)}")
    names = args.shapes or [name for name in SHAPES if name != "gpt2" or device.type == "cuda"]
    rows = [
        ("shape", "tokens/s", "ms/step", "GFLOP/s", "of matmul", "data", "forward", "backward", "optimizer", "rest")
    ]
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            row, results[name] = measure(name, args.steps, device.type == "cpu", options)
            os.chdir(ROOT)
        rows.append(row)
    show(f"training speed on {device_name(device)}", rows, results)


if __name__ == "__main__":
    run_main(main)
