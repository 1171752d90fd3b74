"""Accessories: animals that wear a hat which gives the class away; a shortcut on the object itself.

After DogsWithTies of Bassi, Cavalli & Decherchi, "Explanation is all you need in distillation: mitigating bias and
shortcut learning", 2024, https://arxiv.org/abs/2407.09788: two classes, an accessory each, painted over the animal, so
that a mask of the object holds the shortcut too. Theirs are two breeds of dogs in photographs, with ties at necks that
were marked by hand; here they are birds and mammals cut out of photographs (see
:mod:`hansfree.benchmarks.photographs`), on scenes that tell nothing, and the hat covers the thickest part of the body,
which needs no marks: its middle lies where the animal's outline is farthest away, and its longer side is 2.4 times
that distance, at least a third of the animal's longer side. It is mirrored and turned with the animal.

Splits. No animal and no scene is in two of train, valid and test, but for the tier of seen animals:

    train, valid   the class's own hat in a share ``bias_ratio`` of the samples, the other class's in the others
    iid            as train; half of the animals are training's, in new views on scenes that training never saw (tier
                   "seen"), half are animals that training never saw (tier "unseen")
    shift          the same pictures with the other class's hat
    ood            the same pictures without hats
    valid_ood      the validation pictures with either of two further hats, for methods that are granted it

``clean`` is the same picture without the hat. Masks: the animal's outline, as a segmentation would have it, hat
included where it covers the animal; and the hat. Both are exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from hansfree.benchmarks.coloured_digits import between, generator_for, known
from hansfree.benchmarks.composites import Picture, Place, Views, compose, cut_out, parted, sides
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.photograph_splits import (
    PARTS,
    Part,
    Task,
    animals_by_class,
    biased,
    check_sizes,
    names,
    part_of,
    rotated,
    scene_views,
)
from hansfree.benchmarks.photographs import HATS, SCENES, TASKS, photographs_folder
from hansfree.core import Batch, InputSpec, Split

OWN_HATS = 2
HAT_SIZE = 1.2
"""Half of a hat's longer side, in radii of the thickest part of the body."""
SMALLEST = 1 / 3
"""Of the animal's longer side: no hat is smaller."""


def thickest_part(picture: Picture) -> tuple[float, float, float]:
    """Where the outline of a cut-out is farthest away: x and y from -1 to 1 over the picture, and that distance.

    The distance is a share of the picture's longer side.
    """
    inside = np.pad(picture[3].numpy() > 127, 1)
    distance = np.asarray(distance_transform_edt(inside))
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    _, height, width = picture.shape
    return float(2 * x - 1) / width - 1, float(2 * y - 1) / height - 1, float(distance.max()) / max(height, width)


def hat_places(
    objects: Views, spots: Float[Tensor, "pictures 3"], hats: tuple[Picture, ...], hat: Int[Tensor, "n"]
) -> Place:
    """Places of hats that go where the animals go: each view's map, then from the animal's picture to the hat's.

    ``spots`` are :func:`thickest_part` of each picture of ``objects``.
    """
    animal = sides(objects.pictures)
    animal = (animal / animal.amax(1, keepdim=True))[objects.picture]
    worn = sides(hats)
    worn = (worn / worn.amax(1, keepdim=True))[hat]
    spot = spots[objects.picture]
    half = (2 * HAT_SIZE * spot[:, 2]).clamp(min=SMALLEST)
    ratio = animal / (half[:, None] * worn)
    place = torch.cat([objects.place[:, :, :2], objects.place[:, :, 2:] - spot[:, :2, None]], 2)
    return ratio[:, :, None] * place


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class WornSplit(Split):
    """Scenes, animals and what they wear, composed when a batch is asked for."""

    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    tiers: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict[str, Tensor])  # pyright: ignore[reportIncompatibleVariableOverride]
    """Samples of each tier; in the tests only."""
    objects: Views
    scenes: Views
    hats: Views | None
    """None: nobody wears any."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, composed; nothing is left to ``generator``."""
        paint, outline = parted(self.objects.pixels[index])
        clean = compose(paint, outline, self.scenes.pixels[index].float() / 255)
        image, hat = clean, torch.zeros_like(outline)
        if self.hats is not None:
            worn, hat = parted(self.hats.pixels[index])
            image = compose(worn, hat, clean)
        return Batch(
            input=image,
            label=self.label[index],
            index=index,
            bias=self.bias[index],
            mask=torch.cat([outline, hat], 1),
            clean=clean,
        )


@final
class Accessories(Divided[WornSplit]):
    """Animals with a hat on the body that gives the class away while training, and misleads or is gone afterwards.

    ``bias`` is the hat, an index into ``biases``: first the classes' own, so that ``bias == label`` means aligned,
    then those of valid_ood, and last "none".

    ``root``, ``task``, ``size`` (96 here), ``bias_ratio``, ``split_seed``, ``train``, ``valid`` and ``test`` as of
    objects-on-scenes; ``swap`` exchanges the hats between the classes (default: for odd rotations).

    ``worn`` is for teachers: train and valid wear their class's hat (biased), either hat without regard to the class
    (random) or none; the test splits stay.
    """

    name: ClassVar[str] = "accessories"
    mask_names = ("animal", "accessory")
    gives = frozenset({"bias", "mask", "clean"})
    shortcut = "the hat"
    asks = MappingProxyType(
        {
            "iid": "Each class with its own hat as often as in training.",
            "ood": "Without hats.",
            "shift": "Each class with the other one's hat.",
        }
    )

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        task: Task = "bird/mammal",
        size: int = 96,
        bias_ratio: int | float = 1.0,
        split_seed: int = 0,
        swap: bool | None = None,
        train: int = 1200,
        valid: int = 240,
        test: int = 600,
        worn: Literal["biased", "random", "none"] = "biased",
    ) -> None:
        known("task", task, TASKS)
        known("worn", worn, ("biased", "random", "none"))
        between("bias_ratio", bias_ratio, 0, 1)
        counts = {"train": train, "valid": valid, "test": test}
        check_sizes(size, split_seed, counts)
        self._folder = photographs_folder(root)
        self._ratio, self._seed, self._size, self._worn = bias_ratio, split_seed, size, worn
        self.classes = tuple(TASKS[task])
        self.input = InputSpec(3, size, size)
        swapped = split_seed % 2 == 1 if swap is None else swap
        own = HATS[:OWN_HATS][::-1] if swapped else HATS[:OWN_HATS]
        self._hats = (*own, *HATS[OWN_HATS:])
        self.biases = (*(hat.name for hat in self._hats), "none")
        self._animals = animals_by_class(task, split_seed)
        self._scenes = rotated(list(SCENES), split_seed, "scenes")
        self._splits = self._make_splits(counts)
        self._options = {
            "root": None if root is None else str(root), "task": task, "size": size, "bias_ratio": bias_ratio,
            "split_seed": split_seed, "swap": swapped, **counts, "worn": worn,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, the animals and scenes of each part, and per split its size, groups and a fingerprint."""
        return {
            **super().record(),
            "animals": {part: [names(own[part]) for own in self._animals] for part in PARTS},
            "scenes": {part: names(self._scenes[part]) for part in PARTS},
        }

    def _described(self, split: WornSplit) -> dict[str, Any]:
        aligned = int((split.bias == split.label).sum())
        told = {} if split.hats is None else {"aligned": aligned, "conflicting": len(split) - aligned}
        layers = [views for views in (split.objects, split.scenes, split.hats) if views is not None]
        return {"size": len(split), **told, "sha256": [views.fingerprint() for views in layers]}

    def _make_splits(self, counts: dict[str, int]) -> dict[str, WornSplit]:
        train, valid, test = (
            part_of(part, counts[part], self._animals, self._folder, self._size, self._stream(f"{part} animals"))
            for part in PARTS
        )
        behind = {part.name: self._scenes_behind(part) for part in (train, valid, test)}
        cues = {
            "train": (train, self._training_hat("train", train)),
            "valid": (valid, self._training_hat("valid", valid)),
            "valid_ood": (valid, self._any_hat("valid_ood", valid, OWN_HATS, len(HATS))),
            "iid": (test, biased(test, self._ratio, self._stream("iid aligned"))),
            "ood": (test, None),
            "shift": (test, 1 - test.label),
        }
        return {name: self._wearing(part, hat, behind[part.name]) for name, (part, hat) in cues.items()}

    def _scenes_behind(self, part: Part) -> Views:
        stream = self._stream(f"{part.name} scenes")
        nothing = torch.zeros_like(part.label)
        return scene_views(self._folder, {0: self._scenes[part.name]}, nothing, self._size, stream)

    def _wearing(self, part: Part, hat: Int[Tensor, "n"] | None, scenes: Views) -> WornSplit:
        bias = torch.full_like(part.label, len(self.biases) - 1) if hat is None else hat
        hats = None if hat is None else self._hat_views(part.objects, hat)
        return WornSplit(label=part.label, bias=bias, tiers=part.tiers, objects=part.objects, scenes=scenes, hats=hats)

    def _hat_views(self, objects: Views, hat: Int[Tensor, "n"]) -> Views:
        pictures = tuple(cut_out(self._folder / worn.files[0], self._size) for worn in self._hats)
        spots = torch.tensor([thickest_part(picture) for picture in objects.pictures])
        place = hat_places(objects, spots, pictures, hat)
        return Views(pictures, hat, place, torch.ones(len(hat), 3), self._size)

    def _training_hat(self, split: str, part: Part) -> Int[Tensor, "n"] | None:
        if self._worn == "random":
            return self._any_hat(split, part, 0, OWN_HATS)
        return None if self._worn == "none" else biased(part, self._ratio, self._stream(f"{split} aligned"))

    def _any_hat(self, split: str, part: Part, first: int, end: int) -> Int[Tensor, "n"]:
        return torch.randint(first, end, part.label.shape, generator=self._stream(f"{split} hats"))

    def _stream(self, purpose: str) -> torch.Generator:
        return generator_for(self._seed, purpose)
