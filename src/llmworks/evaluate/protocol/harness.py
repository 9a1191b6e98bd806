"""Convert lm-evaluation-harness tasks to tasks of this project: the declarative subset.

Python code in them (`!function`) is rejected by name.

Reference: lm_eval 0.4.13, `config/task.py` and its documentation of task files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from llmworks.core.errors import UserError

KINDS = {
    "multiple_choice": "choice",
    "loglikelihood": "likelihood",
    "loglikelihood_rolling": "perplexity",
    "generate_until": "generate",
}
DEFAULT_MAX_TOKENS = 256  # default max_gen_toks
REGEX_OPTIONS = ("regex_pattern", "group_select", "fallback")
FILTERS = {"lowercase": "lower", "uppercase": "upper", "remove_whitespace": "strip"}
IGNORES = {"ignore_case": "ignore_case", "ignore_punctuation": "ignore_punctuation", "regexes_to_ignore": "ignore"}
AGGREGATIONS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "brier_score": "brier_score",
    "bleu": "bleu",
    "chrf": "chrf",
    "chrf++": "chrf++",
    "ter": "ter",
}  # those of metrics that are not a mean
LOWER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}  # better lower
METRICS = {
    "acc",
    "acc_norm",
    "acc_bytes",
    "brier_score",
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "exact_match",
    "bleu",
    "chrf",
    "chrf++",
    "ter",
}


def load_yaml(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Load a task file with its includes.

    Functions that it names are kept as a marker, to be rejected where they matter.
    """
    import yaml

    if path.resolve() in including:
        raise UserError(f"{path}: includes itself")

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    Loader.add_constructor("!function", lambda loader, node: _Function(str(node.value)))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a task is a built-in name or a YAML file") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(
            f"{path}:{error.problem_mark.line + 1 if error.problem_mark else 1}: not YAML: {error.problem}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of a task's fields")
    includes = values.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{path}: include must be a file name or a list of file names")
    for name in reversed(includes):
        values = {**load_yaml(path.parent / name, (*including, path.resolve())), **values}
    return values


@cache
def read_fields() -> dict[str, dict[str, str]]:
    """Return the fields of task files by section, and what happens to each: read, ignored or refused, and why."""
    import yaml

    text = resources.files("llmworks.evaluate").joinpath("protocol", "harness_fields.yaml").read_text(encoding="utf-8")
    fields: dict[str, dict[str, str]] = yaml.safe_load(text)
    return fields


def _refuse_fields(section: str, given: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for the first field of a section that is not supported."""
    for field, value in given.items():
        name = field if section == "task" else f"{section}.{field}"
        if _has_function(value):
            raise UserError(f"{path}: {name} is a Python function, which is not supported; write it as a template")
        fate = read_fields()[section].get(field, "refused")
        if fate.startswith("refused") and value is not None:
            why = fate.partition(": ")[2]
            raise UserError(
                f"{path}: the lm-evaluation-harness field {name!r} is not supported" + (f" ({why})" if why else "")
            )


class _Function(str):
    """The name of a function in a task file."""


def from_harness(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert a harness task to Task fields. UserError for Python code and unsupported fields."""
    _refuse_fields("task", values, path)
    if isinstance(values.get("task"), list):
        raise UserError(f"{path}: is a group of tasks; evaluate its tasks one by one")
    kind = KINDS.get(str(values.get("output_type", "generate_until")))
    if kind is None:
        raise UserError(f"{path}: unknown output_type {values.get('output_type')!r}; known: {', '.join(KINDS)}")
    generation = dict(values.get("generation_kwargs") or {})
    between = values.get("fewshot_delimiter", "\n\n")
    out: dict[str, Any] = {
        "name": str(values.get("task") or path.stem),
        "what": str(values.get("task_alias") or values.get("task") or path.stem),
        "kind": kind,
        "prompt": "plain",
        "description": values.get("description", ""),
        "question": str(values.get("doc_to_text", "")),
        "answer": values.get("doc_to_target", ""),
        "before_answer": values.get("target_delimiter", " "),
        "between": between,
        "prefix": values.get("gen_prefix") or "",
        "shots": _convert_fewshot(values, path),
        "metrics": _convert_metrics(values, kind, path),
        "extract": _convert_filters(values, path),
        **_convert_dataset(values, path),
    }
    if kind == "perplexity":
        out |= {"question": str(values.get("doc_to_target", "")), "answer": ""}
    if values.get("doc_to_choice") is not None:
        choices = values["doc_to_choice"]
        out["choices"] = list(choices.values()) if isinstance(choices, dict) else choices
    out["delimit_answer"] = kind != "likelihood"  # the harness scores the target of a loglikelihood as it is
    out["refuse_numeric_question"] = kind == "choice"
    if kind == "generate":
        out |= _convert_generation(values, generation, between, path)
    return out


def _convert_generation(
    values: Mapping[str, Any], generation: Mapping[str, Any], between: str, path: Path
) -> dict[str, Any]:
    """Return the sampling fields of a generate_until task."""
    _refuse_fields("generation_kwargs", generation, path)
    until = generation.get("until", between)
    sampled = bool(generation.get("do_sample", float(generation.get("temperature", 0) or 0) > 0))
    if int(values.get("repeats") or 1) > 1 and not all(
        any(item.get("function") == "take_first" for item in one.get("filter", []))
        for one in values.get("filter_list") or []
    ):
        raise UserError(f"{path}: repeats is {values['repeats']}, but a filter does not take the first (take_first)")
    return {
        "stop": [until] if isinstance(until, str) else list(until),
        "max_tokens": int(generation.get("max_gen_toks") or generation.get("max_new_tokens") or DEFAULT_MAX_TOKENS),
        "top_p": float(generation.get("top_p", 1.0)) if sampled else 1.0,
        "temperature": float(generation.get("temperature", 1.0)) if sampled else 0.0,
    }


def _has_function(value: Any) -> bool:
    if isinstance(value, _Function):
        return True
    return (
        any(map(_has_function, value.values() if isinstance(value, dict) else value))
        if isinstance(value, (dict, list))
        else False
    )


def _convert_fewshot(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the few-shot fields. The harness draws one example more where the split of the examples, which may be
    missing, is the split of the questions, and then leaves out the question itself.
    """
    config = dict(values.get("fewshot_config") or {})
    _refuse_fields("fewshot_config", config, path)
    choose = {"default": "each", "first_n": "first"}.get(str(config.get("sampler", "default")))
    if choose is None:
        raise UserError(f"{path}: fewshot_config.sampler {config['sampler']!r} is not supported")
    split = config.get("split") or values.get("fewshot_split")
    return {
        "count": int(values.get("num_fewshot") or 0),
        "choose": choose,
        "rows": [] if split else config.get("samples") or [],
        "draw_extra": (split or None) == (values.get("test_split") or None),
    }


def _convert_metrics(values: Mapping[str, Any], kind: str, path: Path) -> list[dict[str, Any]]:
    default = {
        "choice": ["acc", "acc_norm"],
        "likelihood": ["perplexity", "acc"],
        "perplexity": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
        "generate": ["exact_match"],
    }[kind]
    out: list[dict[str, Any]] = []
    for item in values.get("metric_list") or [{"metric": name} for name in default]:
        name = str(item.get("metric"))
        if name not in METRICS:
            raise UserError(f"{path}: metric_list: {name!r} is not supported; supported: {', '.join(sorted(METRICS))}")
        _refuse_fields("metric_list", {key: value for key, value in item.items() if value is not False}, path)
        own = AGGREGATIONS.get(name, "mean")
        if (given := item.get("aggregation", own)) not in (own, "nanmean" if own == "mean" else own):
            raise UserError(f"{path}: metric_list: the aggregation {given!r} of {name} is not supported, only {own!r}")
        if item.get("higher_is_better", name not in LOWER) is not (name not in LOWER):
            raise UserError(f"{path}: metric_list: {name} is better {'lower' if name in LOWER else 'higher'}")
        out.append({"name": name, **{ours: item[theirs] for theirs, ours in IGNORES.items() if item.get(theirs)}})
    return out


def _convert_filters(values: Mapping[str, Any], path: Path) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for filter_spec in values.get("filter_list") or []:
        steps: list[dict[str, Any]] = []
        for item in filter_spec.get("filter", []):
            function = str(item.get("function"))
            supported = ("regex", "take_first", *FILTERS)
            if function not in supported:
                raise UserError(
                    f"{path}: filter_list: the filter {function!r} is not supported; supported: {', '.join(supported)}"
                )
            known = {"function", *(REGEX_OPTIONS if function == "regex" else ())}
            if options := sorted(set(item) - known):
                raise UserError(f"{path}: filter_list: the option {options[0]!r} of {function} is not supported")
            if function == "regex":
                steps.append(
                    {
                        "how": "regex",
                        "pattern": item.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"),
                        "pick": item.get("group_select", 0),
                        "fallback": item.get("fallback", "[invalid]"),
                    }
                )
            elif function in FILTERS:
                steps.append({"how": FILTERS[function]})
        out["" if filter_spec.get("name") in (None, "none") else str(filter_spec["name"])] = steps
    return out or {"": []}


def _convert_dataset(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return references of the evaluated rows and the few-shot rows: local files, or a Hub dataset with its splits."""
    source, options = str(values.get("dataset_path") or ""), dict(values.get("dataset_kwargs") or {})
    _refuse_fields("dataset_kwargs", options, path)
    test = str(values.get("test_split") or values.get("validation_split") or "")
    config = dict(values.get("fewshot_config") or {})
    shots = str(config.get("split") or values.get("fewshot_split") or "")
    if not shots and not config.get("samples"):
        shots = str(values.get("training_split") or values.get("validation_split") or "")
    files = options.get("data_files")
    if source in ("json", "csv", "parquet"):
        named = files if isinstance(files, dict) else {test or "train": files}
        base = Path(str(options.get("data_dir") or ""))
        paths = {split: str(base / _get_file(split, given, path)) for split, given in named.items() if given}
        return {"data": paths.get(test, ""), "examples": paths.get(shots, "") if shots != test else ""}
    if not source:
        return {}
    if files:
        raise UserError(
            f"{path}: dataset_kwargs.data_files of a dataset of the Hub is not supported; download the files"
        )
    name = str(values.get("dataset_name") or "")
    ref = f"hf:datasets/{source}" + (f"/{name}" if name and name != "default" else "")
    return {
        "data": ref,
        "split": test,
        "examples": ref if shots and shots != test else "",
        "examples_split": shots if shots != test else "",
    }


def _get_file(split: str, given: Any, path: Path) -> str:
    """Return the only file of a split. UserError for several, and for patterns."""
    files = given if isinstance(given, list) else [given]
    if len(files) > 1 or "*" in str(files[0]):
        raise UserError(
            f"{path}: dataset_kwargs.data_files: {split} has {len(files) if len(files) > 1 else 'a pattern of'} files;"
            " join them in one file"
        )
    return str(files[0])
