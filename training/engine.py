"""How one training step runs on the hardware: the plain engine, for one process on one device.

The loop in train.py asks an engine for gradients, sums and state dicts, and never for a rank. Engines for several
processes override how these are brought together (train_ddp.py, train_deepspeed.py).
"""

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError
from base.devices import find_device, find_dtype
from model import GPT
from text.batches import Batch
from training.optimizer import make_optimizer, scale_learning_rates
from weights.checkpointing import save_checkpoint
from weights.lora import adapter_weights

Loss = Callable[[torch.nn.Module, Batch, str], torch.Tensor]


class Engine:
    """One process, one device. config: a TrainConfig (device, dtype, compile, random_seed, grad_clip, optimizer's)."""

    rank, world_size = 0, 1
    launcher = "python"  # what the command line begins with, before the script's name
    can_shard = False
    shards_parameters = False  # between passes no process has the whole model
    writes_shards = False  # <stage>_last is a folder of every process's share, not a file

    def __init__(self, config: Any) -> None:
        if config.fsdp and not self.can_shard:
            raise UserError("fsdp shards a model over processes: start train_ddp.py with torch.distributed.run")
        self.config = config
        self.device = self.choose_device(config.device)
        self.dtype = find_dtype(config.dtype, self.device)
        self.use_compile = config.compile == "true" or (config.compile == "auto" and self.device.type == "cuda")
        torch.manual_seed(config.random_seed)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def choose_device(self, name: str) -> torch.device:
        return find_device(name)

    def prepare(self, model: GPT) -> None:
        """Put the model on the device and make its optimizer."""
        self.model = model.to(self.device)
        self.optimizer = make_optimizer(self.model, self.config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.network = self.wrap(self.model)

    def wrap(self, model: GPT) -> torch.nn.Module:
        """The module to call in training: the model, compiled where that is asked for and works."""
        if self.use_compile:
            try:
                torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=self.device))
                return torch.compile(model)
            except Exception as error:  # no compiler, no triton, an unknown platform: all end here
                print(f"compile: not possible here ({type(error).__name__}); going on without", file=sys.stderr)
                self.use_compile = False
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def forward_backward(self, loss: Loss, batch: Batch, count: float, is_last: bool) -> torch.Tensor:
        """Add the gradient of a micro-batch's share of the step's mean loss; returns that share.

        count: targets that count in the whole step. is_last: the step's last micro-batch on this process.
        """
        batch = batch.to(self.device)
        with self.autocast():
            share = loss(self.network, batch, "sum") / count
        self.scaler.scale(share).backward()
        return share.detach()

    def step(self, lr_scale: float) -> float:
        """Clip the gradient and take the optimizer's step; returns the gradient's norm (not finite: nothing moves)."""
        scale_learning_rates(self.optimizer, lr_scale)
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.grad_clip or math.inf
        grad_norm = self.clip_gradients(max_norm)
        if math.isfinite(grad_norm):
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        return grad_norm

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to max_norm; returns the norm that they had."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).item()

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        return list(values)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and random states, whole, for the checkpoint."""
        weights = self.model.state_dict()
        return {
            "model": adapter_weights(weights) if self.config.use_lora else weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.random_states(),
        }

    def save(self, path: Path, values: dict[str, Any]) -> None:
        """Write a checkpoint: the engine's state and the run's values."""
        state = self.state_dict()
        if self.is_main:
            save_checkpoint(path, {**state, **values})

    def full_model(self) -> GPT | None:
        """The model on one device, for sampling; None on all processes but the main one where that takes a copy."""
        return self.model

    def random_states(self) -> dict[str, Any]:
        """States of the random number generators, by kind of device."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_random_states(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Take over optimizer and random states; the weights are the model's already."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(values)  # rates and decays are this run's, not the checkpoint's
        except (ValueError, KeyError):
            raise UserError(
                f"{self.config.from_checkpoint}: its optimizer states do not fit the model: damaged"
            ) from None
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.set_random_states(checkpoint["rng"])
