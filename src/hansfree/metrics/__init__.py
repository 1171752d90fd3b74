"""Measures by name, as the field names them. Each takes the predictions on a split and returns a number or None."""

from collections.abc import Callable

from hansfree.core import Predictions
from hansfree.metrics.accuracy import (
    accuracy,
    agreement,
    aligned_accuracy,
    average_accuracy,
    conflicting_accuracy,
    group_accuracies,
    group_mean_accuracy,
    worst_group_accuracy,
)

METRICS: dict[str, Callable[[Predictions], float | None]] = {
    "acc": accuracy,
    "acc_avg": average_accuracy,
    "acc_group_mean": group_mean_accuracy,
    "acc_wg": worst_group_accuracy,
    "acc_ba": aligned_accuracy,
    "acc_bc": conflicting_accuracy,
    "agreement": agreement,
}

__all__ = [
    "METRICS",
    "accuracy",
    "agreement",
    "aligned_accuracy",
    "average_accuracy",
    "conflicting_accuracy",
    "group_accuracies",
    "group_mean_accuracy",
    "worst_group_accuracy",
]
