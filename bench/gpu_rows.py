"""The rows of bench/gpu.py: what is run and measured on a card, one function a row, in the order of ROWS."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention_kernels import measure_kernels  # noqa: E402
from generate_speed import speed  # noqa: E402
from measuring import peak_bytes, seconds_of  # noqa: E402
from plain_gpt import plain_step  # noqa: E402

from base.devices import find_dtype  # noqa: E402
from layers.compiled_step import CompiledStep  # noqa: E402
from layers.masks import attention_mask, block_masks  # noqa: E402
from model import GPT, ModelConfig  # noqa: E402
from text.batches import prefetch_steps  # noqa: E402

Line = tuple[str, str, str]  # of the table: what; here; beside it


class NotHere(Exception):
    """A row that this machine cannot run: what is missing."""


@dataclasses.dataclass
class Shape:
    """A model and the batches that it is trained on."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int
    steps: int  # that are measured, after WARM_UP

    def flags(self) -> list[str]:
        names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
        return [part for name in names for part in (f"--{name}", str(getattr(self, name)))]

    def config(self, **changes: Any) -> ModelConfig:
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        return ModelConfig(**{name: getattr(self, name) for name in names} | changes)

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}, batch {self.batch_size} x {self.block_size:,}"


WARM_UP = 4
GPT2 = Shape(12, 12, 768, 1024, 16, 50304, steps=20)
SMALL = Shape(4, 12, 768, 1024, 16, 4096, steps=15)
TINY = Shape(1, 2, 32, 32, 4, 97, steps=2)


@dataclasses.dataclass
class Case:
    """Where the rows run, and whether with toy sizes."""

    device: torch.device
    is_tiny: bool

    @property
    def gpt2(self) -> Shape:
        return TINY if self.is_tiny else GPT2

    @property
    def small(self) -> Shape:
        return TINY if self.is_tiny else SMALL

    @property
    def dtype(self) -> torch.dtype:
        return find_dtype("auto", self.device)

    def needs_cuda(self, why: str) -> None:
        if self.device.type != "cuda":
            raise NotHere(f"needs CUDA: {why}")


# --------------------------------------------------------------------------------------------------- measuring


def matmul_flops(case: Case) -> float:
    """FLOP/s of a large matrix product in the precision of training."""
    n = 8192 if case.device.type == "cuda" else 256
    a = torch.randn(n, n, device=case.device, dtype=case.dtype)
    return 2 * n**3 / seconds_of(lambda: a @ a, case.device)


def bandwidth(case: Case) -> float:
    """Bytes per second of a copy on the device, read and written."""
    a = torch.zeros(1 << (30 if case.device.type == "cuda" else 22), dtype=torch.uint8, device=case.device)
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds_of(lambda: b.copy_(a), case.device)


def synchronisations(case: Case, work: Callable[[], Any]) -> int:
    """How often work() waits for the GPU."""
    if case.device.type != "cuda":
        work()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    for warning in waits:
        print(f"waits for the GPU: {warning.filename}, line {warning.lineno}")
    return len(waits)


def make_run(case: Case, shape: Shape, *options: str, make_engine: Any = None) -> Any:
    """A run of train.py on random text, in this folder; make_engine: of a TrainConfig, else the plain engine."""
    import train
    from training.engine import Engine

    prepare(shape)
    arguments = ["-t", "pretrain", *shape.flags(), "--device", str(case.device), "--optimizer", "adamw"]
    arguments += ["--gradient_accumulation_steps", "1", "--warmup_iters", "1", "--learning_rate", "1e-3", *options]
    args, overrides = train.make_parser().parse(arguments)
    asked = train.read_configs(args.training, args.model, overrides)
    return train.build_run(asked, (make_engine or Engine)(asked.training))


def prepare(shape: Shape) -> None:
    """Token files of random text for a shape, in this folder."""
    from measuring import make_text

    if not Path("dataset").exists():
        text = make_text(30 * shape.batch_size * shape.block_size + 2 * shape.vocab_size, shape.vocab_size - 6)
        Path("text.txt").write_text(text, encoding="utf-8")
        script("data.py", "text.txt")


def script(name: str, *options: str) -> None:
    """Run a script of the project; raises RuntimeError with the last line that it wrote if it fails."""
    job = subprocess.run([sys.executable, str(ROOT / name), *options], capture_output=True, text=True)
    print(job.stdout, job.stderr)
    if job.returncode:
        raise RuntimeError(f"{name}: {last_line(job.stderr)}")


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message").strip()


class Stepper:
    """Training steps of a run, taken as train.py's loop takes them: nothing is read from the device."""

    def __init__(self, run: Any) -> None:
        self.run, self.device = run, run.engine.device
        self.steps = prefetch_steps(run.batches, 0, pin_memory=self.device.type == "cuda")
        self.losses: list[torch.Tensor] = []

    def step(self) -> None:
        engine, micro_batches = self.run.engine, next(self.steps)
        count = sum(batch.count for batch in micro_batches)
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches, 1):
            loss += engine.forward_backward(self.run.loss, batch, count, is_last=i == len(micro_batches))
        self.losses.append(loss)
        engine.step(1.0)

    def tokens_per_s(self, n_steps: int) -> float:
        """After warm-up and compilation."""
        tokens = self.run.batches.samples_per_step * self.run.model.config.block_size
        speed = tokens / seconds_of(self.step, self.device, n_steps, WARM_UP)
        losses = torch.stack(self.losses).tolist()
        if not min(losses) < losses[0] or not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss does not fall: {losses[0]:.3f} -> {losses[-1]:.3f}")
        return speed


@contextlib.contextmanager
def one_process_job() -> Iterator[None]:
    """The environment of the only process of a job of torch.distributed."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    yield
    torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------- the rows


def tests(case: Case) -> list[Line]:
    """All tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    files = [str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_masks.py")]
    options = ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-k", "gpu", "-rfE"]
    if importlib.util.find_spec("xdist"):  # most of their time goes to compiling, on the CPU
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", *options, *files]
    job = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(job.stdout, job.stderr)
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in job.stdout.splitlines() if "FAILED" in line]
    return [("GPU tests", last_line(job.stdout or job.stderr).strip("= "), "; ".join(failed))]


def training(case: Case) -> list[Line]:
    """GPT-2 124M: speed beside a plain step in the same process, synchronisations, memory against the estimate."""
    from training.memory import memory_estimate

    shape, peak = case.gpt2, matmul_flops(case)
    gpt2 = ("--use_rope", "false", "--qk_norm", "false", "--norm", "layernorm", "--mlp", "gelu")
    same_network = Stepper(make_run(case, shape, "--beta2", "0.95", *gpt2)).tokens_per_s(shape.steps)
    run = make_run(case, shape, "--beta2", "0.95")
    stepper = Stepper(run)
    speed = stepper.tokens_per_s(shape.steps)
    n_waits = synchronisations(case, stepper.step)
    used = peak_bytes(case.device, stepper.step, is_total=True)
    estimate, flops = memory_estimate(run, shape.batch_size), speed * run.model.flops_per_token()
    del run, stepper
    sizes = shape.n_layer, shape.n_head, shape.n_embd, shape.block_size, shape.vocab_size
    step = plain_step(case.device, case.dtype, sizes, shape.batch_size)
    plain = shape.batch_size * shape.block_size / seconds_of(step, case.device, shape.steps, WARM_UP)
    plain_used = peak_bytes(case.device, step, is_total=True)
    what = f"training {shape}, vocabulary {shape.vocab_size:,}, {case.dtype}".replace("torch.", "")
    here = f"{speed:,.0f} tokens/s, {flops / peak:.0%} of the matrix product's {peak / 1e12:,.1f} TFLOP/s"
    estimated = f"estimated {estimate / 1e9:.2f} GB, ratio {estimate / used:.2f}; the plain step {plain_used / 1e9:.2f}"
    return [
        (what, here, f"a plain GPT-2 step: {plain:,.0f} tokens/s, ratio {speed / plain:.2f}"),
        ("the same with GPT-2's network", f"{same_network:,.0f} tokens/s", f"ratio {same_network / plain:.2f}"),
        ("synchronisations in a training step", f"{n_waits}", ""),
        ("memory of a training step", f"{used / 1e9:.2f} GB", estimated),
    ]


def kernels(case: Case) -> list[Line]:
    """Attention forward and backward by every kernel, relative to the first that runs."""
    shape = case.gpt2
    size = shape.batch_size, shape.n_head, shape.block_size, shape.n_embd // shape.n_head
    lines, first = [], None
    for name, measured in measure_kernels(size, case.device, case.dtype).items():
        if isinstance(measured, str):
            lines.append((f"attention by {name}", f"does not run here ({measured})", ""))
            continue
        seconds, taken = measured
        first = first or (name, seconds, taken)
        ratio = f"{seconds / first[1]:.2f} x the time of {first[0]}, {taken / first[2]:.2f} x the memory"
        lines.append((f"attention by {name}", f"{1e3 * seconds:.2f} ms, {taken / 1e6:,.0f} MB", ratio))
    return lines


def masked(case: Case) -> list[Line]:
    """Documents of a fifth of the window, and a sliding window of a quarter: flex attention beside SDPA with a mask."""
    case.needs_cuda("flex attention trains on GPUs alone")
    shape, device = case.gpt2, case.device
    B, T = shape.batch_size, shape.block_size
    size = B, shape.n_head, T, shape.n_embd // shape.n_head
    q, k, v = (torch.randn(size, device=device, dtype=case.dtype, requires_grad=True) for _ in range(3))
    documents = (torch.rand(B, T, device=device) < 5 / T).cumsum(1)
    compiled = torch.compile(flex_attention)

    def line(name: str, window: int, ids: torch.Tensor | None) -> Line:
        mask, make = (
            attention_mask(T, window, True, ids, device),
            lambda: block_masks(T, {window}, True, ids, device),
        )
        by_mask = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v, mask).sum().backward(), device)
        blocks = make()[window]
        by_flex = seconds_of(lambda: compiled(q, k, v, block_mask=blocks).sum().backward(), device)
        here = f"{1e3 * by_flex:.2f} ms, and {1e3 * seconds_of(make, device):.2f} ms a batch for the blocks"
        return f"{name} by flex attention", here, f"SDPA with a mask {1e3 * by_mask:.2f} ms"

    return [line("documents", 0, documents), line("windows", T // 4, None)]


def mixture(case: Case) -> list[Line]:
    """Eight experts of which two are active, beside a dense MLP of as many active weights."""
    shape = case.small
    width = 32 * max(1, round(8 / 3 * shape.n_embd / 64))
    dense = Stepper(make_run(case, shape, "--n_hidden", str(2 * width))).tokens_per_s(shape.steps)
    options = ["--n_expert", "8", "--n_expert_per_token", "2", "--n_hidden", str(width)]
    stepper = Stepper(make_run(case, shape, *options))
    speed, n_waits = stepper.tokens_per_s(shape.steps), synchronisations(case, stepper.step)
    what = f"mixture, 8 experts, 2 active, {shape}"
    return [
        (
            what,
            f"{speed:,.0f} tokens/s, {n_waits} synchronisations a step",
            f"dense {dense:,.0f}, ratio {speed / dense:.2f}",
        ),
        ("its outputs put together", *combining(case, shape)),
    ]


def combining(case: Case, shape: Shape) -> tuple[str, str]:
    """layers/experts.py adds the experts' outputs by index_add; beside it, by the inverse permutation."""
    n, k, width = shape.batch_size * shape.block_size, 2, shape.n_embd
    order = torch.rand(n * k, device=case.device).argsort()
    outputs = torch.randn(n * k, width, device=case.device, dtype=case.dtype, requires_grad=True)

    def by_adding() -> None:
        torch.zeros_like(outputs[:n]).index_add(0, order // k, outputs).sum().backward()

    def by_inverse() -> None:
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=case.device))
        outputs.index_select(0, inverse).view(n, k, width).sum(1).sum().backward()

    adding, inverse = seconds_of(by_adding, case.device), seconds_of(by_inverse, case.device)
    return f"index_add {1e3 * adding:.2f} ms", f"inverse permutation {1e3 * inverse:.2f} ms"


def ddp(case: Case) -> list[Line]:
    """DDP and FSDP with one process, beside the plain engine."""
    from train_ddp import DDPEngine, FSDPEngine

    shape = case.small
    plain = Stepper(make_run(case, shape)).tokens_per_s(shape.steps)
    lines = []
    for engine, options in ((DDPEngine, []), (FSDPEngine, ["--fsdp", "true"])):
        with one_process_job():
            stepper = Stepper(make_run(case, shape, *options, make_engine=engine))
            speed, n_waits = stepper.tokens_per_s(shape.steps), synchronisations(case, stepper.step)
        here = f"{speed:,.0f} tokens/s, {n_waits} synchronisations a step"
        lines.append((f"{engine.__name__}, one process", here, f"plain {plain:,.0f}, ratio {speed / plain:.2f}"))
    return lines


def resumed(case: Case, run_script: Callable[[list[str]], None], *options: str) -> tuple[list[float], list[float]]:
    """The losses of eight steps at once, and of four and four after a resume, of a training script."""
    from measuring import newest_records

    prepare(shape := case.small)
    always = ["-t", "pretrain", *shape.flags(), "--device", str(case.device), "--optimizer", "adamw", *options]
    always += ["--gradient_accumulation_steps", "1", "--eval_iters", "1", "--lr_decay_iters", "8", "--dropout", "0.1"]
    losses: dict[str, list[float]] = {"whole": [], "parts": []}
    for stage, n_steps, start in (("whole", "8", ""), ("parts", "4", ""), ("parts", "8", "checkpoint/parts_last.pt")):
        run_script([*always, "--stage", stage, "--max_steps", n_steps, "--from_checkpoint", start])
        losses[stage] += [record["loss"] for record in newest_records() if record["type"] == "train"]
        for log in Path().glob("train_*.log"):
            log.unlink()
    return losses["whole"], losses["parts"]


def difference(a: list[float], b: list[float]) -> str:
    """Of two lists of losses that should be the same."""
    if len(a) != len(b):
        raise RuntimeError(f"{len(a)} losses and {len(b)}")
    return f"{a[-1]:.4f} and {b[-1]:.4f}, largest difference {max(abs(x - y) for x, y in zip(a, b, strict=True)):.1e}"


def resume(case: Case) -> list[Line]:
    """train.py as users run it: eight steps at once, and with a resume between, with dropout and an evaluation."""
    import train
    from training.engine import Engine

    losses = resumed(case, lambda options: train.run_command(*train.make_parser().parse(options), Engine))
    return [("8 steps at once, and 4 + 4 resumed", difference(*losses), "the same losses, with dropout")]


def deepspeed(case: Case) -> list[Line]:
    """The same by DeepSpeed without ZeRO, whose FusedAdam is compiled at its first use."""
    case.needs_cuda("DeepSpeed's FusedAdam")
    if importlib.util.find_spec("deepspeed") is None:
        raise NotHere("deepspeed is not installed")
    options = "--deepspeed_config", "deepspeed_zero0"
    losses = resumed(case, lambda given: script("train_deepspeed.py", *given, *options))
    return [("the same by DeepSpeed's FusedAdam", difference(*losses), "the same losses")]


def half(case: Case) -> list[Line]:
    """float16 with a loss scale: it learns, and an overflow skips a step and lowers the scale."""
    shape = case.small
    run = make_run(case, shape, "--dtype", "float16")
    stepper = Stepper(run)
    speed = stepper.tokens_per_s(shape.steps)
    n_waits = synchronisations(case, stepper.step)
    scaler, before = run.engine.scaler, [p.detach().clone() for p in run.model.parameters()]
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
    stepper.step()
    is_kept = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    if not (is_kept and scaler.get_scale() == 2.0**59):
        raise RuntimeError(f"an overflow changed the weights, or left the scale at {scaler.get_scale():g}")
    first, last = stepper.losses[0].item(), stepper.losses[-2].item()
    here = f"{speed:,.0f} tokens/s, loss {first:.3f} -> {last:.3f}, {n_waits} synchronisations a step"
    return [(f"float16 with a loss scale, {shape}", here, "an overflow is skipped, and halves the scale")]


def generation(case: Case) -> list[Line]:
    """Tokens per second for one sequence and for 32, beside a loop without a cache; of what bandwidth allows."""
    shape, device = case.gpt2, case.device
    torch.manual_seed(0)
    model = GPT(shape.config()).to(device).eval()
    if device.type == "cuda":
        from weights.quantise import to_bfloat16

        model = to_bfloat16(model)
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = bandwidth(case) / n_bytes
    n_tokens = min(200, shape.block_size // 2)

    lines = []

    def measure(batch_size: int, how: str, step: CompiledStep | None = None) -> None:
        tokens, plain = speed(model, batch_size, n_tokens, True, step), without_cache[batch_size]
        here = f"{tokens:,.0f} tokens/s" + (f", {tokens / limit:.0%} of the bandwidth" if batch_size == 1 else "")
        what = f"generation, batch {batch_size}, {how}"
        lines.append((what, here, f"without a cache {plain:,.0f}, ratio {tokens / plain:.1f}"))

    without_cache = {batch_size: speed(model, batch_size, min(n_tokens, 50), False) for batch_size in (1, 32)}
    for batch_size in (1, 32):
        measure(batch_size, "as it is")
    step = CompiledStep(model)  # by CUDA graphs, on a card
    step.thread.join(80)
    if step.n_ready > n_tokens:
        measure(1, "compiled step", step)
    else:  # gpu.log may say why
        lines.append(("generation, batch 1, compiled step", "was not compiled within 80 s", ""))
    return lines


# by name: the function, and its time limit in seconds on a card. What matters most comes first
ROWS: dict[str, tuple[Callable[[Case], list[Line]], float]] = {
    "training": (training, 120),
    "kernels": (kernels, 40),
    "generation": (generation, 130),
    "tests": (tests, 150),
    "resume": (resume, 90),
    "half": (half, 45),
    "masked": (masked, 45),
    "mixture": (mixture, 75),
    "ddp": (ddp, 90),
    "deepspeed": (deepspeed, 150),
}
