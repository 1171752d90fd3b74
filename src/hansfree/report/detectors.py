"""Numbers of units that detect concepts, by method and layer, over seeds; see :mod:`hansfree.metrics.dissection`."""

from collections.abc import Iterable, Iterator
from functools import partial

from hansfree.report.results import Section, seeds_of, variant_titles
from hansfree.report.statistics import summarise
from hansfree.report.tables import Cell, Column, Line, Table, difference_cell, score_cell, seeds_note
from hansfree.report.wording import COUNT

PUBLISHED = "the published IoU, of images where the unit's active pixels touch a label of the category"
ADJUSTED = "the adjusted IoU, 0 for what chance gives and 1 for the most that masks of these sizes can give"

_COUNT = ("count", "half_width", "seeds")


def detector_table(
    results: Section, variants: Iterable[str] | None = None, *, suffix: str = "", rule: str = PUBLISHED
) -> Table | None:
    """A line for each method and layer: detectors by category and in all, and concepts that have one.

    None where nothing was dissected. Of several quantiles and thresholds, the first ones. Differences are those of all
    detectors of the layer from the reference's.
    """
    detectors, unique, best = (f"{name}{suffix}" for name in ("detectors", "unique_detectors", "best_iou"))
    rows = [row for row in results["rows"] if row["metric"] in (detectors, unique, best)]
    settings: dict[str, str] = {}
    for row in (row for row in rows if row["metric"] != best):
        layer, _, setting = row["measured_with"].partition(" quantile=")
        settings.setdefault(layer, f"quantile={setting}")
    first = {f"{layer} {setting}": layer for layer, setting in settings.items()}
    first |= {how.partition(" iou=")[0]: layer for how, layer in first.items()}  # best IoUs have no threshold
    rows = [{**row, "measured_with": first[how]} for row in rows if (how := row["measured_with"]) in first]
    if not rows:
        return None
    reference = (results.get("suite") or {}).get("reference")
    found = {(s.variant, s.measured_with, s.metric, s.group): s for s in summarise(rows, reference)}
    titles, seeds = variant_titles(results["cells"]), len(seeds_of(results))
    chosen = set(titles if variants is None else variants)
    categories = list(dict.fromkeys(row["group"] for row in rows if row["group"] is not None))
    counts = [*((detectors, category) for category in categories), (detectors, None), (unique, None)]

    def cells_of(variant: str, layer: str) -> Iterator[Cell]:
        yield from (Cell(titles[variant]), Cell(layer))
        yield from (score_cell(found.get((variant, layer, *count)), (), seeds, COUNT) for count in counts)
        yield score_cell(found.get((variant, layer, best, None)), (), seeds)
        if reference:
            yield difference_cell(found.get((variant, layer, detectors, None)), (), variant == reference, COUNT)

    there = [(v, layer) for v in titles if v in chosen for layer in settings if (v, layer, detectors, None) in found]
    lines = tuple(Line(f"{variant} {layer}", tuple(cells_of(variant, layer))) for variant, layer in there)
    columns = [Column("method", "Method"), Column("layer", "Layer")]
    columns += [Column(f"detectors_{category}", category, _COUNT) for category in categories]
    columns += [Column("detectors", "all", _COUNT), Column("unique_detectors", "unique concepts", _COUNT)]
    columns.append(Column("best_iou", "mean best IoU (%)", ("percent", *_COUNT[1:])))
    if reference:
        columns.append(Column("difference", f"all, against {titles.get(reference, reference)}", (*_COUNT, "p")))
    note = f"Units of a layer that detect a concept by {rule}; {'; '.join(dict.fromkeys(settings.values()))}."
    return Table(f"Concept detectors{', adjusted' if suffix else ''}", tuple(columns), lines, (note, seeds_note(seeds)))


TABLES = (detector_table, partial(detector_table, suffix="_adjusted", rule=ADJUSTED))
"""What is shown of dissected networks; each is None where there is nothing to show."""
