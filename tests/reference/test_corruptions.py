"""Corruptions of images against slow versions of their definitions, pixel by pixel, and against scikit-image."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates, zoom
from skimage import color, filters

from hansfree.benchmarks import corruptions
from hansfree.benchmarks.corruptions import CORRUPTIONS, SETS, SEVERITIES, corrupt, disc, dragged, enlarged, plasma
from hansfree.errors import UserError

EVERY = [(name, severity) for name in CORRUPTIONS for severity in (1, 3, 5)]
ONE_BY_ONE = ("brightness", "contrast", "saturate", "jpeg", "pixelate", "gaussian-blur", "defocus-blur", "zoom-blur")
"""Corruptions in which nothing is drawn."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=3, height=20, width=20, seed=0):
    """Smooth colours with an edge, a grey corner and a black one, in float64."""
    draw = np.random.default_rng(seed)
    images = filters.gaussian(draw.random((count, 3, height, width)), (0, 0, 1.5, 1.5))
    images = (images - images.min()) / np.ptp(images)
    images[:, :, :, width // 2 :] *= 0.6
    images[:, :, :3, :3] = 0.5
    images[:, :, -3:, -3:] = 0
    return torch.from_numpy(images)


def hwc(x):
    return x.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("name", "severity"), EVERY)
def test_gives_images_of_the_same_kind_that_the_generator_alone_decides(name, severity):
    images = (255 * pictures(height=18, width=23)).to(torch.uint8)
    first, again = (corrupt(images, name, severity, seeded(1)) for _ in range(2))
    assert first.dtype == torch.uint8 and first.shape == images.shape
    assert torch.equal(first, again)
    assert torch.equal(first, images) == (name == "original")
    floats = corrupt(images.double() / 255, name, severity, seeded(1))
    assert floats.dtype == torch.float64 and floats.min() >= 0 and floats.max() <= 1
    other = corrupt(images, name, severity, seeded(2))
    assert torch.equal(first, other) == (name in (*ONE_BY_ONE, "original"))


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in ("original", "saturate", "elastic")])
def test_is_further_from_the_image_the_severer_it_is(name):
    """Saturation falls at first and rises then; an elastic image is moved less and bent more."""
    images = pictures(count=8, height=32, width=32).float()
    mild, severe = ((corrupt(images, name, s, seeded(s)) - images).square().mean() for s in (1, 5))
    assert severe > mild


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_an_image_s_corruption_does_not_depend_on_the_others(name):
    images = pictures(height=16, width=16)
    together = corrupt(images, name, 4, seeded())
    alone = torch.cat([corrupt(image[None], name, 4, seeded()) for image in images])
    assert torch.allclose(together, alone, atol=1e-12)


def test_refuses_an_unknown_corruption_and_severity():
    with pytest.raises(UserError, match="did you mean 'snow'"):
        corrupt(pictures(), "snwo", 1, seeded())
    with pytest.raises(UserError, match="from 1 to 5"):
        corrupt(pictures(), "snow", 6, seeded())


def test_the_two_sets_have_ten_each_in_their_order():
    assert SETS["type-0"][:3] == ("snow", "frost", "fog") and SETS["type-0"][-1] == "saturate"
    assert SETS["type-1"][0] == "gaussian-noise" and SETS["type-1"][-1] == "original"
    assert len(set(SETS["type-0"]) | set(SETS["type-1"])) == 20


# Noise: its moments


FLAT = torch.full((4, 3, 100, 100), 0.5, dtype=torch.float64)
DEVIATIONS = {
    "gaussian-noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "speckle-noise": tuple(0.5 * c for c in (0.06, 0.1, 0.12, 0.16, 0.2)),
    "shot-noise": tuple(math.sqrt(0.5 / c) for c in (500, 250, 100, 75, 50)),
    "impulse-noise": tuple(0.5 * math.sqrt(c) for c in (0.01, 0.02, 0.03, 0.05, 0.07)),
}


@pytest.mark.parametrize("name", DEVIATIONS)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_published_strength(name, severity):
    noisy = CORRUPTIONS[name](FLAT, severity, seeded(severity))
    assert abs(noisy.mean() - 0.5) < 0.002
    assert noisy.std() == pytest.approx(DEVIATIONS[name][severity - 1], rel=0.03)


def test_impulses_are_black_or_white_and_nothing_else():
    noisy = corruptions.impulse_noise(FLAT, 5, seeded())
    assert set(noisy.unique().tolist()) == {0.0, 0.5, 1.0}
    assert (noisy == 1).double().mean() == pytest.approx(0.035, rel=0.1)


def test_shot_noise_comes_in_whole_photons_and_grows_with_the_light():
    noisy = corruptions.shot_noise(torch.cat([FLAT, FLAT / 5]), 5, seeded())
    assert torch.allclose((50 * noisy).round(), 50 * noisy, atol=1e-9)
    assert noisy[:4].var() == pytest.approx(5 * noisy[4:].var().item(), rel=0.1)


# Light and encoding: scikit-image and Pillow


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturation_are_those_of_hsv(severity):
    images = pictures()
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    a, b = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    bright, vivid = (corrupt(images, name, severity, seeded()) for name in ("brightness", "saturate"))
    for number, image in enumerate(images):
        hsv = color.rgb2hsv(hwc(image))
        brighter, more_vivid = hsv.copy(), hsv.copy()
        brighter[..., 2] = (hsv[..., 2] + more).clip(0, 1)
        more_vivid[..., 1] = (a * hsv[..., 1] + b).clip(0, 1)
        assert np.abs(hwc(bright[number]) - color.hsv2rgb(brighter)).max() < 1e-9
        assert np.abs(hwc(vivid[number]) - color.hsv2rgb(more_vivid)).max() < 1e-9


def test_contrast_keeps_the_mean_of_each_channel():
    images = pictures()
    for severity, c in zip(SEVERITIES, (0.75, 0.5, 0.4, 0.3, 0.15)):
        flat = corruptions.contrast(images, severity, seeded())
        assert torch.allclose(flat.mean((2, 3)), images.mean((2, 3)))
        assert torch.allclose(flat.std((2, 3)), c * images.std((2, 3)))


def test_jpeg_and_pixels_are_pillow_s():
    images = (255 * pictures(height=32, width=32)).round().to(torch.uint8)
    jpeg, coarse = corrupt(images, "jpeg", 5, seeded()), corrupt(images, "pixelate", 5, seeded())
    for number, image in enumerate(images):
        picture, file = Image.fromarray(hwc(image)), io.BytesIO()
        picture.save(file, "JPEG", quality=40)
        assert np.array_equal(hwc(jpeg[number]), np.asarray(Image.open(file)))
        small = picture.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        assert np.array_equal(hwc(coarse[number]), np.asarray(small))


# Blur


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_is_scikit_image_s(severity):
    images = pictures()
    blurred = corruptions.gaussian_blur(images, severity, seeded())
    for number, image in enumerate(images):
        sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
        expected = filters.gaussian(hwc(image), sigma=sigma, channel_axis=2)
        assert np.abs(hwc(blurred[number]) - expected).max() < 1e-12


@pytest.mark.parametrize(("radius", "alias"), [(0.3, 0.4), (1.0, 0.2), (1.5, 0.1), (2.5, 0.6)])
def test_a_disc_is_an_indicator_smoothed_by_three_taps(radius, alias):
    kernel = disc(radius, alias).numpy()
    reach = len(kernel) // 2
    taps = np.array([math.exp(-1 / (2 * alias**2)), 1, math.exp(-1 / (2 * alias**2))])
    taps /= taps.sum()
    inside = {(i, j) for i in range(-9, 10) for j in range(-9, 10) if i * i + j * j <= radius**2}
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            near = [(u, v) for u in (-1, 0, 1) for v in (-1, 0, 1) if (i + u, j + v) in inside]
            assert kernel[i + reach, j + reach] == pytest.approx(
                sum(taps[u + 1] * taps[v + 1] for u, v in near) / len(inside)
            )
    assert kernel.sum() == pytest.approx(1)


def test_defocus_mirrors_the_image_at_its_outermost_pixels():
    image = pictures(count=1, height=9, width=9)
    blurred, kernel = corruptions.defocus_blur(image, 5, seeded()), disc(1.5, 0.1)
    reach = len(kernel) // 2
    for row, column in ((0, 0), (0, 4), (5, 8), (4, 4)):
        total = torch.zeros(3, dtype=torch.float64)
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                y, x = (8 - abs(8 - abs(at)) for at in (row + i, column + j))
                total += kernel[i + reach, j + reach] * image[0, :, y, x]
        assert torch.allclose(blurred[0, :, row, column], total)


@pytest.mark.parametrize("degrees", [0.0, 30.0, -45.0, -90.0, -135.0])
def test_a_dragged_image_is_a_one_sided_gaussian_along_a_line(degrees):
    image = pictures(count=1, height=12, width=15)
    blurred = dragged(image, 3, 1.5, torch.tensor([degrees]))
    weights = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(7)]
    for row in range(12):
        for column in range(15):
            total = torch.zeros(3, dtype=torch.float64)
            for i, weight in enumerate(weights):
                y = row + math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
                x = column + math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
                total += weight / sum(weights) * image[0, :, min(max(y, 0), 11), min(max(x, 0), 14)]
            assert torch.allclose(blurred[0, :, row, column], total, atol=1e-7)


@pytest.mark.parametrize("side", [28, 32, 33])
@pytest.mark.parametrize("factor", [1.0, 1.13, 1.25, 1.75, 2.25])
def test_enlarging_is_scipy_s_zoom_of_the_middle(side, factor):
    image = pictures(count=1, height=side, width=side)
    keep = math.ceil(side / factor)
    top = (side - keep) // 2
    larger = zoom(hwc(image[0])[top : top + keep, top : top + keep], (factor, factor, 1), order=1)
    trim = (len(larger) - side) // 2
    expected = larger[trim : trim + side, trim : trim + side]
    assert np.abs(hwc(enlarged(image, factor)[0]) - expected).max() < 1e-9


def test_glass_takes_pixels_from_above_and_the_left_and_keeps_two_rows_and_columns(monkeypatch):
    monkeypatch.setattr(corruptions, "_smooth", lambda x, sigma: x)
    row, column = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    image = torch.stack([row, column, row])[None].double()
    for severity, most in ((1, 1), (5, 2)):
        step = (image - corruptions.glass_blur(image, severity, seeded()))[0, :2]
        assert step.min() == 0 and step.max() == most
        assert step[:, :2].abs().sum() == step[:, :, :2].abs().sum() == 0
        assert step[:, 2:, 2:].mean() == pytest.approx(most / 2, abs=0.1)


# Weather


def test_plasma_is_made_of_midpoints(monkeypatch):
    """Without noise but for the first four points, every other point is the mean of its neighbours on the torus."""
    calls, drawn = [], torch.rand

    def rand(shape, generator=None):
        calls.append(shape)
        return drawn(shape, generator=generator) if len(calls) <= 3 else torch.full(shape, 0.5)

    monkeypatch.setattr(torch, "rand", rand)
    heights = plasma(2, 8, 2.0, seeded())
    assert heights.amin((1, 2)).tolist() == [0, 0] and heights.amax((1, 2)).tolist() == [1, 1]
    for y in (2, 6):
        for x in (2, 6):
            corners = [heights[:, (y + a) % 8, (x + b) % 8] for a in (-2, 2) for b in (-2, 2)]
            assert torch.allclose(heights[:, y, x], torch.stack(corners).mean(0), atol=1e-5)
    for y, x in ((0, 1), (3, 2), (7, 4)):
        around = [heights[:, (y + a) % 8, (x + b) % 8] for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))]
        assert torch.allclose(heights[:, y, x], torch.stack(around).mean(0), atol=1e-5)


def test_rougher_plasma_decays_less():
    def roughness(decay):
        clouds = plasma(16, 32, decay, seeded())
        return (clouds - clouds.roll(1, 2)).square().mean() / clouds.var()

    assert roughness(1.75) > 1.3 * roughness(3)


def test_fog_lightens_and_leaves_the_largest_value():
    image = pictures(count=2, height=32, width=32)
    foggy = corruptions.fog(image, 3, seeded())
    cloud = plasma(2, 32, 2.5, seeded())[:, None].double()
    most = image.amax((1, 2, 3), keepdim=True)
    assert torch.allclose(foggy, (image + 0.75 * cloud) * most / (most + 0.75))
    assert foggy.max() <= image.max() + 1e-9


def test_snow_pales_and_its_flakes_are_the_same_upside_down():
    grey = torch.full((2, 3, 16, 16), 0.25, dtype=torch.float64)
    layer = corruptions.snow(grey, 5, seeded()) - (0.8 * 0.25 + 0.2 * (1.5 * 0.25 + 0.5))
    assert layer.min() > -1e-9 and layer.max() > 0.05
    assert torch.allclose(layer, layer.rot90(2, (2, 3)))
    assert torch.allclose(layer[:, 0], layer[:, 2])


def test_mud_covers_and_water_adds():
    dark = torch.zeros(4, 3, 32, 32, dtype=torch.float64)
    mud = corruptions.spatter(dark, 5, seeded())
    assert torch.allclose(mud.amax((0, 2, 3)) * 255, torch.tensor([63.0, 42.0, 20.0]).double(), atol=0.5)
    share = (mud[:, 0] > 0).double().mean()
    assert 0.05 < share < 0.6
    water = corruptions.spatter(dark, 3, seeded())
    assert torch.allclose(water.amax((2, 3)) * 255, 0.5 * torch.tensor([175.0, 238.0, 238.0]).double(), atol=1e-9)


def test_frost_dims_the_image_and_adds_ice():
    for severity, (a, b) in zip(SEVERITIES, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))):
        image = pictures(height=32, width=32)
        ice = (corruptions.frost(image, severity, seeded()) - a * image) / b
        assert ice.min() >= 0 and ice.max() <= 1 and ice.amax() > 0.9
        assert (ice[:, 2] >= ice[:, 0]).all()


# Elastic


def test_elastic_is_an_affine_map_and_then_a_smooth_field(monkeypatch):
    """With the draws known, every pixel is where the three moved points and the field say."""
    image = pictures(count=1, height=24, width=24).float()
    corners, field = torch.rand(1, 3, 2, dtype=torch.float64), torch.rand(1, 2, 24, 24)
    given = iter((corners, field))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None, dtype=None: next(given))
    found = corruptions.elastic(image, 3, seeded())
    points = np.array([[12 + 8, 12 + 8], [12 + 8, 12 - 8], [12 - 8, 12 - 8]], dtype=float)
    moved = points + 0.06 * 24 * (2 * corners[0].numpy() - 1)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # (column, row, 1) of the result to the image's
    row, column = np.mgrid[:24, :24].astype(float)
    source = np.stack([column, row, np.ones_like(row)], -1) @ back
    offset = [
        0.08 * 24 * filters.gaussian(2 * field[0, i].double().numpy() - 1, 0.06 * 24, mode="reflect", truncate=3)
        for i in (0, 1)
    ]
    for channel in range(3):
        warped = map_coordinates(image[0, channel].numpy(), [source[..., 1], source[..., 0]], order=1, mode="mirror")
        expected = map_coordinates(warped, [row + offset[1], column + offset[0]], order=1, mode="reflect")
        assert np.abs(found[0, channel].numpy() - expected).max() < 1e-4


def test_elastic_of_the_mildest_kind_only_moves_three_points():
    image = torch.full((2, 3, 20, 26), 0.3)
    assert torch.allclose(corruptions.elastic(image, 1, seeded()), image, atol=1e-6)
