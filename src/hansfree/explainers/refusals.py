"""What LRP has no rule for: read from the graph of a forward pass, and named by the module that called it.

The graph rather than the calls, so that what a scripted module or a fused kernel does is seen as well.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hansfree.errors import UserError
from hansfree.explainers import nodes

_AFFINE = re.compile(
    "Add|Sub|Rsub|Neg|Sum|Mean|Cat|Stack|Copy|ToCopy|Clone|Alias|View|UnsafeView|ReshapeAlias|AsStrided|T|Transpose|Permute"
    "|Expand|Repeat|Squeeze|Unsqueeze|Slice|Select|Split|SplitWithSizes|Unbind|Unfold|Index|IndexSelect|Gather|Flip|Roll"
    "|Pad|ConstantPadNd|ReflectionPad2D|ReplicationPad2D|PixelShuffle|PixelUnshuffle|Im2Col|NativeChannelShuffle|ChannelShuffle"
    "|AvgPool2D|AdaptiveAvgPool2D|MkldnnAdaptiveAvgPool2D|UpsampleNearest2D|UpsampleBilinear2D|UpsampleBicubic2D"
    "|UpsampleBilinear2DAa|UpsampleBicubic2DAa|MaskedFill|Where|AvgPool3D|AdaptiveAvgPool3D"
    "|NativeDropout|FusedDropout|MaxPool2DWithIndices|AdaptiveMaxPool2D"
)
_RULED = re.compile("RuledReLU|RuledMaxPool2d|LinearPool|RuledActivation|HeldAffine|Factor|Half|Gate|Overwrite|Softmax")
_PRODUCT = re.compile(
    "Mul|Mm|Bmm|Mv|Dot|Addmm|Addbmm|Baddbmm|Addmv|Addcmul|Convolution|RuledConv2d|Linear|MkldnnLinear"
)
_BILINEAR = re.compile("Mul|Mm|Bmm|Mv|Dot")


_GATED = re.compile(_PRODUCT.pattern + "|Div")


class Path:
    """The nodes between the explained input and the logits, and what each was computed from."""

    def __init__(self, output: Any, source: Any) -> None:
        self.source = source
        self.users: defaultdict[Any, list[Any]] = defaultdict(list)
        self.computed = closure(output, inputs_of)
        for node in self.computed:
            for used in inputs_of(node):
                self.users[used].append(node)
        self.nodes = closure(source, lambda node: self.users.get(node, []))

    def dependent(self, node: Any) -> list[bool]:
        """Which of the node's inputs depend on the explained input."""
        return [used in self.nodes for used in inputs_of(node)]

    def without_rule(self) -> Iterator[Any]:
        """The nodes that LRP has no rule for; on the way, products and sums learn what they combine."""
        yield from (node for node in self.computed if kind(node) == "Gate" and not self._gates(node))
        for node in self.nodes:
            name, dependent = kind(node), self.dependent(node)
            if name == "Factor" and node.pair is not None:
                node.pair.both = sum(self.dependent(inputs_of(node)[0])) > 1
            if _PRODUCT.fullmatch(name):
                known = sum(dependent) < 2 or (_BILINEAR.fullmatch(name) is not None and _is_pair(node))
            elif name == "Div":
                known = not any(dependent[1:])
            else:
                known = (_AFFINE.fullmatch(name) or _RULED.fullmatch(name)) is not None
            if not known:
                yield node

    def _gates(self, gate: Any) -> bool:
        """Whether whatever is computed from the gate, a constant, meets relevance only as a factor."""
        if self.source not in closure(gate, lambda node: [used for used, _ in node.next_functions]):
            return True  # a sigmoid of weights
        reached = closure(gate, lambda node: () if node in self.nodes else self.users.get(node, []))
        met = [node for node in reached if node in self.nodes]
        return bool(met) and all(
            kind(node) == "Half" or (_GATED.fullmatch(kind(node)) and sum(self.dependent(node)) == 1) for node in met
        )


def inputs_of(node: Any) -> list[Any]:
    """What relevance passes to from ``node``."""
    inputs = [used for used, _ in node.next_functions]
    return inputs[_FOLLOWED.get(kind(node), slice(None))]


_FOLLOWED = {"HeldAffine": slice(1), "Gate": slice(0), "Overwrite": slice(1, None)}
"""Of a held affine map only x, of a gate nothing, of a tensor that was overwritten what is there now."""


def kind(node: Any) -> str:
    """The function that a node of autograd's graph belongs to; that of somebody's own Function is in brackets."""
    name = re.sub(r"Backward\d*$", "", node.name())
    own = getattr(type(node), "_forward_cls", None)
    return name if own is None or own.__module__ == nodes.__name__ else f"({name})"


def walk(root: Any, following: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """Every node that can be reached from ``root``, in a fixed order (constants have no node: None)."""
    reached = set[Any]()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in reached:
            reached.add(node)
            yield node
            waiting.extend(following(node))


def closure(root: Any, following: Callable[[Any], Iterable[Any]]) -> dict[Any, None]:
    """All of :func:`walk`, to look nodes up in."""
    return dict.fromkeys(walk(root, following))


def is_first(node: Any) -> bool:
    """Whether everything that ``node`` was computed from leads back to one leaf, the explained input.

    Two leaves settle it, which lie near: a layer before this one has weights.
    """
    leaves = (used for used in walk(node, inputs_of) if not used.next_functions)
    return len(list(islice(leaves, 2))) == 1


def _is_pair(node: Any) -> bool:
    """Whether both factors come from the two operands of one product of ours, which is told so."""
    pairs = [_operand(used) for used in inputs_of(node)]
    if len(pairs) != 2 or pairs[0] is None or pairs[0] is not pairs[1]:
        return False
    pairs[0].both = True
    return True


def _operand(node: Any) -> Any:
    while node is not None and kind(node) != "Half":
        inputs = inputs_of(node)
        node = inputs[0] if len(inputs) == 1 and _AFFINE.fullmatch(kind(node)) else None
    return None if node is None else node.pair


class Locating(TorchFunctionMode):
    """Remembers which module of ``model`` called the function that each node of the graph belongs to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._modules = {id(module): (name, module) for name, module in model.named_modules()}
        self._callers: dict[Any, str] = {}
        self._called: dict[Any, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {leaf.grad_fn for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs or {})
        made = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        caller = self._caller()
        self._called[func] = caller
        for node in made:
            for inner in closure(node, lambda n: [u for u in inputs_of(n) if u not in before]):
                self._callers.setdefault(inner, caller)
        return result

    def _caller(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            name, module = self._modules.get(id(frame.f_locals.get("self")), ("", None))
            if module is not None:
                return _spoken_module(name, module)
            frame = frame.f_back
        return type(self._model).__name__

    def calling(self, func: Callable[..., Any]) -> str:
        """The module that called ``func`` last."""
        return self._called.get(func, type(self._model).__name__)

    def where(self, node: Any) -> str:
        """The module that made ``node``: its path and class."""
        if node in self._callers:
            return self._callers[node]
        scripted = (module for module in self._model.modules() if isinstance(module, torch.jit.ScriptModule))
        found = [_spoken_module(*self._modules[id(module)]) for module in scripted]
        return found[0] if found else type(self._model).__name__


def _spoken_module(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


_SPOKEN = {
    "mul": "a product of two activations",
    "div": "division by an activation",
    "hardtanh": "clamping that does not contain 0",
    "prelu_kernel": "prelu",
    "batch_norm": "instance_norm",
    "copy_slices": "a change in place of a part of a tensor",
    "gate": "a sigmoid that multiplies nothing",
}


def no_rule(node: Any, where: str) -> UserError:
    """The refusal of ``node``, which the module ``where`` made."""
    name = kind(node).strip("()").rpartition(":")[2]
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().removeprefix("native_").strip("_")
    return UserError(
        f"LRP has no rule for {_SPOKEN.get(name, name)}, which {where} computes; use gradient-x-input, or build it "
        "of functions that LRP knows (docs/lrp-semantics.md), in plain Python: neither scripted nor compiled."
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made ``module``; asks without importing the compiler."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def refuse_compiled(model: nn.Module) -> None:
    """Raise ``UserError`` if a module inside ``model`` is compiled: our nodes would lose their second derivatives."""
    for name, module in model.named_modules():
        if is_compiled(module):
            raise UserError(
                f"{_spoken_module(name, module)} is compiled and cannot be explained through; compile the model as a "
                "whole (its original is explained then), or nothing in it."
            )


def mask_of_activations(where: str) -> UserError:
    """The refusal of a comparison of activations."""
    return UserError(
        f"LRP has no rule for a mask made by comparing activations, which {where} computes; call an activation "
        "function of torch (such as F.relu) instead, or use gradient-x-input."
    )


def refuse_unseen_statistics(output: Any) -> None:
    """Raise ``UserError`` if a batch norm in training mode escaped, whose statistics were to be held."""
    for node in closure(output, inputs_of):
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", True):
            saved = getattr(node, "_saved_input", None)
            if saved is None or len(saved) > 1:  # instance norm is a batch norm of one sample
                raise UserError(
                    "A batch norm in training mode cannot be held constant: it is scripted, synchronised, or called by "
                    "the name of its operator; put it in evaluation mode, or ask for `statistics: differentiated`."
                )
