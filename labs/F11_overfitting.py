# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Recognize overfitting by its curves, and cure it by dropout, L1 and L2, early stopping and augmentation.
#     minutes: 60
#     budget_seconds: 120
#     needs: [F06, F09, F10]
#     topics: [overfitting, L1, L2, dropout, early stopping, augmentation]
# ---

# %% [markdown]
# # F11 Overfitting and its cures
#
# **You will learn**: Recognize overfitting by its curves, and cure it by dropout, L1 and L2, early stopping and augmentation.
#
# **Time**: one hour to read and to do the exercises.
#
# **Needs**: [F06](F06_preprocessing.ipynb), [F09](F09_backpropagation.ipynb), [F10](F10_optimizers.ipynb).

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
# ## Overfitting
#
# **Overfitting** is learning the training rows by heart: the training loss goes on falling, the loss on new rows rises again. It comes from few data and many weights. Here are 100 digits to learn from, 300 to choose settings with
# (*validation*), 1,397 to report on (*test*), and a network with hundreds of weights for each digit.

# %%
import math

import numpy as np
import torch
from sklearn.datasets import load_digits

digits = load_digits()
pictures = torch.tensor(digits.images / 16, dtype=torch.float32)
classes = torch.tensor(digits.target)
order = torch.from_numpy(np.random.default_rng(0).permutation(len(pictures)))
train, validation, test = order[:100], order[100:400], order[400:]


def make_network(seed=0, width=128, dropout=None):
    """Return a network 64 -> width -> width -> 10; `dropout`: a module behind each hidden layer."""
    torch.manual_seed(seed)
    layers = [torch.nn.Flatten()]
    for inputs in (64, width):
        layers += [torch.nn.Linear(inputs, width), torch.nn.ReLU()]
        layers += [dropout] if dropout is not None else []
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 10))


def evaluate(network, rows):
    """Return mean cross-entropy and accuracy."""
    network.eval()
    with torch.no_grad():
        logits = network(pictures[rows])
        loss = torch.nn.functional.cross_entropy(logits, classes[rows])
    return loss.item(), (logits.argmax(1) == classes[rows]).float().mean().item()


def fit(network, epochs=150, penalty=None, augment=None, seed=0, rate=0.003):
    """Train; return training and validation losses of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    curves = {"train": [], "validation": [], "accuracy": []}
    for _ in range(epochs):
        network.train()
        for rows in train[torch.randperm(len(train), generator=generator)].split(25):
            x = augment(pictures[rows], generator) if augment else pictures[rows]
            loss = torch.nn.functional.cross_entropy(network(x), classes[rows])
            if penalty:
                loss = loss + penalty(network)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, chosen in (("train", train), ("validation", validation)):
            loss, accuracy = evaluate(network, chosen)
            curves[name].append(loss)
        curves["accuracy"].append(accuracy)  # on the validation set
    return curves


plain = make_network()
curves = fit(plain)
turn = int(np.argmin(curves["validation"]))
print(f"{sum(p.numel() for p in plain.parameters()):,} weights, {len(train)} digits")
print(f"validation loss: lowest {min(curves['validation']):.3f} in epoch {turn + 1},")
print(f"at the end {curves['validation'][-1]:.3f}")

# %% tags=["picture"] alt="Training and validation loss over 150 epochs on a logarithmic axis: the training loss falls to nearly 0, the validation loss falls, turns and rises slowly."
fig, ax = plt.subplots()
for name in ("train", "validation"):
    ax.semilogy(range(1, len(curves[name]) + 1), curves[name], label=name)
ax.axvline(turn + 1, color="grey", linestyle="--", label="lowest validation loss")
ax.set(xlabel="epoch (passes over 100 digits)", ylabel="cross-entropy (nats per digit)")
ax.legend()
plt.show()

# %% [markdown]
# ## L2 and L1
#
# Large weights make sharp boundaries. **L2** adds $\frac{\lambda}{2} \sum_i w_i^2$ to the loss: each weight is pulled towards 0 in proportion to its size. **L1** adds $\lambda \sum_i |w_i|$: a constant pull, which makes many weights exactly useless. A *soft threshold*,
# $w \leftarrow \operatorname{sign}(w) \max(|w| - \eta\lambda, 0)$, makes them exactly zero. Both, on a linear model of the digits 3 and 8. (Sixteen pixels are the same in all training pictures; their weights stay 0 in any case.)

# %%
pair = np.isin(digits.target, (3, 8))
x2, t2 = digits.data[pair] / 16, (digits.target[pair] == 8).astype(float)
fit_rows = np.arange(len(x2)) < 60


def fit_penalized(l1=0.0, l2=0.0, steps=60_000, rate=0.5):
    """Minimize mean cross-entropy + l1 Σ|w| + l2 / 2 Σw² by gradient steps and soft thresholds."""
    x, t = x2[fit_rows], t2[fit_rows]
    w, b = np.zeros(64), 0.0
    for _ in range(steps):
        error = (1 / (1 + np.exp(-(x @ w + b))) - t) / len(t)
        w = w - rate * (x.T @ error + l2 * w)
        w = np.sign(w) * np.maximum(np.abs(w) - rate * l1, 0)
        b -= rate * error.sum()
    return w, b


penalized = {
    "none": fit_penalized(steps=3000),
    "L2": fit_penalized(l2=0.02),
    "L1": fit_penalized(l1=0.003),
}
for name, (w, b) in penalized.items():
    right = np.mean(((x2 @ w + b) > 0)[~fit_rows] == t2[~fit_rows])
    print(
        f"{name:<5} {np.sum(w == 0):2} weights are 0, norm {np.linalg.norm(w):6.2f}, right {right:.1%}"
    )

# %% tags=["parity"]
from sklearn.linear_model import LogisticRegression

n = fit_rows.sum()
for name, settings in (
    ("L2", {"C": 1 / (0.02 * n), "solver": "lbfgs", "l1_ratio": 0}),
    ("L1", {"C": 1 / (0.003 * n), "solver": "saga", "l1_ratio": 1}),
):
    library = LogisticRegression(tol=1e-8, max_iter=50_000, random_state=0, **settings)
    library.fit(x2[fit_rows], t2[fit_rows])
    np.testing.assert_allclose(penalized[name][0], library.coef_[0], atol=2e-3)
print("our L1 and L2 weights are those of scikit-learn's LogisticRegression")

# %% tags=["picture"] alt="Weights of the linear model as 8 by 8 pictures: without a penalty and with L2 the same pattern, smaller with L2; with L1 a few pixels only."
fig, axes = plt.subplots(1, 3, figsize=(8, 2.8))
for ax, (name, (w, _)) in zip(axes, penalized.items(), strict=True):
    top = np.abs(w).max()
    shown = ax.imshow(w.reshape(8, 8), cmap="coolwarm", vmin=-top, vmax=top)
    ax.set_title(f"{name}: 8 against 3", fontsize=10)
    ax.axis("off")
    fig.colorbar(shown, ax=ax, label="weight (1)")
plt.show()

# %% [markdown]
# ## Dropout
#
# **Dropout** sets each activation to 0 with probability $p$ during training, and divides the others by $1 - p$, so that the mean stays. No neuron can rely on one other neuron. In evaluation nothing is dropped. Forgetting `network.eval()` is a common bug.


# %%
class Dropout(torch.nn.Module):
    """Drop activations at random while training."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand_like(x) >= self.p) / (1 - self.p)


ones = torch.ones(100_000)
layer = Dropout(0.3)
torch.manual_seed(0)
dropped = layer(ones)
print(f"share of zeros {float((dropped == 0).float().mean()):.3f}, mean {float(dropped.mean()):.3f}")
layer.eval()
print("in evaluation unchanged:", bool(torch.equal(layer(ones), ones)))
torch.manual_seed(0)
library = torch.nn.functional.dropout(ones, 0.3, training=True)
assert set(library.unique().tolist()) == set(dropped.unique().tolist())

# %% [markdown]
# ## Augmentation and early stopping
#
# **Augmentation** makes new training rows that have the same answer: a digit that is turned a little is the same digit. It adds knowledge that the model cannot get from 100 rows. **Early stopping** keeps the weights of the epoch with the lowest *validation* loss,
# and stops when there was none for some epochs (*patience*).


# %%
def turn_and_scale(x, generator):
    """Turn each picture by up to 15°, scale it by up to 15 %, move it by up to half a pixel."""

    def draw(*shape):
        return torch.rand(*shape, generator=generator) * 2 - 1

    angle, scale = draw(len(x)) * math.radians(15), 1 + 0.15 * draw(len(x))
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos() / scale
    matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin() / scale, angle.sin() / scale
    matrix[:, :, 2] = draw(len(x), 2) / 8
    grid = torch.nn.functional.affine_grid(matrix, (len(x), 1, 8, 8), align_corners=False)
    return torch.nn.functional.grid_sample(x[:, None], grid, align_corners=False)[:, 0]


def add_noise(x, generator):
    return x + 0.4 * torch.randn(x.shape, generator=generator)


def shift(x, generator):
    """Move each picture by up to one whole pixel; what leaves the edge is lost."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    moves = torch.randint(3, (len(x), 2), generator=generator)
    return torch.stack(
        [p[i : i + 8, j : j + 8] for p, (i, j) in zip(padded, moves.tolist(), strict=True)]
    )


def l2_penalty(network):
    return 1e-3 * sum(p.pow(2).sum() for p in network.parameters() if p.dim() == 2)


def l1_penalty(network):
    return 1e-4 * sum(p.abs().sum() for p in network.parameters() if p.dim() == 2)


recipes = {
    "nothing": {},
    "L1": {"penalty": l1_penalty},
    "L2": {"penalty": l2_penalty},
    "dropout": {"dropout": 0.4},
    "noise": {"augment": add_noise},
    "turn and scale": {"augment": turn_and_scale},
    "shift by a pixel": {"augment": shift},
}
results = {}
for name, recipe in recipes.items():
    scores = []
    for seed in range(3):
        dropout = Dropout(recipe["dropout"]) if "dropout" in recipe else None
        network = make_network(seed, dropout=dropout)
        fit(network, seed=seed, penalty=recipe.get("penalty"), augment=recipe.get("augment"))
        scores.append(evaluate(network, test))
    results[name] = np.array(scores)
    loss, accuracy = results[name].mean(axis=0)
    print(f"{name:<25} test loss {loss:.3f}, accuracy {accuracy:.1%}")

# %% tags=["picture"] alt="Test accuracy of seven recipes with three seeds each as points: most overlap with nothing, shifting by a whole pixel lies clearly below."
fig, ax = plt.subplots()
for place, values in enumerate(results.values()):
    ax.plot(values[:, 1], [place] * 3, "o", color="tab:blue", alpha=0.6)
    ax.plot(values[:, 1].mean(), place, "|", color="black", markersize=18)
ax.set_yticks(range(len(results)), list(results))
ax.set(xlabel="accuracy on the test set (share)", ylabel="cure (three seeds each)")
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Early stopping
#
# Write `stop_epoch(losses, patience)`: the index of the epoch whose weights are kept. Training stops when the lowest validation loss is `patience` epochs old; later epochs were never run.


# %% tags=["exercise"]
def stop_epoch(losses, patience): ...


# %% tags=["solution"]
def stop_epoch(losses, patience):
    best = 0
    for epoch, loss in enumerate(losses):
        if loss < losses[best]:
            best = epoch
        elif epoch - best >= patience:
            break
    return best


# %% tags=["wrong"]
# says: never run
def stop_epoch(losses, patience):
    return int(np.argmin(losses))


# %% tags=["wrong"]
# says: first rise
def stop_epoch(losses, patience):
    for epoch in range(1, len(losses)):
        if losses[epoch] > losses[epoch - 1]:
            return epoch - 1
    return len(losses) - 1


# %% tags=["wrong"]
# says: where it stopped
def stop_epoch(losses, patience):
    best = 0
    for epoch, loss in enumerate(losses):
        if loss < losses[best]:
            best = epoch
        elif epoch - best >= patience:
            return epoch
    return best


# %% tags=["check"]
losses = [5, 4, 4.5, 3, 3.5, 3.2, 3.4, 1]
found = stop_epoch(losses, 3)
assert found is not None, "stop_epoch returns nothing"
assert found != 7, "epoch 7 was never run: at epoch 6 the lowest loss is three epochs old"
assert found != 1, "it stopped at the first rise: patience allows for some"
assert found != 6, "this is where it stopped; the weights of the lowest loss are kept"
assert found == 3, f"expected 3, found {found}"
assert stop_epoch([3, 2, 1], 2) == 2, "without a rise the last epoch is the best"
print("right; of the curve above:", stop_epoch(curves["validation"], 20))

# %% [markdown]
# ### 2. Dropout that keeps the mean
#
# Write `drop(x, p, generator)` for arrays of NumPy: each element is 0 with probability `p`; the expected value of the result is `x`. With $p = 0$ nothing changes.


# %% tags=["exercise"]
def drop(x, p, generator): ...


# %% tags=["solution"]
def drop(x, p, generator):
    return x * (generator.random(x.shape) >= p) / (1 - p)


# %% tags=["wrong"]
# says: mean
def drop(x, p, generator):
    return x * (generator.random(x.shape) >= p)


# %% tags=["wrong"]
# says: kept with
def drop(x, p, generator):
    return x * (generator.random(x.shape) < p) / p if p else x


# %% tags=["wrong"]
# says: the same element
def drop(x, p, generator):
    return x * (generator.random(x.shape[1:]) >= p) / (1 - p)


# %% tags=["check"]
big = np.full((1000, 20), 2.0)
found = drop(big, 0.25, np.random.default_rng(0))
assert found is not None, "drop returns nothing"
zeros = (found == 0).mean()
assert abs(zeros - 0.75) > 0.02, "elements are kept with probability p; they are dropped with it"
assert abs(zeros - 0.25) < 0.02, f"a quarter of the elements is 0, found {zeros:.2f}"
assert abs(found.mean() - 2) < 0.05, f"the mean is {found.mean():.2f}, not 2: divide by 1 - p"
assert not (found == 0).all(axis=0).any(), "the same element is dropped in every row"
assert np.array_equal(drop(big, 0, np.random.default_rng(0)), big), "with p = 0 nothing changes"
print("right")

# %% [markdown]
# ### 3. Augmentation that lies
#
# Not every change keeps the answer. Write `safe(changes, judge, x, t)`: `changes` is a dictionary of functions on a batch of pictures `x` with classes `t`, and `judge(x)` returns a network's classes. Return the
# list of the names of the changes after which the judge is still right for at least 90 % of the pictures that it was right for before.


# %% tags=["exercise"]
def safe(changes, judge, x, t): ...


# %% tags=["solution"]
def safe(changes, judge, x, t):
    right = judge(x) == t
    return [
        name
        for name, change in changes.items()
        if (judge(change(x)) == t)[right].float().mean() >= 0.9
    ]


# %% tags=["wrong"]
# says: right before
def safe(changes, judge, x, t):
    return [name for name, change in changes.items() if (judge(change(x)) == t).float().mean() >= 0.9]


# %% tags=["wrong"]
# says: answers
def safe(changes, judge, x, t):
    return [name for name, change in changes.items() if (change(x) == x).float().mean() >= 0.9]


# %% tags=["check"]
numbers, answers = torch.arange(20.0), torch.arange(20) % 10


def toy_judge(x):
    return torch.where(x < 10, x % 10, torch.tensor(0.0)).long()  # wrong for most of 10 to 19


toy = {"same": lambda x: x, "a little": lambda x: x + 0.3, "mirror": lambda x: 9 - x}
found = safe(toy, toy_judge, numbers, answers)
assert found is not None, "safe returns nothing"
assert "same" in found, "nothing changed, so it is safe: count only pictures that were right before"
assert "a little" in found, "compare the judge's answers, not the pictures"
assert found == ["same", "a little"], f"expected ['same', 'a little'], found {found}"
real = {
    "one pixel right": lambda x: torch.roll(x, 1, dims=2),
    "mirrored": lambda x: x.flip(2),
    "upside down": lambda x: x.flip(1),
    "darker": lambda x: x * 0.8,
}


def network_judge(x):
    with torch.no_grad():
        return network.eval()(x).argmax(1)


print("right; safe for the last network:", safe(real, network_judge, pictures[test], classes[test]))

# %% [markdown]
# ## Self-test
#
# <details><summary>The training loss is high, and so is the validation loss. Which cure helps?</summary>
#
# None of these. This is underfitting: train longer, or take a larger model.
# </details>
#
# <details><summary>Why is the validation set not the test set?</summary>
#
# Early stopping and the choice of a cure have looked at the validation set; its score is too good.
# </details>
#
# <details><summary>Why does L1 make weights exactly zero and L2 not?</summary>
#
# The pull of L2 shrinks with the weight; the pull of L1 is constant, and wins against any gradient smaller than λ.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
means = {name: values.mean(axis=0) for name, values in results.items()}
losses, right = ({name: float(m[k]) for name, m in means.items()} for k in (0, 1))
gentle, best_loss = max(right, key=right.get), min(losses, key=losses.get)
at_turn, at_end = curves["validation"][turn], curves["validation"][-1]
display(
    Markdown(
        f"We expected that moving a digit by a pixel is the best of the cures. It is a poison: {right['shift by a pixel']:.1%} of new digits, in place of {right['nothing']:.1%} without any cure. All digits of this set are centered, a pixel is an eighth of the picture, and what leaves the edge is lost. The best one here, *{gentle}*, is right for {right[gentle]:.1%}, a difference that three seeds do not prove. "
        f"Augmentation is a claim about the data; check it, on the validation set.\n\n"
        f"While the validation loss above rises from {at_turn:.3f} to {at_end:.3f}, the validation accuracy goes from {curves['accuracy'][turn]:.1%} to {curves['accuracy'][-1]:.1%}: an overfitted model is first of all too certain. *{best_loss}* keeps the loss lowest ({losses[best_loss]:.3f}, without a cure {losses['nothing']:.3f}); dropout and the shift do not."
    )
)

# %% [markdown]
# ## In llmworks
#
# Trainings measure the held-out loss and keep the best weights; every training also measures what the model forgets:
#
# ```
# llmworks train sft --model asset:smollm2-135m-instruct --data train --eval_data test --set optimizer.weight_decay=0.1 --out tuned
# ```
#
# ## Go on
#
# - N. Srivastava and others, *Dropout: a simple way to prevent neural networks from overfitting* (2014)
# - C. Zhang and others, *Understanding deep learning requires rethinking generalization*, arXiv:1611.03530
# - Next: [F12 Words](F12_words.ipynb)
