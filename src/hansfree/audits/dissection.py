"""Network dissection of any layers of any network, by any concepts; see :mod:`hansfree.metrics.dissection`.

The folder of a dissection:

    config.yaml               what is dissected by what: the same call goes on from here, another one is refused
    dissection.npz            the state: thresholds, counts, and which images each unit and each concept is shown by
    results.json, units.csv   numbers of detectors; a line for each unit
    figures/dissection.*      what :mod:`hansfree.report.dissection` draws

The images are gone through once for each pass of the thresholds (two, where memory allows) and once for the counts. The
state is saved every so many images. IoU thresholds are no part of it: other ones need no pass at all.

The model prepares its own input; the published code gives every network the mean colours of another one.
"""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.audits.activations import activations
from hansfree.benchmarks.concepts import Concepts
from hansfree.errors import UserError
from hansfree.metrics.dissection import (
    RULES,
    Counts,
    Rule,
    Thresholds,
    detectors,
    exclusive_detectors,
    iou,
    keep_top,
    labels,
    tally,
    unique_detectors,
    widths,
)
from hansfree.runs import SCHEMA, RunFolder, atomic_path, write_json, write_text
from hansfree.store.identity import digest_of_model

QUANTILE, IOU = 0.005, 0.05
"""The published settings."""
ADJUSTED = 0.5
"""Our threshold of the adjusted IoU: half of the way from chance to the most that can be."""
SHOWN_IMAGES = 5
SHOWN_UNITS = 4
SHOWN_CONCEPTS = 4
"""Of each category, in pictures."""

_MEASURES = {
    "detectors": detectors,
    "unique_detectors": unique_detectors,
    "exclusive_detectors": exclusive_detectors,
}
Row = dict[str, Any]
Look = Callable[[Tensor], dict[str, Tensor]]
"""From images to the maps of each layer."""


def dissect(
    model: nn.Module,
    concepts: Concepts,
    folder: Path | str,
    *,
    name: str,
    layers: Sequence[str] = (),
    quantiles: Sequence[float] = (QUANTILE,),
    iou_thresholds: Sequence[float] = (IOU,),
    adjusted_thresholds: Sequence[float] = (ADJUSTED,),
    seed: int | None = None,
    draw_by: Rule = "published",
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    memory: int = 1 << 28,
    save_every: int = 2048,
    watch: Callable[[int, int], None] = lambda done, total: None,
    spell_all: bool = False,
) -> dict[str, Any]:
    """Dissect ``layers`` of ``model`` (none: its last feature map) and return what results.json then holds.

    ``name`` is the model's in rows and pictures. Rows of the first quantile and IoU threshold are ``measured_with`` the
    layer; those of others say which, and with ``spell_all`` every row does. The adjusted IoU has thresholds of its own.
    ``draw_by`` is the IoU by which pictures choose units. ``memory`` bounds the tables of the thresholds, in bytes.
    ``watch`` is told images done, and all that there are to do.

    Raises ``UserError`` for an unknown layer, no image, no concept, or a folder that holds something else.
    """
    if not len(concepts) or not concepts.concepts:
        raise UserError(f"{concepts.name} has {len(concepts)} images and {len(concepts.concepts)} concepts; give both.")

    def look(images: Tensor) -> dict[str, Tensor]:
        return activations(model, layers, images.to(device))

    was_training = model.training
    model.eval().to(device)
    try:
        first = look(concepts.images(torch.arange(1)))
        units = {layer: map.shape[1] for layer, map in first.items()}
        settings = {
            "audit": "dissection",
            "name": name,
            "weights": digest_of_model(model),
            "layers": list(units),
            "quantiles": list(quantiles),
            "memory": memory,
            "concepts": concepts.record(),
        }
        place = RunFolder.create(folder, settings, resume=True)
        study = Study(place.path / "dissection.npz", concepts, units, quantiles, memory, device)
        started = time.time()
        study.run(look, batch_size, save_every, watch)
        entries, arrays = _pictures(study, look, draw_by)
    finally:
        model.train(was_training)
    write_json(place.figures / "dissection.json", entries)
    with atomic_path(place.figures / "dissection.npz") as path:
        np.savez(path, **arrays)
    write_text(place.path / "units.csv", unit_table(study))
    thresholds = {"iou_thresholds": list(iou_thresholds), "adjusted_thresholds": list(adjusted_thresholds)}
    environment = {"hansfree": version("hansfree"), "torch": torch.__version__, "device": str(device)}
    rows = rows_of(study, iou_thresholds, adjusted_thresholds, spell_all=spell_all)
    results = {
        "schema": SCHEMA,
        "environment": {**environment, "time": {"seconds": time.time() - started}},
        "config": {**settings, **thresholds, "images": len(concepts)},
        "rows": [{**row, "variant": name, "model": name, "seed": seed} for row in rows],
    }
    write_json(place.results, results)
    return results


# Going through the images


@final
class Study:
    """The state of a dissection, kept in one file: sums and maxima over images, so that it can go on anywhere."""

    def __init__(
        self,
        path: Path,
        concepts: Concepts,
        units: Mapping[str, int],
        quantiles: Sequence[float],
        memory: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path, self.concepts, self.category = path, concepts, concepts.category
        digits = widths(sum(units.values()) * len(quantiles), memory)
        sizes = len(concepts.concepts), len(concepts.categories)
        self.passes, self.done = 0, 0
        self.thresholds = {layer: Thresholds(n, quantiles, digits, str(device)) for layer, n in units.items()}
        self.counts = {layer: Counts.none(len(quantiles), n, *sizes) for layer, n in units.items()}
        self.best_images = {layer: _nothing(n) for layer, n in units.items()}
        """The images in which each unit is most active, and how active."""
        self.largest = _nothing(sizes[0])
        """The images with the largest masks of each concept, and their shares of the image."""
        self._all_passes = len(digits) + 1
        if path.exists():
            self._load()

    def run(
        self,
        look: Look,
        batch_size: int,
        save_every: int,
        watch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Go through the images, pass by pass, from where the state stands."""
        total = len(self.concepts)
        saved = self.done
        while self.passes < self._all_passes:
            for index in torch.arange(self.done, total).split(batch_size):
                self._add(index, look(self.concepts.images(index)))
                self.done += len(index)
                watch(self.passes * total + self.done, self._all_passes * total)
                if self.done - saved >= save_every and self.done < total:
                    self._save()
                    saved = self.done
            if self.passes < self._all_passes - 1:
                for thresholds in self.thresholds.values():
                    thresholds.finish()
            self.passes, self.done, saved = self.passes + 1, 0, 0
            self._save()

    def _add(self, index: Tensor, maps: Mapping[str, Tensor]) -> None:
        if self.passes < self._all_passes - 1:
            for layer, map in maps.items():
                self.thresholds[layer].add(map.movedim(1, 0).flatten(1))
            return
        masks = self.concepts.masks(index)
        areas = torch.zeros(len(self.concepts.concepts), len(index))
        areas[masks.number] = masks.mask.sum((2, 3)).T / (masks.mask.shape[2] * masks.mask.shape[3])
        self.largest = keep_top(self.largest, areas, index)
        for layer, map in maps.items():
            shown = [part.to(map.device) for part in (masks.number, masks.mask, masks.annotated, self.category)]
            self.counts[layer] += tally(map, self.thresholds[layer].values, *shown)
            self.best_images[layer] = keep_top(self.best_images[layer], map.amax((2, 3)).T, index)

    def _save(self) -> None:
        arrays: dict[str, Any] = {"passes": np.array(self.passes), "done": np.array(self.done)}
        for name, value in self._tensors():
            arrays[name] = value.cpu().numpy()
        with atomic_path(self.path) as path:
            np.savez(path, **arrays)

    def _load(self) -> None:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        except Exception as error:
            raise UserError(f"{self.path} cannot be read ({error}); remove it to begin anew.") from None
        self.passes, self.done = int(found["passes"]), int(found["done"])
        for number, thresholds in enumerate(self.thresholds.values()):
            thresholds.passes = min(self.passes, self._all_passes - 1)
            for field in ("prefix", "rank", "counts"):
                setattr(thresholds, field, torch.from_numpy(found[f"{number} {field}"]).to(thresholds.prefix.device))
        for number, layer in enumerate(self.counts):
            sums = (torch.from_numpy(found[f"{number} sum {field}"]) for field in Counts.__dataclass_fields__)
            self.counts[layer] = Counts(*sums)
            self.best_images[layer] = _pair(found, f"{number} best")
        self.largest = _pair(found, "largest")

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [(f"largest {end}", value) for end, value in zip(_ENDS, self.largest)]
        for number, (layer, thresholds) in enumerate(self.thresholds.items()):
            found += [(f"{number} {field}", getattr(thresholds, field)) for field in ("prefix", "rank", "counts")]
            found += [(f"{number} sum {f}", getattr(self.counts[layer], f)) for f in Counts.__dataclass_fields__]
            found += [(f"{number} best {end}", value) for end, value in zip(_ENDS, self.best_images[layer])]
        return found


_ENDS = ("values", "images")


def _pair(arrays: Mapping[str, np.ndarray], name: str) -> tuple[Tensor, Tensor]:
    values, images = (torch.from_numpy(arrays[f"{name} {end}"]) for end in _ENDS)
    return values, images


def _nothing(rows: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, SHOWN_IMAGES), -torch.inf), torch.full((rows, SHOWN_IMAGES), -1)


# What is written


def rows_of(
    study: Study, iou_thresholds: Sequence[float], adjusted_thresholds: Sequence[float], *, spell_all: bool = False
) -> list[Row]:
    """Rows of results.json: detectors by category and in all, for every layer, quantile, IoU threshold and rule.

    ``best_iou`` is the mean over units of their highest IoU. Measures by rules that are not the published one end in
    ``_defined`` and ``_adjusted``.
    """
    rows: list[Row] = []
    categories = study.concepts.categories
    common: Row = dict.fromkeys(("variant", "method", "explainer", "model", "seed", "split", "tier", "selection"))
    for layer, counts in study.counts.items():
        for rule in RULES:
            suffix = "" if rule == "published" else f"_{rule}"
            thresholds = adjusted_thresholds if rule == "adjusted" else iou_thresholds
            for quantile, scores in zip(study.thresholds[layer].quantiles, iou(counts, study.category, rule)):
                first = quantile == study.thresholds[layer].quantiles[0] and not spell_all
                for threshold in thresholds:
                    plain = first and threshold == thresholds[0]
                    how = layer if plain else f"{layer} quantile={quantile:g} iou={threshold:g}"
                    place = {**common, "benchmark": study.concepts.name, "measured_with": how}
                    for metric, measure in _MEASURES.items():
                        found = measure(scores, study.category, len(categories), threshold).tolist()
                        for group, value in [(None, sum(found)), *zip(categories, found)]:
                            rows.append({**place, "metric": metric + suffix, "group": group, "value": value})
                how = layer if first else f"{layer} quantile={quantile:g}"
                place = {**common, "benchmark": study.concepts.name, "measured_with": how}
                best = labels(scores)[0].mean().item()
                rows.append({**place, "metric": f"best_iou{suffix}", "group": None, "value": best})
    return rows


_COLUMNS = (
    *("layer", "unit", "quantile", "threshold", "rule", "concept", "category", "iou"),
    *("intersection", "active", "concept_pixels", "top_images"),
)


def unit_table(study: Study) -> str:
    """CSV, a line for each layer, unit, quantile and rule: the concept with the highest IoU, and what it is made of."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for layer, thresholds in study.thresholds.items():
        for rule in RULES:
            for row in range(len(thresholds.quantiles)):
                table.writerows(_lines(study, layer, rule, row))
    return text.getvalue()


def _lines(study: Study, layer: str, rule: Rule, row: int) -> Iterator[list[Any]]:
    counts, thresholds = study.counts[layer], study.thresholds[layer]
    best, label = labels(iou(counts, study.category, rule)[row])
    active = counts.touching if rule == "published" else counts.active
    for unit, (value, number) in enumerate(zip(best.tolist(), label.tolist())):
        concept = study.concepts.concepts[number]
        yield [
            *(layer, unit, thresholds.quantiles[row], thresholds.values[row, unit].item(), rule),
            *(concept.name, concept.category, value, counts.both[row, unit, number].item()),
            *(active[row, unit, study.category[number]].item(), counts.concept[number].item()),
            " ".join(str(image) for image in study.best_images[layer][1][unit].tolist() if image >= 0),
        ]


def _pictures(study: Study, look: Look, rule: Rule) -> tuple[list[Row], dict[str, Any]]:
    """What is drawn: of each layer the best units of each category on the images that they are most active in, and for
    some concepts the unit with the highest IoU, on the images that show most of the concept, which any model shares."""
    entries: list[Row] = []
    for layer, counts in study.counts.items():
        scores = iou(counts, study.category, rule)[0]
        best, label = labels(scores)
        for category in range(len(study.concepts.categories)):
            own = [unit for unit in best.argsort(descending=True).tolist() if study.category[label[unit]] == category]
            for unit in own[:SHOWN_UNITS]:
                images = study.best_images[layer][1][unit]
                entries.append(_entry("unit", layer, unit, int(label[unit]), study, scores, images))
            often = counts.concept.where(study.category == category, -1).argsort(descending=True, stable=True)
            for number in [n for n in often[:SHOWN_CONCEPTS].tolist() if study.category[n] == category]:
                images, shares = study.largest[1][number], study.largest[0][number]
                if shares[0] > 0:
                    unit = int(scores[:, number].argmax())
                    entries.append(_entry("concept", layer, unit, number, study, scores, images[shares > 0]))
    return [{**entry, "rule": rule} for entry in entries], _drawn(study, entries, look)


def _entry(kind: str, layer: str, unit: int, number: int, study: Study, scores: Tensor, images: Tensor) -> Row:
    concept = study.concepts.concepts[number]
    return {
        "kind": kind, "layer": layer, "unit": unit, "number": number, "concept": concept.name,
        "category": concept.category, "iou": scores[unit, number].item(), "images": images[images >= 0].tolist(),
    }  # fmt: skip


def _drawn(study: Study, entries: Sequence[Row], look: Look) -> dict[str, Any]:
    """By image and entry: pixels as bytes, where the unit is active and where the concept is; an image at a time."""
    arrays: dict[str, Any] = {}
    for image in sorted({image for entry in entries for image in entry["images"]}):
        index = torch.tensor([image])
        images, masks = study.concepts.images(index), study.concepts.masks(index)
        found = look(images)
        shown = dict(zip(masks.number.tolist(), masks.mask[0]))
        size = masks.mask.shape[-2], masks.mask.shape[-1]
        pixels = (images[0].clamp(0, 1) * 255).round().byte()
        arrays[f"image {image}"] = pixels.permute(1, 2, 0).numpy()
        for place, entry in enumerate(entries):
            if image in entry["images"]:
                map = found[entry["layer"]][:, entry["unit"], None]
                threshold = study.thresholds[entry["layer"]].values[0, entry["unit"]]
                enlarged = F.interpolate(map, size, mode="bilinear", align_corners=False)[0, 0]
                arrays[f"active {place} {image}"] = (enlarged > threshold).cpu().numpy()
                arrays[f"mask {place} {image}"] = shown.get(
                    entry["number"], torch.zeros(size, dtype=torch.bool)
                ).numpy()
    return arrays
