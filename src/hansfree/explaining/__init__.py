"""Heatmaps of image files: what ``hansfree explain`` does.

Images stream through: at any moment a batch is in the network and a few images are being read or drawn, so that
ten thousand of them need no more memory than ten. Every file is written whole, and a line in manifest.jsonl says
that an image is done; the same command goes on from there.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch

from hansfree.config import apply_overrides, construct
from hansfree.core import Classifier
from hansfree.errors import UserError
from hansfree.explaining.folder import Folder, write
from hansfree.explaining.images import Fit, Fitting, Picture, Source, find_images
from hansfree.explaining.look import Explained, Look, explainer_of, fingerprint
from hansfree.models import load_model
from hansfree.report.gallery import Entry, write_gallery

__all__ = ["Request", "Summary", "chosen_device", "explain_images", "has_random_weights"]

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 4
_MOST_NOTICES = 20


@dataclass(frozen=True)
class Request:
    """What to explain, and how; two requests that are equal go to the same folder."""

    model: str
    explainers: tuple[str, ...]
    """Names with settings: ``lrp:epsilon=0.01,semantics=fused``."""
    classes: tuple[str, ...] = ()
    """Names or numbers; none: the ``top`` likeliest classes of each image."""
    top: int = 1
    fit: Fit = "resize"
    """How images come to the model's size: ``resize`` changes their aspect, ``crop`` cuts out their middle."""
    size: int | None = None
    """The longer side of images for a model without a size of its own."""
    settings: tuple[str, ...] = ()
    """Settings of the model, ``key=value``, as :func:`hansfree.models.load_model` takes them."""
    pretrained: bool = False
    coarse: int = 1
    """Pictures average maps over squares of this many pixels; the numbers that are kept are never averaged."""


@dataclass(frozen=True)
class Summary:
    """What came of a request."""

    gallery: Path
    explained: tuple[Entry, ...]
    """The images that were explained now."""
    skipped: int
    """How many had been explained before."""
    refused: Mapping[str, str]
    """Sentences of explainers that have no map for this model."""
    unreadable: tuple[str, ...]
    """A sentence for each image that could not be read."""
    warnings: tuple[str, ...] = ()
    """What else one must know before believing a map."""


def explain_images(
    request: Request,
    paths: Sequence[Path],
    out: Path,
    *,
    device: str | None = None,
    batch_size: int = 8,
    arrays: bool = True,
    overwrite: bool = False,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Draw where a model looked in images: a picture and an archive of numbers for each, and a gallery of all.

    Everything is checked before anything is written: paths, image headers, explainers, classes, the model, and
    every explainer on the first batch. Raises ``UserError``, also where every explainer refuses the model.
    """
    if request.top < 1 or (request.classes and request.top > 1):
        raise UserError("Say which classes to explain by --class or by --top (from 1 on), not by both.")
    sources = find_images(paths, out)
    explainers = {text: explainer_of(text) for text in request.explainers}
    model = _model(request, chosen_device(device))
    fitting = Fitting.of(model, request.fit, request.size)
    folder = Folder.check(out, {**_plain(request), "weights": fingerprint(model)}, overwrite=overwrite)
    pending = [source for source in sources if not folder.is_done(source, arrays)]
    skipped = len(sources) - len(pending)
    look = Look(model, explainers, request.model, request.classes, request.top)
    watch(skipped, len(sources))
    new: list[Entry] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        explained = _from_first_map(_explained(pool, pending, fitting, look, batch_size))
        folder.open()
        named = ((found, folder.claim(found.source)) for found in explained)
        for entry in _ahead(pool, lambda item: write(*item, folder.path, arrays, request.coarse), named, 2 * _THREADS):
            folder.add(entry)
            new.append(entry)
            watch(skipped + len(new), len(sources))
    return _summary(request, fitting, folder, new, skipped)


def _explained(
    pool: ThreadPoolExecutor, pending: Sequence[Source], fitting: Fitting, look: Look, batch_size: int
) -> Iterator[Explained]:
    pictures = _ahead(pool, fitting.read, pending, batch_size + _THREADS)
    return chain.from_iterable(look(batch) for batch in _batches(pictures, batch_size))


def _from_first_map(explained: Iterator[Explained]) -> Iterator[Explained]:
    """The same images once the first of them has been explained: who refuses does so before a file is written."""
    first: list[Explained] = []
    for found in explained:
        first.append(found)
        if not found.error:
            break
    return chain(first, explained)


def _summary(request: Request, fitting: Fitting, folder: Folder, new: Sequence[Entry], skipped: int) -> Summary:
    entries = sorted(folder.entries.values(), key=lambda entry: (entry.title, entry.source))
    refused = {name: text for entry in entries for name, text in (entry.refused or {}).items()}
    unreadable = tuple(entry.error for entry in entries if entry.error)
    about = {
        "title": f"Where {request.model} looked",
        "version": version("hansfree"),
        "facts": [
            ("Images", str(len(entries) - len(unreadable))),
            ("Explainers", ", ".join(request.explainers)),
            ("Classes", ", ".join(request.classes) or _top_told(request.top)),
            ("Seen", fitting.told),
            *([("Drawn", f"maps averaged over squares of {request.coarse} pixels")] if request.coarse > 1 else []),
            *([("Model settings", ", ".join(request.settings))] if request.settings else []),
        ],
    }
    warnings = _warnings(request)
    notices = [*warnings, *(f"{name}: {text}" for name, text in refused.items()), *unreadable[:_MOST_NOTICES]]
    if len(unreadable) > _MOST_NOTICES:
        notices.append(f"{len(unreadable) - _MOST_NOTICES} more images cannot be read; manifest.jsonl names them.")
    gallery = write_gallery(folder.path, about, entries, request.explainers, notices)
    return Summary(
        gallery, tuple(entry for entry in new if not entry.error), skipped, refused, unreadable, tuple(warnings)
    )


def _top_told(top: int) -> str:
    return "the likeliest of each image" if top == 1 else f"the {top} likeliest of each image"


def _plain(request: Request) -> dict[str, Any]:
    return json.loads(json.dumps(request.__dict__))


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is. Raises ``UserError`` for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {name!r} is not there; leave out --device or use --device cpu.") from error
    return device


def _model(request: Request, device: torch.device) -> Classifier:
    settings = apply_overrides({}, request.settings)
    if "name" in settings:
        raise UserError("The model's name is an argument of its own; take it out of the settings.")
    section = {**({"pretrained": True} if request.pretrained else {}), **settings, "name": "model"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights that are random should be the same ones when the command goes on
        model = construct({"model": load_model}, section, "model", given={"name": request.model})
    if not isinstance(model, Classifier):
        raise UserError(f"{request.model} takes no images, so there is nothing to draw; name a classifier of images.")
    return model.eval().requires_grad_(False).to(device)


def _warnings(request: Request) -> list[str]:
    settings = apply_overrides({}, request.settings)
    if request.pretrained or not has_random_weights(request.model, settings):
        return []
    return [
        f"The weights of {request.model} are random, so its maps say nothing about a trained one; "
        "add --pretrained or --set weights=FILE."
    ]


def has_random_weights(model: str, settings: Mapping[str, Any]) -> bool:
    """Whether nothing says where the weights of a model that goes by this name should come from."""
    folder = Path(model.removeprefix("hf/"))
    own = ":" in model or any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    return not (own or settings.get("pretrained") or settings.get("weights"))


def _batches(pictures: Iterable[Picture], most: int) -> Iterator[list[Picture]]:
    """Neighbours of one shape, at most ``most`` of them; what cannot be read stays apart."""
    batch: list[Picture] = []
    for picture in pictures:
        if batch and (len(batch) == most or _shape(picture) != _shape(batch[0])):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _shape(picture: Picture) -> tuple[int, ...] | None:
    return None if picture.pixels is None else picture.pixels.shape


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """``map(work, items)`` in the pool's threads, in order, with at most ``most`` results waiting."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            while waiting and (len(waiting) >= most or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
