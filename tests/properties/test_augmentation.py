"""Augmentation: single-pixel maps show that a map goes exactly where its image goes, whatever its resolution."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch.nn import functional as F

from hansfree.augmentation import (
    Augmentation,
    AugmentedSplit,
    apply_view,
    composed,
    crops,
    flips,
    mixing_ratio,
    move_boxes,
    rotations,
    shifts,
    window,
)
from hansfree.config import parse
from hansfree.core import UNKNOWN, Batch, Boxes, Teacher
from hansfree.errors import UserError
from hansfree.torchvision_guard import import_torchvision

seeds = st.integers(0, 2**31 - 1)
ALL = Augmentation(crop=(0.3, 1), flip=0.5, rotation=30, translation=0.1, brightness=0.3, contrast=0.3)
MOVING = Augmentation(crop=(0.3, 1), flip=0.5, rotation=30, translation=0.1)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def view_of(*matrices):
    product = matrices[0]
    for matrix in matrices[1:]:
        product = product @ matrix
    return product[:, :2]


def delta(size, row, column):
    map = torch.zeros(1, 1, *size, dtype=torch.float64)
    map[0, 0, row, column] = 1
    return map


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(count=4, height=12, width=12, channels=3, seed=0):
    draw = seeded(seed)
    images, clean = (torch.rand(count, channels, height, width, generator=draw) for _ in range(2))
    mask = torch.rand(count, 2, height, width, generator=draw)
    label = torch.arange(count) % 3
    return Batch(images, label, torch.arange(count) + 50, bias=label, mask=mask, clean=clean)


FLIP = flips(numbers(1))
QUARTER = rotations(numbers(90), 1, 1)
RIGHT_HALF = crops(numbers(0.5), numbers(0.5), numbers(1), numbers(0))  # the upper right quarter


# Single pixels


@pytest.mark.parametrize("size", [(7, 7), (28, 28), (5, 9)])
def test_a_flip_sends_each_pixel_to_the_other_side(size):
    height, width = size
    for row, column in ((0, 0), (height - 1, 1), (2, width // 2)):
        there = apply_view(delta(size, row, column), view_of(FLIP))
        torch.testing.assert_close(there, delta(size, row, width - 1 - column))


@pytest.mark.parametrize("side", [7, 28])
def test_a_quarter_turn_is_numpy_s(side):
    for row, column in ((0, 0), (1, side - 2), (3, 2)):
        map = delta((side, side), row, column)
        torch.testing.assert_close(apply_view(map, view_of(QUARTER))[0, 0], torch.rot90(map[0, 0]))


@pytest.mark.parametrize("side", [8, 28])
def test_a_crop_enlarges_the_pixels_of_its_window_and_no_others(side):
    inside, outside = (1, side - 2), (side - 1, side - 2)
    assert apply_view(delta((side, side), *outside), view_of(RIGHT_HALF)).abs().max() == 0
    window = delta((side, side), *inside)[..., : side // 2, side // 2 :]
    found = apply_view(delta((side, side), *inside), view_of(RIGHT_HALF))
    centre = (found[0, 0] * torch.arange(side, dtype=torch.float64)[:, None]).sum() / found.sum()
    assert centre == pytest.approx(2 * 1 + 0.5, abs=1e-9)  # rows 2 and 3 of the result show row 1
    # Bilinear enlargement of the window alone, but where its inner borders see their neighbours.
    wanted = F.interpolate(window, (side, side), mode="bilinear")
    torch.testing.assert_close(found[..., : side - 1, 1:], wanted[..., : side - 1, 1:])


def test_a_move_by_whole_pixels():
    map = delta((8, 10), 3, 4)
    moved = apply_view(map, view_of(shifts(numbers(0.2), numbers(-0.25))))  # 2 pixels right, 2 up
    torch.testing.assert_close(moved, delta((8, 10), 1, 6))
    assert apply_view(map, view_of(shifts(numbers(0.6), numbers(0)))).abs().max() < 1e-9  # out of the image


def test_a_turn_keeps_distances_in_an_image_that_is_no_square():
    quarter = view_of(rotations(numbers(90), 6, 10))
    torch.testing.assert_close(apply_view(delta((6, 10), 2, 6), quarter), delta((6, 10), 1, 4))  # 1.5 right: 1.5 up
    assert apply_view(delta((6, 10), 2, 9), quarter).max() < 1e-9  # turned out of sight


def test_what_lies_outside_of_the_image_is_black():
    white = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    moved = apply_view(white, view_of(shifts(numbers(0.25), numbers(0))))[0, 0]
    assert (moved[:, :2] == 0).all() and (moved[:, 2:] == 1).all()


def test_rotated_first_then_cropped_then_flipped():
    # By hand, on 8 x 8: (1, 6) turns to (1, 1), the upper left quarter shows it in rows and columns 2 and 3, and the
    # flip puts it in columns 4 and 5.
    upper_left = crops(numbers(0.5), numbers(0.5), numbers(0), numbers(0))
    found = apply_view(delta((8, 8), 1, 6), view_of(QUARTER, upper_left, FLIP))[0, 0]
    assert (found == found.max()).nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    in_turn = delta((8, 8), 1, 6)
    for matrix in (QUARTER, upper_left, FLIP):
        in_turn = apply_view(in_turn, view_of(matrix))
    torch.testing.assert_close(found, in_turn[0, 0])


VIEWS = {
    "flip": view_of(FLIP),
    "crop": view_of(RIGHT_HALF),
    "odd crop": view_of(crops(numbers(0.55), numbers(0.8), numbers(0.3), numbers(0.9))),
    "rotation": view_of(QUARTER),
    "slant": view_of(rotations(numbers(33), 1, 1)),
    "crop and flip": view_of(RIGHT_HALF, FLIP),
    "rotation, crop and flip": view_of(rotations(numbers(-20), 1, 1), RIGHT_HALF, FLIP),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_coarse_map_goes_the_way_of_its_image(name):
    # Each cell of a 7 x 7 map, drawn as an image of 28 x 28 pixels: both, through the view, are the same picture, and
    # through the view with a flip too many they are not.
    flipped, told_apart = composed(VIEWS[name], view_of(FLIP)), 0
    for cell in product(range(7), range(7)):
        map = delta((7, 7), *cell)
        image = F.interpolate(map, (28, 28), mode="bilinear")
        seen = apply_view(image, VIEWS[name])
        assert (apply_view(map, VIEWS[name], (28, 28)) - seen).abs().max() < 0.24  # a peak read twice: 1 - (7/8)^2
        native, finer = (apply_view(map, VIEWS[name], size) for size in (None, (21, 21)))
        torch.testing.assert_close(native, finer[..., 1::3, 1::3])  # pixels with the same middle
        told_apart += bool((apply_view(map, flipped, (28, 28)) - seen).abs().max() > 0.5)
    assert told_apart >= 8  # the cells that are in sight, but for those in the middle


@pytest.mark.parametrize("side", [7, 28])
def test_native_maps_stay_native(side):
    view = VIEWS["rotation, crop and flip"]
    assert apply_view(delta((side, side), 2, 4), view).shape[-2:] == (side, side)
    right, wrong = (apply_view(delta((7, 7), 1, 5), view_of(RIGHT_HALF, *flip)) for flip in ((FLIP,), ()))
    torch.testing.assert_close(right, wrong.flip(-1))
    assert (right - wrong).abs().max() > 0.3


# All maps, all views


@settings(max_examples=20)
@given(seeds)
def test_linear_maps_stay_linear_at_every_resolution(seed):
    # A map that says where a place lies is cut exactly: the same places come out at 28 x 28 and at 7 x 7.
    view = MOVING.draw_view(3, 28, 28, seeded(seed)).double()
    for side in (7, 28):
        x = ((torch.arange(side, dtype=torch.double) + 0.5) * 2 / side - 1).expand(side, side)
        map = torch.stack([x, x.T]).expand(3, 2, side, side)
        grid = torch.stack([x, x.T, torch.ones_like(x)], -1)
        wanted = torch.einsum("bij,hwj->bihw", view, grid)
        # Clear of the border, where pixels have no neighbours on one side.
        clear = (wanted.abs() < 1 - 1 / side).all(1, keepdim=True).expand_as(wanted)
        torch.testing.assert_close(apply_view(map, view)[clear], wanted[clear])


@settings(max_examples=15)
@given(seeds)
def test_scipy_moves_images_to_the_same_places(seed):
    height, width = 9, 14
    image = torch.rand(1, 1, height, width, dtype=torch.float64, generator=seeded(seed))
    view = MOVING.draw_view(1, height, width, seeded(seed)).double()
    # scipy counts pixels (rows first) from the middle of the first one.
    scale = np.diag([height / 2, width / 2])
    turned = view[0, :, :2].numpy()[::-1, ::-1]
    matrix = scale @ turned @ np.linalg.inv(scale)
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = middle + scale @ view[0, :, 2].numpy()[::-1] - matrix @ middle
    wanted = ndimage.affine_transform(image[0, 0].numpy(), matrix, offset, order=1, mode="nearest")
    found = apply_view(image, view)[0, 0].numpy()
    shown = found != 0  # what lies outside of the image is black here, and the nearest pixel there
    assert shown.mean() > 0.3
    np.testing.assert_allclose(found[shown], wanted[shown], atol=1e-9)


def test_nothing_changes_under_the_view_that_changes_nothing():
    map, eye = torch.rand(2, 3, 7, 9, dtype=torch.float64), view_of(torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    torch.testing.assert_close(apply_view(map, eye), map)
    torch.testing.assert_close(apply_view(map, eye, (20, 11)), F.interpolate(map, (20, 11), mode="bilinear"))


def test_shrinking_skips_no_pixel():
    eye = torch.eye(3, dtype=torch.float64)[None, :2]
    map = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(apply_view(map, eye, (6, 6)), F.avg_pool2d(map, 2))
    for row in range(12):
        found = apply_view(delta((12, 12), row, 5), eye, (5, 5))
        assert found.max() > 0.05


def test_any_number_of_dimensions_and_any_float():
    map, view = torch.rand(2, 3, 1, 6, 6), view_of(FLIP).repeat(2, 1, 1)
    assert torch.equal(apply_view(map, view)[:, 1], apply_view(map[:, 1], view))
    assert torch.equal(apply_view(map[:, 0, 0], view), apply_view(map[:, 0], view)[:, 0])
    assert apply_view(map, view).dtype == torch.float32
    assert apply_view(map, view, (3, 4)).shape == (2, 3, 1, 3, 4)


def test_differentiable_in_the_map():
    view = MOVING.draw_view(2, 4, 4, seeded()).double()
    map = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: apply_view(m, view, (3, 5)), (map,))


@settings(max_examples=15)
@given(seeds)
def test_views_compose(seed):
    first, second = (MOVING.draw_view(2, 8, 8, seeded(seed + i)).double() for i in range(2))
    place = torch.rand(2, 3, dtype=torch.float64, generator=seeded(seed))
    place[:, 2] = 1
    in_turn = torch.cat([torch.einsum("bij,bj->bi", second, place), torch.ones(2, 1)], 1)
    wanted = torch.einsum("bij,bj->bi", first, in_turn)
    torch.testing.assert_close(torch.einsum("bij,bj->bi", composed(first, second), place), wanted)


# Whole batches


@settings(max_examples=20)
@given(seeds, st.sampled_from([MOVING, ALL, Augmentation(crop=(0.1, 0.5), size=9)]))
def test_image_twin_and_masks_go_together_and_stay_in_range(seed, augmentation):
    image = torch.rand(3, 1, 12, 10, generator=seeded(seed))
    same = Batch(image, torch.zeros(3).long(), torch.arange(3), clean=image.clone(), mask=image.clone())
    after = augmentation(same, seeded(seed))
    assert torch.equal(after.input, after.clean)
    assert after.input.min() >= 0 and after.input.max() <= 1
    torch.testing.assert_close(after.mask, apply_view(image, after.view, augmentation._size).clamp(0, 1))
    if not (augmentation.brightness or augmentation.contrast):
        assert torch.equal(after.input, after.mask)
    assert torch.equal(after.index, same.index) and torch.equal(after.label, same.label)


def test_photometric_changes_leave_places_and_masks_alone():
    batch = batch_of()
    after = Augmentation(brightness=0.4, contrast=0.4)(batch, seeded())
    assert after.view is None and after.mask is batch.mask
    assert not torch.equal(after.input, batch.input)
    for i in range(4):  # one affine function of the pixel's value per image, before it is cut to [0, 1]
        before, now = (torch.cat([b.input[i].flatten(), b.clean[i].flatten()]).double() for b in (batch, after))
        inner = (now > 1e-3) & (now < 1 - 1e-3)
        slope, _, r, *_ = stats.linregress(before[inner].numpy(), now[inner].numpy())
        assert r == pytest.approx(1, abs=1e-6) and 0.36 < slope < 1.96


def test_brightness_and_contrast_by_hand():
    batch = batch_of(1)
    draws = 2 * torch.rand(2, 1, generator=seeded(5)) - 1
    gain, strength = 1 + 0.2 * draws[0].item(), 1 + 0.3 * draws[1].item()
    bright = batch.images * gain
    wanted = (bright.mean() + strength * (bright - bright.mean())).clamp(0, 1)
    found = Augmentation(brightness=0.2, contrast=0.3)(batch, seeded(5)).images
    torch.testing.assert_close(found, wanted)


def test_everything_is_off_by_default():
    batch, draw = batch_of(), seeded()
    state = draw.get_state()
    assert Augmentation()(batch, draw) is batch
    assert torch.equal(draw.get_state(), state)


def test_the_view_of_an_image_that_was_cut_before_is_both():
    whole = batch_of()
    once = MOVING(whole, seeded(1))
    twice = MOVING(once, seeded(2))
    second = MOVING.draw_view(4, 12, 12, seeded(2))
    torch.testing.assert_close(twice.view, composed(once.view, second))


# Boxes


@settings(max_examples=20)
@given(seeds, st.sampled_from([None, 9]))
def test_boxes_hold_what_they_held(seed, size):
    generator = seeded(seed)
    corners = torch.rand(2, 4, generator=generator).double() * torch.tensor([20.0, 16, 20, 16])
    corners = torch.cat([corners.view(2, 2, 2).amin(1), corners.view(2, 2, 2).amax(1) + 0.5], 1)
    boxes = Boxes((corners,), (torch.tensor([4, 7]),))
    view = MOVING.draw_view(1, 16, 20, generator).double()
    after = (16, 20) if size is None else (size, size)
    moved = move_boxes(boxes, view, (16, 20), after)
    assert len(moved.corners[0]) == len(moved.classes[0])
    if len(moved.corners[0]):
        assert moved.corners[0].min() >= 0
        assert (moved.corners[0] <= torch.tensor([after[1], after[0], after[1], after[0]])).all()
    # Written again: every place of the result whose origin lies in a box lies in the moved one.
    for box, name in zip(corners, (4, 7)):
        hull = [c for c, n in zip(moved.corners[0].tolist(), moved.classes[0].tolist()) if n == name]
        for _ in range(60):
            x, y = (torch.rand(2, generator=generator).double() * torch.tensor([after[1], after[0]])).tolist()
            place = torch.tensor([2 * x / after[1] - 1, 2 * y / after[0] - 1, 1], dtype=torch.float64)
            u, v = (view[0] @ place).tolist()
            u, v = (u + 1) / 2 * 20, (v + 1) / 2 * 16
            if box[0] <= u <= box[2] and box[1] <= v <= box[3]:
                assert (
                    hull and hull[0][0] - 1e-6 <= x <= hull[0][2] + 1e-6 and hull[0][1] - 1e-6 <= y <= hull[0][3] + 1e-6
                )


def test_boxes_by_hand():
    boxes = Boxes(
        (torch.tensor([[1.0, 2, 3, 6], [0, 0, 1, 1]]), torch.zeros(0, 4)), (torch.tensor([5, 6]), torch.zeros(0).long())
    )
    flipped = move_boxes(boxes, view_of(FLIP).repeat(2, 1, 1), (8, 8), (8, 8))
    assert flipped.corners[0].tolist() == [[5, 2, 7, 6], [7, 0, 8, 1]] and flipped.corners[1].shape == (0, 4)
    lower_right = crops(numbers(0.5), numbers(0.5), numbers(1), numbers(1))
    cut = move_boxes(
        Boxes((torch.tensor([[3.0, 3, 6, 6], [0, 0, 2, 2]]),), (torch.tensor([5, 6]),)),
        view_of(lower_right),
        (8, 8),
        (8, 8),
    )
    assert cut.corners[0].tolist() == [[0, 0, 4, 4]] and cut.classes[0].tolist() == [5]


# Draws


def test_windows_have_the_area_and_the_shape_that_was_asked_for():
    across, down = window((0.2, 0.7), (0.9, 4 / 3), 20, 20, 5000, seeded())  # all of them fit
    assert stats.kstest((across * down).numpy(), stats.uniform(0.2, 0.5).cdf).pvalue > 1e-3
    shape = (across / down).log().numpy()
    assert stats.kstest(shape, stats.uniform(math.log(0.9), math.log(4 / 3 / 0.9)).cdf).pvalue > 1e-3


def test_windows_that_stick_out_are_drawn_again_as_torchvision_does():
    crop = import_torchvision("torchvision.transforms").RandomResizedCrop
    torch.manual_seed(0)
    image = torch.empty(1, 2000, 3000)
    theirs = np.array([crop.get_params(image, [0.3, 1.0], [0.9, 4 / 3])[2:] for _ in range(2000)]) / image.shape[1:]
    across, down = window((0.3, 1), (0.9, 4 / 3), 2000, 3000, 4000, seeded())
    assert across.max() <= 1 and down.max() <= 1
    assert stats.ks_2samp(theirs[:, 0], down.numpy()).pvalue > 1e-3
    assert stats.ks_2samp(theirs[:, 1], across.numpy()).pvalue > 1e-3


def test_a_whole_image_is_a_window_too():
    across, down = window((1, 1), (1, 1), 12, 12, 3, seeded())
    assert across.tolist() == [1, 1, 1] and down.tolist() == [1, 1, 1]
    across, down = window((1, 1), (1, 1), 10, 20, 3, seeded())  # none fits: cut
    assert (across < 1).all() and (down == 1).all()


def test_views_have_the_ranges_that_were_asked_for():
    count = 4000
    turned = Augmentation(rotation=40).draw_view(count, 12, 12, seeded())
    angle = torch.rad2deg(torch.atan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert stats.kstest(angle.numpy(), stats.uniform(-40, 80).cdf).pvalue > 1e-3
    moved = Augmentation(translation=0.2).draw_view(count, 12, 12, seeded())[:, :, 2] / 2
    for values in moved.T:
        assert stats.kstest(values.numpy(), stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-3
    mirrored = Augmentation(flip=0.3).draw_view(count, 12, 12, seeded())[:, 0, 0] < 0
    assert stats.binomtest(int(mirrored.sum()), count, 0.3).pvalue > 1e-3
    cut = Augmentation(crop=(0.2, 0.8)).draw_view(count, 12, 12, seeded())
    reach = cut[:, :, :2].abs().sum(2) + cut[:, :, 2].abs()
    assert reach.max() <= 1 + 1e-6  # a window never leaves the image
    place = cut[:, 0, 2] / (1 - cut[:, 0, 0])
    assert stats.kstest(place.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_the_same_generator_gives_the_same_batch_and_another_another():
    batch = batch_of()
    first, again, other = (ALL(batch, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.input, again.input) and torch.equal(first.view, again.view)
    assert not torch.equal(first.input, other.input)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"crop": [0.0, 1]}, "crop takes two shares"),
        ({"crop": [0.5, 0.3]}, "crop takes two shares"),
        ({"crop": [0.5, 1.2]}, "crop takes two shares"),
        ({"ratio": [2, 1]}, "ratio takes two ratios"),
        ({"flip": 2}, "flip"),
        ({"rotation": -1}, "rotation"),
        ({"mixup": -1}, "mixup"),
        ({"jitter": 1}, "no setting 'jitter'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(section, match):
    with pytest.raises(UserError, match=match) as caught:
        parse(Augmentation, section, "augmentation")
    assert "\n" not in str(caught.value)


# Mixing


def test_mixing_ratios_are_beta_distributed():
    ratio = mixing_ratio(0.4, 4000, seeded()).double().numpy()
    assert stats.kstest(ratio, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_mixed_images_are_means_of_two_and_say_so():
    batch = batch_of(6)
    after = Augmentation(mixup=1.0)(batch, seeded(2))
    mixing_ratio(1.0, 6, draw := seeded(2))
    other = torch.randperm(6, generator=draw)
    for i in range(6):
        r = after.mixed[i].item()
        for now, before in ((after.images, batch.images), (after.clean, batch.clean)):
            torch.testing.assert_close(now[i], r * before[i] + (1 - r) * before[other[i]])
    assert after.label.tolist() == [UNKNOWN] * 6
    assert after.bias is None and after.mask is None and after.boxes is None
    assert torch.equal(after.index, batch.index)


def test_what_cannot_be_replayed_says_why():
    assert ALL.not_replayable is None
    assert "mixup" in (Augmentation(mixup=0.2).not_replayable or "")


# Where teachers look


@pytest.mark.parametrize("sees", ["clean", "noise", "mean", "black", "recombine"])
def test_what_the_teacher_sees_stays_aligned_with_the_student_s_image(sees):
    # The object is a bright square, in image and twin: the teacher finds it where the student's image has it.
    images = torch.zeros(6, 3, 16, 16)
    images[:, :, 5:11, 6:12] = 1
    mask = images[:, :1].clone()
    ground = torch.rand(6, 3, 16, 16, generator=seeded()) * 0.4
    batch = Batch(images + (1 - mask) * ground, torch.zeros(6).long(), torch.arange(6), mask=mask, clean=images)
    after = MOVING(batch, seeded(7))
    seen = Teacher.live(torch.nn.Identity(), sees).view(after)
    inside = (after.mask > 0.999).expand_as(seen)
    assert inside.flatten(1).any(1).sum() >= 4
    torch.testing.assert_close(seen[inside], after.images[inside], atol=2e-3, rtol=0)
    if sees in ("clean", "black"):
        assert seen[(after.mask < 1e-6).expand_as(seen)].abs().max() < 1e-5


@pytest.mark.parametrize("augmentation", [ALL, Augmentation(mixup=0.5)])
def test_the_clean_twin_of_an_image_that_is_its_own_stays_so(augmentation):
    batch = batch_of()
    own = Batch(batch.images, batch.label, batch.index, clean=batch.images.clone())
    after = augmentation(own, seeded())
    assert torch.equal(Teacher.live(torch.nn.Identity(), "clean").view(after), after.images)


def test_a_split_is_augmented_only_where_a_generator_comes_with_it(tiny):
    whole = tiny.split("train")
    split = AugmentedSplit(whole, MOVING)
    index = torch.tensor([3, 1, 4])
    assert torch.equal(split.batch(index).images, whole.batch(index).images) and split.batch(index).view is None
    after = split.batch(index, seeded())
    assert after.view is not None and not torch.equal(after.images, whole.batch(index).images)
    assert len(split) == 48 and torch.equal(split.label, whole.label) and torch.equal(split.bias, whole.bias)
