"""Measures of words: against scikit-learn, by hand, and what must not change them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from hansfree.errors import UserError
from hansfree.metrics.words import (
    evidence,
    pooled,
    trigger_share,
    word_auprc,
    word_auroc,
    word_sign_accuracy,
)
from hansfree.report.word_maps import coloured
from hansfree.words import Read, measures

NAN = float("nan")
MAP = torch.tensor([[9.0, 1.0, -3.0, 0.5, 9.0], [9.0, 2.0, 9.0, 0.0, 0.0]], dtype=torch.double)
WORD_IDS = torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, -1, -1, -1]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("sum", [[-2.0, 0.5], [2.0, NAN]]),
        ("mean", [[-1.0, 0.5], [2.0, NAN]]),
        ("first", [[1.0, 0.5], [2.0, NAN]]),
        ("largest", [[-3.0, 0.5], [2.0, NAN]]),
    ],
)
def test_pieces_become_words(pooling, expected):
    torch.testing.assert_close(pooled(MAP, WORD_IDS, pooling), torch.tensor(expected).double(), equal_nan=True)


def test_another_pooling_is_a_user_error():
    with pytest.raises(UserError, match="did you mean 'mean'"):
        pooled(MAP, WORD_IDS, "meen")


rated = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30)


@given(rated)
@settings(max_examples=60)
def test_rankings_agree_with_scikit_learn(words):
    values, truth = torch.tensor([w[0] / 2 for w in words]), torch.tensor([w[1] for w in words])
    if truth.all() or not truth.any():
        assert word_auroc(values, truth) is None
        assert (word_auprc(values, truth) is None) == (not truth.any())
        return
    assert word_auroc(values, truth) == pytest.approx(roc_auc_score(truth.numpy(), values.numpy()))
    assert word_auprc(values, truth) == pytest.approx(average_precision_score(truth.numpy(), values.numpy()))
    some = values != 0
    if some.any():
        expected = accuracy_score(truth[some].numpy(), values[some].numpy() > 0)
        assert word_sign_accuracy(values[some], truth[some]) == pytest.approx(expected)
    assert word_sign_accuracy(torch.zeros(len(truth)), truth) == 0


def slowly(read, *, correct_only, flipped):
    """The paper's two steps, sentence by sentence and word by word."""
    values, truth = [], []
    for n in range(len(read.values)):
        if correct_only and not read.right[n]:
            continue
        for value, sign in zip(read.values[n].tolist(), read.sign[n].tolist()):
            if sign == 0 or np.isnan(value):
                continue
            positive_sentence = read.side[n] > 0 or not flipped
            values.append(value)
            truth.append(sign > 0 if positive_sentence else sign < 0)
    return np.array(values), np.array(truth)


def read(seed=0, n=12, words=6):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, words, generator=g, dtype=torch.double)
    values[:, -1] = torch.nan
    sign = torch.randint(-1, 2, (n, words), generator=g)
    sign[:, -1] = 0
    side, right = torch.randint(0, 2, (n,), generator=g) * 2 - 1, torch.rand(n, generator=g) < 0.6
    return Read(values, sign, side, right, torch.full((n,), NAN, dtype=torch.double), side)


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        ("", {"correct_only": True, "flipped": True}),
        ("_all", {"correct_only": False, "flipped": True}),
        ("_unflipped", {"correct_only": True, "flipped": False}),
    ],
)
def test_every_variant_is_what_its_name_says(suffix, how):
    for seed in range(4):
        found, (values, truth) = measures(read(seed)), slowly(read(seed), **how)
        assert found["word_auroc" + suffix].value == pytest.approx(roc_auc_score(truth, values))
        assert found["word_auprc" + suffix].value == pytest.approx(average_precision_score(truth, values))
        assert found["word_sign_acc" + suffix].value == pytest.approx(((values > 0) == truth).mean())
        assert found["word_base_rate" + suffix].value == pytest.approx(truth.mean())
    assert "trigger_share" not in found


def test_turning_everything_round_changes_nothing():
    """A model of the opposite classes on sentences of opposite signs."""
    one = read()
    other = one._replace(sign=-one.sign, side=-one.side)
    for name, value in measures(one).items():
        if not name.endswith("unflipped"):
            assert value.value == pytest.approx(measures(other)[name].value)


def test_words_that_nobody_rated_do_not_count():
    values, truth, sentence = evidence(
        torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]]), torch.tensor([[1, 0, 1], [-1, 1, 0]]), torch.tensor([1, -1])
    )
    assert values.tolist() == [1, 3, 4] and truth.tolist() == [True, True, False] and sentence.tolist() == [0, 1, 1]


def test_the_share_at_the_planted_word():
    planted = torch.tensor([[False, True, True, False, False], [False] * 5])
    share = trigger_share(MAP, planted)
    assert share[0] == pytest.approx(4 / 22.5) and share[1].isnan()


def test_words_are_coloured_as_the_strongest_of_them():
    words = list(coloured(np.array(["a", "bad", "film", ""]), np.array([0.0, -2.0, 1.0, np.nan])))
    assert [word.text for word in words] == ["a", "bad", "film"] and [w.told for w in words] == [
        "+0.00",
        "-1.00",
        "+0.50",
    ]
    assert words[0].colour == "" and words[1].colour == "rgba(31, 119, 180, 0.75)"
    assert words[2].colour == "rgba(214, 39, 40, 0.38)"
    assert not any(word.colour for word in coloured(np.array(["a", "b"]), np.zeros(2)))
