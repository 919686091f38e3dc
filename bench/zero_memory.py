"""Memory per parameter of train_deepspeed.py, for every ZeRO stage and offload, in two processes on the CPU.

    python bench/zero_memory.py

Peak resident memory of a process that trains 25M parameters on a tiny batch, minus that of the same run with 0.1M
parameters. On a CPU the offloaded states are in the same memory, so the results show what offload costs the host.
Saving is not measured: a gathered checkpoint needs the full model in the first process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SHAPES = {"small": ["--n_layer", "1", "--n_head", "2", "--n_embd", "64"]}
SHAPES["large"] = ["--n_layer", "8", "--n_head", "8", "--n_embd", "512"]
TINY_BATCH = ["--block_size", "16", "--batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "4"]
ADAMW = ["--optimizer", "adamw", "--device", "cpu", "--dtype", "float32", "--eval_iters", "1", "--eval_interval", "100"]


def peak_memory(folder: Path, config: str, shape: list[str]) -> float:
    """Peak resident memory in bytes, the maximum over both processes, until the run starts to save."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", ROOT / "train_deepspeed.py"]
    command += ["--deepspeed_config", f"deepspeed_{config}", "-t", "pretrain", *shape, *TINY_BATCH, *ADAMW]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    job = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = 0
    while job.poll() is None and not list(folder.glob("checkpoint/.*.tmp")):
        for process in psutil.Process(job.pid).children(recursive=True):
            try:
                if "RANK" in process.environ() and "train_deepspeed.py" in str(process.cmdline()[2:3]):
                    peak = max(peak, process.memory_info().rss)
            except psutil.Error:
                continue
        time.sleep(0.02)
    job.communicate()
    if job.returncode:
        sys.exit(f"error: training with {config} failed; try {command}")
    return peak


def main() -> None:
    results = {}
    for config in CONFIGS:
        peaks, n_parameters = {}, {}
        for name, shape in SHAPES.items():
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                (folder / "text.txt").write_text("to be or not to be\n" * 500)
                subprocess.run(
                    [sys.executable, ROOT / "data.py", "text.txt"], cwd=folder, check=True, capture_output=True
                )
                peaks[name] = peak_memory(folder, config, shape)
                log = next(folder.glob("train_*.log")).read_text().splitlines()
                n_parameters[name] = json.loads(log[0])["n_parameters"]
        difference = n_parameters["large"] - n_parameters["small"]
        results[config] = (peaks["large"] - peaks["small"]) / difference
        print(f"{config:15} {results[config]:5.1f} bytes per parameter and process", flush=True)
    print(json.dumps({"zero_memory": results, "processes": 2, "parameters": difference}))


if __name__ == "__main__":
    main()
