"""A compiled step against the plain forward pass; a backend that only traces compiles in a moment, one test in C++."""

import copy
import shutil
import warnings

import pytest
import torch
from other_programs import make_model
from torch._dynamo.utils import counters

from layers import compiled_step
from layers.compiled_step import CompiledStep
from model import ATTENTION
from weights.quantise import with_weights

SHAPES = {
    "default": {},
    "grouped, biases, untied": {"n_kv_head": 2, "bias": True, "tie_embeddings": False},
    "learned positions, layernorm": {"use_rope": False, "norm": "layernorm", "mlp": "gelu"},
    "windows": {"attention_window": [8, 0, 5], "n_layer": 3},
    **{
        kind: {"attention": [kind, "full"], "attention_window": [8 * attention.HAS_WINDOW, 0, 0, 5]} | {"n_layer": 4}
        for kind, attention in ATTENTION.items()
        if kind != "full"
    },
}


def make_step(model) -> CompiledStep:
    step = CompiledStep(copy.deepcopy(model))
    step.thread.join()
    return step


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its C++, so that it takes no time; what is traced is the same."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((shape, "float32") for shape in SHAPES), ("default", "int8"), ("latent", "int8"), ("default", "int4")],
)
def test_the_same_logits_as_in_one_pass_beyond_the_context_window(traced, shape, kind):
    model, _ = with_weights(make_model(50, block_size=24, **SHAPES[shape]), kind)
    step = make_step(model)
    assert step.n_ready == 24
    seen = []

    def recorded(tokens, cache):
        seen.append((int(cache.lengths[0]), step(tokens, cache)))
        return seen[-1][1]

    idx = torch.randint(50, (1, 5))
    tokens = torch.stack(list(model.generate(idx, 60, temperature=0.0, step=recorded)), 1)
    assert torch.equal(tokens, torch.stack(list(model.generate(idx, 60, temperature=0.0)), 1))
    with torch.inference_mode():  # until the window is full, what was read is the whole text
        whole = model(torch.cat([idx, tokens], 1)[:, :24])[0][0]
    assert [length for length, _ in seen[:19]] == list(range(5, 24)) and len(seen) > 45
    for length, logits in seen[:19]:
        torch.testing.assert_close(logits[0], whole[length], rtol=1e-4, atol=1e-4 if kind == "float32" else 0.1)


@pytest.mark.parametrize("windows", [[], [6, 14]])
def test_a_step_reads_what_is_used_of_a_long_window_and_is_compiled_once(traced, monkeypatch, windows):
    monkeypatch.setattr(compiled_step, "PLACES", 4)
    counters.clear()
    model = make_model(50, block_size=24, attention_window=windows)
    step, places = make_step(model), []
    forward = step.compiled
    step.compiled = lambda *inputs: places.append(len(inputs[2])) or forward(*inputs)
    idx = torch.randint(50, (1, 5))
    answers = [torch.stack(list(model.generate(idx, 18, temperature=0.0, step=s))) for s in (step, None)]
    assert torch.equal(*answers)
    assert places == [8] * 3 + [12] * 4 + [16] * 4 + [20] * 4 + [24] * 2
    assert counters["stats"]["unique_graphs"] <= 2 + len(windows)  # a window is full, or not yet


def test_in_cpp_and_from_a_thread():
    if not shutil.which("g++") and not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    model = make_model(50, n_layer=1)
    step, idx = make_step(model), torch.randint(50, (1, 5))
    assert step.n_ready == model.config.block_size
    answers = [torch.stack(list(model.generate(idx, 40, temperature=0.0, step=s))) for s in (step, None)]
    assert torch.equal(*answers)


def test_until_it_is_ready_generation_goes_on_without(traced, monkeypatch):
    model = make_model(50)
    monkeypatch.setattr(compiled_step.threading.Thread, "start", lambda thread: None)
    step, idx = CompiledStep(copy.deepcopy(model)), torch.randint(50, (1, 5))
    assert not step.n_ready
    step.compiled = None  # and is not called
    slow = [t.item() for t in model.generate(idx, 20, seed=1, step=step)]
    assert slow == [t.item() for t in model.generate(idx, 20, seed=1)]


def test_what_cannot_be_compiled_is_said_and_generates_all_the_same(traced):
    model = make_model(50, n_expert=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step = make_step(model)
    idx = torch.randint(50, (1, 5))
    if not step.n_ready:  # experts: tokens are dealt out by the router, in shapes that are not known before
        assert any("generation goes on uncompiled" in str(w.message) for w in said)
    answers = [torch.stack(list(model.generate(idx, 20, temperature=0.0, step=s))) for s in (step, None)]
    assert torch.equal(*answers)
