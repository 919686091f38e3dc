"""plan.png: the loss over the time there is, for several sizes, and the plan among them."""

from pathlib import Path
from typing import Any

import numpy as np

from base.files import atomic_write


def draw(
    output: Path, curves: dict[str, np.ndarray], plan: Any, probe: tuple[float, float] | None, bits: float
) -> None:
    """Write the picture.

    curves: by the name of a size, (n, 4): minutes, loss, and its interval; the first is the plan's own size.
    plan: with minutes, loss, low, high. probe: minutes and loss, as measured. bits: per character, of a nat.
    """
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for i, (name, curve) in enumerate(curves.items()):
        minutes, loss, low, high = curve.T
        axis.plot(minutes, loss, f"C{i}", label=name, linewidth=2.2 if i == 0 else 1.2)
        if i == 0:
            axis.fill_between(minutes, low, high, color="C0", alpha=0.15, linewidth=0)
    if probe:
        axis.plot(*probe, "o", color="grey", markersize=4, label="the probe: measured")
    error = [[plan.loss - plan.low], [plan.high - plan.loss]]
    axis.errorbar(
        plan.minutes, plan.loss, error, fmt="o", color="black", capsize=4, label="the plan, nine in ten", zorder=5
    )
    axis.set(xscale="log", xlabel="minutes of training", ylabel="validation loss (nats per token)")
    axis.secondary_yaxis("right", functions=(lambda x: x * bits, lambda x: x / bits)).set_ylabel("bits per character")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25, which="both")
    axis.legend()
    with atomic_write(output) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
