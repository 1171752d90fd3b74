"""Groups of training samples, made from their label and bias: what balanced and worst-group methods count by."""

from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed, nn

from hansfree.core import Batch, Method, Setup, Stage
from hansfree.errors import NotGivenError, UserError, unknown

By = Literal["label-bias", "label-majority", "majority", "bias", "label"]
"""label-bias: one group per pair that occurs. majority: the samples that have the most frequent bias of their class,
and all others. label-majority: the same within each class. bias, label: one group per value."""


@final
class Groups(nn.Module):
    """The groups that occur in the training data, numbered from 0, and how many samples each has.

    A pair that training never saw has no number: -1, and the weight 0.
    """

    number: Tensor
    """Of each pair, [classes, biases + 1]; the last column stands for biases that training never saw."""
    count: Tensor
    sampling_weights: Tensor
    """Of each training sample: drawn by them, all groups are equally frequent."""

    def __init__(self, setup: Setup, by: By, *, compares: bool = False) -> None:
        """Counts where the setup tells labels and biases, and else refuses when asked for a count.

        Raises ``NotGivenError`` where the method ``compares`` groups of a class, and each class has one bias only.
        """
        super().__init__()
        if by not in get_args(By):
            raise unknown("grouping", by, get_args(By))
        self.by: By = by
        known = setup.label is not None and (setup.bias is not None or by == "label")
        number, count = torch.zeros(0, 1, dtype=torch.long), torch.zeros(0)
        if known:
            assert setup.label is not None
            if setup.label.ndim != 1:
                raise UserError("Grouping needs one class per sample, but the labels of this benchmark name several.")
            bias = torch.zeros_like(setup.label) if setup.bias is None or by == "label" else setup.bias
            number, count = numbered(setup.label, bias, setup.classes, by)
            if compares and len(torch.stack([setup.label, bias], 1).unique(dim=0)) == len(setup.label.unique()):
                raise NotGivenError(
                    "The method compares samples of a class that differ in their bias, but each class of the training "
                    "data has one bias only; choose data in which it varies, such as a smaller bias_ratio.",
                    "needs a bias that varies within a class",
                )
        # Made from the data each time, so that a checkpoint need not hold them.
        self.register_buffer("number", number, persistent=False)
        self.register_buffer("count", count, persistent=False)
        weights = self.weights(self.of(setup.label, setup.bias)) if known and setup.label is not None else count
        self.register_buffer("sampling_weights", weights, persistent=False)

    def __len__(self) -> int:
        """How many groups there are. Raises ``UserError`` where the setup did not tell."""
        if not len(self.count):
            wanted = "label" if self.by == "label" else "label and the bias"
            raise UserError(f"The method needs the {wanted} of each training sample; give Setup its label and bias.")
        return len(self.count)

    def of(self, label: Int[Tensor, "b"], bias: Int[Tensor, "b"] | None) -> Int[Tensor, "b"]:
        """The group of each sample. Raises ``UserError`` where the bias is needed and not known."""
        len(self)
        if self.by == "label":
            bias = torch.zeros_like(label)
        if bias is None:
            raise UserError("The method needs bias labels, which this benchmark does not give; choose another method.")
        return self.number[label, bias.clamp(max=self.number.shape[1] - 1)]

    def of_batch(self, batch: Batch) -> Int[Tensor, "b"]:
        """The group of each sample of ``batch``."""
        return self.of(batch.label.long(), batch.bias)

    def weights(self, group: Int[Tensor, "b"], wanted: Float[Tensor, "groups"] | None = None) -> Float[Tensor, "b"]:
        """``wanted_g / share_g``: by it a mean over samples becomes ``sum_g wanted_g mean_g`` (None: 1 / groups)."""
        share = self.count / self.count.sum()
        wanted = torch.full_like(share, 1 / len(self)) if wanted is None else wanted
        return torch.where(group < 0, 0.0, (wanted / share)[group.clamp(min=0)])


def balanced_stage(method: Method, groups: Groups) -> Stage | None:
    """The only stage of ``method``, whose batches hold each group equally often on average."""
    len(groups)  # refuses where the setup did not tell
    return Stage(weights=groups.sampling_weights) if method.stages_done == 0 else None


def numbered(label: Tensor, bias: Tensor, classes: int, by: By) -> tuple[Int[Tensor, "classes k"], Float[Tensor, "_"]]:
    """The number of each pair's group, and the samples per group; groups that do not occur get no number."""
    biases = int(bias.max()) + 1
    pairs = torch.zeros(classes, biases + 1)
    pairs.index_put_((label, bias), torch.ones(len(label)), accumulate=True)
    row = torch.arange(classes)[:, None].expand_as(pairs)
    column = torch.arange(biases + 1)[None].expand_as(pairs)
    minority = (column != pairs.argmax(1, keepdim=True)).long()
    raw = {
        "label-bias": row * (biases + 1) + column,
        "label-majority": 2 * row + minority,
        "majority": minority,
        "bias": column,
        "label": row,
    }[by]
    count = torch.zeros(int(raw.max()) + 1).index_add(0, raw.flatten(), pairs.flatten())
    occurring = count > 0
    number = torch.where(occurring, occurring.cumsum(0) - 1, -1)
    return number[raw], count[occurring]


def group_means(
    values: Float[Tensor, "b"], group: Int[Tensor, "b"], groups: int
) -> tuple[Float[Tensor, "groups"], Bool[Tensor, "groups"]]:
    """The mean of ``values`` in each group, 0 where a group is absent, and which groups are present."""
    member = (group == torch.arange(groups, device=group.device)[:, None]).to(values.dtype)
    size = member.sum(1)
    return member @ values / size.clamp(min=1), size > 0


@torch.no_grad()
def judged_logits(student: nn.Module, batch: Batch) -> Tensor:
    """What the student says in evaluation mode, without a gradient and without a trace: for ``observe``."""
    modes = {module: module.training for module in student.modules()}
    student.eval()
    logits = student(batch.input)
    for module, mode in modes.items():
        module.training = mode
    return logits


def gathered(values: Tensor) -> Tensor:
    """``values`` of all processes, one after another, so that each of them observes the same."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
