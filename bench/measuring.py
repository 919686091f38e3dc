"""Shared by the benchmarks: result tables, synthetic text, and the peak rates of the machine."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    "show",
    "synchronise",
    "text_files",
]
