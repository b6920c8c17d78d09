"""Checks between the sequences of one case: one grid, four different scans, in register, under the right names.

Rules on intensities say "looks": they were set so that none of 30 good scans at hand raises one, and they miss some
bad ones.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from nibabel.affines import voxel_sizes

from fediod_med.data.grids import GEOMETRY_TOLERANCE_MM, corner_distance
from fediod_med.data.scans import Scan
from fediod_med.errors import InputError
from fediod_med.findings import Finding, finding
from fediod_med.labels import SEQUENCES

_SAMPLE_MM = 4.0
_BINS = 24
_SHIFTS = (-2, -1, 1, 2)  # sampled voxels: up to 8 mm
_FEWEST = 300  # voxels that statistics need
# Correlation of one scan with itself after scaling and rounding; two good scans reach .93.
_SAME = 0.9995
# Margins of the rules, with what good scans have: see `swap_findings`.
_T1_OVER_T1C, _RESEMBLES = 1.15, 0.1


def grid_pairs(scans: Mapping[str, Scan], *, case: str, one_grid: bool = True) -> Iterator[Finding]:
    """Whether all sequences lie on the grid of T1c: an error, or with `one_grid=False` a note."""
    reference = scans[SEQUENCES[0]]
    for name in SEQUENCES[1:]:
        scan = scans[name]
        if scan.array.shape != reference.array.shape:
            message, value = f"expected shape {reference.array.shape} of T1c, found {scan.array.shape} for {name}", None
        else:
            distance = corner_distance(scan.array.shape, scan.affine, reference.affine)
            if distance <= GEOMETRY_TOLERANCE_MM:
                continue
            message, value = (
                f"expected {name} on the grid of T1c, found corners up to {distance:.2f} mm apart",
                distance,
            )
        code = "E150" if one_grid else "N156"
        rounded = None if value is None else round(value, 2)
        yield finding(code, case=case, where=scan.path, message=message, value=rounded)


def identity_pairs(scans: Mapping[str, Scan], *, case: str) -> Iterator[Finding]:
    """Whether two sequences hold the same values, or the same up to scale."""
    hashes: dict[bytes, str] = {}
    first: list[str] = []
    for name in SEQUENCES:
        digest = hashlib.sha256(np.ascontiguousarray(scans[name].array).data).digest()
        other = hashes.setdefault(digest, name)
        if other != name:
            message = f"expected different scans, found the same values for {other} and {name}"
            yield finding("E141", case=case, where=scans[name].path, message=message)
        else:
            first.append(name)
    sampled = _sampled(scans) if len({scan.array.shape for scan in scans.values()}) == 1 else None
    if sampled is None:
        return
    values, brain, _ = sampled
    for one, other in itertools.combinations(first, 2):
        a, b = (values[SEQUENCES.index(name)][brain].astype(np.float64) for name in (one, other))
        if a.std() == 0 or b.std() == 0:
            continue
        related = float(np.corrcoef(a, b)[0, 1])
        if related > _SAME:
            message = (
                f"expected different scans, found {other} to be {one} on another scale (correlation {related:.5f})"
            )
            yield finding("E141", case=case, where=scans[other].path, message=message, value=round(related, 5))


def register_findings(scans: Mapping[str, Scan], *, case: str) -> Iterator[Finding]:
    """Whether T1, T2 and FLAIR match T1c best where the headers put them.

    Mutual information (Maes et al. 1997, IEEE TMI 16(2)) of 4 mm samples, unshifted and shifted by up to 8 mm along
    each axis. On 30 good scans the best shift has at most .89 of the information of none.
    """
    sampled = _sampled(scans)
    if sampled is None:
        return
    values, brain, step_mm = sampled
    fixed = _clipped(values[0], brain)
    for name, moving in zip(SEQUENCES[1:], values[1:], strict=True):
        image = _clipped(moving, brain)
        base = mutual_information(fixed[brain], image[brain])
        best, shift = base, 0.0
        for axis in range(3):
            for steps in _SHIFTS:
                found = mutual_information(fixed[brain], np.roll(image, steps, axis)[brain])
                if found > best:
                    best, shift = found, abs(steps) * step_mm[axis]
        if shift:
            message = (
                f"expected {name} to match T1c where its header puts it, found it better shifted by {shift:.0f} mm"
            )
            yield finding("W151", case=case, where=scans[name].path, message=message, value=round(shift, 1))


def swap_findings(scans: Mapping[str, Scan], *, case: str) -> Iterator[Finding]:
    """Whether the sequences look as their names say, by four rules on intensities in the brain.

    - T1c has vessels and enhancing tissue: its brightest voxels (percentile 99.7, in interquartile ranges above the
      median) are brighter than those of T1. Good scans: ratio T1 / T1c at most .82.
    - T1 resembles T1c more than T2 and FLAIR do: correlation T2-T1c minus T1-T1c at most -.31 on good scans,
      FLAIR-T1c minus T1-T1c at most -.03.
    - Fluid is dark in T1 and FLAIR and bright in T2, so FLAIR resembles T1 more than T2 does: correlation T2-T1 minus
      FLAIR-T1 at most -.18 on good scans.
    """
    sampled = _sampled(scans)
    if sampled is None:
        return
    values, _, _ = sampled
    inside = (values != 0).all(axis=0)
    if np.count_nonzero(inside) < _FEWEST:
        return
    z = np.array([_robust(channel[inside]) for channel in values])
    if not np.isfinite(z).all() or (z.std(axis=1) == 0).any():
        return
    bright = np.percentile(z, 99.7, axis=1)
    related = np.corrcoef(z)
    t2, flair = related[0, 2] - related[0, 1], related[0, 3] - related[0, 1]
    fluid = related[1, 2] - related[1, 3]
    rules = (
        ("T1c", "T1", bright[1] > _T1_OVER_T1C * bright[0], "T1 has brighter spots than T1c", bright[1] / bright[0]),
        ("T1", "T2", t2 > _RESEMBLES, "T2 resembles T1c more than T1 does", t2),
        ("T1", "FLAIR", flair > _RESEMBLES, "FLAIR resembles T1c more than T1 does", flair),
        ("T2", "FLAIR", fluid > _RESEMBLES, "T2 resembles T1 more than FLAIR does", fluid),
    )
    for first, second, swapped, reason, value in rules:
        if swapped:
            message = f"expected {first} and {second} as named, but {reason}"
            yield finding("W142", case=case, where=f"{first}, {second}", message=message, value=round(float(value), 2))


def mutual_information(one: np.ndarray, other: np.ndarray, bins: int = _BINS) -> float:
    """Mutual information of two samples of equal length, in nats, from their joint histogram."""
    if len(one) != len(other):
        raise InputError(f"mutual information: expected samples of one length, found {len(one)} and {len(other)}")
    counts = np.histogram2d(one, other, bins)[0]
    joint = counts / max(1.0, counts.sum())
    apart = joint.sum(axis=1, keepdims=True) @ joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / apart[there])).sum())


def _sampled(scans: Mapping[str, Scan]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Every so many voxels of the four sequences `(4, x, y, z)`, the head among them, and their distance in mm."""
    spacing = voxel_sizes(scans[SEQUENCES[0]].affine)
    steps = np.maximum(1, np.rint(_SAMPLE_MM / spacing)).astype(int)
    values = np.stack([scans[name].array[:: steps[0], :: steps[1], :: steps[2]] for name in SEQUENCES])
    brain = (values != 0).any(axis=0)
    return None if np.count_nonzero(brain) < _FEWEST else (values, brain, steps * spacing)


def _clipped(values: np.ndarray, brain: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values[brain], [1, 99])
    return np.asarray(np.clip(values, low, high))


def _robust(values: np.ndarray) -> np.ndarray:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return np.asarray((values - middle) / max(high - low, 1e-6))
