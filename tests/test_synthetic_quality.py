"""Measures of synthetic quality against values worked out by hand, other implementations, and what they must tell."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.covariance import oas
from sklearn.metrics.pairwise import polynomial_kernel as sklearn_polynomial_kernel

from fediod_med.errors import InputError
from fediod_med.synthetic_quality import (
    density_coverage,
    frechet_distance,
    gaussian_frechet,
    gaussian_kernel,
    median_bandwidth,
    mmd_p_value,
    multiscale_similarity,
    nearest_neighbours,
    polynomial_kernel,
    precision_recall,
    shrunk_covariance,
    squared_mmd,
    typical_distance,
)


def normal(count: int, features: int = 4, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return shift + scale * np.random.default_rng(seed).standard_normal((count, features))


# --- kernel distances -------------------------------------------------------------------------------------------------


def test_the_polynomial_kernel_by_hand_and_as_in_scikit_learn() -> None:
    assert polynomial_kernel(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])) == pytest.approx(6.5**3)
    a, b = normal(5, seed=1), normal(7, seed=2)
    assert np.allclose(polynomial_kernel(a, b), sklearn_polynomial_kernel(a, b, degree=3, gamma=1 / 4, coef0=1))


def test_the_gaussian_kernel_and_its_bandwidth_by_hand() -> None:
    a, b = np.array([[0.0], [2.0]]), np.array([[4.0]])
    assert gaussian_kernel(2.0)(a, b) == pytest.approx(np.exp([[-2.0], [-0.5]]))
    assert median_bandwidth(a, b) == 2.0  # of 2, 2, 4
    assert median_bandwidth(a[:1], a[:1]) == 1.0


def test_mmd_by_hand() -> None:
    """With the kernel a.b: within {1, 3} 3, within {2, 4, 6} (8 + 12 + 24) / 3, between 2 * 4."""
    a, b = np.array([[1.0], [3.0]]), np.array([[2.0], [4.0], [6.0]])
    assert squared_mmd(a, b, lambda x, y: x @ y.T) == pytest.approx(3 + 44 / 3 - 2 * 8)


@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel(2.0)])
def test_mmd_is_unbiased_and_grows_with_the_distance(kernel) -> None:
    """Means over many small samples: 0 within its own error for equal sources, far above for different ones."""
    same = [squared_mmd(normal(8, seed=2 * i), normal(6, seed=2 * i + 1), kernel) for i in range(400)]
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    shifts = [squared_mmd(normal(40, seed=1), normal(40, seed=2, shift=s), kernel) for s in (0.0, 0.5, 1.0, 2.0)]
    assert shifts == sorted(shifts)
    assert squared_mmd(normal(9, seed=1), normal(5, seed=2), kernel) == pytest.approx(
        squared_mmd(normal(5, seed=2), normal(9, seed=1), kernel)
    )


def test_identical_samples_have_the_mmd_that_the_missing_diagonal_leaves() -> None:
    """For a set against itself the unbiased estimate is (mean off the diagonal) * 2 - 2 * mean: not 0, below it."""
    a = np.array([[0.0], [1.0]])
    kernel = gaussian_kernel(1.0)
    near = np.exp(-0.5)
    assert squared_mmd(a, a.copy(), kernel) == pytest.approx(2 * near - (1 + near))


def test_the_p_value_tells_sets_apart_and_is_level_otherwise() -> None:
    assert mmd_p_value(normal(20, seed=1), normal(20, seed=2, shift=1.5), permutations=199) == pytest.approx(1 / 200)
    values = [mmd_p_value(normal(8, seed=2 * i), normal(8, seed=2 * i + 1), permutations=39) for i in range(100)]
    assert 0.35 < np.mean(values) < 0.65
    assert np.mean([value <= 0.1 for value in values]) < 0.25


# --- Frechet distance -------------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_known_gaussians() -> None:
    """Equal means and covariances 0; a shift its square; commuting covariances the sum of (root a - root b)^2."""
    mean, cov, shift = np.array([1.0, 2.0]), np.diag([4.0, 9.0]), np.array([3.0, 4.0])
    assert gaussian_frechet(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    assert gaussian_frechet(mean, cov, mean + shift, cov) == pytest.approx(25)
    assert gaussian_frechet(mean, cov, mean, np.diag([1.0, 25.0])) == pytest.approx(1 + 4)
    assert gaussian_frechet(mean, np.diag([4.0, 0.0]), mean, np.zeros((2, 2))) == pytest.approx(4)


def test_the_frechet_distance_as_the_matrix_root_gives_it() -> None:
    random = np.random.default_rng(3)
    a, b = (m @ m.T for m in random.standard_normal((2, 5, 5)))
    expected = 2.0 + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    shift = np.array([1.0, 0, 0, 0, 1.0])
    assert gaussian_frechet(shift, a, np.zeros(5), b) == pytest.approx(expected)
    assert gaussian_frechet(np.zeros(5), b, shift, a) == pytest.approx(expected)


def test_shrinkage_by_hand() -> None:
    """16 samples with S = diag(2, 1/2): share 2.5^2 / (16 (4.25 - 2.5^2 / 2)) = 0.347, towards 1.25 on the diagonal."""
    rows = np.tile([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]], (4, 1))
    share = 6.25 / 18
    assert shrunk_covariance(rows) == pytest.approx(
        np.diag([2 * (1 - share) + 1.25 * share, 0.5 * (1 - share) + 1.25 * share])
    )
    assert shrunk_covariance(rows[:4]) == pytest.approx(1.25 * np.eye(2))  # four of them: shrunk all the way


@pytest.mark.parametrize("count", [3, 20, 400])
def test_shrinkage_as_in_scikit_learn_where_features_are_many(count: int) -> None:
    """It leaves out the equation's 2 / F, which is nothing for many features."""
    rows = normal(count, 300, seed=count) * np.linspace(1, 3, 300)
    expected = oas(rows)[0]
    assert np.linalg.norm(shrunk_covariance(rows) - expected) < 0.01 * np.linalg.norm(expected)


def test_few_samples_give_a_regular_covariance_and_equal_ones_none() -> None:
    assert np.linalg.eigvalsh(shrunk_covariance(normal(4, 30, seed=1))).min() > 0.1
    assert np.array_equal(shrunk_covariance(np.ones((4, 3))), np.zeros((3, 3)))


def test_the_frechet_distance_of_sets() -> None:
    a = normal(2000, 3, seed=1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(12)
    assert frechet_distance(a, normal(2000, 3, seed=2, scale=2)) == pytest.approx(3, rel=0.1)


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_precision_and_recall_of_equal_disjoint_and_collapsed_sets() -> None:
    a = normal(30, seed=1)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 100) == (0.0, 0.0)
    collapsed = a[:1] + 1e-6 * normal(30, seed=2)  # real looking, and all the same
    precision, recall = precision_recall(a, collapsed)
    assert precision == 1.0 and recall <= 1 / 30


def test_precision_and_recall_by_hand() -> None:
    """Radii of {0, 1, 3} to the nearest: 1, 1, 2; of {2, 10}: 8, 8. Only 2 lies in a ball of the first."""
    reference, synthetic = np.array([[0.0], [1.0], [3.0]]), np.array([[2.0], [10.0]])
    assert precision_recall(reference, synthetic, neighbours=1) == (0.5, 1.0)
    # 2 lies in the balls of 1 and of 3, 10 in none: density 2 / (1 * 2), coverage 2 of 3.
    assert density_coverage(reference, synthetic, neighbours=1) == pytest.approx((1.0, 2 / 3))


def test_density_and_coverage_of_equal_and_disjoint_sets() -> None:
    a = normal(200, seed=1)
    density, coverage = density_coverage(a, normal(200, seed=2))
    assert density == pytest.approx(1, abs=0.15) and coverage > 0.85
    assert density_coverage(a, a + 100) == (0.0, 0.0)


def test_one_outlier_opens_precision_and_hardly_density() -> None:
    """The reason for density: a lone reference sample has a ball that swallows everything."""
    reference, far = normal(40, seed=1), normal(40, seed=2, shift=6.0)
    spoilt = np.concatenate([reference, np.full((1, 4), 12.0)])
    assert precision_recall(reference, far).precision == 0
    assert precision_recall(spoilt, far).precision > 0.9
    assert density_coverage(spoilt, far).density < 0.35 and density_coverage(spoilt, far).coverage <= 1 / 41


def test_nearest_neighbours_by_hand() -> None:
    reference = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    distances, rows = nearest_neighbours(np.array([[3.0, 4.5], [-1.0, 0.0]]), reference)
    assert distances == pytest.approx([0.5, 1.0]) and rows.tolist() == [1, 0]
    assert typical_distance(np.array([[0.0], [1.0], [3.0], [9.0]])) == pytest.approx(1.5)  # of 1, 1, 2, 6


# --- diversity --------------------------------------------------------------------------------------------------------


def test_similarity_is_one_for_copies_and_falls_with_diversity() -> None:
    random = torch.Generator().manual_seed(0)
    shape = torch.randn(1, 2, 16, 16, 16, generator=random)
    noise = torch.randn(5, 2, 16, 16, 16, generator=random)
    copies, varied, unlike = shape.expand(5, -1, -1, -1, -1), shape + 0.3 * noise, noise
    found = [multiscale_similarity(volumes) for volumes in (copies, varied, unlike)]
    assert found[0] == pytest.approx(1, abs=1e-4)
    assert found[0] > found[1] > found[2] + 0.1


def test_similarity_draws_its_pairs_by_seed() -> None:
    volumes = torch.randn(6, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    few = [multiscale_similarity(volumes, pairs=3, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert multiscale_similarity(volumes) == pytest.approx(multiscale_similarity(volumes, seed=9))  # all 15 pairs


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: squared_mmd(np.zeros((1, 2)), np.zeros((5, 2))), r"2 samples or more.*\[1, 5\]"),
        (lambda: squared_mmd(np.zeros((4, 2)), np.zeros((4, 3))), "same features"),
        (lambda: frechet_distance(np.full((4, 2), np.nan), np.zeros((4, 2))), "finite"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "4 samples"),
        (lambda: density_coverage(np.zeros((5, 2)), np.zeros((9, 2))), "6 samples"),
        (lambda: nearest_neighbours(np.zeros((2, 2)), np.zeros((0, 2))), "1 samples"),
        (lambda: multiscale_similarity(torch.zeros(1, 4, 16, 16, 16)), "two or more"),
        (lambda: multiscale_similarity(torch.zeros(3, 4, 16, 16, 8)), "16 or more"),
    ],
)
def test_what_cannot_be_measured_is_said(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
