"""The folder of explained images: what is written for each, and what is already there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hansfree.errors import UserError
from hansfree.explaining.images import Source, readable
from hansfree.explaining.look import Explained
from hansfree.report.gallery import Entry
from hansfree.report.sheets import Column, Sheet, draw_sheet
from hansfree.runs import atomic_path, read_json, write_json, write_text

_TORN = ".hansfree-"


def write(found: Explained, name: str, folder: Path, arrays: bool, coarse: int = 1) -> Entry:
    """Draw one image's picture and store its numbers; the entry for the manifest.

    Maps as fine as the image are averaged over squares of ``coarse`` pixels in the picture, not in the numbers.
    """
    entry = Entry(*found.source.state, found.source.title, error=found.error)
    if found.pixels is None:
        return entry
    entry = replace(
        entry,
        picture=f"pictures/{name}.png",
        arrays=f"maps/{name}.npz" if arrays else "",
        top=found.top,
        explained=found.explained,
        refused={name: answer for name, answer in found.answers.items() if isinstance(answer, str)},
    )
    if arrays:
        with atomic_path(folder / entry.arrays) as temporary:
            np.savez(temporary, **_numbers(found))
    with atomic_path(folder / entry.picture) as temporary:
        draw_sheet(_sheet(found, entry, coarse)).save(temporary, compress_level=3)
    return entry


def _numbers(found: Explained) -> dict[str, Any]:
    """Maps by explainer [classes, c, h, w], and what belongs to them, by the names in the archive."""
    assert found.pixels is not None and found.logits is not None
    maps = {name: answer for name, answer in found.answers.items() if not isinstance(answer, str)}
    return {
        "image": found.pixels,
        "logits": found.logits,
        "class_ids": np.array([said.index for said in found.explained]),
        "class_names": np.array([said.name for said in found.explained]),
        "explainers": np.array(list(maps), dtype=str),
        "source": np.array(readable(found.source.path)),
        **maps,
    }


def _sheet(found: Explained, entry: Entry, coarse: int) -> Sheet:
    assert found.pixels is not None
    size = found.pixels.shape[:2]
    columns = [
        Column(name, refusal=answer) if isinstance(answer, str) else Column(name, _coarser(answer.sum(1), size, coarse))
        for name, answer in found.answers.items()
    ]
    rows = [f"Why {said.short}?  (class {said.index}, {said.percent})" for said in found.explained]
    image = found.pixels if found.pixels.shape[2] == 3 else found.pixels.repeat(3, axis=2)
    return Sheet(entry.title, entry.told, image, rows, columns)


def _coarser(maps: np.ndarray, size: tuple[int, ...], coarse: int) -> np.ndarray:
    """``maps`` [classes, h, w] as fine as the image, averaged over squares; a border that fills none is left out."""
    height, width = (side // coarse for side in maps.shape[1:])
    if coarse == 1 or maps.shape[1:] != size or not height * width:
        return maps
    squares = maps[:, : height * coarse, : width * coarse].reshape(-1, height, coarse, width, coarse)
    return squares.mean((2, 4))


@dataclass
class Folder:
    """The folder of explained images: the only code that knows its layout.

    explain.json says what was asked, manifest.jsonl has a line per image, pictures/ and maps/ hold their files.
    """

    path: Path
    asked: Mapping[str, Any]
    entries: dict[str, Entry]
    """What is there, by source."""
    overwrite: bool = False
    """Whether what is there is to be replaced."""
    _taken: dict[str, str] = field(default_factory=dict[str, str])
    """Which source has which file name."""

    @classmethod
    def check(cls, path: Path, asked: Mapping[str, Any], *, overwrite: bool) -> "Folder":
        """The folder at ``path``, untouched. Raises ``UserError`` where it holds something else."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another --out.")
        held = path / "explain.json"
        if not held.exists():
            if path.is_dir() and any(not file.name.startswith(_TORN) for file in path.iterdir()):
                raise UserError(f"{path} holds other files and no explain.json; choose another --out.")
            return cls(path, asked, {})
        before = read_json(held)
        differing = [key for key in asked if not isinstance(before, dict) or before.get(key) != asked[key]]
        if differing and not overwrite:
            raise UserError(
                f"{path} holds maps that were made otherwise (the {differing[0]} differ); "
                "choose another --out, or add --overwrite to replace them."
            )
        return cls(path, asked, {entry.source: entry for entry in _manifest(path / "manifest.jsonl")}, overwrite)

    def open(self) -> None:
        """Make the folder ready to be written to: what is to be replaced goes, and what a killed process left."""
        for torn in self.path.rglob(f"{_TORN}*"):
            torn.unlink(missing_ok=True)
        if self.overwrite:
            for entry in self.entries.values():
                for name in (entry.picture, entry.arrays):
                    with suppress(OSError, ValueError):
                        if name and self.path.resolve() in (self.path / name).resolve().parents:
                            (self.path / name).unlink()
            self.entries = {}
        self._taken = {_name(entry): entry.source for entry in self.entries.values() if entry.picture}
        write_json(self.path / "explain.json", self.asked)
        lines = [json.dumps(entry.to_json(), ensure_ascii=False) + "\n" for entry in self.entries.values()]
        write_text(self.path / "manifest.jsonl", "".join(lines))

    def is_done(self, source: Source, arrays: bool) -> bool:
        """Whether the image, as it is now, has been explained and its files are there."""
        path, size, changed = source.state
        entry = self.entries.get(path)
        if self.overwrite or entry is None or entry.error or (entry.size, entry.changed) != (size, changed):
            return False
        wanted = [entry.picture, *([entry.arrays] if arrays else [])]
        return all(name and (self.path / name).is_file() for name in wanted)

    def claim(self, source: Source) -> str:
        """A file name without suffix for a source, that no other has, not even on systems that ignore case."""
        path = readable(source.path)
        parts = Path(source.title).with_suffix("").parts
        plain = "/".join(_as_file_name(part) for part in parts)
        name, number = plain, 1
        while self._taken.setdefault(name.casefold(), path) != path:
            number += 1
            name = f"{plain}-{number}"
        return name

    def add(self, entry: Entry) -> None:
        """Note that an image is done."""
        self.entries[entry.source] = entry
        with (self.path / "manifest.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry.to_json(), ensure_ascii=False) + "\n")


def _name(entry: Entry) -> str:
    return entry.picture.removeprefix("pictures/").removesuffix(".png").casefold()


def _as_file_name(part: str) -> str:
    """``part`` without control characters and short enough for a file name with our additions."""
    printable = "".join(letter if letter.isprintable() else "_" for letter in part)
    return printable.encode()[:160].decode(errors="ignore")


def _manifest(path: Path) -> Iterator[Entry]:
    """The entries of a manifest; lines that an interruption tore are left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError, TypeError):
                yield Entry.from_json(json.loads(line))
