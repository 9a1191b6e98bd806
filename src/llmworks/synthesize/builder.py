"""Query a model and collect rows with their provenance, rejected samples with reasons, and token usage.

Shared by all methods. Completions are saved in scratch as they arrive, so that an interrupted run repeats no request.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.documents import REJECTED
from llmworks.core.errors import DataError, RequestError
from llmworks.core.types import Engine, Json, Message, Request, Sampling, messages_from_json, messages_to_json
from llmworks.data.card import finish_rows
from llmworks.data.conversations.prompt_rows import read_prompt_rows
from llmworks.data.store.rows import Row, flatten_messages, has_parquet, read_chat
from llmworks.generate.remote.endpoint import parse_remote
from llmworks.generate.remote.journal import Journal, compute_request_id
from llmworks.generate.remote.usage import UsageMeter

NUM_SAMPLES = 12


class Decoding(Config):
    """Sampling parameters."""

    max_tokens: int = Field(512, gt=0, description="longest completion in tokens")
    truncated: Literal["reject", "keep"] = Field(
        "reject", description="completions that reach max_tokens: reject them, or keep them without their end"
    )
    temperature: float = Field(0.7, ge=0, description="sampling temperature; 0: greedy decoding")
    top_p: float = Field(
        0.95, gt=0, le=1, description="nucleus sampling: cumulative probability of the tokens sampled from"
    )


class GeneratedText(NamedTuple):
    """A model's completion, or the reason why it is not usable."""

    text: str
    problem: str


@dataclass(frozen=True)
class GenerationPrompt:
    """A prompt; `repetition` distinguishes repetitions of it."""

    messages: tuple[Message, ...]
    repetition: int = 0


@dataclass
class SyntheticDatasetBuilder:
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
        self.generator_name = self.model.name if self.model else "people"
        self._is_server = self.model is not None and self.model.ref.startswith(("http://", "https://"))
        self._request_ids: set[str] = set()
        self._other_usage: list[Json] = []

    def _open(self) -> Engine:
        assert self.model is not None
        return self.ctx.open_engine(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def generate(
        self,
        label: str,
        prompts: Sequence[GenerationPrompt | str],
        *,
        max_tokens: int = 0,
        temperature: float | None = None,
    ) -> list[GeneratedText]:
        """Return the completions in the order of the prompts; a plain string is a user turn.

        A request that the model refuses gives a problem and does not stop the run.
        """
        ids: list[str] = []
        requests: dict[str, Request] = {}
        for prompt in prompts:
            generation_prompt = (
                prompt if isinstance(prompt, GenerationPrompt) else GenerationPrompt((Message("user", prompt),))
            )
            request = self._build_request(generation_prompt, max_tokens, temperature)
            ids.append(compute_request_id(request, generation_prompt.repetition))
            requests[ids[-1]] = request
        with self.ctx.progress.bar(label, len(requests), "answers") as bar:
            answers = self._journal.generate(requests, bar)
        self._request_ids.update(requests)
        return [self._check_completion(answers[id]) for id in ids]

    def _build_request(self, prompt: GenerationPrompt, max_tokens: int, temperature: float | None) -> Request:
        sampling_temperature = self.decoding.temperature if temperature is None else temperature
        plain = Request(
            prompt.messages,
            sampling=Sampling(
                max_tokens or self.decoding.max_tokens,
                sampling_temperature,
                self.decoding.top_p if sampling_temperature else 1.0,
            ),
        )
        if not sampling_temperature:
            return plain
            # depends on the prompt and the run's seed only, so that a rerun sends the same requests
        seed = (int(compute_request_id(plain, prompt.repetition), 16) + self.ctx.seed) % (1 << 31)
        return Request(
            prompt.messages,
            sampling=Sampling(plain.sampling.max_tokens, sampling_temperature, plain.sampling.top_p, seed=seed),
        )

    def _check_completion(self, answer: Any) -> GeneratedText:
        if isinstance(answer, RequestError):
            return GeneratedText("", f"refused by the {'server' if self._is_server else 'engine'} ({answer})")
        text = answer.text.strip()
        problem = {
            "length": "cut off at max_tokens" if self.decoding.truncated == "reject" else "",
            "filtered": "filtered by the provider",
            "cancelled": "cancelled",
        }.get(answer.finish, "")
        return GeneratedText(text, problem or ("" if text else "empty completion"))

    def keep_conversation(
        self,
        id: str,
        messages: Sequence[Message],
        prompts: Sequence[GenerationPrompt | str],
        *,
        group: str = "",
        tools: Sequence[Json] = (),
        answer: Any = None,
        **origin: Any,
    ) -> None:
        """Keep a conversation generated from these prompts. `**origin`: further provenance."""
        self.rows.append(
            self.build_row(
                id, prompts, group=group, tools=tools, answer=answer, messages=messages_to_json(messages), **origin
            )
        )

    def build_row(
        self,
        id: str,
        requests: Sequence[GenerationPrompt | str],
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
            [{"role": "user", "content": p}] if isinstance(p, str) else messages_to_json(p.messages) for p in requests
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
            "extra": {"fields": {**get_extra_fields(source), "made_by": made}},
        }

    def reject(self, origin: str, reason: str, text: str = "") -> None:
        """Reject a sample. The part of the reason in brackets is a detail that is not counted separately."""
        self.rejected.append({"from": origin, "reason": reason, "text": text[:2000]})
        self.reasons[reason.partition(" (")[0]] += 1

    def finish(
        self, parents: Sequence[Dataset], *, summary: str = "", metrics: Mapping[str, Any] | None = None, note: str = ""
    ) -> Dataset:
        """Write the dataset, the rejected samples and the report.

        Errors: DataError when no row was kept.
        """
        if not self.rows:
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in self.reasons.most_common(4))
            first = next((r["reason"] for r in self.rejected if "(" in r["reason"]), "")
            raise DataError(
                f"no completion by {self.generator_name} could be kept"
                f" ({reasons or 'no prompts'}{f'; the first: {first}' if first else ''}); the completions are in"
                f" {self.ctx.scratch}, try another model, another --seed, or weaker filters"
            )
        if self.rejected:
            (self.ctx.out / REJECTED).write_text(
                "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rejected),
                encoding="utf-8",
                errors="backslashreplace",
            )
            self.ctx.progress.log(
                f"{len(self.rejected):,} rejected, see {REJECTED}: "
                + ", ".join(f"{reason} {n:,}" for reason, n in self.reasons.most_common(4))
            )
        all_metrics = {**self.get_usage(), "rejected": len(self.rejected), **(metrics or {})}
        report = self.ctx.report
        report.title = f"{self.stage} by {self.generator_name}"
        report.subtitle = summary or f"{len(self.rows):,} rows kept, {len(self.rejected):,} rejected."
        report.data = {"rows": len(self.rows), **all_metrics, "reasons": dict(self.reasons)}
        report.add_table("Metrics", ("metric", "value"), [("rows", len(self.rows)), *all_metrics.items()])
        if self.reasons:
            report.add_table(
                "Rejected", ("reason", "count"), self.reasons.most_common(40), note=f"The samples are in {REJECTED}."
            )
        report.add_samples("Rows", [_format_sample(row) for row in self.rows[:NUM_SAMPLES]])
        return finish_rows(
            self.ctx,
            self.stage,
            parents,
            self.rows,
            dropped=self.reasons,
            metrics=all_metrics,
            note=f"by {self.generator_name}" + (f"; {note}" if note else ""),
            extra={"made_by": self.generator_name},
        )

    def add_usage(self, other: SyntheticDatasetBuilder) -> None:
        """Add the usage of another model of the same run."""
        self._other_usage.append(other.get_usage())

    def get_usage(self) -> Json:
        """Return the token usage of all completions, including those of an interrupted run.

        With the cost where the model reference has prices.
        """
        records = [self._journal.records[id] for id in self._request_ids if id in self._journal.records]
        prompt_tokens, completion_tokens = (
            sum(r.prompt_tokens for r in records),
            sum(r.completion_tokens for r in records),
        )
        usage: Json = {"requests": len(records), "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        if self.model and self._is_server:
            options = parse_remote(self.model.ref)[2]
            if options.input_price or options.output_price:
                usage["cost"] = round(
                    UsageMeter(options.input_price, options.output_price).compute_cost(
                        prompt_tokens, completion_tokens
                    ),
                    6,
                )
        for other in self._other_usage:
            usage = {name: usage.get(name, 0) + other.get(name, 0) for name in {**usage, **other}}
        return usage


def replace_answer(row: Row, *turns: Message) -> list[Json]:
    """Return a row's messages with these turns in place of its final assistant turn."""
    before = list(row["messages"])
    while before and before[-1]["role"] == "assistant":
        before.pop()
    return [*before, *messages_to_json(turns)]


def get_extra_fields(row: Row | None) -> Json:
    """Return the extra fields of a row; its earlier provenance is kept as `made_from`."""
    fields = dict(((row or {}).get("extra") or {}).get("fields", {}))
    if "made_by" in fields:
        fields["made_from"] = fields.pop("made_by")
    return fields


def read_prompts(data: Dataset, limit: int | None = None) -> list[tuple[Row, tuple[Message, ...]]]:
    """Return (row, its messages before the final assistant turn) of conversations or prompt-only rows, with tools
    rendered as text.

    Errors: DataError when no row has a prompt.
    """
    prompts = []
    for row in read_chat(data) if has_parquet(data) else read_prompt_rows(data):
        turns = flatten_messages(row) if row["messages"] else ()
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if turns and turns[-1].role in ("user", "tool"):
            prompts.append((row, turns))
    if not prompts:
        raise DataError(f"{data.name}: no row has a prompt")
    return prompts[:limit]


def get_instruction(row: Row) -> str:
    """Return the text of a row's first user turn."""
    return next((m.content for m in messages_from_json(row["messages"]) if m.role == "user"), "")


def _format_sample(row: Row) -> dict[str, str]:
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
