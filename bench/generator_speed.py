"""Is training on toy problems bound by data generation? Time to generate a step's instances and to train on them.

    python bench/generator_speed.py             every problem with its default settings; the last line is JSON

In training the batches are prefetched by another thread (prefetch_steps), so the real cost is lower.
"""

import time

from measuring import show

from problems.tasks import PROBLEMS
from training.engine import Engine
from training.setup import build_run, problem_config

N_STEPS = 10


def main() -> None:
    rows, ratios = [("problem", "generation, ms", "training, ms", "generation / training")], {}
    for name in PROBLEMS:
        config = problem_config(name, {})
        run = build_run(config, Engine(config.training))

        steps = [run.batches.at(i * run.batches.samples_per_step) for i in range(N_STEPS)]
        start = time.perf_counter()
        for i in range(N_STEPS):
            run.batches.at((N_STEPS + i) * run.batches.samples_per_step)
        generation = (time.perf_counter() - start) / N_STEPS
        start = time.perf_counter()
        for batch in (batch for step in steps for batch in step):
            run.engine.forward_backward(run.loss, batch, batch.count, is_last=True)
            run.engine.step(0.01)
        training = (time.perf_counter() - start) / N_STEPS
        ratios[name] = generation / training
        rows.append((name, f"{1000 * generation:.2f}", f"{1000 * training:.1f}", f"{ratios[name]:.1%}"))
    show("data generation time relative to training time", rows, ratios)


if __name__ == "__main__":
    main()
