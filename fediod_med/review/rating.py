"""What the rating page asks of the store: who still compares blind, what was said last, and how it agrees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fediod_med.labels import REGIONS
from fediod_med.review.agreement import Agreement, alpha_with_interval, pairwise_kappa, rating_matrix
from fediod_med.review.events import Event

VERDICT_WORDS: Mapping[str, str] = {
    "accept": "Accept",
    "minor": "Minor edit",
    "major": "Major edit",
    "reject": "Reject",
}
VERDICT_KEYS: Mapping[str, str] = {"accept": "a", "minor": "e", "major": "m", "reject": "x"}
RATING_WORDS: Mapping[int, str] = {
    1: "1 not usable",
    2: "2 large corrections",
    3: "3 small corrections",
    4: "4 as an expert would draw it",
}
RATING_SHORT: Mapping[int, str] = {1: "unusable", 2: "large fix", 3: "small fix", 4: "expert"}


def open_comparisons(events: Iterable[Event]) -> tuple[tuple[str, str, str], ...]:
    """Reviewer, run and case of blinded comparisons whose names have not been shown; an export would tell them."""
    waiting: dict[tuple[str, str, str], None] = {}
    for event in events:
        place = event.reviewer, event.run, event.case
        if event.kind == "assignment":
            waiting[place] = None
        elif event.kind == "reveal":
            waiting.pop(place, None)
    return tuple(waiting)


def in_words(event: Event) -> str:
    """A review as one line: verdict, ratings, tags and when."""
    ratings = ", ".join(f"{region} {rating}" for region, rating in event.ratings.items()) or "no region rated"
    tags = f"; {', '.join(event.tags)}" if event.tags else ""
    return f"{VERDICT_WORDS[event.verdict]} ({ratings}{tags}), {event.time[:16].replace('T', ' ')} UTC"


def next_region(ratings: Mapping[str, int | None], order: Sequence[str] = ("WT", "TC", "ET")) -> str | None:
    """The first region that has no rating yet; none when all have one."""
    return next((region for region in order if not ratings.get(region)), None)


def agreement_rows(reviews: Sequence[Event]) -> list[dict[str, Any]]:
    """Agreement on the verdict and on each region: alpha over all readers, weighted kappa for each pair.

    Args:
        reviews: those that hold, of one run; see `ReviewStore.current`.
    """
    rows = []
    for what in ("verdict", *REGIONS):
        matrix = rating_matrix(reviews, what)
        if len(matrix.reviewers) < 2:
            continue
        rows.append(_row(what, "Krippendorff's alpha", "all", alpha_with_interval(matrix.values)))
        for (one, two), found in pairwise_kappa(matrix).items():
            rows.append(_row(what, "weighted kappa", f"{one} and {two}", found))
    return rows


def _row(what: str, measure: str, readers: str, found: Agreement) -> dict[str, Any]:
    numbers = {"value": found.value, "95 % low": found.low, "95 % high": found.high}
    return {
        "of": what,
        "measure": measure,
        "readers": readers,
        **{name: None if math.isnan(value) else round(value, 3) for name, value in numbers.items()},
        "segmentations": found.cases,
    }
