"""Making a store: a teacher's logits and maps of whole splits, once, in several processes, resumable at any chunk."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import save_file

from hansfree.core import TRAINING_SPLITS, Batch, Benchmark, Classifier, Explainer, Teacher
from hansfree.errors import RunError, UserError, unknown
from hansfree.experiment import make_teacher
from hansfree.models.loading import last_layer
from hansfree.parts import RunConfig, make_stored_data
from hansfree.runs import RunFolder, atomic_path
from hansfree.store import Dtype, Store
from hansfree.store.answers import HEAD, IMAGES
from hansfree.store.files import (
    CHUNK,
    SCHEMA,
    SHARD_BYTES,
    begin,
    chunks,
    done,
    encoded,
    fields_of,
    finish,
    is_finished,
    open_files,
    shard_rows,
    write,
)
from hansfree.store.identity import data_of, described, digest_of_model, images_of, record_of, split_epsilon
from hansfree.training import make_accelerator

Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@final
@dataclass(frozen=True)
class Request:
    """What to store."""

    explainers: tuple[Explainer, ...] = ()
    epsilons: tuple[float, ...] = ()
    """Of every explainer that has an epsilon; empty: its own, which must then be a number."""
    classes: int | None = 1
    """Maps of so many classes of each sample, the likeliest first; None: of all."""
    top_logits: int | None = None
    """So many of the largest logits; None: all."""
    dtype: Dtype = "float16"
    """Of the maps; logits are float32 where maps are, else float16."""
    tests: tuple[str, ...] = ()
    """Splits to store besides train and valid."""


def make_store(
    config: RunConfig,
    request: Request,
    out: Path,
    *,
    jobs: int = 1,
    batch_size: int = 64,
    device: str | None = None,
    watch: Watch = lambda what, done, total: None,
) -> Store:
    """Store the answers of the teacher of ``config`` about its data, as they are without augmentation, in ``out``.

    Goes on where it was stopped. Raises ``UserError`` for what cannot be replayed, ``RunError`` where a process dies.
    """
    config = _alone(config)
    benchmark = make_stored_data(config)
    teacher = make_teacher(config, benchmark, out, device=device, on_step=watch)
    assert teacher is not None and config.teacher is not None
    if config.teacher.train is not None:  # the other processes must not train it again
        trained = config.teacher.model_copy(update={"train": None, "path": str(RunFolder(out / "teacher").exported)})
        config = config.model_copy(update={"teacher": trained})
    place = make_accelerator(device=device).device
    teacher.place(place)
    if jobs == 1:
        return freeze(teacher, benchmark, request, out, batch_size=batch_size, watch=watch)
    with _making(teacher, benchmark, request, out, watch) as store:
        if any(waiting(store)):
            _in_processes(config, request, store, jobs, batch_size, str(place), watch)
    return open_files(out)


def freeze(
    teacher: Teacher,
    benchmark: Benchmark,
    request: Request,
    out: Path,
    *,
    batch_size: int = 64,
    watch: Watch = lambda what, done, total: None,
) -> Store:
    """Store the answers of a live ``teacher`` about ``benchmark`` in ``out``; goes on where it was stopped."""
    with _making(teacher, benchmark, request, out, watch) as store:
        for split, rows in waiting(store):
            answer_chunk(store, teacher, benchmark, request, split, rows, batch_size)
            watch("samples", *_progress(store))
    return open_files(out)


@contextmanager
def _making(teacher: Teacher, benchmark: Benchmark, request: Request, out: Path, watch: Watch) -> Iterator[Store]:
    """A store that is begun, and finished when the block ends well."""
    store = begin(out, planned(teacher, benchmark, request))
    if not is_finished(store):
        _write_small(store, teacher, benchmark)
    yield store
    finish(store, lambda done, total: watch("checksums", done, total))


def _alone(config: RunConfig) -> RunConfig:
    """``config`` with a teacher that answers each image by itself. Raises ``UserError`` where it does not."""
    source = config.teacher
    if source is None or [source.path, source.model, source.train].count(None) == 3:
        raise UserError("A store needs the teacher itself; give teacher.path, model or train.")
    if source.statistics == "batch":
        raise UserError(
            "The answers of a teacher with statistics: batch depend on the whole batch and cannot be stored; "
            "use teacher.statistics: running."
        )
    if config.teacher_input == "recombine":
        raise UserError(
            "teacher_input: recombine shows the teacher other images of the batch, so that its answers cannot be "
            "stored; use teacher_input: noise, mean or black."
        )
    return config.model_copy(update={"teacher": source.model_copy(update={"store": None})})


# What it will be


def planned(teacher: Teacher, benchmark: Benchmark, request: Request) -> dict[str, Any]:
    """The description of the store to be made. Raises ``UserError`` for what is unknown or cannot be replayed."""
    names = (*TRAINING_SPLITS, *request.tests)
    for name in names:
        if name not in benchmark.split_names():
            raise unknown("split", name, benchmark.split_names())
    if request.top_logits is not None and not 1 <= request.top_logits < len(benchmark.classes):
        raise UserError(
            f"--top-k-logits {request.top_logits} must be at least 1 and below the {len(benchmark.classes)} classes; "
            "leave it out to keep all logits."
        )
    if request.classes is not None and not 1 <= request.classes <= len(benchmark.classes):
        raise UserError(
            f"--classes top-{request.classes} asks for more than the {len(benchmark.classes)} classes; use all."
        )
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "hansfree": version("hansfree"),
        "teacher": {
            "name": teacher.model.config.get("architecture") if isinstance(teacher.model, Classifier) else None,
            "sha256": digest_of_model(teacher.model),
            "sees": teacher.sees,
        },
        "classes": len(benchmark.classes),
        "top_classes": len(benchmark.classes) if request.classes is None else request.classes,
        "top_logits": request.top_logits,
        "dtype": request.dtype,
        "explanations": explained(teacher, benchmark, request),
        "image": dataclasses.asdict(benchmark.input),
        "record": record_of(benchmark),
        "splits": {name: data_of(benchmark.split(name)) for name in dict.fromkeys(names)},
    }
    about["chunk"] = CHUNK
    about["shard_rows"] = shard_rows(fields_of(about, "train"), CHUNK, SHARD_BYTES)
    return json.loads(json.dumps(about))


def explained(teacher: Teacher, benchmark: Benchmark, request: Request) -> dict[str, Any]:
    """By a name of its own, each explainer's settings, the epsilons that are stored, and the shape of its maps."""
    told: dict[str, Any] = {}
    batch = _on(teacher, benchmark.split("train").batch(torch.arange(1)))
    for explainer in request.explainers:
        settings, _ = split_epsilon(explainer)
        frozen = fixed(explainer, request.epsilons)
        with torch.no_grad():
            map = frozen[0](teacher.model, teacher.view(batch), torch.zeros_like(batch.index)[:, None]).map
        if map.ndim != 5:
            raise UserError(f"Maps of {settings['name']} have shape {list(map.shape)} and are no images; store others.")
        name, number = settings["name"].replace(":", "."), 2
        while name in told:
            name, number = f"{settings['name'].replace(':', '.')}-{number}", number + 1
        epsilons = [described(one)["epsilon"] for one in frozen] if "epsilon" in described(explainer) else None
        told[name] = {"explainer": settings, "epsilons": epsilons, "shape": list(map.shape[2:])}
    return told


def fixed(explainer: Explainer, epsilons: Sequence[float]) -> list[Explainer]:
    """``explainer`` with each of ``epsilons``, nothing left to chance. Raises ``UserError`` where something is."""
    settings, epsilon = split_epsilon(explainer)
    if "epsilon" in described(explainer) and epsilons:
        return [dataclasses.replace(explainer, epsilon=one) for one in epsilons]  # pyright: ignore[reportArgumentType]
    if isinstance(epsilon, tuple):
        low, high = epsilon
        raise UserError(
            f"{settings['name']} draws its epsilon from {low} to {high} for each sample anew, which cannot be "
            f"replayed; say which ones to store, such as --epsilon {low} --epsilon {high}."
        )
    if explainer.draw(1):
        raise UserError(
            f"{settings['name']} draws {', '.join(explainer.draw(1))} for each sample anew, which cannot be replayed; "
            "store another explainer."
        )
    return [explainer]


# Answers


def _write_small(store: Store, teacher: Teacher, benchmark: Benchmark) -> None:
    images = {name: images_of(benchmark.split(name)).contiguous() for name in store.splits}
    with atomic_path(store.path / IMAGES) as path:
        save_file(images, path)
    try:
        layer = last_layer(teacher.head, "teacher")
    except UserError:
        return  # reading the store says so where a student asks for it
    with atomic_path(store.path / HEAD) as path:
        save_file({name: value.cpu().contiguous() for name, value in layer.state_dict().items()}, path)


def waiting(store: Store) -> Iterator[tuple[str, range]]:
    """Split and rows of each chunk that is not done yet."""
    for split in () if is_finished(store) else store.splits:
        marks = done(store, split)
        yield from ((split, rows) for number, rows in enumerate(chunks(store, split)) if not marks[number])


@torch.no_grad()
def answer_chunk(
    store: Store, teacher: Teacher, benchmark: Benchmark, request: Request, split: str, rows: range, batch_size: int
) -> None:
    """Ask the teacher about ``rows`` of ``split`` and write what it says."""
    parts = [
        answers(teacher, _on(teacher, benchmark.split(split).batch(index)), store, request)
        for index in torch.arange(rows.start, rows.stop).split(batch_size)
    ]
    write(store, split, rows, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def answers(teacher: Teacher, batch: Batch, store: Store, request: Request) -> dict[str, np.ndarray]:
    """Every field of the batch's rows, as it is kept."""
    about = store.about
    # Classes are chosen from the logits as a reader will see them: rounding must not change which one is the top.
    logits = teacher.logits(batch).float().to(torch.float32 if about["dtype"] == "float32" else torch.float16)
    order = logits.float().sort(stable=True, dim=1, descending=True).indices
    target = order[:, : about["top_classes"]]
    fields = {"label": batch.label, "class": target.int(), "logits": logits}
    if about["top_logits"] is not None:
        top, rest = order.split([about["top_logits"], about["classes"] - about["top_logits"]], 1)
        others = logits.float().gather(1, rest)
        share = others.logsumexp(1) - np.log(others.shape[1])
        fields |= {"logits": logits.gather(1, top), "logits-class": top.int(), "logits-rest": share}
    values = {name: value.cpu().numpy() for name, value in fields.items()}
    for name, explainer in zip(about["explanations"], request.explainers):
        frozen = fixed(explainer, request.epsilons)
        maps = torch.stack([one(teacher.model, teacher.view(batch), target).map for one in frozen], 1).float().cpu()
        if not maps.isfinite().all():
            raise RunError(f"{name} has maps with values that are not finite; store another explainer.")
        values[f"{name}-map"], scale = encoded(maps, about["dtype"])
        if scale is not None:
            values[f"{name}-scale"] = scale
    return values


def _on(teacher: Teacher, batch: Batch) -> Batch:
    first = next(iter(teacher.model.state_dict().values()), torch.empty(0))
    return batch.to(first.device)


# Several processes


def _in_processes(
    config: RunConfig, request: Request, store: Store, jobs: int, batch_size: int, device: str, watch: Watch
) -> None:
    context = get_context("spawn")
    said = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [
        context.Process(
            target=_work,
            args=(config.model_dump(), request, store.path, store.about, rank, jobs, batch_size, device, threads, said),
            daemon=True,
        )
        for rank in range(jobs)
    ]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            watch("samples", *_progress(store))
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    watch("samples", *_progress(store))
    failed = next((worker.exitcode for worker in workers if worker.exitcode), None)
    if failed is not None:
        reason = f"A process that stores answers died (exit status {failed})" if said.empty() else said.get()
        raise RunError(f"{reason}; what is done is kept in {store.path}, and the same command goes on from there.")


def _work(
    config: dict[str, Any],
    request: Request,
    path: Path,
    about: dict[str, Any],
    rank: int,
    jobs: int,
    batch_size: int,
    device: str,
    threads: int,
    said: "SimpleQueue[str]",
) -> None:
    """Each chunk whose number leaves ``rank`` when divided by ``jobs``; gives up when its parent has gone."""
    parent = os.getppid()
    torch.set_num_threads(threads)
    try:
        parsed, store = RunConfig.model_validate(config), Store(path, about)
        benchmark = make_stored_data(parsed)
        teacher = make_teacher(parsed, benchmark, path)
        assert teacher is not None
        if digest_of_model(teacher.model) != about["teacher"]["sha256"]:
            raise UserError("The teacher has other weights in each process; export it and name it as teacher.path")
        teacher.place(device)
        for split, rows in waiting(store):
            if os.getppid() != parent:
                return
            if rows.start // about["chunk"] % jobs == rank:
                answer_chunk(store, teacher, benchmark, request, split, rows, batch_size)
    except (UserError, RunError) as error:
        said.put(str(error).removesuffix("."))
        raise SystemExit(1) from None


def _progress(store: Store) -> tuple[int, int]:
    """Samples that are done, up to a last chunk that is not full, and samples in all."""
    rows, chunk = {split: store.rows(split) for split in store.splits}, store.about["chunk"]
    return sum(min(int(done(store, split).sum()) * chunk, rows[split]) for split in rows), sum(rows.values())


def asked_classes(text: str) -> int | None:
    """How many classes ``top``, ``top-K`` or ``all`` (None) means."""
    if text == "all":
        return None
    _, dash, count = text.partition("-")
    if text == "top":
        return 1
    if text.startswith("top-") and dash and count.isdigit() and int(count) > 0:
        return int(count)
    raise UserError(f"--classes {text} is neither top, top-K (such as top-2) nor all; write one of these.")


def size_in_words(store: Store) -> list[str]:
    """What a store holds, line by line: splits, what is kept of each sample, and bytes per million of them."""
    about = store.about
    rows = {split: store.rows(split) for split in store.splits}
    lines = [f"{split}: {count:,} samples" for split, count in rows.items()]
    per_sample = {name: field.bytes for name, field in fields_of(about, next(iter(rows))).items()}
    lines += [f"{name}: {count:,} bytes per sample" for name, count in per_sample.items()]
    million = sum(per_sample.values()) / 1000
    return [*lines, f"{store.bytes:,} bytes in all; {million:,.3g} GB per million samples"]
