"""Time to loss: seconds from the start of train.py to a target loss on the whole validation split of a text file.

    python bench/time_to_loss.py tinyshakespeare.txt                one run
    python bench/time_to_loss.py tinyshakespeare.txt --seeds 3      three runs
    python bench/time_to_loss.py FILE --target 1.7 --max_steps 800  any field of the config

The baseline is nanoGPT's CPU command (4 layers, 4 heads, n_embd 128, block_size 64, batch_size 12), which reaches 1.886
on tinyshakespeare after 2,000 steps; config/shakespeare_fast.json has the same shape. A run with its settings is timed
first, on the same machine. Data preparation is not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from measuring import ROOT, newest_records, show, text_files

from base.configuration import UserError, run_main


def train_once(arguments: list[str]) -> tuple[float, float, int, float]:
    """(wall-clock seconds, best validation loss, steps, median tokens per second) of one run of train.py."""
    start = time.perf_counter()
    job = subprocess.run([sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if job.returncode:
        raise UserError(f"train.py failed: {job.stderr.strip().splitlines()[-1]}")
    records = newest_records()
    speed = statistics.median(record["tokens_per_s"] for record in records if record["type"] == "train")
    best = min(record["val_loss"] for record in records if record["type"] == "val")
    return seconds, best, records[-1]["step"], speed


def nanogpt_seconds() -> float:
    """Time of the baseline here: our loop with nanoGPT's architecture, batch size, optimizer, steps and evaluations."""
    architecture = ["--use_rope", "false", "--qk_norm", "false", "--mlp", "gelu", "--optimizer", "adamw"]
    length = ["--batch_size", "12", "--max_steps", "2000", "--eval_interval", "250", "--eval_iters", "5"]
    schedule = ["--learning_rate", "1e-3", "--min_lr", "1e-4", "--lr_schedule", "cosine", "--warmup_iters", "100"]
    schedule += ["--weight_decay", "0.1"]
    return train_once(["-t", "shakespeare_fast", *architecture, *length, *schedule, "--stage", "nanogpt"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="text file to train on")
    parser.add_argument("--target", type=float, default=1.886, help="target validation loss in nats [1.886]")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs; their seeds are 1337, 1338, ...")
    parser.add_argument("-t", "--training", default="shakespeare_fast", help="training config")
    args, options = parser.parse_known_args()
    (file,) = text_files([args.file])
    rows, results = [("seed", "seconds", "relative to nanoGPT", "validation loss", "steps", "tokens/s", "target")], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        subprocess.run([sys.executable, ROOT / "data.py", file], check=True, capture_output=True)
        nanogpt = nanogpt_seconds()
        for seed in range(1337, 1337 + args.seeds):
            seeded = ["-t", args.training, "--random_seed", str(seed), "--target_val_loss", str(args.target), *options]
            seconds, loss, steps, speed = train_once(seeded)
            reached = loss <= args.target
            verdict = "reached" if reached else f"missed by {loss - args.target:.3f}"
            ratio = f"{seconds / nanogpt:.2f}"
            rows.append((str(seed), f"{seconds:.1f}", ratio, f"{loss:.4f}", str(steps), f"{speed:,.0f}", verdict))
            results.append({"seed": seed, "seconds": seconds, "val_loss": loss, "steps": steps, "reached": reached})
        os.chdir(ROOT)
    print(f"baseline with nanoGPT's settings, 2,000 steps: {nanogpt:.1f} s")
    show(f"time to a validation loss of {args.target:g}", rows, {"runs": results, "nanogpt_seconds": nanogpt})


if __name__ == "__main__":
    run_main(main)
