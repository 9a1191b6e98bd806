"""Translate an Axolotl YAML configuration to recipe steps (reference: docs/config.qmd, docs/dataset-formats)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmworks.core.errors import UserError
from llmworks.importers import training
from llmworks.importers.datasets import DatasetSource, Steps, add_reading_steps, add_split_steps
from llmworks.importers.keys import SourceKeys

TOOL = "Axolotl"
FORMATS = {
    "alpaca": "alpaca",
    "gpteacher": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": "auto",
    "completion": "text",
    "pretrain": "text",
}
OTHER_METHODS = "rl reward_model process_reward_model"
LOST_KEYS = {
    "lora_modules_to_save": "only the adapter is trained; embeddings and LM head stay frozen",
    "peft_layers_to_transform peft_layers_pattern peft_layer_replication lora_layers_to_transform": (
        "every layer with a target module name gets an adapter"
    ),
    "peft_init_lora_weights peft peft_autocast_adapter_dtype loftq*": (
        "adapters use LoRA's default random initialization"
    ),
    "loraplus_lr_embedding": "embeddings have no adapter here",
    "relora* jagged_restart*": "adapters are not merged during training",
    "lora_model_dir": "training starts with a new adapter; merge the old one first with merge.adapter",
    "max_steps": "training length is set by num_train_epochs",
    "noisy_embedding_alpha": "the old name of neftune_noise_alpha; use the new one",
    "tokens added_tokens_overrides resize_token_embeddings_to_32x shrink_embeddings mean_resizing_embeddings": (
        "the vocabulary is not changed"
    ),
    "default_system_message eot_tokens chat_template_jinja": "the chat template is a built-in one, or the model's own",
    "overrides_of_model_config overrides_of_model_kwargs rope_scaling random_init_weights": (
        "the model is trained with the configuration in its files"
    ),
    "unfrozen_parameters": "set freeze to the modules to keep frozen",
    "curriculum_sampling shuffle_merged_datasets": "rows are always shuffled in every epoch",
    "dataset_exact_deduplication": "set duplicates: drop in data.chat",
    "qat quantization": "models are quantized after training, with the stages quantize.*",
    "gptq gptq_* load_in_8bit": "the frozen base keeps its precision; load_in_4bit quantizes it to NF4",
    "revision_of_model": "a Hub name means its newest commit",
    "min_sample_len": "short rows are trained on, too",
    "dataset_shard_num dataset_shard_idx": "all rows are read",
    "use_eaft eaft_* use_dynamic_finetuning": "the loss is cross-entropy",
}


def translate(values: dict[str, Any], folder: Path) -> tuple[Steps, int, SourceKeys]:
    """Translate a configuration; returns (steps, seed, the keys with notes on each).

    Relative paths start at `folder`. UserError when it is not supervised fine-tuning, or names no model or data.
    """
    keys = SourceKeys(values, TOOL)
    for key in OTHER_METHODS.split():
        if (value := keys.take(key)) not in (None, False):
            raise UserError(f"{TOOL}: {key}: {value!s} is not supervised fine-tuning; only that is translated")
    steps: Steps = {"base": {"use": training.resolve_reference(str(_require(keys, "base_model")), folder)}}
    train, held_out, template = _translate_data(keys, folder, steps)
    config: dict[str, Any] = _translate_method(keys)
    config |= {
        "num_train_epochs": float(keys.take_number("num_epochs", 1)),
        "batch_size": keys.take_int("micro_batch_size", 1),
        "max_length": keys.take_int("sequence_len", 512),
    }
    if keys.values.get("sample_packing"):
        keys.note_approximated(
            "micro_batch_size",
            f"counted packed sequences of {config['max_length']} tokens; here it counts rows, so a step has fewer"
            " tokens: raise batch_size to match",
        )
    accumulation = keys.take_int("gradient_accumulation_steps", 1)
    total = keys.take_int("batch_size")
    if total:
        accumulation = max(1, total // config["batch_size"])
    if accumulation > 1:
        config["gradient_accumulation_steps"] = int(accumulation)
    strategy = str(keys.take("excess_length_strategy", "drop"))
    if strategy != "drop":
        config["overlong"] = "truncate" if strategy == "truncate" else "error"
    if template != "keep":
        config |= {"chat_template": template, "golden": f"renew: {TOOL}'s configuration asks for {template}"}
    noise = keys.take_number("neftune_noise_alpha")
    if noise:
        config["neftune_noise_alpha"] = float(noise)
    if keys.take("gradient_checkpointing") not in (None, False):
        config["gradient_checkpointing"] = True
    training.translate_precision(keys)
    if keys.take_bool("train_on_inputs"):
        keys.note_lost("train_on_inputs", "only answers are trained on")
    config |= training.translate_loop(keys, held_out is not None, config.get("lora", {}).get("load_in_4bit", False))
    config["optimizer"] = training.translate_optimizer(
        keys, "optimizer", "lr_scheduler", rate=None, warmup=0.03, schedule="cosine"
    )
    _translate_special_tokens(keys)
    keys.note_lost_keys(LOST_KEYS)
    seed = keys.take_int("seed", 42)
    steps["tuned"] = {
        "stage": "train.sft",
        "inputs": {"model": "base", "data": train, **({"eval_data": held_out} if held_out else {})},
        "config": config,
    }
    return steps, seed, keys


def _require(keys: SourceKeys, key: str) -> Any:
    value = keys.take(key)
    if value is None:
        raise UserError(f"{keys.tool}: {keys.path}{key} is missing")
    return value


def _translate_method(keys: SourceKeys) -> dict[str, Any]:
    """Translate the fine-tuning method and adapter."""
    kind = keys.take("adapter")
    four = keys.take_bool("load_in_4bit")
    if kind is None:
        if four:
            keys.note_lost("load_in_4bit", "without an adapter all weights are trained, which cannot be done in 4 bits")
        for key in [
            key
            for key in keys.values
            if key.startswith("lora_") and not key.endswith("_kernel") and key != "lora_on_cpu"
        ]:
            keys.add_note(key, "meaningless", "there is no adapter")
            keys.take(key)
        return {"method": "full"}
    if kind not in ("lora", "qlora"):
        raise UserError(f"{TOOL}: adapter: {kind!r} is not supported; lora and qlora are")
    found = training.translate_adapter(keys, "lora_r", default_rank=8, default_alpha=16, dropout=0.0)
    targets, every = keys.take_names("lora_target_modules"), keys.take_bool("lora_target_linear")
    if targets == ["all-linear"]:
        targets, every = [], True
    if not targets and not every:
        keys.note_approximated("lora_target_modules", "not set; peft's default for most models is q_proj and v_proj")
        targets = ["q_proj", "v_proj"]
    if targets and not every:
        heads = [name for name in targets if name in ("lm_head", "embed_tokens")]
        if heads:
            keys.note_lost("lora_target_modules", f"{', '.join(heads)}: embeddings and LM head have no adapter here")
        if any(set(name) & set("^$*()[]\\") for name in targets):
            raise UserError(f"{TOOL}: lora_target_modules: patterns are not translated; list the module names")
        found["target_modules"] = [name.rpartition(".")[2] for name in targets if name not in heads]
    if every and targets:
        keys.note_approximated("lora_target_modules", "lora_target_linear is set, so all linear layers get an adapter")
    found |= ({"use_rslora": True} if keys.take_bool("peft_use_rslora") else {}) | (
        {"use_dora": True} if keys.take_bool("peft_use_dora") else {}
    )
    if kind == "qlora" or four:
        found["load_in_4bit"] = True
        kwargs = keys.take_mapping("bnb_config_kwargs")
        if kwargs.take("bnb_4bit_use_double_quant", True) is False:
            found["bnb_4bit_use_double_quant"] = False
        if kwargs.take("bnb_4bit_quant_type", "nf4") != "nf4":
            kwargs.note_lost("bnb_4bit_quant_type", "the base is quantized to NF4")
        for key in list(kwargs.values):
            kwargs.add_note(key, "meaningless", "storage and compute precision follow the device")
    return {"method": "lora", "lora": found}


def _translate_data(keys: SourceKeys, folder: Path, steps: Steps) -> tuple[str, str | None, str]:
    """Translate the data; returns (training step, eval step, chat template)."""
    templates: list[str] = []
    named = str(keys.take("chat_template", "") or "")
    sources = _translate_datasets(keys, "datasets", folder, named, templates) or _translate_datasets(
        keys, "pretraining_dataset", folder, named, templates
    )
    if not sources:
        raise UserError(f"{TOOL}: datasets is missing; it lists the training data")
    rows = add_reading_steps(sources, steps)
    tests = _translate_datasets(keys, "test_datasets", folder, named, [])
    share = keys.take_number("val_set_size", 0)
    held_out: str | None = None
    if tests:
        held_out = add_reading_steps(tests, steps, "held-out")
        if share:
            keys.add_note("val_set_size", "meaningless", "test_datasets are the eval data")
    elif share > 0:
        rows, held_out = add_split_steps(rows, share, steps, keys, "val_set_size")
    if len(set(templates)) > 1:
        keys.note_lost(
            "datasets",
            f"datasets have different chat templates ({', '.join(sorted(set(templates)))}); the first is used for all",
        )
    return rows, held_out, templates[0] if templates else "keep"


def _translate_datasets(
    keys: SourceKeys, key: str, folder: Path, named: str, templates: list[str]
) -> list[DatasetSource]:
    """Translate the datasets under a key. `named`: the common template; `templates` collects that of each dataset."""
    entries = keys.take(key, [])
    if isinstance(entries, str):
        entries = [{"path": entries, "type": "pretrain"}]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{TOOL}: {key}: must be a list of datasets, each with path and type")
    found = []
    for number, entry in enumerate(entries):
        one = SourceKeys(entry, TOOL, f"{key}[{number}].", keys.notes)
        path, files = str(_require(one, "path")), one.take("data_files")
        kind = one.take("type", "pretrain" if key == "pretraining_dataset" else None)
        if isinstance(kind, dict):
            raise UserError(
                f"{TOOL}: {key}[{number}].type: custom prompt formats are not translated; convert its rows to messages"
                " and read them with data.chat"
            )
        base, _, style = str(kind).partition(":")
        base = base.partition(".")[0]
        if base not in FORMATS:
            raise UserError(
                f"{TOOL}: {key}[{number}].type: {kind!r} is not supported; supported are {', '.join(FORMATS)}"
            )
        ref = _translate_reference(path, files, key, number, folder, one)
        one.take("ds_type")
        part = one.take("split", "train")
        if part != "train":
            one.note_lost(
                "split",
                f"{part}; all rows are read: name a folder of the repository, or a file with only these rows",
            )
        if name := one.take("name"):
            ref = f"{ref}/{name}"
            one.note_approximated("name", f"{name} is taken as the repository folder with its files")
        found.append(DatasetSource(ref, FORMATS[base], text_field=str(one.take("field", "text"))))
        templates.append(_translate_template(one, base, style, named))
        _check_row_keys(one)
        one.note_lost_keys(
            {
                "shards shards_idx preprocess_shards": "all rows are read",
                "train_on_eos train_on_eot": "the stop token of every answer is trained on",
                "drop_system_message": "system turns are kept",
                "message_field_training_detail": "an answer is trained on as a whole, or not at all (weight 0)",
                "roles_to_train message_field_training": "answers are trained on, except those with weight 0",
                "revision": "a Hub name means its newest commit",
                "field_* split_thinking": "rows are recognized by their usual keys; rename them",
                "weight*": "all rows have the same weight",
            }
        )
        one.note_remaining()
    return found


def _translate_reference(path: str, files: Any, key: str, number: int, folder: Path, one: SourceKeys) -> str:
    """Translate path and data_files to a dataset reference."""
    if path in ("json", "parquet", "csv", "text") or files:
        files = [files] if isinstance(files, str) else files or []
        if len(files) != 1:
            raise UserError(
                f"{TOOL}: {key}[{number}].data_files: must be one file; list several files as several datasets"
            )
        ref = training.resolve_reference(
            str(files[0]) if path in ("json", "parquet", "csv", "text") else path, folder, dataset=True
        )
        if ref.startswith("hf:"):
            one.note_approximated("data_files", f"{files[0]}: all files of its folder are read")
            ref = f"{ref}/{Path(str(files[0])).parent}".removesuffix("/.")
        elif path not in ("json", "parquet", "csv", "text"):
            ref = f"{ref}/{files[0]}"
    else:
        ref = training.resolve_reference(path, folder, dataset=True)
    return ref


def _check_row_keys(one: SourceKeys) -> None:
    """Check the row keys; the usual ones need no note."""
    messages = one.take("field_messages", "messages")
    if messages not in ("messages", "conversations", "conversation"):
        raise UserError(
            f"{TOOL}: {one.path}field_messages: conversations are read from messages or conversations, not from"
            f" {messages!r}; rename it in the data"
        )
    mapping = one.take("message_property_mappings", {})
    role, content = (
        one.take("message_field_role", mapping.pop("role", "role")),
        one.take("message_field_content", mapping.pop("content", "content")),
    )
    if (role, content) not in (("role", "content"), ("from", "value")) or mapping:
        raise UserError(
            f"{TOOL}: {one.path}message_property_mappings: turns are read as role and content, or from and value;"
            " rename them in the data"
        )
    roles = one.take("roles", {})
    usual = {
        "user": {"human", "user"},
        "assistant": {"gpt", "assistant", "model"},
        "system": {"system"},
        "tool": {"tool"},
    }
    if isinstance(roles, dict) and not all(set(names) <= usual.get(ours, set()) for ours, names in roles.items()):
        one.note_lost("roles", "only the usual role names are read; rename others")
    if one.values.get("roles_to_train") == ["assistant"]:
        one.take("roles_to_train")
    if one.values.get("train_on_eos") == "turn":
        one.take("train_on_eos")


def _translate_template(one: SourceKeys, base: str, style: str, named: str) -> str:
    """Translate the chat template of one dataset."""
    requested = str(one.take("chat_template", "") or named)
    requested = str(one.take("conversation", "") or requested)
    if base in ("alpaca", "gpteacher"):
        if style:
            one.note_lost("type", f"the prompt style {style}; the default Alpaca style is used")
        one.note_approximated("type", "an input follows the instruction without a heading of its own")
        return "alpaca"
    if base in ("completion", "pretrain") or not requested or requested.startswith("tokenizer_default"):
        return "keep"
    ours = training.map_template(requested)
    if ours is None:
        one.note_approximated("chat_template", f"{requested}: the model's own template is used")
    return ours or "keep"


def _translate_special_tokens(keys: SourceKeys) -> None:
    special = keys.take_mapping("special_tokens")
    if special.take("pad_token"):
        special.add_note("pad_token", "meaningless", "there is no padding")
    for key in list(special.values):
        special.note_lost(key, "special tokens are those of the model's tokenizer")
