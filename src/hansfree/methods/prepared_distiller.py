"""What distillers of two stages share: a module of their own learns from the teacher before the student does."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from hansfree.core import Batch, Stage
from hansfree.errors import UserError
from hansfree.methods.distiller import Distiller
from hansfree.methods.matched_layers import Seen


class PreparedDistiller(Distiller, ABC):
    """First trains a module on what the teacher shows, while the student rests; then the student against it."""

    def prepare(self, name: str, modules: Sequence[nn.Module], epochs: int, lr: float | None, **more: Any) -> None:
        """Say what the first stage trains, for how long and how; everything else waits for the second.

        Raises ``UserError`` for settings that mean nothing.
        """
        if epochs < 1:
            raise UserError(f"method.{name}_epochs must be 1 or above, not {epochs}.")
        if lr is not None and not lr > 0:
            raise UserError(f"method.{name}_lr must be above 0, not {lr}; null is the run's own.")
        rate = {} if lr is None else {"lr": lr}
        self._first = Stage(name, overrides={"epochs": epochs, **rate, **more})
        self._prepared = [parameter for module in modules for parameter in module.parameters()]
        prepared = set(self._prepared)
        self._rest = [p for p in self.parameters() if p.requires_grad and p not in prepared]
        self._turn_to(self._prepared, self._rest)

    def next_stage(self) -> Stage | None:
        """The module of the teacher's, then the student."""
        if self.stages_done == 0:
            return self._first
        if self.stages_done == 1:
            self._turn_to(self._rest, self._prepared)
            return Stage("student")
        return None

    def _turn_to(self, trained: Iterable[nn.Parameter], resting: Iterable[nn.Parameter]) -> None:
        for parameters, on in ((trained, True), (resting, False)):
            for parameter in parameters:
                parameter.requires_grad_(on)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the stage; in the first the student is not asked."""
        looking, shown = self.watch(), self.shown(batch)
        theirs = looking.theirs(looking.teacher.logits(shown))
        if self.stages_done == 0:
            return self.preparation(theirs)
        return self.terms(batch, looking.ours(looking.student(shown.images)), theirs)

    def shown(self, batch: Batch) -> Batch:
        """What both networks are shown of ``batch``: by default, it."""
        return batch

    @abstractmethod
    def preparation(self, theirs: Seen) -> dict[str, Tensor]:
        """The terms of the first stage, from what the teacher showed."""
