"""Accessories on images of a folder and on Stanford Dogs: where they lie, who wears what, and what is told as wrong."""

import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hansfree.benchmarks import DogsWithTies, Folder, FolderWithAccessories
from hansfree.benchmarks.folder_with_accessories import Mark, place_of, read_marks
from hansfree.benchmarks.image_files import image_size, read_image
from hansfree.errors import UserError


def picture(path, seed, size=(30, 20), alpha=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(60, 200, (size[1], size[0], 4 if alpha else 3), dtype=np.uint8)
    if alpha:
        pixels[..., 3] = 255
    Image.fromarray(pixels).save(path)


def write_marks(root, rows, name="marks.csv"):
    with (root / name).open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def dogs(stanford_dogs, tmp_path):
    """A copy that a test may spoil."""
    root = tmp_path / "dogs"
    for path in stanford_dogs.rglob("*"):
        if path.is_file():
            (root / path.relative_to(stanford_dogs)).parent.mkdir(parents=True, exist_ok=True)
            (root / path.relative_to(stanford_dogs)).write_bytes(path.read_bytes())
    return root


def made(root, **settings):
    return DogsWithTies(root=root, **{"valid": 2, "size": 48, **settings})


def whole(split):
    return split.batch(torch.arange(len(split)))


# Where an accessory lies


@settings(max_examples=60)
@given(
    st.floats(0, 60), st.floats(0, 40), st.floats(2, 30), st.floats(-180, 180), st.integers(3, 20), st.integers(3, 20)
)
def test_an_accessory_lies_at_its_mark_as_long_and_turned_as_told(x, y, length, angle, wide, high):
    place = place_of(Mark(x, y, 1.0, angle), length, torch.zeros(4, high, wide), 60, 40).double()
    across, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    half_width, half_height = (length / 2 * side / max(wide, high) for side in (wide, high))
    for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1), (0, 0)):  # a point of the accessory, turned and moved by hand
        right, below = u * half_width, (v + (1 if high > wide else 0)) * half_height
        pixel = x + right * across - below * down, y + right * down + below * across
        ends = torch.tensor([pixel[0] / 30 - 1, pixel[1] / 20 - 1], dtype=torch.float64)
        assert torch.allclose(place[:, :2] @ ends + place[:, 2], torch.tensor([u, v]).double(), atol=1e-3)


def test_what_is_worn_covers_the_pixels_that_it_should(stanford_dogs):
    batch = whole(made(stanford_dogs, size=60).split("iid"))  # 60 x 40 pixels, so that rows are stretched by 1.5
    changed = (batch.images != batch.clean).any(1)
    rows, columns = ({int(n) for n in changed[0].nonzero()[:, axis]} for axis in (0, 1))
    assert min(columns) in (23, 24) and max(columns) in (35, 36)  # the bow tie: 12 x 6 pixels around (30, 15)
    assert min(rows) in (17, 18) and max(rows) in (26, 27)
    rows, columns = ({int(n) for n in changed[-1].nonzero()[:, axis]} for axis in (0, 1))
    assert min(columns) in (24, 25) and max(columns) in (34, 35)  # the necktie: 9.6 x 24 pixels below (30, 15)
    assert min(rows) in (21, 22) and max(rows) in (57, 58)


def test_the_clean_image_is_the_file(stanford_dogs):
    split = made(stanford_dogs).split("train")
    resized = read_image(split.images.rows[3].image).resize((48, 48), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    assert torch.equal((split.batch(torch.tensor([3])).clean[0] * 255).byte(), expected)


# Who wears what


def test_the_lists_decide_who_trains_and_who_tests(stanford_dogs):
    benchmark = made(stanford_dogs)
    names = {name: {row.image.name for row in benchmark.split(name).images.rows} for name in benchmark.split_names()}
    numbers = {name: {int(file.rpartition("_")[2][:-4]) for file in files} for name, files in names.items()}
    assert numbers["iid"] == numbers["ood"] == numbers["shift"] == set(range(8, 13))
    assert not names["train"] & names["valid"] and names["valid"] == names["valid_ood"]
    assert numbers["train"] | numbers["valid"] == set(range(8))
    assert {name: benchmark.split(name).label.bincount().tolist() for name in ("train", "valid", "iid")} == {
        "train": [6, 6], "valid": [2, 2], "iid": [5, 5],
    }  # fmt: skip
    other = {row.image.name for row in made(stanford_dogs, split_seed=1).split("valid").images.rows}
    assert other != names["valid"]
    assert benchmark.classes == ("Pekinese", "Tibetan_mastiff") and benchmark.biases == ("bow-tie", "necktie", "none")


def test_ties_tell_the_breed_in_training_and_mislead_or_are_gone_afterwards(stanford_dogs):
    benchmark = made(stanford_dogs)
    for name in ("train", "valid", "iid"):
        assert torch.equal(benchmark.split(name).bias, benchmark.split(name).label)
    assert torch.equal(benchmark.split("shift").bias, 1 - benchmark.split("shift").label)
    for name in ("ood", "valid_ood"):
        batch = whole(benchmark.split(name))
        assert (batch.bias == 2).all() and torch.equal(batch.images, batch.clean)
    assert torch.equal(whole(benchmark.split("shift")).clean, whole(benchmark.split("ood")).images)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_the_share_of_aligned_samples_is_exact_and_others_wear_another_class_s(stanford_dogs, ratio):
    three = {"breeds": ["Chihuahua", "Pekinese", "Tibetan_mastiff"], "lengths": [1, 1, 1]}
    ties = ["bow-tie.png", "necktie.png", "bow-tie.png"]
    split = made(stanford_dogs, bias_ratio=ratio, ties=ties, **three).split("train")
    assert (split.bias == split.label).view(3, 6).sum(1).tolist() == [round(6 * ratio)] * 3
    assert set(split.bias.tolist()) <= {0, 1, 2}


def test_teachers_may_be_trained_on_any_tie_or_none(stanford_dogs):
    assert torch.equal(
        *(getattr(whole(made(stanford_dogs, worn="none").split("train")), of) for of in ("input", "clean"))
    )
    seen = {
        (int(y), int(b)) for s in range(4) for y, b in zip(*_labels(made(stanford_dogs, worn="random", split_seed=s)))
    }
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert torch.equal(made(stanford_dogs, worn="none").split("iid").bias, made(stanford_dogs).split("iid").bias)


def _labels(benchmark):
    return benchmark.split("train").label, benchmark.split("train").bias


# Any folder


@pytest.fixture
def farm(tmp_path):
    """A tree of cows and oxen, two bells, and marks with an angle."""
    marks = []
    for number, split in enumerate(("train", "valid", "test")):
        for y, name in enumerate(("cow", "ox")):
            for i in range(4):
                file = f"{split}/{name}/{i}.png"
                picture(tmp_path / file, 100 * number + 10 * y + i, size=(40, 30))
                marks.append({"img_filename": file, "x": 20, "y": 10 + i, "scale": 10})
    picture(tmp_path / "worn/small.png", 1, size=(10, 10), alpha=True)
    picture(tmp_path / "worn/large.png", 2, size=(12, 10), alpha=True)
    write_marks(tmp_path, marks)
    return tmp_path


WORN = ["worn/small.png", "worn/large.png"]


def test_any_folder_may_wear_accessories(farm):
    benchmark = FolderWithAccessories(root=farm, accessories=WORN, size=32)
    assert benchmark.classes == ("cow", "ox") and benchmark.biases == ("small", "large", "none")
    assert benchmark.gives == {"bias", "clean"}
    plain = Folder(root=farm, size=32)
    for name, bare in (("train", "train"), ("valid", "valid"), ("shift", "iid")):
        batch = whole(benchmark.split(name))
        assert torch.equal(batch.clean, whole(plain.split(bare)).images)
        assert (batch.images != batch.clean).flatten(1).any(1).all()


def test_masks_of_the_folder_come_first_and_the_accessory_last(farm):
    rows = []
    for number, (split, name) in enumerate((s, y) for s in ("train", "valid", "test") for y in ("cow", "ox")):
        for i in range(4):
            file = f"{split}/{name}/{i}.png"
            Image.new("L", (40, 30), 255).save(farm / f"m{number}{i}.png")
            rows.append({"img_filename": file, "y": name, "split": number // 2, "mask_filename": f"m{number}{i}.png"})
    write_marks(farm, rows, "metadata.csv")
    benchmark = FolderWithAccessories(root=farm, accessories=WORN, size=32)
    assert benchmark.mask_names == ("object", "accessory") and benchmark.gives == {"bias", "clean", "mask"}
    batch = whole(benchmark.split("train"))
    covers = batch.mask[:, 1:] > 0
    assert (batch.mask[:, 0] == 1).all() and covers.flatten(1).any(1).all()
    assert torch.equal(batch.images[~covers.expand(-1, 3, -1, -1)], batch.clean[~covers.expand(-1, 3, -1, -1)])
    assert whole(benchmark.split("ood")).mask[:, 1].max() == 0


def test_the_size_is_that_of_the_turned_picture(tmp_path):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (9, 5)).save(tmp_path / "a.jpg", exif=exif)
        assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").size


def test_records_tell_data_apart(stanford_dogs):
    def prints(**settings):
        return made(stanford_dogs, **settings).record()["splits"]

    assert prints() == prints()
    for change in ({"split_seed": 1}, {"bias_ratio": 0.5}, {"lengths": [1.0, 1.5]}):
        assert prints()["train"] != prints(**change)["train"]
    assert prints()["train"]["size"] == 12 and prints()["train"]["aligned"] == 12


# What is wrong, in words


TABLES = {
    "unknown column 'angel'; did you mean 'angle'": "img_filename,x,y,scale,angel\na.png,1,2,3,4\n",
    "needs one column 'scale'": "img_filename,x,y\na.png,1,2\n",
    "line 2 has the x 'left'; write a number": "img_filename,x,y,scale\na.png,left,2,3\n",
    "line 2 has the y ''": "img_filename,x,y,scale\na.png,1,,3\n",
    "line 2 has the x 'nan'": "img_filename,x,y,scale\na.png,nan,2,3\n",
    "line 2 has the scale 0": "img_filename,x,y,scale\na.png,1,2,0\n",
    "line 3 marks a.png again": "img_filename,x,y,scale\na.png,1,2,3\na.png,1,2,3\n",
    "line 2 has 2 values for 4 columns": "img_filename,x,y,scale\na.png,1\n",
    "needs one column 'img_filename'": "",
}


@pytest.mark.parametrize("said", TABLES)
def test_a_bad_table_of_marks_is_told_by_its_line(tmp_path, said):
    (tmp_path / "marks.csv").write_text(TABLES[said])
    with pytest.raises(UserError) as error:
        read_marks(tmp_path / "marks.csv")
    assert said in str(error.value) and str(tmp_path / "marks.csv") in str(error.value)


def spoil_mark(root):
    lines = (root / "marks.csv").read_text().splitlines()
    (root / "marks.csv").write_text("\n".join([lines[0], *lines[2:]]))


SPOILT = {
    "marks.csv is missing": lambda root: (root / "marks.csv").unlink(),
    "marks.csv has no line for n02086079-Pekinese/n02086079_0.jpg": spoil_mark,
    "train_list.mat is missing": lambda root: (root / "lists/train_list.mat").unlink(),
    "test_list.mat is no list of Stanford Dogs": lambda root: (root / "lists/test_list.mat").write_text("a letter"),
    "n02086079_3.jpg, which lists/train_list.mat names, is missing": lambda root: (
        root / "Images/n02086079-Pekinese/n02086079_3.jpg"
    ).unlink(),
    "necktie.png is missing": lambda root: (root / "necktie.png").unlink(),
    "x 90 and y 15 for n02086079-Pekinese/n02086079_0.jpg, which has 60 x 40": lambda root: (
        root / "marks.csv"
    ).write_text((root / "marks.csv").read_text().replace("n02086079_0.jpg,30", "n02086079_0.jpg,90")),
}


@pytest.mark.parametrize("said", SPOILT)
def test_what_is_wrong_with_the_dogs_is_told(dogs, said):
    SPOILT[said](dogs)
    with pytest.raises(UserError) as error:
        made(dogs)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"breeds": ["Pekinese", "Pekingese"]}, "did you mean 'Pekinese'"),
        ({"breeds": ["Pekinese"]}, "two or more"),
        ({"ties": ["bow-tie.png"]}, "benchmark.ties has 1 entries for 2 classes"),
        ({"lengths": [1.0, 0.0]}, "benchmark.lengths holds 0.0"),
        ({"valid": 8}, "give 1 to 7"),
        ({"size": 8}, "benchmark.size is 8"),
        ({"bias_ratio": 2}, "benchmark.bias_ratio"),
        ({"worn": "all"}, "benchmark.worn"),
    ],
)
def test_mistakes_are_told_by_their_key(stanford_dogs, setting, said):
    with pytest.raises(UserError, match=said):
        made(stanford_dogs, **setting)
