"""What every benchmark promises, whichever it is."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hansfree.audits.roar import indifferent, write_ranks
from hansfree.benchmarks import BENCHMARKS
from hansfree.core import TEST_SPLITS, TRAINING_SPLITS, Batch, Benchmark, Boxes
from hansfree.data import making
from hansfree.errors import UserError

TEXTS = ("film-reviews", "sst")
"""Benchmarks of texts, whose promises are others."""


@pytest.fixture(scope="module", params=[name for name in BENCHMARKS if name not in TEXTS])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


SMALL = {"size": 24, "train": 64, "valid": 32, "test": 64}
SETTINGS = {"objects-on-scenes": SMALL, "many-objects": SMALL, "accessories": SMALL, "cells": SMALL}
SETTINGS["corrupted-images"] = {"limit": 200, "valid": 60, "test": 60}


TESTS = {"digits": {"iid"}, "cells": {"iid"}, "pascal-voc": {"iid"}, "sun397": {"iid"}, "chest-x-ray": {"iid", "ood"}}
TESTS["masked-pixels"] = TESTS["cells"]
"""Of benchmarks without a shortcut, or with one that cannot be exchanged."""


@pytest.fixture(scope="module")
def make(
    name: str,
    photographs: Path,
    stanford_dogs: Path,
    coco_and_places: dict[str, Path],
    waterbirds: Path,
    labelled_names: Path,
    x_rays: Path,
    voc: Path,
    sun397: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[], Benchmark]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HANSFREE_DATA", str(photographs))
        settings = SETTINGS.get(name, {})
        if name == "folder":
            settings = {"root": tmp_path_factory.mktemp("made")}
            making.make(BENCHMARKS["objects-on-scenes"](**SMALL), settings["root"])
        if name == "dogs-with-ties":
            settings = {"root": stanford_dogs, "size": 24, "valid": 5}
        if name == "coco-on-places":
            settings = {**coco_and_places, "size": 24, "train": 2, "valid": 1, "test": 1}
        if name == "waterbirds":
            settings = {"root": waterbirds, "size": 24, "segmentations": waterbirds / "segmentations"}
        if name in ("bffhq", "bar"):
            settings = {"root": labelled_names, "size": 24} | ({"conflicting": "1pct"} if name == "bar" else {})
        if name == "chest-x-ray":
            settings = {"root": x_rays, "size": 24, "masks": x_rays / "masks"}
        if name == "pascal-voc":
            settings = {"root": voc, "size": 24}
        if name == "sun397":
            settings = {"root": sun397, "size": 24, "valid": 3}
        if name == "folder-with-accessories":
            settings = {**in_tree(stanford_dogs, tmp_path_factory.mktemp("tree")), "size": 24}
        if name == "masked-pixels":
            ranks, cells = tmp_path_factory.mktemp("ranks"), BENCHMARKS["cells"](**SMALL)
            write_ranks(indifferent, cells, cells.split_names(), ranks, told={})
            settings = {"benchmark": cells, "ranks": ranks, "fraction": 0.3}
        yield lambda: BENCHMARKS[name](**settings)


def in_tree(dogs: Path, root: Path) -> dict[str, Any]:
    """The same dogs as a tree of folders."""
    lines = ["img_filename,x,y,scale"]
    for split, numbers in (("train", range(8)), ("valid", range(5)), ("test", range(8, 13))):
        for breed in sorted((dogs / "Images").iterdir())[1:]:
            (root / split / breed.name).mkdir(parents=True)
            for number in numbers:
                file = f"{split}/{breed.name}/{number}.jpg"
                shutil.copy(breed / f"{breed.name.partition('-')[0]}_{number}.jpg", root / file)
                lines.append(f"{file},30,15,12")
    ties = ["bow-tie.png", "necktie.png"]
    for tie in ties:
        shutil.copy(dogs / tie, root / tie)
    (root / "marks.csv").write_text("\n".join(lines) + "\n")
    return {"root": root, "accessories": ties}


@pytest.fixture(scope="module")
def benchmark(make: Callable[[], Benchmark]) -> Benchmark:
    return make()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Batch)]
    return all(equal(x, y) for x, y in pairs)


def equal(a: object, b: object) -> bool:
    if isinstance(a, Boxes) and isinstance(b, Boxes):
        return all(torch.equal(x, y) for x, y in zip(a.corners + a.classes, b.corners + b.classes, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b


def test_goes_by_the_name_of_its_registry(name, benchmark):
    assert benchmark.name == name


def test_has_the_splits_that_training_and_judging_need(name, benchmark):
    names = benchmark.split_names()
    assert {*TRAINING_SPLITS, *TESTS.get(name, TEST_SPLITS)} <= set(names)
    assert all(len(benchmark.split(split)) > 0 for split in names)


def test_refuses_a_split_that_it_lacks_with_the_nearest_name(benchmark):
    with pytest.raises(UserError, match="did you mean 'train'"):
        benchmark.split("trian")


def test_batches_are_well_formed(benchmark):
    spec = benchmark.input
    for name in benchmark.split_names():
        split = benchmark.split(name)
        index = torch.tensor([len(split) - 1, 0, 1])
        batch = split.batch(index, seeded(0))
        assert batch.input.shape == (3, spec.channels, spec.height, spec.width)
        assert batch.input.dtype == torch.float32
        assert batch.input.min() >= 0 and batch.input.max() <= 1
        assert batch.input.amax() > batch.input.amin()
        assert torch.equal(batch.index, index)
        assert torch.equal(batch.label, split.label[index])
        assert split.label.min() >= 0 and split.label.max() < len(benchmark.classes)


def test_gives_what_it_says_and_nothing_else(benchmark):
    for name in benchmark.split_names():
        split = benchmark.split(name)
        batch = split.batch(torch.arange(4))
        given = {field for field in ("bias", "mask", "boxes", "clean") if getattr(batch, field) is not None}
        assert given == benchmark.gives
        if "bias" in given:
            assert torch.equal(batch.bias, split.bias[:4])
            assert split.bias.min() >= 0 and split.bias.max() < len(benchmark.biases)
        if "mask" in given:
            assert batch.mask.shape == (4, len(benchmark.mask_names), *batch.input.shape[2:])
            assert batch.mask.min() >= 0 and batch.mask.max() <= 1
        if "clean" in given:
            assert batch.clean.shape == batch.input.shape
            assert batch.clean.min() >= 0 and batch.clean.max() <= 1


def test_is_the_same_when_made_again(make, benchmark):
    again = make()
    for split in benchmark.split_names():
        index = torch.arange(min(50, len(benchmark.split(split))))
        first, second = benchmark.split(split), again.split(split)
        assert torch.equal(first.label, second.label)
        assert same(first.batch(index), second.batch(index))
        assert same(first.batch(index, seeded(3)), second.batch(index, seeded(3)))


def test_only_training_depends_on_the_generator(benchmark):
    for name in set(benchmark.split_names()) - {"train"}:
        split = benchmark.split(name)
        assert same(split.batch(torch.arange(8), seeded(0)), split.batch(torch.arange(8), seeded(1)))


def test_a_batch_is_its_samples_one_by_one(benchmark):
    split = benchmark.split("valid")
    together = split.batch(torch.arange(5))
    for i in range(5):
        alone = split.batch(torch.tensor([i]))
        assert torch.equal(alone.input[0], together.input[i])
        assert torch.equal(alone.label[0], together.label[i])


def test_says_what_its_tests_ask(benchmark):
    assert set(benchmark.asks) <= set(TEST_SPLITS)
    assert all(text[0].isupper() and text.endswith(".") for text in benchmark.asks.values())
    assert benchmark.shortcut is not None or not benchmark.biases, "a known bias is a shortcut"


def test_record_is_json(benchmark):
    record = benchmark.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
