"""What every model promises: parts that fit, files that load without code, mistakes in one sentence."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from hansfree.core import Classifier, InputSpec
from hansfree.errors import UserError
from hansfree.models import ScaleNorm, attach_adapter, load_model, save_model, transplant_last_layer
from hansfree.models import with_batch_statistics as batch_statistics

OWN = ("small-cnn", "small-resnet")
SMALL = [(name, {"norm": norm}) for name in OWN for norm in ("batch", "scale", "none")]
SMALL.append(("small-cnn", {"strided": True}))
RESNETS = [
    (f"{source}/resnet18", {"stem": stem}) for source in ("torchvision", "timm") for stem in ("imagenet", "small")
]


def make(name, settings, **more):
    if name in OWN:
        return load_model(name, num_classes=4, options={"widths": [4, 6], **settings}, **more)
    return load_model(name, num_classes=4, **settings, **more)


def busy(model):
    """Running statistics that are not the first ones."""
    for _ in range(2):
        model.train()(torch.rand(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize(("name", "settings"), SMALL + RESNETS)
def test_parts_make_the_whole(name, settings):
    model = busy(make(name, settings))
    x = torch.rand(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.ndim == 4
    assert model.get_classifier().in_features == features.shape[1]
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_small_stem_keeps_more_of_a_small_image(stem):
    side = make("torchvision/resnet18", {"stem": stem}).eval().forward_features(torch.rand(1, 3, 28, 28)).shape[-1]
    assert side == {"imagenet": 1, "small": 4}[stem]


@pytest.mark.parametrize(("strided", "sides"), [(False, [28, 14, 7]), (True, [14, 7, 3])])
def test_a_strided_cnn_halves_in_its_convolutions(strided, sides):
    model = load_model("small-cnn", num_classes=4, options={"widths": [4, 6, 8], "strided": strided}).eval()
    seen = []
    for relu in model.network.relus:
        relu.register_forward_hook(lambda _, __, given: seen.append(given.shape[-1]))
    model(torch.rand(1, 3, 28, 28))
    assert seen == sides


@pytest.mark.parametrize(("name", "settings"), [*SMALL, RESNETS[0], RESNETS[3]])
@pytest.mark.parametrize("adapter", [None, 9])
def test_what_is_saved_is_what_is_loaded(name, settings, adapter, tmp_path):
    model = busy(make(name, settings, adapter=adapter, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)))
    save_model(model, tmp_path, input=InputSpec(3, 32, 32), classes=("a", "b", "c", "d"))
    loaded = load_model(str(tmp_path)).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert described["label_names"] == ["a", "b", "c", "d"]


def test_normalisation_happens_inside():
    plain = make("small-cnn", {}).eval()
    model = Classifier(plain.network, plain.config, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    x = torch.rand(2, 3, 16, 16)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(model(x), plain(by_hand))


@pytest.mark.parametrize("training", [True, False])
def test_scale_norm_divides_by_the_root_mean_square(training):
    layer = ScaleNorm(2).train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3.0]))
    layer.running = torch.tensor([4.0, 9.0])
    x = torch.randn(5, 2, 3, 3)
    y = layer(x)
    for c in range(2):
        square = sum(v * v for v in x[:, c].flatten().tolist()) / 45 if training else (4.0, 9.0)[c]
        torch.testing.assert_close(y[:, c], x[:, c] * (2.0, 3.0)[c] / (square + 1e-5) ** 0.5)
        if training:
            assert layer.running[c].item() == pytest.approx(0.9 * (4.0, 9.0)[c] + 0.1 * square, rel=1e-4)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("norm", ["scale", "none"])
def test_a_network_without_biases_has_none(name, norm):
    model = busy(make(name, {"norm": norm}))
    x = torch.rand(2, 3, 16, 16)
    bias = model.get_classifier().bias
    assert torch.equal(model(torch.zeros_like(x)), bias.expand(2, -1))
    torch.testing.assert_close(model(3 * x) - bias, 3 * (model(x) - bias))


@pytest.mark.parametrize("norm", ["batch", "scale"])
def test_batch_statistics_are_a_copy_s_alone(norm):
    model = busy(make("small-cnn", {"norm": norm}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = batch_statistics(model)
    x = torch.rand(8, 3, 16, 16)
    assert not twin.training
    assert not torch.allclose(twin(x), model(x))
    torch.testing.assert_close(twin(x), make_training_output(model, x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def make_training_output(model, x):
    return copy.deepcopy(model).train()(x)


def test_transplanting_across_widths_adds_an_adapter():
    teacher, student = make("small-resnet", {}), load_model("small-cnn", num_classes=4, options={"widths": [4, 5]})
    transplant_last_layer(student, teacher)
    assert isinstance(student.adapter, torch.nn.Conv2d)
    assert student.adapter.weight.shape == (6, 5, 1, 1)
    assert student.adapter.bias is None
    assert student.adapter.weight.requires_grad
    assert torch.equal(student.get_classifier().weight, teacher.get_classifier().weight)
    assert not student.get_classifier().weight.requires_grad
    assert student(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    other = load_model("small-cnn", num_classes=7, options={"widths": [4, 5]})
    with pytest.raises(UserError, match="7"):
        transplant_last_layer(other, teacher)


@pytest.fixture
def saved(tmp_path):
    model = make("small-cnn", {"norm": "batch"})
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_wrong_class_counts_and_architectures_are_named(saved):
    with pytest.raises(UserError, match=r"4 classes.*5"):
        load_model(str(saved), num_classes=5)
    weights = str(saved / "model.safetensors")
    with pytest.raises(UserError, match="shape"):
        load_model("small-cnn", num_classes=9, options={"widths": [4, 6]}, weights=weights)
    with pytest.raises(UserError, match="another architecture"):
        load_model("small-resnet", num_classes=4, options={"widths": [4, 6]}, weights=weights)


def test_damaged_and_foreign_files_are_named(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(str(saved))
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(saved))
    harmful = tmp_path / "harmful.pt"
    torch.save({"x": print}, harmful)
    with pytest.raises(UserError, match=r"harmful\.pt"):
        load_model("small-cnn", num_classes=4, weights=str(harmful))


@pytest.mark.parametrize("held", [torch.ones(3), [1, 2], {"epoch": 3}, {"model": 4}, b"no torch file", b""])
def test_files_without_weights_are_named(held, tmp_path):
    path = tmp_path / "held.pt"
    path.write_bytes(held) if isinstance(held, bytes) else torch.save(held, path)
    with pytest.raises(UserError, match=r"held\.pt (is|holds) (no|damaged)") as error:
        load_model("small-cnn", num_classes=4, weights=str(path))
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("text", ["[1]", "3", "{}", '{"architecture": "small-cnn", "num_classes": "four"}'])
def test_descriptions_of_something_else_are_named(text, saved):
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not a model's description"):
        load_model(str(saved))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_other_trainers_load(wrap, prefix, tmp_path):
    model = make("torchvision/resnet18", {"stem": "small"}).eval()
    state = {prefix + key: value for key, value in model.network.state_dict().items()}
    torch.save(wrap(state), tmp_path / "checkpoint.pt")
    loaded = make("torchvision/resnet18", {"stem": "small"}, weights=str(tmp_path / "checkpoint.pt")).eval()
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))


def test_a_factory_of_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef net(num_classes, width=2):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("mine:net", num_classes=3, options={"width": 5})
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 3)
    with pytest.raises(UserError, match="forward_features"):
        model.forward_features(torch.rand(2, 3, 2, 2))


def test_torchvision_imports_beside_any_torch():
    code = (
        "from hansfree.torchvision_guard import import_torchvision as guard\n"
        "first, second = guard(), guard('torchvision')\n"
        "assert first is second and guard('timm').__name__ == 'timm'\n"
        "import torch; first.models.resnet18().eval()(torch.rand(1, 3, 32, 32)); print('fine')"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "fine"


def test_adapters_widen_the_last_layer():
    model = make("small-cnn", {})
    attach_adapter(model, 11)
    assert model.get_classifier().in_features == 11
    assert model.config["adapter"] == 11
