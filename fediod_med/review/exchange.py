"""Reviews as CSV and JSON, out and in again: whole chains, so that what comes back can be checked.

Spreadsheets run text that begins with `=`, `+`, `-`, `@` as a formula. In CSV such text gets an apostrophe in front
(OWASP, CSV injection), text that begins with an apostrophe gets another, and reading takes one off: nothing is lost.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fediod_med.errors import InputError
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.review.events import COLUMNS, GENESIS, KINDS, Event, canonical, problems_of_chain
from fediod_med.review.store import ReviewStore

_FORMAT = 1
_RISKY = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "＝", "＋", "－", "＠")
_WHOLE_NUMBERS = ("sequence", "rating_tc", "rating_wt", "rating_et")
_OPTIONAL = ("rating_tc", "rating_wt", "rating_et")
_NOTICE = "notice"


def export_json(store: ReviewStore) -> str:
    """Every event of a store as JSON, with the notice and the head of the chain."""
    events = store.events()
    content = {
        "notice": NOT_FOR_CLINICAL_USE,
        "format": _FORMAT,
        "head": {"sequence": len(events) - 1, "hash": events[-1].hash if events else GENESIS},
        "events": [asdict(event) for event in events],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def export_csv(store: ReviewStore) -> str:
    """Every event of a store as CSV, one line each, safe to open in a spreadsheet."""
    return events_csv(store.events())


def events_csv(events: Iterable[Event]) -> str:
    """Some events as CSV, for example the current ones; only a whole chain can be imported again."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([*COLUMNS, _NOTICE])
    for event in events:
        row = asdict(event)
        row |= {"tags": canonical(list(event.tags)), "detail": canonical(event.detail)}
        writer.writerow([*(_cell(row[name]) for name in COLUMNS), NOT_FOR_CLINICAL_USE])
    return text.getvalue()


def import_text(store: ReviewStore, text: str) -> int:
    """Take an export, CSV or JSON, into a store; importing it twice adds nothing.

    Returns:
        How many events were new.

    Raises:
        InputError: not an export, or changed, or it contradicts what is in the store.
    """
    return store.take_in(parse_export(text))


def parse_export(text: str) -> tuple[Event, ...]:
    """The events of an export, CSV or JSON, with the chain checked.

    Raises:
        InputError: not an export, or an event is missing, doubled or changed.
    """
    text = text.removeprefix("\ufeff")
    head: Mapping[str, Any] | None = None
    try:
        if text.lstrip().startswith("{"):
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise InputError(f"import: expected format {_FORMAT}, found {content['format']!r}; update fediod-med")
            head = content["head"]
            events = tuple(_event(row) for row in content["events"])
        else:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            if tuple(reader.fieldnames or ()) != (*COLUMNS, _NOTICE):
                raise ValueError("other columns")
            events = tuple(_event(_uncell(row)) for row in reader)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(
            f"import: expected an export of reviews (CSV or JSON), found something else ({error})"
        ) from None
    problems = problems_of_chain(events)
    last = {"sequence": len(events) - 1, "hash": events[-1].hash if events else GENESIS}
    if head is not None and dict(head) != last:
        problems.append("the newest events are missing")
    if problems:
        raise InputError(f"import: expected an export as it was written, found a changed one: {problems[0]}")
    return events


def _event(row: Mapping[str, Any]) -> Event:
    if set(row) != set(COLUMNS) or row["kind"] not in KINDS:
        raise ValueError(f"columns {', '.join(map(str, row))}")
    numbers = {"seconds": float(row["seconds"])}
    return Event(**{**row, **numbers, "tags": tuple(row["tags"]), "detail": dict(row["detail"])})


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(_RISKY) else value


def _uncell(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in COLUMNS:
        text = row[name].removeprefix("'")
        if name in _WHOLE_NUMBERS:
            found[name] = None if name in _OPTIONAL and not text else int(text)
        else:
            found[name] = json.loads(text) if name in ("tags", "detail") else text
    return found
