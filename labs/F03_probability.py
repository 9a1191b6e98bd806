# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Turn counts into probabilities, predict the next letter, and find a text's author by Bayes' rule.
#     minutes: 60
#     budget_seconds: 60
#     needs: [F00, F01]
#     assets: [austen]
#     topics: [random variables, distributions, expectation, variance, covariance, correlation, Bayes]
# ---

# %% [markdown]
# # F03 Probability: the next letter
#
# **You will learn**: Turn counts into probabilities, predict the next letter, and find a text's author by Bayes' rule.
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
# ## Random variables and distributions
#
# **Random variables** have a value that depends on chance: the next letter of a text, its word lengths. **Distributions**
# give each value its probability. Probabilities are not negative and sum to 1. The share of a value in a large sample estimates its
# probability.

# %%
import re
from collections import Counter

import numpy as np
import pandas

import llmworks

session = llmworks.Session("workspace", quiet=True)
dataset = session.make("data.read", kind=llmworks.Dataset, data="asset:austen")
novels = pandas.read_parquet(next(dataset.path.glob("*.parquet")))["text"]
titles = [text.strip().splitlines()[0].title() for text in novels]
letters = "abcdefghijklmnopqrstuvwxyz "
codes = {letter: number for number, letter in enumerate(letters)}


def clean(text):
    """Return the text in lower case, with everything but letters as one space."""
    return re.sub(r"[^a-z]+", " ", text.lower())


text = clean(" ".join(novels))
numbers = np.array([codes[letter] for letter in text])
shares = np.bincount(numbers, minlength=27) / len(numbers)
print(f"{len(text):,} characters; the probabilities sum to {shares.sum():.6f}")
print({letter: round(float(shares[codes[letter]]), 3) for letter in "etq "})

# %% [markdown]
# ## Expectation and variance
#
# The **expectation** $E[X] = \sum_x x\,P(x)$ is the mean of a distribution. The **variance** $\operatorname{Var}[X] = E[(X - E[X])^2]$ is the mean squared distance
# to it; its root, the *standard deviation*, has the unit of $X$. The mean of $n$ independent draws has the same
# expectation, and the variance $\operatorname{Var}[X]/n$: four times the data halve the uncertainty.

# %%
word_lengths = np.array([len(word) for word in text.split()])
values, counts = np.unique(word_lengths, return_counts=True)
probabilities = counts / counts.sum()
mean = float(values @ probabilities)
variance = float((values - mean) ** 2 @ probabilities)
np.testing.assert_allclose([mean, variance], [word_lengths.mean(), word_lengths.var()])
print(f"a word has {mean:.3f} letters, with a standard deviation of {variance**0.5:.3f}")

rng = np.random.default_rng(0)
for n in (10, 40, 160):
    means = rng.choice(word_lengths, size=(4000, n)).mean(axis=1)
    print(f"mean of {n:3} words: spread {means.std():.3f}, by formula {(variance / n) ** 0.5:.3f}")

# %% [markdown]
# ## Conditional probability
#
# $P(b \mid a) = P(a, b) / P(a)$ is the probability of $b$ when $a$ is known. A *language model* is a conditional distribution: of the next token, given
# those before. Here the token is a letter, and one letter before it is known.

# %%
pairs = np.zeros((27, 27))
np.add.at(pairs, (numbers[:-1], numbers[1:]), 1)
conditional = pairs / pairs.sum(axis=1, keepdims=True)  # each row sums to 1
for earlier in "qtz":
    row = conditional[codes[earlier]]
    likely = [(letters[i], round(float(row[i]), 3)) for i in np.argsort(-row)[:4]]
    print(f"after {earlier!r}: {likely}")

# %% tags=["picture"] alt="Heat map of the probability of each letter after each letter: a bright cell for u after q, bright columns for e and the space."
fig, ax = plt.subplots(figsize=(6.5, 5.5))
shown = ax.imshow(conditional, cmap="magma", vmax=0.5)
names = [*letters[:-1], "␣"]
ax.set_xticks(range(27), names)
ax.set_yticks(range(27), names)
ax.set(xlabel="next letter (␣ is a space)", ylabel="letter before (␣ is a space)")
ax.grid(False)
fig.colorbar(shown, label="probability (0.5 and more: brightest)")
plt.show()

# %% [markdown]
# Draw the next letter from the row of the last one, again and again. The text is nonsense, but it has the right letters, and some of the right
# words.


# %%
def sample(length, seed, start=" "):
    """Return text drawn letter by letter from the conditional distribution."""
    draw = np.random.default_rng(seed)
    current, found = codes[start], []
    for _ in range(length):
        current = draw.choice(27, p=conditional[current])
        found.append(letters[current])
    return "".join(found)


print(sample(150, seed=1))

# %% [markdown]
# ## Covariance and correlation
#
# The **covariance** of two variables is $E[(X - E[X])(Y - E[Y])]$: positive when they rise together. Its unit is the product of both units.
# The **correlation** divides it by both standard deviations, and lies between −1 and 1. It measures how well a *straight line* describes
# the relation; it says nothing about causes.

# %%
prose = re.sub(r"\b(Mr|Mrs|Dr|St)\.", r"\1", " ".join(novels)).replace("--", " ")
sentences = [s for s in re.split(r"[.!?]+", prose) if len(s.split()) > 2]
length = np.array([len(s.split()) for s in sentences])
commas = np.array([s.count(",") for s in sentences])
word_length = np.array(
    [np.mean([len(w) for w in re.findall(r"[A-Za-z]+", s) or [""]]) for s in sentences]
)


def covariance(x, y):
    return float(np.mean((x - x.mean()) * (y - y.mean())))


def correlation(x, y):
    return covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))


np.testing.assert_allclose(correlation(length, commas), np.corrcoef(length, commas)[0, 1])
print(f"{len(sentences):,} sentences")
print(f"words and commas: covariance {covariance(length, commas):.2f} words × commas,")
print(f"  correlation {correlation(length, commas):.3f}")
print(f"words and mean word length: correlation {correlation(length, word_length):.3f}")
x = np.linspace(-1, 1, 201)
print(f"x and x², though one decides the other: correlation {abs(correlation(x, x**2)):.3f}")

# %% [markdown]
# ## Bayes' rule
#
# $P(h \mid d) = P(d \mid h)\,P(h) / P(d)$: **Bayes** turns the probability of data given a hypothesis (the *likelihood*) into the probability of the hypothesis
# given the data (the *posterior*). $P(h)$ is the *prior*, what was believed before.
#
# From which of the six novels does a passage come? Names give it away, so words with a capital letter are removed. *Naive* Bayes takes the
# words as independent: the logarithms of their probabilities add up. Each word is counted once more than it occurs (*Laplace smoothing*), or
# a word that a novel lacks would have the probability 0.


# %%
def passages(novel, size=150):
    """Return the words of a novel without names, cut into passages."""
    words = re.findall(r"(?<![A-Za-z'])[a-z]+(?:'[a-z]+)?", novel)
    return [words[i : i + size] for i in range(0, len(words) - size, size)]


train, test = [], []
for label, novel in enumerate(novels):
    for number, passage in enumerate(passages(novel)):
        (test if number % 5 == 0 else train).append((label, passage))
vocabulary = {w: i for i, w in enumerate(sorted({w for _, words in train for w in words}))}


def count_words(rows):
    """Return a matrix of counts, rows × vocabulary, and the labels."""
    table = np.zeros((len(rows), len(vocabulary)), dtype=np.float32)
    for row, (_, words) in enumerate(rows):
        for word, n in Counter(words).items():
            if word in vocabulary:
                table[row, vocabulary[word]] = n
    return table, np.array([label for label, _ in rows])


x_train, y_train = count_words(train)
x_test, y_test = count_words(test)
print(f"{len(train)} passages to learn from, {len(test)} to test, {len(vocabulary):,} words")


# %%
def fit(x, y):
    """Return log prior (novels) and log likelihood of each word (novels × words)."""
    counts = np.stack([x[y == label].sum(axis=0, dtype=np.float64) for label in range(6)]) + 1
    prior = np.bincount(y, minlength=6) / len(y)
    return np.log(prior), np.log(counts / counts.sum(axis=1, keepdims=True))


def posterior(x, log_prior, log_likelihood):
    """Return the probability of each novel for each passage."""
    scores = x @ log_likelihood.T + log_prior
    scores -= scores.max(axis=1, keepdims=True)  # exp of a large number would overflow
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


model = fit(x_train, y_train)
believed = posterior(x_test, *model)
accuracy = float(np.mean(believed.argmax(axis=1) == y_test))
print(f"right for {accuracy:.1%} of the passages")
print(f"the largest novel alone: {np.exp(model[0]).max():.1%}")

# %% tags=["parity"]
from sklearn.naive_bayes import MultinomialNB

library = MultinomialNB(alpha=1).fit(x_train, y_train)
np.testing.assert_allclose(believed, library.predict_proba(x_test), atol=1e-6)
print("our posteriors are those of sklearn.naive_bayes.MultinomialNB")

# %% tags=["picture"] alt="Share of right answers against the stated probability of naive Bayes: the points lie far below the diagonal, so that the model is more certain than it should be."
stated = believed.max(axis=1)
right = believed.argmax(axis=1) == y_test
edges = np.array([0.2, 0.5, 0.7, 0.9, 0.99, 0.999, 1.0000001])
fig, ax = plt.subplots(figsize=(5, 4))
for low, high in zip(edges[:-1], edges[1:], strict=True):
    inside = (stated >= low) & (stated < high)
    ax.plot(stated[inside].mean(), right[inside].mean(), "o", color="tab:blue")
    ax.annotate(f"{inside.sum()}", (stated[inside].mean(), right[inside].mean() - 0.06), fontsize=8)
ax.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
ax.set(
    xlabel="stated probability (share)",
    ylabel="right answers (share)",
    xlim=(0.2, 1.03),
    ylim=(0, 1.05),
)
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Condition on the next letter
#
# `conditional[a, b]` is the probability of the next letter `b` after `a`. Write `before(b)`: the distribution (27 numbers) of the letter that stands *before* the letter `b`, from
# `pairs`; `codes[b]` is the letter's column.


# %% tags=["exercise"]
def before(b): ...


# %% tags=["solution"]
def before(b):
    column = pairs[:, codes[b]]
    return column / column.sum()


# %% tags=["wrong"]
# says: sum to 1
def before(b):
    return conditional[:, codes[b]]


# %% tags=["wrong"]
# says: the next letter
def before(b):
    return conditional[codes[b]]


# %% tags=["check"]
found = before("u")
assert found is not None, "before returns nothing"
assert np.shape(found) == (27,), f"27 probabilities are needed, found shape {np.shape(found)}"
assert abs(np.sum(found) - 1) < 1e-9, (
    "the probabilities do not sum to 1: divide by the sum of the column"
)
assert not np.allclose(found, conditional[codes["u"]]), (
    "this is the distribution of the next letter, a row of pairs"
)
assert np.isclose(found[codes["q"]], pairs[codes["q"], codes["u"]] / pairs[:, codes["u"]].sum()), (
    "divide the counts in `pairs`, not the conditional probabilities"
)
print("right: before u stands q with", round(float(found[codes["q"]]), 4))

# %% [markdown]
# ### 2. A test and a rare disease
#
# A test finds a disease with probability `sensitivity`, and finds nothing in a healthy person with probability `specificity`. One person in `1 / prior` is ill. Write
# `probability_ill(prior, sensitivity, specificity)` for a person whose test is positive.


# %% tags=["exercise"]
def probability_ill(prior, sensitivity, specificity): ...


# %% tags=["solution"]
def probability_ill(prior, sensitivity, specificity):
    ill, healthy = prior * sensitivity, (1 - prior) * (1 - specificity)
    return ill / (ill + healthy)


# %% tags=["wrong"]
# says: prior
def probability_ill(prior, sensitivity, specificity):
    return sensitivity / (sensitivity + 1 - specificity)


# %% tags=["wrong"]
# says: divide
def probability_ill(prior, sensitivity, specificity):
    return prior * sensitivity


# %% tags=["wrong"]
# says: specificity
def probability_ill(prior, sensitivity, specificity):
    return prior * sensitivity / (prior * sensitivity + (1 - prior) * specificity)


# %% tags=["check"]
found = probability_ill(0.01, 0.9, 0.95)
assert found is not None, "probability_ill returns nothing"
assert not np.isclose(found, 0.9 / 0.95), "the prior is missing: most people are healthy"
assert not np.isclose(found, 0.009), "this is P(ill and positive): divide by P(positive)"
assert not np.isclose(found, 0.009 / (0.009 + 0.99 * 0.95)), (
    "a false alarm has probability 1 - specificity"
)
assert np.isclose(found, 0.009 / (0.009 + 0.99 * 0.05)), f"expected 0.1538, found {found:.4f}"
print("right:", round(found, 4))

# %% [markdown]
# ### 3. Surprise
#
# The *surprisal* of an event is $-\log_2 P$, in bits. The **entropy** of a distribution is its expected surprisal. Write `entropy(p)`; values with probability 0 contribute
# nothing.


# %% tags=["exercise"]
def entropy(p): ...


# %% tags=["solution"]
def entropy(p):
    p = np.asarray(p, dtype=float)
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


# %% tags=["wrong"]
# says: natural
def entropy(p):
    p = np.asarray(p, dtype=float)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


# %% tags=["wrong"]
# says: nan
def entropy(p):
    p = np.asarray(p, dtype=float)
    with np.errstate(all="ignore"):
        return float(-(p * np.log2(p)).sum())


# %% tags=["wrong"]
# says: negative
def entropy(p):
    p = np.asarray(p, dtype=float)
    p = p[p > 0]
    return float((p * np.log2(p)).sum())


# %% tags=["check"]
found = entropy([0.5, 0.5])
assert found is not None, "entropy returns nothing"
assert found >= 0, "entropy is not negative: the minus sign is missing"
assert not np.isclose(found, np.log(2)), "these are nats, by the natural logarithm: use log2 for bits"
assert np.isclose(found, 1), f"a fair coin has 1 bit, found {found}"
assert np.isclose(entropy([0.9, 0.1]), 0.469, atol=1e-3), "weight each surprisal by its probability"
assert not np.isnan(entropy([1.0, 0.0])), "0 · log 0 is nan in NumPy: leave out zeros"
rows = np.array([entropy(row) for row in conditional])
print(f"right: a letter has {entropy(shares):.2f} bits,", f"after another {shares @ rows:.2f}")

# %% [markdown]
# ## Self-test
#
# <details><summary>Can a correlation be 0 when one variable decides the other?</summary>
#
# Yes: x and x² on an interval around 0. Correlation sees straight lines only.
# </details>
#
# <details><summary>Why are logarithms of probabilities added, in place of multiplying probabilities?</summary>
#
# A product of hundreds of small numbers is smaller than the smallest float. The sum of the logarithms is not.
# </details>
#
# <details><summary>What does Laplace smoothing prevent?</summary>
#
# One word that a novel lacks would make the novel's posterior 0, whatever the other words say.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
sure = stated > 0.99
common = np.argsort(-x_train.sum(axis=0))[:100]
small = posterior(x_test[:, common], *fit(x_train[:, common], y_train)).argmax(axis=1) == y_test
display(
    Markdown(
        f"Naive Bayes is right for {accuracy:.0%} of the passages, without a single name; the 100 most common words alone find {small.mean():.0%}, so topics tell more than style. But it does not know what it does not know. For {sure.mean():.0%} of "
        f"the passages it states a probability above 99 %, and is wrong for {1 - right[sure].mean():.1%} of these; less than 1 % would be right. It takes words as independent and so counts the same evidence several "
        "times. Probabilities of a model need a check before someone relies on them."
    )
)

# %% [markdown]
# ## In llmworks
#
# `train ngram` trains a model of the next token, given those before, with Kneser-Ney smoothing, on packed tokens:
#
# ```
# llmworks train ngram --tokenizer tokenizer --data packed --set order=3 --out ngram
# ```
#
# ## Go on
#
# - C. E. Shannon, *A Mathematical Theory of Communication* (1948)
# - C. Guo and others, *On calibration of modern neural networks*, arXiv:1706.04599
# - Next: [F04 Statistics](F04_statistics.ipynb)
