"""Write a mixture of experts tensor by tensor, in the layouts of Mixtral, Qwen2-MoE and Qwen3-MoE.

See `experts.py`.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, UserError
from llmworks.merge.execute.run import write_weights
from llmworks.merge.execute.stream import MergeStream
from llmworks.merge.moe.config import Expert, ExpertsConfig
from llmworks.merge.moe.router import compute_router_rows, find_similar_layers
from llmworks.merge.plan.catalogue import METHODS
from llmworks.merge.plan.computation import require_same_computation
from llmworks.merge.plan.config import DTYPES
from llmworks.merge.plan.layout import HEAD, CheckpointLayout, read_layout
from llmworks.merge.plan.plan import MergePlan, TensorJob
from llmworks.merge.vocabulary.tokenizer_files import make_logits_function, replay_tokenizer
from llmworks.merge.vocabulary.vocabulary import copy_tokenizer
from llmworks.model.card import get_base_model_fields, get_front_matter, to_hub_name, write_model_card
from llmworks.model.io.safetensors_io import TORCH_DTYPES
from llmworks.tokenize.chat import golden

STACK = "model.layers"
LAYOUTS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen", "qwen3": "qwen3"}
SUPPORTED = {"mixtral": ("llama", "mistral"), "qwen": ("llama", "mistral", "qwen2"), "qwen3": ("qwen3",)}
PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's tensor names


def run(config: ExpertsConfig, models: Mapping[str, Model], ctx: Context) -> Model:
    """Run the stage."""
    missing = [name for name in config.model_names() if name not in models]
    if missing:
        raise UserError(f"the model {missing[0]!r} is not given; given: {', '.join(models)}")
    layouts = {name: read_layout(name, models[name].path) for name in config.model_names()}
    base = layouts[config.base_model]
    kind = choose_layout(config, layouts)
    require_same_computation(config.base_model, layouts, ignored=config.ignore_config_differences)
    layers, hidden_size = len(base.stacks[STACK]), int(base.config["hidden_size"])
    rows = compute_router_rows(config, base.path, config.experts, ctx.seed, layers, hidden_size)
    similar_layers = find_similar_layers(rows) if len(config.experts) > 1 else []
    if similar_layers:
        ctx.progress.log(
            f"warning: in {'all' if len(similar_layers) == layers else len(similar_layers)} layers the experts' rows"
            " of the router point"
            "warning: in {'all' if len(weak) == layers else len(weak)} layers the experts' router rows are nearly"
            " parallel; the prompts may be too similar"
        )
    dtype = DTYPES[config.dtype] if config.dtype else base.places[base.stacks[STACK][0]["mlp.up_proj.weight"]].dtype
    extra_tensors = build_extra_tensors(config, kind, rows, base, ctx.seed, layers, hidden_size)
    jobs = [
        *plan_jobs(config, kind, layouts, dtype),
        *(TensorJob(name, tuple(one.shape), (), None, "F32", dtype, {}, ()) for name, one in extra_tensors.items()),
    ]
    plan = MergePlan(
        METHODS["passthrough"],
        tuple(sorted(jobs, key=lambda job: get_sort_key(job.name))),
        {STACK: tuple((config.base_model, layer) for layer in range(layers))},
    )
    stream = MergeStream(plan, layouts, None, ctx.seed, extra_tensors)
    write_config(config, kind, base, dtype, ctx)
    copy_tokenizer(base.path, ctx.out)
    read = (
        replay_tokenizer(models[config.base_model], ctx, {config.base_model: base})
        if (ctx.out / "tokenizer.json").exists()
        else None
    )
    size = write_weights(stream, config.max_shard_size, layouts, ctx)
    recorded = golden.record_golden(*read, make_logits_function(ctx.out)) if read else None
    metrics = {
        "bytes": size,
        "parameters": sum(torch.Size(job.shape).numel() for job in plan.jobs),
        "experts": len(config.experts),
        "models": len(models),
        "similar_layers": len(similar_layers),
    }
    write_report(config, models, kind, rows, metrics, ctx)
    return Model(
        ctx.out,
        golden=recorded,
        metrics=metrics,
        about={"format": "hf", "method": "experts", "dtype": TORCH_DTYPES[dtype], "architecture": kind},
    )


def choose_layout(config: ExpertsConfig, layouts: Mapping[str, CheckpointLayout]) -> str:
    """Return the result's layout. UserError if it does not fit the models."""
    kinds = {name: str(layout.config.get("model_type")) for name, layout in layouts.items()}
    own = kinds[config.base_model]
    kind = config.architecture or (
        "qwen" if config.shared_experts and own in SUPPORTED["qwen"] else LAYOUTS.get(own, "")
    )
    if not kind:
        raise UserError(f"{config.base_model}: is a {own}; supported for experts: llama, mistral, qwen2 and qwen3")
    strange = next((name for name, one in kinds.items() if one not in SUPPORTED[kind]), None)
    if strange is not None or len(set(kinds.values())) > 1:
        raise UserError(
            f"{strange or config.base_model}: is a {kinds[strange or config.base_model]}; the layout {kind} takes"
            f" models of one type of {', '.join(SUPPORTED[kind])}:"
            f" {', '.join(f'{n} is a {k}' for n, k in kinds.items())}"
        )
    if kind == "qwen" and not config.shared_experts:
        raise UserError(
            "the layout qwen (Qwen2-MoE) needs an expert that all tokens are routed to; set"
            " shared_experts with one expert"
        )
    if kind != "qwen" and config.shared_experts:
        raise UserError(f"the layout {kind} has no shared experts; remove shared_experts, or set architecture: qwen")
    return kind


def plan_jobs(
    config: ExpertsConfig, kind: str, layouts: Mapping[str, CheckpointLayout], dtype: str
) -> Iterator[TensorJob]:
    """Yield all tensors that are copied. ModelError for those that an expert lacks, or has in another shape."""
    base = layouts[config.base_model]

    def make_job(name: str, model: str, tensor: str, expert: Expert | None = None) -> TensorJob:
        place, wanted = layouts[model].places.get(tensor), base.places.get(tensor)
        if place is None:
            raise ModelError(f"{model}: has no tensor {tensor}")
        if wanted is not None and wanted.shape != place.shape:
            raise ModelError(
                f"{tensor}: its shapes differ: {config.base_model} {list(wanted.shape)}, {model} {list(place.shape)}"
            )
        scaling: dict[str, Any] = {
            "scale": expert.residual_scale if expert and ".down_proj." in tensor else None,
            "noise": (expert.noise_scale or None) if expert else None,
        }
        return TensorJob(name, place.shape, ((model, tensor),), None, place.dtype, dtype, {}, (scaling,))

    for tensor in base.loose:
        yield make_job(tensor, config.base_model, tensor)
    for number, layer in enumerate(base.stacks[STACK]):
        for rest, tensor in layer.items():
            if not rest.startswith("mlp."):
                yield make_job(tensor, config.base_model, tensor)
                continue
            part, _, end = rest.removeprefix("mlp.").partition(".")
            for at, expert in enumerate(config.experts):
                place = (
                    f"block_sparse_moe.experts.{at}.{PARTS.get(part, part)}"
                    if kind == "mixtral"
                    else f"mlp.experts.{at}.{part}"
                )
                yield make_job(f"{STACK}.{number}.{place}.{end}", expert.source_model, tensor, expert)
            for expert in config.shared_experts or ():
                yield make_job(f"{STACK}.{number}.mlp.shared_expert.{part}.{end}", expert.source_model, tensor, expert)


def build_extra_tensors(
    config: ExpertsConfig, kind: str, rows: Tensor, base: CheckpointLayout, seed: int, layers: int, hidden_size: int
) -> dict[str, Tensor]:
    """Return the tensors that no model has: the routers; for qwen the gate of the shared expert, and attention
    biases where the models have none.
    """
    name = "block_sparse_moe.gate" if kind == "mixtral" else "mlp.gate"
    found = {f"{STACK}.{number}.{name}.weight": rows[number].contiguous() for number in range(layers)}
    if kind == "qwen":
        assert config.shared_experts is not None
        shared = config.shared_experts[0]
        gate = (
            compute_router_rows(config, base.path, [shared], seed + 1, layers, hidden_size)
            if shared.positive_prompts or config.gate_mode in ("random", "uniform_random")
            else torch.zeros(layers, 1, hidden_size)
        )
        found |= {
            f"{STACK}.{number}.mlp.shared_expert_gate.weight": gate[number].contiguous() for number in range(layers)
        }
        for number, layer in enumerate(base.stacks[STACK]):
            for part in ("q_proj", "k_proj", "v_proj"):
                if f"self_attn.{part}.bias" not in layer:
                    found[f"{STACK}.{number}.self_attn.{part}.bias"] = torch.zeros(
                        base.places[layer[f"self_attn.{part}.weight"]].shape[0]
                    )
    return found


def get_sort_key(name: str) -> tuple[int, int]:
    """Return a sort key: embedding, layers by number, norm and head."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return (1, int(layer[1])) if layer else (0 if "embed" in name else 2, 0)


def write_config(config: ExpertsConfig, kind: str, base: CheckpointLayout, dtype: str, ctx: Context) -> None:
    """Write config.json of the layout."""
    made = json.loads(json.dumps(base.config))
    for key in ("dtype", "torch_dtype"):
        made.pop(key, None)
    made["dtype"] = TORCH_DTYPES[dtype]
    if kind == "mixtral":
        made |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": len(config.experts),
            "num_experts_per_tok": config.experts_per_token,
            "sliding_window": None,
        }
    else:
        inner = made["intermediate_size"]
        made |= {
            "num_experts": len(config.experts),
            "num_experts_per_tok": config.experts_per_token,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "moe_intermediate_size": inner,
            "mlp_only_layers": [],
        }
        made |= (
            {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
            if kind == "qwen3"
            else {
                "architectures": ["Qwen2MoeForCausalLM"],
                "model_type": "qwen2_moe",
                "shared_expert_intermediate_size": inner,
                "sliding_window": None,
                "use_sliding_window": False,
            }
        )
    if any(HEAD.search(tensor) for tensor in base.loose):
        made["tie_word_embeddings"] = False
    (ctx.out / "config.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (base.path / "generation_config.json").exists():
        shutil.copyfile(base.path / "generation_config.json", ctx.out / "generation_config.json")


def write_report(
    config: ExpertsConfig,
    models: Mapping[str, Model],
    kind: str,
    rows: Tensor,
    metrics: Mapping[str, Any],
    ctx: Context,
) -> None:
    """Write the report and the model card."""
    text = yaml.safe_dump(
        config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=120
    )
    (ctx.out / "mergekit_moe_config.yml").write_text(text, encoding="utf-8")
    lead = (
        f"{len(config.experts)} experts of {config.base_model} in the layout {kind}, {config.experts_per_token} per"
        f" token: {metrics['parameters'] / 1e6:,.1f} million parameters, {metrics['bytes'] / 1e6:,.1f} MB."
    )
    page = ctx.report
    page.title, page.subtitle = f"Experts of {config.base_model}", lead
    page.add_table(
        "Experts",
        ("expert", "model", "positive prompts", "negative prompts"),
        [
            (str(at), one.source_model, "; ".join(one.positive_prompts)[:200], "; ".join(one.negative_prompts)[:200])
            for at, one in enumerate(config.experts)
        ],
    )
    if len(config.experts) > 1:
        units = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        nearest = [float((unit @ unit.T).fill_diagonal_(-1).max()) for unit in units]
        page.add_table(
            "Routers",
            ("layer", "largest cosine similarity of two rows"),
            [(str(layer), f"{value:.3f}") for layer, value in enumerate(nearest)],
            "Near 1, the router can hardly distinguish two experts before training.",
        )
    page.add_drawing("Configuration", f"<pre>{html.escape(text)}</pre>", plain=text)
    page.data = {"layout": kind, "models": {name: model.digest for name, model in models.items()}, **metrics}
    front = {
        **get_front_matter(models[config.base_model]),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **get_base_model_fields(list(models.values()), "merge"),
        "tags": ["merge", "mergekit", "moe", "frankenmoe"],
    }
    write_model_card(
        ctx.out,
        front,
        [
            f"# {to_hub_name(config.base_model)}-{len(config.experts)}x-MoE",
            "",
            lead,
            "",
            "```yaml",
            text.rstrip(),
            "```",
            "",
        ],
    )
    ctx.progress.log(lead)
