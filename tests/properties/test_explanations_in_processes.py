"""A loss on explanations in two processes has the gradient that it has in one.

The same file is the program of each process: ``python THIS_FILE RANK FOLDER`` trains a small network for three steps
with each case, in double precision over gloo, and writes what it found to FOLDER.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.core import Draws, Explainer
from hansfree.explainers import LRP, GradientXInput, InputGradient
from hansfree.training import make_accelerator

PROCESSES, SAMPLES, STEPS, RATE = 2, 8, 3, 0.05


class Network(nn.Module):
    """conv - batch norm - ReLU - max-pool - conv - batch norm - ReLU - linear, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2, self.fc = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        return self.fc(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


class ExplanationLoss(nn.Module):
    """What is wrapped for several processes: its forward pass returns the loss, so backward() is an ordinary one."""

    def __init__(self, explainer: Explainer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.explainer = Network().double(), explainer
        for module in self.student.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor, target: Tensor, wanted: Tensor, draws: Draws) -> Tensor:
        map = self.explainer(self.student, x, target, draws=draws or None).map
        return (map - wanted).square().sum((1, 2, 3)).mean()


Data = tuple[Tensor, Tensor, Tensor, Draws]


def data(explainer: Explainer, part: slice = slice(None)) -> Data:
    """The batch, or a part of it, with the draws of its samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(SAMPLES, 2, 10, 10, dtype=torch.double, generator=generator)
    wanted = 0.01 * torch.randn(x.shape, dtype=torch.double, generator=generator)
    draws = explainer.draw(SAMPLES, generator)
    return x[part], (torch.arange(SAMPLES) % 3)[part], wanted[part], {name: v[part] for name, v in draws.items()}


def share(rank: int, of: int = PROCESSES) -> slice:
    return slice(rank * SAMPLES // of, (rank + 1) * SAMPLES // of)


@dataclass(frozen=True)
class Case:
    """One loss, trained by one arrangement of processes."""

    explainer: Explainer
    training: bool = False
    wrapping: str = "accelerate"
    accumulate: int = 1
    options: dict[str, Any] = field(default_factory=dict)


EXPLAINER_CASES = {
    "lrp": LRP(0.05),
    "lrp, an epsilon per sample": LRP((0.01, 0.1)),
    "lrp without output factor": LRP(0.05, output_factor=False),
    "gradient": InputGradient(),
    "gradient-x-input": GradientXInput(),
}
CASES = {
    **{f"{name}, eval": Case(explainer) for name, explainer in EXPLAINER_CASES.items()},
    **{f"{name}, train": Case(explainer, training=True) for name, explainer in EXPLAINER_CASES.items()},
    "lrp, accumulated": Case(LRP(0.05), accumulate=2),
    "gradient, accumulated": Case(InputGradient(), accumulate=2),
    "lrp, plain DDP": Case(LRP(0.05), wrapping="ddp"),
    "gradient, plain DDP that expects unused biases": Case(
        InputGradient(), wrapping="ddp", options={"find_unused_parameters": True}
    ),
    "lrp, sharded": Case(LRP(0.05), wrapping="sharded"),
    "lrp, sharded, train": Case(LRP(0.05), training=True, wrapping="sharded"),
    "gradient-x-input, sharded": Case(GradientXInput(), wrapping="sharded"),
}
REFUSED = {
    "gradient, plain DDP": (Case(InputGradient(), wrapping="ddp"), "Expected to have finished reduction"),
    "lrp, synchronised batch norm on the CPU": (
        Case(LRP(0.05), training=True, options={"synchronised": True}),
        "SyncBatchNorm layers only work with GPU modules",
    ),
}


# In each of the processes ---------------------------------------------------------------------------------------


def train(case: Case, rank: int) -> dict[str, Tensor]:
    """Gradients of the first step and weights after the last, whole and by name."""
    loss = ExplanationLoss(case.explainer).train(case.training)
    options = dict(case.options)
    if options.pop("synchronised", False):
        loss.student = nn.SyncBatchNorm.convert_sync_batchnorm(loss.student)
    wrapped = wrap(loss, case.wrapping, options)
    optimiser = torch.optim.SGD(wrapped.parameters(), RATE)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        for micro in range(case.accumulate):
            last = micro + 1 == case.accumulate
            part = share(rank * case.accumulate + micro, PROCESSES * case.accumulate)
            with nullcontext() if last else wrapped.no_sync():
                (wrapped(*data(case.explainer, part)) / case.accumulate).backward()
        if step == 0:
            found |= {f"gradient of {name}": whole(p.grad, p) for name, p in loss.named_parameters()}
        optimiser.step()
        optimiser.zero_grad()
    return found | {name: whole(p, p) for name, p in loss.named_parameters()}


def wrap(loss: nn.Module, wrapping: str, options: dict[str, Any]) -> nn.Module:
    if wrapping == "accelerate":
        return make_accelerator(device="cpu").prepare(loss)
    if wrapping == "ddp":
        return nn.parallel.DistributedDataParallel(loss, **options)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(loss, mesh=init_device_mesh("cpu", (PROCESSES,)))


def whole(value: Tensor | None, like: Tensor) -> Tensor:
    value = torch.zeros_like(like) if value is None else value
    return getattr(value, "full_tensor", lambda: value)().detach().clone()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = (folder / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    found: dict[str, Any] = {name: train(case, rank) for name, case in CASES.items()}
    for name, (case, _) in REFUSED.items():
        try:
            train(case, rank)
        except (RuntimeError, ValueError) as error:
            found[name] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# In the test ----------------------------------------------------------------------------------------------------


def alone(case: Case) -> dict[str, Tensor]:
    """The same by one process.

    In evaluation mode on the whole batch at once. In training mode batch norm takes the statistics of the samples
    that a process has, with constant statistics too, so there it is the mean over the processes' parts.
    """
    loss = ExplanationLoss(case.explainer).train(case.training)
    optimiser = torch.optim.SGD(loss.parameters(), RATE)
    parts = [share(rank) for rank in range(PROCESSES)] if case.training else [slice(None)]
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        for part in parts:
            (loss(*data(case.explainer, part)) / len(parts)).backward()
        if step == 0:
            found |= {f"gradient of {name}": whole(p.grad, p) for name, p in loss.named_parameters()}
        optimiser.step()
        optimiser.zero_grad()
    return found | {name: p.detach() for name, p in loss.named_parameters()}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Iterator[list[dict[str, Any]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    shared = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        complaints = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, complaints[0][-3000:]
    yield [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradient_of_one(found, name):
    expected = alone(CASES[name])
    assert expected["gradient of student.conv1.weight"].any()
    for rank in range(PROCESSES):
        for key, value in expected.items():
            size = max(float(value.abs().max()), 1e-6)
            torch.testing.assert_close(found[rank][name][key], value, rtol=1e-12, atol=1e-12 * size, msg=key)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_says_so(found, name):
    for rank in range(PROCESSES):
        assert REFUSED[name][1] in found[rank][name]


def test_each_process_has_its_own_batch_statistics():
    """Why training mode is compared with the mean of parts: on the whole batch, the gradient is another."""
    explainer = LRP(0.05)
    loss = ExplanationLoss(explainer).train()
    loss(*data(explainer)).backward()
    expected = alone(CASES["lrp, train"])["gradient of student.conv1.weight"]
    assert (loss.student.conv1.weight.grad - expected).norm() > 0.01 * expected.norm()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
