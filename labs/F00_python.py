# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Write Python with its types, errors and classes, and count the words of six novels with it.
#     minutes: 60
#     budget_seconds: 30
#     assets: [austen]
#     topics: [syntax, types, functions, errors, classes]
# ---

# %% [markdown]
# # F00 Python: count the words of six novels
#
# **You will learn**: Write Python with its types, errors and classes, and count the words of six novels with it.
#
# **Time**: one hour to read and to do the exercises.
#
# **Needs**: nothing. If you know another programming language, an hour is enough.

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
# ## Values and names
#
# The **syntax** of Python has few rules. `name = value` binds a name to a value. A block belongs to the line that ends
# with a colon, and is indented by four spaces. `#` begins a comment. There is no declaration: a *value* has a type, a
# name has none.

# %%
number = 3
letters = 4.5
language = "Python"
known = True
missing = None

for value in (number, letters, language, known, missing):
    print(f"{value!r:>10} is of type {type(value).__name__}")

# %% [markdown]
# The basic **types** are `int`, `float`, `str`, `bool` and `NoneType`. Three properties surprise people who come from
# other languages:
#
# - An `int` has no largest value.
# - A `float` has 53 binary digits, so that one tenth cannot be stored exactly. Compare floats with a tolerance.
# - A `str` is a sequence of Unicode code points. Its length in bytes depends on the encoding.

# %%
import math

print(2**200)
print(
    7 / 2, 7 // 2, 7 % 2, -7 // 2
)  # division, floor division, remainder; // rounds down, also below zero
print(0.1 + 0.2 == 0.3, math.isclose(0.1 + 0.2, 0.3))
for text in ("house", "घर", "家", "🏠"):
    print(f"{text}: {len(text)} code points, {len(text.encode('utf-8'))} bytes in UTF-8")

# %% [markdown]
# ## Containers
#
# A `list` is an ordered sequence that can change, a `tuple` is one that cannot. A `dict` maps keys to values, a `set`
# holds each value once. A *comprehension* builds a container from a loop.

# %%
novels = ["Emma", "Persuasion", "Northanger Abbey"]
novels.append("Mansfield Park")
lengths = {title: len(title) for title in novels}

print(novels[0], novels[-1], novels[1:3])
print(lengths)
print(sorted(novels, key=len, reverse=True))
print({title[0] for title in novels})

# %% [markdown]
# A name is a reference. Two names can refer to one list; a change through one of them is visible through the other. The
# default value of an argument is made once, when the function is defined, and is shared by all calls. This is a
# common bug of beginners.

# %%
first = [1, 2]
second = first
second.append(3)
print(first, first is second, list(first) is first)


def collect(value, into=[]):  # noqa: B006  wrong on purpose
    into.append(value)
    return into


print(collect(1), collect(2))  # both calls return the same list

# %% [markdown]
# ## Functions
#
# **Functions** take arguments by position or by name and return one value, which may be a tuple. Annotations of types
# are notes for readers and tools; Python does not check them. The string below the first line is the documentation.


# %%
def split_words(text: str) -> list[str]:
    """Return the words of a text: runs of letters, in lower case, with apostrophes."""
    words, word = [], ""
    for character in text.lower() + " ":
        if character.isalpha() or (character in "'’" and word):
            word += character
        elif word:
            words.append(word.rstrip("'’"))
            word = ""
    return words


print(split_words("It's a truth — universally acknowledged: हिन्दी, 家!"))

# %% [markdown]
# Read the line of output again: the Hindi word is cut in two, because its vowel signs and its virama are *marks*, not letters,
# for `str.isalpha`. A rule that is right for English is wrong for Hindi, Tamil or Thai. Tokenizers (lab S02) start from
# bytes to avoid such rules. For the novels below, the rule is good enough.
#
# ## Read and count
#
# An asset is a data set with a name and a digest; it is fetched once. A *session* runs stages and keeps their results in the folder `workspace`. The stage `data.read` turns files into rows of text, in files of the format Parquet; pandas reads those (lab F05).

# %%
import pandas

import llmworks

session = llmworks.Session("workspace", quiet=True)
dataset = session.make("data.read", kind=llmworks.Dataset, data="asset:austen")
rows = pandas.read_parquet(next(dataset.path.glob("*.parquet")))
texts = {text.strip().splitlines()[0].title(): text for text in rows["text"]}
for title, text in texts.items():
    print(f"{title:<25} {len(text):>9,} characters")

# %% [markdown]
# Counting is a loop over words and a dictionary. `dict.get` returns a default for a key that is not there yet.


# %%
def count(items):
    """Return how often each item occurs."""
    counts = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


words = [word for text in texts.values() for word in split_words(text)]
counts = count(words)
ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
print(f"{len(words):,} words, {len(counts):,} different ones")
print(ranked[:8])

# %% [markdown]
# The standard library has this function: `collections.Counter`. Know the standard library before you write a loop.

# %% tags=["parity"]
from collections import Counter

assert counts == Counter(words)
print("our counts are those of collections.Counter")

# %% [markdown]
# ## Draw
#
# A word's frequency falls roughly as one over its rank: *Zipf's law*. On two logarithmic axes that is a straight line; real words bend away from it at both ends.

# %% tags=["picture"] alt="Frequency of each word against its rank on logarithmic axes: it falls along the line 1 / rank in the middle, lies below it for the most common words and bends down for the rare ones."
frequencies = [number for _, number in ranked]
ranks = range(1, len(frequencies) + 1)
fig, ax = plt.subplots()
ax.loglog(ranks, frequencies, ".", markersize=3, label="six novels")
ax.loglog(
    ranks,
    [frequencies[9] * 10 / rank for rank in ranks],
    "--",
    label="1 / rank, through rank 10",
)
for rank in (1, 10, 100, 1000):
    ax.annotate(
        ranked[rank - 1][0],
        (rank, frequencies[rank - 1]),
        textcoords="offset points",
        xytext=(4, 6),
    )
ax.set(
    xlabel="rank (1 = most common word)",
    ylabel="frequency (occurrences)",
    title="Zipf's law in six novels",
)
ax.legend()
plt.show()

# %% [markdown]
# ## Errors
#
# **Errors** are values, too: exceptions. `raise` throws one, `try` and `except` catch it; `from None` hides an earlier one. A
# good message says what is wrong, where, and what to do. Catch the narrowest class that you can handle; an `except:`
# without a class also hides your typing mistakes.


# %%
def read_year(line: str, number: int) -> int:
    """Return the year in the last parentheses of a line."""
    digits = line.rpartition("(")[2].rstrip(") ")
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"line {number}: {digits!r} is no year; write it as '(1814)'") from None


for number, line in enumerate(["Mansfield Park (1814)", "Emma"], 1):
    try:
        print(read_year(line, number))
    except ValueError as error:
        print("ValueError:", error)

# %% [markdown]
# ## Classes
#
# **Classes** bind data and the functions on it. `__init__` runs when an object is made; methods with two underscores on
# both sides define what operators and built-in functions do with it; `self` is the object. `class B(A)` *inherits*: B has all methods of A, and may
# define some of them anew. The class below numbers words: the first step of
# every language model.


# %%
class Vocabulary:
    """Words and their numbers; the most common word has the number 0."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.words = sorted(counts, key=lambda word: (-counts[word], word))
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.numbers

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text's words; KeyError for an unknown word."""
        return [self.numbers[word] for word in split_words(text)]


vocabulary = Vocabulary(counts)
print(len(vocabulary), "truth" in vocabulary, "laptop" in vocabulary)
print(vocabulary.encode("It is a truth universally acknowledged"))

# %% [markdown]
# ## Generators
#
# A function with `yield` is a *generator*: it makes one value at a time, when the next one is needed. A corpus that does not fit into memory is
# read in this way.


# %%
def read_pairs(words):
    """Yield each word with the word after it."""
    previous = None
    for word in words:
        if previous is not None:
            yield previous, word
        previous = word


pairs = read_pairs(words)
print(next(pairs), next(pairs))
followers = Counter(word for before, word in read_pairs(words) if before == "dear")
print("after 'dear':", followers.most_common(5))

# %% [markdown]
# ## Exercises
#
# ### 1. Count letters
#
# Write `count_letters(text)`: a dictionary that maps each letter, in lower case, to how often it occurs. Everything that is not a letter
# (`str.isalpha`) is left out.


# %% tags=["exercise"]
def count_letters(text): ...


# %% tags=["solution"]
def count_letters(text):
    return dict(Counter(character for character in text.lower() if character.isalpha()))


# %% tags=["wrong"]
# says: upper and lower case
def count_letters(text):
    return dict(Counter(character for character in text if character.isalpha()))


# %% tags=["wrong"]
# says: not letters
def count_letters(text):
    return dict(Counter(text.lower()))


# %% tags=["check"]
found = count_letters("Ada, Ärger: 42!")
assert isinstance(found, dict), (
    f"it returns {type(found).__name__}, not a dictionary; is a 'return' missing?"
)
assert not {"A", "Ä"} & set(found), "upper and lower case are counted apart: use text.lower()"
assert set(found) <= set("adärgre"), f"these are not letters: {sorted(set(found) - set('adärgre'))}"
assert "ä" in found, "ä is missing: it is a letter, too (str.isalpha)"
assert found == {"a": 2, "d": 1, "ä": 1, "r": 2, "g": 1, "e": 1}, f"the numbers are wrong: {found}"
print("right")

# %% [markdown]
# ### 2. Unknown words
#
# `Vocabulary.encode` fails at the first unknown word, and its message does not say where. Write a class `OpenVocabulary(Vocabulary)`
# that inherits from `Vocabulary` and whose
# `encode` returns, for every unknown word, the number of words that the vocabulary has: `len(self)`.


# %% tags=["exercise"]
class OpenVocabulary(Vocabulary): ...


# %% tags=["solution"]
class OpenVocabulary(Vocabulary):
    def encode(self, text):
        return [self.numbers.get(word, len(self)) for word in split_words(text)]


# %% tags=["wrong"]
# says: dropped
class OpenVocabulary(Vocabulary):
    def encode(self, text):
        return [self.numbers[word] for word in split_words(text) if word in self]


# %% tags=["wrong"]
# says: -1
class OpenVocabulary(Vocabulary):
    def encode(self, text):
        return [self.numbers.get(word, -1) for word in split_words(text)]


# %% tags=["check"]
small = OpenVocabulary({"a": 2, "truth": 1})
try:
    found = small.encode("A laptop truth")
except KeyError as error:
    raise AssertionError(f"encode still fails with KeyError: {error}") from None
assert isinstance(found, list), f"encode returns {type(found).__name__}, not a list"
assert len(found) == 3, (
    f"3 words went in, {len(found)} numbers came out: unknown words must not be dropped"
)
assert found[1] != -1, "-1 is a valid index of a list in Python (the last item): use len(self)"
assert found == [0, 2, 1], f"expected [0, 2, 1], found {found}"
print("right")

# %% [markdown]
# ### 3. A message that helps
#
# Write `parse_count(text)`, which returns the non-negative whole number in a text such as `"12"` or `" 12 "`. For anything else
# it raises a `ValueError` whose message contains the text as it was given, as `repr` shows it (`{text!r}`).


# %% tags=["exercise"]
def parse_count(text): ...


# %% tags=["solution"]
def parse_count(text):
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r} is no non-negative whole number")
    return int(text)


# %% tags=["wrong"]
# says: returned -3
def parse_count(text):
    return int(text)


# %% tags=["wrong"]
# says: does not contain
def parse_count(text):
    if not text.strip().isdecimal():
        raise ValueError("this is no non-negative whole number")
    return int(text)


# %% tags=["wrong"]
# says: no exception
def parse_count(text):
    try:
        return int(text)
    except ValueError:
        return None


# %% tags=["check"]
assert parse_count(" 12 ") == 12, f"parse_count(' 12 ') is {parse_count(' 12 ')!r}, not 12"
for bad in ("-3", "twelve", " x ", "", "1.5", "+5", "1_000"):
    try:
        found = parse_count(bad)
    except ValueError as error:
        assert repr(bad) in str(error), f"the message for {bad!r} does not contain it: {error}"
    else:
        raise AssertionError(f"no exception for {bad!r}: it returned {found!r}")
print("right")

# %% [markdown]
# ## Self-test
#
# <details><summary>What does <code>a = b = []; a.append(1); print(b)</code> print, and why?</summary>
#
# `[1]`. Both names refer to one list.
# </details>
#
# <details><summary>Why is <code>len("🏠".encode())</code> 4 and <code>len("🏠")</code> 1?</summary>
#
# The first counts bytes in UTF-8, the second code points.
# </details>
#
# <details><summary>When does the code in a generator run?</summary>
#
# When its next value is requested, not when the function is called.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
once = sum(number == 1 for number in counts.values())
top = sum(number for _, number in ranked[:100]) / len(words)
display(
    Markdown(
        "We expected that words which occur only once are rare in six novels. "
        f"{once / len(counts):.0%} of the {len(counts):,} different words occur exactly "
        f"once in six novels, while the 100 most common words are {top:.0%} of the text. "
        "A model that knows words by number has seen those rare words a single time. "
        "This is why tokenizers cut rare words into parts."
    )
)

# %% [markdown]
# ## In llmworks
#
# The same reading and counting, for files of any format, with a report:
#
# ```
# llmworks data read --data asset:austen --out novels
# llmworks tokenize train --data novels --set vocab_size=1000 --out tokenizer
# ```
#
# ## Go on
#
# - G. K. Zipf, *Human Behavior and the Principle of Least Effort* (1949)
# - Next: [F01 Linear algebra](F01_linear_algebra.ipynb)
