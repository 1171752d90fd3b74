"""Data sets from pinned Debian packages: fetched by the system's package manager, checked, unpacked without root.

Nothing of them is part of hansfree: only names, versions and checksums are. Of each package the files that are used
are kept, beside its copyright notice.
"""

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hansfree.benchmarks import photographs
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
class DataSet:
    """Packages, and the files to keep: path below the data set's folder -> path in its package."""

    packages: tuple[Package, ...]
    files: Mapping[str, str]


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
}

Say = Callable[[str], None]


def get(name: str, root: Path | None = None, debs: Path | None = None, say: Say = lambda text: None) -> Path:
    """Put the data set ``name`` into ``root/name`` and give that folder; where it is there already, nothing is done.

    Packages come from the folder ``debs``, or from apt-get where that is None. The folder appears whole or not at all.
    Raises ``UserError`` for an unknown name, and where a package cannot be had or is another one than pinned.
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
            deb = _downloaded(package, Path(work)) if debs is None else _found(package, debs)
            verify(deb, package)
            unpack(deb, package, data_set.files, whole)
        missing = [file for file in data_set.files if not (whole / file).is_file()]
        if missing:
            raise UserError(f"The packages of {name} lack {missing[0]}; report this, for their checksums were right.")
        whole.rename(folder)
    return folder


def _downloaded(package: Package, work: Path) -> Path:
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


def _found(package: Package, debs: Path) -> Path:
    found = sorted(debs.glob(f"{package.name}_*.deb"))
    if not found:
        raise UserError(f"{debs} holds no {package.file}; put that file of {RELEASE} there.")
    return found[0]


def verify(deb: Path, package: Package) -> None:
    """Raises ``UserError`` where ``deb`` is not, byte for byte, the pinned package."""
    with deb.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != package.sha256:
        raise UserError(
            f"{deb} is not {package.name} {package.version} of {RELEASE} (its SHA-256 is {sha256[:16]}..., not "
            f"{package.sha256[:16]}...); fetch that version."
        )


def unpack(deb: Path, package: Package, files: Mapping[str, str], folder: Path) -> None:
    """Write those of ``files`` that ``deb`` holds below ``folder``, and its copyright notice."""
    wanted = {source: target for target, source in files.items()}
    wanted[f"usr/share/doc/{package.name}/copyright"] = f"copyright/{package.name}"
    with tarfile.open(fileobj=io.BytesIO(_data_member(deb))) as archive:
        for member in archive:
            target = wanted.get(member.name.removeprefix("./"))
            content = archive.extractfile(member) if target is not None else None
            if target is None or content is None:
                continue
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_bytes(content.read())


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
