"""ROAR's order, masks and score against their definitions, and on data of which it is known where the class lies."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hansfree.audits.roar import diffroar, indifferent, mean_colour, ranks, relevance_of, write_ranks
from hansfree.benchmarks.masked_pixels import MaskedPixels, masked, ranks_file
from hansfree.core import Batch, Benchmark, InputSpec, Split
from hansfree.errors import UserError
from hansfree.explainers import InputGradient
from hansfree.models import load_model

BLOCK = 9


class PlantedSplit(Split):
    """Noise, but for a block of nine pixels, one of which is bright: the class."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.arange(count) % BLOCK
        self.images = torch.rand(count, 2, 8, 8, generator=generator)
        self.truth = torch.zeros(count, 1, 8, 8)
        self.truth[:, :, 2:5, 3:6] = 1
        self.images[:, :, 2:5, 3:6] = F.one_hot(self.label, BLOCK).float().view(count, 1, 3, 3)

    def batch(self, index, generator=None):
        return Batch(self.images[index], self.label[index], index, mask=self.truth[index])


class Planted(Benchmark):
    name = "planted"
    classes = tuple("abcdefghi")
    biases = ()
    mask_names = ("block",)
    gives = frozenset({"mask"})
    input = InputSpec(2, 8, 8)

    def split(self, name):
        return {"train": PlantedSplit(360, 0), "valid": PlantedSplit(18, 1), "iid": PlantedSplit(180, 2)}[name]

    def split_names(self):
        return ("train", "valid", "iid")


def accuracy_without(folder, end, fraction):
    """Of a linear classifier that was trained and tested without one end of the order."""
    benchmark = MaskedPixels(benchmark=Planted(), ranks=folder, fraction=fraction, end=end)
    train, test = (benchmark.split(name).batch(torch.arange(len(benchmark.split(name)))) for name in ("train", "iid"))
    torch.manual_seed(0)
    model = torch.nn.Linear(128, BLOCK)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(model(train.images.flatten(1)), train.label).backward()
        optimiser.step()
    return (model(test.images.flatten(1)).argmax(1) == test.label).double().mean().item()


@pytest.mark.parametrize(
    ("relevance", "low", "high"),
    [
        (lambda batch: batch.mask, 0.8, 1),
        (lambda batch: -batch.mask, -1, -0.8),
        (indifferent, -0.12, 0.12),
    ],
    ids=["true", "inverted", "random"],
)
def test_diffroar_of_planted_maps_is_what_is_known(tmp_path, relevance, low, high):
    write_ranks(relevance, Planted(), ("train", "valid", "iid"), tmp_path, told={})
    share = BLOCK / 64
    found = diffroar({(end, share): accuracy_without(tmp_path, end, share) for end in ("top", "bottom")})
    assert low <= found[share] <= high


def test_diffroar_is_known_only_where_both_ends_are():
    assert diffroar({("top", 0.1): 0.5, ("bottom", 0.1): 0.75, ("top", 0.2): 0.5}) == {0.1: 0.25}


def test_ranks_are_places_in_a_sorted_list():
    relevance = torch.rand(4, 2, 3, 5, dtype=torch.float64)
    found = ranks(relevance, torch.Generator())
    for values, places in zip(relevance.flatten(1).tolist(), found.flatten(1).tolist()):
        order = sorted(range(len(values)), key=lambda j: -values[j])
        assert [places[j] for j in order] == list(range(len(values)))


def test_equal_relevance_has_no_favourite_place():
    first = ranks(torch.zeros(4000, 1, 2, 2), torch.Generator().manual_seed(0)).flatten(1)
    assert torch.equal(first.sort(1).values, torch.arange(4).expand(4000, 4))
    share = (first == 0).double().mean(0)
    assert (share - 0.25).abs().max() < 0.04  # six standard deviations


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("channels", [1, 2])
def test_masking_removes_that_share_of_that_end_and_nothing_else(end, channels):
    images, relevance = torch.rand(3, 2, 4, 4), torch.rand(3, channels, 4, 4)
    fill = torch.tensor([0.25, 0.5]).view(2, 1, 1)
    found = masked(images, ranks(relevance, torch.Generator()), 0.3, end, fill)
    for image, map, seen in zip(images.numpy(), relevance.numpy(), found.numpy()):
        expected = image.copy()
        values = sorted(map.flatten(), reverse=end == "top")[: round(0.3 * map.size)]
        for c, y, x in np.ndindex(*image.shape):
            if map[c if channels == 2 else 0, y, x] in values:
                expected[c, y, x] = fill[c]
        assert np.array_equal(seen, expected)


def test_relevance_is_the_map_of_the_class_that_was_asked_for():
    torch.manual_seed(0)
    model = load_model("small-cnn", num_classes=3, channels=2, options={"widths": [3, 4]})
    batch = Batch(torch.rand(2, 2, 8, 8), torch.tensor([2, 0]), torch.arange(2))
    logits = model.eval()(batch.images)
    for target, classes in (("label", batch.label), ("top", logits.argmax(1))):
        for channels in ("apart", "together"):
            found = relevance_of(model, InputGradient(absolute=True), target, channels, (8, 8))(batch)
            x = batch.images.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).gather(1, classes[:, None]).sum(), x)
            expected = gradient.abs() if channels == "apart" else gradient.abs().sum(1, keepdim=True)
            torch.testing.assert_close(found.double(), expected.double())


def test_the_fill_is_the_mean_of_the_whole_images(tmp_path):
    write_ranks(indifferent, Planted(), ("train",), tmp_path, told={})
    images = Planted().split("train").images.double()
    assert mean_colour(Planted()) == pytest.approx([images[:, c].mean().item() for c in range(2)])
    for fill, expected in (("mean", images.mean((0, 2, 3))), (0.0, torch.zeros(2)), ((0.1, 0.9), [0.1, 0.9])):
        batch = (
            MaskedPixels(benchmark=Planted(), ranks=tmp_path, fraction=0.5, fill=fill)
            .split("train")
            .batch(torch.tensor([7]))
        )
        gone = torch.from_numpy(np.load(ranks_file(tmp_path, "train"))[7, 0].astype(int)) < 32
        for c in range(2):
            assert batch.images[0, c][gone].numpy() == pytest.approx(float(expected[c]))
            assert torch.equal(batch.images[0, c][~gone], Planted().split("train").images[7, c][~gone])


def test_ranks_of_other_data_or_other_maps_are_refused(tmp_path):
    write_ranks(indifferent, Planted(), ("train", "iid"), tmp_path, told={"model": "a"})
    before = ranks_file(tmp_path, "iid").stat().st_mtime_ns
    write_ranks(indifferent, Planted(), ("train", "iid"), tmp_path, told={"model": "a"})
    assert ranks_file(tmp_path, "iid").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="`model` is 'a' there and 'b' here"):
        write_ranks(indifferent, Planted(), ("train", "iid"), tmp_path, told={"model": "b"})
    benchmark = MaskedPixels(benchmark=Planted(), ranks=tmp_path, fraction=0.5)
    assert benchmark.split_names() == ("train", "iid")
    with pytest.raises(UserError, match="no ranks of the split valid"):
        benchmark.split("valid")
    with pytest.raises(UserError, match="none or all"):
        MaskedPixels(benchmark=Planted(), ranks=tmp_path, fraction=0.001)
    with pytest.raises(UserError, match="no colour of 2 channels"):
        MaskedPixels(benchmark=Planted(), ranks=tmp_path, fraction=0.5, fill=(0.1, 0.2, 0.3))

    class Other(Planted):
        def split(self, name):
            return PlantedSplit(9, 0)

    with pytest.raises(UserError, match="ranks of other data"):
        MaskedPixels(benchmark=Other(), ranks=tmp_path, fraction=0.5).split("train")


def test_maps_that_are_not_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="not numbers"):
        write_ranks(lambda batch: batch.images * torch.nan, Planted(), ("train",), tmp_path, told={})


def test_labels_of_several_classes_are_refused(tmp_path):
    class Several(Planted):
        def split(self, name):
            split = PlantedSplit(9, 0)
            split.label = F.one_hot(split.label, BLOCK).float()
            return split

    with pytest.raises(UserError, match="one class per image"):
        write_ranks(indifferent, Several(), ("train",), tmp_path, told={})
