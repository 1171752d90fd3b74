"""Neuron differentiation: two masks cut one network into a sub-model of the shortcut, B, and one of the rest, A.

Formula. (1) Warm-up: a student is trained by ``GCE(p) = (1 - p_y^q) / q``. The samples that it gets wrong are D_a, the
others D_b. (2) Its weights are Theta, or with ``theta: cross-entropy`` those of a fresh student trained so. (3) A
round, up to ``rounds`` times or until it moves no sample: with Theta fixed, masks m_a and m_b are learnt by
``GCE(D_a; Theta m_a) + GCE(D_b; Theta m_b) + iou_weight IoU(m_a, m_b) + size_weight (size m_a + size m_b)``; both
sub-models are fine-tuned under the hard masks by cross-entropy; what A or B gets wrong is assigned anew. A is trained
on draws in which a sample of D_a weighs ``(C - 1) / share of D_a``, any other 1; B on D_b alone. C: classes.
With ``detection: epoch-ensemble`` the warm-up mines D_a as ``dcwp`` does, by ``confidence`` and ``threshold``, as the
paper does for corrupted CIFAR-10 (0.05 and 0.8) and faces (0.7).

Source. Niu, Wu, Li, Li & Zhao, Rectifying shortcut learning via cellular differentiation in deep learning neurons,
equations 4 to 6, algorithm 1 and section 4.1. Lengths are those for coloured MNIST in epochs of its 55,000
images: 2,000 steps of warm-up are 9 epochs, 2,000 of masks 3 rounds of 3 (samples are assigned anew every 3 epochs),
and the 10,000 of stage (2) are the run's own ``training``. On small data give more epochs.

What the paper leaves open, each a setting. Where a reason is measured, it is on 8,000 coloured digits with 0.5 to 5 %
conflicting ones, in single runs with test data in sight, and differences of five points there are noise.
``warm_up_lr`` 0.01 is the paper's. What the warm-up has not learned yet counts as conflicting, so give it a rate and
epochs that learn the shortcut (in docs/results 0.01 mined with precision 0.13 after 300 steps, 0.05 with 1.0).
``granularity`` weights: the paper speaks of neurons, but its size term sums weights, and the code it builds on (DCWP,
Park et al., 2023, https://arxiv.org/abs/2210.05247) masks weights; masks of channels hardly came apart.
``start`` 0, each logit's first value: with DCWP's 1.5 masks kept nearly everything and never beat the controls below.
``temperature`` 1 and ``samples`` hard (0 or 1, straight-through) are DCWP's; soft: the relaxed draws themselves.
``iou_of`` probabilities: sigmoid(z), which draws no noise; samples: of the drawn masks. ``iou_over`` network: one ratio
of sums; layers: the mean of the layers' ratios, in which small layers count as much. ``iou_weight`` 1 is the paper's;
0 lost about 6 points. As a ratio it weighs more the fewer weights there are: among a few hundred it empties layers.
``size_of`` masks: the expected number of kept weights; the paper's ``lambda sum |theta_i|`` over a mask may also mean
weights (their absolute sum) or logits (their signed sum, DCWP's code). At the paper's 1e-8 none of them is felt.
``theta`` warm-up: masks over the warmed-up student, as algorithm 1 reads, and the run's own length is then not used;
cross-entropy: as section 4.1 trains it. The first, chosen on seed 0, was 13.6 ± 6.1 points of shift better than as many
steps without masks on five fresh seeds of 4,000 digits of which 1 % conflict; on all garments of Fashion-MNIST both
are alike, and 0.5 to 4 points ahead of no masks, mostly within chance (docs/results).
``fine_tuning`` apart: each sub-model on its own copy of Theta, anew in each round, so that the controls below differ
in their masks alone; together: both losses train one Theta that later rounds go on with (one model all the time, as
the paper says): no worse. ``fine_tune_lr`` null: ``training.lr``; a tenth of it was worse. ``fine_tune_epochs`` 5 are
DCWP's 1,000 steps.
``reassignment`` guarded: a sample leaves D_b where B gets it wrong, and D_a only where A is wrong and B right; literal:
wherever its own sub-model is wrong, which sends what neither learns to and fro.
``predict_with`` a: the paper speaks of a collective decision, but its figures treat A as the model of the target. The
mean of both models' probabilities, and the more confident of the two, followed B's shortcut. Whatever is chosen, all
four are reported, as the models sub-a, sub-b, sub-mean and sub-confident; heatmaps and the export are A's.

Controls. ``masks: none`` is reweighting alone: the same fine-tuning steps on the same draws without masks (add
``mask_epochs`` to ``fine_tune_epochs`` for as many steps in all); ``theta: warm-up`` with it was the strongest control.
``masks: random`` learns masks and then shuffles the entries of each layer's: as dense, layer by layer.

Deviations. One batch serves both sub-models: it is drawn by the mean of their two distributions, and a coin gives each
sample to A or B by its odds, which is a draw of about half a batch from each. Each sub-model has batch statistics of
its own; through one set, two masks would spoil each other's. Samples that do not fill a batch of the stages that only
look (split and reassign; fewer than eight, mostly none) stay where they are. In validation the loss is the judged
model's cross-entropy. A sub-model waits where a batch has fewer than two samples for it. Where D_a is empty, A is
trained as by ERM. An epoch ensemble judges samples right after each step that they took part in, and needs no look.

Selection. Of several stages only the last one's checkpoints are the method's; ``selection: last`` takes what the rounds
end with.

Supervision. Labels.

Cost. A warm-up of ``warm_up_epochs``, with ``theta: cross-entropy`` ERM too, and per round ``mask_epochs`` and
``fine_tune_epochs`` of about ERM's steps and a look at the training data by two networks; memory for three networks and
four masks.
"""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Drawer, Draws, Method, Setup, Stage
from hansfree.errors import UserError
from hansfree.masks import (
    Granularity,
    Masks,
    Named,
    Over,
    cut,
    iou,
    iou_by_layer,
    masked_call,
    reserved,
    shares,
    shuffled,
)
from hansfree.methods.conflict_mining import Detection, Mining
from hansfree.methods.gce import generalised_cross_entropy
from hansfree.methods.groups import gathered, judged_logits

SizeOf = Literal["masks", "weights", "logits"]
CONSTANT: Mapping[str, Any] = {"schedule": "constant", "warmup": 0.0}
STILL: Mapping[str, Any] = {"epochs": 1, "optimiser": "sgd", "momentum": 0.0, "weight_decay": 0.0, **CONSTANT}
"""Settings by which a gradient of zero moves nothing: for stages that only look at the data."""


@final
class NeuronDifferentiation(Method):
    """Cut a network in two by masks, and judge the part that learns what the shortcut gets wrong."""

    in_a: Tensor
    wrong_a: Tensor
    wrong_b: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        detection: Detection = "wrong",
        q: float = 0.7,
        confidence: float = 0.05,
        threshold: float = 0.8,
        warm_up_epochs: int = 9,
        warm_up_lr: float = 0.01,
        theta: Literal["warm-up", "cross-entropy"] = "warm-up",
        masks: Literal["learned", "random", "none"] = "learned",
        granularity: Granularity = "weights",
        start: float = 0.0,
        temperature: float = 1.0,
        samples: Literal["hard", "soft"] = "hard",
        iou_weight: float = 1.0,
        iou_of: Literal["probabilities", "samples"] = "probabilities",
        iou_over: Over = "network",
        size_weight: float = 1e-8,
        size_of: SizeOf = "masks",
        mask_epochs: int = 3,
        mask_lr: float = 0.01,
        fine_tuning: Literal["apart", "together"] = "apart",
        fine_tune_epochs: int = 5,
        fine_tune_lr: float | None = None,
        rounds: int = 3,
        reassignment: Literal["guarded", "literal"] = "guarded",
        predict_with: Literal["a", "b", "mean", "confident"] = "a",
    ) -> None:
        super().__init__(setup)
        if min(warm_up_epochs, mask_epochs, fine_tune_epochs, rounds) < 1:
            raise UserError("method.warm_up_epochs, mask_epochs, fine_tune_epochs and rounds must be at least 1.")
        if min(warm_up_lr, mask_lr, temperature, 1.0 if fine_tune_lr is None else fine_tune_lr) <= 0:
            raise UserError("method.warm_up_lr, mask_lr, fine_tune_lr and temperature must be above 0.")
        if min(iou_weight, size_weight) < 0:
            raise UserError("method.iou_weight and method.size_weight must not be negative.")
        if masks == "none" and fine_tuning == "together":
            raise UserError(
                "With method.masks: none, method.fine_tuning: together would train the same weights for both parts of "
                "the data; use fine_tuning: apart."
            )
        self.q, self.masks, self.temperature, self.samples = q, masks, temperature, samples
        self.warm_up_epochs, self.warm_up_lr, self.theta = warm_up_epochs, warm_up_lr, theta
        self.iou_weight, self.iou_of, self.size_weight = iou_weight, iou_of, size_weight
        self.iou_over: Over = iou_over
        self.size_of: SizeOf = size_of
        self.mask_epochs, self.mask_lr = mask_epochs, mask_lr
        self.fine_tuning, self.fine_tune_epochs, self.fine_tune_lr = fine_tuning, fine_tune_epochs, fine_tune_lr
        self.reassignment, self.predict_with = reassignment, predict_with
        self.mining = Mining(setup.samples, detection, q=q, confidence=confidence, threshold=threshold)
        self.stages = stages(theta, masks != "none", rounds, looks=detection == "wrong")
        self.trainable = {name for name, parameter in self.student.named_parameters() if parameter.requires_grad}
        self.trained = deepcopy(self.student).requires_grad_(False)
        """Theta; the student is sub-model A from the first round on."""
        self.sub_b = deepcopy(self.student).requires_grad_(False)
        self.masks_a = Masks(self.student, granularity, start).requires_grad_(False)
        self.masks_b = Masks(self.student, granularity, start).requires_grad_(False)
        for name in ("in_a", "wrong_a", "wrong_b"):
            self.register_buffer(name, torch.zeros(setup.samples, dtype=torch.bool))

    @property
    def phase(self) -> str:
        """What kind of stage it is in: warm-up, split, train, masks, fine-tune or reassign; done after the last."""
        done = int(self.stages_done)
        return self.stages[done].split()[0] if done < len(self.stages) else "done"

    def sub_models(self) -> Iterator[tuple[str, nn.Module, Masks]]:
        """A and B: name, network, masks."""
        yield "a", self.student, self.masks_a
        yield "b", self.sub_b, self.masks_b

    # Stages

    def next_stage(self) -> Stage | None:
        """The warm-up and its look at the data, the training, then rounds of masks, fine-tuning and a look."""
        if self.phase == "done":
            return None
        self.requires_grad_(False)
        groups = self._groups()
        for group in groups.values():
            for parameter in group:
                parameter.requires_grad_(True)
        drawn = torch.stack(distributions(self.in_a, self._setup.classes)).mean(0)
        weights = drawn if self.phase in ("masks", "fine-tune") else None
        return Stage(self.stages[int(self.stages_done)], groups, self._overrides(), weights=weights)

    def _groups(self) -> dict[str, tuple[nn.Parameter, ...]]:
        if self.phase == "masks":
            return {f"mask {name}": tuple(masks.parameters()) for name, _, masks in self.sub_models()}
        if self.phase == "fine-tune" and self.fine_tuning == "together":
            return {"network": self._weights(self.trained)}
        if self.phase == "fine-tune":
            return {f"sub-{name}": self._weights(network) for name, network, _ in self.sub_models()}
        return {"network": self._weights(self.student)}

    def _weights(self, network: nn.Module) -> tuple[nn.Parameter, ...]:
        return tuple(parameter for name, parameter in network.named_parameters() if name in self.trainable)

    def _overrides(self) -> dict[str, Any]:
        match self.phase:
            case "warm-up":
                own = {"epochs": self.warm_up_epochs, "optimiser": "sgd", "momentum": 0.9, "lr": self.warm_up_lr}
                return {**CONSTANT, **own}
            case "split" | "reassign":
                return {**STILL, "batch_size": least_remainder(self._setup.samples)}
            case "masks":
                own = {"optimiser": "adam", "momentum": 0.9, "weight_decay": 0.0, "clip": None, "adaptive_clip": None}
                return {**CONSTANT, **own, "epochs": self.mask_epochs, "lr": self.mask_lr}
            case "fine-tune":
                own = {} if self.fine_tune_lr is None else {"lr": self.fine_tune_lr}
                return {**CONSTANT, "epochs": self.fine_tune_epochs, **own}
            case _:
                return {}

    def finish_stage(self) -> None:
        """Assign the samples, begin with a fresh student, shuffle masks, or end where nothing changed any more."""
        phase = self.phase
        super().finish_stage()
        ensemble = self.mining.detection == "epoch-ensemble"
        mined = phase == ("warm-up" if ensemble else "split")
        if mined:
            found = self.mining.conflicting() if ensemble else self.wrong_a
            self._assign(found, "raise method.warm_up_epochs or method.warm_up_lr")
        if mined and self.theta == "cross-entropy":
            # From the global generator, whose state every checkpoint of the look restores.
            self.student.load_state_dict(self._setup.student().state_dict())
        elif mined or phase == "train":
            self.trained.load_state_dict(self.student.state_dict())
            self.sub_b.load_state_dict(self.student.state_dict())
        elif phase == "masks" and self.masks == "random":
            for _, _, masks in self.sub_models():
                masks.keep(shuffled(masks.kept))
            self._cut()
        elif phase == "reassign":
            self._end_round()

    def _end_round(self) -> None:
        before = self.in_a
        after = reassigned(before, self.wrong_a, self.wrong_b, guarded=self.reassignment == "guarded")
        self._assign(after, "raise method.fine_tune_epochs, or lower method.iou_weight if masks keep next to nothing")
        if torch.equal(before, self.in_a):
            self.stages_done = torch.full_like(self.stages_done, len(self.stages))
        elif self.fine_tuning == "apart":
            self.student.load_state_dict(self.trained.state_dict())
            self.sub_b.load_state_dict(self.trained.state_dict())

    def _assign(self, in_a: Bool[Tensor, "samples"], remedy: str) -> None:
        if in_a.all():
            raise UserError(
                "neuron-differentiation has no training sample left that the shortcut explains, because all were "
                f"answered wrongly or doubted; {remedy}."
            )
        self.in_a = in_a.clone()

    def _cut(self) -> None:
        for _, network, masks in self.sub_models():
            cut(network, self.trained, masks.kept)

    # Steps

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The stage's terms; in evaluation ``{"label": the judged model's cross-entropy}``."""
        if not self.training:
            return {"label": F.cross_entropy(self.predict(batch.images), batch.label)}
        match self.phase:
            case "warm-up":
                return {"mining": self.mining.loss(self.student(batch.images), batch)}
            case "masks":
                return self._mask_terms(batch)
            case "fine-tune":
                return self._fine_tune_terms(batch)
            case "train" | "done":
                return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
            case _:  # a look: the loop wants a gradient, and this one is zero
                return {"look": 0 * torch.stack([p.sum() for p in self._weights(self.student)]).sum()}

    def _mask_terms(self, batch: Batch) -> dict[str, Tensor]:
        parts, drawn, terms = self.shared_out(batch), dict[str, Named](), dict[str, Tensor]()
        for name, network, masks in self.sub_models():
            drawn[name] = masks.sample(self.temperature, hard=self.samples == "hard")
            terms[f"gce_{name}"] = self._part_loss(network, self.trained, drawn[name], *parts[name])
        learnt = {name: masks for name, _, masks in self.sub_models()}
        compared = {n: m.probabilities for n, m in learnt.items()} if self.iou_of == "probabilities" else drawn
        terms["iou"] = self.iou_weight * iou(compared["a"], compared["b"], self.iou_over)
        sizes = [size(masks, self.trained, self.size_of) for masks in learnt.values()]
        return {**terms, "size": self.size_weight * torch.stack(sizes).sum()}

    def _fine_tune_terms(self, batch: Batch) -> dict[str, Tensor]:
        parts, terms = self.shared_out(batch), dict[str, Tensor]()
        for name, network, masks in self.sub_models():
            weights = network if self.fine_tuning == "apart" else self.trained
            terms[f"label_{name}"] = self._part_loss(network, weights, masks.kept, *parts[name])
        return terms

    def _part_loss(self, network: nn.Module, weights: nn.Module, masks: Named, images: Tensor, label: Tensor) -> Tensor:
        """GCE while masks are learnt, cross-entropy in fine-tuning; 0 where batch statistics would be of one sample."""
        if len(label) < 2:
            return images.new_zeros(())
        logits = masked_call(network, weights, masks, images)
        if self.phase == "masks":
            return generalised_cross_entropy(logits, label, self.q).mean()
        return F.cross_entropy(logits, label)

    def shared_out(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and labels for A and for B: a coin gives each sample to A by the odds that it was drawn for A."""
        for_a, for_b = (p[batch.index] for p in distributions(self.in_a, self._setup.classes))
        coin = self.draws(Coins(), batch)["coin"]
        mine = coin < for_a / (for_a + for_b)
        return {name: (batch.images[part], batch.label[part]) for name, part in (("a", mine), ("b", ~mine))}

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Note who is wrong or doubted; else keep both sub-models what they are: Theta under hard masks."""
        match self.phase:
            case "warm-up" if self.mining.detection == "epoch-ensemble":
                self.mining.observe(self.student, batch)
            case "split":
                self.wrong_a = noted(self.wrong_a, self.student, batch)
            case "reassign":
                self.wrong_a = noted(self.wrong_a, self.student, batch)
                self.wrong_b = noted(self.wrong_b, self.sub_b, batch)
            case "masks":
                self.masks_a.harden()
                self.masks_b.harden()
                self._cut()
            case "fine-tune" if self.fine_tuning == "together":
                self._cut()
            case _:
                pass

    # What it tells

    def mined(self) -> Bool[Tensor, "samples"]:
        """D_a."""
        return self.in_a

    def by_layer(self) -> dict[str, dict[str, float]]:
        """The share of weights that A and B keep, and the IoU of both masks, from the first round on."""
        if self.masks == "none" or self._is_whole:
            return {}
        a, b = self.masks_a.kept, self.masks_b.kept
        both = iou_by_layer(*({name: mask.float() for name, mask in kept.items()} for kept in (a, b)))
        return {"kept by A": shares(reserved(a)), "kept by B": shares(reserved(b)), "IoU of A and B": shares(both)}

    def networks(self) -> dict[str, nn.Module]:
        """Both sub-models, and Theta where it is still what cross-entropy made of it."""
        if self._is_whole:
            return {"student": self.student}
        untouched = self.theta == "cross-entropy" and self.fine_tuning == "apart"
        return {"sub-a": self.student, "sub-b": self.sub_b, **({"vanilla": self.trained} if untouched else {})}

    # Predictions

    @property
    def _is_whole(self) -> bool:
        """Whether there is one student yet, and not two sub-models."""
        return self.phase in ("warm-up", "split", "train")

    def predict(self, input: Tensor) -> Float[Tensor, "b classes"]:
        """Logits of A, of B or of both together, by ``predict_with``; of the one student before there are two."""
        return self.student(input) if self.predict_with == "a" else self.predictions(input)["student"]

    def predictions(self, input: Tensor) -> dict[str, Tensor]:
        """``student``, as :meth:`predict`, and once there are two sub-models all four ways to predict with them."""
        if self._is_whole:
            return {"student": self.student(input)}
        a, b = self.student(input), self.sub_b(input)
        every = {"a": a, "b": b, "mean": mean_of(a, b), "confident": more_confident(a, b)}
        return {"student": every[self.predict_with], **{f"sub-{name}": logits for name, logits in every.items()}}


@final
class Coins(Drawer):
    """Who takes a sample, by a number in [0, 1)."""

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """``{"coin"}``, [count]."""
        return {"coin": torch.rand(count, generator=generator)}


def stages(
    theta: Literal["cross-entropy", "warm-up"], masks: bool, rounds: int, *, looks: bool = True
) -> tuple[str, ...]:
    """The names of all stages, in order; the last round is not looked at, as nothing follows it.

    ``looks``: whether the warm-up is followed by a look at the training data.
    """
    kinds = ("masks", "fine-tune", "reassign") if masks else ("fine-tune", "reassign")
    every = [f"{kind} {number}" for number in range(1, rounds + 1) for kind in kinds]
    return ("warm-up", *(("split",) if looks else ()), *(("train",) if theta == "cross-entropy" else ()), *every[:-1])


def distributions(in_a: Bool[Tensor, "n"], classes: int) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """How likely each training sample is drawn for A and for B: see the formula above."""
    for_a = torch.where(in_a, (classes - 1) / in_a.float().mean(), 1.0)
    for_b = (~in_a).float()
    return for_a / for_a.sum(), for_b / for_b.sum()


def reassigned(
    in_a: Bool[Tensor, "n"], wrong_a: Bool[Tensor, "n"], wrong_b: Bool[Tensor, "n"], *, guarded: bool
) -> Bool[Tensor, "n"]:
    """Who is in D_a next; guarded: a sample that both get wrong stays there."""
    leaves = wrong_a & ~wrong_b if guarded else wrong_a
    return torch.where(in_a, ~leaves, wrong_b)


def size(masks: Masks, weights: nn.Module, of: SizeOf) -> Float[Tensor, ""]:
    """The size term of one sub-model: see ``size_of`` above."""
    values: Named = masks.logits if of == "logits" else masks.probabilities
    if of == "weights":
        own = dict(weights.named_parameters())
        values = {name: value * own[name].detach().abs() for name, value in values.items()}
    return torch.stack([value.sum() for value in values.values()]).sum()


def mean_of(a: Float[Tensor, "b classes"], b: Float[Tensor, "b classes"]) -> Float[Tensor, "b classes"]:
    """The logarithm of the mean of both probabilities."""
    return torch.stack([a.log_softmax(1), b.log_softmax(1)]).logsumexp(0) - math.log(2)


def more_confident(a: Float[Tensor, "b classes"], b: Float[Tensor, "b classes"]) -> Float[Tensor, "b classes"]:
    """Of each sample the logits whose highest probability is higher; A's where they are equal."""
    surer = a.softmax(1).amax(1) >= b.softmax(1).amax(1)
    return torch.where(surer[:, None], a, b)


def noted(wrong: Bool[Tensor, "n"], network: nn.Module, batch: Batch) -> Bool[Tensor, "n"]:
    """``wrong`` with what ``network`` gets wrong in ``batch``."""
    now = judged_logits(network, batch).argmax(1) != batch.label
    return wrong.index_copy(0, gathered(batch.index), gathered(now))


def least_remainder(samples: int) -> int:
    """The batch size, of multiples of 8 up to 256, that leaves the fewest samples over; of equal ones the largest."""
    return min(range(8, 257, 8), key=lambda size: (samples % size, -size))
