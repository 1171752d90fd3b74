"""The shapes in the signatures are true: what works, works with every annotation checked while it runs."""

import subprocess
import sys

CHECKED = """
from inspect import signature

from jaxtyping import install_import_hook

packages = ("core", "distances", "explainers", "metrics", "methods", "evaluation", "models")
with install_import_hook([f"hansfree.{name}" for name in packages], "beartype.beartype"):
    import torch
    from hansfree import distances, evaluation, explainers, metrics
    from hansfree.benchmarks import BENCHMARKS
    from hansfree.core import Setup, Teacher
    from hansfree.methods import METHODS
    from hansfree.models import load_model

benchmark = BENCHMARKS["coloured-digits"](limit=200, valid=40, test=40, bias_ratio=0.5)
train = benchmark.split("train")
batch = train.batch(torch.arange(6))


def network(name="small-cnn", **options):
    return load_model(name, num_classes=10, options={"widths": [4, 6], **options})


teacher = Teacher.live(network("small-resnet", norm="scale"))
for name, kind in explainers.EXPLAINERS.items():
    for target in (batch.label, torch.stack([batch.label, batch.label], 1), lambda logits: logits.argmax(1)):
        student = load_model("bcos/resnet18", num_classes=10) if name == "bcos" else network()
        kind()(student, batch.images, target)
ranged = explainers.LRP(epsilon=(0.01, 0.1))
for name, method in METHODS.items():
    setup = Setup(network, teacher, len(train), 10, benchmark.input, label=train.label, bias=train.bias)
    made = method(setup, **({"explainer": ranged} if "explainer" in signature(method).parameters else {}))
    sum(made(batch).values()).backward()
    for predictions in evaluation.judge(made, teacher, benchmark, ("iid", "shift"), 16, "cpu").values():
        evaluation.measure(predictions)
maps = torch.rand(4, 3, 28, 28), torch.rand(4, 3, 14, 14)
for distance in distances.DISTANCES.values():
    distance(*maps)
    distances.pyramid(*maps, distance, extra=(torch.rand(4), torch.rand(4)))
print("checked")
"""


def test_annotated_shapes_hold_on_the_ways_that_work():
    checked = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, check=False)
    assert checked.stdout.strip() == "checked", checked.stderr[-3000:]
