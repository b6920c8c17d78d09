"""Segments many scans in one go: overlapped, resumable, one failure at a time, with a record of each case.

A case is done when its record `records/<case>.json` exists: it is written last, after every output was written, synced
and read back, and it names them with their SHA-256. `resume` keeps a case only if its record tells of the same model,
the same options and the same input files, and its outputs still have those hashes. Killed at any moment, the folder
holds whole files only, and a second call does what is missing and nothing twice.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fediod_med.checkpoints import current_commit
from fediod_med.durable import write_atomically
from fediod_med.errors import FediodError, SettingsError
from fediod_med.findings import Finding, RefusedInput, Severity
from fediod_med.inference import privacy_banner
from fediod_med.pipeline import overlapped
from fediod_med.progress import Progress, silent
from fediod_med.records import run_record, sha256, write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.segmentation.inputs import Case
from fediod_med.segmentation.reading import input_files
from fediod_med.segmentation.steps import CaseSegmenter
from fediod_med.segmentation.writing import Written

logger = logging.getLogger(__name__)

RECORDS = "records"
VOLUME_COLUMNS = ("NCR", "ED", "ET", "TC", "WT")
SUPERSEDED = ".superseded"


@dataclass(frozen=True)
class CaseResult:
    """How one case of a cohort ended.

    Attributes:
        case_id: the case.
        status: `done`, `kept` (finished by an earlier call) or `failed`.
        record: what `records/<case>.json` holds.
    """

    case_id: str
    status: str
    record: Mapping[str, Any]


def segment_cohort(
    cases: Sequence[Case],
    segmenter: CaseSegmenter,
    *,
    resume: bool = False,
    part: str = "",
    on_result: Callable[[CaseResult], None] | None = None,
    progress: Progress = silent,
) -> tuple[CaseResult, ...]:
    """Segment every case into `segmenter.out` and write `run.json`, `volumes.csv`, `failures.csv`.

    Args:
        cases: with distinct ids.
        segmenter: model, options and output folder.
        resume: keep what an earlier call finished with the same model, options and inputs.
        part: added to the names of the tables when several processes share one folder (`-part-1-of-4`).
        on_result: called once per case, in order.
        progress: shown on the command line.

    Returns:
        One result per case, in the order of `cases`.

    Raises:
        SettingsError: another process works on the same part of the same folder.
    """
    out = segmenter.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    results: dict[str, CaseResult] = {}

    def settle(result: CaseResult) -> None:
        results[result.case_id] = result
        if on_result is not None:
            on_result(result)
        progress("segment", len(results), len(cases), result.case_id)

    with _sole_user(out, part):
        waiting: list[Case] = []
        for case in cases:
            kept = finished(case, segmenter) if resume else None
            if kept is None:
                waiting.append(case)
            else:
                settle(CaseResult(case.case_id, "kept", kept))
        outcomes = overlapped(waiting, read=segmenter.read, compute=segmenter.compute, write=segmenter.write)
        for outcome in outcomes:
            if outcome.error is None and outcome.written is not None:
                record = _done(outcome.written, segmenter)
            else:
                record = _failed(outcome.item, outcome.error, segmenter)
            _set_aside(outcome.item.case_id, record, out)
            write_json(out / RECORDS / f"{outcome.item.case_id}.json", record)
            settle(CaseResult(outcome.item.case_id, str(record["status"]), record))
        ordered = tuple(results[case.case_id] for case in cases)
        _write_tables(ordered, segmenter, part=part, seconds=time.perf_counter() - began)
    return ordered


def segment_one(case: Case, segmenter: CaseSegmenter) -> tuple[CaseResult, Written]:
    """Segment one case, with the same records; a failure is raised, nothing is written then, and old outputs set aside.

    Raises:
        InputError: the case cannot be segmented (`RefusedInput` with its findings).
        SettingsError: another process works on the same folder, or an output does not fit the input.
    """
    began = time.perf_counter()
    try:
        computed = segmenter.compute(segmenter.read(case))
    except FediodError:
        _set_aside(case.case_id, {"outputs": {}}, segmenter.out)
        raise
    segmenter.out.mkdir(parents=True, exist_ok=True)
    with _sole_user(segmenter.out, ""):
        written = segmenter.write(computed)
        result = CaseResult(case.case_id, "done", _done(written, segmenter))
        _set_aside(case.case_id, result.record, segmenter.out)
        write_json(segmenter.out / RECORDS / f"{case.case_id}.json", result.record)
        _write_tables((result,), segmenter, part="", seconds=time.perf_counter() - began)
    return result, written


def finished(case: Case, segmenter: CaseSegmenter) -> Mapping[str, Any] | None:
    """The record of a case that an earlier call finished and that is still whole, or `None`."""
    path = segmenter.out / RECORDS / f"{case.case_id}.json"
    if case.problem is not None or not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = (
            record["status"] == "done"
            and record["setting"] == segmenter.setting
            and record["inputs"] == input_files(case)
            and all(sha256(segmenter.out / name) == digest for name, digest in record["outputs"].items())
        )
    except (FediodError, OSError, ValueError, KeyError, TypeError) as error:
        logger.info("%s: done again, its record or an output cannot be read (%s)", case.case_id, error)
        return None
    return record if same else None


def _done(written: Written, segmenter: CaseSegmenter) -> dict[str, Any]:
    """Record of a finished case."""
    return {
        "notice": NOT_FOR_CLINICAL_USE,
        "case": written.case_id,
        "status": "done",
        "setting": segmenter.setting,
        "inputs": written.inputs,
        "outputs": {path.relative_to(segmenter.out).as_posix(): sha256(path) for path in written.paths.values()},
        "kinds": {kind: path.relative_to(segmenter.out).as_posix() for kind, path in written.paths.items()},
        "volumes_ml": {name: round(ml, 3) for name, ml in written.volumes_ml.items()},
        "quality": written.quality,
        "findings": [found.model_dump(mode="json") for found in written.findings],
        "notes": list(written.notes),
        "seconds": {stage: round(spent, 3) for stage, spent in written.seconds.items()},
    }


def _failed(case: Case, error: Exception | None, segmenter: CaseSegmenter) -> dict[str, Any]:
    """Record of a case without output; an unexpected error is named by its type and logged in full."""
    findings: tuple[Finding, ...] = error.findings if isinstance(error, RefusedInput) else ()
    if isinstance(error, FediodError):
        reason = str(error)
    else:
        reason = f"unexpected {type(error).__name__}: {error}"
        logger.error("%s: %s", case.case_id, reason, exc_info=error)
    return {
        "notice": NOT_FOR_CLINICAL_USE,
        "case": case.case_id,
        "status": "failed",
        "setting": segmenter.setting,
        "reason": reason,
        "expected": isinstance(error, FediodError),
        "findings": [found.model_dump(mode="json") for found in findings],
        "outputs": {},
    }


def _set_aside(case_id: str, record: Mapping[str, Any], out: Path) -> None:
    """Rename what the case's earlier record names and `record` does not, by a number where that name is taken too."""
    path = out / RECORDS / f"{case_id}.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["outputs"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: earlier record unreadable (%s); older outputs of this case may lie beside", path, error)
        return
    for name in set(earlier) - set(record["outputs"]):
        old = (out / name).resolve()
        if not old.is_file() or not old.is_relative_to(out.resolve()):
            continue
        aside, number = old.with_name(old.name + SUPERSEDED), 1
        while aside.exists():
            number += 1
            aside = old.with_name(f"{old.name}{SUPERSEDED}-{number}")
        old.rename(aside)
        logger.warning("%s: output of an earlier call set aside as %s", name, aside.name)


def _write_tables(results: Sequence[CaseResult], segmenter: CaseSegmenter, *, part: str, seconds: float) -> None:
    out = segmenter.out
    done = [result for result in results if result.status != "failed"]
    volumes = [
        [result.case_id, *(result.record["volumes_ml"].get(name, "") for name in VOLUME_COLUMNS), _quality(result)]
        for result in done
    ]
    _write_csv(out / f"volumes{part}.csv", ["case", *(f"{name}_ml" for name in VOLUME_COLUMNS), "quality"], volumes)
    failures = [
        [result.case_id, " ".join(sorted({f["code"] for f in _errors(result)})), result.record["reason"]]
        for result in results
        if result.status == "failed"
    ]
    _write_csv(out / f"failures{part}.csv", ["case", "codes", "reason"], failures)
    record = run_record(
        command="segment",
        device=str(segmenter.device),
        commit=current_commit(),
        options=segmenter.options_as_json(),
        privacy=privacy_banner(segmenter.model.provenance),
        seconds={"all": seconds},
        inputs=[segmenter.model.path],
        cases={
            result.case_id: {
                "status": result.status,
                **{key: result.record[key] for key in ("seconds", "notes", "reason", "inputs") if key in result.record},
                "findings": [found["code"] for found in result.record["findings"]],
            }
            for result in results
        },
    )
    write_json(out / f"run{part}.json", record)


def _quality(result: CaseResult) -> Any:
    found = result.record.get("quality")
    return "" if not found else found.get("value", "")


def _errors(result: CaseResult) -> Iterator[Mapping[str, Any]]:
    """Findings that stand for a failure: errors, or with `--strict` whatever there is."""
    found = result.record["findings"]
    errors = [f for f in found if f["severity"] == Severity.ERROR.value]
    return iter(errors or found)


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


@contextmanager
def _sole_user(out: Path, part: str) -> Iterator[None]:
    """Keep a second process from the same part of the same folder; freed by the system when this one ends."""
    path = out / f".lock{part}"
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"{out}: another process is writing this folder; wait for it, choose another --out, or give each "
                "process its own part with --num-parts and --part-id"
            ) from None
        yield
