"""Compare alignment with TRL in one run: DPO on preference pairs, and GRPO including the sampling of completions.

Measures speed and memory.

    python benchmarks/align.py                          (half an hour on two cores)
    python benchmarks/align.py --what dpo --rounds 1

Both use the same model, rows, batches, adapter (LoRA with r 16 on all linear layers), fused AdamW and fp32. DPO: 8
pairs per step. llmworks precomputes the log-probabilities of the reference model before the first step, and that time
is counted. TRL computes them in every step, which is its default. GRPO: 4 prompts per step and 8 completions per prompt
of at most 64 tokens, at temperature 1. The speed of GRPO is in completion tokens per second, since completions differ
in length. Each run is a separate process, and the tools alternate.
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

MODEL, WARM = "asset:smollm2-135m-instruct", 2
PAIRS, PROMPTS, ANSWERS, LONGEST = 8, 4, 8, 64
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def rows(count: int) -> list[dict[str, Any]]:
    """Instructions about texts, each with a completion that follows them and one that does not."""
    from llmworks.core.artifact import Dataset
    from llmworks.data.store.rows import read_chat

    found = [
        row
        for row in read_chat(Dataset(Path(os.environ["BENCHMARK_ROWS"])))
        if row["messages"][1]["content"] != row["extra"]["text"]
    ]
    return [
        {
            "id": row["id"],
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": row["extra"]["text"]}],
            "tools": [],
            "answer": row["answer"],
            "extra": row["extra"],
        }
        for row in found[:count]
    ]


def reward(text: str) -> float:
    """Reward of a completion, for both tools: the fraction of its words with fewer than five characters."""
    words = text.split()
    return sum(len(word) < 5 for word in words) / max(1, len(words))


def ours(what: str, steps: int, scratch: Path) -> dict[str, float]:
    """Train with the loop of `align.dpo` or `align.grpo`."""
    import torch

    from llmworks.align.dpo import DpoConfig
    from llmworks.align.dpo import build_method as dpo_way
    from llmworks.align.grpo import GrpoConfig
    from llmworks.align.losses.policy import group_advantages
    from llmworks.align.preference.examples import PromptCompletions, tokenize_pair
    from llmworks.align.preference.objective import MethodContext
    from llmworks.align.rl.objective import PolicyLossOptions, RolloutObjective
    from llmworks.align.rl.rewards import RewardFunctions
    from llmworks.align.rl.rollout import RolloutPrompt
    from llmworks.align.rl.sampling import RolloutOptions, RolloutSampler
    from llmworks.core.context import Context
    from llmworks.core.progress import Progress
    from llmworks.core.report import ReportBuilder
    from llmworks.core.types import messages_from_json
    from llmworks.runtime.session import load
    from llmworks.tokenize.chat.templates import render_prompt
    from llmworks.tokenize.load import get_stop_ids, load_tokenizer
    from llmworks.train.finetune.examples import ExampleSteps
    from llmworks.train.finetune.lora_config import LoraConfig
    from llmworks.train.finetune.method import TrainingData
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.loop import LoopConfig, train

    path = load(MODEL).path
    tokenizer, tuned = load_tokenizer(path), open_trainable_model(path)
    torch.manual_seed(0)
    tuned.add_adapter(LoraConfig())
    progress = Progress(scratch / "metrics.jsonl", quiet=True)
    ctx = Context(scratch, scratch, 0, progress, ReportBuilder(), lambda _: None)  # type: ignore[arg-type, return-value]
    config: Any = (
        DpoConfig(batch_size=PAIRS)
        if what == "dpo"
        else GrpoConfig(
            batch_size=PROMPTS, num_generations=ANSWERS, max_completion_length=LONGEST, reward_funcs={"length": 1.0}
        )
    )
    began = time.perf_counter()
    if what == "dpo":
        examples = [
            pair
            for pair in (tokenize_pair(tokenizer, row, 1024) for row in rows(PAIRS * steps))
            if isinstance(pair, PromptCompletions)
        ]
        way = dpo_way(
            config,
            MethodContext(config, tuned, TrainingData(tokenizer, [], examples, [], [], []), ctx, torch.device("cpu")),
        )
        plan: Any = ExampleSteps(
            examples,
            epochs=1,
            batch_size=PAIRS,
            gradient_accumulation_steps=1,
            seed=0,
            padding_free=True,
            collate_fn=way.collate,
        )
        before = (time.perf_counter() - began) * (steps - WARM) / steps
    else:
        asked = [
            RolloutPrompt(
                row,
                messages_from_json(row["prompt"]),
                tuple(render_prompt(tokenizer, messages_from_json(row["prompt"]))),
            )
            for row in rows(PROMPTS * steps)
        ]
        given = MethodContext(
            config,
            tuned,
            TrainingData(tokenizer, get_stop_ids(path, tokenizer), asked, [], [], []),
            ctx,
            torch.device("cpu"),
        )
        rewards = RewardFunctions({"length": 1.0}, max_completion_length=LONGEST, overlong_buffer=0, timeout=1.0)
        rewards.functions = {"length": lambda cases: [reward(case.text) for case in cases]}
        way = RolloutObjective(
            given,
            RolloutSampler(given, asked, rewards, RolloutOptions(ANSWERS, 1.0, LONGEST, PROMPTS, PROMPTS, 1, 1, False)),
            PolicyLossOptions(),
            lambda made: group_advantages(made.rewards),
        ).build_method()
        plan, before = way.steps, 0.0
    train(
        tuned.network,
        plan,
        way.loss,
        config.optimizer,
        LoopConfig(10**6, step_metrics=way.step_metrics),
        scratch=scratch,
        progress=progress,
    )
    done = [row for row in progress.read_metrics() if "loss" in row][WARM:]
    units = (
        PAIRS * len(done) if what == "dpo" else sum(row["completions/mean_length"] * PROMPTS * ANSWERS for row in done)
    )
    return {
        "units": units,
        "seconds": before + sum(row["seconds"] for row in done),
        "last": done[-1]["loss"] if what == "dpo" else done[-1]["reward"],
    }


def theirs(what: str, steps: int, scratch: Path) -> dict[str, float]:
    """Train with DPOTrainer or GRPOTrainer of TRL."""
    import warnings

    warnings.simplefilter("ignore")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    from llmworks.runtime.session import load

    path = load(MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    usual: dict[str, Any] = {
        "output_dir": str(scratch),
        "max_steps": steps,
        "learning_rate": 1e-4,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    some = rows((PAIRS if what == "dpo" else PROMPTS) * steps)
    prompts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in some]
    lengths: list[float] = []
    if what == "dpo":
        data = Dataset.from_list(
            [
                {"prompt": prompt, "chosen": row["chosen"][0]["content"], "rejected": row["rejected"][0]["content"]}
                for prompt, row in zip(prompts, some, strict=True)
            ]
        )
        trainer: Any = DPOTrainer(
            model=model,
            args=DPOConfig(**usual, per_device_train_batch_size=PAIRS, max_length=None),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )
    else:

        def worth(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            lengths.append(sum(map(len, completion_ids)))
            return [reward(text) for text in completions]

        arguments = GRPOConfig(
            **usual,
            per_device_train_batch_size=PROMPTS * ANSWERS,
            num_generations=ANSWERS,
            max_completion_length=LONGEST,
            beta=0.0,
            temperature=1.0,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=worth,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    units = PAIRS * (steps - WARM) if what == "dpo" else sum(lengths[WARM:steps])
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "units": units,
        "seconds": times[-1] - times[WARM - 1],
        "last": log[-1]["loss"] if what == "dpo" else log[-1]["reward"],
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
    """Make the dataset: instructions about headlines."""
    from llmworks import Session

    session = Session(folder / "ws", quiet=True)
    chats = session.make("data.chat", data="asset:sarcasm-headlines", config={"duplicates": "drop"})
    rows = session.make("synthesize.verifiable", data=chats, config={"num_rows": 400})
    os.environ["BENCHMARK_ROWS"] = str(rows.path)


def main() -> None:
    """Parse the arguments, run the benchmark, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("dpo", "grpo"), action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "WHAT", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, what, steps = args.one
        with tempfile.TemporaryDirectory() as scratch:
            found = (ours if way == "llmworks" else theirs)(what, int(steps), Path(scratch))
        print(json.dumps({**found, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder))
        print(
            "| method | tool | throughput | llmworks speedup | peak MB | llmworks memory ratio | last step"
            " |\n|---|---|---|---|---|---|---|"
        )
        for what in args.what or ["dpo", "grpo"]:
            found: dict[str, list[dict[str, Any]]] = {"llmworks": [], "TRL": []}
            for _ in range(args.rounds):
                for way in found:
                    found[way].append(run("--one", way, what, str(args.steps)))
            speed = {way: statistics.median(r["units"] / r["seconds"] for r in runs) for way, runs in found.items()}
            memory = {way: statistics.median(r["megabytes"] for r in runs) for way, runs in found.items()}
            for way in found:
                mine_is = "llmworks"
                mine = way == mine_is
                unit = "pairs/s" if what == "dpo" else "completion tokens/s"
                print(
                    f"| {what.upper()} | {way} | {speed[way]:.2f} {unit} |"
                    f" {'' if mine else f'{speed[mine_is] / speed[way]:.2f}'} | {memory[way]:.0f} |"
                    f" {'' if mine else f'{memory[mine_is] / memory[way]:.2f}'} |"
                    f" {'loss' if what == 'dpo' else 'reward'} {found[way][0]['last']:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
