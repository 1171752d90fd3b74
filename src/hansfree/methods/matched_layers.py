"""Layers of teacher and student that are matched: found by themselves or named, and watched without hooks.

The automatic choice is the last feature map of each of the four smallest resolutions of more than one pixel: the
stages of a ResNet or ConvNeXt, the levels of a plain CNN, and of a vision transformer its last tokens, folded to the
grid of their patches. A map inside a block that itself changes the resolution is not the end of a stage.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from hansfree.core import Classifier, InputSpec
from hansfree.errors import UserError
from hansfree.explainers.twin import layer_named, plain, twin

Layout = Literal["nchw", "nhwc", "tokens"]

MOST_STAGES = 4
"""A ResNet's stages without its stem."""
_PREFIX_TOKENS = 5
"""A class token and four registers."""


@final
@dataclass(frozen=True)
class FeatureLayer:
    """A layer whose output is a feature map, and how to read it."""

    path: str
    layout: Layout
    channels: int
    size: tuple[int, int]
    """Height and width on images of the benchmark's size."""

    def as_map(self, output: Tensor) -> Tensor:
        """[b, c, h, w] from the layer's output."""
        if self.layout == "nchw":
            return output
        if self.layout == "nhwc":
            return output.movedim(-1, 1)
        return output[:, -math.prod(self.size) :].unflatten(1, self.size).movedim(-1, 1)


class Seen(NamedTuple):
    """What one forward pass shows."""

    logits: Tensor
    maps: tuple[Tensor, ...]
    """Of the watched layers, [b, c, h, w] each."""
    embedding: Tensor | None
    """What goes into the last layer, [b, d], where that was asked for."""

    def constant(self) -> "Seen":
        """The same without its graph, which an explainer of a teacher has used up."""
        embedding = None if self.embedding is None else self.embedding.detach()
        return Seen(self.logits.detach(), tuple(map.detach() for map in self.maps), embedding)


@final
class Watched:
    """A twin of a model that shows, of its first forward pass, what ``layers`` give and what ``last`` is given.

    Whatever runs the twin (an explainer, say) needs to know nothing of it, so that one pass serves several losses.
    A layer that works in place on such a map afterwards changes what is shown.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FeatureLayer] = (), last: nn.Module | None = None) -> None:
        self._layers = tuple(layers)
        self._outputs: dict[nn.Module, Tensor] = {}
        self._embedding: list[Tensor] = []
        changes = {layer_named(model, layer.path): self._note_output for layer in layers}
        if last is not None:
            changes[last] = self._note_input
        self._watching = {layer.path: layer_named(model, layer.path) for layer in layers}
        self.model = twin(model, {layer: _noting(layer, note) for layer, note in changes.items()})

    def _note_output(self, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        self._outputs.setdefault(layer, output)

    def _note_input(self, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        if not self._embedding:
            self._embedding.append(given.flatten(2).mean(2) if given.ndim == 4 else given)

    def seen(self, logits: Tensor) -> Seen:
        """What the first pass showed, beside its logits."""
        maps = tuple(layer.as_map(self._outputs[self._watching[layer.path]]) for layer in self._layers)
        return Seen(logits, maps, self._embedding[0] if self._embedding else None)


def _noting(layer: nn.Module, note: Callable[[nn.Module, Tensor, Tensor], None]) -> Callable[[nn.Module], None]:
    """Makes a copy of ``layer`` one of a kind that also tells ``note`` what it is given and gives.

    A kind rather than a function, so that a copy of the copy runs on buffers of its own.
    """
    kind = type(layer)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **kwargs)
        note(layer, args[0], output)
        return output

    def change(copy: nn.Module) -> None:
        copy.__class__ = type(kind.__name__, (kind,), {"forward": forward})

    return change


def find_layers(model: nn.Module, input: InputSpec, named: Sequence[str] | None = None) -> tuple[FeatureLayer, ...]:
    """The layers at the paths ``named``, or the ends of the model's stages, from the first to the last.

    Raises ``UserError`` for a path without a layer, a layer without a feature map, and a model without any.
    """
    outputs = _outputs(model, input)
    ratio = _size(model, input)
    read = {layer: _read(output, ratio) for layer, output in outputs.items()}
    paths = {layer: path for path, layer in plain(model).named_modules()}
    if named is not None:
        return tuple(_named(layer_named(model, path), path, read, outputs) for path in named)
    scoring = _scoring_layers(model)
    known = {paths[layer]: found for layer, found in read.items() if found is not None and layer not in scoring}
    found = _stage_ends({path: FeatureLayer(path, *how) for path, how in known.items()}, dict(model.named_modules()))
    if not found:
        raise UserError(
            f"No layer of this {_kind(model)} gives a feature map of more than one pixel on images of "
            f"{input.height} x {input.width}; name the layers in the method's section, or use `stem: small`."
        )
    return found


_Reading = tuple[Layout, int, tuple[int, int]]


def _named(
    layer: nn.Module,
    path: str,
    read: Mapping[nn.Module, _Reading | None],
    outputs: Mapping[nn.Module, Tensor | None],
) -> FeatureLayer:
    reading = read.get(layer)
    if reading is not None:
        return FeatureLayer(path, *reading)
    output = outputs.get(layer)
    gives = "no tensor, or is called more often than once" if output is None else f"shape {list(output.shape)}"
    raise UserError(f"The layer {path!r} gives {gives}, not one feature map; name another layer, such as a block.")


def _outputs(model: nn.Module, input: InputSpec) -> dict[nn.Module, Tensor | None]:
    """What each layer gives in a forward pass, in the order in which they finish; None: no tensor, or several calls."""
    outputs: dict[nn.Module, Tensor | None] = {}

    def watched(layer: nn.Module) -> Callable[[nn.Module], None]:
        def change(copy: nn.Module) -> None:
            forward = copy.forward

            def noting(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                outputs[layer] = output if isinstance(output, Tensor) and layer not in outputs else None
                return output

            copy.__dict__.update(forward=noting, training=False)

        return change

    model = plain(model)
    probe = twin(model, {layer: watched(layer) for layer in model.modules()})
    images = torch.full((2, input.channels, input.height, input.width), 0.5)
    with torch.no_grad():
        probe(images.to(next(model.parameters(), images)))
    return outputs


def _read(output: Tensor | None, size: tuple[int, int]) -> _Reading | None:
    """How an output is a map of an image of ``size``: layout, channels and its own size."""
    if output is None or len(output) != 2 or not output.is_floating_point():
        return None
    shape, ratio = output.shape, size[0] / size[1]
    if output.ndim == 4:
        layouts: tuple[_Reading, ...] = (
            ("nchw", shape[1], (shape[2], shape[3])),
            ("nhwc", shape[3], (shape[1], shape[2])),
        )
        for layout, channels, (height, width) in layouts:
            if height * width > 1 and abs(height - width * ratio) < 1:
                return layout, channels, (height, width)
    if output.ndim == 3:
        for patches in range(shape[1], max(1, shape[1] - _PREFIX_TOKENS - 1), -1):
            height = max(1, round(math.sqrt(patches * ratio)))
            if height * round(height / ratio) == patches:
                return "tokens", shape[2], (height, round(height / ratio))
    return None


def _size(model: nn.Module, input: InputSpec) -> tuple[int, int]:
    """Of the images that the network itself sees."""
    size = model.size if isinstance(model, Classifier) else None
    return size or (input.height, input.width)


def _stage_ends(layers: Mapping[str, FeatureLayer], modules: Mapping[str, nn.Module]) -> tuple[FeatureLayer, ...]:
    last: dict[tuple[int, int], FeatureLayer] = {}
    for path, layer in layers.items():
        if not _is_inside_a_change(path, layers, modules):
            last.pop(layer.size, None)
            last[layer.size] = layer
    ends: list[FeatureLayer] = []
    for layer in reversed(last.values()):
        if not ends or math.prod(layer.size) > math.prod(ends[-1].size):
            ends.append(layer)
    return tuple(reversed(ends[:MOST_STAGES]))


def _is_inside_a_change(path: str, layers: Mapping[str, FeatureLayer], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a block around it leads from its resolution to one other: what it gives can then be bypassed."""
    parts = path.split(".")
    for around in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        if around in layers and layers[around].size != layers[path].size and type(modules[around]) is not nn.Sequential:
            inside = {layer.size for name, layer in layers.items() if name.startswith(f"{around}.")}
            if len(inside | {layers[around].size}) <= 2:
                return True
    return False


def _scoring_layers(model: nn.Module) -> set[nn.Module]:
    """The last layer and its parts: in a few families it is a convolution, whose maps are of classes."""
    if isinstance(model, Classifier) and hasattr(model.network, "get_classifier"):
        return set(model.get_classifier().modules())
    return set()


def _kind(model: nn.Module) -> str:
    return type(model.network if isinstance(model, Classifier) else model).__name__
