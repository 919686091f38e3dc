"""The engine: how one training step runs on the hardware. This one is for one process on one device.

    engine.prepare(model)                                   # to the device, with its optimizer
    for batch in micro_batches:                             # gradient accumulation
        engine.forward_backward(loss, batch, count, is_last)
    grad_norm = engine.step(lr_scale)                       # clip, update, zero the gradients

The loop in train.py is the same on every engine: engines for several processes (train_ddp.py, train_deepspeed.py)
override how gradients, sums and state dicts are combined over processes.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError
from base.devices import find_device, find_dtype, peak_memory
from model import GPT
from text.batches import Batch
from training.optimizer import make_optimizer, scale_learning_rates
from weights.checkpointing import save_checkpoint
from weights.lora import adapter_weights

# of the compiler, not of the model; the second: a function was compiled anew for too many different inputs
COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)
Loss = Callable[[torch.nn.Module, Batch, str], torch.Tensor]  # (model, batch, reduction), see losses.py


class Engine:
    """One process, one device. config: a TrainConfig (device, dtype, compile, random_seed, grad_clip, optimizer's)."""

    rank, world_size, local_rank = 0, 1, 0  # local_rank: among the processes of this host
    launcher = "python"  # the command that starts a script on this engine
    can_shard = False  # supports the config field fsdp
    shards_parameters = False  # no process holds all parameters: FSDP, ZeRO stage 3
    writes_shards = False  # <stage>_last is a folder with one shard per process, not a file

    def __init__(self, config: Any) -> None:
        if config.fsdp and not self.can_shard:
            raise UserError("fsdp shards a model over processes: start train_ddp.py with torch.distributed.run")
        self.config = config
        self.device = self.choose_device(config.device)
        self.dtype = find_dtype(config.dtype, self.device)
        self.memory_before = peak_memory(self.device)  # what Python and torch take, before there is a model
        self.compiled: list[torch.nn.Module] = []
        self.use_compile = config.compile == "true" or (config.compile == "auto" and self.device.type == "cuda")
        torch.manual_seed(config.random_seed)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 on tensor cores: faster, with 10 bits of mantissa

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def choose_device(self, name: str) -> torch.device:
        return find_device(name)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """The precision that dtype auto turned out to mean for this model, before prepare()."""
        self.dtype = dtype

    def peak_memory(self) -> float:
        """The most memory in bytes that training has taken so far in this process, beside Python and torch, or nan."""
        return peak_memory(self.device) - self.memory_before

    def prepare(self, model: GPT) -> None:
        """Move the model to the device, make its optimizer, and wrap it for training."""
        self.model = model.to(self.device)
        self.optimizer = make_optimizer(self.model, self.config, self.device)
        # loss scaling (Micikevicius et al. 2017, arXiv:1710.03740): small gradients underflow to 0 in float16, so the
        # loss is scaled up, and the gradients down again before the step; bfloat16 has float32's range: no need
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.network = self.wrap(self.model)

    def wrap(self, model: GPT) -> torch.nn.Module:
        """The module that training calls: the model, compiled if config.compile says so and a compiler works here."""
        self.compile(model)
        return model

    def compile(self, *modules: torch.nn.Module) -> None:
        """Compile modules that a loss calls, in place, at their first call; without a compiler, say so and go on."""
        if not self.use_compile:
            return
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=self.device))
            # instead of running uncompiled without a word once a function has been compiled too often
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            for module in modules:
                module.compile()
                self.compiled.append(module)
        except Exception as error:  # no C compiler, no triton, an unsupported platform: the type varies
            self.stop_compiling(error)

    def stop_compiling(self, error: Exception) -> None:
        """Go on with uncompiled models, and say so in one line."""
        if self.is_main:
            print(f"compile: not possible here ({type(error).__name__}); continuing without", file=sys.stderr)
        self.use_compile = False
        for module in self.compiled:
            module._compiled_call_impl = None

    def compute_loss(self, loss: Loss, batch: Batch, reduction: str) -> torch.Tensor:
        """The loss of a batch on the network, in the precision of training."""
        with self.autocast():
            if self.use_compile:
                try:
                    return loss(self.network, batch, reduction)
                except COMPILER_ERRORS as error:
                    self.stop_compiling(error)
            return loss(self.network, batch, reduction)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision: matrix products run in self.dtype, the weights stay in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """For forward passes beside the training step: its precision, but no graphs for shapes that vary freely."""
        with torch.compiler.set_stance("force_eager"), self.autocast():
            yield

    def forward_backward(self, loss: Loss, batch: Batch, count: float, is_last: bool) -> torch.Tensor:
        """Accumulate the gradient of a micro-batch; returns its part of the step's mean loss.

        count: number of targets in the loss of the whole step, on all processes. Sums over one common count add up to
        the exact mean, however unevenly targets are spread. is_last: the step's last micro-batch on this process.
        """
        batch = batch.to(self.device)
        part = self.compute_loss(loss, batch, "sum") / count
        self.scaler.scale(part).backward()  # adds to .grad, which step() sets to zero
        return part.detach()

    def step(self, lr_scale: float) -> torch.Tensor:
        """Clip the gradients and update the weights, unless the gradient norm, which is returned, is not finite."""
        scale_learning_rates(self.optimizer, lr_scale)
        self.scaler.unscale_(self.optimizer)  # the norm to clip by is that of the true gradients
        max_norm = self.config.grad_clip or math.inf
        grad_norm = self.clip_gradients(max_norm)
        if self.device.type != "mps" and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # a fused kernel decides by itself whether to step: to read the norm here would be to wait for the GPU
            self.optimizer.found_inf = (~grad_norm.isfinite()).float()
            self.optimizer.step()
        elif grad_norm.isfinite():
            self.optimizer.step()
        self.scaler.update()  # lowers the scale after an overflow
        self.optimizer.zero_grad()
        return grad_norm

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their joint norm is at most max_norm; returns the norm before.

        Pascanu et al. 2012 (arXiv:1211.5063): one bad batch cannot throw the weights far off.
        """
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Every value summed over all processes (all-reduce)."""
        return list(values)

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor summed over all processes, on its device: nothing waits for the sum."""
        return tensor

    def together(self, work: Callable[[], Any]) -> Any:
        """The result of work(); where it fails on some process, all of them end here, and none waits for another."""
        result, failure = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
        (failures,) = self.sum_over_ranks(float(failure is not None))
        if failures:
            raise failure or UserError("another process cannot go on: its message says why")
        return result

    def state_dict(self) -> dict[str, Any]:
        """Full (unsharded) weights, optimizer state and random states, for the checkpoint."""
        weights = self.model.state_dict()
        return {
            "model": adapter_weights(weights) if self.config.use_lora else weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.random_states(),
        }

    def save(self, path: Path, values: dict[str, Any]) -> None:
        """Write a checkpoint of the engine's state and `values` (configs, step, tokenizer, ...)."""
        state = self.state_dict()
        if self.is_main:
            save_checkpoint(path, {**state, **values})

    def full_model(self) -> GPT | None:
        """The unsharded model, for sampling; where it must be gathered, None on all processes but the main one."""
        return self.model

    def random_states(self) -> dict[str, Any]:
        """States of the random number generators (of dropout) by device type, so that a resumed run is exact."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return states

    def set_random_states(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)
        elif self.device.type == "mps" and "mps" in states:
            torch.mps.set_rng_state(states["mps"])

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace the weights of the model in training by full (unsharded) ones; with LoRA, those of the adapter."""
        self.model.load_state_dict(weights, strict=not self.config.use_lora)

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Restore optimizer and random states; the weights are loaded when the model is built."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(values)  # learning rate, weight decay etc. are this run's, not the checkpoint's
            place_steps(self.optimizer)
        except (ValueError, KeyError):
            raise UserError(
                f"{self.config.from_checkpoint}: damaged: the optimizer state does not match the model"
            ) from None
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.set_random_states(checkpoint["rng"])


def place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move Adam's step counts to the devices of their parameters, where a fused kernel wants them.

    torch does so only if the checkpoint's groups say fused; those of a ZeRO checkpoint, or of a CPU without it, do not.
    """
    for part in getattr(optimizer, "optimizers", [optimizer]):
        for group in part.param_groups:
            for p in group["params"] if group.get("fused") else ():
                step = part.state.get(p, {}).get("step")
                if torch.is_tensor(step):
                    part.state[p]["step"] = step.to(p.device)
