"""Integrated gradients: the gradient along the straight path from a baseline, times the way.

Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365. With a baseline x' that shows nothing:

    map = (x - x') * integral over a in [0, 1] of dy_k(x' + a (x - x')) / dx

which sums to y_k(x) - y_k(x'); by how much the quadrature misses that is the convergence gap. The paper sums over
equal steps; the Gauss-Legendre points, the default, need fewer of them where the path is smooth. The class is
chosen once, at x.

Baselines: a number, one number per channel, ``black``, ``white``, ``mean`` (the image's own mean colour),
``blurred`` (Sturmfels et al. 2020, https://distill.pub/2020/attribution-baselines), in Python also a tensor or a
function of the input. Texts: the path is that of the word embeddings, from a number (0), the ``pad`` or the ``mask``
embedding; special tokens stay as they are. Kim et al. use it on texts in https://arxiv.org/abs/2305.15734.

Batch norm in training mode: all points of the path use the statistics of the plain batch, held constant, so that
samples and points do not mix and running statistics move once; a loss on the map differentiates through them.
``statistics: differentiated`` is plain autograd, one step of the whole batch at a time. Dropout in training mode draws
anew at each point.

Cost: ``steps`` forward and backward passes and one forward pass. At most ``chunk`` points are in one pass (one step of
the batch at least), which bounds the memory of a constant map; a map with a graph keeps that of all steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, final, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target, Tokens
from hansfree.errors import UserError, unknown
from hansfree.explainers.propagation import (
    Statistics,
    at_least_float32,
    check_logits,
    check_statistics,
    propagate,
    resolve,
)
from hansfree.explainers.repetition import Passes, plain_precision
from hansfree.explainers.text import place_of

Quadrature = Literal["gauss-legendre", "midpoint", "trapezoid"]
Baseline = float | tuple[float, ...] | str | Tensor | Callable[[Tensor], Tensor]

_OF_IMAGES = ("black", "white", "mean", "blurred")
_OF_TEXTS = ("pad", "mask")


class _Path(NamedTuple):
    """What one call computes: the explanation, and what its convergence gap is made of."""

    explanation: Explanation
    chosen: Tensor
    baseline: Tensor
    passes: Passes


@final
@dataclass(frozen=True)
class IntegratedGradients(Explainer):
    """map = (x - x') * the mean gradient dy_k / dx on the way from a baseline x'; it sums to y_k(x) - y_k(x')."""

    baseline: Baseline = 0.0
    steps: int = 20
    quadrature: Quadrature = "gauss-legendre"
    chunk: int = 64
    statistics: Statistics = "constant"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)
        if self.quadrature not in get_args(Quadrature):
            raise unknown("quadrature", self.quadrature, get_args(Quadrature))
        if isinstance(self.baseline, str) and self.baseline not in (*_OF_IMAGES, *_OF_TEXTS):
            raise unknown("baseline", self.baseline, (*_OF_IMAGES, *_OF_TEXTS))
        if isinstance(self.baseline, Sequence) and not isinstance(self.baseline, str):
            object.__setattr__(self, "baseline", tuple(self.baseline))
        least = 2 if self.quadrature == "trapezoid" else 1
        if self.steps < least or self.chunk < 1:
            raise UserError(
                f"Integrated gradients with the {self.quadrature} rule need at least {least} steps and a chunk of at "
                f"least 1, but got steps {self.steps} and chunk {self.chunk}; the defaults are 20 and 64."
            )

    def __call__(
        self, model: nn.Module, input: Tensor | Tokens, target: Target, *, draws: Draws | None = None
    ) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for a bad target, or a baseline that does not fit."""
        return self._along(model, input, target).explanation

    def with_gap(
        self, model: nn.Module, input: Tensor | Tokens, target: Target
    ) -> tuple[Explanation, Float[Tensor, "b *k"]]:
        """The explanation, and its convergence gap map.sum() - (y_k(x) - y_k(x')), [b] or [b, k]: one pass more."""
        explanation, chosen, baseline, passes = self._along(model, input, target)
        with plain_precision(baseline.device):
            start = passes(baseline.clone())
            way = (explanation.logits - start).gather(1, chosen.view(len(chosen), -1)).view(chosen.shape)
            return explanation, explanation.map.flatten(chosen.ndim).sum(-1) - way

    def _along(self, model: nn.Module, input: Tensor | Tokens, target: Target) -> _Path:
        place = place_of(model, input)
        with plain_precision(place.input.device):
            x = at_least_float32(place.input)
            x = x.clone() if x.is_inference() else x
            baseline = self._baseline(model, x, input)
            passes = Passes(place.network, self.statistics)
            logits = passes.first(x)
            check_logits(logits, len(x))
            chosen = resolve(target, logits)
            gradient = self._mean_gradient(passes, baseline, x, chosen)
            way = x - baseline if chosen.ndim == 1 else (x - baseline).unsqueeze(1)
            return _Path(Explanation(logits, place.collect(way * gradient)), chosen, baseline, passes)

    def _mean_gradient(self, passes: Passes, start: Tensor, end: Tensor, chosen: Tensor) -> Tensor:
        """The quadrature's mean of the gradient on the way, [b, ...] or [b, k, ...]."""
        rule = quadrature_rule(self.quadrature, self.steps)
        places, weights = (torch.tensor(values, dtype=end.dtype, device=end.device) for values in rule)
        together = 1 if self.statistics == "differentiated" else max(self.chunk // max(len(end), 1), 1)
        mean = torch.zeros((), device=end.device)
        for a, weight in zip(places.split(together), weights.split(together)):
            points = torch.lerp(start, end, a.view(-1, *[1] * end.ndim)).flatten(0, 1)
            targets = chosen.repeat(len(a), *[1] * (chosen.ndim - 1))
            signal = propagate(passes, points, targets, statistics=self.statistics).signal
            mean = mean + torch.tensordot(weight, signal.unflatten(0, (len(a), len(end))), 1)
        return mean

    def _baseline(self, model: nn.Module, x: Tensor, input: Tensor | Tokens) -> Tensor:
        if isinstance(input, Tokens):
            return torch.where((input.word_ids >= 0)[..., None].to(x.device), self._of_words(model, x, input), x)
        if isinstance(self.baseline, str):
            return _of_images(self.baseline, x)
        if isinstance(self.baseline, tuple):
            if x.ndim < 2 or len(self.baseline) != x.shape[1]:
                raise UserError(
                    f"The baseline has {len(self.baseline)} numbers, but the input has shape {list(x.shape)}; "
                    "give one number, or one per channel."
                )
            return (
                torch.tensor(self.baseline, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2)).expand_as(x)
            )
        return _fitted(self.baseline, x)

    def _of_words(self, model: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        if self.baseline not in _OF_TEXTS:
            if isinstance(self.baseline, str | tuple):
                raise UserError(
                    f"The baseline {self.baseline!r} is for images; for texts give a number, 'pad' or 'mask'."
                )
            return _fitted(self.baseline, x)
        id = getattr(model, f"{self.baseline}_id", None)
        if id is None:
            raise UserError(
                f"{type(model).__name__} knows no {self.baseline} token (no {self.baseline}_id); use another baseline, "
                "such as 0."
            )
        return cast(nn.Module, model).embed(replace(tokens, ids=torch.full_like(tokens.ids, id)))  # pyright: ignore


def quadrature_rule(name: Quadrature, steps: int) -> tuple[list[float], list[float]]:
    """Points in [0, 1] and their weights, which sum to 1."""
    if name == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return ((1 + points) / 2).tolist(), (weights / 2).tolist()
    if name == "midpoint":
        return [(n + 0.5) / steps for n in range(steps)], [1 / steps] * steps
    weights = [1 / (steps - 1)] * steps
    weights[0] = weights[-1] = 0.5 / (steps - 1)
    return [n / (steps - 1) for n in range(steps)], weights


def _of_images(name: str, x: Tensor) -> Tensor:
    if name in ("black", "white"):
        return torch.full_like(x, float(name == "white"))
    if name in _OF_TEXTS or x.ndim != 4:
        raise UserError(
            f"The baseline {name!r} is for {'texts' if name in _OF_TEXTS else 'images [b, c, h, w]'}, but the input "
            f"is a tensor of shape {list(x.shape)}; give a number."
        )
    return x.mean((2, 3), keepdim=True).expand_as(x) if name == "mean" else blurred(x)


def _fitted(baseline: float | Tensor | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A number, tensor or function as a tensor of the input's shape."""
    if isinstance(baseline, int | float):
        return torch.full_like(x, baseline)
    value = baseline if isinstance(baseline, Tensor) else baseline(x)
    try:
        return value.to(x).expand_as(x)
    except RuntimeError as error:
        raise UserError(
            f"The baseline has shape {list(value.shape)}, which does not fit an input of shape {list(x.shape)}; "
            "give one value, one per channel [c, 1, 1], one image, or one image per sample."
        ) from error


def blurred(x: Float[Tensor, "b c h w"], sigma: float | None = None) -> Float[Tensor, "b c h w"]:
    """Images under a Gaussian of ``sigma`` pixels (None: an eighth of the shorter side), cut off at the edges."""
    sigma = min(x.shape[-2:]) / 8 if sigma is None else sigma
    for size, sum in ((x.shape[2], "ij,bcjw->bciw"), (x.shape[3], "ij,bchj->bchi")):
        at = torch.arange(size, dtype=x.dtype, device=x.device)
        kernel = (-0.5 * ((at[:, None] - at) / sigma).square()).softmax(1)
        x = torch.einsum(sum, kernel, x)
    return x
