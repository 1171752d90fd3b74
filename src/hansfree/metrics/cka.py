"""Centred kernel alignment: how alike two layers represent the same samples, whatever their widths.

With K and L the linear kernels (Gram matrices) of two layers' activations of the same samples,

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

lies at 1 where one is a rotated and scaled copy of the other. HSIC has a biased estimate, by which narrow batches of
wide layers look alike, and an unbiased one, which can be summed over batches.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Float[Tensor, "m m"]


def gram(activations: Float[Tensor, "m *features"]) -> Kernel:
    """The linear kernel of a batch's activations, in float64."""
    flat = activations.flatten(1).double()
    return flat @ flat.T


def hsic(k: Kernel, l: Kernel) -> Float[Tensor, ""]:  # noqa: E741
    """The unbiased estimate of the dependence of two kernels' samples; 0 of fewer than four.

    Formula. [tr(K L) + (1'K 1)(1'L 1) / ((m - 1)(m - 2)) - 2 (1'K L 1) / (m - 2)] / (m (m - 3)), diagonals of K, L: 0
    Source. Song et al., 2012, https://jmlr.org/papers/v13/song12a.html, equation 5
    """
    m = len(k)
    if m < 4:
        return k.new_zeros(())
    there = 1 - torch.eye(m, dtype=k.dtype, device=k.device)
    k, l = k * there, l * there  # noqa: E741
    means = k.sum() * l.sum() / ((m - 1) * (m - 2))
    return ((k * l).sum() + means - 2 * (k.sum(0) * l.sum(0)).sum() / (m - 2)) / (m * (m - 3))


def linear_cka(first: Float[Tensor, "n *features"], second: Float[Tensor, "n *others"]) -> Float[Tensor, ""]:
    """How alike two layers represent the same samples, in [0, 1]; not a number where one says the same of all.

    Formula. |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of centred activations X [n, p], Y [n, q]
    Source. Kornblith et al., 2019, https://arxiv.org/abs/1905.00414, equation 4 with linear kernels
    """
    k, l = (gram(layer.flatten(1).double() - layer.flatten(1).double().mean(0)) for layer in (first, second))  # noqa: E741
    return (k * l).sum() / (k.norm() * l.norm())


@final
class MinibatchCKA:
    """CKA between all layers of two networks, from kernels that come batch by batch.

    Formula. sum_b HSIC_1(K_b, L_b) / sqrt(sum_b HSIC_1(K_b, K_b) sum_b HSIC_1(L_b, L_b)), HSIC_1: :func:`hsic`
    Source. Nguyen et al., 2021, https://arxiv.org/abs/2010.15327, equation 3

    No more than one batch's kernels are held. Being estimated without bias, a value may lie slightly below 0.
    """

    def __init__(self) -> None:
        self._across: Tensor | None = None
        self._within: tuple[Tensor, Tensor] | None = None

    def add(self, first: Sequence[Kernel], second: Sequence[Kernel]) -> None:
        """The kernels of every layer of either network for one batch, by :func:`gram`; of four samples at least."""
        across = torch.stack([torch.stack([hsic(k, other) for other in second]) for k in first])
        within = torch.stack([hsic(k, k) for k in first]), torch.stack([hsic(k, k) for k in second])
        if self._across is not None and self._within is not None:
            across = self._across + across
            within = self._within[0] + within[0], self._within[1] + within[1]
        self._across, self._within = across, within

    @property
    def value(self) -> Float[Tensor, "first second"]:
        """CKA of each layer of the first with each of the second; not a number where a layer says the same of all."""
        if self._across is None or self._within is None:
            raise ValueError("There is no CKA yet; add the kernels of a batch first.")
        return self._across / (self._within[0][:, None] * self._within[1]).sqrt()


def minibatch_cka(
    first: Float[Tensor, "n *features"], second: Float[Tensor, "n *others"], batch_size: int = 100
) -> Float[Tensor, ""]:
    """How alike two layers represent the same samples, estimated without bias in batches; at most about 1.

    Formula. sum_b HSIC_1(K_b, L_b) / sqrt(sum_b HSIC_1(K_b, K_b) sum_b HSIC_1(L_b, L_b)), K = X X', L = Y Y'
    Source. Nguyen et al., 2021, https://arxiv.org/abs/2010.15327, equation 3
    """
    found = MinibatchCKA()
    for x, y in zip(first.split(batch_size), second.split(batch_size), strict=True):
        found.add([gram(x)], [gram(y)])
    return found.value[0, 0]
