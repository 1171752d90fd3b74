"""One or several classifiers under every measure that their data allow: what ``hansfree audit`` does.

The folder of an audit:

    config.yaml        what is audited: the same command goes on from here, another one is refused
    predictions/       logits of each model, as far as they have been made
    measures/          what each measure found of each model, as JSON, or why it was skipped
    figures/           what pictures are drawn from
    dissection/        a folder for each dissected model
    results.json       rows of all measures, their intervals over samples, and what was skipped
    report.html        one self-contained page

Everything is checked before anything is written: models, data, layers, explainers, concepts, on two images.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hansfree.auditing.data import audited_splits, is_folder, source_of
from hansfree.auditing.measures import MEASURES, Audit, Found, several
from hansfree.auditing.models import check, chosen_explainers, load, own_size
from hansfree.benchmarks.broden import read_concepts
from hansfree.benchmarks.concepts import BenchmarkConcepts, Concepts
from hansfree.core import Benchmark, Classifier, Predictions
from hansfree.errors import UserError
from hansfree.evaluation import logits_on
from hansfree.explaining import chosen_device
from hansfree.measuring import Measurement
from hansfree.metrics.class_similarity import category_of
from hansfree.outcome import intervals_of
from hansfree.report.audit import write_audit_page
from hansfree.runs import SCHEMA, RunFolder, atomic_path, is_empty, read_json, sole_writer, write_json
from hansfree.store.identity import digest_of_model

__all__ = ["MEASURES", "Request", "Summary", "audit_models"]

Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Request:
    """What to audit, and by what."""

    models: tuple[str, ...]
    """Folders of runs, exported folders, or names with settings: ``torchvision/resnet18:weights=cats.safetensors``."""
    data: str
    """A folder of images, a benchmark by name with settings, or a YAML config with a benchmark section."""
    explainers: tuple[str, ...] = ()
    """Names with settings; none: the first of some that has a map for every model."""
    concepts: Path | None = None
    """A folder of images with masks of concepts; None: those of the data, where they give masks."""
    layers: tuple[str, ...] = ()
    """What is dissected and compared; none: the last feature map."""
    size: int | None = None
    """The side of a folder's images in pixels; None: what the models were made for, else 224."""
    samples: int = 50
    """Images of each split whose maps are measured."""
    categories: str | None = None
    """A file with the category of each class, or ``imagenet``; None: the benchmark's."""


class Summary(NamedTuple):
    """What came of a request."""

    report: Path
    measured: tuple[str, ...]
    """Titles of the measures that were taken of at least one model."""
    skipped: Mapping[str, str]
    """Why the others were not, by title."""
    notices: tuple[str, ...]


def audit_models(
    request: Request,
    out: Path,
    *,
    device: str | None = None,
    batch_size: int = 16,
    watch: Watch = lambda what, done, total: None,
) -> Summary:
    """Take every measure of every model that the data allow, or go on with it, and write the report.

    Raises ``UserError`` for a model, data, a layer, an explainer or concepts that cannot be used; nothing is written
    then.
    """
    audit, notices = prepared(request, out, batch_size, chosen_device(device))
    settings = claim_of(request, audit)
    with sole_writer(out):
        if not is_empty(out):
            RunFolder.create(out, settings, resume=True)  # refuses another audit's folder before the work begins
        started = time.time()
        predict(audit, settings, watch)
        done = 0
        for name in MEASURES:
            for model in audit.models:
                taken(audit, name, model)
                done += 1
                watch("measures", done, len(MEASURES) * len(audit.models))
        results = gathered(request, audit, settings, notices, time.time() - started)
        write_json(RunFolder(out).results, results)
        report = write_audit_page(out)
    skipped = {entry["title"]: entry["reason"] for entry in results["skipped"] if entry["model"] is None}
    titles = tuple(measure.title for measure in MEASURES.values() if measure.title not in skipped)
    return Summary(report, titles, skipped, tuple(notices))


# Getting ready ------------------------------------------------------------------------------------------------


def prepared(request: Request, out: Path, batch_size: int, device: torch.device) -> tuple[Audit, list[str]]:
    """Everything that ``request`` names, tried on two images, and what a reader must know first. Writes nothing."""
    if len(set(request.models)) < len(request.models):
        raise UserError("A model is named twice; name each once.")
    if request.samples < 1:
        raise UserError(f"--samples is {request.samples}; give a number from 1 on.")
    source = source_of(request.data, out, request.size)
    loaded = {text: load(text, len(source.classes) or None, source.channels, device) for text in request.models}
    models = {text: model for text, (model, _) in loaded.items()}
    benchmark = source.at(own_size(list(models.values())))
    splits = audited_splits(benchmark)
    first = next(iter(splits.values()))
    images = first.batch(torch.arange(min(2, len(first)))).to(device).images
    for text, model in models.items():
        check(text, model, images, source.classes, request.layers)
    explainers = chosen_explainers(request.explainers, models, images)
    audit = Audit(
        models, benchmark, splits, explainers, request.layers, concepts_of(request, benchmark),
        category_of(benchmark.classes, benchmark.categories, request.categories), request.samples, batch_size, device,
        out,
    )  # fmt: skip
    return audit, [_random(text, model) for text, (model, random) in loaded.items() if random]


def _random(text: str, model: Classifier) -> str:
    return (
        f"The weights of {text} are random, with {model.config['num_classes']} classes, so that nothing here is about "
        f"a trained network; name a file as {text.partition(':')[0]}:weights=FILE."
    )


def concepts_of(request: Request, benchmark: Benchmark) -> Concepts | None:
    """The concepts that were named, else those of the benchmark's own masks; None where there are neither.

    Raises ``UserError`` for a folder whose masks do not fit or that holds no concept.
    """
    if request.concepts is not None:
        return read_concepts(request.concepts, benchmark.input.height)
    if "mask" not in benchmark.gives or not benchmark.classes:
        return None
    return BenchmarkConcepts(benchmark, next(iter(audited_splits(benchmark))))


def claim_of(request: Request, audit: Audit) -> dict[str, Any]:
    """What the folder is claimed for: whatever would change a number."""
    record = json.dumps(audit.benchmark.record(), sort_keys=True, default=str)
    return {
        "audit": "models",
        "models": {name: digest_of_model(model) for name, model in audit.models.items()},
        "data": {
            "name": data_name(request.data),
            "input": asdict(audit.benchmark.input),
            "splits": {name: len(split) for name, split in audit.splits.items()},
            "classes": list(audit.benchmark.classes),
            "record_sha256": hashlib.sha256(record.encode()).hexdigest(),
        },
        "explainers": list(audit.explainers),
        "layers": list(audit.layers),
        "concepts": None if audit.concepts is None else audit.concepts.record(),
        "categories": None if audit.category is None else audit.category.tolist(),
        "samples": audit.samples,
    }


def data_name(data: str) -> str:
    """A short name of what ``data`` names: the folder's, the config's or the benchmark's."""
    if is_folder(data):
        return Path(data).resolve().name
    return Path(data).stem if data.endswith((".yaml", ".yml")) else data.partition(":")[0]


# Taking measures ----------------------------------------------------------------------------------------------


def predict(audit: Audit, settings: Mapping[str, Any], watch: Watch) -> None:
    """What every model says on every split, kept in the folder, which is claimed once the first has seen all images."""
    train = audit.benchmark.split("train") if "train" in audit.benchmark.split_names() else None
    sizes: dict[tuple[int, int], int] = {}
    if train is not None and train.bias is not None and train.label.ndim == 1:
        pairs, counts = torch.stack([train.label, train.bias], 1).unique(dim=0, return_counts=True)
        sizes = {(int(y), int(a)): int(count) for (y, a), count in zip(pairs, counts)}
    for number, (name, model) in enumerate(audit.models.items()):
        logits = _logits(audit, number, model, settings)
        for split in audit.splits:
            there = audit.splits[split]
            audit.predictions[name, split] = Predictions(
                logits[split], there.label, there.bias, None, sizes, there.tiers, audit.category
            )
        watch("predictions", number + 1, len(audit.models))


def _logits(audit: Audit, number: int, model: Any, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = audit.folder / "predictions" / f"{number}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    found = {
        name: logits_on(lambda batch: model(batch.images), split, audit.batch_size, audit.device)
        for name, split in audit.splits.items()
    }
    arrays: dict[str, Any] = {name: logits.numpy() for name, logits in found.items()}
    RunFolder.create(audit.folder, settings, resume=True)
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)
    return found


def taken(audit: Audit, name: str, model: str) -> None:
    """Take a measure of a model, unless that was done before, and keep what came of it."""
    path = _kept(audit, name, model)
    if path.exists():
        return
    reasons = [reason for need in MEASURES[name].needs if (reason := need(audit))]
    found, own = Found([]), None
    if not reasons:
        try:
            found = MEASURES[name].run(audit, model)
        except UserError as error:
            own = str(error)
    rows = [*found.rows, *(_row(audit, m) for m in found.measured)]
    if not (rows or found.arrays or reasons or own or _is_first(audit, name, model)):
        own = "It is not defined for any of these images."
    if found.arrays:
        with atomic_path(audit.folder / "figures" / f"{path.stem}.npz") as temporary:
            np.savez(temporary, **found.arrays)
    intervals = intervals_of(found.measured)["rows"]
    write_json(path, {"rows": rows, "intervals": intervals, "lacks": reasons[:1], "refused": own})


def _is_first(audit: Audit, name: str, model: str) -> bool:
    """Whether the measure compares models, and there is none yet to compare this one with."""
    return several in MEASURES[name].needs and not audit.earlier(model)


def _kept(audit: Audit, name: str, model: str) -> Path:
    return audit.folder / "measures" / f"{name}-{list(audit.models).index(model)}.json"


def _row(audit: Audit, found: Measurement) -> dict[str, Any]:
    """A measurement as a row of results.json."""
    place = {
        key: getattr(found, key) for key in ("model", "split", "tier", "group", "metric", "measured_with", "value")
    }
    common = {"benchmark": audit.benchmark.name, "variant": found.model, "method": None, "explainer": None}
    return {**common, **place, "seed": None, "selection": None}


def gathered(
    request: Request, audit: Audit, settings: Mapping[str, Any], notices: list[str], seconds: float
) -> dict[str, Any]:
    """results.json: rows of all measures by name, intervals, and what was skipped with the reason."""
    measures, rows, skipped = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    intervals = intervals_of([])
    for name, measure in MEASURES.items():
        kept = {model: read_json(_kept(audit, name, model)) for model in audit.models}
        own = [row for found in kept.values() for row in found["rows"]]
        measures.append({"name": name, "title": measure.title, "about": measure.about, "rows": len(own)})
        rows += own
        intervals["rows"] += [row for found in kept.values() for row in found["intervals"]]
        lacking = next((found["lacks"][0] for found in kept.values() if found["lacks"]), None)
        refused = {model: found["refused"] for model, found in kept.items() if found["refused"]}
        if len(set(refused.values())) == 1 and len(refused) == len(kept):
            lacking, refused = next(iter(refused.values())), {}
        told = {None: lacking} if lacking else refused
        skipped += [
            {"measure": name, "title": measure.title, "model": model, "reason": reason}
            for model, reason in told.items()
        ]
    environment = {"hansfree": version("hansfree"), "torch": torch.__version__, "device": str(audit.device)}
    return {
        "schema": SCHEMA,
        "environment": {**environment, "time": {"seconds": seconds}},
        "config": {**settings, "request": {**asdict(request), "concepts": str(request.concepts or "") or None}},
        "rows": rows,
        "intervals": intervals,
        "measures": measures,
        "skipped": skipped,
        "notices": notices,
        "data": audit.benchmark.record(),
    }
