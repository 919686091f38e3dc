"""Training on several processes: the base of the engines in train_ddp.py and train_deepspeed.py.

The launcher (torchrun or deepspeed) starts WORLD_SIZE processes and sets environment variables in each: its RANK among
all, its LOCAL_RANK on its host, and where the process of rank 0 listens (MASTER_ADDR, MASTER_PORT). Rank 0 is the main
process: it writes the log and the checkpoints.
"""

import datetime
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from base.configuration import UserError, command_line
from model import GPT
from training.engine import Engine


class DistributedEngine(Engine):
    """An engine in a torch.distributed process group: one process, one device."""

    def __init__(self, config: Any) -> None:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        self.rank, self.world_size, self.local_rank = (int(os.environ[name]) for name in names)
        check_accumulation(config.gradient_accumulation_steps, self.world_size)
        super().__init__(config)
        backend = config.backend if config.backend != "auto" else "nccl" if self.device.type == "cuda" else "gloo"
        if not dist.is_backend_available(backend):
            raise UserError(f"backend {backend!r} is not in this build of torch; use gloo, or nccl on CUDA")
        self.launcher = launcher_command()
        self.timeout = datetime.timedelta(minutes=config.process_timeout)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=self.timeout))
        # after a restart torchrun reuses its store, with the addresses of dead processes in it: one prefix per attempt
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=self.timeout)
        # Python's numbers are summed on the CPUs: over NCCL, the sum would be read after all that the GPU has yet to do
        self.host_group = dist.new_group(backend="gloo", timeout=self.timeout) if backend == "nccl" else None

    def choose_device(self, name: str) -> torch.device:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{self.local_rank}"
        device = super().choose_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def prepare(self, model: GPT) -> None:
        super().prepare(model)
        self.seed_dropout()

    def seed_dropout(self) -> None:
        """A different seed per rank, for different dropout masks; called once all have the same initial weights."""
        if self.rank > 0:
            torch.manual_seed(self.config.random_seed + self.rank)

    def sum_over_ranks(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.host_group)
        return sums.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def random_states(self) -> dict[str, Any]:
        """States of all ranks, so that a run resumed on the same number of processes is exact."""
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


def launcher_command() -> str:
    """The beginning of the command that started this process, as its launcher's variables tell of it."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        parts = ["python -m torch.distributed.run"]
        is_static = env["TORCHELASTIC_RUN_ID"] == "none"  # it was given where the first process listens
        if env["GROUP_WORLD_SIZE"] == "1" and not is_static:
            parts += ["--standalone"]
        elif env["GROUP_WORLD_SIZE"] == "1" and env["MASTER_PORT"] != "29500":
            parts += [f"--master_port {env['MASTER_PORT']}"]
        elif env["GROUP_WORLD_SIZE"] != "1":  # on every host, with its own node_rank
            parts += [f"--nnodes {env['GROUP_WORLD_SIZE']} --node_rank {env['GROUP_RANK']}"]
            parts += [f"--master_addr {env['MASTER_ADDR']} --master_port {env['MASTER_PORT']}"]
        if env["TORCHELASTIC_MAX_RESTARTS"] != "0":
            parts += [f"--max-restarts {env['TORCHELASTIC_MAX_RESTARTS']}"]
        return " ".join([*parts, f"--nproc_per_node {env['LOCAL_WORLD_SIZE']}"])
    if "CROSS_SIZE" in env:
        return "deepspeed " + ("--hostfile HOSTFILE" if env["CROSS_SIZE"] != "1" else f"--num_gpus {env['LOCAL_SIZE']}")
    return "python"


def check_launcher(arguments: list[str] | None, is_parallel: bool = False) -> None:
    """End a script that is not for the launcher that has started it; the first process names the one that is.

    arguments: those with which the other script does the same; None: it cannot, and this one goes without a launcher.
    is_parallel: the script is torch.distributed.run's.
    """
    is_deepspeed = any(argument.startswith("--local_rank") for argument in sys.argv)  # which DeepSpeed's launcher adds
    if not is_deepspeed and (is_parallel or os.environ.get("WORLD_SIZE", "1") == "1"):
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)  # until the launcher ends it, as the first one has ended, after it could say why
        sys.exit(1)
    own = Path(sys.argv[0])
    if arguments is None:
        arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
        raise UserError(
            f"this takes one process: run {own.name} without a launcher: `{command_line(own.name, *arguments)}`"
        )
    script = own.with_name("train_deepspeed.py" if is_deepspeed else "train_ddp.py")
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    command = f"{launcher_command()} {shlex.join([str(script), *arguments])}"
    raise UserError(f"{own.name} is not for this launcher; use `{command}`")


def check_accumulation(accumulation_steps: int, world_size: int) -> None:
    """Raises UserError unless every process gets the same number of micro-batches per step."""
    if accumulation_steps % world_size:
        lower = accumulation_steps - accumulation_steps % world_size
        nearest = " or ".join(str(value) for value in (lower, lower + world_size) if value)
        raise UserError(
            f"gradient_accumulation_steps ({accumulation_steps}) is not divisible by {world_size} processes: "
            f"set it to {nearest} (the global batch is batch_size x gradient_accumulation_steps)"
        )


def is_communication_error(error: RuntimeError) -> bool:
    """Whether an error comes from communication between processes: torch raises a plain RuntimeError for some."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


def run_process(work: Callable[[], None]) -> None:
    """Run work() as this process's part of a job; explains communication errors, and names the rank in others."""
    rank = int(os.environ["RANK"])
    try:
        work()
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"process {rank} lost the connection to the other processes: one died or hangs, or the network is down "
            f"({first_line}); restart with --from_checkpoint to resume from the last checkpoint"
        ) from None
    except UserError as error:
        if rank == 0:
            raise
        raise UserError(f"process {rank}: {error}") from None
    finally:
        if dist.is_initialized():
            # The thread of gloo needs Python to let go of the last sum's tensors, and the end of DDP waits for that
            # thread without letting Python go: if that came at once, both would wait for ever (torch 2.13).
            time.sleep(0.1)
            dist.destroy_process_group()
