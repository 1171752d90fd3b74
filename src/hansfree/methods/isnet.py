"""ISNet: background relevance minimisation with LRP, stochastic (Faster ISNet) or for all classes.

Formula. ``L = (1 - weight) * cross-entropy + weight * (background_weight * L1 + foreground_weight * L2)``. With R the
LRP map of one class, M the mask of the object (1 inside, 0 outside), and sums over pixels and channels:

- L1, the background loss, of ``R' = |R| / (sum(|R| M) / sum(M))``, relevance in units of its mean inside the object.
  Per channel, ``R' (1 - M)`` is pooled by global weighted rank pooling (the r-th largest of n values weighs decay^r /
  sum_s decay^s: 0 is the maximum, 1 the mean) to v, squashed to ``u = v / (v + squash)``, and ``-log(1 - u)`` is
  averaged over channels.
- L2, the foreground loss, of ``s = sum(|R| M)``: zero for C1 <= s <= C2 (``relevance_range``), ``(1 - s / C1)^2``
  below. Above it is ``((s - C2) / C1)^2``, and from C1 + C2 on, for ``above: hybrid``, ``1 + s - (C1 + C2)``.
  It keeps relevance from vanishing everywhere, which would be the easy way to an empty background.

``explains: one`` is the Stochastic ISNet: the highest logit half of the time, else one of the others; ``all`` is the
original: every class, averaged.

Source. Bassi, Dertkigil & Cavalli, Improving deep neural network generalization and robustness to background bias via
layer-wise relevance propagation optimization, Nature Communications 2024, https://doi.org/10.1038/s41467-023-44371-z
(both losses); Bassi, Decherchi & Cavalli, Faster ISNet for background bias mitigation on deep neural networks, 2024,
https://arxiv.org/abs/2401.08409 (LRP-Flex, the stochastic choice, ``above: hybrid``). Defaults are those of their
published MNIST script: weight 0.7 (there P), decay 0.9 (d), squash 1 (E), C1 = 1, C2 = 25, epsilon 0.01, both loss
weights 1 (w1, w2; the first version's code has w2 = 3). As a rival, Bassi, Cavalli & Decherchi, 2024,
https://arxiv.org/abs/2407.09788: ``explains: one``, weight 0.95, decay 0.96.

Deviations. The first layer follows the epsilon rule like all others, where their script uses LRP-z^B: relevance is
gradient times input there, so black background cannot be relevant. -log(1 - u) is computed as
log(1 + v / squash), its equal, without their bound on u. Soft masks count as object wherever they are above zero, as
their code treats masks that it resized. Batch norm in training mode is held constant inside the map
(``statistics: differentiated`` does as their code does). The logit's own relevance starts without the factor of the
last layer, as in LRP-Flex (``output_factor: true`` puts it in). Of the three faster variants the selective one (a
softmax-based quantity is explained) and LRP deep supervision (hidden layers) are left out. C1 and C2 are measured by
:func:`natural_range` on a plain classifier, not by a training of their own.

Supervision. Labels and masks, the first mask where there are several. The authors choose weight and decay
on unbiased validation images: ``selection: ood_val``.

Cost. Three to four ERM steps with one class; about two more for each further class with ``explains: all``.
"""

from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup, Split
from hansfree.errors import UserError
from hansfree.explainers import LRP
from hansfree.explainers.nodes import Statistics
from hansfree.methods.class_choice import TopOrOther
from hansfree.methods.rrr import object_mask

Above = Literal["hybrid", "l2"]
Explains = Literal["one", "all"]

TINY = 1e-10
"""Added to denominators, as in the published code."""


def background_loss(
    map: Float[Tensor, "b k c h w"], mask: Float[Tensor, "b 1 h w"], *, decay: float = 0.9, squash: float = 1.0
) -> Float[Tensor, "b"]:
    """L1 of the card, averaged over channels and classes; ``mask`` is 1 inside the object and 0 outside."""
    inside, size = mask.unsqueeze(1), map.abs()
    area = map.shape[2] * inside.sum((-3, -2, -1), keepdim=True)
    mean = (size * inside).sum((-3, -2, -1), keepdim=True) / (area + TINY)
    outside = (size / (mean + TINY) * (1 - inside)).flatten(-2)
    weights = decay ** torch.arange(outside.shape[-1], device=map.device, dtype=map.dtype)
    pooled = (outside.sort(descending=True).values * weights).sum(-1) / weights.sum()
    return torch.log1p(pooled / squash).mean((1, 2))


def foreground_loss(
    map: Float[Tensor, "b k c h w"],
    mask: Float[Tensor, "b 1 h w"],
    *,
    relevance_range: tuple[float, float] = (1.0, 25.0),
    above: Above = "hybrid",
) -> Float[Tensor, "b"]:
    """L2 of the card, averaged over classes; ``mask`` is 1 inside the object and 0 outside."""
    low, high = relevance_range
    total = (map.abs() * mask.unsqueeze(1)).sum((-3, -2, -1))
    missing, excess = (1 - total / low).clamp_min(0), ((total - high) / low).clamp_min(0)
    beyond = excess.square()
    if above == "hybrid":
        beyond = torch.where(excess > 1, 1 + (excess - 1) * low, beyond)
    return (missing.square() + beyond).mean(1)


@torch.no_grad()
def natural_range(
    model: nn.Module, split: Split, *, epsilon: float = 0.01, output_factor: bool = False, batch_size: int = 128
) -> tuple[float, float]:
    """C1 and C2 from a classifier that was trained without the heatmap loss, on ``split``.

    With m and s the mean and standard deviation over samples of sum |R|, averaged over all classes:
    C1 = max(m / 5, m - 3 s), C2 = min(25 C1, m + 3 s). Give them to the method as ``relevance_range``.
    """
    explainer = LRP(epsilon, output_factor=output_factor)
    device = next(model.parameters()).device
    model = model.eval()
    totals: list[Tensor] = []
    for index in torch.arange(len(split)).split(batch_size):
        images = split.batch(index).to(device).images
        totals.append(explainer(model, images, _every_class).map.abs().sum((-3, -2, -1)).mean(1))
    spread, mean = (value.item() for value in torch.std_mean(torch.cat(totals)))
    low = max(mean / 5, mean - 3 * spread)
    return low, min(25 * low, mean + 3 * spread)


def _every_class(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[1]).expand(len(logits), -1)


@final
class ISNet(Method):
    """LRP relevance outside of the object is minimised, and kept up inside."""

    needs = frozenset({"mask"})

    def __init__(
        self,
        setup: Setup,
        *,
        weight: float = 0.7,
        background_weight: float = 1.0,
        foreground_weight: float = 1.0,
        relevance_range: tuple[float, float] = (1.0, 25.0),
        decay: float = 0.9,
        squash: float = 1.0,
        above: Above = "hybrid",
        explains: Explains = "one",
        epsilon: float | tuple[float, float] = 0.01,
        output_factor: bool = False,
        statistics: Statistics = "constant",
    ) -> None:
        super().__init__(setup)
        for name, value, choices in (("above", above, Above), ("explains", explains, Explains)):
            if value not in get_args(choices):
                raise UserError(f"method.{name} must be {' or '.join(get_args(choices))}, not {value!r}.")
        if not 0 <= weight <= 1 or not 0 <= decay <= 1:
            raise UserError(f"method.weight and method.decay must lie in [0, 1], but they are {weight} and {decay}.")
        if not 0 < relevance_range[0] < relevance_range[1]:
            raise UserError(
                f"method.relevance_range must be two positive numbers, low then high, not {list(relevance_range)}; "
                "hansfree.methods.isnet.natural_range measures them."
            )
        if squash <= 0 or min(background_weight, foreground_weight) < 0:
            raise UserError(
                "method.squash must be above 0 and the two loss weights 0 or above, but squash, background_weight and "
                f"foreground_weight are {squash}, {background_weight} and {foreground_weight}."
            )
        self.weight, self.background_weight, self.foreground_weight = weight, background_weight, foreground_weight
        self.relevance_range, self.decay, self.squash = relevance_range, decay, squash
        self.above: Above = above
        self.explainer = LRP(epsilon, output_factor=output_factor, statistics=statistics)
        self.rule = TopOrOther(0.5) if explains == "one" else None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label", "background", "foreground"}``: cross-entropy, L1 and L2 of the card, weighted."""
        mask = (object_mask(batch, "isnet") > 0).float()
        logits, map = self._explained(batch)
        background = background_loss(map, mask, decay=self.decay, squash=self.squash).mean()
        foreground = foreground_loss(map, mask, relevance_range=self.relevance_range, above=self.above).mean()
        return {
            "label": (1 - self.weight) * F.cross_entropy(logits, batch.label),
            "background": self.weight * self.background_weight * background,
            "foreground": self.weight * self.foreground_weight * foreground,
        }

    def _explained(self, batch: Batch) -> tuple[Tensor, Float[Tensor, "b k c h w"]]:
        draws, rule = self.draws(self.explainer, batch), self.rule
        if rule is None:
            return self.explainer(self.student, batch.images, _every_class, draws=draws)
        coins = self.draws(rule, batch)
        logits, map = self.explainer(self.student, batch.images, lambda y: rule.choose(y, coins), draws=draws)
        return logits, map.unsqueeze(1)
