"""Stage `synthesize.personas`: Persona Hub (Ge et al. 2024): personas inferred from documents, and their prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.documents import read_documents
from llmworks.core.errors import DataError
from llmworks.core.types import Message
from llmworks.synthesize.asking import Decoding, Maker
from llmworks.synthesize.text.diversity import Pool
from llmworks.synthesize.text.parse import bare, labelled, numbered, refuses

WHO = {
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
    texts = [d for _, d in zip(range(config.max_documents), read_documents(data), strict=False) if d.text.strip()]
    if not texts:
        raise DataError(f"{data.name}: has no text")
    people: list[tuple[str, str]] = []  # (id, who)
    known, asked = Pool(config.max_similarity), Pool(config.max_similarity)
    with Maker(ctx, model, config.decoding, "synthesize.personas") as maker:
        prompts = [
            "Who is likely to read or write the text below? Describe one such person in one or two sentences: what"
            ' they do, know and want. Begin with "A" or "An" and write nothing'
            f" else.\n\nText:\n{d.text[: config.max_characters]}"
            for d in texts
        ]
        for document, answer in zip(texts, maker.ask("personas", prompts, max_tokens=120), strict=True):
            _take(maker, known, people, document.id, answer.problem, bare(answer.text.split("\n\n")[0]))
        if config.num_related:
            first = list(people)
            prompts = [
                f"{who}\n\nWho are {config.num_related} people that this person often deals with, of other walks of"
                " life?"
                " Describe each in one sentence, as a numbered list and nothing else."
                for _, who in first
            ]
            for (id, _), answer in zip(first, maker.ask("related personas", prompts), strict=True):
                for number, who in enumerate(
                    numbered(answer.text)[: config.num_related] if not answer.problem else [], 1
                ):
                    _take(maker, known, people, f"{id}+{number}", "", who)
        prompts = [
            f"Imagine this person:\n\n{who}\n\nNow {WHO[config.task_type]}. Write it as they would say it, complete in"
            " itself, behind the word `Question:` and nothing else."
            + (
                f"\nThis is number {n} of {config.questions_per_persona}; it must differ from what one thinks of first."
                if n > 1
                else ""
            )
            for _, who in people
            for n in range(1, config.questions_per_persona + 1)
        ]
        found = _ask(people, prompts, maker, asked, config)
        _answer(found, maker, config)
        return maker.finish([data], note=f"{len(people):,} personas")


def _ask(
    people: list[tuple[str, str]], prompts: list[str], maker: Maker, asked: Pool, config: PersonasConfig
) -> list[tuple[str, str, str, str]]:
    """Generate questions of each persona; invalid or too similar ones are rejected."""
    owners = [person for person in people for _ in range(config.questions_per_persona)]
    found: list[tuple[str, str, str, str]] = []  # (id, who, prompt, question)
    for number, ((id, who), prompt, answer) in enumerate(
        zip(owners, prompts, maker.ask("questions", prompts), strict=True)
    ):
        question = labelled(answer.text, "question") or bare(answer.text)
        reason = answer.problem or (
            "refuses"
            if refuses(question)
            else (
                "too short"
                if len(question.split()) < 4
                else ""
                if asked.add(question)
                else "too similar to another question"
            )
        )
        if reason:
            maker.drop(id, reason, question)
        else:
            found.append((f"{id}?{number % config.questions_per_persona + 1}", who, prompt, question))
    return found


def _answer(found: list[tuple[str, str, str, str]], maker: Maker, config: PersonasConfig) -> None:
    """Answer each question and keep usable answers."""
    for (id, who, prompt, question), answer in zip(
        found,
        maker.ask(
            "answers",
            [q for *_, q in found],
            max_tokens=config.answer_decoding.max_tokens,
            temperature=config.answer_decoding.temperature,
        ),
        strict=True,
    ):
        if reason := answer.problem or ("refuses to answer" if refuses(answer.text) else ""):
            maker.drop(id, reason, f"{question}\n\n{answer.text}")
            continue
        system = (Message("system", f"You are talking with this person: {who}"),) if config.persona_in_system else ()
        maker.keep(
            id,
            (*system, Message("user", question), Message("assistant", answer.text)),
            [prompt, question],
            group=id.partition("?")[0].partition("+")[0],
            persona=who,
        )


def _take(maker: Maker, known: Pool, people: list[tuple[str, str]], id: str, problem: str, who: str) -> None:
    reason = problem or (
        "not a persona"
        if len(who.split()) < 5 or refuses(who)
        else ""
        if known.add(who)
        else "too similar to another persona"
    )
    if reason:
        maker.drop(id, reason, who)
    else:
        people.append((id, who))
