"""Decoding speed in tokens per second, with and without KV cache, relative to the memory bandwidth limit.

    python bench/generate_speed.py              10M parameters; on a GPU also 124M
    python bench/generate_speed.py --tokens 50 124M
    python bench/generate_speed.py --weights float32 bfloat16 int8      weights in fewer bytes

Autoregressive decoding of one sequence is bound by memory bandwidth: every token reads all weights once, so the limit
in tokens per second is bandwidth / bytes of weights. The bandwidth is measured with a matrix-vector product.
"""

import argparse
import copy
import itertools
import time

import torch
from measuring import device_name, memory_bandwidth, show, synchronise

from base.configuration import UserError, run_main
from base.devices import find_device, find_dtype
from model import GPT, ModelConfig
from weights.quantise import KINDS, with_weights

SHAPES = {  # n_layer, n_head, n_embd, block_size, vocab_size
    "10M": (6, 6, 384, 256, 65),
    "124M": (12, 12, 768, 1024, 50304),
}


def speed(model: GPT, batch_size: int, n_tokens: int, use_cache: bool) -> float:
    """Tokens per second summed over the batch, best of three runs; the prompt is one token."""
    device = next(model.parameters()).device
    idx = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    best = 0.0
    for _ in range(3):
        steps = model.generate(idx, n_tokens, temperature=0.8, top_k=50, seed=0, use_cache=use_cache)
        next(steps)  # prefill
        synchronise(device)
        start = time.perf_counter()
        count = sum(1 for _ in steps)
        synchronise(device)
        best = max(best, count * batch_size / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="MODEL", help=f"{', '.join(SHAPES)} [those that fit the device]")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate per sequence")
    parser.add_argument("--weights", nargs="+", choices=KINDS, help="round them [as they are]")
    args = parser.parse_args()
    if unknown := set(args.shapes) - SHAPES.keys():
        raise UserError(f"no model named {', '.join(unknown)}: there are {', '.join(SHAPES)}")
    device = find_device("auto")
    dtype = torch.float32 if device.type == "cpu" else find_dtype("auto", device)
    bandwidth = memory_bandwidth(device, dtype)
    rows = [("model, batch size", "KV cache", "tokens/s", "bandwidth limit, batch 1", "of the limit")]
    results = {"bandwidth_gb_per_s": bandwidth / 1e9, "dtype": str(dtype)}
    for name in args.shapes or ["10M", *(["124M"] if device.type == "cuda" else [])]:
        n_layer, n_head, n_embd, block_size, vocab_size = SHAPES[name]
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
        exact = GPT(ModelConfig(**shape, vocab_size=vocab_size)).to(device, dtype).eval()
        limit = bandwidth / (exact.parameter_count() * dtype.itemsize)
        for kind, batch_size in itertools.product(args.weights or [""], (1, 32)):
            model = with_weights(copy.deepcopy(exact), kind)[0] if kind else exact
            what = f"{name}, {kind}" if kind else name
            for use_cache in (True, False):
                n_tokens = args.tokens if use_cache or batch_size == 1 else min(args.tokens, 30)
                tokens = speed(model, batch_size, min(n_tokens, block_size - 1), use_cache)
                share = f"{tokens / limit:.0%}" if batch_size == 1 else ""
                rows.append(
                    (f"{what}, {batch_size}", "yes" if use_cache else "no", f"{tokens:,.0f}", f"{limit:,.0f}", share)
                )
                key = f"{what}, {batch_size}, {'cache' if use_cache else 'no cache'}"
                results[key] = {"tokens_per_s": tokens, "of_limit": tokens / limit}
    show(f"decoding on {device_name(device)}, {bandwidth / 1e9:.1f} GB/s memory bandwidth", rows, results)


if __name__ == "__main__":
    run_main(main)
