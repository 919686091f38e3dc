"""Decoding by kind of attention and length of the text: milliseconds per token, and megabytes of cache.

    python bench/decoding_by_length.py
    python bench/decoding_by_length.py --attention full latent linear,linear,linear,full --lengths 1024 16384

A token's time is the fastest of several, with a cache of so many tokens (random ones: their values do not matter), one
sequence, uncompiled. Kinds take turns, so that other programs disturb all alike. The window is as long as the text, and
positions are RoPE's, which linear attention does not need.
"""

import argparse
import time

import torch
from measuring import device_name, show, synchronise

from base.configuration import run_main
from base.devices import find_device
from layers.cache import KVCache
from model import GPT, ModelConfig

SHAPE = {"vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 256}


@torch.inference_mode()
def decoding(attention: str, length: int, top_k: int | None, device: torch.device) -> tuple[GPT, KVCache]:
    """A model, and a cache that has room for one token more."""
    torch.manual_seed(0)
    top_k = top_k if "sparse" in attention else None
    config = ModelConfig(**SHAPE, block_size=length, attention=attention.split(","), sparse_top_k=top_k)
    model = GPT(config).to(device).eval()
    cache = KVCache(config, 1, device, torch.float32)
    for tensor in cache.tensors():
        tensor.normal_()
    return model, cache


@torch.inference_mode()
def milliseconds(model: GPT, cache: KVCache, length: int, device: torch.device) -> float:
    """That the last token of a text of this length takes."""
    cache.lengths[:] = length - 1
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    synchronise(device)
    start = time.perf_counter()
    model.lm_head(model.hidden(token, cache))
    synchronise(device)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["full", "linear", "linear,linear,linear,full"]
    parser.add_argument("--attention", nargs="+", default=kinds, help="patterns over the layers")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4**i for i in range(4, 9)], help="of the text")
    parser.add_argument("--sparse_top_k", type=int, help="blocks that sparse attention reads (a quarter of the text)")
    parser.add_argument("--times", type=int, default=30, help="tokens that are timed, of which the fastest counts")
    args = parser.parse_args()
    device = find_device("auto")
    rows = [("length", *(f"{kind}: ms, MB" for kind in args.attention))]
    results = {}
    for length in args.lengths:
        runs = {kind: decoding(kind, length, args.sparse_top_k, device) for kind in args.attention}
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(args.times):
            for kind, (model, cache) in runs.items():
                best[kind] = min(best[kind], milliseconds(model, cache, length, device))
        sizes = {kind: sum(t.nbytes for t in cache.tensors()) / 1e6 for kind, (_, cache) in runs.items()}
        rows.append((f"{length:,}", *(f"{best[kind]:.2f}, {sizes[kind]:.1f}" for kind in runs)))
        results[length] = {kind: {"ms_per_token": best[kind], "cache_mb": sizes[kind]} for kind in runs}
    show(f"decoding on {device_name(device)}, 4 layers, 256 wide", rows, results)


if __name__ == "__main__":
    run_main(main)
