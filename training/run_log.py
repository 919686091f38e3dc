"""Logging of a training run: a file of JSON lines, a progress bar, optionally TensorBoard and Weights & Biases.

Also what else ties a long run to its terminal: signals that ask it to stop, output streams that close.
"""

import importlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from base.configuration import UserError, silence


class RunLog:
    """Writes records to train_<time>.log in the working directory and to the console; does nothing unless is_main."""

    def __init__(
        self,
        is_main: bool,
        log_to: list[str],
        name: str,
        first_step: int,
        last_step: int | None,
        header: dict[str, Any],
        max_log_mb: float | None = None,
    ) -> None:
        self.is_main, self.path = is_main, None
        # first, as one that cannot be opened should leave neither a bar nor a log behind
        self.sinks = [SINKS[sink](name, header) for sink in log_to if is_main]
        self.max_bytes = 1e6 * max_log_mb if max_log_mb else math.inf
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            desc=name,
            unit="step",
            disable=not is_main,
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 20,  # seconds; output redirected to a file gets fewer lines
        )
        if not is_main:
            return
        self.file, self.path = create_log_file()
        self.has_failed = False
        self.header = {"type": "header", **header}
        self.append(self.header)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record as a line of JSON; inf and nan, which JSON has no words for, become null."""
        if not self.is_main:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.append(plain)
        if self.file.tell() > self.max_bytes:
            self.rotate()
        for sink in self.sinks:
            sink({k: v for k, v in plain.items() if isinstance(v, (int, float))}, record["type"])

    def append(self, record: dict[str, Any]) -> None:
        """Write a line, or nothing of it: where the disk is full, training goes on, and the log when there is room."""
        line, start = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"), self.file.tell()
        try:
            if self.file.write(line) < len(line):  # unbuffered: some of it may have found room
                raise OSError("the disk is full?")
        except OSError as error:
            self.file.truncate(start)
            self.file.seek(start)
            if not self.has_failed:
                self.message(f"warning: {self.path}: not written ({error.strerror or error}); training goes on without")
            self.has_failed = True

    def rotate(self) -> None:
        """Log rotation: the file is renamed to NAME.1, replacing an older one, and a new file starts."""
        self.file.close()
        os.replace(self.path, f"{self.path}.1")
        self.file = open(self.path, "xb", buffering=0)  # noqa: SIM115
        self.append(self.header)

    def step(self, record: dict[str, Any]) -> None:
        """Write a training record, and show loss and speed on the progress bar."""
        self.write({"type": "train", **record})
        self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s", refresh=False)

    def go_back(self, step: int) -> None:
        """Set the progress bar back."""
        self.bar.n = step
        self.bar.refresh()

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.is_main:
            self.file.close()
            for sink in self.sinks:
                sink(None, "close")


def create_log_file() -> tuple[Any, Path]:
    """Create a new train_<time>.log; an existing file is never overwritten."""
    for attempt in range(100):
        suffix = f"_{attempt}" if attempt else ""
        path = Path(f"train_{time.strftime('%Y%m%d_%H%M%S')}{suffix}.log")
        try:
            return open(path, "xb", buffering=0), path
        except FileExistsError:
            continue
    raise UserError("cannot find a free name for the log file train_<time>.log")


def tensorboard_sink(name: str, header: dict[str, Any]) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(f"runs/{name}_{time.strftime('%Y%m%d_%H%M%S')}")

    def sink(values: dict[str, float] | None, kind: str) -> None:
        if values is None:
            writer.close()
            return
        for key, value in values.items():
            if key != "step":
                writer.add_scalar(f"{kind}/{key}", value, values.get("step", 0))

    return sink


def wandb_sink(name: str, header: dict[str, Any]) -> Any:
    import wandb

    try:
        run = wandb.init(project="nano", name=name, config=header)
    except Exception as error:  # not logged in, no network: the type depends on its version
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"log_to: wandb: {reason}; or take it out of log_to") from None

    def sink(values: dict[str, float] | None, kind: str) -> None:
        if values is None:
            run.finish()
        elif "step" in values:
            run.log({f"{kind}/{key}": value for key, value in values.items() if key != "step"}, step=values["step"])

    return sink


# name -> factory of sink(values, kind), which logs a record; values None closes it
SINKS = {"tensorboard": tensorboard_sink, "wandb": wandb_sink}
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_sinks(names: list[str]) -> None:
    """Raises UserError for a sink whose library is not installed."""
    for name in names:
        try:
            is_installed = getattr(importlib.import_module(MODULES[name]), "__file__", None) is not None
        except ImportError:
            is_installed = False
        if not is_installed:  # also where a folder of that name lies here: wandb itself writes into wandb/
            raise UserError(f"log_to: {name} is not installed: `pip install {name}`, or take it out of log_to")


class Console:
    """An output stream that survives a broken pipe or closed terminal: further output is dropped, the run continues."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)


class StopRequest:
    """Graceful shutdown: the first Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) or SIGHUP (closed terminal) sets a flag.

    The loop then finishes its step and saves. A second signal has its default effect, but within two seconds of the
    first it is ignored: launchers forward to their processes the Ctrl-C that the terminal has sent to these as well.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    GRACE_SECONDS = 2.0

    def __enter__(self) -> "StopRequest":
        self.requested_at: float | None = None
        signals = {name: getattr(signal, name) for name in self.NAMES if hasattr(signal, name)}
        if "SIGHUP" in signals and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            del signals["SIGHUP"]  # started with nohup, which ignores SIGHUP: stay with that
        self.previous = {number: signal.signal(number, self.request) for number in signals.values()}
        return self

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    def request(self, number: int, frame: FrameType | None) -> None:
        if self.requested_at is None:
            self.requested_at = time.monotonic()
        elif time.monotonic() > self.requested_at + self.GRACE_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def amount(number: float) -> str:
    """A number of weights or tokens in three digits: 812K, 4.72M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows as an aligned Markdown table; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
