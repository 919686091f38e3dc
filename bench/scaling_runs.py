"""The runs that plan.py's prior is made of: sizes and amounts of tokens on a text, each with its own full decay.

    python bench/scaling_runs.py novels.txt dickens.txt     appends them to planning/runs.jsonl, and fits prior.json

Runs that the file has already are left out, so that it can be ended and started again. One text takes 5 to 20 minutes.
The file as it is has most of this grid for five texts, and a few longer runs; for eight more three or four runs. What
they are: docs/plan.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, text_files

import plan
from base.configuration import run_main
from planning.law import PRIOR, RUNS, Prior, read_runs
from planning.machine import Clock
from planning.recipe import Shape, recipe
from planning.text import open_text

GRID = [  # width, window, tokens; the quick ones first
    (64, 128, 60e3),
    *((48, 128, 120e3), (96, 128, 120e3), (48, 128, 350e3), (64, 128, 350e3), (128, 128, 120e3), (96, 128, 350e3)),
    *((48, 128, 1e6), (64, 64, 350e3), (64, 256, 350e3), (128, 128, 350e3), (64, 128, 2e6), (48, 128, 3e6)),
]
VALIDATION_TOKENS = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="text files, one text each")
    args = parser.parse_args()
    files = text_files(args.files)
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    done = {(run["text"], run["n_embd"], run["window"], run["asked"]) for run in map(json.loads, lines)}
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            subprocess.run([sys.executable, ROOT / "data.py", file], check=True, capture_output=True)
            text = open_text(Path("dataset/pretrain_train.bin"))
            for n_embd, window, tokens in GRID:
                if (file.stem, n_embd, window, tokens) in done:
                    continue
                shape = Shape(n_embd, window)
                fields = {"eval_iters": max(1, round(VALIDATION_TOKENS / window / 100))}
                result = plan.probe(shape, text.fields | fields | recipe(shape, tokens), Clock(0))
                record = {
                    "text": file.stem,
                    "n_embd": n_embd,
                    "window": window,
                    "asked": tokens,
                    "tokens": result.tokens,
                    "unique": text.unique,
                    "vocab": text.vocab_size,
                    "unigram": text.baselines["unigram"],
                    "ngram_share": round(text.ngram_share, 6),
                    "loss": result.loss,
                }
                with RUNS.open("a", encoding="utf-8") as output:
                    output.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)
            os.chdir(ROOT)
    prior = Prior.of_texts(read_runs())
    values = {"mean": prior.mean.round(6).tolist(), "covariance": prior.covariance.round(8).tolist()}
    PRIOR.write_text(json.dumps(values) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
