"""What there is, read from the registries themselves: names, first lines, settings, whole method cards."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hansfree.benchmarks import BENCHMARKS
from hansfree.core import Explainer
from hansfree.explainers import EXPLAINERS
from hansfree.methods import METHODS
from hansfree.metrics import MEASURES
from hansfree.models import MODELS

_GIVEN = {
    *("self", "setup", "num_classes", "channels", "predictions", "map", "other", "moved", "mask", "curves", "shift"),
    *("attribute", "label", "found", "conflicting", "first", "second"),
}
"""Arguments that come from the program, and are no settings."""


def entries(what: str) -> list[dict[str, Any]]:
    """One entry per name of the registry ``what``: name, summary, settings (for methods: needs, card)."""
    registries: dict[str, Mapping[str, Callable[..., Any]]] = {
        "methods": METHODS,
        "explainers": EXPLAINERS,
        "benchmarks": BENCHMARKS,
        "metrics": MEASURES,
        "models": MODELS,
    }
    found = [_entry(name, thing) for name, thing in registries[what].items()]
    if what == "methods":
        for entry in found:
            method = METHODS[entry["name"]]
            entry["needs"] = sorted(method.needs)
            entry["card"] = inspect.getdoc(sys.modules[method.__module__])
    if what == "models":
        others = {
            "torchvision/NAME": "A torchvision classifier by name; its ResNets with `stem: imagenet` or `small`.",
            "timm/NAME": "Any timm model by name.",
            "open_clip/NAME": "CLIP's image tower with a linear head, or with `zero_shot: {classes: [...]}`.",
            "hf/NAME": "A Hugging Face image classifier, from a folder or (with `pretrained`) from the hub.",
            "bcos/NAME": "A B-cos network by name; the six channels [x, 1 - x] are made inside.",
            "FOLDER": "A folder that `hansfree export` or a run wrote.",
            "package.module:factory": "Your own factory, called with num_classes and the section's other settings.",
        }
        found += [{"name": name, "summary": summary, "settings": {}} for name, summary in others.items()]
    return found


def _entry(name: str, thing: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(thing).parameters.values()
    return {
        "name": name,
        "summary": (inspect.getdoc(thing) or "").partition("\n")[0],
        "settings": {
            p.name: "required" if p.default is p.empty else _plain(p.default)
            for p in parameters
            if p.name not in _GIVEN
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Explainer):
        return next({"name": name} for name, explainer in EXPLAINERS.items() if isinstance(value, explainer))
    return list(value) if isinstance(value, tuple) else value


def method_cards() -> str:
    """docs/methods.md: every method's card, its settings and defaults, from the code."""
    parts = ["# Methods", "", "Generated from the methods' own docstrings by `make docs`. Do not edit.", ""]
    for entry in entries("methods"):
        needs = ", ".join(entry["needs"]) or "nothing beyond labels"
        settings = [f"- `{key}`: {default}" for key, default in entry["settings"].items()] or ["- none"]
        parts += [f"## {entry['name']}", "", entry["card"], "", f"Needs: {needs}.", "", "Settings:", "", *settings, ""]
    return "\n".join(parts)
