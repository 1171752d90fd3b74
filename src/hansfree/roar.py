"""ROAR and DiffROAR from one config: train the models, rank pixels by their maps, remove them, retrain, compare.

::

    OUT/models/                a suite's folder: the models that the config trains
    OUT/ranks/MODEL/seed-N/    the order of every image's pixels, once for all fractions and both ends
    OUT/retrained/             a run folder for each model, end, fraction and seed
    OUT/results.json  report.html  table.md  table.csv

What was interrupted goes on where it stopped: each of these is done, or made anew. See :mod:`hansfree.audits.roar` for
what is measured.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from hansfree.audits.roar import (
    ENDS,
    Channels,
    ClassToExplain,
    Relevance,
    check_one_label,
    diffroar,
    indifferent,
    relevance_of,
    write_ranks,
)
from hansfree.benchmarks.masked_pixels import End, Fill, check_fraction, fill_colour
from hansfree.config import Schema, Section, merge, parse
from hansfree.core import TEST_SPLITS, TRAINING_SPLITS, Benchmark
from hansfree.errors import RunError, UserError, nearest
from hansfree.experiment import check
from hansfree.models import load_model
from hansfree.parts import RunConfig, make_explainer, make_model, named_benchmark, spelled
from hansfree.plan import Planned, SuiteConfig
from hansfree.report.roar import build_roar_report
from hansfree.runs import RunFolder, SuiteFolder, read_results, sole_writer, write_json
from hansfree.store.identity import digest_of_model
from hansfree.suite import Cell, Outcome, Watch, cells_of, check_variants, default_jobs, run_locally, run_suite
from hansfree.training import make_accelerator

WHOLE = "nothing removed"
"""The retraining that all models share."""


class RemovalConfig(Schema):
    """What is removed from the images."""

    explainer: Section = Field(default_factory=lambda: {"name": "gradient", "absolute": True})
    """Whose maps put the pixels in order, by value: take sizes where a sign means nothing."""
    target: ClassToExplain = "label"
    """The class that is explained: the label, as published, or the model's own ``top``."""
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    ends: tuple[End, ...] = ENDS
    """Which end of the order is removed; DiffROAR needs both, ROAR the top."""
    fill: Fill = "mean"
    """In place of what is removed: the mean colour of the training images, a number in [0, 1], or one per channel."""
    channels: Channels = "together"
    """Whole pixels are ranked, or (``apart``, as in DiffROAR's code) each channel's values."""

    @model_validator(mode="after")
    def _some_of_each(self) -> Self:
        if not self.fractions or not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError("fractions must be numbers between 0 and 1, such as [0.1, 0.5, 0.9]")
        if not self.ends or len(set(self.ends)) < len(self.ends) or len(set(self.fractions)) < len(self.fractions):
            raise ValueError("ends and fractions must each name something, and nothing twice")
        return self


class RoarConfig(Schema):
    """Models whose maps are judged, what is removed, how is retrained. Every other key of the file is a run's."""

    name: str
    title: str | None = None
    description: str | None = None
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each trains models of its own, and retrains."""
    reference: str | None = None
    """The model that the others are compared with, seed by seed."""
    models: dict[str, Section] = Field(min_length=1)
    """By name: what differs from the shared settings, as a suite's variants; or ``path``, a finished run or an exported
    folder, in which ``{seed}`` stands for the seed; or ``order: random``, the control."""
    removal: RemovalConfig = RemovalConfig()
    retraining: Section = Field(default_factory=dict[str, Any])
    """What differs from the shared settings when networks are retrained; of these, teachers are left out."""
    reach: float = Field(default=0.95, ge=0, le=1)
    """Training accuracy below which a retraining counts as one that failed."""
    base: Section
    """The shared settings."""

    @property
    def trained(self) -> dict[str, Section]:
        """The models that must be trained first."""
        return {name: model for name, model in self.models.items() if not {"path", "order"} & model.keys()}

    def title_of(self, name: str) -> str:
        """What people read."""
        return self.models[name].get("title", name)


def read_roar(config: Section) -> RoarConfig:
    """The audit in a config file's mapping. Raises ``UserError`` for whatever is misspelt."""
    own = {name for name in RoarConfig.model_fields if name != "base"}
    known = own | set(RunConfig.model_fields)
    for key in config:
        if key not in known:
            raise UserError(f"The ROAR config has no setting {key!r}; {nearest(key, known)}")
    shared = {key: value for key, value in config.items() if key not in own}
    roar = parse(RoarConfig, {**{k: v for k, v in config.items() if k in own}, "base": shared}, "the ROAR config")
    for name, model in roar.models.items():
        if extra := model.keys() & {"grid", "conditions"}:
            raise UserError(f"models.{name}.{extra.pop()} belongs to suites; name each model by itself.")
        if {"path", "order"} & model.keys() and len(model.keys() - {"title"}) > 1:
            raise UserError(f"models.{name} has a path or an order, beside which only title means anything.")
        if model.get("order", "random") != "random":
            raise UserError(f"models.{name}.order cannot be {model['order']!r}; the only one is random.")
    if roar.reference is not None and roar.reference not in roar.models:
        raise UserError(f"The reference {roar.reference!r} is no model; {nearest(roar.reference, roar.models)}")
    return roar


# Planning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retraining:
    """One network to be retrained; ``model`` and ``end`` are None where nothing was removed."""

    cell: Cell
    model: str | None
    end: End | None
    fraction: float


@dataclass(frozen=True)
class Plan:
    """Everything that an audit does, and where it leaves it."""

    roar: RoarConfig
    out: Path

    @cached_property
    def suite(self) -> SuiteConfig | None:
        """The suite that trains the models; None where all are there."""
        if not self.roar.trained:
            return None
        reference = self.roar.reference if self.roar.reference in self.roar.trained else None
        about = {"name": f"{self.roar.name}-models", "title": f"Models of {self.roar.title or self.roar.name}"}
        section = {**about, "seeds": self.roar.seeds, "reference": reference, "variants": self.roar.trained}
        return parse(SuiteConfig, {**section, "base": self.roar.base}, "the ROAR config")

    @cached_property
    def models(self) -> list[Cell]:
        """The runs that train the models."""
        return [] if self.suite is None else cells_of(self.suite, SuiteFolder(self.out / "models"))

    def exported(self, model: str, seed: int) -> Path | None:
        """Where a model is, or will be; None for the random order."""
        section = self.roar.models[model]
        if "order" in section:
            return None
        if "path" not in section:
            return SuiteFolder(self.out / "models").run(model, seed).exported
        path = Path(str(section["path"]).replace("{seed}", str(seed)))
        return RunFolder(path).exported if RunFolder(path).exported.is_dir() else path

    def ranks(self, model: str, seed: int) -> Path:
        """The folder of a model's ranks."""
        name = SuiteFolder(self.out).run(model, seed).path.parent.name
        return self.out / "ranks" / name / f"seed-{seed}"

    def whole(self, seed: int) -> RunConfig:
        """The retraining on whole images."""
        own = {"teacher", "teacher_input", "explainer", "method", "selection", "evaluation"}
        base = {key: value for key, value in self.roar.base.items() if key not in own}
        base |= {"method": {"name": "erm"}, "selection": "last"}
        about = {"name": self.roar.name, "variant": WHOLE, "title": None, "seed": seed}
        config = parse(RunConfig, merge(base, self.roar.retraining) | about, "retraining")
        shared = self.roar.base.get("evaluation") or {}
        splits = shared.get("splits") or self.tests(named_benchmark(config.benchmark))
        evaluation = {"splits": [*splits, "train"], "heatmaps": 0}
        return parse(RunConfig, merge(config.model_dump(), {"evaluation": evaluation}), "retraining")

    def tests(self, benchmark: Benchmark) -> tuple[str, ...]:
        """The test splits that are judged, unless the config names some."""
        return tuple(name for name in benchmark.split_names() if name in TEST_SPLITS)

    def retrainings(self) -> Iterator[Retraining]:
        """Every retraining; seeds in the outer loop, so that a first whole round comes early."""
        removal, folder = self.roar.removal, SuiteFolder(self.out / "retrained")
        for seed in self.roar.seeds:
            whole = self.whole(seed)
            yield Retraining(_cell(WHOLE, whole, folder), None, None, 0.0)
            for model in self.roar.models:
                for fraction in removal.fractions:
                    for end in removal.ends:
                        benchmark = {
                            "name": "masked-pixels", "benchmark": whole.benchmark,
                            "ranks": str(self.ranks(model, seed)), "fraction": fraction, "end": end,
                            "fill": removal.fill,
                        }  # fmt: skip
                        name = f"{model}, {end} {fraction:g}"
                        config = whole.model_copy(update={"benchmark": benchmark, "variant": name})
                        yield Retraining(_cell(name, config, folder), model, end, fraction)


def _cell(name: str, config: RunConfig, folder: SuiteFolder) -> Cell:
    return Cell(Planned(name, name, name, None), config.seed, config, folder.run(name, config.seed))


def check_plan(plan: Plan) -> dict[str, Any]:
    """Build everything once, train nothing, and say what would be done. Raises ``UserError`` for mistakes."""
    roar = plan.roar
    if plan.suite is not None:
        for name, reason in check_variants(plan.models).items():
            raise UserError(f"models.{name}: {reason}; leave it out, or choose another benchmark.")
    for name in roar.models:
        for place in {plan.exported(name, seed) for seed in roar.seeds if name not in roar.trained}:
            if place is not None and not (place / "config.json").is_file():
                raise UserError(f"models.{name}.path: {place} holds no exported model; name a finished run.")
    whole = plan.whole(roar.seeds[0])
    benchmark = named_benchmark(whole.benchmark)
    check_one_label(benchmark)
    fill_colour(roar.removal.fill, [0.0] * benchmark.input.channels)
    told = check(whole)
    batch = benchmark.split("train").batch(torch.arange(2))
    for name in roar.models:
        elements = _tried(plan, name, benchmark)(batch)[0].numel()
        for fraction in roar.removal.fractions:
            check_fraction(fraction, elements)
    count = len(roar.seeds) * (1 + len(roar.models) * len(roar.removal.fractions) * len(roar.removal.ends))
    return {
        "models": f"{', '.join(roar.models)}; {len(plan.models)} of them to be trained, all seeds counted",
        "maps": order_of(roar.removal),
        "fill": roar.removal.fill,
        "retraining": f"{count} networks, {told['steps']} steps each, to a training accuracy of {roar.reach:g}",
        **{key: told[key] for key in ("data", "model", "method", "selection")},
    }


def _tried(plan: Plan, model: str, benchmark: Benchmark) -> Relevance:
    """A model's relevance before it is trained: what an explainer refuses is refused before hours of training."""
    place = plan.exported(model, plan.roar.seeds[0])
    if place is None:
        return indifferent
    if model in plan.roar.trained:
        network = make_model(next(cell.config.model for cell in plan.models if cell.variant == model), benchmark)
    else:
        network = load_model(str(place), num_classes=len(benchmark.classes))
    return _relevance(plan.roar.removal, network, benchmark)


def _relevance(removal: RemovalConfig, network: nn.Module, benchmark: Benchmark) -> Relevance:
    explainer = make_explainer(removal.explainer)
    assert explainer is not None
    size = (benchmark.input.height, benchmark.input.width)
    return relevance_of(network, explainer, removal.target, removal.channels, size)


# Running ------------------------------------------------------------------------------------------------------


def run_roar(
    roar: RoarConfig,
    out: Path,
    *,
    jobs: int | None = None,
    device: str | None = None,
    watch: Watch = lambda phase, done, total, running: None,
) -> RunFolder:
    """Do what is not done yet, and write results, tables and report. Raises ``UserError`` before anything is trained
    for mistakes, ``RunError`` where a model's training fails; a retraining that fails is left out and named."""
    plan = Plan(roar, out)
    check_plan(plan)
    with sole_writer(out):
        folder = RunFolder.create(out, {"audit": "roar", **roar.model_dump()}, resume=True)
        if plan.suite is not None:
            trained = run_suite(plan.suite, out / "models", jobs=jobs, device=device, watch=watch)
            for cell in read_results(trained.results)["cells"]:
                if cell["status"] != "done":
                    raise RunError(f"The model {cell['variant']}, seed {cell['seed']}, failed: {cell['error']}")
        for model in roar.models:
            for seed in roar.seeds:
                _rank(plan, model, seed, device, watch)
        retrainings = list(plan.retrainings())
        cells = [retraining.cell for retraining in retrainings]
        outcomes = run_locally(cells, jobs or default_jobs(len(cells)), device, _tidying(cells, watch))
        _tidy(cells)
        write_json(folder.results, gather(plan, retrainings, outcomes))
        build_roar_report(folder.path)
    return folder


def _rank(plan: Plan, model: str, seed: int, device: str | None, watch: Watch) -> None:
    """Write a model's ranks of all images."""
    removal, whole, place = plan.roar.removal, plan.whole(seed), plan.exported(model, seed)
    benchmark = named_benchmark(whole.benchmark)
    on = make_accelerator(device=device).device
    relevance, told = indifferent, {"model": None, "order": "random"}
    if place is not None:
        network = load_model(str(place), num_classes=len(benchmark.classes)).to(on)
        relevance = _relevance(removal, network, benchmark)
        told = {"model": digest_of_model(network), "order": order_of(removal)}
    splits = whole.evaluation.splits or ()
    names = tuple(dict.fromkeys((*TRAINING_SPLITS, *splits)))
    label = f"ranks of {model}, seed {seed}"
    write_ranks(
        relevance, benchmark, names, plan.ranks(model, seed), told=told, seed=seed, device=on,
        watch=lambda done, total: watch("ranks", 0, 0, {label: (done, total)}),
    )  # fmt: skip


def _tidying(cells: list[Cell], watch: Watch) -> Watch:
    """``watch`` that also removes the checkpoints of each retraining that has ended."""
    before: dict[str, Cell] = {}

    def told(phase: str, done: int, total: int, running: Mapping[str, tuple[int, int]]) -> None:
        _tidy(cell for label, cell in before.items() if label not in running)
        before.clear()
        before.update((cell.label, cell) for cell in cells if cell.label in running)
        watch(phase, done, total, running)

    return told


def _tidy(cells: Iterable[Cell]) -> None:
    # Hundreds of retrainings of a large network, each with its optimiser, would fill a disk; nothing reads them again.
    for cell in cells:
        if cell.folder.is_done():
            shutil.rmtree(cell.folder.last.parent, ignore_errors=True)


# Gathering ----------------------------------------------------------------------------------------------------


def order_of(removal: RemovalConfig) -> str:
    """Whose maps put the elements in order, on one line."""
    return f"{spelled(removal.explainer)}, target {removal.target}, channels {removal.channels}"


def gather(plan: Plan, retrainings: list[Retraining], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What results.json holds: the models' own rows, accuracies after retraining, DiffROAR, and what failed."""
    roar = plan.roar
    done = [one for one in retrainings if outcomes[one.cell.label][0] == "done"]
    found = {one.cell.label: read_results(one.cell.folder.results) for one in done}
    first = next(iter(found.values()), {})
    retrained = [row for one in done for row in _accuracies(roar, one, found[one.cell.label])]
    own = [] if plan.suite is None else read_results(plan.out / "models" / "results.json")["rows"]
    return {
        "schema": 1,
        "environment": first.get("environment", {}),
        "config": {"audit": "roar", **roar.model_dump()},
        "rows": [*own, *retrained, *_diffroar(roar, retrained)],
        "cells": [_told(one, outcomes[one.cell.label], found.get(one.cell.label), plan.out) for one in retrainings],
        "data": first.get("data", {}),
    }


def _accuracies(roar: RoarConfig, one: Retraining, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A retrained network's accuracy on each test split."""
    plain = [row for row in results["rows"] if row["metric"] == "acc" and row["group"] is row["tier"] is None]
    by_split = {row["split"]: row["value"] for row in plain if row["model"] == "student"}
    reached = by_split["train"] >= roar.reach
    for split in [split for split in by_split if split not in TRAINING_SPLITS]:
        row = _row(roar, one.model or WHOLE, one.cell.seed, split, "roar", one.end, one.fraction)
        yield row | {"value": by_split[split], "train_acc": by_split["train"], "reached": reached}


def _diffroar(roar: RoarConfig, retrained: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """DiffROAR of each model and seed at each fraction, and its mean where all fractions are there."""
    accuracy: dict[tuple[str, int, str], dict[tuple[End, float], tuple[float, bool]]] = {}
    for row in retrained:
        if row["end"] is not None:
            places = accuracy.setdefault((row["variant"], row["seed"], row["split"]), {})
            places[row["end"], row["fraction"]] = (row["value"], row["reached"])
    for (model, seed, split), values in accuracy.items():
        scores = diffroar({place: value for place, (value, _) in values.items()})
        reached = {share: all(values[end, share][1] for end in ENDS) for share in scores}
        for share, score in scores.items():
            row = _row(roar, model, seed, split, "diffroar", None, share)
            yield row | {"value": score, "reached": reached[share]}
        if len(scores) == len(roar.removal.fractions):
            row = _row(roar, model, seed, split, "diffroar", None, None)
            yield row | {"value": sum(scores.values()) / len(scores), "reached": all(reached.values())}


def _row(
    roar: RoarConfig, variant: str, seed: int, split: str, metric: str, end: str | None, fraction: float | None
) -> dict[str, Any]:
    removal, is_random = roar.removal, "order" in roar.models.get(variant, {})
    share = f"mean over {len(removal.fractions)} fractions" if fraction is None else f"{fraction:g}"
    what = " ".join(filter(None, [end, share, "removed"]))
    told = f"{what}, {'random order' if is_random else order_of(removal)}, fill {removal.fill}"
    return {
        "benchmark": roar.base["benchmark"]["name"], "variant": variant, "method": None,
        "explainer": None if is_random else removal.explainer["name"], "seed": seed, "model": "retrained",
        "split": split, "tier": None, "group": None, "metric": metric,
        "measured_with": WHOLE if fraction == 0 else told, "selection": None,
        "end": end, "fraction": fraction, "fill": removal.fill, "target": removal.target,
    }  # fmt: skip


def _told(one: Retraining, outcome: Outcome, results: Mapping[str, Any] | None, out: Path) -> dict[str, Any]:
    status, error = outcome
    cell = None if results is None else results["cells"][0]
    return {
        "variant": one.cell.variant, "model": one.model, "end": one.end, "fraction": one.fraction,
        "seed": one.cell.seed, "folder": str(one.cell.folder.path.relative_to(out)), "status": status, "error": error,
        "steps": None if cell is None else cell["steps"], "warnings": [] if cell is None else cell["warnings"],
        "time": {} if cell is None else cell["time"],
    }  # fmt: skip
