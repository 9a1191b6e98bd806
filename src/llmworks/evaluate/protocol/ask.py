"""Run a task's questions on an engine: encode prompts, score options, generate answers; cache everything in scratch.

Does not compute metrics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmworks.core.errors import ModelError, RequestError, UserError
from llmworks.core.progress import Progress
from llmworks.core.types import Engine, Request, Sampling
from llmworks.evaluate.protocol.likelihood import Encode, Found, Given, ask, beginning_of, pair, texts_of, windows
from llmworks.evaluate.protocol.questions import Question
from llmworks.evaluate.protocol.response_cache import Memory
from llmworks.evaluate.protocol.task import Task
from llmworks.generate.remote.journal import Journal, Record, request_id
from llmworks.tokenize.chat.templates import encode, render_text

UNBOUNDED = 1 << 30
NEEDS = {"choice": "score", "likelihood": "score", "perplexity": "score"}


@dataclass(frozen=True)
class Answered:
    """An engine's result for one question: scored continuations, or generated answers.

    `truncated_tokens`: prompt tokens cut from the left; `rejection`: why the engine rejected the request;
    `prompt_hash`: hash of the prompt tokens, where the engine exposes them.
    """

    question: Question
    found: tuple[Found, ...] = ()
    records: tuple[Record, ...] = ()
    cut: int = 0
    refused: str = ""
    read: str = ""


@dataclass
class Asker:
    """Runs one task on one engine.

    `protocol`, filled by `run`, records the settings that determine the prompts, so that two runs can be compared.
    """

    task: Task
    engine: Engine
    scratch: Path
    progress: Progress
    memory: Memory | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check that the engine supports the task. UserError or ModelError in one line."""
        needed = NEEDS.get(self.task.kind, "ids" if self.task.prompt == "plain" else "")
        if needed and needed not in self.engine.can:
            why = {
                "score": "needs loglikelihoods",
                "ids": "continues plain text, which needs an engine that accepts token ids",
            }[needed]
            how = (
                "; use prompt_format: chat"
                if needed == "ids"
                else "; use a task of kind generate, or an engine that can score"
            )
            raise UserError(
                f"task {self.task.name!r} {why}, but {self.engine.name} offers"
                f" {', '.join(sorted(self.engine.can)) or 'none'}{how}"
            )
        if (
            self.task.prompt == "chat"
            and self.task.kind != "perplexity"
            and self._tokenizer is not None
            and not self._tokenizer.chat_template
        ):
            raise ModelError(
                f"{self.engine.name} has no chat template, but task {self.task.name!r} uses chat prompts; use"
                " prompt_format: plain"
            )

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.engine, "tokenizer", None)

    @property
    def _longest(self) -> int:
        return int(getattr(self.engine, "context", UNBOUNDED))

    def ask(self, questions: Sequence[Question]) -> list[Answered]:
        """Run all questions; results are in their order."""
        self._describe()
        if self.task.kind == "perplexity":
            return self._texts(questions)
        return self._write(questions) if self.task.kind == "generate" else self._options(questions)

    def _describe(self) -> None:
        tokenizer = self._tokenizer
        self.protocol |= {
            "engine": type(self.engine).__name__,
            "prompt": self.task.prompt,
            "shots": self.task.shots.model_dump(exclude={"rows"}),
            "context": None if self._longest == UNBOUNDED else self._longest,
        }
        if tokenizer is not None:
            template = str(tokenizer.chat_template or "")
            self.protocol |= {
                "bos": bool(
                    tokenizer.bos_token_id is not None and texts_of(tokenizer)("a")[:1] == [tokenizer.bos_token_id]
                ),
                "template": hashlib.sha256(template.encode()).hexdigest()[:12] if template else "",
                "stops": sorted(getattr(self.engine, "stops", ())),
            }
        dtype = getattr(getattr(self.engine, "model", None), "dtype", None)
        if dtype is not None:
            self.protocol["dtype"] = str(dtype).removeprefix("torch.")

            # loglikelihood requests

    def _options(self, questions: Sequence[Question]) -> list[Answered]:
        tokenizer = self._tokenizer
        given: list[list[Given]] = []
        for question in questions:
            if self.task.prompt == "plain":
                encoder: Encode = texts_of(tokenizer)
                prompts = question.plain
                options = [self._before(question) + option for option in question.options]
            else:
                encoder = lambda text: encode(tokenizer, text)  # noqa: E731 - the template wrote all special tokens
                prompts = tuple(render_text(tokenizer, turns) + question.prefix for turns in question.turns)
                options = [(self._before(question) if question.prefix else "") + option for option in question.options]
            given.append(
                [
                    pair(encoder, prompt, option, self._longest, beginning_of(tokenizer))
                    for prompt in prompts
                    for option in options
                ]
            )
        found = self._scored([g for row in given for g in row])
        return [
            Answered(q, tuple(found[g.key] for g in row), cut=max(g.cut for g in row), read=_mark([g.key for g in row]))
            for q, row in zip(questions, given, strict=True)
        ]

    def _before(self, question: Question) -> str:
        """Return the delimiter between prompt and option (lm-eval's target_delimiter)."""
        return "" if question.prefix and question.prefix[-1].isspace() else self.task.before_answer

    def _texts(self, questions: Sequence[Question]) -> list[Answered]:
        tokenizer = self._tokenizer
        beginning = beginning_of(tokenizer)
        if beginning is None:
            raise ModelError(
                f"{self.engine.name} has neither a BOS nor an EOS token, one of which is needed to start a document"
            )
        window = min(self.task.window, self._longest)
        self.protocol |= {"window": window, "stride": min(self.task.stride or window, window), "beginning": beginning}
        given: list[list[Given]] = []
        for question in questions:
            ids = list(texts_of(tokenizer)(question.plain[0]))
            given.append(
                windows(ids[1:] if ids[:1] == [beginning] else ids, beginning, window, self.protocol["stride"])
            )
        found = self._scored([g for row in given for g in row])
        return [
            Answered(q, tuple(found[g.key] for g in row), read=_mark([g.key for g in row]))
            for q, row in zip(questions, given, strict=True)
        ]

    def _scored(self, given: Sequence[Given]) -> Mapping[str, Found]:
        with self.progress.bar(f"score on {self.engine.name}", len(given), "requests") as bar:
            return ask(given, self.engine, self.scratch / "scores.jsonl", bar, self.memory)

            # generation requests

    def _write(self, questions: Sequence[Question]) -> list[Answered]:
        requests: dict[str, Request] = {}
        cuts: dict[str, int] = {}
        reads: dict[str, str] = {}
        for question in questions:
            request, cuts[question.id] = self._request(question)
            reads[question.id] = self._read(request)
            for number in range(self.task.samples):
                requests[self._place(question, number)] = Request(
                    request.messages, request.ids, sampling=self._sampling(number)
                )
        self.protocol |= {
            "max_tokens": self.task.max_tokens,
            "stop": self.task.stop,
            "temperature": self.task.temperature,
            "top_p": self.task.top_p,
            "samples": self.task.samples,
        }
        with (
            Journal(self.scratch / "answers.jsonl", lambda: self.engine) as journal,
            self.progress.bar(f"generate on {self.engine.name}", len(requests), "answers") as bar,
        ):
            marks = {place: request_id(request) for place, request in requests.items()}
            remembered = self.memory.recall(marks.values()) if self.memory else {}
            journal.known |= {
                place: Record(**{**remembered[mark], "id": place})
                for place, mark in marks.items()
                if mark in remembered and place not in journal.known
            }
            answers = journal.ask(requests, bar)
            if self.memory:
                self.memory.add(
                    {
                        marks[place]: asdict(answer)
                        for place, answer in answers.items()
                        if isinstance(answer, Record) and marks[place] not in remembered
                    }
                )
        refused = [answer for answer in answers.values() if isinstance(answer, RequestError)]
        if len(refused) == len(answers):
            raise refused[0]  # the cause is not the questions
        out: list[Answered] = []
        for question in questions:
            found = [answers[self._place(question, number)] for number in range(self.task.samples)]
            records = tuple(
                Record(question.id, "", "refused", 0, 0, 0.0) if isinstance(answer, RequestError) else answer
                for answer in found
            )
            why = next((str(answer) for answer in found if isinstance(answer, RequestError)), "")
            out.append(Answered(question, records=records, cut=cuts[question.id], refused=why, read=reads[question.id]))
        return out

    def _read(self, request: Request) -> str:
        """Hash the prompt tokens of a request; empty where the engine does not expose them."""
        show = getattr(self.engine, "prompt_ids", None)
        if request.ids or show is None:
            return _mark(request.ids) if request.ids else ""
        try:
            return _mark(show(request))
        except RequestError:
            return ""

    def _place(self, question: Question, number: int) -> str:
        return question.id if self.task.samples == 1 else f"{question.id}#{number}"

    def _sampling(self, number: int) -> Sampling:
        seed = number if self.task.temperature else None
        return Sampling(
            max_tokens=self.task.max_tokens,
            temperature=self.task.temperature,
            top_p=self.task.top_p,
            seed=seed,
            stop=tuple(self.task.stop),
        )

    def _request(self, question: Question) -> tuple[Request, int]:
        """Return (the request, number of tokens cut from the left of a plain prompt to leave room for the answer)."""
        if self.task.prompt == "chat" and not question.prefix:
            return Request(question.turns[0]), 0
        if self._tokenizer is None or "ids" not in self.engine.can:
            raise UserError(
                f"task {self.task.name!r} prefills the answer, which needs an engine that accepts token ids;"
                f" {self.engine.name} does not"
            )
        if self.task.prompt == "chat":
            ids = list(encode(self._tokenizer, render_text(self._tokenizer, question.turns[0]) + question.prefix))
        else:
            ids = list(texts_of(self._tokenizer)(question.plain[0]))
            if not ids:
                beginning = beginning_of(self._tokenizer)
                ids = [] if beginning is None else [beginning]
        room = max(1, self._longest - self.task.max_tokens)
        return Request(ids=tuple(ids[-room:])), max(0, len(ids) - room)


def _mark(value: Any) -> str:
    return hashlib.sha256(repr(list(value)).encode()).hexdigest()[:12]
