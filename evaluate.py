"""How good is a model? Its perplexity on a text, position by position, or the share of questions it answers exactly.

python evaluate.py book.txt -m checkpoint/pretrain.pt                                 within the trained window
python evaluate.py book.txt -m checkpoint/pretrain.pt --factor 4                      four times as far, unscaled
python evaluate.py book.txt -m checkpoint/pretrain.pt --factor 4 --scaling yarn ntk   and by rope_scaling: in columns
python evaluate.py --questions dataset/held_out.jsonl -m checkpoint/sft.pt            exact match of greedy answers

Perplexity by position shows whether a long context helps, and how far a model reads; a picture goes to perplexity.png.
"""

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from base.configuration import Parser, UserError, escape_control_characters, read_text, run_main
from base.devices import find_device
from layers.rope import ROPE_SCALING
from model import GPT
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator
from text.corpus import BadLines, Source, conversations
from training.run_log import print_table
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model

N_RANGES = 8  # rows of the table of perplexities

# ------------------------------------------------------------------------------------------------------ questions


def exact_match(generator: TextGenerator, path: str, n_shown: int) -> tuple[int, int]:
    """(right, all) greedy answers to the questions of a fine-tuning file; prints the first n_shown wrong ones.

    Of a conversation the last answer is asked for, after the turns before it.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    asked = [messages for _, messages in conversations(Source(Path(path), is_jsonl=True), BadLines(0))]
    if not asked:
        raise UserError(f"{path}: no questions in it")
    config = GenerationConfig(max_length=generator.model.config.block_size, temperature=0.0)
    n_right = 0
    for messages in tqdm(asked, desc="asking", unit="question", delay=1, leave=False, dynamic_ncols=True):
        *history, question, expected = messages
        answer = "".join(generator.answer(question["content"], config, history))
        is_right = answer.strip() == expected["content"].strip()
        n_right += is_right
        if not is_right and n_shown > 0:
            n_shown -= 1
            said = escape_control_characters(answer)
            tqdm.write(f"wrong: {question['content']!r} -> {said!r}, expected {expected['content']!r}")
    return n_right, len(asked)


# ------------------------------------------------------------------------------------------------------ perplexity


@torch.inference_mode()
def loss_by_position(model: GPT, ids: np.ndarray, n_windows: int, batch_size: int = 8) -> np.ndarray:
    """Mean cross-entropy in nats at every position of a window (block_size,), over windows spread over the text."""
    device = next(model.parameters()).device
    length = model.config.block_size + 1
    starts = np.linspace(0, len(ids) - length, min(n_windows, len(ids) // length)).astype(int)
    total = torch.zeros(length - 1, dtype=torch.float64)
    for first in range(0, len(starts), batch_size):
        rows = np.stack([ids[start : start + length] for start in starts[first : first + batch_size]]).astype(np.int64)
        windows = torch.from_numpy(rows).to(device)  # (B, block_size + 1)
        _, losses = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), reduction="none")
        total += losses.double().sum(0).cpu()
    return (total / len(starts)).numpy()


def perplexity_by_position(path: str, file: str, factor: float, scalings: list[str], n_windows: int, device: str):
    """Losses by position for each kind of RoPE scaling {name: (block_size,)}, the model's own first; its window."""
    checkpoint = load_checkpoint(path)
    ids = load_checkpoint_tokenizer(checkpoint, path).encode(read_text(file), special=True)
    own = checkpoint["model_config"]
    window = math.floor(own["block_size"] * factor)
    if len(ids) <= window:
        raise UserError(f"{file}: {len(ids)} tokens do not fill a window of {window}")
    if factor > 1 and not own.get("use_rope", True):
        raise UserError(f"{path}: learned positions end at {own['block_size']}: --factor needs RoPE")
    losses = {}
    for scaling in dict.fromkeys([own.get("rope_scaling", "none"), *scalings]):
        total = own.get("rope_factor", 1.0) * factor  # over the window that the frequencies were trained with
        changes = {"block_size": window, "rope_factor": total, "rope_scaling": scaling}
        model = load_model(checkpoint, path, **changes).to(find_device(device)).eval()
        if not model.config.is_causal:
            raise UserError(f"{path}: with full attention there is no next token to predict")
        losses[scaling] = loss_by_position(model, ids, n_windows)
    return losses, own["block_size"]


def print_perplexities(losses: dict[str, np.ndarray], trained: int) -> None:
    """A row for each range of positions, a column for each kind of scaling."""
    rows = [("positions", *losses)]
    block_size = len(next(iter(losses.values())))
    for part in np.array_split(np.arange(block_size), min(N_RANGES, block_size)):
        values = (f"{math.exp(min(700.0, loss[part].mean())):.2f}" for loss in losses.values())
        rows.append((f"{part[0] + 1}-{part[-1] + 1}" + (" (beyond)" if part[0] >= trained else ""), *values))
    print_table(rows)


def draw(path: str, losses: dict[str, np.ndarray], trained: int) -> None:
    """Perplexity over position, a line for each kind of scaling."""
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
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a text that the model has not seen: perplexity")
    parser.add_argument("--questions", metavar="FILE", help="fine-tuning jsonl: exact match of greedy answers")
    parser.add_argument("-m", "--model", metavar="FILE", help="checkpoint [checkpoint/pretrain.pt, or sft.pt]")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    group = parser.add_argument_group("Perplexity")
    group.add_argument("-o", "--output", metavar="PNG", default="perplexity.png", help="picture to write [%(default)s]")
    group.add_argument("--factor", metavar="X", type=float, default=1.0, help="window over the trained one [1]")
    group.add_argument(
        "--scaling", nargs="+", choices=ROPE_SCALING, default=[], help="RoPE scaling to try beside the model's own"
    )
    group.add_argument("--windows", metavar="N", type=int, default=64, help="windows of the text to read [64]")
    group = parser.add_argument_group("Questions")
    group.add_argument("--lora", metavar="FILE", default="", help="answer with this adapter on the model")
    group.add_argument("--show", metavar="N", type=int, default=5, help="wrong answers to print [5]")
    args, _ = parser.parse()
    if bool(args.text) == bool(args.questions):
        raise UserError(
            f"command line: {'one of them at a time' if args.text else 'name'}: a text, or --questions FILE"
        )
    if args.questions:
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}")
        generator = load_text_generator(args.model or "checkpoint/sft.pt", args.device, True, lora=args.lora)
        n_right, n = exact_match(generator, args.questions, args.show)
        print(f"held-out exact match: {100 * n_right / n:.1f}% ({n_right}/{n})")
        return
    if args.lora:
        raise UserError("command line: --lora is for --questions; inference.py --merge merges an adapter into a model")
    if not 1 <= args.factor <= 1024 or args.windows < 1:
        raise UserError("command line: --factor must be between 1 and 1024, --windows at least 1")
    if not args.output.endswith(".png") or not Path(args.output).parent.is_dir():
        raise UserError(f"{args.output}: must be a picture's name (.png) in a folder that exists")
    losses, trained = perplexity_by_position(
        args.model or "checkpoint/pretrain.pt", args.text, args.factor, args.scaling, args.windows, args.device
    )
    print_perplexities(losses, trained)
    draw(args.output, losses, trained)
    print(args.output)


if __name__ == "__main__":
    run_main(main)
