"""What a site promises before it starts: unit, budget, and the mechanism of everything that may leave it.

A policy is written beside the ledger as canonical JSON, and each ledger entry names its digest.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fediod_med.errors import PrivacyError
from fediod_med.privacy import mechanisms
from fediod_med.privacy.mechanisms import Mechanism

MODES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "gradient": ("counts", "answer", "pull_back"),
    "dp-sgd": ("counts", "teacher", "discriminator"),
}
"""Modes from weakest to strongest, each with the kinds that it charges."""

TRAINED_KINDS = frozenset({"teacher", "discriminator"})
UNIT, ADJACENCY = "patient", "null replacement"

CLIPPINGS = ("patients", "joint", "samples")
"""What is clipped: each patient's row before rows are summed; the whole output; each of a batch's rows."""


@dataclass(frozen=True)
class PolicyPart:
    """The mechanism of one kind of charge.

    Attributes:
        noise_multiplier: noise standard deviation over `sensitivity`.
        sample_rate: 1 for releases.
        steps: of a training, all charged at its start; of a release, the largest number of charges.
        clip_norm: C.
        sensitivity: of what is noised, as `clipping` and C imply it.
        dim: length of what is released; `None` for trainings and where it is not fixed.
        clipping: see `CLIPPINGS`.
        rows: samples of a batch, for clipping `samples`.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    clip_norm: float
    sensitivity: float
    dim: int | None = None
    clipping: str = "joint"
    rows: int = 1

    @property
    def planned(self) -> Mechanism:
        """Everything this part may ever spend."""
        return Mechanism(self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def release(self) -> Mechanism:
        """One release."""
        return Mechanism(self.noise_multiplier, self.sample_rate, 1)


def count_part(plan: Mechanism, *, dim: int) -> PolicyPart:
    """Presence of classes: rows of norm at most 1, one a patient, summed."""
    sensitivity = mechanisms.presence_sensitivity()
    return PolicyPart(plan.noise_multiplier, plan.sample_rate, plan.steps, 1.0, sensitivity, dim, "patients")


def training_part(plan: Mechanism, *, clip_norm: float) -> PolicyPart:
    """DP-SGD: per-patient gradients of norm at most C, summed."""
    sensitivity = mechanisms.patient_sum_sensitivity(clip_norm)
    return PolicyPart(
        plan.noise_multiplier, plan.sample_rate, plan.steps, clip_norm, sensitivity, clipping="patients"
    )  # fmt: skip


def release_part(plan: Mechanism, *, clip_norm: float, dim: int | None = None) -> PolicyPart:
    """The output of a model that is not private, clipped as a whole."""
    sensitivity = mechanisms.release_sensitivity(clip_norm)
    return PolicyPart(plan.noise_multiplier, plan.sample_rate, plan.steps, clip_norm, sensitivity, dim)


def sample_release_part(plan: Mechanism, *, clip_norm: float, rows: int, dim: int | None = None) -> PolicyPart:
    """The output of a model that is not private for `rows` samples, each clipped on its own."""
    sensitivity = mechanisms.per_sample_sensitivity(clip_norm, rows)
    return PolicyPart(
        plan.noise_multiplier, plan.sample_rate, plan.steps, clip_norm, sensitivity, dim, "samples", rows
    )  # fmt: skip


@dataclass(frozen=True)
class PrivacyPolicy:
    """One site's promise.

    Attributes:
        site: its name.
        mode: `dp-sgd`, `gradient` or `none`.
        epsilon: budget for everything this patient universe ever spends; `None` in mode `none`.
        delta: of the budget; `None` in mode `none`.
        patients: declared number, public.
        universe: `universe_id` of the patients.
        parts: mechanism by kind; see `MODES`.
        warm_start: SHA-256 of public weights that training starts from, if any.
        versions: of the accountant and of this package, for the record.
        insecure: permits a seeded noise source, for tests; such a ledger never verifies.
        unit: the patient.
        adjacency: null replacement of one patient.

    Raises:
        PrivacyError: an inconsistent policy; the message names the field.
    """

    site: str
    mode: str
    epsilon: float | None
    delta: float | None
    patients: int
    universe: str
    parts: Mapping[str, PolicyPart] = field(default_factory=dict)
    warm_start: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    insecure: bool = False
    unit: str = UNIT
    adjacency: str = ADJACENCY

    def __post_init__(self) -> None:
        _check(self)

    def canonical(self) -> bytes:
        """The policy as JSON with sorted keys and no spaces; the bytes of its file and of its digest."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def digest(self) -> str:
        """SHA-256 of `canonical()`, hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def part(self, kind: str) -> PolicyPart:
        """The mechanism of one kind; `PrivacyError` when this policy does not foresee it."""
        if kind not in self.parts:
            raise PrivacyError(
                f"{self.site}: expected one of the policy's kinds {sorted(self.parts)}, found {kind!r}; nothing leaves"
            )
        return self.parts[kind]


def parse_policy(data: bytes, where: str = "policy") -> PrivacyPolicy:
    """Read `canonical()` bytes.

    Raises:
        PrivacyError: not a policy, or not byte for byte what `canonical()` gives.
    """
    try:
        raw: dict[str, Any] = json.loads(data)
        policy = PrivacyPolicy(**{**raw, "parts": {kind: PolicyPart(**part) for kind, part in raw["parts"].items()}})
        same = policy.canonical() == data
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PrivacyError(f"{where}: expected a privacy policy, found something else ({error})") from error
    if not same:
        raise PrivacyError(f"{where}: expected canonical JSON, found other bytes; the file was edited")
    return policy


def read_policy(path: Path) -> PrivacyPolicy:
    """Read a policy file; errors as in `parse_policy`, and when there is no file."""
    if not path.is_file():
        raise PrivacyError(f"{path}: expected a privacy policy, found nothing")
    return parse_policy(path.read_bytes(), str(path))


def write_policy(path: Path, policy: PrivacyPolicy) -> None:
    """Write a policy file, atomically and synced."""
    replace_synced(path, policy.canonical())


def replace_synced(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Put `data` at `path` so that, whatever happens, the old or the new content is there; synced with its folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def universe_id(patient_ids: Iterable[str], key: bytes) -> str:
    """HMAC-SHA256 of the sorted distinct patient ids: the same patients give the same id, and it names nobody."""
    message = json.dumps(sorted(set(patient_ids)), separators=(",", ":")).encode()
    return hmac.new(key, b"fediod patient universe\0" + message, hashlib.sha256).hexdigest()


def expected_sensitivity(part: PolicyPart, kind: str) -> float:
    """What `part.clipping` and `part.clip_norm` imply for a kind."""
    if kind == "counts":
        return mechanisms.presence_sensitivity()
    if part.clipping == "patients":
        return mechanisms.patient_sum_sensitivity(part.clip_norm)
    if part.clipping == "samples":
        return mechanisms.per_sample_sensitivity(part.clip_norm, part.rows)
    return mechanisms.release_sensitivity(part.clip_norm)


def _check(policy: PrivacyPolicy) -> None:
    where = f"privacy policy of {policy.site}"
    if policy.mode not in MODES:
        raise PrivacyError(f"{where}: mode: expected one of {', '.join(MODES)}, found {policy.mode!r}")
    if (policy.unit, policy.adjacency) != (UNIT, ADJACENCY):
        raise PrivacyError(f"{where}: expected unit {UNIT!r} under {ADJACENCY!r}, found {policy.unit!r}")
    if policy.mode == "none":
        if policy.epsilon is not None or policy.delta is not None or policy.parts:
            raise PrivacyError(f"{where}: mode none promises nothing; leave epsilon, delta and parts out")
        return
    if policy.epsilon is None or not (math.isfinite(policy.epsilon) and policy.epsilon > 0):
        raise PrivacyError(f"{where}: epsilon: expected a positive finite number, found {policy.epsilon}")
    if policy.delta is None or not 0 < policy.delta < 1:
        raise PrivacyError(f"{where}: delta: expected a number between 0 and 1, found {policy.delta}")
    if isinstance(policy.patients, bool) or not isinstance(policy.patients, int) or policy.patients < 1:
        raise PrivacyError(f"{where}: patients: expected at least 1, found {policy.patients}")
    unknown = sorted(set(policy.parts) - set(MODES[policy.mode]))
    if unknown or not policy.parts:
        raise PrivacyError(
            f"{where}: expected parts among {', '.join(MODES[policy.mode])}, found {unknown or 'none'}"
        )  # fmt: skip
    for kind, part in policy.parts.items():
        _check_part(f"{where}: {kind}", kind, part)


def _check_part(where: str, kind: str, part: PolicyPart) -> None:
    _ = part.planned
    if part.clipping not in CLIPPINGS or (part.clipping == "patients") != (kind in TRAINED_KINDS | {"counts"}):
        raise PrivacyError(f"{where}: clipping: expected patients for counts and trainings only, found {part.clipping}")
    if kind not in TRAINED_KINDS and part.sample_rate != 1:
        raise PrivacyError(f"{where}: expected sample rate 1, found {part.sample_rate}; a release is not subsampled")
    if not (math.isfinite(part.clip_norm) and part.clip_norm > 0) or (kind == "counts" and part.clip_norm != 1):
        raise PrivacyError(f"{where}: clip_norm: expected a positive number (1 for counts), found {part.clip_norm}")
    if part.rows < 1 or (part.rows != 1 and part.clipping != "samples"):
        raise PrivacyError(f"{where}: rows: expected 1 unless samples are clipped one by one, found {part.rows}")
    expected = expected_sensitivity(part, kind)
    if not math.isclose(part.sensitivity, expected, rel_tol=1e-12):
        raise PrivacyError(f"{where}: sensitivity: expected {expected} for clip norm {part.clip_norm}, found "
                           f"{part.sensitivity}")  # fmt: skip
