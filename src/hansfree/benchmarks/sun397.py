"""SUN397: photographs of 397 kinds of places, from abbey to youth hostel.

Xiao, Hays, Ehinger, Oliva & Torralba, "SUN database: large-scale scene recognition from abbey to zoo", CVPR 2010,
https://doi.org/10.1109/CVPR.2010.5539970, in its own layout: the folder of SUN397.tar.gz, with the lists of
Partitions.zip in it, beside it, or in a folder Partitions at either place.

    SUN397/ClassName.txt                    /a/abbey, one a line; the class's number is its line
    SUN397/a/abbey/sun_aaalbzqrimafwbiv.jpg
    SUN397/Training_01.txt                  /a/abbey/sun_aaalbzqrimafwbiv.jpg, one a line: 50 of each class
    SUN397/Testing_01.txt                   50 others of each class; ten such pairs of lists

Splits. iid is what the partition's test list names. The other images are those of its training list, or all that are
not in the test list; ``valid`` of each class are valid, the rest is train. There is no known shortcut and so no ood
or shift. A class is called by its folder without the first letter's: ``abbey``, ``apartment_building/outdoor``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

from hansfree.benchmarks.choosing import read_list
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.folder import FolderSplit, Row, described, held_out, split_of
from hansfree.core import InputSpec
from hansfree.errors import UserError

CLASSES, LISTS, PARTITIONS = "ClassName.txt", "Partitions", 10


@final
class SUN397(Divided[FolderSplit]):
    """Photographs of places, each of one kind.

    ``root`` is the folder SUN397 or the one that holds it; ``partition``, 1 to 10, says which pair of lists divides the
    images; ``whole`` trains on every image that its test list does not name, instead of on the 50 per class of its
    training list; ``valid`` of each class, drawn by ``split_seed``, or those of a list of images, are held out of
    either. ``size`` is the side to which images are brought, whatever their shape; ``cache`` keeps decoded images in
    memory, 3 bytes per pixel.
    """

    name: ClassVar[str] = "sun397"
    biases = ()
    shortcut = None

    def __init__(
        self,
        *,
        root: str | Path,
        partition: int = 1,
        whole: bool = False,
        valid: int | str = 10,
        split_seed: int = 0,
        size: int = 224,
        cache: bool = False,
    ) -> None:
        if size < 1:
            raise UserError(f"benchmark.size is {size}; give a number of pixels.")
        if not 1 <= partition <= PARTITIONS:
            raise UserError(f"benchmark.partition is {partition}; give 1 to {PARTITIONS}.")
        self._root = _found(Path(root).expanduser())
        numbers = {folder: number for number, folder in enumerate(_folders(self._root))}
        self.classes = tuple(folder.partition("/")[2] for folder in numbers)
        self.input = InputSpec(3, size, size)
        test = list(_listed(self._root, f"Testing_{partition:02d}.txt", numbers, "iid"))
        if whole:
            tested = {row.image for row in test}
            seen = [row for row in _all(self._root, numbers) if row.image not in tested]
        else:
            seen = list(_listed(self._root, f"Training_{partition:02d}.txt", numbers, "train"))
        train, ours = held_out(seen, self.classes, valid, split_seed)
        self._splits = {
            name: split_of(rows, size=(size, size), resized=True, cache=cache)
            for name, rows in {"train": train, "valid": ours, "iid": test}.items()
        }
        self._options = {
            "root": str(root), "partition": partition, "whole": whole,
            "valid": Path(valid).name if isinstance(valid, str) else valid, "split_seed": split_seed, "size": size,
            "cache": cache,
        }  # fmt: skip

    def _described(self, split: FolderSplit) -> dict[str, Any]:
        return described(split, self._root)


def _found(root: Path) -> Path:
    """The folder of the images."""
    for folder in (root, root / "SUN397"):
        if (folder / CLASSES).is_file():
            return folder
    raise UserError(f"{root} holds no {CLASSES}; set benchmark.root to the unpacked folder SUN397.")


def _folders(root: Path) -> list[str]:
    """The folder of each class below ``root``."""
    folders = [name.strip("/") for _, name in read_list(root / CLASSES, "benchmark.root")]
    for folder in folders:
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder} is missing, which {CLASSES} names; unpack the whole data set.")
    return folders


def _listed(root: Path, name: str, numbers: Mapping[str, int], split: str) -> Iterator[Row]:
    """The images of one list of the partition."""
    places = (root, root / LISTS, root.parent, root.parent / LISTS)
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        raise UserError(f"{root} has no {name} in it, beside it or in {LISTS}; unpack Partitions.zip there.")
    for line, image in read_list(path, "benchmark.root"):
        folder = image.strip("/").rpartition("/")[0]
        if folder not in numbers:
            raise UserError(f"{path}, line {line} names {image}, whose class is not in {CLASSES}; fetch both again.")
        if not (root / image.strip("/")).is_file():
            raise UserError(f"{path}, line {line} names {image}, which is missing; unpack the whole data set.")
        yield Row(f"{path}, line {line}", root / image.strip("/"), str(numbers[folder]), split)


def _all(root: Path, numbers: Mapping[str, int]) -> Iterator[Row]:
    """All images, by class and name."""
    for folder, number in numbers.items():
        for image in sorted((root / folder).glob("*.jpg")):
            yield Row(str(image), image, str(number), "train")
