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
from planning.law import (
    DOF,
    FIRST_GUESS,
    NOISE,
    Belief,
    Law,
    Prior,
    Run,
    Studied,
    effective_tokens,
    log_loss,
    most_likely,
    read_runs,
)
from planning.machine import Clock, Machine
from planning.recipe import DEPTHS, WINDOWS, Shape, recipe, tokens_per_step
from planning.text import ngram_loss, open_text, pieces
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
    law = Law.fit(runs, Belief(FIRST_GUESS, np.diag(np.ones(10))))
    further = np.array(
        [(Shape(192, 128).n_weights, 5e6, 128, 2e6, math.nan), (Shape(96, 64).n_weights, 2e6, 64, 2e6, 0)]
    )
    truth = np.exp(log_loss(theta, further))
    assert law.predict(further)[:, 0] == pytest.approx(truth, rel=0.01)


def ngram_share(theta, generator):
    """Of a simulated text: what n-grams leave of it is about what a network will."""
    long_run = np.array([Run(1e6, 3e6, 128, 2e6)])
    return math.exp(log_loss(theta, long_run)[0] + 0.05 * generator.standard_normal())


def test_intervals_hold_the_truth_as_often_as_they_say_and_ngrams_make_them_narrower():
    """A prior from eight texts; then 20 texts with a short run each, and one run twenty times as long."""
    generator = np.random.default_rng(1)
    centre = FIRST_GUESS + 0.15  # not where the prior begins
    draw = lambda: centre + SPREAD * generator.standard_normal(10)  # noqa: E731
    thetas = [draw() for _ in range(8)]
    studied = {
        str(i): Studied(simulated_runs(theta, generator), ngram_share(theta, generator))
        for i, theta in enumerate(thetas)
    }
    prior = Prior.of_texts(studied, iterations=4)
    marginal = Belief(prior.mean[:-1], prior.covariance[:-1, :-1])
    shape, larger, inside, errors = Shape(64, 128), Shape(128, 128), 0, {True: [], False: []}
    for _ in range(20):
        theta = draw()
        run = np.array([Run(shape.n_weights, 1.5e5, shape.window, 2e6)])
        run[:, 4] = np.exp(log_loss(theta, run) + NOISE * generator.standard_normal(1))
        further = np.array([Run(larger.n_weights, 3e6, larger.window, 2e6)])
        truth = math.exp(log_loss(theta, further)[0] + NOISE * generator.standard_normal())
        given = prior.given(ngram_share(theta, generator))
        low, high = Law.fit(run, given).predict(further)[0, 1:]
        inside += low < truth < high
        for is_counted, belief in ((True, given), (False, marginal)):
            theta, _ = most_likely(run, belief)
            errors[is_counted].append(abs(log_loss(theta, further)[0] - math.log(truth)))
    assert inside / 20 >= 0.8  # of intervals of 90%
    assert np.median(errors[True]) < 0.8 * np.median(errors[False])


def test_a_prior_that_is_conditional_on_the_ngrams_is_that_of_many_draws():
    """Against the draws of the whole distribution whose last coordinate happens to lie there."""
    generator = np.random.default_rng(0)
    factor = 0.3 * generator.standard_normal((11, 11))
    prior = Prior(generator.standard_normal(11), factor @ factor.T + 0.1 * np.eye(11))
    gaussian = generator.multivariate_normal(np.zeros(11), prior.covariance, 600_000)
    drawn = prior.mean + gaussian / np.sqrt(generator.chisquare(DOF, (len(gaussian), 1)) / DOF)
    for away in (0.0, 1.5):
        share = prior.mean[-1] + away * math.sqrt(prior.covariance[-1, -1])
        near = drawn[np.abs(drawn[:, -1] - share) < 0.02][:, :-1]
        given = prior.given(math.exp(share))
        assert near.mean(0) == pytest.approx(given.mean, abs=0.05)
        variance = (DOF + 1) / (DOF - 1) * np.diag(given.covariance)  # of a t distribution with DOF + 1
        assert near.var(0) == pytest.approx(variance, rel=0.15)
        untouched = Law.of_prior(given).thetas
        assert untouched.mean(0) == pytest.approx(given.mean, abs=0.15)
        assert np.quantile(untouched, 0.75, 0) == pytest.approx(np.quantile(near, 0.75, 0), abs=0.15)


def test_the_runs_of_the_prior_are_what_the_law_says_of_them():
    texts = read_runs()
    prior, stored = Prior.of_texts(texts), Prior.load()
    assert prior.mean == pytest.approx(stored.mean, abs=1e-3)
    assert prior.covariance == pytest.approx(stored.covariance, abs=1e-3)
    for text in texts.values():
        theta, _ = most_likely(text.runs, prior.given(text.ngram_share))
        assert np.abs(log_loss(theta, text.runs) - np.log(text.runs[:, 4])).max() < 0.05


def test_a_text_that_the_prior_does_not_know_is_predicted_from_its_ngrams_and_a_short_run():
    """Every stored text from the others and its first short run: bench/law_accuracy.py does so with all of them."""
    texts, inside, errors = read_runs(), [], {True: [], False: []}
    for name, text in texts.items():
        prior = Prior.of_texts({other: texts[other] for other in texts if other != name}, iterations=2)
        probe = text.runs[np.argmin(text.runs[:, 1])]
        longest = text.runs[[np.argmax(text.runs[:, 1])]]
        for is_counted in (True, False):
            belief = prior.given(text.ngram_share)
            belief = belief if is_counted else Belief(prior.mean[:-1], prior.covariance[:-1, :-1])
            theta, _ = most_likely(probe[None], belief)
            errors[is_counted].append(abs(log_loss(theta, longest)[0] - math.log(longest[0, 4])))
        low, high = Law.fit(probe[None], prior.given(text.ngram_share)).predict(longest)[0, 1:]
        inside.append(low < longest[0, 4] < high)
    assert np.mean(inside) >= 0.75  # of intervals of 90%, on 13 texts, three of which no person has written
    assert np.sqrt(np.mean(np.square(errors[True]))) < 0.7 * np.sqrt(np.mean(np.square(errors[False])))
    assert np.median(errors[True]) < 0.08


def test_a_text_that_repeats_itself_is_planned_for_as_well():
    prior, run = Prior.load(), np.array([Run(Shape(64, 128).n_weights, 6e4, 128, 1e6, 1e-3)])
    further = np.array([Run(Shape(64, 128).n_weights, 1e6, 128, 1e6)])
    for share in (1e-6, 0.05, 1.1):
        loss, low, high = Law.fit(run, prior.given(share)).predict(further)[0]
        assert 0 < low <= loss <= high < 1e-2


def naive_ngram_loss(train, val, vocab_size, longest):
    """Witten and Bell's estimate with dictionaries, of n-grams up to that length."""
    tokens, total = [*train, *val], 0.0
    for i in range(len(train), len(tokens)):
        p = 1 / vocab_size
        for length in range(longest):
            context = tokens[max(0, i - length) : i]
            followers = [tokens[j] for j in range(len(train)) if j >= length and tokens[j - length : j] == context]
            if followers and len(context) == length:
                kinds = len(set(followers))
                p = (followers.count(tokens[i]) + kinds * p) / (len(followers) + kinds)
        total -= math.log(p)
    return total / len(val)


def test_the_ngram_loss_is_that_of_dictionaries_and_of_the_best_length():
    text = markov_text(700)
    alphabet = sorted(set(text))
    ids = [alphabet.index(c) for c in text]
    train, val = ids[:600], ids[600:]
    naive = [naive_ngram_loss(train, val, len(alphabet), n) for n in range(1, 9)]
    first_worse = next(i for i in range(7) if naive[i + 1] >= naive[i])
    loss = ngram_loss(np.array(train, np.uint16), np.array(val, np.uint16), len(alphabet))
    assert loss == pytest.approx(naive[first_worse], rel=1e-9)
    tokens = np.arange(10_000)
    assert (pieces(tokens, 20_000) == tokens).all()
    part = pieces(tokens, 4000).reshape(4, 1000)
    assert part[0, 0] == 0 and part[-1, -1] == 9999 and (np.diff(part) == 1).all()


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


def test_ctrl_c_says_what_is_lost_and_what_stays(prepared, call, monkeypatch):
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(60_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    (prepared / "config").mkdir()
    earlier = prepared / "config" / "plan.json"
    earlier.write_text('{"planned_for": "x"}')

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "measure_machine", interrupted)
    result = call("plan.py", "dataset/pretrain_train.bin", "--minutes", "1")
    assert result.status == 130
    assert "what was measured is lost" in result.out and "config/plan.json is as it was" in result.out
    assert "python plan.py dataset/pretrain_train.bin --minutes 1\n" in result.out
    rest = "--device cpu --output my.json --run"
    result = call("plan.py", "dataset/pretrain_train.bin", "--hours", "0.05", *rest.split())
    assert f": python plan.py dataset/pretrain_train.bin --minutes 3 {rest}\n" in result.out
    result = call("plan.py", "no_such.txt", "--minutes", "1", *rest.split())
    assert result.err.endswith(f": python plan.py dataset/pretrain_train.bin --minutes 1 {rest}\n")
    assert earlier.read_text() == '{"planned_for": "x"}'


def test_the_probe_is_of_the_best_shape_or_of_a_narrower_one_that_can_read_enough(prepared, call):
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(100_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    text = open_text(prepared / "dataset" / "pretrain_train.bin")
    law = Law.of_prior(Belief(FIRST_GUESS, np.diag(np.full(10, 0.01))))
    fields = {"device": "cpu", "compile": "false", "eval_iters": 1}
    widths = []
    for seconds in (4.2, 3.2, 2.3):
        machine = Machine(text.vocab_size, 1.0, {})
        machine.add(Shape(96, 64), 20_000)  # tokens per second
        best = plan.candidates(law, machine, text, 30)[0].shape
        probe = plan.run_probe(law, machine, text, fields, 30, Clock(seconds))
        if probe is None:
            continue
        widths.append(probe.shape.n_embd)
        assert probe.shape.window == best.window and probe.tokens >= 0.9 * plan.LEAST_TOKENS
        assert probe.loss < text.baselines["unigram"] + 0.5 and probe.tokens_per_s > 0
        assert probe.shape.n_embd == min(DEPTHS) or probe.tokens >= 0.9 * plan.ENOUGH_TOKENS
    assert len(widths) == 2 and widths[0] == best.n_embd > widths[1]
    assert not list(prepared.glob("checkpoint/*")) and not list(prepared.glob("*.log"))
    values = plan.plan_fields(text, plan.candidates(law, machine, text, 30)[0], fields | {"eval_iters": 7}, machine, "")
    assert values["eval_iters"] == 7  # as the probe has it: losses of other samples cannot be compared


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
