"""SmoothGrad: an explanation averaged over noisy copies of the input.

Smilkov et al. 2017, https://arxiv.org/abs/1706.03825. With any explainer's map M and n draws of Gaussian noise

    map = 1/n sum_i M(x + sigma z_i),   z_i ~ N(0, 1),   sigma = noise * (max(x) - min(x))

The range is that of each sample, as in the paper; noisy pixels are not clipped. ``form: square`` averages M^2
(Hooker et al. 2019, https://arxiv.org/abs/1806.10758); ``form: variance`` is the variance of M over the draws
(VarGrad, Adebayo et al. 2018, https://arxiv.org/abs/1810.03307). The paper takes 50 draws; the default is 20.

The noise comes from one integer per sample: teacher and student see the same, one sample's noise does not depend
on the others, and without draws it is the same in every call. Logits and class are those of the clean input.
Batch norm in training mode: each noisy copy of the batch uses its own statistics, as the wrapped explainer says, and
only the clean pass refreshes the running ones.

Cost: ``samples`` explanations and one forward pass; a map with a graph keeps that of all samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target, Tokens
from hansfree.errors import UserError, unknown
from hansfree.explainers.gradient import InputGradient
from hansfree.explainers.propagation import at_least_float32, check_logits, resolve
from hansfree.explainers.repetition import plain_precision, without_traces

Form = Literal["mean", "square", "variance"]

_SEED = "noise_seed"
_GRADIENT = InputGradient()


@final
@dataclass(frozen=True)
class SmoothGrad(Explainer):
    """map = the mean (or mean square, or variance) of another explainer's map over noisy copies of the input."""

    explainer: Explainer = _GRADIENT
    samples: int = 20
    noise: float = 0.15
    form: Form = "mean"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise unknown("form", self.form, get_args(Form))
        if isinstance(self.explainer, SmoothGrad):
            raise UserError("SmoothGrad of SmoothGrad adds noise to noise; raise `noise` or `samples` instead.")
        least = 2 if self.form == "variance" else 1
        if self.samples < least or not self.noise > 0:
            raise UserError(
                f"SmoothGrad of the form {self.form!r} needs at least {least} samples and a noise above 0, but got "
                f"samples {self.samples} and noise {self.noise}; the defaults are 20 and 0.15."
            )

    def draw(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One seed per sample, and the draws of the wrapped explainer."""
        seeds = torch.randint(2**62, (count,), generator=generator)
        return {_SEED: seeds, **self.explainer.draw(count, generator)}

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for texts, bad targets, and as the wrapped one does."""
        if isinstance(input, Tokens):
            raise UserError("SmoothGrad adds noise to pixels, but the input is texts; use integrated-gradients.")
        with plain_precision(input.device):
            x = at_least_float32(input)
            x = x.clone() if x.is_inference() else x
            seeds = self._seeds(draws, len(x))
            logits = model(x.clone())  # a network may change its input in place
            check_logits(logits, len(x))
            chosen = resolve(target, logits)
            quiet = without_traces(model)
            inner = None if draws is None else {name: values for name, values in draws.items() if name != _SEED}
            noisy = (x + noise for noise in self._noise(x, seeds))
            maps = (self.explainer(quiet, each, chosen, draws=inner).map for each in noisy)
            return Explanation(logits, _moment(maps, self.form))

    def _seeds(self, draws: Draws | None, count: int) -> list[int]:
        if draws is None:
            return [0] * count
        if _SEED not in draws or draws[_SEED].shape != (count,):
            raise UserError(
                f"SmoothGrad needs draws[{_SEED!r}] of shape [{count}]; make the draws with this explainer's draw(), "
                "or pass none."
            )
        return draws[_SEED].tolist()

    def _noise(self, x: Tensor, seeds: list[int]) -> Iterator[Tensor]:
        """Noise of the input's shape, ``samples`` times."""
        values = x.flatten(1)
        sigma = self.noise * (values.amax(1) - values.amin(1)).view(-1, *[1] * (x.ndim - 1))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(self.samples):
            z = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generators])
            yield sigma * z.to(x)


def _moment(maps: Iterator[Float[Tensor, "b *shape"]], form: Form) -> Tensor:
    """Mean, mean square or variance, one map at a time; the variance by Welford's update, which does not cancel."""
    mean, spread, count = next(maps), torch.zeros(()), 1
    mean = mean.square() if form == "square" else mean
    for map in maps:
        count += 1
        step = (map.square() if form == "square" else map) - mean
        mean = mean + step / count
        if form == "variance":
            spread = spread + step.square() * ((count - 1) / count)
    return spread / count if form == "variance" else mean
