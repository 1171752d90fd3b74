"""Debiased contrastive weight pruning: a sub-network is cut out of a biased network by mined conflicting samples.

Formula. (1) A biased network mines the conflicting samples M (see below). (2) A fresh student is trained by
cross-entropy. (3) Its weights w are fixed, and a logit pi per weight is learnt on draws in which a sample of M weighs
``mask_upweight``: ``CE(y, f(x; w m)) + c L_con + s sum pi``, with masks m drawn by the Gumbel-sigmoid, 0 or 1 with
straight-through gradients. (4) Weights with pi < 0 are cut, and the others are trained on by ``CE + c L_con``, a sample
of M weighing ``upweight``. With z the normalised input of the last layer and P(i) the other samples of i's class
that are in M,

    L_con = mean over i with P(i) of  - mean_{p in P(i)} log [e^(z_i z_p / T) / sum_{a != i} e^(z_i z_a / T)]

c is ``contrast_weight``, s ``size_weight``, T ``contrast_temperature``.

Mining. ``detection: wrong``: what the network, trained by GCE, gets wrong. ``epoch-ensemble``: a network is trained by
cross-entropy on samples whose label has a probability above ``confidence``; a sample is in M where its mean ``1 - p``
over the epochs is above ``threshold`` (Zhao et al., 2021, https://arxiv.org/abs/2111.13108, without their second
network). Samples are judged in evaluation mode right after each step that they took part in.

Source. Park, Lee, Lee & Ye, Training debiased subnetworks with contrastive weight pruning, CVPR 2023,
https://arxiv.org/abs/2210.05247, and its published code: start 1.5, temperature 0.07, weights 0.05 and 1e-8
(1e-9 for corrupted CIFAR-10 and faces), 80 while masks are learnt, and then 80, 50, 30 or 10 at 0.5, 1, 2 or 5 %
conflicting samples. Lengths are those for coloured MNIST in epochs of its 55,000 images: 2,000 steps of mining and of
masks are 9, 1,000 of training on are 5. On small data give more epochs.

Deviations. ``relaxation: double-sigmoid`` is the published code: what it gives to the Gumbel-sigmoid as a logit is
sigmoid(pi), so that a weight is kept with a probability between 0.50 and 0.73 whatever pi is, while pi >= 0 decides
in the end. ``concrete`` gives it pi itself, the relaxation that was meant. P(i) is what that code does; it computes "i
or p is in M" on vectors where columns were meant. Where no sample has a P(i), L_con is 0. Its biased network is trained
by cross-entropy with either way of mining, or by GCE, by its options; ours as above. Stage (4) is Adam.
``masks: none`` cuts nothing: the control, the same training on the same draws.

Selection. Of several stages only the last one's checkpoints are the method's.

Supervision. Labels.

Cost. ERM, and ``mining_epochs + mask_epochs + fine_tune_epochs`` of about ERM's steps.
"""

from collections.abc import Mapping
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup, Stage
from hansfree.errors import UserError, unknown
from hansfree.explainers.propagation import at_least_float32
from hansfree.masks import Masks, Named, cut, gumbel_sigmoid, logistic_noise, masked_call, reserved, shares
from hansfree.methods.conflict_mining import Detection, Mining
from hansfree.methods.distiller import last_layer
from hansfree.methods.matched_layers import Watched

Relaxation = Literal["double-sigmoid", "concrete"]
CONSTANT: Mapping[str, Any] = {"schedule": "constant", "warmup": 0.0}


def conflict_contrast(
    features: Float[Tensor, "b d"], label: Int[Tensor, "b"], conflicting: Bool[Tensor, "b"], temperature: float
) -> Float[Tensor, ""]:
    """L_con: see the formula above; 0 where no sample has a conflicting one of its class beside itself."""
    z = F.normalize(at_least_float32(features))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_share = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    positive = (label[:, None] == label) & conflicting & ~itself
    count = positive.sum(1)
    means = (log_share * positive).sum(1) / count.clamp(min=1)
    return -means.sum() / (count > 0).sum().clamp(min=1)


@final
class DCWP(Method):
    """Cut a network down to what conflicting samples need."""

    def __init__(
        self,
        setup: Setup,
        *,
        detection: Detection = "wrong",
        q: float = 0.7,
        confidence: float = 0.05,
        threshold: float = 0.8,
        mining_epochs: int = 9,
        mining_lr: float = 0.1,
        masks: Literal["learned", "none"] = "learned",
        relaxation: Relaxation = "double-sigmoid",
        start: float = 1.5,
        mask_epochs: int = 9,
        mask_lr: float = 0.01,
        mask_upweight: float = 80.0,
        size_weight: float = 1e-8,
        fine_tune_epochs: int = 5,
        fine_tune_lr: float = 0.001,
        upweight: float = 50.0,
        contrast_weight: float = 0.05,
        contrast_temperature: float = 0.07,
    ) -> None:
        super().__init__(setup)
        if relaxation not in get_args(Relaxation):
            raise unknown("relaxation", relaxation, get_args(Relaxation))
        if masks not in ("learned", "none"):
            raise unknown("masks", masks, ("learned", "none"))
        if min(mining_epochs, mask_epochs, fine_tune_epochs) < 1:
            raise UserError("method.mining_epochs, mask_epochs and fine_tune_epochs must be at least 1.")
        if min(mining_lr, mask_lr, fine_tune_lr, mask_upweight, upweight, contrast_temperature) <= 0:
            raise UserError(
                "method.mining_lr, mask_lr, fine_tune_lr, mask_upweight, upweight and contrast_temperature must be "
                "above 0."
            )
        if min(size_weight, contrast_weight) < 0:
            raise UserError("method.size_weight and contrast_weight must not be negative.")
        self.relaxation: Relaxation = relaxation
        self.mining_epochs, self.mining_lr = mining_epochs, mining_lr
        self.mask_epochs, self.mask_lr, self.mask_upweight = mask_epochs, mask_lr, mask_upweight
        self.fine_tune_epochs, self.fine_tune_lr, self.upweight = fine_tune_epochs, fine_tune_lr, upweight
        self.size_weight, self.contrast_weight = size_weight, contrast_weight
        self.contrast_temperature = contrast_temperature
        self.stages = ("mine", "train", *(("masks",) if masks == "learned" else ()), "fine-tune")
        self.trainable = tuple(parameter for parameter in self.student.parameters() if parameter.requires_grad)
        self.mining = Mining(setup.samples, detection, q=q, confidence=confidence, threshold=threshold)
        self.masks = Masks(self.student, start=start).requires_grad_(False)

    @property
    def phase(self) -> str:
        """Which stage it is in: mine, train, masks or fine-tune; done after the last."""
        done = int(self.stages_done)
        return self.stages[done] if done < len(self.stages) else "done"

    def next_stage(self) -> Stage | None:
        """Mining, training, masks, and training under the masks."""
        phase = self.phase
        if phase == "done":
            return None
        trained = tuple(self.masks.parameters()) if phase == "masks" else self.trainable
        self.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        weight = {"masks": self.mask_upweight, "fine-tune": self.upweight}.get(phase)
        weights = None if weight is None else torch.where(self.mining.conflicting(), weight, 1.0)
        return Stage(phase, {phase: trained}, self._overrides(phase), weights=weights)

    def _overrides(self, phase: str) -> dict[str, Any]:
        match phase:
            case "mine":
                own = {"epochs": self.mining_epochs, "lr": self.mining_lr, "optimiser": "sgd", "momentum": 0.9}
            case "masks":
                own = {"epochs": self.mask_epochs, "lr": self.mask_lr, "optimiser": "adam", "momentum": 0.9}
                own |= {"weight_decay": 0.0, "clip": None, "adaptive_clip": None}
            case "fine-tune":
                own = {"epochs": self.fine_tune_epochs, "lr": self.fine_tune_lr, "optimiser": "adam", "momentum": 0.9}
            case _:
                return {}
        return {**CONSTANT, **own}

    def finish_stage(self) -> None:
        """After mining a fresh student; after the masks the weights that are not kept are zero for good."""
        phase = self.phase
        super().finish_stage()
        if phase == "mine":
            # From the global generator, whose state every checkpoint of the mining restores.
            self.student.load_state_dict(self._setup.student().state_dict())
        elif phase == "masks":
            self.masks.harden()
            cut(self.student, self.student, self.masks.kept)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The stage's terms; in evaluation ``{"label": cross-entropy}``."""
        if not self.training or self.phase in ("train", "done"):
            return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
        if self.phase == "mine":
            return {"mining": self.mining.loss(self.student(batch.images), batch)}
        if self.phase == "fine-tune":
            return self._terms(batch, self.masks.kept)
        size = torch.stack([logits.sum() for logits in self.masks.logits.values()]).sum()
        return {**self._terms(batch, self.drawn()), "size": self.size_weight * size}

    def drawn(self) -> dict[str, Tensor]:
        """Masks of 0 and 1, drawn anew by the chosen relaxation."""
        logits = self.masks.logits
        given = {n: z.sigmoid() for n, z in logits.items()} if self.relaxation == "double-sigmoid" else logits
        return {name: gumbel_sigmoid(z, logistic_noise(z)) for name, z in given.items()}

    def _terms(self, batch: Batch, masks: Named) -> dict[str, Tensor]:
        watched = Watched(self.student, last=last_layer(self.student, "student"))
        seen = watched.seen(masked_call(watched.model, self.student, masks, batch.images))
        assert seen.embedding is not None
        mined = self.mining.conflicting()[batch.index]
        contrast = conflict_contrast(seen.embedding, batch.label, mined, self.contrast_temperature)
        return {"label": F.cross_entropy(seen.logits, batch.label), "contrast": self.contrast_weight * contrast}

    def mined(self) -> Bool[Tensor, "samples"]:
        """The samples that the biased network did not explain."""
        return self.mining.conflicting()

    def by_layer(self) -> dict[str, dict[str, float]]:
        """The share of weights that is kept, from the learning of masks on."""
        if "masks" not in self.stages or self.phase in ("mine", "train"):
            return {}
        return {"kept": shares(reserved(self.masks.hard))}

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """While mining, note what the biased network says."""
        if self.phase == "mine":
            self.mining.observe(self.student, batch)
