"""Whether this installation can work: what is there, what is missing, and what to do about it."""

import importlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

import torch

from hansfree.benchmarks import BENCHMARKS
from hansfree.errors import UserError
from hansfree.explainers import LRP
from hansfree.models import load_model
from hansfree.torchvision_guard import import_torchvision

Finding = tuple[bool, str]


def checkup() -> list[Finding]:
    """(good, sentence) of each part: versions, devices, extras, the embedded digits, an explanation, the disk."""
    return [
        (True, f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"),
        _devices(),
        *(_extra(module, extra) for module, extra in (("torchvision", "vision"), ("timm", "vision"), ("ray", "ray"))),
        _digits(),
        _explanation(),
        _disk(Path.cwd()),
    ]


def _devices() -> Finding:
    if not torch.cuda.is_available():
        return True, "no accelerator: runs use the CPU"
    return True, f"{torch.cuda.device_count()} accelerator(s): {torch.cuda.get_device_name(0)}"


def _extra(module: str, extra: str) -> Finding:
    try:
        found = importlib.import_module(module) if module == "ray" else import_torchvision(module)
    except ImportError:
        return True, f"{module} is not installed (optional: pip install 'hansfree[{extra}]')"
    except Exception as error:
        return False, f"{module} is installed but does not import ({error}); install the version that fits this torch"
    return True, f"{module} {found.__version__}"


def _digits() -> Finding:
    try:
        train = BENCHMARKS["coloured-digits"]().split("train")
    except UserError as error:
        return True, f"the embedded digits are not there (optional): {error}"
    return True, f"the embedded digits: {len(train)} to train on"


def _explanation() -> Finding:
    model = load_model("small-cnn", num_classes=2).eval()
    _, map = LRP(epsilon=0.01)(model, torch.rand(2, 3, 28, 28), torch.tensor([0, 1]))
    map.square().sum().backward()
    reached = all(p.grad is not None for p in model.parameters())
    return reached, "explanations can be trained through" if reached else "a heatmap's gradient misses some weights"


def _disk(folder: Path) -> Finding:
    if not os.access(folder, os.W_OK):
        return False, f"{folder} is not writable; choose another with --out"
    with tempfile.TemporaryDirectory(dir=folder):
        free = shutil.disk_usage(folder).free / 2**30
    return free > 1, f"{folder}: {free:.1f} GiB free"
