"""Objects on scenes: cut-out animals on photographed scenes, where the kind of scene gives the class away.

After COCO-on-Places (Ahmed et al., "Systematic generalisation with group invariant predictions", ICLR 2021) and
Waterbirds (Sagawa et al., "Distributionally robust neural networks for group shifts", ICLR 2020), in small, from
photographs that come in packages (see :mod:`hansfree.benchmarks.photographs`); with masks exact to the pixel, because
every image is made of its parts (see :mod:`hansfree.benchmarks.composites`).

Splits. No animal and no scene is in two of train, valid and test, but for the tier of seen animals:

    train, valid   the class's own kind of scene in a share ``bias_ratio`` of the samples, else the other class's
    iid            as train, on scenes that training never saw; half of the animals are training's, in new views (tier
                   "seen"), half are animals that training never saw (tier "unseen")
    shift          the same animals in the same views, on the other class's kind of scene, unseen scenes too
    ood            the same animals in the same views, on kinds of scenes that never occur in training
    valid_ood      the validation animals on two further kinds, for methods that are granted it

``clean`` is the same animal on a scene drawn from the split's own without regard to the class, anew at every access to
train and fixed elsewhere. ``mask`` is the cut-out's alpha: the exact share of each pixel that the animal covers.

Repeats. ``split_seed`` 0 to 7 are eight rotations of animals and scenes (see
:mod:`hansfree.benchmarks.photograph_splits`), odd ones with the two kinds of scene exchanged between the classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree import backgrounds
from hansfree.benchmarks.coloured_digits import between, generator_for, known
from hansfree.benchmarks.composites import Views, compose, grained_noise, parted
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
from hansfree.benchmarks.photographs import SCENES, TASKS, Subject, photographs_folder
from hansfree.core import Batch, InputSpec, Split

Ground = Literal["biased", "random", "noise", "grained-noise", "mean", "black"]
GROUNDS = ("biased", "random", "noise", "grained-noise", "mean", "black")
SCENIC = ("biased", "random")
OWN_KINDS = ("water", "forest")
OOD_KINDS = ("urban", "rock")
VALID_OOD_KINDS = ("grass", "indoor")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class CompositeSplit(Split):
    """Cut-outs, and scenes to put behind them, composed when a batch is asked for."""

    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    tiers: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict[str, Tensor])  # pyright: ignore[reportIncompatibleVariableOverride]
    """Samples of each tier; in the tests only."""
    objects: Views
    scenes: Views
    """As many as samples: sample i has scene i behind it."""
    twin: Int[Tensor, "n"]
    """Number of the scene behind the clean twin."""
    seed: Int[Tensor, "n"]
    """Of noise."""
    ground: Ground = "biased"
    """What is behind the animal."""
    clean_ground: Ground = "random"
    """What is behind it in the clean twin."""
    redrawn: bool = False
    """Whether twin and noise are drawn anew at every access that brings a generator."""
    paired_anew: bool = False
    """Whether the scene is then, too: another one of the same kind."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, composed."""
        paint, alpha = parted(self.objects.pixels[index])
        number, twin, seed = index, self.twin[index], self.seed[index]
        if self.redrawn and generator is not None:
            twin, seed = (torch.randint(most, (len(index),), generator=generator) for most in (len(self), 2**31))
            number = self._of_the_same_kind(index, generator) if self.paired_anew else number
        own = self.scenes.pixels[number].float() / 255
        other = self.scenes.pixels[twin].float() / 255
        return Batch(
            input=compose(paint, alpha, self._behind(self.ground, own, paint, alpha, seed)),
            label=self.label[index],
            index=index,
            bias=self.bias[index],
            mask=alpha,
            clean=compose(
                paint,
                alpha,
                self._behind(self.clean_ground, other if self.clean_ground == "random" else own, paint, alpha, seed),
            ),
        )

    def _of_the_same_kind(self, index: Int[Tensor, "b"], generator: torch.Generator) -> Int[Tensor, "b"]:
        count = self.bias.bincount()
        first = count.cumsum(0) - count
        kind = self.bias[index]
        drawn = (torch.rand(len(index), generator=generator) * count[kind]).long()
        return self.bias.argsort(stable=True)[first[kind] + drawn]

    def _behind(
        self, ground: Ground, scene: Float[Tensor, "b 3 h w"], paint: Tensor, alpha: Tensor, seed: Int[Tensor, "b"]
    ) -> Tensor:
        if ground == "noise":
            return backgrounds.noise(seed, 3, *scene.shape[2:])
        if ground == "grained-noise":
            return grained_noise(seed, scene.shape[-1])
        if ground == "mean":
            return backgrounds.mean_colour(compose(paint, alpha, scene))
        return torch.zeros(()) if ground == "black" else scene


@final
class ObjectsOnScenes(Divided[CompositeSplit]):
    """Cut-out animals on photographed scenes, whose kind gives the class away while training and misleads afterwards.

    ``bias`` is the kind of scene, an index into ``biases``: first the classes' own, so that ``bias == label`` means
    aligned, then the kinds of ood and of valid_ood, and last "none".

    ``task`` is bird/mammal (33 and 51 animals) or waterbird/landbird (11 and 22); ``bias_ratio`` the share of training
    samples on their class's own kind of scene; ``split_seed`` the rotation of animals and scenes, and with it every
    random choice; ``swap`` exchanges the kinds of scene between the classes (default: for odd rotations). ``train``,
    ``valid`` and ``test`` are numbers of samples, ``size`` the side of the images in pixels. ``root`` is the folder of
    the photographs (default: where ``hansfree data get objects-on-scenes`` puts them).

    ``ground`` says what is behind the animals of train and valid, for teachers: scenes as above (biased), scenes
    without regard to the class (random), uniform noise per pixel and channel, noise of five grains from 1 to 16 pixels
    (grained-noise), the image's mean colour or black; noise is drawn anew at every access to train. ``clean_ground``
    says the same of the clean twins. ``pairing: anew`` puts another scene of the same kind behind each animal at every
    access to train.
    """

    name: ClassVar[str] = "objects-on-scenes"
    mask_names = ("animal",)
    gives = frozenset({"bias", "mask", "clean"})
    shortcut = "the kind of scene"

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        task: Task = "bird/mammal",
        size: int = 48,
        bias_ratio: int | float = 1.0,
        split_seed: int = 0,
        swap: bool | None = None,
        train: int = 2400,
        valid: int = 240,
        test: int = 600,
        ground: Ground = "biased",
        clean_ground: Ground = "random",
        pairing: Literal["fixed", "anew"] = "fixed",
    ) -> None:
        known("task", task, TASKS)
        known("ground", ground, GROUNDS)
        known("clean_ground", clean_ground, GROUNDS)
        known("pairing", pairing, ("fixed", "anew"))
        between("bias_ratio", bias_ratio, 0, 1)
        counts = {"train": train, "valid": valid, "test": test}
        check_sizes(size, split_seed, counts)
        self._folder = photographs_folder(root)
        self._ratio, self._seed, self._size = bias_ratio, split_seed, size
        self._ground: Ground = ground
        self._clean_ground: Ground = clean_ground
        self._anew = pairing == "anew"
        self.classes = tuple(TASKS[task])
        self.input = InputSpec(3, size, size)
        swapped = split_seed % 2 == 1 if swap is None else swap
        own = OWN_KINDS[::-1] if swapped else OWN_KINDS
        self.biases = (*own, *OOD_KINDS, *VALID_OOD_KINDS, "none")
        self._animals = animals_by_class(task, split_seed)
        self._scenes = [rotated(_of_kind(kind), split_seed, kind) for kind in own]
        self._splits = self._make_splits(counts)
        self._options = {
            "root": None if root is None else str(root), "task": task, "size": size, "bias_ratio": bias_ratio,
            "split_seed": split_seed, "swap": swapped, **counts, "ground": ground, "clean_ground": clean_ground,
            "pairing": pairing,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, the animals and scenes of each part, and per split its size, groups and a fingerprint."""
        return {
            **super().record(),
            "animals": {part: [names(own[part]) for own in self._animals] for part in PARTS},
            "scenes": {part: [names(own[part]) for own in self._scenes] for part in PARTS},
        }

    def _described(self, split: CompositeSplit) -> dict[str, Any]:
        aligned = int((split.bias == split.label).sum())
        told = {"aligned": aligned, "conflicting": len(split) - aligned} if split.ground in SCENIC else {}
        return {"size": len(split), **told, "sha256": [split.objects.fingerprint(), split.scenes.fingerprint()]}

    def _make_splits(self, counts: dict[str, int]) -> dict[str, CompositeSplit]:
        train, valid, test = (
            part_of(part, counts[part], self._animals, self._folder, self._size, self._stream(f"{part} animals"))
            for part in PARTS
        )
        own = len(self.classes)
        seen = own + len(OOD_KINDS)
        ood, valid_ood = (own, seen), (seen, seen + len(VALID_OOD_KINDS))
        anew = {"redrawn": True, "paired_anew": self._anew}
        return {
            "train": self._composed("train", train, self._training_kind("train", train), self._ground, **anew),
            "valid": self._composed("valid", valid, self._training_kind("valid", valid), self._ground),
            "valid_ood": self._composed("valid_ood", valid, self._any_kind("valid_ood", valid, *valid_ood)),
            "iid": self._composed("iid", test, self._biased_kind("iid", test)),
            "ood": self._composed("ood", test, self._any_kind("ood", test, *ood)),
            "shift": self._composed("shift", test, 1 - test.label),
        }

    def _composed(
        self, name: str, part: Part, kind: Int[Tensor, "n"], ground: Ground = "biased", **how: bool
    ) -> CompositeSplit:
        count = len(kind)
        choices = {number: self._scenes_of(number, part.name) for number in kind.unique().tolist()}
        return CompositeSplit(
            label=part.label,
            bias=kind if ground in SCENIC else torch.full_like(kind, len(self.biases) - 1),
            tiers=part.tiers,
            objects=part.objects,
            scenes=scene_views(self._folder, choices, kind, self._size, self._stream(f"{name} scenes")),
            twin=torch.randint(count, (count,), generator=self._stream(f"{name} twins")),
            seed=torch.randint(2**31, (count,), generator=self._stream(f"{name} noise")),
            ground=ground,
            clean_ground=self._clean_ground,
            **how,
        )

    def _scenes_of(self, kind: int, part: str) -> list[Subject]:
        return self._scenes[kind][part] if kind < len(self.classes) else _of_kind(self.biases[kind])

    def _training_kind(self, split: str, part: Part) -> Int[Tensor, "n"]:
        own = len(self.classes)
        return self._any_kind(split, part, 0, own) if self._ground == "random" else self._biased_kind(split, part)

    def _biased_kind(self, split: str, part: Part) -> Int[Tensor, "n"]:
        return biased(part, self._ratio, self._stream(f"{split} aligned"))

    def _any_kind(self, split: str, part: Part, first: int, end: int) -> Int[Tensor, "n"]:
        return torch.randint(first, end, part.label.shape, generator=self._stream(f"{split} kinds"))

    def _stream(self, purpose: str) -> torch.Generator:
        return generator_for(self._seed, purpose)


def _of_kind(kind: str) -> list[Subject]:
    return [scene for scene in SCENES if scene.kind == kind]
