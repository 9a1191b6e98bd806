"""Stage `synthesize.personas`: Persona Hub (Ge et al. 2024): personas inferred from documents, and their prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.documents import read_documents
from llmworks.core.errors import DataError
from llmworks.core.text.words import count_words
from llmworks.core.types import Message
from llmworks.synthesize.builder import Decoding, SyntheticDatasetBuilder
from llmworks.synthesize.text.diversity import DiversityPool
from llmworks.synthesize.text.parse import is_refusal, parse_labeled, parse_list, strip_markup

PROMPT_TYPES = {
    "instruction": "write something that this person would ask an assistant to do in their work or life",
    "reasoning": (
        "write a hard problem of logic or mathematics whose story fits this person and that has one right answer"
    ),
    "knowledge": "write a question of knowledge that this person would want explained in detail",
}


class PersonasConfig(Config):
    """Personas and the prompts they give."""

    max_documents: int = Field(
        100, gt=0, description="number of documents to infer a persona from, the first of the input"
    )
    max_characters: int = Field(1500, gt=0, description="characters of a document that are shown, from its beginning")
    num_related: int = Field(
        0,
        ge=0,
        le=10,
        description="related personas generated for each persona (Persona Hub's persona-to-persona)",
    )
    task_type: Literal["instruction", "reasoning", "knowledge"] = Field(
        "instruction", description="type of the generated prompts"
    )
    questions_per_persona: int = Field(1, ge=1, le=10, description="questions per persona")
    max_similarity: float = Field(
        0.7,
        gt=0,
        le=1,
        description="largest ROUGE-L with an existing persona or question; more similar ones are rejected",
    )
    persona_in_system: bool = Field(
        False, description="put the persona in a system turn, so that answers are addressed to it"
    )
    decoding: Decoding = Field(Decoding(temperature=0.9), description="sampling parameters of personas and questions")
    answer_decoding: Decoding = Field(Decoding(temperature=0.0), description="sampling parameters of answers")


def personas(config: PersonasConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Generate single-turn conversations from personas inferred from documents.

    Errors: DataError without documents, or when no row is kept.
    """
    documents = [d for _, d in zip(range(config.max_documents), read_documents(data), strict=False) if d.text.strip()]
    if not documents:
        raise DataError(f"{data.name}: has no text")
    persona_list: list[tuple[str, str]] = []  # (id, who)
    persona_pool, question_pool = DiversityPool(config.max_similarity), DiversityPool(config.max_similarity)
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.personas") as builder:
        prompts = [
            "Who is likely to read or write the text below? Describe one such person in one or two sentences: what"
            ' they do, know and want. Begin with "A" or "An" and write nothing'
            f" else.\n\nText:\n{d.text[: config.max_characters]}"
            for d in documents
        ]
        for document, answer in zip(documents, builder.generate("personas", prompts, max_tokens=120), strict=True):
            _keep_persona(
                builder,
                persona_pool,
                persona_list,
                document.id,
                answer.problem,
                strip_markup(answer.text.split("\n\n")[0]),
            )
        if config.num_related:
            first = list(persona_list)
            prompts = [
                f"{who}\n\nWho are {config.num_related} people that this person often deals with, of other walks of"
                " life?"
                " Describe each in one sentence, as a numbered list and nothing else."
                for _, who in first
            ]
            for (id, _), answer in zip(first, builder.generate("related personas", prompts), strict=True):
                for number, who in enumerate(
                    parse_list(answer.text)[: config.num_related] if not answer.problem else [], 1
                ):
                    _keep_persona(builder, persona_pool, persona_list, f"{id}+{number}", "", who)
        prompts = [
            f"Imagine this person:\n\n{who}\n\nNow {PROMPT_TYPES[config.task_type]}. Write it as they would say it,"
            " complete in"
            " itself, behind the word `Question:` and nothing else."
            + (
                f"\nThis is number {n} of {config.questions_per_persona}; it must differ from what one thinks of first."
                if n > 1
                else ""
            )
            for _, who in persona_list
            for n in range(1, config.questions_per_persona + 1)
        ]
        accepted_questions = _generate_questions(persona_list, prompts, builder, question_pool, config)
        _answer_questions(accepted_questions, builder, config)
        return builder.finish([data], note=f"{len(persona_list):,} personas")


def _generate_questions(
    persona_list: list[tuple[str, str]],
    prompts: list[str],
    builder: SyntheticDatasetBuilder,
    question_pool: DiversityPool,
    config: PersonasConfig,
) -> list[tuple[str, str, str, str]]:
    """Generate questions of each persona; invalid or too similar ones are rejected."""
    owners = [person for person in persona_list for _ in range(config.questions_per_persona)]
    found: list[tuple[str, str, str, str]] = []  # (id, who, prompt, question)
    for number, ((id, who), prompt, answer) in enumerate(
        zip(owners, prompts, builder.generate("questions", prompts), strict=True)
    ):
        question = parse_labeled(answer.text, "question") or strip_markup(answer.text)
        reason = answer.problem or (
            "refuses"
            if is_refusal(question)
            else (
                "too short"
                if count_words(question) < 4
                else ""
                if question_pool.add(question)
                else "too similar to another question"
            )
        )
        if reason:
            builder.reject(id, reason, question)
        else:
            found.append((f"{id}?{number % config.questions_per_persona + 1}", who, prompt, question))
    return found


def _answer_questions(
    accepted_questions: list[tuple[str, str, str, str]], builder: SyntheticDatasetBuilder, config: PersonasConfig
) -> None:
    """Answer each question and keep usable answers."""
    for (id, who, prompt, question), answer in zip(
        accepted_questions,
        builder.generate(
            "answers",
            [q for *_, q in accepted_questions],
            max_tokens=config.answer_decoding.max_tokens,
            temperature=config.answer_decoding.temperature,
        ),
        strict=True,
    ):
        if reason := answer.problem or ("refuses to answer" if is_refusal(answer.text) else ""):
            builder.reject(id, reason, f"{question}\n\n{answer.text}")
            continue
        system = (Message("system", f"You are talking with this person: {who}"),) if config.persona_in_system else ()
        builder.keep_conversation(
            id,
            (*system, Message("user", question), Message("assistant", answer.text)),
            [prompt, question],
            group=id.partition("?")[0].partition("+")[0],
            persona=who,
        )


def _keep_persona(
    builder: SyntheticDatasetBuilder,
    persona_pool: DiversityPool,
    persona_list: list[tuple[str, str]],
    id: str,
    problem: str,
    who: str,
) -> None:
    reason = problem or (
        "not a persona"
        if count_words(who) < 5 or is_refusal(who)
        else ""
        if persona_pool.add(who)
        else "too similar to another persona"
    )
    if reason:
        builder.reject(id, reason, who)
    else:
        persona_list.append((id, who))
