"""Run a merge: plan, tokenizer, weights, config, golden tokens and report.

See `merge.py`.
"""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, UserError
from llmworks.core.machine import retain_freed_blocks
from llmworks.merge.execute.stream import MergeStream
from llmworks.merge.plan.catalogue import METHODS
from llmworks.merge.plan.config import DTYPES, MergeConfig
from llmworks.merge.plan.layout import COUNTS, HEAD, CheckpointLayout, read_layout
from llmworks.merge.plan.plan import MergePlan, format_layer_ranges
from llmworks.merge.plan.prepare import prepare_merge
from llmworks.merge.vocabulary.tokenizer_files import make_logits_function, replay_tokenizer, write_tokenizer
from llmworks.merge.vocabulary.vocabulary import MergedVocabulary
from llmworks.model.card import get_base_model_fields, get_front_matter, to_hub_name, write_model_card
from llmworks.model.io.safetensors_io import TORCH_DTYPES
from llmworks.tokenize.chat import golden

RECIPE = "mergekit_config.yml"


def run(config: MergeConfig, models: Mapping[str, Model], ctx: Context) -> Model:
    """Run the stage."""
    layouts = read_layouts(config, models)
    donor, vocabulary, plan = prepare_merge(config, layouts)
    if plan.unused_parameters:
        ctx.progress.log(
            f"{config.merge_method} has no parameter {', '.join(plan.unused_parameters)}, which the configuration sets"
        )
    for part in plan.unmatched_filters:
        ctx.progress.log(
            f"filter {part} matches no tensor name; an example of a name is {plan.jobs[len(plan.jobs) // 2].name}"
        )
    write_config(config, layouts[donor], plan, vocabulary, ctx.out, layouts)
    source = write_tokenizer(config, layouts, donor, vocabulary, ctx.out)
    read = replay_tokenizer(models[source], ctx, layouts) if source else None
    bare = (
        {
            row
            for job in plan.jobs
            if job.has_token_rows
            for row in vocabulary.find_zero_rows([model for model, _ in job.sources])
        }
        if vocabulary is not None
        else set()
    )
    if bare:
        ctx.progress.log(
            f"warning: {len(bare)} tokens have a row of zeros in tensors of models that do not have them; give a"
            " source for them in tokenizer.tokens, or another tokenizer_source"
        )
    stream = MergeStream(plan, layouts, vocabulary, ctx.seed)
    size = write_weights(stream, config.max_shard_size, layouts, ctx)
    weights = sum(math.prod(job.shape) for job in plan.jobs)
    metrics: dict[str, Any] = {
        "bytes": size,
        "parameters": weights,
        "models": len(models),
        **({"threshold_ties": stream.notes["tied"]} if "tied" in stream.notes else {}),
    }
    if stream.notes.get("tied", 0) > 0.01 * weights:
        ctx.progress.log(
            f"{stream.notes['tied'] / weights:.1%} of the weights changed by exactly as much as the last change that"
            " was kept, because the dtype has few bits; ties are kept in tensor order (dtype: float32 separates them)"
        )
    recorded = golden.record_golden(*read, make_logits_function(ctx.out)) if read else None
    write_report(config, models, plan, metrics, ctx, donor)
    return Model(
        ctx.out,
        golden=recorded,
        metrics=metrics,
        about={
            "format": "hf",
            "method": config.merge_method,
            "dtype": TORCH_DTYPES[plan.jobs[0].out_dtype],
            "architecture": layouts[donor].architecture,
        },
    )


def write_weights(stream: MergeStream, max_bytes: int, layouts: Mapping[str, CheckpointLayout], ctx: Context) -> int:
    """Write the weights in files of at most `max_bytes`; files written before an interruption are kept.

    Return the total number of bytes.
    """
    shards = stream.plan_shards(max_bytes)
    folder = ctx.scratch / "shards"
    folder.mkdir(exist_ok=True)
    try:
        with (
            ctx.progress.bar("merge", sum(shard.num_bytes for shard in shards), "bytes") as bar,
            worker_threads(stream) as threads,
        ):
            entries = stream.write(shards, folder, threads, bar.advance)
    finally:
        for layout in layouts.values():
            layout.shards.close()
    for file in [*entries, *(["model.safetensors.index.json"] if len(shards) > 1 else [])]:
        link_or_move(folder / file, ctx.out / file)
    ctx.digests.update(entries)
    return sum(shard.num_bytes for shard in shards)


def link_or_move(file: Path, target: Path) -> None:
    """Link a file of the scratch folder into its final place, so that an interrupted run need not write it again."""
    try:
        os.link(file, target)
    except OSError:  # a file system without hard links
        shutil.move(file, target)


@contextlib.contextmanager
def worker_threads(stream: MergeStream) -> Iterator[int]:
    """Yield the number of threads that compute blocks: torch's, each then single-threaded; one for methods that need
    whole tensors; one, without torch, if all tensors are copied.
    """
    if not stream.needs_compute:
        yield 1
        return
    import torch

    retain_freed_blocks()
    threads, whole = torch.get_num_threads(), stream.plan.method.needs_whole_tensors
    torch.set_num_threads(threads if whole else 1)
    try:
        yield 1 if whole else threads
    finally:
        torch.set_num_threads(threads)


def read_layouts(config: MergeConfig, models: Mapping[str, Model]) -> dict[str, CheckpointLayout]:
    """Read the headers of all models that the configuration names.

    UserError for models that it does not name; ModelError for models that are not Hugging Face directories.
    """
    spare = [name for name in models if name not in config.model_names()]
    if spare:
        raise UserError(
            f"the model {spare[0]!r} is given, but the configuration names only {', '.join(config.model_names())}"
        )
    for name, model in models.items():
        if model.format != "hf":
            raise ModelError(
                f"{name}: is a {model.format} file; only Hugging Face directories can be merged (llmworks model"
                " from_gguf makes one)"
            )
    return {name: read_layout(name, models[name].path) for name in config.model_names() if name in models}


def write_config(
    config: MergeConfig,
    donor: CheckpointLayout,
    plan: MergePlan,
    vocabulary: MergedVocabulary | None,
    out: Path,
    models: Mapping[str, CheckpointLayout] | None = None,
) -> None:
    """Write config.json: the base model's, with the layers, vocabulary size and dtype of the result. Lists with one
    entry per layer take the entries of the `models` that the layers come from.

    ModelError if one has no such list.
    """
    made = json.loads(json.dumps(donor.config))
    text = made["text_config"] if isinstance(made.get("text_config"), dict) else made
    if config.slices is not None or config.modules is not None:
        for stack, origins in plan.layers.items():
            own = len(donor.stacks.get(stack, ()))
            for key in COUNTS:
                if text.get(key) == own:
                    text[key] = len(origins)
            for key, value in list(text.items()):
                if (
                    isinstance(value, list)
                    and len(value) == own
                    and key.endswith(("layer_types", "_per_layer", "layers_block_type"))
                ):
                    text[key] = [
                        _get_layer_entry((models or {}).get(name, donor), key, layer) for name, layer in origins
                    ]
    if vocabulary is not None:
        text["vocab_size"] = vocabulary.rows
    if any(HEAD.search(job.name) for job in plan.jobs):
        for part in (made, text):
            if part.get("tie_word_embeddings", True):
                part["tie_word_embeddings"] = False
    wanted = config.out_dtype or config.dtype
    if wanted:
        for part in (made, text):
            for key in [name for name in ("dtype", "torch_dtype") if name in part] or (
                ["dtype"] if part is made else []
            ):
                part[key] = TORCH_DTYPES[DTYPES[wanted]]
    (out / "config.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (donor.path / "generation_config.json").exists():
        shutil.copyfile(donor.path / "generation_config.json", out / "generation_config.json")


def _get_layer_entry(model: CheckpointLayout, key: str, layer: int) -> Any:
    """Return a layer's entry of a per-layer list in a model's config."""
    found = model.text_config.get(key)
    if not isinstance(found, list) or layer >= len(found):
        raise ModelError(
            f"{model.name}: its config.json has no {key} for layer {layer}, which other models have; their layers"
            " cannot be combined in one model"
        )
    return found[layer]


def write_report(
    config: MergeConfig,
    models: Mapping[str, Model],
    plan: MergePlan,
    metrics: Mapping[str, Any],
    ctx: Context,
    donor: str,
) -> None:
    """Write the report, the model card, and the merge configuration beside the weights (shows the parents)."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    (ctx.out / RECIPE).write_text(text, encoding="utf-8")
    names = [name for name in models if name != donor]
    how = METHODS[config.merge_method]
    lead = (
        f"{len(models)} models by {config.merge_method}{f' ({how.reference})' if how.reference else ''}:"
        f" {metrics['parameters'] / 1e6:,.1f} million parameters, {metrics['bytes'] / 1e6:,.1f} MB in"
        f" {TORCH_DTYPES[plan.jobs[0].out_dtype]}."
    )
    page = ctx.report
    page.title, page.subtitle = f"Merge of {', '.join(models)}", lead
    page.add_table(
        "Models",
        ("name", "role", "digest", "reference"),
        [
            (name, "base" if name == config.base_model else "", model.digest[:12], model.ref)
            for name, model in models.items()
        ],
    )
    page.add_table(
        "Layers",
        ("stack", "layers", "from"),
        [(stack, len(origins), ", ".join(format_layer_ranges(origins))) for stack, origins in plan.layers.items()],
        "Each layer's first source; a method combines all sources of a slice.",
    )
    if metrics.get("threshold_ties"):
        page.add_text(
            "Ties",
            f"{metrics['threshold_ties']:,} changes were as large as the last one that was kept; ties are kept"
            " in tensor order. An unstable sort may keep others.",
        )
    page.add_drawing("Configuration", f"<pre>{html.escape(text)}</pre>", plain=text)
    page.data = {
        "method": config.merge_method,
        "models": {name: model.digest for name, model in models.items()},
        "layers": {stack: list(map(list, origins)) for stack, origins in plan.layers.items()},
        **metrics,
    }
    _write_card(models, config, donor, text, names, ctx)
    ctx.progress.log(lead)


def _write_card(
    models: Mapping[str, Model], config: MergeConfig, donor: str, text: str, names: list[str], ctx: Context
) -> None:
    """Write README.md: license, parents, tags, and the configuration."""
    fronts = [get_front_matter(model) for model in models.values()]
    licences = {str(front.get("license", "")) for front in fronts}
    front = {
        **(
            {key: value for key, value in fronts[0].items() if key != "language"}
            if len(licences) == 1
            else {"license": "other"}
        ),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **get_base_model_fields(list(models.values()), "merge"),
        "tags": ["merge", "mergekit", config.merge_method],
    }
    name = f"{to_hub_name(donor)}-{config.merge_method}"
    lines = [
        f"# {name}",
        "",
        f"A merge of {', '.join(models)} by {config.merge_method}"
        + (f", with base model {config.base_model}." if config.base_model else "."),
        "",
    ]
    if len(licences) > 1:
        lines += [
            "Its parents have different licenses: "
            + "; ".join(f"{one}: {f.get('license', 'none stated')}" for one, f in zip(models, fronts, strict=True))
            + ". Which terms apply to the result is not determined here.",
            "",
        ]
    lines += [
        "```yaml",
        text.rstrip(),
        "```",
        "",
        "The token ids, loss mask and stop tokens of its tokenizer's model were replayed on these files."
        if names
        else "",
        "",
    ]
    write_model_card(ctx.out, front, lines)
