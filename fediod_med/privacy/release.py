"""Clips and noises one release as its policy promises."""

from __future__ import annotations

from fediod_med.errors import PrivacyError
from fediod_med.privacy import mechanisms
from fediod_med.privacy.mechanisms import Array
from fediod_med.privacy.noise import NoiseSource, grid_for, grid_gaussian, grid_slack
from fediod_med.privacy.policy import PolicyPart


def noised(values: Array, part: PolicyPart, *, patients: int, source: NoiseSource, where: str) -> Array:
    """Clip in float64 and add noise of `noise_multiplier * sensitivity` on a grid.

    Args:
        values: float64, as `part.clipping` reads them: `(patients, dim)` rows, `(rows, ...)` samples, or any shape.
        part: of the policy.
        patients: declared number; more rows of patients are refused.
        source: of the noise.
        where: site and kind, for messages.

    Returns:
        `(dim,)`, in the units of `values`.

    Raises:
        PrivacyError: another shape than the part promises.
    """
    if part.clipping == "patients":
        if values.ndim != 2 or len(values) > patients:
            raise PrivacyError(f"{where}: expected up to {patients} patients' rows, found {values.shape}")
        vector = mechanisms.clip_rows(values, part.clip_norm).sum(axis=0)
    elif part.clipping == "samples":
        if values.shape[:1] != (part.rows,):
            raise PrivacyError(f"{where}: expected {part.rows} samples, found shape {values.shape}")
        vector = mechanisms.clip_rows(values.reshape(part.rows, -1), part.clip_norm).reshape(-1)
    else:
        vector = mechanisms.clip_joint(values, part.clip_norm)
    if part.dim is not None and vector.size != part.dim:
        raise PrivacyError(f"{where}: expected {part.dim} values, found {vector.size}")
    grid = grid_for(part.noise_multiplier * part.sensitivity)
    std = part.noise_multiplier * (part.sensitivity + grid_slack(grid, vector.size))
    return grid_gaussian(vector, std, grid, source)
