"""Axolotl's YAML as steps of a recipe (its configuration reference: docs/config.qmd, docs/dataset-formats).

Knows its keys; writes no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmworks.core.errors import UserError
from llmworks.importers import training
from llmworks.importers.datasets import Source, Steps, read, split
from llmworks.importers.keys import Keys

TOOL = "Axolotl"
SHAPES = {
    "alpaca": "alpaca",
    "gpteacher": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": "auto",
    "completion": "text",
    "pretrain": "text",
}
OTHER_METHODS = "rl reward_model process_reward_model"
LOST = {
    "lora_modules_to_save": "only the adapter is trained; embeddings and head stay as they are",
    "peft_layers_to_transform peft_layers_pattern peft_layer_replication lora_layers_to_transform": (
        "an adapter stands at every layer of the chosen names"
    ),
    "peft_init_lora_weights peft peft_autocast_adapter_dtype loftq*": (
        "an adapter begins at random, as LoRA's paper has it"
    ),
    "loraplus_lr_embedding": "embeddings have no adapter",
    "relora* jagged_restart*": "adapters are not folded in on the way",
    "lora_model_dir": "training begins with a new adapter; fold the old one in first, with merge.adapter",
    "max_steps": "the length is told by epochs",
    "noisy_embedding_alpha": "is neftune_noise_alpha's old name: set neftune",
    "tokens added_tokens_overrides resize_token_embeddings_to_32x shrink_embeddings mean_resizing_embeddings": (
        "the vocabulary stays as it is"
    ),
    "default_system_message eot_tokens chat_template_jinja": "the template is one of ours, or the model's own",
    "overrides_of_model_config overrides_of_model_kwargs rope_scaling random_init_weights": (
        "the model is trained as its files have it"
    ),
    "unfrozen_parameters": "set freeze to what is to stay as it is",
    "curriculum_sampling shuffle_merged_datasets": "rows are shuffled in every epoch",
    "dataset_exact_deduplication": "set repeated: drop at data.chat",
    "qat quantization": "a model is quantized after its training, by the stages quantize.*",
    "gptq gptq_* load_in_8bit": "the frozen base is kept as it is; in 4 bits with base: nf4",
    "revision_of_model": "a name on the Hub means its newest commit",
    "min_sample_len": "short rows are learned, too",
    "dataset_shard_num dataset_shard_idx": "all rows are read",
    "use_eaft eaft_* use_dynamic_finetuning": "the loss is cross-entropy",
}


def translate(values: dict[str, Any], folder: Path) -> tuple[Steps, int, Keys]:
    """(steps, seed, the keys with what became of each).

    `folder`: where paths begin. UserError for what is no fine-tuning, or names no model or data.
    """
    keys = Keys(values, TOOL)
    for key in OTHER_METHODS.split():
        if (value := keys.take(key)) not in (None, False):
            raise UserError(f"{TOOL}: {key}: {value!s} is no supervised fine-tuning; only those are translated")
    steps: Steps = {"base": {"use": training.source(str(_needed(keys, "base_model")), folder)}}
    train, held_out, template = _data(keys, folder, steps)
    config: dict[str, Any] = _method(keys)
    config |= {
        "num_train_epochs": float(keys.number("num_epochs", 1)),
        "batch_size": keys.whole("micro_batch_size", 1),
        "max_length": keys.whole("sequence_len", 512),
    }
    if keys.values.get("sample_packing"):
        keys.otherwise(
            "micro_batch_size",
            f"counted packed sequences of {config['max_length']} tokens; here it counts rows, so that a step learns"
            " less: raise batch_size to what fills as many tokens",
        )
    accumulation = keys.whole("gradient_accumulation_steps", 1)
    total = keys.whole("batch_size")
    if total:
        accumulation = max(1, total // config["batch_size"])
    if accumulation > 1:
        config["gradient_accumulation_steps"] = int(accumulation)
    strategy = str(keys.take("excess_length_strategy", "drop"))
    if strategy != "drop":
        config["overlong"] = "truncate" if strategy == "truncate" else "error"
    if template != "keep":
        config |= {"chat_template": template, "golden": f"renew: {TOOL}'s configuration asks for {template}"}
    noise = keys.number("neftune_noise_alpha")
    if noise:
        config["neftune_noise_alpha"] = float(noise)
    if keys.take("gradient_checkpointing") not in (None, False):
        config["gradient_checkpointing"] = True
    training.precision(keys)
    if keys.flag("train_on_inputs"):
        keys.lost("train_on_inputs", "only answers are learned")
    config |= training.loop(keys, held_out is not None, config.get("lora", {}).get("load_in_4bit", False))
    config["optimizer"] = training.optimizer(
        keys, "optimizer", "lr_scheduler", rate=None, warmup=0.03, schedule="cosine"
    )
    _special_tokens(keys)
    keys.lose(LOST)
    seed = keys.whole("seed", 42)
    steps["tuned"] = {
        "stage": "train.sft",
        "inputs": {"model": "base", "data": train, **({"eval_data": held_out} if held_out else {})},
        "config": config,
    }
    return steps, seed, keys


def _needed(keys: Keys, key: str) -> Any:
    value = keys.take(key)
    if value is None:
        raise UserError(f"{keys.tool}: {keys.path}{key} is missing")
    return value


def _method(keys: Keys) -> dict[str, Any]:
    """The method, and the adapter where there is one."""
    kind = keys.take("adapter")
    four = keys.flag("load_in_4bit")
    if kind is None:
        if four:
            keys.lost("load_in_4bit", "without an adapter all weights are trained, which cannot be kept in 4 bits")
        for key in [
            key
            for key in keys.values
            if key.startswith("lora_") and not key.endswith("_kernel") and key != "lora_on_cpu"
        ]:
            keys.note(key, "meaningless", "there is no adapter")
            keys.take(key)
        return {"method": "full"}
    if kind not in ("lora", "qlora"):
        raise UserError(f"{TOOL}: adapter: {kind!r} is not trained here; lora and qlora are")
    found = training.adapter(keys, "lora_r", default_rank=8, default_alpha=16, dropout=0.0)
    targets, every = keys.words("lora_target_modules"), keys.flag("lora_target_linear")
    if targets == ["all-linear"]:
        targets, every = [], True
    if not targets and not every:
        keys.otherwise("lora_target_modules", "nothing is said, so peft adapts q_proj and v_proj of most models")
        targets = ["q_proj", "v_proj"]
    if targets and not every:
        heads = [name for name in targets if name in ("lm_head", "embed_tokens")]
        if heads:
            keys.lost("lora_target_modules", f"{', '.join(heads)}: embeddings and head have no adapter here")
        if any(set(name) & set("^$*()[]\\") for name in targets):
            raise UserError(f"{TOOL}: lora_target_modules: a pattern is not translated; name the layers")
        found["target_modules"] = [name.rpartition(".")[2] for name in targets if name not in heads]
    if every and targets:
        keys.otherwise("lora_target_modules", "lora_target_linear is set, so all linear layers are adapted")
    found |= ({"use_rslora": True} if keys.flag("peft_use_rslora") else {}) | (
        {"use_dora": True} if keys.flag("peft_use_dora") else {}
    )
    if kind == "qlora" or four:
        found["load_in_4bit"] = True
        kwargs = keys.inner("bnb_config_kwargs")
        if kwargs.take("bnb_4bit_use_double_quant", True) is False:
            found["bnb_4bit_use_double_quant"] = False
        if kwargs.take("bnb_4bit_quant_type", "nf4") != "nf4":
            kwargs.lost("bnb_4bit_quant_type", "the base is kept in nf4")
        for key in list(kwargs.values):
            kwargs.note(key, "meaningless", "how numbers are kept and computed follows the device")
    return {"method": "lora", "lora": found}


def _data(keys: Keys, folder: Path, steps: Steps) -> tuple[str, str | None, str]:
    """(the step that is trained on, the one that is held out, the template)."""
    templates: list[str] = []
    named = str(keys.take("chat_template", "") or "")
    sources = _sources(keys, "datasets", folder, named, templates) or _sources(
        keys, "pretraining_dataset", folder, named, templates
    )
    if not sources:
        raise UserError(f"{TOOL}: datasets is missing; it names what is learned from")
    rows = read(sources, steps)
    tests = _sources(keys, "test_datasets", folder, named, [])
    share = keys.number("val_set_size", 0)
    held_out: str | None = None
    if tests:
        held_out = read(tests, steps, "held-out")
        if share:
            keys.note("val_set_size", "meaningless", "test_datasets are held out")
    elif share > 0:
        rows, held_out = split(rows, share, steps, keys, "val_set_size")
    if len(set(templates)) > 1:
        keys.lost(
            "datasets",
            f"each set has a template of its own ({', '.join(sorted(set(templates)))}); the first is used for all",
        )
    return rows, held_out, templates[0] if templates else "keep"


def _sources(keys: Keys, key: str, folder: Path, named: str, templates: list[str]) -> list[Source]:
    """The data sets under a key. `named`: the template for all; `templates` takes that of each."""
    entries = keys.take(key, [])
    if isinstance(entries, str):
        entries = [{"path": entries, "type": "pretrain"}]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{TOOL}: {key}: must be a list of data sets, each with path and type")
    found = []
    for number, entry in enumerate(entries):
        one = Keys(entry, TOOL, f"{key}[{number}].", keys.notes)
        path, files = str(_needed(one, "path")), one.take("data_files")
        kind = one.take("type", "pretrain" if key == "pretraining_dataset" else None)
        if isinstance(kind, dict):
            raise UserError(
                f"{TOOL}: {key}[{number}].type: a prompt of its own is not translated; write its rows as messages, and"
                " read them with data.chat"
            )
        base, _, style = str(kind).partition(":")
        base = base.partition(".")[0]
        if base not in SHAPES:
            raise UserError(f"{TOOL}: {key}[{number}].type: {kind!r} is not translated; {', '.join(SHAPES)} are")
        ref = _reference(path, files, key, number, folder, one)
        one.take("ds_type")
        part = one.take("split", "train")
        if part != "train":
            one.lost(
                "split",
                f"{part}; all rows are read: name a folder of the repository, or a file with the rows that are meant",
            )
        if name := one.take("name"):
            ref = f"{ref}/{name}"
            one.otherwise("name", f"{name} is taken as the folder of the repository that has its files")
        found.append(Source(ref, SHAPES[base], text=str(one.take("field", "text"))))
        templates.append(_template(one, base, style, named))
        _conversation(one)
        one.lose(
            {
                "shards shards_idx preprocess_shards": "all rows are read",
                "train_on_eos train_on_eot": "the end of every answer is learned",
                "drop_system_message": "system turns stay",
                "message_field_training_detail": "an answer is learned whole, or not (weight 0)",
                "roles_to_train message_field_training": "answers are learned, but those whose weight is 0",
                "revision": "a name on the Hub means its newest commit",
                "field_* split_thinking": "rows are recognised by their usual keys; rename them",
                "weight*": "every row counts once",
            }
        )
        one.finish()
    return found


def _reference(path: str, files: Any, key: str, number: int, folder: Path, one: Keys) -> str:
    """The reference of a data set that a path and files name."""
    if path in ("json", "parquet", "csv", "text") or files:
        files = [files] if isinstance(files, str) else files or []
        if len(files) != 1:
            raise UserError(f"{TOOL}: {key}[{number}].data_files: name one file; several are several data sets")
        ref = training.source(
            str(files[0]) if path in ("json", "parquet", "csv", "text") else path, folder, dataset=True
        )
        if ref.startswith("hf:"):
            one.otherwise("data_files", f"{files[0]}: all files of its folder are read")
            ref = f"{ref}/{Path(str(files[0])).parent}".removesuffix("/.")
        elif path not in ("json", "parquet", "csv", "text"):
            ref = f"{ref}/{files[0]}"
    else:
        ref = training.source(path, folder, dataset=True)
    return ref


def _conversation(one: Keys) -> None:
    """Keys of rows: the usual ones need no word."""
    messages = one.take("field_messages", "messages")
    if messages not in ("messages", "conversations", "conversation"):
        raise UserError(
            f"{TOOL}: {one.path}field_messages: conversations are looked for in messages and conversations, not in"
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
        one.lost("roles", "roles are read by their usual names; rename others")
    if one.values.get("roles_to_train") == ["assistant"]:
        one.take("roles_to_train")
    if one.values.get("train_on_eos") == "turn":
        one.take("train_on_eos")


def _template(one: Keys, base: str, style: str, named: str) -> str:
    """The template of one data set."""
    told = str(one.take("chat_template", "") or named)
    told = str(one.take("conversation", "") or told)
    if base in ("alpaca", "gpteacher"):
        if style:
            one.lost("type", f"the {style} style of its prompt; Alpaca's own is used")
        one.otherwise("type", "where a row has an input, it follows the instruction without a heading of its own")
        return "alpaca"
    if base in ("completion", "pretrain") or not told or told.startswith("tokenizer_default"):
        return "keep"
    ours = training.template(told)
    if ours is None:
        one.otherwise("chat_template", f"{told}: the model's own template is used")
    return ours or "keep"


def _special_tokens(keys: Keys) -> None:
    special = keys.inner("special_tokens")
    if special.take("pad_token"):
        special.note("pad_token", "meaningless", "nothing is padded")
    for key in list(special.values):
        special.lost(key, "the tokens are those of the model's tokenizer")
