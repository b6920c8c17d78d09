"""A job's process at the server: carries tasks between `distill` and the hospitals, and says how the run stands."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fediod_med.errors import FediodError, ProtocolError
from fediod_med.federation.flare.centre import SegmentEnd, claim, finish, run_rounds
from fediod_med.federation.flare.leftovers import Leftovers
from fediod_med.federation.flare.names import CONTENT, PAUSE_TOPIC, STATUS_TOPIC
from fediod_med.federation.flare.plan import centre_plan
from fediod_med.federation.flare.remote import RemoteFederation
from fediod_med.federation.flare.settings import RunSettings, read_settings
from fediod_med.federation.flare.work_bell import WorkBell, hold_requests
from fediod_med.resources import NOT_FOR_CLINICAL_USE

logger = logging.getLogger(__name__)

LAST_WORD_S = 30.0  # that an ended segment waits for somebody to read how it ended
NO_REPLY = "no reply"


class DistillController(Controller):
    """Runs one segment of a run.

    Args:
        settings: see `settings.read_settings`; where the run lies is in the server's own kit.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._given = dict(settings)
        self._arrived = threading.Condition()
        self._found: dict[str, Mapping[str, Any] | str] = {}
        self._heard: set[str] = set()
        self._bell = WorkBell()
        self._leftovers = Leftovers()
        self._pause = threading.Event()
        self._read = threading.Event()
        self._state = "starting"
        self._reason = ""
        self._records: list[Mapping[str, float]] = []
        self._settings: RunSettings | None = None
        self._federation: RemoteFederation | None = None
        self._fl_ctx: FLContext | None = None
        self._abort: Signal | None = None
        self._round_seconds: list[float] = []

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Register the commands of the administrator."""
        engine = fl_ctx.get_engine()
        engine.register_app_command(STATUS_TOPIC, self._on_status)
        engine.register_app_command(PAUSE_TOPIC, self._on_pause)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to put away: everything is on disk."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """One segment: from the checkpoint to the end of the run, of the segment, or of the quorum."""
        self._fl_ctx, self._abort = fl_ctx, abort_signal
        self._hold_requests(fl_ctx)
        try:
            self._run(fl_ctx)
        except SegmentEnd as end:
            self._state, self._reason = "paused", str(end)
        except ProtocolError as error:
            self._state, self._reason = "short", str(error)
        except FediodError as error:
            self._state, self._reason = "failed", f"{type(error).__name__}: {error}"
        self._bell.close()
        if self._state == "failed":
            logger.error("the run cannot go on: %s", self._reason)
        until = time.monotonic() + LAST_WORD_S
        while not abort_signal.triggered and time.monotonic() < until and not self._read.wait(0.1):
            pass

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """An answer after its trip had ended: dropped, but its hospital is alive."""
        with self._arrived:
            self._heard.add(client.name)
        logger.warning("%s: %s came too late", client.name, task_name)

    def carry(
        self, task: str, contents: Mapping[str, Mapping[str, Any]], *, quorum: int, timeout_s: float, grace_s: float
    ) -> dict[str, Mapping[str, Any] | str]:
        """One task per hospital, all at once; see `remote.Courier.carry`."""
        fl_ctx, abort = self._fl_ctx, self._abort
        assert fl_ctx is not None and abort is not None  # noqa: PT018 (set before anything is carried)
        with self._arrived:
            self._found = {}
        tasks = []
        for site, content in contents.items():
            shareable = Shareable()
            shareable[CONTENT] = dict(content)
            made = Task(name=task, data=shareable, timeout=math.ceil(timeout_s), result_received_cb=self._on_result)
            self.broadcast(task=made, fl_ctx=fl_ctx, targets=[site], min_responses=1)
            self._bell.ring(site)
            tasks.append(made)
        until = time.monotonic() + timeout_s
        with self._arrived:
            while len(self._found) < len(contents) and not abort.triggered:
                good = sum(not isinstance(answer, str) and "refused" not in answer for answer in self._found.values())
                if good >= quorum:
                    until = min(until, time.monotonic() + grace_s)
                    quorum = len(contents) + 1  # the grace begins once
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._arrived.wait(min(left, 0.5))
            found = dict(self._found)
            self._found = {}
        self._bell.silence()
        for made in tasks:
            self.cancel_task(made, fl_ctx=fl_ctx)
        if abort.triggered:
            raise SegmentEnd("the job was aborted")
        return {site: found.get(site, NO_REPLY) for site in contents}

    def heard(self) -> frozenset[str]:
        """See `remote.Courier.heard`."""
        with self._arrived:
            heard, self._heard = frozenset(self._heard), set()
        return heard

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """A hospital that looks for a task is alive, whatever it has missed."""
        if event_type == EventType.BEFORE_PROCESS_TASK_REQUEST:
            peer = fl_ctx.get_peer_context()
            if peer is not None:
                with self._arrived:
                    self._heard.add(str(peer.get_identity_name()))

    def _hold_requests(self, fl_ctx: FLContext) -> None:
        """Make hospitals wait for work at the server. The engine has no hook for it outside its workflow lock."""
        runner = fl_ctx.get_prop(FLContextKey.RUNNER)
        if callable(getattr(runner, "process_task_request", None)):
            runner.process_task_request = hold_requests(runner.process_task_request, self._bell)
        else:  # an engine that is built otherwise: hospitals ask at their interval, which is slower and no less right
            logger.warning("requests for work are not held; each trip waits up to the hospitals' interval")

    def _run(self, fl_ctx: FLContext) -> None:
        settings = self._settings = read_settings(self._given)
        plan = centre_plan(Path(fl_ctx.get_engine().get_workspace().root_dir).resolve())
        folder = plan.runs / settings.run_id
        claim(folder, settings)
        federation = self._federation = RemoteFederation(
            settings.sites,
            self,
            folder=folder,
            grace_s=settings.grace_s,
            settings={"spacing": settings.spacing},
        )
        self._state = "running"
        began = time.monotonic()
        schedule = settings.full_schedule()

        def on_round(record: Mapping[str, float]) -> None:
            nonlocal began
            self._leftovers.sweep()
            number = int(record["round"])
            self._records.append(record)
            self._round_seconds.append(time.monotonic() - began)
            began = time.monotonic()
            if number % schedule.checkpoint_every == 0 or number == schedule.rounds:
                federation.journal.forget(number)
            if number == schedule.rounds:
                return
            if self._pause.is_set():
                raise SegmentEnd("asked to pause")
            if settings.segment_rounds and len(self._records) >= settings.segment_rounds:
                raise SegmentEnd(f"{settings.segment_rounds} rounds done")

        state = run_rounds(federation, settings, folder=folder, device=plan.device, on_round=on_round)
        self._state = "finishing"
        finish(state, federation, settings, folder=folder, device=plan.device)
        self._state = "done"

    def _on_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        result = client_task.result
        code = result.get_return_code()
        content = result.get(CONTENT)
        good = code == ReturnCode.OK and isinstance(content, Mapping)
        with self._arrived:
            self._found[client_task.client.name] = dict(content) if good else f"engine: {code}"
            self._arrived.notify_all()
        client_task.result = None

    def _on_status(self, _topic: str, data: Any, _fl_ctx: FLContext) -> dict[str, Any]:
        """How the run stands, for the administrator; with `last_word`, an ended segment need not wait any longer."""
        federation, settings = self._federation, self._settings
        state = self._state
        if isinstance(data, Mapping) and data.get("last_word") and state in ("done", "paused", "short", "failed"):
            self._read.set()
        recent = self._round_seconds[-20:]
        return {
            "notice": NOT_FOR_CLINICAL_USE,
            "run_id": "" if settings is None else settings.run_id,
            "state": state,
            "reason": self._reason,
            "round": int(self._records[-1]["round"]) if self._records else 0,
            "rounds": 0 if settings is None else settings.full_schedule().rounds,
            "seconds_per_round": sorted(recent)[len(recent) // 2] if recent else None,
            "absent": [] if federation is None else list(federation.absent),
            "misses": {} if federation is None else dict(federation.misses),
            "spent": {} if federation is None else dict(federation.spent),
            "bytes": {} if federation is None else {"down": federation.bytes_down, "up": federation.bytes_up},
        }

    def _on_pause(self, _topic: str, _data: Any, _fl_ctx: FLContext) -> dict[str, Any]:
        """End the segment after the round that is under way."""
        self._pause.set()
        return {"pausing": True}
