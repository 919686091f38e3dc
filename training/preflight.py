"""Preflight checks: a summary of the run, its memory estimate and its baselines, and warnings about odd settings.

Whatever can be known before the first step is checked or printed here: a mistake should cost seconds, not hours.
check_learning() is the sanity check of train.py --check: can this set-up overfit a single batch?
"""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from base.configuration import UserError
from base.devices import device_name, dtype_name, synchronise
from layers.head import logits_per_chunk
from layers.masks import attention_mask, block_masks
from model import GPT, Attention, ModelConfig
from training.engine import Engine


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of a matrix multiplication in FLOP/s: the practical peak that the MFU is relative to."""
    n = 4096 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)  # its own, so that the global random state stays as it is
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    return 2 * n**3 / best_seconds(device, lambda: a @ a)  # n^3 multiplications and as many additions


def best_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Shortest time in seconds of 24 calls of work(), or of as many as fit into half a second."""
    best = math.inf
    deadline = time.perf_counter() + 0.5  # half precision can be a hundred times slower than float32 on an old CPU
    for _ in range(24):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > deadline:
            break
    return best


def trainable_parameters(model: GPT) -> int:
    """Number of trainable parameters: all of them, or those of the LoRA adapter."""
    if all(p.requires_grad for p in model.parameters()):
        return model.parameter_count()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def memory_estimate(run: Any, batch_size: int) -> float:
    """Rough estimate of training memory in bytes: weights, gradients, optimizer states, one micro-batch's activations.

    Activations: the tensors that each layer keeps for the backward pass, counted as in Korthikanti et al. 2022
    (arXiv:2205.05198), with an attention kernel that does not keep the (T, T) attention weights.
    """
    model, config, engine = run.model, run.model.config, run.engine
    n_states = {"muon": 1, "sgd": 1}.get(run.config.optimizer, 2)  # moments per trainable parameter
    # weights, gradients and optimizer states are float32 (4 bytes) also under autocast; activations take its dtype
    fixed = 4 * (model.parameter_count() + trainable_parameters(model) * (1 + n_states))
    size = torch.finfo(engine.dtype).bits // 8
    mlp_tensors = 5 if config.mlp == "swiglu" else 2
    per_token = config.n_layer * (18 * config.n_embd + mlp_tensors * config.n_hidden) * size
    n_logits = batch_size * config.block_size * config.vocab_size
    if run.config.loss == "next_token" and engine.dtype != torch.float16:  # (float16 takes the logits at once)
        n_logits = min(n_logits, logits_per_chunk(engine.device))  # this loss computes them in chunks
    logits = n_logits * (size + 4 + 4)  # the logits, a float32 copy, its gradient
    return fixed + batch_size * config.block_size * per_token + logits


def memory_total() -> float:
    """Physical memory of the machine in bytes; inf where the platform does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def check_size(config: ModelConfig) -> None:
    """Raises UserError for a model whose weights alone exceed the machine's memory."""
    with torch.device("meta"):  # shapes without storage
        n_bytes = 4 * GPT(config).parameter_count()
    if n_bytes > memory_total():
        raise UserError(
            f"the weights alone would take {n_bytes / 1e9:,.0f} GB, this machine has {memory_total() / 1e9:,.0f}: "
            "lower n_embd, n_hidden or n_layer"
        )


def memory_available(device: torch.device) -> float | None:
    """Free memory of the device in bytes; None where the platform does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def choose_attention(config: Any, model: GPT, engine: Engine) -> None:
    """Choose the kernel of masked attention: flex attention for a compiled model on CUDA, if it works there, else SDPA.

    Block-diagonal masks (documents, packed samples) and sliding windows are sparse: flex attention skips the blocks of
    the (T, T) mask that are empty, SDPA computes them all.
    """
    has_windows = any(0 < window < model.config.block_size for window in model.windows)
    if engine.device.type != "cuda" or not (config.mask_documents or config.pack_samples or has_windows):
        return
    if config.sdp_kernel == "flash":
        raise UserError("sdp_kernel flash supports no masks (attention_window, mask_documents, pack_samples): use auto")
    if config.sdp_kernel == "auto" and engine.use_compile:
        reason = flex_attention_problem(model.config, engine)
        model.use_flex = not reason
        if reason and engine.is_main:
            print(f"flex attention is not available here ({reason}); masks use SDPA", file=sys.stderr)


def flex_attention_problem(config: ModelConfig, engine: Engine) -> str:
    """Why flex attention cannot train a model of this shape on the engine's device; empty if it can.

    Found by trial, as it depends on the GPU, the head size, torch and the compiler: forward and backward of one
    attention layer on two documents, compared with SDPA.
    """
    device, T, causal = engine.device, min(256, config.block_size), config.is_causal
    layer = Attention(config, 0).to(device).eval()
    x = torch.randn(1, T, config.n_embd, generator=torch.Generator().manual_seed(0)).to(device)
    documents = (torch.arange(T, device=device) >= T // 3).long()[None]  # (1, T) document ids

    def output_and_gradient(attention: torch.nn.Module, mask: Any) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        with engine.autocast():
            y = attention(leaf, None, mask)
        y.float().square().sum().backward()
        return torch.cat((y.detach().float().flatten(), leaf.grad.flatten()))

    expected = output_and_gradient(layer, attention_mask(T, 0, 0, causal, documents, device))
    try:
        actual = output_and_gradient(torch.compile(layer), block_masks(T, {0}, causal, documents, device)[0])
    except Exception as error:  # no triton, too little shared memory, unsupported head size: any exception
        return type(error).__name__
    relative_error = ((actual - expected).norm() / expected.norm()).item()  # up to 1% in bfloat16
    return "" if relative_error < 0.03 else f"relative error {relative_error:.1%} against SDPA"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is an out-of-memory error, of a GPU or of the CPU's allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def out_of_memory_advice(run: Any) -> str:
    """The error message of a run that is out of memory: what takes how much, and what to lower."""
    config, shape = run.config, run.model.config
    needed, fixed = memory_estimate(run, config.batch_size), memory_estimate(run, 0)
    per_sample = (needed - fixed) / config.batch_size
    text = f"out of memory at batch_size {config.batch_size}, block_size {shape.block_size}: "
    text += f"about {fixed / 1e9:.2f} GB for weights, gradients and optimizer, {per_sample / 1e9:.3f} GB per sample"
    if config.batch_size == 1:
        return f"{text}; lower block_size, n_embd or n_layer, or use train_ddp.py --fsdp true on several devices"
    half = config.batch_size // 2
    return (
        f"{text}; halve batch_size to {half} and double gradient_accumulation_steps to "
        f"{2 * config.gradient_accumulation_steps} (the same global batch in {per_sample * half / 1e9:.2f} GB less), "
        "or lower block_size or n_embd"
    )


def report(run: Any) -> None:
    """Print a summary of a training.setup.Run, then the warnings; measures the device's peak FLOP/s, for the MFU."""
    config, model, engine, batches = run.config, run.model, run.engine, run.batches
    run.matmul_flops = matmul_flops(engine.device, engine.dtype)
    tokens_per_step = batches.samples_per_step * model.config.block_size
    needed = memory_estimate(run, config.batch_size)
    if engine.device.type == "cpu" and needed > 2 * memory_total():
        raise UserError(out_of_memory_advice(run))
    available = memory_available(engine.device)
    print(
        f"{config.stage}: {model.parameter_count() / 1e6:.2f}M parameters, "
        + (f"{trainable_parameters(model):,} trainable (LoRA), " if config.use_lora else "")
        + f"{model.flops_per_token() / 1e6:.1f} MFLOPs per token, vocabulary {model.config.vocab_size:,}"
    )
    epoch = "samples are generated without end"
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
        f"matmul {run.matmul_flops / 1e9:,.0f} GFLOP/s; memory: about {needed / 1e9:.2f} GB"
        + (f" of {available / 1e9:.1f} GB free" if available else "")
    )
    for line in baseline_lines(run):
        print(line)
    if run.is_resumed:
        print(
            f"resumes {config.from_checkpoint} at step {run.state.step:,}, "
            f"best validation loss {run.state.best_val_loss:.4f}"
        )
        if run.changes:
            print(f"changed since then: {', '.join(run.changes)}")
    elif config.from_checkpoint:
        print(f"starts from the weights of {config.from_checkpoint}" + "".join(f", {c}" for c in run.changes))
    for warning in warnings(run, needed, available):
        print(f"warning: {warning}", file=sys.stderr)


def baseline_lines(run: Any) -> list[str]:
    """Losses of trivial models, and what compressors reach, on the validation file (computed by data.py)."""
    if run.source.tokens_per_character is None:
        return []
    baselines = run.source.baselines
    ratio = run.source.tokens_per_character / math.log(2)  # from nats per token to bits per character
    parts = [
        f"{name} {baselines[name]:.3f} ({baselines[name] * ratio:.2f} bits/character)"
        for name in ("uniform", "unigram")
    ]
    for name in ("zlib", "lzma"):
        value = baselines.get(f"{name}_bits_per_character")
        if value is not None:
            parts.append(f"{name} {value:.2f} bits/character")
    return ["baselines: " + ", ".join(parts)]


def warnings(run: Any, needed: float, available: float | None) -> list[str]:
    """Settings that are likely mistakes, one line each."""
    config, model, batches = run.config, run.model, run.batches
    found = []
    if available and needed > available:
        found.append("this may not fit into memory: lower batch_size and raise gradient_accumulation_steps")
    for dataset in getattr(run.validation, "datasets", []):
        tokens = getattr(dataset, "tokens", None)
        if tokens is not None and len(tokens) < model.config.block_size + 1:
            found.append(f"the validation text ({len(tokens)} tokens) is shorter than one window: a noisy estimate")
    for dataset in [*getattr(batches, "datasets", []), *getattr(run.validation, "datasets", [])]:
        n_overlong = getattr(dataset, "n_overlong", 0)
        if n_overlong:
            action = "dropped" if config.overlong == "drop" else "cut"
            found.append(
                f"{dataset.file.path}: {n_overlong} samples longer than block_size + 1 are {action} (overlong)"
            )
    n_tokens = sum(len(getattr(dataset, "tokens", ())) for dataset in getattr(batches, "datasets", []))
    if n_tokens and model.parameter_count() > 10 * n_tokens:
        found.append(
            f"the model has {model.parameter_count() / n_tokens:.0f} weights per token of data: it will overfit"
        )
    if config.max_steps and config.warmup_iters >= config.max_steps:
        found.append(
            f"warmup_iters ({config.warmup_iters}) is not below max_steps ({config.max_steps}): all steps are warm-up"
        )
    decays = config.decay_lr and config.lr_schedule != "constant"
    if config.max_steps and decays and config.lr_decay_iters > 1.1 * config.max_steps:
        found.append(
            f"lr_decay_iters ({config.lr_decay_iters}) is above max_steps ({config.max_steps}): the decay is cut off"
        )
    return found


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Warn if a new model does not start near ln(vocab_size), the cross-entropy of the uniform distribution."""
    expected = math.log(vocab_size)
    if abs(loss - expected) > 1.0:
        print(
            f"warning: the first loss is {loss:.2f}, far from ln(vocab_size) = {expected:.2f}: "
            "check the data and the initialisation",
            file=sys.stderr,
        )


def check_learning(run: Any, steps: int = 100) -> None:
    """Overfit one micro-batch: any set-up that can learn drives this loss down. Raises UserError if it stays high."""
    engine = run.engine
    if run.config.loss == "grpo":
        raise UserError("--check overfits a batch of given answers; with loss grpo the model makes its own")
    batch = run.batches.at(0)[0]  # on several processes, one of each
    (count,) = engine.sum_over_ranks(float(batch.count))
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        loss = engine.forward_backward(run.loss, batch, count, is_last=True).item()
        engine.step(min(1.0, (step + 1) / 10))  # ten steps of warm-up
        loss, late = engine.sum_over_ranks(loss, float(time.perf_counter() - start > 120))  # all end together
        losses.append(loss)
        if losses[-1] < 0.2 * losses[0] or late:
            break
    n_samples = len(batch.idx) * engine.world_size
    result = f"one batch of {n_samples}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps"
    if not losses[-1] < 0.5 * losses[0]:
        raise UserError(f"check failed: {result}; try another learning_rate, or look at the data (data.py --inspect)")
    if engine.is_main:
        print(f"check passed: {result}")
