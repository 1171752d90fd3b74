"""What one training step of each method costs, relative to ERM's, measured in one interleaved run.

python bench/step_cost.py configs/coloured-digits.yaml [key=value ...] [--steps 60] [--threads 1]

Every round takes one step of each variant on the same samples, so that a busy machine slows all of them alike; times
are CPU seconds of the process, the figures are medians over rounds with the 10th and 90th percentile. Of a grid the
first setting stands for all; what does not apply is left out. Teachers have random weights.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from hansfree.config import apply_overrides
from hansfree.errors import NotGivenError
from hansfree.experiment import built
from hansfree.methods.prepared_distiller import PreparedDistiller
from hansfree.plan import families, plan, read_suite
from hansfree.runs import SuiteFolder, read_yaml
from hansfree.suite import cells_of
from hansfree.training import make_optimiser

WARM_UP = 3


class Stepper:
    """One variant that takes steps and remembers what they cost."""

    def __init__(self, cell) -> None:
        self.training = cell.config.training
        self.benchmark, self.method = built(cell.config)
        self.method.train()
        if isinstance(self.method, PreparedDistiller):
            self.method.finish_stage()  # a step of the student's, not of what comes before
        groups = self.method.next_stage().groups or {"all": tuple(self.method.parameters())}
        self.groups = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
        self.optimiser = make_optimiser(self.groups, self.training)
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """Train on as many samples as the variant's batch has, from the ``number``-th on."""
        split = self.benchmark.split("train")
        index = torch.arange(number, number + self.training.batch_size) % len(split)
        batch = split.batch(index, torch.Generator().manual_seed(number))
        start = time.process_time()
        terms = self.method(batch)
        sum(terms.values()).backward()
        for group in self.groups.values():
            torch.nn.utils.clip_grad_norm_(group, self.training.clip or float("inf"))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.method.observe(batch, terms)
        self.seconds.append(time.process_time() - start)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("config", type=Path)
    options.add_argument("settings", nargs="*")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_intermixed_args()
    torch.set_num_threads(given.threads)
    suite = read_suite(apply_overrides(read_yaml(given.config), given.settings))
    first = {members[0].name for members in families(plan(suite)).values()}
    steppers: dict[str, Stepper] = {}
    for cell in cells_of(suite, SuiteFolder(Path("unused"))):
        if cell.seed != suite.seeds[0] or cell.variant not in first:
            continue
        try:
            steppers[cell.variant] = Stepper(cell)
        except NotGivenError as refusal:
            print(f"{cell.variant}: N/A, {refusal.reason}")
    for round in range(WARM_UP + given.steps):
        for stepper in steppers.values():
            stepper.step(round)
    show({name: stepper.seconds[WARM_UP:] for name, stepper in steppers.items()})


def show(seconds: dict[str, list[float]]) -> None:
    """Print milliseconds, and ratios to the first variant."""
    name, baseline = next(iter(seconds.items()))
    print(f"{'variant':34} {'ms':>7} {'x ' + name:>8}   10 % to 90 %")
    for name, values in seconds.items():
        ratios = sorted(value / base for value, base in zip(values, baseline))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        milliseconds, ratio = 1000 * statistics.median(values), statistics.median(ratios)
        print(f"{name:34} {milliseconds:7.1f} {ratio:8.2f}   {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
