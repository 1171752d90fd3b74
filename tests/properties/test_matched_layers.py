"""Layers that distillers match: which are found, what is refused, and that nothing is left behind."""

import pytest
import torch
from torch import nn

from hansfree.core import InputSpec, Setup, Teacher
from hansfree.errors import UserError
from hansfree.methods import METHODS
from hansfree.methods.matched_layers import Watched, find_layers
from hansfree.models import load_model, wrap

STAGES = {
    ("small-cnn", 28): [("relus.0", 16, 28), ("relus.1", 32, 14), ("relus.2", 64, 7)],
    ("small-resnet", 28): [("blocks.0", 16, 14), ("blocks", 64, 7)],
    ("torchvision/resnet18", 64): [("layer1", 64, 16), ("layer2", 128, 8), ("layer3", 256, 4), ("layer4", 512, 2)],
    ("timm/resnet26t", 64): [("layer1", 256, 16), ("layer2", 512, 8), ("layer3", 1024, 4), ("layer4", 2048, 2)],
    ("timm/convnext_atto", 64): [("stages.0", 40, 16), ("stages.1", 80, 8), ("stages.2", 160, 4), ("norm_pre", 320, 2)],
    ("timm/vit_tiny_patch16_224", 224): [("norm", 192, 14)],
}


def spec(side):
    return InputSpec(3, side, side)


@pytest.mark.parametrize(("name", "side"), STAGES)
def test_the_ends_of_stages_are_found_and_nothing_is_left_behind(name, side):
    model = load_model(name, num_classes=3)
    before, kinds = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    layers = find_layers(model, spec(side))
    found = [(layer.path.removeprefix("network."), layer.channels, layer.size[0]) for layer in layers]
    assert found == STAGES[name, side]
    assert all(module.training for module in model.modules())
    watched = Watched(model.eval(), layers)
    seen = watched.seen(watched.model(torch.rand(2, 3, side, side)))
    assert [tuple(map.shape) for map in seen.maps] == [(2, c, s, s) for _, c, s in found]
    assert [type(m) for m in model.modules()] == kinds
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_is_watched_is_what_the_layers_give():
    model = load_model("small-cnn", num_classes=3).eval()
    layers = find_layers(model, spec(28), ("norms.0", "relus.2"))
    watched = Watched(model, layers, model.get_classifier())
    images = torch.rand(4, 3, 28, 28)
    seen = watched.seen(watched.model(images))
    assert torch.equal(seen.logits, model(images))
    assert torch.equal(seen.maps[1], model.forward_features(images))
    torch.testing.assert_close(seen.embedding, seen.maps[1].mean((2, 3)))
    torch.testing.assert_close(model.forward_head(seen.maps[1]), seen.logits)
    before = model.network.norms[0](model.network.convs[0](images))
    torch.testing.assert_close(seen.maps[0], before)
    watched.model(torch.zeros(4, 3, 28, 28))
    assert all(torch.equal(a, b) for a, b in zip(watched.seen(seen.logits).maps, seen.maps)), "the first pass counts"


def test_tokens_are_folded_to_their_grid_without_the_class_token():
    model = load_model("timm/vit_tiny_patch16_224", num_classes=3).eval()
    (layer,) = find_layers(model, spec(224))
    tokens = torch.arange(197.0)[None, :, None].expand(1, 197, 2)
    folded = layer.as_map(tokens)
    assert folded[0, 1, 0, :3].tolist() == [1, 2, 3] and folded[0, 0, 13, 13] == 196


class Shared(nn.Module):
    """One activation for two layers, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, padding=1)
        self.relu, self.unused, self.last = nn.ReLU(inplace=True), nn.Conv2d(1, 1, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("relu", "'relu' gives no tensor, or is called more often than once"),
        ("unused", "'unused' gives no tensor"),
        ("last", "'last' gives shape \\[2, 3\\], not one feature map"),
        ("secnd", "second"),
    ],
)
def test_layers_without_one_map_are_refused(path, reason):
    with pytest.raises(UserError, match=reason):
        find_layers(Shared(), spec(8), (path,))


def test_what_works_in_place_on_a_map_changes_what_is_shown():
    model = Shared()
    watched = Watched(model, find_layers(model, spec(8)))
    seen = watched.seen(watched.model(torch.randn(2, 3, 8, 8)))
    assert [layer.path for layer in find_layers(model, spec(8))] == ["first", "second"]
    assert all(map.min() == 0 for map in seen.maps)


def test_a_network_without_maps_is_refused():
    flat = wrap(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), label_names=("a", "b", "c"))
    with pytest.raises(UserError, match="No layer of this Sequential gives a feature map"):
        find_layers(flat, spec(4))


# Whole methods on unlike pairs of networks


def made(name, student, teacher, side, **settings):
    torch.manual_seed(0)
    models = [load_model(n, num_classes=3, options=o) for n, o in (student, teacher)]
    setup = Setup(lambda: models[0], Teacher.live(models[1]), 8, 3, spec(side), label=torch.arange(8) % 3)
    return METHODS[name](setup, **settings).train()


CNN, RESNET = ("small-cnn", {"widths": [4, 6, 8]}), ("small-resnet", {"widths": [4, 6]})
CONVNEXT = ("timm/convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]})
VIT = ("timm/vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2})
RESNET18 = ("torchvision/resnet18", {})


@pytest.mark.parametrize("name", ["at", "review-kd", "crd"])
@pytest.mark.parametrize(
    ("student", "teacher"), [(CNN, RESNET), (CNN, VIT), (VIT, CONVNEXT), (CONVNEXT, RESNET18), (RESNET18, CNN)]
)
def test_any_two_networks_can_be_matched(tiny, name, student, teacher):
    method = made(name, student, teacher, 32)
    images = torch.rand(8, 3, 32, 32)
    batch = tiny.split("train").batch(torch.arange(8))
    terms = method.loss(type(batch)(images, batch.label, batch.index))
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None for p in method.parameters())
    assert len(method.layers) == len(method.teacher_layers)


@pytest.mark.parametrize(("student", "teacher", "who"), [(VIT, CNN, "student"), (CNN, CONVNEXT, "teacher")])
def test_cat_kd_refuses_what_does_not_average_its_map(student, teacher, who):
    with pytest.raises(UserError, match=f"cat-kd needs a {who} that averages its last feature map"):
        made("cat-kd", student, teacher, 32)


def test_cat_kd_takes_networks_that_end_in_a_pool_and_a_linear_layer():
    method = made("cat-kd", RESNET18, CNN, 64)
    assert method.layers[0].path == "network.layer4"
    with pytest.raises(UserError, match="cat-kd needs a student"):
        made("cat-kd", RESNET18, CNN, 32)  # its last map is one pixel there


def test_layers_can_be_named(tiny):
    method = made("at", CNN, RESNET, 12, student_layers=("relus.0", "norms.1"), teacher_layers=("blocks.0", "blocks.1"))
    assert [layer.path for layer in (*method.layers, *method.teacher_layers)] == [
        "relus.0",
        "norms.1",
        "blocks.0",
        "blocks.1",
    ]
