# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Compute derivatives and gradients by hand and by machine, and walk downhill with them.
#     minutes: 60
#     budget_seconds: 40
#     needs: [F00, F01]
#     topics: [limits, derivatives, integrals, series, multivariable calculus, gradients, chain rule]
# ---

# %% [markdown]
# # F02 Calculus: rolling downhill
#
# **You will learn**: Compute derivatives and gradients by hand and by machine, and walk downhill with them.
#
# **Time**: one hour to read and to do the exercises.
#
# **Needs**: [F01](F01_linear_algebra.ipynb).

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
# ## Limits and derivatives
#
# **Limits** are values that a sequence or function comes arbitrarily close to. **Derivatives** are limits of slopes:
# $f'(x) = \lim_{h \to 0} \frac{f(x+h) - f(x)}{h}$. Where the derivative is positive, the function rises. A computer cannot take $h$ to
# zero, because numbers have a fixed count of digits: $f(x+h) - f(x)$ subtracts two nearly equal numbers, and the digits that
# differ run out.

# %%
import math

import numpy as np


def slope(f, x, h):
    return (f(x + h) - f(x)) / h


for h in (1e-1, 1e-4, 1e-8, 1e-12, 1e-15):
    found = slope(math.sin, 1.0, h)
    print(f"h = {h:.0e}: slope {found:.12f}, error {abs(found - math.cos(1.0)):.1e}")

# %% tags=["picture"] alt="Error of the slope of the sine against the step h on logarithmic axes: both lines fall with h down to a minimum and rise again below it; the central difference reaches a smaller error."
steps = np.logspace(-15, 0, 200)
forward = np.abs([slope(math.sin, 1.0, h) - math.cos(1.0) for h in steps])
central = [(math.sin(1 + h) - math.sin(1 - h)) / (2 * h) - math.cos(1.0) for h in steps]
fig, ax = plt.subplots()
ax.loglog(steps, forward, label="forward: (f(x + h) − f(x)) / h")
ax.loglog(steps, np.abs(central), label="central: (f(x + h) − f(x − h)) / 2h")
ax.set(xlabel="step h (unit of x)", ylabel="error of the slope (unit of f per x)")
ax.legend()
plt.show()

# %% [markdown]
# ## Series
#
# **Series** are sums of infinitely many terms. Taylor's series rebuilds a function from its derivatives at one point:
# $f(x) = \sum_n f^{(n)}(0) \, x^n / n!$. For the exponential function all derivatives at 0 are 1. So a machine that
# can only add and multiply computes $e^x$ for small $x$; for large negative $x$ the terms cancel, and their digits are lost.


# %%
def exponential(x, terms=20):
    """Return the sum of the first terms of Taylor's series of exp."""
    total, term = 0.0, 1.0
    for n in range(terms):
        total += term
        term *= x / (n + 1)
    return total


for terms in (2, 5, 10, 20):
    error = abs(exponential(1.0, terms) - math.e)
    print(f"{terms:2} terms: {exponential(1.0, terms):.15f}, error {error:.1e}")

# %% [markdown]
# ## Integrals
#
# **Integrals** are areas under a curve: $\int_a^b f(x)\,dx$ is the limit of the sum of the areas of narrow strips. The
# *fundamental theorem* connects it to the derivative: the derivative of the area up to $x$ is $f(x)$. The integral of a
# probability density over an interval is the probability of the interval (lab F03).


# %%
def integrate(f, a, b, strips=1000):
    """Return the integral by the trapezoid rule."""
    x = np.linspace(a, b, strips + 1)
    y = f(x)
    return float(np.sum((y[1:] + y[:-1]) / 2) * (b - a) / strips)


def normal(x):
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


area = integrate(normal, -1, 1)
rate = slope(lambda x: integrate(normal, -1, x), 0.5, 1e-5)
print(f"within one standard deviation: {area:.6f}; exact: {math.erf(1 / math.sqrt(2)):.6f}")
print(f"derivative of the area at 0.5: {rate:.5f}; the density there: {normal(0.5):.5f}")

# %% [markdown]
# ## Several variables
#
# **Multivariable calculus** looks at functions of many numbers. A *partial derivative* $\partial f / \partial x_i$ changes one of
# them and keeps the others. **Gradients** collect the partial derivatives in a vector, $\nabla f$. It points in the direction in
# which $f$ rises fastest, so that $-\nabla f$ points downhill.


# %%
def f(p):
    """Return a narrow valley: its floor is the line x = 2y."""
    x, y = p
    return (x - 2 * y) ** 2 + 0.1 * (x + y - 3) ** 2


def gradient(p):
    """Return the two partial derivatives of f."""
    x, y = p
    a, b = 2 * (x - 2 * y), 0.2 * (x + y - 3)
    return np.array([a + b, -2 * a + b])


def numeric_gradient(f, p, h=1e-5):
    """Return the gradient by central differences, one variable at a time."""
    units = np.eye(len(p)) * h
    return np.array([(f(p + unit) - f(p - unit)) / (2 * h) for unit in units])


p = np.array([-1.0, 2.0])
print("by hand:   ", gradient(p))
print("by numbers:", numeric_gradient(f, p))

# %% [markdown]
# ## Gradient descent
#
# Take a step against the gradient, $p \leftarrow p - \eta \nabla f(p)$, and repeat. The *learning rate* $\eta$ decides everything: with a small one
# the walk is slow, with a large one each step jumps across the valley to a higher place, and the walk diverges. For a quadratic function the limit is $2 / L$, where
# $L$ is the largest eigenvalue of the matrix of second derivatives (the curvature of the steepest direction).


# %%
def descend(gradient, start, learning_rate, steps):
    """Return the points of a walk downhill."""
    points = [np.array(start, dtype=float)]
    for _ in range(steps):
        points.append(points[-1] - learning_rate * gradient(points[-1]))
    return np.array(points)


hessian = np.array([numeric_gradient(lambda p, i=i: gradient(p)[i], p) for i in range(2)])
curvature = np.linalg.eigvalsh(hessian)
limit = 2 / curvature[-1]
print(f"curvatures {curvature.round(3)}, limit of the learning rate {limit:.4f}")
for rate in (0.1 * limit, 0.9 * limit, 1.02 * limit):
    print(f"learning rate {rate:.4f}: f = {f(descend(gradient, [-1, 2], rate, 60)[-1]):.2e}")

# %% tags=["picture"] alt="Three walks on the contour lines of a narrow valley: with a small learning rate a smooth path that stops early, with a larger one a zigzag that reaches the minimum, and twelve steps just above the limit that lead away from it."
x, y = np.meshgrid(np.linspace(-4, 6, 120), np.linspace(-3, 4, 120))
fig, ax = plt.subplots(figsize=(7, 4.2))
ax.contour(x, y, f((x, y)), levels=np.logspace(-2, 2, 14), colors="grey", linewidths=0.6)
for share, color in ((0.1, "tab:blue"), (0.9, "tab:green"), (1.02, "tab:red")):
    walk = descend(gradient, [-1, 2], share * limit, 60 if share < 1 else 12)
    label = f"{share:g} of the limit"
    ax.plot(*walk.T, ".-", markersize=4, linewidth=1, color=color, label=label)
ax.plot(2, 1, "k*", markersize=12, label="minimum")
ax.set(xlim=(-4, 6), ylim=(-3, 4), xlabel="x (no unit)", ylabel="y (no unit)")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## The chain rule
#
# The **chain rule** gives the derivative of a function of a function: $\frac{dz}{dx} = \frac{dz}{dy} \cdot \frac{dy}{dx}$. A neural network is a long
# chain. Here it is for logistic regression, $z = w \cdot x + b$, $p = 1 / (1 + e^{-z})$, loss $L = -\ln p$ for the label 1 and $-\ln(1 - p)$
# for the label 0. With the label $t$, the middle links simplify to $\partial L / \partial z = p - t$.


# %%
def loss_and_gradient(w, b, inputs, targets):
    """Return the mean loss, and its derivatives with respect to w and b."""
    z = inputs @ w + b
    p = 1 / (1 + np.exp(-z))
    loss = -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    dz = (p - targets) / len(targets)  # dL/dz
    return loss, inputs.T @ dz, dz.sum()  # dL/dw = dL/dz · dz/dw


rng = np.random.default_rng(0)
inputs = rng.normal(size=(200, 3))
truth = np.array([2.0, -1.0, 0.5])
targets = (inputs @ truth + rng.normal(size=200) > 0).astype(float)
w, b = rng.normal(size=3), 0.1
loss, dw, db = loss_and_gradient(w, b, inputs, targets)
print("loss", round(loss, 4), "dL/dw", dw.round(4), "dL/db", round(db, 4))

# %% [markdown]
# PyTorch records each operation and applies the chain rule backwards: *automatic differentiation*. Lab F09 builds it from nothing.

# %% tags=["parity"]
import torch

tw = torch.tensor(w, requires_grad=True)
tb = torch.tensor(b, dtype=torch.float64, requires_grad=True)
logits = torch.tensor(inputs) @ tw + tb
automatic = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(targets))
automatic.backward()
np.testing.assert_allclose(loss, automatic.item())
np.testing.assert_allclose(dw, tw.grad.numpy())
np.testing.assert_allclose(db, tb.grad.item())
print("our loss and gradient are those of torch.autograd")

# %% [markdown]
# Train with it. The noise in the labels decides the length of the best $w$; its direction should be that of the truth, nearly.

# %%
trained_w, trained_b = w, b
for step in range(300):
    now, slope_w, slope_b = loss_and_gradient(trained_w, trained_b, inputs, targets)
    trained_w, trained_b = trained_w - 1.0 * slope_w, trained_b - 1.0 * slope_b
    if step in (0, 10, 100, 299):
        print(f"step {step:3}: loss {now:.4f}")
print("direction of w:", (trained_w / np.linalg.norm(trained_w)).round(3))
print("of the truth:  ", (truth / np.linalg.norm(truth)).round(3))

# %% [markdown]
# ## Exercises
#
# ### 1. A better slope
#
# Write `derivative(f, x)`: the slope at `x` by the central difference, with a step for which the error is below $10^{-8}$ for $\sin$ at 1.


# %% tags=["exercise"]
def derivative(f, x): ...


# %% tags=["solution"]
def derivative(f, x, h=1e-5):
    return (f(x + h) - f(x - h)) / (2 * h)


# %% tags=["wrong"]
# says: divide by 2h
def derivative(f, x, h=1e-5):
    return (f(x + h) - f(x - h)) / h


# %% tags=["wrong"]
# says: on one side
def derivative(f, x, h=1e-5):
    return (f(x + h) - f(x)) / h


# %% tags=["wrong"]
# says: too small
def derivative(f, x, h=1e-12):
    return (f(x + h) - f(x - h)) / (2 * h)


# %% tags=["check"]
found = derivative(math.sin, 1.0)
assert found is not None, "derivative returns nothing"
wanted = math.cos(1.0)
assert abs(found - 2 * wanted) > 1e-3, "twice the slope: x + h and x - h are 2h apart, divide by 2h"
assert abs(derivative(lambda x: x * x, 0.0)) < 1e-9, (
    "the slope of x² at 0 is 0: the step is on one side only"
)
assert abs(found - wanted) < 1e-8, (
    f"the error is {abs(found - wanted):.0e}: h is too small or too large"
)
print("right")

# %% [markdown]
# ### 2. A gradient by the chain rule
#
# The loss of linear regression is $L(w) = \frac1n \sum_i (x_i \cdot w - t_i)^2$. Write `squared_loss_gradient(w, inputs, targets)`, the vector $\partial L / \partial w$.


# %% tags=["exercise"]
def squared_loss_gradient(w, inputs, targets): ...


# %% tags=["solution"]
def squared_loss_gradient(w, inputs, targets):
    return 2 * inputs.T @ (inputs @ w - targets) / len(targets)


# %% tags=["wrong"]
# says: factor 2
def squared_loss_gradient(w, inputs, targets):
    return inputs.T @ (inputs @ w - targets) / len(targets)


# %% tags=["wrong"]
# says: uphill
def squared_loss_gradient(w, inputs, targets):
    return 2 * inputs.T @ (targets - inputs @ w) / len(targets)


# %% tags=["wrong"]
# says: mean
def squared_loss_gradient(w, inputs, targets):
    return 2 * inputs.T @ (inputs @ w - targets)


# %% tags=["check"]
point = np.array([0.3, -0.2, 1.0])
found = squared_loss_gradient(point, inputs, targets)
wanted = numeric_gradient(lambda w: np.mean((inputs @ w - targets) ** 2), point)
assert found is not None, "squared_loss_gradient returns nothing"
assert np.shape(found) == (3,), f"one number for each weight is needed, found shape {np.shape(found)}"
ratio = float(found @ wanted / (wanted @ wanted))
assert ratio > 0, "the gradient points downhill: it is prediction minus target, and points uphill"
assert not math.isclose(ratio, 0.5), "half of the gradient: the square brings a factor 2 down"
assert not math.isclose(ratio, len(targets)), "the loss is a mean: divide by the number of rows"
assert np.allclose(found, wanted), f"expected {wanted.round(4)}, found {found}"
print("right")

# %% [markdown]
# ### 3. The limit of the learning rate
#
# Write `largest_learning_rate(hessian)`: gradient descent on a quadratic function with this matrix of second derivatives
# converges for every smaller learning rate.


# %% tags=["exercise"]
def largest_learning_rate(hessian): ...


# %% tags=["solution"]
def largest_learning_rate(hessian):
    return 2 / np.linalg.eigvalsh(hessian)[-1]


# %% tags=["wrong"]
# says: largest curvature
def largest_learning_rate(hessian):
    return 2 / np.linalg.eigvalsh(hessian)[0]


# %% tags=["wrong"]
# says: too careful
def largest_learning_rate(hessian):
    return 1 / np.linalg.eigvalsh(hessian)[-1]


# %% tags=["check"]
bowl = np.array([[4.0, 1.0], [1.0, 3.0]])
found = largest_learning_rate(bowl)
assert found is not None, "largest_learning_rate returns nothing"
below = descend(lambda p: bowl @ p, [1, 1], 0.99 * found, 400)[-1]
above = descend(lambda p: bowl @ p, [1, 1], 1.01 * found, 400)[-1]
assert np.linalg.norm(below) < 1, (
    "the walk diverges below this rate: it is 2 over the largest curvature"
)
assert np.linalg.norm(above) > 1, "the walk still converges above this rate: it is too careful"
print("right")

# %% [markdown]
# ## Self-test
#
# <details><summary>Why is the central difference better than the forward one?</summary>
#
# In $f(x+h) - f(x-h)$ the terms of Taylor's series in $h^2$ cancel. Divided by $2h$, what remains falls with $h^2$; the error of the forward difference falls with $h$.
# </details>
#
# <details><summary>The gradient of the loss is zero. Is this the minimum?</summary>
#
# Perhaps, or a local one. It can also be a maximum, or a saddle: a minimum in one direction and a maximum in another.
# </details>
#
# <details><summary>Why does automatic differentiation run backwards?</summary>
#
# A network has millions of inputs (weights) and one output (the loss). Backwards, one pass gives all derivatives; forwards, one pass gives the derivative with respect to one
# weight.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
best = steps[int(np.argmin(forward))]
inside = f(descend(gradient, [-1, 2], 0.98 * limit, 60)[-1])
outside = f(descend(gradient, [-1, 2], 1.02 * limit, 60)[-1])
display(
    Markdown(
        f"The best step of the forward difference is not the smallest one, but {best:.0e}: about the root of the precision of a float, {np.sqrt(np.finfo(float).eps):.0e}. There the error of the slope, which falls with h, meets the rounding error of the difference, which grows as one over h. "
        f"With a step of {steps[0]:.0e} the slope is wrong by {forward[0] / math.cos(1):.0%}.\n\n"
        f"And the edge of the learning rate is sharp: at 98 % of the limit the walk of 60 steps ends at f = {inside:.2g}, at 102 % at f = {outside:.2g}. "
        "Training that explodes may need a change of a few percent only."
    )
)

# %% [markdown]
# ## In llmworks
#
# `train lr_finder` raises the learning rate step by step on a real model and draws the loss against it; it suggests a rate:
#
# ```
# llmworks train lr_finder --model asset:smollm2-135m-instruct --data chats --out rates
# ```
#
# ## Go on
#
# - A. G. Baydin and others, *Automatic differentiation in machine learning: a survey*, arXiv:1502.05767
# - J. Cohen and others, *Gradient descent on neural networks typically occurs at the edge of stability*, arXiv:2103.00065
# - Next: [F03 Probability](F03_probability.ipynb)
