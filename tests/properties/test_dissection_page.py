"""The page of a dissection: pictures are lit where units are active, and models stand side by side."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hansfree.audits import dissect
from hansfree.benchmarks.concepts import ConceptFolder
from hansfree.errors import UserError
from hansfree.report.dissection import DIMMED, LINE, Dissection, Page, lit, section, write_page
from hansfree.runs import write_json


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    )


@pytest.fixture
def concepts(tmp_path):
    random = np.random.default_rng(0)
    for number in range(4):
        mask = np.zeros((12, 12), np.uint8)
        mask[number : number + 6, 2:9] = 255
        for folder, values in (
            ("images", random.integers(0, 255, (12, 12, 3), dtype=np.uint8)),
            ("masks/object/<b>dog", mask),
            ("masks/scene/park", 255 - mask),
        ):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / "data" / folder / f"{number}.png")
    return ConceptFolder(tmp_path / "data", size=12)


@pytest.fixture
def folders(tmp_path, concepts):
    for seed, name in enumerate(("one", "two")):
        dissect(net(seed), concepts, tmp_path / name, name=name, layers=["0"], quantiles=[0.05])
    return [tmp_path / "one", tmp_path / "two"]


def test_a_picture_is_lit_where_the_unit_is_active_with_a_line_around_the_mask():
    image = np.full((8, 8, 3), 200, np.uint8)
    active, mask = np.zeros((4, 4), bool), np.zeros((8, 8), bool)
    active[0, 0], mask[4:8, 4:8] = True, True
    drawn = lit(image, active, mask)
    assert (drawn[:2, :2] == 200).all() and (drawn[2:4] == 200 * DIMMED).all()
    line = (drawn == LINE).all(-1)
    assert line[4:8, 4:8].sum() == line.sum() == 12 and (drawn[5:7, 5:7] == 200 * DIMMED).all()
    assert lit(image[..., :1], active, mask).shape == (8, 8, 3)


def test_models_stand_side_by_side_on_the_same_images(folders):
    page = Page([Dissection.read(folder) for folder in folders])
    for _, strips in page.concepts:
        assert [strip.name.partition(",")[0] for strip in strips] == ["one", "two"]
        first, second = ([tile.told.partition("image")[2] for tile in strip.tiles] for strip in strips)
        assert first == second and len(first) == 4
    published = page.tables[0]
    assert published.columns[:2] == ("object", "scene")
    for name, layer, values in published.lines:
        one = next(one for one in page.dissections if one.name == name)
        assert layer == "0" and values[4] == f"{one.value('detectors', '0'):g}"
        assert int(values[0]) + int(values[1]) == int(values[4])


def test_the_page_is_whole_escaped_and_the_same_each_time(folders, tmp_path):
    text = write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;dog" in text and "<b>dog" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert text.count("<img") == sum(len(s.tiles) for _, strips in _all(folders) for s in strips) > 0
    assert str(section(folders)) in text


def _all(folders):
    page = Page([Dissection.read(folder) for folder in folders])
    return [*page.units, *page.concepts]


def test_what_cannot_be_compared_or_is_no_dissection_is_refused(folders, concepts, tmp_path):
    other = ConceptFolder(tmp_path / "data", size=10)
    dissect(net(0), other, tmp_path / "three", name="three", layers=["0"])
    with pytest.raises(UserError, match="one and three were dissected by different concepts"):
        section([folders[0], tmp_path / "three"])
    write_json(tmp_path / "run/results.json", {"schema": 1, "config": {}, "rows": []})
    with pytest.raises(UserError, match="is not of a network dissection"):
        section([tmp_path / "run"])
    with pytest.raises(UserError, match="no dissection to show"):
        section([])
