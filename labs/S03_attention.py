# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Write causal multi-head attention with a cache, and rebuild the attention maps of a real model from its weights.
#     minutes: 70
#     budget_seconds: 90
#     needs: [F01, F09, S02]
#     assets: [smollm2-135m-instruct]
#     topics: [self-attention, causal mask, multi-head attention, grouped-query attention, rotary positions, key-value cache, attention sink]
# ---

# %% [markdown]
# # S03 Attention in thirty lines
#
# **You will learn**: Write causal multi-head attention with a cache, and rebuild the attention maps of a real model from its weights.
#
# **Time**: 70 minutes to read and to do the exercises.
#
# **Needs**: [F01](F01_linear_algebra.ipynb), [F09](F09_backpropagation.ipynb), [S02](S02_tokenizers.ipynb).

# %% tags=["setup"]
# Install llmworks where it is missing, as in Colab, with the libraries that labs use.
import importlib.util
import os
import subprocess
import sys
import warnings

if importlib.util.find_spec("llmworks") is None:
    wheel = os.environ.get("LLMWORKS_WHEEL", "llmworks[labs]")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wheel], check=True)

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

os.environ["TQDM_DISABLE"] = "1"  # no progress bars
warnings.filterwarnings("ignore", message="IProgress not found")
plt.rcParams["figure.figsize"] = (7, 3.6)
plt.rcParams["figure.constrained_layout.use"] = True
plt.rcParams["axes.grid"] = True

# %% [markdown]
# ## A weighted mean
#
# **Self-attention** replaces each position's vector by a weighted mean of the vectors of all positions. From each vector three are made by matrices: a *query*, a *key* and a *value*. The weight of position $j$ for position $i$ is large where query $i$ and key $j$ point in the same direction:
#
# $$\operatorname{attention}(Q, K, V) = \operatorname{softmax}\left(\frac{QK^\top}{\sqrt d}\right) V$$
#
# A dot product of $d$ numbers of size 1 has the size $\sqrt d$; the division keeps the softmax from becoming a choice of one.

# %%
import math

import torch


def attention(q, k, v, mask=None):
    """Return output and weights; q: (..., n, d), k and v: (..., m, d); mask: True is allowed."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    return weights @ v, weights


torch.manual_seed(0)
q, k, v = torch.randn(3, 5, 8)
output, weights = attention(q, k, v)
print(weights.round(decimals=2))
print("each row sums to", weights.sum(dim=1).round(decimals=4).tolist())

# %% [markdown]
# ## Causal mask
#
# A model that predicts the next token must not see it. The **causal mask** allows position $i$ to look at positions $0 \dots i$ only. So one pass over a text trains all its positions at once, each as if the text ended there.

# %% tags=["parity"]
n = 5
causal = torch.ones(n, n, dtype=torch.bool).tril()
output, weights = attention(q, k, v, causal)
library = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(output, library)
shorter, _ = attention(q[:3], k[:3], v[:3], causal[:3, :3])
torch.testing.assert_close(output[:3], shorter)  # what comes later changes nothing
print(weights.round(decimals=2))
print("our output is that of torch's scaled_dot_product_attention")

# %% [markdown]
# ## Many heads
#
# One mean can look at one thing. **Multi-head attention** runs several in parallel, each on a slice of the width; the outputs stand side by side and are mixed by one more matrix. In **grouped-query attention** (GQA) several heads of queries share one head of keys and values. The cache of keys and values, which decides how many conversations fit into memory, shrinks by
# that factor. SmolLM2 has 9 heads of queries and 3 of keys.


# %%
def split_heads(x, heads):
    """(n, width) -> (heads, n, width / heads)."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def grouped_attention(x, wq, wk, wv, wo, heads, kv_heads, rotate=lambda t: t):
    """Return output and weights of causal attention over x: (n, width)."""
    q, k, v = (
        split_heads(x @ wq.T, heads),
        split_heads(x @ wk.T, kv_heads),
        split_heads(x @ wv.T, kv_heads),
    )
    q, k = rotate(q), rotate(k)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
    mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    output, weights = attention(q, k, v, mask)
    return output.transpose(0, 1).flatten(1) @ wo.T, weights


# %% [markdown]
# ## Rotary positions
#
# Attention itself does not know the order: shuffle the earlier tokens, and the sum is the same. **Rotary positions** (RoPE) turn each pair of coordinates of queries and keys by an angle that grows with the position, $m \theta_i$ with $\theta_i = \text{base}^{-2i/d}$. The dot product of two turned vectors depends on the *difference* of
# their positions only.


# %%
def make_rotation(positions, d, base):
    """Return a function that turns (heads, n, d) by its positions: first half with second, as Llama."""
    angle = positions[:, None] * base ** (-torch.arange(0, d, 2) / d)
    cos, sin = torch.cos(angle), torch.sin(angle)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return rotate


a, b = torch.randn(2, 1, 1, 64)
for i, j in ((3, 0), (103, 100), (50, 3)):
    turned = [make_rotation(torch.tensor([float(m)]), 64, 10_000.0)(t) for t, m in ((a, i), (b, j))]
    print(f"positions {i:3} and {j:3}: dot product {float((turned[0] * turned[1]).sum()):.4f}")

# %% [markdown]
# ## A real model
#
# Now rebuild the maps of SmolLM2 from its weights: embedding, norm, the matrices of one block. The library computes the same maps on its way.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmworks

session = llmworks.Session("workspace", quiet=True)
path = session.load("asset:smollm2-135m-instruct").path
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation="eager"
).eval()
c = model.config
print(f"{c.num_hidden_layers} blocks, {c.num_attention_heads} query heads")
print(f"{c.num_key_value_heads} key heads")

sentence = "The cat sat on the mat because the cat was tired, and the dog barked."
ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
with torch.no_grad():
    seen = model(ids, output_attentions=True, output_hidden_states=True)
words = [tokenizer.decode(i) for i in ids[0]]
print(words)

# %% tags=["parity"]
base = float(c.rope_parameters["rope_theta"])
rotate = make_rotation(torch.arange(float(ids.shape[1])), c.head_dim, base)
for number in (0, 12, 29):
    block = model.model.layers[number]
    x = seen.hidden_states[number][0]
    x = (
        x
        * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps)
        * block.input_layernorm.weight
    )
    a = block.self_attn
    w = [m.weight for m in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)]
    with torch.no_grad():
        _, maps = grouped_attention(x, *w, c.num_attention_heads, c.num_key_value_heads, rotate)
    torch.testing.assert_close(maps, seen.attentions[number][0], atol=2e-5, rtol=1e-4)
print("our maps of blocks 0, 12 and 29 are those of transformers")

# %% [markdown]
# Which heads have a job that can be read? Measure, over all 270 heads, how much a head looks at the position just before, and how much at an earlier occurrence of the same word.

# %%
stack = torch.stack([layer[0] for layer in seen.attentions])  # (blocks, heads, n, n)
n = stack.shape[-1]
before = stack.diagonal(-1, dim1=-2, dim2=-1).mean(-1)
pairs = [(i, j) for i in range(n) for j in range(1, i) if ids[0, i] == ids[0, j]]
same = torch.stack([stack[:, :, i, j] for i, j in pairs]).mean(0)
sink = stack[:, :, 1:, 0].mean(-1)


def top(table):
    block, head = divmod(int(table.argmax()), table.shape[1])
    return block, head, float(table.max())


for name, table in (("previous token", before), ("same token", same), ("first position", sink)):
    block, head, value = top(table)
    print(f"{name:<15} block {block:2} head {head}: {value:.0%} of the attention on average")

# %% tags=["picture"] alt="Three attention maps over one sentence: one head with a bright line just below the diagonal, one with bright spots at repeated words, one with nearly all attention in the first column."
fig, axes = plt.subplots(1, 3, figsize=(11, 4.4))
for ax, (name, table) in zip(
    axes, (("previous", before), ("same", same), ("sink", sink)), strict=True
):
    block, head, _ = top(table)
    ax.imshow(stack[block, head], cmap="magma", vmin=0, vmax=1)
    ax.set_title(f"{name}: block {block}, head {head}", fontsize=10)
    ax.set_xticks(range(n), words, rotation=90, fontsize=7)
    ax.set_yticks(range(n), words if ax is axes[0] else [], fontsize=7)
    ax.grid(False)
fig.supxlabel("looked at (token)")
fig.supylabel("looks (token)")
plt.show()

# %% [markdown]
# ## The sink
#
# The weights of a row sum to 1, so a head cannot look at nothing. Heads without a task for a token look at the first position: the **attention sink**. Its value vector is small, so that this adds next to nothing. Take the first token out of a long context, and the model breaks: streaming systems keep it.

# %% tags=["picture"] alt="Share of the attention that goes to the first position by block: low in the first blocks, above one half in most later blocks."
by_block = sink.mean(1)
v0 = []
for number, block in enumerate(model.model.layers):
    with torch.no_grad():
        x = block.input_layernorm(seen.hidden_states[number][0])
        norms = block.self_attn.v_proj(x).norm(dim=1)
    v0.append(float(norms[0] / norms[1:].mean()))
fig, ax = plt.subplots()
ax.bar(range(len(by_block)), by_block, label="attention to the first position")
ax.plot(
    range(len(by_block)),
    v0,
    "o-",
    color="tab:red",
    markersize=3,
    label="norm of its value / others' values",
)
ax.set(
    xlabel="block (0 = next to the embedding)", ylabel="share, and ratio of norms (1)", ylim=(0, 1.5)
)
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Cache
#
# To write token by token, only the newest query is needed; keys and values of earlier tokens do not change. The **key-value cache** keeps them: without it, token $n$ costs the work of $n$ tokens. Memory: 2 × blocks × key heads × head size × tokens × bytes.


# %%
def generate_greedy(prompt, count, use_cache):
    """Return the ids of greedy decoding, with or without the cache."""
    found, cache = prompt, None
    with torch.no_grad():
        for _ in range(count):
            fresh = found if cache is None else found[:, -1:]
            result = model(fresh, past_key_values=cache, use_cache=use_cache)
            cache = result.past_key_values if use_cache else None
            found = torch.cat([found, result.logits[:, -1:].argmax(-1)], dim=1)
    return found


import time

times, written = {}, {}
for use_cache in (True, False):
    began = time.perf_counter()
    written[use_cache] = generate_greedy(ids, 30, use_cache)
    times[use_cache] = time.perf_counter() - began
assert torch.equal(written[True], written[False])
size = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
print(tokenizer.decode(written[True][0, ids.shape[1] :]))
print(f"30 tokens: {times[True]:.1f} s with the cache, {times[False]:.1f} s without")
print(f"cache: {size:,} bytes per token in 16 bits; {size * 8192 / 2**20:.0f} MiB for 8,192 tokens")

# %% [markdown]
# ## Exercises
#
# ### 1. A window
#
# Write `window_mask(n, window)`: True where position $i$ may look at $j$: at itself and the `window - 1` positions before, never ahead. Mistral and Gemma use it.


# %% tags=["exercise"]
def window_mask(n, window): ...


# %% tags=["solution"]
def window_mask(n, window):
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (distance >= 0) & (distance < window)


# %% tags=["wrong"]
# says: ahead
def window_mask(n, window):
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return distance.abs() < window


# %% tags=["wrong"]
# says: one too many
def window_mask(n, window):
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (distance >= 0) & (distance <= window)


# %% tags=["check"]
found = window_mask(5, 2)
assert found is not None, "window_mask returns nothing"
assert not found.triu(1).any(), "some positions look ahead"
assert found.diagonal().all(), "every position may look at itself"
assert not found[4, 2], "one too many: with a window of 2, position 4 sees 3 and 4"
assert found.sum() == 9, (
    f"9 cells are True in a 5 × 5 mask with a window of 2, found {int(found.sum())}"
)
print("right")

# %% [markdown]
# ### 2. Size of the cache
#
# Write `cache_bytes(layers, kv_heads, head_size, tokens, bytes_per_number)`.


# %% tags=["exercise"]
def cache_bytes(layers, kv_heads, head_size, tokens, bytes_per_number): ...


# %% tags=["solution"]
def cache_bytes(layers, kv_heads, head_size, tokens, bytes_per_number):
    return 2 * layers * kv_heads * head_size * tokens * bytes_per_number


# %% tags=["wrong"]
# says: values
def cache_bytes(layers, kv_heads, head_size, tokens, bytes_per_number):
    return layers * kv_heads * head_size * tokens * bytes_per_number


# %% tags=["wrong"]
# says: square
def cache_bytes(layers, kv_heads, head_size, tokens, bytes_per_number):
    return 2 * layers * kv_heads * head_size * tokens**2 * bytes_per_number


# %% tags=["check"]
found = cache_bytes(32, 8, 128, 8192, 2)
assert found is not None, "cache_bytes returns nothing"
assert found < 2**40, "the cache grows with the tokens, not with their square"
assert found != 2**29, "keys and values are both kept"
assert found == 2**30, f"a Llama 3 8B has 1 GiB for 8,192 tokens, found {found / 2**30:.3f} GiB"
print("right; with 32 key heads in place of 8:", cache_bytes(32, 32, 128, 8192, 2) / 2**30, "GiB")

# %% [markdown]
# ### 3. Order without positions
#
# Write `forgets_order(attend)`: whether the last position's output stays the same when the positions before it are reversed. `attend(x)` returns outputs (n, width) for inputs (n, width).


# %% tags=["exercise"]
def forgets_order(attend): ...


# %% tags=["solution"]
def forgets_order(attend):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    turned = torch.cat([x[:-1].flip(0), x[-1:]])
    return torch.allclose(attend(x)[-1], attend(turned)[-1], atol=1e-5)


# %% tags=["wrong"]
# says: last
def forgets_order(attend):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    return torch.allclose(attend(x)[-1], attend(x.flip(0))[-1], atol=1e-5)


# %% tags=["wrong"]
# says: always
def forgets_order(attend):
    return True


# %% tags=["check"]
torch.manual_seed(1)
random = [torch.randn(16, 16) / 4 for _ in range(4)]
spin = make_rotation(torch.arange(6.0), 4, 10_000.0)
result = forgets_order(lambda x: grouped_attention(x, *random, 4, 4)[0])
assert result is not None, "forgets_order returns nothing"
assert result, (
    "plain attention forgets the order of what came before; the last position must stay the same"
)
with_positions = forgets_order(lambda x: grouped_attention(x, *random, 4, 4, spin)[0])
assert not with_positions, (
    "with rotary positions the order counts: do not say that it is always forgotten"
)
print("right")

# %% [markdown]
# ## Self-test
#
# <details><summary>Why does doubling the context quadruple the work of attention in training?</summary>
#
# Every position has a weight for every earlier one: n² / 2 weights.
# </details>
#
# <details><summary>What is lost when 8 key heads are shared by 32 query heads?</summary>
#
# The query heads of a group look at the same keys and values, though with queries of their own. Quality falls a little, the cache to a quarter.
# </details>
#
# <details><summary>Is a bright cell in a map an explanation of the answer?</summary>
#
# Not by itself: a value may be near zero, as in the sink. Change the activation and see what changes (patching).
# </details>
#
# ## What surprised us

# %% tags=["measured"]
late = float(by_block[12:].mean())
together = float(torch.corrcoef(torch.stack([by_block, torch.tensor(v0)]))[0, 1])
block, head, most = top(sink)
display(
    Markdown(
        f"We expected attention to be about words. From block 12 on, {late:.0%} of it goes to the first position, whatever stands there; in block {block}, head {head}, {most:.0%}. The norm of the first position's value is {min(v0[12:]):.2f} to {max(v0[12:]):.2f} of the others' there, so that the bright column means *nothing to do*. In blocks 10 and 11, where its value is large, it is not looked at: over all blocks, attention and norm have a correlation of {together:.2f}. "
        f"A picture of attention that is averaged over heads shows mainly this. The cache made 30 tokens {times[False] / times[True]:.1f} times as fast, already for a sentence of {ids.shape[1]} tokens."
    )
)

# %% [markdown]
# ## In llmworks
#
# `model new` creates decoders with any number of heads, GQA, windows and positions; `model show` tells the cache per token:
#
# ```
# llmworks model show --model asset:smollm2-135m-instruct --out anatomy
# ```
#
# ## Go on
#
# - A. Vaswani and others, *Attention is all you need*, arXiv:1706.03762
# - J. Ainslie and others, *GQA*, arXiv:2305.13245; J. Su and others, *RoFormer*, arXiv:2104.09864
# - G. Xiao and others, *Efficient streaming language models with attention sinks*, arXiv:2309.17453
# - Next: [S07 Pretraining](S07_pretraining.ipynb)
