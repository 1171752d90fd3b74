"""Every measure of a run, with its interval over samples: of student, teacher and the pair, by the same list.

Predictions are measured always. Maps cost explanations, so they are measured when asked for, on some samples of each
test split and with any explainers:

    student and teacher against each other    both maps of the teacher's highest class, as e2KD has it
    each against the mask or the boxes        the map of the label's class; of several labels, of each that is there
    each against a truth of three bands       the same map, where masks show an object and its feature
    each against itself, shifted              the map of its own highest class
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hansfree.core import Batch, Draws, Explainer, LiveTeacher, Predictions, Split, Target, Teacher, Tokens
from hansfree.methods.class_choice import Top
from hansfree.metrics import EXPLANATION_AGREEMENT, LOCALISATION, METRICS, TERNARY
from hansfree.metrics.accuracy import members
from hansfree.metrics.conflicts import mined_precision, mined_recall
from hansfree.metrics.equivariance import period, shift_equivariance, shift_similarity, shifted
from hansfree.metrics.explanation_agreement import WINDOW, at_size
from hansfree.metrics.five_band import ternary_truth
from hansfree.metrics.intervals import Interval, intervals
from hansfree.metrics.localisation import class_mask
from hansfree.metrics.measure import Sums, Whole, mean_of

BY_GROUP = ("acc", "agreement")
"""What is measured in each group (class, bias) and each tier too."""

Scores = dict[tuple[str, str], Tensor]
"""One number a sample, [n], by (model, metric); of curves one a sample and shift, [n, shifts]."""
CURVE = "shift_similarity"


@dataclass(frozen=True)
class Measurement:
    """One number, what it is of, and its interval over samples, where it has one."""

    model: str
    split: str
    metric: str
    value: float
    interval: Interval | None = None
    group: str | None = None
    measured_with: str | None = None
    tier: str | None = None


def together(
    measured: Mapping[tuple[str, str], Sums | Whole | None], split: str, **place: str | None
) -> list[Measurement]:
    """Measurements by (model, metric) of the same samples, their intervals from the same draws."""
    values = {key: (sums, sums.value) for key, sums in measured.items() if sums is not None}
    found = {key: value for key, (_, value) in values.items() if value is not None}
    ends = intervals({key: sums for key, (sums, _) in values.items() if key in found and isinstance(sums, Sums)})
    return [Measurement(key[0], split, key[1], value, ends.get(key), **place) for key, value in found.items()]


# Predictions --------------------------------------------------------------------------------------------------


def of_predictions(judged: Mapping[tuple[str, str], Predictions]) -> list[Measurement]:
    """Every metric that applies to each model on each split; by tier too, and by group that training showed."""
    found: list[Measurement] = []
    for split in dict.fromkeys(split for _, split in judged):
        models = {model: predictions for (model, where), predictions in judged.items() if where == split}
        found += together({(m, k): metric.sums(p) for m, p in models.items() for k, metric in METRICS.items()}, split)
        first = next(iter(models.values()))
        groups = [({"group": group}, index) for group, index in _groups(first)]
        for place, index in [*groups, *(({"tier": tier}, index) for tier, index in first.tiers.items())]:
            parts = {model: _subset(predictions, index) for model, predictions in models.items()}
            measured = {(m, k): METRICS[k].sums(p) for m, p in parts.items() for k in BY_GROUP}
            found += together(measured, split, **place)
    return found


def of_mining(mined: Tensor | None, split: Split) -> list[Measurement]:
    """Precision and recall of the training samples that a method took for conflicting; where the bias is known."""
    if mined is None or split.bias is None or split.label.ndim > 1:
        return []
    pair = mined.cpu(), split.bias != split.label
    values = {"mined_precision": mined_precision(*pair), "mined_recall": mined_recall(*pair)}
    return [Measurement("student", "train", name, value) for name, value in values.items() if value is not None]


def _groups(predictions: Predictions) -> Iterator[tuple[str, Tensor]]:
    """The name of each group that training showed, and its samples."""
    groups, member = members(predictions) or ([], predictions.label)
    for number, group in enumerate(groups):
        if group in predictions.training_groups:
            yield f"y:{group[0]},a:{group[1]}", (member == number).nonzero()[:, 0]


def _subset(predictions: Predictions, index: Tensor) -> Predictions:
    theirs = predictions.teacher_logits
    return Predictions(
        predictions.logits[index], predictions.label[index], teacher_logits=None if theirs is None else theirs[index]
    )


# Maps ---------------------------------------------------------------------------------------------------------

Looking = Callable[[Batch, Target, Draws], tuple[Tensor, Tensor]]
"""A model that explains: logits, and the map over the image, on the CPU, since not every device has float64."""


def of_maps(
    student: nn.Module,
    teacher: Teacher | None,
    split: Split,
    name: str,
    explainer: Explainer,
    *,
    measured_with: str,
    samples: int,
    shifts: int,
    batch_size: int,
    device: torch.device | str,
    mask_names: tuple[str, ...] = (),
) -> list[Measurement]:
    """Measures of the maps that ``explainer`` draws for ``samples`` of the split ``name``, the same for every model.

    ``shifts`` is the largest diagonal shift of the curves of similarity under shifts, 0: none. Each point of a curve
    is a measurement of its own, in the group ``shift:t``. ``mask_names`` are the benchmark's, which tell whether masks
    make a truth of three bands.
    """
    if teacher is not None and teacher.lacks(name, explainer) is not None:
        teacher = None
    parts = sample(len(split), samples).split(batch_size)
    feature = mask_names.index("feature") if mask_names[:1] == ("object",) and "feature" in mask_names else None
    found = [scores(student, teacher, split.batch(index).to(device), explainer, shifts, feature) for index in parts]
    values = {key: torch.cat([part[key] for part in found]) for key in found[0]}
    curves = {model: values.pop((model, CURVE)) for model, metric in list(values) if metric == CURVE}
    values |= {(model, "shift_equivariance"): shift_equivariance(curve) for model, curve in curves.items()}
    rows = together({key: mean_of(value) for key, value in values.items()}, name, measured_with=measured_with)
    return rows + list(_of_curves(curves, name, measured_with))


def _of_curves(curves: Mapping[str, Tensor], split: str, measured_with: str) -> Iterator[Measurement]:
    """Each point of each model's curve, and the period."""
    for shift in range(max((curve.shape[1] for curve in curves.values()), default=0)):
        at = {(model, CURVE): mean_of(curve[:, shift]) for model, curve in curves.items()}
        yield from together(at, split, group=f"shift:{shift}", measured_with=measured_with)
    for model, curve in curves.items():
        found = period(curve)
        if found is not None:
            yield Measurement(model, split, "shift_period", float(found), measured_with=measured_with)


def sample(count: int, samples: int) -> Tensor:
    """At most ``samples`` of ``count`` indices, in order: drawn without replacement, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:samples].sort().values


@torch.no_grad()
def scores(
    student: nn.Module,
    teacher: Teacher | None,
    batch: Batch,
    explainer: Explainer,
    shifts: int,
    feature: int | None = None,
) -> Scores:
    """Every measure of maps that applies to ``batch``, one number a sample; ``feature`` is the number of its mask."""
    drawn = explainer.fixed_draws(batch.index)
    drawn = drawn if teacher is None else teacher.answerable(explainer, drawn)
    draws = {key: value.to(batch.index.device) for key, value in drawn.items()}
    looking = {"student": _looking(student, lambda batch: batch.images, explainer)}
    if isinstance(teacher, LiveTeacher):
        looking["teacher"] = _looking(teacher.model, teacher.view, explainer)
    found: Scores = {}
    if teacher is not None:
        answer = teacher.answer(batch, explainer, Top(), draws)
        _, ours = looking["student"](batch, answer.target, draws)
        theirs = at_size(answer.map, _size(batch)).cpu()
        for name, similarity in EXPLANATION_AGREEMENT.items():
            if name != "explanation_ssim" or min(_size(batch)) >= WINDOW:
                found["student", name] = similarity(ours, theirs)
    for model, look in looking.items():
        if batch.mask is not None or batch.boxes is not None:
            found |= {(model, name): values for name, values in located(look, batch, draws, feature).items()}
        if shifts:
            found[model, CURVE] = curve(look, batch, draws, shifts)
    return found


def located(look: Looking, batch: Batch, draws: Draws, feature: int | None = None) -> dict[str, Tensor]:
    """Measures of the map of the label's class against its mask or boxes, and against its ``feature`` too, [b].

    Where images have labels of several classes, [b, classes]: of each class that is there, not a number elsewhere.
    """
    if batch.label.ndim == 1:
        _, map = look(batch, batch.label, draws)
        mask = class_mask(batch, batch.label).cpu()
        found = {name: locate(map, mask) for name, locate in LOCALISATION.items()}
        if feature is not None and batch.mask is not None:
            truth = ternary_truth(mask, batch.mask[:, feature].cpu())
            found |= {name: values for measures in TERNARY for name, values in measures(map, truth).items()}
        return found
    there = batch.label > 0.5
    order = there.int().argsort(dim=1, descending=True, stable=True)  # of each image, first the classes that are there
    found = {name: torch.full(there.shape, torch.nan, dtype=torch.double) for name in LOCALISATION}
    for turn in range(int(there.sum(1).max())):
        target = order[:, turn]
        _, map = look(batch, target, draws)
        mask, rows = class_mask(batch, target).cpu(), there[torch.arange(len(batch)), target].cpu().nonzero()[:, 0]
        for name, locate in LOCALISATION.items():
            found[name][rows, target.cpu()[rows]] = locate(map[rows], mask[rows]).double()
    return found


@torch.no_grad()
def localisation(
    model: nn.Module, split: Split, explainer: Explainer, batch_size: int, device: torch.device | str
) -> dict[str, float]:
    """EPG and IoU of the maps that ``explainer`` draws of the labels' classes, means over ``split``; in eval mode."""
    was_training = model.training
    model.eval()
    look, parts = _looking(model, lambda batch: batch.images, explainer), list[dict[str, Tensor]]()
    for index in torch.arange(len(split)).split(batch_size):
        batch = split.batch(index).to(device)
        draws = {key: value.to(batch.index.device) for key, value in explainer.fixed_draws(index).items()}
        parts.append(located(look, batch, draws))
    model.train(was_training)
    means = {name: mean_of(torch.cat([part[name] for part in parts])).value for name in ("epg", "iou")}
    return {name: 0.0 if value is None else value for name, value in means.items()}


def curve(look: Looking, batch: Batch, draws: Draws, shifts: int) -> Tensor:
    """Similarity of each sample's map to that of its image shifted by 0, 1, ..., ``shifts`` pixels, [b, shifts + 1]."""
    logits, map = look(batch, lambda logits: logits.argmax(1), draws)
    chosen = logits.argmax(1)
    moved = [look(moved_by(batch, shift), chosen, draws)[1] for shift in range(1, shifts + 1)]
    return torch.stack([shift_similarity(map, other, shift) for shift, other in enumerate([map, *moved])], 1)


def _looking(model: nn.Module, view: Callable[[Batch], Tensor | Tokens], explainer: Explainer) -> Looking:
    def look(batch: Batch, target: Target, draws: Draws) -> tuple[Tensor, Tensor]:
        logits, map = explainer(model, view(batch), target, draws=draws)
        return logits, at_size(map, _size(batch)).cpu()

    return look


def _size(batch: Batch) -> tuple[int, int]:
    height, width = batch.images.shape[-2:]
    return height, width


def moved_by(batch: Batch, shift: int) -> Batch:
    """The batch with its images shifted by so many pixels, and what a teacher may see in their place."""
    clean = None if batch.clean is None else shifted(batch.clean, shift)
    mask = None if batch.mask is None else shifted(batch.mask, shift)
    return replace(batch, input=shifted(batch.images, shift), clean=clean, mask=mask)
