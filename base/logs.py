"""Training logs read back (training/run_log.py writes them), and series of numbers for plots."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import UserError

# fields that runs of a group differ in
OF_ONE_RUN = ("random_seed", "stage", "save_checkpoint_to", "from_checkpoint", "log_to")
MAX_NUMBER = 1e100  # no larger one is of use, and sums of them stay finite


class EmptyLog(UserError):
    """A log that has no loss of a training step yet."""


def read_log(path: str | Path, needs_loss: bool = True) -> dict[str, list[dict[str, Any]]]:
    """The records of a log by type: header, train, val. A last line that is still being written is left out.

    Raises UserError where the file is missing or is not a log, EmptyLog where there is no training step in it yet, or
    with needs_loss none that has a finite loss; without it validations are enough.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: {'not a file' if Path(path).exists() else 'no such log'}")
    records: dict[str, list[dict[str, Any]]] = {"header": [], "train": [], "val": []}
    for part in [part for part in (f"{path}.1", path) if Path(part).is_file()]:  # NAME.1: the part before max_log_mb
        with open(part, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    if record["type"] in ("train", "val") and not is_step(record["step"]):
                        raise ValueError("step")
                    if record["type"] == "spike" and is_step(record.get("back_to")):  # those steps were taken back
                        for kind in ("train", "val"):
                            records[kind] = [r for r in records[kind] if r["step"] <= record["back_to"]]
                    records.setdefault(record["type"], []).append(record)
                except (ValueError, KeyError, TypeError):
                    if line.endswith("\n"):
                        raise UserError(
                            f"{part}: line {number} is not a log record; logs are the train_*.log files"
                        ) from None
    if not records["train"] and (needs_loss or not records["val"]):
        raise EmptyLog(f"{path}: no training steps in it yet")
    if needs_loss and not len(series(records["train"], "loss")[0]):
        raise EmptyLog(f"{path}: no loss in it that is a finite number")
    return records


def join_runs(paths: list[str], needs_loss: bool = True) -> dict[str, dict[str, list[dict]]]:
    """Records by the name of the run; the log of a resumed run replaces the rest of its earlier log.

    Logs without a step, as of a run that was over when it was resumed, are left out with a warning, unless all are.
    needs_loss: as in read_log().
    """
    runs, empty = {}, []
    for path in paths:
        try:
            records = read_log(path, needs_loss)
        except EmptyLog as error:
            empty.append(error)
            continue
        header = records["header"][0] if records["header"] else {}
        start = header.get("resumed_from_step")
        start = start if is_step(start) else 0
        stage = str(header.get("stage") or "")
        earlier = [name for name, run in runs.items() if start and goes_on(run, header, start)]
        if earlier:
            run, spikes = runs[earlier[-1]], records.get("spike", [])
            back_to = [spike["back_to"] for spike in spikes if is_step(spike.get("back_to"))]  # may be before its start
            for kind in ("train", "val"):
                kept = [record for record in run[kind] if record["step"] <= min([start, *back_to])]
                run[kind] = kept + records[kind]
            run["header"], run["spike"] = records["header"], run.get("spike", []) + spikes
        else:
            stem = Path(path).stem
            is_unique = [Path(other).stem for other in dict.fromkeys(paths)].count(stem) == 1
            runs[stem if is_unique else str(Path(path).with_suffix(""))] = {**records, "stage": stage}
    if not runs:
        raise empty[0]
    for error in empty:
        warnings.warn(f"{error}: left out", stacklevel=2)
    return runs


def last_step(run: dict[str, Any]) -> int:
    """The last that its records tell of."""
    return max(run[kind][-1]["step"] for kind in ("train", "val") if run[kind])


def goes_on(run: dict[str, Any], header: dict[str, Any], start: int) -> bool:
    """Whether a log's header, resumed from the step start, is that of a run: by its stage, seed, network and folder.

    What a resumed run may change, as its learning rates, makes no difference, nor what a log does not say.
    """
    headers = run["header"][0] if run["header"] else {}, header
    was, now = (part(h, "train_config") for h in headers)
    interval = was.get("log_interval")
    last = last_step(run) + (interval if is_step(interval) and interval else 1)  # at least where it stopped
    shapes = [part(h, "model_config") for h in headers]
    folders = was.get("save_checkpoint_to"), now.get("from_checkpoint") and Path(str(now["from_checkpoint"])).parent
    is_elsewhere = all(folders) and len({Path(str(folder)).resolve().name for folder in folders}) > 1
    fields = shapes[0].keys() & shapes[1].keys() - {"dropout"}
    return (
        run["stage"] == str(header.get("stage") or "")
        and last > start
        and not is_elsewhere
        and all(was.get(name) == now.get(name) for name in ("random_seed", "use_lora"))
        and all(shapes[0][name] == shapes[1][name] for name in fields)
    )


def group_by_config(headers: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The names of runs {name: header of its log}, grouped: those of a group differ in nothing but their seed.

    Nor do the files make a difference that each of them starts from, and those that it writes, which the stage names.
    """
    groups: dict[str, list[str]] = {}
    for name, header in headers.items():
        config = {k: v for k, v in part(header, "train_config").items() if k not in OF_ONE_RUN}
        key = json.dumps([config, header.get("model_config")], sort_keys=True)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def seed_of(header: dict[str, Any]) -> Any:
    """The random seed of a run; None where its header names none."""
    return part(header, "train_config").get("random_seed")


def part(record: dict[str, Any], name: str) -> dict[str, Any]:
    """A dict in a record; empty where it is none."""
    return value if isinstance(value := record.get(name), dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number: null stands for others, and other programs write Infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def is_step(value: Any) -> bool:
    """Whether a value is the number of a step."""
    return type(value) is int and 0 <= value < 1 << 53


def series(records: list[dict[str, Any]], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,) of the records in which the field is a finite number."""
    found = [record for record in records if is_number(record.get(field))]
    return np.array([r["step"] for r in found], dtype=int), np.array([r[field] for r in found], dtype=float)


def expert_loads(records: list[dict]) -> list[tuple[int, np.ndarray]]:
    """Step and shares (layers, experts) of the evaluations that have them, of as many experts as the last of these."""
    found = []
    for record in records:
        layers = record.get("expert_load")
        layers = layers if isinstance(layers, list) and all(isinstance(layer, list) for layer in layers) else []
        shares = [share for layer in layers for share in layer]
        if shares and all(map(is_number, shares)) and len(set(map(len, layers))) == 1:
            found.append((record["step"], np.array(layers, dtype=float)))
    return [(step, shares) for step, shares in found if shares.shape == found[-1][1].shape]


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Centred moving average over about `span` values; the span shrinks near the ends, so that it never lags."""
    values = np.asarray(values, dtype=float)
    i = np.arange(len(values))
    half = np.minimum(span // 2, np.minimum(i, len(values) - 1 - i))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[i + half + 1] - total[i - half]) / (2 * half + 1)
