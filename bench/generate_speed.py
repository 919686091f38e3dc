"""Decoding speed in tokens per second, with and without KV cache, relative to the memory bandwidth limit.

    python bench/generate_speed.py              10M parameters; on a GPU also 124M
    python bench/generate_speed.py --tokens 50 124M
    python bench/generate_speed.py --weights float32 bfloat16 int8      weights in fewer bytes
    python bench/generate_speed.py --weights float32 int8 --compile     and one sequence by a compiled step as well
    python bench/generate_speed.py --weights float32 int8 --beside llama.cpp      the same weights there (xllamacpp)
    python bench/generate_speed.py checkpoint/smollm2.pt --batch_size 1 --tokens 24     a checkpoint of yours

Autoregressive decoding of one sequence is bound by memory bandwidth: every token reads all weights once, so the limit
in tokens per second is bandwidth / bytes of weights. The bandwidth is measured with a matrix-vector product.
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
import urllib.request

import torch
from measuring import device_name, memory_bandwidth, show, synchronise

from base.configuration import run_main
from base.devices import find_device, find_dtype
from layers.compiled_step import CompiledStep
from layers.one_row import read_one_row_faster
from model import GPT, ModelConfig
from text.tokenizer import SPECIAL_TOKENS, CharTokenizer
from weights.checkpointing import load_checkpoint, load_model
from weights.gguf import write_gguf
from weights.quantise import KINDS, with_weights

SHAPES = {  # n_layer, n_head, n_embd, block_size, vocab_size
    "10M": (6, 6, 384, 256, 65),
    "124M": (12, 12, 768, 1024, 50304),
}


LLAMA_CPP_TYPES = {"": "float32", "float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}  # convert.py's


def make_model(name: str) -> GPT:
    """A model of one of SHAPES with random weights, or that of a checkpoint."""
    if name not in SHAPES:
        return load_model(load_checkpoint(name), name)
    n_layer, n_head, n_embd, block_size, vocab_size = SHAPES[name]
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    return GPT(ModelConfig(**shape, vocab_size=vocab_size))


def speed(model: GPT, batch_size: int, n_tokens: int, use_cache: bool, step: CompiledStep | None = None) -> float:
    """Tokens per second summed over the batch, best of three runs; the prompt is one token."""
    device = next(model.parameters()).device
    idx = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    best = 0.0
    for _ in range(3):
        steps = model.generate(idx, n_tokens, temperature=0.8, top_k=50, seed=0, use_cache=use_cache, step=step)
        next(steps)  # prefill
        synchronise(device)
        start = time.perf_counter()
        count = sum(1 for _ in steps)
        synchronise(device)
        best = max(best, count * batch_size / (time.perf_counter() - start))
    return best


def llama_cpp_speed(model: GPT, type_name: str, n_tokens: int) -> float:
    """Tokens per second of one sequence in llama.cpp, by its own clock, best of three; needs xllamacpp and gguf."""
    import xllamacpp

    tokenizer = CharTokenizer("".join(chr(0x10000 + i) for i in range(model.config.vocab_size - len(SPECIAL_TOKENS))))
    with tempfile.TemporaryDirectory() as folder:
        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity, params.n_parallel = f"{folder}/model.gguf", -1, 1
        params.cpuparams.n_threads = torch.get_num_threads()
        write_gguf(params.model.path, model, tokenizer, type_name)
        server = xllamacpp.Server(params)
        settings = {"n_predict": n_tokens, "temperature": 0.8, "top_k": 50, "ignore_eos": True, "seed": 0}
        body = json.dumps({"prompt": tokenizer.decode([len(SPECIAL_TOKENS)]), **settings}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", body, headers)
        best = 0.0
        for _ in range(3):
            with urllib.request.urlopen(request) as reply:
                best = max(best, json.load(reply)["timings"]["predicted_per_second"])
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{', '.join(SHAPES)} [those that fit the device], or a checkpoint"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=names)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 32], help="sequences at a time [1 32]")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate per sequence")
    parser.add_argument("--weights", nargs="+", choices=KINDS, help="round them [as they are]")
    parser.add_argument("--compile", action="store_true", help="also measure a compiled step")
    parser.add_argument("--beside", choices=["llama.cpp"], help="also measure this program, with the same weights")
    args = parser.parse_args()
    device = find_device("auto")
    dtype = torch.float32 if device.type == "cpu" else find_dtype("auto", device)
    bandwidth = memory_bandwidth(device, dtype)
    rows = [("model, batch size", "KV cache", "tokens/s", "bandwidth limit, batch 1", "of the limit")]
    results = {"bandwidth_gb_per_s": bandwidth / 1e9, "dtype": str(dtype)}
    for name in args.models or ["10M", *(["124M"] if device.type == "cuda" else [])]:
        exact = make_model(name).to(device, dtype).eval()
        if device.type == "cpu":  # as inference.py does
            read_one_row_faster(exact)
        block_size = exact.config.block_size
        limit = bandwidth / (exact.parameter_count() * dtype.itemsize)
        for kind, batch_size in itertools.product(args.weights or [""], args.batch_size):
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
            others = {}
            if args.compile and batch_size == 1:
                step = CompiledStep(model)
                step.thread.join()
                others["compiled"] = speed(model, 1, min(args.tokens, block_size - 1), True, step)
            if args.beside and batch_size == 1 and kind in LLAMA_CPP_TYPES:
                others[args.beside] = llama_cpp_speed(exact, LLAMA_CPP_TYPES[kind], min(args.tokens, block_size - 2))
            for other, tokens in others.items():
                rows.append((f"{what}, 1, {other}", "yes", f"{tokens:,.0f}", f"{limit:,.0f}", f"{tokens / limit:.0%}"))
                results[f"{what}, 1, {other}"] = {"tokens_per_s": tokens, "of_limit": tokens / limit}
    show(f"decoding on {device_name(device)}, {bandwidth / 1e9:.1f} GB/s memory bandwidth", rows, results)


if __name__ == "__main__":
    run_main(main)
