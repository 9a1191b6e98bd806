"""The self-test of fine-tunings finds each fault that it looks for, in what really runs, and passes what is right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.planted import wrong_learning, wrong_parts, wrong_resume
from tests.train.test_sft import chats, rows_of

from llmworks.core.artifact import Dataset, Model
from llmworks.core.errors import UserError
from llmworks.data.conversations import training_rows as lessons
from llmworks.data.store.rows import write_chat
from llmworks.model.lora import adapter_io as adapter
from llmworks.model.nn import attention
from llmworks.tokenize.chat.templates import RenderedConversation
from llmworks.train.distill import DistillConfig
from llmworks.train.finetune import examples
from llmworks.train.selftest import finetune as selftest_sft
from llmworks.train.sft import SftConfig

CONFIG: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora": {"r": 4},
    "optimizer": {"learning_rate": 0.003},
}
RIGHT: dict[str, dict[str, Any]] = {
    "an adapter": {},
    "of four bits": {"lora": {"load_in_4bit": True, "use_dora": True}},
    "all weights": {"method": "full", "lora": {}, "freeze": ["model.layers.0.*"]},
    "with habits": {
        "neftune_noise_alpha": 5,
        "gradient_checkpointing": True,
        "train_on": "last_assistant",
        "eval_steps": 2,
        "metric_for_best_model": "accuracy",
    },
    "a soft prompt": {"method": "prompt_tuning", "lora": {}, "optimizer": {}},
    "with dropout": {
        "lora": {
            "lora_dropout": 0.1,
            "loraplus_lr_ratio": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
        }
    },
}


@pytest.mark.parametrize(
    "what",
    [what if what in ("an adapter", "all weights") else pytest.param(what, marks=pytest.mark.slow) for what in RIGHT],
)
def test_what_is_right_passes(what: str, pico: Path, tmp_path: Path) -> None:
    checks = list(
        selftest_sft.selftest_sft(SftConfig.model_validate(CONFIG | RIGHT[what]), pico, chats(tmp_path / "chats", 30))
    )
    assert len(checks) == 9
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


def bench(pico: Path, tmp_path: Path, config: SftConfig | None = None) -> selftest_sft._SftBench:
    (tmp_path / "bench").mkdir()
    return selftest_sft._SftBench(
        tmp_path / "bench", pico, config or SftConfig.model_validate(CONFIG), chats(tmp_path / "chats", 30, turns=2)
    )


Change = Callable[[RenderedConversation], RenderedConversation]


def of_rendered(change: Change) -> Callable[[pytest.MonkeyPatch], None]:
    """Plant a change of what the template renders for training."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = lessons.render_answers
        patch.setattr(lessons, "render_answers", lambda *args, **more: [change(made) for made in real(*args, **more)])

    return plant


def of_mask(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[pytest.MonkeyPatch], None]:
    return of_rendered(lambda made: RenderedConversation(made.ids, change(made.mask)))


def only_second_half(mask: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(m if i > len(mask) // 2 else 0 for i, m in enumerate(mask))


def without_ends(mask: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(m and n) for m, n in zip(mask, (*mask[1:], 0), strict=True))


def without_first_answer(mask: tuple[int, ...]) -> tuple[int, ...]:
    begin = mask.index(1)
    end = begin + (*mask[begin:], 0).index(0)
    return (*(0,) * end, *mask[end:])


def with_another_id(made: RenderedConversation) -> RenderedConversation:
    return RenderedConversation((*made.ids[:3], made.ids[3] + 1, *made.ids[4:]), made.mask)


def shifted_labels(patch: pytest.MonkeyPatch) -> None:
    real = examples.collate_padding_free

    def shifted(*args: Any, **more: Any) -> Any:
        made = real(*args, **more)
        return dataclasses.replace(made, label_ids=made.label_ids.roll(-1, 1))

    patch.setattr(examples, "collate_padding_free", shifted)


def wrong_segments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "get_segment_bounds", lambda segments: ((0, len(segments)),))


def wrong_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "manual_seed", lambda seed: torch.default_generator)


def wrong_fold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adapter, "compute_scale", lambda *a: 1.0)


def _parts(b: selftest_sft._SftBench) -> tuple[bool, str]:
    return selftest_sft._check_accumulation(b, selftest_sft.EXACT)


def _saved(b: selftest_sft._SftBench) -> tuple[bool, str]:
    assert b.baseline
    return selftest_sft._check_saved(b)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[..., tuple[bool, str]]]] = {
    "questions are learned": (of_mask(lambda mask: (1,) * len(mask)), selftest_sft._check_labels),
    "answers are not learned": (of_mask(only_second_half), selftest_sft._check_labels),
    "the end token is not learned": (of_mask(without_ends), selftest_sft._check_labels),
    "the mask is shifted": (of_mask(lambda mask: (0, *mask[:-1])), selftest_sft._check_labels),
    "labels are shifted": (shifted_labels, selftest_sft._check_labels),
    "ids are not those of the template": (of_rendered(with_another_id), selftest_sft._check_labels),
    "an answer is left out": (of_mask(without_first_answer), selftest_sft._check_labels),
    "rows see one another": (wrong_segments, selftest_sft._check_row_isolation),
    "parts weigh alike": (wrong_parts, _parts),
    "the adapter is drawn before the seed": (wrong_seed, selftest_sft.check_seed),
    "moments are lost": (wrong_resume, selftest_sft.check_resume),
    "nothing is learned": (wrong_learning, selftest_sft._check_memorization),
    "another scale is merged": (wrong_fold, _saved),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, check = FAULTS[name]
    fault(monkeypatch)
    holds, detail = check(bench(pico, tmp_path))
    assert not holds, detail


def test_a_key_that_nothing_reads_is_named(pico: Path, tmp_path: Path) -> None:
    config = SftConfig.model_validate(CONFIG | {"optimizer": {"lr_scheduler_type": "cosine", "decay_ratio": 0.5}})
    holds, detail = selftest_sft._check_fields_read(bench(pico, tmp_path, config), config)
    assert not holds
    assert detail == "set, but not read by this training: optimizer.decay_ratio"


def test_what_cannot_be_shrunken_is_said(pico: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pico, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    write_chat(tmp_path / "chats", rows_of(4))
    with pytest.raises(UserError, match=r"needs a known architecture: .*phi3"):
        list(selftest_sft.selftest_sft(SftConfig(), tmp_path / "odd", Dataset(tmp_path / "chats", name="chats")))


def test_a_distillation_is_tried_under_a_teacher(pico: Path, tmp_path: Path) -> None:
    """What only a teacher's chances have is read; of one that teaches by its text it is not, and that is found."""
    config = DistillConfig.model_validate(
        {**CONFIG, "method": "full", "lora": {}, "temperature": 2.0, "ce_weight": 0.2, "divergence": "reverse_kl"}
    )
    checks = list(selftest_sft.selftest_sft(config, pico, chats(tmp_path / "chats", 30), teacher=True))
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    keys = next(selftest_sft.selftest_sft(config, pico, chats(tmp_path / "chats", 30)))
    assert not keys.passed
    assert "temperature" in keys.detail


def test_golden_tokens_that_do_not_replay_are_found(pico: Path, tmp_path: Path) -> None:
    """Another template than the one that the model was recorded with."""
    base = recorded_model(pico)
    for golden, holds in (("keep", False), ("renew: another template", True)):
        config = SftConfig.model_validate(CONFIG | {"chat_template": "chatml", "golden": golden})
        check = next(
            check
            for check in selftest_sft.selftest_sft(config, pico, chats(tmp_path / "chats", 30), golden=base)
            if check.name == "golden tokens replay or may change"
        )
        assert check.passed == holds, check.detail
        assert holds or "set golden to 'renew: REASON'" in check.detail


def recorded_model(pico: Path) -> Model:
    from llmworks.model.golden import make_logits_function
    from llmworks.model.io.load import load_model
    from llmworks.tokenize.chat.golden import record_golden
    from llmworks.tokenize.load import get_stop_ids, load_tokenizer

    tokenizer = load_tokenizer(pico)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant'"
        " }}{% endif %}"
    )
    return Model(
        pico,
        golden=record_golden(tokenizer, get_stop_ids(pico, tokenizer), make_logits_function(load_model(pico))),
        about={"format": "hf"},
        name="pico",
    )
