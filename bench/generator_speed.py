"""Does problem.py's training wait for its generator? Time to make a step's instances over time to train on them.

    python bench/generator_speed.py             every problem at its default setting; the last line is JSON

In training the generator runs in a thread of its own (prefetch_steps), so what it really costs is less than this.
"""

import time

from measuring import show

from problems.tasks import PROBLEMS
from training.engine import Engine
from training.setup import build_run, problem_config

N_STEPS = 10


def main() -> None:
    rows, shares = [("problem", "generator ms", "training ms", "generator / training")], {}
    for name in PROBLEMS:
        asked = problem_config(name, {})
        run = build_run(asked, Engine(asked.training))

        steps = [run.batches.at(i * run.batches.samples_per_step) for i in range(N_STEPS)]
        began = time.perf_counter()
        for i in range(N_STEPS):
            run.batches.at((N_STEPS + i) * run.batches.samples_per_step)
        making = (time.perf_counter() - began) / N_STEPS
        began = time.perf_counter()
        for batch in (batch for step in steps for batch in step):
            run.engine.forward_backward(run.loss, batch, batch.count, is_last=True)
            run.engine.step(0.01)
        learning = (time.perf_counter() - began) / N_STEPS
        shares[name] = making / learning
        rows.append((name, f"{1000 * making:.2f}", f"{1000 * learning:.1f}", f"{shares[name]:.1%}"))
    show("time to make instances over time to train on them", rows, shares)


if __name__ == "__main__":
    main()
