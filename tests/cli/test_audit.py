"""``hansfree audit``: every measure that the data allow, on tiny models and a handful of pictures."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from hansfree.auditing import MEASURES
from hansfree.runs import read_results

NETWORK = "small-resnet:widths=[2,3]"


def sentence(err):
    """The error as printed, which must be one line and no traceback."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("hansfree: ")
    return lines[0]


def write(path, size=(16, 16), seed=0, mode="RGB"):
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def plain(tmp_path):
    """Images without labels."""
    for number in range(5):
        write(tmp_path / f"plain/{number}.png", (16 + number, 18), number)
    return tmp_path / "plain"


@pytest.fixture
def tree(tmp_path):
    """Two classes of four images."""
    for number in range(8):
        write(tmp_path / f"tree/{('cat', 'dog')[number % 2]}/{number}.png", seed=number)
    return tmp_path / "tree"


@pytest.fixture
def table(tmp_path):
    """A table without training images: classes, places and masks."""
    lines = ["img_filename,y,split,place,mask_filename"]
    for number in range(8):
        write(tmp_path / f"table/{number}.png", seed=number)
        mask = np.zeros((16, 16), np.uint8)
        mask[2 + number % 4 : 9, 3:10] = 255
        Image.fromarray(mask).save(tmp_path / f"table/{number}-mask.png")
        lines.append(f"{number}.png,{('cat', 'dog')[number % 2]},2,{number // 4},{number}-mask.png")
    (tmp_path / "table/metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "table"


def concepts(root, size=(16, 16)):
    for number in range(4):
        write(root / f"images/{number}.png", seed=number)
        write(root / f"masks/colour/{('red', 'blue')[number % 2]}/{number}.png", size, number, "L")
    return root


def skipped(folder):
    return {entry["measure"]: entry["reason"] for entry in read_results(folder / "results.json")["skipped"]}


def metrics(folder):
    return {row["metric"] for row in read_results(folder / "results.json")["rows"]}


def test_images_without_labels_give_a_report_that_says_what_was_skipped(hansfree, plain, tmp_path):
    out = tmp_path / "out"
    code, said, err = hansfree("audit", NETWORK, "--data", plain, "--size", 16, "--samples", 3, "--out", out)
    assert code == 0, err
    assert "no labels" in said and "Report: " in said
    assert "random" in err
    lacking = skipped(out)
    assert lacking["accuracy"] == "The images have no labels."
    assert set(lacking) == set(MEASURES) - {"heatmaps", "shift-equivariance", "deletion", "randomisation"}
    assert all(reason.endswith(".") and len(reason.split(". ")) == 1 for reason in lacking.values())
    assert {"deletion_area", "insertion_area", "shift_equivariance", "randomisation_ssim"} <= metrics(out)
    assert not {"acc", "ece"} & metrics(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The images have no labels." in page
    assert "http" not in page.split("</style>")[1].replace("http-equiv", "")


def test_models_side_by_side_with_everything_that_the_data_give(hansfree, table, tmp_path):
    out, other = tmp_path / "out", "small-cnn:widths=[2,3]"
    marked = concepts(tmp_path / "concepts")
    (tmp_path / "categories.csv").write_text("class,category\ncat,pet\ndog,pet\n", encoding="utf-8")
    own = ("--concepts", marked, "--categories", tmp_path / "categories.csv")
    options = ("--size", 16, "--samples", 6, *own, "--explainer", "gradient", "--out", out)
    code, _, err = hansfree("audit", NETWORK, other, "--data", table, *options)
    assert code == 0, err
    assert set(skipped(out)) == {"five-band"}
    wanted = {"acc", "acc_wg", "ece", "epg", "agreement", "explanation_cosine", "minibatch_cka", "mask_alignment"}
    assert wanted | {"edge_alignment", "detectors", "deletion_curve", "entropy_category"} <= metrics(out)
    results = read_results(out / "results.json")
    keys = {"benchmark", "variant", "method", "explainer", "model", "seed", "split", "tier", "group", "metric"}
    assert all(set(row) == keys | {"measured_with", "value", "selection"} for row in results["rows"])
    assert {row["model"] for row in results["rows"]} == {NETWORK, other}
    assert {"images"} == {row["split"] for row in results["rows"] if row["metric"] == "acc"}
    groups = {row["group"] for row in results["rows"] if row["metric"] == "acc" and row["group"]}
    assert groups == {"y:0,a:0", "y:0,a:1", "y:1,a:0", "y:1,a:1"}
    plain = [row for row in results["intervals"]["rows"] if row["group"] is None]
    ends = {(row["model"], row["metric"]): (row["low"], row["high"]) for row in plain}
    (accuracy,) = [r for r in results["rows"] if r["metric"] == "acc" and r["model"] == NETWORK and r["group"] is None]
    low, high = ends[NETWORK, "acc"]
    assert low <= accuracy["value"] <= high
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Which units detect concepts" in page and "random order" in page
    # The same command goes on: what is there is kept, what is gone is made anew.
    before = (out / "results.json").read_bytes()
    (out / "measures/deletion-1.json").unlink()
    (out / "report.html").unlink()
    code, _, err = hansfree("audit", NETWORK, other, "--data", table, *options)
    assert code == 0, err
    again = json.loads((out / "results.json").read_bytes())
    assert again["rows"] == json.loads(before)["rows"]
    # The report is made anew by its own command too.
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert hansfree("report", out)[0] == 0
    assert (out / "report.html").read_bytes() == page
    code, _, err = hansfree("audit", NETWORK, "--data", table, *options)
    assert code == 2
    assert str(out) in sentence(err)


def test_a_run_and_a_benchmark_whose_shortcut_is_known(hansfree, finished, tmp_path):
    described = {"benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60}}
    path, out = tmp_path / "data.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(described), encoding="utf-8")
    code, _, err = hansfree("audit", finished, "--data", path, "--samples", 2, "--out", out)
    assert code == 0, err
    own = {r["split"]: r["value"] for r in read_results(out / "results.json")["rows"] if r["metric"] == "acc_wg"}
    run = read_results(finished / "results.json")["rows"]
    assert own == {r["split"]: r["value"] for r in run if r["metric"] == "acc_wg" and r["split"] in own}
    assert own.keys() == {"iid", "ood", "shift"}
    assert not err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((NETWORK, "--layer", "blocs.0"), "did you mean 'blocks.0'?"),
        ((NETWORK, "--explainer", "gradeint"), "did you mean 'gradient'?"),
        ((NETWORK, "--explainer", "bcos"), "bcos"),
        ((NETWORK, NETWORK), "twice"),
        (("small-resnet:widths=[2,3],num_classes=3",), "tells 3 classes apart, but the data have 2"),
        (("small-resnet:widths=[2,3],channels=1",), "1 channels"),
        (("nowhere/exported",), "config.json"),
        (("{tmp}/empty",), "no finished run"),
        ((NETWORK, "--concepts", "{tmp}/empty"), "does not hold an image"),
        ((NETWORK, "--concepts", "{tmp}/masks-of-another-size"), "make the mask as large as the image"),
        ((NETWORK, "--concepts", "{tmp}/no-concept"), "holds no concept"),
        ((NETWORK, "--categories", "imagenet"), "WordNet ids"),
        ((NETWORK, "--categories", "{tmp}/absent.csv"), "cannot be read"),
        ((NETWORK, "--data", "{tmp}/one-class"), "one class only (cat)"),
        ((NETWORK, "--data", "{tmp}/absent"), "There is no folder"),
        ((NETWORK, "--data", "{tmp}/mixed"), "beside the folder"),
        ((NETWORK, "--data", "{tmp}/broken"), "not an image"),
        ((NETWORK, "--data", "coloured-digit"), "did you mean 'coloured-digits'?"),
    ],
)
def test_bad_input_is_answered_in_one_sentence_and_nothing_is_written(hansfree, tree, tmp_path, arguments, said):
    write(tmp_path / "one-class/cat/0.png")
    shutil.copytree(tree, tmp_path / "mixed")
    write(tmp_path / "mixed/0.png")
    shutil.copytree(tree, tmp_path / "broken")
    (tmp_path / "broken/cat/0.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    concepts(tmp_path / "masks-of-another-size", (8, 8))
    write(tmp_path / "no-concept/images/0.png")
    words = [str(word).format(tmp=tmp_path) for word in arguments]
    source = [] if "--data" in words else ["--data", tree]
    code, _, err = hansfree("audit", *words, *source, "--out", tmp_path / "out")
    assert code == 2, err
    assert said in sentence(err)
    assert not (tmp_path / "out").exists()


def test_classes_in_another_order_are_refused(hansfree, tree, tmp_path):
    code, _, err = hansfree("audit", NETWORK, "--data", tree, "--samples", 1, "--size", 16, "--out", tmp_path / "out")
    assert code == 0, err
    from hansfree.models import load_model, save_model

    save_model(load_model("small-cnn", num_classes=2), tmp_path / "model", classes=("dog", "cat"))
    code, _, err = hansfree("audit", tmp_path / "model", "--data", tree, "--out", tmp_path / "other")
    assert code == 2
    assert "in this order" in sentence(err)


def test_classes_in_categories_and_truths_of_three_bands(hansfree, tmp_path):
    out, source = tmp_path / "out", "cells:size=32,train=20,valid=10,test=20"
    code, _, err = hansfree("audit", NETWORK, "--data", source, "--samples", 2, "--explainer", "gradient", "--out", out)
    assert code == 0, err
    assert set(skipped(out)) == {"agreement", "map-agreement", "cka"}
    assert {"five_band_recall", "feature_auroc", "mask_alignment", "detectors"} <= metrics(out)


def test_labels_of_several_classes(hansfree, voc, tmp_path):
    out, source = tmp_path / "out", f"pascal-voc:root={voc},size=24"
    code, _, err = hansfree("audit", NETWORK, "--data", source, "--samples", 2, "--explainer", "gradient", "--out", out)
    assert code == 0, err
    assert skipped(out)["calibration"] == "Images have labels of several classes."
    assert {"f1", "epg", "deletion_area"} <= metrics(out)
    assert "acc" not in metrics(out)
