"""Chest X-rays: patients in one split each, sources as the bias, masks, bad input."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hansfree.benchmarks.chest_x_ray import ChestXRay
from hansfree.errors import UserError


@pytest.fixture
def copied(x_rays, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(x_rays, tmp_path / "x-rays")
    return tmp_path / "x-rays"


def patient(row, root):
    """Class and patient of a row."""
    return row.image.relative_to(root).parts[1:3]


def test_splits_are_of_patients_and_sources_are_the_bias(x_rays):
    benchmark = ChestXRay(root=x_rays, size=24, valid=0.1, test=0.3)
    assert benchmark.split_names() == ("train", "valid", "iid", "ood")
    assert benchmark.classes == ("covid-19", "normal", "pneumonia")
    sizes = {name: Counter(benchmark.split(name).label.tolist()) for name in benchmark.split_names()}
    assert sizes == {
        "train": {0: 6, 1: 6, 2: 12},
        "valid": {0: 1, 1: 1, 2: 2},
        "iid": {0: 3, 1: 3, 2: 6},
        "ood": {0: 4, 1: 4, 2: 8},
    }
    internal = [benchmark.split(name) for name in ("train", "valid", "iid")]
    assert all(torch.equal(split.bias, split.label) for split in internal)
    assert {benchmark.biases[number] for number in benchmark.split("ood").bias.tolist()} == {"external"}
    patients = [{patient(row, x_rays) for row in split.rows} for split in internal]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 30
    assert benchmark.gives == {"bias"}


@pytest.mark.parametrize("seed", range(3))
def test_the_seed_draws_patients(x_rays, seed):
    first, again, other = (ChestXRay(root=x_rays, size=24, split_seed=s).split("iid") for s in (seed, seed, seed + 3))
    assert first.rows == again.rows
    assert first.rows != other.rows


def test_masks_are_those_of_the_same_name(x_rays):
    benchmark = ChestXRay(root=x_rays, masks=x_rays / "masks", size=20)
    split = benchmark.split("train")
    batch = split.batch(torch.tensor([0, len(split) - 1]))
    for place, number in enumerate((0, len(split) - 1)):
        image = split.rows[number].image
        mask = (x_rays / "masks" / image.relative_to(x_rays)).with_suffix(".png")
        for path, found in ((image, batch.input[place, 1]), (mask, batch.mask[place, 0])):
            expected = np.asarray(Image.open(path).resize((20, 20), Image.Resampling.BILINEAR)) / 255
            assert np.abs(found.numpy() - expected).max() < 1e-6
    assert benchmark.gives == {"bias", "mask"} and benchmark.mask_names == ("lungs",)


def test_x_rays_of_16_bits_are_read(copied):
    path = copied / "internal/normal/000.jpg"
    deep = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    path.unlink()
    Image.fromarray(deep).save(path.with_suffix(".png"))
    benchmark = ChestXRay(root=copied, size=20)
    splits = [benchmark.split(name) for name in ("train", "valid", "iid")]
    found = [
        split.batch(torch.tensor([number])).input[0, 0].numpy()
        for split in splits
        for number, row in enumerate(split.rows)
        if row.image == path.with_suffix(".png")
    ]
    assert len(found) == 1 and np.abs(found[0] - deep / 65535).max() < 1 / 255


BAD = {
    "internal is missing; put the images of each class into": lambda root: shutil.rmtree(root / "internal"),
    "external is missing": lambda root: shutil.rmtree(root / "external"),
    "external/normal holds no images": lambda root: shutil.rmtree(root / "external/normal"),
    "internal/flu holds no images": lambda root: shutil.copytree(root / "external/normal", root / "external/flu"),
    "internal has the classes covid-19; a classifier needs two or more": lambda root: [
        shutil.rmtree(root / "internal" / name) for name in ("normal", "pneumonia")
    ],
    "internal/normal has 2 patients, of whom none is left for train": lambda root: [
        (root / f"internal/normal/{number:03d}.jpg").unlink() for number in range(8)
    ],
    "masks/internal/normal/003.png is missing, the mask of internal/normal/003.jpg": lambda root: (
        root / "masks/internal/normal/003.png"
    ).unlink(),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_folders_are_told_in_one_sentence(copied, said):
    BAD[said](copied)
    with pytest.raises(UserError) as error:
        ChestXRay(root=copied, masks=copied / "masks", size=24)
    assert said in str(error.value)


def test_bad_images_and_misfitting_masks_are_told(copied):
    for folder in ("internal/covid-19", "masks/internal/normal"):
        for path in (copied / folder).iterdir():
            path.write_bytes(path.read_bytes()[:60])
    benchmark = ChestXRay(root=copied, masks=copied / "masks", size=24)
    with pytest.raises(UserError, match=r"covid-19/\d+\.jpg is (damaged or cut short|not an image)"):
        benchmark.split("train").batch(torch.tensor([0]))
    for path in (copied / "masks/internal/normal").iterdir():
        Image.new("L", (5, 5)).save(path)
    first_normal = int((benchmark.split("train").label == 1).nonzero()[0])
    with pytest.raises(UserError, match=r"has 5 x 5 pixels but .*normal/\d+\.jpg has 19 x"):
        benchmark.split("train").batch(torch.tensor([first_normal]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"size": 0}, "size is 0"), ({"valid": 1.5}, "valid"), ({"valid": 0.6, "test": 0.6}, "valid and test together")],
)
def test_settings_that_cannot_be_are_refused(x_rays, settings, said):
    with pytest.raises(UserError, match=said):
        ChestXRay(root=x_rays, **settings)
