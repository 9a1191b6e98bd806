"""From models and a configuration to a directory: the plan, the tokenizer, the weights, the config, what has to replay. See `merge.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from llmworks.artifact import Golden, Model
from llmworks.context import Context
from llmworks.errors import ModelError, UserError
from llmworks.merge.catalogue import METHODS
from llmworks.merge.config import DTYPES, MergeConfig
from llmworks.merge.layout import COUNTS, HEAD, Layout, layout_of
from llmworks.merge.plan import Plan
from llmworks.merge.prepare import prepared
from llmworks.merge.stream import Stream
from llmworks.merge.vocabulary import Vocabulary, check_written, copy_tokenizer
from llmworks.model.card import bases_of, front_of, plain, write
from llmworks.model.shards import TORCH
from llmworks.tokenize import golden
from llmworks.tokenize.load import load_tokenizer, read_json, stop_ids
from llmworks.tokenize.named import FOLDER, NAMED

RECIPE = "mergekit_config.yml"


def run(config: MergeConfig, models: Mapping[str, Model], ctx: Context) -> Model:
    """The stage's work."""
    layouts = layouts_of(config, models)
    donor, vocabulary, plan = prepared(config, layouts)
    if plan.unused:
        ctx.progress.say(f"{config.merge_method} has no parameter {', '.join(plan.unused)}, which the configuration gives")
    stream = Stream(plan, layouts, vocabulary, ctx.seed)
    size = written(stream, config.shard_bytes, layouts, ctx)
    write_config(config, layouts[donor], plan, vocabulary, ctx.out)
    source = write_tokenizer(config, layouts, donor, vocabulary, ctx.out)
    weights = sum(torch.Size(job.shape).numel() for job in plan.jobs)
    metrics: dict[str, Any] = {"bytes": size, "parameters": weights, "models": len(models), **({"tied_at_a_threshold": stream.notes["tied"]} if "tied" in stream.notes else {})}
    recorded = golden_of(models[source], ctx, layouts) if source else None
    describe(config, models, plan, metrics, ctx, donor)
    return Model(ctx.out, golden=recorded, metrics=metrics, about={"format": "hf", "method": config.merge_method, "dtype": TORCH[plan.jobs[0].out_dtype], "architecture": ", ".join(layouts[donor].config.get("architectures") or [])})


def written(stream: Stream, most: int, layouts: Mapping[str, Layout], ctx: Context) -> int:
    """Write the weights, in files of at most so many bytes; what was written before a kill is kept. How many bytes they are."""
    shards = stream.shards(most)
    folder = ctx.scratch / "shards"
    folder.mkdir(exist_ok=True)
    threads, whole = torch.get_num_threads(), stream.plan.method.whole
    torch.set_num_threads(threads if whole else 1)
    try:
        with ctx.progress.bar("merge", sum(shard.size for shard in shards), "bytes") as bar:
            entries = stream.write(shards, folder, 1 if whole else threads, bar.advance)
    finally:
        torch.set_num_threads(threads)
        for layout in layouts.values():
            layout.shards.close()
    for file in [*entries, *(["model.safetensors.index.json"] if len(shards) > 1 else [])]:
        shutil.move(folder / file, ctx.out / file)
    ctx.digests.update(entries)
    return sum(shard.size for shard in shards)


def layouts_of(config: MergeConfig, models: Mapping[str, Model]) -> dict[str, Layout]:
    """The headers of all models that the configuration names. UserError for models that it does not name, or does not have."""
    spare = [name for name in models if name not in config.named()]
    if spare:
        raise UserError(f"the model {spare[0]!r} is given, and the configuration names {', '.join(config.named())}")
    for name, model in models.items():
        if model.format != "hf":
            raise ModelError(f"{name}: is a {model.format} file; Hugging Face directories are merged (llmworks model from_gguf makes one)")
    return {name: layout_of(name, models[name].path) for name in config.named() if name in models}


def write_config(config: MergeConfig, donor: Layout, plan: Plan, vocabulary: Vocabulary | None, out: Path) -> None:
    """config.json: the donor's, with the layers, tokens and number format that the result has."""
    made = json.loads(json.dumps(donor.config))
    text = made["text_config"] if isinstance(made.get("text_config"), dict) else made
    if config.slices is not None or config.modules is not None:
        for stack, origins in plan.layers.items():
            own = len(donor.stacks.get(stack, ()))
            for key in COUNTS:
                if text.get(key) == own:
                    text[key] = len(origins)
            for key, value in text.items():
                if isinstance(value, list) and len(value) == own and key.endswith(("layer_types", "_per_layer", "layers_block_type")) and all(layer < own for _, layer in origins):
                    text[key] = [value[layer] for _, layer in origins]
    if vocabulary is not None:
        text["vocab_size"] = vocabulary.rows
    if any(HEAD.search(job.name) for job in plan.jobs):
        for part in (made, text):
            if part.get("tie_word_embeddings", True):
                part["tie_word_embeddings"] = False
    wanted = config.out_dtype or config.dtype
    if wanted:
        for part in (made, text):
            for key in [name for name in ("dtype", "torch_dtype") if name in part] or (["dtype"] if part is made else []):
                part[key] = TORCH[DTYPES[wanted]]
    (out / "config.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (donor.path / "generation_config.json").exists():
        shutil.copyfile(donor.path / "generation_config.json", out / "generation_config.json")


def write_tokenizer(config: MergeConfig, layouts: Mapping[str, Layout], donor: str, vocabulary: Vocabulary | None, out: Path) -> str:
    """The tokenizer's files and template; the model that they come from, or nothing where it has none."""
    source = donor if vocabulary is None else next(name for name, layout in layouts.items() if layout.path == vocabulary.source)
    if vocabulary is None:
        copy_tokenizer(layouts[donor].path, out)
    else:
        vocabulary.write(out)
        check_written(out, vocabulary)
        if source != donor and (layouts[source].path / "generation_config.json").exists():  # tokens that end an answer are told by their ids
            shutil.copyfile(layouts[source].path / "generation_config.json", out / "generation_config.json")
    if config.chat_template:
        if not (out / "tokenizer_config.json").exists():
            raise UserError(f"chat_template: {donor} has no tokenizer that it could be written to")
        template = template_of(config.chat_template, layouts, source)
        if template:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")
            settings = read_json(out / "tokenizer_config.json")
            settings.pop("chat_template", None)
            (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return source if (out / "tokenizer.json").exists() else ""


def template_of(said: str, layouts: Mapping[str, Layout], source: str) -> str:
    """auto: what most models have; a name of `tokenize.named`; or the template itself. UserError for what is none of these."""
    if said == "auto":
        found = [load_tokenizer(layout.path).chat_template for layout in layouts.values() if (layout.path / "tokenizer_config.json").exists()]
        templates = [str(one).strip() for one in found if one]
        return max(templates, key=templates.count) if templates else ""
    if said in NAMED:
        known = load_tokenizer(layouts[source].path).get_vocab()
        missing = [token for token in NAMED[said].tokens if token not in known]
        if missing:
            raise UserError(f"chat_template: {said} writes {missing[0]}, which is no token of {source}")
        return (FOLDER / f"{said}.jinja").read_text(encoding="utf-8")
    if len(said) < 20 or "{" not in said:
        raise UserError(f"chat_template: {said!r} is neither auto, nor a known name ({', '.join(NAMED)}), nor a Jinja template")
    return said


def golden_of(source: Model, ctx: Context, layouts: Mapping[str, Layout]) -> Golden:
    """What the result has to replay: ids, mask and stop tokens are those of the model whose tokenizer it has. Says which models end their answers otherwise."""
    tokenizer = load_tokenizer(ctx.out)
    stops = stop_ids(ctx.out, tokenizer)
    theirs = load_tokenizer(source.path)
    templates = [str(one.chat_template or "").strip() for one in (theirs, tokenizer)]
    if templates[0] == templates[1]:
        said = source.golden or golden.record(theirs, stop_ids(source.path, theirs), lambda ids: [[0.0]] * len(ids))
        golden.require(said, tokenizer, stops, step="merge")
    ends = {i: tokenizer.convert_ids_to_tokens(i) for i in stops}
    for name, layout in layouts.items():
        if (layout.path / "tokenizer_config.json").exists():
            own = load_tokenizer(layout.path)
            other = [token for token in (own.convert_ids_to_tokens(i) for i in stop_ids(layout.path, own)) if token not in ends.values()]
            if other:
                ctx.progress.say(f"warning: {name} ends its answers with {', '.join(map(str, other))}, the result with {', '.join(map(str, ends.values()))}; an answer in the manner of {name} may not end")
    return golden.record(tokenizer, stops, logits_at(ctx.out))


def logits_at(path: Path) -> golden.Logits:
    """What a directory's model says, block by block where it is a decoder that is known here, else loaded as a whole."""
    from llmworks.model.golden import torch_logits
    from llmworks.model.load import load_model
    from llmworks.model.source import Source
    from llmworks.model.streamed import logits_of

    try:
        source = Source(path)
    except ModelError:
        return torch_logits(load_model(path))
    return lambda ids: logits_of(source, [list(ids)])[0]


def describe(config: MergeConfig, models: Mapping[str, Model], plan: Plan, metrics: Mapping[str, Any], ctx: Context, donor: str) -> None:
    """The page, the card, and the configuration beside the weights, by which others see what it was made of."""
    said = config.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    (ctx.out / RECIPE).write_text(text, encoding="utf-8")
    names = [name for name in models if name != donor]
    how = METHODS[config.merge_method]
    lead = f"{len(models)} models by {config.merge_method}{f' ({how.source})' if how.source else ''}: {metrics['parameters'] / 1e6:,.1f} million parameters, {metrics['bytes'] / 1e6:,.1f} MB in {TORCH[plan.jobs[0].out_dtype]}."
    page = ctx.report
    page.title, page.lead = f"Merge of {', '.join(models)}", lead
    page.table("Models", ("name", "what", "digest", "reference"), [(name, "base" if name == config.base_model else "", model.digest[:12], model.ref) for name, model in models.items()])
    page.table("Layers", ("stack", "layers", "from"), [(stack, len(origins), ", ".join(_spans(origins))) for stack, origins in plan.layers.items()], "Where each layer's first source is; a method mixes all sources of a slice.")
    if metrics.get("tied_at_a_threshold"):
        page.text("Ties", f"{metrics['tied_at_a_threshold']:,} changes were as large as the last one that was kept, some of them kept and some not: the first in each tensor's order. A sort that is not stable may keep others of them.")
    page.text("Configuration", text)
    page.data = {"method": config.merge_method, "models": {name: model.digest for name, model in models.items()}, "layers": {stack: list(map(list, origins)) for stack, origins in plan.layers.items()}, **metrics}
    fronts = [front_of(model) for model in models.values()]
    licences = {str(front.get("license", "")) for front in fronts}
    front = {**({key: value for key, value in fronts[0].items() if key != "language"} if len(licences) == 1 else {"license": "other"}), "library_name": "transformers", "pipeline_tag": "text-generation", **bases_of(list(models.values()), "merge"), "tags": ["merge", "mergekit", config.merge_method]}
    name = f"{plain(donor)}-{config.merge_method}"
    lines = [f"# {name}", "", f"A merge of {', '.join(models)} by {config.merge_method}" + (f", measured from {config.base_model}." if config.base_model else "."), ""]
    if len(licences) > 1:
        lines += ["Its parents have different licences: " + "; ".join(f"{one}: {f.get('license', 'none stated')}" for one, f in zip(models, fronts, strict=True)) + ". Which terms hold for the result is not settled here.", ""]
    lines += ["```yaml", text.rstrip(), "```", "", "The tokens, mask and stop tokens of its tokenizer's model were replayed on these files." if names else "", ""]
    write(ctx.out, front, lines)
    ctx.progress.say(lead)


def _spans(origins: tuple[tuple[str, int], ...]) -> list[str]:
    """Runs of layers that follow one another in one model."""
    found: list[list[Any]] = []
    for model, layer in origins:
        if found and found[-1][0] == model and found[-1][2] == layer - 1:
            found[-1][2] = layer
        else:
            found.append([model, layer, layer])
    return [f"{model} {low} to {high}" if high > low else f"{model} {low}" for model, low, high in found]
