"""What is wrong with a folder of images, in words."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from PIL import Image

from hansfree.benchmarks.folder import SPLITS, Row, Table, read_row, read_table
from hansfree.errors import UserError

SMALL_GROUP = 10
"""Fewer training or test images than these in a group make its accuracy mean little."""

Watch = Callable[[int, int], None]


@final
@dataclass(frozen=True)
class Findings:
    """What a check found: mistakes, which stop training or spoil its results; remarks; and what there is."""

    mistakes: tuple[str, ...]
    remarks: tuple[str, ...]
    summary: tuple[str, ...]


def check(root: Path, watch: Watch = lambda done, total: None) -> Findings:
    """Read every image below ``root`` and tell what is wrong. Raises ``UserError`` where there is no data set."""
    table = read_table(root)
    mistakes, sizes, contents = list(table.problems), Counter[tuple[int, int]](), _Contents()
    for number, row in enumerate(table.rows):
        try:
            sizes[read_row(row)[0].size] += 1
        except UserError as error:
            mistakes.append(str(error))
        else:
            contents.add(row)
        watch(number + 1, len(table.rows))
    mistakes += contents.leaks()
    remarks = [*_sizes(root, sizes), *contents.repeats(), *_unnamed(root, table)]
    if table.problems:  # classes and places may have no numbers yet
        return Findings(tuple(mistakes), tuple(remarks), ())
    mistakes += _absent_classes(root, table)
    remarks += _small_groups(root, table)
    return Findings(tuple(mistakes), tuple(remarks), tuple(_summary(table)))


class _Contents:
    """Rows by the content of their image files."""

    def __init__(self) -> None:
        self._rows: dict[bytes, list[Row]] = defaultdict(list)

    def add(self, row: Row) -> None:
        self._rows[hashlib.sha256(row.image.read_bytes()).digest()].append(row)

    def _twins(self) -> Iterator[tuple[Row, Row]]:
        for rows in self._rows.values():
            yield from ((rows[0], other) for other in rows[1:] if other.image != rows[0].image)

    def leaks(self) -> Iterator[str]:
        """Pictures that are in two parts, or have two classes."""
        for first, other in self._twins():
            if first.y != other.y:
                yield f"{first.image} and {other.image} are the same picture with different classes; leave one out."
            elif _part(first) != _part(other):
                yield (
                    f"{first.image} ({first.split}) and {other.image} ({other.split}) are the same picture, so that "
                    f"{_part(other)} does not test what was learnt; leave one out."
                )

    def repeats(self) -> Iterator[str]:
        """Pictures that are twice in one split."""
        twins = [pair for pair in self._twins() if pair[0].split == pair[1].split and pair[0].y == pair[1].y]
        if twins:
            first, other = twins[0]
            told = f"{len(twins)}, such as {first.image} and {other.image}"
            yield f"Pictures that repeat another one of their split: {told}."


def _part(row: Row) -> str:
    return {"train": "train", "valid": "valid", "valid_ood": "valid"}.get(row.split, "test")


def _absent_classes(root: Path, table: Table) -> Iterator[str]:
    for split in SPLITS:
        there = {row.y for row in table.of(split)}
        for number, name in enumerate(table.classes):
            if there and split != "train" and str(number) not in there:
                yield f"{root} has no image of the class {name!r} in {split}; add some."


def _sizes(root: Path, sizes: Counter[tuple[int, int]]) -> Iterator[str]:
    if len(sizes) > 1:
        (width, height), count = sizes.most_common(1)[0]
        yield (
            f"The images of {root} have {len(sizes)} sizes (most often {height} x {width}, {count} times); "
            "set benchmark.size to the side that all shall have."
        )


def _small_groups(root: Path, table: Table) -> Iterator[str]:
    for split in ("train", "iid", "ood", "shift"):
        groups = Counter((row.y, row.place) for row in table.of(split))
        small = [group for group, count in sorted(groups.items()) if count < SMALL_GROUP]
        if small:
            count = groups[small[0]]
            more = f", and {len(small) - 1} more groups" if len(small) > 1 else ""
            yield f"Only {count} images of {split} are {_called(small[0], table)}{more}; accuracies there mean little."
    for split, who in (("train", "methods for groups"), ("valid", "dfr and worst_group_val")):
        there = {(row.y, row.place) for row in table.of(split)}
        empty = len({y for y, _ in there}) * len({place for _, place in there}) - len(there)
        if table.places and empty:
            yield f"{root} has no {split} image in {empty} of its groups (class, place): {who} need some."


def _called(group: tuple[str, str], table: Table) -> str:
    y, place = group
    there = f" at place {table.places[int(place)]!r}" if place else ""
    return f"of class {table.classes[int(y)]!r}{there}"


def _unnamed(root: Path, table: Table) -> Iterator[str]:
    named = {file for row in table.rows for file in row.files}
    endings = Image.registered_extensions()
    others = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in endings and path not in named]
    if others:
        yield f"{len(others)} images of {root} belong to no split, such as {others[0]}; they are not used."


def _summary(table: Table) -> Iterator[str]:
    for split in SPLITS:
        counts = Counter(row.y for row in table.of(split))
        if counts:
            told = ", ".join(f"{name} {counts[str(number)]}" for number, name in enumerate(table.classes))
            yield f"{split}: {sum(counts.values())} images ({told})"
