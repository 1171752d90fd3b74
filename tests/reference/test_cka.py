"""CKA of many layers and batches is that of pairs, and knows a turned and scaled layer again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansfree.metrics.cka import MinibatchCKA, gram, hsic, linear_cka, minibatch_cka

widths = st.integers(1, 9)


def layers(seed, count, widths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator, dtype=torch.double) for width in widths]


@settings(max_examples=25)
@given(st.integers(0, 10**6), widths, widths, widths, st.integers(1, 4))
def test_all_layers_together_are_each_pair_by_itself(seed, one, other, third, parts):
    count = 6 * parts
    first, second = layers(seed, count, (one, other)), layers(seed + 1, count, (third, one, other))
    found = MinibatchCKA()
    for rows in torch.arange(count).split(6):
        found.add([gram(layer[rows]) for layer in first], [gram(layer[rows]) for layer in second])
    assert found.value.shape == (2, 3)
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            torch.testing.assert_close(found.value[i, j], minibatch_cka(x, y, 6), equal_nan=True)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_a_layer_that_is_turned_moved_and_scaled_is_the_same(seed, width):
    x, noise = layers(seed, 24, (width, width))
    turn = torch.linalg.qr(noise[:width]).Q
    turned = 3 * x @ turn + 5
    one = torch.ones((), dtype=torch.double)
    torch.testing.assert_close(linear_cka(x, turned), one)
    torch.testing.assert_close(minibatch_cka(x, turned, 8), one)
    assert 0 <= linear_cka(x, noise) < 1


def test_wide_independent_layers_look_alike_to_the_biased_estimate_alone():
    values = [[f(*layers(seed, 20, (400, 400))).item() for f in (linear_cka, minibatch_cka)] for seed in range(20)]
    biased, unbiased = torch.tensor(values).mean(0).tolist()
    assert biased > 0.9
    assert abs(unbiased) < 0.05


def test_fewer_than_four_samples_say_nothing():
    x = torch.rand(3, 5)
    assert hsic(gram(x), gram(x)) == 0
    with pytest.raises(ValueError, match="add the kernels"):
        _ = MinibatchCKA().value
