"""Perplexity by position: against one position at a time, and its pictures and refusals."""

import numpy as np
import pytest
import torch
from conftest import DATA, FAST, TINY, make_text

import evaluate
from model import GPT, ModelConfig


def test_it_is_the_loss_of_every_position():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=20, block_size=6, n_layer=1, n_head=2, n_embd=16)).eval()
    ids = np.random.default_rng(0).integers(0, 20, 29)
    found = evaluate.loss_by_position(model, ids, 4, batch_size=3)
    starts = [0, 7, 14, 22]
    for position in range(6):
        losses = []
        for start in starts:
            seen = torch.tensor(ids[start : start + position + 1])[None]
            losses.append(-model(seen)[0][0, -1].log_softmax(-1)[ids[start + position + 1]].item())
        assert found[position] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_model_reads_beyond_its_window(prepared, call):
    (prepared / "new.txt").write_text(make_text(3000, seed=5), encoding="utf-8")
    assert call("train.py", "-t", "pretrain", *TINY, *FAST, *DATA, "--max_steps", "3").status == 0
    result = call("evaluate.py", "new.txt", "--factor", "2.5", "--scaling", "yarn", "linear", "--windows", "5")
    assert result.status == 0, result.err
    assert "none" in result.out and "yarn" in result.out and "(beyond)" in result.out and "36-40" in result.out
    assert (prepared / "perplexity.png").stat().st_size > 10_000
    refusals = {
        ("new.txt", "--factor", "1000"): "do not fill a window",
        ("none.txt",): "no such file",
        ("new.txt", "--factor", "0.5"): "--factor must be",
        ("new.txt", "-o", "x.jpg"): "must be a picture's name",
        ("new.txt", "--scaling", "yam"): "invalid choice",
    }
    for argv, words in refusals.items():
        result = call("evaluate.py", *argv)
        assert result.status == 1 and words in result.err and "Traceback" not in result.err
