"""Finding a network's feature map while it runs: on CNNs, on networks of tokens, or at a layer by name.

The automatic choice is the last feature map of more than one pixel: for a CNN what goes into the global pooling
(of a bare network that pools maps of class scores, the last of those), for a network that pools by attention the map or
tokens that go into the pooling, and for a vision transformer the normed tokens that go into its last attention
block, the last place where tokens of patches reach the class token. It is found from the functions that the
forward pass calls, so that what a module of one's own does with ``torch.nn.functional`` counts as well. Prefix
tokens (class, registers) are dropped and the others folded to the grid of the patches.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from hansfree.core import Classifier
from hansfree.errors import UserError
from hansfree.explainers.twin import Recording, plain

MapLayout = Literal["nchw", "nhwc"]


@final
@dataclass(frozen=True)
class Located:
    """An activation and how to read it as a feature map."""

    activation: Tensor
    layout: MapLayout | Literal["tokens"] = "nchw"
    grid: tuple[int, int] = (0, 0)
    """Of the patches, in tokens; what comes before them are class and register tokens."""
    tokens_first: bool = False
    """Whether tokens have shape [n, b, c] rather than [b, n, c]."""

    def as_map(self, values: Tensor) -> Tensor:
        """[b, c, h, w] (or [b, k, c, h, w]) from values of the activation's shape (or with k at dimension 1)."""
        if self.layout == "nchw":
            return values
        if self.layout == "nhwc":
            return values.movedim(-1, -3)
        if self.tokens_first:
            values = values.transpose(0, 1) if values.ndim == 3 else values.permute(2, 1, 0, 3)
        return values[..., -math.prod(self.grid) :, :].unflatten(-2, self.grid).movedim(-1, -3)

    def check_read(self, signal: Tensor) -> None:
        """Raise ``UserError`` where logits depend on the class token of this layer alone, so that maps are zero."""
        if self.layout == "tokens" and signal.any() and not self.as_map(signal).any():
            raise UserError(
                "The logits depend on nothing but the class token of this layer, so its patches have no part in them; "
                "name an earlier layer (the norm before the last attention is usual), or leave `layer` out."
            )


@final
class Watch(TorchFunctionMode):
    """Follows feature maps and tokens through one forward pass. It changes nothing of what is computed."""

    def __init__(self, samples: int, size: tuple[int, int]) -> None:
        super().__init__()
        self._samples, self._size = samples, size
        self._layouts = WeakTensorKeyDictionary()
        self._last: Located | None = None
        self._normed: Tensor | None = None
        self._attended: Tensor | None = None
        self._blind = 0
        """How often attention was paid, since the last map, to something that is not known to be tokens."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and look at what it gives."""
        if func in _POOLS and args and args[0].ndim == 4 and self._last is not None:
            self._see_map(args[0], self._layout(args[0]))  # however it was put together
        given = func(*args, **kwargs or {})
        if func in _ATTENTION or (func in _SOFTMAX and given.ndim > 2):
            self._see_attention()
        elif func in _NORMS and self._are_tokens(given):
            self._normed = given
        else:
            for part in _tensors((given,)):
                if part.ndim == 4:
                    self._see_map(part, self._layout_of(func, args, kwargs or {}, part), func not in _RESIZED)
        return given

    def _see_attention(self) -> None:
        if self._normed is None:
            self._blind += self._attended is None
        else:
            self._attended = self._normed

    def _see_map(self, given: Tensor, layout: MapLayout | None, chosen: bool = True) -> None:
        if layout is None:
            self._layouts.pop(given, None)
            return
        self._layouts[given] = layout
        if (
            chosen
            and len(given) == self._samples
            and math.prod(_pixels(given, layout)) > 1
            and given.is_floating_point()
        ):
            self._last = Located(given, layout, _pixels(given, layout))
            self._normed, self._attended, self._blind = None, None, 0

    def _layout_of(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Tensor
    ) -> MapLayout | None:
        """How a function's four-dimensional result is laid out; None where it may be anything (heads, windows ...)."""
        if func in _CONVOLUTIONS:
            return "nchw"
        followed = next((t for t in _tensors((*args, *kwargs.values())) if t in self._layouts), None)
        if followed is None:
            return "nhwc" if func in _NORMS and self._has_aspect(given.shape[1], given.shape[2]) else None
        name, layout = getattr(func, "__name__", ""), self._layouts[followed]
        if name == "permute":
            dims = kwargs.get("dims", args[1:])
            dims = dims[0] if isinstance(dims[0], tuple | list) else dims
            return _PERMUTED.get((layout, tuple(d % 4 for d in dims)))
        if name in _RESHAPES:
            return layout if given.shape == followed.shape else None
        if name in _MIXES or (name == "detach" and followed.requires_grad):
            return None
        return layout

    def _has_aspect(self, height: int, width: int) -> bool:
        """Whether this can be a map of the image; [b, heads, n, c], which some networks norm as well, is not."""
        return abs(height - width * self._size[0] / self._size[1]) < 1

    def _are_tokens(self, given: Any) -> bool:
        if not isinstance(given, Tensor) or given.ndim != 3 or self._samples not in given.shape[:2]:
            return False
        return given.shape[len(given) == self._samples] > 1

    def found(self) -> Located:
        """The feature map that the forward pass ended with. Raises ``UserError`` where there is none."""
        tokens = self._normed if self._attended is None and not self._blind else self._attended
        if tokens is not None:
            return self.locate(tokens)
        if self._last is None or self._blind > 1:
            raise UserError(
                "The forward pass shows no feature map (no convolution, and no attention to normed tokens); name a "
                "layer whose output is one with `layer`, or use an explainer of the input such as gradient-x-input."
            )
        return self._last

    def locate(self, activation: Tensor) -> Located:
        """How to read an activation. Raises ``UserError`` where it is neither a map nor tokens of known patches."""
        shape = list(activation.shape)
        if self._are_tokens(activation):
            first = shape[0] != self._samples
            return Located(activation, "tokens", self._grid(shape[0] if first else shape[1]), first)
        if len(shape) != 4 or shape[0] != self._samples:
            raise UserError(
                f"The layer gives shape {shape}, which is no feature map ([b, c, h, w], or tokens [b, n, c]); name "
                "another layer, or use an explainer of the input such as gradient-x-input."
            )
        return Located(activation, self._layout(activation))

    def _layout(self, map: Tensor) -> MapLayout:
        return self._layouts.get(map) or "nchw"

    def _grid(self, tokens: int) -> tuple[int, int]:
        if self._last is not None and math.prod(self._last.grid) <= tokens:
            return self._last.grid
        for ratio in (self._size[0] / self._size[1], 1.0):  # patches were merged, or no convolution made them
            for patches in (tokens, tokens - 1):
                height = round(math.sqrt(patches * ratio))
                if height and height * round(height / ratio) == patches:
                    return height, round(height / ratio)
        raise UserError(
            f"How {tokens} tokens lie in the image cannot be known: neither the grid of the patch embedding nor the "
            "shape of the image fits; name another layer."
        )


_CONVOLUTIONS = {F.conv2d, F.conv_transpose2d}
_RESIZED = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
"""Global pooling, or what makes a map of the size that a linear layer expects: the map before is the sharper one."""
_POOLS = {F.avg_pool2d, F.max_pool2d, *_RESIZED}
_NORMS = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_ATTENTION = {
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,  # pyright: ignore[reportPrivateImportUsage]
    torch._transformer_encoder_layer_fwd,  # pyright: ignore[reportPrivateImportUsage]
}
_PERMUTED: dict[tuple[MapLayout, tuple[int, ...]], MapLayout] = {
    ("nchw", (0, 2, 3, 1)): "nhwc",
    ("nhwc", (0, 3, 1, 2)): "nchw",
}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
_MIXES = {
    *("transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "unbind", "unfold", "stack"),
    *("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "tensordot", "softmax"),
}


def _pixels(map: Tensor, layout: MapLayout) -> tuple[int, int]:
    height, width = map.shape[1:3] if layout == "nhwc" else map.shape[2:]
    return height, width


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


@final
class Looking(nn.Module):
    """A model whose forward pass also finds its feature map: the automatic choice, or what ``layer`` gives.

    With ``constant``, nobody will ask for gradients of what comes before the map; where the map's place is known
    beforehand, that part runs without a graph.
    """

    def __init__(self, model: nn.Module, layer: str | None, *, constant: bool = False) -> None:
        super().__init__()
        self.model, self.training = plain(model), model.training
        self._layer, self._constant = layer, constant
        self._located: Located | None = None

    @property
    def located(self) -> Located:
        """What the last forward pass found."""
        assert self._located is not None
        return self._located

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits."""
        if self._layer is not None:
            return self._at_layer(self._layer, x)
        if _scores_maps(self.model):
            model: Any = self.model
            with self._watch(x) as watch:
                features = model.forward_features(x)
                logits = model.forward_head(features)
            self._located = watch.locate(features)
            return logits
        if self._constant and not self.training and _pools_maps(self.model):
            with self._watch(x) as watch:
                logits = _from_features(self.model, x)
            self._located = None if logits is None else watch.found()
            if logits is not None and self.located.activation.requires_grad:
                return logits
        with self._watch(x) as watch:
            logits = self.model(x)
        self._located = watch.found()
        return logits

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the feature map [b, c, h, w]; the one that ``forward_features`` gives, where it exists."""
        if self._layer is not None or not shows_features(self.model):
            logits = self(x)
            return logits, self.located.as_map(self.located.activation)
        model: Any = self.model
        with self._watch(x) as watch:
            features = model.forward_features(x)
        return model.forward_head(features), watch.locate(features).as_map(features)

    def _at_layer(self, layer: str, x: Tensor) -> Tensor:
        with self._watch(x) as watch:

            def note(output: Tensor) -> None:
                self._located = watch.locate(output)

            recording = Recording(self.model, layer, leaf=self._constant, seen=note)
            logits = recording(x)
        recording.check()
        return logits

    def _watch(self, x: Tensor) -> Watch:
        size = self.model.size if isinstance(self.model, Classifier) else None
        height, width = size or (x.shape[-2:] if x.ndim == 4 else (1, 1))
        return Watch(len(x), (height, width))


def _from_features(model: Any, x: Tensor) -> Tensor | None:
    with torch.no_grad():
        features = model.forward_features(x)
    # Detached while the watch is on, so that the leaf is the last map it sees, unless the head makes another.
    return model.forward_head(features.detach().requires_grad_()) if features.ndim == 4 else None


def shows_features(model: nn.Module) -> bool:
    """Whether the model speaks timm's words ``forward_features`` and ``forward_head``."""
    speaker = model.network if isinstance(model, Classifier) else model
    return hasattr(speaker, "forward_features") and hasattr(speaker, "forward_head")


def _scores_maps(model: nn.Module) -> bool:
    """Whether a classifier's last layer is no linear one but a convolution: its last map is of scores, not features."""
    if not isinstance(model, Classifier) or not shows_features(model):
        return False
    return hasattr(model.network, "get_classifier") and hasattr(model.get_classifier(), "kernel_size")


def _pools_maps(model: nn.Module) -> bool:
    """Whether a feature map may be expected; where not, running without a graph first would be in vain."""
    return shows_features(model) and not any("attention" in type(m).__name__.lower() for m in model.modules())
