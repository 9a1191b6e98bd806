"""Raw files of every format become documents; what gives none is set aside with place and reason, and nothing else is
lost.
"""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, RejectedInput, read_documents
from llmworks.core.errors import DataError
from llmworks.core.types import Document
from llmworks.data.read import ReadConfig, read_source
from llmworks.data.readers.input_files import InputFile, find_files, make_input_file
from llmworks.data.readers.text import NotTextError, decode_document

PAGE = """<html><head><title>A harbour</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/log-in">Log in to the site</a></li></ul></nav>
<article><h1>A harbour</h1><p>{}</p><p>{}</p></article>
<footer>Copyright, imprint, terms of use</footer></body></html>""".format(
    "The harbour lies at the mouth of the river, where ships have waited for the tide since the middle ages. " * 4,
    "Its warehouses were built of brick, and the cranes on the quay were worked by people walking in wheels. " * 4,
)


def found(path: Path, **config: Any) -> tuple[dict[str, Document], dict[str, str]]:
    """(documents by id, reasons by file and line) of everything below a path."""
    good: dict[str, Document] = {}
    bad: dict[str, str] = {}
    for file in find_files(path):
        for item in read_source(make_input_file(path, file), ReadConfig(**config)):
            if isinstance(item, RejectedInput):
                bad[f"{item.file}:{item.line}" if item.line else item.file] = item.reason
            else:
                assert item.id not in good
                good[item.id] = item
    return good, bad


def make_pdf(text: str) -> bytes:
    """A PDF of one page with a text layer, written by hand (PDF 32000-1, 7.5)."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        (
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >>"
            b" >> >>"
        ),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 6\n0000000000 65535 f \n%strailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        table,
        len(out),
    )


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Grüße aus Köln, schöne Straßen und große Plätze überall", "latin-1"),
        ("Съешь же ещё этих мягких французских булок, да выпей чаю", "cp1251"),
        ("日本語の文章を正しく読み取ることができるかどうかを確かめるための例文です。", "shift_jis"),
        ("Grüße", "utf-16"),
        ("Grüße", "utf-8-sig"),
        ("plain", "ascii"),
    ],
)
def test_encodings_are_found(text: str, encoding: str) -> None:
    assert decode_document((text * 3).encode(encoding))[0] == text * 3


def test_a_late_byte_outside_ascii_is_no_loss() -> None:
    data = b"word " * 20_000 + "Grüße aus Köln und schöne Straßen".encode("latin-1")
    assert decode_document(data)[0].endswith("Köln und schöne Straßen")


@pytest.mark.parametrize(
    "data", [b"\x7fELF\x02\x01\x01\0\0\0", bytes(range(256)) * 8, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]
)
def test_binary_data_named_txt_is_set_aside(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    good, bad = found(tmp_path)
    assert good == {}
    assert bad == {"a.txt": "binary data, not text"}
    with pytest.raises(NotTextError):
        decode_document(data)


def test_every_format_gives_the_same_text(tmp_path: Path) -> None:
    """One text through each way of keeping rows, with its other fields as metadata."""
    row = {"text": "One, two\nthree \u2014 four", "stars": 4, "when": "2020-01-02"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([row]))
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, row)
        table.writeheader()
        table.writerow(row)
    typed = {**row, "when": datetime.date(2020, 1, 2)}
    pq.write_table(pa.Table.from_pylist([typed]), tmp_path / "d.parquet")
    arrow = pa.Table.from_pylist([typed])
    with pa.OSFile(str(tmp_path / "e.arrow"), "wb") as sink, pa.ipc.new_stream(sink, arrow.schema) as writer:
        writer.write_table(arrow)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as sink, pa.ipc.new_file(sink, arrow.schema) as writer:
        writer.write_table(arrow)
    good, bad = found(tmp_path)
    assert bad == {}
    assert list(good) == ["a.jsonl#1", "b.json#1", "c.csv#1", "d.parquet#1", "e.arrow#1", "f.arrow#1"]
    assert {d.text for d in good.values()} == {row["text"]}
    assert {(str(d.metadata["stars"]), d.metadata["when"]) for d in good.values()} == {("4", "2020-01-02")}


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", lambda d: zstandard.compress(d))],
)
def test_compressed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(
        pack(b'{"text": "x"}\n') + pack(b'{"text": "y"}\n')
    )  # two frames, as some tools write
    good, bad = found(tmp_path)
    assert ([d.text for d in good.values()], bad) == (["x", "y"], {})


def test_archives_of_archives(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, text in (("notes/b.md", b"# B"), ("notes/.hidden", b"no")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["in parquet"]}), table)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive_zip:
        archive_zip.writestr("a.txt", "A\r\nline")
        archive_zip.writestr("inner.tar.gz", inner.getvalue())
        archive_zip.writestr("rows.parquet", table.getvalue())
    good, bad = found(tmp_path)
    assert bad == {}
    assert {i: d.text for i, d in good.items()} == {
        "all.zip!a.txt": "A\nline",
        "all.zip!inner.tar.gz!notes/b.md": "# B",
        "all.zip!rows.parquet#1": "in parquet",
    }


def test_archives_that_cannot_be_trusted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "small")
        archive.writestr("b.txt", b"0" * (8 << 20))
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"0" * (8 << 20)))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "bomb.zip").read_bytes()[:-30])
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"word " * 1000)[:-20])
    nested = b"deep"
    for level in range(5):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x.zip" if level else "x.txt", nested)
        nested = buffer.getvalue()
    (tmp_path / "nested.zip").write_bytes(nested)
    good, bad = found(tmp_path, max_expanded_mb=4)
    assert list(good) == ["bomb.zip!a.txt"]
    assert bad["bomb.zip!b.txt"] == "expands to more than 4 MB (max_expanded_mb)"
    assert bad["bomb.txt.gz"] == "expands to more than 4 MB (max_expanded_mb)"
    assert bad["cut.zip"].startswith("a broken archive")
    assert bad["cut.txt.gz"].startswith("cannot be read")
    assert any(reason.startswith("archives nested") for reason in bad.values())


def test_an_encrypted_member_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "secret")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1  # the encryption flag, in the local header and in the central directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert found(tmp_path) == ({}, {"a.zip!a.txt": "encrypted"})


def test_a_page_without_its_navigation(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.html").write_text("<html><body></body></html>")
    good, bad = found(tmp_path)
    text = good["a.html"].text
    assert "mouth of the river" in text
    assert "walking in wheels" in text
    assert "Log in" not in text
    assert "imprint" not in text
    assert good["a.html"].metadata == {"title": "A harbour"}
    assert bad == {"b.html": "a page without content"}
    assert "Log in" in found(tmp_path, html="all")[0]["a.html"].text


def test_pdf(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf("Hello from a page"))
    (tmp_path / "b.pdf").write_bytes(make_pdf("x")[:60])
    (tmp_path / "c.pdf").write_bytes(make_pdf(""))
    (tmp_path / "d.pdf").write_bytes(
        make_pdf("locked").replace(
            b"/Root 1 0 R",
            b"/Root 1 0 R /ID [<00><00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>"
            % (b"00" * 32, b"00" * 32),
        )
    )
    good, bad = found(tmp_path)
    assert (good["a.pdf"].text, good["a.pdf"].metadata) == ("Hello from a page", {"pages": 1})
    assert list(good) == ["a.pdf"]
    assert bad["b.pdf"].startswith("a broken PDF")
    assert (bad["c.pdf"], bad["d.pdf"]) == ("a PDF without a text layer", "an encrypted PDF")


def test_warc(tmp_path: Path) -> None:
    with (tmp_path / "a.warc.gz").open("wb") as stream:
        for url, status, kind, body in (
            ("http://a.example/", "200 OK", "text/html; charset=utf-8", PAGE),
            ("http://b.example/", "404 Not Found", "text/html", PAGE),
            ("http://c.example/", "200 OK", "image/png", "png"),
            ("http://d.example/", "200 OK", "text/plain", "plain words"),
        ):
            http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n{body}".encode()
            head = (
                f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nContent-Type: application/http;"
                " msgtype=response\r\n"
            )
            stream.write(gzip.compress(f"{head}Content-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"))
    good, bad = found(tmp_path)
    assert bad == {}
    assert [d.metadata["url"] for d in good.values()] == ["http://a.example/", "http://d.example/"]
    assert "Log in" not in good["a.warc.gz#1"].text
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(b"no web archive at all\n" * 3))
    good, bad = found(tmp_path)
    assert good == {}
    assert bad == {"a.warc.gz": "no WARC records"}


def test_rows_that_give_no_text(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"text": "good", "n": 1},
        {"body": "other"},
        {"text": 3},
        {"text": " "},
        [1],
        {"text": "\ud800"},
    ]
    (tmp_path / "a.jsonl").write_bytes(
        b"\n".join(
            [
                *(json.dumps(x).encode() for x in lines),
                b'{"text": ',
                b'{"text": "\xff"}',
                b'{"text": "last"}',
                b'{"text": "x", "score": NaN}',
                b'{"text": "x", "score": [-Infinity]}',
            ]
        )
    )
    (tmp_path / "b.csv").write_text("title,body\nx,y\n")
    (tmp_path / "c.csv").write_text("text,n\nfine,1\nshort\n")
    good, bad = found(tmp_path)
    assert [d.text for d in good.values()] == ["good", "last", "fine"]
    assert bad["a.jsonl:2"] == "no field 'text' (it has body)"
    assert bad["a.jsonl:3"] == "field 'text' is not a string (int)"
    assert bad["a.jsonl:4"] == "empty"
    assert bad["a.jsonl:5"] == "not a JSON object"
    assert bad["a.jsonl:6"] == "a lone surrogate, which is not valid text"
    assert bad["a.jsonl:7"].startswith("not JSON")
    assert bad["a.jsonl:8"] == "not UTF-8 (byte 10)"
    assert bad["a.jsonl:10"] == "not JSON (NaN is no JSON number)"
    assert bad["a.jsonl:11"] == "not JSON (-Infinity is no JSON number)"
    assert bad["b.csv:1"] == "no field 'text' (it has title, body)"
    assert bad["c.csv:2"] == "has 1 fields, the header 2; quote fields that contain ','"


def test_a_line_without_an_end_is_never_held(tmp_path: Path) -> None:
    """A line of 40 MB with a limit of 1 MB: set aside, the next one read, and memory stays far below the line."""
    import tracemalloc

    with (tmp_path / "a.jsonl").open("wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(40):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "after"}\n')
    (tmp_path / "b.txt").write_bytes(b"y" * (3 << 20))
    tracemalloc.start()
    good, bad = found(tmp_path, max_document_mb=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d.text for d in good.values()] == ["after"]
    assert bad == {"a.jsonl:1": "longer than 1 MB (max_document_mb)", "b.txt": "longer than 1 MB (max_document_mb)"}
    assert peak < 16 << 20


def test_ids_from_a_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "key": 7}\n{"text": "y"}\n')
    good, bad = found(tmp_path, id_field="key")
    assert list(good) == ["7"]
    assert good["7"].metadata == {}
    assert bad == {"a.jsonl:2": "no field 'key' for the id"}


def test_shards_are_the_same_documents(tmp_path: Path) -> None:
    every = [Document(f"d{i}", f"text {i} " * 50, "s", {"i": i}) for i in range(300)]
    with DocumentWriter(tmp_path, group_bytes=10_000, shard_bytes=40_000) as writer:
        for document in every:
            writer.add(document)
    assert len(list(tmp_path.glob("part-*.parquet"))) == writer.shards > 2
    assert list(read_documents(Dataset(tmp_path))) == every


def test_the_stage_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text("Hello")
    (raw / "b.txt").write_bytes(b"\0\1\2")
    (raw / "set").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (raw / "set" / name).write_text("{}")
    table = pa.table({"text": ["from a saved data set"]})
    with (
        pa.OSFile(str(raw / "set/data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    words = [
        "data",
        "read",
        "--data",
        str(raw),
        "--out",
        str(tmp_path / "docs"),
        "--workspace",
        str(tmp_path / "w"),
        "--quiet",
    ]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {k: result["metrics"][k] for k in ("files", "documents", "rejected")} == {
        "files": 3,
        "documents": 2,
        "rejected": 1,
    }
    assert [d.text for d in read_documents(Dataset(tmp_path / "docs"))] == ["Hello", "from a saved data set"]
    assert json.loads((tmp_path / "docs/rejected.jsonl").read_text())["reason"] == "binary data, not text"
    assert "binary data" in (tmp_path / "docs/report/report.md").read_text()
    assert main(["verify", str(tmp_path / "docs"), "--workspace", str(tmp_path / "w")]) == 0
    assert "derived again, same bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make", [lambda p: p.mkdir(), lambda p: p.write_bytes(b""), lambda p: (p.mkdir(), (p / "a.bin").write_bytes(b"\0"))]
)
def test_nothing_to_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Any]
) -> None:
    make(tmp_path / "raw")
    words = [
        "data",
        "read",
        "--data",
        str(tmp_path / "raw"),
        "--out",
        str(tmp_path / "docs"),
        "--workspace",
        str(tmp_path / "w"),
        "--quiet",
    ]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llmworks: {tmp_path / 'raw'}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "docs").exists()


def test_documents_of_another_schema_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "part-00000.parquet")
    with pytest.raises(DataError, match="has no column 'id'"):
        list(read_documents(Dataset(tmp_path)))
    assert InputFile("a.JSONL.GZ", io.BytesIO).suffix == ".jsonl"


def rdb(*objects: list[str], version: int = 3) -> bytes:
    """An R lazy-load data base of vectors of strings, written by hand (R Internals 1.8)."""
    out = b""
    for strings in objects:
        body = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
        if version == 3:
            body += struct.pack(">i", 5) + b"UTF-8"
        body += struct.pack(">II", 16, len(strings))
        for text in strings:
            raw = text.encode()
            body += struct.pack(">II", 0x40009, len(raw)) + raw
        out += struct.pack(">I", len(body)) + zlib.compress(body)
    return out


@pytest.mark.parametrize("version", [2, 3])
def test_r_data(tmp_path: Path, version: int) -> None:
    (tmp_path / "books.rdb").write_bytes(rdb(["EMMA", "", "by Jané"], ["PERSUASION"], version=version))
    good, bad = found(tmp_path)
    assert {k: d.text for k, d in good.items()} == {"books.rdb#1": "EMMA\n\nby Jané", "books.rdb#2": "PERSUASION"}
    assert not bad
    whole = (tmp_path / "books.rdb").read_bytes()
    (tmp_path / "books.rdb").write_bytes(whole[:-5])
    good, bad = found(tmp_path)
    assert list(good) == ["books.rdb#1"]
    assert "books.rdb:2" in bad
    (tmp_path / "books.rdb").write_bytes(b"nothing of the kind")
    assert "not an R database" in found(tmp_path)[1]["books.rdb:1"]


def test_only_the_fields_that_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "a": 1, "b": 2}))
    assert found(tmp_path)[0]["a.jsonl#1"].metadata == {"a": 1, "b": 2}
    assert found(tmp_path, keep_fields=["b", "c"])[0]["a.jsonl#1"].metadata == {"b": 2}
    assert found(tmp_path, keep_fields=[])[0]["a.jsonl#1"].metadata == {}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Il était très fatigué après la fête, où le garçon mangeait des crêpes.", "cp1252"),
        ("A naïve café owner said the façade was déjà vu.", "latin-1"),
        ("El niño comió una manzana mañana. ¿Qué pasó aquí?", "cp1252"),
        ("Não há razão para preocupação; amanhã será um dia bom.", "cp1252"),
        ("Jag åker till Göteborg på måndag för att träffa min bror.", "cp1252"),
        ("Příliš žluťoučký kůň úpěl ďábelské ódy. Včera jsme šli do města.", "cp1250"),
        ("Zażółć gęślą jaźń. Wczoraj poszliśmy do miasta.", "cp1250"),
        ("Zażółć gęślą jaźń. Wczoraj poszliśmy do miasta.", "iso8859_2"),
        ("Árvíztűrő tükörfúrógép. Tegnap elmentünk a városba.", "cp1250"),
        ("Pijamalı hasta yağız şoföre çabucak güvendi.", "cp1254"),
        ("Šiandien aš einu į mokyklą, nes ten mūsų mokytoja.", "cp1257"),
    ],
)
def test_kindred_encodings_are_told_apart_by_letters(text: str, encoding: str) -> None:
    assert decode_document(text.encode(encoding))[0] == text


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"metadata": ["not JSON"]}, "its metadata is not a JSON object"),
        ({"metadata": [7]}, "column 'metadata' is not text (int64)"),
        ({"text": [None]}, "column 'text'"),
    ],
)
def test_documents_of_another_maker(
    columns: dict[str, list[Any]],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llmworks.cli import main

    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    (tmp_path / "d").mkdir()
    pq.write_table(
        pa.table({"id": ["a"], "text": ["b"], "source": ["c"], "metadata": ["{}"], **columns}),
        tmp_path / "d" / "x.parquet",
    )
    for stage in ("clean", "redact", "dedup", "split", "map"):
        words = ["--set", "split=train"] if stage == "split" else []
        code = main(["data", stage, str(tmp_path / "d"), "--out", str(tmp_path / stage), "--quiet", *words])
        error = capsys.readouterr().err
        if code or columns.get("metadata") != ["not JSON"]:  # map reads texts alone
            assert code == 2
            assert says in error or "nothing is left" in error or "null values" in error
            assert error.count("\n") == 1
