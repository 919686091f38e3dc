"""Compiled training: one graph whatever the batches hold, the same losses and gradients, and a word when it ends."""

import pytest
import torch
from conftest import DATA, FAST, TINY, make_samples, make_text, write_jsonl
from torch._dynamo.utils import counters

from layers.experts import gradient_by_group, loop_over_groups, product_by_group
from model import ATTENTION, GPT, ModelConfig
from text.batches import Batch, TrainBatches
from text.token_files import TokenFile
from training.config import TrainConfig
from training.engine import Engine
from training.losses import next_token
from training.setup import build_run, problem_config
from training.sources import pad_to

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32}
EXPERTS = {"n_expert": 4, "n_hidden": 24}
IDS = ["text", "samples", "packed", "documents", "windows", "experts", "biased", "packed experts", "shortcut"]
OTHER_ATTENTION = [kind for kind in ATTENTION if kind != "full"]


@pytest.fixture
def files(work, call):
    """Documents of very different lengths, and samples that pack into a different number of rows each step."""
    (work / "dataset").mkdir()
    documents = [f"<|bos|>{make_text(5 + 23 * (i % 9), i)}<|eos|>" for i in range(120)]
    (work / "dataset" / "pretrain.txt").write_text("".join(documents), encoding="utf-8")
    write_jsonl(work / "dataset" / "sft.jsonl", make_samples(200))
    assert call("data.py", "--block_size", "32").status == 0
    return {stage: TokenFile(f"dataset/{stage}_train.bin") for stage in ("pretrain", "sft")}


@pytest.mark.parametrize(
    ("stage", "shape", "options"),
    [
        ("pretrain", {}, {}),
        ("sft", {}, {}),
        ("sft", {}, {"pack_samples": True}),
        ("pretrain", {}, {"mask_documents": True}),
        ("pretrain", {"attention_window": [8, 0]}, {}),
        ("pretrain", EXPERTS, {}),
        ("pretrain", {**EXPERTS, "expert_balance": "bias"}, {}),
        ("sft", EXPERTS, {"pack_samples": True}),
        ("pretrain", {**EXPERTS, "n_shared_expert": 1, "shortcut_experts": True}, {}),
        ("pretrain", {"n_future": 3}, {}),
        ("sft", {"n_future": 3}, {"pack_samples": True}),
        *(("sft", {"attention": [kind, "full"]}, {"pack_samples": True}) for kind in OTHER_ATTENTION),
    ],
    ids=[*IDS, "multi-token", "packed multi-token", *OTHER_ATTENTION],
)
def test_a_compiled_model_is_one_graph_with_the_same_gradients(files, stage, shape, options):
    """No graph break, and nothing new to compile after the second step; graphs run by autograd, not by inductor."""
    file = files[stage]
    shared = {"vocab_size": file.header["vocab_size"], "block_size": 32}
    batches = TrainBatches(
        [file], batch_size=6, accumulation_steps=1, seed=1, pad_to=32, is_compiled=True, **shared, **options
    )
    torch.manual_seed(0)
    model, plain = GPT(ModelConfig(**SHAPE | shared | shape)), GPT(ModelConfig(**SHAPE | shared | shape))
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend="aot_eager")
    graphs = []
    for step in range(7):
        (batch,) = batches.at(6 * step)
        losses = []
        for network in (model, plain):
            network.zero_grad()
            loss = next_token(network, batch, "sum")
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert graphs[0] == 1 and graphs[1] <= 2 and graphs[1] == graphs[-1], graphs


def test_products_by_group_have_the_gradient_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 5), (3, 5, 7)))
    counts = torch.tensor([4, 0, 5])
    inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    expected = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    dy = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    product_by_group(*inputs, counts).backward(dy)
    loop_over_groups(*expected, counts).backward(dy)
    for ours, theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.library.opcheck(product_by_group, (*inputs, counts))
    torch.library.opcheck(gradient_by_group, (x, dy, counts))


@torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False, fail_on_recompile_limit_hit=True)
def test_a_model_that_must_be_compiled_too_often_goes_on_without_and_says_so(capsys):
    torch._dynamo.reset()
    engine = Engine(TrainConfig(device="cpu", compile="true"))
    model = GPT(ModelConfig(vocab_size=11, **SHAPE))
    engine.model = engine.network = model
    model.compile(backend="eager")
    engine.compiled.append(model)
    idx = torch.arange(30)[None] % 11
    loss = lambda network, batch, reduction: network(idx[:, :batch], idx[:, :batch])[1]  # noqa: E731
    values = [engine.compute_loss(loss, length, "sum").item() for length in (5, 6, 7, 8, 9)]
    assert "compile: not possible here" in capsys.readouterr().err
    assert not engine.use_compile and model._compiled_call_impl is None
    assert values == pytest.approx([model(idx[:, :n], idx[:, :n])[1].item() for n in (5, 6, 7, 8, 9)])


def test_experts_of_any_size_train(work, call, prepared):
    """Sizes that are no multiple of 16 bytes, and LoRA of rank 1 on experts: no kernel takes them."""
    experts = ["--n_expert", "4", "--n_hidden", "30", *TINY, "--eval_iters", "1", "--optimizer", "adamw"]
    result = call("train.py", "-t", "pretrain", *experts, *FAST, "--max_steps", "2")
    assert result.status == 0, result.err
    for rank in ("1", "2", "6"):
        options = [*DATA, "--use_lora", "true", "--lora_rank", rank, "--from_checkpoint", "checkpoint/pretrain.pt"]
        result = call("train.py", "-t", "pretrain", *options, *FAST, "--max_steps", "2", "--stage", f"rank{rank}")
        assert result.status == 0, result.err


@torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False, fail_on_recompile_limit_hit=True)
def test_only_the_training_step_is_compiled(work, call):
    """Exact match and rollouts meet prompts of every length: they run uncompiled, in the precision of training."""
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--device", "cpu"]
    assert call("problem.py", "copy", "--length", "1-8", *shape, "--max_steps", "1").status == 0
    given = {"loss": "grpo", "length": "1-8", "device": "cpu", "batch_size": 32, "eval_iters": 8}
    asked = problem_config("copy", {**given, "from_checkpoint": "checkpoint/problem_copy.pt"})
    run = build_run(asked, Engine(asked.training))
    torch._dynamo.reset()
    counters.clear()
    run.model.compile(backend="eager")
    accuracy = run.source.metrics()["accuracy"]
    batches = [run.batches.at(i * run.batches.samples_per_step)[0] for i in range(8)]
    assert 0 <= accuracy <= 1 and len({batch.idx.shape for batch in batches}) > 3
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize(
    ("options", "masked"),
    [({}, False), ({"attention_window": [24]}, True), (EXPERTS, False)],
    ids=["plain", "masked", "experts"],
)
def test_batches_of_few_lengths_take_few_graphs(options, masked):
    """Fine-tuning's: a quarter of the window each. One graph for the first length, one for all that follow."""
    assert [pad_to(block_size, True) for block_size in (16, 64, 100, 1024)] == [16, 16, 32, 256]
    assert pad_to(1024, False) == 16
    config = {**SHAPE, "n_layer": 1, "block_size": 64, "vocab_size": 50, **options}
    torch.manual_seed(0)
    model, plain = GPT(ModelConfig(**config)), GPT(ModelConfig(**config))
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend="aot_eager")
    graphs = []
    for T in (64, 16, 48, 32, 64):
        idx, targets = torch.randint(1, 50, (2, 5, T))
        documents = (torch.rand(5, T) < 0.1).cumsum(1) if masked else None
        batch = Batch(idx, targets, (torch.rand(5, T) < 0.5).float(), 1, documents)
        losses = []
        for network in (model, plain):
            network.zero_grad()
            losses.append(loss := next_token(network, batch, "sum"))
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1] <= 3, graphs
