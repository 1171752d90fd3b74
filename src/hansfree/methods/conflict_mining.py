"""Mining of bias-conflicting samples: which training samples a network that is biased on purpose does not explain.

Two ways. ``wrong``: a network is trained by generalised cross-entropy, and what it gets wrong at the end conflicts.
``epoch-ensemble``: a network is trained by cross-entropy on those samples alone whose label has a probability above
``confidence``, and a sample conflicts where the mean over epochs of ``1 - p`` is above ``threshold``: one that is
learnt by heart late is still found.

The epoch ensemble is of Zhao, Chen, Wang, He & Xia, Combating unknown bias with effective bias-conflicting scoring and
gradient alignment, 2021, https://arxiv.org/abs/2111.13108, without their second network; as in the published code of
Park et al., 2023, https://arxiv.org/abs/2210.05247: confidence 0.05, threshold 0.8 (0.7 for faces). There, all samples
are scored after each epoch; here each sample right after the step that it took part in, in evaluation mode.
"""

from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch
from hansfree.errors import UserError, unknown
from hansfree.methods.gce import check_q, generalised_cross_entropy
from hansfree.methods.groups import gathered, judged_logits

Detection = Literal["wrong", "epoch-ensemble"]


@final
class Mining(nn.Module):
    """What a biased network is trained by, and what it found out about each training sample."""

    wrong: Tensor
    doubt: Tensor
    """Of each sample: the sum of ``1 - p`` over the epochs."""
    epochs: Tensor
    """Of each sample: how often it was scored."""

    def __init__(
        self,
        samples: int,
        detection: Detection = "wrong",
        *,
        q: float = 0.7,
        confidence: float = 0.05,
        threshold: float = 0.8,
    ) -> None:
        super().__init__()
        check_q(q)
        if detection not in get_args(Detection):
            raise unknown("detection", detection, get_args(Detection))
        if not 0 <= confidence < 1 or not 0 < threshold < 1:
            raise UserError(
                f"method.confidence must lie in [0, 1) and threshold in (0, 1), not {confidence} and {threshold}."
            )
        self.detection: Detection = detection
        self.q, self.confidence, self.threshold = q, confidence, threshold
        self.register_buffer("wrong", torch.zeros(samples, dtype=torch.bool))
        self.register_buffer("doubt", torch.zeros(samples))
        self.register_buffer("epochs", torch.zeros(samples))

    def loss(self, logits: Float[Tensor, "b classes"], batch: Batch) -> Float[Tensor, ""]:
        """GCE; or cross-entropy, mean over the samples that the network believes (0 where it believes none)."""
        if self.detection == "wrong":
            return generalised_cross_entropy(logits, batch.label, self.q).mean()
        losses = F.cross_entropy(logits, batch.label, reduction="none")
        believed = (-losses.detach()).exp() > self.confidence
        return (losses * believed).sum() / believed.sum().clamp(min=1)

    @torch.no_grad()
    def observe(self, network: nn.Module, batch: Batch) -> None:
        """Note what the network says about the samples of a step."""
        logits, index = judged_logits(network, batch).float(), gathered(batch.index)
        p = logits.softmax(1).gather(1, batch.label[:, None]).squeeze(1)
        self.wrong = self.wrong.index_copy(0, index, gathered(logits.argmax(1) != batch.label))
        self.doubt = self.doubt.index_add(0, index, gathered(1 - p))
        self.epochs = self.epochs.index_add(0, index, torch.ones_like(index, dtype=self.epochs.dtype))

    @property
    def score(self) -> Float[Tensor, "samples"]:
        """The epoch ensemble's, in [0, 1]; 0 for a sample that was never seen."""
        return self.doubt / self.epochs.clamp(min=1)

    def conflicting(self) -> Bool[Tensor, "samples"]:
        """The samples that were mined."""
        return self.wrong if self.detection == "wrong" else self.score > self.threshold
