"""Composites of photographs: who is shown where, what is behind, and that masks tell the truth to the pixel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hansfree.benchmarks import Accessories, ObjectsOnScenes
from hansfree.benchmarks.accessories import HAT_SIZE, SMALLEST, hat_places, thickest_part
from hansfree.benchmarks.composites import Views, cut_out, grained_noise, object_places, render, scene_places
from hansfree.benchmarks.image_files import read_image
from hansfree.benchmarks.photograph_splits import rotated
from hansfree.benchmarks.photographs import ANIMALS, FILES, HATS, SCENES, TASKS, data_root, photographs_folder
from hansfree.config import parse
from hansfree.errors import UserError
from hansfree.experiment import run
from hansfree.parts import RunConfig
from hansfree.runs import read_results

SMALL = {"size": 24, "train": 80, "valid": 40, "test": 80}
SPLITS = ("train", "valid", "valid_ood", "iid", "ood", "shift")
TESTS = ("iid", "ood", "shift")


@pytest.fixture(autouse=True)
def _installed(photographs, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(split):
    return split.batch(torch.arange(len(split)))


def pictures_of(split, some):
    """The pictures that these samples show, as bytes."""
    return {split.objects.pictures[number].numpy().tobytes() for number in split.objects.picture[some].tolist()}


# Places


def corners(place):
    """Where a picture's corners come to lie in the image: the inverse of the map, by solving."""
    ends = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    return torch.linalg.solve(place[:, :2], (ends - place[:, 2]).T).T


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.2, 1.0), st.booleans())
def test_cut_outs_keep_their_shape_turn_little_and_fit(seed, short, upright):
    side = torch.tensor([[short, 1.0] if upright else [1.0, short]])
    a, b, c, d = corners(object_places(side, seeded(seed))[0])
    across, down = b - a, d - a
    assert abs(float(across @ down)) < 1e-4
    assert torch.allclose(
        torch.stack([across.norm(), down.norm()]) / max(across.norm(), down.norm()), side[0], atol=1e-4
    )
    assert 0.6 - 1e-4 <= max(across.norm(), down.norm()) / 2 <= 0.95 + 1e-4
    assert abs(math.atan2(float(down[0]), float(down[1]))) <= math.radians(12) + 1e-4
    points = torch.stack([a, b, c, d])
    too_large = (points.amax(0) - points.amin(0)) > 2
    assert ((points.abs() <= 1 + 1e-4).all(0) | too_large).all()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(1.0, 3.0), st.booleans())
def test_scenes_are_squares_within_the_photograph(seed, long, upright):
    side = torch.tensor([[1.0, long] if upright else [long, 1.0]])
    place = scene_places(side, seeded(seed))[0]
    ends = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) @ place[:, :2].T + place[:, 2]
    assert (ends.abs() <= 1 + 1e-4).all()
    width, height = ((ends.amax(0) - ends.amin(0)) / 2 * side[0]).tolist()
    assert width == pytest.approx(height, rel=1e-4)
    assert 0.5625 - 1e-4 <= width <= 1 + 1e-4


def test_what_is_rendered_as_it_is_averages_two_by_two():
    picture = torch.randint(256, (3, 16, 16), generator=seeded(), dtype=torch.uint8)
    rendered = render(picture, torch.eye(2, 3)[None], torch.ones(1, 3), 8)[0]
    expected = np.asarray(picture, dtype=np.float64).reshape(3, 8, 2, 8, 2).mean((2, 4))
    assert np.abs(rendered.numpy() - expected).max() <= 0.51


def test_colours_never_exceed_their_alpha():
    alpha = torch.randint(256, (1, 16, 16), generator=seeded(), dtype=torch.uint8)
    picture = torch.cat([alpha.expand(3, -1, -1), alpha])
    rendered = render(picture, torch.eye(2, 3)[None], torch.full((1, 3), 1.26), 8)[0]
    assert (rendered[:3] <= rendered[3:]).all()


def test_a_transparent_pixel_s_hidden_colour_never_shows(tmp_path):
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[..., 0] = 255  # hidden red everywhere, a blue square in the middle
    pixels[5:15, 5:15] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = cut_out(tmp_path / "a.png", 13)
    assert picture[0].max() == 0 and picture[2].max() == 255


# Parts


@settings(max_examples=40)
@given(st.integers(8, 60), st.integers(0, 3))
def test_eight_rotations_test_everything_twice_and_validate_it_once(count, order):
    items = list(range(count))
    tested, validated = [], []
    for turn in range(8):
        parts = rotated(items, 8 * order + turn, "things")
        assert sorted(parts["train"] + parts["valid"] + parts["test"]) == items
        assert all(parts.values())
        tested += parts["test"]
        validated += parts["valid"]
    assert sorted(tested) == sorted(items * 2)
    assert sorted(validated) == items


@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
@pytest.mark.parametrize("seed", [0, 3])
def test_no_animal_and_no_scene_is_in_two_parts(made, seed):
    record = made(**SMALL, split_seed=seed).record()
    for what in ("animals", "scenes"):
        parts = {part: str(names) for part, names in record[what].items()}
        words = {part: set(text.replace("[", "").replace("]", "").split(", ")) for part, text in parts.items()}
        assert not words["train"] & words["valid"]
        assert not words["train"] & words["test"]
        assert not words["valid"] & words["test"]


@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
def test_the_tiers_are_animals_of_training_and_animals_that_it_never_saw(made):
    benchmark = made(**{**SMALL, "train": 840})
    train, test = benchmark.split("train"), benchmark.split("shift")
    learned = pictures_of(train, torch.arange(len(train)))
    seen, unseen = (pictures_of(test, test.tiers[tier]) for tier in ("seen", "unseen"))
    assert seen <= learned
    assert unseen and not unseen & learned
    assert [test.label[rows].bincount().tolist() for rows in test.tiers.values()] == [[20, 20], [20, 20]]
    assert sorted(torch.cat(list(test.tiers.values())).tolist()) == list(range(80))
    assert not train.tiers


def test_animals_of_a_class_are_shown_equally_often():
    split = ObjectsOnScenes(**{**SMALL, "train": 840}).split("train")
    counts = split.objects.picture.bincount()
    animals = [animal for animal in ANIMALS if len(animal.files) == 1]
    assert len(animals) > 60
    for label in range(2):
        shown = split.objects.picture[split.label == label].unique()
        single = counts[shown]
        # Animals of several pictures share their turn among them.
        assert single.max() <= 420 // 19 + 1
        assert single.float().quantile(0.75) >= 420 // 33


def test_each_tier_has_rows_of_its_own(tmp_path):
    config = {
        "benchmark": {"name": "objects-on-scenes", **SMALL},
        "model": {"name": "small-cnn", "widths": [4, 8], "norm": "none"},
        "method": {"name": "erm"},
        "training": {"steps": 1, "batch_size": 16},
        "evaluation": {"heatmaps": 0},
    }
    folder = run(parse(RunConfig, config), tmp_path / "run", report=False)
    rows = [row for row in read_results(folder.results)["rows"] if row["group"] is None]
    by_tier = {(row["split"], row["tier"]): row["value"] for row in rows if row["metric"] == "acc"}
    for split in TESTS:
        assert by_tier[split, None] == pytest.approx((by_tier[split, "seen"] + by_tier[split, "unseen"]) / 2)
    gaps = {row["tier"]: row["value"] for row in rows if row["metric"] == "gap"}
    assert gaps == {tier: by_tier["iid", tier] - by_tier["shift", tier] for tier in (None, "seen", "unseen")}


def test_views_are_rendered_once_for_all_that_see_the_same():
    first = ObjectsOnScenes(**SMALL).split("train")
    teacher = ObjectsOnScenes(**SMALL, ground="noise").split("train")
    assert teacher.objects is not first.objects and teacher.objects.pixels is first.objects.pixels
    others = [ObjectsOnScenes(**{**SMALL, **change}).split("train") for change in ({"split_seed": 2}, {"size": 25})]
    assert all(other.objects.pixels is not first.objects.pixels for other in others)
    assert torch.equal(first.objects.pixels, first.objects._rendered())


# Grounds


@pytest.mark.parametrize("split_seed", [0, 1])
@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
def test_the_shortcut_holds_in_training_breaks_in_shift_and_is_gone_in_ood(made, split_seed):
    benchmark = made(**SMALL, split_seed=split_seed)
    for name in ("train", "valid", "iid"):
        assert torch.equal(benchmark.split(name).bias, benchmark.split(name).label)
    assert torch.equal(benchmark.split("shift").bias, 1 - benchmark.split("shift").label)
    seen = set(benchmark.split("train").bias.tolist())
    assert not seen & set(benchmark.split("ood").bias.tolist())
    assert not seen & set(benchmark.split("valid_ood").bias.tolist())
    assert not set(benchmark.split("ood").bias.tolist()) & set(benchmark.split("valid_ood").bias.tolist())


def test_odd_rotations_swap_the_shortcut_unless_told():
    kinds = [ObjectsOnScenes(**SMALL, split_seed=seed).biases[:2] for seed in (0, 1, 2)]
    assert kinds == [("water", "forest"), ("forest", "water"), ("water", "forest")]
    assert ObjectsOnScenes(**SMALL, split_seed=1, swap=False).biases[:2] == ("water", "forest")
    assert Accessories(**SMALL).biases[:2] == Accessories(**SMALL, split_seed=1).biases[1::-1]


@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
@pytest.mark.parametrize("ratio", [0.0, 0.8, 0.95])
def test_the_share_of_aligned_samples_is_exact_in_each_class(made, ratio):
    split = made(**SMALL, bias_ratio=ratio).split("train")
    for label in range(2):
        aligned = split.bias[split.label == label] == label
        assert int(aligned.sum()) == round(ratio * 40)


@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
def test_the_tests_show_the_same_animals_in_the_same_views(made):
    benchmark = made(**SMALL)
    first, *others = (whole(benchmark.split(name)).mask[:, 0] for name in TESTS)
    assert all(torch.equal(first, other) for other in others)
    assert first.amax() == 1 and first.amin() == 0


def test_an_image_is_its_paint_and_the_scene_where_the_mask_leaves_it():
    benchmark = ObjectsOnScenes(**SMALL)
    for name in SPLITS:
        split = benchmark.split(name)
        batch = whole(split)
        layer = split.objects.pixels.double() / 255
        behind = split.scenes.pixels.double() / 255
        expected = layer[:, :3] + (1 - layer[:, 3:]) * behind
        assert (batch.images.double() - expected).abs().max() < 1e-6
        assert torch.equal(batch.mask, layer[:, 3:].float())
        outside = (batch.mask == 0).expand_as(batch.images)
        assert torch.equal(batch.images[outside], behind.float()[outside])
        inside = (batch.mask == 1).expand_as(batch.images)
        assert torch.equal(batch.images[inside], batch.clean[inside])


def test_twins_have_scenes_without_regard_to_the_class():
    split = ObjectsOnScenes(**{**SMALL, "train": 2000}).split("train")
    for label in range(2):
        kinds = split.bias[split.twin[split.label == label]]
        assert 0.4 < kinds.float().mean() < 0.6


def test_twins_of_training_are_drawn_anew_with_a_generator():
    split = ObjectsOnScenes(**SMALL).split("train")
    index = torch.arange(16)
    first, second = split.batch(index, seeded(0)), split.batch(index, seeded(1))
    assert torch.equal(first.images, second.images)
    assert (first.clean != second.clean).flatten(1).any(1).float().mean() > 0.8


def test_pairing_anew_keeps_the_kind_of_scene():
    split = ObjectsOnScenes(**SMALL, bias_ratio=0.8, pairing="anew").split("train")
    fixed = ObjectsOnScenes(**SMALL, bias_ratio=0.8).split("train")
    index = torch.arange(80)
    assert torch.equal(split.batch(index).images, fixed.batch(index).images)
    batch = split.batch(index, seeded(0))
    assert (batch.images != fixed.batch(index).images).flatten(1).any(1).float().mean() > 0.8
    outside = batch.mask[:, 0] == 0
    for row in range(80):  # each scene is one of its own kind's, wherever the animal leaves it
        own = split.scenes.pixels[split.bias == split.bias[row]].float() / 255
        same = (own[:, :, outside[row]] == batch.images[row][:, outside[row]]).flatten(1).all(1)
        assert same.any()


@pytest.mark.parametrize("ground", ["noise", "grained-noise", "mean", "black"])
def test_teachers_may_see_other_grounds(ground):
    benchmark = ObjectsOnScenes(**SMALL, ground=ground)
    split = benchmark.split("train")
    batch = whole(split)
    assert (split.bias == benchmark.biases.index("none")).all()
    usual = whole(ObjectsOnScenes(**SMALL).split("train"))
    assert torch.equal(batch.mask, usual.mask)
    inside = (batch.mask == 1).expand_as(batch.images)
    assert torch.equal(batch.images[inside], usual.images[inside])
    outside = (batch.mask[:, 0] == 0)[:, None].expand_as(batch.images)
    if ground == "black":
        assert batch.images[outside].abs().max() == 0
    elif ground == "mean":
        colour = usual.images.mean((2, 3), keepdim=True).expand_as(usual.images)
        assert torch.allclose(batch.images[outside], colour[outside], atol=1e-6)
    else:
        assert 0.45 < batch.images[outside].mean() < 0.55
        index = torch.arange(80)
        redrawn = [split.batch(index, seeded(seed)).images for seed in (0, 0, 1)]
        assert torch.equal(redrawn[0], redrawn[1]) and not torch.equal(redrawn[0], redrawn[2])
    assert torch.equal(benchmark.split("iid").bias, benchmark.split("iid").label)


def test_the_clean_ground_is_what_a_teacher_of_that_ground_was_trained_on():
    batch = whole(ObjectsOnScenes(**SMALL, clean_ground="black").split("train"))
    assert torch.equal(batch.clean, whole(ObjectsOnScenes(**SMALL, ground="black").split("train")).images)
    assert torch.equal(batch.images, whole(ObjectsOnScenes(**SMALL).split("train")).images)


def test_grained_noise_comes_in_squares_of_five_sizes():
    seed = torch.arange(10)
    noise = grained_noise(seed, 40)
    for row in range(10):
        width = 2 ** (row % 5)
        cells = (
            noise[row, :, : 40 // width * width, : 40 // width * width].unfold(1, width, width).unfold(2, width, width)
        )
        assert torch.equal(cells.amax((-1, -2)), cells.amin((-1, -2)))
        assert len(cells[..., 0, 0].unique()) > 0.99 * cells[..., 0, 0].numel()


# Hats


@pytest.mark.parametrize("seed", range(5))
def test_the_thickest_part_is_where_the_outline_is_farthest(seed):
    random = np.random.default_rng(seed)
    alpha = np.zeros((14, 20), np.uint8)
    for _ in range(3):
        top, left = random.integers(0, 8, 2)
        alpha[top : top + random.integers(3, 7), left : left + random.integers(4, 12)] = 255
    picture = torch.from_numpy(np.stack([alpha] * 4))
    inside = np.argwhere(np.pad(alpha, 1) > 0)
    outside = np.argwhere(np.pad(alpha, 1) == 0)
    distances = [min(math.dist(point, other) for other in outside) for point in inside]
    x, y, share = thickest_part(picture)
    assert share * 20 == pytest.approx(max(distances))
    row, column = round((y + 1) * 14 / 2 - 0.5), round((x + 1) * 20 / 2 - 0.5)
    assert min(math.dist((row + 1, column + 1), other) for other in outside) == pytest.approx(max(distances))


def test_hats_sit_in_the_middle_of_the_body_and_are_as_large_as_told():
    animal = torch.zeros(4, 20, 30, dtype=torch.uint8)
    animal[:, 4:16, 2:28] = 255
    hat = torch.full((4, 10, 16), 255, dtype=torch.uint8)
    side = torch.tensor([[1.0, 20 / 30]]).expand(50, 2)
    views = Views((animal,), torch.zeros(50, dtype=torch.long), object_places(side, seeded()), torch.ones(50, 3), 64)
    x, y, share = thickest_part(animal)
    places = hat_places(views, torch.tensor([[x, y, share]]), (hat,), torch.zeros(50, dtype=torch.long))
    for place, own in zip(places, views.place):
        ends, body = corners(place), corners(own)
        centre = body.mean(0) + (x * (body[1] - body[0]) + y * (body[3] - body[0])) / 2
        assert torch.allclose(ends.mean(0), centre, atol=1e-4)
        longer = (body[1] - body[0]).norm()
        assert (ends[1] - ends[0]).norm() == pytest.approx(
            float(max(2 * HAT_SIZE * share, SMALLEST) * longer), rel=1e-4
        )
        assert (ends[3] - ends[0]).norm() == pytest.approx(float((ends[1] - ends[0]).norm()) * 10 / 16, rel=1e-4)


def test_a_hat_covers_the_animal_and_nothing_else_changes():
    benchmark = Accessories(**SMALL)
    for name in ("train", "valid_ood", "iid", "shift"):
        batch = whole(benchmark.split(name))
        hat = batch.mask[:, 1:]
        assert torch.equal(
            batch.images[(hat == 0).expand_as(batch.images)], batch.clean[(hat == 0).expand_as(batch.clean)]
        )
        assert (hat > 0.5).flatten(1).any(1).all()
        covered = ((hat > 0.5) & (batch.mask[:, :1] > 0.5)).flatten(1).sum(1) / (hat > 0.5).flatten(1).sum(1)
        assert covered.min() > 0.4
    bare = whole(benchmark.split("ood"))
    assert torch.equal(bare.images, bare.clean) and bare.mask[:, 1].abs().max() == 0
    assert torch.equal(bare.images, whole(benchmark.split("shift")).clean)


def test_teachers_may_be_trained_on_any_hat_or_none():
    anything = Accessories(**{**SMALL, "train": 1000}, worn="random").split("train")
    for label in range(2):
        assert 0.4 < anything.bias[anything.label == label].float().mean() < 0.6
    bare = whole(Accessories(**SMALL, worn="none").split("train"))
    assert torch.equal(bare.images, whole(Accessories(**SMALL).split("train")).clean)


# Seeds, mistakes, and the photographs themselves


@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
def test_the_record_tells_data_apart(made):
    def prints(**settings):
        return {name: split["sha256"] for name, split in made(**{**SMALL, **settings}).record()["splits"].items()}

    assert prints() == prints()
    for change in ({"split_seed": 2}, {"bias_ratio": 0.5}, {"task": "waterbird/landbird"}):
        assert prints()["train"] != prints(**change)["train"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"task": "bird/mamal"}, "did you mean 'bird/mammal'"),
        ({"bias_ratio": 1.5}, "benchmark.bias_ratio"),
        ({"size": 4}, "benchmark.size is 4"),
        ({"test": 3}, "benchmark.test is 3"),
        ({"split_seed": -1}, "benchmark.split_seed"),
    ],
)
@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
def test_mistakes_are_told_by_their_key(made, setting, said):
    with pytest.raises(UserError, match=said):
        made(**{**SMALL, **setting})


@pytest.mark.parametrize("made", [ObjectsOnScenes, Accessories])
def test_without_the_photographs_it_says_how_to_get_them(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="run: hansfree data get objects-on-scenes"):
        made()
    with pytest.raises(UserError, match=r"benchmark\.root"):
        made(root=tmp_path)


def test_one_missing_photograph_is_named(tmp_path):
    for file in FILES[1:]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=FILES[0]):
        photographs_folder(tmp_path)


def test_the_list_of_photographs_is_whole():
    assert len(FILES) == len(set(FILES))
    assert {animal.kind for animal in ANIMALS} == {
        kind for task in TASKS.values() for kinds in task.values() for kind in kinds
    }
    assert len({animal.name for animal in ANIMALS}) == len(ANIMALS)
    assert len({scene.name for scene in SCENES}) == len(SCENES)


def test_the_photographs_are_what_the_list_says(monkeypatch):
    monkeypatch.undo()
    try:
        folder = photographs_folder(None)
    except UserError:
        pytest.skip(f"no photographs in {data_root()}")
    for subject in (*ANIMALS, *HATS):
        for file in subject.files:
            alpha = cut_out(folder / file, 48)[3]
            assert (alpha < 10).float().mean() > 0.05 and (alpha > 245).float().mean() > 0.05, file
    for subject in SCENES:
        for file in subject.files:
            assert min(read_image(folder / file).size) >= 350, file
