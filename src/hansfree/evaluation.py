"""Predictions once per model and split; every metric reads them. And the rules that select a checkpoint.

Where images have labels of several classes, F1 stands wherever accuracy would.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hansfree.core import TEST_SPLITS, Batch, Benchmark, Explainer, LiveTeacher, Method, Predictions, Split, Teacher
from hansfree.errors import UserError
from hansfree.measuring import localisation, moved_by
from hansfree.methods.class_choice import Given, Top
from hansfree.metrics import METRICS, accuracy, conflicting_accuracy, f1, worst_group_accuracy
from hansfree.words import word_maps

Rule = Literal[
    "last", "iid_val", "iid_val_loss", "worst_group_val", "conflicting_val", "epg_val", "iou_val", "ood_val", "oracle"
]
LOCALISING = {"epg_val": "epg", "iou_val": "iou"}
"""Rules that look at where validation explanations are, and what they maximise."""
BIN = 0.005
"""Measures of explanations that differ by less are as good as equal (so too the published code of model guidance)."""
Device = torch.device | str


@torch.no_grad()
def logits_on(answer: Callable[[Batch], Tensor], split: Split, batch_size: int, device: Device) -> Tensor:
    """Logits [n, classes] that ``answer`` gives for the batches of ``split``, in order, on the CPU."""
    parts = torch.arange(len(split)).split(batch_size)
    return torch.cat([answer(split.batch(index).to(device)).float().cpu() for index in parts])


@torch.no_grad()
def mean_terms(method: Method, split: Split, batch_size: int, device: Device) -> dict[str, float]:
    """The method's own loss terms on ``split``, averaged over samples, with fixed draws and eval mode."""
    was_training = method.training
    method.eval()
    sums: dict[str, float] = {}
    for index in torch.arange(len(split)).split(batch_size):
        for name, term in method.loss(split.batch(index).to(device)).items():
            sums[name] = sums.get(name, 0.0) + term.item() * len(index)
    method.train(was_training)
    return {name: total / len(split) for name, total in sums.items()}


def predictions_of(method: Method, split: Split, batch_size: int, device: Device) -> Predictions:
    """What the judged model says on ``split``, in eval mode."""
    was_training = method.training
    method.eval()
    logits = logits_on(lambda batch: method.predict(batch.input), split, batch_size, device)
    method.train(was_training)
    return Predictions(logits, split.label, split.bias, tiers=split.tiers)


@torch.no_grad()
def predictions_by_model(method: Method, split: Split, batch_size: int, device: Device) -> dict[str, Predictions]:
    """What the judged model says on ``split``, as the student, and each sub-model reported apart; in eval mode."""
    was_training = method.training
    method.eval()
    parts: dict[str, list[Tensor]] = {}
    for index in torch.arange(len(split)).split(batch_size):
        for model, logits in method.predictions(split.batch(index).to(device).input).items():
            parts.setdefault(model, []).append(logits.float().cpu())
    method.train(was_training)
    return {
        model: Predictions(torch.cat(logits), split.label, split.bias, tiers=split.tiers)
        for model, logits in parts.items()
    }


def measure(predictions: Predictions) -> dict[str, float]:
    """Every metric of METRICS that applies to ``predictions``."""
    values = {name: metric(predictions) for name, metric in METRICS.items()}
    return {name: value for name, value in values.items() if value is not None}


def judge(
    method: Method,
    teacher: Teacher | None,
    benchmark: Benchmark,
    splits: tuple[str, ...],
    batch_size: int,
    device: Device,
    category: Tensor | None = None,
) -> dict[tuple[str, str], Predictions]:
    """Predictions by (model, split) of the student, its sub-models and, where there is one, of its teacher.

    ``category`` is the number of each class's category, where classes form a hierarchy.
    """
    train = benchmark.split("train")
    sizes = {} if train.bias is None else dict(Counter(zip(train.label.tolist(), train.bias.tolist())))
    judged: dict[tuple[str, str], Predictions] = {}
    for name in splits:
        split = benchmark.split(name)
        found = predictions_by_model(method, split, batch_size, device)
        found = {m: replace(predictions, training_groups=sizes, category=category) for m, predictions in found.items()}
        if teacher is not None and teacher.lacks(name) is None:
            logits = logits_on(teacher.logits, split, batch_size, device)
            judged["teacher", name] = replace(found["student"], logits=logits)
            found = {model: replace(predictions, teacher_logits=logits) for model, predictions in found.items()}
        judged |= {(model, name): predictions for model, predictions in found.items()}
    return judged


# Selection ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """A rule that scores a model while it trains, and the guard on what the rule may look at.

    last: the final model. iid_val: accuracy on the validation split. iid_val_loss: the method's own loss there
    (the rule of explanation distillation's paper for distillers). worst_group_val: the worst group's accuracy
    there. conflicting_val: accuracy there where the bias disagrees with the label. ood_val: accuracy on valid_ood,
    unbiased validation data, supervision of its own (what that paper grants to methods that minimise background
    relevance). oracle: the mean accuracy on the test splits where the shortcut breaks; an upper bound, not a result.
    epg_val, iou_val: EPG or IoU there of the maps of ``explainer``, in bins of 0.005; of equal bins the one with the
    better accuracy, then the better other of the two, so that what is selected lies on the Pareto front of all three.
    """

    rule: Rule
    benchmark: Benchmark
    explainer: Explainer | None = None

    def __post_init__(self) -> None:
        if self.rule in LOCALISING and self.explainer is None:
            raise UserError(
                f"selection: {self.rule} measures maps, but the config names no explainer; choose iid_val, or a method "
                "that takes an explainer, such as model-guidance."
            )
        if self.rule == "conflicting_val" and not _conflict(self.split("valid")):
            raise UserError(
                "selection: conflicting_val needs validation samples whose known bias disagrees with the label, "
                "beside others; choose iid_val."
            )

    def split(self, name: str) -> Split:
        """The split ``name``; a test split raises ``PermissionError`` unless the rule is oracle."""
        allowed = ("train", "valid", *(("valid_ood",) if self.rule == "ood_val" else ()))
        if name not in allowed and self.rule != "oracle":
            raise PermissionError(f"The selection rule {self.rule!r} must not look at the split {name!r}.")
        return self.benchmark.split(name)

    def validate(self, method: Method, batch_size: int, device: Device) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics (the loss, acc where labels are known, what the rule needs) and loss terms, on validation data."""
        valid = self.split("valid")
        terms = mean_terms(method, valid, batch_size, device)
        predictions = predictions_of(method, valid, batch_size, device)
        known = {"acc": accuracy(predictions), "f1": f1(predictions)}
        metrics = {"loss": sum(terms.values()), **{name: value for name, value in known.items() if value is not None}}
        if self.rule == "worst_group_val":
            worst = worst_group_accuracy(predictions)
            if worst is None:
                raise UserError("selection: worst_group_val needs a benchmark whose bias is known; choose iid_val.")
            metrics["acc_wg"] = worst
        if self.rule == "conflicting_val":
            conflicting = conflicting_accuracy(predictions)
            assert conflicting is not None
            metrics["acc_bc"] = conflicting
        if self.rule in LOCALISING and self.explainer is not None:
            metrics |= localisation(method.student, valid, self.explainer, batch_size, device)
        if self.rule == "ood_val":
            metrics["ood_val"] = accuracy_or_f1(predictions_of(method, self.split("valid_ood"), batch_size, device))
        if self.rule == "oracle":
            tests = [name for name in self.benchmark.split_names() if name in TEST_SPLITS and name != "iid"]
            shares = [accuracy_or_f1(predictions_of(method, self.split(n), batch_size, device)) for n in tests]
            metrics["oracle"] = sum(shares) / len(shares)
        return metrics, terms

    def score(self, metrics: Mapping[str, float]) -> float:
        """What the rule maximises. The last rule prefers whatever comes later."""
        if self.rule == "last":
            return 0.0
        if self.rule == "iid_val_loss":
            return -metrics["loss"]
        own = "acc" if "acc" in metrics else "f1"
        if self.rule in LOCALISING:
            first = LOCALISING[self.rule]
            places = binned(metrics[name] for name in (first, own, "iou" if first == "epg" else "epg"))
            # As digits of one number: there are 1 / BIN + 1 bins in [0, 1].
            return sum(place * (1 / BIN + 1) ** -digit for digit, place in enumerate(places))
        named = {"iid_val": own, "worst_group_val": "acc_wg", "conflicting_val": "acc_bc"}
        return metrics[named.get(self.rule, self.rule)]


def _conflict(split: Split) -> bool:
    """Whether the bias of some samples, and not of all, is known to disagree with the label."""
    if split.bias is None or split.label.ndim > 1:
        return False
    agrees = split.bias == split.label
    return bool(agrees.any()) and not bool(agrees.all())


def accuracy_or_f1(predictions: Predictions) -> float:
    """Accuracy, or F1 where images have labels of several classes; 0 where neither is defined."""
    return accuracy(predictions) or f1(predictions) or 0.0


def binned(values: Iterable[float]) -> tuple[int, ...]:
    """Numbers of the bins of 0.005 that ``values`` lie in."""
    return tuple(round(value / BIN) for value in values)


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Which of ``points``, higher being better, no other one surpasses in one number without falling short in another.

    Points are compared in bins of 0.005, and all that share the bins of one on the front are on it.
    """
    places = [binned(point) for point in points]

    def surpassed(place: tuple[float, ...]) -> bool:
        return any(other != place and all(a >= b for a, b in zip(other, place)) for other in places)

    return [number for number, place in enumerate(places) if not surpassed(place)]


# Heatmaps -----------------------------------------------------------------------------------------------------


def heatmaps(
    student: nn.Module,
    teacher: Teacher | None,
    benchmark: Benchmark,
    splits: tuple[str, ...],
    explainer: Explainer,
    count: int,
    device: Device,
    *,
    shift: int = 0,
) -> dict[str, Any]:
    """Images, predictions and maps of the predicted class for the same ``count`` samples of each split.

    Maps are summed over channels, [count, h, w]. Samples are taken class by class in turn, the first ones each. With a
    ``shift``, the samples of the first split once more, shifted by so many pixels. Where images have labels of several
    classes, the map is that of the first one that is there, and a model that does not find it (a logit of 0 or below)
    predicts -1. Of texts, their words and what :func:`hansfree.words.word_maps` says of them.
    """
    moved = {f"{splits[0]}, shifted by {shift} pixels": splits[0]} if shift else {}
    whence = {**{name: name for name in splits}, **moved}
    arrays: dict[str, Any] = {"splits": np.array(list(whence)), "classes": np.array(benchmark.classes)}
    if benchmark.text is not None:
        return word_maps(
            student, teacher, benchmark, splits, explainer, partial(spread_over_classes, count=count), device
        )
    student.eval()
    for name, origin in whence.items():
        split = benchmark.split(origin)
        several = split.label.ndim > 1
        label = split.label.argmax(1) if several else split.label
        rows = spread_over_classes(label, count)
        batch = split.batch(rows).to(device)
        batch = moved_by(batch, shift) if name in moved else batch
        arrays[f"image_{name}"] = (batch.images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        arrays[f"index_{name}"], arrays[f"label_{name}"] = batch.index.cpu().numpy(), label[rows].numpy()
        draws = explainer.fixed_draws(batch.index)
        if teacher is not None:
            draws = teacher.answerable(explainer, draws)
        rule = Given(label[rows].to(device)) if several else Top()
        with torch.no_grad():
            logits, map = explainer(student, batch.images, partial(rule.choose, draws={}), draws=draws)
        arrays[f"map_{name}"] = map.sum(1).cpu().numpy()
        arrays[f"prediction_{name}"] = _said(logits, rule)
        stored = teacher is not None and (several or name in moved) and not isinstance(teacher, LiveTeacher)
        if teacher is not None and not stored and teacher.lacks(origin, explainer) is None:
            answer = teacher.answer(batch, explainer, rule, draws)
            arrays[f"teacher_map_{name}"] = answer.map.sum(1).cpu().numpy()
            arrays[f"teacher_prediction_{name}"] = _said(answer.logits, rule)
        if several:
            arrays["several"] = np.array(True)
    return arrays


def _said(logits: Tensor, rule: Given | Top) -> np.ndarray:
    """What a picture says that the model found: the explained class, or -1 where it was given and not found."""
    chosen = rule.choose(logits, {})
    if isinstance(rule, Given):
        chosen = torch.where(logits.gather(1, chosen[:, None])[:, 0] > 0, chosen, -1)
    return chosen.cpu().numpy()


def spread_over_classes(label: Tensor, count: int) -> Tensor:
    """The first ``count`` indices when classes take turns: one of each, then a second of each, and so on."""
    rank = torch.zeros_like(label)
    for value in label.unique():
        member = label == value
        rank[member] = torch.arange(int(member.sum()))
    return (rank * (int(label.max()) + 1) + label).argsort(stable=True)[:count]
