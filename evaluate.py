"""How good is a model? Its perplexity on a text, position by position, or the share of questions it answers exactly.

python evaluate.py book.txt -m checkpoint/pretrain.pt                                 within the trained window
python evaluate.py book.txt -m checkpoint/pretrain.pt --factor 4                      four times as far, unscaled
python evaluate.py book.txt -m checkpoint/pretrain.pt --factor 4 --scaling yarn ntk   and by rope_scaling: in columns
python evaluate.py --questions dataset/held_out.jsonl -m checkpoint/sft.pt            exact match of greedy answers

Files are read as by data.py: text, JSON, CSV, Parquet, compressed or not.
Perplexity by position shows whether a long context helps, and how far a model reads; a picture goes to perplexity.png.
"""

import contextlib
import json
import math
import re
import shlex
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from base.configuration import Parser, UserError, escape_control_characters, escape_for, run_main
from base.devices import find_device
from data import check_fields_seen
from layers.rope import ROPE_SCALING
from model import GPT
from serving.text_generator import (
    GenerationConfig,
    TextGenerator,
    load_full_checkpoint,
    load_text_generator,
    unknown_note,
)
from text.corpus import BadLines, documents, find_sources, read_conversations
from text.formats import Source, check_encoding, parse_fields, printable_name
from text.tokenizer import Messages, Tokenizer, normalise, remove_special_tokens
from training.run_log import print_table
from weights import lora
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model

N_RANGES = 8  # rows of the table of perplexities


def tell(message: str) -> None:
    """A line on standard error, above the progress bar."""
    tqdm.write(escape_control_characters(message), file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ files


def find_files(args: Namespace) -> list[Source]:
    """The raw files of a command line, read as data.py reads them; raises UserError if they are for something else."""
    check_encoding(args.encoding)
    path = args.text or args.questions
    try:
        sources, left_out = find_sources([path], args.encoding, parse_fields(args.fields), bool(args.plain_text))
    except UserError as error:
        if args.text:
            raise
        raise UserError(re.sub("[,;] --plain_text .*", "", str(error))) from None  # advice for a text
    if left_out:
        tell(f"left out: {len(left_out)} files; {left_out[0]}")
    check_fields_seen(args.fields, sources)
    stages = {source.stage: source for source in sources}
    if args.text and "sft" in stages:
        file = shlex.quote(printable_name(stages["sft"].path))
        raise UserError(
            f"{stages['sft'].name}: questions and answers, not a text: --questions {file} asks them "
            "(--plain_text reads them as a text)"
        )
    if args.text and "dpo" in stages:
        raise UserError(f"{stages['dpo'].name}: preferences, not a text (--plain_text reads them as one)")
    return sources


def read_ids(sources: list[Source], tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Token ids (T,) of texts, as data.py encodes them, and their characters."""
    pieces = [piece for source in sources for piece in documents(source, BadLines(0))]
    delimit = sum(ends for _, _, ends in pieces) > 1  # a text alone has no neighbours to be delimited from
    parts = [np.empty(0, tokenizer.dtype)]
    for text, begins, ends in pieces:
        parts.append(tokenizer.delimit([tokenizer.encode(text, special=True)], delimit and begins, delimit and ends))
    ids = np.concatenate(parts)
    return ids, remove_special_tokens("".join(text for text, _, _ in pieces))


# ------------------------------------------------------------------------------------------------------ questions


def tell_unknown(tokenizer: Tokenizer, asked: list[tuple[str, Messages]]) -> None:
    """Name the characters of the questions that are not in the vocabulary, count the answers that have any."""
    if note := unknown_note(tokenizer, "".join(m["content"] for _, messages in asked for m in messages[:-1])):
        tell(f"in the questions: {note}")
    expected = [normalise(messages[-1]["content"]) for _, messages in asked]
    if n := sum(bool(tokenizer.unknown_characters(text)) for text in expected):
        tell(f"expected answers with characters that are not in the vocabulary, so that none can match: {n}")


def exact_match(generator: TextGenerator, asked: list[tuple[str, Messages]], n_shown: int) -> list[bool]:
    """Whether each greedy answer is the expected one; prints the first n_shown that are not. Ctrl-C ends it early.

    Of a conversation the last answer is asked for, after the turns before it. A question too long for the model is
    named, and its answer wrong.
    """
    config = GenerationConfig(temperature=0.0)
    is_right = []
    with contextlib.suppress(KeyboardInterrupt):
        bar = tqdm(asked, desc="asking", unit="question", delay=1, leave=False, dynamic_ncols=True, disable=None)
        for where, messages in bar:
            *history, question, expected = messages
            try:
                answer = "".join(generator.answer(question["content"], config, history))
            except UserError as error:
                tell(f"{where}: wrong, not answered: {error}")
                is_right.append(False)
                continue
            is_right.append(answer.strip() == normalise(expected["content"]).strip())
            if not is_right[-1] and n_shown:
                n_shown -= 1
                texts = question["content"], answer, expected["content"]
                asked_for, said, right = (json.dumps(text, ensure_ascii=False) for text in texts)
                tqdm.write(escape_for(sys.stdout, f"wrong: {asked_for} -> {said}, expected {right}"))
    return is_right


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
        idx, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        _, losses = model(idx, targets, reduction="none", with_logits=False)
        total += losses.double().sum(0).cpu()
    return (total / len(starts)).numpy()


def perplexity_by_position(
    path: str, texts: list[Source], factor: float, scalings: list[str], n_windows: int, device: str, adapter: str = ""
) -> tuple[dict[str, np.ndarray], int]:
    """Losses by position for each kind of RoPE scaling {name: (block_size,)}, the model's own first; its window."""
    checkpoint = load_full_checkpoint(path)
    tokenizer = load_checkpoint_tokenizer(checkpoint, path)
    ids, characters = read_ids(texts, tokenizer)
    file = texts[0].given
    own = checkpoint["model_config"]
    window = math.floor(own["block_size"] * factor)
    if 1 < len(ids) <= window and factor <= 1 and own.get("use_rope", True):
        tell(f"{file}: {len(ids)} tokens, of a window of {window}: only the first {len(ids) - 1} positions are judged")
        window, factor = len(ids) - 1, 1.0
    if len(ids) <= window:
        raise UserError(f"{file}: {len(ids)} tokens do not fill a window of {window}")
    if factor > 1 and not own.get("use_rope", True):
        raise UserError(f"{path}: learned positions end at {own['block_size']}: --factor needs RoPE")
    if note := unknown_note(tokenizer, characters):
        share = f"{100 * np.mean(ids == tokenizer.unknown):.1f}% of {file}"
        tell(f"warning: {share}: {note}; the perplexity counts all of these as one token")
    losses = {}
    for scaling in dict.fromkeys([own.get("rope_scaling", "none"), *scalings]):
        total = own.get("rope_factor", 1.0) * factor  # over the window that the frequencies were trained with
        changes = {"block_size": window, "rope_factor": total, "rope_scaling": scaling}
        model = load_model(checkpoint, path, **changes).to(find_device(device))
        if adapter:
            lora.load_adapter(load_checkpoint(adapter), model, adapter)
        if not model.config.is_causal:
            raise UserError(f"{path}: with full attention there is no next token to predict")
        losses[scaling] = loss_by_position(model.eval(), ids, n_windows)
    return losses, own["block_size"]


def perplexity(losses: np.ndarray) -> float:
    """Of cross-entropies in nats."""
    return math.exp(min(700.0, losses.mean()))  # no overflow


def print_perplexities(losses: dict[str, np.ndarray], trained: int) -> None:
    """A row for each range of positions, a column for each kind of scaling."""
    rows = [("positions", *(f"perplexity{of_scaling(name)}" for name in losses))]
    block_size = len(next(iter(losses.values())))
    for part in np.array_split(np.arange(block_size), min(N_RANGES, block_size)):
        values = (f"{perplexity(loss[part]):.2f}" for loss in losses.values())
        rows.append((f"{part[0] + 1}-{part[-1] + 1}" + (" (beyond)" if part[0] >= trained else ""), *values))
    print_table(rows)


def of_scaling(name: str) -> str:
    """What a figure is named by beside its kind: the RoPE scaling, if there is one."""
    return "" if name == "none" else f", {name}"


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


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a text that the model has not seen: perplexity")
    parser.add_argument("--questions", metavar="FILE", help="fine-tuning data: exact match of greedy answers")
    parser.add_argument("-m", "--model", metavar="FILE", help="checkpoint [checkpoint/pretrain.pt, or sft.pt]")
    parser.add_argument("--lora", metavar="FILE", default="", help="evaluate the model with this adapter")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument(
        "--fields", metavar="OURS=NAME", nargs="+", default=[], help="other names of fields: question=Q"
    )
    parser.add_argument("--encoding", metavar="NAME", default="utf-8", help="of the file: gbk, utf-16 [utf-8]")
    group = parser.add_argument_group("Perplexity")
    group.add_argument("-o", "--output", metavar="PNG", help="picture to write [perplexity.png]")
    group.add_argument("--factor", metavar="X", type=float, help="window over the trained one [1]")
    group.add_argument("--scaling", nargs="+", choices=ROPE_SCALING, help="RoPE scaling to try beside the model's own")
    group.add_argument("--windows", metavar="N", type=int, help="windows of the text to read [64]")
    group.add_argument("--plain_text", action="store_true", default=None, help="also if it looks like JSON or CSV")
    group = parser.add_argument_group("Questions")
    group.add_argument("--limit", metavar="N", type=int, help="ask only the first N [all]")
    group.add_argument("--show", metavar="N", type=int, help="wrong answers to print [5]")
    return parser


# the defaults of options for one kind of evaluation, which the other kind refuses
FOR_TEXT = {"output": "perplexity.png", "factor": 1.0, "scaling": [], "windows": 64, "plain_text": False}
FOR_QUESTIONS = {"limit": None, "show": 5}


def check_arguments(args: Namespace) -> None:
    """Put defaults where nothing was given; raises UserError, also for options that would have no effect."""
    if bool(args.text) == bool(args.questions):
        raise UserError(
            f"command line: {'one of them at a time' if args.text else 'name'}: a text, or --questions FILE"
        )
    own, others = (FOR_TEXT, FOR_QUESTIONS) if args.text else (FOR_QUESTIONS, FOR_TEXT)
    for name in others:
        if getattr(args, name) is not None:
            raise UserError(f"command line: --{name} is for {'--questions FILE' if args.text else 'a text'}")
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.questions:
        if args.show < 0:
            raise UserError(f"command line: --show must be at least 0, got {args.show}")
        if args.limit is not None and args.limit < 1:
            raise UserError(f"command line: --limit must be at least 1, got {args.limit}")
        return
    if not 1 <= args.factor <= 1024 or args.windows < 1:
        raise UserError("command line: --factor must be between 1 and 1024, --windows at least 1")
    if not args.output.endswith(".png") or not Path(args.output).parent.is_dir():
        raise UserError(f"{args.output}: must be a picture's name (.png) in a folder that exists")


def evaluate_questions(args: Namespace) -> None:
    find_files(args)  # raises UserError
    asked = read_conversations(args.questions, args.encoding, parse_fields(args.fields))[: args.limit]
    if not asked:
        raise UserError(f"{args.questions}: no questions in it")
    generator = load_text_generator(args.model or "checkpoint/sft.pt", args.device, True, adapter=args.lora)
    tell_unknown(generator.tokenizer, asked)
    is_right = exact_match(generator, asked, args.show)
    n_right, n = sum(is_right), len(is_right)
    if n < len(asked):
        if n:
            print(f"stopped after {n} of {len(asked)} questions: {100 * n_right / n:.1f}% right ({n_right}/{n})")
        raise KeyboardInterrupt
    print(f"held-out exact match: {100 * n_right / n:.1f}% ({n_right}/{n})")


def evaluate_text(args: Namespace) -> None:
    losses, trained = perplexity_by_position(
        args.model or "checkpoint/pretrain.pt",
        find_files(args),
        args.factor,
        args.scaling,
        args.windows,
        args.device,
        args.lora,
    )
    print_perplexities(losses, trained)
    draw(args.output, losses, trained)
    print(args.output)
    for name, values in losses.items():
        print(f"overall{of_scaling(name)}: loss {values.mean():.4f}, perplexity {perplexity(values):.2f}")


def main() -> None:
    args, _ = make_parser().parse()
    check_arguments(args)
    warnings.showwarning = lambda message, *_: tell(f"warning: {message}")
    if args.questions:
        evaluate_questions(args)
    else:
        evaluate_text(args)


if __name__ == "__main__":
    run_main(main)
