"""B-cos networks by name: pixels in [0, 1] go in, and become the six channels [x, 1 - x] inside.

Boehle et al. 2022, https://arxiv.org/abs/2205.10268, and 2024, https://arxiv.org/abs/2306.10898. The networks
come from their authors' package, in the form in which weights are published. Nothing is subtracted from the
pixels: the six channels already give a dark pixel as large an input as a bright one.
"""

from typing import Any

from torch import Tensor, nn

from hansfree.errors import UserError, nearest
from hansfree.models.sources import Built, Wanted, fetching, package, sound_options, three_channels

_CLASSES, _SIDE = 1000, 224


class _Parts:
    """The head of a B-cos network: a classifier at every position, then the mean, then bias and temperature."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self: Any, features: Tensor) -> Tensor:
        layer = self.fc if hasattr(self, "fc") else self.classifier
        return self.logit_layer(layer(features).mean((2, 3)))


class _ResNetParts(_Parts):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x if self.pool is None else self.pool(x))))
        return x if self.layer4 is None else self.layer4(x)


_PARTS = {"BcosResNet": _ResNetParts, "BcosDenseNet": _Parts, "BcosVGG": _Parts, "BcosConvNeXt": _Parts}


def bcos_network(wanted: Wanted) -> Built:
    """bcos/NAME with NAME as in the package's list of published networks; options go to its constructor."""
    name = f"bcos/{wanted.name}"
    source = package("bcos.models.pretrained", name, "bcos")
    three_channels(wanted, name)
    known = [entry for entry in source.list_available() if not entry.startswith("standard_")]
    if wanted.name not in known:
        raise UserError(f"There is no B-cos network {wanted.name!r}; {nearest(wanted.name, known)}")
    classes = _CLASSES if wanted.classes is None else wanted.classes
    options = dict(wanted.options)
    # None is -log(classes - 1) for this number of classes; the published value is for ImageNet's.
    given = options if classes == _CLASSES else {"logit_bias": None, **options}
    with sound_options(name):
        network = getattr(source, wanted.name)(num_classes=classes, **given)
    if wanted.pretrained:
        _take_published(source, wanted, network)
    transformer = type(network).__name__ not in _PARTS
    if not transformer:
        parts = _PARTS[type(network).__name__]
        network.__class__ = type(wanted.name, (parts, type(network)), {})
    size = (_SIDE, _SIDE) if wanted.pretrained or transformer else None
    return Built(network, classes, size=size, encoding="six-channels", options=options)


def _take_published(source: Any, wanted: Wanted, network: nn.Module) -> None:
    """Published weights; a last layer for another number of classes keeps its own."""
    with fetching(f"bcos/{wanted.name}"):
        state = getattr(source, wanted.name)(pretrained=True, **wanted.options).state_dict()
    own = network.state_dict()
    fresh = {key: value for key, value in own.items() if value.shape != state[key].shape}
    network.load_state_dict({**state, **fresh})
