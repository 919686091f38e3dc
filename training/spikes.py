"""Loss spikes: how they are told from noise, and the way back to the last good save (the field on_spike).

Also losses that are not finite: such steps are skipped, and a run that does nothing else is ended.

Now and then the loss jumps and stays up, after bad data or a step too long. The remedy of PaLM (Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1): go back to a checkpoint from before, and skip the data that was read since. Here the
first time lowers the learning rate, too.
"""

import dataclasses
import functools
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError
from weights.checkpointing import load_checkpoint, previous_of

WINDOW = 100  # losses that say what is normal: long enough for a spread, short enough to follow a loss that falls
ENOUGH = 20  # of them, before anything is called a spike: the first losses fall too fast to tell
IN_A_ROW = 3  # losses above the limit: one alone is an odd batch, and the next step goes on as before it
DEVIATIONS = 6.0  # the limit, in standard deviations: of normal noise one loss in 10^9 is above it
SMALLEST = 0.1  # the least distance of the limit in nats: a smaller jump costs less than going back


def check_skipped(run: Any, log: Any, loss: float, grad_norm: float, in_a_row: int, told: int) -> int:
    """Say that steps were skipped, once for those in a row; raises UserError where these are too many.

    run: a training.setup.Run; loss, grad_norm: of the last step; in_a_row: skipped steps up to it; told: how many in
    all were known of when this was last called. Returns how many are now.
    """
    config, skipped = run.config, int(run.state.skipped_steps)
    new = skipped - told
    if new and in_a_row <= new and run.engine.dtype != torch.float16:  # there the scaler overflows on purpose
        one = f"skipped: loss {loss:g}, gradient norm {grad_norm:g}"
        several = f"{new} of the last steps skipped: loss or gradient not finite"
        log.message(f"step {run.state.step:,}: {one if new == in_a_row == 1 else several}")
    if in_a_row > config.max_skipped_steps:
        kept = f"; the best checkpoint is kept in {run.best_path}" if run.best_path in run.written else ""
        raise UserError(
            f"step {run.state.step}: the loss is {loss:g}, the gradient's norm {grad_norm:g}, "
            f"{in_a_row - 1} steps before were skipped too (max_skipped_steps {config.max_skipped_steps}){kept}; "
            "try a lower learning_rate, more warmup_iters or float32"
        )
    return skipped


@dataclass
class Spikes:
    """The watch over the loss; a part of State, as a resumed run must come to the same decisions."""

    recent: list[float] = field(default_factory=list)  # the last WINDOW losses that were below the limit
    above: int = 0  # how many in a row were not, up to now
    good: int = 0  # steps that the weights had taken when the last good loss was measured: saves up to here are good
    rollbacks: int = 0

    def add(self, step: int, loss: float) -> bool:
        """Take the loss of the weights after `step` steps, inf or nan where it was skipped; whether it has spiked."""
        if loss <= self.limit() and math.isfinite(loss):
            self.recent, self.above, self.good = [*self.recent, loss][-WINDOW:], 0, step
        elif math.isfinite(self.limit()):
            self.above += 1
        return self.above >= IN_A_ROW

    def limit(self) -> float:
        """What a loss must exceed to stand out from the recent ones; inf while these are few.

        Robust statistics: of the median and the median absolute deviation (times 1.4826, which makes it the standard
        deviation of normal noise) half of the losses may be anything, where one outlier moves mean and variance.
        """
        if len(self.recent) < ENOUGH:
            return math.inf
        median = statistics.median(self.recent)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.recent)
        return median + max(DEVIATIONS * deviation, SMALLEST)


def has_spiked(run: Any, loss: float) -> bool:
    """Whether on_spike asks for a rollback now. run: a training.setup.Run; loss: of all processes."""
    return run.config.on_spike == "rollback" and run.state.spikes.add(run.state.step, loss)


def roll_back(run: Any, log: Any, loss: float) -> bool:
    """Go back to the last good save, but not in the data; False where there is none, or it was done often enough.

    The loss is then taken as it is: what counts as normal is found anew.
    """
    config, state, spikes = run.config, run.state, run.state.spikes
    step, first = state.step + 1, state.step + 2 - spikes.above  # as they are logged
    what = f"step {step:,}: loss {loss:.4f}, above {spikes.limit():.4f} since step {first:,}: a spike"
    checkpoint, reason = None, f"max_rollbacks ({config.max_rollbacks}) is reached"
    if spikes.rollbacks < config.max_rollbacks:
        checkpoint, reason = last_good_save(run, log), "there is no save of before (save_interval)"
    event = {"type": "spike", "step": step, "loss": loss, "first": first, "limit": spikes.limit()}
    log.write(event | {"back_to": checkpoint and checkpoint["step"]})
    if checkpoint is None:
        log.message(f"{what}; no rollback: {reason}")
        state.spikes = Spikes(good=state.step, rollbacks=spikes.rollbacks)
        return False
    run.engine.load_weights(checkpoint["model"])
    run.engine.load_state_dict(checkpoint)
    data = checkpoint["data"]
    state.step, state.tokens, state.evals_without_gain = checkpoint["step"], data["tokens"], data["evals_without_gain"]
    before = Spikes(**data.get("spikes", {}))
    state.spikes = dataclasses.replace(before, above=0, good=state.step, rollbacks=spikes.rollbacks + 1)
    run.expert_counts = None
    log.go_back(state.step)
    log.message(
        f"{what}; back to step {state.step:,} (rollback {state.spikes.rollbacks} of {config.max_rollbacks}), without "
        f"the data since then, learning rate times {config.rollback_lr_factor:g}"
    )
    return True


def last_good_save(run: Any, log: Any) -> dict[str, Any] | None:
    """The newest checkpoint of this run that is good, or None; read by all processes.

    The best is, by its validation loss; the last, and the one before it, if the loss after it was below the limit. One
    that a process cannot read is left out, with a warning: the run need not end by it.
    """
    resumed = [Path(run.config.from_checkpoint)] if run.is_resumed else []
    newest = None
    for path in dict.fromkeys([run.last_path, previous_of(run.last_path), run.best_path, *resumed]):
        is_ours = path in run.written or path in resumed or (path == run.best_path and run.owns_best)
        (n_processes,) = run.engine.sum_over_ranks(float(is_ours))  # all look at the same files, or none does
        if n_processes < run.engine.world_size:
            continue
        try:
            checkpoint = run.engine.together(functools.partial(load_checkpoint, path))
        except (UserError, OSError) as error:  # on all processes
            log.message(f"warning: {error}; looking for another save")
            continue
        spikes = Spikes(**checkpoint["data"].get("spikes", {}))  # fewer rollbacks: its steps may have been taken back
        is_on_the_way = checkpoint["step"] <= run.state.spikes.good and spikes.rollbacks == run.state.spikes.rollbacks
        is_good = path == run.best_path or is_on_the_way
        if is_good and (newest is None or checkpoint["step"] > newest["step"]):
            newest = checkpoint
    return newest
