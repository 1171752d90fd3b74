"""Which pictures a report shows: for each split the images, the teacher's maps and the students', on one scale."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hansfree.errors import UserError
from hansfree.report import charts

Arrays = Mapping[str, np.ndarray]
"""What a heatmaps.npz holds."""

MOST_SAMPLES = 10
"""Samples drawn per split; of more that a run kept, :func:`telling` chooses."""


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
    teacher is; ``references`` are the variants that others are compared with.
    """

    def __init__(
        self,
        kept: Mapping[str, Arrays],
        titles: Mapping[str, str],
        taught_by: Mapping[str, str],
        references: Sequence[str] = (),
    ) -> None:
        self._titles, self._taught_by = titles, taught_by
        self._references = [name for name in references if name in kept]
        self._first: Arrays = next(iter(kept.values()), {})
        self._kept = {name: arrays for name, arrays in kept.items() if _same_samples(arrays, self._first)}
        self.mismatched = [name for name in kept if name not in self._kept]
        """Variants whose heatmaps show other samples than the first one's, and are left out."""

    def images(self, split: str, rows: Sequence[int] = range(MOST_SAMPLES)) -> tuple[Tile, ...]:
        """The images of ``split`` at ``rows``; empty where none were kept."""
        kept = self._first
        if f"image_{split}" not in kept:
            return ()
        rows = [row for row in rows if row < len(kept[f"label_{split}"])]
        names = [str(kept["classes"][label]) for label in kept[f"label_{split}"][rows]]
        images = kept[f"image_{split}"][rows]
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
    def of_labels(self) -> bool:
        """Whether maps are of a class that is there, because images have labels of several, and not of predictions."""
        return any("several" in kept for kept in self._kept.values())

    @property
    def choice(self) -> str:
        """How samples were chosen for the picture, in a sentence; empty where all that were kept are shown."""
        splits = [str(split) for split in self._first.get("splits", ())]
        most = max((len(self._first[f"label_{split}"]) for split in splits), default=0)
        if most <= MOST_SAMPLES:
            return ""
        half = MOST_SAMPLES // 2
        who = " or ".join(self._titles[name] for name in self._references) or "a student"
        return (
            f"Of the {most} samples that were kept of each split, up to {half} are the first that every model gets "
            f"right, and up to {half} the first that a teacher gets right and {who} wrong, those that another student "
            "gets right before the rest; where there are fewer, the first others stand in. They show what can happen, "
            "not how often it does."
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

    def _rows(self, split: str, kept: Mapping[str, Arrays]) -> list[int]:
        """Which of the samples of ``split`` are drawn."""
        students = {name: _right(arrays, split, "") for name, arrays in kept.items()}
        teachers = [
            _right(arrays, split, "teacher_") for arrays in kept.values() if f"teacher_prediction_{split}" in arrays
        ]
        compared = [students[name] for name in self._references if name in students] or list(students.values())
        return telling(list(students.values()), teachers, compared, MOST_SAMPLES)

    def _strips(self, split: str, kept: Mapping[str, Arrays]) -> Iterator[Strip]:
        rows = self._rows(split, kept)
        yield Strip("Image", "and its class", self.images(split, rows))
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
                yield Strip(name, detail, _maps(arrays, split, rows, "teacher_", name, self.limit))
            for variant in variants:
                name = self._titles[variant]
                yield Strip(name, detail, _maps(kept[variant], split, rows, "", name, self.limit))


def read_heatmaps(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a heatmaps.npz. Raises ``UserError`` where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate the run again to write it anew.") from None


def drawable(maps: np.ndarray) -> Iterator[np.ndarray]:
    """The maps that may be drawn, normalised; those that are not finite are left out."""
    for map in maps:
        if (drawn := charts.normalised(map)) is not None:
            yield drawn


def _same_samples(one: Arrays, other: Arrays) -> bool:
    return np.array_equal(one["splits"], other["splits"]) and all(
        np.array_equal(one[f"index_{split}"], other[f"index_{split}"]) for split in one["splits"]
    )


def telling(
    students: Sequence[np.ndarray], teachers: Sequence[np.ndarray], compared: Sequence[np.ndarray], count: int
) -> list[int]:
    """At most ``count`` numbers of samples that tell models apart, each model given as where it is right, [n].

    Half of them are the first that every model gets right, half the first that all teachers get right and one of those
    ``compared`` wrong, first those that another student gets right; the first of the others fill up what is missing.
    """
    total = len(students[0])
    if total <= count:
        return list(range(total))
    everyone = np.all([*students, *teachers], 0)
    taught = np.all(teachers, 0) if teachers else np.any(students, 0)
    missed = taught & ~np.all(compared, 0)
    rescued = missed & np.any(students, 0)
    chosen = [
        *np.flatnonzero(everyone)[: count // 2],
        *[*np.flatnonzero(rescued), *np.flatnonzero(missed & ~rescued)][: count - count // 2],
    ]
    rest = [row for row in range(total) if row not in chosen][: count - len(chosen)]
    return [int(row) for row in (*chosen, *rest)]


def _right(kept: Arrays, split: str, prefix: str) -> np.ndarray:
    return kept[f"{prefix}prediction_{split}"] == kept[f"label_{split}"]


NOT_FOUND = -1
"""In place of a prediction: the class of the map is not one of those that the model finds."""


def _maps(kept: Arrays, split: str, rows: Sequence[int], prefix: str, who: str, limit: float) -> tuple[Tile, ...]:
    tiles = []
    columns = (kept[f"{prefix}map_{split}"], kept[f"{prefix}prediction_{split}"], kept[f"label_{split}"])
    for map, prediction, label in zip(*(column[list(rows)] for column in columns)):
        truth = str(kept["classes"][label])
        said = "not found" if prediction == NOT_FOUND else str(kept["classes"][prediction])
        wrong = bool(prediction != label)
        told = f"{who}, {split}, {truth}: says {said}, {'wrong' if wrong else 'right'}"
        drawn = charts.normalised(map)
        tiles.append(Tile(None if drawn is None else charts.map_uri(drawn, limit), told, said, wrong))
    return tuple(tiles)
