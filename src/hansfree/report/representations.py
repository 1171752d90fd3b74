"""Pictures of what networks represent: samples in the plane, by class and by bias side by side, and layers compared."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from markupsafe import Markup

from hansfree.report import charts
from hansfree.report.sub_models import PARTS, evenly

METHODS = {"tsne": "t-SNE", "umap": "UMAP"}
MOST_LAYERS = 20
"""Layers of a network that a table shows, evenly chosen."""
MOST_GROUPS = len(charts.GROUPS)
"""Groups that a legend names."""


@dataclass(frozen=True)
class Plane:
    """The same samples as several networks place them, coloured by one thing."""

    method: str
    coloured_by: str
    legend: tuple[tuple[str, str], ...]
    """Colour and name of each group."""
    networks: tuple[tuple[str, str], ...]
    """What each network is called, and its picture."""


class Representations:
    """The pictures of one run, from the arrays of its representations.npz."""

    def __init__(self, kept: Mapping[str, np.ndarray]) -> None:
        self._kept = kept
        self._networks = [str(name) for name in kept["networks"]]
        self.split = str(kept["split"])
        self.samples = len(kept["label"])

    @cached_property
    def planes(self) -> list[Plane]:
        """By class and by bias, for each way to place samples."""
        return list(self._planes())

    def _planes(self) -> Iterator[Plane]:
        label = self._kept["label"]
        # Of several labels, the first one that is there.
        colourings = {"class": ("classes", label if label.ndim == 1 else label.argmax(1))}
        if "bias" in self._kept:
            colourings["bias"] = ("biases", self._kept["bias"])
        for key, method in METHODS.items():
            for word, (names, group) in colourings.items():
                drawn = [
                    (called(name), charts.plane_uri(self._kept[f"{key}_{name}"], group))
                    for name in self._networks
                    if f"{key}_{name}" in self._kept
                ]
                if drawn:
                    yield Plane(method, word, tuple(_legend(group, self._kept[names])), tuple(drawn))

    @cached_property
    def alike(self) -> list[Markup]:
        """CKA of each pair of networks, a table each."""
        pairs = [
            (first, second)
            for first in self._networks
            for second in self._networks
            if f"cka_{first}_{second}" in self._kept
        ]
        return [self._table(first, second) for first, second in pairs]

    def _table(self, first: str, second: str) -> Markup:
        layers = [[str(layer) for layer in self._kept[f"layers_{name}"]] for name in (first, second)]
        rows, columns = (evenly(range(len(names)), MOST_LAYERS) for names in layers)
        values = self._kept[f"cka_{first}_{second}"]
        left_out = any(len(names) > MOST_LAYERS for names in layers)
        return charts.share_table(
            [layers[0][row] for row in rows],
            [layers[1][column] for column in columns],
            [[float(values[row, column]) for column in columns] for row in rows],
            f"CKA of {called(first)} (rows) and {called(second)} (columns)"
            + (f"; {MOST_LAYERS} layers, evenly chosen" if left_out else ""),
        )


def called(network: str) -> str:
    """What a reader calls a network."""
    return PARTS.get(network, network)


def _legend(group: np.ndarray, names: np.ndarray) -> Iterator[tuple[str, str]]:
    for number in np.unique(group).tolist()[:MOST_GROUPS]:
        red, green, blue = charts.group_colour(number)
        name = str(names[number]) if 0 <= number < len(names) else "unknown"
        yield f"rgb({red}, {green}, {blue})", name
