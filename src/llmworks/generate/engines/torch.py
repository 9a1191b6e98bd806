"""The torch engine: a Hugging Face model with batched decoding, a KV cache and shared-prefix prefill.

Rows are sorted by length and left-padded; finished rows leave the batch. Does not read file formats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import RequestError
from llmworks.core.types import Completion, Delta, FinishReason, Json, Request, Scored
from llmworks.generate.decode import prefix_tree as tree
from llmworks.generate.decode.grammar import GrammarCompiler, GrammarState
from llmworks.generate.decode.kv_cache import create_cache
from llmworks.generate.decode.prompt import render_prompt_ids
from llmworks.generate.decode.sampling import sample_token
from llmworks.generate.decode.scoring import check_score, score_logits
from llmworks.generate.decode.stopping import cut_at_stop, displayable_length
from llmworks.generate.remote.parallel import IndexedResult, collect_in_order
from llmworks.model.io.load import load_model
from llmworks.tokenize.chat.templates import can_render_tools
from llmworks.tokenize.load import get_stop_ids, load_tokenizer

BATCH_ROWS = 64
SHARED_PREFIX_MIN = 16
MAX_FINISHED_FRACTION = (
    0.25  # finished rows are removed once they are this share of the batch: removal copies the cache
)


class TorchEngine:
    """Engine over a loaded causal model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, stops: Sequence[int], name: str) -> None:
        self.model, self.tokenizer, self.stops, self.name = model, tokenizer, frozenset(stops), name
        tools = {"tools"} if tokenizer.chat_template and can_render_tools(tokenizer) else set()
        self.can = frozenset({"score", "logits", "ids", "schema", *tools})
        self._grammars: GrammarCompiler | None = None

    @classmethod
    def open(cls, path: Path, *, adapter: Path | None = None, name: str = "") -> TorchEngine:
        """Load a Hugging Face directory, with an optional adapter.

        A LoRA adapter is merged into the weights, a soft prompt is prepended to every sequence. The adapter's tokenizer
        and chat template are used if it has them.
        """
        model: Any = load_model(path, low_bit=adapter is None)
        source = path
        if adapter is not None:
            from llmworks.model.lora.merge_adapter import make_weight_lookup, merge_adapter_into
            from llmworks.model.lora.soft_prompt import attach_soft_prompt, is_soft_prompt

            if is_soft_prompt(adapter):
                model = attach_soft_prompt(model, adapter)
            else:
                merge_adapter_into(make_weight_lookup(model), adapter)
            source = adapter if (adapter / "tokenizer.json").exists() else path
        tokenizer = load_tokenizer(source)
        return cls(model, tokenizer, get_stop_ids(path, tokenizer), name or path.name)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        found: torch.device = getattr(self.model, "device", torch.device("cpu"))
        return found

    @property
    def context(self) -> int:
        """Maximum number of prompt and completion tokens together."""
        return int(self.model.config.max_position_embeddings) - getattr(self.model, "num_virtual_tokens", 0)

    def grammar(self, schema: Json) -> GrammarState:
        """Return the grammar state of a completion constrained to a JSON schema.

        RequestError for a schema that cannot be enforced.
        """
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, sorted(self.stops), int(self.model.config.vocab_size))
        return self._grammars.compile(schema)

    def prompt_ids(self, request: Request) -> list[int]:
        """Return the request's prompt as token ids. RequestError for an unsupported request."""
        return render_prompt_ids(request, self.tokenizer, self.context, self.name, tools="tools" in self.can)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of all requests, in order."""
        return collect_in_order(self.each(requests), len(requests))

    def each(self, requests: Sequence[Request]) -> Iterator[IndexedResult]:
        """Yield completions batch by batch; prompts of similar length share a batch."""
        rows: dict[int, _Sequence] = {}
        for i, request in enumerate(requests):
            try:
                rows[i] = _Sequence(self, request)
            except RequestError as error:
                yield i, error
        order = sorted(rows, key=lambda i: len(rows[i].prompt))
        for start in range(0, len(order), BATCH_ROWS):
            chunk = order[start : start + BATCH_ROWS]
            yield from zip(chunk, self._decode_batch([rows[i] for i in chunk]), strict=True)

    def _decode_batch(self, rows: list[_Sequence]) -> list[Completion]:
        active = list(range(len(rows)))
        with torch.inference_mode():
            logits, cache, attention_mask, positions = self._prefill([row.prompt for row in rows])
            while True:
                tokens = [
                    rows[r].append_token(logits[i]) if rows[r].finish is None else 0 for i, r in enumerate(active)
                ]
                keep = [i for i, r in enumerate(active) if rows[r].finish is None]
                if not keep:
                    break
                if len(keep) <= len(active) * (1 - MAX_FINISHED_FRACTION):
                    index = torch.tensor(keep, device=positions.device)
                    cache.batch_select_indices(index)
                    attention_mask, positions = attention_mask[index], positions[index]
                    active, tokens = [active[i] for i in keep], [tokens[i] for i in keep]
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(active), 1)], dim=1)
                positions = positions + 1
                logits = self._forward(torch.tensor(tokens)[:, None], cache, positions[:, None], attention_mask)
        return [row.completion() for row in rows]

    def _forward(self, ids: Tensor, cache: Any, positions: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Return logits [rows, vocabulary] after the last of `ids` [rows, length]; updates the KV cache."""
        out = self.model(
            input_ids=ids.to(self.device),
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float().cpu()  # sampling generators are on the CPU
        return logits

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Prefill the prompts: (logits [rows, vocabulary], cache, attention mask, position of the last token)."""
        cache = create_cache(self.model)
        unique_prompts = list(dict.fromkeys(map(tuple, prompts)))
        if len(unique_prompts) < len(prompts):  # several completions of one prompt: prefill it once
            logits, cache, mask, last = self._prefill([list(prompt) for prompt in unique_prompts])
            index = torch.tensor([unique_prompts.index(tuple(prompt)) for prompt in prompts], device=mask.device)
            cache.batch_select_indices(index)
            return logits[index.cpu()], cache, mask[index], last[index]
        shared = 0
        if len(prompts) > 1:
            shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
            shared = shared if shared >= SHARED_PREFIX_MIN else 0
        if shared:
            self._forward(torch.tensor([prompts[0][:shared]]), cache, None, None)
            cache.batch_repeat_interleave(len(prompts))
        rest = [prompt[shared:] for prompt in prompts]
        width = max(map(len, rest))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rest])
        mask = torch.tensor(
            [[1] * shared + [0] * (width - len(row)) + [1] * len(row) for row in rest], device=self.device
        )
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]
        padded = bool((mask == 0).any())
        logits = self._forward(ids, cache, position_ids, mask if padded or shared else None)
        return logits, cache, mask, position_ids[:, -1]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Stream one completion token by token; closing the iterator stops it."""
        row = _Sequence(self, request)
        shown = 0
        with torch.inference_mode():
            logits, cache, _, position = self._prefill([row.prompt])
        while True:
            token = row.append_token(logits[0])
            text = row.text()
            end = len(text) if row.finish else max(shown, displayable_length(text, request.sampling.stop))
            if row.finish:
                yield Delta(text[shown:], row.completion())
                return
            if end > shown:
                yield Delta(text[shown:end])
                shown = end
            position = position + 1
            with torch.inference_mode():
                logits = self._forward(torch.tensor([[token]]), cache, position[:, None], None)

    def score(self, ids: Sequence[Sequence[int]], begins: Sequence[int] = ()) -> list[Scored]:
        """Compute the log-probabilities of tokens from each begin on (default: all after the first).

        Shared prefixes are computed once.
        """
        begins = begins or [1] * len(ids)
        check_score(ids, begins, self.context, self.name)
        if tree.supports_tree_attention(self.model, max(map(len, ids), default=0)):
            return tree.score_sequences(self.model, create_cache(self.model), ids, begins)
        return [
            score_logits(self.logits(sequence[:-1]), sequence, begin)
            for sequence, begin in zip(ids, begins, strict=True)
        ]

    def logits(self, ids: Sequence[int]) -> Any:
        """Return next-token logits after every position: numpy [len(ids), vocabulary]."""
        with torch.inference_mode():
            return (
                self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False)
                .logits[0]
                .float()
                .cpu()
                .numpy()
            )

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Raise RequestError: a causal model's hidden states are not good sentence embeddings."""
        raise RequestError(f"{self.name} does not compute embeddings; use a sentence encoder")

    def close(self) -> None:
        """Free the model."""
        self.model = None


class _Sequence:
    """One sequence being decoded: samples from logits, collects ids, detects the end."""

    def __init__(self, engine: TorchEngine, request: Request) -> None:
        self.engine, self.prompt, self.sampling = engine, engine.prompt_ids(request), request.sampling
        self.limit = min(request.sampling.max_tokens, engine.context - len(self.prompt))
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None
        self.ended: int | None = None
        self.grammar = None if request.schema is None else engine.grammar(request.schema)
        self.generator: torch.Generator | None = None
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)

    def append_token(self, logits: Tensor) -> int:
        """Sample the next token from logits [vocabulary] and check whether it ends the completion."""
        s = self.sampling
        allowed = logits if self.grammar is None else self.grammar.mask_logits(logits)
        token = sample_token(allowed, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, generator=self.generator)
        if self.grammar is not None:
            self.grammar.advance(token)
        if token in self.engine.stops:
            self.finish, self.ended = "stop", token
            return token
        self.ids.append(token)
        self.logprobs.append(float(logits[token] - logits.logsumexp(dim=-1)))
        if s.stop and cut_at_stop(self._decode(), s.stop)[1]:
            self.finish = "stop"
        elif len(self.ids) >= self.limit:
            self.finish = "length"
        return token

    def _decode(self) -> str:
        return str(self.engine.tokenizer.decode(self.ids, skip_special_tokens=True))

    def text(self) -> str:
        """Return the text so far, cut at a stop string."""
        return cut_at_stop(self._decode(), self.sampling.stop)[0]

    def completion(self) -> Completion:
        """Return the finished completion."""
        return Completion(
            self.text(),
            self.finish or "cancelled",
            tuple(self.ids),
            tuple(self.logprobs),
            len(self.prompt),
            len(self.ids),
            self.ended,
        )
