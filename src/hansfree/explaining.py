"""Heatmaps of image files, as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hansfree.config import construct
from hansfree.core import Classifier
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS
from hansfree.models import load_model
from hansfree.report.charts import common_limit, normalised, relevance_palette
from hansfree.runs import atomic_path


def explain_images(
    model: str,
    images: Sequence[Path],
    explainers: Sequence[str],
    out: Path,
    *,
    target: int | None = None,
    pretrained: bool = False,
) -> Iterator[Path]:
    """Write one picture per image, the image and a map per explainer side by side; yields the paths.

    Every explainer and image is checked before the first picture is drawn. Raises ``UserError``.
    """
    network = load_model(model, pretrained=pretrained).eval()
    chosen = {name: construct(EXPLAINERS, _settings(name), "explainer") for name in explainers}
    size = network.config.get("pretrained_cfg", {}).get("input_size")
    pixels = [read_image(path, network, size) for path in images]
    for path, input in zip(images, pixels):
        with torch.no_grad():
            shown = int(network(input).argmax(1)) if target is None else target
            wanted = torch.tensor([shown])
            maps = {name: explainer(network, input, wanted).map[0].sum(0) for name, explainer in chosen.items()}
        names = network.config.get("label_names")
        title = f"Why {names[shown] if names else f'class {shown}'}?"
        picture = out / f"{path.stem}.png"
        figure = draw(input[0].permute(1, 2, 0).numpy(), {name: map.numpy() for name, map in maps.items()}, title)
        with atomic_path(picture) as temporary:
            figure.savefig(temporary, dpi=150)
        yield picture


def draw(image: np.ndarray, maps: Mapping[str, np.ndarray], title: str) -> Figure:
    """The image and its maps side by side; each map is divided by its mean absolute value and drawn on one scale."""
    shown = {name: normalised(map) for name, map in maps.items()}
    limit = common_limit(map for map in shown.values() if map is not None)
    colours = ListedColormap(np.frombuffer(relevance_palette(), dtype=np.uint8).reshape(-1, 3) / 255)
    figure = Figure(figsize=(3 * (1 + len(maps)), 3.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    axes[0].imshow(image, cmap="gray", vmin=0, vmax=1)
    axes[0].set_title("image")
    for place, (name, map) in zip(axes[1:], shown.items()):
        place.imshow(np.zeros((1, 1)) if map is None else map, cmap=colours, vmin=-limit, vmax=limit)
        place.set_title(name if map is not None else f"{name} (not finite)")
    scale = ScalarMappable(Normalize(-limit, limit), colours)
    figure.colorbar(scale, ax=axes[1:], label="relevance / its mean size", shrink=0.8)
    for place in axes:
        place.set_axis_off()
    return figure


def _settings(name: str) -> dict[str, Any]:
    return {"name": name, **({"epsilon": 0.01} if name == "lrp" else {})}


def read_image(path: Path, model: Classifier, size: Sequence[int] | None) -> Tensor:
    """An image file as pixels in [0, 1], [1, c, h, w], resized to what the model was trained on."""
    channels = model.config.get("channels", 3)
    try:
        image = Image.open(path).convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); check the path and the format.") from error
    if size:
        image = image.resize((size[2], size[1]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))[None]
