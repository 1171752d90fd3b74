"""The models of an audit: loaded by what people type, and tried on two images before anything is written."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hansfree.audits.activations import activations
from hansfree.config import construct
from hansfree.core import Classifier, Explainer
from hansfree.errors import UserError
from hansfree.explaining import has_random_weights
from hansfree.explaining.look import explainer_of, section_of
from hansfree.models import load_model

DEFAULT_EXPLAINERS = ("lrp:epsilon=0.01", "bcos", "gradient-x-input", "gradient")
"""The first of these that has a map for every model is used where none is named."""
UNKNOWN_CLASSES = 1000
"""Classes of a network that goes by its name, where neither its settings nor the data say how many: ImageNet's."""


def load(text: str, classes: int | None, channels: int, device: torch.device) -> tuple[Classifier, bool]:
    """The model that ``text`` names, and whether its weights are random.

    A run's folder, an exported one, or a name with settings: ``torchvision/resnet18:weights=cats.safetensors``.
    Settings that :func:`hansfree.models.load_model` does not take are the network's own; ``classes`` and
    ``channels`` are those of the data. Raises ``UserError`` as :func:`hansfree.models.load_model` does.
    """
    folder = next((place for place in (Path(text) / "exported", Path(text)) if (place / "config.json").is_file()), None)
    if folder is not None:
        return _ready(load_model(str(folder), num_classes=classes), device), False
    if Path(text).is_dir():
        raise UserError(f"{text} holds no finished run and no exported model; finish the run with --resume first.")
    settings = section_of(text, "model", "torchvision/resnet18:weights=cats.safetensors")
    name = settings.pop("name")
    if not settings.get("pretrained") and not name.startswith("hf/"):
        settings = {"num_classes": classes or UNKNOWN_CLASSES, "channels": channels, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights that are random should be the same ones when the command goes on
        known = inspect.signature(load_model).parameters
        options = {key: settings.pop(key) for key in list(settings) if key not in known}
        section = {**settings, **({"options": options} if options else {}), "name": "model"}
        model = construct({"model": load_model}, section, "model", given={"name": name})
    if not isinstance(model, Classifier):
        raise UserError(f"{text} takes no images; name a classifier of images.")
    return _ready(model, device), has_random_weights(name, settings)


def _ready(model: Classifier, device: torch.device) -> Classifier:
    return model.eval().requires_grad_(False).to(device)


def own_size(models: Sequence[Classifier]) -> int:
    """The longest side of images that any of the models was made for; 224 where none says."""
    sizes = [
        model.size or ((model.config.get("pretrained_cfg") or {}).get("input_size") or [0])[1:] for model in models
    ]
    return max((int(side) for size in sizes for side in size), default=224)


@torch.no_grad()
def check(text: str, model: Classifier, images: Tensor, classes: Sequence[str], layers: Sequence[str]) -> None:
    """Raises ``UserError`` for images that the model cannot take, other classes, and a layer that is not there."""
    channels = model.config.get("channels") or images.shape[1]
    if channels != images.shape[1]:
        raise UserError(
            f"{text} takes images of {channels} channels, but these have {images.shape[1]}; choose other data, or a "
            "model for these."
        )
    try:
        count = model(images).shape[1]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{text} cannot take images of {images.shape[2]} x {images.shape[3]} pixels ({reason}); give another "
            "--size, or images of the size that it was trained on."
        ) from error
    if classes and count != len(classes):
        raise UserError(
            f"{text} tells {count} classes apart, but the data have {len(classes)}; use a model trained for these "
            "classes, or name a folder of images without labels."
        )
    names = [str(name) for name in model.config.get("label_names") or ()]
    if classes and names != list(classes) and sorted(names) == sorted(classes):
        raise UserError(
            f"{text} has the classes {', '.join(names)} in this order, the data have them as {', '.join(classes)}; "
            "write them in the model's order, as `classes` in benchmark.json."
        )
    if layers:
        activations(model, layers, images)


def chosen_explainers(asked: Sequence[str], models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Explainer]:
    """The explainers that are ``asked`` for, by their texts; else the first of the default ones that no model refuses.

    Raises ``UserError`` for an explainer that a model refuses, with its reason.
    """
    if asked:
        found = {text: explainer_of(text) for text in dict.fromkeys(asked)}
        for text, explainer in found.items():
            for name, model in models.items():
                if (reason := _refusal(explainer, model, images)) is not None:
                    raise UserError(f"There is no map of {name} by {text}: {reason}")
        return found
    reason = ""
    for text in DEFAULT_EXPLAINERS:
        explainer = explainer_of(text)
        refusals = [refused for model in models.values() if (refused := _refusal(explainer, model, images))]
        if not refusals:
            return {text: explainer}
        reason = refusals[0]
    raise UserError(f"No explainer has a map for all models ({reason}); name others with --explainer.")


@torch.no_grad()
def _refusal(explainer: Explainer, model: nn.Module, images: Tensor) -> str | None:
    draws: dict[str, Any] = {
        name: value.to(images.device) for name, value in explainer.fixed_draws(torch.arange(len(images))).items()
    }
    try:
        map = explainer(model, images, lambda logits: logits.argmax(1), draws=draws).map
    except UserError as error:
        return str(error)
    if map.ndim != 4:
        return f"its map has shape {list(map.shape)}, which is no picture; choose an explainer whose map is one."
    return None
