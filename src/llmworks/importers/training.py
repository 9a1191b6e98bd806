"""Shared translation of fine-tuning configurations: optimizers, precision, adapters, chat templates, references."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmworks.core.errors import UserError
from llmworks.importers.keys import SourceKeys

OPTIMIZERS = {
    "adamw": (
        "adamw adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adamw_torch_xla adamw_torch_npu_fused"
        " adamw_anyprecision optimi_adamw adam"
    ),
    "lion": "lion_32bit lion_pytorch",
    "muon": "muon",
}
EIGHT_BIT = {
    "adamw_8bit": "adamw_bnb_8bit adamw_8bit paged_adamw_8bit paged_adamw_32bit ao_adamw_8bit adamw_torch_8bit",
    "lion": "lion_8bit paged_lion_8bit paged_lion_32bit lion_bnb",
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
TEMPLATES = {
    "chatml": "chatml chatml_de qwen qwen2 qwen_25 qwen2_5 qwen-7b-chat qwen1.5 hermes",
    "alpaca": "alpaca",
    "llama-2": "llama2 llama-2 llama2_zh",
    "llama-3": "llama3 llama-3 llama3_2",
    "mistral": "mistral mistral_v1 inst mixtral",
    "mistral-v3": "mistral_v2v3 mistral_small ministral",
    "gemma": "gemma gemma2 gemma3 gemma_3",
    "phi": "phi phi3 phi_3 phi_35 phi-3",
    "zephyr": "zephyr",
}


def resolve_reference(path: str, folder: Path, *, dataset: bool = False) -> str:
    """Resolve a model or dataset to a reference: `path:` for existing or path-like names, `hf:` for Hub names."""
    if path.startswith(("asset:", "hf:", "path:")):  # already a reference
        return path
    here = Path(path).expanduser()
    for found in (here, folder / here):
        if found.exists():
            return f"path:{found.resolve()}"
    if path.startswith(("/", ".", "~")) or here.suffix in (".json", ".jsonl", ".parquet", ".csv", ".gguf"):
        return f"path:{here if here.is_absolute() else folder.resolve() / here}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", path):
        raise UserError(f"{path!r} is neither a local file nor ORG/NAME on the Hub")
    return f"hf:datasets/{path}" if dataset else f"hf:{path}"


def map_template(name: str) -> str | None:
    """Map a chat template name to the built-in one; None if there is none."""
    return next((ours for ours, theirs in TEMPLATES.items() if name in theirs.split()), None)


def translate_optimizer(
    keys: SourceKeys, name_key: str, schedule_key: str, *, rate: float | None, warmup: float, schedule: str
) -> dict[str, Any]:
    """Translate the optimizer fields. `rate`, `warmup`, `schedule`: the tool's defaults."""
    found: dict[str, Any] = {}
    name = str(keys.take(name_key, "adamw_torch"))
    ours = next((k for k, v in OPTIMIZERS.items() if name in v.split()), None)
    eight = next((k for k, v in EIGHT_BIT.items() if name in v.split()), None)
    if ours is None and eight is None:
        keys.note_lost(name_key, f"{name}; adamw is used")
    elif ours is None:
        keys.note_approximated(
            name_key,
            f"{name} is {str(eight).removesuffix('_8bit')} with full-precision moments here"
            + ("; set name to adamw_8bit on a GPU" if eight == "adamw_8bit" else ""),
        )
        ours = str(eight).removesuffix("_8bit")
    if (ours or "adamw") != "adamw":
        found["name"] = ours
    learning_rate = keys.take_number("learning_rate", rate)
    if learning_rate is None:
        raise UserError(f"{keys.tool}: learning_rate is missing")
    found["learning_rate"] = float(learning_rate)
    scheduler = str(keys.take(schedule_key, schedule))
    if scheduler not in SCHEDULES:
        keys.note_lost(schedule_key, f"{scheduler}; cosine is used")
    ours = SCHEDULES.get(scheduler, "cosine")
    if ours != "cosine":
        found["lr_scheduler_type"] = ours
    if ours != "constant":
        found["min_lr_ratio"] = float(keys.take_number("cosine_min_lr_ratio", 0.0))
    _translate_warmup(keys, scheduler, found, warmup)
    for theirs, name in (
        ("weight_decay", "weight_decay"),
        ("adam_beta1", "beta1"),
        ("adam_beta2", "beta2"),
        ("max_grad_norm", "max_grad_norm"),
    ):
        value = keys.take_number(theirs)
        if value is not None and (name != "max_grad_norm" or value > 0):
            found[name] = float(value)
        elif value is not None:
            keys.note_lost(theirs, "gradient norm clipping cannot be disabled; the default is 1")
    keys.note_lost_keys(
        {
            "adam_epsilon adam_beta3": "the optimizer's other constants are torch's defaults",
            "lr_scheduler_kwargs optim_args optim_target_modules lr_quadratic_warmup cosine_constant_lr_ratio"
            " lr_div_factor lr_groups embedding_lr embedding_lr_scale": "all weights have one learning rate schedule",
        },
        harmless=(1e-8,),
    )
    return found


def _translate_warmup(keys: SourceKeys, scheduler: str, fields: dict[str, Any], warmup: float) -> None:
    """Set the warmup ratio."""
    ratio, steps = keys.take_number("warmup_ratio"), keys.take_number("warmup_steps")
    if steps and steps < 1 and not ratio:  # transformers accepts a fraction here
        ratio, steps = steps, None
    if scheduler == "constant":
        fields["warmup_ratio"] = 0.0
    elif ratio is not None:
        fields["warmup_ratio"] = float(ratio)
    elif steps:
        keys.note_approximated(
            "warmup_steps", f"{steps} steps; here warmup is a fraction of all steps, and 0.05 is used"
        )
    else:
        fields["warmup_ratio"] = 0.0 if steps == 0 else warmup


def translate_precision(keys: SourceKeys) -> None:
    """Translate bf16 and fp16; precision follows the device here."""
    for key in ("bf16", "fp16", "bfloat16", "float16"):
        value = keys.take(key)
        if value not in (None, False, "auto", "false"):
            keys.note_approximated(key, "precision is auto: bf16 or fp16 where the device supports it, fp32 on CPU")


def translate_sharding(keys: SourceKeys, reason: str) -> dict[str, Any]:
    """Translate FSDP and DeepSpeed ZeRO stages to data parallelism. `reason`: why not to use fsdp, or ""."""
    settings = {
        key: keys.take(key)
        for key in list(keys.values)
        if key in ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "dp_shard_size", "deepspeed_plugin")
        or key.startswith("fsdp_")
    }
    named = {key: value for key, value in settings.items() if value not in (False, [], {})}
    if not named:
        return {}
    shards = not reason and any(
        not (key == "deepspeed" and re.search(r"z(ero)?_?[01](?![0-9])", str(value))) for key, value in named.items()
    )
    for key in named:
        keys.note_approximated(
            key,
            "with several processes (--nproc, torchrun) weights are"
            f" {'sharded by FSDP2' if shards else 'replicated by DDP'}{f', since {reason}' if reason else ''};"
            " offloading and other options are ignored",
        )
    return {"parallel": {"data_parallel": "fsdp"}} if shards else {}


def translate_evaluation(keys: SourceKeys, has_eval_data: bool) -> dict[str, Any]:
    """Translate evaluation during training, checkpoints, best-model selection and early stopping."""
    found: dict[str, Any] = {}
    every, per_epoch = keys.take_number("eval_steps"), keys.take_number("evals_per_epoch")
    if not has_eval_data:
        for key, value in (("eval_steps", every), ("evals_per_epoch", per_epoch)):
            if value:
                keys.add_note(key, "meaningless", "there is no eval data")
    elif every and every >= 1:
        found["eval_steps"] = int(every)
    elif every or per_epoch:
        keys.note_approximated(
            "eval_steps" if every else "evals_per_epoch",
            "evaluation runs every 50 steps; change it with eval_steps",
        )
        found["eval_steps"] = 50
    saves = keys.take_number("save_steps")
    if saves and saves >= 1:
        found["save_steps"] = int(saves)
    elif saves:
        keys.add_note("save_steps", "meaningless", "a fraction of all steps; here save_steps is a number of steps")
    patience, best = (
        keys.take_number("early_stopping_patience", keys.take_number("early_stopping_steps")),
        keys.take_bool("load_best_model_at_end"),
    )
    metric = keys.take("metric_for_best_model")
    if metric not in (None, "loss", "eval_loss"):
        keys.note_lost("metric_for_best_model", f"{metric}; the best model has the lowest eval loss")
    keys.take("greater_is_better")
    if patience or best:
        if not has_eval_data:
            keys.note_lost(
                "early_stopping_patience" if patience else "load_best_model_at_end",
                "there is no eval data",
            )
            return found
        found |= {"metric_for_best_model": "eval_loss"} | (
            {"early_stopping_patience": int(patience)} if patience else {}
        )
        found.setdefault("eval_steps", 50)
    strategies = [keys.take(key) for key in ("eval_strategy", "evaluation_strategy")]
    if has_eval_data and "epoch" in strategies and "eval_steps" not in found:
        keys.note_approximated("eval_strategy", "evaluation runs every 50 steps; change it with eval_steps")
        found["eval_steps"] = 50
    return found


def translate_loop(keys: SourceKeys, has_eval_data: bool, four_bits: bool) -> dict[str, Any]:
    """Translate evaluation, checkpoints and data parallelism."""
    found = translate_evaluation(keys, has_eval_data)
    return found | translate_sharding(
        keys,
        (
            "best-model selection needs unsharded weights"
            if "metric_for_best_model" in found
            else "a 4-bit base is not sharded"
            if four_bits
            else ""
        ),
    )


def translate_adapter(
    keys: SourceKeys, rank: str, *, default_rank: int, default_alpha: float | None, dropout: float
) -> dict[str, Any]:
    """Translate the LoRA fields that both tools share.

    `rank`: key of the LoRA rank; `default_alpha`: None = twice the rank.
    """
    size = keys.take_int(rank, default_rank)
    alpha = keys.take_number("lora_alpha", 2 * size if default_alpha is None else default_alpha)
    found: dict[str, Any] = {"r": size, "lora_alpha": float(alpha)}
    drop = keys.take_number("lora_dropout", dropout)
    if drop:
        found["lora_dropout"] = float(drop)
    faster = keys.take_number("loraplus_lr_ratio")
    if faster:
        found["loraplus_lr_ratio"] = float(faster)
    return found
