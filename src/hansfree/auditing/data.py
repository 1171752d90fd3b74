"""What models are audited on: a benchmark, or a folder of images with or without classes.

coloured-digits:limit=300      a benchmark by name, with settings
config.yaml                    the benchmark section of a config
FOLDER/metadata.csv            a table, as the benchmark ``folder`` reads it; no split has to be there
FOLDER/train/CLASS/*.jpg       a tree of splits and classes; no split has to be there
FOLDER/CLASS/*.jpg             classes
FOLDER/*.jpg                   images without labels
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, final

from PIL import Image

from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.folder import FOLDERS, SPLITS, TABLE, FolderSplit, Row, Table, described, read_table, split_of
from hansfree.benchmarks.image_files import image_size
from hansfree.core import TEST_SPLITS, Benchmark, InputSpec, Split
from hansfree.errors import UserError
from hansfree.explaining.look import section_of
from hansfree.parts import named_benchmark
from hansfree.runs import read_yaml

WHOLE = "images"
"""The split of images that no folder and no table divides."""
KEPT_IMAGES = 2000
"""Of so many images decoded ones are kept, since most measures of maps look at the same ones again."""


class Source(NamedTuple):
    """Data whose classes are known before any image is read."""

    classes: tuple[str, ...]
    """Empty where images have no labels."""
    channels: int
    at: Callable[[int], Benchmark]
    """The data, for models that were made for images of this side; benchmarks have a size of their own."""


def source_of(data: str, out: Path, size: int | None) -> Source:
    """What ``data`` names; images of a folder are resized to ``size``, if it is given; ``out`` is no part of a folder.

    Raises ``UserError`` for what is neither a folder of images nor a benchmark, and as :func:`read_folder` does.
    """
    if is_folder(data):
        root, table = Path(data), read_folder(Path(data), out)
        return Source(table.classes, 3, lambda side: Pictures(root, table, size or side))
    if size is not None:
        raise UserError("--size is for folders of images; set the size of a benchmark in its own settings.")
    benchmark = read_benchmark(data)
    return Source(benchmark.classes, benchmark.input.channels, lambda _: benchmark)


def is_folder(data: str) -> bool:
    """Whether ``data`` is a folder; else it is a benchmark."""
    return Path(data).is_dir()


def read_benchmark(data: str) -> Benchmark:
    """The benchmark that ``data`` names or whose config it is. Raises ``UserError`` for what is neither."""
    if data.endswith((".yaml", ".yml")):
        section = read_yaml(Path(data)).get("benchmark")
        if not isinstance(section, dict):
            raise UserError(f"{data} has no benchmark section; add one, or name a benchmark.")
        return named_benchmark(section)
    if "/" in data.partition(":")[0]:
        raise UserError(f"There is no folder {data}; check the path.")
    return named_benchmark(section_of(data, "benchmark", "coloured-digits:limit=300"))


@final
class Pictures(Divided[FolderSplit]):
    """Images of a folder, resized to ``size`` x ``size`` pixels; ``classes`` is empty where they have no labels."""

    name = "folder"

    def __init__(self, root: Path, table: Table, size: int) -> None:
        self._root = root
        self.input = InputSpec(3, size, size)
        self.classes, self.biases, self.mask_names = table.classes, table.places, table.mask_names
        given = {"bias": bool(table.places), "mask": bool(table.mask_names)}
        self.gives = frozenset(name for name, there in given.items() if there)
        how: dict[str, Any] = {"size": (size, size), "resized": True, "cache": len(table.rows) <= KEPT_IMAGES}
        self._splits = {name: split_of(table.of(name), **how) for name in (*SPLITS, WHOLE) if table.of(name)}
        self._options = {"size": size}

    def _described(self, split: FolderSplit) -> dict[str, Any]:
        return described(split, self._root)


def read_folder(root: Path, out: Path) -> Table:
    """What a folder says about its images, ``out`` left out; without classes where it tells none.

    Raises ``UserError`` for no image, a file that is none, one class only, and images beside folders of images.
    """
    if (root / TABLE).exists() or any((root / name).is_dir() for name in FOLDERS):
        table = read_table(root, splits=())
        if {row.split for row in table.rows} == {"ood"}:  # no place was seen in training, because there is none
            table = replace(table, rows=tuple(replace(row, split=WHOLE) for row in table.rows))
    else:
        Image.init()
        table = _undivided(root, out)
    if table.problems:
        raise UserError(table.problems[0])
    for row in table.rows:
        image_size(row.image)  # refuses files that are no images, before anything is written
    return table


def _undivided(root: Path, out: Path) -> Table:
    known = Image.registered_extensions()
    images = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in known and not _is_aside(path, out)]
    if not images:
        raise UserError(f"There are no images in {root}; name a folder that holds some, or a benchmark.")
    inside = [image.relative_to(root).parts for image in images]
    classes = sorted({parts[0] for parts in inside if len(parts) > 1})
    if not classes:
        return Table(tuple(Row(str(image), image, "-1", WHOLE) for image in images), ())
    if any(len(parts) == 1 for parts in inside):
        raise UserError(
            f"{root} holds images beside the folder {classes[0]}; sort all images into folders of their classes, or "
            "move the folders away to audit images without labels."
        )
    if len(classes) == 1:
        raise UserError(
            f"{root} holds one class only ({classes[0]}); add folders of other classes, or name {root / classes[0]} to "
            "audit images without labels."
        )
    number = {name: str(place) for place, name in enumerate(classes)}
    rows = (Row(str(image), image, number[parts[0]], WHOLE) for image, parts in zip(images, inside))
    return Table(tuple(rows), (), tuple(classes))


def _is_aside(path: Path, out: Path) -> bool:
    return path.name.startswith(".") or not path.is_file() or out.resolve() in path.resolve().parents


def audited_splits(benchmark: Benchmark) -> dict[str, Split]:
    """The test splits; where there are none, the one that is nearest to them."""
    there = benchmark.split_names()
    chosen = [name for name in TEST_SPLITS if name in there]
    chosen = chosen or [name for name in (WHOLE, "valid_ood", "valid", "train") if name in there][:1]
    return {name: benchmark.split(name) for name in chosen}
