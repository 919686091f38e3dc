"""Losses that compare two policies: the same model must get the same probabilities from both sides."""

import pytest
import torch
from conftest import FAST, TINY, make_text, read_log, write_jsonl
from processes import newest_log, train_on

from base.configuration import UserError
from text.batches import TrainBatches
from text.token_files import TokenFile
from text.tokenizer_files import load_tokenizer
from training import losses
from training.config import TrainConfig
from training.engine import Engine
from training.grpo import log_probabilities
from training.setup import build_run, problem_config
from weights import lora
from weights.checkpointing import load_checkpoint, load_model

PAIRS = ["-t", "dpo", *FAST, "--gradient_accumulation_steps", "1", "--optimizer", "adamw", "--eval_iters", "0"]


@pytest.fixture
def pairs(work, call):
    """Prepared preferences, and a small model that is fine-tuned a little."""
    (work / "dataset").mkdir()
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i % 7}", "rejected": f"no, not {i % 5}"} for i in range(60)]
    write_jsonl(work / "dataset" / "dpo.jsonl", rows)
    write_jsonl(work / "dataset" / "sft.jsonl", [{"question": r["prompt"], "answer": r["chosen"]} for r in rows])
    (work / "dataset" / "pretrain.txt").write_text(make_text(3000), encoding="utf-8")
    assert call("data.py", "--block_size", "32").status == 0
    shape = [*TINY, "--block_size", "32", "--n_embd", "32"]
    args = ["-t", "sft", "--from_checkpoint", "", *shape, *FAST, "--max_steps", "20", "--optimizer", "adamw"]
    assert call("train.py", *args).status == 0
    return work


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_margin_of_a_model_against_itself_is_zero(pairs, dtype):
    file = TokenFile("dataset/dpo_train.bin")
    engine = Engine(TrainConfig(device="cpu", dtype=dtype))
    batches = TrainBatches(
        [file], accumulation_steps=1, block_size=32, vocab_size=file.header["vocab_size"], batch_size=8, seed=1
    )
    model = load_model(load_checkpoint("checkpoint/sft.pt"), "sft.pt").train()
    losses.compute_reference_margins(model, batches.datasets[0], 8, engine)
    (batch,) = batches.at(0)
    with engine.autocast():
        chosen, rejected = log_probabilities(model, batch).sum(1).chunk(2)
    margin = chosen - rejected - batch.reference
    assert margin.abs().max() < (1e-4 if dtype == "float32" else 0.05)
    assert (chosen - rejected).abs().min() > 5  # what is subtracted is not small


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratios_of_fresh_completions_are_one(work, call, dtype):
    """The base was trained with dropout; neither the sampling nor the training of rewards has any."""
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--device", "cpu", "--dropout", "0.2"]
    assert call("problem.py", "sort", "--length", "3", *shape, "--max_steps", "5").status == 0
    given = {"loss": "grpo", "length": "3", "device": "cpu", "dtype": dtype, "batch_size": 32}
    asked = problem_config("sort", {**given, "from_checkpoint": "checkpoint/problem_sort.pt"})
    run = build_run(asked, Engine(asked.training))
    (batch,) = run.batches.at(0)
    run.model.train()
    with run.engine.autocast():
        ratio = (log_probabilities(run.engine.network, batch) - batch.old).exp()
    assert (ratio - 1).abs().max() < (1e-5 if dtype == "float32" else 1e-2)
    assert run.changes == ["dropout 0.2 -> 0.0"]


@pytest.mark.parametrize("field", ["dropout", "lora_dropout"])
def test_dropout_is_refused_where_policies_are_compared(field):
    with pytest.raises(UserError, match="leave dropout and lora_dropout at 0"):
        TrainConfig(loss="dpo", **{field: 0.1})
    TrainConfig(loss="orpo", **{field: 0.1})  # which has no reference


def test_dpo_goes_on_from_an_adapter_of_another_stage(pairs, call):
    """The reference is the base with that adapter: the first margins are zero, the loss that of no preference."""
    adapter = ["-t", "sft", *FAST, "--use_lora", "true", "--from_checkpoint", "checkpoint/sft.pt", "--stage", "tuned"]
    options = ["--learning_rate", "0.01", "--max_steps", "10", "--optimizer", "adamw"]
    assert call("train.py", *adapter, *options).status == 0
    still = ["--max_steps", "1", "--learning_rate", "1e-30", "--min_lr", "0", "--dpo_chosen_weight", "0"]
    start = ["--use_lora", "true", "--from_checkpoint", "checkpoint/tuned_lora.pt"]
    result = call("train.py", *PAIRS, *start, *still)
    assert result.status == 0, result.err
    (record,) = read_log(newest_log(pairs), "val")
    assert record["val_loss"] == pytest.approx(0.6931, abs=1e-3) and abs(record["reward_margin"]) < 1e-4
    adapter, base = (load_checkpoint(f"checkpoint/{name}.pt") for name in ("tuned_lora", "sft"))
    merged = lora.merged_checkpoint(adapter, base, "tuned_lora.pt")
    tokenizer = load_tokenizer("dataset/tokenizer.json")
    loaded = losses.load_frozen_model("reference", "checkpoint/tuned_lora.pt", tokenizer, torch.device("cpu"))
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, merged["model"][name])


def test_a_reference_or_teacher_with_a_smaller_window_is_refused(pairs, call):
    small = ["-t", "sft", "--from_checkpoint", "", *TINY, *FAST, "--block_size", "16", "--optimizer", "adamw"]
    assert call("train.py", *small, "--max_steps", "1", "--stage", "small").status == 0
    result = call("train.py", *PAIRS, "--reference", "checkpoint/small.pt", "--max_steps", "1")
    assert result.status == 1 and "the context window of checkpoint/small.pt is 16 tokens" in result.err
    distill = ["-t", "distill", *TINY, *FAST, "--block_size", "32", "--teacher", "checkpoint/small.pt"]
    result = call("train.py", *distill, "--max_steps", "1")
    assert result.status == 1 and "teacher: the context window" in result.err


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_per_token_survive_a_batch_that_only_keeps_processes_in_step(pairs, call, loss):
    """An odd number of validation batches on two processes: the second gets one without any target."""
    args = [*PAIRS, "--gradient_accumulation_steps", "2", "--max_steps", "2", "--eval_interval", "1", "--loss", loss]
    args += ["--batch_size", "2"]
    n_pairs = (len(TokenFile("dataset/dpo_val.bin").starts) - 1) // 2
    assert -(-n_pairs // 2) % 2 == 1, n_pairs
    assert call("train.py", *args).status == 0
    one = [record["val_loss"] for record in read_log(newest_log(pairs), "val")]
    two = train_on(2, pairs, *args)["val_loss"]
    assert two == pytest.approx(one, rel=1e-4)
    assert load_checkpoint("checkpoint/dpo.pt")["step"] == 2
