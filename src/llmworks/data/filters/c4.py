"""C4 quality filter (Raffel et al. 2020, section 2.2): drop lines that are not sentences, then short documents.

Decisions match datatrove's C4QualityFilter, which follows c4_utils.py of tensorflow-datasets. The bad-word list is not
applied.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.data.filters.rules import FilterDecisions, ThresholdRule, apply_rules
from llmworks.data.filters.words import SENTENCE_ENDS, SPACELESS_WORD, WordVocabulary, split_by_script

CITATIONS = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
ENDS = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class C4(Config):
    """C4 quality filter. It also edits documents: only lines that pass are kept."""

    filter_no_terminal_punct: bool = Field(
        True, description="drop lines without terminal punctuation (FineWeb disables this rule)"
    )
    min_words_per_line: int = Field(3, ge=0, description="drop lines with fewer words")
    max_word_length: int = Field(1000, gt=0, description="drop lines with a longer word")
    remove_citations: bool = Field(True, description="remove [1], [edit] and [citation needed]")
    filter_javascript: bool = Field(True, description="drop lines that mention JavaScript")
    filter_policy: bool = Field(True, description="drop lines about cookies, privacy and terms of use")
    filter_lorem_ipsum: bool = Field(True, description="drop documents with lorem ipsum")
    filter_curly_bracket: bool = Field(True, description="drop documents with a curly bracket")
    min_num_sentences: int = Field(5, ge=0, description="drop documents with fewer sentences after line filtering")


def filter_c4(config: C4, texts: list[str], words: WordVocabulary) -> tuple[list[str], FilterDecisions, Counter[str]]:
    """Filter texts; returns (texts with the lines that pass, decisions, dropped lines by reason)."""
    kept, reasons, sentences = [], [], []
    dropped: Counter[str] = Counter()
    for text in texts:
        lines, reason, count = _filter_lines(config, text, words, dropped)
        kept.append("\n".join(lines).strip())
        reasons.append(reason)
        sentences.append(count)
    decisions = apply_rules(
        len(texts),
        [
            ThresholdRule(
                "c4: too few sentences",
                "sentences (counted up to the bound)",
                np.array(sentences),
                12,
                low=config.min_num_sentences,
            )
        ],
    )
    decisions.reasons = [first or second for first, second in zip(reasons, decisions.reasons, strict=True)]
    return kept, decisions, dropped


def _filter_lines(config: C4, text: str, words: WordVocabulary, dropped: Counter[str]) -> tuple[list[str], str, int]:
    """Return (lines that pass, drop reason of the whole text or "", sentence count up to the bound)."""
    kept: list[str] = []
    sentences = 0
    for raw in text.splitlines():
        line = raw.strip()
        if not line and (config.filter_no_terminal_punct or config.min_words_per_line):
            continue  # dropped too, but not counted as a line
        spaceless = not line.isascii() and SPACELESS_WORD.search(line) is not None  # each character is a word
        chunks = SPACELESS_WORD.sub(" ", line).split() if spaceless else line.split()
        if len(line) > config.max_word_length and any(len(chunk) > config.max_word_length for chunk in chunks):
            dropped["c4: a word too long"] += 1
            continue
        if config.remove_citations and "[" in line:
            line = CITATIONS.sub("", line)
        ends = line.endswith(ENDS) or (spaceless and line[-1] in SENTENCE_ENDS)
        if config.filter_no_terminal_punct and (not ends or line.endswith("...")):
            dropped["c4: no end of a sentence"] += 1
            continue
        if (len(split_by_script(line)) if spaceless else len(raw.split())) < config.min_words_per_line:
            dropped["c4: too few words"] += 1
            continue
        low = line.lower()
        if config.filter_lorem_ipsum and "lorem ipsum" in low:
            return [], "c4: lorem ipsum", sentences
        if config.filter_javascript and "javascript" in low:
            dropped["c4: javascript"] += 1
            continue
        if config.filter_curly_bracket and "{" in line:
            return [], "c4: curly bracket", sentences
        if config.filter_policy and any(policy in low for policy in POLICIES):
            dropped["c4: policy"] += 1
            continue
        if sentences < config.min_num_sentences:
            sentences += words.count_sentences(line)
        kept.append(line)
    return kept, "", sentences
