"""PASCAL VOC in its own layout: labels, boxes, splits, and a run from a folder to tables."""

import shutil

import pytest
import torch

from hansfree.augmentation import Augmentation
from hansfree.benchmarks.pascal_voc import CLASSES, PascalVOC
from hansfree.benchmarks.regimes import augmented
from hansfree.errors import UserError
from hansfree.experiment import built, check
from hansfree.metrics.localisation import box_mask
from hansfree.parts import RunConfig


def test_labels_name_every_class_that_has_a_box(voc):
    benchmark = PascalVOC(root=voc, size=32)
    for name in benchmark.split_names():
        split = benchmark.split(name)
        batch = split.batch(torch.arange(len(split)))
        for label, classes in zip(batch.label, batch.boxes.classes):
            assert label.nonzero()[:, 0].tolist() == sorted(set(classes.tolist())) != []


@pytest.mark.parametrize("size", [32, 40])
def test_boxes_lie_where_the_objects_are(voc, size):
    """Objects of the fixture are bright on black: their boxes hold what is bright, and little else."""
    batch = PascalVOC(root=voc, size=size).split("train").batch(torch.arange(6))
    bright = (batch.images.amax(1) > 0.5).float()
    whole = torch.zeros_like(bright)
    for k in range(len(CLASSES)):
        whole = torch.maximum(whole, box_mask(batch.boxes, torch.full((6,), k), (size, size)))
    assert (bright * whole).sum() / bright.sum() > 0.95
    assert (bright * whole).sum() / whole.sum() > 0.85


def test_ends_of_a_box_are_counted_from_one_and_belong_to_it(voc):
    split = PascalVOC(root=voc / "VOCdevkit", size=40).split("train")
    corners = split.batch(torch.tensor([0])).boxes.corners[0][0]
    torch.testing.assert_close(corners, torch.tensor([4 / 50 * 40, 5 / 40 * 40, 24 / 50 * 40, 25 / 40 * 40]))


def test_of_2012_a_tenth_of_training_is_for_validation_and_val_is_the_test(voc):
    benchmark = PascalVOC(root=voc, year=2012, size=24)
    names = {name: [one.image.stem for one in benchmark.split(name).scenes] for name in benchmark.split_names()}
    listed = (voc / "VOCdevkit/VOC2012/ImageSets/Main/train.txt").read_text().split()
    assert names["valid"] == listed[::10] and sorted(names["train"] + names["valid"]) == sorted(listed)
    assert names["iid"] == (voc / "VOCdevkit/VOC2012/ImageSets/Main/val.txt").read_text().split()


def test_a_cache_changes_nothing(voc):
    kept, read = (PascalVOC(root=voc, size=24, cache=cache).split("iid") for cache in (True, False))
    for _ in range(2):
        assert torch.equal(kept.batch(torch.arange(3)).images, read.batch(torch.arange(3)).images)


def test_boxes_are_mirrored_with_their_images(voc):
    benchmark = PascalVOC(root=voc, size=32)
    split = augmented(benchmark, Augmentation(flip=1.0)).split("train")
    before = benchmark.split("train").batch(torch.arange(4))
    after = split.batch(torch.arange(4), torch.Generator().manual_seed(0))
    for ours, theirs in zip(before.boxes.corners, after.boxes.corners):
        torch.testing.assert_close(theirs[:, [0, 2]], 32 - ours[:, [2, 0]])
    torch.testing.assert_close(after.images, before.images.flip(3))


def settings(root, method="erm", **changes):
    sections = {"benchmark": {"name": "pascal-voc", "root": str(root), "size": 24}, "method": {"name": method}}
    model = {"name": "small-cnn", "widths": [4, 6]}
    return RunConfig(**{**sections, "model": model, "training": {"steps": 2, "batch_size": 4}, **changes})


def test_a_config_is_tried_out_with_maps_and_pictures(voc):
    explainer = {"name": "gradient-x-input"}
    evaluation = {"explainer": explainer, "heatmaps": 2, "measure": {"explainers": [explainer]}}
    guided = settings(voc, "model-guidance", explainer=explainer, selection="epg_val", evaluation=evaluation)
    told = check(guided)
    assert told["needs"] == "mask-or-boxes" and told["selection"] == "epg_val"


def test_what_makes_no_sense_here_is_refused_in_one_sentence(voc):
    for change, said in (
        ({"method": {"name": "label-smoothing"}}, "one class per image"),
        ({"selection": "worst_group_val"}, "bias labels in validation"),
        ({"selection": "epg_val"}, "explainer"),
        ({"shots": 2}, "name several"),
    ):
        with pytest.raises(UserError, match=said) as error:
            built(settings(voc, **change))
        assert "\n" not in str(error.value)


def test_folders_that_are_not_whole_are_named(voc, tmp_path):
    with pytest.raises(UserError, match="VOCdevkit"):
        PascalVOC(root=tmp_path)
    copy = tmp_path / "VOCdevkit"
    shutil.copytree(voc / "VOCdevkit", copy)
    first = (copy / "VOC2007/ImageSets/Main/train.txt").read_text().split()[0]
    annotation = copy / "VOC2007" / "Annotations" / f"{first}.xml"
    text = annotation.read_text()
    for bad, said in (
        (text.replace("xmin", "x"), "xmin"),
        (text[:50], "annotation"),
        (text.replace("<name>", "<name>no "), "annotation"),
    ):
        annotation.write_text(bad)
        with pytest.raises(UserError, match=f"{first}.xml.*{said}"):
            PascalVOC(root=copy)
    annotation.write_text(text)
    (copy / "VOC2007" / "JPEGImages" / f"{first}.jpg").unlink()
    with pytest.raises(UserError, match="missing"):
        PascalVOC(root=copy)
    (copy / "VOC2007/ImageSets/Main/test.txt").unlink()
    with pytest.raises(UserError, match=r"test\.txt"):
        PascalVOC(root=copy)
    with pytest.raises(UserError, match="2007 or 2012"):
        PascalVOC(root=copy, year=2010)
