# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab:
#     learn: Compute with vectors and matrices, and find the best small approximation of a large matrix.
#     minutes: 60
#     budget_seconds: 30
#     needs: [F00]
#     topics: [vectors, vector spaces, matrices, linear maps, determinants, eigenvalues, eigenvectors, singular value decomposition]
# ---

# %% [markdown]
# # F01 Linear algebra: a picture is a matrix
#
# **You will learn**: Compute with vectors and matrices, and find the best small approximation of a large matrix.
#
# **Time**: one hour to read and to do the exercises.
#
# **Needs**: [F00](F00_python.ipynb).

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
# ## Vectors
#
# **Vectors** are lists of numbers that can be added and multiplied by a number. The *dot product* $x \cdot y = \sum_i x_i y_i$
# is large when two vectors are long and point in the same direction. The *norm* $\|x\| = \sqrt{x \cdot x}$ is a vector's length, and
# $x \cdot y / (\|x\| \|y\|)$ is the cosine of the angle between two vectors. A language model compares words, sentences and
# positions by these three formulas.

# %%
import math

import numpy as np


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def norm(x):
    return math.sqrt(dot(x, x))


x, y = [3.0, 4.0], [4.0, -3.0]
print("x + 2y      =", [a + 2 * b for a, b in zip(x, y, strict=True)])
print("x · y       =", dot(x, y), " (perpendicular)")
print("|x|         =", norm(x), "  numpy:", np.linalg.norm(x))
print("cosine(x, [1, 1]) =", round(dot(x, [1, 1]) / (norm(x) * norm([1, 1])), 4))

# %% [markdown]
# ## Matrices
#
# **Matrices** are tables of numbers, with rows and columns. The product $C = AB$ has
# $C_{ij} = \sum_k A_{ik} B_{kj}$: the dot product of row $i$ of $A$ with column $j$ of $B$. The number of columns of $A$ has to
# be the number of rows of $B$. Nearly all the arithmetic of a language model is this product.


# %%
def multiply(a, b):
    """Return the product of two matrices, as lists of rows."""
    columns = list(zip(*b, strict=True))
    return [[dot(row, column) for column in columns] for row in a]


rng = np.random.default_rng(0)
a, b = rng.normal(size=(4, 3)), rng.normal(size=(3, 5))
np.testing.assert_allclose(multiply(a.tolist(), b.tolist()), a @ b)
print("shapes:", a.shape, "times", b.shape, "is", (a @ b).shape)
print("AB = BA:", np.allclose(a[:3] @ b[:, :3], b[:, :3] @ a[:3]))

# %% [markdown]
# ## Linear maps
#
# A matrix is a function: $f(x) = Ax$. Such functions are the **linear maps**: $f(\alpha x + \beta y) = \alpha f(x) + \beta f(y)$. The
# columns of $A$ are the images of the unit vectors. The product of two matrices is one map after the other. The
# **determinants** of square matrices measure by which factor the map changes areas (in the plane) or volumes; the sign says
# whether it mirrors. A determinant of 0 means that the map flattens the plane into a line or a point, and cannot be undone.

# %% tags=["picture"] alt="A unit square with a notch in it, and its image under a rotation, a shear, a mirror and a projection; the titles give the determinants 1, 1, -1 and 0."
maps = {
    "rotation": np.array([[0.8, -0.6], [0.6, 0.8]]),
    "shear": np.array([[1.0, 0.8], [0.0, 1.0]]),
    "mirror": np.array([[-1.0, 0.0], [0.0, 1.0]]),
    "projection": np.array([[0.8, 0.4], [0.4, 0.2]]),
}
shape = np.array([[0, 0], [1, 0], [1, 1], [0.5, 1], [0.5, 0.7], [0, 1], [0, 0]]).T
fig, axes = plt.subplots(1, 4, figsize=(9, 2.4), sharex=True, sharey=True)
for ax, (name, m) in zip(axes, maps.items(), strict=True):
    ax.fill(*shape, alpha=0.25, label="x")
    ax.fill(*(m @ shape), alpha=0.6, edgecolor="tab:red", linewidth=2, label="Ax")
    ax.set(title=f"{name}, det {np.linalg.det(m):.0f}", aspect="equal", ylim=(-0.3, 1.7))
axes[0].legend(fontsize=8)
fig.supxlabel("first coordinate (unit of length)", fontsize=9)
fig.supylabel("second (unit of length)", fontsize=9)
plt.show()

# %% [markdown]
# Elimination computes the **determinants** of all sizes: subtract multiples of a row from the rows below until the matrix is
# triangular. This changes no volume. Then the determinant is the product of the diagonal, with one change of sign for each
# exchange of rows.


# %%
def determinant(matrix):
    """Return the determinant by Gaussian elimination with pivoting."""
    m, sign = np.array(matrix, dtype=float), 1.0
    for i in range(len(m)):
        pivot = i + int(np.argmax(np.abs(m[i:, i])))
        if m[pivot, i] == 0:
            return 0.0
        if pivot != i:
            m[[i, pivot]] = m[[pivot, i]]
            sign = -sign
        m[i + 1 :] -= np.outer(m[i + 1 :, i] / m[i, i], m[i])
    return sign * float(np.prod(np.diag(m)))


m = rng.normal(size=(6, 6))
np.testing.assert_allclose(determinant(m), np.linalg.det(m))
print(f"determinant of a 6 × 6 matrix: {determinant(m):.4f}, numpy: {np.linalg.det(m):.4f}")

# %% [markdown]
# ## Vector spaces
#
# All sums $\alpha_1 v_1 + \dots + \alpha_n v_n$ form the *span* of the vectors $v_i$. Spans are **vector spaces**: sums and
# multiples stay inside. Vectors are *independent* when none is in the span of the others. A *basis* is an independent set that
# spans the space; all bases have the same size, the *dimension*. The dimension of the span of a matrix' columns is its *rank*.
# Gram-Schmidt turns vectors into a basis of perpendicular unit vectors: from each vector, subtract its projection onto the
# ones before; drop it when nothing is left.


# %%
def orthonormal_basis(vectors, tolerance=1e-10):
    """Return perpendicular unit vectors with the same span."""
    basis = []
    for vector in np.asarray(vectors, dtype=float):
        rest = vector - sum((vector @ u * u for u in basis), np.zeros(len(vector)))
        if np.linalg.norm(rest) > tolerance * np.linalg.norm(vector):
            basis.append(rest / np.linalg.norm(rest))
    return np.array(basis)


vectors = rng.normal(size=(3, 8))
vectors = np.vstack([vectors, vectors[0] - 2 * vectors[2]])  # the fourth is in the span of the others
basis = orthonormal_basis(vectors)
np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
print("4 vectors, rank", len(basis), "; numpy:", np.linalg.matrix_rank(vectors))

# %% [markdown]
# ## Eigenvalues and eigenvectors
#
# The **eigenvectors** of a square matrix keep their direction: $Av = \lambda v$. The numbers $\lambda$ are the **eigenvalues**. A symmetric
# $n \times n$ matrix has $n$ perpendicular eigenvectors. *Power iteration* finds that of the largest eigenvalue: multiply any vector by $A$ and scale it to length 1, again and
# again. Then remove what was found, $A - \lambda v v^\top$, and find the next.


# %%
def eigen(a, count, steps=2000):
    """Return the largest eigenvalues (by size) and eigenvectors of a symmetric matrix."""
    a, values, found = a.copy(), [], []
    start = np.random.default_rng(1)
    for _ in range(count):
        v = start.normal(size=len(a))
        for _ in range(steps):
            v = a @ v
            v /= np.linalg.norm(v)
        values.append(v @ a @ v)
        found.append(v)
        a -= values[-1] * np.outer(v, v)
    return np.array(values), np.array(found)


m = rng.normal(size=(6, 40))
symmetric = m @ m.T
values, found = eigen(symmetric, 6)
np.testing.assert_allclose(values, np.linalg.eigvalsh(symmetric)[::-1])
print("eigenvalues:", values.round(2))
print(
    "product of the eigenvalues / determinant:",
    round(np.prod(values) / determinant(symmetric), 10),
)

# %% [markdown]
# ## Singular value decomposition
#
# Every matrix, of any shape, is $A = U \Sigma V^\top$: perpendicular unit vectors $u_i$ and $v_i$, and singular values
# $\sigma_1 \ge \sigma_2 \ge \dots \ge 0$. The map sends $v_i$ to $\sigma_i u_i$. The **singular value decomposition** (SVD) follows from the
# eigenvectors of $A^\top A$, since $A^\top A v_i = \sigma_i^2 v_i$.


# %%
def svd(a, count):
    """Return the `count` largest singular values, not more than the rank: U, sigma, V^T."""
    values, v = eigen(a.T @ a, count)
    sigma = np.sqrt(np.maximum(values, 0))
    return (a @ v.T) / sigma, sigma, v


a = rng.normal(size=(9, 5))
u, sigma, vt = svd(a, 5)
np.testing.assert_allclose(u * sigma @ vt, a, atol=1e-8)
print("singular values:", sigma.round(4))

# %% tags=["parity"]
np.testing.assert_allclose(sigma, np.linalg.svd(a, compute_uv=False))
print("our singular values are those of numpy.linalg.svd")

# %% [markdown]
# ## The best small matrix
#
# Keep the $k$ largest singular values and drop the others. No matrix of rank $k$ is closer to $A$ (Eckart and Young, 1936). The error is known
# beforehand: the norm of what was dropped. A photograph in grey is a matrix of brightness values.

# %%
from sklearn.datasets import load_sample_image

photo = load_sample_image("china.jpg").mean(axis=2) / 255
left, strength, right = np.linalg.svd(photo, full_matrices=False)


def approximate(k):
    return left[:, :k] * strength[:k] @ right[:k]


def share_of_numbers(k):
    return k * (photo.shape[0] + photo.shape[1]) / photo.size


error = np.linalg.norm(photo - approximate(20)) / np.linalg.norm(photo)
dropped = np.linalg.norm(strength[20:]) / np.linalg.norm(strength)
print(f"rank 20: error {error:.4f}, predicted from the dropped values {dropped:.4f}")

# %% tags=["picture"] alt="A photograph of a temple rebuilt from 1, 5, 20 and 64 singular values; with 20 the building is recognizable, with 64 it is nearly sharp."
fig, axes = plt.subplots(1, 4, figsize=(10, 2.4))
for ax, k in zip(axes, (1, 5, 20, 64), strict=True):
    ax.imshow(approximate(k), cmap="gray", vmin=0, vmax=1)
    ax.set_title(f"rank {k}: {share_of_numbers(k):.1%} of the numbers", fontsize=9)
    ax.axis("off")
plt.show()

# %% tags=["picture"] alt="Relative error of the approximation against its rank, on a logarithmic axis: it falls steeply up to rank 20 and then slowly; noise of the same size falls much more slowly."
noise = np.linalg.svd(rng.normal(size=photo.shape), compute_uv=False)
fig, ax = plt.subplots()
for values, label in ((strength, "photograph"), (noise, "random matrix of the same shape")):
    tail = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1] / np.sum(values**2))
    ax.semilogy(range(len(tail)), tail, label=label)
ax.set(
    xlabel="rank (singular values kept)",
    ylabel="error (share of the norm)",
    ylim=(1e-3, 1.2),
)
ax.legend()
plt.show()

# %% [markdown]
# LoRA, the usual way to fine-tune a language model, trains a *change* of its weight matrices that has a low rank.
#
# ## Exercises
#
# ### 1. Projection
#
# Write `project(v, u)`: the multiple of `u` that is closest to `v`. Its difference to `v` is perpendicular to `u`.


# %% tags=["exercise"]
def project(v, u): ...


# %% tags=["solution"]
def project(v, u):
    return (v @ u) / (u @ u) * u


# %% tags=["wrong"]
# says: length
def project(v, u):
    return (v @ u) * u


# %% tags=["wrong"]
# says: a number
def project(v, u):
    return (v @ u) / np.linalg.norm(u)


# %% tags=["check"]
one, other = np.array([2.0, 1.0, 0.0]), np.array([0.0, 3.0, 4.0])
found = project(one, other)
assert found is not None, "project returns nothing"
assert np.shape(found) == (3,), "project returns a number, the length; it has to be a vector along u"
scaled = project(one, 10 * other)
assert np.allclose(found, scaled), "the result changes with the length of u: divide by u · u"
assert np.allclose(np.cross(found, other), 0), "the result is not a multiple of u"
assert abs((one - found) @ other) < 1e-9, "v - project(v, u) is not perpendicular to u"
print("right")

# %% [markdown]
# ### 2. Independence
#
# Write `independent(vectors)`: whether no vector of the list is in the span of the others. Use `orthonormal_basis` or NumPy.


# %% tags=["exercise"]
def independent(vectors): ...


# %% tags=["solution"]
def independent(vectors):
    return len(orthonormal_basis(vectors)) == len(vectors)


# %% tags=["wrong"]
# says: three vectors
def independent(vectors):
    pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[:i]]
    return all(np.linalg.matrix_rank([a, b]) == 2 for a, b in pairs)


# %% tags=["wrong"]
# says: square
def independent(vectors):
    return len(vectors) == len(vectors[0]) and np.linalg.det(vectors) != 0


# %% tags=["check"]
right = independent([[1, 0, 0], [0, 1, 0]])
assert right is not None, "independent returns nothing"
assert right, "two unit vectors are independent, also where the matrix is not square"
assert independent([[0, 0, 1], [0, 1, 0]]), "these two unit vectors are independent"
assert not independent([[1, 0], [0, 1], [1, 1]]), "three vectors in a plane are never independent"
flat = [[1, 0, 1], [0, 1, 1], [1, 1, 2]]
assert not independent(flat), (
    "of these three vectors, one is the sum of the others; not every pair shows it"
)
assert not independent([[1.0, 2.0], [2.0, 4.0]]), "[2, 4] is a multiple of [1, 2]"
print("right")

# %% [markdown]
# ### 3. Which rank is enough?
#
# Write `rank_for(matrix, error)`: the smallest $k$ whose best approximation has at most this relative error (the norm of the difference over
# the norm of the matrix).


# %% tags=["exercise"]
def rank_for(matrix, error): ...


# %% tags=["solution"]
def rank_for(matrix, error):
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    tail = np.sqrt(np.append(np.cumsum(squares[::-1])[::-1], 0) / squares.sum())
    return int(np.argmax(tail <= error))


# %% tags=["wrong"]
# says: squares
def rank_for(matrix, error):
    values = np.linalg.svd(matrix, compute_uv=False)
    tail = np.append(np.cumsum(values[::-1])[::-1], 0) / values.sum()
    return int(np.argmax(tail <= error))


# %% tags=["wrong"]
# says: one more
def rank_for(matrix, error):
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    tail = np.sqrt(np.append(np.cumsum(squares[::-1])[::-1], 0) / squares.sum())
    return int(np.argmax(tail <= error)) + 1


# %% tags=["check"]
test = np.diag([4.0, 3.0, 2.0, 1.0])  # errors of ranks 0 to 4: 1, .683, .408, .183, 0
found = [rank_for(test, error) for error in (1.0, 0.65, 0.35, 0.15, 0.0)]
assert None not in found, "rank_for returns nothing"
assert found != [1, 3, 4, 5, 5], "each answer is one more than needed: rank 0 has error 1"
assert found != [0, 1, 2, 3, 4], "errors add as squares: take the root of the sum of squares"
assert found == [0, 2, 3, 4, 4], f"expected [0, 2, 3, 4, 4], found {found}"
print("right: the photograph needs rank", rank_for(photo, 0.1), "for an error of a tenth")

# %% [markdown]
# ## Self-test
#
# <details><summary>What does a determinant of −2 say about a map of the plane?</summary>
#
# It doubles areas and mirrors.
# </details>
#
# <details><summary>A 1000 × 1000 matrix has rank 8. How many numbers describe it?</summary>
#
# Two factors of 1000 × 8: 16,000 numbers, in place of a million.
# </details>
#
# <details><summary>Why does power iteration fail when the two largest eigenvalues have the same size?</summary>
#
# Neither wins: the vector stays a mixture of both eigenvectors.
# </details>
#
# ## What surprised us

# %% tags=["measured"]
exact = 10.0 ** -np.arange(0, 12, 2)
q1, q2 = (np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2))
known = q1 * exact @ q2
by_squares = np.sqrt(np.abs(np.linalg.eigvalsh(known.T @ known)[::-1]))
direct = np.linalg.svd(known, compute_uv=False)
display(
    Markdown(
        "On paper, the roots of the eigenvalues of $A^\\top A$ are the singular values. We "
        f"built a matrix whose smallest singular value is {exact[-1]:.0e}. By $A^\\top A$ "
        f"it came out as {by_squares[-1]:.0e}; `numpy.linalg.svd` gives {direct[-1]:.0e}. "
        "Squaring the matrix squares its condition number (largest over smallest singular value): "
        f"values below about {exact[0] * 1e-8:.0e} of the largest one are noise. Our own `svd` "
        "above has this fault."
    )
)

# %% [markdown]
# ## In llmworks
#
# `merge extract` takes the difference of two models and keeps its largest singular values, as a LoRA adapter:
#
# ```
# llmworks merge extract --model tuned --base base --set max_rank=16 --out adapter
# ```
#
# ## Go on
#
# - C. Eckart and G. Young, *The approximation of one matrix by another of lower rank* (1936)
# - G. Strang, *Introduction to Linear Algebra* (2016)
# - Next: [F02 Calculus](F02_calculus.ipynb)
