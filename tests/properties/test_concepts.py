"""Images with masks of concepts: Broden's layout, folders of masks, benchmarks; and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from hansfree.benchmarks import ManyObjects, ObjectsOnScenes
from hansfree.benchmarks.broden import Broden
from hansfree.benchmarks.colour_names import COLOURS
from hansfree.benchmarks.concepts import BenchmarkConcepts, Concept, ConceptFolder
from hansfree.core import Benchmark
from hansfree.errors import UserError


def png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def coded(labels):
    labels = np.asarray(labels)
    return np.stack([labels % 256, labels // 256, np.zeros_like(labels)], -1)


@pytest.fixture
def broden(tmp_path):
    """Three images of 8 x 8 with masks of 4 x 4, in Broden's layout; label 300 needs the second digit."""
    root = tmp_path / "broden"
    for number in range(3):
        png(root / f"images/a/{number}.jpg", np.full((8, 8, 3), 80 * number))
    left, right = np.zeros((4, 4), int), np.zeros((4, 4), int)
    left[:, :2], right[:, 2:] = 300, 7
    png(root / "images/a/0_object.png", coded(left))
    png(root / "images/a/0_part.png", coded(right))
    png(root / "images/a/0_part2.png", coded(np.where(left, 7, 0)))
    png(root / "images/a/1_part.png", coded(np.where(left, 300, 0)))
    tables = {
        "index.csv": "image,split,ih,iw,sh,sw,object,part,scene\n"
        "a/0.jpg,train,8,8,4,4,a/0_object.png,a/0_part.png;a/0_part2.png,5\n"
        "a/1.jpg,val,8,8,4,4,,a/1_part.png,\n"
        "a/2.jpg,train,8,8,4,4,,,5;6\n",
        "category.csv": "name,first,last,count,frequency\nobject,1,9,1,1\npart,1,9,2,2\nscene,1,9,2,2\n",
        "label.csv": "number,name,category,frequency,coverage,syns\n"
        "5,street,scene(2),2,2,\n6,night,scene(1),1,1,\n7,wheel,part(1),1,1,\n300,car,object(1);part(1),2,1,\n",
        "c_object.csv": "code,number,name,frequency,coverage\n0,0,-,0,0\n1,300,car,1,0.5\n",
        "c_part.csv": "code,number,name,frequency,coverage\n0,0,-,0,0\n1,7,wheel,1,0.5\n2,300,car,1,0.4\n",
        "c_scene.csv": "code,number,name,frequency,coverage\n0,0,-,0,0\n1,5,street,2,2.0\n2,6,night,1,1.0\n",
    }
    for name, text in tables.items():
        (root / name).write_text(text)
    return root


def test_broden_is_read_in_its_original_layout(broden):
    data = Broden(broden)
    assert data.concepts == (
        Concept("car", "object"), Concept("wheel", "part"), Concept("street", "scene"), Concept("night", "scene")
    )  # fmt: skip
    assert data.categories == ("object", "part", "scene") and data.category.tolist() == [0, 1, 2, 2]
    images = data.images(torch.arange(3))
    assert images.shape == (3, 3, 8, 8) and images[1].mean().item() == pytest.approx(80 / 255, abs=0.01)
    masks = data.masks(torch.tensor([2, 0, 1]))
    assert masks.number.tolist() == [0, 1, 2, 3] and masks.mask.shape == (3, 4, 4, 4)
    assert masks.mask.sum((2, 3)).tolist() == [[0, 0, 16, 16], [8, 16, 16, 0], [8, 0, 0, 0]]
    assert masks.mask[1, 0, :, :2].all()
    # The second image shows a car in a layer of parts: so it has a label of an object.
    assert masks.annotated.tolist() == [[False, False, True], [True, True, True], [True, True, False]]


def test_a_split_of_broden(broden):
    data = Broden(broden, split="val")
    assert len(data) == 1 and data.masks(torch.tensor([0])).number.tolist() == [0]
    assert data.record() != Broden(broden).record()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: (root / "index.csv").unlink(), r"index\.csv cannot be read .* name the folder"),
        (lambda root: (root / "label.csv").write_text("number\n1\n"), r"label\.csv lacks the column name"),
        (lambda root: png(root / "images/a/0_object.png", coded(np.ones((5, 4)))), "4 x 5 pixels, but index.csv says"),
        (lambda root: (root / "images/a/0_part.png").unlink(), r"0_part\.png is missing"),
    ],
)
def test_a_damaged_broden_is_refused_in_one_sentence(broden, spoil, says):
    spoil(broden)
    with pytest.raises(UserError, match=says):
        Broden(broden).masks(torch.arange(3))


def test_a_split_without_images_is_refused(broden):
    with pytest.raises(UserError, match="annotates no image of split 'test'"):
        Broden(broden, split="test")


# Folders


@pytest.fixture
def folder(tmp_path):
    """Three images, two categories; the third image is annotated for colours alone."""
    random = np.random.default_rng(0)
    for number in range(3):
        png(tmp_path / f"images/{number}.png", random.integers(0, 255, (6, 8, 3)))
    mask = np.zeros((6, 8))
    mask[:, :4] = 255
    png(tmp_path / "masks/object/dog/0.png", mask)
    png(tmp_path / "masks/object/cat/1.png", 255 - mask)
    png(tmp_path / "masks/colour/red/2.png", mask)
    return tmp_path


def test_a_folder_of_masks(folder):
    data = ConceptFolder(folder, size=16)
    assert [f"{c.category}/{c.name}" for c in data.concepts] == ["colour/red", "object/cat", "object/dog"]
    assert len(data) == 3 and data.images(torch.arange(2)).shape == (2, 3, 16, 16)
    masks = data.masks(torch.arange(3))
    assert masks.number.tolist() == [0, 1, 2]
    assert masks.mask[0, 2, :, :8].all() and not masks.mask[0, 2, :, 8:].any()
    assert masks.mask.sum((2, 3)).tolist() == [[0, 0, 128], [0, 128, 0], [128, 0, 0]]
    assert masks.annotated.tolist() == [[False, True], [False, True], [True, False]]
    assert data.masks(torch.tensor([1])).number.tolist() == [1]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda root: png(root / "masks/object/dog/1.png", np.zeros((6, 6))),
            "6 x 6 pixels, but its image 1.png has 8",
        ),
        (lambda root: png(root / "masks/object/dog/9.png", np.zeros((6, 8))), r"9\.png is the mask of no image"),
        (lambda root: (root / "masks/object/dog/0.png").unlink(), "dog does not hold a mask"),
        (lambda root: [path.unlink() for path in root.glob("images/*")], "images does not hold an image"),
        (lambda root: (root / "masks").rename(root / "labels"), "holds no concept; put masks in"),
    ],
)
def test_a_folder_that_makes_no_sense_is_refused_in_one_sentence(folder, spoil, says):
    spoil(folder)
    with pytest.raises(UserError, match=says):
        ConceptFolder(folder)


# Benchmarks


def test_animals_scenes_and_colours_of_a_benchmark(photographs, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))
    benchmark = ObjectsOnScenes(train=16, valid=8, test=16, size=24)
    data = BenchmarkConcepts(benchmark, "ood")
    assert data.categories == ("object", "scene", "colour") and len(data) == 16
    assert [c.name for c in data.concepts] == ["bird", "mammal", *benchmark.biases[:-1], *COLOURS]
    index, batch = torch.arange(16), benchmark.split("ood").batch(torch.arange(16))
    masks = data.masks(index)
    assert torch.equal(data.images(index), batch.images) and masks.annotated.all()
    shown = {data.concepts[n].name: masks.mask[:, k] for k, n in enumerate(masks.number.tolist())}
    assert set(shown) & set(benchmark.biases) == {"urban", "rock"}
    for row, (label, bias) in enumerate(zip(batch.label.tolist(), batch.bias.tolist())):
        animal, scene = shown[benchmark.classes[label]][row], shown[benchmark.biases[bias]][row]
        assert torch.equal(animal, batch.mask[row, 0] >= 0.5) and torch.equal(scene, ~animal)
    assert (sum(shown[name].int() for name in COLOURS if name in shown) == 1).all()


def test_a_benchmark_of_several_labels_has_a_mask_for_each_class(photographs, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))
    benchmark = ManyObjects(train=16, valid=8, test=16, size=24)
    data, batch = BenchmarkConcepts(benchmark, "iid"), benchmark.split("iid").batch(torch.arange(16))
    masks = data.masks(torch.arange(16))
    for k, number in enumerate(masks.number.tolist()):
        if number < len(benchmark.classes):
            assert torch.equal(masks.mask[:, k], batch.mask[:, 1 + number] >= 0.5)


class Unmasked(Benchmark):
    name, gives = "unmasked", frozenset({"bias"})

    def split(self, name):
        raise NotImplementedError


def test_a_benchmark_without_masks_is_refused():
    with pytest.raises(UserError, match="unmasked gives no masks"):
        BenchmarkConcepts(Unmasked())
