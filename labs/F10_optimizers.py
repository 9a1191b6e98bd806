# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Write SGD, momentum, RMSprop, Adam, AdamW and Muon in a few lines each, and see when each one helps.
#     minutes: 60
#     budget_seconds: 120
#     needs: [F02, F09]
#     assets: [austen]
#     topics: [gradient descent, SGD, momentum, RMSprop, Adam, weight decay, Muon, warm-up]
# ---

# %% [markdown]
# # F10 Optimizers: from SGD to Muon
#
# **You will learn**: Write SGD, momentum, RMSprop, Adam, AdamW and Muon in a few lines each, and see when each one helps.
#
# **Time**: one hour to read and to do the exercises.
#
# **Needs**: [F02](F02_calculus.ipynb), [F09](F09_backpropagation.ipynb).

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
# ## A common face
#
# An optimizer turns gradients into steps. Each one below is a function that makes a fresh state and returns `step(weights, gradients)`, which changes the weights in place. **Gradient descent** takes $w \leftarrow w - \eta g$ with the gradient of all data; **SGD**,
# *stochastic* gradient descent, with the gradient of a random batch: noisy, but thousands of times cheaper.
#
# **Momentum** adds up past gradients, $v \leftarrow \mu v + g$, $w \leftarrow w - \eta v$: zigzags cancel, steady directions build up speed.

# %%
import torch


def sgd(rate, momentum=0.0):
    state = {}

    def step(weights, gradients):
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            v = state[i] = momentum * state[i] + g if i in state else g.clone()
            w -= rate * v

    return step


# %% [markdown]
# ## Adaptive steps
#
# **RMSprop** divides each weight's gradient by the root of its running mean square: rare, small gradients get large steps. **Adam** does this with momentum, and corrects both averages for their start at zero:
#
# $$m \leftarrow \beta_1 m + (1-\beta_1) g \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \qquad w \leftarrow w - \eta \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}$$
#
# **Weight decay** pulls weights towards 0. In Adam a penalty in the loss would be divided by $\sqrt v$, too; *AdamW* subtracts $\eta \lambda w$ beside the step.


# %%
def rmsprop(rate, alpha=0.99, eps=1e-8):
    square = {}

    def step(weights, gradients):
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            v = square[i] = alpha * square.get(i, torch.zeros_like(g)) + (1 - alpha) * g * g
            w -= rate * g / (v.sqrt() + eps)

    return step


def adamw(rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    mean, square, t = {}, {}, 0

    def step(weights, gradients):
        nonlocal t
        t += 1
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m = mean[i] = betas[0] * mean.get(i, torch.zeros_like(g)) + (1 - betas[0]) * g
            v = square[i] = betas[1] * square.get(i, torch.zeros_like(g)) + (1 - betas[1]) * g * g
            w *= 1 - rate * weight_decay
            w -= rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return step


# %% [markdown]
# ## Muon
#
# **Muon** looks at a weight matrix as a matrix. It takes the momentum $M = U \Sigma V^\top$ and steps along $U V^\top$: all singular values become 1, so that rare directions are learned as fast as common ones. Five *Newton-Schulz* iterations,
# $X \leftarrow aX + (bA + cA^2)X$ with $A = XX^\top$, approximate $UV^\top$ by matrix products alone. Tall matrices get larger steps, and the gradient looks one step ahead (*Nesterov*), as in the original. Vectors and embeddings keep AdamW.


# %%
def orthogonalize(g, steps=5):
    """Return a matrix with g's singular vectors, and singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    if x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def muon(rate, momentum=0.95, weight_decay=0.0):
    state = {}

    def step(weights, gradients):
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m = state[i] = momentum * state.get(i, torch.zeros_like(g)) + (1 - momentum) * g
            nesterov = (1 - momentum) * g + momentum * m
            w *= 1 - rate * weight_decay
            w -= rate * max(1, w.shape[0] / w.shape[1]) ** 0.5 * orthogonalize(nesterov)

    return step


torch.manual_seed(0)
g = torch.randn(64, 32) @ torch.diag(torch.logspace(0, -2, 32))
before, after = torch.linalg.svdvals(g), torch.linalg.svdvals(orthogonalize(g))
print(f"singular values before: {before.max():.2f} to {before.min():.3f}")
print(f"after five iterations:  {after.max():.2f} to {after.min():.2f}")

# %% [markdown]
# ## The same as PyTorch
#
# Thirty steps from the same weights with the same random gradients, for each optimizer. PyTorch's Muon computes in bfloat16, which has three digits.

# %% tags=["parity"]
pairs = {
    "SGD": (sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (sgd(0.1, 0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "RMSprop": (rmsprop(0.01), lambda p: torch.optim.RMSprop(p, lr=0.01)),
    "Adam": (adamw(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "AdamW": (
        adamw(0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
    "Muon": (muon(0.02), lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.0)),
}
for name, (step, make) in pairs.items():
    torch.manual_seed(1)
    ours = [torch.randn(16, 8)]
    theirs = [ours[0].clone().requires_grad_()]
    optimizer = make(theirs)
    for _ in range(30):
        g = torch.randn(16, 8)
        step(ours, [g])
        theirs[0].grad = g.clone()
        optimizer.step()
    difference = float((ours[0] - theirs[0]).detach().abs().max())
    assert difference < (0.03 if name == "Muon" else 1e-5), (name, difference)
    print(f"{name:<9} largest difference after 30 steps {difference:.1e}")

# %% [markdown]
# ## A language model to train
#
# Predict the next letter of Jane Austen from the eight before it: embeddings, two hidden layers, 27 classes. All optimizers see the same batches in the same order.

# %%
import re

import pandas

import llmworks

session = llmworks.Session("workspace", quiet=True)
dataset = session.make("data.read", kind=llmworks.Dataset, data="asset:austen")
novels = pandas.read_parquet(next(dataset.path.glob("*.parquet")))["text"]
text = re.sub(r"[^a-z]+", " ", " ".join(novels).lower())
codes = torch.tensor([" abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text])
held = int(0.9 * len(codes))


def make_weights(width=128, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(rows, columns):
        return torch.randn(rows, columns, generator=g) / rows**0.5

    return [
        torch.randn(27, 16, generator=g) * 0.5,
        normal(128, width),
        torch.zeros(width),
        normal(width, width),
        torch.zeros(width),
        normal(width, 27),
    ]


def loss_of(weights, places):
    embedding, w1, b1, w2, b2, out = weights
    contexts = codes[places[:, None] + torch.arange(8)]
    h = torch.relu(embedding[contexts].flatten(1) @ w1 + b1)
    h = torch.relu(h @ w2 + b2)
    return torch.nn.functional.cross_entropy(h @ out, codes[places + 8])


def train(make_step, steps=400, batch=128, schedule=lambda t: 1.0, seed=0):
    """Return training losses and the loss on held-out text; `make_step(share)` returns a step."""
    weights = [w.requires_grad_() for w in make_weights(seed=seed)]
    g = torch.Generator().manual_seed(seed)
    losses = []
    for t in range(steps):
        loss = loss_of(weights, torch.randint(held - 9, (batch,), generator=g))
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            make_step(schedule(t))(weights, gradients)
        losses.append(loss.item())
    with torch.no_grad():
        return losses, loss_of(weights, torch.arange(held, len(codes) - 9, 11)).item()


def fixed(step):
    """Return a `make_step` for an optimizer with a constant learning rate."""
    return lambda share: step


print(f"{len(text):,} letters, {sum(w.numel() for w in make_weights()):,} weights")
print(f"loss before training: {train(fixed(sgd(0.0)), steps=1)[1]:.3f} nats per letter")


# %%
def muon_and_adamw(rate):
    """Return a step of Muon for the two hidden matrices and of AdamW for all else."""
    matrices, others = muon(rate), adamw(0.003)

    def step(weights, gradients):
        for one, chosen in ((matrices, (1, 3)), (others, (0, 2, 4, 5))):
            one([weights[i] for i in chosen], [gradients[i] for i in chosen])

    return step


candidates = {
    "SGD": (sgd, (0.3, 1.0, 3.0)),
    "momentum": (lambda rate: sgd(rate, 0.9), (0.03, 0.1, 0.3)),
    "RMSprop": (rmsprop, (0.001, 0.003, 0.01)),
    "Adam": (adamw, (0.001, 0.003, 0.01)),
    "Muon": (muon_and_adamw, (0.01, 0.02, 0.05)),
}
runs = {}
for name, (make, rates) in candidates.items():
    tried = {rate: train(fixed(make(rate))) for rate in rates}
    rate = min(tried, key=lambda r: tried[r][1])
    runs[name] = (rate, *tried[rate])
    print(f"{name:<9} best rate {rate:<6} held-out loss {runs[name][2]:.3f}")

# %% tags=["picture"] alt="Smoothed training loss over 400 steps for five optimizers with their best learning rates: SGD and momentum fall slowest and lie together, RMSprop and Adam below them, Muon lowest at the end."
import numpy as np

fig, ax = plt.subplots()
for name, (rate, losses, _) in runs.items():
    smooth = np.convolve(losses, np.ones(25) / 25, mode="valid")
    ax.plot(np.arange(len(smooth)) + 12, smooth, label=f"{name}, {rate}")
ax.set(xlabel="step (128 contexts)", ylabel="loss (nats per letter)", ylim=(1.7, 2.9))
ax.legend()
plt.show()

# %% [markdown]
# ## Warm-up
#
# **Warm-up** raises the learning rate from 0 during the first steps. Adam's averages are estimated from few gradients then, and a full step along a noisy direction can ruin the initial weights. A *cosine* schedule lets the rate fall to 0 at the end.


# %%
def adam_with(schedule, rate, steps=400):
    """Return the held-out loss of Adam whose rate is scaled by a schedule."""
    current = {}
    mean, square = {}, {}

    def step(weights, gradients):
        current["t"] = current.get("t", 0) + 1
        t = current["t"]
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m = mean[i] = 0.9 * mean.get(i, torch.zeros_like(g)) + 0.1 * g
            v = square[i] = 0.999 * square.get(i, torch.zeros_like(g)) + 0.001 * g * g
            w -= rate * current["share"] * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    def make_step(share):
        current["share"] = share
        return step

    return train(make_step, steps, schedule=schedule)[1]


def constant(t):
    return 1.0


def warm_cosine(t, steps=400, warm=40):
    return (t + 1) / warm if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / (steps - warm)))


import math

rates = (0.003, 0.01, 0.03)
scheduled = {
    name: [adam_with(schedule, rate) for rate in rates]
    for name, schedule in (("constant", constant), ("warm-up and cosine", warm_cosine))
}
for name, values in scheduled.items():
    print(f"{name:<19}", dict(zip(rates, (round(v, 3) for v in values), strict=True)))

# %% [markdown]
# ## Exercises
#
# ### 1. Lion
#
# *Lion* steps by the sign alone: $u = \operatorname{sign}(\beta_1 m + (1 - \beta_1) g)$, $w \leftarrow w - \eta (u + \lambda w)$, and afterwards $m \leftarrow \beta_2 m + (1 - \beta_2) g$. Write `lion(rate, betas=(0.9, 0.99), weight_decay=0.0)` in the form of the optimizers above.


# %% tags=["exercise"]
def lion(rate, betas=(0.9, 0.99), weight_decay=0.0): ...


# %% tags=["solution"]
def lion(rate, betas=(0.9, 0.99), weight_decay=0.0):
    mean = {}

    def step(weights, gradients):
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m = mean.get(i, torch.zeros_like(g))
            update = torch.sign(betas[0] * m + (1 - betas[0]) * g)
            w -= rate * (update + weight_decay * w)
            mean[i] = betas[1] * m + (1 - betas[1]) * g

    return step


# %% tags=["wrong"]
# says: m changes after the step
def lion(rate, betas=(0.9, 0.99), weight_decay=0.0):
    mean = {}

    def step(weights, gradients):
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m = mean[i] = betas[1] * mean.get(i, torch.zeros_like(g)) + (1 - betas[1]) * g
            w -= rate * (torch.sign(m) + weight_decay * w)

    return step


# %% tags=["wrong"]
# says: size of the gradient
def lion(rate, betas=(0.9, 0.99), weight_decay=0.0):
    mean = {}

    def step(weights, gradients):
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m = mean.get(i, torch.zeros_like(g))
            w -= rate * (betas[0] * m + (1 - betas[0]) * g + weight_decay * w)
            mean[i] = betas[1] * m + (1 - betas[1]) * g

    return step


# %% tags=["wrong"]
# says: m changes after the step
def lion(rate, betas=(0.9, 0.99), weight_decay=0.0):
    mean = {}

    def step(weights, gradients):
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m = mean[i] = betas[1] * mean.get(i, torch.zeros_like(g)) + (1 - betas[1]) * g
            w -= rate * (torch.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * w)

    return step


# %% tags=["check"]
step = lion(0.1)
assert callable(step), "lion returns no function step(weights, gradients)"
w = [torch.tensor([[1.0, -1.0]])]
step(w, [torch.tensor([[100.0, -0.001]])])
moved = w[0] - torch.tensor([[1.0, -1.0]])
assert torch.allclose(moved.abs(), torch.tensor(0.1)), (
    "the step depends on the size of the gradient: take its sign"
)
tried, expected, m = lion(0.1), torch.zeros(1), torch.zeros(1)
mine = [torch.zeros(1)]
for g in (5.0, -0.43, -0.6, 0.3, -2.0, 1.0, 0.2):
    expected = expected - 0.1 * torch.sign(0.9 * m + 0.1 * g)
    m = 0.99 * m + 0.01 * g
    tried(mine, [torch.tensor([g])])
assert torch.allclose(mine[0], expected), (
    "other steps than Lion's: m changes after the step, from g, by beta 2"
)
decayed = [torch.tensor([[2.0]])]
lion(0.1, weight_decay=0.5)(decayed, [torch.tensor([[1.0]])])
assert torch.allclose(decayed[0], torch.tensor([[1.8]])), (
    "weight decay is wrong: subtract rate · decay · w"
)
print("right; held-out loss of Lion:", round(train(fixed(lion(0.001)))[1], 3))

# %% [markdown]
# ### 2. Clip gradients
#
# Write `clip(gradients, max_norm)`: scale all gradients, in place and by one factor, so that the norm of all of them together is at most `max_norm`; return the norm before.


# %% tags=["exercise"]
def clip(gradients, max_norm): ...


# %% tags=["solution"]
def clip(gradients, max_norm):
    norm = torch.sqrt(sum(g.pow(2).sum() for g in gradients))
    for g in gradients:
        g *= min(1.0, float(max_norm / norm))
    return float(norm)


# %% tags=["wrong"]
# says: together
def clip(gradients, max_norm):
    for g in gradients:
        g *= min(1.0, float(max_norm / g.norm()))
    return float(torch.sqrt(sum(g.pow(2).sum() for g in gradients)))


# %% tags=["wrong"]
# says: small gradients
def clip(gradients, max_norm):
    norm = torch.sqrt(sum(g.pow(2).sum() for g in gradients))
    for g in gradients:
        g *= float(max_norm / norm)
    return float(norm)


# %% tags=["check"]
mine = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, 4.0]])]
norm = clip(mine, 1.0)
assert norm is not None, "clip returns nothing; it returns the norm before"
assert not torch.allclose(mine[0], torch.tensor([1.0, 0.0])), (
    "each gradient was clipped by itself, not together"
)
assert torch.allclose(mine[0], torch.tensor([0.6, 0.0])), f"expected [0.6, 0], found {mine[0]}"
assert abs(norm - 5) < 1e-6, f"the norm before is 5, returned {norm}"
small = [torch.tensor([0.1])]
clip(small, 1.0)
assert torch.allclose(small[0], torch.tensor([0.1])), "small gradients must not be scaled up"
print("right")

# %% [markdown]
# ## Self-test
#
# <details><summary>How many numbers per weight does Adam keep beside the weight and its gradient?</summary>
#
# Two: the mean and the mean square. For a model of 7 billion weights in 32 bits that is 56 GB.
# </details>
#
# <details><summary>All gradients of a weight are 1,000 times as large. What does Adam do?</summary>
#
# The same steps as before: numerator and denominator grow alike.
# </details>
#
# <details><summary>Why does Muon not treat embeddings as matrices?</summary>
#
# Each row belongs to one token, and most rows have no gradient in a batch. Making all directions equal would move rows that were not seen.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
order = sorted(runs, key=lambda name: runs[name][2])
gap = runs["SGD"][2] - runs[order[0]][2]
worst = max(scheduled["constant"]) - min(scheduled["constant"])
better = max(scheduled["warm-up and cosine"]) - min(scheduled["warm-up and cosine"])
display(
    Markdown(
        f"The best optimizer here is {order[0]} ({runs[order[0]][2]:.3f} nats), the last one {order[-1]} ({runs[order[-1]][2]:.3f}), but each had its own best learning rate, from {min(r[0] for r in runs.values())} to {max(r[0] for r in runs.values())}. "
        "A comparison with one common rate says nothing.\n\n"
        f"The best optimizer gains {gap:.3f} nats over SGD, warm-up with a cosine gains {min(scheduled['constant']) - min(scheduled['warm-up and cosine']):.3f} for Adam. The schedule also forgives a wrong rate: over three rates the loss varies by {better:.3f} in place of {worst:.3f}. With the smallest rate it costs: the cosine ends before the training is done."
    )
)

# %% [markdown]
# ## In llmworks
#
# The trainings take `optimizer.name` (adamw, lion, muon, adamw_8bit) and a schedule; `train compare` draws runs at equal tokens and equal time:
#
# ```
# llmworks stages train.pretrain
# llmworks train compare --models adamw=run-1 muon=run-2 --out comparison
# ```
#
# ## Go on
#
# - D. Kingma and J. Ba, *Adam*, arXiv:1412.6980; I. Loshchilov and F. Hutter, *AdamW*, arXiv:1711.05101
# - J. Liu and others, *Muon is scalable for LLM training*, arXiv:2502.16982
# - Next: [F11 Overfitting](F11_overfitting.ipynb)
