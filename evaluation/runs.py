"""Runs that differ by their seed alone: their losses, and the interval of their mean.

    for rows, notes in tables(["train_1.log", "train_2.log"]): ...     # a group of runs, and what to know of it

Whether two configs differ is told by how far their means lie apart, beside how far runs of one config do.
"""

import math
import warnings
from collections.abc import Iterator

import numpy as np

from base.configuration import UserError
from base.logs import group_by_config, is_number, join_runs, last_step, seed_of, series
from evaluation.statistics import mean_interval


def tables(logs: list[str]) -> Iterator[tuple[list[tuple[str, ...]], list[str]]]:
    """Rows and notes of each group of runs; raises UserError where no log has a validation yet.

    Losses are nan where a run has diverged: then there is no mean, which would be that of the others alone.
    """
    joined = join_runs(logs, needs_loss=False)
    runs = {name: run for name, run in joined.items() if run["val"]}
    if not runs:
        raise UserError(f"{logs[0]}: no validation loss in it yet")
    for name in [name for name in joined if name not in runs]:
        warnings.warn(f"{name}: no validation loss in it yet: left out", stacklevel=2)
    headers = {name: run["header"][0] if run["header"] else {} for name, run in runs.items()}
    for group in group_by_config(headers):
        seeds = [str(seed_of(headers[name])) for name in group]
        steps = [last_step(runs[name]) for name in group]
        losses = np.full((len(group), 2), math.nan)  # last and best
        for row, name in zip(losses, group, strict=True):
            last, finite = runs[name]["val"][-1].get("val_loss"), series(runs[name]["val"], "val_loss")[1]
            row[:] = last if is_number(last) else math.nan, finite.min() if len(finite) else math.nan
        rows = [("run", "seed", "steps", "last val loss", "best val loss")]
        for name, seed, step, values in zip(group, seeds, steps, losses, strict=True):
            rows.append((name, seed, str(step), *("not finite" if math.isnan(v) else f"{v:.4f}" for v in values)))
        notes = []
        if len(group) > 1 and np.isnan(losses).any():
            notes.append("a run has diverged: no mean, which would be that of the others alone")
        elif len(group) > 1:
            summaries = [mean_interval(column) for column in losses.T]
            rows.append(("mean", "", "", *(f"{mean:.4f}" for mean, _, _ in summaries)))
            rows.append(("standard deviation", "", "", *(f"{deviation:.4f}" for _, deviation, _ in summaries)))
            intervals = (f"{mean - half:.4f} to {mean + half:.4f}" for mean, _, half in summaries)
            rows.append(("95% interval of the mean", "", "", *intervals))
        if min(steps) < 0.99 * max(steps):
            notes.append(f"runs of different length, {min(steps):,} to {max(steps):,} steps: not only seeds differ")
        if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
            notes.append(f"several runs have the seed {min(twice)}: they say nothing about how much runs differ")
        yield rows, notes
