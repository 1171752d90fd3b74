"""Writing a benchmark to disk, as images and a table that the benchmark ``folder`` and other tools read."""

import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hansfree.benchmarks.folder import NAMES, TABLE
from hansfree.core import Benchmark, Split
from hansfree.errors import UserError

NUMBER = {"train": 0, "valid": 1, "iid": 2, "ood": 2, "shift": 2, "valid_ood": 3}
"""Of each split in the table: WILDS' three, and one of its own for what must not be taken for validation data."""

Watch = Callable[[int, int], None]


def make(benchmark: Benchmark, out: Path, watch: Watch = lambda done, total: None) -> int:
    """Write every split of ``benchmark`` below ``out`` and give the number of images; ``out`` appears whole or not.

    Images, masks and clean twins become PNG of 8 bits; the table is metadata.csv, and names are in benchmark.json.
    What is drawn anew at every access to train is written as it is without a generator.
    Raises ``UserError`` where ``out`` is there already and holds something, and for labels of several classes.
    """
    if benchmark.split("train").label.ndim > 1:
        raise UserError(
            f"Images of {benchmark.name} have labels of several classes, which the table has no room for; "
            "choose a benchmark of one class per image."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    total = sum(len(benchmark.split(name)) for name in benchmark.split_names())
    with tempfile.TemporaryDirectory(prefix=".hansfree-", dir=out.parent) as work:
        whole = Path(work) / "made"
        whole.mkdir()
        rows: list[dict[str, object]] = []
        for name in benchmark.split_names():
            for row in _written(benchmark, name, benchmark.split(name), whole):
                rows.append(row)
                watch(len(rows), total)
        with (whole / TABLE).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list({key: None for row in rows for key in row}), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        names = {
            "classes": list(benchmark.classes),
            "places": list(benchmark.biases),
            "mask_names": list(benchmark.mask_names),
            "record": benchmark.record(),
        }
        (whole / NAMES).write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        shutil.move(whole, out)
    return total


def _written(benchmark: Benchmark, name: str, split: Split, folder: Path) -> Iterator[dict[str, object]]:
    tier = {number: of for of, members in split.tiers.items() for number in members.tolist()}
    for index in torch.arange(len(split)).split(100):
        batch = split.batch(index)
        for place, number in enumerate(index.tolist()):
            stem = f"{name}/{number:05d}"
            row: dict[str, object] = {
                "img_filename": _saved(batch.images[place], folder, f"images/{stem}.png"),
                "y": int(batch.label[place]),
                "split": NUMBER[name],
                "split_name": name,
            }
            if batch.bias is not None:
                row["place"] = int(batch.bias[place])
            if batch.mask is not None:
                names = [mask.replace(" ", "-") for mask in benchmark.mask_names]
                row["mask_filename"] = ";".join(
                    _saved(mask[None], folder, f"masks/{stem}-{kind}.png")
                    for kind, mask in zip(names, batch.mask[place])
                )
            if batch.clean is not None:
                row["clean_filename"] = _saved(batch.clean[place], folder, f"clean/{stem}.png")
            if tier:
                row["tier"] = tier[number]
            yield row


def _saved(pixels: Tensor, folder: Path, file: str) -> str:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)).save(path)
    return file
