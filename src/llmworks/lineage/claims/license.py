"""Check license compatibility along a lineage. Points out what to review; not legal advice."""

from __future__ import annotations

from collections.abc import Mapping

from llmworks.lineage.family import Family

PERMISSIVE = (
    "apache-2.0",
    "mit",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-3-clause-clear",
    "0bsd",
    "cc0-1.0",
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
    "isc",
    "unlicense",
    "zlib",
    "psf",
    "psf-2.0",
    "public domain",
    "wtfpl",
    "ncsa",
    "afl-3.0",
    "artistic-2.0",
    "bsl-1.0",
    "postgresql",
    "ms-pl",
    "cdla-permissive-1.0",
    "cdla-permissive-2.0",
    "odc-by",
    "pddl",
    "ecl-2.0",
)
SHARE_ALIKE_PREFIXES = ("gpl", "agpl", "lgpl", "cc-by-sa", "mpl", "eupl", "odbl")


def classify_license(license_id: str) -> str:
    """Classify a license: free (permissive), share-alike, non-commercial, or own (custom terms to read)."""
    lowered = license_id.lower()
    if "-nc" in lowered or "noncommercial" in lowered or "non-commercial" in lowered:
        return "non-commercial"
    if lowered in PERMISSIVE:
        return "free"
    return "share-alike" if lowered.startswith(SHARE_ALIKE_PREFIXES) else "own"


def find_license_conflicts(family: Family, licenses: Mapping[str, str]) -> list[str]:
    """List one line for models whose license is less strict than an ancestor's, or missing, and for models whose
    ancestors have possibly incompatible terms.

    `licenses`: stated licenses by digest.
    """
    found: dict[str, list[str]] = {}
    for node in family.nodes.values():
        if node.kind not in ("model", "adapter"):
            continue
        ancestor_licenses = {
            one.label: licenses[one.digest]
            for one in family.ancestors(node.digest)
            if one.digest != node.digest and licenses.get(one.digest, "other") != "other"
        }
        own, kinds = (
            licenses.get(node.digest, ""),
            {name: classify_license(terms) for name, terms in ancestor_licenses.items()},
        )
        strict = {name: ancestor_licenses[name] for name, kind in kinds.items() if kind != "free"}
        closed = {name: terms for name, terms in strict.items() if kinds[name] == "non-commercial"}
        if own not in ("", "other") and classify_license(own) == "free" and strict:
            found.setdefault(f"under {own}, from {_format_licenses(strict)}, which have stricter terms", []).append(
                node.label
            )
        elif closed and (own in ("", "other") or classify_license(own) != "non-commercial"):
            found.setdefault(
                f"{f'under {own}' if own not in ('', 'other') else 'without a license of their own'}, from"
                f" {_format_licenses(closed)}, which allows no commercial use",
                [],
            ).append(node.label)
        shared = {name: terms for name, terms in strict.items() if kinds[name] == "share-alike"}
        if shared and (own in ("", "other") or classify_license(own) == "own"):
            found.setdefault(
                f"{f'under {own}' if own not in ('', 'other') else 'without a license of their own'}, from"
                f" {_format_licenses(shared)}, which require the same license",
                [],
            ).append(node.label)
        terms = {terms for name, terms in strict.items() if kinds[name] in ("share-alike", "own")}
        if (
            len(terms) > 1
            and len({licenses[parent] for _, parent in node.parents if licenses.get(parent, "other") != "other"}) > 1
        ):
            found.setdefault(f"from {_format_licenses(strict)}: possibly incompatible terms", []).append(node.label)
    return [
        f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: {what}"
        for what, names in found.items()
    ]


def _format_licenses(licences: Mapping[str, str]) -> str:
    return " and ".join(f"{name} ({terms})" for name, terms in licences.items())
