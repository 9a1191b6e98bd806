# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Compute with whole arrays in NumPy, ask tables questions in pandas, and draw with Matplotlib and seaborn.
#     minutes: 60
#     budget_seconds: 60
#     needs: [F00, F01]
#     assets: [sarcasm-headlines]
#     topics: [NumPy, broadcasting, pandas, Matplotlib, seaborn]
# ---

# %% [markdown]
# # F05 NumPy, pandas, Matplotlib, seaborn: 28,000 headlines as columns
#
# **You will learn**: Compute with whole arrays in NumPy, ask tables questions in pandas, and draw with Matplotlib and seaborn.
#
# **Time**: one hour to read and to do the exercises.
#
# **Needs**: [F00](F00_python.ipynb), [F01](F01_linear_algebra.ipynb).

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
# ## Arrays
#
# **NumPy** stores numbers of one type side by side in memory and loops over them in compiled code. An array has a `shape`, a `dtype` and `strides`: how many
# bytes to the next element along each axis. A slice or a transpose is a *view*: other strides over the same memory, nothing is copied.

# %%
import numpy as np

x = np.arange(12, dtype=np.float32).reshape(3, 4)
print(x)
print("shape", x.shape, "dtype", x.dtype, "strides", x.strides, "bytes")
print("transposed: strides", x.T.strides, "shares memory:", np.shares_memory(x, x.T))
x[:, 1] = -1  # a slice is a view: this changes x
x[x > 8] = 0  # a mask chooses elements
print(x)

# %% [markdown]
# ## Broadcasting
#
# **Broadcasting** combines arrays of different shapes: shapes are aligned at the right, and an axis of length 1 is repeated. A column of shape `(n, 1)` with a row of
# shape `(m,)` gives a table of shape `(n, m)`. All pairs of distances are one expression; `points[:, None, :]` inserts an axis of length 1.

# %%
rng = np.random.default_rng(0)
points = rng.normal(size=(400, 3))


def distances_by_loops(points):
    """Return all distances, element by element."""
    n, dimensions = len(points), len(points[0])
    found = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            total = 0.0
            for k in range(dimensions):
                total += (points[i][k] - points[j][k]) ** 2
            found[i][j] = total**0.5
    return found


def distances(points):
    """Return all distances: (n, 1, 3) minus (n, 3) is (n, n, 3)."""
    difference = points[:, None, :] - points
    return np.sqrt((difference**2).sum(axis=-1))


# %% tags=["parity"]
from scipy.spatial.distance import cdist

np.testing.assert_allclose(
    distances_by_loops(points[:40]), cdist(points[:40], points[:40]), atol=1e-9
)
np.testing.assert_allclose(distances(points), cdist(points, points), atol=1e-9)
print("loops, broadcasting and scipy.spatial.distance.cdist agree")

# %%
import time


def measure(function, *arguments, repeats=3):
    """Return the shortest time of some calls, in seconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - began)
    return min(times)


seconds = {
    "Python loops": measure(distances_by_loops, points[:200].tolist()),
    "broadcasting": measure(distances, points[:200]),
    "scipy cdist": measure(cdist, points[:200], points[:200]),
}
for name, value in seconds.items():
    print(f"{name:<14} {value * 1e3:9.2f} ms")

# %% [markdown]
# ## Tables
#
# **pandas** names columns and rows. A `DataFrame` is a set of columns of different types, all of one length. Read the headlines, and derive columns from columns.

# %%
import json

import pandas as pd

import llmworks

folder = llmworks.load("asset:sarcasm-headlines").path
with (folder / "sarcasm.jsonl").open(encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
table = pd.DataFrame(
    {
        "headline": [row["input"][-1]["content"] for row in rows],
        "source": ["The Onion" if row["ideal"] == "1" else "newspaper" for row in rows],
    }
)
table["words"] = table["headline"].str.split().str.len()
table["word_length"] = table["headline"].str.replace(" ", "").str.len() / table["words"]
table["has_number"] = table["headline"].str.contains(r"\d", regex=True)
table.head(4)

# %% [markdown]
# A question to a table is a chain of steps. `groupby` is what SQL calls GROUP BY; `agg` computes one number for each group.

# %%
summary = table.groupby("source").agg(
    headlines=("headline", "size"),
    mean_words=("words", "mean"),
    median_words=("words", "median"),
    with_number=("has_number", "mean"),
)
summary.round(3)

# %% [markdown]
# Which first words give The Onion away? `crosstab` counts pairs of values; the table shows the extremes among words that open 80 headlines or more.

# %%
first = table["headline"].str.split().str[0]
openings = pd.crosstab(first, table["source"])
openings["total"] = openings.sum(axis=1)
openings["onion_share"] = openings["The Onion"] / openings["total"]
often = openings[openings["total"] >= 80].sort_values("onion_share")
pd.concat([often.head(4), often.tail(4)]).round(3)

# %% [markdown]
# Look for what is wrong with the data before you believe a number: duplicates, empty cells, impossible values.

# %%
doubled = table.duplicated("headline").sum()
print("duplicate headlines:", doubled, "· empty:", (table["words"] == 0).sum())
print("missing cells:", int(table.isna().sum().sum()))
longest = table.loc[table["words"].idxmax()]
print(f"longest: {longest['words']} words: {longest['headline'][:90]}...")
clean = table.drop_duplicates("headline")
clean = clean[clean["words"] < 40]
print(len(table), "rows before,", len(clean), "after")

# %% [markdown]
# ## Matplotlib
#
# **Matplotlib** draws a `Figure` that holds `Axes`; every method of an axes adds something to it. Label both axes, with the unit. A legend names each line.

# %% tags=["picture"] alt="Two panels: on the left, bars of the share of headlines by number of words, The Onion has a longer tail; on the right, the time of three ways to compute distances on a logarithmic axis."
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
bins = np.arange(0.5, 26)
for source, group in clean.groupby("source"):
    left.hist(group["words"], bins=bins, density=True, alpha=0.5, label=source)
left.set(xlabel="length (words)", ylabel="share of headlines (per word)")
left.legend()
right.barh(list(seconds), [value * 1e3 for value in seconds.values()])
right.set(xscale="log", xlabel="time for 200 points (ms)", ylabel="method (one thread)")
plt.show()

# %% [markdown]
# ## seaborn
#
# **seaborn** draws tables: name the columns, and it groups, colors and aggregates, with intervals.

# %% tags=["picture"] alt="Share of headlines of The Onion against the number of words, with intervals: it lies between four and six tenths up to 13 words and rises to nearly nine tenths for 18 words and more."
import seaborn

clean = clean.assign(onion=(clean["source"] == "The Onion").astype(float))
grouped = clean[clean["words"].between(3, 20)]
fig, ax = plt.subplots()
seaborn.pointplot(data=grouped, x="words", y="onion", errorbar=("ci", 95), n_boot=200, seed=0, ax=ax)
ax.set(xlabel="length (words)", ylabel="headlines of The Onion (share)")
plt.show()

# %% tags=["picture"] alt="Contours of the joint distribution of the number of words and the mean word length, for both sources: they overlap almost wholly, shorter headlines have longer words."
fig, ax = plt.subplots()
sample = clean.sample(4000, random_state=0)
seaborn.kdeplot(data=sample, x="words", y="word_length", hue="source", levels=5, ax=ax)
ax.set(xlabel="length (words)", ylabel="mean word length (letters)", xlim=(0, 22), ylim=(2, 9))
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Standardize columns
#
# Write `standardize(x)`: subtract each column's mean and divide by its standard deviation, for a matrix of rows × columns. A constant column becomes 0.


# %% tags=["exercise"]
def standardize(x): ...


# %% tags=["solution"]
def standardize(x):
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread == 0, 1, spread)


# %% tags=["wrong"]
# says: whole matrix
def standardize(x):
    return (x - x.mean()) / x.std()


# %% tags=["wrong"]
# says: constant
def standardize(x):
    with np.errstate(all="ignore"):
        return (x - x.mean(axis=0)) / x.std(axis=0)


# %% tags=["wrong"]
# says: rows
def standardize(x):
    return (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)


# %% tags=["check"]
test = np.array([[1.0, 10.0, 5.0], [2.0, 30.0, 5.0], [3.0, 80.0, 5.0]])
found = standardize(test)
assert found is not None, "standardize returns nothing"
assert not np.isnan(found).any(), "a constant column gives nan: 0 / 0"
assert not np.allclose(found.mean(axis=1), 0), (
    "each row was standardized, not each column: axis=0 runs over rows"
)
whole = np.isclose(found.mean(), 0) and np.isclose(found.std(), 1)
assert not whole, (
    "the whole matrix was standardized: use axis=0, so that each column has its own mean"
)
assert np.allclose(found[:, 2], 0), "a constant column becomes 0"
assert np.allclose(found[:, :2].mean(axis=0), 0), "the columns' means are not 0"
assert np.allclose(found[:, :2].std(axis=0), 1), "the columns' standard deviations are not 1"
print("right")

# %% [markdown]
# ### 2. Nearest neighbors
#
# Write `nearest(queries, points)`: for each row of `queries`, the number of the nearest row of `points`, without a loop.


# %% tags=["exercise"]
def nearest(queries, points): ...


# %% tags=["solution"]
def nearest(queries, points):
    difference = queries[:, None, :] - points
    return (difference**2).sum(axis=-1).argmin(axis=1)


# %% tags=["wrong"]
# says: for each point
def nearest(queries, points):
    difference = queries[:, None, :] - points
    return (difference**2).sum(axis=-1).argmin(axis=0)


# %% tags=["wrong"]
# says: negative
def nearest(queries, points):
    difference = queries[:, None, :] - points
    return difference.sum(axis=-1).argmin(axis=1)


# %% tags=["check"]
queries = rng.normal(size=(50, 3))
found = nearest(queries, points)
assert found is not None, "nearest returns nothing"
assert np.shape(found) != (400,), (
    "one answer for each point, not for each query: argmin over the other axis"
)
assert np.shape(found) == (50,), f"50 numbers are needed, found shape {np.shape(found)}"
wanted = cdist(queries, points).argmin(axis=1)
assert found.dtype.kind == "i", "return the number of the nearest row, not its distance: argmin"
assert np.mean(found == cdist(queries, points).argmax(axis=1)) < 0.5, (
    "these are the farthest rows: argmin"
)
assert np.mean(found == wanted) > 0.5, (
    "negative differences cancel positive ones: square them before the sum"
)
assert np.array_equal(found, wanted), "some neighbors are not the nearest"
print("right")

# %% [markdown]
# ### 3. A question to the table
#
# Write `telltale_words(table, minimum)`: a `Series` that maps each word that occurs in at least `minimum` headlines to the share of these headlines that are
# from The Onion, the largest first. Count a word once per headline. `Series.explode` makes one row of each list element.


# %% tags=["exercise"]
def telltale_words(table, minimum): ...


# %% tags=["solution"]
def telltale_words(table, minimum):
    words = table.assign(word=table["headline"].str.split().map(set)).explode("word")
    grouped = (words["source"] == "The Onion").groupby(words["word"]).agg(["size", "mean"])
    return grouped.loc[grouped["size"] >= minimum, "mean"].sort_values(ascending=False)


# %% tags=["wrong"]
# says: once per headline
def telltale_words(table, minimum):
    words = table.assign(word=table["headline"].str.split()).explode("word")
    grouped = (words["source"] == "The Onion").groupby(words["word"]).agg(["size", "mean"])
    return grouped.loc[grouped["size"] >= minimum, "mean"].sort_values(ascending=False)


# %% tags=["wrong"]
# says: largest
def telltale_words(table, minimum):
    words = table.assign(word=table["headline"].str.split().map(set)).explode("word")
    grouped = (words["source"] == "The Onion").groupby(words["word"]).agg(["size", "mean"])
    return grouped.loc[grouped["size"] >= minimum, "mean"].sort_values()


# %% tags=["check"]
small = pd.DataFrame(
    {
        "headline": ["man eats man", "man sleeps", "no no vote", "area man votes", "man elected"],
        "source": ["The Onion", "The Onion", "newspaper", "The Onion", "newspaper"],
    }
)
found = telltale_words(small, 1)
assert found is not None, "telltale_words returns nothing"
assert not np.isclose(found["man"], 0.8), (
    "'man' stands twice in a headline: count it once per headline"
)
assert found.iloc[0] == 1, "the largest share comes first"
assert list(telltale_words(small, 2).index) == ["man"], (
    "words in fewer headlines than the minimum are left out"
)
assert np.isclose(found["man"], 0.75), (
    f"'man' is in 3 headlines of The Onion of 4, found {found['man']}"
)
assert "no" not in telltale_words(small, 2), "count the headlines with a word, not its occurrences"
print("right:", telltale_words(clean, 100).head(5).round(2).to_dict())

# %% [markdown]
# ## Self-test
#
# <details><summary>What is the shape of an array of shape (5, 1) plus one of shape (3,)?</summary>
#
# (5, 3).
# </details>
#
# <details><summary>y = x[:, 0]; y[:] = 0. Did x change?</summary>
#
# Yes: a slice is a view. `x[:, [0]]`, with a list, makes a copy.
# </details>
#
# <details><summary>Which of a mean and a median does one headline of 150 words move?</summary>
#
# The mean. The median depends on the middle of the sorted values only.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
ratio = seconds["Python loops"] / seconds["broadcasting"]
compiled = seconds["broadcasting"] / seconds["scipy cdist"]
temporary = 200 * 200 * 3 * 8 / 1e6
display(
    Markdown(
        f"Broadcasting is {ratio:.0f} times as fast as loops in Python, but it writes a temporary array of {temporary:.0f} MB for 200 points; for 100,000 points it would be {100_000**2 * 24 / 1e9:.0f} GB. "
        f"`cdist`, which keeps no temporary array, is {compiled:.0f} times as fast again. What is written to memory and read again costs more than the arithmetic; flash attention is fast for the same reason.\n\n"
        f"And the data have {doubled} duplicate headlines and a 'headline' of {longest['words']} words. Both would have been in a training set that nobody looked at."
    )
)

# %% [markdown]
# ## In llmworks
#
# `data query` reads the rows of an SQL query as documents; `data dedup` finds exact and near duplicates, with a report:
#
# ```
# llmworks data read --data asset:wikipedia-sample --set text_field=0 --out articles
# llmworks data dedup --data articles --out unique
# ```
#
# ## Go on
#
# - C. R. Harris and others, *Array programming with NumPy* (2020)
# - W. McKinney, *Python for Data Analysis* (2022)
# - Next: [F06 Preprocessing](F06_preprocessing.ipynb)
