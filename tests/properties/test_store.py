"""A stored teacher says what the live one said about the same sample, or refuses."""

import dataclasses
import io
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hansfree import freezing
from hansfree.augmentation import Augmentation, apply_view, mixed
from hansfree.benchmarks.regimes import augmented, few_shots
from hansfree.core import Classifier, Draws, Explainer, Explanation, Setup, TargetRule, Teacher
from hansfree.distances import cosine
from hansfree.errors import UserError
from hansfree.explainers import LRP, FeatureMap, GradCAM, SmoothGrad
from hansfree.freezing import Request, fixed, freeze
from hansfree.methods import METHODS
from hansfree.methods.class_choice import Top, TopOrOther
from hansfree.models import load_model
from hansfree.store import DTYPES, Marked, Store, StoredTeacher, open_store
from hansfree.store.files import check_sums, decoded, encoded, open_files
from hansfree.training import Training, fit


@dataclass(frozen=True)
class Image(Explainer):
    """The input itself as the map, averaged over squares of ``coarse`` pixels: it shows where each pixel went."""

    coarse: int = 1

    def __call__(self, model, input, target, *, draws=None):
        logits = model(input)
        target = target(logits) if callable(target) else target
        map = F.avg_pool2d(input, self.coarse)
        return Explanation(
            logits, map if target.ndim == 1 else map.unsqueeze(1).expand(-1, target.shape[1], -1, -1, -1)
        )


@dataclass(frozen=True)
class Runner(TargetRule):
    """The second highest logit."""

    def choose(self, logits, draws: Draws):
        return logits.topk(2).indices[:, 1]


same_fixtures = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Hypothesis warns of fixtures that are shared by all examples; these stores are only read."""


@pytest.fixture
def live():
    torch.manual_seed(0)
    network = load_model("small-resnet", num_classes=3, options={"widths": [4, 6], "norm": "batch"})
    for _ in range(3):
        network.train()(torch.rand(16, 3, 12, 12))
    return Teacher.live(network)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, in shards of one or more: 48 and 24 rows have three and two."""
    monkeypatch.setattr(freezing, "CHUNK", 16)
    monkeypatch.setattr(freezing, "SHARD_BYTES", 10_000)


@pytest.fixture
def stored(live, tiny, tmp_path, small_chunks):
    """Makes a store and opens it: ``stored(GradCAM(), dtype="int8")``."""

    def make(*explainers, **request) -> StoredTeacher:
        freeze(live, tiny, Request(explainers, **request), tmp_path / "store", batch_size=5)
        return open_store(tmp_path / "store", tiny, sees="input")

    return make


def batch_of(benchmark, name="train", rows=(7, 0, 31, 16)):
    split = benchmark.split(name)
    return split.batch(torch.tensor(rows) % len(split))


# Numbers


@settings(max_examples=50)
@given(st.integers(0, 2**31 - 1), st.floats(-30, 30), st.sampled_from(DTYPES))
def test_what_is_kept_of_a_map_is_the_map_up_to_its_precision(seed, exponent, dtype):
    maps = 10.0**exponent * torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(seed))
    maps[0, 0] = 0
    kept, scale = encoded(maps, dtype)
    assert kept.dtype == dtype and (scale is None) == (dtype == "float32")
    error = (decoded(kept, scale) - maps).abs().amax((-3, -2, -1)) / maps.abs().amax((-3, -2, -1)).clamp(min=1e-37)
    assert (error <= {"float32": 0, "float16": 2**-11, "int8": 0.5 / 127}[dtype] * (1 + 1e-5)).all()


# The same answers


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_the_live_ones_in_any_order_and_split(dtype, stored, live, tiny):
    explainers = {GradCAM(): Top(), LRP(epsilon=0.01): Runner(), LRP(epsilon=0.001): Top()}
    teacher = stored(GradCAM(), LRP(), epsilons=(0.001, 0.01), classes=2, dtype=dtype)
    precise = {"float32": 1e-5, "float16": 1e-3, "int8": 1 / 127}[dtype]
    for name in ("train", "valid"):
        batch = batch_of(Marked(tiny), name)
        torch.testing.assert_close(teacher.logits(batch), live.logits(batch), rtol=precise, atol=precise)
        for explainer, rule in explainers.items():
            ours, theirs = (one.answer(batch, explainer, rule, {}) for one in (teacher, live))
            assert torch.equal(ours.target, theirs.target) and torch.equal(ours.logits, teacher.logits(batch))
            biggest = theirs.map.abs().amax((1, 2, 3), keepdim=True)
            assert ((ours.map - theirs.map).abs() <= precise * biggest + 1e-6).all()


def test_train_and_valid_of_the_same_index_have_their_own_answers(stored, tiny):
    teacher = stored(Image(), dtype="float32")
    for name in ("train", "valid"):
        batch = batch_of(Marked(tiny), name, (0, 1))
        assert torch.equal(teacher.answer(batch, Image(), Top(), {}).map, batch.images)
    with pytest.raises(UserError, match="cannot tell which split"):
        teacher.logits(batch_of(tiny))


def test_rows_can_be_read_with_numpy_alone(stored, live, tiny):
    teacher = stored(Image(coarse=3), dtype="float32", classes=3)
    stride = teacher.store.about["shard_rows"]
    assert stride < 48, "several shards"
    (path,) = teacher.store.path.glob(f"train/*Image-map-{31 // stride:05d}.npy")
    shard = np.load(path, mmap_mode="r")
    pooled = F.avg_pool2d(batch_of(tiny, rows=(31,)).images, 3)[0]
    assert shard.shape[1:] == (1, 3, 3, 4, 4)
    assert all(np.array_equal(shard[31 % stride, 0, slot], pooled.numpy()) for slot in range(3))


def test_a_tie_that_rounding_makes_has_a_stored_class(live, tiny, tmp_path):
    near = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 3))
    torch.nn.init.zeros_(near[1].weight)
    near[1].bias.data = torch.tensor([1.0001, 1.0002, 0.0])  # equal in float16
    freeze(Teacher.live(near), tiny, Request((Image(),)), tmp_path / "store")
    teacher = open_store(tmp_path / "store", tiny, sees="input")
    assert teacher.answer(batch_of(Marked(tiny)), Image(), Top(), {}).target.tolist() == [0, 0, 0, 0]


def test_of_top_logits_the_others_share_the_rest_equally(stored, live, tiny):
    batch = batch_of(Marked(tiny))
    full = live.logits(batch).softmax(1)
    share = stored(top_logits=1, dtype="float32").logits(batch).softmax(1)
    for row, other in zip(full.tolist(), share.tolist()):
        top = max(row)
        assert sorted(other) == pytest.approx([(1 - top) / 2, (1 - top) / 2, top], rel=1e-5)


def test_few_shots_find_their_rows_in_a_store_of_all(stored, tiny):
    teacher, part = stored(Image(), dtype="float32"), Marked(few_shots(tiny, 3, seed=1))
    batch = batch_of(part, rows=range(9))
    assert batch.origin is not None and not torch.equal(batch.origin, batch.index)
    assert torch.equal(teacher.answer(batch, Image(), Top(), {}).map, batch.images)


# Replay


@pytest.fixture
def images(tiny, tmp_path):
    """A store of the images themselves, fine and coarse."""
    network = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 3)), {})
    freeze(Teacher.live(network), tiny, Request((Image(), Image(coarse=3)), dtype="float32"), tmp_path / "images")
    return open_store(tmp_path / "images", tiny, sees="input")


@same_fixtures
@given(
    seed=st.integers(0, 2**31 - 1),
    change=st.sampled_from(
        [{"flip": 1}, {"crop": (0.3, 0.9), "flip": 0.5}, {"rotation": 40}, {"size": 7}, {"size": 24}]
    ),
)
def test_the_image_as_a_map_goes_where_the_image_goes(images, tiny, seed, change):
    teacher = images
    split = Marked(augmented(tiny, Augmentation(**change))).split("train")
    batch = split.batch(torch.tensor([3, 40, 11]), torch.Generator().manual_seed(seed))
    fine = teacher.answer(batch, Image(), Top(), {}).map
    torch.testing.assert_close(fine, batch.images, rtol=0, atol=2e-6)
    still = batch_of(tiny, rows=(3, 40, 11)).images
    coarse = teacher.answer(batch, Image(coarse=3), Top(), {}).map
    side = {7: 2, 24: 8}.get(change.get("size"), 4)  # 4 of 12 pixels; in proportion where the size changes
    assert torch.equal(coarse, apply_view(F.avg_pool2d(still, 3), batch.view, (side, side)))


def test_photometric_changes_leave_answers_alone(stored, tiny):
    teacher = stored(GradCAM())
    change = Augmentation(brightness=0.5, contrast=0.5)
    batch = Marked(augmented(tiny, change)).split("train").batch(torch.arange(6), torch.Generator().manual_seed(0))
    still = Marked(tiny).split("train").batch(torch.arange(6))
    assert not torch.equal(batch.images, still.images)
    assert torch.equal(*(teacher.answer(b, GradCAM(), Top(), {}).map for b in (batch, still)))


def test_mixed_images_and_unexplained_sizes_are_refused(stored, tiny):
    teacher, batch = stored(GradCAM()), batch_of(Marked(tiny))
    with pytest.raises(UserError, match=r"mixed images; set augmentation.mixup: 0"):
        teacher.logits(mixed(batch, 1.0, torch.Generator().manual_seed(0)))
    with pytest.raises(UserError, match="12 x 12 pixels, but these are 6 x 6"):
        teacher.answer(dataclasses.replace(batch, input=batch.images[..., ::2, ::2]), GradCAM(), Top(), {})


# Epsilons


@pytest.fixture
def lrp_store(live, tiny, tmp_path):
    freeze(live, tiny, Request((LRP(),), (0.001, 0.004, 0.01, 0.3)), tmp_path / "lrp")
    return open_store(tmp_path / "lrp", tiny, sees="input")


@same_fixtures
@given(epsilons=st.lists(st.floats(1e-3, 1e-2), min_size=1, max_size=20))
def test_draws_move_to_the_nearest_stored_epsilon_within_the_range(lrp_store, epsilons):
    drawn = {"epsilon": torch.tensor(epsilons), "coin": torch.zeros(len(epsilons))}
    moved = lrp_store.answerable(LRP(epsilon=(0.001, 0.01)), drawn)
    for before, after in zip(drawn["epsilon"].tolist(), moved["epsilon"].tolist()):
        apart = [abs(math.log(one) - math.log(before)) for one in (after, 0.001, 0.004, 0.01)]
        assert apart[0] == pytest.approx(min(apart[1:]), abs=1e-5)
    assert set(moved["epsilon"].tolist()) <= set(torch.tensor([0.001, 0.004, 0.01]).tolist())
    assert torch.equal(moved["coin"], drawn["coin"])
    assert set(lrp_store.answerable(LRP(epsilon=(0.002, 0.009)), drawn)["epsilon"].tolist()) == set(
        torch.tensor([0.004]).tolist()
    )


@pytest.mark.parametrize("training", [True, False])
def test_teacher_and_student_use_the_stored_epsilons(training, stored, live, tiny, monkeypatch):
    teacher = stored(LRP(), epsilons=(0.001, 0.01), classes=3, dtype="float32")
    setup = Setup(lambda: live.model, teacher, 48, 3, tiny.input)
    method = METHODS["explanation-distillation"](setup, explainer=LRP((0.001, 0.01)), last_layer="free")
    method.train(training)
    seen, ask = [], LRP.__call__
    monkeypatch.setattr(
        LRP, "__call__", lambda self, *a, draws=None: (seen.append(draws), ask(self, *a, draws=draws))[1]
    )
    method.student.eval()  # the teacher itself, so that equal epsilons are the only way to a loss of 0
    for parameter in live.model.parameters():
        parameter.requires_grad_(True)
    terms = method.loss(batch_of(Marked(tiny), rows=range(24)))
    assert set(seen[-1]["epsilon"].tolist()) == set(torch.tensor([0.001, 0.01]).tolist())
    assert terms["explanation"].item() < 1e-5


def test_epsilons_that_were_not_stored_are_refused(lrp_store, tiny):
    batch = batch_of(Marked(tiny))
    with pytest.raises(UserError, match=r"epsilon 0.001, 0.004, 0.01, 0.3 and not for 0.1; .* --epsilon"):
        lrp_store.answer(batch, LRP(epsilon=0.1), Top(), {})
    with pytest.raises(UserError, match="another was drawn"):
        lrp_store.answer(batch, LRP(epsilon=(0.001, 0.01)), Top(), {"epsilon": torch.full((4,), 0.002)})
    with pytest.raises(UserError, match="nothing says which one"):
        lrp_store.answer(batch, LRP(epsilon=(0.001, 0.01)), Top(), {})


# Methods


@pytest.mark.parametrize("name", ["output-distillation", "kd", "e2kd", "grad-cam-distillation"])
def test_a_method_trains_on_it_and_resumes_to_the_bit(name, stored, live, tiny):
    def method(seed):
        torch.manual_seed(seed)
        explains = {"explainer": GradCAM()} if name == "e2kd" else {}
        setup = Setup(
            lambda: load_model("small-cnn", num_classes=3, options={"widths": [4, 6]}), teacher, 48, 3, tiny.input
        )
        return METHODS[name](setup, **explains)

    teacher = stored(GradCAM(), classes=3)
    data, training = Marked(augmented(tiny, Augmentation(flip=0.5, crop=(0.5, 1)))), Training(epochs=2, batch_size=16)
    whole, saved = method(0), io.BytesIO()
    for step in fit(whole, data, training, seed=3):
        if step.step == 2:
            torch.save(step.snapshot(), saved)
    saved.seek(0)
    resumed = method(9)
    assert sum(1 for _ in fit(resumed, data, training, seed=3, resume=torch.load(saved, weights_only=True))) == 4
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_without_augmentation_the_loss_is_the_live_one(stored, live, tiny):
    batch, losses = batch_of(Marked(tiny), rows=range(20)), []
    for teacher in (stored(GradCAM(), dtype="float32"), live):
        torch.manual_seed(0)
        student = load_model("small-cnn", num_classes=3, options={"widths": [4, 6]})
        setup = Setup(lambda student=student: student, teacher, 48, 3, tiny.input)
        method = METHODS["e2kd"](setup, explainer=GradCAM()).eval()
        losses.append(torch.stack(list(method.loss(batch).values())))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_the_last_layer_is_kept_and_the_network_is_not(stored, live, tiny):
    teacher = stored(GradCAM(), classes=3)
    setup = Setup(
        lambda: load_model("small-cnn", num_classes=3, options={"widths": [4, 5]}), teacher, 48, 3, tiny.input
    )
    method = METHODS["grad-cam-distillation"](setup, last_layer="copied")
    ours, theirs = method.student.get_classifier(), live.model.get_classifier()
    assert torch.equal(ours.weight, theirs.weight) and not ours.weight.requires_grad
    for refused in (
        lambda: METHODS["output-distillation"](setup, start="teacher"),
        lambda: METHODS["at"](setup),
        lambda: teacher.view(batch_of(tiny)),
    ):
        with pytest.raises(
            UserError, match=r"holds the teacher's answers and not its network.*in place of teacher.store"
        ):
            refused()


def test_features_are_an_explainer_like_any_other(stored, live, tiny):
    build = lambda teacher: METHODS["feature-distillation"](  # noqa: E731
        Setup(lambda: live.model, teacher, 48, 3, tiny.input), last_layer="free"
    )
    with pytest.raises(UserError, match="holds no maps of features, only of: grad-cam; make it with this --explainer"):
        build(stored(GradCAM())).loss(batch_of(Marked(tiny)))


def test_with_stored_features_feature_distillation_works(stored, live, tiny):
    setup = Setup(lambda: live.model, stored(FeatureMap(), dtype="float32"), 48, 3, tiny.input)
    method = METHODS["feature-distillation"](setup, last_layer="free").eval()
    assert sum(method.loss(batch_of(Marked(tiny))).values()).item() < 1e-6


# Refusals


def test_other_classes_splits_settings_rows_and_labels_are_refused(stored, tiny):
    teacher, batch = stored(GradCAM(), classes=2), batch_of(Marked(tiny), rows=range(40))
    draws = {"coin": torch.ones(40), "other": torch.linspace(0, 0.999, 40)}
    for asked, message in (
        (lambda: teacher.answer(batch, GradCAM(), TopOrOther(), draws), "maps of the top 2 classes.*--classes all"),
        (lambda: teacher.answer(batch, GradCAM(relu=False), Top(), {}), "`relu` is True there and False here"),
        (lambda: teacher.answer(batch, LRP(), Top(), {}), "no maps of lrp, only of: grad-cam"),
        (lambda: teacher.logits(batch_of(Marked(tiny), "iid")), "not about iid; make it with --split iid"),
        (lambda: teacher.logits(dataclasses.replace(batch, index=batch.index + 10)), "has 48 rows.*asks for row 49"),
        (lambda: teacher.logits(dataclasses.replace(batch, index=batch.index - 1)), "asks for row -1"),
        (lambda: teacher.logits(dataclasses.replace(batch, label=batch.label.roll(1))), "other labels"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            asked()
        assert str(teacher.store.path) in str(refused.value) and str(refused.value).count(". ") == 0


def test_every_class_is_there_for_a_rule_that_draws_it(stored, live, tiny):
    teacher, batch = stored(GradCAM(), classes=None, dtype="float32"), batch_of(Marked(tiny), rows=range(40))
    draws = {"coin": torch.linspace(0, 1, 40), "other": torch.arange(40) % 2 * 0.9}
    ours, theirs = (one.answer(batch, GradCAM(), TopOrOther(), draws) for one in (teacher, live))
    assert torch.equal(ours.target, theirs.target) and len(ours.target.unique()) == 3
    torch.testing.assert_close(ours.map, theirs.map, rtol=1e-4, atol=1e-5)


def changed(tiny, **changes):
    """The benchmark with one split or record changed: ``changed(tiny, train=lambda split: ...)``."""
    other = type(tiny)()
    plain = other.split

    def split(name):
        found = plain(name)
        if name in changes:
            changes[name](found)
        return found

    other.split = split
    other.record = lambda: changes.get("record", {})
    return other


def swap_images(split):
    split.images[[0, 3]] = split.images[[3, 0]]  # of one class, so that the labels stay


def swap_labels(split):
    split.label = split.label.roll(1)


def swap_biases(split):
    split.bias = split.bias.flip(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": swap_images}, "train, was made for other data or another order: sample 0"),
        ({"valid": swap_images}, "valid, was made for other data or another order: sample 0"),
        ({"train": swap_labels}, "other data or another order .train: `labels_sha256`"),
        ({"valid": swap_biases}, "other data or another order .valid: `biases_sha256`"),
        ({"record": {"splits": {"train": {"sha256": "0"}}}}, "other data .`splits`"),
    ],
)
def test_other_data_and_another_order_are_refused(changes, message, stored, tiny):
    folder = stored(GradCAM()).store.path
    with pytest.raises(UserError, match=message):
        open_store(folder, changed(tiny, **changes), sees="input")


def test_data_may_lie_elsewhere(live, tiny, tmp_path):
    here, there = (changed(tiny, record={"options": {"root": root, "limit": 3}}) for root in ("/a", "/b"))
    freeze(live, here, Request(), tmp_path / "store")
    assert open_store(tmp_path / "store", there, sees="input").store.rows("train") == 48


def test_another_teacher_or_view_is_refused(stored, live, tiny):
    folder = stored(GradCAM()).store.path
    open_store(folder, tiny, sees="input", model=live.model)
    with pytest.raises(UserError, match="saw teacher_input: input, but the run says clean"):
        open_store(folder, tiny, sees="clean")
    live.model.std = torch.tensor([0.5])
    with pytest.raises(UserError, match="made for another teacher"):
        open_store(folder, tiny, sees="input", model=live.model)
    live.model.std = None
    live.model.get_classifier().bias.data[0] += 1e-6
    with pytest.raises(UserError, match="made for another teacher"):
        open_store(folder, tiny, sees="input", model=live.model)


def test_what_chance_decides_cannot_be_stored():
    with pytest.raises(UserError, match=r"epsilon from 0.001 to 0.01 .* --epsilon 0.001 --epsilon 0.01"):
        fixed(LRP(), ())
    with pytest.raises(UserError, match=r"smoothgrad draws .* cannot be replayed"):
        fixed(SmoothGrad(explainer=GradCAM()), ())
    assert fixed(LRP(), (0.1, 0.2)) == [LRP(epsilon=0.1), LRP(epsilon=0.2)]
    assert fixed(GradCAM(), (0.1, 0.2)) == [GradCAM()]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(top_logits=3), "--top-k-logits 3 must be at least 1 and below the 3 classes"),
        (Request(classes=4), "--classes top-4 asks for more than the 3 classes"),
        (Request(tests=("odd",)), "no split 'odd'"),
    ],
)
def test_impossible_requests_are_refused(request_, message, live, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        freeze(live, tiny, request_, tmp_path / "store")


# Files


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("when", "chunk"), [("before", 1), ("amid", 2), ("after", 3), ("amid", 4), ("after", 5)])
def test_a_store_that_was_stopped_anywhere_goes_on_to_the_same_bytes(
    when, chunk, live, tiny, tmp_path, small_chunks, monkeypatch
):
    request, folder = Request((GradCAM(),)), tmp_path / "stopped"
    freeze(live, tiny, request, tmp_path / "whole")
    calls, write = [], freezing.write

    def interrupted(store, split, rows, values):
        calls.append((split, rows.start))
        if len(calls) != chunk:
            return write(store, split, rows, values)
        if when == "amid":  # half of the chunk's arrays reach the disk, damaged
            shard, start = divmod(rows.start, store.about["shard_rows"])
            store.shard(split, next(iter(values)), shard, "r+")[start : start + len(rows)] = 99
        if when == "after":
            write(store, split, rows, values)
        raise KeyboardInterrupt

    monkeypatch.setattr(freezing, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        freeze(live, tiny, request, folder)
    with pytest.raises(UserError, match=r"is not finished; go on with the `hansfree store make`"):
        open_files(folder)
    before = len(calls) - (when != "after")
    calls.clear()
    monkeypatch.setattr(freezing, "write", lambda *a: (calls.append(a[1:3]), write(*a)))
    freeze(live, tiny, request, folder)
    assert len(calls) == 5 - before
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_a_finished_store_is_made_no_second_time(stored, live, tiny, monkeypatch):
    folder = stored(GradCAM()).store.path
    monkeypatch.setattr(freezing, "answer_chunk", lambda *a: pytest.fail("asked again"))
    freeze(live, tiny, Request((GradCAM(),)), folder)
    with pytest.raises(UserError, match=r"holds another store .`dtype` is 'float16' there and 'int8' here"):
        freeze(live, tiny, Request((GradCAM(),), dtype="int8"), folder)


def test_a_folder_with_other_files_is_left_alone(live, tiny, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files and no store"):
        freeze(live, tiny, Request(), tmp_path)
    with pytest.raises(UserError, match="holds no store"):
        open_files(tmp_path)


@pytest.mark.parametrize("large", [False, True])
def test_a_damaged_file_is_named(large, stored, tiny, monkeypatch):
    folder = stored(GradCAM()).store.path
    if large:  # then only sizes are compared when it is opened, and what is inside by the command
        monkeypatch.setattr("hansfree.store.files.HASHED_WHEN_OPENED", 0)
    for name in json.loads((folder / "meta.json").read_text())["files"]:
        path, whole = folder / name, (folder / name).read_bytes()
        for damaged, message in (
            (None, "missing"),
            (whole[:-1], "truncated: it has .* of its"),
            (whole + b"0", "altered: it has"),
            (whole[:-1] + bytes([whole[-1] ^ 1]), "altered: its SHA-256"),
        ):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path} (is|was) {message}"):
                check_sums(open_files(folder))
            if large and damaged is not None and len(damaged) == len(whole):
                assert isinstance(open_files(folder), Store)
            path.write_bytes(whole)
    check_sums(open_files(folder))


def test_a_flip_that_is_forgotten_would_show(stored, tiny):
    # Cosines of coarse maps hardly notice, which is why the tests above compare pixels.
    teacher = stored(Image(coarse=4), dtype="float32")
    batch = Marked(augmented(tiny, Augmentation(flip=1))).split("train").batch(torch.arange(9), torch.Generator())
    forgotten = teacher.answer(dataclasses.replace(batch, view=None), Image(coarse=4), Top(), {}).map
    right = teacher.answer(batch, Image(coarse=4), Top(), {}).map
    assert cosine(forgotten, right).mean() < 0.25 and torch.equal(right, forgotten.flip(-1))


def test_a_store_that_outgrows_memory_is_read_the_same(stored, tiny, monkeypatch):
    monkeypatch.setattr("hansfree.store.files._memory", lambda: 1)
    asked = []
    monkeypatch.setattr("hansfree.store.files._read_no_more_than_asked", asked.append)
    teacher = stored(Image(), dtype="float32")
    batch = batch_of(Marked(tiny))
    assert torch.equal(teacher.answer(batch, Image(), Top(), {}).map, batch.images) and asked
