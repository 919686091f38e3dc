"""Devices and precisions by name, what a device calls itself, and its memory."""

import math
import os
import platform
from pathlib import Path

import torch

from base.configuration import UserError
from base.process import peak_resident_memory

MEMINFO = Path("/proc/meminfo")  # where Linux says what is free, and, below, what a container may use (cgroup v2)
CGROUP = Path("/sys/fs/cgroup")
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
    """Precision of the matrix products; auto: bfloat16 or float16 where a CUDA card computes it fast, else float32.

    On a CPU, training looks closer, once it knows the model: training/precision.py.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if has_bfloat16(device) else torch.float16
    return torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CPU or a CUDA card has instructions for bfloat16; without them, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # compute capability of Ampere
    names = ("avx512_bf16", "amx_bf16", "bf16")  # of AMD and Intel, of Intel's matrix unit, of ARM
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in names)


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


def peak_memory(device: torch.device) -> float:
    """The most memory in bytes that this process has taken, of a GPU its tensors; nan where nothing tells it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory() if device.type == "cpu" else math.nan


def memory_total() -> float:
    """Memory of the machine, or of the container, in bytes; inf where the platform does not report it."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        physical = math.inf
    return min(physical, container_memory()[0])


def memory_available(device: torch.device) -> float | None:
    """Memory of the device in bytes that a process can still take; None where the platform does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # unlike what is free, this counts the files that the system only keeps because nobody wants the memory
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        available = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None
    limit, used = container_memory()
    return min(available, max(0.0, limit - used))


def container_memory() -> tuple[float, float]:
    """Bytes that the container of this process may use and has used; (inf, 0) without a container or a limit."""
    try:
        limit = float((CGROUP / "memory.max").read_text())  # raises ValueError for "max": no limit
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return limit, float((CGROUP / "memory.current").read_text()) - float(parts["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf, 0.0
