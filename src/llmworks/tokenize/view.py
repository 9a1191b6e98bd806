"""Display of tokens for terminals, pages and Markdown, colored by the loss mask or in alternating colors."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

LABEL_ANSI, MASKED_ANSI = "\x1b[42;30m", "\x1b[100;37m"
SPECIAL_LABEL_ANSI, SPECIAL_MASKED_ANSI = "\x1b[42;1;31m", "\x1b[100;1;33m"
RESET = "\x1b[0m"
ANSI_COLORS = (44, 43, 46, 41, 45)  # alternating token colors
STYLE = (
    "<style>.tk{color:#1b1f24;font:13px/1.9 ui-monospace,monospace;white-space:pre-wrap;word-break:break-word}.tk"
    " span{border-radius:3px;padding:1px 0;border-right:1px solid #fff}.tk .l{background:#bbf7d0}.tk"
    " .r{background:#e5e7eb}.tk .s{font-weight:600;color:#b91c1c}</style>"
)


def decode_pieces(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """Return (text, is special token) of each token; a character split over tokens goes to its last token."""
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    out: list[tuple[str, bool]] = []
    pending: list[int] = []
    for token in ids:
        if token in special:
            out.append((tokenizer.decode([*pending, token], skip_special_tokens=False), True))
            pending = []
            continue
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(pending) < 8:
            out.append(("", False))
            continue
        out.append((text, False))
        pending = []
    return out


def format_ansi(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> str:
    """Format tokens for the terminal: label tokens on green, masked ones on gray, special tokens in bold color."""
    text = ""
    for (piece, special), learned in zip(decode_pieces(tokenizer, ids), mask, strict=True):
        if piece:
            colour = (
                (SPECIAL_LABEL_ANSI if learned else SPECIAL_MASKED_ANSI)
                if special
                else (LABEL_ANSI if learned else MASKED_ANSI)
            )
            text += colour + piece.replace("\n", f"⏎{RESET}\n{colour}") + RESET
    return text


def strip_colors(text: str) -> str:
    """Convert terminal output to plain text: label tokens in «», tokens in alternating colors separated by bars."""
    learned = rf"(?:{re.escape(LABEL_ANSI)}|{re.escape(SPECIAL_LABEL_ANSI)})"
    marked = re.sub(
        rf"(?:{learned}[^\x1b]*{re.escape(RESET)}\n?)+",
        lambda m: f"«{m[0].rstrip()}»" + ("\n" if m[0].endswith("\n") else ""),
        text,
    )
    barred = re.sub(
        rf"\x1b\[(?:{'|'.join(map(str, ANSI_COLORS))});30m([^\x1b]*){re.escape(RESET)}(?=(\x1b)?)",
        lambda m: m[1] + ("|" if m[2] else ""),
        marked,
    )
    return re.sub(r"\x1b\[[\d;]*m", "", barred)


def format_plain(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> str:
    """Format tokens for Markdown and logs: runs of label tokens are in «»."""
    text, before = "", 0
    for (piece, _), learned in zip(decode_pieces(tokenizer, ids), mask, strict=True):
        text += ("«" if learned and not before else "»" if before and not learned else "") + piece
        before = learned
    return text + ("»" if before else "")


def format_html(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> str:
    """Format tokens as HTML for a page with `STYLE`: a span per token, with its id as a tooltip."""
    spans = ""
    for token, (piece, special), learned in zip(ids, decode_pieces(tokenizer, ids), mask, strict=True):
        shown = html.escape(piece).replace("\n", "⏎\n")
        spans += f'<span class="{"l" if learned else "r"}{" s" if special else ""}" title="{token}">{shown}</span>'
    return f'<div class="tk">{spans}</div>'


COLORS = ("#bfdbfe", "#fde68a", "#bbf7d0", "#fecaca", "#ddd6fe")
BOUNDARY_STYLE = (
    "<style>.st{color:#1b1f24;font:13px/1.9 ui-monospace,monospace;white-space:pre-wrap;word-break:break-word}.st"
    " span{padding:1px 0;border-radius:2px}"
    + "".join(f".st .c{i}{{background:{colour}}}" for i, colour in enumerate(COLORS))
    + "</style>"
)


def escape_html(text: str) -> str:
    """Escape text for HTML."""
    return html.escape(text)


def format_boundaries_html(tokenizer: Any, ids: Sequence[int]) -> str:
    """Format tokens as HTML for a page with `BOUNDARY_STYLE`: alternating colors, with ids as tooltips.

    A character split over several tokens is shown at its last token.
    """
    spans = ""
    for number, (token, (piece, _)) in enumerate(zip(ids, decode_pieces(tokenizer, ids), strict=True)):
        spans += (
            f'<span class="c{number % len(COLORS)}"'
            f' title="{token}">{html.escape(piece).replace(chr(10), "⏎" + chr(10)) or "·"}</span>'
        )
    return f'<div class="st">{spans}</div>'


def format_boundaries_ansi(tokenizer: Any, ids: Sequence[int]) -> str:
    """Format tokens for the terminal in alternating colors, on one line."""
    shown = (
        (piece.replace("\n", "⏎") or "·", ANSI_COLORS[i % len(ANSI_COLORS)])
        for i, (piece, _) in enumerate(decode_pieces(tokenizer, ids))
    )
    return "".join(f"\x1b[{colour};30m{piece}{RESET}" for piece, colour in shown)


def format_boundaries_plain(tokenizer: Any, ids: Sequence[int]) -> str:
    """Format tokens for Markdown, separated by bars."""
    return "|".join(piece or "·" for piece, _ in decode_pieces(tokenizer, ids))
