"""Dissecting networks: planted units are found in any layer, it goes on where it stopped, and memory does not grow."""

import csv
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from hansfree.audits import dissect
from hansfree.audits.activations import AUTOMATIC, activations
from hansfree.benchmarks.concepts import Concept, Concepts, Masks
from hansfree.errors import UserError
from hansfree.metrics.dissection import Thresholds
from hansfree.models import load_model
from hansfree.runs import read_results

COLOURS = ("red", "green", "blue")


class Blocks(Concepts):
    """Grey noise with a block of 4 x 4 in one of three colours, made anew from the image's number."""

    name = "blocks"
    concepts = (*(Concept(colour, "colour") for colour in COLOURS), Concept("picture", "scene"))

    def __init__(self, count=12, size=16):
        self.count, self.size = count, size
        self.asked = 0

    def __len__(self):
        return self.count

    def _at(self, row):
        generator = torch.Generator().manual_seed(row)
        y, x = (4 * torch.randint(self.size // 4, (2,), generator=generator)).tolist()
        return slice(y, y + 4), slice(x, x + 4), 0.2 * torch.rand(1, self.size, self.size, generator=generator)

    def images(self, index):
        self.asked += len(index)
        images = []
        for row in index.tolist():
            y, x, noise = self._at(row)
            image = noise.expand(3, -1, -1).clone()
            image[row % 3, y, x] += 0.6 + torch.arange(16).view(4, 4) / 100
            images.append(image)
        return torch.stack(images)

    def masks(self, index):
        mask = torch.zeros(len(index), 4, self.size, self.size, dtype=torch.bool)
        mask[:, 3] = True
        for place, row in enumerate(index.tolist()):
            y, x, _ = self._at(row)
            mask[place, row % 3, y, x] = True
        shown = mask.any(0).any(-1).any(-1).nonzero()[:, 0]
        return Masks(shown, mask[:, shown], torch.ones(len(index), 2, dtype=torch.bool))

    def record(self):
        return {"name": self.name, "count": self.count, "size": self.size}


class Eyes(nn.Module):
    """Units 0 to 2 see one colour each at full resolution, unit 3 sees nothing; ``pooled`` the same at a quarter."""

    def __init__(self):
        super().__init__()
        self.see = nn.Conv2d(3, 4, 1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.pooled = nn.AvgPool2d(4)
        self.head = nn.Linear(4, 2)
        self.see.weight.data = torch.eye(4, 3)[..., None, None] * 1.5 - 0.5
        self.see.weight.data[3] = 0

    def forward(self, x):
        return self.head(self.pooled(self.act(self.see(x))).mean((2, 3)))


def found(results, metric, group=None, measured_with=None):
    (row,) = [
        row for row in results["rows"]
        if (row["metric"], row["group"]) == (metric, group) and measured_with in (None, row["measured_with"])
    ]  # fmt: skip
    return row["value"]


QUANTILE = 16 / 256 / 3
"""A third of the images have a block of 16 of their 256 pixels: so large a share of each unit's map is its concept."""


def test_planted_units_are_found_and_written_down(tmp_path):
    model = Eyes().train()
    results = dissect(model, Blocks(), tmp_path, name="eyes", layers=["see"], quantiles=[QUANTILE], seed=3)
    assert model.training
    assert found(results, "detectors", "colour") == found(results, "unique_detectors", "colour") == 3
    assert found(results, "detectors") == found(results, "exclusive_detectors_defined") == 3
    assert found(results, "best_iou_adjusted") == pytest.approx(3 / 4)
    assert results["rows"] == read_results(tmp_path / "results.json")["rows"]
    assert {(row["variant"], row["benchmark"], row["seed"]) for row in results["rows"]} == {("eyes", "blocks", 3)}
    with (tmp_path / "units.csv").open(newline="") as file:
        units = [row for row in csv.DictReader(file) if row["rule"] == "published"]
    assert [(row["concept"], float(row["iou"])) for row in units[:3]] == [(colour, 1.0) for colour in COLOURS]
    assert [int(row["top_images"].split()[0]) % 3 for row in units[:3]] == [0, 1, 2]
    assert units[0]["intersection"] == units[0]["active"] == units[0]["concept_pixels"] == str(4 * 16)


def test_several_layers_quantiles_and_thresholds_at_once(tmp_path):
    model, data, thresholds = Eyes(), Blocks(), [0.05, 0.5, 0.999]
    results = dissect(
        model, data, tmp_path, name="eyes", layers=["see", "pooled"], quantiles=[QUANTILE, 0.002],
        iou_thresholds=thresholds,
    )  # fmt: skip
    assert data.asked <= 1 + 4 * len(data)  # two passes for thresholds, one for counts, and the pictures
    assert [found(results, "detectors", None, f"see{how}") for how in ("", " quantile=0.0208333 iou=0.5")] == [3, 3]
    few = [found(results, "detectors", "colour", f"see quantile=0.002 iou={t:g}") for t in thresholds]
    assert few == sorted(few, reverse=True) and few[0] == 3 > few[2]
    asked = data.asked
    again = dissect(model, data, tmp_path, name="eyes", layers=["see", "pooled"], quantiles=[QUANTILE, 0.002],
                    iou_thresholds=[0.5])  # fmt: skip
    assert found(again, "detectors", None, "see") == 3
    assert data.asked <= asked + 1 + len(data)  # no pass again, only the pictures


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [3, 7, 13, 20, 31])
def test_a_dissection_that_was_stopped_goes_on_and_says_the_same(tmp_path, after):
    torch.manual_seed(0)
    model = load_model("small-cnn", num_classes=2, options={"widths": [4, 6]})
    how = {"name": "net", "layers": ["blocks.0"] if hasattr(model.network, "blocks") else [], "quantiles": [0.02, 0.1],
           "batch_size": 2, "save_every": 4, "memory": 1 << 22}  # fmt: skip
    whole = dissect(model, Blocks(), tmp_path / "whole", **how)

    def stop(done, total):
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        dissect(model, Blocks(), tmp_path / "parts", watch=stop, **how)
    steps = []
    rest = dissect(model, Blocks(), tmp_path / "parts", watch=lambda done, total: steps.append(done), **how)
    assert rest["rows"] == whole["rows"]
    assert (tmp_path / "parts/units.csv").read_text() == (tmp_path / "whole/units.csv").read_text()
    assert after < 6 or steps[0] > 2
    assert np.diff(steps).tolist() == [2] * (len(steps) - 1)


def test_another_dissection_does_not_go_on_in_the_same_folder(tmp_path):
    model = Eyes()
    dissect(model, Blocks(), tmp_path, name="eyes", layers=["see"])
    with pytest.raises(UserError, match=r"holds another run \(`concepts.count` is 12 there and 15 here\)"):
        dissect(model, Blocks(15), tmp_path, name="eyes", layers=["see"])


def test_a_damaged_state_is_refused(tmp_path):
    model = Eyes()
    dissect(model, Blocks(), tmp_path, name="eyes", layers=["see"])
    (tmp_path / "dissection.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"dissection\.npz cannot be read .* remove it"):
        dissect(model, Blocks(), tmp_path, name="eyes", layers=["see"])


def peak(images, folder, monkeypatch):
    """Most bytes that Python and NumPy held, and most elements in tensors of the state, while going through images."""
    held = []
    add = Thresholds.add
    monkeypatch.setattr(
        Thresholds, "add", lambda self, v: (add(self, v), held.append(self.counts.numel() + v.numel()))[0]
    )
    torch.manual_seed(0)
    model = Eyes()
    tracemalloc.start()
    dissect(model, Blocks(images), folder, name="eyes", layers=["see"], batch_size=4, memory=1 << 18, save_every=16)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (folder / "dissection.npz").stat().st_size
    return max(held), size, most


def test_memory_and_disk_do_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    peak(8, tmp_path / "first", monkeypatch)  # what is imported and cached at the first use is no growth
    few, many = (peak(images, tmp_path / str(images), monkeypatch) for images in (40, 200))
    assert few[:2] == many[:2]
    assert many[2] < few[2] + 250_000  # 160 images more are 490,000 bytes


# Layers


def test_maps_are_those_of_the_layer_also_where_the_next_one_works_in_place():
    model, images = Eyes().eval(), Blocks().images(torch.arange(3))
    shown = activations(model, ["see", "act", "pooled"], images)
    assert torch.equal(shown["see"], model.see(images)) and (shown["see"] < 0).any()
    assert torch.equal(shown["act"], model.see(images).relu())
    assert shown["pooled"].shape == (3, 4, 4, 4)
    assert "forward" not in model.see.__dict__


def test_no_layer_is_the_last_feature_map():
    torch.manual_seed(0)
    model = load_model("small-resnet", num_classes=3, options={"widths": [4, 6]}).eval()
    images = torch.rand(2, 3, 16, 16)
    shown = activations(model, [], images)
    assert list(shown) == [AUTOMATIC] and torch.equal(shown[AUTOMATIC], model.forward_features(images))


class Tokens(nn.Module):
    """Patches of 4 x 4 as tokens behind a class token, normed."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.norm(torch.cat([torch.full_like(tokens[:, :1], 9.0), tokens], 1))[:, 0]


def test_tokens_are_folded_to_the_grid_of_their_patches(tmp_path):
    torch.manual_seed(0)
    model, images = Tokens(), torch.rand(2, 3, 8, 16)
    shown = activations(model, ["norm", "patches"], images)
    expected = model.norm(model.patches(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert shown["norm"].shape == (2, 6, 2, 4)
    assert torch.allclose(shown["norm"], expected, atol=1e-6)
    results = dissect(model, Blocks(), tmp_path, name="tokens", layers=["norm"])
    assert {row["measured_with"] for row in results["rows"]} == {"norm"}


@pytest.mark.slow
def test_a_transformers_blocks_can_be_dissected(tmp_path):
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    model = load_model("timm/vit_tiny_patch16_224", num_classes=2, options=options, size=[16, 16]).eval()
    shown = activations(model, ["blocks.0", "blocks.1.norm1"], torch.rand(2, 3, 16, 16))
    assert {map.shape for map in shown.values()} == {(2, 12, 4, 4)}
    tokens = []
    handle = model.network.blocks[0].register_forward_hook(lambda module, given, out: tokens.append(out))
    images = torch.rand(2, 3, 16, 16)
    model(images)
    handle.remove()
    folded = tokens[0][:, 1:].transpose(1, 2).reshape(2, 12, 4, 4)
    assert torch.equal(activations(model, ["blocks.0"], images)["blocks.0"], folded.detach())
    results = dissect(model, Blocks(), tmp_path, name="vit", layers=["blocks.0"])
    assert {row["measured_with"] for row in results["rows"]} == {"blocks.0"}


@pytest.mark.parametrize(
    ("layer", "says"),
    [("sea", r"There is no layer 'sea'; did you mean 'see'\?"), ("head", "Layer 'head': The layer gives shape")],
)
def test_a_layer_that_cannot_be_dissected_is_refused_before_anything_is_written(tmp_path, layer, says):
    with pytest.raises(UserError, match=says):
        dissect(Eyes(), Blocks(), tmp_path / "new", name="eyes", layers=["see", layer])
    assert not (tmp_path / "new").exists()


def test_a_layer_that_is_not_called_and_data_without_images_are_refused(tmp_path):
    model = Eyes()
    model.spare = nn.Conv2d(3, 4, 1)
    with pytest.raises(UserError, match="'spare' was not called"):
        dissect(model, Blocks(), tmp_path, name="eyes", layers=["spare"])
    with pytest.raises(UserError, match="blocks has 0 images and 4 concepts"):
        dissect(model, Blocks(0), tmp_path, name="eyes")
