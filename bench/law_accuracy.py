"""How accurate the scaling law of plan.py is by itself, without a clock: on texts that its prior does not know.

    python bench/law_accuracy.py

The texts of planning/runs.jsonl are dealt into eight groups, and of each group in turn the prior knows nothing. From a
single one of a text's short runs (60,000 or 120,000 tokens), as a plan has it, the losses of all its runs of more than
twice as many tokens are predicted: with what n-grams and lzma leave of it, with n-grams alone, and without both. Then
the plans that plan_accuracy.py has kept in bench/plans.jsonl: what was predicted for them, what the law as it is
predicts from the same short run, and what they have reached. Takes three minutes.
"""

import json
import math
from pathlib import Path

import numpy as np
from measuring import show

from base.configuration import run_main
from planning.law import Law, Prior, Run, Studied, read_runs, shares_of
from planning.recipe import Shape

PLANS = Path(__file__).with_name("plans.jsonl")
PROBES = 130_000  # tokens, at most
DISTANCES = ((2, 4), (4, 9), (9, 40), (40, 400))  # times as many tokens as the probe's
GROUPS = 8
KNOWN = {"both": (True, True), "n-grams": (True, False), "neither": (False, False)}

Found = list[tuple[str, float, float, bool]]


def predictions(texts: dict[str, Studied]) -> dict[str, Found]:
    """Of every pair of a probe and a longer run: text, times the tokens, relative error, is it in the interval."""
    found: dict[str, Found] = {kind: [] for kind in KNOWN}
    names, priors = sorted(texts), {}
    for i in range(GROUPS):
        prior = Prior.of_texts({name: texts[name] for name in names if name not in names[i::GROUPS]})
        priors |= dict.fromkeys(names[i::GROUPS], prior)
    for name, text in texts.items():
        for kind, is_known in KNOWN.items():
            belief = priors[name].given(np.where(is_known, text.shares, math.nan))
            for probe in text.runs[text.runs[:, 1] <= PROBES]:
                longer = text.runs[text.runs[:, 1] > 2 * probe[1]]
                if len(longer):
                    predicted = Law.fit(probe[None], belief).predict(longer)
                    for run, (loss, low, high) in zip(longer, predicted, strict=True):
                        found[kind].append((name, run[1] / probe[1], loss / run[4] - 1, bool(low <= run[4] <= high)))
    return found


def summary(found: Found) -> tuple[str, ...]:
    """Every text counts alike, however many runs it has."""
    names = [name for name, *_ in found]
    weights = np.array([1 / names.count(name) for name in names])
    errors, inside = np.abs([error for _, _, error, _ in found]), np.array([is_in for *_, is_in in found])
    weights, order = weights / weights.sum(), np.argsort(errors)
    middle = errors[order][np.searchsorted(np.cumsum(weights[order]), 0.5)]
    shares = [(weights * condition).sum() for condition in (errors <= 0.01, errors <= 0.03, inside)]
    return (str(len(found)), f"{middle:.1%}", *(f"{share:.0%}" for share in shares))


def plans() -> list[tuple[str, ...]]:
    """A row for each plan of plans.jsonl."""
    rows, prior = [], Prior.load()
    for plan in map(json.loads, PLANS.read_text(encoding="utf-8").splitlines()):
        shape = Shape(plan["n_embd"], plan["window"])
        run = np.array([Run(shape.n_weights, plan["planned_tokens"], shape.window, plan["unique"])])
        law = Law.of_prior(belief := prior.given(shares_of(plan)))
        if plan["probe"]:
            n_embd, window, loss, tokens = plan["probe"]
            weights = Shape(int(n_embd), int(window)).n_weights
            law = Law.fit(np.array([Run(weights, tokens, window, plan["unique"], loss / plan["unigram"])]), belief)
        loss, low, high = plan["unigram"] * np.minimum(1, law.predict(run)[0])  # as plan.py says it
        reached = plan["at_planned"]
        rows.append(
            (
                f"{plan['text']}, {plan['minutes']:g} min",
                str(shape),
                f"{plan['planned_tokens'] / 1e6:.3g}M ({plan['planned_tokens'] / plan['unique']:.2g})",
                f"{plan['predicted']:.3f}",
                f"{loss:.3f} ({low:.3f} to {high:.3f})",
                f"{reached:.3f}",
                f"{plan['predicted'] / reached - 1:+.1%}",
                f"{loss / reached - 1:+.1%}",
                "yes" if low <= reached <= high else "no",
            )
        )
    return rows


def main() -> None:
    header = ("known", "times the tokens", "predictions", "error in the middle", "within 1%", "within 3%", "inside")
    rows, results = [header], {}
    for kind, found in predictions(read_runs()).items():
        for low, high in (*DISTANCES, (2, 400)):
            part = [one for one in found if low <= one[1] < high]
            rows.append((kind, f"{low} to {high}", *summary(part)))
            results[f"{kind}, {low} to {high}"] = summary(part)
        for name in dict.fromkeys(name for name, *_ in found):
            part = [one for one in found if one[0] == name]
            rows.append((kind, name, *summary(part)))
    show("every text predicted from a short run and the other texts", rows, results)
    header = ("plan", "layers x width, window", "tokens (epochs)", "predicted", "by this law", "reached")
    show("plans", [(*header, "error then", "error by this law", "inside"), *plans()], {})


if __name__ == "__main__":
    run_main(main)
