"""A model without some of its blocks: which, by the definition of their influence, and that what is left computes as
those blocks do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.conftest import make_tokenizer

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import LlmworksError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.data.store.rows import write_chat
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.load import load_model
from llmworks.tokenize.chat.golden import require_replay
from llmworks.train.finetune.examples import Example
from llmworks.train.prune import PruneConfig, compute_block_influence, prune


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of five blocks; the third changes next to nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("deep")
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        for name, p in model.model.layers[2].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.mul_(1e-3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def short(deep: Path, tmp_path: Path) -> Any:
    def run(data: Dataset | None = None, **config: Any) -> tuple[Model, dict[str, Any]]:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)

        def engine(artifact: object) -> Any:
            raise LlmworksError("none is needed")

        page = ReportBuilder()
        return (
            prune(
                PruneConfig.model_validate(config),
                Model(deep, about={"format": "hf"}, name="deep"),
                Context(out, tmp_path, 0, Progress(quiet=True), page, engine),
                data,
            ),
            page.data,
        )

    return run


def talks(place: Path) -> Dataset:
    write_chat(
        place,
        [
            {
                "id": f"r{i}",
                "group": "",
                "messages": [
                    {"role": "user", "content": f"what is the weather in Oslo {i}"},
                    {"role": "assistant", "content": "the quick brown fox"},
                ],
                "tools": [],
                "answer": None,
            }
            for i in range(4)
        ],
    )
    return Dataset(place, name="talks")


def test_what_is_left_is_those_blocks(deep: Path, short: Any) -> None:
    """The logits of a transformers model from which the same layers were taken by hand."""
    made, _ = short(drop_layers=[1, 3])
    theirs = load_model(deep)
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[i] for i in (0, 2, 4)])
    for number, layer in enumerate(theirs.model.layers):
        layer.self_attn.layer_idx = number
    ids = torch.tensor([[1, 30, 40, 50, 60, 70]])
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(made.path)(input_ids=ids).logits,
            theirs(input_ids=ids, use_cache=False).logits,
            rtol=1e-4,
            atol=1e-4,
        )
    assert made.metrics["blocks"] == 3
    require_replay(made.golden, *_own(made.path), step="test")


def _own(path: Path) -> tuple[Any, Any]:
    from llmworks.tokenize.load import get_stop_ids, load_tokenizer

    tokenizer = load_tokenizer(path)
    return tokenizer, get_stop_ids(path, tokenizer)


def test_the_block_that_changes_least_goes_first(short: Any, tmp_path: Path) -> None:
    made, data = short(talks(tmp_path / "talks"), num_hidden_layers=4)
    assert data["drop"] == [2]
    assert min(range(5), key=lambda number: data["influence"][number]) == 2
    assert made.metrics["blocks"] == 4


def test_influence_is_one_less_the_cosine(deep: Path) -> None:
    """Against transformers' hidden states: those after the last block carry the final norm, so that block is left
    out.
    """
    examples = [Example((1, 30, 40, 50), (0, 0, 1, 1)), Example((1, 60, 70, 80, 90, 100), (0, 0, 0, 1, 1, 1))]
    theirs = load_model(deep)
    sums = torch.zeros(4)
    with torch.no_grad():
        for example in examples:
            states = theirs(input_ids=torch.tensor([example.ids]), output_hidden_states=True).hidden_states
            for block in range(4):
                sums[block] += (
                    1 - torch.nn.functional.cosine_similarity(states[block], states[block + 1], dim=-1)
                ).sum()
    assert compute_block_influence(load_decoder(deep), examples)[:4] == pytest.approx(
        (sums / 10).tolist(), rel=1e-4, abs=1e-6
    )


def test_what_is_refused(short: Any) -> None:
    for config, words in (
        ({"drop_layers": [5]}, "has 5 layers, from 0 to 4"),
        ({"num_hidden_layers": 5}, "has 5 layers"),
        ({"num_hidden_layers": 3}, "provide it, or name the layers in config.drop_layers"),
        ({"drop_layers": [0, 1, 2, 3, 4]}, "at least one"),
    ):
        with pytest.raises(UserError, match=words):
            short(**config)
    for wrong in ({}, {"num_hidden_layers": 2, "drop_layers": [1]}, {"drop_layers": [1, 1]}, {"drop_layers": [-1]}):
        with pytest.raises(ValidationError, match="drop"):
            PruneConfig.model_validate(wrong)
