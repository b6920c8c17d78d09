"""A distillation run as it lies on disk, read without changing it; what is absent is `None`, with a reason."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fediod_med.errors import InputError
from fediod_med.labels import REGIONS
from fediod_med.review.roots import lies_in, read_json
from fediod_med.review.synthetic_folder import SyntheticVolume, synthetic_quality, synthetic_volumes

_Part = TypeVar("_Part")
_PRIVATE_MODES = ("dp-sgd", "gradient")


@dataclass(frozen=True)
class SitePrivacy:
    """What a run claims about one hospital.

    Attributes:
        site: name.
        mode: `dp-sgd`, `gradient`, `none`, or `unknown`.
        private: a bound is claimed.
        epsilon: by RDP, where claimed.
        epsilon_prv: by the tighter accountant.
        budget: epsilon that must not be exceeded.
        delta: of the claim.
        patients: declared.
        words: the claim in a few words, `NOT PRIVATE` where there is none.
        statement: in one paragraph.
    """

    site: str
    mode: str
    private: bool
    epsilon: float | None
    epsilon_prv: float | None
    budget: float | None
    delta: float | None
    patients: int | None
    words: str
    statement: str


@dataclass(frozen=True)
class CaseScore:
    """One region of one held-out case under one model.

    Attributes:
        model: key of the comparison (`student`, `ensemble`, `site:<name>`, ...).
        case: id.
        site: hospital.
        region: TC, WT or ET.
        dice: 0 to 1.
        hd95_mm: mm.
        reference_empty: the reference has nothing of this region, so Dice is 0 or 1 by convention.
    """

    model: str
    case: str
    site: str
    region: str
    dice: float
    hd95_mm: float
    reference_empty: bool


@dataclass(frozen=True)
class RunFolder:
    """Everything small of a run; ledgers are read by `ledger_timeline`.

    Attributes:
        path: the folder.
        run_id: from `run_id`; the folder's name where there is none.
        banner: one line for every page: `NOT PRIVATE` as soon as one hospital is not, or cannot be shown to be.
        summary: `summary.json`.
        record: `run.json`.
        rows: scores by model, as `evaluation.summarise` gives them.
        sites: names of the hospitals.
        privacy: per hospital.
        history: one mapping per round.
        synthetic: volumes of the generator, those of a round first.
        synthetic_quality: `synthetic/quality.json`, how good they are as a set.
        figures: PNG by name.
        scores: per case.
        audit: `audit/audit.json`.
        audit_figures: PNG by name.
        absent: why a part is `None`, by name.
    """

    path: Path
    run_id: str
    banner: str
    summary: Mapping[str, Any] | None
    record: Mapping[str, Any] | None
    rows: Mapping[str, Mapping[str, Any]] | None
    sites: tuple[str, ...]
    privacy: tuple[SitePrivacy, ...] | None
    history: tuple[Mapping[str, Any], ...] | None
    synthetic: tuple[SyntheticVolume, ...] | None
    synthetic_quality: Mapping[str, Any] | None
    figures: Mapping[str, Path] | None
    scores: tuple[CaseScore, ...] | None
    audit: Mapping[str, Any] | None
    audit_figures: Mapping[str, Path] | None
    absent: Mapping[str, str]

    def why(self, part: str) -> str:
        """Why a part is not there, for people; empty when it is."""
        return self.absent.get(part, "")


def read_run(folder: Path) -> RunFolder:
    """Read a run folder; a part that is missing or damaged does not hide the others.

    Raises:
        InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder.name}: expected a run folder, found none; it may have been moved")
    absent: dict[str, str] = {}

    def part(name: str, read: Callable[[], _Part]) -> _Part | None:
        try:
            return read()
        except (InputError, OSError) as error:
            absent[name] = str(error)
        except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
            absent[name] = f"{name}: expected what a run writes, found something else ({error!r})"
        return None

    summary = part("summary", lambda: _mapping(read_json(folder / "summary.json", within=folder), "summary.json"))
    record = part("record", lambda: _mapping(read_json(folder / "run.json", within=folder), "run.json"))
    privacy = part("privacy", lambda: _privacy(_needed(summary or record, "summary.json"), folder))
    return RunFolder(
        path=folder,
        run_id=_run_id(folder),
        banner=banner_of(privacy),
        summary=summary,
        record=record,
        rows=part("rows", lambda: _rows(_needed(summary, "summary.json")["rows"])),
        sites=tuple(terms.site for terms in privacy or ()),
        privacy=privacy,
        history=part("history", lambda: _rounds(read_json(folder / "history.json", within=folder))),
        synthetic=part("synthetic", lambda: synthetic_volumes(folder / "synthetic")),
        synthetic_quality=part("synthetic_quality", lambda: synthetic_quality(folder / "synthetic")),
        figures=part("figures", lambda: _figures(folder / "figures", "no figures were drawn")),
        scores=part("scores", lambda: _scores(folder / "scores", summary)),
        audit=part("audit", lambda: _mapping(_audit(folder), "audit.json")),
        audit_figures=part("audit_figures", lambda: _figures(folder / "audit" / "figures", "no audit was drawn")),
        absent=absent,
    )


def banner_of(privacy: Sequence[SitePrivacy] | None) -> str:
    """The words of `inference.privacy_banner` for a run: the weakest hospital counts, and unknown counts as none."""
    if not privacy:
        return "NOT PRIVATE: the run does not say which hospitals took part on which terms"
    bare = [terms.site for terms in privacy if not terms.private]
    if bare:
        return f"NOT PRIVATE: {', '.join(bare)}"
    largest = max(terms.epsilon for terms in privacy if terms.epsilon is not None)
    return f"Differentially private per patient: epsilon at most {largest:.3g}"


def differences_by_case(
    scores: Sequence[CaseScore], model: str, other: str, region: str
) -> tuple[tuple[str, str, float], ...]:
    """Case, hospital and Dice of `model` minus Dice of `other`, for the cases that both have, sorted by case."""
    by_model = {name: {s.case: s for s in scores if s.model == name and s.region == region} for name in (model, other)}
    shared = sorted(by_model[model].keys() & by_model[other].keys())
    return tuple(
        (case, by_model[model][case].site, by_model[model][case].dice - by_model[other][case].dice) for case in shared
    )


def _needed(found: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    if found is None:
        raise InputError(f"{name}: cannot be read")
    return found


def _mapping(content: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{name}: expected an object, found {type(content).__name__}")
    return content


def _run_id(folder: Path) -> str:
    try:
        found = (folder / "run_id").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    return found if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", found) else folder.name


def _privacy(content: Mapping[str, Any], folder: Path) -> tuple[SitePrivacy, ...]:
    """Terms of every hospital that the run names anywhere; one without terms counts as unknown, hence not private."""
    stated = _mapping(content["privacy"], "privacy")
    held_out = content.get("held_out")
    ledgers = folder / "privacy"
    named = [*stated, *(held_out if isinstance(held_out, dict) else ())]
    named += sorted(entry.name for entry in ledgers.iterdir() if entry.is_dir()) if ledgers.is_dir() else []
    return tuple(_site_privacy(site, _mapping(stated.get(site, {}), site)) for site in dict.fromkeys(map(str, named)))


def _site_privacy(site: str, terms: Mapping[str, Any]) -> SitePrivacy:
    mode = str(terms.get("mode", "unknown"))
    epsilon, delta = _number(terms.get("epsilon")), _number(terms.get("delta"))
    private = mode in _PRIVATE_MODES and epsilon is not None and delta is not None
    words = (
        f"{mode}, epsilon {epsilon:.3g} at delta {delta:.1e}, per patient"
        if private
        else f"NOT PRIVATE (mode {mode}): nothing bounds what the answers reveal about a patient"
    )
    patients = terms.get("patients")
    return SitePrivacy(
        site=site,
        mode=mode,
        private=private,
        epsilon=epsilon,
        epsilon_prv=_number(terms.get("epsilon_prv")),
        budget=_number(terms.get("budget")),
        delta=delta,
        patients=patients if isinstance(patients, int) else None,
        words=words,
        statement=str(terms.get("statement", "")),
    )


def _rows(content: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return {str(key): _mapping(row, f"row {key}") for key, row in content.items()}


def _rounds(content: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(_mapping(entry, "history.json") for entry in _mapping(content, "history.json")["rounds"])


def _figures(folder: Path, otherwise: str) -> Mapping[str, Path]:
    files = (path for path in sorted(folder.glob("*.png")) if not path.name.startswith("."))
    found = {path.stem: path for path in files if lies_in(path, folder)}
    if not found:
        raise InputError(otherwise)
    return found


def _audit(folder: Path) -> Any:
    path = folder / "audit" / "audit.json"
    if not path.is_file():
        raise InputError("no audit was run on this folder; `fediod privacy audit` attacks it and writes one")
    return read_json(path, within=folder)


def _scores(folder: Path, summary: Mapping[str, Any] | None) -> tuple[CaseScore, ...]:
    keys = {str(key).replace(":", "-"): str(key) for key in (summary or {}).get("rows", {})}
    found: list[CaseScore] = []
    for path in sorted(file for file in folder.glob("*.csv") if lies_in(file, folder)):
        with path.open(newline="", encoding="utf-8") as stream:
            found += [_score(row, keys.get(path.stem, path.stem)) for row in csv.DictReader(stream)]
    if not found:
        raise InputError("no score of a single case was kept, as in every private run on patients")
    order = {key: number for number, key in enumerate(keys.values())}
    return tuple(
        sorted(found, key=lambda s: (order.get(s.model, len(order)), s.model, s.case, REGIONS.index(s.region)))
    )


def _score(row: Mapping[str, str], model: str) -> CaseScore:
    return CaseScore(
        model=model,
        case=row["subject_id"],
        site=row["site"],
        region=row["region"],
        dice=float(row["dice"]),
        hd95_mm=float(row["hd95_mm"]),
        reference_empty=row["reference_empty"].lower() == "true",
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
