"""The scaling law: which validation loss a size reaches after so many tokens, and how sure that is.

    prior = Prior.load().given(ngram_share)     # what runs on other texts, and counting this one's n-grams, say of it
    law = Law.fit(runs, prior)                  # runs (n, 5): short ones, on the text at hand
    law.predict(further)                        # (n, 3): the median, and the interval of nine in ten

Hoffmann et al. 2022 (arXiv:2203.15556, approach 3) write the loss of N weights after D tokens as E + A / N^alpha +
B / D^beta: what no model can know of the text, what a small one cannot hold, what a short run does not find out. At our
sizes three more things matter. Larger networks learn more from a token, and windows of W tokens teach the slower the
longer they are: the third term is B W^epsilon / (D^beta N^delta). A short window hides what stands far before a token:
C / W^gamma. And tokens read again teach less than new ones: D counts as in Muennighoff et al. 2023 (arXiv:2305.16264).

All is written as a share of the text's unigram entropy. Runs on other texts say beforehand about where every
coefficient lies: its mean and covariance over texts, an empirical Bayes prior fitted by expectation maximisation. Among
them is one number that costs a second of counting instead of training: which share of the unigram entropy n-grams leave
(text.py). Where they leave little, a network will find much, however little of it a short run has found yet.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from planning.recipe import Shape

# the logarithms of: E, A, B, C as shares of the unigram entropy (at N = 1M, D = 1M, W = 128), their exponents, and
# R, the number of epochs that are worth as much as new text
NAMES = ("E", "A", "B", "C", "alpha", "beta", "delta", "epsilon", "gamma", "R")
FIRST_GUESS = np.log([0.30, 0.06, 0.12, 0.04, 0.4, 0.35, 0.1, 0.15, 0.7, 8.0])
FIRST_SPREAD = np.array([0.3, 0.5, 0.5, 0.7, 0.4, 0.4, 0.7, 0.7, 0.5, 0.5])  # of those, before any run is seen
RUNS, PRIOR = (Path(__file__).with_name(name) for name in ("runs.jsonl", "prior.json"))
NOISE = 0.015  # standard deviation of the logarithm of a loss: of seeds (0.004), and of what the law leaves out
DOF = 4  # degrees of freedom of the prior: few, as some texts are like no other (bench/law_accuracy.py: intervals)
FIRST_SHARE, SHARE_SPREAD = math.log(0.5), 0.4  # of what n-grams leave, likewise
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
    """Logarithm of the law at runs (n, 5): (n,) for coefficients theta (10,), (m, n) for (m, 10)."""
    E, A, B, C, alpha, beta, delta, epsilon, gamma, R = np.exp(np.moveaxis(theta, -1, 0))[..., None]
    N, D, W, unique, _ = runs.T
    D = effective_tokens(D, unique, R)
    N, D, W = N / 1e6, D / 1e6, W / 128
    with np.errstate(over="ignore"):  # of coefficients beyond all sense: an infinite loss, which no run has
        return np.log(E + A * N**-alpha + B * D**-beta * N**-delta * W**epsilon + C * W**-gamma)


def jacobian(theta: np.ndarray, runs: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Derivatives (n, 10) of log_loss by central differences."""
    steps = step * np.eye(len(theta))
    columns = [(log_loss(theta + h, runs) - log_loss(theta - h, runs)) / (2 * step) for h in steps]
    return np.stack(columns, axis=1)


class Studied(NamedTuple):
    """A text that runs were made on."""

    runs: np.ndarray  # (n, 5)
    ngram_share: float  # n-grams' loss over the unigram entropy


@dataclass
class Belief:
    """Where the coefficients of a text lie, as far as is known: a multivariate t distribution.

    Near its middle it is the Gaussian of this mean and covariance, but it does not exclude what lies far from it.
    """

    mean: np.ndarray  # (10,)
    covariance: np.ndarray  # (10, 10)

    @functools.cached_property
    def precision(self) -> np.ndarray:
        return np.linalg.inv(self.covariance)


@dataclass
class Prior:
    """Where the coefficients of a text lie that has not been trained on, and the logarithm of what n-grams leave of it.

    Together they have one distribution: how coefficients go with the n-grams is its covariance of the two.
    """

    mean: np.ndarray  # (11,)
    covariance: np.ndarray  # (11, 11)

    def given(self, ngram_share: float) -> Belief:
        """Of a text whose n-grams have been counted: the coefficients' part, conditional on the last coordinate.

        Where that is unusual, less is certain: the conditional of a t distribution is wider by (DOF + d^2) / (DOF + 1),
        with d standard deviations from the mean.
        """
        slope = self.covariance[:-1, -1] / self.covariance[-1, -1]
        away = math.log(max(LEAST_SHARE, ngram_share)) - self.mean[-1]
        wider = (DOF + away**2 / self.covariance[-1, -1]) / (DOF + 1)
        rest = self.covariance[:-1, :-1] - np.outer(slope, self.covariance[-1, :-1])
        return Belief(self.mean[:-1] + slope * away, wider * rest)

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
        guess, first = np.append(FIRST_GUESS, FIRST_SHARE), np.diag(np.append(FIRST_SPREAD, SHARE_SPREAD) ** 2)
        m, prior = 1 + len(texts), cls(guess, first)
        for _ in range(iterations):
            laws = [most_likely(text.runs, prior.given(text.ngram_share)) for text in texts.values()]
            shares = [math.log(text.ngram_share) for text in texts.values()]
            points = [np.append(theta, share) for (theta, _), share in zip(laws, shares, strict=True)]
            mean = (guess + sum(points)) / m
            spread = first + sum(np.outer(point - mean, point - mean) for point in points)
            spread[:-1, :-1] += sum(covariance for _, covariance in laws)  # the share is known, they are not
            prior = cls(mean, spread / m)
        return cls(prior.mean, prior.covariance * (m + 1) / (m - 1))


def departures(theta: np.ndarray, runs: np.ndarray, prior: Belief) -> tuple[np.ndarray, np.ndarray]:
    """Squares, over their variances, of the residuals of theta (..., 10), and of its distance to the prior's mean."""
    residuals, away = np.log(runs[:, 4]) - log_loss(theta, runs), theta - prior.mean
    return (residuals**2).sum(-1) / NOISE**2, ((away @ prior.precision) * away).sum(-1)


def log_posterior(theta: np.ndarray, runs: np.ndarray, prior: Belief) -> np.ndarray:
    """Up to a constant, for coefficients theta (..., 10): residuals are Gaussian, the prior is a t distribution."""
    residuals, away = departures(theta, runs, prior)
    dof = DOF + 1  # one more, as the n-grams are known
    return -0.5 * (residuals + (dof + len(NAMES)) * np.log1p(away / dof))


def most_likely(runs: np.ndarray, prior: Belief) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of the highest posterior, were the prior a Gaussian, and Laplace's covariance.

    By Levenberg and Marquardt's method.
    """
    theta, damping = prior.mean, 1e-3
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
    """The coefficients of one text: draws (m, 10) from their posterior."""

    thetas: np.ndarray

    @classmethod
    def of_prior(cls, prior: Belief) -> "Law":
        """Of a text on which nothing was trained yet."""
        generator = np.random.default_rng(0)
        away = generator.multivariate_normal(np.zeros(len(NAMES)), prior.covariance, 1000)
        return cls(prior.mean + away / np.sqrt(generator.chisquare(DOF + 1, (1000, 1)) / (DOF + 1)))

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
        return cls(np.concatenate(kept))

    def predict(self, runs: np.ndarray) -> np.ndarray:
        """Losses over the unigram entropy of runs (n, 5): the median, and the interval of nine in ten, (n, 3)."""
        drawn = log_loss(self.thetas, runs)
        noise = NOISE * np.random.default_rng(1).standard_normal((len(drawn), 1))
        return np.exp(np.quantile(drawn + noise, (0.5, 0.05, 0.95), axis=0)).T


def read_runs() -> dict[str, Studied]:
    """The runs of planning/runs.jsonl by text."""
    texts: dict[str, list[Run]] = {}
    shares = {}
    for line in RUNS.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        shape = Shape(run["n_embd"], run["window"])
        loss = run["loss"] / run["unigram"]
        texts.setdefault(run["text"], []).append(Run(shape.n_weights, run["tokens"], shape.window, run["unique"], loss))
        shares[run["text"]] = run["ngram_share"]
    return {text: Studied(np.array(runs), shares[text]) for text, runs in texts.items()}
