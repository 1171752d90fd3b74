"""What hansfree says when something cannot go on: one sentence that names the thing and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked for. The command line prints it as one sentence and exits with 2."""


class NotGivenError(UserError):
    """A method needs what its data or networks do not give. ``reason`` says so in few words, for a table's N/A."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class RunError(RuntimeError):
    """A run that was asked for rightly and failed (a loss that is not a number, a full disk). Exits with 1."""


class DivergenceError(RunError):
    """Training whose loss or gradient stopped being a number."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The sentence part that helps after an unknown name: the nearest known one, else all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}."


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not in a registry: ``unknown('method', 'emr', METHODS)``."""
    return UserError(f"There is no {kind} {name!r}; {nearest(name, choices)}")
