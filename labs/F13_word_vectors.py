# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Turn the company that words keep into vectors, by counting, Word2Vec, GloVe and FastText, and measure them.
#     minutes: 75
#     budget_seconds: 150
#     needs: [F01, F10, F12]
#     assets: [austen, python-docs, wikipedia-sample, openwebtext-sample, wordsim353]
#     topics: [word vectors, Word2Vec, GloVe, FastText, sub-words, analogies]
# ---

# %% [markdown]
# # F13 Word vectors: meaning by the company of words
#
# **You will learn**: Turn the company that words keep into vectors, by counting, Word2Vec, GloVe and FastText, and measure them.
#
# **Time**: 75 minutes to read and to do the exercises.
#
# **Needs**: [F01](F01_linear_algebra.ipynb), [F10](F10_optimizers.ipynb), [F12](F12_words.ipynb).

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
# ## A corpus of pairs
#
# **Word vectors** give words that stand in similar surroundings similar vectors. The corpus: six novels, the documentation of Python, and the beginnings of 2,000 articles and web pages. It is a thousandth of what published vectors were trained on.

# %%
import json
import re
from collections import Counter

import numpy as np
import pandas as pd
import torch

import llmworks

session = llmworks.Session("workspace", quiet=True)
novels = session.make("data.read", kind=llmworks.Dataset, data="asset:austen").path
texts = list(pd.read_parquet(next(novels.glob("*.parquet")))["text"])
texts += [
    p.read_text(encoding="utf-8") for p in llmworks.load("asset:python-docs").path.rglob("*.rst.txt")
]
for name in ("wikipedia", "openwebtext"):
    path = llmworks.load(f"asset:{name}-sample").path / f"{name}.jsonl"
    texts += [json.loads(line)["0"] for line in path.read_text(encoding="utf-8").splitlines()]
tokens = [re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()) for text in texts]
counts = Counter(word for text in tokens for word in text)
vocabulary = [word for word, n in counts.most_common() if n >= 30]
number = {word: i for i, word in enumerate(vocabulary)}
size = len(vocabulary)
print(f"{counts.total():,} words, {len(counts):,} different ones, {size:,} occur 30 times or more")

# %% [markdown]
# A pair is a word and a word at most five places away. Very common words are thinned out: a word with the share $f$ of the text is kept with probability $\sqrt{t/f}$, $t = 10^{-4}$ (*subsampling*).

# %%
WINDOW = 5
shares = np.array([counts[w] for w in vocabulary]) / counts.total()
keep = np.minimum(1, np.sqrt(1e-4 / shares))
rng = np.random.default_rng(0)
centers, contexts, places = [], [], []
for text in tokens:
    ids = np.array([number[w] for w in text if w in number])
    ids = ids[rng.random(len(ids)) < keep[ids]] if len(ids) else ids
    for distance in range(1, min(WINDOW + 1, len(ids))):
        for a, b in ((ids[:-distance], ids[distance:]), (ids[distance:], ids[:-distance])):
            centers.append(a)
            contexts.append(b)
            places.append(np.full(len(a), distance, dtype=np.int8))
centers, contexts, places = (np.concatenate(part) for part in (centers, contexts, places))
centers, contexts = centers.astype(np.int32), contexts.astype(np.int32)
print(f"{len(centers):,} pairs")

# %% [markdown]
# ## Counting
#
# Count pairs in a matrix, weighted by one over the distance. *Positive pointwise mutual information* (PPMI, lab F12) says how much more often two words meet than by chance. Its singular value decomposition (lab F01) makes rows of 64 numbers.

# %%
pairs = np.zeros((size, size), dtype=np.float32)
np.add.at(pairs, (centers, contexts), 1 / places)
total = pairs.sum()
expected = pairs.sum(axis=1, keepdims=True) * pairs.sum(axis=0) / total
with np.errstate(divide="ignore"):
    ppmi = np.maximum(np.log(pairs / expected), 0)

from sklearn.utils.extmath import randomized_svd

u, sigma, _ = randomized_svd(ppmi, 64, random_state=0)
vectors = {"PPMI and SVD": u * np.sqrt(sigma)}


def neighbors(table, word, count=6):
    """Return the words with the largest cosine to a word."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    order = np.argsort(-unit @ unit[number[word]])
    return [vocabulary[i] for i in order if i != number[word]][:count]


for word in ("sister", "october", "function"):
    print(f"{word:<9}", neighbors(vectors["PPMI and SVD"], word))

# %% [markdown]
# ## Word2Vec
#
# **Word2Vec** (skip-gram with negative sampling) learns to tell real pairs from random ones. Each word has a vector $v$ as a center and $c$ as a context. For a real pair and $k$ random contexts $n$, the loss is
# $-\ln \sigma(v \cdot c) - \sum_n \ln \sigma(-v \cdot n)$. Random contexts are drawn by frequency to the power of three quarters. The gradient is short enough to write it down.


# %%
def pair_loss_and_gradients(v, c):
    """Return loss and gradients; v: (batch, d), c: (batch, 1 + k, d), the real context first."""
    target = torch.zeros(c.shape[:2])
    target[:, 0] = 1
    score = torch.einsum("bd,bkd->bk", v, c)
    loss = torch.nn.functional.softplus(torch.where(target == 1, -score, score)).sum()
    error = torch.sigmoid(score) - target  # d loss / d score
    return loss, torch.einsum("bk,bkd->bd", error, c), error[:, :, None] * v[:, None]


# %% tags=["parity"]
torch.manual_seed(0)
v, c = torch.randn(8, 16, requires_grad=True), torch.randn(8, 6, 16, requires_grad=True)
score = torch.einsum("bd,bkd->bk", v, c)
automatic = -torch.nn.functional.logsigmoid(score[:, 0]).sum()
automatic = automatic - torch.nn.functional.logsigmoid(-score[:, 1:]).sum()
automatic.backward()
loss, dv, dc = pair_loss_and_gradients(v.detach(), c.detach())
torch.testing.assert_close(loss, automatic.detach())
torch.testing.assert_close(dv, v.grad)
torch.testing.assert_close(dc, c.grad)
print("our loss and gradients are those of torch.autograd")

# %%
DIMENSIONS, NEGATIVES, BATCH = 64, 5, 2000


def train_word2vec(centers, contexts, epochs=2, rate=0.1, seed=0):
    """Return center vectors and the mean loss of each tenth of the training."""
    g = torch.Generator().manual_seed(seed)
    v = (torch.rand(size, DIMENSIONS, generator=g) - 0.5) / DIMENSIONS
    c = torch.zeros(size, DIMENSIONS)
    noise = torch.tensor(shares**0.75, dtype=torch.float32)
    centers, contexts = torch.from_numpy(centers), torch.from_numpy(contexts)  # 32-bit indices
    steps, losses = epochs * (len(centers) // BATCH), []
    for step in range(steps):
        rows = torch.randint(len(centers), (BATCH,), generator=g)
        random = torch.multinomial(noise, BATCH * NEGATIVES, replacement=True, generator=g)
        a = centers[rows]
        b = torch.cat([contexts[rows][:, None], random.view(BATCH, NEGATIVES)], dim=1)
        loss, dv, dc = pair_loss_and_gradients(v[a], c[b])
        now = rate * (1 - step / steps)
        v.index_add_(0, a, dv, alpha=-now)
        c.index_add_(0, b.flatten(), dc.flatten(0, 1), alpha=-now)
        losses.append(loss.item() / BATCH)
    return v.numpy(), [float(np.mean(part)) for part in np.array_split(losses, 10)]


vectors["Word2Vec"], losses = train_word2vec(centers, contexts)
print("loss per pair:", [round(one, 2) for one in losses])
for word in ("sister", "october", "function"):
    print(f"{word:<9}", neighbors(vectors["Word2Vec"], word))

# %% [markdown]
# ## GloVe
#
# **GloVe** fits logarithms of counts: $v_i \cdot c_j + a_i + b_j \approx \ln X_{ij}$, weighted by $\min(1, (X_{ij}/x_{\max})^{3/4})$, so that rare pairs count less. It is a weighted least squares problem over the cells that are not zero.


# %%
def train_glove(pairs, epochs=8, rate=0.05, top=50.0, seed=0):
    """Return the sum of both vectors of each word; AdaGrad by PyTorch."""
    rows, columns = np.nonzero(pairs)
    x = torch.from_numpy(pairs[rows, columns])
    rows, columns = torch.from_numpy(rows), torch.from_numpy(columns)
    g = torch.Generator().manual_seed(seed)
    v, c = (
        ((torch.rand(size, DIMENSIONS, generator=g) - 0.5) / 8).requires_grad_() for _ in range(2)
    )
    a, b = (torch.zeros(size, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adagrad([v, c, a, b], lr=rate)
    weight, log_x = (x / top).clamp(max=1) ** 0.75, x.log()
    for _ in range(epochs):
        for cells in torch.randperm(len(x), generator=g).split(100_000):
            i, j = rows[cells], columns[cells]
            error = (v[i] * c[j]).sum(1) + a[i] + b[j] - log_x[cells]
            loss = (weight[cells] * error**2).sum() / 1000
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (v + c).detach().numpy()


vectors["GloVe"] = train_glove(pairs)
for word in ("sister", "october", "function"):
    print(f"{word:<9}", neighbors(vectors["GloVe"], word))

# %% [markdown]
# ## FastText
#
# **FastText** is Word2Vec on **sub-words**: a word's vector is the mean of its own vector and those of its character n-grams, for *words* `<wo`, `wor`, `word`, `rds>` ... The n-grams are hashed into a fixed number of rows. A word that was never seen has n-grams, too, and so a vector.
# Training it is left to gensim here; how a vector comes from n-grams is checked by hand.

# %%
from gensim.models import FastText

settings = {
    "vector_size": DIMENSIONS,
    "window": WINDOW,
    "min_count": 30,
    "sg": 1,
    "sample": 1e-4,
    "seed": 0,
}
library = FastText(tokens, epochs=4, workers=1, bucket=50_000, min_n=3, max_n=5, **settings)


def hash_fnv(ngram):
    """Return FastText's 32-bit FNV-1a hash; bytes count as signed."""
    h = 2166136261
    for byte in ngram.encode("utf-8"):
        h = ((h ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619) & 0xFFFFFFFF
    return h


def fasttext_vector(word):
    """Return the vector of a word that is not in the vocabulary: the mean of its n-grams' rows."""
    marked = f"<{word}>"
    ngrams = [marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)]
    return np.mean([library.wv.vectors_ngrams[hash_fnv(ngram) % 50_000] for ngram in ngrams], axis=0)


# %% tags=["parity"]
for word in ("unfunctionable", "sisterlike", "naïveté"):
    assert word not in library.wv.key_to_index
    np.testing.assert_allclose(fasttext_vector(word), library.wv.get_vector(word), atol=1e-6)
print("our vectors of unknown words are those of gensim's FastText")
vectors["FastText"] = np.array([library.wv.get_vector(word) for word in vocabulary])
print(
    "sisterlike:",
    [word for word, _ in library.wv.similar_by_vector(fasttext_vector("sisterlike"))][:5],
)

# %% [markdown]
# ## How good are they?
#
# WordSim-353 holds pairs of words that people rated from 0 to 10. The measure is *Spearman's correlation*: does the cosine put the pairs into the same order as people do?

# %%
from scipy.stats import spearmanr

rows = (llmworks.load("asset:wordsim353").path / "wordsim353.tsv").read_text().lower().splitlines()
rated = [line.split("\t") for line in rows if not line.startswith("#")]
rated = [(a, b, float(score)) for a, b, score in rated if a in number and b in number]


def similarity_score(table):
    """Return Spearman's correlation with people's ratings."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = [unit[number[a]] @ unit[number[b]] for a, b, _ in rated]
    return float(spearmanr(cosines, [score for *_, score in rated]).statistic)


scores = {name: similarity_score(table) for name, table in vectors.items()}
print(f"{len(rated)} of 353 pairs are in the vocabulary")
for name, score in scores.items():
    print(f"{name:<13} correlation {score:.3f}")

# %% [markdown]
# ## Analogies
#
# **Analogies** are differences of vectors: *he* is to *she* as *his* is to ...? The answer is the word nearest to $v_{she} - v_{he} + v_{his}$, without the three words of the question.


# %%
def analogy(table, a, b, c):
    """Return the word x for which a : b = c : x."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    wanted = unit[number[b]] - unit[number[a]] + unit[number[c]]
    order = np.argsort(-unit @ wanted)
    return next(vocabulary[i] for i in order if vocabulary[i] not in (a, b, c))


questions = [
    ("he", "she", "his", "her"),
    ("he", "she", "himself", "herself"),
    ("brother", "sister", "father", "mother"),
    ("uncle", "aunt", "brother", "sister"),
    ("good", "better", "bad", "worse"),
    ("method", "methods", "function", "functions"),
    ("january", "february", "march", "april"),
    ("read", "reading", "write", "writing"),
]
solved = {name: [analogy(t, a, b, c) == d for a, b, c, d in questions] for name, t in vectors.items()}
for a, b, c, d in questions:
    answers = {name: analogy(table, a, b, c) for name, table in vectors.items()}
    print(f"{a} : {b} = {c} : {d}?", answers)

# %% tags=["picture"] alt="Two-dimensional map of the Word2Vec vectors of family words, months and programming terms: three separate groups."
groups = {
    "family": ["brother", "sister", "father", "mother", "uncle", "aunt", "husband", "wife"],
    "months": ["january", "march", "april", "june", "july", "october", "november", "december"],
    "programs": ["function", "method", "class", "object", "list", "string", "tuple", "module"],
}
chosen = [w for words in groups.values() for w in words]
table = vectors["Word2Vec"][[number[w] for w in chosen]]
table = table / np.linalg.norm(table, axis=1, keepdims=True)
flat = (table - table.mean(0)) @ np.linalg.svd(table - table.mean(0))[2][:2].T
fig, ax = plt.subplots(figsize=(7, 4.5))
for name, words in groups.items():
    rows = [chosen.index(w) for w in words]
    ax.plot(*flat[rows].T, "o", label=name)
    for row in rows:
        ax.annotate(chosen[row], flat[row], fontsize=8, xytext=(3, 3), textcoords="offset points")
ax.set(xlabel="first principal component (no unit)", ylabel="second component (no unit)")
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Character n-grams
#
# Write `char_ngrams(word, low, high)`: the list of all n-grams of `<word>` with the brackets, for n from `low` to `high`, both included.


# %% tags=["exercise"]
def char_ngrams(word, low, high): ...


# %% tags=["solution"]
def char_ngrams(word, low, high):
    marked = f"<{word}>"
    return [marked[i : i + n] for n in range(low, high + 1) for i in range(len(marked) - n + 1)]


# %% tags=["wrong"]
# says: brackets
def char_ngrams(word, low, high):
    return [word[i : i + n] for n in range(low, high + 1) for i in range(len(word) - n + 1)]


# %% tags=["wrong"]
# says: both included
def char_ngrams(word, low, high):
    marked = f"<{word}>"
    return [marked[i : i + n] for n in range(low, high) for i in range(len(marked) - n + 1)]


# %% tags=["check"]
found = char_ngrams("cat", 3, 4)
assert found is not None, "char_ngrams returns nothing"
assert "<ca" in found, "the brackets belong to the word: '<ca' is a beginning, 'cat' may be anywhere"
assert "<cat" in found, "the last size is missing: low and high are both included"
assert sorted(found) == ["<ca", "<cat", "at>", "cat", "cat>"], f"found {found}"
print("right")

# %% [markdown]
# ### 2. Remove the common direction
#
# The mean of all vectors is a direction that all words share. Does removing it help? Write `center(table)`: subtract the mean vector, then scale each row to length 1.


# %% tags=["exercise"]
def center(table): ...


# %% tags=["solution"]
def center(table):
    moved = table - table.mean(axis=0)
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


# %% tags=["wrong"]
# says: length
def center(table):
    return table - table.mean(axis=0)


# %% tags=["wrong"]
# says: first
def center(table):
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return unit - unit.mean(axis=0)


# %% tags=["wrong"]
# says: mean vector
def center(table):
    moved = table - table.mean(axis=1, keepdims=True)
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


# %% tags=["check"]
test = np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0], [2.0, 4.0, 1.0]])
found = center(test.copy())
wanted = (test - [2, 2, 1]) / np.linalg.norm(test - [2, 2, 1], axis=1, keepdims=True)
assert found is not None, "center returns nothing"
unit = test / np.linalg.norm(test, axis=1, keepdims=True)
assert not np.allclose(found, unit - unit.mean(axis=0)), "subtract the mean first, then scale"
assert np.allclose(np.linalg.norm(found, axis=1), 1), "the rows do not have length 1"
assert np.allclose(found, wanted), "the mean vector is the mean over the rows: axis=0"
changes = {name: similarity_score(center(t)) - scores[name] for name, t in vectors.items()}
print("right; correlations change by", {name: round(one, 3) for name, one in changes.items()})

# %% [markdown]
# ### 3. Negative samples
#
# Write `noise_distribution(counts)`: probabilities of words as negative samples, proportional to the counts to the power of three quarters.


# %% tags=["exercise"]
def noise_distribution(counts): ...


# %% tags=["solution"]
def noise_distribution(counts):
    powered = np.asarray(counts, dtype=float) ** 0.75
    return powered / powered.sum()


# %% tags=["wrong"]
# says: sum to 1
def noise_distribution(counts):
    return (np.asarray(counts) / np.sum(counts)) ** 0.75


# %% tags=["wrong"]
# says: power
def noise_distribution(counts):
    return np.asarray(counts) / np.sum(counts)


# %% tags=["check"]
found = noise_distribution([81, 16, 1])
assert found is not None, "noise_distribution returns nothing"
assert abs(np.sum(found) - 1) < 1e-9, (
    f"the probabilities sum to {np.sum(found):.3f}: divide after the power, so that they sum to 1"
)
assert not np.allclose(found, np.array([81, 16, 1]) / 98), "the power of three quarters is missing"
assert np.allclose(found, np.array([27, 8, 1]) / 36), f"expected 27/36, 8/36, 1/36, found {found}"
print("right")

# %% [markdown]
# ## Self-test
#
# <details><summary>Why are there two vectors for each word?</summary>
#
# A word rarely stands beside itself. With one vector, the product of a word with itself would have to be small, but it is the square of its length.
# </details>
#
# <details><summary>Are <em>good</em> and <em>bad</em> near each other?</summary>
#
# Often nearer than their meanings suggest: they stand in the same surroundings. Print `neighbors(vectors["GloVe"], "good", 60)`. The vectors know company, not truth.
# </details>
#
# <details><summary>What does a bank of a river share with a bank for money in such a table?</summary>
#
# One vector. Static vectors have one meaning for each spelling; attention (lab S03) makes vectors that depend on the sentence.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
best, last = max(scores, key=scores.get), min(scores, key=scores.get)
display(
    Markdown(
        f"On this small corpus the best correlation with people is that of *{best}*, {scores[best]:.2f}, the last one that of *{last}*, {scores[last]:.2f}. Counting and one matrix decomposition reach {scores['PPMI and SVD']:.2f}, without a learning rate or an epoch. "
        f"With {len(rated)} pairs, differences of a tenth are luck, and the methods saw the text for different numbers of epochs; but with little data, counting is a strong start.\n\n"
        f"Of {len(questions)} analogies, "
        + ", ".join(f"{name} solves {sum(right)}" for name, right in solved.items())
        + "."
    )
)

# %% [markdown]
# ## In llmworks
#
# `model embedding` trains Word2Vec, FastText or GloVe on documents, and scores them on similarities and analogies:
#
# ```
# llmworks model embedding --data documents --set method=fasttext --out vectors
# ```
#
# ## Go on
#
# - T. Mikolov and others, *Efficient estimation of word representations in vector space*, arXiv:1301.3781
# - O. Levy, Y. Goldberg and I. Dagan, *Improving distributional similarity with lessons learned from word embeddings* (2015)
# - P. Bojanowski and others, *Enriching word vectors with subword information*, arXiv:1607.04606
# - Next: [F14 Recurrent networks](F14_recurrent_networks.ipynb)
