"""What the viewer shows of one case or synthetic volume, and where its crosshair stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import CLASSES, REGION_CLASSES, SEQUENCES, get_scheme
from fediod_med.review.case_folder import Case
from fediod_med.review.overlays import Overlay, class_overlay, difference_overlay, region_overlay, vote_entropy
from fediod_med.review.slices import AXIS, PLANES, Plane
from fediod_med.review.synthetic_folder import SyntheticVolume
from fediod_med.review.volumes import LoadedVolume, Point, VolumeCache, focus_mm, same_grid


def case_images(case: Case, cache: VolumeCache, sequence: str) -> LoadedVolume:
    """One sequence of a case.

    Raises:
        InputError: it cannot be read.
        SettingsError: the case has no such sequence.
    """
    if sequence not in case.images:
        raise SettingsError(f"{case.case_id}: expected the sequence {sequence}, {case.why('images') or 'found none'}")
    file = case.images[sequence]
    return cache.image(file.path, channel=file.channel, name=f"{case.case_id} {sequence}")


def case_maps(case: Case, cache: VolumeCache, *, own: str = "model") -> dict[str, LoadedVolume]:
    """Every label map of a case by name: its own, other models', the reference.

    Raises:
        InputError, LabelError: one cannot be read.
    """
    return {name: cache.classes(file.path, file.scheme, name=name) for name, file in case.label_maps(own).items()}


def synthetic_image(volume: SyntheticVolume, cache: VolumeCache, sequence: str) -> LoadedVolume:
    """One sequence of a synthetic volume; `InputError` where it cannot be read."""
    return cache.image(volume.path, channel=SEQUENCES.index(sequence), name=f"{volume.name} {sequence}")


def synthetic_maps(volume: SyntheticVolume, cache: VolumeCache) -> dict[str, LoadedVolume]:
    """Label maps of a synthetic volume: the one it was made from, the teachers' answers, and others."""
    plain = get_scheme("brats2023")  # its values are the classes themselves
    files = {
        **({"made from": volume.label_map} if volume.label_map is not None else {}),
        **{f"teacher {site}": path for site, path in volume.answers.items()},
        **volume.others,
    }
    return {name: cache.classes(path, plain, name=name) for name, path in files.items()}


def synthetic_phantom(volume: SyntheticVolume, cache: VolumeCache, sequence: str) -> LoadedVolume:
    """One sequence of the public phantom that a synthetic volume started from.

    Raises:
        InputError: the run kept none, or it cannot be read.
    """
    if volume.phantom is None:
        raise InputError(f"{volume.key}: the run kept no phantom of this volume")
    return cache.image(volume.phantom, channel=SEQUENCES.index(sequence), name=f"public phantom {sequence}")


def synthetic_disagreement(volume: SyntheticVolume, cache: VolumeCache) -> LoadedVolume | None:
    """Where the hospitals' answers disagree: entropy of their votes in nats; none with fewer than two answers."""
    if len(volume.answers) < 2:
        return None
    maps = synthetic_maps(volume, cache)
    answers = [maps[f"teacher {site}"] for site in volume.answers]
    name = "disagreement of the hospitals"
    return cache.made(tuple(volume.answers.values()), name, lambda: vote_entropy(answers, name=name))


def start_point(image: LoadedVolume, maps: Mapping[str, LoadedVolume]) -> Point:
    """Where the crosshair begins: where the first map's tumour is largest, else the middle."""
    for labels in maps.values():
        found = focus_mm(labels)
        if found is not None:
            return found
    return image.centre


def slices_at(image: LoadedVolume, mm: Point) -> dict[Plane, int]:
    """Number of the slice of each plane through a position."""
    voxel = image.voxel_of(mm)
    return {plane: voxel[AXIS[plane]] for plane in PLANES}


def point_of(image: LoadedVolume, slices: Mapping[Plane, int]) -> Point:
    """Position (mm) where three slices meet."""
    index = [0.0, 0.0, 0.0]
    for plane, number in slices.items():
        index[AXIS[plane]] = float(number)
    return image.mm_of((index[0], index[1], index[2]))


def overlay_of(
    maps: Mapping[str, LoadedVolume],
    chosen: str | None,
    *,
    against: str | None = None,
    shown: Sequence[str],
) -> Overlay | None:
    """What to draw over the image.

    Args:
        maps: label maps by name.
        chosen: the one to draw, or none.
        against: another one; then their difference is drawn.
        shown: classes (NCR, ED, ET) or regions (WT, TC, ET) to draw; region names count when any of WT or TC is among
            them. A difference is drawn class by class, or in the one region that is shown.

    Raises:
        SettingsError: an unknown name.
        GeometryError: grids of a difference differ.
    """
    if chosen is None or not shown:
        return None
    for name in (chosen, against):
        if name is not None and name not in maps:
            raise SettingsError(f"overlay: expected one of {', '.join(maps) or 'no label map'}, found {name}")
    if against is not None:
        region = shown[0] if len(shown) == 1 and shown[0] in REGION_CLASSES else None
        return difference_overlay(maps[chosen], maps[against], region=region, agreement=True)
    if set(shown) & {"WT", "TC"}:
        return region_overlay(maps[chosen], shown)
    return class_overlay(maps[chosen], shown)


def fitting(image: LoadedVolume, maps: Mapping[str, LoadedVolume]) -> tuple[dict[str, LoadedVolume], tuple[str, ...]]:
    """The maps on the image's grid, and the names of those that lie on another and so cannot be drawn over it."""
    fit = {name: labels for name, labels in maps.items() if same_grid(image, labels)}
    return fit, tuple(name for name in maps if name not in fit)


def volumes_of(labels: LoadedVolume) -> dict[str, float]:
    """Millilitres of NCR, ED, ET, TC and WT."""
    voxel = abs(float(np.linalg.det(np.asarray(labels.affine, dtype=np.float64)[:3, :3]))) / 1000
    counts = np.bincount(labels.array.ravel(), minlength=len(CLASSES))
    found = {name: float(counts[index]) * voxel for index, name in enumerate(CLASSES) if index}
    sums = {region: sum(float(counts[m]) for m in members) * voxel for region, members in REGION_CLASSES.items()}
    return found | {region: sums[region] for region in ("TC", "WT")}


def dice_of(labels: LoadedVolume, reference: LoadedVolume) -> dict[str, float]:
    """Dice by region, 1 where both are empty; counted here since the evaluation's own function loads torch."""
    found = {}
    for region, members in REGION_CLASSES.items():
        one, two = np.isin(labels.array, members), np.isin(reference.array, members)
        total = int(one.sum()) + int(two.sum())
        found[region] = 2 * int((one & two).sum()) / total if total else 1.0
    return found
