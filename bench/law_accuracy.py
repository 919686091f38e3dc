"""How accurate the scaling law of plan.py is by itself, without a clock: every text predicted from all the others.

    python bench/law_accuracy.py

Of each text of planning/runs.jsonl in turn the prior knows nothing. From a single one of its short runs (60,000 or
120,000 tokens), as a plan has it, the losses of all its runs of more than twice as many tokens are predicted: with what
its n-grams say of it, and without. Takes two minutes.
"""

import numpy as np
from measuring import show

from base.configuration import run_main
from planning.law import Belief, Law, Prior, read_runs

PROBES = 130_000  # tokens, at most
DISTANCES = ((2, 4), (4, 9), (9, 40))  # times as many tokens as the probe's


def predictions(is_counted: bool) -> list[tuple[str, float, float, bool]]:
    """Of every pair of a probe and a longer run: text, times the tokens, relative error, is it in the interval."""
    texts, found = read_runs(), []
    for name, text in texts.items():
        prior = Prior.of_texts({other: texts[other] for other in texts if other != name})
        marginal = Belief(prior.mean[:-1], prior.covariance[:-1, :-1])
        for probe in text.runs[text.runs[:, 1] <= PROBES]:
            longer = text.runs[text.runs[:, 1] > 2 * probe[1]]
            if not len(longer):
                continue
            law = Law.fit(probe[None], prior.given(text.ngram_share) if is_counted else marginal)
            for run, (loss, low, high) in zip(longer, law.predict(longer), strict=True):
                found.append((name, run[1] / probe[1], loss / run[4] - 1, bool(low <= run[4] <= high)))
    return found


def summary(found: list[tuple[str, float, float, bool]]) -> tuple[str, ...]:
    """Every text counts alike, however many runs it has."""
    names = [name for name, *_ in found]
    weights = np.array([1 / names.count(name) for name in names])
    errors, inside = np.abs([error for _, _, error, _ in found]), np.array([is_in for *_, is_in in found])
    weights, order = weights / weights.sum(), np.argsort(errors)
    middle = errors[order][np.searchsorted(np.cumsum(weights[order]), 0.5)]
    shares = [(weights * condition).sum() for condition in (errors <= 0.01, errors <= 0.03, inside)]
    return (str(len(found)), f"{middle:.1%}", *(f"{share:.0%}" for share in shares))


def main() -> None:
    header = ("n-grams", "times the tokens", "predictions", "error in the middle", "within 1%", "within 3%", "inside")
    rows, results = [header], {}
    for is_counted in (False, True):
        found, kind = predictions(is_counted), "with" if is_counted else "without"
        for low, high in (*DISTANCES, (2, 40)):
            part = [one for one in found if low <= one[1] < high]
            rows.append((kind, f"{low} to {high}", *summary(part)))
            results[f"{kind}, {low} to {high}"] = summary(part)
        for name in dict.fromkeys(name for name, *_ in found):
            part = [one for one in found if one[0] == name]
            rows.append((kind, name, *summary(part)))
    show("every text predicted from a short run and the other texts", rows, results)


if __name__ == "__main__":
    run_main(main)
