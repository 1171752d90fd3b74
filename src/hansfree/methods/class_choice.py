"""Which class is explained: the teacher's favourite, often enough another one, or one of several that are there."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from hansfree.core import Draws, TargetRule
from hansfree.errors import UserError


@final
@dataclass(frozen=True)
class Top(TargetRule):
    """The highest logit."""

    def choose(self, logits: Tensor, draws: Draws) -> Tensor:
        """[b] classes."""
        return logits.argmax(1)


@final
@dataclass(frozen=True, eq=False)
class Given(TargetRule):
    """The classes that were named beforehand, [b], whatever the logits."""

    classes: Int[Tensor, "b"]

    def choose(self, logits: Tensor, draws: Draws) -> Tensor:
        """[b] classes."""
        return self.classes


@final
@dataclass(frozen=True)
class TopOrOther(TargetRule):
    """The highest logit with probability ``top_probability``, else one of the others, each equally likely.

    With 0.5, the rule of Bassi et al., 2024, section 3.3: a student should also reject a class for the
    teacher's reasons. Draws are two uniform numbers per sample.
    """

    top_probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.top_probability <= 1:
            raise UserError(f"method.top_probability must lie in [0, 1], not {self.top_probability}.")

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """``{"coin", "other"}``, uniform in [0, 1), [count] each."""
        coin, other = torch.rand(2, count, generator=generator)
        return {"coin": coin, "other": other}

    def choose(self, logits: Tensor, draws: Draws) -> Tensor:
        """[b] classes."""
        top, classes = logits.argmax(1), logits.shape[1]
        step = 1 + (draws["other"] * (classes - 1)).long().clamp(max=classes - 2)
        return torch.where(draws["coin"] < self.top_probability, top, (top + step) % classes)


@final
@dataclass(frozen=True)
class AnyPositive(TargetRule):
    """One of the classes whose score is above 0, each equally likely; where there is none, that of the highest.

    Scores are logits, or the labels [b, classes] themselves. One random positive class per image and step is what
    model guidance explains where images have several labels (Rao et al., 2023, https://arxiv.org/abs/2303.11932).
    Draws are one uniform number per sample.
    """

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """``{"positive"}``, uniform in [0, 1), [count]."""
        return {"positive": torch.rand(count, generator=generator)}

    def choose(self, logits: Tensor, draws: Draws) -> Tensor:
        """[b] classes."""
        highest = logits.amax(1, keepdim=True)
        positive = torch.where(highest > 0, logits > 0, logits == highest)
        count = positive.sum(1)
        number = (draws["positive"] * count).long().clamp(max=count - 1)  # rounding may reach the count
        return (positive.cumsum(1) > number[:, None]).int().argmax(1)
