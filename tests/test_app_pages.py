"""Every page of the review app, run by Streamlit's own test driver: what it shows, and what it keeps."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from app_demo import write_app_demo  # type: ignore[import-not-found]

from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.review.events import Review
from fediod_med.review.exchange import export_json
from fediod_med.review.store import ReviewStore

pytest.importorskip("streamlit", reason="the review app needs streamlit: pip install 'fediod-med[app]'")

SCRIPT = Path(__file__).resolve().parent.parent / "apps" / "review.py"
pytestmark = pytest.mark.filterwarnings("ignore")  # of streamlit and altair, which this package does not fix


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_app_demo(tmp_path / "demo")
    arguments = ["--root", str(root), "--reviews", str(tmp_path / "r.sqlite"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["review.py", *arguments])
    return root


def opened(page: str | None = None, **query: str) -> Any:
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(str(SCRIPT), default_timeout=60)
    app.run()
    for name, value in query.items():
        app.session_state[name] = value
    if page is not None:
        app.switch_page(f"review_pages/{page}.py")
        app.run()
    assert not app.exception, app.exception
    return app


def html_of(app: Any) -> str:
    return " ".join(str(element.proto.body) for element in app.get("html"))


def button(app: Any, label: str) -> Any:
    return next(found for found in app.button if found.label == label)


@pytest.mark.parametrize(
    ("page", "title"),
    [
        (None, "Overview"),
        ("synthetic", "Synthetic volumes"),
        ("cases", "Cases"),
        ("rating", "Review"),
        ("promises", "Privacy"),
    ],
)
def test_every_page_keeps_both_banners(demo: Path, page: str | None, title: str) -> None:
    app = opened(page)
    assert [found.value for found in app.title] == [title] and not app.error
    assert NOT_FOR_CLINICAL_USE in html_of(app) and "NOT PRIVATE" in html_of(app)


def test_overview_tells_promises_and_dice(demo: Path) -> None:
    app = opened()
    promises, dice = (found.value for found in app.dataframe[:2])
    assert dict(app.table[0].value.to_numpy())["run"] == "demo1"
    assert list(promises["promise"]) == ["private", "NOT PRIVATE"] and promises["epsilon (RDP)"][0] == 7.9
    assert list(dice["model"]) == ["teacher north", "teachers' ensemble", "student"] and dice["Dice WT"][2] == 0.7


def test_a_synthetic_volume_is_turned_slice_by_slice(demo: Path) -> None:
    app = opened("synthetic")
    slider = next(found for found in app.slider if found.label == "Axial slice")
    assert (slider.min, slider.max) == (0, 15)
    before = [image.proto.imgs[0].url for image in app.get("image")]
    assert len(before) == 3 and not any("radiological" in text for text in [html_of(app)])
    slider.set_value(3).run()
    after = [image.proto.imgs[0].url for image in app.get("image")]
    assert not app.exception and before[0] != after[0]
    assert any("hospitals" in metric.label for metric in app.metric)


def test_a_synthetic_volume_of_a_round_stands_beside_its_phantom(demo: Path) -> None:
    app = opened("synthetic")
    assert next(found for found in app.selectbox if found.label == "Round").value == "round 2"
    overlay = next(found for found in app.selectbox if found.label == "Overlay")
    assert overlay.options == ["made from", "teacher north", "teacher south", "ensemble", "student", "none"]
    next(found for found in app.toggle if found.label == "Side by side").set_value(True).run()
    assert not app.exception and len(app.get("image")) == 3 + 5 + 2
    bold = [text.value for text in app.markdown]
    assert "**public phantom it started from**" in bold and "**disagreement of the hospitals**" in bold
    assert any(metric.label.startswith("Nearest public phantom") and metric.value == "3.5" for metric in app.metric)
    measures = next(found.value for found in app.dataframe if "measure" in found.value)
    assert list(measures["value"].dropna()) == [0.012, 0.01, 0.75, 0.02]
    next(found for found in app.selectbox if found.label == "Round").set_value("end of the run").run()
    assert not app.exception and any("Not kept with this volume" in text.value for text in app.caption)


def test_a_run_without_synthetic_volumes_says_so(demo: Path) -> None:
    shutil.rmtree(demo / "run" / "synthetic")
    (demo / "run" / "history.json").unlink()
    app = opened("synthetic")
    told = " ".join(info.value.replace("\\", "") for info in app.info)
    assert "kept no synthetic volume" in told and "did not measure" in told and "history.json" in told
    assert not app.error


@pytest.mark.parametrize("page", ["synthetic", "cases", "rating"])
def test_the_browser_may_draw_the_planes_itself(demo: Path, page: str) -> None:
    app = opened(page, reviewer="r9")
    next(found for found in app.toggle if found.label == "Interactive").set_value(True).run()
    assert not app.exception and not app.error and not app.get("image")
    sliders = {found.label for found in app.slider}
    assert {"Axial slice", "Coronal slice", "Sagittal slice"} <= sliders


def test_a_case_shows_volumes_quality_findings_and_the_reference(demo: Path) -> None:
    app = opened("cases")
    assert any(metric.value == "0.90" for metric in app.metric)
    tables = [found.value for found in app.dataframe]
    assert any("reference ml" in table for table in tables) and any("Dice WT" in table for table in tables)
    assert any("code" in table and table["code"][0] == "W170" for table in tables)
    overlay = next(found for found in app.selectbox if found.label == "Overlay")
    assert overlay.options == ["model", "reference", "none"]
    against = next(found for found in app.selectbox if found.label == "Difference to")
    against.set_value("reference").run()
    assert not app.exception and "first only" in html_of(app)
    overlay.set_value("none").run()
    assert not app.exception and not app.error


def test_a_review_is_kept_once_and_the_next_case_comes(demo: Path, tmp_path: Path) -> None:
    app = opened("rating")
    assert any("reviewer code" in info.value for info in app.info)
    next(found for found in app.text_input if found.label == "Reviewer code").set_value("r1").run()
    shown = [text.value for text in app.markdown if "case-" in text.value.replace("\\", "")]
    assert "case-c" in shown[0].replace("\\", "")  # the lowest predicted quality comes first
    button(app, "expert").click().run()
    button(app, "small fix").click().run()
    button(app, "Minor edit").click().run()
    assert not app.exception and not app.error, [error.value for error in app.error]
    (kept,) = ReviewStore(tmp_path / "r.sqlite").events()
    assert (kept.reviewer, kept.case, kept.arm, kept.verdict) == ("r1", "case-c", "model", "minor")
    assert kept.ratings == {"WT": 4, "TC": 3} and len(kept.mask_sha256) == 64 and len(kept.image_sha256) == 64
    again = [text.value.replace("\\", "") for text in app.markdown]
    assert any(text.startswith("**case-b**") for text in again)
    # another browser of the same reviewer goes on where this one is
    other = opened("rating", reviewer="r1")
    assert any(text.value.replace("\\", "").startswith("**case-b**") for text in other.markdown)


def test_a_blinded_comparison_hides_names_until_both_are_rated(demo: Path, tmp_path: Path) -> None:
    app = opened("rating", reviewer="r2")
    compare = next(found for found in app.multiselect if found.label == "Compare with")
    compare.set_value([name for name in compare.options if name.endswith("other")]).run()
    way = next(found for found in app.get("button_group") if getattr(found, "label", "") == "Way")
    way.set_value(way.options[1] if hasattr(way, "options") else None).run()
    assert not app.exception and not app.error
    overlay = next(found for found in app.selectbox if found.label == "Overlay")
    assert overlay.options == ["A", "B", "none"]
    assert button(app, "Show which is which").disabled
    button(app, "Accept").click().run()
    button(app, "Reject").click().run()
    events = ReviewStore(tmp_path / "r.sqlite").events()
    first = [event for event in events if event.case == "case-c"]
    assert [event.kind for event in first] == ["assignment", "review", "review"]
    assert {event.arm for event in first[1:]} == {"A", "B"}
    assert any("not revealed" in text.value for text in app.caption)
    assert not any(event.kind == "reveal" for event in events)

    button(app, "Previous").click().run()
    button(app, "Show which is which").click().run()
    drawn = events[0].detail["arms"]
    told = next(info.value.replace("\\", "") for info in app.info if "A is" in info.value)
    assert told == f"A is {drawn['A']}; B is {drawn['B']}"
    (shown,) = (event for event in ReviewStore(tmp_path / "r.sqlite").events() if event.kind == "reveal")
    assert (shown.reviewer, shown.case) == ("r2", "case-c")
    button(app, "Next").click().run()  # the next case is blinded, and its names are hidden still
    assert not app.exception and button(app, "Show which is which").disabled


def test_an_export_is_imported_once_and_only_unchanged(demo: Path, tmp_path: Path) -> None:
    elsewhere = ReviewStore(tmp_path / "elsewhere.sqlite")
    elsewhere.submit(Review(reviewer="r7", run="demo/model", case="case-a", arm="model", verdict="reject"))
    text = export_json(elsewhere)
    app = opened("rating", reviewer="r1")

    def imported(content: bytes) -> tuple[list[str], list[str]]:
        app.get("file_uploader")[0].set_value([("reviews.json", content, "application/json")]).run()
        button(app, "Import").click().run()
        assert not app.exception
        return [found.value for found in app.success], [found.value for found in app.error]

    assert imported(text.encode()) == (["1 new events."], [])
    assert imported(text.encode()) == (["0 new events."], [])
    assert imported(text.replace("reject", "accept").encode())[1]
    assert imported(b"\xff\xfe")[1]
    (kept,) = ReviewStore(tmp_path / "r.sqlite").events()
    assert (kept.reviewer, kept.verdict, kept.origin) == ("r7", "reject", elsewhere.head[1])


def test_two_readers_are_compared_on_request(demo: Path, tmp_path: Path) -> None:
    store = ReviewStore(tmp_path / "r.sqlite")
    for case in ("case-a", "case-b", "case-c"):
        for reviewer in ("r1", "r2"):
            verdict = "reject" if case == "case-b" else "accept"
            store.submit(Review(reviewer=reviewer, run="demo/model", case=case, arm="model", verdict=verdict))
    app = opened("rating", reviewer="r3")
    assert not any("measure" in table.value for table in app.dataframe)
    next(found for found in app.toggle if found.label == "Agreement of the reviewers").set_value(True).run()
    rows = next(table.value for table in app.dataframe if "measure" in table.value)
    assert list(rows["measure"]) == ["Krippendorff's alpha", "weighted kappa"] and list(rows["value"]) == [1.0, 1.0]


def test_a_private_run_tells_epsilon_of_each_hospital(demo: Path) -> None:
    summary = demo / "run" / "summary.json"
    told = json.loads(summary.read_text())
    told["privacy"]["south"] = {"mode": "gradient", "epsilon": 6.25, "delta": 1e-5, "patients": 24}
    summary.write_text(json.dumps(told))
    for page in (None, "synthetic", "promises"):
        words = html_of(opened(page))
        assert "Differentially private per patient: epsilon at most 7.9" in words and "NOT PRIVATE" not in words
        assert "north: epsilon 7.9 at delta 1.0e-05; south: epsilon 6.25 at delta 1.0e-05" in words


def test_one_hospital_without_a_promise_makes_the_run_not_private(demo: Path) -> None:
    words = html_of(opened())
    assert "NOT PRIVATE: south" in words and "north: epsilon 7.9 at delta 1.0e-05; south: NOT PRIVATE" in words


def test_what_a_run_lacks_is_said_and_nothing_breaks(demo: Path) -> None:
    shutil.rmtree(demo / "run" / "scores")
    for name in ("summary.json", "run.json"):
        (demo / "run" / name).write_text(json.dumps({"command": "distill"}))
    app = opened()
    assert "NOT PRIVATE" in html_of(app) and not app.error
    told = " ".join(found.value for found in (*app.warning, *app.info))
    assert "privacy" in told and "rows" in told and "no score of a single case" in told
    assert not opened("promises").error


def test_a_case_without_its_files_says_which(demo: Path) -> None:
    (demo / "model" / "case-a_seg.nii.gz").unlink()
    shutil.rmtree(demo / "unseen" / "case-a")
    app = opened("cases")
    assert not app.exception and not app.get("image")
    told = " ".join(text.value.replace("\\", "") for text in (*app.warning, *app.caption, *app.error))
    assert "not there any more" in told and "case-a_seg.nii.gz" in told


def test_privacy_page_says_what_is_missing(demo: Path) -> None:
    app = opened("promises")
    assert any("ledger" in warning.value for warning in app.warning)
    assert any("audit" in info.value for info in app.info)
    button(app, "Verify every ledger and claim").click().run()
    assert not app.exception and app.warning


def test_segmenting_says_what_the_model_is_worth(demo: Path) -> None:
    assert "trained on no patient" in opened("segmenting").selectbox[0].options[-1]
    assert "on no patient" in html_of(opened("segmenting"))
    (demo / "run" / "bundle").mkdir()
    assert "NOT PRIVATE" in html_of(opened("segmenting"))


def test_segmenting_refuses_paths_outside(demo: Path) -> None:
    app = opened("segmenting")
    folder = next(found for found in app.text_input if found.label.startswith("Case folder"))
    for bad in ("/etc", "../..", "run/../../.."):
        folder.set_value(bad).run()
        button(app, "Check and segment").click().run()
        assert app.error and not app.exception


def test_segmenting_follows_no_link_out_of_the_roots(demo: Path, tmp_path: Path) -> None:
    inside = demo / "linked" / "case-a"
    inside.mkdir(parents=True)
    outside = tmp_path / "outside"
    (demo / "unseen" / "case-a").rename(outside)
    for path in outside.iterdir():
        (inside / path.name).symlink_to(path)
    app = opened("segmenting")
    next(found for found in app.text_input if found.label.startswith("Case folder")).set_value("linked").run()
    button(app, "Check and segment").click().run()
    assert any("outside" in error.value for error in app.error) and not app.exception
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_dicom_study_with_a_link_out_of_the_roots_is_not_read(demo: Path, tmp_path: Path, link: str) -> None:
    outside, study = tmp_path / "outside", demo / "study" / "series-1"
    outside.mkdir()
    study.mkdir(parents=True)
    (outside / "1.dcm").write_bytes(bytes(128) + b"DICM")
    (study / "0.dcm").write_bytes(bytes(128) + b"DICM")
    target = outside / "1.dcm" if link == "file" else outside
    (study / "more").symlink_to(target)
    app = opened("segmenting")
    next(found for found in app.text_input if found.label.startswith("Case folder")).set_value("study").run()
    button(app, "Check and segment").click().run()
    assert any("outside" in error.value for error in app.error) and not app.exception
    assert str(tmp_path) not in " ".join(error.value.replace("\\", "") for error in app.error)
    assert not list((tmp_path / "work").iterdir())


def test_uploaded_files_are_checked_under_a_code(demo: Path, tmp_path: Path) -> None:
    app = opened("segmenting")
    next(found for found in app.get("button_group") if found.options == ["Folder", "Files"]).set_value("Files").run()
    folder = demo / "unseen" / "case-b"
    names = [f"case-b-{suffix}.nii.gz" for suffix in ("t1c", "t1n", "t2w")]
    files = [(f"Doe_{name}", (folder / name).read_bytes(), "application/gzip") for name in names]
    files.append(("Doe_flair.nii.gz", b"no gzip at all", "application/gzip"))
    app.get("file_uploader")[0].set_value(files).run()
    app.text_input(key="segment-code").set_value("code-7").run()
    button(app, "Check and segment").click().run()
    assert not app.exception, app.exception
    kept = sorted(path.name for path in (tmp_path / "work" / "uploads" / "code-7").iterdir())
    assert len(kept) == 4 and all(name.startswith("code-7-") for name in kept)
    told = " ".join([error.value for error in app.error] + [str(table.value) for table in app.dataframe])
    assert told and "Doe" not in told
    assert not list((tmp_path / "work").rglob("*_seg.nii.gz"))
