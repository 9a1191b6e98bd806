"""Configurations of Axolotl and LLaMA-Factory become recipes that hold; of every key it is said what became of it, and
a translated recipe trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmworks.cli import main
from llmworks.core.errors import UserError
from llmworks.importers import axolotl, llamafactory
from llmworks.importers.keys import SourceKeys
from llmworks.importers.translate import TranslatedRecipe, translate
from llmworks.runtime.read_recipe import load_recipe
from llmworks.runtime.recipe import StageStep

TRACKERS = {
    "wandb_project": None,
    "wandb_entity": None,
    "wandb_watch": None,
    "wandb_name": None,
    "wandb_log_model": None,
}
AXOLOTL: dict[str, dict[str, Any]] = {
    "lora": {
        "base_model": "NousResearch/Meta-Llama-3-8B",
        "model_type": "LlamaForCausalLM",
        "tokenizer_type": "AutoTokenizer",
        "load_in_8bit": True,
        "load_in_4bit": False,
        **TRACKERS,
        "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}],
        "dataset_prepared_path": None,
        "val_set_size": 0.05,
        "output_dir": "./outputs/lora-out",
        "sequence_len": 4096,
        "sample_packing": True,
        "eval_sample_packing": False,
        "adapter": "lora",
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
        "lora_modules_to_save": ["embed_tokens", "lm_head"],
        "gradient_accumulation_steps": 4,
        "micro_batch_size": 2,
        "num_epochs": 4,
        "optimizer": "adamw_bnb_8bit",
        "lr_scheduler": "cosine",
        "learning_rate": 0.0002,
        "bf16": "auto",
        "tf32": False,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "flash_attention": True,
        "warmup_ratio": 0.1,
        "evals_per_epoch": 4,
        "saves_per_epoch": 1,
        "weight_decay": 0.0,
        "special_tokens": {"pad_token": "<|end_of_text|>"},
    },
    "qlora": {
        "base_model": "google/gemma-3-1b-it",
        "ddp_find_unused_parameters": True,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "chat_template": "gemma3",
        "eot_tokens": ["<end_of_turn>"],
        "datasets": [
            {
                "path": "cgato/SlimOrcaDedupCleaned",
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            }
        ],
        "val_set_size": 0.0,
        "output_dir": "./out",
        "unfrozen_parameters": ["^lm_head.*"],
        "adapter": "qlora",
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "lora_target_modules": ["q_proj", "model.layers.3.mlp.up_proj"],
        "sequence_len": 2048,
        "sample_packing": True,
        "gradient_accumulation_steps": 4,
        "micro_batch_size": 1,
        "num_epochs": 4,
        "optimizer": "paged_adamw_8bit",
        "lr_scheduler": "constant_with_warmup",
        "learning_rate": "2e-4",
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "warmup_steps": 100,
        "saves_per_epoch": 1,
        "peft_use_rslora": True,
        "loraplus_lr_ratio": 16,
        "seed": 7,
    },
    "full": {
        "base_model": "stabilityai/stablelm-2-1_6b",
        "trust_remote_code": True,
        "datasets": [
            {"path": "tatsu-lab/alpaca", "type": "alpaca"},
            {"path": "org/talks", "type": "sharegpt", "conversation": "chatml"},
        ],
        "val_set_size": 0.1,
        "sequence_len": 8192,
        "excess_length_strategy": "truncate",
        "pad_to_sequence_len": True,
        "adapter": None,
        "lora_r": 8,
        "micro_batch_size": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "linear",
        "learning_rate": 2e-5,
        "train_on_inputs": False,
        "group_by_length": False,
        "bf16": "auto",
        "fp16": None,
        "early_stopping_patience": 3,
        "eval_steps": 20,
        "save_steps": 40,
        "neftune_noise_alpha": 5,
        "warmup_steps": 0,
        "deepspeed": "deepspeed_configs/zero3_bf16.json",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
        "flash_attn_rms_norm": True,
    },
    "texts": {
        "base_model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "max_steps": 200,
        "pretraining_dataset": [{"path": "allenai/c4", "name": "en", "type": "pretrain"}],
        "val_set_size": 0.0,
        "sequence_len": 2048,
        "sample_packing": True,
        "micro_batch_size": 2,
        "num_epochs": 4,
        "optimizer": "lion_8bit",
        "lr_scheduler": "rex",
        "learning_rate": 0.0002,
        "warmup_ratio": 0.1,
        "strange_key": 3,
    },
}
USUAL = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/llama3-8b/lora/sft",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
FACTORY: dict[str, dict[str, Any]] = {
    "lora": {
        **USUAL,
        "lora_rank": 16,
        "val_size": 0.1,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "loraplus_lr_ratio": 16.0,
    },
    "qlora": {
        **USUAL,
        "quantization_bit": 4,
        "quantization_method": "bitsandbytes",
        "double_quantization": False,
        "use_dora": True,
        "lora_target": "q_proj,v_proj",
        "load_best_model_at_end": True,
        "val_size": 0.1,
    },
    "full": {
        **USUAL,
        "finetuning_type": "full",
        "deepspeed": "examples/deepspeed/ds_z2_config.json",
        "pure_bf16": True,
        "lr_scheduler_type": "linear",
        "mask_history": True,
        "template": "cohere",
        "enable_liger_kernel": True,
    },
    "texts": {**USUAL, "stage": "pt", "dataset": "c4_demo", "template": None, "max_samples": None, "packing": True},
}
INFO = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {
        "file_name": "alpaca_en_demo.json",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    },
    "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}},
    "talks": {
        "hf_hub_url": "org/talks",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "renamed": {"hf_hub_url": "org/talks", "formatting": "sharegpt", "columns": {"messages": "dialog"}},
    "few": {"file_name": "identity.json", "num_samples": 5, "split": "test"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
}


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Write a configuration, translate it, and check the recipe."""

    def run(values: dict[str, Any], name: str = "there") -> tuple[TranslatedRecipe, dict[str, Any]]:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
        for file in ("identity.json", "alpaca_en_demo.json", "c4_demo.jsonl"):
            (tmp_path / "data" / file).write_text("[]")
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(values))
        found = translate(tmp_path / f"{name}.yml")
        (tmp_path / "recipe.yaml").write_text(found.text)
        load_recipe(tmp_path / "recipe.yaml")
        return found, yaml.safe_load(found.text)

    return run


def told(found: TranslatedRecipe, fate: str) -> set[str]:
    return {note.key for note in found.notes if note.fate == fate}


@pytest.mark.parametrize("kind", AXOLOTL)
def test_every_example_of_axolotl_becomes_a_recipe_that_holds(kind: str, made: Any) -> None:
    found, _ = made(AXOLOTL[kind], kind)
    assert found.tool == "Axolotl"
    assert told(found, "unknown") == ({"strange_key"} if kind == "texts" else set())


@pytest.mark.parametrize("kind", FACTORY)
def test_every_example_of_llamafactory_becomes_a_recipe_that_holds(kind: str, made: Any) -> None:
    found, _ = made(FACTORY[kind], kind)
    assert found.tool == "LLaMA-Factory"
    assert told(found, "unknown") == set()


def test_an_adapter_of_axolotl(made: Any) -> None:
    found, recipe = made(AXOLOTL["lora"])
    assert recipe["steps"]["base"] == {"use": "hf:NousResearch/Meta-Llama-3-8B"}
    assert recipe["steps"]["raw"] == {"use": "hf:datasets/mhenrichsen/alpaca_2k_test"}
    assert recipe["steps"]["chats"]["config"] == {"format": "alpaca"}
    assert recipe["steps"]["train"]["config"] == {"split": "train", "n_splits": 20}
    assert recipe["steps"]["tuned"]["inputs"] == {"model": "base", "data": "train", "eval_data": "test"}
    assert recipe["steps"]["tuned"]["config"] == {
        "method": "lora",
        "lora": {"r": 32, "lora_alpha": 16.0, "lora_dropout": 0.05},
        "num_train_epochs": 4.0,
        "batch_size": 2,
        "max_length": 4096,
        "gradient_accumulation_steps": 4,
        "chat_template": "alpaca",
        "golden": "renew: Axolotl's configuration asks for alpaca",
        "gradient_checkpointing": True,
        "eval_steps": 50,
        "optimizer": {"learning_rate": 0.0002, "min_lr_ratio": 0.0, "warmup_ratio": 0.1, "weight_decay": 0.0},
    }
    assert told(found, "lost") == {"lora_modules_to_save", "load_in_8bit"}
    assert told(found, "otherwise") == {"micro_batch_size", "evals_per_epoch", "optimizer", "datasets[0].type"}
    for note in found.notes:
        assert note.key in found.text.split("\nname:")[0]


def test_four_bits_of_axolotl(made: Any) -> None:
    found, recipe = made(AXOLOTL["qlora"])
    config = recipe["steps"]["tuned"]["config"]
    assert config["lora"] == {
        "r": 32,
        "lora_alpha": 16.0,
        "loraplus_lr_ratio": 16.0,
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "load_in_4bit": True,
    }
    assert config["chat_template"] == "gemma"
    assert config["optimizer"] == {
        "learning_rate": 0.0002,
        "lr_scheduler_type": "constant",
    }  # 100 steps of warm-up are told, not guessed
    assert recipe["seed"] == 7
    assert "eval_data" not in recipe["steps"]["tuned"]["inputs"]
    assert told(found, "otherwise") == {"micro_batch_size", "bf16", "warmup_steps", "optimizer"}


def test_all_weights_of_axolotl_from_two_sets(made: Any) -> None:
    found, recipe = made(AXOLOTL["full"])
    config = recipe["steps"]["tuned"]["config"]
    assert recipe["steps"]["rows"]["inputs"] == {"data": {"set-1": "chats-1", "set-2": "chats-2"}}
    assert (config["method"], config["overlong"], config["neftune_noise_alpha"], config["metric_for_best_model"]) == (
        "full",
        "truncate",
        5.0,
        "eval_loss",
    )
    assert "parallel" not in config
    assert "best-model selection needs unsharded weights" in next(
        note.text for note in found.notes if note.key == "deepspeed"
    )
    assert (config["eval_steps"], config["save_steps"], config["early_stopping_patience"]) == (20, 40, 3)
    assert config["optimizer"] == {
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "min_lr_ratio": 0.0,
        "warmup_ratio": 0.0,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "max_grad_norm": 0.5,
    }
    assert {"adam_epsilon", "datasets"} <= told(found, "lost")


def test_texts_of_axolotl(made: Any) -> None:
    found, recipe = made(AXOLOTL["texts"])
    assert recipe["steps"]["texts"] == {"stage": "data.read", "inputs": {"data": "raw"}}
    assert recipe["steps"]["raw"] == {"use": "hf:datasets/allenai/c4/en"}
    assert told(found, "lost") == {"lr_scheduler", "max_steps"}
    assert recipe["steps"]["tuned"]["config"]["optimizer"]["name"] == "lion"


def test_adapters_of_llamafactory(made: Any, tmp_path: Path) -> None:
    found, recipe = made(FACTORY["lora"])
    assert recipe["steps"]["raw-1"] == {"use": f"path:{(tmp_path / 'data' / 'identity.json').resolve()}"}
    assert recipe["steps"]["some-2"] == {
        "stage": "data.mix",
        "inputs": {"data": {"all": "chats-2"}},
        "config": {"total_rows": 1000, "max_repeats": 1},
    }
    assert recipe["steps"]["tuned"]["config"] == {
        "method": "lora",
        "lora": {"r": 16, "lora_alpha": 32.0, "loraplus_lr_ratio": 16.0},
        "num_train_epochs": 3.0,
        "batch_size": 1,
        "max_length": 2048,
        "overlong": "truncate",
        "gradient_accumulation_steps": 8,
        "chat_template": "llama-3",
        "golden": "renew: LLaMA-Factory's configuration asks for llama3",
        "eval_steps": 500,
        "save_steps": 500,
        "optimizer": {"learning_rate": 0.0001, "min_lr_ratio": 0.0, "warmup_ratio": 0.1},
    }
    assert told(found, "lost") == set()
    _, recipe = made(FACTORY["qlora"])
    assert recipe["steps"]["tuned"]["config"]["lora"] == {
        "r": 8,
        "lora_alpha": 16.0,
        "target_modules": ["q_proj", "v_proj"],
        "use_dora": True,
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": False,
    }
    assert recipe["steps"]["tuned"]["config"]["metric_for_best_model"] == "eval_loss"


def test_all_weights_and_texts_of_llamafactory(made: Any) -> None:
    found, recipe = made(FACTORY["full"])
    config = recipe["steps"]["tuned"]["config"]
    assert (config["method"], config["train_on"], config["parallel"], config["optimizer"]["lr_scheduler_type"]) == (
        "full",
        "last_assistant",
        {"data_parallel": "fsdp"},
        "linear",
    )
    assert "template" not in config
    assert "template" in told(found, "otherwise")
    _, recipe = made(FACTORY["texts"])
    assert recipe["steps"]["texts"]["stage"] == "data.read"


def test_what_stays_as_it_is_where_nothing_is_said(made: Any) -> None:
    """The tools' own defaults, which are not ours."""
    _, recipe = made(
        {
            "base_model": "a/b",
            "datasets": [{"path": "c/d", "type": "chat_template"}],
            "adapter": "lora",
            "learning_rate": 1e-4,
        }
    )
    config = recipe["steps"]["tuned"]["config"]
    assert config["lora"] == {"r": 8, "lora_alpha": 16.0, "target_modules": ["q_proj", "v_proj"]}
    assert (config["max_length"], config["optimizer"]["warmup_ratio"]) == (512, 0.03)
    _, recipe = made({"model_name_or_path": "a/b", "dataset": "identity"})
    config = recipe["steps"]["tuned"]["config"]
    assert config["lora"] == {"r": 8, "lora_alpha": 16.0}
    assert config["optimizer"] == {
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "min_lr_ratio": 0.0,
        "warmup_ratio": 0.0,
    }
    assert (config["batch_size"], config["num_train_epochs"]) == (8, 3.0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "preferences": (AXOLOTL["lora"] | {"rl": "dpo"}, "rl: dpo is not supervised fine-tuning"),
    "no data": ({"base_model": "a/b", "learning_rate": 1}, "datasets is missing"),
    "no rate": (AXOLOTL["lora"] | {"learning_rate": None}, "learning_rate is missing"),
    "a word for a number": (AXOLOTL["lora"] | {"micro_batch_size": "two"}, "micro_batch_size: 'two' is not a number"),
    "no number": (AXOLOTL["lora"] | {"learning_rate": float("nan")}, "is not a number"),
    "a strange set": (
        AXOLOTL["lora"] | {"datasets": [{"path": "a/b", "type": "context_qa.load_v2"}]},
        "datasets[0].type: 'context_qa.load_v2' is not supported",
    ),
    "a prompt of its own": (
        AXOLOTL["lora"] | {"datasets": [{"path": "a/b", "type": {"format": "x"}}]},
        "datasets[0].type",
    ),
    "sets that are none": (AXOLOTL["lora"] | {"datasets": {"path": "a/b"}}, "datasets: must be a list"),
    "texts and talks": (
        AXOLOTL["lora"] | {"datasets": [{"path": "a/b", "type": "alpaca"}, {"path": "a/c", "type": "completion"}]},
        "documents and conversations",
    ),
    "another adapter": (AXOLOTL["lora"] | {"adapter": "llama-adapter"}, "adapter: 'llama-adapter' is not supported"),
    "a pattern": (
        AXOLOTL["lora"] | {"lora_target_linear": False, "lora_target_modules": [r"model.layers.[\d]+.up_proj"]},
        "patterns are not translated",
    ),
    "no name": (AXOLOTL["lora"] | {"base_model": "llama"}, "'llama' is neither a local file nor ORG/NAME"),
    "neither true": (AXOLOTL["lora"] | {"load_in_4bit": "maybe"}, "neither true nor false"),
    "pairs": (USUAL | {"dataset": "pairs"}, "'pairs' holds preference pairs"),
    "another stage": (USUAL | {"stage": "dpo"}, "stage: 'dpo' is not supervised"),
    "layers": (USUAL | {"finetuning_type": "freeze"}, "finetuning_type: 'freeze' is not translated"),
    "an unknown set": (USUAL | {"dataset": "alpaca_de"}, "'alpaca_de' is not in"),
    "other columns": (
        USUAL | {"dataset": "renamed"},
        "dataset 'renamed': messages: dialog: rows are recognized by their usual keys",
    ),
    "half a rank": (AXOLOTL["lora"] | {"lora_r": 8.5}, "lora_r: 8.5 is not a whole number"),
    "nothing to train": (USUAL | {"do_train": False}, "do_train is false"),
    "other messages": (
        AXOLOTL["lora"] | {"datasets": [{"path": "a/b", "type": "chat_template", "field_messages": "dialog"}]},
        "datasets[0].field_messages: conversations are read from",
    ),
    "no model": ({"model_name_or_path": None, "dataset": "identity"}, "model_name_or_path is missing"),
    "neither tool": ({"model": "x"}, "not a configuration of Axolotl"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_translated_is_told_in_a_line(what: str, made: Any) -> None:
    values, message = WRONG[what]
    with pytest.raises(UserError) as error:
        made(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_would_be_another_training_is_told(made: Any) -> None:
    """Each of these changed the training without a word once."""
    split = [{"path": "a/b", "type": "alpaca", "split": "train[:10%]"}]
    for values, key, fate in (
        (AXOLOTL["lora"] | {"datasets": split}, "datasets[0].split", "lost"),
        (AXOLOTL["full"] | {"load_in_4bit": True}, "load_in_4bit", "lost"),
        (AXOLOTL["lora"] | {"val_set_size": 0.9}, "val_set_size", "otherwise"),
        (AXOLOTL["lora"] | {"test_datasets": [{"path": "a/c", "type": "alpaca"}]}, "val_set_size", "meaningless"),
        (USUAL | {"template": "empty"}, "template", "lost"),
        (USUAL | {"template": "default"}, "template", "lost"),
        (USUAL | {"template": "qwen"}, "template", "otherwise"),
        (USUAL | {"neat_packing": True}, "packing", "otherwise"),
        (FACTORY["texts"] | {"packing": None}, "packing", "otherwise"),
        (USUAL | {"quantization_bit": 8}, "quantization_bit", "lost"),
        (USUAL | {"dataset": "few"}, "dataset few: split", "lost"),
        (USUAL | {"max_steps": -1}, "max_steps", "meaningless"),
    ):
        found, recipe = made(values)
        assert [note.fate for note in found.notes if note.key == key] == [fate], (key, fate)
    assert recipe["steps"]["base"] == {"use": "hf:meta-llama/Meta-Llama-3-8B-Instruct"}
    assert made(USUAL | {"dataset": "few"})[1]["steps"]["some"]["config"]["total_rows"] == 5
    assert made(AXOLOTL["lora"] | {"base_model": "asset:smollm2-135m-instruct"})[1]["steps"]["base"] == {
        "use": "asset:smollm2-135m-instruct"
    }


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    (tmp_path / "twice.yml").write_text("base_model: a/b\nlearning_rate: 1\nlearning_rate: 2\n")
    with pytest.raises(UserError, match="duplicate key 'learning_rate'"):
        translate(tmp_path / "twice.yml")
    with pytest.raises(UserError, match="is a directory"):
        translate(tmp_path)


def test_no_key_is_silent() -> None:
    """Each key with a value is taken, or has a note."""
    for module, examples in ((axolotl, AXOLOTL), (llamafactory, FACTORY)):
        for values in examples.values():
            _, _, keys = module.translate(json.loads(json.dumps(values)), Path("nowhere"))  # type: ignore[attr-defined]
            keys.note_remaining()
            assert not keys.values
    keys = SourceKeys({"a": 1, "b": None, "wandb_x": "y"}, "T")
    keys.note_remaining()
    assert [(note.key, note.fate) for note in keys.notes] == [("a", "unknown"), ("wandb_x", "meaningless")]


def test_a_translated_recipe_trains(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": f"say {word}", "input": "", "output": word}
        for word in ("the", "quick", "brown", "fox", "user", "city", "what", "name")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "mine.yml").write_text(
        yaml.safe_dump(
            {
                "base_model": str(pico),
                "datasets": [{"path": "rows.json", "type": "alpaca"}],
                "val_set_size": 0.25,
                "adapter": "qlora",
                "load_in_4bit": True,
                "lora_r": 4,
                "lora_target_linear": True,
                "learning_rate": 0.001,
                "num_epochs": 1,
                "micro_batch_size": 2,
                "special_tokens": {"pad_token": "x"},
            }
        )
    )
    assert main(["import", "mine.yml", "--out", "mine.yaml"]) == 0
    assert "llmworks run mine.yaml" in capsys.readouterr().out
    assert main(["import", "mine.yml", "--out", "mine.yaml"]) == 2  # nothing is overwritten
    tuned = load_recipe(tmp_path / "mine.yaml").steps["tuned"]
    assert isinstance(tuned, StageStep)
    assert main(["run", "mine.yml"]) == 2
    assert "this is a configuration for Axolotl; convert it with `llmworks import mine.yml`" in capsys.readouterr().err
    assert main(["run", "mine.yaml", "--quiet", "--workspace", str(tmp_path / "ws")]) == 0
    assert json.loads((tmp_path / "ws" / "mine" / "tuned" / "base.json").read_text())["kept"] == "nf4"


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yml").write_text("")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(AXOLOTL["lora"] | {"lora_dropout": 1.5}))
    for name in ("missing.yml", "empty.yml", "binary.yml", "wrong.yml"):
        assert main(["import", str(tmp_path / name), "--out", str(tmp_path / "out.yaml")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not (tmp_path / "out.yaml").exists()
    assert main(["import", str(tmp_path / "wrong.yml"), "--out", str(tmp_path / "no" / "out.yaml")]) == 2
