"""The precision that `dtype: auto` chooses on a CPU: by a trial, one for all processes, kept when a run is resumed."""

import functools
import math
import os
import types

import pytest
import torch
from conftest import DATA, FAST, TINY, asked_by, read_log, write_jsonl
from processes import end_of, newest_log

from base import devices
from model import GPT, ModelConfig
from training import precision
from training.engine import Engine
from training.setup import build_run
from weights.checkpointing import load_checkpoint, save_checkpoint

ARGUMENTS = ["-t", "pretrain", *FAST, *TINY, *DATA, "--optimizer", "adamw", "--eval_interval", "50", "--dropout", "0.2"]
LAST = ["--from_checkpoint", "checkpoint/pretrain_last.pt"]


def never(*_) -> float:
    raise AssertionError("measured")


@pytest.fixture
def gain(monkeypatch):
    """gain(1.5): a CPU with bfloat16, on which a model of any width gains so much by it."""

    def setting(value: float) -> None:
        monkeypatch.setattr(precision, "bfloat16_gain", lambda *_: value)
        monkeypatch.setattr(precision, "has_bfloat16", lambda _: True)
        monkeypatch.setattr(precision, "MIN_WIDTH", 1)

    return setting


@pytest.mark.parametrize(("value", "dtype"), [(0.5, "float32"), (1.29, "float32"), (1.31, "bfloat16")])
def test_bfloat16_is_taken_where_it_gains_and_the_summary_says_why(prepared, call, gain, value, dtype):
    gain(value)
    result = call("train.py", *ARGUMENTS, "--max_steps", "2")
    assert f", {dtype} (bfloat16 trains {value:.2f} x as fast), " in result.out
    checkpoint = load_checkpoint("checkpoint/pretrain_last.pt")
    assert checkpoint["environment"] == {"device": "cpu", "dtype": dtype}
    states = checkpoint["optimizer"]["state"].values()
    assert all(t.dtype == torch.float32 for t in (*checkpoint["model"].values(), *(s["exp_avg"] for s in states)))


def test_narrow_models_and_old_cpus_are_not_measured(prepared, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_gain", never)
    config = asked_by(*ARGUMENTS)
    run = build_run(config, Engine(config.training))
    assert run.engine.dtype == torch.float32 and run.dtype_reason == "n_embd is below 256"
    monkeypatch.setattr(precision, "MIN_WIDTH", 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    run = build_run(config, Engine(config.training))
    assert run.engine.dtype == torch.float32 and run.dtype_reason == "no instructions for bfloat16"
    config = asked_by(*ARGUMENTS, "--dtype", "bfloat16")
    assert build_run(config, Engine(config.training)).engine.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_cpus_with_bfloat16_are_told_by_their_instructions(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, name: True})
    assert devices.has_bfloat16(torch.device("cpu"))


def test_a_resumed_run_keeps_its_precision_and_ends_with_the_same_weights(prepared, call, gain):
    whole = [*ARGUMENTS, "--lr_decay_iters", "8"]
    gain(2.0)
    assert call("train.py", *whole, "--max_steps", "8", "--save_checkpoint_to", "whole").status == 0
    assert call("train.py", *whole, "--max_steps", "4").status == 0
    gain(0.5)  # what another day's measurement may say
    result = call("train.py", *whole, "--max_steps", "8", *LAST)
    assert ", bfloat16 (as before), " in result.out
    a, b = (load_checkpoint(f"{folder}/pretrain_last.pt")["model"] for folder in ("whole", "checkpoint"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    result = call("train.py", *whole, "--max_steps", "10", *LAST, "--dtype", "float32")
    assert ", float32, " in result.out
    result = call("train.py", *whole, "--max_steps", "12", *LAST)
    assert ", float32 (as before), " in result.out


def test_runs_of_earlier_versions_go_on_in_float32(prepared, call, gain):
    gain(2.0)
    assert call("train.py", *ARGUMENTS, "--max_steps", "2", "--dtype", "float32").status == 0
    checkpoint = load_checkpoint("checkpoint/pretrain_last.pt")
    checkpoint.pop("format"), checkpoint.pop("environment")
    checkpoint["train_config"]["dtype"] = "auto"
    save_checkpoint("checkpoint/pretrain_last.pt", checkpoint)
    assert ", float32 (as before), " in call("train.py", *ARGUMENTS, "--max_steps", "4", *LAST).out
    started = ["--stage", "next", "--max_steps", "2", "--from_checkpoint", "checkpoint/pretrain.pt"]
    assert ", bfloat16 (bfloat16 trains 2.00 x" in call("train.py", *ARGUMENTS, *started).out  # another run is free


def test_a_reference_has_the_precision_of_training(prepared, call, gain):
    """The margin of a model against itself is zero in bfloat16, and the first loss ln 2."""
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i % 7}", "rejected": f"no, not {i % 5}"} for i in range(60)]
    write_jsonl(prepared / "dataset" / "dpo.jsonl", rows)
    prepare = ["data.py", "dataset/pretrain.txt", "dataset/dpo.jsonl", "--block_size", "32"]
    assert call(*prepare).status == 0
    assert call("train.py", *ARGUMENTS, "--block_size", "32", "--max_steps", "2", "--dtype", "float32").status == 0
    gain(2.0)
    start = ["--from_checkpoint", "checkpoint/pretrain.pt", "--dpo_chosen_weight", "0", "--max_steps", "1"]
    result = call("train.py", "-t", "dpo", *FAST, *start)
    assert ", bfloat16 (bfloat16 trains 2.00 x" in result.out
    assert read_log(newest_log(prepared), "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def disagree(is_capable: bool) -> None:
    """In a process of a job: another measurement than the others'; and only the first has the instructions."""
    is_first = os.environ["RANK"] == "0"
    precision.MIN_WIDTH = 1
    precision.has_bfloat16 = lambda _: is_first == is_capable
    precision.bfloat16_gain = (lambda *_: 2.0) if is_first else never


@pytest.mark.parametrize(("script", "is_capable"), [
    ("train_ddp.py", True), ("train_ddp.py", False), ("train_deepspeed.py", True)
])  # fmt: skip
def test_the_first_process_decides_for_all(prepared, script, is_capable):
    first = functools.partial(disagree, is_capable)
    statuses, said = end_of(2, prepared, *ARGUMENTS, "--max_steps", "2", script=script, first=first)
    assert statuses == [0, 0], said
    dtype = load_checkpoint("checkpoint/pretrain_last.pt")["environment"]["dtype"]
    assert dtype == ("bfloat16" if is_capable else "float32") and f", {dtype} (" in said[0]


@pytest.mark.parametrize("options", [{}, {"n_expert": 3, "n_expert_per_token": 1}, {"use_rope": False}])
def test_the_trial_leaves_no_trace(options):
    model = GPT(ModelConfig(vocab_size=50, block_size=32, n_embd=16, n_layer=2, n_head=2, dropout=0.5, **options))
    for p in model.blocks[0].attention.parameters():
        p.requires_grad_(False)  # as LoRA has it
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert 0 < precision.bfloat16_gain(model, batch_size=4) < 100
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if model.config.n_expert:
        assert not model.blocks[0].mlp.tokens_per_expert.any()


def test_the_trial_weighs_blocks_and_output_layer(monkeypatch):
    """By a clock that layers push on: every block 3 seconds in float32, 1 in bfloat16; the output layer 8 and 4."""
    model = GPT(ModelConfig(vocab_size=50, block_size=32, n_embd=16, n_layer=5, n_head=2))
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def takes(in_float32: float, in_bfloat16: float):
        def push(*_) -> None:
            clock.now += in_bfloat16 if torch.is_autocast_enabled("cpu") else in_float32

        return push

    model.blocks[0].mlp.up.register_forward_hook(takes(3.0, 1.0))
    model.lm_head.register_forward_hook(takes(8.0, 4.0))
    monkeypatch.setattr(precision, "time", clock)
    assert precision.bfloat16_gain(model, batch_size=1) == pytest.approx((5 * 3 + 8) / (5 * 1 + 4))
