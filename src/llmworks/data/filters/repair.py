"""Clean text: fix mojibake (ftfy), normalize whitespace and control characters, drop boilerplate lines."""

from __future__ import annotations

import re

from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.core.errors import MissingDependency

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufff0-\uffff]")
SPACES = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
TRAILING = re.compile(r"[ \t]+\n")
BLANK = re.compile(r"\n{3,}")
SIGNS = re.compile(r"[^\x00-\x7f]|&[#a-zA-Z]|\x1b|\r")  # without any of these there is nothing to fix
# boilerplate lines of web pages; matched as whole lines, ignoring case and trailing punctuation
BOILERPLATE = re.compile(
    r"(?:skip to (?:main )?content|advertisement|advertise(?: with us)?|sponsored(?: content)?|read more|continue"
    r" reading|learn more|click here(?: to .{1,40})?"
    r"|share(?: this)?(?: (?:on|via|with) .{1,40})?|share this (?:page|post|article|story)|tweet|like us on"
    r" facebook|follow us(?: on .{1,40})?|sign (?:in|up)|log ?in|register"
    r"|subscribe(?: (?:now|to) ?.{0,40})?|sign up for (?:our|the) .{0,30}newsletter.{0,30}|all rights"
    r" reserved|(?:copyright )?(?:©|\(c\)) ?\d{4}.{0,60}|back to (?:the )?top"
    r"|related (?:articles|posts|stories)|you (?:may|might) also like|leave a (?:reply|comment)|post a comment|\d+"
    r" comments?|view all comments|previous|next|home|menu|search"
    r"|(?:this|our) (?:web)?site uses cookies.{0,80}|accept (?:all )?cookies|privacy policy|terms of"
    r" (?:use|service)|cookie policy|loading|print|e-?mail this)[.:!…»>| ]*",
    re.IGNORECASE,
)

# first three characters of those lines, a fast pre-filter
BEGINNINGS = frozenset(
    [
        "ski",
        "adv",
        "spo",
        "rea",
        "con",
        "lea",
        "cli",
        "sha",
        "twe",
        "lik",
        "fol",
        "sig",
        "log",
        "reg",
        "sub",
        "all",
        "cop",
        "©",
        "(",
        "bac",
        "rel",
        "you",
        "pos",
        "vie",
        "pre",
        "nex",
        "hom",
        "men",
        "sea",
        "thi",
        "our",
        "acc",
        "pri",
        "ter",
        "coo",
        "loa",
        "e-m",
        "ema",
    ]
)


class Repair(Config):
    """Text repair, applied before the filters."""

    encoding: bool = Field(True, description="fix mojibake, HTML entities and ligatures (ftfy)")
    whitespace: bool = Field(
        True,
        description="normalize spaces and line breaks, remove control characters, keep at most one empty line in a row",
    )
    boilerplate: bool = Field(
        True, description="drop short lines such as 'Share this on Facebook' or 'Skip to content'"
    )


def repair(config: Repair, text: str) -> tuple[str, int]:
    """Repair a text; returns (text, number of dropped boilerplate lines). MissingDependency without the extra."""
    if config.encoding and SIGNS.search(text):
        try:
            import ftfy
        except ImportError:
            raise MissingDependency(
                "data.clean fixes text with ftfy; install it with: pip install 'llmworks[corpus]'"
            ) from None
            # as ftfy does for whole texts, keep HTML entities where there are tags; lines are fixed one by one, since
            # most need no fix
        fixer_config = ftfy.TextFixerConfig(
            uncurl_quotes=False,
            fix_character_width=False,
            unescape_html=False if "<" in text else "auto",
            explain=False,
        )
        text = "\n".join(ftfy.fix_text(line, fixer_config) if SIGNS.search(line) else line for line in text.split("\n"))
    if config.whitespace:
        text = SPACES.sub(" ", CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
        text = BLANK.sub("\n\n", TRAILING.sub("\n", text)).strip()
    dropped = 0
    if config.boilerplate:
        lines = text.split("\n")
        kept = [line for line in lines if len(line) > 100 or not _is_boilerplate(line.strip())]
        dropped = len(lines) - len(kept)
        if dropped:
            text = BLANK.sub("\n\n", "\n".join(kept)).strip()
    return text, dropped


def _is_boilerplate(line: str) -> bool:
    return (line[:3].lower() in BEGINNINGS or line[:1] in "©(0123456789") and BOILERPLATE.fullmatch(line) is not None
