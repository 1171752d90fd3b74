"""Entropy between classes that are alike, of the finished runs of a suite: what each model knows of their likeness.

    python bench/similar_classes.py runs/cells-five-band "three tails" "eight tails"

A line for each variant: mean over seeds of the mean over right test samples, in bits, with the 95 % Student t interval.
"""

import sys
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from hansfree.config import parse
from hansfree.core import Benchmark
from hansfree.errors import unknown
from hansfree.metrics.class_similarity import NONE, category_entropy
from hansfree.parts import RunConfig, make_benchmark, read_exported
from hansfree.report.statistics import compare, estimate
from hansfree.report.wording import BITS, p_value, told_in
from hansfree.runs import RunFolder, SuiteFolder, read_results, read_yaml


@torch.no_grad()
def entropy(folder: RunFolder, benchmark: Benchmark, category: Tensor) -> float:
    """Mean over test samples that the exported model gets right and whose class is in the category."""
    split = benchmark.split("iid")
    logits = read_exported(str(folder.exported), benchmark).eval()(split.batch(torch.arange(len(split))).input)
    right = (logits.argmax(1) == split.label) & (category[split.label] != NONE)
    return category_entropy(logits, split.label, category)[right].mean().item()


def main(suite: str, *alike: str) -> None:
    """Print the table of the suite in the folder ``suite``, for the classes ``alike``."""
    place, found = SuiteFolder(Path(suite)), dict[str, dict[Hashable, float]]()
    results = read_results(place.results)
    for cell in results["cells"]:
        folder = RunFolder(place.path / cell["folder"])
        benchmark = make_benchmark(parse(RunConfig, read_yaml(folder.config)))
        for name in alike:
            if name not in benchmark.classes:
                raise SystemExit(str(unknown("class", name, benchmark.classes)))
        category = torch.tensor([0 if name in alike else NONE for name in benchmark.classes])
        found.setdefault(cell["variant"], {})[cell["seed"]] = entropy(folder, benchmark, category)
    reference = results["suite"]["reference"]
    for variant, values in found.items():
        told = told_in(BITS, estimate(values.values()))
        against = compare(values, found[reference], reference) if variant != reference else None
        difference = told_in(BITS, against.difference, signed=True) + f" ({p_value(against.p)})" if against else ""
        print(f"{variant:20} {told:18} {difference}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit("Name the folder of a suite and at least two classes.")
    main(*sys.argv[1:])
