"""A/B comparison of options of the model or the training: validation losses of paired runs, over several seeds.

    python bench/comparing.py tinyshakespeare.txt --steps 600 --seeds 3 \
        --a "--n_hidden 352" --b "--n_expert 8 --n_expert_per_token 2 --n_hidden 176"

Both runs of a pair share the seed, the data, the number of steps and all other fields (config/shakespeare_fast.json).
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile

from measuring import ROOT, show, text_files
from time_to_loss import train_once

from base.configuration import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="text file to train on")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3, help="number of pairs; their seeds are 1337, 1338, ...")
    parser.add_argument("-t", "--training", default="shakespeare_fast", help="training config")
    parser.add_argument("--a", default="", help="options of run a")
    parser.add_argument("--b", required=True, help="options of run b")
    args = parser.parse_args()
    (file,) = text_files([args.file])
    rows, results = [("seed", "a", "b", "b - a", "time b / a")], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        subprocess.run([sys.executable, ROOT / "data.py", file], check=True, capture_output=True)
        for seed in range(1337, 1337 + args.seeds):
            pair = []
            for name, options in {"a": args.a, "b": args.b}.items():
                shared = ["-t", args.training, "--random_seed", str(seed), "--max_steps", str(args.steps)]
                seconds, loss, _, _ = train_once([*shared, "--stage", name, *shlex.split(options)])
                pair.append((loss, seconds))
            (a, seconds_a), (b, seconds_b) = pair
            rows.append((str(seed), f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}", f"{seconds_b / seconds_a:.2f}"))
            results.append({"seed": seed, "a": a, "b": b})
        os.chdir(ROOT)
    mean = statistics.mean(pair["b"] - pair["a"] for pair in results)
    rows.append(("mean", "", "", f"{mean:+.4f}", ""))
    show(f"validation loss, a: {args.a or 'the preset'}; b: {args.b}", rows, {"runs": results, "mean": mean})


if __name__ == "__main__":
    run_main(main)
