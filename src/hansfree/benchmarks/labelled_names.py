"""Faces and actions with few conflicting images, in folders of aligned and of conflicting ones.

Lee, Kim, Lee, Lee & Choo, "Learning debiased representation via disentangled feature augmentation", NeurIPS 2021 (DFA),
https://arxiv.org/abs/2107.01372, ship them so, and Park et al., "Training debiased subnetworks with contrastive weight
pruning", CVPR 2023 (DCWP), https://arxiv.org/abs/2210.05247, use their folders. The name of a file tells its class and
its bias, in numbers, at its end:

    bffhq/0.5pct/align/0/8071_0_0.png       bar/train/align/0/12_0_0.jpg
    bffhq/0.5pct/conflict/1/631_1_0.png     bar/train/conflict/1pct/0/7_0_3.jpg
    bffhq/valid/8_0_1.png                   bar/valid/0/3_0_0.jpg
    bffhq/test/9_1_0.png                    bar/test/0/5_0_2.jpg

``train`` may stand for ``0.5pct``, and images may lie in folders of their classes or not. BAR's own archive, of Nam et
al., "Learning from failure", NeurIPS 2020, https://arxiv.org/abs/2007.02561, tells the class alone, first:
``train/diving_0.jpg`` and ``test/diving_520.jpg``.

Splits. Where the bias is told: ``train`` is all images of align and conflict, ``valid`` the validation images that have
their class's bias, ``valid_ood`` all of them; ``iid`` the aligned test images, where there are any, ``shift`` the
conflicting ones. What papers test on is ``ood``, and they mean two things by it: the ``conflicting`` test images alone
(DFA), or ``all`` (DCWP). BAR's own archive has no conflicting training images, and test images from other places alone,
so what it calls test is ood, and ``valid`` of each class are held out of train.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from PIL import Image

from hansfree.benchmarks.coloured_digits import known
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.folder import FolderSplit, Row, described, held_out, split_of
from hansfree.core import InputSpec
from hansfree.errors import UserError

Tested = Literal["conflicting", "all"]
ACTIONS = ("climbing", "diving", "fishing", "pole vaulting", "racing", "throwing")
PLACES = ("rock wall", "underwater", "water surface", "sky", "paved track", "playing field")
TESTED_ON = {
    "conflicting": "The conflicting test images.",
    "all": "All test images, aligned and conflicting.",
}
_NAME = re.compile(r".*_(\d+)_(\d+)")
_ACTION = re.compile(r"([a-z ]+)_\d+")


@final
class BFFHQ(Divided[FolderSplit]):
    """Faces whose age tells young women from old men while training, and misleads where it conflicts.

    The class is the age, ``bias`` the gender, an index into ``biases``, so that ``bias == label`` means aligned; 0.5 %
    of the training images conflict. ``root`` is the folder bffhq or the one that holds it; ``tested`` says which test
    images are ood: conflicting (DFA) or all (DCWP); ``size`` is the side to which images are brought (DFA 224, DCWP
    128); ``cache`` keeps decoded images in memory.
    """

    name: ClassVar[str] = "bffhq"
    classes = ("young", "old")
    biases = ("female", "male")
    gives = frozenset({"bias"})
    shortcut = "the gender"

    def __init__(self, *, root: str | Path, tested: Tested = "all", size: int = 128, cache: bool = False) -> None:
        known("tested", tested, TESTED_ON)
        self.asks = {"ood": TESTED_ON[tested]}
        self._root = _holding(Path(root).expanduser(), "bffhq", ("0.5pct", "train"))
        train = next(self._root / name for name in ("0.5pct", "train") if (self._root / name).is_dir())
        rows = [
            *_named(train / "align", "train", self.classes, self.biases),
            *_named(train / "conflict", "train", self.classes, self.biases),
            *_named(self._root / "valid", "valid", self.classes, self.biases),
            *_named(self._root / "test", "test", self.classes, self.biases),
        ]
        self.input = _input(size)
        self._splits = _splits(self._root, by_conflict(rows, tested), size, cache)
        self._options = {"root": str(root), "tested": tested, "size": size, "cache": cache}

    def _described(self, split: FolderSplit) -> dict[str, Any]:
        return described(split, self._root)


@final
class BAR(Divided[FolderSplit]):
    """Actions whose place gives them away while training: six kinds, each at its own place, and tested elsewhere.

    ``root`` is the folder of BAR's own archive, without ``conflicting``, or, with it, the one of DFA's kind, of which
    ``conflicting`` names the share of conflicting training images: 1pct or 5pct. ``valid`` of each class, drawn by
    ``split_seed``, are held out of train where the archive has no validation images of its own. ``tested`` says of the
    other kind which test images are ood: conflicting or all. ``size`` is the side to which images are brought;
    ``cache`` keeps decoded images in memory. ``bias`` is the place, where it is told.
    """

    name: ClassVar[str] = "bar"
    classes = ACTIONS
    shortcut = "the place"

    def __init__(
        self,
        *,
        root: str | Path,
        conflicting: str | None = None,
        valid: int = 20,
        split_seed: int = 0,
        tested: Tested = "all",
        size: int = 224,
        cache: bool = False,
    ) -> None:
        known("tested", tested, TESTED_ON)
        self.asks = {"ood": "At other places than in training." if conflicting is None else TESTED_ON[tested]}
        self._root = _holding(Path(root).expanduser(), "BAR" if conflicting is None else "bar", ("train",))
        self.input = _input(size)
        self.biases, self.gives = ((), frozenset[str]()) if conflicting is None else (PLACES, frozenset({"bias"}))
        self._splits = _splits(
            self._root,
            self._own(valid, split_seed) if conflicting is None else self._told(conflicting, tested),
            size,
            cache,
        )
        self._options = {
            "root": str(root), "conflicting": conflicting, "valid": valid, "split_seed": split_seed, "tested": tested,
            "size": size, "cache": cache,
        }  # fmt: skip

    def _own(self, valid: int, seed: int) -> dict[str, list[Row]]:
        train, ours = held_out(_actions(self._root / "train", "train"), ACTIONS, valid, seed)
        return {"train": train, "valid": ours, "ood": list(_actions(self._root / "test", "ood"))}

    def _told(self, conflicting: str, tested: Tested) -> dict[str, list[Row]]:
        parts = {
            "train": (self._root / "train/align", self._root / "train/conflict" / conflicting),
            "valid": (self._root / "valid",),
            "test": (self._root / "test",),
        }
        rows = [
            row
            for part, folders in parts.items()
            for folder in folders
            for row in _named(folder, part, ACTIONS, PLACES)
        ]
        return by_conflict(rows, tested)

    def _described(self, split: FolderSplit) -> dict[str, Any]:
        return described(split, self._root)


def by_conflict(rows: Iterable[Row], tested: Tested) -> dict[str, list[Row]]:
    """The splits of the module's list, of rows of train, valid and test whose bias is told."""
    part: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        part[row.split].append(row)
    shift = [row for row in part["test"] if row.y != row.place]
    return {
        "train": part["train"],
        "valid": [row for row in part["valid"] if row.y == row.place],
        "valid_ood": part["valid"],
        "iid": [row for row in part["test"] if row.y == row.place],
        "ood": shift if tested == "conflicting" else part["test"],
        "shift": shift,
    }


# Reading names


def _named(folder: Path, split: str, classes: Sequence[str], biases: Sequence[str]) -> Iterator[Row]:
    """The images in ``folder``, at any depth, whose names end with their class and bias."""
    for path in _images(folder):
        told = _NAME.fullmatch(path.stem)
        if told is None or int(told[1]) >= len(classes) or int(told[2]) >= len(biases):
            raise UserError(
                f"{path} does not end with a class below {len(classes)} and a bias below {len(biases)}, as in 12_0_1"
                f"{path.suffix}; take it out or fetch the archive again."
            )
        yield Row(str(path), path, str(int(told[1])), split, str(int(told[2])))


def _actions(folder: Path, split: str) -> Iterator[Row]:
    """The images in ``folder`` whose names begin with their action."""
    for path in _images(folder):
        told = _ACTION.fullmatch(path.stem)
        if told is None or told[1] not in ACTIONS:
            raise UserError(f"{path} begins with no action of BAR, such as diving_0; take it out or fetch BAR again.")
        yield Row(str(path), path, str(ACTIONS.index(told[1])), split)


def _images(folder: Path) -> list[Path]:
    endings = Image.registered_extensions()
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no images; unpack the whole archive, or mend benchmark.root.")
    return found


def _holding(root: Path, name: str, one_of: Sequence[str]) -> Path:
    """``root``, or ``name`` in it, whichever has one of these folders."""
    for folder in (root, root / name):
        if any((folder / inner).is_dir() for inner in one_of):
            return folder
    raise UserError(f"{root} has no folder {' or '.join(one_of)}; set benchmark.root to the unpacked folder {name}.")


def _input(size: int) -> InputSpec:
    if size < 1:
        raise UserError(f"benchmark.size is {size}; give a number of pixels.")
    return InputSpec(3, size, size)


def _splits(root: Path, rows: dict[str, list[Row]], size: int, cache: bool) -> dict[str, FolderSplit]:
    for name, some in rows.items():
        if not some and name != "iid":  # a test may hold conflicting images alone
            raise UserError(f"{root} has no {name} images; unpack the whole archive again.")
    return {name: split_of(some, size=(size, size), resized=True, cache=cache) for name, some in rows.items() if some}
