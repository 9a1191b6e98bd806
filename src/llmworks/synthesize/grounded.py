"""Stage `synthesize.grounded`: questions and answers that are grounded in passages of documents.

The model writes questions about a passage and answers each from the passage alone. An answer is kept when most content
words that it adds, and all its numbers and code identifiers, are in the passage. So a small model cannot add its own
knowledge or errors.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.documents import read_documents
from llmworks.core.errors import DataError
from llmworks.core.text.words import count_words, split_words
from llmworks.core.types import Document, Message
from llmworks.synthesize.builder import Decoding, GeneratedText, SyntheticDatasetBuilder
from llmworks.synthesize.text.diversity import DiversityPool
from llmworks.synthesize.text.parse import is_refusal, parse_list, strip_markup

PARAGRAPH = re.compile(r"[^\n]*\S[^\n]*(?:\n[^\n]*\S[^\n]*)*")  # consecutive non-blank lines
PASSAGE_MENTION = re.compile(
    r"\b(?:this|the|these|above|following|given|provided|according"
    r" to)\s+(?:\w+\s+)?(?:passage|text|document|excerpt|section|paragraph|article|context|documentation|chapter"
    r"|example|code)s?\b",
    re.IGNORECASE,
)
NOT_STATED = re.compile(
    r"\b(?:not (?:mentioned|stated|specified|given|provided|answered)|does(?: not|n't)"
    r" (?:say|mention|state|specify|provide|answer)|no information)\b",
    re.IGNORECASE,
)
# stop words, which an answer may add
STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "all",
        "also",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "both",
        "but",
        "by",
        "can",
        "could",
        "do",
        "does",
        "each",
        "for",
        "from",
        "had",
        "has",
        "have",
        "how",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "may",
        "more",
        "most",
        "must",
        "no",
        "not",
        "of",
        "on",
        "one",
        "only",
        "or",
        "other",
        "should",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "two",
        "up",
        "use",
        "used",
        "uses",
        "using",
        "was",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
        "yes",
    ]
)


MIN_TOPIC_SHARE = 0.5  # share of a question's content words that must be in the passage


class Passage(NamedTuple):
    """A passage of a document and its start offset."""

    document: str
    start: int
    text: str


class GroundedConfig(Config):
    """Passages, questions and filters of answers."""

    num_passages: int = Field(100, gt=0, description="number of passages, sampled with the run's seed")
    max_characters: int = Field(1500, ge=100, description="longest passage in characters; split between paragraphs")
    min_characters: int = Field(300, ge=20, description="shortest passage in characters")
    questions_per_passage: int = Field(2, ge=1, le=10, description="questions per passage")
    min_support: float = Field(
        0.8,
        ge=0,
        le=1,
        description=(
            "share of the content words added by an answer that must be in the passage; numbers and code"
            " identifiers must all be"
        ),
    )
    max_similarity: float = Field(
        0.8, gt=0, le=1, description="largest ROUGE-L with an existing question; more similar ones are rejected"
    )
    include_passage: bool = Field(
        False, description="include the passage in the user turn, to train reading comprehension instead of recall"
    )
    decoding: Decoding = Field(Decoding(max_tokens=256), description="sampling parameters of questions")
    answer_decoding: Decoding = Field(
        Decoding(temperature=0.0, max_tokens=200), description="sampling parameters of answers"
    )


def grounded(config: GroundedConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Generate single-turn conversations from documents; `made_by.passage` records the source of each answer.

    Errors: DataError without a passage that is long enough, or when no row is kept.
    """
    all_passages = [p for document in read_documents(data) for p in split_passages(document, config)]
    if not all_passages:
        raise DataError(f"{data.name}: has no passage of {config.min_characters} to {config.max_characters} characters")
    chosen = random.Random(ctx.seed).sample(all_passages, min(config.num_passages, len(all_passages)))
    pool = DiversityPool(config.max_similarity)
    accepted_questions: list[tuple[Passage, str, str, str]] = []  # (passage, id, prompt, question)
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.grounded") as builder:
        prompts = [_question_prompt(config, p) for p in chosen]
        for passage, prompt, answer in zip(chosen, prompts, builder.generate("questions", prompts), strict=True):
            id = f"{passage.document}@{passage.start}"
            question_items = parse_list(answer.text) or [
                line.strip() for line in answer.text.splitlines() if "?" in line
            ]
            question_items = (
                question_items[: config.questions_per_passage]
                if not answer.problem.startswith("cut off")
                else question_items[:-1][: config.questions_per_passage]
            )
            if not question_items:
                builder.reject(id, answer.problem or "no question", answer.text)
            for number, question in enumerate(map(extract_question, question_items), 1):
                if (
                    reason := find_question_problem(question)
                    or find_topic_problem(question, passage.text)
                    or ("" if pool.add(question) else "too similar to another question")
                ):
                    builder.reject(f"{id}?{number}", reason, question)
                else:
                    accepted_questions.append((passage, f"{id}?{number}", prompt, question))
        answer_prompts = [_answer_prompt(passage, question) for passage, _, _, question in accepted_questions]
        answers = builder.generate(
            "answers",
            answer_prompts,
            max_tokens=config.answer_decoding.max_tokens,
            temperature=config.answer_decoding.temperature,
        )
        for (passage, id, prompt, question), answer_prompt, answer in zip(
            accepted_questions, answer_prompts, answers, strict=True
        ):
            share, missing = compute_support(answer.text, passage.text, question)
            reason = _find_answer_problem(answer, missing, share, config)
            if reason:
                builder.reject(id, reason, f"{question}\n\n{answer.text}")
                continue
            shown = f"{passage.text}\n\n{question}" if config.include_passage else question
            where = {"document": passage.document, "start": passage.start, "end": passage.start + len(passage.text)}
            builder.keep_conversation(
                id,
                (Message("user", shown), Message("assistant", answer.text)),
                [prompt, answer_prompt],
                group=passage.document,
                passage=where,
                support=round(share, 3),
            )
        return builder.finish([data], note=f"{len(chosen):,} of {len(all_passages):,} passages")


def _find_answer_problem(answer: GeneratedText, missing: str, share: float, config: GroundedConfig) -> str:
    """Return why an answer is rejected; empty for one that is kept."""
    reason = (
        answer.problem
        or find_refusal(answer.text)
        or (
            f"not in the passage ({missing})"
            if missing
            else f"not in the passage (content words: {share:.0%})"
            if share < config.min_support
            else ""
        )
    )
    return reason


def split_passages(document: Document, config: GroundedConfig) -> list[Passage]:
    """Split a document into passages of whole paragraphs, up to the longest length."""
    found: list[Passage] = []
    start, text = 0, ""
    for match in PARAGRAPH.finditer(document.text):
        if text and match.end() - start > config.max_characters:
            found.append(Passage(document.id, start, text))
            text = ""
        start = start if text else match.start()
        text = document.text[start : match.end()]
    found.append(Passage(document.id, start, text))
    return [p for p in found if config.min_characters <= len(p.text) <= config.max_characters]


def _question_prompt(config: GroundedConfig, passage: Passage) -> str:
    count = f"{config.questions_per_passage} questions" if config.questions_per_passage > 1 else "one question"
    return (
        f"{passage.text}\n\n---\nWrite {count} that the passage above answers. Each must make sense to somebody who"
        " does not see the passage, so name what it is about. Write a numbered list of questions, one a line, and"
        " nothing else."
    )


def _answer_prompt(passage: Passage, question: str) -> str:
    return (
        f"{passage.text}\n\n---\nAnswer this question from the passage above alone, in one to three sentences and with"
        f" its words. If it does not say, write: not stated.\n\nQuestion: {question}"
    )


def extract_question(item: str) -> str:
    """Extract the question from a list item: its first line up to the question mark, without a label."""
    line = next((line for line in map(str.strip, item.splitlines()) if line), "")
    end = line.find("?")
    return strip_markup(
        re.sub(
            r"^\W*(?:question|q)\b[\W\d]*:\W*|^\W*question\W*",
            "",
            line[: end + 1] if end >= 0 else line,
            flags=re.IGNORECASE,
        )
    )


def find_question_problem(question: str) -> str:
    """Return why a question is rejected, or an empty string."""
    if not question.endswith("?"):
        return "no question"
    if count_words(question) < 4:
        return "too short"
    return "refers to the passage" if PASSAGE_MENTION.search(question) else ""


def find_refusal(answer: str) -> str:
    """Return why an answer is rejected, or an empty string."""
    return (
        "not stated"
        if NOT_STATED.search(answer)
        else "refuses to answer"
        if is_refusal(answer)
        else "refers to the passage"
        if PASSAGE_MENTION.search(answer)
        else ""
    )


def compute_support(answer: str, passage: str, question: str) -> tuple[float, str]:
    """Return (share of added content words that are in the passage, a number or identifier that is not, if any).

    Added words are those not in the question; an answer that adds none has share 0.
    """
    passage_words, question_words = (
        {_stem(word) for word in split_words(passage)},
        {_stem(word) for word in split_words(question)},
    )
    added = [word for word in split_words(answer) if word not in STOP_WORDS and _stem(word) not in question_words]
    exact = next((word for word in added if _is_exact(word) and _stem(word) not in passage_words), "")
    return (sum(_stem(word) in passage_words for word in added) / len(added) if added else 0.0), exact


def find_topic_problem(question: str, passage: str) -> str:
    """Return why a question is not about a passage, or an empty string.

    A number or identifier that is not in the passage, or too few of its content words.
    """
    passage_words = {_stem(word) for word in split_words(passage)}
    content_words = [word for word in split_words(question) if word not in STOP_WORDS]
    exact = next((word for word in content_words if _is_exact(word) and _stem(word) not in passage_words), "")
    share = sum(_stem(word) in passage_words for word in content_words) / len(content_words) if content_words else 0.0
    return (
        f"off-topic ({exact})"
        if exact
        else f"off-topic (content words: {share:.0%})"
        if share < MIN_TOPIC_SHARE
        else ""
    )


def _is_exact(word: str) -> bool:
    """Return whether a word is a number or code identifier, which cannot be paraphrased."""
    return "_" in word or any(c.isdigit() for c in word)


def _stem(word: str) -> str:
    """Strip common suffixes, so that `returns` becomes `return`; identifiers are unchanged."""
    for ending in ("ing", "ed", "es", "s"):
        if len(word) > len(ending) + 3 and word.endswith(ending) and "_" not in word:
            return word[: -len(ending)].rstrip("e")
    return word.rstrip("e") if len(word) > 4 else word
