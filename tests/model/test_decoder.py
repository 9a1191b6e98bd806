"""The decoder's switches do what their papers say, none is ignored; a cache, a mask, packing and adapters change
nothing that they must not.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from transformers import DynamicCache

from llmworks.core.errors import ModelError
from llmworks.model.loss import linear_cross_entropy as linear_loss
from llmworks.model.loss.linear_cross_entropy import get_chunk_size, linear_cross_entropy
from llmworks.model.nn.attention import Attention, build_attention_mask, repeat_kv
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.nn.feed_forward import MixtureOfExperts
from llmworks.model.nn.positions import (
    alibi_slopes,
    apply_rope,
    compute_cos_sin,
    rope_frequencies,
    sinusoidal_embeddings,
)
from llmworks.model.shape import Rope, Shape

USUAL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
IDS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
SWITCHES: dict[str, dict[str, Any]] = {
    "norm": {"norm": "layer"},
    "norm_place": {"norm_position": "post"},
    "around": {"norm_position": "sandwich"},
    "norm_epsilon": {"norm_eps": 0.5},
    "norm_from_zero": {"norm_unit_offset": True},
    "qk_norm": {"use_qk_norm": True},
    "learned": {"position_embedding_type": "learned"},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "alibi": {"position_embedding_type": "alibi"},
    "none": {"position_embedding_type": "none"},
    "theta": {"rope_parameters": {"rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4}},
    "ntk": {"rope_parameters": {"rope_type": "ntk", "factor": 4}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 400}},
    "llama-3": {
        "rope_parameters": {"rope_type": "llama3", "factor": 4, "original_max_position_embeddings": 20, "beta_fast": 4}
    },
    "window": {"sliding_window": 5},
    "full_every": {"sliding_window": 5, "global_attn_every_n_layers": 2},
    "window_theta": {"sliding_window": 5, "global_attn_every_n_layers": 2, "local_rope_theta": 77.0},
    "gelu": {"hidden_act": "gelu"},
    "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "gated": {"gated_mlp": False, "intermediate_size": 64},
    "qkv": {"bias": "qkv"},
    "bias": {"bias": "all"},
    "tied": {"tie_word_embeddings": False},
    "embedding_scaled": {"scale_embedding": True},
    "attention_scale": {"attention_multiplier": 0.9},
    "experts": {"experts": {"num_experts": 4}},
    "kv_heads": {"num_key_value_heads": 2},
    "head_width": {"head_dim": 10},
    "hidden": {"intermediate_size": 64},
}


def model(weights: float = 0.25, **more: Any) -> DecoderForCausalLM:
    """A small decoder whose weights, gains and biases are all far from their beginning."""
    made = DecoderForCausalLM(DecoderConfig(shape=Shape.model_validate({**USUAL, **more}).model_dump()))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            draw.manual_seed(sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=draw) * weights
            parameter.copy_(1 + noise if parameter.dim() == 1 else noise)
    made.train(False)
    return made


def logits(made: DecoderForCausalLM, ids: torch.Tensor = IDS, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(made(input_ids=ids, **given).logits)


@pytest.mark.parametrize("name", SWITCHES)
def test_no_switch_is_ignored(name: str) -> None:
    """The same weights (where both have them) under another switch give other logits."""
    plain = (
        {"sliding_window": 5}
        if name == "full_every"
        else {"sliding_window": 5, "global_attn_every_n_layers": 2}
        if name == "window_theta"
        else {}
    )
    assert (logits(model(**SWITCHES[name])) - logits(model(**plain))).abs().max() > 1e-3


@pytest.mark.parametrize("name", SWITCHES)
def test_a_cache_changes_nothing(name: str) -> None:
    made = model(**SWITCHES[name])
    whole = logits(made)
    cache = DynamicCache()
    parts = [
        logits(made, IDS[:, a:b], past_key_values=cache)
        for a, b in ((0, 7), (7, 8), (8, 13), *((i, i + 1) for i in range(13, 24)))
    ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4
    assert (logits(made, IDS[:, :11]) - whole[:, :11]).abs().max() < 1e-4  # and nobody looks ahead


@pytest.mark.parametrize("name", ["norm", "alibi", "learned", "sinusoidal", "window", "qk_norm", "experts"])
def test_padding_and_packing_change_nothing(name: str) -> None:
    made = model(**SWITCHES[name])
    first, second = logits(made, IDS[:1, :10]), logits(made, IDS[1:, :14])
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :4] = 0
    ids = torch.cat((F.pad(IDS[:1, :10], (4, 0)), IDS[1:, :14]))
    both = logits(made, ids, attention_mask=mask)
    assert (both[0, 4:] - first[0]).abs().max() < 1e-5
    assert (both[1] - second[0]).abs().max() < 1e-5
    row, positions = torch.cat((IDS[:1, :10], IDS[1:, :14]), 1), torch.cat((torch.arange(10), torch.arange(14)))[None]
    packed = logits(made, row, position_ids=positions)
    assert (packed[0, :10] - first[0]).abs().max() < 1e-5
    assert (packed[0, 10:] - second[0]).abs().max() < 1e-5
    assert (logits(made, row)[0, 10:] - second[0]).abs().max() > 1e-3  # without, they would see one another


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_heads_are_repeated_ones(groups: int) -> None:
    """Grouped- and multi-query attention is multi-head attention whose key and value matrices are repeated for every
    head of a group.
    """
    few, many = (Attention(Shape.model_validate({**USUAL, "num_key_value_heads": n}), 0) for n in (groups, 4))
    with torch.no_grad():
        many.query.weight.copy_(few.query.weight)
        many.out.weight.copy_(few.out.weight)
        for mine, theirs in ((few.key, many.key), (few.value, many.value)):
            theirs.weight.copy_(mine.weight.view(groups, 8, 32).repeat_interleave(4 // groups, 0).reshape(32, 32))
        x, places = torch.randn(2, 9, 32), torch.arange(9)[None]
        look, turned = build_attention_mask(places, places), compute_cos_sin(places, rope_frequencies(Rope(), 8, 48)[0])
        assert (few(x, look, turned) - many(x, look, turned)).abs().max() < 1e-6
    assert torch.equal(repeat_kv(torch.arange(2.0).view(1, 2, 1, 1), 2).flatten(), torch.tensor([0.0, 0, 1, 1]))


def test_attention_is_the_formula() -> None:
    """softmax(q k^T / sqrt(d)) v, written out, with a window and ALiBi's -slope * distance."""
    torch.manual_seed(0)
    places = torch.arange(6)[None]
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind(0)
    for window, slope in ((0, None), (3, None), (3, alibi_slopes(2))):
        look = build_attention_mask(places, places, window=window, alibi=slope)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=look.mask, is_causal=look.causal)
        for head in range(2):
            for i in range(6):
                allowed = range(max(0, i - window + 1) if window else 0, i + 1)
                fit = [
                    float(q[0, head, i] @ k[0, head, j]) / 2
                    - (float(slope[head]) * (i - j) if slope is not None else 0)
                    for j in allowed
                ]
                total = sum(map(math.exp, fit))
                expected = sum(
                    (math.exp(f) / total * v[0, head, j] for f, j in zip(fit, allowed, strict=True)), torch.zeros(4)
                )
                assert (out[0, head, i] - expected).abs().max() < 1e-5


def test_positions_are_those_of_the_papers() -> None:
    kept, factor = rope_frequencies(Rope(), 8, 2048)
    assert factor == 1
    assert kept.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])  # theta^(-2i/d)
    assert rope_frequencies(Rope(rope_type="linear", factor=4), 8, 2048)[0].tolist() == pytest.approx(
        [0.25, 0.025, 0.0025, 0.00025]
    )
    # NTK: the fastest wave is kept, the slowest is stretched by the factor
    assert rope_frequencies(Rope(rope_type="ntk", factor=4), 8, 2048)[0].tolist() == pytest.approx(
        [1.0, 0.1 * 4 ** (-1 / 3), 0.01 * 4 ** (-2 / 3), 0.001 / 4]
    )
    # YaRN for d 128, base 10000, trained 4096, factor 8: by its equations, pair 20 turns 4096 / (2 pi 10000^(40/128)) =
    # 36.7 times, pair 46 0.87
    yarn, factor = rope_frequencies(Rope(rope_type="yarn", factor=8, original_max_position_embeddings=4096), 128, 32768)
    plain = rope_frequencies(Rope(), 128, 32768)[0]
    assert factor == pytest.approx(0.1 * math.log(8) + 1)
    assert torch.allclose(yarn[:21], plain[:21])
    assert torch.allclose(yarn[46:], plain[46:] / 8)
    share = (30 - 20) / (46 - 20)  # floor and ceiling of the pairs that turn 32 times and once
    assert float(yarn[30]) == pytest.approx(float(plain[30] * (1 - share) + plain[30] / 8 * share), rel=1e-5)
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    )
    wave = sinusoidal_embeddings(torch.tensor([[0, 3]]), 4)
    assert wave[0].tolist() == [
        pytest.approx([0, 1, 0, 1]),
        pytest.approx([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)], rel=1e-5),
    ]


def test_rotations_know_distances_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)
    angles = rope_frequencies(Rope(), 16, 100)[0]

    def fit(i: int, j: int) -> float:
        return float(
            (
                apply_rope(q, *compute_cos_sin(torch.tensor([[i]]), angles))
                * apply_rope(k, *compute_cos_sin(torch.tensor([[j]]), angles))
            ).sum()
        )

    assert fit(5, 2) == pytest.approx(fit(83, 80), rel=1e-4)
    assert fit(5, 2) != pytest.approx(fit(5, 3), rel=1e-2)


def test_experts() -> None:
    """Each token's answer is the sum of the two likeliest experts, weighed; the balance is 1 when even, as many as
    experts when all go to one.
    """
    torch.manual_seed(0)
    layer = MixtureOfExperts(Shape.model_validate({**USUAL, "experts": {"num_experts": 4, "num_experts_per_tok": 2}}))
    x = torch.randn(3, 5, 32)
    chances = layer.router(x).softmax(-1)
    for b, t in ((0, 0), (2, 4)):
        weights, picked = chances[b, t].topk(2)
        expected = sum(w * layer.experts[int(e)](x[b, t]) for w, e in zip(weights / weights.sum(), picked, strict=True))
        assert (layer(x)[b, t] - expected).abs().max() < 1e-6
    one = MixtureOfExperts(Shape.model_validate({**USUAL, "experts": {"num_experts": 4, "num_experts_per_tok": 1}}))
    with torch.no_grad():
        one.router.weight.zero_()
        one.router.weight[2] = 100.0
    one(torch.ones(2, 8, 32))
    assert float(one.load_balancing_loss.detach()) == pytest.approx(4.0)
    with torch.no_grad():
        one.router.weight.zero_()
    one(torch.randn(2, 8, 32))
    assert float(one.load_balancing_loss.detach()) == pytest.approx(1.0)
    made = model(experts={"num_experts": 4, "router_aux_loss_coef": 0.5})
    plain = model(experts={"num_experts": 4, "router_aux_loss_coef": 0.0})
    assert float(made(input_ids=IDS, labels=IDS).loss.detach()) == float(
        plain(input_ids=IDS, labels=IDS).loss.detach()
    )  # asked, not trained
    made.train()
    assert float((made(input_ids=IDS, labels=IDS).loss - plain(input_ids=IDS, labels=IDS).loss).detach()) > 0.4
    copy.deepcopy(made)  # no graph is left in it


def test_the_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert (get_chunk_size(49_152), get_chunk_size(262_144), get_chunk_size(1 << 30)) == (512, 128, 1)
    monkeypatch.setattr(linear_loss, "MAX_CHUNK_TOKENS", 100)
    states, weight, labels = (
        torch.randn(207, 16, requires_grad=True),
        torch.randn(50, 16, requires_grad=True),
        torch.randint(0, 50, (207,)),
    )
    far = linear_cross_entropy(torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert float(far) == 600.0  # no chance underflows
    whole = linear_cross_entropy(states, weight, labels, 0.25)
    halves = torch.autograd.grad(whole, (states, weight))
    assert all(
        (a - b / 4).abs().max() < 1e-4
        for a, b in zip(
            halves,
            torch.autograd.grad(F.cross_entropy(states @ weight.T, labels, reduction="sum"), (states, weight)),
            strict=True,
        )
    )
    ours = linear_cross_entropy(states, weight, labels) * 0.3
    theirs = F.cross_entropy(states @ weight.T, labels, reduction="sum") * 0.3
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for mine, reference in zip(
        torch.autograd.grad(ours, (states, weight)), torch.autograd.grad(theirs, (states, weight)), strict=True
    ):
        assert (mine - reference).abs().max() < 1e-4
    made = model()
    labels = IDS.clone()
    labels[0, :9] = -100
    expected = F.cross_entropy(made(input_ids=IDS).logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1))
    assert float(made(input_ids=IDS, labels=labels).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for it
def test_it_learns_and_takes_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    made = DecoderForCausalLM(DecoderConfig(shape=Shape.model_validate(USUAL).model_dump()))
    assert float(made(input_ids=IDS, labels=IDS).loss.detach()) == pytest.approx(
        math.log(61), abs=0.15
    )  # nothing is known at the beginning
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for _ in range(90):
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.2
    adapted = get_peft_model(made, LoraConfig(target_modules=["query", "value"], r=4))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert sum(p.grad is not None for p in adapted.parameters()) == 2 * 2 * 2
    assert adapted.generate(input_ids=IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 9)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"global_attn_every_n_layers": 2}, "needs a sliding_window"),
        ({"experts": {"num_experts": 2, "num_experts_per_tok": 3}}, "larger than num_experts"),
        ({"position_embedding_type": "absolute"}, "Input should be"),
        ({"hiden": 3}, "Extra inputs"),
    ],
)
def test_shapes_that_do_not_fit(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Shape.model_validate({**USUAL, **more})


def test_ids_and_lengths_beyond() -> None:
    with pytest.raises(ModelError, match="token id 61 is out of range for a vocabulary of 61"):
        model()(input_ids=torch.tensor([[3, 61]]))
    learned = model(position_embedding_type="learned")
    with pytest.raises(ModelError, match="49 tokens, the model has 48 position embeddings"):
        learned(input_ids=torch.zeros(1, 49, dtype=torch.long))


@pytest.mark.parametrize(
    "more",
    [
        {"use_qk_norm": True},
        {"use_qk_norm": True, "sliding_window": 5},
        {"norm": "layer", "position_embedding_type": "learned"},
    ],
)
def test_narrow_products_train(more: dict[str, Any]) -> None:
    """Under autocast the loss and its gradients are near those of fp32, the head's too."""
    made = model(weights=0.1, **more).train()
    found = []
    for narrow in (False, True):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append(
            (float(loss.detach()), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
        )
    (wide, by), (near, by_near) = found
    assert wide != near == pytest.approx(wide, rel=0.02)
    for name, grad in by.items():
        assert by_near[name].dtype == torch.float32
        assert float((by_near[name] - grad).norm() / grad.norm()) < 0.05, name


def test_a_sum_of_many_chunks_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "MAX_CHUNK_TOKENS", 4)
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 16, generator=draw).bfloat16().requires_grad_() for n in (512, 40))
    labels = torch.randint(0, 40, (512,), generator=draw)
    linear_cross_entropy(states, weight, labels, 1 / 512).backward()
    exact = [x.detach().float().requires_grad_() for x in (states, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, labels).backward()
    for ours, theirs in zip((states, weight), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert float((ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()) < 0.01


def test_a_row_of_texts_is_parted_with_a_cache_too() -> None:
    made = model()
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None].expand(2, -1)
    apart = torch.cat((logits(made, IDS[:, :10]), logits(made, IDS[:, 10:])), 1)
    assert (logits(made, position_ids=positions, use_cache=True) - apart).abs().max() < 1e-4
    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    assert (logits(made, position_ids=positions, attention_mask=mask)[:, 10:] - apart[:, 10:]).abs().max() < 1e-4


def test_alibi_is_where_its_model_is() -> None:
    elsewhere = torch.arange(9, device="meta")[None]
    mask = build_attention_mask(elsewhere, elsewhere, alibi=alibi_slopes(4)).mask
    assert mask is not None
    assert mask.device.type == "meta"
    at = torch.arange(3000)[None]
    half = build_attention_mask(at[:, -1:], at, window=5, alibi=alibi_slopes(4), dtype=torch.float16).mask
    assert half is not None
    assert half.isfinite().all()


def test_adapters_leave_the_head_alone() -> None:
    from llmworks.model.lora import lora

    made = model()
    assert "head" not in lora.find_target_layers(made, "all-linear")
    lora.attach_lora(made, "all-linear", lora.LoraSettings(2, 4.0))
    made(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.b.grad is not None for _, layer in lora.iter_lora_layers(made))


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_head_is_in_the_loss(tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    made: Any = model(tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(made, LoraConfig(target_modules=["head"], init_lora_weights=False))
    loss = wrapped(input_ids=IDS, labels=IDS).loss
    expected = F.cross_entropy(logits(wrapped)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if "lora" in name)


def test_hooks_of_the_embedding_are_heard() -> None:
    made = model()
    plain = float(made(input_ids=IDS, labels=IDS).loss.detach())
    made.decoder.embedding.register_forward_hook(lambda module, given, out: out * 0)
    assert float(made(input_ids=IDS, labels=IDS).loss.detach()) != plain


def test_fine_tuning_reads_it_as_any_other() -> None:
    from llmworks.train.finetune.examples import Example, collate
    from llmworks.train.loop.losses import next_token_loss

    made = model()
    batch = collate(
        [
            Example(tuple(IDS[0, :9].tolist()), (0, 0, 0, 1, 1, 0, 1, 1, 1)),
            Example(tuple(IDS[1, :5].tolist()), (0, 0, 1, 1, 1)),
        ]
    )
    scores = [logits(made, IDS[i : i + 1, :n])[0].log_softmax(-1) for i, n in ((0, 9), (1, 5))]
    expected = -sum(float(scores[i][c - 1, IDS[i, c]]) for i, cs in ((0, (3, 4, 6, 7, 8)), (1, (2, 3, 4))) for c in cs)
    assert float(next_token_loss(made, batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_vocabulary_grows() -> None:
    made = model()
    before = logits(made)
    made.resize_token_embeddings(70)
    assert made.head.weight is made.decoder.embedding.weight
    assert torch.equal(logits(made)[..., :61], before)


def test_a_gate_in_one_operation_is_the_two_that_it_stands_for() -> None:
    """To the last bit, forward and backward."""
    from llmworks.model.nn.feed_forward import _SiluGate

    torch.manual_seed(0)
    gate, up, weights = (torch.randn(5, 7, 40, requires_grad=i < 2) for i in range(3))
    one, two = _SiluGate.apply(gate, up), torch.nn.functional.silu(gate) * up
    assert torch.equal(one, two)
    for a, b in zip(
        torch.autograd.grad((one * weights).sum(), [gate, up]),
        torch.autograd.grad((two * weights).sum(), [gate, up]),
        strict=True,
    ):
        assert torch.equal(a, b)
