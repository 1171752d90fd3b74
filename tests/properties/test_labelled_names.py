"""BFFHQ and BAR in the layouts of DFA, DCWP and LfF: which images fall where, both tests, bad names."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hansfree.benchmarks.labelled_names import ACTIONS, BAR, BFFHQ
from hansfree.errors import UserError

ALIGNED, CONFLICTING = [(0, 0), (1, 1)], [(0, 1), (1, 0)]


def groups(split):
    return Counter(zip(split.label.tolist(), split.bias.tolist()))


@pytest.fixture
def copied(labelled_names, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(labelled_names, tmp_path / "copy")
    return tmp_path / "copy"


def test_faces_fall_where_their_names_say(labelled_names):
    benchmark = BFFHQ(root=labelled_names, size=24)
    assert {name: groups(benchmark.split(name)) for name in benchmark.split_names()} == {
        "train": {**dict.fromkeys(ALIGNED, 6), **dict.fromkeys(CONFLICTING, 1)},
        "valid": dict.fromkeys(ALIGNED, 4),
        "valid_ood": dict.fromkeys([*ALIGNED, *CONFLICTING], 4),
        "iid": dict.fromkeys(ALIGNED, 4),
        "ood": dict.fromkeys([*ALIGNED, *CONFLICTING], 4),
        "shift": dict.fromkeys(CONFLICTING, 4),
    }
    train = benchmark.record()["splits"]["train"]
    assert (train["aligned"], train["conflicting"]) == (12, 2)


def test_both_published_tests_of_faces_have_a_name(labelled_names):
    everything, conflicting = (BFFHQ(root=labelled_names / "bffhq", tested=name) for name in ("all", "conflicting"))
    assert len(everything.split("ood")) == 16 and len(conflicting.split("ood")) == 8
    assert conflicting.split("ood").rows == conflicting.split("shift").rows == everything.split("shift").rows
    assert conflicting.split("iid").rows == everything.split("iid").rows


def test_an_image_is_the_file_s(labelled_names):
    split = BFFHQ(root=labelled_names, size=24).split("ood")
    expected = np.asarray(Image.open(split.files[4]).resize((24, 24), Image.Resampling.BILINEAR)) / 255
    assert np.abs(split.batch(torch.tensor([4])).input[0].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_faces_may_lie_in_train_and_in_folders_of_classes(copied):
    expected = BFFHQ(root=copied, size=24)
    (copied / "bffhq/0.5pct").rename(copied / "bffhq/train")
    for path in list((copied / "bffhq/test").iterdir()):
        folder = copied / "bffhq/test" / path.stem.split("_")[1]
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    again = BFFHQ(root=copied, size=24)
    for name in expected.split_names():
        assert groups(again.split(name)) == groups(expected.split(name))


def test_actions_with_conflicting_ones(labelled_names):
    benchmark = BAR(root=labelled_names, conflicting="1pct", size=24)
    train = benchmark.split("train")
    assert len(train) == 24 and int((train.label != train.bias).sum()) == 6
    sizes = {name: len(benchmark.split(name)) for name in ("valid", "valid_ood", "iid", "ood", "shift")}
    assert sizes == {"valid": 12, "valid_ood": 24, "iid": 12, "ood": 24, "shift": 12}
    assert benchmark.biases[train.bias[train.label == 1][0]] == "underwater"


@pytest.fixture
def own_bar(tmp_path):
    """BAR's own archive: four training and two test images of each action."""
    for part, numbers in (("train", range(4)), ("test", range(4, 6))):
        (tmp_path / "BAR" / part).mkdir(parents=True)
        for action in ACTIONS:
            for number in numbers:
                Image.new("RGB", (9, 7), (number, 2, 3)).save(tmp_path / "BAR" / part / f"{action}_{number}.jpg")
    (tmp_path / "BAR/metadata.json").write_text("{}")
    return tmp_path


def test_bar_s_own_archive_tells_no_bias(own_bar):
    benchmark = BAR(root=own_bar, valid=1, size=24)
    sizes = {name: len(benchmark.split(name)) for name in benchmark.split_names()}
    assert sizes == {"train": 18, "valid": 6, "ood": 12}
    assert benchmark.gives == frozenset() and benchmark.split("train").batch(torch.arange(3)).bias is None
    vaulting = benchmark.split("ood").files[6]
    assert (
        vaulting.name == "pole vaulting_4.jpg" and benchmark.classes[benchmark.split("ood").label[6]] == "pole vaulting"
    )
    held_out = {path.name for path in benchmark.split("valid").files}
    assert not held_out & {path.name for path in benchmark.split("train").files}
    assert BAR(root=own_bar, valid=1, split_seed=1).split("valid").files != benchmark.split("valid").files
    assert BAR(root=own_bar / "BAR", valid=1, size=24).record()["splits"] == benchmark.record()["splits"]


def test_a_test_of_conflicting_images_alone_has_no_iid(copied):
    for path in (copied / "bar/test").rglob("*.jpg"):
        label, bias = path.stem.split("_")[1:]
        if label == bias:
            path.unlink()
    benchmark = BAR(root=copied, conflicting="1pct", size=24)
    assert "iid" not in benchmark.split_names()
    assert benchmark.split("ood").rows == benchmark.split("shift").rows


def emptied(root):
    shutil.rmtree(root / "bffhq/0.5pct/conflict")


BAD = {
    "set benchmark.root to the unpacked folder bffhq": lambda root: shutil.rmtree(root / "bffhq/0.5pct"),
    "conflict holds no images": emptied,
    "8_2_0.png does not end with a class below 2": lambda root: (root / "bffhq/test/0_0_0.png").rename(
        root / "bffhq/test/8_2_0.png"
    ),
    "portrait.png does not end with a class": lambda root: (root / "bffhq/valid/0_0_0.png").rename(
        root / "bffhq/valid/portrait.png"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_with_a_folder_is_told(copied, message):
    BAD[message](copied)
    with pytest.raises(UserError, match=message):
        BFFHQ(root=copied)


def test_wrong_settings_are_told(labelled_names, own_bar):
    with pytest.raises(UserError, match="did you mean 'conflicting'"):
        BFFHQ(root=labelled_names, tested="conflictng")
    with pytest.raises(UserError, match="give a number of pixels"):
        BFFHQ(root=labelled_names, size=0)
    with pytest.raises(UserError, match="2pct holds no images"):
        BAR(root=labelled_names, conflicting="2pct")
    with pytest.raises(UserError, match=r"benchmark.valid: 4 asks for more .* take at most 3"):
        BAR(root=own_bar, valid=4)
    (own_bar / "BAR/train/dancing_0.jpg").write_bytes((own_bar / "BAR/train/diving_0.jpg").read_bytes())
    with pytest.raises(UserError, match=r"dancing_0\.jpg begins with no action of BAR"):
        BAR(root=own_bar)
