"""What benchmarks have in common that make all their splits at once and keep them by name."""

from abc import ABC
from collections.abc import Mapping
from typing import Generic, TypeVar

from hansfree.core import Benchmark, Split
from hansfree.errors import unknown

OneSplit = TypeVar("OneSplit", bound=Split)


class Divided(Benchmark, ABC, Generic[OneSplit]):
    """A benchmark whose constructor makes ``_splits``."""

    _splits: Mapping[str, OneSplit]

    def split(self, name: str) -> OneSplit:
        """The split of that name. Raises ``UserError`` for one that there is not."""
        if name not in self._splits:
            raise unknown("split", name, self._splits)
        return self._splits[name]

    def split_names(self) -> tuple[str, ...]:
        """The splits that were made."""
        return tuple(self._splits)
