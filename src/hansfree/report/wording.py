"""What the codes and numbers of results are called where people read them."""

from collections.abc import Iterable
from dataclasses import dataclass

from hansfree.report.statistics import Estimate

SUPERVISION = {
    "teacher": "a teacher",
    "clean": "unbiased images",
    "bias": "bias labels",
    "bias:valid": "bias labels in validation",
    "mask": "masks",
    "boxes": "boxes",
    "mask-or-boxes": "masks or boxes",
    "bias-model": "a biased model",
}

SELECTION = {
    "last": "the last step",
    "iid_val": "best validation accuracy",
    "iid_val_loss": "lowest validation loss",
    "worst_group_val": "best worst-group validation accuracy",
    "conflicting_val": "best accuracy on conflicting validation samples",
    "epg_val": "highest EPG of validation explanations",
    "iou_val": "highest IoU of validation explanations",
    "ood_val": "best accuracy on unbiased validation images",
    "oracle": "best test result (oracle)",
}


def supervision(needs: Iterable[str] | None) -> str:
    """What a method is given, in words: ``labels only``, ``a teacher, masks``."""
    return ", ".join(SUPERVISION.get(need, need) for need in sorted(needs or ())) or "labels only"


def selection(rule: str | None) -> str:
    """A selection rule in words."""
    return "not recorded" if rule is None else SELECTION.get(rule, rule)


@dataclass(frozen=True)
class Unit:
    """In what a measure is told: its name, that of differences, what it is multiplied by, and decimal places."""

    name: str
    difference: str
    scale: float
    digits: int


PERCENT = Unit("%", "points", 100, 1)
COUNT = Unit("units", "units", 1, 1)
BITS = Unit("bits", "bits", 1, 3)


def percent(estimate: Estimate | None, *, signed: bool = False) -> str:
    """A fraction as ``87.0 ± 1.2`` (percent or points); without the interval where there is none."""
    return told_in(PERCENT, estimate, signed=signed)


def told_in(unit: Unit, estimate: Estimate | None, *, signed: bool = False) -> str:
    """An estimate in ``unit``, as :func:`percent` tells fractions."""
    if estimate is None:
        return "not measured"
    mean = f"{unit.scale * estimate.mean:{'+' if signed else ''}.{unit.digits}f}".replace("-", "−")
    # A value that rounds to nothing has no sign.
    mean = mean if mean.strip("+−0.") else mean.lstrip("+−")
    return mean if estimate.half is None else f"{mean} ± {unit.scale * estimate.half:.{unit.digits}f}"


def p_value(p: float | None) -> str:
    """A p-value to two significant digits, empty where there is none."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
