"""Write a GGUF file from a Hugging Face directory: metadata, tokenizer, tensors. Layout as in llama.cpp's `convert_hf_to_gguf.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmworks.errors import ModelError
from llmworks.model.gguf_layout import CONTROL, NORMAL, UNUSED, USER_DEFINED, heads_of, interleave_rows, to_gguf_name
from llmworks.model.load import check_weights
from llmworks.progress import Progress
from llmworks.tokenize.load import load_tokenizer, stop_ids


def write_gguf(source: Path, target: Path, kind: str, progress: Progress) -> None:
    """Write `target` from the Hugging Face directory `source`; `kind` is the matrices' format: f32, f16 or q8_0."""
    import gguf

    from llmworks.quantize.gguf import read_config

    check_weights(source)
    config = read_config(source)
    writer = gguf.GGUFWriter(target, "llama")
    file_types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types[kind])
    add_hyperparameters(writer, config)
    add_tokenizer(writer, source, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tensors(writer, source, config, kind, progress)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_hyperparameters(writer: Any, config: dict[str, Any]) -> None:
    """The `llama.*` keys."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(float(rope))
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))


def add_tokenizer(writer: Any, source: Path, config: dict[str, Any]) -> None:
    """The `tokenizer.*` keys of a byte-level BPE tokenizer; the pre-tokenizer is recognised by its definition."""
    tokenizer = load_tokenizer(source)
    definition = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = definition["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{source}: a {model['type']} tokenizer cannot be written as GGUF, only byte-level BPE")
    size = int(config["vocab_size"])
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in definition["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(definition, source))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    stops = stop_ids(source, tokenizer)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    others = [i for i in stops if i != tokenizer.eos_token_id]
    if len(others) > 1:
        raise ModelError(f"{source}: has {len(stops)} stop ids, GGUF keeps two (eos and eot)")
    if others:
        writer.add_eot_token_id(others[0])
    for role, add in (("bos", writer.add_bos_token_id), ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            add(index)
    writer.add_add_bos_token(bool(getattr(tokenizer, "add_bos_token", False)))
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_name(definition: dict[str, Any], source: Path) -> str:
    """llama.cpp's name of the pre-tokenizer: digits apart is "smollm", plain byte level is "gpt-2"."""
    pre = definition.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    shape = [(p.get("type"), p.get("individual_digits"), p.get("add_prefix_space"), p.get("use_regex", True)) for p in parts]
    byte_level = ("ByteLevel", None, False, True)
    if shape == [("Digits", True, None, True), byte_level]:
        return "smollm"
    if shape == [byte_level]:
        return "gpt-2"
    raise ModelError(f"{source}: its pre-tokenizer has no name in llama.cpp that is known here")


def add_tensors(writer: Any, source: Path, config: dict[str, Any], kind: str, progress: Progress) -> None:
    """All tensors in llama.cpp's names, row order and number format; vectors (norms) stay fp32."""
    import gguf
    import torch
    from safetensors import safe_open

    formats = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    files: list[Any] = [safe_open(file, framework="pt") for file in sorted(source.glob("*.safetensors"))]
    names = [(file, name) for file in files for name in sorted(file.keys())]
    tied = bool(config.get("tie_word_embeddings"))
    with progress.bar("write gguf", len(names), "tensors") as bar:
        for file, name in names:
            bar.advance()
            if name == "lm_head.weight" and tied:
                continue
            gguf_name = to_gguf_name(name)
            if gguf_name is None:
                raise ModelError(f"{source}: the tensor {name} has no place in a Llama GGUF file")
            weight = file.get_tensor(name).to(torch.float32).numpy()
            interleaved = heads_of(name, heads, kv_heads)
            if interleaved is not None:
                weight = interleave_rows(weight, interleaved)
            wanted = formats[kind] if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            if wanted == gguf.GGMLQuantizationType.Q8_0 and weight.shape[-1] % 32:
                wanted = gguf.GGMLQuantizationType.F16  # a row that 32 does not divide has no Q8_0 blocks
            writer.add_tensor(gguf_name, gguf.quants.quantize(weight, wanted), raw_dtype=wanted)
