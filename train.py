"""The training loop, for one process on one device.

    python train.py -t pretrain                             config/pretrain.json on the model of config/model.json
    python train.py -t sft                                  fine-tunes what pretraining left
    python train.py -t pretrain --batch_size 32 --n_layer 6 any field can be overridden
    python train.py -t pretrain --from_checkpoint checkpoint/pretrain_last.pt       resumes where it stopped
    python train.py -t pretrain --check                     can this set-up learn at all? overfits one batch

Writes checkpoint/<stage>.pt whenever the validation loss falls, checkpoint/<stage>_last.pt as it goes, and a log
train_<time>.log for plot_loss.py. train_ddp.py and train_deepspeed.py run this same loop on their own engines.
"""

import contextlib
import dataclasses
import glob
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from base.configuration import Parser, UserError, run_main
from base.devices import device_name, dtype_name
from base.files import hold_lock
from layers.experts import count_expert_tokens
from model import GPT, ModelConfig
from problems.config import ProblemConfig
from text.batches import Batch, prefetch_steps
from training import preflight
from training.advice import going_on, limits_reached
from training.config import TrainConfig
from training.distributed import check_launcher
from training.engine import Engine
from training.losses import PER_TOKEN_LOSSES
from training.memory import memory_estimate
from training.run_log import Console, RunLog, StopRequest, amount
from training.setup import Run, RunConfig, State, build_run, read_configs
from training.spikes import check_skipped, has_spiked, roll_back
from weights.checkpointing import SaveError, keep_previous, previous_of, set_aside

# ------------------------------------------------------------------------------------------------------ the loop


def train(run: Run, log: RunLog) -> State:
    """THE training loop: batch, loss, backward, step; sometimes evaluate, sometimes save."""
    config, engine, state = run.config, run.engine, run.state
    steps = prefetch_steps(run.batches, state.samples, pin_memory=engine.device.type == "cuda")
    evaluated = saved = -1
    skipped_in_a_row, waited = 0, 0.0  # waited: seconds, for batches
    told = int(state.skipped_steps)  # skipped steps that the log has told of
    since = time.perf_counter(), state.step, state.tokens, waited  # from where on the speed is measured
    done = config.max_steps is not None and state.step >= config.max_steps
    with StopRequest() as stop, contextlib.closing(steps):
        while not done:
            # This process's micro-batches of the global batch, and how many targets the whole step has. Whether to stop
            # is summed too, and the main process's clock goes to all: a signal that one process alone has seen must end
            # the loop on all of them at the same step, as everything below that saves or evaluates takes all processes.
            step_began, clock = time.perf_counter(), run.seconds()
            micro_batches = next(steps)
            waited += time.perf_counter() - step_began
            local = sum(batch.count for batch in micro_batches), sum(batch.idx.numel() for batch in micro_batches)
            count, n_tokens, stopping, state.seconds = engine.sum_over_ranks(
                *local, float(stop.requested), clock if engine.is_main else 0.0
            )
            if stopping or state.seconds > run.time_limit:
                break

            # summed losses over the step's count: accumulation, uneven masks and processes add up to the exact mean
            lr_scale = run.lr_scale()
            loss = torch.zeros((), device=engine.device)
            for i, batch in enumerate(micro_batches, 1):
                loss += engine.forward_backward(run.loss, batch, count, is_last=i == len(micro_batches))
            loss = engine.sum_tensor(loss)
            grad_norm = engine.step(lr_scale)  # clips; leaves the weights alone where the norm is not finite
            count_experts(run)

            # One bad batch is skipped; many in a row mean that the run has diverged. They are counted on the device:
            # to read a number from a GPU is to wait until it has computed it, so only logs and evaluations do.
            is_bad = ~(loss.isfinite() & grad_norm.isfinite())
            skipped_in_a_row = is_bad * (skipped_in_a_row + 1)
            state.skipped_steps += is_bad
            state.samples += run.batches.samples_per_step
            watches = config.on_spike == "rollback"  # over every loss
            if watches and has_spiked(run, math.inf if is_bad else loss.item()) and go_back(run, log, loss.item()):
                saved, skipped_in_a_row, since = -1, 0, (time.perf_counter(), state.step, state.tokens, waited)
                continue  # from the step of a save, with the data that comes next
            state.step += 1
            state.tokens += int(n_tokens)
            done = config.max_steps is not None and state.step >= config.max_steps

            # every now and then: log, evaluate (and save the best), save
            if state.step == 1 and not config.from_checkpoint and config.loss == "next_token":
                preflight.check_first_loss(loss.item(), run.model.config)
            log.bar.update()
            is_logged, is_evaluated = (done or state.step % n == 0 for n in (config.log_interval, config.eval_interval))
            if is_logged or is_evaluated:
                loss, grad_norm = loss.item(), grad_norm.item()
                told = check_skipped(run, log, loss, grad_norm, int(skipped_in_a_row), told)
            if is_logged:
                log.step(train_record(run, loss, grad_norm, lr_scale, since, waited))
                since = time.perf_counter(), state.step, state.tokens, waited
            if is_evaluated:
                evaluate_and_save(run, log)
                evaluated = state.step
                done = done or bool(limits_reached(config, state))  # early stopping, or good enough
            is_good = not (watches and state.spikes.above)  # else a spike may have begun: the save before is to stay
            if state.step % config.save_interval == 0 and is_good and save_or_warn(run, run.last_path, log):
                saved = state.step
            if state.step in (evaluated, saved):  # what that took is not the steps'
                since = time.perf_counter(), state.step, state.tokens, waited
        (stopping,) = engine.sum_over_ranks(float(stop.requested))
        if state.step and not stopping and evaluated != state.step:
            evaluate_and_save(run, log)
        if state.step and saved != state.step:
            save_or_warn(run, run.last_path, log, must=True)
        run.stopped = bool(stopping)
    return state


def count_experts(run: Run) -> None:
    """Add up the tokens of every expert; a mixture that is balanced by biases adjusts them."""
    if run.model.config.n_expert:
        counts = count_expert_tokens(run.model, run.engine.sum_tensor)
        run.expert_counts = counts if run.expert_counts is None else run.expert_counts + counts


def go_back(run: Run, log: RunLog, loss: float) -> bool:
    """After a spike: roll back, if there is a way, and save at once, so that a run that is resumed has done so too."""
    if not roll_back(run, log, loss):
        return False
    save_or_warn(run, run.last_path, log)
    return True


def train_record(
    run: Run, loss: float, grad_norm: float, lr_scale: float, since: tuple[float, int, int, float], waited: float
) -> dict[str, Any]:
    """What the log says of a step. since: time, step, tokens and `waited` from which on the speed is measured."""
    now = time.perf_counter(), run.state.step, run.state.tokens, waited
    seconds, n_steps, n_tokens, data_seconds = (after - before for before, after in zip(since, now, strict=True))
    tokens_per_s = n_tokens / seconds
    flops = tokens_per_s * run.model.flops_per_token()
    return {
        "step": run.state.step,
        "loss": loss,
        "lr": lr_scale * run.config.learning_rate,
        "grad_norm": grad_norm,
        "tokens": run.state.tokens,
        "seconds": run.seconds(),
        "skipped_steps": int(run.state.skipped_steps) or None,
        "tokens_per_s": tokens_per_s,
        "ms_per_step": 1000 * seconds / n_steps,
        "data_ms": 1000 * data_seconds / n_steps,
        "gflops": flops / 1e9,
        # model FLOPs utilization (Chowdhery et al. 2022): of what a matrix product alone reaches on this device
        "mfu": flops / run.matmul_flops / run.engine.world_size if run.matmul_flops else None,
    }


# ------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(run: Run) -> tuple[float, float]:
    """Mean validation loss per target in nats, and its standard error.

    Targets of one sample depend on each other, so samples are the independent units: with s_i the summed loss of sample
    i and c_i its number of targets, the mean is the ratio sum(s) / sum(c), and its variance by the delta method is
    sum((s_i - mean c_i)^2) / sum(c)^2. Five sums over all processes are enough for both.
    """
    engine, network = run.engine, run.engine.network
    network.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in run.validation:
        batch = batch.to(engine.device)
        losses = engine.compute_loss(run.loss, batch, "none")  # (B, T) per target, or (B, 1) per pair or answer
        # per sample; float64, in which large sums lose nothing, exists on CPUs and CUDA but not on MPS
        s = losses.cpu().double().sum(1)
        c = target_counts(batch, losses).cpu().double().sum(1)
        sums += torch.stack([s.sum(), c.sum(), (s * s).sum(), (s * c).sum(), (c * c).sum()])
    network.train()
    s, c, ss, sc, cc = engine.sum_over_ranks(*sums.tolist())
    mean = s / c
    variance = ss - 2 * mean * sc + mean * mean * cc
    return mean, math.sqrt(max(0.0, variance)) / c if math.isfinite(variance) else math.nan


def target_counts(batch: Batch, losses: torch.Tensor) -> torch.Tensor:
    """Loss mask in the shape of the losses: (B, T) per target, or (B, 1) per pair or answer."""
    if losses.shape != batch.targets.shape:
        return torch.full_like(losses, batch.count > 0)
    return torch.ones_like(losses) if batch.loss_mask is None else batch.loss_mask


def evaluate_and_save(run: Run, log: RunLog) -> None:
    """Evaluate; write <stage>.pt if the validation loss fell."""
    state, config = run.state, run.config
    began = time.perf_counter()
    val_loss, standard_error = evaluate(run)
    run.val_loss = val_loss
    improved = val_loss < state.best_val_loss  # never true of nan
    state.evals_without_gain = 0 if improved else state.evals_without_gain + 1
    before = state.best_val_loss
    if improved:
        state.best_val_loss = val_loss
    record = {
        "type": "val",
        "step": state.step,
        "val_loss": val_loss,
        "val_loss_se": standard_error,
        "best_val_loss": state.best_val_loss,
        "tokens": state.tokens,
    }
    what = "val loss"
    if config.loss == "diffusion":  # of the mean loss per token: the likelihood itself cannot be computed
        record["is_bound"], what = True, "val bound, at most"
    line = f"step {state.step:,}: {what} {val_loss:.4f} ± {standard_error:.4f}"
    if not math.isfinite(val_loss):
        record["not_finite"] = True  # JSON has no nan: val_loss itself becomes null
        line += " (not finite: not compared with the best)"
    if config.loss in PER_TOKEN_LOSSES:
        record["perplexity"] = math.exp(min(val_loss, 700))
        line += f", perplexity {record['perplexity']:.2f}"
    if run.source.tokens_per_character:  # unlike the loss, this compares across tokenizers
        record["bits_per_character"] = val_loss * run.source.tokens_per_character / math.log(2)
        line += f", {record['bits_per_character']:.3f} bits/character"
    if run.expert_counts is not None:
        shares = run.expert_counts / run.expert_counts.sum(1, keepdim=True).clamp(min=1)  # (layers, experts)
        record["expert_load"], run.expert_counts = shares.tolist(), None
        line += f", busiest expert {shares.max() * shares.size(1):.2f}x the mean"
    for metrics in (run.source.metrics, getattr(run.loss, "metrics", dict), getattr(run.batches, "metrics", dict)):
        record |= (measured := metrics())
        line += "".join(f", {n} {v:.2%}" if "accuracy" in n else f", {n} {v:.3f}" for n, v in measured.items())
    record["eval_seconds"] = time.perf_counter() - began
    if improved and not save_or_warn(run, run.best_path, log):
        improved, state.best_val_loss = False, before  # so that the next good one is saved
        record["best_val_loss"] = before
    record["peak_memory_mb"] = run.engine.peak_memory() / 1e6
    log.write(record)
    log.message(line + (f" -> {run.best_path}" if improved else f" (best {state.best_val_loss:.4f})"))
    if config.sample_tokens:
        model = run.engine.full_model()
        if run.engine.is_main:
            log.message(f"  sample: {sample_text(run, model)!r}")


def sample_text(run: Run, model: GPT) -> str:
    """A short continuation of sample_prompt; its random numbers are its own, so that training is not disturbed."""
    model.eval()
    idx = torch.from_numpy(run.tokenizer.encode(run.config.sample_prompt).astype("int64"))[None].to(run.engine.device)
    with run.engine.autocast():  # the precision of training: some attention kernels know no other
        settings = {"block": run.config.answer_block, "fills_window": not run.source.has_questions}  # of diffusion
        steps = model.generate(idx, run.config.sample_tokens, temperature=0.8, seed=run.config.random_seed, **settings)
        text = run.tokenizer.decode([tokens.item() for tokens in steps])
    model.train()
    return text


# ------------------------------------------------------------------------------------------------------ checkpoints


def save_or_warn(run: Run, path: Path, log: RunLog, must: bool = False) -> bool:
    """Save; where any process fails to (a full disk), all of them return False, or stop if it must succeed."""
    for work in (keep_earlier, save):  # saving gathers shards from all processes: none may begin it alone
        failure = None
        try:
            work(run, path, log)
        except SaveError as error:
            failure = error
        except OSError as error:
            failure = SaveError(f"{path}: not written ({error.strerror or error})")
        (failures,) = run.engine.sum_over_ranks(float(failure is not None))
        if failures:
            failure = failure or SaveError(f"{path}: another process could not write it")
            if must or run.config.stop_on_failed_save:
                raise failure
            log.message(f"warning: {failure}; training goes on to the next save")
            return False
    run.written |= {path, previous_of(path)} if path in run.written else {path}
    return True


def keep_earlier(run: Run, path: Path, log: RunLog) -> None:
    """Keep what another run left under this name (NAME.bak, .bak2, ...), and this run's last save (NAME.previous)."""
    if not run.engine.is_main:
        return
    is_first = path not in run.written
    is_start = Path(run.config.from_checkpoint).resolve() == path.resolve()
    is_ours = run.owns_best if path == run.best_path else run.is_resumed and is_start
    if is_first and path.exists() and not is_ours:  # also the newer save of a run that goes on from an older one
        log.message(f"{path}: of an earlier run, kept as {set_aside(path).name}")
    if path == run.last_path and path.is_file():
        keep_previous(path, only_if_none=is_first and run.is_from_previous)  # that one is damaged


def save(run: Run, path: Path, log: RunLog) -> None:
    """Write a checkpoint: the engine's state, and all that inference and resuming need beside it."""
    state = run.state
    run.engine.save(
        path,
        {
            "step": state.step,
            "model_config": run.model.config.to_dict(),
            **({"lora": run.adapter} if run.adapter else {}),
            "train_config": run.config_values(),
            "environment": {"device": run.engine.device.type, "dtype": dtype_name(run.engine.dtype)},
            "tokenizer": run.tokenizer.to_dict(),
            "data": {
                **(run.source.contents or {}),
                "has_questions": run.source.has_questions,
                "evaluated": run.evaluated,
                "samples": state.samples,
                "tokens": state.tokens,
                "evals_without_gain": state.evals_without_gain,
                "skipped_steps": int(state.skipped_steps),
                "seconds": run.seconds(),
                "spikes": dataclasses.asdict(state.spikes),
            },
            "best_val_loss": float(state.best_val_loss),
        },
    )


@contextlib.contextmanager
def lock_checkpoints(run: Run) -> Iterator[None]:
    """Keep other runs from writing this stage's checkpoints; temporary files that a killed run left are removed."""
    folder, stage = Path(run.config.save_checkpoint_to), run.config.name
    failure = None
    with contextlib.ExitStack() as stack:
        try:
            if run.engine.is_main:
                stack.enter_context(hold_lock(folder / f".{stage}.lock"))
        except BlockingIOError:
            failure = UserError(
                f"another run is writing the checkpoints of {stage!r} into {folder}: wait until it has ended, "
                "or give this one another --stage or --save_checkpoint_to"
            )
        except OSError as error:
            failure = UserError(f"save_checkpoint_to: {folder} cannot be written to ({error.strerror})")
        (failures,) = run.engine.sum_over_ranks(float(failure is not None))
        if failures:  # all processes end here
            raise failure or UserError(f"{folder}: the first process cannot write there; its message says why")
        for leftover in folder.glob(f".{glob.escape(stage)}*.tmp") if run.engine.is_main else ():
            leftover.unlink()
        yield


# ------------------------------------------------------------------------------------------------------ a whole run


def train_with_log(run: Run, argv: list[str]) -> None:
    """The loop, with a log around it and, after it, what to do next."""
    config, engine = run.config, run.engine
    header = {
        "stage": config.stage,
        "train_config": run.config_values(),
        "model_config": run.model.config.to_dict(),
        "n_parameters": run.model.parameter_count(),
        "memory_estimate_mb": memory_estimate(run, config.batch_size) / 1e6,
        "resumed_from_step": run.state.step,
        "baselines": run.source.baselines if run.source.tokens_per_character else None,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device_name(engine.device),
            "dtype": dtype_name(engine.dtype),
            "threads": torch.get_num_threads(),
            "processes": engine.world_size,
        },
    }
    with lock_checkpoints(run):
        steps = run.state.step, config.max_steps
        log = engine.together(
            lambda: RunLog(engine.is_main, config.log_to, config.stage, *steps, header, config.max_log_mb)
        )
        run.log_path = log.path
        if engine.use_compile:
            log.message("compiling the model: the first step and the first evaluation can take a minute each")
        try:
            state = train(run, log)
        except (MemoryError, RuntimeError) as error:
            if not preflight.is_out_of_memory(error):
                raise
            raise UserError(preflight.out_of_memory_advice(run)) from None
        finally:
            log.close()
    if engine.is_main and state.step:
        best, what = run.best_path, "bound" if config.loss == "diffusion" else "loss"
        is_evaluated, reached = math.isfinite(state.best_val_loss), f"best validation {what} {state.best_val_loss:.4f}"
        reached = f"{reached} ({best})" if is_evaluated else "not evaluated yet"
        ended_by = "".join(f", {name} reached" for name in limits_reached(config, state))
        print(f"step {state.step:,}{ended_by}, {reached}; log: {log.path}")
        if config.prediction and is_evaluated:
            what, when = ("best so far", "last evaluation") if run.stopped else ("reached", "end")
            worse = f", at the {when} {run.val_loss:.3f}" if run.val_loss > 1.001 * state.best_val_loss else ""
            read = "stopped before its time, after " * run.stopped + amount(state.tokens)
            print(f"{config.prediction}; {what} {state.best_val_loss:.3f}{worse} ({read} tokens)")
        if math.isfinite(peak := engine.peak_memory()):
            print(f"memory at the peak: {peak / 1e9:.2f} GB, estimated {header['memory_estimate_mb'] / 1e3:.2f}")
        print(f"to go on: {going_on(run, argv)}")
        if best in run.written:
            print(f"to try it: {run.source.next_command(best, run.adapter['base'] if run.adapter else '')}")


def train_stage(asked: RunConfig, make_engine: Callable[[TrainConfig], Engine], argv: list[str] | None = None) -> Run:
    """Build the run that was asked for on an engine, report what is about to be trained, and train it.

    argv: the arguments that a command to go on repeats; None: those of the script.
    """
    run = build_run(asked, make_engine(asked.training))
    with contextlib.redirect_stdout(Console(sys.stdout)), contextlib.redirect_stderr(Console(sys.stderr)):
        if run.engine.is_main:
            preflight.report(run)
        train_with_log(run, sys.argv[1:] if argv is None else argv)
    return run


def make_parser() -> Parser:
    """The options of the training scripts: a flag for every field, and what to read and to do."""
    parser = Parser(sys.modules["__main__"].__doc__ or __doc__, TrainConfig, ModelConfig, ProblemConfig, bare="-t")
    parser.add_argument(
        "-t", "--training", metavar="NAME", help="training config: config/NAME.json, or a path [pretrain]"
    )
    parser.add_argument("-m", "--model", metavar="NAME", help="model config, likewise [model]")
    parser.add_argument("--check", action="store_true", help="overfit one batch, to see whether the set-up can learn")
    return parser


def run_command(args: Any, overrides: dict[str, Any], make_engine: Callable[[TrainConfig], Engine]) -> None:
    """What the command line of a training script asks for, on an engine."""
    asked = read_configs(args.training, args.model, overrides)
    if args.check:
        preflight.check_learning(build_run(asked, make_engine(asked.training)))
    else:
        train_stage(asked, make_engine)


def main() -> None:
    check_launcher(sys.argv[1:])
    run_command(*make_parser().parse(), Engine)


if __name__ == "__main__":
    run_main(main)
