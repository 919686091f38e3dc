"""The trainings of the working directory, as their logs tell: for the page, which follows them."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base.logs import is_number, is_step
from serving.requests import BadRequest

NEWEST = 20  # logs that are listed
HEAD, TAIL = 1 << 20, 1 << 19  # bytes of a log that are read for the list
QUIET_SECONDS = 120  # after which a run that writes nothing has ended


class TrainingLogs:
    """The newest train_*.log files of a folder."""

    def __init__(self, folder: Path, draw: Callable[[list[str]], bytes]) -> None:
        """draw(paths): the curves of logs as SVG."""
        self.folder, self.draw = folder, draw
        self.drawn: tuple[Any, bytes] = None, b""  # the newest figure, and of what
        self.read: dict[str, tuple[Any, dict[str, Any]]] = {}  # name -> (size and time, what is in it)

    def files(self) -> dict[str, Path]:
        """By name, the newest first."""
        dated = []
        for file in self.folder.glob("train_*.log"):
            if file.is_file() and not file.is_symlink():
                dated.append((file.stat().st_mtime, file))
        return {file.name: file for _, file in sorted(dated, reverse=True)[:NEWEST]}

    def runs(self) -> list[dict[str, Any]]:
        """What to know of each training, the newest first."""
        found = {}
        for name, file in self.files().items():
            state = file.stat()
            mark = state.st_size, state.st_mtime_ns
            found[name] = self.read[name] if self.read.get(name, (None,))[0] == mark else (mark, summary(file))
        self.read = found
        now = time.time()
        return [{**run, **ending(run, now - mark[1] / 1e9)} for mark, run in found.values()]

    def curves(self, names: list[str]) -> bytes:
        """The curves of some of these logs as SVG; raises UserError."""
        files = self.files()
        if not names or not set(names) <= files.keys() or len(names) > NEWEST:
            raise BadRequest("log must be the name of one of the logs that /training lists", "log")
        mark = [(name, files[name].stat().st_size) for name in names]
        if mark != self.drawn[0]:
            self.drawn = mark, self.draw([str(files[name]) for name in names])
        return self.drawn[1]


def summary(file: Path) -> dict[str, Any]:
    """What the beginning and the end of a log tell of its training."""
    with open(file, "rb") as log:
        head = log.read(HEAD).split(b"\n")[0]
        log.seek(max(0, file.stat().st_size - TAIL))
        lines = log.read(TAIL).split(b"\n")
    records = [record for record in map(parse, [head, *lines]) if record]
    of_kind = lambda kind: [record for record in records if record.get("type") == kind]  # noqa: E731
    header = (of_kind("header") or [{}])[0]
    config = header.get("train_config") if isinstance(header.get("train_config"), dict) else {}
    trained = [record for record in of_kind("train") if is_step(record.get("step"))]
    evaluated = [record for record in of_kind("val") if is_number(record.get("val_loss"))]
    stage = str(header.get("stage") or config.get("stage") or "")
    last, newest = (trained or [{}])[-1], (evaluated or [{}])[-1]
    speeds = [record["ms_per_step"] for record in trained[-50:] if is_number(record.get("ms_per_step"))]
    number = lambda value: value if is_number(value) else None  # noqa: E731
    return {
        "name": file.name,
        "stage": stage,
        "step": last.get("step"),
        "max_steps": number(config.get("max_steps")),
        "loss": number(last.get("loss")),
        "val_loss": newest.get("val_loss"),
        "best_val_loss": number(newest.get("best_val_loss")),
        "best_checkpoint": f"{stage}{'_lora' * bool(config.get('use_lora'))}.pt" if evaluated else None,
        "tokens_per_s": number(last.get("tokens_per_s")),
        "ms_per_step": sum(speeds) / len(speeds) if speeds else None,
    }


def ending(run: dict[str, Any], quiet: float) -> dict[str, Any]:
    """Whether a training still runs, which nothing was heard of for some seconds, and the seconds that it needs yet."""
    step, last, pace = run["step"] or 0, run["max_steps"] or math.inf, (run["ms_per_step"] or 0) / 1000
    is_running = step < last and quiet < QUIET_SECONDS + 10 * pace
    left = (last - step) * pace if is_running and pace and math.isfinite(last) else None
    return {"running": is_running, "seconds_left": left}


def parse(line: bytes) -> dict[str, Any] | None:
    """A record; None for a line that is not whole."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
