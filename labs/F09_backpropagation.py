# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Build automatic differentiation, neurons and a network from nothing, and train the same network in PyTorch.
#     minutes: 80
#     budget_seconds: 90
#     needs: [F02, F07]
#     topics: [neuron, weights, bias, activations, layers, back-propagation, MSE, cross-entropy, MLP in PyTorch]
# ---

# %% [markdown]
# # F09 A neuron, a layer, back-propagation
#
# **You will learn**: Build automatic differentiation, neurons and a network from nothing, and train the same network in PyTorch.
#
# **Time**: 80 minutes to read and to do the exercises.
#
# **Needs**: [F02](F02_calculus.ipynb), [F07](F07_classifiers.ipynb).

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
# ## A neuron
#
# A **neuron** computes $a = \phi(w \cdot x + b)$: a weighted sum of its inputs with the **weights** $w$, plus a **bias** $b$, through an *activation function* $\phi$. One neuron with a threshold draws a line; it can compute AND and OR. No line separates the
# cases of XOR: Minsky and Papert showed this in 1969. Two neurons before the last one bend the plane, and solve it.

# %%
import numpy as np


def neuron(x, w, b):
    """Return 1 where the weighted sum is positive, else 0."""
    return float(np.dot(w, x) + b > 0)


cases = [(0, 0), (0, 1), (1, 0), (1, 1)]
print("AND", [neuron(x, (1, 1), -1.5) for x in cases])
print("OR ", [neuron(x, (1, 1), -0.5) for x in cases])
hidden = [(neuron(x, (1, 1), -0.5), neuron(x, (-1, -1), 1.5)) for x in cases]  # OR, NAND
print("XOR", [neuron(h, (1, 1), -1.5) for h in hidden])

# %% [markdown]
# ## Activations
#
# **Activations** have to be nonlinear: without them, two layers are one matrix product, $W_2 (W_1 x) = (W_2 W_1) x$. The slope of the activation multiplies the gradient on its way back. The slope of the sigmoid is at most a quarter; that of
# ReLU is 1 wherever the neuron is active.

# %% tags=["picture"] alt="Sigmoid, tanh, ReLU and GELU on the left, their slopes on the right: the slope of the sigmoid is at most a quarter, that of tanh reaches 1 at 0, that of ReLU is 0 or 1, that of GELU rises slightly above 1."
import torch

z = torch.linspace(-4, 4, 401, requires_grad=True)
functions = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": torch.nn.functional.gelu,
}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
slopes = {}
for name, function in functions.items():
    value = function(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    slopes[name] = float(slope.max())
    left.plot(z.detach(), value.detach(), label=name)
    right.plot(z.detach(), slope, label=name)
left.set(xlabel="z (weighted sum)", ylabel="φ(z) (activation)", ylim=(-1.2, 3))
right.set(xlabel="z (weighted sum)", ylabel="φ′(z) (slope)")
left.legend()
plt.show()

# %% [markdown]
# ## Back-propagation
#
# **Back-propagation** is the chain rule on a graph. Each operation stores its inputs, and how a small change of its result comes from a small change of each input. From the loss backwards, every value receives $\partial L / \partial v$: the sum over its uses
# of (gradient of the use) × (local slope). This is the whole of automatic differentiation, for single numbers:


# %%
class Value:
    """A number that remembers how it was computed; after Karpathy's micrograd."""

    def __init__(self, data, inputs=(), slopes=()):
        self.data, self.grad = float(data), 0.0
        self.inputs, self.slopes = inputs, slopes  # d(self) / d(input), for each input

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def __pow__(self, n):
        return Value(self.data**n, (self,), (n * self.data ** (n - 1),))

    def tanh(self):
        t = np.tanh(self.data)
        return Value(t, (self,), (1 - t * t,))

    def __sub__(self, other):
        return self + other * -1.0

    __radd__, __rmul__ = __add__, __mul__

    def backward(self):
        """Fill in the gradient of everything that this value was computed from."""
        order, seen = [], set()

        def visit(value):
            if id(value) not in seen:
                seen.add(id(value))
                for one in value.inputs:
                    visit(one)
                order.append(value)

        visit(self)
        self.grad = 1.0
        for value in reversed(order):
            for one, slope in zip(value.inputs, value.slopes, strict=True):
                one.grad += value.grad * slope  # added: a value may be used more than once


a, b = Value(2.0), Value(-3.0)
c = (a * b + b**2).tanh() * a
c.backward()
print(f"c = {c.data:.6f}, dc/da = {a.grad:.6f}, dc/db = {b.grad:.6f}")

# %% tags=["parity"]
ta, tb = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -3.0))
tc = (ta * tb + tb**2).tanh() * ta
tc.backward()
np.testing.assert_allclose([c.data, a.grad, b.grad], [tc.item(), ta.grad.item(), tb.grad.item()])
print("our gradients are those of torch.autograd")

# %% [markdown]
# ## Layers
#
# **Layers** are many neurons with the same inputs. A network of layers is a *multi-layer perceptron* (MLP). The loss here is the *mean squared error*, **MSE**: $\frac1n \sum_i (\hat y_i - y_i)^2$. Train a network of 2 → 8 → 1 neurons on XOR-like data, with our own `Value`.


# %%
def make_layer(inputs, outputs, rng):
    """Return weights (outputs × inputs) and biases as Values."""
    scale = 1 / np.sqrt(inputs)
    weights = [[Value(rng.normal() * scale) for _ in range(inputs)] for _ in range(outputs)]
    return weights, [Value(0.0) for _ in range(outputs)]


def apply_layer(layer, x):
    return [
        sum((w * v for w, v in zip(row, x, strict=True)), b).tanh()
        for row, b in zip(*layer, strict=True)
    ]


rng = np.random.default_rng(0)
points = rng.uniform(-1, 1, size=(60, 2))
signs = np.sign(points[:, 0] * points[:, 1])
network = [make_layer(2, 8, rng), make_layer(8, 1, rng)]
parameters = [v for w, b in network for v in [*(x for row in w for x in row), *b]]
losses = []
for _ in range(150):
    outputs = [apply_layer(network[1], apply_layer(network[0], x))[0] for x in points.tolist()]
    loss = sum(((out - s) ** 2 for out, s in zip(outputs, signs.tolist(), strict=True)), Value(0)) * (
        1 / 60
    )
    for p in parameters:
        p.grad = 0.0
    loss.backward()
    for p in parameters:
        p.data -= 0.5 * p.grad
    losses.append(loss.data)
right = np.mean([np.sign(out.data) for out in outputs] == signs)
print(
    f"{len(parameters)} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}, right for {right:.0%}"
)

# %% [markdown]
# ## Whole matrices at once
#
# A graph with a node for each number is slow. Real networks have a node for each *matrix* operation. For a layer $Z = XW + b$ with the gradient $G = \partial L/\partial Z$ from above, the chain rule gives $\partial L/\partial W = X^\top G$, $\partial L/\partial b = \sum_i G_i$ and
# $\partial L/\partial X = G W^\top$. For classes, the last layer is a *softmax*, $p_c = e^{z_c} / \sum_k e^{z_k}$, and the loss is the **cross-entropy** $-\ln p_{\text{right class}}$. Together their gradient is simple: $\partial L/\partial z = p - \text{one-hot}$.

# %%
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

digits = load_digits()
x_train, x_test, y_train, y_test = train_test_split(digits.data / 16, digits.target, random_state=0)


def forward(x, w1, b1, w2, b2):
    """Return the hidden layer and the log-probabilities of the classes."""
    h = np.maximum(x @ w1 + b1, 0)
    z = h @ w2 + b2
    z = z - z.max(axis=1, keepdims=True)
    return h, z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def loss_and_gradients(x, y, w1, b1, w2, b2):
    """Return the mean cross-entropy and its gradients."""
    h, log_p = forward(x, w1, b1, w2, b2)
    rows = np.arange(len(x))
    g = np.exp(log_p)
    g[rows, y] -= 1
    g /= len(x)  # dL/dz
    gh = (g @ w2.T) * (h > 0)  # through ReLU
    return -log_p[rows, y].mean(), (x.T @ gh, gh.sum(0), h.T @ g, g.sum(0))


def initial(seed, hidden=32):
    rng = np.random.default_rng(seed)
    w1 = rng.normal(size=(64, hidden)) * np.sqrt(2 / 64)
    w2 = rng.normal(size=(hidden, 10)) * np.sqrt(2 / hidden)
    return [w1, np.zeros(hidden), w2, np.zeros(10)]


weights = initial(0)
history = []
for _ in range(300):
    loss, gradients = loss_and_gradients(x_train, y_train, *weights)
    weights = [w - 0.5 * g for w, g in zip(weights, gradients, strict=True)]
    history.append(loss)
accuracy = np.mean(forward(x_test, *weights)[1].argmax(1) == y_test)
print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, accuracy on new digits {accuracy:.1%}")

# %% [markdown]
# ## The same in PyTorch
#
# An **MLP in PyTorch** is five lines. With the same initial weights and the same steps, it has to give the same losses.

# %% tags=["parity"]
model = torch.nn.Sequential(
    torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
).double()
with torch.no_grad():
    for p, value in zip(model.parameters(), initial(0), strict=True):
        p.copy_(torch.from_numpy(value.T))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
inputs, classes = torch.from_numpy(x_train), torch.from_numpy(y_train)
torch_history = []
for _ in range(300):
    loss = torch.nn.functional.cross_entropy(model(inputs), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    torch_history.append(loss.item())
np.testing.assert_allclose(history, torch_history, rtol=1e-6)
print("300 losses equal those of PyTorch")

# %% tags=["picture"] alt="Loss of the network on digits over 300 steps, ours and PyTorch's, which lie on top of each other and fall from above 2 to below 0.1."
fig, ax = plt.subplots()
ax.semilogy(history, label="ours", linewidth=4, alpha=0.4)
ax.semilogy(torch_history, "--", label="PyTorch")
ax.set(xlabel="step (whole training set)", ylabel="cross-entropy (nats per digit)")
ax.legend()
plt.show()

# %% [markdown]
# ## Deep networks and their gradients
#
# Multiply many slopes, and the product vanishes or explodes. Twenty layers of 64 neurons, with random weights of the right size: how large is the gradient at each layer?

# %% tags=["picture"] alt="Norm of the gradient at each of 20 layers on a logarithmic axis: with sigmoid it falls by many orders of magnitude towards the first layer, with tanh and ReLU it stays within one order of magnitude."
fig, ax = plt.subplots()
norms = {}
for name in ("sigmoid", "tanh", "ReLU"):
    torch.manual_seed(0)
    scale = np.sqrt(2 / 64) if name == "ReLU" else np.sqrt(1 / 64)
    h, layers = torch.randn(100, 64), []
    for _ in range(20):
        w = (torch.randn(64, 64) * scale).requires_grad_()
        layers.append(w)
        h = functions[name](h @ w)
    h.pow(2).sum().backward()
    norms[name] = [float(w.grad.norm()) for w in layers]
    ax.semilogy(range(1, 21), norms[name], "o-", label=name)
ax.set(xlabel="layer (1 = next to the input)", ylabel="norm of the gradient (1 per weight)")
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. A new operation
#
# Give `Value` an exponential: write `exp(v)`, a `Value` whose `backward` is right.


# %% tags=["exercise"]
def exp(v): ...


# %% tags=["solution"]
def exp(v):
    e = np.exp(v.data)
    return Value(e, (v,), (e,))


# %% tags=["wrong"]
# says: gradient
def exp(v):
    return Value(np.exp(v.data))


# %% tags=["wrong"]
# says: slope
def exp(v):
    return Value(np.exp(v.data), (v,), (1.0,))


# %% tags=["check"]
v = Value(1.5)
found = exp(v * 2.0)
assert isinstance(found, Value), f"exp returns {type(found).__name__}, not a Value"
assert abs(found.data - np.exp(3.0)) < 1e-9, f"the value is {found.data}, not e³"
found.backward()
assert v.grad != 0, "no gradient arrives: pass the input and its slope to the new Value"
assert abs(v.grad - 2.0) > 1e-9, "the local slope of exp is taken as 1; it is exp itself"
assert abs(v.grad - 2 * np.exp(3.0)) < 1e-9, f"the gradient is {v.grad}, not 2 e³"
print("right")

# %% [markdown]
# ### 2. Backward through a layer
#
# Write `layer_backward(x, w, g)`: for $Z = XW + b$ and $G = \partial L / \partial Z$, return $\partial L/\partial X$, $\partial L/\partial W$ and $\partial L/\partial b$.


# %% tags=["exercise"]
def layer_backward(x, w, g): ...


# %% tags=["solution"]
def layer_backward(x, w, g):
    return g @ w.T, x.T @ g, g.sum(axis=0)


# %% tags=["wrong"]
# says: bias
def layer_backward(x, w, g):
    return g @ w.T, x.T @ g, g


# %% tags=["wrong"]
# says: mean
def layer_backward(x, w, g):
    return g @ w.T, x.T @ g / len(x), g.mean(axis=0)


# %% tags=["check"]
generator = torch.Generator().manual_seed(0)
tx, tw, tg = (torch.randn(*shape, generator=generator) for shape in ((7, 4), (4, 3), (7, 3)))
tbias = torch.zeros(3, requires_grad=True)
tx.requires_grad_(), tw.requires_grad_()
((tx @ tw + tbias) * tg).sum().backward()
result = layer_backward(tx.detach().numpy(), tw.detach().numpy(), tg.numpy())
assert result is not None, "layer_backward returns nothing"
dx, dw, db = result
assert np.shape(dx) == (7, 4), f"dX has the shape of X, found {np.shape(dx)}"
assert np.shape(dw) == (4, 3), f"dW has the shape of W, found {np.shape(dw)}"
assert np.shape(db) == (3,), (
    f"the bias has 3 numbers, its gradient has shape {np.shape(db)}: sum over the rows"
)
assert not np.allclose(dw * 7, tw.grad), "a mean over the rows: G already holds the mean, sum here"
assert np.allclose(dx, tx.grad, atol=1e-5), "dL/dX is wrong: it is G times W transposed"
assert np.allclose(dw, tw.grad, atol=1e-5), "dL/dW is wrong: it is X transposed times G"
assert np.allclose(db, tbias.grad, atol=1e-5), "dL/db is wrong"
print("right")

# %% [markdown]
# ### 3. A stable cross-entropy
#
# Write `cross_entropy(z, y)`: the mean cross-entropy of logits `z` (rows × classes) and classes `y`, also for logits of 1,000 and more.


# %% tags=["exercise"]
def cross_entropy(z, y): ...


# %% tags=["solution"]
def cross_entropy(z, y):
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(y)), y].mean())


# %% tags=["wrong"]
# says: large logits
def cross_entropy(z, y):
    with np.errstate(all="ignore"):
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        return float(-np.log(p[np.arange(len(y)), y]).mean())


# %% tags=["wrong"]
# says: sum
def cross_entropy(z, y):
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(y)), y].sum())


# %% tags=["check"]
logits, right_classes = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]), np.array([0, 1])
found = cross_entropy(logits, right_classes)
expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(right_classes)).item()
assert found is not None, "cross_entropy returns nothing"
assert not np.isclose(found, 2 * expected), "this is the sum over the rows, not the mean"
assert np.isclose(found, expected), f"expected {expected:.4f}, found {found:.4f}"
large = cross_entropy(logits * 1000, right_classes)
assert np.isfinite(large), "large logits overflow: subtract the largest one of each row first"
assert np.isclose(large, 1500), f"for large logits the loss is 1500, found {large:.1f}: do not clip"
print("right")

# %% [markdown]
# ## Self-test
#
# <details><summary>Why are gradients added, not replaced, in <code>backward</code>?</summary>
#
# A value that is used twice influences the loss in two ways; both count.
# </details>
#
# <details><summary>What does a network compute whose activations are all linear?</summary>
#
# One linear map, however many layers it has.
# </details>
#
# <details><summary>What is the cross-entropy of a model that knows nothing, with ten classes?</summary>
#
# ln 10, about two and a third nats. A first loss far from it is a sign of wrong initial weights.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
ratio = norms["sigmoid"][-1] / norms["sigmoid"][0]
zeros = [np.zeros_like(w) for w in initial(0)]
for _ in range(300):
    zero_loss, gradients = loss_and_gradients(x_train, y_train, *zeros)
    zeros = [w - 0.5 * g for w, g in zip(zeros, gradients, strict=True)]
display(
    Markdown(
        f"Through 20 sigmoid layers the gradient shrinks by a factor of {ratio:.0e}: the first layers learn nothing. With ReLU the factor is {norms['ReLU'][-1] / norms['ReLU'][0]:.1f}, with tanh {norms['tanh'][-1] / norms['tanh'][0]:.1f}, since their slopes reach 1 and the initial weights fit them. The choice of one function decides whether a deep network learns.\n\n"
        f"And weights that all start at zero learn next to nothing: after 300 steps the loss is {zero_loss:.3f} nats, in place of {history[-1]:.3f}. All hidden neurons stay 0 and no gradient passes them; only the last biases move."
    )
)

# %% [markdown]
# ## In llmworks
#
# `model show` draws a model's layers and counts its weights and operations; `train selftest` compares gradients of a recipe's training with a reference:
#
# ```
# llmworks model show --model asset:smollm2-135m-instruct --out anatomy
# llmworks train selftest recipes/pretrain.yaml
# ```
#
# ## Go on
#
# - D. Rumelhart, G. Hinton and R. Williams, *Learning representations by back-propagating errors* (1986)
# - K. He and others, *Delving deep into rectifiers*, arXiv:1502.01852
# - Next: [F10 Optimizers](F10_optimizers.ipynb)
