"""Images that are chosen by number or by a list: few shots, validation images held out, SUN397's own lists."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansfree.benchmarks import SUN397, Folder
from hansfree.benchmarks.choosing import listed
from hansfree.benchmarks.regimes import few_shots
from hansfree.errors import UserError
from hansfree.parts import RunConfig, make_benchmark


def names(split):
    return [file.name for file in split.files]


def of_class(split):
    return split.label.bincount(minlength=3).tolist()


@pytest.fixture
def write(tmp_path):
    """Writes a list of images and gives its path."""

    def written(*lines, name="list.txt"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return written


# ImageNet as a folder


def test_imagenets_validation_images_are_the_test_where_others_are_held_out(imagenet):
    whole, held = Folder(root=imagenet, size=24), Folder(root=imagenet, size=24, valid=4)
    assert whole.split_names() == ("train", "valid") and held.split_names() == ("train", "valid", "iid")
    assert names(held.split("iid")) == names(whole.split("valid"))
    assert all("val" in name for name in names(held.split("iid")))
    assert of_class(held.split("valid")) == [4] * 3 and of_class(held.split("train")) == [10] * 3
    assert sorted(names(held.split("train")) + names(held.split("valid"))) == sorted(names(whole.split("train")))
    for split in ("train", "valid", "iid"):
        assert all(
            file.parent.name == held.classes[y] for file, y in zip(held.split(split).files, held.split(split).label)
        )


def test_who_is_held_out_is_drawn_by_the_seed_or_listed(imagenet, write):
    def held(**how):
        return names(Folder(root=imagenet, size=24, **how).split("valid"))

    assert held(valid=4) == held(valid=4) != held(valid=4, split_seed=1)
    wanted = ["n01440764_3.JPEG", "n01443537_29.JPEG", "n15075141_55.JPEG"]
    assert held(valid=write(*reversed(wanted))) == wanted
    with pytest.raises(UserError, match=r"leaves train with no image of the class 'n01440764'"):
        held(valid=write(*(f"n01440764_{26 * n + 3}.JPEG" for n in range(14))))
    with pytest.raises(UserError, match=r"benchmark.valid: 14 .* take at most 13"):
        held(valid=14)
    with pytest.raises(UserError, match=r"benchmark.valid is 0"):
        held(valid=0)


def test_a_folder_with_tests_of_its_own_needs_nothing_held_out(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path / "all")
    shutil.copytree(imagenet / "val", tmp_path / "all" / "test")
    with pytest.raises(UserError, match=r"take benchmark\.valid out"):
        Folder(root=tmp_path / "all", size=24, valid=2)
    shutil.rmtree(tmp_path / "all" / "val")
    assert of_class(Folder(root=tmp_path / "all", size=24, valid=2).split("valid")) == [2] * 3
    with pytest.raises(UserError, match="no valid images"):
        Folder(root=tmp_path / "all", size=24)


# Lists of shots


FORMS = {
    "the file": lambda wnid, name: name,
    "its class's folder": lambda wnid, name: f"{wnid}/{name}",
    "a whole path": lambda wnid, name: f"/train/{wnid}/{name}",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_list_chooses_its_images_whatever_their_folders_are_called_by(imagenet, write, form):
    wanted = [("n15075141", "n15075141_3.JPEG"), ("n01440764", "n01440764_29.JPEG"), ("n01443537", "n01443537_3.JPEG")]
    path = write("", *(FORMS[form](*one) for one in wanted), "")
    benchmark = Folder(root=imagenet, size=24)
    few = few_shots(benchmark, path, seed=0)
    part, whole = few.split("train"), benchmark.split("train")
    batch = part.batch(torch.arange(3))
    assert [whole.files[row].name for row in batch.origin] == sorted(name for _, name in wanted)
    assert torch.equal(batch.images, whole.batch(batch.origin).images) and part.label.tolist() == [0, 1, 2]
    assert names(few.split("valid")) == names(benchmark.split("valid"))


@settings(max_examples=20)
@given(st.sets(st.integers(0, 13), min_size=1), st.randoms())
def test_a_list_means_the_same_in_any_order(places, rows, random):
    files = [Path(f"root/class/{row}.png") for row in range(14)]
    lines = [files[row].name for row in rows]
    random.shuffle(lines)
    places.write_text("\r\n".join(lines))
    assert listed(places, files, key="shots").tolist() == sorted(rows)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("lists") / "list.txt"


def test_a_run_reads_a_list_and_records_it(imagenet, write):
    path = write("n01440764_3.JPEG", "n01443537_3.JPEG", "n15075141_3.JPEG")
    config = {
        "benchmark": {"name": "folder", "root": str(imagenet), "size": 24, "valid": 2, "split_seed": 3},
        "model": {"name": "small-cnn"},
        "method": {"name": "erm"},
        "training": {"steps": 1},
    }
    first, same = (make_benchmark(RunConfig(**config, shots=path, seed=seed)) for seed in (0, 1))
    record = first.record()
    assert record == same.record() == json.loads(json.dumps(record))
    assert record["shots"]["list"] == path and record["splits"]["train"] == {"size": 3}
    other = make_benchmark(
        RunConfig(**config, shots=write("n01440764_3.JPEG", "n01443537_29.JPEG", "n15075141_3.JPEG"))
    )
    assert other.record()["shots"]["sha256_of_rows"] != record["shots"]["sha256_of_rows"]


def test_lists_that_do_not_fit_are_refused_in_one_sentence(imagenet, sun397, write, tmp_path):
    benchmark = Folder(root=imagenet, size=24)
    complete = ["n01440764_3.JPEG", "n01443537_3.JPEG", "n15075141_3.JPEG"]
    twins = tmp_path / "twins"
    for name in ("train/a/x.png", "train/b/x.png", "val/a/y.png", "val/b/y.png"):
        (twins / name).parent.mkdir(parents=True)
        shutil.copy(benchmark.split("train").files[0], twins / name)
    wrong = (
        (benchmark, write(*complete, "n01440764_4.JPEG"), "line 4 names n01440764_4.JPEG, which is not among"),
        (benchmark, write(*complete, "n01443537/n01440764_3.JPEG", name="b"), "line 4 .* not among"),
        (benchmark, write(*complete, "", "train/n15075141/n15075141_3.JPEG", name="c"), "line 5 .* again, as line 3"),
        (benchmark, write(complete[1], name="d"), "no image of the class 'n01440764', nor of 1 others"),
        (benchmark, write("", " ", name="e"), "names no image"),
        (benchmark, str(tmp_path / "absent.txt"), "shots: the list .*absent.txt cannot be read"),
        (benchmark, str(benchmark.split("train").files[0]), "cannot be read"),
        (Folder(root=twins), write("x.png", name="f"), "as 2 training images are called"),
        (
            Folder(root=imagenet, size=24, valid=write(complete[0], name="g")),
            write(*complete, name="h"),
            "line 1 .* held",
        ),
    )
    for whole, path, said in wrong:
        with pytest.raises(UserError, match=said) as error:
            few_shots(whole, path, seed=0)
        assert "\n" not in str(error.value), path


# SUN397


def test_sun397_is_divided_by_its_own_lists(sun397):
    benchmark = SUN397(root=sun397, size=24, valid=3)
    assert benchmark.classes == ("abbey", "apartment_building/outdoor", "youth_hostel")
    for split, count in (("train", 5), ("valid", 3), ("iid", 4)):
        found = benchmark.split(split)
        assert of_class(found) == [count] * 3
        for file, y in zip(found.files, found.label.tolist()):
            assert file.parent.relative_to(sun397).as_posix().partition("/")[2] == benchmark.classes[y]
    assert set(names(benchmark.split("iid"))) == {f"sun_{letter * 16}.jpg" for letter in "ijkl"}
    seen = {*benchmark.split("train").files, *benchmark.split("valid").files}
    listed = {sun397 / line.strip("/") for line in (sun397 / "Training_01.txt").read_text().split()}
    assert seen == listed


def test_sun397_whole_trains_on_all_that_is_not_tested(sun397):
    benchmark = SUN397(root=sun397.parent, size=24, valid=3, whole=True)
    assert of_class(benchmark.split("train")) == [7] * 3
    parts = [set(benchmark.split(name).files) for name in ("train", "valid", "iid")]
    assert set.union(*parts) == set(sun397.rglob("*.jpg")) and sum(map(len, parts)) == 42


def test_sun397s_own_lists_serve_as_lists_of_shots(sun397):
    whole = SUN397(root=sun397, size=24, valid=1, whole=True, split_seed=1)
    held = set(whole.split("valid").files)
    lines = [line for line in (sun397 / "Training_01.txt").read_text().split() if sun397 / line.strip("/") not in held]
    path = sun397.parent / "shots.txt"
    path.write_text("\n".join(lines))
    assert len(few_shots(whole, path, seed=0).split("train")) == len(lines) >= 21


def test_sun397s_lists_may_lie_in_partitions(sun397, tmp_path):
    root = tmp_path / "SUN397"
    shutil.copytree(sun397, root)
    (tmp_path / "Partitions").mkdir()
    for part in ("Training_01.txt", "Testing_01.txt"):
        shutil.move(root / part, tmp_path / "Partitions" / part)
    same, again = SUN397(root=sun397, size=24, valid=3), SUN397(root=root, size=24, valid=3)
    for split in same.split_names():
        assert names(same.split(split)) == names(again.split(split))
    assert same.record()["splits"] == again.record()["splits"]


def test_sun397_that_is_not_whole_is_refused_in_one_sentence(sun397, tmp_path):
    root = tmp_path / "SUN397"
    shutil.copytree(sun397, root)
    with pytest.raises(UserError, match=r"no Training_02\.txt|no Testing_02\.txt"):
        SUN397(root=root, partition=2)
    with pytest.raises(UserError, match="partition is 11; give 1 to 10"):
        SUN397(root=root, partition=11)
    with pytest.raises(UserError, match=r"valid: 8 .* take at most 7"):
        SUN397(root=root, valid=8)
    with pytest.raises(UserError, match=r"holds no ClassName\.txt"):
        SUN397(root=tmp_path / "nowhere")
    (root / "a/abbey/sun_aaaaaaaaaaaaaaaa.jpg").unlink()
    with pytest.raises(UserError, match=r"sun_aaaaaaaaaaaaaaaa.jpg, which is missing"):
        SUN397(root=root, valid=3)
    (root / "ClassName.txt").write_text("/a/abbey\n/y/youth_hostel\n")
    with pytest.raises(UserError, match=r"line 5 names .*outdoor.*, whose class is not in ClassName\.txt"):
        SUN397(root=root, valid=3)
    shutil.rmtree(root / "y")
    with pytest.raises(UserError, match="youth_hostel is missing"):
        SUN397(root=root, valid=3)
