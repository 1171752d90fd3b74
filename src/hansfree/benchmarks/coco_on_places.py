"""COCO-on-Places: nine classes of COCO's objects, each cut out and put on scenes of Places that give it away.

Ahmed, Bengio, van Seijen & Courville, "Systematic generalisation with group invariant predictions", ICLR 2021,
https://openreview.net/forum?id=b9PoimzZFJ, and, with all training samples biased, Bassi, Cavalli & Decherchi,
"Explanation is all you need in distillation: mitigating bias and shortcut learning", 2024,
https://arxiv.org/abs/2407.09788, section 4.3. Image, mask and scene are each brought to ``size`` x ``size`` pixels,
whatever their shape, the mask by that becoming soft:

    image = mask * object + (1 - mask) * scene

The object is the largest one of its class in an image of COCO's training part, if its area is 10,000 pixels or more.
The first 800 of each class are for training, the next 100 for validation, the next 100 for test.

    train, valid   the class's own kind of scene in a share ``bias_ratio`` of the samples, else one of ``MIXED``
    iid            as train
    shift          the objects of iid on another class's kind of scene, drawn per sample
    ood            the objects of iid on kinds of scenes that never occur in training
    valid_ood      the validation objects on three further kinds, for methods that are granted it

``clean`` is the same object on a scene drawn from the split's own without regard to the class, anew at every access to
train and fixed elsewhere.

Indexing. ``fixed``: images by their number in COCO, each used once, whatever else it shows; regions of many objects
left out; an exact share of aligned samples; no scene file is shown twice. ``authors``: as the published code does.
Images in the order in which COCO's tools give them (a set of CPython's); the same image may serve two classes, one in
train and one in test; a region of many objects may be the largest one; a coin decides which samples are aligned; the
scenes of ood are those at the place that counts the images looked at, the ones left out included, anew for each class,
so that classes share them, and scenes of valid are counted in the same way, from a share ``bias_ratio`` of the way on:
valid and the tests meet each other's scenes, and below 100 % training's. In both, scenes are shuffled by
``scene_seed``; the published code does not seed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from hansfree import backgrounds
from hansfree.benchmarks.coco_objects import CocoObject, Largest, largest_objects
from hansfree.benchmarks.coloured_digits import between, generator_for, known, stratified_order
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.image_files import read_image
from hansfree.core import Batch, InputSpec, Split
from hansfree.errors import UserError

OWN_SCENES = {
    "boat": "beach", "airplane": "canyon", "truck": "building_facade", "dog": "staircase", "zebra": "desert/sand",
    "horse": "crevasse", "bird": "bamboo_forest", "train": "forest/broadleaf", "bus": "ball_pit",
}  # fmt: skip
CLASSES, OWN = tuple(OWN_SCENES), tuple(OWN_SCENES.values())
MIXED = ("kasbah", "lighthouse", "pagoda", "rock_arch")
VALID_OOD = ("oast_house", "orchard", "viaduct")
OOD = ("water_tower", "waterfall", "zen_garden")
KINDS = (*OWN, *MIXED, *VALID_OOD, *OOD)
NOWHERE = "noise"
SMALLEST = 10_000
"""Pixels of an object's area."""
SPLITS = ("train", "valid", "valid_ood", "iid", "ood", "shift")

Ground = Literal["biased", "random", "noise"]
Indexing = Literal["fixed", "authors"]


@final
@dataclass(frozen=True)
class Scene:
    """A photograph of Places, and its kind as an index into ``KINDS``."""

    file: Path
    kind: int


@final
@dataclass(frozen=True)
class Sample:
    """An object, its class, and the scene behind it, before anything is read."""

    thing: CocoObject
    label: int
    scene: Scene


Plan = Mapping[str, Sequence[Sample]]
Counts = Mapping[str, int]
"""Samples of each class in train, valid and test."""


# Scenes


def scenes_of(places: Path, kinds: Sequence[str], generator: torch.Generator) -> list[Scene]:
    """All photographs of these kinds, shuffled together. Raises ``UserError`` where a kind has no folder or no file."""
    found: list[Scene] = []
    for kind in kinds:
        folder = places / kind[0] / kind
        endings = Image.registered_extensions()
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in endings)
        if not files:
            raise UserError(
                f"{folder} holds no images; unpack data_256/{kind[0]}/{kind} of train_256_places365standard.tar there, "
                "and set benchmark.places to the folder data_256."
            )
        found += [Scene(file, KINDS.index(kind)) for file in files]
    return [found[number] for number in torch.randperm(len(found), generator=generator).tolist()]


@final
@dataclass(frozen=True)
class Pools:
    """Shuffled scenes: each class's own, and those of ``MIXED``, ``VALID_OOD`` and ``OOD``."""

    own: Sequence[Sequence[Scene]]
    mixed: Sequence[Scene]
    valid_ood: Sequence[Scene]
    ood: Sequence[Scene]


def pools_of(places: Path, seed: int) -> Pools:
    """Every scene that may be needed."""

    def shuffled(*kinds: str) -> list[Scene]:
        return scenes_of(places, kinds, generator_for(seed, f"order of {kinds}"))

    return Pools([shuffled(kind) for kind in OWN], shuffled(*MIXED), shuffled(*VALID_OOD), shuffled(*OOD))


# Which object falls where, on which scene


def fixed_plan(
    largest: Sequence[Largest], pools: Pools, counts: Counts, ratio: float, generator: torch.Generator
) -> Plan:
    """Each image once, each scene once; see the module. Raises ``UserError`` where there are too few of either."""
    things = {part: [] for part in counts}
    used: set[int] = set()
    for label, of_image in enumerate(largest):
        unused = (of_image[number] for number in sorted(of_image) if number not in used)
        for part, some in _taken(unused, label, counts).items():
            things[part] += [(thing, label) for _, thing in some]
            used |= {thing.image for _, thing in some}
    own = [_unrepeated(pool, f"of {kind}") for pool, kind in zip(pools.own, OWN)]
    mixed = _unrepeated(pools.mixed, f"of {', '.join(MIXED)}")

    def biased(part: str) -> list[Sample]:
        labels = torch.tensor([label for _, label in things[part]])
        order = stratified_order(labels, generator).tolist()
        conflicting = set(order[round(ratio * len(order)) :])
        return [
            Sample(thing, label, mixed() if number in conflicting else own[label]())
            for number, (thing, label) in enumerate(things[part])
        ]

    def on(scene_for: Callable[[int], Scene], part: str) -> list[Sample]:
        return [Sample(thing, label, scene_for(label)) for thing, label in things[part]]

    valid_ood = _unrepeated(pools.valid_ood, f"of {', '.join(VALID_OOD)}")
    ood = _unrepeated(pools.ood, f"of {', '.join(OOD)}")
    return {
        "train": biased("train"),
        "valid": biased("valid"),
        "valid_ood": on(lambda label: valid_ood(), "valid"),
        "iid": biased("test"),
        "ood": on(lambda label: ood(), "test"),
        "shift": on(lambda label: own[_other(label, generator)](), "test"),
    }


def authors_plan(
    largest: Sequence[Largest], pools: Pools, counts: Counts, ratio: float, generator: torch.Generator
) -> Plan:
    """As the published code indexes; see the module. Raises ``UserError`` where its indices find no scene."""
    plan: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    train, valid, test = counts["train"], counts["valid"], counts["test"]
    before_valid, before_test = int(ratio * train), int(ratio * (train + valid))

    for label, of_image in enumerate(largest):
        own = pools.own[label]

        def biased(number: int, mixed: int, own: Sequence[Scene] = own) -> Scene:
            aligned = float(torch.rand((), generator=generator)) <= ratio
            return _at(own, number) if aligned else _at(pools.mixed, mixed)

        # COCO's own tools make a set of a list; one made of a dictionary would have another order.
        taken = _taken((of_image[number] for number in set(iter(of_image))), label, counts)
        for number, (_, thing) in enumerate(taken["train"]):
            plan["train"].append(Sample(thing, label, biased(number, label * train + number)))
        mixed = int((1 - ratio) * (label + 1) * train)
        for number, (tried, thing) in enumerate(taken["valid"]):
            plan["valid"].append(Sample(thing, label, biased(tried + before_valid, tried + mixed)))
            plan["valid_ood"].append(Sample(thing, label, _at(pools.valid_ood, label * valid + number)))
        mixed = int((1 - ratio) * (label + 1) * (train + valid))
        for number, (tried, thing) in enumerate(taken["test"]):
            plan["iid"].append(Sample(thing, label, biased(number + before_test, label * test + number + mixed)))
            plan["ood"].append(Sample(thing, label, _at(pools.ood, tried)))
            other = pools.own[_other(label, generator)]
            plan["shift"].append(Sample(thing, label, _at(other, tried + before_test)))
    return plan


PLANS = {"fixed": fixed_plan, "authors": authors_plan}


def _taken(images: Iterator[CocoObject], label: int, counts: Counts) -> dict[str, list[tuple[int, CocoObject]]]:
    """For each part the next objects that are large enough, and how many images of the part were looked at before."""
    taken: dict[str, list[tuple[int, CocoObject]]] = {}
    for part, count in counts.items():
        some = taken.setdefault(part, [])
        for tried, thing in enumerate(images):
            if thing.area >= SMALLEST:
                some.append((tried, thing))
            if len(some) == count:
                break
        else:
            there = sum(map(len, taken.values()))
            raise UserError(
                f"COCO has {there} usable images of the class {CLASSES[label]!r}, but benchmark.train, valid and test "
                f"ask for {sum(counts.values())}; ask for fewer."
            )
    return taken


def _unrepeated(pool: Sequence[Scene], called: str) -> Callable[[], Scene]:
    """Gives the scenes of ``pool`` one by one."""
    scenes = iter(pool)

    def following() -> Scene:
        for scene in scenes:
            return scene
        raise UserError(
            f"benchmark.places holds {len(pool)} images {called}, and all are used; add some, or ask for fewer samples."
        )

    return following


def _at(pool: Sequence[Scene], number: int) -> Scene:
    if number >= len(pool):
        kinds = ", ".join(dict.fromkeys(KINDS[scene.kind] for scene in pool))
        raise UserError(
            f"benchmark.indexing 'authors' asks for image {number + 1} of {kinds}, but benchmark.places holds "
            f"{len(pool)}; add some, or set benchmark.indexing: fixed."
        )
    return pool[number]


def _other(label: int, generator: torch.Generator) -> int:
    step = int(torch.randint(1, len(CLASSES), (), generator=generator))
    return (label + step) % len(CLASSES)


# Reading


@final
@dataclass(frozen=True, eq=False)
class Pictures:
    """Objects and scenes as bytes, each read from its file once."""

    images: Path
    size: int
    kept: dict[object, UInt8[Tensor, "c h w"]] = field(default_factory=dict[object, Tensor], repr=False)

    def thing(self, thing: CocoObject) -> UInt8[Tensor, "4 h w"]:
        """Image and mask. Raises ``UserError`` for a bad image, and for one that is not as large as is told."""
        if thing not in self.kept:
            path = self.images / thing.file
            image = read_image(path)
            if image.size != (thing.width, thing.height):
                raise UserError(
                    f"{path} has {image.height} x {image.width} pixels, but {thing.source} is about "
                    f"{thing.height} x {thing.width}; fetch the image again."
                )
            self.kept[thing] = torch.cat([self._sized(image), self._sized(Image.fromarray(thing.mask()))])
        return self.kept[thing]

    def scene(self, scene: Scene) -> UInt8[Tensor, "3 h w"]:
        """The photograph. Raises ``UserError`` for a bad one."""
        if scene not in self.kept:
            self.kept[scene] = self._sized(read_image(scene.file))
        return self.kept[scene]

    def _sized(self, image: Image.Image) -> UInt8[Tensor, "c h w"]:
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels.reshape(self.size, self.size, -1).copy()).permute(2, 0, 1)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedSplit(Split):
    """Objects and scenes, read and put together when a batch is asked for."""

    samples: Sequence[Sample]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    pictures: Pictures
    twin: Int[Tensor, "n"]
    """Number of the sample whose scene is behind the clean twin."""
    seed: Int[Tensor, "n"]
    """Of noise."""
    ground: Ground = "biased"
    redrawn: bool = False
    """Whether twin and noise are drawn anew at every access that brings a generator."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``. Raises ``UserError`` for a bad image."""
        twin, seed = self.twin[index], self.seed[index]
        if self.redrawn and generator is not None:
            twin, seed = (torch.randint(most, (len(index),), generator=generator) for most in (len(self), 2**31))
        things = torch.stack([self.pictures.thing(self.samples[number].thing) for number in index.tolist()])
        image, mask = things[:, :3].float() / 255, things[:, 3:].float() / 255
        size = self.pictures.size
        behind = backgrounds.noise(seed, 3, size, size) if self.ground == "noise" else self._scenes(index)
        return Batch(
            input=backgrounds.replace(image, mask, behind),
            label=self.label[index],
            index=index,
            bias=self.bias[index],
            mask=mask,
            clean=backgrounds.replace(image, mask, self._scenes(twin)),
        )

    def _scenes(self, numbers: Int[Tensor, "b"]) -> Float[Tensor, "b 3 h w"]:
        scenes = [self.pictures.scene(self.samples[number].scene) for number in numbers.tolist()]
        return torch.stack(scenes).float() / 255


@final
class CocoOnPlaces(Divided[PlacedSplit]):
    """Objects of COCO on scenes of Places, whose kind gives the class away while training and misleads afterwards.

    ``bias`` is the kind of scene, an index into ``biases``: first the classes' own, so that ``bias == label`` means
    aligned, then the others, and last "noise".

    ``coco`` is the folder with ``annotations/instances_train2017.json`` and ``train2017``; ``places`` the one with
    ``b/beach`` and the other kinds. ``bias_ratio`` is the share of aligned samples in train, valid and iid; ``size`` is
    the side of the images; ``train``, ``valid`` and ``test`` are numbers of samples per class; ``indexing`` is fixed or
    authors; ``scene_seed`` decides which scene is behind which object.

    ``ground`` is for teachers: behind the objects of train and valid are the scenes that the bias asks for (biased),
    the same scenes without regard to the class (random), or noise, drawn anew at every access to train.
    """

    name: ClassVar[str] = "coco-on-places"
    classes = CLASSES
    biases = (*KINDS, NOWHERE)
    mask_names = ("object",)
    gives = frozenset({"bias", "mask", "clean"})
    shortcut = "the kind of scene"

    def __init__(
        self,
        *,
        coco: str | Path,
        places: str | Path,
        bias_ratio: int | float = 1.0,
        indexing: Indexing = "fixed",
        size: int = 64,
        train: int = 800,
        valid: int = 100,
        test: int = 100,
        ground: Ground = "biased",
        scene_seed: int = 0,
    ) -> None:
        known("indexing", indexing, PLANS)
        known("ground", ground, ("biased", "random", "noise"))
        between("bias_ratio", bias_ratio, 0, 1)
        counts = {"train": train, "valid": valid, "test": test}
        for key, count in {**counts, "size": size}.items():
            if count < 1:
                raise UserError(f"benchmark.{key} is {count}; give 1 or more.")
        root, self._places = Path(coco).expanduser(), Path(places).expanduser()
        annotations = root / "annotations/instances_train2017.json"
        largest = largest_objects(annotations, CLASSES, crowds=indexing == "authors")
        pools = pools_of(self._places, scene_seed)
        plan = PLANS[indexing](largest, pools, counts, bias_ratio, generator_for(scene_seed, "plan"))
        self._pictures = Pictures(root / "train2017", size)
        _check_there(self._pictures.images, plan)
        self.input = InputSpec(3, size, size)
        self._ground: Ground = ground
        self._seed = scene_seed
        self._splits = {name: self._split(name, plan[name]) for name in SPLITS}
        self._options = {
            "coco": str(coco), "places": str(places), "bias_ratio": bias_ratio, "indexing": indexing, "size": size,
            **counts, "ground": ground, "scene_seed": scene_seed,
        }  # fmt: skip

    def _split(self, name: str, samples: Sequence[Sample]) -> PlacedSplit:
        count = len(samples)
        ground: Ground = self._ground if name in ("train", "valid") else "biased"
        if ground == "random":
            order = torch.randperm(count, generator=self._stream(f"{name} ground")).tolist()
            samples = [Sample(one.thing, one.label, samples[other].scene) for one, other in zip(samples, order)]
        nowhere = self.biases.index(NOWHERE)
        return PlacedSplit(
            samples=samples,
            label=torch.tensor([one.label for one in samples]),
            bias=torch.tensor([nowhere if ground == "noise" else one.scene.kind for one in samples]),
            pictures=self._pictures,
            twin=torch.randint(count, (count,), generator=self._stream(f"{name} twins")),
            seed=torch.randint(2**31, (count,), generator=self._stream(f"{name} noise")),
            ground=ground,
            redrawn=name == "train",
        )

    def _stream(self, purpose: str) -> torch.Generator:
        return generator_for(self._seed, purpose)

    def _described(self, split: PlacedSplit) -> dict[str, Any]:
        sha = hashlib.sha256()
        for one in split.samples:
            scene = one.scene.file.relative_to(self._places).as_posix()
            sha.update(f"{one.thing.number} {one.thing.file} {scene}\n".encode())
        aligned = int((split.bias == split.label).sum())
        return {"size": len(split), "aligned": aligned, "conflicting": len(split) - aligned, "sha256": sha.hexdigest()}


def _check_there(images: Path, plan: Plan) -> None:
    used = sorted({one.thing.file for split in plan.values() for one in split})
    missing = [file for file in used if not (images / file).is_file()]
    if missing:
        raise UserError(
            f"{images} lacks {len(missing)} of the {len(used)} images that are used, such as {missing[0]}; unpack "
            "COCO's train2017.zip into benchmark.coco."
        )
