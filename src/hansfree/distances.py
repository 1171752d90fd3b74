"""How far two maps are apart: per-sample distances, and the pyramid that compares them at several resolutions.

From explanation distillation (https://arxiv.org/abs/2407.09788), eq. 6 and 7. Signed maps, all channels; the
teacher's map is a constant only if the caller detached it. Maps of different height and width meet at the
smaller one of each by adaptive average pooling; other differences of shape are errors.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hansfree.errors import UserError

Map = Float[Tensor, "b ..."]
Distance = Callable[[Map, Map], Float[Tensor, " b"]]

SMALLEST_SIZE = 1e-6
"""A map smaller than this fraction of both sizes together counts as that large: distances and gradients stay finite."""


def normalised_l1(student: Map, teacher: Map) -> Float[Tensor, " b"]:
    """L1 distance over the geometric mean of the two L1 norms, per sample (eq. 6).

    d = |t - s| / sqrt(|t| |s|). Symmetric; unchanged when both maps are scaled together, but not when one is:
    for t = c s it is |c - 1| / sqrt(c). It grows as one map vanishes, which is what keeps a student from the zero
    map, up to about 1000 (see ``SMALLEST_SIZE``); two zero maps are at distance 0.
    """
    return _relative(student, teacher, order=1)


def euclidean(student: Map, teacher: Map) -> Float[Tensor, " b"]:
    """L2 distance over the geometric mean of the two L2 norms, per sample: eq. 6 with another norm.

    The paper says no more than "Euclidean distance"; this normalisation, in analogy to its L1, is ours.
    """
    return _relative(student, teacher, order=2)


def cosine(student: Map, teacher: Map) -> Float[Tensor, " b"]:
    """1 - cos(student, teacher), per sample, in [0, 2]; the scale of either map is of no account.

    A zero map is at distance 1 from every other map and 0 from another zero map.
    """
    student, teacher = _comparable(student, teacher)
    student_size, teacher_size = _sizes(student, teacher, order=2)
    product = (student * teacher).sum(1) / (student_size * teacher_size)
    either = torch.maximum(student_size, teacher_size) > SMALLEST_SIZE
    return either.to(product) - product


DISTANCES: dict[str, Distance] = {"normalised-l1": normalised_l1, "cosine": cosine, "euclidean": euclidean}


def pyramid(
    student: Float[Tensor, "b *k c h w"],
    teacher: Float[Tensor, "b *k c h2 w2"],
    distance: Distance = normalised_l1,
    stop: Literal["code", "paper"] | int = "code",
    extra: tuple[Float[Tensor, " b"], Float[Tensor, " b"]] | None = None,
) -> Float[Tensor, ""]:
    """The distance at several resolutions, averaged over samples and levels (eq. 7).

    Level m average-pools both original maps with kernel and stride 2^m (a border that does not fill a window is
    dropped); :func:`levels` says how many there are. ``extra`` is one more entry (of the student's map, of the
    teacher's) per sample, appended at every level and divided as pooling divides a map's sum, by 4^m: an extension
    of ours, with which the relevance that biases absorb is matched too.

    Raises ``UserError`` for maps that cannot be compared and for more levels than the map has room for.
    """
    if student.ndim < 4 or teacher.ndim < 4:
        raise UserError(
            f"The pyramid compares maps [b, c, h, w], but these have shapes {list(student.shape)} and "
            f"{list(teacher.shape)}; use a plain distance for maps without height and width."
        )
    ours = theirs = None
    if extra is not None:
        ours, theirs = _per_area(extra[0], student, teacher), _per_area(extra[1], teacher, student)
    student, teacher = _meet(student, teacher)
    count = levels(student.shape[-2], student.shape[-1], stop)
    return torch.stack(
        [distance(_level(student, m, ours), _level(teacher, m, theirs)).mean() for m in range(count)]
    ).mean()


def levels(height: int, width: int, stop: Literal["code", "paper"] | int = "code") -> int:
    """How many resolutions the pyramid has, the original included.

    ``code`` is what the authors run: halve while both sides stay at least 8 (28 pixels: 2 levels, 64: 4, 224: 5).
    ``paper`` is what they write, a smallest map of about 8 x 8: 1 + log2(side / 8), rounded, so that the smallest
    side is the power-of-two fraction nearest to 8 (28 pixels: 3 levels, down to 7 x 7; 64: 4; 224: 6). A number is
    that many levels.
    """
    side = min(height, width)
    if stop == "code":
        return max(1, (side // 8).bit_length())
    if stop == "paper":
        return max(1, 1 + round(math.log2(side / 8)))
    if type(stop) is not int or not 1 <= stop <= side.bit_length():
        raise UserError(
            f"The pyramid's stop must be code, paper or a number of levels from 1 to {side.bit_length()} for maps of "
            f"{height} x {width}, but it is {stop!r}."
        )
    return stop


def _relative(student: Map, teacher: Map, order: int) -> Float[Tensor, " b"]:
    student, teacher = _comparable(student, teacher)
    student_size, teacher_size = _sizes(student, teacher, order)
    return _norm(student - teacher, order) / (student_size * teacher_size).sqrt()


def _norm(x: Float[Tensor, "b n"], order: int | float) -> Float[Tensor, " b"]:
    return torch.linalg.vector_norm(x, ord=order, dim=1)  # pyright: ignore


def _sizes(
    student: Float[Tensor, "b n"], teacher: Float[Tensor, "b n"], order: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Both norms, neither below the smallest size."""
    ours, theirs = _norm(student, order), _norm(teacher, order)
    floor = SMALLEST_SIZE * (ours + theirs).clamp_min(1)
    return torch.maximum(ours, floor), torch.maximum(theirs, floor)


def _comparable(student: Map, teacher: Map) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Both maps at one resolution, flat, and divided by their common peak.

    No distance here changes when both maps are scaled together, so the peak may be a constant; with it, squares
    and products of very large or small relevances neither overflow nor vanish.
    """
    student, teacher = (map.flatten(1) for map in _meet(student, teacher))
    peak = torch.maximum(_norm(student.detach(), math.inf), _norm(teacher.detach(), math.inf))
    peak = peak.clamp_min(math.sqrt(torch.finfo(peak.dtype).tiny))[:, None]
    return student / peak, teacher / peak


def _meet(student: Map, teacher: Map) -> tuple[Map, Map]:
    """Both maps at the smaller height and the smaller width of the two."""
    if student.shape == teacher.shape:
        return student, teacher
    if student.ndim != teacher.ndim or student.ndim < 4 or student.shape[:-2] != teacher.shape[:-2]:
        raise UserError(
            f"Maps of shapes {list(student.shape)} and {list(teacher.shape)} cannot be compared: only height and width "
            "may differ; explain teacher and student with the same explainer, and adapt the channels of feature maps."
        )
    size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
    return _resized(student, size), _resized(teacher, size)


def _resized(map: Map, size: tuple[int, int]) -> Map:
    resized = F.adaptive_avg_pool2d(map.flatten(1, -3), size)
    return resized.view(*map.shape[:-2], *size)


def _per_area(entry: Float[Tensor, " b"], map: Map, other: Map) -> Float[Tensor, " b"]:
    """``entry``, divided as the sum of ``map`` will be when it meets ``other``."""
    rows, columns = (min(a, b) / a for a, b in zip(map.shape[-2:], other.shape[-2:], strict=True))
    return entry * (rows * columns)


def _level(map: Map, m: int, entry: Float[Tensor, " b"] | None) -> Map:
    pooled = F.avg_pool2d(map.flatten(1, -3), 2**m) if m else map
    return pooled if entry is None else torch.cat([pooled.flatten(1), entry[:, None] / 4**m], 1)
