"""What the interactive viewer is sent: the same grey values, overlay and place as the slices, cropped and bounded."""

from __future__ import annotations

import gzip
import hashlib
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fediod_med.errors import GeometryError
from fediod_med.review import interactive
from fediod_med.review.interactive import Cut, PartCache, cut_of, message, unpacked
from fediod_med.review.overlays import difference_overlay, region_overlay
from fediod_med.review.slices import View, windowed
from fediod_med.review.volumes import LoadedVolume

AFFINE = np.array([[2.0, 0, 0, -20], [0, 3, 0, 10], [0, 0, 4, 5], [0, 0, 0, 1]])
SHAPE = (12, 14, 10)
FRONTEND = Path(interactive.__file__).parent / "frontend"


def image() -> LoadedVolume:
    grey = np.zeros(SHAPE, np.float32)
    grey[4:9, 5:11, 3:8] = np.arange(150, dtype=np.float32).reshape(5, 6, 5) + 1
    return LoadedVolume(grey, AFFINE, (1.0, 150.0), "case T1c")


def labels(shift: int = 0) -> LoadedVolume:
    classes = np.zeros(SHAPE, np.uint8)
    classes[5:8, 6 + shift : 9 + shift, 4:7] = 2
    classes[6, 7 + shift, 5] = 3
    return LoadedVolume(classes, AFFINE, (0.0, 3.0), f"m{shift}")


def read(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    found = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    return np.asarray(found.dataobj), found.affine


def test_the_image_is_windowed_as_in_the_slices_and_lies_where_it_lay() -> None:
    volume, view = image(), View(window=(20.0, 120.0))
    cut = cut_of(volume)
    assert (cut.start, cut.step, cut.shape) == ((2, 3, 1), 1, (9, 10, 9))
    header, grey, mask = unpacked(message(volume, cut, (6, 8, 5), overlay=None, view=view, cache=PartCache()))
    array, affine = read(grey)
    assert array.dtype == np.uint8 and np.array_equal(array, windowed(volume.array, (20.0, 120.0))[cut.slices])
    assert affine == pytest.approx(np.array(header["affine"])) and mask == b""
    assert header["voxel"] == [4, 5, 4] and header["crosshair"]
    assert affine @ (*header["voxel"], 1) == pytest.approx([*volume.mm_of((6.0, 8.0, 5.0)), 1.0])
    assert "Not for clinical use" in header["notice"] and header["alt"].startswith("Axial, coronal and sagittal slices")


def test_labels_are_the_layers_that_the_slices_show() -> None:
    volume, cut = image(), cut_of(image())
    regions = region_overlay(labels(), ("WT", "ET"))
    header, _, mask = unpacked(message(volume, cut, (0, 0, 0), overlay=regions, view=View(), cache=PartCache()))
    array, _ = read(mask)
    whole = np.zeros(SHAPE, np.uint8)
    whole[cut.slices] = array
    assert np.array_equal(whole, np.where(labels().array == 3, 2, labels().array // 2))
    assert [colour["name"] for colour in header["colours"]] == ["WT", "ET"]
    assert not header["crosshair"]  # the place lies outside the part that is sent

    other = difference_overlay(labels(), labels(1), agreement=True)
    header, _, mask = unpacked(message(volume, cut, (6, 8, 5), overlay=other, view=View(), cache=PartCache()))
    drawn = np.stack([other.drawn(2, k) for k in range(SHAPE[2])], axis=2)
    array, _ = read(mask)
    assert np.array_equal(array, drawn[cut.slices]) and len(header["colours"]) == 4


def test_large_images_are_thinned_and_places_return(rng: np.random.Generator) -> None:
    volume = LoadedVolume(rng.random((50, 40, 30)).astype(np.float32) + 1, AFFINE, (1.0, 2.0))
    cut = cut_of(volume, most=9000)
    assert cut.step == 2 and np.prod(cut.shape) <= 9000
    assert volume.array[cut.slices].shape == cut.shape
    for _ in range(50):
        voxel = tuple(int(v) for v in rng.integers(0, volume.shape))
        back = cut.whole(cut.sent(voxel))
        assert max(abs(a - b) for a, b in zip(voxel, back, strict=True)) <= cut.step
    place = cut.affine(volume) @ (*cut.sent((10, 20, 6)), 1)
    assert place[:3] == pytest.approx(volume.mm_of((10.0, 20.0, 6.0)))
    assert Cut((0, 0, 0), 1, (3, 3, 3)).whole((9, -1, 1)) == (2, 0, 1)


def test_parts_are_named_by_content_and_packed_once() -> None:
    volume, cut, cache = image(), cut_of(image()), PartCache()
    overlay = region_overlay(labels())
    first = message(volume, cut, (6, 8, 5), overlay=overlay, view=View(opacity=0.2), cache=cache)
    second = message(volume, cut, (5, 8, 5), overlay=overlay, view=View(opacity=0.9), cache=cache)
    one, two = unpacked(first), unpacked(second)
    assert one[0]["image"] == two[0]["image"] and one[1] is not None and one[1:] == two[1:]
    assert (one[0]["opacity"], two[0]["opacity"]) == (0.2, 0.9)
    made = []
    cache = PartCache(parts=1)
    for array in (volume.array, volume.array, volume.array.copy(), volume.array):
        cache.get((array,), ("x",), lambda: made.append(1) or b"")  # type: ignore[func-returns-value]
    assert len(made) == 3


def test_an_overlay_of_another_grid_is_refused() -> None:
    elsewhere = LoadedVolume(labels().array, AFFINE + np.eye(4)[[3, 1, 2, 0]] * 5, (0.0, 3.0))
    with pytest.raises(GeometryError):
        message(image(), cut_of(image()), (0, 0, 0), overlay=region_overlay(elsewhere), view=View(), cache=PartCache())


def test_the_browser_parts_lie_in_the_package_with_their_licences() -> None:
    """What Streamlit looks for, that nothing is loaded from elsewhere, and that the library is the published one."""
    declared = tomllib.loads((FRONTEND.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    parts = declared["tool"]["streamlit"]["component"]["components"]
    assert {part["name"]: (FRONTEND.parent.parent / part["asset_dir"]).resolve() for part in parts} == {
        "viewer": FRONTEND.resolve(),
        "clicks": FRONTEND.resolve(),
    }
    told = (FRONTEND / "THIRD_PARTY.txt").read_text(encoding="utf-8")
    assert hashlib.sha256((FRONTEND / "niivue.js").read_bytes()).hexdigest() in told and "BSD 2-Clause" in told
    for name in ("viewer.js", "clicks.js", "viewer.css"):
        assert "http" not in (FRONTEND / name).read_text(encoding="utf-8")


def test_the_wheel_carries_the_browser_parts() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling, which builds the package")
    builder = wheel.WheelBuilder(str(FRONTEND.parent.parent.parent))
    carried = {file.distribution_path for file in builder.recurse_included_files()}
    names = ("viewer.js", "viewer.css", "clicks.js", "niivue.js", "THIRD_PARTY.txt")
    assert {f"fediod_med/review/frontend/{name}" for name in names} | {"fediod_med/pyproject.toml"} <= carried
