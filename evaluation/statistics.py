"""Standard errors, intervals, and whether a difference is one.

    mean, error = ratio(nats, tokens)                          # of windows (n,): nats per token, and its standard error
    found = compare(nats_a, nats_b, tokens)                    # the same windows, judged by two models
    found.difference, found.low, found.high                    # nats per token, and its 95% interval

What is drawn at random is the unit: a window of a text, a question. Tokens are not: those of one window depend on one
another, and a standard error that counts every one of them comes out too small.
"""

import math
from typing import NamedTuple

import numpy as np

N_RESAMPLES = 5000
FEWEST = 6  # units that show anything: five differences of one sign come about by chance in one of 16 tries, not of 20
RESAMPLED_AT_ONCE = 1 << 20  # units drawn at a time: bounds the memory
POWER_80 = (1.960 + 0.842) / 1.960  # over what makes a difference of this size just show: four of five texts then do


class Comparison(NamedTuple):
    """A mean difference with its 95% interval."""

    difference: float
    low: float
    high: float
    n_units: int
    n_needed: float  # units that would show a difference of this size, four times of five (or any); inf without one

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def ratio(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """sum(values) / sum(weights) over n units, and its standard error (nan for a single unit).

    The linearised error of a ratio (Cochran 1977, Sampling Techniques, 6.3): units may be of different size. For equal
    weights it is the standard deviation over the square root of n.
    """
    n, total = len(values), weights.sum()
    mean = values.sum() / total
    if n < 2:
        return float(mean), math.nan
    residuals = values - mean * weights
    return float(mean), float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / total)


def t_quantile(confidence: float, degrees: int) -> float:
    """The t for which a t-distributed variable is between -t and t with this probability.

    t = sqrt(degrees) tan(angle) turns the density into cos(angle) ** (degrees - 1), which is summed up here.
    """
    angle = np.linspace(0, math.pi / 2, 10_001)
    density = np.cos(angle) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(np.interp(confidence * area[-1], area, angle))


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard deviation, and half of the 95% interval of the mean by the t distribution, of n >= 2 runs."""
    n, deviation = len(values), float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation, t_quantile(0.95, n - 1) * deviation / math.sqrt(n)


def compare(a: np.ndarray, b: np.ndarray, weights: np.ndarray, seed: int = 0) -> Comparison:
    """sum(a - b) / sum(weights) over the same n units, with its 95% interval by the paired bootstrap.

    Units are drawn with replacement, as often as there are units, and the difference is computed anew; the middle 95%
    of these are the interval. With few units it would be too narrow; its ends are moved outwards by what t and n - 1
    ask for (Hesterberg 2015, arXiv:1411.5279: the expanded percentile interval). They cannot lie beyond the smallest
    and the largest difference of a unit, so fewer than FEWEST units have no interval: it goes from -inf to inf.
    """
    differences, n = a - b, len(a)
    difference, error = ratio(differences, weights)
    if n < FEWEST:
        return Comparison(difference, -math.inf, math.inf, n, FEWEST)
    rng = np.random.default_rng(seed)
    resampled = []
    for start in range(0, N_RESAMPLES, step := max(1, RESAMPLED_AT_ONCE // n)):
        drawn = rng.integers(0, n, (min(step, N_RESAMPLES - start), n))  # (resamples, n)
        resampled.append(differences[drawn].sum(1) / weights[drawn].sum(1))
    outwards = math.sqrt(n / (n - 1)) * t_quantile(0.95, n - 1)
    tail = math.erfc(outwards / math.sqrt(2)) / 2  # 0.025 for many units
    low, high = np.quantile(np.concatenate(resampled), [tail, 1 - tail])
    needed = n * (POWER_80 * 1.960 * error / difference) ** 2 if difference else math.inf
    return Comparison(difference, float(low), float(high), n, needed)


def verdict(a: str, b: str, found: Comparison, unit: str, size: float, what: str, scale: float = 1.0) -> str:
    """A comparison in words. a, b: names, b better where the difference is above 0.

    size, what: how much was read, "characters", to say how much more would show the difference. scale: of what is
    printed, 100 for percentage points.
    """
    difference, low, high = (scale * value for value in found[:3])
    if found.n_units < FEWEST:
        units = f"{found.n_units} unit{'s' * (found.n_units > 1)}"
        return f"nothing can be said of {b} against {a} from {units}: at least {FEWEST} are needed"
    if low == high == 0:
        return f"no difference between {a} and {b}"
    digits = max(0, 1 - math.floor(math.log10((high - low) / 2))) if high > low else 4
    if difference < 0:
        a, b, difference, low, high = b, a, -difference, -high, -low
    text = f"{b} is better than {a} by {difference:.{digits}f} {unit}, 95% {low:.{digits}f} to {high:.{digits}f}"
    if found.is_shown:
        return text
    text = f"no difference that {'this text' if what == 'characters' else 'these questions'} can show: {text}"
    times = found.n_needed / found.n_units - 1
    if times > 100:
        return text + f"; a hundred times as many {what} would hardly show it"
    return text + f"; about {two_digits(max(times, 0.1) * size):,} more {what} would"


def two_digits(value: float) -> int:
    """A number rounded to two digits, as an estimate should be read."""
    step = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return max(1, step * round(value / step))
