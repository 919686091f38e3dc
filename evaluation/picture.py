"""perplexity.png: perplexity over the position in the window."""

import numpy as np

from base.files import atomic_write


def draw(path: str, losses: dict[str, np.ndarray], trained: int) -> None:
    """Write the picture, a line for each of the losses (block_size,); trained: the window of training."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    span = max(1, trained // 16)
    for label, values in losses.items():
        n = min(span, len(values))  # of a text that is shorter than the window there are few
        smooth = np.convolve(values, np.ones(n) / n, mode="valid")
        name = (label.removeprefix(", ") or "model").replace("$", r"\$")  # matplotlib reads $...$ as a formula
        axis.plot(np.arange(len(smooth)) + (n + 1) / 2, np.exp(smooth), label=name)
    axis.axvline(trained, color="grey", linestyle=":", label="trained window")
    axis.set(xlabel="position", ylabel="perplexity", yscale="log")
    axis.grid(alpha=0.25)
    axis.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
