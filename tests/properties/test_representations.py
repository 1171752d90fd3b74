"""What networks represent, what masks keep and what was mined: the same for all, whole, and without a trace."""

import numpy as np
import pytest
import torch
from sklearn.manifold import trustworthiness
from torch import nn

from hansfree import representations as module
from hansfree.errors import UserError
from hansfree.evaluation import judge
from hansfree.experiment import run
from hansfree.measuring import of_mining
from hansfree.metrics.cka import gram, minibatch_cka
from hansfree.models import load_model
from hansfree.outcome import shortcut_of
from hansfree.parts import RunConfig
from hansfree.representations import check_pictures, placed, representations, seen
from hansfree.runs import read_results
from hansfree.training import Training, fit


def network(widths=(4, 6)):
    return load_model("small-cnn", num_classes=3, options={"widths": list(widths)})


def test_what_a_network_sees_is_what_goes_into_its_last_layer(tiny):
    model, images = network().train(), tiny.split("iid").batch(torch.arange(8)).images
    found = seen(model, images)
    assert list(found.kernels) == ["network.convs.0", "network.convs.1", "network.fc"]
    assert model.training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.network.fc(found.features), model(images))
        torch.testing.assert_close(found.kernels["network.fc"], gram(model(images)))
    assert not any(layer._forward_hooks for layer in model.modules())


def test_cka_of_networks_is_cka_of_all_their_activations(tiny, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 8)
    networks = {"one": network(), "other": network((5, 7))}
    arrays = representations(networks, tiny.split("iid"), ["cka"], "cpu")
    images = tiny.split("iid").batch(torch.arange(24)).images
    with torch.no_grad():
        first, second = (model.eval()(images) for model in networks.values())
    assert arrays["cka_one_other"].shape == (3, 3)
    assert arrays["cka_one_other"][2, 2] == pytest.approx(minibatch_cka(first, second, 8).item(), rel=1e-4)
    assert arrays["label"].tolist() == tiny.split("iid").label.tolist()
    alone = representations({"one": networks["one"]}, tiny.split("iid"), ["cka"], "cpu")
    np.testing.assert_allclose(np.diag(alone["cka_one_one"]), 1)


def test_the_plane_keeps_neighbours_and_is_always_the_same():
    clusters = torch.randn(3, 1, 20, generator=torch.Generator().manual_seed(0)) * 5
    features = (clusters + torch.randn(3, 15, 20, generator=torch.Generator().manual_seed(1))).flatten(0, 1).numpy()
    plane = placed(features, "tsne")
    assert plane.shape == (45, 2)
    assert trustworthiness(features, plane, n_neighbors=5) > 0.85
    np.testing.assert_array_equal(plane, placed(features, "tsne"))


def test_what_cannot_be_drawn_is_said_before_training(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "umap" else object())
    check_pictures(["tsne", "cka"])
    with pytest.raises(UserError, match="pip install umap-learn"):
        check_pictures(["cka", "umap"])
    with pytest.raises(UserError, match="no convolution and no linear layer"):
        seen(nn.Flatten(), torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("name", ["neuron-differentiation", "dcwp", "jtt"])
def test_what_was_mined_is_counted_against_the_known_bias(name, build, tiny):
    method, train = build(name), tiny.split("train")
    generator = torch.Generator().manual_seed(3)
    mined = torch.rand(48, generator=generator) < 0.4
    for buffer in {"neuron-differentiation": ["in_a"], "dcwp": [], "jtt": ["wrong"]}[name]:
        setattr(method, buffer, mined)
    if name == "dcwp":
        method.mining.wrong = mined
    conflicting = train.bias != train.label
    both = (mined & conflicting).sum().item()
    found = {m.metric: (m.split, m.value) for m in of_mining(method.mined(), train)}
    assert found["mined_precision"] == ("train", pytest.approx(both / mined.sum().item()))
    assert found["mined_recall"] == ("train", pytest.approx(both / conflicting.sum().item()))
    assert of_mining(None, train) == []


def test_masks_are_told_by_layer_once_there_are_any(build, tiny):
    method = build("neuron-differentiation", rounds=1, theta="cross-entropy")
    told = []
    for step in fit(method, tiny, Training(epochs=1, batch_size=16, optimiser="adam", lr=0.01), seed=4):
        told.append((step.stage, method.by_layer()))
    assert all(not layers for stage, layers in told if stage in ("warm-up", "split", "train"))
    layers = told[-1][1]
    assert layers.keys() == {"kept by A", "kept by B", "IoU of A and B"}
    a, b = (method.get_submodule(f"masks_{name}").kept["network.fc.weight"] for name in "ab")
    assert layers["kept by A"]["network.fc"] == pytest.approx(a.sum().item() / a.numel())
    assert layers["IoU of A and B"]["network.fc"] == pytest.approx((a & b).sum().item() / (a | b).sum().item())
    assert list(method.networks()) == ["sub-a", "sub-b", "vanilla"]
    said = judge(method, None, tiny, ("iid",), 24, "cpu")
    images = tiny.split("iid").batch(torch.arange(24)).images
    for sub in ("sub-a", "sub-b"):
        with torch.no_grad():
            assert torch.equal(method.networks()[sub].eval()(images), said[sub, "iid"].logits)


def test_dcwp_tells_what_it_keeps(build, tiny):
    method = build("dcwp", mining_epochs=1, mask_epochs=1, fine_tune_epochs=1)
    told = {}
    for step in fit(method, tiny, Training(epochs=1, batch_size=16, optimiser="adam", lr=0.01), seed=4):
        told[step.stage] = method.by_layer()
    assert not told["mine"] and not told["train"]
    fc = method.masks.kept["network.fc.weight"].float().mean().item()
    assert told["fine-tune"]["kept"]["network.fc"] == pytest.approx(fc)


def test_the_shortcut_is_told_by_split(tiny):
    told = shortcut_of(tiny, ("train", "iid"))
    train = tiny.split("train")
    assert told["train"]["conflicting"] == (train.bias != train.label).sum().item()
    assert told["train"]["size"] == 48
    assert 0 <= told["iid"]["predictive_power"] < 0.3


CONFIG = {
    "benchmark": {
        "name": "coloured-digits",
        "palette": "lff",
        "bias_ratio": 0.9,
        "limit": 260,
        "valid": 40,
        "test": 60,
    },
    "model": {"name": "small-cnn", "widths": [4, 6]},
    "method": {
        **{"name": "neuron-differentiation", "warm_up_epochs": 1, "mask_epochs": 2, "fine_tune_epochs": 1, "rounds": 1},
        **{"warm_up_lr": 0.1, "iou_weight": 0.01, "theta": "cross-entropy"},
    },
    "training": {"epochs": 1, "batch_size": 16, "optimiser": "adam", "lr": 0.01},
    "selection": "last",
    "evaluation": {"heatmaps": 0, "pictures": ["tsne", "cka"]},
}


def test_a_run_keeps_all_of_it(tmp_path):
    folder = run(RunConfig.model_validate(CONFIG), tmp_path / "run", device="cpu")
    results = read_results(folder.results)
    measured = {(row["model"], row["split"], row["metric"]) for row in results["rows"]}
    assert {("student", "train", "mined_recall"), ("sub-a", "shift", "acc"), ("sub-b", "iid", "acc_bc")} <= measured
    assert results["cells"][0]["settings"]["rounds"] == 1
    shortcut = results["data"]["shortcut"]
    assert shortcut["train"]["conflicting"] == 16 and shortcut["shift"]["conflicting"] == 60
    layers = [line["layers"] for line in folder.read_metrics() if "layers" in line]
    assert len(layers) == 3  # after each epoch of masks and of fine-tuning
    with np.load(folder.representations) as kept:
        assert kept["tsne_vanilla"].shape == (60, 2)
        assert kept["cka_sub-a_sub-b"].shape == (3, 3)
        assert str(kept["split"]) == "shift"
    page = folder.report.read_text()
    for words in (
        *("Accuracy of the sub-models", "Conflicting samples found", "What the masks keep", "IoU of A and B"),
        *("What the models represent", "coloured by bias", "CKA of sub-model A (rows) and sub-model B (columns)"),
        *("16 of 160 training samples conflict with it (10 %)", "colour of 3", "accuracy with and against"),
    ):
        assert words.lower() in page.lower(), words
    assert page.count("<img") >= 6
