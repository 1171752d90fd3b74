"""Which texts a report shows: for each split the sentences, their words coloured by each model's attributions."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hansfree.report.heatmaps import MOST_SAMPLES, Arrays

FOR, AGAINST = "214, 39, 40", "31, 119, 180"
STRONGEST = 0.75
"""Opacity of the largest attributions."""


@dataclass(frozen=True)
class Word:
    """One word and how it is coloured: a CSS colour, empty where it has no attribution."""

    text: str
    colour: str
    told: str


@dataclass(frozen=True)
class Reading:
    """What one model makes of a text: the words as it weighs them, and what it says."""

    name: str
    said: str
    wrong: bool
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Text:
    """One text with its class and every model's reading."""

    truth: str
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class TextGrid:
    """The texts of one split."""

    split: str
    meaning: str
    texts: tuple[Text, ...]


def of_texts(kept: Arrays) -> bool:
    """Whether a heatmaps.npz is about texts."""
    return any(name.startswith("words_") for name in kept)


class WordMaps:
    """The coloured texts of several variants, of the samples that they have in common with the first.

    ``kept`` has the arrays of each variant's heatmaps.npz, ``titles`` what each is called, ``taught_by`` what its
    teacher is.
    """

    def __init__(self, kept: Mapping[str, Arrays], titles: Mapping[str, str], taught_by: Mapping[str, str]) -> None:
        first = next(iter(kept.values()), {})
        self._titles, self._taught_by = titles, taught_by
        self._kept = {name: arrays for name, arrays in kept.items() if _same_texts(arrays, first)}

    @property
    def explainers(self) -> list[str]:
        """What the attributions are by."""
        return list(dict.fromkeys(str(arrays["explainer"]) for arrays in self._kept.values()))

    def grids(self, variants: Iterable[str], meanings: Mapping[str, str]) -> list[TextGrid]:
        """For each split the texts, as the teachers and ``variants`` read them."""
        kept = {variant: self._kept[variant] for variant in variants if variant in self._kept}
        if not kept:
            return []
        first = next(iter(kept.values()))
        return [
            TextGrid(
                split,
                meanings.get(split, ""),
                tuple(
                    Text(str(first["classes"][first[f"label_{split}"][row]]), tuple(self._readings(split, row, kept)))
                    for row in range(min(len(first[f"label_{split}"]), MOST_SAMPLES))
                ),
            )
            for split in (str(name) for name in first["splits"])
        ]

    def _readings(self, split: str, row: int, kept: Mapping[str, Arrays]) -> Iterator[Reading]:
        teachers: dict[str, Arrays] = {}
        for variant, arrays in kept.items():
            if f"teacher_map_{split}" in arrays:
                teachers.setdefault(self._taught_by.get(variant, "Teacher"), arrays)
        for name, arrays in teachers.items():
            yield _reading(name, arrays, split, row, "teacher_")
        for variant, arrays in kept.items():
            yield _reading(self._titles[variant], arrays, split, row, "")


def _same_texts(one: Arrays, other: Arrays) -> bool:
    return np.array_equal(one["splits"], other["splits"]) and all(
        np.array_equal(one[f"words_{split}"], other[f"words_{split}"]) for split in one["splits"]
    )


def _reading(name: str, kept: Arrays, split: str, row: int, prefix: str) -> Reading:
    values, written = kept[f"{prefix}map_{split}"][row], kept[f"words_{split}"][row]
    prediction, label = kept[f"{prefix}prediction_{split}"][row], kept[f"label_{split}"][row]
    words = tuple(coloured(written[: len(values)], values))
    return Reading(name, str(kept["classes"][prediction]), bool(prediction != label), words)


def coloured(written: np.ndarray, values: np.ndarray) -> Iterator[Word]:
    """Words with red for what speaks for the class and blue for what speaks against it, as the largest of them."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    for word, value in zip(written, values):
        if not str(word):
            continue
        share = float(value) / largest if largest > 0 and np.isfinite(value) else 0.0
        opacity = f"{abs(share) * STRONGEST:.2f}"
        colour = f"rgba({FOR if share > 0 else AGAINST}, {opacity})" if float(opacity) > 0 else ""
        yield Word(str(word), colour, f"{share:+.2f}")
