"""Image classifiers of Hugging Face's transformers: hf/FOLDER for a local folder, hf/NAME for the hub.

The size, mean and standard deviation come from the folder's ``preprocessor_config.json`` where it has one. Weights
are read from safetensors only.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hansfree.errors import UserError
from hansfree.models.sources import Built, Wanted, fetching, needs_classes, one_line, package, sound_options
from hansfree.torchvision_guard import import_torchvision


class HuggingFaceClassifier(nn.Module):
    """A Hugging Face image classifier whose answer is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, classes]."""
        return self.model(pixel_values=x).logits

    def get_classifier(self) -> nn.Module:
        """The last linear layer of the model's head."""
        head = getattr(self.model, "classifier", None)
        layers = [] if head is None else [m for m in head.modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise UserError(f"{type(self.model).__name__} has no linear last layer; set last_layer: free.")
        return layers[-1]


def huggingface_network(wanted: Wanted) -> Built:
    """hf/FOLDER (its own weights, where it holds any) or hf/NAME (with ``pretrained``).

    Option ``config``: the model's whole description, in place of a folder; an exported folder gives it.
    """
    name = f"hf/{wanted.name}"
    with suppress(ImportError):
        import_torchvision()  # transformers imports it wherever it finds it, and fails where it does not match torch
    transformers = package("transformers", name, "text")
    if set(wanted.options) - {"config"}:
        raise UserError(f"{name} takes no options, but got {', '.join(wanted.options)}; edit its config.json.")
    described = wanted.options.get("config")
    if described is None and not wanted.pretrained and not (Path(wanted.name) / "config.json").is_file():
        raise UserError(f"{name} is no folder with a config.json; give such a folder, or set pretrained to fetch it.")
    weights = described is None and (bool(wanted.pretrained) or (Path(wanted.name) / "model.safetensors").is_file())
    config = _config(transformers, wanted, name, described)
    classes = _classes(wanted, config, name, weights)
    network = _network(transformers, wanted, name, config, weights)
    preprocessing = {} if described is not None else _preprocessing(transformers, wanted.name)
    labels = tuple(str(config.id2label[n]) for n in range(classes)) if weights else ()
    return Built(
        HuggingFaceClassifier(network),
        classes,
        mean=_values(preprocessing, "image_mean"),
        std=_values(preprocessing, "image_std"),
        size=_size(preprocessing) or _square(getattr(config, "image_size", None)),
        options={"config": config.to_diff_dict() | {"model_type": config.model_type}},
        label_names=() if any(label.startswith("LABEL_") for label in labels) else labels,
    )


def _config(transformers: Any, wanted: Wanted, name: str, described: Any) -> Any:
    if described is None:
        with fetching(name):
            return transformers.AutoConfig.from_pretrained(wanted.name)
    with sound_options(name):
        rest = {key: value for key, value in described.items() if key != "model_type"}
        return transformers.AutoConfig.for_model(described["model_type"], **rest)


def _classes(wanted: Wanted, config: Any, name: str, weights: bool) -> int:
    """The number of classes; a config that is told another number forgets the names of its own."""
    if wanted.classes is None and not weights:
        raise needs_classes(name)
    if wanted.classes is not None and wanted.classes != config.num_labels:
        config.num_labels = wanted.classes
    return config.num_labels


def _network(transformers: Any, wanted: Wanted, name: str, config: Any, weights: bool) -> nn.Module:
    factory = transformers.AutoModelForImageClassification
    read = {"config": config, "use_safetensors": True, "ignore_mismatched_sizes": True}
    with fetching(name):
        try:
            return factory.from_pretrained(wanted.name, **read) if weights else factory.from_config(config)
        except ValueError as error:
            raise UserError(
                f"{name} is no image classifier ({one_line(error)}); a text classifier is read by "
                "hansfree.models.text.load_text_model."
            ) from error


def _preprocessing(transformers: Any, name: str) -> dict[str, Any]:
    """The description of the preprocessing, empty where there is none."""
    path = transformers.utils.cached_file(
        name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _values(preprocessing: dict[str, Any], key: str) -> tuple[float, ...] | None:
    values = preprocessing.get(key)
    return None if values is None or not preprocessing.get("do_normalize", True) else tuple(values)


def _size(preprocessing: dict[str, Any]) -> tuple[int, int] | None:
    for key in ("crop_size", "size"):
        size = preprocessing.get(key)
        if isinstance(size, dict) and "height" in size:
            return size["height"], size["width"]
        if isinstance(size, dict) and "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
        if isinstance(size, int):
            return size, size
    return None


def _square(size: Any) -> tuple[int, int] | None:
    """Height and width from a side or a pair of sides."""
    if isinstance(size, int):
        return size, size
    return tuple(size) if size else None
