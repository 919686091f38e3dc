"""Shared by the benchmarks: result tables, synthetic text, time and memory of a function, the machine's peak rates."""

import itertools
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base.configuration import UserError  # noqa: E402
from base.devices import device_name, synchronise  # noqa: E402
from training.preflight import best_seconds, matmul_flops  # noqa: E402
from training.run_log import print_table  # noqa: E402


def show(title: str, rows: list[tuple[str, ...]], results: dict[str, Any]) -> None:
    """Print a table, whose first row is the header, and the results as one line of JSON."""
    print(f"\n{title}")
    print_table(rows)
    print(json.dumps({title: results, "machine": platform.machine(), "threads": torch.get_num_threads()}), flush=True)


def show_row(device: torch.device, *cells: str) -> None:
    """Print the row of this machine for a table of docs/measured.md, which has one for each machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"| {name}, torch {torch.__version__.split('+')[0]} | {' | '.join(cells)} |", flush=True)


def cpu_name() -> str:
    """What the processor calls itself, and how many threads torch runs on it."""
    info = Path("/proc/cpuinfo")  # Linux has it
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    n = torch.get_num_threads()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {n} thread{'s' * (n > 1)}"


def text_files(names: list[str]) -> list[Path]:
    """The files of these names; raises UserError for one that does not exist."""
    files = [Path(name).resolve() for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
    return files


def newest_records() -> list[dict[str, Any]]:
    """The records of the newest log in this folder."""
    log = max(Path().glob("train_*.log"), key=os.path.getmtime)
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def make_text(n_characters: int, vocabulary: int) -> str:
    """Random text over a vocabulary of that many characters, with a Zipf-like distribution, as in a language."""
    rng = np.random.default_rng(0)
    characters = (*map(ord, " \n"), *range(97, 123), *range(0x4E00, 0xD800), *range(0x20000, 0x30000))
    alphabet = np.array(characters[:vocabulary])
    weights = 1 / (np.arange(len(alphabet)) + 10.0)
    codes = rng.choice(alphabet, n_characters, p=weights / weights.sum())
    codes[: len(alphabet)] = alphabet  # each at least once
    return codes.astype("<u4").tobytes().decode("utf-32-le")


def seconds_of(work: Callable[[], Any], device: torch.device, n: int = 10, warm_up: int = 3) -> float:
    """Seconds of a call of work(), the mean of n: asked for together, so that a GPU does not wait for Python."""
    for _ in range(warm_up):
        work()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(n):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / n


def peak_bytes(device: torch.device, work: Callable[[], Any], is_total: bool = False) -> float:
    """Bytes of all tensors at the peak of work(), above those before it or in all; nan where torch does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = 0 if is_total else torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or is_total:  # on a CPU no one counts the tensors that were there before
        work()
        return math.nan
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(trace := f"{folder}/trace.json")
        events = json.loads(Path(trace).read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    changes = (event["args"]["Bytes"] for event in events)  # negative where memory is given back
    return max(itertools.accumulate(changes, initial=0))


def memory_bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Measured memory bandwidth in bytes per second: a matrix-vector product, its matrix far larger than the caches."""
    a = torch.ones(32768 if device.type == "cuda" else 8192, 8192, device=device, dtype=dtype)
    x = torch.ones(8192, device=device, dtype=dtype)
    return a.numel() * a.element_size() / best_seconds(device, lambda: a @ x)


__all__ = [
    "ROOT",
    "device_name",
    "make_text",
    "matmul_flops",
    "memory_bandwidth",
    "newest_records",
    "peak_bytes",
    "seconds_of",
    "show",
    "show_row",
    "synchronise",
    "text_files",
]
