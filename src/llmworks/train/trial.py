"""A few steps of a training in a process of its own, so that its memory is its own: `python -m llmworks.train.trial`, its question on standard input."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmworks.train.packed import PackedBatch
    from llmworks.train.pretrain import PretrainConfig

STEPS, MOST, ENOUGH, LOOKS = 5, 60, 10.0, 4  # steps at least and at most, and seconds: the first quarter is slow, while memory is fresh; batches that are only looked at


def main() -> None:
    """Read {shape, recurrent, config, length, data, threads}, print a Trial as JSON."""
    began = time.perf_counter()
    import matplotlib.figure  # noqa: F401
    import torch

    from llmworks.train.optimizers import optimizers_of
    from llmworks.train.packed import packed_loss
    from llmworks.train.placement import cast
    from llmworks.train.pretrain import PretrainConfig

    given = json.load(sys.stdin)
    torch.set_num_threads(int(given["threads"]))
    config = PretrainConfig.model_validate(given["config"])
    network = model_of(given).train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    if config.recompute and network.supports_gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    optimizers = optimizers_of(network, config.optimizer)
    average = [p.detach().clone() for p in network.parameters()] if config.average else []
    batches = batches_of(given, config, network.config.vocab_size, device)
    loading = time.perf_counter() - began
    seconds: list[float] = []
    while len(seconds) < STEPS or (len(seconds) < MOST and sum(seconds) < ENOUGH):
        start = time.perf_counter()
        batch = batches[len(seconds) % len(batches)]
        for _ in range(min(2, config.accumulation)):
            with cast(device, config.precision):
                loss = packed_loss(network, batch) / batch.labels
            loss.backward()  # type: ignore[no-untyped-call]
        part = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for mean, p in zip(average, network.parameters(), strict=False):
            mean.lerp_(p.detach(), 0.1)
        seconds.append((part - start) / min(2, config.accumulation) * config.accumulation + time.perf_counter() - part)
    network.eval()
    with torch.no_grad():
        start = time.perf_counter()
        for batch in batches[:LOOKS]:
            float(packed_loss(network, batch))
        row = (time.perf_counter() - start) / config.batch / len(batches[:LOOKS])
        ids, start = batches[0].ids, time.perf_counter()
        tokens = min(config.sample_tokens, 8, ids.shape[1] - 2)
        if tokens and config.prompts:
            network.generate(ids[:1, :2], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, pad_token_id=0)
        samples = (time.perf_counter() - start) / max(1, tokens) * config.sample_tokens * len(config.prompts)
    # opening, golden tokens and saving take about as long as this process took to begin
    print(json.dumps({"step": statistics.fmean(seconds[len(seconds) // 4 :]), "row": row, "samples": samples, "around": 2 * loading, "memory": peak()}))
    sys.stdout.flush()
    os._exit(0)


def batches_of(given: dict[str, Any], config: PretrainConfig, vocabulary: int, device: torch.device) -> list[PackedBatch]:
    """Parts of the first steps, as the training will read them: a step's time depends on how its rows are parted into texts. Without data, ids by chance, two texts in every second row."""
    import torch

    from llmworks.artifact import Dataset
    from llmworks.data.tokens import Packed
    from llmworks.train.packed import PackedBatch, PackedSteps

    length = int(given["length"])
    packed = Packed(Dataset(Path(given["data"]))) if given["data"] else None
    if packed is not None and len(packed) >= config.batch:
        return [make() for parts in PackedSteps(packed, MOST, rows=config.batch, parts=1, length=length, seed=0, device=device) for make in parts]
    ids = torch.randint(0, vocabulary, (config.batch, length), device=device)
    places = torch.arange(length, device=device).expand(config.batch, -1)
    parted = torch.randint(1, length, (config.batch, 1), device=device)
    parted[::2] = length
    segments = (places >= parted).long()
    return [PackedBatch(ids, places - segments * parted, segments, ids.clone(), config.batch * (length - 1), config.batch * length, "")]


def model_of(given: dict[str, Any]) -> Any:
    """The model that is asked for, untrained."""
    if given["recurrent"]:
        from llmworks.model import recurrent

        return recurrent.RecurrentForCausalLM(recurrent.RecurrentConfig(shape=given["shape"]))
    from llmworks.model.decoder import DecoderConfig, DecoderForCausalLM

    return DecoderForCausalLM(DecoderConfig(shape=given["shape"]))


def peak() -> float:
    """The most bytes that this process, or its GPU, held."""
    import torch

    from llmworks.train.loop import memory

    return float(memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


if __name__ == "__main__":
    main()
