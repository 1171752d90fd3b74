"""The one training loop: a generator that yields a Step after each step, and can be taken up anywhere.

::

    while stage := method.next_stage():          method decides what is trained next
        for batch in split:                      seeded order, shared out over processes
            terms = method(batch)                named losses, their sum is minimised
            backward, clip per group, optimiser and schedule step
            method.observe(batch, terms)         state per sample, memory banks ...
            yield Step                           the caller validates, saves, draws
        method.finish_stage()
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

from hansfree.config import Schema, parse
from hansfree.core import Batch, Benchmark, Method, Split, Stage
from hansfree.errors import DivergenceError, UserError

Snapshot = dict[str, Any]


class Training(Schema):
    """How the loop minimises. A stage of a method may override any of it."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training split; or give ``steps``."""
    steps: int | None = Field(default=None, ge=0)
    """0: none, for the figures of a student as it is before training."""
    batch_size: int = Field(default=128, ge=1)
    """Over all processes together."""
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's momentum, Adam's first beta."""
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "step", "cosine", "one-cycle"] = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises (one-cycle: 0 stands for its usual 0.3)."""
    milestones: tuple[int, ...] = ()
    """Epochs at which ``schedule: step`` multiplies the learning rate by ``gamma``."""
    gamma: float = Field(default=0.1, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm of each parameter group; null: no clipping."""
    adaptive_clip: float | None = Field(default=None, gt=0)
    """Largest ratio of the gradient norm of a unit to the norm of its weights, as B-cos networks are trained: 0.01
    (adaptive gradient clipping, Brock et al., 2021, https://arxiv.org/abs/2102.06171); null: none. After ``clip``."""
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_every: int = Field(default=1, ge=1)
    """Epochs between validations."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: one per epoch."""
    workers: int = Field(default=0, ge=0)
    """Processes that read batches."""

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps and set the other to null")
        return self

    @model_validator(mode="after")
    def _milestones(self) -> Self:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule: step needs milestones, such as milestones: [10, 20]")
        return self

    def total_steps(self, per_epoch: int) -> int:
        """Steps of a stage. Raises ``UserError`` where neither epochs nor steps are given."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise UserError("training needs a length; set training.epochs or training.steps.")
        return self.epochs * per_epoch


OF_THE_RUN = frozenset({"validate_every", "save_every"})
"""Training settings that hold for all stages."""


@dataclass(frozen=True)
class Step:
    """What happened in one step, and where a later process could go on."""

    stage: str
    step: int
    """Steps done in this stage, this one included."""
    steps: int
    epoch: int
    epoch_ends: bool
    terms: Mapping[str, float]
    lr: Mapping[str, float]
    grad_norm: Mapping[str, float]
    snapshot: Callable[[], Snapshot]
    """A copy of the whole training state, to be asked for before the next step and given to ``fit(resume=...)``."""

    @property
    def loss(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())


def fit(
    method: Method,
    benchmark: Benchmark,
    training: Training,
    *,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    resume: Snapshot | None = None,
) -> Iterator[Step]:
    """Train ``method`` until it has no next stage; yields after each step.

    With ``resume``, a snapshot of an earlier step, the remaining steps are the same to the bit on one device.
    Raises ``DivergenceError`` when a loss term or a gradient is not a number, naming step and term.
    """
    accelerator = accelerator or make_accelerator()
    if resume is None:
        seed_everything(seed + accelerator.process_index)
    else:
        method.load_state_dict(resume["method"])
        for name, state in method.apart().items():
            state.copy_(resume["apart"][name])
    method.place(accelerator.device)
    while (stage := method.next_stage()) is not None:
        yield from _fit_stage(method, benchmark.split(stage.split), stage, training, seed, accelerator, resume)
        resume = None
        method.finish_stage()


def _fit_stage(
    method: Method,
    split: Split,
    stage: Stage,
    training: Training,
    seed: int,
    accelerator: Accelerator,
    resume: Snapshot | None,
) -> Iterator[Step]:
    training = _of_stage(training, stage)
    batch_size = min(training.batch_size, len(split))
    if batch_size % accelerator.num_processes:
        raise UserError(
            f"training.batch_size: {batch_size} samples cannot be shared out equally over "
            f"{accelerator.num_processes} processes; choose a multiple of {accelerator.num_processes}."
        )
    per_epoch = len(split) // batch_size
    steps = training.total_steps(per_epoch)
    if steps == 0:
        return
    groups = parameter_groups(method, stage)
    optimiser = make_optimiser(groups, training)
    schedule = make_schedule(optimiser, training, steps, per_epoch)
    wrapped, prepared = accelerator.prepare(method, optimiser)
    # Accelerate could do this too, but it keeps one precision for all of a process's life.
    precision = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=training.precision == "bf16")
    step = 0
    if resume is not None:
        optimiser.load_state_dict(copy.deepcopy(resume["optimiser"]))  # or it would go on in the snapshot's tensors
        schedule.load_state_dict(resume["schedule"])
        step = resume["step"]
        if accelerator.is_main_process:
            restore_random_state(resume["random"])
        else:  # the snapshot is the main process's; the others must not repeat its draws
            seed_everything(_mixed(seed, step, accelerator.process_index) % 2**32)

    def snapshot() -> Snapshot:
        state = {
            "method": method.state_dict(),
            "apart": method.apart(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "random": random_state(),
            "step": step,
        }
        return copy.deepcopy(state)  # the next step changes these tensors in place

    stage_seed = _mixed(seed, int(method.stages_done))
    while step < steps:
        epoch, done = divmod(step, per_epoch)
        order = batches(len(split), batch_size, _mixed(stage_seed, epoch), stage.weights)[done : done + steps - step]
        for batch in _loader(split, order, training.workers, accelerator):
            method.train()
            with precision:
                terms = wrapped(batch.to(accelerator.device))
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            values = _checked_terms(terms, stage, step + 1)
            lr = {name: group["lr"] for name, group in zip(groups, optimiser.param_groups)}
            accelerator.backward(loss)
            norms = {
                name: _checked_norm(accelerator, parameters, training.clip, name, stage, step + 1)
                for name, parameters in groups.items()
            }
            if training.adaptive_clip is not None:
                clip_adaptively([p for group in groups.values() for p in group], training.adaptive_clip)
            prepared.step()
            schedule.step()
            method.zero_grad()  # of every parameter, those outside of the groups too: a later stage may train them
            method.observe(batch, terms)
            step += 1
            ends = step % per_epoch == 0 or step == steps
            yield Step(stage.name, step, steps, (step - 1) // per_epoch, ends, values, lr, norms, snapshot)


def _of_stage(training: Training, stage: Stage) -> Training:
    """The settings of one stage; a length of its own, in epochs or in steps, replaces the run's.

    Raises ``UserError`` for a setting that is no stage's own.
    """
    if not stage.overrides:
        return training
    if of_run := sorted(OF_THE_RUN & stage.overrides.keys()):
        raise UserError(
            f"stage {stage.name!r} of the method changes {' and '.join(of_run)}, which holds for a whole run; leave it "
            "out of the stage's overrides and set it under training."
        )
    base = training.model_dump(exclude={"epochs", "steps"} if {"epochs", "steps"} & stage.overrides.keys() else None)
    return parse(Training, {**base, **stage.overrides}, f"stage {stage.name!r}")


def make_accelerator(*, device: str | None = None) -> Accelerator:
    """One process or several (torchrun, accelerate launch), on ``device`` (default: the fastest there is)."""
    if device is not None:
        _claim_device(device)
    cpu = device == "cpu"
    if PartialState._shared_state.get("_cpu", cpu) != cpu:  # Accelerate would keep the device of an earlier run
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=cpu,
        mixed_precision="no",
        # Input-gradient losses leave biases without a gradient in some steps.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _claim_device(name: str) -> None:
    """Make ``name`` the device that Accelerate will find. Raises ``UserError`` for one that is not there."""
    kind, _, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or not (number or "0").isdigit() or int(number or 0) >= there[kind]:
        raise UserError(f"The device {name!r} is not there; leave out --device or use --device cpu.")
    if kind == "cuda":
        torch.cuda.set_device(int(number or 0))


def parameter_groups(method: Method, stage: Stage) -> dict[str, tuple[nn.Parameter, ...]]:
    """The stage's groups, or one of everything that requires a gradient. Raises ``UserError`` if that is nothing."""
    groups = dict(stage.groups) or {stage.name: tuple(p for p in method.parameters() if p.requires_grad)}
    for name, parameters in groups.items():
        if not parameters:
            raise UserError(f"There is nothing to train in the parameter group {name!r} of stage {stage.name!r}.")
    return groups


def make_optimiser(groups: Mapping[str, Sequence[nn.Parameter]], training: Training) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over ``groups``."""
    parameters = [{"params": list(group)} for group in groups.values()]
    lr, decay = training.lr, training.weight_decay
    if training.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=training.momentum, weight_decay=decay)
    kind = torch.optim.Adam if training.optimiser == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, betas=(training.momentum, 0.999), weight_decay=decay)


def clip_adaptively(parameters: Iterable[nn.Parameter], ratio: float) -> None:
    """Shorten each unit's gradient g to at most ``ratio * max(|w|, 0.001)``, w being the unit's weights.

    A unit is a row of a matrix, or a filter of a convolution: what makes one output. A vector is one unit.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            longest = ratio * _unit_norms(parameter.detach()).clamp_min(1e-3)
            norms = _unit_norms(parameter.grad)
            parameter.grad.mul_(torch.where(norms > longest, longest / norms, 1.0))


def _unit_norms(values: Tensor) -> Tensor:
    if values.ndim < 2:
        return values.norm()
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.ndim - 1))


def make_schedule(
    optimiser: torch.optim.Optimizer, training: Training, steps: int, per_epoch: int
) -> lr_scheduler.LRScheduler:
    """The learning rate over ``steps`` steps, stepped after each of them."""
    if training.schedule == "one-cycle":
        rise = max(training.warmup or 0.3, 2 / (steps + 1))  # torch divides by zero where the first step is the peak
        return lr_scheduler.OneCycleLR(
            optimiser, training.lr, total_steps=steps + 1, pct_start=rise, cycle_momentum=False
        )
    warm = round(training.warmup * steps)
    milestones = [epoch * per_epoch for epoch in training.milestones]

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if training.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2
        if training.schedule == "step":
            return training.gamma ** sum(step >= milestone for milestone in milestones)
        return 1.0

    return lr_scheduler.LambdaLR(optimiser, factor)


# The order of samples and random state ------------------------------------------------------------------------


def batches(samples: int, batch_size: int, seed: int, weights: Tensor | None = None) -> list[tuple[Tensor, int]]:
    """The batches of one epoch: indices, and the seed of whatever is redrawn in that batch.

    A permutation, or draws with replacement in proportion to ``weights``; an incomplete last batch is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    if weights is None:
        order = torch.randperm(samples, generator=generator)
    else:
        order = torch.multinomial(weights.double().cpu(), samples, replacement=True, generator=generator)
    full = [index for index in order.split(batch_size) if len(index) == batch_size]
    return [(index, _mixed(seed, number)) for number, index in enumerate(full)]


class _ByBatch(Dataset[Batch]):
    """A split as torch's loader wants it: what the batch sampler yields is one whole batch."""

    def __init__(self, split: Split, rank: int, processes: int) -> None:
        self.split, self.rank, self.processes = split, rank, processes

    def __getitem__(self, item: tuple[Tensor, int]) -> Batch:
        index, seed = item
        share = index.tensor_split(self.processes)[self.rank]
        return self.split.batch(share, torch.Generator().manual_seed(_mixed(seed, self.rank)))


def _loader(split: Split, order: list[tuple[Tensor, int]], workers: int, accelerator: Accelerator) -> DataLoader[Batch]:
    return DataLoader(
        _ByBatch(split, accelerator.process_index, accelerator.num_processes),
        sampler=order,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # keeps torch's global random state out of it, so that resuming finds it unmoved
    )


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random generator, in a form that is read back without unpickling code."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo what happened to the random generators since :func:`random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])


# Numbers that are not -----------------------------------------------------------------------------------------


def _checked_terms(terms: Mapping[str, Tensor], stage: Stage, step: int) -> dict[str, float]:
    values = {name: term.item() for name, term in terms.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergenceError(f"The loss term {name!r} became {value} in step {step} of stage {stage.name!r}.")
    return values


def _checked_norm(
    accelerator: Accelerator,
    parameters: Sequence[nn.Parameter],
    clip: float | None,
    name: str,
    stage: Stage,
    step: int,
) -> float:
    norm = accelerator.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    value = float(norm) if norm is not None else 0.0
    if not math.isfinite(value):
        raise DivergenceError(
            f"The gradient of the group {name!r} became {value} in step {step} of stage {stage.name!r}."
        )
    return value
