"""The runs that plan.py's prior is made of: sizes and amounts of tokens on a text, each with its own full decay.

    python bench/scaling_runs.py novels.txt dickens.txt     appends them to planning/runs.jsonl, and fits prior.json
    python bench/scaling_runs.py *.txt --jobs 12            so many runs at once: for a graphics card with many cores
    python bench/scaling_runs.py sums.txt --runs 64,128,2e6 128,128,1e6     these widths, windows and tokens

Runs that the file has already are left out, so that it can be ended and started again. One text takes an hour or two on
a CPU, most of it for the two longest runs. Not every text of the file has the whole grid, and some have other runs
beside it. What they are: docs/plan.md.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, text_files

import plan
from base.configuration import UserError, run_main
from base.files import atomic_write
from planning.law import PRIOR, RUNS, Prior, read_runs, records
from planning.machine import Clock
from planning.recipe import DEPTHS, WINDOWS, Shape, recipe
from planning.text import open_text

GRID = [  # width, window, tokens; the quick ones first, then by how much is learnt from them
    *((64, 128, 60e3), (96, 128, 120e3), (64, 128, 350e3), (128, 128, 350e3)),
    *((128, 128, 10e6), (64, 128, 1e6), (128, 128, 3e6), (96, 256, 10e6), (128, 256, 1e6), (192, 256, 20e6)),
]
VALIDATION_TOKENS = 60_000


def prepare(file: Path, folder: str) -> None:
    """The text's token files, in a folder of its own."""
    job = subprocess.run([sys.executable, ROOT / "data.py", file], cwd=folder, capture_output=True, text=True)
    if job.returncode:
        raise UserError(job.stderr.strip().splitlines()[-1].removeprefix("error: "))


def width_window_tokens(value: str) -> tuple[int, int, float]:
    """Of the option --runs."""
    try:
        width, window, tokens = value.split(",")
        run = int(width), int(window), float(tokens)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a run is WIDTH,WINDOW,TOKENS, such as 64,128,2e6; got {value}") from None
    if run[0] not in DEPTHS or run[1] not in WINDOWS:
        raise argparse.ArgumentTypeError(f"{value}: widths are {', '.join(map(str, DEPTHS))}, windows {WINDOWS}")
    return run


def one_run(name: str, folder: str, n_embd: int, window: int, tokens: float) -> dict[str, Any]:
    """A line of runs.jsonl."""
    os.chdir(folder)
    torch.set_num_threads(1)
    text, shape = open_text(Path("dataset/pretrain_train.bin")), Shape(n_embd, window)
    fields = {"eval_iters": max(1, round(VALIDATION_TOKENS / window / 100)), "dtype": "float32", "compile": "false"}
    result = plan.probe(shape, text.fields | fields | recipe(shape, tokens), Clock(0))
    return {
        "text": name,
        "n_embd": n_embd,
        "window": window,
        "asked": tokens,
        "tokens": result.tokens,
        **text.record,
        "loss": result.loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="text files, one text each")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once [1]")
    add = parser.add_argument
    add("--runs", nargs="+", type=width_window_tokens, metavar="WIDTH,WINDOW,TOKENS", help="instead of the usual ones")
    args = parser.parse_args()
    files = text_files(args.files)
    if args.jobs < 1 or len({file.stem for file in files}) < len(files):
        raise UserError("--jobs is at least 1, and every text needs a name of its own")
    done = {(run["text"], run["n_embd"], run["window"], run["asked"]): run for run in records()}
    start = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(args.jobs, mp_context=start) as pool:
        folders = {file: Path(place, file.stem) for file in files}
        for folder in folders.values():
            folder.mkdir()
        list(pool.map(prepare, folders, map(str, folders.values())))
        asked = [(file, *run) for run in args.runs or GRID for file in files]
        known = [(file, *run) for file, *run in asked if (file.stem, *run) in done]
        for file, *run in known:
            unique = open_text(folders[file] / "dataset/pretrain_train.bin").unique
            if unique != done[file.stem, *run]["unique"]:
                raise UserError(
                    f"{file}: {RUNS.name} has a text of this name that is another: give it a name of its own"
                )
        print(f"{len(known)} of {len(asked)} runs are in {RUNS.name} already", file=sys.stderr)
        asked = [run for run in asked if run not in known]
        runs = {pool.submit(one_run, file.stem, str(folders[file]), *run): (file.stem, *run) for file, *run in asked}
        failed = 0
        try:
            for run in as_completed(runs):
                if error := run.exception():  # of this run alone: the others go on
                    print(f"{runs[run]}: {str(error) or type(error).__name__}", file=sys.stderr)
                    failed += 1
                    continue
                record = json.dumps(run.result())
                with RUNS.open("a", encoding="utf-8") as output:
                    output.write(record + "\n")
                print(record, flush=True)
        except BaseException:  # Ctrl-C: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    prior = Prior.of_texts(read_runs())
    values = {"mean": prior.mean.round(6).tolist(), "covariance": prior.covariance.round(8).tolist()}
    with atomic_write(PRIOR) as output:
        output.write((json.dumps(values) + "\n").encode())
    if failed:
        raise UserError(f"{failed} of {len(runs)} runs failed; what they said is above")


if __name__ == "__main__":
    run_main(main)
