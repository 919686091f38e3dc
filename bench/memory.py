"""The estimate of a training run's memory against its measured peak, for the presets and for other shapes.

    python bench/memory.py                      all that a CPU can run: 31 runs, some minutes
    python bench/memory.py pretrain experts     those whose names begin so
    python bench/memory.py gpu gpt2             the presets for graphics cards, with small batches
    python bench/memory.py --repeats 3          the mean of so many runs, their smallest and their largest peak

Every run is a process of its own: train.py with three steps, an evaluation and a save. Measured is the peak of its
resident memory, minus that of the same run with a negligible model: what Python, torch and the data take. How much of
it is the waste of glibc's malloc shows with less of it (see bench/NOTES.md):

    GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0 python bench/memory.py
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, make_text

import train
from base.configuration import UserError, run_main
from base.process import peak_resident_memory
from training.engine import Engine
from training.memory import memory_estimate
from training.setup import read_configs

RUNS = {  # name: (data, options of train.py); data: a text of so many different characters, or the built-in world
    "pretrain": ("world", "-t pretrain"),
    "sft": ("world", "-t sft"),
    "sft_lora": ("world", "-t sft_lora"),
    "dpo": ("world", "-t dpo"),
    "distill": ("world", "-t distill"),
    "sort": (65, "--problem sort"),
    "grpo": (65, "-t grpo"),
    "shakespeare": (65, "-t shakespeare"),
    "shakespeare_fast": (65, "-t shakespeare_fast"),
    "shakespeare_experts": (65, "-t shakespeare_experts"),
    "gpu_16gb": (8000, "-t gpu_16gb --batch_size 2 --gradient_accumulation_steps 2"),
    "gpu_24gb": (50000, "-t gpu_24gb --batch_size 2 --gradient_accumulation_steps 1 --max_steps 2"),
    "gpu_40gb": (50000, "-t gpu_40gb --batch_size 1 --gradient_accumulation_steps 1 --max_steps 2"),
    "gpt2_124m": (50000, "-t gpt2_124m --batch_size 1 --gradient_accumulation_steps 2 --max_steps 2"),
    "vocabulary 8,000, adamw": (8000, "--optimizer adamw"),
    "vocabulary 32,000": (32000, "--batch_size 16"),
    "vocabulary 32,000, adamw": (32000, "--batch_size 16 --optimizer adamw"),
    "vocabulary 50,000, sgd": (50000, "--batch_size 8 --optimizer sgd --n_layer 2"),
    "untied": (8000, "--optimizer adamw --tie_embeddings false"),
    "accumulation": (8000, "--optimizer adamw --gradient_accumulation_steps 4"),
    "batch 1": (65, "--batch_size 1 --n_layer 8 --n_embd 256"),
    "batch 64": (2000, "--batch_size 64 --block_size 256 --n_embd 128"),
    "block 512": (2000, "--batch_size 8 --block_size 512 --n_embd 256 --optimizer adamw"),
    "gelu": (2000, "--mlp gelu --optimizer adamw --n_embd 256"),
    "relu2, sgd": (2000, "--mlp relu2 --optimizer sgd --n_embd 256"),
    "learned positions": (2000, "--use_rope false --qk_norm false --optimizer adamw"),
    "grouped queries": (2000, "--n_kv_head 1 --n_embd 256"),
    "dropout": (2000, "--dropout 0.1 --n_embd 256"),
    "windows": (2000, "--attention_window 64,0 --block_size 256 --n_embd 256"),
    "documents": (2000, "--mask_documents true --block_size 256 --n_embd 256"),
    "experts": (2000, "--n_expert 8 --n_hidden 176"),
    "experts, adamw": (2000, "--n_expert 4 --n_expert_per_token 1 --optimizer adamw"),
    "bfloat16": (2000, "--dtype bfloat16 --n_embd 256"),
    "wide": (2000, "--n_layer 2 --n_embd 768 --batch_size 4"),
    "deep": (65, "--n_layer 16 --n_embd 128 --batch_size 8"),
}
FOR_GPUS = ("gpu_", "gpt2_")
FEW = "--dtype float32 --max_steps 3 --warmup_iters 1 --lr_decay_iters 3 --eval_iters 1 --eval_interval 1000"
NEGLIGIBLE = "-t pretrain --n_layer 1 --n_head 1 --n_embd 2 --block_size 8 --batch_size 1"


def measure(options: list[str]) -> None:
    """Run train.py with these options in this process; print its estimate and its peak in bytes."""
    args, overrides = train.make_parser().parse(options)
    asked = read_configs(args.training, args.model, overrides)
    with contextlib.redirect_stdout(sys.stderr):
        run = train.train_stage(asked, Engine, options)
    print(json.dumps({"estimated": memory_estimate(run, run.config.batch_size), "peak": peak_resident_memory()}))


def measured(options: str) -> dict[str, float]:
    """measure() in a process of its own."""
    command = [sys.executable, __file__, "--measure", *f"{FEW} {options}".split()]
    job = subprocess.run(command, capture_output=True, text=True)
    if job.returncode:
        raise UserError(f"{options}: {job.stderr.strip().splitlines()[-1]}")
    return json.loads(job.stdout.splitlines()[-1])


def prepare(data: str | int) -> None:
    """The token files of a run, in this folder."""
    if data == "world":
        os.mkdir("dataset")
        for name in ("world.py", "everyday.py"):  # they write beside themselves
            shutil.copy(ROOT / "dataset" / name, "dataset")
        subprocess.run([sys.executable, "dataset/world.py"], check=True, capture_output=True)
        samples = [json.loads(line) for line in Path("dataset", "sft.jsonl").read_text(encoding="utf-8").splitlines()]
        asked = [sample for sample in samples if "question" in sample]  # others are conversations
        pairs = [{"prompt": p["question"], "chosen": p["answer"], "rejected": p["answer"][::-1] + "."} for p in asked]
        Path("dataset", "dpo.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        subprocess.run([sys.executable, ROOT / "data.py"], check=True, capture_output=True)
    else:
        text = make_text(40_000 + data, data)
        Path("text.txt").write_text(text.replace("\n", "\n<|bos|>"), encoding="utf-8")
        subprocess.run([sys.executable, ROOT / "data.py", "text.txt"], check=True, capture_output=True)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        return measure(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RUN", help="beginnings of names [all]")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each [1]")
    args = parser.parse_args()
    ratios = []
    print("| run | options | estimated, MB | measured, MB | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bases = {}
        for name, (data, options) in RUNS.items():
            if not name.startswith(tuple(args.names)) if args.names else name.startswith(FOR_GPUS):
                continue
            place = Path(folder, str(data))
            if data not in bases:
                place.mkdir()
                os.chdir(place)
                prepare(data)
                bases[data] = measured(NEGLIGIBLE)["peak"]
            os.chdir(place)
            options = options if "-t" in options.split() or "--problem" in options else f"-t pretrain {options}"
            results = [measured(options) for _ in range(args.repeats)]
            estimated, peaks = results[0]["estimated"] / 1e6, [(r["peak"] - bases[data]) / 1e6 for r in results]
            peak = sum(peaks) / len(peaks)
            spread = f" ({min(peaks):,.0f} to {max(peaks):,.0f})" if len(peaks) > 1 else ""
            ratios.append(estimated / peak)
            print(f"| {name} | `{options}` | {estimated:,.0f} | {peak:,.0f}{spread} | {ratios[-1]:.2f} |", flush=True)
        os.chdir(ROOT)
    print(f"\nwithin 10%: {sum(0.9 <= ratio <= 1.1 for ratio in ratios)} of {len(ratios)}")


if __name__ == "__main__":
    run_main(main)
