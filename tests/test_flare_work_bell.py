"""Requests for work that wait at the server."""

from __future__ import annotations

import inspect
import threading
from types import SimpleNamespace

import pytest

from fediod_med.federation.flare.work_bell import WorkBell, hold_requests

NORTH = SimpleNamespace(name="north")


def test_a_request_is_answered_when_there_is_work_for_its_hospital_and_not_for_another() -> None:
    bell = WorkBell(hold_s=30.0)
    order: list[str] = []

    def answer(client: SimpleNamespace, _context: object) -> tuple[str, str, None]:
        order.append(client.name)
        return "task", client.name, None

    held = hold_requests(answer, bell)
    found: list[tuple[str, object, object]] = []
    asking = threading.Thread(target=lambda: found.append(held(NORTH, None)))
    asking.start()
    bell.ring("south")
    assert held(SimpleNamespace(name="south"), None)[1] == "south"
    bell.ring("north")
    asking.join(timeout=10)
    assert order == ["south", "north"] and found == [("task", "north", None)]


def test_work_that_was_taken_or_withdrawn_rings_no_more_and_an_ended_run_holds_nobody() -> None:
    bell = WorkBell(hold_s=0.01)
    held = hold_requests(lambda _client, _context: ("task", "", None), bell)
    bell.ring("north")
    held(NORTH, None)
    assert not bell.wait("north")
    bell.ring("north")
    bell.silence()
    assert not bell.wait("north")

    patient = WorkBell(hold_s=30.0)
    waiting = threading.Thread(target=patient.wait, args=("north",))
    waiting.start()
    patient.close()
    waiting.join(timeout=10)
    assert not waiting.is_alive() and not patient.wait("south")


def test_a_request_without_work_reaches_the_engine_after_the_hold_and_gets_its_answer() -> None:
    """The engine may have something to say without a task: that the run is over, or a task whose reply was lost."""
    held = hold_requests(lambda _client, _context: ("__end_run__", "", None), WorkBell(hold_s=0.01))
    assert held(NORTH, None) == ("__end_run__", "", None)


def test_the_engine_still_answers_requests_where_they_are_held() -> None:
    """Otherwise the controller only warns, and every trip waits as long as the hospitals' interval."""
    pytest.importorskip("nvflare", reason="the extra `federation` is not installed")
    from nvflare.private.fed.server.server_commands import GetTaskCommand
    from nvflare.private.fed.server.server_runner import ServerRunner

    assert list(inspect.signature(ServerRunner.process_task_request).parameters) == ["self", "client", "fl_ctx"]
    code = GetTaskCommand.process.__code__
    assert {"process_task_request", "RUNNER"} <= set(code.co_names)
