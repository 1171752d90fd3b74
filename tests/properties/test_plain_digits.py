"""Grey digits at another size."""

import pytest
import torch
from torch.nn import functional as F

from hansfree.benchmarks import PlainDigits
from hansfree.core import InputSpec
from hansfree.errors import UserError


def digits(**settings):
    return PlainDigits(limit=200, valid=40, test=40, **settings)


def test_enlarged_digits_are_the_same_digits():
    own, large = digits(), digits(size=56)
    a, b = (one.split("iid").batch(torch.arange(3)) for one in (own, large))
    assert large.input == InputSpec(1, 56, 56) and b.images.shape == b.mask.shape == (3, 1, 56, 56)
    inner = F.avg_pool2d(b.images, 2)[..., 1:-1, 1:-1]  # the mean of the four is the pixel, smoothed
    near = F.conv2d(a.images, torch.tensor([[1.0, 6, 1], [6, 36, 6], [1, 6, 1]])[None, None] / 64)
    torch.testing.assert_close(inner, near)
    assert large.record()["splits"] == own.record()["splits"]
    assert "size" not in own.record()["options"] and large.record()["options"]["size"] == 56


def test_a_size_is_a_number_of_pixels():
    with pytest.raises(UserError, match=r"benchmark\.size is 0"):
        digits(size=0)
