"""Feature maps of several layers of any network from one forward pass: of convolutions, and of tokens on their grid."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Classifier
from hansfree.errors import UserError
from hansfree.explainers.layers import Looking, Watch
from hansfree.explainers.twin import Change, layer_named, twin

AUTOMATIC = "last feature map"
"""What the layer is called that is found by itself."""


@torch.no_grad()
def activations(model: nn.Module, layers: Sequence[str], images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
    """The output of each layer as a map [b, units, h, w]; of no layers, the last feature map, found by itself.

    Tokens of patches are folded to their grid, without class and register tokens. The model is not changed, nor is its
    mode. Raises ``UserError`` for a layer that is not there (with the nearest name), that the forward pass does not
    call, or whose output is no map.
    """
    if not layers:
        looking = Looking(model, None)
        looking(images)
        return {AUTOMATIC: looking.located.as_map(looking.located.activation).float()}
    size = model.size if isinstance(model, Classifier) and model.size else (images.shape[-2], images.shape[-1])
    found: dict[str, Tensor] = {}
    with Watch(len(images), size) as watch:
        twin(model, {layer_named(model, layer): _noted(layer, watch, found) for layer in layers})(images)
    for layer in layers:
        if layer not in found:
            raise UserError(f"The layer {layer!r} was not called in the forward pass, or is named twice; name another.")
    return {layer: found[layer] for layer in layers}


def _noted(layer: str, watch: Watch, found: dict[str, Tensor]) -> Change:
    def change(copy: nn.Module) -> None:
        forward: Callable[..., Any] = copy.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = forward(*args, **kwargs)
            first = given[0] if isinstance(given, tuple | list) else given
            if not isinstance(first, Tensor):
                raise UserError(f"The layer {layer!r} gives no tensor; name one whose output is a feature map.")
            try:
                located = watch.locate(first)
            except UserError as error:
                raise UserError(f"Layer {layer!r}: {error}") from None
            found[layer] = located.as_map(first).detach().float().clone()  # the next layer may work in place
            return given

        copy.__dict__["forward"] = watched

    return change
