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
import datetime
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
from batches import Batch
from configuration import UserError, run
from engine import Engine, Loss
from model import GPT


class DDPEngine(Engine):
    """One process of several, each with the whole model; their gradients are averaged once a step."""

    command = "python -m torch.distributed.run --nproc_per_node N train_ddp.py"
    can_shard = True

    def __init__(self, config: Any) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        check_accumulation(config.gradient_accumulation_steps, self.world_size)
        super().__init__(config)
        backend = config.backend if config.backend != "auto" else "nccl" if self.device.type == "cuda" else "gloo"
        if not dist.is_backend_available(backend):
            raise UserError(f"backend {backend!r} is not in this build of torch; use gloo, or nccl on CUDA")
        timeout = datetime.timedelta(minutes=config.process_timeout)
        dist.init_process_group(backend, timeout=timeout)
        self.set_restart(config)

    def choose_device(self, name: str) -> torch.device:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = super().choose_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

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

    def prepare(self, model: GPT) -> None:
        super().prepare(model)
        if self.rank > 0:
            torch.manual_seed(self.config.random_seed + self.rank)  # another dropout on every process

    def wrap(self, model: GPT) -> torch.nn.Module:
        network = super().wrap(model)
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def synchronising(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward: gradients are exchanged with the step's last micro-batch only."""
        return contextlib.nullcontext() if is_last else self.network.no_sync()

    def forward_backward(self, loss: Loss, batch: Batch, count: float, is_last: bool) -> torch.Tensor:
        with self.synchronising(
            is_last
        ):  # shares are scaled up, because gradients are averaged where they should add up
            share = super().forward_backward(loss, batch, count / self.world_size, is_last)
        return share / self.world_size

    def sum_over_ranks(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def random_states(self) -> dict[str, Any]:
        """Of every process, so that a run on as many goes on exactly as it would have."""
        states = {}
        for name, state in super().random_states().items():
            parts = [torch.empty_like(state, device=self.device) for _ in range(self.world_size)]
            dist.all_gather(parts, state.to(self.device))
            states |= {name: parts[0].cpu(), f"{name}_of_ranks": [part.cpu() for part in parts]}
        return states

    def set_random_states(self, states: dict[str, Any]) -> None:
        of_ranks = {name: states.get(f"{name}_of_ranks", []) for name in ("cpu", "cuda")}
        if self.rank == 0 or len(of_ranks["cpu"]) == self.world_size:
            super().set_random_states({name: parts[self.rank] for name, parts in of_ranks.items() if parts} or states)


class FSDPEngine(DDPEngine):
    """One process of several, each with a share of weights, gradients and optimizer states.

    Fully sharded data parallelism as in Rajbhandari et al. 2019 (arXiv:1910.02054), by torch's fully_shard.
    """

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

    def whole_model(self) -> GPT | None:
        weights = gathered(self.model.state_dict())
        if not self.is_main:
            return None
        model = GPT(self.model.config, self.model.sdp_kernel)
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


def check_accumulation(accumulation_steps: int, world_size: int) -> None:
    """Raises UserError unless the micro-batches of a step can be shared out equally."""
    if accumulation_steps % world_size:
        below = accumulation_steps - accumulation_steps % world_size
        nearest = " or ".join(str(value) for value in (below, below + world_size) if value)
        raise UserError(
            f"gradient_accumulation_steps ({accumulation_steps}) cannot be shared out over {world_size} processes: "
            f"set it to {nearest} (batch_size times this is the global batch)"
        )


def has_lost_contact(error: RuntimeError) -> bool:
    """Whether an error of torch's comes from the processes' talking to each other."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


def launch(engines: dict[bool, type[Engine]]) -> None:
    """Run the loop on one of the engines, by whether fsdp is asked for; explains lost contact, names the process."""
    rank = int(os.environ["RANK"])
    try:
        train.train_stage(*train.make_parser().parse(), lambda config: engines[config.fsdp](config))
    except RuntimeError as error:
        if not has_lost_contact(error):
            raise
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"process {rank} lost contact with the others: one died or hangs, or the network is down ({first_line}); "
            "a restart continues from <stage>_last.pt"
        ) from None
    except UserError as error:
        if rank == 0:
            raise
        raise UserError(f"process {rank}: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ:
        launch({False: DDPEngine, True: FSDPEngine})
        return
    print(f"one process; to start several: {DDPEngine.command}", file=sys.stderr)
    train.main()


if __name__ == "__main__":
    run(main)
