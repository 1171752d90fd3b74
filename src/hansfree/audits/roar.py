"""Do a model's maps name the pixels that matter? Remove them from all images and retrain: ROAR and DiffROAR.

    ROAR(f)      accuracy of a network that was trained and tested without the top share f of each image's elements
    DiffROAR(f)  accuracy without the bottom f - accuracy without the top f

f is the share that is removed; one number is the mean over several. DiffROAR is above 0 where what a map puts first
tells more about the class than what it puts last, near 0 for maps that know nothing, below 0 for maps that have it the
wrong way around. Its largest value is the accuracy less chance. Elements are pixels with all their channels, ranked by
the sum of the map over channels (``channels: together``), or values of single channels (``apart``).

Source. Hooker et al., 2019, https://arxiv.org/abs/1806.10758 (ROAR); Shah, Jain & Netrapalli, 2021,
https://arxiv.org/abs/2102.12781 (DiffROAR, of |gradient| at the label's logit, channels apart, one mean as fill); as a
measure of distilled students: Han et al., 2023, https://arxiv.org/abs/2305.15734, section 5.2.

Deviations. Elements of equal relevance go in random order, not in reading order, which would call the upper half of an
image relevant to a map that is constant; so a constant map is the control whose DiffROAR chance alone makes. The fill
``mean`` has a value for each channel.

Traps. Retraining that did not reach a high training accuracy measures the recipe. Maps of the label's class are allowed
to know the label, on test images too, and the shape of what was removed may then tell the class by itself; target
``top``, the class that the model chose, leaks less.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hansfree.benchmarks.masked_pixels import ABOUT, End, labels_digest, ranks_file
from hansfree.core import Batch, Benchmark, Explainer
from hansfree.errors import UserError
from hansfree.metrics.explanation_agreement import at_size, pixels
from hansfree.runs import atomic_path, difference, read_json, write_json

ENDS: tuple[End, ...] = ("top", "bottom")
Channels = Literal["together", "apart"]
ClassToExplain = Literal["label", "top"]
Relevance = Callable[[Batch], Float[Tensor, "b k h w"]]
BATCH = 250


def relevance_of(
    model: nn.Module, explainer: Explainer, target: ClassToExplain, channels: Channels, size: tuple[int, int]
) -> Relevance:
    """What ``explainer`` says of each pixel (k = 1), or of each channel's value, under ``model`` in eval mode."""
    model.eval()

    @torch.no_grad()
    def relevance(batch: Batch) -> Tensor:
        wanted = batch.label if target == "label" else (lambda logits: logits.argmax(1))
        draws = {name: values.to(batch.index.device) for name, values in explainer.fixed_draws(batch.index).items()}
        map = at_size(explainer(model, batch.images, wanted, draws=draws).map, size)
        return map if channels == "apart" else pixels(map)[:, None]

    return relevance


def indifferent(batch: Batch) -> Float[Tensor, "b 1 h w"]:
    """The map that knows nothing: its order is random."""
    return torch.zeros_like(batch.images[:, :1])


def ranks(relevance: Float[Tensor, "b k h w"], generator: torch.Generator) -> Int[Tensor, "b k h w"]:
    """The place of each element in its image's order, 0 the most relevant; equal ones are in random order."""
    flat = relevance.flatten(1).cpu()
    shuffled = torch.rand(flat.shape, generator=generator).argsort(1)
    order = shuffled.gather(1, flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(flat.shape[1]).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(relevance.shape)


def check_one_label(benchmark: Benchmark) -> None:
    """Raises ``UserError`` where images have labels of several classes."""
    if benchmark.split("train").label.ndim > 1:
        raise UserError(
            f"ROAR explains one class per image, but images of {benchmark.name} have several; choose a benchmark whose "
            "images have one."
        )


def write_ranks(
    relevance: Relevance,
    benchmark: Benchmark,
    splits: tuple[str, ...],
    folder: Path | str,
    *,
    told: Mapping[str, Any],
    seed: int = 0,
    device: torch.device | str = "cpu",
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the ranks of every image of ``splits`` into ``folder``; what is there already stays.

    ``told`` says whose maps they are. Raises ``UserError`` where ``folder`` has ranks of others, where images have
    labels of several classes, and where a map has values that are not numbers.
    """
    check_one_label(benchmark)
    folder = Path(folder)
    labels = {name: labels_digest(benchmark.split(name)) for name in splits}
    about = {"schema": 1, **told, "seed": seed, "labels": labels}
    if (folder / ABOUT).exists():
        _check_same(read_json(folder / ABOUT), about, folder)
        return
    total, done, shape = sum(len(benchmark.split(name)) for name in splits), 0, ()
    for number, name in enumerate(splits):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        split, rows = benchmark.split(name), []
        for index in torch.arange(len(split)).split(BATCH):
            found = relevance(split.batch(index).to(device))
            if not found.isfinite().all():
                raise UserError(f"Maps of the split {name} have values that are not numbers; take another explainer.")
            rows.append(ranks(found, generator).numpy().astype(np.min_scalar_type(found[0].numel() - 1)))
            done += len(index)
            watch(done, total)
        shape = rows[0].shape[1:]
        with atomic_path(ranks_file(folder, name)) as path:
            np.save(path, np.concatenate(rows))
    write_json(folder / ABOUT, {**about, "shape": list(shape), "mean": mean_colour(benchmark)})


def _check_same(held: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    held = {key: value for key, value in held.items() if key not in ("shape", "mean")}
    if held != asked:
        raise UserError(f"{folder} has ranks of other maps ({difference(held, asked)}); choose another --out.")


def mean_colour(benchmark: Benchmark) -> list[float]:
    """The mean of each channel over all training images."""
    train = benchmark.split("train")
    batches = torch.arange(len(train)).split(BATCH)
    sums = [train.batch(index).images.double().mean((2, 3)).sum(0) for index in batches]
    return (torch.stack(sums).sum(0) / len(train)).tolist()


def diffroar(accuracy: Mapping[tuple[End, float], float]) -> dict[float, float]:
    """By the share that is removed, accuracy without the bottom less accuracy without the top, where both are known."""
    shares = sorted({share for _, share in accuracy})
    known = [share for share in shares if all((end, share) in accuracy for end in ENDS)]
    return {share: accuracy["bottom", share] - accuracy["top", share] for share in known}
