"""Our explainers inside Captum and Quantus, and theirs beside ours."""

import sys
import warnings

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, LayerAttribution, NoiseTunnel, Saliency
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from hansfree.errors import UserError
from hansfree.explainers import LRP, Attention, GradientXInput, InputGradient
from hansfree.interoperability import CaptumAttribution, quantus_explain_func
from hansfree.models.small import SmallCNN
from hansfree.torchvision_guard import import_torchvision

import_torchvision("torchvision")
quantus = pytest.importorskip("quantus")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SmallCNN(4, widths=(4, 6), norm="batch").double().eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


PAIRS = {
    "saliency": (InputGradient(), Saliency, {"abs": False}),
    "input-x-gradient": (GradientXInput(), InputXGradient, {}),
}
TARGETS = {
    "number": 2,
    "tensor of one": torch.tensor(2),
    "tuple of one": (2,),
    "tensor": torch.tensor([2, 0, 3]),
    "list": [2, 0, 3],
    "list of tuples": [(2,), (0,), (3,)],
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("target", TARGETS)
def test_captums_own_agree_for_every_kind_of_target(model, images, pair, target):
    explainer, theirs, options = PAIRS[pair]
    expected = theirs(model).attribute(images.clone().requires_grad_(), target=TARGETS[target], **options)
    found = CaptumAttribution(explainer, model).attribute(images, target=TARGETS[target])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-14, check_layout=False)


def test_a_tuple_of_one_gives_a_tuple_of_one_and_no_target_means_one_output(model, images):
    attribution = CaptumAttribution(GradientXInput(), model)
    (map,) = attribution.attribute((images,), target=1)
    assert torch.equal(map, attribution.attribute(images, 1))
    single = nn.Sequential(model, nn.Linear(4, 1).double())
    expected = InputXGradient(single).attribute(images.clone().requires_grad_())
    torch.testing.assert_close(CaptumAttribution(GradientXInput(), single).attribute(images), expected)


def test_grad_mode_is_respected(model, images):
    attribution = CaptumAttribution(LRP(epsilon=0.01), model)
    map = attribution.attribute(images, 1)
    map.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("weight"))
    with torch.no_grad():
        constant = attribution.attribute(images, 1)
    assert not constant.requires_grad
    torch.testing.assert_close(constant, map.detach())


def test_maps_of_a_layer_can_be_interpolated_by_captum(model, images):
    map = CaptumAttribution(Attention(), model).attribute(images, 1)
    assert map.shape[1] == 1 and map.shape[-1] < 12
    assert LayerAttribution.interpolate(map, (12, 12)).shape == (3, 1, 12, 12)


@pytest.mark.parametrize(
    "target",
    [[0, 1], [1], torch.tensor([0, 1]), 1.0, torch.tensor([[0], [1], [2]]), (0, 1), (0, 1, 2), torch.tensor(0.5)],
)
def test_targets_that_captum_would_not_take_either(model, images, target):
    with pytest.raises((UserError, TypeError)):
        CaptumAttribution(GradientXInput(), model).attribute(images, target)


def test_what_cannot_be_said_is_refused(model, images):
    attribution = CaptumAttribution(GradientXInput(), model)
    for arguments, says in (
        (((images, images), 1), "one input"),
        ((images, 1, (3,)), "additional_forward_args"),
        ((images,), "which one"),
        ((images, 9), "target"),
    ):
        with pytest.raises(UserError, match=says):
            attribution.attribute(*arguments)


def test_infidelity_judges_our_maps_as_it_judges_captums(model, images):
    def perturb(inputs):
        noise = 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3), dtype=inputs.dtype)
        return noise, inputs - noise

    ours = CaptumAttribution(InputGradient(), model).attribute(images, 1).detach()
    theirs = Saliency(model).attribute(images.clone().requires_grad_(), target=1, abs=False).detach()
    scores = [infidelity(model, perturb, images, map, target=1, n_perturb_samples=4) for map in (ours, theirs)]
    torch.testing.assert_close(*scores)
    assert infidelity(model, perturb, images, ours + 1, target=1, n_perturb_samples=4).gt(scores[0]).all()


def test_sensitivity_calls_our_attribution_as_it_calls_captums(model, images):
    def score(attribute, **options):
        torch.manual_seed(0)
        return sensitivity_max(attribute, images, target=torch.tensor([2, 0, 3]), n_perturb_samples=3, **options)

    ours = score(CaptumAttribution(GradientXInput(), model).attribute)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input Tensor 0 did not already require gradients")
        theirs = score(InputXGradient(model).attribute)
    torch.testing.assert_close(ours, theirs)
    assert ours.gt(0).all()


def test_a_noise_tunnel_can_be_dug_through_ours(model, images):
    def smoothed(method):
        torch.manual_seed(0)
        return NoiseTunnel(method).attribute(images, nt_type="smoothgrad", nt_samples=3, stdevs=0.1, target=[2, 0, 3])

    with torch.no_grad():
        ours = smoothed(CaptumAttribution(GradientXInput(), model))
    torch.testing.assert_close(ours, smoothed(InputXGradient(model)).detach())
    plain = CaptumAttribution(GradientXInput(), model).attribute(images, [2, 0, 3]).detach()
    assert not torch.allclose(ours, plain, rtol=1e-3)


# Quantus ------------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays(model, images):
    model.float()
    return {"x_batch": images.float().numpy(), "y_batch": np.array([2, 0, 3])}


QUIET = {"disable_warnings": True, "display_progressbar": False}
METRICS = {
    "sparseness": lambda: quantus.Sparseness(**QUIET),
    "faithfulness": lambda: quantus.FaithfulnessCorrelation(nr_runs=8, subset_size=20, **QUIET),
    "randomised logits": lambda: quantus.RandomLogit(num_classes=4, seed=3, **QUIET),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "explainer", [GradientXInput(), LRP(epsilon=0.01), Attention()], ids=lambda e: type(e).__name__
)
def test_metrics_of_quantus_take_our_function_or_our_maps(model, arrays, metric, explainer):
    explain = quantus_explain_func(explainer)
    maps = explain(model, arrays["x_batch"], arrays["y_batch"])

    def score(**given):
        np.random.seed(0)
        return METRICS[metric]()(model=model, channel_first=True, softmax=False, **arrays, **given)

    found = score(a_batch=None, explain_func=explain)
    assert len(found) == (1 if metric == "faithfulness" else 3) and np.isfinite(found).all()
    given = {"explain_func": explain} if metric == "randomised logits" else {}
    np.testing.assert_allclose(found, score(a_batch=maps, **given), rtol=1e-5)


def test_quantus_own_gradient_times_input_gets_the_same_score(model, arrays):
    """Captum computes it inside Quantus; the metric reads the sum over channels of its size."""
    captum = InputXGradient(model).attribute(torch.tensor(arrays["x_batch"], requires_grad=True), target=[2, 0, 3])
    scores = [
        quantus.Sparseness(**QUIET)(model=model, channel_first=True, softmax=False, **arrays, **given)
        for given in (
            {"a_batch": None, "explain_func": quantus_explain_func(GradientXInput())},
            {"a_batch": captum.detach().numpy()},
        )
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_relevance_rank_accuracy_rewards_maps_on_the_object(model, arrays):
    masks = np.zeros((3, 1, 12, 12), dtype=bool)
    masks[:, :, :6] = True
    metric = quantus.RelevanceRankAccuracy(**QUIET)
    found = metric(
        model=model, s_batch=masks, a_batch=None, explain_func=quantus_explain_func(Attention()), channel_first=True,
        softmax=False, **arrays,
    )  # fmt: skip
    maps = quantus_explain_func(Attention())(model, arrays["x_batch"], arrays["y_batch"])
    by_hand = [masks[n].ravel()[np.argsort(maps[n].ravel())[-72:]].mean() for n in range(3)]
    np.testing.assert_allclose(found, by_hand)


def test_several_explainers_in_one_evaluation(model, arrays):
    functions = {"ours": quantus_explain_func(GradientXInput()), "lrp": quantus_explain_func(LRP(epsilon=0.01))}
    found = quantus.evaluate(
        metrics={"sparseness": quantus.Sparseness(**QUIET)}, xai_methods=functions, model=model,
        explain_func_kwargs={}, call_kwargs={"default": {"softmax": False, "channel_first": True}}, **arrays,
    )  # fmt: skip
    assert set(found) == {"ours", "lrp"}


def test_the_function_leaves_the_model_alone_and_takes_no_settings(model, arrays):
    explain = quantus_explain_func(GradientXInput())
    model.train()
    maps = explain(model, arrays["x_batch"], arrays["y_batch"], device="cpu")
    assert model.training and maps.dtype == np.float32 and maps.shape == (3, 3, 12, 12)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TypeError, match="epsilon"):
        explain(model, arrays["x_batch"], arrays["y_batch"], epsilon=0.1)


def test_neither_package_is_imported_by_the_adapters():
    import subprocess

    code = "import sys, hansfree.interoperability; print({'captum', 'quantus'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
