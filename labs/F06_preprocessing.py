# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Prepare columns for a model without telling it anything about the test set.
#     minutes: 50
#     budget_seconds: 60
#     needs: [F04, F05]
#     topics: [scaling, normalization, missing values, outliers, encoding, splits, leakage]
# ---

# %% [markdown]
# # F06 Preprocessing: fit on the training set only
#
# **You will learn**: Prepare columns for a model without telling it anything about the test set.
#
# **Time**: 50 minutes to read and to do the exercises.
#
# **Needs**: [F04](F04_statistics.ipynb), [F05](F05_arrays_and_tables.ipynb).

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
# ## Splits
#
# **Splits** come first, before anything is computed from the data. The *training* set teaches, the *validation* set chooses between models and settings, the *test* set is
# looked at once. A split is *stratified* when all parts have the same shares of classes, and *grouped* when rows that belong together (one patient, one document, one
# function) stay in one part. *Cross-validation* splits several times: in each of ten folds, nine tenths train and one tenth tests.
#
# The data: 178 wines of three cultivars, with 13 chemical measures.

# %%
import numpy as np
import pandas as pd
from sklearn.datasets import load_wine

wine = load_wine(as_frame=True)
x, y = wine.data, wine.target.to_numpy()


def split(labels, share, seed):
    """Return the rows of a training and a test set with equal shares of each class."""
    rng = np.random.default_rng(seed)
    test = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        test.extend(rows[: round(share * len(rows))])
    test = np.sort(test)
    return np.setdiff1d(np.arange(len(labels)), test), test


train, test = split(y, 0.3, seed=0)
print(f"{len(train)} wines to train, {len(test)} to test, in common: {len(set(train) & set(test))}")
for name, rows in (("train", train), ("test", test)):
    print(name, "shares of the classes:", (np.bincount(y[rows]) / len(rows)).round(3))
x.iloc[train, [0, 3, 4, 7, 12]].describe().loc[["mean", "std", "min", "max"]].round(2)

# %% [markdown]
# ## Scaling
#
# Proline has a spread of hundreds, other columns one below 1. Models that measure distances, or that are trained by gradients, see only the large column. **Scaling** gives columns equal
# weight. *Standardization*: $(x - \mu)/\sigma$. **Normalization** to a range: $(x - \min)/(\max - \min)$. The parameters are *fitted* on the training set, and then *applied* to both.


# %%
class Standardizer:
    """Subtract the mean and divide by the standard deviation of the training set."""

    def fit(self, x):
        self.mean, self.spread = np.mean(x, axis=0), np.std(x, axis=0)
        return self

    def transform(self, x):
        return (np.asarray(x) - self.mean) / self.spread


class MinMax:
    """Map the range of the training set to 0 to 1; test values may lie outside."""

    def fit(self, x):
        self.low, self.high = np.min(x, axis=0), np.max(x, axis=0)
        return self

    def transform(self, x):
        return (np.asarray(x) - self.low) / (self.high - self.low)


x_train, x_test = x.to_numpy()[train], x.to_numpy()[test]
scaled = MinMax().fit(x_train).transform(x_test)
print(f"test values after min-max scaling: {scaled.min():.2f} to {scaled.max():.2f}")

# %% tags=["parity"]
from sklearn.preprocessing import MinMaxScaler, StandardScaler

for ours, library in ((Standardizer(), StandardScaler()), (MinMax(), MinMaxScaler())):
    expected = library.fit(x_train).transform(x_test)
    np.testing.assert_allclose(ours.fit(x_train).transform(x_test), expected)
print("our scalers are those of sklearn.preprocessing")

# %% tags=["picture"] alt="Accuracy of four classifiers on wine with and without scaling: nearest neighbors and the support vector machine rise from about 0.7 to above 0.95, trees do not change."
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

models = {
    "nearest neighbors": KNeighborsClassifier(5),
    "support vectors": SVC(),
    "logistic, 50 steps": LogisticRegression(max_iter=50),
    "decision tree": DecisionTreeClassifier(random_state=0),
}
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # 50 steps are too few without scaling: that is the point
    raw = [cross_val_score(m, x, y, cv=10).mean() for m in models.values()]
    done = [
        cross_val_score(make_pipeline(StandardScaler(), m), x, y, cv=10).mean()
        for m in models.values()
    ]
fig, ax = plt.subplots()
places = np.arange(len(models))
ax.bar(places - 0.2, raw, 0.4, label="as measured")
ax.bar(places + 0.2, done, 0.4, label="standardized")
ax.set_xticks(places, list(models))
ax.set(xlabel="model (ten-fold cross-validation)", ylabel="accuracy (share)", ylim=(0.5, 1))
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Outliers
#
# **Outliers** are values far from the others: errors of measurement, or the interesting rows. Mean and standard deviation move with each of them; the median and the *interquartile range* (IQR) hardly do.
# A common rule marks values more than 1½ IQR outside of the quartiles. Look at a marked row before you drop it.


# %%
def find_outliers(values):
    """Return which values lie more than 1½ interquartile ranges outside of the quartiles."""
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (high - low)
    return (values < low - reach) | (values > high + reach)


column = x["magnesium"].to_numpy()[train]
spoiled = np.append(column, 10_000)  # a comma at the wrong place
print("marked in magnesium:", np.sort(column[find_outliers(column)]))
print(f"mean {column.mean():.1f} becomes {spoiled.mean():.1f}")
print(f"median {np.median(column):.1f} becomes {np.median(spoiled):.1f}")

# %% [markdown]
# ## Missing values
#
# **Missing values** are rarely missing at random: the lab that failed to measure had a reason. Options: drop the row, fill in the median, fill in and add a column that says where, or predict the value from
# the other columns. What is filled in is fitted on the training set, too.


# %%
class Imputer:
    """Fill in the training set's medians, and append a column for each that had gaps."""

    def fit(self, x):
        self.median = np.nanmedian(x, axis=0)
        self.gaps = np.isnan(x).any(axis=0)
        return self

    def transform(self, x):
        empty = np.isnan(x)
        return np.hstack([np.where(empty, self.median, x), empty[:, self.gaps]])


from sklearn.impute import SimpleImputer

rng = np.random.default_rng(1)
holes = x_train.copy()
holes[:, 12][rng.random(len(holes)) < 0.3 + 0.4 * (y[train] == 0)] = np.nan  # not at random
filled = Imputer().fit(holes).transform(holes)
expected = SimpleImputer(strategy="median", add_indicator=True).fit_transform(holes)
np.testing.assert_allclose(filled, expected)
by_class = [np.isnan(holes[y[train] == label, 12]).mean() for label in range(3)]
print("missing proline by class:", np.round(by_class, 2), "- the gap itself predicts the class")

# %% [markdown]
# ## Encoding
#
# Models take numbers. **Encoding** turns categories into columns. *Ordinal* encoding (small 0, medium 1, large 2) says that large is further from small than medium is. *One-hot* encoding makes a column for each
# category. A category that the training set lacks needs a rule: here all its columns are 0.


# %%
class OneHot:
    """One column for each category of the training set."""

    def fit(self, values):
        self.categories = sorted(set(values))
        return self

    def transform(self, values):
        return np.array([[float(v == c) for c in self.categories] for v in values])


from sklearn.preprocessing import OneHotEncoder

encoder = OneHot().fit(["red", "white", "red", "rosé"])
found = encoder.transform(["white", "orange"])
library = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
library.fit(np.array([["red"], ["white"], ["rosé"]]))
np.testing.assert_array_equal(found, library.transform(np.array([["white"], ["orange"]])))
pd.DataFrame(found, columns=encoder.categories, index=["white", "orange (unknown)"])

# %% [markdown]
# ## Leakage
#
# **Leakage** is information about the test set in what was fitted. It makes scores that nobody will see again. Here are 100 rows of pure noise with 2,000 columns, and labels by coin flip. No model can be better
# than a half, on average over many draws. Choose the 20 columns that correlate best with the labels, on *all* rows, then cross-validate.

# %%
noise = rng.normal(size=(100, 2000))
coin = rng.integers(0, 2, 100)


def best_columns(x, y, count=20):
    """Return the columns that correlate best with the labels."""
    centered = (x - x.mean(axis=0)) / x.std(axis=0)
    return np.argsort(-np.abs(centered.T @ (y - y.mean())))[:count]


def cross_validate(x, y, leak, folds=10):
    """Return the accuracy of logistic regression; `leak`: choose columns with the test rows, too."""
    right = []
    for fold in range(folds):
        held = np.arange(len(y)) % folds == fold
        columns = best_columns(x, y) if leak else best_columns(x[~held], y[~held])
        model = LogisticRegression().fit(x[~held][:, columns], y[~held])
        right.extend(model.predict(x[held][:, columns]) == y[held])
    return np.mean(right)


leaky, honest = cross_validate(noise, coin, True), cross_validate(noise, coin, False)
print(f"columns chosen on all rows: {leaky:.0%}; on the training rows of each fold: {honest:.0%}")
print("one draw of noise; the next picture shows forty")

# %% tags=["picture"] alt="Histogram of accuracies over 40 draws of pure noise: with leakage around 0.85, without around 0.5."
draws = {"with leakage": [], "without": []}
for seed in range(40):
    one = np.random.default_rng(seed)
    data, flips = one.normal(size=(100, 2000)), one.integers(0, 2, 100)
    draws["with leakage"].append(cross_validate(data, flips, True))
    draws["without"].append(cross_validate(data, flips, False))
fig, ax = plt.subplots()
for name, values in draws.items():
    ax.hist(values, bins=np.linspace(0.3, 1, 29), alpha=0.6, label=name)
ax.axvline(0.5, color="black", linestyle="--", label="right on average")
ax.set(xlabel="accuracy in cross-validation (share)", ylabel="draws of noise (count)")
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Scale with quartiles
#
# Write the class `RobustScaler` with `fit(x)` and `transform(x)`: subtract the training median of each column and divide by the interquartile range. `fit` returns the object.


# %% tags=["exercise"]
class RobustScaler:
    def fit(self, x): ...

    def transform(self, x): ...


# %% tags=["solution"]
class RobustScaler:
    def fit(self, x):
        low, self.median, high = np.quantile(x, [0.25, 0.5, 0.75], axis=0)
        self.reach = high - low
        return self

    def transform(self, x):
        return (x - self.median) / self.reach


# %% tags=["wrong"]
# says: test set
class RobustScaler:
    def fit(self, x):
        return self

    def transform(self, x):
        low, median, high = np.quantile(x, [0.25, 0.5, 0.75], axis=0)
        return (x - median) / (high - low)


# %% tags=["wrong"]
# says: returns
class RobustScaler:
    def fit(self, x):
        low, self.median, high = np.quantile(x, [0.25, 0.5, 0.75], axis=0)
        self.reach = high - low

    def transform(self, x):
        return (x - self.median) / self.reach


# %% tags=["check"]
scaler = RobustScaler().fit(x_train)
assert scaler is not None, "fit returns nothing; it returns self, so that calls can be chained"
once, alone = scaler.transform(x_test), scaler.transform(x_test[:5])
assert once is not None, "transform returns nothing"
assert np.allclose(once[:5], alone), (
    "a row's result depends on the other rows: the test set was used to fit"
)
from sklearn.preprocessing import RobustScaler as Library

assert np.allclose(once, Library().fit(x_train).transform(x_test)), (
    "median or interquartile range is wrong"
)
print("right")

# %% [markdown]
# ### 2. Keep groups together
#
# Write `grouped_split(groups, share, seed)`: rows for training and for testing, so that no group is in both, and about `share` of the *groups* are tested.


# %% tags=["exercise"]
def grouped_split(groups, share, seed): ...


# %% tags=["solution"]
def grouped_split(groups, share, seed):
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    held = np.isin(groups, names[: round(share * len(names))])
    return np.flatnonzero(~held), np.flatnonzero(held)


# %% tags=["wrong"]
# says: both parts
def grouped_split(groups, share, seed):
    rows = np.random.default_rng(seed).permutation(len(groups))
    cut = round(share * len(groups))
    return np.sort(rows[cut:]), np.sort(rows[:cut])


# %% tags=["wrong"]
# says: seed
def grouped_split(groups, share, seed):
    names = np.unique(groups)
    held = np.isin(groups, names[: round(share * len(names))])
    return np.flatnonzero(~held), np.flatnonzero(held)


# %% tags=["check"]
groups = np.random.default_rng(5).permutation(
    np.repeat([f"g{i}" for i in range(20)], np.arange(20) % 4 + 3)
)
result = grouped_split(groups, 0.3, seed=0)
assert result is not None, "grouped_split returns nothing"
one, other = result
assert not set(groups[one]) & set(groups[other]), "some groups are in both parts"
assert np.asarray(one).dtype.kind == "i", "return numbers of rows, not a mask"
assert sorted([*one, *other]) == list(range(len(groups))), "some rows are lost, or in both parts"
assert len(set(groups[other])) == 6, f"6 of 20 groups are tested, found {len(set(groups[other]))}"
different = grouped_split(groups, 0.3, seed=1)[1]
assert not np.array_equal(other, different), "the seed changes nothing: draw the groups at random"
print("right")

# %% [markdown]
# ### 3. Find the leak
#
# Somebody predicts tomorrow's value of a series from today's, after `(series - series.mean()) / series.std()` over the whole series, and tests on the last fifth. Write `scale_series(series, share)` without
# the leak: scale by the mean and standard deviation of the part before the last `share`.


# %% tags=["exercise"]
def scale_series(series, share): ...


# %% tags=["solution"]
def scale_series(series, share):
    past = series[: len(series) - round(share * len(series))]
    return (series - past.mean()) / past.std()


# %% tags=["wrong"]
# says: future
def scale_series(series, share):
    return (series - series.mean()) / series.std()


# %% tags=["wrong"]
# says: first
def scale_series(series, share):
    past = series[round(share * len(series)) :]
    return (series - past.mean()) / past.std()


# %% tags=["wrong"]
# says: of the future, too
def scale_series(series, share):
    past = series[: len(series) - round(share * len(series))]
    return (series - past.mean()) / series.std()


# %% tags=["check"]
series = np.arange(100.0)
found = scale_series(series, 0.2)
assert found is not None, "scale_series returns nothing"
assert len(found) == 100, "all 100 values are scaled, also the last fifth"
assert not np.isclose(found.mean(), 0), "the mean of all values is 0: the future was used"
wanted = (series - series[:80].mean()) / series[:80].std()
assert not np.allclose(found, wanted * series[:80].std()), (
    "divide by the standard deviation of the past"
)
assert not np.allclose(found, wanted * series[:80].std() / series.std()), (
    "the spread is that of the future, too"
)
assert np.isclose(found[:80].mean(), 0), "the first four fifths decide, not the last ones"
assert np.allclose(found, wanted), "the values are not those of the past's mean and spread"
print("right: the last value is", round(float(found[-1]), 2), "standard deviations above the past")

# %% [markdown]
# ## Self-test
#
# <details><summary>Why are decision trees not changed by scaling?</summary>
#
# A tree compares one column with a threshold at a time. Scaling moves the threshold along.
# </details>
#
# <details><summary>A benchmark's questions stand in the training text. Which of the topics above is this?</summary>
#
# Leakage. For language models it is called contamination.
# </details>
#
# <details><summary>May the validation set be used to choose the number of columns?</summary>
#
# Yes, that is what it is for. Its score is then too good, which is why there is a test set.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
with_leak, without = (np.array(draws[name]) for name in ("with leakage", "without"))
display(
    Markdown(
        f"Choosing columns before the split looks harmless: no model saw a test row. On pure noise it makes an accuracy of {with_leak.mean():.0%} on average over {len(with_leak)} draws, where {without.mean():.0%} is found without it. "
        f"And on the wines, without scaling, five nearest neighbors are right for {raw[0]:.0%}; dividing each column by its spread makes it {done[0]:.0%}."
    )
)

# %% [markdown]
# ## In llmworks
#
# `data split` keeps groups together; `data overlap` and `data decontaminate` look for test rows in the training set:
#
# ```
# llmworks data split --data chats --set split=train --out train
# llmworks data overlap --left train --right test --out overlap
# ```
#
# ## Go on
#
# - S. Kapoor and A. Narayanan, *Leakage and the reproducibility crisis in ML-based science*, arXiv:2207.07048
# - Next: [F07 scikit-learn](F07_classifiers.ipynb)
