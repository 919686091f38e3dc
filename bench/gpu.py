"""One graphics card, measured with one command: GPU tests, speed and memory of every kind of run, in one table.

    make gpu                                    or: python bench/gpu.py; under 8 minutes, the table also in gpu.md
    python bench/gpu.py training kernels        these rows alone
    python bench/gpu.py --device cpu --tiny     toy sizes on a CPU, to see that the script runs

Every row is a process of its own with a time limit: one that fails says why in the table, and the others go on. What
they print, and tracebacks, go to gpu.log. Needed: torch with CUDA, numpy, tqdm; pytest and deepspeed for their rows.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_rows import ROOT, ROWS, Case, Line, NotHere, last_line

from base.configuration import UserError, run_main
from base.devices import device_name, find_device

MINUTES = 7.9  # for all rows together


def run_row(name: str, case: Case, log: str, connection: Any) -> None:
    """A row, in a process and a folder of its own; sends its lines."""
    os.setsid()  # so that a row that takes too long ends with all that it has started
    with open(log, "a") as file, tempfile.TemporaryDirectory() as folder:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.chdir(folder)
        print(f"\n==== {name}", flush=True)
        try:
            lines = ROWS[name][0](case)
        except NotHere as missing:
            lines = [(name, str(missing), "")]
        except BaseException as error:
            traceback.print_exc()
            lines = [(name, f"FAILED: {type(error).__name__}: {last_line(str(error))[:200]}", "")]
        os.chdir(ROOT)
        sys.stdout.flush()
    connection.send(lines)
    connection.close()


def lines_of(name: str, case: Case, log: str, seconds: float) -> list[Line]:
    """The lines of a row, or why there are none; ends it after so many seconds."""
    processes = multiprocessing.get_context("forkserver")  # its server has imported torch, but not touched the card
    processes.set_forkserver_preload(["torch", "torch._dynamo", "train"])
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=run_row, args=(name, case, log, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return [(name, f"FAILED: took longer than {seconds:.0f} s", "")]
        lines = receiver.recv()
        process.join(5)
        return lines
    except EOFError:
        return [(name, "FAILED: its process died without a word", "")]
    finally:
        with contextlib.suppress(ProcessLookupError):  # it, and all that it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def table(case: Case, lines: list[tuple[str, ...]]) -> str:
    where = f"{device_name(case.device)}, torch {torch.__version__}"
    rows = [(where, "here", "beside it", "seconds"), ("---",) * 4, *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)} [all]")
    parser.add_argument("--device", default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see whether the script runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all rows together [{MINUTES}]")
    parser.add_argument("--out", default="gpu.md", metavar="FILE", help="where the table goes, too [gpu.md]")
    args = parser.parse_args()
    if unknown := set(args.rows) - ROWS.keys():
        raise UserError(f"no row named {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    case = Case(find_device(args.device), args.tiny)
    out = Path(args.out).resolve()
    log, lines = out.with_suffix(".log"), []
    log.unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for name in args.rows or ROWS:
        start = time.monotonic()
        seconds = min(ROWS[name][1], deadline - start)
        print(f"{name} ...", end=" ", flush=True, file=sys.stderr)
        row = lines_of(name, case, str(log), seconds) if seconds > 1 else [(name, "no time was left", "")]
        taken = time.monotonic() - start
        print(f"{taken:.0f} s", file=sys.stderr)
        lines += [(*line, f"{taken:.0f}" if i == 0 else "") for i, line in enumerate(row)]
        out.write_text(table(case, lines), encoding="utf-8")  # what is known so far, should the rest be cut off
    print(table(case, lines), end="")


if __name__ == "__main__":
    run_main(main)
