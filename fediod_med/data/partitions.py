"""Divides subjects among sites, or into a train and a test part, without ever splitting a patient.

Every function orders subjects by id first, so the result does not depend on the order of a listing, and treats all
time points of a patient (`patient_id`) as one unit.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fediod_med.data.layouts import Subject
from fediod_med.errors import InputError, SettingsError

_LOG = logging.getLogger(__name__)
# BraTS-GLI-00000-001 (visit), Brats18_CBICA_ABM_1 (repetition), sub-X_ses-Y (BIDS session)
_VISITS = (
    re.compile(r"(?P<patient>brats-[a-z]+-\d+)-\d{3}", re.IGNORECASE),
    re.compile(r"(?P<patient>brats1[789]_.+)_\d+", re.IGNORECASE),
    re.compile(r"(?P<patient>sub-[a-z0-9]+)_ses-[a-z0-9]+", re.IGNORECASE),
)
_DIRICHLET_TRIES = 1000


def patient_id(subject_id: str) -> str:
    """The patient behind a subject id.

    Drops the visit of GLI names, the repetition of BraTS 2017-2019 names and the session of BIDS names.
    Names of other forms are returned unchanged.
    """
    for form in _VISITS:
        match = form.fullmatch(subject_id)
        if match:
            return match["patient"]
    return subject_id


def names_a_patient(subject_id: str) -> bool:
    """Whether an id has a form whose patient `patient_id` can tell from its visits."""
    return any(form.fullmatch(subject_id) for form in _VISITS)


def split_fold(
    subjects: Sequence[Subject], *, folds: int, fold: int
) -> tuple[tuple[Subject, ...], tuple[Subject, ...]]:
    """Train and test part of one fold: the i-th patient in order of subject id is tested when `i % folds == fold`.

    Args:
        subjects: in any order.
        folds: number of folds; 1 means that there is no test part.
        fold: 0 to `folds - 1`.

    Returns:
        Train and test subjects, each sorted by id.

    Raises:
        SettingsError: fold out of range, or too few patients for both parts to hold one.
    """
    if folds < 1 or not 0 <= fold < folds:
        raise SettingsError(f"folds: expected folds >= 1 and 0 <= fold < folds, found folds={folds}, fold={fold}")
    patients = list(by_patient(subjects).values())
    if folds == 1:
        return _flatten(patients), ()
    test = [visits for i, visits in enumerate(patients) if i % folds == fold]
    train = [visits for i, visits in enumerate(patients) if i % folds != fold]
    if not train or not test:
        raise SettingsError(
            f"folds: fold {fold} of {folds} leaves {len(train)} patients to train and {len(test)} to test out of "
            f"{len(patients)}; use fewer folds, or folds=1 for no test part"
        )
    return _flatten(train), _flatten(test)


def by_pattern(
    subjects: Sequence[Subject], patterns: Mapping[str, str], *, rest: str | None = None
) -> dict[str, tuple[Subject, ...]]:
    """Assign subjects to the site whose pattern matches the start of their id (institution prefixes).

    Args:
        subjects: in any order.
        patterns: regular expression by site name.
        rest: site that receives the subjects no pattern matches; without it they are left out and named in the log.

    Raises:
        SettingsError: an invalid pattern, a subject that two patterns match, a patient at two sites.
        InputError: a site without subjects.
    """
    compiled: dict[str, re.Pattern[str]] = {}
    for site, pattern in patterns.items():
        try:
            compiled[site] = re.compile(pattern)
        except re.error as error:
            raise SettingsError(f"site {site}: pattern {pattern!r} is not a regular expression ({error})") from error
    site_of: dict[str, str] = {}
    for subject in subjects:
        matching = [site for site, pattern in compiled.items() if pattern.match(subject.subject_id)]
        if len(matching) > 1:
            raise SettingsError(
                f"subject {subject.subject_id}: expected one matching site, found {', '.join(matching)}; "
                f"make their patterns exclusive"
            )
        if matching:
            site_of[subject.subject_id] = matching[0]
    return _assign(subjects, site_of, tuple(patterns), rest)


def by_csv(subjects: Sequence[Subject], table: Path, *, rest: str | None = None) -> dict[str, tuple[Subject, ...]]:
    """Assign subjects by a two-column table with the header `Partition_ID,Subject_ID`, as the FeTS challenge has it.

    Args:
        subjects: in any order.
        table: CSV file; the text under Partition_ID is the site's name, sites keep the order of the table.
        rest: site that receives the subjects not in the table; without it they are left out and named in the log.

    Raises:
        InputError: unreadable table, missing column, an id that is unknown or listed twice.
        SettingsError: a patient at two sites.
    """
    known = {subject.subject_id for subject in subjects}
    site_of: dict[str, str] = {}
    unknown: list[str] = []
    for line, site, subject_id in _rows(table):
        if not site or not subject_id:
            raise InputError(f"{table}, line {line}: expected Partition_ID and Subject_ID, found an empty cell")
        if subject_id in site_of:
            raise InputError(f"{table}, line {line}: {subject_id} is listed a second time; keep one row per subject")
        site_of[subject_id] = site
        if subject_id not in known:
            unknown.append(subject_id)
    if unknown:
        raise InputError(
            f"{table}: expected ids of the {len(known)} subjects found on disk, found {len(unknown)} unknown: "
            f"{_some(unknown)}; remove these rows or add the data"
        )
    if not site_of:
        raise InputError(f"{table}: expected at least one row below the header, found none")
    return _assign(subjects, site_of, tuple(dict.fromkeys(site_of.values())), rest)


def by_size(subjects: Sequence[Subject], sizes: Mapping[str, float], n_sites: int) -> dict[str, tuple[Subject, ...]]:
    """Sort patients by tumour size and cut the list into contiguous, equally long parts, smallest tumours first.

    The split of AsynDGAN (Chang et al., CVPR 2020). A patient's size is the mean over the time points.

    Args:
        subjects: in any order.
        sizes: tumour size by subject id, finite and not negative, any unit.
        n_sites: number of sites, named `site-1` and so on.

    Raises:
        InputError: a size is missing or invalid.
        SettingsError: fewer patients than sites.
    """
    missing = [subject.subject_id for subject in subjects if subject.subject_id not in sizes]
    if missing:
        raise InputError(f"sizes: expected one per subject, found none for {_some(missing)}")
    invalid = [s.subject_id for s in subjects if not (math.isfinite(sizes[s.subject_id]) and sizes[s.subject_id] >= 0)]
    if invalid:
        raise InputError(f"sizes: expected finite values of at least 0, found others for {_some(invalid)}")
    patients = by_patient(subjects)
    names = _site_names(n_sites, len(patients))
    mean = {p: sum(sizes[visit.subject_id] for visit in visits) / len(visits) for p, visits in patients.items()}
    order = sorted(patients, key=lambda patient: (mean[patient], patient))
    return _chunks([patients[patient] for patient in order], names)


def dirichlet(
    subjects: Sequence[Subject], groups: Sequence[Hashable], alpha: float, n_sites: int, seed: int
) -> dict[str, tuple[Subject, ...]]:
    """Label-skewed sites: each group's patients are spread over the sites in proportions drawn from Dirichlet(alpha).

    Small alpha gives each site mostly one group, large alpha gives all sites the same mixture (the scheme of Yurochkin
    et al., ICML 2019). Draws that leave a site empty are repeated, so the proportions are conditioned on none being so.

    Args:
        subjects: in any order; every one is assigned to exactly one site.
        groups: group of each subject in the same order (grade, size bin); a patient counts by the first time point.
        alpha: concentration, above 0.
        n_sites: number of sites, named `site-1` and so on.
        seed: of a generator used for this call only.

    Raises:
        SettingsError: alpha or the number of sites is invalid, or no draw filled all sites.
        InputError: not one group per subject.
    """
    if len(groups) != len(subjects):
        raise InputError(f"groups: expected one per subject ({len(subjects)}), found {len(groups)}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise SettingsError(f"alpha: expected a finite number above 0, found {alpha}")
    patients = by_patient(subjects)
    names = _site_names(n_sites, len(patients))
    group_of = {subject.subject_id: group for subject, group in zip(subjects, groups, strict=True)}
    members: dict[Hashable, list[tuple[Subject, ...]]] = {}
    for visits in patients.values():
        members.setdefault(group_of[visits[0].subject_id], []).append(visits)
    rng = np.random.default_rng(seed)
    for _ in range(_DIRICHLET_TRIES):
        shares: list[list[tuple[Subject, ...]]] = [[] for _ in names]
        for patients_of_group in members.values():
            order = rng.permutation(len(patients_of_group))
            proportions = rng.dirichlet(np.full(n_sites, alpha))
            # Rounded cumulative proportions; the last bound is the group's size, so nobody is lost or doubled.
            bounds = np.rint(np.cumsum(proportions)[:-1] * len(order)).astype(int)
            for share, part in zip(shares, np.split(order, bounds), strict=True):
                share.extend(patients_of_group[int(i)] for i in part)
        if all(shares):
            return {name: _flatten(share) for name, share in zip(names, shares, strict=True)}
    raise SettingsError(
        f"dirichlet: in {_DIRICHLET_TRIES} draws with alpha={alpha:g}, {len(patients)} patients in {len(members)} "
        f"groups never filled all {n_sites} sites; use a larger alpha, fewer sites or more groups"
    )


def iid(subjects: Sequence[Subject], n_sites: int, seed: int) -> dict[str, tuple[Subject, ...]]:
    """Deal shuffled patients to sites of equal size (numbers of patients differ by at most one).

    Args:
        subjects: in any order.
        n_sites: number of sites, named `site-1` and so on.
        seed: of a generator used for this call only.

    Raises:
        SettingsError: fewer patients than sites.
    """
    patients = list(by_patient(subjects).values())
    names = _site_names(n_sites, len(patients))
    order = np.random.default_rng(seed).permutation(len(patients))
    return _chunks([patients[int(i)] for i in order], names)


def by_patient(subjects: Sequence[Subject]) -> dict[str, tuple[Subject, ...]]:
    """Time points by patient, patients in the order of their first subject id; `InputError` on a repeated id."""
    patients: dict[str, list[Subject]] = {}
    previous = None
    for subject in sorted(subjects, key=lambda s: s.subject_id):
        if subject.subject_id == previous:
            raise InputError(f"subjects: expected unique ids, found {previous} twice")
        previous = subject.subject_id
        patients.setdefault(patient_id(subject.subject_id), []).append(subject)
    return {patient: tuple(visits) for patient, visits in patients.items()}


def _assign(
    subjects: Sequence[Subject], site_of: Mapping[str, str], sites: Sequence[str], rest: str | None
) -> dict[str, tuple[Subject, ...]]:
    """Collect subjects by site, in the order of `sites`; those without a site go to `rest` or are named in the log."""
    assigned: dict[str, list[Subject]] = {site: [] for site in sites}
    unassigned: list[str] = []
    for patient, visits in by_patient(subjects).items():
        places = {}
        for visit in visits:
            site = site_of.get(visit.subject_id, rest)
            if site is None:
                unassigned.append(visit.subject_id)
                continue
            places[site] = visit.subject_id
            assigned.setdefault(site, []).append(visit)
        if len(places) > 1:
            where = ", ".join(f"{subject_id} at {site}" for site, subject_id in places.items())
            raise SettingsError(f"patient {patient}: expected all time points at one site, found {where}")
    empty = [site for site in sites if not assigned[site]]
    if empty:
        found = _some(sorted(subject.subject_id for subject in subjects)) or "no subject at all"
        raise InputError(f"site {', '.join(empty)}: expected at least one subject, found none among {found}")
    if unassigned:
        _LOG.warning("%d subjects belong to no site and are left out: %s", len(unassigned), ", ".join(unassigned))
    return {site: tuple(found) for site, found in assigned.items()}


def _rows(table: Path) -> list[tuple[int, str, str]]:
    """Line number, site and subject id of each row of a partition table; `InputError` when it cannot be read."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            header = [cell.strip().lower() for cell in next(reader, [])]
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: expected a CSV file, could not read it ({error})") from error
    try:
        site, subject = header.index("partition_id"), header.index("subject_id")
    except ValueError:
        raise InputError(
            f"{table}: expected the header Partition_ID,Subject_ID, found {','.join(header) or 'nothing'}"
        ) from None
    width = max(site, subject)
    return [(line, row[site], row[subject]) if len(row) > width else (line, "", "") for line, row in lines]


def _site_names(n_sites: int, n_patients: int) -> tuple[str, ...]:
    if not 1 <= n_sites <= n_patients:
        raise SettingsError(f"n_sites: expected 1 to {n_patients} (the number of patients), found {n_sites}")
    return tuple(f"site-{i + 1}" for i in range(n_sites))


def _chunks(patients: Sequence[tuple[Subject, ...]], names: Sequence[str]) -> dict[str, tuple[Subject, ...]]:
    """Cut a list of patients into contiguous parts whose lengths differ by at most one."""
    parts = np.array_split(np.arange(len(patients)), len(names))
    return {name: _flatten([patients[int(i)] for i in part]) for name, part in zip(names, parts, strict=True)}


def _flatten(patients: Sequence[tuple[Subject, ...]]) -> tuple[Subject, ...]:
    return tuple(sorted((visit for visits in patients for visit in visits), key=lambda s: s.subject_id))


def _some(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
