"""Plot training curves from the logs of train.py and the scripts beside it.

python plot_loss.py -n train_20260101_120000.log                one run; writes train_20260101_120000.png
python plot_loss.py -n first.log resumed.log -o curves.png      a resumed run continues its curve; others are compared
python plot_loss.py -n train_20260101_120000.log --follow       redraws while the training runs
"""

import time
from pathlib import Path

import numpy as np

from base.configuration import Parser, UserError, run_main
from base.logs import read_log, series, smooth

PANELS = (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_s", "tokens/s"))


def join_runs(paths: list[str]) -> dict[str, dict[str, list[dict]]]:
    """Records by log name; the log of a resumed run replaces the rest of its stage's earlier log."""
    runs = {}
    for path in paths:
        records = read_log(path)
        header = records["header"][0] if records["header"] else {}
        start = header.get("resumed_from_step", 0)
        stage = header.get("stage")
        earlier = [name for name, run in runs.items() if run["stage"] == stage and run["train"][-1]["step"] >= start]
        if start and earlier:
            run = runs[earlier[-1]]
            for kind in ("train", "val"):
                run[kind] = [record for record in run[kind] if record["step"] <= start] + records[kind]
        else:
            runs[Path(path).stem] = {**records, "stage": stage}
    return runs


def draw(paths: list[str], output: str, log_x: bool, log_y: bool) -> None:
    """Write the figure: losses on top, learning rate, gradient norm and speed below."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    runs = join_runs(paths)
    panels = [field for field, _ in PANELS]
    if any("expert_load" in record for run in runs.values() for record in run["val"]):
        panels.append("expert_load")
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic([["loss"] * len(panels), panels], height_ratios=[2.2, 1])
    for i, (name, run) in enumerate(runs.items()):
        colour, name = f"C{i}", f"{run['stage']} {name}" if run["stage"] else name
        steps, losses = series(run["train"], "loss")
        axes["loss"].plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        axes["loss"].plot(
            steps, smooth(losses, max(1, len(losses) // 50)), color=colour, linewidth=2, label=f"{name}: train"
        )
        steps, losses = series(run["val"], "val_loss")
        if len(losses):
            _, errors = series(run["val"], "val_loss_se")
            bars = errors if len(errors) == len(losses) else None
            axes["loss"].errorbar(
                steps,
                losses,
                yerr=bars,
                color=colour,
                marker="o",
                markersize=4,
                linestyle=":",
                label=f"{name}: validation",
            )
            best = int(losses.argmin())
            axes["loss"].plot(
                steps[best], losses[best], marker="*", markersize=16, color=colour, markeredgecolor="black"
            )
            axes["loss"].annotate(
                f"best {losses[best]:.4f} at {steps[best]:,}",
                (steps[best], losses[best]),
                xytext=(-8, 14),
                textcoords="offset points",
                ha="right",
            )
        for field, _ in PANELS:
            steps, values = series(run["train"], field)
            axes[field].plot(steps, values, color=colour, alpha=0.3 if field == "tokens_per_s" else 0.9, linewidth=0.9)
            if field == "tokens_per_s":
                axes[field].plot(steps, smooth(values, max(1, len(values) // 50)), color=colour, linewidth=1.5)
        loads = [(record["step"], record["expert_load"]) for record in run["val"] if "expert_load" in record]
        for layer in range(len(loads[0][1]) if loads else 0):
            shares = np.array([load[layer] for _, load in loads]) * len(loads[0][1][layer])
            for expert in shares.T:
                axes["expert_load"].plot([step for step, _ in loads], expert, color=colour, alpha=0.4, linewidth=0.8)
    if "expert_load" in axes:
        axes["expert_load"].set(xlabel="step", title="load per expert (1: balanced)", ylim=(0, None))
    axes["loss"].set(xlabel="step", ylabel="loss (nats per token)")
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
    temporary = Path(output).with_name(f".{Path(output).name}.tmp.png")  # so that a viewer never sees a partial file
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(output)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("-n", "--names", nargs="+", required=True, metavar="LOG", help="log files")
    parser.add_argument("-o", "--output", help="figure to write [the first log's name with .png]")
    parser.add_argument("--follow", action="store_true", help="redraw whenever a log grows, until Ctrl-C")
    parser.add_argument("--log_x", action="store_true", help="logarithmic step axis")
    parser.add_argument("--log_y", action="store_true", help="logarithmic loss axis")
    args, _ = parser.parse()
    output = args.output or str(Path(args.names[0]).with_suffix(".png"))
    if not output.endswith(".png"):
        raise UserError(f"{output}: the file name must end in .png")
    if not Path(output).parent.is_dir():
        raise UserError(f"{output}: no such folder")
    drawn = None
    try:
        while True:
            sizes = [Path(name).stat().st_size if Path(name).exists() else 0 for name in args.names]
            if sizes != drawn:
                draw(args.names, output, args.log_x, args.log_y)
                print(output, flush=True)
                drawn = sizes
            if not args.follow:
                return
            time.sleep(2)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    run_main(main)
