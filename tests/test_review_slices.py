"""Slices: which way is which, true proportions, exact colours, and what may not be mixed up."""

from __future__ import annotations

import io
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image

from fediod_med.errors import GeometryError, InputError, LabelError, SettingsError
from fediod_med.labels import get_scheme
from fediod_med.review.overlays import (
    CLASS_PALETTE,
    DIFFERENCE_PALETTE,
    class_overlay,
    difference_map,
    difference_overlay,
    region_overlay,
    vote_entropy,
)
from fediod_med.review.slices import PLANES, View, place, slice_picture, tri_planar
from fediod_med.review.volumes import LoadedVolume, VolumeCache, focus_mm, image_channels, load_image

SCHEME = get_scheme("brats2023")
PLAIN = View(crosshair=False, letters=False, window=(0.0, 1.0), pixels=120)


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """RAS, 2 mm: one bright block at the patient's right, front, top; world coordinates as scanners give them."""
    image = np.zeros((20, 24, 16), dtype=np.float32)
    image[15:18, 19:22, 12:15] = 1.0
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-20, -24, -16)
    return image, affine


def volume(image: np.ndarray, affine: np.ndarray, name: str = "T1c") -> LoadedVolume:
    return LoadedVolume(image, affine, name=name)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def slice_pixels(picture) -> np.ndarray:
    return pixels(picture.png)[: picture.size[1]]


def bright_centre(picture) -> tuple[float, float]:
    """Mean position of the bright pixels, as shares of width and height."""
    rows, columns = np.nonzero(slice_pixels(picture)[..., 0] > 128)
    return float(columns.mean() / picture.size[0]), float(rows.mean() / picture.size[1])


@pytest.mark.parametrize(
    ("plane", "radiological", "left", "top"),
    [
        ("axial", True, True, True),  # patient's right on image left, front on top
        ("axial", False, False, True),
        ("coronal", True, True, True),
        ("coronal", False, False, True),
        ("sagittal", True, True, True),  # front on the left in both conventions
        ("sagittal", False, True, True),
    ],
)
def test_a_marker_at_the_right_front_top_lies_where_the_convention_says(plane, radiological, left, top) -> None:
    image = volume(*phantom())
    at = image.mm_of((16, 20, 13))
    view = View(radiological=radiological, crosshair=False, letters=False, window=(0.0, 1.0))
    x, y = bright_centre(slice_picture(image, plane, at, view=view))
    assert (x < 0.5) == left and (y < 0.5) == top


@pytest.mark.parametrize("code", ["RAS", "LPS", "LAS", "PIR", "SAL", "ARI"])
def test_how_a_file_stores_its_axes_changes_no_pixel(tmp_path: Path, code: str) -> None:
    array, affine = phantom()
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(code)))
    stored = nib.Nifti1Image(apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape))
    nib.save(stored, tmp_path / "stored.nii.gz")
    loaded = load_image(tmp_path / "stored.nii.gz", name="T1c")
    assert np.array_equal(loaded.array, array)
    assert np.allclose(loaded.affine, affine)
    at = (12.0, 16.0, 10.0)
    for plane in PLANES:
        expected = slice_picture(LoadedVolume(array, affine, loaded.window, "T1c"), plane, at)
        assert slice_picture(loaded, plane, at).png == expected.png


def test_letters_are_drawn_on_the_four_sides_and_swap_with_the_convention() -> None:
    image = volume(np.zeros((40, 40, 40), np.float32), np.eye(4))
    shown = {r: slice_pixels(slice_picture(image, "axial", (0, 0, 0), view=View(radiological=r, crosshair=False)))
             for r in (True, False)}  # fmt: skip
    high, wide, _ = shown[True].shape
    middle = slice(high // 2 - 20, high // 2 + 20)
    left, right = shown[True][middle, :30], shown[True][middle, -30:]
    assert left.max() > 200 and right.max() > 200
    assert shown[True][:30, wide // 2 - 20 : wide // 2 + 20].max() > 200
    assert shown[True][-30:, wide // 2 - 20 : wide // 2 + 20].max() > 200
    # the letter on the left of one convention is the letter on the right of the other
    assert np.count_nonzero(left > 128) == pytest.approx(np.count_nonzero(shown[False][middle, -30:] > 128), rel=0.1)
    assert not np.array_equal(left, shown[False][middle, :30])


def test_thick_slices_keep_their_millimetres() -> None:
    array = np.ones((40, 40, 10), dtype=np.float32)
    image = volume(array, np.diag([1.0, 1.0, 5.0, 1.0]))
    shown = tri_planar(image, image.centre, view=View(pixels=200))
    assert shown["axial"].size == (160, 160)  # 40 mm each way at 4 pixels a millimetre
    assert shown["coronal"].size == shown["sagittal"].size == (160, 200)  # 40 mm by 50 mm


def test_pixels_and_millimetres_are_each_others_inverse() -> None:
    array = np.zeros((20, 24, 16), dtype=np.float32)
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = (-10, 5, 7)
    for radiological in (True, False):
        for plane in PLANES:
            for voxel in ((0, 0, 0), (19, 23, 15), (4, 17, 9)):
                marked = array.copy()
                marked[voxel] = 1.0
                image = volume(marked, affine)
                view = View(radiological=radiological, crosshair=False, letters=False, window=(0.0, 1.0), pixels=480)
                picture = slice_picture(image, plane, image.mm_of(voxel), view=view)
                bright = slice_pixels(picture)[..., 0]
                y, x = np.unravel_index(bright.argmax(), bright.shape)
                assert image.voxel_of(picture.mm_at(x + 0.5, y + 0.5)) == voxel


def test_the_crosshair_points_at_its_position() -> None:
    image = volume(*phantom())
    picture = slice_picture(image, "axial", image.mm_of((4, 18, 13)), view=View(letters=False))
    yellow = np.abs(slice_pixels(picture) - (240, 228, 66)).sum(axis=2) < 30
    column = int(np.argmax(yellow.sum(axis=0)))
    row = int(np.argmax(yellow.sum(axis=1)))
    assert image.voxel_of(picture.mm_at(column + 0.5, row + 0.5))[:2] == (4, 18)
    assert picture.mm == image.mm_of((4, 18, 13))


def test_positions_outside_are_moved_to_the_nearest_slice() -> None:
    image = volume(*phantom())
    picture = slice_picture(image, "axial", (0, 0, 9999.0))
    assert (picture.index, picture.slices) == (15, 16)


def test_an_oblique_grid_is_named_by_the_nearest_direction_and_says_so() -> None:
    angle = np.radians(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = volume(np.ones((10, 10, 10), np.float32), affine)
    assert image.oblique == pytest.approx(20)
    assert "oblique grid, 20 degrees" in slice_picture(image, "coronal", (0, 0, 0)).alt
    assert "oblique" not in slice_picture(volume(*phantom()), "coronal", (0, 0, 0)).alt


def test_grey_values_are_interpolated_and_labels_are_not() -> None:
    array = np.zeros((2, 2, 2), dtype=np.float32)
    array[0] = 1e-3
    array[1] = 1.0
    picture = slice_picture(volume(array, np.eye(4)), "axial", (0, 0, 0), view=PLAIN)
    row = slice_pixels(picture)[60, :, 0]  # radiological: the bright side, patient's right, is on the left
    assert row[0] == 255 and row[-1] == 0 and len(np.unique(row)) > 20
    assert (np.diff(row) <= 0).all()

    labels = LoadedVolume(np.array([0, 3], np.uint8).repeat(4).reshape(2, 2, 2), np.eye(4))
    black = volume(np.zeros((2, 2, 2), np.float32), np.eye(4))
    tinted = slice_picture(black, "axial", (0, 0, 0), overlay=class_overlay(labels), view=PLAIN)
    colours = {tuple(c) for c in slice_pixels(tinted).reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), (0xE6 // 2, 0x9F // 2 + 1, 0)}  # half of the colour of ET, and nothing between


def test_outlines_leave_the_inside_alone_and_close_at_the_border() -> None:
    inside = np.zeros((20, 20, 20), np.uint8)
    inside[10:20, 5:15, :] = 2
    labels = LoadedVolume(inside, np.eye(4))
    black = volume(np.zeros((20, 20, 20), np.float32), np.eye(4))
    view = View(crosshair=False, letters=False, style="outline", opacity=1.0, pixels=200)
    drawn = slice_pixels(slice_picture(black, "axial", (0, 0, 10.0), overlay=class_overlay(labels), view=view))
    green = tuple(int(CLASS_PALETTE["ED"][i : i + 2], 16) for i in (1, 3, 5))
    outlined = (drawn == green).all(axis=2)
    assert outlined[100, 0] and outlined[100, 99] and not outlined[100, 50]
    assert outlined.sum() == 100 * 100 - 96 * 96


def test_shown_classes_and_regions_are_chosen() -> None:
    values = np.zeros((3, 1, 1), np.uint8)
    values[:, 0, 0] = (1, 2, 3)
    labels = LoadedVolume(values, np.eye(4))
    assert [layer.name for layer in class_overlay(labels, ["ET", "NCR"]).layers] == ["NCR", "ET"]
    nested = region_overlay(labels)
    assert [(layer.name, layer.values) for layer in nested.layers] == [("WT", (1, 2, 3)), ("TC", (1, 3)), ("ET", (3,))]
    with pytest.raises(SettingsError, match="oedema"):
        class_overlay(labels, ["oedema"])
    with pytest.raises(SettingsError, match="NCR"):
        region_overlay(labels, ["NCR"])


def test_differences_by_class_and_by_region() -> None:
    first, second = np.array([0, 1, 0, 2, 1, 3], np.uint8), np.array([0, 1, 2, 0, 2, 1], np.uint8)
    assert difference_map(first, second).tolist() == [0, 1, 3, 2, 4, 4]
    assert difference_map(first, second, members=(1, 3)).tolist() == [0, 1, 0, 0, 2, 1]  # tumour core


def test_a_difference_overlay_shows_differences_only_unless_asked() -> None:
    one = LoadedVolume(np.full((4, 4, 4), 1, np.uint8), np.eye(4), name="student")
    two = LoadedVolume(np.full((4, 4, 4), 1, np.uint8), np.eye(4), name="reference")
    black = volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
    alike = slice_picture(black, "axial", (0, 0, 0), overlay=difference_overlay(one, two), view=PLAIN)
    assert slice_pixels(alike).max() == 0
    asked = slice_picture(black, "axial", (0, 0, 0), overlay=difference_overlay(one, two, agreement=True), view=PLAIN)
    assert slice_pixels(asked).max() > 0
    names = [layer.name for layer in difference_overlay(one, two).layers]
    assert names == ["only student", "only reference", "both, another class"]
    with pytest.raises(GeometryError):
        difference_overlay(one, LoadedVolume(np.zeros((4, 4, 5), np.uint8), np.eye(4)))


def test_votes_disagree_by_their_entropy() -> None:
    answers = [[1, 1, 0, 0], [1, 2, 0, 3], [1, 3, 0, 3]]
    maps = [LoadedVolume(np.array(a, np.uint8).reshape(4, 1, 1), np.eye(4)) for a in answers]
    found = vote_entropy(maps)
    third = np.log(3)
    expected = [0, third, 0, third - 2 / 3 * np.log(2)]
    assert np.allclose(found.array.ravel(), expected, atol=1e-6)
    assert found.window == pytest.approx((0.0, third))
    with pytest.raises(SettingsError, match="two or more"):
        vote_entropy(maps[:1])
    with pytest.raises(GeometryError):
        vote_entropy([maps[0], LoadedVolume(np.zeros((4, 1, 2), np.uint8), np.eye(4))])


def test_nrrd_is_shown_as_the_same_nifti(tmp_path: Path) -> None:
    import SimpleITK

    array, affine = phantom()
    array = array + np.random.default_rng(0).random(array.shape, dtype=np.float32)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "a.nii")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "a.nii")), str(tmp_path / "a.nrrd"))
    nifti, nrrd = load_image(tmp_path / "a.nii"), load_image(tmp_path / "a.nrrd")
    assert np.allclose(nifti.array, nrrd.array) and np.allclose(nifti.affine, nrrd.affine, atol=1e-5)


def test_the_palette_is_that_of_the_reports_and_its_colours_differ() -> None:
    from fediod_med.reporting.style import CLASS_COLOURS

    assert CLASS_PALETTE == CLASS_COLOURS
    assert len(set(DIFFERENCE_PALETTE.values())) == 4 and not set(DIFFERENCE_PALETTE.values()) & set(
        CLASS_PALETTE.values()
    )


def test_a_label_map_of_another_grid_is_never_drawn() -> None:
    image = volume(*phantom())
    moved = image.affine.copy()
    moved[0, 3] += 2
    labels = LoadedVolume(np.zeros(image.shape, np.uint8), moved, name="student")
    with pytest.raises(GeometryError, match="student"):
        slice_picture(image, "axial", (0, 0, 0), overlay=class_overlay(labels))


def test_synthetic_is_burnt_into_the_pixels_and_said() -> None:
    image = volume(np.zeros((20, 20, 20), np.float32), np.eye(4), "volume 3")
    view = View(crosshair=False, letters=False, pixels=128)
    plain = slice_picture(image, "axial", (0, 0, 0), view=view)
    burnt = slice_picture(
        image, "axial", (0, 0, 0), view=View(crosshair=False, letters=False, pixels=128, synthetic=True)
    )
    assert slice_pixels(plain).max() == 0
    assert (slice_pixels(burnt) > 200).any(axis=2).sum() > 300
    assert burnt.alt.startswith("Synthetic axial slice of volume 3, no patient, sides have no names")
    lettered = slice_picture(image, "axial", (0, 0, 0), view=View(crosshair=False, pixels=128, synthetic=True))
    assert lettered.png == burnt.png  # mirrored volumes have no left and right


def test_every_picture_says_what_it_is_and_that_it_is_for_research() -> None:
    image = volume(*phantom())
    values = np.zeros(image.shape, np.uint8)
    values[0:5, 0:10, 13] = 2
    labels = LoadedVolume(values, image.affine)
    picture = slice_picture(image, "axial", image.mm_of((2, 2, 13)), overlay=class_overlay(labels))
    assert "Axial slice of T1c at L 16.0 P 20.0 S 10.0 mm" in picture.alt
    assert "ED 2.0 square cm" in picture.alt and "Not for clinical use" in picture.alt
    opened = Image.open(io.BytesIO(picture.png))
    assert opened.info["Disclaimer"] == "Research software. Not for clinical use."
    assert pixels(picture.png)[picture.size[1] :].max() > 150  # and in the strip below the slice
    assert place((-3.0, 0.0, -1.25)) == "L 3.0 A 0.0 I 1.2 mm"


def test_views_that_make_no_sense_are_refused() -> None:
    for options in ({"opacity": 1.5}, {"pixels": 1}, {"window": (1.0, 1.0)}, {"style": "dots"}):
        with pytest.raises(SettingsError):
            View(**options)
    with pytest.raises(SettingsError, match="plane"):
        slice_picture(volume(*phantom()), "top", (0, 0, 0))


def test_the_default_window_ignores_the_background_and_outliers(tmp_path: Path) -> None:
    array = np.zeros((20, 20, 20), np.float32)
    array[:10] = np.linspace(100, 200, 4000).reshape(10, 20, 20)
    array[0, 0, 0] = 1e6
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    low, high = load_image(tmp_path / "a.nii").window
    assert 100 <= low < 102 and 198 < high <= 200.1


def test_the_slice_of_the_largest_lesion_is_found() -> None:
    values = np.zeros((10, 12, 14), np.uint8)
    values[2:5, 3:6, 6] = 2
    values[2:9, 3:11, 9] = 3
    affine = np.diag([2.0, 3.0, 1.0, 1.0])
    labels = LoadedVolume(values, affine)
    assert focus_mm(labels) is not None and labels.voxel_of(focus_mm(labels))[2] == 9
    assert labels.voxel_of(focus_mm(labels, (2,)))[2] == 6
    assert focus_mm(labels, (1,)) is None


def test_the_cache_keeps_what_is_used_and_notices_a_new_file(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.nii")
        nib.save(nib.Nifti1Image(np.full((8, 8, 8), number + 1, np.float32), np.eye(4)), paths[-1])
    cache = VolumeCache(max_bytes=2 * 8**3 * 4)
    first = cache.image(paths[0])
    assert cache.image(paths[0]) is first
    cache.image(paths[1])
    cache.image(paths[0])
    cache.image(paths[2])  # drops 1, the least recently used
    assert cache.image(paths[0]) is first and cache.held_bytes == 2 * 8**3 * 4
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 9, np.float32), np.eye(4)), paths[0])
    os.utime(paths[0], ns=(1, 1))
    assert cache.image(paths[0]).array.max() == 9
    with pytest.raises(ValueError, match="read-only"):
        first.array[0, 0, 0] = 5
    with pytest.raises(InputError, match="could not read it"):
        cache.image(tmp_path / "none.nii")


def test_files_that_cannot_be_shown_are_named_without_their_folder(tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(InputError, match=r"^bad\.nii\.gz: expected NIfTI"):
        load_image(tmp_path / "bad.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 4), np.float32), np.eye(4)), tmp_path / "four.nii")
    assert image_channels(tmp_path / "four.nii") == {"T1c": 0, "T1": 1, "T2": 2, "FLAIR": 3}
    assert load_image(tmp_path / "four.nii", channel=2).shape == (4, 4, 4)
    with pytest.raises(InputError, match="channel"):
        load_image(tmp_path / "four.nii")
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), 7, np.uint8), np.eye(4)), tmp_path / "labels.nii")
    with pytest.raises(LabelError, match="found 7"):
        VolumeCache().classes(tmp_path / "labels.nii", SCHEME)
