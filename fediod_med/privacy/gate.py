"""The only way out of a hospital: everything that leaves is a `Sealed`, and only this module makes one.

A release is replayed if it is known, refused before private data are touched if the budget does not cover it, charged
and synced, and only then computed, clipped, noised, stored and handed over.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fediod_med.errors import BudgetExceeded, PrivacyError
from fediod_med.privacy.accounting import rdp_epsilon
from fediod_med.privacy.history import Permit
from fediod_med.privacy.ledger import PrivacyLedger, check_unpromised
from fediod_med.privacy.mechanisms import Array, Mechanism
from fediod_med.privacy.noise import NoiseSource, OsNoise
from fediod_med.privacy.policy import MODES, TRAINED_KINDS, PolicyPart, PrivacyPolicy
from fediod_med.privacy.records import Head
from fediod_med.privacy.release import noised


@dataclass(frozen=True)
class Sealed:
    """Bytes that may leave, with the ledger's head for the receiver to remember; constructed in this module alone."""

    payload: bytes
    head: Head | None
    mode: str


class Gate:
    """One site's gate; use `Gate.open`, or `Gate.unprotected` in mode `none`."""

    def __init__(
        self, site: str, policy: PrivacyPolicy | None, ledger: PrivacyLedger | None, source: NoiseSource
    ) -> None:
        self.site = site
        self.policy = policy
        self._ledger = ledger
        self._source = source
        self._training: dict[str, Callable[[], object]] = {}  # permit id -> gives its lock up

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        key_folder: Path,
        policy: PrivacyPolicy,
        patients: Iterable[str],
        source: NoiseSource | None = None,
    ) -> Gate:
        """Open a site's gate.

        Args:
            folder: of the ledger; it belongs to the patients, not to a run, and is kept as long as they are.
            key_folder: holds the key and the witness, elsewhere; never shared.
            policy: what the site promises; in mode `none` nothing is written and nothing protected.
            patients: ids of everybody in the policy's universe.
            source: of noise; the operating system unless a test says otherwise.

        Raises:
            PrivacyError: as in `PrivacyLedger.open`; mode `none` for a patient whom a ledger covers; or a reproducible
                source that the policy does not permit.
        """
        patients = set(patients)
        if policy.mode == "none":
            check_unpromised(folder, key_folder=key_folder, site=policy.site, patients=patients)
            return cls(policy.site, policy, None, OsNoise())
        source = source or OsNoise()
        if source.insecure and not policy.insecure:
            raise PrivacyError(f"{policy.site}: reproducible noise protects nobody; leave `source` out")
        insecure = source.insecure or policy.insecure
        ledger = PrivacyLedger.open(
            folder, key_folder=key_folder, policy=policy, patients=patients, insecure=insecure
        )  # fmt: skip
        return cls(policy.site, policy, ledger, source)

    @classmethod
    def unprotected(cls, site: str) -> Gate:
        """The gate of mode `none`: everything passes as it is, stamped `none`."""
        return cls(site, None, None, OsNoise())

    @property
    def mode(self) -> str:
        """`dp-sgd`, `gradient` or `none`."""
        return "none" if self._ledger is None or self.policy is None else self.policy.mode

    @property
    def head(self) -> Head | None:
        """The ledger's newest record; `None` in mode `none`."""
        return None if self._ledger is None else self._ledger.head

    def release(
        self,
        kind: str,
        *,
        query_id: str,
        query_digest: str,
        compute: Callable[[], np.ndarray],
        seal: Callable[[Array], bytes],
    ) -> Sealed:
        """Release one noised vector, once.

        Args:
            kind: a release kind of the policy.
            query_id: names the query; the same id and digest return the same bytes again, without noise or charge.
            query_digest: hash of everything the answer depends on besides the patients.
            compute: touches private data; gives `(patients, dim)` rows for `counts`, `(rows, ...)` where each sample is
                clipped, otherwise one array of any shape. Called after the charge, at most once. In mode `none` rows of
                `counts` are summed and anything else passes flat.
            seal: turns the noised vector `(dim,)`, float64, into the payload.

        Raises:
            BudgetExceeded: before `compute`, because of public history alone.
            PrivacyError: the query id was used for another query, or `compute` gave another shape than promised.
                What was charged stays spent whatever is raised.
        """
        if self._ledger is None:
            raw = np.asarray(compute(), dtype=np.float64)
            return Sealed(seal(raw.sum(axis=0) if kind == "counts" else raw.reshape(-1)), None, "none")
        ledger, part = self._ledger, self._part(kind, trained=False)
        with ledger.locked():
            stored = self._stored(kind, query_id, query_digest)
            if stored is None:
                self._afford(kind, part.release, most=part.steps)
                body = {"kind": kind, "query": query_id, "digest": query_digest}
                charge = ledger.append("charge", body | _numbers(part, part.release))
                where, patients = f"{self.site}: {kind}", 0 if self.policy is None else self.policy.patients
                values = np.asarray(compute(), dtype=np.float64)
                payload = seal(noised(values, part, patients=patients, source=self._source, where=where))
                stored = ledger.store(payload)
                ledger.append("done", {"charge": charge.sequence, "payload": stored})
            return Sealed(ledger.load(stored), ledger.head, self.mode)

    def begin_training(self, kind: str, *, run_id: str, settings_digest: str) -> Permit:
        """Pay for a whole training, or find the permit of one that was begun with the same settings and not finished.

        A permit is held by one process at a time. A resumed training continues from its checkpoint with fresh noise; if
        nothing of it has left yet, it may also start over.

        Raises:
            BudgetExceeded: the training would cost more than is left.
            PrivacyError: not a training of this policy, mode `none`, or the permit is in use by another process.
        """
        ledger, part = self._charging(kind), self._part(kind, trained=True)
        with ledger.locked():
            for permit in reversed(ledger.history.permits.values()):
                known = (permit.kind, permit.run_id, permit.settings_digest, permit.mechanism)
                if permit.weights is None and known == (kind, run_id, settings_digest, part.planned):
                    self._hold(permit)
                    return replace(permit, resumed=True)
            self._afford(kind, part.planned, most=None)
            body = {"kind": kind, "run": run_id, "digest": settings_digest}
            record = ledger.append("train", body | _numbers(part, part.planned))
            permit = ledger.history.permits[record.hash]
            self._hold(permit)
            return permit

    def progress(self, permit_id: str) -> int:
        """Number of the newest update that a training was let make, from 1; 0 before the first.

        It is kept beside the ledger's key, so neither a new run folder nor a lost state of the training sets it back: a
        resumed training that lacks its state at this number must refuse, or leave the updates so far unused.

        Raises:
            PrivacyError: not a permit of this ledger, or mode `none`.
        """
        ledger = self._charging("training")
        with ledger.locked():
            return ledger.progress(self.check_permit(permit_id).permit_id)

    def advance(self, permit_id: str, number: int) -> None:
        """Let a training make its update `number`; called, and on disk, before the update touches a patient.

        An update whose number was given out stays used, whether it was made or not.

        Args:
            permit_id: of the training.
            number: from 1, above every number before.

        Raises:
            BudgetExceeded: `number` is beyond the updates that were paid for.
            PrivacyError: the number, or a later one, was given out before; the training is finished; not a permit of
                this ledger; mode `none`.
        """
        ledger = self._charging("training")
        with ledger.locked():
            permit = self.check_permit(permit_id)
            if number > permit.mechanism.steps:
                raise BudgetExceeded(
                    f"{self.site}: {permit.kind} {permit_id[:12]}: asked for update {number}, and "
                    f"{permit.mechanism.steps} were paid for; no patient was touched"
                )
            made = ledger.progress(permit_id)
            if permit.weights is not None or number <= made:
                state = "it is finished" if permit.weights is not None else f"update {made} was begun already"
                raise PrivacyError(
                    f"{self.site}: {permit.kind} {permit_id[:12]}: asked for update {number}, but {state}; an update "
                    "is never made twice: continue from the newest state, or train anew"
                )
            ledger.advance(permit_id, number)

    def finish_training(self, permit: Permit, weights_sha256: str) -> None:
        """Record the weights that a permit produced; the same weights twice are no error.

        Raises:
            PrivacyError: an unknown permit, or one that has produced other weights.
        """
        ledger = self._charging(permit.kind)
        with ledger.locked():
            known = self.check_permit(permit.permit_id)
            if known.weights is None:
                ledger.append("trained", {"permit": permit.permit_id, "weights": weights_sha256})
            elif known.weights != weights_sha256:
                raise PrivacyError(f"{self.site}: permit {permit.permit_id[:12]} has produced other weights already")
            self._training.pop(permit.permit_id, _nothing)()

    def permit_for(self, weights_sha256: str) -> Permit:
        """The permit of finished weights; `PrivacyError` when none did: they are not private."""
        ledger = self._charging("teacher")
        with ledger.locked():
            for permit in ledger.history.permits.values():
                if permit.weights == weights_sha256:
                    return permit
        raise PrivacyError(f"{self.site}: no permit has produced weights {weights_sha256[:12]}; train anew")

    def check_permit(self, permit_id: str) -> Permit:
        """A permit of this ledger; `PrivacyError` when there is none."""
        ledger = self._charging("teacher")
        with ledger.locked():
            permit = ledger.history.permits.get(permit_id)
        if permit is None:
            raise PrivacyError(f"{self.site}: expected a permit of this ledger, found {permit_id[:12]!r}; train anew")
        return permit

    def pass_through(
        self,
        payload_fn: Callable[[], bytes],
        *,
        permits: Sequence[str],
        kinds: frozenset[str] = frozenset({"teacher"}),
        floor_mode: str,
    ) -> Sealed:
        """Let post-processing of private models pass, at no charge.

        Args:
            payload_fn: computes what leaves, from the models of these permits and public data alone.
            permits: ids of all models involved, one of each kind: a finished teacher; a discriminator begun or
                finished.
            kinds: of the models involved; a teacher always is.
            floor_mode: the weakest mode that the receiver accepts.

        Raises:
            PrivacyError: before `payload_fn`: permits of other kinds than `kinds`, an unknown one, an unfinished
                teacher, mode `gradient` (whose models are not private), or a mode below `floor_mode`.
        """
        order = list(MODES)
        if floor_mode not in order or order.index(self.mode) < order.index(floor_mode):
            raise PrivacyError(f"{self.site}: mode {self.mode} is below {floor_mode}, the weakest that may be sent")
        if self._ledger is None:
            return Sealed(payload_fn(), None, "none")
        if self.mode != "dp-sgd" or not permits:
            raise PrivacyError(f"{self.site}: only outputs of models with a permit pass freely; use a charged release")
        with self._ledger.locked():
            named = [self.check_permit(permit_id) for permit_id in permits]
            found, expected = sorted(permit.kind for permit in named), sorted(kinds | {"teacher"})
            if found != expected:
                raise PrivacyError(
                    f"{self.site}: expected one permit for each of {', '.join(expected)}, found {', '.join(found)}; a "
                    "model without a permit is not private: train it under one"
                )
            for permit in named:
                if permit.kind != "discriminator" and permit.weights is None:
                    raise PrivacyError(f"{self.site}: the {permit.kind} is not finished; train it first")
        return Sealed(payload_fn(), self._ledger.head, self.mode)

    def spent(self) -> list[Mechanism]:
        """Everything that was charged so far, equal mechanisms joined; empty in mode `none`, which counts nothing."""
        if self._ledger is None:
            return []
        with self._ledger.locked():
            return self._ledger.spent()

    def spent_epsilon(self) -> float | None:
        """What was spent, by the enforced accountant; `None` in mode `none`, which bounds nothing."""
        if self._ledger is None or self.policy is None or self.policy.delta is None:
            return None
        with self._ledger.locked():
            return rdp_epsilon(self._ledger.spent(), self.policy.delta)

    def remaining(self) -> float | None:
        """Budget less what was spent, not below 0; `None` in mode `none`. Epsilons do not add: a guide only."""
        spent = self.spent_epsilon()
        if spent is None or self.policy is None or self.policy.epsilon is None:
            return None
        return max(0.0, self.policy.epsilon - spent)

    def witness(self, head_seen_by_centre: Head | None) -> None:
        """Refuse to go on when the centre has seen a record that this ledger does not contain.

        Raises:
            PrivacyError: the ledger was rolled back, or replaced by another.
        """
        if head_seen_by_centre is None:
            return
        if self._ledger is None:
            raise PrivacyError(f"{self.site}: the centre has seen a ledger of this site, and mode none has none")
        with self._ledger.locked():
            if self._ledger.hash_at(head_seen_by_centre.sequence) != head_seen_by_centre.hash:
                raise PrivacyError(
                    f"{self.site}: the centre has seen record {head_seen_by_centre.sequence}, which this ledger "
                    f"does not contain (head {self._ledger.head.sequence}); restore the newest copy"
                )

    def _charging(self, kind: str) -> PrivacyLedger:
        if self._ledger is None:
            raise PrivacyError(f"{self.site}: mode none trains without a permit; there is no {kind} permit to give")
        return self._ledger

    def _part(self, kind: str, *, trained: bool) -> PolicyPart:
        if self.policy is None:
            raise PrivacyError(f"{self.site}: mode none has no policy")
        part = self.policy.part(kind)
        if (kind in TRAINED_KINDS) != trained:
            raise PrivacyError(f"{self.site}: {kind} is {'released' if trained else 'trained'} only")
        return part

    def _stored(self, kind: str, query_id: str, query_digest: str) -> str | None:
        """Name of the stored payload of a known query, or `None` when it was never answered."""
        ledger = self._charging(kind)
        charges = ledger.history.charges.get(query_id)
        if not charges:
            return None
        if (charges[-1].kind, charges[-1].digest) != (kind, query_digest):
            raise PrivacyError(f"{self.site}: query id {query_id!r} was used for another query; give each its own id")
        return ledger.history.payloads.get(charges[-1].sequence)

    def _afford(self, kind: str, mechanism: Mechanism, *, most: int | None) -> None:
        """Refuse what the budget does not cover; depends on public history alone."""
        ledger, policy = self._charging(kind), self.policy
        if policy is None or policy.epsilon is None or policy.delta is None:
            raise PrivacyError(f"{self.site}: expected a budget, found none")
        if most is not None and ledger.history.counts[kind] >= most:
            raise BudgetExceeded(f"{self.site}: the policy allows {most} releases of {kind}, and all are spent")
        epsilon = rdp_epsilon([*ledger.spent(), mechanism], policy.delta)
        if epsilon > policy.epsilon:
            raise BudgetExceeded(
                f"{self.site}: another {kind} would bring epsilon to {epsilon:.3f} at delta {policy.delta:g}, "
                f"and the budget is {policy.epsilon:g}; nothing was computed"
            )

    def _hold(self, permit: Permit) -> None:
        """Keep other processes from training under the same permit; given up when finished or when the process ends."""
        if self._ledger is None or permit.permit_id in self._training:
            return
        path = self._ledger.folder / f"training-{permit.permit_id[:16]}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise PrivacyError(
                f"{self.site}: another process is training this {permit.kind}; wait or stop it"
            ) from error
        self._training[permit.permit_id] = weakref.finalize(self, os.close, descriptor)


def digest_of(*parts: bytes) -> str:
    """SHA-256 over parts and their lengths, hex; for query and settings digests."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _numbers(part: PolicyPart, mechanism: Mechanism) -> dict[str, object]:
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "steps": mechanism.steps,
        "clip_norm": part.clip_norm,
        "sensitivity": part.sensitivity,
    }


def _nothing() -> None:
    """Stands for a lock that this process does not hold."""
