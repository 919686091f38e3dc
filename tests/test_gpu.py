"""What could differ on a graphics card: these need one, and skip themselves elsewhere (all in under two minutes)."""

import copy
import math

import pytest
import torch
from conftest import DATA, FAST, TINY, asked_by, read_log
from processes import newest_log
from torch._dynamo.utils import counters

from layers import experts
from layers.cache import KVCache
from layers.compiled_step import CompiledStep
from layers.masks import takes_groups
from model import GPT, ModelConfig
from text.batches import Batch, prefetch_steps
from train_ddp import DDPEngine, FSDPEngine
from training.config import TrainConfig
from training.diffusion import masked_losses
from training.engine import Engine
from training.losses import next_token
from training.setup import build_run
from weights import lora
from weights.checkpointing import load_checkpoint, load_model, save_checkpoint
from weights.quantise import to_bfloat16, to_int8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is false")
DEVICE = "cuda"
SHAPE = {"vocab_size": 61, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products without TF32's rounding, until an engine asks for it."""
    yield
    torch.set_float32_matmul_precision("highest")


def make(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE | options))


def random_batch(seed: int = 0, T: int = 64, documents: bool = False) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    idx, targets = torch.randint(1, 61, (2, 8, T), generator=rng)
    ids = (torch.rand(8, T, generator=rng) < 0.1).cumsum(1) if documents else None
    return Batch(idx, targets, None, 8 * T, ids)


def make_engine(model: GPT | None = None, **fields) -> Engine:
    engine = Engine(TrainConfig(**{"device": DEVICE, "compile": "false", "dtype": "float32"} | fields))
    engine.prepare(model or make())
    return engine


def learn(engine: Engine, seed: int = 0) -> float:
    batch = random_batch(seed)
    loss = engine.forward_backward(next_token, batch, batch.count, is_last=True)
    engine.step(1.0)
    return loss.item()


def gradient(model: GPT, batch: Batch) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = next_token(model, batch, "sum")
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("options", "documents"),
    [
        ({}, False),
        ({"n_kv_head": 1}, False),
        ({"attention_window": [16, 0]}, True),
        ({"use_rope": False, "norm": "layernorm", "mlp": "gelu"}, False),
        ({"n_expert": 4, "n_hidden": 32}, False),
    ],
    ids=["default", "grouped", "masked", "gpt2", "experts"],
)
def test_loss_and_gradient_are_those_of_the_cpu(options, documents):
    model, batch = make(**options), random_batch(documents=documents)
    on_card = copy.deepcopy(model).to(DEVICE)
    loss, expected = gradient(model, batch)
    actual_loss, actual = gradient(on_card, batch.to(torch.device(DEVICE)))
    assert actual_loss == pytest.approx(loss, rel=1e-4)
    assert (actual - expected).norm() < 1e-3 * expected.norm()


def test_half_precision_learns_as_float32_does():
    curves = {}
    for dtype in ("float32", "bfloat16", "float16"):
        engine = make_engine(dtype=dtype, warmup_iters=0)
        curves[dtype] = [learn(engine, seed) for seed in range(20)]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.03)
    assert curves["float16"][-1] == pytest.approx(curves["float32"][-1], rel=0.05)


def test_grouped_queries_by_flash_attention_are_those_with_heads_repeated(monkeypatch):
    model, batch = make(n_kv_head=2).to(DEVICE), random_batch().to(torch.device(DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, expected = gradient(model, batch)
        monkeypatch.setattr("layers.attention.takes_groups", lambda *_: False)
        repeated_loss, actual = gradient(model, batch)
    q = torch.zeros(1, device=DEVICE, dtype=torch.bfloat16)
    assert takes_groups(q, None) and (DEVICE == "cpu" or not takes_groups(q, q))
    assert loss == pytest.approx(repeated_loss, rel=1e-3) and (actual - expected).norm() < 0.02 * expected.norm()


def test_a_mixture_takes_the_grouped_product_under_autocast(monkeypatch):
    model, batch = make(n_expert=4, n_hidden=32).to(DEVICE), random_batch().to(torch.device(DEVICE))
    loss, expected = gradient(model, batch)

    def refuse(*_):
        raise AssertionError("one product per expert")

    monkeypatch.setattr(experts, "loop_over_groups", refuse)
    with torch.autocast(DEVICE, torch.bfloat16):
        half_loss, actual = gradient(model, batch)
    assert half_loss == pytest.approx(loss, rel=0.01) and (actual - expected).norm() < 0.1 * expected.norm()


# ------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_waits_for_nothing(dtype):
    """With AdamW: from the pinned batch to the update, nothing is read from the card."""
    engine = make_engine(dtype=dtype)
    learn(engine)  # allocates the moments
    batch = random_batch(1).pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            engine.forward_backward(next_token, batch, batch.count, is_last=True)
            engine.step(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer, dtype):
    engine = make_engine(optimizer=optimizer, dtype=dtype)
    learn(engine)
    before = copy.deepcopy(engine.model.state_dict())
    batch = random_batch(1)
    engine.forward_backward(next_token, batch, batch.count, is_last=True)
    next(iter(engine.model.parameters())).grad[0, 0] = math.nan
    scale = engine.scaler.get_scale()
    assert not engine.step(1.0).isfinite()
    assert all(torch.equal(before[name], value) for name, value in engine.model.state_dict().items())
    assert engine.scaler.get_scale() == (scale / 2 if dtype == "float16" else scale)
    assert math.isfinite(learn(engine, 2))


def test_a_restored_engine_goes_on_as_the_one_that_was_saved(tmp_path):
    """Moments and the card's random numbers; the checkpoint is one that a machine without a card reads."""
    engine = make_engine(make(dropout=0.3))
    learn(engine)
    save_checkpoint(tmp_path / "a.pt", engine.state_dict())
    weights = torch.load(tmp_path / "a.pt", weights_only=True, map_location="cpu")
    expected = [learn(engine, seed) for seed in (1, 2)]
    other = make_engine(make(dropout=0.3))
    other.model.load_state_dict(weights["model"])
    other.load_state_dict(weights)
    assert [learn(other, seed) for seed in (1, 2)] == pytest.approx(expected, rel=1e-5)


def test_batches_are_pinned(prepared):
    run = build_run(asked_by("-t", "pretrain", *TINY, *FAST, *DATA), Engine(TrainConfig(device="cpu")))
    steps = prefetch_steps(run.batches, 0, pin_memory=True)
    batch = next(steps)[0]
    assert batch.idx.is_pinned() and batch.targets.is_pinned()
    assert torch.equal(batch.to(torch.device(DEVICE)).idx.cpu(), run.batches.at(0)[0].idx)
    steps.close()


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_compiled_model_is_compiled_for_a_few_lengths_alone(mask_documents):
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = make_engine(), make_engine(compile="true")
    assert compiled.use_compile
    graphs = []
    for seed, T in enumerate((64, 16, 48, 32, 64, 16, 48, 32)):
        batch = random_batch(seed, T, mask_documents)
        losses = [engine.forward_backward(next_token, batch, batch.count, True).item() for engine in (plain, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # (TF32)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1] <= 6  # a trial; the model and its loss for a first length, and for all others


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_compiled_loss_and_its_gradients_are_those_of_all_logits_at_once(tie_embeddings):
    torch._dynamo.reset()
    model, batch = make(tie_embeddings=tie_embeddings).to(DEVICE), random_batch().to(torch.device(DEVICE))
    mask = (torch.rand(batch.idx.shape, generator=torch.Generator().manual_seed(0)) < 0.7).long().to(DEVICE)
    model.zero_grad()
    expected = model(batch.idx, batch.targets, mask, "sum")[1]
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.03)):
        model.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = torch.compile(model)(batch.idx, batch.targets, mask, "sum", None, False)[1]
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 5)
        for name, p in model.named_parameters():
            assert (p.grad - gradients[name]).norm() < tolerance * gradients[name].norm(), name


@pytest.mark.parametrize("engine_class", [DDPEngine, FSDPEngine])
def test_one_process_of_a_job_learns_as_without_a_job(engine_class, monkeypatch):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fields = {"device": DEVICE, "dtype": "bfloat16", "compile": "false", "fsdp": engine_class is FSDPEngine}
    plain, engine = make_engine(dtype="bfloat16"), engine_class(TrainConfig(**fields))
    try:
        engine.prepare(make())
        curves = [[learn(each, seed) for seed in range(5)] for each in (plain, engine)]
        assert curves[1] == pytest.approx(curves[0], rel=0.01)
        assert engine.sum_over_ranks(1.5, 2.0) == [1.5, 2.0]
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("options", [[], ["--use_lora", "true"]], ids=["all weights", "lora"])
def test_a_run_resumes_on_a_card(prepared, call, options):
    shared = ["-t", "pretrain", *FAST[:4], "--warmup_iters", "2", *DATA, "--device", DEVICE, "--compile", "false"]
    shared += ["--eval_iters", "1", "--optimizer", "adamw"]
    assert call("train.py", *shared, *TINY, "--max_steps", "4").status == 0
    shared += ["--lr_decay_iters", "8", *options]
    start = ["--from_checkpoint", "checkpoint/pretrain.pt"] if options else TINY
    last = "checkpoint/parts_lora_last.pt" if options else "checkpoint/parts_last.pt"
    losses = []
    for stage, n_steps, given in (("whole", "8", start), ("parts", "4", start), ("parts", "8", None)):
        given = given or ["--from_checkpoint", last]
        result = call("train.py", *shared, *given, "--stage", stage, "--max_steps", n_steps)
        assert result.status == 0, result.err
        losses.append([record["loss"] for record in read_log(newest_log(prepared), "train")])
    assert losses[1] + losses[2] == pytest.approx(losses[0], rel=1e-4)
    if not options:  # what was trained on a card answers on a CPU
        model = load_model(load_checkpoint(last), last).eval()
        assert len(list(model.generate(torch.ones(1, 3, dtype=torch.long), 4))) == 4


def test_an_adapter_is_merged_on_a_card():
    model = make().to(DEVICE)
    lora.attach(model, {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": list(lora.TARGETS)})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    idx = random_batch().idx.to(DEVICE)
    expected = model(idx)[0]
    lora.merge(model)
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ inference


def test_greedy_answers_are_those_of_the_cpu():
    model = make(n_kv_head=2, attention_window=[16, 0]).eval()
    idx = random_batch().idx[:3, :20]
    expected = torch.stack(list(model.generate(idx, 60, temperature=0.0)))
    on_card = torch.stack(list(model.to(DEVICE).generate(idx.to(DEVICE), 60, temperature=0.0)))
    assert (on_card.cpu() == expected).float().mean() > 0.95  # a tie may fall the other way


def test_blocks_are_learnt_and_filled_in_as_on_the_cpu():
    model, batch = make(mask_token=True, n_kv_head=2, attention_window=[16, 0]), random_batch(documents=True)
    rng = torch.Generator().manual_seed(1)
    rate = torch.rand(8, 4, generator=rng).clamp(min=0.1).repeat_interleave(16, dim=1)
    noise, blocks = torch.rand(8, 64, generator=rng), (torch.arange(64) // 16).expand(8, 64)
    batch = batch._replace(loss_mask=torch.ones(8, 64), noise=noise, rate=rate, blocks=blocks)
    on_card = copy.deepcopy(model).to(DEVICE)
    losses, gradients = [], []
    for copied, part in ((model, batch), (on_card, batch.to(torch.device(DEVICE)))):
        loss = masked_losses(copied, part, part.rate, 61, "sum")
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in copied.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()
    idx, settings = batch.idx[:1, :20], {"temperature": 0.0, "block": 16}
    expected = torch.cat(list(model.eval().generate(idx, 60, **settings)))
    found = torch.cat(list(on_card.eval().generate(idx.to(DEVICE), 60, **settings)))
    assert (found.cpu() == expected).float().mean() > 0.9  # a tie may fall the other way


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_compiled_step_replays_what_the_plain_one_computes(n_rows):
    """For one text after another, each in a cache of its own, and beyond the window, where the cache begins anew."""
    torch._dynamo.reset()
    model = make(n_kv_head=2).eval().to(DEVICE)
    plain = copy.deepcopy(model)
    step = CompiledStep(model, n_rows)
    step.thread.join()
    assert step.n_ready == SHAPE["block_size"]
    for seed in (0, 1):
        idx = random_batch(seed).idx[:n_rows, :20].to(DEVICE)
        expected, actual = (torch.stack(list(plain.generate(idx, 90, temperature=0.0, step=s))) for s in (None, step))
        assert (expected == actual).float().mean() > 0.95  # a tie may fall the other way
        assert step.graph is not None


@pytest.mark.parametrize("convert", [lambda model: model, to_bfloat16, to_int8], ids=["float32", "bfloat16", "int8"])
def test_a_seed_draws_the_same_twice_with_every_kind_of_weights(convert):
    model = convert(make().eval()).to(DEVICE)
    idx = random_batch().idx[:2, :5].to(DEVICE)
    drawn = [torch.stack(list(model.generate(idx, 12, temperature=0.9, top_k=20, top_p=0.9, seed=5))) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].device.type == DEVICE


@pytest.mark.parametrize(("convert", "tolerance"), [(to_bfloat16, 0.05), (to_int8, 0.05)], ids=["bfloat16", "int8"])
def test_rounded_weights_predict_nearly_the_same(convert, tolerance):
    """With few rows and with many; RoPE's angles stay in float32, and keys and values are kept as they are computed."""
    exact = make().eval().to(DEVICE)
    rounded = convert(copy.deepcopy(exact))
    assert rounded.rope_cos.dtype == torch.float32
    for rows in (1, 8):
        idx = random_batch().idx[:rows].to(DEVICE)
        expected, actual = (model(idx)[0].float() for model in (exact, rounded))
        assert (actual - expected).norm() < tolerance * expected.norm()


def test_a_cache_lies_beside_the_weights():
    model = to_bfloat16(make().eval()).to(DEVICE)
    weight = model.token_embedding.weight
    cache = KVCache(model.config, 2, weight.device, weight.dtype)
    model.hidden(random_batch().idx[:2, :7].to(DEVICE), cache)
    assert cache.lengths.tolist() == [7, 7]
    assert all(t.device.type == DEVICE and t.dtype == torch.bfloat16 for t in cache.tensors())
