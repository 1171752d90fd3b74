"""B-cos networks by name: pixels in [0, 1] go in, and become the six channels [x, 1 - x] inside.

Boehle et al. 2022, https://arxiv.org/abs/2205.10268, and 2024, https://arxiv.org/abs/2306.10898. The networks
come from their authors' package, in the form in which weights are published; beside them stand two for small images,
built of the same parts: small-resnet and small-vit. Nothing is subtracted from the pixels: the six channels already
give a dark pixel as large an input as a bright one. Grey images have two channels, for the small networks alone.
"""

import inspect
import math
import warnings
from collections.abc import Mapping
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


class _TransformerParts:
    """A vision transformer and the layer of its logits' bias, one after the other; its tokens as a map of patches."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        body = self[0]
        patches = body.to_patch_embedding(x)
        tokens = body.transformer(patches.flatten(1, 2) + body.positional_embedding(patches))
        return tokens.unflatten(1, patches.shape[1:3]).movedim(-1, 1)

    def forward_head(self: Any, features: Tensor) -> Tensor:
        return self[1](self[0].linear_head(features.mean((2, 3))))

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self: Any) -> nn.Module:
        return self[0].linear_head.linear


_PARTS = {
    "BcosResNet": _ResNetParts,
    "BcosDenseNet": _Parts,
    "BcosVGG": _Parts,
    "BcosConvNeXt": _Parts,
    "BcosSequential": _TransformerParts,
}


def bcos_network(wanted: Wanted) -> Built:
    """bcos/NAME with NAME as in the package's list of published networks, small-resnet or small-vit.

    Options go to the constructor. Raises ``UserError`` for a name or an option that there is not.
    """
    name = f"bcos/{wanted.name}"
    if wanted.name in _SMALL:
        return _small(wanted, name)
    source = package("bcos.models.pretrained", name, "bcos")
    three_channels(wanted, name)
    known = [entry for entry in source.list_available() if not entry.startswith("standard_")]
    if wanted.name not in known:
        raise UserError(f"There is no B-cos network {wanted.name!r}; {nearest(wanted.name, (*known, *_SMALL))}")
    classes = _CLASSES if wanted.classes is None else wanted.classes
    options = dict(wanted.options)
    # None is -log(classes - 1) for this number of classes; the published value is for ImageNet's.
    given = options if classes == _CLASSES else {"logit_bias": None, **options}
    with sound_options(name):
        network = getattr(source, wanted.name)(num_classes=classes, **given)
    _check_options(name, network, options)
    if wanted.pretrained:
        _take_published(source, wanted, network)
    transformer = type(network).__name__ == "BcosSequential"
    if transformer and classes != _CLASSES:
        network[1].logit_bias = _logit_bias(classes)
    size = (_SIDE, _SIDE) if wanted.pretrained or transformer else None
    return Built(_with_parts(network, wanted.name), classes, size=size, encoding="six-channels", options=options)


def _with_parts(network: nn.Module, name: str) -> nn.Module:
    network.__class__ = type(name, (_PARTS[type(network).__name__], type(network)), {})
    return network


def _logit_bias(classes: int) -> float:
    """Of networks that start with each class as likely as one among so many: -log(classes - 1)."""
    return -math.log(max(classes - 1, 1))


def _check_options(name: str, network: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for an option that the package's constructor would leave out without a word."""
    body = network[0] if isinstance(network, nn.Sequential) else network
    known = inspect.signature(type(body).__init__).parameters
    for option in options:
        if option not in known and option != "bcos_args":
            raise UserError(f"{name} has no option {option!r}; {nearest(option, known)}")


def _take_published(source: Any, wanted: Wanted, network: nn.Module) -> None:
    """Published weights; a last layer for another number of classes keeps its own."""
    with fetching(f"bcos/{wanted.name}"):
        state = getattr(source, wanted.name)(pretrained=True, **wanted.options).state_dict()
    own = network.state_dict()
    fresh = {key: value for key, value in own.items() if value.shape != state[key].shape}
    network.load_state_dict({**state, **fresh})


# Small networks -----------------------------------------------------------------------------------------------


def _small(wanted: Wanted, name: str) -> Built:
    """One of ours, of any number of channels."""
    package("bcos.models.pretrained", name, "bcos")
    if wanted.pretrained:
        raise UserError(f"{name!r} has no published weights; leave out `pretrained` or give `weights`.")
    if wanted.classes is None:
        raise UserError(f"The model {name!r} needs num_classes.")
    options, build = dict(wanted.options), _SMALL[wanted.name]
    known = list(inspect.signature(build).parameters)[2:]
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}; {nearest(option, known)}")
    with sound_options(name):
        network = build(wanted.classes, 2 * wanted.channels, **options)
    size = (options["image_size"],) * 2 if "image_size" in options else None
    return Built(_with_parts(network, wanted.name), wanted.classes, size=size, encoding="six-channels", options=options)


def _small_resnet(
    classes: int,
    channels: int,
    *,
    layers: tuple[int, ...] = (1, 1, 1),
    inplanes: int = 16,
    small_inputs: bool = True,
) -> nn.Module:
    """Residual blocks of B-cos convolutions, ``layers`` in each stage of ``inplanes``, twice that, and so on.

    Normalised by uncentred batch statistics without bias, as the published ones. ``small_inputs`` leaves out the stem
    that makes the image four times smaller.
    """
    from bcos.models.resnet import BasicBlock, BcosResNet
    from bcos.modules import norms

    norm = norms.NoBias(norms.BatchNormUncentered2d)
    return BcosResNet(
        BasicBlock,
        list(layers),
        num_classes=classes,
        in_chans=channels,
        inplanes=inplanes,
        small_inputs=small_inputs,
        norm_layer=norm,
        logit_bias=_logit_bias(classes),
    )


def _small_vit(
    classes: int,
    channels: int,
    *,
    image_size: int,
    patch_size: int,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    mlp_dim: int = 128,
) -> nn.Module:
    """A vision transformer of B-cos layers for square images of ``image_size`` pixels, without a convolutional stem."""
    from bcos.models.vit import SimpleViT
    from bcos.modules import BcosLinear, LogitLayer, norms
    from bcos.modules.common import BcosSequential

    with warnings.catch_warnings():
        # The package warns that this constructor leaves out the layer of the logits, which is added here.
        warnings.filterwarnings("ignore", message=".*entrypoints from.*")
        body = SimpleViT(
            image_size=image_size,
            patch_size=patch_size,
            num_classes=classes,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_dim=mlp_dim,
            channels=channels,
            linear_layer=BcosLinear,
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            act_layer=nn.Identity,
        )
    return BcosSequential(body, LogitLayer(logit_bias=_logit_bias(classes)))


_SMALL = {"small-resnet": _small_resnet, "small-vit": _small_vit}
