"""Query a model and collect rows with their provenance, rejected samples with reasons, and token usage.

Shared by all methods. Completions are saved in scratch as they arrive, so that an interrupted run repeats no request.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.documents import REJECTED
from llmworks.core.errors import DataError, RequestError
from llmworks.core.types import Engine, Json, Message, Request, Sampling, messages_from_json, messages_to_json
from llmworks.data.card import finish_rows
from llmworks.data.store.rows import Row, flat_messages, read_chat
from llmworks.generate.remote.endpoint import parse_remote
from llmworks.generate.remote.journal import Journal, request_id
from llmworks.generate.remote.usage import Account

SHOWN = 12


class Decoding(Config):
    """Sampling parameters."""

    max_tokens: int = Field(512, gt=0, description="longest completion in tokens; truncated completions are rejected")
    temperature: float = Field(0.7, ge=0, description="sampling temperature; 0: greedy decoding")
    top_p: float = Field(
        0.95, gt=0, le=1, description="nucleus sampling: cumulative probability of the tokens sampled from"
    )


class Answer(NamedTuple):
    """A model's completion, or the reason why it is not usable."""

    text: str
    problem: str


@dataclass(frozen=True)
class Prompt:
    """A prompt; `turn` distinguishes repetitions of it."""

    messages: tuple[Message, ...]
    turn: int = 0


@dataclass
class Maker:
    """One run of a method over one model; without a model no request can be made."""

    ctx: Context
    model: Model | Adapter | None
    decoding: Decoding
    stage: str
    file: str = "answers.jsonl"  # in the scratch folder
    rows: list[Row] = field(default_factory=list)
    rejected: list[Json] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._journal = Journal(self.ctx.scratch / self.file, self._open)
        self.by = self.model.name if self.model else "people"
        self._server = self.model is not None and self.model.ref.startswith(("http://", "https://"))
        self._asked: set[str] = set()
        self._others: list[Json] = []

    def _open(self) -> Engine:
        assert self.model is not None
        return self.ctx.open_engine(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def ask(
        self, what: str, prompts: Sequence[Prompt | str], *, max_tokens: int = 0, temperature: float | None = None
    ) -> list[Answer]:
        """Return the completions in the order of the prompts; a plain string is a user turn.

        A request that the model refuses gives a problem and does not stop the run.
        """
        ids: list[str] = []
        requests: dict[str, Request] = {}
        for prompt in prompts:
            asked = prompt if isinstance(prompt, Prompt) else Prompt((Message("user", prompt),))
            request = self._request(asked, max_tokens, temperature)
            ids.append(request_id(request, asked.turn))
            requests[ids[-1]] = request
        with self.ctx.progress.bar(what, len(requests), "answers") as bar:
            answers = self._journal.ask(requests, bar)
        self._asked.update(requests)
        return [self._usable(answers[id]) for id in ids]

    def _request(self, prompt: Prompt, max_tokens: int, temperature: float | None) -> Request:
        heat = self.decoding.temperature if temperature is None else temperature
        plain = Request(
            prompt.messages,
            sampling=Sampling(max_tokens or self.decoding.max_tokens, heat, self.decoding.top_p if heat else 1.0),
        )
        if not heat:
            return plain
            # depends on the prompt and the run's seed only, so that a rerun sends the same requests
        seed = (int(request_id(plain, prompt.turn), 16) + self.ctx.seed) % (1 << 31)
        return Request(
            prompt.messages, sampling=Sampling(plain.sampling.max_tokens, heat, plain.sampling.top_p, seed=seed)
        )

    def _usable(self, answer: Any) -> Answer:
        if isinstance(answer, RequestError):
            return Answer("", f"refused by the {'server' if self._server else 'engine'} ({answer})")
        text = answer.text.strip()
        problem = {
            "length": "cut off at max_tokens",
            "filtered": "filtered by the provider",
            "cancelled": "cancelled",
        }.get(answer.finish, "")
        return Answer(text, problem or ("" if text else "empty completion"))

    def keep(
        self,
        id: str,
        messages: Sequence[Message],
        asked: Sequence[Prompt | str],
        *,
        group: str = "",
        tools: Sequence[Json] = (),
        answer: Any = None,
        **origin: Any,
    ) -> None:
        """Keep a conversation generated from these prompts. `origin`: further provenance."""
        self.rows.append(
            self.row(id, asked, group=group, tools=tools, answer=answer, messages=messages_to_json(messages), **origin)
        )

    def row(
        self,
        id: str,
        asked: Sequence[Prompt | str],
        *,
        group: str = "",
        tools: Sequence[Json] = (),
        answer: Any = None,
        source: Row | None = None,
        **parts: Any,
    ) -> Row:
        """Return a row with its provenance in the field `made_by`: stage, model, prompts, and the rest of `parts`.

        The extra fields of `source` are kept.
        """
        turns: Json = {name: parts.pop(name) for name in ("messages", "prompt", "chosen", "rejected") if name in parts}
        prompts = [
            [{"role": "user", "content": p}] if isinstance(p, str) else messages_to_json(p.messages) for p in asked
        ]
        by = (
            {"model": self.model.ref.partition("?")[0] or self.model.name, "digest": self.model.digest[:12]}
            if self.model
            else {}
        )
        made = {"stage": self.stage, **by, "prompts": prompts, **parts}
        return {
            "id": id,
            "group": group or id,
            **turns,
            "tools": list(tools),
            "answer": answer,
            "extra": {"fields": {**fields_of(source), "made_by": made}},
        }

    def drop(self, origin: str, reason: str, text: str = "") -> None:
        """Reject a sample. The part of the reason in brackets is a detail that is not counted separately."""
        self.rejected.append({"from": origin, "reason": reason, "text": text[:2000]})
        self.reasons[reason.partition(" (")[0]] += 1

    def finish(
        self, parents: Sequence[Dataset], *, lead: str = "", metrics: Mapping[str, Any] | None = None, note: str = ""
    ) -> Dataset:
        """Write the dataset, the rejected samples and the report.

        Errors: DataError when no row was kept.
        """
        if not self.rows:
            why = ", ".join(f"{reason} {n:,}" for reason, n in self.reasons.most_common(4))
            first = next((r["reason"] for r in self.rejected if "(" in r["reason"]), "")
            raise DataError(
                f"no completion by {self.by} could be kept"
                f" ({why or 'no prompts'}{f'; the first: {first}' if first else ''}); the completions are in"
                f" {self.ctx.scratch}, try another model, another --seed, or weaker filters"
            )
        if self.rejected:
            (self.ctx.out / REJECTED).write_text(
                "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rejected),
                encoding="utf-8",
                errors="backslashreplace",
            )
            self.ctx.progress.say(
                f"{len(self.rejected):,} rejected, see {REJECTED}: "
                + ", ".join(f"{reason} {n:,}" for reason, n in self.reasons.most_common(4))
            )
        figures = {**self.account(), "rejected": len(self.rejected), **(metrics or {})}
        report = self.ctx.report
        report.title = f"{self.stage} by {self.by}"
        report.lead = lead or f"{len(self.rows):,} rows kept, {len(self.rejected):,} rejected."
        report.data = {"rows": len(self.rows), **figures, "reasons": dict(self.reasons)}
        report.table("Metrics", ("metric", "value"), [("rows", len(self.rows)), *figures.items()])
        if self.reasons:
            report.table(
                "Rejected", ("reason", "count"), self.reasons.most_common(40), note=f"The samples are in {REJECTED}."
            )
        report.samples("Rows", [_shown(row) for row in self.rows[:SHOWN]])
        return finish_rows(
            self.ctx,
            self.stage,
            parents,
            self.rows,
            dropped=self.reasons,
            metrics=figures,
            note=f"by {self.by}" + (f"; {note}" if note else ""),
            extra={"made_by": self.by},
        )

    def also(self, other: Maker) -> None:
        """Add the usage of another model of the same run."""
        self._others.append(other.account())

    def account(self) -> Json:
        """Return the token usage of all completions, including those of an interrupted run.

        With the cost where the model reference has prices.
        """
        records = [self._journal.known[id] for id in self._asked if id in self._journal.known]
        prompt_tokens, completion_tokens = (
            sum(r.prompt_tokens for r in records),
            sum(r.completion_tokens for r in records),
        )
        found: Json = {"requests": len(records), "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        if self.model and self._server:
            options = parse_remote(self.model.ref)[2]
            if options.input_price or options.output_price:
                found["cost"] = round(
                    Account(options.input_price, options.output_price).price(prompt_tokens, completion_tokens), 6
                )
        for other in self._others:
            found = {name: found.get(name, 0) + other.get(name, 0) for name in {**found, **other}}
        return found


def answered(row: Row, *turns: Message) -> list[Json]:
    """Return a row's messages with these turns in place of its final assistant turn."""
    before = list(row["messages"])
    while before and before[-1]["role"] == "assistant":
        before.pop()
    return [*before, *messages_to_json(turns)]


def fields_of(row: Row | None) -> Json:
    """Return the extra fields of a row; its earlier provenance is kept as `made_from`."""
    fields = dict(((row or {}).get("extra") or {}).get("fields", {}))
    if "made_by" in fields:
        fields["made_from"] = fields.pop("made_by")
    return fields


def questions(data: Dataset, limit: int | None = None) -> list[tuple[Row, tuple[Message, ...]]]:
    """Return (row, its messages before the final assistant turn) of conversations, with tools rendered as text.

    Errors: DataError when no row has a prompt.
    """
    found = []
    for row in read_chat(data):
        turns = flat_messages(row) if row["messages"] else ()
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if turns and turns[-1].role in ("user", "tool"):
            found.append((row, turns))
    if not found:
        raise DataError(f"{data.name}: no row has a prompt")
    return found[:limit]


def instruction_of(row: Row) -> str:
    """Return the text of a row's first user turn."""
    return next((m.content for m in messages_from_json(row["messages"]) if m.role == "user"), "")


def _shown(row: Row) -> dict[str, str]:
    turns = row.get("messages") or [*row["prompt"], *row["chosen"]]
    head = next((m["content"] for m in turns if m["role"] == "user"), row["id"])
    shown = {
        "": " ".join(head.split())[:120],
        **{
            f"{i} {m['role']}": m.get("content") or json.dumps(m.get("tool_calls"), ensure_ascii=False)
            for i, m in enumerate(turns, 1)
        },
    }
    if "rejected" in row:
        shown["rejected"] = row["rejected"][-1]["content"]
    return shown
