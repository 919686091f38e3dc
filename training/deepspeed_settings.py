"""DeepSpeed's JSON config merged with ours: each setting comes from one of the two, and a contradiction is an error.

    settings = merge_settings(read_json(path), path, config, torch.bfloat16, world_size=4)
    deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

The JSON decides about ZeRO, offload and communication; batch sizes, precision, clipping, optimizer and learning rate
come from the fields of our TrainConfig.
"""

from pathlib import Path
from typing import Any

import torch

from base.configuration import UserError
from base.devices import dtype_name

NO_CLIPPING = 1e30  # a maximum norm that is never reached: ZeRO computes the gradient norm only if it clips


def merge_settings(
    settings: dict[str, Any], path: Path, config: Any, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """The settings of the JSON at path, with those of our config added; raises UserError where the two disagree."""
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a JSON object of DeepSpeed's settings")
    accumulation = config.gradient_accumulation_steps // world_size  # DeepSpeed counts per process, we count over all
    processes = f"over {world_size} process{'' if world_size == 1 else 'es'}"
    expected = {  # DeepSpeed's name -> its value by our config, and how the error message explains it
        "train_micro_batch_size_per_gpu": (config.batch_size, f"batch_size is {config.batch_size}"),
        "gradient_accumulation_steps": (
            accumulation,
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps} {processes}",
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
    for name, (value, explanation) in expected.items():
        given = nested_value(settings, name)
        given = given.lower() if isinstance(given, str) else given
        if given not in (None, "auto", False, value):  # "enabled": false is the same as leaving it out
            raise UserError(f"{path}: {name} is {given}, {explanation}: make them agree, or leave {name} out")
    if settings.get("scheduler"):
        raise UserError(f"{path}: scheduler: leave it out; lr_schedule, warmup_iters and min_lr define the schedule")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization must be an object with a stage from 0 to 3")
    half = next((name for name in ("bf16", "fp16") if nested_value(settings, f"{name}.enabled") is True), None)
    if half and zero.get("stage", 0) == 0:
        raise UserError(
            f"{path}: {half}.enabled needs ZeRO (zero_optimization.stage 1 or above): leave it out, dtype does the same"
        )
    kept = {name: value for name, value in settings.items() if name not in ("optimizer", "bf16", "fp16")}
    merged = {
        **kept,
        "zero_optimization": dict(zero),
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "gradient_clipping": (config.grad_clip or NO_CLIPPING)
        if zero.get("stage", 0)
        else 0.0,  # else the engine clips
    }
    if half:  # weights in half precision, with a float32 master copy in the optimizer
        merged |= {half: settings[half], "torch_autocast": {"enabled": False}}
    elif dtype != torch.float32:  # float32 weights, matrix products in half precision
        merged["torch_autocast"] = {"enabled": True, "dtype": dtype_name(dtype)}
    return merged


def nested_value(settings: Any, name: str) -> Any:
    """The value under a dotted name such as optimizer.params.lr; None if there is none."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings
