"""Models by name, path or factory; saving and loading without ever unpickling code."""

import copy
import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hansfree.config import construct
from hansfree.core import Classifier, Encoding, InputSpec
from hansfree.errors import UserError, nearest
from hansfree.models.bcos import bcos_network
from hansfree.models.clip import BorrowedPooling, ClipClassifier, clip_network
from hansfree.models.efficientnet_lite import (
    PUBLISHED,
    EfficientNetLite,
    efficientnet_lite0,
    efficientnet_lite1,
    efficientnet_lite2,
    with_published_weights,
)
from hansfree.models.huggingface import huggingface_network
from hansfree.models.small import SmallCNN, SmallResNet
from hansfree.models.sources import Built, Stem, Wanted, needs_classes
from hansfree.models.weights import load_weights
from hansfree.models.zoo import timm_network, torchvision_network
from hansfree.runs import atomic_path

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": SmallCNN,
    "small-resnet": SmallResNet,
    "efficientnet-lite0": efficientnet_lite0,
    "efficientnet-lite1": efficientnet_lite1,
    "efficientnet-lite2": efficientnet_lite2,
}
"""Our own networks; beside them go the sources, exported folders and package.module:factory."""

SOURCES: dict[str, Callable[[Wanted], Built]] = {
    "torchvision": torchvision_network,
    "timm": timm_network,
    "open_clip": clip_network,
    "hf": huggingface_network,
    "bcos": bcos_network,
}
"""Whose networks go by SOURCE/NAME."""


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    channels: int = 3,
    pretrained: bool | str = False,
    stem: Stem = "imagenet",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: tuple[int, int] | Literal["any"] | None = None,
    weights: str | None = None,
    adapter: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Classifier:
    """A :class:`Classifier` that takes pixels in [0, 1] and prepares them inside.

    ``name`` is one of ours (small-cnn, efficientnet-lite0 ...), torchvision/NAME, timm/NAME, open_clip/NAME,
    hf/NAME, bcos/NAME, a folder that ``export`` wrote, or ``package.module:factory`` (called with num_classes and
    ``options``). ``pretrained`` fetches the published weights (a string names which, where there are several) with
    their mean, std and size; ``weights`` reads a file (safetensors, or a torch file of tensors only). ``size``
    (height, width) is what images are resized to inside; None is the size that the network or its published weights
    were made for, and no resizing where there is none; "any" is no resizing. ``adapter`` widens the last feature map
    by a 1x1 convolution to that many channels.
    Raises ``UserError`` for an unknown name, a damaged file, or weights of another shape.
    """
    if (Path(name) / "config.json").is_file():
        return _exported(Path(name), num_classes)
    built = _build(name, Wanted(name, num_classes, channels, pretrained, stem, dict(options or {})))
    if mean is not None or std is not None:
        built = dataclasses.replace(built, mean=mean, std=std)
    if size is not None:
        built = dataclasses.replace(built, size=None if size == "any" else (size[0], size[1]))
    described = {"architecture": name, "channels": channels, "stem": stem}
    return _assembled(built, described, adapter=adapter, weights=None if weights is None else Path(weights))


def wrap(
    network: nn.Module,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: tuple[int, int] | None = None,
    encoding: Encoding = "plain",
    label_names: tuple[str, ...] = (),
) -> Classifier:
    """Any network [b, c, h, w] -> [b, classes] with its preprocessing, as a :class:`Classifier`.

    Pixels in [0, 1] are resized to ``size``, encoded, and normalised by ``mean`` and ``std``; each is left out where
    it is None. The network is held as it is, not copied. Teachers and students, explainers and ``save_model`` take
    the result like any other model; what is saved is loaded by building the network and reading ``weights``.
    """
    described = {"architecture": _WRAPPED + type(network).__name__, "channels": None, "stem": "imagenet"}
    built = Built(network, len(label_names), mean, std, size, encoding, label_names=label_names)
    model = _assembled(built, described)
    model.config["num_classes"] = len(label_names) or None
    return model


_WRAPPED = "wrapped "


def _assembled(
    built: Built, described: Mapping[str, Any], *, adapter: int | None = None, weights: Path | None = None
) -> Classifier:
    """The network with its preprocessing, and the description that builds it again."""
    channels = described["channels"]
    for values in (built.mean, built.std):
        if values is not None and channels is not None and len(values) not in (1, _encoded(channels, built.encoding)):
            raise UserError(
                f"The model {described['architecture']!r} sees {_encoded(channels, built.encoding)} channels, but mean "
                f"or std has {len(values)} values; give one value per channel."
            )
    input_size = {} if built.size is None else {"input_size": [channels, *built.size]}
    config: dict[str, Any] = {
        "architecture": described["architecture"],
        "num_classes": built.classes,
        "channels": channels,
        "stem": described["stem"],
        "options": dict(built.options),
        "pretrained_cfg": {"mean": _listed(built.mean), "std": _listed(built.std), **input_size},
        "size": _listed(built.size),
        "encoding": built.encoding,
        "adapter": None,
    }
    if built.label_names:
        config["label_names"] = list(built.label_names)
    model = Classifier(built.network, config, mean=built.mean, std=built.std, size=built.size, encoding=built.encoding)
    if (head := described.get("head")) is not None:
        lender = _build(head["architecture"], Wanted("", built.classes, options=head["options"])).network
        _borrow_head(model, lender, head)
    elif adapter is not None:
        attach_adapter(model, adapter)
    if weights is not None:
        load_weights(model, weights)
    return model


def _encoded(channels: int, encoding: Encoding) -> int:
    return 2 * channels if encoding == "six-channels" else channels


def _listed(values: tuple[Any, ...] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _build(name: str, wanted: Wanted) -> Built:
    source, _, rest = name.partition("/")
    if name in MODELS:
        return _own(name, wanted)
    if source in SOURCES and rest:
        return SOURCES[source](dataclasses.replace(wanted, name=rest))
    if ":" in name:
        return _factory(name, wanted)
    if "/" in name or name.startswith("."):
        raise UserError(
            f"{name} holds no exported model (no config.json there); export one with `hansfree export RUN`."
        )
    sources = ", ".join(f"{source}/NAME" for source in SOURCES)
    raise UserError(
        f"There is no model {name!r} of ours (others are written {sources}, such as torchvision/resnet18, or "
        f"package.module:factory); {nearest(name, MODELS)}"
    )


def _own(name: str, wanted: Wanted) -> Built:
    if wanted.pretrained and name not in PUBLISHED:
        raise UserError(f"{name!r} has no published weights; leave out `pretrained` or give `weights`.")
    classes = 1000 if wanted.classes is None and wanted.pretrained else wanted.classes
    if classes is None:
        raise needs_classes(name)
    given = {"num_classes": classes, "channels": wanted.channels}
    network = construct(MODELS, {"name": name, **wanted.options}, "model", given=given)
    if wanted.pretrained:
        assert isinstance(network, EfficientNetLite)
        return dataclasses.replace(with_published_weights(name, network), options=wanted.options)
    return Built(network, classes, options=wanted.options)


def _factory(name: str, wanted: Wanted) -> Built:
    """A network of the user's own; ``channels`` is passed on where the factory has such a parameter."""
    if wanted.classes is None:
        raise needs_classes(name)
    if wanted.pretrained:
        raise UserError(f"{name!r} has no published weights; leave out `pretrained` or give `weights`.")
    factory = imported(name, "model")
    takes = inspect.signature(factory).parameters if callable(factory) else {}
    given = {"channels": wanted.channels} if "channels" in takes else {}
    network = factory(num_classes=wanted.classes, **{**given, **wanted.options})
    if not isinstance(network, nn.Module):
        raise UserError(f"{name!r} returned a {type(network).__name__}, not a torch.nn.Module; return the network.")
    return Built(network, wanted.classes, options=wanted.options)


def imported(name: str, kind: str) -> Any:
    """What ``package.module:Name`` names: the user's own model, method, explainer or benchmark."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"The {kind} {name!r} cannot be imported ({error}); write package.module:Name.") from error


def save_model(
    model: Classifier, folder: Path, *, input: InputSpec | None = None, classes: tuple[str, ...] = ()
) -> None:
    """Write ``model.safetensors`` and ``config.json`` (timm / Hugging Face layout) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model.config)
    if input is not None:
        config["pretrained_cfg"] = {
            **config["pretrained_cfg"],
            "input_size": [input.channels, input.height, input.width],
        }
    if classes:
        config["label_names"] = list(classes)
    with atomic_path(folder / "model.safetensors") as path:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    with atomic_path(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _exported(folder: Path, num_classes: int | None) -> Classifier:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = str(config["architecture"])
        _refuse_wrapped(name, folder)
        classes = int(config["num_classes"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'config.json'} is not a model's description ({error!r}); export it again, "
            f"or write hf/{folder} where it is a Hugging Face model's."
        ) from error
    if num_classes is not None and classes != num_classes:
        raise UserError(
            f"The model in {folder} tells {classes} classes apart, but the data have {num_classes}; "
            "use a model trained for these classes."
        )
    described = {"architecture": name, "channels": config.get("channels", 3), "stem": config.get("stem", "imagenet")}
    described["head"] = config.get("head")
    wanted = Wanted(name, classes, described["channels"], False, described["stem"], config.get("options") or {})
    normalisation = config.get("pretrained_cfg") or {}
    built = dataclasses.replace(
        _build(name, wanted),
        mean=_tupled(normalisation.get("mean")),
        std=_tupled(normalisation.get("std")),
        size=_tupled(config.get("size")),
    )
    weights = folder / "model.safetensors"
    model = _assembled(built, described, adapter=config.get("adapter"), weights=weights)
    model.config = config
    return model


def _refuse_wrapped(name: str, folder: Path) -> None:
    if name.startswith(_WRAPPED):
        raise UserError(
            f"The {name.removeprefix(_WRAPPED)} in {folder} was wrapped in Python and no name builds it; build it "
            f"there, wrap it and read {folder / 'model.safetensors'}."
        )


def _tupled(values: list[Any] | None) -> Any:
    return None if values is None else tuple(values)


def attach_adapter(model: Classifier, width: int) -> None:
    """Put a bias-free 1x1 convolution behind the last feature map and widen the last layer to ``width`` inputs.

    Raises ``UserError`` where other layers with weights stand between that map and the last layer.
    """
    old = last_layer(model, "student")
    adapter = nn.Conv2d(old.in_features, width, 1, bias=False)
    nn.init.kaiming_normal_(adapter.weight, nonlinearity="linear")
    layer = nn.Linear(width, old.out_features, bias=old.bias is not None)
    _check_adapter(model, adapter, layer)
    model.adapter = adapter
    _replace_classifier(model, layer)
    model.config["adapter"] = width


def _check_adapter(model: Classifier, adapter: nn.Conv2d, layer: nn.Linear) -> None:
    probe = copy.deepcopy(model).cpu().float().eval()
    features = torch.zeros(1, adapter.in_channels, 7, 7)
    try:
        with torch.no_grad():
            probe.forward_head(features)
            _replace_classifier(probe, layer)
            probe.forward_head(adapter(features))
    except (RuntimeError, ValueError, IndexError) as error:
        name = model.config.get("architecture", "The network")
        raise UserError(
            f"{name} has other layers between its last feature map and its last layer, so "
            "that no adapter fits; set last_layer: free, or choose a network with global average pooling."
        ) from error


def transplant_last_layer(model: Classifier, teacher: nn.Module) -> None:
    """Copy the teacher's last layer into ``model`` and freeze it, behind a trainable adapter where widths differ.

    Lee & Lee, Debiased distillation by transplanting the last layer, 2023; used by Bassi et al., 2024.
    Raises ``UserError`` where class counts differ.
    """
    source, target = last_layer(teacher, "teacher"), last_layer(model, "student")
    if source.out_features != target.out_features:
        raise UserError(
            f"The teacher tells {source.out_features} classes apart and the student {target.out_features}; "
            "their last layer cannot be shared."
        )
    if source.in_features != target.in_features:
        attach_adapter(model, source.in_features)
    copy = nn.Linear(source.in_features, source.out_features, bias=source.bias is not None)
    copy.load_state_dict(source.state_dict())
    _replace_classifier(model, copy.requires_grad_(False))


def transplant_head(model: Classifier, teacher: nn.Module) -> None:
    """Copy a CLIP ResNet's attention pooling and last layer into ``model``, frozen, behind a trainable 1x1 convolution.

    So does the published code of Bassi et al., 2024, where a CLIP teaches. Raises ``UserError`` where the teacher is
    no such network, class counts differ, or the student has more behind its last feature map than one layer.
    """
    lender = teacher.network if isinstance(teacher, Classifier) else None
    if not isinstance(teacher, Classifier) or not isinstance(lender, ClipClassifier) or not lender.pools_by_attention:
        raise UserError("method.last_layer: head needs one of CLIP's ResNets as a teacher; for others use copied.")
    if lender.head.out_features != (own := last_layer(model, "student")).out_features:
        raise UserError(
            f"The teacher tells {lender.head.out_features} classes apart and the student {own.out_features}; "
            "their head cannot be shared."
        )
    described = {key: teacher.config[key] for key in ("architecture", "options")}
    for part in _borrow_head(model, lender, teacher.config.get("head") or described):
        part.requires_grad_(False)


def _borrow_head(model: Classifier, lender: nn.Module, described: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    assert isinstance(lender, ClipClassifier)
    pool: Any = copy.deepcopy(lender.visual.attnpool)
    head = copy.deepcopy(lender.head)
    attach_adapter(model, pool.k_proj.in_features)  # refuses other layers in between; its last layer is not kept
    body = model.network
    _replace_classifier(model, nn.Identity())
    model.network = ClipClassifier(BorrowedPooling(body, pool), head, normalised=lender.normalised)
    model.config.update(adapter=None, head=described)
    return pool, head


def last_layer(model: nn.Module, role: str) -> nn.Linear:
    """The linear layer that makes the logits, or ``model`` itself where it is that layer alone.

    Raises ``UserError`` where the model does not show it.
    """
    layer = model.get_classifier() if isinstance(model, Classifier) else model
    if not isinstance(layer, nn.Linear):
        raise UserError(f"The {role}'s last layer is not a linear layer that could be copied; set last_layer: free.")
    return layer


def _replace_classifier(model: Classifier, layer: nn.Module) -> None:
    old = model.get_classifier()
    name = next(name for name, module in model.network.named_modules() if module is old)
    model.network.set_submodule(name, layer)


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy whose normalisation layers use the batch's own statistics, in eval mode too.

    What some papers' code does to its teacher by leaving it in train mode; here it is a choice, and the
    model's mode and running statistics stay as they are.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for buffer in ("running_mean", "running_var", "running"):
            if isinstance(getattr(module, buffer, None), Tensor):
                setattr(module, buffer, None)
    return twin
