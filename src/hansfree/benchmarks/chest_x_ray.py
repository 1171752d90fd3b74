"""Chest X-rays whose classes come from one source each: what tells the hospital tells the disease.

After a task of Bassi et al., "Training with explanations alone: a new paradigm to prevent shortcut learning", 2025 (the
second version of https://arxiv.org/abs/2407.09788): COVID-19, pneumonia and normal lungs, gathered from several data
sets, so that a network may learn the marks, borders and grey levels of a hospital, and an external test of other
hospitals. Their repository has neither folders nor lists; this reads

    ROOT/internal/CLASS/...     one source for each class: train, valid and iid are drawn from it
    ROOT/external/CLASS/...     the same classes from other sources: ood
    ROOT/masks/internal/CLASS/...     (optional) for each image a mask of the same name with the ending png

Images lie in CLASS, or in one folder for each patient there (with folders of studies inside, if there are any): all
images of a patient fall into one split. There is no shift: a disease cannot be moved to another hospital's source.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, final

import torch
from PIL import Image

from hansfree.benchmarks.coloured_digits import between, generator_for
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.folder import FolderSplit, Row, described, split_of
from hansfree.core import InputSpec
from hansfree.errors import UserError

INTERNAL, EXTERNAL = "internal", "external"

Patients = Mapping[str, Sequence[Path]]
"""By patient, the images."""


@final
class ChestXRay(Divided[FolderSplit]):
    """X-rays of the chest, of which the source gives the class away while training and is another one afterwards.

    ``bias`` is the source, an index into ``biases``: first the classes' own, so that ``bias == label`` means aligned,
    as all internal images are, and last "external".

    ``root`` is the folder; ``masks`` the one of the masks, of lungs for instance (default: no masks); ``size`` the side
    to which images are brought, whatever their shape; ``valid`` and ``test`` the shares of each class's patients that
    become valid and iid, drawn by ``split_seed``; ``cache`` keeps decoded images in memory.
    """

    name: ClassVar[str] = "chest-x-ray"
    shortcut = "the source"
    asks = MappingProxyType(
        {
            "iid": "X-rays of training's sources, of other patients.",
            "ood": "X-rays of other sources.",
        }
    )

    def __init__(
        self,
        *,
        root: str | Path,
        masks: str | Path | None = None,
        size: int = 224,
        valid: float = 0.2,
        test: float = 0.2,
        split_seed: int = 0,
        cache: bool = False,
    ) -> None:
        if size < 1:
            raise UserError(f"benchmark.size is {size}; give a number of pixels.")
        for key, share in {"valid": valid, "test": test, "valid and test together": valid + test}.items():
            between(key, share, 0, 1)
        self._root = Path(root).expanduser()
        internal, external = (read_classes(self._root / part) for part in (INTERNAL, EXTERNAL))
        _check_classes(self._root, internal, external)
        self.classes = tuple(internal)
        self.biases = (*(f"source of {name}" for name in self.classes), EXTERNAL)
        self.mask_names = () if masks is None else ("lungs",)
        self.gives = frozenset({"bias"} if masks is None else {"bias", "mask"})
        self.input = InputSpec(3, size, size)
        parts = divided(internal, valid=valid, test=test, seed=split_seed)
        parts["ood"] = [[image for patient in external[name].values() for image in patient] for name in self.classes]
        folder = None if masks is None else Path(masks).expanduser()
        self._splits = {
            name: split_of(self._rows(name, images, folder), size=(size, size), resized=True, cache=cache)
            for name, images in parts.items()
        }
        self._options = {
            "root": str(root), "masks": None if masks is None else str(masks), "size": size, "valid": valid,
            "test": test, "split_seed": split_seed, "cache": cache,
        }  # fmt: skip

    def _described(self, split: FolderSplit) -> dict[str, Any]:
        return described(split, self._root)

    def _rows(self, split: str, images: Sequence[Sequence[Path]], masks: Path | None) -> list[Row]:
        return [
            Row(
                source=str(image),
                image=image,
                y=str(label),
                split=split,
                place=str(len(self.classes) if split == "ood" else label),
                masks=() if masks is None else (_mask(masks, image.relative_to(self._root)),),
            )
            for label, own in enumerate(images)
            for image in own
        ]


def read_classes(folder: Path) -> dict[str, Patients]:
    """By class its patients, all in alphabetical order. Raises ``UserError`` where there is no folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; put the images of each class into {folder / 'CLASS'}.")
    return {one.name: _patients(one) for one in sorted(folder.iterdir()) if one.is_dir()}


def _patients(folder: Path) -> Patients:
    endings = Image.registered_extensions()
    patients: dict[str, list[Path]] = {}
    for image in sorted(folder.rglob("*")):
        if image.suffix.lower() in endings and not image.name.startswith("."):
            patients.setdefault(image.relative_to(folder).parts[0], []).append(image)
    return patients


def divided(classes: Mapping[str, Patients], *, valid: float, test: float, seed: int) -> dict[str, list[list[Path]]]:
    """The images of train, valid and iid by class, no patient of a class in two of them.

    Raises ``UserError`` where a class has too few patients for that.
    """
    parts: dict[str, list[list[Path]]] = {"train": [], "valid": [], "iid": []}
    for name, patients in classes.items():
        names = list(patients)
        order = [names[at] for at in torch.randperm(len(names), generator=generator_for(seed, name)).tolist()]
        first, second = (max(1, round(share * len(names))) for share in (valid, test))
        of = {"valid": order[:first], "iid": order[first : first + second], "train": order[first + second :]}
        for part, some in of.items():
            if not some:
                raise UserError(
                    f"{INTERNAL}/{name} has {len(names)} patients, of whom none is left for {part}; add some, or take "
                    "smaller shares as benchmark.valid and benchmark.test."
                )
            parts[part].append([image for patient in some for image in patients[patient]])
    return parts


def _check_classes(root: Path, internal: Mapping[str, Patients], external: Mapping[str, Patients]) -> None:
    if len(internal) < 2:
        told = ", ".join(internal) or "none"
        raise UserError(f"{root / INTERNAL} has the classes {told}; a classifier needs two or more.")
    for part, classes in ((INTERNAL, internal), (EXTERNAL, external)):
        for name in (*internal, *external):
            if not classes.get(name):
                raise UserError(
                    f"{root / part / name} holds no images, but the class is known; put some there, or take "
                    f"the folder out of {INTERNAL} and {EXTERNAL}."
                )


def _mask(masks: Path, image: Path) -> Path:
    path = masks / image.with_suffix(".png")
    if not path.is_file():
        raise UserError(f"{path} is missing, the mask of {image}; put it there, or leave benchmark.masks out.")
    return path
