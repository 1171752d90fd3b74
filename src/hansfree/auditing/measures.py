"""Every measure of an audit: what it needs, and how it is taken of one model.

To add one, write a function from an audit and a model's name to what it finds, and a line in ``MEASURES`` that says
what the data must give. A need is a function from an audit to the sentence that says what is missing, or None. The
report shows rows of any measure; pictures of its own are a line in :mod:`hansfree.report.audit`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hansfree.audits import dissect
from hansfree.audits.activations import activations
from hansfree.audits.randomisation import MOST, WAYS, map_changes
from hansfree.benchmarks.concepts import Concepts
from hansfree.core import Batch, Benchmark, Classifier, Draws, Explainer, Predictions, Split, Teacher
from hansfree.evaluation import spread_over_classes
from hansfree.explainers import LossGradient
from hansfree.measuring import Measurement, of_maps, of_predictions, sample, together
from hansfree.metrics import EQUIVARIANCE, EXPLANATION_AGREEMENT, LOCALISATION, METRICS
from hansfree.metrics.accuracy import members
from hansfree.metrics.alignment import edge_alignment, mask_alignment
from hansfree.metrics.cka import minibatch_cka
from hansfree.metrics.deletion import area, deletion_curve, insertion_curve, random_map
from hansfree.metrics.explanation_agreement import at_size, pixels
from hansfree.metrics.localisation import class_mask
from hansfree.metrics.measure import mean_of

STEPS = 10
"""Of deletion and insertion."""
SHIFTS = 8
"""Pixels that images are shifted by, at most."""
REPEATED = 16
"""Images of measures that explain each image many times."""
SHOWN = 8
"""Images in pictures."""


@dataclass(frozen=True)
class Audit:
    """What is audited, ready to be looked at: everything has been tried on two images."""

    models: Mapping[str, nn.Module]
    benchmark: Benchmark
    splits: Mapping[str, Split]
    explainers: Mapping[str, Explainer]
    layers: tuple[str, ...]
    concepts: Concepts | None
    category: Tensor | None
    samples: int
    batch_size: int
    device: torch.device
    folder: Path
    predictions: dict[tuple[str, str], Predictions] = field(default_factory=dict[tuple[str, str], Predictions])
    """By model and split, taken before any measure."""

    def batches(self, split: Split, samples: int) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of ``samples`` of the split, the same for every model, and where in the split they are."""
        for index in sample(len(split), samples).split(self.batch_size):
            yield split.batch(index).to(self.device), index

    def draws(self, explainer: Explainer, batch: Batch) -> Draws:
        """What chance decides in an explanation: by the sample's index alone."""
        return {name: value.to(self.device) for name, value in explainer.fixed_draws(batch.index).items()}

    def earlier(self, model: str) -> list[str]:
        """The models that were named before ``model``: whom it is compared with."""
        return list(self.models)[: list(self.models).index(model)]

    def ours(self, model: str, split: str) -> Predictions:
        """What ``model`` says on ``split``."""
        return self.predictions[model, split]


class Found(NamedTuple):
    """What a measure finds of one model: numbers, what pictures are drawn from, and rows that are whole already."""

    measured: list[Measurement]
    arrays: Mapping[str, Any] = MappingProxyType({})
    rows: Sequence[Mapping[str, Any]] = ()


Need = Callable[[Audit], str | None]
Run = Callable[[Audit, str], Found]


class Measure(NamedTuple):
    """A measure of an audit: what it is called, what it tells, what it needs and how it is taken of one model."""

    title: str
    about: str
    needs: tuple[Need, ...]
    run: Run


# Needs --------------------------------------------------------------------------------------------------------


def labels(audit: Audit) -> str | None:
    """Images with labels."""
    return None if audit.benchmark.classes else "The images have no labels."


def one_label(audit: Audit) -> str | None:
    """Images with one label each."""
    several = any(split.label.ndim > 1 for split in audit.splits.values())
    return "Images have labels of several classes." if several else labels(audit)


def bias(audit: Audit) -> str | None:
    """A spurious attribute that is known."""
    known = any(split.bias is not None or split.tiers for split in audit.splits.values())
    return None if known else "No spurious attribute and no tiers of the images are known."


def categories(audit: Audit) -> str | None:
    """Classes that form a hierarchy."""
    return None if audit.category is not None else "The classes are in no categories."


def masks(audit: Audit) -> str | None:
    """Masks or boxes of the objects."""
    return None if audit.benchmark.gives & {"mask", "boxes"} else "There are no masks and no boxes of the objects."


def three_bands(audit: Audit) -> str | None:
    """Masks of the object and of the feature that tells its class."""
    names = audit.benchmark.mask_names
    there = names[:1] == ("object",) and "feature" in names
    return None if there else "No masks tell an object and the feature of its class apart."


def several(audit: Audit) -> str | None:
    """More than one model."""
    return None if len(audit.models) > 1 else "There is only one model to look at."


def same_classes(audit: Audit) -> str | None:
    """Models of the same classes."""
    counts = {predictions.logits.shape[1] for predictions in audit.predictions.values()}
    told = ", ".join(map(str, sorted(counts)))
    return None if len(counts) == 1 else f"The models tell different numbers of classes apart ({told})."


def four_images(audit: Audit) -> str | None:
    """Enough images to estimate kernels' dependence without bias."""
    most = max(len(split) for split in audit.splits.values())
    return None if min(most, audit.samples) >= 4 else "Fewer than four images are too few to compare layers."


def concepts(audit: Audit) -> str | None:
    """Images with masks of concepts."""
    return (
        None if audit.concepts is not None else "There are no masks of concepts; name a folder of some as --concepts."
    )


# Predictions --------------------------------------------------------------------------------------------------


def _predicted(names: Iterable[str], audit: Audit, model: str) -> Found:
    """Metrics of predictions by name."""
    judged = {(model, split): audit.ours(model, split) for split in audit.splits}
    plain = [m for m in of_predictions(judged) if m.group is None and m.tier is None]
    return Found([m for m in plain if m.metric in set(names)])


def groups(audit: Audit, model: str) -> Found:
    """Accuracy by group (class, attribute) and tier, and what is made of these."""
    names = ("acc_wg", "acc_avg", "acc_group_mean", "acc_ba", "acc_bc")
    judged = {(model, split): _in_all_groups(audit.ours(model, split)) for split in audit.splits}
    apart = [m for m in of_predictions(judged) if m.metric == "acc" and (m.group or m.tier)]
    return Found(_predicted(names, audit, model).measured + apart)


def _in_all_groups(predictions: Predictions) -> Predictions:
    """Predictions whose every group counts as seen in training, where nothing is known of training."""
    found, _ = members(predictions) or ([], None)
    return predictions if predictions.training_groups else replace(predictions, training_groups=dict.fromkeys(found, 1))


def agreement(audit: Audit, model: str) -> Found:
    """Whether the model says what each earlier one says."""
    found: list[Measurement] = []
    for other in audit.earlier(model):
        for name in audit.splits:
            pair = replace(audit.ours(model, name), teacher_logits=audit.ours(other, name).logits)
            sums = {(model, k): METRICS[k].sums(pair) for k in ("agreement", "agreement_top5", "jensen_shannon")}
            found += together(sums, name, measured_with=f"against {other}")
    return Found(found)


# Layers -------------------------------------------------------------------------------------------------------


def cka(audit: Audit, model: str) -> Found:
    """How alike the layer represents images in the model and in each earlier one."""
    found: list[Measurement] = []
    for name, split in audit.splits.items() if audit.earlier(model) else ():
        own = _features(audit, model, split)
        for other in audit.earlier(model):
            for (layer, first), second in zip(own.items(), _features(audit, other, split).values()):
                value = minibatch_cka(first, second).item()
                found.append(
                    Measurement(model, name, "minibatch_cka", value, measured_with=f"{layer}, against {other}")
                )
    return Found(found)


def _features(audit: Audit, model: str, split: Split) -> dict[str, Tensor]:
    """Of each layer what it says of the samples, averaged over positions, [n, units]."""
    parts: dict[str, list[Tensor]] = {}
    for batch, _ in audit.batches(split, audit.samples):
        for layer, map in activations(audit.models[model], audit.layers, batch.images).items():
            parts.setdefault(layer, []).append(map.mean((2, 3)).cpu())
    return {layer: torch.cat(own) for layer, own in parts.items()}


def dissection(audit: Audit, model: str) -> Found:
    """Units that detect concepts, in a folder of their own."""
    assert audit.concepts is not None
    number = list(audit.models).index(model)
    results = dissect(
        audit.models[model],
        audit.concepts,
        audit.folder / "dissection" / str(number),
        name=model,
        layers=audit.layers,
        batch_size=audit.batch_size,
        device=audit.device,
    )
    return Found([], rows=results["rows"])


# Maps ---------------------------------------------------------------------------------------------------------


def _mapped(
    wanted: Callable[[str], bool],
    audit: Audit,
    model: str,
    *,
    against: str | None = None,
    samples: int | None = None,
    shifts: int = 0,
    bands: bool = False,
) -> list[Measurement]:
    """Those measures of the model's maps, by every explainer on every split, whose names are ``wanted``."""
    found: list[Measurement] = []
    for text, explainer in audit.explainers.items():
        for name, split in audit.splits.items():
            measured = of_maps(
                audit.models[model],
                None if against is None else Teacher.live(audit.models[against]),
                split,
                name,
                explainer,
                measured_with=text if against is None else f"{text}, against {against}",
                samples=samples or audit.samples,
                shifts=min(shifts, *(side - 1 for side in (audit.benchmark.input.height, audit.benchmark.input.width))),
                batch_size=audit.batch_size,
                device=audit.device,
                mask_names=audit.benchmark.mask_names if bands else (),
            )
            found += [replace(m, model=model) for m in measured if m.model == "student" and wanted(m.metric)]
    return found


def map_agreement(audit: Audit, model: str) -> Found:
    """Whether the model looks where each earlier one looks."""
    pairs = (_mapped(EXPLANATION_AGREEMENT.__contains__, audit, model, against=o) for o in audit.earlier(model))
    return Found([m for pair in pairs for m in pair])


def localisation(audit: Audit, model: str) -> Found:
    """Whether maps lie on the object."""
    return Found(_mapped(LOCALISATION.__contains__, audit, model))


def five_band(audit: Audit, model: str) -> Found:
    """Whether maps show the feature, and only the object."""
    return Found(_mapped(lambda name: name.startswith(("five_band", "object_", "feature_")), audit, model, bands=True))


def equivariance(audit: Audit, model: str) -> Found:
    """Whether maps move with their images."""
    few = min(audit.samples, REPEATED)
    return Found(_mapped(EQUIVARIANCE.__contains__, audit, model, samples=few, shifts=SHIFTS))


@torch.no_grad()
def deletion(audit: Audit, model: str) -> Found:
    """The class's probability while pixels go or come, in the order of each explainer's map and at random."""
    found: list[Measurement] = []
    for name, split in audit.splits.items():
        parts: dict[tuple[str, str], list[Tensor]] = {}
        for batch, _ in audit.batches(split, audit.samples):
            for order, map in _orders(audit, model, batch):
                for metric, curve in _both(audit.models[model], batch, map).items():
                    parts.setdefault((order, metric), []).append(curve.cpu())
        for (order, metric), curves in parts.items():
            fill = "mean colour" if metric == "deletion" else "blur"
            found += _of_curve(torch.cat(curves), model, name, metric, f"{order}, {fill}, {STEPS} steps")
    return Found(found)


def _orders(audit: Audit, model: str, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for text, explainer in audit.explainers.items():
        top: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(1)  # noqa: E731
        map = explainer(audit.models[model], batch.images, top, draws=audit.draws(explainer, batch)).map
        yield text, at_size(map, (batch.images.shape[-2], batch.images.shape[-1]))
    yield "random order", random_map(batch.images, seed=int(batch.index[0]))


def _both(model: nn.Module, batch: Batch, map: Tensor) -> dict[str, Tensor]:
    target = model(batch.images).argmax(1, keepdim=True)
    shares = torch.sigmoid if batch.label.ndim > 1 else partial(torch.softmax, dim=1)

    def probability(images: Tensor) -> Tensor:
        return shares(model(images)).gather(1, target)[:, 0]

    return {
        "deletion": deletion_curve(probability, batch.images, map, steps=STEPS),
        "insertion": insertion_curve(probability, batch.images, map, steps=STEPS),
    }


def _of_curve(curve: Tensor, model: str, split: str, metric: str, how: str) -> list[Measurement]:
    """The area, and each point of the curve in a group of its own."""
    found = together({(model, f"{metric}_area"): mean_of(area(curve))}, split, measured_with=how)
    for step in range(STEPS + 1):
        point = {(model, f"{metric}_curve"): mean_of(curve[:, step])}
        found += together(point, split, group=f"share:{step / STEPS:g}", measured_with=how)
    return found


@torch.no_grad()
def randomisation(audit: Audit, model: str) -> Found:
    """Whether maps change when weights are shuffled, on the first split; and maps of one image while they are."""
    found: list[Measurement] = []
    (name, split), *_ = audit.splits.items()
    arrays: dict[str, Any] = {}
    few = min(audit.samples, REPEATED)
    for text, explainer in audit.explainers.items():
        for way in WAYS:
            parts: dict[tuple[str, str], list[Tensor]] = {}
            drawn: dict[str, list[np.ndarray]] = {}
            for batch, _ in audit.batches(split, few):
                network, images, draws = audit.models[model], batch.images, audit.draws(explainer, batch)
                target = network(images).argmax(1)
                for layer, map, alike in map_changes(network, images, target, explainer, draws, way, most=MOST):
                    drawn.setdefault(layer, []).append(map[0].float().numpy())
                    for metric, values in alike.items():
                        parts.setdefault((layer, metric), []).append(values)
            how = f"{text}, {way}"
            for (layer, metric), values in parts.items():
                sums = {(model, metric): mean_of(torch.cat(values))}
                found += together(sums, name, group=f"layer:{layer}", measured_with=how)
            arrays[how] = np.stack([maps[0] for maps in drawn.values()])
            arrays[f"layers of {how}"] = np.array(list(drawn))
            if way == "cascading":
                last = f"layer:{next(reversed(drawn))}"
                whole = [m for m in found if m.group == last and m.measured_with == how]
                found += [replace(m, group=None, measured_with=f"{text}, all layers random") for m in whole]
    return Found(found, {"image": _pixels(split.batch(sample(len(split), few)[:1]).images)[0], **arrays})


@torch.no_grad()
def loss_gradients(audit: Audit, model: str) -> Found:
    """Where the loss of the label depends on pixels: on edges, on the object."""
    explainer, found, arrays = LossGradient(), list[Measurement](), dict[str, Any]()
    for name, split in audit.splits.items():
        parts: dict[tuple[str, str], list[Tensor]] = {}
        for batch, _ in audit.batches(split, audit.samples):
            map = explainer(audit.models[model], batch.images, batch.label).map
            parts.setdefault((model, "edge_alignment"), []).append(edge_alignment(map, batch.images).cpu())
            if not masks(audit):
                values = mask_alignment(map, class_mask(batch, batch.label)).cpu()
                parts.setdefault((model, "mask_alignment"), []).append(values)
            if f"map_{name}" not in arrays:
                shown = slice(0, SHOWN)
                arrays |= {f"image_{name}": _pixels(batch.images[shown]), f"label_{name}": batch.label[shown].cpu()}
                arrays[f"map_{name}"] = map[shown].abs().sum(1).cpu().numpy()
        sums = {key: mean_of(torch.cat(values)) for key, values in parts.items()}
        found += together(sums, name, measured_with="loss-gradient")
    return Found(found, {**arrays, "splits": np.array(list(audit.splits))})


@torch.no_grad()
def gallery(audit: Audit, model: str) -> Found:
    """Maps of the model's highest class: of the first images of each class in turn, or of the first ones."""
    network, arrays = audit.models[model], dict[str, Any]()
    for name, split in audit.splits.items():
        label = split.label if split.label.ndim == 1 else split.label.argmax(1)
        rows = spread_over_classes(label, SHOWN) if audit.benchmark.classes else torch.arange(min(SHOWN, len(split)))
        batch = split.batch(rows).to(audit.device)
        prediction = network(batch.images).argmax(1)
        arrays |= {f"image_{name}": _pixels(batch.images), f"label_{name}": label[rows].numpy()}
        arrays[f"prediction_{name}"] = prediction.cpu().numpy()
        for text, explainer in audit.explainers.items():
            map = explainer(network, batch.images, prediction, draws=audit.draws(explainer, batch)).map
            arrays[f"map_{name} {text}"] = pixels(map).float().cpu().numpy()
    arrays |= {"splits": np.array(list(audit.splits)), "explainers": np.array(list(audit.explainers))}
    return Found([], {**arrays, "classes": np.array(class_names(audit, model), dtype=str)})


def class_names(audit: Audit, model: str) -> Sequence[str]:
    """What the model's classes are called: by the data, else by the model; empty where neither says."""
    network = audit.models[model]
    own = network.config.get("label_names") if isinstance(network, Classifier) else None
    return audit.benchmark.classes or own or ()


def _pixels(images: Tensor) -> np.ndarray:
    """Images as bytes, [b, h, w, c]."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# All of them --------------------------------------------------------------------------------------------------

MEASURES: dict[str, Measure] = {
    "accuracy": Measure(
        "Accuracy",
        "The share of images that are told right; where images have several labels, F1 and mean average precision.",
        (labels,),
        partial(_predicted, ("acc", "f1", "mean_average_precision")),
    ),
    "calibration": Measure(
        "Calibration",
        "Whether confidence tells how often the model is right: lower is better.",
        (one_label,),
        partial(_predicted, ("ece", "brier", "nll")),
    ),
    "groups": Measure(
        "Groups and tiers",
        "Accuracy of each group of class and spurious attribute, of the worst, and where the attribute agrees with "
        "the label (ba) or conflicts with it (bc).",
        (one_label, bias),
        groups,
    ),
    "class-similarity": Measure(
        "Likeness of classes",
        "Entropy, in bits, of what right predictions give to classes of the same category: larger where the model "
        "knows that they are alike.",
        (one_label, categories),
        partial(_predicted, ("entropy_entire", "entropy_category", "entropy_category_double")),
    ),
    "agreement": Measure(
        "Agreement of predictions",
        "The share of images of which two models say the same, and how far their probabilities are apart in bits.",
        (several, same_classes),
        agreement,
    ),
    "map-agreement": Measure(
        "Agreement of maps",
        "How alike the maps of two models for the same class are: 1 is the same map.",
        (several, same_classes),
        map_agreement,
    ),
    "cka": Measure(
        "Likeness of layers",
        "Linear CKA, estimated without bias, of a layer of two models averaged over positions: 1 is the same up to "
        "rotation and scale, 0 unrelated.",
        (several, four_images),
        cka,
    ),
    "heatmaps": Measure("Maps", "Where each model looks, for its highest class.", (), gallery),
    "localisation": Measure(
        "Localisation",
        "Whether the map of the label's class lies on the object: the share of positive relevance there (epg), overlap "
        "(iou), and the largest pixel (pointing game).",
        (labels, masks),
        localisation,
    ),
    "five-band": Measure(
        "Three bands",
        "Whether the map shows the feature that tells the class, and of the rest only the object.",
        (one_label, three_bands),
        five_band,
    ),
    "shift-equivariance": Measure(
        "Equivariance under shifts",
        f"How alike the map of an image is to that of the image moved by up to {SHIFTS} pixels, laid over each other: "
        "1 moves along.",
        (),
        equivariance,
    ),
    "deletion": Measure(
        "Deletion and insertion",
        "The probability of the highest class while the most relevant pixels are replaced by the mean colour first "
        "(small areas are good) or put back into a blurred image (large ones are); compare with random order.",
        (),
        deletion,
    ),
    "randomisation": Measure(
        "Randomised weights",
        "How alike maps stay when the weights of layers are shuffled: what stays near 1 shows the image and not what "
        "the network has learnt.",
        (),
        randomisation,
    ),
    "loss-gradient": Measure(
        "Gradients of the loss",
        "Correlation over pixels of the size of the loss's gradient with edges, and with the mask of the object.",
        (one_label,),
        loss_gradients,
    ),
    "dissection": Measure(
        "Network dissection",
        "Units that detect a concept with a name.",
        (concepts,),
        dissection,
    ),
}
"""By name, in the order of the report."""
