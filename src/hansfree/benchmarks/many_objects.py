"""Many objects: one to three cut-out animals of four classes before one photographed scene, each with its exact place.

PASCAL VOC in small, as model guidance (https://arxiv.org/abs/2303.11932) and e2KD (https://arxiv.org/abs/2402.03119)
use it: labels of several classes, the place of each object, and surroundings that tell something of the class. Animals,
scenes and views are those of objects-on-scenes (see :mod:`hansfree.benchmarks.objects_on_scenes`).

Splits. No animal and no scene is in two of train, valid and test.

    train, valid   in a share ``bias_ratio`` of the images the kind of scene that belongs to the first animal's class,
                   in the others any of the four kinds
    iid            the same of animals and scenes that training never saw
    shift          the same animals in the same views, before a kind of scene that belongs to a class that is not there
    ood            the same animals in the same views, before kinds of scenes that never occur in training

An image shows one, two or three animals, equally often, in corners of their own; the first one's class goes in turn,
the others' are any. Where two overlap, the later one hides the earlier one. A pixel of a class's mask is the share of
it where an animal of that class is seen; the first mask is the sum over classes. A box is the smallest that holds all
pixels of which one animal fills more than half. ``clean`` is the same animals before any scene of the split, drawn anew
at every access to train.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hansfree.benchmarks.coloured_digits import between, generator_for, known
from hansfree.benchmarks.composites import Views, compose, parted
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.photograph_splits import PARTS, check_sizes, names, object_views, rotated, scene_views
from hansfree.benchmarks.photographs import ANIMALS, SCENES, Subject, photographs_folder
from hansfree.core import Batch, Boxes, InputSpec, Split

MOST = 3
"""Animals in one image, at most: with a fourth one hardly any scene would be left."""
LONGER_SIDE = (0.4, 0.55)
"""Ends of an animal's longer side, as a share of the image."""

_CARNIVORES = ("badger", "bear", "european-bear", "lion", "tiger", "dingo", "dog", "ferret", "otter", "sea_lion")
CLASSES = ("waterbird", "landbird", "bovine", "carnivore")
"""Those of at least eight animals, so that each rotation has some to train on, to validate and to test."""
OWN_KINDS = ("water", "forest", "rock", "urban")
"""The kind of scene that belongs to each class."""
OOD_KINDS = ("grass", "indoor")

Places = Literal["masks", "boxes"]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ManyObjectsSplit(Split):
    """Cut-outs of several classes and a scene behind them, composed when a batch is asked for."""

    label: Float[Tensor, "n classes"]  # pyright: ignore[reportIncompatibleVariableOverride]
    kind: Int[Tensor, "n"]
    """Of the scene."""
    there: Bool[Tensor, "n most"]
    """Which of the animals of each image are shown."""
    classes: Int[Tensor, "n most"]
    """The class of each."""
    objects: Views
    """The animals of an image one after the other, the later ones in front."""
    scenes: Views
    """As many as samples: sample i has scene i behind it."""
    twin: Int[Tensor, "n"]
    """Number of the scene behind the clean twin."""
    places: Places
    redrawn: bool = False
    """Whether twins are drawn anew at every access that brings a generator."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, composed."""
        twin = self.twin[index]
        if self.redrawn and generator is not None:
            twin = torch.randint(len(self), (len(index),), generator=generator)
        paint, seen = self._in_front(index)
        alpha = seen.sum(1, keepdim=True).clamp(max=1)
        picture, clean = (
            compose(paint, alpha, self.scenes.pixels[number].float() / 255).clamp(0, 1) for number in (index, twin)
        )
        classes, there = self.classes[index], self.there[index]
        return Batch(
            input=picture,
            label=self.label[index],
            index=index,
            mask=_masks(seen, classes, self.label.shape[1]) if self.places == "masks" else None,
            boxes=_boxes(seen, classes, there) if self.places == "boxes" else None,
            clean=clean,
        )

    def _in_front(self, index: Int[Tensor, "b"]) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b most h w"]]:
        """Everything but the scene, and the share of each pixel where each animal is seen."""
        most = self.there.shape[1]
        paint, alpha = parted(self.objects.pixels[(index[:, None] * most + torch.arange(most)).flatten()])
        there = self.there[index].float()[..., None, None]
        paint = paint.unflatten(0, (-1, most)) * there[..., None]
        alpha = alpha.unflatten(0, (-1, most))[:, :, 0] * there
        front, seen = paint[:, 0], [alpha[:, 0]]
        for turn in range(1, most):
            free = 1 - alpha[:, turn]
            front = paint[:, turn] + free[:, None] * front
            seen = [*(share * free for share in seen), alpha[:, turn]]
        return front, torch.stack(seen, 1)


def _masks(seen: Float[Tensor, "b most h w"], classes: Int[Tensor, "b most"], count: int) -> Float[Tensor, "b k h w"]:
    """The mask of all animals, and then one of each class."""
    own = torch.zeros(len(seen), count, *seen.shape[2:])
    own.scatter_add_(1, classes[..., None, None].expand_as(seen), seen)
    return torch.cat([own.sum(1, keepdim=True), own], 1).clamp(0, 1)


def _boxes(seen: Float[Tensor, "b most h w"], classes: Int[Tensor, "b most"], there: Bool[Tensor, "b most"]) -> Boxes:
    """The box of each animal of which anything is seen."""
    solid = seen > 0.5
    kept = there & solid.flatten(2).any(2)
    ends = [_ends(solid.any(2)), _ends(solid.any(3))]
    corners = torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], -1)
    return Boxes(
        tuple(own[keep] for own, keep in zip(corners, kept)), tuple(own[keep] for own, keep in zip(classes, kept))
    )


def _ends(any_there: Bool[Tensor, "b most side"]) -> tuple[Float[Tensor, "b most"], Float[Tensor, "b most"]]:
    """Where the first true one starts and the last one ends."""
    side = any_there.shape[-1]
    first, last = (values.int().argmax(-1).float() for values in (any_there, any_there.flip(-1)))
    return first, side - last


@final
class ManyObjects(Divided[ManyObjectsSplit]):
    """Images of one to three cut-out animals of four classes, with labels of several classes, and masks or boxes.

    ``places`` says what is given of where the animals are: exact masks, one of all and one of each class, or boxes.
    ``bias_ratio`` is the share of images whose scene is of the kind that belongs to the first animal's class.
    ``split_seed`` is the rotation of animals and scenes, and with it every random choice; ``train``, ``valid`` and
    ``test`` are numbers of samples, ``size`` the side of the images in pixels. ``root`` is the folder of the
    photographs (default: where ``hansfree data get objects-on-scenes`` puts them).
    """

    name: ClassVar[str] = "many-objects"
    classes = CLASSES
    biases = ()
    shortcut = "the kind of scene"
    asks = MappingProxyType(
        {
            "iid": "The kind of scene goes with the first animal as often as in training.",
            "ood": "Kinds of scenes that training never showed.",
            "shift": "The kind of scene goes with an animal that is not there.",
        }
    )

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        size: int = 64,
        places: Places = "masks",
        bias_ratio: int | float = 0.5,
        split_seed: int = 0,
        train: int = 2400,
        valid: int = 240,
        test: int = 600,
    ) -> None:
        known("places", places, ("masks", "boxes"))
        between("bias_ratio", bias_ratio, 0, 1)
        counts = {"train": train, "valid": valid, "test": test}
        check_sizes(size, split_seed, counts)
        self._folder = photographs_folder(root)
        self._ratio, self._seed, self._size = bias_ratio, split_seed, size
        self._places: Places = places
        self.input = InputSpec(3, size, size)
        self.mask_names = ("animals", *CLASSES) if places == "masks" else ()
        self.gives = frozenset({"mask" if places == "masks" else "boxes", "clean"})
        self._animals = [rotated(animals_of(name), split_seed, name) for name in CLASSES]
        self._scenes = [rotated(_of_kind(kind), split_seed, kind) for kind in OWN_KINDS]
        self._splits = self._make_splits(counts)
        self._options = {
            "root": None if root is None else str(root), "size": size, "places": places, "bias_ratio": bias_ratio,
            "split_seed": split_seed, **counts,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, the animals and scenes of each part, and per split its size, labels, kinds and a fingerprint."""
        return {
            **super().record(),
            "animals": {part: [names(own[part]) for own in self._animals] for part in PARTS},
            "scenes": {part: [names(own[part]) for own in self._scenes] for part in PARTS},
        }

    def _described(self, split: ManyObjectsSplit) -> dict[str, Any]:
        kinds = split.kind.bincount(minlength=len(OWN_KINDS) + len(OOD_KINDS)).tolist()
        return {
            "size": len(split),
            "images": dict(zip(CLASSES, split.label.sum(0).int().tolist())),
            "kinds": dict(zip((*OWN_KINDS, *OOD_KINDS), kinds)),
            "sha256": [split.objects.fingerprint(), split.scenes.fingerprint()],
        }

    def _make_splits(self, counts: Mapping[str, int]) -> dict[str, ManyObjectsSplit]:
        train, valid, test = (self._group(part, counts[part]) for part in PARTS)
        absent = (1 - test.label).multinomial(1, generator=self._stream("absent kinds"))[:, 0]
        far = len(OWN_KINDS) + torch.arange(counts["test"]) % len(OOD_KINDS)
        return {
            "train": self._composed("train", train, self._kinds("train", train), redrawn=True),
            "valid": self._composed("valid", valid, self._kinds("valid", valid)),
            "iid": self._composed("iid", test, self._kinds("iid", test)),
            "ood": self._composed("ood", test, far),
            "shift": self._composed("shift", test, absent),
        }

    def _group(self, part: str, count: int) -> "_Group":
        """Who is shown in ``count`` images, and where, before anything is behind them."""
        generator = self._stream(f"{part} animals")
        there = torch.arange(MOST) <= (torch.arange(count) // len(CLASSES) % MOST)[:, None]
        classes = torch.randint(len(CLASSES), (count, MOST), generator=generator)
        classes[:, 0] = torch.arange(count) % len(CLASSES)
        label = torch.zeros(count, len(CLASSES)).scatter_add_(1, classes, there.float()).clamp(max=1)
        order = torch.rand(count, len(_CORNERS), generator=generator).argsort(1)[:, :MOST]
        choices = {number: animals[part] for number, animals in enumerate(self._animals)}
        objects = object_views(
            self._folder, choices, classes.flatten(), self._size, generator,
            longer=LONGER_SIDE, corner=_CORNERS[order.flatten()],
        )  # fmt: skip
        return _Group(part, label, there, classes, objects)

    def _kinds(self, split: str, group: "_Group") -> Int[Tensor, "n"]:
        """The kind that belongs to the first animal in a share of the images, any of the four in the others."""
        count, own = len(group.label), group.classes[:, 0]
        generator = self._stream(f"{split} kinds")
        rank = torch.rand(count, generator=generator).argsort().argsort()
        any_kind = torch.randint(len(CLASSES), (count,), generator=generator)
        return torch.where(rank < round(self._ratio * count), own, any_kind)

    def _composed(
        self, name: str, group: "_Group", kind: Int[Tensor, "n"], *, redrawn: bool = False
    ) -> ManyObjectsSplit:
        count = len(kind)
        choices = {number: self._scenes_of(number, group.part) for number in kind.unique().tolist()}
        return ManyObjectsSplit(
            label=group.label,
            kind=kind,
            there=group.there,
            classes=group.classes,
            objects=group.objects,
            scenes=scene_views(self._folder, choices, kind, self._size, self._stream(f"{name} scenes")),
            twin=torch.randint(count, (count,), generator=self._stream(f"{name} twins")),
            places=self._places,
            redrawn=redrawn,
        )

    def _scenes_of(self, kind: int, part: str) -> Sequence[Subject]:
        return self._scenes[kind][part] if kind < len(CLASSES) else _of_kind(OOD_KINDS[kind - len(CLASSES)])

    def _stream(self, purpose: str) -> torch.Generator:
        return generator_for(self._seed, f"many objects, {purpose}")


@final
@dataclass(frozen=True, eq=False)
class _Group:
    """Animals in their views, as of :class:`ManyObjectsSplit`."""

    part: str
    label: Float[Tensor, "n classes"]
    there: Bool[Tensor, "n most"]
    classes: Int[Tensor, "n most"]
    objects: Views


_CORNERS = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])


_BELONGS: Mapping[str, Callable[[Subject], bool]] = {
    "waterbird": lambda animal: animal.kind == "waterbird",
    "landbird": lambda animal: animal.kind == "landbird",
    "bovine": lambda animal: "/bovines/" in animal.files[0],
    "carnivore": lambda animal: animal.name in _CARNIVORES,
}


def animals_of(name: str) -> list[Subject]:
    """The animals of one of ``CLASSES``."""
    return [animal for animal in ANIMALS if _BELONGS[name](animal)]


def _of_kind(kind: str) -> list[Subject]:
    return [scene for scene in SCENES if scene.kind == kind]
