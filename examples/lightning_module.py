"""Explanation distillation in Lightning:  python examples/lightning_module.py [--steps 300]

A method is a module whose forward pass gives named losses; its teacher is no submodule, so Lightning leaves it alone.
"""

import argparse
from functools import partial

import torch
from torch.utils.data import DataLoader

import hansfree
from hansfree.benchmarks import ColouredDigits
from hansfree.evaluation import predictions_of
from hansfree.methods import ERM, ExplanationDistillation
from hansfree.torchvision_guard import import_torchvision

import_torchvision()  # Lightning imports it; first here, so that one built for CUDA loads beside a torch for the CPU
import lightning  # noqa: E402


class LitMethod(lightning.LightningModule):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def on_fit_start(self):
        if "teacher" in self.method.needs:
            self.method.teacher.model.to(self.device)

    def training_step(self, batch, number):
        loss = sum(self.method(batch).values())
        if number % 50 == 0:
            print(f"{type(self.method).__name__}  step {self.global_step + 1}  loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def fit(method, split, steps):
    loader = DataLoader(range(len(split)), 32, shuffle=True, collate_fn=lambda index: split.batch(torch.tensor(index)))
    lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False).fit(LitMethod(method), loader)


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps
lightning.seed_everything(0)
digits, unbiased = ColouredDigits(), ColouredDigits(colouring="random", random_colours="vivid")
network = partial(hansfree.models.load_model, "small-cnn", num_classes=10, options={"norm": "scale"})
setup = partial(hansfree.Setup, network, samples=len(digits.split("train")), classes=10, input=digits.input)
expert = ERM(setup(teacher=None))
fit(expert, unbiased.split("train"), steps)
explainer = hansfree.explainers.LRP(epsilon=(0.01, 0.1), output_factor=False)
method = ExplanationDistillation(setup(teacher=hansfree.Teacher.live(expert.student)), explainer=explainer)
fit(method, digits.split("train"), steps)
for name in ("iid", "shift"):
    print(name, hansfree.metrics.accuracy(predictions_of(method, digits.split(name), 500, "cpu")))
