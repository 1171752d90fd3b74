"""A report is one self-contained page that says what the files say, whatever the names in them."""

import copy
import csv
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hansfree.errors import UserError
from hansfree.report import build_report, notices
from hansfree.report.facts import facts_of, flat_config
from hansfree.runs import RunFolder, SuiteFolder, atomic_path, read_json, write_json, write_text

EVIL = "<script>alert(1)</script>"
CLASSES = (EVIL, *(f"class {number}" for number in range(1, 10)))
SPLITS = ("iid", "ood", "shift")
VARIANTS = {"erm": "ERM", "output": "Output & more", "lrp lr=0.01": EVIL, "lrp lr=0.03": "LRP, lr 0.03"}
ACCURACY = {"erm": (0.99, 0.4, 0.01), "output": (0.98, 0.6, 0.3), "lrp lr=0.01": (0.94, 0.9, 0.87)}
SAMPLES = 10
STEPS = 300


# A folder that no training made -------------------------------------------------------------------------------


def config_of(variant: str, seed: int) -> dict[str, Any]:
    return {
        "name": "fake",
        "variant": variant,
        "benchmark": {"name": "coloured-digits", "saturation": 0.75},
        "model": {"name": "small-cnn", "widths": [12, 40, 96]},
        "teacher": {"train": {"model": {"name": "small-resnet"}}},
        "training": {"epochs": 12, "lr": 0.01, "optimiser": "adam", "batch_size": 32},
        "seed": seed,
    }


def accuracies(variant: str, seed: int) -> dict[str, float]:
    means = ACCURACY.get(variant, (0.9, 0.8, 0.7))
    return {split: mean + 0.01 * (seed - 1) * (number % 2) for number, (split, mean) in enumerate(zip(SPLITS, means))}


def row(
    variant: str | None, model: str, seed: int | None, split: str | None, metric: str, value: float
) -> dict[str, Any]:
    return {
        "benchmark": "coloured-digits",
        "variant": variant,
        "method": variant,
        "explainer": None,
        "model": model,
        "seed": seed,
        "split": split,
        "tier": None,
        "group": None,
        "metric": metric,
        "measured_with": None,
        "value": value,
        "selection": "iid_val_loss",
    }


def rows_of(variant: str | None, model: str, seed: int | None, scores: dict[str, float]) -> list[dict[str, Any]]:
    rows = [row(variant, model, seed, split, "acc", value) for split, value in scores.items()]
    rows.append(row(variant, model, seed, None, "gap", scores["iid"] - scores["shift"]))
    return [*rows, row(variant, model, seed, "valid", "loss", 0.5), {**rows[0], "group": "y:0,a:0", "value": 0.123}]


def cell_of(variant: str, seed: int, folder: str, **changes: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "title": VARIANTS[variant],
        "seed": seed,
        "folder": folder,
        "status": "done",
        "error": None,
        "method": "erm" if variant == "erm" else "explanation-distillation",
        "explainer": None,
        "needs": [] if variant == "erm" else ["teacher"],
        "selection": "iid_val_loss",
        "warnings": [],
        "steps": STEPS,
        "time": {"train_seconds": 10.0 + seed},
        **changes,
    }


def results_of(rows: list[dict[str, Any]], cells: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "environment": {"hansfree": "0.1.0", "device": "cpu", "time": {"started": "2001-02-03 04:05:06"}},
        "config": config,
        "rows": rows,
        "cells": cells,
        "data": {"name": "coloured-digits", "splits": {"train": {"size": 1000, "aligned": 995}}},
    }


def digits() -> np.ndarray:
    """Ten 28 x 28 signs from seven bars each, as on a pocket calculator."""
    bars = [np.s_[4:6, 9:19], np.s_[5:14, 8:10], np.s_[5:14, 18:20], np.s_[13:15, 9:19]]
    bars += [np.s_[14:23, 8:10], np.s_[14:23, 18:20], np.s_[22:24, 9:19]]
    lit = ["012456", "25", "02346", "02356", "1235", "01356", "013456", "025", "0123456", "012356"]
    images = np.zeros((10, 28, 28), dtype=np.float32)
    for image, numbers in zip(images, lit):
        for number in numbers:
            image[bars[int(number)]] = 1
    return images


def write_heatmaps(folder: RunFolder, seed: int, *, first: int = 0) -> None:
    generator = np.random.default_rng(seed)
    signs = digits()
    arrays: dict[str, Any] = {"splits": np.array(SPLITS), "classes": np.array(CLASSES), "explainer": np.array("lrp")}
    for number, split in enumerate(SPLITS):
        label = np.arange(SAMPLES)
        colours = np.roll(
            [[255 * (c >> k & 1) for k in range(3)] for c in (1, 2, 3, 4, 5, 6, 7, 1, 2, 4)], number, axis=0
        )
        arrays[f"image_{split}"] = (signs[..., None] * colours[:, None, None]).astype(np.uint8)
        arrays[f"index_{split}"] = first + label
        arrays[f"label_{split}"] = label
        arrays[f"prediction_{split}"] = np.where(generator.random(SAMPLES) < 0.7, label, (label + 1) % 10)
        arrays[f"map_{split}"] = (signs * generator.normal(0.3, 1, signs.shape)).astype(np.float32)
        arrays[f"teacher_map_{split}"] = (signs * generator.normal(0.6, 1, signs.shape)).astype(np.float32)
        arrays[f"teacher_prediction_{split}"] = label
    with atomic_path(folder.heatmaps) as path:
        np.savez(path, **arrays)


def write_metrics(folder: RunFolder, seed: int, term: str) -> None:
    records: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = 2 * 0.99**step + 0.1 * np.cos(step + seed) ** 2
        records.append({"event": "step", "stage": "train", "step": step, "steps": STEPS, "terms": {term: loss}})
        if step % 100 == 0:
            told = {"metrics": {"loss": loss, "acc": step / STEPS}, "terms": {term: loss}}
            records.append({"event": "valid", "stage": "train", "step": step, **told})
    folder.append_metrics(records)


def make_run(folder: RunFolder, variant: str, seed: int) -> dict[str, Any]:
    """A finished run, as far as a report looks."""
    config = config_of(variant, seed)
    write_text(folder.config, yaml.safe_dump(config))
    write_metrics(folder, seed, "reason <b>" if variant.startswith("lrp") else "label")
    write_heatmaps(folder, seed)
    rows = rows_of(variant, "student", seed, accuracies(variant, seed))
    rows += rows_of(variant, "teacher", seed, {"iid": 0.96, "ood": 0.95, "shift": 0.955})
    results = results_of(rows, [cell_of(variant, seed, ".")], config)
    write_json(folder.results, results)
    return results


def make_suite(path: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> SuiteFolder:
    """Four variants, one of them a choice between two settings, one cell failed and one flagged."""
    suite = SuiteFolder.create(path, {"name": "fake"}, resume=False)
    rows, cells = [], []
    for seed in seeds:
        for variant in VARIANTS:
            run = suite.run(variant, seed)
            place = run.path.relative_to(suite.path).as_posix()
            if (variant, seed) == ("output", seeds[-1]):
                error = 'Traceback\n  File "x.py"\nRunError: the loss is <nan> at step 3'
                cells.append(cell_of(variant, seed, place, status="failed", error=error, steps=None, time={}))
                continue
            flags = ["The distillation loss is low while accuracy is low."] if variant == "lrp lr=0.03" else []
            rows += make_run(run, variant, seed)["rows"]
            cells.append(cell_of(variant, seed, place, warnings=flags))
    base = {key: value for key, value in config_of("erm", 0).items() if key not in ("name", "variant", "seed")}
    config = {"name": "fake", "seeds": list(seeds), "variants": {name: {} for name in VARIANTS}, "base": base}
    settings = [
        {
            "variant": f"lrp lr={lr}",
            "value": lr,
            "valid_loss": 0.4,
            "valid_acc": 0.93,
            "admitted": True,
            "chosen": lr < 0.02,
        }
        for lr in (0.01, 0.03)
    ]
    results = results_of(rows, cells, config)
    results["suite"] = {
        "name": "fake",
        "title": "Coloured digits, a rehearsal",
        "description": "Numbers that nobody measured.",
        "reference": "erm",
        "seeds": list(seeds),
        "grids": [{"method": "LRP", "key": "training.lr", "rule": "the lowest validation loss", "settings": settings}],
        "curves": [
            {
                "title": "Shift accuracy against learning rate",
                "key": "training.lr",
                "metric": "acc",
                "split": "shift",
                "series": {EVIL: [["lrp lr=0.01", 0.01], ["lrp lr=0.03", 0.03]]},
            }
        ],
    }
    write_json(suite.results, results)
    return suite


# Reading a page -----------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Every element with its attributes, and the page's words without style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    def all(self, tag: str, class_: str | None = None) -> list[dict[str, str]]:
        return [
            a for name, a in self.elements if name == tag and (class_ is None or class_ in a.get("class", "").split())
        ]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SuiteFolder:
    return make_suite(tmp_path_factory.mktemp("suite") / "out")


@pytest.fixture(scope="module")
def page(suite: SuiteFolder) -> str:
    assert build_report(suite.path) == suite.report
    return suite.report.read_text()


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    return Elements(page)


def without_times(page: str) -> str:
    return re.sub(r"<span data-time>.*?</span>", "", page)


# What must hold -----------------------------------------------------------------------------------------------


def test_the_page_loads_nothing(page: str, elements: Elements):
    loads = [
        a[name] for _, a in elements.elements for name in ("src", "srcset", "data", "poster", "action") if name in a
    ]
    loads += [a["href"] for tag, a in elements.elements if tag in ("link", "use", "image", "base") and "href" in a]
    assert loads and all(load.startswith("data:") for load in loads)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in elements.elements}
    assert not re.search(r"url\(|@import", page)
    policy = elements.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy" and policy["content"].startswith("default-src 'none'")


def test_names_are_words_and_never_markup(page: str, elements: Elements):
    assert EVIL not in page and "<b>" not in re.sub(r'<b (class|aria-hidden)="', "", page)
    assert EVIL in elements.text
    assert any(EVIL in a.get("alt", "") for a in elements.all("img"))
    assert any(EVIL in a.get("aria-label", "") for a in elements.all("svg"))
    assert not [name for _, a in elements.elements for name in a if name.startswith("on")]


def test_the_same_folder_gives_the_same_bytes(suite: SuiteFolder, page: str):
    build_report(suite.path)
    assert suite.report.read_text() == page


def test_times_are_the_only_thing_that_a_resumed_run_changes(suite: SuiteFolder, page: str):
    results = read_json(suite.results)
    later = copy.deepcopy(results)
    later["environment"]["time"]["started"] = "2002-02-02 02:02:02"
    for cell in later["cells"]:
        cell["time"] = {"train_seconds": 500.0 * (1 + cell["seed"])} if cell["time"] else {}
    write_json(suite.results, later)
    build_report(suite.path)
    changed = suite.report.read_text()
    write_json(suite.results, results)
    assert changed != page
    assert without_times(changed) == without_times(page)


def test_the_page_stays_small(page: str):
    assert len(page.encode()) < 1_000_000


def test_what_went_wrong_comes_before_any_number(elements: Elements):
    text = elements.text
    assert "Output & more, seed 2 – failed: Traceback … RunError: the loss is <nan> at step 3" in text
    flag = text.index("LRP, lr 0.03, seeds 0, 1, 2 – The distillation loss is low")
    assert flag > text.index("Settings tried"), "it was not chosen"
    assert text.index("Read this first") < text.index("The numbers")


def test_variants_that_warn_of_the_same_share_a_notice():
    titles = {"a": "KD", "b": "e2KD", "c": "ERM"}
    said = [("a", 0, "No figures."), ("b", 0, "No figures."), ("c", 1, "No figures."), ("a", 1, "A."), ("b", 1, "B.")]
    cells = [{"variant": variant, "seed": seed, "warnings": [text]} for variant, seed, text in said]
    assert [(n.about, n.text) for n in notices.flags(cells[:3], titles)] == [
        ("KD; e2KD, seed 0", "No figures."),
        ("ERM, seed 1", "No figures."),
    ]
    assert [n.about for n in notices.flags(cells, titles)] == ["KD, seeds 0, 1", "e2KD, seeds 0, 1", "ERM, seed 1"]


def test_the_table_tells_supervision_rule_interval_and_missing_seeds(elements: Elements):
    shift = [accuracies("lrp lr=0.01", seed)["ood"] for seed in range(3)]
    half = 4.302652729911275 * statistics.stdev(shift) / 3**0.5
    assert f"{100 * statistics.fmean(shift):.1f} ± {100 * half:.1f}" in elements.text
    for words in ("labels only", "a teacher", "lowest validation loss", "2 of 3 seeds", "95 % Student t"):
        assert words in elements.text
    assert "12.3" not in elements.text  # a group's accuracy is not the split's


def test_the_settings_show_rule_and_choice_and_the_headline_only_the_chosen(elements: Elements):
    headline = elements.text[elements.text.index("The numbers") : elements.text.index("Where the models look")]
    assert EVIL in headline and "LRP, lr 0.03" not in headline
    assert "The rule for choosing: the lowest validation loss." in elements.text
    assert len(elements.all("tr", "chosen")) == 1


def test_the_maps_show_every_student_and_the_teacher_on_the_same_samples(elements: Elements):
    alts = [image["alt"] for image in elements.all("img") if "says" in image["alt"]]
    shown = 3 + 1  # students and the teacher; the setting that was not chosen has none
    assert len(alts) == shown * len(SPLITS) * SAMPLES
    wrong = [alt for alt in alts if alt.endswith("wrong")]
    assert wrong and len(wrong) == len(elements.all("div", "wrong"))


def test_every_loss_term_of_every_shown_variant_has_a_panel(elements: Elements):
    told = [svg.get("aria-label", "") for svg in elements.all("svg", "plot")]
    assert sum(label.startswith("Loss term: label") for label in told) == 2
    assert sum(label.startswith("Loss term: reason <b>") for label in told) == 1
    assert sum(label.startswith("Validation accuracy") for label in told) == len(VARIANTS) - 1  # one was not chosen


def test_the_settings_on_the_page_are_a_config_file_again(suite: SuiteFolder, page: str):
    config = read_json(suite.results)["config"]
    shown = yaml.safe_load(_settings(page))
    assert shown == flat_config(config)
    assert "base" not in shown and shown["training"]["lr"] == 0.01


def _settings(page: str) -> str:
    found = re.search(r"<summary>Settings</summary><pre>(.*?)</pre>", page, flags=re.DOTALL)
    assert found
    return Elements(f"<pre>{found[1]}</pre>").words[0]


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path):
    suite = make_suite(tmp_path / "suite", seeds=(7,))
    elements = Elements(build_report(suite.path).read_text())
    assert "There is one seed, so no number has an interval" in elements.text
    assert not re.search(r"\d ± \d", elements.text)
    headline = elements.text[elements.text.index("The numbers") : elements.text.index("Where the models look")]
    assert "Output & more a teacher lowest validation loss failed failed failed failed" in headline


def test_what_cannot_be_applied_stands_in_the_tables_and_is_no_warning(tmp_path: Path):
    suite = make_suite(tmp_path / "suite", seeds=(0,))
    results, reason = read_json(suite.results), "needs <masks>; coloured-digits gives none"
    told = {"status": "n/a", "error": reason, "steps": None, "time": {}, "title": "RRR", "needs": ["mask"]}
    results["cells"].append({**results["cells"][0], **told, "variant": "rrr", "folder": "runs/rrr/seed-0"})
    write_json(suite.results, results)
    elements = Elements(build_report(suite.path).read_text())
    headline = elements.text[elements.text.index("The numbers") : elements.text.index("Where the models look")]
    assert f"RRR {reason} masks – N/A N/A N/A N/A N/A" in headline
    assert "RRR" not in elements.text[: elements.text.index("What was run")]


def test_a_report_writes_the_tables_of_a_suite(tmp_path: Path):
    suite = make_suite(tmp_path / "suite", seeds=(0, 1))
    results = read_json(suite.results)
    worst = [{**row, "metric": "acc_wg"} for row in results["rows"] if row["metric"] == "acc" and not row["group"]]
    write_json(suite.results, {**results, "rows": [*results["rows"], *worst]})
    elements = Elements(build_report(suite.path).read_text())
    assert "shift, worst group, against ERM (points)" in elements.text
    for suffix, told in (("md", "Accuracy over groups"), ("csv", "shift_acc_wg_percent"), ("tex", "IID & OOD & Shift")):
        text = suite.table(suffix).read_text()
        assert told in text and ("erm" if suffix == "csv" else "ERM") in text
        assert ("LRP, lr 0.03" in text) == (suffix != "tex"), "a paper's table has the chosen settings alone"


def under_conditions(results: dict[str, Any]) -> dict[str, Any]:
    """The same results three times, each under a condition with a teacher of its own."""
    rows, cells, conditions = [], [], []
    for number, name in enumerate(("few", "some", "many")):
        conditions.append({"name": name, "title": f"{name} samples", "reference": f"erm @ {name}"})
        teacher = "teacher" if number == 0 else f"teacher-{name}"
        for old in results["rows"]:
            variant = teacher if old["model"] == "teacher" else f"{old['variant']} @ {name}"
            worth = old["value"] - 0.1 * number if old["metric"] == "acc" else old["value"]
            rows.append({**old, "variant": variant, "value": worth})
        for old in results["cells"]:
            title = f"{old['title']}, {name} samples"
            about = {"variant": f"{old['variant']} @ {name}", "title": title, "condition": name, "teacher": teacher}
            cells.append({**old, **about, "family": old["variant"]})
    suite = {**results["suite"], "conditions": conditions, "reference": None, "grids": [], "curves": []}
    config = {**results["config"], "variants": {"erm": {"title": "Plain ERM"}}}
    return {**results, "rows": rows, "cells": cells, "suite": suite, "config": config}


def test_each_condition_has_its_tables_and_students_are_set_against_their_teachers(tmp_path: Path):
    suite = make_suite(tmp_path / "suite", seeds=(0, 1))
    write_json(suite.results, under_conditions(read_json(suite.results)))
    elements = Elements(build_report(suite.path).read_text())
    assert elements.text.count("The numbers") == 3
    assert all(f"{name} samples What the shortcut costs" in elements.text for name in ("few", "some", "many"))
    assert "ERM, few samples labels only" not in elements.text, "the heading says so already"
    assert "How good must the teacher be?" in elements.text and "Plain ERM" in elements.text
    markdown, numbers = suite.table("md").read_text(), suite.table("csv").read_text().splitlines()
    assert markdown.index("## few samples") < markdown.index("## some samples") < markdown.index("## many samples")
    assert len(numbers) == 1 + 3 * (1 + len(VARIANTS)) and numbers[1].startswith("teacher,")


def test_without_a_shortcut_accuracy_and_agreement_are_shown(tmp_path: Path):
    suite = make_suite(tmp_path / "suite")
    results = read_json(suite.results)
    rows = [row for row in results["rows"] if row["split"] == "iid"]
    students = [row for row in rows if row["model"] == "student" and row["metric"] == "acc"]
    results["rows"] = rows + [{**row, "metric": "agreement"} for row in students]
    results["data"]["splits"] = {"train": {"size": 20}, "iid": {"size": SAMPLES}}
    write_json(suite.results, results)
    elements = Elements(build_report(suite.path).read_text())
    assert "Accuracy and agreement" in elements.text and "without a planted shortcut" in elements.text
    assert "What the shortcut costs" not in elements.text and "gives the class away" not in elements.text
    told = [svg.get("aria-label", "") for svg in elements.all("svg", "gap-track")]
    assert any(label.startswith("ERM: accuracy 99.0") and "agreement 99.0" in label for label in told)


def test_a_shortcut_that_tells_nothing_in_training_is_not_said_to_give_the_class_away(tmp_path: Path):
    suite = make_suite(tmp_path / "suite")
    results = read_json(suite.results)
    results["data"]["told"] = {"shortcut": "the colour", "asks": {}}
    for power, told in ((0.004, "the colour tells nothing of the class"), (0.006, "the colour gives the class away")):
        results["data"]["shortcut"] = {"train": {"size": 20, "conflicting": 18, "predictive_power": power}}
        write_json(suite.results, results)
        assert f"in which {told}" in Elements(build_report(suite.path).read_text()).text


@pytest.mark.parametrize(
    "cue, asked, heading",
    [
        (None, "Reviews of other things.", "What the shift costs"),
        ("a planted word", "The planted word is another class's.", "What the shortcut costs"),
    ],
)
def test_what_is_said_of_the_data_is_in_the_words_of_the_benchmark(
    cue: str | None, asked: str, heading: str, tmp_path: Path
):
    suite = make_suite(tmp_path / "suite")
    results = read_json(suite.results)
    results["config"]["base"]["model"] = {"name": "hf-text/minilm"}
    results["data"]["told"] = {"shortcut": cue, "asks": {"shift": asked}}
    write_json(suite.results, results)
    elements = Elements(build_report(suite.path).read_text())
    assert asked in elements.text and heading in elements.text and "learn from texts" in elements.text
    assert ("without a planted shortcut" in elements.text) == (cue is None)
    assert ("in which a planted word gives the class away" in elements.text) == (cue is not None)
    usual = "Texts that training never showed." if cue is None else "points to the right class as often"
    assert usual in elements.text, "what the benchmark leaves out is told in general words"


def test_tiers_have_a_table_of_their_own(tmp_path: Path):
    suite = make_suite(tmp_path / "suite")
    results = read_json(suite.results)
    whole = [row for row in results["rows"] if row["metric"] == "acc" and row["group"] is None and row["split"]]
    for tier, less in (("seen", 0.0), ("unseen", 0.1)):
        results["rows"] += [{**row, "tier": tier, "value": row["value"] - less} for row in whole]
    write_json(suite.results, results)
    assert "Accuracy by tier" in Elements(build_report(suite.path).read_text()).text
    with suite.table("csv").open(newline="") as file:
        erm = next(line for line in csv.DictReader(file) if line["variant"] == "erm")
    assert float(erm["iid_acc_unseen_percent"]) == pytest.approx(float(erm["iid_percent"]) - 10)
    assert float(erm["shift_acc_seen_percent"]) == pytest.approx(float(erm["shift_percent"]))


def test_nothing_is_timed_by_what_was_never_trained(tmp_path: Path):
    suite = make_suite(tmp_path / "suite")
    results = read_json(suite.results)
    results["cells"] = [{**cell, "steps": 0 if cell["method"] == "erm" else STEPS} for cell in results["cells"]]
    write_json(suite.results, results)
    assert "Training time is relative" not in Elements(build_report(suite.path).read_text()).text


def test_a_run_folder_has_a_report_too(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    make_run(run, "lrp lr=0.01", 0)
    elements = Elements(build_report(run.path).read_text())
    assert "87.0" in elements.text and EVIL in elements.text
    assert "hansfree run config.yaml" in elements.text
    assert "in 99.5 % of the cases" in elements.text
    assert "Shift against" not in elements.text


def test_a_run_without_maps_curves_or_data_still_reports(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    results = make_run(run, "erm", 0)
    run.heatmaps.unlink()
    run.metrics.unlink()
    write_json(run.results, {key: results[key] for key in ("schema", "rows", "cells", "config")})
    assert "99.0" in build_report(run.path).read_text()


def test_maps_of_other_samples_are_left_out_and_named(tmp_path: Path):
    suite = make_suite(tmp_path / "suite", seeds=(0,))
    write_heatmaps(suite.run("lrp lr=0.01", 0), 0, first=100)
    elements = Elements(build_report(suite.path).read_text())
    assert "its heatmaps show other samples than the rest" in elements.text


def test_every_teacher_is_in_numbers_and_pictures(tmp_path: Path):
    suite = make_suite(tmp_path / "suite", seeds=(0,))
    results = read_json(suite.results)
    students = [row for row in results["rows"] if row["model"] == "student"]
    teachers = [
        row for n in (0, 1) for row in rows_of(f"teacher{n or ''}", "teacher", 0, dict.fromkeys(SPLITS, 0.5 + 0.25 * n))
    ]
    cells = [{**cell, "teacher": f"teacher{'1' if cell['variant'] == 'erm' else ''}"} for cell in results["cells"]]
    write_json(suite.results, {**results, "rows": students + teachers, "cells": cells})
    text = Elements(build_report(suite.path).read_text()).text
    assert "50.0 % right under shift: the teacher of" not in text
    assert "75.0 % right under shift: teacher of ERM" in text and "50.0 % right under shift: teacher" in text
    numbers, maps = text.index("The numbers"), text.index("Where the models look")
    assert "Teacher of ERM" in text[numbers:maps] and text[maps:].count("Teacher of ERM") == len(SPLITS)


@pytest.mark.parametrize("broken", [np.nan, 0.0])
def test_a_map_without_size_is_no_error(tmp_path: Path, broken: float):
    run = RunFolder(tmp_path / "run")
    make_run(run, "erm", 0)
    with np.load(run.heatmaps) as archive:
        arrays = dict(archive)
    arrays["map_iid"][0] = broken
    np.savez(run.heatmaps, **arrays)
    page = build_report(run.path).read_text()
    assert ("no map" in page) == bool(np.isnan(broken))


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="neither"):
        build_report(tmp_path)
    run = RunFolder(tmp_path / "run")
    make_run(run, "erm", 0)
    run.heatmaps.write_bytes(b"PK torn")
    with pytest.raises(UserError, match=r"heatmaps\.npz cannot be read"):
        build_report(run.path)
    run.results.unlink()
    with pytest.raises(UserError, match=r"There is no .*results\.json"):
        build_report(run.path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "small: 40 train"),
        ({"benchmark": {"name": "small", "split_seed": "seed"}}, "small (each seed's own split): 40 train"),
        ({"shots": 1}, "small: 40 train; 1 training sample of each class"),
        ({"shots": "few.txt"}, "small: 40 train; training samples listed in few.txt"),
        (
            {"transfer": {"name": "digits", "limit": 60}},
            "small: 40 train; training and validation images are those of digits (limit 60), without labels",
        ),
        (
            {"shots": 10, "augmentation": {"crop": [0.3, 1.0], "flip": 0.5, "rotation": 0.0, "size": None}},
            "small: 40 train; 10 training samples of each class; training images are cropped to 30 to 100 % of their "
            "area, mirrored with probability 0.5, anew each time",
        ),
        (
            {"augmentation": {"translation": 0.1, "contrast": 0.2, "size": 32, "mixup": 1.0, "rotation": 15}},
            "small: 40 train; training images are turned by up to 15 degrees, moved by up to 10 % of their side, "
            "changed in contrast by up to 20 %, scaled to 32 x 32 pixels, mixed (mixup, alpha 1), anew each time",
        ),
        ({"augmentation": {"flip": 0.0, "ratio": [0.75, 1.33]}}, "small: 40 train"),
        ({"variants": {"a": {"grid": {"shots": [1, 2]}}}}, "small: 40 train; some variants differ"),
        (
            {"shots": 5, "conditions": {"few": {"shots": 1}}, "variants": {"a": {"benchmark.limit": 3}}},
            "small: 40 train; 5 training samples of each class; some variants and conditions differ",
        ),
    ],
)
def test_the_data_are_told_as_training_sees_them(changes: dict[str, Any], said: str):
    data = {"splits": {"train": {"size": 40}}}
    assert dict(facts_of({"benchmark": {"name": "small"}, **changes}, data, [], []))["Data"] == said
