"""How good synthetic volumes are, from features: distances between two sets, fidelity, diversity, nearest neighbours.

Every measure compares rows of features `(N, F)`, float, one row a sample; sets may differ in size. With the few dozen
volumes of a run the kernel distances are the ones to trust: they are unbiased, while the Frechet distance is biased
upwards by an amount that grows with F / N (Binkowski et al. 2018, arXiv 1801.01401) even when shrunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from monai.metrics.regression import compute_ms_ssim
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from fediod_med.errors import InputError

Rows = NDArray[np.float64]
Kernel = Callable[[Rows, Rows], Rows]
WINDOW = 3.0  # z-scores beyond this are one grey value to the structural similarity
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001)  # of Wang et al. 2003, the first three of five; rescaled to sum 1


class Fidelity(NamedTuple):
    """Share of synthetic samples that could be reference ones, and of the reference that is reached; 0 to 1."""

    precision: float
    recall: float


class Spread(NamedTuple):
    """Density (0 upwards, about 1 for equal sets) and coverage (0 to 1)."""

    density: float
    coverage: float


class Neighbours(NamedTuple):
    """The nearest reference row of each query: distances `(N,)` and row numbers `(N,)`."""

    distances: Rows
    rows: NDArray[np.intp]


# --- kernel distances -------------------------------------------------------------------------------------------------


def polynomial_kernel(a: Rows, b: Rows) -> Rows:
    """`(a . b / F + 1)^3`, `(N, M)`: the kernel of the kernel inception distance (Binkowski et al. 2018, section 4)."""
    product: Rows = (a @ b.T / a.shape[1] + 1) ** 3
    return product


def gaussian_kernel(bandwidth: float) -> Kernel:
    """`exp(-|a - b|^2 / (2 bandwidth^2))` as a function of two sets."""

    def kernel(a: Rows, b: Rows) -> Rows:
        value: Rows = np.exp(-cdist(a, b, "sqeuclidean") / (2 * bandwidth**2))
        return value

    return kernel


def median_bandwidth(a: Rows, b: Rows) -> float:
    """Median distance between any two samples of both sets (Gretton et al. 2012, section 8); 1 where all are equal."""
    found = float(np.median(pdist(np.concatenate([a, b]))))
    return found if found > 0 else 1.0


def squared_mmd(a: Rows, b: Rows, kernel: Kernel = polynomial_kernel) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, Lemma 6, equation 3); around 0 for equal sets.

    With `polynomial_kernel` this is the kernel inception distance. Being unbiased it may be negative.

    Raises:
        InputError: fewer than two samples in a set, or features that do not fit.
    """
    a, b = _sets(a, b, least=2)
    pooled = np.concatenate([a, b])
    return _mmd_of(kernel(pooled, pooled), np.arange(len(a)), np.arange(len(a), len(pooled)))


def mmd_p_value(
    a: Rows, b: Rows, kernel: Kernel = polynomial_kernel, *, permutations: int = 500, seed: int = 0
) -> float:
    """Chance of an MMD this large if both sets came from one source: permutation test (Gretton et al. 2012, section 8).

    The observed split counts as one of the permutations, so the result is at least `1 / (permutations + 1)`.

    Raises:
        InputError: as in `squared_mmd`.
    """
    a, b = _sets(a, b, least=2)
    pooled = np.concatenate([a, b])
    gram = kernel(pooled, pooled)
    order = np.arange(len(pooled))
    observed = _mmd_of(gram, order[: len(a)], order[len(a) :])
    random = np.random.default_rng(seed)
    shuffled = (random.permutation(order) for _ in range(permutations))
    as_large = sum(_mmd_of(gram, mixed[: len(a)], mixed[len(a) :]) >= observed for mixed in shuffled)
    return (1 + as_large) / (1 + permutations)


def _mmd_of(gram: Rows, first: NDArray[np.intp], second: NDArray[np.intp]) -> float:
    """Squared MMD of two disjoint sets of rows from the kernel matrix of all of them."""

    def within(rows: NDArray[np.intp]) -> float:
        block = gram[np.ix_(rows, rows)]
        return float((block.sum() - np.trace(block)) / (len(rows) * (len(rows) - 1)))

    return within(first) + within(second) - 2 * float(gram[np.ix_(first, second)].mean())


# --- Frechet distance -------------------------------------------------------------------------------------------------


def gaussian_frechet(mean_a: Rows, covariance_a: Rows, mean_b: Rows, covariance_b: Rows) -> float:
    """Squared Frechet distance of two Gaussians, `|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))` (Dowson, Landau 1982).

    Args:
        mean_a: `(F,)`.
        covariance_a: `(F, F)`, symmetric, no negative eigenvalue.
        mean_b: `(F,)`.
        covariance_b: `(F, F)`.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric: no complex root to clean up.
    cross = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + trace)


def shrunk_covariance(rows: Rows) -> Rows:
    """Covariance `(F, F)` drawn towards a multiple of the identity, so that few samples do not leave it singular.

    Oracle approximating shrinkage, Chen et al. 2010 (IEEE Trans. Signal Process. 58), equation 23.

    Raises:
        InputError: fewer than two samples.
    """
    (rows,) = _sets(rows, least=2)
    count, features = rows.shape
    sample = np.cov(rows, rowvar=False, bias=True).reshape(features, features)
    scale = np.trace(sample) / features
    square, trace = float((sample**2).sum()), float(np.trace(sample) ** 2)
    below = (count + 1 - 2 / features) * (square - trace / features)
    share = 1.0 if below <= 0 else min(1.0, ((1 - 2 / features) * square + trace) / below)
    shrunk: Rows = (1 - share) * sample + share * scale * np.eye(features)
    return shrunk


def frechet_distance(a: Rows, b: Rows) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets, covariances shrunk (FID: Heusel et al. 2017, eq. 6).

    Raises:
        InputError: fewer than two samples in a set, or features that do not fit.
    """
    a, b = _sets(a, b, least=2)
    return gaussian_frechet(a.mean(0), shrunk_covariance(a), b.mean(0), shrunk_covariance(b))


# --- neighbours -------------------------------------------------------------------------------------------------------


def precision_recall(reference: Rows, synthetic: Rows, *, neighbours: int = 3) -> Fidelity:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    A set's manifold is the union of balls about its samples, each as wide as the distance to the sample's k-th
    neighbour in the set. Precision: share of synthetic samples on the reference's manifold; recall: the reverse.

    Raises:
        InputError: no more than `neighbours` samples in a set, or features that do not fit.
    """
    reference, synthetic = _sets(reference, synthetic, least=neighbours + 1)
    between = cdist(synthetic, reference)
    precision = (between <= _radii(reference, neighbours)[None]).any(axis=1).mean()
    recall = (between <= _radii(synthetic, neighbours)[:, None]).any(axis=0).mean()
    return Fidelity(float(precision), float(recall))


def density_coverage(reference: Rows, synthetic: Rows, *, neighbours: int = 5) -> Spread:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, equations 2 and 3): one outlier moves neither far.

    Raises:
        InputError: no more than `neighbours` samples in a set, or features that do not fit.
    """
    reference, synthetic = _sets(reference, synthetic, least=neighbours + 1)
    inside = cdist(synthetic, reference) <= _radii(reference, neighbours)[None]
    return Spread(float(inside.sum() / (neighbours * len(synthetic))), float(inside.any(axis=0).mean()))


def nearest_neighbours(queries: Rows, reference: Rows) -> Neighbours:
    """Euclidean distance of each query to its nearest reference row, and which one that is.

    Raises:
        InputError: an empty set, or features that do not fit.
    """
    queries, reference = _sets(queries, reference, least=1)
    distances = cdist(queries, reference)
    rows = distances.argmin(axis=1)
    return Neighbours(distances[np.arange(len(queries)), rows], rows)


def typical_distance(rows: Rows) -> float:
    """Median over a set of the distance to the nearest other member: what "near" means in these features.

    Raises:
        InputError: fewer than two samples.
    """
    (rows,) = _sets(rows, least=2)
    return float(np.median(_radii(rows, 1)))


def _radii(rows: Rows, neighbours: int) -> Rows:
    """Distance of each sample to its k-th nearest other sample."""
    within = cdist(rows, rows)
    np.fill_diagonal(within, np.inf)
    found: Rows = np.sort(within, axis=1)[:, neighbours - 1]
    return found


# --- diversity --------------------------------------------------------------------------------------------------------


def multiscale_similarity(volumes: Tensor, *, pairs: int = 32, seed: int = 0) -> float:
    """Mean multi-scale structural similarity of pairs of different volumes: 1 means that all are alike.

    Wang et al. 2003 (MS-SSIM) as a measure of diversity (Odena et al. 2017, arXiv 1610.09585, section 4.2); three
    scales. The background that all heads share counts too: compare with the value of real or public volumes.

    Args:
        volumes: `(N, C, D, H, W)` z-scored, edges of 16 or more.
        pairs: drawn without replacement from all N (N - 1) / 2.
        seed: of the draw.

    Raises:
        InputError: fewer than two volumes, or volumes that are too small.
    """
    if volumes.dim() != 5 or len(volumes) < 2 or min(volumes.shape[2:]) < 16:
        raise InputError(
            f"multi-scale similarity: expected two or more volumes (C, D, H, W) with edges of 16 or more, found shape "
            f"{tuple(volumes.shape)}"
        )
    first, second = np.triu_indices(len(volumes), k=1)
    chosen = np.random.default_rng(seed).permutation(len(first))[:pairs]
    grey = (volumes.float().clamp(-WINDOW, WINDOW) + WINDOW) / (2 * WINDOW)
    kernel = 7 if min(volumes.shape[2:]) >= 32 else 3
    weights = [weight / sum(SCALE_WEIGHTS) for weight in SCALE_WEIGHTS]
    with torch.no_grad():
        found = [
            compute_ms_ssim(grey[i : i + 1], grey[j : j + 1], 3, kernel_size=kernel, weights=weights).item()
            for i, j in zip(first[chosen], second[chosen], strict=True)
        ]
    return float(np.mean(found))


def _sets(*sets: Rows, least: int) -> tuple[Rows, ...]:
    """The sets as float64; `InputError` where one is too small, not finite, or of other features than the rest."""
    arrays = tuple(np.asarray(found, dtype=np.float64) for found in sets)
    shapes = [found.shape for found in arrays]
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise InputError(f"quality: expected sets (N, F) with the same features, found shapes {shapes}")
    if min(len(found) for found in arrays) < least:
        raise InputError(f"quality: expected {least} samples or more in each set, found {[len(a) for a in arrays]}")
    if not all(np.isfinite(found).all() for found in arrays):
        raise InputError("quality: expected finite features, found NaN or Inf; the volumes are defective")
    return arrays
