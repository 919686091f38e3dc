"""Toy sequence problems that show what attention can learn; tasks.py holds the table of them.

    python problem.py --list                        the problems
    python problem.py sort                          trains, tests on held-out instances, prints the exact-match accuracy
    python problem.py sort --length 20 --use_rope false --n_layer 3         any field can be overridden
    python problem.py copy --train_length 1-10 --test_length 11-20          does it work at lengths never trained on?
    python problem.py sort --plot                   curves, accuracy by length and attention maps as PNG
    python problem.py sort --checkpoint checkpoint/problem_sort.pt          tests a trained model
    python problem.py                               type inputs, read the answers of the models trained so far
    python problem.py all                           every problem in turn, and a table of the results

Training and held-out instances are told apart by a hash of the prompt, so that none is ever both. Fields not given take
the value in the problem's entry, or else that of DEFAULTS in problem.py.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train
from base.configuration import Parser, UserError, check_fields, fields_of, option, run
from model import GPT, ModelConfig
from problems.instances import HeldOut, Source, TrainInstances, find_problem, parse_length
from problems.plots import draw_attention, draw_results
from problems.tasks import PROBLEMS, Problem
from text.tokenizer import EOS, CharTokenizer
from train import TrainConfig
from training import preflight
from training.engine import Engine
from training.grpo import Rollouts
from training.losses import load_frozen, make_loss
from training.run_log import print_table
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model, load_newest

DEFAULTS = {
    "batch_size": 256,
    "gradient_accumulation_steps": 1,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "min_lr": 0.0,
    "weight_decay": 0.01,
    "lr_schedule": "linear",
    "warmup_iters": 20,
    "max_steps": 1000,
    "eval_interval": 100,
    "eval_iters": 4,
}
BY_REWARD = {  # with --loss grpo, where the problem's entry says nothing else
    "batch_size": 512,
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "weight_decay": 0.0,
    "warmup_iters": 5,
    "max_steps": 350,
    "eval_interval": 25,
}
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64}
# fields of files and texts, which mean nothing here
NO_FIELDS = (
    *("dataset_path", "tokenizer_path", "overlong", "mask_documents", "pack_samples"),
    *("restart_positions", "sample_tokens", "sample_prompt"),
    *("teacher", "distill_temperature", "distill_weight", "dpo_beta", "dpo_chosen_weight", "simpo_gamma"),
)
LOSSES = ("next_token", "grpo")


@dataclass
class ProblemConfig(TrainConfig):
    """What is asked, and how the network is trained to answer."""

    problem: str = option("sort", "name of the problem")
    length: str = option("", "length of the instances, N or A-B; empty: the problem's")
    train_length: str = option("", "length in training; empty: length")
    test_length: str = option("", "length in the test; empty: length, or train_length")
    train_fraction: float = option(0.9, "share of all instances that training draws from", above=0.0, maximum=0.99)
    test_instances: int = option(10_000, "held-out instances of the test, as far as there are so many", minimum=1)
    reverse: bool = option(True, "add, multiply: write results from the last digit to the first")
    pad: bool = option(True, "add, multiply: zeros before numbers, so that every digit has its place")
    scratchpad: bool = option(True, "multiply, parity: write results on the way before the last one")
    supervise: bool = option(True, "also learn what is found on the way (boolean, brackets); recall: ask for all keys")
    leaf_probability: float = option(0.2, "boolean: that an operand is a mere 0 or 1", minimum=0.0, maximum=1.0)
    modulus: int = option(97, "modular: p", minimum=2, maximum=10_000)
    operation: str = option("+", "modular: (a operation b) mod p", choices=("+", "-", "*", "/"))

    def check(self) -> None:
        super().check()
        problem = find_problem(self.problem)
        if not problem.length and (self.length or self.train_length or self.test_length):
            raise UserError(f"the problem {self.problem} has no length")
        self.test_length = self.test_length or self.length or self.train_length or problem.length
        self.train_length = self.train_length or self.length or problem.length
        self.length = self.length or problem.length
        for text in (self.length, self.train_length, self.test_length):
            if parse_length(text)[-1] > problem.longest:
                raise UserError(f"the length must be at most {problem.longest}, got {text}")

    @property
    def longest(self) -> int:
        return max(parse_length(self.train_length)[-1], parse_length(self.test_length)[-1])


# --------------------------------------------------------------------------------------------------------- answers


class Score(NamedTuple):
    n_right: int
    n: int

    @property
    def share(self) -> float:
        return self.n_right / self.n

    def __str__(self) -> str:
        percent = 100.0 if self.n_right == self.n else min(99.99, 100 * self.share)  # 100.00 is said of all alone
        return f"{percent:.2f}% ({self.n_right}/{self.n})"


@torch.inference_mode()
def exact_match(model: GPT, held_out: HeldOut, engine: Engine) -> dict[int, np.ndarray]:
    """Whether each held-out answer is right from its first character to its last (n,), by length.

    One pass over prompt and true answer tells what greedy generation would say: as long as all was right so far, it has
    seen the same tokens, and the first token that differs makes the answer wrong in both.
    """
    model.eval()
    right = {}
    for length in held_out.by_length:
        parts = [np.empty(0, bool)]
        for batch, answer_mask in held_out.examples(length):
            batch = batch.to(engine.device)
            with engine.autocast():
                said = model(batch.idx)[0].argmax(-1)
            same = (said == batch.targets) | ~answer_mask.to(engine.device)
            parts.append(same.all(1).cpu().numpy())
        right[length] = np.concatenate(parts)
    model.train()
    return right


def total(right: dict[int, np.ndarray]) -> Score:
    return Score(sum(int(r.sum()) for r in right.values()), sum(map(len, right.values())))


@dataclass
class Solver:
    """A trained model that answers typed inputs."""

    model: GPT
    tokenizer: CharTokenizer
    problem: Problem
    device: torch.device

    def encode(self, text: str) -> torch.Tensor:
        """Token ids (1, T) of a prompt, its end mark added where it lacks; raises UserError."""
        ends = self.problem.ends
        if ends and not text.endswith(ends):
            text = text.rstrip(" " + ends) + ends
        unknown = self.tokenizer.unknown_characters(text)
        if unknown:
            raise UserError(f"not in the alphabet {self.tokenizer.characters!r}: {unknown!r}")
        if not 0 < len(text) <= self.model.config.block_size:
            raise UserError(f"{len(text)} characters do not fit the window of {self.model.config.block_size}")
        return torch.from_numpy(self.tokenizer.encode(text).astype(np.int64))[None].to(self.device)

    def answer(self, text: str) -> str:
        """What the model says to an input: in one pass with full attention, else character by character."""
        idx = self.encode(text)
        self.model.eval()
        if not self.problem.is_causal:
            return self.tokenizer.decode(self.model.predict(idx)[0].tolist())
        room = self.model.config.block_size - idx.size(1) + 1
        said = [token.item() for token in self.model.generate(idx, room, temperature=0.0, stop_tokens=(EOS,))]
        return self.tokenizer.decode(said[: said.index(EOS)] if EOS in said else said)


def text_of(codes: np.ndarray) -> str:
    """The text of a row of character codes."""
    return "".join(chr(code) for code in codes if code)


def show_examples(solver: Solver, held_out: HeldOut, right: dict[int, np.ndarray], n: int = 4) -> None:
    """Print a few instances that were answered wrong, and a few that were answered right."""
    for verdict, wanted in (("wrong", False), ("right", True)):
        places = [(length, i) for length, r in right.items() for i in np.flatnonzero(r == wanted)]
        for j in np.linspace(0, len(places) - 1, min(n, len(places))).astype(int):
            length, i = places[j]
            prompt, expected, _ = held_out.by_length[length]
            prompt, expected = text_of(prompt[i]), text_of(expected[i])
            said = solver.answer(prompt)
            print(f"{verdict}: {prompt} -> {said}" + ("" if wanted else f"  (it is {expected})"))


# --------------------------------------------------------------------------------------------------------- running


class Outcome(NamedTuple):
    """What came of a problem: a row of the table that `all` prints."""

    config: ProblemConfig
    score: Score
    n_parameters: int
    minutes: float

    COLUMNS = ("problem", "length", "exact match", "parameters", "minutes", "seed")

    def row(self) -> tuple[str, ...]:
        trained, tested = self.config.train_length, self.config.test_length
        lengths = trained if trained == tested else f"{trained}, tested on {tested}"
        problem, seed = self.config.problem, str(self.config.random_seed)
        return problem, lengths, str(self.score), f"{self.n_parameters:,}", f"{self.minutes:.1f}", seed


def make_config(name: str, overrides: dict[str, Any], stored: dict[str, Any]) -> tuple[ProblemConfig, dict[str, Any]]:
    """The config of a problem, and the model fields asked for; stored: a checkpoint's training config, or nothing."""
    problem = find_problem(name)
    for option_name in overrides:
        owners = [other for other, entry in PROBLEMS.items() if option_name in entry.options]
        if owners and name not in owners:
            raise UserError(f"command line: --{option_name} belongs to {', '.join(owners)}, not to {name}")
        if option_name in NO_FIELDS:
            raise UserError(f"command line: --{option_name} means nothing here: problem.py makes its own data")
    known = fields_of(ProblemConfig)
    explicit = {key: value for key, value in overrides.items() if key not in known}
    given = {key: value for key, value in overrides.items() if key in known}
    if stored and "length" in given:
        stored = {key: value for key, value in stored.items() if key != "test_length"}
    base = stored or {"stage": f"problem_{name}", **DEFAULTS, **problem.training}
    if given.get("loss") not in (None, *LOSSES):
        raise UserError(f"command line: --loss {given['loss']} means nothing here: it is one of {', '.join(LOSSES)}")
    if given.get("loss") == "grpo" and not stored:
        base |= {"stage": f"problem_{name}_grpo", **BY_REWARD, **problem.by_reward}
    try:
        return ProblemConfig(**{**base, **given, "problem": name}), explicit
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def make_tokenizer(problem: Problem) -> CharTokenizer:
    return CharTokenizer("".join(sorted(set(problem.alphabet))))


def set_up(config: ProblemConfig, explicit: dict[str, Any]) -> train.Run:
    """A train.Run whose batches are generated: new, or from a checkpoint."""
    problem = find_problem(config.problem)
    tokenizer = make_tokenizer(problem)
    source = Source(config, tokenizer)
    needed = source.window()
    if explicit.get("is_causal", problem.is_causal) != problem.is_causal:
        raise UserError(f"{config.problem} is defined with is_causal {str(problem.is_causal).lower()}: see its entry")
    engine = Engine(config)
    engine.command = f"python {Path(sys.argv[0]).name}"  # (train.py -t grpo ends here too)
    if config.from_checkpoint:
        checkpoint = load_newest(config.from_checkpoint)
        if load_checkpoint_tokenizer(checkpoint, config.from_checkpoint).to_dict() != tokenizer.to_dict():
            raise UserError(f"{config.from_checkpoint}: its alphabet is not that of {config.problem}")
        model, adapter = train.restore_model(config, explicit, checkpoint)
    else:
        checkpoint = adapter = None
        shape = {**SHAPE, **problem.shape, "is_causal": problem.is_causal, "block_size": needed, **explicit}
        model = train.make_model(config, shape, tokenizer)
    check_window(needed, model.config, config)
    validation = HeldOut(
        source, "val", parse_length(config.train_length), (config.eval_iters or 40) * config.batch_size
    )
    train.set_reference(config, checkpoint)
    loss = make_loss(config, engine, tokenizer, [])
    if config.loss == "grpo":
        reference = load_frozen("from_checkpoint", config.reference, tokenizer, engine.device)
        batches = Rollouts(source, model, reference, engine)
    else:
        batches = TrainInstances(source)
    result = train.Run(config, model, tokenizer, batches, validation, engine, loss, adapter)

    def measure() -> dict[str, float]:
        accuracy = {"accuracy": total(exact_match(model, validation, engine)).share}
        return accuracy | (batches.figures() if config.loss == "grpo" else {})

    result.measure = measure
    train.start(result, checkpoint)
    return result


def check_window(needed: int, model_config: ModelConfig, config: ProblemConfig) -> None:
    if needed > model_config.block_size:
        raise UserError(
            f"{config.problem}: length {config.longest} needs a window of {needed} tokens, "
            f"block_size is {model_config.block_size}"
        )


def load_solver(path: str | Path, device: torch.device, name: str, needed: int = 0) -> Solver:
    """A trained model; where its positions are rotary, its window is widened to what is needed."""
    checkpoint = load_checkpoint(path)
    tokenizer = load_checkpoint_tokenizer(checkpoint, path)
    problem = find_problem(name)
    if tokenizer.to_dict() != make_tokenizer(problem).to_dict():
        raise UserError(f"{path}: its alphabet is not that of {name}")
    shape = checkpoint["model_config"]
    changes = {"block_size": max(needed, shape["block_size"])} if shape.get("use_rope") else {}
    return Solver(load_model(checkpoint, path, **changes).to(device), tokenizer, problem, device)


def stored_config(path: str | Path) -> dict[str, Any]:
    """The training config in a checkpoint of a problem; raises UserError where it is none."""
    values = load_checkpoint(path)["train_config"]
    if "problem" not in values:
        raise UserError(f"{path}: not a checkpoint of problem.py")
    return check_fields(values, fields_of(ProblemConfig), f"{path}: train_config")


def test(path: str | Path, config: ProblemConfig, plot: bool, example: str | None, log: Path | None) -> Score:
    """Test a checkpoint on held-out instances, print what it gets wrong and right, draw the pictures."""
    engine = Engine(config)
    source = Source(config, make_tokenizer(find_problem(config.problem)))
    solver = load_solver(path, engine.device, config.problem, source.window())
    check_window(source.window(), solver.model.config, config)
    held_out = HeldOut(source, "test", parse_length(config.test_length), config.test_instances)
    right = exact_match(solver.model, held_out, engine)
    show_examples(solver, held_out, right)
    unit = solver.problem.unit
    if len(right) > 1:
        for length, r in right.items():
            score = Score(int(r.sum()), len(r))
            print(f"{length:3} {unit}: {score if score.n else 'no instance is held out'}")
    if plot:
        example = example or text_of(next(i.prompt[-1] for i in held_out.by_length.values() if len(i.prompt)))
        draw(solver, config, log, right, example)
    return total(right)


def draw(solver: Solver, config: ProblemConfig, log: Path | None, right: dict[int, np.ndarray], example: str) -> None:
    """Write <stage>.png and <stage>_attention.png."""
    trained = parse_length(config.train_length)
    by_length = {length: float(r.mean()) for length, r in right.items() if len(r)}
    title = f"{config.problem}, trained on {config.train_length or 'all'} {solver.problem.unit}"
    draw_results(f"{config.stage}.png", title, log, by_length, trained, solver.problem.unit)
    ids = solver.encode(example)
    maps = solver.model.attention_maps(ids)[:, 0].float().cpu().numpy()
    title = f"{config.problem}: {example} \N{RIGHTWARDS ARROW} {solver.answer(example)}"
    draw_attention(f"{config.stage}_attention.png", title, maps, list(solver.tokenizer.decode(ids[0].tolist())))
    print(f"pictures: {config.stage}.png, {config.stage}_attention.png")


def solve(name: str, overrides: dict[str, Any], plot: bool, example: str | None) -> Outcome | None:
    """Train on a problem and test the best checkpoint; None where the training was interrupted."""
    config, explicit = make_config(name, overrides, {})
    training = set_up(config, explicit)
    preflight.report(training)
    log = train.train_with_log(training, sys.argv[1:])
    if training.stopped:
        return None
    score = test(training.best_path, config, plot, example, log)
    minutes = (time.perf_counter() - training.began) / 60
    return Outcome(config, score, training.model.parameter_count(), minutes)


def train_on(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """python train.py -t NAME, of a config that names a problem: as python problem.py with its fields as options."""
    values = check_fields(values, {**fields_of(ModelConfig), **fields_of(ProblemConfig)}, "config")
    outcome = solve(values.pop("problem"), {**values, **overrides}, False, None)
    if outcome:
        print(f"accuracy: {outcome.score}")


def list_problems() -> None:
    rows = [("problem", "shows", "example", "attention", "length", "options")]
    for name, problem in PROBLEMS.items():
        config, _ = make_config(name, {}, {})
        source = Source(config, make_tokenizer(problem))
        instances = source.draw(np.random.default_rng(0), 1, parse_length(config.train_length)[-1], "test")
        example = f"{text_of(instances.prompt[0])} -> {text_of(instances.answer[0])}"
        length = f"{problem.length} {problem.unit}" if problem.length else ""
        kind = "causal" if problem.is_causal else "full"
        rows.append((name, problem.shows, example, kind, length, " ".join(f"--{o}" for o in problem.options)))
    print_table(rows)


def converse(paths: dict[str, Path], device: torch.device, current: str) -> None:
    """Read lines: the name of a problem turns to it, anything else is an input to the one turned to."""
    solvers: dict[str, Solver] = {}
    interactive = sys.stdin.isatty()
    print(f"type an input, or the name of a problem to turn to it: {', '.join(paths)}", file=sys.stderr)
    while True:
        try:
            line = input(f"{current}> " if interactive else "").strip("\r\n")
        except EOFError:
            return
        word, _, rest = line.strip().partition(" ")
        if word in paths:
            current, line = word, rest
        if not line.strip():
            continue
        try:
            if current not in solvers:
                solvers[current] = load_solver(paths[current], device, current)
            print(solvers[current].answer(line.strip()), flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def trained_problems(folder: str) -> dict[str, Path]:
    """The checkpoints of problems in a folder, by problem."""
    found = {name: Path(folder, f"problem_{name}.pt") for name in PROBLEMS}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        raise UserError(f"no problem has been trained in {folder}/ yet: python problem.py sort trains one")
    return found


def main() -> None:
    parser = Parser(__doc__, ModelConfig, ProblemConfig)
    parser.add_argument("problem", nargs="?", default=argparse.SUPPRESS, help="a problem of the table, or all")
    parser.add_argument("--list", action="store_true", help="print the table of problems")
    parser.add_argument("--checkpoint", metavar="FILE", help="test this one instead of training; alone: talk to it")
    parser.add_argument("--plot", action="store_true", help="write <stage>.png and <stage>_attention.png")
    parser.add_argument("--example", metavar="TEXT", help="input for the attention maps [the first of the test]")
    args, overrides = parser.parse()
    name = overrides.pop("problem", None)
    if args.example and not args.plot:
        raise UserError("command line: --example is for --plot")
    if args.list:
        list_problems()
    elif args.checkpoint:
        test_checkpoint(args, name, overrides)
    elif name is None:
        config = TrainConfig(**{k: v for k, v in overrides.items() if k in ("device", "save_checkpoint_to")})
        paths = trained_problems(config.save_checkpoint_to)
        converse(paths, Engine(config).device, next(iter(paths)))
    elif name == "all":
        outcomes = []
        for each in PROBLEMS:
            outcomes.append(solve(each, overrides, args.plot, None))
            if outcomes[-1] is None:
                break
            print(f"accuracy: {outcomes[-1].score}\n")
        print_table([Outcome.COLUMNS, *(outcome.row() for outcome in outcomes if outcome)])
    else:
        outcome = solve(name, overrides, args.plot, args.example)
        if outcome:
            print(f"{outcome.n_parameters:,} parameters, {outcome.minutes:.1f} minutes")
            print(f"accuracy: {outcome.score}")


def test_checkpoint(args: argparse.Namespace, name: str | None, overrides: dict[str, Any]) -> None:
    stored = stored_config(args.checkpoint)
    if "train_fraction" in overrides:
        raise UserError("command line: --train_fraction with --checkpoint: what it was trained on stays as it was")
    config, explicit = make_config(name or stored["problem"], {**overrides, "from_checkpoint": ""}, stored)
    if explicit:
        raise UserError(f"command line: --{next(iter(explicit))} with --checkpoint: a trained model keeps its shape")
    if name is None:
        converse({config.problem: Path(args.checkpoint)}, Engine(config).device, config.problem)
    else:
        print(f"accuracy: {test(args.checkpoint, config, args.plot, args.example, None)}")


if __name__ == "__main__":
    run(main)
