"""hansfree: train and audit classifiers that are right for the right reasons.

Every name below is imported when it is first asked for, so that neither ``hansfree --help`` nor a report of a
finished run waits for torch.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hansfree import benchmarks, distances, explainers, methods, metrics, models
    from hansfree.core import (
        Batch,
        Benchmark,
        Classifier,
        Explainer,
        Explanation,
        Method,
        Setup,
        Split,
        Stage,
        Teacher,
    )
    from hansfree.errors import RunError, UserError
    from hansfree.training import Training, fit

__version__ = version("hansfree")

__all__ = [
    "Batch",
    "Benchmark",
    "Classifier",
    "Explainer",
    "Explanation",
    "Method",
    "RunError",
    "Setup",
    "Split",
    "Stage",
    "Teacher",
    "Training",
    "UserError",
    "benchmarks",
    "distances",
    "explainers",
    "fit",
    "methods",
    "metrics",
    "models",
]

_MODULES = ("benchmarks", "distances", "explainers", "methods", "metrics", "models")
_HOMES = {"RunError": "errors", "UserError": "errors", "Training": "training", "fit": "training"}
"""Where a name comes from that is neither a module nor one of core's."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hansfree' has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"hansfree.{name}")
    globals()[name] = value = getattr(importlib.import_module(f"hansfree.{_HOMES.get(name, 'core')}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
