"""Figures that show the right side of the patient, and tables that can be read."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fediod_med.errors import InputError
from fediod_med.evaluation import SubjectScore, summarise
from fediod_med.inference import Segmentation
from fediod_med.reporting.case import preview, write_preview
from fediod_med.reporting.charts import write_comparison, write_training_curves
from fediod_med.reporting.run import write_figures
from fediod_med.reporting.style import CLASS_COLOURS
from fediod_med.reporting.tables import results_markdown, results_table, row_name
from fediod_med.reporting.volumes import PanelRow, RoundRow, write_panel, write_rounds

RAS = np.diag([2.0, 2.0, 2.0, 1.0])


def scores(shift: float) -> list[SubjectScore]:
    return [
        SubjectScore(f"p{i}", "north" if i % 2 else "south", region, 0.3 + shift + 0.05 * i, 5.0, False)
        for i in range(4)
        for region in ("TC", "WT", "ET")
    ]


ROWS = {"site:north": summarise(scores(0)), "ensemble": summarise(scores(0.1)), "student": summarise(scores(0.2))}


def pixels(path: Path) -> np.ndarray:
    """RGB `(rows, columns, 3)` of a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=1)
        return np.asarray(image.convert("RGB")).astype(int)


def head_with_mark() -> tuple[np.ndarray, np.ndarray]:
    """A dark head in RAS axes; an ET mark in it at the patient's left, front and top."""
    image = np.zeros((40, 48, 36), dtype=np.float32)
    image[4:36, 4:44, 4:32] = 100
    classes = np.zeros(image.shape, dtype=np.uint8)
    classes[8:14, 32:40, 24:30] = 3
    return image, classes


def marks(path: Path) -> list[tuple[float, float, float, float]]:
    """Bounding box (left, right, top, bottom), in units of its black picture, of the ET tint in each plane."""
    rgb = pixels(path)
    rgb = rgb[: int(0.86 * len(rgb))]  # without the legend
    dark = (rgb.max(axis=2) < 3).any(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], dark.view(np.int8), [0]])))
    spans = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 200]
    boxes = []
    for left, right in spans:
        part = rgb[:, left:right]
        rows = np.flatnonzero((part.max(axis=2) < 3).mean(axis=1) > 0.1)
        picture = part[rows[0] : rows[-1] + 1]
        tint = (picture[..., 0] - picture[..., 2] > 40) & (picture[..., 1] - picture[..., 2] > 20)
        across, down = np.flatnonzero(tint.any(axis=0)), np.flatnonzero(tint.any(axis=1))
        width, height = picture.shape[1], picture.shape[0]
        boxes.append((across[0] / width, across[-1] / width, down[0] / height, down[-1] / height))
    return boxes


def test_the_patients_left_is_on_the_right_of_the_picture(tmp_path: Path) -> None:
    image, classes = head_with_mark()
    # RAS: the first index grows towards the patient's right, so the mark at low indices lies left.
    path = write_preview(tmp_path / "p.png", {"T1c": image}, classes, RAS)
    axial, coronal, sagittal = marks(path)
    assert axial[0] > 0.5
    assert axial[3] < 0.5  # anterior is up
    assert coronal[0] > 0.5
    assert coronal[3] < 0.5  # superior is up
    assert sagittal[1] < 0.5  # the nose points left
    assert sagittal[3] < 0.5


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(0,), (0, 1), (0, 1, 2)])
def test_storage_order_of_the_voxels_does_not_change_the_picture(
    tmp_path: Path, axes: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    image, classes = head_with_mark()
    affine = RAS.copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (image.shape[axis] - 1)
        affine[:3, axis] *= -1
    turned = affine[:, [*axes, 3]]
    stored = [np.flip(a, flips).transpose(axes) for a in (image, classes)]
    one = write_preview(tmp_path / "a.png", {"T1c": image}, classes, RAS)
    two = write_preview(tmp_path / "b.png", {"T1c": stored[0]}, stored[1], turned)
    assert np.array_equal(pixels(one), pixels(two))


def test_anisotropic_voxels_keep_their_true_proportions(tmp_path: Path) -> None:
    image = np.zeros((60, 60, 20), dtype=np.float32)  # 60 x 60 x 60 mm in 1 x 1 x 3 mm voxels
    image[5:55, 5:55, 2:18] = 50
    classes = np.zeros(image.shape, dtype=np.uint8)
    classes[18:42, 18:42, 6:14] = 3  # a cube of 24 mm
    path = write_preview(tmp_path / "p.png", {"FLAIR": image}, classes, np.diag([1.0, 1.0, 3.0, 1.0]))
    rgb = pixels(path)
    tint = (rgb[..., 0] - rgb[..., 2] > 40) & (rgb[..., 1] - rgb[..., 2] > 20)
    tint[int(0.85 * len(tint)) :] = False  # the legend
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tint.any(axis=0).view(np.int8), [0]])))
    for left, right in zip(edges[::2], edges[1::2], strict=True):
        height = np.count_nonzero(tint[:, left:right].any(axis=1))
        assert (right - left) / height == pytest.approx(1, abs=0.03)


def test_a_preview_without_tumour_or_brain_is_drawn(tmp_path: Path) -> None:
    image, classes = head_with_mark()
    write_preview(tmp_path / "a.png", {"T1c": image}, np.zeros_like(classes), RAS)
    path = write_preview(tmp_path / "b.png", {"T1c": np.zeros_like(image)}, np.zeros_like(classes), RAS)
    assert pixels(path).shape[1] == 1650


def test_a_case_preview_needs_the_scan(tmp_path: Path) -> None:
    image, classes = head_with_mark()
    case = Segmentation(
        subject_id="x",
        classes=classes,
        volumes_ml={"TC": 1.0, "WT": 2.0, "ET": 0.5},
        affine=RAS,
        reference=Path("x.nii.gz"),
        seconds=0.1,
        image=np.stack([image] * 4),
    )
    plain = pixels(preview(tmp_path / "a.png", case))
    marked = pixels(preview(tmp_path / "b.png", case, banner="NOT PRIVATE: north"))
    assert not np.array_equal(plain[-60:], marked[-60:])  # the banner stands in the footer
    assert np.array_equal(plain[:-60], marked[:-60])
    bare = Segmentation("x", classes, {}, RAS, Path("x.nii.gz"), 0.1)
    with pytest.raises(InputError, match="preview"):
        preview(tmp_path / "c.png", bare)


def test_images_of_another_grid_are_refused(tmp_path: Path) -> None:
    image, classes = head_with_mark()
    with pytest.raises(InputError, match="shape"):
        write_preview(tmp_path / "p.png", {"T1c": image[1:]}, classes, RAS)
    with pytest.raises(InputError, match="label map"):
        write_panel(tmp_path / "p.png", [PanelRow("real", np.stack([image] * 4), classes[1:])])
    with pytest.raises(InputError, match="4, X, Y, Z"):
        write_panel(tmp_path / "p.png", [PanelRow("real", image)])
    with pytest.raises(InputError, match="row"):
        write_panel(tmp_path / "p.png", [])


def test_panel_shows_overlays_only_in_rows_that_have_one(tmp_path: Path) -> None:
    image, classes = head_with_mark()
    volume = np.stack([image] * 4)
    path = write_panel(tmp_path / "p.png", [PanelRow("synthetic", volume), PanelRow("student", volume, classes)])
    rgb = pixels(path)
    tint = ((rgb[..., 0] - rgb[..., 2] > 40) & (rgb[..., 1] - rgb[..., 2] > 20)).sum(axis=1)
    rows = np.flatnonzero(tint)
    legend = int(0.86 * len(rgb))
    assert len(rows[rows < legend])
    assert rows.min() > 0.45 * len(rgb)


def round_row(number: int, change: float) -> RoundRow:
    image, classes = head_with_mark()
    phantom = np.stack([np.where(image > 0, 1.0, 0.0)] * 4)
    synthetic = phantom.copy()
    synthetic[3, 10:30, 10:30] += change
    return RoundRow(number, phantom, synthetic, classes, classes, RAS)


def test_rounds_show_where_a_volume_left_its_phantom(tmp_path: Path) -> None:
    """A FLAIR that became darker is blue in the change of FLAIR, brighter red, and T1c stays without colour."""
    colours = []
    for change in (-0.4, 0.4):
        rgb = pixels(write_rounds(tmp_path / "rounds.png", [round_row(3, change)], banner="NOT PRIVATE"))
        columns = rgb[:, : int(0.93 * rgb.shape[1])]  # without the colour bar
        blue = (columns[..., 2] - columns[..., 0] > 50) & (columns[..., 2] - columns[..., 1] > 20)
        red = (columns[..., 0] - columns[..., 2] > 50) & (columns[..., 0] - columns[..., 1] > 80)
        colours.append([int(part[: int(0.8 * len(part))].sum()) for part in (blue, red)])
        half = columns.shape[1] // 2
        assert max(int(part[: int(0.8 * len(part)), :half].sum()) for part in (blue, red)) < 0.02 * max(colours[-1])
    (darker_blue, darker_red), (brighter_blue, brighter_red) = colours
    assert darker_blue > 2000 > darker_red and brighter_red > 2000 > brighter_blue


def test_rounds_describe_themselves_in_words(tmp_path: Path) -> None:
    path = write_rounds(tmp_path / "rounds.png", [round_row(1, 0.0), round_row(30, 0.25)], banner="NOT PRIVATE")
    with Image.open(path) as image:
        words = image.info["Description"]
        assert image.height > image.width * 0.35
    assert "rounds 1, 30" in words and "0.25 z-scores" in words and "Not for clinical use" in words


def test_rounds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one round"):
        write_rounds(tmp_path / "rounds.png", [], banner="")
    row = round_row(4, 0.1)
    with pytest.raises(InputError, match="round 4: expected phantom"):
        write_rounds(tmp_path / "rounds.png", [replace(row, ensemble=row.ensemble[1:])], banner="")


def test_training_curves_accept_gaps_negative_values_and_words(tmp_path: Path) -> None:
    records = [
        {"round": i, "student": 10.0 ** -(i / 4), "adversarial": (-1) ** i, "nan": float("nan"), "site": "x"}
        for i in range(20)
    ]
    records[3]["student"] = float("inf")
    path = write_training_curves(tmp_path / "c.png", records, title="Losses")
    assert pixels(path).std() > 10
    write_training_curves(tmp_path / "one.png", [{"loss": 1.0}])
    with pytest.raises(InputError, match="numbers"):
        write_training_curves(tmp_path / "none.png", [{"round": 1, "site": "x"}])


def test_comparison_draws_longer_bars_for_better_rows(tmp_path: Path) -> None:
    path = write_comparison(tmp_path / "c.png", ROWS, highlight=("student",), note="4 phantoms")
    rgb = pixels(path)
    accent = np.abs(rgb - [0xD5, 0x5E, 0x00]).max(axis=2) < 3
    neutral = np.abs(rgb - [0x7A, 0x87, 0x94]).max(axis=2) < 3
    assert accent.sum() > 0.8 * neutral.sum() * ROWS["student"]["mean"] / (
        ROWS["ensemble"]["mean"] + ROWS["site:north"]["mean"]
    )
    with pytest.raises(InputError, match="row"):
        write_comparison(tmp_path / "none.png", {})


def test_class_colours_differ_in_lightness_and_blue() -> None:
    """Deuteranopes lose red against green; lightness or blue must tell any two classes apart."""
    rgb = {name: np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for name, colour in CLASS_COLOURS.items()}
    for one in rgb:
        for two in set(rgb) - {one}:
            light = abs(np.dot(rgb[one] - rgb[two], [0.2126, 0.7152, 0.0722]))
            assert max(light, abs(int(rgb[one][2]) - int(rgb[two][2]))) > 30


def test_tables_hold_every_row_with_its_numbers() -> None:
    console = Console(width=160, record=True, file=StringIO())
    console.print(results_table({"rows": ROWS}))
    text, markdown = console.export_text(), results_markdown({"rows": ROWS})
    for key, row in ROWS.items():
        for table in (text, markdown):
            (line,) = [part for part in table.splitlines() if row_name(key) in part]
            assert f"{row['mean']:.3f}" in line
    assert "Not for clinical use" in text
    assert "373.13 mm" in markdown
    columns = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert columns == {9}


def test_rows_have_readable_names() -> None:
    assert row_name("site:tcia-hgg") == "hospital tcia-hgg"
    assert row_name("kd_phantoms") == "distilled on phantoms"
    assert row_name("something else") == "something else"


def test_run_figures_are_written_even_before_the_first_round(tmp_path: Path) -> None:
    image, classes = head_with_mark()
    volume = np.stack([image] * 4)
    panel = [PanelRow("real", volume, affine=RAS), PanelRow("student", volume, classes, RAS)]
    summary = {"rows": ROWS, "data": "phantoms"}
    history = [{"round": 0, "transfer": 1.0}, {"round": 1, "transfer": 0.5}]
    paths = write_figures(tmp_path / "a", summary=summary, history=history, panel=panel, banner="NOT PRIVATE")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"comparison.png", "curves.png", "panel.png"}
    assert set(paths) == {"comparison", "curves", "panel"}
    assert set(write_figures(tmp_path / "b", summary=summary, history=[], panel=panel)) == {"comparison", "panel"}


def test_the_notice_is_not_printed_twice(tmp_path: Path) -> None:
    notice = "Research software. Not for clinical use."
    plain = write_comparison(tmp_path / "a.png", ROWS, banner="")
    same = write_comparison(tmp_path / "b.png", ROWS, banner=notice)
    assert np.array_equal(pixels(plain), pixels(same))
