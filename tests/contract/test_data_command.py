"""``hansfree data``: fetching from packages, checking folders in words, writing benchmarks and reading them back."""

import csv
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import tarfile
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hansfree.benchmarks import BENCHMARKS, Folder
from hansfree.benchmarks.image_files import read_image
from hansfree.data import fetching, making
from hansfree.errors import UserError

SMALL = {"size": 20, "train": 16, "valid": 8, "test": 16}
DIGITS = {"limit": 200, "valid": 40, "test": 40}


def sentence(err):
    """The last line, which must be the only one that is an error, and no traceback."""
    assert "Traceback" not in err
    told = [line for line in err.splitlines() if line.startswith("hansfree: ")]
    assert len(told) == 1, err
    return told[0]


# Fetching


def deb(path, files, compressed="xz"):
    """A Debian package that holds ``files``, and its checksum."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{compressed}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compressed}": packed.getvalue()}
    whole = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        assert len(header) == 60
        whole += header + content + b"\n" * (len(content) % 2)
    path.write_bytes(whole)
    return hashlib.sha256(whole).hexdigest()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder with one small package that stands for the data set "fruit"."""
    folder = tmp_path / "debs"
    folder.mkdir()
    files = {
        "usr/share/fruit/apple.txt": b"red",
        "usr/share/fruit/pip.txt": b"not used",
        "usr/share/doc/fruit-data/copyright": b"public domain",
    }
    package = fetching.Package("fruit-data", "1:2.0-1", "", "public domain")
    package = replace(package, sha256=deb(folder / package.file, files))
    data_set = fetching.DataSet((package,), {"red/apple.txt": "usr/share/fruit/apple.txt"})
    monkeypatch.setitem(fetching.DATA_SETS, "fruit", data_set)
    monkeypatch.setenv("HANSFREE_DATA", str(tmp_path / "root"))
    return folder


def left(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_get_keeps_what_is_used_and_the_copyright(hansfree, packages, tmp_path):
    code, out, _ = hansfree("data", "get", "fruit", "--debs", packages)
    assert code == 0 and str(tmp_path / "root/fruit") in out
    assert left(tmp_path / "root") == ["fruit/copyright/fruit-data", "fruit/red/apple.txt"]
    assert (tmp_path / "root/fruit/red/apple.txt").read_bytes() == b"red"


def test_get_goes_where_it_is_told_and_does_nothing_twice(hansfree, packages, tmp_path):
    assert hansfree("data", "get", "fruit", "--debs", packages, "--out", tmp_path / "here")[0] == 0
    assert left(tmp_path / "here") == ["fruit/copyright/fruit-data", "fruit/red/apple.txt"]
    code, out, err = hansfree("data", "get", "fruit", "--debs", tmp_path / "nowhere", "--out", tmp_path / "here")
    assert (code, err) == (0, "") and "fruit" in out


def test_get_refuses_another_package_and_leaves_nothing(hansfree, packages, tmp_path):
    with (packages / "fruit-data_2.0-1_all.deb").open("ab") as file:
        file.write(b"!")
    code, _, err = hansfree("data", "get", "fruit", "--debs", packages)
    assert code == 2
    assert "is not fruit-data 1:2.0-1 of Debian 12" in sentence(err)
    assert left(tmp_path / "root") == []


def test_get_says_which_file_is_wanted_where_there_is_none(hansfree, packages, tmp_path):
    (packages / "fruit-data_2.0-1_all.deb").unlink()
    code, _, err = hansfree("data", "get", "fruit", "--debs", packages)
    assert code == 2 and "holds no fruit-data_2.0-1_all.deb" in sentence(err)


def test_get_refuses_what_is_no_package(packages, tmp_path):
    no_package = tmp_path / "a.deb"
    no_package.write_bytes(b"something else")
    with pytest.raises(UserError, match="is no Debian package"):
        fetching.unpack(no_package, fetching.DATA_SETS["fruit"].packages[0], {}, tmp_path / "b")


def test_get_does_not_mend_half_a_folder(hansfree, packages, tmp_path):
    (tmp_path / "root/fruit").mkdir(parents=True)
    code, _, err = hansfree("data", "get", "fruit", "--debs", packages)
    assert code == 2 and "lacks red/apple.txt; move it away" in sentence(err)


def test_get_names_the_nearest_data_set(hansfree):
    code, _, err = hansfree("data", "get", "objects-on-scene")
    assert code == 2 and "did you mean 'objects-on-scenes'" in sentence(err)


def command(folder, text):
    """A program apt-get that is found before any other."""
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "apt-get").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_get_downloads_by_apt(hansfree, packages, tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    script = f'echo "$@" > {asked}; cp {packages}/*.deb fruit-data_1%3a2.0-1_all.deb'
    monkeypatch.setenv("PATH", command(tmp_path / "bin", script))
    code, _, err = hansfree("data", "get", "fruit")
    assert code == 0, err
    assert asked.read_text().split() == ["download", "fruit-data=1:2.0-1"]
    assert left(tmp_path / "root") == ["fruit/copyright/fruit-data", "fruit/red/apple.txt"]


def test_get_says_what_to_do_where_apt_has_another_version(hansfree, packages, tmp_path, monkeypatch):
    script = "echo \"E: Version '1:2.0-1' for 'fruit-data' was not found\" >&2; exit 100"
    monkeypatch.setenv("PATH", command(tmp_path / "bin", script))
    code, _, err = hansfree("data", "get", "fruit")
    told = sentence(err)
    assert code == 2
    assert "was not found" in told and "apt-get update" in told and "fruit-data_2.0-1_all.deb of Debian 12" in told
    assert left(tmp_path / "root") == []


def test_get_says_what_to_do_without_apt(hansfree, packages, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = hansfree("data", "get", "fruit")
    assert code == 2 and "no apt-get" in sentence(err) and "--debs" in sentence(err)


def archive(files):
    """The bytes of a .tar.gz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize("file", ["pips-1.0.tar.gz", "pips-1.0-py3-none-any.whl"])
def test_get_unpacks_python_packages_and_archives_inside_them(hansfree, tmp_path, monkeypatch, file):
    folder = tmp_path / "packages"
    folder.mkdir()
    if file.endswith(".whl"):
        with zipfile.ZipFile(folder / file, "w") as made:
            made.writestr("pips/apple.txt", b"red")
        sources = {"apple.txt": "pips/apple.txt"}
    else:
        inner = archive({"in/pear.txt": b"green", "in/plum.txt": b"not used"})
        (folder / file).write_bytes(archive({"pips/apple.txt": b"red", "pips/more.tar.gz": inner}))
        sources = {"apple.txt": "pips/apple.txt", "pear.txt": "pips/more.tar.gz/in/pear.txt"}
    sha256 = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    package = fetching.PythonPackage("pips", "1.0", sha256, "MIT", file)
    monkeypatch.setitem(fetching.DATA_SETS, "pips", fetching.DataSet((package,), sources))
    code, _, err = hansfree("data", "get", "pips", "--debs", folder, "--out", tmp_path / "root")
    assert code == 0, err
    assert left(tmp_path / "root") == [f"pips/{name}" for name in sources]
    with (folder / file).open("ab") as broken:
        broken.write(b"!")
    code, _, err = hansfree("data", "get", "pips", "--debs", folder, "--out", tmp_path / "other")
    assert code == 2 and "is not pips 1.0 (its SHA-256" in sentence(err)
    (folder / file).unlink()
    code, _, err = hansfree("data", "get", "pips", "--debs", folder, "--out", tmp_path / "other")
    assert code == 2 and f"holds no {file}; put that file of the Python package pips there" in sentence(err)


def test_get_says_what_pip_said(hansfree, tmp_path, monkeypatch):
    package = fetching.PythonPackage("pips", "1.0", "0" * 64, "MIT", "pips-1.0.tar.gz")
    monkeypatch.setitem(fetching.DATA_SETS, "pips", fetching.DataSet((package,), {"a": "b"}))
    said = "WARNING: slow\nERROR: No matching distribution found for pips==1.0\n"
    monkeypatch.setattr(
        fetching.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    )
    code, _, err = hansfree("data", "get", "pips", "--out", tmp_path / "root")
    assert code == 2 and "(No matching distribution found for pips==1.0); connect to the network" in sentence(err)


def test_every_package_is_pinned():
    for data_set in fetching.DATA_SETS.values():
        for package in data_set.packages:
            assert re.fullmatch("[0-9a-f]{64}", package.sha256) and package.version and package.licence
            assert ":" not in package.file


# Writing and reading back


CASES = {
    "objects-on-scenes": SMALL,
    "objects-on-scenes, 80 %": {**SMALL, "bias_ratio": 0.8},
    "accessories": SMALL,
    "coloured-digits": DIGITS,
    "mnist-background": DIGITS,
}


@pytest.mark.parametrize("case", CASES)
def test_what_make_writes_folder_reads_back(case, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))
    made = BENCHMARKS[case.partition(",")[0]](**CASES[case])
    count = making.make(made, tmp_path / "made")
    read = Folder(root=tmp_path / "made")
    assert count == sum(len(made.split(name)) for name in made.split_names())
    assert set(read.split_names()) == set(made.split_names())
    assert (read.classes, read.biases, read.mask_names) == (made.classes, made.biases, made.mask_names)
    assert (read.gives, read.input) == (made.gives, made.input)
    for name in made.split_names():
        ours, theirs = made.split(name), read.split(name)
        index = torch.arange(len(ours))
        first, second = ours.batch(index), theirs.batch(index)
        assert torch.equal(first.label, second.label) and torch.equal(first.bias, second.bias)
        for field in ("input", "mask", "clean"):
            assert (getattr(first, field) - getattr(second, field)).abs().max() <= 0.5 / 255 + 1e-6
        tiers = ours.tiers
        assert theirs.tiers.keys() == tiers.keys()
        assert all(torch.equal(theirs.tiers[tier], tiers[tier]) for tier in tiers)


def test_the_table_is_in_the_layout_of_wilds(hansfree, tmp_path):
    settings = [f"benchmark.{key}={value}" for key, value in DIGITS.items()]
    code, out, err = hansfree("data", "make", "mnist-background", *settings, "--out", tmp_path / "made")
    assert code == 0 and "image" in out, err
    with (tmp_path / "made/metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows if row["split_name"] in ("iid", "ood", "shift")} == {"2"}
    assert {row["split"] for row in rows if row["split_name"] == "valid_ood"} == {"3"}
    assert all((tmp_path / "made" / row["img_filename"]).is_file() for row in rows)
    # Without the column of ours, the rule about places finds the same tests.
    for row in rows:
        del row["split_name"]
    write_table(tmp_path / "made", [row for row in rows if row["split"] != "3"])
    found = Folder(root=tmp_path / "made")
    made = BENCHMARKS["mnist-background"](**DIGITS)
    assert {name: len(found.split(name)) for name in found.split_names()} == {
        name: len(made.split(name)) for name in ("train", "valid", "iid", "ood", "shift")
    }


def test_make_takes_a_config(hansfree, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"benchmark": {"name": "coloured-digits", **DIGITS}, "model": 1}))
    code, _, err = hansfree("data", "make", tmp_path / "c.yaml", "benchmark.palette=pgi", "--out", tmp_path / "made")
    assert code == 0, err
    assert json.loads((tmp_path / "made/benchmark.json").read_text())["record"]["options"]["palette"] == "pgi"


def test_make_takes_a_config_whose_splits_follow_the_seed(hansfree, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))
    section = {"name": "accessories", "split_seed": "seed", "size": 16, "train": 8, "valid": 8, "test": 8}
    (tmp_path / "c.yaml").write_text(json.dumps({"benchmark": section}))
    code, _, err = hansfree("data", "make", tmp_path / "c.yaml", "seed=3", "--out", tmp_path / "made")
    assert code == 0, err
    assert json.loads((tmp_path / "made/benchmark.json").read_text())["record"]["options"]["split_seed"] == 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no.yaml", "no.yaml"),
        ("coloured-digit", "did you mean 'coloured-digits'"),
        ("empty.yaml", "no benchmark section"),
    ],
)
def test_make_says_what_it_cannot_make(hansfree, tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("name: nothing")
    code, _, err = hansfree("data", "make", source, "--out", "made")
    assert code == 2 and said in sentence(err)
    assert not (tmp_path / "made").exists()


def test_make_overwrites_nothing(hansfree, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/mine.txt").touch()
    code, _, err = hansfree("data", "make", "coloured-digits", "--out", tmp_path / "made")
    assert code == 2 and "is there already" in sentence(err)
    assert left(tmp_path) == ["made/mine.txt"]


def test_make_leaves_nothing_half_written(tmp_path):
    def stop(done, total):
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        making.make(BENCHMARKS["coloured-digits"](**DIGITS), tmp_path / "made", stop)
    assert list(tmp_path.iterdir()) == []


# Folders of the user's own


def picture(path, seed, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode)) if mode != "L" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)).save(path)


def write_table(root, rows):
    with (root / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def photos(tmp_path):
    """A folder in the layout of WILDS: two classes, two places in training and a third one in test, masks, twins."""
    root = tmp_path / "photos"
    cells = [(split, y, place) for split in (0, 1) for y, place in ((0, 0), (1, 1))]
    cells += [(2, y, place) for y in (0, 1) for place in (0, 1, 2)]
    rows = []
    for number, (split, y, place) in enumerate([cell for cell in cells for _ in range(12)]):
        picture(root / f"{number}.png", number)
        picture(root / f"m{number}.png", number, mode="L")
        picture(root / f"c{number}.png", 1000 + number)
        files = {"mask_filename": f"m{number}.png", "clean_filename": f"c{number}.png"}
        rows.append({"img_filename": f"{number}.png", "y": y, "split": split, "place": place, **files})
    write_table(root, rows)
    return root, rows


def test_test_rows_fall_by_class_and_place(photos):
    root, _ = photos
    benchmark = Folder(root=root)
    pairs = {
        name: set(zip(benchmark.split(name).label.tolist(), benchmark.split(name).bias.tolist()))
        for name in benchmark.split_names()
    }
    assert pairs == {
        "train": {(0, 0), (1, 1)},
        "valid": {(0, 0), (1, 1)},
        "iid": {(0, 0), (1, 1)},
        "shift": {(0, 1), (1, 0)},
        "ood": {(0, 2), (1, 2)},
    }
    assert benchmark.gives == {"bias", "mask", "clean"}
    batch = benchmark.split("train").batch(torch.tensor([3]))
    assert torch.equal((batch.mask[0, 0] * 255).byte(), torch.from_numpy(np.array(Image.open(root / "m3.png"))))
    assert torch.equal(
        (batch.clean[0] * 255).byte(), torch.from_numpy(np.array(Image.open(root / "c3.png"))).permute(2, 0, 1)
    )


def test_without_places_all_tests_are_iid(photos):
    root, rows = photos
    write_table(root, [{key: row[key] for key in ("img_filename", "y", "split")} for row in rows])
    benchmark = Folder(root=root)
    assert benchmark.split_names() == ("train", "valid", "iid")
    assert benchmark.gives == frozenset() and benchmark.split("iid").bias is None


def test_classes_and_places_may_have_names(photos):
    root, rows = photos
    named = [{**row, "y": "ox" if row["y"] else "cow", "place": f"at {row['place']}"} for row in rows]
    write_table(root, named)
    benchmark = Folder(root=root)
    assert (benchmark.classes, benchmark.biases) == (("cow", "ox"), ("at 0", "at 1", "at 2"))
    other = Folder(root=root, classes=["ox", "cow"])
    assert torch.equal(other.split("train").label, 1 - benchmark.split("train").label)
    with pytest.raises(UserError, match=r"has the class 'cow'; known: ox, pig"):
        Folder(root=root, classes=["ox", "pig"])


def test_several_masks_are_parted_by_semicolons(photos):
    root, rows = photos
    write_table(root, [{**row, "mask_filename": f"{row['mask_filename']};m0.png"} for row in rows])
    benchmark = Folder(root=root, mask_names=["cow", "bell"])
    batch = benchmark.split("iid").batch(torch.arange(2))
    assert benchmark.mask_names == ("cow", "bell") and batch.mask.shape == (2, 2, 8, 8)
    assert torch.equal(batch.mask[0, 1], batch.mask[1, 1]) and not torch.equal(batch.mask[0, 0], batch.mask[1, 0])


def test_images_are_resized_where_told_and_kept_where_told(photos):
    root, _ = photos
    benchmark = Folder(root=root, size=12, cache=True)
    first = benchmark.split("train").batch(torch.arange(4))
    assert first.images.shape == (4, 3, 12, 12) and first.mask.shape == (4, 1, 12, 12)
    for path in root.glob("*.png"):
        path.unlink()
    again = benchmark.split("train").batch(torch.arange(4))
    assert torch.equal(first.images, again.images) and torch.equal(first.clean, again.clean)
    with pytest.raises(UserError, match="is missing"):
        benchmark.split("train").batch(torch.tensor([4]))


def test_a_tree_of_folders_is_read(tmp_path):
    for number, split in enumerate(("train", "val", "test", "shift")):
        for y, name in enumerate(("cow", "ox")):
            for i in range(3):
                picture(tmp_path / split / name / f"{i}.jpg", 100 * number + 10 * y + i)
    benchmark = Folder(root=tmp_path)
    assert benchmark.classes == ("cow", "ox") and benchmark.split_names() == ("train", "valid", "iid", "shift")
    assert benchmark.split("valid").label.tolist() == [0, 0, 0, 1, 1, 1]
    assert benchmark.split("train").batch(torch.arange(6)).bias is None


def test_the_record_tells_folders_apart(photos):
    root, _ = photos
    prints = {name: split["sha256"] for name, split in Folder(root=root).record()["splits"].items()}
    assert prints == {name: split["sha256"] for name, split in Folder(root=root).record()["splits"].items()}
    picture(root / "0.png", 5, size=(8, 9))
    changed = {name: split["sha256"] for name, split in Folder(root=root).record()["splits"].items()}
    assert {name for name in prints if prints[name] != changed[name]} == {"train"}


# What is wrong, in words


def without(rows, key):
    return [{name: value for name, value in row.items() if name != key} for row in rows]


def changed(rows, number, **values):
    return [{**row, **values} if i == number else row for i, row in enumerate(rows)]


TABLES = {
    "unknown column 'plaice'; did you mean 'place'": lambda rows: [{**row, "plaice": 1} for row in rows],
    "lacks the column 'y'": lambda rows: without(rows, "y"),
    "line 3 names 0.png again, as line 2 does": lambda rows: changed(rows, 1, img_filename="0.png"),
    "line 3 names ./0.png again, as line 2 does": lambda rows: changed(rows, 1, img_filename="./0.png"),
    "line 26 names 0.png again, as line 2 does": lambda rows: changed(rows, 24, img_filename="0.png"),
    "line 4 names gone.png, which is missing": lambda rows: changed(rows, 2, img_filename="gone.png"),
    "line 2 names nowhere.png, which is missing": lambda rows: changed(rows, 0, mask_filename="nowhere.png"),
    "n.png, which is missing": lambda rows: changed(rows, 0, img_filename=5000 * "n" + ".png"),
    "line 2 names a\0.png, which is missing": lambda rows: changed(rows, 0, img_filename="a\0.png"),
    "outside of the folder": lambda rows: changed(rows, 0, img_filename="../photos/0.png"),
    "/tmp/x.png, which is outside": lambda rows: changed(rows, 0, clean_filename="/tmp/x.png"),
    "line 3 has the class '-1'; known: numbers from 0 to 99999": lambda rows: changed(rows, 1, y=-1),
    "line 2 has the class '4000000000'; known": lambda rows: changed(rows, 0, y=4_000_000_000),
    "line 2 has the place '9999999'; known": lambda rows: changed(rows, 0, place=9_999_999),
    "line 2 has no y": lambda rows: changed(rows, 0, y=""),
    "line 2 has the split '7'": lambda rows: changed(rows, 0, split=7),
    "line 2 has no place": lambda rows: changed(rows, 0, place=""),
    "line 2 has 0 masks, others have 1": lambda rows: changed(rows, 0, mask_filename=""),
    "line 2 has no clean_filename": lambda rows: changed(rows, 0, clean_filename=""),
    "one class only": lambda rows: [row for row in rows if row["y"] == 0],
    "no training image of the class '1'": lambda rows: [row for row in rows if row["split"] or not row["y"]],
    "has no valid images": lambda rows: [row for row in rows if row["split"] != 1],
    "has no train images": lambda rows: [row for row in rows if row["split"] != 0],
}


@pytest.mark.parametrize("said", TABLES)
def test_a_bad_table_is_told_by_its_line(hansfree, photos, said):
    root, rows = photos
    write_table(root, TABLES[said](rows))
    with pytest.raises(UserError) as error:
        Folder(root=root)
    assert said in str(error.value)
    code, out, err = hansfree("data", "check", root)
    assert code == 1 and "Traceback" not in err
    assert any(line.startswith("Mistake: ") and said in line for line in err.splitlines()), err
    assert "Nothing is wrong" not in out


def test_a_good_folder_has_nothing_wrong(hansfree, photos):
    code, out, err = hansfree("data", "check", photos[0])
    assert code == 0 and "Nothing is wrong." in out and "train: 24 images (0 12, 1 12)" in out
    assert "Mistake" not in err
    assert "has no train image in 2 of its groups (class, place): methods for groups need some." in err
    assert "has no valid image in 2 of its groups (class, place): dfr and worst_group_val need some." in err


def sixteen_bits(path):
    """A grey PNG of 16 bits."""
    values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(values).save(path)


def bomb(path):
    """A PNG whose header promises 40,000 x 40,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b""))


def animation(path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def floats(path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path, "TIFF")


BAD = {
    "holds floating-point values": floats,
    "damaged or cut short": lambda path: path.write_bytes(path.read_bytes()[:120]),
    "not an image of a known format": lambda path: path.write_text("a letter"),
    "is an animation of 3 pictures": animation,
    "pixels; save it smaller": bomb,
    "has 9 x 8 pixels but": lambda path: picture(path, 0, size=(8, 9)),
}


@pytest.mark.parametrize("said", BAD)
@pytest.mark.parametrize("which", ["5.png", "c5.png"])
def test_a_bad_image_is_told_by_its_name(hansfree, photos, said, which):
    root, _ = photos
    BAD[said](root / which)
    if which == "5.png" and "8 pixels but" in said:
        said = f"has 8 x 8 pixels but {root / which} has 9 x 8"
    with pytest.raises(UserError, match=re.escape(said)) as error:
        Folder(root=root).split("train").batch(torch.arange(24))
    assert str(root / which) in str(error.value)
    code, _, err = hansfree("data", "check", root)
    lines = [line for line in err.splitlines() if line.startswith("Mistake: ")]
    assert code == 1 and len(lines) == 1 and said in lines[0] and "Traceback" not in err


RUNS = {
    "damaged or cut short": lambda root, rows: [BAD["damaged or cut short"](root / f"{i}.png") for i in range(24)],
    "is an animation": lambda root, rows: [animation(root / f"{i}.png") for i in range(24)],
    "has 9 x 8 pixels but": lambda root, rows: [picture(root / f"m{i}.png", i, size=(8, 9)) for i in range(24)],
    "outside of the folder": lambda root, rows: write_table(root, changed(rows, 0, img_filename="../photos/0.png")),
    "one class only": lambda root, rows: write_table(root, [row for row in rows if row["y"] == 0]),
    "conflicting_val needs validation samples whose known bias disagrees": lambda root, rows: None,
}


@pytest.mark.parametrize("said", RUNS)
def test_a_run_on_a_bad_folder_says_so_and_leaves_nothing(hansfree, photos, tmp_path, said):
    root, rows = photos
    RUNS[said](root, rows)
    config = {
        "benchmark": {"name": "folder", "root": str(root)},
        "model": {"name": "small-cnn", "widths": [2], "norm": "none"},
        "method": {"name": "erm"},
        "training": {"steps": 1, "batch_size": 8, "optimiser": "sgd", "lr": 0.01},
        "selection": "conflicting_val" if said.startswith("conflicting_val") else "iid_val",
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    code, _, err = hansfree("run", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert code == 2 and said in sentence(err)
    assert not (tmp_path / "run").exists()


def test_grey_cmyk_palette_and_16_bits_are_read(tmp_path):
    sixteen_bits(tmp_path / "deep.png")
    deep = np.asarray(read_image(tmp_path / "deep.png"))
    expected = np.round(np.arange(64).reshape(8, 8) * 1000 / 65535 * 255)
    assert np.abs(deep[..., 0] - expected).max() <= 1 and deep.shape == (8, 8, 3)
    for mode in ("L", "CMYK", "P", "1", "LA", "RGBA"):
        ending = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", (8, 8), (204, 204, 204)).convert(mode).save(tmp_path / f"{mode}.{ending}")
        image = read_image(tmp_path / f"{mode}.{ending}")
        assert image.mode == "RGB" and image.size == (8, 8)
        assert mode == "1" or abs(np.asarray(image)[0, 0].astype(int) - 204).max() <= 3


def test_a_picture_in_two_parts_is_a_leak(hansfree, photos):
    root, _ = photos
    (root / "50.png").write_bytes((root / "1.png").read_bytes())  # a test image of class 0 is a training image
    (root / "13.png").write_bytes((root / "2.png").read_bytes())  # two classes
    (root / "4.png").write_bytes((root / "3.png").read_bytes())  # twice in one split
    code, _, err = hansfree("data", "check", root)
    assert code == 1
    assert f"Mistake: {root / '1.png'} (train) and {root / '50.png'} (iid) are the same picture" in err
    assert f"Mistake: {root / '2.png'} and {root / '13.png'} are the same picture with different classes" in err
    assert "Remark: Pictures that repeat another one of their split: 1, such as" in err
    assert err.count("Mistake") == 2


def test_small_and_absent_groups_other_sizes_and_stray_images_are_told(hansfree, photos):
    root, rows = photos
    write_table(root, [row for i, row in enumerate(rows) if i not in range(12, 20) and i not in range(36, 48)])
    picture(root / "0.png", 3, size=(10, 10))
    picture(root / "m0.png", 3, size=(10, 10), mode="L")
    picture(root / "c0.png", 4, size=(10, 10))
    code, _, err = hansfree("data", "check", root)
    assert code == 1
    assert f"Mistake: {root} has no image of the class '1' in valid" in err
    assert "Remark: Only 4 images of train are of class '1' at place '1'" in err
    assert f"Remark: The images of {root} have 2 sizes (most often 8 x 8" in err
    assert "60 images" in err and "belong to no split" in err
    with pytest.raises(UserError, match=r"set benchmark\.size"):
        Folder(root=root).split("train").batch(torch.arange(8))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00broken", b'img_filename,y,split\n"a.png,0,0\n'])
def test_what_is_no_table_is_refused(hansfree, tmp_path, content):
    (tmp_path / "metadata.csv").write_bytes(content)
    code, _, err = hansfree("data", "check", tmp_path)
    assert code == 2 and "not a table of comma-separated values" in sentence(err)


@pytest.mark.parametrize(
    ("make", "said"), [(False, "is not a folder"), (True, "holds neither metadata.csv nor folders")]
)
def test_what_is_no_data_set_is_refused(hansfree, tmp_path, make, said):
    if make:
        picture(tmp_path / "there/cow/1.png", 0)
    code, _, err = hansfree("data", "check", tmp_path / "there")
    assert code == 2 and said in sentence(err)


def test_other_names_beside_the_table_must_be_names(photos):
    (photos[0] / "benchmark.json").write_text("[1")
    with pytest.raises(UserError, match=r"benchmark\.json is not as hansfree data make writes it"):
        Folder(root=photos[0])
