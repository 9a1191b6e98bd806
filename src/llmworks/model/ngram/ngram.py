"""N-gram language model with interpolated modified Kneser-Ney smoothing.

    p(w | h) = max(c(h w) - D, 0) / c(h) + (total discount) / c(h) * p(w | h without its first token)

down to unigrams, which are interpolated with a uniform distribution. `kneser_ney.py` counts; the interface is the
decoder's: logits are log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX
from llmworks.model.ngram.kneser_ney import NgramOrder
from llmworks.model.nn.recurrent_state import StateCache
from llmworks.model.nn.segments import check_ids, get_segment_ids

MAX_PROBABILITIES = 1 << 24  # probabilities computed at a time


class NgramModelConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Table sizes and discounts."""

    model_type = "llmworks_ngram"

    def __init__(
        self,
        vocab_size: int = 2,
        sizes: Sequence[int] = (3,),
        discounts: Sequence[Sequence[float]] = ((0.5, 1.0, 1.5),),
        max_position_embeddings: int = 1 << 20,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.sizes, self.discounts, self.max_position_embeddings = (
            vocab_size,
            list(sizes),
            [list(d) for d in discounts],
            max_position_embeddings,
        )
        kwargs["tie_word_embeddings"] = False
        orders = len(self.sizes)
        good = (
            orders
            and self.sizes[0] == vocab_size + 1
            and len(self.discounts) == orders
            and all(
                len(d) == 3 and all(isinstance(x, (int, float)) and 0 <= x <= n for n, x in enumerate(d, 1))
                for d in self.discounts
            )
        )
        if not good:
            raise ValueError("config.json: sizes, discounts and vocab_size do not match; copy it again")
        super().__init__(**kwargs)


class NgramForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """N-gram tables, from unigrams up. Has no parameters and is not trained by gradients."""

    config_class = NgramModelConfig

    def __init__(self, config: NgramModelConfig) -> None:
        super().__init__(config)
        self.vocabulary, self.highest = config.vocab_size, len(config.sizes)
        for n, size in enumerate(config.sizes, 1):
            self.register_buffer(f"counts_{n}", torch.zeros(size, dtype=torch.int64))
            if n > 1:
                self.register_buffer(f"keys_{n}", torch.zeros(size, dtype=torch.int64))
        self._tables: list[tuple[Tensor, Tensor, Tensor]] = []
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_counts(
        cls, orders: Sequence[NgramOrder], discounts: Sequence[Sequence[float]], **config: Any
    ) -> NgramForCausalLM:
        """Build the model from counted n-grams."""
        model: NgramForCausalLM = cls(
            NgramModelConfig(
                vocab_size=len(orders[0].counts) - 1,
                sizes=[len(o.counts) for o in orders],
                discounts=discounts,
                **config,
            )
        )
        for n, order in enumerate(orders, 1):
            model.get_buffer(f"counts_{n}").copy_(torch.from_numpy(order.counts))
            if n > 1:
                model.get_buffer(f"keys_{n}").copy_(torch.from_numpy(order.keys))
        model.train(False)
        return model

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @staticmethod
    def new_cache() -> StateCache:
        """Create an empty cache, which holds the numbers of the last n-grams."""
        return StateCache()

    def _init_weights(self, module: Any) -> None:
        """Do nothing: there are no parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the logits."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the tables."""
        return self.get_buffer("counts_1").device

    def get_discounts(self, n: int, counts: Tensor) -> Tensor:
        """Return the discounts of counts of an order."""
        of = torch.tensor([0.0, *self.config.discounts[n - 1]], dtype=torch.float64, device=counts.device)
        return of[counts.clamp(max=3)]

    def build_tables(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return, per order and n-gram of the order below: (first index of its continuations, their total count, the
        interpolation weight, which is the share of the total discount).
        """
        if not self._tables:
            for n in range(1, self.highest + 1):
                counts = self.get_buffer(f"counts_{n}")
                contexts = self.config.sizes[n - 2] if n > 1 else 1
                begins = torch.tensor([0, len(counts)], device=counts.device)
                if n > 1:
                    begins = torch.searchsorted(
                        self.get_buffer(f"keys_{n}"),
                        torch.arange(contexts + 1, device=counts.device) * (self.vocabulary + 1),
                    )
                total, taken = (
                    F.pad(x.cumsum(0), (1, 0))[begins].diff() for x in (counts, self.get_discounts(n, counts))
                )
                self._tables.append((begins, total, taken / total.clamp(min=1)))
        return self._tables

    def find_ngrams(self, n: int, before: Tensor, token: Tensor) -> Tensor:
        """Return the number of the n-gram `before` (a number in the order below, or -1) + token; -1 if unseen."""
        keys = self.get_buffer(f"keys_{n}")
        if not keys.numel():
            return torch.full_like(token, -1)
        wanted = before * (self.vocabulary + 1) + token
        at = torch.searchsorted(keys, wanted.contiguous()).clamp(max=len(keys) - 1)
        return torch.where((before >= 0) & (keys[at] == wanted), at, -1)

    def compute_contexts(self, ids: Tensor, document_starts: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Return, for each n below the highest, the number [batch, length] of the n-gram that ends at each token.

        document_starts: mask of tokens that begin a new document.
        """
        contexts = [ids] if self.highest > 1 else []
        for n in range(2, self.highest):
            before = torch.cat((state[n - 2][0][:, None], contexts[-1][:, :-1]), 1)
            before = before.masked_fill(document_starts, self.vocabulary if n == 2 else -1)
            contexts.append(self.find_ngrams(n, before, ids))
        return contexts

    def get_initial_state(self, batch: int, device: torch.device) -> list[Tensor]:
        """Return the state before a document: the begin-of-sequence symbol and no longer n-gram. Each [1, batch]."""
        return [
            torch.full((1, batch), self.vocabulary if n == 1 else -1, device=device) for n in range(1, self.highest)
        ]

    def compute_probabilities(self, contexts: Sequence[Tensor]) -> Tensor:
        """Compute the next-token distribution [tokens, vocab_size].

        contexts: numbers [tokens] of the n-grams that end there.
        """
        tokens, device = (len(contexts[0]), contexts[0].device) if contexts else (1, self.get_buffer("counts_1").device)
        p = torch.full((tokens, self.vocabulary), 1 / self.vocabulary, dtype=torch.float64, device=device)
        for n, (begins, total, taken) in enumerate(self.build_tables(), 1):
            counts = self.get_buffer(f"counts_{n}")
            if not counts.numel() or not total.numel():  # no document is long enough
                continue
            here = contexts[n - 2] if n > 1 else torch.zeros(tokens, dtype=torch.int64, device=device)
            known = here >= 0
            known &= total[here.clamp(min=0)] > 0
            rows, here = known.nonzero()[:, 0], here[known]
            p[rows] *= taken[here][:, None]
            lengths = begins[here + 1] - begins[here]
            entries = torch.arange(int(lengths.sum()), device=device) + (
                begins[here] - lengths.cumsum(0) + lengths
            ).repeat_interleave(lengths)
            words = self.get_buffer(f"keys_{n}")[entries] % (self.vocabulary + 1) if n > 1 else entries
            share = (counts[entries] - self.get_discounts(n, counts[entries])) / total[here].repeat_interleave(lengths)
            rows = rows.repeat_interleave(lengths)
            if n == 1:  # the last is the begin-of-sequence symbol, which is never predicted
                words, rows, share = (x[entries < self.vocabulary] for x in (words, rows, share))
            p.index_put_((rows, words), share, accumulate=True)
        return p

    def compute_token_probabilities(self, contexts: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Compute the probability [tokens] of given next tokens."""
        p = torch.full(tokens.shape, 1 / self.vocabulary, dtype=torch.float64, device=tokens.device)
        for n, (_, total, taken) in enumerate(self.build_tables(), 1):
            counts = self.get_buffer(f"counts_{n}")
            if not counts.numel() or not total.numel():
                continue
            here = contexts[n - 2] if n > 1 else torch.zeros_like(tokens)
            entry = self.find_ngrams(n, here, tokens) if n > 1 else tokens
            here, known = here.clamp(min=0), (here >= 0) & (total[here.clamp(min=0)] > 0)
            stands = torch.where(entry >= 0, counts[entry.clamp(min=0)], 0)
            p = torch.where(
                known, (stands - self.get_discounts(n, stands)) / total[here].clamp(min=1) + taken[here] * p, p
            )
        return p

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute next-token log-probabilities [batch, length, vocab_size]; with labels only their mean cross-entropy.

        labels: [batch, length], -100 = ignored. Without a mask, position ids that restart separate packed documents.
        Errors: ModelError for ids beyond the vocabulary.
        """
        check_ids(input_ids, self.vocabulary)
        batch, length = input_ids.shape
        cache = past_key_values if past_key_values is not None else StateCache() if use_cache else None
        valid = (
            attention_mask[:, -length:].bool()
            if attention_mask is not None
            else torch.ones_like(input_ids, dtype=torch.bool)
        )
        if segment_ids is None and position_ids is not None and cache is None and attention_mask is None:
            segment_ids = get_segment_ids(position_ids.expand(batch, length))
        document_starts = F.pad(~valid[:, :-1], (1, 0))
        if segment_ids is not None:
            document_starts = document_starts | F.pad(segment_ids.diff() != 0, (1, 0))
        state = (
            list(cache.state)
            if cache is not None and cache.state is not None
            else self.get_initial_state(batch, input_ids.device)
        )
        contexts = self.compute_contexts(input_ids, document_starts, state)
        if cache is not None:
            left = valid[:, -1]
            cache.state = tuple(torch.where(left, c[:, -1], s[0])[None] for c, s in zip(contexts, state, strict=True))
            cache.tokens += length
        if labels is not None:
            at = labels[:, 1:] != IGNORE_INDEX
            probabilities = self.compute_token_probabilities([c[:, :-1][at] for c in contexts], labels[:, 1:][at])
            return CausalLMOutputWithPast(loss=(-probabilities.log().sum() / max(1, probabilities.numel())).float())
        kept = [c[:, -logits_to_keep:] if logits_to_keep else c for c in contexts]
        rows = kept[0].numel() if kept else (min(logits_to_keep, length) or length) * batch
        flat = [c.flatten() for c in kept]
        step = max(1, MAX_PROBABILITIES // self.vocabulary)
        logits = (
            torch.cat(
                [
                    self.compute_probabilities([c[i : i + step] for c in flat]).log().float()
                    for i in range(0, rows, step)
                ]
            )
            if flat
            else self.compute_probabilities([]).log().float().expand(rows, -1)
        )
        logits = logits.view(batch, -1, self.vocabulary)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]


AutoConfig.register(NgramModelConfig.model_type, NgramModelConfig)
AutoModelForCausalLM.register(NgramModelConfig, NgramForCausalLM)
