"""What a ledger's records add up to: what was spent, which releases are done, which trainings have a permit."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace

from fediod_med.errors import PrivacyError
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import PrivacyPolicy, parse_policy
from fediod_med.privacy.records import GENESIS, Head, Record, canonical


@dataclass(frozen=True)
class Charge:
    """A release that was paid for."""

    sequence: int
    kind: str
    query: str
    digest: str


@dataclass(frozen=True)
class Permit:
    """A training that was paid for in full.

    Attributes:
        permit_id: hash of its record.
        kind: `teacher` or `discriminator`.
        run_id: the run it was begun for.
        settings_digest: of the settings it was begun with.
        mechanism: what was charged; the training may take `mechanism.steps` steps, once.
        clip_norm: C.
        weights: SHA-256 of the finished weights, or `None` while it trains.
        resumed: this call found the permit instead of paying for it.
    """

    permit_id: str
    kind: str
    run_id: str
    settings_digest: str
    mechanism: Mechanism
    clip_norm: float
    weights: str | None = None
    resumed: bool = False


class History:
    """The records of one ledger, folded in order; a record that makes no sense is a hard stop."""

    def __init__(self) -> None:
        self.hashes: list[str] = []
        self.policies: list[PrivacyPolicy] = []
        self.insecure = False
        self.charges: dict[str, list[Charge]] = {}  # by query; all but the last crashed or failed
        self.payloads: dict[int, str] = {}  # by sequence of the charge
        self.permits: dict[str, Permit] = {}
        self.counts: Counter[str] = Counter()  # charges by kind
        self._steps: dict[str, Counter[tuple[float, float]]] = {}
        self._by_sequence: dict[int, Charge] = {}
        self._policy_digest = ""

    @property
    def head(self) -> Head:
        """The newest record; sequence -1 when there is none."""
        return Head(len(self.hashes) - 1, self.hashes[-1] if self.hashes else GENESIS)

    @property
    def policy(self) -> PrivacyPolicy:
        """The policy in force; `PrivacyError` before the first record."""
        if not self.policies:
            raise PrivacyError("ledger: expected an opening record first, found none")
        return self.policies[-1]

    def spent(self, kind: str | None = None) -> list[Mechanism]:
        """Everything that was charged, of one kind or of all, equal mechanisms joined."""
        total: Counter[tuple[float, float]] = Counter()
        for name, steps in self._steps.items():
            if kind is None or kind == name:
                total.update(steps)
        return [Mechanism(noise, rate, steps) for (noise, rate), steps in total.items()]

    def add(self, record: Record) -> None:
        """Take in the next record.

        Raises:
            PrivacyError: it contradicts the ones before it, or the policy in force.
        """
        try:
            self._add(record)
        except (TypeError, ValueError, KeyError) as error:
            raise PrivacyError(f"ledger record {record.sequence}: holds values of the wrong kind ({error})") from error

    def _add(self, record: Record) -> None:
        if record.event == "open":
            self._take_up(record)
        if record.policy != self._policy_digest:
            raise PrivacyError(f"ledger record {record.sequence}: names a policy that is not in force")
        if record.event in ("charge", "train"):
            self._charge(record)
        elif record.event == "done":
            self._done(record)
        elif record.event == "trained":
            self._trained(record)
        self.insecure |= record.insecure
        self.hashes.append(record.hash)

    def _take_up(self, record: Record) -> None:
        policy = parse_policy(canonical(record.body["policy"]), f"ledger record {record.sequence}")
        if policy.mode == "none":
            raise PrivacyError(f"ledger record {record.sequence}: a policy of mode none has no ledger")
        # Another universe is fine: everything spent so far stays charged to whoever is in it now.
        if self.policies and policy.site != self.policy.site:
            raise PrivacyError(f"ledger record {record.sequence}: another site; it needs a ledger of its own")
        self.policies.append(policy)
        self._policy_digest = policy.digest()

    def _charge(self, record: Record) -> None:
        body = record.body
        kind = str(body["kind"])
        part = self.policy.part(kind)
        mechanism = Mechanism(body["noise_multiplier"], body["sample_rate"], body["steps"])
        expected = part.planned if record.event == "train" else part.release
        if mechanism != expected or (body["clip_norm"], body["sensitivity"]) != (part.clip_norm, part.sensitivity):
            raise PrivacyError(
                f"ledger record {record.sequence}: charged other noise for {kind} than its policy states"
            )
        if record.event == "train":
            permit = Permit(record.hash, kind, str(body["run"]), str(body["digest"]), mechanism, part.clip_norm)
            self.permits[permit.permit_id] = permit
        else:
            self._charge_query(Charge(record.sequence, kind, str(body["query"]), str(body["digest"])))
        self.counts[kind] += 1
        self._steps.setdefault(kind, Counter())[mechanism.noise_multiplier, mechanism.sample_rate] += mechanism.steps

    def _charge_query(self, charge: Charge) -> None:
        earlier = self.charges.get(charge.query, [])
        if earlier and (earlier[-1].kind, earlier[-1].digest) != (charge.kind, charge.digest):
            raise PrivacyError(f"ledger record {charge.sequence}: query id {charge.query!r} was used for another query")
        if earlier and earlier[-1].sequence in self.payloads:
            raise PrivacyError(f"ledger record {charge.sequence}: query {charge.query!r} was already answered")
        self.charges[charge.query] = [*earlier, charge]
        self._by_sequence[charge.sequence] = charge

    def _done(self, record: Record) -> None:
        sequence = record.body["charge"]
        charge = self._by_sequence.get(sequence)
        if charge is None or sequence in self.payloads or self.charges[charge.query][-1] != charge:
            raise PrivacyError(f"ledger record {record.sequence}: finishes a release that was not paid for")
        self.payloads[sequence] = str(record.body["payload"])

    def _trained(self, record: Record) -> None:
        permit = self.permits.get(str(record.body["permit"]))
        if permit is None or permit.weights is not None:
            raise PrivacyError(f"ledger record {record.sequence}: finishes a training that has no open permit")
        self.permits[permit.permit_id] = replace(permit, weights=str(record.body["weights"]))


def policy_body(policy: PrivacyPolicy) -> dict[str, object]:
    """Body of an `open` record."""
    return {"policy": asdict(policy)}
