"""Whose answers a store holds, and about what: digests of a network and of data in their order, explainers as text."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from hansfree.core import Benchmark, Classifier, Explainer, Split
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS

SAMPLES = 32
"""So many images of each split are kept, to be compared one by one."""
_PLACES = ("root", "path", "origin")
"""What a benchmark's record says of where its files lie; data may be moved."""


# Networks


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all weights and buffers, and of how the input is prepared."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if isinstance(model, Classifier):
        colours = [None if value is None else value.flatten().tolist() for value in (model.mean, model.std)]
        size = None if model.size is None else list(model.size)
        digest.update(json.dumps([*colours, size, model.encoding]).encode())
    return digest.hexdigest()


# Explainers


def described(explainer: Explainer) -> dict[str, Any]:
    """An explainer's name and settings, as JSON has them."""
    name = next((name for name, kind in EXPLAINERS.items() if type(explainer) is kind), None)
    own = f"{type(explainer).__module__}:{type(explainer).__qualname__}"
    settings = {field.name: getattr(explainer, field.name) for field in dataclasses.fields(explainer)}  # pyright: ignore[reportArgumentType]
    return {"name": name or own, **{key: _plain(value) for key, value in settings.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Explainer):
        return described(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)


def split_epsilon(explainer: Explainer) -> tuple[dict[str, Any], float | tuple[float, float] | None]:
    """What :func:`described` says without epsilon, which a store keeps several of, and epsilon: a number or a range."""
    settings = described(explainer)
    epsilon = settings.pop("epsilon", None)
    return settings, tuple(epsilon) if isinstance(epsilon, list) else epsilon


# Data


def data_of(split: Split) -> dict[str, Any]:
    """How many samples, the SHA-256 of their labels and of their biases in order, and what a label looks like."""
    label = split.label
    return {
        "rows": len(split),
        "label": {"dtype": str(label.dtype).removeprefix("torch."), "shape": list(label.shape[1:])},
        "labels_sha256": _sha256(label),
        "biases_sha256": None if split.bias is None else _sha256(split.bias),
    }


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()


def record_of(benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark's own record of every random choice and fingerprint, without the places of its files."""
    return json.loads(json.dumps(_without_places(benchmark.record()), default=str))


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items() if key not in _PLACES}
    return [_without_places(item) for item in value] if isinstance(value, list | tuple) else value


def sampled(rows: int) -> Int[Tensor, "samples"]:
    """The rows whose images are kept: the first, the last, and evenly between."""
    return torch.linspace(0, rows - 1, min(rows, SAMPLES)).round().long()


def images_of(split: Split) -> UInt8[Tensor, "samples c h w"]:
    """The images of the sampled rows, in 256 steps."""
    return (split.batch(sampled(len(split))).images.clamp(0, 1) * 255).round().byte()


def check_images(split: Split, kept: UInt8[Tensor, "samples c h w"], where: str) -> None:
    """Raise ``UserError`` where a sampled image is not the one that was kept. Rounding may differ by one step."""
    now = images_of(split)
    if now.shape != kept.shape:
        raise UserError(
            f"{where} was made from images of shape {list(kept.shape[1:])}, but these are {list(now.shape[1:])}; "
            "use the data it was made for, or make a store of these."
        )
    apart = (now.int() - kept.int()).abs().flatten(1).amax(1) > 1
    if apart.any():
        row = int(sampled(len(split))[apart.nonzero()[0, 0]])
        raise UserError(
            f"{where} was made for other data or another order: sample {row} is another image; "
            "use the data it was made for, or make a store of these."
        )
