"""Attention by each kernel of scaled_dot_product_attention, forward and backward: seconds and memory, relative.

    python bench/attention_kernels.py                               as in the wide model of bench/train_speed.py
    python bench/attention_kernels.py --size 16 12 1024 64          as in GPT-2: batch, heads, tokens, width of a head
    python bench/attention_kernels.py --dtype float32 bfloat16      in each precision

All compute the same. math is the formula, operation by operation, and keeps the scores of all pairs of tokens for the
backward pass; the others go through keys and values in blocks, and never have all scores at a time (FlashAttention,
arXiv:2205.14135). CPUs have math and flash. Memory is that of all tensors at the peak, beyond queries, keys and values.
The last line for each precision is a row for the table in docs/measured.md.
"""

import argparse
import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import device_name, peak_bytes, seconds_of, show, show_row
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from base.configuration import UserError, run_main
from base.devices import DTYPES, dtype_name, find_device, find_dtype
from layers.masks import block_masks
from model import SDP_KERNELS

KERNELS = (*SDP_KERNELS, "flex")
N_TURNS = 3  # the fastest counts: other programs disturb some of them

Size = tuple[int, int, int, int]  # batch, heads, tokens, width of a head
Measured = tuple[float, float] | str  # seconds and bytes, or the error of a kernel that does not run


def measure_kernels(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Measured]:
    """Causal attention, forward and backward, by each kernel."""
    q, k, v = (torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def by_sdpa(name: str) -> None:
        with sdpa_kernel(SDP_KERNELS[name]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's reasons, many lines of them
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    works: dict[str, Callable[[], None]] = {name: functools.partial(by_sdpa, name) for name in SDP_KERNELS}
    if device.type == "cuda":  # (flex attention has no backward pass on CPUs)
        blocks = block_masks(size[2], {0}, True, torch.zeros(size[0], size[2], device=device), device)[0]
        compiled = torch.compile(flex_attention)
        works["flex"] = lambda: compiled(q, k, v, block_mask=blocks).sum().backward()
    measured: dict[str, Measured] = {}
    for name, work in works.items():
        try:
            measured[name] = seconds_of(work, device), peak_bytes(device, work)
        except Exception as error:  # no such kernel for this device, type or size: the type varies
            measured[name] = type(error).__name__
    for name in [name for name in works if not isinstance(measured[name], str)] * (N_TURNS - 1):
        seconds, n_bytes = measured[name]
        measured[name] = min(seconds, seconds_of(works[name], device)), n_bytes
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=4, type=int, metavar="N", help="batch, heads, tokens, width of a head")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="[bfloat16 on a new GPU, float32 on a CPU]")
    parser.add_argument("--device", default="auto", help="[auto]")
    args = parser.parse_args()
    device = find_device(args.device)
    size = args.size or (10 if device.type == "cpu" else 100, 4, 512, 128)
    if min(size) < 1:
        raise UserError("--size takes four numbers of at least 1: batch, heads, tokens, width of a head")
    for dtype in map(DTYPES.get, args.dtype or [dtype_name(find_dtype("auto", device))]):
        measured = measure_kernels(tuple(size), device, dtype)
        first = next(value for value in measured.values() if not isinstance(value, str))  # math runs everywhere
        rows, results, cells = [("kernel", "ms", "MB", "time", "memory")], {}, []
        for name in KERNELS:
            value = measured.get(name, "for GPUs")
            if isinstance(value, str):
                rows.append((name, f"does not run here ({value})", "", "", ""))
                cells.append("")
                continue
            (seconds, n_bytes), (time, memory) = value, (a / b for a, b in zip(value, first, strict=True))
            rows.append((name, f"{1e3 * seconds:.2f}", f"{n_bytes / 1e6:,.1f}", f"{time:.2f} x", f"{memory:.2f} x"))
            results[name] = {"seconds": seconds, "bytes": n_bytes, "time": time, "memory": memory}
            cells.append(
                f"{1e3 * seconds:.1f} ms, {n_bytes / 1e6:,.0f} MB" if value is first else f"{time:.2f}, {memory:.2f}"
            )
        what = f"{' x '.join(map(str, size))}, {dtype_name(dtype)}"
        show(f"attention, {what}, on {device_name(device)}", rows, results)
        show_row(device, what, *cells)


if __name__ == "__main__":
    run_main(main)
