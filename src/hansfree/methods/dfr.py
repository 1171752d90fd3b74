"""Deep feature reweighting: the features of ERM, and a last layer trained anew on balanced held-out data.

Formula. After ERM, with its features frozen and standardised, z, each of ``subsets`` last layers is a logistic
regression of its own, ``mean_{i in subset} l_i + |W| / (C n)``, on a subset of held-out data in which every group
(label, bias) has as many samples as the smallest. The student's last layer is the mean of them. C is
``inverse_strength``, n the size of a subset; ``penalty`` l1 is ``sum |W|``, l2 ``sum W^2 / 2``.

Source. Kirichenko, Izmailov & Wilson, Last layer re-training is sufficient for robustness to spurious correlations,
2022, https://arxiv.org/abs/2204.02937, sections 5 and 6 and appendix B (DFR on validation data); 20 subsets as in the
published code, which tunes C over 1, 0.7, 0.3, 0.1, 0.07, 0.03 and 0.01.

Deviations. The held-out data are one half of the validation split, drawn once by index; the paper tunes C on one half
trained on the other and then trains on both. Adam minimises instead of a solver for logistic regression
(``last_layer_epochs``, ``last_layer_lr``), and so no weight of an l1 regression is exactly zero. Features are
standardised by the validation split's mean and deviation, the paper's by those of the training data. A stage of one
epoch looks at the validation split first (its mean, deviation and groups); of its last layers nothing is kept, and
up to 15 samples that do not fill a batch are left out. ``groups: label-majority`` tells within a class only the
samples with its most frequent bias from the others.

Selection. The half that trains must not select. This method's validation loss counts the other half only: let
``selection: iid_val_loss`` (or last) choose. Rules by accuracy, and the accuracy reported on the validation split,
take in both halves. Of several stages only the last one's checkpoints are the method's.

Supervision. Bias labels of the validation data, and none of the training data.

Cost. ERM, and forward passes over the validation split, ``last_layer_epochs`` of them.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Classifier, Drawer, Draws, Method, Setup, Stage
from hansfree.errors import UserError
from hansfree.methods.groups import gathered, numbered

TRAINS, SELECTS = 0, 1


@final
class Halves(Drawer):
    """Which half of the validation split a sample belongs to, by its index."""

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """``{"half"}``: 0 or 1, [count]."""
        return {"half": torch.randint(2, (count,), generator=generator)}


@final
class DFR(Method):
    """Retrain the last layer on balanced held-out data."""

    needs = frozenset({"bias:valid"})

    mean: Tensor
    square: Tensor
    looked_at: Tensor
    member: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        subsets: int = 20,
        penalty: Literal["l1", "l2"] = "l1",
        inverse_strength: float = 1.0,
        last_layer_epochs: int = 100,
        last_layer_lr: float = 0.01,
        groups: Literal["label-bias", "label-majority"] = "label-bias",
    ) -> None:
        super().__init__(setup)
        if min(subsets, last_layer_epochs) < 1:
            raise UserError("method.subsets and method.last_layer_epochs must be at least 1.")
        if min(inverse_strength, last_layer_lr) <= 0:
            raise UserError("method.inverse_strength and method.last_layer_lr must be above 0.")
        self.penalty, self.inverse_strength = penalty, inverse_strength
        self.last_layer_epochs, self.last_layer_lr = last_layer_epochs, last_layer_lr
        self.groups: Literal["label-bias", "label-majority"] = groups
        layer = last_layer(self.student)
        shape = (subsets, layer.out_features)
        self.weight = nn.Parameter(torch.zeros(*shape, layer.in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.register_buffer("mean", torch.zeros(layer.in_features))
        self.register_buffer("square", torch.ones(layer.in_features))
        self.register_buffer("looked_at", torch.zeros((), dtype=torch.long))
        self.register_buffer("member", torch.zeros(subsets, 0, dtype=torch.bool), persistent=False)
        self.seen = torch.zeros(0, 3, dtype=torch.long)
        """Index, label and bias of the validation samples, one row each; of unknown length until they are seen."""

    # The length of a buffer is fixed when the method is built; ``seen`` is saved as torch's extra state instead.
    def get_extra_state(self) -> Tensor:
        """What checkpoints hold of the validation split."""
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        """Take it from a checkpoint."""
        self.seen = state

    def train(self, mode: bool = True) -> "DFR":
        """After ERM the student stays in evaluation mode: its features are frozen."""
        super().train(mode)
        if self.stages_done > 0:
            self.student.eval()
        return self

    def next_stage(self) -> Stage | None:
        """ERM; a look at the validation split; the last layers."""
        done = int(self.stages_done)
        for parameter in (self.weight, self.bias):
            parameter.requires_grad_(done > 0)
        if done == 0:
            return Stage()
        heads = {"last layers": (self.weight, self.bias)}
        settings: dict[str, Any] = {"optimiser": "adam", "lr": self.last_layer_lr, "momentum": 0.9, "weight_decay": 0.0}
        settings |= {"schedule": "constant", "warmup": 0.0, "clip": None}
        if done == 1:
            return Stage("look", heads, {**settings, "epochs": 1, "batch_size": 16}, "valid")
        if done == 2:
            self.member = subsets_of(self.seen, len(self.weight), self._setup.classes, self.groups).to(self.mean.device)
            return Stage(
                "last-layer", heads, {**settings, "epochs": self.last_layer_epochs}, "valid", self.member.any(0).float()
            )
        return None

    def finish_stage(self) -> None:
        """After the look at the validation split, begin the last layers anew."""
        super().finish_stage()
        if self.stages_done == 2:
            with torch.no_grad():
                self.weight.zero_()
                self.bias.zero_()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy}``; of the last layers ``{"label", "penalty"}``, means over them."""
        if not self.training:
            losses = F.cross_entropy(self.student(batch.images), batch.label, reduction="none")
            return {"label": (2 * (half_of(batch.index) == SELECTS) * losses).mean()}
        if self.stages_done == 0:
            return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
        features = (self.features(batch) - self.mean) / self.deviation()
        logits = torch.einsum("bd,rkd->brk", features, self.weight) + self.bias
        label = batch.label[:, None].expand(-1, len(self.weight))
        losses = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none").view(label.shape)
        if self.stages_done == 1:
            return {"label": losses.mean()}
        member = self.member[:, batch.index].T
        # All subsets have one size, and a batch is drawn from all of them together.
        share = self.member.sum(1) / self.member.any(0).sum()
        return {
            "label": (losses * member / share).mean(),
            "penalty": self.norm() / (self.inverse_strength * self.member[0].sum()),
        }

    def norm(self) -> Tensor:
        """Of the weights of a last layer, on average."""
        size = self.weight.abs() if self.penalty == "l1" else self.weight.square() / 2
        return size.flatten(1).sum(1).mean()

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Note the sample's group and the features' statistics; give the student the mean of the last layers."""
        if self.stages_done == 1:
            self._look(batch)
        elif self.stages_done == 2:
            layer, scale = last_layer(self.student), self.deviation()
            weight = self.weight.detach().mean(0) / scale
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(self.bias.mean(0) - weight @ self.mean)

    def _look(self, batch: Batch) -> None:
        if batch.bias is None:
            raise UserError("dfr needs bias labels in the validation split, which this benchmark does not give.")
        rows = gathered(torch.stack([batch.index, batch.label, batch.bias], 1))
        self.seen = torch.cat([self.seen.to(rows.device), rows])
        features = gathered(self.features(batch))
        count = self.looked_at + len(features)
        self.mean = self.mean + (features.mean(0) - self.mean) * len(features) / count
        before = torch.where(self.looked_at == 0, 0.0, self.square)
        self.square = before + (features.square().mean(0) - before) * len(features) / count
        self.looked_at = count

    def deviation(self) -> Tensor:
        """Standard deviation of each feature; 1 where it is constant."""
        variance = self.square - self.mean.square()
        return torch.where(variance > 1e-6 * self.square, variance.clamp(min=0).sqrt(), 1.0)

    @torch.no_grad()
    def features(self, batch: Batch) -> Float[Tensor, "b d"]:
        """What the student's last layer receives."""
        received: list[Tensor] = []
        handle = last_layer(self.student).register_forward_pre_hook(lambda _, given: received.append(given[0]))
        try:
            self.student(batch.images)
        finally:
            handle.remove()
        return received[0].float()


def last_layer(student: nn.Module) -> nn.Linear:
    """The student's last layer. Raises ``UserError`` where it is not linear with a bias."""
    layer = student.get_classifier() if isinstance(student, Classifier) else None
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise UserError("dfr needs a student made by load_model whose last layer is linear with a bias.")
    return layer


def half_of(index: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """The half of the validation split that each sample belongs to: TRAINS or SELECTS."""
    return Halves().fixed_draws(index)["half"].to(index.device)


def subsets_of(
    seen: Int[Tensor, "n 3"], subsets: int, classes: int, by: Literal["label-bias", "label-majority"]
) -> Bool[Tensor, "subsets samples"]:
    """Who is in each subset of the half that trains: of each group as many as the smallest has, drawn anew each time.

    Raises ``UserError`` where a class is missing, or no class has more than one bias.
    """
    seen = seen.cpu()[seen[:, 0].argsort().cpu()]
    index, label, bias = seen[half_of(seen[:, 0]) == TRAINS].T
    if len(label.unique()) < classes:
        raise UserError(
            f"Half of the validation split, {len(label)} samples, shows {len(label.unique())} of {classes} classes; "
            "dfr needs them all: enlarge benchmark.valid."
        )
    if torch.stack([label, bias]).unique(dim=1).shape[1] == classes:
        raise UserError(
            "Each class of the validation data that dfr trains on has one bias only, so there is nothing to balance; "
            "choose data in which it varies, such as a smaller bias_ratio, or enlarge benchmark.valid."
        )
    number, count = numbered(label, bias, classes, by)
    group, smallest = number[label, bias], int(count.min())
    member = torch.zeros(subsets, int(seen[-1, 0]) + 1, dtype=torch.bool)
    for row, subset in enumerate(member):
        generator = torch.Generator().manual_seed(row)
        for name in range(len(count)):
            own = index[group == name]
            subset[own[torch.randperm(len(own), generator=generator)[:smallest]]] = True
    return member
