"""Explanation distillation in a loop of your own:  python examples/plain_loop.py [--steps 300]

The teacher has seen digits of any colour. The student sees only digits whose colour gives the class away, and no
labels: it matches the teacher's heatmaps.
"""

import argparse

import torch
from torch.nn import functional as F

from hansfree.benchmarks import ColouredDigits
from hansfree.distances import pyramid
from hansfree.explainers import LRP
from hansfree.models import load_model, transplant_last_layer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps
torch.manual_seed(0)
digits = ColouredDigits()


@torch.no_grad()
def accuracy(model, name):
    batch = digits.split(name).batch(torch.arange(len(digits.split(name))))
    return (model.eval()(batch.images).argmax(1) == batch.label).float().mean().item()


# The teacher: an ordinary classifier, trained on random colours with labels.
unbiased = ColouredDigits(colouring="random", random_colours="vivid").split("train")
teacher = load_model("small-cnn", num_classes=10, options={"norm": "scale"})
optimiser = torch.optim.Adam(teacher.parameters(), lr=0.01)
for _ in range(steps):
    batch = unbiased.batch(torch.randint(len(unbiased), (32,)))
    optimiser.zero_grad()
    F.cross_entropy(teacher(batch.images), batch.label).backward()
    optimiser.step()
teacher.eval().requires_grad_(False)

# The student: trained on biased colours with explanations alone.
train, explain = digits.split("train"), LRP(epsilon=0.03, output_factor=False)
student = load_model("small-cnn", num_classes=10, options={"norm": "scale"})
transplant_last_layer(student, teacher)
optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.01)
for step in range(1, steps + 1):
    images = train.batch(torch.randint(len(train), (32,))).images
    with torch.no_grad():
        top = teacher(images).argmax(1)
        other = (top + torch.randint(1, 10, top.shape)) % 10
        target = torch.where(torch.rand(len(top)) < 0.5, top, other)  # why this class, and why not another
        teacher_map = explain(teacher, images, target).map
    loss = pyramid(explain(student.train(), images, target).map, teacher_map)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step in (1, steps) or step % 50 == 0:
        scores = f"iid {accuracy(student, 'iid'):.2f}  shift {accuracy(student, 'shift'):.2f}"
        print(f"step {step:3d}  loss {loss.item():.3f}  {scores}")
