"""Named chat templates, for a model that has none or is to use another one.

They follow the templates published with the models and are rewritten in `named/`. Where a template has no system role,
the system text is put before the text of the first user turn. A role or an order that a template cannot render is an
error, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmworks.core.artifact import Adapter, Model, Tokenizer
from llmworks.core.errors import ModelError, UserError
from llmworks.tokenize.chat.special_tokens import keep_control_tokens
from llmworks.tokenize.chat.templates import add_tool_support
from llmworks.tokenize.load import load_tokenizer

Template = Literal[
    "keep", "tools", "chatml", "alpaca", "llama-2", "llama-3", "mistral", "mistral-v3", "gemma", "phi", "zephyr"
]
TEMPLATE_DESCRIPTION = (
    "keep: the model's own; tools: its own, extended to render tools and tool calls; else a named template"
)
FOLDER = Path(__file__).parent / "named"


@dataclass(frozen=True)
class NamedTemplate:
    """A named template: the models that use it, the special tokens that it writes besides bos and eos, and the one that
    ends an answer ("" for eos).
    """

    models: str
    special_tokens: tuple[str, ...] = ()
    eos_token: str = ""


NAMED_TEMPLATES: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate("Qwen, SmolLM, Yi, OpenHermes", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "alpaca": NamedTemplate("Stanford Alpaca and derivatives"),
    "llama-2": NamedTemplate("Llama 2 Chat, Code Llama Instruct"),
    "llama-3": NamedTemplate(
        "Llama 3 Instruct", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "mistral": NamedTemplate("Mistral 7B Instruct v0.1 and v0.2, Mixtral 8x7B Instruct"),
    "mistral-v3": NamedTemplate("Mistral 7B Instruct v0.3, Mixtral 8x22B Instruct", ("[INST]", "[/INST]")),
    "gemma": NamedTemplate("Gemma 2 and 3 instruction-tuned", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi": NamedTemplate("Phi 3 and 3.5", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "zephyr": NamedTemplate("Zephyr 7B, TinyLlama Chat", ("<|system|>", "<|user|>", "<|assistant|>")),
}


def get_named_template(name: str) -> str:
    """Return the Jinja source of a named template; UserError for an unknown name."""
    if name not in NAMED_TEMPLATES:
        raise UserError(f"unknown chat template {name!r}; known: {', '.join(NAMED_TEMPLATES)}")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def set_template(tokenizer: Any, template: Template, control_tokens: str = "text") -> None:
    """Set the tokenizer's chat template to the one that a config names.

    `control_tokens`: "keep" lets special tokens in message text become control tokens.
    """
    if control_tokens == "keep":
        keep_control_tokens(tokenizer)
    if template == "tools":
        tokenizer.chat_template = add_tool_support(str(tokenizer.chat_template or ""))
    elif template != "keep":
        tokenizer.chat_template = get_named_template(template)


def load_model_tokenizer(model: Model | Adapter | Tokenizer, template: Template = "keep") -> Any:
    """Load the tokenizer of a model directory with the chat template that a config names.

    Errors: ModelError for a GGUF file or a server, which have no tokenizer files.
    """
    if isinstance(model, Model) and model.format != "hf":
        raise ModelError(
            f"{model.name}: its tokenizer is needed, which only a Hugging Face directory has; this is {model.format}"
            + ("; convert it with the stage model.from_gguf" if model.format == "gguf" else "")
        )
    tokenizer = load_tokenizer(model.path)
    set_template(tokenizer, template)
    return tokenizer
