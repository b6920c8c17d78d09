"""Overlapped stages: order, isolation of failures, bounded look-ahead, and real overlap."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from fediod_med.pipeline import overlapped


def test_results_come_in_order_and_a_failure_stays_with_its_item() -> None:
    def read(item: int) -> int:
        if item == 1:
            raise ValueError("unreadable")
        return item * 10

    def compute(value: int) -> int:
        if value == 30:
            raise RuntimeError("no memory")
        return value + 1

    def write(value: int) -> str:
        if value == 41:
            raise OSError("disk full")
        return f"w{value}"

    outcomes = list(overlapped(range(6), read=read, compute=compute, write=write))
    assert [o.item for o in outcomes] == [0, 1, 2, 3, 4, 5]
    assert [o.written for o in outcomes] == ["w1", None, "w21", None, None, "w51"]
    assert [type(o.error) for o in outcomes] == [
        *(type(None), ValueError, type(None)),
        *(RuntimeError, OSError, type(None)),
    ]


def test_nothing_in_nothing_out() -> None:
    assert list(overlapped([], read=int, compute=int, write=int)) == []


def test_the_next_item_is_read_while_one_is_computed() -> None:
    second_read = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            second_read.set()
        return item

    def compute(value: int) -> int:
        if value == 0:
            assert second_read.wait(10), "item 1 was not read while item 0 was computed"
        return value

    assert [o.error for o in overlapped([0, 1], read=read, compute=compute, write=lambda v: v)] == [None, None]


def test_an_item_is_written_while_the_next_is_computed() -> None:
    second_computing, release = threading.Event(), threading.Event()

    def compute(value: int) -> int:
        if value == 1:
            second_computing.set()
            assert release.wait(10)
        return value

    def write(value: int) -> int:
        if value == 0:
            assert second_computing.wait(10), "item 1 was not computed while item 0 was written"
            release.set()
        return value

    assert [o.error for o in overlapped([0, 1], read=lambda v: v, compute=compute, write=write)] == [None, None]


def test_items_are_taken_one_ahead_only() -> None:
    taken = []

    def items():
        for i in range(10):
            taken.append(i)
            yield i

    seen = []
    for outcome in overlapped(items(), read=lambda v: v, compute=lambda v: seen.append(len(taken)), write=lambda v: v):
        assert outcome.error is None
    assert seen == [2, 3, 4, 5, 6, 7, 8, 9, 10, 10]


def test_at_most_three_items_are_alive() -> None:
    class Scan:
        pass

    alive: list[weakref.ref] = []
    most = 0

    def read(item: int) -> Scan:
        scan = Scan()
        alive.append(weakref.ref(scan))
        return scan

    def compute(scan: Scan) -> Scan:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return scan

    list(overlapped(range(12), read=read, compute=compute, write=lambda scan: None))
    assert most <= 3


def test_an_interruption_ends_the_whole() -> None:
    def compute(value: int) -> int:
        if value == 1:
            raise KeyboardInterrupt
        return value

    written: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        list(overlapped(range(5), read=lambda v: v, compute=compute, write=written.append))
    assert written == [0]
