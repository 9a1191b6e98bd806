"""Run a few training steps in a separate process, so that its peak memory is measured on its own.

`python -m llmworks.train.estimate.trial KIND`, with the request as JSON on standard input.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import LlmworksError

if TYPE_CHECKING:
    import torch
    from torch._C import device
    from torch.optim.optimizer import Optimizer

    from llmworks.train.finetune.examples import Example, Steps
    from llmworks.train.finetune.trainable import Tuned
    from llmworks.train.loop.packed import PackedBatch
    from llmworks.train.pretrain import PretrainConfig
    from llmworks.train.sft import SftConfig

STEPS, MOST, ENOUGH, LOOKS = (
    5,
    60,
    10.0,
    4,
    # minimum and maximum steps, seconds to run (the first quarter warms up and is not counted), batches to evaluate
)
ENCODED = 1000  # conversations to tokenize, spread over the data


def main() -> None:
    """Run the trial of the kind in argv[1] with JSON from standard input; print a Trial as JSON."""
    import torch

    given = json.load(sys.stdin)
    torch.set_num_threads(int(given["threads"]))
    try:
        found: dict[str, Any] = {"pretrain": pretrain, "sft": sft}[sys.argv[1]](given) | {"memory": peak()}
    except LlmworksError as error:
        found = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def pretrain(given: dict[str, Any]) -> dict[str, float]:
    """Run a few steps of `train.pretrain`. `request`: {shape, recurrent, config, length, data}."""
    began = time.perf_counter()
    import matplotlib.figure  # noqa: F401
    import torch

    from llmworks.train.distributed.sharding import cast, resolved
    from llmworks.train.loop.optimizers import optimizers_of
    from llmworks.train.loop.packed import packed_loss
    from llmworks.train.pretrain import PretrainConfig

    config = PretrainConfig.model_validate(given["config"])
    network = model_of(given).train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    if config.gradient_checkpointing and network.supports_gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    optimizers = optimizers_of(network, config.optimizer)
    average = [p.detach().clone() for p in network.parameters()] if config.ema_decay else []
    batches = batches_of(given, config, network.config.vocab_size, device)
    loading = time.perf_counter() - began
    seconds: list[float] = []
    while not enough(seconds):
        start = time.perf_counter()
        batch = batches[len(seconds) % len(batches)]
        for _ in range(min(2, config.gradient_accumulation_steps)):
            with cast(device, resolved(config.precision, device)):
                loss = packed_loss(network, batch) / batch.labels
            loss.backward()  # type: ignore[no-untyped-call]
        part = time.perf_counter()
        update(network, optimizers)
        for mean, p in zip(average, network.parameters(), strict=False):
            mean.lerp_(p.detach(), 0.1)
        seconds.append(
            (part - start) / min(2, config.gradient_accumulation_steps) * config.gradient_accumulation_steps
            + time.perf_counter()
            - part
        )
    network.eval()
    with torch.no_grad():
        start = time.perf_counter()
        for batch in batches[:LOOKS]:
            float(packed_loss(network, batch))
        row = (time.perf_counter() - start) / config.batch_size / len(batches[:LOOKS])
        ids, start = batches[0].ids, time.perf_counter()
        tokens = min(config.sample_max_tokens, 8, ids.shape[1] - 2)
        if tokens and config.sample_prompts:
            network.generate(ids[:1, :2], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, pad_token_id=0)
        samples = (time.perf_counter() - start) / max(1, tokens) * config.sample_max_tokens * len(config.sample_prompts)
        # opening, golden tokens and saving take about as long as loading here
    return {
        "step": statistics.fmean(seconds[len(seconds) // 4 :]),
        "row": row,
        "samples": samples,
        "around": 2 * loading,
    }


def sft(given: dict[str, Any]) -> dict[str, float]:
    """Run a few steps of `train.sft` on its own conversations, the longest first.

    `request`: {config, model, data, held_out}.
    """
    began = time.perf_counter()
    import matplotlib.figure  # noqa: F401

    from llmworks.core.artifact import Dataset
    from llmworks.data.conversations.training_rows import training_rows
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.tokenize.chat.named import use_template
    from llmworks.tokenize.load import load_tokenizer, stop_ids
    from llmworks.train.distill import DistillConfig
    from llmworks.train.finetune.examples import Steps
    from llmworks.train.finetune.generation_check import answerable, answers
    from llmworks.train.finetune.trainable import open_tuned
    from llmworks.train.sft import SftConfig, make_examples

    config, model = (
        (DistillConfig if given.get("teacher") else SftConfig).model_validate(given["config"]),
        Path(given["model"]),
    )
    tokenizer = load_tokenizer(model)
    stops = stop_ids(model, tokenizer)
    use_template(tokenizer, config.chat_template)
    rows = training_rows(Dataset(Path(given["data"])))
    some = rows[:: -(-len(rows) // ENCODED)]
    start = time.perf_counter()
    examples, _ = make_examples(tokenizer, some, config)
    encoding = time.perf_counter() - start
    tuned = open_tuned(model)
    network = tuned.network
    questions = answerable(Dataset(Path(given["eval_data"])))[: config.num_sample_prompts] if given["eval_data"] else []
    loading = time.perf_counter() - began - encoding
    start = time.perf_counter()
    answers(TorchEngine(network, tokenizer, stops, ""), questions[:1], None)
    samples = (time.perf_counter() - start) * len(questions)
    network, device, loss_of, optimizers = _prepare(tuned, config, given)
    steps = Steps(
        examples,
        epochs=config.num_train_epochs,
        size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=0,
        free=tuned.free,
        device=device,
    )
    seconds, padded = _time_steps(examples, config, steps, device, loss_of, network, optimizers)
    known = slice(1, None) if len(seconds) > 1 else slice(None)
    mean = statistics.fmean(sum(make().ids.numel() for make in parts) for parts in steps)
    return {
        "step": sum(seconds[known]) / sum(padded[known]) * mean,
        "row": encoding / len(some),
        "samples": samples,
        "around": 2 * loading,
    }


def _prepare(tuned: Tuned, config: SftConfig, given: dict[str, Any]) -> tuple[Any, device, Any, list[Optimizer]]:
    """Set up the trainable parameters; return (model, device, loss, optimizers)."""
    import torch

    from llmworks.train.distill import DistillConfig
    from llmworks.train.finetune.distillation_loss import DIRECTIONS, taught
    from llmworks.train.finetune.run import prepare
    from llmworks.train.finetune.trainable import open_tuned
    from llmworks.train.loop.losses import next_token_loss
    from llmworks.train.loop.optimizers import optimizers_of
    from llmworks.train.loop.packed import packed_loss

    prepare(tuned, config)
    network = tuned.network
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).train()
    if config.gradient_checkpointing and network.supports_gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    optimizers = optimizers_of(network, config.optimizer)
    loss_of: Any = packed_loss if tuned.free else next_token_loss
    if isinstance(config, DistillConfig):
        guide = open_tuned(Path(given["teacher"])).network.requires_grad_(False).eval().to(device)
        loss_of = taught(
            guide, beta=DIRECTIONS.get(config.divergence, 0.5), temperature=config.temperature, mix=config.ce_weight
        )
    return network, device, loss_of, optimizers


def _time_steps(
    examples: list[Example],
    config: SftConfig,
    steps: Steps,
    device: device,
    loss_of: Any,
    network: Any,
    optimizers: list[Optimizer],
) -> tuple[list[float], list[int]]:
    """Return seconds and padded tokens of some steps, the longest rows first."""
    from llmworks.train.distributed.sharding import cast, resolved

    longest = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))[-config.batch_size :]
    seconds: list[float] = []
    padded: list[int] = []
    for batches in itertools.chain([[steps.part(longest)]], ([make() for make in parts] for parts in steps)):
        start = time.perf_counter()
        for batch in batches:
            with cast(device, resolved(config.precision, device)):
                loss = loss_of(network, batch) / max(1, batch.labels)
            loss.backward()
        update(network, optimizers)
        seconds.append(time.perf_counter() - start)
        padded.append(sum(batch.ids.numel() for batch in batches))
        if enough(seconds):
            break
    return seconds, padded


def enough(seconds: list[float]) -> bool:
    """Return whether these steps suffice for an estimate."""
    return len(seconds) >= STEPS and (len(seconds) >= MOST or sum(seconds) >= ENOUGH)


def update(network: Any, optimizers: list[Any]) -> None:
    """Clip gradients and apply the optimizers."""
    import torch

    torch.nn.utils.clip_grad_norm_((p for p in network.parameters() if p.requires_grad), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def batches_of(
    given: dict[str, Any], config: PretrainConfig, vocabulary: int, device: torch.device
) -> list[PackedBatch]:
    """Return micro-batches of the first steps as the training will read them.

    A step's time depends on how its rows are divided into documents. Without data: random ids, two documents in every
    second row.
    """
    import torch

    from llmworks.core.artifact import Dataset
    from llmworks.data.store.packed_tokens import Packed
    from llmworks.train.loop.packed import PackedBatch, PackedSteps

    length = int(given["length"])
    packed = Packed(Dataset(Path(given["data"]))) if given["data"] else None
    if packed is not None and len(packed) >= config.batch_size:
        return [
            make()
            for parts in PackedSteps(
                packed, MOST, rows=config.batch_size, parts=1, length=length, seed=0, device=device
            )
            for make in parts
        ]
    ids = torch.randint(0, vocabulary, (config.batch_size, length), device=device)
    places = torch.arange(length, device=device).expand(config.batch_size, -1)
    parted = torch.randint(1, length, (config.batch_size, 1), device=device)
    parted[::2] = length
    segments = (places >= parted).long()
    return [
        PackedBatch(
            ids,
            places - segments * parted,
            segments,
            ids.clone(),
            config.batch_size * (length - 1),
            config.batch_size * length,
            "",
        )
    ]


def model_of(given: dict[str, Any]) -> Any:
    """Create the requested model with random weights."""
    if given["recurrent"]:
        from llmworks.model.nn import recurrent

        return recurrent.RecurrentForCausalLM(recurrent.RecurrentConfig(shape=given["shape"]))
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM

    return DecoderForCausalLM(DecoderConfig(shape=given["shape"]))


def peak() -> float:
    """Return the peak memory in bytes of this process, or of its GPU."""
    import torch

    from llmworks.train.loop.loop import memory

    return float(memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


if __name__ == "__main__":
    main()
