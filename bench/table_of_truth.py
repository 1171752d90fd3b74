"""Which explainer is right on which network: every cell measured, in float64, with random weights that matter.

    python bench/table_of_truth.py [--network NAME ...] [--explainer NAME ...] [--resume] [--out docs/explainers.md]

Cells are kept in a folder beside this file, one file per network, as soon as they are measured; the page is written
from all of them. ``--resume`` leaves cells alone that were measured with the library's code as it is now.
"""

import argparse
import hashlib
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from gradient_check import gradient_errors, some_parameters
from torch import Tensor, nn
from truth_networks import NETWORKS, Network, prepared
from truth_oracles import QUADRATURE, compared, completeness

import hansfree
from hansfree.core import Explainer
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS, LRP, propagation
from hansfree.runs import atomic_path
from hansfree.torchvision_guard import import_torchvision

WRONG = 1e-3
"""A gradient error above this is printed bold."""

CHEAPER: dict[str, dict[str, Any]] = {"integrated-gradients": {"steps": 2}, "smoothgrad": {"samples": 2}}
"""Settings that make a row affordable; they are named in the page."""


@dataclass
class Cell:
    """What was measured of one explainer on one network."""

    code: str
    seconds: float = 0.0
    refusal: str | None = None
    failure: str | None = None
    reached: int = 0
    matrices: int = 0
    median: float | None = None
    worst: float | None = None
    worst_name: str | None = None
    oracle: str | None = None
    oracle_error: float | None = None
    promise: str | None = None
    promise_error: float | None = None


def rows() -> dict[str, Explainer]:
    """Every registered explainer as it comes, LRP once for each semantics."""
    found: dict[str, Explainer] = {}
    for name, kind in EXPLAINERS.items():
        if kind is LRP:
            found |= {f"lrp, {semantics}": LRP(semantics=semantics) for semantics in get_args(propagation.Semantics)}
        else:
            found[name] = kind(**CHEAPER.get(name, {}))
    return found


def code_digest() -> str:
    """Changes whenever the library's code does."""
    files = sorted(Path(hansfree.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def measured(row: str, explainer: Explainer, network: Network, built: tuple[nn.Module, Any, Tensor]) -> Cell:
    """One cell. A ``UserError`` is a refusal; any other exception is a failure and says so in the page."""
    cell, start = Cell(code_digest()), time.perf_counter()
    try:
        _fill(cell, row, explainer, network, *built)
    except UserError as error:
        cell.refusal = str(error)
    except Exception as error:  # the page is to show it, and the other cells are to be measured
        cell.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    cell.seconds = round(time.perf_counter() - start, 2)
    return cell


def _fill(
    cell: Cell, row: str, explainer: Explainer, network: Network, model: nn.Module, x: Any, target: Tensor
) -> None:
    with torch.no_grad():
        map = explainer(model, x, target).map
    if map.requires_grad or not map.isfinite().all() or not map.any():
        raise ValueError("the map is not a finite constant with something in it")
    probe = torch.randn(map.shape, generator=torch.Generator().manual_seed(2), dtype=map.dtype)

    def loss() -> Tensor:
        return (explainer(model, x, target).map * probe).sum()

    def value() -> Tensor:
        with torch.no_grad():
            return loss()

    matrices = [p for p in model.parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(loss(), matrices, allow_unused=True)
    cell.matrices = len(matrices)
    cell.reached = sum(gradient is not None and bool(gradient.any()) for gradient in gradients)
    errors = gradient_errors(loss, model, some_parameters(model, 4), value=value)
    cell.median = statistics.median(errors.values())
    cell.worst_name = max(errors, key=lambda name: errors[name])
    cell.worst = errors[cell.worst_name]
    cell.oracle, cell.oracle_error = compared(row, explainer, network, model, x, target) or (None, None)
    cell.promise, cell.promise_error = completeness(row, explainer, network, model, x, target) or (None, None)


Cells = dict[str, dict[str, Cell]]
"""By network, then by row."""


def read(folder: Path) -> Cells:
    """The cells of all runs so far."""
    return {file.stem: _column(file) for file in sorted(folder.glob("*.json"))}


def _column(file: Path) -> dict[str, Cell]:
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {row: Cell(**cell) for row, cell in kept.items()}


def measure(
    name: str, network: Network, explainers: Mapping[str, Explainer], folder: Path, *, resume: bool = False
) -> dict[str, Cell]:
    """One column; every cell is kept in ``folder`` at once."""
    folder.mkdir(parents=True, exist_ok=True)
    file, code = folder / f"{name}.json", code_digest()
    column = {row: cell for row, cell in _column(file).items() if row in explainers or row in rows()}
    wanted = [row for row in explainers if not (resume and row in column and column[row].code == code)]
    try:
        built = prepared(network) if wanted else None
    except Exception as error:  # the page is to show it
        column.update({row: Cell(code, failure=f"{type(error).__name__}: {error}") for row in wanted})
        say(f"{name}: cannot be built: {error}")
        wanted = []
    for row in wanted:
        column[row] = measured(row, explainers[row], network, built)
        say(f"{name}, {row}: {summary(column[row])} ({column[row].seconds:.1f} s)")
        _keep(column, file)
    _keep(column, file)
    return column


def _keep(column: Mapping[str, Cell], file: Path) -> None:
    """Whole or not at all."""
    plain = {row: asdict(cell) for row, cell in column.items()}
    with atomic_path(file) as path:
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def _in_a_process(name: str, explainers: list[str], folder: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    import_torchvision("torchvision.models")
    warnings.simplefilter("ignore")
    known = rows()
    measure(name, NETWORKS[name], {row: known[row] for row in explainers}, folder, resume=resume)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The page.


class Notes:
    """Sentences by number, each printed once."""

    def __init__(self) -> None:
        self.sentences: dict[str, int] = {}

    def mark(self, sentence: str) -> str:
        """The number of ``sentence``, in brackets."""
        return f"[{self.sentences.setdefault(sentence, len(self.sentences) + 1)}]"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {sentence}" for sentence, number in self.sentences.items())


def small(value: float | None) -> str:
    """An error as a power of ten, bold where it is no longer an error of rounding."""
    if value is None:
        return ""
    text = "0" if value == 0 else f"{value:.0e}"
    return f"**{text}**" if value > WRONG else text


def summary(cell: Cell, notes: Notes | None = None) -> str:
    """A cell of the first table."""
    if cell.refusal is not None:
        return f"refused {notes.mark(cell.refusal) if notes else cell.refusal}"
    if cell.failure is not None:
        return f"**fails** {notes.mark(cell.failure) if notes else cell.failure}"
    if cell.reached == 0:
        return "value"
    right = cell.worst is not None and cell.worst <= WRONG
    return f"{'✓' if right else '✗'} {small(cell.median)} ({small(cell.worst)})"


def _matrix(cells: Cells, networks: Iterable[str], explainers: Iterable[str], text: Any) -> str:
    networks = list(networks)
    lines = ["| | " + " | ".join(NETWORKS[name].title if name in NETWORKS else name for name in networks) + " |"]
    lines.append("|---|" + "---|" * len(networks))
    for row in explainers:
        found = [cells.get(name, {}).get(row) for name in networks]
        lines.append(f"| {row} | " + " | ".join("" if cell is None else text(cell) for cell in found) + " |")
    return "\n".join(lines)


def _finding(name: str | None, error: float | None) -> str:
    text = small(error).strip("*") if name == QUADRATURE else small(error)
    return "" if name is None else f"{text} ({name})"


def page(cells: Cells, explainers: Mapping[str, Explainer]) -> str:
    """The document, from the cells alone."""
    names = [*(name for name in NETWORKS if name in cells), *(name for name in cells if name not in NETWORKS)]
    notes, given = Notes(), (cells, names, list(explainers))
    tables = [
        _matrix(*given, lambda cell: summary(cell, notes)),
        _matrix(*given, lambda cell: _finding(cell.oracle, cell.oracle_error)),
        _matrix(*given, lambda cell: _finding(cell.promise, cell.promise_error)),
        _matrix(*given, lambda cell: f"{cell.reached} of {cell.matrices}" if cell.matrices else ""),
    ]
    settings = "\n".join(f"- {row}: `{explainer}`" for row, explainer in explainers.items())
    parts = [INTRODUCTION.format(torch=torch.__version__), "## Gradients", GRADIENTS, tables[0], str(notes)]
    parts += ["## Agreement", AGREEMENT, tables[1], "## Completeness", COMPLETENESS, tables[2]]
    parts += ["## Weights that a loss reaches", REACHED, tables[3], "## The explainers as measured", settings]
    return "\n\n".join(part for part in parts if part) + "\n"


INTRODUCTION = """# Which explainer is right on which network

Written by `make truth` (bench/table_of_truth.py) with torch {torch}; no figure is typed in. Networks have random
weights, scales and biases, and batch norms whose running statistics lie near those of random images but not on them
(EfficientNet-Lite0 has its trained weights). Everything is in float64, evaluation mode, two samples."""

GRADIENTS = """A loss on the map is differentiated by the weights and compared with central finite differences:
the median and, in brackets, the largest relative error over four weight tensors from first to last layer, the best of
several step sizes for each. ✗ and bold: above 1e-3. "value": the map is right to look at, but no weight learns from it.
"refused": the explainer says why it does not explain this network, in the sentence of that number below."""

AGREEMENT = """The map against somebody else's: largest difference relative to the largest value. Captum for gradients,
hooks on ReLU modules for fused LRP, zennit with its canonisers for branchwise LRP (in networks whose batch norms have
an eps of 0, for zennit forgets it), the package `bcos` for W(x), a formula written out for features."""

COMPLETENESS = """Where theory promises what a map adds up to, the relative error of its sum: gradient × input on
networks of ReLUs without biases, LRP without biases as ε goes to 0, the contributions of a B-cos network. Integrated
gradients from black with 64 steps: this is the error of the quadrature, tiny where activations are smooth; across the
kinks of ReLUs in a network of random weights it falls only as fast as steps are added."""

REACHED = """Weight tensors of two or more dimensions that receive a gradient other than zero."""


def main() -> None:
    known = rows()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    options.add_argument("--explainer", nargs="*", choices=known, default=list(known))
    options.add_argument("--resume", action="store_true")
    options.add_argument("--cells", type=Path, default=Path(__file__).with_name("truth"))
    options.add_argument("--out", type=Path, default=Path("docs/explainers.md"))
    options.add_argument("--processes", type=int, default=2, help="networks measured at once, one thread each")
    given = options.parse_args()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, mp_context=context) as pool:
        settings = (given.explainer, given.cells, given.resume)
        for future in [pool.submit(_in_a_process, name, *settings) for name in given.network]:
            future.result()
    with atomic_path(given.out) as path:
        path.write_text(page(read(given.cells), known), encoding="utf-8")


if __name__ == "__main__":
    main()
