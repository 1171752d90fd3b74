"""torchvision's classifiers cut before the pooling, in timm's words, so that their last feature map can be reached.

``forward_head(forward_features(x))`` is the network's own forward pass in evaluation mode; the features of a
vision transformer are its tokens [b, tokens, width], those of every other family a map [b, c, h, w].
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Parts:
    """features - average pooling - classifier: AlexNet, VGG, MobileNetV3, EfficientNet, ConvNeXt."""

    last: ClassVar[str] = "fc"
    """The path of the last layer, or of the sequence that ends in it."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """The last feature map."""
        return self.features(x)

    def forward_head(self: Any, features: Tensor) -> Tensor:
        """Logits from the last feature map."""
        return self.classifier(self.avgpool(features).flatten(1))

    def get_classifier(self: Any) -> nn.Module:
        """The last layer that has weights."""
        return self.get_submodule(last_path(self))


class _Sequence(Parts):
    last = "classifier"


class _ConvNeXt(_Sequence):
    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.classifier(self.avgpool(features))


class _SelfPooled(_Sequence):
    """The classifier pools by itself: SqueezeNet."""

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.classifier(features).flatten(1)


class _MaxVit(_SelfPooled):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class _MobileNetV2(_Sequence):
    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.classifier(features.mean((2, 3)))


class _DenseNet(_MobileNetV2):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.features(x))


class _MNASNet(_MobileNetV2):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        return self.layers(x)


class _ResNet(Parts):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.fc(self.avgpool(features).flatten(1))


class _RegNet(_ResNet):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        return self.trunk_output(self.stem(x))


class _ShuffleNet(Parts):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.stage2(self.maxpool(self.conv1(x)))
        return self.conv5(self.stage4(self.stage3(x)))

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


class _GoogLeNet(Parts):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.maxpool1(self.conv1(self._transform_input(x)))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4e(self.inception4d(self.inception4c(self.inception4b(self.inception4a(x)))))
        return self.inception5b(self.inception5a(self.maxpool4(x)))

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.fc(self.dropout(self.avgpool(features).flatten(1)))


class _Inception3(_GoogLeNet):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(self._transform_input(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x))))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.fc(self.dropout(self.avgpool(features)).flatten(1))


class _SwinTransformer(Parts):
    last = "head"

    def forward_features(self: Any, x: Tensor) -> Tensor:
        return self.permute(self.norm(self.features(x)))

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.head(self.flatten(self.avgpool(features)))


class _VisionTransformer(Parts):
    last = "heads"

    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self._process_input(x)
        return self.encoder(torch.cat((self.class_token.expand(len(x), -1, -1), x), 1))

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.heads(features[:, 0])


PARTS: dict[str, type[Parts]] = {
    "AlexNet": _Sequence,
    "VGG": _Sequence,
    "MobileNetV3": _Sequence,
    "EfficientNet": _Sequence,
    "ConvNeXt": _ConvNeXt,
    "SqueezeNet": _SelfPooled,
    "MaxVit": _MaxVit,
    "MobileNetV2": _MobileNetV2,
    "DenseNet": _DenseNet,
    "MNASNet": _MNASNet,
    "ResNet": _ResNet,
    "RegNet": _RegNet,
    "ShuffleNetV2": _ShuffleNet,
    "GoogLeNet": _GoogLeNet,
    "Inception3": _Inception3,
    "SwinTransformer": _SwinTransformer,
    "VisionTransformer": _VisionTransformer,
}
"""Parts by the name of torchvision's class."""


def with_parts(network: nn.Module, name: str) -> nn.Module:
    """``network`` itself, its class extended by the parts of its family; unchanged where the family is unknown."""
    parts = PARTS.get(type(network).__name__)
    if parts is not None:
        network.__class__ = type(name, (parts, type(network)), {})
    return network


def last_path(network: nn.Module) -> str:
    """The path of the layer that makes the logits: the last linear layer or convolution of the head."""
    head = getattr(network, "last", "")
    paths = [
        f"{head}.{path}".strip(".")
        for path, module in network.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    return paths[-1]
