"""Checkpoints and the log of one run: what a run that was stopped goes on from."""

from pathlib import Path
from typing import Any

import torch

from hansfree.core import Method
from hansfree.errors import UserError
from hansfree.runs import RunFolder, atomic_path
from hansfree.training import Step


class Keeper:
    """Checkpoints and the log of one run; silent in all processes but the main one."""

    def __init__(self, folder: RunFolder, *, active: bool) -> None:
        self.folder, self.active = folder, active
        self.loaded = load_checkpoint(folder)
        self.best: dict[str, Any] | None = None if self.loaded is None else self.loaded["best"]
        self.steps: int = 0 if self.loaded is None else self.loaded["steps"]
        self.seconds: float = 0.0 if self.loaded is None else self.loaded["time"]["seconds"]
        self.pending: list[dict[str, Any]] = []
        if active:
            folder.truncate_metrics(0 if self.loaded is None else self.loaded["metrics_position"])

    def record(self, line: dict[str, Any]) -> None:
        """Log one line; it reaches the disk with the next few."""
        self.pending.append(line)
        if len(self.pending) >= 20:
            self.flush()

    def flush(self) -> None:
        """Write what was logged."""
        if self.active and self.pending:
            self.folder.append_metrics(self.pending)
        self.pending = []

    def offer(self, method: Method, score: float, where: dict[str, Any]) -> None:
        """Keep ``method`` as the best of its stage so far if its score is no lower; among equals the latest stays.

        Whatever an earlier stage left is not the method yet, so a new stage begins anew.
        """
        if self.best is not None and score < self.best["score"] and self.best["stage"] == where["stage"]:
            return
        self.best = {"score": score, **where}
        if self.active:
            with atomic_path(self.folder.best) as path:
                torch.save({"method": method.state_dict(), **self.best}, path)

    def save(self, step: Step, steps: int, seconds: float) -> None:
        """Write a checkpoint, keeping the one before it."""
        self.flush()
        if not self.active:
            return
        fit = step.snapshot()
        apart = fit.pop("apart")
        if apart:
            with atomic_path(_apart(self.folder, steps)) as path:
                torch.save(apart, path)
        state = {
            "fit": fit,
            "apart": bool(apart),
            "best": self.best,
            "steps": steps,
            "metrics_position": self.folder.metrics_position(),
            "time": {"seconds": seconds},
        }
        if self.folder.last.exists():
            self.folder.last.replace(self.folder.previous)
        with atomic_path(self.folder.last) as path:
            torch.save(state, path)
        for old in sorted(self.folder.last.parent.glob("apart-*.pt"))[:-2]:  # last.pt and previous.pt have the others
            old.unlink()

    def remedy(self) -> str:
        """What to say after training diverged: the last good checkpoint, and what to try."""
        good = next((path for path in (self.folder.last, self.folder.previous) if path.exists()), None)
        if good is None:
            return "There is no checkpoint from before; try a smaller training.lr or a smaller training.clip."
        return f"The last good checkpoint is {good}; try a smaller training.lr or a smaller training.clip."

    def restore_best(self, method: Method) -> None:
        """Put the selected weights into ``method``."""
        if self.best is not None:
            method.load_state_dict(read_checkpoint(self.folder.best)["method"])


def load_checkpoint(folder: RunFolder) -> dict[str, Any] | None:
    """The newest checkpoint of a run, None where there is none. Raises ``UserError`` for a damaged one."""
    for path in (folder.last, folder.previous):
        if path.exists():
            state = read_checkpoint(path)
            state["fit"]["apart"] = read_checkpoint(_apart(folder, state["steps"])) if state.get("apart") else {}
            return state
    return None


def _apart(folder: RunFolder, steps: int) -> Path:
    """Where a checkpoint after ``steps`` steps keeps what is too large to stand in it."""
    return folder.last.with_name(f"apart-{steps:010d}.pt")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint. Raises ``UserError`` that names a damaged one and what to do."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        folder = RunFolder(path.parent.parent)
        if path == folder.last and folder.previous.exists():
            remedy = f"delete it, and --resume goes on from {folder.previous}"
        else:
            remedy = "delete the run's folder and start it again"
        raise UserError(f"The checkpoint {path} is damaged; {remedy}.") from error
