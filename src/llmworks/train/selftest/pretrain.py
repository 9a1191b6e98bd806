"""Self-test of a pretraining config: does it train?

Runs `train.pretrain` several times within seconds, with the user's config and first rows on a shrunken model.

Each check is for a silent failure seen in training frameworks: config keys that nothing reads, gradient accumulation
that weighs micro-batches equally, attention across packed documents, shifted labels, a resume that is not exact.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.model.shape import RecurrentShape, Shape
from llmworks.train.distributed.config import Parallel
from llmworks.train.pretrain import PretrainConfig, pretrain
from llmworks.train.selftest.bench import Bench, parts_are_the_step, resumes, seed_replays
from llmworks.train.selftest.check import (
    EXACT,
    LENGTH,
    NEAR,
    VOCABULARY,
    Check,
    Reading,
    in_turn,
    keys_of,
    near_of,
    shrunken,
)

STEPS, OVERFIT = 6, 60


def reduced(config: PretrainConfig) -> PretrainConfig:
    """Shrink the config: batch size and gradient accumulation of at most 4, one process, no torch.compile."""
    accumulation, batch = min(4, config.gradient_accumulation_steps), min(4, config.batch_size)
    looks = {"eval_steps": 3, "eval_samples": 4, "sample_max_tokens": min(4, config.sample_max_tokens), "save_steps": 2}
    return config.model_copy(
        update={
            "num_train_epochs": 1.0,
            "num_train_tokens": 0,
            "batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "parallel": Parallel(),
            "torch_compile": False,
            **looks,
        }
    )


def selftest(config: PretrainConfig, shape: Shape | RecurrentShape, data: Dataset | None = None) -> Iterator[Check]:
    """Yield the result of every check. `data`: packed tokens whose first rows are used; else random rows."""
    small = reduced(config)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), shrunken(shape), small, data)
        near = near_of(config.precision)
        tests: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
            ("every config field is read", functools.partial(_keys, bench, config)),
            ("labels match the rows", functools.partial(_labels, bench)),
            ("no attention across documents of a row", functools.partial(_apart, bench)),
            ("gradient accumulation is exact", functools.partial(_parts, bench, near)),
            ("runs are reproducible by seed", functools.partial(seed_replays, bench)),
            ("resuming is exact, bit for bit", functools.partial(resumes, bench)),
            ("the rows of one step can be memorized", functools.partial(_overfit, bench)),
        ]
        yield from in_turn(tests)


class _Bench(Bench):
    """A small model with a byte tokenizer, few rows, and runs of `pretrain` on them."""

    def __init__(
        self, folder: Path, shape: Shape | RecurrentShape, config: PretrainConfig, data: Dataset | None
    ) -> None:
        import torch

        from llmworks.tokenize.load import quiet_transformers

        quiet_transformers()
        self.folder, self.shape = folder, shape
        self.rows = _rows(data, config.batch_size * config.gradient_accumulation_steps * STEPS)
        self.model = folder / "model"
        torch.manual_seed(0)
        _network(shape).save_pretrained(self.model)
        _tokenizer().save_pretrained(self.model)
        super().__init__(folder, config, self.packed("rows", self.rows), self._pretrain)

    def _pretrain(self, config: Any, data: Dataset, ctx: Context) -> Model:
        return pretrain(config, Model(self.model, about={"format": "hf"}), data, ctx, self.data)

    def packed(self, name: str, rows: Sequence[Any]) -> Dataset:
        """Write rows as a dataset of packed tokens."""
        import numpy as np
        from safetensors.numpy import save_file

        pieces = [0]
        for row in rows:
            begin = pieces[-1]
            pieces += [begin + int(edge) for edge in (*(np.flatnonzero(np.diff(row.segments)) + 1), len(row.ids))]
        tensors: dict[str, Any] = {
            "tokens": np.concatenate([row.ids for row in rows]).astype(np.uint16),
            "rows": np.cumsum([0, *(len(row.ids) for row in rows)]).astype(np.int64),
            "pieces": np.array(pieces, np.int64),
            "origins": np.arange(len(pieces) - 1, dtype=np.int64),
            "learned": np.concatenate([row.learned for row in rows]).astype(np.uint8),
        }
        target = self.folder / name
        target.mkdir()
        save_file(tensors, target / "shard-00000.safetensors")
        return Dataset(target, about={"schema": "tokens", "length": LENGTH})


def _keys(bench: _Bench, config: PretrainConfig) -> tuple[bool, str]:
    read: set[str] = set()
    bench.run("keys", Reading(bench.config, read))
    return keys_of(config, PretrainConfig(), read)


def _labels(bench: _Bench) -> tuple[bool, str]:
    each = bench.config.batch_size * bench.config.gradient_accumulation_steps
    wanted = sum(int(row.learned[1:].sum()) for row in bench.rows[: len(bench.rows) // each * each])
    found = sum(row["num_label_tokens"] for row in bench.usual)
    return (
        found == wanted and len(bench.usual) == STEPS,
        f"{found:,} labels in {len(bench.usual)} steps, {wanted:,} in the rows",
    )


def _apart(bench: _Bench) -> tuple[bool, str]:
    import torch

    from llmworks.data.store.packed_tokens import Packed
    from llmworks.model.io.load import open_trainable
    from llmworks.train.loop.packed import PackedSteps, packed_loss

    model = open_trainable(bench.model).eval()
    batch = PackedSteps(Packed(bench.data), 1, rows=min(8, len(bench.rows)), parts=1, length=LENGTH, seed=0)[0][0]()
    together, apart, texts = float(packed_loss(model, batch).detach()), 0.0, 0
    for ids, segments, labels in zip(batch.ids, batch.segments, batch.label_ids, strict=True):
        for text in range(int(segments.max()) + 1):
            own, learned = ids[segments == text][None], labels[segments == text][None].clone()
            learned[:, 0] = -100
            texts += 1
            if int((learned != -100).sum()):
                apart += float(model(input_ids=own, labels=learned).loss.detach()) * int((learned != -100).sum())
    more = torch.tensor(apart)
    return (
        abs(together - apart) <= EXACT * float(more.abs()),
        f"{texts} documents in {len(batch.ids)} rows: {together:.4f} nats packed, {apart:.4f} separately",
    )


def _parts(bench: _Bench, near: float) -> tuple[bool, str]:
    if getattr(bench.shape, "dropout", 0):
        return True, "not compared: dropout is sampled per micro-batch"
    if getattr(bench.shape, "experts", None):
        near = max(near, NEAR)  # the load-balancing loss is computed per micro-batch
    return parts_are_the_step(bench, "batch_size", near)


def _overfit(bench: _Bench) -> tuple[bool, str]:
    config, each = bench.config, bench.config.batch_size * bench.config.gradient_accumulation_steps
    rate = {"lion": 0.002}.get(config.optimizer.name, 0.01)
    optimizer = config.optimizer.model_copy(
        update={"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0}
    )
    few = bench.packed("few", bench.rows[:each])
    more = {
        "num_train_epochs": float(OVERFIT),
        "optimizer": optimizer,
        "loss_spike_threshold": 0.0,
        "ema_decay": 0.0,
        "eval_steps": OVERFIT + 1,
        "save_steps": OVERFIT + 1,
        "sample_max_tokens": 0,
    }
    losses = [row["loss"] for row in bench.run("heart", config.model_copy(update=more), data=few)]
    return (
        losses[-1] < 0.6 * losses[0],
        f"the loss of {each} rows went from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps",
    )


def _rows(data: Dataset | None, count: int) -> list[Any]:
    """Return the first rows, cut to LENGTH, with ids modulo VOCABULARY; or random rows of one to three documents."""
    import numpy as np

    from llmworks.data.store.packed_tokens import Packed, PackedRow

    if data is not None:
        packed = Packed(data)
        found = [packed[i % len(packed)] for i in range(count)]
        return [
            PackedRow(
                r.ids[:LENGTH] % VOCABULARY,
                r.learned[:LENGTH],
                r.positions[:LENGTH],
                r.segments[:LENGTH],
                r.origins[: int(r.segments[:LENGTH].max()) + 1],
            )
            for r in found
        ]
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        lengths = rng.integers(8, LENGTH // 3 + 1, rng.integers(1, 4))
        positions = np.concatenate([np.arange(n) for n in lengths])
        ids = np.minimum(rng.geometric(0.02, len(positions)), VOCABULARY - 1).astype(np.int64)
        rows.append(
            PackedRow(
                ids, positions > 0, positions, np.repeat(np.arange(len(lengths)), lengths), np.arange(len(lengths))
            )
        )
    return rows


def _network(shape: Shape | RecurrentShape) -> Any:
    if isinstance(shape, RecurrentShape):
        from llmworks.model.nn import recurrent

        return recurrent.RecurrentForCausalLM(recurrent.RecurrentConfig(shape=shape.model_dump()))
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM

    return DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))


def _tokenizer() -> Any:
    """Create a byte tokenizer with names for the other ids, so that any id can be decoded."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|end|>", *letters, *(f"<{i}>" for i in range(VOCABULARY - len(letters) - 1))]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
