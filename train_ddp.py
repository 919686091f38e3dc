"""Data-parallel training with torch.distributed, DDP or FSDP: the loop of train.py on many GPUs, or on CPU cores.

    python -m torch.distributed.run --nproc_per_node 4 train_ddp.py -t pretrain                     four GPUs
    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t pretrain   two cores
    torchrun --nnodes 2 --node_rank 0 --master_addr HOST --nproc_per_node 8 train_ddp.py            on each of two hosts
    torchrun --nproc_per_node 4 --max-restarts 3 train_ddp.py   after a crash it resumes from <stage>_last.pt by itself
    torchrun --nproc_per_node 4 train_ddp.py --fsdp true        parameters, gradients and optimizer states are sharded

The global batch does not depend on the number of processes: its micro-batches are divided among the ranks. So the loss
curve is the same on any number of processes, and a run can resume on another number.
"""

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import train
from base.configuration import UserError, run_main
from model import GPT
from text.batches import Batch
from training.distributed import DistributedEngine, check_launcher, run_process
from training.engine import Loss
from weights.checkpointing import find_checkpoint, set_aside
from weights.lora import attach, settings_of


class DDPEngine(DistributedEngine):
    """Distributed data parallelism: every process has a replica of the model; gradients are all-reduced once a step."""

    can_shard = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.resume_after_restart(config)

    def resume_after_restart(self, config: Any) -> None:
        """torchrun --max-restarts: a restarted job resumes from its last checkpoint; an older job's is renamed."""
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
            return
        last, is_restart = config.last_path, int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
        (n_found,) = self.sum_over_ranks(float(last.is_file()))
        if is_restart and n_found not in (0, self.world_size):
            raise UserError(f"{last}: not on all hosts: a job that restarts by itself needs a shared folder")
        if is_restart and n_found:
            config.from_checkpoint = str(last)
        elif not is_restart and n_found:
            self.together(lambda: self.set_earlier_aside(last, config.from_checkpoint))

    def set_earlier_aside(self, last: Path, start: str) -> None:
        """Rename an earlier job's last checkpoint, unless this one starts from it."""
        if self.is_main and last.is_file() and find_checkpoint(start).resolve() != last.resolve():
            print(f"{last}: of an earlier run, kept as {set_aside(last).name}")

    def wrap(self, model: GPT) -> torch.nn.Module:
        network = super().wrap(model)
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Gradient accumulation: the all-reduce is needed only once, in the backward pass of the last micro-batch."""
        return contextlib.nullcontext() if is_last else self.network.no_sync()

    def forward_backward(self, loss: Loss, batch: Batch, count: float, is_last: bool) -> torch.Tensor:
        # DDP averages gradients over the ranks, but the ranks' shares of the mean loss must add up: times world_size
        with self.gradient_sync(is_last):
            share = super().forward_backward(loss, batch, count / self.world_size, is_last)
        return share / self.world_size


class FSDPEngine(DDPEngine):
    """Fully sharded data parallelism: every process holds a shard of weights, gradients and optimizer states.

    As in ZeRO stage 3 (Rajbhandari et al. 2019, arXiv:1910.02054), by torch's fully_shard (FSDP2): each block's weights
    are all-gathered just before they are used, and its gradients are reduce-scattered.
    """

    shards_parameters = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.dtype == torch.float16:
            raise UserError("fsdp does not support float16 here: set dtype to bfloat16 or float32")

    def prepare(self, model: GPT) -> None:
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        # Blocks are gathered in the precision of their products: half the bytes to send, and nothing left to cast.
        # Gradients are summed in float32; embedding, residual stream and output layer stay in float32, as without FSDP.
        blocks = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        for block in [*model.blocks, *model.future]:
            fully_shard(block, mesh=mesh, mp_policy=blocks)
        fully_shard(model, mesh=mesh)
        super().prepare(model)

    def wrap(self, model: GPT) -> torch.nn.Module:
        self.compile()
        if self.use_compile:  # block by block, for the hooks around them, by which fully_shard communicates, cannot be
            for block in [*model.blocks, *model.future]:
                block.forward = torch.compile(block.forward)
            model.use_flex = False  # which is for a model that is compiled as a whole
        return model  # no DDP around it

    def stop_compiling(self, error: Exception) -> None:
        super().stop_compiling(error)
        for block in [*self.model.blocks, *self.model.future]:
            block.__dict__.pop("forward", None)  # that of the class again

    def gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)  # a DTensor of partial norms
        return norm.full_tensor()

    def state_dict(self) -> dict[str, Any]:
        return full_tensors(super().state_dict())

    def full_model(self) -> GPT | None:
        weights = full_tensors(self.model.state_dict())
        if not self.is_main:
            return None
        model = GPT(self.model.config, self.model.sdp_kernel)
        if self.config.use_lora:
            attach(model, settings_of(self.config))
        model.load_state_dict(weights)
        return model.to(self.device)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, p in self.model.state_dict().items():
            if name in weights:  # (with LoRA, only the adapter is)
                full = weights[name].to(p.device)
                is_shard = isinstance(p, DTensor)
                p.copy_(distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None) if is_shard else full)

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        super().load_state_dict(checkpoint)
        for optimizer in getattr(self.optimizer, "optimizers", [self.optimizer]):
            for p, state in optimizer.state.items():
                for name, value in state.items():
                    if value.shape == p.shape:  # a moment; `step` is a scalar
                        state[name] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def full_tensors(value: Any) -> Any:
    """A nested dict or list with every sharded tensor (DTensor) replaced by the full tensor, on the CPU."""
    if isinstance(value, dict):
        return {key: full_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [full_tensors(item) for item in value]
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def main() -> None:
    check_launcher(sys.argv[1:], is_parallel=True)
    if "RANK" in os.environ:
        engine = lambda config: (FSDPEngine if config.fsdp else DDPEngine)(config)  # noqa: E731
        run_process(lambda: train.run_command(*train.make_parser().parse(), engine))
        return
    several = "python -m torch.distributed.run --nproc_per_node N"
    print(f"one process; to start several: {several} {shlex.join(sys.argv)}", file=sys.stderr)
    train.main()


if __name__ == "__main__":
    run_main(main)
