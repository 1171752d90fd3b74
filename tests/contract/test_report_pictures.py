"""Pictures of what tells models apart: which samples are shown, curves under shifts, and maps of several labels."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hansfree.core import Boxes, Teacher
from hansfree.evaluation import heatmaps
from hansfree.explainers import GradientXInput
from hansfree.models import load_model
from hansfree.report import build_report
from hansfree.report.heatmaps import Heatmaps, telling
from hansfree.report.shifts import shift_series
from hansfree.runs import RunFolder, write_json

models = st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=2, max_size=4)


@given(models, st.booleans())
def test_samples_that_tell_models_apart_are_shown(found, has_teacher):
    teacher, *students = [np.array(right) for right in found]
    compared = students[:1]
    rows = telling(students, [teacher] if has_teacher else [], compared, 6)
    assert len(rows) == len(set(rows)) == 6
    all_right = [n for n in range(14) if all(s[n] for s in students) and (teacher[n] or not has_teacher)]
    taught = [n for n in range(14) if (teacher[n] if has_teacher else any(s[n] for s in students))]
    missed = [n for n in taught if not compared[0][n]]
    assert set(all_right[:3]) <= set(rows) and rows[: len(all_right[:3])] == all_right[:3]
    shown = [n for n in rows if n in missed]
    assert len(shown) >= min(3, len(missed))
    rescued = [n for n in missed if any(s[n] for s in students)]
    assert set(rescued[:3]) <= set(rows)


def test_few_samples_are_all_shown_in_their_order():
    right = np.array([True, False, True])
    assert telling([right], [right], [right], 10) == [0, 1, 2]


def kept(count, wrong, several=False):
    arrays = {
        "splits": np.array(["iid"]), "classes": np.array(["ant", "bee"]), "explainer": np.array("lrp"),
        "image_iid": np.zeros((count, 4, 4, 3), np.uint8), "index_iid": np.arange(count),
        "label_iid": np.arange(count) % 2, "map_iid": np.ones((count, 4, 4), np.float32),
        "teacher_map_iid": np.ones((count, 4, 4), np.float32), "teacher_prediction_iid": np.arange(count) % 2,
    }  # fmt: skip
    arrays["prediction_iid"] = np.where(np.isin(np.arange(count), wrong), -1 if several else 0, np.arange(count) % 2)
    return {**arrays, **({"several": np.array(True)} if several else {})}


def test_what_the_reference_gets_wrong_is_in_the_picture_and_said_to_be_chosen():
    drawn = Heatmaps(
        {"kd": kept(40, [31, 33, 35]), "e2kd": kept(40, [35])}, {"kd": "KD", "e2kd": "e2KD"}, {}, references=["kd"]
    )
    (grid,) = drawn.grids(["kd", "e2kd"], {})
    images, teacher, kd, e2kd = grid.strips
    assert [strip.name for strip in grid.strips] == ["Image", "Teacher", "KD", "e2KD"]
    assert len(images.tiles) == 10 and not any(tile.wrong for tile in teacher.tiles)
    assert [tile.wrong for tile in kd.tiles] == [False] * 5 + [True] * 3 + [False] * 2
    assert [tile.wrong for tile in e2kd.tiles] == [False] * 7 + [True] + [False] * 2
    assert "40 samples" in drawn.choice and "KD wrong" in drawn.choice
    assert not Heatmaps({"kd": kept(10, [3])}, {"kd": "KD"}, {}).choice


def test_of_several_labels_it_says_what_was_not_found():
    drawn = Heatmaps({"kd": kept(4, [1], several=True)}, {"kd": "KD"}, {})
    strip = drawn.grids(["kd"], {})[0].strips[-1]
    assert drawn.of_labels and [tile.caption for tile in strip.tiles] == ["ant", "not found", "ant", "bee"]
    assert [tile.wrong for tile in strip.tiles] == [False, True, False, False]


# What a run keeps for them


def network(seed=0):
    torch.manual_seed(seed)
    return load_model("small-cnn", num_classes=3, options={"widths": [4, 6]}).eval()


def test_maps_of_a_shifted_image_are_kept_beside_those_of_the_image(tiny):
    student, teacher = network(), Teacher.live(network(1))
    arrays = heatmaps(student, teacher, tiny, ("iid", "shift"), GradientXInput(), 6, "cpu", shift=2)
    name = "iid, shifted by 2 pixels"
    assert arrays["splits"].tolist() == ["iid", "shift", name]
    image, moved = arrays["image_iid"], arrays[f"image_{name}"]
    assert np.array_equal(moved[:, 2:, 2:], image[:, :-2, :-2])
    pixels = torch.from_numpy(moved).permute(0, 3, 1, 2).float() / 255
    for prefix, model in (("", student), ("teacher_", teacher.model)):
        expected = GradientXInput()(model, pixels, lambda logits: logits.argmax(1))
        torch.testing.assert_close(
            torch.from_numpy(arrays[f"{prefix}map_{name}"]), expected.map.sum(1).detach(), atol=0.02, rtol=0.1
        )
    assert heatmaps(student, None, tiny, ("iid",), GradientXInput(), 6, "cpu")["splits"].tolist() == ["iid"]


class Several:
    """Two labels an image: 0 and 2, or 1 and 2."""

    def __init__(self, whole):
        self.whole, self.label = whole, torch.tensor([[1.0, 0, 1], [0, 1, 1]]).repeat(12, 1)

    def batch(self, index, generator=None):
        batch = self.whole.batch(index)
        boxes = Boxes((torch.zeros(0, 4),) * len(index), (torch.zeros(0).long(),) * len(index))
        return dataclasses.replace(batch, label=self.label[index], bias=None, mask=None, boxes=boxes)


def test_of_several_labels_the_first_that_is_there_is_explained(tiny, monkeypatch):
    split = Several(tiny.split("iid"))
    monkeypatch.setattr(tiny, "split", lambda name: split)
    student = network()
    arrays = heatmaps(student, Teacher.live(network(1)), tiny, ("iid",), GradientXInput(), 4, "cpu")
    label = torch.from_numpy(arrays["label_iid"])
    assert label.tolist() == [0, 1, 0, 1] and bool(arrays["several"])
    images = split.batch(torch.from_numpy(arrays["index_iid"])).images
    logits, map = GradientXInput()(student, images, label)
    torch.testing.assert_close(torch.from_numpy(arrays["map_iid"]), map.sum(1).detach())
    found = logits[torch.arange(4), label] > 0
    assert arrays["prediction_iid"].tolist() == [int(k) if yes else -1 for k, yes in zip(label, found)]


# Curves


def row(model, variant, seed, metric, value, group=None):
    place = {"split": "iid", "tier": None, "measured_with": "bcos"}
    common = {"benchmark": "x", "method": "kd", "explainer": None, "selection": "last"}
    return {
        **common, **place, "variant": variant, "model": model, "seed": seed, "metric": metric, "group": group,
        "value": value,
    }  # fmt: skip


def curves(model, variant, seed, heights):
    return [row(model, variant, seed, "shift_similarity", h, f"shift:{t}") for t, h in enumerate(heights)]


CELLS = [
    {"variant": name, "title": name.upper(), "seed": seed, "folder": ".", "status": "done", "error": None,
     "method": "kd", "explainer": None, "needs": [], "selection": "last", "warnings": [], "steps": 1,
     "teacher": "teacher", "time": {"train_seconds": 1.0}}
    for name in ("kd", "e2kd") for seed in (0, 1)
]  # fmt: skip


def test_curves_are_means_over_seeds_with_the_teacher_first():
    rows = curves("teacher", "teacher", 0, [1, 0.9, 0.8])
    for seed, least in ((0, 0.2), (1, 0.4)):
        rows += curves("student", "kd", seed, [1, least, 0.6]) + curves("student", "e2kd", seed, [1, 0.7, 0.6])
        rows.append(row("student", "kd", seed, "shift_period", 2.0))
    found = shift_series({"rows": rows, "cells": CELLS}, ["kd", "e2kd"])
    assert list(found) == [("iid", "bcos")]
    teacher, kd, e2kd = found["iid", "bcos"]
    assert [line.name for line in (teacher, kd, e2kd)] == ["Teacher", "KD", "E2KD"]
    assert [x for x, _ in kd.points] == [0, 1, 2] and kd.points[1][1].mean == pytest.approx(0.3)
    assert kd.points[1][1].n == 2 and teacher.points[1][1].n == 1
    assert (teacher.period, kd.period, e2kd.period) == (None, 2, None)
    assert not shift_series({"rows": [], "cells": CELLS}, ["kd"])


def test_a_run_shows_its_curve_and_its_teacher_s(tmp_path):
    run = RunFolder(tmp_path / "run")
    rows = [
        row("student", "kd", 0, "acc", 0.5), *curves("student", "kd", 0, [1, 0.25]),
        *curves("teacher", "kd", 0, [1, 0.75]),
    ]  # fmt: skip
    rows[0]["measured_with"] = None
    (run.path).mkdir()
    write_json(run.config, {})
    write_json(run.results, {"schema": 1, "environment": {}, "config": {}, "rows": rows, "cells": CELLS[:1]})
    page = build_report(run.path).read_text()
    assert "Do explanations move with the image?" in page and "0.25 at 1" in page and "0.75 at 1" in page
