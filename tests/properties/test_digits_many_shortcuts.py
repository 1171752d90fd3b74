"""Digits with many shortcuts: each has its own ratio, is drawn apart from the others, and shows in the image."""

import pytest
import torch

from hansfree.benchmarks.digits_many_shortcuts import SHORTCUTS, DigitsManyShortcuts, scaled
from hansfree.benchmarks.mnist_background import striped
from hansfree.core import TEST_SPLITS
from hansfree.errors import UserError

SETTINGS = {"limit": 1000, "valid": 200, "test": 300}


@pytest.fixture(scope="module")
def digits():
    return DigitsManyShortcuts(**SETTINGS, colour_ratio=0.9, background_ratio=0.95, scale_ratio=0.1)


def test_each_shortcut_has_its_ratio_exactly(digits):
    train = digits.record()["splits"]["train"]
    aligned = {name: counts["aligned"] for name, counts in train["shortcuts"].items()}
    assert aligned == {"colour": 450, "background": 475, "scale": 50}
    assert (train["aligned"], train["conflicting"]) == (450, 50)
    assert sum(train["aligned_in"].values()) == 500
    together = sum(
        count for names, count in train["aligned_in"].items() if {"colour", "background"} <= {*names.split(" + ")}
    )
    split = digits.split("train")
    colour, background = (split.attributes[name] == split.label for name in ("colour", "background"))
    assert together == int((colour & background).sum())
    assert pytest.approx(together, abs=8) == 450 * 475 / 500  # drawn apart


def test_nothing_but_the_digit_tells_the_class_in_ood_and_all_mislead_in_shift(digits):
    ood, shift = digits.split("ood"), digits.split("shift")
    for name in SHORTCUTS:
        pairs = torch.zeros(10, 10).index_put((ood.label, ood.attributes[name]), torch.ones(300), accumulate=True)
        assert (pairs == 3).all()
        assert (shift.attributes[name] != shift.label).all()
    assert digits.record()["splits"]["shift"]["aligned_in"] == {"none": 300}


def test_tests_are_the_same_digits(digits):
    splits = [digits.split(name) for name in TEST_SPLITS]
    assert all(torch.equal(split.grey, splits[0].grey) for split in splits)
    assert len({record["sha256"] for name, record in digits.record()["splits"].items() if name in TEST_SPLITS}) == 1


@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_bias_is_the_one_that_is_named_and_changes_nothing_else(digits, name):
    ratios = {"colour_ratio": 0.9, "background_ratio": 0.95, "scale_ratio": 0.1}
    other = DigitsManyShortcuts(**SETTINGS, **ratios, bias=name)
    index = torch.arange(40)
    one, another = digits.split("ood").batch(index), other.split("ood").batch(index)
    assert torch.equal(one.input, another.input)
    assert torch.equal(another.bias, other.split("ood").attributes[name][index])
    assert other.biases[3] == f"{name} of 3"


def test_an_image_shows_its_attributes(digits):
    split = digits.split("ood")
    batch = split.batch(torch.arange(300))
    outside = batch.mask.expand_as(batch.input) == 0
    stripes = striped(split.attributes["background"] / 10, split.phase, 28, 28)
    assert torch.equal(batch.input[outside], stripes[outside])
    for row in range(0, 300, 7):
        at = batch.mask[row, 0] == 1
        if at.any():
            colour = batch.input[row][:, at][:, 0]
            hue = split.attributes["colour"][row] / 10
            expected = 1 - 0.75 * torch.tensor([hue_part(hue, shift) for shift in (5.0, 3.0, 1.0)])
            assert torch.allclose(colour, expected, atol=1e-6)
    area = batch.mask.sum((1, 2, 3)) / (split.grey.float().sum((1, 2)) / 255)
    factor = 0.5 + split.attributes["scale"] / 18
    assert torch.allclose(area, factor.square(), rtol=0.15)


def hue_part(hue, shift):
    """How much of the saturation a channel loses, in the usual six sectors of hue."""
    k = (shift + 6 * float(hue)) % 6
    return max(0.0, min(k, 4 - k, 1.0))


def test_scaling_by_one_changes_nothing_and_a_smaller_image_stays_in_the_middle():
    grey = torch.rand(2, 1, 12, 12)
    assert torch.allclose(scaled(grey, torch.ones(2)), grey, atol=1e-6)
    half = scaled(torch.ones(1, 1, 12, 12), torch.tensor([0.5]))[0, 0]
    assert (half[3:9, 3:9] > 0.4).all() and half[:2].sum() == half[10:].sum() == half[:, :2].sum() == 0
    assert torch.allclose(half, half.rot90(2))


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="did you mean 'scale'"):
        DigitsManyShortcuts(bias="scal")
    with pytest.raises(UserError, match=r"benchmark\.scale_ratio is 2; give a number from 0 to 1"):
        DigitsManyShortcuts(scale_ratio=2)
