"""The scaling law: which validation loss a size reaches after so many tokens, and how sure that is.

    prior = Prior.load()                        # what runs on other texts say of a text before it is seen
    law = Law.fit(runs, prior)                  # runs (n, 5): short ones, on the text at hand
    law.predict(further)                        # (n, 3): the median, and the interval of nine in ten

Hoffmann et al. 2022 (arXiv:2203.15556, approach 3) write the loss of N weights after D tokens as E + A / N^alpha +
B / D^beta: what no model can know of the text, what a small one cannot hold, what a short run does not find out. At our
sizes three more things matter. Larger networks learn more from a token, and windows of W tokens teach the slower the
longer they are: the third term is B W^epsilon / (D^beta N^delta). A short window hides what stands far before a token:
C / W^gamma. And tokens read again teach less than new ones: D counts as in Muennighoff et al. 2023 (arXiv:2305.16264).

All is written as a share of the text's unigram entropy, in which English, Chinese and code are much alike. So runs on
other texts say beforehand about where every coefficient lies (its mean and covariance over texts: an empirical Bayes
prior, fitted by expectation maximisation), and a few short runs on the text at hand are enough.
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
NOISE = 0.008  # standard deviation of the logarithm of a loss: of seeds, and of what the law leaves out


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
    return np.log(E + A * N**-alpha + B * D**-beta * N**-delta * W**epsilon + C * W**-gamma)


def jacobian(theta: np.ndarray, runs: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Derivatives (n, 10) of log_loss by central differences."""
    steps = step * np.eye(len(theta))
    columns = [(log_loss(theta + h, runs) - log_loss(theta - h, runs)) / (2 * step) for h in steps]
    return np.stack(columns, axis=1)


@dataclass
class Prior:
    """Where the coefficients lie for a text that has not been trained on: a Gaussian."""

    mean: np.ndarray  # (10,)
    covariance: np.ndarray  # (10, 10)

    @functools.cached_property
    def precision(self) -> np.ndarray:
        return np.linalg.inv(self.covariance)

    @classmethod
    def load(cls) -> "Prior":
        """That of the runs in runs.jsonl, from prior.json: bench/scaling_runs.py writes both."""
        values = json.loads(PRIOR.read_text(encoding="utf-8"))
        return cls(np.array(values["mean"]), np.array(values["covariance"]))

    @classmethod
    def of_texts(cls, texts: dict[str, np.ndarray], iterations: int = 12) -> "Prior":
        """From runs (n, 5) on each of several texts: alternately every text's law, and their mean and covariance.

        The first guess counts as one text more, so that few texts do not make a prior that is too sure. For a further
        text the covariance of m is then widened to that of a prediction from so few: by (m + 1) / (m - 1).
        """
        first, m = np.diag(FIRST_SPREAD**2), 1 + len(texts)
        prior = cls(FIRST_GUESS, first)
        for _ in range(iterations):
            laws = [most_likely(runs, prior) for runs in texts.values()]
            mean = (FIRST_GUESS + sum(theta for theta, _ in laws)) / m
            spread = sum(covariance + np.outer(theta - mean, theta - mean) for theta, covariance in laws)
            prior = cls(mean, (first + spread) / m)
        return cls(prior.mean, prior.covariance * (m + 1) / (m - 1))


def log_posterior(theta: np.ndarray, runs: np.ndarray, prior: Prior) -> np.ndarray:
    """Up to a constant, for coefficients theta (..., 10): residuals and what departs from the prior, over variances."""
    residuals, away = np.log(runs[:, 4]) - log_loss(theta, runs), theta - prior.mean
    misfit = (residuals**2).sum(-1) / NOISE**2
    return -0.5 * (misfit + ((away @ prior.precision) * away).sum(-1))


def most_likely(runs: np.ndarray, prior: Prior) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of the highest posterior, by Levenberg and Marquardt's method, and Laplace's covariance."""
    theta, damping = prior.mean, 1e-3
    best = log_posterior(theta, runs, prior)
    while damping < 1e12:
        J, residuals = jacobian(theta, runs), np.log(runs[:, 4]) - log_loss(theta, runs)
        hessian = J.T @ J / NOISE**2 + prior.precision
        gradient = J.T @ residuals / NOISE**2 - prior.precision @ (theta - prior.mean)
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        there = theta + np.clip(step, -0.5, 0.5)
        gain = log_posterior(there, runs, prior) - best
        if gain > 0:
            theta, best, damping = there, best + gain, damping / 3
        if 0 <= gain < 1e-6:
            break
        damping *= 1 if gain > 0 else 4
    return theta, np.linalg.inv(hessian)


@dataclass
class Law:
    """The coefficients of one text: draws (m, 10) from their posterior."""

    thetas: np.ndarray

    @classmethod
    def of_prior(cls, prior: Prior) -> "Law":
        """Of a text on which nothing was trained yet."""
        return cls(np.random.default_rng(0).multivariate_normal(prior.mean, prior.covariance, 1000))

    @classmethod
    def fit(cls, runs: np.ndarray, prior: Prior) -> "Law":
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


def read_runs() -> dict[str, np.ndarray]:
    """The runs of planning/runs.jsonl, (n, 5) by text."""
    texts: dict[str, list[Run]] = {}
    for line in RUNS.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        shape = Shape(run["n_embd"], run["window"])
        loss = run["loss"] / run["unigram"]
        texts.setdefault(run["text"], []).append(Run(shape.n_weights, run["tokens"], shape.window, run["unique"], loss))
    return {text: np.array(runs) for text, runs in texts.items()}
