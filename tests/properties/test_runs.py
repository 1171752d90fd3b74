import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hansfree import runs
from hansfree.errors import RunError, UserError
from hansfree.runs import (
    RunFolder,
    SuiteFolder,
    atomic_path,
    open_folder,
    read_results,
    sole_writer,
    write_json,
    write_text,
)

CONFIG = {"benchmark": {"name": "coloured-digits"}, "training": {"lr": 0.01, "widths": (8, 16)}, "seed": 0}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "deep" / "file.npz"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".npz"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.npz"]


def test_an_error_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    sentence = r"file\.txt \(No space left on device\): free space .* --resume\.$"
    with pytest.raises(RunError, match=sentence), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_is_recognised_behind_a_library_s_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "_is_full", lambda folder: True)
    with pytest.raises(RunError, match="free space"), atomic_path(tmp_path / "file.pt"):
        raise RuntimeError("PytorchStreamWriter failed writing file")


def test_an_error_about_another_file_passes_through(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        (tmp_path / "absent").read_text()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another with --out"):
        write_text(tmp_path / "file" / "inner.txt", "text")


@given(st.floats())
def test_json_says_null_for_what_is_not_finite(value: float):
    written = runs._plain({"value": [value, np.float32(1.5), np.arange(2)], "path": Path("a")})
    text = json.dumps(written, allow_nan=False)
    assert json.loads(text) == {"value": [value if math.isfinite(value) else None, 1.5, [0, 1]], "path": "a"}


def test_a_new_folder_holds_its_config(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run", CONFIG, resume=False)
    assert yaml.safe_load(folder.config.read_text())["training"] == {"lr": 0.01, "widths": [8, 16]}
    assert open_folder(folder.path) == folder
    assert not folder.is_done()


def test_the_same_run_needs_resume(tmp_path: Path):
    RunFolder.create(tmp_path, CONFIG, resume=False)
    with pytest.raises(UserError, match="--resume"):
        RunFolder.create(tmp_path, CONFIG, resume=False)
    assert RunFolder.create(tmp_path, CONFIG, resume=True) == RunFolder(tmp_path)


def test_resume_of_a_run_that_never_began_begins_it(tmp_path: Path):
    assert RunFolder.create(tmp_path / "new", CONFIG, resume=True).config.is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_is_refused_by_its_first_differing_key(tmp_path: Path, resume: bool):
    RunFolder.create(tmp_path, CONFIG, resume=False)
    other = CONFIG | {"training": {"lr": 0.1, "widths": (8, 16)}}
    with pytest.raises(UserError, match=r"`training\.lr` is 0\.01 there and 0\.1 here"):
        RunFolder.create(tmp_path, other, resume=resume)
    with pytest.raises(UserError, match=r"`extra` is absent there and 1 here"):
        RunFolder.create(tmp_path, CONFIG | {"extra": 1}, resume=resume)


def test_a_setting_that_is_off_is_no_difference(tmp_path: Path):
    RunFolder.create(tmp_path, CONFIG, resume=False)
    later = CONFIG | {"extra": None, "more": {"again": None}, "training": {**CONFIG["training"], "list": []}}
    assert RunFolder.create(tmp_path, later, resume=True) == RunFolder(tmp_path)
    with pytest.raises(UserError, match="another run"):
        RunFolder.create(tmp_path, CONFIG | {"training": None}, resume=True)


def test_foreign_files_are_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunFolder.create(tmp_path, CONFIG, resume=True)
    assert names(tmp_path) == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", CONFIG, resume=False)


def test_leftovers_of_a_killed_write_are_cleared(tmp_path: Path):
    folder = RunFolder.create(tmp_path, CONFIG, resume=False)
    leftover = tmp_path / "checkpoints" / f"{runs._TEMPORARY}1234-last.pt"
    leftover.parent.mkdir()
    leftover.touch()
    RunFolder.create(folder.path, CONFIG, resume=True)
    assert not leftover.exists()


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path):
    with sole_writer(tmp_path):
        RunFolder.create(tmp_path, CONFIG, resume=False)
        with pytest.raises(UserError, match="is being written by another process"), sole_writer(tmp_path):
            pytest.fail("two writers in one folder")
    with sole_writer(tmp_path):
        RunFolder.create(tmp_path, CONFIG, resume=True)
    assert names(tmp_path) == ["config.yaml"]


def test_a_killed_writer_leaves_the_folder_free(tmp_path: Path):
    killed = "import os, pathlib, sys; from hansfree.runs import sole_writer; " + (
        "held = sole_writer(pathlib.Path(sys.argv[1])); held.__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False).returncode == 9
    with sole_writer(tmp_path):
        RunFolder.create(tmp_path, CONFIG, resume=False)


def test_a_writer_that_writes_nothing_leaves_no_folder(tmp_path: Path):
    with pytest.raises(UserError), sole_writer(tmp_path / "new"):
        raise UserError("A mistake.")
    assert not (tmp_path / "new").exists()


def test_metrics_survive_a_torn_line_and_are_cut_at_resume(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert folder.metrics_position() == 0 and folder.read_metrics() == []
    folder.append_metrics([{"step": 0, "loss": math.nan}, {"step": 1, "loss": 0.5}])
    position = folder.metrics_position()
    folder.append_metrics([{"step": 2, "loss": 0.25}])
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [record["step"] for record in folder.read_metrics()] == [0, 1, 2]
    assert folder.read_metrics()[0]["loss"] is None
    folder.truncate_metrics(position)
    assert [record["step"] for record in folder.read_metrics()] == [0, 1]
    with pytest.raises(UserError, match="shorter than its checkpoint remembers"):
        folder.truncate_metrics(position + 1)


def test_other_damage_to_metrics_names_the_line(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        folder.read_metrics()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 1}', '{"rows": [], "schema": 99}'])
def test_damaged_results_are_a_user_error_and_not_done(tmp_path: Path, text: str):
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"There is no .*results\.json"):
        read_results(folder.results)
    folder.results.write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(folder.results)
    assert not folder.is_done()


def test_results_make_a_run_done(tmp_path: Path):
    folder = RunFolder(tmp_path)
    write_json(folder.results, {"schema": runs.SCHEMA, "rows": []})
    assert folder.is_done()


@pytest.mark.parametrize("variant", ["lrp lr=0.01", "../../etc", "..", "a/b", "<script>", "größe", "."])
def test_a_cell_stays_inside_its_suite(tmp_path: Path, variant: str):
    suite = SuiteFolder.create(tmp_path / "suite", {"name": "s"}, resume=False)
    cell = suite.run(variant, 3)
    assert cell.path.resolve().parent.parent == (suite.path / "runs").resolve()
    assert cell.path.name == "seed-3"
    assert open_folder(suite.path) == suite


def test_a_folder_that_is_neither_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"neither suite\.yaml nor config\.yaml"):
        open_folder(tmp_path)
