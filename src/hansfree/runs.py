"""The run folder and the suite folder: the only code that knows their layout.

Whatever is written here is written whole: a file is made beside its place and then moved over it, so that a
process killed at any moment leaves either the old file or the new one. The one file that grows, metrics.jsonl,
may end in a torn line; readers leave it out and a resumed run cuts it off.
"""

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from filelock import FileLock, Timeout

from hansfree.errors import RunError, UserError

SCHEMA = 1
"""The version of results.json that this code writes and reads."""

_TEMPORARY = ".hansfree-"
_LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEARLY_NOTHING = 1 << 20


# Writing ------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write to; it takes the place of ``path`` when the block ends well.

    The sibling keeps the suffix of ``path`` and the folder is made where it is missing. When the block raises,
    the old file stays and the sibling is removed. Raises ``RunError`` where the disk is full or refuses.
    """
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.filename not in (None, *map(str, (temporary, path, path.parent)), temporary):
            raise
        raise _refused(path, error) from error
    except Exception as error:
        # torch and safetensors report a full disk as errors of their own.
        if not isinstance(error, RunError) and (os.strerror(errno.ENOSPC) in str(error) or _is_full(path.parent)):
            raise _refused(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing the run, suite or audit in ``folder`` until the block ends.

    The system frees the lock of a process that was killed. Raises ``UserError`` where another process is at work or
    ``folder`` is a file, ``RunError`` where the disk refuses.
    """
    _refuse_file(folder)
    is_new = not folder.exists()
    lock = FileLock(folder / _LOCK, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # some network file systems know no locks
            lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder} is being written by another process; wait for it, end it, or choose another --out."
        ) from error
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / _LOCK).unlink()
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether there is no such folder, or nothing in it but what a write in progress makes."""
    return not folder.exists() or all(e.name == _LOCK or e.name.startswith(_TEMPORARY) for e in folder.iterdir())


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out.")


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all. Numbers that are not finite become null, which JSON can say."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any, number: Callable[[float], float | None] = lambda x: x if math.isfinite(x) else None) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, number) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, number) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), number)
    if isinstance(value, Path):
        return str(value)
    return number(value) if isinstance(value, float) else value


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _NEARLY_NOTHING
    except OSError:
        return False


def _refused(path: Path, error: OSError) -> RunError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        remedy = "free space on its disk, then continue with --resume"
    else:
        remedy = "make the folder writable or choose another with --out, then continue with --resume"
    return RunError(f"Could not write {path} ({reason}): {remedy}.")


# Reading ------------------------------------------------------------------------------------------------------


def read_json(path: Path | str) -> Any:
    """The value in a JSON file. Raises ``UserError`` where the file is absent or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}; name a folder whose run has finished.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); run it again to write it anew.") from None


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ``UserError`` where the file is absent, damaged or not a mapping."""
    path = Path(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}; name an existing file.") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason}); correct it.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold keys and values, but holds {type(value).__name__}; correct it.")
    return value


def read_results(path: Path | str) -> dict[str, Any]:
    """The contents of a results.json. Raises ``UserError`` where it is absent, damaged or of another schema."""
    path = Path(path)
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
        raise UserError(f"{path} holds no `rows`, so it is not a hansfree result; run it again to write it anew.")
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {results.get('schema')!r}, but this version of hansfree reads schema {SCHEMA}; "
            "evaluate the run again with this version."
        )
    return results


# Folders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: one method, one seed."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, precision and command."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: steps, validations, warnings."""
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """Written last: a run that has it is done."""
        return self.path / "results.json"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def previous(self) -> Path:
        """The checkpoint before the newest."""
        return self.path / "checkpoints" / "previous.pt"

    @property
    def best(self) -> Path:
        """The checkpoint that the selection rule chose."""
        return self.path / "checkpoints" / "best.pt"

    @property
    def exported(self) -> Path:
        """The folder of model.safetensors and config.json."""
        return self.path / "exported"

    @property
    def figures(self) -> Path:
        """The folder of what pictures are made from."""
        return self.path / "figures"

    @property
    def heatmaps(self) -> Path:
        """Images, predictions and maps of a few samples of each test split."""
        return self.figures / "heatmaps.npz"

    @property
    def dissection(self) -> Path:
        """The folder of the student's network dissection."""
        return self.path / "dissection"

    @property
    def representations(self) -> Path:
        """Where networks place test samples in the plane, and how alike their layers are."""
        return self.figures / "representations.npz"

    @property
    def report(self) -> Path:
        """The report, one self-contained page."""
        return self.path / "report.html"

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any], *, resume: bool) -> "RunFolder":
        """The folder at ``path``, claimed for ``config``; made where it is missing.

        Raises ``UserError`` where it holds something else, another run, or (without ``resume``) this run.
        """
        folder = cls(Path(path))
        _claim(folder.path, folder.config, config, resume=resume)
        return folder

    def is_done(self) -> bool:
        """Whether the run has finished: results.json exists and can be read."""
        return _is_done(self.results)

    def append_metrics(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add one line a record to metrics.jsonl. Raises ``RunError`` where the disk is full or refuses."""
        lines = "".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("ab") as file:
                file.write(lines.encode("utf-8"))
        except OSError as error:
            raise _refused(self.metrics, error) from error

    def metrics_position(self) -> int:
        """How many bytes metrics.jsonl has, all of them safely on the disk: what a checkpoint remembers."""
        if not self.metrics.exists():
            return 0
        _sync(self.metrics)
        return self.metrics.stat().st_size

    def truncate_metrics(self, position: int) -> None:
        """Cut metrics.jsonl back to where a checkpoint left it, so that a resumed run repeats no line."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        if size < position:
            raise UserError(
                f"{self.metrics} is shorter than its checkpoint remembers ({size} of {position} bytes), "
                "so the run cannot be resumed; start it anew with another --out."
            )
        if size > position:
            os.truncate(self.metrics, position)

    def progress(self) -> tuple[int, int]:
        """Steps done and steps in all of the present stage, as far as metrics.jsonl tells."""
        if not self.metrics.exists():
            return 0, 0
        with self.metrics.open("rb") as file:
            file.seek(max(0, self.metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")[1:-1]
        for line in reversed(lines):
            if b'"event": "step"' in line:
                record = json.loads(line)
                return record["step"], record["steps"]
        return 0, 0

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl; a torn last line is left out. Raises ``UserError`` for any other damage."""
        if not self.metrics.exists():
            return []
        *lines, _torn = self.metrics.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError:
                raise UserError(
                    f"{self.metrics} is damaged at line {number}; continue the run with --resume or start it anew."
                ) from None
        return records


@dataclass(frozen=True)
class SuiteFolder:
    """The folder of a suite: variants x seeds, each in a run folder, with one teacher for all."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved suite."""
        return self.path / "suite.yaml"

    @property
    def results(self) -> Path:
        """Rows and cells of all runs."""
        return self.path / "results.json"

    @property
    def teacher(self) -> RunFolder:
        """The teacher's run; absent where the teacher was given ready-made."""
        return RunFolder(self.path / "teacher")

    @property
    def report(self) -> Path:
        """The report, one self-contained page."""
        return self.path / "report.html"

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any], *, resume: bool) -> "SuiteFolder":
        """The folder at ``path``, claimed for ``config``; raises as :meth:`RunFolder.create` does."""
        folder = cls(Path(path))
        _claim(folder.path, folder.config, config, resume=resume)
        return folder

    def run(self, variant: str, seed: int) -> RunFolder:
        """The run folder of one cell. Characters that a file name cannot hold everywhere are written as %XX."""
        name = quote(variant, safe="-_.,=+@ ()")
        if name.startswith("."):
            name = "%2E" + name[1:]
        return RunFolder(self.path / "runs" / name / f"seed-{seed}")

    def table(self, suffix: str) -> Path:
        """The comparison table as ``md``, ``csv`` or ``tex``."""
        return self.path / f"table.{suffix}"

    def is_done(self) -> bool:
        """Whether the suite has finished: results.json exists and can be read."""
        return _is_done(self.results)


def open_folder(path: Path | str) -> RunFolder | SuiteFolder:
    """The run or suite folder at ``path``, by the config it holds. Raises ``UserError`` where it is neither."""
    path = Path(path)
    suite, run = SuiteFolder(path), RunFolder(path)
    if suite.config.is_file():
        return suite
    if run.config.is_file():
        return run
    raise UserError(
        f"{path} holds neither {suite.config.name} nor {run.config.name}; name the folder of a run or of a suite."
    )


def _is_done(results: Path) -> bool:
    if not results.exists():
        return False
    try:
        read_results(results)
    except UserError:
        return False
    return True


def _claim(folder: Path, config_file: Path, config: Mapping[str, Any], *, resume: bool) -> None:
    # A round trip through YAML makes tuples, paths and number spellings equal to what a later run reads back.
    text = yaml.safe_dump(_plain(config, float), sort_keys=False, allow_unicode=True)
    _refuse_file(folder)
    if config_file.exists():
        held, asked = _without_nothing(read_yaml(config_file)), _without_nothing(yaml.safe_load(text))
        if held != asked:
            raise UserError(
                f"{folder} holds another run ({difference(held, asked)}); choose another --out, "
                "or the same settings to continue it."
            )
        if not resume:
            raise UserError(f"{folder} already holds this run; add --resume to continue it or choose another --out.")
        _remove_leftovers(folder)
        return
    if not is_empty(folder):
        raise UserError(f"{folder} holds other files and no {config_file.name}; choose another --out.")
    write_text(config_file, text)
    _remove_leftovers(folder)


def _without_nothing(config: Any) -> Any:
    # A setting that did not exist when a folder was made is one that is off: null or empty.
    if not isinstance(config, dict):
        return config
    kept = {key: _without_nothing(value) for key, value in config.items()}
    return {key: value for key, value in kept.items() if value is not None and value not in ({}, [])}


def _remove_leftovers(folder: Path) -> None:
    # What kill -9 left in the middle of a write. Cells of a suite clear their own folders, as they may be at work.
    for place in (folder, folder / "checkpoints", folder / "figures", folder / "exported"):
        for leftover in place.glob(f"{_TEMPORARY}*"):
            with suppress(OSError):
                leftover.unlink()


def difference(held: Any, asked: Any, key: str = "") -> str:
    """The first setting in which ``held`` and ``asked`` differ, in words: "`key` is 1 there and 2 here"."""
    if isinstance(held, dict) and isinstance(asked, dict):
        for name in [*asked, *held]:
            here, there = asked.get(name, _MISSING), held.get(name, _MISSING)
            if here != there:
                return difference(there, here, f"{key}.{name}" if key else str(name))
    return f"`{key}` is {_shown(held)} there and {_shown(asked)} here"


class _Missing:
    def __repr__(self) -> str:
        return "absent"


_MISSING = _Missing()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
