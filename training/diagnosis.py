"""What a training log shows, and what to change: the rules of plot_loss.py --explain, each a function of a Log.

A rule returns a sentence, or None where it finds nothing. Its thresholds stand above it with their reason; they are set
so that a run that is well raises none, rather than that no fault escapes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from base.logs import expert_loads, is_number, is_step, part, series, smooth
from training.losses import COMPARES_POLICIES
from training.spikes import Spikes

ENOUGH = 30  # steps beyond the warm-up, before anything is said about how a run learns


@dataclass
class Log:
    """A run as base.logs.read_log() reads it, with what several rules ask."""

    header: dict[str, Any]
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    spikes: list[dict[str, Any]] = field(default_factory=list)

    def setting(self, name: str) -> Any:
        """A field of the training config, or None."""
        return part(self.header, "train_config").get(name)

    def number(self, name: str) -> float:
        """A number of the training config; 0 where it has none."""
        value = self.setting(name)
        return value if is_number(value) else 0.0

    def values(self, name: str) -> np.ndarray:
        """A field of all training records that have it, (n,)."""
        return series(self.train, name)[1]

    @cached_property
    def steps(self) -> np.ndarray:
        """Of the training losses."""
        return series(self.train, "loss")[0]

    @cached_property
    def losses(self) -> np.ndarray:
        return series(self.train, "loss")[1]

    @cached_property
    def trend(self) -> np.ndarray:
        """The training losses without their noise: means over a tenth of the run."""
        return smooth(self.losses, max(1, len(self.losses) // 10))

    @cached_property
    def last_loss(self) -> float:
        """Mean of the last tenth, as the moving average is narrow at the end."""
        return self.losses[-max(1, len(self.losses) // 10) :].mean()

    @property
    def last_step(self) -> int:
        return self.train[-1]["step"]

    @property
    def is_young(self) -> bool:
        return self.last_step < ENOUGH + self.number("warmup_iters") or len(self.losses) < ENOUGH

    @property
    def starts_anew(self) -> bool:
        """From random weights: its first losses are those of guessing."""
        return not self.setting("from_checkpoint") and not self.header.get("resumed_from_step")

    @property
    def minimises_a_loss(self) -> bool:
        """False with rewards: that loss hovers around 0, however well a run goes."""
        return self.setting("loss") != "grpo"

    def rate_at(self, step: int) -> str:
        """The learning rate of a step, or of the one before that has one."""
        steps, rates = series(self.train, "lr")
        before = np.flatnonzero(steps <= step)
        return f"{rates[before[-1]]:.2g}" if len(before) else "unknown"

    def lower_rate(self, factor: float) -> str:
        """The flags of a lower learning rate."""
        names = ["learning_rate", "muon_learning_rate"] if self.setting("optimizer") == "muon" else ["learning_rate"]
        lowered = {name: factor * self.number(name) for name in names}
        if self.number("min_lr") > lowered["learning_rate"]:  # which would be refused
            lowered["min_lr"] = lowered["learning_rate"]
        return " ".join(f"--{name} {rate:.2g}" for name, rate in lowered.items())


# ------------------------------------------------------------------------------------------------------ the loss

# A model at the unigram entropy has learnt how frequent the tokens are, and nothing of what follows what. Every model
# passes there; one whose loss still falls by 2% from one quarter of the run to the next is on its way.
UNIGRAM_MARGIN, STILL_FALLING = 0.02, 0.02
TINY_RATE = 1e-6  # a step of Adam moves a weight by about the rate: a thousand move it by 0.001, where 0.02 is usual


def does_not_learn(log: Log) -> str | None:
    """The loss is no better than that of guessing by frequency; of problems without one, than at the beginning."""
    if log.is_young or not log.minimises_a_loss:
        return None
    unigram = part(log.header, "baselines").get("unigram")
    reached, quarter = log.last_loss, max(1, len(log.losses) // 4)
    if is_number(unigram):
        level = f"the unigram entropy, {unigram:.3f}, or above: counting tokens reaches that"
        reached = min([reached, *series(log.val, "val_loss")[1]])
    elif log.starts_anew:
        unigram = log.losses[: max(3, len(log.losses) // 50)].mean()
        level = f"the {unigram:.3f} of the beginning"
    if not is_number(unigram) or reached < (1 - UNIGRAM_MARGIN) * unigram:
        return None
    if log.losses[-quarter:].mean() < (1 - STILL_FALLING) * log.losses[-2 * quarter : -quarter].mean():
        return None
    rates = log.values("lr")
    if len(rates) and rates.max() < TINY_RATE:
        advice = f"the learning rate is at most {rates.max():.2g}: raise learning_rate, or lower warmup_iters"
    else:
        advice = "look at the data (data.py --inspect), see whether one batch can be learnt (train.py --check)"
    return f"it does not learn: the loss, {reached:.3f}, stays at {level}; {advice}"


# The start of a new model is the loss of guessing: a tenth of the run 1 nat above it is worse than knowing nothing.
# Later, a rise by 0.2 nats (a fifth in perplexity) that takes back a quarter of what was won is no noise in a mean.
WORSE_THAN_GUESSING, SHARE_WORSE, RISE, SHARE_LOST = 1.0, 0.1, 0.2, 0.25


def diverges(log: Log) -> str | None:
    """The training loss itself goes up, and stays up until the end."""
    if not log.minimises_a_loss or not len(log.steps):
        return None
    if sum(r["step"] > log.steps[-1] for r in log.train) >= 3:  # one skipped step is no divergence
        return (
            f"it diverged: no finite loss since step {log.steps[-1]:,} (learning rate {log.rate_at(log.steps[-1])}); "
            f"{log.lower_rate(0.3)}, more warmup_iters, or float32"
        )
    start, lowest = log.losses[:3].mean(), int(log.trend.argmin())
    is_worse = log.losses > start + WORSE_THAN_GUESSING
    if log.starts_anew and is_worse.mean() > SHARE_WORSE and len(log.losses) >= ENOUGH:
        worst = int(log.losses.argmax())
        return (
            f"it diverges: the loss rises from {start:.2f} to {log.losses[worst]:.2f} at step {log.steps[worst]:,} "
            f"(learning rate {log.rate_at(log.steps[worst])}), worse than guessing; {log.lower_rate(0.3)}, or more "
            "warmup_iters"
        )
    rise = log.last_loss - log.trend[lowest]
    if len(log.losses) >= ENOUGH and rise > max(RISE, SHARE_LOST * (start - log.trend[lowest])):
        return (
            f"it diverges: the training loss is lowest around step {log.steps[lowest]:,} ({log.trend[lowest]:.3f}, "
            f"learning rate {log.rate_at(log.steps[lowest])}) and {log.last_loss:.3f} at the end; {log.lower_rate(0.3)}"
        )
    return None


def has_spikes(log: Log) -> str | None:
    """By the rule of training/spikes.py, which on_spike follows; rollbacks have taken their spikes out of the curve."""
    if not log.minimises_a_loss:
        return None
    watch, found = Spikes(), []
    for step, loss in zip(log.steps.tolist(), log.losses.tolist(), strict=True):
        if watch.add(step, loss):
            found.append(step)
            watch = Spikes()
    rolled_back = [
        spike["first"] for spike in log.spikes if is_step(spike.get("back_to")) and is_step(spike.get("first"))
    ]
    skipped = log.values("skipped_steps")
    parts = []
    if found:
        shown = ", ".join(f"{step:,} (learning rate {log.rate_at(step)})" for step in found[:4])
        parts.append(f"{count(len(found), 'spike')} of the loss, at step {shown}{', ...' if len(found) > 4 else ''}")
    if rolled_back:
        parts.append(
            f"{count(len(rolled_back), 'rollback')} after spikes, at step {', '.join(map(str, rolled_back[:4]))}"
        )
    if len(skipped) and skipped[-1] >= 3:
        parts.append(f"{skipped[-1]:.0f} steps skipped, as their loss or gradient was not finite")
    if not parts:
        return None
    advice = f"{log.lower_rate(0.5)} or more warmup_iters" + " or --on_spike rollback" * (not rolled_back)
    return f"{' and '.join(parts)}; {advice}; if they come back at the same step, look at the data there"


# Validation losses are means over the same samples every time, so differences of 1% are no noise; where there are few
# samples, half of their standard error. Two evaluations must agree, and the training loss must fall meanwhile: a model
# that gets worse on both diverges.
RISE_OF_VALIDATION = 0.01


def overfits(log: Log) -> str | None:
    """The validation loss rises, while the training loss still falls."""
    steps, losses = series(log.val, "val_loss")
    if len(losses) < 3 or not log.minimises_a_loss:
        return None
    best = int(losses.argmin())
    errors = [record.get("val_loss_se") for record in log.val if is_number(record.get("val_loss"))]
    error = errors[best] if is_number(errors[best]) else 0.0
    margin = max(RISE_OF_VALIDATION * abs(losses[best]), error / 2)
    if best > len(losses) - 3 or losses[-2:].min() < losses[best] + margin:
        return None
    at_best = np.interp(steps[best], log.steps, log.trend)
    if log.last_loss > at_best - margin / 2:
        return None
    name = f"{log.header.get('stage') or 'STAGE'}{'_lora' if log.setting('use_lora') else ''}.pt"
    ways = ["more data"]
    if log.setting("loss") not in COMPARES_POLICIES:  # which take no dropout
        ways.append("--lora_dropout 0.1" if log.setting("use_lora") else "--dropout 0.2")
    if log.setting("use_lora"):
        ways.append("a lower lora_rank")
    elif log.starts_anew:
        ways.append("a smaller model (n_layer, n_embd)")
    return (
        f"it overfits: the validation loss is lowest at step {steps[best]:,} ({losses[best]:.3f}) and rises to "
        f"{losses[-1]:.3f}, while the training loss falls from {at_best:.3f} to {log.last_loss:.3f}; take {name}, "
        f"which is of the best step, or train with {', '.join(ways)} or fewer steps (--patience 3)"
    )


# ------------------------------------------------------------------------------------------------------ the steps

# Of the way from the peak to min_lr: a cosine is below it in the last third of its steps, where it gains the least.
UNFINISHED = 0.2


def schedule_is_unfinished(log: Log) -> str | None:
    """The run has ended, at its limit, with a rate that has hardly fallen: what a decay gains is missing."""
    peak, floor = log.number("learning_rate"), log.number("min_lr")
    rates = log.values("lr")
    decays = log.setting("decay_lr") and log.setting("lr_schedule") != "constant"
    if log.is_young or not decays or not len(rates) or peak <= floor:
        return None
    share = (rates[-1] - floor) / (peak - floor)
    ended_by = ended(log)
    if share < UNFINISHED or not ended_by:
        return None
    where = f"the schedule is unfinished: the learning rate is {rates[-1]:.2g} at step {log.last_step:,}, where "
    where += f"{ended_by} ended the run, {share:.0%} of the way above min_lr"
    if log.setting("decay_over") == "time":
        return f"{where}; --max_steps null lets it run until max_minutes are over"
    if ended_by == "max_minutes":
        return f"{where}; --decay_over time lets it decay within max_minutes"
    return f"{where}; --lr_decay_iters {log.last_step} (it is {log.setting('lr_decay_iters')}), or go on to that step"


def ended(log: Log) -> str:
    """The field that has ended the run; "" while it goes on, or where it was stopped or has reached its target."""
    steps, minutes, seconds = log.number("max_steps"), log.number("max_minutes"), log.values("seconds")
    if steps and log.last_step >= steps:
        return "max_steps"
    if minutes and len(seconds) and seconds[-1] - time_before(log) > 0.97 * 60 * minutes:
        return "max_minutes"
    return ""


def time_before(log: Log) -> float:
    """Seconds of training before the run was resumed for the last time, where max_minutes does not count them."""
    start = log.header.get("resumed_from_step")
    if not is_number(start) or not start or log.setting("decay_over") == "time":
        return 0.0
    before = [record["seconds"] for record in log.train if record["step"] <= start and is_number(record.get("seconds"))]
    return before[-1] if before else log.values("seconds")[0]


# Clipping is for the odd step. A norm that is above the limit nearly always, by far, makes every step as long as the
# others whatever the slope: gradient descent without its brake near the minimum (Adam and Muon, which rescale the
# gradient, suffer less). Five times the limit: the norms of healthy runs are between 0.1 and 2, the default limit is 1.
ALWAYS, FAR_ABOVE = 0.95, 5.0


def clips_always(log: Log) -> str | None:
    """The gradient is clipped in nearly all steps of the second half."""
    limit, norms = log.number("grad_clip"), log.values("grad_norm")
    norms = norms[len(norms) // 2 :]
    if log.is_young or not limit or not len(norms):
        return None
    share = (norms > limit).mean()
    if share < ALWAYS or np.median(norms) < FAR_ABOVE * limit:
        return None
    return (
        f"the gradient is clipped in {share:.0%} of the steps: its norm is around {np.median(norms):.2g}, grad_clip is "
        f"{limit:g}; --grad_clip {float(f'{2 * np.median(norms):.1g}'):g} leaves clipping to the odd step, "
        "or lower learning_rate if the norm grows"
    )


# An expert that gets a twentieth of its share learns next to nothing. One that gets three times its share does the work
# of others; where so many are chosen for each token that this is not possible, one that gets nearly all tokens.
DEAD, OVERLOADED, NEARLY_ALL = 0.05, 3.0, 0.9


def experts_are_unbalanced(log: Log) -> str | None:
    """Dead or overloaded experts, in the last three evaluations together."""
    loads = expert_loads(log.val)
    if log.is_young or not loads:
        return None
    shares = np.stack([shares for _, shares in loads[-3:]]).mean(0)  # (layers, experts)
    relative = shares * shares.shape[1]
    chosen = part(log.header, "model_config").get("n_expert_per_token")
    most = relative.shape[1] / chosen if is_number(chosen) and chosen > 0 else math.inf  # of an expert that all take
    dead, overloaded = relative < DEAD, relative > min(OVERLOADED, NEARLY_ALL * most)
    if not (dead.any() or overloaded.any()):
        return None
    parts = [
        f"{name}: {places(mask)}" for name, mask in (("dead experts", dead), ("overloaded", overloaded)) if mask.any()
    ]
    return (
        f"{'; '.join(parts)} (up to {relative.max():.1f} times the mean load); a larger expert_balance_weight, "
        "expert_balance bias, or a lower learning_rate in the beginning"
    )


def places(mask: np.ndarray) -> str:
    """The experts of a mask (layers, experts), by layer."""
    layers = [(layer, np.flatnonzero(row).tolist()) for layer, row in enumerate(mask) if row.any()]
    shown = [f"layer {layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in layers[:4]]
    return "; ".join(shown) + (", ..." if len(layers) > 4 else "")


# ------------------------------------------------------------------------------------------------------ the time

WAITING = 0.3  # of the time of the steps: batches are prepared while the model trains; on a single core, not quite


def waits_for_data(log: Log) -> str | None:
    """The steps wait for batches from files. (Problems and loss grpo make theirs: that is part of the work.)"""
    waiting, whole = log.values("data_ms")[1:], log.values("ms_per_step")[1:]  # without the wait for the first one
    if len(waiting) < ENOUGH or not log.minimises_a_loss or log.setting("problem"):
        return None
    if not 0 < WAITING * whole.sum() < waiting.sum():
        return None
    return (
        f"{waiting.sum() / whole.sum():.0%} of the time of the steps is spent waiting for batches "
        f"({np.median(waiting):.0f} ms a step); keep the token files on a local disk, and a CPU core free for "
        "the thread that reads them"
    )


EVALUATING, ENOUGH_EVALUATING = 0.25, 0.05  # of the time: with 5% of it, the curve is as plain to see


def evaluates_too_much(log: Log) -> str | None:
    """Evaluations take a large part of the time; medians, as the first of each may wait for a compiler."""
    steps, evaluations = log.values("ms_per_step") / 1000, series(log.val, "eval_seconds")[1]
    if len(steps) < ENOUGH or not len(evaluations):
        return None
    step, evaluation = max(1e-6, np.median(steps)), np.median(evaluations)
    n_steps = log.last_step - log.train[0]["step"] + 1
    share = len(evaluations) * evaluation / (len(evaluations) * evaluation + n_steps * step)
    interval = int(log.number("eval_interval"))
    if share < EVALUATING or not interval or len(evaluations) < 2:
        return None
    wanted = math.ceil(evaluation / step / ENOUGH_EVALUATING)
    return (
        f"evaluations take {share:.0%} of the time ({evaluation:.2g} s each, every {count(interval, 'step')} of "
        f"{step:.2g} s); --eval_interval {wanted}, or fewer eval_iters"
    )


# Of the rate of a matrix product alone. Trained well, a GPU reaches 0.3 to 0.5, and small models 0.1; a CPU is so
# slow that Python hardly holds it up, and small models of healthy runs are above 0.02.
IDLE = {"gpu": 0.1, "cpu": 0.005}


def device_is_idle(log: Log) -> str | None:
    """The device does little of what it could: the steps are too small for it."""
    shares, device = log.values("mfu")[1:], str(part(log.header, "environment").get("device"))
    limit = IDLE["cpu" if device.startswith("cpu") else "gpu"]
    if len(shares) < ENOUGH or np.median(shares) >= limit:
        return None
    return (
        f"the device is idle most of the time: {np.median(shares):.1%} of what a matrix product reaches on it (mfu), "
        f"{np.median(log.values('gflops')):,.3g} GFLOP/s; a larger batch_size, or the same one in fewer "
        "gradient_accumulation_steps, costs little time; so does a larger model"
    )


# ------------------------------------------------------------------------------------------------------ all of them

RULES: tuple[Callable[[Log], str | None], ...] = (
    does_not_learn,
    diverges,
    has_spikes,
    overfits,
    schedule_is_unfinished,
    clips_always,
    experts_are_unbalanced,
    waits_for_data,
    evaluates_too_much,
    device_is_idle,
)


def count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def findings(log: Log) -> dict[str, str]:
    """What the rules find, by their names."""
    return {rule.__name__: found for rule in RULES if (found := rule(log))}


def explain(run: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines about a run as read_log() gives it: what it reached, then what is wrong and to be changed, if anything."""
    log = Log(run["header"][-1] if run["header"] else {}, run["train"], run["val"], run.get("spike", []))
    first, last = log.train[0]["step"], log.last_step
    line = f"steps {first:,} to {last:,}, training loss {log.losses[:3].mean():.3f} to {log.last_loss:.3f}"
    steps, losses = series(log.val, "val_loss")
    if len(losses):
        what = "bound on the validation loss" if log.val[-1].get("is_bound") else "validation loss"
        line += f", best {what} {losses.min():.3f} at step {steps[losses.argmin()]:,}"
    found = findings(log)
    if last < log.number("max_steps") and not ended(log):
        line += f"; {log.number('max_steps') - last:,.0f} steps to go to max_steps"
    if found:
        return [line, *(f"- {finding}" for finding in found.values())]
    if log.is_young:
        return [line, "- too short to judge; nothing is wrong so far"]
    return [line, "- healthy: it learns, and none of the rules finds a fault"]
