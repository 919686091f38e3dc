"""Windows longer than trained: RoPE scaling that stays what it was trained with, and training on at another window."""

import numpy as np
import pytest
import torch
from conftest import DATA, FAST, TINY

import evaluate
import problem
from evaluation.text import judge_windows
from model import GPT, ModelConfig
from weights.checkpointing import load_checkpoint, load_checkpoint_tokenizer, load_model, save_checkpoint

SCALED = {"vocab_size": 30, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 32, "rope_theta": 500.0}


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn"])
def test_a_wider_window_keeps_the_angles_of_the_trained_one(kind):
    config = ModelConfig(**SCALED, rope_scaling=kind, rope_factor=4.0)
    assert config.rope_trained_length == 16
    wider = GPT(ModelConfig(**{**config.to_dict(), "block_size": 256}))
    for name in ("rope_cos", "rope_sin"):
        assert torch.equal(getattr(wider, name)[:64], getattr(GPT(config), name))


def test_a_toy_problem_reads_longer_instances_with_its_own_angles(work, call):
    """yarn, 8 digits trained on, 12 tested: the model of the test is the trained one, only with more positions."""
    options = ["--length", "8", "--rope_scaling", "yarn", "--rope_factor", "2", "--rope_theta", "100"]
    shape = ["--n_layer", "1", "--n_head", "1", "--n_embd", "32", "--device", "cpu", "--max_steps", "2"]
    assert call("problem.py", "sort", *options, *shape).status == 0
    trained = load_model(load_checkpoint("checkpoint/problem_sort.pt"), "sort")
    for older in (False, True):
        checkpoint = load_checkpoint("checkpoint/problem_sort.pt")
        if older:  # a checkpoint of before the field
            del checkpoint["model_config"]["rope_trained_length"]
            checkpoint.pop("format")
            save_checkpoint("checkpoint/problem_sort.pt", checkpoint)
        solver = problem.load_solver("checkpoint/problem_sort.pt", torch.device("cpu"), "sort", 12)
        assert solver.model.config.block_size == 12
        assert torch.equal(solver.model.rope_cos[:8], trained.rope_cos)


def trained_with(call, *options):
    return call("train.py", "-t", "pretrain", *FAST, *DATA, "--optimizer", "adamw", "--max_steps", "3", *options)


def test_a_model_is_trained_further_at_a_longer_window(prepared, call):
    assert trained_with(call, *TINY).status == 0
    longer = ["--from_checkpoint", "checkpoint/pretrain.pt", "--block_size", "48", "--rope_scaling", "yarn"]
    result = trained_with(call, *longer, "--stage", "longer")
    assert result.status == 0, result.err
    assert "block_size 16 -> 48, rope_scaling 'none' -> 'yarn', rope_factor 1.0 -> 3.0" in result.out
    config = load_checkpoint("checkpoint/longer.pt")["model_config"]
    assert (config["block_size"], config["rope_factor"], config["rope_trained_length"]) == (48, 3.0, 16)
    plain = ["--from_checkpoint", "checkpoint/pretrain.pt", "--block_size", "32", "--stage", "plain"]
    assert trained_with(call, *plain).status == 0  # trained unscaled, the window is the trained one
    twice = [
        "--from_checkpoint",
        "checkpoint/plain.pt",
        "--block_size",
        "64",
        "--rope_scaling",
        "linear",
        "--stage",
        "t",
    ]
    assert "rope_factor 1.0 -> 2.0" in trained_with(call, *twice).out
    resume = ["--stage", "longer", "--from_checkpoint", "checkpoint/longer_last.pt", "--max_steps", "4"]
    assert trained_with(call, *resume).status == 0
    again = trained_with(call, *resume, "--block_size", "64")
    assert again.status == 1 and "another --stage name" in again.err
    learned = trained_with(call, *TINY, "--use_rope", "false", "--stage", "learned")
    assert learned.status == 0
    result = trained_with(call, "--from_checkpoint", "checkpoint/learned.pt", "--stage", "x", "--block_size", "48")
    assert result.status == 1 and "block_size is 48 here, 16 in checkpoint/learned.pt" in result.err
    result = trained_with(call, "--from_checkpoint", "checkpoint/pretrain.pt", "--stage", "x", "--n_layer", "3")
    assert result.status == 1 and "a trained model keeps its shape" in result.err


def test_evaluation_keeps_the_scaling_that_a_model_was_trained_with(prepared, call, monkeypatch):
    """Within its window, the table's losses are those of the model as it is."""
    assert trained_with(call, *TINY, "--rope_scaling", "yarn", "--rope_factor", "4", "--rope_theta", "50").status == 0
    checkpoint = load_checkpoint("checkpoint/pretrain.pt")
    shown = []
    monkeypatch.setattr(evaluate, "draw", lambda path, losses, trained: shown.append((losses, trained)))

    def judged(*argv):
        assert call("evaluate.py", "dataset/pretrain.txt", *argv).status == 0
        return shown[-1]

    losses, window = judged("--windows", "9")
    model = load_model(checkpoint, "pretrain.pt").eval()
    text = (prepared / "dataset/pretrain.txt").read_text(encoding="utf-8")
    tokenizer = load_checkpoint_tokenizer(checkpoint, "")
    expected, _ = judge_windows(model, tokenizer, tokenizer.encode(text, special=True), 9)
    assert window == 16 and list(losses) == [", yarn"]
    np.testing.assert_allclose(losses[", yarn"], expected.mean(0), rtol=1e-5)
    losses, _ = judged("--windows", "9", "--factor", "2", "--scaling", "linear")
    assert list(losses) == [", yarn", ", linear"] and len(losses[", yarn"]) == 32
