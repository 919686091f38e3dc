"""The benchmarks that print a row for docs/measured.md: time and memory by kernel, training speed by precision."""

import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import attention_kernels
import measuring
import train_speed

CPU = torch.device("cpu")


def test_peak_bytes_are_those_of_the_tensors_alive_at_the_peak():
    kept = []

    def work():
        x = torch.empty(3_000_000, dtype=torch.uint8)
        y = torch.empty(1_000_000, dtype=torch.uint8)  # 4 MB with x: the peak
        del x, y
        kept.append(torch.empty(2_000_000, dtype=torch.uint8))

    assert measuring.peak_bytes(CPU, work) == 4_000_000
    assert measuring.peak_bytes(CPU, work) == 4_000_000  # what the first call kept was there before


def rows_in(out: str) -> list[list[str]]:
    """The rows for docs/measured.md: those of this machine."""
    lines = [line for line in out.splitlines() if line.startswith(f"| {measuring.cpu_name()}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def header_in_docs(command: str) -> list[str]:
    """The columns of the table that stands below a command in docs/measured.md."""
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8").split(f"\n{command}")[1]
    return [cell.strip() for cell in text[text.index("\n|") :].split("\n")[1].strip("|").split("|")]


def test_kernels_are_rows_of_the_table_in_the_docs(call):
    result = call("attention_kernels.py", "--size", "2", "4", "128", "8", "--dtype", "float32", "bfloat16")
    assert result.status == 0, result.err
    header, rows = header_in_docs("python bench/attention_kernels.py"), rows_in(result.out)
    assert [len(row) for row in rows] == [len(header)] * 2
    assert [row[1] for row in rows] == ["2 x 4 x 128 x 8, float32", "2 x 4 x 128 x 8, bfloat16"]
    by_kernel = dict(zip(header, rows[0], strict=True))
    assert by_kernel["cudnn"] == by_kernel["flex"] == ""  # which are for GPUs
    assert "ms" in by_kernel["flash"] and float(by_kernel["math"].split()[-1]) > 1  # memory over that of flash


def test_math_keeps_the_scores_and_flash_does_not():
    size, n_bytes = (2, 4, 256, 8), 4
    measured = attention_kernels.measure_kernels(size, CPU, torch.float32)
    scores = 2 * 4 * 256**2 * n_bytes
    assert measured["flash"][1] < scores < measured["math"][1]
    assert measured["cudnn"] == "RuntimeError"


def test_sizes_are_numbers_of_at_least_1(call):
    result = call("attention_kernels.py", "--size", "2", "0", "128", "8")
    assert result.status == 1 and result.err.startswith("error: --size takes four numbers of at least 1")


def test_training_speeds_are_rows_and_batches_are_halved_until_they_fit(call, monkeypatch):
    monkeypatch.setattr(train_speed, "SHAPES", {"small": (1, 2, 16, 16, 16, 50)})
    monkeypatch.setattr(train_speed, "loop_seconds", lambda arguments, steps: 0.5)  # without a process of train.py
    monkeypatch.setattr(train_speed, "memory_available", lambda device: 1000.0)
    monkeypatch.setattr(train_speed, "memory_estimate", lambda run, batch_size: 100.0 * batch_size)
    result = call("train_speed.py", "small", "--steps", "1", "--dtype", "float32", "bfloat16")
    assert result.status == 0, result.err
    header, rows = header_in_docs("python bench/train_speed.py wide"), rows_in(result.out)
    assert [len(row) for row in rows] == [len(header)] * 2
    # 4 of 16 samples: 400 of the 500 bytes, which are half of what there is
    assert [row[1] for row in rows] == ["small, batch 4 x 16, float32", "small, batch 4 x 16, bfloat16"]
    assert {row[2] for row in rows} == {"128 tokens/s"}
