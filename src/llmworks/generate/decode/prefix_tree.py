"""Score many sequences as a prefix tree: each shared prefix is computed once.

Few-shot examples are computed once for all questions, a question once for all its choices. Branches that fit are
computed in one row under a tree attention mask, by which a token attends to its own ancestors only (SpecInfer, Miao et
al. 2023, arXiv:2305.09781, section 4.2); nothing is padded and no cache is copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmworks.core.types import Scored

TOKENS_PER_FORWARD = 512  # tokens per forward pass
BranchSpan = tuple["PrefixBranch", int, int]  # branch, start, end (exclusive) of its tokens


@dataclass
class PrefixBranch:
    """A run of tokens without a fork, and its children.

    `depth`: number of tokens before it. `first_scored`: first position, counted from the root, that any sequence
    through this branch scores. `size`: tokens to compute from here on. `logprobs`: log-probability of each token, NaN
    where not scored. `greedy`: whether no other token was more probable there.
    """

    ids: list[int]
    depth: int
    first_scored: int
    children: list[PrefixBranch] = field(default_factory=list)
    size: int = 0
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    @property
    def num_computed(self) -> int:
        """Number of its tokens to compute: the last token of a sequence predicts nothing that is scored."""
        return len(self.ids) - (not self.children)


def build_prefix_tree(sequences: Sequence[Sequence[int]], begins: Sequence[int]) -> list[PrefixBranch]:
    """Build the prefix tree of the sequences; roots are in token order."""
    order = sorted((i for i in range(len(sequences)) if sequences[i]), key=lambda i: tuple(sequences[i]))
    roots: list[PrefixBranch] = []
    todo = [(order, 0, roots)]
    branches: list[PrefixBranch] = []
    while todo:
        members, depth, into = todo.pop()
        at = 0
        while at < len(members):
            last = at
            while last + 1 < len(members) and sequences[members[last + 1]][depth] == sequences[members[at]][depth]:
                last += 1
            group = members[at : last + 1]
            first, final = (
                sequences[group[0]],
                sequences[group[-1]],
            )  # sorted: the prefix these two share is shared by all between them
            end = depth + 1
            while end < min(len(first), len(final)) and first[end] == final[end]:
                end += 1
            branch = PrefixBranch(list(first[depth:end]), depth, min(begins[i] for i in group))
            branch.logprobs, branch.greedy = [float("nan")] * len(branch.ids), [False] * len(branch.ids)
            into.append(branch)
            branches.append(branch)
            rest = [i for i in group if len(sequences[i]) > end]
            if rest:
                todo.append((rest, end, branch.children))
            at = last + 1
    for branch in reversed(branches):  # children are created after their parents
        branch.size = branch.num_computed + sum(child.size for child in branch.children)
    return roots


def score_sequences(
    model: Any, cache: Any, sequences: Sequence[Sequence[int]], begins: Sequence[int], row: int = TOKENS_PER_FORWARD
) -> list[Scored]:
    """Compute the log-probabilities of each sequence's tokens from its begin (1 or more) on.

    `cache`: an empty cache of the model that can be cropped. `row`: tokens per forward pass, and the most positions
    whose logits exist.
    """
    roots = build_prefix_tree(sequences, begins)
    with torch.inference_mode():
        _compute_branches(model, cache, roots, row)
    return [_collect_scores(roots, text, begin) for text, begin in zip(sequences, begins, strict=True)]


def supports_tree_attention(model: Any, max_length: int) -> bool:
    """Return whether the model supports tree attention masks for sequences of this length.

    It must be a transformer that takes position ids and attends to all earlier tokens.
    """
    known = inspect.signature(model.forward).parameters
    config = model.config
    window = getattr(config, "sliding_window", None)
    return (
        {"position_ids", "logits_to_keep"} <= set(known)
        and not hasattr(model, "new_cache")
        and not hasattr(config, "shape")
        and not getattr(config, "alibi", False)
        and (not window or max_length <= window)
    )


def _compute_branches(model: Any, cache: Any, branches: list[PrefixBranch], row: int) -> None:
    """Compute branches and all their descendants; their prefix is in the cache, which is restored."""
    before = cache.get_seq_length()
    waiting: list[PrefixBranch] = []
    for branch in sorted(branches, key=lambda b: b.size, reverse=True):
        if branch.size > row:
            for start in range(0, branch.num_computed, row):
                _forward(model, cache, [(branch, start, min(start + row, branch.num_computed))])
            _compute_branches(model, cache, branch.children, row)
            _truncate_cache(cache, before)
            continue
        if sum(b.size for b in waiting) + branch.size > row:
            _forward(model, cache, [part for b in waiting for part in _walk_branch(b)])
            _truncate_cache(cache, before)
            waiting = []
        waiting.append(branch)
    if waiting:
        _forward(model, cache, [part for b in waiting for part in _walk_branch(b)])
        _truncate_cache(cache, before)


def _truncate_cache(cache: Any, tokens: int) -> None:
    """Truncate the cache to its first `tokens` tokens."""
    if cache.get_seq_length() > tokens:
        cache.crop(tokens - cache.get_seq_length())


def _walk_branch(branch: PrefixBranch) -> Iterator[BranchSpan]:
    """Yield a branch and all its descendants, parents first."""
    todo = [branch]
    while todo:
        here = todo.pop()
        if here.num_computed:
            yield here, 0, here.num_computed
        todo += here.children


def _forward(model: Any, cache: Any, parts: list[BranchSpan]) -> None:
    """Compute parts of branches in one row, and store the log-probabilities of the tokens that follow."""
    if not parts:
        return
    ids = [token for branch, start, end in parts for token in branch.ids[start:end]]
    positions = [branch.depth + i for branch, start, end in parts for i in range(start, end)]
    begins: dict[int, int] = {}
    total = 0
    for branch, start, end in parts:
        begins[id(branch)] = total
        total += end - start
    past = cache.get_seq_length()
    mask = None
    if len(parts) > 1:
        visible = torch.zeros(total, total, dtype=torch.bool)
        parent = {id(child): branch for branch, _, _ in parts for child in branch.children}
        for branch, start, end in parts:
            at = begins[id(branch)]
            causal = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            visible[at : at + end - start, at : at + end - start] = causal
            above = parent.get(id(branch))
            if above is not None and id(above) in begins:  # all that its parent's last token attends to
                last = begins[id(above)] + len(above.ids) - 1
                visible[at : at + end - start] |= visible[last]
        mask = torch.cat([torch.ones(total, past, dtype=torch.bool), visible], 1)[None, None]
    wanted: list[tuple[int, PrefixBranch, int]] = []  # (position in the row, branch and index in it of the next token)
    for branch, start, end in parts:
        at = begins[id(branch)]
        for i in range(start, end):
            if i + 1 < len(branch.ids):
                if branch.depth + i + 1 >= branch.first_scored:
                    wanted.append((at + i - start, branch, i + 1))
            else:
                wanted += [(at + i - start, child, 0) for child in branch.children if child.depth >= child.first_scored]
    places = sorted({place for place, _, _ in wanted})
    keep = torch.tensor(places if places else [total - 1])
    if mask is not None:
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    logits = model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits[0]
    if not wanted:
        return
    number = {place: n for n, place in enumerate(places)}
    rows = torch.tensor([number[place] for place, _, _ in wanted])
    tokens = torch.tensor([branch.ids[i] for _, branch, i in wanted])
    logits = logits.float()
    token_logits = logits[rows, tokens]
    logprobs, best = (
        (token_logits - logits.logsumexp(-1)[rows]).tolist(),
        (token_logits >= logits.amax(-1)[rows]).tolist(),
    )
    for (_, branch, i), logprob, most in zip(wanted, logprobs, best, strict=True):
        branch.logprobs[i], branch.greedy[i] = logprob, most


def _collect_scores(roots: list[PrefixBranch], sequence: Sequence[int], begin: int) -> Scored:
    """Collect a sequence's log-probabilities from its begin on."""
    logprobs: list[float] = []
    best: list[bool] = []
    branches = roots
    while len(logprobs) < len(sequence):
        branch = next(b for b in branches if b.ids[0] == sequence[len(logprobs)])
        logprobs, best = logprobs + branch.logprobs, best + branch.greedy
        branches = branch.children
    return Scored(tuple(logprobs[begin:]), all(best[begin:]))
