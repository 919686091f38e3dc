"""Preflight checks: a summary of the run, its memory estimate and its baselines, and warnings about odd settings.

Whatever can be known before the first step is checked or printed here: a mistake should cost seconds, not hours.
check_learning() is the sanity check of train.py --check: can this set-up overfit a single batch?
"""

import math
import os
import sys
import time
import warnings as python_warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from base.configuration import UserError, command_line, fields_of
from base.devices import device_name, dtype_name, memory_available, memory_total, synchronise
from base.files import nearest_place
from layers.attention import Attention
from layers.masks import attention_mask, block_masks
from layers.sparse_attention import SparseAttention
from model import GPT, SDP_KERNELS, ModelConfig
from text.batches import Samples, Windows
from text.token_files import TokenFile
from training.advice import limits_reached, preparing_all
from training.engine import Engine
from training.losses import FIELDS_OF_LOSSES
from training.memory import CPU_RANGE, memory_estimate, trainable_count
from training.run_log import check_sinks


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


def check_size(config: ModelConfig) -> None:
    """Raises UserError for a model whose weights alone exceed the machine's memory."""
    with torch.device("meta"):  # shapes without storage
        n_bytes = 4 * GPT(config).parameter_count()
    if n_bytes > memory_total():
        raise UserError(
            f"the weights alone would take {n_bytes / 1e9:,.0f} GB, this machine has {memory_total() / 1e9:,.0f}: "
            "lower n_embd, n_hidden or n_layer"
        )


def choose_attention(config: Any, model: GPT, engine: Engine) -> None:
    """Choose the kernel of masked attention: flex attention for a compiled model on CUDA, if it works there, else SDPA.

    Block-diagonal masks (documents, packed samples) and sliding windows are sparse: flex attention skips the blocks of
    the (T, T) mask that are empty, SDPA computes them all.
    """
    has_windows = any(0 < window < model.config.block_size for window in model.config.windows)
    has_masks = config.mask_documents or config.pack_samples or has_windows
    has_masks |= config.loss == "diffusion"  # full attention would see padding
    is_masked = has_masks or SparseAttention in model.config.attention_classes
    if config.sdp_kernel == "flash" and is_masked and engine.device.type == "cuda":
        what = "attention_window, mask_documents, pack_samples, loss diffusion, attention sparse"
        raise UserError(f"sdp_kernel flash supports no masks ({what}): use auto")
    if config.sdp_kernel not in ("auto", "math"):
        check_kernel(config.sdp_kernel, model.config, engine)
    if engine.device.type != "cuda" or not has_masks:
        return
    has_copies = config.loss == "diffusion" and model.config.is_causal  # whose mask no BlockMask describes
    if config.sdp_kernel == "auto" and engine.use_compile and not has_copies:
        kinds = dict.fromkeys(kind for kind in model.config.attention_classes if kind.HAS_WINDOW)
        reason = next(filter(None, (flex_attention_problem(kind, model.config, engine) for kind in kinds)), "")
        model.use_flex = not reason
        if reason and engine.is_main:
            print(f"flex attention is not available here ({reason}); masks use SDPA", file=sys.stderr)


def check_kernel(name: str, config: ModelConfig, engine: Engine) -> None:
    """Raises UserError where an attention kernel does not run: that depends on device, precision and head size."""
    q = torch.zeros(1, config.n_head, 8, config.head_dim, device=engine.device, dtype=engine.dtype, requires_grad=True)
    try:
        with python_warnings.catch_warnings(), sdpa_kernel(SDP_KERNELS[name]):
            python_warnings.simplefilter("ignore")  # torch's reasons, many lines of them
            F.scaled_dot_product_attention(q, q, q, is_causal=config.is_causal).sum().backward()
    except RuntimeError:
        what = f"{device_name(engine.device)}, {dtype_name(engine.dtype)}, heads of {config.head_dim}"
        raise UserError(f"sdp_kernel {name} does not run here ({what}): use auto or math") from None


def flex_attention_problem(attention: type[Attention], config: ModelConfig, engine: Engine) -> str:
    """Why flex attention cannot train a model of this shape on the engine's device; empty if it can.

    Found by trial, as it depends on the GPU, the head size, torch and the compiler: forward and backward of one
    layer of this kind on two documents, compared with SDPA.
    """
    device, T, causal = engine.device, min(256, config.block_size), config.is_causal
    layer = attention(config, 0).to(device).eval()
    x = torch.randn(1, T, config.n_embd, generator=torch.Generator().manual_seed(0)).to(device)
    documents = (torch.arange(T, device=device) >= T // 3).long()[None]  # (1, T) document ids

    def output_and_gradient(attention: torch.nn.Module, mask: Any) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        with engine.autocast():
            y = attention(leaf, None, mask)
        y.float().square().sum().backward()
        return torch.cat((y.detach().float().flatten(), leaf.grad.flatten()))

    expected = output_and_gradient(layer, attention_mask(T, 0, causal, documents, device))
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
    low, high = (needed * factor / 1e9 for factor in CPU_RANGE)
    spread = f" ({low:.2f} to {high:.2f})" if engine.device.type == "cpu" else ""
    form = f"in blocks of {config.answer_block} tokens" if model.config.is_causal else "with full attention"
    print(
        f"{config.stage}: {model.parameter_count() / 1e6:.2f}M parameters, "
        + (f"{trainable_count(model):,} trainable (LoRA), " if config.use_lora else "")
        + (f"masked diffusion {form}, " if config.loss == "diffusion" else "")
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
        f"device: {device_name(engine.device)}, {dtype_name(engine.dtype)}"
        f"{f' ({run.dtype_reason})' if run.dtype_reason else ''}, "
        f"attention {config.sdp_kernel}{', flex for masks' if model.use_flex and engine.use_compile else ''}, "
        f"compile {str(engine.use_compile).lower()}, "
        f"matmul {run.matmul_flops / 1e9:,.0f} GFLOP/s; memory: about {needed / 1e9:.2f} GB{spread}"
        + (f" of {available / 1e9:.1f} GB available" if available else "")
    )
    for line in baseline_lines(run):
        print(line)
    if run.is_resumed:
        what = "bound" if config.loss == "diffusion" else "loss"
        best = f"best validation {what} {run.kept_best:.4f}"
        if run.evaluation_changes:
            reasons = ", ".join(run.evaluation_changes)
            best = f"its best validation {what} is not compared, as it was measured otherwise ({reasons})"
        elif math.isinf(run.kept_best):
            best = "no validation loss yet"
        print(f"resumes {config.from_checkpoint} at step {run.state.step:,}, {best}")
        if run.changes:
            print(f"changed since then: {', '.join(run.changes)}")
    elif config.from_checkpoint:
        print(f"starts from the weights of {config.from_checkpoint}" + "".join(f", {c}" for c in run.changes))
    for warning in warnings(run, needed, available):
        print(f"warning: {warning}", file=sys.stderr)


def baseline_lines(run: Any) -> list[str]:
    """Losses of trivial models, and what compressors reach, on the validation files (computed by data.py)."""
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


def check_outputs(config: Any, engine: Engine) -> None:
    """Raises UserError where checkpoints, the log or what log_to names could not be written. config: a TrainConfig.

    What this process does not write, it does not check: other hosts may lack the libraries and the folder.
    """
    if not config.stage.strip(". "):  # it names the files
        raise UserError(f"stage must be a plain name, got {config.stage!r}")
    if engine.is_main:
        check_sinks(config.log_to)
    folders = [("save_checkpoint_to", Path(config.save_checkpoint_to))] * (engine.is_main or engine.writes_shards)
    folders += [("the log", Path())] * engine.is_main
    for what, folder in folders:
        place = nearest_place(folder)
        if not place.is_dir():
            raise UserError(f"{what}: {place} is a file, not a folder")
        if not os.access(place, os.W_OK):
            raise UserError(f"{what}: the folder {place.absolute()} cannot be written to")


def fields_without_effect(run: Any) -> list[str]:
    """Fields that were set, but do nothing in this run: one line each."""
    config, datasets = run.config, getattr(run.batches, "datasets", ())
    changed = {name for name, field in fields_of(type(config)).items() if getattr(config, name) != field.default}
    losses = {name: losses for name, losses in FIELDS_OF_LOSSES.items() if config.loss not in losses}
    found = [f"{name} has no effect with loss {config.loss}" for name in losses if name in changed]
    if not config.use_lora:
        found += [f"{name} has no effect without --use_lora true" for name in sorted(changed) if name[:5] == "lora_"]
    if "sample_prompt" in changed and not config.sample_tokens:
        found.append("sample_prompt has no effect without sample_tokens")
    texts = [dataset for dataset in datasets if isinstance(dataset, Windows)]
    if config.mask_documents and not texts:
        found.append("mask_documents has no effect: it is for running text")
    elif config.mask_documents and not any(has_documents(dataset.file) for dataset in texts):
        found.append(f"mask_documents has no effect: no <|bos|> or <|eos|> delimits documents in {texts[0].file.path}")
    if config.loss == "diffusion" and config.answer_block > (window := run.model.config.block_size):
        found.append(f"answer_block {config.answer_block} is more than the window (block_size {window}) has")
    if config.on_spike == "rollback" and len(datasets) > 1:
        found.append("on_spike: where the curriculum goes on to its next file, the loss may jump as in a spike")
    if config.optimizer != "muon":
        found += [f"{name} has no effect without --optimizer muon" for name in sorted(changed) if name[:5] == "muon_"]
    if config.on_spike == "none":
        fields = ("max_rollbacks", "rollback_lr_factor")
        found += [f"{name} has no effect without --on_spike rollback" for name in fields if name in changed]
    if config.pack_samples and not any(isinstance(dataset, Samples) for dataset in datasets):
        found.append("pack_samples has no effect: it is for fine-tuning samples")
    return found


def layers_without_effect(shape: Any) -> list[str]:
    """What a model's fields say of layers that it does not have, or that they do not change: one line each."""
    found = []
    for name in ("attention", "attention_window"):
        if len(values := getattr(shape, name)) > shape.n_layer:
            rest = ", ".join(map(str, values[shape.n_layer :]))
            found.append(f"{name}: n_layer is {shape.n_layer}, so there is no layer for {rest}")
    if any(window >= shape.block_size for window in shape.attention_window):
        found.append(f"attention_window has no effect where it is block_size ({shape.block_size:,}) or longer")
    if shape.sparse_top_k and shape.sparse_block_size * shape.sparse_top_k >= shape.block_size:
        found.append(
            f"sparse_top_k {shape.sparse_top_k}: as many blocks as block_size ({shape.block_size:,}) has, which is "
            "full attention"
        )
    return found


def has_documents(file: TokenFile, chunk: int = 1 << 20) -> bool:
    """Whether the tokens of a text contain delimiters of documents; they may lie in a large file."""
    delimiters = [token for token in file.delimiters if token is not None]
    return any(np.isin(file.tokens[i : i + chunk], delimiters).any() for i in range(0, len(file.tokens), chunk))


def warnings(run: Any, needed: float, available: float | None) -> list[str]:
    """Settings that are likely mistakes, one line each."""
    config, model, batches = run.config, run.model, run.batches
    found = fields_without_effect(run)
    unknown = run.tokenizer.unknown_characters(config.sample_prompt) if config.sample_tokens else ""
    if unknown:
        found.append(f"sample_prompt: {unknown!r} is not in the vocabulary, and read as <|unknown|>")
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
    found += layers_without_effect(model.config)
    shape, width = model.config, max(model.rope_widths)
    turn = 2 * math.pi * shape.rope_theta ** (1 - 2 / width) if width else math.inf  # of the slowest pair, in tokens
    if shape.block_size > turn and shape.rope_theta < 10_000:
        found.append(
            f"rope_theta {shape.rope_theta:g}: after {turn:.0f} tokens all of RoPE's angles have come round, and "
            f"block_size is {shape.block_size:,}: --rope_theta 10000"
        )
    n_tokens = sum(len(getattr(dataset, "tokens", ())) for dataset in getattr(batches, "datasets", []))
    if n_tokens and model.parameter_count() > 10 * n_tokens:
        found.append(
            f"the model has {model.parameter_count() / n_tokens:.0f} weights per token of data: it will overfit"
        )
    found += unknown_tokens(run)
    if is_for_other_data(run):
        path = batches.datasets[0].file.path
        found.append(f"the plan was made for other data than {path} holds now: run plan.py again")
    enough = limits_reached(config, run.state)
    if "max_steps" in enough:
        where = f"at step {run.state.step} of {config.max_steps} (max_steps)"
        return [*found, f"the run is {where}: --max_steps {enough['max_steps']}"]
    if "max_minutes" in enough:
        used, limit = run.state.seconds / 60, config.max_minutes
        more = f"--max_minutes {enough['max_minutes']:g}"
        return [*found, f"the run has used {used:.3g} of {limit:g} minutes (max_minutes): {more}"]
    if config.max_steps and config.warmup_iters >= config.max_steps:
        found.append(
            f"warmup_iters ({config.warmup_iters}) is not below max_steps ({config.max_steps}): all steps are warm-up"
        )
    if config.decay_over == "time" and config.max_steps:
        found.append(
            f"max_steps ({config.max_steps}) may end the run before its time is over and the learning rate decayed "
            "(decay_over): --max_steps null"
        )
    decays = config.decay_lr and config.lr_schedule != "constant" and config.decay_over == "steps"
    if config.max_steps and decays and config.lr_decay_iters > 1.1 * config.max_steps:
        found.append(
            f"lr_decay_iters ({config.lr_decay_iters}) is above max_steps ({config.max_steps}): the decay is cut off"
        )
    if decays and config.min_lr == 0 and run.state.step >= config.lr_decay_iters:
        found.append(
            f"the learning rate is 0 from step {config.lr_decay_iters} on (lr_decay_iters, min_lr): nothing is learnt"
        )
    return found


def is_for_other_data(run: Any) -> bool:
    """Was the plan, if there is one, made for other data than it is trained on?"""
    planned_for, files = run.config.planned_for, [dataset.file for dataset in getattr(run.batches, "datasets", ())]
    return bool(planned_for) and any(file.header.get("preparation") != planned_for for file in files)


def prediction(run: Any) -> str:
    """What plan.py has predicted for this run, or why that does not count."""
    if run.config.prediction and is_for_other_data(run):
        return "planned for other data"
    if run.config.prediction and run.config.from_checkpoint and not run.is_resumed:
        return "not as it was planned (from_checkpoint)"
    return run.config.prediction


def unknown_tokens(run: Any) -> list[str]:
    """A warning about the token file of which the tokenizer knows least, where that is more than 1%."""
    files = {dataset.file for part in (run.batches, run.validation) for dataset in getattr(part, "datasets", ())}
    share, file = max(
        ((file.header["n_unknown"] / max(1, file.header["n_tokens"]), file) for file in files),
        key=lambda pair: pair[0],
        default=(0, None),
    )
    if share <= 0.01:
        return []
    return [
        f"{file.path}: {share:.0%} of its tokens are <|unknown|>, characters that the tokenizer lacks: give all stages "
        f"one tokenizer, `{preparing_all(file.path.parent)}`, then pretrain again"
    ]


def check_first_loss(loss: float, config: ModelConfig) -> None:
    """Warn if a new model does not start near ln(vocab_size), the cross-entropy of the uniform distribution."""
    expected = math.log(config.vocab_size)
    n_losses = 1 + config.future_loss_weight * (config.n_future > 1)  # the modules' mean, weighted, is added
    if abs(loss - n_losses * expected) > n_losses:
        print(
            f"warning: the first loss is {loss:.2f}, far from ln(vocab_size) = {expected:.2f}"
            f"{f' times {n_losses:g}, with that of n_future' if n_losses > 1 else ''}: "
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
        advice = "try another learning_rate"
        for dataset in run.batches.datasets[:1]:
            advice += f", or look at the data: `{command_line('data.py', '--inspect', str(dataset.file.path))}`"
        raise UserError(f"check failed: {result}; {advice}")
    if engine.is_main:
        print(f"check passed: {result}")
