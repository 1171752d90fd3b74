"""Digits on grounds that give the class away: which cue each has, what is drawn, and that the digit is untouched."""

import colorsys
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hansfree import backgrounds
from hansfree.benchmarks import ColouredDigits, MNISTBackground
from hansfree.benchmarks.mnist_background import coloured, marked, striped
from hansfree.core import Teacher
from hansfree.errors import UserError

CLASSES = 10
SHORTCUTS = ("colour", "texture", "mark")
seeds = st.integers(0, 2**31)
shortcuts = st.sampled_from(SHORTCUTS)
few = settings(max_examples=15)
cues = st.floats(0, 1, exclude_max=True, width=32)


def small(**options) -> MNISTBackground:
    return MNISTBackground(**{"limit": 400, **options})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Which digit, and which cue


def test_the_digits_are_those_of_coloured_digits_divided_in_the_same_way():
    ours, theirs = MNISTBackground(split_seed=3), ColouredDigits(split_seed=3)
    for name in ours.split_names():
        assert torch.equal(ours.split(name).grey, theirs.split(name).grey)
        assert torch.equal(ours.split(name).label, theirs.split(name).label)


@few
@given(st.integers(60, 900), st.integers(10, 20), st.floats(0.1, 0.5), seeds)
def test_train_valid_and_test_share_no_digit(limit, valid, test, seed):
    benchmark = small(limit=limit, valid=valid, test=test, split_seed=seed)
    parts = [benchmark.split(name).grey for name in ("train", "valid", "iid")]
    assert sum(map(len, parts)) == limit
    assert len({grey.numpy().tobytes() for part in parts for grey in part}) == limit


@few
@given(st.floats(0, 1), shortcuts, seeds)
def test_the_share_of_aligned_samples_is_the_bias_ratio(ratio, shortcut, seed):
    benchmark = small(bias_ratio=ratio, shortcut=shortcut, cue_seed=seed)
    for name in ("train", "valid", "iid"):
        split = benchmark.split(name)
        aligned = split.bias == split.label
        assert int(aligned.sum()) == round(ratio * len(split))
        per_class = split.label[aligned].bincount(minlength=CLASSES)
        assert per_class.max() - per_class.min() <= 1
        assert split.bias.max() < CLASSES
        told = benchmark.record()["splits"][name]
        assert (told["aligned"], told["conflicting"]) == (int(aligned.sum()), int((~aligned).sum()))


@few
@given(st.floats(0, 1), seeds)
def test_cues_follow_from_bias_and_tests_differ_in_nothing_else(ratio, seed):
    benchmark = small(bias_ratio=ratio, cue_seed=seed)
    iid, ood, shift, valid_ood = (benchmark.split(name) for name in ("iid", "ood", "shift", "valid_ood"))
    for split, first in ((iid, 0), (ood, CLASSES), (shift, 0), (valid_ood, 2 * CLASSES)):
        assert ((split.bias >= first) & (split.bias < first + CLASSES)).all()
        offset = {0: 0.0, CLASSES: 0.5, 2 * CLASSES: 0.25}[first]
        expected = [(b % CLASSES + offset) / CLASSES for b in split.bias.tolist()]
        assert split.cue.tolist() == pytest.approx(expected, abs=1e-6)
    assert (shift.bias != shift.label).all()
    for other in (ood, shift):
        assert torch.equal(iid.grey, other.grey) and torch.equal(iid.label, other.label)
    assert len(benchmark.biases) == 3 * CLASSES + 1


def test_every_other_cue_comes_up_in_shift_and_every_half_way_one_in_ood():
    benchmark = MNISTBackground()
    shift, ood = benchmark.split("shift"), benchmark.split("ood")
    for label in range(CLASSES):
        assert set(shift.bias[shift.label == label].tolist()) == set(range(CLASSES)) - {label}
        assert set(ood.bias[ood.label == label].tolist()) == set(range(CLASSES, 2 * CLASSES))


def test_cues_move_no_digit():
    assert torch.equal(small().split("train").grey, small(cue_seed=7, shortcut="mark").split("train").grey)
    assert not torch.equal(small().split("shift").bias, small(cue_seed=7).split("shift").bias)


# What is drawn


@few
@given(shortcuts, seeds, st.sampled_from(["train", "valid", "iid", "ood", "shift"]))
def test_the_mask_is_exact_and_the_ground_outside_of_it(shortcut, seed, name):
    benchmark = small(shortcut=shortcut, cue_seed=seed)
    split, index = benchmark.split(name), torch.tensor([5, 2, 11])
    batch = split.batch(index)
    assert benchmark.mask_names == ("object",)
    assert torch.equal(batch.mask[:, 0], split.grey[index].float() / 255)
    ground = split.ground(split.cue[index], split.phase[index], 28, 28)
    torch.testing.assert_close(batch.images, batch.mask + (1 - batch.mask) * ground)
    mask = batch.mask.expand_as(batch.images)
    assert (batch.images[mask == 1] == 1).all() and torch.equal(batch.images[mask == 0], ground[mask == 0])
    twin = split.ground(split.twin[index], split.phase[index], 28, 28)
    torch.testing.assert_close(batch.clean, batch.mask + (1 - batch.mask) * twin)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_without_its_background_no_image_tells_its_cue(shortcut):
    # What is left of a bright digit on two grounds differs only in the soft edge, by at most mask * (1 - mask).
    benchmark = small(shortcut=shortcut)
    index = torch.arange(40)
    iid, shift = (benchmark.split(name).batch(index) for name in ("iid", "shift"))
    views = [Teacher.live(torch.nn.Identity(), "black").view(batch) for batch in (iid, shift)]
    assert not torch.equal(iid.images, shift.images)
    assert ((views[0] - views[1]).abs() <= iid.mask * (1 - iid.mask) + 1e-6).all()


@given(cues, cues)
def test_colours_are_those_of_the_standard_library(cue, phase):
    ground = coloured(torch.tensor([cue]), torch.tensor([phase]), 3, 2)
    assert ground.shape == (1, 3, 3, 2)
    assert ground[0, :, 1, 1].tolist() == pytest.approx(colorsys.hsv_to_rgb(cue, 0.75, 1), abs=1e-5)
    assert (ground == ground[:, :, :1, :1]).all()


@few
@given(cues, cues)
def test_stripes_pixel_by_pixel(cue, phase):
    ground = striped(torch.tensor([cue]), torch.tensor([phase]), 7, 5)[0]
    for row in range(7):
        for column in range(5):
            x, y, angle = (column + 0.5) / 5, (row + 0.5) / 7, math.pi * cue
            turns = 4 * (x * math.cos(angle) + y * math.sin(angle)) + phase
            expected = 0.6 * (1 + math.sin(2 * math.pi * turns)) / 2
            assert ground[:, row, column].tolist() == pytest.approx([expected] * 3, abs=1e-4)


def test_the_circle_of_directions_closes():
    phase = torch.rand(4, generator=seeded(0))
    before, after = (striped(torch.full((4,), cue), p, 28, 28) for cue, p in ((0.0, phase), (1.0, 0.5 - phase)))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)


@given(cues)
def test_a_mark_is_one_square_on_the_border_and_walks_around_it(cue):
    height, width, side = 28, 20, 2
    ground = marked(torch.tensor([cue]), torch.zeros(1), height, width)[0]
    assert set(ground.unique().tolist()) == {0.0, 1.0} and ground.sum() == 3 * side * side
    path = [(0, x) for x in range(width - side)] + [(y, width - side) for y in range(height - side)]
    path += [(height - side, x) for x in range(width - side, 0, -1)] + [(y, 0) for y in range(height - side, 0, -1)]
    top, left = path[int(float(torch.tensor(cue) * len(path)))]
    assert (ground[:, top : top + side, left : left + side] == 1).all()


def test_marks_of_different_classes_do_not_touch():
    cue = torch.cat([torch.arange(10) / 10, (torch.arange(10) + 0.5) / 10])
    assert marked(cue, cue, 28, 28).sum(0).max() == 1


def test_a_mark_may_be_larger_and_is_never_covered():
    benchmark = small(shortcut="mark", mark_side=4)
    images = benchmark.split("shift").batch(torch.arange(30)).images
    cue = benchmark.split("shift").cue[:30]
    square = marked(cue, cue, 28, 28, side=4)
    assert (square.sum((1, 2, 3)) == 3 * 16).all() and (images[square == 1] == 1).all()


# What is drawn anew


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_training_redraws_the_clean_twin_and_nothing_else(shortcut):
    train, index = small(shortcut=shortcut).split("train"), torch.arange(30)
    a, b, again = (train.batch(index, seeded(seed)) for seed in (0, 1, 0))
    assert torch.equal(a.input, b.input)
    assert not torch.equal(a.clean, b.clean)
    assert torch.equal(a.clean, again.clean)


@pytest.mark.parametrize("ground", ["random", "noise"])
def test_a_teacher_s_grounds_are_redrawn_in_training_and_leave_the_tests_alone(ground):
    biased, teacher_s = small(), small(ground=ground)
    index, train = torch.arange(30), teacher_s.split("train")
    a, b = (train.batch(index, seeded(seed)) for seed in (0, 1))
    assert not torch.equal(a.input, b.input) and torch.equal(a.mask, b.mask)
    assert [teacher_s.biases[i] for i in a.bias.unique().tolist()] == ["any"]
    valid = teacher_s.split("valid")
    assert torch.equal(valid.batch(index).input, valid.batch(index, seeded(5)).input)
    assert not torch.equal(valid.batch(index).input, biased.split("valid").batch(index).input)
    for name in ("iid", "ood", "shift", "valid_ood"):
        assert torch.equal(teacher_s.split(name).batch(index).input, biased.split(name).batch(index).input)
    assert teacher_s.record()["splits"]["train"]["aligned"] is None


def test_noise_is_what_a_teacher_with_that_input_sees_but_for_soft_edges():
    split, index = small(ground="noise").split("valid"), torch.arange(20)
    batch = split.batch(index)
    outside = (batch.mask == 0).expand_as(batch.images)
    assert stats.kstest(batch.images[outside].double().numpy(), "uniform").pvalue > 1e-3
    expected = backgrounds.noise(split.seed[index], 3, 28, 28)
    assert torch.equal(batch.images[outside], expected[outside])


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_ratio": 1.2}, "benchmark.bias_ratio is 1.2; give a number from 0 to 1"),
        ({"shortcut": "color"}, "benchmark.shortcut 'color'; did you mean 'colour'"),
        ({"ground": "noyse"}, "benchmark.ground 'noyse'; did you mean 'noise'"),
        ({"mark_side": 0}, "benchmark.mark_side is 0"),
        ({"shortcut": "mark", "mark_side": 9}, "use a smaller mark_side"),
        ({"source": "mnst"}, "did you mean 'mnist'"),
        ({"limit": 2}, "No digits are left for"),
        ({"shortcut": "mark", "classes": [f"class {i}" for i in range(40)]}, "no room for 40 classes"),
    ],
)
def test_bad_options_are_answered_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message) as caught:
        MNISTBackground(**options)
    assert "\n" not in str(caught.value)
