"""Explanation distillation in the Hugging Face Trainer:  python examples/hugging_face_trainer.py [--steps 300]

A method of hansfree is a module whose forward pass gives named losses. The Trainer wants one called "loss", and then
needs nothing else: one ordinary backward pass reaches every weight, through the heatmaps too.
"""

import argparse
import tempfile
from functools import partial

import torch

import hansfree
from hansfree.benchmarks import ColouredDigits
from hansfree.evaluation import predictions_of
from hansfree.methods import ERM, ExplanationDistillation
from hansfree.torchvision_guard import import_torchvision

import_torchvision()  # transformers imports it; first here, so that one built for CUDA loads beside a torch for the CPU
from transformers import Trainer, TrainingArguments  # noqa: E402


class OneLoss(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, batch):
        return {"loss": sum(self.method(batch).values())}


def fit(method, split, steps):
    def collate(index):  # the Trainer chooses samples, the split reads them as one batch
        return {"batch": split.batch(torch.tensor(index))}

    with tempfile.TemporaryDirectory() as folder:
        length = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 0.01}
        report = {"logging_first_step": True, "logging_steps": 50, "report_to": "none", "disable_tqdm": True}
        arguments = TrainingArguments(folder, lr_scheduler_type="constant", save_strategy="no", **length, **report)
        Trainer(OneLoss(method), arguments, data_collator=collate, train_dataset=range(len(split))).train()


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps
torch.manual_seed(0)
digits, unbiased = ColouredDigits(), ColouredDigits(colouring="random", random_colours="vivid")
network = partial(hansfree.models.load_model, "small-cnn", num_classes=10, options={"norm": "scale"})
setup = partial(hansfree.Setup, network, samples=len(digits.split("train")), classes=10, input=digits.input)
expert = ERM(setup(teacher=None))
fit(expert, unbiased.split("train"), steps)
teacher = hansfree.Teacher.live(expert.student)
explainer = hansfree.explainers.LRP(epsilon=(0.01, 0.1), output_factor=False)
method = ExplanationDistillation(setup(teacher=teacher), explainer=explainer)
fit(method, digits.split("train"), steps)
for name in ("iid", "shift"):
    predictions = predictions_of(method, digits.split(name), 500, next(method.parameters()).device)
    print(f"{name} {hansfree.metrics.accuracy(predictions):.3f}")
