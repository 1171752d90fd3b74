"""CIFAR-10 from the folder that its archive unpacks to: the binary version, or the one for Python.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009. Each has five files of 10,000 training images
and one of 10,000 test images, 32 x 32 in three planes. The version for Python is pickled; nothing but numbers is read
of it, whatever else a file may want to run.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from hansfree.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, PLANES = 32, 3
RECORD = 1 + PLANES * SIDE * SIDE
"""Bytes of the binary version per image: its label, and its pixels by plane and row."""
FOLDERS = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


@final
@dataclass(frozen=True, eq=False)
class Cifar:
    """Colour images and their labels; the last ``own_test`` of them are the test batch."""

    pixels: UInt8[Tensor, "n 3 32 32"]
    label: Int[Tensor, "n"]
    own_test: int
    origin: str


def read_cifar10(root: str | Path) -> Cifar:
    """CIFAR-10 of ``root``: one of ``FOLDERS``, or the folder that holds one.

    Raises ``UserError`` where a file is missing, cut short or of another kind.
    """
    root = Path(root).expanduser()
    folder, ending = _found(root)
    read = _binary if ending else _pickled
    parts = [read(folder / f"{batch}{ending}") for batch in BATCHES]
    pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in parts])).view(-1, PLANES, SIDE, SIDE)
    label = torch.from_numpy(np.concatenate([label for _, label in parts])).long()
    return Cifar(pixels, label, len(parts[-1][1]), f"CIFAR-10, {folder.name}")


def _found(root: Path) -> tuple[Path, str]:
    for name, ending in FOLDERS.items():
        for folder in (root, root / name):
            if (folder / f"{BATCHES[0]}{ending}").is_file():
                return folder, ending
    raise UserError(f"{root} holds no CIFAR-10; set benchmark.root to the folder that holds {' or '.join(FOLDERS)}.")


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(_bytes(path), np.uint8)
    if not len(content) or len(content) % RECORD:
        raise UserError(
            f"{path} is cut short or damaged ({len(content)} bytes, no multiple of {RECORD}); fetch it again."
        )
    records = content.reshape(-1, RECORD)
    return _checked(path, records[:, 1:], records[:, 0])


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        told: Any = _Numbers(io.BytesIO(_bytes(path)), encoding="bytes").load()
        return _checked(path, np.asarray(told[b"data"]), np.asarray(told[b"labels"]))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is no batch of CIFAR-10 for Python ({error}); fetch it again.") from error


class _Numbers(pickle.Unpickler):
    """Unpickles arrays of numbers, and nothing that could run code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name in ("numpy.core.multiarray", "numpy._core.multiarray") and global_name == "_reconstruct":
            reconstruct: Callable[..., Any] = np.empty(0).__reduce__()[0]  # pyright: ignore[reportAssignmentType]
            return reconstruct
        if module_name == "numpy" and global_name in ("ndarray", "dtype"):
            return getattr(np, global_name)
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); unpack the whole archive of CIFAR-10.") from error


def _checked(path: Path, pixels: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    right = pixels.dtype == np.uint8 and pixels.shape == (len(label), RECORD - 1) and label.dtype.kind in "iu"
    if not right or not len(label) or not 0 <= label.min() <= label.max() < len(CLASSES):
        raise UserError(f"{path} does not hold images of 32 x 32 pixels with labels from 0 to 9; fetch it again.")
    return pixels, label
