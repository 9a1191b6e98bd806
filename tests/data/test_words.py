"""Duplicates, leaks, word counts and filters in scripts without spaces, and in other ways to write the same text."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from tests.data.plain_words import plain_words

from llmworks.core.documents import read_documents
from llmworks.core.text.words import split_words
from llmworks.data.text.hashing import WORD, hash_words
from llmworks.runtime.session import Session

TEXTS = {
    "Chinese": (
        "老人们坐在长椅上聊天，农民在春天播种在秋天收获，"
        "看到很多花开了，鱼儿在水里游来游去。"
        "孩子们在草地上跑来跑去，医生建议多喝水多运动，"
        "火车从北方开往南方，工程师设计了一座大桥。"
    ),
    "Japanese": (
        "老人たちはベンチに座って話しています。"
        "農民は春に種をまき、秋に収穫します。"
        "子どもたちは草の上を走り回り、"
        "医者はもっと水を飲むように勧めています。"
        "列車は北から南へ走ります。"
    ),
    "Thai": (
        "คนแก่นั่งคุยกันบนม้านั่งยาวชาวนาหว่านเมล็ดในฤดูใบไม้ผลิและเก็บเกี่ยวในฤดูใบไม้ร่วง"
        "เด็กๆวิ่งเล่นบนสนามหญ้าหมอแนะนำให้ดื่มน้ำมากขึ้นรถไฟวิ่งจากเหนือลงใต้"
    ),
    "Khmer": ("មនុស្សចាស់អង្គុយនិយាយគ្នានៅលើកៅអីវែងកសិករសាបព្រោះនៅនិទាឃរដូវហើយប្រមូលផលនៅសរទរដូវកុមាររត់លេងលើស្មៅ"),
    "Burmese": ("အဘိုးအဘွားတို့သည်ခုံတန်းရှည်ပေါ်တွင်ထိုင်စကားပြောကြသည်လယ်သမားများသည်နွေဦးတွင်မျိုးစေ့ကြဲ၍ဆောင်းဦးတွင်ရိတ်သိမ်းသည်"),
    "Lao": ("ຜູ້ເຖົ້ານັ່ງລົມກັນຢູ່ເທິງຕັ່ງຍາວຊາວນາຫວ່ານແນວພັນໃນລະດູໃບໄມ້ປົ່ງແລະເກັບກ່ຽວໃນລະດູໃບໄມ້ຫຼົ່ນເດັກນ້ອຍແລ່ນຫຼິ້ນ"),
}
FILLER = "The committee met on Monday to discuss the new library. It will be built beside the old mill, near the river."
WRITTEN = [
    (
        "Don\u2019t stop \u2014 \u201cnow\u201d\u2026 and go on with it today",
        'don\'t stop - "now"... and go on with it today',
    ),
    ("a\u00a0b\u2009c\u3000d e f g", "a b c d e f g"),
    ("caf\u00e9 na\u00efve \u00fcber alles gut hier", "cafe\u0301 nai\u0308ve u\u0308ber alles gut hier"),
    ("我喜欢苹果，也喜欢香蕉。", "我喜欢苹果,也喜欢香蕉."),
    ("so\u00adft hyphens and zero\u200bwidth marks here", "soft hyphens and zerowidth marks here"),
]


def hashes(texts: list[str]) -> list[list[int]]:
    return [block[i].tolist() for block in hash_words(pa.array(texts)) for i in range(len(block))]


def test_words_are_those_of_the_oracle() -> None:
    draw = random.Random(0)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x52F), (0x590, 0x6FF), (0x900, 0x97F)]
    ranges += [
        (0xE01, 0xE3A),
        (0xE40, 0xE5B),
        (0xE81, 0xEAF),
        (0x1000, 0x109F),
        (0x1780, 0x17FF),
        (0x2000, 0x206F),
        (0x3000, 0x3003),
    ]
    ranges += [(0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x4FFF), (0x1F600, 0x1F64F)]
    texts = [
        "".join(
            c
            for c in (chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 40)))
            if unicodedata.name(c, "")
        )
        for _ in range(400)
    ] + list(TEXTS.values())
    known: dict[str, int] = {}
    for text, found in zip(texts, hashes(texts), strict=True):
        words = plain_words(text)
        assert len(found) == len(words), ascii(text)
        for word, number in zip(words, found, strict=True):
            assert known.setdefault(word, number) == number
        folded = unicodedata.normalize("NFC", text)
        assert len(WORD.findall(folded)) >= len(words) - 1
    assert len(set(known.values())) == len(known)


@pytest.mark.parametrize(("one", "other"), WRITTEN)
def test_the_same_text_in_another_writing(one: str, other: str, tmp_path: Path) -> None:
    first, second = hashes([one, other])
    assert first == second
    assert split_words(one) == split_words(other)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in (one, other)), encoding="utf-8")
    session = Session(tmp_path / "workspace", quiet=True)
    kept = session.make("data.dedup", data=session.make("data.read", data=file))
    assert kept.metrics["documents"] == 1


@pytest.mark.parametrize("script", TEXTS)
def test_near_duplicates_and_leaks(script: str, tmp_path: Path) -> None:
    """One character changed; and a test row inside of a longer document."""
    text = TEXTS[script]
    middle = len(text) // 2
    changed = text[:middle] + text[0] + text[middle + 1 :]
    others = [other for name, other in TEXTS.items() if name != script]
    documents = [text, changed, *others, f"{FILLER} {text[5:-5]} {FILLER[::-1]}"]
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": f"d{i}", "text": one}) + "\n" for i, one in enumerate(documents)]
    file.write_text("".join(lines), encoding="utf-8")
    session = Session(tmp_path / "workspace", quiet=True)
    config = {"id_field": "id"}
    read = session.make("data.read", data=file, config=config)
    (tmp_path / "b.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    first = session.make("data.read", data=tmp_path / "b.jsonl", config=config)
    kept = {document.id for document in read_documents(session.make("data.dedup", data=first))}
    assert len({"d0", "d1"} & kept) == 1
    assert {"d2", "d3", "d4", "d5", "d6"} <= kept
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    clean = session.make("data.decontaminate", data=read, tests={"t": tmp_path / "test.jsonl"})
    assert {document.id for document in read_documents(clean)} == {"d2", "d3", "d4", "d5", "d6"}


def test_long_documents_are_not_too_few_words(tmp_path: Path) -> None:
    draw = random.Random(0)
    characters = [chr(c) for c in range(0x4E00, 0x5A00)]
    lines = ("，".join("".join(draw.choices(characters, k=size)) for size in (18, 12)) for _ in range(60))
    text = "。\n".join(lines)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text + "。"}, ensure_ascii=False) + "\n", encoding="utf-8")
    session = Session(tmp_path / "workspace", quiet=True)
    made = session.make("data.clean", data=session.make("data.read", data=tmp_path / "a.jsonl"))
    assert made.metrics["documents"] == 1
