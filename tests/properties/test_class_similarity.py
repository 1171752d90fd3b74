"""Entropy within categories: what must hold of it, and what a mapping of categories may be."""

import csv
import importlib
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansfree.benchmarks import CellImages
from hansfree.core import Predictions
from hansfree.errors import UserError
from hansfree.metrics.class_similarity import (
    IMAGENET_FILE,
    categories_of,
    category_entropy,
    category_of,
    entropy_category,
    entropy_category_double,
    entropy_entire,
    numbered,
)
from hansfree.torchvision_guard import import_torchvision

# fmt: off
SIZES = {
    "accessory": 18, "aircraft": 5, "arachnid": 8, "armadillo": 1, "ball": 9, "bear": 5, "bird": 59, "boat": 15,
    "bug": 25, "building": 37, "butterfly": 6, "cat": 4, "clothing": 47, "container": 18, "cooking": 27, "coral":
    5, "crocodile": 2, "crustacean": 9, "decor": 22, "dinosaur": 1, "dog": 119, "echinoderms": 3, "electronics":
    49, "fence": 3, "ferret": 7, "fish": 13, "flower": 5, "food": 28, "frog": 3, "fruit": 14, "fungus": 7,
    "furniture": 34, "hat": 8, "hog": 3, "instrument": 28, "lab equipment": 2, "lizard": 11, "marine mammals": 4,
    "marsupial": 3, "mollusk": 6, "mongoose": 3, "monotreme": 2, "other": 19, "outdoor scene": 32, "paper": 9,
    "person": 4, "plant": 3, "primate": 19, "rabbit": 3, "rodent": 7, "salamander": 5, "shark": 4, "sloth": 2,
    "snake": 16, "sports equipment": 13, "technology": 27, "tool": 43, "toy": 4, "train": 4, "trilobite": 1,
    "turtle": 5, "ungulate": 16, "vegetable": 7, "vehicle": 49, "weapon": 10, "wild cat": 9, "wild dog": 11,
}
# fmt: on
"""Han et al., 2023, table 14."""
CATEGORY = torch.tensor([0, 0, 1, 1, 1, -1, 2])


def drawn(seed, n=40):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, 7, generator=generator, dtype=torch.double)
    return logits, torch.randint(7, (n,), generator=generator)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.2, 8), st.sampled_from([2.0, math.e, 10.0]))
def test_bounded_blind_to_other_classes_and_to_shifts(seed, temperature, base):
    logits, label = drawn(seed)
    found = category_entropy(logits, label, CATEGORY, temperature=temperature, base=base)
    size = torch.tensor([2, 2, 3, 3, 3, 0, 0])[label]
    assert torch.equal(found.isnan(), size == 0)
    there = size > 0
    assert (found[there] >= 0).all() and (found[there] <= size[there].log() / math.log(base) + 1e-12).all()
    others = torch.where(CATEGORY[label][:, None] == CATEGORY, logits + 5, torch.randn_like(logits))
    again = category_entropy(others, label, CATEGORY, temperature=temperature, base=base)
    torch.testing.assert_close(again, found, equal_nan=True)
    nats = category_entropy(logits / temperature, label, CATEGORY, base=math.e)
    torch.testing.assert_close(nats / math.log(base), found, equal_nan=True)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_the_chain_rule_forbids_much_within_and_little_over_all(seed):
    """What the published table has: H >= p(category) H(within category)."""
    logits, label = drawn(seed)
    p = logits.softmax(1)
    share = (p * (CATEGORY[label][:, None] == CATEGORY)).sum(1)
    within = category_entropy(logits, label, CATEGORY)
    entire = torch.special.entr(p).sum(1) / math.log(2)
    assert (within.isnan() | (entire + 1e-12 >= share * within)).all()


def test_planted_predictions():
    even, sure = torch.tensor([[50.0, 50, 0, 0, 0, 0, 0]]), torch.tensor([[99.0, 0, 0, 0, 0, 0, 0]])
    zero = torch.zeros(1, dtype=torch.long)
    assert category_entropy(even, zero, CATEGORY).item() == pytest.approx(1)
    assert category_entropy(sure, zero, CATEGORY).item() == pytest.approx(0)
    assert category_entropy(sure, zero, CATEGORY, double=True).item() > 0.8  # nearly even, whatever the model
    wrong = Predictions(even.flip(1), zero, category=CATEGORY)
    assert entropy_category(wrong) is None and entropy_entire(wrong) is None
    assert (
        entropy_category(Predictions(even, zero)) is None and entropy_category_double(Predictions(even, zero)) is None
    )


def test_the_cells_bring_their_own_hierarchy():
    found = numbered(CellImages.classes, CellImages.categories)
    assert found.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1]
    assert numbered(("a", "b"), {}) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", 'class,category\nkomondor,dog\n"sheepdog, old",dog\ntable,other\n'),
        ("c.yaml", "komondor: dog\nsheepdog, old: dog\ntable: other\n"),
    ],
)
def test_a_mapping_is_read_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert categories_of(tmp_path / name) == {"komondor": "dog", "sheepdog, old": "dog"}
    assert numbered(("table", "sheepdog, old", "komondor"), categories_of(tmp_path / name)).tolist() == [-1, 0, 0]


def test_imagenets_categories_are_as_large_as_the_paper_says():
    with IMAGENET_FILE.open() as file:
        rows = list(csv.DictReader(file))
    import_torchvision()
    info = importlib.import_module("timm.data").ImageNetInfo()
    assert [row["class"] for row in rows] == info.label_names()
    assert Counter(row["category"] for row in rows) == SIZES


def test_imagenets_categories_by_wordnet_id():
    classes = ("n02105505", "n02105641", "n01440764", "mine")
    assert category_of(classes, {}, "imagenet").tolist() == [0, 0, 1, -1]
    assert category_of(("a", "b"), {"a": "x", "b": "x"}).tolist() == [0, 0]
    assert category_of(("a", "b"), {"a": "x"}, {"a": "y", "b": "y"}).tolist() == [0, 0]
    with pytest.raises(UserError, match=r"WordNet ids .* 'komondor'"):
        category_of(("komondor", "table"), {}, "imagenet")


def test_what_is_no_mapping_is_refused(tmp_path):
    for name, text in (
        ("a.csv", "name,kind\na,b\n"),
        ("a.yaml", "- a\n- b\n"),
        ("b.yaml", "a: 1\n"),
        ("c.yaml", "a: ["),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"class and category|cannot be read"):
            categories_of(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        categories_of(tmp_path / "absent.csv")
    with pytest.raises(UserError, match="did you mean 'komondor'"):
        numbered(("komondor", "table"), {"comondor": "dog"})
    with pytest.raises(UserError, match="No category has two classes"):
        numbered(("komondor", "table"), {"komondor": "dog", "table": "furniture"})
