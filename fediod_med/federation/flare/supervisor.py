"""Drives a run to one of its own ends, from the administrator's machine: segments at the engine, one after another.

A job of the engine ends when one hospital's process dies, never takes a hospital back, and is lost with the server. A
run is therefore a chain of jobs with the same settings; each goes on from the centre's checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.api_spec import InternalError
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from fediod_med.errors import FediodError, SettingsError
from fediod_med.federation.flare.jobs import write_job
from fediod_med.federation.flare.names import PAUSE_TOPIC, STATUS_TOPIC
from fediod_med.federation.flare.provision import ADMIN
from fediod_med.federation.flare.settings import RunSettings
from fediod_med.records import write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE

logger = logging.getLogger(__name__)

COMPLETED, FAILED, STOPPED, ACTIVE = "completed", "failed", "stopped", "active"
ENDED = ("done", "paused", "short", "failed")  # states in which a segment reports its last word
FRESH_S = 30.0  # a hospital that was heard from so recently is connected; heartbeats come every 10 s
LONGEST_PAUSE_S = 30.0
LAST_WORD_S = 15.0  # that the engine may take to end a job whose segment is over
_FINISHED = "FINISHED"


class Supervisor:
    """One run, watched until it is completed, failed or stopped.

    Args:
        kit: of the administrator.
        settings: of the run.
        poll_s: seconds between looks.
        patience_s: seconds to wait for hospitals beyond the quorum before a segment begins without them; the first
            segment waits for all.
        retries: segments in a row that may end without a new round.
        announce: receives a line at each change.
    """

    def __init__(
        self,
        kit: Path,
        settings: RunSettings,
        *,
        poll_s: float = 1.0,
        patience_s: float = 60.0,
        retries: int = 10,
        announce: Callable[[str], None] = logger.info,
    ) -> None:
        self._kit = kit
        self._settings = settings
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._retries = retries
        self._announce = announce
        self._path = record_path(kit, settings.run_id)
        self._record: dict[str, Any] = read_record(kit, settings.run_id) or new_record(settings.run_id)

    def run(self) -> dict[str, Any]:
        """Submit segments until the run has ended; returns the record, whose `state` says how.

        Raises:
            SettingsError: the run has ended before.
        """
        if self._record.get("state") in (COMPLETED, FAILED, STOPPED):
            raise SettingsError(
                f"run {self._settings.run_id}: is {self._record['state']} already; give the next run another id"
            )
        self._set(ACTIVE, "")
        fruitless = 0
        while True:
            before = self._round()
            try:
                with session(self._kit) as engine:
                    end, reason = self._segment(engine)
            except FediodError:
                raise
            except Exception as error:  # the engine's session raises whatever its transport does
                end, reason = "lost", f"{type(error).__name__}: {error}"
            if self._stopped():
                return self._record
            if end == "done":
                return self._set(COMPLETED, "")
            if end == "failed":
                return self._set(FAILED, reason)
            fruitless = 0 if self._round() > before or end == "paused" else fruitless + 1
            if fruitless > self._retries:
                return self._set(FAILED, f"{fruitless} segments in a row brought no round; the last: {reason}")
            self._set(ACTIVE, f"segment ended: {end} ({reason})")
            time.sleep(min(2.0**fruitless - 1, LONGEST_PAUSE_S))

    def _segment(self, engine: Session) -> tuple[str, str]:
        """One job, from submission to its end: `done`, `paused`, `short`, `failed` or the engine's word, and why."""
        for job in _jobs(engine, self._settings.run_id):
            _abort(engine, job)  # left over from a supervisor or a server that died
        if not self._await_hospitals(engine):
            return "stopped", ""
        with tempfile.TemporaryDirectory() as scratch:
            job = engine.submit_job(str(write_job(Path(scratch) / f"fediod-{self._settings.run_id}", self._settings)))
        self._record["segments"].append({"job": job, "began": _now()})
        self._set(ACTIVE, f"segment {len(self._record['segments'])} submitted")
        return self._watch(engine, job)

    def _await_hospitals(self, engine: Session) -> bool:
        """Wait until enough hospitals are connected; False when the run was stopped meanwhile."""
        until = time.monotonic() + self._patience_s
        while not self._stopped():
            missing = set(self._settings.sites) - connected(engine)
            enough = len(self._settings.sites) - len(missing) >= self._settings.quorum
            if not missing or (enough and self._round() > 0 and time.monotonic() > until):
                return True
            self._set(ACTIVE, f"waiting for {', '.join(sorted(missing))}")
            time.sleep(self._poll_s)
        return False

    def _watch(self, engine: Session, job: str) -> tuple[str, str]:
        asked_to_pause, over_since = False, math.inf
        while True:
            standing = str(engine.get_job_meta(job)["status"])
            if standing == "RUNNING" and not self._has_ended(job):  # its process has gone after its last word
                self._look(engine, job)
                if not asked_to_pause and self._somebody_is_back(engine, job):
                    engine.do_app_command(job, PAUSE_TOPIC, {})
                    asked_to_pause = True
            if standing.startswith(_FINISHED):
                status = self._record["status"] if self._record["status"].get("job") == job else {}
                segment = self._record["segments"][-1]
                segment |= {"ended": _now(), "engine": standing, "state": status.get("state", "")}
                if status.get("state") in ENDED:
                    return str(status["state"]), str(status.get("reason", ""))
                return standing, "the engine ended the job"
            if self._stopped():
                _abort(engine, job)
                return "stopped", ""
            if self._has_ended(job):
                over_since = min(over_since, time.monotonic())
            if time.monotonic() > over_since + LAST_WORD_S:
                _abort(engine, job)  # it has said its last word; only the engine waits for somebody who is gone
                over_since = math.inf
            time.sleep(self._poll_s)

    def _has_ended(self, job: str) -> bool:
        """Whether this segment has said its last word."""
        return self._record["status"].get("job") == job and self._record["status"].get("state") in ENDED

    def _look(self, engine: Session, job: str) -> None:
        try:
            status = engine.do_app_command(job, STATUS_TOPIC, {"last_word": True})
        except Exception as error:  # a job's process that is not ready yet, or gone already
            logger.debug("no status of %s: %s", job, error)
            return
        # A later segment starts to count at its checkpoint; the run does not go back with it.
        self._record["furthest"] = max(self._round(), int(status.get("round", 0)))
        self._record["status"] = {**status, "job": job}
        self._save()

    def _somebody_is_back(self, engine: Session, job: str) -> bool:
        """Whether a hospital that the segment has given up is connected, and not merely slow."""
        absent = self._record["status"].get("absent") or []
        for site in set(absent) & connected(engine):
            running = engine.get_client_job_status([site]) or []
            if not any(job in json.dumps(entry) for entry in running):
                self._announce(f"{site} is back; the next segment takes it in")
                return True
        return False

    def _round(self) -> int:
        return int(self._record.get("furthest", 0))

    def _stopped(self) -> bool:
        """Whether `stop` has written to the record meanwhile."""
        written = read_record(self._kit, self._settings.run_id)
        if written is not None and written.get("state") == STOPPED:
            self._record = written
            return True
        return False

    def _set(self, state: str, reason: str) -> dict[str, Any]:
        if (state, reason) != (self._record.get("state"), self._record.get("reason")):
            self._announce(f"run {self._settings.run_id}: {state}" + (f", {reason}" if reason else ""))
        self._record |= {"state": state, "reason": reason}
        self._save()
        return self._record

    def _save(self) -> None:
        if not self._stopped():
            self._record["updated"] = _now()
            write_json(self._path, self._record)


def record_path(kit: Path, run_id: str) -> Path:
    """Where the administrator's kit keeps how a run stands."""
    return kit / "runs" / f"{run_id}.json"


def read_record(kit: Path, run_id: str) -> dict[str, Any] | None:
    """How a run stands by the administrator's record; None when there is none."""
    path = record_path(kit, run_id)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def new_record(run_id: str) -> dict[str, Any]:
    """The record of a run that has no segment yet."""
    return {"notice": NOT_FOR_CLINICAL_USE, "run_id": run_id, "segments": [], "status": {}}


def stop(kit: Path, run_id: str) -> int:
    """End a run for good: its record says so, and its jobs at the engine are aborted; returns how many there were.

    Raises:
        SettingsError: the run has ended before.
    """
    record = read_record(kit, run_id) or {
        "notice": NOT_FOR_CLINICAL_USE,
        "run_id": run_id,
        "segments": [],
        "status": {},
    }
    if record.get("state") in (COMPLETED, FAILED):
        raise SettingsError(f"run {run_id}: is {record['state']} already; there is nothing to stop")
    reason = "stopped by the administrator"
    write_json(record_path(kit, run_id), record | {"state": STOPPED, "reason": reason, "updated": _now()})
    with session(kit) as engine:
        jobs = _jobs(engine, run_id)
        for job in jobs:
            _abort(engine, job)
    return len(jobs)


@contextmanager
def session(kit: Path, *, timeout_s: float = 10.0) -> Iterator[Session]:
    """A session of the administrator with the server; closed again, or the process would not end."""
    if not (kit / "startup" / "fed_admin.json").is_file():
        raise SettingsError(f"{kit}: expected the administrator's startup kit, found none; give the folder of that kit")
    opened = new_secure_session(ADMIN, str(kit), timeout=timeout_s)
    try:
        yield opened
    finally:
        opened.close()


def connected(engine: Session) -> set[str]:
    """Hospitals that the server has heard from lately."""
    since = time.time() - FRESH_S
    return {
        client.name
        for client in engine.get_system_info().client_info
        if client.last_connect_time is not None and client.last_connect_time > since
    }


def _jobs(engine: Session, run_id: str) -> list[str]:
    """Jobs of a run that the server believes alive."""
    found: list[Mapping[str, Any]] = engine.list_jobs(name_prefix=f"fediod-{run_id}") or []
    return [
        str(job["job_id"])
        for job in found
        if job.get("job_name", job.get("name")) == f"fediod-{run_id}" and not str(job["status"]).startswith(_FINISHED)
    ]


def _abort(engine: Session, job: str) -> None:
    """End a job; one that a restarted server still lists as running, but does not run, needs no end."""
    try:
        engine.abort_job(job)
    except InternalError as error:
        logger.info("job %s was not aborted: %s", job, error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
