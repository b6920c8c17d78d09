"""What the app's pages are made of: settings and the server's command, uploads, tables, what is drawn where."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from app_demo import write_app_demo  # type: ignore[import-not-found]
from typer.testing import CliRunner

from fediod_med.errors import InputError, SettingsError
from fediod_med.metrics import region_scores
from fediod_med.review.case_folder import read_cases
from fediod_med.review.events import Event
from fediod_med.review.rating import agreement_rows, in_words, next_region, open_comparisons
from fediod_med.review.roots import Roots
from fediod_med.review.run_folder import read_run
from fediod_med.review.settings import app_script, parse_arguments, review_settings, server_command
from fediod_med.review.synthetic_folder import missing_words, nearest_of, quality_rows
from fediod_med.review.tables import dice_rows, progress_rows, site_rows, volume_rows
from fediod_med.review.uploads import MAX_FILE_BYTES, guess_sequence, keep_uploads
from fediod_med.review.viewing import (
    case_images,
    case_maps,
    dice_of,
    fitting,
    overlay_of,
    point_of,
    slices_at,
    start_point,
    synthetic_disagreement,
    synthetic_image,
    synthetic_maps,
    synthetic_phantom,
    volumes_of,
)
from fediod_med.review.volumes import LoadedVolume, VolumeCache

FILES = {"T1c": ("John_Doe_t1c.nii.gz", b"1"), "T1": ("a.nii", b"2"), "T2": ("b.nrrd", b"3"), "FLAIR": ("c.mha", b"4")}


def labels(array: np.ndarray, spacing: float = 2.0) -> LoadedVolume:
    return LoadedVolume(array.astype(np.uint8), np.diag([spacing, spacing, spacing, 1.0]), name="m")


def test_the_server_listens_here_only_and_tells_nobody(tmp_path: Path) -> None:
    settings = review_settings([tmp_path], reviews=tmp_path / "r.sqlite", work=tmp_path / "w")
    command = server_command(settings, port=8600)
    for flag in (
        "--server.address=127.0.0.1",
        "--server.headless=true",
        "--server.fileWatcherType=none",
        "--browser.gatherUsageStats=false",
        "--client.showErrorDetails=none",
        "--server.maxUploadSize=64",
    ):
        assert flag in command
    assert parse_arguments(command[command.index("--") + 1 :]) == settings
    assert command[command.index("run") + 1] == str(app_script()) and app_script().is_file()


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["runs"], ["--server.address=0.0.0.0"]])
def test_other_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SettingsError, match="--root DIR"):
        parse_arguments(arguments)


@pytest.mark.parametrize("port", [80, 0, 70000])
def test_odd_ports_are_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(SettingsError, match="1024"):
        server_command(review_settings([tmp_path]), port=port)


def test_the_work_folder_never_lies_in_a_run(tmp_path: Path) -> None:
    root = write_app_demo(tmp_path)
    inside = review_settings([root], work=root / "run" / "new" / "w")
    with pytest.raises(SettingsError, match="outside runs"):
        inside.open_roots()
    assert not (root / "run" / "new").exists()
    opened = review_settings([root / "run"], work=tmp_path / "w").open_roots()
    assert opened.folders == (root / "run", tmp_path / "w") and (tmp_path / "w").is_dir()


def test_the_command_line_offers_no_other_address(tmp_path: Path) -> None:
    import typer

    from fediod_med.cli.review import review

    app = typer.Typer()
    app.command()(review)
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "--port" in told and "--host" not in told and "--address" not in told and "remote" not in told
    missing = CliRunner().invoke(app, ["--root", str(tmp_path / "absent"), "--work", str(tmp_path / "w")])
    assert isinstance(missing.exception, SettingsError)


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("BraTS-GLI-00001-000-t1c.nii.gz", "T1c"),
        ("Brats18_X_1_t1ce.nii.gz", "T1c"),
        ("x-t1n.nii.gz", "T1"),
        ("x_t1.nii.gz", "T1"),
        ("x-t2w.nii.gz", "T2"),
        ("x_t2.nii", "T2"),
        ("x-t2f.nii.gz", "FLAIR"),
        ("sub-1_FLAIR.nii.gz", "FLAIR"),
        ("scan.nii.gz", None),
    ],
)
def test_sequences_are_guessed_from_names(name: str, sequence: str | None) -> None:
    assert guess_sequence(name) == sequence


def test_uploads_lose_their_names(tmp_path: Path) -> None:
    paths = keep_uploads(FILES, code="case-1", work=tmp_path)
    names = [path.name for path in paths.values()]
    assert names == ["case-1-t1c.nii.gz", "case-1-t1n.nii", "case-1-t2w.nrrd", "case-1-t2f.mha"]
    assert [path.read_bytes() for path in paths.values()] == [b"1", b"2", b"3", b"4"]
    assert not any("Doe" in path.name for path in tmp_path.rglob("*"))
    with pytest.raises(SettingsError, match="in use"):
        keep_uploads(FILES, code="case-1", work=tmp_path)


@pytest.mark.parametrize("code", ["", "../x", "a/b", ".hidden", "x" * 65, "a..", "a b"])
def test_codes_that_lead_elsewhere_are_refused(tmp_path: Path, code: str) -> None:
    with pytest.raises(SettingsError, match="code"):
        keep_uploads(FILES, code=code, work=tmp_path)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "bad", [("a.exe", b"1"), ("a.nii.gz", b""), ("a.nii.gz", bytes(MAX_FILE_BYTES + 1)), ("a.gz", b"1")]
)
def test_uploads_are_bounded(tmp_path: Path, bad: tuple[str, bytes]) -> None:
    with pytest.raises(InputError, match="T2"):
        keep_uploads({**FILES, "T2": bad}, code="c", work=tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_tables_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_app_demo(tmp_path) / "run")
    assert [row["model"] for row in dice_rows(run)] == ["teacher north", "teachers' ensemble", "student"]
    assert dice_rows(run)[2]["95 % low"] == pytest.approx(0.6)
    assert {row["hospital"] for row in site_rows(run)} == {"north", "south"} and len(site_rows(run)) == 6
    assert [row["value"] for row in progress_rows(run) if row["quantity"].startswith("student")] == pytest.approx(
        [0.1, 0.2, 0.3]
    )
    assert volume_rows({"WT": 5.0}, {"WT": 4.0}) == [
        {"region": "WT", "ml": 5.0, "reference ml": 4.0, "difference ml": 1.0}
    ]


def test_a_case_and_a_synthetic_volume_are_ready_to_draw(tmp_path: Path) -> None:
    root = write_app_demo(tmp_path)
    roots = Roots([root])
    folder = read_cases(root / "model", roots, models={"other": root / "other"})
    case, cache = folder.cases["case-a"], VolumeCache()
    maps = case_maps(case, cache)
    assert list(maps) == ["model", "other", "reference"]
    image = case_images(case, cache, "FLAIR")
    assert fitting(image, maps) == (maps, ())
    assert fitting(image, {"odd": labels(np.ones((3, 3, 3)))}) == ({}, ("odd",))
    start = start_point(image, maps)
    assert maps["model"].array[image.voxel_of(start)] > 0
    assert slices_at(image, point_of(image, slices_at(image, start))) == slices_at(image, start)
    with pytest.raises(SettingsError, match="sequence"):
        case_images(case, cache, "DWI")
    first, last = (read_run(root / "run").synthetic or ())[::2]
    assert list(synthetic_maps(last, cache)) == ["made from", "teacher north", "teacher south"]
    assert list(synthetic_maps(first, cache)) == ["made from", "teacher north", "teacher south", "ensemble", "student"]
    assert synthetic_image(last, cache, "T2").array.max() > 0
    assert synthetic_phantom(first, cache, "T2").array.max() == 100
    with pytest.raises(InputError, match="no phantom"):
        synthetic_phantom(last, cache, "T2")


def test_disagreement_is_computed_once_until_an_answer_changes(tmp_path: Path) -> None:
    volume, cache = (read_run(write_app_demo(tmp_path) / "run").synthetic or ())[0], VolumeCache()
    first = synthetic_disagreement(volume, cache)
    assert first is not None and first.array.max() == pytest.approx(np.log(2)) and first.array.min() == 0
    assert synthetic_disagreement(volume, cache) is first
    shutil.copy(volume.answers["north"], volume.answers["south"])
    alike = synthetic_disagreement(volume, cache)
    assert alike is not None and alike.array.max() == 0
    assert synthetic_disagreement(replace(volume, answers={}), cache) is None


def test_quality_rows_tell_numbers_and_reasons(tmp_path: Path) -> None:
    run = read_run(write_app_demo(tmp_path) / "run")
    assert run.synthetic is not None and run.synthetic_quality is not None
    rows = [(row["against"], row["measure"], row["value"]) for row in quality_rows(run.synthetic_quality)]
    assert rows == [
        ("24 public phantoms", "kid value", 0.012),
        ("24 public phantoms", "kid low", 0.01),
        ("24 public phantoms", "precision", 0.75),
        ("scans of north", "all", None),
        ("scans of south", "kid", 0.02),
    ]
    assert "releases nothing" in quality_rows(run.synthetic_quality)[3]["note"]
    assert [row["value"] for row in nearest_of(run.synthetic_quality, run.synthetic[0])] == [3.5]
    assert nearest_of(run.synthetic_quality, run.synthetic[1]) == nearest_of(None, run.synthetic[0]) == []
    assert quality_rows({"per_site": "not measured"})[0]["note"] == "not measured"
    by_site = [row for row in progress_rows(run) if row["quantity"] == "realism (critics) by hospital"]
    assert [(row["hospital"], row["value"]) for row in by_site[:2]] == [("north", 0.1), ("south", 0.3)]


def test_what_was_not_kept_is_said(tmp_path: Path) -> None:
    root = write_app_demo(tmp_path)
    kept, last = (read_run(root / "run").synthetic or ())[:2]
    assert missing_words(kept, [2, None]) == []
    assert "student" in missing_words(last, [2, None])[0] and "hospitals" not in missing_words(last, [2, None])[0]
    assert missing_words(kept, [None])[0].startswith("The run kept no volume of a round")
    (root / "run" / "synthetic" / "quality.json").unlink()
    run = read_run(root / "run")
    assert run.synthetic_quality is None and "did not measure" in run.why("synthetic_quality")


def test_overlays_follow_the_choice() -> None:
    one, two = labels(np.full((2, 2, 2), 3)), labels(np.full((2, 2, 2), 2))
    maps = {"a": one, "b": two}
    assert overlay_of(maps, None, shown=("WT",)) is None and overlay_of(maps, "a", shown=()) is None
    regions, classes = overlay_of(maps, "a", shown=("WT", "ET")), overlay_of(maps, "a", shown=("NCR", "ET"))
    assert regions is not None and [layer.name for layer in regions.layers] == ["WT", "ET"]
    assert classes is not None and [layer.name for layer in classes.layers] == ["NCR", "ET"]
    difference = overlay_of(maps, "a", against="b", shown=("WT",))
    assert difference is not None and (difference.drawn(2, 0) == 1).all()  # both see whole tumour
    by_class = overlay_of(maps, "a", against="b", shown=("WT", "ET"))
    assert by_class is not None and (by_class.drawn(2, 0) == 4).all()
    with pytest.raises(SettingsError, match="expected one of a, b"):
        overlay_of(maps, "c", shown=("WT",))


def test_volumes_and_dice_agree_with_the_evaluation(rng: np.random.Generator) -> None:
    one, two = rng.integers(0, 4, (5, 6, 7)), rng.integers(0, 4, (5, 6, 7))
    volumes = volumes_of(labels(one))
    assert volumes["WT"] == pytest.approx((one > 0).sum() * 0.008)
    assert volumes["TC"] == pytest.approx(volumes["NCR"] + volumes["ET"])
    scores = region_scores(one, two, (2.0, 2.0, 2.0))
    assert dice_of(labels(one), labels(two)) == pytest.approx({r: s["dice"] for r, s in scores.items()})
    empty = labels(np.zeros((2, 2, 2)))
    assert dice_of(empty, empty) == {"TC": 1.0, "WT": 1.0, "ET": 1.0}


def event(number: int, kind: str = "review", **more: object) -> Event:
    told = {"reviewer": "r1", "run": "x", "case": "c", "arm": "model", "verdict": "accept", **more}
    if kind != "review":
        told |= {"arm": "", "verdict": ""}
    return Event(
        sequence=number, event_id=str(number), submission=f"s{number}", kind=kind, time="2026-01-02T03:04:05", **told
    )


def test_comparisons_stay_open_until_they_are_revealed() -> None:
    events = [event(0, "assignment"), event(1), event(2, "assignment", case="d"), event(3, "reveal")]
    assert open_comparisons(events) == (("r1", "x", "d"),)


def test_ratings_go_from_region_to_region() -> None:
    assert next_region({}) == "WT" and next_region({"WT": 4}) == "TC"
    assert next_region({"WT": 4, "TC": 1, "ET": 2}) is None
    assert in_words(event(0, rating_wt=4, tags=("artefact",))) == "Accept (WT 4; artefact), 2026-01-02 03:04 UTC"


def test_agreement_needs_two_reviewers() -> None:
    reviews = [event(n, reviewer="r1", case=str(n), rating_wt=1 + n % 4) for n in range(6)]
    assert agreement_rows(reviews) == []
    second = [event(9 + n, reviewer="r2", case=str(n), rating_wt=1 + n % 4) for n in range(6)]
    rows = {(row["of"], row["measure"]): row for row in agreement_rows([*reviews, *second])}
    assert rows["WT", "Krippendorff's alpha"]["value"] == 1.0 and rows["WT", "weighted kappa"]["value"] == 1.0
    assert rows["verdict", "weighted kappa"]["value"] is None  # all alike: not defined
    assert ("TC", "weighted kappa") not in rows
