"""The figures and the table of docs/lrp-semantics.md: what LRP's three semantics make of two networks.

python bench/figures/lrp_semantics.py [--page docs/lrp-semantics.md]

EfficientNet-Lite0 has its published weights and looks at scikit-image's cat; ResNet-18 has random weights and random
batch-norm statistics (means over seeds), for want of published ones that come without a download.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import skimage.data
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor, nn

from hansfree.explainers import LRP, GradientXInput
from hansfree.models import load_model
from hansfree.report.charts import RELEVANCE
from hansfree.torchvision_guard import import_torchvision

SEMANTICS = ("fused", "branchwise", "layerwise")
EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SHOWN = (1e-3, 1e-2, 1e-1, 1.0)
SEEDS = 3
PAIRS = (("branchwise", "fused"), ("layerwise", "fused"), ("gradient x input", "fused"))
COLOURS = ("#2a6fa8", "#c2562b", "#5d7a3a")
PALETTE = LinearSegmentedColormap.from_list("relevance", [tuple(np.array(c) / 255) for c in RELEVANCE])


class Subject(NamedTuple):
    """A network, what it looks at, and the class to explain."""

    model: nn.Module
    images: Tensor
    target: Tensor


def cat() -> Subject:
    """EfficientNet-Lite0 before scikit-image's cat, explained for its first choice."""
    model = load_model("efficientnet-lite0", pretrained=True).eval()
    pixels = torch.from_numpy(skimage.data.chelsea().copy())[:, 75:375].permute(2, 0, 1)[None] / 255
    image = nn.functional.interpolate(pixels, size=224, mode="bilinear", antialias=True)
    with torch.no_grad():
        return Subject(model, image, model(image).argmax(1))


def random_resnet(seed: int) -> Subject:
    """ResNet-18 with random weights, batch norms with random parameters and statistics, smooth random images."""
    torch.manual_seed(seed)
    network = import_torchvision("torchvision.models").resnet18().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    images = nn.functional.interpolate(torch.randn(2, 3, 16, 16), size=64, mode="bicubic")
    with torch.no_grad():
        return Subject(network, images, network(images).argmax(1))


@torch.no_grad()
def maps(subject: Subject, epsilon: float) -> dict[str, Tensor]:
    """Maps by semantics, and gradient x input, which is LRP with an epsilon of 0 on ReLU networks."""
    found = {name: LRP(epsilon, semantics=name)(*subject).map for name in SEMANTICS}
    return found | {"gradient x input": GradientXInput()(*subject).map}


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b|_1 / |b|_1, the mean over samples."""
    return float(((a - b).abs().flatten(1).sum(1) / b.abs().flatten(1).sum(1)).mean())


def cosine(a: Tensor, b: Tensor) -> float:
    """How alike two maps are whatever their size: the cosine between them, the mean over samples."""
    return float(torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean())


class Point(NamedTuple):
    """How far two explanations of one network are apart at one epsilon."""

    difference: float
    cosine: float


Curves = dict[tuple[str, str], list[Point]]


def curves(subjects: Iterable[Subject]) -> Curves:
    """By pair, a point for each epsilon: means over the subjects."""
    every = [[maps(subject, epsilon) for epsilon in EPSILONS] for subject in subjects]
    return {
        pair: [
            Point(
                *np.mean([[measure(one[n][pair[0]], one[n][pair[1]]) for measure in Point_] for one in every], axis=0)
            )
            for n in range(len(EPSILONS))
        ]
        for pair in PAIRS
    }


Point_ = (difference, cosine)


def draw_cat(subject: Subject, out: Path) -> None:
    """The cat, and its maps: a row for each of the semantics, a column for each epsilon."""
    places = [["image", *(f"{name} {epsilon}" for epsilon in SHOWN)] for name in SEMANTICS]
    figure, axes = plt.subplot_mosaic(places, figsize=(9.6, 5.4), layout="constrained")
    axes["image"].imshow(subject.images[0].permute(1, 2, 0))
    axes["image"].set_title(subject.model.config["label_names"][int(subject.target)], fontsize=10)
    for epsilon in SHOWN:
        found = maps(subject, epsilon)
        for name in SEMANTICS:
            axis = axes[f"{name} {epsilon}"]
            map = nn.functional.avg_pool2d(found[name].sum(1), 4)[0]  # single pixels would be too fine for the page
            drawn = axis.imshow(map / map.abs().quantile(0.99), cmap=PALETTE, vmin=-1, vmax=1)
            if name == SEMANTICS[0]:
                axis.set_title(f"epsilon {epsilon:g}", fontsize=10)
            if epsilon == SHOWN[0]:
                axis.text(-0.08, 0.5, name, transform=axis.transAxes, rotation=90, ha="center", va="center")
    for axis in axes.values():
        axis.set_axis_off()
    bar = figure.colorbar(drawn, ax=list(axes.values()), fraction=0.02, pad=0.01, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["against", "0", "for"], fontsize=9)
    save(figure, out / "lrp-semantics-cat.png")


def draw_curves(found: dict[str, Curves], out: Path) -> None:
    """How far each explanation is from the fused one, against epsilon."""
    figure, axes = plt.subplots(1, len(found), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (title, lines) in zip(axes, found.items(), strict=True):
        for (pair, points), colour in zip(lines.items(), COLOURS, strict=True):
            axis.plot(EPSILONS, [p.difference for p in points], color=colour, marker="o", markersize=4, label=pair[0])
        axis.set(xscale="log", yscale="log", xlabel="epsilon", title=title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("difference from fused")
    axes[0].legend(frameon=False, fontsize=9)
    save(figure, out / "lrp-semantics-difference.png")


def save(figure: Figure, path: Path) -> None:
    """A small PNG, in 256 colours."""
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


BLOCK = ("conv", "batch norm", "ReLU", "conv", "batch norm", "sum", "ReLU")
ENDS = {"fused": {2, 6}, "branchwise": {1, 4}, "layerwise": {0, 1, 3, 4, 5}}


def draw_block(out: Path) -> None:
    """Where the factors sit in a residual block."""
    figure, axes = plt.subplots(3, 1, figsize=(9, 3.9), layout="constrained")
    for axis, name in zip(axes, SEMANTICS, strict=True):
        for place, part in enumerate(BLOCK):
            ended = place in ENDS[name]
            box = FancyBboxPatch(
                (place + 0.1, 0.25),
                0.72,
                0.5,
                boxstyle="round,pad=0.02,rounding_size=0.06",
                facecolor="#f3f1ec",
                edgecolor="#777777",
            )
            axis.add_patch(box)
            axis.text(place + 0.46, 0.5, part, ha="center", va="center", fontsize=9)
            axis.annotate("", (place + 1.07, 0.5), (place + 0.85, 0.5), arrowprops={"arrowstyle": "->", "lw": 1})
            if ended:
                axis.plot([place + 0.95], [0.72], "o", color=COLOURS[1], markersize=13)
                axis.text(place + 0.95, 0.71, "f", color="white", ha="center", va="center", fontsize=9)
        axis.plot([-0.05, -0.05, 5.46, 5.46], [0.5, 1.05, 1.05, 0.78], color="#777777", lw=1)
        axis.plot([-0.3, 0.07], [0.5, 0.5], color="black", lw=1)
        axis.text(-0.4, 0.5, name, ha="right", va="center", fontsize=11)
        axis.set(xlim=(-1.6, len(BLOCK) + 0.2), ylim=(0.1, 1.15))
        axis.set_axis_off()
    save(figure, out / "lrp-semantics-block.png")


def table(found: dict[str, Curves]) -> str:
    """What the curves show, as a Markdown table."""
    shown = [EPSILONS.index(epsilon) for epsilon in SHOWN]
    lines = [
        f"| network | against fused | {' | '.join(f'{EPSILONS[n]:g}' for n in shown)} |",
        f"| :--- | :--- | {' | '.join('---:' for _ in shown)} |",
    ]
    for title, pairs in found.items():
        for pair, points in pairs.items():
            cells = [f"{points[n].difference:.2f} ({points[n].cosine:.2f})" for n in shown]
            lines.append(f"| {title} | {pair[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--page", type=Path, default=Path("docs/lrp-semantics.md"))
    page = options.parse_args().page
    mpl.rcParams["font.family"] = "DejaVu Sans"
    images = page.parent / "images"
    looking = cat()
    draw_block(images)
    draw_cat(looking, images)
    found = {
        "EfficientNet-Lite0, a cat": curves([looking]),
        "ResNet-18, random weights": curves(random_resnet(seed) for seed in range(SEEDS)),
    }
    draw_curves(found, images)
    marked = re.compile(r"(?<=<!-- table: begin -->\n).*?(?=<!-- table: end -->)", re.S)
    text = page.read_text(encoding="utf-8")
    page.write_text(marked.sub(lambda _: table(found) + "\n", text), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
