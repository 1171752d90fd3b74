"""One run, from a config to results: data, teacher, training with checkpoints, evaluation, report."""

import platform
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import nn

from hansfree.benchmarks import BENCHMARKS
from hansfree.config import Schema, Section, construct, merge, parse
from hansfree.core import TEST_SPLITS, Benchmark, Classifier, Explainer, Method, Setup, Teacher
from hansfree.errors import DivergenceError, UserError
from hansfree.evaluation import Rule, Selection, heatmaps, judge, measure
from hansfree.explainers import EXPLAINERS
from hansfree.methods import METHODS
from hansfree.metrics import accuracy, group_accuracies
from hansfree.models import load_model, save_model, with_batch_statistics
from hansfree.models.loading import imported
from hansfree.report import build_report
from hansfree.runs import RunFolder, atomic_path, read_results, write_json
from hansfree.training import Step, Training, fit, make_accelerator

OnStep = Callable[[str, int, int], None]
"""Told what is being trained, the step and the number of steps: what a progress bar needs."""


class TeacherConfig(Schema):
    """Where the teacher comes from: exactly one of ``path``, ``model`` and ``train``."""

    path: str | None = None
    """A folder that ``hansfree export`` or a run wrote."""
    model: Section | None = None
    """A model by name, as under ``model``; ``pretrained: true`` or ``weights`` make it a teacher."""
    train: Section | None = None
    """Train it first: a run of its own, described by what differs from this one."""
    seed: int | Literal["each"] = 0
    """Seed of that training; ``each``: the run's own, so that a suite trains one teacher per seed."""
    statistics: Literal["running", "batch"] = "running"
    """``batch``: its normalisation uses the statistics of each batch, as some papers' code does."""


class EvaluationConfig(Schema):
    """What is measured when training is over."""

    splits: tuple[str, ...] | None = None
    """Default: all test splits of the benchmark."""
    explainer: Section = Field(default_factory=lambda: {"name": "lrp", "epsilon": 0.01})
    """Draws the heatmaps of the report, for every model alike."""
    heatmaps: int = Field(default=10, ge=0)
    """Samples per split whose heatmaps are kept."""
    batch_size: int = Field(default=500, ge=1)


class RunConfig(Schema):
    """One run. Each named section takes what its constructor takes; see ``hansfree list``."""

    name: str | None = None
    variant: str | None = None
    """The cell's name in its suite; default: the method's name."""
    title: str | None = None
    """What people read in tables; default: the variant."""
    benchmark: Section
    model: Section
    teacher: TeacherConfig | None = None
    teacher_input: Literal["input", "clean"] = "input"
    """What the teacher sees: the student's own images, or the benchmark's unbiased twins."""
    method: Section
    explainer: Section | None = None
    training: Training
    selection: Rule | None = None
    """Default: iid_val_loss for methods with a teacher, else iid_val."""
    seed: int = Field(default=0, ge=0)
    evaluation: EvaluationConfig = EvaluationConfig()


# The parts of a run -------------------------------------------------------------------------------------------


def named(registry: Mapping[str, Any], section: Section, kind: str, **given: Any) -> Any:
    """What a section names: an entry of ``registry``, or the user's own ``package.module:Name``."""
    name = section.get("name")
    if isinstance(name, str) and ":" in name:
        registry = {name: imported(name, kind)}
    return construct(registry, section, kind, given=given)


def make_benchmark(config: RunConfig) -> Benchmark:
    """The benchmark that the config describes."""
    return named(BENCHMARKS, config.benchmark, "benchmark")


def make_explainer(section: Section | None) -> Explainer | None:
    """The explainer that a section describes."""
    return None if section is None else named(EXPLAINERS, section, "explainer")


def make_model(section: Section, benchmark: Benchmark) -> Classifier:
    """The network of a ``model`` section, for the benchmark's classes and channels.

    Settings of our own networks stand beside the name: ``{name: small-cnn, widths: [16, 32, 64]}``.
    """
    settings = ("pretrained", "stem", "mean", "std", "weights", "adapter")
    options = {key: value for key, value in section.items() if key not in ("name", *settings)}
    given = {"num_classes": len(benchmark.classes), "channels": benchmark.input.channels, "options": options}
    chosen = {key: section[key] for key in settings if key in section}
    if "name" not in section:
        raise UserError("The model section needs a name, such as small-cnn or torchvision/resnet18.")
    return construct(
        {"model": load_model}, {**chosen, "name": "model"}, "model", given={"name": section["name"], **given}
    )


def make_method(config: RunConfig, benchmark: Benchmark, teacher: Teacher | None) -> Method:
    """The method with its student, the student's first weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    setup = Setup(
        student=lambda: make_model(config.model, benchmark),
        teacher=teacher,
        samples=len(benchmark.split("train")),
        classes=len(benchmark.classes),
        input=benchmark.input,
    )
    explainer = make_explainer(config.explainer)
    given = {"setup": setup} | ({} if explainer is None else {"explainer": explainer})
    section = config.method
    name = section.get("name")
    if explainer is None and name in METHODS and "explainer" in METHODS[name].__init__.__annotations__:
        raise UserError(f"The method {name!r} needs an explainer; add a section such as `explainer: {{name: lrp}}`.")
    return named(METHODS, section, "method", **given)


def selection_rule(config: RunConfig, method: Method) -> Rule:
    """The config's rule, or the default for this kind of method."""
    return config.selection or ("iid_val_loss" if "teacher" in method.needs else "iid_val")


def teacher_config(config: RunConfig) -> RunConfig:
    """The run that trains the teacher of ``config``."""
    assert config.teacher is not None and config.teacher.train is not None
    base = config.model_dump(exclude={"teacher", "teacher_input", "explainer", "variant", "title", "selection"})
    seed = config.seed if config.teacher.seed == "each" else config.teacher.seed
    changes = {"seed": seed, "variant": "teacher", "method": {"name": "erm"}, **config.teacher.train}
    return parse(RunConfig, merge(base, changes), "teacher.train")


def make_teacher(config: RunConfig, benchmark: Benchmark, out: Path, **how: Any) -> Teacher | None:
    """The teacher, trained first in ``out/teacher`` where the config says so."""
    source = config.teacher
    if source is None:
        return None
    if [source.path, source.model, source.train].count(None) != 2:
        raise UserError("The teacher section needs exactly one of path, model and train.")
    if source.train is not None:
        folder = run(teacher_config(config), out / "teacher", resume=True, report=False, **how)
        model: nn.Module = load_model(str(folder.exported), num_classes=len(benchmark.classes))
    elif source.path is not None:
        if not (Path(source.path) / "config.json").is_file():
            raise UserError(
                f"teacher.path: {source.path} holds no exported model; name a folder with config.json in it."
            )
        model = load_model(source.path, num_classes=len(benchmark.classes))
    else:
        model = make_model(source.model or {}, benchmark)
    if source.statistics == "batch":
        model = with_batch_statistics(model)
    return Teacher.live(model, config.teacher_input)


# The run ------------------------------------------------------------------------------------------------------


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    on_step: OnStep = lambda what, step, steps: None,
    report: bool = True,
) -> RunFolder:
    """Train, evaluate and report ``config`` in the folder ``out``; with ``resume``, go on where it stopped.

    Raises ``UserError`` for mistakes in the config, ``RunError`` when training fails.
    """
    accelerator = make_accelerator(precision=config.training.precision, device=device)
    check(config)
    benchmark = make_benchmark(config)
    if accelerator.is_main_process:
        RunFolder.create(out, config.model_dump(), resume=resume)
    accelerator.wait_for_everyone()
    folder = RunFolder(out)
    if folder.is_done():
        if report and not folder.report.exists():
            build_report(folder.path)
        return folder
    started = time.time()
    teacher = make_teacher(config, benchmark, out, device=device, on_step=on_step)
    if teacher is not None:
        teacher.model.to(accelerator.device)
    method = make_method(config, benchmark, teacher)
    environment = describe_environment(accelerator, started)
    if accelerator.is_main_process:
        write_json(folder.environment, environment)
    steps, seconds = train(config, method, benchmark, folder, accelerator, on_step)
    if accelerator.is_main_process:
        evaluate(config, method, benchmark, folder, accelerator.device, environment, steps=steps, seconds=seconds)
        if report:
            build_report(folder.path)
    accelerator.wait_for_everyone()
    return folder


def train(
    config: RunConfig,
    method: Method,
    benchmark: Benchmark,
    folder: RunFolder,
    accelerator: Accelerator,
    on_step: OnStep,
) -> tuple[int, float]:
    """Train with validation and checkpoints; leaves the selected weights in ``method``.

    Returns the number of steps and the seconds they took.
    """
    selection = Selection(selection_rule(config, method), benchmark)
    settings, device = config.training, accelerator.device
    keeper = _Keeper(folder, active=accelerator.is_main_process)
    name = config.variant or config.method["name"]
    method.to(device)
    if keeper.loaded is None:
        metrics, terms = selection.validate(method, config.evaluation.batch_size, device)
        keeper.record({"event": "valid", "stage": "start", "step": 0, "epoch": -1, "metrics": metrics, "terms": terms})
    taken, clock = keeper.steps, time.perf_counter() - keeper.seconds
    resume = None if keeper.loaded is None else keeper.loaded["fit"]
    try:
        for step in fit(method, benchmark, settings, seed=config.seed, accelerator=accelerator, resume=resume):
            taken += 1
            keeper.record({**_line(step), "time": {"seconds": time.perf_counter() - clock}})
            last = step.step == step.steps
            if step.epoch_ends and (last or (step.epoch + 1) % settings.validate_every == 0):
                metrics, terms = selection.validate(method, config.evaluation.batch_size, device)
                where = {"stage": step.stage, "step": step.step, "epoch": step.epoch}
                keeper.record({"event": "valid", **where, "metrics": metrics, "terms": terms})
                keeper.offer(method, selection.score(metrics), where)
            if step.epoch_ends if settings.save_every is None else (last or step.step % settings.save_every == 0):
                keeper.save(step, taken, time.perf_counter() - clock)
            on_step(name, step.step, step.steps)
    except DivergenceError as error:
        raise DivergenceError(f"{error} {keeper.remedy()}") from error
    finally:
        keeper.flush()
    accelerator.wait_for_everyone()  # the main process may still be writing what all now read
    keeper.restore_best(method)
    return taken, time.perf_counter() - clock


class _Keeper:
    """Checkpoints and the log of one run; silent in all processes but the main one."""

    def __init__(self, folder: RunFolder, *, active: bool) -> None:
        self.folder, self.active = folder, active
        self.loaded = load_checkpoint(folder)
        self.best: dict[str, Any] | None = None if self.loaded is None else self.loaded["best"]
        self.steps: int = 0 if self.loaded is None else self.loaded["steps"]
        self.seconds: float = 0.0 if self.loaded is None else self.loaded["time"]["seconds"]
        self.pending: list[dict[str, Any]] = []
        if active:
            folder.truncate_metrics(0 if self.loaded is None else self.loaded["metrics_position"])

    def record(self, line: dict[str, Any]) -> None:
        self.pending.append(line)
        if len(self.pending) >= 20:
            self.flush()

    def flush(self) -> None:
        if self.active and self.pending:
            self.folder.append_metrics(self.pending)
        self.pending = []

    def offer(self, method: Method, score: float, where: dict[str, Any]) -> None:
        if self.best is not None and score < self.best["score"]:
            return
        self.best = {"score": score, **where}
        if self.active:
            with atomic_path(self.folder.best) as path:
                torch.save({"method": method.state_dict(), **self.best}, path)

    def save(self, step: Step, steps: int, seconds: float) -> None:
        self.flush()
        if not self.active:
            return
        state = {
            "fit": step.snapshot(),
            "best": self.best,
            "steps": steps,
            "metrics_position": self.folder.metrics_position(),
            "time": {"seconds": seconds},
        }
        if self.folder.last.exists():
            self.folder.last.replace(self.folder.previous)
        with atomic_path(self.folder.last) as path:
            torch.save(state, path)

    def remedy(self) -> str:
        good = next((path for path in (self.folder.last, self.folder.previous) if path.exists()), None)
        if good is None:
            return "There is no checkpoint from before; try a smaller training.lr or a smaller training.clip."
        return f"The last good checkpoint is {good}; try a smaller training.lr or a smaller training.clip."

    def restore_best(self, method: Method) -> None:
        if self.best is not None:
            method.load_state_dict(_read_checkpoint(self.folder.best)["method"])


def load_checkpoint(folder: RunFolder) -> dict[str, Any] | None:
    """The newest checkpoint of a run, None where there is none. Raises ``UserError`` for a damaged one."""
    for path in (folder.last, folder.previous):
        if path.exists():
            return _read_checkpoint(path)
    return None


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        folder = RunFolder(path.parent.parent)
        if path == folder.last and folder.previous.exists():
            remedy = f"delete it, and --resume goes on from {folder.previous}"
        else:
            remedy = "delete the run's folder and start it again"
        raise UserError(f"The checkpoint {path} is damaged; {remedy}.") from error


def _line(step: Step) -> dict[str, Any]:
    return {
        "event": "step",
        "stage": step.stage,
        "step": step.step,
        "steps": step.steps,
        "epoch": step.epoch,
        "terms": dict(step.terms),
        "loss": step.loss,
        "lr": dict(step.lr),
        "grad_norm": dict(step.grad_norm),
    }


# Evaluation ---------------------------------------------------------------------------------------------------


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
    method.to(device).eval()
    teacher = method.teacher if "teacher" in method.needs else None
    settings = config.evaluation
    tests = settings.splits or tuple(name for name in benchmark.split_names() if name in TEST_SPLITS)
    rule = selection_rule(config, method)
    metrics, _ = Selection(rule, benchmark).validate(method, settings.batch_size, device)
    judged = judge(method, teacher, benchmark, ("valid", *tests), settings.batch_size, device)
    warnings = flags(folder, metrics, accuracy(judged["teacher", "valid"]) if teacher else None)
    write_heatmaps(config, method, teacher, benchmark, tests, folder, device)
    if isinstance(method.student, Classifier):
        save_model(method.student, folder.exported, input=benchmark.input, classes=benchmark.classes)
    results = {
        "schema": 1,
        "environment": environment,
        "config": config.model_dump(),
        "rows": rows_of(config, judged, metrics, rule),
        "cells": [
            {
                "variant": config.variant or config.method["name"],
                "title": config.title,
                "seed": config.seed,
                "folder": ".",
                "status": "done",
                "error": None,
                "method": config.method["name"],
                "explainer": None if config.explainer is None else config.explainer["name"],
                "needs": sorted(method.needs | ({"clean"} if config.teacher_input == "clean" else set())),
                "selection": rule,
                "warnings": warnings,
                "steps": steps,
                "time": {"train_seconds": seconds},
            }
        ],
        "data": benchmark.record(),
    }
    write_json(folder.results, results)
    return results


def teacher_accuracy(
    teacher: Teacher | None, benchmark: Benchmark, batch_size: int, device: torch.device
) -> float | None:
    """The teacher's accuracy on validation data."""
    if teacher is None:
        return None
    valid = benchmark.split("valid")
    parts = torch.arange(len(valid)).split(batch_size)
    answers = torch.cat([teacher.logits(valid.batch(index).to(device)).argmax(1).cpu() for index in parts])
    return (answers == valid.label).double().mean().item()


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


def rows_of(
    config: RunConfig, judged: Mapping[tuple[str, str], Any], validation: Mapping[str, float], rule: Rule
) -> list[dict[str, Any]]:
    """The rows of results.json in long format."""
    common = {
        "benchmark": config.benchmark["name"],
        "variant": config.variant or config.method["name"],
        "method": config.method["name"],
        "explainer": None if config.explainer is None else config.explainer["name"],
        "seed": config.seed,
    }

    def row(model: str, split: str | None, metric: str, value: float, group: str | None = None) -> dict[str, Any]:
        place = {"split": split, "tier": None, "group": group, "metric": metric, "measured_with": None}
        return {**common, "model": model, **place, "value": value, "selection": rule}

    rows = [row("student", "valid", "loss", validation["loss"])]
    for (model, split), predictions in judged.items():
        rows += [row(model, split, metric, value) for metric, value in measure(predictions).items()]
        seen = {g: v for g, v in group_accuracies(predictions).items() if g in predictions.training_groups}
        rows += [row(model, split, "acc", value, f"y:{y},a:{a}") for (y, a), value in seen.items()]
    for model in dict.fromkeys(model for model, _ in judged):
        acc = {r["split"]: r["value"] for r in rows if r["model"] == model and r["metric"] == "acc" and not r["group"]}
        if {"iid", "shift"} <= acc.keys():
            rows.append(row(model, None, "gap", acc["iid"] - acc["shift"]))
    return rows


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
    arrays = heatmaps(method.student, teacher, benchmark, splits, explainer, config.evaluation.heatmaps, device)
    arrays["explainer"] = np.array(config.evaluation.explainer["name"])
    with atomic_path(folder.heatmaps) as path:
        np.savez(path, **arrays)


def reevaluate(folder: RunFolder, *, device: str | None = None) -> dict[str, Any]:
    """Measure a finished run again, from its exported weights."""
    old = read_results(folder.results)
    config = parse(RunConfig, old["config"], str(folder.config))
    accelerator = make_accelerator(device=device)
    benchmark = make_benchmark(config)
    teacher = make_teacher(config, benchmark, folder.path, device=device)
    method = make_method(config, benchmark, teacher)
    checkpoint = folder.best if folder.best.exists() else folder.last
    method.load_state_dict(_read_checkpoint(checkpoint)["method"])
    cell = old["cells"][0]
    environment = describe_environment(accelerator, time.time())
    results = evaluate(
        config,
        method,
        benchmark,
        folder,
        accelerator.device,
        environment,
        steps=cell["steps"],
        seconds=cell["time"]["train_seconds"],
    )
    build_report(folder.path)
    return results


def check(config: RunConfig) -> dict[str, Any]:
    """Build everything that ``config`` names, train nothing, and say what would be done.

    Mistakes show here, before a teacher is trained for an hour. Raises ``UserError``.
    """
    benchmark = make_benchmark(config)
    model = make_model(config.model, benchmark)
    teacher = None
    if config.teacher is not None:
        source = config.teacher.model or config.model
        if config.teacher.train is not None:
            recipe = teacher_config(config)
            check(recipe)
            source = recipe.model
        teacher = Teacher.live(make_model(source, benchmark), config.teacher_input)
    method = make_method(config, benchmark, teacher)
    make_explainer(config.evaluation.explainer)
    split = benchmark.split("train")
    per_epoch = max(1, len(split) // min(config.training.batch_size, len(split)))
    return {
        "method": config.method["name"],
        "needs": ", ".join(sorted(method.needs)) or "nothing beyond labels",
        "selection": selection_rule(config, method),
        "data": f"{config.benchmark['name']}, {len(split)} training samples, {len(benchmark.classes)} classes",
        "model": f"{config.model['name']}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "steps": config.training.total_steps(per_epoch),
    }


def export_run(folder: RunFolder, out: Path) -> None:
    """Copy a finished run's model. Raises ``UserError`` where the run is not done or ``out`` holds other files."""
    if not (folder.exported / "config.json").is_file():
        raise UserError(f"{folder.path} holds no exported model; finish the run with --resume first.")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out.")
    for name in ("model.safetensors", "config.json"):
        with atomic_path(out / name) as path:
            shutil.copyfile(folder.exported / name, path)


def describe_environment(accelerator: Accelerator, started: float) -> dict[str, Any]:
    """Versions and hardware, for the run folder."""
    return {
        "hansfree": version("hansfree"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": str(accelerator.mixed_precision).replace("no", "fp32"),
        "time": {"started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started))},
    }
