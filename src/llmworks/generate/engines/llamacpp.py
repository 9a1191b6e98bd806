"""The llama.cpp engine: a GGUF file.

xllamacpp generates (parallel slots, continuous batching), cyllama scores given token ids.

Prompts are rendered with the chat template and tokenizer in the file's metadata and passed as ids, as in the torch
engine, so that a conversation gives the same ids in both.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmworks.core.errors import EngineError, ModelError, RequestError
from llmworks.core.machine import get_thread_count
from llmworks.core.types import Completion, Delta, FinishReason, Request, Scored
from llmworks.generate.decode.grammar import JSON_STYLE
from llmworks.generate.decode.prompt import render_prompt_ids
from llmworks.generate.decode.scoring import check_score, score_logits
from llmworks.generate.decode.stopping import cut_at_stop
from llmworks.generate.remote.parallel import IndexedResult, collect_in_order, generate_in_threads
from llmworks.model.from_gguf import open_reader, read_metadata
from llmworks.model.gguf.tokenizer import build_transformers_tokenizer
from llmworks.tokenize.chat.templates import can_render_tools

SLOTS = 4
SLOT_TOKENS = 2048
SCORE_TOKENS = 2048


class LlamaCppEngine:
    """Engine over one GGUF file. The scoring context is opened on first use."""

    def __init__(
        self, path: Path, *, name: str = "", threads: int | None = None, slots: int = SLOTS, adapter: Path | None = None
    ) -> None:
        meta = read_metadata(open_reader(path))  # reports a broken file before native code reads it
        self.path, self.name = path, name or path.stem
        self.threads = threads or get_thread_count()
        self.slots, self.adapter = slots, adapter
        self.tokenizer = build_transformers_tokenizer(meta)
        self.stops = get_stop_ids(meta)
        trained = int(meta.get(f"{meta.get('general.architecture')}.context_length", SLOT_TOKENS))
        self.context = min(trained, SLOT_TOKENS)
        tools = {"tools"} if self.tokenizer.chat_template and can_render_tools(self.tokenizer) else set()
        self.can = frozenset(
            {"ids", "schema", "parallel", *(() if adapter else ("score", "logits")), *tools}
        )  # the scoring context does not load adapters
        self._server: Any = None
        self._scorer: Any = None
        self._lock = threading.Lock()

    def _open_generator(self) -> Any:
        with self._lock:
            if self._server is None:
                import xllamacpp

                p = xllamacpp.CommonParams()
                p.model.path = str(self.path)
                p.n_ctx, p.n_parallel, p.warmup, p.verbosity = self.context * self.slots, self.slots, False, -1
                p.cpuparams.n_threads = p.cpuparams_batch.n_threads = self.threads
                p.cpuparams.poll = p.cpuparams_batch.poll = (
                    0  # no busy-waiting: another process on the cores would stall every token
                )
                p.cache_ram_mib = 0  # saving every prompt's state costs more than it saves here
                p.cache_type_k = p.cache_type_v = (
                    xllamacpp.ggml_type.GGML_TYPE_F32
                )  # as in the torch engine and the scorer
                p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
                p.n_gpu_layers, p.port, p.ctx_shift = 0, 0, False
                if self.adapter is not None:
                    p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(self.adapter), 1.0)]
                with _silence_output():
                    self._server = xllamacpp.Server(p)
            return self._server

    def prompt_ids(self, request: Request) -> list[int]:
        """Return the request's prompt as token ids. RequestError for an unsupported request."""
        return render_prompt_ids(request, self.tokenizer, self.context, self.name, tools="tools" in self.can)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of all requests in order, `slots` computed in parallel."""
        return collect_in_order(self.each(requests), len(requests))

    def each(self, requests: Sequence[Request]) -> Iterator[IndexedResult]:
        """Yield completions as they finish, `slots` computed in parallel."""
        return generate_in_threads(self._complete, requests, self.slots)

    def _complete(self, request: Request) -> Completion:
        prompt, server = self.prompt_ids(request), self._open_generator()
        reply = server.handle_completions(self._build_body(prompt, request))
        choice = _get_choice(reply, self.name)
        sampled_ids, logprobs = _get_sampled(choice)
        ids = self._strip_stop([int(i) for i in reply["__verbose"]["tokens"]])
        logprobs = logprobs[: len(ids)] if sampled_ids[: len(ids)] == ids else self._compute_logprobs(prompt, ids)
        text, stopped = cut_at_stop(self.tokenizer.decode(ids, skip_special_tokens=True), request.sampling.stop)
        return Completion(text, _map_finish_reason(choice, stopped), tuple(ids), tuple(logprobs), len(prompt), len(ids))

    def next_tokens(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """Return the `count` most probable next tokens with their log-probabilities."""
        reply = self._open_generator().handle_completions(
            {
                "prompt": list(ids),
                "n_predict": 1,
                "temperature": 0.0,
                "n_probs": count,
                "post_sampling_probs": False,
                "cache_prompt": False,
            }
        )
        content = (_get_choice(reply, self.name).get("logprobs") or {}).get("content") or []
        if not content:
            raise EngineError(f"{self.name}: llama.cpp returned no log-probabilities")
        return {int(one["id"]): float(one["logprob"]) for one in content[0]["top_logprobs"]}

    def _strip_stop(self, ids: list[int]) -> list[int]:
        while ids and ids[-1] in self.stops:
            ids = ids[:-1]
        return ids

    def _compute_logprobs(self, prompt: list[int], ids: list[int]) -> list[float]:
        """Compute log-probabilities with the scorer.

        llama.cpp reports tokens that share one character as one token.
        """
        return list(self.score([[*prompt, *ids]], [len(prompt)])[0].logprobs) if ids else []

    def _build_body(self, prompt: list[int], request: Request) -> dict[str, Any]:
        s = request.sampling
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": min(s.max_tokens, self.context - len(prompt)),
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repeat_penalty": 1.0,
            "stop": list(s.stop),
            "n_probs": 1,
            "post_sampling_probs": False,
            "cache_prompt": True,
            "samplers": ["top_k", "top_p", "temperature"],
            "return_tokens": True,
            "verbose": True,
        }
        if s.seed is not None:
            body["seed"] = s.seed
        if request.schema is not None:
            body["json_schema"] = {**request.schema, "x-guidance": JSON_STYLE}
        return body

    def stream(self, request: Request) -> Iterator[Delta]:
        """Stream one completion; closing the iterator stops decoding at the next token."""
        prompt = self.prompt_ids(request)
        server = self._open_generator()
        pieces: queue.Queue[Any] = queue.Queue()
        cancelled = threading.Event()

        def receive(piece: Any) -> bool:
            pieces.put(piece)
            return cancelled.is_set()

        def run() -> None:
            try:
                server.handle_completions({**self._build_body(prompt, request), "stream": True}, receive)
                pieces.put(None)
            except Exception as error:  # re-raised by the reader below
                pieces.put(error)

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        ids: list[int] = []
        logprobs: list[float] = []
        text, count = "", 0
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise EngineError(f"{self.name}: llama.cpp failed: {piece}") from None
                choice = _get_choice(piece, self.name)
                new_ids, new_logprobs = _get_sampled(choice)
                ids, logprobs = ids + new_ids, logprobs + new_logprobs
                if choice.get("text"):
                    text += choice["text"]
                    yield Delta(choice["text"])
                if choice["finish_reason"]:
                    count = int((piece.get("usage") or {}).get("completion_tokens", len(ids)))
                    whole = count == len(
                        ids
                    )  # else some characters took several tokens, of which only the last is reported
                    kept = self._strip_stop(ids) if whole else []
                    count -= len(ids) - len(kept) if whole else 0
                    done = Completion(
                        text,
                        _map_finish_reason(choice, False),
                        tuple(kept),
                        tuple(logprobs[: len(kept)]),
                        len(prompt),
                        count,
                    )
                    yield Delta("", done)
                    return
        finally:
            cancelled.set()
            worker.join()  # native code must not outlive this process

    def score(self, ids: Sequence[Sequence[int]], begins: Sequence[int] = ()) -> list[Scored]:
        """Compute the log-probabilities of tokens from each begin on (default: all after the first).

        Sequences are sorted, so that a prefix shared with the previous one is computed once.
        """
        begins = begins or [1] * len(ids)
        check_score(ids, begins, SCORE_TOKENS, self.name)
        with self._lock, _silence_output():
            scorer = self._open_scorer()
            out: dict[int, Scored] = {}
            for i in sorted(range(len(ids)), key=lambda i: tuple(ids[i])):
                rows = scorer.compute_logits(ids[i][:-1], begins[i] - 1)
                out[i] = score_logits(rows, ids[i][begins[i] - 1 :], 1)
        return [out[i] for i in range(len(ids))]

    def _open_scorer(self) -> Any:
        from llmworks.generate.engines.llamacpp_scorer import LlamaCppScorer

        if self._scorer is None:
            self._scorer = LlamaCppScorer(self.path, SCORE_TOKENS, self.threads)
        return self._scorer

    def logits(self, ids: Sequence[int]) -> Any:
        """Return next-token logits after every position: numpy [len(ids), vocabulary]. At most 2048 ids."""
        import numpy as np

        if len(ids) > SCORE_TOKENS:
            raise RequestError(f"{len(ids)} tokens to score, {self.name} scores at most {SCORE_TOKENS} per sequence")
        with self._lock, _silence_output():
            return np.stack(self._open_scorer().compute_logits(ids, 0))

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Raise RequestError: a causal model's hidden states are not good sentence embeddings."""
        raise RequestError(f"{self.name} does not compute embeddings; use a sentence encoder")

    def close(self) -> None:
        """Stop the server and free the model."""
        with _silence_output():
            self._server = None
            self._scorer = None


STOP_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def get_stop_ids(meta: dict[str, Any]) -> list[int]:
    """Return the end-of-turn token ids in GGUF metadata."""
    ids = sorted({int(meta[key]) for key in STOP_KEYS if key in meta})
    if not ids:
        raise ModelError("the GGUF file has no end-of-sequence token")
    return ids


def _get_choice(reply: Any, name: str) -> dict[str, Any]:
    if not isinstance(reply, dict) or not reply.get("choices"):
        message = reply.get("error", reply.get("message", reply)) if isinstance(reply, dict) else reply
        raise EngineError(f"{name}: llama.cpp returned {str(message)[:200]}")
    choice: dict[str, Any] = reply["choices"][0]
    return choice


def _map_finish_reason(choice: dict[str, Any], stopped: bool) -> FinishReason:
    return "length" if choice["finish_reason"] == "length" and not stopped else "stop"


def _get_sampled(choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    content = (choice.get("logprobs") or {}).get("content") or []
    return [int(t["id"]) for t in content], [float(t["logprob"]) for t in content]


@contextmanager
def _silence_output() -> Iterator[None]:
    """Suppress native output to stdout and stderr."""
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, null):
            os.close(descriptor)
