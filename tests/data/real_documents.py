"""Real documents in pieces, from the assets: what rules and figures are proved on.

As a program, writes them as JSONL.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator

from llmworks import assets
from llmworks.core.documents import RejectedInput
from llmworks.data.read import ReadConfig, read_source
from llmworks.data.readers.input_files import find_files, make_input_file

TEXTS = {
    "openwebtext-sample": "0",
    "wikipedia-sample": "0",
    "python-docs": "text",
    "debian-handbook": "text",
    "austen": "text",
}
PIECE = 3000  # characters


def pieces(text: str) -> Iterator[str]:
    """A text cut at paragraphs, in pieces of about PIECE characters."""
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= PIECE:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def real_documents() -> list[tuple[str, str]]:
    """(id, text) of more than 5000 documents."""
    found: list[tuple[str, str]] = []
    for name, field in TEXTS.items():
        root = assets.fetch(name)
        for file in find_files(root):
            for item in read_source(make_input_file(root, file), ReadConfig(text_field=field, keep_fields=[])):
                assert not isinstance(item, RejectedInput), item
                found += [(f"{name}/{item.id}@{i}", piece) for i, piece in enumerate(pieces(item.text))]
    return found


def cases(count: int = 400) -> list[tuple[str, str]]:
    """Pieces of Jane Austen's novels (public domain) with what rules look for put into them, so that every rule has its
    cases.
    """
    rng = random.Random(0)
    novels = [text for id, text in real_documents() if id.startswith("austen/")]
    found = []
    for number in range(count):
        text = novels[rng.randrange(len(novels))][: rng.choice([150, 400, 1200, 2500])]
        for change in rng.sample(CHANGES, rng.choice([0, 1, 1, 2, 3])):
            text = change(text, rng)
        found.append((f"case/{number}", text))
    return found


def _lines(text: str, rng: random.Random, change: Callable[[str], str], share: float) -> str:
    return "\n".join(change(line) if rng.random() < share else line for line in text.split("\n"))


def _unwrapped(text: str, rng: random.Random) -> str:
    return "\n\n".join(" ".join(part.split("\n")) for part in text.split("\n\n"))


def _again(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    return "\n".join(lines + lines[at : at + rng.choice([1, 3, 10])] * rng.choice([1, 2, 10]))


def _phrase(text: str, rng: random.Random) -> str:
    words = text.split()
    at, size = rng.randrange(len(words)), rng.choice([2, 3, 4, 6, 8, 12])
    phrase = " ".join(words[at : at + size])
    return _lines(text, rng, lambda line: f"{line} {phrase}", rng.choice([0.1, 0.3, 0.9]))


def _inserted(*options: str) -> Callable[[str, random.Random], str]:
    def change(text: str, rng: random.Random) -> str:
        lines = text.split("\n")
        for _ in range(rng.choice([1, 2, 8])):
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(options))
        return "\n".join(lines)

    return change


CHANGES: list[Callable[[str, random.Random], str]] = [
    _unwrapped,
    _again,
    _phrase,
    lambda text, rng: _lines(text, rng, lambda line: rng.choice(["- ", "• "]) + line, rng.choice([0.5, 0.95])),
    lambda text, rng: _lines(
        text, rng, lambda line: line.rstrip(".,") + rng.choice(["...", "…"]), rng.choice([0.2, 0.5])
    ),
    lambda text, rng: _lines(text, rng, lambda line: "# " * rng.choice([1, 4]) + line, 0.6),
    lambda text, rng: _lines(
        text, rng, lambda line: " ".join(str(len(word)) for word in line.split()), rng.choice([0.2, 0.5])
    ),
    lambda text, rng: text.replace(" ", rng.choice(["-", "_", "/", " "]), rng.choice([20, 300])),
    lambda text, rng: " ".join(word[:2] for word in text.split()),
    lambda text, rng: "\n".join(text.split()[: rng.choice([30, 200])]),
    lambda text, rng: (
        text.replace("the ", "ye ").replace(" to ", " unto ").replace(" of ", " o' ").replace(" and ", " & ")
    ),
    lambda text, rng: text.replace("'", "’").replace('"', rng.choice(["“", "''"])),
    lambda text, rng: text.replace(". ", rng.choice([".", "!  ", "?! ", ".[3] ", '."'])),
    lambda text, rng: "".join(f"{word[:60]}{'x' * rng.choice([0, 0, 9])} " for word in text.split()),
    _inserted("", "", "\t", "* * *", "..."),
    _inserted(
        "We use cookies, see our privacy policy.",
        "Please enable JavaScript to read on.",
        "Terms of use apply to this text.",
    ),
    _inserted(
        "Lorem ipsum dolor sit amet.",
        "if (x) { return y; }",
        "A word " + "z" * 1200 + " follows here.",
        "See [1] and [citation needed].",
    ),
    _inserted(
        "Visit https://www.example.org/a/b?c=d#e or mail ann.lee@example.com now.",
        "It cost $3.50 (or 20km/h) at 5pm :-)",
        "U.S.A. vs. N.Y. i.e. they'd've gone.",
    ),
]


if __name__ == "__main__":
    for id, text in cases() if sys.argv[1:] == ["cases"] else real_documents():
        sys.stdout.write(json.dumps({"id": id, "text": text}) + "\n")
