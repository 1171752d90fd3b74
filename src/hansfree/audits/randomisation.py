"""Does a map depend on what the network has learnt? Sanity checks by weights that are shuffled, layer by layer.

    cascading      the last layer is randomised, then the last two, ... down to the first
    independent    one layer alone, all others as they were trained

The same class is explained each time, and its map compared with that of the trained network. Where maps stay alike
although layers are random, they show the image and not what the network makes of it.

Source. Adebayo et al., Sanity checks for saliency maps, 2018, https://arxiv.org/abs/1810.03292, section 3. Measures are
theirs: Spearman's rank correlation of maps and of their sizes, and SSIM.

Deviation. A layer's weights are shuffled among each other instead of drawn anew, so that they keep their scale: a
network whose normalisation layers were trained with other weights would else overflow or die, and its maps would change
for that reason. What has no weights of two dimensions or more (normalisation, mostly) belongs to the layer before it.
Running statistics stay. Of deep networks, ``most`` evenly chosen depths are looked at.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hansfree.core import Draws, Explainer
from hansfree.errors import UserError
from hansfree.metrics.explanation_agreement import WINDOW, Maps, at_size, pixels, rank_correlation, ssim

Way = Literal["cascading", "independent"]
WAYS: tuple[Way, ...] = ("cascading", "independent")
MOST = 8
"""Depths that are looked at by default."""
NONE = "none"
"""In place of a layer's name: the model as it is."""


def layers_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the modules of each layer, by its own name, from the first layer to the last, as the model lists them.

    Raises ``UserError`` where nothing has weights.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim > 1 for parameter in own):
            found[name] = [name]
        elif own and found:
            next(reversed(found.values())).append(name)
    if not found:
        raise UserError(f"{type(model).__name__} has no layer with weights that could be randomised.")
    return {name: tuple(modules) for name, modules in found.items()}


def randomised(model: nn.Module, modules: Iterable[str], seed: int = 0) -> nn.Module:
    """A copy of ``model`` in which the weights of each of ``modules`` are shuffled, every tensor within itself."""
    other = copy.deepcopy(model)
    for name in modules:
        generator = torch.Generator().manual_seed(seed)
        for parameter in other.get_submodule(name).parameters(recurse=False):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.data = parameter.data.flatten()[order].view_as(parameter)
    return other


def depths(model: nn.Module, way: Way, most: int = MOST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """At most ``most`` layers, from the last to the first, and the modules that are random when their turn has come.

    The network's wrapper is left out of the layers' names.
    """
    layers = list(reversed(layers_of(model).items()))
    count = min(most, len(layers))
    for turn in range(count):
        at = round(turn * (len(layers) - 1) / max(count - 1, 1))
        name, own = layers[at]
        above = tuple(module for _, modules in layers[: at + 1] for module in modules)
        yield name.removeprefix("network."), above if way == "cascading" else own


@torch.no_grad()
def map_changes(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    target: Int[Tensor, "b"],
    explainer: Explainer,
    draws: Draws,
    way: Way,
    *,
    most: int = MOST,
    seed: int = 0,
) -> Iterator[tuple[str, Maps, dict[str, Tensor]]]:
    """At each depth the layer, the maps [b, h, w], and how alike they are to the model's own, by measure, [b].

    First come the model's own maps, where the layer is ``none``. The model is left as it is, and expected in eval mode.
    Measures are those of :func:`likeness`.
    """
    size = (images.shape[-2], images.shape[-1])

    def maps(network: nn.Module) -> Tensor:
        return pixels(at_size(explainer(network, images, target, draws=draws).map, size).cpu())

    own = maps(model)
    yield NONE, own, likeness(own, own)
    for layer, modules in depths(model, way, most):
        map = maps(randomised(model, modules, seed))
        yield layer, map, likeness(own, map)


def likeness(map: Maps, other: Maps) -> dict[str, Tensor]:
    """How alike the maps of a network and of its randomised copy are, one number a sample by measure.

    ``randomisation_rank_correlation``, ``randomisation_rank_correlation_absolute`` (of sizes) and, for maps of at least
    11 x 11 pixels, ``randomisation_ssim``.
    """
    found = {
        "randomisation_rank_correlation": rank_correlation(map, other),
        "randomisation_rank_correlation_absolute": rank_correlation(map.abs(), other.abs()),
    }
    if min(map.shape[-2:]) >= WINDOW:
        found["randomisation_ssim"] = ssim(map, other)
    return found
