"""Drawn cells: exact shapes, a truth of three bands, the same at every size."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from hansfree.benchmarks import CellImages
from hansfree.benchmarks.cells import CATEGORIES, CLASSES, FINE, LEAST, NOTHING, REACH, TAILS, Cells, draw, shares
from hansfree.core import Explainer, Explanation
from hansfree.errors import UserError
from hansfree.explainers import InputGradient
from hansfree.measuring import of_maps


def plain(kind, **changes):
    """One object of each of ``kind``: round, upright, in the middle, without a wobble."""
    n = len(kind)
    given = {
        "kind": torch.tensor(kind), "centre": torch.full((n, 2), 0.5), "radius": torch.full((n,), 3 / 16),
        "thickness": torch.full((n,), 1 / 16), "stretch": torch.ones(n), "turn": torch.zeros(n),
        "wobble": torch.zeros(n), "border": torch.ones(n, 3), "inside": torch.full((n, 3), 0.5),
        "seed": torch.arange(n),
    }  # fmt: skip
    return Cells(**{**given, **changes})


def area(part):
    return part.double().mean((1, 2)).tolist()


@pytest.fixture(scope="module")
def cells():
    return CellImages(size=40, train=60, valid=10, test=20)


def test_areas_are_those_of_geometry():
    parts = shares(plain([0, 1, 2, 3, 6, 7, 8, 9]), 128)
    masks = parts.masks(torch.tensor([0, 1, 2, 3, 6, 7, 8, 9]))
    r, t = 3 / 16, 1 / 16
    disc, ring = math.pi * r**2, math.pi * (r**2 - (r - t) ** 2)
    bar = t * math.sqrt((r - t) ** 2 - t**2 / 4) + 2 * (r - t) ** 2 * math.asin(t / 2 / (r - t))
    square, frame = 4 * r**2, 4 * (r**2 - (r - t) ** 2)
    tail = t * ((REACH - 1) * r)
    features = [ring, bar, 2 * bar - t**2, frame, *(count * tail for count in TAILS), 0]
    assert area(masks[:, 1]) == pytest.approx(features, abs=0.0015)
    bodies = [disc] * 3 + [square] + [disc + count * tail for count in TAILS] + [0]
    assert area(masks[:, 0]) == pytest.approx(bodies, abs=0.0015)


def test_stretch_and_turn_and_place():
    stretched = plain([0, 0], stretch=torch.tensor([0.5, 0.5]), turn=torch.tensor([0.0, math.pi / 2]))
    lying, standing = shares(stretched, 64).masks(stretched.kind)[:, 0]
    assert torch.allclose(lying.T, standing) and lying.any(1).sum() < lying.any(0).sum()
    assert lying.mean().item() == pytest.approx(math.pi * (3 / 16) ** 2 / 2, abs=0.002)
    moved = shares(plain([0], centre=torch.tensor([[0.75, 0.25]])), 64).masks(torch.tensor([0]))[0, 0]
    rows, columns = moved.sum(1), moved.sum(0)
    place = (torch.arange(64) + 0.5) / 64
    assert ((place @ columns) / columns.sum()).item() == pytest.approx(0.75, abs=0.01)
    assert ((place @ rows) / rows.sum()).item() == pytest.approx(0.25, abs=0.01)


def test_bands_are_nested_and_every_feature_is_in_sight(cells):
    split = cells.split("train")
    batch = split.batch(torch.arange(60))
    objects, feature = batch.mask.unbind(1)
    assert ((objects - feature) >= 0).all() and objects.max() <= 1
    steps = objects * FINE**2
    assert torch.equal(steps, steps.round())
    empty = batch.label == NOTHING
    assert not objects[empty].any() and (feature[~empty].mean((1, 2)) > LEAST / 2).all()
    whole = (objects == 1)[:, None]
    border = batch.label // 3 == 1
    own = torch.arange(3) == (batch.label - 3)[:, None]
    painted = batch.images[border] * (feature[border] == 1)[:, None]
    assert torch.equal(painted.sum((2, 3)).argmax(1), own[border].int().argmax(1))
    assert (batch.images * whole)[~empty].amax((1, 2, 3)).min() > 0.1


def test_the_same_objects_at_every_size():
    small, large = (CellImages(size=size, train=20, valid=10, test=10).split("train") for size in (32, 64))
    a, b = (split.batch(torch.arange(20)) for split in (small, large))
    assert (a.mask - F.avg_pool2d(b.mask, 2)).abs().mean() < 0.01
    assert (a.images - F.avg_pool2d(b.images, 2)).abs().mean() < 0.02


def test_backgrounds_are_tiers_and_tell_nothing_of_the_class():
    split = CellImages(size=16, train=8, valid=8, test=600).split("iid")
    assert sum(len(index) for index in split.tiers.values()) == 600
    for index in split.tiers.values():
        share = split.label[index].bincount(minlength=10) / len(index)
        assert len(index) / 600 == pytest.approx(1 / 3, abs=0.08) and (share - 0.1).abs().max() < 0.06
    dark = split.batch(split.tiers["dark"][:20])
    assert not (dark.images * (dark.mask[:, :1] == 0)).any()
    for name, low, high in (("blotches", 0.2, 0.7), ("rings", 0.0, 0.5)):
        batch = split.batch(split.tiers[name][:20])
        behind = batch.images[(batch.mask[:, :1] == 0).expand_as(batch.images)]
        assert low <= behind.min() and behind.max() <= high and behind.std() > 0.05


def test_seeds_and_splits_differ_and_a_seed_repeats():
    kind = torch.arange(20) % 10
    one, again, other = (draw(kind, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.centre, again.centre) and not torch.equal(one.centre, other.centre)
    first, second = (CellImages(size=16, train=10, valid=10, test=10, split_seed=seed) for seed in (0, 1))
    places = [b.split(name).cells.centre for b in (first, second) for name in ("train", "valid", "iid")]
    assert len({tuple(place[0].tolist()) for place in places}) == 6


def test_the_hierarchy_names_its_classes(cells):
    assert set(CATEGORIES) == set(CLASSES) - {"nothing"} and cells.categories == CATEGORIES
    assert cells.record()["splits"]["iid"]["size"] == 20


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match=r"benchmark\.size is 8"):
        CellImages(size=8)
    with pytest.raises(UserError, match=r"benchmark\.train is 3"):
        CellImages(train=3)


def test_maps_of_cells_are_measured_against_three_bands(cells):
    """Planted: an explainer that shows the truth, for a model that knows it."""

    @dataclass(frozen=True)
    class Knowing(Explainer):
        def __call__(self, model, input, target, *, draws=None):
            masks = split.batch(torch.arange(20)).mask
            shown = 0.4 * (masks[:, :1] > 0.5) + 0.5 * (masks[:, 1:] > 0.5)
            return Explanation(torch.zeros(len(input), 10), shown)

    split = cells.split("iid")
    settings = {"measured_with": "truth", "samples": 20, "shifts": 0, "batch_size": 20, "device": "cpu"}
    found = of_maps(torch.nn.Identity(), None, split, "iid", Knowing(), mask_names=cells.mask_names, **settings)
    values = {m.metric: m.value for m in found}
    perfect = ("five_band_hard_accuracy", "five_band_best_recall_corrected", "object_auroc", "feature_auprc")
    assert [values[name] for name in perfect] == pytest.approx([1] * 4)
    assert values["five_band_hard_recall"] == pytest.approx(0.9, abs=1e-4)  # two of twenty show nothing
    assert values["five_band_hard_recall_objects"] == pytest.approx(1, abs=1e-4)
    without = of_maps(torch.nn.Identity(), None, split, "iid", Knowing(), **settings)
    assert not any(m.metric.startswith(("five_band", "object_", "feature_")) for m in without)


def test_sizes_of_gradients():
    torch.manual_seed(0)
    network, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), torch.rand(2, 3, 2, 2)
    signed, sizes = (InputGradient(absolute=a)(network, x, torch.tensor([0, 1])).map for a in (False, True))
    assert torch.equal(sizes, signed.abs()) and (signed < 0).any()
