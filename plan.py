"""What to train in the time there is: measures this machine, tries small models on the text, and writes a config.

    python plan.py book.txt --minutes 30                    prepares the text as data.py does, writes config/plan.json
    python plan.py dataset/pretrain_train.bin --hours 2     a text that data.py has prepared
    python train.py -t plan                                 trains it, ends in time, compares prediction and result
    python plan.py book.txt --minutes 30 --run              both

Takes a tenth of the time beforehand, 15 minutes at most: to count n-grams, to measure the speed of networks of several
widths, and for a short run (the probe) on the text itself, to which a scaling law is fitted (planning/law.py). Of all
sizes and windows the plan takes the one whose loss the law says is lowest when the time is over, or earlier, where
reading a short text more often would only teach it by heart. plan.png shows it.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import train
from base.configuration import Parser, UserError, command_line, read_json, run_main
from base.devices import find_device
from base.files import atomic_write, nearest_place
from planning.law import Law, Prior, Run
from planning.machine import Clock, Machine, fit_memory, make_run, measure_machine
from planning.picture import draw
from planning.recipe import DEPTHS, WINDOWS, Shape, recipe, tokens_per_step
from planning.text import Text, open_text
from text.token_files import files_in
from text.tokenizer import SMALLEST_BPE
from training.run_log import amount, print_table

SHARE, LONGEST = 0.1, 15 * 60  # of the time, and seconds at most, that planning takes
REPETITIVE = 0.1  # of the unigram entropy; among the prior's texts 0.13 is the least that is left
KNOWN_EPOCHS = 32  # readings of a text: the law's runs have no more
ENOUGH_TOKENS, LEAST_TOKENS = 60_000, 30_000  # of a probe: 80 steps, 40 steps
WRITING = 2  # seconds of that for the table and the picture
WEIGHTS_PER_TOKEN = 2  # of the text, at most: the law's runs on what people wrote have 3.5
LEAST_TEXT = Shape(min(DEPTHS), min(WINDOWS)).n_weights / WEIGHTS_PER_TOKEN  # tokens
TOLERATED = 0.01  # of the loss, lost to overfitting, before a plan ends earlier than it could
READINGS = 1.1 ** np.arange(100)  # of a text, after which a plan may end: 1, 1.1, 1.21, ... 12,528
NOTICED = 0.005  # of the loss: a smaller gain is none
LONG = 60  # minutes of training for which compiling pays
SHOWN_MINUTES = (3, 10, 30, 120, 480)


# ------------------------------------------------------------------------------------------------------ the text


def prepare_text(args: argparse.Namespace) -> Text:
    """The text that was named: prepared already, or prepared now, into dataset/ as by data.py."""
    if len(args.text) == 1 and args.text[0].endswith(".bin"):
        if args.vocab:
            raise UserError("command line: --vocab is for texts; this one has been prepared with a vocabulary")
        return open_text(Path(args.text[0]))
    sizes = [Path(text).stat().st_size for text in args.text if text.endswith(".txt") and Path(text).is_file()]
    if len(sizes) == len(args.text) and sum(sizes) < LEAST_TEXT:  # before it takes the place of what is prepared
        raise UserError(f"{args.text[0]}: {sum(sizes):,} bytes are too few to plan for; the least is {LEAST_TEXT:,.0f}")
    path, kinds = Path("dataset/pretrain_train.bin"), {"": [], "char": ["--tokenizer", "char"]}
    kind = kinds.get(args.vocab, ["--tokenizer", "bpe", "--vocab_size", args.vocab])
    before = path.stat().st_mtime_ns if path.is_file() else None
    job = subprocess.run([sys.executable, str(Path(__file__).with_name("data.py")), *args.text, *kind])
    if job.returncode:  # data.py has said why
        if not all(Path(text).exists() for text in args.text):
            raise UserError("nothing is planned")
        raise UserError(
            "nothing is planned; where an option of data.py helps, the text is prepared with it first, and planned for "
            f"then: `{command_line('data.py', *args.text, 'OPTION')}`, `{repeated(args, path)}`"
        )
    if not path.is_file() or path.stat().st_mtime_ns == before:
        raise UserError(f"{args.text[0]}: not running text, as data.py read it; plans are for pretraining")
    return open_text(path)


def repeated(args: argparse.Namespace, text: Path) -> str:
    """The command that plans again, for a text that is prepared."""
    options = ["--minutes", f"{args.minutes or 60 * args.hours:g}"]
    for name, default in (("device", "auto"), ("output", "config/plan.json")):
        options += [f"--{name}", value] if (value := getattr(args, name)) != default else []
    return command_line("plan.py", str(text), *options, *["--run"] * args.run)


# ------------------------------------------------------------------------------------------------------ the probe


class Records:
    """What the training loop needs of a RunLog: records are kept, nothing is written, the bar is the plan's."""

    def __init__(self, clock: Clock) -> None:
        self.bar, self.records = clock, []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def step(self, record: dict[str, Any]) -> None:
        self.write({"type": "train", **record})

    def message(self, text: str) -> None:
        """Of evaluations and saves, which are not what a probe is for."""


@dataclass
class Probe:
    """What the short run has shown."""

    shape: Shape
    tokens: int  # read in training
    loss: float  # validation, nats per token
    tokens_per_s: float


def probe(shape: Shape, fields: dict[str, Any], clock: Clock) -> Probe:
    """Train to the end, with a decay of the learning rate of its own, and evaluate once."""
    with tempfile.TemporaryDirectory() as folder:
        run, log = make_run(fields, folder), Records(clock)
        train.train(run, log)
    if run.stopped:
        raise KeyboardInterrupt
    steps, (val,) = ([r for r in log.records if r["type"] == kind] for kind in ("train", "val"))
    seconds = sum(r["ms_per_step"] for r in steps[1:]) / 1000  # the first step, which warms up, left out
    return Probe(shape, run.state.tokens, val["val_loss"], (steps[-1]["tokens"] - steps[0]["tokens"]) / seconds)


# ------------------------------------------------------------------------------------------------------ the choice


@dataclass
class Candidate:
    """A shape, what it can read in the time, and the loss that the law predicts for the end."""

    shape: Shape
    minutes: float  # that it takes: all there are, or fewer
    tokens: float
    loss: float  # nats per token: the middle, and an interval of nine in ten
    low: float
    high: float


def candidates(law: Law, machine: Machine, text: Text, minutes: float, unique: float | None = None) -> list[Candidate]:
    """All shapes that text and time allow, best first. unique: tokens of the text, were it longer than it is.

    A run that would read the text more than once ends where its loss is lowest, if the whole time would cost more than
    TOLERATED of the loss: what overfitting does is not known so well that less would be a reason. It is ranked as if it
    had lost that, too, or it would win over one for which the time is only just too long.
    """
    unique, found = unique or text.unique, []
    for shape in (Shape(n_embd, window) for n_embd in DEPTHS for window in WINDOWS):
        most = machine.seconds(minutes) * machine.tokens_per_s(shape)
        is_long_enough = unique >= 10 * shape.window and most >= 10 * tokens_per_step(most)
        if not is_long_enough or shape.n_weights > WEIGHTS_PER_TOKEN * unique:
            continue
        tokens = np.append(most, unique * READINGS[unique * READINGS < most])
        runs = np.array([(shape.n_weights, D, shape.window, unique, math.nan) for D in tokens])
        shares = law.predict(runs)
        i = int(shares[:, 0].argmin())
        most_tolerated = (1 + TOLERATED) * shares[i, 0]
        i = 0 if shares[0, 0] <= most_tolerated else i
        takes = machine.minutes(shape, tokens[i]) if i else minutes
        loss = text.baselines["unigram"] * np.minimum(1, shares[i])  # no worse than single characters' shares
        found.append((min(shares[0, 0], most_tolerated), Candidate(shape, takes, float(tokens[i]), *loss.tolist())))
    if not found:
        raise UserError(f"command line: {minutes:g} minutes are too short here for the smallest network; give more")
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def run_probe(
    law: Law, machine: Machine, text: Text, fields: dict[str, Any], minutes: float, clock: Clock
) -> Probe | None:
    """A short run in the time that is left, of the shape that looks best, or of a narrower one that can read enough.

    Two sizes, or one for two lengths, in the same time predict no better (bench/NOTES.md): what counts is how far the
    probe goes, and at the size in question.
    """
    first = candidates(law, machine, text, minutes)[0]
    best = first.shape
    seconds = clock.left() - WRITING - 0.5  # half a second to build it
    evaluated = 100 * fields["eval_iters"] * best.window / 3  # what that takes, in tokens: a third of training
    for n_embd in [width for width in reversed(DEPTHS) if width <= best.n_embd]:
        shape = Shape(n_embd, best.window)
        tokens = min(seconds * machine.tokens_per_s(shape) - evaluated, first.tokens)  # no more than the plan itself
        if tokens >= ENOUGH_TOKENS:
            break
    if tokens < LEAST_TOKENS:
        return None
    clock.update(f"probe of {shape.n_layer} x {shape.n_embd}, {amount(tokens)} tokens")
    result = probe(shape, text.fields | fields | recipe(shape, tokens), clock)
    machine.add(shape, result.tokens_per_s)
    return result


def study(
    text: Text, fields: dict[str, Any], minutes: float, imported: float, clock: Clock
) -> tuple[Machine, Law, Probe | None]:
    """The machine's speed, the law of the text, and the short run that it is fitted to; sets eval_iters in fields."""
    clock.update("counting n-grams")
    prior = Prior.load().given(text.shares)
    machine = measure_machine(text, fields, minutes, imported + 1, 0.25 * clock.seconds, clock)
    before = Law.of_prior(prior)
    first = candidates(before, machine, text, minutes)[0]
    fields["eval_iters"] = eval_iters(first.tokens, first.shape.window)
    trial = run_probe(before, machine, text, fields, minutes, clock)
    clock.bar.close()
    if trial is None:
        return machine, before, None
    loss = trial.loss / text.baselines["unigram"]
    run = Run(trial.shape.n_weights, trial.tokens, trial.shape.window, text.unique, loss)
    return machine, Law.fit(np.array([run]), prior), trial


# ------------------------------------------------------------------------------------------------------ the plan


def eval_iters(tokens: float, window: int) -> int:
    """Hundreds of validation samples per evaluation: of a plan's five evaluations each takes about 1% of its time.

    (A forward pass is a third of a step.) The probe has as many, and the same samples where its window is the plan's.
    """
    return max(1, round(0.03 * tokens / window / 100))


def plan_fields(
    text: Text, best: Candidate, fields: dict[str, Any], machine: Machine, minutes: float, prediction: str
) -> dict[str, Any]:
    """The config of a plan: it decays with the time, or, where it ends before the minutes there are, with the steps."""
    micro_batch, _ = fit_memory(text, best.shape, fields, best.tokens)
    values = recipe(best.shape, best.tokens, micro_batch)
    steps = values["max_steps"]
    if best.minutes < minutes:
        values |= {"decay_over": "steps"}
        fields = fields | {"compile": "auto" if best.minutes >= LONG else "false"}
    else:
        values |= {"decay_over": "time", "max_steps": None}
    return {
        **{name: value for name, value in values.items() if value is not None},
        **{name: value for name, value in fields.items() if value != "auto"},
        **text.fields,
        "max_minutes": round(machine.limit(minutes) / 60, 3),
        "eval_interval": max(1, steps // 5),
        "log_interval": max(1, steps // 2000),
        "prediction": prediction,
        "planned_for": text.header.get("preparation") or "",
    }


def duration(minutes: float) -> str:
    if minutes < 0.5:
        return f"{60 * minutes:.2g} s"
    return f"{minutes / 60:.3g} h" if minutes >= 60 else f"{minutes:.3g} min"


def print_plans(
    text: Text, law: Law, machine: Machine, fields: dict[str, Any], chosen: Candidate, minutes_given: float
) -> None:
    """The table: what each time would give, and what trivial models and compressors reach beside it."""
    bits = text.tokens_per_character / math.log(2)
    rows = [("time", "layers x width, window", "weights", "tokens (epochs)", "loss", "bits/character", "memory")]
    any_beyond = any_shorter = False
    for minutes in sorted({*SHOWN_MINUTES, minutes_given}):
        best = chosen if minutes == minutes_given else candidates(law, machine, text, minutes)[0]
        epochs = best.tokens / text.unique
        any_beyond |= epochs > KNOWN_EPOCHS
        any_shorter |= best.minutes < minutes
        shape = best.shape
        _, memory = fit_memory(text, shape, fields, best.tokens)
        rows.append(
            (
                duration(minutes)
                + (f", {duration(best.minutes)} used" if best.minutes < minutes else "")
                + (" <-" if best is chosen else ""),
                str(shape),
                amount(shape.n_weights + text.vocab_size * shape.n_embd),
                f"{amount(best.tokens)} ({f'{epochs:,.0f}*' if epochs > KNOWN_EPOCHS else f'{epochs:.2g}'})",
                f"{best.loss:.3f} ({best.low:.3f} to {best.high:.3f})",
                f"{best.loss * bits:.2f}",
                f"{memory / 1e9:.2f} GB",
            )
        )
    print_table(rows)
    lines = [f"single tokens' frequencies (unigram) {text.baselines['unigram'] * bits:.2f} bits/character"]
    if "lzma_bits_per_character" in text.baselines:
        lines.append(f"lzma {text.baselines['lzma_bits_per_character']:.2f}")
    print(f"beside it: {', '.join(lines)}; intervals: nine in ten; memory: without Python's and torch's own")
    if any_beyond:
        print(f"* the law was fitted to runs of up to {KNOWN_EPOCHS} epochs, and knows nothing of more")
    if any_shorter:
        print("used: from then on, by the law, a network would learn this text by heart, and its loss rise")


def advice_on_data(law: Law, machine: Machine, text: Text, minutes: float, chosen: Candidate) -> str:
    """Whether twice the text would help more than twice the time."""
    longer = candidates(law, machine, text, 2 * minutes)[0].loss
    larger = candidates(law, machine, text, minutes, 2 * text.unique)[0].loss
    if chosen.minutes < minutes or longer > (1 - NOTICED) * chosen.loss:
        return f"more time would not help; twice the text would give {larger:.3f}"
    gains = f"twice the time would give {longer:.3f}, twice the text {larger:.3f}"
    if larger < longer:
        return f"more text would help more than more time: {gains}"
    return gains


def draw_plan(
    output: Path, law: Law, machine: Machine, text: Text, chosen: Candidate, minutes_given: float, trial: Probe | None
) -> None:
    """The loss over the time for the plan's size and those beside it."""
    widths, curves = [*DEPTHS], {}
    here = widths.index(chosen.shape.n_embd)
    minutes = np.geomspace(max(chosen.minutes / 50, machine.start_up / 50), 16 * minutes_given, 60)
    for n_embd in [chosen.shape.n_embd, *widths[max(0, here - 2) : here], *widths[here + 1 : here + 3]]:
        shape = replace(chosen.shape, n_embd=n_embd)
        if shape.n_weights > WEIGHTS_PER_TOKEN * text.unique:
            continue
        tokens = np.array([machine.seconds(m) * machine.tokens_per_s(shape) for m in minutes])
        tokens = tokens[tokens <= max(KNOWN_EPOCHS * text.unique, chosen.tokens)]  # beyond, the law knows nothing
        runs = np.array([(shape.n_weights, D, shape.window, text.unique, math.nan) for D in tokens]).reshape(-1, 5)
        losses = text.baselines["unigram"] * np.minimum(1, law.predict(runs))
        name = f"{shape.n_layer} x {n_embd}: {amount(shape.n_weights + text.vocab_size * n_embd)} weights"
        curves[name] = np.concatenate([minutes[: len(tokens), None], losses], axis=1)
    measured = (machine.minutes(trial.shape, trial.tokens), trial.loss) if trial else None
    draw(output, curves, chosen, measured, text.tokens_per_character / math.log(2))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("text", nargs="+", help="texts to prepare as data.py does, or a training file NAME_train.bin that it has made")
    add("--minutes", type=float, metavar="M", help="how long training may take")
    add("--hours", type=float, metavar="H", help="the same in hours")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    add(
        "--vocab",
        default="",
        metavar="char|N",
        help="vocabulary for a text: characters, or byte pairs of this size [char]",
    )
    add("--output", metavar="FILE", default="config/plan.json", help="the config to write [config/plan.json]")
    add("--run", action="store_true", help="train what was planned")
    return parser


def check_arguments(args: argparse.Namespace) -> float:
    """The minutes of training; raises UserError, also where the config or the picture could not be written."""
    if (args.minutes is None) == (args.hours is None):
        which = "give one of them" if args.hours is None else "not both"
        raise UserError(f"command line: how long may training take? --minutes 30, or --hours 2: {which}")
    minutes = args.minutes if args.hours is None else 60 * args.hours
    if not 0.5 <= minutes <= 60 * 24 * 30:
        raise UserError(f"command line: {minutes:g} minutes: a plan is for half a minute to 30 days")
    if args.vocab not in ("", "char") and not (args.vocab.isdecimal() and int(args.vocab) >= SMALLEST_BPE):
        least = f"a vocabulary's size of at least {SMALLEST_BPE}"
        raise UserError(f"command line: --vocab must be char, or {least}, got {args.vocab}")
    find_device(args.device)
    output = Path(args.output)
    if output.suffix != ".json":
        raise UserError(f"{output}: the config to write is a .json file")
    if output.exists() and not is_plan(output):
        raise UserError(f"{output}: not a plan's config; --output names another file")
    picture = picture_of(output)
    if picture.exists() and not output.exists():  # so it is of no plan that this one replaces
        raise UserError(
            f"{picture}: exists, and is of no plan {output}: move it away, or name another config by --output"
        )
    for path in (output, picture):
        folder = nearest_place(path.parent)
        if not folder.is_dir() or not os.access(folder, os.W_OK) or (path.exists() and not path.is_file()):
            raise UserError(f"{path}: no file can be written there")
    return minutes


def is_plan(path: Path) -> bool:
    """Whether a file is a config that this script has written: it may be replaced."""
    with contextlib.suppress(UserError):
        return isinstance(values := read_json(path), dict) and "planned_for" in values
    return False


def picture_of(output: Path) -> Path:
    """Where the picture of a plan goes: into this folder if the plan is in config/, else beside it."""
    picture = output.with_suffix(".png")
    return Path(picture.name) if output.parent.resolve() == Path("config").resolve() else picture


def main() -> None:
    imported = min(10.0, time.process_time())  # seconds, which train.py will take, too
    args, _ = make_parser().parse()
    minutes, output = check_arguments(args), Path(args.output)
    text = prepare_text(args)
    if text.unique < LEAST_TEXT:
        raise UserError(f"{text.train}: {text.unique:,} tokens are too few to plan for; the least is {LEAST_TEXT:,.0f}")
    clock = Clock(max(1.0, min(60 * minutes * SHARE, LONGEST) - imported))
    fields = {"device": args.device, "compile": "auto" if minutes >= LONG else "false", "eval_iters": 1}
    try:
        machine, law, trial = study(text, fields, minutes, imported, clock)
    except KeyboardInterrupt:
        clock.bar.close()
        kept = f"{output} is as it was" if output.exists() else "there is no plan"
        print(f"stopped: what was measured is lost, {kept}; the text stays prepared: {repeated(args, text.train)}")
        raise
    chosen = candidates(law, machine, text, minutes)[0]
    if of := files_in(text.header.get("arguments") or []):
        print(f"{text.train}, of {' '.join(of)}:")
    print_plans(text, law, machine, fields, chosen, minutes)
    if trial is None:
        print("too little time for a short run on this text (a few minutes more do): losses as texts like it have them")
    else:
        print(f"a short run, {trial.shape}, reached {trial.loss:.4f} after {trial.tokens:,} tokens")
    print(advice_on_data(law, machine, text, minutes, chosen))
    if np.nanmin(text.shares) < REPETITIVE:
        print(
            "this text repeats itself: n-grams or lzma leave almost nothing of it, unlike of the law's texts, and "
            "what validation reads may stand in the training text"
        )

    interval = f"{chosen.low:.3f} to {chosen.high:.3f}"
    prediction = f"predicted {chosen.loss:.3f} ({interval}, {amount(chosen.tokens)} tokens)"
    values = plan_fields(text, chosen, fields, machine, minutes, prediction)
    if output.exists():  # an earlier plan
        os.replace(output, f"{output}.bak")
    with atomic_write(output) as file:
        file.write(json.dumps(values, indent=2).encode())
    draw_plan(picture_of(output), law, machine, text, chosen, minutes, trial)
    print(f"{prediction}; planned in {imported + clock.seconds - clock.left():.0f} s -> {output}, {picture_of(output)}")
    command = ["-t", "plan" if output == Path("config/plan.json") else str(output)]
    if not args.run:
        print(f"to train it: {command_line('train.py', *command)}")
        return
    sys.stdout.flush()
    script = str(Path(sys.argv[0]).with_name("train.py"))  # as this one was typed: its messages repeat it
    os.execv(sys.executable, [sys.executable, script, *command])  # takes this process's place, signals and all


if __name__ == "__main__":
    run_main(main)
