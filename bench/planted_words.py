"""How much of the integrated gradients lies on a planted word, in the finished runs of a suite on texts.

    python bench/planted_words.py runs/film-reviews-trigger [samples, default 100]

A line for each variant and the teacher: under iid and under shift the share of the planted word, and without a planted
word (ood) the AUROC of good against bad words, in %; means over seeds with the 95 % Student t interval.
"""

import sys
from collections.abc import Hashable
from pathlib import Path

from rich.progress import track
from torch import nn

from hansfree.config import parse
from hansfree.core import Benchmark
from hansfree.explainers import IntegratedGradients
from hansfree.parts import RunConfig, make_benchmark, read_exported
from hansfree.report.statistics import estimate
from hansfree.report.wording import PERCENT, told_in
from hansfree.runs import RunFolder, SuiteFolder, read_results, read_yaml
from hansfree.words import of_words

ASKED = (("iid", "trigger_share"), ("shift", "trigger_share"), ("ood", "word_auroc"))
EXPLAINER = IntegratedGradients(steps=20, quadrature="midpoint", baseline="pad")


def measured(model: nn.Module, benchmark: Benchmark, samples: int) -> list[float]:
    """What is ``ASKED`` of one model."""
    if benchmark.text is None or not benchmark.biases:
        raise SystemExit(f"No word is planted in {benchmark.name} as it was run; name a suite with a trigger_ratio.")
    found: list[float] = []
    for split, metric in ASKED:
        values = of_words(
            model, None, benchmark.split(split), split, EXPLAINER, class_signs=benchmark.text.signs,
            measured_with="integrated gradients", samples=samples, batch_size=50, device="cpu",
        )  # fmt: skip
        found += [value.value for value in values if value.metric == metric]
    return found


def main(suite: str, samples: str = "100") -> None:
    """Print the table of the suite in the folder ``suite``."""
    place, found = SuiteFolder(Path(suite)), dict[str, dict[Hashable, list[float]]]()
    for cell in track(read_results(place.results)["cells"], "Explaining"):
        folder = RunFolder(place.path / cell["folder"])
        benchmark = make_benchmark(parse(RunConfig, read_yaml(folder.config)))
        models = {cell["variant"]: (cell["seed"], folder)}
        if "teacher" not in found:
            models["teacher"] = (None, RunFolder(place.path / "teacher"))
        for name, (seed, trained) in models.items():
            model = read_exported(str(trained.exported), benchmark).eval()
            found.setdefault(name, {})[seed] = measured(model, benchmark, int(samples))
    for name, by_seed in found.items():
        told = (told_in(PERCENT, estimate(values)) for values in zip(*by_seed.values(), strict=True))
        print(f"{name:26} " + " ".join(f"{text:16}" for text in told), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("Name the folder of a suite.")
    main(*sys.argv[1:])
