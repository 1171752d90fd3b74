"""Images with labels of several classes, from the batch to the table."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hansfree.core import Batch, Benchmark, Boxes, InputSpec, Setup, Split
from hansfree.errors import NotGivenError, UserError
from hansfree.evaluation import Selection, binned, pareto_front
from hansfree.explainers import GradientXInput
from hansfree.measuring import localisation, located, of_maps
from hansfree.methods import ERM, METHODS
from hansfree.methods.class_choice import AnyPositive
from hansfree.metrics.localisation import box_mask, class_mask, energy_pointing_game
from hansfree.models import load_model
from hansfree.parts import RunConfig, check_multi_label, make_method


class Several(Split):
    """Coloured squares in the corners: red, green, blue, any of them, at least one."""

    def __init__(self, count, *, masks=False):
        present = torch.tensor([[bool(n % 7 + 1 & 1 << k) for k in range(3)] for n in range(count)])
        self.label = present.float()
        self.images, self.masks = torch.full((count, 3, 12, 12), 0.2), masks
        self.mask = torch.zeros(count, 4, 12, 12)
        corners = [
            torch.tensor([6.0 * (k % 2), 6.0 * (k // 2), 6.0 * (k % 2) + 4, 6.0 * (k // 2) + 4]) for k in range(3)
        ]
        for n, k in present.nonzero().tolist():
            x0, y0, x1, y1 = (int(c) for c in corners[k])
            self.images[n, k, y0:y1, x0:x1] = 1
            self.mask[n, [0, 1 + k], y0:y1, x0:x1] = 1
        classes = [row.nonzero()[:, 0] for row in present]
        self.boxes = [(torch.stack([corners[k] for k in own]), own) for own in classes]

    def batch(self, index, generator=None):
        given = {"mask": self.mask[index]} if self.masks else {"boxes": Boxes(*zip(*(self.boxes[n] for n in index)))}
        return Batch(self.images[index], self.label[index], index, **given)


class Squares(Benchmark):
    name = "squares"
    classes = ("red", "green", "blue")
    biases = ()
    gives = frozenset({"boxes"})
    input = InputSpec(3, 12, 12)

    def split(self, name):
        return Several(28)

    def split_names(self):
        return ("train", "valid", "iid")


def network(seed=0):
    torch.manual_seed(seed)
    return load_model("small-cnn", num_classes=3, options={"widths": [4, 6]})


def config(method, **changes):
    sections = {"benchmark": {"name": "digits"}, "model": {"name": "small-cnn", "widths": [4, 6]}}
    return RunConfig(**sections, method={"name": method}, training={"steps": 2, "batch_size": 8}, **changes)


# Which class is explained


@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 99))
def test_a_positive_class_where_there_is_one_else_the_highest(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, classes, generator=generator)
    rule = AnyPositive()
    chosen = rule.choose(scores, rule.draw(count, generator))
    for row, k in zip(scores, chosen.tolist()):
        assert row[k] > 0 if (row > 0).any() else k == row.argmax()


def test_each_positive_class_is_equally_likely_and_the_ends_of_the_draw_are_in_range():
    label = torch.tensor([[0.0, 1, 0, 1, 1]]).expand(6000, -1)
    rule = AnyPositive()
    chosen = rule.choose(label, rule.draw(6000, torch.Generator().manual_seed(0)))
    shares = chosen.bincount(minlength=5) / 6000
    torch.testing.assert_close(shares, torch.tensor([0, 1 / 3, 0, 1 / 3, 1 / 3]), atol=0.02, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert rule.choose(label[:2], {"positive": ends}).tolist() == [1, 4]


def test_e2kd_explains_what_the_teacher_finds_and_another_class_in_another_step():
    from hansfree.core import Teacher

    teacher, split = network(1), Several(28)
    batch = split.batch(torch.arange(28))
    with torch.no_grad():
        teacher.get_classifier().bias.fill_(1.0)  # yes to all
    method = METHODS["e2kd"](
        Setup(network, Teacher.live(teacher), 28, 3, InputSpec(3, 12, 12)), explainer=GradientXInput()
    )
    assert method.teacher.logits(batch).min() > 0
    torch.manual_seed(0)
    losses = {round(method.train().loss(batch)["explanation"].item(), 6) for _ in range(5)}
    assert len(losses) > 1
    fixed = {method.eval().loss(batch)["explanation"].item() for _ in range(2)}
    assert len(fixed) == 1


# Training


def test_erm_sums_binary_cross_entropies():
    method, batch = ERM(Setup(network, None, 28, 3, InputSpec(3, 12, 12))).eval(), Several(28).batch(torch.arange(5))
    p = method.student(batch.images).sigmoid()
    expected = [-sum((p[i, k] if batch.label[i, k] else 1 - p[i, k]).log() for k in range(3)) for i in range(5)]
    torch.testing.assert_close(method.loss(batch)["label"], torch.stack(expected).mean())


def test_balanced_weights_are_refused_in_one_sentence():
    setup = Setup(network, None, 28, 3, InputSpec(3, 12, 12), label=Several(28).label)
    with pytest.raises(UserError, match="name several"):
        ERM(setup, class_weights="balanced")


TAKES_SEVERAL = {
    *("erm", "linear-probe", "model-guidance", "kd", "e2kd", "at", "cat-kd", "review-kd", "crd", "ft"),
    *("feature-distillation", "attention-distillation"),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_for_one_class_per_image_refuse_in_one_sentence(name):
    if name in TAKES_SEVERAL:
        check_multi_label(config(name), Squares())
        return
    with pytest.raises(NotGivenError, match="one class per image") as error:
        check_multi_label(config(name), Squares())
    assert error.value.reason and "\n" not in str(error.value)


def test_a_run_is_refused_before_anything_is_built():
    with pytest.raises(NotGivenError, match="one class per image"):
        make_method(config("label-smoothing"), Squares(), None)


# Measures


def test_each_class_that_is_there_is_located_by_its_own_mask():
    model, split = network().eval(), Several(7)
    batch = split.batch(torch.arange(7))
    explain = GradientXInput()

    def look(batch, target, draws):
        return explain(model, batch.images, target)

    found = located(look, batch, {})["epg"]
    for i in range(7):
        for k in range(3):
            if batch.label[i, k]:
                one = dataclasses.replace(batch, input=batch.images[i : i + 1])
                _, map = look(one, torch.tensor([k]), {})
                mask = split.mask[i : i + 1, 1 + k]
                assert found[i, k].item() == pytest.approx(energy_pointing_game(map, mask).item(), abs=1e-6)
            else:
                assert found[i, k].isnan()


def test_masks_and_boxes_of_squares_agree():
    boxes, masks = (Several(14, masks=kind).batch(torch.arange(14)) for kind in (False, True))
    for k in range(3):
        target = torch.full((14,), k)
        assert torch.equal(class_mask(boxes, target), class_mask(masks, target))
        assert torch.equal(class_mask(boxes, target), box_mask(boxes.boxes, target, (12, 12)))
    with pytest.raises(UserError, match="one mask of all objects"):
        class_mask(dataclasses.replace(masks, mask=masks.mask[:, :2]), torch.zeros(14, dtype=torch.long))


def test_the_mean_is_over_classes_that_are_there():
    model, split = network().eval(), Several(28)
    rows = of_maps(
        model, None, split, "iid", GradientXInput(),
        measured_with="x", samples=28, shifts=0, batch_size=5, device="cpu",
    )  # fmt: skip
    found = {row.metric: row.value for row in rows}
    values = []
    for i in range(28):
        for k in split.label[i].nonzero()[:, 0].tolist():
            map = GradientXInput()(model, split.images[i : i + 1], torch.tensor([k])).map
            values.append(energy_pointing_game(map, split.mask[i : i + 1, 1 + k]).item())
    assert found["epg"] == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert localisation(model, split, GradientXInput(), 9, "cpu")["epg"] == pytest.approx(found["epg"], abs=1e-9)


# Selection


def test_f1_selects_where_accuracy_would():
    method = ERM(Setup(network, None, 28, 3, InputSpec(3, 12, 12)))
    selection = Selection("iid_val", Squares())
    metrics, _ = selection.validate(method, 10, "cpu")
    assert "acc" not in metrics and selection.score(metrics) == metrics["f1"]


def test_rules_of_localisation_measure_maps_in_bins_and_then_ask_for_f1():
    method = ERM(Setup(network, None, 28, 3, InputSpec(3, 12, 12)))
    method.train()
    selection = Selection("epg_val", Squares(), GradientXInput())
    metrics, _ = selection.validate(method, 10, "cpu")
    assert {"f1", "epg", "iou"} <= metrics.keys() and method.training
    assert selection.score({"epg": 0.501, "f1": 0.3, "iou": 0.2}) < selection.score(
        {"epg": 0.499, "f1": 0.4, "iou": 0.1}
    )
    assert selection.score({"epg": 0.51, "f1": 0.3, "iou": 0.2}) > selection.score({"epg": 0.50, "f1": 0.9, "iou": 0.9})
    with pytest.raises(UserError, match="explainer"):
        Selection("iou_val", Squares())


points = st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=12)


@given(points)
def test_the_front_holds_what_nothing_surpasses(found):
    front, places = set(pareto_front(found)), [binned(point) for point in found]
    for number, place in enumerate(places):
        better = [o for o in places if o != place and all(a >= b for a, b in zip(o, place))]
        assert (number in front) == (not better)
    assert front
    named = [dict(zip(("f1", "epg", "iou"), point)) for point in found]
    for rule in ("epg_val", "iou_val"):
        selection = Selection(rule, Squares(), GradientXInput())
        assert max(range(len(found)), key=lambda n: selection.score(named[n])) in front
