"""Weights in fewer bytes, against arithmetic in float64 and against what the exact weights say."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from conftest import TINY, make_text
from other_programs import make_model

from model import ATTENTION
from weights import quantise
from weights.quantise import FEW_ROWS, KINDS, Int4Linear, Int8Linear, to_bfloat16, to_int4, to_int8, with_weights

SHAPES = {
    "default": {},
    "untied, grouped, biases": {"tie_embeddings": False, "n_kv_head": 2, "bias": True, "qk_norm": False},
    "experts": {"n_expert": 4, "n_shared_expert": 1},
    "layernorm, learned positions": {"norm": "layernorm", "use_rope": False, "mlp": "gelu"},
    "windows": {"attention_window": [8, 0]},
    **{kind: {"attention": [kind, "full"]} for kind in ATTENTION if kind != "full"},
    "odd widths": {"n_embd": 100, "n_head": 2, "n_hidden": 37},
}


@pytest.mark.parametrize("n_rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_in", [96, 36, 100, 20, 5])  # the kernel reads beyond rows of widths that it does not like
def test_a_layer_of_integers_is_its_product_in_float64(n_rows, bias, n_in):
    torch.manual_seed(0)
    linear = nn.Linear(n_in, 40, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0.0  # a row of zeros has no scale
    layer, x = Int8Linear(linear), torch.randn(n_rows, n_in)
    integers = layer.integers.double()[:, :n_in] * layer.scale.double()[:, None]
    assert (integers - linear.weight.double()).abs().max() <= linear.weight.abs().max() / 127 / 2 + 1e-6
    largest = layer.integers.abs().amax(1)
    assert largest[3] == 0 and (largest == 127).sum() == 39  # every row has a scale of its own
    exact = x.double() @ integers.T + (linear.bias.double() if bias else 0)
    error = (layer(x) - exact).abs().max()
    assert error < 2**-7 * exact.abs().max()  # x and the sums of few rows are bfloat16: 8 bits
    assert layer(x.view(1, n_rows, n_in)).shape == (1, n_rows, 40) and layer(x).dtype == torch.float32


def bfloat16(number: float) -> float:
    return torch.tensor(number).bfloat16().item()


def nearest(row: list[float]) -> list[float]:
    """A group of a row, each weight the nearest of 16 values that are spread evenly over its range: a naive loop."""
    step = bfloat16((max(row) - min(row)) / 15)
    middle = bfloat16(min(row) + 8 * step)
    values = [middle + step * i for i in range(-8, 8)]
    return [min(values, key=lambda value: abs(value - weight)) for weight in row]


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("n_rows", [1, 3, 100])
@pytest.mark.parametrize(("n_in", "n_out", "bias"), [(96, 48, True), (32, 16, False), (36, 40, True), (5, 7, False)])
def test_a_layer_of_four_bits_is_its_product_in_float64(monkeypatch, has_kernel, n_rows, n_in, n_out, bias):
    """Without a kernel (on a GPU) the weights are expanded; then they are exact, and what goes in is not rounded."""
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0.0  # a group without a range
        linear.weight[2] *= 30  # rows have scales of their own, and groups too
        linear.weight[:, :32] *= 5
    if not has_kernel:
        monkeypatch.setattr(quantise, "FOUR_BIT_KERNEL", "no such operation")
    layer, x = Int4Linear(linear), torch.randn(n_rows, n_in)
    assert layer.has_kernel == has_kernel and layer.packed.dtype == torch.uint8
    padded = nn.functional.pad(linear.weight.detach(), (0, -n_in % 32)).double()
    groups = [[nearest(row[i : i + 32]) for i in range(0, len(row), 32)] for row in padded.tolist()]
    weights = torch.tensor(groups, dtype=torch.float64).flatten(1)[:, :n_in]
    exact = x.double() @ weights.T + (linear.bias.double() if bias else 0)
    size = (x.double()[:, None] * weights).norm(dim=-1)  # of a sum's terms, (n_rows, n_out)
    assert ((layer(x) - exact).abs() <= (2**-6 if has_kernel else 1e-5) * size + 1e-5).all()  # x in bfloat16: 8 bits
    assert layer(x.view(1, n_rows, n_in)).shape == (1, n_rows, n_out) and layer(x).dtype == torch.float32
    if n_rows == 100 and n_in == 96:  # of 32 weights in 16 values, uniformly spread: the step's variance is a twelfth
        error = (weights - linear.weight.double()).std() / linear.weight.std()
        assert 0.01 < error < 0.06
        numbers = sum(t.numel() * t.element_size() for t in (layer.packed, layer.scale_and_zero))
        assert numbers == 5 / 8 * n_in * n_out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_rounded_models_say_nearly_the_same(shape, kind):
    model = make_model(50, std=0.1 if kind == "int4" else 0.15, **SHAPES[shape])
    rounded, found = with_weights(copy.deepcopy(model), kind)
    idx = torch.randint(50, (4, 40))
    with torch.no_grad():
        p, q = model(idx)[0].double().log_softmax(-1), rounded(idx)[0].double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()  # KL, in nats
    assert found == kind and 0 < divergence < (0.1 if kind == "int4" else 0.02)
    # token by token with the cache it is the same as in one pass
    tokens = torch.stack(list(rounded.generate(idx[:1], 20, temperature=0.0)), 1)
    whole = torch.cat([idx[:1], tokens], 1)
    with torch.no_grad():
        logits = rounded(whole)[0][0, 39:-1].float()
    lead = logits.topk(2).values
    clear = lead[:, 0] - lead[:, 1] > 0.2
    assert (logits.argmax(-1) == tokens[0])[clear].all() and clear.sum() >= 3


def test_what_is_not_rounded():
    model = make_model(50, n_expert=4)
    weights = to_int4(make_model(50, attention=["full", "latent"]))
    assert isinstance(weights.lm_head, Int8Linear) and isinstance(weights.blocks[1].attention.kv_up, Int8Linear)
    assert isinstance(weights.blocks[0].attention.qkv, Int4Linear) and isinstance(weights.blocks[0].mlp.up, Int4Linear)
    weights = to_int8(model)
    assert isinstance(weights.lm_head, Int8Linear) and isinstance(weights.blocks[0].attention.qkv, Int8Linear)
    assert isinstance(weights.blocks[0].mlp.router, nn.Linear)
    assert weights.token_embedding.weight.dtype == torch.float32
    rounded = to_bfloat16(make_model(50))
    assert rounded.rope_cos.dtype == torch.float32 and rounded.blocks[0].attention.qkv.weight.dtype == torch.bfloat16


def test_auto_takes_one_of_them_and_leaves_the_exact_weights_alone():
    model = make_model(50)
    before = copy.deepcopy(model.state_dict())
    chosen, kind = with_weights(model, "auto")
    assert kind in ("float32", "bfloat16", "int8") and (chosen is model) == (kind == "float32")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_perplexity_of_a_trained_model_stays_within_half_a_percent_and_two_with_four_bits(call, work):
    (work / "text.txt").write_text(make_text(6000), encoding="utf-8")
    assert call("data.py", "text.txt", "--block_size", "64").status == 0
    tune = ["--max_steps", "60", "--batch_size", "16", "--warmup_iters", "5", "--device", "cpu"]
    assert call("train.py", "-t", "pretrain", *TINY, "--n_embd", "64", "--block_size", "64", *tune).status == 0
    from text.token_files import TokenFile
    from weights.checkpointing import load_checkpoint, load_model

    ids = torch.from_numpy(TokenFile("dataset/pretrain_val.bin").tokens[: 8 * 64 + 1].astype("int64"))
    losses = {}
    for kind in KINDS:
        model = load_model(load_checkpoint("checkpoint/pretrain.pt"), "x").eval()
        model, _ = with_weights(model, kind)
        with torch.no_grad():
            losses[kind] = model(ids[:-1].view(8, 64), ids[1:].view(8, 64))[1].item()
    for kind, limit in {"bfloat16": 0.005, "int8": 0.005, "int4": 0.02}.items():
        assert abs(math.exp(losses[kind] - losses["float32"]) - 1) < limit, losses
    answers = {
        kind: call(
            "inference.py", "-m", "checkpoint/pretrain.pt", "-p", "the", "-t", "0", "-l", "20", "--weights", kind
        )
        for kind in (*KINDS, "auto")
    }
    assert all(answer.status == 0 and answer.out.strip() for answer in answers.values())
    assert "weights: " in answers["auto"].err and "weights" not in answers["int8"].err


def test_an_adapter_is_merged_before_rounding_and_not_changed_after(call, prepared):
    tune = ["--max_steps", "3", "--warmup_iters", "1", "--batch_size", "4", "--learning_rate", "1e-1"]
    assert call("train.py", "-t", "pretrain", *TINY, *tune, "--min_lr", "1e-3").status == 0
    lora = ["--use_lora", "true", "--from_checkpoint", "checkpoint/pretrain.pt", "--overlong", "cut", "--stage", "a"]
    assert call("train.py", "-t", "sft", *tune, *lora, "--min_lr", "1e-3").status == 0
    ask = ["inference.py", "-m", "checkpoint/pretrain.pt", "-p", "the cat", "-t", "0", "-l", "16"]
    plain = call(*ask, "--lora", "checkpoint/a_lora.pt").out
    rounded = call(*ask, "--lora", "checkpoint/a_lora.pt", "--weights", "int8")
    assert rounded.status == 0 and rounded.out.strip() and len(rounded.out) > len(plain) / 2
    from serving.text_generator import load_text_generator

    generator = load_text_generator("checkpoint/pretrain.pt", "cpu", False, weights="int8")
    with pytest.raises(ValueError, match="--weights float32"):
        generator.use_adapter("checkpoint/a_lora.pt")


@pytest.mark.parametrize("fastest", ["float32", "int8"])
def test_auto_keeps_an_adapter_that_can_be_changed_if_nothing_is_rounded(call, prepared, monkeypatch, fastest):
    tune = ["--max_steps", "3", "--warmup_iters", "1", "--batch_size", "4", "--learning_rate", "1e-1"]
    assert call("train.py", "-t", "pretrain", *TINY, *tune, "--min_lr", "1e-3").status == 0
    lora = ["--use_lora", "true", "--from_checkpoint", "checkpoint/pretrain.pt", "--overlong", "cut", "--stage", "a"]
    assert call("train.py", "-t", "sft", *tune, *lora, "--min_lr", "1e-3").status == 0
    from serving.text_generator import GenerationConfig, load_text_generator
    from weights import quantise

    is_rounded = lambda model: any(isinstance(module, Int8Linear) for module in model.modules())  # noqa: E731
    monkeypatch.setattr(quantise, "tokens_per_second", lambda m: 1.0 + (is_rounded(m) == (fastest == "int8")))
    answer = lambda generator: "".join(generator.answer("the cat", GenerationConfig(temperature=0.0, max_length=16)))  # noqa: E731
    base = answer(load_text_generator("checkpoint/pretrain.pt", "cpu", False))
    adapted = answer(load_text_generator("checkpoint/pretrain.pt", "cpu", False, adapter="checkpoint/a_lora.pt"))
    generator = load_text_generator("checkpoint/pretrain.pt", "cpu", False, (), "checkpoint/a_lora.pt", "auto")
    assert generator.weights == fastest and base != adapted
    if fastest == "float32":
        assert answer(generator) == adapted
        generator.use_adapter("")
        assert answer(generator) == base


def test_a_window_of_one_token_has_a_speed_too():
    assert with_weights(make_model(50, block_size=1), "auto")[1] in ("float32", "bfloat16", "int8")
