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
from llmworks.evaluate.protocol.loglikelihood import (
    Encode,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    build_request,
    get_encoder,
    get_start_token,
    rolling_windows,
    score_requests,
)
from llmworks.evaluate.protocol.questions import Question
from llmworks.evaluate.protocol.response_cache import ResponseCache
from llmworks.evaluate.protocol.task import Task
from llmworks.generate.remote.journal import Journal, JournalRecord, compute_request_id
from llmworks.tokenize.chat.templates import encode, render_text

UNBOUNDED = 1 << 30
REQUIRED_CAPABILITIES = {"choice": "score", "likelihood": "score", "perplexity": "score"}


@dataclass(frozen=True)
class QuestionResult:
    """An engine's result for one question: scored continuations, or generated answers.

    `truncated_tokens`: prompt tokens cut from the left; `rejection`: why the engine rejected the request;
    `prompt_hash`: hash of the prompt tokens, where the engine exposes them.
    """

    question: Question
    continuations: tuple[LoglikelihoodResult, ...] = ()
    records: tuple[JournalRecord, ...] = ()
    truncated_tokens: int = 0
    rejection: str = ""
    prompt_hash: str = ""


@dataclass
class RequestRunner:
    """Runs one task on one engine.

    `protocol`, filled by `run`, records the settings that determine the prompts, so that two runs can be compared.
    """

    task: Task
    engine: Engine
    scratch: Path
    progress: Progress
    cache: ResponseCache | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check that the engine supports the task. UserError or ModelError in one line."""
        needed = REQUIRED_CAPABILITIES.get(self.task.kind, "ids" if self.task.prompt == "plain" else "")
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
    def _max_length(self) -> int:
        return int(getattr(self.engine, "context", UNBOUNDED))

    def run(self, questions: Sequence[Question]) -> list[QuestionResult]:
        """Run all questions; results are in their order."""
        self._record_protocol()
        if self.task.kind == "perplexity":
            return self._score_documents(questions)
        return self._generate(questions) if self.task.kind == "generate" else self._score_options(questions)

    def _record_protocol(self) -> None:
        tokenizer = self._tokenizer
        self.protocol |= {
            "engine": type(self.engine).__name__,
            "prompt": self.task.prompt,
            "shots": self.task.shots.model_dump(exclude={"rows"}),
            "context": None if self._max_length == UNBOUNDED else self._max_length,
        }
        if tokenizer is not None:
            template = str(tokenizer.chat_template or "")
            self.protocol |= {
                "bos": bool(
                    tokenizer.bos_token_id is not None and get_encoder(tokenizer)("a")[:1] == [tokenizer.bos_token_id]
                ),
                "template": hashlib.sha256(template.encode()).hexdigest()[:12] if template else "",
                "stops": sorted(getattr(self.engine, "stops", ())),
            }
        dtype = getattr(getattr(self.engine, "model", None), "dtype", None)
        if dtype is not None:
            self.protocol["dtype"] = str(dtype).removeprefix("torch.")

            # loglikelihood requests

    def _score_options(self, questions: Sequence[Question]) -> list[QuestionResult]:
        tokenizer = self._tokenizer
        requests: list[list[LoglikelihoodRequest]] = []
        for question in questions:
            if self.task.prompt == "plain":
                encoder: Encode = get_encoder(tokenizer)
                prompts = question.plain
                options = [self._get_delimiter(question) + option for option in question.options]
            else:
                encoder = lambda text: encode(tokenizer, text)  # noqa: E731 - the template wrote all special tokens
                prompts = tuple(render_text(tokenizer, turns) + question.prefix for turns in question.turns)
                options = [
                    (self._get_delimiter(question) if question.prefix else "") + option for option in question.options
                ]
            requests.append(
                [
                    build_request(encoder, prompt, option, self._max_length, get_start_token(tokenizer))
                    for prompt in prompts
                    for option in options
                ]
            )
        results = self._score([g for row in requests for g in row])
        return [
            QuestionResult(
                q,
                tuple(results[g.key] for g in row),
                truncated_tokens=max(g.truncated_tokens for g in row),
                prompt_hash=_hash([g.key for g in row]),
            )
            for q, row in zip(questions, requests, strict=True)
        ]

    def _get_delimiter(self, question: Question) -> str:
        """Return the delimiter between prompt and option (lm-eval's target_delimiter)."""
        if not self.task.delimit_answer:
            return ""
        if self.task.prompt == "chat" and question.prefix and question.prefix[-1].isspace():
            return ""
        return self.task.before_answer

    def _score_documents(self, questions: Sequence[Question]) -> list[QuestionResult]:
        tokenizer = self._tokenizer
        start_token = get_start_token(tokenizer)
        if start_token is None:
            raise ModelError(
                f"{self.engine.name} has neither a BOS nor an EOS token, one of which is needed to start a document"
            )
        window = min(self.task.window, self._max_length)
        self.protocol |= {"window": window, "stride": min(self.task.stride or window, window), "beginning": start_token}
        requests: list[list[LoglikelihoodRequest]] = []
        for question in questions:
            ids = list(get_encoder(tokenizer)(question.plain[0]))
            requests.append(
                rolling_windows(
                    ids[1:] if ids[:1] == [start_token] else ids, start_token, window, self.protocol["stride"]
                )
            )
        results = self._score([g for row in requests for g in row])
        return [
            QuestionResult(q, tuple(results[g.key] for g in row), prompt_hash=_hash([g.key for g in row]))
            for q, row in zip(questions, requests, strict=True)
        ]

    def _score(self, requests: Sequence[LoglikelihoodRequest]) -> Mapping[str, LoglikelihoodResult]:
        with self.progress.bar(f"score on {self.engine.name}", len(requests), "requests") as bar:
            return score_requests(requests, self.engine, self.scratch / "scores.jsonl", bar, self.cache)

            # generation requests

    def _generate(self, questions: Sequence[Question]) -> list[QuestionResult]:
        requests: dict[str, Request] = {}
        truncated_tokens: dict[str, int] = {}
        prompt_hashes: dict[str, str] = {}
        for question in questions:
            request, truncated_tokens[question.id] = self._build_request(question)
            prompt_hashes[question.id] = self._hash_prompt(request)
            for number in range(self.task.samples):
                requests[self._get_key(question, number)] = Request(
                    request.messages, request.ids, sampling=self._build_sampling(number)
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
            hashes = {place: compute_request_id(request) for place, request in requests.items()}
            cached = self.cache.get(hashes.values()) if self.cache else {}
            journal.records |= {
                place: JournalRecord(**{**cached[mark], "id": place})
                for place, mark in hashes.items()
                if mark in cached and place not in journal.records
            }
            answers = journal.generate(requests, bar)
            if self.cache:
                self.cache.add(
                    {
                        hashes[place]: asdict(answer)
                        for place, answer in answers.items()
                        if isinstance(answer, JournalRecord) and hashes[place] not in cached
                    }
                )
        refused = [answer for answer in answers.values() if isinstance(answer, RequestError)]
        if len(refused) == len(answers):
            raise refused[0]  # the cause is not the questions
        out: list[QuestionResult] = []
        for question in questions:
            found = [answers[self._get_key(question, number)] for number in range(self.task.samples)]
            records = tuple(
                JournalRecord(question.id, "", "refused", 0, 0, 0.0) if isinstance(answer, RequestError) else answer
                for answer in found
            )
            why = next((str(answer) for answer in found if isinstance(answer, RequestError)), "")
            out.append(
                QuestionResult(
                    question,
                    records=records,
                    truncated_tokens=truncated_tokens[question.id],
                    rejection=why,
                    prompt_hash=prompt_hashes[question.id],
                )
            )
        return out

    def _hash_prompt(self, request: Request) -> str:
        """Hash the prompt tokens of a request; empty where the engine does not expose them."""
        show = getattr(self.engine, "prompt_ids", None)
        if request.ids or show is None:
            return _hash(request.ids) if request.ids else ""
        try:
            return _hash(show(request))
        except RequestError:
            return ""

    def _get_key(self, question: Question, number: int) -> str:
        return question.id if self.task.samples == 1 else f"{question.id}#{number}"

    def _build_sampling(self, number: int) -> Sampling:
        seed = number if self.task.temperature else None
        return Sampling(
            max_tokens=self.task.max_tokens,
            temperature=self.task.temperature,
            top_p=self.task.top_p,
            seed=seed,
            stop=tuple(self.task.stop),
        )

    def _build_request(self, question: Question) -> tuple[Request, int]:
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
            ids = list(get_encoder(self._tokenizer)(question.plain[0]))
            if not ids:
                beginning = get_start_token(self._tokenizer)
                ids = [] if beginning is None else [beginning]
        room = max(1, self._max_length - self.task.max_tokens)
        return Request(ids=tuple(ids[-room:])), max(0, len(ids) - room)


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(list(value)).encode()).hexdigest()[:12]
