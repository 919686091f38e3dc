"""From a command line to a run that is ready to train: configs, data, model, engine, and where it resumes.

Every run on every engine is built here, in this order: read the configs, open what the config names as data, make or
load the model, make batches, hand the model to the engine, take over the state of the run that is resumed.
"""

import dataclasses
import math
import reprlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError, check_fields, command_line, fields_of, find_config, read_json
from model import GPT, ModelConfig
from problems.config import LOSSES, TRAINING, TRAINING_BY_REWARD, ProblemConfig, find_problem
from problems.tasks import PROBLEMS
from text.tokenizer import Tokenizer
from training import preflight
from training.config import TrainConfig
from training.engine import Engine, Loss
from training.losses import COMPARES_POLICIES, PREFERENCES, make_loss, next_token
from training.precision import choose_dtype
from training.sources import SOURCES
from training.spikes import Spikes
from weights import lora
from weights.checkpointing import best_val_loss_in, find_checkpoint, load_checkpoint_or_previous, load_model


@dataclass
class State:
    """Where a run stands: all that must survive a restart beside weights, optimizer and random states."""

    step: int = 0
    samples: int = 0  # the position in the data: batches are a pure function of it
    tokens: int = 0
    best_val_loss: float = math.inf
    evals_without_gain: int = 0
    skipped_steps: int | torch.Tensor = 0  # those whose loss or gradient was not finite; counted on the device
    seconds: float = 0.0  # that training has taken in all, by the main process's clock at the beginning of the step
    spikes: Spikes = field(default_factory=Spikes)


@dataclass
class Run:
    """Everything that the loop needs; what differs between stages is in source, batches, validation and loss."""

    config: TrainConfig
    source: Any  # an instance of one of SOURCES
    model: GPT
    batches: Any  # training batches
    validation: Any  # an iterable of Batch, the same ones every time
    engine: Engine
    loss: Loss = next_token
    adapter: dict[str, Any] | None = None  # settings and base of the LoRA adapter that is trained
    state: State = field(default_factory=State)
    is_resumed: bool = False  # continues an earlier run of the same stage
    kept_best: float = math.inf  # the best validation loss of that one, if it counts here; inf: none
    is_from_previous: bool = False  # from NAME.previous, as the newest checkpoint is damaged
    changes: list[str] = field(default_factory=list)  # fields that are not as they were in that one
    evaluation_changes: list[str] = field(default_factory=list)  # why its best validation loss does not count
    expert_counts: torch.Tensor | None = None  # tokens of each layer's experts since the last evaluation
    matmul_flops: float | None = None  # the device's measured rate in FLOP/s, for mfu
    dtype_reason: str = ""  # why the engine's dtype is what dtype auto means here
    stopped: bool = False  # by a signal
    val_loss: float = math.nan  # of the latest evaluation
    began: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0  # that training had taken when it was resumed
    written: set[Path] = field(default_factory=set)  # checkpoints that this run itself has written
    log_path: Path | None = None

    @property
    def evaluated(self) -> dict[str, Any]:
        """All that decides what a validation loss measures: losses of other values cannot be compared."""
        fields = ("loss", *(("reference", "dpo_beta", "simpo_gamma") if self.config.loss in PREFERENCES else ()))
        return {name: getattr(self.config, name) for name in fields} | self.source.evaluated

    @property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer

    @property
    def owns_best(self) -> bool:
        """Whether the best checkpoint that lies there is of this run, or of the one that it resumes: no other's."""
        is_resumed = math.isfinite(self.kept_best) and best_val_loss_in(self.best_path) == self.kept_best
        return self.best_path in self.written or is_resumed

    @property
    def best_path(self) -> Path:
        """The checkpoint of the lowest validation loss."""
        return self.config.best_path

    @property
    def last_path(self) -> Path:
        """The newest checkpoint, to resume from: a file, or a folder of every process's shards."""
        last = self.config.last_path
        return last.with_suffix("") if self.engine.writes_shards else last

    def seconds(self) -> float:
        """How long training has taken in all, evaluations and saves included, by this process's clock."""
        return self.seconds_before + time.perf_counter() - self.began

    @property
    def time_limit(self) -> float:
        """At how many seconds() the run ends."""
        before = 0.0 if self.config.decay_over == "time" else self.seconds_before
        return before + 60 * self.config.max_minutes if self.config.max_minutes else math.inf

    def lr_scale(self) -> float:
        """Learning rate of this step, as a share of the peak: by the schedule, and lowered once the loss has spiked."""
        factor = self.config.rollback_lr_factor if self.state.spikes.rollbacks else 1.0
        return factor * self.config.lr_scale(self.state.step, self.state.seconds)

    def config_values(self) -> dict[str, Any]:
        """The training config as plain values, with the fields of the data's own config, if it has one."""
        settings = self.source.settings
        return self.config.to_dict() | (settings.to_dict() if settings else {})


# ------------------------------------------------------------------------------------------------------ the configs


@dataclass
class RunConfig:
    """All that was asked of a run, checked."""

    training: TrainConfig
    model: dict[str, Any]  # model fields asked for explicitly: a checkpoint must agree with them
    model_defaults: dict[str, Any]  # those of the model config file, for a new network
    source: str = "dataset_path"  # a key of SOURCES
    settings: ProblemConfig | None = None  # the data's own config


# what a command line may say of a run without making it another than the one that plan.py has a prediction for
BESIDE_A_PLAN = (
    *("stage", "from_checkpoint", "save_checkpoint_to", "save_interval", "stop_on_failed_save", "random_seed"),
    *("sample_tokens", "sample_prompt", "log_interval", "log_to", "max_log_mb", "backend", "process_timeout"),
)


def read_configs(training: str | None, model: str | None, overrides: dict[str, Any]) -> RunConfig:
    """The configs that -t and -m name, with the command line's fields over them.

    The file of -t may hold model fields too (a preset in one file); then the model config is read only if -m names it.
    Where a problem is named, its own customary values take the place of the model config, and of -t if it is not given.
    """
    train_fields, model_fields, problem_fields = map(fields_of, (TrainConfig, ModelConfig, ProblemConfig))
    path, values = None, dict(overrides)
    if training or "problem" not in overrides:
        path = find_config(training or "pretrain")
        known = {**model_fields, **train_fields, **problem_fields}
        values = check_fields(read_json(path), known, str(path))
        data = values.get("stage") or path.stem  # --stage names the checkpoints, not the data
        changed = [name for name in (*overrides, *["model"] * bool(model)) if name not in BESIDE_A_PLAN]
        if values.get("prediction") and changed:
            values["prediction"] = f"not as it was planned ({', '.join(changed)})"
        values |= overrides
    if "problem" in values:
        if model:
            model_path = find_config(model)
            values = {**check_fields(read_json(model_path), model_fields, str(model_path)), **values}
        return problem_config(values.pop("problem"), values)
    for name in values:
        if name in problem_fields:
            raise UserError(f"{name} is for toy problems: --problem NAME names one (python problem.py --list)")
    explicit = {name: value for name, value in values.items() if name not in train_fields}
    values = {name: value for name, value in values.items() if name in train_fields}
    vision = {name: explicit.pop(name) for name in VISION_FIELDS & explicit.keys() - overrides.keys()}
    defaults = {}
    if model or not explicit.keys() - overrides.keys() - {"is_causal"}:  # the preset names no shape of its own
        model_path = find_config(model or "model")
        defaults = check_fields(read_json(model_path), model_fields, str(model_path))
        if model:
            explicit = {**defaults, **explicit}
    defaults |= vision  # a preset that sees may be trained from any model that does: what it says is for a new encoder
    try:
        config = TrainConfig(**{"stage": path.stem, **values})
    except UserError as error:
        raise UserError(f"{path}, with the command line: {error}") from None
    if not config.dataset_path:
        config.dataset_path = [[f"dataset/{data}_train.bin", f"dataset/{data}_val.bin"]]
    return RunConfig(config, explicit, defaults)


# fields of files and texts, which mean nothing where instances are generated
NOT_FOR_PROBLEMS = (
    *("dataset_path", "tokenizer_path", "overlong", "mask_documents", "pack_samples"),
    *("restart_positions", "sample_tokens", "sample_prompt"),
    *("teacher", "distill_temperature", "distill_weight", "dpo_beta", "dpo_chosen_weight", "simpo_gamma"),
)


def problem_config(name: str, given: dict[str, Any], stored: dict[str, Any] | None = None) -> RunConfig:
    """The configs of a toy problem: given fields over those of a checkpoint (stored), or over the customary ones."""
    problem = find_problem(name)
    for option_name in given:
        owners = [other for other, entry in PROBLEMS.items() if option_name in entry.options]
        if owners and name not in owners:
            raise UserError(f"--{option_name} belongs to {', '.join(owners)}, not to {name}")
        if option_name in NOT_FOR_PROBLEMS:
            raise UserError(f"--{option_name} means nothing here: toy problems make their own data")
    loss = given.get("loss")
    if loss not in (None, *LOSSES):
        raise UserError(f"--loss {loss} means nothing here: it is one of {', '.join(LOSSES)}")
    base = stored or {"stage": f"problem_{name}", **TRAINING, **problem.training}
    if loss == "grpo" and not stored:
        base |= {"stage": f"problem_{name}_grpo", **TRAINING_BY_REWARD, **problem.by_reward}
    if stored and "length" in given:
        base = {field: value for field, value in base.items() if field != "test_length"}
    values = {**base, **given, "problem": name}
    train_fields, problem_fields = fields_of(TrainConfig), fields_of(ProblemConfig)
    try:
        settings = ProblemConfig(**{name: value for name, value in values.items() if name in problem_fields})
        config = TrainConfig(**{name: value for name, value in values.items() if name in train_fields})
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    model = {name: value for name, value in given.items() if name not in train_fields and name not in problem_fields}
    return RunConfig(config, model, {}, "problem", settings)


# ------------------------------------------------------------------------------------------------------ the model


def make_model(config: TrainConfig, shape: dict[str, Any], tokenizer: Tokenizer) -> GPT:
    """A new network of the given shape for the tokenizer's vocabulary."""
    changes = {} if config.dropout is None else {"dropout": config.dropout}
    if shape.get("vocab_size") not in (None, tokenizer.vocab_size):
        raise UserError(
            f"vocab_size is {shape['vocab_size']}, the tokenizer has {tokenizer.vocab_size} tokens; leave it out"
        )
    if config.loss == "diffusion":
        changes["mask_token"] = True
    model_config = ModelConfig(**{**shape, "vocab_size": tokenizer.vocab_size, **changes})
    preflight.check_size(model_config)
    return GPT(model_config, config.sdp_kernel)


# what may change of a trained model: with RoPE the weights serve any window, and scaling is there to widen it
CONTEXT_FIELDS = ("block_size", "rope_scaling", "rope_factor")


# what a model of text alone gets when it learns to see
VISION_FIELDS = {"image_size", "patch_size", "image_last", "n_vision_layer"}


def context_changes(config: TrainConfig, explicit: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Fields of another context window for a trained model, as far as they were asked for and are possible."""
    trained = checkpoint["model_config"]
    asked = {name: explicit[name] for name in CONTEXT_FIELDS if explicit.get(name) is not None}
    known = fields_of(ModelConfig)
    changes = {name: value for name, value in asked.items() if value != trained.get(name, known[name].default)}
    is_new_run = checkpoint["train_config"].get("stage") != config.stage and not config.use_lora
    if not (changes and is_new_run and trained.get("use_rope", True)):
        return {}
    scaling = asked.get("rope_scaling", trained.get("rope_scaling", "none"))
    length = trained.get("rope_trained_length") or trained["block_size"] / trained.get("rope_factor", 1.0)
    window = asked.get("block_size", trained["block_size"])
    if scaling == "none":  # trained on as it is, the longer window becomes the trained one
        changes |= {"rope_factor": 1.0, "rope_trained_length": max(round(length), window)}
    elif "rope_factor" not in asked:
        changes["rope_factor"] = max(1.0, window / length)
    return changes


def modules_left_out(config: TrainConfig, explicit: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, int]:
    """A smaller n_future for a trained model, if it was asked for: its modules beyond that are left out."""
    asked, is_new_run = explicit.get("n_future"), checkpoint["train_config"].get("stage") != config.stage
    is_less = asked is not None and asked < checkpoint["model_config"].get("n_future", 1)
    return {"n_future": asked} if is_less and is_new_run and not config.use_lora else {}


def as_diffusion(config: TrainConfig, explicit: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, bool]:
    """A mask token for a causal model, if masked diffusion was asked for: its weights are the start.

    What it knows of words and facts lies in weights that both need. In blocks they go on predicting the next token;
    with full attention (is_causal false) the token itself (Gong et al. 2024, arXiv:2410.17891, keep the shift).
    Raises UserError where it cannot be turned.
    """
    trained, where = checkpoint["model_config"], config.from_checkpoint
    is_causal = trained.get("is_causal", True)
    if config.loss == "diffusion" and trained.get("mask_token") and explicit.get("is_causal", is_causal) != is_causal:
        form, preset = ("in blocks", "block_diffusion") if is_causal else ("with full attention", "diffusion")
        raise UserError(
            f"{where} is of masked diffusion {form} and stays so: -t {preset} and -t {preset}_sft go on with it"
        )
    if config.loss != "diffusion" or trained.get("mask_token") or not is_causal:
        return {}
    if config.use_lora:
        raise UserError(f"{where} has no mask token, and an adapter adds none: start diffusion without --use_lora")
    if checkpoint["train_config"].get("stage") == config.stage:
        raise UserError(f"{where} has no mask token: to start diffusion from its weights takes another --stage name")
    if (explicit.get("n_future") or trained.get("n_future", 1)) > 1:
        raise UserError(f"diffusion trains no modules of n_future (in {where}, or asked for): add --n_future 1")
    turned = {"mask_token": True} | ({"is_causal": False} if explicit.get("is_causal") is False else {})
    try:
        ModelConfig(**{**trained, "n_future": 1, **turned})
    except UserError as error:
        raise UserError(f"{where} cannot become a model of masked diffusion: {error}") from None
    return turned


def check_modules(config: TrainConfig, model: GPT) -> None:
    """Raises UserError where modules (n_future) would get no gradient; with LoRA they are frozen, so need none."""
    if model.config.n_future > 1 and config.loss != "next_token" and not config.use_lora:
        modules = f"the modules of n_future {model.config.n_future}"
        raise UserError(f"loss {config.loss} does not train {modules}: leave them out with --n_future 1")


def restore_model(
    config: TrainConfig, explicit: dict[str, Any], defaults: dict[str, Any], checkpoint: dict[str, Any]
) -> tuple[GPT, dict[str, Any] | None]:
    """The network of a checkpoint, and the settings of its LoRA adapter, if it has or gets one.

    explicit, defaults: model fields, as in RunConfig. Raises UserError where an explicit one is not as it was trained.
    """
    where = config.from_checkpoint
    changes = context_changes(config, explicit, checkpoint) | modules_left_out(config, explicit, checkpoint)
    fields = {**defaults, **explicit}.items()
    vision = {name: value for name, value in fields if name in VISION_FIELDS and value is not None}
    learns_to_see = bool(vision.get("image_size")) and not checkpoint["model_config"].get("image_size")
    if learns_to_see and config.use_lora:
        raise UserError(f"{where} reads text alone: train an encoder with all weights first, without --use_lora")
    if learns_to_see and config.resumes(checkpoint):
        raise UserError(f"{where} reads text alone: a run that teaches it to see gets another --stage name")
    explicit = {name: value for name, value in explicit.items() if not (learns_to_see and name in vision)}
    changes |= as_diffusion(config, explicit, checkpoint)
    for name, value in explicit.items():
        trained = checkpoint["model_config"].get(name, fields_of(ModelConfig)[name].default)
        if value is not None and value != trained and name not in changes:
            advice = "a trained model keeps its shape"
            if name in CONTEXT_FIELDS:
                advice = "another window takes RoPE, another --stage name, and a run without LoRA"
            raise UserError(f"{name} is {value} here, {trained} in {where}: {advice}; leave {name} out")
    if config.dropout is not None or config.loss in COMPARES_POLICIES:
        changes["dropout"] = config.dropout or 0.0
    is_adapter = "lora" in checkpoint
    if is_adapter and not config.use_lora:
        base = str(checkpoint["lora"].get("base"))
        merging = command_line("inference.py", "-m", base, "--lora", where, "--merge", "merged.pt")
        raise UserError(f"{where}: an adapter; --use_lora true resumes it; `{merging}` makes a whole model of it")
    base, base_path = lora.load_base(checkpoint, where) if is_adapter else (checkpoint, where)
    model = load_model(base, base_path, config.sdp_kernel, **changes)
    if learns_to_see:  # its weights, and a new encoder
        weights = model.state_dict()
        model = GPT(dataclasses.replace(model.config, **vision), config.sdp_kernel)
        model.load_state_dict(weights, strict=False)
    if not config.use_lora:
        return model, None
    settings = lora.settings_of(config)
    if not is_adapter:
        adapter = {"settings": settings, "base": base_path, "fingerprint": lora.fingerprint(model)}
        lora.attach(model, settings)
        return model, adapter
    for name, value in checkpoint["lora"]["settings"].items():
        if settings.get(name) != value:
            shown = ",".join(value) if isinstance(value, list) else value
            raise UserError(f"lora_{name}: another than that of {where}, and a run keeps it: --lora_{name} {shown}")
    lora.load_adapter(checkpoint, model, where)
    return model, checkpoint["lora"]


# ------------------------------------------------------------------------------------------------------ the run


def build_run(asked: RunConfig, engine: Engine) -> Run:
    """Data, model and engine of a run, new or from a checkpoint; raises UserError where they do not fit together."""
    config = asked.training
    engine.together(lambda: preflight.check_outputs(config, engine))
    config.from_checkpoint = str(find_checkpoint(config.from_checkpoint)) if config.from_checkpoint else ""
    start = config.from_checkpoint
    checkpoint = engine.together(lambda: load_checkpoint_or_previous(start) if start else None)
    source = engine.together(lambda: SOURCES[asked.source](config, asked.settings, checkpoint))
    shape = {**source.default_shape(asked.model), **asked.model_defaults, **asked.model}
    if checkpoint:
        model, adapter = restore_model(config, asked.model, asked.model_defaults, checkpoint)
    else:
        model, adapter = make_model(config, shape, source.tokenizer), None
    check_modules(config, model)
    choose_reference(config, checkpoint)
    batches, validation = source.make_batches(model, engine)
    if model.vision is not None and all(dataset.file.images is None for dataset in batches.datasets):
        model.vision.requires_grad_(False)  # without gradients it would decay, and DDP wait for it
    datasets = [*batches.datasets, *getattr(validation, "datasets", ())]
    earlier = checkpoint if checkpoint and config.resumes(checkpoint) else None
    dtype_reason = choose_dtype(engine, model, earlier)
    loss = make_loss(config, engine, source.tokenizer, datasets)
    run = Run(config, source, model, batches, validation, engine, loss, adapter, dtype_reason=dtype_reason)
    preflight.choose_attention(config, model, engine)
    engine.prepare(model)
    if earlier:
        resume(run, earlier)
    elif checkpoint:
        now, before = model.config.to_dict(), checkpoint["model_config"]
        known = fields_of(ModelConfig)
        context = {
            name: before.get(name, known[name].default)
            for name in (*CONTEXT_FIELDS, "dropout", "n_future", "is_causal", "mask_token")
        }
        run.changes = changed_fields(now, context)
    config.prediction = preflight.prediction(run)
    return run


def choose_reference(config: TrainConfig, checkpoint: dict[str, Any] | None) -> None:
    """The reference policy, if none is named: where the run began, also when it is resumed later."""
    if config.reference or config.loss not in COMPARES_POLICIES:
        return
    is_same_stage = checkpoint is not None and checkpoint["train_config"].get("stage") == config.stage
    before = checkpoint["train_config"].get("reference") if is_same_stage else None
    config.reference = before or config.from_checkpoint


def resume(run: Run, checkpoint: dict[str, Any]) -> None:
    """Take over optimizer, random states and position of a run; raises UserError where they do not fit this one."""
    config, where = run.config, run.config.from_checkpoint
    trained_with = checkpoint["train_config"].get("optimizer")
    if trained_with != config.optimizer:
        raise UserError(
            f"optimizer is {config.optimizer} here, {trained_with} in {where}: "
            f"a run keeps its optimizer (--optimizer {trained_with}); or give this one another --stage name to start "
            "from the weights alone"
        )
    kept = checkpoint["train_config"].get("prediction", "")
    if config.prediction and kept and not kept.startswith("predicted"):  # a run that was not as planned stays so
        config.prediction = kept
    data = checkpoint["data"]
    (total,) = run.engine.sum_over_ranks(float(checkpoint["step"]))
    if total != checkpoint["step"] * run.engine.world_size:
        raise UserError(
            f"{where}: step {checkpoint['step']:,} here, another on other hosts: they read different files under this "
            "name; use a shared folder, or copy the newest one to all"
        )
    run.is_resumed, run.is_from_previous = True, checkpoint.get("is_previous", False)
    run.changes = changed_fields(run.config_values(), checkpoint["train_config"])
    run.engine.load_state_dict(checkpoint)
    best, is_measured_alike = checkpoint["best_val_loss"], run.evaluated == data.get("evaluated")
    if math.isfinite(best) and is_measured_alike:
        run.kept_best = best
    elif math.isfinite(best):
        run.evaluation_changes = changed_fields(run.evaluated, data.get("evaluated", {})) or ["by an earlier version"]
    run.state = State(
        step=checkpoint["step"],
        samples=data["samples"],
        tokens=data["tokens"],
        best_val_loss=run.kept_best,
        evals_without_gain=data["evals_without_gain"] if is_measured_alike else 0,
        skipped_steps=data.get("skipped_steps", 0),
        seconds=data.get("seconds", 0.0),
        spikes=Spikes(**data.get("spikes", {})),
    )
    run.seconds_before = run.state.seconds


def changed_fields(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Fields of a resumed run that are not as they were, as "name old -> new"; where files lie does not count.

    Texts are shown as Python writes them: those of a stranger's checkpoint must not send commands to the terminal.
    """
    shown = reprlib.Repr()
    shown.maxstring = 80
    places = {"from_checkpoint", "save_checkpoint_to", "dataset_path", "tokenizer_path", "log_to"}
    names = [name for name in now if name in before and name not in places and now[name] != before[name]]
    return [f"{name} {shown.repr(before[name])} -> {shown.repr(now[name])}" for name in names]
