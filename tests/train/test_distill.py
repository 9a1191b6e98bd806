"""Distillation: TRL's divergences, a loss that does not depend on how logits are divided, students that come nearer to
their teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.conftest import make_pico
from tests.train.test_sft import EXAMPLES, chats, rows_of

from llmworks.core.artifact import Adapter, Artifact, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, LlmworksError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Completion, Engine
from llmworks.data.store.rows import read_chat
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.io.decoder_files import load_decoder
from llmworks.runtime.session import load
from llmworks.train.distill import DistillConfig, distill
from llmworks.train.finetune import distillation_loss as room
from llmworks.train.finetune.distillation_loss import create_distillation_loss, divergence
from llmworks.train.finetune.examples import collate_padding_free
from llmworks.train.loop.packed_steps import packed_loss


@pytest.mark.filterwarnings("ignore")  # it is of their experimental part
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_divergences_are_trl_s(beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    student, teacher = torch.randn(7, 50, requires_grad=True), torch.randn(7, 50)
    theirs = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    ours = divergence(student, teacher, beta, temperature).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    one, other = (torch.autograd.grad(x, student)[0] for x in (ours, theirs))
    assert torch.allclose(one, other, atol=1e-6)


def test_divergences_by_their_definition() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 20), torch.randn(5, 20)
    p, q = torch.distributions.Categorical(logits=teacher / 2), torch.distributions.Categorical(logits=student / 2)
    assert torch.allclose(divergence(student, teacher, 0.0, 2.0), torch.distributions.kl_divergence(p, q), atol=1e-6)
    assert torch.allclose(divergence(student, teacher, 1.0, 2.0), torch.distributions.kl_divergence(q, p), atol=1e-6)
    assert torch.allclose(divergence(student, student, 0.5), torch.zeros(5), atol=1e-6)


def test_the_loss_does_not_depend_on_how_logits_are_divided(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the divergence of whole logits; gradients, too, three labels at a time."""
    teacher, student = load_decoder(make_pico(tmp_path / "teacher", seed=5)), load_decoder(pico)
    batch = collate_padding_free(EXAMPLES[:5])
    at = batch.label_ids[:, 1:] != -100
    with torch.no_grad():
        guide = teacher(input_ids=batch.ids, position_ids=batch.positions, segment_ids=batch.segments).logits[:, :-1][
            at
        ]
    logits = student(input_ids=batch.ids, position_ids=batch.positions, segment_ids=batch.segments).logits[:, :-1][at]
    wanted = 0.75 * 4 * divergence(logits, guide, 0.0, 2.0).sum() + 0.25 * torch.nn.functional.cross_entropy(
        logits, batch.label_ids[:, 1:][at], reduction="sum"
    )
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    monkeypatch.setattr(room, "get_chunk_size", lambda vocabulary: 3)
    student.zero_grad()
    found = create_distillation_loss(teacher, beta=0.0, temperature=2.0, ce_weight=0.25)(student, batch)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, p in student.named_parameters():
        assert p.grad is not None
        assert float((p.grad - gradients[name]).norm() / gradients[name].norm()) < 1e-5, name
    assert all(p.grad is None for p in teacher.parameters())
    assert float(
        create_distillation_loss(student, beta=0.0, temperature=1.0, ce_weight=0.0)(student, batch).detach()
    ) == pytest.approx(0, abs=1e-3)
    plain = float(packed_loss(student, batch).detach())
    assert float(
        create_distillation_loss(teacher, beta=0.0, temperature=1.0, ce_weight=0.999999)(student, batch).detach()
    ) == pytest.approx(plain, rel=1e-3)


Run = Callable[..., tuple[Adapter | Model, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, pico: Path) -> Run:
    def go(
        name: str, teacher: Path, engine: Engine | None = None, *, data: Dataset | None = None, **config: Any
    ) -> tuple[Adapter | Model, dict[str, Any]]:
        out, scratch = tmp_path / f"{name}-out", tmp_path / f"{name}-scratch"
        for place in (out, scratch):
            place.mkdir(exist_ok=True)

        def opened(artifact: Artifact) -> Engine:
            if engine is None:
                raise LlmworksError("none is needed")
            return engine

        one, other = load(str(teacher), name="teacher"), load(str(pico), name="student")
        assert isinstance(one, Model)
        assert isinstance(other, Model)
        rows = data or (
            Dataset(tmp_path / "chats", name="chats") if (tmp_path / "chats").exists() else chats(tmp_path / "chats")
        )
        settings = {"num_train_epochs": 8, "num_sample_prompts": 0, "optimizer": {"learning_rate": 0.01}, **config}
        made = distill(
            DistillConfig.model_validate(settings),
            one,
            other,
            rows,
            Context(out, scratch, 0, Progress(scratch / "metrics.jsonl", quiet=True), ReportBuilder(), opened),
        )
        return made, {"rows": Progress(scratch / "metrics.jsonl", quiet=True).read_metrics(), "scratch": scratch}

    return go


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl", "js_divergence"])
def test_a_student_comes_nearer_to_its_teacher(direction: str, run: Run, tmp_path: Path) -> None:
    teacher = make_pico(tmp_path / "teacher", seed=5)
    made, told = run("a", teacher, method="full", divergence=direction, optimizer={"learning_rate": 0.003})
    assert isinstance(made, Model)
    losses = [row["loss"] for row in told["rows"]]
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] >= 0  # a divergence is never less than nothing


def test_what_a_teacher_writes_is_learned(run: Run, tmp_path: Path) -> None:
    """A teacher of another vocabulary teaches by its answers; those that it does not finish are left out, and nothing
    is asked twice.
    """

    class Fake(TorchEngine):
        def __init__(self) -> None:
            self.asked = 0

        def each(self, requests: Any) -> Any:
            self.asked += len(requests)
            for place, request in enumerate(requests):
                said = request.messages[-1].content
                yield place, Completion(f"fox {said}", "length" if "Oslo" in said else "stop")

        def close(self) -> None:
            pass

    teacher = make_pico(tmp_path / "teacher", seed=5)
    file = teacher / "tokenizer.json"
    tokens = json.loads(file.read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 400, "content": "<|more|>"})
    file.write_text(json.dumps(tokens))
    engine = Fake()
    made, told = run("a", teacher, engine)
    assert isinstance(made, Adapter)
    rows = read_chat(Dataset(told["scratch"] / "written"))
    given = rows_of(24)
    whole = [row for row in given if "Oslo" not in row["messages"][0]["content"]]
    assert 0 < len(whole) < 24
    assert [(r["id"], r["messages"][-1]["content"]) for r in rows] == [
        (r["id"], f"fox {r['messages'][0]['content']}") for r in whole
    ]
    assert engine.asked == 24
    assert (made.metrics["rows"], made.metrics["dropped"]) == (len(whole), 24 - len(whole))
    aside = [json.loads(line) for line in (made.path / "set_aside.jsonl").read_text().splitlines()]
    assert {row["id"] for row in aside} == {row["id"] for row in given} - {row["id"] for row in whole}
    assert {row["reason"] for row in aside} == {"the teacher's completion is not finished within 512 tokens"}
    for fields in (
        {"temperature": 2.0},
        {"ce_weight": 0.3},
        {"divergence": "reverse_kl"},
    ):  # which would be read by nobody
        with pytest.raises(
            UserError, match=f"config.{next(iter(fields))} applies to logits, but teacher has another vocabulary"
        ):
            run("c", teacher, engine, **fields)
    with pytest.raises(UserError, match="source is logits, but teacher has another vocabulary"):
        run("b", teacher, engine, source="logits")


def test_what_is_refused(run: Run, tmp_path: Path) -> None:
    class Silent(TorchEngine):
        def __init__(self) -> None:
            pass

        def each(self, requests: Any) -> Any:
            yield from ((place, Completion("", "stop")) for place in range(len(requests)))

        def close(self) -> None:
            pass

    teacher = make_pico(tmp_path / "teacher", seed=5)
    with pytest.raises(DataError, match="finished none of 24 completions"):
        run("a", teacher, Silent(), source="text")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "the fox"}) + "\n")
    with pytest.raises(DataError, match="no conversations that end with an assistant turn"):
        run("b", teacher, Silent(), data=Dataset(tmp_path / "texts.jsonl", name="texts"), source="text")
    for wrong, message in (
        ({"source": "text", "ce_weight": 0.5}, "ce_weight, divergence and temperature apply to logits"),
        ({"method": "prompt_tuning"}, "a soft prompt cannot be distilled"),
    ):
        with pytest.raises(ValidationError, match=message):
            DistillConfig.model_validate(wrong)
