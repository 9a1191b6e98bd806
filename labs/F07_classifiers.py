# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Build the six classical models from nothing, and recognize classifiers by the boundaries that they draw.
#     minutes: 80
#     budget_seconds: 60
#     needs: [F02, F06]
#     topics: [scikit-learn, linear regression, logistic regression, decision trees, random forests, k-nearest neighbors, k-means]
# ---

# %% [markdown]
# # F07 scikit-learn: six classical models
#
# **You will learn**: Build the six classical models from nothing, and recognize classifiers by the boundaries that they draw.
#
# **Time**: 80 minutes to read and to do the exercises.
#
# **Needs**: [F02](F02_calculus.ipynb), [F06](F06_preprocessing.ipynb).

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
# ## The data
#
# **scikit-learn** gives every model the same face: `fit(x, y)`, `predict(x)`, `score(x, y)`. The digits are 1,797 pictures of 8 × 8 pixels. For pictures of what the models do, there is also
# a set with two columns: two interleaved half moons.

# %%
import numpy as np
from sklearn.datasets import load_digits, make_moons
from sklearn.model_selection import train_test_split

digits = load_digits()
x_train, x_test, y_train, y_test = train_test_split(
    digits.data / 16, digits.target, test_size=0.4, random_state=0, stratify=digits.target
)
moons, side = make_moons(300, noise=0.3, random_state=0)
print(f"digits: {x_train.shape} to train, {x_test.shape} to test; moons: {moons.shape}")

# %% [markdown]
# ## Linear regression
#
# **Linear regression** predicts a number: $\hat t = x \cdot w + b$. The weights with the smallest squared error solve the *normal equations* $X^\top X w = X^\top t$, where $X$ has a column of ones for $b$. Here it
# predicts the amount of ink in the right half of a digit from the pixels of the left half.


# %%
def fit_linear(x, t):
    """Return weights and bias with the smallest squared error."""
    ones = np.column_stack([x, np.ones(len(x))])
    w = np.linalg.lstsq(ones, t, rcond=None)[0]
    return w[:-1], w[-1]


def halves(x):
    pictures = x.reshape(-1, 8, 8)
    return pictures[:, :, :4].reshape(len(x), -1), pictures[:, :, 4:].sum(axis=(1, 2))


left, ink = halves(x_train)
w, b = fit_linear(left, ink)
left_test, ink_test = halves(x_test)
residual = ink_test - (left_test @ w + b)
print(f"error {residual.std():.3f}, spread of the target {ink_test.std():.3f} (units of full ink)")
print(f"explained variance (R²): {1 - residual.var() / ink_test.var():.3f}")

# %% [markdown]
# ## Logistic regression
#
# **Logistic regression** predicts a probability: $p = \sigma(x \cdot w + b)$ with $\sigma(z) = 1 / (1 + e^{-z})$. It minimizes the cross-entropy $L$ (lab F02), here with a penalty on large weights. There is no formula for the best weights. *Newton's method* takes steps $w \leftarrow w - H^{-1} \nabla L$ with the matrix $H$ of second
# derivatives, and needs a handful of them.


# %%
def fit_logistic(x, t, penalty=1.0, steps=12):
    """Return weights and bias; penalty / 2 times the squared weights is added to the loss."""
    ones = np.column_stack([x, np.ones(len(x))])
    w = np.zeros(ones.shape[1])
    shrink = np.diag([penalty] * x.shape[1] + [0.0])  # the bias is not shrunk
    for _ in range(steps):
        p = 1 / (1 + np.exp(-ones @ w))
        gradient = ones.T @ (p - t) + shrink @ w
        hessian = (ones * (p * (1 - p))[:, None]).T @ ones + shrink
        w -= np.linalg.solve(hessian, gradient)
    return w[:-1], w[-1]


w_moons, b_moons = fit_logistic(moons, side)
print("weights", w_moons.round(4), "bias", round(b_moons, 4))
print("right on the moons:", np.mean((moons @ w_moons + b_moons > 0) == side).round(3))

# %% [markdown]
# ## Decision trees
#
# **Decision trees** ask one question at a time: is column $j$ below a threshold? The best question leaves the purest parts. *Gini impurity* of a part is $1 - \sum_c p_c^2$: the probability that two random rows
# of it have different classes. Then each part is split again, until it is pure or the tree is deep enough.


# %%
def gini(counts):
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return 1 - (shares**2).sum(axis=-1)


def best_split(x, y, classes):
    """Return (impurity, column, threshold) of the best question."""
    best = (gini(np.bincount(y, minlength=classes)), None, None)
    for column in range(x.shape[1]):
        order = np.argsort(x[:, column], kind="stable")
        values = x[order, column]
        below = np.cumsum(np.eye(classes)[y[order]], axis=0)[:-1]
        above = np.bincount(y, minlength=classes) - below
        size = np.arange(1, len(y))
        impurity = (size * gini(below) + (len(y) - size) * gini(above)) / len(y)
        impurity[values[1:] == values[:-1]] = np.inf  # equal values cannot be separated
        place = int(np.argmin(impurity)) if len(impurity) else 0
        if len(impurity) and impurity[place] < best[0] - 1e-12:
            best = (impurity[place], column, (values[place] + values[place + 1]) / 2)
    return best


def grow(x, y, classes, depth):
    """Return a tree: a class, or (column, threshold, tree below, tree above)."""
    _, column, threshold = best_split(x, y, classes) if depth else (0, None, None)
    if column is None:
        return int(np.bincount(y, minlength=classes).argmax())
    low = x[:, column] <= threshold
    return (
        int(column),
        round(float(threshold), 6),
        grow(x[low], y[low], classes, depth - 1),
        grow(x[~low], y[~low], classes, depth - 1),
    )


def ask(tree, row):
    while isinstance(tree, tuple):
        column, threshold, low, high = tree
        tree = low if row[column] <= threshold else high
    return tree


tree = grow(moons, side, 2, depth=3)
print(tree)
print("right on the moons:", np.mean([ask(tree, row) for row in moons] == side).round(3))

# %% [markdown]
# ## Random forests
#
# **Random forests** average many deep trees, each grown on rows drawn with replacement (*bagging*) and on a few random columns per question. Single trees are wrong in different ways, and their errors cancel in the average. Below, our
# trees vote; for speed each one sees a random eighth of the columns.


# %%
def grow_forest(x, y, classes, trees, depth, seed=0):
    """Return (columns, tree) pairs."""
    rng = np.random.default_rng(seed)
    forest = []
    for _ in range(trees):
        rows = rng.integers(0, len(x), len(x))
        columns = rng.choice(x.shape[1], max(2, x.shape[1] // 8), replace=False)
        forest.append((columns, grow(x[rows][:, columns], y[rows], classes, depth)))
    return forest


def vote(forest, x, classes):
    votes = np.zeros((len(x), classes))
    for columns, one in forest:
        answers = [ask(one, row) for row in x[:, columns]]
        votes[np.arange(len(x)), answers] += 1
    return votes.argmax(axis=1)


forest = grow_forest(x_train, y_train, 10, trees=30, depth=8)
single = [ask(forest[0][1], row) for row in x_test[:, forest[0][0]]]
print("one tree of the forest:", np.mean(single == y_test).round(3))
print("30 trees vote:         ", np.mean(vote(forest, x_test, 10) == y_test).round(3))

# %% [markdown]
# ## Neighbors and clusters
#
# **k-nearest neighbors** learn nothing: the answer is the commonest class among the $k$ nearest training rows. **k-means** has no labels at all: it finds $k$ centers, by two steps in turn. Each row goes to its nearest
# center; each center moves to the mean of its rows. *Purity* is the share of rows whose digit is the commonest one of their cluster. The summed squared distance (*inertia*) falls in both steps, so it ends.


# %%
def neighbors(x, y, queries, k):
    distance = (queries**2).sum(1)[:, None] - 2 * queries @ x.T + (x**2).sum(1)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.array([np.bincount(row).argmax() for row in y[nearest]])


def k_means(x, centers, steps=100):
    """Return centers, the cluster of each row, and the inertia."""
    for _ in range(steps):
        distance = ((x[:, None] - centers) ** 2).sum(-1)
        cluster = distance.argmin(axis=1)
        moved = np.array([x[cluster == c].mean(axis=0) for c in range(len(centers))])
        if np.allclose(moved, centers):
            break
        centers = moved
    distance = ((x[:, None] - centers) ** 2).sum(-1)
    return centers, distance.argmin(axis=1), distance.min(axis=1).sum()


start = x_train[:10]
centers, cluster, inertia = k_means(x_train, start)
purity = sum(np.bincount(y_train[cluster == c]).max() for c in range(10)) / len(y_train)
print("5 nearest neighbors:", np.mean(neighbors(x_train, y_train, x_test, 5) == y_test).round(3))
print(f"k-means without labels: inertia {inertia:.2f}, purity of the clusters {purity:.3f}")

# %% tags=["parity"]
from sklearn.cluster import KMeans
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

linear = LinearRegression().fit(left, ink)
np.testing.assert_allclose(left_test @ w + b, linear.predict(left_test), atol=1e-6)
logistic = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(moons, side)
np.testing.assert_allclose(w_moons, logistic.coef_[0], atol=1e-4)
library_tree = DecisionTreeClassifier(max_depth=3, random_state=0).fit(moons, side)
np.testing.assert_array_equal([ask(tree, row) for row in moons], library_tree.predict(moons))
knn = KNeighborsClassifier(5, algorithm="brute").fit(x_train, y_train)
assert np.mean(neighbors(x_train, y_train, x_test, 5) == knn.predict(x_test)) > 0.998  # ties
means = KMeans(10, init=start, n_init=1).fit(x_train)
np.testing.assert_allclose(inertia, means.inertia_, rtol=1e-3)
print("our five models give scikit-learn's predictions (a forest is random: no two are alike)")

# %% tags=["picture"] alt="Decision regions of six models on two interleaved half moons: a straight line for logistic regression, rectangles for the tree, smoothed rectangles for the forest, ragged islands for one neighbor, a smooth curve for fifteen, and two halves for k-means, whose colors are arbitrary, as its clusters have no names."
from sklearn.ensemble import RandomForestClassifier

models = {
    "logistic regression": logistic,
    "tree, depth 3": library_tree,
    "forest, 100 trees": RandomForestClassifier(100, random_state=0).fit(moons, side),
    "1 neighbor": KNeighborsClassifier(1).fit(moons, side),
    "15 neighbors": KNeighborsClassifier(15).fit(moons, side),
    "k-means, 2 centers": KMeans(2, n_init=4, random_state=0).fit(moons),
}
gx, gy = np.meshgrid(np.linspace(-2, 3, 150), np.linspace(-1.6, 2, 120))
plane = np.column_stack([gx.ravel(), gy.ravel()])
fig, axes = plt.subplots(2, 3, figsize=(9.5, 5.5), sharex=True, sharey=True)
for ax, (name, model) in zip(axes.flat, models.items(), strict=True):
    ax.contourf(gx, gy, model.predict(plane).reshape(gx.shape), alpha=0.35, cmap="coolwarm")
    ax.scatter(*moons.T, c=side, cmap="coolwarm", s=6)
    ax.set_title(name)
fig.supxlabel("first column (no unit)")
fig.supylabel("second column (no unit)")
plt.show()

# %% [markdown]
# ## Bias and variance
#
# A model that is too simple misses the shape (*bias*); one that is too flexible learns the noise (*variance*). The score on the training set does not fall with flexibility; the score on new rows has a maximum.

# %% tags=["picture"] alt="Accuracy against the depth of a tree, on training and new rows of the moons: on training rows it rises to 1, on new rows it has a maximum at a small depth and then falls."
fresh, fresh_side = make_moons(4000, noise=0.3, random_state=1)
depths = range(1, 16)
seen, unseen = [], []
for depth in depths:
    model = DecisionTreeClassifier(max_depth=depth, random_state=0).fit(moons, side)
    seen.append(model.score(moons, side))
    unseen.append(model.score(fresh, fresh_side))
fig, ax = plt.subplots()
ax.plot(depths, seen, "o-", label="300 training rows")
ax.plot(depths, unseen, "o-", label="4,000 new rows")
ax.set(xlabel="depth of the tree (questions)", ylabel="accuracy (share)")
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Impurity of a question
#
# Write `split_impurity(y, mask)`: the mean Gini impurity of the parts `y[mask]` and `y[~mask]`, weighted by their sizes. An empty part has weight 0.


# %% tags=["exercise"]
def split_impurity(y, mask): ...


# %% tags=["solution"]
def split_impurity(y, mask):
    parts = [part for part in (y[mask], y[~mask]) if len(part)]
    return sum(len(part) * gini(np.bincount(part)) for part in parts) / len(y)


# %% tags=["wrong"]
# says: sizes
def split_impurity(y, mask):
    return (gini(np.bincount(y[mask])) + gini(np.bincount(y[~mask]))) / 2


# %% tags=["wrong"]
# says: divide
def split_impurity(y, mask):
    parts = [part for part in (y[mask], y[~mask]) if len(part)]
    return sum(len(part) * gini(np.bincount(part)) for part in parts)


# %% tags=["check"]
labels, mask = np.array([0, 0, 0, 1, 1, 1, 1, 2]), np.array([True] * 3 + [False] * 5)
found = split_impurity(labels, mask)
assert found is not None, "split_impurity returns nothing"
assert not np.isclose(found, 0.16), (
    "a mean of both parts, whatever their sizes: weight them by len(part)"
)
assert not np.isclose(found, 1.6), "the weighted sum: divide by the number of rows"
assert np.isclose(found, 0.2), f"expected 0.2, found {found}"
assert np.isclose(split_impurity(labels, mask | True), gini(np.bincount(labels))), (
    "an empty part has weight 0"
)
print("right")

# %% [markdown]
# ### 2. Ridge regression
#
# Write `fit_ridge(x, t, penalty)`: weights and bias that minimize the summed squared error plus `penalty` times the sum of the squared *weights* (not the bias). Hint: center `x` and `t` first; then
# $w = (X^\top X + \lambda I)^{-1} X^\top t$.


# %% tags=["exercise"]
def fit_ridge(x, t, penalty): ...


# %% tags=["solution"]
def fit_ridge(x, t, penalty):
    centered = x - x.mean(axis=0)
    w = np.linalg.solve(
        centered.T @ centered + penalty * np.eye(x.shape[1]), centered.T @ (t - t.mean())
    )
    return w, t.mean() - x.mean(axis=0) @ w


# %% tags=["wrong"]
# says: bias was shrunk
def fit_ridge(x, t, penalty):
    ones = np.column_stack([x, np.ones(len(x))])
    w = np.linalg.solve(ones.T @ ones + penalty * np.eye(ones.shape[1]), ones.T @ t)
    return w[:-1], w[-1]


# %% tags=["wrong"]
# says: penalty
def fit_ridge(x, t, penalty):
    return fit_linear(x, t)


# %% tags=["check"]
from sklearn.linear_model import Ridge

result = fit_ridge(left, ink, 30.0)
assert result is not None, "fit_ridge returns nothing"
expected = Ridge(alpha=30.0).fit(left, ink)
assert not np.allclose(result[0], w), "the weights are those without a penalty"
assert len(result) == 2, "return weights and bias, two values"
assert not np.isclose(result[1], ink.mean()), (
    "the bias is not the mean of t: subtract the mean of x times w"
)
assert np.allclose(result[0], expected.coef_, rtol=0.05), (
    "the weights are wrong, or the bias was shrunk, too"
)
assert abs(result[1] - expected.intercept_) < 1e-6, "the bias is wrong: it must not be shrunk"
print(
    "right: the weights shrink from",
    np.linalg.norm(w).round(2),
    "to",
    np.linalg.norm(result[0]).round(2),
)

# %% [markdown]
# ### 3. Choose k
#
# Write `choose_k(x, y, candidates, folds=5)`: the number of neighbors with the best accuracy in cross-validation on the training rows; row $i$ belongs to fold $i \bmod 5$. Of equal ones take the smallest.


# %% tags=["exercise"]
def choose_k(x, y, candidates, folds=5): ...


# %% tags=["solution"]
def choose_k(x, y, candidates, folds=5):
    fold = np.arange(len(x)) % folds
    scores = {}
    for k in sorted(candidates):
        right = [
            neighbors(x[fold != f], y[fold != f], x[fold == f], k) == y[fold == f]
            for f in range(folds)
        ]
        scores[k] = np.concatenate(right).mean()
    return max(scores, key=scores.get)


# %% tags=["wrong"]
# says: own judge
def choose_k(x, y, candidates, folds=5):
    return max(sorted(candidates), key=lambda k: np.mean(neighbors(x, y, x, k) == y))


# %% tags=["wrong"]
# says: worst
def choose_k(x, y, candidates, folds=5):
    fold = np.arange(len(x)) % folds
    scores = {}
    for k in sorted(candidates):
        right = [
            neighbors(x[fold != f], y[fold != f], x[fold == f], k) == y[fold == f]
            for f in range(folds)
        ]
        scores[k] = np.concatenate(right).mean()
    return min(scores, key=scores.get)


# %% tags=["check"]
found = choose_k(moons, side, [1, 15, 299])
assert found is not None, "choose_k returns nothing"
assert found != 1, "each row is its own nearest neighbor: a row may not be its own judge"
assert found != 299, "this is the worst candidate"
assert found == 15, f"expected 15, found {found}"
print("right; for the digits:", choose_k(x_train[:500], y_train[:500], [1, 3, 5, 9, 15]))

# %% [markdown]
# ## Self-test
#
# <details><summary>Which of the models need scaled columns?</summary>
#
# Neighbors and k-means, which measure distances, and penalized regressions. Trees and forests do not.
# </details>
#
# <details><summary>Why does k-means have to be started several times?</summary>
#
# It ends in a local minimum that depends on the first centers.
# </details>
#
# <details><summary>A forest is right for all training rows. Is it overfitted?</summary>
#
# The training score says nothing here: deep trees remember their rows. Look at rows that a tree did not draw, or at a test set.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
best = int(np.argmax(unseen))
nearest = np.mean(neighbors(x_train, y_train, x_test, 1) == y_test)
one, fifteen = (models[name].score(fresh, fresh_side) for name in ("1 neighbor", "15 neighbors"))
trees = RandomForestClassifier(200, random_state=0).fit(x_train, y_train).score(x_test, y_test)
display(
    Markdown(
        f"One nearest neighbor, a method without any training, reads {nearest:.1%} of the digits; a forest of 200 trees reads {trees:.1%}. On the moons the same method is right for {one:.1%} of new rows, since each noisy row is an island; 15 neighbors for {fifteen:.1%}. "
        f"And the tree that knows every training row ({seen[-1]:.0%} at depth {depths[-1]}) is right for {unseen[-1]:.1%} of new rows, less than the one of depth {depths[best]} ({unseen[best]:.1%})."
    )
)

# %% [markdown]
# ## In llmworks
#
# `data classify` trains a quality classifier on documents and keeps the best ones:
#
# ```
# llmworks data classify --good textbooks --bad spam --data documents --out scored
# ```
#
# ## Go on
#
# - T. Hastie, R. Tibshirani and J. Friedman, *The Elements of Statistical Learning* (2009)
# - L. Breiman, *Random forests* (2001)
# - Next: [F08 Maps](F08_maps.ipynb)
