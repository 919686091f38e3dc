"""bench/gpu.py, which is for a graphics card, on a CPU: rows run; one that fails or hangs leaves the others alone."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import gpu
import gpu_rows
import plain_gpt
import torch


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]


def test_rows_are_lines_of_one_table_which_is_also_in_a_file(tmp_path):
    command = [sys.executable, ROOT / "bench" / "gpu.py", "kernels", "masked", "half"]
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "table.md")]
    job = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert job.returncode == 0, job.stderr
    assert job.stdout == Path(tmp_path / "table.md").read_text()
    rows = cells(job.stdout)
    assert {len(row) for row in rows} == {4} and rows[1] == ["---"] * 4
    assert not any("FAILED" in row[1] for row in rows), job.stdout
    by_name = {row[0].split(",")[0]: row for row in rows}
    assert by_name["attention by flash"][2].startswith("1.00 x the time of flash")
    assert "does not run here" in by_name["attention by cudnn"][1]  # that is for NVIDIA's cards
    assert by_name["masked"][1].startswith("needs CUDA")
    assert "tokens/s, loss" in by_name["float16 with a loss scale"][1]
    assert (tmp_path / "table.log").exists()


@pytest.mark.real("waits for rows that hang")
def test_a_row_that_fails_hangs_or_dies_says_so(tmp_path):
    program = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import gpu, gpu_rows, torch
def fails(case): raise ValueError("two\\nlines")
def hangs(case): time.sleep(100)
def dies(case): os._exit(3)
gpu_rows.ROWS |= {"fails": (fails, 30), "hangs": (hangs, 3), "dies": (dies, 30)}
if __name__ == "__main__":
    case = gpu_rows.Case(torch.device("cpu"), True)
    for name in ("fails", "hangs", "dies"):
        print(gpu.lines_of(name, case, "log", gpu_rows.ROWS[name][1]))
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "program.py", str(ROOT / "bench")]
    job = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert job.stdout.splitlines() == [
        "[('fails', 'FAILED: ValueError: lines', '')]",
        "[('hangs', 'FAILED: took longer than 3 s', '')]",
        "[('dies', 'FAILED: its process died without a word', '')]",
    ], job.stderr


def test_the_plain_gpt_beside_has_gpt2s_size_and_learns():
    model = plain_gpt.PlainGPT(12, 12, 768, 1024, 50257)
    biases = 12 * (2 * 768 + 2304 + 768 + 3072 + 768) + 768  # of GPT-2's layers, which this one lacks
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 - biases
    small = plain_gpt.PlainGPT(1, 2, 32, 16, 20)
    idx = torch.arange(16)[None] % 5
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    first = small(idx[:, :-1], idx[:, 1:])
    assert abs(first.item() - torch.tensor(20.0).log().item()) < 0.3
    for _ in range(60):
        optimizer.zero_grad()
        (loss := small(idx[:, :-1], idx[:, 1:])).backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_every_row_has_a_limit_and_all_fit_into_the_time_of_a_lent_card():
    assert gpu.MINUTES < 8 and all(limit <= 150 for _, limit in gpu_rows.ROWS.values())
