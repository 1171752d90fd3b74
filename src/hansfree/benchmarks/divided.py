"""What benchmarks have in common that make all their splits at once and keep them by name."""

from abc import ABC
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from hansfree.core import Benchmark, Split
from hansfree.errors import unknown

OneSplit = TypeVar("OneSplit", bound=Split)


class Divided(Benchmark, ABC, Generic[OneSplit]):
    """A benchmark whose constructor makes ``_splits`` and keeps its ``_options``."""

    _splits: Mapping[str, OneSplit]
    _options: Mapping[str, Any]

    def split(self, name: str) -> OneSplit:
        """The split of that name. Raises ``UserError`` for one that there is not."""
        if name not in self._splits:
            raise unknown("split", name, self._splits)
        return self._splits[name]

    def split_names(self) -> tuple[str, ...]:
        """The splits that were made."""
        return tuple(self._splits)

    def record(self) -> dict[str, Any]:
        """Options, names, and per split its size and whatever tells it apart: groups, fingerprints."""
        biases = {"biases": list(self.biases)} if self.biases else {}
        splits = {name: self._described(split) for name, split in self._splits.items()}
        return {"name": self.name, "options": self._options, "classes": list(self.classes), **biases, "splits": splits}

    def _described(self, split: OneSplit) -> dict[str, Any]:
        return {"size": len(split)}
