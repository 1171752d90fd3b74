"""Another benchmark's images without the pixels that a model's maps put first, or last: what ROAR retrains on.

    image'_j = fill    where rank_j < k (top) or rank_j >= n - k (bottom),  k = round(fraction * n)
               image_j elsewhere

for the n elements j of an image: its pixels, or the values of its channels one by one. Ranks come from a folder that
:func:`hansfree.audits.roar.write_ranks` made, rank 0 the most relevant. Every split is masked, those of tests too, so
that what is measured is what a network can learn from the pixels that are left. The fill ``mean`` is the mean colour of
the training images before anything is masked.

Source. Hooker et al., A benchmark for interpretability methods in deep neural networks, 2019,
https://arxiv.org/abs/1806.10758 (ROAR); Shah, Jain & Netrapalli, Do input gradients highlight discriminative features?,
2021, https://arxiv.org/abs/2102.12781 (DiffROAR), whose code ranks channels apart and fills with one mean.

What the benchmark draws anew at each access is drawn once: the ranks are those of one image. Unbiased twins (``clean``)
are left out, since they would show what was masked.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.core import Batch, Benchmark, Split
from hansfree.errors import UserError
from hansfree.runs import read_json

End = Literal["top", "bottom"]
Fill = Literal["mean"] | float | tuple[float, ...]
ABOUT = "about.json"


def ranks_file(folder: Path | str, split: str) -> Path:
    """Where the ranks of a split lie: whole numbers [samples, 1 or c, h, w]."""
    return Path(folder) / f"{split}.npy"


def labels_digest(split: Split) -> str:
    """SHA-256 of a split's labels in their order, by which ranks know their data."""
    return hashlib.sha256(split.label.cpu().contiguous().numpy().tobytes()).hexdigest()


def masked(
    images: Float[Tensor, "b c h w"], ranks: Int[Tensor, "b k h w"], fraction: float, end: End, fill: Tensor
) -> Float[Tensor, "b c h w"]:
    """``images`` with ``fill`` in place of the elements at one end of the order; ``k`` is 1 (whole pixels) or c."""
    elements = ranks[0].numel()
    count = round(fraction * elements)
    gone = ranks < count if end == "top" else ranks >= elements - count
    return torch.where(gone, fill.to(images), images)


@final
@dataclass(frozen=True, eq=False)
class MaskedSplit(Split):
    """The images of a split without some of their pixels."""

    whole: Split
    ranks: np.ndarray
    fraction: float
    end: End
    fill: Tensor

    def __post_init__(self) -> None:
        for name in ("label", "bias", "tiers"):
            object.__setattr__(self, name, getattr(self.whole, name))

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, always the same."""
        batch = self.whole.batch(index)
        ranks = torch.from_numpy(self.ranks[index.numpy()].astype(np.int64))
        images = masked(batch.images, ranks, self.fraction, self.end, self.fill)
        return dataclasses.replace(batch, input=images, clean=None)


@final
class MaskedPixels(Benchmark):
    """Another benchmark without the pixels that a model's maps put first, or last.

    ``benchmark`` is that benchmark's own section, ``ranks`` a folder of ranks, ``fraction`` the share that is removed,
    ``end`` the ``top`` (the most relevant) or the ``bottom``, ``fill`` what stands in its place: ``mean``, a value in
    [0, 1], or one for each channel. Raises ``UserError`` where the ranks are of other data.
    """

    name: ClassVar[str] = "masked-pixels"

    def __init__(
        self, *, benchmark: Benchmark, ranks: str | Path, fraction: float, end: End = "top", fill: Fill = "mean"
    ) -> None:
        self.whole, self._folder = benchmark, Path(ranks)
        self.classes, self.biases, self.mask_names = benchmark.classes, benchmark.biases, benchmark.mask_names
        self.input, self.categories, self.gives = benchmark.input, benchmark.categories, benchmark.gives - {"clean"}
        self.shortcut, self.asks = benchmark.shortcut, benchmark.asks
        self._about = read_json(self._folder / ABOUT)
        check_fraction(fraction, int(np.prod(self._about["shape"])))
        self._removed: dict[str, Any] = {"fraction": fraction, "end": end, "fill": fill}
        self._colour = fill_colour(fill, self._about["mean"])

    def split(self, name: str) -> MaskedSplit:
        """That split of the benchmark, masked. Raises ``UserError`` where its ranks are missing or of other data."""
        whole, known = self.whole.split(name), self._about["labels"]
        if name not in known:
            raise UserError(f"{self._folder} has no ranks of the split {name}, only of {', '.join(known)}.")
        if known[name] != labels_digest(whole):
            raise UserError(
                f"{self._folder} has ranks of other data than this {name} split; name the folder of its own."
            )
        ranks = np.load(ranks_file(self._folder, name), mmap_mode="r")
        return MaskedSplit(whole, ranks, self._removed["fraction"], self._removed["end"], self._colour)

    def split_names(self) -> tuple[str, ...]:
        """The benchmark's, as far as they were ranked."""
        return tuple(name for name in self.whole.split_names() if name in self._about["labels"])

    def record(self) -> dict[str, Any]:
        """The benchmark's own record, what was removed, and whose order it was."""
        fill = self._removed["fill"]
        removed = {**self._removed, "fill": list(fill) if isinstance(fill, tuple) else fill}
        return {**self.whole.record(), "removed": {**removed, "ranks": self._about}}


def check_fraction(fraction: float, elements: int) -> None:
    """Raises ``UserError`` for a share of so many elements that is none or all of them."""
    if not 0 < round(fraction * elements) < elements:
        raise UserError(f"The fraction {fraction:g} of {elements} elements is none or all of them; give one between.")


def fill_colour(fill: Fill, mean: list[float]) -> Float[Tensor, "c 1 1"]:
    """The colour that ``fill`` means, for images of the ``mean`` colour. Raises ``UserError`` for one that is none."""
    colour = mean if fill == "mean" else [fill] * len(mean) if isinstance(fill, int | float) else list(fill)
    if len(colour) != len(mean) or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in colour):
        raise UserError(
            f"fill: {fill!r} is no colour of {len(mean)} channels; give mean, a number in [0, 1], or one for each."
        )
    return torch.tensor(colour, dtype=torch.float32).view(-1, 1, 1)
