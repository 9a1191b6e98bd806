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

Arguments = dict[str, Any]
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
class InstructionRule:
    """A kind of instruction.

    `draw` samples the arguments of its check, or returns None where they do not fit the text; `make` transforms the
    answer so far.
    """

    name: str
    stage: str
    phrasings: tuple[str, ...]
    sample_arguments: Callable[[str, Random], Arguments | None]
    apply: Callable[[str, str, Arguments], str]


def split_words(text: str) -> list[str]:
    """Split a text at white space."""
    return text.split()


def _capitalize_words(made: str, text: str, given: Arguments) -> str:
    words = made.split(" ")
    return " ".join(
        [*(word.upper() for word in words[: given["capital_frequency"]]), *words[given["capital_frequency"] :]]
    )


def _find_longest_words(text: str, count: int) -> list[str]:
    """Return the longest words where they are unambiguous: alphabetic, unique, and none other as long."""
    words = sorted(set(split_words(text)), key=len, reverse=True)
    sure = (
        len(words) > count
        and len(words[count - 1]) > len(words[count])
        and all(word.isalpha() and split_words(text).count(word) == 1 for word in words[:count])
    )
    return words[:count] if sure else []


def _sample_highlights(text: str, random: Random) -> Arguments | None:
    counts = [count for count in (1, 2, 3) if _find_longest_words(text, count)]
    return {"num_highlights": random.choice(counts)} if counts else None


def _highlight_words(made: str, text: str, given: Arguments) -> str:
    chosen = {word.lower() for word in _find_longest_words(text, given["num_highlights"])}
    words = []
    for word in made.split(" "):
        words.append(f"*{word}*" if word.lower() in chosen else word)
        chosen.discard(word.lower())
    return " ".join(words)


def _split_parts(made: str, count: int) -> list[str]:
    words = made.split(" ")
    return [" ".join(words[i * len(words) // count : (i + 1) * len(words) // count]) for i in range(count)]


def _remove_forbidden(made: str, text: str, given: Arguments) -> str:
    return " ".join(word for word in made.split(" ") if word.strip(",.;:!?'\"").lower() not in given["forbidden_words"])


def _sample_forbidden(text: str, random: Random) -> Arguments | None:
    words = [word for word in split_words(text) if word.isalpha() and len(word) > 3]
    return {"forbidden_words": [random.choice(words).lower()]} if len(words) > 3 else None


def _make_number_sampler(key: str, least: int, most: int, **rest: Any) -> Callable[[str, Random], Arguments | None]:
    def draw(text: str, random: Random) -> Arguments | None:
        room = min(most, len(split_words(text)) // 2)
        return {key: random.randint(least, room), **rest} if room >= least else None

    return draw


def _sample_capitals(text: str, random: Random) -> Arguments | None:
    """Sample two to four leading words, all alphabetic and not yet in capitals."""
    plain = next(
        (number for number, word in enumerate(split_words(text)) if not word.isalpha() or word.isupper()),
        len(split_words(text)),
    )
    room = min(4, plain, len(split_words(text)) // 2)
    return {"capital_frequency": random.randint(2, room), "capital_relation": "at least"} if room >= 2 else None


def _sample_keyword(text: str, random: Random) -> Arguments | None:
    """Sample a word of the text and how often to repeat it after it; the check counts occurrences in the text too."""
    words = [word for word in split_words(text) if word.isalpha() and len(word) > 3]
    if not words:
        return None
    word, times = random.choice(words).lower(), random.randint(2, 4)
    return {"keyword": word, "frequency": times + text.lower().count(word), "relation": "at least", "times": times}


def _append_keyword(made: str, text: str, given: Arguments) -> str:
    return f"{made}\n" + " ".join([given["keyword"]] * given["times"])


def _sample_span(text: str, random: Random) -> Arguments | None:
    count = len(split_words(text))
    if count < 6:
        return None
    start = random.randint(0, count - 4)
    return {"prompt_to_repeat": text, "n_start": start, "n_end": start + random.randint(2, 4)}


RULES = (
    InstructionRule(
        "keywords:forbidden_words",
        "words",
        ("Do not use the word '{forbidden_words[0]}'.", "Leave the word '{forbidden_words[0]}' out."),
        _sample_forbidden,
        _remove_forbidden,
    ),
    InstructionRule(
        "punctuation:no_comma",
        "words",
        ("Do not use any commas.", "There must be no comma in your answer."),
        lambda t, r: {} if "," in t else None,
        lambda m, t, g: m.replace(",", ""),
    ),
    InstructionRule(
        "change_case:capital_word_frequency",
        "words",
        ("Write the first {word} words in capital letters.", "Put the first {word} words in all capitals."),
        _sample_capitals,
        _capitalize_words,
    ),
    InstructionRule(
        "detectable_format:number_highlighted_sections",
        "words",
        (
            "Highlight the {word} longest {words} with asterisks, as *this*.",
            "Mark the {word} longest {words} by *asterisks*.",
        ),
        _sample_highlights,
        _highlight_words,
    ),
    InstructionRule(
        "detectable_format:number_bullet_lists",
        "shape",
        (
            "Divide it into exactly {word} bullet points, each beginning with *.",
            "Give it as exactly {word} bullet points (* like this).",
        ),
        _make_number_sampler("num_bullets", 2, 4),
        lambda m, t, g: "\n".join(f"* {part}" for part in _split_parts(m, g["num_bullets"])),
    ),
    InstructionRule(
        "detectable_format:multiple_sections",
        "shape",
        (
            "Divide it into {word} parts, and begin each with PART and its number, as PART 1.",
            "Give {word} parts, marked PART 1, PART 2 and so on.",
        ),
        _make_number_sampler("num_sections", 2, 3, section_spliter="PART"),
        lambda m, t, g: "\n".join(f"PART {i + 1}\n{part}" for i, part in enumerate(_split_parts(m, g["num_sections"]))),
    ),
    InstructionRule(
        "combination:two_responses",
        "shape",
        (
            "Give it twice, the second time in capital letters, with ****** between.",
            "Give two versions, separated by ******: as it is, and in capital letters.",
        ),
        lambda t, r: {} if t != t.upper() else None,
        lambda m, t, g: f"{m}\n******\n{m.upper()}",
    ),
    InstructionRule(
        "detectable_format:title",
        "front",
        (
            "Begin with a title in double angular brackets, as <<title>>: its first three words.",
            "Put its first three words above it as a title, wrapped in << and >>.",
        ),
        lambda t, r: {},
        lambda m, t, g: f"<<{' '.join(split_words(t)[:3])}>>\n{m}",
    ),
    InstructionRule(
        "combination:repeat_prompt",
        "front",
        (
            "First repeat the text word for word, then give your answer on the next line.",
            "Before your answer, say the text once as it is, on a line of its own.",
        ),
        lambda t, r: {"prompt_to_repeat": t},
        lambda m, t, g: f"{t}\n{m}",
    ),
    InstructionRule(
        "detectable_content:number_placeholders",
        "back",
        (
            "After it, leave {word} {places} in square brackets, as [author].",
            "Add {word} {places} such as [date] at the end of it, in square brackets.",
        ),
        _make_number_sampler("num_placeholders", 1, 4),
        lambda m, t, g: f"{m}\n{' '.join(PLACES[: g['num_placeholders']])}",
    ),
    InstructionRule(
        "keywords:frequency",
        "back",
        ("After it, say the word '{keyword}' {word} times.", "Add a line that has '{keyword}' {word} times."),
        _sample_keyword,
        _append_keyword,
    ),
    InstructionRule(
        "detectable_content:postscript",
        "back",
        ("Add a postscript that begins with P.S. and says: {told}", "At the end, add P.S. and: {told}"),
        lambda t, r: {"postscript_marker": "P.S.", "told": r.choice(POSTSCRIPTS)},
        lambda m, t, g: f"{m}\nP.S. {g['told']}",
    ),
    InstructionRule(
        "startend:end_checker",
        "back",
        ("End with exactly these words: {end_phrase}", 'Finish with the phrase "{end_phrase}" and nothing after it.'),
        lambda t, r: {"end_phrase": r.choice(ENDINGS)},
        lambda m, t, g: f"{m}\n{g['end_phrase']}",
    ),
    InstructionRule(
        "startend:quotation",
        "around",
        ("Wrap your whole answer in double quotation marks.", "Put double quotation marks around all of your answer."),
        lambda t, r: {} if '"' not in t else None,
        lambda m, t, g: f'"{m}"',
    ),
    InstructionRule(
        "detectable_format:json_format",
        "alone",
        (
            'Give it as JSON with the one key "text", and nothing else.',
            'Answer in JSON only: an object whose key "text" holds it.',
        ),
        lambda t, r: {},
        lambda m, t, g: json.dumps({"text": m}, ensure_ascii=False),
    ),
    InstructionRule(
        "repeat:repeat_span",
        "alone",
        (
            "Say only its words {first} to {last}, and nothing else.",
            "Answer with nothing but the words number {first} to {last} of it.",
        ),
        _sample_span,
        lambda m, t, g: " ".join(split_words(t)[g["n_start"] : g["n_end"]]),
    ),
)
INTERNAL_ARGUMENTS = ("told", "times")  # arguments that are not passed to checks
EXCLUSIVE_STAGES = ("shape", "front")  # stages with at most one rule


def number_word(given: Arguments) -> str:
    """Return the number among a rule's arguments as a word."""
    found = given.get("times") or next(
        (value for value in given.values() if isinstance(value, int) and not isinstance(value, bool)), 0
    )
    return NUMBERS[found] if found < len(NUMBERS) else str(found)


def format_instruction(rule: InstructionRule, arguments: Arguments, random: Random) -> str:
    """Return the instruction as a sentence."""
    word = number_word(arguments)
    one = word == "one"
    forms = {
        "first": arguments.get("n_start", 0) + 1,
        "last": arguments.get("n_end", 0),
        "words": "word" if one else "words",
        "places": "placeholder" if one else "placeholders",
    }
    return random.choice(rule.phrasings).format(**arguments, **forms, word=word)


def sample_rules(
    rules: tuple[InstructionRule, ...], text: str, count: int, random: Random
) -> list[tuple[InstructionRule, Arguments]]:
    """Sample up to `count` compatible rules that fit the text, in the order of their stages."""
    order = list(rules)
    random.shuffle(order)
    selected: list[tuple[InstructionRule, Arguments]] = []
    for rule in order:
        stages = [other.stage for other, _ in selected]
        if len(selected) == count or "alone" in stages:
            break
        if (rule.stage == "alone" and selected) or (rule.stage in EXCLUSIVE_STAGES and rule.stage in stages):
            continue
        given = rule.sample_arguments(text, random)
        if given is not None:
            selected.append((rule, given))
    return sorted(
        selected, key=lambda pair: (STAGES.index(pair[0].stage), [rule.name for rule in RULES].index(pair[0].name))
    )


def build_answer(text: str, rules: list[tuple[InstructionRule, Arguments]]) -> str:
    """Apply all rules to a text."""
    result = text
    for rule, given in rules:
        result = rule.apply(result, text, given)
    return result
