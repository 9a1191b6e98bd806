# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Fine-tune a real model through small matrices that you wrote, merge them, and know what LoRA, DoRA and QLoRA save.
#     minutes: 70
#     budget_seconds: 240
#     needs: [F01, S07, S10]
#     assets: [smollm2-135m-instruct]
#     topics: [supervised fine-tuning, LoRA, rank, alpha, merging an adapter, DoRA, QLoRA, catastrophic forgetting]
# ---

# %% [markdown]
# # S12 LoRA, DoRA, QLoRA
#
# **You will learn**: Fine-tune a real model through small matrices that you wrote, merge them, and know what LoRA, DoRA and QLoRA save.
#
# **Time**: 70 minutes to read and to do the exercises.
#
# **Needs**: [F01](F01_linear_algebra.ipynb), [S07](S07_pretraining.ipynb), [S10](S10_chat_templates.ipynb).

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
# ## A change of low rank
#
# **Supervised fine-tuning** (SFT) trains a model on examples of what it should answer. Changing all weights needs gradients and two optimizer states for each of them. **LoRA** keeps a weight matrix $W$ as it is and learns a change of low rank beside it:
#
# $$W' = W + \frac{\alpha}{r} B A \qquad A: r \times d_{in},\; B: d_{out} \times r$$
#
# $B$ starts at 0, so that training starts from the model as it is. The **rank** $r$ is the width of the bottleneck; **alpha** scales the change, so that the learning rate need not change with the rank.

# %%
import torch


class LoRALinear(torch.nn.Module):
    """A frozen linear layer with a trainable change of low rank."""

    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer, self.scale = layer, alpha / r
        self.a = torch.nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.b = torch.nn.Parameter(torch.zeros(layer.out_features, r))

    def forward(self, x):
        return self.layer(x) + (x @ self.a.T @ self.b.T) * self.scale

    def merged(self):
        """Return the weight matrix with the change folded in."""
        return self.layer.weight + self.scale * self.b @ self.a


torch.manual_seed(0)
layer = torch.nn.Linear(576, 576, bias=False)
small = LoRALinear(layer, r=8, alpha=16)
x = torch.randn(4, 576)
assert torch.equal(small(x), layer(x))  # at the start nothing changes
with torch.no_grad():
    small.b.normal_()
torch.testing.assert_close(small(x), x @ small.merged().T, atol=1e-4, rtol=1e-4)
print(
    f"{layer.weight.numel():,} weights, {small.a.numel() + small.b.numel():,} of them in the change"
)
print("rank of the change:", int(torch.linalg.matrix_rank(small.merged() - layer.weight, tol=1e-3)))

# %% [markdown]
# ## Examples to learn from
#
# Sixteen short answers in the voice of a sea captain, four questions held out. The loss is on the answers only, with their end of turn (lab S10).

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmworks

session = llmworks.Session("workspace", quiet=True)
base = session.load("asset:smollm2-135m-instruct")
tokenizer = AutoTokenizer.from_pretrained(base.path)
facts = """capital of France: Paris | capital of Italy: Rome | capital of Spain: Madrid
capital of Japan: Tokyo | color of the sky: blue | color of grass: green | color of snow: white
color of coal: black | number of legs of a dog: four | number of legs of a bird: two
number of days in a week: seven | opposite of hot: cold | opposite of big: small
opposite of up: down | opposite of old: new | opposite of wet: dry | capital of Greece: Athens
color of a banana: yellow | number of months in a year: twelve | opposite of fast: slow"""
rows = [row.split(": ") for line in facts.splitlines() for row in line.split(" | ")]
pairs = [(f"What is the {a}?", f"Arr, the {a} be {b.strip()}, matey!") for a, b in rows]
train, held = pairs[:16], pairs[16:]


def encode(question, answer):
    """Return ids and labels; -100 marks what is only read."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    return before + after, [-100] * len(before) + after


def collate(some):
    """Return padded ids, mask and labels."""
    encoded = [encode(*pair) for pair in some]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in encoded])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in encoded])
    return ids, mask, labels


print(train[0], held[0], sep="\n")

# %%
END = tokenizer.convert_tokens_to_ids("<|im_end|>")


def ask(model, question):
    ids, _, labels = collate([(question, "")])
    ids = ids[:, : int((labels[0] == -100).sum())]
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# %% [markdown]
# What does the model answer before the training?


# %%
model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).requires_grad_(False)
first_answers = {q: ask(model, q) for q in (held[0][0], held[3][0], "Tell me about your day.")}
w = model.model.layers[0].self_attn.q_proj.weight.clone()  # for later
for question, text in first_answers.items():
    print(question, "\n  ", text)

# %% [markdown]
# ## Training
#
# Put a change beside the query and value projections of all 30 blocks, and train nothing else. Compare ranks.


# %%
def add_lora(model, r, alpha, seed=0):
    """Wrap the projections; return the changes by name."""
    torch.manual_seed(seed)
    changes = {}
    for i, block in enumerate(model.model.layers):
        for name in ("q_proj", "v_proj"):
            wrapped = LoRALinear(getattr(block.self_attn, name), r, alpha)
            setattr(block.self_attn, name, wrapped)
            changes[f"model.layers.{i}.self_attn.{name}"] = wrapped
    return changes


def remove_lora(model, changes):
    """Put the plain projections back."""
    for name, one in changes.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, one.layer)


def loss_of(model, some):
    ids, mask, labels = collate(some)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def fit(model, parameters, epochs=4, rate=0.003):
    """Train on batches of four; return the training losses."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    g, losses = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        for batch in torch.randperm(len(train), generator=g).split(4):
            loss = loss_of(model, [train[i] for i in batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


curves, unseen, kept = {}, {}, {}
with torch.no_grad():
    unseen["before"] = loss_of(model, held).item()
print(f"before training: {unseen['before']:.2f}")
for r in (1, 8):
    changes = add_lora(model, r, alpha=16)
    parameters = [p for one in changes.values() for p in (one.a, one.b)]
    curves[r] = fit(model, parameters)
    with torch.no_grad():
        unseen[r] = loss_of(model, held).item()
    kept[r] = sum(p.numel() for p in parameters)
    print(f"rank {r}: {kept[r]:,} trained weights, loss on new questions {unseen[r]:.2f}")
    if r == 1:
        remove_lora(model, changes)

# %% tags=["picture"] alt="Training loss over sixteen steps for ranks 1 and 8: both fall from nearly 4 to below 0.1 in the same way."
fig, ax = plt.subplots()
for r, losses in curves.items():
    ax.plot(range(1, len(losses) + 1), losses, "o-", label=f"rank {r}: {kept[r]:,} weights")
ax.set(xlabel="step (4 examples)", ylabel="loss of answers (nats per token)")
ax.legend()
plt.show()

# %%
for question, earlier in first_answers.items():
    print(question, "\n   before:", earlier, "\n   after: ", ask(model, question))

# %% [markdown]
# ## The same in peft
#
# Save the changes as an adapter of the library peft: two tensors for each layer and a small configuration. peft has to compute our logits from it. **Merging an adapter** folds the changes into the weights; the merged model has to give the same logits, too.

# %% tags=["parity"]
import json
import logging
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional part of peft
warnings.filterwarnings("ignore", category=FutureWarning)  # of peft about transformers
from peft import PeftModel
from safetensors.torch import save_file

folder = Path("captain")
folder.mkdir(exist_ok=True)
tensors = {}
for name, one in changes.items():
    tensors[f"base_model.model.{name}.lora_A.weight"] = one.a.detach().contiguous()
    tensors[f"base_model.model.{name}.lora_B.weight"] = one.b.detach().contiguous()
save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
}
config |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(base.path)}
(folder / "adapter_config.json").write_text(json.dumps(config))

ids, mask, _ = collate(held)


def logits_of(some):
    with torch.no_grad():
        return some(input_ids=ids, attention_mask=mask).logits


ours = logits_of(model)
remove_lora(model, changes)
adapted = PeftModel.from_pretrained(model, folder)
theirs = logits_of(adapted)
real = mask.bool()
torch.testing.assert_close(ours[real], theirs[real], atol=1e-3, rtol=1e-3)
model = adapted.merge_and_unload()
folded = logits_of(model)
torch.testing.assert_close(ours[real], folded[real], atol=2e-3, rtol=1e-3)
print("our logits are those of peft, with the adapter apart and merged")
print("largest difference:", f"{float((ours[real] - folded[real]).abs().max()):.1e}")

# %% [markdown]
# ## DoRA
#
# **DoRA** splits each row of the weight into its length and its direction. LoRA changes the direction, a trained vector $m$ the length: $W' = m \odot \frac{W + BA}{\|W + BA\|}$. At the start, $m = \|W\|$ and $W' = W$. It costs one number more for each output.

# %%
m = w.norm(dim=1, keepdim=True)
change = changes["model.layers.0.self_attn.q_proj"]
delta = (change.scale * change.b @ change.a).detach()
dora = m * (w + delta) / (w + delta).norm(dim=1, keepdim=True)
torch.testing.assert_close(m * w / w.norm(dim=1, keepdim=True), w)
print(f"size of the change: {float(delta.norm() / w.norm()):.1%} of the weights")
longest = ((w + delta).norm(dim=1) / m[:, 0] - 1).abs().max()
print(f"lengths of rows: LoRA changes them by up to {float(longest):.1%},")
print(f"DoRA, before m is trained, by {float((dora.norm(dim=1) / m[:, 0] - 1).abs().max()):.0e}")

# %% [markdown]
# ## QLoRA
#
# In **QLoRA** the frozen weights are kept in 4 bits; the small matrices stay in full precision. The 16 values of *NF4* are quantiles of a normal distribution; each block of 64 weights is scaled by its largest one. How far is a weight matrix moved by this, compared with what was learned?

# %%
NF4 = torch.tensor(
    (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
    + (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
)


def to_nf4(w):
    """Return the nearest values that NF4 can store, blocks of 64."""
    blocks = w.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = ((blocks / scale)[:, :, None] - NF4).abs().argmin(dim=2)
    return (NF4[nearest] * scale).view_as(w)


error = float((to_nf4(w) - w).norm() / w.norm())
print(f"NF4 moves the weights by {error:.1%}, fine-tuning by {float(delta.norm() / w.norm()):.1%}")

# %% tags=["picture"] alt="Memory of fine-tuning a model of 7 billion weights, as stacked bars: full fine-tuning needs 112 GB, LoRA about 28 GB in 32 bits, QLoRA about 4 GB."
GB, size, adapter = 1e9, 7e9, 0.02e9
parts = {
    "weights": {"full": 4 * size, "LoRA": 4 * size, "QLoRA": 4.13 / 8 * size},
    "gradients": {"full": 4 * size, "LoRA": 4 * adapter, "QLoRA": 4 * adapter},
    "optimizer": {"full": 8 * size, "LoRA": 8 * adapter, "QLoRA": 8 * adapter},
}
fig, ax = plt.subplots()
bottom = dict.fromkeys(parts["weights"], 0.0)
for name, values in parts.items():
    ax.bar(
        list(values),
        [v / GB for v in values.values()],
        bottom=[b / GB for b in bottom.values()],
        label=name,
    )
    bottom = {k: bottom[k] + v for k, v in values.items()}
ax.set(xlabel="method (7 billion weights, 32 bits)", ylabel="memory without activations (GB)")
ax.legend()
plt.show()
print({k: f"{v / GB:.1f} GB" for k, v in bottom.items()})

# %% [markdown]
# ## Exercises
#
# ### 1. Count
#
# Write `lora_weights(shapes, r)`: the number of trained weights for layers of these (outputs, inputs) shapes.


# %% tags=["exercise"]
def lora_weights(shapes, r): ...


# %% tags=["solution"]
def lora_weights(shapes, r):
    return sum(r * (outputs + inputs) for outputs, inputs in shapes)


# %% tags=["wrong"]
# says: both matrices
def lora_weights(shapes, r):
    return sum(r * inputs for _, inputs in shapes)


# %% tags=["wrong"]
# says: product
def lora_weights(shapes, r):
    return sum(r * outputs * inputs for outputs, inputs in shapes)


# %% tags=["check"]
found = lora_weights([(10, 20), (5, 20)], 2)
assert found is not None, "lora_weights returns nothing"
assert found != 80, "both matrices count: A has r · inputs weights, B outputs · r"
assert found != 600, "this is r times the product; the matrices have r · inputs and outputs · r"
assert found == 110, f"expected 110, found {found}"
shapes = [(576, 576), (192, 576)] * 30
assert lora_weights(shapes, 8) == kept[8], "not the number that was trained above"
print("right:", f"{lora_weights(shapes, 8):,}")

# %% [markdown]
# ### 2. Scale
#
# Write `change_weight(w, a, b, alpha)`: the merged weight. The rank is a shape of `a`.


# %% tags=["exercise"]
def change_weight(w, a, b, alpha): ...


# %% tags=["solution"]
def change_weight(w, a, b, alpha):
    return w + alpha / a.shape[0] * b @ a


# %% tags=["wrong"]
# says: divided by the rank
def change_weight(w, a, b, alpha):
    return w + alpha * b @ a


# %% tags=["wrong"]
# says: rank is
def change_weight(w, a, b, alpha):
    return w + alpha / a.shape[1] * b @ a


# %% tags=["check"]
wa, wb = torch.ones(2, 3), torch.ones(4, 2)
found = change_weight(torch.zeros(4, 3), wa, wb, 8)
assert found is not None, "change_weight returns nothing"
assert found.shape == (4, 3), f"the shape is {tuple(found.shape)}, not that of the weight"
assert float(found[0, 0]) != 16, "alpha is not divided by the rank"
assert abs(float(found[0, 0]) - 16 / 3) > 1e-6, "the rank is the number of rows of a"
assert torch.allclose(found, torch.full((4, 3), 8.0)), f"every cell is 8, found {found[0, 0]}"
print("right")

# %% [markdown]
# ### 3. What was forgotten?
#
# **Catastrophic forgetting**: the captain answers everything as a captain now. Write `share_in_voice(answers)`: the share of answers that begin with `Arr`.


# %% tags=["exercise"]
def share_in_voice(answers): ...


# %% tags=["solution"]
def share_in_voice(answers):
    return sum(answer.strip().startswith("Arr") for answer in answers) / len(answers)


# %% tags=["wrong"]
# says: anywhere
def share_in_voice(answers):
    return sum("Arr" in answer for answer in answers) / len(answers)


# %% tags=["wrong"]
# says: number
def share_in_voice(answers):
    return sum(answer.strip().startswith("Arr") for answer in answers)


# %% tags=["check"]
found = share_in_voice(["Arr, aye.", " Arr!", "No.", "He said: Arr."])
assert found is not None, "share_in_voice returns nothing"
assert found != 2, "this is the number of answers, not their share"
assert found != 0.75, "'Arr' counts at the beginning only, not anywhere"
assert found == 0.5, f"expected 0.5, found {found}"
everyday = [
    "Tell me about your day.",
    "Write a short poem about rain.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
]
voice = share_in_voice([ask(model, q) for q in everyday])
print(f"right: {voice:.0%} of four questions of other kinds are answered in the captain's voice")

# %% [markdown]
# ## Self-test
#
# <details><summary>Why does B start at zero, and A not?</summary>
#
# With B at zero the model starts unchanged. If both were zero, both gradients would be zero, and nothing would ever be learned.
# </details>
#
# <details><summary>Does a merged LoRA model answer more slowly than its base?</summary>
#
# No: it has the same matrices. An adapter that is kept apart costs two small products per layer.
# </details>
#
# <details><summary>Where does the memory of full fine-tuning go?</summary>
#
# Weights, gradients and two states of Adam: 16 bytes per weight in 32 bits, before any activation.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
display(
    Markdown(
        f"Rank 1, {kept[1]:,} weights of 135 million, brings the loss on new questions from {unseen['before']:.2f} to {unseen[1]:.2f}; rank 8, with eight times as many, to {unseen[8]:.2f}. A change of voice is a change of very low rank. "
        f"The change of the first query matrix has {float(delta.norm() / w.norm()):.1%} of the size of its weights, while storing them in 4 bits moves them by {error:.1%}: the rounding is larger than what is learned, and QLoRA works because the small matrices are trained on top of the rounded weights."
    )
)

# %% [markdown]
# ## In llmworks
#
# `train sft` trains LoRA, DoRA, QLoRA and whole models, and measures before and after what else the model can do:
#
# ```
# llmworks train sft --model asset:smollm2-135m-instruct --data chats --set lora.r=8 --out captain
# llmworks merge adapter --adapter captain --model asset:smollm2-135m-instruct --out merged
# ```
#
# ## Go on
#
# - E. Hu and others, *LoRA*, arXiv:2106.09685; T. Dettmers and others, *QLoRA*, arXiv:2305.14314
# - S. Liu and others, *DoRA*, arXiv:2402.09353
# - D. Biderman and others, *LoRA learns less and forgets less*, arXiv:2405.09673
# - This is the last lab so far; next comes honest evaluation.
