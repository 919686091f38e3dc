"""The training loop of train.py on DeepSpeed, on one host or on several, with ZeRO and offload to CPU memory.

    deepspeed train_deepspeed.py -t pretrain                            every GPU of this host; config/deepspeed.json
    deepspeed train_deepspeed.py -t pretrain --optimizer adamw --deepspeed_config config/deepspeed_zero2.json
    deepspeed train_deepspeed.py -t pretrain --hostfile=hostfile.txt    several hosts
    python train_deepspeed.py -t pretrain                               one process

ZeRO shares out the optimizer's states over the processes (stage 1), the gradients too (2), the weights too (3).

The DeepSpeed JSON holds what is DeepSpeed's: ZeRO, offload, communication. Batch sizes, precision, clipping, optimizer
and learning rate are fields of our config; a JSON that says otherwise is an error. With ZeRO the checkpoint to go on
from is a folder, checkpoint/<stage>_last, into which every process writes its share; checkpoint/<stage>.pt is whole.
"""

import contextlib
import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import train
from base.configuration import Parser, UserError, find_config, read_json, read_text, run_main
from base.devices import dtype_name
from model import GPT
from text.batches import Batch
from training.distributed import GroupEngine, launch
from training.engine import Loss
from training.optimizer import make_optimizer, scale_learning_rates
from weights.checkpointing import MOMENTS, SaveError, finish_sharded, save_shard, to_torch_state

NO_CLIPPING = 1e30  # a norm that no gradient has: DeepSpeed measures the norm only where it clips


class DeepSpeedEngine(GroupEngine):
    """One process of several, with what DeepSpeed leaves it of weights, gradients and optimizer states.

    Rajbhandari et al. 2019 (arXiv:1910.02054), Ren et al. 2021 (arXiv:2101.06840) for the offload.
    """

    launcher = "deepspeed"

    def __init__(self, config: Any, path: Path) -> None:
        if config.device.startswith("cpu"):
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take the card that is there
        super().__init__(config)
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.settings = merge_settings(read_json(path), path, config, self.dtype, self.world_size)
        self.zero = self.settings["zero_optimization"].get("stage", 0)
        self.writes_shards, self.shards_parameters = self.zero > 0, self.zero == 3
        if self.zero and config.use_lora:
            raise UserError(
                f"use_lora: an adapter is too small to be cut up by ZeRO stage {self.zero} of {path}: use train_ddp.py"
            )
        if self.zero and config.optimizer != "adamw":
            raise UserError(
                f"optimizer {config.optimizer} needs whole matrices, ZeRO stage {self.zero} of {path} cuts them up: "
                "use --optimizer adamw, or config/deepspeed_zero0.json"
            )

    def prepare(self, model: GPT) -> None:
        if self.zero and model.config.n_expert and model.config.expert_balance == "bias":
            raise UserError(
                "expert_balance bias lives outside of the weights, where ZeRO's shares do not reach: use loss or none, "
                "or train_ddp.py"
            )
        import deepspeed  # seconds to import: only once everything else is known to be right

        self.model = model if self.zero == 3 else model.to(self.device)  # stage 3 moves one share of it at a time
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        weights = {name: p.detach().clone() for name, p in model.named_parameters()} if self.is_half else {}
        self.optimizer = self.make_optimizer(model)
        names = {p: name for name, p in model.named_parameters()}
        # tied parameters have two names in a state dict
        self.names = {name: names[p] for name, p in model.named_parameters(remove_duplicate=False)}
        self.groups = [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        if self.use_compile and self.zero == 3 and self.is_main:
            print("compile: not with ZeRO stage 3; going on without", file=sys.stderr)
        deepspeed.utils.set_log_level_from_string("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's to heed
        try:
            self.network, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.settings)
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"DeepSpeed refuses its settings: {str(error).strip().splitlines()[0]}") from None
        for group in {self.network.data_parallel_group, self.network.seq_data_parallel_group}:
            group.set_timeout(self.timeout)  # DeepSpeed's own would wait for half an hour
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name].to(self.device)  # RoPE's angles stay in float32
        for name, p in model.named_parameters():
            if name in weights:
                self.place(p, weights[name])  # not what rounding left of them
        if self.use_compile and self.zero < 3:
            self.network.compile()
        self.sum_over_ranks(0.0)  # all have opened it by now
        remove_shared_memory(self.rank)
        zero_scaler = getattr(self.network.optimizer, "torch_autocast_gradscaler", None)
        self.scaler = self.network.torch_autocast_z0_gradscaler or zero_scaler or torch.amp.GradScaler(enabled=False)
        self.seed_dropout()

    @property
    def is_half(self) -> bool:
        """Whether the weights themselves are in half precision, beside a float32 copy (DeepSpeed's bf16 and fp16)."""
        return any(self.settings.get(name, {}).get("enabled") for name in ("bf16", "fp16"))

    def make_optimizer(self, model: GPT) -> torch.optim.Optimizer:
        """DeepSpeed's Adam where it is faster (offloaded states, CUDA), if it can be built here; else torch's."""
        optimizer = make_optimizer(model, self.config, self.device)
        offloaded = self.settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        if self.config.optimizer != "adamw" or not (offloaded or self.device.type == "cuda"):
            return optimizer
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        try:
            return (DeepSpeedCPUAdam if offloaded else FusedAdam)(optimizer.param_groups)
        except Exception as error:  # no compiler, no ninja, no CUDA toolkit: each fails in its own way
            self.settings["zero_force_ds_cpu_optimizer"] = False
            if self.is_main:
                print(f"DeepSpeed's Adam cannot be built here ({type(error).__name__}); using torch's", file=sys.stderr)
            return optimizer

    def forward_backward(self, loss: Loss, batch: Batch, count: float, is_last: bool) -> torch.Tensor:
        batch = batch.to(self.device)  # (autocast is DeepSpeed's own, around the forward pass)
        self.network.set_gradient_accumulation_boundary(is_last)
        share = loss(self.network, batch, "sum") / count
        self.network.backward(share * self.world_size, scale_wrt_gas=False)  # averaged there: should add up
        return share.detach()

    def step(self, lr_scale: float) -> float:
        scale_learning_rates(self.optimizer, lr_scale)
        if self.zero:
            self.network.step()
            return float(self.network.get_global_grad_norm())
        self.scaler.unscale_(self.optimizer)  # without ZeRO DeepSpeed tells nobody the norm
        grad_norm = self.clip_gradients(self.config.grad_clip or math.inf)
        if math.isfinite(grad_norm) or self.scaler.is_enabled():
            self.network.step()
        else:
            self.network.zero_grad()  # or it would be added to in the next step
        return grad_norm

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def parameters(self) -> Iterator[tuple[int, str, torch.nn.Parameter]]:
        """(index in the optimizer's state dict, name, parameter), in the optimizer's order, moments at hand."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.zero in (1, 2):  # done there too, but before any group except the first has moments (seen in 0.19)
            flats = self.network.optimizer.single_partition_of_fp32_groups
            for group, flat in zip(self.network.optimizer.bit16_groups, flats, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)
        named = dict(self.model.named_parameters())
        for index, name in enumerate(name for group in self.groups for name in group):
            yield index, name, named[name]

    def optimizer_step(self) -> float:
        """Steps that Adam has taken, for its bias correction."""
        groups = [group["step"] for group in self.optimizer.param_groups if "step" in group]
        return float(next(iter([*groups, *(state["step"] for state in self.optimizer.state.values())]), 0))

    def state_dict(self) -> dict[str, Any]:
        if self.zero == 0:
            return super().state_dict()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights, states = {}, {}
        for index, name, p in self.parameters():
            whole = {"weight": safe_get_full_fp32_param(p)}
            whole |= {moment: safe_get_full_optimizer_state(p, moment) for moment in MOMENTS}
            if self.is_main:  # to gather takes every process; to keep it, one
                weights[name] = whole.pop("weight").cpu()
                states[index] = {key: value.cpu() for key, value in whole.items()}
        return {**self.values(), **to_torch_state(weights, states, self.names, self.groups, self.optimizer_step())}

    def values(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict(), "rng": self.random_states()}

    def save(self, path: Path, values: dict[str, Any]) -> None:
        if path.suffix:
            super().save(path, values)
            return
        values = {
            **values,
            **self.values(),
            "names": self.names,
            "groups": self.groups,
            "optimizer_step": self.optimizer_step(),
        }
        shares, failure = {name: self.share(p) for _, name, p in self.parameters()}, None
        try:
            save_shard(path, values["step"], self.rank, self.world_size, shares)
        except SaveError as error:
            failure = error
        (failures,) = self.sum_over_ranks(float(failure is not None))  # which also waits for the slowest
        if failures:
            raise failure or SaveError(f"{path}: another process could not write its share")
        if self.is_main:
            finish_sharded(path, self.world_size, values)

    def share(self, p: torch.nn.Parameter) -> dict[str, Any]:
        """This process's share of a parameter: where it starts in the flattened whole, its values and moments."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        shape = tuple(getattr(p, "ds_shape", p.shape))
        if self.zero == 3:
            values = safe_get_local_fp32_param(p)
            start = self.rank * values.numel()
            length = max(0, min(values.numel(), math.prod(shape) - start))  # the last share is padded
            parts = {"weight": values} | {name: safe_get_local_optimizer_state(p, name) for name in MOMENTS}
        elif p._hp_mapping is None:
            start = length = 0
            parts = {name: torch.empty(0) for name in ("weight", *MOMENTS)}
        else:
            address = p._hp_mapping.lp_fragment_address
            start, length = address.start, address.numel
            parts = {"weight": p._hp_mapping.get_hp_fragment()}
            parts |= {name: p._hp_mapping.get_hp_fragment(name) for name in MOMENTS}
        return {"shape": shape, "start": start} | {name: part[:length].cpu().clone() for name, part in parts.items()}

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        if self.zero == 0:
            super().load_state_dict(checkpoint)
            return
        try:
            states = checkpoint["optimizer"]["state"]
            moments = {i: {name: states[i][name].float() for name in MOMENTS} for i, _, _ in self.parameters()}
            step = float(states[0]["step"])
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{self.config.from_checkpoint}: its optimizer states are not those of adamw") from None
        # DeepSpeed makes room for the moments in the first step: one with no gradient and no learning rate
        idx = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.network.set_gradient_accumulation_boundary(True)
        self.network.backward(0.0 * self.network(idx, idx)[1], scale_wrt_gas=False)
        self.step(0.0)
        for index, _, p in self.parameters():
            for name in MOMENTS:
                self.place(p, moments[index][name], name)
        for group in self.optimizer.param_groups:
            if "step" in group:
                group["step"] = int(step)
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else int(step)
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.set_random_states(checkpoint["rng"])

    def place(self, p: torch.nn.Parameter, whole: torch.Tensor, moment: str = "") -> None:
        """Hand a parameter's whole weights, or one of its moments, to DeepSpeed, which keeps this process's share."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        whole = whole.to(self.device)
        if self.zero == 3:
            size = p.ds_tensor.numel()
            share = torch.zeros(size, device=self.device)
            part = whole.flatten()[self.rank * size : (self.rank + 1) * size]
            share[: part.numel()] = part
            safe_set_local_optimizer_state(p, share, moment) if moment else safe_set_local_fp32_param(p, share)
        else:
            safe_set_full_optimizer_state(p, whole, moment) if moment else safe_set_full_fp32_param(p, whole)

    def full_model(self) -> GPT | None:
        if self.zero < 3 and not self.is_half:
            return self.model
        weights = self.state_dict()["model"]
        if not self.is_main:
            return None
        model = GPT(self.model.config, self.model.sdp_kernel)
        model.load_state_dict(weights)
        return model.to(self.device)


# ------------------------------------------------------------------------------------------------------ settings


def remove_shared_memory(rank: int) -> None:
    """Take away the name of the memory that DeepSpeed shares between processes on CPUs, and would leave behind.

    Those who have opened it keep it; the last to end frees it, killed or not.
    """
    place = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{place}_{rank}"):
        file.unlink(missing_ok=True)


def merge_settings(
    settings: dict[str, Any], path: Path, config: Any, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's settings: those of the JSON at path, with ours filled in; raises UserError where they disagree."""
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a JSON object of DeepSpeed's settings")
    accumulation = config.gradient_accumulation_steps // world_size
    shared = "over all processes, of which there " + (f"are {world_size}" if world_size > 1 else "is 1")
    ours = {  # DeepSpeed's name: its value by our config, and our words for it
        "train_micro_batch_size_per_gpu": (config.batch_size, f"batch_size is {config.batch_size}"),
        "gradient_accumulation_steps": (
            accumulation,
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps} {shared}",
        ),
        "train_batch_size": (
            config.batch_size * config.gradient_accumulation_steps,
            f"batch_size ({config.batch_size}) x gradient_accumulation_steps ({config.gradient_accumulation_steps})",
        ),
        "gradient_clipping": (config.grad_clip, f"grad_clip is {config.grad_clip:g}"),
        "optimizer.type": (config.optimizer, f"optimizer is {config.optimizer}"),
        "optimizer.params.lr": (config.learning_rate, f"learning_rate is {config.learning_rate:g}"),
        "optimizer.params.betas": (
            [config.beta1, config.beta2],
            f"beta1 and beta2 are {config.beta1:g} and {config.beta2:g}",
        ),
        "optimizer.params.weight_decay": (config.weight_decay, f"weight_decay is {config.weight_decay:g}"),
        "bf16.enabled": (dtype == torch.bfloat16, f"dtype is {dtype_name(dtype)}"),
        "fp16.enabled": (dtype == torch.float16, f"dtype is {dtype_name(dtype)}"),
        "torch_autocast.enabled": (dtype != torch.float32, f"dtype is {dtype_name(dtype)}"),
        "torch_autocast.dtype": (dtype_name(dtype), f"dtype is {dtype_name(dtype)}"),
    }
    for name, (value, words) in ours.items():
        theirs = look_up(settings, name)
        theirs = theirs.lower() if isinstance(theirs, str) else theirs
        if theirs not in (None, "auto", False, value):  # "enabled": false says nothing
            raise UserError(f"{path}: {name} is {theirs}, {words}: make them agree, or leave {name} out")
    if settings.get("scheduler"):
        raise UserError(f"{path}: scheduler: leave it out; lr_schedule, warmup_iters and min_lr make the schedule")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization must be an object with a stage from 0 to 3")
    half = next((name for name in ("bf16", "fp16") if look_up(settings, f"{name}.enabled") is True), None)
    if half and zero.get("stage", 0) == 0:
        raise UserError(
            f"{path}: {half}.enabled needs ZeRO (zero_optimization.stage from 1): leave it out, dtype does it"
        )
    kept = {name: value for name, value in settings.items() if name not in ("optimizer", "bf16", "fp16")}
    filled = {
        **kept,
        "zero_optimization": dict(zero),
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "gradient_clipping": (config.grad_clip or NO_CLIPPING) if zero.get("stage", 0) else 0.0,
    }
    if half:
        filled |= {half: settings[half], "torch_autocast": {"enabled": False}}
    elif dtype != torch.float32:
        filled["torch_autocast"] = {"enabled": True, "dtype": dtype_name(dtype)}
    return filled


def look_up(settings: Any, name: str) -> Any:
    """The value under a dotted name; None where there is none."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


# ------------------------------------------------------------------------------------------------------ launching

LAUNCHER_VALUES = (
    "--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--master_addr", "--master_port",
    "--launcher", "--launcher_args", "--ssh_port", "--module_root",
)  # fmt: skip
LAUNCHER_SWITCHES = ("--no_ssh_check", "--force_multi")


def make_parser() -> Parser:
    parser = train.make_parser()
    parser.add_argument("--deepspeed", action="store_true", help="for the launcher's habits; always on")
    parser.add_argument("--deepspeed_config", default="deepspeed", help="NAME of config/NAME.json, or a path")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    group = parser.add_argument_group("the launcher's, before or after the script's name")
    for flag in LAUNCHER_VALUES:
        group.add_argument(flag, default=None)
    for flag in LAUNCHER_SWITCHES:
        group.add_argument(flag, action="store_true")
    return parser


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host, of lines like "worker-1 slots=4"; raises UserError that names the line."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        slots = fields[1].removeprefix("slots=") if len(fields) == 2 else ""
        if not (slots.isdecimal() and int(slots) and fields[1].startswith("slots=")):
            raise UserError(f'{path}, line {number}: must be like "{fields[0]} slots=4", got {line.strip()!r}')
        if fields[0] in hosts:
            raise UserError(f"{path}, line {number}: {fields[0]} stands there twice")
        hosts[fields[0]] = int(slots)
    if not hosts:
        raise UserError(f'{path}: names no host; a line for each, like "worker-1 slots=4"')
    return hosts


def check_hosts(path: str, hosts: dict[str, int], ssh_port: str | None) -> None:
    """Raises UserError where a host does not answer, or has fewer GPUs than slots."""
    port = ["-p", ssh_port] if ssh_port else []
    count = "nvidia-smi --list-gpus 2>/dev/null | wc -l"

    def ask(host: str) -> subprocess.CompletedProcess:
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        return subprocess.run(["ssh", *options, *port, host, count], capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        for (host, slots), answer in zip(hosts.items(), pool.map(ask, hosts), strict=True):
            if answer.returncode:
                said = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
                raise UserError(
                    f"{path}: no ssh to {host} without a password ({said}); "
                    f"try `ssh {host}` by hand, or --no_ssh_check if the launcher is not ssh"
                )
            gpus = int(answer.stdout) if answer.stdout.strip().isdecimal() else 0
            if gpus and slots > gpus:
                raise UserError(f"{path}: {host} has slots={slots}, but {gpus} GPUs")


def relaunch(args: Any, argv: list[str]) -> None:
    """Start this script again through DeepSpeed's launcher, on the hosts of the hostfile; does not return."""
    hosts = read_hostfile(args.hostfile)
    launcher = args.launcher or "pdsh"
    if launcher == "pdsh" and len(hosts) > 1 and not shutil.which("pdsh"):
        raise UserError("several hosts need pdsh: install it (Debian, Ubuntu: apt install pdsh), or name a --launcher")
    if not args.no_ssh_check and (len(hosts) > 1 or args.force_multi):
        check_hosts(args.hostfile, hosts, args.ssh_port)
    options, rest = split_arguments(argv)
    if len(hosts) == 1 and not args.force_multi:  # started without ssh, but for a check that it would fail
        options += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options, sys.argv[0], *rest]
    print(
        f"started on this host alone, but {args.hostfile} names {len(hosts)}: starting again as\n"
        f"  deepspeed {shlex.join(command[3:])}",
        flush=True,
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    os.execve(sys.executable, command, environment)


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's arguments, and the script's own."""
    options, own = [], []
    arguments = iter(argv)
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag in LAUNCHER_SWITCHES:
            options.append(argument)
        elif flag in LAUNCHER_VALUES:
            options += [argument] if "=" in argument else [argument, next(arguments, "")]
        else:
            own.append(argument)
    return options, own


def main() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install deepspeed; or use train.py or train_ddp.py")
    args, overrides = make_parser().parse()
    sys.argv = [arg for arg in sys.argv if not arg.startswith("--local_rank")]  # the launcher's, of no use to people
    path = find_config(args.deepspeed_config)
    if args.hostfile and int(os.environ.get("CROSS_SIZE", 1)) == 1:
        if os.environ.get("RANK", "0") == "0":
            relaunch(args, sys.argv[1:])
        return  # the first process of this host starts them all
    if "RANK" not in os.environ:
        print(
            f"one process; to start one for every GPU: {DeepSpeedEngine.launcher} train_deepspeed.py", file=sys.stderr
        )
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    launch(lambda: train.run_command(args, overrides, lambda config: DeepSpeedEngine(config, path)))


if __name__ == "__main__":
    run_main(main)
