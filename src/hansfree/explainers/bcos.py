"""B-cos: the linear map that a B-cos network applies to this input.

Böhle et al. 2022, https://arxiv.org/abs/2205.10268, and 2024, https://arxiv.org/abs/2306.10898. A B-cos network is
dynamic linear: y(x) = W(x) x, where x has six channels [r, g, b, 1 - r, 1 - g, 1 - b] and W(x) collects weights that
depend on x: the scaling |cos(x, w)|^(B - 1) of each B-cos layer, the standard deviations of its normalisations, the
attention of its transformers.

    weights:        map = W_k(x) = dy_k / dx with every dynamic weight held constant, [b, 6, h, w]
    contributions:  map = sum over channels of W_k(x) * x, [b, 1, h, w]; sums to the logit less its fixed bias

``weights`` is what explanation-enhanced knowledge distillation (e2KD, https://arxiv.org/abs/2402.03119) compares;
``contributions`` is for looking and measuring.

Deviation: none in the values. As a loss, the gradient reaches the network's weights through the dynamic weights too,
exactly; the authors' library cuts them out of the graph in the forward pass, which is right for a map to look at and
wrong for a loss.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hansfree.core import Classifier, Draws, Explainer, Explanation, Target, held_affine
from hansfree.errors import UserError, unknown
from hansfree.explainers.propagation import check_images, propagate
from hansfree.explainers.twin import plain, twin

Form = Literal["weights", "contributions"]


@final
@dataclass(frozen=True)
class BCos(Explainer):
    """map = W_k(x), or the contributions sum_c W_k(x) x.

    For B-cos networks: of layers with an explanation mode like those of the ``bcos`` package, or with dynamic weights
    in :func:`hansfree.core.held_affine`. x is what the network sees: the six channels that a Classifier makes of
    pixels, or the input itself of a bare network.
    """

    form: Form = "weights"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise unknown("form of a B-cos explanation", self.form, get_args(Form))

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` where the model has no B-cos layer."""
        check_images(input)
        network = _Held(model, input)
        found = propagate(network, input, target, at=network.encoded)
        map = found.signal if self.form == "weights" else found.times_input().sum(-3, keepdim=True)
        return Explanation(found.logits, map)


@final
class _Held(nn.Module):
    """A twin of the model whose dynamic weights are held while explaining, and which remembers what it encoded."""

    def __init__(self, model: nn.Module, input: Tensor) -> None:
        super().__init__()
        self.model, self.training = plain(model), model.training
        parts = list(self.model.modules())
        self._dynamic = [part for part in parts if _detaches(part)]
        self._encoders = [part for part in parts if isinstance(part, Classifier)]
        self._encoded: Tensor | None = None
        if not self._encoders:
            _check_channels(parts, input)

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits."""
        self._encoded = x
        changes = {**dict.fromkeys(self._dynamic, _hold), **dict.fromkeys(self._encoders, self._remember)}
        model = twin(self.model, changes)
        if self._dynamic:
            return model(x)
        with _Spotting() as spotted:
            logits = model(x)
        if not spotted.dynamic:
            raise UserError(
                f"{type(self.model).__name__} has no B-cos layer, so it applies no linear map of its own choice to the "
                "input; explain a B-cos network (load_model('bcos/...')), or use gradient-x-input."
            )
        return logits

    def encoded(self) -> Tensor:
        """What the network saw in the last forward pass: the classifier's six channels, or the input."""
        assert self._encoded is not None
        return self._encoded

    def _remember(self, classifier: nn.Module) -> None:
        def prepare(x: Tensor) -> Tensor:
            self._encoded = encoded = type(own()).prepare(own(), x)
            return encoded.clone()  # the network may change it in place

        own = _weak(classifier)
        classifier.__dict__["prepare"] = prepare


def _weak(module: Any) -> Callable[[], Any]:
    """The module, for a function that is to hang on it: a cycle would outlive the explanation, with its tensors."""
    return weakref.ref(module)


def _detaches(module: nn.Module) -> bool:
    """Whether the layer has a flag ``detach``, as B-cos layers have: it then detaches its dynamic weights."""
    return isinstance(module.__dict__.get("detach"), bool)


def _hold(layer: nn.Module) -> None:
    own = _weak(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Holding(own()):
            return type(own()).forward(own(), *args, **kwargs)

    layer.__dict__.update(detach=True, forward=forward)


@final
class _Holding(TorchFunctionMode):
    """Holds, while explaining, what a layer detaches; in every other backward pass it is not detached."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._buffers = list(layer.buffers())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, or what stands for ``detach``."""
        kwargs = kwargs or {}
        if func in _DETACH and args and args[0].requires_grad:
            zero = args[0].new_zeros(())
            return held_affine(zero, zero, args[0])
        if getattr(func, "__name__", "").endswith("_") and any(args[0] is buffer for buffer in self._buffers):
            with torch.no_grad():  # a running statistic must not remember the batch's graph
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@final
class _Spotting(TorchFunctionMode):
    """Notices dynamic weights that are written with ``held_affine``: one for each unit of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.dynamic = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        if func is held_affine:
            x, scale, *_ = args
            self.dynamic |= x.ndim > 1 and x.shape == scale.shape
        return func(*args, **kwargs or {})


_DETACH = {Tensor.detach, torch.detach}


def _check_channels(parts: list[nn.Module], input: Tensor) -> None:
    wanted = next((part.in_channels for part in parts if _detaches(part) and hasattr(part, "in_channels")), None)
    if wanted == 6 and input.ndim == 4 and input.shape[1] == 3:
        raise UserError(
            "This B-cos network takes six channels [x, 1 - x], but the input has three; load it with "
            "load_model('bcos/...'), or wrap it in a Classifier whose encoding is six-channels."
        )
