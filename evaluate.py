"""How well a model predicts a text, position by position: does it use a long context, and how far does it reach?

python evaluate.py book.txt -m checkpoint/pretrain.pt                                 within the trained window
python evaluate.py book.txt -m checkpoint/pretrain.pt --factor 4                      four times as far, unscaled
python evaluate.py book.txt -m checkpoint/pretrain.pt --factor 4 --scaling yarn ntk   and by rope_scaling: in columns

Prints perplexities and writes perplexity.png (-o).
"""

import math
from pathlib import Path

import numpy as np
import torch

from base.configuration import Parser, UserError, read_text, run
from model import GPT, ROPE_SCALING
from training.engine import find_device
from training.run_log import print_table
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model

N_RANGES = 8  # rows of the table


@torch.inference_mode()
def loss_by_position(model: GPT, ids: np.ndarray, n_windows: int, batch_size: int = 8) -> np.ndarray:
    """Mean cross-entropy in nats at every position of a window (block_size,), over windows spread over the text."""
    device = next(model.parameters()).device
    length = model.config.block_size + 1
    starts = np.linspace(0, len(ids) - length, min(n_windows, len(ids) // length)).astype(int)
    total = torch.zeros(length - 1, dtype=torch.float64)
    for first in range(0, len(starts), batch_size):
        rows = np.stack([ids[start : start + length] for start in starts[first : first + batch_size]]).astype(np.int64)
        windows = torch.from_numpy(rows).to(device)
        _, losses = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), reduction="none")
        total += losses.double().sum(0).cpu()
    return (total / len(starts)).numpy()


def draw(path: str, losses: dict[str, np.ndarray], trained: int) -> None:
    """Perplexity over position, a line for each way of reading on."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    span = max(1, trained // 16)
    for name, values in losses.items():
        smooth = np.convolve(values, np.ones(span) / span, mode="valid")
        axis.plot(np.arange(len(smooth)) + (span + 1) / 2, np.exp(smooth), label=name)
    axis.axvline(trained, color="grey", linestyle=":", label="trained window")
    axis.set(xlabel="position", ylabel="perplexity", yscale="log")
    axis.grid(alpha=0.25)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", help="a text that the model has not seen")
    parser.add_argument("-m", "--model", default="checkpoint/pretrain.pt", help="checkpoint [checkpoint/pretrain.pt]")
    parser.add_argument("-o", "--output", default="perplexity.png", help="picture to write [perplexity.png]")
    parser.add_argument("--factor", type=float, default=1.0, help="window over that of the training [1]")
    parser.add_argument(
        "--scaling", nargs="+", choices=ROPE_SCALING, default=[], help="rope_scaling to try beside none"
    )
    parser.add_argument("--windows", type=int, default=64, help="windows of the text to read [64]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    args, _ = parser.parse()
    if not 1 <= args.factor <= 1024 or args.windows < 1:
        raise UserError("command line: --factor must be between 1 and 1024, --windows at least 1")
    if not args.output.endswith(".png") or not Path(args.output).parent.is_dir():
        raise UserError(f"{args.output}: must be a picture's name (.png) in a folder that exists")
    checkpoint = load_checkpoint(args.model)
    ids = load_checkpoint_tokenizer(checkpoint, args.model).encode(read_text(args.file), special=True)
    trained = checkpoint["model_config"]["block_size"]
    changes = {"block_size": math.floor(trained * args.factor), "rope_factor": args.factor}
    if len(ids) <= changes["block_size"]:
        raise UserError(f"{args.file}: {len(ids)} tokens do not fill a window of {changes['block_size']}")
    if args.factor > 1 and not checkpoint["model_config"].get("use_rope", True):
        raise UserError(f"{args.model}: learned positions end at {trained}: --factor needs RoPE")
    losses = {}
    for scaling in dict.fromkeys(["none", *args.scaling]):
        model = load_model(checkpoint, args.model, **changes, rope_scaling=scaling).to(find_device(args.device)).eval()
        if not model.config.is_causal:
            raise UserError(f"{args.model}: with full attention there is no next token to predict")
        losses[scaling] = loss_by_position(model, ids, args.windows)
    rows = [("positions", *losses)]
    for part in np.array_split(np.arange(changes["block_size"]), min(N_RANGES, changes["block_size"])):
        values = (f"{math.exp(min(700.0, loss[part].mean())):.2f}" for loss in losses.values())
        rows.append((f"{part[0] + 1}-{part[-1] + 1}" + (" (beyond)" if part[0] >= trained else ""), *values))
    print_table(rows)
    draw(args.output, losses, trained)
    print(args.output)


if __name__ == "__main__":
    run(main)
