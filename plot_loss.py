"""Plot training curves from the logs of train.py and the scripts beside it.

python plot_loss.py train_20260101_120000.log                   one run; writes train_20260101_120000.png
python plot_loss.py first.log resumed.log -o curves.png         a resumed run continues its curve; others are compared
python plot_loss.py --band first_seed.log second_seed.log       runs that differ by their seed: their mean and spread
python plot_loss.py -n train_20260101_120000.log --follow       redraws while the training runs (-n may stand before)
python plot_loss.py --explain train_20260101_120000.log         says what went wrong, and what to change
"""

import io
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from base.configuration import Parser, UserError, run_main
from base.logs import EmptyLog, expert_loads, group_by_config, is_number, join_runs, series, smooth

PREDICTION = re.compile(r"predicted (\d+\.\d+) \((\d+\.\d+) to (\d+\.\d+), ")  # as plan.py writes it into a config
MANY = 6  # runs, from which on they are named beside the picture
PANELS = (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_s", "tokens/s"))


def draw(paths: list[str], output: str, log_x: bool, log_y: bool, band: bool = False) -> None:
    """Write the figure as PNG."""
    temporary = Path(output).with_name(f".{Path(output).name}.tmp.png")  # so that a viewer never sees a partial file
    save_figure(paths, temporary, "png", log_x, log_y, band)
    temporary.replace(output)


def svg(paths: list[str]) -> bytes:
    """The figure as SVG."""
    output = io.BytesIO()
    save_figure(paths, output, "svg")
    return output.getvalue()


def save_figure(
    paths: list[str],
    output: Path | io.BytesIO,
    form: str,
    log_x: bool = False,
    log_y: bool = False,
    band: bool = False,
) -> None:
    """Losses on top, learning rate, gradient norm and speed below.

    band: the losses of runs that differ by their seed alone as their mean and standard deviation.
    """
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    runs = join_runs(paths)
    panels = [field for field, _ in PANELS]
    if any(expert_loads(run["val"]) for run in runs.values()):
        panels.append("expert_load")
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic([["loss"] * len(panels), panels], height_ratios=[2.2, 1])
    # matplotlib hides labels with _ in front, and reads $...$
    labels = {name: f"{run['stage']} {name}".strip("_ ").replace("$", r"\$") for name, run in runs.items()}
    are_many = len(runs) > MANY
    colours = plt.colormaps["turbo"](np.linspace(0.05, 0.95, len(runs))) if are_many else [f"C{i}" for i in range(MANY)]
    for colour, (name, run) in zip(colours, runs.items(), strict=False):
        if not band:
            draw_losses(axes["loss"], run, labels[name], colour, is_marked=not are_many)
        if not are_many:
            draw_prediction(axes["loss"], run, labels[name], colour)
        for field, _ in PANELS:
            draw_curve(axes[field], *series(run["train"], field), colour, is_noisy=field == "tokens_per_s")
        if "expert_load" in axes:
            draw_expert_load(axes["expert_load"], run["val"], colour)
    if band:
        headers = {name: run["header"][0] if run["header"] else {} for name, run in runs.items()}
        for i, group in enumerate(group_by_config(headers)):
            draw_band(axes["loss"], [runs[name] for name in group], labels[group[0]], f"C{i}")
    axes["loss"].set(xlabel="step", ylabel="loss (nats per token)")
    handles, names = axes["loss"].get_legend_handles_labels()
    if are_many and not band:  # one line each, beside the picture
        kept = {name.removesuffix(": train"): handle for handle, name in zip(handles, names, strict=True)}
        kept = {name: handle for name, handle in kept.items() if name in labels.values()}
        size = max(3.0, min(8.0, 300 / len(kept)))  # points
        figure.legend(kept.values(), kept, loc="outside right upper", fontsize=size)
    else:
        axes["loss"].legend()
    for field, title in PANELS:
        axes[field].set(xlabel="step", title=title)
    axes["tokens_per_s"].set_ylim(bottom=0)
    for axis in axes.values():
        axis.grid(alpha=0.25)
        if log_x:
            axis.set_xscale("log")
    if log_y:
        axes["loss"].set_yscale("log")
    figure.savefig(output, dpi=120, format=form)
    plt.close(figure)


def draw_losses(axis: Any, run: dict[str, list[dict]], name: str, colour: Any, is_marked: bool) -> None:
    """The training loss, smoothed, and the validation loss with its standard error; is_marked: the best one is."""
    draw_curve(axis, *series(run["train"], "loss"), colour, is_noisy=True, label=f"{name}: train")
    steps, losses = series(run["val"], "val_loss")
    if not len(losses):
        return
    errors = [record.get("val_loss_se") for record in run["val"] if is_number(record.get("val_loss"))]
    bars = [max(0.0, error) if is_number(error) else 0.0 for error in errors]
    style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": ":"}
    what = "bound of validation" if any(record.get("is_bound") for record in run["val"]) else "validation"
    axis.errorbar(steps, losses, yerr=bars, label=f"{name}: {what}", **style)
    if not is_marked:
        return
    best = int(losses.argmin())
    axis.plot(steps[best], losses[best], marker="*", markersize=16, color=colour, markeredgecolor="black")
    text, place = f"best {losses[best]:.4f} at {steps[best]:,}", (steps[best], losses[best])
    axis.annotate(text, place, xytext=(-8, 14), textcoords="offset points", ha="right")


def draw_prediction(axis: Any, run: dict[str, list[dict]], name: str, colour: Any) -> None:
    """Of a planned run the loss that plan.py predicted for its end, and the interval of nine in ten."""
    config = run["header"][0].get("train_config") if run["header"] else None
    prediction = config.get("prediction") if isinstance(config, dict) else None
    if match := PREDICTION.match(str(prediction)):
        loss, low, high = map(float, match.groups())
        axis.axhline(loss, color=colour, linestyle="--", linewidth=1, label=f"{name}: predicted for the end")
        axis.axhspan(low, high, color=colour, alpha=0.08, linewidth=0)


def draw_band(axis: Any, runs: list[dict[str, list[dict]]], name: str, colour: Any) -> None:
    """The mean of several runs' losses, one standard deviation to both sides, at the steps that all of them have."""
    for kind, field, style in (("train", "loss", "-"), ("val", "val_loss", ":")):
        curves = [dict(zip(*map(np.ndarray.tolist, series(run[kind], field)), strict=True)) for run in runs]
        steps = sorted(set.intersection(*map(set, curves)))
        if not steps:
            continue
        losses = np.array([[curve[step] for step in steps] for curve in curves])  # (runs, steps)
        if kind == "train":
            losses = np.array([smooth(values, max(1, len(steps) // 50)) for values in losses])
        mean, deviation = losses.mean(0), losses.std(0, ddof=1) if len(runs) > 1 else 0
        label = f"{name}: {'train' if kind == 'train' else 'validation'}, {len(runs)} runs"
        axis.plot(steps, mean, color=colour, linestyle=style, label=label)
        axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.25, linewidth=0)


def draw_curve(
    axis: Any, steps: np.ndarray, values: np.ndarray, colour: Any, is_noisy: bool, label: str | None = None
) -> None:
    """A curve; a noisy one is pale, with its moving average over it."""
    if is_noisy:
        axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        values = smooth(values, max(1, len(values) // 50))
    axis.plot(steps, values, color=colour, linewidth=2 if is_noisy else 0.9, label=label)


def draw_expert_load(axis: Any, records: list[dict], colour: Any) -> None:
    """The load of every expert of every layer, relative to the mean, at the evaluations that have it."""
    loads = expert_loads(records)
    if loads:
        shares = np.stack([shares for _, shares in loads])  # (evaluations, layers, experts)
        relative = shares.reshape(len(loads), -1) * shares.shape[-1]
        axis.plot([step for step, _ in loads], relative, color=colour, alpha=0.4, linewidth=0.8)
    axis.set(xlabel="step", title="load per expert (1: balanced)", ylim=(0, None))


def explain(paths: list[str]) -> None:
    """Print what every run shows, and what to change."""
    from training import diagnosis  # imports torch, which takes a second: only here

    for name, run in join_runs(paths).items():
        for line in (f"{name}: {run['stage']}", *diagnosis.explain(run)):
            print("".join(c if c.isprintable() else "?" for c in line))  # a stranger's log commands no terminal


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("logs", nargs="*", metavar="LOG", help="log files")
    parser.add_argument("-n", "--names", nargs="+", default=[], metavar="LOG", help="log files, too")
    parser.add_argument("-o", "--output", help="figure to write [the first log's name with .png]")
    parser.add_argument("--follow", action="store_true", help="redraw whenever a log grows, until Ctrl-C")
    parser.add_argument("--explain", action="store_true", help="say what the logs show and what to change; no figure")
    parser.add_argument("--log_x", action="store_true", help="logarithmic step axis")
    parser.add_argument("--log_y", action="store_true", help="logarithmic loss axis")
    parser.add_argument("--band", action="store_true", help="mean and standard deviation of runs with other seeds")
    args, _ = parser.parse()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    names = [*args.logs, *args.names]
    if not names:
        raise UserError("command line: no log is named; `python plot_loss.py -n train_*.log` plots all of this folder")
    if args.explain:
        explain(names)
        return
    output = args.output or str(Path(names[0]).with_suffix("")) + "_band" * args.band + ".png"
    if not output.endswith(".png"):
        raise UserError(f"{output}: the file name must end in .png")
    if not Path(output).parent.is_dir():
        raise UserError(f"{output}: no such folder")
    drawn = None
    try:
        while True:
            sizes = [Path(name).stat().st_size if Path(name).exists() else 0 for name in names]
            if sizes != drawn:
                try:
                    draw(names, output, args.log_x, args.log_y, args.band)
                    print(output, flush=True)
                except EmptyLog as error:
                    if not args.follow:
                        raise
                    print(f"{error}: waiting", file=sys.stderr)
                drawn = sizes
            if not args.follow:
                return
            time.sleep(2)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    run_main(main)
