"""What a trained model comes to: its measures, its pictures, its exported weights and results.json."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hansfree.audits import dissect
from hansfree.core import TEST_SPLITS, Benchmark, Classifier, Method, Teacher
from hansfree.evaluation import LOCALISING, Rule, Selection, heatmaps, judge, pareto_front
from hansfree.measuring import Measurement, of_maps, of_mining, of_predictions
from hansfree.metrics import accuracy
from hansfree.metrics.conflicts import predictive_power
from hansfree.metrics.intervals import DRAWS, LEVEL
from hansfree.models import save_model
from hansfree.models.text import TextClassifier, save_text_model
from hansfree.parts import (
    DissectionConfig,
    MapsConfig,
    RunConfig,
    make_category,
    make_concepts,
    make_explainer,
    needs_of,
    selection_rule,
    spelled,
)
from hansfree.representations import representations
from hansfree.runs import RunFolder, atomic_path, write_json
from hansfree.store import StoredTeacher
from hansfree.words import of_words


def evaluate(
    config: RunConfig,
    method: Method,
    benchmark: Benchmark,
    folder: RunFolder,
    device: torch.device,
    environment: dict[str, Any],
    *,
    steps: int,
    seconds: float,
) -> dict[str, Any]:
    """Measure the model in ``method``, export it, and write heatmaps and results.json (last: then the run is done)."""
    method.place(device)
    method.eval()
    teacher = method.teacher if "teacher" in method.needs else None
    settings = config.evaluation
    tests = settings.splits or tuple(name for name in benchmark.split_names() if name in TEST_SPLITS)
    rule = selection_rule(config, method)
    metrics, _ = make_selection(config, method, benchmark).validate(method, settings.batch_size, device)
    category = make_category(config, benchmark)
    judged = judge(method, teacher, benchmark, ("valid", *tests), settings.batch_size, device, category)
    warnings = flags(folder, metrics, accuracy(judged["teacher", "valid"]) if teacher else None)
    warnings += store_warnings(config, teacher, tests)
    logged = [line.get("text") for line in folder.read_metrics() if line["event"] == "warning"]
    folder.append_metrics({"event": "warning", "text": text} for text in warnings if text not in logged)
    write_heatmaps(config, method, teacher, benchmark, tests, folder, device)
    if isinstance(method.student, Classifier):
        save_model(method.student, folder.exported, input=benchmark.input, classes=benchmark.classes)
    elif isinstance(method.student, TextClassifier):
        save_text_model(method.student, folder.exported, classes=benchmark.classes)
    write_representations(config, method, benchmark, tests, folder, device)
    measured = [*of_predictions(judged), *of_mining(method.mined(), benchmark.split("train"))]
    if settings.measure is not None:
        measured += measure_maps(settings.measure, method, teacher, benchmark, tests, device)
    if settings.dissect is not None:
        title = config.title or config.variant or config.method["name"]
        measured += dissected(settings.dissect, method.student, benchmark, folder.dissection, title, device)
    results = {
        "schema": 1,
        "environment": environment,
        "config": config.model_dump(),
        "rows": rows_of(config, measured, metrics, rule),
        "intervals": intervals_of(measured),
        "cells": [
            {
                "variant": config.variant or config.method["name"],
                "title": config.title,
                "seed": config.seed,
                "folder": ".",
                "status": "done",
                "error": None,
                "method": config.method["name"],
                "settings": {key: value for key, value in config.method.items() if key != "name"},
                "explainer": None if config.explainer is None else config.explainer["name"],
                "needs": sorted(needs_of(config)),
                "selection": rule,
                "warnings": warnings,
                "steps": steps,
                "time": {"train_seconds": seconds},
            }
        ],
        "data": {
            **benchmark.record(),
            "shortcut": shortcut_of(benchmark, ("train", *tests)),
            "told": {"shortcut": benchmark.shortcut, "asks": dict(benchmark.asks)},
        },
    }
    if rule in LOCALISING:
        results["pareto"] = pareto(folder)
    write_json(folder.results, results)
    return results


def make_selection(config: RunConfig, method: Method, benchmark: Benchmark) -> Selection:
    """The rule that chooses the checkpoint. Raises ``UserError`` for one that cannot be followed here."""
    return Selection(selection_rule(config, method), benchmark, make_explainer(config.explainer))


def flags(folder: RunFolder, final: Mapping[str, float], teacher_acc: float | None) -> list[str]:
    """Warnings about a run that a reader of its loss alone would not suspect."""
    start = next((line for line in folder.read_metrics() if line["event"] == "valid"), None)
    if teacher_acc is None or start is None:
        return []
    if final["loss"] < 0.7 * start["metrics"]["loss"] and final["acc"] < 0.5 * teacher_acc:
        return [
            f"The distillation loss fell from {start['metrics']['loss']:.3g} to {final['loss']:.3g}, yet the "
            f"student is right on {final['acc']:.0%} of the validation data where its teacher is on {teacher_acc:.0%}: "
            "a low loss does not mean a working student here."
        ]
    return []


def store_warnings(config: RunConfig, teacher: Teacher | None, splits: tuple[str, ...]) -> list[str]:
    """What a reader must know of results from a stored teacher."""
    if not isinstance(teacher, StoredTeacher):
        return []
    absent = [name for name in splits if teacher.lacks(name) is not None]
    told = []
    if absent:
        about = f"its store is about {', '.join(teacher.store.splits)}; make it with --split {absent[0]}"
        told = [f"No figures of the teacher on {', '.join(absent)}: {about}."]
    explainer, change = make_explainer(config.explainer), config.augmentation
    cut = change is not None and (change.crop is not None or change.rotation > 0 or change.translation > 0)
    if explainer is not None and cut and teacher.pixel_level(explainer):
        told.append(
            "The stored maps are as fine as the images, and such maps hardly resemble those of a cropped image: "
            "prefer coarse ones, such as Grad-CAM's, or no crops."
        )
    return told


def measure_maps(
    asked: MapsConfig,
    method: Method,
    teacher: Teacher | None,
    benchmark: Benchmark,
    splits: tuple[str, ...],
    device: torch.device | str,
) -> list[Measurement]:
    """Every measure of explanations that is ``asked`` for."""
    if benchmark.text is not None:
        settings = asked.model_dump(include={"samples", "batch_size"})
        measure = partial(of_words, class_signs=benchmark.text.signs, **settings)
    else:
        measure = partial(of_maps, mask_names=benchmark.mask_names, **asked.model_dump(exclude={"explainers"}))
    found: list[Measurement] = []
    for section in asked.explainers:
        explainer, how = make_explainer(section), spelled(section)
        assert explainer is not None
        for name in splits:
            split = benchmark.split(name)
            found += measure(method.student, teacher, split, name, explainer, measured_with=how, device=device)
    return found


def dissected(
    asked: DissectionConfig,
    student: nn.Module,
    benchmark: Benchmark,
    folder: Path,
    title: str,
    device: torch.device | str,
) -> list[Measurement]:
    """Numbers of concept detectors in the layers that are ``asked`` for; each says its quantile and threshold."""
    thresholds = asked.model_dump(include={"quantiles", "iou_thresholds", "adjusted_thresholds"})
    found = dissect(
        student,
        make_concepts(asked, benchmark),
        folder,
        name=title,
        layers=asked.layers,
        **thresholds,
        device=device,
        spell_all=True,
    )
    split = asked.split if asked.concepts is None else "concepts"
    return [
        Measurement(
            "student", split, row["metric"], row["value"], group=row["group"], measured_with=row["measured_with"]
        )
        for row in found["rows"]
    ]


def pareto(folder: RunFolder) -> list[dict[str, Any]]:
    """The validations of a run that lie on the Pareto front of accuracy (or F1), EPG and IoU, in order of time."""
    lines = [line for line in folder.read_metrics() if line["event"] == "valid" and "epg" in line["metrics"]]
    found = [
        {name: line["metrics"][name] for name in ("acc", "f1", "epg", "iou") if name in line["metrics"]}
        for line in lines
    ]
    front = pareto_front([tuple(point.values()) for point in found])
    return [
        {"stage": lines[n]["stage"], "step": lines[n]["step"], "epoch": lines[n]["epoch"], **found[n]} for n in front
    ]


def rows_of(
    config: RunConfig, measured: Sequence[Measurement], validation: Mapping[str, float], rule: Rule
) -> list[dict[str, Any]]:
    """The rows of results.json in long format."""
    common = {
        "benchmark": config.benchmark["name"],
        "variant": config.variant or config.method["name"],
        "method": config.method["name"],
        "explainer": None if config.explainer is None else config.explainer["name"],
        "seed": config.seed,
    }

    def row(model: str, split: str | None, metric: str, value: float, **place: str | None) -> dict[str, Any]:
        place = {"split": split, "tier": None, "group": None, "metric": metric, "measured_with": None, **place}
        return {**common, "model": model, **place, "value": value, "selection": rule}

    rows = [row("student", "valid", "loss", validation["loss"])]
    own = "acc" if any(m.metric == "acc" for m in measured) else "f1"
    if "ood_val" in validation:
        rows.append(row("student", "valid_ood", own, validation["ood_val"]))
    rows += [row("student", "valid", name, validation[name]) for name in ("epg", "iou") if name in validation]
    rows += [
        row(m.model, m.split, m.metric, m.value, group=m.group, measured_with=m.measured_with, tier=m.tier)
        for m in measured
    ]
    for model, tier in dict.fromkeys((row["model"], row["tier"]) for row in rows):
        ours = (r for r in rows if (r["model"], r["tier"], r["metric"], r["group"]) == (model, tier, own, None))
        acc = {r["split"]: r["value"] for r in ours}
        if {"iid", "shift"} <= acc.keys():
            rows.append(row(model, None, "gap", acc["iid"] - acc["shift"], tier=tier))
    return rows


def intervals_of(measured: Iterable[Measurement]) -> dict[str, Any]:
    """The intervals over samples, by the keys of the rows that they belong to, and how they were made."""
    places = ("model", "split", "tier", "group", "metric", "measured_with")
    rows = [{**{p: getattr(m, p) for p in places}, **asdict(m.interval)} for m in measured if m.interval is not None]
    return {"over": "samples", "level": LEVEL, "draws": DRAWS, "rows": rows}


def write_heatmaps(
    config: RunConfig,
    method: Method,
    teacher: Teacher | None,
    benchmark: Benchmark,
    splits: tuple[str, ...],
    folder: RunFolder,
    device: torch.device,
) -> None:
    """Keep what the report's heatmap grids are drawn from."""
    explainer = make_explainer(config.evaluation.explainer)
    if explainer is None or config.evaluation.heatmaps == 0:
        return
    measured = config.evaluation.measure
    # A quarter of the largest shift: where that is twice a transformer's patch, half a patch, the worst case.
    shift = 0 if measured is None else measured.shifts // 4
    count = config.evaluation.heatmaps
    arrays = heatmaps(method.student, teacher, benchmark, splits, explainer, count, device, shift=shift)
    arrays["explainer"] = np.array(config.evaluation.explainer["name"])
    with atomic_path(folder.heatmaps) as path:
        np.savez(path, **arrays)


def write_representations(
    config: RunConfig,
    method: Method,
    benchmark: Benchmark,
    splits: tuple[str, ...],
    folder: RunFolder,
    device: torch.device,
) -> None:
    """Keep what the report's pictures of representations are drawn from; of the split where the shortcut misleads."""
    if not config.evaluation.pictures:
        return
    split = "shift" if "shift" in splits else splits[-1]
    arrays = representations(method.networks(), benchmark.split(split), config.evaluation.pictures, device)
    arrays |= {"split": np.array(split), "classes": np.array(benchmark.classes), "biases": np.array(benchmark.biases)}
    with atomic_path(folder.representations) as path:
        np.savez(path, **arrays)


def shortcut_of(benchmark: Benchmark, splits: Iterable[str]) -> dict[str, Any]:
    """By split: samples, those whose bias disagrees with the label, the bias's predictive power; where it is known."""
    found: dict[str, Any] = {}
    for name in splits:
        split = benchmark.split(name)
        if split.bias is not None and split.label.ndim == 1 and len(split) > 0:
            known = (split.label >= 0) & (split.bias >= 0)
            label, bias = split.label[known], split.bias[known]
            power = predictive_power(bias, label) if len(label) else None
            conflicting = int((bias != label).sum())
            found[name] = {"size": len(label), "conflicting": conflicting, "predictive_power": power}
    return found
