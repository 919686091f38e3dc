"""The fields of a training config: config/NAME.json, or --field value on the command line."""

from dataclasses import dataclass

from base.configuration import Config, UserError, option
from model import SDP_KERNELS
from training.engine import DTYPES
from training.losses import LOSSES
from training.optimizer import OPTIMIZERS, SCHEDULES, schedule
from training.run_log import SINKS
from weights.lora import TARGETS


@dataclass
class TrainConfig(Config):
    """How the network is trained."""

    stage: str = option("", "name of the checkpoints this run writes; empty: the config file's name")
    loss: str = option("next_token", "what is minimised", choices=LOSSES)
    teacher: str = option("", "distill: checkpoint of the model to learn from")
    distill_temperature: float = option(2.0, "distill: softens the probabilities of both", above=0.0)
    distill_weight: float = option(0.5, "distill: share of the teacher in the loss", minimum=0.0, maximum=1.0)
    reference: str = option("", "dpo, ipo, grpo: checkpoint to measure from; empty: from_checkpoint")
    dpo_chosen_weight: float | None = option(
        None, "weight of the chosen answer's own cross-entropy; null: 1 for orpo, else 0.2", minimum=0.0
    )
    grpo_group: int = option(16, "grpo: answers drawn to each prompt", minimum=2, maximum=4096)
    grpo_updates: int = option(1, "grpo: steps on the same answers (above 1, going on may draw others)", minimum=1)
    grpo_clip: float = option(0.2, "grpo: how far a step may change a probability", above=0.0, maximum=1.0)
    grpo_beta: float = option(0.01, "grpo: how dear it is to leave the reference", minimum=0.0)
    dpo_beta: float = option(
        0.1, "dpo, ipo: how dear it is to leave the reference; simpo: steepness; orpo: weight", above=0.0
    )
    simpo_gamma: float = option(0.5, "simpo: what beta times the margin is to exceed", minimum=0.0)
    from_checkpoint: str = option("", "checkpoint to start from; of the same stage: continues that run")
    save_checkpoint_to: str = option("checkpoint", "folder of the checkpoints")
    dataset_path: list[list[str]] = option(
        [], "[[train file, validation file], ...], in order: a curriculum; empty: dataset/<stage>_{train,val}.bin"
    )
    tokenizer_path: str = option("dataset/tokenizer.json", "tokenizer that the data was prepared with")
    overlong: str = option("drop", "samples longer than block_size + 1 tokens", choices=("drop", "cut"))
    restart_positions: bool = option(True, "documents and packed samples begin at position 0 each (RoPE: no matter)")
    mask_documents: bool = option(False, "attention stays inside a document (<|bos|> ... <|eos|>) of running text")
    pack_samples: bool = option(False, "fine-tuning: several samples in a row, blind to each other, instead of padding")
    random_seed: int = option(1337, "seed of weights, data order and dropout", minimum=0, maximum=2**31)
    batch_size: int = option(100, "samples per micro-batch", minimum=1, maximum=1 << 20)
    gradient_accumulation_steps: int = option(
        4, "micro-batches per step, over all processes", minimum=1, maximum=1 << 20
    )
    optimizer: str = option("adamw", "optimizer", choices=OPTIMIZERS)
    use_lora: bool = option(
        False, "train a low-rank adapter (LoRA) instead of the weights; from_checkpoint is its base"
    )
    lora_rank: int = option(8, "rank of the adapter's matrices", minimum=1)
    lora_alpha: float = option(16.0, "the adapter counts alpha / rank times", above=0.0)
    lora_dropout: float = option(0.0, "dropout rate of the adapter's inputs", minimum=0.0, maximum=0.99)
    lora_targets: list[str] = option(
        [*TARGETS], "layers that get an adapter; up and down are the MLP's, or its experts'", choices=TARGETS
    )
    learning_rate: float = option(6e-4, "peak learning rate", above=0.0)
    min_lr: float = option(6e-5, "learning rate at the end of the decay", minimum=0.0)
    muon_learning_rate: float = option(0.02, "peak learning rate of muon's matrices", above=0.0)
    muon_momentum: float = option(0.95, "momentum of muon", minimum=0.0, maximum=0.999)
    weight_decay: float = option(0.1, "weight decay, on matrices only", minimum=0.0)
    beta1: float = option(0.9, "first moment's decay (adamw), momentum (sgd)", minimum=0.0, maximum=0.9999)
    beta2: float = option(0.99, "second moment's decay (adamw)", minimum=0.0, maximum=0.99999)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", minimum=0.0)
    decay_lr: bool = option(True, "follow lr_schedule; false: constant after the warm-up")
    lr_schedule: str = option("cosine", "shape of the decay", choices=SCHEDULES)
    warmup_iters: int = option(300, "steps of linear warm-up", minimum=0)
    lr_decay_iters: int | None = option(None, "step at which the decay ends; null: max_steps, or 100000", minimum=1)
    dropout: float | None = option(None, "dropout rate while training; null: the model's", minimum=0.0, maximum=0.99)
    max_steps: int | None = option(None, "stop after this many steps in all; null: no limit", minimum=1)
    max_minutes: float | None = option(None, "stop after this long; null: no limit", above=0.0)
    patience: int | None = option(None, "stop after this many evaluations without gain; null: never", minimum=1)
    target_val_loss: float | None = option(None, "stop at a validation loss this low; null: never", above=0.0)
    eval_interval: int = option(100, "steps between evaluations", minimum=1)
    eval_iters: int = option(5, "batches per evaluation; 0: all the validation data", minimum=0)
    sample_tokens: int = option(0, "tokens of a sample printed at evaluations", minimum=0)
    sample_prompt: str = option("\n", "what that sample continues")
    max_skipped_steps: int = option(20, "steps in a row without a finite gradient that are skipped", minimum=0)
    log_interval: int = option(1, "steps between log records", minimum=1)
    save_interval: int = option(1000, "steps between saves of <stage>_last.pt", minimum=1)
    stop_on_failed_save: bool = option(False, "end the run when a checkpoint cannot be written (a full disk)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "precision of the matrix products", choices=("auto", *DTYPES))
    sdp_kernel: str = option("auto", "attention kernel", choices=("auto", *SDP_KERNELS))
    compile: str = option("auto", "torch.compile; auto: on CUDA", choices=("auto", "true", "false"))
    backend: str = option("auto", "communication between processes; auto: nccl on CUDA, gloo elsewhere")
    process_timeout: float = option(10.0, "minutes that processes wait for one another before all give up", above=0.0)
    fsdp: bool = option(False, "train_ddp.py: each process holds a share of the model instead of a copy")
    log_to: list[str] = option([], "also log to these", choices=SINKS)
    max_log_mb: float | None = option(
        None, "size at which the log begins anew, keeping one NAME.1; null: any", above=0.0
    )

    def check(self) -> None:
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr ({self.min_lr:g}) must not be above learning_rate ({self.learning_rate:g})")
        if any(sign in self.stage for sign in "/\\"):
            raise UserError(f"stage must be a plain name, got {self.stage!r}")
        if self.use_lora and not self.from_checkpoint:
            raise UserError("use_lora: an adapter needs a trained model: --from_checkpoint names it")
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_steps or 100_000

    def lr_scale(self, step: int) -> float:
        """Share of the peak learning rate at a step, from 0."""
        name = self.lr_schedule if self.decay_lr else "constant"
        floor = self.min_lr / self.learning_rate
        return schedule(name, step, self.warmup_iters, self.lr_decay_iters, floor)
