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
from llmworks.train.distributed.config import ParallelConfig
from llmworks.train.pretrain import PretrainConfig, pretrain
from llmworks.train.selftest.bench import SelftestBench, check_accumulation, check_resume, check_seed
from llmworks.train.selftest.check import (
    EXACT,
    LENGTH,
    LOOSE,
    VOCABULARY,
    RecordingConfig,
    SelftestCheck,
    check_fields_read,
    get_tolerance,
    run_checks,
    shrink_shape,
)

STEPS, MEMORIZE_STEPS = 6, 60


def reduce_config(config: PretrainConfig) -> PretrainConfig:
    """Shrink the config: batch size and gradient accumulation of at most 4, one process, no torch.compile."""
    accumulation, batch = min(4, config.gradient_accumulation_steps), min(4, config.batch_size)
    evaluation_fields = {
        "eval_steps": 3,
        "eval_samples": 4,
        "sample_max_tokens": min(4, config.sample_max_tokens),
        "save_steps": 2,
    }
    return config.model_copy(
        update={
            "num_train_epochs": 1.0,
            "num_train_tokens": 0,
            "batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "parallel": ParallelConfig(),
            "torch_compile": False,
            **evaluation_fields,
        }
    )


def selftest_pretrain(
    config: PretrainConfig, shape: Shape | RecurrentShape, data: Dataset | None = None
) -> Iterator[SelftestCheck]:
    """Yield the result of every check. `data`: packed tokens whose first rows are used; else random rows."""
    small = reduce_config(config)
    with tempfile.TemporaryDirectory() as folder:
        bench = _PretrainBench(Path(folder), shrink_shape(shape), small, data)
        near = get_tolerance(config.precision)
        tests: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
            ("every config field is read", functools.partial(_check_fields_read, bench, config)),
            ("labels match the rows", functools.partial(_check_labels, bench)),
            ("no attention across documents of a row", functools.partial(_check_document_isolation, bench)),
            ("gradient accumulation is exact", functools.partial(_check_accumulation, bench, near)),
            ("runs are reproducible by seed", functools.partial(check_seed, bench)),
            ("resuming is exact, bit for bit", functools.partial(check_resume, bench)),
            ("the rows of one step can be memorized", functools.partial(_check_memorization, bench)),
        ]
        yield from run_checks(tests)


class _PretrainBench(SelftestBench):
    """A small model with a byte tokenizer, few rows, and runs of `pretrain` on them."""

    def __init__(
        self, folder: Path, shape: Shape | RecurrentShape, config: PretrainConfig, data: Dataset | None
    ) -> None:
        import torch

        from llmworks.tokenize.load import silence_transformers

        silence_transformers()
        self.folder, self.shape = folder, shape
        self.rows = _take_rows(data, config.batch_size * config.gradient_accumulation_steps * STEPS)
        self.model = folder / "model"
        torch.manual_seed(0)
        _create_model(shape).save_pretrained(self.model)
        _create_tokenizer().save_pretrained(self.model)
        super().__init__(folder, config, self.write_packed("rows", self.rows), self._pretrain)

    def _pretrain(self, config: Any, data: Dataset, ctx: Context) -> Model:
        return pretrain(config, Model(self.model, about={"format": "hf"}), data, ctx, self.data)

    def write_packed(self, name: str, rows: Sequence[Any]) -> Dataset:
        """Write rows as a dataset of packed tokens."""
        import numpy as np
        from safetensors.numpy import save_file

        pieces = [0]
        for row in rows:
            begin = pieces[-1]
            pieces += [begin + int(edge) for edge in (*(np.flatnonzero(np.diff(row.segment_ids)) + 1), len(row.ids))]
        tensors: dict[str, Any] = {
            "tokens": np.concatenate([row.ids for row in rows]).astype(np.uint16),
            "rows": np.cumsum([0, *(len(row.ids) for row in rows)]).astype(np.int64),
            "pieces": np.array(pieces, np.int64),
            "origins": np.arange(len(pieces) - 1, dtype=np.int64),
            "learned": np.concatenate([row.loss_mask for row in rows]).astype(np.uint8),
        }
        target = self.folder / name
        target.mkdir()
        save_file(tensors, target / "shard-00000.safetensors")
        return Dataset(target, about={"schema": "tokens", "length": LENGTH})


def _check_fields_read(bench: _PretrainBench, config: PretrainConfig) -> tuple[bool, str]:
    read: set[str] = set()
    bench.run("keys", RecordingConfig(bench.config, read))
    return check_fields_read(config, PretrainConfig(), read)


def _check_labels(bench: _PretrainBench) -> tuple[bool, str]:
    each = bench.config.batch_size * bench.config.gradient_accumulation_steps
    wanted = sum(int(row.loss_mask[1:].sum()) for row in bench.rows[: len(bench.rows) // each * each])
    found = sum(row["num_label_tokens"] for row in bench.baseline)
    return (
        found == wanted and len(bench.baseline) == STEPS,
        f"{found:,} labels in {len(bench.baseline)} steps, {wanted:,} in the rows",
    )


def _check_document_isolation(bench: _PretrainBench) -> tuple[bool, str]:
    import torch

    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.model.io.load import load_trainable
    from llmworks.train.loop.packed_steps import PackedSteps, packed_loss

    model = load_trainable(bench.model).eval()
    batch = PackedSteps(
        PackedDataset(bench.data), 1, batch_size=min(8, len(bench.rows)), num_micro_batches=1, length=LENGTH, seed=0
    )[0][0]()
    together, separate, documents = float(packed_loss(model, batch).detach()), 0.0, 0
    for ids, segments, labels in zip(batch.ids, batch.segments, batch.label_ids, strict=True):
        for text in range(int(segments.max()) + 1):
            own, learned = ids[segments == text][None], labels[segments == text][None].clone()
            learned[:, 0] = -100
            documents += 1
            if int((learned != -100).sum()):
                separate += float(model(input_ids=own, labels=learned).loss.detach()) * int((learned != -100).sum())
    more = torch.tensor(separate)
    return (
        abs(together - separate) <= EXACT * float(more.abs()),
        f"{documents} documents in {len(batch.ids)} rows: {together:.4f} nats packed, {separate:.4f} separately",
    )


def _check_accumulation(bench: _PretrainBench, tolerance: float) -> tuple[bool, str]:
    if getattr(bench.shape, "dropout", 0):
        return True, "not compared: dropout is sampled per micro-batch"
    if getattr(bench.shape, "experts", None):
        tolerance = max(tolerance, LOOSE)  # the load-balancing loss is computed per micro-batch
    return check_accumulation(bench, "batch_size", tolerance)


def _check_memorization(bench: _PretrainBench) -> tuple[bool, str]:
    config, each = bench.config, bench.config.batch_size * bench.config.gradient_accumulation_steps
    rate = {"lion": 0.002}.get(config.optimizer.name, 0.01)
    optimizer = config.optimizer.model_copy(
        update={"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0}
    )
    few = bench.write_packed("few", bench.rows[:each])
    more = {
        "num_train_epochs": float(MEMORIZE_STEPS),
        "optimizer": optimizer,
        "loss_spike_threshold": 0.0,
        "ema_decay": 0.0,
        "eval_steps": MEMORIZE_STEPS + 1,
        "save_steps": MEMORIZE_STEPS + 1,
        "sample_max_tokens": 0,
    }
    losses = [row["loss"] for row in bench.run("heart", config.model_copy(update=more), data=few)]
    return (
        losses[-1] < 0.6 * losses[0],
        f"the loss of {each} rows went from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps",
    )


def _take_rows(data: Dataset | None, count: int) -> list[Any]:
    """Return the first rows, cut to LENGTH, with ids modulo VOCABULARY; or random rows of one to three documents."""
    import numpy as np

    from llmworks.data.store.packed_tokens import PackedDataset, PackedRow

    if data is not None:
        packed = PackedDataset(data)
        found = [packed[i % len(packed)] for i in range(count)]
        return [
            PackedRow(
                r.ids[:LENGTH] % VOCABULARY,
                r.loss_mask[:LENGTH],
                r.position_ids[:LENGTH],
                r.segment_ids[:LENGTH],
                r.origins[: int(r.segment_ids[:LENGTH].max()) + 1],
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


def _create_model(shape: Shape | RecurrentShape) -> Any:
    if isinstance(shape, RecurrentShape):
        from llmworks.model.nn import recurrent

        return recurrent.RecurrentForCausalLM(recurrent.RecurrentModelConfig(shape=shape.model_dump()))
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM

    return DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))


def _create_tokenizer() -> Any:
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
