"""Five-band scores again by a slow loop, on planted maps, and binary views against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from hansfree.metrics.five_band import HARD, LEVELS, SOFT, binary_views, five_band_scores, ternary_truth


def band(value, low, high):
    if value <= -high:
        return -2
    if value <= -low:
        return -1
    return 0 if value <= low else 1 if value <= high else 2


def slow(map, truth, low, high):
    """Published and corrected scores of one image at one pair of thresholds, pixel by pixel."""
    h = map.sum(0).double()
    h = h / h.abs().max() if h.abs().max() > 0 else h
    tp = fp = fn = tn = wrong = invented = 0
    for value, true in zip(h.flatten().tolist(), truth.flatten().tolist()):
        shown = band(value, low, high)
        if true == 0 and shown == 0:
            tn += 1
        elif shown == 0:
            fn += 1
        elif shown == true:
            tp += 1
        else:
            fp += 1
            wrong += true != 0
            invented += true == 0
    e, there, seen = 1e-6, tp + fn + wrong, tp + wrong + invented
    published = {
        "accuracy": (tp + tn) / (tp + fp + fn + tn), "recall": tp / (tp + fn + e),
        "precision": tp / (tp + fp + e), "fpr": fp / (fp + tn + e),
    }  # fmt: skip
    corrected = {
        "recall_corrected": tp / there if there else np.nan,
        "precision_corrected": np.nan if not there else tp / seen if seen else 0,
        "fpr_corrected": invented / (invented + tn) if there else np.nan,
    }
    objects = {f"{name}_objects": value if there else np.nan for name, value in published.items()}
    return {**published, **corrected, **objects}


def cases(seed, size=7):
    """Signed maps of two channels, some with ties and at thresholds exactly, and truths, one of them empty."""
    g = torch.Generator().manual_seed(seed)
    map = torch.randn(5, 2, size, size, generator=g, dtype=torch.double)
    map[1] = (map[1] * 2).round()
    map[2, 1], map[2, 0] = 0, (torch.randint(-10, 11, (size, size), generator=g)) / 10
    map[2, 0, 0, 0] = 1
    truth = torch.randint(3, (5, size, size), generator=g)
    truth[3] = 0
    return map, truth


@pytest.mark.parametrize("seed", range(3))
def test_every_score_is_the_slow_loop_s(seed):
    map, truth = cases(seed)
    found = five_band_scores(map, truth)
    for n in range(len(map)):
        hard = slow(map[n], truth[n], *HARD[0])
        steps = [slow(map[n], truth[n], *pair) for pair in SOFT]
        for name, value in hard.items():
            over = [step[name] for step in steps]
            expected = {"hard_": value, "": np.mean(over), "best_": min(over) if "fpr" in name else max(over)}
            for way, number in expected.items():
                assert found[f"five_band_{way}{name}"][n].item() == pytest.approx(number, abs=1e-12, nan_ok=True), name
    assert len(found) == 3 * len(hard)


def test_the_truth_itself_as_a_map_is_perfect():
    truth = torch.tensor([[[0, 0, 1], [0, 1, 2], [2, 1, 0]], [[0] * 3] * 3])
    map = torch.tensor([0.0, 0.4, 0.9])[truth][:, None]
    found = five_band_scores(map, truth)
    for way in ("hard_", "best_"):
        values = {name: found[f"five_band_{way}{name}"].tolist() for name in ("accuracy", "recall", "precision", "fpr")}
        assert values["accuracy"] == [1, 1] and values["fpr"] == [0, 0]
        assert values["recall"] == pytest.approx([1, 0], abs=1e-6)  # the empty image: 0 by the published 1e-6
        assert values["precision"] == pytest.approx([1, 0], abs=1e-6)
        assert found[f"five_band_{way}recall_corrected"].tolist() == pytest.approx([1, np.nan], nan_ok=True)
    views = binary_views(map, truth)
    for name in ("auroc", "auprc", "f1_best", "precision_best", "recall_best"):
        assert views[f"object_{name}"].tolist() == pytest.approx([1, np.nan], nan_ok=True), name
        assert views[f"feature_{name}"].tolist() == pytest.approx([1, np.nan], nan_ok=True), name


def test_a_map_of_zeros_shows_nothing():
    truth = torch.tensor([[[0, 1], [2, 0]]])
    found = five_band_scores(torch.zeros(1, 3, 2, 2), truth)
    for name in ("recall", "precision", "fpr", "recall_corrected", "precision_corrected", "fpr_corrected"):
        assert found[f"five_band_{name}"].item() == 0, name
    assert found["five_band_accuracy"].item() == 0.5
    views = binary_views(torch.zeros(1, 3, 2, 2), truth)
    assert views["object_auroc"].item() == 0.5 and views["object_auprc"].item() == 0.5


def test_wrong_bands_raise_the_published_recall_and_fpr_and_not_the_corrected():
    """One pixel right, one missed; then the missed one is shown in the wrong band."""
    truth = torch.tensor([[[2, 1, 0, 0]]])
    missed, wrong = torch.tensor([[[[1.0, 0, 0, 0]]], [[[1.0, 1, 0, 0]]]]).split(1)
    before, after = five_band_scores(missed, truth), five_band_scores(wrong, truth)
    assert before["five_band_hard_recall"].item() == pytest.approx(1 / 2, abs=1e-5)
    assert after["five_band_hard_recall"].item() == pytest.approx(1, abs=1e-5)
    assert after["five_band_hard_fpr"].item() == pytest.approx(1 / 3, abs=1e-5)
    for found in (before, after):
        assert found["five_band_hard_recall_corrected"].item() == 0.5
        assert found["five_band_hard_fpr_corrected"].item() == 0


@pytest.mark.parametrize("seed", range(2))
def test_binary_views_are_scikit_learn_s(seed):
    map, truth = cases(seed)
    found = binary_views(map, truth)
    for n in (seed, 2):
        h = map[n].sum(0).flatten()
        h = (h / h.abs().max()).numpy()
        for view, positive in (("object", truth[n] > 0), ("feature", truth[n] == 2)):
            y = positive.flatten().numpy()
            expected = {"auroc": sklearn.roc_auc_score(y, h), "auprc": sklearn.average_precision_score(y, h)}
            over = [
                sklearn.precision_recall_fscore_support(y, h > t, average="binary", zero_division=0) for t in LEVELS
            ]
            for name, values in zip(("precision", "recall", "f1"), zip(*over)):
                expected |= {name: np.mean(values), f"{name}_best": max(values)}
            for name, value in expected.items():
                assert found[f"{view}_{name}"][n].item() == pytest.approx(value, abs=1e-12), name
    assert found["object_auroc"][3].isnan() and found["feature_f1"][3].isnan()


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([2.0**-30, 4.0, 2.0**30]))
def test_scores_are_shares_that_read_no_scale(seed, scale):
    map, truth = cases(seed, size=4)
    found, scaled = ({**five_band_scores(m, truth), **binary_views(m, truth)} for m in (map, map * scale))
    for name, value in found.items():
        assert (value.isnan() | ((value >= 0) & (value <= 1))).all(), name
        torch.testing.assert_close(value, scaled[name], equal_nan=True, msg=name)


def test_two_masks_make_a_truth():
    truth = ternary_truth(torch.tensor([[[0.5, 0.75, 1.0]]]), torch.tensor([[[0.0, 0.25, 0.75]]]))
    assert truth.tolist() == [[[0, 1, 2]]]
