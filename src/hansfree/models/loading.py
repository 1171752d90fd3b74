"""Models by name, path or factory; saving and loading without ever unpickling code."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hansfree.config import construct
from hansfree.core import Classifier, InputSpec
from hansfree.errors import UserError, unknown
from hansfree.models.small import SmallCNN, SmallResNet
from hansfree.models.zoo import Stem, published_normalisation, timm_network, torchvision_network
from hansfree.runs import atomic_path

MODELS: dict[str, Callable[..., nn.Module]] = {"small-cnn": SmallCNN, "small-resnet": SmallResNet}
"""Our own small networks; beside them go torchvision/NAME, timm/NAME, exported folders and package.module:factory."""


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    channels: int = 3,
    pretrained: bool = False,
    stem: Stem = "imagenet",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    weights: str | None = None,
    adapter: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Classifier:
    """A :class:`Classifier` that takes pixels in [0, 1] and normalises inside.

    ``name`` is one of ours (small-cnn, small-resnet), torchvision/NAME, timm/NAME, a folder that ``export``
    wrote, or ``package.module:factory`` (called with num_classes and ``options``). ``pretrained`` fetches the
    published weights and their mean and std; ``weights`` reads a file (safetensors, or a torch file of tensors
    only). ``adapter`` widens the last feature map by a 1x1 convolution to that many channels.
    Raises ``UserError`` for an unknown name, a damaged file, or weights of another shape.
    """
    if (Path(name) / "config.json").is_file():
        return _exported(Path(name), num_classes)
    classes = 1000 if num_classes is None and pretrained else num_classes
    if classes is None:
        raise UserError(f"The model {name!r} needs num_classes.")
    if pretrained and mean is None and std is None:
        mean, std = published_normalisation(name)
    network = _network(name, classes, channels, pretrained, stem, dict(options or {}))
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": classes,
        "channels": channels,
        "stem": stem,
        "options": dict(options or {}),
        "pretrained_cfg": {"mean": None if mean is None else list(mean), "std": None if std is None else list(std)},
        "adapter": None,
    }
    model = Classifier(network, config, mean=mean, std=std)
    if adapter is not None:
        attach_adapter(model, adapter)
    if weights is not None:
        _load_weights(model, Path(weights))
    return model


def _network(
    name: str, classes: int, channels: int, pretrained: bool, stem: Stem, options: dict[str, Any]
) -> nn.Module:
    source, _, rest = name.partition("/")
    if name in MODELS:
        if pretrained:
            raise UserError(f"{name!r} has no published weights; leave out `pretrained` or give `weights`.")
        given = {"num_classes": classes, "channels": channels}
        return construct(MODELS, {"name": name, **options}, "model", given=given)
    if source in ("torchvision", "timm") and rest:
        if options:
            raise UserError(f"The model {name!r} takes no options, but got {', '.join(options)}.")
        build = torchvision_network if source == "torchvision" else timm_network
        return build(rest, classes, pretrained=pretrained, stem=stem, channels=channels)
    if ":" in name:
        return imported(name, "model")(num_classes=classes, **options)
    if "/" in name or name.startswith("."):
        raise UserError(
            f"{name} holds no exported model (no config.json there); export one with `hansfree export RUN`."
        )
    raise unknown("model", name, [*MODELS, "torchvision/resnet18", "timm/resnet18"])


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
        name, classes = str(config["architecture"]), int(config["num_classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'config.json'} is not a model's description ({error!r}); export it again."
        ) from error
    if num_classes is not None and classes != num_classes:
        raise UserError(
            f"The model in {folder} tells {classes} classes apart, but the data have {num_classes}; "
            "use a model trained for these classes."
        )
    normalisation = config.get("pretrained_cfg") or {}
    model = load_model(
        name,
        num_classes=classes,
        channels=config.get("channels", 3),
        stem=config.get("stem", "imagenet"),
        mean=normalisation.get("mean"),
        std=normalisation.get("std"),
        adapter=config.get("adapter"),
        options=config.get("options"),
        weights=str(folder / "model.safetensors"),
    )
    model.config = config
    return model


def _load_weights(model: Classifier, path: Path) -> None:
    state = _read_weights(path)
    for prefix in ("module.", "network.module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not any(name.startswith("network.") for name in state):  # a checkpoint of the bare network
        state = {f"network.{name}": value for name, value in state.items()}
    own = model.state_dict()
    differing = [name for name, value in own.items() if name in state and state[name].shape != value.shape]
    if differing:
        name = differing[0]
        raise UserError(
            f"{path} does not fit {model.config['architecture']}: {name.removeprefix('network.')} has shape "
            f"{tuple(state[name].shape)} there and {tuple(own[name].shape)} here; "
            "give the architecture, options and class count that the weights were trained with."
        )
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        what = f"{missing[0].removeprefix('network.')} is missing" if missing else f"{extra[0]} is not known here"
        raise UserError(
            f"{path} holds weights of another architecture than {model.config['architecture']}: {what}; "
            "name the architecture that the weights belong to."
        )
    model.load_state_dict(state)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"There are no weights at {path}; check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if "Weights only load failed" in str(error):
            what = "is no file of plain tensors and is not loaded; save a state_dict instead"
        else:
            what = "is damaged or not a file of weights; restore it or export the model again"
        raise UserError(f"{path} {what}.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no tensors by name; save a model's state_dict.")
    return state


def attach_adapter(model: Classifier, width: int) -> None:
    """Put a bias-free 1x1 convolution behind the last feature map and widen the last layer to ``width`` inputs."""
    old = model.get_classifier()
    model.adapter = nn.Conv2d(old.in_features, width, 1, bias=False)
    nn.init.kaiming_normal_(model.adapter.weight, nonlinearity="linear")
    _replace_classifier(model, nn.Linear(width, old.out_features, bias=old.bias is not None))
    model.config["adapter"] = width


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


def last_layer(model: nn.Module, role: str) -> nn.Linear:
    """The linear layer that makes the logits. Raises ``UserError`` where the model does not show it."""
    layer = model.get_classifier() if isinstance(model, Classifier) else None
    if not isinstance(layer, nn.Linear):
        raise UserError(f"The {role}'s last layer is not a linear layer that could be copied; set last_layer: free.")
    return layer


def _replace_classifier(model: Classifier, layer: nn.Linear) -> None:
    old = model.get_classifier()
    name = next(name for name, module in model.network.named_modules() if module is old)
    model.network.set_submodule(name, layer)


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy whose normalisation layers use the batch's own statistics, in eval mode too.

    What some papers' code does to its teacher by leaving it in train mode; here it is a choice, and the
    model's mode and running statistics stay as they are.
    """
    import copy

    twin = copy.deepcopy(model)
    for module in twin.modules():
        for buffer in ("running_mean", "running_var", "running"):
            if isinstance(getattr(module, buffer, None), Tensor):
                setattr(module, buffer, None)
    return twin
