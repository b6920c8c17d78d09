"""One thing that a reviewer did, as it is kept for good: checked when it comes in, chained to the one before.

A review never changes: a correction is a new event that names the one it supersedes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fediod_med.errors import SettingsError
from fediod_med.labels import REGIONS

VERDICTS = ("accept", "minor", "major", "reject")
RATINGS = (1, 2, 3, 4)
"""1 not usable, 2 large corrections, 3 small corrections, 4 as an expert would draw it."""
TAGS = ("missed lesion", "false positive", "wrong side", "artefact", "wrong sequence")
KINDS = ("review", "assignment", "reveal")
GENESIS = "0" * 64

_REVIEWER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"(?:[0-9a-f]{64})?")
_LONGEST_NAME, _LONGEST_COMMENT = 256, 4000


@dataclass(frozen=True)
class Review:
    """What a reviewer says about one segmentation; checked when made.

    Attributes:
        reviewer: id (letters, digits, `.`, `_`, `-`), a code rather than a name.
        run: run or folder that the case was segmented in.
        case: study code.
        arm: name of the model, or `A` or `B` where it is hidden.
        verdict: one of `VERDICTS`: accept, minor or major edit needed, reject.
        ratings: 1 to 4 by region (TC, WT, ET); a region that was not rated is left out.
        comment: free text, without names.
        tags: from `TAGS`.
        seconds: time spent on the case.
        mask_sha256: of the label map that was shown.
        image_sha256: of the images that were shown.
        detail: anything else that is worth keeping, such as the view's settings; plain values.
        submission: key of this one press of the button; sending it again changes nothing.

    Raises:
        SettingsError: a value outside these bounds.
    """

    reviewer: str
    run: str
    case: str
    arm: str
    verdict: str
    ratings: Mapping[str, int] = field(default_factory=dict)
    comment: str = ""
    tags: tuple[str, ...] = ()
    seconds: float = 0.0
    mask_sha256: str = ""
    image_sha256: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    submission: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise SettingsError(f"review: expected a verdict among {', '.join(VERDICTS)}, found {self.verdict!r}")
        for region, rating in self.ratings.items():
            if region not in REGIONS or isinstance(rating, bool) or rating not in RATINGS:
                raise SettingsError(
                    f"review: expected ratings 1 to 4 of {', '.join(REGIONS)}, found {region}: {rating!r}"
                )
        unknown = [tag for tag in self.tags if tag not in TAGS]
        if unknown:
            raise SettingsError(f"review: expected tags among {', '.join(TAGS)}, found {', '.join(unknown)}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise SettingsError(f"review: expected a time spent of 0 s or more, found {self.seconds}")
        check_who_and_what(self.reviewer, self.run, self.case, self.arm, self.submission)
        check_text("comment", self.comment, longest=_LONGEST_COMMENT, lines=True)
        if not (_SHA256.fullmatch(self.mask_sha256) and _SHA256.fullmatch(self.image_sha256)):
            raise SettingsError(
                "review: expected SHA-256 hashes of mask and image in hexadecimal, found something else"
            )


@dataclass(frozen=True)
class Event:
    """One line of the store.

    Attributes:
        sequence: from 0, without gaps.
        event_id: UUID.
        submission: key of the request that made it; at most one event has it.
        kind: `review`, `assignment` (which model is A) or `reveal` (the names were shown).
        time: UTC, ISO 8601.
        reviewer: id.
        run: run or folder.
        case: study code.
        arm: model, `A` or `B`; empty unless a review.
        mask_sha256: of the label map that was shown.
        image_sha256: of the images that were shown.
        verdict: empty unless a review.
        rating_tc: 1 to 4 or none.
        rating_wt: 1 to 4 or none.
        rating_et: 1 to 4 or none.
        comment: free text.
        tags: from `TAGS`.
        seconds: time spent.
        supersedes: the event that this one corrects, or empty.
        detail: plain values.
        version: of fediod-med.
        origin: hash in the store that it was imported from, or empty.
        previous: hash of the event before; `GENESIS` for the first.
        hash: SHA-256 of all the above.
    """

    sequence: int
    event_id: str
    submission: str
    kind: str
    time: str
    reviewer: str
    run: str
    case: str
    arm: str = ""
    mask_sha256: str = ""
    image_sha256: str = ""
    verdict: str = ""
    rating_tc: int | None = None
    rating_wt: int | None = None
    rating_et: int | None = None
    comment: str = ""
    tags: tuple[str, ...] = ()
    seconds: float = 0.0
    supersedes: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    origin: str = ""
    previous: str = ""
    hash: str = ""

    @property
    def ratings(self) -> dict[str, int]:
        """Rating by region, where given."""
        found = {region: getattr(self, f"rating_{region.lower()}") for region in REGIONS}
        return {region: rating for region, rating in found.items() if rating is not None}

    @property
    def subject(self) -> tuple[str, str, str, str]:
        """What a later event of the same kind supersedes: reviewer, run, case and arm."""
        return self.reviewer, self.run, self.case, self.arm

    def sealed(self) -> Event:
        """The same event with its hash."""
        return replace(self, hash=self.digest())

    def digest(self) -> str:
        """SHA-256 of everything but the hash itself."""
        body = {name: getattr(self, name) for name in COLUMNS if name != "hash"}
        return hashlib.sha256(canonical({**body, "tags": list(self.tags)}).encode()).hexdigest()

    def same_content(self, other: Event) -> bool:
        """Whether two events tell the same, wherever they stand in whichever store."""

        def told(event: Event) -> Event:
            return replace(event, sequence=0, previous="", hash="", origin="")

        return told(self) == told(other)


COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Event))
"""Of the table and of exports, in order."""


def check_who_and_what(reviewer: str, run: str, case: str, arm: str, submission: str) -> None:
    """Refuse ids that are empty, too long or hold control characters; `SettingsError` names the one."""
    if not _REVIEWER.fullmatch(reviewer):
        raise SettingsError(
            f"reviewer: expected a code of letters, digits, '.', '_' and '-', at most 64, found {reviewer!r}"
        )
    for name, value in (("run", run), ("case", case), ("submission", submission)):
        if not value:
            raise SettingsError(f"review: expected the {name}, found nothing")
        check_text(name, value, longest=_LONGEST_NAME)
    check_text("arm", arm, longest=_LONGEST_NAME)


def check_text(name: str, value: str, *, longest: int, lines: bool = False) -> None:
    """Refuse text that is too long, not Unicode, or holds control characters; `lines` allows tabs and line ends."""
    allowed = "\t\n\r" if lines else ""
    strange = [c for c in value if (ord(c) < 32 and c not in allowed) or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000]
    if len(value) > longest or strange:
        raise SettingsError(
            f"{name}: expected text of at most {longest} characters without control characters, found "
            f"{len(value)} characters{f' with {strange[0]!r}' if strange else ''}"
        )


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces and ASCII only: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain_detail(detail: Mapping[str, Any]) -> dict[str, Any]:
    """The same detail as JSON gives it back; `SettingsError` for values that JSON cannot hold."""
    try:
        found: dict[str, Any] = json.loads(canonical(dict(detail)))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"review: expected plain values as detail, found something else ({error})") from error
    return found


def problems_of_chain(events: Iterable[Event], *, whole: bool = True) -> list[str]:
    """What is wrong with a chain of events, at most one sentence per event.

    Args:
        events: in order.
        whole: the chain begins at the first event of a store.
    """
    problems: list[str] = []
    previous, number = GENESIS, 0
    seen: set[str] = set()
    for event in events:
        if not whole and not seen:
            previous, number = event.previous, event.sequence
        if event.digest() != event.hash:
            problems.append(f"event {event.sequence}: was changed after it was written")
        elif event.sequence != number or event.previous != previous:
            problems.append(f"event {event.sequence}: an event before it is missing, or out of order")
        elif {event.event_id, event.submission} & seen:
            problems.append(f"event {event.sequence}: is there twice")
        seen |= {event.event_id, event.submission}
        previous, number = event.hash, event.sequence + 1
    return problems


def current_of(events: Iterable[Event]) -> tuple[Event, ...]:
    """The reviews that hold now: of each reviewer, run, case and arm the one that nothing supersedes.

    Where imports brought two lines of corrections together, the later time counts.
    """
    reviews = [event for event in events if event.kind == "review"]
    replaced = {event.supersedes for event in reviews if event.supersedes}
    latest: dict[tuple[str, str, str, str], Event] = {}
    for event in reviews:
        if event.event_id in replaced:
            continue
        held = latest.get(event.subject)
        if held is None or (event.time, event.sequence) > (held.time, held.sequence):
            latest[event.subject] = event
    return tuple(sorted(latest.values(), key=lambda event: event.sequence))
