"""Corrupted images: which image has which corruption, over each source, and CIFAR-10's files, whole and spoilt."""

import pickle
import struct

import numpy as np
import pytest
import torch

from hansfree.benchmarks import corrupted_images
from hansfree.benchmarks.cifar import BATCHES, read_cifar10
from hansfree.benchmarks.corrupted_images import KINDS, CorruptedImages, spread
from hansfree.benchmarks.corruptions import CORRUPTIONS, SETS, corrupt
from hansfree.core import TEST_SPLITS
from hansfree.errors import UserError


class AsPython2(pickle._Pickler):
    """Writes bytes as the strings of Python 2, in which CIFAR-10 is pickled."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, obj):
        self.write(b"T" + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_string


def pickled(told, path):
    with path.open("wb") as file:
        AsPython2(file, protocol=2).dump(told)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture
def cifar(tmp_path):
    """Both versions of one small CIFAR-10: 20 images in each of six batches, in folders of their archives' names."""
    draw = np.random.default_rng(0)
    binary, python = (tmp_path / f"{name}/cifar-10-batches-{name}" for name in ("bin", "py"))
    binary.mkdir(parents=True)
    python.mkdir(parents=True)
    for batch in BATCHES:
        pixels = draw.integers(0, 256, (20, 3072), dtype=np.uint8)
        label = np.arange(20, dtype=np.uint8) % 10
        (binary / f"{batch}.bin").write_bytes(np.c_[label, pixels].tobytes())
        pickled({b"batch_label": b"some", b"labels": label.tolist(), b"data": pixels}, python / batch)
    return tmp_path


def test_both_versions_of_cifar_are_the_same(cifar):
    binary, python = (read_cifar10(cifar / name) for name in ("bin", "py"))
    assert torch.equal(binary.pixels, python.pixels) and torch.equal(binary.label, python.label)
    assert binary.pixels.shape == (120, 3, 32, 32) and binary.own_test == 20
    record = (cifar / "bin/cifar-10-batches-bin/test_batch.bin").read_bytes()[3073 : 2 * 3073]
    image = np.frombuffer(record[1:], np.uint8).reshape(3, 32, 32)
    assert np.array_equal(binary.pixels[101].numpy(), image) and binary.label[101] == record[0]
    assert torch.equal(read_cifar10(cifar / "py/cifar-10-batches-py").pixels, python.pixels)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_would_run_something_is_refused(cifar, capsys):
    path = cifar / "py/cifar-10-batches-py/data_batch_3"
    pickled({b"data": Evil()}, path)
    with pytest.raises(UserError, match=r"data_batch_3 is no batch of CIFAR-10 .*it asks for __builtin__.print"):
        read_cifar10(cifar / "py")
    assert capsys.readouterr().out == ""


def cut(folder):
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])


def relabelled(folder):
    path = folder / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])


SPOILT = {
    "data_batch_2.bin is cut short or damaged": cut,
    "test_batch.bin does not hold images": relabelled,
    "data_batch_5.bin cannot be read": lambda folder: (folder / "data_batch_5.bin").unlink(),
    "holds no CIFAR-10; set benchmark.root": lambda folder: (folder / "data_batch_1.bin").unlink(),
}


@pytest.mark.parametrize("message", SPOILT)
def test_spoilt_files_are_told(cifar, message):
    SPOILT[message](cifar / "bin/cifar-10-batches-bin")
    with pytest.raises(UserError, match=message):
        read_cifar10(cifar / "bin")


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({b"labels": [0]})])
def test_no_pickle_of_a_batch_is_told(cifar, content):
    (cifar / "py/cifar-10-batches-py/test_batch").write_bytes(content)
    with pytest.raises(UserError, match="test_batch is no batch of CIFAR-10 for Python"):
        read_cifar10(cifar / "py")


def test_cifar_s_test_batch_is_the_test(cifar):
    benchmark = CorruptedImages(source="cifar-10", root=cifar / "bin", valid=20, bias_ratio=0.9)
    sizes = {name: len(benchmark.split(name)) for name in benchmark.split_names()}
    assert sizes == {"train": 80, "valid": 20, "valid_ood": 20, "iid": 20, "ood": 20, "shift": 20}
    assert benchmark.classes[6] == "frog" and benchmark.biases == SETS["type-0"]
    clean = (255 * benchmark.split("iid").batch(torch.arange(20)).clean).round().to(torch.uint8)
    tested = read_cifar10(cifar / "bin").pixels[100:]
    assert sorted(map(bytes, clean.numpy())) == sorted(map(bytes, tested.numpy()))


@pytest.fixture(scope="module")
def digits():
    return CorruptedImages(limit=1000, valid=200, test=300, bias_ratio=0.95, corruptions="type-1")


def test_the_ratio_is_exact_and_conflicts_are_counted(digits):
    splits = digits.record()["splits"]
    assert (splits["train"]["aligned"], splits["train"]["conflicting"]) == (475, 25)
    assert (splits["valid"]["aligned"], splits["iid"]["conflicting"]) == (190, 15)
    assert (splits["shift"]["aligned"], splits["shift"]["conflicting"]) == (0, 300)
    assert (splits["ood"]["aligned"], splits["ood"]["conflicting"]) == (30, 270)


def test_tests_are_the_same_images_with_corruptions_as_told(digits):
    clean = [digits.split(name).batch(torch.arange(300)).clean for name in TEST_SPLITS]
    assert torch.equal(clean[0], clean[1]) and torch.equal(clean[0], clean[2])
    ood = digits.split("ood")
    pairs = torch.zeros(10, 10).index_put((ood.label, ood.bias), torch.ones(300), accumulate=True)
    assert (pairs.sum(1) == 30).all() and (pairs == 3).all()
    assert (digits.split("shift").bias != digits.split("shift").label).all()


def test_an_image_is_its_clean_one_corrupted_as_its_bias_says(digits):
    split = digits.split("ood")
    batch = split.batch(torch.arange(300))
    for number, name in enumerate(digits.biases):
        here = split.bias == number
        same = (batch.input[here] == batch.clean[here]).all()
        assert same == (name == "original")
    blurred = (split.bias == digits.biases.index("gaussian-blur")).nonzero()[:, 0]
    bytes_of = (255 * batch.clean[blurred]).round().to(torch.uint8)
    expected = corrupt(bytes_of, "gaussian-blur", 5, torch.Generator())
    assert torch.equal((255 * batch.input[blurred]).round().to(torch.uint8), expected)


def test_images_are_corrupted_once(digits, monkeypatch):
    again = CorruptedImages(limit=1000, valid=200, test=300, bias_ratio=0.95, corruptions="type-1")
    first = digits.split("valid").batch(torch.arange(4)).input
    monkeypatch.setattr(corrupted_images, "corrupt", None)
    assert torch.equal(again.split("valid").batch(torch.arange(4)).input, first)


def test_the_seed_and_the_severity_decide():
    made = [
        CorruptedImages(limit=200, valid=40, test=40, **more)
        for more in ({}, {"corruption_seed": 1}, {"severity": 2}, {"split_seed": 1})
    ]
    first, reseeded, milder, other = (benchmark.split("shift").batch(torch.arange(40)) for benchmark in made)
    assert torch.equal(first.clean, reseeded.clean) and not torch.equal(first.bias, reseeded.bias)
    assert torch.equal(first.bias, milder.bias) and not torch.equal(first.input, milder.input)
    assert not torch.equal(first.clean, other.clean)


def test_animals_of_three_kinds_share_no_picture_between_parts(photographs, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))
    benchmark = CorruptedImages(source="objects", size=24, limit=180, valid=30, test=60, bias_ratio=0.9)
    assert benchmark.classes == KINDS and benchmark.biases == ("snow", "frost", "fog")
    assert len(benchmark.split("train")) == 90
    assert benchmark.record()["splits"]["train"]["conflicting"] == 9
    assert set(benchmark.split("ood").tiers) == {"seen", "unseen"}
    assert benchmark.split("train").batch(torch.arange(2)).input.shape == (2, 3, 24, 24)


@pytest.mark.parametrize("own", [True, False])
def test_attributes_are_spread_evenly_within_each_class(own):
    label = torch.arange(4).repeat_interleave(torch.tensor([12, 5, 24, 1]))
    attribute = spread(label, 4, torch.Generator().manual_seed(0), own=own)
    for value in range(4):
        counts = attribute[label == value].bincount(minlength=4)
        others = counts if own else torch.cat([counts[:value], counts[value + 1 :]])
        assert others.max() - others.min() <= 1
        assert own or counts[value] == 0


WRONG = {
    "did you mean 'cifar-10'": {"source": "cifar10"},
    "needs a folder; set benchmark.root": {"source": "cifar-10"},
    "from 1 to 5": {"severity": 0},
    "did you mean 'type-1'": {"corruptions": "type-2"},
    "did you mean 'snow'": {"corruptions": ["snwo"] * 10},
    "gives 2 corruptions for 10 classes": {"corruptions": ["snow", "fog"]},
    "list as many, each once": {"corruptions": ["snow"] * 10},
    "so leave it out": {"size": 24},
    "from 0 to 1": {"bias_ratio": 1.5},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_told(message):
    with pytest.raises(UserError, match=message):
        CorruptedImages(**WRONG[message])


def test_a_list_of_corruptions_is_taken_in_its_order():
    names = tuple(CORRUPTIONS)[::-1][:10]
    assert CorruptedImages(corruptions=names, limit=200, valid=40, test=40).biases == names
