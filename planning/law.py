"""The scaling law: which validation loss a size reaches after so many tokens, and how sure that is.

    prior = Prior.load().given(shares)          # what runs on other texts, n-grams and a compressor say of this one
    law = Law.fit(runs, prior)                  # runs (n, 5): short ones, on the text at hand
    law.predict(further)                        # (n, 3): the most likely loss, and the interval of nine in ten

Hoffmann et al. 2022 (arXiv:2203.15556, approach 3) write the loss of N weights after D tokens as E + A / N^alpha +
B / D^beta: what no model can know of the text, what a small one cannot hold, what a short run does not find out. At our
sizes four more things matter. Larger networks learn more from a token, and windows of W tokens teach the slower the
longer they are: the third term is B W^epsilon / (D^beta N^delta). A short window hides what stands far before a token:
C / W^gamma. Tokens read again teach less than new ones: D counts as in Muennighoff et al. 2023 (arXiv:2305.16264). And
a network that reads a text of U tokens again and again learns it by heart, which costs on other text: overfitting
multiplies the loss by 1 + F N U^-0.5 (repeats / 4)^1.4, with N and U in millions, where repeats are D / U - 1. Five
epochs of a million tokens with a million weights cost F. The exponents are the same for all texts: few of them say
anything about them.

All is written as a share of the text's unigram entropy. Runs on other texts say beforehand about where every
coefficient lies: its mean and covariance over texts, an empirical Bayes prior fitted by expectation maximisation. Among
them are two numbers that cost no training: which shares of the unigram entropy n-grams and a compressor leave
(text.py). Where they leave little, a network will find much, however little of it a short run has found yet.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from base.configuration import UserError
from planning.recipe import Shape

# the logarithms of: E, A, B, C as shares of the unigram entropy (at N = 1M, D = 1M, W = 128), their exponents, R, the
# number of epochs that are worth as much as new text, and F
NAMES = ("E", "A", "B", "C", "alpha", "beta", "delta", "epsilon", "gamma", "R", "F")
FIRST_GUESS = np.log([0.30, 0.06, 0.12, 0.04, 0.4, 0.35, 0.1, 0.15, 0.7, 8.0, 0.05])
FIRST_SPREAD = np.array([0.3, 0.5, 0.5, 0.7, 0.4, 0.4, 0.7, 0.7, 0.5, 0.5, 1.0])  # before any run is seen
RUNS, PRIOR = (Path(__file__).with_name(name) for name in ("runs.jsonl", "prior.json"))
BY_HEART = 1.4  # with how high a power of the repeats overfitting grows (bench/NOTES.md)
NOISE = 0.01  # standard deviation of the logarithm of a loss: of seeds (0.004), and of what the law leaves out
DOF = 4  # degrees of freedom of the prior: few, as some texts are like no other (bench/law_accuracy.py: intervals)
SHARES = ("ngram_share", "lzma_share")  # of a text: what these two leave of the unigram entropy
FIRST_SHARE, SHARE_SPREAD = math.log(0.5), 0.4  # of their logarithms, the first guess
BEYOND = 100.0  # the logarithm of a loss that no run has
LEAST_SHARE = 0.05  # smaller ones count as this: among the texts of the prior 0.13 is the least


class Run(NamedTuple):
    """A training run with its own full decay of the learning rate."""

    n_weights: float  # of the blocks
    tokens: float  # read in training
    window: float
    unique: float  # tokens of the training text
    loss: float = math.nan  # validation, over the unigram entropy


def effective_tokens(tokens: np.ndarray, unique: np.ndarray, R: float) -> np.ndarray:
    """Tokens that are worth as much as all that were read, were none of them read twice: Muennighoff et al., eq. 5."""
    repeats = np.maximum(tokens / unique - 1, 0)
    return np.minimum(tokens, unique) + unique * R * (1 - np.exp(-repeats / R))


def log_loss(theta: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Logarithm of the law at runs (n, 5): (n,) for coefficients theta (11,), (m, n) for (m, 11)."""
    E, A, B, C, alpha, beta, delta, epsilon, gamma, R, F = np.exp(np.moveaxis(theta, -1, 0))[..., None]
    N, D, W, unique, _ = runs.T
    repeats = np.maximum(D / unique - 1, 0)
    with np.errstate(over="ignore", invalid="ignore"):  # of coefficients beyond all sense
        D = effective_tokens(D, unique, R)
        N, D, W = N / 1e6, D / 1e6, W / 128
        loss = E + A * N**-alpha + B * D**-beta * N**-delta * W**epsilon + C * W**-gamma
        logarithm = np.log(loss) + np.log1p(F * N * (unique / 1e6) ** -0.5 * (repeats / 4) ** BY_HEART)
    return np.nan_to_num(logarithm, nan=BEYOND, posinf=BEYOND)


def jacobian(theta: np.ndarray, runs: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Derivatives (n, 11) of log_loss by central differences."""
    steps = step * np.eye(len(theta))
    columns = [(log_loss(theta + h, runs) - log_loss(theta - h, runs)) / (2 * step) for h in steps]
    return np.stack(columns, axis=1)


class Studied(NamedTuple):
    """A text that runs were made on."""

    runs: np.ndarray  # (n, 5)
    shares: np.ndarray  # (2,) what n-grams and lzma leave of the unigram entropy; nan: not known


@dataclass
class Belief:
    """Where the coefficients of a text lie, as far as is known: a multivariate t distribution.

    Near its middle it is the Gaussian of this mean and covariance, but it does not exclude what lies far from it.
    """

    mean: np.ndarray  # (11,)
    covariance: np.ndarray  # (11, 11)
    dof: float  # degrees of freedom

    @functools.cached_property
    def precision(self) -> np.ndarray:
        return np.linalg.inv(self.covariance)


@dataclass
class Prior:
    """Where the coefficients of a text lie that has not been trained on, and the logarithms of its two shares.

    Together they have one distribution: how coefficients go with the shares is its covariance of the two.
    """

    mean: np.ndarray  # (13,)
    covariance: np.ndarray  # (13, 13)

    def conditional(self, is_known: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the coordinates that are not known, as a Gaussian's: mean, covariance, slope over those that are."""
        rest = ~is_known
        slope = np.linalg.solve(self.covariance[np.ix_(is_known, is_known)], self.covariance[np.ix_(is_known, rest)]).T
        mean = self.mean[rest] + slope @ (values - self.mean[is_known])
        return mean, self.covariance[np.ix_(rest, rest)] - slope @ self.covariance[np.ix_(is_known, rest)], slope

    def given(self, shares: np.ndarray) -> Belief:
        """Of a text with these shares (2,), nan where one is not known: the coefficients' part, conditional on them.

        Where they are unusual, less is certain: the conditional of a t distribution on k coordinates is wider by
        (DOF + d^2) / (DOF + k), with d their Mahalanobis distance from the mean.
        """
        n = len(NAMES)
        is_known = np.append(np.zeros(n, bool), ~np.isnan(shares))
        values = log_shares(shares)[is_known[n:]]
        away = values - self.mean[is_known]
        distance = away @ np.linalg.solve(self.covariance[np.ix_(is_known, is_known)], away)
        mean, covariance, _ = self.conditional(is_known, values)
        dof = DOF + len(values)
        return Belief(mean[:n], covariance[:n, :n] * (DOF + distance) / dof, dof)

    @classmethod
    def load(cls) -> "Prior":
        """That of the runs in runs.jsonl, from prior.json: bench/scaling_runs.py writes both."""
        values = json.loads(PRIOR.read_text(encoding="utf-8"))
        return cls(np.array(values["mean"]), np.array(values["covariance"]))

    @classmethod
    def of_texts(cls, texts: dict[str, Studied], iterations: int = 12) -> "Prior":
        """From runs on several texts: alternately every text's law, and their mean and covariance.

        The first guess counts as one text more, so that few texts do not make a prior that is too sure. For a further
        text the covariance of m is then widened to that of a prediction from so few: by (m + 1) / (m - 1).
        """
        n, m = len(NAMES), 1 + len(texts)
        guess = np.append(FIRST_GUESS, [FIRST_SHARE] * len(SHARES))
        first = np.diag(np.append(FIRST_SPREAD, [SHARE_SPREAD] * len(SHARES)) ** 2)
        prior, thetas = cls(guess, first), dict.fromkeys(texts, FIRST_GUESS)
        for _ in range(iterations):
            points, weights, spread = [guess], [1.0], first.copy()
            for name, text in texts.items():
                point, uncertainty = np.append(thetas[name], log_shares(text.shares)), np.zeros_like(first)
                point[:n], uncertainty[:n, :n] = most_likely(text.runs, prior.given(text.shares), thetas[name])
                thetas[name] = point[:n]
                if (missing := np.isnan(point)).any():  # a share that was not measured: as likely as all else makes it
                    known, unknown = np.ix_(~missing, ~missing), np.ix_(missing, missing)
                    point[missing], rest, slope = prior.conditional(~missing, point[~missing])
                    uncertainty[np.ix_(missing, ~missing)] = slope @ uncertainty[known]
                    uncertainty[np.ix_(~missing, missing)] = (slope @ uncertainty[known]).T
                    uncertainty[unknown] = rest + slope @ uncertainty[known] @ slope.T
                # of a t distribution outliers count less: by their expected squared distance from the mean
                squares = np.outer(point - prior.mean, point - prior.mean) + uncertainty
                weights.append((DOF + len(point)) / (DOF + np.trace(np.linalg.solve(prior.covariance, squares))))
                points.append(point)
                spread += uncertainty
            mean = np.average(points, axis=0, weights=weights)
            spread += sum(
                w * np.outer(point - mean, point - mean) for w, point in zip(weights[1:], points[1:], strict=True)
            )
            prior = cls(mean, spread / m)
        return cls(prior.mean, prior.covariance * (m + 1) / (m - 1))


def log_shares(shares: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(LEAST_SHARE, shares))


def departures(theta: np.ndarray, runs: np.ndarray, prior: Belief) -> tuple[np.ndarray, np.ndarray]:
    """Squares, over their variances, of the residuals of theta (..., 11), and of its distance to the prior's mean."""
    residuals, away = np.log(runs[:, 4]) - log_loss(theta, runs), theta - prior.mean
    return (residuals**2).sum(-1) / NOISE**2, ((away @ prior.precision) * away).sum(-1)


def log_posterior(theta: np.ndarray, runs: np.ndarray, prior: Belief) -> np.ndarray:
    """Up to a constant, for coefficients theta (..., 11): residuals are Gaussian, the prior is a t distribution."""
    residuals, away = departures(theta, runs, prior)
    return -0.5 * (residuals + (prior.dof + len(NAMES)) * np.log1p(away / prior.dof))


def most_likely(runs: np.ndarray, prior: Belief, start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of the highest posterior, were the prior a Gaussian, and Laplace's covariance.

    By Levenberg and Marquardt's method, from the prior's mean or another start.
    """
    theta, damping = prior.mean if start is None else start, 1e-3
    misfit = sum(departures(theta, runs, prior))
    while damping < 1e12:
        J, residuals = jacobian(theta, runs), np.log(runs[:, 4]) - log_loss(theta, runs)
        hessian = J.T @ J / NOISE**2 + prior.precision
        gradient = J.T @ residuals / NOISE**2 - prior.precision @ (theta - prior.mean)
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        there = theta + np.clip(step, -0.5, 0.5)
        gain = misfit - sum(departures(there, runs, prior))
        if gain > 0:
            theta, misfit, damping = there, misfit - gain, damping / 3
        if 0 <= gain < 2e-6:
            break
        damping *= 1 if gain > 0 else 4
    return theta, np.linalg.inv(hessian)


@dataclass
class Law:
    """The coefficients of one text: the most likely ones (11,), and draws (m, 11) from their posterior.

    The middle of the draws' losses predicts worse than the loss of the most likely coefficients, by texts whose result
    is known (bench/NOTES.md): the far tails of a t distribution are not alike on both sides.
    """

    theta: np.ndarray
    thetas: np.ndarray

    @classmethod
    def of_prior(cls, prior: Belief) -> "Law":
        """Of a text on which nothing was trained yet."""
        generator = np.random.default_rng(0)
        away = generator.multivariate_normal(np.zeros(len(NAMES)), prior.covariance, 1000)
        return cls(prior.mean, prior.mean + away / np.sqrt(generator.chisquare(prior.dof, (1000, 1)) / prior.dof))

    @classmethod
    def fit(cls, runs: np.ndarray, prior: Belief) -> "Law":
        """To runs (n, 5) of the text, by 200 Markov chains that begin where Laplace's approximation says.

        That approximation alone would be too sure of itself: how exponents and constants trade off is no ellipse. A
        chain's step is the difference of two other chains, which fits the posterior's shape as it is (differential
        evolution, ter Braak 2006, doi:10.1007/s11222-006-8769-1); every tenth is a whole one, to leave a side valley.
        """
        generator = np.random.default_rng(0)
        theta, covariance = most_likely(runs, prior)
        chains = theta + generator.standard_normal((200, len(NAMES))) @ np.linalg.cholesky(covariance).T
        height, kept = log_posterior(chains, runs, prior), []
        for i in range(1, 2001):
            one, other = (chains[generator.permutation(200)] for _ in range(2))
            length = 1.0 if i % 10 == 0 else 2.38 / math.sqrt(2 * len(NAMES))
            there = chains + length * (one - other) + 1e-4 * generator.standard_normal(chains.shape)
            its_height = log_posterior(there, runs, prior)
            accepted = np.log(generator.random(200)) < its_height - height
            chains[accepted], height[accepted] = there[accepted], its_height[accepted]
            if i > 500 and i % 300 == 0:
                kept.append(chains.copy())
        return cls(theta, np.concatenate(kept))

    def predict(self, runs: np.ndarray) -> np.ndarray:
        """Losses over the unigram entropy of runs (n, 5): the most likely, and the interval of nine in ten, (n, 3).

        Where the two disagree, as they may on a text like no other, the middle of the draws takes the first's place.
        """
        likely, drawn = log_loss(self.theta, runs), log_loss(self.thetas, runs)
        noise = NOISE * np.random.default_rng(1).standard_normal((len(drawn), 1))
        low, middle, high = np.quantile(drawn + noise, (0.05, 0.5, 0.95), axis=0)
        return np.exp([np.where((low < likely) & (likely < high), likely, middle), low, high]).T


def shares_of(record: dict[str, Any]) -> np.ndarray:
    """The shares (2,) of the text that a line of runs.jsonl or bench/plans.jsonl is about, nan where it has none."""
    return np.array([record.get(name, math.nan) for name in SHARES])


def records() -> list[dict[str, Any]]:
    """The lines of planning/runs.jsonl; raises UserError for one that is none, as where a run was cut off."""
    found = []
    for number, line in enumerate(RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else [], 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{RUNS}: line {number} is no run: delete it, or what is left of it") from None
    return found


def read_runs() -> dict[str, Studied]:
    """The runs of planning/runs.jsonl by text."""
    texts: dict[str, list[Run]] = {}
    shares = {}
    for run in records():
        shape = Shape(run["n_embd"], run["window"])
        loss = run["loss"] / run["unigram"]
        texts.setdefault(run["text"], []).append(Run(shape.n_weights, run["tokens"], shape.window, run["unique"], loss))
        shares[run["text"]] = shares_of(run)
    return {text: Studied(np.array(runs), shares[text]) for text, runs in texts.items()}
