"""Masked diffusion by number of steps: how many passes of the model for a block, against speed and right answers.

    python bench/denoising_steps.py held_out.jsonl -m checkpoint/diffusion_sft.pt
    python bench/denoising_steps.py held_out.jsonl -m checkpoint/block_diffusion_sft.pt checkpoint/sft.pt --steps 16 8

Greedy answers to the same questions; numbers of steps take turns, question by question, so that other programs disturb
all alike. A causal checkpoint beside it, with its cache, has one row: a pass for every token.
"""

import argparse
import time
from collections import defaultdict

from measuring import show

from base.configuration import run_main
from evaluation.questions import Answer, turns_of
from serving.text_generator import GenerationConfig, TextGenerator, load_text_generator
from text.corpus import read_conversations


def count_passes(generator: TextGenerator) -> list[int]:
    """A list that grows by one with every pass of the model."""
    passes, hidden = [], generator.model.hidden
    generator.model.hidden = lambda *tensors, **named: (passes.append(1), hidden(*tensors, **named))[1]
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", help="fine-tuning data that the model has not seen")
    parser.add_argument("-m", "--model", nargs="+", required=True, help="checkpoints")
    parser.add_argument("--steps", nargs="+", type=int, default=[32, 16, 8, 4, 2, 1], help="passes for a block")
    parser.add_argument("--limit", type=int, help="questions")
    args = parser.parse_args()
    turns = turns_of(read_conversations(args.questions, "utf-8", {}))[: args.limit]
    settings = []
    for path in args.model:
        generator = load_text_generator(path, "cpu", True)
        passes = count_passes(generator)
        for steps in args.steps if generator.model.config.mask_token else [None]:
            settings.append((f"{path}, {steps or 'a token a pass'}", generator, passes, steps))
    seconds, n_right, n_tokens, n_passes = (defaultdict(int) for _ in range(4))
    for turn in turns:
        for name, generator, passes, steps in settings:
            drawn, before, start = [], len(passes), time.perf_counter()
            config = GenerationConfig(temperature=0.0, steps=steps)
            text = "".join(generator.answer(turn.question, config, turn.history, drawn))
            seconds[name] += time.perf_counter() - start
            n_right[name] += Answer(turn, text).is_exact
            n_tokens[name] += len(drawn)
            n_passes[name] += len(passes) - before
    rows, results, n = [("model, steps", "exact match", "passes an answer", "ms an answer", "tokens/s")], {}, len(turns)
    for name, *_ in settings:
        right, ms, speed = n_right[name] / n, 1000 * seconds[name] / n, n_tokens[name] / seconds[name]
        rows.append((name, f"{right:.1%}", f"{n_passes[name] / n:.1f}", f"{ms:.1f}", f"{speed:.0f}"))
        results[name] = {"exact": right, "passes": n_passes[name] / n, "ms": ms, "tokens_per_s": speed}
    show(f"denoising: {n} questions", rows, results)


if __name__ == "__main__":
    run_main(main)
