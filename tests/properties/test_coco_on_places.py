"""COCO-on-Places on small folders in the original layouts: masks, both indexings, what is behind what, bad input."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hansfree.benchmarks.coco_objects import CocoObject
from hansfree.benchmarks.coco_on_places import (
    KINDS,
    MIXED,
    OOD,
    OWN,
    VALID_OOD,
    CocoOnPlaces,
    Pools,
    Scene,
    authors_plan,
    fixed_plan,
)
from hansfree.errors import UserError

COUNTS = {"train": 3, "valid": 1, "test": 1}


@pytest.fixture
def made(coco_and_places):
    return lambda **settings: CocoOnPlaces(**{**coco_and_places, **COUNTS, "size": 24, **settings})


def whole(split):
    return split.batch(torch.arange(len(split)))


def files(split):
    return [sample.thing.file for sample in split.samples]


def scenes(split):
    return [sample.scene.file for sample in split.samples]


# Masks


def thing(segmentation, height=16, width=20):
    return CocoObject("instances.json", 7, 1, "1.jpg", width, height, 1.0, segmentation)


def runs_of(mask):
    """Lengths of runs down the columns, slowly."""
    counts, value = [0], 0
    for column in mask.T:
        for pixel in column:
            if pixel != value:
                counts.append(0)
                value = pixel
            counts[-1] += 1
    return counts


def packed(counts):
    """The same as a text, five bits a character, as COCO's tools write it."""
    text = ""
    for place, count in enumerate(counts):
        number = count - counts[place - 2] if place > 2 else count
        while True:
            bits, number = number & 31, number >> 5
            ends = number == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if ends else 32))
            if ends:
                break
    return text


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 70), st.floats(0.01, 1))
def test_runs_are_read_as_numbers_and_as_text(seed, height, width, share):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    mask[0, 0] = 1
    counts = runs_of(mask)
    for told in (counts, packed(counts)):
        found = thing({"size": [height, width], "counts": told}, height, width).mask()
        assert found.dtype == np.uint8 and (found == 255 * mask).all()


def test_a_text_that_coco_s_own_tools_wrote():
    text = "U8b0b000000000000GG00000000000000000000000000b09G00000000000Z7"  # pycocotools 2.0.11
    found = thing({"size": [36, 35], "counts": text}, 36, 35).mask()
    coarse = [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert ((found > 0) == np.kron(coarse, np.ones((9, 7)))).all()


def test_polygons_hold_the_pixels_whose_middles_are_inside():
    found = thing([[4, 3, 15, 3, 15, 12, 4, 12], [17.4, 1.4, 18.6, 1.4, 18.6, 2.6, 17.4, 2.6]]).mask()
    expected = np.zeros((16, 20), np.uint8)
    expected[3:12, 4:15] = 255
    expected[1:3, 17:19] = 255
    assert (found == expected).all()


BAD_MASKS = {
    "it has 16 x 19 pixels, its image 16 x 20": {"size": [16, 19], "counts": [16 * 19]},
    "cannot reshape": {"size": [16, 20], "counts": [3, 4]},
    "it covers no pixel": [],
    "counts": {"size": [16, 20]},
    "zip": [[1, 2, 3]],
    "not iterable": None,
}


@pytest.mark.parametrize("said", BAD_MASKS)
def test_a_bad_mask_is_told_by_its_annotation(said):
    with pytest.raises(UserError, match=rf"^The mask in annotation 7 of instances\.json cannot be read \(.*{said}"):
        thing(BAD_MASKS[said]).mask()


# What falls where


def test_splits_have_the_authors_kinds_of_scenes(made):
    benchmark = made()
    for name in benchmark.split_names():
        split = benchmark.split(name)
        assert len(split) == 9 * COUNTS[{"train": "train", "valid": "valid", "valid_ood": "valid"}.get(name, "test")]
        assert len(set(Counter(split.label.tolist()).values())) == 1
    for name in ("train", "valid", "iid"):
        assert torch.equal(benchmark.split(name).bias, benchmark.split(name).label)
    shift = benchmark.split("shift")
    assert (shift.bias != shift.label).all() and (shift.bias < 9).all()
    kinds = {name: {KINDS[kind] for kind in benchmark.split(name).bias.tolist()} for name in ("ood", "valid_ood")}
    assert kinds["ood"] <= set(OOD) and kinds["valid_ood"] <= set(VALID_OOD)
    assert benchmark.biases[:9] == OWN and len(set(benchmark.biases)) == 20
    assert files(shift) == files(benchmark.split("iid")) == files(benchmark.split("ood"))
    assert files(benchmark.split("valid")) == files(benchmark.split("valid_ood"))


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_fixed_shows_each_image_in_one_part_and_each_scene_once(made, ratio):
    benchmark = made(bias_ratio=ratio)
    used = [file for name in ("train", "valid", "iid") for file in files(benchmark.split(name))]
    assert max(Counter(used).values()) == 1
    shown = [scene for name in benchmark.split_names() for scene in scenes(benchmark.split(name))]
    assert max(Counter(shown).values()) == 1
    train = benchmark.split("train")
    assert int((train.bias == train.label).sum()) == round(ratio * 27)
    minority = train.bias[train.bias != train.label].tolist()
    assert {KINDS[kind] for kind in minority} <= set(MIXED)
    if ratio == 0.6:
        assert all(int((train.bias == train.label)[train.label == y].sum()) in (1, 2) for y in range(9))


def test_fixed_leaves_out_small_objects_and_regions_of_many(made):
    split = made().split("train")
    assert [int(file[:12]) for file in files(split)[:3]] == [0, 2, 3]
    assert all(sample.thing.area >= 10_000 and sample.thing.segmentation[0][0] == 4 for sample in split.samples)


def test_the_largest_object_of_an_image_is_shown(made):
    areas = [sample.thing.area for sample in made(train=6).split("train").samples]
    assert set(areas) <= {12_000, 11_000}


def pools(size):
    """Scenes whose file is their kind's name and their place in the pool."""

    def pool(*kinds):
        return [Scene(f"{'+'.join(kinds)} {number}", KINDS.index(kinds[0])) for number in range(size)]

    return Pools([pool(kind) for kind in OWN], pool(*MIXED), pool(*VALID_OOD), pool(*OOD))


def candidates(areas, apart=0):
    """The same areas for each class; images are numbered from 0, which a set keeps in order, ``apart`` more each."""
    return [
        {i + y * apart: CocoObject("a", i, i + y * apart, f"{y}/{i}", 9, 9, area, []) for i, area in enumerate(areas)}
        for y in range(9)
    ]


def as_published(areas, counts, strength, coin, other):
    """What the published script does, told once more: counters and all. Gives split -> [(image, scene)]."""
    out = {name: [] for name in ("train", "valid", "valid_ood", "iid", "ood", "shift")}
    mixed, valid_pool, test_pool = "+".join(MIXED), "+".join(VALID_OOD), "+".join(OOD)
    tr_s = val_s = te_s = 0
    for c in range(9):
        i, tr_si, val_si, te_si = -1, 0, 0, 0
        while tr_si < counts["train"]:
            i += 1
            if areas[i] < 10_000:
                continue
            scene = f"{mixed} {tr_s}" if coin() > strength else f"{OWN[c]} {tr_si}"
            out["train"].append((f"{c}/{i}", scene))
            tr_s, tr_si = tr_s + 1, tr_si + 1
        j = -1
        while val_si < counts["valid"]:
            i, j = i + 1, j + 1
            if areas[i] < 10_000:
                continue
            if coin() > strength:
                scene = f"{mixed} {j + int((1.0 - strength) * tr_s)}"
            else:
                scene = f"{OWN[c]} {j + int(strength * tr_si)}"
            out["valid"].append((f"{c}/{i}", scene))
            out["valid_ood"].append((f"{c}/{i}", f"{valid_pool} {val_s}"))
            val_s, val_si = val_s + 1, val_si + 1
        j = -1
        while te_si < counts["test"]:
            i, j = i + 1, j + 1
            if areas[i] < 10_000:
                continue
            if coin() > strength:
                scene = f"{mixed} {te_s + int((1.0 - strength) * (tr_s + val_s))}"
            else:
                scene = f"{OWN[c]} {te_si + int(strength * (tr_si + val_si))}"
            out["iid"].append((f"{c}/{i}", scene))
            out["ood"].append((f"{c}/{i}", f"{test_pool} {j}"))
            out["shift"].append((f"{c}/{i}", f"{OWN[other(c)]} {j + int(strength * (tr_si + val_si))}"))
            te_s, te_si = te_s + 1, te_si + 1
    return out


@settings(max_examples=30)
@given(st.lists(st.sampled_from([5_000, 10_000, 12_000]), min_size=6, max_size=20), st.sampled_from([1.0, 0.8, 0.5]))
def test_authors_indexing_is_that_of_the_published_script(areas, strength):
    areas = [*areas, *[12_000] * 9]
    counts = {"train": 4, "valid": 3, "test": 2}
    plan = authors_plan(candidates(areas), pools(400), counts, strength, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    expected = as_published(
        areas,
        counts,
        strength,
        coin=lambda: float(torch.rand((), generator=generator)),
        other=lambda c: (c + int(torch.randint(1, 9, (), generator=generator))) % 9,
    )
    assert {name: [(s.thing.file, s.scene.file) for s in samples] for name, samples in plan.items()} == expected


def test_authors_share_scenes_and_images_where_fixed_does_not(made):
    authors = made(indexing="authors", train=5, valid=2, test=2)
    ood = authors.split("ood")
    assert max(Counter(scenes(ood)).values()) > 1
    parts = [set(files(authors.split(name))) for name in ("train", "valid", "iid")]
    assert parts[0] & (parts[1] | parts[2])
    assert any(isinstance(sample.thing.segmentation, dict) for sample in authors.split("train").samples)


def test_too_few_images_or_scenes_are_told(made):
    with pytest.raises(UserError, match=r"COCO has \d+ usable images of the class 'boat'.*ask for fewer"):
        made(train=30)
    with pytest.raises(UserError, match=r"asks for image 70 of kasbah, but benchmark\.places holds 60"):
        authors_plan(candidates([12_000] * 20), pools(60), {"train": 8, "valid": 1, "test": 1}, 0.0, torch.Generator())
    few = pools(3)
    with pytest.raises(UserError, match="holds 3 images of beach, and all are used"):
        fixed_plan(
            candidates([12_000] * 20, apart=20), few, {"train": 4, "valid": 1, "test": 1}, 1.0, torch.Generator()
        )


# What is seen


def test_an_image_is_its_object_on_its_scene(made, coco_and_places):
    split = made(size=20).split("shift")
    batch = whole(split)
    for number in (0, 5):
        sample = split.samples[number]
        parts = [Image.open(coco_and_places["coco"] / "train2017" / sample.thing.file), Image.open(sample.scene.file)]
        parts.append(Image.fromarray(sample.thing.mask()))
        image, scene, mask = (np.asarray(one.resize((20, 20), Image.Resampling.BILINEAR)) / 255 for one in parts)
        expected = scene * (1 - mask[..., None]) + image * mask[..., None]
        assert np.abs(batch.input[number].permute(1, 2, 0).numpy() - expected).max() < 1e-6
        assert np.abs(batch.mask[number, 0].numpy() - mask).max() < 1e-6
    assert 0 < batch.mask.mean() < 1


def test_teachers_may_see_noise_or_any_scene(made):
    biased, noise, random = (made(ground=ground) for ground in ("biased", "noise", "random"))
    for benchmark in (noise, random):
        assert torch.equal(whole(benchmark.split("iid")).input, whole(biased.split("iid")).input)
        assert files(benchmark.split("train")) == files(biased.split("train"))
    train = noise.split("train")
    assert {noise.biases[number] for number in train.bias.tolist()} == {"noise"}
    some = torch.arange(4)
    first, again = (train.batch(some, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    outside = (first.mask == 0).expand_as(first.input)
    assert (first.input[outside] != again.input[outside]).float().mean() > 0.99
    inside = (first.mask == 1).expand_as(first.input)
    assert inside.any() and torch.equal(first.input[inside], again.input[inside])
    mixed = random.split("train")
    assert sorted(scenes(mixed)) == sorted(scenes(biased.split("train")))
    assert 0 < (mixed.bias == mixed.label).float().mean() < 0.5


def test_scenes_depend_on_the_seed_and_objects_do_not(made):
    first, second = made(), made(scene_seed=1)
    assert files(first.split("train")) == files(second.split("train"))
    assert scenes(first.split("train")) != scenes(second.split("train"))
    assert first.record()["splits"]["train"]["sha256"] != second.record()["splits"]["train"]["sha256"]


# Bad input


@pytest.fixture
def copied(coco_and_places, tmp_path):
    for name, folder in coco_and_places.items():
        shutil.copytree(folder, tmp_path / name)
    return {name: tmp_path / name for name in coco_and_places}


def changed(copied, change):
    path = copied["coco"] / "annotations/instances_train2017.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def renamed(told):
    told["categories"][3]["name"] = "dogs"


def climbing(told):
    told["images"][0]["file_name"] = "../../secret.jpg"


def without_images(told):
    del told["images"]


BAD = {
    "instances_train2017.json is missing; unpack COCO's annotations_trainval2017.zip": lambda paths: (
        paths["coco"] / "annotations/instances_train2017.json"
    ).unlink(),
    "is not an annotation file of COCO": lambda paths: (
        paths["coco"] / "annotations/instances_train2017.json"
    ).write_text("{"),
    "is not an annotation file of COCO (KeyError: 'images')": lambda paths: changed(paths, without_images),
    "There is no category in": lambda paths: changed(paths, renamed),
    "did you mean 'dogs'": lambda paths: changed(paths, renamed),
    "names ../../secret.jpg, which is outside of the images' folder": lambda paths: changed(paths, climbing),
    "lacks 1 of the 45 images that are used, such as 000000000000.jpg": lambda paths: (
        paths["coco"] / "train2017/000000000000.jpg"
    ).unlink(),
    "holds no images; unpack data_256/c/crevasse of": lambda paths: shutil.rmtree(paths["places"] / "c/crevasse"),
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_not_there_is_told_before_anything_is_read(copied, made, said):
    BAD[said](copied)
    with pytest.raises(UserError) as error:
        made(**copied)
    assert said in str(error.value)


def test_bad_images_are_told_by_their_names(copied, made):
    folder = copied["coco"] / "train2017"
    (folder / "000000000002.jpg").write_bytes((folder / "000000000002.jpg").read_bytes()[:200])
    Image.new("RGB", (20, 17)).save(folder / "000000000003.jpg")
    split = made(**copied).split("train")
    with pytest.raises(UserError, match=r"000000000002\.jpg is damaged or cut short"):
        split.batch(torch.tensor([1]))
    with pytest.raises(UserError, match=r"000000000003\.jpg has 17 x 20 pixels, but annotation \d+ of .* 16 x 20"):
        split.batch(torch.tensor([2]))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("indexing", "author", "did you mean 'authors'"),
        ("ground", "nois", "did you mean 'noise'"),
        ("bias_ratio", 1.5, "bias_ratio"),
        ("train", 0, "benchmark.train is 0"),
        ("size", -1, "benchmark.size is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(made, key, value, said):
    with pytest.raises(UserError, match=said):
        made(**{key: value})
