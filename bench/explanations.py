"""What training on an explanation costs, relative to a cross-entropy step of the same network.

    python bench/explanations.py [--threads 2] [--rounds 15] [--network NAME ...] [--curves] [--out bench/README.md]

Every round takes one step of each variant on the same batch of 32, so that a busy machine slows all of them alike.
A step is: explain, square the map, go backward to the weights (no optimiser); a teacher's map and a forward pass
have no graph. Times are CPU seconds of the process (on CUDA: wall seconds, synchronised), each ratio is to the
cross-entropy step of the same round in the same mode, with the median and the 10th to 90th percentile over rounds.
FLOPs are counted (convolutions and matrix products), so is the memory of the tensors alive at a step's peak.
"Weights" is the error of the weight gradient against finite differences in float64, the median over eight tensors:
"wrong" above 1e-3, "none" where no weight gets a gradient. Goals stand where there is one.
"""

import argparse
import copy
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from counting import counted
from gradient_check import gradient_errors, some_parameters
from relu_hooks import Chain, hooked_lrp, relu_hooks, with_one_relu_per_use
from torch import Tensor, nn

from hansfree.core import Explainer
from hansfree.explainers import EXPLAINERS, LRP
from hansfree.models import SmallCNN, load_model
from hansfree.torchvision_guard import import_torchvision

BATCH, CLASSES, EPSILON = 32, 10, 0.01

CHEAPER: dict[str, dict[str, Any]] = {"integrated-gradients": {"steps": 4}, "smoothgrad": {"samples": 4}}
"""Settings that make a row affordable."""

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One row: how a map is made from (network, x, target). ``prepare`` rebuilds the network for it, once."""

    name: str
    mode: str
    explain: Explain | None = None
    prepare: Callable[[nn.Module], tuple[nn.Module, Explain]] | None = None
    graph: bool = True
    counted: float | None = None
    measured: float | None = None


@dataclass
class Row:
    """One measured row. ``fails`` says why there are no figures."""

    network: str
    variant: str
    mode: str
    milliseconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    flops: float | None = None
    memory: float | None = None
    trains: bool | None = None
    weights: float | None = None
    counted_goal: float | None = None
    measured_goal: float | None = None
    fails: str | None = None


@dataclass(frozen=True)
class Case:
    """A network, and the size of its images."""

    name: str
    build: Callable[[], nn.Module]
    size: int


GOAL = "resnet18-64"
"""The network that the goals for measured ratios are about."""


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: load_model(f"torchvision/{name}", num_classes=CLASSES).network


CASES = {
    "small-cnn-28": Case("small CNN, 28 px", lambda: SmallCNN(CLASSES), 28),
    "resnet18-64": Case("ResNet-18, 64 px", torchvision("resnet18"), 64),
    "resnet18-32": Case("ResNet-18, 32 px", torchvision("resnet18"), 32),
}
CURVES = {
    "depth": [Case(f"ResNet-{n}", torchvision(f"resnet{n}"), 64) for n in (18, 34, 50)],
    "width": [Case(f"x {n}", lambda n=n: SmallCNN(CLASSES, widths=(16 * n, 32 * n, 64 * n)), 28) for n in (1, 2, 4, 8)],
    "resolution": [Case(f"{size} px", torchvision("resnet18"), size) for size in (32, 64, 96, 128)],
}


# The variants: ours, and what else there is.


def ours(explainer: Explainer) -> Explain:
    return lambda network, x, target: explainer(network, x, target).map


def plain_gradient(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Autograd as it stands."""
    x = x.detach().requires_grad_()
    y = network(x).gather(1, target[:, None]).sum()
    return torch.autograd.grad(y, x, create_graph=True)[0]


def prepared_hooks(network: nn.Module) -> tuple[nn.Module, Explain]:
    network = with_one_relu_per_use(network)
    flag = relu_hooks(network, EPSILON).__enter__()  # for as long as this copy of the network lives
    return network, lambda network, x, target: hooked_lrp(network, flag, x, target)


def prepared_zennit(network: nn.Module) -> tuple[nn.Module, Explain]:
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.torchvision import ResNetCanonizer
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

    if isinstance(network, SmallCNN):
        network = with_one_relu_per_use(network)
    canonizers = [SequentialMergeBatchNorm() if isinstance(network, Chain) else ResNetCanonizer()]
    rules = [(Activation, Pass()), (AvgPool, Norm()), (BatchNorm, Pass())]
    rules += [(Convolution, Epsilon(EPSILON)), (Linear, Epsilon(EPSILON))]

    def explain(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        composite, graph = LayerMapComposite(rules, canonizers=canonizers), torch.is_grad_enabled()
        with torch.enable_grad(), Gradient(model=network, composite=composite, create_graph=graph) as attributor:
            return attributor(x.detach(), lambda y: y * F.one_hot(target, y.shape[1]).to(y))[1]

    return network, explain


def prepared_captum(method: str) -> Callable[[nn.Module], tuple[nn.Module, Explain]]:
    def prepare(network: nn.Module) -> tuple[nn.Module, Explain]:
        import captum.attr

        network = with_one_relu_per_use(network)

        def explain(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
            attribute = getattr(captum.attr, method)(network).attribute
            return attribute(x.detach().requires_grad_(), target=target)

        return network, explain

    return prepare


def variants() -> Iterator[Variant]:
    for mode in ("eval", "train"):
        yield Variant("cross-entropy", mode)
    yield Variant("forward pass", "eval", graph=False)
    yield Variant("LRP", "eval", ours(LRP(EPSILON)), counted=2.05, measured=2.4)
    yield Variant("LRP, statistics: constant", "train", ours(LRP(EPSILON)), counted=2.05, measured=2.6)
    yield Variant("LRP, statistics: running", "train", ours(LRP(EPSILON, statistics="running")))
    for name in EXPLAINERS:
        if name in ("lrp", "bcos"):  # above; for B-cos networks alone
            continue
        settings = CHEAPER.get(name, {})
        shown = ", ".join([name, *(f"{field}: {value}" for field, value in settings.items())])
        counted = 1.40 if name in ("gradient", "gradient-x-input") else None
        measured = {"gradient": 1.55, "attention": 1.10, "grad-cam": 1.10}.get(name)
        yield Variant(shown, "eval", ours(EXPLAINERS[name](**settings)), counted=counted, measured=measured)
    yield Variant("gradient, statistics: constant", "train", ours(EXPLAINERS["gradient"]()))
    yield Variant("teacher's LRP map", "eval", ours(LRP(EPSILON)), graph=False, counted=0.70, measured=0.80)
    yield Variant("plain double backward: gradient", "eval", plain_gradient)
    yield Variant("plain double backward: gradient", "train", plain_gradient)
    yield Variant("LRP by ReLU hooks", "eval", prepare=prepared_hooks)
    yield Variant("LRP by ReLU hooks", "train", prepare=prepared_hooks)
    yield Variant("zennit: LRP", "eval", prepare=prepared_zennit)
    yield Variant("zennit: LRP, teacher's map", "eval", prepare=prepared_zennit, graph=False)
    yield Variant("Captum: LRP", "eval", prepare=prepared_captum("LRP"))
    yield Variant("Captum: InputXGradient", "eval", prepare=prepared_captum("InputXGradient"))


# One variant on one network.


class Measured:
    """A variant on its own copy of a network: its step, its figures."""

    def __init__(self, variant: Variant, network: nn.Module, x: Tensor, target: Tensor, precision: str) -> None:
        self.variant, self.x, self.target = variant, x, target
        network = copy.deepcopy(network).train(variant.mode == "train")
        explain = variant.explain
        if variant.prepare is not None:
            network, explain = variant.prepare(network)
        self.network, self.explain = network, explain
        self.autocast = (
            torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        )  # an explanation stays in float32 by itself

    def step(self) -> None:
        """What is timed."""
        for parameter in self.network.parameters():
            parameter.grad = None
        with self.autocast, nullcontext() if self.variant.graph else torch.no_grad():
            value = self._value()
        if self.variant.graph:
            value.backward()

    def _value(self) -> Tensor:
        if self.explain is not None:
            return self.explain(self.network, self.x, self.target).square().mean()
        logits = self.network(self.x)
        return F.cross_entropy(logits, self.target) if self.variant.graph else logits

    def counts(self) -> tuple[int, int]:
        """FLOPs and peak memory in bytes of one step."""
        for parameter in self.network.parameters():
            parameter.grad = None
        counter = counted(self.step)
        return counter.flops, counter.peak

    def reaches_weights(self) -> bool:
        """Whether a step leaves a gradient in any weight."""
        self.step()
        return any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in self.network.parameters())

    def weight_error(self, build: Callable[[], nn.Module], size: int) -> float | None:
        """Median error of the weight gradient in float64 on a fresh network, four samples."""
        if self.explain is None or not self.variant.graph:
            return None
        torch.manual_seed(1)
        network = unsettled(build()).double()
        x, target = torch.rand(4, 3, size, size, dtype=torch.double), torch.arange(4)
        check = Measured(self.variant, network, x, target, "fp32")

        def loss() -> Tensor:
            map = check.explain(check.network, x, target)
            probe = torch.randn(map.shape, generator=torch.Generator().manual_seed(2), dtype=map.dtype)
            return (map * probe).sum()

        errors = gradient_errors(loss, check.network, some_parameters(check.network, 8))
        return statistics.median(errors.values())


def unsettled(network: nn.Module) -> nn.Module:
    """Batch norms whose parameters and running statistics matter, as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(case: Case, rounds: int, device: str, precision: str, chosen: list[Variant], checks: bool) -> list[Row]:
    """All variants on one network, interleaved."""
    torch.manual_seed(0)
    network = unsettled(case.build()).to(device)
    x = torch.rand(BATCH, 3, case.size, case.size, device=device)
    target = torch.arange(BATCH, device=device) % CLASSES
    rows, running = [], []
    for variant in chosen:
        row = Row(case.name, variant.name, variant.mode)
        row.counted_goal = variant.counted
        row.measured_goal = variant.measured if case is CASES[GOAL] else None
        rows.append(row)
        try:
            measured = Measured(variant, network, x, target, precision)
            measured.step()
            row.flops, row.memory = measured.counts()
            row.trains = measured.reaches_weights() if variant.graph else None
            row.weights = measured.weight_error(case.build, case.size) if checks else None
            running.append((row, measured, []))
        except Exception as error:  # whatever another library raises is the result
            row.fails = f"{type(error).__name__}: {first_clause(error)}"
        say(f"{case.name}: {variant.name} ({variant.mode}) ready")
    for round in range(rounds + 1):
        for _, measured, times in running:
            start = clock(device)
            measured.step()
            times.append(clock(device) - start)
        say(f"{case.name}: round {round} of {rounds}")
    base = {row.mode: (row.flops, row.memory, times) for row, _, times in running if row.variant == "cross-entropy"}
    base = {mode: tuple(copy.copy(values)) for mode, values in base.items()}
    for row, _, times in running:
        flops, memory, reference = base[row.mode]
        ratios = [one / other for one, other in zip(times[1:], reference[1:])]
        row.milliseconds, row.ratio = 1000 * statistics.median(times[1:]), statistics.median(ratios)
        row.low, row.high = band(ratios)
        row.flops, row.memory = row.flops / flops, row.memory / memory
    return rows


def first_clause(error: Exception) -> str:
    return re.split(r"[.:;,] |\n", str(error))[0]


def band(values: list[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile."""
    values = sorted(values)
    return values[len(values) // 10], values[-1 - len(values) // 10]


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# Curves: the two steps people train on, against depth, width and resolution.


def curves(rounds: int, device: str, precision: str) -> dict[str, list[Row]]:
    names = ("cross-entropy", "LRP", "gradient", "teacher's LRP map")
    chosen = [variant for variant in variants() if variant.name in names and variant.mode == "eval"]
    return {
        name: [row for case in cases for row in measure(case, rounds, device, precision, chosen, checks=False)]
        for name, cases in CURVES.items()
    }


def draw(found: dict[str, list[Row]], file: Path) -> None:
    """One panel per curve: ratio to the cross-entropy step, with its band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(10, 3), sharey=True, layout="constrained")
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        for variant in dict.fromkeys(row.variant for row in rows):
            own = [row for row in rows if row.variant == variant and row.ratio is not None]
            places = range(len(own))
            panel.plot(places, [row.ratio for row in own], marker="o", label=variant)
            panel.fill_between(places, [row.low for row in own], [row.high for row in own], alpha=0.2)
        labels = list(dict.fromkeys(row.network for row in rows))
        panel.set_xticks(range(len(labels)), labels)
        panel.set_title(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("cost / cross-entropy step")
    panels[0].legend(fontsize="small")
    figure.savefig(file, dpi=90)


# Output.


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def weights(row: Row) -> str:
    if row.weights is None:
        return ""
    if not row.trains:
        return "**none**"
    return f"{row.weights:.0e}" + (" **wrong**" if row.weights > 1e-3 else "")


def table(rows: list[Row]) -> str:
    lines = [
        "| step | mode | ms | ratio | 10 % to 90 % | goal | FLOPs | goal | memory | weights |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        if row.fails:
            lines.append(f"| {row.variant} | {row.mode} | cannot: {row.fails} | | | | | | | |")
            continue
        goals = [number(goal) and f"≤ {goal:.2f}" for goal in (row.measured_goal, row.counted_goal)]
        lines.append(
            f"| {row.variant} | {row.mode} | {number(row.milliseconds, 1)} | {number(row.ratio)} "
            f"| {number(row.low)} to {number(row.high)} | {goals[0]} | {number(row.flops)} | {goals[1]} "
            f"| {number(row.memory)} | {weights(row)} |"
        )
    return "\n".join(lines)


def curve_table(rows: list[Row]) -> str:
    names, places = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("variant", "network"))
    ratio = {(row.variant, row.network): row for row in rows}
    lines = ["| step | " + " | ".join(places) + " |", "|---|" + "--:|" * len(places)]
    for name in names:
        cells = [number(ratio[name, place].ratio) for place in places]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--network", nargs="*", choices=CASES, default=list(CASES))
    options.add_argument("--curves", action="store_true", help="cost against depth, width and resolution as well")
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="around the explanation")
    options.add_argument("--out", type=Path, help="a markdown file; a .json and a .png are written beside it")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    import_torchvision("torchvision.models")
    warnings.simplefilter("ignore")
    place = (given.rounds, given.device, given.precision)
    found = {name: measure(CASES[name], *place, list(variants()), checks=True) for name in given.network}
    lines = [heading(given)]
    lines += [f"## {CASES[name].name}\n\n{table(rows)}\n" for name, rows in found.items()]
    bent = curves(*place) if given.curves else {}
    lines += [f"## Ratio against {name}\n\n{curve_table(rows)}\n" for name, rows in bent.items()]
    if given.out is not None:
        everything = {
            "arguments": {name: str(value) for name, value in vars(given).items()},
            "tables": {name: [asdict(row) for row in rows] for name, rows in found.items()},
            "curves": {name: [asdict(row) for row in rows] for name, rows in bent.items()},
        }
        given.out.with_name("explanations.json").write_text(json.dumps(everything, indent=1) + "\n")
        if bent:
            draw(bent, given.out.with_name("curves.png"))
            lines.append("![The ratios against depth, width and resolution](curves.png)\n")
        given.out.write_text("\n".join(lines))
    say("")
    print("\n".join(lines))


def heading(given: Any) -> str:
    assert __doc__ is not None
    _, _, text = __doc__.partition("\n\n")
    _, _, text = text.partition("\n\n")
    made = " ".join(["python bench/explanations.py", *sys.argv[1:]])
    versions = f"torch {torch.__version__}, {given.threads} threads, {given.device}, {given.precision}"
    return f"# What an explanation step costs\n\nMade by `{made}` ({versions}).\n\n{text}"


if __name__ == "__main__":
    main()
