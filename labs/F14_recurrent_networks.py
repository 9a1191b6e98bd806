# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Write RNN, LSTM and GRU cells, see how far back their gradients reach, and train them on letters.
#     minutes: 70
#     budget_seconds: 150
#     needs: [F09, F10, F03]
#     assets: [austen]
#     topics: [RNN, LSTM, GRU, vanishing gradients, gates]
# ---

# %% [markdown]
# # F14 Recurrent networks: RNN, LSTM, GRU
#
# **You will learn**: Write RNN, LSTM and GRU cells, see how far back their gradients reach, and train them on letters.
#
# **Time**: 70 minutes to read and to do the exercises.
#
# **Needs**: [F03](F03_probability.ipynb), [F09](F09_backpropagation.ipynb), [F10](F10_optimizers.ipynb).

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
# ## A network with a memory
#
# An **RNN** reads a sequence one element at a time, and carries a *hidden state* along: $h_t = \tanh(W x_t + U h_{t-1} + b)$. The same weights are used at every step, so a sequence may have any length. The state is all that the network knows of the past.

# %%
import math

import torch


def rnn_step(x, h, w, u, b, b_hidden):
    """Return the next state; x: (batch, inputs), h: (batch, size), w: (size, inputs), u: (size, size)."""
    return torch.tanh(x @ w.T + b + h @ u.T + b_hidden)


# %% [markdown]
# ## Gates
#
# **Gates** are numbers between 0 and 1, computed from input and state, that multiply what passes. With $\sigma$ of weighted sums of input and state as gates, an **LSTM** has a second state, the *cell* $c$, which changes by addition only: the forget gate $f$ decides what stays, the input gate $i$ what is added, the output gate $o$ what is
# shown.
#
# $$c_t = f \odot c_{t-1} + i \odot \tanh(g) \qquad h_t = o \odot \tanh(c_t)$$
#
# A **GRU** has one state and two gates. The update gate $z$ mixes old and new, the reset gate $r$ hides a part of the old state from the new one: $h_t = (1 - z) \odot n + z \odot h_{t-1}$.


# %%
def lstm_step(x, state, w, u, b, b_hidden):
    """Return the next (h, c); the weights hold input, forget, cell and output gates one below another."""
    h, c = state
    i, f, g, o = (x @ w.T + b + h @ u.T + b_hidden).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(x, h, w, u, b, b_hidden):
    """Return the next state; the weights hold reset, update and new state one below another."""
    from_x, from_h = x @ w.T + b, h @ u.T + b_hidden
    r_x, z_x, n_x = from_x.chunk(3, dim=1)
    r_h, z_h, n_h = from_h.chunk(3, dim=1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h


def unroll(step, x, state, weights):
    """Return the states of all steps; x: (batch, length, inputs)."""
    outputs = []
    for t in range(x.shape[1]):
        state = step(x[:, t], state, *weights)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, dim=1)


# %% tags=["parity"]
torch.manual_seed(0)
x, zero = torch.randn(3, 12, 5), torch.zeros(3, 7)
for library, step, state in (
    (torch.nn.RNN(5, 7, batch_first=True), rnn_step, zero),
    (torch.nn.LSTM(5, 7, batch_first=True), lstm_step, (zero, zero)),
    (torch.nn.GRU(5, 7, batch_first=True), gru_step, zero),
):
    weights = (library.weight_ih_l0, library.weight_hh_l0, library.bias_ih_l0, library.bias_hh_l0)
    torch.testing.assert_close(unroll(step, x, state, weights), library(x)[0])
    number = sum(p.numel() for p in library.parameters())
    print(f"{type(library).__name__:<5} equals torch.nn.{type(library).__name__}, {number} weights")

# %% [markdown]
# ## Vanishing gradients
#
# The gradient of the last state with respect to an early input is a product of one factor for each step between: $\prod_t U^\top \operatorname{diag}(1 - h_t^2)$. When the factors are smaller than 1, it vanishes exponentially; when they are larger, it explodes. **Vanishing gradients** mean that the network
# cannot learn that something long ago mattered. Through the cell of an LSTM the factor is the forget gate alone: near 1, the gradient passes.


# %%
def gradient_by_distance(library, length=60, repeats=20):
    """Return the norm of d(last state) / d(input) for inputs 0, 1, 2 ... steps before the last one."""
    norms = torch.zeros(length)
    for _ in range(repeats):
        x = torch.randn(1, length, 16, requires_grad=True)
        library(x)[0][0, -1].pow(2).sum().backward()
        norms += x.grad[0].norm(dim=1).flip(0) / repeats
    return norms


def make(kind, forget_bias=None, scale=1.0):
    torch.manual_seed(1)
    library = getattr(torch.nn, kind)(16, 64, batch_first=True)
    with torch.no_grad():
        library.weight_hh_l0 *= scale
        if forget_bias is not None:
            library.bias_ih_l0[64:128] = forget_bias
    return library


curves = {
    "RNN": gradient_by_distance(make("RNN")),
    "RNN, U times 3": gradient_by_distance(make("RNN", scale=3.0)),
    "GRU": gradient_by_distance(make("GRU")),
    "LSTM": gradient_by_distance(make("LSTM")),
    "LSTM, forget bias 3": gradient_by_distance(make("LSTM", forget_bias=3.0)),
}
for name, norms in curves.items():
    print(f"{name:<20} 50 steps back: {norms[50] / norms[0]:.0e} of the last step")

# %% tags=["picture"] alt="Gradient of the last state against the distance of the input on a logarithmic axis: RNN, GRU and LSTM with default weights fall steeply, the LSTM with a forget bias of 3 stays within two orders of magnitude, the RNN with large weights rises out of the picture."
fig, ax = plt.subplots()
for name, norms in curves.items():
    ax.semilogy(norms, label=name)
ax.set(
    xlabel="distance (steps before the last one)",
    ylabel="norm of the gradient (1 per input)",
    ylim=(1e-16, 10),
)
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## A task with a distance
#
# The first of $n$ symbols is the answer; the others are noise. What the network says at the end can be right only if the first symbol survived in its state.


# %%
class Reader(torch.nn.Module):
    """Read symbols, answer after the last one."""

    def __init__(self, kind, symbols=8, size=48, forget_bias=0.0):
        super().__init__()
        self.embed = torch.nn.Embedding(symbols, 16)
        self.cell = getattr(torch.nn, kind)(16, size, batch_first=True)
        self.out = torch.nn.Linear(size, symbols)
        if kind == "LSTM":
            with torch.no_grad():
                self.cell.bias_ih_l0[size : 2 * size] += forget_bias

    def forward(self, x):
        return self.out(self.cell(self.embed(x))[0])


def recall_accuracy(kind, distance, steps=250, **settings):
    """Return the accuracy on new sequences after training on this distance."""
    torch.manual_seed(0)
    model = Reader(kind, **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(steps):
        x = torch.randint(8, (64, distance))
        loss = torch.nn.functional.cross_entropy(model(x)[:, -1], x[:, 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    x = torch.randint(8, (1000, distance))
    with torch.no_grad():
        return float((model(x)[:, -1].argmax(1) == x[:, 0]).float().mean())


distances = (5, 10, 20, 40)
recalled = {
    "RNN": [recall_accuracy("RNN", d) for d in distances],
    "GRU": [recall_accuracy("GRU", d) for d in distances],
    "LSTM": [recall_accuracy("LSTM", d) for d in distances],
    "LSTM, forget bias 3": [recall_accuracy("LSTM", d, forget_bias=3.0) for d in distances],
}

# %% tags=["picture"] alt="Accuracy of recalling the first symbol against the length of the sequence: RNN, GRU and LSTM are near chance at 20 symbols, the LSTM with a forget bias of 3 stays at 1."
fig, ax = plt.subplots()
for name, values in recalled.items():
    ax.plot(distances, values, "o-", label=name)
ax.axhline(1 / 8, color="grey", linestyle="--", label="chance")
ax.set(xlabel="length (symbols)", ylabel="accuracy on new sequences (share)", ylim=(0, 1.05))
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Letters of a novelist
#
# The same cells predict the next letter of Jane Austen. The bigram model of lab F03 knows one letter; these carry a state through 64. Backpropagation through time is cut after 64 letters (*truncated*).

# %%
import re

import pandas

import llmworks

session = llmworks.Session("workspace", quiet=True)
dataset = session.make("data.read", kind=llmworks.Dataset, data="asset:austen")
novels = pandas.read_parquet(next(dataset.path.glob("*.parquet")))["text"]
text = re.sub(r"[^a-z]+", " ", " ".join(novels).lower())
letters = " abcdefghijklmnopqrstuvwxyz"
codes = torch.tensor([letters.index(letter) for letter in text])
cut = int(0.95 * len(codes))


def held_out_loss(model, rows=200):
    starts = torch.arange(cut, len(codes) - 65, (len(codes) - 65 - cut) // rows)[:rows]
    x = codes[starts[:, None] + torch.arange(65)]
    with torch.no_grad():
        logits = model(x[:, :-1])
    return torch.nn.functional.cross_entropy(logits[:, 16:].flatten(0, 1), x[:, 17:].flatten()).item()


def train_letters(kind, steps=250, size=96):
    torch.manual_seed(0)
    model = Reader(kind, symbols=27, size=size, forget_bias=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(steps):
        starts = torch.randint(cut - 65, (32,))
        x = codes[starts[:, None] + torch.arange(65)]
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


models = {kind: train_letters(kind) for kind in ("RNN", "GRU", "LSTM")}
letter_losses = {kind: held_out_loss(model) for kind, model in models.items()}
for kind, loss in letter_losses.items():
    number = sum(p.numel() for p in models[kind].parameters())
    print(f"{kind:<5} {number:,} weights, {loss / math.log(2):.3f} bits per letter")


# %%
def write(model, start, length, temperature=0.7, seed=0):
    """Return text, drawn letter by letter; only the state is carried on."""
    g = torch.Generator().manual_seed(seed)
    found, state = start, None
    x = torch.tensor([[letters.index(letter) for letter in start]])
    with torch.no_grad():
        for _ in range(length):
            h, state = model.cell(model.embed(x), state)
            p = torch.softmax(model.out(h[0, -1]) / temperature, dim=0)
            x = torch.multinomial(p, 1, generator=g)[None]
            found += letters[int(x)]
    return found


for kind, model in models.items():
    print(f"{kind:<5}", write(model, "she was ", 90))

# %% [markdown]
# ## Exercises
#
# ### 1. A gate by hand
#
# Write `leaky_average(x, keep)`: the simplest memory with a gate. $h_t = \text{keep} \cdot h_{t-1} + (1 - \text{keep}) \cdot x_t$ for a list of numbers, starting from $h = 0$; return a list of the states after each input.


# %% tags=["exercise"]
def leaky_average(x, keep): ...


# %% tags=["solution"]
def leaky_average(x, keep):
    states, h = [], 0.0
    for value in x:
        h = keep * h + (1 - keep) * value
        states.append(h)
    return states


# %% tags=["wrong"]
# says: 1 - keep
def leaky_average(x, keep):
    states, h = [], 0.0
    for value in x:
        h = keep * h + value
        states.append(h)
    return states


# %% tags=["wrong"]
# says: all states
def leaky_average(x, keep):
    h = 0.0
    for value in x:
        h = keep * h + (1 - keep) * value
    return h


# %% tags=["wrong"]
# says: the gate is reversed
def leaky_average(x, keep):
    states, h = [], 0.0
    for value in x:
        h = (1 - keep) * h + keep * value
        states.append(h)
    return states


# %% tags=["check"]
found = leaky_average([1.0, 0.0, 0.0], 0.9)
assert found is not None, "leaky_average returns nothing"
assert hasattr(found, "__len__"), "only the last state is returned; return all states"
assert abs(found[0] - 1.0) > 1e-9, "the input counts fully: multiply it by 1 - keep"
assert abs(found[0] - 0.9) > 1e-9, "the gate is reversed: keep belongs to the old state"
assert len(found) == 3, f"3 inputs give 3 states, found {len(found)}: leave out the initial 0"
wanted = torch.tensor([0.1, 0.09, 0.081])
assert torch.allclose(torch.tensor([float(h) for h in found]), wanted), (
    f"expected 0.1, 0.09, 0.081, found {found}"
)
print("right")

# %% [markdown]
# ### 2. Half-life
#
# With a constant forget gate $f$, a value in the cell is multiplied by $f$ in each step. Write `half_life(f)`: after how many steps is half of it left? (Not rounded.)


# %% tags=["exercise"]
def half_life(f): ...


# %% tags=["solution"]
def half_life(f):
    return math.log(0.5) / math.log(f)


# %% tags=["wrong"]
# says: linearly
def half_life(f):
    return 0.5 / (1 - f)


# %% tags=["wrong"]
# says: negative
def half_life(f):
    return math.log(0.5) * math.log(1 / f) ** -1


# %% tags=["check"]
found = half_life(0.5)
assert found is not None, "half_life returns nothing"
assert half_life(0.9) > 0, "the number of steps is negative: both logarithms have one sign"
assert abs(half_life(0.9) - 5) > 0.01, (
    "the value does not fall linearly: it is multiplied in each step"
)
assert abs(0.9 ** half_life(0.9) - 0.5) < 1e-9, "f to the power of the result is not a half"
bias = [half_life(float(torch.sigmoid(torch.tensor(b)))) for b in (0.0, 1.0, 3.0)]
print("right; half-life for forget biases of 0, 1 and 3:", [round(one, 1) for one in bias], "steps")

# %% [markdown]
# ### 3. Count weights
#
# Write `lstm_weights(inputs, size)`: the number of weights of `torch.nn.LSTM(inputs, size)`, with both of its bias vectors.


# %% tags=["exercise"]
def lstm_weights(inputs, size): ...


# %% tags=["solution"]
def lstm_weights(inputs, size):
    return 4 * size * (inputs + size + 2)


# %% tags=["wrong"]
# says: four
def lstm_weights(inputs, size):
    return size * (inputs + size + 2)


# %% tags=["wrong"]
# says: bias
def lstm_weights(inputs, size):
    return 4 * size * (inputs + size)


# %% tags=["check"]
found = lstm_weights(10, 20)
wanted = sum(p.numel() for p in torch.nn.LSTM(10, 20).parameters())
assert found is not None, "lstm_weights returns nothing"
assert found * 4 != wanted, "an LSTM has four such blocks: three gates and the cell's input"
assert found != wanted - 160, "two bias vectors for each block are missing"
assert found == wanted, f"expected {wanted}, found {found}"
print("right")

# %% [markdown]
# ## Self-test
#
# <details><summary>Why can an RNN not compute all states of a text at once?</summary>
#
# State t needs state t − 1. The steps have to be taken one after another.
# </details>
#
# <details><summary>What does clipping of gradients cure, vanishing or exploding?</summary>
#
# Exploding. A gradient that vanished stays so.
# </details>
#
# <details><summary>Why is the forget bias of an LSTM often set to 1 or more at the start?</summary>
#
# The gate is open then: the network begins with a long memory, and learns to forget.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
ratio = {name: float(norms[50] / norms[0]) for name, norms in curves.items()}
far = {name: values[-1] for name, values in recalled.items()}
winner = max(far, key=far.get)
bits = {kind: loss / math.log(2) for kind, loss in letter_losses.items()}
display(
    Markdown(
        f"We expected that gates alone cure vanishing gradients. With PyTorch's default weights the gradient 50 steps back is {ratio['RNN']:.0e} of that of the last step for the RNN, and {ratio['LSTM']:.0e} for the LSTM: the gates start half open, and each step takes about a half of what is left. "
        f"A forget bias of 3 makes it {ratio['LSTM, forget bias 3']:.0e}. On sequences of {distances[-1]} symbols, after the same short training, the answers are: "
        + ", ".join(f"{name} {value:.0%}" for name, value in far.items())
        + ". For the letters of a novel, the order is another one after the same 250 steps and with one seed each: "
        + ", ".join(f"{kind} {value:.2f}" for kind, value in bits.items())
        + " bits per letter."
    )
)

# %% [markdown]
# ## In llmworks
#
# `model recurrent` creates RNN, LSTM, GRU and fixed-window models of any size; `train pretrain` trains them on packed tokens, as it trains decoders:
#
# ```
# llmworks model recurrent --tokenizer tokenizer --set rnn_type=lstm --out lstm
# llmworks train pretrain --model lstm --data packed --out trained
# ```
#
# ## Go on
#
# - S. Hochreiter and J. Schmidhuber, *Long short-term memory* (1997)
# - K. Cho and others, *Learning phrase representations using RNN encoder-decoder*, arXiv:1406.1078
# - Next: [S02 Tokenizers](S02_tokenizers.ipynb). This is the last lab of the fundamentals.
