"""Measures by name, as the field names them.

``METRICS`` take the predictions on a split and return a number or None; ``EXPLANATION_AGREEMENT`` take the maps of two
models and ``LOCALISATION`` maps and masks, and return one number a sample; ``EQUIVARIANCE`` are about maps of shifted
images, ``CONFLICTS`` about the training data, ``SIMILARITY`` about layers. ``MEASURES`` are all of them;
docs/measures.md shows each with its formula and source. ``TERNARY`` take maps and truths of three bands, and return
many scores at once.
"""

from collections.abc import Callable
from typing import Any

from hansfree.metrics.accuracy import (
    accuracy,
    aligned_accuracy,
    average_accuracy,
    conflicting_accuracy,
    group_accuracies,
    group_mean_accuracy,
    worst_group_accuracy,
)
from hansfree.metrics.agreement import agreement, agreement_top5, jensen_shannon
from hansfree.metrics.calibration import brier, ece, nll
from hansfree.metrics.cka import linear_cka, minibatch_cka
from hansfree.metrics.class_similarity import entropy_category, entropy_category_double, entropy_entire
from hansfree.metrics.conflicts import mined_precision, mined_recall, predictive_power
from hansfree.metrics.equivariance import period, shift_equivariance, shift_similarity
from hansfree.metrics.explanation_agreement import EXPLANATION_AGREEMENT
from hansfree.metrics.five_band import TERNARY
from hansfree.metrics.localisation import LOCALISATION
from hansfree.metrics.measure import Measure
from hansfree.metrics.multi_label import f1, mean_average_precision

METRICS: dict[str, Measure] = {
    "acc": accuracy,
    "acc_avg": average_accuracy,
    "acc_group_mean": group_mean_accuracy,
    "acc_wg": worst_group_accuracy,
    "acc_ba": aligned_accuracy,
    "acc_bc": conflicting_accuracy,
    "agreement": agreement,
    "agreement_top5": agreement_top5,
    "jensen_shannon": jensen_shannon,
    "ece": ece,
    "brier": brier,
    "nll": nll,
    "entropy_entire": entropy_entire,
    "entropy_category": entropy_category,
    "entropy_category_double": entropy_category_double,
    "f1": f1,
    "mean_average_precision": mean_average_precision,
}

EQUIVARIANCE: dict[str, Callable[..., Any]] = {
    "shift_similarity": shift_similarity,
    "shift_equivariance": shift_equivariance,
    "shift_period": period,
}

CONFLICTS: dict[str, Callable[..., Any]] = {
    "predictive_power": predictive_power,
    "mined_precision": mined_precision,
    "mined_recall": mined_recall,
}

SIMILARITY: dict[str, Callable[..., Any]] = {
    "linear_cka": linear_cka,
    "minibatch_cka": minibatch_cka,
}

MEASURES: dict[str, Callable[..., Any]] = {
    **METRICS,
    **EXPLANATION_AGREEMENT,
    **LOCALISATION,
    **EQUIVARIANCE,
    **CONFLICTS,
    **SIMILARITY,
}

__all__ = [
    "CONFLICTS",
    "EQUIVARIANCE",
    "EXPLANATION_AGREEMENT",
    "LOCALISATION",
    "MEASURES",
    "METRICS",
    "SIMILARITY",
    "TERNARY",
    "accuracy",
    "agreement",
    "aligned_accuracy",
    "average_accuracy",
    "conflicting_accuracy",
    "f1",
    "group_accuracies",
    "group_mean_accuracy",
    "worst_group_accuracy",
]
