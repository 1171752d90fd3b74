"""Methods x seeds from one config: the teacher once, the cells in parallel, one table at the end.

A cell that fails does not stop the others; a suite that was interrupted, or run in parts, goes on where it stopped
and skips what is done. Cells run in local processes or as tasks of a Ray cluster.
"""

import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Literal

import torch

from hansfree.config import Section, merge, parse
from hansfree.core import Benchmark
from hansfree.errors import NotGivenError, RunError, UserError
from hansfree.experiment import check, run
from hansfree.freezing import Request, make_store
from hansfree.parts import (
    FreezeConfig,
    RunConfig,
    TeacherConfig,
    make_explainer,
    named_benchmark,
    needs_of,
    teacher_config,
)
from hansfree.plan import Planned, SuiteConfig, chosen_of, curves, families, grids, plan, reference_under, selected
from hansfree.report import build_report
from hansfree.runs import RunFolder, SuiteFolder, read_results, sole_writer, write_json

Outcome = tuple[Literal["done", "failed", "n/a"], str | None]
"""How a cell ended, and why where it did not end well; "n/a": its method needs what its benchmark does not give."""


@dataclass(frozen=True)
class Cell:
    """One planned variant with one seed."""

    planned: Planned
    seed: int
    config: RunConfig
    folder: RunFolder
    teacher: RunConfig | None = None
    """The run that trains its teacher first, where the config says so."""
    freeze: FreezeConfig | None = None
    """What of the trained teacher's answers goes into a store."""

    @property
    def variant(self) -> str:
        """Its name in tables and folders."""
        return self.planned.name

    @property
    def label(self) -> str:
        """What a progress bar calls it."""
        return f"{self.variant}, seed {self.seed}"


Watch = Callable[[str, int, int, Mapping[str, tuple[int, int]]], None]
"""Told the phase, cells done, cells in all, and (step, steps) of what is running."""


def cells_of(suite: SuiteConfig, folder: SuiteFolder) -> list[Cell]:
    """Everything planned with every seed, checked; seeds in the outer loop, so that a first whole round comes early."""
    planned = plan(suite)
    return [_cell(suite, one, seed, folder) for seed in suite.seeds for one in planned]


def _cell(suite: SuiteConfig, one: Planned, seed: int, folder: SuiteFolder) -> Cell:
    names = {"name": suite.name, "variant": one.name, "title": one.title, "seed": seed}
    config = parse(RunConfig, merge(suite.base, one.changes) | names, f"variant {one.name!r}")
    return Cell(one, seed, config, folder.run(one.name, seed), _recipe(suite, one.changes, seed))


def _recipe(suite: SuiteConfig, changes: Section, seed: int) -> RunConfig | None:
    """The teacher's run: of a variant's settings only those under ``teacher`` change it, so that students that
    differ in a learning rate, say, still share one teacher."""
    own = {key: value for key, value in changes.items() if key.partition(".")[0] == "teacher"}
    section = merge(suite.base, own) | {"method": {"name": "erm"}, "seed": seed}
    config = parse(RunConfig, section, "the suite")
    if config.teacher is None or config.teacher.train is None:
        return None
    return teacher_config(config).model_copy(update={"name": "teacher"})


def run_suite(
    suite: SuiteConfig,
    out: Path,
    *,
    only: Collection[str] = (),
    jobs: int | None = None,
    on: Literal["local", "ray"] = "local",
    device: str | None = None,
    watch: Watch = lambda phase, done, total, running: None,
) -> SuiteFolder:
    """Run what is not done yet, gather results.json, write the tables and the report.

    ``only``: run what these variants and conditions name (see :func:`hansfree.plan.selected`), for now; the tables show
    what the folder holds and say what is missing, and a later call without it runs the rest.
    Where only some seeds tune, they run first, with all settings of every grid, and the others run what was chosen.
    Raises ``UserError`` for mistakes in any variant, before anything is trained. A variant whose benchmark does not
    give what its method needs is no mistake: it is left out, and the tables say why.
    """
    wanted = {one.name for one in selected(suite, only)}
    cells = cells_of(suite, SuiteFolder(out))
    not_given = check_variants(cells)
    with sole_writer(out):
        folder = SuiteFolder.create(out, suite.model_dump(), resume=True)
        able = place_teachers([cell for cell in cells if cell.variant not in not_given], folder)
        asked = [cell for cell in able if cell.variant in wanted]
        jobs = jobs or default_jobs(len(asked))
        train_teachers(asked, jobs, device=device, watch=watch)
        make_stores(able, asked, device=device, watch=watch)
        ready = {cell.label: cell for cell in able}
        cells = [ready.get(cell.label, cell) for cell in cells]
        outcomes: dict[str, Outcome] = {
            cell.label: ("n/a", not_given[cell.variant]) for cell in cells if cell.variant in not_given
        }
        outcomes |= {c.label: ("done", None) for c in able if c.variant not in wanted and c.folder.is_done()}
        run_cells = {"local": run_locally, "ray": run_on_ray}[on]
        to_run = {cell.label for cell in asked}
        first = [cell for cell in cells if not cell.planned.setting or cell.seed in suite.tuned_on]
        outcomes |= run_cells([cell for cell in first if cell.label in to_run], jobs, device, watch)
        if suite.tuning_seeds is not None:
            chosen = set(chosen_of(gather(suite, first, outcomes, folder)["suite"]["grids"]).values())
            shown = [cell for cell in cells if cell in first or cell.variant in chosen]
            outcomes |= run_cells([cell for cell in shown if cell.label in to_run], jobs, device, watch)
            cells = shown
        write_json(folder.results, gather(suite, cells, outcomes, folder))
        build_report(folder.path)
    return folder


def check_variants(cells: list[Cell]) -> dict[str, str]:
    """Build everything that each variant names, once. Raises ``UserError`` that names the variant.

    Returns, for each variant that needs what its benchmark does not give, the reason.
    """
    read = _remembered(named_benchmark)
    built: dict[str, str | None] = {}
    not_given: dict[str, str] = {}
    for variant, cell in {cell.variant: cell for cell in cells}.items():
        parts = cell.config.model_dump_json(exclude={"variant", "title", "seed", "training"})
        try:
            cell.config.training.total_steps(1)
            if parts not in built:
                if cell.teacher is not None:
                    check(cell.teacher, read=read)  # what it lacks is no N/A of its student
                built[parts] = _not_given(cell.config, read)
        except UserError as error:
            raise UserError(f"Variant {variant!r}: {error}") from error
        if (reason := built[parts]) is not None:
            not_given[variant] = reason
    return not_given


def _not_given(config: RunConfig, read: Callable[[Section], Benchmark]) -> str | None:
    try:
        check(config, read=read)
    except NotGivenError as error:
        return error.reason
    return None


def _remembered(read: Callable[[Section], Benchmark]) -> Callable[[Section], Benchmark]:
    """``read`` that makes the benchmark of each section once; they all stay in memory as long as it does."""
    made: dict[str, Benchmark] = {}

    def once(section: Section) -> Benchmark:
        key = json.dumps(section, sort_keys=True, default=repr)
        if key not in made:
            made[key] = read(section)
        return made[key]

    return once


def place_teachers(cells: list[Cell], folder: SuiteFolder) -> list[Cell]:
    """The cells with the model that each teacher's run will export in place of its recipe; one run a recipe."""
    places: dict[str, Path] = {}
    placed = []
    for cell in cells:
        source = cell.config.teacher
        if source is None or cell.teacher is None:
            placed.append(cell)
            continue
        key = cell.teacher.model_dump_json()
        if key not in places:
            places[key] = _teacher_place(cell, source, folder, places.values())
        update: dict[str, Any] = {"train": None, "freeze": None, "path": str(RunFolder(places[key]).exported)}
        if source.freeze is not None:
            update["store"] = str(places[key] / "store")
        config = cell.config.model_copy(update={"teacher": source.model_copy(update=update)})
        placed.append(replace(cell, config=config, freeze=source.freeze))
    return placed


def train_teachers(cells: list[Cell], jobs: int, *, device: str | None, watch: Watch) -> None:
    """Train the teachers of cells that :func:`place_teachers` gave, each once; what is done already stays.

    One has all cores; several are shared out between ``jobs`` processes. Raises ``RunError`` where one fails.
    """
    recipes = {_teacher_folder(cell): cell.teacher for cell in cells if cell.teacher is not None}
    for place, recipe in recipes.items():
        if RunFolder(place).is_done():
            RunFolder.create(place, recipe.model_dump(), resume=True)  # refuses what another recipe trained
    waiting = {place: recipe for place, recipe in recipes.items() if not RunFolder(place).is_done()}
    if min(len(waiting), jobs) > 1:
        _train_together(waiting, cells[0], jobs, device=device, watch=watch)
    else:
        for place, recipe in waiting.items():
            run(
                recipe,
                place,
                resume=True,
                device=device,
                report=False,
                on_step=lambda what, step, steps: watch("teacher", 0, len(cells), {what: (step, steps)}),
            )


def _train_together(
    recipes: Mapping[Path, RunConfig], like: Cell, jobs: int, *, device: str | None, watch: Watch
) -> None:
    teachers = [
        Cell(replace(like.planned, name=_called(place)), recipe.seed, recipe, RunFolder(place))
        for place, recipe in recipes.items()
    ]
    outcomes = run_locally(
        teachers, jobs, device, lambda phase, done, total, running: watch("teacher", done, total, running)
    )
    for label, (status, error) in outcomes.items():
        if status == "failed":
            raise RunError(f"{label}: {error}")


def _called(place: Path) -> str:
    return place.parent.name if place.name.startswith("seed-") else place.name


def _teacher_folder(cell: Cell) -> Path:
    """Where the run of a placed cell's teacher is."""
    assert cell.config.teacher is not None and cell.config.teacher.path is not None
    return Path(cell.config.teacher.path).parent


def make_stores(cells: list[Cell], asked: list[Cell], *, device: str | None, watch: Watch) -> None:
    """Ask each teacher that is to be asked once, for the cells ``asked``; what is done already stays.

    The first of all ``cells`` that read a store says what is in it, whichever of them are run now.
    """
    writers = {_store(cell): cell for cell in reversed(cells) if cell.freeze is not None}
    for cell in [writers[store] for store in dict.fromkeys(map(_store, asked)) if store in writers]:
        assert cell.freeze is not None
        explainers = (make_explainer(section) for section in cell.freeze.explainers)
        request = Request(
            tuple(explainer for explainer in explainers if explainer is not None),
            cell.freeze.epsilons,
            None if cell.freeze.classes == "all" else cell.freeze.classes,
            dtype=cell.freeze.dtype,
        )
        make_store(
            cell.config,
            request,
            Path(_store(cell)),
            device=device,
            watch=lambda what, done, total: watch("teacher", 0, len(asked), {f"store: {what}": (done, total)}),
        )


def _store(cell: Cell) -> str:
    return "" if cell.config.teacher is None else str(cell.config.teacher.store)


def _teacher_place(cell: Cell, source: TeacherConfig, folder: SuiteFolder, taken: Iterable[Path]) -> Path:
    """teacher/, or for recipes of their own teacher-CONDITION/ and teacher-VARIANT/; seed-N/ inside where each seed has
    one."""
    names = ["teacher", *([f"teacher-{cell.planned.condition}"] if cell.planned.condition else [])]
    for name in (*names, f"teacher-{cell.folder.path.parent.name}"):
        base = folder.path / name
        place = base / f"seed-{cell.seed}" if source.seed == "each" else base
        if place not in taken:
            return place
    raise AssertionError("a variant has one teacher per seed")


def default_jobs(cells: int) -> int:
    """One process per core, or one in all where an accelerator does the work."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(cells, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


# Running cells ------------------------------------------------------------------------------------------------


def run_cell(config: dict[str, Any], out: str, device: str | None) -> Outcome:
    """Run one cell; never raises, so that its failure stays its own."""
    try:
        run(RunConfig.model_validate(config), Path(out), resume=True, device=device, report=False)
    except (UserError, RunError) as error:
        return "failed", str(error)
    except Exception:
        return "failed", traceback.format_exc(limit=-3)
    return "done", None


def run_locally(cells: list[Cell], jobs: int, device: str | None, watch: Watch) -> dict[str, Outcome]:
    """Run cells in ``jobs`` processes that share the cores out between them; outcomes by the cells' labels.

    A process that dies (out of memory, say) takes only its own cell with it.
    """
    outcomes: dict[str, Outcome] = {cell.label: ("done", None) for cell in cells if cell.folder.is_done()}
    waiting = [cell for cell in cells if cell.label not in outcomes]
    workers = [_Worker(threads=max(1, torch.get_num_threads() // jobs)) for _ in range(min(jobs, len(waiting)))]
    try:
        while waiting or any(worker.cell for worker in workers):
            for worker in workers:
                if worker.cell is None and waiting:
                    worker.start(waiting.pop(0), device)
            busy = [worker for worker in workers if worker.cell]
            connection.wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in busy:
                if worker.cell and (outcome := worker.finished()):
                    outcomes[worker.cell.label] = outcome
                    worker.cell = None
            running = {w.cell.label: w.cell.folder.progress() for w in workers if w.cell}
            watch("cells", len(outcomes), len(cells), running)
    finally:
        for worker in workers:
            worker.stop()
    return outcomes


class _Worker:
    """A process that runs one cell after another, and is replaced when it dies."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.cell: Cell | None = None
        self._launch()

    def _launch(self) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self.threads), daemon=True)
        with _environment(OMP_NUM_THREADS=str(self.threads), MKL_NUM_THREADS=str(self.threads)):
            self.process.start()
        other.close()

    def start(self, cell: Cell, device: str | None) -> None:
        self.cell = cell
        self.pipe.send((cell.config.model_dump(), str(cell.folder.path), device))

    def finished(self) -> Outcome | None:
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self._launch()
            return "failed", f"Its process died (exit status {code}); the machine may have run out of memory."

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


def _work(pipe: connection.Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            config, out, device = pipe.recv()
        except EOFError:
            return
        pipe.send(run_cell(config, out, device))


def _die_with(parent: int) -> None:
    # A worker that outlives a killed suite would write into a folder that the next suite resumes.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_on_ray(cells: list[Cell], jobs: int, device: str | None, watch: Watch) -> dict[str, Outcome]:
    """Run cells as tasks of the Ray cluster that RAY_ADDRESS names, or of a local one with ``jobs`` cores.

    The suite's folder must be reachable under the same path from every node.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise UserError("--on ray needs an extra: pip install 'hansfree[ray]'.") from error
    outcomes: dict[str, Outcome] = {cell.label: ("done", None) for cell in cells if cell.folder.is_done()}
    if not ray.is_initialized():
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        task = ray.remote(num_cpus=1, num_gpus=1 if torch.cuda.is_available() else 0)(run_cell)
        tasks = {
            task.remote(c.config.model_dump(), str(c.folder.path.absolute()), device): c
            for c in cells
            if c.label not in outcomes
        }
        while tasks:
            ready, _ = ray.wait(list(tasks), timeout=0.5)
            for reference in ready:
                cell = tasks.pop(reference)
                try:
                    outcomes[cell.label] = ray.get(reference)
                except RayError as error:
                    outcomes[cell.label] = ("failed", f"Its Ray task died ({error}).")
            running = {c.label: c.folder.progress() for c in tasks.values()}
            watch("cells", len(outcomes), len(cells), running)
    finally:
        ray.shutdown()
    return outcomes


# Gathering ----------------------------------------------------------------------------------------------------


def gather(
    suite: SuiteConfig, cells: list[Cell], outcomes: Mapping[str, Outcome], folder: SuiteFolder
) -> dict[str, Any]:
    """What results.json holds: the rows of every finished cell, each teacher's once, what was chosen, what is missing.

    A cell without an outcome was not run yet.
    """
    rows: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    taught: set[tuple[Any, ...]] = set()
    first: dict[str, Any] = {}
    missing = [cell for cell in cells if cell.label not in outcomes]
    for cell in cells:
        if cell.label not in outcomes:
            continue
        status, error = outcomes[cell.label]
        about = {"condition": cell.planned.condition, "family": cell.planned.family}
        if status != "done":
            described.append(_without_results(cell, status, error, folder) | about)
            continue
        results = read_results(cell.folder.results)
        first = first or results
        teacher = _teacher_name(suite, cell, folder)
        about |= {"folder": str(cell.folder.path.relative_to(folder.path)), "teacher": teacher}
        described += [{**cell_of_run, **about} for cell_of_run in results["cells"]]
        rows += [row for row in results["rows"] if row["model"] != "teacher"]
        path = "" if cell.config.teacher is None else str(cell.config.teacher.path)
        # Row by row: a cell that read the teacher's answers from a store has figures of the stored splits alone.
        theirs = {(teacher, path, *_place(row)): row for row in results["rows"] if row["model"] == "teacher"}
        rows += [{**row, **_of_teacher(teacher, cell, folder)} for key, row in theirs.items() if key not in taught]
        taught |= theirs.keys()
    return {
        "schema": 1,
        "environment": first.get("environment", {}),
        "config": suite.model_dump(),
        "rows": rows,
        "cells": described,
        "data": first.get("data", {}),
        "suite": {
            "name": suite.name,
            "title": suite.title,
            "description": suite.description,
            "seeds": list(suite.seeds),
            **_choices(suite, rows, described, missing),
            "not_run": _not_run(suite, described, missing),
        },
    }


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("split", "tier", "group", "metric", "measured_with"))


def _not_run(suite: SuiteConfig, cells: list[dict[str, Any]], missing: list[Cell]) -> list[dict[str, Any]]:
    """Each variant under each condition of which cells are missing, and whether only some of them are."""
    begun = {(cell["condition"], cell["family"]) for cell in cells}
    return [
        {
            "condition": condition,
            "title": suite.variants[name].get("title", name),
            "in_part": (condition, name) in begun,
        }
        for condition, name in families(cell.planned for cell in missing)
    ]


def _choices(
    suite: SuiteConfig, rows: list[dict[str, Any]], cells: list[dict[str, Any]], missing: list[Cell]
) -> dict[str, Any]:
    """The grids with what was chosen, and what each condition's variants are compared with.

    Of a grid of which a tuning seed is ``missing`` nothing is chosen yet.
    """
    able = {cell["variant"]: cell for cell in cells if cell["status"] != "n/a"}
    planned = plan(suite)
    early = families(cell.planned for cell in missing if cell.planned.setting and cell.seed in suite.tuned_on)
    possible = [one for one in planned if one.name in able and (one.condition, one.family) not in early]
    rules = {name: cell["selection"] for name, cell in able.items() if cell["selection"]}
    teachers = {name: cell["teacher"] for name, cell in able.items() if cell.get("teacher")}
    found = list(grids(suite, possible, rows, rules, teachers))
    absent = {cell.variant for cell in missing} - able.keys()
    absent |= {one.name for one in planned if (one.condition, one.family) in early}
    references = {
        condition: None if (named := reference_under(suite, planned, condition, chosen_of(found))) in absent else named
        for condition in suite.conditions or [None]
    }
    return {
        "reference": references.get(None),
        "conditions": [
            {"name": name, "title": suite.conditions[name].get("title", name), "reference": references[name]}
            for name in suite.conditions
        ],
        "grids": found,
        "curves": list(curves(possible)),
    }


def _teacher_name(suite: SuiteConfig, cell: Cell, folder: SuiteFolder) -> str:
    """What the rows of a cell's teacher are filed under: its place in the folder, ``teacher`` for one from elsewhere,
    and whatever sets it apart from the teacher that the suite's variants share."""
    source, shared = cell.config.teacher, suite.base.get("teacher") or {}
    if source is None:
        return "teacher"
    if source.path is not None and Path(source.path).is_relative_to(folder.path):
        name = Path(source.path).relative_to(folder.path).parts[0]
    else:
        whence = source.path or source.model or source.store
        alike = whence == (shared.get("path") or shared.get("model") or shared.get("store"))
        name = "teacher" if alike else f"teacher {whence}"
    sees = cell.config.teacher_input
    return name if sees == suite.base.get("teacher_input", "input") else f"{name} sees {sees}"


def _of_teacher(name: str, cell: Cell, folder: SuiteFolder) -> dict[str, Any]:
    """What a teacher's row says of itself in place of the student's variant, method and seed."""
    path, seed = None if cell.config.teacher is None else cell.config.teacher.path, 0
    if path is not None and Path(path).is_relative_to(folder.path):
        seed = read_results(Path(path).with_name("results.json"))["cells"][0]["seed"]
    return {"variant": name, "method": None, "explainer": None, "seed": seed, "selection": None}


def _without_results(cell: Cell, status: str, error: str | None, folder: SuiteFolder) -> dict[str, Any]:
    config = cell.config
    return {
        "variant": cell.variant,
        "title": config.title,
        "seed": cell.seed,
        "folder": str(cell.folder.path.relative_to(folder.path)),
        "status": status,
        "error": error,
        "method": config.method.get("name"),
        "explainer": None if config.explainer is None else config.explainer.get("name"),
        "needs": sorted(needs_of(config)),
        "selection": config.selection,
        "warnings": [],
        "steps": None,
        "time": {},
    }
