"""Rows of routers by mergekit-moe, for the prompts below. Writes tests/fixtures/gates.json.

ENV/bin/python tests/oracles/gates.py        (the environment of merges.py)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from merge_models import save

TARGET = Path(__file__).parents[1] / "fixtures" / "gates.json"
PROMPTS = [
    {"positive_prompts": ["the thing in", "in the inns"], "negative_prompts": []},
    {"positive_prompts": ["12345 + 678"], "negative_prompts": ["no numbers"]},
]


def main() -> None:
    """Ask mergekit for its gates, in the modes that are not random."""
    import transformers
    from mergekit.common import ModelReference
    from mergekit.moe.config import Expert
    from mergekit.moe.router import get_gate_params

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "few", "base", joined=("t h", "i n", "a n"), special=("<x>",))
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.eos_token
        base = ModelReference.model_validate(str(path))
        experts = [Expert(source_model=base, **one) for one in PROMPTS]
        for one in PROMPTS:
            for prompts in one.values():
                assert len({len(tokenizer(prompt)["input_ids"]) for prompt in prompts}) < 2, prompts  # no padding
        for mode in ("cheap_embed", "hidden", "hidden_avg"):
            found[mode] = get_gate_params(base, tokenizer, experts, mode, device="cpu").float().tolist()
    TARGET.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
