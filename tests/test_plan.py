"""plan.py: the scaling law on simulated texts, the rules, and plans made and trained as a user does."""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_samples, read_log, run_script, write_jsonl

import plan
from base.configuration import fields_of
from model import GPT, ModelConfig
from planning.law import FIRST_GUESS, NOISE, Law, Prior, effective_tokens, log_loss, most_likely, read_runs
from planning.machine import Clock, Machine
from planning.recipe import DEPTHS, WINDOWS, Shape, recipe, tokens_per_step
from planning.text import open_text
from training.config import TrainConfig

SPREAD = np.array([0.2, 0.4, 0.3, 0.4, 0.15, 0.15, 0.4, 0.4, 0.3, 0.3])  # of simulated texts' coefficients


def simulated_runs(theta, generator, sizes=(48, 64, 96, 128), amounts=(1e5, 3e5, 1e6, 3e6)):
    """Runs (n, 5) of a text of 2M tokens whose coefficients are theta, with the noise of seeds."""
    grid = [(Shape(n, w).n_weights, D, w, 2e6, math.nan) for n in sizes for D in amounts for w in (64, 128, 256)]
    runs = np.array(grid)
    runs[:, 4] = np.exp(log_loss(theta, runs) + NOISE * generator.standard_normal(len(runs)))
    return runs


def markov_text(n_characters):
    """Text of a random chain of words, each of which has a few followers."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice([*"abcdefghijklmnop"], generator.integers(2, 8))) for _ in range(500)]
    followers, word, text = generator.integers(500, size=(500, 6)), 0, []
    for _ in range(n_characters // 5):
        word = followers[word, generator.integers(6)]
        text.append(words[word])
    return " ".join(text)[:n_characters]


def test_repeated_tokens_count_ever_less():
    tokens = np.geomspace(1e3, 1e9, 200)
    worth = effective_tokens(tokens, np.float64(1e6), 5.0)
    assert (worth[tokens <= 1e6] == tokens[tokens <= 1e6]).all()
    assert (np.diff(worth) >= 0).all() and (worth <= tokens).all()
    assert worth[-1] == pytest.approx(1e6 * (1 + 5.0))  # no repetition is worth more than R texts
    just_after = effective_tokens(np.array([1.01e6]), np.float64(1e6), 5.0)[0]
    assert just_after == pytest.approx(1.01e6, rel=1e-4)  # a second reading begins as good as new text


def test_the_law_is_the_formula_that_it_says():
    """Against a plain loop in float64, above and below one reading of the text."""
    E, A, B, C, alpha, beta, delta, epsilon, gamma, R = np.exp(FIRST_GUESS)
    for N, D, W, U in ((1e5, 3e5, 64, 1e6), (5e6, 2e7, 256, 1e6), (1e6, 1e6, 128, 1e6), (2e5, 5e6, 512, 3e6)):
        worth = min(D, U) + (U * R * (1 - math.exp(-(D / U - 1) / R)) if D > U else 0)
        slow = B * (W / 128) ** epsilon * (worth / 1e6) ** -beta * (N / 1e6) ** -delta
        loss = E + A * (N / 1e6) ** -alpha + slow + C * (W / 128) ** -gamma
        assert log_loss(FIRST_GUESS, np.array([(N, D, W, U, 0)]))[0] == pytest.approx(math.log(loss), rel=1e-12)


def test_enough_runs_determine_the_law_whatever_the_prior():
    generator = np.random.default_rng(0)
    theta = FIRST_GUESS + SPREAD * generator.standard_normal(10)
    runs = simulated_runs(theta, generator)
    law = Law.fit(runs, Prior(FIRST_GUESS, np.diag(np.ones(10))))
    further = np.array(
        [(Shape(192, 128).n_weights, 5e6, 128, 2e6, math.nan), (Shape(96, 64).n_weights, 2e6, 64, 2e6, 0)]
    )
    truth = np.exp(log_loss(theta, further))
    assert law.predict(further)[:, 0] == pytest.approx(truth, rel=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """A prior from five texts; then 40 texts with three short runs each, and one run twenty times as long."""
    generator = np.random.default_rng(1)
    centre = FIRST_GUESS + 0.15  # not where the prior begins
    draw = lambda: centre + SPREAD * generator.standard_normal(10)  # noqa: E731
    prior = Prior.of_texts({str(i): simulated_runs(draw(), generator) for i in range(5)}, iterations=10)
    inside, errors = 0, []
    for _ in range(40):
        theta = draw()
        shapes = [(Shape(64, 128), 2e5), (Shape(64, 128), 6e4), (Shape(96, 128), 1.5e5)]
        runs = np.array([(s.n_weights, D, s.window, 2e6, math.nan) for s, D in shapes])
        runs[:, 4] = np.exp(log_loss(theta, runs) + NOISE * generator.standard_normal(3))
        further = np.array([(Shape(128, 128).n_weights, 3e6, 128, 2e6, math.nan)])
        (middle, low, high), truth = Law.fit(runs, prior).predict(further)[0], np.exp(log_loss(theta, further)[0])
        truth *= math.exp(NOISE * generator.standard_normal())
        inside += low < truth < high
        errors.append(abs(middle / truth - 1))
    assert 0.8 <= inside / 40 <= 0.99  # of intervals of 90%
    untouched = np.array(
        [abs(np.exp(log_loss(prior.mean, further)[0]) / np.exp(log_loss(draw(), further)[0]) - 1) for _ in range(40)]
    )
    assert np.median(errors) < 0.5 * np.median(untouched)  # the short runs are worth something


def test_the_runs_of_the_prior_are_what_the_law_says_of_them():
    texts = read_runs()
    prior, stored = Prior.of_texts(texts), Prior.load()
    assert prior.mean == pytest.approx(stored.mean, abs=1e-3)
    assert prior.covariance == pytest.approx(stored.covariance, abs=1e-3)
    for runs in texts.values():
        theta, _ = most_likely(runs, prior)
        assert np.abs(log_loss(theta, runs) - np.log(runs[:, 4])).max() < 0.05


@pytest.mark.parametrize("shape", [Shape(n_embd, WINDOWS[i % len(WINDOWS)]) for i, n_embd in enumerate(DEPTHS)])
def test_a_recipe_makes_the_network_that_was_counted(shape):
    import torch

    config = ModelConfig(**shape.model_fields(), vocab_size=100)
    with torch.device("meta"):
        model = GPT(config)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert shape.n_weights == matrices
    assert shape.flops_per_token(100) == pytest.approx(model.flops_per_token(), rel=0.02)


@pytest.mark.parametrize("tokens", [3e4, 1e6, 3e7, 1e9])
def test_a_recipe_reads_the_tokens_that_were_planned(tokens):
    for shape in (Shape(64, 64), Shape(128, 256), Shape(512, 1024)):
        for micro_batch in (2048, 1 << 20):
            fields = recipe(shape, tokens, micro_batch)
            samples = fields["batch_size"] * fields["gradient_accumulation_steps"]
            assert fields["batch_size"] * shape.window <= max(micro_batch, shape.window)
            if tokens >= 10 * samples * shape.window:
                assert fields["max_steps"] * samples * shape.window == pytest.approx(tokens, rel=0.06)
            TrainConfig(**{name: value for name, value in fields.items() if name in fields_of(TrainConfig)})
    assert tokens_per_step(tokens) <= tokens_per_step(2 * tokens)


# ------------------------------------------------------------------------------------------------------ as a user does


def test_a_plan_is_a_config_that_trains_and_compares_itself_with_what_it_reached(prepared, call):
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(60_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    result = call("plan.py", "dataset/pretrain_train.bin", "--minutes", "0.5")
    assert result.status == 0, result.err
    for row in ("3 min", "10 min", "30 min", "2 h", "8 h", "0.5 min <-"):
        assert row in result.out
    assert "unigram" in result.out and "lzma" in result.out
    assert "to train it: python train.py -t plan" in result.out
    assert (prepared / "plan.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((prepared / "config" / "plan.json").read_text())
    assert config["decay_over"] == "time" and 0.25 < config["max_minutes"] <= 0.5
    assert not list((prepared / "checkpoint").glob("*"))  # probes leave nothing behind

    (prepared / "config" / "plan.json").write_text(json.dumps(config | {"max_minutes": 0.02}))
    trained = call("train.py", "-t", "plan", "--log_interval", "2")
    assert trained.status == 0, trained.err
    assert "warning" not in trained.err
    numbers = re.search(r"predicted ([\d.]+) \(([\d.]+) to ([\d.]+), .* tokens\); reached ([\d.]+)", trained.out)
    predicted, low, high, reached = map(float, numbers.groups())
    assert low < predicted < high
    (log,) = prepared.glob("train_*.log")
    assert reached == pytest.approx(min(r["val_loss"] for r in read_log(log, "val")), abs=6e-4)

    trained = call("train.py", "-t", "plan", "--n_layer", "1", "--learning_rate", "0.01")
    assert "not as it was planned (learning_rate, n_layer); reached" in trained.out

    text.write_text("completely different text, " * 500)
    assert call("data.py", text, "--tokenizer", "char").status == 0
    trained = call("train.py", "-t", "plan", "--max_minutes", "0.01")
    assert "the plan was made for other data" in trained.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset/pretrain_train.bin"], "how long may training take"),
        (["dataset/pretrain_train.bin", "--minutes", "1", "--hours", "1"], "how long may training take"),
        (["dataset/pretrain_train.bin", "--minutes", "nan"], "minutes"),
        (["dataset/pretrain_train.bin", "--minutes", "0.1"], "half a minute"),
        (["dataset/sft_train.bin", "--minutes", "1"], "questions and answers"),
        (["dataset/pretrain_val.bin", "--minutes", "1"], "NAME_train.bin"),
        (["dataset/nothing_train.bin", "--minutes", "1"], "no such file"),
        (["dataset/pretrain_train.bin", "--minutes", "1", "--vocab", "char"], "prepared with a vocabulary"),
        (["text.txt", "--minutes", "1", "--vocab", "ten"], "--vocab must be"),
        (["questions.jsonl", "--minutes", "1"], "not running text"),
        (["constant.txt", "--minutes", "1", "--vocab", "char"], "nothing to learn"),
        (["dataset/damaged_train.bin", "--minutes", "1"], "damaged"),
        (["dataset/pretrain_train.bin", "--minutes", "1", "--output", "hand_made.json"], "not a plan's config"),
        (["dataset/pretrain_train.bin", "--minutes", "1", "--output", "folder/plan.json"], "no file can be written"),
        (["dataset/pretrain_train.bin", "--minutes", "0.5"], "too few to plan for"),
        (["dataset/pretrain_train.bin", "--minutes", "1", "--device", "tpu"], "device"),
        (["dataset/pretrain_train.bin", "--minutes", "1", "--output", "plan.txt"], ".json"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(prepared, call, arguments, message):
    write_jsonl(prepared / "questions.jsonl", make_samples())
    (prepared / "hand_made.json").write_text("{}")
    (prepared / "folder").write_text("")
    for part in ("train", "val"):
        (prepared / "dataset" / f"damaged_{part}.bin").write_bytes(b"hello")
    (prepared / "constant.txt").write_text("a" * 60_000)
    result = call("plan.py", *arguments)
    assert result.status != 0 and message in result.err and "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("error:")]) == 1
    assert not (prepared / "config").exists()


def test_probes_are_what_is_asked_of_them(prepared, call):
    """Four short runs where there is time: a smaller size and the best one, each for more and for fewer tokens."""
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(100_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    text = open_text(prepared / "dataset" / "pretrain_train.bin")
    slow = Machine(text.vocab_size, 1.0, {})
    slow.add(Shape(96, 64), 20_000)  # so that the runs are short
    law = Law.of_prior(Prior(FIRST_GUESS, np.diag(np.full(10, 0.01))))
    fields = {"device": "cpu", "compile": "false", "eval_iters": 1}
    probes = plan.run_probes(law, slow, text, fields, 30, Clock(20))
    best = plan.candidates(law, slow, text, 30)[0].shape
    assert len(probes) == 4 and len({(p.shape, p.tokens) for p in probes}) == 4
    assert [p.shape.n_embd for p in probes] == [min(DEPTHS)] * 2 + [best.n_embd] * 2 or best.n_embd <= 64
    for p in probes:
        assert p.loss < text.baselines["unigram"] + 0.5 and p.tokens_per_s > 0
    assert max(probes, key=lambda p: p.tokens).loss < max(p.loss for p in probes)
    assert not list(prepared.glob("checkpoint/*")) and not list(prepared.glob("*.log"))
    values = plan.plan_fields(text, plan.candidates(law, slow, text, 30)[0], fields | {"eval_iters": 7}, slow, "")
    assert values["eval_iters"] == 7  # as the probes have it: losses of other samples cannot be compared


@pytest.mark.real("a plan of a minute is trained to its end")
def test_a_plan_ends_in_time_and_near_what_was_predicted(work):
    sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]  # text that is there wherever Python is
    (work / "text.txt").write_text("\n".join(file.read_text(encoding="utf-8") for file in sources), encoding="utf-8")
    began = time.perf_counter()
    result = run_script("plan.py", "text.txt", "--minutes", "1", cwd=work)
    assert result.status == 0, result.err
    assert time.perf_counter() - began < 40
    began = time.perf_counter()
    trained = run_script("train.py", "-t", "plan", cwd=work)
    assert time.perf_counter() - began == pytest.approx(60, rel=0.15)
    numbers = re.search(r"predicted ([\d.]+) \(([\d.]+) to ([\d.]+), .*; reached ([\d.]+)", trained.out)
    _, low, high, reached = map(float, numbers.groups())
    assert 0.9 * low < reached < 1.1 * high
