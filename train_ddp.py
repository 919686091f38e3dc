"""The training loop of train.py on several processes: the GPUs of one machine, of several, or the cores of a CPU.

    python -m torch.distributed.run --nproc_per_node 4 train_ddp.py -t pretrain                     four GPUs
    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t pretrain   two cores
    torchrun --nnodes 2 --node_rank 0 --master_addr HOST --nproc_per_node 8 train_ddp.py            on each of two hosts
    torchrun --nproc_per_node 4 --max-restarts 3 train_ddp.py   after a crash it goes on from <stage>_last.pt by itself
    torchrun --nproc_per_node 4 train_ddp.py --fsdp true        every process holds a share of the model (FSDP2)

A config says what is trained, not on how many processes: a step sees the same samples on any number of them, and a
checkpoint of one number goes on with another.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import train
from base.configuration import UserError, run_main
from model import GPT
from text.batches import Batch
from training.distributed import GroupEngine, launch
from training.engine import Engine, Loss
from weights.lora import attach, settings_of


class DDPEngine(GroupEngine):
    """One process of several, each with the whole model; their gradients are averaged once a step."""

    launcher = "python -m torch.distributed.run --nproc_per_node N"
    can_shard = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.set_restart(config)

    def set_restart(self, config: Any) -> None:
        """Where torchrun may restart the job: what an earlier job left is set aside, what this one left is taken up."""
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
            return
        last = Path(config.save_checkpoint_to) / f"{config.stage}_last.pt"
        if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0:
            config.from_checkpoint = str(last) if last.is_file() else config.from_checkpoint
        elif self.is_main and last.is_file() and Path(config.from_checkpoint).resolve() != last.resolve():
            os.replace(last, f"{last}.bak")
        dist.barrier()

    def wrap(self, model: GPT) -> torch.nn.Module:
        network = super().wrap(model)
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def synchronising(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward: gradients are exchanged with the step's last micro-batch only."""
        return contextlib.nullcontext() if is_last else self.network.no_sync()

    def forward_backward(self, loss: Loss, batch: Batch, count: float, is_last: bool) -> torch.Tensor:
        with self.synchronising(is_last):  # shares are scaled up, as gradients are averaged and should add up
            share = super().forward_backward(loss, batch, count / self.world_size, is_last)
        return share / self.world_size


class FSDPEngine(DDPEngine):
    """One process of several, each with a share of weights, gradients and optimizer states.

    Fully sharded data parallelism as in Rajbhandari et al. 2019 (arXiv:1910.02054), by torch's fully_shard.
    """

    shards_parameters = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.dtype == torch.float16:
            raise UserError("fsdp does not go with float16 here: set dtype to bfloat16 or float32")

    def prepare(self, model: GPT) -> None:
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        super().prepare(model)

    def wrap(self, model: GPT) -> torch.nn.Module:
        return Engine.wrap(self, model)

    def synchronising(self, is_last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def clip_gradients(self, max_norm: float) -> float:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).full_tensor().item()

    def state_dict(self) -> dict[str, Any]:
        return gathered(super().state_dict())

    def full_model(self) -> GPT | None:
        weights = gathered(self.model.state_dict())
        if not self.is_main:
            return None
        model = GPT(self.model.config, self.model.sdp_kernel)
        if self.config.use_lora:
            attach(model, settings_of(self.config))
        model.load_state_dict(weights)
        return model.to(self.device)

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        super().load_state_dict(checkpoint)
        for optimizer in getattr(self.optimizer, "optimizers", [self.optimizer]):
            for p, state in optimizer.state.items():
                for name, value in state.items():
                    if value.shape == p.shape:  # a moment; others are plain numbers
                        state[name] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def gathered(value: Any) -> Any:
    """A nested dict or list with every sharded tensor made whole, in CPU memory."""
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def main() -> None:
    if "RANK" in os.environ:
        engine = lambda config: (FSDPEngine if config.fsdp else DDPEngine)(config)  # noqa: E731
        launch(lambda: train.run_command(*train.make_parser().parse(), engine))
        return
    print(f"one process; to start several: {DDPEngine.launcher} train_ddp.py", file=sys.stderr)
    train.main()


if __name__ == "__main__":
    run_main(main)
