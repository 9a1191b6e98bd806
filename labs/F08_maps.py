# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Draw points of many dimensions on paper, and know what such a map shows and what it invents.
#     minutes: 60
#     budget_seconds: 120
#     needs: [F01, F07]
#     assets: [sarcasm-headlines, wordllama]
#     topics: [principal component analysis, t-SNE, maps]
# ---

# %% [markdown]
# # F08 Maps of texts: PCA and t-SNE
#
# **You will learn**: Draw points of many dimensions on paper, and know what such a map shows and what it invents.
#
# **Time**: one hour to read and to do the exercises.
#
# **Needs**: [F01](F01_linear_algebra.ipynb), [F07](F07_classifiers.ipynb).

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
# ## Principal component analysis
#
# **Principal component analysis** (PCA) finds the directions in which points spread most. Center the points; the directions are the eigenvectors of the covariance matrix, or the right singular vectors of the
# centered matrix. The eigenvalues are the variances along them. The first two coordinates are the flat map with the smallest squared error.

# %%
import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
x, y = digits.data / 16, digits.target


def pca(x, dimensions):
    """Return coordinates, directions and the share of variance of each direction."""
    centered = x - x.mean(axis=0)
    _, sigma, vt = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])  # a direction has no sign
    vt = vt * signs[:, None]
    variance = sigma**2 / np.sum(sigma**2)
    return centered @ vt[:dimensions].T, vt[:dimensions], variance


flat, directions, variance = pca(x, 2)
print(
    f"share of the variance: 2 of 64 directions {variance[:2].sum():.1%}, 20 {variance[:20].sum():.1%}"
)

# %% tags=["parity"]
from sklearn.decomposition import PCA

library = PCA(2).fit(x)
np.testing.assert_allclose(np.abs(flat), np.abs(library.transform(x)), atol=1e-6)
np.testing.assert_allclose(variance[:2], library.explained_variance_ratio_)
print("our coordinates are those of sklearn.decomposition.PCA")

# %% [markdown]
# ## t-SNE
#
# **t-SNE** keeps neighborhoods in place of distances. (*Early exaggeration* multiplies $P$ at the beginning, so that clusters can form; *gains* are step sizes for each coordinate.) For each point, a Gaussian turns distances into probabilities $p_{ij}$ that $j$ is its neighbor; its width is chosen so that every point has about as many neighbors, the
# *perplexity*. On paper, $q_{ij} \propto 1 / (1 + \|a_i - a_j\|^2)$. The map minimizes $\mathrm{KL}(P \| Q) = \sum_{ij} p_{ij} \ln (p_{ij}/q_{ij})$ by gradient descent with momentum.


# %%
def squared_distances(x):
    norms = (x**2).sum(axis=1)
    return np.maximum(norms[:, None] + norms - 2 * x @ x.T, 0)


def neighborhoods(x, perplexity):
    """Return the symmetric matrix P; each point's width is found by bisection."""
    distance, n = squared_distances(x), len(x)
    p = np.zeros((n, n))
    for i in range(n):
        low, high, beta = 0.0, np.inf, 1.0
        others = np.delete(distance[i], i)
        for _ in range(60):
            weights = np.exp(-beta * (others - others.min()))
            row = weights / weights.sum()
            entropy = -np.sum(row * np.log(np.maximum(row, 1e-300)))
            if abs(entropy - np.log(perplexity)) < 1e-6:
                break
            low, high = (beta, high) if entropy > np.log(perplexity) else (low, beta)
            beta = beta * 2 if high == np.inf else (low + high) / 2
        p[i] = np.insert(row, i, 0)
    return (p + p.T) / (2 * n)


def similarities(a):
    kernel = 1 / (1 + squared_distances(a))
    np.fill_diagonal(kernel, 0)
    return kernel / kernel.sum(), kernel


def divergence(p, a):
    """Return KL(P || Q) in nats."""
    q, _ = similarities(a)
    inside = p > 0
    return float(np.sum(p[inside] * np.log(p[inside] / q[inside])))


def t_sne(p, start, steps=500):
    """Return the map: early exaggeration for 120 steps, momentum, and gains per coordinate."""
    a, velocity, gains = start.copy(), np.zeros_like(start), np.ones_like(start)
    rate = max(len(a) / 12 / 4, 50)
    for step in range(steps):
        target = p * 12 if step < 120 else p
        q, kernel = similarities(a)
        force = (target - q) * kernel
        gradient = 4 * (force.sum(axis=1)[:, None] * a - force @ a)
        agree = np.sign(gradient) == np.sign(velocity)
        gains = np.maximum(np.where(agree, gains * 0.8, gains + 0.2), 0.01)
        velocity = (0.5 if step < 120 else 0.8) * velocity - rate * gains * gradient
        a = a + velocity
    return a


some = np.random.default_rng(0).choice(len(x), 500, replace=False)
p = neighborhoods(x[some], perplexity=30)
start = flat[some] / flat[some].std() * 1e-4
ours = t_sne(p, start)
print(f"KL at the start {divergence(p, start):.3f} nats, at the end {divergence(p, ours):.3f}")

# %% [markdown]
# The library starts from the same coordinates. Its loss is the same quantity; as both maps are local minima, they are not the same point for point, but should be equally good.

# %% tags=["parity"]
from sklearn.manifold import TSNE

library = TSNE(perplexity=30, init=start, learning_rate=50, method="exact", max_iter=500)
theirs = library.fit_transform(x[some])
np.testing.assert_allclose(divergence(p, theirs), library.kl_divergence_, rtol=0.02)
assert divergence(p, ours) < library.kl_divergence_ * 1.1
print(f"KL of our map {divergence(p, ours):.3f}, of scikit-learn's {library.kl_divergence_:.3f}")

# %% tags=["picture"] alt="Three maps of 500 digits, colored by digit: in PCA the classes overlap, in both t-SNE maps most of them are islands of their own; the maps are alike, since both start from PCA."
fig, axes = plt.subplots(1, 3, figsize=(10, 3.6))
maps = {"PCA": flat[some], "our t-SNE": ours, "scikit-learn's t-SNE": theirs}
for ax, (name, points) in zip(axes, maps.items(), strict=True):
    drawn = ax.scatter(*points.T, c=y[some], cmap="tab10", s=8)
    ax.set_title(name)
    ax.axis("off")
fig.colorbar(drawn, ax=axes, label="digit")
plt.show()

# %% [markdown]
# ## Maps of texts
#
# **Maps** of texts need vectors. Here a headline is the mean of the vectors of its tokens, from a table of 32,000 static vectors. Headlines with similar words should be near each other; the nearest neighbors of one headline show how rough that is.

# %%
import json

from safetensors.numpy import load_file
from tokenizers import Tokenizer

import llmworks

folder = llmworks.load("asset:sarcasm-headlines").path
with (folder / "sarcasm.jsonl").open(encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
rng = np.random.default_rng(0)
chosen = [rows[i] for i in rng.choice(len(rows), 900, replace=False)]
headlines = [row["input"][-1]["content"] for row in chosen]

wordllama = llmworks.load("asset:wordllama").path
(table,) = load_file(wordllama / "model.safetensors").values()
tokenizer = Tokenizer.from_file(str(wordllama / "tokenizer.json"))
vectors = np.array(
    [table[e.ids].mean(axis=0) for e in tokenizer.encode_batch(headlines, add_special_tokens=False)],
    dtype=float,
)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
print(vectors.shape)
nearest = np.argsort(-vectors @ vectors[5])[:4]
for i in nearest:
    print(f"{vectors[i] @ vectors[5]:.2f}  {headlines[i]}")

# %%
topics = {
    "Trump": "trump",
    "women": "women",
    "school": "school|college|student|teacher",
    "police": r"police|\bcops?\b|shooting",
}
import re

topic = np.array(
    [
        next((name for name, words in topics.items() if re.search(words, h)), "other")
        for h in headlines
    ]
)
text_p = neighborhoods(vectors, perplexity=20)
text_map = t_sne(text_p, pca(vectors, 2)[0] * 1e-3, steps=600)
print({name: int((topic == name).sum()) for name in (*topics, "other")})

# %% tags=["picture"] alt="Map of 900 headlines: those about Trump and about schools form clusters, those about police and women are scattered among the grey points of all other headlines."
fig, ax = plt.subplots(figsize=(7, 5))
grey = topic == "other"
ax.scatter(*text_map[grey].T, color="lightgrey", s=8, label="other")
for name in topics:
    ax.scatter(*text_map[topic == name].T, s=16, label=name)
ax.set_title("t-SNE of 900 headlines, by words that they hold")
ax.axis("off")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What a map invents
#
# t-SNE can make clumps where there are none: these are 400 points of one Gaussian in 20 dimensions, drawn with three perplexities. And the size of a cluster, and the distance between clusters, mean nothing: every point gets as many neighbors,
# whether it lives in a town or in a desert.

# %% tags=["picture"] alt="Three t-SNE maps of one Gaussian cloud with perplexities 3, 30 and 100: with 3 the points form many small clumps, with 100 one round cloud."
cloud = np.random.default_rng(3).normal(size=(400, 20))
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2))
clumps = {}
for ax, perplexity in zip(axes, (3, 30, 100), strict=True):
    points = t_sne(neighborhoods(cloud, perplexity), pca(cloud, 2)[0] * 1e-4, steps=400)
    gaps = np.sqrt(np.sort(squared_distances(points), axis=1)[:, 1])
    clumps[perplexity] = float(np.median(gaps) / points.std())
    ax.scatter(*points.T, s=5)
    ax.set_title(f"one Gaussian, perplexity {perplexity}")
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Rebuild from components
#
# Write `rebuild(x, dimensions)`: the points as PCA of that many dimensions remembers them, in the original space.


# %% tags=["exercise"]
def rebuild(x, dimensions): ...


# %% tags=["solution"]
def rebuild(x, dimensions):
    coordinates, vectors, _ = pca(x, dimensions)
    return coordinates @ vectors + x.mean(axis=0)


# %% tags=["wrong"]
# says: mean
def rebuild(x, dimensions):
    coordinates, vectors, _ = pca(x, dimensions)
    return coordinates @ vectors


# %% tags=["wrong"]
# says: original space
def rebuild(x, dimensions):
    return pca(x, dimensions)[0]


# %% tags=["check"]
found = rebuild(x, 10)
assert found is not None, "rebuild returns nothing"
assert found.shape == x.shape, (
    f"the shape is {found.shape}, not that of the original space, {x.shape}"
)
assert np.allclose(found.mean(axis=0), x.mean(axis=0)), "the mean was subtracted and not added again"
lost = ((x - found) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
assert np.isclose(lost, variance[10:].sum()), (
    "the error is not the variance of the dropped directions"
)
print(f"right: 10 of 64 directions lose {lost:.1%} of the variance")

# %% [markdown]
# ### 2. How good is a map?
#
# Write `neighbor_recall(high, low, k)`: the mean share of the `k` nearest neighbors in `high` (rows of many dimensions) that are also among the `k` nearest in `low`. A point is no neighbor of itself.


# %% tags=["exercise"]
def neighbor_recall(high, low, k): ...


# %% tags=["solution"]
def neighbor_recall(high, low, k):
    found = [
        np.argsort(squared_distances(z) + np.diag([np.inf] * len(z)), axis=1)[:, :k]
        for z in (high, low)
    ]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*found, strict=True)]))


# %% tags=["wrong"]
# says: itself
def neighbor_recall(high, low, k):
    found = [np.argsort(squared_distances(z), axis=1)[:, :k] for z in (high, low)]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*found, strict=True)]))


# %% tags=["wrong"]
# says: order
def neighbor_recall(high, low, k):
    found = [
        np.argsort(squared_distances(z) + np.diag([np.inf] * len(z)), axis=1)[:, :k]
        for z in (high, low)
    ]
    return float(np.mean(found[0] == found[1]))


# %% tags=["check"]
one = np.arange(6.0)[:, None]
other = np.array([0.0, 5.0, 1.0, 4.0, 2.0, 3.0])[:, None]
found = neighbor_recall(one, other, 1)
assert found is not None, "neighbor_recall returns nothing"
assert found != 1, "every point is its own nearest neighbor, but a point is no neighbor of itself"
swapped = neighbor_recall(np.array([[0.0], [1.0], [3.0]]), np.array([[0.0], [3.0], [1.0]]), 2)
assert found == 0, f"with k = 1 the two neighbors of each point are other ones here, found {found}"
assert swapped == 1, "the order of the neighbors must not count"
assert np.isclose(neighbor_recall(one, one * 2 + 1, 2), 1), (
    "moving and scaling a map changes no neighbors"
)
recalls = {name: neighbor_recall(x[some], points, 10) for name, points in maps.items()}
print("right:", {name: round(value, 2) for name, value in recalls.items()})

# %% [markdown]
# ## Self-test
#
# <details><summary>Why does PCA need centered data?</summary>
#
# Otherwise the first direction points to the mean, and says nothing about the spread.
# </details>
#
# <details><summary>Two clusters of a t-SNE map are far apart. Are their texts very different?</summary>
#
# The map does not say. Distances between clusters have no meaning in it.
# </details>
#
# <details><summary>What does the perplexity set?</summary>
#
# About how many neighbors each point has.
# </details>
#
# ## What surprised us


# %% tags=["measured"]
def recall(high, low, k=10):
    near = [
        np.argsort(squared_distances(z) + np.diag([np.inf] * len(z)), axis=1)[:, :k]
        for z in (high, low)
    ]
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)])


keep = {name: recall(x[some], points) for name, points in maps.items()}
display(
    Markdown(
        f"The map of PCA keeps {keep['PCA']:.0%} of the ten nearest neighbors, t-SNE {keep['our t-SNE']:.0%}: even the good map loses {1 - keep['our t-SNE']:.0%}. Two dimensions are few. "
        f"And with a perplexity of 3 the median distance to the nearest point is {clumps[3] / clumps[100]:.0%} of that with 100: the clumps are made by the method; the data are one cloud. "
        "Before you name a cluster, draw the map with another perplexity and another start."
    )
)

# %% [markdown]
# ## In llmworks
#
# `data map` clusters documents and writes an interactive page that works offline, with a picture and the words of each cluster:
#
# ```
# llmworks data map --data documents --out map
# ```
#
# ## Go on
#
# - L. van der Maaten and G. Hinton, *Visualizing data using t-SNE* (2008)
# - M. Wattenberg, F. Viégas and I. Johnson, *How to use t-SNE effectively* (2016)
# - Next: [F09 A neuron](F09_backpropagation.ipynb)
