"""Sensitivity: estimate how a change of each matrix would affect a model's token probabilities, without evaluating
each, by one forward and one backward pass, block by block.

To second order the KL divergence of a model with W + D from that with W is half the mean of (g' D x)^2 over tokens, for
the matrix's input x and the gradient g at its output of the log-probability of tokens sampled from the model itself
(the Fisher information: Amari 1998; for quantization Kim et al. 2023, arXiv:2306.07629, section 4). Interactions of two
tokens, or of two matrices, are neglected. Does not know rounding methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.core.context import Context
from llmworks.core.progress import write_atomic
from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.nn.decoder import TransformerBlock
from llmworks.quantize.calibrate.layerwise import CHUNK, LOGITS, get_block_parts, get_layer
from llmworks.quantize.calibrate.memmap import open_memmap

MAX_TOKENS = 4096  # maximum tokens whose inputs and gradients are used; of more, every n-th
Captured = dict[str, list[tuple[Tensor, Tensor]]]  # by layer: inputs and gradients [tokens, columns]
MakeCandidates = Callable[
    [str, Tensor], Sequence[Tensor]
]  # (name of a layer in the directory, its weight) -> candidate weights


def estimate_costs(
    source: LayerReader, ids: Tensor, ctx: Context, make_candidates: MakeCandidates
) -> dict[str, list[float]]:
    """Estimate the cost of each candidate of each layer, in nats per token, by the layer's name in the directory.

    ids: [sequences, length]. An interrupted run resumes at its block.
    """
    folder = ctx.scratch / "sensing"
    folder.mkdir(exist_ok=True)
    layers, count, length = source.shape.num_hidden_layers, *ids.shape
    frame = source.load_without_blocks()
    stack: Any = frame.decoder
    places = torch.arange(length)[None]

    def states(name: str) -> Tensor:
        return open_memmap(folder / f"{name}.bin", (count, length, source.shape.hidden_size))

    mark = folder / "done.json"
    done: dict[str, Any] = (
        json.loads(mark.read_text()) if mark.exists() else {"forward": 0, "backward": layers, "costs": {}}
    )
    each = max(1, CHUNK // length)
    with torch.no_grad(), ctx.progress.bar("sensitivity", 2 * layers, "blocks") as bar:
        bar.advance(done["forward"] + layers - done["backward"])
        if not done["forward"]:
            states("0").copy_(stack.add_positions(stack.embedding(ids), places.expand(count, -1)))
        for number in range(done["forward"], layers):
            with source.mount_block(stack, source.load_block(number)):
                for some in torch.split(torch.arange(count), each):
                    states(str(number + 1))[some] = stack.run_blocks(
                        states(str(number))[some], places.expand(len(some), -1)
                    )
            done["forward"] = number + 1
            write_atomic(mark, json.dumps(done))
            bar.advance()
        if done["backward"] == layers:
            states(f"back-{layers}").copy_(_compute_head_gradients(frame, states(str(layers)), ctx.seed))
        for number in range(done["backward"] - 1, -1, -1):
            block = source.load_block(number)
            captured: Captured = {}
            stride = -(-ids.numel() // MAX_TOKENS)
            with source.mount_block(stack, block):
                for some in torch.split(torch.arange(count), each):
                    states(f"back-{number}")[some] = _backward_block(
                        block,
                        states(str(number))[some].clone(),
                        states(f"back-{number + 1}")[some].clone(),
                        places.expand(len(some), -1),
                        stack,
                        captured,
                        stride,
                    )
            done["costs"] |= _estimate_block_costs(source, block, number, captured, make_candidates, stride)
            done["backward"] = number
            write_atomic(mark, json.dumps(done))
            bar.advance()
    return {name: [value / (2 * ids.numel()) for value in found] for name, found in done["costs"].items()}


def _compute_head_gradients(frame: Any, states: Tensor, seed: int) -> Tensor:
    """Return gradients at the last hidden states of the negative log-probabilities of tokens sampled from the model."""
    found = torch.empty_like(states)
    draw = torch.Generator().manual_seed(seed)
    for text in range(len(states)):
        for some in torch.split(torch.arange(states.shape[1]), LOGITS):
            with torch.enable_grad():
                state = states[text, some].clone().requires_grad_()
                logits = frame.head(frame.decoder.norm(state)).float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
                F.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert state.grad is not None
            found[text, some] = state.grad
    return found


def _backward_block(
    block: TransformerBlock,
    state: Tensor,
    gradient: Tensor,
    places: Tensor,
    stack: Any,
    captured: Captured,
    stride: int,
) -> Tensor:
    """Return the gradient before a block; add every `stride`th token's layer inputs and output gradients to
    `captured`.
    """
    hooks = []
    for part in get_block_parts(block):
        for name in part.layers:

            def capture_inputs(_: Any, layer_inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                read = layer_inputs[0].detach().flatten(0, 1)[::stride]

                def capture_gradient(back: Tensor) -> None:
                    captured.setdefault(name, []).append((read, back.flatten(0, 1)[::stride]))

                output.register_hook(capture_gradient)  # type: ignore[no-untyped-call]

            hooks.append(get_layer(block, name).register_forward_hook(capture_inputs))
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    with torch.enable_grad():
        state.requires_grad_()
        stack.run_blocks(state, places).backward(gradient)
    for hook in hooks:
        hook.remove()
    assert state.grad is not None
    return state.grad


def _estimate_block_costs(
    source: LayerReader,
    block: TransformerBlock,
    number: int,
    captured: Captured,
    make_candidates: MakeCandidates,
    stride: int,
) -> dict[str, list[float]]:
    """Return twice the total cost over tokens of each candidate of each layer."""
    found = {}
    for layer, pairs in captured.items():
        name, weight = source.rename(f"decoder.blocks.{number}.{layer}"), get_layer(block, layer).weight
        x, back = torch.cat([x for x, _ in pairs]), torch.cat([back for _, back in pairs])
        found[name] = [
            stride * float(((x @ (tried - weight).T) * back).sum(1).square().sum())
            for tried in make_candidates(name, weight)
        ]
    return found
