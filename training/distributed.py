"""What training on several processes needs, whoever starts them: torch.distributed.run or DeepSpeed's launcher."""

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from base.configuration import UserError
from model import GPT
from training.engine import Engine


class GroupEngine(Engine):
    """One process of a group; RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR are in the environment."""

    def __init__(self, config: Any) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        check_accumulation(config.gradient_accumulation_steps, self.world_size)
        super().__init__(config)
        backend = config.backend if config.backend != "auto" else "nccl" if self.device.type == "cuda" else "gloo"
        if not dist.is_backend_available(backend):
            raise UserError(f"backend {backend!r} is not in this build of torch; use gloo, or nccl on CUDA")
        self.timeout = datetime.timedelta(minutes=config.process_timeout)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=self.timeout))
        # torchrun hands a restarted job the same store, with the addresses of the processes that are dead
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=self.timeout)

    def choose_device(self, name: str) -> torch.device:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = super().choose_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def prepare(self, model: GPT) -> None:
        super().prepare(model)
        self.seed_dropout()

    def seed_dropout(self) -> None:
        """Another one on every process; to be called when all have made the same weights."""
        if self.rank > 0:
            torch.manual_seed(self.config.random_seed + self.rank)

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


def check_accumulation(accumulation_steps: int, world_size: int) -> None:
    """Raises UserError unless the micro-batches of a step can be shared out equally."""
    if accumulation_steps % world_size:
        below = accumulation_steps - accumulation_steps % world_size
        nearest = " or ".join(str(value) for value in (below, below + world_size) if value)
        raise UserError(
            f"gradient_accumulation_steps ({accumulation_steps}) cannot be shared out over {world_size} processes: "
            f"set it to {nearest} (batch_size times this is the global batch)"
        )


def is_communication_error(error: RuntimeError) -> bool:
    """Whether an error of torch's comes from the processes' talking to each other."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


def launch(work: Callable[[], None]) -> None:
    """Do this process's share of a job's work; explains lost contact, and says which process met an error."""
    rank = int(os.environ["RANK"])
    try:
        work()
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"process {rank} lost contact with the others: one died or hangs, or the network is down ({first_line}); "
            "a restart continues from the last checkpoint"
        ) from None
    except UserError as error:
        if rank == 0:
            raise
        raise UserError(f"process {rank}: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
