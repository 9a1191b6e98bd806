"""Translate a LLaMA-Factory YAML configuration to recipe steps (see its src/llamafactory/hparams, data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmworks.core.errors import UserError
from llmworks.importers import training
from llmworks.importers.datasets import DatasetSource, Steps, add_reading_steps, add_split_steps
from llmworks.importers.keys import SourceKeys

TOOL = "LLaMA-Factory"
PROMPT = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
    "messages": "conversations",
    "tools": "tools",
}
TAGS = (
    {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "system_tag": "system",
        "observation_tag": "observation",
        "function_tag": "function_call",
    },
    {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "tool",
        "function_tag": "function_call",
    },
)
LOST_KEYS = {
    "adapter_name_or_path": "training starts with a new adapter; merge the old one first with merge.adapter",
    "additional_target modules_to_save": "only the adapter is trained; embeddings and LM head stay frozen",
    "loraplus_lr_embedding": "embeddings have no adapter here",
    "pissa_* create_new_adapter": "adapters use LoRA's default random initialization",
    "max_steps": "training length is set by num_train_epochs",
    "train_on_prompt": "only answers are trained on",
    "streaming mix_strategy interleave_probs": "all rows of all datasets are read and shuffled",
    "use_galore galore_* use_apollo apollo_* use_badam badam_* use_adam_mini": "the optimizer is adamw, lion or muon",
    "use_llama_pro use_dft_loss use_asft_loss use_eaft_loss *_loss_* mixture_of_depths moe_aux_loss_coef": (
        "the loss is cross-entropy of the unmodified model"
    ),
    "new_special_tokens* add_tokens add_special_tokens resize_vocab init_special_tokens": (
        "the vocabulary is not changed"
    ),
    "rope_scaling model_revision": "the model is trained with the configuration in its files",
    "tool_format default_system enable_thinking preserve_thinking": "the chat template renders tools and turns",
    "image_* video_* audio_* media_dir freeze_vision_tower freeze_multi_modal_projector": "only text is supported",
    "label_smoothing_factor": "the loss is cross-entropy",
    "fp8 fp8_* enable_fp8* use_kt* quantization_device_map": "precision follows the device",
    "eval_num_beams eval_on_each_dataset": "eval data is evaluated as one set",
}


def translate(values: dict[str, Any], folder: Path) -> tuple[Steps, int, SourceKeys]:
    """Translate a configuration; returns (steps, seed, the keys with notes on each).

    Relative paths start at `folder`. UserError when it is not supervised fine-tuning, or names no model or data.
    """
    keys = SourceKeys(values, TOOL)
    stage, method = str(keys.take("stage", "sft")), str(keys.take("finetuning_type", "lora"))
    if stage not in ("sft", "pt"):
        raise UserError(f"{TOOL}: stage: {stage!r} is not supervised fine-tuning; sft and pt are translated")
    if method not in ("lora", "full"):
        raise UserError(
            f"{TOOL}: finetuning_type: {method!r} is not translated; lora and full are"
            + ("; for freeze use method: full and list the frozen modules in freeze" if method == "freeze" else "")
        )
    model = keys.take("model_name_or_path")
    if model is None:
        raise UserError(f"{TOOL}: model_name_or_path is missing")
    steps: Steps = {"base": {"use": training.resolve_reference(str(model), folder)}}
    train, held_out = _translate_data(keys, folder, steps, stage)
    config: dict[str, Any] = {"method": method, **({"lora": _translate_adapter(keys)} if method == "lora" else {})}
    if method == "full":
        for key in [key for key in keys.values if key.startswith("lora_")]:
            keys.take(key)
            keys.add_note(key, "meaningless", "there is no adapter")
    config |= {
        "num_train_epochs": float(keys.take_number("num_train_epochs", 3)),
        "batch_size": keys.take_int("per_device_train_batch_size", 8),
        "max_length": keys.take_int("cutoff_len", 2048),
        "overlong": "truncate",
    }
    accumulation = keys.take_int("gradient_accumulation_steps", 1)
    if accumulation > 1:
        config["gradient_accumulation_steps"] = int(accumulation)
    if keys.take_bool("mask_history"):
        config["train_on"] = "last_assistant"
    _translate_template(keys, config, stage)
    noise = keys.take_number("neftune_noise_alpha")
    if noise:
        config["neftune_noise_alpha"] = float(noise)
    if keys.take_bool("gradient_checkpointing"):
        config["gradient_checkpointing"] = True
    _translate_packing(keys, stage, config)
    training.translate_precision(keys)
    config |= training.translate_loop(keys, held_out is not None, config.get("lora", {}).get("load_in_4bit", False))
    config["optimizer"] = training.translate_optimizer(
        keys, "optim", "lr_scheduler_type", rate=5e-5, warmup=0.0, schedule="linear"
    )
    if keys.values.get("do_train", True) is False:
        raise UserError(f"{TOOL}: do_train is false: no training; run evaluations with `llmworks evaluate`")
    keys.note_lost_keys(LOST_KEYS, harmless=(False, 0, -1))
    seed = keys.take_int("seed", 42)
    steps["tuned"] = {
        "stage": "train.sft",
        "inputs": {"model": "base", "data": train, **({"eval_data": held_out} if held_out else {})},
        "config": config,
    }
    return steps, seed, keys


def _translate_packing(keys: SourceKeys, stage: str, config: dict[str, Any]) -> None:
    """Record how packing is translated."""
    packing, neat = keys.take("packing", stage == "pt"), keys.take("neat_packing")
    if packing or neat:
        keys.note_approximated(
            "packing",
            f"packed rows have {config['max_length']} tokens{'' if neat else ' and attend across sequences'}; here a"
            " row is one sequence, so a step has fewer tokens: raise batch_size to match",
        )


def _translate_adapter(keys: SourceKeys) -> dict[str, Any]:
    found = training.translate_adapter(keys, "lora_rank", default_rank=8, default_alpha=None, dropout=0.0)
    targets = keys.take_names("lora_target") or ["all"]
    if "all" not in targets:
        found["target_modules"] = [name.rpartition(".")[2] for name in targets]
    found |= ({"use_rslora": True} if keys.take_bool("use_rslora") else {}) | (
        {"use_dora": True} if keys.take_bool("use_dora") else {}
    )
    bits, method = keys.take_number("quantization_bit"), keys.take("quantization_method", "bnb")
    if bits == 4:
        found["load_in_4bit"] = True
        if method not in ("bitsandbytes", "bnb"):
            keys.note_lost("quantization_method", f"{method}; the base is quantized to NF4")
        if keys.take("quantization_type", "nf4") != "nf4":
            keys.note_lost("quantization_type", "the base is quantized to NF4")
        if keys.take("double_quantization", True) is False:
            found["bnb_4bit_use_double_quant"] = False
    elif bits:
        keys.note_lost(
            "quantization_bit", f"{bits} bits; the frozen base keeps its precision, load_in_4bit quantizes it to NF4"
        )
    return found


def _translate_template(keys: SourceKeys, config: dict[str, Any], stage: str) -> None:
    name = keys.take("template")
    if name is None or stage == "pt":
        return
    if name in ("empty", "default", "fewshot", "vicuna"):
        keys.note_lost("template", f"{name} is not supported; the model's own chat template is used")
        return
    ours = training.map_template(str(name))
    if ours is None:
        keys.note_approximated("template", f"{name}: the model's own chat template is used")
        return
    if str(name).startswith("qwen"):
        keys.note_approximated("template", f"{name}: its default system turn is not added")
    config |= {"chat_template": ours, "golden": f"renew: {TOOL}'s configuration asks for {name}"}


def _translate_data(keys: SourceKeys, folder: Path, steps: Steps, stage: str) -> tuple[str, str | None]:
    """Translate the data; returns (training step, eval step)."""
    place = Path(str(keys.take("dataset_dir", "data")))
    info = _read_dataset_info(
        keys,
        next(
            (
                found
                for found in (place, folder / place, folder.parent / place, folder.parent.parent / place)
                if (found / "dataset_info.json").is_file()
            ),
            None,
        ),
    )
    limit = int(keys.take_number("max_samples", 0))
    names = keys.take_names("dataset")
    if not names:
        raise UserError(f"{TOOL}: dataset is missing; it names the training data")
    if limit:
        keys.note_approximated("max_samples", f"{limit} rows of each dataset are sampled, instead of the first ones")
    rows = add_reading_steps(
        [_translate_dataset(keys, name, info, place, folder, stage, limit) for name in names], steps
    )
    others, share = keys.take_names("eval_dataset"), keys.take_number("val_size", 0)
    if others:
        return rows, add_reading_steps(
            [_translate_dataset(keys, name, info, place, folder, stage, limit) for name in others], steps, "held-out"
        )
    return add_split_steps(rows, share, steps, keys, "val_size") if share else (rows, None)


def _read_dataset_info(keys: SourceKeys, place: Path | None) -> dict[str, Any]:
    """Read `dataset_info.json`; its folder is stored under ''."""
    if place is None:
        return {}
    try:
        found = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{place / 'dataset_info.json'}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{place / 'dataset_info.json'}: must be a mapping of datasets")
    return found | {"": str(place)}


def _translate_dataset(
    keys: SourceKeys, name: str, info: dict[str, Any], place: Path, folder: Path, stage: str, limit: int
) -> DatasetSource:
    """Translate one named dataset by its entry in `dataset_info.json`."""
    usual = "text" if stage == "pt" else "auto"
    if not info:
        keys.note_approximated(
            "dataset",
            f"{name}: {place}/dataset_info.json not found, so its file path is guessed; correct it in the recipe",
        )
        return DatasetSource(f"path:{folder.resolve() / place / f'{name}.json'}", usual, max_rows=limit)
    if name not in info or not name:
        raise UserError(f"{TOOL}: dataset: {name!r} is not in {info['']}/dataset_info.json")
    one = SourceKeys(dict(info[name]), TOOL, f"dataset {name}: ", keys.notes)
    if one.take_bool("ranking"):
        raise UserError(f"{TOOL}: dataset: {name!r} holds preference pairs, which fine-tuning does not use")
    hub, file = one.take("hf_hub_url"), one.take("file_name")
    if file is not None:
        ref = training.resolve_reference(str(Path(info[""]) / str(file)), folder, dataset=True)
    elif hub is not None:
        ref = training.resolve_reference(str(hub), folder, dataset=True)
    else:
        raise UserError(f"{TOOL}: dataset: {name!r} has neither hf_hub_url nor file_name")
    shape = (
        "text"
        if stage == "pt"
        else {"alpaca": "alpaca", "sharegpt": "auto", "openai": "auto"}.get(
            str(one.take("formatting", "alpaca")), "auto"
        )
    )
    if sub := one.take("folder", one.take("subset")):
        ref = f"{ref}/{sub}"
    columns, tags = one.take("columns", {}), one.take("tags", {})
    text = str(columns.get("prompt", "instruction")) if shape == "text" else "text"
    if shape != "text":
        odd = [
            f"{key}: {value}"
            for key, value in columns.items()
            if value not in (PROMPT.get(key), "messages" if key == "messages" else None)
        ]
        odd += [f"{key}: {value}" for key, value in tags.items() if value not in [known.get(key) for known in TAGS]]
        if odd:
            raise UserError(
                f"{TOOL}: dataset {name!r}: {', '.join(odd)}: rows are recognized by their usual keys; rename them in"
                " the data"
            )
    for key in ("ms_hub_url", "om_hub_url"):
        one.take(key)
    if "num_samples" in one:
        limit = int(one.take_number("num_samples", 0))
    part = one.take("split", "train")
    if part != "train":
        one.note_lost("split", f"{part}; all rows are read")
    one.note_remaining()
    return DatasetSource(ref, shape, text_field=text, max_rows=limit)
