"""How accurate the predictions of plan.py are: plans made and trained, predicted loss and time beside what was reached.

    python bench/plan_accuracy.py tinyshakespeare.txt world.txt --minutes 2 5
    python bench/plan_accuracy.py tinyshakespeare.txt --minutes 2 --grid        also twelve configs made by hand
    python bench/plan_accuracy.py world.txt --minutes 10 --keep bench/plans.jsonl   for bench/law_accuracy.py, too

Every plan is made and trained as a user does it, in a folder of its own. The texts should not be among the prior's
(bench/scaling_runs.py). A run's schedule follows the clock. Where a machine that others share let it read 5% less or
more than the tokens that were planned, it is trained a second time, for that many tokens however long they take: the
law's error without the clock's.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, newest_records, show, text_files

from base.configuration import UserError, run_main
from planning.recipe import Shape
from planning.text import open_text

NUMBERS = re.compile(
    r"predicted ([\d.]+) \(([\d.]+) to ([\d.]+), ([\d.]+)([KMB]) tokens\); "
    r"reached ([\d.]+)[^(]*\(([\d.]+)([KMB]) tokens"
)
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
PROBE = re.compile(r"a short run, \d+ x (\d+), (\d+), reached ([\d.]+) after ([\d,]+) tokens")


def run(script: str, *arguments: str) -> str:
    """The output of a script; raises UserError with its last line of errors where it fails."""
    job = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True)
    if job.returncode:
        raise UserError(f"{script} failed: {job.stderr.strip().splitlines()[-1]}")
    return job.stdout


def one_plan(minutes: float) -> dict[str, float | str]:
    """Plan for the text in dataset/ and train it."""
    began = time.perf_counter()
    plan = run("plan.py", "dataset/pretrain_train.bin", "--minutes", str(minutes))
    planned = time.perf_counter()
    out = run("train.py", "-t", "plan")
    ended = time.perf_counter()
    if not (found := NUMBERS.search(out)):
        raise UserError(f"train.py -t plan has printed no prediction beside a loss reached: {out[-500:]}")
    predicted, low, high, planned_tokens, planned_unit, reached, tokens, unit = found.groups()
    planned_tokens, tokens = float(planned_tokens) * UNITS[planned_unit], float(tokens) * UNITS[unit]
    predicted, low, high, reached = map(float, (predicted, low, high, reached))
    config, text = json.loads(Path("config/plan.json").read_text()), open_text(Path("dataset/pretrain_train.bin"))
    probe = PROBE.search(plan)
    at_planned = reached
    if abs(tokens / planned_tokens - 1) > 0.05:
        tokens_per_step = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
        steps = str(round(planned_tokens / tokens_per_step))
        run("train.py", "-t", "plan", "--decay_over", "steps", "--max_steps", steps, "--max_minutes", "null")
        at_planned = min(record["val_loss"] for record in newest_records() if record["type"] == "val")
    return {
        "n_embd": config["n_embd"],
        "window": config["block_size"],
        "planned_tokens": planned_tokens,
        "probe": [float(value.replace(",", "")) for value in probe.groups()] if probe else None,
        **text.record,
        "predicted": predicted,
        "low": low,
        "high": high,
        "reached": reached,
        "error": predicted / reached - 1,
        "read": tokens / planned_tokens,
        "at_planned": at_planned,
        "law_error": predicted / at_planned - 1,
        "planning": (planned - began) / 60 / minutes,
        "time": (ended - planned) / 60 / minutes - 1 if config["decay_over"] == "time" else None,  # None: ends early
    }


def best_of_grid(minutes: float) -> tuple[float, str]:
    """The lowest loss of twelve configs that a person might try in that time, and which one it was."""
    results = []
    shapes, batches, optimizers = (Shape(64, 128), Shape(128, 128), Shape(192, 128)), (8, 24), ("muon", "adamw")
    for shape, batch_size, optimizer in itertools.product(shapes, batches, optimizers):
        fields = shape.model_fields() | {
            "rope_theta": 10_000.0,
            "batch_size": batch_size,
            "gradient_accumulation_steps": 1,
            "optimizer": optimizer,
            "learning_rate": 3e-3,
            "min_lr": 0.0,
            "muon_learning_rate": 0.02,
            "weight_decay": 0.01,
            "lr_schedule": "linear",
            "warmup_iters": 20,
            "decay_over": "time",
            "max_minutes": minutes,
            "eval_interval": 1 << 30,
            "eval_iters": json.loads(Path("config/plan.json").read_text())["eval_iters"],
            "log_interval": 10,
            "dataset_path": [["dataset/pretrain_train.bin", "dataset/pretrain_val.bin"]],
        }
        Path("config/grid.json").write_text(json.dumps(fields))
        run("train.py", "-t", "grid")
        losses = [record["val_loss"] for record in newest_records() if record["type"] == "val"]
        results.append((min(losses), f"{shape.n_layer} x {shape.n_embd}, batch {batch_size}, {optimizer}"))
    return min(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="text files to plan for")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0])
    parser.add_argument("--grid", action="store_true", help="beside each plan the best of twelve configs made by hand")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="append to it what every plan has measured")
    args = parser.parse_args()
    files, keep = text_files(args.files), args.keep.resolve() if args.keep else None
    if keep and not keep.parent.is_dir():
        raise UserError(f"{args.keep}: no such folder")
    header = (
        "text",
        "minutes",
        "layers x width, window",
        "predicted",
        "reached",
        "error",
        "tokens read",
        "error at the tokens planned",
        "inside",
        "planning",
        "time",
    )
    rows, results = [header + ("best by hand",) * args.grid], []
    for file, minutes in itertools.product(files, args.minutes):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run("data.py", str(file))
            result = {"text": file.stem, "minutes": minutes, **one_plan(minutes)}
            is_inside = result["low"] <= result["at_planned"] <= result["high"]
            row = (
                file.stem,
                f"{minutes:g}",
                str(Shape(result["n_embd"], result["window"])),
                f"{result['predicted']:.3f} ({result['low']:.3f} to {result['high']:.3f})",
                f"{result['reached']:.3f}",
                f"{result['error']:+.1%}",
                f"{result['read']:.0%}",
                f"{result['law_error']:+.1%}",
                "yes" if is_inside else "no",
                f"{result['planning']:.0%}",
                "ends early" if result["time"] is None else f"{result['time']:+.1%}",
            )
            if args.grid:
                loss, which = best_of_grid(minutes)
                row += (f"{loss:.3f}: {which}",)
                result |= {"by_hand": loss}
            os.chdir(ROOT)
        if keep:
            with keep.open("a", encoding="utf-8") as output:
                output.write(json.dumps(result) + "\n")
        print(" | ".join(row), flush=True)
        rows.append(row)
        results.append(result)
    errors = sorted(abs(result["law_error"]) for result in results)
    summary = {
        "plans": results,
        "within_1_percent": sum(e <= 0.01 for e in errors) / len(errors),
        "within_3_percent": sum(e <= 0.03 for e in errors) / len(errors),
        "inside": sum(r["low"] <= r["at_planned"] <= r["high"] for r in results) / len(results),
    }
    show("plans: predicted and reached", rows, summary)


if __name__ == "__main__":
    run_main(main)
