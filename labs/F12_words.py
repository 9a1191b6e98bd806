# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Turn text into sentences, words, stems and lemmas, and find documents by counting, TF-IDF and BM25.
#     minutes: 75
#     budget_seconds: 90
#     needs: [F00, F05]
#     assets: [python-docs, wordnet]
#     topics: [sentences, tokens, stop words, stems, lemmas, n-grams, bag of words, TF-IDF, BM25]
# ---

# %% [markdown]
# # F12 Words: counting already finds documents
#
# **You will learn**: Turn text into sentences, words, stems and lemmas, and find documents by counting, TF-IDF and BM25.
#
# **Time**: 75 minutes to read and to do the exercises.
#
# **Needs**: [F00](F00_python.ipynb), [F05](F05_arrays_and_tables.ipynb).

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
# ## Sentences and tokens
#
# **Sentences** end at a full stop, unless it belongs to an abbreviation, a number or a file name. **Tokens** are the units of a text, here words. Both are decisions, not facts: *don't*, *e-mail* and *U.S.* have several reasonable cuts.

# %%
import re

ABBREVIATIONS = {"e.g", "i.e", "etc", "vs", "dr", "mr", "mrs", "no", "fig", "cf", "u.s"}


def split_sentences(text):
    """Cut after . ! or ? before a space and a capital letter, unless an abbreviation stands before."""
    found, start = [], 0
    for match in re.finditer(r"[.!?]+[\"')\]]*\s+(?=[A-Z\"'(\[])", text):
        before = text[start : match.start()].split()
        if before and before[-1].lower().lstrip("(\"'") in ABBREVIATIONS:
            continue
        found.append(text[start : match.end()].strip())
        start = match.end()
    return [*found, text[start:].strip()] if text[start:].strip() else found


def split_words(text):
    """Return words in lower case: letters and digits, with inner apostrophes, dots and hyphens kept."""
    return re.findall(r"\w+(?:['’.-]\w+)*", text.lower())


sample = """Dr. Smith uses Python 3.11, e.g. for e-mail. Doesn't he?
He said: "It's fast." The U.S. office agrees."""
for sentence in split_sentences(sample):
    print(split_words(sentence))

# %% [markdown]
# ## Stop words
#
# **Stop words** are words that nearly every text has. They say little about what a text is about, and are a large share of its tokens. (In a manual of Python, *class* is one of them.) The documents: 497 pages of Python's documentation.

# %%
from collections import Counter

import llmworks

folder = llmworks.load("asset:python-docs").path
pages, synopses = {}, {}
for path in sorted(folder.rglob("*.rst.txt")):
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(folder).as_posix().removesuffix(".rst.txt")
    if synopsis := re.search(r":synopsis:\s*(.+)", text):
        synopses[name] = synopsis[1].strip()
        for copy in (
            synopsis[0],
            synopsis[1].strip(),
        ):  # it will be the question; the page must not hold it
            text = text.replace(copy, "")
    pages[name] = text
words = {name: split_words(text) for name, text in pages.items()}
totals = Counter(word for page in words.values() for word in page)
document_counts = Counter(word for page in words.values() for word in set(page))
STOP = {w for w, n in document_counts.items() if n > 0.6 * len(pages) and w.isalpha()}
share = sum(totals[w] for w in STOP) / totals.total()
print(f"{len(pages)} pages, {totals.total():,} words, {len(totals):,} different ones")
print(f"{len(synopses)} questions")
print(
    f"{len(STOP)} words are on most pages and make up {share:.0%} of the text:",
    sorted(STOP)[:14],
    "...",
)

# %% [markdown]
# ## Stems
#
# **Stems** are what remains when endings are cut by rules: *connection*, *connected* and *connecting* become *connect*. Porter's stemmer (1980) has five steps of rules. A rule applies only when enough of the word remains: the *measure* $m$ counts how often vowels are followed by consonants.


# %%
def is_vowel(word, i):
    return word[i] in "aeiou" or (word[i] == "y" and i > 0 and not is_vowel(word, i - 1))


def measure(stem):
    """Return m of [C](VC)^m[V]."""
    kinds = "".join("v" if is_vowel(stem, i) else "c" for i in range(len(stem)))
    return len(re.findall("v+c+", kinds))


def has_vowel(stem):
    return any(is_vowel(stem, i) for i in range(len(stem)))


def ends_double(word):
    return len(word) > 1 and word[-1] == word[-2] and not is_vowel(word, len(word) - 1)


def ends_cvc(word):
    if len(word) < 3 or word[-1] in "wxy":
        return False
    return (
        not is_vowel(word, len(word) - 3)
        and is_vowel(word, len(word) - 2)
        and not is_vowel(word, len(word) - 1)
    )


STEP2 = """ational ate tional tion enci ence anci ance izer ize abli able alli al entli ent eli e
ousli ous ization ize ation ate ator ate alism al iveness ive fulness ful ousness ous aliti al
iviti ive biliti ble"""
STEP3 = "icate ic ative - alize al iciti ic ical ic ful - ness -"
STEP4 = """al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive
ize"""


def replace_longest(word, rules, least):
    """Apply the rule with the longest matching ending, if the stem's measure is above `least`."""
    for ending, new in sorted(rules, key=lambda rule: -len(rule[0])):
        if word.endswith(ending):
            stem = word[: len(word) - len(ending)]
            allowed = measure(stem) > least and (ending != "ion" or stem[-1:] in ("s", "t"))
            return stem + new if allowed else word
    return word


def pairs_of(text):
    parts = text.replace("-", "'").split()
    return [(parts[i], parts[i + 1].strip("'")) for i in range(0, len(parts), 2)]


def stem(word):
    """Return Porter's stem of a word in lower case."""
    for ending, new in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):  # 1a
        if word.endswith(ending):
            word = word[: len(word) - len(ending)] + new
            break
    if word.endswith("eed"):  # 1b
        word = word[:-1] if measure(word[:-3]) > 0 else word
    else:
        for ending in ("ed", "ing"):
            if word.endswith(ending) and has_vowel(word[: -len(ending)]):
                word = word[: -len(ending)]
                if word.endswith(("at", "bl", "iz")):
                    word += "e"
                elif ends_double(word) and word[-1] not in "lsz":
                    word = word[:-1]
                elif measure(word) == 1 and ends_cvc(word):
                    word += "e"
                break
    if word.endswith("y") and has_vowel(word[:-1]):  # 1c
        word = word[:-1] + "i"
    word = replace_longest(word, pairs_of(STEP2), 0)
    word = replace_longest(word, pairs_of(STEP3), 0)
    word = replace_longest(word, [(ending, "") for ending in STEP4.split()], 1)
    if word.endswith("e"):  # 5a
        m = measure(word[:-1])
        word = word[:-1] if m > 1 or (m == 1 and not ends_cvc(word[:-1])) else word
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word  # 5b


print(
    [
        stem(word)
        for word in ("connection", "connected", "relational", "university", "universe", "studies")
    ]
)

# %% tags=["parity"]
from nltk.stem.porter import PorterStemmer

library = PorterStemmer(mode=PorterStemmer.ORIGINAL_ALGORITHM)
vocabulary = [word for word in totals if word.isascii() and word.isalpha() and len(word) > 2]
different = [(w, stem(w), library.stem(w)) for w in vocabulary if stem(w) != library.stem(w)]
assert not different, different[:5]
print(
    f"our stems of {len(vocabulary):,} words are those of nltk's PorterStemmer (original algorithm)"
)

# %% [markdown]
# ## Lemmas
#
# **Lemmas** are dictionary forms: *mice* is *mouse*, *went* is *go*. They need a dictionary and the part of speech. WordNet's method: look up irregular forms in a list; otherwise try endings, and keep a form that the dictionary has.

# %%
wordnet = llmworks.load("asset:wordnet").path
ENDINGS = {
    "noun": [
        ("ses", "s"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
        ("s", ""),
    ],
    "verb": [
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
        ("s", ""),
    ],
}
irregular, known = {}, {}
for part in ENDINGS:
    lines = (wordnet / f"{part}.exc").read_text().splitlines()
    irregular[part] = {line.split()[0]: line.split()[1] for line in lines}
    index = (wordnet / f"index.{part}").read_text().splitlines()
    known[part] = {line.split()[0] for line in index if not line.startswith(" ")}


def lemma(word, part):
    """Return the dictionary form of a noun or verb; the word itself if none is known."""
    if word in irregular[part]:
        return irregular[part][word]
    if word in known[part]:
        return word
    tries = [word[: -len(old)] + new for old, new in ENDINGS[part] if word.endswith(old)]
    return next((form for form in tries if form in known[part]), word)


for word, part in (
    ("mice", "noun"),
    ("classes", "noun"),
    ("went", "verb"),
    ("running", "verb"),
    ("was", "verb"),
):
    print(f"{word:<8} {part}: lemma {lemma(word, part):<6} stem {stem(word)}")

# %% [markdown]
# ## n-grams
#
# **n-grams** are runs of $n$ tokens. Some pairs mean more than their words: *garbage collection*. *Pointwise mutual information*, $\log_2 \frac{P(ab)}{P(a)P(b)}$, compares how often two words stand together with what independence would give.

# %%
import math

bigrams = Counter(pair for page in words.values() for pair in zip(page, page[1:], strict=False))
count = totals.total()
scored = {
    (a, b): math.log2(n * count / (totals[a] * totals[b]))
    for (a, b), n in bigrams.items()
    if n >= 60 and a.isalpha() and b.isalpha()
}
print("most common:", [" ".join(pair) for pair, _ in bigrams.most_common(6)])
print("highest PMI:", [" ".join(pair) for pair in sorted(scored, key=scored.get)[-12:]])

# %% [markdown]
# ## Bag of words and TF-IDF
#
# A **bag of words** is a vector of counts, one place for each word; the order is lost. **TF-IDF** multiplies each count by the word's *inverse document frequency*, $\ln \frac{1 + N}{1 + n_w} + 1$: rare words count more. Vectors are scaled to length 1, and compared by their cosine.

# %%
import numpy as np

names = sorted(pages)
terms = sorted(word for word, n in document_counts.items() if n > 1)  # found on two pages or more
column = {word: i for i, word in enumerate(terms)}
frequency = np.zeros((len(names), len(terms)), dtype=np.float32)
for row, name in enumerate(names):
    for word, n in Counter(words[name]).items():
        if word in column:
            frequency[row, column[word]] = n
present = (frequency > 0).sum(axis=0)
idf = np.log((1 + len(names)) / (1 + present)) + 1
weights = frequency * idf
weights /= np.linalg.norm(weights, axis=1, keepdims=True)
print(f"matrix {frequency.shape}, {np.mean(frequency > 0):.2%} of the cells are not 0")
print(
    "asyncio-task:", [terms[i] for i in np.argsort(-weights[names.index("library/asyncio-task")])[:8]]
)

# %% tags=["parity"]
from sklearn.feature_extraction.text import TfidfVectorizer

vectorizer = TfidfVectorizer(analyzer=split_words, min_df=2, dtype=np.float32)
theirs = vectorizer.fit_transform(pages[name] for name in names)
assert list(vectorizer.get_feature_names_out()) == terms
np.testing.assert_allclose(weights, theirs.toarray(), atol=1e-5)
print("our TF-IDF matrix is that of sklearn's TfidfVectorizer")

# %% [markdown]
# ## BM25
#
# **BM25** mends faults of counting for search. The tenth occurrence of a word says less than the second: counts saturate. And long pages hold more words by their length alone; $b$ sets how much of this is corrected. For a question $q$ and a page $d$:
#
# $$\sum_{w \in q} \ln\left(1 + \frac{N - n_w + 0.5}{n_w + 0.5}\right) \cdot \frac{f_{w,d}\,(k_1 + 1)}{f_{w,d} + k_1 (1 - b + b\,|d| / \overline{|d|})}$$
#
# The test: each module's one-line synopsis, taken out of the page, is a question; the page it came from is the answer. *Mean reciprocal rank* (MRR) is the mean of 1 / (rank of the right page).


# %%
def mean_reciprocal_rank(score, questions):
    """`score(words)` returns a number for each page."""
    ranks = []
    for name, question in questions.items():
        scores = score(split_words(question))
        own = scores[names.index(name)]
        ranks.append(1 + (scores > own).sum() + ((scores == own).sum() - 1) / 2)  # ties share a rank
    return float(np.mean(1 / np.array(ranks))), float(np.mean(np.array(ranks) == 1))


def by_counts(query):
    return frequency[:, [column[w] for w in query if w in column]].sum(axis=1)


def by_tf_idf(query):
    places = [column[w] for w in query if w in column]
    return weights[:, places] @ idf[places]


def make_bm25(matrix, places, k1=1.2, b=0.75):
    """Return a BM25 score function over a matrix of counts; `places` maps a word to a column."""
    length = matrix.sum(axis=1)
    norm = k1 * (1 - b + b * length / length.mean())
    held = (matrix > 0).sum(axis=0)
    rarity = np.log(1 + (len(matrix) - held + 0.5) / (held + 0.5))

    def score(query):
        chosen = [places[w] for w in query if w in places]
        f = matrix[:, chosen]
        return (rarity[chosen] * f * (k1 + 1) / (f + norm[:, None])).sum(axis=1)

    return score


stems = sorted({stem(w) for w in terms})
stem_column = {s: i for i, s in enumerate(stems)}
stemmed = np.zeros((len(names), len(stems)), dtype=np.float32)
np.add.at(stemmed.T, [stem_column[stem(w)] for w in terms], frequency.T)
bm25_stems = make_bm25(stemmed, stem_column)
methods = {
    "counts": by_counts,
    "counts, no stop words": lambda q: by_counts([w for w in q if w not in STOP]),
    "TF-IDF": by_tf_idf,
    "BM25": make_bm25(frequency, column),
    "BM25, stems": lambda q: bm25_stems([stem(w) for w in q]),
}
results = {name: mean_reciprocal_rank(method, synopses) for name, method in methods.items()}
for name, (mrr, first) in results.items():
    print(f"{name:<22} MRR {mrr:.3f}, right page first {first:.0%}")

# %% tags=["picture"] alt="Mean reciprocal rank of five ways to search: raw counts find almost nothing, without stop words more, TF-IDF and BM25 most."
fig, ax = plt.subplots()
ax.barh(list(results), [mrr for mrr, _ in results.values()])
ax.set(
    xlabel="mean reciprocal rank (1 = always first)", ylabel="method (same questions)", xlim=(0, 1)
)
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. Sentences with numbers
#
# Write `count_sentences(text)` for English, which is right for decimal numbers, for `...`, for abbreviations of `ABBREVIATIONS`, and for a text without a full stop at its end. You may use `split_sentences`.


# %% tags=["exercise"]
def count_sentences(text): ...


# %% tags=["solution"]
def count_sentences(text):
    return len(split_sentences(text))


# %% tags=["wrong"]
# says: decimal
def count_sentences(text):
    return text.count(".")


# %% tags=["wrong"]
# says: at its end
def count_sentences(text):
    return len(re.findall(r"[.!?]+\s+(?=[A-Z])", text))


# %% tags=["check"]
found = count_sentences("Pi is 3.14. It never ends")
assert found is not None, "count_sentences returns nothing"
assert count_sentences("Pi is 3.14.") != 2, "a decimal point ends no sentence"
assert count_sentences("One. Two") == 2, (
    "the last sentence counts, also without a full stop at its end"
)
assert count_sentences("Use a tool, e.g. Python.") == 1, "e.g. ends no sentence"
assert count_sentences("Wait... He came.") == 2, "three dots are one end"
assert found == 2, f"expected 2, found {found}"
print("right")

# %% [markdown]
# ### 2. Inverse document frequency
#
# Write `compute_idf(documents)`: for lists of words, a dictionary with $\ln(N / n_w)$ for each word, where $n_w$ is the number of documents with the word.


# %% tags=["exercise"]
def compute_idf(documents): ...


# %% tags=["solution"]
def compute_idf(documents):
    counts = Counter(word for document in documents for word in set(document))
    return {word: math.log(len(documents) / n) for word, n in counts.items()}


# %% tags=["wrong"]
# says: occurrences
def compute_idf(documents):
    counts = Counter(word for document in documents for word in document)
    return {word: math.log(len(documents) / n) for word, n in counts.items()}


# %% tags=["wrong"]
# says: upside down
def compute_idf(documents):
    counts = Counter(word for document in documents for word in set(document))
    return {word: math.log(n / len(documents)) for word, n in counts.items()}


# %% tags=["check"]
found = compute_idf([["a", "b", "b"], ["a", "c"], ["a", "b"], ["d"]])
assert isinstance(found, dict), "compute_idf returns no dictionary"
assert found["d"] >= 0, "the ratio is upside down: rare words get the largest values"
assert not math.isclose(found["b"], math.log(4 / 3)), (
    "'b' has 3 occurrences, but is in 2 documents: count documents"
)
wanted = {"a": math.log(4 / 3), "b": math.log(2), "c": math.log(4), "d": math.log(4)}
assert all(math.isclose(found[w], v) for w, v in wanted.items()), f"expected {wanted}, found {found}"
print("right")

# %% [markdown]
# ### 3. Saturation
#
# Write `saturation(f, k1)`: the factor $f (k_1 + 1) / (f + k_1)$ by which BM25 counts $f$ occurrences in a page of average length.


# %% tags=["exercise"]
def saturation(f, k1): ...


# %% tags=["solution"]
def saturation(f, k1):
    return f * (k1 + 1) / (f + k1)


# %% tags=["wrong"]
# says: once
def saturation(f, k1):
    return f / (f + k1)


# %% tags=["wrong"]
# says: grows without end
def saturation(f, k1):
    return f * (k1 + 1)


# %% tags=["check"]
found = saturation(1, 1.2)
assert found is not None, "saturation returns nothing"
assert saturation(1000, 1.2) < 3, "the factor grows without end: it has to approach k1 + 1"
assert math.isclose(found, 1), f"a word that occurs once counts 1, found {found:.3f}"
assert math.isclose(saturation(3, 1.2), 3 * 2.2 / 4.2), "three occurrences count wrongly"
print("right:", [round(saturation(f, 1.2), 2) for f in (1, 2, 5, 10, 100)])

# %% [markdown]
# ## Self-test
#
# <details><summary>Why does a stemmer map both <em>university</em> and <em>universe</em> to <em>univers</em>?</summary>
#
# It knows endings, not meanings.
# </details>
#
# <details><summary>Which of the methods finds a page about <em>cars</em> for a question about <em>automobiles</em>?</summary>
#
# None. Words are equal or different here; lab F13 gives them distances.
# </details>
#
# <details><summary>What does b = 0 switch off in BM25?</summary>
#
# The correction for the length of the page.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
longest = np.argsort(-frequency.sum(axis=1))[:10]
won = np.mean([by_counts(split_words(q)).argmax() in longest for q in synopses.values()])
plain, no_stop, tf_idf, bm25, with_stems = (results[name] for name in methods)
display(
    Markdown(
        f"Counting shared words finds the right page first for {plain[1]:.0%} of the questions: for {won:.0%} of them one of the ten longest pages wins, because *the* and *of* are on it most often. Leaving out {len(STOP)} stop words makes it {no_stop[1]:.0%}; TF-IDF {tf_idf[1]:.0%}, BM25 {bm25[1]:.0%}, "
        f"BM25 with stems {with_stems[1]:.0%}. Stems lose more distinctions than they join words here. (Titles are still on the pages, and often resemble the question.) No training and no model: a baseline that every search by embeddings has to beat first."
    )
)

# %% [markdown]
# ## In llmworks
#
# Words of every script are counted by filters, near-duplicate search and scores; `data clean` applies published word statistics to a corpus:
#
# ```
# llmworks data read --data asset:python-docs --out pages
# llmworks data clean --data pages --out clean
# ```
#
# ## Go on
#
# - M. Porter, *An algorithm for suffix stripping* (1980)
# - S. Robertson and H. Zaragoza, *The probabilistic relevance framework: BM25 and beyond* (2009)
# - Next: [F13 Word vectors](F13_word_vectors.ipynb)
