"""Sanity checks: what is randomised, and that maps which do not look at the network are told from those that do."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import nn

from hansfree.audits.randomisation import WAYS, depths, layers_of, likeness, map_changes, randomised
from hansfree.core import Explainer, Explanation
from hansfree.errors import UserError
from hansfree.explainers import InputGradient
from hansfree.models import load_model


@dataclass(frozen=True)
class EdgeDetector(Explainer):
    """A map of the image alone: what the sanity checks are made to find."""

    def __call__(self, model, input, target, *, draws=None):
        return Explanation(model(input), input - input.roll(1, -1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = load_model("small-resnet", num_classes=3, options={"widths": [4, 6]})
    for _ in range(2):
        network.train()(torch.rand(8, 3, 16, 16))
    return network.eval()


def test_every_weight_belongs_to_one_layer_and_normalisation_to_the_one_before(model):
    layers = layers_of(model)
    modules = dict(model.named_modules())
    owners = [name for own in layers.values() for name in own]
    assert sorted(owners) == sorted(n for n, m in modules.items() if list(m.parameters(recurse=False)))
    assert len(set(owners)) == len(owners)
    for name, (first, *others) in layers.items():
        assert name == first
        assert all(isinstance(modules[other], nn.BatchNorm2d) for other in others)


def test_shuffled_weights_are_the_same_numbers_in_another_order(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name, own = next(iter(layers_of(model).items()))
    other = randomised(model, own)
    for key, value in other.state_dict().items():
        if key == f"{name}.weight":
            assert not torch.equal(value, before[key])
            assert torch.equal(value.flatten().sort().values, before[key].flatten().sort().values)
        elif key.rpartition(".")[0] not in own:
            assert torch.equal(value, before[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(randomised(model, own).state_dict()[f"{name}.weight"], other.state_dict()[f"{name}.weight"])


def test_depths_go_from_the_last_layer_to_the_first(model):
    layers = list(layers_of(model))
    cascade, alone = (list(depths(model, way, 3)) for way in WAYS)
    named = [f"network.{name}" for name, _ in cascade]
    assert named == [layers[-1], layers[(len(layers) - 1) // 2], layers[0]]
    assert [set(a) < set(b) for (_, a), (_, b) in pairwise(cascade)] == [True, True]
    assert set(cascade[-1][1]) == {module for own in layers_of(model).values() for module in own}
    assert [set(own) for _, own in alone] == [set(layers_of(model)[name]) for name in named]
    assert len(list(depths(model, "cascading", 99))) == len(layers)


@pytest.mark.parametrize("way", WAYS)
def test_maps_that_see_the_network_change_and_those_that_see_the_image_do_not(model, way):
    images, target = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    seen = list(map_changes(model, images, target, InputGradient(), {}, way, most=3))
    blind = list(map_changes(model, images, target, EdgeDetector(), {}, way, most=3))
    assert [layer for layer, _, _ in seen] == ["none", *(layer for layer, _ in depths(model, way, 3))]
    for _, _, values in blind:
        assert all(torch.allclose(value, torch.ones(4, dtype=torch.double)) for value in values.values())
    *_, (_, map, values) = seen
    assert map.shape == (4, 16, 16)
    assert (values["randomisation_rank_correlation_absolute"] < 0.9).all()
    if way == "cascading":
        again = InputGradient()(randomised(model, dict(model.named_modules())), images, target).map.sum(1)
        assert torch.allclose(map, again.double(), atol=1e-6)


def test_likeness_is_scipys_and_scikit_images():
    maps = torch.randn(2, 16, 16, dtype=torch.double), torch.randn(2, 16, 16, dtype=torch.double)
    found = likeness(*maps)
    for row in range(2):
        one, other = (map[row] for map in maps)
        rank = spearmanr(one.flatten(), other.flatten()).statistic
        assert float(found["randomisation_rank_correlation"][row]) == pytest.approx(rank)
        rank = spearmanr(one.abs().flatten(), other.abs().flatten()).statistic
        assert float(found["randomisation_rank_correlation_absolute"][row]) == pytest.approx(rank)
        theirs = structural_similarity(
            (one / one.abs().max()).numpy(), (other / other.abs().max()).numpy(),
            data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert float(found["randomisation_ssim"][row]) == pytest.approx(theirs, abs=1e-6)
    assert "randomisation_ssim" not in likeness(torch.rand(1, 8, 8), torch.rand(1, 8, 8))


def test_a_network_without_weights_is_refused():
    with pytest.raises(UserError, match="no layer with weights"):
        layers_of(nn.Flatten())
