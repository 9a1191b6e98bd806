"""Chat templates by name, for a model that has none or gets another: as their models' makers published them, stated
anew in `named/`.

A model's own template comes first; a name is given on purpose. Where a template has no place for a system turn, it
stands before the first user turn's text; a role or an order that a template cannot show is refused, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmworks.core.artifact import Adapter, Model, Tokenizer
from llmworks.core.errors import ModelError, UserError
from llmworks.tokenize.chat.templates import tool_aware
from llmworks.tokenize.load import load_tokenizer

Template = Literal[
    "keep", "tools", "chatml", "alpaca", "llama-2", "llama-3", "mistral", "mistral-v3", "gemma", "phi", "zephyr"
]
CHOICES = "keep: the model's own; tools: its own, taught to show tools and calls; or the name of a published one"
FOLDER = Path(__file__).parent / "named"


@dataclass(frozen=True)
class Named:
    """A template: the models that it comes from, the tokens that it writes beside the beginning and end tokens, and
    which of them ends an answer, if one does.
    """

    models: str
    tokens: tuple[str, ...] = ()
    end: str = ""


NAMED: dict[str, Named] = {
    "chatml": Named("Qwen, SmolLM, Yi, OpenHermes", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "alpaca": Named("Stanford Alpaca and its kin"),
    "llama-2": Named("Llama 2 Chat, Code Llama Instruct"),
    "llama-3": Named("Llama 3 Instruct", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": Named("Mistral 7B Instruct v0.1 and v0.2, Mixtral 8x7B Instruct"),
    "mistral-v3": Named("Mistral 7B Instruct v0.3, Mixtral 8x22B Instruct", ("[INST]", "[/INST]")),
    "gemma": Named("Gemma 2 and 3 instruction-tuned", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi": Named("Phi 3 and 3.5", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "zephyr": Named("Zephyr 7B, TinyLlama Chat", ("<|system|>", "<|user|>", "<|assistant|>")),
}


def named_template(name: str) -> str:
    """The Jinja text of a named template. UserError for a name that is not known."""
    if name not in NAMED:
        raise UserError(f"unknown chat template {name!r}; known: {', '.join(NAMED)}")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def use_template(tokenizer: Any, template: Template) -> None:
    """Give a tokenizer the template that a config names."""
    if template == "tools":
        tokenizer.chat_template = tool_aware(str(tokenizer.chat_template or ""))
    elif template != "keep":
        tokenizer.chat_template = named_template(template)


def tokenizer_of(model: Model | Adapter | Tokenizer, template: Template = "keep") -> Any:
    """A model directory's tokenizer with the template that a config names.

    ModelError for a GGUF file or a server, which have none of their own here.
    """
    if isinstance(model, Model) and model.format != "hf":
        raise ModelError(
            f"{model.name}: its tokenizer is needed, so a Hugging Face directory; this is {model.format}"
            + ("; convert it with the stage model.from_gguf" if model.format == "gguf" else "")
        )
    tokenizer = load_tokenizer(model.path)
    use_template(tokenizer, template)
    return tokenizer
