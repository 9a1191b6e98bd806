# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Decide whether one model is better than another, with intervals, tests and a plan for the number of questions.
#     minutes: 70
#     budget_seconds: 60
#     needs: [F03]
#     assets: [sarcasm-headlines]
#     topics: [maximum likelihood, confidence intervals, Bayesian inference, hypothesis tests, power]
# ---

# %% [markdown]
# # F04 Statistics: is this model better, or lucky?
#
# **You will learn**: Decide whether one model is better than another, with intervals, tests and a plan for the number of questions.
#
# **Time**: 70 minutes to read and to do the exercises.
#
# **Needs**: [F03](F03_probability.ipynb).

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
# ## Two models and a test set
#
# The data are newspaper headlines, nearly half of them satire. Model A looks at words, model B also at pairs of words. Both answer the same 1,000
# headlines that they have not seen. Everything that follows needs only the two columns of right and wrong answers.

# %%
import json

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import llmworks

folder = llmworks.load("asset:sarcasm-headlines").path
with (folder / "sarcasm.jsonl").open(encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
headlines = np.array([row["input"][-1]["content"] for row in rows])
labels = np.array([int(row["ideal"]) for row in rows])
order = np.random.default_rng(0).permutation(len(rows))
train, test = order[:3000], order[3000:4000]

correct = {}
for name, ngrams in (("A", (1, 1)), ("B", (1, 2))):
    model = make_pipeline(CountVectorizer(ngram_range=ngrams), LogisticRegression(max_iter=2000))
    model.fit(headlines[train], labels[train])
    correct[name] = (model.predict(headlines[test]) == labels[test]).astype(float)
a, b = correct["A"], correct["B"]
print(
    f"A: {a.mean():.1%}, B: {b.mean():.1%} of {len(test)} headlines; both right: {(a * b).mean():.1%}"
)

# %% [markdown]
# ## Maximum likelihood
#
# The model's true accuracy $p$, on all headlines of this kind, is unknown. The *likelihood* of a value of $p$ is the probability of the observed
# answers if $p$ were true: $L(p) = p^k (1-p)^{n-k}$ for $k$ right answers of $n$. **Maximum likelihood** estimates $p$ by the value with the largest likelihood,
# here $k/n$. Training a language model is maximum likelihood, too: the loss is $-\log L$ per token.

# %% tags=["picture"] alt="Log-likelihood of the accuracy for 50, 200 and 1,000 answers: three curves with one peak each, near 0.8; the more answers, the narrower the peak."
grid = np.linspace(0.5, 0.99, 500)
fig, ax = plt.subplots()
for n in (50, 200, 1000):
    k = a[:n].sum()
    log_likelihood = k * np.log(grid) + (n - k) * np.log(1 - grid)
    ax.plot(grid, log_likelihood - log_likelihood.max(), label=f"{n} answers, best {k / n:.3f}")
    assert abs(grid[log_likelihood.argmax()] - k / n) < 1e-3
ax.set(ylim=(-8, 0.5), xlabel="accuracy p (share)", ylabel="log-likelihood (nats below the best)")
ax.legend()
plt.show()

# %% [markdown]
# ## Confidence intervals
#
# A 95 % **confidence interval** comes from a procedure that covers the true value in 95 of 100 repetitions. **Confidence intervals** of a share:
#
# - *Wald*: $\hat p \pm z \sqrt{\hat p (1 - \hat p) / n}$ with $z = 1.96$. It is wrong for few answers and for shares near 0 or 1.
# - *Wilson*: all values of $p$ under which the observed share would not be unusual. It is never outside of 0 to 1.
# - *Bootstrap*: draw $n$ answers from the observed ones, with replacement, many times; take the middle 95 % of the means. It works for most
#   statistics, such as a median or a BLEU score, but not for a maximum.

# %%
z = 1.959964


def wald(k, n):
    p = k / n
    half = z * np.sqrt(p * (1 - p) / n)
    return p - half, p + half


def wilson(k, n):
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def bootstrap(values, resamples=4000, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.choice(values, size=(resamples, len(values))).mean(axis=1)
    return tuple(np.quantile(means, [0.025, 0.975]))


for name, interval in (
    ("Wald", wald(a.sum(), 1000)),
    ("Wilson", wilson(a.sum(), 1000)),
    ("bootstrap", bootstrap(a)),
):
    print(f"{name:<10} {interval[0]:.4f} to {interval[1]:.4f}")
print("19 of 20 right, Wald:  ", np.round(wald(19, 20), 3), " above 1!")
print("19 of 20 right, Wilson:", np.round(wilson(19, 20), 3))

# %% tags=["parity"]
from scipy.stats import binomtest

for k, n in ((19, 20), (0, 30), (int(a.sum()), 1000)):
    library = binomtest(k, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(k, n), (library.low, library.high), atol=1e-6)
print("our Wilson intervals are those of scipy.stats.binomtest")

# %% [markdown]
# Does the procedure keep its promise? Draw test sets with a known accuracy and count how often the interval covers it.

# %% tags=["picture"] alt="Share of intervals that cover the true accuracy against the number of questions: Wilson stays near 95 percent, Wald covers it in only 40 percent for ten questions and reaches the promise near 300."
rng = np.random.default_rng(0)
sizes, truth = (10, 20, 40, 80, 160, 320), 0.95
covered = {"Wald": [], "Wilson": []}
for questions in sizes:
    draws = rng.binomial(questions, truth, size=4000)
    for name, interval in (("Wald", wald), ("Wilson", wilson)):
        low, high = interval(draws, questions)
        covered[name].append(np.mean((low <= truth) & (truth <= high)))
fig, ax = plt.subplots()
for name, shares in covered.items():
    ax.plot(sizes, shares, "o-", label=name)
ax.axhline(0.95, color="grey", linestyle="--", label="promised")
ax.set(xscale="log", xlabel="questions (count)", ylabel="intervals that cover the truth (share)")
ax.legend()
plt.show()

# %% [markdown]
# ## Bayesian inference
#
# **Bayesian inference** treats $p$ itself as a random variable. With a uniform prior, the posterior after $k$ right answers of $n$ is the distribution
# Beta($k + 1$, $n - k + 1$). It answers the question that people really ask: how probable is it that B is better than A? Here the answers of A and B are taken as
# independent, which they are not; the test in the next section uses the pairs.

# %%
k_a, k_b, n = int(a.sum()), int(b.sum()), len(a)
posterior_a = rng.beta(k_a + 1, n - k_a + 1, size=200_000)
posterior_b = rng.beta(k_b + 1, n - k_b + 1, size=200_000)
low, high = np.quantile(posterior_a, [0.025, 0.975])
print(f"A: 95 % of the posterior lie between {low:.4f} and {high:.4f}")
print(f"probability that B is better than A: {np.mean(posterior_b > posterior_a):.3f}")

# %% [markdown]
# ## Hypothesis tests
#
# **Hypothesis tests** ask how unusual the data would be if there were no difference (the *null hypothesis*). The *p-value* is the probability of a difference at least as
# large as the observed one, by luck alone. It is not the probability that there is no difference.
#
# Both models answered the same questions, so the test is *paired*: only questions that one of them got right and the other wrong say something. If there is no
# difference, each of these is a fair coin. The *permutation test* flips the coins.


# %%
def paired_p_value(a, b, flips=20_000, seed=0):
    """Return the two-sided p-value of the mean difference, by flipping signs."""
    difference = b - a
    difference = difference[difference != 0]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, len(difference)))
    lucky = np.abs(signs @ difference)
    return float((1 + np.sum(lucky >= abs(difference.sum()) - 1e-9)) / (1 + flips))


def unpaired_p_value(a, b):
    """Return the p-value of the z test, as if other questions had been asked."""
    from math import erfc

    spread = np.sqrt(a.var() / len(a) + b.var() / len(b))
    return erfc(abs(b.mean() - a.mean()) / spread / np.sqrt(2))


only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
print(f"only A right: {only_a}, only B right: {only_b}")
print(
    f"paired: p = {paired_p_value(a, b):.4f}; exact: {binomtest(only_a, only_a + only_b).pvalue:.4f}"
)
print(f"unpaired: p = {unpaired_p_value(a, b):.4f}")

# %% [markdown]
# ## Power
#
# A test that finds nothing may be too small. **Power** is the probability that a test finds a difference that is there. Simulate: take the observed answers as the
# population, draw $n$ questions, test, repeat.


# %%
def power(a, b, n, repeats=300, seed=0):
    """Return the share of test sets of n questions for which p < 0.05."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(repeats):
        chosen = rng.integers(0, len(a), n)
        found += paired_p_value(a[chosen], b[chosen], flips=400) < 0.05
    return found / repeats


better = a.copy()
better[np.flatnonzero(a == 0)[::8]] = 1  # as A, and an eighth of its errors mended
counts = (50, 100, 200, 400, 800)
powers = [power(a, better, n) for n in counts]
print(f"true difference {better.mean() - a.mean():.3f}")

# %% tags=["picture"] alt="Power against the number of questions: it rises from nearly 0 at 50 questions to nearly 1 at 800 questions."
fig, ax = plt.subplots()
ax.plot(counts, powers, "o-")
ax.axhline(0.8, color="grey", linestyle="--", label="the usual demand")
ax.set(
    xlabel="questions (count)",
    ylabel="power (share of test sets with p < 0.05)",
    ylim=(0, 1.02),
)
ax.legend()
plt.show()

# %% [markdown]
# ## Exercises
#
# ### 1. An interval for a difference
#
# Write `difference_interval(a, b)`: the 95 % bootstrap interval of the mean of $b - a$. Draw *questions*, so that the pairs stay together.


# %% tags=["exercise"]
def difference_interval(a, b): ...


# %% tags=["solution"]
def difference_interval(a, b):
    return bootstrap(b - a)


# %% tags=["wrong"]
# says: apart
def difference_interval(a, b):
    rng = np.random.default_rng(0)
    one = rng.choice(a, size=(4000, len(a))).mean(axis=1)
    other = rng.choice(b, size=(4000, len(b))).mean(axis=1)
    return tuple(np.quantile(other - one, [0.025, 0.975]))


# %% tags=["wrong"]
# says: sign
def difference_interval(a, b):
    return bootstrap(a - b)


# %% tags=["check"]
found = difference_interval(a, better)
assert found is not None, "difference_interval returns nothing"
low, high = found
assert low > 0 or high > 0, (
    "the sign is wrong: the second argument is the better one here, b - a is positive"
)
wanted = np.quantile(
    np.random.default_rng(1).choice(better - a, (4000, n)).mean(axis=1), [0.025, 0.975]
)
assert high - low < 1.5 * (wanted[1] - wanted[0]), (
    "too wide: a and b were drawn apart; draw questions"
)
assert high - low > 0.9 * (wanted[1] - wanted[0]), (
    "too narrow for 95 %: take the quantiles 0.025 and 0.975"
)
assert np.allclose([low, high], wanted, atol=0.004), f"expected about {wanted}, found {found}"
print(f"right: {low:.3f} to {high:.3f}")

# %% [markdown]
# ### 2. How many questions?
#
# The standard error of a share is at most $\sqrt{1/4n}$. Write `questions_for(half_width)`: the number of questions for which a 95 % Wald interval is at most
# $\pm$ `half_width`, whatever the accuracy.


# %% tags=["exercise"]
def questions_for(half_width): ...


# %% tags=["solution"]
def questions_for(half_width):
    return int(np.ceil(z**2 / (4 * half_width**2)))


# %% tags=["wrong"]
# says: standard error
def questions_for(half_width):
    return int(np.ceil(1 / (4 * half_width**2)))


# %% tags=["wrong"]
# says: whole width
def questions_for(half_width):
    return int(np.ceil(z**2 / half_width**2))


# %% tags=["check"]
found = questions_for(0.05)
assert found is not None, "questions_for returns nothing"
assert found != 100, "this makes one standard error that small: the interval has 1.96 of them"
assert found != 1537, "this makes the whole width, not the half, that small"
assert found not in (384, 384.1459), "round up: 384 questions are too few"
assert found == 385, f"expected 385, found {found}"
print("right; for one percentage point either way:", questions_for(0.01))

# %% [markdown]
# ### 3. Twenty tries
#
# Somebody trains 20 models that are no better than the old one, and reports those with a p-value below 5 %. Write `chance_of_a_find(tests)`: the probability that at least one
# of this many independent tests finds something, and `bonferroni(p_values)`: a list of True and False, which of them stay significant when the limit of 5 % is divided by their number.


# %% tags=["exercise"]
def chance_of_a_find(tests): ...


def bonferroni(p_values): ...


# %% tags=["solution"]
def chance_of_a_find(tests):
    return 1 - 0.95**tests


def bonferroni(p_values):
    return [p < 0.05 / len(p_values) for p in p_values]


# %% tags=["wrong"]
# says: more than 1
def chance_of_a_find(tests):
    return 0.05 * tests


def bonferroni(p_values):
    return [p < 0.05 / len(p_values) for p in p_values]


# %% tags=["wrong"]
# says: divide
def chance_of_a_find(tests):
    return 1 - 0.95**tests


def bonferroni(p_values):
    return [p < 0.05 for p in p_values]


# %% tags=["check"]
found = chance_of_a_find(40)
assert found is not None, "chance_of_a_find returns nothing"
assert bonferroni([0.5]) is not None, "bonferroni returns nothing"
assert found <= 1, "a probability of more than 1: none finds anything with probability 0.95 ** tests"
assert abs(chance_of_a_find(20) - 0.6415) < 1e-3, (
    f"expected 0.6415 for 20, found {chance_of_a_find(20):.4f}"
)
assert list(bonferroni([0.04, 0.5])) == [False, False], "divide 0.05 by the number of tests"
assert list(bonferroni([0.04, 0.001])) == [False, True], "0.001 is below 0.05 / 2"
print("right: 20 useless models, a 'find' with probability", round(chance_of_a_find(20), 2))

# %% [markdown]
# ## Self-test
#
# <details><summary>The p-value is 3 %. Is the probability that the models are equal 3 %?</summary>
#
# No. If they were equal, a difference this large would occur in 3 % of test sets. How probable equality is also depends on the prior.
# </details>
#
# <details><summary>Two 95 % intervals overlap. Is the difference insignificant?</summary>
#
# That does not follow, and for paired answers it is often wrong. Test the difference.
# </details>
#
# <details><summary>Why not simply test until p falls below 5 %?</summary>
#
# Every look is another chance to be lucky. Fix the number of questions beforehand.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
one, other = wilson(a.sum(), n), wilson(better.sum(), n)
mended = int((better - a).sum())
exact = binomtest(mended, mended).pvalue
display(
    Markdown(
        f"The mended model has {better.mean():.1%}, A has {a.mean():.1%}; their intervals are {one[0]:.1%} to {one[1]:.1%} and {other[0]:.1%} to {other[1]:.1%}, and overlap. The unpaired test says "
        f"p = {unpaired_p_value(a, better):.2f}, it finds nothing. The exact paired test says p = {exact:.0e}. The answers are the same; the paired test also knows which of them belong to one question. (This is the best case for it: the mended model is never worse on any question.) "
        f"And with {counts[1]} questions, a usual size, even the paired test finds this improvement in only {powers[1]:.0%} of test sets."
    )
)

# %% [markdown]
# ## In llmworks
#
# Every score has an interval, and `evaluate compare` tests two evaluations sample by sample, by bootstrap and by flipping signs:
#
# ```
# llmworks evaluate compare --before base-score --after tuned-score --out change
# ```
#
# ## Go on
#
# - E. Miller, *Adding error bars to evals*, arXiv:2411.00640
# - B. Efron and R. Tibshirani, *An Introduction to the Bootstrap* (1993)
# - Next: [F05 NumPy, pandas, plots](F05_arrays_and_tables.ipynb)
