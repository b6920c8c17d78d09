"""Randomness of releases and of private training: from the operating system, without state, so safe after a fork.

A seed that anyone knows lets them subtract the noise, so there is none. `SeededNoise` exists for tests and brands
everything that it touches as insecure.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from fediod_med.errors import PrivacyError
from fediod_med.privacy.mechanisms import Array

Shape = int | tuple[int, ...]

GRID_BITS = 20
"""A release is rounded to the power of two next below its noise's standard deviation / 2^20."""


_REFINED_BITS = 8  # a uniform below 2^-8 is drawn with 64 more bits


class NoiseSource(Protocol):
    """Where random numbers come from."""

    @property
    def insecure(self) -> bool:
        """Whether anybody could reproduce the numbers."""

    def uniform(self, shape: Shape) -> Array:
        """Independent uniforms in the open interval (0, 1), float64."""

    def normal(self, shape: Shape) -> Array:
        """Independent standard normals, float64."""


class OsNoise:
    """Numbers from the operating system's generator."""

    insecure = False

    def uniform(self, shape: Shape) -> Array:
        """See `uniforms`."""
        return uniforms(shape)

    def normal(self, shape: Shape) -> Array:
        """See `standard_normal`."""
        return standard_normal(shape)


class SeededNoise:
    """Reproducible numbers for tests; every record made with them says INSECURE and never verifies."""

    insecure = True

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def uniform(self, shape: Shape) -> Array:
        """Seeded uniforms in (0, 1)."""
        return np.maximum(self._generator.random(shape), 2.0**-54)

    def normal(self, shape: Shape) -> Array:
        """Seeded standard normals."""
        return self._generator.standard_normal(shape)


def uniforms(shape: Shape) -> Array:
    """Uniforms in the open interval (0, 1) from `os.urandom`: odd multiples of 2^-53."""
    return _odd_fractions(_words(shape))


def standard_normal(shape: Shape) -> Array:
    """Standard normals from `os.urandom`, float64, by inverting the distribution function.

    One bit chooses the sign and others the probability u / 2 of a greater magnitude, so both tails are equally fine. u
    has 52 bits, and 64 more where it is below 2^-8. Neighbouring magnitudes then lie at most 2^-45 apart up to 2.8,
    2^-43 up to 10 and 2^-28 up to 11: on a grid of 2^-21 or more, every multiple up to 11 can occur, and those up to 10
    occur with their Gaussian probability within a factor of 1 +- 2^-20, rounding to float64 included. A Gaussian passes
    11 with probability 4e-28, which is what a coordinate adds to delta; magnitudes end at 12.5.
    """
    words = _words(shape).reshape(-1)
    tails = _odd_fractions(words)
    rare = np.flatnonzero(words >> np.uint64(64 - _REFINED_BITS) == 0)
    if rare.size:
        tails[rare] = _refined_fractions(words[rare], _words(rare.size))
    magnitudes: Array = -ndtri(tails / 2)
    return np.where(words & np.uint64(1), magnitudes, -magnitudes).reshape(shape)


def poisson_draw(count: int, rate: float, source: NoiseSource | None = None) -> np.ndarray:
    """Indices out of `range(count)`, each drawn on its own with probability `rate`; possibly none.

    Raises:
        PrivacyError: a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise PrivacyError(f"sampling: expected a rate in [0, 1], found {rate}")
    return np.flatnonzero((source or OsNoise()).uniform(count) < rate)


def grid_for(std: float) -> float:
    """The grid of a release whose noise has this standard deviation: a power of two, `std / 2^20` or next below."""
    return 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)


def grid_slack(grid: float, dimension: int) -> float:
    """`grid sqrt(m)`: what rounding two vectors to the grid can add to their distance."""
    return grid * math.sqrt(dimension)


def grid_gaussian(vector: ArrayLike, std: float, grid: float, source: NoiseSource | None = None) -> Array:
    """Noisy multiples of `grid`: the vector rounded to the grid, plus normal noise rounded to the grid.

    The sum is formed in whole numbers, so its low bits say nothing about the value (Mironov 2012). It equals a
    Gaussian release of the rounded vector, rounded: post-processing. The rounded vector's sensitivity is larger by
    `grid_slack`, which the caller must have included in `std`.

    Args:
        vector: of any shape, finite.
        std: of the noise, in the vector's units.
        grid: a power of two, at most std / 2^10.
        source: of randomness; the operating system unless a test says otherwise.

    Raises:
        PrivacyError: a grid that is no power of two or too coarse, or a value too large for it.
    """
    values = np.asarray(vector, dtype=np.float64)
    if not (math.isfinite(std) and std > 0 and grid > 0 and math.frexp(grid)[0] == 0.5 and grid <= std / 2**10):
        raise PrivacyError(f"noise: expected a power of two of at most std / 1024 as grid, found {grid} at std {std}")
    steps, noise = np.rint(values / grid), np.rint((source or OsNoise()).normal(values.shape) * (std / grid))
    if not (np.isfinite(steps).all() and np.abs(steps).max(initial=0) < 2**51):
        raise PrivacyError(f"noise: expected finite values below 2^51 grid steps of {grid}; clip them first")
    result: Array = (steps.astype(np.int64) + noise.astype(np.int64)).astype(np.float64) * grid
    return result


def _words(shape: Shape) -> np.ndarray:
    count = math.prod(shape) if isinstance(shape, tuple) else shape
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64).reshape(shape)


def _odd_fractions(words: np.ndarray) -> Array:
    """The top 52 bits of each word as an odd multiple of 2^-53: exact, and never 0 or 1."""
    fractions: Array = ((words >> np.uint64(12)) * np.uint64(2) + np.uint64(1)).astype(np.float64) * 2.0**-53
    return fractions


def _refined_fractions(words: np.ndarray, more: np.ndarray) -> Array:
    """The top 52 bits of each word, followed by 64 more, as an odd multiple of 2^-117, rounded to float64; never 0."""
    fractions: Array = (words >> np.uint64(12)).astype(np.float64) * 2.0**-52
    return fractions + (more.astype(np.float64) + 0.5) * 2.0**-116
