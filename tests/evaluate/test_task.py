"""A task's definition is checked before anything is asked; questions are what its templates say; one task says the same
on every engine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.generate.loopback import Loopback

from llmworks.core.artifact import Artifact, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, LlmworksError, ModelError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Completion, Engine, Scored
from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
from llmworks.evaluate.protocol.load_task import load_task
from llmworks.evaluate.protocol.loglikelihood import LoglikelihoodRequest, build_request, get_encoder, rolling_windows
from llmworks.evaluate.protocol.questions import build_questions
from llmworks.evaluate.protocol.task import Task
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.generate.engines.remote import RemoteEngine
from llmworks.generate.engines.torch import TorchEngine
from llmworks.generate.remote.endpoint import RemoteOptions
from llmworks.model.io.load import load_model
from llmworks.runtime.session import load
from llmworks.tokenize.load import load_tokenizer

CHOICE: dict[str, Any] = {
    "name": "t",
    "kind": "choice",
    "prompt": "plain",
    "question": "Q: {{q}}\nA:",
    "choices": "opts",
    "answer": "gold",
    "metrics": ["acc", "acc_norm"],
}
GENERATE: dict[str, Any] = {
    "name": "g",
    "question": "{{q}}",
    "answer": "{{gold}}",
    "metrics": ["exact_match"],
    "max_tokens": 8,
}
PERPLEXITY: dict[str, Any] = {
    "name": "p",
    "kind": "perplexity",
    "question": "q",
    "metrics": ["bits_per_byte", "token_perplexity"],
    "window": 16,
}


def rows_of(count: int) -> list[dict[str, Any]]:
    draw = random.Random(1)
    words = ["the", "quick", "brown", "fox", "user", "weather", "Oslo", "what", "is", "name", "city"]
    return [
        {
            "q": " ".join(draw.choices(words, k=draw.randint(3, 30))),
            "opts": [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(3)],
            "gold": draw.randrange(3),
            "set": f"s{i % 4}",
        }
        for i in range(count)
    ]


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, pico: Path) -> Run:
    def go(
        fields: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        engine: Callable[[], Engine] | None = None,
        place: str = "run",
        **config: Any,
    ) -> dict[str, Any]:
        task, data, here = tmp_path / "task.yaml", tmp_path / "rows.jsonl", tmp_path / place
        task.write_text(yaml.safe_dump(fields))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (here / "out").mkdir(parents=True, exist_ok=True)
        scratch = here.parent / f"scratch-{here.name}"  # side by side, as in a workspace
        scratch.mkdir(exist_ok=True)
        report = ReportBuilder()

        def open_engine(artifact: Artifact) -> Engine:
            return engine() if engine else TorchEngine.open(pico)

        model, dataset = load(str(pico)), load(str(data))
        assert isinstance(model, Model)
        assert isinstance(dataset, Dataset)
        evaluate(
            EvaluateConfig(task=str(task), **config),
            model,
            dataset,
            Context(here / "out", scratch, 0, Progress(quiet=True), report, open_engine),
        )
        report.write(here / "out")
        return report.data

    return go


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({**CHOICE, "chioces": []}, "unknown field 'chioces', did you mean 'choices'"),
    "no metric": ({**CHOICE, "metrics": []}, "metrics is empty"),
    "a metric of another kind": (
        {**CHOICE, "metrics": ["bleu"]},
        "kind choice has no metric 'bleu'; known: acc, acc_bytes",
    ),
    "no choices": ({k: v for k, v in CHOICE.items() if k != "choices"}, "kind choice needs `choices`"),
    "no question": ({**GENERATE, "question": ""}, "needs `question`"),
    "samples that are the same": ({**GENERATE, "samples": 4}, "samples is 4, but temperature is 0"),
    "more tries than samples": (
        {**GENERATE, "metrics": [{"name": "pass_at", "of": "key", "k": 3}]},
        "k=3 needs samples >= k, but samples is 1",
    ),
    "pass_at of nothing": ({**GENERATE, "metrics": ["pass_at"]}, "pass_at needs `of`"),
    "a stride above its window": ({**PERPLEXITY, "stride": 17}, "stride 17 is above window 16"),
    "an unknown step": ({**GENERATE, "extract": ["guess"]}, r"extract\.\.0\.how: Input should be 'regex'"),
    "conversations as choices": (
        {**CHOICE, "rows": "chat", "question": ""},
        "conversations without `question` need kind generate",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_definition_is_said_in_one_line(what: str, tmp_path: Path) -> None:
    fields, message = WRONG[what]
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match=message) as caught:
        load_task(str(tmp_path / "t.yaml"))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_task(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    for content, message in (
        (b"a: [", "not YAML"),
        (b"- a", "must be a mapping"),
        (b"\xff\xfe\xfa", "cannot be read as YAML"),
        (b"", "must be a mapping"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_task(str(file))
    with pytest.raises(UserError, match="no such file"):
        load_task(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="did you mean 'function-call'"):
        load_task("function-cal")


ROWS = rows_of(24)
BAD_ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "no rows": (CHOICE, [], "is empty"),
    "a gold beyond the choices": (
        CHOICE,
        [*ROWS, {**ROWS[0], "gold": 3}],
        "row '25': the right answer '3' is not among its 3 choices",
    ),
    "a gold that is no choice": (
        CHOICE,
        [{**ROWS[0], "gold": "none of these"}],
        "'none of these' is not among its 3 choices",
    ),
    "no gold": (CHOICE, [{**ROWS[0], "gold": []}], "row '1': has no right answer"),
    "a missing field": (
        CHOICE,
        [{"opts": ["a", "b"], "gold": 0}],
        r"row '1': the template 'Q: \{\{q\}\}\\nA:' cannot be rendered \('q' is undefined\)",
    ),
    "choices that are none": (CHOICE, [{**ROWS[0], "opts": 7}], "'opts' must give a list of strings"),
    "a broken row": (CHOICE, [], "is empty"),
    "not enough examples": (
        {**CHOICE, "shots": {"count": 5}},
        ROWS[:5],
        "num_fewshot is 5, but there are only 5 rows to draw examples from, including the row itself",
    ),
    "an answer no score function can read": ({**GENERATE, "metrics": ["regex"]}, [ROWS[0]], "`answer` must be"),
    "code in a template": ({**CHOICE, "question": "{{q.__class__.__mro__}}"}, [ROWS[0]], "cannot be rendered"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_refused_before_anything_is_asked(what: str, run: Run) -> None:
    fields, rows, message = BAD_ROWS[what]

    def never() -> Engine:
        raise AssertionError("the engine was opened")

    with pytest.raises(LlmworksError, match=message) as caught:
        run(fields, rows, never)
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_read_are_not_left_out(tmp_path: Path, run: Run) -> None:
    with pytest.raises(DataError, match=r"1 rows cannot be read, the first in rows\.jsonl:25: not a JSON object"):
        run(CHOICE, [*ROWS, 7])  # type: ignore[list-item]


def test_an_engine_that_cannot_is_told_before_the_run(run: Run, pico: Path) -> None:
    def remote() -> Engine:
        return RemoteEngine("http://127.0.0.1:9/v1", "m")

    with pytest.raises(UserError, match="needs loglikelihoods, but m offers embed, parallel, schema, tools"):
        run(CHOICE, ROWS, remote)
    with pytest.raises(UserError, match=r"continues plain text.*use prompt_format: chat"):
        run({**GENERATE, "prompt": "plain"}, ROWS, remote)
    with pytest.raises(UserError, match="prefills the answer"):
        run({**GENERATE, "prefix": "It is"}, ROWS, remote)

    def base() -> Engine:
        engine = TorchEngine.open(pico)
        engine.tokenizer.chat_template = None
        return engine

    with pytest.raises(
        ModelError, match="has no chat template, but task 'g' uses chat prompts; use prompt_format: plain"
    ):
        run(GENERATE, ROWS, base)

        # questions


def test_no_row_is_its_own_example() -> None:
    for choose in ("same", "first", "each"):
        task = Task(**{**CHOICE, "shots": {"count": 4, "choose": choose}})
        rows = [{**row, "id": str(i)} for i, row in enumerate(rows_of(30))]
        made = build_questions(task, rows, rows, same_pool=True)
        for question in made:
            *examples, asked = question.plain[0].split("\n\n")
            assert len(examples) == 4
            assert asked == f"Q: {question.row['q']}\nA:"
            assert not any(e.startswith(asked) for e in examples)
        if choose != "each":
            fronts = {q.plain[0].rsplit("\n\n", 1)[0] for q in made}
            assert len(fronts) <= 5  # one, but where an example itself is asked


def test_contexts_that_differ_and_one_ending(run: Run, pico: Path) -> None:
    """Winogrande's form: the option stands in the context, the ending is scored."""
    fields = {**CHOICE, "contexts": ["the quick", "brown fox", "city of"], "question": "name is", "answer": "gold"}
    fields.pop("choices")
    made = run(fields, ROWS[:6])
    model, tokenizer = load_model(pico), load_tokenizer(pico)
    for sample in made["samples"]:
        for context, found in zip(fields["contexts"], sample["logprobs"], strict=True):
            whole, before = (
                tokenizer(t, add_special_tokens=True)["input_ids"] for t in (f"{context} name is", context)
            )
            with torch.inference_mode():
                rows = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            assert found == pytest.approx(
                sum(float(rows[i - 1, whole[i]]) for i in range(len(before), len(whole))), abs=1e-3
            )


def test_white_space_moves_to_what_is_scored(pico: Path) -> None:
    encode = get_encoder(load_tokenizer(pico))
    given = build_request(encode, "the quick ", "brown", 512, 1)
    assert given.ids == tuple(encode("the quick brown"))
    assert given.target_start == len(encode("the quick"))
    assert build_request(encode, "", "brown", 512, 1) == LoglikelihoodRequest((1, *encode("brown")), 1)
    cut = build_request(encode, "a " * 100, "brown fox", 10, 1)
    assert len(cut.ids) == 11
    assert cut.truncated_tokens == len(encode("a " * 99 + "a brown fox")) - 11
    with pytest.raises(DataError, match="adds no tokens"):
        build_request(encode, "the", "", 512, 1)
    with pytest.raises(DataError, match="more than the engine's context length 3"):
        build_request(encode, "the", " brown fox Oslo what 1 2 3 4 5", 3, 1)


@pytest.mark.parametrize("stride", [0, 1, 3, 8])
def test_windows_score_every_token_once(stride: int) -> None:
    for length in (0, 1, 7, 8, 9, 16, 17, 40):
        ids = list(range(100, 100 + length))
        scored: list[int] = []
        for given in rolling_windows(ids, 1, 8, stride):
            assert len(given.ids) <= 9
            scored += given.ids[given.target_start :]
            first = ids.index(given.ids[given.target_start])
            assert list(given.ids[: given.target_start]) == ([1, *ids])[first + 1 - given.target_start : first + 1]
        assert scored == ids
    assert [g.target_start for g in rolling_windows(list(range(40)), 99, 8, 1)][1:] == [
        8
    ] * 32  # a full window before each


def test_intervals_treat_groups_as_one_draw(run: Run) -> None:
    rows = [{**row, "set": f"s{i // 12}"} for i, row in enumerate(rows_of(48))]
    alone, grouped = run(CHOICE, rows), run({**CHOICE, "group": "set"}, rows, place="b")
    assert alone["metrics"]["score"] == grouped["metrics"]["score"]
    assert (alone["metrics"]["low"], alone["metrics"]["high"]) != (
        grouped["metrics"]["low"],
        grouped["metrics"]["high"],
    )

    # engines


@pytest.mark.slow
def test_one_task_says_the_same_on_every_engine(run: Run, pico: Path, pico_gguf: Path) -> None:
    """torch, llama.cpp and a server with `echo`: the same texts, the same options chosen, the same answers."""
    behind = TorchEngine.open(pico)
    server = Loopback("openai", lambda request: behind.generate([request])[0], behind)
    engines: dict[str, Callable[[], Engine]] = {
        "torch": lambda: TorchEngine.open(pico),
        "llama.cpp": lambda: LlamaCppEngine(pico_gguf, threads=1),
        "server": lambda: RemoteEngine(server.url, "m", RemoteOptions(tokenizer=str(pico))),
    }
    for number, fields in enumerate(
        (
            CHOICE,
            {**CHOICE, "prompt": "chat", "shots": {"count": 2}},
            PERPLEXITY,
            GENERATE,
            {**GENERATE, "prompt": "plain", "stop": ["\n"]},
        )
    ):
        found = {name: run(fields, ROWS, engine, place=f"{number}{name}") for name, engine in engines.items()}
        for name, made in found.items():
            for ours, theirs in zip(found["torch"]["samples"], made["samples"], strict=True):
                assert ours["text"] == theirs["text"], name
                assert ours.get("logprobs") == pytest.approx(theirs.get("logprobs"), abs=5e-2), name
        assert len({json.dumps([m["protocol"].get("bos"), m["protocol"].get("template")]) for m in found.values()}) == 1
    server.stop()


class Breaks:
    """The pico model; gives up after some texts."""

    def __init__(self, inner: TorchEngine, after: int) -> None:
        self.inner, self.left, self.asked = inner, after, 0
        self.name, self.can, self.tokenizer, self.context = inner.name, inner.can, inner.tokenizer, inner.context

    def score(self, ids: Sequence[Sequence[int]], begins: Sequence[int] = ()) -> list[Scored]:
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += len(ids)
        return self.inner.score(ids, begins)

    def close(self) -> None:
        pass


def test_a_run_that_was_killed_scores_nothing_twice(
    run: Run, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmworks.evaluate.protocol.loglikelihood.CHUNK_TOKENS", 200)
    whole = run(CHOICE, ROWS, place="whole")
    first, second = Breaks(TorchEngine.open(pico), 3), Breaks(TorchEngine.open(pico), 1000)
    with pytest.raises(KeyboardInterrupt):
        run(CHOICE, ROWS, lambda: first, place="cut")  # type: ignore[arg-type,return-value]
    file = tmp_path / "scratch-cut" / "scores.jsonl"
    file.write_text(file.read_text() + '{"key": "cut sho')  # as a kill leaves it
    made = run(CHOICE, ROWS, lambda: second, place="cut")  # type: ignore[arg-type,return-value]
    assert first.asked > 0
    assert first.asked + second.asked == len(
        {json.dumps([s["question"], c]) for s in whole["samples"] for c in s["choices"]}
    )
    assert made["samples"] == whole["samples"]
    assert made["metrics"]["score"] == whole["metrics"]["score"]


def test_what_was_left_out_of_a_prompt_is_counted(run: Run) -> None:
    made = run({**CHOICE, "question": "{{q * 200}}"}, ROWS)
    assert made["metrics"]["truncated_prompts"] == 24
    assert all(s["cut"] > 0 for s in made["samples"])
    assert "truncated_prompts" not in run(CHOICE, ROWS, place="b")["metrics"]


def test_several_samples_and_pass_at_k(run: Run) -> None:
    fields = {
        **GENERATE,
        "answer": {"regex": "[aeiou]"},
        "metrics": [{"name": "pass_at", "of": "regex", "k": 1}, {"name": "pass_at", "of": "regex", "k": 3}],
        "samples": 5,
        "temperature": 1.3,
        "max_tokens": 2,
    }
    made = run(fields, ROWS)
    one, three = made["intervals"]["pass@1"]["value"], made["intervals"]["pass@3"]["value"]
    assert 0 < one < three < 1
    right = [sum(bool(set(t) & set("aeiou")) for t in s["texts"]) / 5 for s in made["samples"]]
    assert one == pytest.approx(sum(right) / len(right))


def test_a_pattern_that_takes_too_long_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """(x|xx)+$ on a long text of x and another letter: the answer counts as wrong, and the sample says why."""
    monkeypatch.setattr("llmworks.evaluate.protocol.filters.SECONDS", 0.05)
    monkeypatch.setattr(
        TorchEngine,
        "each",
        lambda self, requests: ((place, Completion("x" * 60 + "b", "stop")) for place in range(len(requests))),
    )
    made = run({**GENERATE, "extract": [{"how": "regex", "pattern": "(x|xx)+$"}]}, ROWS[:3])
    assert {s["reason"] for s in made["samples"]} == {"extract: the pattern timed out after 0.05 s"}
    assert {s["score"] for s in made["samples"]} == {0.0}


def test_one_question_that_is_refused_does_not_end_the_run(run: Run) -> None:
    rows = [*ROWS[:5], {**ROWS[5], "q": "word " * 900}]
    made = run(GENERATE, rows)
    assert [s["finish"] == "refused" for s in made["samples"]] == [False] * 5 + [True]
    assert made["metrics"]["refused"] == 1
    assert made["samples"][-1]["reason"].startswith("refused: the prompt has")
    assert made["samples"][-1]["score"] == 0.0
    with pytest.raises(LlmworksError, match="the prompt has"):  # but not where nothing can be asked
        run(GENERATE, rows[-1:], place="b")


def test_rows_that_are_left_out_are_counted(run: Run) -> None:
    made = run({**CHOICE, "only": "{{gold == 1}}"}, ROWS)
    assert made["protocol"]["filtered_rows"] == sum(row["gold"] != 1 for row in ROWS)
    assert len(made["samples"]) == sum(row["gold"] == 1 for row in ROWS)
    with pytest.raises(DataError, match="none of the 24 rows passes the filter of task"):
        run({**CHOICE, "only": "{{gold > 7}}"}, ROWS, place="b")


def test_examples_of_the_same_group() -> None:
    task = Task(**{**CHOICE, "group": "set", "shots": {"count": 2, "choose": "first", "same_group": True}})
    rows = [{**row, "id": str(i)} for i, row in enumerate(rows_of(40))]
    for question in build_questions(task, rows[20:], rows[:20], same_pool=False):
        firsts = [row for row in rows[:20] if row["set"] == question.row["set"]][:2]
        assert [part.split("\nA:")[0] for part in question.plain[0].split("\n\n")[:2]] == [
            f"Q: {row['q']}" for row in firsts
        ]
    with pytest.raises(UserError, match=r"num_fewshot is 2, but there are only 1 rows of the group 's3'"):
        build_questions(task, [rows[23]], [*rows[:3], rows[3]], same_pool=False)


class Counts(Breaks):
    """The pico model; counts what it is asked."""

    def __init__(self, inner: TorchEngine) -> None:
        super().__init__(inner, 10**9)
        self.requests = 0

    def prompt_ids(self, request: Any) -> list[int]:
        return self.inner.prompt_ids(request)

    def each(self, requests: Sequence[Any]) -> Any:
        self.requests += len(requests)
        return self.inner.each(requests)


def test_a_changed_task_asks_only_what_is_new(run: Run, pico: Path, tmp_path: Path) -> None:
    """Other metrics, another way to read answers, more rows: what was asked before is remembered, and the result is
    that of a fresh run.
    """

    def go(fields: dict[str, Any], place: str, **config: Any) -> tuple[dict[str, Any], int]:
        engine = Counts(TorchEngine.open(pico))
        made = run(fields, ROWS, lambda: engine, place=place, **config)  # type: ignore[arg-type,return-value]
        return made, engine.asked + engine.requests

    for fields, changed in (
        (CHOICE, {**CHOICE, "metrics": ["acc_bytes"]}),
        (GENERATE, {**GENERATE, "metrics": ["f1"], "extract": ["lower"]}),
    ):
        kind = fields["name"]
        _, first = go(fields, f"{kind}/one", limit=10)
        _, nothing = go(changed, f"{kind}/two", limit=10)
        made, rest = go(changed, f"{kind}/three")
        fresh, whole = go(changed, f"{kind}-fresh/x")
        assert (first > 0, nothing) == (True, 0)
        assert first + rest == whole
        for ours, theirs in zip(made["samples"], fresh["samples"], strict=True):
            assert ours.pop("logprobs", []) == pytest.approx(
                theirs.pop("logprobs", []), abs=1e-4
            )  # read in another order
            assert ours == theirs
    (memory,) = (tmp_path / "t").glob("responses-*")
    memory.write_bytes(memory.read_bytes()[:-20])  # as a kill leaves it
    assert go(CHOICE, "t/four")[1] == 1
    assert go(CHOICE, "t/five")[1] == 0
