"""Three stages over many items, overlapped: while one item is computed, the next is read and the last is written.

Reading and writing scans is decompression and file access, which let other threads run; computing stays in the
caller's thread. At most three items are in memory, so a long cohort needs no more than a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")
Written = TypeVar("Written")


@dataclass(frozen=True)
class Outcome(Generic[Item, Written]):
    """How one item ended: `written`, or the `error` that a stage raised."""

    item: Item
    written: Written | None
    error: Exception | None


def overlapped(
    items: Iterable[Item],
    *,
    read: Callable[[Item], Loaded],
    compute: Callable[[Loaded], Computed],
    write: Callable[[Computed], Written],
) -> Iterator[Outcome[Item, Written]]:
    """Run every item through three stages; an item that fails in one stage does not stop the others.

    Args:
        items: taken one ahead of the computation.
        read: in a thread of its own.
        compute: in the caller's thread, one item at a time.
        write: in a thread of its own; an item is written before the one after it is.

    Yields:
        One outcome per item, in the order of `items`. Anything but an `Exception` (an interruption by the keyboard)
        ends the whole; what is being written then is finished first.
    """
    queue = iter(items)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="read") as reader,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
    ):
        ahead = _next(queue, reader, read)
        behind: tuple[Item, Future[Written]] | None = None
        while ahead is not None:
            item, loading = ahead
            ahead = None
            loaded, error = _result(loading)
            del loading  # else the array that was read stays in memory until the next item is
            ahead = _next(queue, reader, read)
            result: Any = None
            if error is None:
                try:
                    result = compute(loaded)
                except Exception as raised:
                    error = raised
            loaded = None
            if behind is not None:
                yield _outcome(*behind)
                behind = None
            if error is not None:
                yield Outcome(item, None, error)
            else:
                behind = (item, writer.submit(write, result))
            result = None
        if behind is not None:
            yield _outcome(*behind)


def _next(
    queue: Iterator[Item], reader: ThreadPoolExecutor, read: Callable[[Item], Loaded]
) -> tuple[Item, Future[Loaded]] | None:
    for item in queue:
        return item, reader.submit(read, item)
    return None


def _result(future: Future[Any]) -> tuple[Any, Exception | None]:
    try:
        return future.result(), None
    except Exception as error:
        return None, error


def _outcome(item: Item, writing: Future[Written]) -> Outcome[Item, Written]:
    written, error = _result(writing)
    return Outcome(item, written, error)
