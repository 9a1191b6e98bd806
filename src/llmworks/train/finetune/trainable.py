"""The trainable model of a fine-tuning, and saving the result.

An adapter on frozen weights, optionally in 4 bits; a soft prompt; or the weights themselves.
"""

from __future__ import annotations

import fnmatch
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmworks.core.errors import MissingDependency, ModelError
from llmworks.model.io.decoder_files import to_standard
from llmworks.model.io.load import load_adaptable
from llmworks.model.io.weights import read_header
from llmworks.model.lora import adapter_io as adapter
from llmworks.model.lora import lora
from llmworks.model.lora.lora import LoraSettings
from llmworks.model.lowbit.nf4 import replace_with_nf4
from llmworks.train.finetune.lora_config import LoraConfig

ADAPTER_README = Path(__file__).with_name("adapter_readme.md").read_text(encoding="utf-8")
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass
class TrainableModel:
    """A model in training.

    `rename`: maps layer names to the names in the model's files; `padding_free`: whether it keeps sequences of one row
    apart (segment ids), so that batches need no padding.
    """

    network: Any
    rename: Callable[[str], str]
    source: Path
    padding_free: bool
    lora: LoraSettings | None = None
    quantization: dict[str, Any] | None = None
    is_soft_prompt: bool = False
    is_cast: bool = False

    def add_adapter(self, config: LoraConfig) -> None:
        """Freeze all weights and attach a new LoRA adapter. Seed torch before."""
        self.lora = LoraSettings(config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora)
        if config.load_in_4bit:
            names = lora.find_linear_layers(self.network)
            replace_with_nf4(self.network, names, double_quant=config.bnb_4bit_use_double_quant)
            self.quantization = {
                "kept": "nf4",
                "double": config.bnb_4bit_use_double_quant,
                "layers": sorted(map(self.rename, names)),
            }
        lora.attach_lora(self.network, config.target_modules, self.lora, self.rename)

    def load_adapter(self, path: Path) -> None:
        """Freeze all weights and load an existing LoRA adapter to continue training it.

        Errors: ModelError for an adapter that is not a LoRA, or is for other layers.
        """
        config, tensors = adapter.read_adapter(path)
        kept = adapter.read_base_quantization(path)
        names = sorted(
            {name.removeprefix(adapter.PREFIX).rpartition(".lora_A")[0] for name in tensors if ".lora_A" in name}
        )
        here = {self.rename(name): name for name in lora.find_linear_layers(self.network)}
        if not names or any(name not in here for name in names):
            raise ModelError(
                f"{path}: the adapter is for layers that this model does not have,"
                f" e.g. {next((n for n in names if n not in here), '(none)')}"
            )
        if config.get("alpha_pattern") or config.get("rank_pattern"):
            raise ModelError(
                f"{path}: layers differ in rank or alpha; merge the adapter first (llmworks merge adapter) and"
                " train a new one"
            )
        self.lora = LoraSettings(
            int(config["r"]),
            float(config["lora_alpha"]),
            float(config.get("lora_dropout") or 0.0),
            bool(config.get("use_rslora")),
            bool(config.get("use_dora")),
        )
        if kept:
            replace_with_nf4(
                self.network, [here[name] for name in kept["layers"]], double_quant=bool(kept.get("double"))
            )
            self.quantization = kept
        lora.attach_lora_to(self.network, [here[name] for name in names], self.lora)
        adapter.load_adapter_state(self.network, tensors, self.rename)

    def add_soft_prompt(self, kind: str, num_virtual_tokens: int, init_text: str) -> None:
        """Freeze all weights and prepend a soft prompt: prompt tuning or prefix tuning, through peft.

        `kind`: prompt or prefix. A prompt is initialized from `init_text`, or from sampled tokens if it is empty.
        """
        try:
            from peft import PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
        except ImportError:
            raise MissingDependency(
                f"method {kind} needs peft; install it with: pip install 'llmworks[soft]'"
            ) from None

        from llmworks.model.io.load import load_model

        self.network, self.rename, self.padding_free, self.is_soft_prompt = load_model(self.source), str, False, True
        config: Any = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
        if kind == "prompt_tuning":
            init_options: dict[str, Any] = (
                {
                    "prompt_tuning_init": PromptTuningInit.TEXT,
                    "prompt_tuning_init_text": init_text,
                    "tokenizer_name_or_path": str(self.source),
                }
                if init_text
                else {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}
            )
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, **init_options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers renamed
            self.network = get_peft_model(self.network, config)

    def freeze(self, patterns: Sequence[str]) -> None:
        """Train all weights except those whose names in the model's files match a pattern.

        Errors: ModelError for a pattern without a match, or when no weights are left to train.
        """
        names = {name: self.rename(name) for name, _ in self.network.named_parameters()}
        for pattern in patterns:
            if not fnmatch.filter(names.values(), pattern):
                some = [n for n in names.values() if n.startswith(pattern.split(".")[0].split("*")[0][:5])][:2] or list(
                    names.values()
                )[:2]
                raise ModelError(
                    f"freeze: no weight of the model matches {pattern!r}; names are such as {', '.join(some)}"
                )
        for name, p in self.network.named_parameters():
            p.requires_grad_(not any(fnmatch.fnmatch(names[name], pattern) for pattern in patterns))
        if not any(p.requires_grad for p in self.network.parameters()):
            raise ModelError("freeze: all weights are frozen; nothing is left to train")

    def cast_frozen_weights(self, precision: str) -> None:
        """Cast frozen linear weights to the autocast dtype: the same results in half the memory.

        Embeddings and LM head keep their dtype.
        """
        for layer in self.network.modules():
            if (
                isinstance(layer, nn.Linear)
                and layer is not self.network.get_output_embeddings()
                and not layer.weight.requires_grad
            ):
                layer.weight.data = layer.weight.data.to(HALF_DTYPES[precision])
                self.is_cast = True

    @property
    def num_trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)

    def save(self, out: Path, base_name: str) -> None:
        """Write the adapter, or the full model in the file format and dtype that it was loaded from."""
        if self.lora is not None:
            adapter.save_adapter(
                self.network, out, self.lora, base_name=base_name, rename=self.rename, base=self.quantization
            )
            if self.quantization is not None:
                (out / "README.md").write_text(
                    ADAPTER_README.format(base=base_name, double=bool(self.quantization["double"])), encoding="utf-8"
                )
            return
        if self.is_soft_prompt:
            config = self.network.peft_config["default"]
            config.base_model_name_or_path, config.tokenizer_name_or_path = base_name, None
            self.network.save_pretrained(out, save_embedding_layers=False)  # else peft queries the hub
            (out / "README.md").unlink(missing_ok=True)  # peft's empty model card
            return
        save_like_source(self.network, self.source, out)


def open_trainable_model(path: Path) -> TrainableModel:
    """Open the model of a directory in fp32, all weights trainable. ModelError for a broken directory."""
    from llmworks.model.nn.decoder import DecoderForCausalLM

    network, rename = load_adaptable(path)
    return TrainableModel(network, rename, path, isinstance(network, DecoderForCausalLM))


def save_like_source(network: nn.Module, source: Path, out: Path) -> None:
    """Save a model's weights like its source: tensor names, dtype, config and generation config."""
    from safetensors.torch import save_file

    from llmworks.model.io.families import parse_shape
    from llmworks.model.nn.decoder import DecoderForCausalLM
    from llmworks.tokenize.load import read_json

    formats = Counter(
        entry["dtype"]
        for file in sorted(source.glob("*.safetensors"))
        for name, entry in read_header(file).items()
        if name != "__metadata__"
    )
    dtype = DTYPES.get(formats.most_common(1)[0][0], torch.float32)
    if isinstance(network, DecoderForCausalLM):
        state = {name: tensor.detach().to(dtype) for name, tensor in network.state_dict().items()}
        if network.shape.tie_word_embeddings:
            state.pop("head.weight", None)
        kind, _ = parse_shape(read_json(source / "config.json"))
        save_file(
            {name: tensor.contiguous() for name, tensor in (to_standard(state, kind) if kind else state).items()},
            out / "model.safetensors",
            metadata={"format": "pt"},
        )
        shutil.copyfile(source / "config.json", out / "config.json")
    else:
        whole: Any = network
        whole.to(dtype).save_pretrained(out)
        whole.to(torch.float32)
    generation = source / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, out / "generation_config.json")
