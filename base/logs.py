"""Training logs read back (training/run_log.py writes them), and series of numbers for plots."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError


def read_log(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a log by type: header, train, val. A last line that is still being written is left out.

    Raises UserError where the file is missing, is not a log, or has no training step yet.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: {'not a file' if Path(path).exists() else 'no such log'}")
    records: dict[str, list[dict[str, Any]]] = {"header": [], "train": [], "val": []}
    for part in [part for part in (f"{path}.1", path) if Path(part).is_file()]:  # NAME.1: the part before max_log_mb
        with open(part, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    records.setdefault(record["type"], []).append(record)
                except (ValueError, KeyError, TypeError):
                    if line.endswith("\n"):
                        raise UserError(
                            f"{part}: line {number} is not a log record; logs are the train_*.log files"
                        ) from None
    if not records["train"]:
        raise UserError(f"{path}: no training steps in it yet")
    return records


def series(records: list[dict[str, Any]], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,) of the records that have the field."""
    pairs = [(r["step"], r[field]) for r in records if r.get(field) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Centred moving average over about `span` values; the span shrinks near the ends, so that it never lags."""
    values = np.asarray(values, dtype=float)
    i = np.arange(len(values))
    half = np.minimum(span // 2, np.minimum(i, len(values) - 1 - i))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[i + half + 1] - total[i - half]) / (2 * half + 1)
