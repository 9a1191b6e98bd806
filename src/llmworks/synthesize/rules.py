"""Verifiable instructions whose answer is built by rule: phrasings, sampled arguments, and the text transformation.

Pure functions. The checks are IFEval's and IFBench's, by their instruction ids (`score/constraints`). Rules are
applied in the order of the stages: words, shape, front, back, around.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Given = dict[str, Any]
STAGES = ("words", "shape", "front", "back", "around", "alone")
ENDINGS = (
    "That is all.",
    "Read on.",
    "More soon.",
    "Is there anything else I can help with?",
    "Let me know what you think.",
    "End of message.",
    "Stay tuned.",
    "Thank you for reading.",
)
POSTSCRIPTS = (
    "More will follow.",
    "Please pass it on.",
    "This was checked twice.",
    "Ask me for the source.",
    "Nothing was left out.",
)
PLACES = ("[author]", "[date]", "[city]", "[name]", "[source]")
NUMBERS = ("no", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Rule:
    """A kind of instruction.

    `draw` samples the arguments of its check, or returns None where they do not fit the text; `make` transforms the
    answer so far.
    """

    name: str
    stage: str
    said: tuple[str, ...]
    draw: Callable[[str, Random], Given | None]
    make: Callable[[str, str, Given], str]


def words_of(text: str) -> list[str]:
    """Split a text at white space."""
    return text.split()


def _capitals(made: str, text: str, given: Given) -> str:
    words = made.split(" ")
    return " ".join(
        [*(word.upper() for word in words[: given["capital_frequency"]]), *words[given["capital_frequency"] :]]
    )


def _longest(text: str, count: int) -> list[str]:
    """Return the longest words where they are unambiguous: alphabetic, unique, and none other as long."""
    words = sorted(set(words_of(text)), key=len, reverse=True)
    sure = (
        len(words) > count
        and len(words[count - 1]) > len(words[count])
        and all(word.isalpha() and words_of(text).count(word) == 1 for word in words[:count])
    )
    return words[:count] if sure else []


def _highlight_draw(text: str, random: Random) -> Given | None:
    counts = [count for count in (1, 2, 3) if _longest(text, count)]
    return {"num_highlights": random.choice(counts)} if counts else None


def _highlights(made: str, text: str, given: Given) -> str:
    chosen = {word.lower() for word in _longest(text, given["num_highlights"])}
    words = []
    for word in made.split(" "):
        words.append(f"*{word}*" if word.lower() in chosen else word)
        chosen.discard(word.lower())
    return " ".join(words)


def _parts(made: str, count: int) -> list[str]:
    words = made.split(" ")
    return [" ".join(words[i * len(words) // count : (i + 1) * len(words) // count]) for i in range(count)]


def _without(made: str, text: str, given: Given) -> str:
    return " ".join(word for word in made.split(" ") if word.strip(",.;:!?'\"").lower() not in given["forbidden_words"])


def _forbidden(text: str, random: Random) -> Given | None:
    words = [word for word in words_of(text) if word.isalpha() and len(word) > 3]
    return {"forbidden_words": [random.choice(words).lower()]} if len(words) > 3 else None


def _number(key: str, least: int, most: int, **rest: Any) -> Callable[[str, Random], Given | None]:
    def draw(text: str, random: Random) -> Given | None:
        room = min(most, len(words_of(text)) // 2)
        return {key: random.randint(least, room), **rest} if room >= least else None

    return draw


def _capital_draw(text: str, random: Random) -> Given | None:
    """Sample two to four leading words, all alphabetic and not yet in capitals."""
    plain = next(
        (number for number, word in enumerate(words_of(text)) if not word.isalpha() or word.isupper()),
        len(words_of(text)),
    )
    room = min(4, plain, len(words_of(text)) // 2)
    return {"capital_frequency": random.randint(2, room), "capital_relation": "at least"} if room >= 2 else None


def _keyword(text: str, random: Random) -> Given | None:
    """Sample a word of the text and how often to repeat it after it; the check counts occurrences in the text too."""
    words = [word for word in words_of(text) if word.isalpha() and len(word) > 3]
    if not words:
        return None
    word, times = random.choice(words).lower(), random.randint(2, 4)
    return {"keyword": word, "frequency": times + text.lower().count(word), "relation": "at least", "times": times}


def _again(made: str, text: str, given: Given) -> str:
    return f"{made}\n" + " ".join([given["keyword"]] * given["times"])


def _span(text: str, random: Random) -> Given | None:
    count = len(words_of(text))
    if count < 6:
        return None
    start = random.randint(0, count - 4)
    return {"prompt_to_repeat": text, "n_start": start, "n_end": start + random.randint(2, 4)}


RULES = (
    Rule(
        "keywords:forbidden_words",
        "words",
        ("Do not use the word '{forbidden_words[0]}'.", "Leave the word '{forbidden_words[0]}' out."),
        _forbidden,
        _without,
    ),
    Rule(
        "punctuation:no_comma",
        "words",
        ("Do not use any commas.", "There must be no comma in your answer."),
        lambda t, r: {} if "," in t else None,
        lambda m, t, g: m.replace(",", ""),
    ),
    Rule(
        "change_case:capital_word_frequency",
        "words",
        ("Write the first {word} words in capital letters.", "Put the first {word} words in all capitals."),
        _capital_draw,
        _capitals,
    ),
    Rule(
        "detectable_format:number_highlighted_sections",
        "words",
        (
            "Highlight the {word} longest {words} with asterisks, as *this*.",
            "Mark the {word} longest {words} by *asterisks*.",
        ),
        _highlight_draw,
        _highlights,
    ),
    Rule(
        "detectable_format:number_bullet_lists",
        "shape",
        (
            "Divide it into exactly {word} bullet points, each beginning with *.",
            "Give it as exactly {word} bullet points (* like this).",
        ),
        _number("num_bullets", 2, 4),
        lambda m, t, g: "\n".join(f"* {part}" for part in _parts(m, g["num_bullets"])),
    ),
    Rule(
        "detectable_format:multiple_sections",
        "shape",
        (
            "Divide it into {word} parts, and begin each with PART and its number, as PART 1.",
            "Give {word} parts, marked PART 1, PART 2 and so on.",
        ),
        _number("num_sections", 2, 3, section_spliter="PART"),
        lambda m, t, g: "\n".join(f"PART {i + 1}\n{part}" for i, part in enumerate(_parts(m, g["num_sections"]))),
    ),
    Rule(
        "combination:two_responses",
        "shape",
        (
            "Give it twice, the second time in capital letters, with ****** between.",
            "Give two versions, separated by ******: as it is, and in capital letters.",
        ),
        lambda t, r: {} if t != t.upper() else None,
        lambda m, t, g: f"{m}\n******\n{m.upper()}",
    ),
    Rule(
        "detectable_format:title",
        "front",
        (
            "Begin with a title in double angular brackets, as <<title>>: its first three words.",
            "Put its first three words above it as a title, wrapped in << and >>.",
        ),
        lambda t, r: {},
        lambda m, t, g: f"<<{' '.join(words_of(t)[:3])}>>\n{m}",
    ),
    Rule(
        "combination:repeat_prompt",
        "front",
        (
            "First repeat the text word for word, then give your answer on the next line.",
            "Before your answer, say the text once as it is, on a line of its own.",
        ),
        lambda t, r: {"prompt_to_repeat": t},
        lambda m, t, g: f"{t}\n{m}",
    ),
    Rule(
        "detectable_content:number_placeholders",
        "back",
        (
            "After it, leave {word} {places} in square brackets, as [author].",
            "Add {word} {places} such as [date] at the end of it, in square brackets.",
        ),
        _number("num_placeholders", 1, 4),
        lambda m, t, g: f"{m}\n{' '.join(PLACES[: g['num_placeholders']])}",
    ),
    Rule(
        "keywords:frequency",
        "back",
        ("After it, say the word '{keyword}' {word} times.", "Add a line that has '{keyword}' {word} times."),
        _keyword,
        _again,
    ),
    Rule(
        "detectable_content:postscript",
        "back",
        ("Add a postscript that begins with P.S. and says: {told}", "At the end, add P.S. and: {told}"),
        lambda t, r: {"postscript_marker": "P.S.", "told": r.choice(POSTSCRIPTS)},
        lambda m, t, g: f"{m}\nP.S. {g['told']}",
    ),
    Rule(
        "startend:end_checker",
        "back",
        ("End with exactly these words: {end_phrase}", 'Finish with the phrase "{end_phrase}" and nothing after it.'),
        lambda t, r: {"end_phrase": r.choice(ENDINGS)},
        lambda m, t, g: f"{m}\n{g['end_phrase']}",
    ),
    Rule(
        "startend:quotation",
        "around",
        ("Wrap your whole answer in double quotation marks.", "Put double quotation marks around all of your answer."),
        lambda t, r: {} if '"' not in t else None,
        lambda m, t, g: f'"{m}"',
    ),
    Rule(
        "detectable_format:json_format",
        "alone",
        (
            'Give it as JSON with the one key "text", and nothing else.',
            'Answer in JSON only: an object whose key "text" holds it.',
        ),
        lambda t, r: {},
        lambda m, t, g: json.dumps({"text": m}, ensure_ascii=False),
    ),
    Rule(
        "repeat:repeat_span",
        "alone",
        (
            "Say only its words {first} to {last}, and nothing else.",
            "Answer with nothing but the words number {first} to {last} of it.",
        ),
        _span,
        lambda m, t, g: " ".join(words_of(t)[g["n_start"] : g["n_end"]]),
    ),
)
OURS = ("told", "times")  # arguments that are not passed to checks
ALONE_WITH = ("shape", "front")  # stages with at most one rule


def number_word(given: Given) -> str:
    """Return the number among a rule's arguments as a word."""
    found = given.get("times") or next(
        (value for value in given.values() if isinstance(value, int) and not isinstance(value, bool)), 0
    )
    return NUMBERS[found] if found < len(NUMBERS) else str(found)


def said(rule: Rule, given: Given, random: Random) -> str:
    """Return the instruction as a sentence."""
    word = number_word(given)
    one = word == "one"
    forms = {
        "first": given.get("n_start", 0) + 1,
        "last": given.get("n_end", 0),
        "words": "word" if one else "words",
        "places": "placeholder" if one else "placeholders",
    }
    return random.choice(rule.said).format(**given, **forms, word=word)


def chosen(rules: tuple[Rule, ...], text: str, count: int, random: Random) -> list[tuple[Rule, Given]]:
    """Sample up to `count` compatible rules that fit the text, in the order of their stages."""
    order = list(rules)
    random.shuffle(order)
    found: list[tuple[Rule, Given]] = []
    for rule in order:
        stages = [other.stage for other, _ in found]
        if len(found) == count or "alone" in stages:
            break
        if (rule.stage == "alone" and found) or (rule.stage in ALONE_WITH and rule.stage in stages):
            continue
        given = rule.draw(text, random)
        if given is not None:
            found.append((rule, given))
    return sorted(
        found, key=lambda pair: (STAGES.index(pair[0].stage), [rule.name for rule in RULES].index(pair[0].name))
    )


def answer(text: str, rules: list[tuple[Rule, Given]]) -> str:
    """Apply all rules to a text."""
    made = text
    for rule, given in rules:
        made = rule.make(made, text, given)
    return made
