"""The distillers again, slowly, from their papers; who trains which layer; every explainer as a loss."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hansfree.core import Batch, InputSpec, Setup, Teacher
from hansfree.errors import NotGivenError, UserError
from hansfree.explainers import EXPLAINERS, LRP, Attention, GradCAM, IntegratedGradients, SmoothGrad
from hansfree.methods import METHODS
from hansfree.methods.mixup import Mixing
from hansfree.models import ScaleNorm, load_model
from hansfree.torchvision_guard import import_torchvision
from hansfree.training import Training, fit


@pytest.fixture
def batch(tiny):
    return tiny.split("valid").batch(torch.arange(6))


def eq6(a, b):
    """The distance of explanation distillation for one sample, element by element."""
    difference = sum(abs(x - y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist()))
    sizes = (sum(abs(x) for x in m.flatten().tolist()) for m in (a, b))
    return difference / math.sqrt(math.prod(sizes))


def softmax(row, temperature=1.0):
    values = [math.exp(x / temperature) for x in row]
    return [value / sum(values) for value in values]


def slow_kl(teacher, student, temperature):
    """T^2 KL(teacher || student), mean over samples."""
    slow = 0.0
    for t, s in zip(teacher.tolist(), student.tolist()):
        slow += sum(p * math.log(p / q) for p, q in zip(softmax(t, temperature), softmax(s, temperature)))
    return temperature**2 * slow / len(teacher)


def gradients(term, parameters):
    found = torch.autograd.grad(term, list(parameters), retain_graph=True, allow_unused=True)
    return [g for g in found if g is not None and g.any()]


def last_and_body(student):
    last = list(student.get_classifier().parameters())
    return last, [p for p in student.parameters() if p.requires_grad and all(p is not q for q in last)]


# Grad-CAM distillation


def slow_grad_cam(model, image, k):
    features = model.forward_features(image).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.forward_head(features)[0, k], features)
    map = torch.zeros(features.shape[-2:])
    for c in range(features.shape[1]):
        map = map + slope[0, c].mean() * features[0, c].detach()
    return map.clamp(min=0)


def test_grad_cam_distillation_is_eq_6_on_the_last_map(build, batch):
    method = build("grad-cam-distillation").eval()
    classes = method.rule.choose(method.teacher.model(batch.images), method.rule.fixed_draws(batch.index))
    assert not torch.equal(classes, method.teacher.model(batch.images).argmax(1))
    slow, sizes = 0.0, set()
    for i, k in enumerate(classes.tolist()):
        maps = [slow_grad_cam(m, batch.images[i : i + 1], k) for m in (method.student, method.teacher.model)]
        sizes.update(map.shape[-1] for map in maps)
        side = min(map.shape[-1] for map in maps)
        slow += eq6(*(F.adaptive_avg_pool2d(map[None], side) for map in maps)) / len(batch)
    assert len(sizes) == 2, "maps of two sizes should meet"
    assert method.loss(batch)["grad-cam"].item() == pytest.approx(slow, rel=1e-4)


def test_a_map_of_one_pixel_is_refused(tiny, batch):
    def pooled():
        return load_model(f"{__name__}:OnePixel", num_classes=3)

    setup = Setup(pooled, Teacher.live(pooled()), 48, 3, tiny.input)
    for method in (
        METHODS["grad-cam-distillation"](setup, layer="pool"),
        METHODS["attention-distillation"](setup),
    ):
        with pytest.raises(NotGivenError, match="1 x 1") as caught:
            method.loss(batch)
        assert caught.value.reason == "needs a feature map larger than 1 x 1"
    METHODS["grad-cam-distillation"](setup).loss(batch)


class OnePixel(nn.Module):
    """A network whose last feature map is one pixel."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, num_classes)

    def forward_features(self, x):
        return self.pool(self.conv(x).relu())

    def forward_head(self, features):
        return self.fc(features.flatten(1))

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


# The last layer of the teacher


@pytest.mark.parametrize(("choice", "frozen"), [("copied", True), ("free", False)])
def test_output_distillation_can_take_the_last_layer_over(build, choice, frozen):
    method = build("output-distillation", last_layer=choice)
    ours, theirs = method.student.get_classifier(), method.teacher.model.get_classifier()
    assert torch.equal(ours.weight, theirs.weight) == frozen
    assert all(p.requires_grad != frozen for p in ours.parameters())


def test_output_distillation_can_start_as_the_teacher(tiny, batch):
    def network():
        return load_model("small-cnn", num_classes=3, options={"widths": [4, 6]})

    setup = Setup(network, Teacher.live(network()), 48, 3, tiny.input)
    method = METHODS["output-distillation"](setup, start="teacher").eval()
    assert method.loss(batch)["output"].item() == pytest.approx(0, abs=1e-6)


# Explanation and output together


def test_the_ablation_adds_the_output_loss(build, batch):
    alone = build("explanation-distillation").eval().loss(batch)
    method = build("explanation-distillation", output_weight=0.7, temperature=2.0).eval()
    both = method.loss(batch)
    assert set(alone) == {"explanation"} and set(both) == {"explanation", "output"}
    assert torch.equal(alone["explanation"], both["explanation"])
    slow = 0.7 * slow_kl(method.teacher.model(batch.images), method.student(batch.images), 2.0)
    assert both["output"].item() == pytest.approx(slow, rel=1e-4)
    assert gradients(both["output"], last_and_body(method.student)[1])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("explanation-distillation", {"output_weight": -1.0}),
        ("explanation-distillation", {"temperature": 0.0}),
        ("dl-dl", {"output_weight": 0.0}),
        ("dl-dl", {"temperature": 0.0}),
        ("output-distillation", {"temperature": -1.0}),
    ],
)
def test_weights_and_temperatures_that_mean_nothing_are_refused(build, name, settings):
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}"):
        build(name, **settings)


# DL-DL

LOOKING = {
    "lrp": LRP(epsilon=(0.01, 0.1)),
    "lrp without output factor": LRP(epsilon=0.05, output_factor=False),
    "lrp, branchwise": LRP(epsilon=0.05, semantics="branchwise"),
    "lrp, layerwise": LRP(epsilon=0.05, semantics="layerwise"),
    "grad-cam": GradCAM(),
    "attention": Attention(),
    "integrated-gradients": IntegratedGradients(steps=2),
    "smoothgrad": SmoothGrad(samples=2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("explainer", LOOKING)
def test_dl_dl_gives_each_loss_its_own_layers(build, batch, explainer, training):
    method = build("dl-dl", explainer=LOOKING[explainer]).train(training)
    terms = method.loss(batch)
    last, body = last_and_body(method.student)
    assert not gradients(terms["explanation"], last) and not gradients(terms["output"], body)
    assert gradients(terms["explanation"], body) and len(gradients(terms["output"], last)) == 2


@pytest.mark.parametrize("norm", ["batch", "scale"])
@pytest.mark.parametrize("explainer", LOOKING)
def test_dl_dl_s_terms_and_gradients_are_those_of_each_loss_alone(build, batch, explainer, norm):
    """In one pass what two passes give: explanation distillation's loss, and the output loss on fixed features."""
    method = build("dl-dl", norm=norm, explainer=LOOKING[explainer], output_weight=3.0, temperature=2.0).eval()
    student = copy.deepcopy(method.student)
    alone = build("explanation-distillation", norm=norm, explainer=LOOKING[explainer], last_layer="free").eval()
    alone.student.load_state_dict(student.state_dict())
    terms, expected = method.loss(batch), alone.loss(batch)
    torch.testing.assert_close(terms["explanation"], expected["explanation"])
    slow = 3 * slow_kl(method.teacher.model(batch.images), student(batch.images), 2.0)
    assert terms["output"].item() == pytest.approx(slow, rel=1e-4)

    sum(terms.values()).backward()
    last, body = last_and_body(method.student)
    _, body_alone = last_and_body(alone.student)
    for p, g in zip(body, torch.autograd.grad(expected["explanation"], body_alone, allow_unused=True), strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None and p.grad is not None else g)
    head = student.get_classifier()
    logits = head(student.forward_features(batch.images).mean((2, 3)).detach())
    kl = F.kl_div((logits / 2).log_softmax(1), (method.teacher.logits(batch) / 2).softmax(1), reduction="batchmean")
    for p, g in zip(last, torch.autograd.grad(3 * 4 * kl, list(head.parameters())), strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("norm", ["batch", "scale"])
def test_dl_dl_refreshes_running_statistics_once(build, batch, norm):
    method = build("dl-dl", norm=norm).train()
    plain = copy.deepcopy(method.student)
    method.loss(batch)
    plain(batch.images)
    ours = dict(method.student.named_buffers())
    assert any(isinstance(module, nn.BatchNorm2d | ScaleNorm) for module in plain.modules())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ours[name], buffer)


def test_dl_dl_clips_its_groups_apart_or_together(build, tiny):
    training = Training(steps=1, batch_size=48, lr=1.0, momentum=0.0, clip=0.01)
    moved = {}
    for clipping in ("apart", "joint"):
        method = build("dl-dl", clipping=clipping)
        before = copy.deepcopy(method.student)
        (step,) = fit(method, tiny, training)
        assert set(step.grad_norm) == ({"train"} if clipping == "joint" else {"body", "last-layer"})
        moved[clipping] = [
            math.sqrt(sum((p - q).detach().square().sum().item() for p, q in zip(now, then)))
            for now, then in zip(last_and_body(method.student), last_and_body(before))
        ]
    assert moved["apart"] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert math.hypot(*moved["joint"]) == pytest.approx(0.01, rel=1e-3)
    assert moved["joint"][1] < 0.5 * moved["joint"][0], "the weight of 100 should take the body's share"


def test_dl_dl_holds_the_body_s_steps_whatever_the_output_s_weight(build, tiny):
    training = Training(steps=3, batch_size=16, lr=0.1, clip=10)
    students = []
    for weight in (1.0, 100.0):
        method = build("dl-dl", output_weight=weight, explainer=Attention())  # a map that no last layer enters
        for _ in fit(method, tiny, training):
            pass
        students.append(last_and_body(method.student))
    assert all(torch.equal(p, q) for p, q in zip(students[0][1], students[1][1], strict=True))
    assert not torch.equal(students[0][0][1], students[1][0][1])


@pytest.mark.parametrize("choice", ["free", "copied"])
def test_dl_dl_s_last_layer_starts_its_own_way_and_is_trained(build, tiny, choice):
    method = build("dl-dl", last_layer=choice)
    ours, theirs = method.student.get_classifier(), method.teacher.model.get_classifier()
    assert torch.equal(ours.weight, theirs.weight) == (choice == "copied")
    before = copy.deepcopy(ours)
    for _ in fit(method, tiny, Training(steps=2, batch_size=16)):
        pass
    assert not torch.equal(ours.weight, before.weight) and not torch.equal(ours.bias, before.bias)


def test_dl_dl_needs_a_linear_last_layer(tiny):
    def student():
        return load_model("bcos/resnet18", num_classes=3, options={"inplanes": 4})

    with pytest.raises(UserError, match="linear"):
        METHODS["dl-dl"](Setup(student, Teacher.live(student()), 48, 3, tiny.input), explainer=LRP())


# Every explainer is a loss


def tiny_pair(name):
    """A student and a teacher whose feature maps differ in size, where the explainer's networks allow it."""
    if name == "bcos":
        pair = [load_model("bcos/resnet18", num_classes=3, options={"inplanes": width}) for width in (4, 6)]
        return *pair, {"last_layer": "free"}
    widths = [4, 6]
    student = load_model("small-cnn", num_classes=3, options={"widths": widths})
    return student, load_model("small-resnet", num_classes=3, options={"widths": [4, 8]}), {}


SMALL = {"integrated-gradients": {"steps": 3}, "smoothgrad": {"samples": 2}}


@pytest.mark.parametrize("name", EXPLAINERS)
def test_every_explainer_can_be_distilled(name, tiny):
    torch.manual_seed(0)
    student, teacher, settings = tiny_pair(name)
    explainer = EXPLAINERS[name](**SMALL.get(name, {}))
    images = torch.rand(8, 3, 32, 32) if name == "bcos" else tiny.split("train").batch(torch.arange(8)).images
    batch = Batch(images, torch.arange(8) % 3, torch.arange(8))
    setup = Setup(lambda: student, Teacher.live(teacher), 48, 3, InputSpec(3, *images.shape[-2:]))
    method = METHODS["explanation-distillation"](setup, explainer=explainer, **settings)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    for training in (True, False):
        (loss,) = method.train(training).loss(batch).values()
        assert loss.isfinite() and loss > 0.01
        method.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
        convolutions = [m.weight for m in student.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
        reached = [w for w in convolutions if w.grad is not None and w.grad.any()]
        assert len(reached) == len(convolutions)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


# CLIP


@pytest.fixture
def clip(tmp_path):
    """A small zero-shot CLIP of random weights: a ResNet with attention pooling, an embedding of 6 numbers."""
    open_clip = import_torchvision("open_clip")
    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}
    text = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config)
    with torch.no_grad():  # open_clip starts with residual branches that give nothing
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "open_clip_model.pth")
    section = {"classes": ["cat", "dog", "aeroplane"], "temperature": 10.0}
    return load_model(f"open_clip/{tmp_path}", options={"zero_shot": section})


@pytest.mark.parametrize("widths", [(4, 6), (4, 5)])
@pytest.mark.parametrize(
    ("name", "explainer"),
    [
        ("explanation-distillation", LRP()),
        ("explanation-distillation", GradCAM()),
        ("dl-dl", LRP()),
        ("grad-cam-distillation", None),
        ("attention-distillation", None),
    ],
)
def test_a_zero_shot_clip_teaches_a_small_network(clip, tiny, batch, name, explainer, widths):
    def student():
        return load_model("small-cnn", num_classes=3, options={"widths": list(widths)})

    setup = Setup(student, Teacher.live(clip), 48, 3, tiny.input)
    given = {} if explainer is None else {"explainer": explainer}
    method = METHODS[name](setup, last_layer="copied", **given)
    ours, theirs = method.student.get_classifier(), clip.get_classifier()
    assert torch.equal(ours.weight, theirs.weight) and ours.bias is None
    adapter = method.student.adapter
    assert isinstance(adapter, nn.Identity) if widths[-1] == 6 else adapter.weight.shape == (6, 5, 1, 1)
    (step,) = fit(method, tiny, Training(steps=1, batch_size=8))
    assert math.isfinite(step.loss) and all(norm > 0 for norm in step.grad_norm.values())
    assert torch.equal(ours.weight, theirs.weight) == (name != "dl-dl")
    assert method.eval().loss(batch)


# Output losses to compare with


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_label_smoothing(build, batch, epsilon):
    method = build("label-smoothing", epsilon=epsilon).eval()
    slow = 0.0
    for row, y in zip(method.student(batch.images).tolist(), batch.label.tolist()):
        for c, p in enumerate(softmax(row)):
            slow -= ((1 - epsilon) * (c == y) + epsilon / 3) * math.log(p) / len(batch)
    assert method.loss(batch)["label"].item() == pytest.approx(slow, rel=1e-4)


def test_mixup_is_the_cross_entropy_of_mixed_pairs(build, tiny):
    method, batch = build("mixup", alpha=0.5, norm="scale").train(), tiny.split("train").batch(torch.arange(16))
    torch.manual_seed(3)
    found = method.loss(batch)["label"].item()
    torch.manual_seed(3)
    draws = Mixing(0.5).draw(16)
    partner = sorted(range(16), key=lambda i: draws["order"][i].item())
    assert sorted(partner) == list(range(16)) != partner
    ratio = draws["ratio"].tolist()
    mixed = torch.stack([r * batch.images[i] + (1 - r) * batch.images[partner[i]] for i, r in enumerate(ratio)])
    slow = 0.0
    for i, row in enumerate(method.student(mixed).tolist()):
        p = softmax(row)
        target = [0.0, 0.0, 0.0]
        target[int(batch.label[i])] += ratio[i]
        target[int(batch.label[partner[i]])] += 1 - ratio[i]
        slow -= sum(q * math.log(c) for q, c in zip(target, p)) / 16
    assert found == pytest.approx(slow, rel=1e-4)
    method.eval()
    plain = F.cross_entropy(method.student(batch.images), batch.label)
    torch.testing.assert_close(method.loss(batch)["label"], plain)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixing_is_beta_distributed(alpha):
    ratio = Mixing(alpha).draw(20000, torch.Generator().manual_seed(0))["ratio"].double()
    assert ratio.min() >= 0 and ratio.max() <= 1
    assert ratio.mean().item() == pytest.approx(0.5, abs=0.01)
    assert ratio.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    again = Mixing(alpha).draw(20000, torch.Generator().manual_seed(0))["ratio"]
    assert torch.equal(again.double(), ratio)


def test_balanced_class_weights(build, tiny):
    method = build("erm").eval()
    label = torch.tensor([0] * 30 + [1] * 12 + [2] * 6)
    setup = Setup(lambda: method.student, None, 48, 3, tiny.input, label=label)
    weighted = METHODS["erm"](setup, class_weights="balanced").eval()
    batch = tiny.split("valid").batch(torch.arange(7))
    slow = 0.0
    for row, y in zip(method.student(batch.images).tolist(), batch.label.tolist()):
        slow -= 48 / (3 * [30, 12, 6][y]) * math.log(softmax(row)[y]) / 7
    assert weighted.loss(batch)["label"].item() == pytest.approx(slow, rel=1e-4)
    assert set(weighted.state_dict()) == set(method.state_dict())
    binary = METHODS["erm"](setup, class_weights="balanced", loss="binary").eval()
    slow = 0.0
    for row, y in zip(method.student(batch.images).tolist(), batch.label.tolist()):
        terms = [math.log1p(math.exp(-s if k == y else s)) for k, s in enumerate(row)]
        slow += 48 / (3 * [30, 12, 6][y]) * sum(terms) / 7
    assert binary.loss(batch)["label"].item() == pytest.approx(slow, rel=1e-4)


def test_a_class_without_samples_has_no_weight_and_labels_are_asked_for(build, tiny):
    student = build("erm").student
    setup = Setup(lambda: student, None, 4, 3, tiny.input, label=torch.tensor([0, 0, 0, 2]))
    method = METHODS["erm"](setup, class_weights="balanced")
    assert method.class_weights.tolist() == pytest.approx([4 / 9, 0, 4 / 3])
    with pytest.raises(UserError, match="labels"):
        METHODS["erm"](Setup(lambda: student, None, 4, 3, tiny.input), class_weights="balanced")


@pytest.mark.parametrize(("name", "settings"), [("mixup", {"alpha": 0.0}), ("label-smoothing", {"epsilon": 0.0})])
def test_settings_that_do_nothing_are_refused(build, name, settings):
    with pytest.raises(UserError, match="method"):
        build(name, **settings)
