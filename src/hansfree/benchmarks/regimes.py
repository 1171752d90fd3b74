"""What a run trains on, where that is not simply the benchmark's training data: few shots, other images, augmented.

    few_shots    n training samples of each class, or those of a list, everything else as it is
    transferred  training and validation images of another benchmark, without labels; tests as they are
    augmented    training images changed anew at each access

Each takes a benchmark and gives one. Tests are never touched. Source: Parchami-Araghi, Böhle, Rao & Schiele, Good
teachers explain: explanation-enhanced knowledge distillation, 2024, https://arxiv.org/abs/2402.03119, section 4.1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hansfree.augmentation import Augmentation, AugmentedSplit
from hansfree.benchmarks.choosing import check_each_class, drawn, listed
from hansfree.core import TEST_SPLITS, TRAINING_SPLITS, UNKNOWN, Batch, Benchmark, InputSpec, Split
from hansfree.errors import UserError, unknown


@final
class Regime(Benchmark):
    """A benchmark some of whose splits are replaced (None: taken away), for training in another way."""

    def __init__(
        self,
        whole: Benchmark,
        replaced: Mapping[str, Split | None],
        *,
        gives: frozenset[str],
        told: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.whole, self._replaced, self._told = whole, dict(replaced), told
        self.name = whole.name  # pyright: ignore[reportAttributeAccessIssue]
        self.classes, self.biases, self.mask_names = whole.classes, whole.biases, whole.mask_names
        self.input, self.gives, self.categories = whole.input, gives, whole.categories
        self.text, self.shortcut, self.asks = whole.text, whole.shortcut, whole.asks

    def split(self, name: str) -> Split:
        """The replaced split, else the benchmark's own."""
        if name in self._replaced:
            split = self._replaced[name]
            if split is None:
                raise unknown("split", name, self.split_names())
            return split
        return self.whole.split(name)

    def split_names(self) -> tuple[str, ...]:
        """The benchmark's, without those that were taken away."""
        return tuple(name for name in self.whole.split_names() if self._replaced.get(name, self) is not None)

    def record(self) -> dict[str, Any]:
        """The benchmark's, and what was changed."""
        record, told = self.whole.record(), self._told()
        splits = {**record.get("splits", {}), **told.get("splits", {})}
        return {**record, **told, "splits": {name: splits[name] for name in splits if name in self.split_names()}}


# Few shots


@final
@dataclass(frozen=True, eq=False)
class Part(Split):
    """Some samples of a split. ``index`` counts them; ``Batch.origin`` says where they stand in the whole."""

    whole: Split
    rows: Int[Tensor, "n"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.whole.label[self.rows])
        object.__setattr__(self, "bias", None if self.whole.bias is None else self.whole.bias[self.rows])

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index`` of this part."""
        batch = self.whole.batch(self.rows[index], generator)
        origin = batch.index if batch.origin is None else batch.origin
        return dataclasses.replace(batch, index=index, origin=origin)


def few_shots(benchmark: Benchmark, shots: int | str | Path, seed: int) -> Benchmark:
    """``benchmark`` with ``shots`` training samples of each class, drawn by ``seed``, or with those that a file lists.

    Of two numbers of shots with one seed, the samples of the smaller are among those of the larger. Raises
    ``UserError`` for a class that has fewer, and for a list that does not fit (see :mod:`.choosing`) or lacks a class.
    """
    train = benchmark.split("train")
    if isinstance(shots, int):
        rows = drawn(train.label, shots, seed, benchmark.classes, key="shots")
        how = {"per_class": shots, "seed": seed}
    else:
        rows, how = _listed_shots(train, shots, benchmark), {"list": str(shots)}

    def told() -> dict[str, Any]:
        digest = sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()
        return {"shots": {**how, "sha256_of_rows": digest}, "splits": {"train": {"size": len(rows)}}}

    return Regime(benchmark, {"train": Part(train, rows)}, gives=benchmark.gives, told=told)


def _listed_shots(train: Split, path: str | Path, benchmark: Benchmark) -> Int[Tensor, "n"]:
    files = train.files
    if files is None:
        raise UserError(
            f"shots: {path} is a list of images, but samples of the benchmark {benchmark.name} are no files that it "
            "could name; give a number of shots of each class."
        )
    rows = listed(path, files, key="shots")
    check_each_class(train.label[rows], benchmark.classes, f"shots: the list {path} names")
    return rows


# Unrelated images


@final
@dataclass(frozen=True, eq=False)
class Unlabelled(Split):
    """The images of a split in another shape, and nothing else: labels, of the form of ``like``, are ``UNKNOWN``."""

    whole: Split
    input: InputSpec
    like: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.like.new_full((len(self.whole), *self.like.shape[1:]), UNKNOWN))

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The images at ``index``."""
        batch = self.whole.batch(index, generator)
        images = reshaped(batch.images, self.input)
        return Batch(images, self.label[index], index, origin=batch.origin)


def reshaped(images: Float[Tensor, "b c h w"], to: InputSpec) -> Float[Tensor, "b channels height width"]:
    """``images`` in the shape ``to``: grey is repeated over channels, colours are averaged to grey; then resized.

    Bilinear with antialiasing, stretched where the sides are of another ratio. Raises ``UserError`` for other changes
    of the channels.
    """
    channels = images.shape[1]
    if channels != to.channels:
        if 1 not in (channels, to.channels):
            raise UserError(
                f"transfer cannot make {to.channels} channels out of {channels}; take images with "
                f"{to.channels} channels or with one."
            )
        images = images.mean(1, keepdim=True).expand(-1, to.channels, -1, -1)
    size = (to.height, to.width)
    return (
        images
        if images.shape[-2:] == size
        else F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    )


def transferred(benchmark: Benchmark, source: Benchmark) -> Benchmark:
    """``benchmark`` with the training and validation images of ``source``, without labels, masks or biases.

    No validation image of the benchmark's own is left either: it may not select.
    """
    like = benchmark.split("train").label
    images = {name: Unlabelled(source.split(name), benchmark.input, like) for name in TRAINING_SPLITS}
    gone = {name: None for name in benchmark.split_names() if name not in (*TRAINING_SPLITS, *TEST_SPLITS)}

    def told() -> dict[str, Any]:
        sizes = {name: {"size": len(split)} for name, split in images.items()}
        return {"transfer": source.record(), "splits": sizes}

    return Regime(benchmark, {**images, **gone}, gives=frozenset(), told=told)


# Augmentation


def augmented(benchmark: Benchmark, augmentation: Augmentation) -> Benchmark:
    """``benchmark`` whose training images are augmented."""
    train = AugmentedSplit(benchmark.split("train"), augmentation)
    return Regime(benchmark, {"train": train}, gives=benchmark.gives)
