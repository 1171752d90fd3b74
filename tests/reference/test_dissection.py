"""Network dissection against slow loops, NumPy's quantiles and scikit-image, and on planted units."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2lab
from skimage.transform import resize

from hansfree.benchmarks.colour_names import COLOURS, colour_of, lab
from hansfree.errors import UserError
from hansfree.metrics.dissection import (
    Counts,
    Thresholds,
    detectors,
    exclusive_detectors,
    iou,
    keep_top,
    labels,
    ordered,
    restored,
    tally,
    unique_detectors,
    widths,
)

floats = st.floats(width=32, allow_nan=False)


@given(st.lists(floats, min_size=2, max_size=20))
def test_places_of_values_are_in_their_order(values):
    single = torch.tensor(values, dtype=torch.float32)
    order = ordered(single)
    assert torch.equal(restored(order), single)
    assert torch.equal(order[:, None] < order, single[:, None] < single)
    assert (order >= 0).all() and (order < 2**32).all()


def found_thresholds(values, quantiles, memory=1 << 20, parts=3):
    found = Thresholds(len(values), quantiles, widths(len(values) * len(quantiles), memory))
    while not found.done:
        for part in values.chunk(parts, dim=1):
            found.add(part)
        found.finish()
    return found.values


@settings(max_examples=40)
@given(
    st.lists(st.tuples(floats, floats), min_size=1, max_size=40),
    st.lists(st.sampled_from([0.001, 0.005, 0.1, 0.29, 0.5, 0.9]), min_size=1, max_size=3, unique=True),
    st.sampled_from([1 << 6, 1 << 12, 1 << 20]),
)
def test_thresholds_are_numpys_quantiles_however_little_memory(pairs, quantiles, memory):
    values = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    found = found_thresholds(values, quantiles, max(memory, 8 * 4 * 2 * len(quantiles)))
    for row, quantile in zip(found, quantiles):
        descending = values.sort(1, descending=True).values
        assert torch.equal(row, descending[:, math.floor(quantile * len(pairs) + 1e-9)])
        assert ((values > row[:, None]).float().mean(1) <= quantile + 1e-6).all()


def test_thresholds_of_many_values_are_numpys():
    values = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)).relu()
    found = found_thresholds(values, [0.005, 0.02])
    for row, quantile in zip(found, (0.005, 0.02)):
        expected = np.quantile(values.numpy(), 1 - quantile - 1e-9, axis=1, method="inverted_cdf")
        np.testing.assert_array_equal(row.numpy(), expected)


def test_as_few_passes_as_memory_allows():
    assert widths(512, 1 << 28) == (16, 16)
    assert widths(5120, 1 << 28) == (11, 11, 10)
    assert all(sum(widths(rows, 1 << 20)) == 32 for rows in (1, 7, 100, 1000, 10_000))
    with pytest.raises(UserError, match="do not hold the counts of 100 thresholds"):
        widths(100, 1000)


def test_what_is_no_number_or_no_quantile_is_refused():
    with pytest.raises(UserError, match="NaN"):
        ordered(torch.tensor([1.0, torch.nan]))
    with pytest.raises(UserError, match=r"quantile 1\.5"):
        Thresholds(2, [1.5], (16, 16))


# Counts and IoU


def random_case(seed, samples=5, units=4, concepts=6, categories=3, size=(9, 8), cells=(3, 4)):
    generator = torch.Generator().manual_seed(seed)
    category = torch.arange(concepts) % categories
    annotated = torch.rand(samples, categories, generator=generator) < 0.7
    mask = torch.rand(samples, concepts, *size, generator=generator) < 0.3
    mask &= annotated[:, category, None, None]
    mask &= (torch.rand(samples, concepts, generator=generator) < 0.6)[..., None, None]
    maps = torch.randn(samples, units, *cells, generator=generator)
    thresholds = torch.stack([maps.movedim(1, 0).flatten(1).quantile(q, 1) for q in (0.8, 0.9)])
    return maps, thresholds, mask, annotated, category


def slow_iou(maps, threshold, mask, annotated, category, rule):
    """One unit and one concept at a time, as the definitions read; enlarged by scikit-image."""
    samples, units = maps.shape[:2]
    found = np.zeros((units, len(category)))
    for u in range(units):
        active = [
            resize(maps[i, u].numpy(), mask.shape[-2:], order=1, mode="edge", anti_aliasing=False) > threshold[u].item()
            for i in range(samples)
        ]
        for c, own in enumerate(category.tolist()):
            kin = [k for k, other in enumerate(category.tolist()) if other == own]
            both = area = of_concept = pixels = 0
            for i in range(samples):
                there = mask[i, c].numpy()
                of_concept += there.sum()
                both += (active[i] & there).sum()
                touches = any((active[i] & mask[i, k].numpy()).any() for k in kin)
                pixels += annotated[i, own].item() * there.size
                if touches if rule == "published" else annotated[i, own]:
                    area += active[i].sum()
            plain = both / (area + of_concept - both) if area + of_concept else 0
            if rule == "adjusted":
                expected = area * of_concept / pixels if pixels else 0
                chance = expected / (area + of_concept - expected) if area + of_concept else 0
                most = min(area, of_concept) / max(area, of_concept, 1)
                plain = (plain - chance) / (most - chance) if most > chance + 1e-12 else 0
            found[u, c] = plain
    return found


@pytest.mark.parametrize("rule", ["published", "defined", "adjusted"])
@pytest.mark.parametrize("seed", [0, 1])
def test_iou_is_that_of_a_slow_loop_and_counts_of_parts_add_up(rule, seed):
    maps, thresholds, mask, annotated, category = random_case(seed)
    counts = Counts.none(2, 4, 6, 3)
    for part in (slice(0, 2), slice(2, 5)):
        shown = mask[part].any(0).any(-1).any(-1).nonzero()[:, 0]
        counts += tally(maps[part], thresholds, shown, mask[part][:, shown], annotated[part], category)
    found = iou(counts, category, rule)
    for row, threshold in zip(found, thresholds):
        expected = slow_iou(maps, threshold, mask, annotated, category, rule)
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-12)
    assert found.abs().sum() > 0


def planted(generator, samples=60, size=24):
    """Units of noise but one, whose map is the mask of concept 1: a block of 3 x 3 in every third image."""
    mask = torch.zeros(samples, 3, size, size, dtype=torch.bool)
    for i in range(samples):
        y, x = torch.randint(0, size - 3, (2,), generator=generator).tolist()
        mask[i, i % 3, y : y + 3, x : x + 3] = True
    maps = torch.rand(samples, 8, size, size, generator=generator)
    maps[:, 5] = mask[:, 1].float()
    return maps, mask


@pytest.mark.parametrize("rule", ["published", "defined", "adjusted"])
def test_a_unit_that_is_a_concepts_mask_has_an_iou_of_one_and_noise_is_near_chance(rule):
    maps, mask = planted(torch.Generator().manual_seed(0))
    thresholds = found_thresholds(maps.movedim(1, 0).flatten(1), [0.01])
    category, annotated = torch.zeros(3, dtype=torch.long), torch.ones(60, 1, dtype=torch.bool)
    found = iou(tally(maps, thresholds, torch.arange(3), mask, annotated, category), category, rule)[0]
    assert found[5].tolist() == pytest.approx([0, 1, 0], abs=0.006)
    assert found[5, 1] == pytest.approx(1)
    noise = found[[0, 1, 2, 3, 4, 6, 7]]
    assert noise.abs().max() < 0.05
    if rule == "adjusted":
        assert abs(noise.mean().item()) < 0.01
    best, label = labels(found)
    assert best.argmax() == 5 and label[5] == 1
    assert detectors(found, category, 1, 0.5).tolist() == [1]


def test_a_large_concept_is_out_of_reach_of_the_published_iou_and_not_of_the_adjusted():
    mask = torch.zeros(8, 1, 20, 20, dtype=torch.bool)
    mask[:4] = True  # a scene: the whole of every second half of the images
    maps = torch.zeros(8, 1, 20, 20)
    maps[0, 0, 0, :16] = 1
    thresholds = found_thresholds(maps.movedim(1, 0).flatten(1), [0.005])
    category, annotated = torch.zeros(1, dtype=torch.long), torch.ones(8, 1, dtype=torch.bool)
    counts = tally(maps, thresholds, torch.arange(1), mask, annotated, category)
    assert iou(counts, category, "defined").item() == pytest.approx(16 / 1600)
    assert iou(counts, category, "adjusted").item() == pytest.approx(1)


def test_a_concept_that_is_everywhere_or_nowhere_has_no_adjusted_iou():
    mask = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    mask[:, 1] = False
    maps = torch.rand(2, 1, 4, 4)
    category, annotated = torch.zeros(2, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool)
    counts = tally(maps, torch.full((1, 1), 0.5), torch.arange(2), mask, annotated, category)
    assert iou(counts, category, "adjusted").flatten().tolist() == [0, 0]


def test_detectors_and_both_senses_of_unique():
    category = torch.tensor([0, 0, 1])
    found = torch.tensor([[0.2, 0.1, 0.0], [0.3, 0.0, 0.0], [0.0, 0.06, 0.05], [0.01, 0.02, 0.04], [0.0, 0.0, 0.05]])
    assert detectors(found, category, 2, 0.05).tolist() == [3, 1]
    assert unique_detectors(found, category, 2, 0.05).tolist() == [2, 1]
    assert exclusive_detectors(found, category, 2, 0.05).tolist() == [1, 1]
    assert detectors(found, category, 2, 0.5).tolist() == [0, 0]


def test_the_highest_are_kept_and_the_first_of_equals():
    kept = torch.full((2, 3), -torch.inf), torch.full((2, 3), -1)
    kept = keep_top(kept, torch.tensor([[1.0, 5.0], [2.0, 2.0]]), torch.tensor([0, 1]))
    kept = keep_top(kept, torch.tensor([[5.0, 3.0], [2.0, 2.0]]), torch.tensor([2, 3]))
    assert kept[0].tolist() == [[5, 5, 3], [2, 2, 2]]
    assert kept[1].tolist() == [[1, 2, 3], [0, 1, 2]]


# Colours


def test_lab_is_scikit_images():
    images = torch.rand(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[0, :, 0, 0] = 0.01
    expected = rgb2lab(images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(lab(images).permute(0, 2, 3, 1).numpy(), expected, atol=2e-3)


def test_colours_have_the_names_that_people_give_them():
    shown = {"black": (10, 12, 10), "white": (250, 250, 245), "red": (200, 20, 25), "green": (30, 120, 40),
             "blue": (30, 40, 220), "yellow": (240, 230, 40), "brown": (120, 70, 30), "grey": (120, 122, 125),
             "orange": (250, 150, 20), "pink": (250, 180, 195), "purple": (120, 20, 130)}  # fmt: skip
    images = torch.tensor(list(shown.values())).view(-1, 3, 1, 1) / 255
    assert [COLOURS[n] for n in colour_of(images).flatten().tolist()] == list(shown)
