"""Scaling of the cost of a training step with block_size, n_embd, batch_size and the number of processes.

    python bench/scaling.py

One quantity varies at a time, from 4 layers, 4 heads, n_embd 128, block_size 64, batch_size 16. The processes divide
among them the machine's threads and the micro-batches of a step (4 of 16 samples: strong scaling).
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measuring import ROOT, make_text, newest_records, show

from base.configuration import run_main

BASE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 16}
VARIED = {"block_size": (64, 128, 256, 512), "n_embd": (64, 128, 256, 512), "batch_size": (4, 16, 64)}
ONE_PROCESS = ["train.py"]


def step_seconds(script: list[str], fields: dict[str, int], steps: int = 12, threads: int | None = None) -> float:
    """Median time of a step in seconds, from the training log."""
    for log in Path().glob("train_*.log"):
        log.unlink()
    flags = [f for name, value in fields.items() for f in (f"--{name}", str(value))]
    flags += ["-t", "pretrain", "--max_steps", str(steps), "--eval_interval", "1000000", "--eval_iters", "1"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, *script[:-1], str(ROOT / script[-1]), *flags]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    times = [record["ms_per_step"] / 1000 for record in newest_records() if record["type"] == "train"]
    return statistics.median(times[2:])


def main() -> None:
    rows, results = [("varied", "ms/step", "tokens/s", "time relative to the row above")], {}

    def measure(name: str, script: list[str], fields: dict[str, int], above: str, threads: int | None = None) -> str:
        seconds = step_seconds(script, fields, threads=threads)
        tokens = fields["batch_size"] * fields["gradient_accumulation_steps"] * fields["block_size"] / seconds
        previous = results.get(above, {}).get("ms_per_step")
        ratio = f"{1000 * seconds / previous:.2f}" if previous else ""
        rows.append((name, f"{1000 * seconds:.1f}", f"{tokens:,.0f}", ratio))
        results[name] = {"ms_per_step": 1000 * seconds, "tokens_per_s": tokens}
        return name

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("text.txt").write_text(make_text(300_000, 65), encoding="utf-8")
        subprocess.run([sys.executable, ROOT / "data.py", "text.txt"], check=True, capture_output=True)
        for field, values in VARIED.items():
            above = ""
            for value in values:
                fields = {**BASE, "gradient_accumulation_steps": 1, field: value}
                above = measure(f"{field} {value}", ONE_PROCESS, fields, above)
        above, threads = "", torch.get_num_threads()
        for processes in (1, 2):
            launcher = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(processes),
                "train_ddp.py",
            ]
            fields = {**BASE, "gradient_accumulation_steps": 4}
            above = measure(f"processes {processes}", launcher, fields, above, max(1, threads // processes))
        os.chdir(ROOT)
    show("cost of a training step", rows, results)


if __name__ == "__main__":
    run_main(main)
