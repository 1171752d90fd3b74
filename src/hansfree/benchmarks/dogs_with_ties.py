"""DogsWithTies: two breeds of dogs in photographs, of which each wears a tie of its own while training.

Source. Bassi, Cavalli & Decherchi, "Explanation is all you need in distillation: mitigating bias and shortcut
learning", 2024, https://arxiv.org/abs/2407.09788, section 4.2 and appendix A.1: all Pekingese of Stanford Dogs (Khosla
et al., "Novel dataset for fine-grained image categorization", 2011) wear a purple bow tie, all Tibetan mastiffs a red
necktie. The 100 training images of a breed are those of Stanford's list, and 20 of them, drawn by ``split_seed``,
validate; the 49 and 52 test images are those of its other list. All are brought to 224 x 224 pixels.

``root`` holds Stanford Dogs as it was published, and beside it what is one's own:

    Images/n02086079-Pekinese/n02086079_10017.jpg ...    lists/train_list.mat    lists/test_list.mat
    marks.csv        a mark for each image of the breeds, named as in the lists, n02086079-Pekinese/n02086079_10017.jpg
    bow-tie.png, necktie.png                             on transparent ground

Splits, marks and places of the ties are those of :mod:`hansfree.benchmarks.folder_with_accessories`.

Deviations. The authors' marks, their two pictures of ties and their code to place them are not published, so that
marks, ties and the rule for a tie's size (a bow tie as long as the neck is wide, a necktie twice as long) are ours.
Validation images without ties (valid_ood) are ours: the paper has no such split.
"""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, final

import torch
from scipy.io import loadmat

from hansfree.benchmarks.coloured_digits import generator_for
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.folder import Row
from hansfree.benchmarks.folder_with_accessories import (
    MARKS,
    WearingSplit,
    Worn,
    check_settings,
    dressed,
    read_images,
    read_wardrobe,
)
from hansfree.core import InputSpec
from hansfree.errors import UserError, unknown

IMAGES, LISTS = "Images", {"train": "lists/train_list.mat", "test": "lists/test_list.mat"}


def listed(root: Path, part: str) -> dict[str, list[Path]]:
    """By breed the images that one of the lists of Stanford Dogs names, in its order.

    Raises ``UserError`` where there is no list, or it is none of theirs.
    """
    path = root / LISTS[part]
    if not path.is_file():
        raise UserError(
            f"{path} is missing; set benchmark.root to the folder with the Images and lists of Stanford Dogs."
        )
    try:
        files = [str(cell[0]) for cell in loadmat(path)["file_list"][:, 0]]
    except Exception as error:  # scipy raises many kinds for what is no such file
        raise UserError(
            f"{path} is no list of Stanford Dogs ({type(error).__name__}); unpack lists.tar again."
        ) from error
    found: dict[str, list[Path]] = {}
    for file in files:
        folder, _, _ = file.partition("/")
        found.setdefault(folder.partition("-")[2], []).append(root / IMAGES / file)
    return found


def rows_of(root: Path, breeds: Sequence[str], part: str) -> tuple[Row, ...]:
    """The rows of one list, breed by breed. Raises ``UserError`` for an unknown breed and for a missing image."""
    found = listed(root, part)
    rows: list[Row] = []
    for number, breed in enumerate(breeds):
        if breed not in found:
            raise unknown("breed", breed, found)
        for image in found[breed]:
            if not image.is_file():
                raise UserError(f"{image}, which {LISTS[part]} names, is missing; unpack images.tar again.")
            rows.append(Row(str(image), image, str(number), part))
    return tuple(rows)


@final
class DogsWithTies(Divided[WearingSplit]):
    """Photographs of two breeds of dogs, whose ties give the breed away while training.

    ``bias`` is the tie, an index into ``biases``: first the breeds' own, so that ``bias == label`` means aligned, and
    last "none". No masks: one of the dog would hold the tie too.

    ``root`` is the folder of Stanford Dogs; ``breeds`` are two or more of its breeds; ``ties`` a picture for each, and
    ``marks`` the table of marks, both below ``root``; ``lengths`` the ties' longer sides, in necks. ``valid`` is the
    number of training images of each breed that validate instead, drawn by ``split_seed`` as is all else. ``size``,
    ``bias_ratio`` and ``worn`` are those of folder-with-accessories.
    """

    name: ClassVar[str] = "dogs-with-ties"
    gives = frozenset({"bias", "clean"})
    shortcut = "the tie"
    asks = MappingProxyType(
        {
            "iid": "Each breed with its own tie as often as in training.",
            "ood": "Without ties.",
            "shift": "Each breed with the other one's tie.",
        }
    )

    def __init__(
        self,
        *,
        root: str | Path,
        breeds: Sequence[str] = ("Pekinese", "Tibetan_mastiff"),
        ties: Sequence[str] = ("bow-tie.png", "necktie.png"),
        marks: str = MARKS,
        lengths: Sequence[float] = (1.0, 2.0),
        valid: int = 20,
        size: int = 224,
        bias_ratio: int | float = 1.0,
        split_seed: int = 0,
        worn: Worn = "biased",
    ) -> None:
        check_settings(size, bias_ratio, worn)
        if len(set(breeds)) < 2 or len(set(breeds)) < len(breeds):
            raise UserError(f"benchmark.breeds are {', '.join(breeds) or 'none'}; name two or more different ones.")
        self._root = Path(root).expanduser()
        self.classes, self.input = tuple(breeds), InputSpec(3, size, size)
        self.biases = (*(Path(tie).stem for tie in ties), "none")
        wardrobe = read_wardrobe(self._root, self._root / IMAGES, breeds, {"ties": ties, "lengths": lengths}, marks)
        learned, held_out = _divided(rows_of(self._root, breeds, "train"), len(breeds), valid, split_seed)
        rows = {"train": learned, "valid": held_out, "test": rows_of(self._root, breeds, "test")}
        parts = {part: read_images(own, size) for part, own in rows.items()}
        self._splits = dressed(parts, wardrobe, bias_ratio, split_seed, worn)
        self._options = {
            "root": str(root), "breeds": list(breeds), "ties": list(ties), "marks": marks, "lengths": list(lengths),
            "valid": valid, "size": size, "bias_ratio": bias_ratio, "split_seed": split_seed, "worn": worn,
        }  # fmt: skip

    def _described(self, split: WearingSplit) -> dict[str, Any]:
        return split.described(self._root)


def _divided(rows: tuple[Row, ...], breeds: int, valid: int, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows that train, and ``valid`` of each breed that validate."""
    held_out: set[Row] = set()
    for number in range(breeds):
        own = [row for row in rows if row.y == str(number)]
        if not 1 <= valid < len(own):
            raise UserError(
                f"benchmark.valid is {valid}, but a breed has {len(own)} training images; give 1 to {len(own) - 1}."
            )
        order = torch.randperm(len(own), generator=generator_for(seed, f"validation images of breed {number}"))
        held_out |= {own[place] for place in order[:valid].tolist()}
    return tuple(row for row in rows if row not in held_out), tuple(row for row in rows if row in held_out)
