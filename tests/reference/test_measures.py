"""Every measure by hand and against an independent implementation; what is written here writes docs/measures.md.

``python tests/reference/test_measures.py`` writes the table anew.
"""

import inspect
import math
import re
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from scipy.spatial import distance
from skimage.metrics import structural_similarity
from sklearn import metrics as sklearn
from sklearn.preprocessing import minmax_scale, scale

from hansfree.core import Boxes, Predictions
from hansfree.errors import UserError
from hansfree.measuring import of_predictions
from hansfree.metrics import MEASURES, METRICS
from hansfree.metrics.agreement import jensen_shannon_divergence
from hansfree.metrics.calibration import calibration_error
from hansfree.metrics.equivariance import period, shift_similarity, shifted
from hansfree.metrics.explanation_agreement import at_size, ssim
from hansfree.metrics.intervals import Interval, bca, intervals, left_out, resampled
from hansfree.metrics.localisation import box_mask, energy_pointing_game, pointing_game
from hansfree.metrics.measure import Sums, mean_of
from hansfree.torchvision_guard import import_torchvision

import_torchvision("torchvision.models")  # quantus and torchmetrics import it where it is installed
from quantus.metrics.localisation.pointing_game import PointingGame  # noqa: E402
from quantus.metrics.localisation.relevance_mass_accuracy import RelevanceMassAccuracy  # noqa: E402
from torchmetrics.functional.classification import multiclass_calibration_error  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "measures.md"
QUIET = {"disable_warnings": True, "display_progressbar": False}


# By hand ------------------------------------------------------------------------------------------------------


def said(logits, label=None, teacher=None, bias=None, training=None, category=None):
    """Predictions; numbers in lists."""
    several = label is not None and isinstance(label[0], list)
    return Predictions(
        torch.tensor(logits, dtype=torch.double),
        torch.tensor([0] * len(logits) if label is None else label, dtype=torch.float if several else torch.long),
        None if bias is None else torch.tensor(bias),
        None if teacher is None else torch.tensor(teacher, dtype=torch.double),
        training or {},
        category=None if category is None else torch.tensor(category),
    )


def picture(rows):
    """One map or mask, [1, h, w]."""
    return torch.tensor([rows], dtype=torch.double)


def curves(*rows):
    """Similarities at the shifts 0, 1, ..., a row a sample."""
    return torch.tensor(rows, dtype=torch.double)


def counts(*values):
    """Whole numbers, one a sample."""
    return torch.tensor(values)


def truths(*values):
    """Truths, one a sample."""
    return torch.tensor(values).bool()


def layer(*rows):
    """Activations, a row a sample."""
    return torch.tensor(rows, dtype=torch.double)


WORDS = {"counts": counts, "truths": truths, "layer": layer}
WORDS |= {
    "said": said,
    "picture": picture,
    "curves": curves,
    "log": math.log,
    "log2": math.log2,
    "exp": math.exp,
    "nan": math.nan,
}
GROUPS = "said([[2, 0], [0, 1], [0, 1]], label=[0, 0, 1], bias=[0, 0, 1], training={(0, 0): 3, (1, 1): 1})"
MIXED = "said([[2, 0], [0, 1], [0, 1]], label=[0, 0, 1], bias=[0, 1, 0])"
ALIKE = "[[log(3), log(2), log(1)], [0, 9, 0]], label=[0, 0], category=[0, 0, -1]"
NOWHERE = "picture([[-1, 0], [0, 0]]), picture([[1, 0], [0, 0]])"

BY_HAND = {
    "acc": ("said([[2, 0], [0, 1]], label=[0, 0])", "1/2"),
    "acc_avg": (GROUPS, "(3 * 1/2 + 1 * 1) / 4"),
    "acc_group_mean": (GROUPS, "(1/2 + 1) / 2"),
    "acc_wg": (GROUPS, "1/2"),
    "acc_ba": (MIXED, "1"),
    "acc_bc": (MIXED, "1/2"),
    "agreement": ("said([[2, 0], [0, 1]], teacher=[[1, 0], [1, 0]])", "1/2"),
    "agreement_top5": (
        "said([[6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]], teacher=[[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]])",
        "1/2",
    ),
    "jensen_shannon": (
        "said([[0, 0]], teacher=[[99, -99]])",
        "((1/2 * log2((1/2) / (3/4)) + 1/2 * log2((1/2) / (1/4))) + log2(1 / (3/4))) / 2",
    ),
    "ece": ("said([[log(3), 0], [log(3), 0]], label=[0, 1])", "3/4 - 1/2"),
    "brier": ("said([[log(3), 0]], label=[0])", "(1/4)**2 + (1/4)**2"),
    "nll": ("said([[log(3), 0]], label=[0])", "log(4/3)"),
    "entropy_entire": (f"said({ALIKE})", "1/2 * log2(2) + 1/3 * log2(3) + 1/6 * log2(6)"),
    "entropy_category": (f"said({ALIKE})", "3/5 * log2(5/3) + 2/5 * log2(5/2)"),
    "entropy_category_double": ("said([[99, 0, 0]], label=[0], category=[0, 0, -1])",
                                "log2(1 + exp(1)) - exp(1) / (1 + exp(1)) * log2(exp(1))"),
    "f1": ("said([[1, -1], [1, 1]], label=[[1, 0], [0, 1]])", "2 * 2 / (2 * 2 + 1 + 0)"),
    "mean_average_precision": (
        "said([[3, 1], [2, 1], [1, 0]], label=[[1, 0], [0, 1], [1, 0]])",
        "((1/2 * 1 + 1/2 * 2/3) + 1/2) / 2",
    ),
    "explanation_cosine": ("picture([[0, 0]]), picture([[4, 3]])", "0"),
    "explanation_cosine_defined": ("picture([[3, 4]]), picture([[4, 3]])", "(3 * 4 + 4 * 3) / (5 * 5)"),
    "explanation_rank_correlation": ("picture([[1, 2], [3, 4]]), picture([[1, 2], [9, 3]])", "1 - 6 * 2 / (4 * 15)"),
    "explanation_ssim": ("picture([[1] * 11] * 11), picture([[-1] * 11] * 11)", "(0.02**2 - 2) / (0.02**2 + 2)"),
    "explanation_top_intersection": ("picture([[4, -3, 2, 1]]), picture([[4, 1, 3, 2]]), share=0.5", "1/2"),
    "epg": ("picture([[3, -1], [1, 0]]), picture([[1, 0], [0, 0]])", "3 / (3 + 1)"),
    "epg_defined": (NOWHERE, "nan"),
    "iou": ("picture([[4, 3], [1, 0]]), picture([[1, 0], [0, 0]])", "1/2"),
    "iou_defined": (NOWHERE, "nan"),
    "pointing_game": ("picture([[1, 5], [0, -9]]), picture([[0, 1], [0, 0]])", "1"),
    "shift_similarity": ("picture([[3, 4, 8], [3, 4, 8], [9, 9, 9]]), picture([[7, 7, 7], [7, 4, 3], [7, 4, 3]]), 1",
                         "(3 * 4 + 4 * 3) / (5 * 5)"),
    "shift_equivariance": ("curves([1, 0.5, 0.7])", "(0.5 + 0.7) / 2"),
    "shift_period": ("curves([1, 0.2, 0.9, 0.3, 0.9], [1, 0.1, 0.8, 0.2, 0.8])", "2"),
    "predictive_power": ("counts(0, 0, 1, 1, 1, 0), counts(0, 0, 0, 1, 1, 1)",
                         "1 - (-(2/3) * log2(2/3) - 1/3 * log2(1/3))"),
    "mined_precision": ("truths(1, 1, 0, 0, 1), truths(1, 0, 1, 0, 1)", "2/3"),
    "mined_recall": ("truths(1, 1, 0, 0, 0), truths(1, 0, 1, 0, 1)", "1/3"),
    "linear_cka": ("layer([1], [-1], [0]), layer([5], [3], [1])", "2**2 / (2 * 8)"),
    "minibatch_cka": ("layer([1], [-1], [1], [-1]), layer([2], [2], [-2], [-2])",
                      "(-4 + 4 * 4 / 6 - 4) / (12 + 4 * 4 / 6 - 4)"),
}  # fmt: skip


def number(value: Any) -> float:
    return float(value if not isinstance(value, torch.Tensor) else value.item())


@pytest.mark.parametrize("name", MEASURES)
def test_by_hand(name):
    arguments, value = BY_HAND[name]
    found = number(eval(f"measure({arguments})", {**WORDS, "measure": MEASURES[name]}))
    assert found == pytest.approx(eval(value, WORDS), abs=1e-9, nan_ok=True)


# Against others -----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Random predictions and maps, as tensors; the last map is zero and the last mask empty where asked for."""

    seed: int
    n: int = 60
    classes: int = 7

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        logits, teacher = 2 * torch.randn(2, self.n, self.classes, generator=g, dtype=torch.double)
        label, bias = torch.randint(self.classes, (self.n,), generator=g), torch.randint(2, (self.n,), generator=g)
        sizes = {(y, a): 1 + 3 * y + a for y in range(self.classes) for a in range(2)}
        self.category = torch.tensor([0, 1, 0, -1, 1, 1, 2])
        self.p = Predictions(logits, label, bias, teacher, sizes, category=self.category)
        self.right = (logits.argmax(1) == label).numpy()
        self.probability = logits.softmax(1).numpy()
        self.group = list(zip(label.tolist(), bias.tolist()))
        self.several = Predictions(logits, (torch.rand(self.n, self.classes, generator=g) > 0.7).double())
        self.map, self.other = torch.randn(2, 4, 3, 16, 17, generator=g, dtype=torch.double)
        self.mask = (torch.rand(4, 16, 17, generator=g) > 0.6).double()
        self.flat, self.flat_other = (m.sum(1).flatten(1).numpy() for m in (self.map, self.other))
        self.curve = 0.7 + 0.2 * torch.cos(2 * math.pi * torch.arange(17) / [2, 4, 8, 16][self.seed % 4])
        self.curve = self.curve + 0.01 * torch.randn(30, 17, generator=g, dtype=torch.double)
        self.layer = torch.randn(14, 5, 2, generator=g, dtype=torch.double)
        self.other_layer = self.layer.flatten(1)[:, :3] + torch.rand(14, 3, generator=g, dtype=torch.double)

    def by_group(self) -> dict[Any, float]:
        return {
            group: sklearn.accuracy_score(self.p.label[at], self.p.logits[at].argmax(1))
            for group in set(self.group)
            for at in [np.array([g == group for g in self.group])]
        }

    def accuracy_where(self, aligned: bool) -> float:
        at = (self.p.bias == self.p.label) == aligned
        return sklearn.accuracy_score(self.p.label[at], self.p.logits[at].argmax(1))


def _entropies(case, double=False):
    """Of each right sample whose class is in a category of several, within that category."""
    found = []
    for p, label, right in zip(case.probability, case.p.label, case.right):
        members = [k for k in range(7) if case.category[k] == case.category[label] != -1]
        if right and len(members) > 1:
            found.append(stats.entropy(special.softmax(p[members]) if double else p[members], base=2))
    return found


def _entropy_entire(case):
    at = case.right & np.isin(case.p.label, [0, 1, 2, 4, 5])
    return stats.entropy(case.probability[at], base=2, axis=1).mean()


def _average(case):
    shares = case.by_group()
    return np.average(list(shares.values()), weights=[case.p.training_groups[g] for g in shares])


def _jensen_shannon(case):
    theirs = case.p.teacher_logits.softmax(1).numpy()
    return np.mean(distance.jensenshannon(case.probability, theirs, base=2, axis=1) ** 2)


def _ssim(case):
    pairs = [[m[n].sum(0).numpy() for m in (case.map, case.other)] for n in range(4)]
    scaled = [[m / np.abs(m).max() for m in pair] for pair in pairs]
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2}
    return [structural_similarity(*pair, **how) for pair in scaled]


def _top_intersection(case):
    k = round(0.02 * 16 * 17)
    tops = [np.argsort(-np.abs(m), axis=1)[:, :k] for m in (case.flat, case.flat_other)]
    return [len(np.intersect1d(a, b)) / k for a, b in zip(*tops)]


def _iou(case):
    shown = [minmax_scale(np.maximum(m, 0)) > 0.5 for m in case.flat]
    return [sklearn.jaccard_score(m.flatten(), s) for m, s in zip(case.mask.numpy(), shown)]


def _mass(case):
    positive = np.maximum(case.flat, 0).reshape(4, -1)
    return RelevanceMassAccuracy(**QUIET).evaluate_batch(a_batch=positive, s_batch=case.mask.numpy())


def _pointing(case):
    return PointingGame(**QUIET).evaluate_batch(a_batch=case.flat, s_batch=case.mask.numpy())


def _moved(case):
    pairs = zip(case.map[..., :-3, :-3].flatten(1).numpy(), case.other[..., 3:, 3:].flatten(1).numpy())
    return [1 - distance.cosine(*pair) for pair in pairs]


def _fourier(case):
    strength = np.abs(np.fft.rfft(case.curve.mean(0)[1:]))[1:]
    return 16 / (1 + strength.argmax())


def of(attribute):
    return lambda measure, case: measure(getattr(case, attribute))


def of_maps(measure, case):
    return measure(case.map, case.other)


def of_masks(measure, case):
    return measure(case.map, case.mask)


def _unbiased_hsic(k, l):  # noqa: E741
    """The estimate as what it is: the mean over all ways to choose four different samples."""
    chosen = permutations(range(len(k)), 4)
    return np.mean([k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in chosen])


def _batched_cka(case):
    first, second = case.layer.flatten(1).numpy(), case.other_layer.numpy()
    parts = [(x @ x.T, y @ y.T) for x, y in zip(np.split(first, 2), np.split(second, 2))]
    sums = [sum(_unbiased_hsic(p[a], p[b]) for p in parts) for a, b in ((0, 1), (0, 0), (1, 1))]
    return sums[0] / np.sqrt(sums[1] * sums[2])


def _cka(case):
    x, y = (scale(layer, with_std=False) for layer in (case.layer.flatten(1).numpy(), case.other_layer.numpy()))
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


ACCURACY, COSINE = "scikit-learn `accuracy_score`", "SciPy `cosine`"
AGAINST = {
    "acc": (ACCURACY, of("p"), lambda c: sklearn.accuracy_score(c.p.label, c.p.logits.argmax(1))),
    "acc_avg": (f"{ACCURACY} by group, NumPy `average`", of("p"), _average),
    "acc_group_mean": (f"{ACCURACY} by group", of("p"), lambda c: np.mean(list(c.by_group().values()))),
    "acc_wg": (f"{ACCURACY} by group", of("p"), lambda c: min(c.by_group().values())),
    "acc_ba": (ACCURACY, of("p"), lambda c: c.accuracy_where(True)),
    "acc_bc": (ACCURACY, of("p"), lambda c: c.accuracy_where(False)),
    "agreement": (
        f"{ACCURACY}, the teacher's classes as labels",
        of("p"),
        lambda c: sklearn.accuracy_score(c.p.teacher_logits.argmax(1), c.p.logits.argmax(1)),
    ),
    "agreement_top5": (
        "scikit-learn `top_k_accuracy_score`, the teacher's classes as labels",
        of("p"),
        lambda c: sklearn.top_k_accuracy_score(c.p.teacher_logits.argmax(1), c.p.logits, k=5, labels=range(7)),
    ),
    "jensen_shannon": ("SciPy `jensenshannon`, squared", of("p"), _jensen_shannon),
    "ece": (
        "torchmetrics `multiclass_calibration_error`",
        of("p"),
        lambda c: multiclass_calibration_error(c.p.logits, c.p.label, num_classes=7, n_bins=15).item(),
    ),
    "brier": (
        "scikit-learn `brier_score_loss`",
        of("p"),
        lambda c: sklearn.brier_score_loss(c.p.label, c.probability, labels=range(7), scale_by_half=False),
    ),
    "nll": ("scikit-learn `log_loss`", of("p"), lambda c: sklearn.log_loss(c.p.label, c.probability, labels=range(7))),
    "entropy_entire": ("SciPy `entropy`", of("p"), _entropy_entire),
    "entropy_category": ("SciPy `entropy`", of("p"), lambda c: np.mean(_entropies(c))),
    "entropy_category_double": (
        "SciPy `softmax` and `entropy`",
        of("p"),
        lambda c: np.mean(_entropies(c, double=True)),
    ),
    "f1": (
        "scikit-learn `f1_score`",
        of("several"),
        lambda c: sklearn.f1_score(c.several.label, c.several.logits > 0, average="micro"),
    ),
    "mean_average_precision": (
        "scikit-learn `average_precision_score`",
        of("several"),
        lambda c: sklearn.average_precision_score(c.several.label, c.several.logits, average="macro"),
    ),
    "explanation_cosine": (
        COSINE,
        of_maps,
        lambda c: [1 - distance.cosine(a, b) for a, b in zip(c.map.flatten(1), c.other.flatten(1))],
    ),
    "explanation_cosine_defined": (
        COSINE,
        of_maps,
        lambda c: [1 - distance.cosine(a, b) for a, b in zip(c.map.flatten(1), c.other.flatten(1))],
    ),
    "explanation_rank_correlation": (
        "SciPy `spearmanr`",
        lambda measure, c: measure(c.map.round(), c.other.round()),
        lambda c: [
            stats.spearmanr(*pair).statistic
            for pair in zip(*(m.round().sum(1).flatten(1).numpy() for m in (c.map, c.other)))
        ],
    ),
    "explanation_ssim": ("scikit-image `structural_similarity`", of_maps, _ssim),
    "explanation_top_intersection": ("NumPy `argsort` and `intersect1d`", of_maps, _top_intersection),
    "epg": ("Quantus `RelevanceMassAccuracy` of the positive part", of_masks, _mass),
    "epg_defined": ("Quantus `RelevanceMassAccuracy` of the positive part", of_masks, _mass),
    "iou": ("scikit-learn `minmax_scale` and `jaccard_score`", of_masks, _iou),
    "iou_defined": ("scikit-learn `minmax_scale` and `jaccard_score`", of_masks, _iou),
    "pointing_game": ("Quantus `PointingGame`", of_masks, _pointing),
    "shift_similarity": (COSINE, lambda measure, c: measure(c.map, c.other, 3), _moved),
    "shift_equivariance": (
        "NumPy `mean`",
        of("curve"),
        lambda c: np.mean(c.curve.numpy(), axis=1, where=np.arange(17) > 0),
    ),
    "shift_period": ("NumPy `rfft`, the strongest frequency", of("curve"), _fourier),
    "predictive_power": (
        "scikit-learn `mutual_info_score`, SciPy `entropy`",
        lambda measure, c: measure(c.p.bias, c.p.label),
        lambda c: sklearn.mutual_info_score(c.p.label, c.p.bias) / stats.entropy(np.bincount(c.p.label)),
    ),
    "mined_precision": (
        "scikit-learn `precision_score`",
        lambda measure, c: measure(torch.from_numpy(c.right), c.p.bias == 1),
        lambda c: sklearn.precision_score(c.p.bias == 1, c.right),
    ),
    "mined_recall": (
        "scikit-learn `recall_score`",
        lambda measure, c: measure(torch.from_numpy(c.right), c.p.bias == 1),
        lambda c: sklearn.recall_score(c.p.bias == 1, c.right),
    ),
    "linear_cka": (
        "scikit-learn `scale`, NumPy `norm` of the covariances",
        lambda measure, c: measure(c.layer, c.other_layer),
        _cka,
    ),
    "minibatch_cka": (
        "NumPy, HSIC as a mean over all four samples",
        lambda measure, c: measure(c.layer, c.other_layer, 7),
        _batched_cka,
    ),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MEASURES)
def test_against_another(name, seed):
    _, ours, theirs = AGAINST[name]
    case = Case(seed)
    np.testing.assert_allclose(np.asarray(ours(MEASURES[name], case)), np.asarray(theirs(case), dtype=float), atol=1e-6)


# What others leave open ---------------------------------------------------------------------------------------


def test_samples_without_a_label_are_left_out():
    known, unknown = Case(0).p, Case(1).p
    both = Predictions(
        torch.cat([known.logits, unknown.logits]), torch.cat([known.label, torch.full_like(unknown.label, -1)])
    )
    for name in ("acc", "ece", "brier", "nll"):
        assert METRICS[name](both) == pytest.approx(METRICS[name](Predictions(known.logits, known.label)))
        assert METRICS[name](Predictions(unknown.logits, torch.full_like(unknown.label, -1))) is None


def test_several_labels_have_an_f1_and_a_map_and_nothing_else():
    assert {name for name, metric in METRICS.items() if metric(Case(0).several) is not None} == {
        "f1",
        "mean_average_precision",
    }


@pytest.mark.parametrize("seed", range(3))
def test_map_of_equal_logits_and_of_classes_that_do_not_occur(seed):
    case = Case(seed).several
    logits, label = case.logits.round(), case.label.clone()
    label[:, 2] = 0
    there = [k for k in range(label.shape[1]) if k != 2]
    expected = sklearn.average_precision_score(label[:, there], logits[:, there], average="macro")
    assert METRICS["mean_average_precision"](Predictions(logits, label)) == pytest.approx(expected, abs=1e-12)
    assert METRICS["mean_average_precision"](Predictions(logits, torch.zeros_like(label))) is None


def test_a_ranking_has_a_value_and_no_interval():
    case = Case(0).several
    found = {m.metric: m for m in of_predictions({("student", "iid"): case})}
    assert found.keys() == {"f1", "mean_average_precision"}
    assert (
        found["mean_average_precision"].value == METRICS["mean_average_precision"](case)
        and found["mean_average_precision"].interval is None
    )
    assert found["f1"].interval is not None


def test_divergence_in_other_units_and_of_certainties():
    p, q = torch.tensor([[99.0, -99.0]]), torch.tensor([[-99.0, 99.0]])
    assert jensen_shannon_divergence(p, q).item() == pytest.approx(1)
    assert jensen_shannon_divergence(p, q, base=math.e).item() == pytest.approx(math.log(2))
    impossible = torch.tensor([[0.0, -math.inf]])
    assert jensen_shannon_divergence(impossible, p).item() == pytest.approx(0, abs=1e-12)


def test_a_certain_prediction_falls_into_the_last_bin():
    certain = said([[200, 0], [200, 0]], label=[0, 1])
    assert calibration_error(certain, 15).value == pytest.approx(0.5)
    sums = calibration_error(certain, 15)
    assert sums.parts.shape == (2, 16) and sums.parts[:, 14].abs().sum() == 1


def test_maps_that_show_nothing():
    nothing, mask = torch.zeros(2, 1, 4, 4), torch.ones(2, 4, 4)
    assert energy_pointing_game(nothing, mask).tolist() == [0, 0]
    assert energy_pointing_game(torch.full((2, 1, 4, 4), 1e-9), mask).tolist() == [0, 0]  # the published threshold
    assert MEASURES["epg_defined"](torch.full((2, 1, 4, 4), 1e-9), mask).tolist() == [1, 1]
    assert MEASURES["iou"](nothing, mask).tolist() == [0, 0]
    assert MEASURES["explanation_rank_correlation"](nothing, torch.rand(2, 1, 4, 4)).isnan().all()
    assert ssim(torch.zeros(1, 12, 12), torch.zeros(1, 12, 12)).item() == pytest.approx(1)
    half = torch.zeros(1, 4, 4)
    half[:, :2] = 1
    assert pointing_game(nothing[:1], half).item() == 0.5
    assert pointing_game(nothing[:1], torch.zeros(1, 4, 4)).isnan().all()


def test_pixels_tied_for_the_last_places_share_them():
    """The mean over all ways of breaking the ties."""
    map, other = picture([[5, 1, 1, 1, 0]]), picture([[0, 3, 2, 2, 2]])
    ways = [len({0, a} & {1, b}) / 2 for a in (1, 2, 3) for b in (2, 3, 4)]
    found = MEASURES["explanation_top_intersection"](map, other, share=0.4)
    assert found.item() == pytest.approx(np.mean(ways))


def test_boxes_of_one_class_become_one_mask():
    boxes = Boxes(
        (torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 2], [0, 0, 4, 4]]), torch.zeros(0, 4)),
        (torch.tensor([1, 1, 0]), torch.zeros(0, dtype=torch.long)),
    )
    mask = box_mask(boxes, torch.tensor([1, 1]), (3, 4))
    assert mask[0].tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert not mask[1].any()


def test_maps_are_laid_over_their_image():
    small = torch.rand(2, 3, 5, 4)
    theirs = torch.nn.functional.interpolate(small, (10, 8), mode="bilinear")
    assert torch.equal(at_size(small, (10, 8)), theirs)
    assert torch.equal(at_size(small[:, 0], (10, 8)), theirs[:, 0])
    assert at_size(small, (5, 4)) is small


def test_what_cannot_be_compared_is_told():
    with pytest.raises(UserError, match="one size"):
        MEASURES["explanation_cosine"](torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4))
    with pytest.raises(UserError, match="11 x 11"):
        ssim(torch.rand(1, 8, 8), torch.rand(1, 8, 8))
    with pytest.raises(UserError, match="shift from 0 to 3"):
        shift_similarity(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), 4)


# Shifts -------------------------------------------------------------------------------------------------------


def test_images_move_down_and_right_with_their_border_repeated():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    assert shifted(image, 1)[0, 0].tolist() == [[0, 0, 1], [0, 0, 1], [3, 3, 4]]
    assert shifted(image, 0) is not image and torch.equal(shifted(image, 0), image)


def test_a_network_without_stride_is_equivariant_and_one_with_stride_has_its_period():
    torch.manual_seed(0)
    images = torch.rand(6, 1, 24, 24, dtype=torch.double)
    kernel = torch.rand(1, 1, 4, 4, dtype=torch.double)

    def maps(x, stride):
        small = torch.nn.functional.conv2d(x, kernel, stride=stride).relu() ** 2
        return torch.nn.functional.interpolate(small, scale_factor=stride, mode="nearest")

    def curve(stride):
        first = maps(images, stride)
        return torch.stack([shift_similarity(first, maps(shifted(images, t), stride), t) for t in range(13)], 1)

    assert curve(1).min() > 1 - 1e-9 and period(curve(1)) == 1
    assert period(curve(4)) == 4
    assert curve(4)[:, [4, 8, 12]].min() > 1 - 1e-9


@pytest.mark.parametrize("decline", [0.0, 0.02])
def test_noise_and_decline_have_no_period(decline):
    generator = torch.Generator().manual_seed(3)
    flat = 0.9 - decline * torch.arange(17) + 0.05 * torch.randn(200, 17, generator=generator)
    assert period(flat) == 1
    assert period(flat[:1]) is None
    assert period(flat[:, :3]) is None


# Intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_is_scipy_s():
    """To the digit from SciPy's draws, and from our own within what chance does to 5000 of them."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.double) ** 3
    theirs = stats.bootstrap((values.numpy(),), np.mean, n_resamples=5000, method="BCa", rng=0)
    expected = (theirs.confidence_interval.low, theirs.confidence_interval.high)
    drawn = torch.from_numpy(theirs.bootstrap_distribution)
    assert bca(drawn, values.mean(), left_out(mean_of(values))) == pytest.approx(expected, abs=1e-6)
    ours = intervals({"mean": mean_of(values)}, draws=5000)["mean"]
    assert (ours.low, ours.high) == pytest.approx(expected, abs=0.01)
    assert (ours.samples, ours.method) == (40, "bca")


def test_bca_again_from_the_same_draws():
    sums = METRICS["f1"].sums(Case(2).several)
    drawn = sums.combine(resampled(sums.parts, 500, 0))
    value = sums.combine(sums.parts.sum(0))
    slow = np.array([sums.combine(sums.parts[[j for j in range(60) if j != i]].sum(0)).item() for i in range(60)])
    np.testing.assert_allclose(left_out(sums), slow)
    z0 = stats.norm.ppf(np.mean(drawn.numpy() < value.item()) / 2 + np.mean(drawn.numpy() <= value.item()) / 2)
    a = stats.skew(slow) / -6 / 60**0.5
    shares = [stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in stats.norm.ppf([0.025, 0.975])]
    assert bca(drawn, value, left_out(sums)) == pytest.approx(tuple(np.quantile(drawn.numpy(), shares)))


def test_basic_again_from_the_same_draws():
    sums = METRICS["ece"].sums(Case(2).p)
    drawn = sums.combine(resampled(sums.parts, 1000, 0)).numpy()
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = METRICS["ece"](Case(2).p)
    expected = Interval(
        pytest.approx(max(0, 2 * value - high)), pytest.approx(min(1, 2 * value - low)), 60, "basic"
    )  # fmt: skip
    assert intervals({"ece": sums})["ece"] == expected


def test_a_draw_is_the_measure_of_the_samples_drawn():
    """Every metric, on one set of samples drawn by hand."""
    case = Case(1)
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(60, (1, 60), generator=generator)[0]
    p = case.p
    taken = p.logits[index], p.label[index], p.bias[index], p.teacher_logits[index], p.training_groups
    drawn = Predictions(*taken, category=p.category)
    for name, metric in METRICS.items():
        if name not in ("f1", "mean_average_precision"):
            sums = metric.sums(p)
            found = sums.combine(resampled(sums.parts, 1, 5))
            assert found.item() == pytest.approx(metric(drawn)), name


def test_draws_are_shared_between_models_and_do_not_depend_on_company():
    a, b = (METRICS["acc"].sums(Case(seed).p) for seed in (0, 1))
    together = intervals({"a": a, "b": b, "same": a})
    assert together["a"] == together["same"] == intervals({"a": a})["a"]
    assert intervals({}) == {}


def test_too_few_samples_have_no_interval():
    one = Sums(torch.tensor([[1.0, 1.0]]))
    assert intervals({"one": one}) == {}
    assert intervals({"one": mean_of(torch.tensor([1.0, torch.nan, torch.nan]))}) == {}
    certain = intervals({"two": mean_of(torch.tensor([1.0, 1.0, torch.nan]))})["two"]
    assert (certain.low, certain.high, certain.samples) == (1, 1, 2)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Predictions overconfident by a tenth; the truth is that of a million samples."""

    def draw(n, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(n, 3, generator=generator)
        return Predictions(logits, torch.multinomial((0.9 * logits).softmax(1), 1, generator=generator)[:, 0])

    truth = {name: METRICS[name](draw(1_000_000, 10**6)) for name in ("acc", "ece", "brier", "nll")}
    hits = dict.fromkeys([*truth, "ece by bca"], 0)
    for seed in range(200):
        measured = {name: METRICS[name].sums(draw(2000, seed)) for name in truth}
        measured["ece by bca"] = measured["ece"]._replace(interval="bca")
        for name, found in intervals(measured, draws=500, seed=seed).items():
            hits[name] += found.low <= truth[name.split()[0]] <= found.high
    assert all(hits[name] >= 0.9 * 200 for name in ("acc", "brier", "nll")), hits
    assert hits["ece by bca"] < 0.85 * 200 <= hits["ece"], hits


# The page -----------------------------------------------------------------------------------------------------


def table() -> str:
    lines = ["| measure | what | formula | source | by hand | held against |", "|---|---|---|---|---|---|"]
    for name, measure in MEASURES.items():
        what, formula, source = card(inspect.getdoc(measure) or "")
        arguments, value = BY_HAND[name]
        code = [f"`{text}`".replace("|", "\\|") for text in (name, formula, f"{name}({arguments})", value)]
        cells = [code[0], what, code[1], source, f"{code[2]} = {code[3]}", AGAINST[name][0]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def card(doc: str) -> tuple[str, str, str]:
    """First line, formula and source of a docstring."""
    found = re.search(r"^Formula\. (.*?)\nSource\. (.*?)(?:\n\n|\Z)", doc, re.S | re.M)
    assert found, f"no formula and source: {doc}"
    formula, source = (" ".join(text.split()) for text in found.groups())
    return doc.partition("\n")[0], formula, source


def page() -> str:
    """The page with the table as it should be."""
    begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    return before + begin + table() + end + rest.partition(end)[2]


def test_every_measure_is_on_the_page_with_its_example_and_its_rival():
    assert BY_HAND.keys() == AGAINST.keys() == MEASURES.keys()
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make docs"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
