"""The fields of a training config: config/NAME.json, or --field value on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.configuration import Config, UserError, option
from base.devices import DTYPES
from model import SDP_KERNELS
from training.losses import COMPARES_POLICIES, FIELDS_OF_LOSSES, LOSSES
from training.optimizer import OPTIMIZERS, SCHEDULES, schedule, schedule_over_time
from training.run_log import SINKS
from weights.lora import TARGETS


@dataclass
class TrainConfig(Config):
    """How the network is trained."""

    stage: str = option(
        "",
        "name of this run's checkpoints; empty: the config file's, or problem_NAME",
        section="The run and its checkpoints",
    )
    loss: str = option("next_token", "training objective", choices=LOSSES)
    from_checkpoint: str = option(
        "", "checkpoint to start from, a path or NAME of checkpoint/NAME.pt; one of the same stage resumes that run"
    )
    save_checkpoint_to: str = option("checkpoint", "folder of the checkpoints")
    save_interval: int = option(1000, "steps between saves of <stage>_last.pt", minimum=1)
    stop_on_failed_save: bool = option(False, "end the run when a checkpoint cannot be written (a full disk)")
    random_seed: int = option(1337, "seed of initialization, data order and dropout", minimum=0, maximum=2**31)

    dataset_path: list[list[str]] = option(
        [],
        "[[train file, validation file], ...], in order: a curriculum; empty: dataset/NAME_{train,val}.bin of -t NAME",
        section="Data",
    )
    tokenizer_path: str = option("dataset/tokenizer.json", "tokenizer that the data was prepared with")
    overlong: str = option("drop", "samples longer than block_size + 1 tokens", choices=("drop", "cut"))
    mask_documents: bool = option(
        False, "running text: tokens attend only within their document (<|bos|> ... <|eos|>), a block-diagonal mask"
    )
    pack_samples: bool = option(
        False, "fine-tuning: sequence packing, several samples per row with a block-diagonal mask, instead of padding"
    )
    restart_positions: bool = option(True, "position ids restart at 0 in every masked document and packed sample")

    batch_size: int = option(
        100, "samples per micro-batch", minimum=1, maximum=1 << 20, section="Steps and when to stop"
    )
    gradient_accumulation_steps: int = option(
        4, "micro-batches per optimizer step, over all processes", minimum=1, maximum=1 << 20
    )
    max_steps: int | None = option(None, "stop after this many steps in all; null: no limit", minimum=1)
    max_minutes: float | None = option(
        None, "stop after this long; with decay_over time, in all, resumed or not; null: no limit", above=0.0
    )
    patience: int | None = option(
        None, "early stopping: evaluations without improvement before the run ends; null: no limit", minimum=1
    )
    target_val_loss: float | None = option(None, "stop at a validation loss this low; null: never", above=0.0)
    max_skipped_steps: int = option(
        20, "consecutive steps with a non-finite loss or gradient that are skipped before the run ends", minimum=0
    )
    on_spike: str = option(
        "none",
        "rollback: when the loss jumps and stays up, go back to the last good save, without the data since then",
        choices=("none", "rollback"),
    )
    max_rollbacks: int = option(3, "on_spike rollback: how often at most", minimum=1)
    rollback_lr_factor: float = option(
        0.5, "on_spike rollback: the first one multiplies all later learning rates by this", above=0.0, maximum=1.0
    )

    prediction: str = option("", "the validation loss that plan.py predicted; printed beside the one reached")
    planned_for: str = option("", "the preparation of the data that plan.py looked at; empty: no plan")

    optimizer: str = option("adamw", "optimizer", choices=OPTIMIZERS, section="Optimizer and learning rate")
    learning_rate: float = option(6e-4, "peak learning rate", above=0.0)
    min_lr: float = option(6e-5, "learning rate at the end of the decay", minimum=0.0)
    decay_lr: bool = option(True, "follow lr_schedule; false: constant after the warm-up")
    lr_schedule: str = option("cosine", "shape of the decay", choices=SCHEDULES)
    decay_over: str = option(
        "steps",
        "time: decay with the share of max_minutes that is used, whatever the speed; no two runs are quite the same",
        choices=("steps", "time"),
    )
    warmup_iters: int = option(300, "steps of linear warm-up", minimum=0)
    lr_decay_iters: int | None = option(None, "step at which the decay ends; null: max_steps, or 100000", minimum=1)
    weight_decay: float = option(0.1, "weight decay, on matrices only", minimum=0.0)
    beta1: float = option(0.9, "adamw: decay of the first moment; sgd: momentum", minimum=0.0, maximum=0.9999)
    beta2: float = option(0.99, "adamw: decay of the second moment", minimum=0.0, maximum=0.99999)
    grad_clip: float = option(1.0, "maximum norm of the gradient; 0: no clipping", minimum=0.0)
    muon_learning_rate: float = option(0.02, "muon: peak learning rate of the weight matrices", above=0.0)
    muon_momentum: float = option(0.95, "muon: momentum", minimum=0.0, maximum=0.999)
    dropout: float | None = option(
        None, "dropout rate in training; null: the model config's", minimum=0.0, maximum=0.99
    )

    eval_interval: int = option(100, "steps between evaluations", minimum=1, section="Evaluation and logs")
    eval_iters: int = option(
        5, "validation samples per evaluation, in hundreds, whatever batch_size is; 0: all of them", minimum=0
    )
    sample_tokens: int = option(0, "tokens of a sample that is printed at every evaluation; 0: none", minimum=0)
    sample_prompt: str = option("\n", "prompt of that sample")
    log_interval: int = option(1, "steps between log records", minimum=1)
    log_to: list[str] = option([], "also log to these", choices=SINKS)
    max_log_mb: float | None = option(
        None, "rotate the log at this size, keeping one older part as NAME.1; null: no limit", above=0.0
    )

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps", section="Device and precision")
    dtype: str = option(
        "auto",
        "precision of the matrix products (autocast); auto: bfloat16 or float16 on CUDA, on a CPU bfloat16 where a "
        "short trial gains by it, else float32",
        choices=("auto", *DTYPES),
    )
    sdp_kernel: str = option("auto", "kernel of scaled_dot_product_attention", choices=("auto", *SDP_KERNELS))
    compile: str = option("auto", "torch.compile; auto: on CUDA", choices=("auto", "true", "false"))

    fsdp: bool = option(
        False,
        "train_ddp.py: shard parameters, gradients and optimizer states (FSDP2) instead of replicating them",
        section="Several processes",
    )
    backend: str = option("auto", "torch.distributed backend; auto: nccl on CUDA, gloo elsewhere")
    process_timeout: float = option(10.0, "minutes that a process waits for the others before the job fails", above=0.0)

    use_lora: bool = option(
        False,
        "train a low-rank adapter instead of the weights; from_checkpoint is the base model",
        section="Low-rank adapters (LoRA)",
    )
    lora_rank: int = option(8, "rank of the update", minimum=1)
    lora_alpha: float = option(16.0, "LoRA scaling: the update is multiplied by alpha / rank", above=0.0)
    lora_dropout: float = option(0.0, "dropout rate of the adapter's inputs", minimum=0.0, maximum=0.99)
    lora_targets: list[str] = option(
        [*TARGETS], "layers that get an adapter; up and down: of the MLP, or of every expert", choices=TARGETS
    )

    answer_block: int = option(
        32,
        "answers (if is_causal: all texts) are learnt, and later generated, in blocks of so many tokens",
        minimum=1,
        maximum=1 << 20,
        section="Masked diffusion (loss diffusion)",
    )
    mask_span: int = option(
        1,
        "spans of up to so many tokens are masked as one, of a length drawn per sample; 1: each by itself",
        minimum=1,
        maximum=1 << 20,
    )

    teacher: str = option("", "checkpoint of the teacher", section="Distillation (loss distill)")
    distill_temperature: float = option(2.0, "softmax temperature of teacher and student", above=0.0)
    distill_weight: float = option(
        0.5, "weight of the KL divergence from the teacher; the cross-entropy gets the rest", minimum=0.0, maximum=1.0
    )

    reference: str = option(
        "",
        "dpo, ipo, grpo: checkpoint of the reference policy; empty: from_checkpoint",
        section="Preferences (loss dpo, ipo, simpo, orpo) and rewards (loss grpo)",
    )
    dpo_beta: float = option(
        0.1,
        "dpo, ipo: coefficient of the KL constraint; simpo: scale of the reward; orpo: weight of the odds ratio",
        above=0.0,
    )
    dpo_chosen_weight: float | None = option(
        None, "weight of the chosen answer's cross-entropy; null: 1 for orpo, else 0.2", minimum=0.0
    )
    simpo_gamma: float = option(0.5, "simpo: target reward margin", minimum=0.0)
    grpo_group: int = option(16, "grpo: completions sampled per prompt (group size)", minimum=2, maximum=4096)
    grpo_updates: int = option(
        1, "grpo: optimizer steps per batch of completions (above 1, a resumed run may sample others)", minimum=1
    )
    grpo_clip: float = option(0.2, "grpo: PPO clipping range epsilon", above=0.0, maximum=1.0)
    grpo_beta: float = option(0.01, "grpo: coefficient of the KL penalty against the reference policy", minimum=0.0)

    def resumes(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a checkpoint is to be resumed; one of another stage only gives the initial weights."""
        is_same_kind = ("lora" in checkpoint) == self.use_lora
        return is_same_kind and checkpoint["train_config"].get("stage") == self.stage

    def check(self) -> None:
        if self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr ({self.min_lr:g}) must not be above learning_rate ({self.learning_rate:g}): "
                "--min_lr 0 lowers it"
            )
        if any(sign in self.stage for sign in "/\\"):
            raise UserError(f"stage must be a plain name, got {self.stage!r}")
        if self.use_lora and not self.from_checkpoint:
            raise UserError("use_lora: an adapter needs a trained model: --from_checkpoint names it")
        if self.loss in COMPARES_POLICIES and (self.dropout or self.lora_dropout):
            raise UserError(
                f"loss {self.loss} compares probabilities of two policies, which dropout would fill with noise: "
                "leave dropout and lora_dropout at 0"
            )
        for name in ("teacher", "reference"):  # who names a model means it to be used
            losses = FIELDS_OF_LOSSES[name]
            if getattr(self, name) and self.loss not in losses:
                raise UserError(
                    f"{name} means nothing to loss {self.loss}: --loss {' or '.join(losses)} uses it, "
                    f'--{name} "" leaves it out'
                )
        if self.decay_over == "time" and not self.max_minutes:
            raise UserError("decay_over time: the decay ends when the time does, so say how long: --max_minutes 30")
        if self.on_spike == "rollback" and self.loss == "grpo":
            raise UserError("on_spike: the loss of grpo says nothing of how well a run goes: leave it at none")
        if self.sample_tokens and not self.sample_prompt:
            raise UserError("sample_prompt is empty: a sample continues at least one character")
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_steps or 100_000

    @property
    def eval_samples(self) -> int:
        """Validation samples per evaluation; 0: all."""
        return 100 * self.eval_iters

    @property
    def name(self) -> str:
        """What the run's checkpoints are called: the stage, and whether they are adapters."""
        return self.stage + ("_lora" if self.use_lora else "")

    @property
    def best_path(self) -> Path:
        """<stage>.pt: the checkpoint of the lowest validation loss."""
        return Path(self.save_checkpoint_to) / f"{self.name}.pt"

    @property
    def last_path(self) -> Path:
        """<stage>_last.pt: the newest checkpoint, to resume from."""
        return Path(self.save_checkpoint_to) / f"{self.name}_last.pt"

    def lr_scale(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate at a step (from 0) that begins after so many seconds of training, as a share of the peak."""
        name = self.lr_schedule if self.decay_lr else "constant"
        floor = self.min_lr / self.learning_rate
        if self.decay_over == "time":
            return schedule_over_time(name, step, self.warmup_iters, seconds / (60 * self.max_minutes), floor)
        return schedule(name, step, self.warmup_iters, self.lr_decay_iters, floor)
