"""Losses that keep explanations off the background, again and slowly, from their papers."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hansfree.errors import UserError
from hansfree.explainers import LRP
from hansfree.methods.gain import without_attention
from hansfree.methods.gals import combined, language_attention
from hansfree.methods.isnet import background_loss, foreground_loss, natural_range
from hansfree.models import load_model
from hansfree.torchvision_guard import import_torchvision
from hansfree.training import Training, fit


@pytest.fixture
def batch(tiny):
    return tiny.split("valid").batch(torch.arange(6))


def equal_gradients(method, terms, slow):
    """Whether the sum of ``terms`` and ``slow`` have one gradient in every weight."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    ours = torch.autograd.grad(sum(terms.values()), parameters, retain_graph=True)
    theirs = torch.autograd.grad(slow, parameters)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


# RRR


@pytest.mark.parametrize("weight", [1000.0, 3.0])
def test_rrr_is_eq_1_sample_by_sample(build, batch, weight):
    method = build("rrr", weight=weight).eval()
    label = background = 0.0
    for i in range(len(batch)):
        x = batch.images[i : i + 1].clone().requires_grad_()
        log_p = method.student(x).log_softmax(1)[0]
        label = label - log_p[batch.label[i]] / len(batch)
        (gradient,) = torch.autograd.grad(sum(log_p), x, create_graph=True)
        for channel in gradient[0]:
            matters_not = batch.mask[i, 0] == 0
            background = background + weight * (channel[matters_not] ** 2).sum() / len(batch)
    terms = method.loss(batch)
    torch.testing.assert_close(terms["label"], label)
    torch.testing.assert_close(terms["background"], background, rtol=1e-4, atol=0)
    equal_gradients(method, terms, label + background)


def test_rrr_in_training_can_differentiate_through_batch_statistics(build, tiny):
    batch = tiny.split("train").batch(torch.arange(12))
    x = batch.images.clone().requires_grad_()
    held, method = build("rrr").train(), build("rrr", statistics="differentiated").train()
    log_p = method.student(x).log_softmax(1)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    plain = 1000 * ((1 - batch.mask) * gradient).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(method.loss(batch)["background"].detach(), plain, rtol=1e-4, atol=0)
    assert not torch.isclose(held.loss(batch)["background"].detach(), plain, rtol=1e-2)


# ISNet


def slow_background(map, mask, decay, squash):
    """L1 of one class: ``map`` [c][h][w] and ``mask`` [h][w] as lists."""
    height, width = range(len(mask)), range(len(mask[0]))
    inside = [abs(plane[y][x]) for plane in map for y in height for x in width if mask[y][x]]
    mean = sum(inside) / len(inside)
    losses = []
    for plane in map:
        values = sorted((abs(plane[y][x]) / mean * (1 - mask[y][x]) for y in height for x in width), reverse=True)
        weights = [decay**rank for rank in range(len(values))]
        pooled = sum(w * v for w, v in zip(weights, values)) / sum(weights)
        losses.append(-math.log(1 - pooled / (pooled + squash)))
    return sum(losses) / len(losses)


def slow_foreground(map, mask, low, high, above):
    """L2 of one class."""
    total = sum(abs(r) * m for plane in map for rs, ms in zip(plane, mask) for r, m in zip(rs, ms))
    loss = 0.0
    if total < low:
        loss = (total / low - 1) ** 2
    elif total > low + high and above == "hybrid":
        loss = 1 + total - (low + high)
    elif total > high:
        loss = (total / low - high / low) ** 2
    return loss


@pytest.mark.parametrize(("explains", "above"), [("one", "hybrid"), ("one", "l2"), ("all", "hybrid")])
def test_isnet_is_its_two_losses_class_by_class(build, batch, explains, above):
    settings = {"weight": 0.6, "background_weight": 2.0, "foreground_weight": 3.0, "decay": 0.7, "squash": 0.5}
    method = build("isnet", explains=explains, above=above, relevance_range=(0.2, 0.4), **settings).eval()
    explainer = LRP(epsilon=0.01, output_factor=False)
    background = foreground = 0.0
    for i in range(len(batch)):
        image, mask = batch.images[i : i + 1], batch.mask[i, 0].tolist()
        classes = range(3)
        if explains == "one":
            coins = {name: draw[i : i + 1] for name, draw in method.rule.fixed_draws(batch.index).items()}
            classes = [int(method.rule.choose(method.student(image), coins))]
        for k in classes:
            map = explainer(method.student, image, torch.tensor([k])).map[0].tolist()
            share = 0.6 / len(batch) / len(classes)
            background += share * 2 * slow_background(map, mask, 0.7, 0.5)
            foreground += share * 3 * slow_foreground(map, mask, 0.2, 0.4, above)
    terms = method.loss(batch)
    assert terms["background"].item() == pytest.approx(background, rel=1e-4)
    assert terms["foreground"].item() == pytest.approx(foreground, rel=1e-4)
    label = F.cross_entropy(method.student(batch.images), batch.label)
    torch.testing.assert_close(terms["label"], 0.4 * label)


@pytest.mark.parametrize("above", ["hybrid", "l2"])
@pytest.mark.parametrize("total", [0.0, 0.7, 2.0, 3.0, 20.0, 21.0, 22.9, 23.0, 23.1, 60.0])
def test_foreground_loss_below_within_and_above_the_range(total, above):
    mask = torch.zeros(1, 1, 3, 4)
    mask[..., 1:, 2:] = 1
    map = torch.randn(1, 1, 2, 3, 4)
    inside = (map.abs() * mask.unsqueeze(1)).sum()
    map = torch.where(mask.unsqueeze(1) == 1, map * total / inside, map)
    loss = foreground_loss(map, mask, relevance_range=(3.0, 20.0), above=above)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(
        slow_foreground(map[0, 0].tolist(), mask[0, 0].tolist(), 3, 20, above), abs=1e-4
    )
    if 3 <= total <= 20:
        assert loss.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("decay", "pooled"), [(0.0, 8.0), (1.0, (8 + 2) / 4), (0.5, (8 + 2 / 2) / 1.875)])
def test_rank_pooling_goes_from_the_maximum_to_the_mean(decay, pooled):
    map = torch.tensor([[[[[2.0, -8.0], [1.0, -1.0]]]]])  # the mean size inside is 1
    mask = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]])
    loss = background_loss(map, mask, decay=decay, squash=2.0)
    assert loss.item() == pytest.approx(-math.log(1 - pooled / (pooled + 2)), rel=1e-6)


def test_background_loss_is_finite_at_its_edges_and_ignores_scale():
    map, mask = torch.randn(2, 3, 2, 4, 4, requires_grad=True), torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    loss = background_loss(map, mask)
    torch.testing.assert_close(background_loss(1000 * map, mask), loss)
    inside = mask.unsqueeze(1)
    assert not background_loss(map * inside, mask).any()
    for edge, object in ((map * 0, mask), (map * (1 - inside), mask), (map, mask * 0), (map, mask * 0 + 1)):
        loss = background_loss(edge, object).sum() + foreground_loss(edge, object).sum()
        (gradient,) = torch.autograd.grad(loss, map)
        assert loss.isfinite() and gradient.isfinite().all()


def test_isnet_takes_soft_masks_for_object_wherever_they_are_above_zero(build, batch):
    method = build("isnet").eval()
    soft = dataclasses.replace(batch, mask=batch.mask * 0.3)
    assert method.loss(soft)["background"] == method.loss(batch)["background"]


def test_natural_range_is_of_total_relevance_over_samples(build, tiny):
    model, split = build("erm").student.eval(), tiny.split("train")
    totals = []
    for i in range(len(split)):
        image = split.batch(torch.tensor([i])).images
        maps = [LRP(epsilon=0.01, output_factor=False)(model, image, torch.tensor([k])).map for k in range(3)]
        totals.append(sum(map.abs().sum().item() for map in maps) / 3)
    mean, spread = np.mean(totals), np.std(totals, ddof=1)
    low = max(mean / 5, mean - 3 * spread)
    assert natural_range(model, split, batch_size=20) == pytest.approx(
        (low, min(25 * low, mean + 3 * spread)), rel=1e-3
    )


# GAIN


def slow_grad_cam(model, image, k):
    """Eq. 1 and 2 for one image, at the size of the feature map."""
    features = model.forward_features(image)
    (gradient,) = torch.autograd.grad(model.forward_head(features)[0, k], features, create_graph=True)
    map = sum(channel.mean() * feature for channel, feature in zip(gradient[0], features[0]))
    return map.clamp_min(0)


def enlarged(map, size):
    return F.interpolate(map[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def test_gain_is_eq_3_to_7_sample_by_sample(build, batch):
    method = build("gain", mining_weight=2.0, mask_weight=5.0, omega=4.0, sigma=0.3).eval()
    label = mining = external = 0.0
    for i in range(len(batch)):
        image, y = batch.images[i : i + 1], batch.label[i]
        label = label - method.student(image).log_softmax(1)[0, y] / len(batch)
        attention = enlarged(slow_grad_cam(method.student, image, y), image.shape[-2:])
        soft_mask = 1 / (1 + torch.exp(-4 * (attention - 0.3)))
        score = method.student(image - soft_mask * image).exp()[0]
        mining = mining + 2 * score[y] / score.sum() / len(batch)
        external = external + 5 * ((attention - batch.mask[i, 0]) ** 2).mean() / len(batch)
    terms = method.loss(batch)
    for name, slow in (("label", label), ("mining", mining), ("attention", external)):
        torch.testing.assert_close(terms[name], slow, rtol=1e-4, atol=1e-6)
    equal_gradients(method, terms, label + mining + external)


def test_gain_judges_images_without_attention_in_training_as_in_evaluation(build, tiny):
    method, batch = build("gain").train(), tiny.split("train").batch(torch.arange(48))
    for norm in method.student.network.norms:
        norm.momentum = 1.0  # running statistics are then those of the last batch that refreshed them
    in_training = method.loss(batch)
    in_evaluation = method.eval().loss(batch)
    for name, term in in_training.items():
        torch.testing.assert_close(term, in_evaluation[name], rtol=3e-3, atol=0)


def test_what_is_attended_to_is_taken_out():
    images, attention = torch.rand(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    attention[..., :2] = 1
    rest = without_attention(images, attention, omega=100.0, sigma=0.5)
    torch.testing.assert_close(rest, images * (1 - attention))


# GALS


def slow_stretched(map):
    span = map.max() - map.min()
    return (map - map.min()) / span if span > 0 else map * 0


def slow_penalty(method, batch, attention, weight):
    """Cross-entropy, and weight times the mean absolute gradient outside of ``attention`` [b, h, w]."""
    label = background = 0.0
    for i in range(len(batch)):
        x = batch.images[i : i + 1].clone().requires_grad_()
        loss = -method.student(x).log_softmax(1)[0, batch.label[i]]
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        label = label + loss / len(batch)
        if attention[i].any():
            background = background + weight * ((1 - attention[i]) * gradient[0]).abs().mean() / len(batch)
    return label, background


def test_gals_without_a_file_looks_where_the_teacher_sees_the_label(build, batch):
    method = build("gals", weight=7.0).eval()
    teacher = method.teacher.model
    attention = []
    for i in range(len(batch)):
        image = batch.images[i : i + 1]
        features = teacher.forward_features(image).requires_grad_()
        (gradient,) = torch.autograd.grad(teacher.forward_head(features)[0, batch.label[i]], features)
        map = (gradient.mean((2, 3), keepdim=True) * features).sum((0, 1)).clamp_min(0)
        attention.append(enlarged(slow_stretched(map), image.shape[-2:]).detach())
    assert any(map.any() for map in attention)
    label, background = slow_penalty(method, batch, attention, 7.0)
    terms = method.loss(batch)
    torch.testing.assert_close(terms["label"], label)
    torch.testing.assert_close(terms["background"], background, rtol=1e-4, atol=1e-7)
    equal_gradients(method, terms, label + background)


def test_gals_looks_attention_up_by_sample(build, tiny, tmp_path):
    stored = torch.rand(48, 3, 4)
    stored[5] = 0  # nothing was found: nothing is punished
    np.save(tmp_path / "maps.npy", stored.numpy())
    method = build("gals", attention=str(tmp_path / "maps.npy"), weight=7.0, norm="none").train()
    batch = tiny.split("train").batch(torch.tensor([40, 5, 7]))
    attention = [enlarged(stored[i], (12, 12)) for i in (40, 5, 7)]
    label, background = slow_penalty(method, batch, attention, 7.0)
    terms = method.loss(batch)
    torch.testing.assert_close(terms["label"], label)
    torch.testing.assert_close(terms["background"], background, rtol=1e-4, atol=1e-7)
    assert method.eval().loss(tiny.split("valid").batch(torch.arange(6))).keys() == {"label"}


def test_prompts_that_find_nothing_do_not_thin_attention_out():
    maps = torch.rand(2, 3, 4, 4)
    maps[:, 1] = 0
    mean = sum(torch.stack([slow_stretched(map) for map in maps[:, k]]) for k in (0, 2)) / 2
    torch.testing.assert_close(combined(maps), torch.stack([slow_stretched(map) for map in mean]))
    assert not combined(torch.zeros(1, 2, 4, 4)).any()


PROMPTS = ("an image of a bird", "a photo of a bird", "a cat")


@pytest.fixture
def clip_folder(tmp_path):
    """A folder with a small CLIP of random weights."""
    open_clip = import_torchvision("open_clip")
    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}
    text = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}
    preprocessing = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    described = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config)
    with torch.no_grad():  # open_clip starts with residual branches that give nothing
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "open_clip_model.pth")
    return tmp_path


def test_language_attention_is_grad_cam_of_the_embedding_along_each_prompt(clip_folder, tiny, build):
    zero_shot = {"classes": PROMPTS, "templates": ("{}",)}
    model = load_model(f"open_clip/{clip_folder}", options={"zero_shot": zero_shot})
    split = tiny.split("train")
    maps = language_attention(model, split, batch_size=20)
    assert maps.shape == (48, 2, 2) and maps.amax() == 1 and maps.amin() == 0

    open_clip = import_torchvision("open_clip")
    clip = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(list(PROMPTS))
    texts = F.normalize(clip.encode_text(tokens), dim=1).detach()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    visual = clip.visual
    for i in (0, 13, 47):
        pixels = F.interpolate(split.batch(torch.tensor([i])).images, (64, 64), mode="bilinear")
        features = visual.layer3(visual.layer2(visual.layer1(visual.stem((pixels - mean) / std))))
        features = visual.layer4(features).detach().requires_grad_()
        embedding = visual.attnpool(features)
        found = []
        for text in texts:
            (gradient,) = torch.autograd.grad((embedding[0] * text).sum(), features, retain_graph=True)
            map = (gradient.mean((2, 3), keepdim=True) * features.detach()).sum((0, 1)).clamp_min(0)
            found.append(slow_stretched(map))
        there = [map for map in found if map.any()]
        slow = slow_stretched(sum(there) / len(there)) if there else torch.zeros(2, 2)
        torch.testing.assert_close(maps[i], slow, rtol=1e-3, atol=1e-4)

    np.save(clip_folder / "maps.npy", maps.numpy())
    method = build("gals", attention=str(clip_folder / "maps.npy")).train()
    terms = method.loss(split.batch(torch.arange(8)))
    assert all(term.isfinite() for term in terms.values()) and terms["background"] > 0


# All of them


@pytest.mark.slow
def test_training_moves_explanations_off_the_background(build, tiny):
    batch, trained = tiny.split("train").batch(torch.arange(48)), {}
    for name in ("erm", "rrr", "isnet", "gain"):
        method = trained[name] = build(name, **({"weight": 10.0} if name == "rrr" else {}))
        for _ in fit(method, tiny, Training(steps=120, batch_size=24, optimiser="adam", lr=0.02)):
            pass
        assert (method.eval().predict(batch.images).argmax(1) == batch.label).float().mean() > 0.8
    for name, terms in (("rrr", ["background"]), ("isnet", ["background"]), ("gain", ["attention", "mining"])):
        after = trained[name].loss(batch)
        trained[name].student.load_state_dict(trained["erm"].student.state_dict())
        before = trained[name].loss(batch)
        for term in terms:
            assert after[term] < 0.7 * before[term], (name, term)


@pytest.mark.parametrize("name", ["rrr", "isnet", "gain"])
def test_masks_are_asked_for(build, batch, name):
    with pytest.raises(UserError, match=f"{name} needs masks"):
        build(name).loss(dataclasses.replace(batch, mask=None))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("rrr", {"weight": 0.0}, "above 0"),
        ("rrr", {"statistics": "mean"}, "statistics"),
        ("isnet", {"weight": 1.5}, "in \\[0, 1\\]"),
        ("isnet", {"decay": -0.1}, "in \\[0, 1\\]"),
        ("isnet", {"relevance_range": (2.0, 1.0)}, "natural_range"),
        ("isnet", {"squash": 0.0}, "squash"),
        ("isnet", {"foreground_weight": -1.0}, "foreground_weight"),
        ("isnet", {"above": "l1"}, "hybrid or l2"),
        ("isnet", {"explains": "some"}, "one or all"),
        ("gain", {"omega": 0.0}, "slope"),
        ("gain", {"mask_weight": -1.0}, "mask_weight"),
        ("gals", {"weight": -1.0}, "above 0"),
        ("gals", {"attention": "nowhere.npy"}, "language_attention"),
    ],
)
def test_settings_that_cannot_be_are_named(build, name, settings, said):
    with pytest.raises(UserError, match=said):
        build(name, **settings)


@pytest.mark.parametrize(
    ("values", "said"),
    [(np.zeros((7, 2, 2)), "48"), (np.full((48, 2, 2), 1.5), "1.5"), (np.full((48, 2, 2), np.nan), "nan")],
)
def test_attention_of_another_split_or_scale_is_refused(build, tmp_path, values, said):
    np.save(tmp_path / "maps.npy", values)
    with pytest.raises(UserError, match=said):
        build("gals", attention=str(tmp_path / "maps.npy"))
