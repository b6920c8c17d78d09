"""Simulates brain-tumour patients from public anatomy: label maps, four MRI sequences, cohorts on disk.

No patient is involved: healthy anatomy is the MNI152 2009a average (Fonov et al. 2011, NeuroImage 54) that the
`nilearn` wheel carries. `grow` warps it and grows a tumour by the Fisher-KPP equation
`du/dt = div(D grad u) + rho u (1 - u)` with fast diffusion in white matter (Swanson et al. 2000, Cell Prolif 33;
Konukoglu et al. 2010, IEEE TMI 29); `render` turns the map into T1c, T1, T2 and FLAIR as a scanner profile gives them.
The settings of `PUBLIC_PRIOR` are physical ranges whose centres were tuned on the development patients: on their mean
intensities, volumes and the Dice of a network trained on phantoms; no image of theirs enters. A score on those same
patients is therefore optimistic. Phantoms share their anatomy with the public prior: a good score on phantoms shows
that the machine works, not that a method generalises.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SEQUENCES, from_classes, get_scheme

Array = NDArray[np.float32]
Labels = NDArray[np.uint8]
Range = tuple[float, float]

TISSUES = ("background", "CSF", "grey", "white", "NCR", "ED", "ET")
CSF, GREY, WHITE, NCR, ED, ET = range(1, 7)
HEAD_CENTRE = (0.0, -17.0, 5.0)  # mm, MNI152: centre of the box round the brain
VENTRICLE_CENTRE, VENTRICLE_RADII = (0.0, -14.0, 12.0), (42.0, 62.0, 30.0)  # mm, MNI152
GROWTH_SPACING = 4.0  # mm; the density is smooth at this scale, so finer grids interpolate it
GROWTH_RATE = 0.025  # per day, a usual value for high-grade glioma


# --- grid and anatomy -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A box of voxels centred on the head, axes right-anterior-superior.

    Attributes:
        shape: voxels along each axis, `(D, H, W)`.
        spacing: voxel edge in mm.
    """

    shape: tuple[int, int, int] = (48, 48, 48)
    spacing: float = 4.0

    def __post_init__(self) -> None:
        """Refuse an empty grid (`SettingsError`)."""
        if len(self.shape) != 3 or min(self.shape) < 8 or not self.spacing > 0:
            raise SettingsError(
                f"phantom grid: expected three sizes of at least 8 and a spacing in mm above 0, found {self.shape} "
                f"at {self.spacing}; the default is (48, 48, 48) at 4.0"
            )

    def affine(self) -> NDArray[np.float64]:
        """Voxel index to world mm, `(4, 4)`, RAS, the middle of the grid on the middle of the head."""
        affine = np.diag([self.spacing, self.spacing, self.spacing, 1.0])
        affine[:3, 3] = np.array(HEAD_CENTRE) - self.spacing * (np.array(self.shape) - 1) / 2
        return affine

    def axes(self) -> tuple[Array, Array, Array]:
        """World coordinates in mm along each axis."""
        origin = self.affine()[:3, 3]
        x, y, z = (
            (o + self.spacing * np.arange(n)).astype(np.float32) for o, n in zip(origin, self.shape, strict=True)
        )
        return x, y, z


@dataclass(frozen=True)
class Anatomy:
    """Healthy public anatomy on a grid.

    Attributes:
        grid: where the arrays live.
        fractions: `(3, D, H, W)` share of CSF, grey and white matter in each voxel; their sum is the brain coverage.
        ventricle: `(D, H, W)` share of ventricular CSF.
        depth: `(D, H, W)` distance to the brain surface in mm, 0 outside.
    """

    grid: Grid
    fractions: Array
    ventricle: Array
    depth: Array


def _gaussian_rows(targets: Array, nodes: Array, sigma: float) -> Array:
    """Gaussian of `sigma` mm at every pair of target and node, `(targets, nodes)`."""
    rows: Array = np.exp(-0.5 * ((targets[:, None] - nodes[None, :]) / sigma) ** 2).astype(np.float32)
    return rows


def _apply_axes(values: Array, rows: Sequence[Array]) -> Array:
    """Multiply a volume by one matrix along each of its three axes."""
    for matrix in rows:
        values = np.tensordot(values, matrix, axes=(0, 1))  # moves the axis to the end: three turns restore the order
    return np.ascontiguousarray(values, dtype=np.float32)


def load_anatomy(grid: Grid | None = None) -> Anatomy:
    """Bring the MNI152 maps of the installed `nilearn` to a grid, low-pass filtered to its voxel size.

    Args:
        grid: 48^3 at 4 mm when not given.

    Returns:
        Tissue shares; CSF is what the head-stripped T1 holds besides grey and white matter.

    Raises:
        InputError: `nilearn` or one of its maps is missing.
    """
    grid = grid or Grid()
    spec = importlib.util.find_spec("nilearn")  # locates the package without importing it (and scikit-learn)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("public anatomy: expected the package nilearn, found none; install fediod-med again")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    sigma = max(grid.spacing / 2.355, 0.3)
    maps: dict[str, Array] = {}
    for name in ("t1", "gm", "wm"):
        path = folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        if not path.is_file():
            raise InputError(f"public anatomy: expected {path}, found nothing; install nilearn >= 0.11 again")
        image = nib.load(path)
        raw = np.asarray(image.dataobj, dtype=np.float32) / 255.0
        values = (raw > 0).astype(np.float32) if name == "t1" else raw
        affine = image.affine
        steps = np.diag(affine)[:3]
        rows = [
            _gaussian_rows(axis, (affine[i, 3] + steps[i] * np.arange(values.shape[i])).astype(np.float32), sigma)
            * np.float32(abs(steps[i]) / (sigma * np.sqrt(2 * np.pi)))
            for i, axis in enumerate(grid.axes())
        ]
        maps[name] = _apply_axes(values, rows).clip(0, 1)
    cover = maps["t1"]
    solid = maps["gm"] + maps["wm"]
    shrink = np.minimum(1.0, cover / np.maximum(solid, 1e-6))
    grey, white = maps["gm"] * shrink, maps["wm"] * shrink
    csf = (cover - grey - white).clip(0, 1)
    radius = sum(
        (((a - c) / r) ** 2).reshape([-1 if i == k else 1 for i in range(3)])
        for k, (a, c, r) in enumerate(zip(grid.axes(), VENTRICLE_CENTRE, VENTRICLE_RADII, strict=True))
    )
    depth = ndimage.distance_transform_edt(np.pad(cover > 0.5, 1))[1:-1, 1:-1, 1:-1] * grid.spacing
    ventricle = csf * np.clip(4 * (1.15 - radius), 0, 1)
    return Anatomy(
        grid, np.stack([csf, grey, white]).astype(np.float32), ventricle.astype(np.float32), depth.astype(np.float32)
    )


# --- profiles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What a hospital's scanners and patients look like; every range is drawn from once per case.

    Attributes:
        name: shown in tables.
        means: mean intensity by sequence (T1c, T1, T2, FLAIR) and tissue (CSF, grey, white, NCR, ED, ET).
        jitter: standard deviation of each mean, relative; T1c follows T1 for tissue that does not enhance.
        contrast: factor on the spread of the healthy tissues about their mean; correlated within a sequence.
        lesion_contrast: factor on how far tumour tissue stands out from white matter.
        lesion_jitter: standard deviation of each tumour tissue's mean on top of it, relative.
        gamma: exponent of the scanner's intensity curve.
        bias: standard deviation of the logarithm of the bias field.
        noise: standard deviation of the complex noise, relative to white matter.
        texture: standard deviation of tissue heterogeneity, relative.
        blur_mm: in-plane point spread, standard deviation in mm.
        slice_mm: slice thickness in mm.
        thick_slices: probability that a sequence is acquired in slices of that thickness (otherwise isotropic).
        vessels: strength of vessel, dura and choroid plexus enhancement in T1c, relative to white matter.
        white_lesions: strength of unlabelled periventricular and punctate FLAIR hyperintensity.
        intensity_scale: factor to raw scanner units, drawn log-uniformly.
        tumour_ml: volume of the whole tumour, drawn log-uniformly.
        core_share: volume of the tumour core over the whole tumour.
        necrosis_share: volume of the non-enhancing part over the tumour core, in enhancing tumours.
        non_enhancing: probability of a tumour with almost no enhancement (usual in lower grade).
        several: probability of more than one focus.
        front_mm: `sqrt(D / rho)` in white matter, the width of the infiltrating front.
        white_to_grey: ratio of the diffusivities in white and grey matter.
        roughness: standard deviation of boundary irregularity in units of the front width.
        mass_effect: outward displacement at the tumour edge over the tumour radius.
        ventricle: amount of ventricle enlargement in mm (negative: slit ventricles).
        atrophy: factor on the odds of CSF against tissue.
    """

    name: str
    means: tuple[tuple[float, ...], ...] = (
        (0.24, 0.62, 0.72, 0.58, 0.62, 0.98),
        (0.24, 0.62, 0.76, 0.56, 0.65, 0.63),
        (0.95, 0.51, 0.39, 0.74, 0.63, 0.64),
        (0.16, 0.57, 0.50, 0.85, 0.88, 0.90),
    )
    jitter: float = 0.08
    contrast: Range = (0.7, 1.3)
    lesion_contrast: Range = (0.5, 1.7)
    lesion_jitter: float = 0.08
    gamma: Range = (0.8, 1.25)
    bias: Range = (0.02, 0.15)
    noise: Range = (0.005, 0.05)
    texture: Range = (0.02, 0.08)
    blur_mm: Range = (0.3, 1.5)
    slice_mm: Range = (2.0, 6.0)
    thick_slices: float = 0.5
    vessels: Range = (0.1, 0.9)
    white_lesions: Range = (0.0, 0.5)
    intensity_scale: Range = (200.0, 2000.0)
    tumour_ml: Range = (15.0, 240.0)
    core_share: Range = (0.1, 0.85)
    necrosis_share: Range = (0.02, 0.8)
    non_enhancing: float = 0.15
    several: float = 0.2
    front_mm: Range = (2.0, 5.0)
    white_to_grey: Range = (3.0, 12.0)
    roughness: Range = (0.4, 2.0)
    mass_effect: Range = (0.0, 0.5)
    ventricle: Range = (-1.5, 4.0)
    atrophy: Range = (0.6, 2.5)

    def __post_init__(self) -> None:
        """Refuse tables of the wrong size (`SettingsError`)."""
        if [len(row) for row in self.means] != [len(TISSUES) - 1] * len(SEQUENCES):
            raise SettingsError(
                f"profile {self.name!r}: expected means for {len(SEQUENCES)} sequences x {len(TISSUES) - 1} tissues, "
                f"found rows of {[len(row) for row in self.means]}"
            )


PUBLIC_PRIOR = Profile("public-prior")


def hospital_profiles() -> tuple[Profile, ...]:
    """Five unlike phantom hospitals: scanner and patient mix differ for real, as between institutions."""
    base = Profile("base")
    academic = replace(
        base,
        name="academic-3t",
        jitter=0.03,
        contrast=(1.1, 1.3),
        lesion_jitter=0.04,
        lesion_contrast=(1.1, 1.4),
        gamma=(0.95, 1.05),
        bias=(0.05, 0.12),
        noise=(0.005, 0.015),
        blur_mm=(0.3, 0.6),
        thick_slices=0.0,
        intensity_scale=(800.0, 1200.0),
        tumour_ml=(12.0, 70.0),
        core_share=(0.4, 0.85),
        necrosis_share=(0.05, 0.4),
        non_enhancing=0.0,
        several=0.1,
        front_mm=(2.0, 3.0),
        mass_effect=(0.1, 0.3),
    )
    community = replace(
        base,
        name="community-1t",
        jitter=0.05,
        contrast=(0.55, 0.8),
        lesion_contrast=(0.6, 0.9),
        gamma=(1.1, 1.3),
        bias=(0.18, 0.28),
        noise=(0.06, 0.1),
        blur_mm=(1.5, 2.5),
        slice_mm=(4.0, 5.0),
        thick_slices=0.5,
        intensity_scale=(150.0, 300.0),
        tumour_ml=(40.0, 160.0),
        core_share=(0.2, 0.6),
        necrosis_share=(0.2, 0.7),
        non_enhancing=0.05,
    )
    thick = replace(
        base,
        name="thick-slices",
        jitter=0.04,
        gamma=(0.85, 1.0),
        bias=(0.03, 0.08),
        noise=(0.015, 0.03),
        slice_mm=(6.0, 7.0),
        thick_slices=1.0,
        vessels=(0.6, 1.1),
        intensity_scale=(300.0, 600.0),
        tumour_ml=(80.0, 260.0),
        core_share=(0.08, 0.3),
        necrosis_share=(0.3, 0.8),
        non_enhancing=0.0,
        several=0.35,
        front_mm=(3.5, 5.5),
        mass_effect=(0.25, 0.5),
        atrophy=(1.5, 2.5),
        ventricle=(1.0, 4.0),
    )
    lower_grade = replace(
        base,
        name="lower-grade",
        jitter=0.04,
        bias=(0.04, 0.1),
        noise=(0.02, 0.04),
        vessels=(0.1, 0.4),
        white_lesions=(0.0, 0.1),
        intensity_scale=(4000.0, 9000.0),
        tumour_ml=(60.0, 240.0),
        core_share=(0.4, 0.75),
        non_enhancing=1.0,
        several=0.05,
        atrophy=(0.6, 1.0),
        ventricle=(-1.5, 0.5),
    )
    flat_t1 = tuple(
        (0.24, 0.70, 0.60, *row[3:]) if i < 2 else (0.75, 0.52, 0.42, *row[3:]) if i == 2 else row
        for i, row in enumerate(base.means)
    )
    inverted = replace(
        base,
        name="inverted-contrast",
        means=flat_t1,
        jitter=0.05,
        gamma=(0.7, 0.85),
        bias=(0.08, 0.16),
        noise=(0.03, 0.05),
        intensity_scale=(60.0, 120.0),
        tumour_ml=(20.0, 120.0),
        non_enhancing=0.15,
    )
    return academic, community, thick, lower_grade, inverted


# --- random fields and warps ------------------------------------------------------------------------------------------


def _uniform(rng: Generator, bounds: Range) -> float:
    """One draw from a range."""
    return float(rng.uniform(*bounds))


def _log_uniform(rng: Generator, bounds: Range) -> float:
    """One draw from a range, uniform in the logarithm."""
    return float(np.exp(rng.uniform(*np.log(bounds))))


def _field(rng: Generator, grid: Grid, scale_mm: float) -> Array:
    """Gaussian random field of unit variance and correlation length `scale_mm`, `(D, H, W)`.

    White coefficients on nodes one length apart, spread by a separable Gaussian kernel; white noise below a voxel.
    """
    if scale_mm <= 0.7 * grid.spacing:
        noise: Array = rng.standard_normal(grid.shape, dtype=np.float32)
        return noise
    rows = []
    for axis in grid.axes():
        nodes = np.arange(axis[0] - 2 * scale_mm, axis[-1] + 3 * scale_mm, scale_mm, dtype=np.float32)
        nodes += np.float32(rng.uniform(-0.5, 0.5) * scale_mm)
        matrix = _gaussian_rows(axis, nodes, 0.8 * scale_mm)
        rows.append(matrix / np.sqrt((matrix**2).sum(1, keepdims=True)))
    coefficients = rng.standard_normal([m.shape[1] for m in rows], dtype=np.float32)
    return _apply_axes(coefficients, rows)


def _identity(grid: Grid) -> Array:
    """World coordinates in mm of each voxel relative to the middle of the head, `(3, D, H, W)`."""
    return np.stack(np.meshgrid(*(a - c for a, c in zip(grid.axes(), HEAD_CENTRE, strict=True)), indexing="ij")).astype(
        np.float32
    )


def _sample(volume: Array, grid: Grid, points: Array, mode: str = "constant") -> Array:
    """Linear interpolation of `(D, H, W)` at points in mm relative to the middle of the head.

    Outside the grid the value is 0 (`constant`) or that of the border (`nearest`).
    """
    index = points / np.float32(grid.spacing)
    index += (np.array(grid.shape, dtype=np.float32).reshape(3, 1, 1, 1) - 1) / 2
    sampled: Array = ndimage.map_coordinates(volume, index, order=1, mode=mode, output=np.float32)
    return sampled


def _head_shape(rng: Generator, grid: Grid, ventricle: Array, profile: Profile) -> Array:
    """Source point in mm for each voxel: random affine, two scales of elastic warp, ventricle size, `(3, D, H, W)`."""
    here = _identity(grid)
    size = rng.uniform(0.88, 1.0) * rng.uniform((0.95, 0.95, 0.93), (1.08, 1.03, 1.06))
    a, b, c = rng.normal(0, np.deg2rad([4, 3, 3]))
    turn = (
        np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        @ np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        @ np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    )
    shear = np.eye(3) + np.triu(rng.normal(0, 0.03, (3, 3)), 1)
    points = np.tensordot((np.diag(1 / size) @ turn @ shear).astype(np.float32), here, axes=(1, 0))
    points += rng.normal(0, 1.5, (3, 1, 1, 1)).astype(np.float32)
    for scale, amplitude in ((35.0, rng.uniform(1, 3.5)), (14.0, rng.uniform(0.3, 1.5))):
        for k in range(3):
            points[k] += np.float32(amplitude) * _field(rng, grid, scale)
    pull = np.stack(np.gradient(ndimage.gaussian_filter(ventricle, 6.0 / grid.spacing)))
    pull /= max(float(np.abs(pull).max()), 1e-6)
    points += np.float32(_uniform(rng, profile.ventricle)) * 1.5 * np.stack([_sample(p, grid, points) for p in pull])
    return points.astype(np.float32)


def mass_effect(points: Array, centre: Array, radius: float, strength: float, taper: Array) -> Array:
    """Displacement of tissue away from a tumour: where each voxel's tissue comes from.

    A voxel at distance `r` of the centre takes its tissue from `r - strength * r * exp(-(r / (1.6 radius))^2)`; the
    push fades with distance and, through `taper`, at the skull, which does not move. One-to-one for strength < 1.

    Args:
        points: `(3, D, H, W)` coordinates in mm.
        centre: `(3,)` in mm, same frame.
        radius: tumour radius in mm.
        strength: displacement over distance at the centre, 0 to below 1.
        taper: `(D, H, W)` 0 at the brain surface to 1 inside.

    Returns:
        `(3, D, H, W)` in mm.
    """
    offset = points - centre.reshape(3, 1, 1, 1).astype(np.float32)
    push = strength * np.exp(-(offset**2).sum(0) / (1.6 * radius) ** 2) * taper
    sources: Array = (points - offset * push).astype(np.float32)
    return sources


# --- tumour growth ----------------------------------------------------------------------------------------------------


def fisher_kpp_step(density: Array, diffusivity: Array, growth: float | Array, *, dt: float, spacing: float) -> Array:
    """One explicit step of `du/dt = div(D grad u) + growth * u * (1 - u)` with closed borders.

    Flux form with the harmonic mean of the diffusivities at each face, so without growth the sum of `u` is kept
    exactly and nothing enters tissue of diffusivity 0. Stable for `dt <= spacing**2 / (6 max D)`.

    Args:
        density: `(D, H, W)` cell density over carrying capacity, 0 to 1.
        diffusivity: `(D, H, W)` mm^2 per unit of time.
        growth: per unit of time.
        dt: time step.
        spacing: voxel edge in mm.

    Returns:
        `(D, H, W)` density one step later.
    """
    change = density * (1 - density) * growth
    for axis in range(density.ndim):
        low = tuple(slice(None, -1) if i == axis else slice(None) for i in range(density.ndim))
        high = tuple(slice(1, None) if i == axis else slice(None) for i in range(density.ndim))
        a, b = diffusivity[low], diffusivity[high]
        face = 2 * a * b / np.maximum(a + b, np.float32(1e-12))
        flux = face * (density[high] - density[low]) / np.float32(spacing**2)
        change[low] += flux
        change[high] -= flux
    return (density + np.float32(dt) * change).astype(np.float32)


def _reduce(volume: Array, factor: int) -> Array:
    """Block means by an integer factor; the far edge is padded with zeros."""
    if factor == 1:
        return volume
    padded = np.pad(volume, [(0, -n % factor) for n in volume.shape])
    d, h, w = (n // factor for n in padded.shape)
    reduced: Array = padded.reshape(d, factor, h, factor, w, factor).mean((1, 3, 5))
    return reduced


def _invade(
    rng: Generator,
    grid: Grid,
    tissue: Array,
    ventricle: Array,
    seeds: NDArray[np.int64],
    volume_ml: float,
    profile: Profile,
) -> Array:
    """Grow a tumour from seed voxels until `u > 0.16` fills a volume; returns the logit of the density, `(D, H, W)`."""
    factor = max(1, int(GROWTH_SPACING / grid.spacing + 0.5))
    spacing = grid.spacing * factor
    csf, grey, white = (_reduce(t, factor) for t in tissue)
    radius = (volume_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    # A front as wide as the tumour would leave no dense core; small tumours are young or compact.
    fast = min(_uniform(rng, profile.front_mm), 0.17 * radius) ** 2 * GROWTH_RATE
    slow = fast / _uniform(rng, profile.white_to_grey)
    coarse = Grid((csf.shape[0], csf.shape[1], csf.shape[2]), spacing)
    speed = np.exp(rng.uniform(0.2, 0.9) * _field(rng, coarse, 25.0))
    open_csf = np.maximum(csf - _reduce(ventricle, factor), 0)
    diffusivity = ((white * fast + grey * slow + 0.5 * open_csf * slow) * speed).astype(np.float32)
    limit = 0.9 * spacing**2 / 6
    dt = min(0.3 / GROWTH_RATE, limit / fast)
    diffusivity = np.minimum(diffusivity, limit / dt)
    growth = ((white + grey + 0.5 * open_csf) * GROWTH_RATE).astype(np.float32)
    density = np.zeros(csf.shape, dtype=np.float32)
    # A nodule, not a point: a point would spread out before it grows.
    sigma = min(0.25 * radius, 7.0) / spacing
    for i, seed in enumerate(seeds):
        offsets = np.ogrid[tuple(slice(n) for n in coarse.shape)]
        square = sum((o - (c + 0.5) / factor + 0.5) ** 2 for o, c in zip(offsets, seed, strict=True))
        density = np.maximum(density, (1.0 if i == 0 else rng.uniform(0.1, 1.0)) * np.exp(-square / (2 * sigma**2)))
    density = (density * (csf + grey + white).clip(0, 1)).astype(np.float32)
    goal = volume_ml * 1000 / spacing**3
    for step in range(400):
        density = fisher_kpp_step(density, diffusivity, growth, dt=dt, spacing=spacing)
        if step % 3 == 0 and np.count_nonzero(density > 0.16) >= goal:
            break
    clipped = density.clip(1e-5, 1 - 1e-5)
    logit = np.log(clipped / (1 - clipped))
    if factor > 1:
        logit = ndimage.zoom(logit, factor, order=1, mode="nearest", grid_mode=True)
        logit = ndimage.gaussian_filter(logit, 0.5 * factor)[tuple(slice(n) for n in grid.shape)]
    single: Array = logit.astype(np.float32)
    return single


def _membership(score: Array, inside: Array, volume: float) -> Array:
    """Share of each voxel above the level of `score` that encloses `volume` voxels of `inside`, `(D, H, W)`.

    The level is a quantile, so the volume is met; the share ramps over one voxel by the score's gradient.
    """
    values, weights = score[inside > 0], inside[inside > 0]
    if not len(values) or volume < 0.5:
        return np.zeros_like(score)
    order = np.argsort(-values)
    cumulated = np.cumsum(weights[order])
    place = int(np.searchsorted(cumulated, volume))
    level = values[order[min(place, len(order) - 1)]]
    slope = np.sqrt(sum(g**2 for g in np.gradient(score)))
    share: Array = np.clip(0.5 + (score - level) / np.maximum(slope, 1e-3), 0, 1).astype(np.float32)
    return share


@dataclass(frozen=True)
class TissueMap:
    """A grown patient before any scanner.

    Attributes:
        tissues: `(D, H, W)` uint8, index into `TISSUES`: tumour where it outweighs all healthy tissue together.
        fractions: `(7, D, H, W)` share of each tissue in a voxel, sum 1 (partial volume).
        density: `(D, H, W)` tumour cell density, 0 to 1.
        ventricle: `(D, H, W)` share of ventricular CSF.
        grid: where the arrays live.
    """

    tissues: Labels
    fractions: Array
    density: Array
    ventricle: Array
    grid: Grid


def _dominant_tissue(fractions: Array) -> Labels:
    """Label of each voxel from the shares of its tissues, `(7, D, H, W)` -> `(D, H, W)`.

    As when labels of a finer scan are averaged: everything healthy, in or outside the brain, counts as one class
    against NCR, ED and ET; where it wins, the largest healthy tissue is named.
    """
    healthy = 1 + fractions[1:NCR].argmax(0)
    tumour = fractions[NCR:]
    rest = 1 - tumour.sum(0)
    tissues = np.where(tumour.max(0) > rest, NCR + tumour.argmax(0), healthy)
    return np.where(fractions[0] < 1, tissues, 0).astype(np.uint8)


def tumour_classes(tissues: Labels) -> Labels:
    """Classes 0 to 3 of `labels.CLASSES` from a tissue map of any shape."""
    table = np.zeros(len(TISSUES), dtype=np.uint8)
    table[[NCR, ED, ET]] = 1, 2, 3
    classes: Labels = table[tissues]
    return classes


def grow(anatomy: Anatomy, seed: int, profile: Profile = PUBLIC_PRIOR) -> TissueMap:
    """Warp the public anatomy and grow a tumour in it.

    Args:
        anatomy: from `load_anatomy`.
        seed: decides everything; the same seed gives the same arrays.
        profile: ranges of size, shape and enhancement.

    Returns:
        Label map and partial volumes on the anatomy's grid. As in BraTS, NCR and ET form the core and
        ED surrounds it.
    """
    rng = np.random.default_rng([int(seed), 1])
    grid = anatomy.grid
    voxel_ml = grid.spacing**3 / 1000
    points = _head_shape(rng, grid, anatomy.ventricle, profile)

    # Where: white matter of the cerebrum, away from surface and ventricles.
    white = _sample(anatomy.fractions[2], grid, points)
    depth = _sample(anatomy.depth, grid, points)
    floor = np.clip((points[2] + 30) / 20, 0, 1)  # keeps clear of cerebellum and brain stem
    chance = ((white + 0.02) * np.clip((depth - 5) / 8, 0, 1) * (0.03 + floor)).astype(np.float64).ravel()
    if not chance.sum() > 0:
        raise SettingsError(f"phantom grid: no brain inside {grid.shape} at {grid.spacing} mm; use a larger grid")
    first = np.array(np.unravel_index(rng.choice(chance.size, p=chance / chance.sum()), grid.shape))
    seeds = [first]
    here = _identity(grid)
    if rng.random() < profile.several:
        distance = np.sqrt(((here - here[(slice(None), *first)].reshape(3, 1, 1, 1)) ** 2).sum(0)).ravel()
        reach = rng.uniform(20, 60)
        near = chance * np.exp(-(((distance - reach) / 12) ** 2))
        if near.sum() > 0:
            for _ in range(int(rng.integers(1, 3))):
                seeds.append(np.array(np.unravel_index(rng.choice(near.size, p=near / near.sum()), grid.shape)))

    # How large, and what it pushes away.
    volume_ml = _log_uniform(rng, profile.tumour_ml)
    core_share = _uniform(rng, profile.core_share)
    radius = (volume_ml * (0.3 + 0.7 * core_share) * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    moved = mass_effect(
        here, here[(slice(None), *first)], radius, _uniform(rng, profile.mass_effect), np.clip(depth / 18, 0, 1)
    )
    points = np.stack([_sample(p, grid, moved, mode="nearest") for p in points])
    csf, grey, white, ventricle = (_sample(v, grid, points) for v in (*anatomy.fractions, anatomy.ventricle))
    cover = np.minimum(csf + grey + white, 1)

    # Individual folding and atrophy: odds of the tissues, perturbed smoothly; the coverage is kept.
    csf = csf * _log_uniform(rng, profile.atrophy) * np.exp(0.5 * _field(rng, grid, 9.0))
    grey = grey * np.exp(0.4 * _field(rng, grid, 6.0))
    white = white * np.exp(0.2 * _field(rng, grid, 12.0))
    sharpness = rng.uniform(1.0, 2.2)  # an average of 152 heads is smoother than one head
    csf, grey, white = (t**sharpness for t in (csf, grey, white))
    total = np.maximum(csf + grey + white, 1e-6)
    csf, grey, white = (t * cover / total for t in (csf, grey, white))
    ventricle = np.minimum(ventricle, csf)

    # Growth, then boundaries as levels of the log-odds of the density plus irregularity.
    logit = _invade(rng, grid, np.stack([csf, grey, white]), ventricle, np.array(seeds), volume_ml, profile)
    rough = _uniform(rng, profile.roughness)
    tissue = cover * np.clip(1 - 1.5 * ventricle, 0, 1)
    whole_score = logit + rough * 1.3 * _field(rng, grid, 16.0) + 0.5 * rough * _field(rng, grid, 6.0)
    whole_score += rng.uniform(0.5, 4.0) * white - rng.uniform(1.0, 4.0) * csf  # cortex resists vasogenic oedema
    reachable = tissue * (logit > -9)
    whole_voxels = min(volume_ml / voxel_ml, 0.9 * float(reachable.sum()))
    whole = _membership(whole_score, reachable, whole_voxels)
    core_score = logit + rough * 0.9 * _field(rng, grid, 12.0) + 0.4 * rough * _field(rng, grid, 5.0)
    core = _membership(core_score, reachable, core_share * whole_voxels)
    core_voxels = float((core * tissue).sum())
    enhancing = rng.random() >= profile.non_enhancing
    necrosis_share = _uniform(rng, profile.necrosis_share) if enhancing else rng.choice([1.0, rng.uniform(0.93, 1.0)])
    # Depth order gives a rim of ET round NCR; noise varies its thickness, at the extreme patches.
    patchy = rng.choice([0.3, 1.0, 4.0], p=[0.7, 0.22, 0.08])
    dead_score = core_score + patchy * _field(rng, grid, rng.uniform(7, 14))
    dead = (
        _membership(dead_score, core * tissue, necrosis_share * core_voxels)
        if necrosis_share < 1
        else np.ones_like(core)
    )

    core, whole = core * np.clip(1 - 1.5 * ventricle, 0, 1), whole * np.clip(1 - 1.5 * ventricle, 0, 1)
    whole = np.maximum(whole, core)
    fractions = np.stack(
        [
            1 - cover,
            csf * (1 - whole),
            grey * (1 - whole),
            white * (1 - whole),
            cover * core * dead,
            cover * (whole - core),
            cover * core * (1 - dead),
        ]
    ).astype(np.float32)
    # Skull stripping cuts a little inside or outside the true surface.
    cut = np.clip(0.35 + 0.1 * _field(rng, grid, 25.0), 0.1, 0.7)
    inside = cover > cut
    fractions[0][~inside], fractions[1:, ~inside] = 1, 0
    tissues = _dominant_tissue(fractions)
    density = (1 / (1 + np.exp(-logit)) * inside).astype(np.float32)
    return TissueMap(tissues, fractions, density, (ventricle * inside).astype(np.float32), grid)


# --- rendering --------------------------------------------------------------------------------------------------------


def _contrasts(rng: Generator, profile: Profile, enhancing_share: float) -> Array:
    """Mean intensity by sequence and tissue for one case, `(4, 6)`, jitter correlated as real protocols give it."""
    means = np.array(profile.means)
    spread = rng.uniform(profile.contrast[0], profile.contrast[1], size=4)
    spread[0] = spread[1] * rng.uniform(0.75, 1.15)  # both T1 sequences usually share a protocol
    middle = means[:, 1:3].mean(1, keepdims=True)
    means[:, :3] = middle + (means[:, :3] - middle) * spread[:, None]
    jitter = rng.normal(0, profile.jitter, means.shape)
    jitter[:, 3:] *= 0.5
    jitter[0] = 0.7 * jitter[1] + 0.7 * jitter[0]
    means *= np.exp(jitter)
    # A tumour that does not enhance has a solid core: brighter on FLAIR, less fluid on T2 than necrosis.
    fluid = float(np.clip(rng.beta(1.2, 1.2) * 0.6 + 0.4 * (rng.random() < 0.3) - 0.15 * (enhancing_share < 0.1), 0, 1))
    means[3, NCR - 1] *= 1.15 - 0.6 * fluid
    means[2, NCR - 1] *= 0.9 + 0.35 * fluid
    means[:2, NCR - 1] *= 1.05 - 0.25 * fluid
    reference = means[:, WHITE - 1 : WHITE]
    low, high = np.log(profile.lesion_contrast)
    stand_out = np.exp(rng.uniform(low, high, size=(4, 1)) * np.array([[0.7], [0.7], [1], [1]]))
    # Necrosis stays darker than oedema on T1 and brighter on T2; on FLAIR their order varies between patients.
    lesion = np.exp(rng.normal(0, profile.lesion_jitter, (4, 3)) * np.array([[0.4], [0.4], [0.6], [1.3]]))
    means[:, 3:] = reference + (means[:, 3:] * lesion - reference) * stand_out
    return means.clip(0.03, None).astype(np.float32)


def _acquire(rng: Generator, image: Array, grid: Grid, profile: Profile) -> Array:
    """Point spread of one sequence: in-plane blur, and thick slices along a random axis, `(D, H, W)`."""
    sigma = np.full(3, _uniform(rng, profile.blur_mm))
    if rng.random() < profile.thick_slices:
        axis = rng.choice(3, p=[0.15, 0.15, 0.7])
        sigma[axis] = np.hypot(sigma[axis], _uniform(rng, profile.slice_mm) / 2.355)
    blurred: Array = ndimage.gaussian_filter(image, sigma / grid.spacing, mode="nearest")
    return blurred


def render(tissue_map: TissueMap, seed: int, profile: Profile = PUBLIC_PRIOR) -> Array:
    """Scan a grown patient: other seeds give other contrasts, fields and noise of the same label map.

    Args:
        tissue_map: from `grow`.
        seed: decides everything random about the scan.
        profile: scanner ranges.

    Returns:
        `(4, D, H, W)` float32 raw intensities in the order of `SEQUENCES`; above 0 inside the brain, exactly 0 outside.
    """
    rng = np.random.default_rng([int(seed), 2])
    grid, parts = tissue_map.grid, tissue_map.fractions
    brain = tissue_map.tissues > 0
    cover = 1 - parts[0]
    core = float(parts[NCR].sum() + parts[ET].sum())
    means = _contrasts(rng, profile, float(parts[ET].sum()) / max(core, 1e-6))
    texture = _uniform(rng, profile.texture)
    lesion = parts[NCR] + parts[ED] + parts[ET]
    fine, medium, coarse = (_field(rng, grid, s) for s in (3.0, 8.0, 18.0))
    amount = texture * (1 + rng.uniform(0, 1.5) * lesion)
    fall_off = rng.uniform(0, 0.5)  # oedema fades towards its edge with the density
    infiltrated = tissue_map.density - 0.5
    spots = np.clip(_field(rng, grid, 5.0) - 2.2, 0, 1) + 0.8 * ndimage.gaussian_filter(
        tissue_map.ventricle, 4.0 / grid.spacing
    )
    spots *= parts[WHITE] * _uniform(rng, profile.white_lesions)
    surface = (parts[CSF] - tissue_map.ventricle).clip(0, 1) + 2 * parts[0] * cover
    vessels = surface * np.clip(_field(rng, grid, 7.0) - 0.4, 0, 1.5) + 0.6 * tissue_map.ventricle * np.clip(
        _field(rng, grid, 6.0) - 1, 0, 1
    )
    vessels *= _uniform(rng, profile.vessels)
    bleed = parts[NCR] * np.clip(_field(rng, grid, 9.0) - 0.5, 0, 1) * (rng.random() < 0.25) * rng.uniform(0, 0.6)
    shared_bias = _field(rng, grid, 70.0)
    scale = _log_uniform(rng, profile.intensity_scale)
    images = np.zeros((4, *grid.shape), dtype=np.float32)
    for s in range(4):
        tissue_means = means[s]
        image = np.tensordot(tissue_means, parts[1:], axes=(0, 0))
        white = tissue_means[WHITE - 1]
        image += parts[ED] * (tissue_means[ED - 1] - white) * fall_off * infiltrated
        mix = rng.normal(0, 0.6, 3)
        image *= np.exp(amount * (mix[0] * fine + mix[1] * medium + mix[2] * coarse))
        if s == 0:
            image += vessels * white
            image *= 1 + parts[ET] * rng.uniform(0, 0.2) * medium
        if s < 2:
            image += bleed
        if s >= 2:
            image += spots * (tissue_means[ED - 1] - white) * (1.2 if s == 3 else 0.7)
            image -= bleed * rng.uniform(0.2, 0.8)
        # Beyond the surface lie CSF and dura; the scanner blurs them in before the skull is stripped.
        image += parts[0] * tissue_means[CSF - 1] * rng.uniform(0.6, 1.4)
        image = _acquire(rng, image.clip(0.01, None), grid, profile)
        image = image ** np.float32(_log_uniform(rng, profile.gamma))
        own = _field(rng, grid, 50.0)
        image *= np.exp(_uniform(rng, profile.bias) * (0.6 * shared_bias + 0.8 * own))
        sigma = np.float32(_uniform(rng, profile.noise) * white)
        real, imaginary = (rng.standard_normal(grid.shape, dtype=np.float32) * sigma for _ in range(2))
        image = np.hypot(image + real, imaginary)
        factor = scale * rng.uniform(0.6, 1.6)
        images[s] = np.where(brain, np.maximum(image * cover * factor, 0.005 * factor), 0)
    return images


@dataclass(frozen=True)
class Phantom:
    """One simulated patient.

    Attributes:
        image: `(4, D, H, W)` float32 raw intensities, order of `SEQUENCES`, 0 outside the brain.
        tissues: `(D, H, W)` uint8, index into `TISSUES`.
        classes: `(D, H, W)` uint8, index into `labels.CLASSES`.
        affine: `(4, 4)` voxel to mm, RAS.
    """

    image: Array
    tissues: Labels
    classes: Labels
    affine: NDArray[np.float64]


def simulate(anatomy: Anatomy, seed: int, profile: Profile = PUBLIC_PRIOR) -> Phantom:
    """Grow and scan one patient; deterministic by seed."""
    grown = grow(anatomy, seed, profile)
    return Phantom(render(grown, seed, profile), grown.tissues, tumour_classes(grown.tissues), anatomy.grid.affine())


# --- cohorts on disk --------------------------------------------------------------------------------------------------

_SUFFIXES = {
    "brats2018": ("t1ce", "t1", "t2", "flair", "seg"),
    "brats2023": ("t1c", "t1n", "t2w", "t2f", "seg"),
}
PHANTOM_LAYOUTS = tuple(_SUFFIXES)


def _write_nifti(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    """Write one volume with its geometry in both affines of the header."""
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


def write_cohort(
    out: Path,
    *,
    count: int,
    seed: int,
    grid: Grid | None = None,
    profile: Profile = PUBLIC_PRIOR,
    prefix: str,
    layout: str = "brats2018",
) -> list[Path]:
    """Write a phantom hospital in a true BraTS layout.

    `brats2018`: `{HGG,LGG}/Brats18_<PREFIX>_<n>_1/<case>_{t1ce,t1,t2,flair,seg}.nii.gz`, ET = 4, lower grade when less
    than 5 % of the core enhances. `brats2023`: `BraTS-GLI-<nnnnn>-000/<case>-{t1c,t1n,t2w,t2f,seg}.nii.gz`, ET = 3,
    numbered from a start that the prefix decides. Images are int16, labels uint8.

    Args:
        out: folder, made when absent.
        count: cases.
        seed: of the cohort; case `i` of one seed never changes with `count`.
        grid: 48^3 at 4 mm when not given.
        profile: the hospital.
        prefix: institution in the case names (letters and digits).
        layout: one of `PHANTOM_LAYOUTS`.

    Returns:
        Case folders in order.

    Raises:
        SettingsError: unknown layout, or a prefix that would break the case names.
    """
    if layout not in _SUFFIXES:
        raise SettingsError(f"phantom layout: expected one of {', '.join(_SUFFIXES)}, found {layout!r}")
    if not prefix.isalnum():
        raise SettingsError(f"phantom prefix: expected letters and digits only, found {prefix!r}")
    anatomy = load_anatomy(grid)
    scheme = get_scheme(layout)
    start = sum(ord(c) * 31**i for i, c in enumerate(prefix)) % 90000
    folders = []
    for i in range(count):
        phantom = simulate(anatomy, int(np.random.SeedSequence([seed, i]).generate_state(1)[0]), profile)
        if layout == "brats2018":
            enhancing = np.count_nonzero(phantom.classes == 3)
            core = enhancing + np.count_nonzero(phantom.classes == 1)
            folder = out / ("HGG" if enhancing >= 0.05 * core else "LGG") / f"Brats18_{prefix}_{i + 1}_1"
            joint = "_"
        else:
            folder = out / f"BraTS-GLI-{start + i:05d}-000"
            joint = "-"
        folder.mkdir(parents=True, exist_ok=True)
        # int16 holds up to 32767; scaling the rare brighter case keeps its contrast, as scanners do.
        image = phantom.image * min(1.0, 32000 / float(phantom.image.max()))
        whole = np.where(phantom.tissues > 0, np.maximum(np.rint(image), 1), 0).astype(np.int16)
        for volume, suffix in zip((*whole, from_classes(phantom.classes, scheme)), _SUFFIXES[layout], strict=True):
            _write_nifti(folder / f"{folder.name}{joint}{suffix}.nii.gz", volume, phantom.affine)
        folders.append(folder)
    return folders
