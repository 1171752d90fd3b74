"""What a run trains on: few shots, unrelated images, augmented and mixed ones; and what is refused there."""

import copy
import dataclasses
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hansfree.augmentation import Augmentation
from hansfree.benchmarks import MNISTBackground, PlainDigits
from hansfree.benchmarks.choosing import drawn
from hansfree.benchmarks.regimes import augmented, few_shots, reshaped, transferred
from hansfree.config import merge, parse
from hansfree.core import UNKNOWN, Batch, InputSpec, Predictions, Setup, Split, Teacher
from hansfree.errors import NotGivenError, UserError
from hansfree.evaluation import Selection
from hansfree.experiment import check, run
from hansfree.explainers import LRP
from hansfree.methods import METHODS
from hansfree.metrics.multi_label import f1
from hansfree.models import load_model
from hansfree.parts import RunConfig, make_benchmark, make_method, teacher_config
from hansfree.training import Training, _ByBatch, fit

CUTS = Augmentation(crop=(0.3, 1), flip=0.5, rotation=15, brightness=0.2)
CONFIG = {
    "benchmark": {"name": "digits", "limit": 300, "valid": 60, "test": 60},
    "model": {"name": "small-cnn", "widths": [4, 8]},
    "method": {"name": "erm"},
    "training": {"epochs": 1, "batch_size": 16, "optimiser": "adam"},
    "evaluation": {"heatmaps": 2},
}
DISTILLER = {"method": {"name": "output-distillation"}, "teacher": {"train": {"training.epochs": 1}}}
COLOURED = {"name": "coloured-digits", "limit": 200, "valid": 40, "test": 40}


def config(**changes):
    return parse(RunConfig, merge(CONFIG, changes))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def method_on(benchmark, name, **settings):
    """A method built on ``benchmark`` as a run builds it."""
    train = benchmark.split("train")
    torch.manual_seed(0)
    models = [load_model("small-cnn", num_classes=3, options={"widths": [4, 6]}) for _ in range(2)]
    bias = train.bias if "bias" in METHODS[name].needs else None
    setup = Setup(
        lambda: copy.deepcopy(models[0]),
        Teacher.live(models[1]),
        len(train),
        3,
        benchmark.input,
        label=train.label,
        bias=bias,
    )
    return METHODS[name](setup, **settings)


# Few shots


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_so_many_of_each_class_and_fewer_shots_among_more(shots, seed):
    label = torch.randint(4, (200,), generator=seeded(seed % 7))
    rows, more = (drawn(label, n, seed, ("a", "b", "c", "d"), key="shots") for n in (shots, shots + 2))
    assert label[rows].bincount(minlength=4).tolist() == [shots] * 4
    assert torch.equal(rows, rows.unique()) and set(rows.tolist()) <= set(more.tolist())


def test_every_sample_may_be_drawn_and_the_seed_decides():
    label = torch.arange(30) % 3
    chosen = [tuple(drawn(label, 2, seed, ("a", "b", "c"), key="shots").tolist()) for seed in range(40)]
    assert len(set(chosen)) > 30 and {row for rows in chosen for row in rows} == set(range(30))
    assert chosen[3] == tuple(drawn(label, 2, 3, ("a", "b", "c"), key="shots").tolist())


def test_a_few_shots_are_the_samples_of_the_whole_and_say_which(tiny):
    whole, few = tiny.split("train"), few_shots(tiny, 4, seed=1)
    part = few.split("train")
    assert len(part) == 12 and len(part.bias) == 12
    index = torch.tensor([7, 0, 11])
    batch = part.batch(index, seeded())
    assert torch.equal(batch.index, index)
    same = whole.batch(batch.origin)
    for field in ("input", "label", "bias", "mask", "clean"):
        assert torch.equal(getattr(batch, field), getattr(same, field))
    assert torch.equal(part.label[index], batch.label)
    assert few.split("valid").label.tolist() == tiny.split("valid").label.tolist()
    assert few.split("valid").batch(torch.arange(2)).origin is None


def test_what_is_redrawn_at_each_access_still_is():
    whole = MNISTBackground(limit=200, valid=40, test=40)
    part = few_shots(whole, 3, seed=0).split("train")
    first, second = (part.batch(torch.arange(6), seeded(seed)) for seed in (1, 2))
    assert torch.equal(first.input, second.input) and not torch.equal(first.clean, second.clean)


def test_the_tests_ask_what_they_asked():
    whole, few = (make_benchmark(config(benchmark=COLOURED, **shots)) for shots in ({}, {"shots": 2}))
    assert few.shortcut == whole.shortcut == "the colour" and few.asks == whole.asks and "ood" in few.asks


def test_the_record_tells_of_the_shots():
    record = few_shots(PlainDigits(limit=300, valid=60, test=60), 5, seed=3).record()
    assert record["splits"]["train"] == {"size": 50} and record["splits"]["valid"]["size"] == 60
    assert record["shots"]["per_class"] == 5 and record["shots"]["seed"] == 3
    assert json.loads(json.dumps(record)) == record


def test_too_many_shots_are_refused_with_the_most_there_are(tiny):
    with pytest.raises(UserError, match=r"the class 'a' than the 16 .* take at most 16"):
        few_shots(tiny, 17, seed=0)
    with pytest.raises(UserError, match="name several"):
        drawn(torch.zeros(5, 3), 1, 0, ("a", "b", "c"), key="shots")


def test_shots_follow_the_run_s_seed_unless_told_otherwise():
    def rows(**changes):
        train = make_benchmark(config(shots=3, **changes)).split("train")
        return train.batch(torch.arange(30)).origin.tolist()

    assert rows(seed=0) != rows(seed=1)
    assert rows(seed=0, shots_seed=5) == rows(seed=1, shots_seed=5)


PER_SAMPLE = ("jtt", "dfr", "group-dro", "resampling", "class-resampling", "reweighting", "irm", "pgi", "crd")


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_methods_that_remember_samples_remember_those_they_have(name, tiny):
    few = few_shots(tiny, 5, seed=2)
    short = {"dfr": {"last_layer_epochs": 1}}.get(name, {})
    method = method_on(few, name, **short)
    for _ in fit(method, few, Training(epochs=1, batch_size=5, optimiser="adam")):
        pass
    assert method.stages_done > 0


def test_jtt_weighs_the_few_that_were_wrong(tiny):
    few = few_shots(tiny, 5, seed=2)
    method = method_on(few, "jtt", upweight=3)
    for _ in fit(method, few, Training(epochs=1, batch_size=15, lr=1e-9, clip=None)):
        if method.stages_done == 0:
            wrong = method.student.eval()(few.split("train").batch(torch.arange(15)).images).argmax(1)
    assert torch.equal(method.wrong, wrong != few.split("train").label)
    assert len(method.weights()) == 15


def test_weights_of_groups_count_the_few(tiny):
    few = few_shots(tiny, 5, seed=2)
    train, groups = few.split("train"), method_on(few, "resampling").groups
    weights = groups.sampling_weights
    assert len(weights) == 15
    totals = [
        weights[(train.label == y) & (train.bias == a)].sum().item()
        for y in range(3)
        for a in range(3)
        if ((train.label == y) & (train.bias == a)).any()
    ]
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-5)


# Augmented images in training


def test_runs_resume_to_the_bit(tiny):
    benchmark = augmented(few_shots(tiny, 8, seed=0), CUTS)
    training = Training(epochs=2, batch_size=8, optimiser="adam", lr=0.01)
    whole, file = method_on(benchmark, "output-distillation"), io.BytesIO()
    for step in fit(whole, benchmark, training, seed=3):
        if step.step == 4:
            torch.save(step.snapshot(), file)
    file.seek(0)
    torch.rand(11)
    resumed = method_on(benchmark, "output-distillation")
    for _ in fit(resumed, benchmark, training, seed=3, resume=torch.load(file, weights_only=True)):
        pass
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_epochs_and_processes_draw_anew(tiny):
    split = augmented(tiny, CUTS).split("train")
    item = (torch.tensor([5, 5]), 17)
    ranks = [_ByBatch(split, rank, 2)[item].view[0] for rank in (0, 1)]
    assert not torch.equal(*ranks)
    assert torch.equal(_ByBatch(split, 0, 1)[item].view, _ByBatch(split, 0, 1)[item].view)
    assert not torch.equal(_ByBatch(split, 0, 1)[item].view, _ByBatch(split, 0, 1)[(item[0], 18)].view)


def test_validation_and_tests_are_never_augmented(tiny):
    benchmark = augmented(tiny, CUTS)
    for name in set(benchmark.split_names()) - {"train"}:
        batch = benchmark.split(name).batch(torch.arange(4), seeded())
        assert batch.view is None and torch.equal(batch.images, tiny.split(name).batch(torch.arange(4)).images)


def test_training_sees_augmented_batches_and_where_they_come_from(tiny):
    benchmark, seen = augmented(few_shots(tiny, 8, seed=0), CUTS), []
    method = method_on(benchmark, "erm")
    loss = method.loss
    method.loss = lambda batch: seen.append(batch) or loss(batch)
    for _ in fit(method, benchmark, Training(epochs=1, batch_size=8)):
        pass
    assert len(seen) == 3
    for batch in seen:
        assert batch.view.shape == (8, 2, 3)
        assert torch.equal(batch.label, tiny.split("train").label[batch.origin])
    assert sorted(torch.cat([batch.index for batch in seen]).tolist()) == list(range(24))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_bears_images_whose_object_was_cut_away(name, build, tiny):
    batch = augmented(tiny, CUTS).split("train").batch(torch.arange(16), seeded())
    mask = batch.mask.clone()
    mask[:4] = 0
    terms = build(name).train()(dataclasses.replace(batch, mask=mask))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())


# Unrelated images


def test_images_take_the_shape_of_the_data_that_is_judged():
    colour, grey = torch.rand(2, 3, 10, 14), torch.rand(2, 1, 10, 14)
    assert torch.equal(reshaped(colour, InputSpec(3, 10, 14)), colour)
    assert torch.equal(reshaped(grey, InputSpec(3, 10, 14)), grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(
        reshaped(colour, InputSpec(1, 10, 14))[:, 0], (colour[:, 0] + colour[:, 1] + colour[:, 2]) / 3
    )
    torch.testing.assert_close(
        reshaped(grey, InputSpec(1, 5, 7)), F.interpolate(grey, (5, 7), mode="bilinear", antialias=True)
    )
    with pytest.raises(UserError, match="cannot make 4 channels out of 3"):
        reshaped(colour, InputSpec(4, 10, 14))


def test_transfer_takes_images_alone_from_elsewhere_and_tests_from_here():
    here, there = PlainDigits(limit=200, valid=40, test=40), MNISTBackground(limit=300, valid=50, test=40)
    both = transferred(here, there)
    assert both.split_names() == ("train", "valid", "iid") and both.gives == frozenset()
    for name in ("train", "valid"):
        split = both.split(name)
        batch = split.batch(torch.arange(5), seeded(1))
        theirs = there.split(name).batch(torch.arange(5), seeded(1)).images.mean(1, keepdim=True)
        assert len(split) == len(there.split(name)) and torch.equal(batch.images, theirs)
        assert batch.label.tolist() == [UNKNOWN] * 5 == split.label[:5].tolist()
        assert batch.bias is batch.mask is batch.clean is batch.boxes is split.bias is None
    assert both.split("iid") is here.split("iid")
    assert both.record()["transfer"]["name"] == "mnist-background" and both.record()["splits"]["train"]["size"] == 210
    assert both.record()["splits"]["iid"] == here.record()["splits"]["iid"]


def test_validation_images_of_the_data_that_is_judged_are_out_of_reach():
    here = MNISTBackground(limit=200, valid=40, test=40)
    both = transferred(here, PlainDigits(limit=200, valid=40, test=40))
    assert both.split_names() == ("train", "valid", "iid", "ood", "shift")
    with pytest.raises(UserError, match="valid_ood"):
        both.split("valid_ood")
    with pytest.raises(PermissionError):
        Selection("iid_val_loss", both).split("iid")


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_say_so_read_no_label(name, build, tiny):
    method = build(name)
    if method.reads_labels:
        return
    batch = tiny.split("train").batch(torch.arange(12))
    unknown = dataclasses.replace(batch, label=torch.full_like(batch.label, UNKNOWN), bias=None, mask=None)
    terms = []
    for told in (batch, unknown):
        torch.manual_seed(5)
        method.train()
        terms.append(copy.deepcopy(method)(told))
        method.eval()
        terms[-1] |= {f"valid {k}": v for k, v in copy.deepcopy(method)(told).items()}
    assert terms[0].keys() == terms[1].keys()
    for key, value in terms[0].items():
        assert torch.equal(value, terms[1][key])


def test_several_distillers_read_no_label(build):
    without = {name for name in METHODS if not build(name).reads_labels}
    assert {"output-distillation", "explanation-distillation", "kd", "e2kd"} <= without
    assert not without & {"erm", "mixup", "group-dro", "jtt", "rrr"}


def test_distilling_on_other_images_end_to_end(tmp_path):
    folder = run(config(**DISTILLER, transfer=COLOURED), tmp_path / "run")
    results = json.loads(folder.results.read_text())
    rows = {(row["model"], row["split"], row["metric"]): row["value"] for row in results["rows"]}
    assert ("student", "iid", "acc") in rows and ("student", "valid", "loss") in rows
    assert ("student", "valid", "acc") not in rows and ("teacher", "valid", "acc") not in rows
    assert 0 <= rows["student", "valid", "agreement"] <= 1
    assert results["cells"][0]["selection"] == "iid_val_loss"
    assert results["data"]["transfer"]["name"] == "coloured-digits"
    taught = json.loads((folder.path / "teacher" / "results.json").read_text())
    assert taught["config"]["transfer"] is None and ("transfer" not in taught["data"])


# Mixed images, and what is refused


def test_a_teacher_answers_about_the_mixed_image(tiny):
    benchmark = augmented(tiny, Augmentation(mixup=1.0))
    method = method_on(benchmark, "output-distillation")
    batch = benchmark.split("train").batch(torch.arange(8), seeded())
    assert not torch.equal(batch.images, tiny.split("train").batch(torch.arange(8)).images)
    torch.testing.assert_close(method.teacher.logits(batch), method.teacher.model(batch.images))
    for _ in fit(method, benchmark, Training(epochs=1, batch_size=8)):
        pass


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"augmentation": {"mixup": 1.0}}, "'erm' reads labels with these settings, but mixed images have none"),
        ({"method": {"name": "mixup"}, "augmentation": {"mixup": 1.0}}, "'mixup' reads labels"),
        ({"method": {"name": "jtt"}, "transfer": COLOURED}, "'jtt' reads labels .* unrelated images have none"),
        ({"method": {"name": "class-resampling"}, "transfer": COLOURED}, "unrelated images have none"),
        ({"method": {"name": "kd", "label_weight": 0.5}, "transfer": COLOURED}, "'kd' reads labels"),
        ({**DISTILLER, "augmentation": {"mixup": 1.0}, "teacher_input": "noise"}, "needs masks.*, but mixed images"),
    ],
)
def test_runs_without_what_they_need_are_refused_with_a_reason_for_tables(changes, match):
    teacher = {"teacher": DISTILLER["teacher"]} if changes.get("method", {}).get("name") == "kd" else {}
    with pytest.raises(NotGivenError, match=match) as caught:
        check(config(**changes, **teacher))
    assert "\n" not in str(caught.value) and caught.value.reason


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({**DISTILLER, "transfer": COLOURED, "selection": "iid_val"}, "iid_val needs labels of validation images"),
        ({**DISTILLER, "transfer": COLOURED, "selection": "ood_val"}, "ood_val needs labels of validation images"),
        ({**DISTILLER, "transfer": COLOURED, "selection": "worst_group_val"}, "bias labels"),
        ({**DISTILLER, "transfer": COLOURED, "teacher_input": "clean"}, "clean"),
        ({**DISTILLER, "transfer": {"name": "colored-digits"}}, "did you mean 'coloured-digits'"),
        ({"shots": 0}, "shots cannot be 0"),
        ({"shots": "list.txt"}, "samples of the benchmark digits are no files"),
        ({"shots": 100}, "take at most"),
        ({"augmentation": {"crop": [0.3]}}, "augmentation.crop"),
        ({"augmentation": {"filp": 0.3}}, "did you mean 'flip'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(changes, match):
    with pytest.raises(UserError, match=match) as caught:
        check(config(**changes))
    assert "\n" not in str(caught.value)


def test_a_teacher_is_taught_with_all_data_unless_its_own_section_says_otherwise():
    asked = {"shots": 4, "augmentation": {"flip": 0.5}, "transfer": COLOURED}
    taught = teacher_config(config(**DISTILLER, **asked))
    assert taught.shots is taught.augmentation is taught.transfer is None
    own = {"method": DISTILLER["method"], "teacher": {"train": {"augmentation": {"crop": [0.4, 1]}, "shots": 9}}}
    taught = teacher_config(config(**own, **asked))
    assert taught.shots == 9 and taught.augmentation.crop == (0.4, 1) and taught.augmentation.flip == 0


def test_shots_of_unrelated_images_count_their_own_classes():
    both = make_benchmark(config(**DISTILLER, transfer=COLOURED, shots=2))
    assert len(both.split("train")) == 20 and both.split("train").label.unique().tolist() == [UNKNOWN]
    batch = both.split("train").batch(torch.arange(20))
    assert len(batch.origin.unique()) == 20


def test_a_method_for_unrelated_images_is_built_without_their_labels():
    benchmark = make_benchmark(config(**DISTILLER, transfer=COLOURED))
    teacher = Teacher.live(load_model("small-cnn", num_classes=10, channels=1, options={"widths": [4, 8]}))
    method = make_method(config(**DISTILLER, transfer=COLOURED), benchmark, teacher)
    assert method._setup.label is None and method._setup.samples == len(benchmark.split("train"))


class Several(Split):
    """Images with several labels each."""

    def __init__(self):
        self.label = torch.eye(3)[torch.arange(6) % 3]

    def batch(self, index, generator=None):
        return Batch(torch.rand(len(index), 3, 8, 8), self.label[index], index)


def test_several_labels_per_image_go_through_augmentation(tiny):
    batch = CUTS(Several().batch(torch.arange(4)), seeded())
    assert torch.equal(batch.label, Several().label[:4]) and batch.mask is None


def test_unknown_labels_keep_their_form(tiny, monkeypatch):
    mixed = Augmentation(mixup=1.0)(Several().batch(torch.arange(4)), seeded())
    assert mixed.label.tolist() == [[UNKNOWN] * 3] * 4
    here = type(tiny)()
    monkeypatch.setattr(here, "split", lambda name: Several())
    valid = transferred(here, tiny).split("valid")
    assert valid.label.shape == (24, 3) and valid.label.dtype == torch.float32
    assert f1(Predictions(torch.randn(24, 3), valid.label)) is None


def test_explanations_of_augmented_images_are_those_of_what_both_networks_see(tiny):
    benchmark = augmented(tiny, CUTS)
    method = method_on(benchmark, "explanation-distillation", explainer=LRP(epsilon=0.01), start="teacher").eval()
    batch = benchmark.split("train").batch(torch.arange(8), seeded())
    # The same network on the same image: nothing to learn, whatever the augmentation.
    assert method.loss(batch)["explanation"].item() == pytest.approx(0, abs=1e-5)
