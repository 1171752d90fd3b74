"""Classifiers of torchvision and timm by name, with the 224-pixel stem or one for small images."""

from typing import Any

from torch import nn

from hansfree.errors import UserError, nearest
from hansfree.models.sources import Built, Wanted, fetching, needs_classes, package, sound_options
from hansfree.models.torchvision_parts import last_path, with_parts


def torchvision_network(wanted: Wanted) -> Built:
    """A torchvision classifier that speaks timm's words."""
    name = f"torchvision/{wanted.name}"
    models = package("torchvision.models", name, "vision")
    known = models.list_models(module=models)
    if wanted.name not in known:
        raise UserError(f"torchvision has no classifier {wanted.name!r}; {nearest(wanted.name, known)}")
    _check_channels(wanted, name)
    published = _torchvision_weights(models, wanted)
    transform = None if published is None else published.transforms()
    options = _complete(wanted, published is not None)
    settings = _for_torchvision(wanted.name, options, published is not None)
    classes = _classes(wanted, None if published is None else _count(published))
    with fetching(name) if published is not None else sound_options(name):
        network = models.get_model(wanted.name, weights=published, **settings)
    with_parts(network, wanted.name)
    _replace_last(network, classes)
    _replace_stem(network, wanted, name)
    return Built(
        network,
        classes,
        mean=None if transform is None else tuple(transform.mean),
        std=None if transform is None else tuple(transform.std),
        size=_torchvision_size(network, wanted, transform),
        options=options,
        label_names=tuple(published.meta["categories"]) if published and classes == _count(published) else (),
    )


def timm_network(wanted: Wanted) -> Built:
    """A timm model; ``stem: small`` is for its ResNets."""
    name = f"timm/{wanted.name}"
    timm = package("timm", name, "vision")
    if not timm.is_model(wanted.name):
        raise UserError(f"timm has no model {wanted.name!r}; {nearest(wanted.name, timm.list_models())}")
    if wanted.pretrained:
        _check_channels(wanted, name)
    with sound_options(name):
        config = timm.get_pretrained_cfg(wanted.name)
    classes = _classes(wanted, config.num_classes if wanted.pretrained and config else None)
    build = {"pretrained": bool(wanted.pretrained), "num_classes": classes, "in_chans": wanted.channels}
    with fetching(name) if wanted.pretrained else sound_options(name):
        network = timm.create_model(wanted.name, **build, **wanted.options)
    if wanted.stem == "small":
        if not hasattr(network, "maxpool"):
            raise UserError(f"{name} has no ResNet stem to shrink; leave out `stem: small`.")
        network.conv1 = nn.Conv2d(wanted.channels, network.conv1.out_channels, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    return Built(
        network,
        classes,
        mean=tuple(config.mean) if wanted.pretrained else None,
        std=tuple(config.std) if wanted.pretrained else None,
        size=_timm_size(network, wanted),
        options=wanted.options,
    )


def _classes(wanted: Wanted, published: int | None) -> int:
    classes = published if wanted.classes is None else wanted.classes
    if classes is None:
        raise needs_classes(wanted.name)
    return classes


def _check_channels(wanted: Wanted, name: str) -> None:
    if wanted.pretrained and wanted.channels != 3:
        raise UserError(
            f"The published weights of {name} are for 3 channels, not {wanted.channels}; "
            "leave out `pretrained` or use colour images."
        )


def _torchvision_weights(models: Any, wanted: Wanted) -> Any:
    """The published weights that are wanted: the newest for True, else those of the given name; None for False."""
    if not wanted.pretrained:
        return None
    published = models.get_model_weights(wanted.name)
    names = {"DEFAULT": published.DEFAULT.name, **{member.name: member.name for member in published}}
    tag = "DEFAULT" if wanted.pretrained is True else wanted.pretrained
    if tag not in names:
        raise UserError(f"torchvision/{wanted.name} has no weights {tag!r}; known: {', '.join(names)}.")
    return published[names[tag]]


def _count(published: Any) -> int:
    return len(published.meta["categories"])


def _complete(wanted: Wanted, published: bool) -> dict[str, Any]:
    """Options that build the network again: published Inception weights come with a rescaling of their input."""
    rescaled = published and wanted.name in _INCEPTIONS
    return {**({"transform_input": True} if rescaled else {}), **wanted.options}


def _for_torchvision(name: str, options: dict[str, Any], published: bool) -> dict[str, Any]:
    """Options without the auxiliary heads of the Inceptions, which only an older way of training reads."""
    if name not in _INCEPTIONS:
        return options
    if published:  # GoogLeNet drops its heads by itself and refuses to be told so
        return options if name == "googlenet" else {"aux_logits": False, **options}
    return {"aux_logits": False, "init_weights": True, **options}


_INCEPTIONS = ("googlenet", "inception_v3")


def _replace_last(network: nn.Module, classes: int) -> None:
    path = last_path(network)
    old = network.get_submodule(path)
    if isinstance(old, nn.Linear) and old.out_features != classes:
        network.set_submodule(path, nn.Linear(old.in_features, classes, bias=old.bias is not None))
    if isinstance(old, nn.Conv2d) and old.out_channels != classes:
        network.set_submodule(path, _like(old, outputs=classes))
    if hasattr(network, "num_classes"):
        network.num_classes = classes  # pyright: ignore


def _replace_stem(network: nn.Module, wanted: Wanted, name: str) -> None:
    if wanted.stem == "small":
        if not hasattr(network, "maxpool") or not hasattr(network, "layer4"):
            raise UserError(f"{name} has no ResNet stem to shrink; leave out `stem: small`.")
        network.conv1 = nn.Conv2d(wanted.channels, network.conv1.out_channels, 3, 1, 1, bias=False)  # pyright: ignore
        network.maxpool = nn.Identity()
    elif wanted.channels != 3:
        path, first = next((p, m) for p, m in network.named_modules() if isinstance(m, nn.Conv2d))
        network.set_submodule(path, _like(first, inputs=wanted.channels))


def _like(conv: nn.Conv2d, *, inputs: int | None = None, outputs: int | None = None) -> nn.Conv2d:
    """A fresh convolution of the same geometry."""
    return nn.Conv2d(
        inputs or conv.in_channels,
        outputs or conv.out_channels,
        conv.kernel_size,  # pyright: ignore
        conv.stride,  # pyright: ignore
        conv.padding,  # pyright: ignore
        bias=conv.bias is not None,
    )


def _torchvision_size(network: Any, wanted: Wanted, transform: Any) -> tuple[int, int] | None:
    """The only size that the network takes, else the size that its weights were published for."""
    if hasattr(network, "image_size"):  # vision transformers
        return network.image_size, network.image_size
    if wanted.name.startswith("maxvit"):
        return tuple(wanted.options.get("input_size", (224, 224)))
    if transform is None or wanted.stem == "small":
        return None
    return transform.crop_size[0], transform.crop_size[0]


def _timm_size(network: Any, wanted: Wanted) -> tuple[int, int] | None:
    config = network.pretrained_cfg
    patches: Any = getattr(network, "patch_embed", None)
    if getattr(patches, "img_size", None) is not None and getattr(patches, "strict_img_size", False):
        height, width = patches.img_size
        return height, width
    if config.get("fixed_input_size") or (wanted.pretrained and wanted.stem == "imagenet"):
        return tuple(config["input_size"][1:])
    return None
