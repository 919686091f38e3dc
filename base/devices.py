"""Devices and precisions by name, and what a device calls itself."""

import platform

import torch

from base.configuration import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """The device of that name; auto: cuda, else mps, else cpu. Raises UserError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not a device's name; use auto, cpu, cuda, cuda:1 or mps") from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f"device {name!r} does not exist here: {counts.get(device.type, 0)} of its kind; try auto")
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the matrix products; auto: bfloat16 or float16 where a CUDA card computes it fast, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":  # compute capability 8.0 (Ampere) brought bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """float32, float16 or bfloat16: as a config spells it."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it: GPUs work asynchronously, clocks must not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
