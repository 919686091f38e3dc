"""What can be asked of a toy problem: the fields beside those of model and training, and the customary values."""

from dataclasses import dataclass

from base.configuration import Config, UserError, did_you_mean, option
from problems.tasks import PROBLEMS, Problem

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64}  # model fields, where neither the problem nor the user says otherwise
TRAINING = {  # training fields, likewise
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
    "eval_iters": 10,
}
TRAINING_BY_REWARD = {  # and over those with --loss grpo
    "batch_size": 512,
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "weight_decay": 0.0,
    "warmup_iters": 5,
    "max_steps": 350,
    "eval_interval": 25,
    "eval_iters": 20,
}
LOSSES = ("next_token", "grpo")  # the others need files or pairs of answers


@dataclass
class ProblemConfig(Config):
    """Which instances of a toy problem are drawn, and how they are written."""

    problem: str = option("sort", "name of the problem (python problem.py --list)", section="Toy problems")
    length: str = option("", "length of the instances, N or A-B; empty: the problem's default")
    train_length: str = option("", "length of the training instances; empty: length")
    test_length: str = option("", "length of the test instances; empty: length, or train_length")
    train_fraction: float = option(0.9, "share of all instances that is the training set", above=0.0, maximum=0.99)
    test_instances: int = option(10_000, "held-out instances to test on, at most", minimum=1)
    reverse: bool = option(True, "add, multiply: write results least significant digit first")
    pad: bool = option(True, "add, multiply: pad numbers with leading zeros to equal length")
    scratchpad: bool = option(True, "multiply, parity: write intermediate results before the final one")
    supervise: bool = option(True, "boolean, brackets: intermediate results are targets too; recall: ask for more keys")
    noise: int = option(0, "recall: digits without meaning after every pair", minimum=0, maximum=1024)
    leaf_probability: float = option(
        0.2, "boolean: probability that an operand is a literal 0 or 1", minimum=0.0, maximum=1.0
    )
    modulus: int = option(97, "modular: p", minimum=2, maximum=10_000)
    operation: str = option("+", "modular: (a operation b) mod p", choices=("+", "-", "*", "/"))

    def check(self) -> None:
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
    def lengths(self) -> list[int]:
        """The lengths that occur, in training or in the test."""
        return sorted({*parse_length(self.train_length), *parse_length(self.test_length)})

    @property
    def longest(self) -> int:
        return self.lengths[-1]


def find_problem(name: str) -> Problem:
    """The entry of the table; raises UserError where there is none of that name."""
    if name not in PROBLEMS:
        raise UserError(f"no problem named {name!r}{did_you_mean(name, PROBLEMS)} (--list shows them)")
    return PROBLEMS[name]


def parse_length(text: str) -> range:
    """The lengths that "N" or "A-B" stands for; empty: the one length 0, for a problem without lengths."""
    first, _, last = text.partition("-")
    try:
        lengths = range(int(first or 0), int(last or first or 0) + 1)
    except ValueError:
        lengths = range(0)
    if not lengths or (text and lengths[0] < 1):
        raise UserError(f"a length must be N or A-B, from 1 on, got {text!r}")
    return lengths
