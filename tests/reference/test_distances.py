"""Distances and the pyramid against their formulas written out, and what they do at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hansfree.distances import DISTANCES, cosine, euclidean, levels, normalised_l1, pyramid
from hansfree.errors import UserError

every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)


def maps(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*shape, dtype=torch.double, generator=generator) for _ in range(2))
    return student, teacher


def slow_l1(s: list[float], t: list[float]) -> float:
    """Eq. 6."""
    difference = sum(abs(a - b) for a, b in zip(s, t))
    return difference / math.sqrt(sum(abs(a) for a in s) * sum(abs(b) for b in t))


def slow_cosine(s: list[float], t: list[float]) -> float:
    return 1 - sum(a * b for a, b in zip(s, t)) / math.hypot(*s) / math.hypot(*t)


def slow_euclidean(s: list[float], t: list[float]) -> float:
    return math.dist(s, t) / math.sqrt(math.hypot(*s) * math.hypot(*t))


SLOW = {normalised_l1: slow_l1, cosine: slow_cosine, euclidean: slow_euclidean}


@every_distance
def test_distances_are_their_formulas(distance):
    student, teacher = maps(5, 3, 4, 4)
    slow = [SLOW[distance](student[n].flatten().tolist(), teacher[n].flatten().tolist()) for n in range(5)]
    torch.testing.assert_close(distance(student, teacher), torch.tensor(slow, dtype=torch.double))
    torch.testing.assert_close(distance(student.flatten(1), teacher.flatten(1)), torch.tensor(slow, dtype=torch.double))


def slow_pyramid(student, teacher, count, distance, extra=None):
    """Eq. 7, window by window."""
    total = 0.0
    for m in range(count):
        side = 2**m
        rows, columns = student.shape[-2] // side, student.shape[-1] // side
        for n in range(len(student)):
            flat = []
            for which, map in enumerate((student[n], teacher[n])):
                windows = [
                    map[c, i * side : (i + 1) * side, j * side : (j + 1) * side].mean().item()
                    for c in range(map.shape[0])
                    for i in range(rows)
                    for j in range(columns)
                ]
                flat.append(windows if extra is None else [*windows, extra[which][n].item() / 4**m])
            total += SLOW[distance](*flat)
    return total / count / len(student)


@every_distance
@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize(
    ("shape", "stop", "count"), [((2, 2, 28, 28), "code", 2), ((2, 1, 28, 30), "paper", 3), ((1, 2, 9, 11), 4, 4)]
)
def test_the_pyramid_is_equation_7(distance, with_extra, shape, stop, count):
    student, teacher = maps(*shape)
    extra = maps(shape[0], seed=1) if with_extra else None
    found = pyramid(student, teacher, distance, stop, extra)
    assert found.ndim == 0
    assert found.item() == pytest.approx(slow_pyramid(student, teacher, count, distance, extra))


@pytest.mark.parametrize(
    ("side", "code", "paper"),
    [(28, 2, 3), (64, 4, 4), (224, 5, 6), (8, 1, 1), (7, 1, 1), (1, 1, 1), (15, 1, 2), (16, 2, 2)],
)
def test_levels(side, code, paper):
    assert levels(side, side, "code") == levels(side, 3 * side) == code
    assert levels(side, side, "paper") == levels(3 * side, side, "paper") == paper


@pytest.mark.parametrize("stop", [0, -1, 6, 2.0, True, "cod"])
def test_impossible_stops_are_user_errors(stop):
    with pytest.raises(UserError, match="stop"):
        pyramid(*maps(1, 1, 28, 28), stop=stop)
    assert pyramid(*maps(1, 1, 28, 28), stop=5).isfinite()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), scale=st.floats(-20, 20).map(lambda power: 10.0**power))
def test_what_scale_changes(seed, scale):
    student, teacher = maps(2, 3, 5, seed=seed)
    for distance in DISTANCES.values():
        expected = distance(student, teacher)
        torch.testing.assert_close(distance(teacher, student), expected)
        torch.testing.assert_close(distance(scale * student, scale * teacher), expected)


@settings(max_examples=20)
@given(scale=st.floats(-5, 5).map(lambda power: 10.0**power))
def test_the_cosine_does_not_see_the_scale_of_one_map(scale):
    student, teacher = maps(2, 3, 5)
    torch.testing.assert_close(cosine(scale * student, teacher), cosine(student, teacher))


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), factor=st.floats(-4, 4).map(lambda power: 10.0**power))
def test_a_scaled_map_is_apart_unless_only_direction_counts(seed, factor):
    student, _ = maps(2, 3, 5, seed=seed)
    expected = torch.full((2,), abs(factor - 1) / math.sqrt(factor), dtype=torch.double)
    torch.testing.assert_close(normalised_l1(student, factor * student), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(euclidean(student, factor * student), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cosine(student, factor * student), torch.zeros(2, dtype=torch.double))


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), index=st.integers(0, 14), power=st.floats(-18, 18))
def test_zero_if_and_only_if_equal(seed, index, power):
    student, _ = maps(1, 15, seed=seed)
    student = student.float() * 10**power
    other = student.clone()
    other[0, index] += student.abs().max()
    for distance in DISTANCES.values():
        assert abs(distance(student, student).item()) < 1e-6
        assert distance(student, other).item() > 1e-3


@every_distance
@pytest.mark.parametrize("teacher_scale", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("student_scale", [0.0, 1e-30, 1e-20, 1e-12, 1e-6, 1.0, 1e6, 1e20])
def test_values_and_gradients_are_finite_for_vanishing_maps(distance, student_scale, teacher_scale):
    student, teacher = (map.float() * scale for map, scale in zip(maps(2, 1, 9, 9), (student_scale, teacher_scale)))
    student.requires_grad_(), teacher.requires_grad_()
    loss = pyramid(student, teacher, distance, stop=2)
    loss.backward()
    assert loss.isfinite() and 0 <= loss < 1100
    assert student.grad is not None and student.grad.isfinite().all()
    assert teacher.grad is not None and teacher.grad.isfinite().all()


@every_distance
def test_zero_maps(distance):
    zero, other = torch.zeros(2, 1, 4, 4), maps(2, 1, 4, 4)[0].float()
    assert not distance(zero, zero).any()
    expected = 1.0 if distance is cosine else 1000.0
    torch.testing.assert_close(distance(zero, other), torch.full((2,), expected), rtol=1e-4, atol=0)
    student = zero.clone().requires_grad_()
    distance(student, other).sum().backward()
    assert student.grad is not None and student.grad.any()  # a zero map is no resting place


@every_distance
def test_gradients(distance):
    student, teacher = (map.requires_grad_() for map in maps(2, 2, 3, 3))
    assert torch.autograd.gradcheck(distance, (student, teacher))
    assert torch.autograd.gradcheck(distance, (student * 1e-4, teacher), atol=1e-4, rtol=1e-3)


@every_distance
def test_maps_meet_at_the_smaller_size(distance):
    student, _ = maps(2, 3, 12, 8)
    _, teacher = maps(2, 3, 6, 16)
    met = F.adaptive_avg_pool2d(student, (6, 8)), F.adaptive_avg_pool2d(teacher, (6, 8))
    torch.testing.assert_close(distance(student, teacher), distance(*met))
    ours, theirs = maps(2, seed=1)
    found = pyramid(student, teacher, distance, stop=2, extra=(ours, theirs))
    torch.testing.assert_close(found, pyramid(*met, distance, stop=2, extra=(ours / 2, theirs / 2)))


def test_extra_entries_shrink_as_sums_do():
    """A pixel of a sum shrinks with pooling as the extra entry does: the two can stand for each other."""
    student, teacher = maps(2, 1, 16, 16)
    extra = student.sum((1, 2, 3)), teacher.sum((1, 2, 3))
    pooled = F.avg_pool2d(student, 2).sum((1, 2, 3)), F.avg_pool2d(teacher, 2).sum((1, 2, 3))
    for whole, part in zip(extra, pooled):
        torch.testing.assert_close(whole / 4, part)
    assert pyramid(student, teacher, extra=extra) != pyramid(student, teacher)


def test_k_targets_are_compared_as_one_map():
    student, teacher = maps(2, 3, 4, 16, 16)
    found = pyramid(student, teacher, stop=2)
    torch.testing.assert_close(found, pyramid(student.flatten(1, 2), teacher.flatten(1, 2), stop=2))


@every_distance
@pytest.mark.parametrize(
    "shapes", [((2, 1, 8, 8), (2, 3, 8, 8)), ((2, 3, 8, 8), (3, 3, 8, 8)), ((2, 6), (2, 5)), ((2, 8, 8), (2, 1, 8, 8))]
)
def test_other_differences_of_shape_are_user_errors(distance, shapes):
    with pytest.raises(UserError, match="shapes"):
        distance(*(torch.rand(shape) for shape in shapes))
    with pytest.raises(UserError, match="shapes"):
        pyramid(*(torch.rand(shape) for shape in shapes), distance)
