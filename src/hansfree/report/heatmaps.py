"""Which pictures a report shows: for each split the images, the teacher's maps and the students', on one scale."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hansfree.errors import UserError
from hansfree.report import charts

Arrays = Mapping[str, np.ndarray]
"""What a heatmaps.npz holds."""

MOST_SAMPLES = 10
"""Samples drawn per split, where a run kept more."""


@dataclass(frozen=True)
class Tile:
    """One small picture with what is written under it."""

    uri: str | None
    told: str
    caption: str
    wrong: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of tiles: the images, or one model's maps."""

    name: str
    detail: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class MapGrid:
    """The strips of one split."""

    split: str
    meaning: str
    strips: tuple[Strip, ...]


class Heatmaps:
    """The pictures of several variants, of the samples that they have in common.

    ``kept`` has the arrays of each variant's heatmaps.npz, ``titles`` what each is called, ``taught_by`` what its
    teacher is.
    """

    def __init__(self, kept: Mapping[str, Arrays], titles: Mapping[str, str], taught_by: Mapping[str, str]) -> None:
        self._titles, self._taught_by = titles, taught_by
        self._first: Arrays = next(iter(kept.values()), {})
        self._kept = {name: arrays for name, arrays in kept.items() if _same_samples(arrays, self._first)}
        self.mismatched = [name for name in kept if name not in self._kept]
        """Variants whose heatmaps show other samples than the first one's, and are left out."""

    def images(self, split: str) -> tuple[Tile, ...]:
        """The images of ``split``; empty where none were kept."""
        kept = self._first
        if f"image_{split}" not in kept:
            return ()
        names = [str(kept["classes"][label]) for label in kept[f"label_{split}"][:MOST_SAMPLES]]
        images = kept[f"image_{split}"][:MOST_SAMPLES]
        return tuple(Tile(charts.image_uri(image), f"{split}: {name}", name) for image, name in zip(images, names))

    @cached_property
    def limit(self) -> float:
        """The end of the one colour scale of all maps."""
        return charts.common_limit(
            map
            for kept in self._kept.values()
            for name, array in kept.items()
            if name.startswith(("map_", "teacher_map_"))
            for map in drawable(array)
        )

    @property
    def has_long_names(self) -> bool:
        """Whether class names need more room than a phone has for a whole row."""
        return any(len(str(name)) > 4 for kept in self._kept.values() for name in kept["classes"])

    @property
    def explainers(self) -> list[str]:
        """What drew the maps."""
        return list(dict.fromkeys(str(kept["explainer"]) for kept in self._kept.values()))

    def grids(self, variants: Iterable[str], meanings: Mapping[str, str]) -> list[MapGrid]:
        """For each split the images, the teacher's maps and those of ``variants``."""
        kept = {variant: self._kept[variant] for variant in variants if variant in self._kept}
        if not kept:
            return []
        splits = [str(split) for split in next(iter(kept.values()))["splits"]]
        return [MapGrid(split, meanings.get(split, ""), tuple(self._strips(split, kept))) for split in splits]

    def _strips(self, split: str, kept: Mapping[str, Arrays]) -> Iterator[Strip]:
        yield Strip("Image", "and its class", self.images(split))
        by_explainer: dict[str, list[str]] = {}
        for variant, arrays in kept.items():
            by_explainer.setdefault(str(arrays["explainer"]), []).append(variant)
        for explainer, variants in by_explainer.items():
            detail = explainer if len(self.explainers) > 1 else ""
            teachers: dict[str, Arrays] = {}
            for variant in variants:
                if f"teacher_map_{split}" in kept[variant]:
                    teachers.setdefault(self._taught_by.get(variant, "Teacher"), kept[variant])
            for name, arrays in teachers.items():
                yield Strip(name, detail, _maps(arrays, split, "teacher_", name, self.limit))
            for variant in variants:
                name = self._titles[variant]
                yield Strip(name, detail, _maps(kept[variant], split, "", name, self.limit))


def read_heatmaps(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a heatmaps.npz. Raises ``UserError`` where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate the run again to write it anew.") from None


def drawable(maps: np.ndarray) -> Iterator[np.ndarray]:
    """The maps that will be drawn, normalised; those that are not finite are left out."""
    for map in maps[:MOST_SAMPLES]:
        if (drawn := charts.normalised(map)) is not None:
            yield drawn


def _same_samples(one: Arrays, other: Arrays) -> bool:
    return np.array_equal(one["splits"], other["splits"]) and all(
        np.array_equal(one[f"index_{split}"], other[f"index_{split}"]) for split in one["splits"]
    )


def _maps(kept: Arrays, split: str, prefix: str, who: str, limit: float) -> tuple[Tile, ...]:
    tiles = []
    columns = (kept[f"{prefix}map_{split}"], kept[f"{prefix}prediction_{split}"], kept[f"label_{split}"])
    for map, prediction, label in zip(*(column[:MOST_SAMPLES] for column in columns)):
        said, truth = (str(kept["classes"][number]) for number in (prediction, label))
        wrong = bool(prediction != label)
        told = f"{who}, {split}, {truth}: says {said}, {'wrong' if wrong else 'right'}"
        drawn = charts.normalised(map)
        tiles.append(Tile(None if drawn is None else charts.map_uri(drawn, limit), told, said, wrong))
    return tuple(tiles)
