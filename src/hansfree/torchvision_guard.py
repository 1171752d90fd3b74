"""Lets a torchvision built for CUDA be imported beside a torch built for the CPU.

The wheel on the package index links its compiled operators against CUDA. Beside a CPU-only torch that
library does not load, and ``import torchvision`` fails because it registers a Python implementation for
operators (``torchvision::nms``, ``torchvision::qnms``) that were then never declared. Declaring the two
schemas beforehand is enough for models, transforms and timm; only the compiled operators stay missing.
Where torch and torchvision match, nothing is declared and nothing changes.
"""

import importlib
from types import ModuleType

import torch
from torch import library

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[library.Library] = []  # a Library undeclares its schemas when it is collected


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """Import ``module`` (torchvision, timm, or a part of them), declaring the operators first where needed.

    Raises ``ImportError`` if the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name, schema in _SCHEMAS.items():
        if not _declared(name):
            fragment = library.Library("torchvision", "FRAGMENT")
            fragment.define(schema)
            _libraries.append(fragment)
    return importlib.import_module(module)


def _declared(name: str) -> bool:
    return any(schema.name == f"torchvision::{name}" for schema in torch._C._jit_get_all_schemas())
