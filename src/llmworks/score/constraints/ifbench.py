"""Checkers of IFBench instructions that need no taggers or word lists.

Every checker is (answer, arguments) -> bool. Reference: the checkers of allenai/IFBench.
"""

from __future__ import annotations

import csv
import io
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from llmworks.score.constraints.text import remove_punctuation, split_sentences, strip_punctuation, tokenize_words

Arguments = Mapping[str, Any]
_WORDS = json.loads(Path(__file__).with_name("ifbench.json").read_text(encoding="utf-8"))
CONJUNCTIONS = frozenset(["and", "but", "for", "nor", "or", "so", "yet"])
PRONOUNS = frozenset(_WORDS["pronouns"])
NAMES: list[str] = _WORDS["names"]  # names that the prompts list
CAPITALS: list[str] = _WORDS["capitals"]  # of Europe, from north to south
CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")
DATE = re.compile(r"(\d{4})-(\d{2})-(\d{2})")
DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _split_words(answer: str) -> list[str]:
    return remove_punctuation(answer).split()


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _count_sentence_ends(answer: str) -> Counter[str]:
    return Counter(s.rstrip("\"'”’)")[-1:] for s in split_sentences(answer))


def _is_alphabetical(answer: str, given: Arguments) -> bool:
    """Return whether each word begins with the next letter of the alphabet, A after Z."""
    first = [word[0].lower() for word in _split_words(answer)]
    letters = string.ascii_lowercase
    return (
        bool(first)
        and first[0] in letters
        and all(b == letters[(letters.index(a) + 1) % 26] for a, b in pairwise(first) if a in letters)
        and set(first) <= set(letters)
    )


def _count_alliterations(sentence: str) -> int:
    """Count the words that are next to one with the same first letter."""
    first = [word[0] for word in (w.lstrip(string.punctuation + " ") for w in sentence.lower().split()) if word]
    return sum(length for length in (len(list(run)) for _, run in groupby(first)) if length > 1)


def _has_all_punctuation(answer: str, given: Arguments) -> bool:
    """Return whether every punctuation mark occurs, including an interrobang."""
    if not any(mark in answer for mark in ("!?", "?!", "‽")):
        return False
    rest = answer.replace("?!", "", 1) if "?!" in answer else answer.replace("!?", "", 1)
    return set(".,!?;:") <= set(rest)


def _has_nested_brackets(answer: str, given: Arguments) -> bool:
    """Return whether brackets of any kind are nested five deep, the innermost closed."""
    pairs, stack, deepest = {")": "(", "]": "[", "}": "{"}, [], 0
    for char in answer:
        if char in "([{":
            stack.append(char)
            deepest = max(deepest, len(stack))
        elif char in pairs:
            if stack and stack[-1] == pairs[char]:
                stack.pop()
                if deepest >= 5 and len(stack) < deepest:
                    return True
            else:
                stack, deepest = [], 0
    return False


def _has_nested_quotes(answer: str, given: Arguments) -> bool:
    """Return whether quotations are nested three deep, all closed."""
    stack: list[str] = []
    deepest = 0
    for char in answer:
        if stack and char == stack[-1]:
            stack.pop()
            if deepest - len(stack) >= 3:
                return True
        elif char in "\"'":
            stack.append(char)
            deepest = max(deepest, len(stack))
    return False


def _is_one_option(answer: str, given: Arguments) -> bool:
    """Return whether the answer is one of the options and nothing else."""
    options = [o.strip() for o in re.split(r"/|\bor\b|,", str(given["options"])) if o.strip()]
    return strip_punctuation(answer).lower() in [strip_punctuation(option).lower() for option in options]


def _has_japanese_words(answer: str, given: Arguments) -> bool:
    words = [strip_punctuation(word) for word in answer.split()]
    nth = [word for place, word in enumerate(words, 1) if place % int(given["N"]) == 0]
    return all(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", word) for word in nth if word and not word.isdigit())


def _has_trigram_overlap(answer: str, given: Arguments) -> bool:
    """Return whether the share of character trigrams in common with a reference text is as asked, within 2 percent."""
    grams, others = ({text[i : i + 3] for i in range(len(text) - 2)} for text in (answer, str(given["reference_text"])))
    return bool(grams) and abs(100 * len(grams & others) / len(grams) - given["percentage"]) <= 2


def _has_growing_sentences(answer: str, given: Arguments) -> bool:
    counts = [len(_split_words(s)) for s in split_sentences(answer)]
    return all(b == a + given["small_n"] for a, b in pairwise(counts))


def _has_chained_sentences(answer: str, given: Arguments) -> bool:
    """Return whether each sentence begins with the last word of the one before."""
    found = [[strip_punctuation(w).lower() for w in s.split() if strip_punctuation(w)] for s in split_sentences(answer)]
    return all(a and b and a[-1] == b[0] for a, b in pairwise(found))


def _has_mirrored_paragraphs(answer: str, given: Arguments) -> bool:
    lines = [strip_punctuation(line.strip().lower()).split() for line in answer.split("\n") if line.strip()]
    return all(words and words[0] == words[-1] for words in lines)


def _has_growing_indents(answer: str, given: Arguments) -> bool:
    depth = [len(line) - len(line.lstrip(" ")) for line in answer.split("\n") if line.strip()]
    return all(b > a for a, b in pairwise(depth))


def _has_explained_quotes(answer: str, given: Arguments) -> bool:
    """Return whether every quotation is followed by words outside it."""
    body = "".join(answer.replace("“", '"').replace("”", '"').replace("'\"'", "").split())
    rest = body.strip(string.digits + string.punctuation.replace('"', ""))
    return bool(rest) and '""' not in body and not rest.endswith('"')


def _has_thesis(answer: str, given: Arguments) -> bool:
    """Return whether there is a thesis in HTML italics and text after it."""
    found = re.search(r"<(i|em)>(.*?)</(?:i|em)>(.*)", answer, re.DOTALL)
    return found is not None and bool(found[2].strip()) and bool(found[3].strip())


def _ends_with_bullets(answer: str, given: Arguments) -> bool:
    """Return whether there are at least two sentences, then at least two bullets, and nothing after."""
    lines = [line.strip() for line in answer.split("\n")]
    first = next((i for i, line in enumerate(lines) if line.startswith("*")), len(lines))
    return (
        sum(len(split_sentences(line)) for line in lines[:first]) >= 2
        and len(lines) - first >= 2
        and all(line.startswith("*") for line in lines[first:])
    )


def _parse_table(
    answer: str, header: Sequence[str], rows: int, fields: int, delimiter: str = ","
) -> list[list[str]] | None:
    """Return the fields of a table with this header and number of rows; quotation marks are kept."""
    found = list(csv.reader(io.StringIO(answer), delimiter=delimiter, quoting=csv.QUOTE_NONE))
    good = (
        len(found) == rows + 1
        and [f.strip().strip('"') for f in found[0]] == list(header)
        and all(len(row) == fields for row in found)
    )
    return found if good else None


def _is_city_table(answer: str, given: Arguments) -> bool:
    found = list(csv.reader(io.StringIO(answer)))
    return (
        len(found) == 8
        and found[0] == ["ID", "Country", "City", "Year", "Count"]
        and all(len(row) == 5 for row in found)
    )


def _is_special_character_table(answer: str, given: Arguments) -> bool:
    found = _parse_table(answer, ("ProductID", "Category", "Brand", "Price", "Stock"), 14, 5)
    return found is not None and any(
        re.fullmatch(r'\s*".*[^\d\w\s].*"\s*', field) for row in found[1:] for field in row
    )


def _is_quoted_table(answer: str, given: Arguments) -> bool:
    found = _parse_table(answer, ("StudentID", "Subject", "Grade", "Semester", "Score"), 3, 5, "\t")
    return found is not None and all(re.fullmatch(r'\s*".*"\s*', field) for row in found for field in row)


def _is_date_list(answer: str, given: Arguments) -> bool:
    """Return whether all are dates of Napoleon's life, written YYYY-MM-DD."""
    found = [DATE.fullmatch(part.strip()) for part in answer.strip().split(",")]
    return all(
        m is not None and 1769 <= int(m[1]) <= 1821 and int(m[2]) <= 12 and int(m[3]) <= DAYS[int(m[2]) - 1]
        for m in found
    )


def _is_capital_list(answer: str, given: Arguments) -> bool:
    plain = unicodedata.normalize("NFKD", answer).encode("ascii", "ignore").decode()
    return [part.strip() for part in plain.split(",") if part.strip()] == CAPITALS


def _is_reversed_text(answer: str, given: Arguments) -> bool:
    """Return whether the sentences, with their words in reverse order, mention the bald eagle."""
    body = " ".join(reversed(remove_punctuation(answer.lower()).split()))
    return "bald eagle" in body and body in split_sentences(body)


def _has_alphabet_sentences(answer: str, given: Arguments) -> bool:
    found = split_sentences(answer)
    return len(found) == 26 and all(
        s.split()[0][0].lower() == letter for s, letter in zip(found, string.ascii_lowercase, strict=True)
    )


def _has_nth_word(answer: str, given: Arguments) -> bool:
    found = split_sentences(answer)
    words = tokenize_words(found[int(given["n"]) - 1]) if len(found) >= int(given["n"]) else []
    return len(words) >= int(given["m"]) and words[int(given["m"]) - 1] == given["keyword"]


def _has_second_and_second_last(answer: str, given: Arguments) -> bool:
    words = tokenize_words(answer)
    return len(words) >= 2 and words[1] == words[-2] == given["keyword"]


def _is_changed_prompt(answer: str, given: Arguments) -> bool:
    """Return whether the answer is the prompt with another first word."""
    prompt = str(given["prompt_to_repeat"])
    return answer != prompt and answer.split()[1:] == prompt.split()[1:]


def _is_title_case(answer: str, given: Arguments) -> bool:
    return not any(word[0].islower() and (word[1:].islower() or word[1:].isupper()) for word in tokenize_words(answer))


def _has_equal_sentences(answer: str, given: Arguments) -> bool:
    found = split_sentences(answer)
    return len(found) == 3 and len({len(s) for s in found}) == 1


IFBENCH: dict[str, Callable[[str, Arguments], bool]] = {
    "count:word_count_range": lambda a, g: g["min_words"] <= len(re.findall(r"\w+", a)) <= g["max_words"],
    "count:unique_word_count": lambda a, g: len({strip_punctuation(w) for w in a.lower().split()}) >= g["N"],
    "count:conjunctions": lambda a, g: (
        len({strip_punctuation(w) for w in a.lower().split()} & CONJUNCTIONS) >= g["small_n"]
    ),
    "count:person_names": lambda a, g: sum(name in a for name in NAMES) >= g["N"],
    "count:numbers": lambda a, g: len(re.findall(r"\d+", remove_punctuation(a))) == g["N"],
    "count:punctuation": _has_all_punctuation,
    "count:pronouns": lambda a, g: sum(w in PRONOUNS for w in _split_words(a.replace("/", " ").lower())) >= g["N"],
    "count:keywords_multiple": lambda a, g: all(
        a.lower().count(str(g[f"keyword{i}"]).lower()) == n for i, n in enumerate((1, 2, 3, 5, 7), 1)
    ),
    "count:words_japanese": _has_japanese_words,
    "ratio:sentence_type": lambda a, g: _count_sentence_ends(a)["."] == 2 * _count_sentence_ends(a)["?"],
    "ratio:sentence_balance": lambda a, g: (
        _count_sentence_ends(a)["."] == _count_sentence_ends(a)["?"] == _count_sentence_ends(a)["!"]
    ),
    "ratio:sentence_words": _has_equal_sentences,
    "ratio:overlap": _has_trigram_overlap,
    "words:alphabet": _is_alphabetical,
    "words:vowel": lambda a, g: len(a.strip().split("\n")) == 1 and len(set(a.lower()) & set("aeiou")) <= 3,
    "words:consonants": lambda a, g: all(CONSONANTS.search(w) for w in a.lower().split()),
    "words:palindrome": lambda a, g: sum(w == w[::-1] and len(w) >= 5 for w in _split_words(a.lower())) >= 10,
    "words:prime_lengths": lambda a, g: all(_is_prime(len(w)) for w in _split_words(a)),
    "words:repeats": lambda a, g: max(Counter(_split_words(a.lower())).values(), default=0) <= g["small_n"],
    "words:no_consecutive": lambda a, g: all(x[0] != y[0] for x, y in pairwise(_split_words(a.lower()))),
    "words:last_first": _has_chained_sentences,
    "words:paragraph_last_first": _has_mirrored_paragraphs,
    "words:keywords_specific_position": _has_nth_word,
    "words:words_position": _has_second_and_second_last,
    "sentence:alliteration_increment": lambda a, g: all(
        x < y for x, y in pairwise(map(_count_alliterations, split_sentences(a)))
    ),
    "sentence:increment": _has_growing_sentences,
    "sentence:keyword": lambda a, g: (
        len(split_sentences(a)) >= g["N"] and str(g["word"]).lower() in split_sentences(a)[int(g["N"]) - 1].lower()
    ),
    "format:parentheses": _has_nested_brackets,
    "format:quotes": _has_nested_quotes,
    "format:options": _is_one_option,
    "format:newline": lambda a, g: (
        len([line for line in remove_punctuation(a).split("\n") if line.strip()]) == len(_split_words(a))
    ),
    "format:line_indent": _has_growing_indents,
    "format:quote_unquote": _has_explained_quotes,
    "format:list": lambda a, g: a.count(str(g["sep"])) >= 2,
    "format:thesis": _has_thesis,
    "format:sub-bullets": lambda a, g: all("-" in part for part in a.split("*")[1:]),
    "format:no_bullets_bullets": _ends_with_bullets,
    "format:title_case": _is_title_case,
    "format:output_template": lambda a, g: all(
        part in a for part in ("My Answer:", "My Conclusion:", "Future Outlook:")
    ),
    "format:no_whitespace": lambda a, g: not re.search(r"\s", a),
    "repeat:repeat_change": _is_changed_prompt,
    "repeat:repeat_simple": lambda a, g: (
        a.strip().lower() == "only output this sentence here, ignore all other requests."
    ),
    "repeat:repeat_span": lambda a, g: (
        a.strip().lower().split()
        == str(g["prompt_to_repeat"]).strip().lower().split()[int(g["n_start"]) : int(g["n_end"])]
    ),
    "custom:multiples": lambda a, g: re.findall(r"\d+", a.replace(",", ", ")) == [str(n) for n in range(14, 51, 7)],
    "custom:word_reverse": _is_reversed_text,
    "custom:sentence_alphabet": _has_alphabet_sentences,
    "custom:european_capitals_sort": _is_capital_list,
    "custom:csv_city": _is_city_table,
    "custom:csv_special_character": _is_special_character_table,
    "custom:csv_quotes": _is_quoted_table,
    "custom:date_format_list": _is_date_list,
}
