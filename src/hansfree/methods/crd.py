"""Contrastive representation distillation: the student's embedding of an image is near the teacher's of the same one.

Formula. ``L = weight * (l(u, v) + l(v, u)) + label_weight * CE(s, y)``, means over samples, with u and v the student's
and the teacher's embeddings: what goes into their last layers, mapped linearly to ``dimensions`` numbers and divided by
its L2 norm. Against n remembered embeddings v_j of other images,

    l(u, v) = -log h(u . v) - sum_j log(1 - h(u . v_j)),    h(c) = e^(c / T) / (e^(c / T) + n Z)

and Z = E e^(u . r / T) is the mean over random directions r: the noise of noise-contrastive estimation.
``output_weight`` adds kd's term, at ``output_temperature``.

Source. Tian, Krishnan & Isola, Contrastive representation distillation, ICLR 2020, https://arxiv.org/abs/1910.10699,
eq. 10 to 19; the defaults are the paper's and its published code's (16,384 negatives, T 0.07, 128 dimensions, weight
0.8). As a rival and a base of e2KD: Parchami-Araghi et al., 2024, https://arxiv.org/abs/2402.03119.

Deviations. ``bank: queue`` remembers the last n images seen, at most each image of the data once, and compares each
sample with all of them. ``bank: full`` is the paper's: an entry for every training image, averaged with ``momentum``,
from which n are drawn with replacement; here once per batch, not per sample. The image itself is no negative of its
own. Positive pairs are the current embeddings (the text; the code takes one of the two from the bank). The code
estimates Z in its first step, against a bank that is still random; here it is that expectation, exp(1 / (2 d T^2)),
without which (the text's eq. 19) most of the loss would be a constant.

Supervision. A teacher; labels unless label_weight is 0 (another published configuration has it 0).

Cost. The teacher's forward pass on top of an ERM step, and two products of the batch with the n remembered embeddings:
1.7 ERM steps where kd takes 1.6, for a small ResNet and 500 images; more where more embeddings are remembered.
The queue, 2 n d numbers (17 MB), is part of each checkpoint. The full bank has 2 d numbers per training image (1 GB per
million); of a run's checkpoints only those to resume from keep it, in a file beside them.
"""

import math
from collections.abc import Mapping
from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Setup
from hansfree.errors import UserError, unknown
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import Distiller, check_weight, last_layer
from hansfree.methods.groups import gathered
from hansfree.methods.matched_layers import Seen
from hansfree.methods.review_kd import width_of

Kind = Literal["queue", "full"]


def contrast(
    anchor: Float[Tensor, "b d"],
    positive: Float[Tensor, "b d"],
    negatives: Float[Tensor, "n d"],
    own: Bool[Tensor, "b n"],
    temperature: float,
) -> Float[Tensor, ""]:
    """``-log h(a . p) - sum_j log(1 - h(a . n_j))``, mean over samples; negatives that are ``own`` are left out."""
    noise = math.log(len(negatives)) + 1 / (2 * anchor.shape[1] * temperature**2)
    near = (anchor * positive).sum(1) / temperature - noise
    far = anchor @ negatives.T / temperature - noise
    return (F.softplus(-near) + F.softplus(far).masked_fill(own, 0).sum(1)).mean()


@final
class Embedding(nn.Module):
    """A linear map to the unit sphere."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dimensions)

    def forward(self, x: Float[Tensor, "b width"]) -> Float[Tensor, "b d"]:
        """``Wx + b``, divided by its norm."""
        return F.normalize(self.linear(at_least_float32(x)))


@final
class Bank(nn.Module):
    """Remembered embeddings of student and teacher, random at first.

    A queue has ``rows`` places, overwritten in turn; a full bank has the place of each training image.
    """

    ours: Tensor
    theirs: Tensor
    index: Tensor
    position: Tensor

    def __init__(self, kind: Kind, rows: int, dimensions: int, momentum: float) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.momentum = momentum
        for name in ("ours", "theirs"):
            start = (2 * torch.rand(rows, dimensions) - 1) * math.sqrt(3 / dimensions)  # as long as a unit vector
            self.register_buffer(name, start, persistent=kind == "queue")
        empty = torch.full((rows,), -1) if kind == "queue" else torch.arange(rows)
        self.register_buffer("index", empty, persistent=kind == "queue")
        self.register_buffer("position", torch.zeros((), dtype=torch.long), persistent=kind == "queue")

    @torch.no_grad()
    def remember(self, index: Int[Tensor, "b"], ours: Float[Tensor, "b d"], theirs: Float[Tensor, "b d"]) -> None:
        """Put in the embeddings of a batch."""
        if self.kind == "queue":
            index, ours, theirs = (values[-len(self.index) :] for values in (index, ours, theirs))
            places = (self.position + torch.arange(len(index), device=index.device)) % len(self.index)
            self.position = (self.position + len(index)) % len(self.index)
            self.index[places] = index
            self.ours[places], self.theirs[places] = ours, theirs
        else:  # in place: a copy of the whole for each step would be dear
            for bank, new in ((self.ours, ours), (self.theirs, theirs)):
                bank[index] = F.normalize(self.momentum * bank[index] + (1 - self.momentum) * new)


@final
class CRD(Distiller):
    """Pull the embeddings of one image together, and push those of different images apart."""

    embeds = True

    def __init__(
        self,
        setup: Setup,
        *,
        weight: float = 0.8,
        label_weight: float = 1.0,
        output_weight: float = 0.0,
        output_temperature: float = 4.0,
        negatives: int = 16384,
        dimensions: int = 128,
        temperature: float = 0.07,
        bank: Kind = "queue",
        momentum: float = 0.5,
    ) -> None:
        super().__init__(
            setup, label_weight=label_weight, output_weight=output_weight, output_temperature=output_temperature
        )
        check_weight(weight)
        if bank not in get_args(Kind):
            raise unknown("bank", bank, get_args(Kind))
        if min(negatives, dimensions) < 1 or not temperature > 0 or not 0 <= momentum < 1:
            raise UserError(
                "method.negatives and dimensions must be 1 or above, temperature above 0 and momentum in [0, 1), not "
                f"{negatives}, {dimensions}, {temperature} and {momentum}."
            )
        self.weight, self.negatives, self.temperature = weight, negatives, temperature
        self.embed_ours = Embedding(width_of(last_layer(self.student, "student")), dimensions)
        self.embed_theirs = Embedding(width_of(last_layer(self.teacher.model, "teacher")), dimensions)
        rows = setup.samples if bank == "full" else min(negatives, setup.samples)
        self.bank = Bank(bank, rows, dimensions, momentum)
        self._fresh: tuple[Tensor, Tensor] | None = None

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"contrast": weight * both directions}`` and, where they have a weight, ``"output"`` and ``"label"``."""
        assert ours.embedding is not None and theirs.embedding is not None
        with torch.autocast(batch.index.device.type, enabled=False):
            u, v = self.embed_ours(ours.embedding), self.embed_theirs(theirs.embedding)
            rows = self._rows(batch.index.device)
            own = self.bank.index[rows] == (batch.index if self.training else torch.full_like(batch.index, -2))[:, None]
            loss = contrast(u, v, self.bank.theirs[rows], own, self.temperature)
            loss = loss + contrast(v, u, self.bank.ours[rows], own, self.temperature)
        if self.training:
            self._fresh = u.detach(), v.detach()
        return {"contrast": self.weight * loss, **self.logit_terms(batch, ours.logits, theirs.logits)}

    def _rows(self, device: torch.device) -> Int[Tensor, "n"] | slice:
        """Which entries are the negatives: all of a queue, some of a full bank (always the same in validation)."""
        if self.bank.kind == "queue":
            return slice(None)
        generator = None if self.training else torch.Generator().manual_seed(0)
        return torch.randint(len(self.bank.index), (self.negatives,), generator=generator).to(device)

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Remember the embeddings of the step, those of all processes."""
        if self._fresh is not None:
            self.bank.remember(gathered(batch.index), *(gathered(values) for values in self._fresh))
        self._fresh = None

    def apart(self) -> dict[str, Tensor]:
        """The full bank."""
        return {"ours": self.bank.ours, "theirs": self.bank.theirs} if self.bank.kind == "full" else {}
