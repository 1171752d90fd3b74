"""What one step does: its floating-point operations and the memory that its tensors take at the peak."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Counter(TorchDispatchMode):
    """Counts what is dispatched while it is active, forward and backward passes alike.

    torch's own FlopCounterMode has the same formulas, but it follows modules by hooks, which calls of
    ``torch.autograd.grad`` inside a step do not survive. Convolutions and matrix products are counted;
    ``largest`` [(FLOPs, operator, shapes)] lists them. ``peak`` is in bytes and holds what was created while
    counting and is still alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak = 0
        self.largest: list[tuple[int, str, list[Any]]] = []
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs or {}, out_val=result)
            self.flops += flops
            shapes = [list(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.largest.append((flops, str(func), shapes))
        self._note(result)
        return result

    def _note(self, result: Any) -> None:
        new = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._living = {key: entry for key, entry in self._living.items() if not entry[0].expired()}
        for storage in new:
            self._living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))


def counted(step: Callable[[], object]) -> Counter:
    """The counts of one call of ``step``."""
    with Counter() as counter:
        step()
    return counter


def flops(step: Callable[[], object]) -> int:
    """The FLOPs of one call of ``step``."""
    return counted(step).flops
