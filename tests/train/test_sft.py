"""Fine-tuning: TRL's loss and gradients, invariants of batches, what is learned of a row, the kinds of result, and what
is refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tests.conftest import TEMPLATE

from llmworks.core.artifact import Adapter, Artifact, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, GoldenMismatch, LlmworksError, ModelError, TrainingError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Engine, Request, Sampling
from llmworks.data.conversations.training_rows import read_training_rows
from llmworks.data.store.rows import write_chat
from llmworks.generate.engines.torch import TorchEngine
from llmworks.merge.adapter import MergeAdapterConfig
from llmworks.merge.adapter import adapter as merged
from llmworks.model.golden import require_golden
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.load import load_adaptable, load_model
from llmworks.model.lora import adapter_io as adapter
from llmworks.model.lora import lora
from llmworks.model.lora.merge_adapter import make_weight_lookup, merge_adapter_into
from llmworks.runtime.session import load
from llmworks.tokenize.load import load_tokenizer
from llmworks.train.distributed.sharding import resolve_precision
from llmworks.train.finetune.examples import Example, ExampleSteps, collate, collate_padding_free, make_example
from llmworks.train.finetune.trainable import TrainableModel
from llmworks.train.loop.losses import NeftuneNoise, iter_label_logits, next_token_loss
from llmworks.train.loop.packed_steps import packed_loss
from llmworks.train.sft import SftConfig, sft

EXAMPLES = [
    Example(
        tuple(3 + (i * 7 + j * 3) % 300 for j in range(4 + 9 * i)),
        tuple(int(j >= 2 + i) for j in range(4 + 9 * i)),
        f"r{i}",
    )
    for i in range(12)
]
WORDS = ["the", "quick", "brown", "fox", "user", "weather", "Oslo", "what", "is", "name", "city"]


def rows_of(count: int, turns: int = 1) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        messages = [
            {"role": role, "content": " ".join(WORDS[(i * 3 + j * k + t) % 11] for j in range(2 + (i + t) % 5))}
            for t in range(turns)
            for k, role in ((1, "user"), (2, "assistant"))
        ]
        made.append({"id": f"r{i}", "group": "", "messages": messages, "tools": [], "answer": None})
    return made


def chats(place: Path, count: int = 24, turns: int = 1) -> Dataset:
    write_chat(place, rows_of(count, turns))
    return Dataset(place, name=place.name)


Run = Callable[..., tuple[Adapter | Model, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, pico: Path) -> Run:
    """Train the pico model; returns the artifact and the report's data."""

    def go(
        name: str,
        data: Dataset | None = None,
        held_out: Dataset | None = None,
        *,
        stop: int | None = None,
        seed: int = 0,
        model: Path | None = None,
        **config: Any,
    ) -> tuple[Adapter | Model, dict[str, Any]]:
        out, scratch = tmp_path / f"{name}-out", tmp_path / f"{name}-scratch"
        for place in (out, scratch):
            place.mkdir(exist_ok=True)

        def listener(row: dict[str, Any]) -> None:
            if stop is not None and row.get("step") == stop:
                raise KeyboardInterrupt

        def engine(artifact: Artifact) -> Engine:
            raise LlmworksError("none is needed")

        page = ReportBuilder()
        base = load(str(model or pico))
        assert isinstance(base, Model)
        data = data or (
            Dataset(tmp_path / "chats", name="chats") if (tmp_path / "chats").exists() else chats(tmp_path / "chats")
        )
        settings = {"num_train_epochs": 2, "batch_size": 4, "num_sample_prompts": 0, "save_steps": 3, **config}
        made = sft(
            SftConfig.model_validate(settings),
            base,
            data,
            Context(
                out, scratch, seed, Progress(scratch / "metrics.jsonl", quiet=True, listener=listener), page, engine
            ),
            held_out,
        )
        return made, page.data | {
            "blocks": [b.heading for b in page.blocks],
            "rows": Progress(scratch / "metrics.jsonl", quiet=True).read_metrics(),
        }

    return go


def tensors(made: Artifact) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    file = made.path / "adapter_model.safetensors"
    return load_file(file if file.exists() else made.path / "model.safetensors")

    # batches


def test_joined_rows_are_rows_apart(pico: Path) -> None:
    """Loss and every gradient: one row without padding = each example by itself = transformers, padded."""
    decoder, theirs = load_decoder(pico), load_model(pico)
    assert float(packed_loss(decoder, collate_padding_free(EXAMPLES)).detach()) == pytest.approx(
        sum(float(packed_loss(decoder, collate_padding_free([e])).detach()) for e in EXAMPLES), rel=1e-5
    )
    packed_loss(decoder, collate_padding_free(EXAMPLES)).backward()
    next_token_loss(theirs, collate(EXAMPLES)).backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, p in decoder.named_parameters():
        if "blocks.1.attention.query" in name or "blocks.0.feed_forward.up" in name:
            there = theirs_by_name[
                name.replace("decoder.blocks", "model.layers")
                .replace("attention.query", "self_attn.q_proj")
                .replace("feed_forward.up", "mlp.up_proj")
            ].grad
            assert p.grad is not None
            assert there is not None
            assert float((p.grad - there).norm() / there.norm()) < 1e-5, name


def test_joined_rows_need_no_mask(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window that is longer than every text, without one, and through torch's own attention, as on a GPU: the
    same.
    """
    from llmworks.model.nn import attention
    from llmworks.model.nn.attention import build_attention_mask

    decoder, batch = load_decoder(pico), collate_padding_free(EXAMPLES)
    with torch.no_grad():
        wanted = float(packed_loss(decoder, batch))
        look = build_attention_mask(
            torch.arange(batch.ids.shape[1])[None],
            torch.arange(batch.ids.shape[1])[None],
            segments=(batch.segments, batch.segments),
        )
        assert look.mask is None
        assert [end - first for first, end in look.segment_bounds] == [len(e.ids) for e in EXAMPLES]
        assert all(end - first <= 64 for first, end, _ in look.query_blocks or ())
        monkeypatch.setattr(attention, "split_segment_blocks", lambda *_: None)
        assert float(packed_loss(decoder, batch)) == pytest.approx(wanted, rel=1e-5)
        short = build_attention_mask(
            torch.arange(9)[None], torch.arange(9)[None], segments=(torch.tensor([[0] * 6 + [1] * 3]),) * 2, window=5
        )
        assert short.mask is not None  # a window that hides something needs one
        back = build_attention_mask(
            torch.arange(4)[None], torch.arange(4)[None], segments=(torch.tensor([[0, 1, 0, 1]]),) * 2
        )
        assert back.mask is not None  # and so do texts that are not in one piece


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_trl_s(pico: Path, tmp_path: Path) -> None:
    """The same conversations through TRL's SFTTrainer, completions only, padded: the loss of a batch, and the gradient
    of every adapter.
    """
    from datasets import Dataset as Rows
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(pico)
    tokenizer.chat_template = TEMPLATE.replace(
        "'<|im_end|>' + '\n'", "'<|im_end|>'"
    )  # TRL learns what a template writes after an answer's end, too
    rows = rows_of(8)
    prompts = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_length=None,
        completion_only_loss=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
    )
    trainer = SFTTrainer(
        model=load_model(pico),
        args=arguments,
        train_dataset=Rows.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    (batch,) = list(trainer.get_train_dataloader())
    theirs = trainer.compute_loss(trainer.model.train(), batch)
    theirs.backward()
    named = dict(trainer.model.named_parameters())
    decoder, rename = load_adaptable(pico)
    lora.attach_lora(decoder, "all-linear", lora.LoraSettings(4, 8.0), rename)
    with torch.no_grad():
        for name, layer in lora.iter_lora_layers(decoder):
            layer.a.copy_(named[f"base_model.model.{rename(name)}.lora_A.default.weight"])
    made = collate_padding_free(
        [e for e in (make_example(tokenizer, row, 500) for row in rows) if isinstance(e, Example)]
    )
    ours = packed_loss(decoder, made) / made.labels
    ours.backward()
    assert made.labels == int((batch["labels"][:, 1:] != -100).sum())
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, layer in lora.iter_lora_layers(decoder):
        there = named[f"base_model.model.{rename(name)}.lora_B.default.weight"].grad
        assert layer.b.grad is not None
        assert there is not None
        assert float((layer.b.grad - there).norm() / there.norm()) < 1e-4, name


def test_steps_hold_every_row_once_an_epoch_whatever_the_parts() -> None:
    """Without padding a step's rows do not depend on how it is divided: into parts, or among processes."""
    whole = ExampleSteps(EXAMPLES, epochs=2, batch_size=4, gradient_accumulation_steps=1, seed=5, padding_free=True)
    parts = ExampleSteps(EXAMPLES, epochs=2, batch_size=2, gradient_accumulation_steps=2, seed=5, padding_free=True)
    assert whole.steps == parts.steps
    assert sorted(i for step in whole.steps[:3] for i in step) == list(range(12))
    assert whole.steps[:3] != whole.steps[3:]
    shares = [
        ExampleSteps(
            EXAMPLES, epochs=2, batch_size=2, gradient_accumulation_steps=2, seed=5, padding_free=True, shard=(at, 2)
        )
        for at in range(2)
    ]
    with pytest.raises(UserError, match="cannot be divided among 13 processes"):
        ExampleSteps(
            EXAMPLES, epochs=1, batch_size=16, gradient_accumulation_steps=1, seed=0, padding_free=True, shard=(0, 13)
        )
    uneven = [
        ExampleSteps(
            EXAMPLES[:7],
            epochs=1,
            batch_size=1,
            gradient_accumulation_steps=4,
            seed=0,
            padding_free=True,
            shard=(at, 2),
            micro_batch_size=1,
        )
        for at in range(2)
    ]
    assert (
        [len(step) for step in uneven[0]] == [len(step) for step in uneven[1]] == [2, 1]
    )  # as many parts in each process
    for step in range(len(parts)):
        assert torch.equal(
            torch.cat([make().ids[0] for share in shares for make in share[step]]),
            torch.cat([make().ids[0] for make in parts[step]]),
        )


def test_noise_is_that_of_the_paper(pico: Path) -> None:
    """Uniform, up to alpha / sqrt(L d), L the length of a token's own text; none while it is not trained; the gradient
    goes through.
    """
    decoder, batch = load_decoder(pico).train(), collate_padding_free(EXAMPLES)
    noise = NeftuneNoise(decoder, 5.0)
    noise.wrap_loss(packed_loss)(decoder, batch)
    table = decoder.get_input_embeddings()
    torch.manual_seed(0)
    off = (table(batch.ids) - torch.nn.functional.embedding(batch.ids, table.weight)).detach()[0]
    for number, example in enumerate(EXAMPLES):
        here, most = off[batch.segments[0] == number], 5 / (len(example.ids) * 64) ** 0.5
        assert most * 0.9 < float(here.abs().max()) <= most
        assert abs(float(here.mean())) < most / 5
    decoder.train(False)
    assert torch.equal(table(batch.ids), torch.nn.functional.embedding(batch.ids, table.weight))

    # what is learned


def test_what_is_learned_of_a_conversation(pico: Path) -> None:
    tokenizer = load_tokenizer(pico)
    row = rows_of(1, turns=3)[0]

    def learned(**options: Any) -> str:
        made = make_example(tokenizer, row, 500, **options)
        assert isinstance(made, Example)
        return tokenizer.decode([i for i, m in zip(made.ids, made.mask, strict=True) if m])

    said = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
    assert learned() == "".join(said)
    assert learned(last=True) == said[-1]
    whole = make_example(tokenizer, row, 500)
    assert isinstance(whole, Example)
    assert make_example(tokenizer, row, 20) == f"{len(whole.ids)} tokens, longer than max_length 20"
    cut = make_example(tokenizer, row, 20, truncate=True)
    assert isinstance(cut, Example)
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert len(cut.ids) <= 20


def test_texts_and_completions_are_learned_as_they_are(pico: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pico)
    text, completion = (
        make_example(tokenizer, {"id": "1", "text": "the fox"}, 99),
        make_example(tokenizer, {"id": "1", "prompt": "the fox", "completion": " is quick"}, 99),
    )
    assert isinstance(text, Example)
    assert isinstance(completion, Example)
    assert tokenizer.decode(text.ids) == "the fox<|im_end|>"
    assert all(text.mask)
    assert tokenizer.decode(completion.ids) == "the fox is quick<|im_end|>"
    assert (
        tokenizer.decode([i for i, m in zip(completion.ids, completion.mask, strict=True) if m])
        == " is quick<|im_end|>"
    )
    file = tmp_path / "rows.jsonl"
    for rows, message in (
        ([{"text": 3}], "has no text field 'text'"),
        ([{"prompt": "a"}], "has no text field 'completion'"),
        ([{"messages": []}], "data.chat"),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=message):
            read_training_rows(Dataset(file, name="rows"))
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert read_training_rows(Dataset(file, name="rows")) == [{"id": "1", "prompt": "a", "completion": "b"}]

    # runs


def test_an_adapter_of_the_decoder_loads_in_peft(run: Run, pico: Path) -> None:
    """Trained on our decoder, it changes transformers' model as it does ours, and its merge replays its golden
    tokens.
    """
    from peft import PeftModel

    made, data = run(
        "a", lora={"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}, optimizer={"learning_rate": 0.01}
    )
    assert data["rows"][-1]["loss"] < data["rows"][0]["loss"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(load_model(pico), made.path)
    ids = torch.tensor([[1, 5, 9, 200, 17, 3]])
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        found = TorchEngine.open(pico, adapter=made.path).model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "stabilised": {"lora": {"use_rslora": True}},
    "magnitudes": {"lora": {"use_dora": True}},
    "faster": {"lora": {"loraplus_lr_ratio": 8}},
    "nf4": {"lora": {"load_in_4bit": True}},
    "noise": {"neftune_noise_alpha": 5},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "full": {"method": "full"},
    "some": {"method": "full", "freeze": ["model.embed_tokens.*", "model.layers.0.*"]},
    "recompute": {"gradient_checkpointing": True},
    "last": {"train_on": "last_assistant"},
    "bf16": {"precision": "bf16"},
    "prompt": {
        "method": "prompt_tuning",
        "num_train_epochs": 10,
        "soft_prompt": {"num_virtual_tokens": 8, "prompt_tuning_init_text": "the quick brown fox"},
    },
    "prefix": {"method": "prefix_tuning", "num_train_epochs": 6},
}


OFTEN = ("lora", "magnitudes", "nf4", "full", "noise", "prompt")


@pytest.mark.parametrize(
    "what", [what if what in OFTEN else pytest.param(what, marks=pytest.mark.slow) for what in VARIANTS]
)
def test_every_variant_learns_resumes_and_replays(what: str, run: Run, tmp_path: Path) -> None:
    """The loss falls; the seed gives the same bytes; a run that was interrupted in the middle of an epoch ends as the
    one that was not.
    """
    config = {"optimizer": {"learning_rate": 0.05 if what in ("prompt", "prefix") else 0.005}, **VARIANTS[what]}
    made, data = run("whole", **config)
    assert data["rows"][-1]["loss"] < data["rows"][0]["loss"]
    assert made.metrics["trainable_parameters"] > 0
    with pytest.raises(KeyboardInterrupt):
        run("broken", stop=7, **config)
    again, more = run("broken", **config)
    assert [r["loss"] for r in more["rows"]] == [r["loss"] for r in data["rows"]]
    first, second = tensors(made), tensors(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = run("other", seed=1, **config)
    assert any(not torch.equal(first[name], tensors(other)[name]) for name in first)


def test_accumulation_is_the_batch(run: Run) -> None:
    whole, one = run("whole", batch_size=8, lora={"r": 4})
    parts, other = run("parts", batch_size=2, gradient_accumulation_steps=4, lora={"r": 4})
    assert [r["num_label_tokens"] for r in one["rows"]] == [r["num_label_tokens"] for r in other["rows"]]
    for a, b in zip(one["rows"], other["rows"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    assert all(torch.allclose(a, tensors(parts)[name], atol=5e-4) for name, a in tensors(whole).items())


def test_all_weights_make_a_model(run: Run, pico: Path) -> None:
    """A directory in the form of its base, which loads in transformers; frozen weights are its base's, to the bit;
    learning rate by the method.
    """
    made, _ = run("a", method="full", freeze=["model.embed_tokens.*", "model.layers.0.*"])
    assert isinstance(made, Model)
    assert SftConfig.model_validate({"method": "full"}).optimizer.learning_rate == 5e-5
    assert (
        SftConfig.model_validate({"method": "full", "optimizer": {"learning_rate": 1e-3}}).optimizer.learning_rate
        == 1e-3
    )
    before, after = dict(load_model(pico).named_parameters()), dict(load_model(made.path).named_parameters())
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("model.embed_tokens", "model.layers.0."))}
    assert json.loads((made.path / "config.json").read_text()) == json.loads((pico / "config.json").read_text())
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.allclose(
            load_model(made.path)(input_ids=ids).logits, load_decoder(made.path)(input_ids=ids).logits, atol=1e-4
        )


def test_an_adapter_beside_four_bits_is_merged_into_what_they_say(run: Run, tmp_path: Path, pico: Path) -> None:
    made, _ = run("a", lora={"load_in_4bit": True, "r": 4}, optimizer={"learning_rate": 0.01})
    base = load(str(pico))
    assert isinstance(base, Model)
    assert made.golden is not None
    (tmp_path / "m").mkdir()

    def engine(artifact: Artifact) -> Engine:
        raise LlmworksError("none is needed")

    assert isinstance(made, Adapter)
    whole = merged(
        MergeAdapterConfig(),
        Adapter(made.path, golden=made.golden, about=made.about),
        base,
        Context(tmp_path / "m", tmp_path, 0, Progress(quiet=True), ReportBuilder(), engine),
    )
    assert 0.02 < whole.metrics["base_relative_error"] < 0.15
    assert whole.metrics["golden_gap_mean"] < 1e-4


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.filterwarnings("ignore")
def test_a_soft_prompt_is_peft_s(kind: str, run: Run, pico: Path, tmp_path: Path) -> None:
    """What was trained loads in peft, and in the engine it gives peft's logits, peft's greedy answers, and scores by
    the tree that are those of whole texts; it cannot be folded.
    """
    from peft import PeftModel

    made, _ = run("a", method=kind, soft_prompt={"num_virtual_tokens": 6}, num_train_epochs=4)
    theirs = PeftModel.from_pretrained(load_model(pico), made.path).eval()
    engine = TorchEngine.open(pico, adapter=made.path)
    ids = torch.tensor([[1, 5, 9, 200, 17, 3]])
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -6:]
    assert torch.allclose(torch.from_numpy(engine.logits(ids[0].tolist())), wanted, atol=1e-4)
    assert not torch.allclose(wanted, load_model(pico)(input_ids=ids).logits[0], atol=1e-2)
    prompts = [(1, 5, 9, 200, 17, 3), (1, 40, 41), tuple(range(3, 30))]
    answers = engine.generate([Request(ids=prompt, sampling=Sampling(max_tokens=12)) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        there = theirs.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=2,
        )
        said = [i for i in there[0].tolist()[-12:] if i != 2] if there.shape[1] > 12 else there[0].tolist()
        assert (
            list(answer.ids)
            == (there[0].tolist()[len(prompt) :] if there.shape[1] > len(prompt) else said)[: len(answer.ids)]
        )
    texts = [[1, 5, 9, 200, 17, 3], [1, 5, 9, 41, 42], [1, 5, 9, 41, 50, 51], [7, 8]]
    for text, found in zip(texts, engine.score(texts), strict=True):
        chances = torch.from_numpy(engine.logits(text[:-1])).log_softmax(-1)
        assert found.logprobs == pytest.approx([float(chances[i, token]) for i, token in enumerate(text[1:])], abs=1e-4)
    with pytest.raises(ModelError, match="is a soft prompt"):
        merge_adapter_into(make_weight_lookup(load_model(pico)), made.path)
    assert engine.context == 506
    for change, message in (
        ({"prompt_embeddings": torch.zeros(6, 12)}, "belongs to another model"),
        ({"other": torch.zeros(1)}, "cannot be read"),
    ):
        save_file(change, made.path / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=message):
            TorchEngine.open(pico, adapter=made.path)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_weights_in_fewer_bits_stay_in_them(kind: str, run: Run, pico: Path, tmp_path: Path) -> None:
    """Of a base in bf16 all weights come back in bf16, with golden tokens of what was written; an adapter is merged,
    and the rounding of its sum is allowed for, not more.
    """
    load_model(pico, kind).save_pretrained(tmp_path / "half")
    load_tokenizer(pico).save_pretrained(tmp_path / "half")
    whole, _ = run("whole", model=tmp_path / "half", method="full")
    assert {t.dtype for t in tensors(whole).values()} == {getattr(torch, kind)}
    assert whole.golden is not None
    gap = require_golden(whole.golden, whole.path, mean_within=1e-4, step="again")
    assert gap is not None
    made, _ = run("adapter", model=tmp_path / "half", optimizer={"learning_rate": 0.01})
    base = load(str(tmp_path / "half"))
    assert isinstance(base, Model)
    (tmp_path / "m").mkdir()

    def engine(artifact: Artifact) -> Engine:
        raise LlmworksError("none is needed")

    place = Context(tmp_path / "m", tmp_path, 0, Progress(quiet=True), ReportBuilder(), engine)
    adapted = Adapter(made.path, golden=made.golden, about=made.about)
    done = merged(MergeAdapterConfig(), adapted, base, place)
    assert 1e-4 < done.metrics["golden_gap_mean"] < {"bfloat16": 0.15, "float16": 0.02}[kind]
    with pytest.raises(GoldenMismatch):
        merged(MergeAdapterConfig(logits_atol=1e-5), adapted, base, place)


def test_the_best_look_is_kept_and_patience_ends_the_training(run: Run, tmp_path: Path, pico: Path) -> None:
    """At a rate that is far too high the held-out loss rises after a while: the weights of the best look are what is
    left, and looks are counted.
    """
    unseen = chats(tmp_path / "unseen", 40)
    made, data = run(
        "a",
        None,
        unseen,
        num_train_epochs=12,
        eval_steps=4,
        metric_for_best_model="eval_loss",
        early_stopping_patience=2,
        optimizer={"learning_rate": 0.05, "lr_scheduler_type": "constant"},
    )
    looks = [r for r in data["rows"] if "eval_loss" in r]
    best = min(looks, key=lambda r: r["eval_loss"])
    assert made.metrics["best_step"] == best["step"] + 1
    if len(looks) < 18:
        assert [r["eval_loss"] < best["eval_loss"] for r in looks[-2:]] == [False, False]
    network, rename = load_adaptable(pico)
    torch.manual_seed(0)
    lora.attach_lora(network, "all-linear", lora.LoraSettings(16, 32.0), rename)
    adapter.load_adapter_state(network, tensors(made), rename)
    tokenizer = load_tokenizer(pico)
    examples = [e for e in (make_example(tokenizer, row, 2048) for row in rows_of(40)) if isinstance(e, Example)]
    with torch.no_grad():
        total = float(packed_loss(network, collate_padding_free(examples)))
        right = sum(
            int((logits.argmax(-1) == labels).sum())
            for logits, labels in iter_label_logits(network, collate_padding_free(examples))
        )
    count = sum(e.labels for e in examples)
    assert total / count == pytest.approx(best["eval_loss"], rel=1e-3)
    assert right / count == pytest.approx(best["accuracy"], abs=1e-3)


def test_looks_of_a_resumed_run_are_those_of_the_whole(run: Run, tmp_path: Path) -> None:
    unseen = chats(tmp_path / "unseen", 10)
    config = {
        "num_train_epochs": 4,
        "eval_steps": 2,
        "metric_for_best_model": "accuracy",
        "optimizer": {"learning_rate": 0.02},
    }
    made, data = run("whole", None, unseen, **config)
    with pytest.raises(KeyboardInterrupt):
        run("broken", None, unseen, stop=13, **config)
    again, more = run("broken", None, unseen, **config)
    assert [(r["step"], r.get("accuracy")) for r in data["rows"]] == [
        (r["step"], r.get("accuracy")) for r in more["rows"]
    ]
    assert made.metrics["best_step"] == again.metrics["best_step"]
    assert all(torch.equal(a, tensors(again)[name]) for name, a in tensors(made).items())


def test_questions_are_answered_before_and_after(run: Run, tmp_path: Path) -> None:
    unseen = chats(tmp_path / "unseen", 4)
    made, data = run("a", None, unseen, num_sample_prompts=2, num_train_epochs=10, optimizer={"learning_rate": 0.02})
    assert "Held-out prompts: completions before and after training" in data["blocks"]
    assert made.metrics["eval_loss"] > 0
    still, idle = run("b", None, unseen, num_sample_prompts=2, num_train_epochs=0.2, optimizer={"learning_rate": 1e-9})
    assert idle["warnings"][0].startswith("nothing changed")
    assert still.metrics["warnings"] >= 1
    assert idle["blocks"][0] == "Warnings"

    # what is refused


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a target that is not there": ({"lora": {"target_modules": ["w1"]}}, ModelError, "no linear layer named 'w1'"),
    "a freeze that fits nothing": (
        {"method": "full", "freeze": ["model.layer.0.*"]},
        ModelError,
        r"no weight of the model matches 'model\.layer\.0\.\*'; names are such as model\.",
    ),
    "a freeze of all": ({"method": "full", "freeze": ["*"]}, ModelError, "all weights are frozen"),
    "rows that are too long": (
        {"max_length": 12, "overlong": "error"},
        DataError,
        r"row 'r\d+': \d+ tokens, longer than max_length 12; raise max_length",
    ),
    "only rows that are too long": (
        {"max_length": 3},
        DataError,
        r"chats: none of 24 rows can be trained on; the first: .* longer than max_length 3",
    ),
    "rows that the model cannot read": (
        {
            "overlong": "error",
            "max_length": 4000,
            "soft_prompt": {"num_virtual_tokens": 505},
            "method": "prefix_tuning",
        },
        DataError,
        r"row 'r\d+': \d+ tokens, longer than max_length 7",
    ),
    "best of nothing": ({"metric_for_best_model": "eval_loss"}, UserError, "give them as the input eval_data"),
    "a rate that breaks all": (
        {"optimizer": {"learning_rate": 1e30}},
        TrainingError,
        r"step \d+ of \d+ \(rows r.*\): the loss is (nan|inf)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, run: Run) -> None:
    config, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        run("a", **config)


CONTRADICTIONS = {
    "a frozen adapter": ({"freeze": ["*"]}, "freeze is for method full"),
    "an adapter of all": ({"method": "full", "lora": {"r": 4}}, "lora is for method lora"),
    "early_stopping_patience": ({"early_stopping_patience": 2}, "early_stopping_patience needs metric_for_best_model"),
    "a soft adapter": (
        {"soft_prompt": {"num_virtual_tokens": 4}},
        "soft_prompt is for methods prompt_tuning and prefix_tuning",
    ),
    "a written prefix": (
        {"method": "prefix_tuning", "soft_prompt": {"prompt_tuning_init_text": "a"}},
        "a prefix is initialized randomly",
    ),
    "a noisy prompt": ({"method": "prompt_tuning", "neftune_noise_alpha": 5}, "does not support neftune_noise_alpha"),
    "no targets": ({"lora": {"target_modules": []}}, "target_modules is empty"),
    "a shared best": (
        {"metric_for_best_model": "eval_loss", "parallel": {"data_parallel": "fsdp"}},
        "set parallel.data_parallel to ddp",
    ),
    "matrices": ({"parallel": {"tensor": 2}}, "Extra inputs are not permitted"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradictions_are_refused_at_once(what: str) -> None:
    config, message = CONTRADICTIONS[what]
    with pytest.raises(ValidationError, match=message):
        SftConfig.model_validate(config)


def test_a_checkpoint_of_another_adapter_is_refused(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("a", stop=8, lora={"r": 4})
    with pytest.raises(TrainingError, match="checkpoint of another configuration"):
        run("a", lora={"r": 8})


def test_rows_that_are_set_aside_are_told(run: Run, tmp_path: Path) -> None:
    rows = rows_of(8)
    rows[3]["messages"] = rows[3]["messages"][:1]
    write_chat(tmp_path / "odd", rows)
    made, data = run("a", Dataset(tmp_path / "odd", name="odd"))
    assert (made.metrics["rows"], made.metrics["dropped"]) == (7, 1)
    assert [json.loads(line) for line in (made.path / "set_aside.jsonl").read_text().splitlines()] == [
        {"id": "r3", "reason": "no assistant tokens to train on"}
    ]
    assert "Dropped rows" in data["blocks"]


def test_texts_are_learned_whole(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(WORDS[(i + j) % 11] for j in range(6))}) + "\n" for i in range(16))
    )
    made, data = run(
        "a", Dataset(tmp_path / "texts.jsonl", name="texts"), num_train_epochs=4, optimizer={"learning_rate": 0.01}
    )
    assert data["rows"][-1]["loss"] < data["rows"][0]["loss"]
    assert all(
        r["num_label_tokens"] == r["tokens"] - 4 for r in data["rows"]
    )  # of four texts a step all but their first tokens
    assert made.metrics["rows"] == 16

    # learning rates


def test_the_rate_that_is_found_trains_best(pico: Path, tmp_path: Path, run: Run) -> None:
    """Against thirty times less and thirty times more, in as many steps."""
    from llmworks.train.lr_finder import LrFinderConfig, lr_finder

    def engine(artifact: Artifact) -> Engine:
        raise LlmworksError("none is needed")

    data = chats(tmp_path / "chats", 40)
    base = load(str(pico))
    assert isinstance(base, Model)
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    made = lr_finder(
        LrFinderConfig(training=SftConfig(lora={"r": 4})),
        base,
        data,
        Context(
            tmp_path / "out",
            tmp_path / "scratch",
            0,
            Progress(tmp_path / "scratch" / "metrics.jsonl", quiet=True),
            ReportBuilder(),
            engine,
        ),
    )  # type: ignore[arg-type]
    found = made.metrics["learning_rate"]
    assert made.metrics["lr_lowest_loss"] > found
    ends = {}
    for times in (1, 1 / 30, 30):
        _, told = run(
            f"at-{times}",
            data,
            lora={"r": 4},
            num_train_epochs=4,
            optimizer={"learning_rate": found * times, "lr_scheduler_type": "constant"},
        )
        ends[times] = sum(r["loss"] for r in told["rows"][-8:]) / 8
    assert ends[1] == min(ends.values()), (found, ends)


def test_where_a_curve_is_steepest_and_lowest() -> None:
    """By hand: a loss that falls between 1e-4 and 1e-2, and explodes after 1e-1."""
    import math

    from llmworks.train.lr_finder import choose_learning_rate, smooth_losses

    rising = [10 ** (-6 + i / 10) for i in range(61)]
    losses = [3 / (1 + math.exp(3 * (math.log10(r) + 3))) + (r / 0.2) ** 2 for r in rising]
    best, steepest, lowest = choose_learning_rate(rising, losses)
    assert 5e-4 < steepest < 5e-3
    assert 5e-3 < lowest < 0.2
    assert best <= lowest / 10 * 1.001
    assert smooth_losses([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_frozen_matrices_in_half_are_the_same_products(
    pico: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    """Autocast rounds them for each product anyway: with bf16 the losses are the same bits whether they are kept so or
    not.
    """
    found = {}
    for name in ("kept", "whole"):
        if name == "whole":
            monkeypatch.setattr(TrainableModel, "cast_frozen_weights", lambda self, precision: None)
        made, metrics = run(
            name, held_out=chats(tmp_path / "unseen", 6), precision="bf16", num_train_epochs=1.0, eval_steps=3
        )
        found[name] = (
            [(row.get("loss"), row.get("eval_loss")) for row in metrics["rows"]],
            {key: tensor.tolist() for key, tensor in tensors(made).items()},
        )
    assert found["kept"] == found["whole"]
    assert any(held for _, held in found["kept"][0])
    assert made.golden is not None


def test_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [resolve_precision(wanted, cpu) for wanted in ("auto", "fp32", "bf16", "fp16")] == [
        "fp32",
        "fp32",
        "bf16",
        "fp16",
    ]
    for capability, alone, spread in (((8, 0), "bf16", "bf16"), ((7, 5), "fp16", "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert (
            resolve_precision("auto", gpu),
            resolve_precision("auto", gpu, sharded=True),
            resolve_precision("fp32", gpu),
        ) == (
            alone,
            spread,
            "fp32",
        )
