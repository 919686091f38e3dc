"""Seconds from the start of train.py to a validation loss over all of the validation text, on a text file.

    python bench/time_to_loss.py tinyshakespeare.txt                one seed
    python bench/time_to_loss.py tinyshakespeare.txt --seeds 3      three
    python bench/time_to_loss.py FILE --target 1.7 --max_steps 800  any field of the config

nanoGPT's CPU command (4 layers, 4 heads, 128 wide, block 64, batch 12) reaches 1.886 on tinyshakespeare after 2,000
steps; config/shakespeare_fast.json has that shape. A run of that kind is timed first, in the same way. The text is
prepared before the clock starts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, newest_records, show

from base.configuration import UserError, run_main


def train_once(arguments: list[str]) -> tuple[float, float, int, float]:
    """(seconds of the process, best validation loss, steps, median tokens per second) of one run of train.py."""
    began = time.perf_counter()
    job = subprocess.run([sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if job.returncode:
        raise UserError(f"train.py ended with: {job.stderr.strip().splitlines()[-1]}")
    records = newest_records()
    speed = statistics.median(record["tokens_per_s"] for record in records if record["type"] == "train")
    best = min(record["val_loss"] for record in records if record["type"] == "val")
    return seconds, best, records[-1]["step"], speed


def nanogpt_seconds() -> float:
    """What nanoGPT's CPU command takes here: its network, batch, optimizer, 2,000 steps and evaluations in our loop."""
    network = ["--use_rope", "false", "--qk_norm", "false", "--mlp", "gelu", "--optimizer", "adamw"]
    length = ["--batch_size", "12", "--max_steps", "2000", "--eval_interval", "250", "--eval_iters", "40"]
    rates = ["--learning_rate", "1e-3", "--min_lr", "1e-4", "--lr_schedule", "cosine", "--warmup_iters", "100"]
    return train_once(["-t", "shakespeare_fast", *network, *length, *rates, "--stage", "nanogpt"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a text file")
    parser.add_argument("--target", type=float, default=1.886, help="validation loss in nats [default: 1.886]")
    parser.add_argument("--seeds", type=int, default=1, help="runs, with seeds from 1337 on")
    parser.add_argument("-t", "--training", default="shakespeare_fast", help="training config")
    args, options = parser.parse_known_args()
    file = Path(args.file).resolve()
    if not file.is_file():
        raise UserError(f"{args.file}: no such file")
    rows, results = [("seed", "seconds", "of nanoGPT's", "validation loss", "steps", "tokens/s", "target")], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        subprocess.run([sys.executable, ROOT / "data.py", file], check=True, capture_output=True)
        nanogpt = nanogpt_seconds()
        for seed in range(1337, 1337 + args.seeds):
            seeded = ["-t", args.training, "--random_seed", str(seed), "--target_val_loss", str(args.target), *options]
            seconds, loss, steps, speed = train_once(seeded)
            reached = loss <= args.target
            verdict = "reached" if reached else f"missed by {loss - args.target:.3f}"
            share = f"{seconds / nanogpt:.2f}"
            rows.append((str(seed), f"{seconds:.1f}", share, f"{loss:.4f}", str(steps), f"{speed:,.0f}", verdict))
            results.append({"seed": seed, "seconds": seconds, "val_loss": loss, "steps": steps, "reached": reached})
        os.chdir(ROOT)
    print(f"nanoGPT's kind of run, 2,000 steps, takes {nanogpt:.1f} s here")
    show(f"time to a validation loss of {args.target:g}", rows, {"runs": results, "nanogpt_seconds": nanogpt})


if __name__ == "__main__":
    run_main(main)
