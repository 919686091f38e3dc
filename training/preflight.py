"""Before the first step: what is about to be trained, on what, and which settings cannot make sense."""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from base.configuration import UserError
from base.devices import device_name, dtype_name, synchronise
from layers.head import logits_at_once
from layers.masks import attention_mask, block_masks
from model import GPT, Attention, ModelConfig
from training.engine import Engine


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of a matrix product in FLOP/s: the ceiling that model FLOPs are compared with."""
    n = 4096 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)  # its own: training's random numbers are not touched
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    return 2 * n**3 / best_seconds(device, lambda: a @ a)


def best_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes at its fastest, of 24 times or as many as half a second has room for."""
    best = math.inf
    deadline = time.perf_counter() + 0.5  # half precision can be a hundred times slower on an old CPU
    for _ in range(24):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() > deadline:
            break
    return best


def trained_parameters(model: GPT) -> int:
    """How many weights the optimizer moves: all, or those of an adapter."""
    if all(p.requires_grad for p in model.parameters()):
        return model.parameter_count()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def memory_estimate(run: Any, batch_size: int) -> float:
    """Bytes that training takes, roughly: weights, gradients, optimizer states, and one micro-batch's activations.

    Activations are counted as the tensors that the backward pass of each layer keeps, as in Korthikanti et al. 2022
    (arXiv:2205.05198), for a memory-efficient attention kernel.
    """
    model, config, engine = run.model, run.model.config, run.engine
    states = {"adamw": 2, "muon": 1, "sgd": 1}[run.config.optimizer]
    trained = trained_parameters(model)
    weights = 4 * (model.parameter_count() + trained * (1 + states))
    size = torch.finfo(engine.dtype).bits // 8
    mlp_tensors = 5 if config.mlp == "swiglu" else 2
    per_token = config.n_layer * (18 * config.n_embd + mlp_tensors * config.n_hidden) * size
    n_logits = batch_size * config.block_size * config.vocab_size
    if run.config.loss == "next_token":
        n_logits = min(n_logits, logits_at_once(engine.device))
    return weights + batch_size * config.block_size * per_token + n_logits * (size + 8)  # float32 copy, its gradient


def memory_total() -> float:
    """Bytes of the machine's memory; inf where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def check_size(config: ModelConfig) -> None:
    """Raises UserError for a network whose weights alone are more than the machine's memory."""
    with torch.device("meta"):
        n_bytes = 4 * GPT(config).parameter_count()
    if n_bytes > memory_total():
        raise UserError(
            f"the weights alone would take {n_bytes / 1e9:,.0f} GB, this machine has {memory_total() / 1e9:,.0f}: "
            "lower n_embd, n_hidden or n_layer"
        )


def memory_available(device: torch.device) -> float | None:
    """Free bytes on the device, where they can be asked for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def choose_attention(config: Any, model: GPT, engine: Engine) -> None:
    """Have masks computed by flex attention where a compiled model on CUDA has them and it works; else by SDPA."""
    has_windows = any(0 < window < model.config.block_size for window in model.windows)
    if engine.device.type != "cuda" or not (config.mask_documents or config.pack_samples or has_windows):
        return
    if config.sdp_kernel == "flash":
        raise UserError("sdp_kernel flash takes no masks (attention_window, mask_documents, pack_samples): use auto")
    if config.sdp_kernel == "auto" and engine.use_compile:
        reason = flex_attention_problem(model.config, engine)
        model.use_flex = not reason
        if reason and engine.is_main:
            print(f"flex attention: not here ({reason}); masks go to SDPA", file=sys.stderr)


def flex_attention_problem(config: ModelConfig, engine: Engine) -> str:
    """Why flex attention cannot train a network of this shape on the engine's device; empty where it can.

    Tried, as the answer lies in the card, the size of the heads, torch and the compiler: a window of two documents,
    forward and backward, against SDPA.
    """
    device, T, causal = engine.device, min(256, config.block_size), config.is_causal
    layer = Attention(config, 0).to(device).eval()
    x = torch.randn(1, T, config.n_embd, generator=torch.Generator().manual_seed(0)).to(device)
    documents = (torch.arange(T, device=device) >= T // 3).long()[None]

    def with_gradient(attention: torch.nn.Module, mask: Any) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        with engine.autocast():
            y = attention(leaf, None, mask)
        y.float().square().sum().backward()
        return torch.cat((y.detach().float().flatten(), leaf.grad.flatten()))

    expected = with_gradient(layer, attention_mask(T, 0, 0, causal, documents, device))
    try:
        got = with_gradient(torch.compile(layer), block_masks(T, {0}, causal, documents, device)[0])
    except Exception as error:  # no triton, too little shared memory, heads too narrow: each fails in its own way
        return type(error).__name__
    away = ((got - expected).norm() / expected.norm()).item()
    return "" if away < 0.03 else f"{away:.1%} away from SDPA's result"  # bfloat16 is up to 1% away


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had, on a GPU or by the CPU's allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def out_of_memory_advice(run: Any) -> str:
    """For a run that ran out of memory: which sizes to lower, and by about how much."""
    config, shape = run.config, run.model.config
    needed, fixed = memory_estimate(run, config.batch_size), memory_estimate(run, 0)
    each = (needed - fixed) / config.batch_size
    said = f"out of memory at batch_size {config.batch_size}, block_size {shape.block_size}: "
    said += f"about {fixed / 1e9:.2f} GB for weights and optimizer, {each / 1e9:.3f} GB for each sample"
    if config.batch_size == 1:
        return f"{said}; lower block_size, n_embd or n_layer, or use train_ddp.py --fsdp true on several devices"
    half = config.batch_size // 2
    return (
        f"{said}; halve batch_size to {half} and double gradient_accumulation_steps to "
        f"{2 * config.gradient_accumulation_steps} (the same step in {each * half / 1e9:.2f} GB less), "
        "or lower block_size or n_embd"
    )


def report(run: Any) -> None:
    """Print the set-up of a train.Run in a few lines, then the warnings; measures the device's rate on the way."""
    config, model, engine, batches = run.config, run.model, run.engine, run.batches
    run.matmul_flops = matmul_flops(engine.device, engine.dtype)
    tokens_per_step = batches.samples_per_step * model.config.block_size
    needed = memory_estimate(run, config.batch_size)
    if engine.device.type == "cpu" and needed > 2 * memory_total():
        raise UserError(out_of_memory_advice(run))
    available = memory_available(engine.device)
    print(
        f"{config.stage}: {model.parameter_count() / 1e6:.2f}M parameters, "
        + (f"{trained_parameters(model):,} of an adapter trained, " if config.use_lora else "")
        + f"{model.flops_per_token() / 1e6:.1f} MFLOP per token, vocabulary {model.config.vocab_size:,}"
    )
    epoch = "samples without end"
    if batches.samples_per_epoch is not None:
        steps = batches.samples_per_epoch / batches.samples_per_step
        epoch = f"epoch: {batches.samples_per_epoch:,} samples in {steps:,.1f} steps"
    print(
        f"step: {config.batch_size} x {config.gradient_accumulation_steps} samples, up to {tokens_per_step:,} tokens; "
        f"{epoch}"
    )
    print(
        f"device: {device_name(engine.device)}, {dtype_name(engine.dtype)}, "
        f"attention {config.sdp_kernel}{', flex for masks' if model.use_flex and engine.use_compile else ''}, "
        f"compile {str(engine.use_compile).lower()}, "
        f"matrix product {run.matmul_flops / 1e9:,.0f} GFLOP/s; memory: about {needed / 1e9:.2f} GB"
        + (f" of {available / 1e9:.1f} GB free" if available else "")
    )
    for line in baseline_lines(run):
        print(line)
    if run.is_resumed:
        print(
            f"continues {config.from_checkpoint} at step {run.state.step:,}, "
            f"best validation loss {run.state.best_val_loss:.4f}"
        )
        if run.changes:
            print(f"changed since then: {', '.join(run.changes)}")
    elif config.from_checkpoint:
        print(f"starts from the weights of {config.from_checkpoint}")
    for warning in warnings(run, needed, available):
        print(f"warning: {warning}", file=sys.stderr)


def baseline_lines(run: Any) -> list[str]:
    """What a model has to beat, from the validation file's header."""
    if run.source.tokens_per_character is None:
        return []
    baselines = run.source.baselines
    ratio = run.source.tokens_per_character / math.log(2)
    parts = [
        f"{name} {baselines[name]:.3f} ({baselines[name] * ratio:.2f} bits/character)"
        for name in ("uniform", "unigram")
    ]
    for name in ("zlib", "lzma"):
        value = baselines.get(f"{name}_bits_per_character")
        if value is not None:
            parts.append(f"{name} {value:.2f} bits/character")
    return ["to beat: " + ", ".join(parts)]


def warnings(run: Any, needed: float, available: float | None) -> list[str]:
    """Settings that cannot make sense, one line each."""
    config, model, batches = run.config, run.model, run.batches
    found = []
    if available and needed > available:
        found.append("this may not fit the memory: lower batch_size and raise gradient_accumulation_steps")
    for dataset in getattr(run.validation, "datasets", []):
        tokens = getattr(dataset, "tokens", None)
        if tokens is not None and len(tokens) < model.config.block_size + 1:
            found.append(f"the validation text ({len(tokens)} tokens) is shorter than one window: a poor measure")
    for dataset in [*getattr(batches, "datasets", []), *getattr(run.validation, "datasets", [])]:
        n_overlong = getattr(dataset, "n_overlong", 0)
        if n_overlong:
            did = "dropped" if config.overlong == "drop" else "cut"
            found.append(f"{dataset.file.path}: {n_overlong} samples longer than block_size + 1 are {did} (overlong)")
    n_tokens = sum(len(getattr(dataset, "tokens", ())) for dataset in getattr(batches, "datasets", []))
    if n_tokens and model.parameter_count() > 10 * n_tokens:
        found.append(
            f"the model has {model.parameter_count() / n_tokens:.0f} weights per token of data: it will learn by heart"
        )
    if config.max_steps and config.warmup_iters >= config.max_steps:
        found.append(f"warmup_iters ({config.warmup_iters}) is not over before max_steps ({config.max_steps})")
    decays = config.decay_lr and config.lr_schedule != "constant"
    if config.max_steps and decays and config.lr_decay_iters > 1.1 * config.max_steps:
        found.append(f"lr_decay_iters ({config.lr_decay_iters}) is beyond max_steps ({config.max_steps}): no cool-down")
    return found


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Warn of a new model that does not start near the loss of guessing, ln(vocab_size)."""
    expected = math.log(vocab_size)
    if abs(loss - expected) > 1.0:
        print(
            f"warning: the first loss is {loss:.2f}, far from ln(vocab_size) = {expected:.2f}: "
            "odd data, or an odd initialisation",
            file=sys.stderr,
        )


def check_learning(run: Any, steps: int = 100) -> None:
    """Overfit one micro-batch: a set-up that can learn drives its loss down. Raises UserError where it does not."""
    engine = run.engine
    batch = run.batches.at(0)[0]
    losses = []
    began = time.perf_counter()
    for step in range(steps):
        losses.append(engine.forward_backward(run.loss, batch, batch.count, is_last=True).item())
        engine.step(min(1.0, (step + 1) / 10))
        if losses[-1] < 0.2 * losses[0] or time.perf_counter() - began > 120:
            break
    verdict = f"one batch of {len(batch.idx)}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps"
    if not losses[-1] < 0.5 * losses[0]:
        raise UserError(f"check failed: {verdict}; try another learning_rate, or look at the data (data.py --inspect)")
    print(f"check passed: {verdict}")
