"""What a training run tells the world: a log file of JSON lines, the console, and TensorBoard or wandb when asked."""

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
    """Writes records to train_<time>.log in the working directory and shows them; silent where is_main is false."""

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
        self.is_main, self.path, self.sinks = is_main, None, []
        self.max_bytes = 1e6 * max_log_mb if max_log_mb else math.inf
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            desc=name,
            unit="step",
            disable=not is_main,
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 20,  # a file wants fewer lines than a terminal
        )
        if not is_main:
            return
        self.file, self.path = create_log_file()
        self.header = {"type": "header", **header}
        self.write(self.header)
        for sink in log_to:
            self.sinks.append(SINKS[sink](name, header))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; what JSON cannot say (inf, nan) becomes null."""
        if not self.is_main:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(plain, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.file.tell() > self.max_bytes:
            self.rotate()
        for sink in self.sinks:
            sink({k: v for k, v in plain.items() if isinstance(v, (int, float))}, record["type"])

    def rotate(self) -> None:
        """Begin the log anew; what it held until now becomes NAME.1, in place of an older one."""
        self.file.close()
        os.replace(self.path, f"{self.path}.1")
        self.file = open(self.path, "x", encoding="utf-8")  # noqa: SIM115
        self.file.write(json.dumps(self.header, ensure_ascii=False) + "\n")

    def step(self, record: dict[str, Any]) -> None:
        """A training record: into the log, and onto the progress bar."""
        self.write({"type": "train", **record})
        self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s", refresh=False)

    def message(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.is_main:
            self.file.close()
            for sink in self.sinks:
                sink(None, "close")


def create_log_file() -> tuple[Any, Path]:
    """A new train_<time>.log, never an existing one."""
    for attempt in range(100):
        suffix = f"_{attempt}" if attempt else ""
        path = Path(f"train_{time.strftime('%Y%m%d_%H%M%S')}{suffix}.log")
        try:
            return open(path, "x", encoding="utf-8"), path
        except FileExistsError:
            continue
    raise UserError("cannot find a free name for the log file train_<time>.log")


def tensorboard_sink(name: str, header: dict[str, Any]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            'log_to: tensorboard is not installed (pip install tensorboard), or take it out of "log_to"'
        ) from None
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
    try:
        import wandb
    except ImportError:
        raise UserError('log_to: wandb is not installed (pip install wandb), or take it out of "log_to"') from None
    run = wandb.init(project="nano", name=name, config=header)

    def sink(values: dict[str, float] | None, kind: str) -> None:
        if values is None:
            run.finish()
        elif "step" in values:
            run.log({f"{kind}/{key}": value for key, value in values.items() if key != "step"}, step=values["step"])

    return sink


SINKS = {"tensorboard": tensorboard_sink, "wandb": wandb_sink}


class Console:
    """A stream whose reader may leave, a closed terminal or pipe: from then on it is silent, and the run goes on."""

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
    """Turns the first Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) or SIGHUP (a closed terminal) into a flag.

    The step in hand then ends and is saved.

    A second one acts as it would have without; but launchers pass on what the terminal sent to their processes too, so
    what follows within two seconds is the same request.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    SAME = 2.0

    def __enter__(self) -> "StopRequest":
        self.requested_at: float | None = None
        signals = {name: getattr(signal, name) for name in self.NAMES if hasattr(signal, name)}
        if "SIGHUP" in signals and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            del signals["SIGHUP"]  # nohup: the run outlives its terminal
        self.previous = {number: signal.signal(number, self.request) for number in signals.values()}
        return self

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    def request(self, number: int, frame: FrameType | None) -> None:
        if self.requested_at is None:
            self.requested_at = time.monotonic()
        elif time.monotonic() > self.requested_at + self.SAME:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows as an aligned Markdown table, the first one its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
