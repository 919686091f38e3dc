"""How good is a model, and is B better than A? On a text, on questions, on multiple choice.

python evaluate.py book.txt -m checkpoint/pretrain.pt                                 loss and perplexity on a text
python evaluate.py book.txt -m checkpoint/pretrain.pt --stride 64                     every token, each with context
python evaluate.py book.txt -m checkpoint/pretrain.pt --factor 4 --scaling yarn ntk   beyond the trained window
python evaluate.py book.txt -m a.pt b.pt                                              is b better than a?
python evaluate.py --questions dataset/held_out.jsonl -m checkpoint/sft.pt            exact match of greedy answers
python evaluate.py --questions dataset/held_out.jsonl -m checkpoint/sft.pt --copied dataset/pretrain.txt
python evaluate.py --choices ceval/val --shots 5 --dev ceval/dev -m checkpoint/pretrain.pt
python evaluate.py --runs train_*.log                                                 runs that differ by their seed

Files are read as by data.py: text, JSON, CSV, Parquet, compressed or not.
Perplexity by position shows whether a long context helps, and how far a model reads; a picture goes to perplexity.png.
"""

import contextlib
import json
import math
import os
import re
import shlex
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from base.configuration import Parser, UserError, escape_control_characters, escape_for, run_main
from base.devices import find_device
from base.files import atomic_write
from data import check_fields_seen
from evaluation import choices
from evaluation.copied import describe_copied
from evaluation.picture import draw
from evaluation.questions import Answer, Turn, ask, check_sight, turns_of
from evaluation.runs import tables
from evaluation.statistics import compare, verdict
from evaluation.text import BLOCK, BOUND, Units, check_attention, judge_pieces, judge_windows, read_ids
from layers.rope import ROPE_SCALING
from model import GPT
from serving.text_generator import TextGenerator, load_full_checkpoint, load_text_generator, unknown_note
from text.corpus import find_sources, read_conversations
from text.encodings import check_encoding
from text.formats import Source, parse_fields, printable_name
from text.tokenizer import Tokenizer, normalise
from training.run_log import print_table
from weights import lora
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model
from weights.quantise import KINDS, with_weights

N_RANGES = 8  # rows of the table of perplexities


def tell(message: str) -> None:
    """A line on standard error, above the progress bar."""
    tqdm.write(escape_control_characters(message), file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ a text


def find_files(args: Namespace) -> list[Source]:
    """The raw files of a command line, read as data.py reads them; raises UserError if they are for something else."""
    paths = args.text or [args.questions]
    try:
        sources, left_out = find_sources(paths, args.encoding, parse_fields(args.fields), bool(args.plain_text))
    except UserError as error:
        if args.text:
            raise
        raise UserError(re.sub("[,;] --plain_text .*", "", str(error))) from None  # advice for a text
    if left_out:
        tell(f"left out: {len(left_out)} files; {left_out[0]}")
    check_fields_seen(args.fields, sources)
    stages = {source.stage: source for source in sources}
    if args.text and (asked := stages.get("sft") or stages.get("vision")):
        file = shlex.quote(printable_name(asked.path))
        raise UserError(
            f"{asked.name}: questions and answers, not a text: --questions {file} asks them "
            "(--plain_text reads them as a text)"
        )
    if args.text and "dpo" in stages:
        raise UserError(f"{stages['dpo'].name}: preferences, not a text (--plain_text reads them as one)")
    return sources


class Contestant(NamedTuple):
    """A model to judge. label: what its figures are named by, ", yarn" or ", a.pt"; empty where there is but one."""

    label: str
    model: GPT
    tokenizer: Tokenizer
    block: int  # tokens that masked diffusion fills in together


def load_contestants(args: Namespace) -> list[Contestant]:
    """The models of a command line on their device: several, or one with each kind of RoPE scaling, its own first."""
    found = []
    for path in args.model:
        checkpoint, adapter = load_full_checkpoint(path), load_checkpoint(args.lora) if args.lora else None
        block = (adapter or checkpoint)["train_config"].get("answer_block", BLOCK)
        own, tokenizer = checkpoint["model_config"], load_checkpoint_tokenizer(checkpoint, path)
        if args.factor > 1 and not own.get("use_rope", True):
            raise UserError(f"{path}: learned positions end at {own['block_size']}: --factor needs RoPE")
        for scaling in dict.fromkeys([own.get("rope_scaling", "none"), *args.scaling]):
            total = own.get("rope_factor", 1.0) * args.factor  # over the window that the frequencies were trained with
            if args.scaling and total == 1:
                raise UserError(f"{path}: --scaling changes nothing within the trained window; --factor 4 reads beyond")
            window = math.floor(own["block_size"] * args.factor)
            changes = {"block_size": window, "rope_factor": total, "rope_scaling": scaling}
            model = load_model(checkpoint, path, **changes).to(find_device(args.device))
            if adapter:
                lora.load_adapter(adapter, model, args.lora)
                lora.merge(model)
            check_attention(model.config, path, bool(args.stride or args.scaling or args.factor > 1))
            model, _ = with_weights(model, args.weights)
            label = f", {path}" if len(args.model) > 1 else "" if scaling == "none" else f", {scaling}"
            found.append(Contestant(label, model.eval(), tokenizer, block))
    return found


def read_text(args: Namespace, contestants: list[Contestant]) -> tuple[list[np.ndarray], str]:
    """The text as ids (T,) of each contestant's tokenizer, and its characters; raises UserError for a short one."""
    sources = find_files(args)
    file, read = sources[0].given, {}
    for label, model, tokenizer, _ in contestants:
        key, window = tokenizer.fingerprint(), model.config.block_size
        if key not in read:
            ids, characters = read[key] = read_ids(sources, tokenizer)
            if note := unknown_note(tokenizer, characters):
                share = f"{100 * np.mean(ids == tokenizer.unknown):.1f}% of {file}{label}"
                tell(f"warning: {share}: {note}; the perplexity counts all of these as one token")
        n = len(read[key][0])
        if n < 2 or (n <= window and args.factor > 1):
            raise UserError(f"{file}: {n} tokens do not fill a window of {window}")
        if n <= window:
            tell(f"{file}{label}: {n} tokens, of a window of {window}: only the first {n - 1} positions are judged")
    return [read[tokenizer.fingerprint()][0] for _, _, tokenizer, _ in contestants], next(iter(read.values()))[1]


def evaluate_text(args: Namespace) -> None:
    contestants = load_contestants(args)
    ids, characters = read_text(args, contestants)
    sizes = [model.config.block_size for _, model, *_ in contestants]
    is_one_tokenizer = len({tokenizer.fingerprint() for _, _, tokenizer, _ in contestants}) == 1
    n_windows, trained = args.windows or 64, math.floor(sizes[0] / args.factor)
    has_positions = not any(model.config.mask_token for _, model, *_ in contestants)  # its windows have no beginning
    if args.output and not has_positions:
        raise UserError("command line: -o: a model of masked diffusion has no loss by position")
    if args.stride is None and is_one_tokenizer and len(set(sizes)) == 1:
        losses, units = {}, []
        for (label, model, tokenizer, block), tokens in zip(contestants, ids, strict=True):
            of_positions, of_windows = judge_windows(model, tokenizer, tokens, n_windows, block=block)
            losses[label] = of_positions.mean(0)  # (block_size,)
            units.append(of_windows)
        if has_positions:
            print_perplexities(losses, trained)
            try:
                draw(picture := args.output or "perplexity.png", losses, trained)
                print(picture)
            except OSError as error:  # the result does not depend on it
                tell(f"warning: {picture}: {error.strerror}: no picture")
        what, n_unread = "window", len(ids[0]) // (len(next(iter(losses.values()))) + 1) - n_windows
    else:
        if args.output or args.windows:
            raise UserError("command line: models of different windows or tokenizers: no --windows, no -o")
        for label, model, *_ in contestants:
            check_attention(model.config, label.removeprefix(", ") or args.model[0], has_strides=True)
        strides = [min(args.stride or max(1, size // 2), size) for size in sizes]
        if args.stride is None:
            why = "windows" if is_one_tokenizer else "tokenizers"
            tell(f"the models have different {why}: every token is judged, in strides of half a window")
        judged = [(model, tokenizer, tokens) for (_, model, tokenizer, _), tokens in zip(contestants, ids, strict=True)]
        units, what, n_unread = judge_pieces(judged, characters, strides), "piece", 0
    n, size = len(units[0].nats), units[0].characters.mean()
    read = f"{n} {what}{'s' * (n > 1)} of about {size:.0f} characters"
    for (label, model, *_), unit in zip(contestants, units, strict=True):
        print(f"overall{label}: {unit.describe(BOUND if model.config.mask_token else 'loss')} ({read})")
    if len(args.model) > 1:
        compare_on_text(args.model, units, is_one_tokenizer, n_unread)
        if not has_positions:
            print("(of masked diffusion an upper bound is compared: its loss is lower, nobody knows by how much)")


def compare_on_text(paths: list[str], units: list[Units], is_one_tokenizer: bool, n_unread: int) -> None:
    """A line for each further model: is it better than the first? n_unread: windows of the text that were not read."""
    first = units[0]
    counts = first.tokens if is_one_tokenizer else math.log(2) * first.bytes
    what = "nats per token" if is_one_tokenizer else "bits per byte"
    for path, unit in zip(paths[1:], units[1:], strict=True):
        found = compare(first.nats, unit.nats, counts)
        line = verdict(paths[0], path, found, what, first.characters.sum(), "characters")
        if not found.is_shown and 0 < found.n_needed - found.n_units <= n_unread:
            line += f" (this text has them: --windows {math.ceil(found.n_needed)})"
        print(line)


def print_perplexities(losses: dict[str, np.ndarray], trained: int) -> None:
    """A row for each range of positions, a column for each of the losses (block_size,)."""
    rows = [("positions", *(f"perplexity{label}" for label in losses))]
    block_size = len(next(iter(losses.values())))
    for part in np.array_split(np.arange(block_size), min(N_RANGES, block_size)):
        values = (f"{math.exp(min(700.0, loss[part].mean())):.2f}" for loss in losses.values())  # no overflow
        rows.append((f"{part[0] + 1}-{part[-1] + 1}" + (" (beyond)" if part[0] >= trained else ""), *values))
    print_table(rows)


# ------------------------------------------------------------------------------------------------------ questions


def evaluate_questions(args: Namespace) -> None:
    find_files(args)  # raises UserError
    turns = turns_of(read_conversations(args.questions, args.encoding, parse_fields(args.fields)))[: args.limit]
    if not turns:
        raise UserError(f"{args.questions}: no questions in it")
    training = find_sources([args.copied], args.encoding, parse_fields(args.fields))[0] if args.copied else []
    rest = args.device, True, [], args.lora, args.weights
    check_sight(generators := {path: load_text_generator(path, *rest) for path in args.model}, turns)
    answers: dict[str, list[Answer]] = {path: [] for path in args.model}
    try:
        for path, generator in generators.items():
            tell_unknown(generator.tokenizer, turns)
            ask_all(generator, turns, answers[path], args.show)
        print_answers(args, answers, training)
    except KeyboardInterrupt:
        if asked := [given for given in answers.values() if given]:
            share = share_of([answer.is_exact for answer in asked[-1]])
            print(f"stopped after {len(asked[-1])} of {len(turns)} questions: {share[0]} right ({share[1]})")
        raise
    finally:  # what was asked is kept, whatever ended it
        if args.out and any(answers.values()):
            write_records(args.out, [answer.describe(path) for path in answers for answer in answers[path]])


def print_answers(args: Namespace, answers: dict[str, list[Answer]], training: list[Source]) -> None:
    """The shares right of every model, what is copied from training texts, and how the models compare."""
    for path, given in answers.items():
        if len(args.model) > 1:
            print(f"{path}:")
        alike = share_of([answer.is_alike for answer in given])
        print("normalised match (case, spaces, punctuation, full width): {} ({})".format(*alike))
        if training:
            said = [answer for answer in given if answer.text is not None]
            pairs = [answer.text for answer in said], [answer.turn.expected for answer in said]
            print(f"copied from {args.copied}: {describe_copied(*pairs, training)}")
        print("exact match: {} ({})".format(*share_of([answer.is_exact for answer in given])))
    compare_answers(args.model, answers)


def ask_all(generator: TextGenerator, turns: list[Turn], answers: list[Answer], n_shown: int) -> None:
    """Add the answer to every question to a list; print the first n_shown that are wrong.

    A question too long for the model is named, and its answer wrong.
    """
    for turn in tqdm(turns, desc="asking", unit="question", delay=1, leave=False, dynamic_ncols=True, disable=None):
        answer = ask(generator, turn)
        answers.append(answer)
        if answer.text is None:
            tell(f"{turn.where}: wrong, not answered: {answer.error}")
        elif not answer.is_exact and n_shown:
            n_shown -= 1
            texts = turn.question, answer.text, turn.expected
            asked_for, said, right = (json.dumps(text, ensure_ascii=False) for text in texts)
            tqdm.write(escape_for(sys.stdout, f"wrong: {asked_for} -> {said}, expected {right}"))
    if n_cut := sum(answer.is_cut for answer in answers):
        window = generator.model.config.block_size
        tell(f"{n_cut} of {len(answers)} questions without their oldest turns, which do not fit into {window:,} tokens")


def tell_unknown(tokenizer: Tokenizer, turns: list[Turn]) -> None:
    """Name the characters of the questions that are not in the vocabulary, count the answers that have any."""
    asked = "".join(message["content"] for turn in turns for message in turn.history)
    if note := unknown_note(tokenizer, asked + "".join(turn.question for turn in turns)):
        tell(f"in the questions: {note}")
    if n := sum(bool(tokenizer.unknown_characters(normalise(turn.expected))) for turn in turns):
        tell(f"expected answers with characters that are not in the vocabulary, so that none can match: {n}")


def share_of(is_right: list[bool]) -> tuple[str, str]:
    """("97.5%", "195/200")"""
    return f"{100 * sum(is_right) / len(is_right):.1f}%", f"{sum(is_right)}/{len(is_right)}"


def compare_answers(paths: list[str], answers: dict[str, list[Answer]]) -> None:
    """A line for each further model: does it answer more questions than the first? By conversation."""
    wrong = {}
    for path, given in answers.items():
        of = [answer.turn.conversation for answer in given]
        wrong[path] = np.bincount(of, [not answer.is_exact for answer in given])
    counts = np.bincount([answer.turn.conversation for answer in answers[paths[0]]])
    for path in paths[1:]:
        found = compare(wrong[paths[0]], wrong[path], counts)
        print(verdict(paths[0], path, found, "percentage points", counts.sum(), "questions", scale=100))


def has_answers(path: Path) -> bool:
    """Whether a file begins as those that --out writes: it may be replaced."""
    with contextlib.suppress(ValueError), open(path, encoding="utf-8") as file:
        record = json.loads(file.readline(1 << 24))
        return isinstance(record, dict) and {"model", "where"} <= record.keys()
    return False


def write_records(path: str, records: list[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all; those of an earlier run are kept beside them."""
    if Path(path).is_file():
        os.replace(path, f"{path}.bak")
        tell(f"{path}: of an earlier run, kept as {path}.bak")
    with atomic_write(path) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------------ choices


def evaluate_choices(args: Namespace) -> None:
    questions = choices.read_choices(args.choices, args.encoding, args.limit)
    examples = {}
    if args.shots:
        examples = choices.examples_for(questions, choices.read_choices(args.dev, args.encoding), args.shots)
    rest = args.device, True, [], args.lora, args.weights
    generators = {path: load_text_generator(path, *rest) for path in args.model}
    results, records = [], []
    for path, generator in generators.items():
        check_attention(generator.model.config, path, has_strides=True)
    try:
        for path, generator in generators.items():
            texts = (question.ask(by_letter=True) for question in questions)
            if note := unknown_note(generator.tokenizer, "".join(texts)):
                tell(f"in the questions: {note}")
            letters, answers, n_cut = choices.judge(generator, questions, examples, args.chat)
            if n_cut:
                read = "which reads their ends, and of options that are longer the beginnings"
                tell(f"{n_cut} of {len(questions)} questions are longer than the window of {path}, {read}")
            if len(args.model) > 1:
                print(f"{path}:")
            print_table(choices.subject_table(questions, letters, answers))
            results.append((letters, answers))
            records += map(choices.describe, [path] * len(questions), questions, letters, answers)
    finally:  # of the models that were judged
        if args.out and records:
            write_records(args.out, records)
    for kind, name in enumerate(("by letter", "by answer")):
        wrong = [1 - np.array(list(map(choices.share_right, questions, result[kind]))) for result in results]
        for path, other in zip(args.model[1:], wrong[1:], strict=True):
            found = compare(wrong[0], other, np.ones(len(questions)))
            line = verdict(args.model[0], path, found, "percentage points", len(questions), "questions", scale=100)
            print(f"{name}: {line}")


# ------------------------------------------------------------------------------------------------------ runs


def evaluate_runs(args: Namespace) -> None:
    """A table for each group of runs that differ by their seed alone: last and best validation loss, and their mean."""
    for number, (rows, notes) in enumerate(tables(args.runs)):
        print("\n" * bool(number), end="")
        print_table(rows)
        for note in notes:
            tell(f"warning: {note}")


# ------------------------------------------------------------------------------------------------------ options


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts that the model has not seen: perplexity")
    parser.add_argument("--questions", metavar="FILE", help="fine-tuning data: exact match of greedy answers")
    parser.add_argument("--choices", metavar="FILE", help="C-Eval, CMMLU, MMLU: a file, or a folder of subjects")
    parser.add_argument("--runs", nargs="+", metavar="LOG", help="logs of train.py: mean and spread of their losses")
    parser.add_argument("-m", "--model", nargs="+", metavar="FILE", help="checkpoints; further ones against the first")
    parser.add_argument("--lora", metavar="FILE", help="evaluate the model with this adapter")
    parser.add_argument("--weights", choices=KINDS, help="evaluate them rounded to fewer bytes [float32]")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--fields", metavar="OURS=NAME", nargs="+", help="other names of fields: question=Q")
    parser.add_argument("--encoding", metavar="NAME", default="utf-8", help="of the file: gbk, utf-16 [utf-8]")
    parser.add_argument("--out", metavar="FILE", help="write every answer as a line of JSON")
    group = parser.add_argument_group("Perplexity")
    group.add_argument("-o", "--output", metavar="PNG", help="picture to write [perplexity.png]")
    group.add_argument("--stride", metavar="N", type=int, help="judge every token, the last N of each window")
    group.add_argument("--factor", metavar="X", type=float, help="window over the trained one [1]")
    group.add_argument("--scaling", nargs="+", choices=ROPE_SCALING, help="RoPE scaling to try beside the model's own")
    group.add_argument("--windows", metavar="N", type=int, help="windows of the text to read [64]")
    group.add_argument("--plain_text", action="store_true", default=None, help="also if it looks like JSON or CSV")
    group = parser.add_argument_group("Questions")
    group.add_argument(
        "--limit", metavar="N", type=int, help="ask only the first N, of choices those of each file [all]"
    )
    group.add_argument("--show", metavar="N", type=int, help="wrong answers to print [5]")
    group.add_argument("--copied", metavar="TRAIN_TEXT", help="how much of the answers stands in this training text?")
    group = parser.add_argument_group("Choices")
    group.add_argument("--shots", metavar="N", type=int, help="examples before each question [0]")
    group.add_argument("--dev", metavar="FOLDER", help="where the examples are, by subject")
    group.add_argument("--chat", action="store_true", default=None, help="ask in the model's chat template")
    return parser


class Mode(NamedTuple):
    """What can be evaluated: how it is asked for, the default checkpoint, the options it takes with their defaults."""

    name: str
    checkpoint: str
    options: dict[str, Any]


OF_TEXT = {"output": None, "stride": None, "factor": 1.0, "scaling": [], "windows": None, "plain_text": False}
MODES = {
    "text": Mode("a text", "checkpoint/pretrain.pt", OF_TEXT | {"lora": "", "fields": [], "weights": "float32"}),
    "questions": Mode(
        "--questions FILE",
        "checkpoint/sft.pt",
        {"limit": None, "show": 5, "copied": None, "out": None, "lora": "", "fields": [], "weights": "float32"},
    ),
    "choices": Mode(
        "--choices FILE",
        "checkpoint/pretrain.pt",
        {"limit": None, "shots": 0, "dev": None, "chat": False, "out": None, "lora": "", "weights": "float32"},
    ),
    "runs": Mode("--runs LOG", "", {}),
}


def check_arguments(args: Namespace) -> str:
    """What is to be evaluated; puts defaults where nothing was given. Raises UserError, also for what has no effect."""
    check_encoding(args.encoding)
    asked_for = [key for key in MODES if getattr(args, key)]
    if len(asked_for) != 1:
        what = "one of them at a time" if asked_for else "name"
        hint = "; texts stand before -m" if args.model and len(args.model) > 1 else ""
        raise UserError(f"command line: {what}: {', or '.join(mode.name for mode in MODES.values())}{hint}")
    mode = MODES[asked_for[0]]
    for name in dict.fromkeys(name for other in MODES.values() for name in other.options):
        if name not in mode.options and getattr(args, name) is not None:
            takers = " or ".join(other.name for other in MODES.values() if name in other.options)
            raise UserError(f"command line: --{name} is for {takers}")
        if name in mode.options and getattr(args, name) is None:
            setattr(args, name, mode.options[name])
    if args.model and not mode.checkpoint:
        raise UserError("command line: --model is for a text, questions or choices")
    args.model = args.model or [mode.checkpoint]
    if len(set(args.model)) < len(args.model):
        raise UserError(f"command line: {args.model[0]} against itself: name different checkpoints")
    if len(args.model) > 1 and args.lora:
        raise UserError("command line: --lora is for a single model")
    if args.text:
        check_text(args)
    elif not args.runs:
        check_asking(args)
    return asked_for[0]


def check_text(args: Namespace) -> None:
    if args.stride is not None and (args.output or args.windows is not None):
        raise UserError("command line: --stride reads the whole text, position by position alike: no --windows, no -o")
    if not 1 <= args.factor <= 1024 or (args.windows is not None and args.windows < 1):
        raise UserError("command line: --factor must be between 1 and 1024, --windows at least 1")
    if args.stride is not None and args.stride < 1:
        raise UserError(f"command line: --stride must be at least 1, got {args.stride}")
    if len(args.model) > 1 and (args.factor > 1 or args.scaling):
        raise UserError("command line: --factor and --scaling are for a single model")
    picture = Path(args.output or "perplexity.png")
    is_one = picture.suffix.lower() == ".png" and picture.parent.is_dir() and not picture.is_dir()
    if args.stride is None and not is_one:
        raise UserError(f"{picture}: must be a picture's name (.png) in a folder that exists")


def check_asking(args: Namespace) -> None:
    if args.questions and args.show < 0:
        raise UserError(f"command line: --show must be at least 0, got {args.show}")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"command line: --limit must be at least 1, got {args.limit}")
    if args.choices and (args.shots < 0 or bool(args.shots) != bool(args.dev)):
        raise UserError("command line: --shots N (at least 1) and --dev FOLDER go together")
    if args.out:  # looked at before the first question is asked, not when all have been
        place, folder = Path(args.out), Path(args.out).parent
        for path in (place, Path(f"{args.out}.bak")):
            if path.is_file() and path.stat().st_size and not has_answers(path):
                raise UserError(f"{path}: exists, and is no earlier --out; name another file")
        if not folder.is_dir():
            raise UserError(f"{args.out}: no such folder")
        is_free = all(path.is_file() or not path.exists() for path in (place, Path(f"{args.out}.bak")))
        if not is_free or not os.access(folder, os.W_OK):
            raise UserError(f"{args.out}: no file can be written there")


EVALUATE = {"text": evaluate_text, "questions": evaluate_questions, "choices": evaluate_choices, "runs": evaluate_runs}


def main() -> None:
    args, _ = make_parser().parse()
    warnings.showwarning = lambda message, *_: tell(f"warning: {message}")
    EVALUATE[check_arguments(args)](args)


if __name__ == "__main__":
    run_main(main)
