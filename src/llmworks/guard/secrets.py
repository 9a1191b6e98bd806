"""Detect secrets in text: keys and tokens by issuers' prefixes, and values of names such as api_key by entropy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from llmworks.guard import SensitiveSpan

B = r"(?<![A-Za-z0-9_-])"
E = r"(?![A-Za-z0-9_-])"
# issuers' documented formats, with prefixes for a fast pre-filter
KNOWN: dict[str, tuple[tuple[str, ...], re.Pattern[str]]] = {
    "aws": (("AKIA", "ASIA", "AGPA", "AIDA", "AROA"), re.compile(rf"{B}(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z2-7]{{16}}{E}")),
    "github": (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(rf"{B}(?:gh[pousr]_[A-Za-z0-9]{{36,255}}|github_pat_[A-Za-z0-9]{{22}}_[A-Za-z0-9]{{59}}){E}"),
    ),
    "gitlab": (("glpat-", "glptt-", "gldt-", "glrt-"), re.compile(rf"{B}gl(?:pat|ptt|dt|rt)-[\w-]{{20,64}}{E}")),
    "slack": (
        ("xox", "hooks.slack"),
        re.compile(
            rf"{B}xox[abprs]-[A-Za-z0-9-]{{10,250}}{E}|https://hooks\.slack\.com/services/T\w{{8,}}/B\w{{8,}}/\w{{20,}}"
        ),
    ),
    "google": (("AIza",), re.compile(rf"{B}AIza[\w-]{{35}}{E}")),
    "anthropic": (("sk-ant-",), re.compile(rf"{B}sk-ant-[\w-]{{20,200}}{E}")),
    "openai": (("sk-",), re.compile(rf"{B}sk-(?!ant-)(?:proj-|svcacct-|admin-)?[\w-]{{20,200}}{E}")),
    "huggingface": (("hf_",), re.compile(rf"{B}hf_[A-Za-z0-9]{{30,60}}{E}")),
    "stripe": (("_live_", "_test_"), re.compile(rf"{B}(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{{16,247}}{E}")),
    "sendgrid": (("SG.",), re.compile(rf"{B}SG\.[\w-]{{22}}\.[\w-]{{43}}{E}")),
    "twilio": (("SK", "AC"), re.compile(rf"{B}(?:SK|AC)[0-9a-f]{{32}}{E}")),
    "npm": (("npm_",), re.compile(rf"{B}npm_[A-Za-z0-9]{{36}}{E}")),
    "pypi": (("pypi-",), re.compile(rf"{B}pypi-AgE[\w-]{{50,1000}}{E}")),
    "jwt": (("eyJ",), re.compile(rf"{B}eyJ[\w-]{{10,}}\.eyJ[\w-]{{10,}}\.[\w-]{{10,}}{E}")),
    "private key": (
        ("-----BEGIN",),
        re.compile(
            r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{20,}?(?:-----END (?:[A-Z]+ )*PRIVATE KEY(?:"
            r" BLOCK)?-----|\Z)"
        ),
    ),
}
URL_PASSWORD = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s:/@]{0,64}:([^\s:/@]{3,128})@[\w.-]+")
NAMED = re.compile(
    r"(?:api|access|auth(?!or)|secret|private|client|encryption|signing|bearer|session)[_"
    r" -]?(?:key|token|secret|id)?|passw(?:or)?d|passwd|pwd|token|secret|credential",
    re.IGNORECASE,
)
ASSIGNED = re.compile(
    r"""[:=]>?[ \t]{0,3}(?:(["'`])([^\s"'`]{8,200})\1|([^\s"'`<>{}()$;,&:=]{8,200}={0,2})(?![^\s;,&"'`<>)\]}]))"""
)
NAME = re.compile(r"""(?<![A-Za-z0-9])([A-Za-z][\w.-]{1,40})["'\]]{0,2}[ \t]{0,3}:?$""")
TYPED = re.compile(r"""(?<![A-Za-z0-9])([A-Za-z]\w{1,40}):[ ]?[\w\[\]|]{1,20}[ \t]{0,3}$""")  # name: type = value
ATTRIBUTE = re.compile(r"""\b(?:key|name)=["']([\w.-]{2,60})["']\s+value=["']([^"'\s]{8,200})["']""")
BEARER = re.compile(r"\b[Bb]earer\s+([A-Za-z0-9._~+/-]{16,}=*)")
PLACEHOLDER = re.compile(
    r"(?i)x{4,}|\*{3,}|\.{3,}|your|example|changeme|change_me|placeholder|dummy|redacted|insert|<|os\.environ"
    r"|getenv|process\.env|None|null|true|false|password|secret"
)
MIN_ENTROPY = 3.2  # bits per character; English words are below, random strings above


def entropy(value: str) -> float:
    """Compute the Shannon entropy of a string in bits per character, from its own character frequencies."""
    total = len(value)
    return -sum(n / total * math.log2(n / total) for n in Counter(value).values()) if total else 0.0


def find_secrets(text: str, include_reserved: bool = False) -> Iterator[SensitiveSpan]:
    """Find keys, tokens, passwords in URLs, and random-looking values of names such as api_key.

    Placeholders are found only with `include_reserved`.
    """
    for begins, pattern in KNOWN.values():
        for match in pattern.finditer(text) if any(begin in text for begin in begins) else ():
            if include_reserved or not PLACEHOLDER.search(match.group()[4:]) or "PRIVATE KEY" in match.group():
                yield SensitiveSpan("secret", match.start(), match.end(), match.group())
    for match in URL_PASSWORD.finditer(text) if "://" in text and "@" in text else ():
        if include_reserved or (not PLACEHOLDER.search(match.group(1)) and match.group(1)[0] not in "$%"):
            yield SensitiveSpan("secret", match.start(1), match.end(1), match.group(1))
    for match in ASSIGNED.finditer(text):
        group = 2 if match.group(2) else 3
        before = text[max(0, match.start() - 60) : match.start()]
        names = [found.group(1) for pattern in (NAME, TYPED) if (found := pattern.search(before))]
        if any(map(NAMED.search, names)) and _is_secret(match.group(group), include_reserved):
            yield SensitiveSpan("secret", match.start(group), match.end(group), match.group(group))
    for match in ATTRIBUTE.finditer(text) if "value=" in text else ():
        if NAMED.search(match.group(1)) and _is_secret(match.group(2), include_reserved):
            yield SensitiveSpan("secret", match.start(2), match.end(2), match.group(2))
    for match in BEARER.finditer(text) if "earer" in text else ():
        if _is_secret(match.group(1), include_reserved):
            yield SensitiveSpan("secret", match.start(1), match.end(1), match.group(1))


def _is_secret(value: str, include_reserved: bool) -> bool:
    return is_random(value) and "://" not in value and (include_reserved or not PLACEHOLDER.search(value))


def is_random(value: str) -> bool:
    """Return whether a value looks random, not like a word, path or name: high entropy and mixed character classes."""
    kinds = (any(c.isdigit() for c in value), any(c.islower() for c in value), any(c.isupper() for c in value))
    if sum(kinds) < 2 or entropy(value) < min(MIN_ENTROPY, 0.85 * math.log2(len(value))):
        return False
    if not kinds[0] and not re.search(r"[!@#$%^&*?~+/=]", value):  # letters only: a name has few case changes
        return sum(a.islower() != b.islower() for a, b in pairwise(value)) > len(value) / 3
    return not re.fullmatch(r"[\w-]+(?:[./][\w-]+)+|[a-z_]+\d{0,3}|[A-Z][a-z]+\d{0,4}", value)
