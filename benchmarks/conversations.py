"""Compare chat template, tokenization, loss mask and packing of 100,000 conversations with TRL and Axolotl, in one run.

    python benchmarks/conversations.py --peers PYTHON [--axolotl FOLDER]

Takes about 15 minutes on two cores and 2 GB of disk.

The conversations are made of paragraphs of Debian 12's manuals, downloaded with apt-get: one paragraph is the user
turn, the next ones are the assistant turn. PYTHON is the Python of an environment with trl==1.16.0. FOLDER is an
unpacked wheel of axolotl==0.19.0, for which PYTHON's environment also needs addict and colorama. Each tool is a
separate process with one worker. Reading the JSONL is measured separately; for llmworks this is `data chat`, which also
checks every turn. All other CPU time counts, including the start of the process. Each tokenized sequence of TRL and
Axolotl is compared with those of llmworks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROWS, LENGTH = 100_000, 2048
MODEL = "asset:smollm2-135m-instruct"
# SmolLM2's chat template with the generation tags that TRL needs for the loss mask; it renders the same text.
MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou"
    " are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{% if message['role']"
    " == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{%"
    " endgeneration %}{{ '\n' }}{% else %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_chats(path: Path, packages: Path) -> None:
    """Write conversations of one to three user turns, made of consecutive paragraphs."""
    from data import manuals

    draw = random.Random(0)
    count = 0
    with path.with_suffix(".draft").open("w", encoding="utf-8") as stream:
        while count < ROWS:
            for _, text in manuals(packages):
                found = [" ".join(p.split()) for p in text.split("\n\n")]
                found = [p for p in found if 30 <= len(p) <= 1500]
                at = draw.randint(0, 3)
                while at + 8 < len(found) and count < ROWS:
                    messages = (
                        [{"role": "system", "content": "You are a helpful assistant."}] if draw.random() < 0.3 else []
                    )
                    for _ in range(draw.choice((1, 1, 1, 2, 3))):
                        messages.append({"role": "user", "content": found[at]})
                        answers = draw.randint(1, 2)
                        messages.append({"role": "assistant", "content": "\n\n".join(found[at + 1 : at + 1 + answers])})
                        at += answers + 1
                    stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                    count += 1
    path.with_suffix(".draft").rename(path)


def timed(command: list[str], **variables: str) -> float:
    """Return the CPU seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(command, env={**os.environ, **variables}, stdout=said, stderr=subprocess.STDOUT)
        if done.returncode:
            said.seek(0)
            raise SystemExit(said.read()[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def loaded(folder: Path, tool: str) -> Any:
    """In the environment of the other tools: load the conversations, and write the CPU seconds of this to a file."""
    from datasets import load_dataset

    shutil.rmtree(folder / f"{tool}-cache", ignore_errors=True)  # no caches
    began = time.process_time()
    rows = load_dataset(
        "json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=str(folder / f"{tool}-cache")
    )
    (folder / f"{tool}.load").write_text(str(time.process_time() - began))
    return rows


def trl(folder: Path, model: Path) -> None:
    """In TRL's environment: prepare the dataset as SFTTrainer does, with assistant_only_loss and packing."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = loaded(folder, "trl")
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        packing=True,
        max_length=LENGTH,
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=MARKED, completion_only_loss=False)
    made = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, True, None, "train")
    made.save_to_disk(str(folder / "trl-packed"))


def axolotl(folder: Path, model: Path) -> None:
    """In the environment of the other tools: apply Axolotl's chat template strategy.

    The result is not packed: Axolotl packs during training.
    """
    from addict import Dict
    from axolotl.prompt_strategies.chat_template import load
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = loaded(folder, "axolotl")
    config = Dict(
        {
            "sequence_len": LENGTH,
            "train_on_inputs": False,
            "tokenizer_use_mistral_common": False,
            "chat_template": "tokenizer_default",
            "eot_tokens": None,
        }
    )
    strategy = load(
        tokenizer,
        config,
        {
            "type": "chat_template",
            "chat_template": "tokenizer_default",
            "field_messages": "messages",
            "train_on_eos": "turn",
        },
    )
    rows.map(strategy.tokenize_prompt, batched=True, remove_columns=rows.column_names).save_to_disk(
        str(folder / "axolotl-tokens")
    )


def digest(ids: Any, mask: Any) -> str:
    """Return a digest of a sequence: its token ids and loss mask."""
    import numpy as np

    return hashlib.md5(np.asarray(ids, np.int32).tobytes() + np.asarray(mask, np.int8).tobytes()).hexdigest()


def pieces_of(folder: Path, tool: str) -> Counter[str]:
    """In the environment of a tool: return the digests of all sequences that it made."""
    import numpy as np

    found: Counter[str] = Counter()
    if tool == "llmworks":
        from llmworks.core.artifact import load
        from llmworks.data.store.packed_tokens import PackedDataset

        rows = PackedDataset(load(folder / "packed"))  # type: ignore[arg-type]
        for i in range(len(rows)):
            row = rows[i]
            starts = [*np.flatnonzero(row.position_ids == 0).tolist(), len(row.ids)]
            found.update(digest(row.ids[a:b], row.loss_mask[a:b]) for a, b in pairwise(starts))
        return found
    from datasets import load_from_disk

    for row in load_from_disk(str(folder / ("trl-packed" if tool == "trl" else "axolotl-tokens"))):
        ids, mask, at = row["input_ids"], [int(label != -100) for label in row["labels"]], 0
        for length in row.get("seq_lengths") or [len(ids)]:
            found[digest(ids[at : at + length], mask[at : at + length])] += 1
            at += length
    return found


def main() -> None:
    """Run all tools and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "llmworks" / "bench-conversations")
    parser.add_argument("--peers", default="")
    parser.add_argument("--axolotl", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    folder: Path = given.folder
    if given.only:
        step, _, tool = given.only.partition(":")
        if step == "pieces":
            (folder / f"{tool}.json").write_text(json.dumps(pieces_of(folder, tool)))
        else:
            {"trl": trl, "axolotl": axolotl}[step](folder, given.model)
        return
    from data import fetch
    from llmworks.core.machine import describe_machine
    from llmworks.runtime.session import load as load_artifact

    if not (folder / "chats.jsonl").exists():
        write_chats(
            folder / "chats.jsonl",
            fetch(
                folder,
                (
                    "python3.11-doc",
                    "postgresql-doc-15",
                    "perl-doc",
                    "manpages-dev",
                    "rust-doc",
                    "libreoffice-help-en-us",
                ),
            ),
        )
    model = load_artifact(MODEL).path
    size = (folder / "chats.jsonl").stat().st_size
    print(f"{describe_machine()}\n\n{ROWS:,} conversations, {size / 1e6:.0f} MB\n", flush=True)
    program = [str(Path(sys.executable).with_name("llmworks")), "data"]
    shutil.rmtree(folder / "workspace", ignore_errors=True)  # no caches
    environment = {"LLMWORKS_WORKSPACE": str(folder / "workspace")}
    for name in ("chats", "packed"):
        (folder / name).unlink(missing_ok=True)
    read = timed([*program, "chat", str(folder / "chats.jsonl"), "--out", str(folder / "chats")], **environment)
    pack = timed(
        [
            *program,
            "pack",
            MODEL,
            str(folder / "chats"),
            "--out",
            str(folder / "packed"),
            "--set",
            f"max_length={LENGTH}",
        ],
        **environment,
    )
    print(
        "| tool | reading CPU-s | other CPU-s | rows per CPU-s | ratio | sequences identical to llmworks'"
        " |\n|---|---|---|---|---|---|"
    )
    print(f"| llmworks | {read:.1f} | {pack:.1f} | {ROWS / pack:,.0f} | | |", flush=True)
    me = [str(Path(__file__).resolve()), "--folder", str(folder), "--model", str(model)]
    subprocess.run([sys.executable, *me, "--only", "pieces:llmworks"], check=True)
    own = Counter(json.loads((folder / "llmworks.json").read_text()))
    for tool, wanted in (("trl", given.peers), ("axolotl", given.axolotl)):
        if not wanted:
            continue
        variables = {"PYTHONPATH": given.axolotl} if tool == "axolotl" else {"PYTHONPATH": ""}
        cpu = timed([given.peers, *me, "--only", tool], **variables)
        load = float((folder / f"{tool}.load").read_text())
        cpu -= load
        subprocess.run(
            [given.peers, *me, "--only", f"pieces:{tool}"],
            check=True,
            env={**os.environ, **variables},
            stderr=subprocess.DEVNULL,
        )
        theirs = Counter(json.loads((folder / f"{tool}.json").read_text()))
        print(
            f"| {tool} | {load:.1f} | {cpu:.1f} | {ROWS / cpu:,.0f} | {cpu / pack:.1f} | {(own & theirs).total():,} of"
            f" {own.total():,} ({theirs.total():,} made) |",
            flush=True,
        )
    manifest = json.loads((folder / "packed" / "manifest.json").read_text())
    print(f"\npacked: {manifest['metrics']}")


if __name__ == "__main__":
    main()
