"""The precision that `dtype: auto` stands for on a CPU: bfloat16 where training gains enough by it, else float32.

    why = choose_dtype(engine, model, earlier)      # sets the engine's dtype; why: for the summary

A CPU with instructions for bfloat16 (AVX512-BF16, AMX, ARM's) multiplies matrices two to eight times as fast as in
float32. The rest of a training step gains nothing, and of a narrow model's step most is the rest.
"""

import math
import time
from typing import Any

import torch

from base.devices import DTYPES, has_bfloat16
from model import GPT
from training.engine import Engine

MIN_GAIN = 1.3  # less is not worth a mantissa of 8 bits instead of 24
MIN_WIDTH = 256  # n_embd; narrower, the gain is smaller, or so near MIN_GAIN that the clock's noise would decide
TRIAL_FLOPS = 5e9  # of a pass: 0.05 s at 100 GFLOP/s


def choose_dtype(engine: Engine, model: GPT, earlier: dict[str, Any] | None) -> str:
    """Choose the precision of training, and say why; before the engine is used: a reference's margins have it, too.

    earlier: the checkpoint of the run that is resumed, whose precision it keeps; None: a new run. Of several processes
    the first one decides for all: others could have another clock, or another CPU.
    """
    if engine.config.dtype != "auto" or engine.device.type != "cpu":
        return ""
    before = earlier and earlier.get("environment", {"device": "cpu", "dtype": "float32"})  # as earlier versions had it
    if before and before["device"] == "cpu" and before["dtype"] != "float16":
        engine.set_dtype(DTYPES[before["dtype"]])
        return "as before"
    if model.config.n_embd < MIN_WIDTH:
        return f"n_embd is below {MIN_WIDTH}"
    measures = engine.is_main and has_bfloat16(engine.device)
    (gain,) = engine.sum_over_ranks(bfloat16_gain(model, engine.config.batch_size) if measures else 0.0)
    engine.set_dtype(torch.bfloat16 if gain >= MIN_GAIN else torch.float32)
    return f"bfloat16 trains {gain:.2f} x as fast" if gain else "no instructions for bfloat16"


def bfloat16_gain(model: GPT, batch_size: int) -> float:
    """How many times as fast as in float32 a CPU trains the model in bfloat16 (forward and backward pass).

    Timed on random numbers: one block, which stands for all, and the output layer with its loss.
    """
    config, block, head = model.config, model.blocks[0], model.lm_head
    n_weights = sum(p.numel() for p in block.parameters()) + head.weight.numel()
    n_tokens = max(64, int(TRIAL_FLOPS / (6 * n_weights)))  # 6 operations per weight and token
    T = min(config.block_size, n_tokens)
    B = max(1, min(batch_size, n_tokens // T))
    generator = torch.Generator().manual_seed(0)  # its own, so that the global random state stays as it is
    x = torch.randn(B, T, config.n_embd, generator=generator, requires_grad=True)
    targets = torch.randint(config.vocab_size, (B, T), generator=generator)
    rope = model.rope(slice(T))[0]
    parts = [(config.n_layer, block, lambda: block(x, rope).sum()), (1, head, lambda: head(x, targets))]

    seconds = {torch.float32: 0.0, torch.bfloat16: 0.0}
    block.eval()  # no dropout, which would draw random numbers; no counts of experts' tokens
    for times, module, forward in parts:
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        best = dict.fromkeys(seconds, math.inf)
        for dtype in 3 * [*seconds]:  # alternately, and the best of each: other programs disturb both alike
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = forward()
            torch.autograd.grad(loss, leaves, allow_unused=True)  # (top-1 routing, in evaluation, uses no router loss)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        seconds = {dtype: total + times * best[dtype] for dtype, total in seconds.items()}
    block.train()
    return seconds[torch.float32] / seconds[torch.bfloat16]
