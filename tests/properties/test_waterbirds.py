"""Waterbirds in the layouts of group_DRO, WILDS and GALS: which birds fall where, masks, bad input."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hansfree.benchmarks.waterbirds import Waterbirds
from hansfree.errors import UserError

NAME = "waterbird_complete95_forest2water2"
ALIGNED, CONFLICTING = [(0, 0), (1, 1)], [(0, 1), (1, 0)]


def groups(split):
    return Counter(zip(split.label.tolist(), split.bias.tolist()))


@pytest.fixture
def copied(waterbirds, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(waterbirds, tmp_path / "above")
    return tmp_path / "above"


def edited(root, old, new):
    table = root / NAME / "metadata.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))


def test_the_official_set_keeps_its_splits_and_divides_its_test(waterbirds):
    benchmark = Waterbirds(root=waterbirds / NAME, size=24)
    counted = {name: groups(benchmark.split(name)) for name in benchmark.split_names()}
    all_pairs = [*ALIGNED, *CONFLICTING]
    assert counted == {
        "train": {**dict.fromkeys(ALIGNED, 9), **dict.fromkeys(CONFLICTING, 1)},
        "valid": dict.fromkeys(all_pairs, 2),
        "valid_ood": dict.fromkeys(all_pairs, 2),
        "iid": dict.fromkeys(ALIGNED, 4),
        "ood": dict.fromkeys(all_pairs, 4),
        "shift": dict.fromkeys(CONFLICTING, 4),
    }
    assert (benchmark.classes, benchmark.biases) == (("landbird", "waterbird"), ("land", "water"))
    assert benchmark.gives == {"bias"} and benchmark.mask_names == ()
    rows = {name: {row.image for row in benchmark.split(name).rows} for name in benchmark.split_names()}
    assert rows["iid"] | rows["shift"] == rows["ood"]
    assert not rows["ood"] & (rows["train"] | rows["valid"])


def test_without_conflicting_birds_validation_has_none_either_but_valid_ood_has(waterbirds):
    whole, pure = (Waterbirds(root=waterbirds, size=24, conflicting=kept) for kept in (True, False))
    assert groups(pure.split("train")) == dict.fromkeys(ALIGNED, 9)
    assert groups(pure.split("valid")) == dict.fromkeys(ALIGNED, 2)
    for name in ("valid_ood", "iid", "ood", "shift"):
        assert pure.split(name).rows == whole.split(name).rows
    assert pure.record()["splits"]["train"]["groups"] == {"y:0,a:0": 9, "y:1,a:1": 9}


@pytest.mark.parametrize("name", ["waterbirds_v1.0", "waterbird_1.0_forest2water2", NAME])
def test_each_layout_is_found_below_its_root_and_is_the_same(waterbirds, tmp_path, name):
    shutil.copytree(waterbirds / NAME, tmp_path / name)
    if name == "waterbirds_v1.0":
        (tmp_path / name / "RELEASE_v1.0.txt").touch()
    found = Waterbirds(root=tmp_path, size=24).record()["splits"]
    assert found == Waterbirds(root=waterbirds / NAME, size=24).record()["splits"]


def test_masks_are_cub_s(waterbirds):
    benchmark = Waterbirds(root=waterbirds, size=24, segmentations=waterbirds / "segmentations")
    split = benchmark.split("shift")
    batch = split.batch(torch.tensor([3]))
    image = split.rows[3].image
    mask = waterbirds / "segmentations" / image.parent.name / f"{image.stem}.png"
    for path, found in ((image, batch.input[0].permute(1, 2, 0)), (mask, batch.mask[0, 0])):
        expected = np.asarray(Image.open(path).resize((24, 24), Image.Resampling.BILINEAR)) / 255
        assert np.abs(found.numpy() - expected).max() < 1e-6
    assert benchmark.gives == {"bias", "mask"} and benchmark.mask_names == ("bird",)
    assert benchmark.record()["splits"]["train"]["sha256"]


def test_only_masks_that_are_asked_for_are_given(copied):
    table = copied / NAME / "metadata.csv"
    head, *lines = table.read_text().splitlines()
    told = [f"{line},{line.split(',')[1]}" for line in lines]
    table.write_text("\n".join([f"{head},mask_filename", *told]))
    assert Waterbirds(root=copied, size=24).split("train").batch(torch.arange(2)).mask is None


def without_images(root):
    shutil.rmtree(root / NAME / "001.Black_footed_Albatross")


BAD = {
    "holds no metadata.csv; set benchmark.root to the folder of one": lambda root: (
        root / NAME / "metadata.csv"
    ).unlink(),
    "holds several sets": lambda root: shutil.copytree(root / NAME, root / "waterbirds_v1.0"),
    "which is missing": without_images,
    "names ../secret.jpg, which is outside of the folder": lambda root: edited(
        root, "014.Indigo_Bunting/Indigo_Bunting_0001.jpg", "../secret.jpg"
    ),
    "has the class '2'; known: landbird, waterbird": lambda root: edited(root, "_0001.jpg,0,", "_0001.jpg,2,"),
    "must have the places 0 (land) and 1 (water), not 0, 1, 2": lambda root: edited(
        root, "_0001.jpg,0,0,0", "_0001.jpg,0,0,2"
    ),
    "lacks the column 'y'": lambda root: edited(root, "img_filename,y,", "img_filename,label,"),
    "Waterbirds' iid lacks a class": lambda root: edited(root, ",2,0,/b", ",2,1,/b"),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_folders_are_told_in_one_sentence(copied, said):
    BAD[said](copied)
    with pytest.raises(UserError) as error:
        Waterbirds(root=copied, size=24)
    assert said in str(error.value)


def test_no_places_at_all_are_told(copied):
    table = copied / NAME / "metadata.csv"
    lines = [line.rsplit(",", 2)[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"must have the places 0 \(land\) and 1 \(water\), not none"):
        Waterbirds(root=copied)


def test_missing_and_misfitting_masks_and_cut_images_are_told(copied):
    folder = copied / "segmentations" / "014.Indigo_Bunting"
    Image.new("L", (9, 9)).save(folder / "Indigo_Bunting_0001.png")
    benchmark = Waterbirds(root=copied, size=24, segmentations=copied / "segmentations")
    with pytest.raises(UserError, match=r"0001\.png has 9 x 9 pixels but .*0001\.jpg has 16 x 21"):
        benchmark.split("train").batch(torch.tensor([0]))
    image = copied / NAME / "014.Indigo_Bunting/Indigo_Bunting_0002.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(UserError, match=r"0002\.jpg is damaged or cut short"):
        benchmark.split("train").batch(torch.tensor([1]))
    (folder / "Indigo_Bunting_0003.png").unlink()
    with pytest.raises(UserError, match=r"0003\.png is missing, the mask of .*; unpack segmentations\.tgz"):
        Waterbirds(root=copied, size=24, segmentations=copied / "segmentations")


def test_a_size_of_nothing_is_refused(waterbirds):
    with pytest.raises(UserError, match=r"benchmark\.size is 0"):
        Waterbirds(root=waterbirds, size=0)
