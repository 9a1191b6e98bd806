"""Self-test of a fine-tuning config: does it train?

Runs `train.sft` several times, with the user's config, tokenizer, template and first rows on a shrunken model of the
same architecture.

Each check is for a silent failure seen in training frameworks: config keys that nothing reads, loss masks that include
the prompt, attention across packed rows, micro-batches weighed equally, a resume that is not exact, an adapter that
merges into something else.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Adapter, Dataset, Manifest, Model, compute_artifact_digest, hash_files
from llmworks.core.context import Context
from llmworks.core.errors import GoldenMismatch, LlmworksError, UserError
from llmworks.data.conversations.training_rows import read_training_rows
from llmworks.data.store.rows import Row
from llmworks.train.distill import distill
from llmworks.train.distributed.config import DataParallelConfig
from llmworks.train.finetune.run import check_golden
from llmworks.train.selftest.bench import SelftestBench, check_accumulation, check_resume, check_seed
from llmworks.train.selftest.check import (
    EXACT,
    RecordingConfig,
    SelftestCheck,
    check_fields_read,
    get_tolerance,
    run_checks,
    shrink_shape,
)
from llmworks.train.selftest.labels import compute_reference_loss, find_label_problem, get_answered_part
from llmworks.train.selftest.pretrain import STEPS
from llmworks.train.sft import SftConfig, sft

MEMORIZE_STEPS, MAX_LENGTH = 80, 512  # steps to memorize some rows; maximum tokens per row
WEIGHT_SCALE = 10.0  # scale of the initial weights


def reduce_config(config: SftConfig, max_length: int) -> SftConfig:
    """Shrink the config: micro-batches of at most 4 rows, one process; long rows are truncated.

    Truncation is fine here, since the rows are used for their loss masks.
    """
    evaluation_fields = {
        "eval_steps": 3 if config.eval_steps or config.metric_for_best_model else 0,
        "eval_samples": 4,
        "num_sample_prompts": 0,
        "num_general_prompts": 0,
        "save_steps": 2,
    }
    return config.model_copy(
        update={
            "num_train_epochs": 1.0,
            "batch_size": min(4, config.batch_size),
            "gradient_accumulation_steps": min(4, config.gradient_accumulation_steps),
            "parallel": DataParallelConfig(),
            "golden": "renew: a shrunken model",
            "early_stopping_patience": 0,
            "overlong": "truncate",
            "max_length": min(config.max_length, max_length),
            **evaluation_fields,
        }
    )


def selftest_sft(
    config: SftConfig, model: Path, data: Dataset, *, golden: Model | None = None, teacher: bool = False
) -> Iterator[SelftestCheck]:
    """Yield the result of every check.

    `golden`: the model with its golden tokens, if it has some; `teacher`: whether a distillation uses logits.

    Errors: UserError for an architecture that cannot be shrunken.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = _SftBench(Path(folder), model, config, data, teacher=teacher)
        near = get_tolerance(config.precision)
        tests: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
            ("every config field is read", functools.partial(_check_fields_read, bench, config)),
            ("loss mask covers assistant turns only", functools.partial(_check_labels, bench)),
            ("no attention across rows", functools.partial(_check_row_isolation, bench)),
            ("gradient accumulation is exact", functools.partial(_check_accumulation, bench, near)),
            ("runs are reproducible by seed", functools.partial(check_seed, bench)),
            ("resuming is exact, bit for bit", functools.partial(check_resume, bench)),
            ("golden tokens replay or may change", functools.partial(_check_golden_tokens, bench, config, golden)),
            ("a few rows can be memorized", functools.partial(_check_memorization, bench)),
            ("the saved model is the trained model", functools.partial(_check_saved, bench)),
        ]
        yield from run_checks(tests)


class _SftBench(SelftestBench):
    """A small model with the user's tokenizer, the first rows, and runs of `sft` on them, or of `distill`.

    The teacher of `distill` is another small model.
    """

    def __init__(self, folder: Path, model: Path, config: SftConfig, data: Dataset, *, teacher: bool = False) -> None:
        import torch

        from llmworks.model.io.decoder_files import save_decoder
        from llmworks.model.io.families import parse_shape
        from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
        from llmworks.tokenize.chat.named_templates import set_template
        from llmworks.tokenize.load import get_stop_ids, load_tokenizer, read_json, silence_transformers

        silence_transformers()
        self.folder = folder
        given = read_json(model / "config.json")
        try:
            _, shape = parse_shape(given)
        except LlmworksError as error:
            raise UserError(f"the self-test needs a known architecture: {error}") from None
        longest = min(MAX_LENGTH, shape.max_position_embeddings)
        small = shrink_shape(shape).model_copy(
            update={"vocab_size": shape.vocab_size, "max_position_embeddings": longest}
        )
        torch.manual_seed(0)
        network = DecoderForCausalLM(DecoderConfig(shape=small.model_dump()))
        # larger weights, so that tokens attend to one another as in a trained model and an adapter on frozen weights
        # has an effect
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(WEIGHT_SCALE if p.dim() > 1 else 1.0)
        self.model = folder / "model"
        ids: dict[str, Any] = {
            name: given[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in given
        }
        save_decoder(network, self.model, token_ids=ids)
        self.tokenizer = load_tokenizer(model)
        self.stops = get_stop_ids(model, self.tokenizer)
        self.tokenizer.save_pretrained(self.model)
        self.teacher: Model | None = None
        if teacher:  # same architecture, other random weights
            torch.manual_seed(1)
            save_decoder(DecoderForCausalLM(DecoderConfig(shape=small.model_dump())), folder / "teacher", token_ids=ids)
            self.tokenizer.save_pretrained(folder / "teacher")
            self.teacher = Model(folder / "teacher", about={"format": "hf"}, name="teacher")
        generation = model / "generation_config.json"
        if generation.exists():
            (self.model / generation.name).write_bytes(generation.read_bytes())
        set_template(self.tokenizer, config.chat_template, config.control_tokens)
        small_config = reduce_config(config, longest)
        self.rows = read_training_rows(data)[
            : small_config.batch_size * small_config.gradient_accumulation_steps * STEPS
        ]
        self._create_base()
        super().__init__(folder, small_config, self.write_rows("rows", self.rows), self._train)

    def _train(self, config: Any, data: Dataset, ctx: Context) -> object:
        if self.teacher is None:  # completions of a teacher are trained on like any other
            return sft(config, self.base, data, ctx, self.data)
        return distill(config, self.teacher, self.base, data, ctx, self.data)

    def _create_base(self) -> None:
        """Wrap the shrunken model as an artifact."""
        files = hash_files(self.model)
        self.base = Model(
            self.model,
            manifest=Manifest(
                kind="model",
                digest=compute_artifact_digest("model", "", files),
                key="",
                stage="",
                revision=0,
                derivation="declared",
                config={},
                parents=[],
                files=files,
                about={"format": "hf"},
            ),
            name="model",
        )

    def write_rows(self, name: str, rows: list[Row]) -> Dataset:
        """Write rows as a dataset."""
        import json

        from llmworks.data.store.rows import write_chat

        target = self.folder / name
        if "messages" in rows[0]:
            write_chat(target, rows)
            return Dataset(target, name=name)
        file = target.with_suffix(".jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Dataset(file, name=name)


def _check_fields_read(bench: _SftBench, config: SftConfig) -> tuple[bool, str]:
    read: set[str] = {"golden"}  # read only for a model with golden tokens; the shrunken one has none
    bench.run("keys", RecordingConfig(bench.config, read))
    return check_fields_read(config, type(config)(), read)


def _make_examples(bench: _SftBench) -> list[Any]:
    from llmworks.train.sft import make_examples

    return make_examples(bench.tokenizer, bench.rows, bench.config)[0]


def _check_labels(bench: _SftBench) -> tuple[bool, str]:
    """Compare ids and labels of every row, and the loss of a batch, with an independent statement of them."""
    from llmworks.train.finetune.examples import collate, collate_padding_free
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.losses import next_token_loss
    from llmworks.train.loop.packed_steps import packed_loss

    by_id = {row["id"]: row for row in bench.rows}
    examples = _make_examples(bench)
    whole = [example for example in examples if len(example.ids) < bench.config.max_length]
    last = bench.config.train_on == "last_assistant"
    for example in whole:
        row = get_answered_part(by_id[example.id.removesuffix(f"~{example.part}")], example.part)
        problem = find_label_problem(bench.tokenizer, bench.stops, row, example, last=last or example.part > 0)
        if problem:
            return False, problem
    tuned = open_trainable_model(bench.model)
    some = examples[:8]
    wanted, labels = compute_reference_loss(tuned.network, some)
    loss: Any = packed_loss if tuned.padding_free else next_token_loss
    batch = collate_padding_free(some) if tuned.padding_free else collate(some)
    found = float(loss(tuned.network, batch).detach())
    if batch.labels != labels or abs(found - wanted) > EXACT * abs(wanted):
        detail = f"the loss of {labels} labels is {wanted:.4f} nats, training computes {found:.4f} of {batch.labels}"
        return False, detail
    expected = sum(sum(example.mask[1:]) for example in examples)
    counted = sum(row["num_label_tokens"] for row in bench.baseline)
    return (
        expected == counted,
        f"{counted:,} labels in {len(bench.baseline)} steps, {expected:,} in the rows; compared ids, labels and end"
        f" tokens of {len(whole)} rows, and the loss of {len(some)}",
    )


def _check_row_isolation(bench: _SftBench) -> tuple[bool, str]:
    from llmworks.train.finetune.examples import collate_padding_free
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.packed_steps import packed_loss

    network = open_trainable_model(bench.model).network
    some = _make_examples(bench)[:8]
    together = float(packed_loss(network, collate_padding_free(some)).detach())
    separate = sum(float(packed_loss(network, collate_padding_free([example])).detach()) for example in some)
    return (
        abs(together - separate) <= EXACT * abs(separate),
        f"{len(some)} rows: {together:.4f} nats packed, {separate:.4f} separately",
    )


def _check_accumulation(bench: _SftBench, tolerance: float) -> tuple[bool, str]:
    if bench.config.lora.lora_dropout or bench.config.neftune_noise_alpha:
        return True, "not compared: dropout and noise are sampled per micro-batch"
    if bench.config.method in ("prompt_tuning", "prefix_tuning"):
        return (
            True,
            "not compared: rows of similar length are padded together, so batches depend on the batch size",
        )
    return check_accumulation(bench, "batch_size", tolerance)


def _check_golden_tokens(bench: _SftBench, config: SftConfig, model: Model | None) -> tuple[bool, str]:
    if model is None or model.golden is None:
        return True, "it has no golden tokens"
    try:
        check_golden(config, model, bench.tokenizer, bench.stops)
    except GoldenMismatch as error:
        return False, str(error)
    return True, "they replay" if config.golden == "keep" else config.golden


def _check_memorization(bench: _SftBench) -> tuple[bool, str]:
    config = bench.config
    rate = (0.003 if config.method == "full" else 0.03) / (5 if config.optimizer.name == "lion" else 1)
    optimizer = config.optimizer.model_copy(
        update={"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0}
    )
    few = bench.write_rows("few", bench.rows[:2])
    more = {
        "num_train_epochs": float(MEMORIZE_STEPS),
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": optimizer,
        "neftune_noise_alpha": 0.0,
        "metric_for_best_model": "",
        "eval_steps": 0,
        "save_steps": MEMORIZE_STEPS + 1,
    }
    losses = [row["loss"] for row in bench.run("heart", config.model_copy(update=more), data=few)]
    return (
        losses[-1] < 0.8 * losses[0],
        f"the loss of 2 rows went from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps",
    )


def _check_saved(bench: _SftBench) -> tuple[bool, str]:
    """Compare logits of the saved artifact in an engine with those of the trained weights.

    For an adapter: of the merged model and of the unmerged adapter.
    """
    import torch

    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.model.lora import adapter_io as files
    from llmworks.train.finetune.run import prepare_trainable
    from llmworks.train.finetune.trainable import open_trainable_model

    out = bench.runs.get("heart") or bench.runs["usual"]
    ids = torch.tensor([list(_make_examples(bench)[0].ids[:32])])
    with torch.no_grad():
        if bench.config.method == "full":
            from llmworks.model.io.decoder_files import load_decoder
            from llmworks.model.io.load import load_model

            one, other = load_model(out)(input_ids=ids).logits, load_decoder(out)(input_ids=ids).logits
            what = "in transformers and here"
        elif bench.config.method in ("prompt_tuning", "prefix_tuning"):
            from peft import PeftModel

            from llmworks.model.io.load import load_model

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers renamed
                theirs = PeftModel.from_pretrained(load_model(bench.model), out).eval()
            one = theirs(input_ids=ids).logits[:, -ids.shape[1] :]
            other = TorchEngine.open(bench.model, adapter=Adapter(out).path).model(input_ids=ids).logits
            what = "in peft and in the engine"
        else:
            tuned = open_trainable_model(bench.model)
            prepare_trainable(tuned, bench.config)
            tuned.network.eval()
            files.load_adapter_state(tuned.network, files.read_adapter(out)[1], tuned.rename)
            one, other = (
                tuned.network(input_ids=ids).logits,
                TorchEngine.open(bench.model, adapter=Adapter(out).path).model(input_ids=ids).logits,
            )
            what = "unmerged and merged"
        gap = float((one - other).abs().max() / one.abs().max().clamp(min=1e-6))
    return gap < 1e-3, f"logits {what} differ by {gap:.1e} relative to the largest"
