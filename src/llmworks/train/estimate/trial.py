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

    from llmworks.train.finetune.examples import Example, ExampleSteps
    from llmworks.train.finetune.trainable import TrainableModel
    from llmworks.train.loop.packed_steps import PackedBatch
    from llmworks.train.pretrain import PretrainConfig
    from llmworks.train.sft import SftConfig

MIN_STEPS, MAX_STEPS, MIN_SECONDS, EVAL_BATCHES = (
    5,
    60,
    10.0,
    4,
    # minimum and maximum steps, seconds to run (the first quarter warms up and is not counted), batches to evaluate
)
MAX_ROWS = 1000  # conversations to tokenize, spread over the data


def main() -> None:
    """Run the trial of the kind in argv[1] with JSON from standard input; print a Trial as JSON."""
    import torch

    request = json.load(sys.stdin)
    torch.set_num_threads(int(request["threads"]))
    try:
        found: dict[str, Any] = {"pretrain": pretrain, "sft": sft}[sys.argv[1]](request) | {
            "memory": measure_peak_memory()
        }
    except LlmworksError as error:
        found = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def pretrain(request: dict[str, Any]) -> dict[str, float]:
    """Run a few steps of `train.pretrain`. `request`: {shape, recurrent, config, length, data}."""
    began = time.perf_counter()
    import matplotlib.figure  # noqa: F401
    import torch

    from llmworks.train.distributed.sharding import autocast, resolve_precision
    from llmworks.train.loop.optimizers import create_optimizers
    from llmworks.train.loop.packed_steps import packed_loss
    from llmworks.train.pretrain import PretrainConfig

    config = PretrainConfig.model_validate(request["config"])
    network = create_model(request).train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    if config.gradient_checkpointing and network.supports_gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    optimizers = create_optimizers(network, config.optimizer)
    average = [p.detach().clone() for p in network.parameters()] if config.ema_decay else []
    batches = create_batches(request, config, network.config.vocab_size, device)
    loading = time.perf_counter() - began
    seconds: list[float] = []
    while not is_enough(seconds):
        start = time.perf_counter()
        batch = batches[len(seconds) % len(batches)]
        for _ in range(min(2, config.gradient_accumulation_steps)):
            with autocast(device, resolve_precision(config.precision, device)):
                loss = packed_loss(network, batch) / batch.labels
            loss.backward()  # type: ignore[no-untyped-call]
        part = time.perf_counter()
        step_optimizers(network, optimizers)
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
        for batch in batches[:EVAL_BATCHES]:
            float(packed_loss(network, batch))
        row = (time.perf_counter() - start) / config.batch_size / len(batches[:EVAL_BATCHES])
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


def sft(request: dict[str, Any]) -> dict[str, float]:
    """Run a few steps of `train.sft` on its own conversations, the longest first.

    `request`: {config, model, data, held_out}.
    """
    began = time.perf_counter()
    import matplotlib.figure  # noqa: F401

    from llmworks.core.artifact import Dataset
    from llmworks.data.conversations.training_rows import read_training_rows
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.tokenize.chat.named_templates import set_template
    from llmworks.tokenize.load import get_stop_ids, load_tokenizer
    from llmworks.train.distill import DistillConfig
    from llmworks.train.finetune.examples import ExampleSteps
    from llmworks.train.finetune.generation_check import generate_completions, select_prompt_rows
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.sft import SftConfig, make_examples

    config = (DistillConfig if request.get("teacher") else SftConfig).model_validate(request["config"])
    model = Path(request["model"])
    tokenizer = load_tokenizer(model)
    stops = get_stop_ids(model, tokenizer)
    set_template(tokenizer, config.chat_template, config.control_tokens)
    rows = read_training_rows(Dataset(Path(request["data"])))
    some = rows[:: -(-len(rows) // MAX_ROWS)]
    start = time.perf_counter()
    examples, _ = make_examples(tokenizer, some, config)
    encoding = time.perf_counter() - start
    trainable = open_trainable_model(model)
    network = trainable.network
    questions = (
        select_prompt_rows(Dataset(Path(request["eval_data"])))[: config.num_sample_prompts]
        if request["eval_data"]
        else []
    )
    loading = time.perf_counter() - began - encoding
    start = time.perf_counter()
    generate_completions(TorchEngine(network, tokenizer, stops, ""), questions[:1], None)
    samples = (time.perf_counter() - start) * len(questions)
    network, device, loss_of, optimizers = _prepare_training(trainable, config, request)
    steps = ExampleSteps(
        examples,
        epochs=config.num_train_epochs,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=0,
        padding_free=trainable.padding_free,
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


def _prepare_training(
    trainable: TrainableModel, config: SftConfig, request: dict[str, Any]
) -> tuple[Any, device, Any, list[Optimizer]]:
    """Set up the trainable parameters; return (model, device, loss, optimizers)."""
    import torch

    from llmworks.train.distill import DistillConfig
    from llmworks.train.finetune.distillation_loss import BETAS, create_distillation_loss
    from llmworks.train.finetune.run import prepare_trainable
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.losses import next_token_loss
    from llmworks.train.loop.optimizers import create_optimizers
    from llmworks.train.loop.packed_steps import packed_loss

    prepare_trainable(trainable, config)
    network = trainable.network
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).train()
    if config.gradient_checkpointing and network.supports_gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    optimizers = create_optimizers(network, config.optimizer)
    loss_of: Any = packed_loss if trainable.padding_free else next_token_loss
    if isinstance(config, DistillConfig):
        teacher_model = open_trainable_model(Path(request["teacher"])).network.requires_grad_(False).eval().to(device)
        loss_of = create_distillation_loss(
            teacher_model,
            beta=BETAS.get(config.divergence, 0.5),
            temperature=config.temperature,
            ce_weight=config.ce_weight,
        )
    return network, device, loss_of, optimizers


def _time_steps(
    examples: list[Example],
    config: SftConfig,
    steps: ExampleSteps,
    device: device,
    loss_of: Any,
    network: Any,
    optimizers: list[Optimizer],
) -> tuple[list[float], list[int]]:
    """Return seconds and padded tokens of some steps, the longest rows first."""
    from llmworks.train.distributed.sharding import autocast, resolve_precision

    longest = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))[-config.batch_size :]
    seconds: list[float] = []
    padded: list[int] = []
    for batches in itertools.chain([[steps.collate(longest)]], ([make() for make in parts] for parts in steps)):
        start = time.perf_counter()
        for batch in batches:
            with autocast(device, resolve_precision(config.precision, device)):
                loss = loss_of(network, batch) / max(1, batch.labels)
            loss.backward()
        step_optimizers(network, optimizers)
        seconds.append(time.perf_counter() - start)
        padded.append(sum(batch.ids.numel() for batch in batches))
        if is_enough(seconds):
            break
    return seconds, padded


def is_enough(seconds: list[float]) -> bool:
    """Return whether these steps suffice for an estimate."""
    return len(seconds) >= MIN_STEPS and (len(seconds) >= MAX_STEPS or sum(seconds) >= MIN_SECONDS)


def step_optimizers(network: Any, optimizers: list[Any]) -> None:
    """Clip gradients and apply the optimizers."""
    import torch

    torch.nn.utils.clip_grad_norm_((p for p in network.parameters() if p.requires_grad), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def create_batches(
    request: dict[str, Any], config: PretrainConfig, vocabulary: int, device: torch.device
) -> list[PackedBatch]:
    """Return micro-batches of the first steps as the training will read them.

    A step's time depends on how its rows are divided into documents. Without data: random ids, two documents in every
    second row.
    """
    import torch

    from llmworks.core.artifact import Dataset
    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.train.loop.packed_steps import PackedBatch, PackedSteps

    length = int(request["length"])
    packed = PackedDataset(Dataset(Path(request["data"]))) if request["data"] else None
    if packed is not None and len(packed) >= config.batch_size:
        return [
            make()
            for parts in PackedSteps(
                packed,
                MAX_STEPS,
                batch_size=config.batch_size,
                num_micro_batches=1,
                length=length,
                seed=0,
                device=device,
            )
            for make in parts
        ]
    ids = torch.randint(0, vocabulary, (config.batch_size, length), device=device)
    places = torch.arange(length, device=device).expand(config.batch_size, -1)
    boundaries = torch.randint(1, length, (config.batch_size, 1), device=device)
    boundaries[::2] = length
    segments = (places >= boundaries).long()
    return [
        PackedBatch(
            ids,
            places - segments * boundaries,
            segments,
            ids.clone(),
            config.batch_size * (length - 1),
            config.batch_size * length,
            "",
        )
    ]


def create_model(request: dict[str, Any]) -> Any:
    """Create the requested model with random weights."""
    if request["recurrent"]:
        from llmworks.model.nn import recurrent

        return recurrent.RecurrentForCausalLM(recurrent.RecurrentModelConfig(shape=request["shape"]))
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM

    return DecoderForCausalLM(DecoderConfig(shape=request["shape"]))


def measure_peak_memory() -> float:
    """Return the peak memory in bytes of this process, or of its GPU."""
    import torch

    from llmworks.train.loop.loop import peak_memory

    return float(peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


if __name__ == "__main__":
    main()
