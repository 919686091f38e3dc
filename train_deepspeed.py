"""Data-parallel training with DeepSpeed: the loop of train.py with ZeRO and CPU offload, on one host or several.

    deepspeed train_deepspeed.py -t pretrain                            every GPU of this host; config/deepspeed.json
    deepspeed train_deepspeed.py -t pretrain --deepspeed_config config/deepspeed_zero2.json     with ZeRO stage 2
    deepspeed train_deepspeed.py -t pretrain --hostfile=hostfile.txt    several hosts
    python train_deepspeed.py -t pretrain                               one process

ZeRO shards over the processes the optimizer states (stage 1), the gradients too (stage 2), the weights too (stage 3).

The DeepSpeed JSON sets ZeRO, offload and communication; batch sizes, precision, clipping, optimizer and learning rate
are fields of our config, and a JSON that contradicts them is an error (training/deepspeed_settings.py). With ZeRO the
checkpoint to resume from is a folder, checkpoint/<stage>_last, into which every process writes its shard;
checkpoint/<stage>.pt, the best one, is always a single file.
"""

import argparse
import importlib.util
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import train
from base.configuration import Parser, UserError, find_config, read_json, run_main
from layers.experts import mixture_layers
from model import GPT
from text.batches import Batch
from training.deepspeed_launcher import add_launcher_options, relaunch
from training.deepspeed_settings import merge_settings
from training.distributed import DistributedEngine, run_process
from training.engine import Loss
from training.optimizer import make_optimizer, scale_learning_rates
from training.zero_muon import ZeROMuon, place_shards
from weights.checkpointing import MOMENTS, SaveError, finish_sharded, from_torch_state, save_shard, to_torch_state


class DeepSpeedEngine(DistributedEngine):
    """One process of a DeepSpeed job, with its shards of optimizer states, gradients and weights.

    ZeRO: Rajbhandari et al. 2019 (arXiv:1910.02054); ZeRO-Offload: Ren et al. 2021 (arXiv:2101.06840).
    """

    def __init__(self, config: Any, path: Path) -> None:
        if config.on_spike == "rollback":
            raise UserError("on_spike rollback is not supported on DeepSpeed: use train_ddp.py, or leave it at none")
        if config.device.startswith("cpu"):
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would choose the GPU if there is one
        super().__init__(config)
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.path = path
        self.set_dtype(self.dtype)
        self.zero = self.settings["zero_optimization"].get("stage", 0)
        self.writes_shards, self.shards_parameters = self.zero > 0, self.zero == 3
        if self.zero and config.use_lora:
            raise UserError(
                f"use_lora: an adapter is too small to shard (ZeRO stage {self.zero} of {path}): use train_ddp.py, or "
                "--deepspeed_config deepspeed_zero0"
            )
        if self.zero and config.optimizer == "sgd":
            raise UserError(
                f"optimizer sgd with ZeRO stage {self.zero} of {path} is not supported: use --optimizer adamw or muon, "
                "or --deepspeed_config deepspeed_zero0"
            )
        if self.zero and config.optimizer == "muon" and self.dtype == torch.float16:
            raise UserError(
                f"optimizer muon with float16 and ZeRO stage {self.zero} of {path} is not supported, as an overflow "
                "would be noticed by some processes only: use --dtype bfloat16 or float32, or --optimizer adamw"
            )

    def set_dtype(self, dtype: torch.dtype) -> None:
        super().set_dtype(dtype)
        self.settings = merge_settings(read_json(self.path), self.path, self.config, dtype, self.world_size)

    def prepare(self, model: GPT) -> None:
        import deepspeed  # takes seconds: only after all checks

        self.model = model if self.zero == 3 else model.to(self.device)  # stage 3 shards it first
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        weights = {name: p.detach().clone() for name, p in model.named_parameters()} if self.is_half else {}
        self.optimizer = self.make_optimizer(model)
        names = {p: name for name, p in model.named_parameters()}
        # names in the state dict -> parameters by their first name: tied parameters have two
        self.names = {name: names[p] for name, p in model.named_parameters(remove_duplicate=False)}
        self.buffers = sorted(model.state_dict().keys() - self.names.keys())  # saved beside: router biases
        self.groups = [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        if self.use_compile and self.zero == 3 and self.is_main:
            print("compile: not possible with ZeRO stage 3, continuing without", file=sys.stderr)
        deepspeed.utils.set_log_level_from_string("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # about DeepSpeed's code
        try:
            self.network, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.settings)
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"DeepSpeed rejects its settings: {str(error).strip().splitlines()[0]}") from None
        for group in {self.network.data_parallel_group, self.network.seq_data_parallel_group}:
            group.set_timeout(self.timeout)  # DeepSpeed's default is half an hour
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name].to(self.device)  # RoPE's angles stay in float32, also with bf16 and fp16
        for name, p in model.named_parameters():
            if name in weights:
                self.set_full(p, weights[name])  # the float32 master copy starts from the unrounded weights
        if isinstance(self.optimizer, ZeROMuon):
            place_shards(self.network.optimizer, self.optimizer, names, model.config)
        if self.use_compile and self.zero < 3:
            self.network.compile()
        self.sum_over_ranks(0.0)  # a barrier: all ranks have mapped the shared memory
        remove_shared_memory(self.rank)
        zero_scaler = getattr(self.network.optimizer, "torch_autocast_gradscaler", None)
        self.scaler = self.network.torch_autocast_z0_gradscaler or zero_scaler or torch.amp.GradScaler(enabled=False)
        self.seed_dropout()

    @property
    def is_half(self) -> bool:
        """Whether weights are in half precision, with a float32 master copy (DeepSpeed's bf16 and fp16)."""
        return any(self.settings.get(name, {}).get("enabled") for name in ("bf16", "fp16"))

    def make_optimizer(self, model: GPT) -> torch.optim.Optimizer:
        """DeepSpeed's Adam where it is faster (offloaded states, CUDA) and can be compiled; else our own choice."""
        optimizer = make_optimizer(model, self.config, self.device)
        if self.zero and self.config.optimizer == "muon":
            self.settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
            return ZeROMuon(optimizer, self.config, self.device)
        is_offloaded = self.settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        if self.config.optimizer != "adamw" or not (is_offloaded or self.device.type == "cuda"):
            return optimizer
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        try:
            return (DeepSpeedCPUAdam if is_offloaded else FusedAdam)(optimizer.param_groups)
        except Exception as error:  # no compiler, no ninja, no CUDA toolkit: any exception
            self.settings["zero_force_ds_cpu_optimizer"] = False
            if self.is_main:
                print(f"DeepSpeed's Adam cannot be compiled ({type(error).__name__}); using torch's", file=sys.stderr)
            return optimizer

    def forward_backward(self, loss: Loss, batch: Batch, count: float, is_last: bool) -> torch.Tensor:
        batch = batch.to(self.device)
        self.network.set_gradient_accumulation_boundary(is_last)
        share = self.compute_loss(loss, batch, "sum") / count
        # DeepSpeed averages gradients over the ranks, but the ranks' shares of the mean loss must add up: scale up
        self.network.backward(share * self.world_size, scale_wrt_gas=False)
        return share.detach()

    def step(self, lr_scale: float) -> torch.Tensor:
        scale_learning_rates(self.optimizer, lr_scale)
        if self.zero:
            self.network.step()
            return torch.as_tensor(self.network.get_global_grad_norm(), device=self.device)
        self.scaler.unscale_(self.optimizer)  # without ZeRO, DeepSpeed does not report the norm: clip here
        grad_norm = self.clip_gradients(self.config.grad_clip or math.inf)
        if grad_norm.isfinite() or self.scaler.is_enabled():  # a scaler skips bad steps by itself
            self.network.step()
        else:
            self.network.zero_grad()  # skip the step
        return grad_norm

    # -------------------------------------------------------------------------------------------------- checkpoints

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) in the optimizer's order, their moments accessible."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.zero in (1, 2):  # DeepSpeed 0.19 does this too, but before any group except the first has moments
            flats = self.network.optimizer.single_partition_of_fp32_groups
            for group, flat in zip(self.network.optimizer.bit16_groups, flats, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)
        named = dict(self.model.named_parameters())
        for name in (name for group in self.groups for name in group):
            yield name, named[name]

    def optimizer_step(self) -> float:
        """Number of steps that Adam has taken, which its bias correction needs.

        The largest that is found: DeepSpeed's FusedAdam leaves its groups' count at 0, and counts the steps of a whole
        group in the state of its last parameter.
        """
        holders = (*self.optimizer.param_groups, *self.optimizer.state.values())
        return max((float(holder["step"]) for holder in holders if "step" in holder), default=0.0)

    def set_optimizer_step(self, step: float) -> None:
        """Have Adam go on from a number of steps; DeepSpeed's counts in Python numbers, torch's in tensors."""
        for holder in (*self.optimizer.param_groups, *self.optimizer.state.values()):
            if "step" in holder:
                holder["step"] = torch.full_like(holder["step"], step) if torch.is_tensor(holder["step"]) else int(step)

    def moment_names(self, name: str) -> tuple[str, ...]:
        """What the optimizer keeps of a parameter."""
        is_muon = isinstance(self.optimizer, ZeROMuon) and name in self.groups[0]
        return ("momentum",) if is_muon else MOMENTS

    def state_dict(self) -> dict[str, Any]:
        if self.zero == 0:
            state = super().state_dict()
            step, optimizer = self.optimizer_step(), state["optimizer"]
            for index, values in optimizer.get("state", {}).items():
                if "step" in values:  # as torch's AdamW has it: a tensor, for every parameter
                    optimizer["state"][index] = {**values, "step": torch.tensor(step)}
            return state
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights, states = {}, {}
        for name, p in self.parameters():
            full = {"weight": safe_get_full_fp32_param(p)}  # collective: all ranks must call it
            full |= {moment: safe_get_full_optimizer_state(p, moment) for moment in self.moment_names(name)}
            if self.is_main:
                weights[name] = full.pop("weight").cpu()
                states[name] = {key: value.cpu() for key, value in full.items()}
        common = self.common_state()  # collective too
        if not self.is_main:
            return {}
        state = to_torch_state(weights, states, self.names, self.groups, self.optimizer_step())
        state["model"] |= self.saved_buffers()
        return {**common, **state}

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers of the model that belong into a checkpoint; ZeRO does not shard them."""
        return {name: buffer.cpu() for name, buffer in self.model.named_buffers() if name in self.buffers}

    def common_state(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict(), "rng": self.random_states()}

    def save(self, path: Path, values: dict[str, Any]) -> None:
        if path.suffix:  # a file, not the folder of a sharded checkpoint
            super().save(path, values)
            return
        values = {
            **values,
            **self.common_state(),
            "names": self.names,
            "buffers": self.saved_buffers(),
            "groups": self.groups,
            "optimizer_step": self.optimizer_step(),
        }
        shard, failure = {name: self.shard_of(name, p) for name, p in self.parameters()}, None
        try:
            save_shard(path, values["step"], self.rank, self.world_size, shard)
        except SaveError as error:
            failure = error
        (failures,) = self.sum_over_ranks(float(failure is not None))  # also a barrier: every rank has written
        if failures:
            raise failure or SaveError(f"{path}: another process could not write its shard")
        if self.is_main:
            finish_sharded(path, self.world_size, values)

    def shard_of(self, name: str, p: torch.nn.Parameter) -> dict[str, Any]:
        """This rank's shard of a parameter: its start in the flattened full tensor, and flat weights and moments."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        shape, moments = tuple(getattr(p, "ds_shape", p.shape)), self.moment_names(name)
        if self.zero == 3:
            values = safe_get_local_fp32_param(p)
            start = self.rank * values.numel()
            length = max(0, min(values.numel(), math.prod(shape) - start))  # the last shard is padded
            parts = {"weight": values} | {name: safe_get_local_optimizer_state(p, name) for name in moments}
        elif p._hp_mapping is None:  # stages 1 and 2 split the concatenated parameters: this one lies on other ranks
            start = length = 0
            parts = {name: torch.empty(0) for name in ("weight", *moments)}
        else:
            address = p._hp_mapping.lp_fragment_address
            start, length = address.start, address.numel
            parts = {"weight": p._hp_mapping.get_hp_fragment()}
            parts |= {name: p._hp_mapping.get_hp_fragment(name) for name in moments}
        return {"shape": shape, "start": start} | {name: part[:length].cpu().clone() for name, part in parts.items()}

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        if self.zero == 0:
            super().load_state_dict(checkpoint)
            if self.config.optimizer == "adamw" and not isinstance(self.optimizer, torch.optim.AdamW):
                for state in self.optimizer.state.values():
                    state["step"] = int(state["step"])  # DeepSpeed's kernel takes a Python number
            return
        try:
            states, step = from_torch_state(checkpoint["optimizer"], self.groups)
            moments = {name: {m: states[name][m].float() for m in self.moment_names(name)} for name in states}
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(
                f"{self.config.from_checkpoint}: its optimizer states are not those of {self.config.optimizer}"
            ) from None
        # DeepSpeed allocates the moments in the first step: take one with zero gradients and a learning rate of zero
        idx = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.network.set_gradient_accumulation_boundary(True)
        self.network.backward(0.0 * self.network(idx, idx)[1], scale_wrt_gas=False)
        self.step(0.0)
        for name, p in self.parameters():
            for moment, full in moments[name].items():
                self.set_full(p, full, moment)
        self.set_optimizer_step(step)
        for layer in mixture_layers(self.model):
            layer.tokens_per_expert.zero_()  # of that step's token
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.set_random_states(checkpoint["rng"])

    def set_full(self, p: torch.nn.Parameter, full: torch.Tensor, moment: str = "") -> None:
        """Set a parameter's weights, or one of its moments, from the full tensor; this rank keeps its own shard."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        full = full.to(self.device)
        if self.zero == 3:
            size = p.ds_tensor.numel()
            shard = torch.zeros(size, device=self.device)  # zeros pad the last one
            part = full.flatten()[self.rank * size : (self.rank + 1) * size]
            shard[: part.numel()] = part
            safe_set_local_optimizer_state(p, shard, moment) if moment else safe_set_local_fp32_param(p, shard)
        else:
            safe_set_full_optimizer_state(p, full, moment) if moment else safe_set_full_fp32_param(p, full)

    def full_model(self) -> GPT | None:
        if self.zero < 3 and not self.is_half:
            return self.model
        state = self.state_dict()
        if not self.is_main:
            return None
        model = GPT(self.model.config, self.model.sdp_kernel)
        model.load_state_dict(state["model"])
        return model.to(self.device)


def remove_shared_memory(rank: int) -> None:
    """Unlink the shared memory of DeepSpeed's all-reduce on CPUs, which a killed process would leave behind.

    Processes that have mapped it keep it; the system frees it when the last of them ends.
    """
    master = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{master}_{rank}"):
        file.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ command line


def make_parser() -> Parser:
    parser = train.make_parser()
    parser.add_argument("--deepspeed", action="store_true", help="accepted because other scripts need it; always on")
    parser.add_argument(
        "--deepspeed_config",
        metavar="NAME",
        default="deepspeed",
        help="DeepSpeed config: config/NAME.json, or a path [deepspeed]",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # set by the launcher
    add_launcher_options(parser)
    return parser


def main() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install deepspeed, or use train.py or train_ddp.py")
    args, overrides = make_parser().parse()
    sys.argv = [arg for arg in sys.argv if not arg.startswith("--local_rank")]  # added by the launcher
    path = find_config(args.deepspeed_config)
    if args.hostfile and int(os.environ.get("CROSS_SIZE", 1)) == 1:
        if os.environ.get("RANK", "0") == "0":
            relaunch(args, sys.argv[1:])
        return  # rank 0 has restarted the job; the other processes of this host are not needed
    if "RANK" not in os.environ:
        print(f"one process; to start one for every GPU: deepspeed {shlex.join(sys.argv)}", file=sys.stderr)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    run_process(lambda: train.run_command(args, overrides, lambda config: DeepSpeedEngine(config, path)))


if __name__ == "__main__":
    run_main(main)
