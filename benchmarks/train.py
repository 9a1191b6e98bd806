"""Compare fine-tuning with TRL in one run: tokens per second (without padding) and memory, for LoRA and full
fine-tuning.

    python benchmarks/train.py                          (half an hour on two cores)
    python benchmarks/train.py --method lora --data calls --rounds 1

llmworks runs the loop of `train.sft`. TRL runs SFTTrainer, without packing (each batch is padded to its longest row)
and with packing (`packing=True`, best fit). All use the same model, token ids, labels, rows per batch (packed: tokens
per batch), fused AdamW, fp32 and no gradient checkpointing, which suits a CPU. Each run is a separate process, and the
tools alternate. `calls`: function calls, short completions of long prompts. `texts`: beginnings of articles; every
token is a label.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, ROWS, WARM = "asset:smollm2-135m-instruct", 8, 2
WAYS = ("llmworks", "TRL", "TRL packed")


def examples(what: str, model: Path, count: int) -> list[dict[str, Any]]:
    """Token ids and loss mask of each row, the same for all tools."""
    from llmworks import assets
    from llmworks.core.artifact import Dataset
    from llmworks.data.store.rows import read_chat
    from llmworks.tokenize.chat.named_templates import set_template
    from llmworks.tokenize.load import load_tokenizer
    from llmworks.train.finetune.examples import Example, make_example

    tokenizer = load_tokenizer(model)
    set_template(tokenizer, "tools")
    if what == "texts":
        lines = (assets.fetch("wikipedia-sample") / "wikipedia.jsonl").read_text().splitlines()
        rows: list[dict[str, Any]] = [
            {"id": str(i), "text": json.loads(line)["0"][:2000]} for i, line in enumerate(lines)
        ]
    else:
        rows = read_chat(Dataset(Path(os.environ["BENCHMARK_CHATS"])))
    made = [e for e in (make_example(tokenizer, row, 1024) for row in rows) if isinstance(e, Example)]
    return [{"ids": e.ids, "mask": e.mask} for e in made[:count]]


def ours(method: str, rows: list[dict[str, Any]], steps: int, scratch: Path) -> dict[str, float]:
    """Train with the loop of `train.sft`."""
    import torch

    from llmworks.core.progress import Progress
    from llmworks.runtime.session import load
    from llmworks.train.finetune.examples import Example, ExampleSteps
    from llmworks.train.finetune.run import prepare_trainable
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.loop import LoopConfig, train
    from llmworks.train.loop.packed_steps import packed_loss
    from llmworks.train.sft import SftConfig

    config = SftConfig.model_validate({"method": method, "batch_size": ROWS})
    tuned = open_trainable_model(load(MODEL).path)
    torch.manual_seed(0)
    prepare_trainable(tuned, config)
    plan = ExampleSteps(
        [Example(tuple(r["ids"]), tuple(r["mask"])) for r in rows],
        epochs=1,
        batch_size=ROWS,
        gradient_accumulation_steps=1,
        seed=0,
        padding_free=True,
    )
    progress = Progress(scratch / "metrics.jsonl", quiet=True)
    train(
        tuned.network,
        plan[:steps],
        packed_loss,
        config.optimizer,
        LoopConfig(10**6),
        scratch=scratch,
        progress=progress,
    )
    done = progress.read_metrics()[WARM:]
    return {
        "tokens": sum(r["tokens"] for r in done),
        "seconds": sum(r["seconds"] for r in done),
        "loss": done[-1]["loss"],
    }


def theirs(method: str, rows: list[dict[str, Any]], steps: int, scratch: Path, *, packed: bool) -> dict[str, float]:
    """Train with SFTTrainer of TRL."""
    import warnings

    warnings.simplefilter("ignore")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from llmworks.runtime.session import load

    path = load(MODEL).path
    mean = sum(len(r["ids"]) for r in rows) / len(rows)
    room = max(max(len(r["ids"]) for r in rows), int(ROWS * mean))
    arguments = SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=1 if packed else ROWS,
        max_length=room if packed else None,
        packing=packed,
        completion_only_loss=True,
        max_steps=steps,
        learning_rate=1e-3 if method == "lora" else 5e-5,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        dataset_num_proc=1,
    )
    data = Dataset.from_list([{"input_ids": list(r["ids"]), "completion_mask": list(r["mask"])} for r in rows])
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    adapter = (
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if method == "lora"
        else None
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=adapter,
    )
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    collate = trainer.data_collator

    def counted(features: Any) -> Any:
        tokens.append(sum(len(f["input_ids"]) for f in features))
        return collate(features)

    trainer.data_collator = counted
    trainer.add_callback(Clock())
    trainer.train()
    return {
        "tokens": sum(tokens[WARM:steps]),
        "seconds": times[-1] - times[WARM - 1],
        "loss": trainer.state.log_history[-2].get("loss", 0.0),
    }


def run(*words: str) -> dict[str, Any]:
    """Run this script in a separate process; return its measurements and peak memory."""
    done = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepared(folder: Path) -> None:
    """Make the dataset: conversations with function calls."""
    from llmworks import Session

    made = Session(folder / "ws", quiet=True).make("data.chat", data="asset:bfcl-simple", config={"format": "bfcl"})
    os.environ["BENCHMARK_CHATS"] = str(made.path)


def main() -> None:
    """Parse the arguments, run the benchmark, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "full"), action="append", default=[])
    parser.add_argument("--data", choices=("calls", "texts"), action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--one", nargs=4, metavar=("WAY", "METHOD", "DATA", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        from llmworks.runtime.session import load

        way, method, data, steps = args.one
        rows = examples(data, load(MODEL).path, int(steps) * ROWS)
        with tempfile.TemporaryDirectory() as scratch:
            found = (
                ours(method, rows, int(steps), Path(scratch))
                if way == "llmworks"
                else theirs(method, rows, int(steps), Path(scratch), packed=way.endswith("packed"))
            )
        print(json.dumps({**found, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder))
        print(
            "| training | tool | tokens/s | llmworks speedup | peak MB | llmworks memory ratio | loss of the last step"
            " |\n|---|---|---|---|---|---|---|"
        )
        for method in args.method or ["lora", "full"]:
            for data in args.data or ["calls", "texts"]:
                found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
                for _ in range(args.rounds):
                    for way in WAYS:
                        found[way].append(run("--one", way, method, data, str(args.steps)))
                speed = {
                    way: statistics.median(r["tokens"] / r["seconds"] for r in runs) for way, runs in found.items()
                }
                memory = {way: statistics.median(r["megabytes"] for r in runs) for way, runs in found.items()}
                for way in WAYS:
                    mine = way == WAYS[0]
                    print(
                        f"| {method}, {data} | {way} | {speed[way]:.0f} |"
                        f" {'' if mine else f'{speed[WAYS[0]] / speed[way]:.2f}'} | {memory[way]:.0f} |"
                        f" {'' if mine else f'{memory[WAYS[0]] / memory[way]:.2f}'} | {found[way][0]['loss']:.3f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
