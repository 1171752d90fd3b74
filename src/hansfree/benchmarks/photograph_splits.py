"""Which animals and scenes a split of composites shows, and where: rotations, tiers, parts, random views.

Rotations. Animals of a class, or scenes of a kind, stand in random order on a circle that is cut into eighths: two are
test's, one is validation's, five are training's. Seeds 0 to 7 turn the circle by an eighth each; 8 to 15 are the
rotations of another order, and so on. Over eight seeds each animal is two times in test, one time in valid, and five
times in train.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.benchmarks.coloured_digits import generator_for, stratified_order
from hansfree.benchmarks.composites import (
    CHANNEL_GAIN,
    CROP,
    LONGER_SIDE,
    Picture,
    Views,
    cut_out,
    gains,
    object_places,
    scene,
    scene_places,
    sides,
)
from hansfree.benchmarks.photographs import ANIMALS, TASKS, Subject
from hansfree.errors import UserError

Task = Literal["bird/mammal", "waterbird/landbird"]
PARTS = ("train", "valid", "test")
TIERS = ("seen", "unseen")
EIGHTHS = 8
TEST, VALID = (0, 1), (2,)

T = TypeVar("T")
Parts = dict[str, list[T]]
Choices = Mapping[int, Sequence[Subject]]


def rotated(items: Sequence[T], seed: int, purpose: str) -> Parts[T]:
    """The parts train, valid and test of ``items`` in rotation ``seed``; each purpose has an order of its own."""
    orders, turn = divmod(seed, EIGHTHS)
    order = torch.randperm(len(items), generator=generator_for(orders, purpose)).tolist()
    parts: Parts[T] = {name: [] for name in PARTS}
    for position, number in enumerate(order):
        eighth = (position * EIGHTHS // len(items) - turn) % EIGHTHS
        parts["test" if eighth in TEST else "valid" if eighth in VALID else "train"].append(items[number])
    return parts


def animals_by_class(task: str, seed: int) -> list[Parts[Subject]]:
    """For each class of ``task`` its animals, in the parts of rotation ``seed``."""
    return [
        rotated([animal for animal in ANIMALS if animal.kind in kinds], seed, name)
        for name, kinds in TASKS[task].items()
    ]


def check_sizes(size: int, seed: int, counts: Mapping[str, int]) -> None:
    """Raises ``UserError`` for images too small to show anything, parts too small for every group, and bad seeds."""
    if size < 16:
        raise UserError(f"benchmark.size is {size}; give 16 pixels or more.")
    if seed < 0:
        raise UserError(f"benchmark.split_seed is {seed}; give 0 or more.")
    for key, count in counts.items():
        if count < 8:
            raise UserError(f"benchmark.{key} is {count}; give 8 samples or more.")


# Who is shown, and where


@final
@dataclass(frozen=True, eq=False)
class Part:
    """The animals of train, valid or test in fixed views, before anything is behind them."""

    name: str
    label: Int[Tensor, "n"]
    tiers: Mapping[str, Int[Tensor, "_"]]
    """In test, the samples of each tier: "seen", animals of training, and "unseen", animals that it never saw."""
    group: Int[Tensor, "n"]
    """Class and tier in one number."""
    objects: Views


def part_of(
    name: str, count: int, animals: Sequence[Parts[Subject]], folder: Path, size: int, generator: torch.Generator
) -> Part:
    """``count`` views of animals, classes in turn, and in test the tiers too; all animals of a group equally often."""
    classes = len(animals)
    label = torch.arange(count) % classes
    if name != "test":
        choices = {number: own[name] for number, own in enumerate(animals)}
        return Part(name, label, {}, label, object_views(folder, choices, label, size, generator))
    tier = torch.arange(count) // classes % len(TIERS)
    group = label + classes * tier
    choices = {
        number + classes * row: own[source] for row, source in enumerate(("train", "test"))
        for number, own in enumerate(animals)
    }  # fmt: skip
    tiers = {of: (tier == number).nonzero()[:, 0] for number, of in enumerate(TIERS)}
    return Part(name, label, tiers, group, object_views(folder, choices, group, size, generator))


def biased(part: Part, ratio: int | float, generator: torch.Generator) -> Int[Tensor, "n"]:
    """Of two classes: the sample's own in a share ``ratio`` of each class and tier, the other one in the others."""
    conflicting = stratified_order(part.group, generator)[round(ratio * len(part.label)) :]
    return part.label.index_copy(0, conflicting, 1 - part.label[conflicting])


def object_views(
    folder: Path,
    choices: Choices,
    group: Int[Tensor, "n"],
    size: int,
    generator: torch.Generator,
    *,
    longer: tuple[float, float] = LONGER_SIDE,
    corner: Float[Tensor, "n 2"] | None = None,
) -> Views:
    """Random views of cut-outs, for each sample of a subject of its group, where :func:`object_places` puts them."""
    files, chosen = _files(choices, group, generator)
    pixels = min(size, round(2 * longer[0] * size))  # rendered at twice the size, and never more coarsely than that
    pictures = tuple(cut_out(folder / file, pixels) for file in files)
    side = sides(pictures)
    place = object_places((side / side.amax(1, keepdim=True))[chosen], generator, longer=longer, corner=corner)
    return Views(pictures, chosen, place, gains(len(group), CHANNEL_GAIN, generator), size)


def scene_views(
    folder: Path, choices: Choices, group: Int[Tensor, "n"], size: int, generator: torch.Generator
) -> Views:
    """Random views of scenes, for each sample of a scene of its group."""
    files, chosen = _files(choices, group, generator)
    pictures: tuple[Picture, ...] = tuple(scene(folder / file, round(size / CROP[0])) for file in files)
    side = sides(pictures)
    place = scene_places((side / side.amin(1, keepdim=True))[chosen], generator)
    return Views(pictures, chosen, place, gains(len(group), 0.0, generator), size)


def _files(choices: Choices, group: Int[Tensor, "n"], generator: torch.Generator) -> tuple[list[str], Int[Tensor, "n"]]:
    """Files, and which of them each sample shows: subjects of its group in turn, and any file of a subject."""
    files = sorted({file for subjects in choices.values() for subject in subjects for file in subject.files})
    number = {file: position for position, file in enumerate(files)}
    chosen = torch.empty_like(group)
    for value, subjects in choices.items():
        members = (group == value).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)].tolist()
        drawn = torch.rand(len(members), generator=generator).tolist()
        for turn, (sample, share) in enumerate(zip(members, drawn)):
            own = subjects[turn % len(subjects)].files
            chosen[sample] = number[own[int(share * len(own))]]
    return files, chosen


def names(subjects: Sequence[Subject]) -> list[str]:
    """In alphabetical order."""
    return sorted(subject.name for subject in subjects)
