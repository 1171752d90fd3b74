"""Which samples of a split are taken: so many of each class, drawn by a seed, or the images that a file lists.

A list names one image per line by its file, alone or with folders of its path before it: ``n01440764_10026.JPEG``,
``n01440764/n01440764_10026.JPEG``, ``/a/abbey/sun_aqswjsnjlrfzzhiz.jpg``. Empty lines do not count.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import Int
from torch import Tensor

from hansfree.errors import UserError


def drawn(label: Tensor, count: int, seed: int, classes: Sequence[str], *, key: str, left: int = 0) -> Int[Tensor, "n"]:
    """Where ``count`` samples of each class stand, in the split's order, drawn by ``seed``.

    Of two counts with one seed, the samples of the smaller are among those of the larger. Raises ``UserError``, naming
    the setting ``key``, for a class of which fewer than ``left`` others would remain.
    """
    if count < 1:
        raise UserError(f"{key} is {count}; take 1 or more of each class, or name a list.")
    if label.ndim != 1:
        raise UserError(f"{key} counts samples of one class each, but the labels of this benchmark name several.")
    counts = label.bincount(minlength=len(classes))
    if (most := int(counts.min()) - left) < count:
        raise UserError(
            f"{key}: {count} asks for more samples of the class {classes[int(counts.argmin())]!r} than the {most} that "
            f"can be taken; take at most {most}."
        )
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
    members = order[label[order].argsort(stable=True)].split(counts.tolist())
    return torch.cat([own[:count] for own in members]).sort().values


def listed(path: str | Path, files: Sequence[Path], *, key: str) -> Int[Tensor, "n"]:
    """Where the images that the file at ``path`` lists stand among ``files``, in the order of ``files``.

    Raises ``UserError``, naming the setting ``key`` or the line, for a list that cannot be read or is empty, and for an
    image that is not there, could be several, or was listed before.
    """
    called: dict[str, list[int]] = {}
    for number, file in enumerate(files):
        called.setdefault(file.name, []).append(number)
    lines: dict[int, int] = {}
    for line, name in read_list(path, key):
        parts = PurePosixPath(name.lstrip("/")).parts
        meant = [number for number in called.get(parts[-1], []) if files[number].parts[-len(parts) :] == parts]
        if not meant:
            raise UserError(
                f"{path}, line {line} names {name}, which is not among the training images; take the line out, or see "
                "that the image is there and not held out for validation."
            )
        if len(meant) > 1:
            raise UserError(
                f"{path}, line {line} names {name}, as {len(meant)} training images are called; write the folder of "
                "the one that is meant before it."
            )
        if (first := lines.setdefault(meant[0], line)) != line:
            raise UserError(f"{path}, line {line} names {name} again, as line {first} does; leave one out.")
    return torch.tensor(sorted(lines))


def read_list(path: str | Path, key: str) -> list[tuple[int, str]]:
    """Numbers and contents of the lines that are not empty. Raises ``UserError``, naming ``key``, if there are none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key}: the list {path} cannot be read ({error}); name a text file of one image a line."
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip(" \t\r/")]
    if not lines:
        raise UserError(f"{key}: the list {path} names no image; write one a line.")
    return lines


def check_each_class(label: Int[Tensor, "n"], classes: Sequence[str], said: str) -> None:
    """Raise ``UserError`` where a class has no sample; ``said`` begins the sentence."""
    absent = [name for name, count in zip(classes, label.bincount(minlength=len(classes)).tolist()) if not count]
    if absent:
        more = f", nor of {len(absent) - 1} others" if len(absent) > 1 else ""
        raise UserError(f"{said} no image of the class {absent[0]!r}{more}; each class needs one.")
