"""The order of a reviewer's queue, and blinding that neither reload nor second browser can undo."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fediod_med.errors import SettingsError
from fediod_med.review.events import Review
from fediod_med.review.queue import ARMS, Waiting, blind, blinded_ratings, neighbour, next_case, reveal, review_queue
from fediod_med.review.store import ReviewStore

MODELS = ("student", "ensemble")


@pytest.fixture
def store(tmp_path: Path) -> ReviewStore:
    return ReviewStore(tmp_path / "reviews.sqlite")


def review(**changes) -> Review:
    told = {"reviewer": "r1", "run": "run-1", "case": "c1", "arm": "model", "verdict": "accept"}
    return Review(**{**told, **changes})


def order(cases, store: ReviewStore, **options) -> list[str]:
    return [item.case_id for item in review_queue(cases, store.events(), reviewer="r1", run="run-1", **options)]


def test_unreviewed_then_disagreement_then_worst_quality(store: ReviewStore) -> None:
    cases = [
        Waiting("good", 0.9, 0.01),
        Waiting("bad", 0.4, 0.01),
        Waiting("disputed", 0.9, 0.3),
        Waiting("read-apart", 0.95, 0.0),
        Waiting("unknown"),
        Waiting("mine", 0.1, 0.9),
    ]
    store.submit(review(case="mine"))
    store.submit(review(case="read-apart", reviewer="r2"))
    store.submit(review(case="read-apart", reviewer="r3", verdict="reject"))
    store.submit(review(case="good", run="another-run", verdict="reject"))
    assert order(cases, store) == ["read-apart", "disputed", "bad", "good", "unknown", "mine"]
    items = {i.case_id: i for i in review_queue(cases, store.events(), reviewer="r1", run="run-1")}
    assert items["mine"].done and items["read-apart"].readers == 2 and items["read-apart"].reader_spread == 1.0
    assert items["read-apart"].reason == "not reviewed, readers disagree, predicted Dice 0.95"
    assert items["bad"].reason == "not reviewed, teachers disagree by 0.010 nats, predicted Dice 0.40"


@given(
    cases=st.permutations([Waiting(f"c{n}", q, d) for n, (q, d) in enumerate([(0.5, 0.1)] * 3 + [(None, None)] * 3)])
)
def test_the_order_does_not_depend_on_how_cases_arrive(cases) -> None:
    found = [item.case_id for item in review_queue(cases, [], reviewer="r1", run="run-1")]
    assert found == ["c0", "c1", "c2", "c3", "c4", "c5"]


def test_a_corrected_rating_settles_a_dispute(store: ReviewStore) -> None:
    store.submit(review(reviewer="r2", ratings={"ET": 1}))
    store.submit(review(reviewer="r3", ratings={"ET": 4}))
    assert review_queue([Waiting("c1")], store.events(), reviewer="r1", run="run-1")[0].reader_spread == 1.0
    store.submit(review(reviewer="r3", ratings={"ET": 2}))
    assert review_queue([Waiting("c1")], store.events(), reviewer="r1", run="run-1")[0].reader_spread == pytest.approx(
        1 / 3
    )


def test_moving_through_the_queue(store: ReviewStore) -> None:
    cases = [Waiting(name) for name in ("a", "b", "c")]
    queue = review_queue(cases, store.events(), reviewer="r1", run="run-1")
    assert next_case(queue) == "a" and next_case(queue, after="a") == "b" and next_case(queue, after="c") == "a"
    store.submit(review(case="b"))
    queue = review_queue(cases, store.events(), reviewer="r1", run="run-1")
    assert [item.case_id for item in queue] == ["a", "c", "b"]
    assert next_case(queue, after="c") == "a" and next_case(queue, after="c", skip_done=False) == "b"
    assert neighbour(queue, "a") == "c" and neighbour(queue, "a", back=True) is None
    assert neighbour(queue, "b") is None and neighbour(queue, "b", back=True) == "c"
    for case in ("a", "c"):
        store.submit(review(case=case))
    assert next_case(review_queue(cases, store.events(), reviewer="r1", run="run-1"), after="a") is None
    assert next_case([]) is None


def test_a_comparison_is_done_when_both_arms_are_rated(store: ReviewStore) -> None:
    store.submit(review(arm="B"))
    (item,) = review_queue([Waiting("c1")], store.events(), reviewer="r1", run="run-1", arms=ARMS)
    assert not item.done and item.rated == ("B",) and item.reason == "1 of 2 rated"
    store.submit(review(arm="A"))
    assert review_queue([Waiting("c1")], store.events(), reviewer="r1", run="run-1", arms=ARMS)[0].done


def test_letters_are_drawn_once_and_kept(store: ReviewStore) -> None:
    first = blind(store, reviewer="r1", run="run-1", case="c1", models=MODELS, draw=lambda _: 1)
    assert first.models == {"A": "student", "B": "ensemble"} and not first.revealed
    for draw in (0, 1):  # a reload draws again, and the first draw stands
        assert (
            blind(store, reviewer="r1", run="run-1", case="c1", models=MODELS[::-1], draw=(0, 0, draw).__getitem__)
            == first
        )
    assert len(store.events(kind="assignment")) == 1
    assert (
        blind(store, reviewer="r2", run="run-1", case="c1", models=MODELS, draw=lambda _: 0).models["A"] == "ensemble"
    )


def test_two_browsers_at_once_see_the_same_letters(store: ReviewStore) -> None:
    found = []

    def draw(value: int) -> None:
        blinding = blind(store, reviewer="r1", run="run-1", case="c1", models=MODELS, draw=lambda _: value)
        found.append(blinding.models["A"])

    threads = [threading.Thread(target=draw, args=(n % 2,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1


def test_both_orders_are_drawn(store: ReviewStore) -> None:
    firsts = {blind(store, reviewer="r1", run="x", case=f"c{n}", models=MODELS).models["A"] for n in range(24)}
    assert firsts == set(MODELS)  # one order only has a chance of 2^-23


def test_names_are_shown_after_both_ratings_only(store: ReviewStore) -> None:
    who = {"reviewer": "r1", "run": "run-1", "case": "c1"}
    blind(store, **who, models=MODELS)
    store.submit(review(arm="A"))
    with pytest.raises(SettingsError, match="rate B"):
        reveal(store, **who, models=MODELS)
    store.submit(review(arm="B"))
    assert reveal(store, **who, models=MODELS).revealed
    assert reveal(store, **who, models=MODELS).revealed and len(store.events(kind="reveal")) == 1
    assert blind(store, **who, models=MODELS).revealed
    assert not blind(store, reviewer="r2", run="run-1", case="c1", models=MODELS).revealed


def test_only_blind_ratings_count_in_a_comparison(store: ReviewStore) -> None:
    who = {"reviewer": "r1", "run": "run-1", "case": "c1"}
    letters = {model: arm for arm, model in blind(store, **who, models=MODELS).models.items()}
    store.submit(review(arm=letters["student"], ratings={"WT": 2}))
    store.submit(review(arm=letters["student"], ratings={"WT": 3}))  # a second thought, still blind
    store.submit(review(arm=letters["ensemble"], ratings={"WT": 1}))
    reveal(store, **who, models=MODELS)
    store.submit(review(arm=letters["ensemble"], ratings={"WT": 4}))  # knows the name now
    store.submit(review(case="c2", arm="A", ratings={"WT": 4}))  # never assigned
    found = {model: event.ratings["WT"] for model, event in blinded_ratings(store.events(), MODELS)}
    assert found == {"student": 3, "ensemble": 1}
    assert blinded_ratings(store.events(), ("student", "prior")) == ()


def test_a_comparison_needs_two_models(store: ReviewStore) -> None:
    for models in (("a",), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(SettingsError, match="two different"):
            blind(store, reviewer="r1", run="run-1", case="c1", models=models)
