"""The files of a store: fields cut into shards, a description, checksums. Nothing half-written counts as done.

While a store is being made, ``plan.json`` says what it will be and ``SPLIT/done.npy`` has one byte per chunk of rows,
set after the chunk's values have reached the disk. ``meta.json``, the plan with the checksums of all files, is written
last and makes a store of the folder.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, final, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hansfree.errors import RunError, UserError
from hansfree.runs import atomic_path, difference, read_json, write_json

SCHEMA = 1
CHUNK = 256
"""Rows that are computed and marked as done together."""
SHARD_BYTES = 2**30
"""No file is larger, unless a single chunk is."""
HASHED_WHEN_OPENED = 2**28
"""Stores up to this size are compared with their checksums whenever they are opened; see :func:`open_files`."""

Dtype = Literal["float32", "float16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""How maps are kept. float16 and int8 share one float32 scale per map, so that no value is too large or too small."""
_LARGEST = {"float16": 1.0, "int8": 127.0}


# Numbers


def encoded(maps: Float[Tensor, "*n c h w"], dtype: Dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """``maps`` as they are kept, and the scale [*n] of each: value = kept * scale. No scale for float32."""
    if dtype == "float32":
        return maps.numpy(), None
    scale = maps.abs().amax((-3, -2, -1)) / _LARGEST[dtype]
    kept = maps / torch.where(scale > 0, scale, 1.0)[..., None, None, None]
    return (kept.round() if dtype == "int8" else kept).numpy().astype(dtype), scale.numpy()


def decoded(kept: np.ndarray, scale: np.ndarray | None) -> Float[Tensor, "*n c h w"]:
    """What :func:`encoded` was given, up to rounding."""
    maps = torch.from_numpy(kept).float()
    return maps if scale is None else maps * torch.from_numpy(scale)[..., None, None, None]


# Fields


class Field(NamedTuple):
    """One array of a split: what each row holds."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Per row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def fields_of(about: Mapping[str, Any], split: str) -> dict[str, Field]:
    """The arrays that a store with the description ``about`` keeps of ``split``, by name."""
    small = "float32" if about["dtype"] == "float32" else "float16"
    top, classes = about["top_logits"], about["top_classes"]
    label = about["splits"][split]["label"]
    fields = {
        "label": Field(label["dtype"], tuple(label["shape"])),
        "class": Field("int32", (classes,)),
        "logits": Field(small, (about["classes"] if top is None else top,)),
    }
    if top is not None:
        fields |= {"logits-class": Field("int32", (top,)), "logits-rest": Field("float32", ())}
    for name, told in about["explanations"].items():
        each = (len(told["epsilons"] or [None]), classes)
        fields[f"{name}-map"] = Field(about["dtype"], (*each, *told["shape"]))
        if about["dtype"] != "float32":
            fields[f"{name}-scale"] = Field("float32", each)
    return fields


def shard_rows(fields: Mapping[str, Field], chunk: int, limit: int) -> int:
    """Rows per shard: whole chunks, as many as keep the largest field's file below ``limit`` bytes."""
    return max(1, limit // max(field.bytes for field in fields.values()) // chunk) * chunk


# Reading


@final
@dataclass(frozen=True, eq=False)
class Store:
    """A folder with a description ``about``, whose arrays are opened when they are first read."""

    path: Path
    about: Mapping[str, Any] = field(repr=False)
    _open: dict[Path, np.memmap] = field(default_factory=dict, repr=False)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it holds answers for."""
        return tuple(self.about["splits"])

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(told["bytes"] for told in self.about["files"].values())

    def rows(self, split: str) -> int:
        """How many samples ``split`` has."""
        return self.about["splits"][split]["rows"]

    def shard(self, split: str, name: str, number: int, mode: Literal["r", "r+"] = "r") -> np.memmap:
        """One file as an array, [rows of the shard, ...]."""
        path = shard_path(self.path, split, name, number)
        if path not in self._open:
            self._open[path] = np.load(path, mmap_mode=mode)
            if self._outgrows_memory:
                _read_no_more_than_asked(self._open[path])
        return self._open[path]

    @cached_property
    def _outgrows_memory(self) -> bool:
        """Whether the arrays cannot all stay in the page cache. Otherwise reading ahead fills it sooner."""
        per_sample = {split: sum(f.bytes for f in fields_of(self.about, split).values()) for split in self.splits}
        return 2 * sum(self.rows(split) * count for split, count in per_sample.items()) > _memory()

    def take(self, split: str, name: str, rows: np.ndarray, *slots: np.ndarray) -> np.ndarray:
        """A copy of rows of a field; ``slots`` [b] choose along the next dimensions, so that no more is read."""
        shard, row = np.divmod(rows, self.about["shard_rows"])
        if len(rows) == 0 or (shard == shard[0]).all():
            number = 0 if len(rows) == 0 else int(shard[0])
            return np.asarray(self.shard(split, name, number)[row, *slots])
        first = self.shard(split, name, int(shard[0]))
        result = np.empty((len(rows), *first.shape[1 + len(slots) :]), first.dtype)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            chosen = (slot[here] for slot in slots)
            result[here] = self.shard(split, name, int(number))[row[here], *chosen]
        return result


def _memory() -> int:
    """Bytes of this machine's memory, or 0 where it does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _read_no_more_than_asked(array: np.memmap) -> None:
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # else the system reads 128 KiB around each row


def shard_path(folder: Path, split: str, name: str, number: int) -> Path:
    """Where a shard stands."""
    return folder / split / f"{name}-{number:05d}.npy"


def open_files(folder: Path | str) -> Store:
    """The finished store in ``folder``, its files' sizes compared with the description, and what they hold too where
    all are below ``HASHED_WHEN_OPENED`` bytes together (``hansfree store check`` always does).

    Raises ``UserError`` that names the folder or the file and the remedy.
    """
    folder = Path(folder)
    if (folder / "plan.json").is_file() and not (folder / "meta.json").is_file():
        raise UserError(f"The store {folder} is not finished; go on with the `hansfree store make` that began it.")
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder} holds no store (no meta.json there); make one with `hansfree store make`.")
    about = read_json(folder / "meta.json")
    if not isinstance(about, dict) or about.get("schema") != SCHEMA or not isinstance(about.get("files"), dict):
        raise UserError(f"{folder / 'meta.json'} is not a store's of schema {SCHEMA}; {_RESTORE}.")
    store = Store(folder, about)
    for path, told in about["files"].items():
        _check_size(folder / path, told["bytes"])
    if store.bytes <= HASHED_WHEN_OPENED:
        check_sums(store)
    return store


def check_sums(store: Store, watch: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Raise ``UserError`` for the first file whose SHA-256 is not the description's; ``watch`` is told bytes."""
    done = 0
    for path, told in store.about["files"].items():
        _check_size(store.path / path, told["bytes"])
        if sha256(store.path / path) != told["sha256"]:
            raise UserError(f"{store.path / path} was altered: its SHA-256 is not that of meta.json; {_RESTORE}.")
        done += told["bytes"]
        watch(done, store.bytes)


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing from its store; {_RESTORE}.")
    size = path.stat().st_size
    if size != expected:
        what = "truncated" if size < expected else "altered"
        raise UserError(f"{path} is {what}: it has {size:,} of its {expected:,} bytes; {_RESTORE}.")


_RESTORE = "restore it, or delete the store's folder and make it again"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing


def begin(folder: Path, plan: Mapping[str, Any]) -> Store:
    """Claim ``folder`` for ``plan`` and lay out its files; one that was begun for the same plan goes on.

    Raises ``UserError`` where the folder holds something else.
    """
    for name in ("meta.json", "plan.json"):
        if (folder / name).is_file():
            held = {key: value for key, value in read_json(folder / name).items() if key != "files"}
            if held != plan:
                raise UserError(
                    f"{folder} holds another store ({difference(held, plan)}); choose another --out, or delete it."
                )
            break
    else:
        held = {entry.name for entry in folder.iterdir() if entry.name[0] != "."} if folder.exists() else set()
        if held - {"teacher"}:
            raise UserError(f"{folder} holds other files and no store; choose another --out.")
        write_json(folder / "plan.json", plan)
    store = Store(folder, plan)
    if not is_finished(store):
        for split in store.splits:
            _lay_out(store, split)
    return store


def is_finished(store: Store) -> bool:
    """Whether its description was written, after everything else."""
    return (store.path / "meta.json").is_file()


def _lay_out(store: Store, split: str) -> None:
    rows, stride = store.rows(split), store.about["shard_rows"]
    for name, told in fields_of(store.about, split).items():
        for number in range(math.ceil(rows / stride)):
            shape = (min(stride, rows - number * stride), *told.shape)
            _create(shard_path(store.path, split, name, number), told.dtype, shape)
    _create(store.path / split / "done.npy", "uint8", (math.ceil(rows / store.about["chunk"]),))


def _create(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    if not path.exists():
        with atomic_path(path) as temporary:
            np.lib.format.open_memmap(temporary, "w+", dtype, shape)


def done(store: Store, split: str) -> np.memmap:
    """One byte per chunk of ``split``, not 0 where the chunk is on the disk."""
    return np.load(store.path / split / "done.npy", mmap_mode="r+")


def chunks(store: Store, split: str) -> Iterator[range]:
    """The rows of each chunk."""
    rows, chunk = store.rows(split), store.about["chunk"]
    return (range(start, min(start + chunk, rows)) for start in range(0, rows, chunk))


def write(store: Store, split: str, rows: range, values: Mapping[str, np.ndarray]) -> None:
    """Put the values of one chunk on the disk, and only then count it as done."""
    number, start = divmod(rows.start, store.about["shard_rows"])
    for name, array in values.items():
        shard = store.shard(split, name, number, "r+")
        shard[start : start + len(rows)] = array
        shard.flush()
    marks = done(store, split)
    marks[rows.start // store.about["chunk"]] = 1
    marks.flush()


def finish(store: Store, watch: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write ``meta.json`` with the checksums of all files. Raises ``RunError`` where a chunk is missing."""
    if not is_finished(store):
        for split in store.splits:
            if not done(store, split).all():
                raise RunError(f"The store {store.path} lacks rows of {split}; run the same command again to go on.")
        paths = [path for path in _files(store) if path.name != "done.npy"]
        told: dict[str, Any] = {}
        for number, path in enumerate(paths, 1):
            told[path.relative_to(store.path).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            watch(number, len(paths))
        write_json(store.path / "meta.json", {**store.about, "files": told})
    for path in [store.path / "plan.json", *(store.path / split / "done.npy" for split in store.splits)]:
        with suppress(FileNotFoundError):
            path.unlink()


def _files(store: Store) -> Sequence[Path]:
    inside = [path for split in store.splits for path in sorted((store.path / split).glob("[!.]*.npy"))]
    return [*sorted(store.path.glob("[!.]*.safetensors")), *inside]
