"""Make tests/fixtures/chat_templates.json: what Axolotl's and Unsloth's templates make of some conversations.

    pip download --no-deps axolotl==0.19.0 unsloth==2026.10.9 -d WHEELS python tests/oracles/chat_templates.py WHEELS

Templates are read from the wheels (Apache-2.0) and rendered by transformers; only renderings are kept.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).parents[1] / "fixtures" / "chat_templates.json"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# our name: (package, its name)
SOURCES = {
    "chatml": [("axolotl", "chatml"), ("unsloth", "chatml_template")],
    "alpaca": [("unsloth", "alpaca_template")],
    "llama-2": [("unsloth", "llama_template")],
    "llama-3": [("axolotl", "llama3"), ("unsloth", "llama3_template")],
    "mistral": [("axolotl", "mistral_v1")],
    "mistral-v3": [("axolotl", "mistral_v2v3")],
    "gemma": [("axolotl", "gemma3"), ("axolotl", "gemma")],
    "phi": [("axolotl", "phi_35"), ("unsloth", "phi3_template")],
    "zephyr": [("unsloth", "zephyr_template")],
}


def turns(*texts: str, system: str = "") -> list[dict[str, str]]:
    """A conversation that begins with the user."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said] if system else said


CONVERSATIONS: list[list[dict[str, str]]] = [
    turns("Hi"),
    turns("Hi", "Hello."),
    turns("Hi", "Hello.", "Why?", "So."),
    turns("Hi", "Hello.", "Why?"),
    turns("Hi", system="Be kind."),
    turns("Hi", "Hello.", system="Be kind."),
    turns("Hi", "Hello.", "Why?", "So.", system="Be\nkind."),
    turns("Zwölf — 谢谢 🙂", "`x`\n\n```py\nprint('a')\n```"),
    turns("a\n\nb\tc", "1\n2\n3", "4", "5", "6", "7"),
    turns("{{ messages }} {% raw %}", "<b>&amp;</b>"),
    turns("  spaces around  ", "  also here\n"),
    turns("x", "y" * 200, system="s" * 100),
]


def template(wheels: Path, package: str, name: str) -> str:
    """The Jinja text in a wheel."""
    with zipfile.ZipFile(next(wheels.glob(f"{package}-*.whl"))) as wheel:
        if package == "axolotl":
            return wheel.read(f"axolotl/utils/chat_templates/templates/{name}.jinja").decode()
        tree = ast.parse(wheel.read("unsloth/chat_templates.py"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return str(ast.literal_eval(node.value)).replace("{system_message}", ALPACA)
    raise KeyError(name)


def main(wheels: Path) -> None:
    """Write the fixture."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer(None)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    rows: list[dict[str, Any]] = []
    for ours, sources in SOURCES.items():
        for package, name in sources:
            for conversation in CONVERSATIONS:
                for prompt in (False, True):
                    try:
                        text = tokenizer.apply_chat_template(
                            conversation,
                            tokenize=False,
                            add_generation_prompt=prompt,
                            chat_template=template(wheels, package, name),
                        )
                    except Exception as error:  # a template that refuses is an answer too
                        text = f"refused: {error}"
                    rows.append(
                        {
                            "template": ours,
                            "source": f"{package} {name}",
                            "messages": conversation,
                            "generation_prompt": prompt,
                            "text": text,
                        }
                    )
    FIXTURE.write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
