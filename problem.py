"""Train and test transformers on toy sequence problems, each of which shows something that attention can learn.

    python problem.py --list                        the problems
    python problem.py sort                          trains, tests on held-out instances, prints the exact-match accuracy
    python problem.py sort --length 20 --use_rope false --n_layer 3         any field can be overridden
    python problem.py copy --train_length 1-10 --test_length 11-20          length generalisation
    python problem.py sort --plot                   training curves, accuracy by length and attention maps as PNG
    python problem.py sort --checkpoint checkpoint/problem_sort.pt          tests a trained model
    python problem.py                               interactive: type inputs for the models trained so far
    python problem.py all                           every problem in turn, and a table of the results

A hash of the prompt decides whether an instance is for training or held out, so none is ever both. Defaults come from
the problem's entry (problems/tasks.py), then from problems/config.py.
"""

import argparse
import functools
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train
from base.configuration import (
    Parser,
    UserError,
    check_fields,
    command_line,
    escape_control_characters,
    fields_of,
    run_main,
)
from base.devices import find_device
from layers.attention_maps import attention_maps
from model import GPT, ModelConfig
from problems.config import ProblemConfig, find_problem, parse_length
from problems.instances import HeldOut, InstanceSampler, exact_match
from problems.plots import draw_attention, draw_results
from problems.tasks import PROBLEMS, Problem
from text.tokenizer import EOS, CharTokenizer
from training.config import TrainConfig
from training.distributed import check_launcher
from training.engine import Engine
from training.run_log import print_table
from training.setup import NOT_FOR_PROBLEMS, problem_config
from training.sources import check_window, problem_tokenizer
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer
from weights.lora import load_merged

# --------------------------------------------------------------------------------------------------------- answers


class Score(NamedTuple):
    n_right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.n_right / self.n

    def __str__(self) -> str:
        percent = 100.0 if self.n_right == self.n else min(99.99, 100 * self.accuracy)  # 100.00% means all
        return f"{percent:.2f}% ({self.n_right}/{self.n})"


def total(correct: dict[int, np.ndarray]) -> Score:
    """The score over all lengths, from exact_match()."""
    return Score(sum(int(c.sum()) for c in correct.values()), sum(map(len, correct.values())))


@dataclass
class Solver:
    """A trained model with its tokenizer and problem: answers prompts given as text."""

    model: GPT
    tokenizer: CharTokenizer
    problem: Problem
    device: torch.device
    settings: ProblemConfig

    def pad(self, text: str) -> str:
        """A prompt with leading zeros before its numbers, where the model was trained on numbers of equal width."""
        widths = self.problem.widths(self.settings)
        if not widths or any({len(number) for number in re.findall(r"\d+", text)} == {width} for width in widths):
            return text
        return re.sub(r"\d+", lambda number: number[0].zfill(max(widths)), text)

    @functools.cached_property
    def prompts(self) -> dict[int, list[str]]:
        """Some prompts of every length that the model was trained on."""
        sampler = InstanceSampler(self.settings, self.tokenizer)
        lengths, rng = parse_length(self.settings.train_length), np.random.default_rng(0)
        return {length: [*map(text_of, sampler.generate(rng, 16, length).prompt)] for length in lengths}

    @property
    def example(self) -> str:
        return self.prompts[max(self.prompts)][0]

    def is_strange(self, text: str) -> bool:
        """Whether a prompt has another form than those of the training; never, where these have no fixed one."""
        forms = [{form_of(prompt) for prompt in prompts} for prompts in self.prompts.values()]
        return all(len(form) == 1 for form in forms) and form_of(text) not in set.union(*forms)

    def complete(self, text: str) -> str:
        """A typed prompt as those of the training: padded, and with the problem's separator at its end."""
        ends = self.problem.ends
        return self.pad(text) if text.endswith(ends) else self.pad(text.rstrip(" " + ends) + ends)

    def encode(self, text: str) -> torch.Tensor:
        """Token ids (1, T) of a prompt, completed; raises UserError."""
        text = self.complete(text)
        unknown = self.tokenizer.unknown_characters(text)
        if unknown:
            raise UserError(f"not in the alphabet {self.tokenizer.characters!r}: {unknown!r}")
        if not 0 < len(text) <= self.model.config.block_size:
            raise UserError(
                f"{len(text)} characters do not fit into the window of {self.model.config.block_size}: "
                f"it was trained on inputs like {self.example}"
            )
        return torch.from_numpy(self.tokenizer.encode(text).astype(np.int64))[None].to(self.device)

    def answer(self, text: str) -> str:
        """The model's answer: by greedy decoding, token by token; with full attention in one forward pass."""
        idx = self.encode(text)
        self.model.eval()
        if not self.problem.is_causal:
            return self.tokenizer.decode(self.model.predict(idx)[0].tolist())
        max_new_tokens = self.model.config.block_size - idx.size(1) + 1
        steps = self.model.generate(idx, max_new_tokens, temperature=0.0, stop_tokens=(EOS,))
        tokens = [token.item() for token in steps]
        return self.tokenizer.decode(tokens[: tokens.index(EOS)] if EOS in tokens else tokens)


def form_of(text: str) -> str:
    """What two prompts of one form have in common: every digit as 0, every letter as a."""
    return re.sub("[a-z]", "a", re.sub("[0-9]", "0", text))


def text_of(codes: np.ndarray) -> str:
    """The text of a row of character codes."""
    return "".join(chr(code) for code in codes if code)


def show_examples(solver: Solver, held_out: HeldOut, correct: dict[int, np.ndarray], n: int = 4) -> None:
    """Print a few wrong and a few right answers."""
    for label, is_right in (("wrong", False), ("right", True)):
        found = [(length, i) for length, c in correct.items() for i in np.flatnonzero(c == is_right)]
        for j in np.linspace(0, len(found) - 1, min(n, len(found))).astype(int):
            length, i = found[j]
            prompt, expected, _ = held_out.by_length[length]
            prompt, expected = text_of(prompt[i]), text_of(expected[i])
            print(f"{label}: {prompt} -> {solver.answer(prompt)}" + ("" if is_right else f"  (expected {expected})"))


# ------------------------------------------------------------------------------------------- training and testing


class Outcome(NamedTuple):
    """Result of one problem: a row of the table that `all` prints."""

    config: TrainConfig
    settings: ProblemConfig
    score: Score
    n_parameters: int
    minutes: float

    COLUMNS = ("problem", "length", "exact match", "parameters", "minutes", "seed")

    def row(self) -> tuple[str, ...]:
        trained, tested = self.settings.train_length, self.settings.test_length
        lengths = trained if trained == tested else f"{trained}, tested on {tested}"
        seed = str(self.config.random_seed)
        return self.settings.problem, lengths, str(self.score), f"{self.n_parameters:,}", f"{self.minutes:.1f}", seed


def load_solver(path: str | Path, device: torch.device, name: str, min_window: int = 0) -> Solver:
    """A trained model. Rotary positions are computed, not learned: with them the window can grow to min_window."""
    checkpoint = load_checkpoint(path)
    tokenizer = load_checkpoint_tokenizer(checkpoint, path)
    problem = find_problem(name)
    stored = stored_fields(checkpoint, path)
    if stored["problem"] != name or tokenizer.fingerprint() != problem_tokenizer(problem).fingerprint():
        command = command_line("problem.py", stored["problem"], "--checkpoint", str(path))
        raise UserError(f"{path}: a model of the problem {stored['problem']}, not of {name}: `{command}`")
    settings = ProblemConfig(**{name: value for name, value in stored.items() if name in fields_of(ProblemConfig)})
    shape = checkpoint["model_config"]
    changes = {"block_size": max(min_window, shape["block_size"])} if shape.get("use_rope") else {}
    return Solver(load_merged(checkpoint, path, **changes).to(device), tokenizer, problem, device, settings)


def stored_fields(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Training and problem config of a checkpoint; raises UserError if it is not a checkpoint of a problem."""
    values = checkpoint["train_config"]
    if "problem" not in values:
        raise UserError(f"{path}: not a checkpoint of problem.py")
    return check_fields(values, fields_of(TrainConfig) | fields_of(ProblemConfig), f"{path}: train_config")


def test(
    path: str | Path, config: TrainConfig, settings: ProblemConfig, plot: bool, example: str | None, log: Path | None
) -> Score:
    """Exact-match accuracy of a checkpoint on the test split; prints examples and, on request, writes the plots."""
    engine = Engine(config)
    sampler = InstanceSampler(settings, problem_tokenizer(find_problem(settings.problem)))
    solver = load_solver(path, engine.device, settings.problem, sampler.window())
    check_window(sampler, solver.model.config, str(path))
    lengths, shared = parse_length(settings.test_length), {"batch_size": config.batch_size, "seed": config.random_seed}
    held_out = HeldOut(sampler, "test", lengths, settings.test_instances, **shared)
    correct = exact_match(solver.model, held_out, engine)
    show_examples(solver, held_out, correct)
    unit = solver.problem.unit
    if len(correct) > 1:
        for length, c in correct.items():
            score = Score(int(c.sum()), len(c))
            print(f"{length:3} {unit}: {score if score.n else 'no instance in the test split'}")
    if plot:
        example = example or text_of(next(i.prompt[-1] for i in held_out.by_length.values() if len(i.prompt)))
        draw(solver, config.stage, settings, log, correct, example)
    return total(correct)


def draw(
    solver: Solver, name: str, settings: ProblemConfig, log: Path | None, correct: dict[int, np.ndarray], example: str
) -> None:
    """Write NAME.png and, where all layers have attention weights, NAME_attention.png."""
    trained = parse_length(settings.train_length)
    by_length = {length: float(c.mean()) for length, c in correct.items() if len(c)}
    title = f"{settings.problem}, trained on {settings.train_length or 'all'} {solver.problem.unit}"
    draw_results(f"{name}.png", title, log, by_length, trained, solver.problem.unit)
    if any(attention.IS_RECURRENT for attention in solver.model.config.attention_classes):
        print(f"plots: {name}.png (no attention maps: a linear layer has no attention weights)")
        return
    ids = solver.encode(example)
    maps = attention_maps(solver.model, ids)[:, 0].float().cpu().numpy()  # (n_layer, n_head, T, T)
    title = f"{settings.problem}: {example} \N{RIGHTWARDS ARROW} {solver.answer(example)}"
    draw_attention(f"{name}_attention.png", title, maps, list(solver.tokenizer.decode(ids[0].tolist())))
    print(f"plots: {name}.png, {name}_attention.png")


def train_and_test(
    name: str, overrides: dict[str, Any], plot: bool, example: str | None, argv: list[str]
) -> Outcome | None:
    """Train on a problem and test its best checkpoint; None if the training was interrupted.

    argv: the arguments that a command to go on repeats.
    """
    config = problem_config(name, overrides)
    run = train.train_stage(config, Engine, argv)
    if run.stopped:
        return None
    if not run.owns_best:  # that file is another run's
        raise UserError(f"{name}: no evaluation was finite, so there is no best checkpoint to test")
    score = test(run.best_path, config.training, config.settings, plot, example, run.log_path)
    minutes = (time.perf_counter() - run.began) / 60
    return Outcome(config.training, config.settings, score, run.model.parameter_count(), minutes)


def list_problems() -> None:
    rows = [("problem", "shows", "example", "attention", "length", "options")]
    for name, problem in PROBLEMS.items():
        settings = ProblemConfig(problem=name)
        sampler = InstanceSampler(settings, problem_tokenizer(problem))
        instances = sampler.draw(np.random.default_rng(0), 1, parse_length(settings.train_length)[-1], "test")
        example = f"{text_of(instances.prompt[0])} -> {text_of(instances.answer[0])}"
        length = f"{problem.length} {problem.unit}" if problem.length else ""
        kind = "causal" if problem.is_causal else "full"
        rows.append((name, problem.shows, example, kind, length, " ".join(f"--{o}" for o in problem.options)))
    print_table(rows)


def interact(paths: dict[str, Path], device: torch.device, current: str) -> None:
    """Answer lines of standard input; the name of a problem at the start of a line switches to that problem."""
    solvers: dict[str, Solver] = {}
    interactive = sys.stdin.isatty()

    def tell(text: str) -> None:  # what was typed may have come from elsewhere
        print(escape_control_characters(text), file=sys.stderr)

    tell(f"type an input; the name of a problem switches to it ({', '.join(paths)}); /help; /quit or Ctrl-D ends")
    while True:
        try:
            line = input(f"{current}> " if interactive else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit", "/q"):
            return
        word, _, rest = line.partition(" ")
        if word in paths:
            current, line = word, rest.strip()
        try:
            solver = solvers[current] = solvers.get(current) or load_solver(paths[current], device, current)
            if line == "/help" or (word == current and not line):
                tell(f"{current}: {solver.problem.shows}; type an input like {solver.example}")
                if line:
                    tell(f"problems: {', '.join(paths)}; /quit ends")
            elif line.startswith("/"):
                tell(f"error: {line}: no such command; /help, /quit")
            elif line:
                print(solver.answer(line), flush=True)
                if solver.is_strange(solver.complete(line)):
                    tell(f"(it was trained on inputs like {solver.example}: this one has another form)")
        except UserError as error:
            tell(f"error: {error}")


def trained_problems(folder: str) -> dict[str, Path]:
    """Paths of the checkpoints in a folder, by problem."""
    found = {name: Path(folder, f"problem_{name}.pt") for name in PROBLEMS}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        raise UserError(f"no problem has been trained in {folder}/ yet: python problem.py sort trains one")
    return found


def main() -> None:
    parser = Parser(__doc__, ProblemConfig, TrainConfig, ModelConfig, hidden=NOT_FOR_PROBLEMS)
    parser.add_argument("problem", nargs="?", default=argparse.SUPPRESS, help="name of a problem (--list), or all")
    parser.add_argument("--list", action="store_true", help="list the problems")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="test this model (or NAME: checkpoint/NAME.pt); without a problem: interactive",
    )
    parser.add_argument("--plot", action="store_true", help="write plots: <stage>.png and <stage>_attention.png")
    parser.add_argument("--example", metavar="TEXT", help="input for the attention maps [the first test instance]")
    args, overrides = parser.parse([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
    check_launcher(arguments_of_training(parser, args))
    name = overrides.pop("problem", None)
    if args.example and not args.plot:
        raise UserError("command line: --example needs --plot")
    if args.list:
        list_problems()
    elif args.checkpoint:
        test_checkpoint(args, name, overrides)
    elif name is None:
        paths = trained_problems(overrides.get("save_checkpoint_to", "checkpoint"))
        interact(paths, find_device(overrides.get("device", "auto")), next(iter(paths)))
    elif name == "all":
        outcomes = []
        for each in PROBLEMS:
            argv = [each if argument == "all" else argument for argument in sys.argv[1:]]
            outcomes.append(train_and_test(each, overrides, args.plot, None, argv))
            if outcomes[-1] is None:
                break
            print(f"accuracy: {outcomes[-1].score}\n")
        print_table([Outcome.COLUMNS, *(outcome.row() for outcome in outcomes if outcome)])
    else:
        outcome = train_and_test(name, overrides, args.plot, args.example, sys.argv[1:])
        if outcome:
            print(f"{outcome.n_parameters:,} parameters, {outcome.minutes:.1f} minutes")
            print(f"accuracy: {outcome.score}")


def arguments_of_training(parser: Parser, args: argparse.Namespace) -> list[str] | None:
    """Those with which the scripts for several processes train on the problem; None where these cannot do it."""
    if args.list or args.checkpoint or getattr(args, "problem", "all") == "all":
        return None
    given = {name: getattr(args, name) for name in parser.fields if hasattr(args, name)}
    given.setdefault("gradient_accumulation_steps", os.environ.get("WORLD_SIZE", "1"))  # a micro-batch for each
    return [part for name, text in given.items() for part in (f"--{name}", text)]


def test_checkpoint(args: argparse.Namespace, name: str | None, overrides: dict[str, Any]) -> None:
    """--checkpoint: test a trained model on a problem; without a problem's name, interactive."""
    stored = stored_fields(load_checkpoint(args.checkpoint), args.checkpoint)
    if "train_fraction" in overrides:
        raise UserError("command line: --train_fraction with --checkpoint: it would mix training and test instances")
    run_config = problem_config(
        name or stored["problem"], {**overrides, "from_checkpoint": "", "use_lora": False}, stored
    )
    if run_config.model:
        field = next(iter(run_config.model))
        raise UserError(f"command line: --{field} with --checkpoint: the shape of a trained model cannot change")
    config, settings = run_config.training, run_config.settings
    if name is None:
        interact({settings.problem: Path(args.checkpoint)}, find_device(config.device), settings.problem)
    else:
        print(f"accuracy: {test(args.checkpoint, config, settings, args.plot, args.example, None)}")


if __name__ == "__main__":
    run_main(main)
