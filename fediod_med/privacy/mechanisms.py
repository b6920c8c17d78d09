"""What is noised, and by how much one patient can move it: the mechanism record, sensitivities and clipping.

A sensitivity is an L2 norm under null replacement of one patient. Noise of standard deviation `noise_multiplier *
sensitivity` is what a ledger entry promises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fediod_med.errors import PrivacyError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mechanism:
    """`steps` compositions of a Poisson-subsampled Gaussian under null replacement of one patient.

    Attributes:
        noise_multiplier: standard deviation of the noise over the L2 sensitivity, positive.
        sample_rate: probability with which each patient enters a step, in (0, 1]; 1 for a plain release.
        steps: number of compositions, at least 1.

    Raises:
        PrivacyError: a value outside these ranges.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(f"mechanism: expected a positive noise multiplier, found {self.noise_multiplier}")
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"mechanism: expected a sample rate in (0, 1], found {self.sample_rate}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PrivacyError(f"mechanism: expected a whole number of steps of at least 1, found {self.steps}")


def patient_sum_sensitivity(clip_norm: float) -> float:
    """`C`: replacing one summand of norm at most C by zero moves a sum of patients by at most C."""
    return clip_norm


def release_sensitivity(clip_norm: float) -> float:
    """`2 C`: a jointly clipped output of a model that one patient may change at will can flip from v to -v."""
    return 2 * clip_norm


def per_sample_sensitivity(clip_norm: float, batch: int) -> float:
    """`2 C sqrt(B)`: each of B outputs of one model clipped to C on its own; all B may flip at once."""
    return 2 * clip_norm * math.sqrt(batch)


def presence_sensitivity() -> float:
    """`1`: presence bits divided by the root of their number, summed over patients; see `presence_rows`."""
    return 1.0


def presence_rows(bits: ArrayLike) -> Array:
    """Presence bits of each patient, `(patients, classes)` of 0 and 1, scaled so that each row has norm at most 1.

    Rescale a released sum by `sqrt(classes)` to read it as numbers of patients; that is post-processing.

    Raises:
        PrivacyError: not a table of 0 and 1.
    """
    table: Array = np.asarray(bits, dtype=np.float64)
    if table.ndim != 2 or not np.isin(table, (0.0, 1.0)).all():
        raise PrivacyError(f"presence: expected 0 and 1 of shape (patients, classes), found shape {table.shape}")
    rows: Array = table / math.sqrt(max(1, table.shape[1]))
    return rows


def clip_joint(vector: ArrayLike, clip_norm: float) -> Array:
    """The whole vector, in float64, scaled down to an L2 norm of at most `clip_norm`; NaN and Inf count as 0."""
    return clip_rows(np.asarray(vector, dtype=np.float64).reshape(1, -1), clip_norm).reshape(-1)


def clip_rows(rows: ArrayLike, clip_norm: float) -> Array:
    """Each row of `(rows, dim)`, in float64, scaled down to an L2 norm of at most `clip_norm`; NaN and Inf count as 0.

    The largest magnitude is divided out before squaring, so that no finite input overflows into an unclipped row.
    """
    values = np.asarray(rows, dtype=np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    peak = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    unit = np.divide(values, peak, out=np.zeros_like(values), where=peak > 0)
    norm = np.sqrt(np.square(unit).sum(axis=1, keepdims=True))  # of unit, so at least 1 unless the row is zero
    with np.errstate(over="ignore"):
        fits = peak * norm <= clip_norm
    scaled = np.divide(unit * clip_norm, norm, out=np.zeros_like(values), where=norm > 0)
    clipped: Array = np.where(fits, values, scaled)
    return clipped
