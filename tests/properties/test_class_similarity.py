"""Entropy within categories: what must hold of it, and what a mapping of categories may be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansfree.benchmarks import CellImages
from hansfree.core import Predictions
from hansfree.errors import UserError
from hansfree.metrics.class_similarity import (
    categories_of,
    category_entropy,
    entropy_category,
    entropy_category_double,
    entropy_entire,
    numbered,
)

CATEGORY = torch.tensor([0, 0, 1, 1, 1, -1, 2])


def drawn(seed, n=40):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, 7, generator=generator, dtype=torch.double)
    return logits, torch.randint(7, (n,), generator=generator)


@settings(deadline=None, max_examples=30)
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


@settings(deadline=None, max_examples=30)
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
