"""The columns of the table of truth: networks with random weights that matter, in float64 and evaluation mode."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hansfree.core import Tokens
from hansfree.models import load_model

CLASSES, SAMPLES = 5, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """One column. ``homogeneous``: ReLUs and max-pools alone, so that gradient x input is complete without biases.

    ``conserving``: no softmax and no layer norm, so that LRP without biases conserves relevance as epsilon goes to 0.
    ``zennit`` names the canoniser under which zennit agrees with branchwise LRP.
    """

    title: str
    build: Callable[[], nn.Module]
    size: int = 64
    homogeneous: bool = False
    conserving: bool = False
    zennit: str | None = None
    trained: bool = False
    text: bool = False


def loaded(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: load_model(name, num_classes=CLASSES, mean=MEAN, std=STD, **options)


def _bert() -> nn.Module:
    from transformers import BertConfig

    from hansfree.models.text import load_text_model

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return load_text_model(config, num_classes=CLASSES)


def _clip() -> nn.Module:
    vision = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 8, "image_size": 64}
    options = {"embed_dim": 32, "vision_cfg": vision}
    return load_model("open_clip/RN50", num_classes=CLASSES, options=options)


NETWORKS = {
    "resnet18": Network("ResNet-18", loaded("torchvision/resnet18"), 64, True, True, "ResNetCanonizer"),
    "resnet50": Network("ResNet-50", loaded("torchvision/resnet50"), 64, True, True, "ResNetCanonizer"),
    "densenet121": Network("DenseNet-121", loaded("torchvision/densenet121"), 64, True, True),
    "vgg11-bn": Network("VGG-11-bn", loaded("torchvision/vgg11_bn"), 64, True, True, "VGGCanonizer"),
    "mobilenet-v2": Network("MobileNet-v2", loaded("torchvision/mobilenet_v2"), 64, False, True),
    "mobilenet-v3": Network("MobileNet-v3-small", loaded("torchvision/mobilenet_v3_small"), 64, False, True),
    "efficientnet-b0": Network("EfficientNet-B0", loaded("torchvision/efficientnet_b0"), 64, False, True),
    "convnext": Network("ConvNeXt-tiny", loaded("torchvision/convnext_tiny"), 64),
    "regnet": Network("RegNet-y-400mf", loaded("torchvision/regnet_y_400mf"), 64, False, True),
    "shufflenet": Network("ShuffleNet-v2", loaded("torchvision/shufflenet_v2_x1_0"), 64, True, True),
    "timm-resnet18": Network("timm ResNet-18", loaded("timm/resnet18"), 64, True, True),
    "efficientnet-lite0": Network(
        "EfficientNet-Lite0, real weights",
        lambda: load_model("efficientnet-lite0", pretrained=True),
        224,
        conserving=True,
        trained=True,
    ),
    "vit-tiny": Network("ViT-tiny", loaded("timm/vit_tiny_patch16_224"), 224),
    "bert": Network("BERT (2 layers)", _bert, text=True),
    "bcos-resnet18": Network("B-cos ResNet-18", lambda: load_model("bcos/resnet18", num_classes=CLASSES), 64),
    "clip-resnet": Network("CLIP ResNet (small)", _clip, 64),
}


def prepared(network: Network) -> tuple[nn.Module, Any, Tensor]:
    """The network, two inputs and the classes it predicts for them; the same at every call."""
    network.build()  # what it imports may draw random numbers
    torch.manual_seed(0)
    model = network.build().double().eval()
    if network.text:
        x = _texts()
        randomised(model, None)
    else:
        x = torch.rand(SAMPLES, 3, network.size, network.size, dtype=torch.double)
        if not network.trained:
            randomised(model, torch.rand(8, 3, network.size, network.size, dtype=torch.double))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def _texts() -> Tokens:
    ids = torch.randint(5, 50, (SAMPLES, 8))
    mask = torch.ones(SAMPLES, 8, dtype=torch.bool)
    mask[1, 6:] = False
    word_ids = torch.arange(8).expand(SAMPLES, 8).clone()
    word_ids[:, 0] = word_ids[0, 7] = word_ids[1, 5:] = -1
    return Tokens(ids, mask, word_ids)


@torch.no_grad()
def randomised(model: nn.Module, images: Tensor | None) -> None:
    """Scales and biases that matter, and batch norms whose statistics lie near those of ``images``, not on them.

    Statistics drawn from nowhere would let deep networks vanish or explode, and epsilon would mean nothing there.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif parameter.squeeze().ndim == 1 and parameter.numel() > 1:  # scales of norms and of layers
            parameter.uniform_(0.5, 1.5)
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    if images is None or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        var = norm.running_var.clamp_min(1e-6)
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.add_(0.2 * var.sqrt() * torch.randn_like(var))
        norm.running_var.copy_(var * torch.empty_like(var).uniform_(0.7, 1.3))


@torch.no_grad()
def without_biases(model: nn.Module) -> nn.Module:
    """A copy in which nothing is added anywhere: biases, running means and the mean of the images are zero."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    for module in twin.modules():
        for name in ("running_mean", "mean"):
            if isinstance(getattr(module, name, None), Tensor):
                getattr(module, name).zero_()
    return twin
