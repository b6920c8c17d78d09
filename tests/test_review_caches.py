"""What the app keeps in memory between two actions: it must be the same as what is on disk, at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from app_demo import write_app_demo  # type: ignore[import-not-found]

from fediod_med.review import case_cache, case_folder
from fediod_med.review.case_cache import CaseFolders
from fediod_med.review.events import Review
from fediod_med.review.journal import Journal
from fediod_med.review.roots import Roots
from fediod_med.review.store import ReviewStore


def review(reviewer: str, case: str, verdict: str = "accept", run: str = "x") -> Review:
    return Review(reviewer=reviewer, run=run, case=case, arm="model", verdict=verdict)


def test_the_journal_reads_on_and_sees_what_others_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = ReviewStore(tmp_path / "r.sqlite"), ReviewStore(tmp_path / "r.sqlite")
    journal = Journal(store)
    assert journal.events() == () and journal.current("x") == ()
    other.submit(review("r1", "a"))
    asked: list[int | None] = []
    read = store.events
    monkeypatch.setattr(store, "events", lambda **how: asked.append(how.get("after")) or read(**how))  # type: ignore[func-returns-value]
    assert journal.events("x") == other.events(run="x") and journal.events("y") == ()
    assert journal.events("x") == other.events(run="x")
    other.submit(review("r1", "a", "reject"))
    other.submit(review("r2", "a", run="y"))
    assert journal.events() == other.events() and journal.events("y") == other.events(run="y")
    assert journal.current("x") == other.current(run="x") and journal.current("x")[0].verdict == "reject"
    assert asked == [-1, 0]  # nothing was read twice


def test_the_journal_begins_anew_when_another_store_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    journal = Journal(ReviewStore(path))
    for case in "abc":
        journal.store.submit(review("r1", case))
    assert len(journal.events()) == 3
    for file in tmp_path.iterdir():
        file.unlink()
    ReviewStore(path).submit(review("r9", "z"))
    assert [event.case for event in journal.events()] == ["z"]
    for case in "defgh":
        ReviewStore(path).submit(review("r9", case))
    assert [event.case for event in journal.events("x")] == list("zdefgh")
    assert journal.current("x") == ReviewStore(path).current(run="x")


def test_a_folder_is_read_again_only_when_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_app_demo(tmp_path / "demo")
    reads = []
    real = case_folder.read_cases
    monkeypatch.setattr(case_cache, "read_cases", lambda *a, **k: reads.append(1) or real(*a, **k))  # type: ignore[func-returns-value]
    folders, roots, path = CaseFolders(), Roots([root]), root / "model"
    first = folders.read(path, roots, models={"other": root / "other"})
    assert folders.read(path, roots, models={"other": root / "other"}) is first and len(reads) == 1
    assert folders.read(path, roots).cases["case-a"].others == {} and len(reads) == 2

    record = path / "records" / "case-a.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "quality": {"value": 0.25}}))
    assert folders.read(path, roots).cases["case-a"].quality == 0.25
    (path / "case-b_seg.nii.gz").unlink()
    assert folders.read(path, roots).cases["case-b"].label_map is None
    (root / "other" / "case-c_seg.nii.gz").unlink()
    assert "other" not in folders.read(path, roots, models={"other": root / "other"}).cases["case-c"].others
    assert folders.read(path, roots).cases["case-c"].reference is not None
    (root / "unseen" / "case-c" / "case-c-seg.nii.gz").unlink()
    assert folders.read(path, roots).cases["case-c"].reference is None


def test_only_the_folders_used_last_are_kept(tmp_path: Path) -> None:
    root = write_app_demo(tmp_path / "demo")
    folders, roots = CaseFolders(folders=1), Roots([root])
    first = folders.read(root / "model", roots)
    folders.read(root / "other", roots)
    again = folders.read(root / "model", roots)
    assert again is not first and again == first
