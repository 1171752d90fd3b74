"""What one training step of each method costs, relative to ERM's, measured in one interleaved run.

python bench/step_cost.py configs/coloured-digits.yaml [--steps 60] [--threads 1]

Every round takes one step of each variant on the same batch, so that a busy machine slows all of them alike;
times are CPU seconds of the process, the figures are medians over rounds with the 10th and 90th percentile.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from hansfree.config import merge, parse
from hansfree.core import Teacher
from hansfree.parts import RunConfig, make_benchmark, make_method, make_model, teacher_config
from hansfree.plan import plan, read_suite
from hansfree.runs import read_yaml
from hansfree.training import make_optimiser


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("config", type=Path)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    suite = read_suite(read_yaml(given.config))
    steppers = {}
    for one in plan(suite):
        config = parse(RunConfig, merge(suite.base, one.changes))
        benchmark = make_benchmark(config)
        teacher = Teacher.live(make_model(teacher_config(config).model, benchmark)) if config.teacher else None
        method = make_method(config, benchmark, teacher)
        parameters = {"all": tuple(p for p in method.parameters() if p.requires_grad)}
        steppers[one.name] = (method, make_optimiser(parameters, config.training), parameters["all"], config.training)
    split = benchmark.split("train")
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for round in range(given.steps + 5):
        for name, (method, optimiser, parameters, training) in steppers.items():
            index = torch.arange(round, round + training.batch_size) % len(split)
            batch = split.batch(index, torch.Generator().manual_seed(round))
            start = time.process_time()
            sum(method(batch).values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.clip or float("inf"))
            optimiser.step()
            optimiser.zero_grad()
            if round >= 5:
                times[name].append(time.process_time() - start)
    baseline = times[next(iter(times))]
    print(f"{'variant':34} {'ms':>7} {'x ' + next(iter(times)):>8}   10 % to 90 %")
    for name, values in times.items():
        ratios = sorted(value / base for value, base in zip(values, baseline))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        ratio = statistics.median(ratios)
        print(f"{name:34} {1000 * statistics.median(values):7.1f} {ratio:8.2f}   {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
