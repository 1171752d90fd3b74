"""One run, from a config to results: data, teacher, training with checkpoints, evaluation, report."""

import platform
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from hansfree.audits.activations import activations
from hansfree.checkpoints import Keeper, read_checkpoint
from hansfree.config import Section, parse
from hansfree.core import Benchmark, Method, Teacher
from hansfree.errors import DivergenceError, NotGivenError, UserError, unknown
from hansfree.evaluation import heatmaps
from hansfree.models import with_batch_statistics
from hansfree.outcome import evaluate, make_selection, measure_maps
from hansfree.parts import (
    RunConfig,
    TeacherConfig,
    make_benchmark,
    make_category,
    make_concepts,
    make_explainer,
    make_method,
    make_network,
    make_stored_data,
    named_benchmark,
    needs_of,
    read_exported,
    selection_rule,
    teacher_config,
)
from hansfree.report import build_report
from hansfree.representations import check_pictures, seen
from hansfree.runs import RunFolder, atomic_path, read_results, sole_writer, write_json
from hansfree.store import StoredTeacher, open_store
from hansfree.training import Step, fit, make_accelerator

OnStep = Callable[[str, int, int], None]
"""Told what is being trained, the step and the number of steps: what a progress bar needs."""


def make_teacher(config: RunConfig, benchmark: Benchmark, out: Path, **how: Any) -> Teacher | None:
    """The teacher, trained first in ``out/teacher`` where the config says so."""
    if config.teacher is None:
        return None
    model = _ready_model(config.teacher, benchmark)
    if model is None and config.teacher.train is not None:
        folder = run(teacher_config(config), out / "teacher", resume=True, report=False, **how)
        model = read_exported(str(folder.exported), benchmark)
    if config.teacher.store is not None:
        return stored_teacher(config, model)
    assert model is not None
    return _live(model, config)


def stored_teacher(config: RunConfig, model: nn.Module | None) -> StoredTeacher:
    """The teacher in the config's store. Raises ``UserError`` where the run asks for what was not stored.

    ``model``: the teacher whose answers they should be, where the config names it.
    """
    assert config.teacher is not None and config.teacher.store is not None
    if config.teacher.statistics == "batch":
        raise UserError("No store has answers of a teacher with statistics: batch; use teacher.statistics: running.")
    reason = None if config.augmentation is None else config.augmentation.not_replayable
    if reason is not None:
        raise UserError(f"The store {config.teacher.store} cannot be replayed, because {reason}.")
    data = make_stored_data(config)
    teacher = open_store(config.teacher.store, data, sees=config.teacher_input, model=model)
    missing = teacher.lacks("train", make_explainer(config.explainer))
    if missing is not None:
        raise UserError(missing)
    return teacher


def _ready_model(source: TeacherConfig, benchmark: Benchmark) -> nn.Module | None:
    """The teacher's model, None where it must be trained first."""
    absent = [source.path, source.model, source.train].count(None)
    if absent != 2 and (absent != 3 or source.store is None):
        raise UserError("The teacher section needs exactly one of path, model and train, or a store.")
    if source.path is None:
        return None if source.model is None else make_network(source.model, benchmark)
    if not (Path(source.path) / "config.json").is_file():
        raise UserError(f"teacher.path: {source.path} holds no exported model; name a folder with config.json in it.")
    return read_exported(source.path, benchmark)


def _live(model: nn.Module, config: RunConfig) -> Teacher:
    assert config.teacher is not None
    return Teacher.live(
        with_batch_statistics(model) if config.teacher.statistics == "batch" else model, config.teacher_input
    )


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
    accelerator = make_accelerator(device=device)
    if config.teacher is not None and config.teacher.freeze is not None:
        raise UserError(
            "teacher.freeze is for suites; for a run alone, name what hansfree store make wrote as teacher.store."
        )
    check(config, accelerator.device)
    benchmark = make_benchmark(config)
    with sole_writer(out) if accelerator.is_main_process else nullcontext():
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
        method = make_method(config, benchmark, teacher)
        environment = describe_environment(accelerator, config.training.precision, started)
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
    selection = make_selection(config, method, benchmark)
    settings, device = config.training, accelerator.device
    keeper = Keeper(folder, active=accelerator.is_main_process)
    name = config.variant or config.method["name"]
    method.place(device)
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
                layers = method.by_layer()
                told = {"layers": layers} if layers else {}
                keeper.record({"event": "valid", **where, "metrics": metrics, "terms": terms, **told})
                keeper.offer(method, selection.score(metrics), where)
            if step.epoch_ends if settings.save_every is None else (last or step.step % settings.save_every == 0):
                keeper.save(step, taken, time.perf_counter() - clock)
            on_step(name, step.step, step.steps)
        if taken == 0:
            keeper.offer(method, 0.0, {"stage": "start", "step": 0, "epoch": -1})
    except DivergenceError as error:
        raise DivergenceError(f"{error} {keeper.remedy()}") from error
    finally:
        keeper.flush()
    accelerator.wait_for_everyone()  # the main process may still be writing what all now read
    keeper.restore_best(method)
    return taken, time.perf_counter() - clock


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


def reevaluate(folder: RunFolder, *, device: str | None = None) -> dict[str, Any]:
    """Measure a finished run again, from its exported weights."""
    old = read_results(folder.results)
    config = parse(RunConfig, old["config"], str(folder.config))
    accelerator = make_accelerator(device=device)
    benchmark = make_benchmark(config)
    teacher = make_teacher(config, benchmark, folder.path, device=device)
    method = make_method(config, benchmark, teacher)
    checkpoint = folder.best if folder.best.exists() else folder.last
    method.load_state_dict(read_checkpoint(checkpoint)["method"])
    cell = old["cells"][0]
    environment = describe_environment(accelerator, config.training.precision, time.time())
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


def check(
    config: RunConfig, device: torch.device | str = "cpu", read: Callable[[Section], Benchmark] = named_benchmark
) -> dict[str, Any]:
    """Build everything that ``config`` names, train nothing, and say what would be done. Raises as :func:`built`."""
    benchmark, method = built(config, device, read)
    split = benchmark.split("train")
    per_epoch = max(1, len(split) // min(config.training.batch_size, len(split)))
    return {
        "method": config.method["name"],
        "needs": ", ".join(sorted(needs_of(config))) or "nothing beyond labels",
        "selection": selection_rule(config, method),
        "data": f"{config.benchmark['name']}, {len(split)} training samples, {len(benchmark.classes)} classes",
        "model": f"{config.model['name']}, {sum(p.numel() for p in method.student.parameters()):,} parameters",
        "steps": config.training.total_steps(per_epoch),
    }


def built(
    config: RunConfig, device: torch.device | str = "cpu", read: Callable[[Section], Benchmark] = named_benchmark
) -> tuple[Benchmark, Method]:
    """Everything that ``config`` names, tried out on two samples; a teacher that must be trained is an untrained one.

    ``read`` gives the benchmark of a section, as in :func:`hansfree.parts.make_benchmark`. Mistakes show here, before
    a teacher is trained for an hour. Raises ``UserError``, and ``NotGivenError`` where the data or the networks do not
    give what the method needs.
    """
    benchmark = make_benchmark(config, read)
    teacher = None
    if config.teacher is not None:
        ready = _ready_model(config.teacher, benchmark)
        untrained = None if config.teacher.train is None else built(teacher_config(config), device, read)[1].student
        if config.teacher.store is not None:
            teacher = stored_teacher(config, ready)
        elif (model := ready or untrained) is not None:
            teacher = _live(model, config)
    method = make_method(config, benchmark, teacher)
    if config.not_applicable is not None:
        raise NotGivenError(
            f"The config calls this run not applicable ({config.not_applicable}); take not_applicable out to make it.",
            config.not_applicable,
        )
    make_selection(config, method, benchmark)
    make_category(config, benchmark)
    config.training.total_steps(1)  # refuses training without a length
    for name in config.evaluation.splits or ():
        if name not in benchmark.split_names():
            raise unknown("split", name, benchmark.split_names())
    try_out(config, method, benchmark, device)
    return benchmark, method


def try_out(config: RunConfig, method: Method, benchmark: Benchmark, device: torch.device | str) -> None:
    """One loss and the maps of two samples: what is refused only when it meets these networks is refused here."""
    method.place(device)
    stage = method.next_stage()
    if stage is not None:
        split = benchmark.split(stage.split)
        method.train()
        method(split.batch(torch.arange(min(2, len(split)))).to(device))
    explainer = make_explainer(config.evaluation.explainer)
    teacher = method.teacher if "teacher" in method.needs else None
    method.eval()
    if explainer is not None and config.evaluation.heatmaps > 0:
        heatmaps(method.student, teacher, benchmark, ("valid",), explainer, 2, device)
    if config.evaluation.pictures:
        check_pictures(config.evaluation.pictures)
        valid = benchmark.split("valid").batch(torch.arange(2)).to(device)
        for network in method.networks().values():
            seen(network, valid.images)
    if config.evaluation.measure is not None:
        few = config.evaluation.measure.model_copy(update={"samples": 2})
        measure_maps(few, method, teacher, benchmark, ("valid",), device)
    if config.evaluation.dissect is not None:
        concepts = make_concepts(config.evaluation.dissect, benchmark)
        activations(method.student, config.evaluation.dissect.layers, concepts.images(torch.arange(1)).to(device))


def export_run(folder: RunFolder, out: Path) -> None:
    """Copy a finished run's model. Raises ``UserError`` where the run is not done or ``out`` holds other files."""
    if not (folder.exported / "config.json").is_file():
        raise UserError(f"{folder.path} holds no exported model; finish the run with --resume first.")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out.")
    for name in ("model.safetensors", "config.json"):
        with atomic_path(out / name) as path:
            shutil.copyfile(folder.exported / name, path)


def describe_environment(accelerator: Accelerator, precision: str, started: float) -> dict[str, Any]:
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
        "precision": precision,
        "time": {"started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started))},
    }
