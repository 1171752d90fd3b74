"""What a stored teacher costs: step time, memory on data larger than RAM, bytes; each against nothing at all.

python bench/store.py [--rounds 60] [--threads 1] [--out bench/store.md]

The step is e2kd's with Grad-CAM, a small ResNet on 28 px digits, batches of 64, augmented by crops and flips. Every
round takes one step of each variant on the same batch, so that a busy machine slows all of them alike; the teacher
that costs nothing hands out an answer that was made before the clock started. Times are CPU seconds of the process.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hansfree import freezing
from hansfree.augmentation import Augmentation
from hansfree.benchmarks import ColouredDigits
from hansfree.benchmarks.regimes import augmented
from hansfree.core import Answer, Batch, Benchmark, LiveTeacher, Setup, Teacher
from hansfree.explainers import GradCAM
from hansfree.freezing import Request, freeze
from hansfree.methods import METHODS
from hansfree.methods.class_choice import Top
from hansfree.models import load_model
from hansfree.store import DTYPES, Dtype, Marked, open_store
from hansfree.store.files import CHUNK, SCHEMA, SHARD_BYTES, Store, begin, fields_of, shard_rows

CROPS = Augmentation(crop=(0.3, 1), flip=0.5)


@dataclass
class Ready(Teacher):
    """A teacher whose one answer is at hand."""

    said: Answer

    def view(self, batch):
        """Nobody asks."""
        raise NotImplementedError

    def logits(self, batch):
        """At hand."""
        return self.said.logits

    def answer(self, batch, explainer, rule, draws):
        """At hand."""
        return self.said

    def place(self, device):
        """Nothing to move."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            "# What a stored teacher costs",
            "",
            f"Made by `python bench/store.py --rounds {given.rounds} --threads {given.threads} --out bench/store.md` "
            f"(torch {torch.__version__}).",
            "",
            *(__doc__ or "").split("\n\n")[2].strip().splitlines(),
            "",
            *step_times(Path(folder), given.rounds),
            "",
            *memory(Path(folder) / "large"),
            "",
            *bytes_per_million(),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


def step_times(folder: Path, rounds: int) -> Iterator[str]:
    data = ColouredDigits()
    live = Teacher.live(load_model("small-resnet", num_classes=10, options={"widths": [32, 64, 128], "norm": "batch"}))
    teachers: dict[str, Teacher] = {"a teacher that costs nothing": live}
    for dtype in DTYPES:
        teachers[f"stored, {dtype}"] = stored(folder / dtype, live, data, dtype)
    freezing.SHARD_BYTES = 25_000
    teachers["stored, float16, 14 shards"] = stored(folder / "shards", live, data, "float16")
    teachers["live"] = live
    times = timed({name: method(teacher) for name, teacher in teachers.items()}, live, data, rounds)
    yield from ("| teacher | ms | ratio | 10 % to 90 % | goal |", "|---|--:|--:|---|--:|")
    base = times["a teacher that costs nothing"]
    for name, values in times.items():
        ratios = sorted(value / least for value, least in zip(values, base))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        goal = "≤ 1.05" if name.startswith("stored") else ""
        ms, ratio = 1000 * statistics.median(values), statistics.median(ratios)
        yield f"| {name} | {ms:.1f} | {ratio:.3f} | {low:.2f} to {high:.2f} | {goal} |"


def stored(folder: Path, live: LiveTeacher, data: Benchmark, dtype: Dtype) -> Teacher:
    freeze(live, data, Request((GradCAM(),), dtype=dtype), folder, batch_size=256)
    return open_store(folder, data, sees="input")


def method(teacher: Teacher):
    torch.manual_seed(0)
    student = load_model("small-resnet", num_classes=10, options={"widths": [16, 32, 64], "norm": "batch"})
    data = ColouredDigits().input
    return METHODS["e2kd"](Setup(lambda: student, teacher, 3500, 10, data), explainer=GradCAM())


def timed(methods, live: LiveTeacher, data: Benchmark, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in methods}
    split = Marked(augmented(data, CROPS)).split("train")
    optimisers = {name: torch.optim.AdamW(one.student.parameters(), 1e-3) for name, one in methods.items()}
    for number in range(rounds + 5):
        generator = torch.Generator().manual_seed(number)
        batch: Batch = split.batch(torch.randperm(len(split), generator=generator)[:64], generator)
        ready = Ready(live.answer(batch, GradCAM(), Top(), {}))
        for name, one in methods.items():
            if name == "a teacher that costs nothing":
                one.base._setup = one._setup = Setup(lambda: one.student, ready, 3500, 10, data.input)  # noqa: B023
            start = time.process_time()
            torch.stack(list(one(batch).values())).sum().backward()
            optimisers[name].step()
            optimisers[name].zero_grad()
            if number >= 5:
                times[name].append(time.process_time() - start)
    return times


def memory(folder: Path, batches: int = 300) -> Iterator[str]:
    """Random rows of a store twice as large as RAM (its files are holes), in a process that may not grow."""
    ram = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    store = large(folder, 2 * ram)
    before = status()
    usual = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + 2**28, usual[1]))
    generator, took = np.random.default_rng(0), []
    for _ in range(batches):
        rows = generator.integers(0, store.rows("train"), 64)
        slots = np.zeros(64, np.int64), np.zeros(64, np.int64)
        start = time.perf_counter()
        store.take("train", "map-map", rows, *slots)
        took.append(time.perf_counter() - start)
    resource.setrlimit(resource.RLIMIT_DATA, usual)
    grown = (status()["RssAnon"] - before["RssAnon"]) / 2**20
    size = sum(path.stat().st_size for path in folder.rglob("*.npy")) / 2**30
    ms = 1000 * statistics.median(took)
    yield f"{batches} batches of 64 random rows out of {size:.0f} GiB of 56 x 56 maps (sparse files, float16), on a"
    yield f"machine with {ram / 2**30:.0f} GiB of RAM: the process grew by {grown:.0f} MiB, its data being limited to"
    yield f"256 MiB more than it had; a batch took {ms:.1f} ms (the median; its pages were not cached)."


def large(folder: Path, size: int) -> Store:
    about = {
        "schema": SCHEMA,
        "classes": 10,
        "top_classes": 1,
        "top_logits": None,
        "dtype": "float16",
        "explanations": {"map": {"explainer": {"name": "map"}, "epsilons": None, "shape": [1, 56, 56]}},
        "splits": {"train": {"rows": size // (2 * 56 * 56), "label": {"dtype": "int64", "shape": []}}},
        "chunk": CHUNK,
    }
    return begin(folder, {**about, "shard_rows": shard_rows(fields_of(about, "train"), CHUNK, SHARD_BYTES)})


def status() -> dict[str, int]:
    """What the kernel says of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def bytes_per_million() -> Iterator[str]:
    """Label, class, all logits and one map of the top class, per million images."""
    yield from (
        "GB (10^9 bytes) per million images, for one map of the top class, with label, class and all logits:",
        "",
    )
    yield from ("| map | classes | " + " | ".join(DTYPES) + " |", "|---|--:|" + "--:|" * len(DTYPES))
    for shape, classes in (
        ((1, 7, 7), 10),
        ((1, 7, 7), 1000),
        ((1, 14, 14), 1000),
        ((3, 28, 28), 10),
        ((1, 56, 56), 1000),
        ((1, 224, 224), 1000),
        ((3, 224, 224), 1000),
    ):
        sizes = []
        for dtype in DTYPES:
            about = {
                "classes": classes,
                "top_classes": 1,
                "top_logits": None,
                "dtype": dtype,
                "explanations": {"map": {"epsilons": None, "shape": shape}},
                "splits": {"train": {"label": {"dtype": "int64", "shape": []}}},
            }
            sizes.append(sum(field.bytes for field in fields_of(about, "train").values()) / 1000)
        yield f"| {' x '.join(map(str, shape))} | {classes} | " + " | ".join(f"{size:.3g}" for size in sizes) + " |"


if __name__ == "__main__":
    main()
