"""Several cut-outs in one image: labels, masks and boxes say the same, pixel by pixel, and splits share no picture."""

import json

import pytest
import torch

from hansfree.benchmarks import ManyObjects
from hansfree.benchmarks.many_objects import CLASSES, OOD_KINDS, OWN_KINDS, animals_of
from hansfree.data import making
from hansfree.errors import UserError

SMALL = {"size": 24, "train": 48, "valid": 24, "test": 48}


@pytest.fixture(autouse=True)
def _installed(photographs, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))


def whole(split):
    return split.batch(torch.arange(len(split)))


def shown(split, i):
    """Colours times alpha, and alpha, of each animal of image i, from the back to the front."""
    views = [split.objects.pixels[i * 3 + turn].double() / 255 for turn in range(3) if split.there[i, turn]]
    return [(view[:3], view[3]) for view in views]


def test_an_image_is_its_scene_with_one_animal_after_another_pasted_on():
    split = ManyObjects(**SMALL).split("iid")
    batch = whole(split)
    for i in range(0, 48, 5):
        picture = split.scenes.pixels[i].double() / 255
        clean = split.scenes.pixels[split.twin[i]].double() / 255
        for paint, alpha in shown(split, i):
            picture, clean = paint + (1 - alpha) * picture, paint + (1 - alpha) * clean
        torch.testing.assert_close(batch.images[i].double(), picture, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.clean[i].double(), clean, atol=1e-5, rtol=0)


def test_a_mask_is_what_would_change_if_the_animals_of_a_class_were_white():
    split = ManyObjects(**SMALL).split("shift")
    batch = whole(split)
    for i in range(0, 48, 5):
        own = split.classes[i][split.there[i]].tolist()
        for k in range(len(CLASSES)):
            white = torch.zeros(24, 24, dtype=torch.double)
            for (_, alpha), kind in zip(shown(split, i), own):
                white = alpha * (kind == k) + (1 - alpha) * white
            torch.testing.assert_close(batch.mask[i, k + 1].double(), white, atol=1e-5, rtol=0)
            assert bool(batch.label[i, k]) == (k in own)
    torch.testing.assert_close(batch.mask[:, 0], batch.mask[:, 1:].sum(1).clamp(max=1))


def test_images_show_one_two_or_three_animals_of_all_classes_equally_often():
    split = ManyObjects(**{**SMALL, "train": 240}).split("train")
    assert split.there.sum(1).bincount().tolist() == [0, 80, 80, 80]
    assert split.classes[:, 0].bincount().tolist() == [60] * 4
    assert (split.label.sum(1) >= 1).all() and split.label.sum(0).min() > 240 / 4


def test_boxes_hold_what_is_seen_and_no_row_more():
    masks, boxes = (whole(ManyObjects(**SMALL, places=kind).split("iid")) for kind in ("masks", "boxes"))
    assert boxes.mask is None and masks.boxes is None and torch.equal(masks.images, boxes.images)
    split = ManyObjects(**SMALL).split("iid")
    for i in range(48):
        assert len(boxes.boxes.corners[i]) <= split.there[i].sum()
        animals, seen = shown(split, i), []
        for turn, (_, alpha) in enumerate(animals):
            free = [1 - front for _, front in animals[turn + 1 :]]
            seen.append(alpha * torch.stack([torch.ones_like(alpha), *free]).prod(0) > 0.5)
        expected = []
        for solid in (solid for solid in seen if solid.any()):
            y, x = solid.nonzero().T
            expected.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
        torch.testing.assert_close(boxes.boxes.corners[i], torch.tensor(expected).float())


def test_every_animal_stays_in_its_image_and_most_of_it_is_seen():
    split = ManyObjects(**{**SMALL, "test": 240}).split("iid")
    batch = whole(split)
    for k in range(len(CLASSES)):
        there = batch.label[:, k] > 0
        assert (batch.mask[there, k + 1].sum((1, 2)) > 8).all()


def test_scenes_tell_of_the_first_animal_as_often_as_asked_and_never_under_shift():
    always = ManyObjects(**SMALL, bias_ratio=1)
    for name in ("train", "valid", "iid"):
        assert torch.equal(always.split(name).kind, always.split(name).classes[:, 0])
    never = ManyObjects(**{**SMALL, "train": 400}, bias_ratio=0).split("train")
    assert 0.15 < (never.kind == never.classes[:, 0]).float().mean() < 0.35
    shift, ood = always.split("shift"), always.split("ood")
    assert not shift.label[torch.arange(48), shift.kind].any()
    assert set(ood.kind.tolist()) == {4, 5} and len((*OWN_KINDS, *OOD_KINDS)) == 6
    assert shift.objects is ood.objects is always.split("iid").objects


@pytest.mark.parametrize("seed", range(8))
def test_no_animal_and_no_scene_is_in_two_parts(seed):
    record = ManyObjects(**SMALL, split_seed=seed).record()
    for what in ("animals", "scenes"):
        parts = {part: {name for own in names for name in own} for part, names in record[what].items()}
        assert all(all(own) for own in record[what].values())
        assert not (parts["train"] & parts["valid"] or parts["train"] & parts["test"] or parts["valid"] & parts["test"])


def test_classes_share_no_animal_and_the_record_tells_seeds_apart():
    found = [animal.name for name in CLASSES for animal in animals_of(name)]
    assert len(found) == len(set(found)) == 55
    prints = [json.dumps(ManyObjects(**SMALL, split_seed=seed).record()["splits"]) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_table_has_no_room_for_several_labels(tmp_path):
    with pytest.raises(UserError, match="several classes"):
        making.make(ManyObjects(**SMALL), tmp_path / "out")


@pytest.mark.parametrize(("setting", "said"), [({"places": "mask"}, "places"), ({"bias_ratio": 2}, "bias_ratio")])
def test_mistakes_are_told_by_their_key(setting, said):
    with pytest.raises(UserError, match=said):
        ManyObjects(**{**SMALL, **setting})
