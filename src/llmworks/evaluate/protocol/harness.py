"""Convert lm-evaluation-harness tasks to tasks of this project: the declarative subset.

Python code in them (`!function`) is rejected by name.

Reference: lm_eval 0.4.13, `config/task.py` and its documentation of task files.
"""

from __future__ import annotations

from collections.abc import Mapping
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
IGNORED_FIELDS = {  # fields that do not change the requests here
    "tag",
    "task_alias",
    "group",
    "metadata",
    "should_decontaminate",
    "doc_to_decontamination_query",
    "training_split",
    "validation_split",
    "unsafe_code",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "test_split",
    "fewshot_split",
    "repeats",
}
SUPPORTED_FIELDS = {
    "task",
    "output_type",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "target_delimiter",
    "fewshot_delimiter",
    "fewshot_config",
    "num_fewshot",
    "metric_list",
    "generation_kwargs",
    "filter_list",
    "gen_prefix",
    "include",
}
FILTERS = {"lowercase": "lower", "uppercase": "upper", "remove_whitespace": "strip"}
IGNORES = {"ignore_case": "ignore_case", "ignore_punctuation": "ignore_punctuation", "regexes_to_ignore": "ignore"}
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

    class Loader(yaml.SafeLoader):
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


class _Function(str):
    """The name of a function in a task file."""


def from_harness(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert a harness task to Task fields. UserError for Python code and unsupported fields."""
    for field, value in values.items():
        if _has_function(value):
            raise UserError(f"{path}: {field} is a Python function, which is not supported; write it as a template")
        if field not in SUPPORTED_FIELDS | IGNORED_FIELDS:
            raise UserError(f"{path}: the lm-evaluation-harness field {field!r} is not supported")
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
    if kind == "likelihood":  # the harness scores the target as is; target_delimiter applies only to few-shot examples
        out |= {
            "before_answer": "",
            "example_answer": (
                f"{out['before_answer']}{out['answer']}" if str(out["answer"]).count("{{") else out["answer"]
            ),
        }
    if kind == "generate":
        until = generation.get("until", between)
        sampled = bool(generation.get("do_sample", float(generation.get("temperature", 0) or 0) > 0))
        out |= {
            "stop": [until] if isinstance(until, str) else list(until),
            "max_tokens": int(generation.get("max_gen_toks") or generation.get("max_new_tokens") or DEFAULT_MAX_TOKENS),
            "top_p": float(generation.get("top_p", 1.0)) if sampled else 1.0,
            "samples": int(values.get("repeats") or 1),
        }
        out["temperature"] = float(generation.get("temperature", 1.0)) if sampled else 0.0
        unknown = set(generation) - {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p"}
        if unknown:
            raise UserError(f"{path}: generation_kwargs.{sorted(unknown)[0]} is not supported")
    return out


def _has_function(value: Any) -> bool:
    if isinstance(value, _Function):
        return True
    return (
        any(map(_has_function, value.values() if isinstance(value, dict) else value))
        if isinstance(value, (dict, list))
        else False
    )


def _convert_fewshot(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = dict(values.get("fewshot_config") or {})
    unknown = set(config) - {"sampler", "samples", "split"}
    if unknown:
        raise UserError(f"{path}: fewshot_config.{sorted(unknown)[0]} is not supported")
    choose = {"default": "each", "first_n": "first"}.get(str(config.get("sampler", "default")))
    if choose is None:
        raise UserError(f"{path}: fewshot_config.sampler {config['sampler']!r} is not supported")
    return {"count": int(values.get("num_fewshot") or 0), "choose": choose, "rows": config.get("samples") or []}


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
        unknown = set(item) - {"metric", "aggregation", "higher_is_better", "weight_by_size", *IGNORES}
        if unknown:
            raise UserError(f"{path}: metric_list: the option {sorted(unknown)[0]!r} of {name} is not supported")
        out.append({"name": name, **{ours: item[theirs] for theirs, ours in IGNORES.items() if item.get(theirs)}})
    return out


def _convert_filters(values: Mapping[str, Any], path: Path) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for filter_spec in values.get("filter_list") or []:
        steps: list[dict[str, Any]] = []
        for item in filter_spec.get("filter", []):
            function = item.get("function")
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
            elif function != "take_first":
                raise UserError(
                    f"{path}: filter_list: the filter {function!r} is not supported; supported: regex, take_first,"
                    f" {', '.join(FILTERS)}"
                )
        out["" if filter_spec.get("name") in (None, "none") else str(filter_spec["name"])] = steps
    return out or {"": []}


def _convert_dataset(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return references of the evaluated rows and the few-shot rows: local files, or a Hub dataset with its splits."""
    source, options = str(values.get("dataset_path") or ""), dict(values.get("dataset_kwargs") or {})
    test = str(values.get("test_split") or values.get("validation_split") or "")
    shots = str(values.get("fewshot_split") or values.get("training_split") or values.get("validation_split") or "")
    files = options.get("data_files")
    if source in ("json", "csv", "parquet"):
        named = files if isinstance(files, dict) else {test or "train": files}
        base = Path(str(options.get("data_dir") or ""))
        paths = {
            split: str(base / (file[0] if isinstance(file, list) else str(file)))
            for split, file in named.items()
            if file
        }
        return {"data": paths.get(test, ""), "examples": paths.get(shots, "") if shots != test else ""}
    if not source:
        return {}
    name = str(values.get("dataset_name") or "")
    ref = f"hf:datasets/{source}" + (f"/{name}" if name and name != "default" else "")
    return {
        "data": ref,
        "split": test,
        "examples": ref if shots and shots != test else "",
        "examples_split": shots if shots != test else "",
    }
