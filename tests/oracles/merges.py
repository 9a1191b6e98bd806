"""Merges by mergekit: what each configuration makes of small models. Writes tests/fixtures/merges.json.gz.

    python -m venv ENV; ENV/bin/pip install torch==2.13.0 mergekit==0.1.5; ENV/bin/python tests/oracles/merges.py

Of each tensor the digest of its bytes; by `ROWS` those of tokens, since the ids that a union gives are in no order
there.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from merge_models import save

TARGET = Path(__file__).parents[1] / "fixtures" / "merges.json.gz"


def of(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    """Models with the same parameters."""
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


def layers(*spans: tuple[str, int, int]) -> list[dict[str, Any]]:
    """Slices of one source each."""
    return [{"sources": [{"model": name, "layer_range": [low, high]}]} for name, low, high in spans]


def weighted(*pairs: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Models with a weight each."""
    return [{"model": name, "parameters": {"weight": weight, **more}} for name, weight in pairs]


def vectors(
    method: str, *, shared: dict[str, Any] | None = None, dtype: str | None = None, **more: Any
) -> dict[str, Any]:
    """A method on changes from the base."""
    return {
        "merge_method": method,
        "base_model": "base",
        "models": weighted(("a", 0.7), ("b", 0.4), ("c", -0.2), **more),
        **({"parameters": shared} if shared else {}),
        **({"dtype": dtype} if dtype else {}),
    }


GRADIENT = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
BOTH = [{"sources": [{"model": "base", "layer_range": [0, 4]}, {"model": "a", "layer_range": [0, 4]}]}]
CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": weighted(("a", 0.7), ("b", 1.1), ("c", 0.2))},
    "linear, a base too": {"merge_method": "linear", "base_model": "base", "models": weighted(("a", 1), ("base", 3))},
    "linear, not normalized": {
        "merge_method": "linear",
        "models": weighted(("a", 0.7), ("b", 1.1)),
        "parameters": {"normalize": False},
    },
    "linear, gradients and filters": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": GRADIENT}},
            {"model": "b", "parameters": {"weight": [1, 0, 2]}},
        ],
    },
    "linear, bfloat16": {
        "merge_method": "linear",
        "models": weighted(("a", 0.7), ("b", 1.1), ("c", 0.2)),
        "dtype": "bfloat16",
    },
    "linear, in float32 to bfloat16": {
        "merge_method": "linear",
        "models": weighted(("a", 0.7), ("b", 1.1)),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    },
    "linear, float16": {"merge_method": "linear", "models": weighted(("a", "7e-1"), ("b", 1.1)), "dtype": "float16"},
    "slerp": {"merge_method": "slerp", "base_model": "base", "models": of("base", "a"), "parameters": {"t": 0.3}},
    "slerp, as it is often written": {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": BOTH,
        "parameters": {"t": GRADIENT},
        "dtype": "bfloat16",
    },
    "slerp, far apart": {"merge_method": "slerp", "base_model": "base", "models": of("far"), "parameters": {"t": 0.6}},
    "slerp, the same": {"merge_method": "slerp", "base_model": "base", "models": of("base2"), "parameters": {"t": 0.6}},
    "nuslerp": {"merge_method": "nuslerp", "models": weighted(("a", 0.3), ("far", 0.5))},
    "nuslerp, rows": {
        "merge_method": "nuslerp",
        "models": weighted(("a", 0.3), ("far", 0.5)),
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp, columns": {
        "merge_method": "nuslerp",
        "models": weighted(("a", 0.3), ("far", 0.5)),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        "dtype": "bfloat16",
    },
    "nuslerp, from a base": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": weighted(("a", 0.3), ("far", 0.5)),
    },
    "multislerp": {"merge_method": "multislerp", "models": weighted(("a", 0.3), ("far", 0.5), ("b", 0.2))},
    "multislerp, from a base": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": weighted(("a", 0.3), ("far", 0.5), ("b", 0.4)),
        "dtype": "bfloat16",
    },
    "task_arithmetic": vectors("task_arithmetic"),
    "task_arithmetic, lambda": vectors("task_arithmetic", shared={"lambda": 0.5, "normalize": True}, dtype="bfloat16"),
    "ties": vectors("ties", density=0.5),
    "ties, bfloat16": vectors("ties", density=0.31, dtype="bfloat16"),
    "ties, not normalized": vectors("ties", density=0.2, shared={"normalize": False, "int8_mask": True}),
    "ties, rescaled": vectors("ties", density=0.4, shared={"rescale": True}),
    "ties, gradients": vectors("ties", density=[1, 0.7, 0.1], shared={"lambda": [0.5, 1.5]}),
    "ties, all or nothing": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [*weighted(("a", 1), density=0.0), *weighted(("b", 1), density=1.0)],
    },
    "breadcrumbs": vectors("breadcrumbs", density=0.6, gamma=0.05),
    "breadcrumbs, rescaled": vectors("breadcrumbs", density=0.6, gamma=0.1, shared={"rescale": True}, dtype="bfloat16"),
    "breadcrumbs_ties": vectors("breadcrumbs_ties", density=0.9, gamma=0.3),
    "dare_linear, nothing dropped": vectors("dare_linear"),
    "dare_ties, nothing dropped": vectors("dare_ties", dtype="bfloat16"),
    "della, nothing dropped": vectors("della"),
    "della_linear, all dropped": vectors("della_linear", density=0.0),
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": of("a", "b", "c")},
    "model_stock, by rows": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": of("a", "b"),
        "parameters": {"filter_wise": True},
        "dtype": "bfloat16",
    },
    "sce": {"merge_method": "sce", "base_model": "base", "models": of("a", "b", "c")},
    "sce, some": {
        "merge_method": "sce",
        "base_model": "base",
        "models": of("a", "b", "c"),
        "parameters": {"select_topk": 0.3, "int8_mask": True},
    },
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "base", "models": of("a")},
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": of("a"),
        "parameters": {"t": 0.2},
        "dtype": "bfloat16",
    },
    "karcher": {"merge_method": "karcher", "models": of("a", "b", "far"), "parameters": {"max_iter": 20}},
    "karcher, bfloat16": {"merge_method": "karcher", "models": of("a", "b"), "dtype": "bfloat16"},
    "ram": {"merge_method": "ram", "base_model": "base", "models": of("a", "b", "c"), "parameters": {"epsilon": 0.1}},
    "ramplus_tl": {
        "merge_method": "ramplus_tl",
        "base_model": "base",
        "models": of("a", "b", "c"),
        "parameters": {"epsilon": 0.1, "r": 0.3},
    },
    "passthrough": {
        "merge_method": "passthrough",
        "slices": layers(("a", 0, 3), ("b", 1, 4), ("base", 2, 4)),
        "dtype": "bfloat16",
    },
    "passthrough, scaled": {
        "merge_method": "passthrough",
        "slices": [
            *layers(("a", 0, 4)),
            {
                "sources": [
                    {
                        "model": "a",
                        "layer_range": [1, 3],
                        "parameters": {
                            "scale": [
                                {"filter": "o_proj", "value": 0.0},
                                {"filter": "down_proj", "value": 0.5},
                                {"value": 1.0},
                            ]
                        },
                    }
                ]
            },
        ],
    },
    "slices of a mean": {
        "merge_method": "linear",
        "slices": [
            *layers(("a", 0, 1)),
            {
                "sources": [{"model": "a", "layer_range": [1, 3]}, {"model": "b", "layer_range": [2, 4]}],
                "parameters": {"normalize": False},
            },
            *layers(("b", 3, 4)),
        ],
        "parameters": {"weight": [0.25, 1]},
    },
    "a module": {
        "merge_method": "ties",
        "base_model": "base",
        "modules": {"default": {"models": weighted(("a", 1), ("b", 1)), "parameters": {"density": 0.5}}},
    },
    "heads in one of two": {"merge_method": "linear", "models": weighted(("a", 1), ("tied", 1))},
}
TOKENS: dict[str, dict[str, Any]] = {
    "union": {
        "merge_method": "linear",
        "base_model": "few",
        "models": weighted(("few", 1), ("more", 1), ("other", 2)),
        "tokenizer_source": "union",
    },
    "base": {
        "merge_method": "linear",
        "base_model": "few",
        "models": weighted(("few", 1), ("more", 1)),
        "tokenizer_source": "base",
    },
    "a model's": {
        "merge_method": "linear",
        "base_model": "few",
        "models": weighted(("few", 1), ("more", 1), ("other", 1)),
        "tokenizer": {"source": "other"},
    },
    "rules": {
        "merge_method": "task_arithmetic",
        "base_model": "few",
        "models": weighted(("more", 0.5), ("other", 0.5)),
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 16,
            "tokens": {
                "<x>": {"source": "other"},
                "<y>": {"source": {"kind": "model_token", "model": "more", "token": "q"}, "force": True},
                "<new>": {"source": {"kind": "zero"}},
                "a": {"source": "more", "force": True},
            },
        },
    },
}


def models(place: Path) -> None:
    """All that configurations name."""
    for name in ("base", "a", "b", "c", "far"):
        save(place / name, name)
    save(place / "base2", "base")
    save(place / "tied", "b", head=False)
    save(place / "few", "base", joined=("t h", "i n", "a n"), special=("<x>",))
    save(place / "more", "a", joined=("t h", "th e", "e r"), special=("<y>",))
    save(place / "other", "b", joined=("o n", "i n"), special=("<y>", "<x>", "<z>"))


def digest(tensor: Any) -> str:
    """Of a tensor's bytes."""
    return hashlib.sha256(
        tensor.contiguous().flatten().view(dtype=__import__("torch").uint8).numpy().tobytes()
    ).hexdigest()[:16]


def main() -> None:
    """Make models, merge them, keep what came of it."""
    import torch
    import transformers
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    found: dict[str, Any] = {"cases": {}, "tokens": {}}
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder))
        os.chdir(folder)
        for kind, cases in (("cases", CASES), ("tokens", TOKENS)):
            for name, case in cases.items():
                out = Path(folder) / "out" / f"{kind}-{name}".replace(" ", "_").replace(",", "").replace("'", "")
                run_merge(
                    MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(case))),
                    str(out),
                    MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False),
                )
                tensors = load_file(out / "model.safetensors")
                if kind == "cases":
                    found[kind][name] = {
                        tensor: [str(value.dtype).removeprefix("torch."), list(value.shape), digest(value)]
                        for tensor, value in sorted(tensors.items())
                    }
                    found[kind][name]["config"] = {
                        key: json.loads((out / "config.json").read_text())[key]
                        for key in ("num_hidden_layers", "vocab_size")
                    }
                    for tensor in ("model.layers.1.mlp.up_proj.weight",):
                        found[kind][name][tensor].append(
                            base64.b64encode(tensors[tensor].float().numpy().tobytes()).decode()
                        )
                else:
                    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
                    found[kind][name] = {
                        tensor: (
                            {token: digest(tensors[tensor][at].float()) for token, at in sorted(ids.items())}
                            | {"": list(tensors[tensor].shape)}
                        )
                        for tensor in ("model.embed_tokens.weight", "lm_head.weight")
                    }
    with gzip.GzipFile(TARGET, "wb", mtime=0) as stream:
        stream.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
