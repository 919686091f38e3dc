"""Preference optimization on a synthetic task: preference accuracy and sampled answers, before and after.

    python bench/preferences.py                     dpo, ipo, simpo and orpo: a minute on 2 CPU cores
    python bench/preferences.py simpo --steps 200

To "say WORD" the chosen answer is "gladly, WORD", the rejected one "hardly, WORD". A model is fine-tuned on either of
the two at random (SFT), then tuned to prefer the chosen ones. Answers to 200 words that occur in no training line are
sampled at temperature 1.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, newest_records, show

from base.configuration import UserError, run_main
from serving.text_generator import GenerationConfig, load_text_generator
from training.losses import PREFERENCES

SHAPE = ["--n_layer", "2", "--n_head", "4", "--n_embd", "64", "--block_size", "32"]
DATA = '[["dataset/dpo_train.bin", "dataset/dpo_val.bin"]]'
OPTIONS = {  # on top of config/dpo.json, which is meant for larger models
    "dpo": ["--dpo_beta", "0.3"],
    "ipo": ["--dpo_beta", "0.3"],
    "simpo": ["--dpo_beta", "2"],
    "orpo": ["--dpo_beta", "0.5"],
}


def make_pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Preference pairs for 2,000 words to train on and for 200 held-out ones, all different."""
    words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=5)]
    pairs = [
        {"prompt": f"say {word}", "chosen": f"gladly, {word}", "rejected": f"hardly, {word}"}
        for word in random.Random(0).sample(words, 2200)
    ]
    return pairs[:2000], pairs[2000:]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(script: str, *arguments: str) -> None:
    job = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True)
    if job.returncode:
        raise UserError(f"{script} failed: {job.stderr.strip().splitlines()[-1]}")


def answer_rates(checkpoint: str, held_out: list[dict[str, str]]) -> tuple[float, float]:
    """Of sampled answers to held-out words: the fraction that is polite, and the fraction that repeats the word."""
    generator = load_text_generator(checkpoint, "cpu", True, [])
    polite = right = 0
    for i, pair in enumerate(held_out):
        answer = "".join(generator.answer(pair["prompt"], GenerationConfig(max_length=32, temperature=1.0, seed=i)))
        polite += answer.startswith("gladly")
        right += answer in (pair["chosen"], pair["rejected"])
    return polite / len(held_out), right / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=f"{', '.join(PREFERENCES)} [all]")
    parser.add_argument("--steps", type=int, default=100, help="steps of preference optimization")
    args = parser.parse_args()
    if unknown := set(args.losses) - PREFERENCES.keys():
        raise UserError(f"no preference loss named {', '.join(unknown)}: there are {', '.join(PREFERENCES)}")
    rows, results = [("loss", "preference accuracy", "polite answers", "word repeated")], {}
    pairs, held_out = make_pairs()

    def tune(stage: str, loss: str, steps: int, rate: str) -> None:
        options = ["--max_steps", str(steps), "--learning_rate", rate, "--stage", stage, "--dataset_path", DATA]
        run("train.py", "-t", "dpo", "--loss", loss, *OPTIONS[loss], *options)
        accuracy = [r["preference_accuracy"] for r in newest_records() if r["type"] == "val"][-1]
        polite, right = answer_rates(f"checkpoint/{stage}_last.pt", held_out)
        rows.append((stage, f"{accuracy:.0%}", f"{polite:.0%}", f"{right:.0%}"))
        results[stage] = {"accuracy": accuracy, "polite": polite, "right": right}

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_jsonl(Path("dpo.jsonl"), pairs)
        kinds = random.Random(2).choices(("chosen", "rejected"), k=len(pairs))
        asked = [{"question": pair["prompt"], "answer": pair[kind]} for pair, kind in zip(pairs, kinds, strict=True)]
        write_jsonl(Path("sft.jsonl"), asked)
        run("data.py", "sft.jsonl", "dpo.jsonl", "--block_size", "32")
        run("train.py", "-t", "sft", "--from_checkpoint", "", *SHAPE, "--max_steps", "600", "--optimizer", "muon")
        tune("before", "simpo", 1, "1e-12")  # the fine-tuned model as it is: one step with a negligible learning rate
        for name in args.losses or PREFERENCES:
            tune(name, name, args.steps, "1e-3")
        os.chdir(ROOT)
    show("preference optimization", rows, results)


if __name__ == "__main__":
    run_main(main)
