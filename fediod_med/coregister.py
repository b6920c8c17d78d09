"""Brings T1, T2 and FLAIR onto the grid of T1c by a rigid motion each, and masks back onto any sequence's own grid.

For scans of one session that were never aligned: different grids, slice thickness, angulation, or a patient who moved.
What cannot be found with confidence is an error finding, never a silently wrong volume: two runs that disagree, a match
worse than that of the headers, images that share nothing, or a motion no head makes between two sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fediod_med.data.grids import GEOMETRY_TOLERANCE_MM, corner_distance
from fediod_med.data.scans import Scan, Volume
from fediod_med.errors import InputError, SettingsError
from fediod_med.findings import Finding, finding
from fediod_med.labels import SEQUENCES
from fediod_med.rigid import Motion, find_motion, resample_classes, resample_scan

REFERENCE = "T1c"
# Below this the headers are believed: it is what registration itself is off by, and resampling would only blur.
TRUSTED_MM = 0.7
# Two runs that disagree by more have not found the place.
RESIDUAL_LIMIT_MM = 1.0
# Mutual information in nats below which two images share too little to be one head in two contrasts.
INFORMATION_LIMIT = 0.08
TURN_LIMIT_DEG = 60.0
COVERED_LIMIT = 0.5
# Beyond these a person should look: between sequences of one session a head moves less.
FAR_MM, FAR_DEG, FAR_COVERED = 20.0, 20.0, 0.97
# A sampled estimate of the information wavers by about this much.
_WAVER = 0.01


@dataclass(frozen=True, eq=False)
class Grid:
    """The own grid of a sequence.

    Attributes:
        shape: `(X, Y, Z)`.
        affine: `(4, 4)` float64, voxel index to mm in RAS+.
        path: file it was read from.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    path: Path


@dataclass(frozen=True, eq=False)
class Coregistered:
    """Four sequences on the grid of T1c, and the way back.

    Attributes:
        volume: as if the scans had been on one grid from the start; `None` exactly when `findings` holds an error.
        matrices: by sequence, `(4, 4)` float64: a point of the T1c scan in mm RAS+ to the same tissue in the sequence's
            own scan; the identity for T1c, and where the headers were right to within `TRUSTED_MM`.
        motions: what was found for T1, T2 and FLAIR, with its quality; without the sequences that have no overlap.
        grids: each sequence's own grid.
        findings: E152 not matched, W153 moved far, W154 does not cover the head, N155 what was done.
    """

    volume: Volume | None
    matrices: Mapping[str, np.ndarray]
    motions: Mapping[str, Motion]
    grids: Mapping[str, Grid]
    findings: tuple[Finding, ...]

    def classes_on(self, sequence: str, classes: np.ndarray) -> np.ndarray:
        """A class map of the T1c grid on the own grid of a sequence; see `to_sequence_grid`.

        Raises:
            SettingsError: unknown sequence.
        """
        if sequence not in self.grids:
            raise SettingsError(f"sequence: expected one of {', '.join(SEQUENCES)}, found {sequence!r}")
        grid = self.grids[sequence]
        own, matrix = self.grids[REFERENCE].affine, self.matrices[sequence]
        return to_sequence_grid(classes, own, shape=grid.shape, grid=grid.affine, matrix=matrix)


def coregister(scans: Mapping[str, Scan], *, case: str, seed: int = 1) -> Coregistered:
    """Align T1, T2 and FLAIR rigidly with T1c, and resample them to its grid (linear, averaged where it is coarser).

    A sequence that the headers place right already is moved by nothing, and left untouched, bit for bit, when it is on
    the grid of T1c. With or without skull; sequences may differ in spacing, angulation and field of view.

    Args:
        scans: by sequence name, each on its own grid (`fediod_med.data.itk_formats.read_scans`).
        case: its id, for findings.
        seed: of the random samples of voxels.

    Raises:
        InputError: a sequence is missing.
    """
    missing = [name for name in SEQUENCES if name not in scans]
    if missing:
        raise InputError(f"case {case}: expected scans for {', '.join(SEQUENCES)}, found none for {', '.join(missing)}")
    reference = scans[REFERENCE]
    grids = {name: Grid(scans[name].array.shape, scans[name].affine, scans[name].path) for name in SEQUENCES}
    others = [name for name in SEQUENCES if name != REFERENCE]
    with ThreadPoolExecutor(max_workers=len(others)) as pool:
        motions = dict(zip(others, pool.map(lambda name: _find(reference, scans[name], seed), others), strict=True))
    matrices = {REFERENCE: np.eye(4)}
    findings: list[Finding] = []
    for name, motion in motions.items():
        trusted = isinstance(motion, Motion) and motion.moved_mm <= TRUSTED_MM
        matrices[name] = motion.matrix if isinstance(motion, Motion) and not trusted else np.eye(4)
        findings += _findings(case, name, scans[name].path, motion, trusted=trusted)
    volume = None
    if not any(found.code.startswith("E") for found in findings):
        array = np.empty((len(SEQUENCES), *reference.array.shape), dtype=np.float32)
        for i, name in enumerate(SEQUENCES):
            array[i] = _on_reference(scans[name], matrices[name], grids[REFERENCE])
        volume = Volume(array, reference.affine, reference.path)
    found_motions = {name: motion for name, motion in motions.items() if isinstance(motion, Motion)}
    return Coregistered(volume, matrices, found_motions, grids, tuple(findings))


def to_sequence_grid(
    classes: np.ndarray, affine: np.ndarray, *, shape: tuple[int, ...], grid: np.ndarray, matrix: np.ndarray
) -> np.ndarray:
    """A class map of the T1c grid on a sequence's own grid.

    Each voxel takes the class with the largest share at its centre, shares interpolated linearly. On a coarser grid
    (thick slices) that is the class at the middle of the slice, not the commonest within its thickness.

    Args:
        classes: `(X, Y, Z)` integers, 0 to 3.
        affine: `(4, 4)` of `classes`, mm RAS+.
        shape: of the sequence's grid.
        grid: `(4, 4)` affine of the sequence's grid.
        matrix: of the sequence, from `Coregistered.matrices`.

    Returns:
        Array of `shape`, 0 where the T1c scan did not reach.
    """
    return resample_classes(classes, matrix, affine=affine, shape=shape, grid=grid)


def _find(reference: Scan, scan: Scan, seed: int) -> Motion | str:
    """The motion of a sequence, or why there is none."""
    try:
        return find_motion(reference, scan, seed=seed)
    except InputError as error:
        return str(error)


def _on_reference(scan: Scan, matrix: np.ndarray, grid: Grid) -> np.ndarray:
    """A scan on the T1c grid; its own values where it is on it already."""
    unmoved = np.array_equal(matrix, np.eye(4)) and scan.array.shape == grid.shape
    if unmoved and corner_distance(grid.shape, scan.affine, grid.affine) <= GEOMETRY_TOLERANCE_MM:
        return scan.array
    return resample_scan(scan, matrix, shape=grid.shape, affine=grid.affine)


def _findings(case: str, name: str, path: Path, motion: Motion | str, *, trusted: bool) -> list[Finding]:
    """What there is to say about the motion of one sequence."""
    if isinstance(motion, str):
        return [finding("E152", case=case, where=path, message=motion)]
    doubt = _doubt(motion)
    if doubt:
        message = f"expected {name} to show the head of the {REFERENCE} scan, {doubt}"
        return [finding("E152", case=case, where=path, message=message, value=round(motion.residual_mm, 2))]
    found = []
    how = f"{motion.moved_mm:.1f} mm and {motion.rotation_deg:.1f} degrees"
    if motion.moved_mm > FAR_MM or motion.rotation_deg > FAR_DEG:
        message = f"expected {name} near {REFERENCE} as the headers place it, found it {how} away; it was moved back"
        found.append(finding("W153", case=case, where=path, message=message, value=round(motion.moved_mm, 1)))
    if motion.covered < FAR_COVERED:
        message = f"expected {name} to cover the head of the {REFERENCE} scan, found {motion.covered:.0%} of it covered"
        found.append(finding("W154", case=case, where=path, message=message, value=round(motion.covered, 3)))
    done = f"left where the headers place it ({how} from the best match)" if trusted else f"moved by {how}"
    message = (
        f"{name} {done}; two runs agree to {motion.residual_mm:.2f} mm, mutual information "
        f"{motion.information_before:.2f} before and {motion.information:.2f} at the best match"
    )
    found.append(finding("N155", case=case, where=path, message=message, value=round(motion.moved_mm, 2)))
    return found


def _doubt(motion: Motion) -> str | None:
    """Why a motion is not to be believed, or `None`."""
    if not motion.residual_mm <= RESIDUAL_LIMIT_MM:
        return f"found two matches that lie {motion.residual_mm:.1f} mm apart (limit {RESIDUAL_LIMIT_MM} mm)"
    if not motion.information >= INFORMATION_LIMIT:
        return f"found images that share next to nothing ({motion.information:.3f} nats, limit {INFORMATION_LIMIT})"
    if motion.information < motion.information_before - _WAVER:
        return (
            f"found a match ({motion.information:.3f} nats) that is worse than where the headers put it "
            f"({motion.information_before:.3f} nats)"
        )
    if motion.rotation_deg > TURN_LIMIT_DEG:
        return f"found a turn by {motion.rotation_deg:.0f} degrees (limit {TURN_LIMIT_DEG:.0f})"
    if motion.covered < COVERED_LIMIT:
        return f"found {motion.covered:.0%} of it inside the scan (limit {COVERED_LIMIT:.0%})"
    return None
