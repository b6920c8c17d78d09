from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fediod_med.coregister import Coregistered, coregister
from fediod_med.data.itk_formats import read_scans
from fediod_med.data.layouts import find_subject
from fediod_med.data.phantoms import Grid, Phantom, load_anatomy, simulate
from fediod_med.data.scans import Scan
from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SEQUENCES
from fediod_med.rigid import find_motion, head_of, resample_classes, resample_scan

CENTRE = np.array([0.0, -18.0, 8.0])


def motion(angles=(0.0, 0.0, 0.0), shift=(0.0, 0.0, 0.0), centre=CENTRE) -> np.ndarray:
    """Turn by Euler angles (degrees) about a centre, then shift (mm)."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    matrix[:3, 3] = centre + shift - matrix[:3, :3] @ centre
    return matrix


def grid(spacing, extent, angles=(0.0, 0.0, 0.0), centre=CENTRE) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of a box of `extent` mm around a centre, oblique by Euler angles."""
    spacing = np.array(spacing, dtype=float)
    shape = np.ceil(np.array(extent) / spacing).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2)
    return tuple(int(n) for n in shape), affine


def displace(scan: Scan, moved: np.ndarray, shape, affine) -> Scan:
    """The same head after it moved by `moved`, scanned on another grid (cubic splines: not the code under test)."""
    index = np.linalg.inv(scan.affine) @ np.linalg.inv(moved) @ affine
    values = ndimage.affine_transform(scan.array, index[:3, :3], index[:3, 3], shape, np.float32, order=3)
    inside = ndimage.affine_transform(head_of(scan).astype(np.float32), index[:3, :3], index[:3, 3], shape, order=1)
    return Scan(np.where(inside > 0.5, np.maximum(values, 1), 0).astype(np.float32), affine, scan.path)


def errors(found: np.ndarray, true: np.ndarray, scan: Scan) -> tuple[float, float]:
    """Mean distance over the head in mm, and angle in degrees, between two motions."""
    points = np.c_[np.argwhere(scan.array != 0)[::17], np.ones(len(np.argwhere(scan.array != 0)[::17]))] @ scan.affine.T
    distance = float(np.linalg.norm((points @ (found - true).T)[:, :3], axis=1).mean())
    return distance, float(np.degrees(Rotation.from_matrix(found[:3, :3] @ true[:3, :3].T).magnitude()))


def centre_and_voxel(classes: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre of the tumour in mm, and the volume of a voxel in mm3."""
    centre = affine @ np.append(np.argwhere(classes > 0).mean(axis=0), 1)
    return centre[:3], abs(float(np.linalg.det(affine[:3, :3])))


def shells(shape, affine, centre, radii=(20.0, 25.0, 30.0)) -> np.ndarray:
    """Classes of an ellipsoid (class 2) within another (class 1), by formula: the truth on any grid."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    place = index @ affine[:3, :3].T + affine[:3, 3] - centre
    distance = np.linalg.norm(place / np.array(radii), axis=-1)
    return np.where(distance < 0.7, 2, np.where(distance < 1, 1, 0)).astype(np.uint8)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return simulate(load_anatomy(Grid((64, 64, 64), 3.0)), 1)


@pytest.fixture(scope="module")
def scans(phantom) -> dict[str, Scan]:
    return {name: Scan(phantom.image[i], phantom.affine, Path(f"{name}.nii")) for i, name in enumerate(SEQUENCES)}


# T2 in thick oblique slices after the patient moved; FLAIR from the same position on another grid; T1 untouched.
MOVED = {"T1": np.eye(4), "T2": motion((4, -6, 9), (5, -7, 4)), "FLAIR": np.eye(4)}


@pytest.fixture(scope="module")
def displaced(scans) -> dict[str, Scan]:
    thick = grid((1.5, 1.5, 6.0), (200, 210, 190), (8, -12, 5), centre=CENTRE + np.array([5, -7, 4]))
    other = grid((2.5, 2.5, 4.0), (200, 220, 200), (0, 0, 15))
    return {
        **scans,
        "T2": displace(scans["T2"], MOVED["T2"], *thick),
        "FLAIR": displace(scans["FLAIR"], MOVED["FLAIR"], *other),
    }


@pytest.fixture(scope="module")
def registered(displaced) -> Coregistered:
    return coregister(displaced, case="p1")


# ---------------------------------------------------------------- finding the motion


@pytest.mark.parametrize(
    ("sequence", "angles", "shift", "spacing", "oblique"),
    [
        ("T1", (5, -7, 10), (6, -8, 4), (3, 3, 3), (0, 0, 0)),
        ("T2", (-15, 10, 20), (20, 10, -15), (1.5, 1.5, 5), (8, -12, 5)),
        ("FLAIR", (2, 1, -3), (-2, 3, 1), (4, 1.2, 1.2), (-20, 0, 10)),
    ],
)
def test_a_known_motion_is_found_within_half_a_millimetre_and_degree(
    scans, sequence, angles, shift, spacing, oblique
) -> None:
    true = motion(angles, shift)
    moving = displace(scans[sequence], true, *grid(spacing, (200, 210, 200), oblique, centre=CENTRE + shift))
    found = find_motion(scans["T1c"], moving)
    distance, angle = errors(found.matrix, true, scans["T1c"])
    assert distance < 0.5
    assert angle < 0.5
    assert found.residual_mm < 0.3
    assert found.information > found.information_before
    assert found.rotation_deg == pytest.approx(np.degrees(Rotation.from_matrix(true[:3, :3]).magnitude()), abs=0.5)
    assert np.linalg.det(found.matrix[:3, :3]) == pytest.approx(1)


def test_headers_that_lie_far_off_are_overcome(scans) -> None:
    """Another session has another origin: 300 mm apart, the images do not even overlap."""
    away = np.array([300.0, -200.0, 120.0])
    true = motion((3, 0, -4), away)
    moving = displace(scans["T1"], true, *grid((3, 3, 3), (200, 210, 200), centre=CENTRE + away))
    found = find_motion(scans["T1c"], moving)
    assert errors(found.matrix, true, scans["T1c"])[0] < 0.5
    assert found.information_before == float("-inf")
    assert found.moved_mm == pytest.approx(np.linalg.norm(away), rel=0.05)


def test_a_scan_with_its_axes_flipped_is_the_same_scan(scans) -> None:
    """Storage order is no orientation: RAS and LPS files of one scan are found in one place."""
    scan = scans["T2"]
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = np.array(scan.array.shape[:2]) - 1
    flipped = Scan(np.ascontiguousarray(scan.array[::-1, ::-1]), scan.affine @ flip, scan.path)
    assert find_motion(scans["T1c"], flipped).moved_mm < 0.5


def test_the_same_seed_gives_the_same_motion(scans) -> None:
    one, two = (find_motion(scans["T1c"], scans["FLAIR"], seed=3) for _ in range(2))
    assert np.array_equal(one.matrix, two.matrix)
    assert one.information == two.information


# ---------------------------------------------------------------- four sequences


def test_every_sequence_comes_to_lie_on_the_t1c_grid(registered, scans) -> None:
    volume = registered.volume
    assert volume is not None
    assert volume.array.shape == (4, 64, 64, 64)
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.affine, scans["T1c"].affine)
    assert volume.path == scans["T1c"].path
    inside = ndimage.binary_erosion(scans["T1c"].array != 0, iterations=2)
    for i, name in enumerate(SEQUENCES):
        likeness = np.corrcoef(volume.array[i][inside], scans[name].array[inside])[0, 1]
        assert likeness > {"T1c": 0.9999, "T1": 0.9999, "T2": 0.85, "FLAIR": 0.9}[name]


def test_what_lies_right_already_is_left_bit_for_bit(registered, scans) -> None:
    assert registered.volume is not None
    assert np.array_equal(registered.volume.array[0], scans["T1c"].array)
    assert np.array_equal(registered.volume.array[1], scans["T1"].array)
    for name in ("T1c", "T1", "FLAIR"):
        assert np.array_equal(registered.matrices[name], np.eye(4))


def test_the_motions_found_are_those_made(registered, scans) -> None:
    distance, angle = errors(registered.matrices["T2"], MOVED["T2"], scans["T1c"])
    assert distance < 0.5
    assert angle < 0.5
    assert set(registered.motions) == {"T1", "T2", "FLAIR"}
    assert registered.motions["FLAIR"].moved_mm < 0.7


def test_findings_tell_what_was_done(registered) -> None:
    codes = [(found.code, found.where) for found in registered.findings]
    assert codes == [("N155", "T1.nii"), ("N155", "T2.nii"), ("N155", "FLAIR.nii")]
    assert "T2 moved by" in registered.findings[1].message
    assert "left where the headers place it" in registered.findings[0].message
    assert all(found.case == "p1" for found in registered.findings)


def test_a_mask_returns_to_the_grid_of_a_sequence(registered, displaced, phantom) -> None:
    """Two routes to one mask: back from T1c by the motion found, and by formula where the true motion puts it."""
    centre = CENTRE + np.array([20.0, 3.0, 11.0])
    classes = shells(phantom.classes.shape, phantom.affine, centre)
    for name in ("T2", "FLAIR"):
        own = displaced[name]
        found = registered.classes_on(name, classes)
        assert found.dtype == classes.dtype
        expected = shells(own.array.shape, np.linalg.inv(MOVED[name]) @ own.affine, centre)
        middle, voxel = centre_and_voxel(found, own.affine)
        assert dice(found > 0, expected > 0) > 0.95
        assert np.linalg.norm(middle - (MOVED[name] @ np.append(centre, 1))[:3]) < 0.5
        assert np.count_nonzero(found) * voxel == pytest.approx(4 / 3 * np.pi * 20 * 25 * 30, rel=0.03)
    with pytest.raises(SettingsError, match="expected one of T1c, T1, T2, FLAIR, found 'T3'"):
        registered.classes_on("T3", phantom.classes)


@pytest.mark.parametrize("other", ["noise", "another head"])
def test_a_sequence_that_does_not_belong_is_an_error(scans, phantom, other) -> None:
    if other == "noise":
        strange = np.random.default_rng(0).normal(100, 30, (64, 64, 64)).astype(np.float32)
    else:
        strange = np.ascontiguousarray(phantom.image[2][:, ::-1])  # back to front
    result = coregister({**scans, "T2": Scan(strange, phantom.affine, Path("T2.nii"))}, case="p1")
    assert result.volume is None
    assert [found.where for found in result.findings if found.code == "E152"] == ["T2.nii"]


def test_a_sequence_of_part_of_the_head_is_named(scans) -> None:
    half = grid((3, 3, 3), (200, 210, 90), centre=CENTRE + np.array([0, 0, 15]))
    slab = {**scans, "FLAIR": displace(scans["FLAIR"], np.eye(4), *half)}
    result = coregister(slab, case="p1")
    assert result.volume is not None
    warning = [found for found in result.findings if found.code == "W154"]
    assert len(warning) == 1
    assert isinstance(warning[0].value, float)
    assert 0.5 < warning[0].value < 0.97
    outside = result.volume.array[3][:, :, :8]
    assert (outside == 0).all()


def test_a_far_motion_asks_for_a_look(scans) -> None:
    shift = np.array([40.0, 10.0, -30.0])
    moving = displace(scans["T1"], motion((0, 0, 0), shift), *grid((3, 3, 3), (200, 210, 200), centre=CENTRE + shift))
    result = coregister({**scans, "T1": moving}, case="p1")
    assert [found.code for found in result.findings if found.where == "T1.nii"] == ["W153", "N155"]
    assert result.volume is not None
    inside = ndimage.binary_erosion(scans["T1"].array != 0, iterations=2)
    assert np.corrcoef(result.volume.array[1][inside], scans["T1"].array[inside])[0, 1] > 0.95


def test_a_missing_sequence_is_named(scans) -> None:
    with pytest.raises(InputError, match="found none for T2"):
        coregister({name: scan for name, scan in scans.items() if name != "T2"}, case="x")


# ---------------------------------------------------------------- resampling


def ramp(affine, shape, slope=(2.0, -1.0, 0.5)) -> np.ndarray:
    """An image that grows linearly in the world: linear interpolation must give it back exactly."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return ((index @ affine[:3, :3].T + affine[:3, 3]) @ np.array(slope) + 500).astype(np.float32)


def test_a_linear_image_is_resampled_exactly(rng) -> None:
    source = grid((2, 2, 2), (80, 80, 80), (10, 20, -30))
    target = grid((1.5, 1.0, 2.0), (30, 30, 30), (0, 5, 0))
    moved = motion((3, -4, 5), (2, 1, -1))
    scan = Scan(ramp(source[1], source[0]), source[1], Path("x"))
    found = resample_scan(scan, moved, shape=target[0], affine=target[1])
    assert np.allclose(found, ramp(moved @ target[1], target[0]), atol=1e-2)


def test_outside_the_scan_is_background_and_its_outermost_voxels_are_whole() -> None:
    scan = Scan(np.full((4, 4, 4), 7, np.float32) + np.arange(4, dtype=np.float32), np.diag([1, 1, 5, 1.0]), Path("x"))
    target = np.diag([1, 1, 1.0, 1.0])
    target[2, 3] = -4.0
    found = resample_scan(scan, np.eye(4), shape=(4, 4, 24), affine=target)
    # Slices of 5 mm around z = 0, 5, 10, 15 reach from -2.5 to 17.5 mm.
    assert (found[0, 0] != 0).nonzero()[0].tolist() == list(range(2, 22))
    assert found[0, 0, 2] == 7
    assert found[0, 0, 21] == 10


def test_a_coarser_grid_averages_instead_of_skipping(rng) -> None:
    noise = Scan(rng.normal(100, 20, (40, 40, 40)).astype(np.float32), np.eye(4), Path("x"))
    coarse = np.diag([1, 1, 5.0, 1])
    coarse[2, 3] = 2
    found = resample_scan(noise, np.eye(4), shape=(40, 40, 8), affine=coarse)
    inner = found[5:-5, 5:-5, 1:-1]
    assert inner.mean() == pytest.approx(100, abs=1)
    assert inner.std() < 12  # five slices averaged: 20 / sqrt(5) = 9
    same = resample_scan(noise, np.eye(4), shape=(40, 40, 40), affine=np.eye(4))
    assert np.allclose(same, noise.array, atol=1e-3)


def test_classes_survive_a_permutation_of_axes_exactly(rng) -> None:
    """Voxel (i, j, k) of the other grid is voxel (k, j, 7 - i) of the classes."""
    classes = rng.integers(0, 4, (6, 7, 8)).astype(np.uint8)
    turned = np.array([[0, 0, 1.0, 0], [0, 1, 0, 0], [-1, 0, 0, 7], [0, 0, 0, 1]])
    found = resample_classes(classes, np.eye(4), affine=np.eye(4), shape=(8, 7, 6), grid=turned)
    assert np.array_equal(found, classes.transpose(2, 1, 0)[::-1])


def test_classes_at_the_border_and_an_empty_mask(rng) -> None:
    classes = np.zeros((5, 5, 5), np.uint8)
    assert not resample_classes(classes, np.eye(4), affine=np.eye(4), shape=(9, 9, 9), grid=np.eye(4)).any()
    classes[0, 0, 0] = classes[4, 4, 4] = 3
    assert np.array_equal(
        resample_classes(classes, np.eye(4), affine=np.eye(4), shape=(5, 5, 5), grid=np.eye(4)), classes
    )
    away = np.eye(4)
    away[:3, 3] = 100
    assert not resample_classes(classes, np.eye(4), affine=np.eye(4), shape=(5, 5, 5), grid=away).any()


def test_a_mask_keeps_its_shape_and_volume_on_another_grid() -> None:
    """Against the formula: better than nearest neighbour for each class, volumes within 1 %."""
    moved, centre = motion((7, -11, 13), (4, 5, -6)), np.array([1.3, -17.0, 9.2])
    shape, affine = grid((1, 1, 1), (90, 90, 90))
    other, there = grid((1.2, 1.2, 3.1), (100, 100, 100), (10, 20, 5), centre=CENTRE + np.array([4, 5, -6]))
    classes = shells(shape, affine, centre)
    found = resample_classes(classes, moved, affine=affine, shape=other, grid=there)
    index = np.linalg.inv(moved @ affine) @ there
    nearest = ndimage.affine_transform(classes, index[:3, :3], index[:3, 3], other, order=0)
    truth = shells(other, np.linalg.inv(moved) @ there, centre)
    for value in (1, 2):
        assert dice(found == value, truth == value) > 0.975
        assert dice(found == value, truth == value) > dice(nearest == value, truth == value) + 0.005
        assert (found == value).sum() == pytest.approx((truth == value).sum(), rel=0.01)


# ---------------------------------------------------------------- real scans


@pytest.mark.slow
def test_a_real_scan_displaced_by_hand_is_brought_back(shared_data) -> None:
    """BraTS sequences match to about half a millimetre themselves: that is what may remain."""
    scans = read_scans(find_subject(shared_data / "brats18_2mm" / "HGG" / "Brats18_2013_3_1"))
    middle = (scans["T1c"].affine @ np.append((np.array(scans["T1c"].array.shape) - 1) / 2, 1))[:3]
    true = {"T1": motion((5, -7, 10), (6, -8, 4), middle), "FLAIR": motion((-4, 3, -8), (-5, 4, 7), middle)}
    moved = dict(scans)
    for name, matrix in true.items():
        shape, affine = grid((2, 2, 5), (200, 220, 190), (8, -12, 5), centre=(matrix @ np.append(middle, 1))[:3])
        moved[name] = displace(scans[name], matrix, shape, affine)
    result = coregister(moved, case="real")
    assert result.volume is not None
    assert np.array_equal(result.volume.array[2], scans["T2"].array)
    for name, matrix in true.items():
        distance, angle = errors(result.matrices[name], matrix, scans["T1c"])
        assert distance < 1.0
        assert angle < 1.0
