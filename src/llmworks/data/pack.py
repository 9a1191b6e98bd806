"""Stage `data.pack`: tokenize conversations or documents and pack them into rows of max_length tokens.

Text is tokenized in parts, `packing/bin_packing.py` assigns the pieces to rows (best-fit decreasing), and the rows
are written as shards that training memory-maps (`store/packed_tokens.py`). A conversation is never truncated; one
that is too long is rejected.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError
from llmworks.core.types import Json
from llmworks.data.doctor import require_template
from llmworks.data.packing.bin_packing import pack_best_fit
from llmworks.data.packing.sequences import TokenizationSettings, encode_chats, encode_documents
from llmworks.data.store.parts import PartResults, link_or_copy, plan_file_spans, plan_spans, process_parts
from llmworks.data.store.rows import detect_schema, list_row_files, open_rows
from llmworks.tokenize.chat.named_templates import TEMPLATE_DESCRIPTION, Template, load_model_tokenizer
from llmworks.tokenize.chat.template_faults import TemplateUses
from llmworks.tokenize.load import get_stop_ids

SHARD_TOKENS = 1 << 25
BINS = 40


class PackConfig(Config):
    """Row length, chat template and special tokens."""

    max_length: int = Field(
        2048, gt=1, description="tokens per row; longer conversations are rejected, longer documents are split"
    )
    chat_template: Template = Field("keep", description=TEMPLATE_DESCRIPTION)
    eos_token: str = Field("", description="token appended to each document; default: the tokenizer's eos_token")
    control_tokens: Literal["text", "drop", "keep"] = Field(
        "text",
        description=(
            "special tokens in the text of messages. text: encode them as text; drop: reject such conversations; keep:"
            " encode them as control tokens. In documents they are always text"
        ),
    )
    seed: int = Field(0, description="seed of the row order")


def pack(config: PackConfig, model: Model | Adapter | Tokenizer, data: Dataset, ctx: Context) -> Dataset:
    """Pack the data into `shard-00000.safetensors` and so on.

    The bytes depend only on data, tokenizer and config, not on the number of workers.

    Errors: ModelError for an unsuitable tokenizer or a faulty template; DataError for preference pairs, or when no row
    is left.
    """
    tokenizer = load_model_tokenizer(model, config.chat_template)
    chats = detect_schema(data)
    if chats == "preference":
        raise DataError(f"{data.name}: holds preference pairs; only conversations or documents can be packed")
    if chats:
        how = TokenizationSettings(
            model.path, config.chat_template, config.max_length, control_tokens=config.control_tokens
        )
        spans = plan_file_spans(list_row_files(data, "chat"), partial(open_rows, kind="chat"))
        done = process_parts(ctx, "tokens", partial(encode_chats, how), spans)
        uses = done.sum_counters("uses")
        require_template(
            model.name,
            tokenizer,
            get_stop_ids(model.path, tokenizer),
            TemplateUses(**{name: uses[name] > 0 for name in ("system", "tools", "results", "turns")}),
        )
    else:
        how = TokenizationSettings(
            model.path, config.chat_template, config.max_length, *_get_boundary_tokens(config, tokenizer)
        )
        done = process_parts(ctx, "tokens", partial(encode_documents, how), plan_spans(data))
    if not done.sum_values("pieces"):
        raise DataError(
            f"{data.name}: nothing is left to pack, all {done.sum_values('rejected'):,} rows were rejected"
            f" ({_count_reasons(done).most_common(1)[0][0]})"
        )
    lengths, order, ends = _assign_rows(config, done, ctx.scratch)
    largest = max(len(tokenizer) - 1, *(summary["largest"] for summary in done.summaries))
    shards = process_parts(
        ctx,
        "shards",
        partial(_write_shard, ctx.scratch, done.folders, bool(chats), largest),
        _plan_shards(lengths, order, ends),
    )
    for i, folder in enumerate(shards.folders):
        link_or_copy(folder / "shard.safetensors", ctx.out / f"shard-{i:05d}.safetensors")
    _gather_rejected(done, ctx.out)
    return _build_dataset(
        config,
        data,
        model,
        tokenizer,
        largest + 1,
        ctx,
        lengths,
        ends,
        shards.sum_values("learned"),
        _count_reasons(done),
    )


def _get_boundary_tokens(config: PackConfig, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (token ids prepended to a document: those that the tokenizer itself adds, token ids appended to it)."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]
    end = tokenizer.convert_tokens_to_ids(config.eos_token) if config.eos_token else tokenizer.eos_token_id
    if config.eos_token and (end is None or tokenizer.convert_ids_to_tokens(end) != config.eos_token):
        raise ModelError(f"config.eos_token: {config.eos_token!r} is not a token of this tokenizer")
    if end is None:
        raise ModelError(
            "the tokenizer has no end token, so documents would have no boundary; name one (config.eos_token)"
        )
    if len(before) + 1 >= config.max_length:
        raise ModelError(f"config.max_length is {config.max_length}, which leaves no room for text")
    return tuple(before), (int(end),)


def _assign_rows(config: PackConfig, done: PartResults, scratch: Path) -> tuple[Any, Any, Any]:
    """Return (lengths of all pieces, order, row ends) of `pack_best_fit`; save the order for the shard writers."""
    import numpy as np

    lengths = np.concatenate([np.load(folder / "lengths.npy") for folder in done.folders])
    order, ends = pack_best_fit(lengths, config.max_length, config.seed)
    np.save(scratch / "order.npy", order)
    return lengths, order, ends


def _plan_shards(lengths: Any, order: Any, ends: Any) -> list[tuple[int, int, tuple[int, ...]]]:
    """Plan shards of about SHARD_TOKENS tokens: (begin and end in the order, ends of its rows)."""
    import numpy as np

    tokens = np.cumsum(lengths[order])[ends - 1]
    bounds = [
        0,
        *(
            int(np.searchsorted(tokens, at, side="left")) + 1
            for at in range(SHARD_TOKENS, int(tokens[-1]), SHARD_TOKENS)
        ),
        len(ends),
    ]
    found = []
    for low, high in pairwise(bounds):
        if low < high:
            first = int(ends[low - 1]) if low else 0
            found.append((first, int(ends[high - 1]), tuple((ends[low:high] - first).tolist())))
    return found


def _write_shard(
    scratch: Path, folders: list[Path], chats: bool, largest: int, part: tuple[int, int, tuple[int, ...]], folder: Path
) -> Json:
    import numpy as np
    from safetensors.numpy import save_file

    first, last, ends = part
    order = np.load(scratch / "order.npy", mmap_mode="r")[first:last]
    lengths_of = [np.load(f / "lengths.npy") for f in folders]
    firsts = np.cumsum([0, *map(len, lengths_of)])
    of = np.searchsorted(firsts, order, side="right") - 1
    within = order - firsts[of]
    lengths = np.concatenate(lengths_of)[order]
    pieces = np.concatenate([[0], np.cumsum(lengths)])
    tensors: dict[str, Any] = {
        "tokens": np.empty(pieces[-1], np.uint16 if largest < 1 << 16 else np.uint32),
        "pieces": pieces,
        "rows": pieces[[0, *ends]],
        "origins": np.empty(len(order), np.int64),
    }
    if chats:
        tensors["learned"] = np.empty(pieces[-1], np.uint8)
    for number in np.unique(of).tolist():  # one part at a time, so that few files are open
        here = np.flatnonzero(of == number)
        begins = np.concatenate([[0], np.cumsum(lengths_of[number])])[within[here]]
        tensors["origins"][here] = np.load(folders[number] / "origins.npy")[within[here]]
        for name in ("tokens", "learned") if chats else ("tokens",):
            source, target = np.load(folders[number] / f"{name}.npy", mmap_mode="r"), tensors[name]
            for begin, at, length in zip(begins.tolist(), pieces[here].tolist(), lengths[here].tolist(), strict=True):
                target[at : at + length] = source[begin : begin + length]
    save_file(tensors, folder / "shard.safetensors")
    (folder / "shard.safetensors").chmod(0o644)
    return {"learned": int(tensors["learned"].sum()) if chats else int(pieces[-1]) - len(order)}


def _gather_rejected(done: PartResults, out: Path) -> None:
    files = [folder / "rejected.jsonl" for folder in done.folders if (folder / "rejected.jsonl").exists()]
    if files:
        with (out / "rejected.jsonl").open("wb") as whole:
            whole.writelines(file.read_bytes() for file in files)


def _count_reasons(done: PartResults) -> Counter[str]:
    """Count the rejected rows by reason, without the details in parentheses."""
    import json

    found: Counter[str] = Counter()
    for folder in done.folders:
        file = folder / "rejected.jsonl"
        for line in file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else ():
            found[json.loads(line)["reason"].partition(" (")[0]] += 1
    return found


def _build_dataset(
    config: PackConfig,
    data: Dataset,
    model: Model | Adapter | Tokenizer,
    tokenizer: Any,
    vocab_size: int,
    ctx: Context,
    lengths: Any,
    ends: Any,
    num_label_tokens: int,
    reasons: Counter[str],
) -> Dataset:
    """Write the report and return the packed dataset."""
    import numpy as np

    rows, pieces, tokens = len(ends), len(lengths), int(lengths.sum())
    figures: Json = {
        "rows": rows,
        "pieces": pieces,
        "tokens": tokens,
        "num_label_tokens": num_label_tokens,
        "dropped": sum(reasons.values()),
        "packing_efficiency": round(tokens / (rows * config.max_length), 5),
        "pieces_per_row": round(pieces / rows, 2),
    }
    report = ctx.report
    report.title = f"{data.name} packed for {model.name}"
    report.subtitle = (
        f"{pieces:,} pieces in {rows:,} rows of {config.max_length:,} tokens; {figures['packing_efficiency']:.2%} of"
        " the space is used."
    )
    report.data = {**figures, "length": config.max_length, "rejected": dict(reasons)}
    report.add_table("Metrics", ("metric", "value"), list(figures.items()))
    counts = np.bincount(np.minimum((lengths * BINS) // (config.max_length + 1), BINS - 1), minlength=BINS)
    per_row = np.diff(np.concatenate([[0], ends]))
    most = int(per_row.max())
    report.add_histograms(
        "Packing",
        {
            "tokens of a piece": {"counts": counts.tolist(), "top": config.max_length},
            "pieces of a row": {
                "counts": np.bincount(np.minimum(per_row * BINS // (most + 1), BINS - 1), minlength=BINS).tolist(),
                "top": most,
            },
        },
    )
    if reasons:
        report.add_table(
            "Rejected", ("reason", "rows"), reasons.most_common(40), note="The rows are in rejected.jsonl."
        )
    ctx.progress.log(
        report.subtitle + (f" {figures['dropped']:,} rows were rejected (rejected.jsonl)." if reasons else "")
    )
    about = {"length": config.max_length, "vocabulary": vocab_size, "rows": rows, "tokens": tokens}
    return Dataset(ctx.out, metrics=figures, about={"schema": "tokens", **about, **_tokenizer_digests(tokenizer)})


def _tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    """Return the digests of a tokenizer and of its chat template, by which training knows its own tokens again."""
    vocabulary = tokenizer._tokenizer.to_str().encode() if hasattr(tokenizer, "_tokenizer") else b""
    return {
        "tokenizer": hashlib.sha256(vocabulary).hexdigest() if vocabulary else "",
        "template": hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
    }
