"""References to external artifacts: a path, `asset:`, `hf:ORG/NAME`, `gguf:FILE`, `url:URL#sha256=`,
`http://HOST/v1#MODEL`.

Resolves them to artifacts (hashed once, cached), and opens an engine over any model.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmworks import assets
from llmworks.assets.catalog import CATALOG
from llmworks.core.artifact import (
    KINDS,
    MANIFEST,
    Adapter,
    Artifact,
    FileEntry,
    Manifest,
    Model,
    compute_artifact_digest,
    load,
)
from llmworks.core.errors import UserError
from llmworks.core.types import Engine
from llmworks.core.workspace import Workspace, cache_directory
from llmworks.generate.remote.endpoint import get_remote_identity, parse_remote
from llmworks.lineage.digests import hash_files_cached

Convert = Callable[[Artifact, str], Artifact]


def resolve_reference(
    ref: str, *, name: str = "", workspace: Workspace | None = None, convert: Convert | None = None
) -> Artifact:
    """Return the artifact behind a reference.

    `convert`: converts an asset stored as a GGUF file to a directory (`model`); without it the file is returned.

    Errors: UserError or ArtifactError when there is none.
    """
    if not ref.strip():
        raise UserError("empty reference; use a path, a name in the workspace, asset:NAME or hf:ORG/NAME")
    scheme, _, rest = ref.partition(":")
    if scheme == "asset":
        artifact = get_asset_files(rest, name or rest)
        return convert(artifact, "model") if convert is not None and assets.get_asset(rest).convert else artifact
    if scheme == "hf":
        return _external_artifact(_download_from_hub(rest), name or rest, ref)
    if scheme in ("http", "https"):
        return _resolve_remote(ref, name)
    if scheme == "url":
        url, _, digest = rest.partition("#sha256=")
        return _external_artifact(assets.fetch_url(url, digest), name or Path(url).name, ref)
    path = Path(rest if scheme in ("path", "gguf") else ref).expanduser()
    if not path.exists() and workspace is not None and (workspace.root / path).exists():
        path = workspace.root / path
    if not path.exists():
        raise UserError(f"{path}: no such file or directory{_suggest(ref, workspace)}")
    if (path / MANIFEST).exists():
        return load(path.resolve(), name=name or path.name)
    return _external_artifact(path.resolve(), name or path.name, f"path:{path.resolve()}")


def _suggest(ref: str, workspace: Workspace | None) -> str:
    """Suggest what an unresolvable reference may have meant: an asset, or a name in the workspace."""
    name = ref.rpartition("/")[2].lower()
    if name in CATALOG:
        return f"; did you mean asset:{name}" + (f", or hf:{ref} on the Hugging Face Hub?" if "/" in ref else "?")
    hub = f"; for a model on the Hugging Face Hub use hf:{ref}" if re.fullmatch(r"[\w-]+/[\w.-]+", ref) else ""
    if workspace is None:
        return hub
    near = difflib.get_close_matches(ref, list(workspace.list_named_artifacts()), n=1)
    return f", neither here nor in {workspace.root}" + (f"; did you mean {near[0]!r}?" if near else hub)


def is_local(ref: str) -> bool:
    """Return whether a reference can be resolved without a download."""
    scheme, _, rest = ref.partition(":")
    if scheme == "asset":
        return assets.is_cached(assets.get_asset(rest))
    if scheme == "url":
        return assets.url_cache_path(rest.partition("#")[0], rest.partition("#sha256=")[2]).exists()
    return scheme != "hf"


def get_unconverted(ref: str) -> Artifact | None:
    """Return the files of an asset that is converted before use; None for every other reference."""
    scheme, _, rest = ref.partition(":")
    return get_asset_files(rest, rest) if scheme == "asset" and assets.get_asset(rest).convert else None


def get_conversion_workspace() -> Workspace:
    """Return the workspace in the cache that holds converted assets and external rows."""
    return Workspace(cache_directory() / "converted")


def _download_from_hub(repository: str) -> Path:
    """Return the snapshot of a Hub repository NAME or NAME@REVISION in huggingface_hub's cache.

    For `datasets/ORG/NAME/FOLDER`, return that folder.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if repository.startswith("datasets/"):
            owner, _, rest = repository.removeprefix("datasets/").partition("/")
            name, _, folder = rest.partition("/")
            return (
                Path(
                    snapshot_download(
                        f"{owner}/{name}", repo_type="dataset", allow_patterns=f"{folder}/*" if folder else None
                    )
                )
                / folder
            )
        repository, _, revision = repository.partition("@")
        return Path(
            snapshot_download(
                repository, revision=revision or None, ignore_patterns=["*.bin", "*.pth", "*.onnx", "*.msgpack", "*.h5"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"hf:{repository}: download failed ({str(error).strip().splitlines()[0][:160]})") from None


def _resolve_remote(ref: str, name: str) -> Model:
    """Return a model behind a server: derivation declared, since it cannot be hashed."""
    url, model, options = parse_remote(ref)
    manifest = _external_manifest(
        "model",
        {},
        {"format": "http"},
        digest=hashlib.sha256(get_remote_identity(url, model, options).encode()).hexdigest(),
    )
    return Model(Path(), manifest=manifest, name=name or model, ref=ref)


def detect_kind(path: Path) -> str:
    """Return the kind of an external file or directory by its contents; the default is raw data.

    UserError for an empty directory.
    """
    if path.is_file():
        return "model" if path.suffix == ".gguf" else "dataset"
    names = {p.name for p in path.iterdir()}
    if not names:
        raise UserError(f"{path}: empty directory")
    if "adapter_config.json" in names:
        return "adapter"
    if names & {"config.json", "model.safetensors"} or any(name.endswith(".gguf") for name in names):
        return "model"
    return "tokenizer" if "tokenizer.json" in names else "dataset"


def _external_artifact(
    path: Path, name: str, ref: str, *, kind: str = "", about: dict[str, Any] | None = None
) -> Artifact:
    kind = kind or detect_kind(path)
    files = hash_files_cached(path)
    return KINDS[kind](path, manifest=_external_manifest(kind, files, about or {}), name=name, ref=ref)


def _external_manifest(kind: str, files: dict[str, FileEntry], about: dict[str, Any], digest: str = "") -> Manifest:
    digest = digest or compute_artifact_digest(kind, "", files)
    return Manifest(
        kind=kind,
        digest=digest,
        key="",
        stage="",
        revision=0,
        derivation="declared",
        config={},
        parents=[],
        files=files,
        about=about,
    )


def find_digest(digest: str, workspace: Workspace | None) -> Artifact | None:
    """Return an artifact by digest: in the workspace, behind its names, or among converted assets."""
    for place in (workspace, get_conversion_workspace()):
        found = place.find_digest(digest) if place is not None else None
        if found is not None:
            return found
    return None


def get_base_reference(adapter: Adapter) -> str:
    """Return the reference of an adapter's base model, from its manifest or peft's config; empty if none."""
    base = str(adapter.about.get("base", ""))
    if adapter.manifest is not None:
        ref = next((p.ref for p in adapter.manifest.parents if p.digest == base and p.ref), "")
        if ref:
            return ref
    from llmworks.tokenize.load import read_json

    named = str(read_json(adapter.path / "adapter_config.json").get("base_model_name_or_path", ""))
    return named if not named or ":" in named or Path(named).exists() else f"hf:{named}"


def open_model(model: Model) -> Engine:
    """Open an engine over a Hugging Face directory, a GGUF file or a server."""
    if model.format == "http":
        from llmworks.generate.engines.remote import RemoteEngine

        return RemoteEngine(*parse_remote(model.ref))
    if model.format == "gguf":
        from llmworks.generate.engines.llamacpp import LlamaCppEngine

        return LlamaCppEngine(model.gguf_path, name=model.name)
    from llmworks.generate.engines.torch import TorchEngine

    return TorchEngine.open(model.path, name=model.name)


def get_asset_files(asset_name: str, name: str) -> Artifact:
    """Return the files of a cached asset as downloaded, before any conversion."""
    asset = assets.get_asset(asset_name)
    return _external_artifact(
        assets.fetch(asset_name),
        name,
        f"asset:{asset_name}",
        kind=asset.kind,
        about={"schema": asset.schema, "asset": asset_name, "what": asset.description, "licence": asset.license},
    )
