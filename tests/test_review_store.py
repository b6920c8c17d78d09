"""Reviews are kept: appended only, chained, shared by processes, harmless when sent twice, exported and imported."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fediod_med.errors import InputError, SettingsError
from fediod_med.review.events import Review
from fediod_med.review.exchange import events_csv, export_csv, export_json, import_text, parse_export
from fediod_med.review.store import ReviewStore


def review(**changes) -> Review:
    told = {"reviewer": "r1", "run": "run-1", "case": "c1", "arm": "student", "verdict": "accept"}
    return Review(**{**told, **changes})


@pytest.fixture
def store(tmp_path: Path) -> ReviewStore:
    return ReviewStore(tmp_path / "reviews.sqlite")


def test_a_review_is_found_again_as_it_was_given(tmp_path: Path) -> None:
    given_review = review(
        ratings={"TC": 3, "ET": 1},
        comment="späte Phase\nsecond line",
        tags=("wrong side",),
        seconds=12.5,
        mask_sha256="a" * 64,
        detail={"opacity": 0.5},
    )
    written = ReviewStore(tmp_path / "deep" / "reviews.sqlite").submit(given_review)
    (found,) = ReviewStore(tmp_path / "deep" / "reviews.sqlite").current()
    assert found == written
    assert found.ratings == {"TC": 3, "ET": 1} and found.comment == given_review.comment
    assert found.tags == ("wrong side",) and found.seconds == 12.5 and found.detail == {"opacity": 0.5}
    assert found.time.endswith("+00:00") and found.mask_sha256 == "a" * 64


def test_a_correction_supersedes_and_nothing_is_lost(store: ReviewStore) -> None:
    first = store.submit(review())
    other = store.submit(review(arm="ensemble", verdict="reject"))
    second = store.submit(review(verdict="minor"))
    third = store.submit(review(verdict="major"))
    assert (first.supersedes, second.supersedes, third.supersedes) == ("", first.event_id, second.event_id)
    assert store.current() == (other, third)
    assert [event.verdict for event in store.events()] == ["accept", "reject", "minor", "major"]
    assert store.verify().ok and store.verify().events == 4


def test_the_current_view_is_per_reviewer_run_case_and_arm(store: ReviewStore) -> None:
    for change in ({}, {"reviewer": "r2"}, {"run": "run-2"}, {"case": "c2"}, {"arm": "B"}):
        store.submit(review(**change))
    assert len(store.current()) == 5
    assert len(store.current(run="run-1")) == 4
    assert len(store.current(reviewer="r1", run="run-1", case="c1")) == 2


def test_sending_again_is_harmless_and_a_reused_key_is_refused(store: ReviewStore) -> None:
    once = review(ratings={"WT": 4}, seconds=3)
    event = store.submit(once)
    assert store.submit(once) == event
    assert store.submit(Review(**{**once.__dict__, "seconds": 9.0})) == event  # the clock ran on
    assert len(store.events()) == 1
    with pytest.raises(SettingsError, match="another"):
        store.submit(Review(**{**once.__dict__, "verdict": "reject"}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"verdict": "fine"}, "verdict"),
        ({"ratings": {"TC": 5}}, "ratings 1 to 4"),
        ({"ratings": {"TC": True}}, "ratings 1 to 4"),
        ({"ratings": {"NCR": 1}}, "ratings 1 to 4"),
        ({"tags": ("odd",)}, "tags"),
        ({"seconds": float("nan")}, "time spent"),
        ({"reviewer": ""}, "reviewer"),
        ({"reviewer": "Dr. X Y"}, "reviewer"),
        ({"case": ""}, "case"),
        ({"case": "a\nb"}, "control"),
        ({"comment": "x" * 4001}, "4000"),
        ({"comment": "null\0"}, "control"),
        ({"comment": "\ud800"}, "control"),
        ({"mask_sha256": "xyz"}, "SHA-256"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, match) -> None:
    with pytest.raises(SettingsError, match=match):
        review(**changes)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET verdict = 'reject'",
        "DELETE FROM events",
        "DELETE FROM events WHERE sequence = 1",
        'INSERT OR REPLACE INTO events SELECT 0, event_id, submission, kind, time, reviewer, run, "case", arm, '
        "mask_sha256, image_sha256, 'reject', rating_tc, rating_wt, rating_et, comment, tags, seconds, supersedes, "
        "detail, version, origin, previous, 'h' FROM events WHERE sequence = 0",
        'REPLACE INTO events SELECT 2, event_id, submission, kind, time, reviewer, run, "case", arm, mask_sha256, '
        "image_sha256, verdict, rating_tc, rating_wt, rating_et, comment, tags, seconds, supersedes, detail, version, "
        "origin, hash, 'h' FROM events WHERE sequence = 1",
    ],
)
def test_the_table_refuses_everything_but_appending(store: ReviewStore, statement: str) -> None:
    store.submit(review())
    store.submit(review())
    before = store.events()
    with closing(sqlite3.connect(store.path)) as connection, pytest.raises(sqlite3.Error, match="append-only"):
        connection.execute(statement)
    assert store.events() == before


def tamper(store: ReviewStore, *statements: str) -> None:
    with closing(sqlite3.connect(store.path)) as connection:
        for name in ("events_are_not_changed", "events_are_not_deleted", "events_are_appended"):
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("UPDATE events SET verdict = 'reject' WHERE sequence = 1", "event 1: was changed"),
        ("UPDATE events SET comment = 'x', hash = 'y' WHERE sequence = 1", "event 1: was changed"),
        ("UPDATE events SET detail = 'no json' WHERE sequence = 1", "event 1: was changed"),
        ("DELETE FROM events WHERE sequence = 1", "event 2: an event before it is missing"),
    ],
)
def test_verify_finds_what_was_changed_behind_its_back(store: ReviewStore, statement: str, match: str) -> None:
    for _ in range(3):
        store.submit(review())
    tamper(store, statement)
    found = store.verify()
    assert not found.ok
    assert any(problem.startswith(match) for problem in found.problems), found.problems
    assert any("guard" in problem for problem in found.problems)


def test_a_cut_off_end_is_noticed_with_a_witness_only(store: ReviewStore) -> None:
    for _ in range(3):
        store.submit(review())
    head = store.head
    assert head[0] == 2 and store.verify(head=head).ok
    tamper(store, "DELETE FROM events WHERE sequence = 2")
    chain = [problem for problem in store.verify().problems if "guard" not in problem]
    assert chain == []
    assert any("was witnessed" in problem for problem in store.verify(head=head).problems)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be looked at " * 40)
    with pytest.raises(InputError, match="not a database"):
        ReviewStore(tmp_path / "text")
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as connection:
        connection.execute("CREATE TABLE notes (text TEXT)")
        connection.commit()
    with pytest.raises(InputError, match="another database"):
        ReviewStore(tmp_path / "other.sqlite")


def test_the_file_syncs_every_commit_and_keeps_a_write_ahead_log(store: ReviewStore) -> None:
    with store._connected() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


# --- several at once --------------------------------------------------------------------------------------------------


def rate_many(path: str, reviewer: str, keys: list[str], gate) -> None:
    gate.wait()
    store = ReviewStore(Path(path))
    for number, key in enumerate(keys):
        store.submit(review(reviewer=reviewer, case=f"c{number % 10}", submission=key, seconds=number))
        if number % 5 == 0:  # a browser that lost the answer sends again
            store.submit(review(reviewer=reviewer, case=f"c{number % 10}", submission=key, seconds=number + 1))


def test_three_processes_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    keys = {f"r{n}": [f"r{n}-{i}" for i in range(60)] for n in range(3)}
    path = tmp_path / "reviews.sqlite"  # made by whichever process comes first
    workers = [context.Process(target=rate_many, args=(str(path), who, sent, gate)) for who, sent in keys.items()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    store = ReviewStore(path)
    events = store.events()
    assert sorted(event.submission for event in events) == sorted(key for sent in keys.values() for key in sent)
    assert store.verify().ok
    assert len(store.current()) == 30
    for current in store.current():  # each is the last that its reviewer sent of that case
        assert current.seconds >= 50


def rate_for_ever(path: str, pipe) -> None:
    store = ReviewStore(Path(path))
    while True:
        pipe.send(store.submit(review(seconds=1)).event_id)


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    path = tmp_path / "reviews.sqlite"
    worker = context.Process(target=rate_for_ever, args=(str(path), theirs))
    worker.start()
    theirs.close()  # so that a worker that dies early ends the wait
    answered = [ours.recv() for _ in range(8)]
    worker.kill()
    worker.join(60)
    store = ReviewStore(path)
    assert {event.event_id for event in store.events()} >= set(answered)
    assert store.verify().ok
    assert store.submit(review(verdict="minor")).supersedes == store.events()[-2].event_id


def test_threads_that_send_one_submission_make_one_event(store: ReviewStore) -> None:
    once = review(submission="one-press")
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.submit(once).event_id)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1 and len(store.events()) == 1


# --- out and in -------------------------------------------------------------------------------------------------------


def fill(store: ReviewStore) -> None:
    store.submit(review(comment='=HYPERLINK("http://x")', tags=("artefact", "wrong side"), ratings={"TC": 2}))
    store.submit(review(comment="'quoted\r\nand two lines, with comma", seconds=1 / 3))
    store.record_once("assignment", reviewer="r1", run="run-1", case="c2", submission="a1", detail={"arms": {"A": "x"}})
    store.submit(review(reviewer="r2", case="-1+1", comment="@SUM(A1)"))


@pytest.mark.parametrize("export", [export_csv, export_json])
def test_an_export_comes_back_whole(tmp_path: Path, store: ReviewStore, export) -> None:
    fill(store)
    text = export(store)
    assert "Not for clinical use" in text
    assert parse_export(text) == store.events()
    other = ReviewStore(tmp_path / "other.sqlite")
    assert import_text(other, text) == 4
    assert import_text(other, text) == 0
    assert all(a.same_content(b) for a, b in zip(other.events(), store.events(), strict=True))
    assert [event.origin for event in other.events()] == [event.hash for event in store.events()]
    assert other.verify().ok
    assert import_text(store, export(other)) == 0  # and home again
    assert [e.event_id for e in other.current()] == [e.event_id for e in store.current()]


def test_two_hospitals_merge_and_corrections_go_on(tmp_path: Path, store: ReviewStore) -> None:
    fill(store)
    other = ReviewStore(tmp_path / "other.sqlite")
    other.submit(review(reviewer="r3"))
    import_text(other, export_json(store))
    corrected = other.submit(review(verdict="reject"))
    assert corrected.supersedes == store.current(reviewer="r1", case="c1")[0].event_id
    assert other.current(reviewer="r1", case="c1") == (corrected,)
    assert other.verify().ok and len(other.events()) == 6


def test_no_cell_begins_like_a_formula(store: ReviewStore) -> None:
    fill(store)
    for row in csv.reader(io.StringIO(export_csv(store), newline="")):
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)


def test_a_changed_export_is_refused_and_leaves_the_store_alone(tmp_path: Path, store: ReviewStore) -> None:
    fill(store)
    other = ReviewStore(tmp_path / "other.sqlite")
    content = json.loads(export_json(store))
    forged = [
        {**row, "verdict": "accept", "rating_tc": 4} if row["sequence"] == 0 else row for row in content["events"]
    ]
    missing = [row for row in content["events"] if row["sequence"] != 1]
    for events in (forged, missing, content["events"][:-1]):
        with pytest.raises(InputError, match="changed one"):
            import_text(other, json.dumps({**content, "events": events}))
    lines = export_csv(store).splitlines(keepends=True)
    for text in ("", "{}", '{"format": 2}', "a,b\n1,2\n", "[]", lines[0] + "x\r\n"):
        with pytest.raises(InputError, match="expected"):
            import_text(other, text)
    assert other.events() == ()


def test_an_import_that_contradicts_the_store_adds_nothing(tmp_path: Path, store: ReviewStore) -> None:
    other = ReviewStore(tmp_path / "other.sqlite")
    other.submit(review(case="c9"))
    other.submit(review(submission="same-key"))
    store.submit(review(submission="same-key", verdict="reject"))
    with pytest.raises(InputError, match="says something else"):
        import_text(store, export_json(other))
    assert len(store.events()) == 1


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=30)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(comment=st.one_of(_TEXT, _TEXT.map("=".__add__), _TEXT.map("''".__add__)), seconds=st.floats(0, 1e6))
def test_any_text_survives_csv_and_json(tmp_path: Path, comment: str, seconds: float) -> None:
    store = ReviewStore(tmp_path / "any.sqlite")
    store.submit(review(comment=comment, seconds=seconds))
    assert parse_export(events_csv(store.events())) == store.events() == parse_export(export_json(store))
