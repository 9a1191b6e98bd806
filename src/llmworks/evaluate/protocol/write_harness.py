"""Export a task as lm-evaluation-harness YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmworks.core.errors import UserError
from llmworks.evaluate.protocol.harness import FILTERS, IGNORES, KINDS, METRICS
from llmworks.evaluate.protocol.task import Task


def to_harness(task: Task) -> dict[str, Any]:
    """Convert a task to the harness's YAML fields. UserError for what it cannot express."""
    _check_exportable(task)
    unknown = [m.name for m in task.metrics if m.name not in METRICS]
    if unknown:
        raise UserError(
            f"{task.name}: metric {unknown[0]!r} cannot be exported to the lm-evaluation-harness without Python code"
        )
    choose = {"each": "default", "first": "first_n"}.get(task.shots.choose)
    if task.shots.count and choose is None:
        raise UserError(
            f"{task.name}: the lm-evaluation-harness samples new examples for every question; set shots.choose to each"
            " or first"
        )
    out: dict[str, Any] = {
        "task": task.name,
        "output_type": {ours: theirs for theirs, ours in KINDS.items()}[task.kind],
        "doc_to_text": task.question,
        "doc_to_target": task.answer,
        "target_delimiter": task.before_answer,
        "fewshot_delimiter": task.between,
        "num_fewshot": task.shots.count,
        "metric_list": [_export_metric(m.model_dump()) for m in task.metrics],
        "metadata": {"version": 1.0},
        **_export_dataset(task),
    }
    if task.kind == "perplexity":
        out |= {"doc_to_text": "", "doc_to_target": task.question}
    if task.choices:
        out["doc_to_choice"] = task.choices
    if task.description:
        out["description"] = task.description
    if task.prefix:
        out["gen_prefix"] = task.prefix
    if task.shots.count:
        out["fewshot_config"] = {"sampler": choose, **({"samples": task.shots.rows} if task.shots.rows else {})}
    if task.kind == "likelihood" and task.delimit_answer:
        answer = str(task.answer)
        answer = answer if "{{" in answer or "{%" in answer else "{{" + answer + "}}"
        out |= {"doc_to_target": f"{task.before_answer}{answer}", "target_delimiter": ""}
    if task.kind == "generate":
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": task.temperature, "top_p": task.top_p}
            if task.temperature
            else {"do_sample": False}
        )
        out |= {
            "generation_kwargs": {"until": task.stop, "max_gen_toks": task.max_tokens, **sampling},
        }
        if task.extract != {"": []}:
            out["filter_list"] = [
                {
                    "name": name or "none",
                    "filter": [*map(_export_filter, (s.model_dump() for s in steps)), {"function": "take_first"}],
                }
                for name, steps in task.extract.items()
            ]
    return out


def _check_exportable(task: Task) -> None:
    """Raise UserError for what the harness's YAML cannot express."""
    if task.samples > 1:
        raise UserError(
            f"{task.name}: the mean of {task.samples} samples cannot be exported; the lm-evaluation-harness takes the"
            " first"
        )
    if task.rows == "chat" or task.contexts or isinstance(task.answer, dict) or task.group:
        what = (
            "conversations"
            if task.rows == "chat"
            else (
                "`contexts`"
                if task.contexts
                else "a mapping as `answer`"
                if isinstance(task.answer, dict)
                else "`group`"
            )
        )
        raise UserError(f"{task.name}: {what} cannot be exported to the lm-evaluation-harness without Python code")


def _export_metric(measure: Mapping[str, Any]) -> dict[str, Any]:
    lower = measure["name"] in (
        "perplexity",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
        "brier_score",
        "ter",
    )
    plain = {
        "perplexity": "perplexity",
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
        "brier_score": "brier_score",
    }
    aggregation = plain.get(
        measure["name"], measure["name"] if measure["name"] in ("bleu", "chrf", "chrf++", "ter") else "mean"
    )
    return {
        "metric": measure["name"],
        "aggregation": aggregation,
        "higher_is_better": not lower,
        **{theirs: measure[ours] for theirs, ours in IGNORES.items() if measure[ours]},
    }


def _export_filter(step: Mapping[str, Any]) -> dict[str, Any]:
    if step["how"] == "regex":
        return {
            "function": "regex",
            "regex_pattern": step["pattern"],
            "group_select": step["pick"],
            "fallback": step["fallback"],
        }
    names = {ours: theirs for theirs, ours in FILTERS.items()}
    if step["how"] not in names:
        raise UserError(f"extract: {step['how']!r} cannot be exported to the lm-evaluation-harness without Python code")
    return {"function": names[step["how"]]}


def _export_dataset(task: Task) -> dict[str, Any]:
    if task.data.startswith("hf:datasets/"):
        owner, _, rest = task.data.removeprefix("hf:datasets/").partition("/")
        name, _, config = rest.partition("/")
        return {
            "dataset_path": f"{owner}/{name}",
            **({"dataset_name": config} if config else {}),
            **_export_splits(task, task.split or "test", task.examples_split),
        }
    files = {"test": task.data or f"{task.name}.jsonl", **({"fewshot": task.examples} if task.examples else {})}
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        **_export_splits(task, "test", "fewshot" if task.examples else ""),
    }


def _export_splits(task: Task, test: str, examples: str) -> dict[str, str]:
    """Return the splits, named so that the harness draws as many examples as are drawn here (`draw_extra`)."""
    extra = task.shots.draw_extra
    if not task.shots.count or task.shots.rows or (extra is False and not examples):
        return {"test_split": test}
    if extra and examples:
        return {"validation_split": test, "training_split": examples}
    return {"test_split": test, "fewshot_split": examples or test}
