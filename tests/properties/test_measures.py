"""What every measure must obey, whatever the maps and predictions; and a run that measures maps."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansfree.config import parse
from hansfree.core import Boxes, Explainer, Explanation, LiveTeacher, Predictions
from hansfree.errors import UserError
from hansfree.evaluation import judge
from hansfree.experiment import run
from hansfree.explainers import GradCAM, GradientXInput
from hansfree.measuring import of_maps, of_predictions, sample, scores
from hansfree.metrics import EXPLANATION_AGREEMENT, LOCALISATION, METRICS
from hansfree.metrics.equivariance import period, shift_similarity, shifted
from hansfree.metrics.explanation_agreement import rank_correlation, top_intersection
from hansfree.metrics.intervals import intervals
from hansfree.parts import RunConfig, spelled

BOUNDS = {
    **dict.fromkeys(("explanation_cosine", "explanation_cosine_defined", "explanation_rank_correlation"), (-1, 1)),
    "explanation_ssim": (-1, 1),
    "explanation_top_intersection": (0, 1),
    **dict.fromkeys(LOCALISATION, (0, 1)),
}


@st.composite
def maps(draw, count=2, channels=2, size=12):
    """Signed maps, some with ties, some sparse, some nil, some huge or tiny."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    found = []
    for _ in range(count):
        map = torch.randn(3, channels, size, size, generator=generator, dtype=torch.double)
        map = map.round() if draw(st.booleans()) else map
        map = map * (torch.rand(map.shape, generator=generator) < draw(st.sampled_from([0.0, 0.05, 1.0])))
        found.append(map * draw(st.sampled_from([1e-20, 1.0, 1e20])))
    return found


@st.composite
def masks(draw, size=12):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return (torch.rand(3, size, size, generator=generator) < draw(st.sampled_from([0.1, 0.5, 1.0]))).double()


@settings(max_examples=40)
@given(maps())
def test_agreement_of_maps_is_bounded_symmetric_and_1_of_a_map_with_itself(pair):
    for name, similarity in EXPLANATION_AGREEMENT.items():
        found = similarity(*pair)
        low, high = BOUNDS[name]
        assert found.shape == (3,)
        assert ((found.isnan()) | ((found >= low - 1e-9) & (found <= high + 1e-9))).all(), name
        torch.testing.assert_close(found, similarity(*reversed(pair)), equal_nan=True)
        itself = similarity(pair[0], pair[0])
        if pair[0].any() and len(pair[0].unique()) > 100:
            torch.testing.assert_close(itself, torch.ones_like(itself))


@settings(max_examples=30)
@given(maps(), st.sampled_from([2.0**-20, 0.5, 8.0]))
def test_the_scale_of_a_map_is_of_no_account(pair, scale):
    """Powers of two, which round nothing: sums that differ by a rounding alone are no ties."""
    for name, similarity in EXPLANATION_AGREEMENT.items():
        torch.testing.assert_close(similarity(pair[0] * scale, pair[1]), similarity(*pair), equal_nan=True, msg=name)


@settings(max_examples=30)
@given(maps(channels=1))
def test_rank_correlation_reads_the_order_alone(pair):
    map, other = ((m / m.abs().max().clamp_min(1e-300)) for m in pair)
    found = rank_correlation(map, other)
    torch.testing.assert_close(rank_correlation(map.exp(), other**3), found, equal_nan=True)
    torch.testing.assert_close(rank_correlation(-map, other), -found, equal_nan=True)


@settings(max_examples=30)
@given(maps(), st.integers(0, 10**6))
def test_the_places_of_pixels_matter_to_ssim_alone(pair, seed):
    order = torch.randperm(144, generator=torch.Generator().manual_seed(seed))
    moved = [m.flatten(2)[..., order].view_as(m) for m in pair]
    for name in EXPLANATION_AGREEMENT.keys() - {"explanation_ssim"}:
        similarity = EXPLANATION_AGREEMENT[name]
        torch.testing.assert_close(similarity(*moved), similarity(*pair), equal_nan=True, msg=name)


@settings(max_examples=30)
@given(maps(count=1), st.floats(0.01, 1))
def test_a_constant_map_has_as_much_in_common_as_chance_gives(map, share):
    k = max(1, round(share * 144))
    found = top_intersection(map[0], torch.ones_like(map[0]), share=share)
    torch.testing.assert_close(found, torch.full_like(found, k / 144))


@settings(max_examples=40)
@given(maps(count=1), masks())
def test_localisation_is_bounded_and_right_at_the_ends(map, mask):
    (map,) = map
    for name, locate in LOCALISATION.items():
        found = locate(map, mask)
        assert (found.isnan() | ((found >= 0) & (found <= 1))).all(), name
    everywhere = LOCALISATION["epg_defined"](map, torch.ones_like(mask))
    assert (everywhere.isnan() | (everywhere > 1 - 1e-9)).all()
    parts = LOCALISATION["epg"](map, mask) + LOCALISATION["epg"](map, 1 - mask)
    total = map.sum(1).clamp_min(0).sum((1, 2))
    torch.testing.assert_close(parts, (total >= 1e-7).double())
    there = mask.flatten(1).any(1) & ~mask.flatten(1).all(1)  # a constant map has no range
    for name in ("epg_defined", "iou_defined", "pointing_game"):
        assert (LOCALISATION[name](mask[:, None], mask)[there] == 1).all(), name


@settings(max_examples=30)
@given(maps(count=1), masks(), st.sampled_from([2.0**-10, 2.0, 2.0**20]))
def test_localisation_reads_no_scale(map, mask, scale):
    for name in LOCALISATION.keys() - {"epg"}:  # the published one calls small maps empty
        ours, scaled = (LOCALISATION[name](m, mask) for m in (map[0], map[0] * scale))
        torch.testing.assert_close(ours, scaled, equal_nan=True, msg=name)


@settings(max_examples=20)
@given(maps(count=1), st.integers(0, 11))
def test_a_map_that_moves_with_its_image_is_equivariant(map, shift):
    found = shift_similarity(map[0], shifted(map[0], shift), shift)
    assert (found.isnan() | (found > 1 - 1e-9)).all()


@settings(max_examples=30)
@given(st.integers(2, 16), st.integers(0, 10**6))
def test_a_curve_that_returns_has_its_period(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    fall = torch.rand(30, 17, generator=generator) * 0.1 + 0.1
    curve = 1 - fall * (torch.arange(17) % steps != 0)
    assert period(curve) == steps


@st.composite
def predictions(draw):
    n, generator = draw(st.integers(2, 40)), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = draw(st.sampled_from([0.1, 1.0, 50.0])) * torch.randn(n, 7, generator=generator)
    label, bias = torch.randint(7, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
    theirs = torch.randn(n, 7, generator=generator)
    return Predictions(logits, label, bias, theirs, {(y, a): 1 for y in range(7) for a in range(2)})


@settings(max_examples=25)
@given(predictions())
def test_measures_of_predictions_and_their_intervals_are_bounded(p):
    sums = {name: found for name, metric in METRICS.items() if (found := metric.sums(p)) is not None}
    found = intervals(sums, draws=60)
    for name in sums:
        value, top = METRICS[name](p), {"nll": torch.inf, "brier": 2}.get(name, 1)
        assert 0 <= value <= top + 1e-9, name
        if name in found:
            assert -1e-9 <= found[name].low <= found[name].high <= top + 1e-9, name
            assert found[name].samples <= len(p.label)
    assert METRICS["agreement"](p) <= METRICS["agreement_top5"](p)


@settings(max_examples=20)
@given(predictions())
def test_a_model_agrees_with_itself_and_logits_may_be_shifted(p):
    same = Predictions(p.logits, p.label, teacher_logits=p.logits + 3)
    assert METRICS["agreement"](same) == 1
    assert METRICS["jensen_shannon"](same) == pytest.approx(0, abs=1e-6)
    moved = Predictions(p.logits + 3, p.label)
    for name in ("ece", "brier", "nll"):
        assert METRICS[name](moved) == pytest.approx(METRICS[name](p), abs=1e-4)


# Measuring models ---------------------------------------------------------------------------------------------


@pytest.fixture
def distiller(build):
    return build("explanation-distillation").eval()


def measured(distiller, tiny, explainer, teacher=True, **settings):
    given = {"samples": 20, "shifts": 0, "batch_size": 7, "device": "cpu", "measured_with": "x", **settings}
    of = distiller.teacher if teacher is True else teacher
    return of_maps(distiller.student, of, tiny.split("shift"), "shift", explainer, **given)


def test_student_teacher_and_pair_go_through_the_same_list(distiller, tiny):
    found = measured(distiller, tiny, GradientXInput(), shifts=4)
    assert {m.split for m in found} == {"shift"} and {m.measured_with for m in found} == {"x"}
    names = {model: {m.metric for m in found if m.model == model} for model in ("student", "teacher")}
    assert names["teacher"] == {*LOCALISATION, "shift_similarity", "shift_equivariance", "shift_period"}
    assert names["student"] == names["teacher"] | EXPLANATION_AGREEMENT.keys()
    assert [m.group for m in found if m.model == "teacher" and m.group] == [f"shift:{t}" for t in range(5)]
    at_rest = next(m for m in found if m.group == "shift:0")
    assert at_rest.value == pytest.approx(1)
    assert all(m.interval.low <= m.value <= m.interval.high for m in found if m.metric == "epg")


def test_batches_do_not_matter_and_nothing_is_left_behind(distiller, tiny):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = measured(distiller, tiny, GradCAM(), batch_size=20)
    for a, b in zip(whole, measured(distiller, tiny, GradCAM(), batch_size=3), strict=True):
        assert a.metric == b.metric and a.value == pytest.approx(b.value, abs=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in distiller.parameters())


def test_a_student_that_is_its_teacher_agrees_with_it(distiller, tiny):
    found = measured(distiller, tiny, GradientXInput(), teacher=LiveTeacher(distiller.student))
    values = {m.metric: m.value for m in found if m.model == "student"}
    for name in EXPLANATION_AGREEMENT:
        assert values[name] == pytest.approx(1), name


def test_without_a_teacher_the_student_is_measured_alone(distiller, tiny):
    found = measured(distiller, tiny, GradientXInput(), teacher=None)
    assert {m.metric for m in found} == LOCALISATION.keys() and {m.model for m in found} == {"student"}


class Constant(Explainer):
    """Shows the same place for every image: the class's own quadrant."""

    def __call__(self, model, input, target, *, draws=None):
        logits = model(input)
        chosen = target(logits) if callable(target) else target
        map = torch.zeros(len(input), 1, 12, 12)
        for n, y in enumerate(chosen.tolist()):
            map[n, 0, 6 * (y // 2) : 6 * (y // 2) + 6, 6 * (y % 2) : 6 * (y % 2) + 6] = 1
        return Explanation(logits, map)


def test_localisation_is_of_the_label_s_class_and_agreement_of_the_teacher_s(distiller, tiny):
    found = {(m.model, m.metric): m.value for m in measured(distiller, tiny, Constant())}
    for model in ("student", "teacher"):
        assert found[model, "epg"] == found[model, "iou"] == found[model, "pointing_game"] == 1
    assert found["student", "explanation_cosine"] == pytest.approx(1)


def test_boxes_serve_where_there_is_no_mask(distiller, tiny):
    batch = tiny.split("iid").batch(torch.arange(6))
    quadrants = [
        torch.tensor([[6.0 * (y % 2), 6.0 * (y // 2), 6.0 * (y % 2) + 6, 6.0 * (y // 2) + 6]])
        for y in batch.label.tolist()
    ]
    boxes = Boxes(tuple(quadrants), tuple(batch.label[:, None]))
    by_mask, by_box = (
        scores(distiller.student, None, b, GradientXInput(), 0)
        for b in (batch, batch.__class__(batch.input, batch.label, batch.index, boxes=boxes))
    )
    assert by_mask.keys() == by_box.keys() and by_mask
    for key, value in by_mask.items():
        torch.testing.assert_close(value, by_box[key], equal_nan=True)


def test_the_sample_is_the_same_for_all_and_at_most_all():
    assert sample(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert sample(100, 10).equal(sample(100, 10)) and len(set(sample(100, 10).tolist())) == 10


def test_predictions_of_all_models_on_all_splits_and_groups(distiller, tiny):
    judged = judge(distiller, distiller.teacher, tiny, ("iid", "shift"), 16, "cpu")
    found = {(m.model, m.split, m.group, m.metric): m for m in of_predictions(judged)}
    for (model, split), p in judged.items():
        for name, metric in METRICS.items():
            value = metric(p)
            assert ((model, split, None, name) in found) == (value is not None)
            assert value is None or found[model, split, None, name].value == value
    p = judged["student", "iid"]
    groups = {key[2] for key in found if key[1] == "iid"} - {None}
    assert groups == {f"y:{y},a:{a}" for y, a in zip(p.label.tolist(), p.bias.tolist())}
    for y, a in {(0, int(p.bias[p.label == 0][0])), (2, int(p.bias[p.label == 2][0]))}:
        at = (p.label == y) & (p.bias == a)
        same = (p.logits[at].argmax(1) == p.teacher_logits[at].argmax(1)).double().mean()
        measurement = found["student", "iid", f"y:{y},a:{a}", "agreement"]
        assert measurement.value == pytest.approx(same.item())
        assert measurement.interval is None or measurement.interval.samples == at.sum()


# A run --------------------------------------------------------------------------------------------------------

CONFIG = {
    "benchmark": {"name": "coloured-digits", "limit": 100, "valid": 20, "test": 20},
    "model": {"name": "small-cnn", "widths": [4, 8]},
    "method": {"name": "output-distillation"},
    "teacher": {"model": {"name": "small-cnn", "widths": [4, 8]}},
    "training": {"steps": 2, "batch_size": 16},
    "evaluation": {
        "heatmaps": 0,
        "measure": {"explainers": [{"name": "grad-cam"}, {"name": "lrp", "epsilon": 0.1}], "samples": 10, "shifts": 3},
    },
}


def test_a_run_reports_maps_and_intervals(tmp_path):
    folder = run(parse(RunConfig, CONFIG), tmp_path / "run", report=False)
    results = json.loads(folder.results.read_text())
    with_maps = [row for row in results["rows"] if row["measured_with"]]
    assert {row["measured_with"] for row in with_maps} == {"grad-cam", "lrp epsilon=0.1"}
    assert {row["split"] for row in with_maps} == {"iid", "ood", "shift"}
    assert {"epg", "iou", "explanation_cosine", "shift_equivariance"} < {row["metric"] for row in with_maps}
    places = ("model", "split", "group", "metric", "measured_with")
    rows = {tuple(row[p] for p in places): row["value"] for row in results["rows"]}
    assert len(rows) == len(results["rows"])
    told = results["intervals"]["rows"]
    assert all(tuple(interval[p] for p in places) in rows for interval in told)
    without = {row[3] for row in rows} - {interval["metric"] for interval in told}
    assert without <= {"loss", "gap", "shift_period"}


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        ({"explainers": []}, "explainers"),
        ({"explainers": [{"name": "grad-camm"}]}, "did you mean 'grad-cam'"),
        ({"explainers": [{"name": "grad-cam"}], "shifts": 28}, "shift from 0 to 27"),
        ({"explainers": [{"name": "bcos"}]}, "B-cos"),
    ],
)
def test_what_cannot_be_measured_is_told_before_training(measure, said, tmp_path):
    with pytest.raises(UserError, match=said):
        run(parse(RunConfig, {**CONFIG, "evaluation": {"measure": measure}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_explainers_are_told_apart_by_their_settings():
    assert spelled({"name": "grad-cam"}) == "grad-cam"
    nested = {"name": "smoothgrad", "explainer": {"name": "lrp", "epsilon": 0.1}, "samples": 4}
    assert spelled(nested) == "smoothgrad explainer=(lrp epsilon=0.1) samples=4"
