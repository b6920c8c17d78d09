"""Which case a reviewer sees next, and, in a blinded comparison, under which letter each model hides.

The order is stable: the same reviews and cases give the same queue, whichever page asks. The letters are drawn once per
reviewer and case from the system's randomness and written to the store before anything is shown, so neither a reload
nor a second browser can turn them; names are shown only after both have been rated, and that is written down too.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fediod_med.errors import SettingsError
from fediod_med.review.case_folder import Case
from fediod_med.review.events import VERDICTS, Event, canonical, current_of
from fediod_med.review.store import ReviewStore

ARMS = ("A", "B")


@dataclass(frozen=True)
class Waiting:
    """What the order of a case rests on.

    Attributes:
        case_id: study code.
        quality: predicted mean Dice, 0 to 1, or none.
        disagreement: of the teachers in the tumour (nats), or none.
    """

    case_id: str
    quality: float | None = None
    disagreement: float | None = None


@dataclass(frozen=True)
class QueueItem:
    """A case in a reviewer's queue.

    Attributes:
        case_id: study code.
        done: this reviewer has rated every arm of it.
        rated: arms that this reviewer has rated.
        readers: other reviewers who have rated it.
        reader_spread: how far readers' verdicts and ratings lie apart, 0 to 1.
        quality: as given.
        disagreement: as given.
        reason: why it stands where it stands, in words.
    """

    case_id: str
    done: bool
    rated: tuple[str, ...]
    readers: int
    reader_spread: float
    quality: float | None
    disagreement: float | None
    reason: str


@dataclass(frozen=True)
class Blinding:
    """Which model hides behind which letter, for one reviewer and case. Never shown before `revealed`.

    Attributes:
        models: by letter, `A` and `B`.
        revealed: the names have been shown to this reviewer.
    """

    models: Mapping[str, str]
    revealed: bool


def waiting(cases: Iterable[Case]) -> tuple[Waiting, ...]:
    """The cases that can be reviewed, in the given order: those that have a label map."""
    return tuple(Waiting(case.case_id, case.quality, case.disagreement) for case in cases if case.label_map is not None)


def review_queue(
    cases: Sequence[Waiting], events: Iterable[Event], *, reviewer: str, run: str, arms: Sequence[str] = ("model",)
) -> tuple[QueueItem, ...]:
    """Every case in the order to review it: not yet rated, then most disagreement, then lowest predicted quality.

    Disagreement is first that between readers, then that between the teachers. A case without a predicted quality comes
    after those that have one; what is still equal is sorted by id.

    Args:
        cases: with distinct ids.
        events: of the store.
        reviewer: whose queue it is.
        run: run or folder of the cases.
        arms: that must all be rated for a case to be done; `ARMS` in a blinded comparison.
    """
    by_case: dict[str, list[Event]] = {}
    for event in current_of(event for event in events if event.run == run):
        by_case.setdefault(event.case, []).append(event)
    items = []
    for case in cases:
        of_case = by_case.get(case.case_id, [])
        rated = {event.arm for event in of_case if event.reviewer == reviewer}
        others = {event.reviewer for event in of_case if event.reviewer != reviewer}
        done = all(arm in rated for arm in arms)
        spread = _spread(of_case)
        items.append(
            QueueItem(
                case_id=case.case_id,
                done=done,
                rated=tuple(arm for arm in arms if arm in rated),
                readers=len(others),
                reader_spread=spread,
                quality=case.quality,
                disagreement=case.disagreement,
                reason=_reason(case, done, len(rated & set(arms)), len(arms), spread),
            )
        )
    return tuple(sorted(items, key=_rank))


def next_case(queue: Sequence[QueueItem], *, after: str | None = None, skip_done: bool = True) -> str | None:
    """Id of the next case in a queue, or none when nothing is left.

    Args:
        queue: from `review_queue`.
        after: the case shown now; the search goes on behind it and begins anew at the end.
        skip_done: pass over cases that are done.
    """
    ids = [item.case_id for item in queue]
    start = ids.index(after) + 1 if after in ids else 0
    turned = [*queue[start:], *queue[:start]]
    return next((i.case_id for i in turned if i.case_id != after and not (skip_done and i.done)), None)


def neighbour(queue: Sequence[QueueItem], case_id: str, *, back: bool = False) -> str | None:
    """The case behind (or before) one in the queue, done or not; none at the end."""
    ids = [item.case_id for item in queue]
    pairs = pairwise(reversed(ids) if back else ids)
    return next((second for first, second in pairs if first == case_id), None)


def blind(
    store: ReviewStore,
    *,
    reviewer: str,
    run: str,
    case: str,
    models: Sequence[str],
    draw: Callable[[int], int] = secrets.randbelow,
) -> Blinding:
    """Which of two models is A and which is B for this reviewer and case; drawn and logged by the first call.

    Args:
        store: keeps the draw.
        reviewer: id.
        run: run or folder.
        case: study code.
        models: two names, in any order.
        draw: number below its argument; replaced in tests only.

    Raises:
        SettingsError: not two different models.
    """
    pair = sorted(models)
    if len(pair) != len(ARMS) or pair[0] == pair[1]:
        raise SettingsError(f"blinded comparison: expected two different models, found {', '.join(models) or 'none'}")
    order = pair if draw(2) == 0 else pair[::-1]
    event = store.record_once(
        "assignment",
        reviewer=reviewer,
        run=run,
        case=case,
        submission=_key("assignment", reviewer, run, case, *pair),
        detail={"arms": dict(zip(ARMS, order, strict=True))},
    )
    return Blinding(dict(event.detail["arms"]), _is_revealed(store, reviewer, run, case, pair))


def reveal(store: ReviewStore, *, reviewer: str, run: str, case: str, models: Sequence[str]) -> Blinding:
    """Show the names behind A and B, once both have been rated; logged, so that later ratings count as not blinded.

    Raises:
        SettingsError: an arm has not been rated by this reviewer.
    """
    blinding = blind(store, reviewer=reviewer, run=run, case=case, models=models)
    rated = {event.arm for event in store.current(run=run, case=case, reviewer=reviewer)}
    missing = [arm for arm in ARMS if arm not in rated]
    if missing:
        raise SettingsError(f"{case}: expected ratings of A and B before names are shown, rate {' and '.join(missing)}")
    store.record_once(
        "reveal",
        reviewer=reviewer,
        run=run,
        case=case,
        submission=_key("reveal", reviewer, run, case, *sorted(models)),
        detail={"models": sorted(models)},
    )
    return Blinding(blinding.models, revealed=True)


def blinded_ratings(events: Iterable[Event], models: Sequence[str]) -> tuple[tuple[str, Event], ...]:
    """Reviews given blind, each with the model that it was about, the last of each reviewer and arm before the reveal.

    Args:
        events: of the store, in order.
        models: the two that were compared; other comparisons are left out.
    """
    pair = sorted(models)
    hidden: dict[tuple[str, str, str], Mapping[str, str]] = {}
    over: set[tuple[str, str, str]] = set()
    kept: list[tuple[str, Event]] = []
    for event in events:
        place = event.reviewer, event.run, event.case
        if event.kind == "assignment" and sorted(event.detail["arms"].values()) == pair:
            hidden[place] = event.detail["arms"]
        elif event.kind == "reveal" and event.detail.get("models") == pair:
            over.add(place)
        elif event.kind == "review" and event.arm in ARMS and place in hidden and place not in over:
            kept.append((hidden[place][event.arm], event))
    model_of = {event.event_id: model for model, event in kept}
    return tuple((model_of[event.event_id], event) for event in current_of(event for _, event in kept))


def _is_revealed(store: ReviewStore, reviewer: str, run: str, case: str, pair: Sequence[str]) -> bool:
    events = store.events(run=run, case=case, reviewer=reviewer, kind="reveal")
    return any(event.detail.get("models") == list(pair) for event in events)


def _key(*parts: str) -> str:
    return f"{parts[0]}-{hashlib.sha256(canonical(list(parts)).encode()).hexdigest()}"


def _rank(item: QueueItem) -> tuple[bool, float, float, float, str]:
    quality = math.inf if item.quality is None else item.quality
    return item.done, -item.reader_spread, -(item.disagreement or 0.0), quality, item.case_id


def _spread(events: Sequence[Event]) -> float:
    """Largest distance between two readers about one arm: of verdicts and of ratings, each on a scale of 0 to 1."""
    largest = 0.0
    for arm in {event.arm for event in events}:
        of_arm = [event for event in events if event.arm == arm]
        verdicts = [VERDICTS.index(event.verdict) for event in of_arm]
        largest = max(largest, (max(verdicts) - min(verdicts)) / (len(VERDICTS) - 1))
        for region in ("TC", "WT", "ET"):
            ratings = [event.ratings[region] for event in of_arm if region in event.ratings]
            if ratings:
                largest = max(largest, (max(ratings) - min(ratings)) / 3)
    return largest


def _reason(case: Waiting, done: bool, rated: int, arms: int, spread: float) -> str:
    words = ["reviewed" if done else "not reviewed" if not rated else f"{rated} of {arms} rated"]
    if spread:
        words.append("readers disagree")
    if case.disagreement:
        words.append(f"teachers disagree by {case.disagreement:.3f} nats")
    if case.quality is not None:
        words.append(f"predicted Dice {case.quality:.2f}")
    return ", ".join(words)
