# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Write a decoder and its training loop from nothing, and watch text appear as the loss falls.
#     minutes: 70
#     budget_seconds: 200
#     needs: [F10, S02, S03]
#     assets: [austen]
#     topics: [pre-training, decoder, packing, next-token loss, gradient clipping, learning rate schedule, perplexity, bits per byte]
# ---

# %% [markdown]
# # S07 Pretraining from nothing
#
# **You will learn**: Write a decoder and its training loop from nothing, and watch text appear as the loss falls.
#
# **Time**: 70 minutes to read and to do the exercises.
#
# **Needs**: [F10](F10_optimizers.ipynb), [S02](S02_tokenizers.ipynb), [S03](S03_attention.ipynb).

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
# ## Text, split, tokenizer
#
# **Pre-training** teaches a model to predict the next token of any text. The text here: 270 chapters of Jane Austen. One chapter in twenty is held out. The tokenizer is trained on the training chapters only.

# %%
import json
import re
from pathlib import Path

import pandas as pd

import llmworks

session = llmworks.Session("workspace", quiet=True)
novels = session.make("data.read", kind=llmworks.Dataset, data="asset:austen")
texts = pd.read_parquet(next(novels.path.glob("*.parquet")))["text"]
chapters = [
    " ".join(c.split()) for t in texts for c in re.split(r"\n(?=CHAPTER|Chapter)", t) if len(c) > 500
]
Path("chapters.jsonl").write_text("".join(json.dumps({"text": c}) + "\n" for c in chapters))

chapters = session.make("data.read", kind=llmworks.Dataset, data="chapters.jsonl")
parts = {
    name: session.make(
        "data.split", kind=llmworks.Dataset, data=chapters, config={"split": name, "n_splits": 20}
    )
    for name in ("train", "test")
}
made = session.make(
    "tokenize.train", kind=llmworks.Tokenizer, data=parts["train"], config={"vocab_size": 1024}
)
print({name: part.metrics["documents"] for name, part in parts.items()}, "chapters")

# %% [markdown]
# ## Packing
#
# **Packing** cuts documents into rows of one length, so that no computation is spent on padding. The shards hold one long array of tokens, and where each piece of a document begins. Positions and attention begin anew in each piece: a chapter must not look into another.

# %%
import torch
from safetensors.torch import load_file

CONTEXT = 128
packed = {
    name: session.make(
        "data.pack", kind=llmworks.Dataset, model=made, data=part, config={"max_length": CONTEXT}
    )
    for name, part in parts.items()
}
shards = {name: load_file(one.path / "shard-00000.safetensors") for name, one in packed.items()}
tokens = {name: shard["tokens"].long() for name, shard in shards.items()}
pieces = {name: shard["pieces"].tolist() for name, shard in shards.items()}
for name in tokens:
    print(f"{name}: {len(tokens[name]):,} tokens in {len(pieces[name]) - 1:,} pieces")

# %% [markdown]
# ## A decoder
#
# A **decoder** is a stack of blocks. Each block adds to a stream of vectors: what attention found in earlier positions, and what a feed-forward network makes of each position. *RMSNorm* scales the input of both to size 1. The last vector, multiplied with the embedding table, gives a score (*logit*) for each token.
#
# `model.new` creates the weights: small normal numbers, smaller still where they write into the stream.

# %%
shape = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
untrained = session.make("model.new", kind=llmworks.Model, tokenizer=made, config=shape)
initial = load_file(untrained.path / "model.safetensors")
print(f"{sum(w.numel() for w in initial.values()):,} weights in {len(initial)} tensors")
angle = torch.arange(float(CONTEXT))[:, None] * 10_000.0 ** (-torch.arange(0, 32, 2) / 32)
COS, SIN = angle.cos(), angle.sin()


def rms_norm(x, gain):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain


def rotate(x):
    a, b = x.chunk(2, dim=-1)
    cos, sin = COS[: x.shape[-2]], SIN[: x.shape[-2]]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def forward(w, ids):
    """Return logits (batch, n, vocabulary) of token ids (batch, n)."""
    batch, n = ids.shape
    x = w["model.embed_tokens.weight"][ids]
    for i in range(shape["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = rms_norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (h @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = (t.view(batch, n, -1, 32).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (rotate(k), v))
        a = torch.nn.functional.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + a.transpose(1, 2).flatten(2) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(h @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


# %% [markdown]
# ## The loss
#
# The **next-token loss** is the mean cross-entropy of each token given those before it. **Perplexity** is $e^{\text{loss}}$: among how many equally likely tokens the model hesitates. Tokenizers differ, so compare models by **bits per byte**: the loss of a text in bits, divided by its bytes.

# %%
import math

from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(str(made.path / "tokenizer.json"))


def mean_loss(w, name="test", most=None):
    """Return the mean loss over all pieces, in nats per token."""
    edges, total, count = pieces[name], 0.0, 0
    rows = [tokens[name][a:b] for a, b in zip(edges[:-1], edges[1:], strict=True) if b - a > 1][:most]
    with torch.no_grad():
        for length in sorted({len(row) for row in rows}):
            same = torch.stack([row for row in rows if len(row) == length])
            for ids in same.split(32):
                logits = forward(w, ids[:, :-1])
                total += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                ).item()
                count += ids[:, 1:].numel()
    return total / count


bytes_per_token = len(tokenizer.decode(tokens["test"].tolist()).encode()) / len(tokens["test"])
first = mean_loss(initial, most=100)
print(f"before training: {first:.3f} nats; ln(1024) = {math.log(1024):.3f}")
print(f"bits per byte: {first / math.log(2) / bytes_per_token:.3f}")

# %% [markdown]
# ## Training
#
# The loop: draw rows, compute the loss, walk backwards, clip, step. **Gradient clipping** scales the gradient down when its norm is above 1, so that one odd batch cannot ruin the weights. The **learning rate schedule** rises for the first steps (warm-up) and falls as a cosine. Matrices are stepped by Muon, the embedding and the gains by AdamW (lab F10). At five points of the training, the model writes.


# %%
def write(w, start, length=40, seed=0):
    """Return text sampled from the model at temperature 0.8."""
    g = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(start, add_special_tokens=False).ids
    with torch.no_grad():
        for _ in range(length):
            logits = forward(w, torch.tensor([ids[-CONTEXT:]]))[0, -1]
            ids.append(int(torch.multinomial(torch.softmax(logits / 0.8, 0), 1, generator=g)))
    return " ".join(tokenizer.decode(ids).split())


STEPS, BATCH, RATE = 200, 16, 0.01
weights = {name: w.clone().requires_grad_() for name, w in initial.items()}
matrices = [w for name, w in weights.items() if w.dim() == 2 and "embed" not in name]
others = [w for name, w in weights.items() if w.dim() == 1 or "embed" in name]
optimizers = [
    torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0),
]
generator = torch.Generator().manual_seed(0)
curve, held, samples = [], {}, {}
for step in range(STEPS + 1):
    if step in (0, 5, 20, 80, STEPS):
        held[step], samples[step] = mean_loss(weights, most=120), write(weights, "She was")
    if step == STEPS:
        break
    starts = torch.randint(len(tokens["train"]) - CONTEXT, (BATCH,), generator=generator)
    ids = tokens["train"][starts[:, None] + torch.arange(CONTEXT)]
    loss = torch.nn.functional.cross_entropy(
        forward(weights, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
    )
    for w in weights.values():
        w.grad = None
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    warm, rest = min(1, (step + 1) / 10), max(0, step - 10) / (STEPS - 10)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = (
            RATE * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * rest)))
        )
        optimizer.step()
    curve.append(loss.item())
for step, text in samples.items():
    print(f"{step:3} steps, {held[step]:.2f} nats: {text}\n")

# %% tags=["picture"] alt="Training loss of each step and held-out loss at five points, from about 7 down to about 4 nats per token; the words that the model writes at each point stand beside it."
fig, ax = plt.subplots(figsize=(8.5, 4.2))
ax.plot(curve, alpha=0.5, label="training loss")
ax.plot(list(held), list(held.values()), "o-", color="tab:red", label="held-out loss")
for step, text in samples.items():
    if step:
        ax.annotate(
            text[7:37], (step, held[step]), xytext=(0, 14), textcoords="offset points", fontsize=7
        )
ax.set(
    xlabel=f"step ({BATCH * CONTEXT:,} tokens)",
    ylabel="loss (nats per token)",
    xlim=(-5, STEPS * 1.2),
)
ax.legend()
plt.show()

# %% [markdown]
# ## The stage
#
# `train.pretrain` trains the same weights on as many tokens, and resumes when it is killed. Its test perplexity has to be what our own forward pass computes from the weights that it saved.

# %%
trained = session.make(
    "train.pretrain",
    kind=llmworks.Model,
    model=untrained,
    data=packed["train"],
    eval_data=packed["test"],
    config={
        "batch_size": BATCH,
        "num_train_tokens": STEPS * BATCH * CONTEXT,
        "optimizer": {"name": "muon", "learning_rate": 0.01},
        "num_general_prompts": 0,
        "save_steps": 1000,
    },
)
print({key: trained.metrics[key] for key in ("steps", "tokens", "perplexity", "bits_per_byte")})

# %% tags=["parity"]
theirs = load_file(trained.path / "model.safetensors")
ours = mean_loss(theirs)
assert math.isclose(math.exp(ours), trained.metrics["perplexity"], rel_tol=1e-3), math.exp(ours)
from transformers import AutoModelForCausalLM

library = AutoModelForCausalLM.from_pretrained(trained.path)
ids = tokens["test"][:100][None]
with torch.no_grad():
    torch.testing.assert_close(forward(theirs, ids), library(ids).logits, atol=1e-4, rtol=1e-4)
print(f"perplexity: ours {math.exp(ours):.3f}, by the stage {trained.metrics['perplexity']:.3f}")
print("our logits are those of transformers")

# %% [markdown]
# ## Exercises
#
# ### 1. Bits per byte
#
# Write `bits_per_byte(loss, tokens, size)` for a mean loss in nats per token of a text with this many tokens and bytes.


# %% tags=["exercise"]
def bits_per_byte(loss, tokens, size): ...


# %% tags=["solution"]
def bits_per_byte(loss, tokens, size):
    return loss * tokens / math.log(2) / size


# %% tags=["wrong"]
# says: nats
def bits_per_byte(loss, tokens, size):
    return loss * tokens / size


# %% tags=["wrong"]
# says: mean
def bits_per_byte(loss, tokens, size):
    return loss / math.log(2) / size


# %% tags=["check"]
found = bits_per_byte(math.log(256), 1000, 1000)
assert found is not None, "bits_per_byte returns nothing"
assert not math.isclose(found, math.log(256)), "these are nats: divide by ln 2"
assert not math.isclose(found, 8 / 1000), "the loss is a mean: the text's loss is loss · tokens"
assert math.isclose(found, 8), (
    f"a model that knows nothing of single bytes has 8 bits per byte, found {found}"
)
print("right")

# %% [markdown]
# ### 2. The schedule
#
# Write `learning_rate(step, steps, peak, warmup, floor)`: linear from `peak / warmup` in step 0 to `peak` in step `warmup - 1`, then a cosine that reaches `floor` in step `steps`.


# %% tags=["exercise"]
def learning_rate(step, steps, peak, warmup, floor): ...


# %% tags=["solution"]
def learning_rate(step, steps, peak, warmup, floor):
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


# %% tags=["wrong"]
# says: step 0
def learning_rate(step, steps, peak, warmup, floor):
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


# %% tags=["wrong"]
# says: floor
def learning_rate(step, steps, peak, warmup, floor):
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


# %% tags=["wrong"]
# says: jumps
def learning_rate(step, steps, peak, warmup, floor):
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


# %% tags=["check"]
rates = [learning_rate(t, 100, 1.0, 20, 0.1) for t in range(101)]
assert None not in rates, "learning_rate returns nothing"
assert rates[0] > 0, "in step 0 the rate is 0: the first batch would be wasted"
assert abs(rates[100] - 0.1) < 1e-9, "the last rate is not the floor"
assert abs(rates[20] - rates[19]) < 0.01, (
    "the rate jumps after the warm-up: the cosine begins there, not in step 0"
)
assert abs(rates[19] - 1) < 1e-9, "the last step of the warm-up does not have the peak rate"
assert abs(rates[60] - 0.55) < 1e-9, f"halfway down the rate is 0.55, found {rates[60]:.3f}"
print("right")

# %% [markdown]
# ### 3. What is learned
#
# Write `count_examples(lengths)`: how many predictions a packed data set trains, when the pieces of documents have these lengths. The first token of a piece has nothing before it.


# %% tags=["exercise"]
def count_examples(lengths): ...


# %% tags=["solution"]
def count_examples(lengths):
    return sum(length - 1 for length in lengths)


# %% tags=["wrong"]
# says: first token
def count_examples(lengths):
    return sum(lengths)


# %% tags=["wrong"]
# says: each piece
def count_examples(lengths):
    return sum(lengths) - 1


# %% tags=["check"]
found = count_examples([128, 50, 78])
assert found is not None, "count_examples returns nothing"
assert found != 256, "the first token of a piece is predicted from nothing"
assert found != 255, (
    "this holds for each piece: a chapter must not be predicted from the end of another"
)
assert found == 253, f"expected 253, found {found}"
edges = pieces["train"]
lengths = [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]
assert count_examples(lengths) == packed["train"].metrics["num_label_tokens"], (
    "not the number of the stage"
)
print(f"right: {count_examples(lengths):,} examples from {len(tokens['train']):,} tokens")

# %% [markdown]
# ## Self-test
#
# <details><summary>The first loss of a training is 12 with a vocabulary of 1,024. What is wrong?</summary>
#
# The initial weights are too large: a model that knows nothing and does not pretend to has ln 1024, about seven.
# </details>
#
# <details><summary>Why is one text enough for hundreds of training examples per row?</summary>
#
# The causal mask makes every position an example of its own: predict the next token from those before.
# </details>
#
# <details><summary>Model A has a lower perplexity than model B. Is it better?</summary>
#
# Only with the same tokenizer. Compare bits per byte.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
unigram = torch.bincount(tokens["train"], minlength=1024).float() + 1
unigram = float(-(unigram / unigram.sum()).log()[tokens["test"]].mean())
per_weight = STEPS * BATCH * CONTEXT / sum(w.numel() for w in initial.values())
stage_loss = math.log(trained.metrics["perplexity"])
display(
    Markdown(
        f"After 5 steps the loss is {held[5]:.2f} nats, a table of word frequencies has {unigram:.2f}: the model first learns which tokens are common, and nothing about order. After 20 steps ({held[20]:.2f}) it knows pairs, and at the end it writes in the manner of Jane Austen and says nothing. "
        f"It saw {STEPS * BATCH * CONTEXT:,} tokens, {per_weight:.1f} per weight, where twenty are usual. Our loop ends at {mean_loss(weights):.2f} nats, the stage at {stage_loss:.2f}: the same mathematics, packed rows, and tuned defaults."
    )
)

# %% [markdown]
# ## In llmworks
#
# `make pretrain` builds a corpus and a tokenizer, and trains a decoder of 3 million weights beside six older architectures:
#
# ```
# llmworks run recipes/pretrain.yaml
# llmworks train pretrain --model untrained --data packed --eval_data packed-test --set batch_size=16 --out trained
# ```
#
# ## Go on
#
# - A. Radford and others, *Language models are unsupervised multitask learners* (2019)
# - J. Hoffmann and others, *Training compute-optimal large language models*, arXiv:2203.15556
# - Next: [S10 Chat templates](S10_chat_templates.ipynb)
