"""The machine: how fast it trains networks of the family, and what memory they take."""

import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from base.configuration import fields_of
from base.devices import find_device, memory_available, synchronise
from planning.recipe import Shape, recipe, tokens_per_step
from planning.text import Text
from training.config import TrainConfig
from training.engine import Engine
from training.memory import memory_estimate
from training.setup import Run, RunConfig, build_run

TRAINING = 0.95  # of the loop's time is spent in steps, the rest in evaluations (plan.eval_iters) and saves
CPU_TOKENS, GPU_TOKENS = 4096, 32768  # of a micro-batch at most, where speed is measured


class Clock:
    """The time that planning may take, and a bar that shows it."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.perf_counter(), seconds
        self.bar = tqdm(
            total=seconds,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s",
            desc="planning",
            miniters=0,
            mininterval=0.2 if sys.stderr.isatty() else 20,  # seconds, as of the bar of a training run
        )

    def left(self) -> float:
        return self.began + self.seconds - time.perf_counter()

    def update(self, doing: str | None = None) -> None:
        """Show where the time stands, and what is being done."""
        if doing:
            self.bar.set_description_str(doing, refresh=False)
        self.bar.update(min(self.seconds, self.seconds - self.left()) - self.bar.n)


class ProbeEngine(Engine):
    """Of runs whose result is a number: nothing is saved."""

    def save(self, path: Any, values: dict[str, Any]) -> None:
        """What a checkpoint would hold is thrown away."""


def make_run(fields: dict[str, Any], folder: str) -> Run:
    """A run of model and training fields that leaves nothing behind; folder: an empty one."""
    known = fields_of(TrainConfig)
    model = {name: value for name, value in fields.items() if name not in known}
    values = {name: value for name, value in fields.items() if name in known}
    never = 1 << 30
    config = TrainConfig(
        **{"stage": "probe", "save_checkpoint_to": folder, "eval_interval": never, "save_interval": never, **values}
    )
    return build_run(RunConfig(config, model, {}), ProbeEngine(config))


def measure_speed(shape: Shape, fields: dict[str, Any], seconds: float, clock: Clock) -> float:
    """Training tokens per second: after a first step the median of three, or of as many as the seconds allow."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(fields, folder)
    engine, micro_batches, times = run.engine, run.batches.at(0), []
    n_tokens = run.batches.samples_per_step * shape.window
    began = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        for i, batch in enumerate(micro_batches, 1):
            engine.forward_backward(run.loss, batch, n_tokens, is_last=i == len(micro_batches))
        engine.step(0.0)
        synchronise(engine.device)
        times.append(time.perf_counter() - start)
        clock.update()
    return n_tokens / statistics.median(times[1:])


@dataclass
class Machine:
    """Speeds measured so far, and what they say of shapes in between."""

    vocab_size: int
    start_up: float  # seconds from the start of a script to its first step, and from its last evaluation to its end
    flops: dict[Shape, float]  # measured: FLOP/s in training

    def tokens_per_s(self, shape: Shape) -> float:
        """Training tokens per second of any shape: operations per second change slowly with the size."""
        known = sorted((s.flops_per_token(self.vocab_size), rate) for s, rate in self.flops.items())
        needed = shape.flops_per_token(self.vocab_size)
        rate = np.exp(np.interp(math.log(needed), *np.log(known).T))
        return float(rate / needed)

    def seconds(self, minutes: float) -> float:
        """What of that time is for steps: less the start, a last evaluation of 1%, and the others before it."""
        return TRAINING * self.limit(minutes)

    def limit(self, minutes: float) -> float:
        """Seconds after which the loop should end, so that all ends in time."""
        return 0.99 * 60 * minutes - self.start_up

    def minutes(self, shape: Shape, tokens: float) -> float:
        """In what time the shape reads so many tokens: the inverse of seconds()."""
        return (tokens / self.tokens_per_s(shape) / TRAINING + self.start_up) / 0.99 / 60

    def add(self, shape: Shape, tokens_per_s: float) -> None:
        """A measurement; of the same width it takes the place of an earlier one."""
        self.flops = {s: rate for s, rate in self.flops.items() if s.n_embd != shape.n_embd}
        self.flops[shape] = tokens_per_s * shape.flops_per_token(self.vocab_size)


def measure_machine(
    text: Text, fields: dict[str, Any], minutes: float, start_up: float, seconds: float, clock: Clock
) -> Machine:
    """Speeds of narrow networks, then of wider ones, as long as the time allows and such networks could be worth it."""
    machine, window = Machine(text.vocab_size, start_up, {}), 128
    end = clock.left() - seconds
    is_gpu = find_device(fields["device"]).type == "cuda"
    limit, compiles = GPU_TOKENS if is_gpu else CPU_TOKENS, is_gpu and fields["compile"] == "auto"
    for n_embd in (64, 128, 256, 512, 768, 1024):
        shape = Shape(n_embd, window)
        if machine.flops:
            speed = machine.tokens_per_s(shape)
            takes = 6 * limit / speed + 60 * compiles
            is_too_large = 60 * minutes * speed < 0.5 * shape.n_weights  # half a token per weight
            if is_too_large or clock.left() - takes < end:
                break
        clock.update(f"speed of {shape.n_layer} x {n_embd}")
        guess = 60 * minutes * (machine.tokens_per_s(shape) if machine.flops else 10_000)
        n_tokens = min(limit, tokens_per_step(guess))
        batch = {"batch_size": max(1, round(n_tokens / window)), "gradient_accumulation_steps": 1}
        machine.add(shape, measure_speed(shape, text.fields | fields | recipe(shape, 1e6) | batch, seconds / 6, clock))
    return machine


def fit_memory(text: Text, shape: Shape, fields: dict[str, Any], tokens: float) -> tuple[int, float]:
    """Tokens of a micro-batch, and the bytes that training takes with it, in a run that reads so many tokens.

    The whole batch of a step, or so small a part of it that half of the memory that there is is enough.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(text.fields | fields | recipe(shape, 1e6) | {"batch_size": 1}, folder)
    available = memory_available(run.engine.device) or math.inf
    samples = max(1, round(tokens_per_step(tokens) / shape.window))
    while samples > 1 and memory_estimate(run, samples) > available / 2:
        samples = math.ceil(samples / 2)
    return samples * shape.window, memory_estimate(run, samples)
