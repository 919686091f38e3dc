"""The training loop, for one process on one device.

    python train.py -t pretrain                             config/pretrain.json on the model of config/model.json
    python train.py -t sft                                  fine-tunes what pretraining left
    python train.py -t pretrain --batch_size 32 --n_layer 6 any field of the two configs can be overridden
    python train.py -t pretrain --from_checkpoint checkpoint/pretrain_last.pt       goes on where it stopped
    python train.py -t pretrain --check                     can this set-up learn at all? overfits one batch

Writes checkpoint/<stage>.pt whenever the validation loss falls, checkpoint/<stage>_last.pt as it goes, and a log
train_<time>.log for plot_loss.py. train_ddp.py and train_deepspeed.py run this same loop on their own engines.
"""

import contextlib
import glob
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.configuration import Parser, UserError, check_fields, fields_of, find_config, read_json, run
from base.files import hold_lock
from layers.experts import count_tokens
from model import GPT, ModelConfig
from text.batches import Batch, TokenFile, TrainBatches, ValidationBatches, upcoming
from text.tokenizer import Tokenizer, load_tokenizer
from training import preflight
from training.config import TrainConfig
from training.engine import Engine, Loss, dtype_name
from training.losses import BY_TOKEN, REFERENCED, make_loss, next_token
from training.run_log import Console, RunLog, StopRequest
from weights import lora
from weights.checkpointing import SaveError, keep_previous, load_checkpoint_tokenizer, load_model, load_newest


@dataclass
class State:
    """Where a run stands: all that must survive a restart beside weights, optimizer and random states."""

    step: int = 0
    samples: int = 0  # the position in the data
    tokens: int = 0
    best_val_loss: float = math.inf
    evals_without_gain: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite


# ------------------------------------------------------------------------------------------------------ the loop


@dataclass
class Run:
    """Everything the loop needs; what differs between stages is in batches, validation and config.loss."""

    config: TrainConfig
    model: GPT
    tokenizer: Tokenizer
    batches: Any  # TrainBatches, or whatever else has at(position) and samples_per_step
    validation: Any  # an iterable of Batch, the same ones every time
    engine: Engine
    loss: Loss = next_token
    adapter: dict[str, Any] | None = None  # settings and base of the LoRA adapter that is trained
    state: State = field(default_factory=State)
    continues: bool = False  # an earlier run of the same stage
    changes: list[str] = field(default_factory=list)  # fields that are not as they were in that one
    data_sizes: list[int] | None = None  # tokens of every training file
    tokens_per_character: float | None = None  # of the validation data, for bits per character
    expert_counts: torch.Tensor | None = None  # tokens of each layer's experts since the last evaluation
    matmul_flops: float | None = None  # the device's measured rate, for mfu
    measure: Callable[[], dict[str, float]] | None = None  # further figures for the records of evaluations
    stopped: bool = False  # by a signal
    began: float = field(default_factory=time.perf_counter)
    written: set[Path] = field(default_factory=set)

    @property
    def name(self) -> str:
        """What its checkpoints are called."""
        return self.config.stage + ("_lora" if self.config.use_lora else "")

    @property
    def best_path(self) -> Path:
        """The checkpoint of the lowest validation loss."""
        return Path(self.config.save_checkpoint_to) / f"{self.name}.pt"

    @property
    def last_path(self) -> Path:
        """The checkpoint to go on from."""
        name = f"{self.name}_last" + ("" if self.engine.writes_shards else ".pt")
        return Path(self.config.save_checkpoint_to) / name


def train(run: Run, log: RunLog) -> State:
    """THE training loop: batch, loss, backward, step; sometimes evaluate, sometimes save."""
    config, engine, state = run.config, run.engine, run.state
    deadline = run.began + 60 * config.max_minutes if config.max_minutes else math.inf
    steps = upcoming(run.batches, state.samples, pin_memory=engine.device.type == "cuda")
    evaluated = saved = -1
    skipped_in_a_row = 0
    done = config.max_steps is not None and state.step >= config.max_steps
    with StopRequest() as stop, contextlib.closing(steps):
        while not done:
            step_began = time.perf_counter()
            micro_batches = next(steps)
            local = sum(batch.count for batch in micro_batches), sum(batch.idx.numel() for batch in micro_batches)
            count, n_tokens, stopping, late = engine.sum_over_ranks(
                *local, float(stop.requested), float(step_began > deadline)
            )
            if stopping or late:
                break

            lr_scale = config.lr_scale(state.step)
            loss = torch.zeros((), device=engine.device)
            for i, batch in enumerate(micro_batches, 1):
                loss += engine.forward_backward(run.loss, batch, count, is_last=i == len(micro_batches))
            (loss,) = engine.sum_over_ranks(loss.item())
            grad_norm = engine.step(lr_scale)  # which moves nothing where the norm is not finite
            count_experts(run)
            skipped_in_a_row = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else skipped_in_a_row + 1
            state.skipped_steps += skipped_in_a_row > 0
            if skipped_in_a_row == 1 and engine.dtype != torch.float16:  # float16's scaler tries how far it can go
                log.say(f"step {state.step + 1:,}: skipped, as the loss is {loss:g}, the gradient's norm {grad_norm:g}")
            if skipped_in_a_row > config.max_skipped_steps:
                raise diverged(run, loss, grad_norm)
            state.step += 1
            state.samples += run.batches.samples_per_step
            state.tokens += int(n_tokens)
            done = config.max_steps is not None and state.step >= config.max_steps

            if state.step == 1 and not config.from_checkpoint and config.loss == "next_token":
                preflight.judge_first_loss(loss, run.model.config.vocab_size)
            log.bar.update()
            if state.step % config.log_interval == 0 or done:
                seconds = time.perf_counter() - step_began
                log.step(train_record(run, loss, grad_norm, lr_scale, n_tokens / seconds, seconds))
            if state.step % config.eval_interval == 0 or done:
                evaluate_and_save(run, log)
                evaluated = state.step
                done = done or has_reached_its_end(config, state)
            if state.step % config.save_interval == 0 and save_or_warn(run, run.last_path, log):
                saved = state.step
        if state.step and not stop.requested and evaluated != state.step:
            evaluate_and_save(run, log)
        if state.step and saved != state.step:
            save_or_warn(run, run.last_path, log, must=True)
        run.stopped = stop.requested
    return state


def count_experts(run: Run) -> None:
    """Add up the tokens of every expert; a mixture that is balanced by biases adjusts them."""
    if run.model.config.n_expert:
        counts = count_tokens(run.model, run.engine.sum_over_ranks)
        run.expert_counts = counts if run.expert_counts is None else run.expert_counts + counts


def has_reached_its_end(config: TrainConfig, state: State) -> bool:
    """Whether an evaluation ends the run: no gain for too long, or as good as was asked for."""
    impatient = config.patience is not None and state.evals_without_gain >= config.patience
    return impatient or (config.target_val_loss is not None and state.best_val_loss <= config.target_val_loss)


def diverged(run: Run, loss: float, grad_norm: float) -> UserError:
    best = run.best_path
    kept = f"; the best checkpoint is kept in {best}" if best in run.written else ""
    return UserError(
        f"step {run.state.step + 1}: the loss is {loss:g}, the gradient's norm {grad_norm:g}, "
        f"{run.config.max_skipped_steps} steps before were skipped too (max_skipped_steps){kept}; "
        "try a lower learning_rate, more warmup_iters or float32"
    )


def train_record(
    run: Run, loss: float, grad_norm: float, lr_scale: float, tokens_per_s: float, seconds: float
) -> dict[str, Any]:
    flops = tokens_per_s * run.model.flops_per_token()
    return {
        "step": run.state.step,
        "loss": loss,
        "lr": lr_scale * run.config.learning_rate,
        "grad_norm": grad_norm,
        "tokens": run.state.tokens,
        "skipped_steps": run.state.skipped_steps or None,
        "tokens_per_s": tokens_per_s,
        "ms_per_step": 1000 * seconds,
        "gflops": flops / 1e9,
        "mfu": flops / run.matmul_flops / run.engine.world_size if run.matmul_flops else None,
    }


@torch.no_grad()
def evaluate(run: Run) -> tuple[float, float]:
    """Mean validation loss per target in nats, and its standard error, with samples as the independent units."""
    engine, network = run.engine, run.engine.network
    network.eval()
    sums = torch.zeros(5, dtype=torch.float64)  # over samples, with s their loss and c their count: s, c, ss, sc, cc
    for batch in run.validation:
        batch = batch.to(engine.device)
        with engine.autocast():
            losses = run.loss(network, batch, "none")
        s = losses.double().sum(1).cpu()
        c = what_counts(batch, losses).double().sum(1).cpu()
        sums += torch.stack([s.sum(), c.sum(), (s * s).sum(), (s * c).sum(), (c * c).sum()])
    network.train()
    s, c, ss, sc, cc = engine.sum_over_ranks(*sums.tolist())
    mean = s / c
    return mean, math.sqrt(max(0.0, ss - 2 * mean * sc + mean * mean * cc)) / c


def what_counts(batch: Batch, losses: torch.Tensor) -> torch.Tensor:
    """1 where a loss counts: (B, T) per target, or (pairs, 1)."""
    if losses.shape != batch.targets.shape:
        return torch.full_like(losses, batch.count > 0)
    return torch.ones_like(losses) if batch.loss_mask is None else batch.loss_mask


def evaluate_and_save(run: Run, log: RunLog) -> None:
    """Evaluate; write <stage>.pt if the validation loss fell."""
    state, config = run.state, run.config
    val_loss, standard_error = evaluate(run)
    improved = val_loss < state.best_val_loss
    state.evals_without_gain = 0 if improved else state.evals_without_gain + 1
    before, state.best_val_loss = state.best_val_loss, min(val_loss, state.best_val_loss)
    record = {
        "type": "val",
        "step": state.step,
        "val_loss": val_loss,
        "val_loss_se": standard_error,
        "best_val_loss": state.best_val_loss,
        "tokens": state.tokens,
    }
    line = f"step {state.step:,}: val loss {val_loss:.4f} ± {standard_error:.4f}"
    if config.loss in BY_TOKEN:
        record["perplexity"] = math.exp(min(val_loss, 700))
        line += f", perplexity {record['perplexity']:.2f}"
    if run.tokens_per_character:
        record["bits_per_character"] = val_loss * run.tokens_per_character / math.log(2)
        line += f", {record['bits_per_character']:.3f} bits/character"
    if run.expert_counts is not None:
        shares = run.expert_counts / run.expert_counts.sum(1, keepdim=True)
        record["expert_load"], run.expert_counts = shares.tolist(), None
        line += f", busiest expert {shares.max() * shares.size(1):.2f}x the mean"
    if run.measure:
        figures = run.measure()
        record.update(figures)
        line += "".join(f", {n} {v:.2%}" if "accuracy" in n else f", {n} {v:.3f}" for n, v in figures.items())
    if improved and not save_or_warn(run, run.best_path, log):
        improved, state.best_val_loss = False, before  # so that the next good one is saved
    log.write(record)
    log.say(line + (f" -> {run.best_path}" if improved else f" (best {state.best_val_loss:.4f})"))
    if config.sample_tokens:
        model = run.engine.whole_model()
        if run.engine.is_main:
            log.say(f"  sample: {sample_text(run, model)!r}")


def sample_text(run: Run, model: GPT) -> str:
    """A short continuation of sample_prompt; its random numbers are its own, so that training is not disturbed."""
    model.eval()
    idx = torch.from_numpy(run.tokenizer.encode(run.config.sample_prompt).astype("int64"))[None].to(run.engine.device)
    steps = model.generate(idx, run.config.sample_tokens, temperature=0.8, seed=run.config.random_seed)
    text = run.tokenizer.decode([tokens.item() for tokens in steps])
    model.train()
    return text


def save_or_warn(run: Run, path: Path, log: RunLog, must: bool = False) -> bool:
    """Save; where any process fails to (a full disk), all of them return False, or stop if it must succeed."""
    failure = None
    try:
        save(run, path)
    except SaveError as error:
        failure = error
    (failures,) = run.engine.sum_over_ranks(float(failure is not None))
    if not failures:
        return True
    failure = failure or SaveError(f"{path}: another process could not write it")
    if must or run.config.stop_on_failed_save:
        raise failure
    log.say(f"warning: {failure}; training goes on to the next save")
    return False


def save(run: Run, path: Path) -> None:
    """Write a checkpoint. What an earlier run left under this name is kept as NAME.bak."""
    state = run.state
    if run.engine.is_main and path not in run.written and path.exists() and not run.continues:
        backup = path.with_name(path.name + ".bak")
        if backup.is_dir():
            shutil.rmtree(backup)
        os.replace(path, backup)
    if run.engine.is_main and path == run.last_path and path.is_file():
        keep_previous(path, only_if_none=path not in run.written)  # what this run has not written may be damaged
    run.written.add(path)
    run.engine.save(
        path,
        {
            "step": state.step,
            "model_config": run.model.config.to_dict(),
            **({"lora": run.adapter} if run.adapter else {}),
            "train_config": run.config.to_dict(),
            "tokenizer": run.tokenizer.to_dict(),
            "data": {
                "sizes": run.data_sizes,
                "samples": state.samples,
                "tokens": state.tokens,
                "evals_without_gain": state.evals_without_gain,
                "skipped_steps": state.skipped_steps,
            },
            "best_val_loss": float(state.best_val_loss),
        },
    )


# ------------------------------------------------------------------------------------------------------ setting up


def read_configs(args: Any, overrides: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any], dict[str, Any]]:
    """The training config, the model fields that were asked for explicitly, and the model config file's.

    The file of -t may hold model fields too (a preset in one file); then the model config is read only if -m names it.
    """
    train_fields, model_fields = fields_of(TrainConfig), fields_of(ModelConfig)
    path = find_config(args.training)
    values = {**check_fields(read_json(path), {**model_fields, **train_fields}, str(path)), **overrides}
    explicit = {name: value for name, value in values.items() if name not in train_fields}
    values = {name: value for name, value in values.items() if name in train_fields}
    defaults = {}
    if args.model or not explicit.keys() - overrides.keys():
        model_path = find_config(args.model or "model")
        defaults = check_fields(read_json(model_path), model_fields, str(model_path))
        if args.model:
            explicit = {**defaults, **explicit}
    try:
        config = TrainConfig(**{"stage": path.stem, **values})
    except UserError as error:
        raise UserError(f"{path}, with the command line: {error}") from None
    if not config.dataset_path:
        config.dataset_path = [[f"dataset/{config.stage}_train.bin", f"dataset/{config.stage}_val.bin"]]
    return config, explicit, defaults


def make_model(config: TrainConfig, shape: dict[str, Any], tokenizer: Tokenizer) -> GPT:
    """A new network of the given shape for the tokenizer's vocabulary."""
    changes = {} if config.dropout is None else {"dropout": config.dropout}
    if shape.get("vocab_size") not in (None, tokenizer.vocab_size):
        raise UserError(
            f"vocab_size is {shape['vocab_size']}, the tokenizer has {tokenizer.vocab_size} tokens; leave it out"
        )
    model_config = ModelConfig(**{**shape, "vocab_size": tokenizer.vocab_size, **changes})
    preflight.check_size(model_config)
    return GPT(model_config, config.sdp_kernel)


def restore_model(
    config: TrainConfig, explicit: dict[str, Any], checkpoint: dict[str, Any]
) -> tuple[GPT, dict[str, Any] | None]:
    """The network of a checkpoint, and what is to be said of its adapter, if it gets one.

    Raises UserError where a model field was asked to be another.
    """
    where = config.from_checkpoint
    changes = {} if config.dropout is None else {"dropout": config.dropout}
    for name, value in explicit.items():
        trained = checkpoint["model_config"].get(name, fields_of(ModelConfig)[name].default)
        if value is not None and value != trained:
            raise UserError(
                f"{name} is {value} here, {trained} in {where}: a trained model keeps its shape; leave {name} out"
            )
    is_adapter = "lora" in checkpoint
    if is_adapter and not config.use_lora:
        raise UserError(
            f"{where}: an adapter; --use_lora true goes on with it, inference.py --merge makes a model of it"
        )
    base, base_path = lora.load_base(checkpoint, where) if is_adapter else (checkpoint, where)
    model = load_model(base, base_path, config.sdp_kernel, **changes)
    if not config.use_lora:
        return model, None
    settings = lora.settings_of(config)
    if not is_adapter:
        adapter = {"settings": settings, "base": base_path, "fingerprint": lora.fingerprint(model)}
        lora.attach(model, settings)
        return model, adapter
    if settings != checkpoint["lora"]["settings"]:
        raise UserError(f"{where}: an adapter with {checkpoint['lora']['settings']}; a run keeps them")
    lora.load_adapter(checkpoint, model, where)
    return model, checkpoint["lora"]


def open_data(
    config: TrainConfig, tokenizer: Tokenizer, tokenizer_from: str
) -> tuple[list[TokenFile], list[TokenFile]]:
    """The training and the validation files; raises UserError unless they were prepared with this tokenizer."""
    pairs = [(TokenFile(train_path), TokenFile(val_path)) for train_path, val_path in config.dataset_path]
    for file in (file for pair in pairs for file in pair):
        if file.header.get("tokenizer") != tokenizer.fingerprint():
            raise UserError(
                f"{file.path} was prepared with another vocabulary ({file.header.get('vocab_size')} tokens) "
                f"than that of {tokenizer_from} ({tokenizer.vocab_size}); prepare it again"
            )
    return [train for train, _ in pairs], [val for _, val in pairs]


def set_reference(config: TrainConfig, checkpoint: dict[str, Any] | None) -> None:
    """What a loss measures from, if not named: where the run began, also when it goes on."""
    if config.reference or config.loss not in (*REFERENCED, "grpo"):
        return
    is_same = checkpoint is not None and checkpoint["train_config"].get("stage") == config.stage
    before = checkpoint["train_config"].get("reference") if is_same else None
    config.reference = before or config.from_checkpoint


def set_up(config: TrainConfig, explicit: dict[str, Any], defaults: dict[str, Any], engine: Engine) -> Run:
    """Model, data and engine for a stage, new or from a checkpoint."""
    checkpoint = adapter = None
    if config.from_checkpoint:
        checkpoint = load_newest(config.from_checkpoint)
        tokenizer = load_checkpoint_tokenizer(checkpoint, config.from_checkpoint)
        model, adapter = restore_model(config, explicit, checkpoint)
    else:
        tokenizer = load_tokenizer(config.tokenizer_path)
        model = make_model(config, {**defaults, **explicit}, tokenizer)
    if not model.config.is_causal:
        raise UserError("is_causal is false: with full attention a model sees the very token it is to predict")
    model.restart_positions = config.restart_positions
    train_files, val_files = open_data(config, tokenizer, config.from_checkpoint or config.tokenizer_path)
    shared = {
        "block_size": model.config.block_size,
        "vocab_size": model.config.vocab_size,
        "batch_size": config.batch_size,
        "seed": config.random_seed,
        "overlong": config.overlong,
        "rank": engine.rank,
        "world_size": engine.world_size,
        "pad_to": model.config.block_size if engine.use_compile else 16,
        "mask_documents": config.mask_documents,
    }
    steps, pack_samples = config.gradient_accumulation_steps, config.pack_samples
    batches = TrainBatches(train_files, accumulation_steps=steps, pack_samples=pack_samples, **shared)
    validation = ValidationBatches(val_files, eval_iters=config.eval_iters, **shared)
    n_characters = sum(file.header["n_characters"] for file in val_files)
    set_reference(config, checkpoint)
    loss = make_loss(config, engine, tokenizer, [*batches.datasets, *validation.datasets])
    run = Run(config, model, tokenizer, batches, validation, engine, loss, adapter)
    run.measure = getattr(loss, "figures", None)
    if config.loss in BY_TOKEN:
        run.tokens_per_character = sum(file.header["n_loss_tokens"] for file in val_files) / max(1, n_characters)
    run.data_sizes = [file.header["n_tokens"] for file in train_files]
    start(run, checkpoint)
    return run


def start(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """Hand the model to the engine, and take over where a checkpoint of the same stage stood."""
    preflight.choose_attention(run.config, run.model, run.engine)
    run.engine.prepare(run.model)
    is_same_kind = checkpoint is not None and ("lora" in checkpoint) == run.config.use_lora
    if is_same_kind and checkpoint["train_config"].get("stage") == run.config.stage:
        run.continues = True
        trained_with = checkpoint["train_config"].get("optimizer")
        if trained_with != run.config.optimizer:
            raise UserError(
                f"optimizer is {run.config.optimizer} here, {trained_with} in {run.config.from_checkpoint}: "
                "a run keeps its optimizer; or give this one another --stage name to start from the weights alone"
            )
        data = checkpoint["data"]
        if data.get("sizes", run.data_sizes) != run.data_sizes:  # (checkpoints of earlier versions lack them)
            raise UserError(
                f"dataset_path: the training files have {run.data_sizes} tokens, those of {run.config.from_checkpoint} "
                f"had {data['sizes']}: a run keeps its data; or give this one another --stage name to start from "
                "the weights alone"
            )
        run.changes = changed_fields(run.config, checkpoint["train_config"])
        run.engine.load_state_dict(checkpoint)
        run.state = State(
            step=checkpoint["step"],
            samples=data["samples"],
            tokens=data["tokens"],
            best_val_loss=checkpoint["best_val_loss"],
            evals_without_gain=data["evals_without_gain"],
            skipped_steps=data.get("skipped_steps", 0),
        )


def changed_fields(config: TrainConfig, before: dict[str, Any]) -> list[str]:
    """Fields of a continued run that are not as they were; where things lie, and when to stop, do not count."""
    places = {"from_checkpoint", "save_checkpoint_to", "dataset_path", "tokenizer_path", "log_to"}
    now = config.to_dict()
    names = [name for name in now if name in before and name not in places and now[name] != before[name]]
    return [f"{name} {before[name]} -> {now[name]}" for name in names]


def train_with_log(run: Run, argv: list[str]) -> Path | None:
    """The loop, with a log around it and, after it, what to do next; returns the log's path."""
    config, engine = run.config, run.engine
    header = {
        "stage": config.stage,
        "train_config": config.to_dict(),
        "model_config": run.model.config.to_dict(),
        "n_parameters": run.model.parameter_count(),
        "resumed_from_step": run.state.step,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": preflight.device_name(engine.device),
            "dtype": dtype_name(engine.dtype),
            "threads": torch.get_num_threads(),
            "processes": engine.world_size,
        },
    }
    with own_checkpoints(run):
        steps = run.state.step, config.max_steps
        log = RunLog(engine.is_main, config.log_to, config.stage, *steps, header, config.max_log_mb)
        try:
            state = train(run, log)
        except (MemoryError, RuntimeError) as error:
            if not preflight.is_out_of_memory(error):
                raise
            raise UserError(preflight.how_to_fit(run)) from None
        finally:
            log.close()
    if engine.is_main and state.step:
        best, last = run.best_path, run.last_path
        reached = f"best validation loss {state.best_val_loss:.4f} ({best})"
        reached = reached if math.isfinite(state.best_val_loss) else "not evaluated yet"
        print(f"step {state.step:,}, {reached}; log: {log.path}")
        print(
            f"to go on: {engine.command} {shlex.join(without_flag(argv, '--from_checkpoint'))} --from_checkpoint {last}"
        )
    return log.path


@contextlib.contextmanager
def own_checkpoints(run: Run) -> Iterator[None]:
    """Keep other runs from writing this stage's checkpoints; what a killed one left half written is removed."""
    if not run.engine.is_main:
        yield
        return
    folder, stage = Path(run.config.save_checkpoint_to), run.name
    try:
        with hold_lock(folder / f".{stage}.lock"):
            for leftover in folder.glob(f".{glob.escape(stage)}*.tmp"):
                leftover.unlink()
            yield
    except BlockingIOError:
        raise UserError(
            f"another run is writing the checkpoints of {stage!r} into {folder}: wait until it has ended, "
            "or give this one another --stage or --save_checkpoint_to"
        ) from None


def without_flag(argv: list[str], flag: str) -> list[str]:
    """The arguments less one flag and its value."""
    kept, skip = [], False
    for argument in argv:
        if not skip and argument != flag and not argument.startswith(flag + "="):
            kept.append(argument)
        skip = argument == flag
    return kept


def make_parser() -> Parser:
    """The options of the training scripts: a flag for every field, and what to read and to do."""
    parser = Parser(sys.modules["__main__"].__doc__ or __doc__, ModelConfig, TrainConfig)
    parser.add_argument(
        "-t", "--training", default="pretrain", help="training config: NAME of config/NAME.json, or a path"
    )
    parser.add_argument("-m", "--model", default=None, help="model config, likewise [default: model]")
    parser.add_argument("--check", action="store_true", help="overfit one batch, to see whether the set-up can learn")
    return parser


def train_stage(args: Any, overrides: dict[str, Any], make_engine: Callable[[TrainConfig], Engine]) -> None:
    """What the command line asks for, on an engine."""
    config, explicit, defaults = read_configs(args, overrides)
    engine = make_engine(config)
    run = set_up(config, explicit, defaults, engine)
    if args.check:
        preflight.check_learning(run, run.loss)
        return
    with contextlib.redirect_stdout(Console(sys.stdout)), contextlib.redirect_stderr(Console(sys.stderr)):
        if engine.is_main:
            preflight.report(run)
        train_with_log(run, sys.argv[1:])


def main() -> None:
    args, overrides = make_parser().parse()
    values = read_json(find_config(args.training))
    if isinstance(values, dict) and "problem" in values:  # instances are generated, answers can be checked
        import problem

        problem.train_on(values, overrides)
        return
    train_stage(args, overrides, Engine)


if __name__ == "__main__":
    run(main)
