"""The keys of another tool's configuration, each of which must be accounted for: translated, done otherwise, without meaning here, or lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from llmworks.core.errors import UserError

Fate = Literal["otherwise", "lost", "meaningless", "unknown"]
HEADINGS: dict[Fate, str] = {
    "lost": "Lost: it changes what is learned, and there is nothing like it here",
    "otherwise": "Done otherwise",
    "meaningless": "Without meaning here",
    "unknown": "Not known to this translation",
}

MEANINGLESS = {
    "wandb_* mlflow_* hf_mlflow_* comet_* trackio_* swanlab_* use_wandb use_comet use_tensorboard use_swanlab report_to run_name project trackio_space_id": "metrics go to trackers with --track",
    "output_dir overwrite_output_dir dataset_prepared_path overwrite_cache tokenized_path cache_dir dataset_keep_in_memory export_*": "what is made lies in the workspace, and nothing is made twice",
    "flash_attention xformers_attention sdp_attention s2_attention flex_attention eager_attention flash_attn flash_attn_* attn_implementation use_cache": "attention is fused where the device can",
    "sample_packing eval_sample_packing pad_to_sequence_len group_by_length neat_packing batch_flattening multipack_* sample_packing_* sample_pack_* pad_to_multiple_of total_num_tokens": "rows are joined without padding, and do not see one another",
    "logging_* log_level* plot_loss include_tokens_per_second include_num_input_tokens_seen include_effective_tokens_per_second eval_table_size eval_max_new_tokens debug profiler_* disable_tqdm": "every step is recorded, and the report shows it",
    "save_total_limit save_strategy saves_per_epoch save_only_model save_safetensors save_first_step resume_from_checkpoint auto_resume_from_checkpoints skip_memory_metrics": "a run that was killed goes on by itself",
    "trust_remote_code model_type tokenizer_type tokenizer_use_fast use_fast_tokenizer tokenizer_legacy is_*_derived_model base_model_ignore_patterns base_model_config tokenizer_config processor_type": "the model's files say what it is; code of others is never run",
    "hub_* push_to_hub* push_dataset_to_hub hf_use_auth_token hf_hub_token ms_hub_token om_hub_token use_auth_token": "nothing is sent anywhere",
    "dataset_processes dataset_num_proc preprocessing_num_workers preprocessing_batch_size dataloader_* buffer_size": "processes that prepare data are given by --workers",
    "ddp_* local_rank ray_* use_ray num_workers nproc master_* device_map max_memory placement_strategy resources_per_worker": "processes that train together are given by --nproc or torchrun",
    "lora_*_kernel unsloth_* use_unsloth use_unsloth_gc liger_* enable_liger_kernel plugins cut_cross_entropy fused_* chunked_cross_entropy* shift_attn": "an adapter is one operation with its layer, and logits exist a few hundred tokens at a time",
    "torch_compile* tf32 bf16_full_eval fp16_full_eval low_cpu_mem_usage gpu_memory_limit lora_on_cpu embeddings_skip_upcast upcast_layernorm upcast_lmhead_output pure_bf16 disable_gradient_checkpointing_kwargs gradient_checkpointing_kwargs offload_folder lora_fan_in_fan_out": "how numbers are kept and computed follows the device",
    "do_train do_eval do_predict predict_with_generate per_device_eval_batch_size eval_batch_size strict auto_find_batch_size seed_everything infer_backend remove_unused_columns": "the recipe's steps say what is done",
    "loss_watchdog_threshold loss_watchdog_patience": "a run ends when the loss is no number, and says so when it rises steeply",
}  # names, with *, and why they say nothing here


@dataclass(frozen=True)
class Note:
    """What became of one key."""

    key: str
    fate: Fate
    text: str


@dataclass
class Keys:
    """A mapping whose keys are taken one by one; keys without a value count as absent. `path`: where it stands, before a key's name in notes and errors."""

    values: dict[str, Any]
    tool: str
    path: str = ""
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = {str(key): value for key, value in self.values.items() if value is not None and value != "" and value != []}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key that is translated."""
        return self.values.pop(key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """The number of a key, whole where it is. UserError for anything else."""
        value = self.take(key, default)
        if value is None:
            return None
        try:
            found = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a number") from None
        if isinstance(value, bool) or found != found or abs(found) == float("inf"):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a number")
        return int(found) if found == int(found) and not (isinstance(value, float) or "." in str(value) or "e" in str(value).lower()) else found

    def whole(self, key: str, default: int | None = None) -> Any:
        """The whole number of a key. UserError for anything else."""
        value = self.number(key, default)
        if value is not None and value != int(value):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is not a whole number")
        return None if value is None else int(value)

    def flag(self, key: str) -> bool:
        """Whether a key is set to something true. UserError for what is neither."""
        value = self.take(key, False)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is neither true nor false")
        return value

    def words(self, key: str) -> list[str]:
        """A list of words, as a list or with commas between."""
        value = self.take(key, [])
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is no list of names")
        return [word.strip() for word in value if word.strip()]

    def note(self, key: str, fate: Fate, text: str) -> None:
        """Say what became of a key."""
        self.notes.append(Note(self.path + key, fate, text))

    def otherwise(self, key: str, text: str) -> None:
        """A key that is done in another way."""
        self.note(key, "otherwise", text)

    def lost(self, key: str, text: str) -> None:
        """A key that changes what is learned, and cannot be translated; taken, if it still stands."""
        self.values.pop(key, None)
        self.note(key, "lost", text)

    def lose(self, reasons: Mapping[str, str], harmless: tuple[Any, ...] = (False, 0)) -> None:
        """Keys that are lost where they are set to anything but a harmless value; names may have *."""
        for key in list(self.values):
            reason = next((text for patterns, text in reasons.items() if any(fnmatchcase(key, pattern) for pattern in patterns.split())), None)
            if reason is not None:
                value = self.take(key)
                if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
                    self.note(key, "lost", reason)
                else:
                    self.note(key, "meaningless", f"{str(value).lower()} there, and there is no such thing here")

    def inner(self, key: str) -> Keys:
        """The mapping under a key. UserError when it is none."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.tool}: {self.path}{key}: {value!r} is no mapping")
        return Keys(value, self.tool, f"{self.path}{key}.", self.notes)

    def finish(self) -> None:
        """Account for the keys that nobody took."""
        for key in list(self.values):
            reason = next((text for patterns, text in MEANINGLESS.items() if any(fnmatchcase(key, pattern) for pattern in patterns.split())), None)
            value = self.values.pop(key)
            if reason is not None:
                self.note(key, "meaningless", reason)
            else:
                self.note(key, "unknown", f"is {_short(value)} there; see what it does before you rely on this recipe")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:59] + "…"
