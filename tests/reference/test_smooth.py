"""SmoothGrad against the mean written out, Captum's noise tunnel, and finite differences."""

import copy

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from hansfree.config import construct
from hansfree.core import Tokens
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS, LRP, GradientXInput, InputGradient, IntegratedGradients, SmoothGrad
from hansfree.listing import entries

TARGET = torch.tensor([0, 3, 1])


def network(activation=nn.Softplus) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), activation(), nn.Flatten(), nn.Linear(180, 4)]
    return nn.Sequential(*layers).double().eval()


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def noisy(x: Tensor, seeds: Tensor, samples: int, noise: float) -> Tensor:
    """[samples, b, c, h, w], one sample's noise after the other."""
    copies = torch.empty(samples, *x.shape, dtype=x.dtype)
    for n in range(len(x)):
        generator = torch.Generator().manual_seed(int(seeds[n]))
        sigma = noise * (max(x[n].flatten().tolist()) - min(x[n].flatten().tolist()))
        for i in range(samples):
            copies[i, n] = x[n] + sigma * torch.randn(3, 8, 8, generator=generator).double()
    return copies


@pytest.mark.parametrize("form", ["mean", "square", "variance"])
@pytest.mark.parametrize("inner", [InputGradient(), GradientXInput(), IntegratedGradients(steps=3)])
def test_it_is_the_moment_over_noisy_copies(inner, form):
    model, x = network(), images()
    explainer = SmoothGrad(inner, samples=4, noise=0.3, form=form)
    draws = explainer.draw(3, torch.Generator().manual_seed(5))
    logits, map = explainer(model, x, TARGET, draws=draws)
    maps = torch.stack([inner(model, each, TARGET).map for each in noisy(x, draws["noise_seed"], 4, 0.3)])
    expected = {"mean": maps.mean(0), "square": (maps * maps).mean(0), "variance": maps.var(0, correction=0)}[form]
    torch.testing.assert_close(map, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(logits, model(x))


THEIRS = {"mean": "smoothgrad", "square": "smoothgrad_sq", "variance": "vargrad"}


@pytest.mark.parametrize("form", THEIRS)
def test_it_agrees_with_captums_noise_tunnel(form, monkeypatch):
    """With our noise in the place of Captum's, which comes from torch's global generator."""
    model, x = network(), images()
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 0, 1  # a value range of 1
    explainer = SmoothGrad(GradientXInput(), samples=5, noise=0.5, form=form)
    draws = explainer.draw(3)
    noise = (noisy(x, draws["noise_seed"], 5, 0.5) - x).transpose(0, 1).flatten(0, 1)
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise)
    tunnel = captum.attr.NoiseTunnel(captum.attr.InputXGradient(model))
    found = tunnel.attribute(x, nt_type=THEIRS[form], nt_samples=5, stdevs=0.5, target=TARGET)
    torch.testing.assert_close(explainer(model, x, TARGET, draws=draws).map.detach(), found.detach())


def test_noise_is_each_samples_own_and_shared_by_teacher_and_student():
    explainer = SmoothGrad(samples=3)
    draws = explainer.fixed_draws(torch.tensor([7, 7, 8]))
    x = images(1).expand(3, -1, -1, -1)
    map = explainer(network(), x, torch.tensor([0, 0, 0]), draws=draws).map
    torch.testing.assert_close(map[0], map[1])
    assert not torch.allclose(map[0], map[2])
    single = explainer(network().float(), x.float(), torch.tensor([0, 0, 0]), draws=draws).map
    torch.testing.assert_close(single.double(), map, rtol=1e-4, atol=1e-6)


def test_draws_of_the_wrapped_explainer_reach_it():
    model, x, explainer = network(nn.ReLU), images(), SmoothGrad(LRP((0.01, 1.0)), samples=2, noise=1e-9)
    draws = explainer.draw(3)
    assert set(draws) == {"noise_seed", "epsilon"}
    expected = LRP((0.01, 1.0))(model, x, TARGET, draws={"epsilon": draws["epsilon"]}).map
    torch.testing.assert_close(explainer(model, x, TARGET, draws=draws).map, expected, rtol=1e-5, atol=1e-9)
    with pytest.raises(UserError, match="noise_seed"):
        explainer(model, x, TARGET, draws={"epsilon": draws["epsilon"]})


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_in_one_forward_pass(momentum):
    model = network().train()
    model[1].momentum = momentum
    other, x = copy.deepcopy(model), images()
    for _ in range(2):
        model(x)
        SmoothGrad(samples=3)(other, x, TARGET)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["mean", "square", "variance"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_a_loss_on_the_map(training, form):
    model, x = network().train(training), images()
    explainer = SmoothGrad(GradientXInput(), samples=3, form=form)
    parameters = list(model.parameters())

    def loss():
        return (explainer(model, x, TARGET).map - 0.01).square().sum()

    claimed = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    norm = max(float(g.norm()) for g in claimed)
    for parameter, gradient in zip(parameters, claimed):
        direction = gradient / norm + torch.randn_like(gradient)
        direction = direction / direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * 1e-6)
        measured = (values[0] - values[1]) / 2e-6
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=norm * 1e-7)


def test_an_explainer_inside_comes_from_a_config():
    for inside in ({"name": "lrp", "epsilon": 0.1}, {"name": "gradient-x-input"}, "gradient-x-input"):
        made = construct(EXPLAINERS, {"name": "smoothgrad", "explainer": inside, "samples": 3}, "explainer")
        expected = LRP(0.1) if isinstance(inside, dict) and inside["name"] == "lrp" else GradientXInput()
        assert made == SmoothGrad(expected, samples=3)
    for inside, words in (({"name": "lpr"}, "'lrp'"), ({"name": "lrp", "epsilom": 1}, "'epsilon'"), (3, "explainer")):
        with pytest.raises(UserError, match=words):
            construct(EXPLAINERS, {"name": "smoothgrad", "explainer": inside}, "explainer")


def test_the_users_own_explainer_may_be_inside():
    from hansfree.parts import make_explainer

    own = {"name": "hansfree.explainers:InputGradient", "statistics": "running"}
    assert make_explainer({"name": "smoothgrad", "explainer": own}) == SmoothGrad(InputGradient("running"))


def test_the_default_can_be_listed():
    import json

    settings = next(entry["settings"] for entry in entries("explainers") if entry["name"] == "smoothgrad")
    assert json.loads(json.dumps(settings))["explainer"] == {"name": "gradient"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"form": "median"}, "form"),
        ({"samples": 0}, "samples"),
        ({"samples": 1, "form": "variance"}, "at least 2"),
        ({"noise": 0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"explainer": SmoothGrad()}, "SmoothGrad of SmoothGrad"),
    ],
)
def test_wrong_settings_are_user_errors(settings, words):
    with pytest.raises(UserError, match=words):
        SmoothGrad(**settings)


def test_texts_are_a_user_error():
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(UserError, match="texts"):
        SmoothGrad()(network(), Tokens(ids, ids == 0, ids), TARGET[:2])
