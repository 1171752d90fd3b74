"""A model and its explainers at work on batches of pictures, and the words in which people ask for them."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.config import Section, apply_overrides
from hansfree.core import Classifier, Explainer
from hansfree.errors import RunError, UserError, nearest
from hansfree.explaining.images import Picture, Source
from hansfree.parts import make_explainer
from hansfree.report.gallery import Said

LIKELIEST = 3
"""So many classes are written beside an image."""


def explainer_of(text: str) -> Explainer:
    """An explainer from ``name:key=value,key=value``; values are YAML, and commas inside brackets belong to them."""
    explainer = make_explainer(section_of(text, "explainer", "lrp:epsilon=0.01"))
    assert explainer is not None
    return explainer


def section_of(text: str, kind: str, example: str) -> Section:
    """The section that ``name:key=value,key=value`` writes on one line. Raises ``UserError`` for what is none."""
    match = re.fullmatch(r"([^=]+?)(?::([^:=]+=.*))?", text, re.S)
    if not match:
        raise UserError(f"The {kind} {text!r} is not of the form name:key=value,key=value, as {example} is.")
    return apply_overrides({"name": match[1]}, _parts(match[2] or ""))


def _parts(settings: str) -> list[str]:
    """``settings`` cut at the commas that stand outside all brackets."""
    parts, depth = [""], 0
    for letter in settings:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def class_numbers(asked: Sequence[str], names: Sequence[str], count: int) -> list[int]:
    """The classes that ``asked`` says, each by its number or by a name (or one of a name's synonyms).

    Raises ``UserError`` for a number out of range and a name that no class or that several classes have.
    """
    known: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for synonym in (name, *name.split(",")):
            known.setdefault(synonym.strip().casefold(), set()).add(number)
    numbers: list[int] = []
    for text in asked:
        found = {int(text)} if re.fullmatch(r"-?\d+", text) else known.get(text.strip().casefold(), set())
        if not found:
            raise UserError(f"The model has no class {text!r}; {_advice(text, known)}")
        if len(found) > 1:
            raise UserError(f"{text!r} may be the classes {', '.join(map(str, sorted(found)))}; give a number.")
        number = found.pop()
        if not 0 <= number < count:
            raise UserError(f"The model has no class {number}; its classes are 0 to {count - 1}.")
        numbers.append(number)
    return list(dict.fromkeys(numbers))


def _advice(text: str, known: Iterable[str]) -> str:
    names = list(known)
    if not names:
        return "its classes have no names, so give a number."
    advice = nearest(text.casefold(), names)
    return advice if advice.startswith("did you mean") or len(names) <= 40 else "give another name, or its number."


def fingerprint(model: Classifier) -> str:
    """A short digest of the weights, so that a folder never mixes the maps of two models."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# The network --------------------------------------------------------------------------------------------------


class Explained(NamedTuple):
    """One image and what the model and its explainers say about it."""

    source: Source
    pixels: np.ndarray | None
    logits: np.ndarray | None = None
    explained: tuple[Said, ...] = ()
    top: tuple[Said, ...] = ()
    answers: Mapping[str, np.ndarray | str] = {}
    """By explainer, as they were asked for: maps [classes, c, h, w], or the sentence that refuses them."""
    error: str = ""


@dataclass
class Look:
    """A model and its explainers, called with a batch of pictures of one shape."""

    model: Classifier
    explainers: Mapping[str, Explainer]
    title: str
    """The model's name, for messages."""
    classes: Sequence[str] = ()
    top: int = 1
    names: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = self.model.config.get("label_names") or ()

    @torch.no_grad()
    def __call__(self, batch: Sequence[Picture]) -> Iterator[Explained]:
        """Explain the pictures. Raises ``UserError`` where every explainer refuses, with the first one's reason."""
        if batch[0].pixels is None:
            yield from (Explained(picture.source, None, error=picture.error) for picture in batch)
            return
        pixels = np.stack([picture.pixels for picture in batch if picture.pixels is not None])
        device = next(chain(self.model.parameters(), self.model.buffers()), torch.empty(0)).device
        input = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device).float() / 255
        logits = self._logits(input)
        target = self._target(logits)
        answers = {name: self._answer(explainer, input, target) for name, explainer in self.explainers.items()}
        if all(isinstance(answer, str) for answer in answers.values()):
            raise UserError(next(iter(answers.values())))
        share = logits.double().softmax(1)
        likeliest = share.topk(min(LIKELIEST, share.shape[1])).indices
        for row, picture in enumerate(batch):
            explained, top = (
                tuple(self._said(share[row], number) for number in ids[row]) for ids in (target, likeliest)
            )
            own = {name: answer if isinstance(answer, str) else answer[row] for name, answer in answers.items()}
            yield Explained(picture.source, picture.pixels, logits[row].cpu().numpy(), explained, top, own)

    def _answer(self, explainer: Explainer, input: Tensor, target: Tensor) -> np.ndarray | str:
        try:
            map = explainer(self.model, input, target).map
        except torch.OutOfMemoryError as error:
            raise _too_large() from error
        except UserError as error:
            return str(error)
        if map.ndim != 5 or map.shape[:2] != target.shape:
            return (
                f"Its map has shape {list(map.shape)}, which is no picture for each class; "
                "an explainer gives [b, k, c, h, w] for k classes."
            )
        return map.float().cpu().numpy()

    def _logits(self, input: Tensor) -> Float[Tensor, "b classes"]:
        try:
            return self.model(input)
        except torch.OutOfMemoryError as error:
            raise _too_large() from error
        except RuntimeError as error:
            height, width = input.shape[2:]
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.title} cannot take images of {height} × {width} pixels ({reason}); "
                "give another --size, or images of the size that it was trained on."
            ) from error

    def _target(self, logits: Float[Tensor, "b classes"]) -> Int[Tensor, "b k"]:
        names = self.names if len(self.names) == logits.shape[1] else ()
        if self.classes:
            numbers = class_numbers(self.classes, names, logits.shape[1])
            return torch.tensor(numbers, device=logits.device).expand(len(logits), -1)
        if self.top > logits.shape[1]:
            raise UserError(f"The model has {logits.shape[1]} classes, so --top can be at most that.")
        return logits.topk(self.top).indices

    def _said(self, share: Tensor, number: Tensor) -> Said:
        index = int(number)
        name = str(self.names[index]) if len(self.names) == len(share) else f"class {index}"
        return Said(index, name, round(float(share[index]), 6))


def _too_large() -> RunError:
    return RunError("The memory does not suffice for this batch; give a smaller --batch-size.")
