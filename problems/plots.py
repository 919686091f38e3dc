"""The plots of problem.py --plot: training curves, accuracy by length, and the attention maps of every head."""

from pathlib import Path

import matplotlib
import numpy as np

from base.logs import read_log, series, smooth

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt


def draw_results(
    path: str, title: str, log: Path | None, by_length: dict[int, float], trained: range, unit: str
) -> None:
    """Loss and accuracy by step (if there is a log of the training), and accuracy by length (if there are several).

    by_length: exact-match accuracy by length; trained: the lengths of the training instances.
    """
    panels = (["loss", "accuracy"] if log else []) + (["length"] if len(by_length) > 1 or not log else [])
    figure, grid = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False)
    axes = dict(zip(panels, grid[0], strict=True))
    figure.suptitle(title)
    if log:
        records = read_log(str(log))
        steps, losses = series(records["train"], "loss")
        axes["loss"].plot(steps, losses, alpha=0.25)
        axes["loss"].plot(steps, smooth(losses, max(1, len(losses) // 50)), color="C0", label="training")
        axes["loss"].plot(*series(records["val"], "val_loss"), "o:", color="C1", label="validation")
        axes["loss"].set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
        axes["loss"].legend()
        steps, accuracies = series(records["val"], "accuracy")
        axes["accuracy"].plot(steps, 100 * accuracies, "o-", color="C1")
        axes["accuracy"].set(xlabel="step", ylabel="exact match, validation (%)", ylim=(-2, 102))
    if "length" in axes:
        for in_training, colour, label in ((True, "C2", "in training"), (False, "C3", "not in training")):
            lengths = [length for length in by_length if (length in trained) == in_training]
            if lengths:
                axes["length"].bar(lengths, [100 * by_length[i] for i in lengths], color=colour, label=label)
        axes["length"].set(xlabel=unit, ylabel="exact match, test (%)", ylim=(0, 102))
        axes["length"].xaxis.get_major_locator().set_params(integer=True)
        axes["length"].legend(loc="lower left")
    for axis in axes.values():
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_attention(path: str, title: str, maps: np.ndarray, tokens: list[str]) -> None:
    """Heat maps of attention weights (n_layer, n_head, T, T) over T tokens: layers from top to bottom, heads across."""
    n_layer, n_head, T, _ = maps.shape
    size = min(5.0, max(2.0, 0.17 * T))
    figure, grid = plt.subplots(
        n_layer,
        n_head,
        figsize=(size * n_head + 1, size * n_layer + 0.8),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    figure.suptitle(f"{title}\nattention weights: queries in rows, keys in columns", family="monospace")
    for layer in range(n_layer):
        for head in range(n_head):
            axis = grid[layer, head]
            image = axis.imshow(maps[layer, head], vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
            axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
            axis.set_xticks(range(T), tokens, fontsize=min(9, 45 * size / T), family="monospace")
            axis.set_yticks(range(T), tokens, fontsize=min(9, 45 * size / T), family="monospace")
            axis.tick_params(length=0)
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention weight")
    figure.savefig(path, dpi=120)
    plt.close(figure)
