"""Where each digit falls and which colour it gets, over many settings."""

import colorsys
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansfree.benchmarks import ColouredDigits
from hansfree.benchmarks.coloured_digits import (
    APART,
    PALETTES,
    PGI_COLOURS,
    drawn_palette,
    generator_for,
    hsv_to_rgb,
    hues_palette,
    pgi_palette,
    stratified_order,
)
from hansfree.errors import UserError

CLASSES = 10
seeds = st.integers(0, 2**31)
palettes = st.sampled_from(PALETTES)
conflicts = st.sampled_from(["unbiased-palette", "other-class"])
few = settings(max_examples=25)


def small(**options) -> ColouredDigits:
    return ColouredDigits(**{"limit": 400, **options})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits_of(benchmark: ColouredDigits, split: str) -> set[bytes]:
    return {grey.numpy().tobytes() for grey in benchmark.split(split).grey}


# Which digit falls where


def test_the_default_sizes():
    benchmark = ColouredDigits()
    sizes = {name: len(benchmark.split(name)) for name in benchmark.split_names()}
    assert sizes == {"train": 3500, "valid": 500, "valid_ood": 500, "iid": 1000, "ood": 1000, "shift": 1000}
    for name in sizes:
        assert len(set(benchmark.split(name).label.bincount().tolist())) == 1, "as many of each class"


@few
@given(seeds, st.integers(60, 900), st.integers(10, 20), st.floats(0.1, 0.5))
def test_train_valid_and_test_share_no_digit(seed, limit, valid, test):
    benchmark = ColouredDigits(split_seed=seed, limit=limit, valid=valid, test=test)
    parts = [digits_of(benchmark, name) for name in ("train", "valid", "iid")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == limit
    assert len(benchmark.split("valid")) == valid
    assert len(benchmark.split("iid")) == round(test * limit)


@few
@given(seeds, seeds, palettes)
def test_the_test_splits_are_the_same_digits_in_the_same_order(split_seed, colour_seed, palette):
    benchmark = small(split_seed=split_seed, colour_seed=colour_seed, palette=palette)
    iid, ood, shift = (benchmark.split(name) for name in ("iid", "ood", "shift"))
    for other in (ood, shift):
        assert torch.equal(iid.grey, other.grey)
        assert torch.equal(iid.label, other.label)
    assert torch.equal(benchmark.split("valid").grey, benchmark.split("valid_ood").grey)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), seeds)
def test_every_beginning_of_a_stratified_order_holds_the_classes_in_proportion(labels, seed):
    label = torch.tensor(labels)
    order = stratified_order(label, seeded(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    shares = label.bincount(minlength=5).double() / len(labels)
    classes = len(label.unique())
    for length in range(1, len(labels) + 1):
        counts = label[order[:length]].bincount(minlength=5)
        assert ((counts - shares * length).abs() <= (1 + classes * shares) / 2 + 1e-9).all()


def test_the_first_test_digits_hold_every_class():
    assert sorted(ColouredDigits().split("shift").label[:CLASSES].tolist()) == list(range(CLASSES))


def test_colours_do_not_move_digits_nor_the_size_of_valid_the_test_digits():
    benchmark = small()
    assert torch.equal(benchmark.split("train").grey, small(colour_seed=7, palette="lff").split("train").grey)
    assert torch.equal(benchmark.split("iid").grey, small(valid=3).split("iid").grey)
    assert not torch.equal(benchmark.split("iid").grey, small(split_seed=1).split("iid").grey)


# Which colour it gets


@few
@given(st.floats(0, 1), palettes, conflicts, seeds)
def test_the_share_of_aligned_samples_is_the_bias_ratio(ratio, palette, conflict, seed):
    benchmark = small(bias_ratio=ratio, palette=palette, conflict=conflict, colour_seed=seed)
    for name in ("train", "valid", "iid"):
        split = benchmark.split(name)
        aligned = split.bias == split.label
        assert int(aligned.sum()) == round(ratio * len(split))
        per_class = split.label[aligned].bincount(minlength=CLASSES)
        assert per_class.max() - per_class.min() <= 1
        conflicting = split.bias[~aligned]
        first, end = (0, CLASSES) if conflict == "other-class" else (CLASSES, 2 * CLASSES)
        assert ((conflicting >= first) & (conflicting < end)).all()
        assert benchmark.record()["splits"][name]["aligned"] == int(aligned.sum())


@few
@given(palettes, st.floats(0.01, 1), seeds)
def test_shift_is_never_the_own_colour_and_ood_never_a_known_one(palette, saturation, seed):
    benchmark = small(palette=palette, saturation=saturation, colour_seed=seed)
    shift = benchmark.split("shift")
    assert (shift.bias != shift.label).all()
    assert (shift.bias < CLASSES).all()
    known = torch.tensor(benchmark.record()["palettes"]["class"] + benchmark.record()["palettes"]["unbiased"])
    for name in ("ood", "valid_ood"):
        assert _nearest(benchmark.split(name).colour, known) > APART - 1e-3
    assert _nearest(benchmark.split("ood").colour, benchmark.split("valid_ood").colour) > APART - 1e-3


def _nearest(colours: torch.Tensor, others: torch.Tensor) -> float:
    return min(math.dist(a, b) for a, b in itertools.product(colours.unique(dim=0).tolist(), others.tolist()))


def test_every_other_colour_comes_up_in_shift():
    shift = ColouredDigits().split("shift")
    for label in range(CLASSES):
        assert set(shift.bias[shift.label == label].tolist()) == set(range(CLASSES)) - {label}


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_hsv_to_rgb_is_that_of_the_standard_library(hue, saturation, value):
    ours = hsv_to_rgb(*(torch.tensor([x]) for x in (hue, saturation, value)))
    assert ours[0].tolist() == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, value), abs=1e-5)


def test_the_palettes():
    assert torch.allclose(
        hues_palette(10, 0.75), torch.tensor([colorsys.hsv_to_rgb(i / 10, 0.75, 1) for i in range(10)]), atol=1e-6
    )
    assert (pgi_palette()[1:] * 255).round().long().tolist() == [list(colour) for colour in PGI_COLOURS]
    assert (pgi_palette()[0] * 255).round().long().tolist() == [102, 0, 102]
    assert small(palette="pgi").record()["tenth_colour"].startswith("of the 216 colours")
    assert small(palette="lff").record()["palettes"]["class"][6] == [0.025, 0.236, 0.759]


@given(seeds)
def test_drawn_colours_are_far_from_the_given_ones_and_not_dark(seed):
    drawn = drawn_palette(10, pgi_palette(), seeded(seed))
    assert _nearest(drawn, pgi_palette()) > APART
    assert drawn.amax(1).min() >= 0.5


def test_jitter_is_around_the_colour_of_the_class():
    exact, jittered = (ColouredDigits(palette="lff", severity=s).split("train").colour for s in (0, 1))
    inside = (exact > 0.2) & (exact < 0.8)
    assert float((jittered - exact)[inside].std()) == pytest.approx(0.05, rel=0.1)
    assert jittered.min() >= 0 and jittered.max() <= 1


# Painting


@few
@given(st.sampled_from(["foreground", "background"]), palettes, st.booleans(), seeds)
def test_painting_pixel_by_pixel(where, palette, binarise, seed):
    split = small(where=where, palette=palette, binarise=binarise, colour_seed=seed).split("shift")
    source = small(split_seed=0, binarise=False).split("shift").grey
    batch = split.batch(torch.tensor([5, 2]))
    for sample, i in enumerate((5, 2)):
        for y, x, c in itertools.product((9, 13, 14, 20), (10, 13, 17), range(3)):
            grey = int(source[i, y, x]) / 255
            grey = float(grey > 0.5) if binarise else grey
            for image, colour in ((batch.input, split.colour), (batch.clean, split.twin)):
                paint = float(colour[i, c])
                expected = grey * paint if where == "foreground" else grey * 1 + (1 - grey) * paint
                assert float(image[sample, c, y, x]) == pytest.approx(expected, abs=1e-6)
            assert float(batch.mask[sample, 0, y, x]) == pytest.approx(grey, abs=1e-6)


def test_pgi_is_binarised_as_its_authors_do_and_the_others_are_not():
    assert set(small(palette="pgi").split("iid").grey.unique().tolist()) == {0, 255}
    assert len(small(palette="hues").split("iid").grey.unique()) > 100


# Random colours


def test_training_redraws_the_clean_twin_and_nothing_else():
    train, index = small().split("train"), torch.arange(30)
    a, b, again = (train.batch(index, seeded(seed)) for seed in (0, 1, 0))
    assert torch.equal(a.input, b.input)
    assert not torch.equal(a.clean, b.clean)
    assert torch.equal(a.clean, again.clean)
    assert torch.equal(train.batch(index).clean, train.batch(index).clean)


def test_random_colouring_redraws_training_and_leaves_the_tests_alone():
    biased, random = small(), small(colouring="random")
    index = torch.arange(30)
    a, b = (random.split("train").batch(index, seeded(seed)) for seed in (0, 1))
    assert not torch.equal(a.input, b.input)
    assert [random.biases[i] for i in a.bias.unique().tolist()] == ["any"]
    assert torch.equal(random.split("valid").batch(index).input, random.split("valid").batch(index, seeded(5)).input)
    assert not torch.equal(random.split("valid").colour, biased.split("valid").colour)
    for name in ("iid", "ood", "shift", "valid_ood"):
        assert torch.equal(random.split(name).batch(index).input, biased.split(name).batch(index).input)
    assert random.record()["splits"]["train"]["aligned"] is None


def test_the_ranges_of_random_colours():
    uniform = ColouredDigits(random_colours="uniform").split("train").twin
    assert uniform.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.03)
    assert torch.corrcoef(uniform.T).sub(torch.eye(3)).abs().max() < 0.06
    vivid = ColouredDigits(random_colours="vivid").split("train").twin
    assert vivid.amax(1).min() >= 0.5 and vivid.amax(1).max() <= 1


def test_seeds_and_purposes_have_streams_of_their_own():
    draws = {float(torch.rand(1, generator=generator_for(s, p))) for s in (0, 1, -1) for p in ("a", "b")}
    assert len(draws) == 6


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_ratio": 1.2}, "benchmark.bias_ratio is 1.2; give a number from 0 to 1"),
        ({"bias_ratio": float("nan")}, "benchmark.bias_ratio is nan"),
        ({"bias_ratio": "all"}, "benchmark.bias_ratio is 'all'"),
        ({"saturation": 0}, "benchmark.saturation is 0"),
        ({"palette": "hue"}, "benchmark.palette 'hue'; did you mean 'hues'"),
        ({"palette": ["hues"]}, "benchmark.palette"),
        ({"where": "backgroud"}, "benchmark.where 'backgroud'; did you mean 'background'"),
        ({"colouring": "randm"}, "benchmark.colouring 'randm'; did you mean 'random'"),
        ({"random_colours": "vived"}, "did you mean 'vivid'"),
        ({"conflict": "other"}, "benchmark.conflict 'other'; did you mean 'other-class'"),
        ({"source": "mnst"}, "benchmark.source. 'mnst'; did you mean 'mnist'"),
        ({"severity": 6}, "benchmark.severity is 6"),
        ({"limit": 0}, "benchmark.limit is 0; give a whole number from 1 to the 5000"),
        ({"limit": 5001}, "benchmark.limit is 5001"),
        ({"valid": 1.5}, "benchmark.valid is 1.5; give a number of digits"),
        ({"test": 0}, "benchmark.test is 0"),
        ({"valid": 2500, "test": 2500}, "No digits are left for train.*benchmark.valid"),
        ({"limit": 2}, "No digits are left for"),
    ],
)
def test_bad_options_are_answered_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message) as caught:
        ColouredDigits(**options)
    assert "\n" not in str(caught.value)


def test_a_palette_of_ten_refuses_more_classes():
    names = [f"class {i}" for i in range(11)]
    with pytest.raises(UserError, match="'lff' has 10 colours for 11 classes; use palette: hues"):
        small(palette="lff", classes=names)
    assert len(small(palette="hues", classes=names).biases) == 11 + 30 + 1
