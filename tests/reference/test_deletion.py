"""Deletion and insertion, edges: written again slowly, held against Quantus, SciPy and scikit-image, and planted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import sobel
from scipy.stats import pearsonr
from skimage.filters import gaussian
from torch import nn

from hansfree.errors import UserError
from hansfree.metrics.alignment import edge_alignment, mask_alignment, sobel_magnitude
from hansfree.metrics.deletion import FILLS, area, blurred, deletion_curve, insertion_curve, random_map
from hansfree.torchvision_guard import import_torchvision


def some(count=3, channels=2, side=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, side, side, generator=generator, dtype=torch.double)
    return images, torch.randn(count, channels, side, side, generator=generator, dtype=torch.double)


def network(channels=2, side=6):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 4)).double()


def slow_curve(score, image, other, map, steps):
    """One image, one pixel at a time: after each share of the pixels the score, most relevant pixels first."""
    picture = map.sum(0)
    order = sorted(
        ((y, x) for y in range(picture.shape[0]) for x in range(picture.shape[1])),
        key=lambda place: (-float(picture[place]), place),
    )
    shown, values, done = image.clone(), [score(image[None])], 0
    for step in range(1, steps + 1):
        while done < round(len(order) * step / steps):
            y, x = order[done]
            shown[:, y, x] = other[:, y, x]
            done += 1
        values.append(score(shown[None]))
    return values


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("steps", [1, 5, 36])
def test_curves_are_those_of_one_pixel_at_a_time(fill, steps):
    images, map = some()
    model, target = network(), torch.tensor([0, 2, 1])

    def probability(shown):
        return model(shown).softmax(1).gather(1, target[:, None])[:, 0]

    with torch.no_grad():
        gone = deletion_curve(probability, images, map, fill=fill, steps=steps)
        back = insertion_curve(probability, images, map, fill=fill, steps=steps)
        other = FILLS[fill](images)
        for row, label in enumerate(target.tolist()):

            def score(shown, label=label):
                return float(model(shown).softmax(1)[0, label])

            slow = slow_curve(score, images[row], other[row], map[row], steps)
            assert gone[row].tolist() == pytest.approx(slow, abs=1e-12)
            slow = slow_curve(score, other[row], images[row], map[row], steps)
            assert back[row].tolist() == pytest.approx(slow, abs=1e-12)
            published = (sum(slow) - slow[0] / 2 - slow[-1] / 2) / (len(slow) - 1)
            assert float(area(back)[row]) == pytest.approx(published, abs=1e-12)


def test_deletion_is_the_pixel_flipping_of_quantus():
    import_torchvision("torchvision.models")
    quantus = pytest.importorskip("quantus")
    images, map = some(channels=1)
    images = images - images.amin((1, 2, 3), keepdim=True)  # what Quantus calls black is an image's darkest value
    model, target = network(channels=1), torch.tensor([0, 2, 1])
    flipping = quantus.PixelFlipping(
        features_in_step=9, normalise=False, perturb_baseline="black", disable_warnings=True, display_progressbar=False
    )
    theirs = flipping(
        model=model.float().eval(), x_batch=images.float().numpy(), y_batch=target.numpy(), a_batch=map.float().numpy(),
        device="cpu", softmax=True,
    )  # fmt: skip
    with torch.no_grad():
        ours = deletion_curve(
            lambda shown: model(shown).softmax(1).gather(1, target[:, None])[:, 0],
            images.float(), map.float(), fill="black", steps=4,
        )  # fmt: skip
    assert np.allclose(ours[:, 1:].numpy(), theirs, atol=1e-6)


def test_a_map_of_the_pixels_that_count_beats_every_other():
    """The class's probability is the mean of a quarter of the pixels: the best areas are known."""
    images = torch.ones(2, 1, 4, 4)
    there = torch.zeros(2, 1, 4, 4)
    there[..., :2, :2] = 1

    def probability(shown):
        return (shown * there).sum((1, 2, 3)) / 4

    best = area(deletion_curve(probability, images, there, fill="black", steps=16))
    worst = area(deletion_curve(probability, images, -there, fill="black", steps=16))
    # The trapezoid rule under a fall from 1 to 0 over 4 of 16 steps, and under 12 steps at 1 before such a fall.
    assert best.tolist() == pytest.approx([2 / 16] * 2)
    assert worst.tolist() == pytest.approx([14 / 16] * 2)
    back = area(insertion_curve(probability, images, there, fill="black", steps=16))
    assert back.tolist() == pytest.approx([14 / 16] * 2)
    chance = area(deletion_curve(probability, images, random_map(images), fill="black", steps=16))
    assert (best < chance).all() and (chance < worst).all()


def test_the_blur_is_scikit_images():
    images, _ = some(count=1, channels=2, side=15)
    theirs = gaussian(images[0].numpy(), sigma=5.0, truncate=1.0, mode="mirror", channel_axis=0)
    assert np.allclose(blurred(images)[0].numpy(), theirs, atol=1e-12)


def test_no_step_is_refused():
    images, map = some()
    with pytest.raises(UserError, match="at least one step"):
        deletion_curve(lambda shown: shown.sum((1, 2, 3)), images, map, steps=0)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-20, 1e20), steps=st.integers(1, 9))
def test_curves_begin_and_end_with_whole_images_and_do_not_see_scale(seed, scale, steps):
    images, map = some(seed=seed)
    probability = network()
    score = lambda shown: probability(shown).softmax(1)[:, 0]  # noqa: E731
    with torch.no_grad():
        gone = deletion_curve(score, images, map, fill="black", steps=steps)
        assert torch.equal(gone, deletion_curve(score, images, map * scale, fill="black", steps=steps))
        assert torch.allclose(gone[:, 0], score(images))
        assert torch.allclose(gone[:, -1], score(torch.zeros_like(images)))
    assert ((area(gone) >= gone.amin(1) - 1e-12) & (area(gone) <= gone.amax(1) + 1e-12)).all()


# Edges --------------------------------------------------------------------------------------------------------


def test_edges_are_scipys():
    images, _ = some(channels=3, side=9)
    for image, found in zip(images, sobel_magnitude(images)):
        grey = image.mean(0).numpy()
        theirs = np.hypot(sobel(grey, axis=0, mode="nearest"), sobel(grey, axis=1, mode="nearest"))
        assert np.allclose(found.numpy(), theirs, atol=1e-12)


def test_alignments_are_correlations_of_the_maps_size():
    images, map = some(channels=3, side=9)
    mask = (images.mean(1) > 0.5).double()
    size = map.abs().sum(1)
    for row in range(len(images)):
        edges = sobel_magnitude(images[row : row + 1])[0]
        expected = pearsonr(size[row].flatten(), edges.flatten()).statistic
        assert float(edge_alignment(map, images)[row]) == pytest.approx(expected, abs=1e-12)
        expected = pearsonr(size[row].flatten(), mask[row].flatten()).statistic
        assert float(mask_alignment(map, mask)[row]) == pytest.approx(expected, abs=1e-12)


def test_planted_maps_are_told_apart():
    images = torch.zeros(1, 1, 12, 12)
    images[..., 3:9, 3:9] = 1
    signs = torch.where(torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5, 1.0, -1.0)
    edges = sobel_magnitude(images)[:, None].float() * signs * 1e-12
    assert float(edge_alignment(edges, images)) == pytest.approx(1)
    assert float(mask_alignment(images * signs, images[:, 0])) == pytest.approx(1)
    assert float(mask_alignment(1 - images, images[:, 0])) == pytest.approx(-1)
    assert edge_alignment(torch.ones_like(images), images).isnan().all()
