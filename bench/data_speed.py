"""Throughput and peak memory of data.py.

    python bench/data_speed.py                          character tokenizer on 10 and 100 MB, BPE on 10 MB
    python bench/data_speed.py --sizes 10 100 1000      characters also on 1,000 MB
    python bench/data_speed.py --file FILE              your own text, repeated to the size

Memory is the maximum resident set size of the process, which includes a constant part for imports such as torch.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, make_text, show

from base.configuration import UserError, run_main


def prepare(folder: Path, text: Path, options: list[str]) -> tuple[float, float]:
    """(MB/s, peak memory in MB) of data.py on a text file."""
    command = [sys.executable, ROOT / "bench" / "peak_memory.py", ROOT / "data.py", text, *options]
    job = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if job.returncode:
        raise UserError(f"data.py: {job.stderr.strip()}")
    size, seconds = re.search(r"([\d.]+) MB prepared in ([\d.]+) s", job.stdout).groups()
    return float(size) / max(0.05, float(seconds)), int(job.stdout.splitlines()[-1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100], help="MB of text")
    parser.add_argument("--file", help="text to repeat [default: random characters]")
    args = parser.parse_args()
    piece = Path(args.file).read_text(encoding="utf-8") if args.file else make_text(1_000_000, 200)
    rows, results = [("tokenizer, MB of text", "MB/s", "peak memory, MB")], {}
    for kind, sizes in {"char": args.sizes, "bpe": args.sizes[:1]}.items():
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                text = Path(folder) / "text.txt"
                with open(text, "w", encoding="utf-8") as file:
                    while file.tell() < size * 1_000_000:
                        file.write(piece)
                options = [] if kind == "char" else ["--tokenizer", "bpe", "--vocab_size", "4096"]
                speed, peak = prepare(Path(folder), text, options)
            rows.append((f"{kind}, {size}", f"{speed:.1f}", f"{peak:,.0f}"))
            results[f"{kind}, {size} MB"] = {"mb_per_s": speed, "peak_mb": peak}
    show("data preparation", rows, results)


if __name__ == "__main__":
    run_main(main)
