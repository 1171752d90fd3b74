"""Twins: a model with some of its layers changed, beside the model itself, which is not touched.

A twin consists of shallow copies of the changed layers and of the modules they sit in; everything else is
shared: parameters, buffers (also those that a forward pass assigns anew) and all other modules. So neither
hooks nor flags are needed, nothing has to be undone, and two threads may each have a twin of one model.
"""

import copy
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hansfree.errors import UserError, unknown

Change = Callable[[nn.Module], None]
"""Changes the copy of a layer, by setting attributes."""


def twin(model: nn.Module, changes: Mapping[nn.Module, Change]) -> nn.Module:
    """The model with each layer of ``changes`` replaced by a copy that was handed to its function.

    A layer that sits in several places is one copy in all of them. A module that only a plain attribute or a list
    refers to is not replaced. Raises ``UserError`` where a scripted module would have to be copied.
    """
    return _twin(plain(model), changes, {})


def _twin(module: nn.Module, changes: Mapping[nn.Module, Change], known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in known:
        return known[module]
    children = {
        name: None if child is None else _twin(child, changes, known) for name, child in module._modules.items()
    }
    if module in changes or any(child is not module._modules[name] for name, child in children.items()):
        known[module] = _shallow(module, children)
        if module in changes:
            changes[module](known[module])
    return known.setdefault(module, module)


def _shallow(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(
            f"A scripted module ({module.original_name}) has layers that cannot be watched; "
            "explain the network as it was before torch.jit.script."
        )
    other = object.__new__(type(module))  # past __reduce__, which rebuilds what some wrappers hold
    other.__dict__.update(module.__dict__, _modules=children, _compiled_call_impl=None)
    return other


def plain(model: nn.Module) -> nn.Module:
    """The module behind ``torch.compile``, whose compiled code would not call a twin's layers."""
    return plain(model._orig_mod) if hasattr(model, "_orig_mod") else model  # pyright: ignore[reportArgumentType]


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """The layer at a path such as ``layer4.1``; wrappers around the network may be left out of it.

    Raises ``UserError`` with the nearest name where there is none.
    """
    layers = dict(plain(model).named_modules(remove_duplicate=False))
    for prefix in ("", "network.", "module.", "module.network."):
        if name and prefix + name in layers:
            return layers[prefix + name]
    names = [known.removeprefix("module.").removeprefix("network.") for known in layers if known]
    if not difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        names = [known for known in names if "." not in known]
    raise unknown("layer", name, names)


class Recording:
    """A twin that shows what one of its layers gives, to ``seen``, at each call of the layer.

    With ``leaf``, the layer's output begins a graph of its own, and everything before it runs without one. Of an
    output of several parts, the first tensor is meant.
    """

    def __init__(self, model: nn.Module, name: str, *, leaf: bool = False, seen: Callable[[Tensor], None]) -> None:
        self._model, self._layer, self._name = model, layer_named(model, name), name
        self._leaf, self._seen = leaf, seen
        self._called = False

    def __call__(self, *args: Any) -> Any:
        """The model's forward pass, in a twin that ends with it: kept, it would keep the pass's activations too."""
        self._called = False
        watched = twin(self._model, {self._layer: lambda other: other.__dict__.update(forward=self._watched)})
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._leaf):
            return watched(*args)

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        given = self._layer.forward(*args, **kwargs)
        output = _first_tensor(given)
        if output is None:
            raise UserError(f"The layer {self._name!r} gives no tensor; name one whose output is a feature map.")
        if self._leaf:
            torch.set_grad_enabled(True)
            output = output.detach().requires_grad_()
        self._called = True
        self._seen(output)
        return _replaced(given, output.clone())  # a copy, because the next layer may work in place

    def check(self) -> None:
        """Raise ``UserError`` where the last forward pass did not call the layer."""
        if not self._called:
            raise UserError(
                f"The layer {self._name!r} was not called in the forward pass; name one that is (a list of layers, for "
                "one, is only gone through)."
            )


def _first_tensor(given: Any) -> Tensor | None:
    if isinstance(given, Tensor):
        return given
    tensors = (_first_tensor(part) for part in _parts(given).values())
    return next((tensor for tensor in tensors if tensor is not None), None)


def _parts(given: Any) -> dict[Any, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    return dict(enumerate(given)) if isinstance(given, tuple | list) else {}


def _replaced(given: Any, new: Tensor) -> Any:
    """The same structure with ``new`` for its first tensor."""
    if isinstance(given, Tensor):
        return new
    key, part = next((key, part) for key, part in _parts(given).items() if _first_tensor(part) is not None)
    if isinstance(given, tuple):
        items = [_replaced(part, new) if place == key else other for place, other in enumerate(given)]
        return type(given)(*items) if hasattr(given, "_fields") else tuple(items)
    changed = copy.copy(given)
    changed[key] = _replaced(part, new)
    return changed
