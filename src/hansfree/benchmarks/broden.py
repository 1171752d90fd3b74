"""Broden, the broadly and densely labelled data set of network dissection, as it is unpacked (broden1_224 and others).

Bau et al., 2017, https://arxiv.org/abs/1704.05796. Read are: ``index.csv``, a line for each image with its file below
``images/``, the size ``sh`` x ``sw`` of its masks, and a column for each category, whose cells hold, parted by
semicolons, label numbers (true of the whole image) or files of labels (number = red + 256 green; 0 is no label);
``category.csv``, which names the categories; ``label.csv``, which names the labels; and ``c_CATEGORY.csv``, how many
pixels each label covers in a category. A label that occurs in several categories belongs to the one in which it covers
most, as in the published code; an image is annotated for a category where its cell is not empty.
"""

import csv
import hashlib
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.benchmarks.concepts import Concept, ConceptFolder, Concepts, Masks, pixels, stacked
from hansfree.benchmarks.image_files import read_image
from hansfree.errors import UserError

Row = dict[str, str]


def read_concepts(root: Path, size: int) -> Concepts:
    """Images with masks of concepts: Broden's folder, or one of masks. Raises ``UserError`` as these do."""
    return Broden(root) if (root / "index.csv").is_file() else ConceptFolder(root, size=size)


@final
class Broden(Concepts):
    """All images of Broden below ``root``, or those of one ``split`` (train, val).

    Raises ``UserError`` for a file that is missing or lacks a column, and for masks of several sizes.
    """

    name = "broden"

    def __init__(self, root: str | Path, *, split: str | None = None) -> None:
        self._root = Path(root)
        names = [row["name"] for row in self._table("category.csv", "name")]
        index = self._table("index.csv", "image", "split", "sh", "sw", *names)
        self._rows = [row for row in index if split in (None, row["split"]) and any(row[name] for name in names)]
        if not self._rows:
            raise UserError(f"{self._root / 'index.csv'} annotates no image of split {split!r}; check the split.")
        sizes = {(int(row["sh"]), int(row["sw"])) for row in self._rows}
        if len(sizes) > 1:
            raise UserError(f"{self._root / 'index.csv'} has masks of {len(sizes)} sizes; give data of one size.")
        (self._size,) = sizes
        self._split, self._columns = split, names
        belongs = self._primary(names)
        labels = {int(row["number"]): row["name"] for row in self._table("label.csv", "number", "name")}
        known = [number for number in labels if number in belongs]
        known.sort(key=lambda number: (names.index(belongs[number]), number))
        self._number = {label: number for number, label in enumerate(known)}
        self.concepts = tuple(Concept(labels[label], belongs[label]) for label in known)

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        """The images at ``index``."""
        return torch.stack(
            [pixels(read_image(self._root / "images" / self._rows[row]["image"])) for row in index.tolist()]
        )

    def masks(self, index: Int[Tensor, "b"]) -> Masks:
        """Their masks."""
        rows = [self._rows[row] for row in index.tolist()]
        places = {name: number for number, name in enumerate(self.categories)}
        shown, category = [self._shown(row) for row in rows], self.category.tolist()
        annotated = [
            {places[name] for name in places if row[name]} | {category[number] for number in own}
            for row, own in zip(rows, shown)
        ]
        return stacked(shown, annotated, len(places), self._size)

    def record(self) -> dict[str, Any]:
        """The split, and digests of the tables."""
        tables = {
            name: hashlib.sha256((self._root / name).read_bytes()).hexdigest() for name in ("index.csv", "label.csv")
        }
        return {"name": self.name, "split": self._split, "images": len(self), "sha256": tables}

    def _shown(self, row: Row) -> dict[int, np.ndarray]:
        """The mask of each concept that an image shows; where several layers show one, all of them together."""
        found: dict[int, np.ndarray] = {}
        for cell in (cell for name in self._columns for cell in row[name].split(";") if cell):
            layer = np.full(self._size, int(cell)) if cell.isdigit() else self._layer(cell)
            for label in np.unique(layer):
                if (number := self._number.get(int(label))) is not None:
                    found[number] = found.get(number, False) | (layer == label)
        return found

    def _layer(self, file: str) -> np.ndarray:
        path = self._root / "images" / file
        values = np.asarray(read_image(path), dtype=np.int64)
        if values.shape[:2] != self._size:
            raise UserError(
                f"{path} has {values.shape[1]} x {values.shape[0]} pixels, but index.csv says "
                f"{self._size[1]} x {self._size[0]}; unpack the data set anew."
            )
        return values[..., 0] + 256 * values[..., 1]

    def _primary(self, categories: list[str]) -> dict[int, str]:
        """The category of each label: that in which it covers most, the later one of equals."""
        most: dict[int, tuple[float, int]] = {}
        for place, category in enumerate(categories):
            for row in self._table(f"c_{category}.csv", "number", "coverage"):
                number = int(row["number"])
                most[number] = max(most.get(number, (0.0, 0)), (float(row["coverage"]), place))
        return {number: categories[place] for number, (_, place) in most.items() if number}

    def _table(self, name: str, *columns: str) -> list[Row]:
        path = self._root / name
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read ({error}); name the folder with Broden's index.csv.") from error
        if missing := [column for column in columns if not rows or column not in rows[0]]:
            raise UserError(f"{path} lacks the column {missing[0]}; unpack the data set anew.")
        return rows
