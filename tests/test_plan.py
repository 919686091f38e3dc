"""plan.py: the scaling law on simulated texts, the rules, and plans made and trained as a user does."""

import json
import lzma
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
    shares_of,
)
from planning.machine import Clock, Machine
from planning.recipe import DEPTHS, WINDOWS, Shape, recipe, tokens_per_step
from planning.text import ngram_loss, open_text, pieces
from training.config import TrainConfig
from weights.checkpointing import load_checkpoint

SPREAD = np.array([0.2, 0.4, 0.3, 0.4, 0.15, 0.15, 0.4, 0.4, 0.3, 0.3, 0.4])  # of simulated texts' coefficients


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
    E, A, B, C, alpha, beta, delta, epsilon, gamma, R, F = np.exp(FIRST_GUESS)
    for N, D, W, U in ((1e5, 3e5, 64, 1e6), (5e6, 2e7, 256, 1e6), (1e6, 1e6, 128, 1e6), (2e5, 5e6, 512, 3e6)):
        worth = min(D, U) + (U * R * (1 - math.exp(-(D / U - 1) / R)) if D > U else 0)
        slow = B * (W / 128) ** epsilon * (worth / 1e6) ** -beta * (N / 1e6) ** -delta
        loss = E + A * (N / 1e6) ** -alpha + slow + C * (W / 128) ** -gamma
        loss *= 1 + (F * N / 1e6 / math.sqrt(U / 1e6) * ((D / U - 1) / 4) ** 1.4 if D > U else 0)
        assert log_loss(FIRST_GUESS, np.array([(N, D, W, U, 0)]))[0] == pytest.approx(math.log(loss), rel=1e-12)


def test_enough_runs_determine_the_law_whatever_the_prior():
    generator = np.random.default_rng(0)
    theta = FIRST_GUESS + SPREAD * generator.standard_normal(11)
    runs = simulated_runs(theta, generator)
    law = Law.fit(runs, Belief(FIRST_GUESS, np.diag(np.ones(11)), DOF))
    further = np.array(
        [(Shape(192, 128).n_weights, 5e6, 128, 2e6, math.nan), (Shape(96, 64).n_weights, 2e6, 64, 2e6, 0)]
    )
    truth = np.exp(log_loss(theta, further))
    assert law.predict(further)[:, 0] == pytest.approx(truth, rel=0.01)


def simulated_shares(theta, generator):
    """Of a simulated text: what n-grams leave of it is about what a network will, and so a compressor, less closely."""
    long_run = np.array([Run(1e6, 3e6, 128, 2e6)])
    return np.exp(log_loss(theta, long_run)[0] + np.array([0.05, 0.1]) * generator.standard_normal(2))


UNKNOWN = np.array([math.nan, math.nan])
SUDDEN = {"chain_small", "people", "records", "sums_small"}  # stored texts, by programs: their losses fall suddenly


def test_intervals_hold_the_truth_as_often_as_they_say_and_the_shares_make_them_narrower():
    """A prior from eight texts; then 20 texts with a short run each, and one run twenty times as long."""
    generator = np.random.default_rng(1)
    centre = FIRST_GUESS + 0.15  # not where the prior begins
    draw = lambda: centre + SPREAD * generator.standard_normal(11)  # noqa: E731
    thetas = [draw() for _ in range(8)]
    studied = {
        str(i): Studied(simulated_runs(theta, generator), simulated_shares(theta, generator))
        for i, theta in enumerate(thetas)
    }
    prior = Prior.of_texts(studied, iterations=4)
    marginal = prior.given(UNKNOWN)
    shape, larger, inside, errors = Shape(64, 128), Shape(128, 128), 0, {True: [], False: []}
    for _ in range(20):
        theta = draw()
        run = np.array([Run(shape.n_weights, 1.5e5, shape.window, 2e6)])
        run[:, 4] = np.exp(log_loss(theta, run) + NOISE * generator.standard_normal(1))
        further = np.array([Run(larger.n_weights, 3e6, larger.window, 2e6)])
        truth = math.exp(log_loss(theta, further)[0] + NOISE * generator.standard_normal())
        given = prior.given(simulated_shares(theta, generator))
        low, high = Law.fit(run, given).predict(further)[0, 1:]
        inside += low < truth < high
        for is_counted, belief in ((True, given), (False, marginal)):
            theta, _ = most_likely(run, belief)
            errors[is_counted].append(abs(log_loss(theta, further)[0] - math.log(truth)))
    assert inside / 20 >= 0.8  # of intervals of 90%
    assert np.median(errors[True]) < 0.8 * np.median(errors[False])


def test_a_prediction_lies_inside_of_its_interval():
    """Also on texts so odd that the loss of the most likely coefficients does not."""
    shapes, n_outside = (Shape(64, 64), Shape(96, 512)), 0
    runs = np.array([Run(s.n_weights, tokens, s.window, 4e5) for s in shapes for tokens in (1e5, 1e6, 1e7)])
    for share in (0.01, 0.05, 0.2, 0.6):
        law = Law.of_prior(Prior.load().given(np.array([share, share])))
        loss, low, high = law.predict(runs).T
        assert (low < loss).all() and (loss < high).all()
        likely = np.exp(log_loss(law.theta, runs))
        n_outside += ((likely <= low) | (likely >= high)).sum()
    assert n_outside


@pytest.mark.parametrize("is_known", [(True, True), (True, False), (False, True), (False, False)])
def test_a_prior_that_is_conditional_on_the_shares_is_that_of_many_draws(is_known):
    """Against the draws of the whole distribution whose shares happen to lie there; a share may be unknown."""
    generator, known = np.random.default_rng(0), np.flatnonzero(is_known) + 11
    factor = 0.15 * generator.standard_normal((13, 13))
    prior = Prior(0.3 * generator.standard_normal(13) - 1, factor @ factor.T + 0.1 * np.eye(13))
    gaussian = generator.multivariate_normal(np.zeros(13), prior.covariance, 1_000_000)
    drawn = prior.mean + gaussian / np.sqrt(generator.chisquare(DOF, (len(gaussian), 1)) / DOF)
    for away in (0.0, 1.0):
        at = prior.mean[11:] + away * np.sqrt(np.diag(prior.covariance)[11:])
        near = drawn[(np.abs(drawn[:, known] - at[known - 11]) < 0.1).all(axis=1)][:, :11]
        given = prior.given(np.where(is_known, np.exp(at), math.nan))
        assert given.dof == DOF + len(known)
        assert near.mean(0) == pytest.approx(given.mean, abs=0.05)
        variance = given.dof / (given.dof - 2) * np.diag(given.covariance)  # of a t distribution
        assert near.var(0) == pytest.approx(variance, rel=0.15)
        untouched = Law.of_prior(given).thetas
        assert untouched.mean(0) == pytest.approx(given.mean, abs=0.15)
        assert np.quantile(untouched, 0.75, 0) == pytest.approx(np.quantile(near, 0.75, 0), abs=0.15)


def test_a_share_that_was_not_measured_counts_as_what_the_others_make_likely():
    """A prior of simulated texts, a third of which lack their second share, is about that of all of them."""
    generator, studied = np.random.default_rng(2), {}
    for i in range(30):
        theta = FIRST_GUESS + SPREAD * generator.standard_normal(11)
        studied[i] = Studied(simulated_runs(theta, generator), simulated_shares(theta, generator))
    whole = Prior.of_texts(studied, iterations=4)
    lacking = {i: Studied(text.runs, np.where([True, i % 3 > 0], text.shares, math.nan)) for i, text in studied.items()}
    prior = Prior.of_texts(lacking, iterations=6)
    spread = np.sqrt(np.diag(whole.covariance))
    assert np.abs((prior.mean - whole.mean) / spread).max() < 0.1
    correlation, its = (p.covariance / np.outer(*[np.sqrt(np.diag(p.covariance))] * 2) for p in (whole, prior))
    assert correlation[12, 11] > 0.5 and its[12, 11] == pytest.approx(correlation[12, 11], abs=0.1)
    assert its[12, :11] == pytest.approx(correlation[12, :11], abs=0.2)


def test_a_text_like_no_other_moves_the_prior_little():
    """Eleven simulated texts and one far from them: how far that one takes the mean, beside a twelfth like them."""
    generator, means = np.random.default_rng(3), {}
    thetas = [FIRST_GUESS + SPREAD * generator.standard_normal(11) for _ in range(12)]
    strange = thetas[-1] + np.eye(11)[0] * 12 * SPREAD[0]  # in E alone
    for name, last in (("alike", thetas[-1]), ("strange", strange)):
        texts = [*thetas[:-1], last]
        draws = np.random.default_rng(4)
        studied = {i: Studied(simulated_runs(theta, draws), np.array([0.4, 0.4])) for i, theta in enumerate(texts)}
        means[name] = Prior.of_texts(studied, iterations=8).mean[0]
    in_proportion = 12 * SPREAD[0] / 13  # the first guess counts as one more
    assert means["strange"] - means["alike"] < 0.75 * in_proportion


def test_the_runs_of_the_prior_are_what_the_law_says_of_them():
    texts = read_runs()
    prior, stored = Prior.of_texts(texts), Prior.load()
    assert prior.mean == pytest.approx(stored.mean, abs=1e-3)
    assert prior.covariance == pytest.approx(stored.covariance, abs=1e-3)
    assert texts.keys() > SUDDEN
    for name, text in texts.items():
        theta, _ = most_likely(text.runs, prior.given(text.shares))
        assert np.abs(log_loss(theta, text.runs) - np.log(text.runs[:, 4])).max() < (0.2 if name in SUDDEN else 0.05)


def test_a_text_that_the_prior_does_not_know_is_predicted_from_its_shares_and_a_short_run():
    """Every stored text from the others and its first short run: bench/law_accuracy.py does so with all of them."""
    texts, inside, errors = read_runs(), [], {True: [], False: []}
    for name, text in texts.items():
        prior = Prior.of_texts({other: texts[other] for other in texts if other != name}, iterations=2)
        probe = text.runs[np.argmin(text.runs[:, 1])]
        longest = text.runs[[np.argmax(text.runs[:, 1])]]
        for is_counted in (True, False):
            belief = prior.given(text.shares if is_counted else UNKNOWN)
            theta, _ = most_likely(probe[None], belief)
            errors[is_counted].append(abs(log_loss(theta, longest)[0] - math.log(longest[0, 4])))
        low, high = Law.fit(probe[None], prior.given(text.shares)).predict(longest)[0, 1:]
        inside.append(low < longest[0, 4] < high)
    assert np.mean(inside) >= 0.75  # of intervals of 90%, on 46 texts, six of them by programs
    assert np.sqrt(np.mean(np.square(errors[True]))) < 0.7 * np.sqrt(np.mean(np.square(errors[False])))
    assert np.median(errors[True]) < 0.08


def test_a_text_that_repeats_itself_is_planned_for_as_well():
    prior, run = Prior.load(), np.array([Run(Shape(64, 128).n_weights, 6e4, 128, 1e6, 1e-3)])
    further = np.array([Run(Shape(64, 128).n_weights, 1e6, 128, 1e6)])
    for share in (1e-6, 0.05, 1.1):
        draws = Law.fit(run, prior.given(np.array([share, share]))).predict(further * [1, 1000, 1, 1, 1])[0]
        assert np.isfinite(draws).all() and draws[1] <= draws[0] <= draws[2]
        loss, low, high = Law.fit(run, prior.given(np.array([share, share]))).predict(further)[0]
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


def test_the_shares_of_a_text_are_those_of_counting_and_compressing_it(prepared, call, monkeypatch):
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(60_000), encoding="utf-8")
    for options in (["--tokenizer", "char"], ["--tokenizer", "bpe", "--vocab_size", "300"]):
        assert call("data.py", text, *options).status == 0
        opened = open_text(prepared / "dataset" / "pretrain_train.bin")
        n_characters = len(text.read_text())
        nats = math.log(2) * 8 * len(lzma.compress(text.read_bytes())) / n_characters  # of a character
        tokens = opened.tokens_per_character  # in one of them
        assert math.isnan(opened.lzma_share)  # too short a text
        kept = json.loads(json.dumps(opened.record, allow_nan=False))
        assert shares_of(kept) == pytest.approx(opened.shares, abs=1e-6, nan_ok=True)
        monkeypatch.setattr("planning.text.COUNTED", opened.unique)
        assert opened.lzma_share == pytest.approx(nats / (tokens * opened.baselines["unigram"]), rel=0.03)
        assert opened.shares.tolist() == [opened.ngram_share, opened.lzma_share]
        monkeypatch.setattr("planning.text.COUNTED", 350_000)
    monkeypatch.setattr("planning.text.COUNTED", 0)
    assert opened.lzma_share > 0
    del opened.baselines["lzma_bits_per_character"]
    assert math.isnan(opened.lzma_share)


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


def test_a_plan_is_a_config_that_trains_and_compares_itself_with_what_it_reached(prepared, call, monkeypatch):
    monkeypatch.setattr(time, "process_time", lambda: 3.0)  # of imports; in this process it is that of all tests before
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(400_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    result = call("plan.py", "dataset/pretrain_train.bin", "--minutes", "0.5")
    assert result.status == 0, result.err
    for row in ("| 3 min", "| 10 min", "| 30 min", "| 2 h", "| 8 h", "| 0.5 min"):
        assert row in result.out
    assert "unigram" in result.out and "lzma" in result.out
    assert "to train it: python train.py -t plan" in result.out
    assert (prepared / "plan.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((prepared / "config" / "plan.json").read_text())
    assert config["decay_over"] == ("steps" if "used <-" in result.out else "time")  # slow machines take all the time
    assert 0.25 < config["max_minutes"] <= 0.5
    assert not list((prepared / "checkpoint").glob("*"))  # probes leave nothing behind

    (prepared / "config" / "plan.json").write_text(json.dumps(config | {"max_minutes": 0.02}))
    trained = call("train.py", "-t", "plan", "--log_interval", "2")
    assert trained.status == 0, trained.err
    assert "warning" not in trained.err
    numbers = re.search(r"predicted ([\d.]+) \(([\d.]+) to ([\d.]+), .* tokens\); reached ([\d.]+)", trained.out)
    predicted, low, high, reached = map(float, numbers.groups())
    # strictly before they are rounded to print: test_a_prediction_lies_inside_of_its_interval
    assert low <= predicted <= high > low
    (log,) = prepared.glob("train_*.log")
    assert reached == pytest.approx(min(r["val_loss"] for r in read_log(log, "val")), abs=6e-4)

    trained = call("train.py", "-t", "plan", "--n_layer", "1", "--learning_rate", "0.01")
    assert "not as it was planned (learning_rate, n_layer); reached" in trained.out
    shape = {name: config[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "rope_theta")}
    (prepared / "other.json").write_text(json.dumps(shape | {"use_rope": False}))
    trained = call("train.py", "-t", "plan", "-m", "other.json")
    assert "not as it was planned (model); reached" in trained.out
    assert call("train.py", "-t", "plan", "--stage", "first").status == 0
    trained = call("train.py", "-t", "plan", "--from_checkpoint", "checkpoint/first.pt")
    assert "not as it was planned (from_checkpoint); reached" in trained.out
    resumed = ["--stage", "first", "--from_checkpoint", "checkpoint/first_last.pt"]
    longer = {"max_minutes": 1.0, "max_steps": 2 + load_checkpoint("checkpoint/first_last.pt")["step"]}
    (prepared / "config" / "plan.json").write_text(json.dumps(config | longer))
    assert "; reached" in (again := call("train.py", "-t", "plan", *resumed).out) and "predicted" in again
    other = ["--from_checkpoint", "checkpoint/plan_last.pt"]  # which began with other weights
    longer["max_steps"] = 2 + load_checkpoint("checkpoint/plan_last.pt")["step"]
    (prepared / "config" / "plan.json").write_text(json.dumps(config | longer))
    assert "not as it was planned (from_checkpoint); reached" in call("train.py", "-t", "plan", *other).out
    (prepared / "config" / "plan.json").write_text(json.dumps(config | {"max_minutes": 0.02}))

    text.write_text("completely different text, " * 500)
    assert call("data.py", text, "--tokenizer", "char").status == 0
    trained = call("train.py", "-t", "plan", "--max_minutes", "0.01")
    assert "the plan was made for other data" in trained.err
    assert "planned for other data; reached" in trained.out and "predicted" not in trained.out
    newest = max(prepared.glob("train_*.log"), key=lambda path: path.stat().st_mtime_ns)
    (header,) = read_log(newest, "header")
    assert header["train_config"]["prediction"] == "planned for other data"  # plot_loss.py draws none


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
    assert result.err.endswith("error: nothing is planned\n")
    (prepared / "short.txt").write_text("too short")
    prepared_before = (prepared / "dataset" / "pretrain_train.bin").read_bytes()
    assert "short.txt: 9 bytes are too few to plan for" in call("plan.py", "short.txt", "--minutes", "1").err
    assert (prepared / "dataset" / "pretrain_train.bin").read_bytes() == prepared_before
    (prepared / "gbk.txt").write_bytes("你好，世界。\n".encode("gbk") * 3000)
    result = call("plan.py", "gbk.txt", "--minutes", "1", *rest.split())
    again = f"`python plan.py dataset/pretrain_train.bin --minutes 1 {rest}`"
    assert result.err.endswith(f"`python data.py gbk.txt OPTION`, {again}\n")
    assert earlier.read_text() == '{"planned_for": "x"}'


def test_a_text_that_repeats_itself_is_said_to(prepared, call, monkeypatch):
    (prepared / "line.txt").write_text("the same line again and again\n" * 5000)
    monkeypatch.setattr(plan, "run_probe", lambda *_: None)
    result = call("plan.py", "line.txt", "--minutes", "0.5", "--output", "plans/line.json")
    assert result.status == 0 and "this text repeats itself" in result.out
    assert "dataset/pretrain_train.bin, of line.txt:" in result.out
    assert (prepared / "plans" / "line.png").stat().st_size > 10_000  # beside the config

    (prepared / "dataset" / "pretrain.txt").write_text(markov_text(100_000), encoding="utf-8")
    assert call("data.py", "--tokenizer", "char").status == 0
    (prepared / "other.png").write_text("a picture of something else")
    rest = ["dataset/pretrain_train.bin", "--minutes", "0.5"]
    result = call("plan.py", *rest, "--output", "other.json")
    assert result.status == 1 and "other.png: exists, and is of no plan" in result.err
    result = call("plan.py", *rest)
    assert result.status == 0 and "repeats itself" not in result.out and (prepared / "plan.png").exists()


def test_a_plan_for_a_short_text_that_says_little_ends_early_and_says_so(prepared, call):
    text = prepared / "dataset" / "pretrain.txt"
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice([*"abcdefghijklmnop"], 5)) for _ in range(1000)]
    text.write_text(" ".join(generator.choice(words, 6000)), encoding="utf-8")  # in no order that could be learnt
    assert call("data.py", text, "--tokenizer", "char").status == 0
    result = call("plan.py", "dataset/pretrain_train.bin", "--minutes", "2")
    assert re.search(r"\| 2 min, [\d.]+ (s|min) used <-", result.out)
    assert "a network would learn this text by heart" in result.out
    config = json.loads((prepared / "config" / "plan.json").read_text())
    assert config["decay_over"] == "steps" and 1.5 < config["max_minutes"] < 2  # the time there is, to be safe
    read = config["max_steps"] * config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    planned, unit = re.search(r", ([\d.]+)([KM]) tokens\)", config["prediction"]).groups()
    assert read == pytest.approx(float(planned) * {"K": 1e3, "M": 1e6}[unit], rel=0.05)
    assert "more time would not help" in result.out


@pytest.mark.parametrize("F", [0.05, 1e-9])
def test_a_plan_ends_before_a_text_is_learnt_by_heart_and_else_takes_its_time(prepared, call, monkeypatch, F):
    """Of a law that is known: against the lowest loss of a fine grid of amounts of tokens."""
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(100_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    text = open_text(prepared / "dataset" / "pretrain_train.bin")
    theta = FIRST_GUESS.copy()
    theta[10] = math.log(F)
    law = Law(theta, theta[None].repeat(100, 0))
    machine = Machine(text.vocab_size, 1.0, {})
    machine.add(Shape(96, 64), 20_000)  # tokens per second
    for candidate in plan.candidates(law, machine, text, 60):
        shape = candidate.shape
        most = machine.seconds(60) * machine.tokens_per_s(shape)
        amounts = np.geomspace(text.unique / 4, most, 2000)
        runs = np.array([(shape.n_weights, D, shape.window, text.unique, 0) for D in [*amounts, candidate.tokens]])
        *losses, loss = np.exp(log_loss(theta, runs))
        assert loss <= 1.001 * min(losses)
        if F < 1e-6:
            assert candidate.minutes == 60 and candidate.tokens == most
        else:
            assert candidate.minutes < 60 and candidate.tokens < 0.5 * most
            assert machine.minutes(shape, candidate.tokens) == pytest.approx(candidate.minutes)
            longer = np.exp(log_loss(theta, np.array([(shape.n_weights, 2 * candidate.tokens, *runs[0, 2:])])))[0]
            assert longer > 1.01 * min(losses)  # so that it does not end for nothing

    def read(shape, fields, clock):
        steps = fields["batch_size"] * fields["gradient_accumulation_steps"] * fields["block_size"]
        return plan.Probe(shape, fields["max_steps"] * steps, 1.0, 20_000)

    monkeypatch.setattr(plan, "probe", read)
    probe = plan.run_probe(law, machine, text, {"eval_iters": 1}, 60, Clock(400))
    its_own = plan.candidates(law, machine, text, 60)[0].tokens
    if F > 1e-6:  # read more often it would be learnt by heart, of which the law would make too much
        assert probe.tokens == pytest.approx(its_own, rel=0.1)
    else:
        assert probe.tokens < 0.5 * its_own  # all that planning has time for
    assert plan.candidates(law, machine, text, 60, 1e9)[0].minutes == 60  # were the text a longer one


def test_the_shape_of_a_plan_is_the_best_also_where_its_time_is_only_just_too_long(prepared, call):
    """Or a shape that ends early would win over one that takes all the time, for which a loss is allowed."""
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(100_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    text = open_text(prepared / "dataset" / "pretrain_train.bin")
    theta = FIRST_GUESS.copy()
    law = Law(theta, theta[None].repeat(100, 0))
    machine = Machine(text.vocab_size, 1.0, {})
    machine.add(Shape(96, 64), 20_000)  # tokens per second
    takes_all = 0
    for minutes in np.geomspace(0.2, 5, 60):
        found, lowest = plan.candidates(law, machine, text, minutes), []
        for shape in (candidate.shape for candidate in found):
            most = machine.seconds(minutes) * machine.tokens_per_s(shape)
            amounts = [most, *(D for D in text.unique * plan.READINGS if most > D)]
            runs = np.array([(shape.n_weights, D, shape.window, text.unique, 0) for D in amounts])
            losses = np.exp(log_loss(theta, runs))
            lowest.append(min(losses[0], 1.01 * losses.min()))
        assert min(lowest) == lowest[0]
        takes_all += found[0].minutes == minutes
    assert 5 < takes_all < 60


def test_the_probe_is_of_the_best_shape_or_of_a_narrower_one_that_can_read_enough(prepared, call):
    text = prepared / "dataset" / "pretrain.txt"
    text.write_text(markov_text(100_000), encoding="utf-8")
    assert call("data.py", text, "--tokenizer", "char").status == 0
    text = open_text(prepared / "dataset" / "pretrain_train.bin")
    law = Law.of_prior(Belief(FIRST_GUESS, np.diag(np.full(11, 0.01)), DOF))
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
    values = plan.plan_fields(
        text, plan.candidates(law, machine, text, 30)[0], fields | {"eval_iters": 7}, machine, 30, ""
    )
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
