"""ResNets of torchvision and timm by name, with the 224-pixel stem or one for small images."""

from typing import Any, Literal

from torch import Tensor, nn

from hansfree.errors import UserError
from hansfree.torchvision_guard import import_torchvision

Stem = Literal["imagenet", "small"]


def torchvision_network(name: str, num_classes: int, *, pretrained: bool, stem: Stem, channels: int) -> nn.Module:
    """A torchvision ResNet that speaks timm's words."""
    models = _package("torchvision.models", f"torchvision/{name}")
    if name not in models.list_models():
        raise UserError(f"torchvision has no model {name!r}; `hansfree list models` shows the names.")
    network = models.get_model(name, weights="DEFAULT" if pretrained else None)
    if not isinstance(network, models.ResNet):
        raise UserError(f"torchvision/{name} is not a ResNet; take timm/{name}, whose parts are known for every model.")
    network.__class__ = type(name, (_TorchvisionParts, type(network)), {})
    if num_classes != network.fc.out_features:
        network.fc = nn.Linear(network.fc.in_features, num_classes)
    if stem == "small":
        network.conv1 = nn.Conv2d(channels, network.conv1.out_channels, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, network.conv1.out_channels, 7, 2, 3, bias=False)
    return network


def timm_network(name: str, num_classes: int, *, pretrained: bool, stem: Stem, channels: int) -> nn.Module:
    """A timm model; ``stem: small`` is for its ResNets."""
    timm = _package("timm", f"timm/{name}")
    try:
        network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=channels)
    except RuntimeError as error:
        raise UserError(f"timm has no model {name!r} ({error}); `hansfree list models` shows the names.") from error
    if stem == "small":
        if not hasattr(network, "maxpool"):
            raise UserError(f"timm/{name} has no ResNet stem to shrink; leave out `stem: small`.")
        network.conv1 = nn.Conv2d(channels, network.conv1.out_channels, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    return network


def published_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a pretrained model's weights expect."""
    source, _, model = name.partition("/")
    if source == "timm":
        config = _package("timm", name).get_pretrained_cfg(model)
        return tuple(config.mean), tuple(config.std)
    transform = _package("torchvision.models", name).get_model_weights(model).DEFAULT.transforms()
    return tuple(transform.mean), tuple(transform.std)


class _TorchvisionParts:
    """torchvision's ResNet forward pass, cut before the pooling."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self.fc(self.avgpool(features).flatten(1))

    def get_classifier(self: Any) -> nn.Linear:
        return self.fc


def _package(module: str, model: str) -> Any:
    try:
        return import_torchvision(module)
    except ImportError as error:
        raise UserError(f"The model {model!r} needs an extra: pip install 'hansfree[vision]' ({error}).") from error
