"""Explainers of hansfree where Captum's or Quantus' are expected. Neither package needs to be installed for this.

Captum (Kokhlikyan et al. 2020, https://arxiv.org/abs/2009.07896) asks for an object with ``attribute``; Quantus
(Hedström et al. 2023, https://arxiv.org/abs/2202.06861) for a function of model, inputs and targets in NumPy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Target
from hansfree.errors import UserError

CaptumTarget = int | tuple[int] | Tensor | Sequence[int] | Sequence[tuple[int]] | None


def _with_original(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` wrapped once: captum.attr.NoiseTunnel calls ``attribute.__wrapped__``, past Captum's usage log."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


@final
class CaptumAttribution:
    """An explainer and a model with the shape of a ``captum.attr.Attribution``.

    ``attribute(inputs, target)`` gives the map: of the inputs' shape for explainers of the input, of the layer's
    shape for others (``captum.attr.LayerAttribution.interpolate`` brings these to the inputs' size). As everywhere
    in hansfree, with grad mode on it keeps its graph down to the weights, which Captum's own do not; under
    ``torch.no_grad()`` it is a constant. It can be wrapped by ``captum.attr.NoiseTunnel`` and judged by
    ``captum.metrics``.
    """

    def __init__(self, explainer: Explainer, model: nn.Module) -> None:
        self.explainer = explainer
        self.model = model

    @property
    def forward_func(self) -> nn.Module:
        """The model, by Captum's name."""
        return self.model

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the map is a share of the output for each input, rather than a sensitivity; not known: False."""
        return False

    def has_convergence_delta(self) -> bool:
        """False: ``attribute`` returns the map alone."""
        return False

    @_with_original
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: CaptumTarget = None,
        additional_forward_args: None = None,
        *,
        draws: Draws | None = None,
    ) -> Any:
        """The map of ``inputs`` for ``target``: a tensor for a tensor, a tuple of one for a tuple of one.

        ``target`` is what Captum takes for logits [b, classes]: a number (or a tensor or tuple of one number) for
        all samples, a tensor or list with one for each, or None for a model with one output. ``draws`` go to the
        explainer. Raises ``UserError`` for several inputs, further arguments of the forward pass, and other targets.
        """
        if additional_forward_args is not None:
            raise UserError(
                "hansfree explains models of one input, but additional_forward_args were given; "
                "wrap the model in one that fixes them."
            )
        if isinstance(inputs, tuple):
            if len(inputs) != 1:
                raise UserError(f"hansfree explains models of one input, but {len(inputs)} were given; wrap the model.")
            return (self.attribute(inputs[0], target, draws=draws),)
        return self.explainer(self.model, inputs, captum_target(target, inputs), draws=draws).map


def captum_target(target: CaptumTarget, inputs: Tensor) -> Target:
    """Captum's ways to name a class of logits [b, classes], as one number per sample. Raises ``UserError``."""
    if target is None:
        return _only_class
    samples = len(inputs)
    if isinstance(target, Tensor):
        numbers = target
    else:
        plain = target if isinstance(target, list) else [target]
        numbers = torch.tensor([item[0] if isinstance(item, tuple) and len(item) == 1 else item for item in plain])
    one_for_all = numbers.numel() == 1 and (not isinstance(target, list) or samples == 1)
    if numbers.is_floating_point() or not (one_for_all or numbers.shape == (samples,)):
        raise UserError(
            f"The target must be one class, or one for each of the {samples} samples, but it is {target!r}; "
            "models whose outputs have further dimensions are not explained."
        )
    return numbers.to(inputs.device).reshape(-1).expand(samples)


def _only_class(logits: Tensor) -> Tensor:
    if logits.shape[1] != 1:
        raise UserError(f"The model has {logits.shape[1]} outputs, so a target must say which one to explain.")
    return torch.zeros(len(logits), dtype=torch.long, device=logits.device)


def quantus_explain_func(explainer: Explainer) -> Callable[..., np.ndarray]:
    """``explainer`` as an ``explain_func`` for Quantus' metrics: NumPy arrays in, NumPy arrays out.

    Maps of the inputs' shape stay as they are; maps of a layer are summed over their channels and interpolated
    bilinearly to the inputs' height and width, [b, 1, h, w], as Quantus asks. The function keeps no graph and leaves
    the model in the mode it is in: put it in evaluation mode first. Quantus passes ``device`` and ``method`` on;
    any other keyword is a ``TypeError``, because an explainer's settings are its fields.
    """

    def explain_func(
        model: nn.Module,
        inputs: np.ndarray,
        targets: np.ndarray,
        *,
        device: str | torch.device | None = None,
        method: str | None = None,
    ) -> np.ndarray:
        place = next((tensor for tensor in (*model.parameters(), *model.buffers())), torch.empty(0))
        input = torch.as_tensor(inputs, device=device or place.device, dtype=place.dtype)
        target = torch.as_tensor(targets, device=input.device).long().reshape(-1)
        with torch.no_grad():
            map = explainer(model, input, target).map
            if map.shape != input.shape:
                map = F.interpolate(map.sum(1, keepdim=True), input.shape[2:], mode="bilinear", align_corners=False)
        return map.cpu().numpy()

    return explain_func
