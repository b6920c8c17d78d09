"""Procedures of a privacy audit: attacks on a run's teachers, student and synthetic volumes, and one-run canaries.

An audit reads training and held-out patients and adds no noise: its results are not differentially private and belong
to the hospitals. They hold no patient id and no score of a single patient. It needs the scans of every hospital that
it is given, so across hospitals it runs in simulations only; a hospital audits its own teacher, and the student, by
giving its own site alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from torch import Tensor, nn

from fediod_med.checkpoints import Provenance, load_segmenter
from fediod_med.data.layouts import Subject
from fediod_med.data.nifti.reading import read_subject
from fediod_med.data.partitions import patient_id
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import preprocessing
from fediod_med.devices import pick_device
from fediod_med.durable import write_atomically
from fediod_med.errors import InputError, SettingsError
from fediod_med.inference import default_roi, predict_probabilities
from fediod_med.labels import CLASSES, SEQUENCES
from fediod_med.losses import soft_dice
from fediod_med.networks import one_hot
from fediod_med.privacy.audit import largest_auc
from fediod_med.privacy.audit_scores import (
    auc,
    auc_interval,
    auc_p_value,
    membership_epsilon,
    nearest_neighbour_test,
    roc,
    tpr_at_fpr,
)
from fediod_med.privacy.one_run import OneRunAudit, one_run_audit
from fediod_med.privacy.volume_distance import VolumeMatcher
from fediod_med.progress import Progress, silent
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.sites import Site

__all__ = [
    "AUDIT_FILE",
    "OneRunAudit",
    "RunFiles",
    "audit_run",
    "discriminator_score",
    "loss_score",
    "mislabelled_phantoms",
    "one_run_audit",
    "run_files",
    "statements",
]

AUDIT_FILE = "audit.json"
TAIL_FPR = 0.01
FEW_PATIENTS = 20
NOT_PRIVATE_RESULT = (
    "Computed from patients without noise: this audit is not differentially private. It stays with the hospitals."
)

MEANING = (
    "Lower bounds and tests. An audit can contradict a claim; it never proves one. Each interval stands on its own: of "
    "many attacks that see nothing, some will seem to see something."
)


@dataclass(frozen=True)
class RunFiles:
    """What of a run can be attacked.

    Attributes:
        teachers: weights by site.
        student: weights, if any.
        synthetic: volumes `(x, y, z, 4)` as NIfTI.
    """

    teachers: Mapping[str, Path]
    student: Path | None = None
    synthetic: tuple[Path, ...] = ()


# --- scores -----------------------------------------------------------------------------------------------------------


def loss_score(network: nn.Module, image: Tensor, classes: Tensor, *, roi: int, device: torch.device) -> float:
    """Minus the loss of a segmenter on one labelled volume (Yeom et al. 2018): higher for what it has learnt by heart.

    The loss is the one that teachers are trained with, cross-entropy plus soft Dice, over the whole volume.

    Args:
        network: in evaluation mode, on `device`.
        image: `(4, x, y, z)` on the working grid.
        classes: `(1, x, y, z)` integers 0 to 3.
        roi: window edge, voxels.
        device: where the network runs.
    """
    volume = MetaTensor(torch.as_tensor(image).float())
    probs = predict_probabilities(network, volume, roi=roi, device=device).as_tensor()[None]
    truth = one_hot(torch.as_tensor(classes).cpu(), len(CLASSES))
    cross_entropy = -(probs.clamp_min(1e-6).log() * truth).sum(dim=1).mean()
    return -float(cross_entropy + soft_dice(probs, truth))


def discriminator_score(discriminator: nn.Module, *, device: torch.device) -> Callable[[Tensor], float]:
    """Score of a volume `(1, 4, x, y, z)`: the mean patch logit, higher for what the discriminator takes for real."""
    judge = discriminator.to(device).eval()

    def score(volume: Tensor) -> float:
        with torch.inference_mode():
            return float(judge(volume.to(device).float()).mean())

    return score


# --- membership and copies in a run -----------------------------------------------------------------------------------


def run_files(folder: Path, sites: Sequence[str]) -> RunFiles:
    """What a run folder holds for these sites: teachers, `student.safetensors` and `synthetic/*.nii.gz`.

    Raises:
        InputError: nothing to audit.
    """
    found: dict[str, Path] = {}
    for site in sites:
        home = folder / "teachers" / site
        places = (home / "model.safetensors", home / "models" / "model.safetensors")
        present = [path for path in places if path.is_file()]
        if present:
            found[site] = present[0]
    student = folder / "student.safetensors"
    volumes = (p for p in sorted((folder / "synthetic").glob("*.nii.gz")) if not p.name.endswith("_labels.nii.gz"))
    files = RunFiles(found, student if student.is_file() else None, tuple(volumes))
    if not files.teachers and files.student is None:
        raise InputError(f"{folder}: expected teachers/<site>/model.safetensors or student.safetensors, found neither")
    return files


def audit_run(
    sites: Sequence[Site],
    *,
    files: RunFiles,
    out: Path,
    delta: float = 1e-5,
    confidence: float = 0.95,
    reference: Path | None = None,
    discriminators: Mapping[str, Callable[[Tensor], float]] | None = None,
    one_run: Mapping[str, OneRunAudit] | None = None,
    unavailable: Sequence[str] = (),
    figures: Callable[[Path, Mapping[str, Any]], object] | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attack a run with what the hospitals know, and write `audit.json` (and figures) to `out`.

    Members are the training patients of a site, non-members its held-out fold; one score a patient, the mean over its
    scans. Targets are `teacher:<site>`, `discriminator:<site>`, `student` and, with several sites, `student:<site>`.

    Args:
        sites: hospitals with the settings and folds of the run.
        files: from `run_files`, or put together by hand.
        out: folder for the results.
        delta: of the claims.
        confidence: of every interval and bound, each on its own.
        reference: weights that saw none of these patients (the public prior); each loss attack is then repeated on the
            difference of losses, which takes out how hard a scan is (Watson et al. 2022).
        discriminators: score by site for a volume `(1, 4, x, y, z)`, see `discriminator_score`.
        one_run: audits with canaries to report beside, by target, see `canaries.canary_audits`.
        unavailable: what the caller could not bring, in words; reported with what is skipped here.
        figures: called with (`out / "figures"`, result), such as `audit_figures.write_audit_figures`; not called where
            canaries are all there is.
        seed: of splits and permutations.
        device: see `devices.pick_device`.
        progress: see `Progress`.

    Returns:
        The content of `audit.json`.

    Raises:
        SettingsError: no site holds out a patient and there are no canaries either, or grids differ.
        FediodError: weights or scans are defective.
    """
    compute_on = pick_device(device)
    table, skipped = _Table(), []
    judges = dict(discriminators or {})
    student = None if files.student is None else _open(files.student, compute_on)
    prior = None if reference is None else _open(reference, compute_on)
    spacing = sites[0].spacing if sites else 0.0
    volumes = [_read_synthetic(path, spacing) for path in files.synthetic]
    matcher = VolumeMatcher(volumes) if volumes else None
    for number, site in enumerate(sites):
        train, held_out = site.subjects()
        if not held_out:
            skipped.append(f"{site.site_name}: no held-out patients; set folds: 2 or more")
            continue
        name = site.site_name
        of_student = ["student", f"student:{name}"] if len(sites) > 1 else ["student"]
        teacher = None if name not in files.teachers else _open(files.teachers[name], compute_on)
        for target, model in ((f"teacher:{name}", teacher), ("student", student)):
            _require_grid(model, site, target)
        steps = preprocessing(spacing=site.spacing, with_label=True)
        for done, (subject, member) in enumerate([*((s, True) for s in train), *((s, False) for s in held_out)]):
            progress(f"audit {name}", done, len(train) + len(held_out), f"site {number + 1} of {len(sites)}")
            loaded = steps({"subject": subject, "scheme": site.label_scheme})
            image, classes = loaded["image"], loaded["label"].as_tensor()
            who = f"{name}/{patient_id(subject.subject_id)}"
            base = None if prior is None else prior.score(image, classes)
            for model, names in ((teacher, [f"teacher:{name}"]), (student, of_student)):
                if model is not None:
                    loss = model.score(image, classes)
                    table.add(names, "loss", who, member, loss)
                    if base is not None:
                        table.add(names, "loss against reference", who, member, loss - base)
            if name in judges:
                score = judges[name](image.as_tensor()[None])
                table.add((f"discriminator:{name}",), "realism score", who, member, score)
            if matcher is not None:
                table.add_distances(who, member, matcher.distances(image.as_tensor().numpy()))
        progress(f"audit {name}", len(train) + len(held_out), len(train) + len(held_out), "")
        table.claims[f"teacher:{name}"] = {} if teacher is None else _claim(teacher.provenance, [name])
        table.claims[f"student:{name}"] = {} if student is None else _claim(student.provenance, [name])
        table.claims[f"discriminator:{name}"] = _discriminator_claim(name, student, teacher)
    if len(skipped) == len(sites) and not one_run:
        raise SettingsError(f"audit: expected held-out patients to compare with, found none ({'; '.join(skipped)})")
    table.claims["student"] = {} if student is None else _claim(student.provenance, [s.site_name for s in sites])
    found = _result(table, one_run or {}, [*skipped, *unavailable], delta=delta, confidence=confidence, seed=seed)
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    result: dict[str, Any] = json.loads(text)
    write_atomically(out / AUDIT_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if figures is not None and result["attacks"]:
        figures(out / "figures", result)
    return result


@dataclass(frozen=True)
class _Opened:
    """A segmenter with what it says about itself."""

    network: nn.Module
    provenance: Provenance
    device: torch.device

    def score(self, image: Tensor, classes: Tensor) -> float:
        return loss_score(self.network, image, classes, roi=default_roi(self.provenance), device=self.device)


class _Table:
    """Scores by attack and patient, distances by patient, claims by target."""

    def __init__(self) -> None:
        self.claims: dict[str, dict[str, Any]] = {}
        self._scores: dict[tuple[str, str], dict[bool, dict[str, list[float]]]] = {}
        self._distances: dict[bool, dict[str, np.ndarray]] = {True: {}, False: {}}

    def add(self, targets: Sequence[str], attack: str, who: str, member: bool, score: float) -> None:
        for target in targets:
            sides = self._scores.setdefault((target, attack), {True: defaultdict(list), False: defaultdict(list)})
            sides[member][who].append(score)

    def add_distances(self, who: str, member: bool, distances: np.ndarray) -> None:
        """The nearest of a patient's scans counts."""
        known = self._distances[member].get(who, distances)
        self._distances[member][who] = np.minimum(known, distances)

    def attacks(self) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
        """(members, non-members) by (target, attack), one score a patient."""
        return {key: (_means(sides[True]), _means(sides[False])) for key, sides in self._scores.items()}

    def distances(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`(S, n)` to training and `(S, m)` to held-out patients."""
        if not self._distances[True]:
            return None
        train, held_out = (np.stack(list(self._distances[side].values()), axis=1) for side in (True, False))
        return train, held_out


def _means(by_patient: Mapping[str, Sequence[float]]) -> list[float]:
    return [float(np.mean(scores)) for scores in by_patient.values()]


def _open(path: Path, device: torch.device) -> _Opened:
    network, provenance = load_segmenter(path, device)
    return _Opened(network, provenance, device)


def _require_grid(model: _Opened | None, site: Site, target: str) -> None:
    if model is not None and model.provenance.spacing != site.spacing:
        raise SettingsError(
            f"{target}: works at {model.provenance.spacing:g} mm, site {site.site_name} is set to {site.spacing:g} mm; "
            f"audit with the settings of the run"
        )


def _read_synthetic(path: Path, spacing: float) -> np.ndarray:
    channels = {name: index for index, name in enumerate(SEQUENCES)}
    volume = read_subject(Subject(path.name, dict.fromkeys(SEQUENCES, path), channels=channels))
    found = voxel_sizes(volume.affine)
    if not np.allclose(found, spacing, atol=1e-3):
        raise SettingsError(
            f"{path}: voxels of {found.round(3).tolist()} mm, the sites are set to {spacing:g} mm; "
            f"audit with the settings of the run"
        )
    return volume.array


def _claim(provenance: Provenance, sites: Sequence[str]) -> dict[str, Any]:
    """The weakest promise among these sites: none of them is better protected than the audit may assume."""
    entries = [provenance.privacy.get(site, {}) for site in sites]
    if any(entry.get("epsilon") is None for entry in entries):
        return {}
    worst = max(entries, key=lambda entry: float(entry["epsilon"]))
    return {"epsilon": float(worst["epsilon"]), "delta": float(worst.get("delta") or 0.0)}


def _discriminator_claim(site: str, *models: _Opened | None) -> dict[str, Any]:
    """A discriminator is private in mode `dp-sgd` alone; elsewhere only what it says is noised, or nothing is."""
    for model in models:
        if model is not None and model.provenance.privacy.get(site, {}).get("mode") == "dp-sgd":
            return _claim(model.provenance, [site])
    return {}


def _result(
    table: _Table,
    one_run: Mapping[str, OneRunAudit],
    skipped: Sequence[str],
    *,
    delta: float,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    attacks = [
        _attack(target, attack, *sides, table.claims.get(target, {}), delta=delta, confidence=confidence, seed=seed)
        for (target, attack), sides in sorted(table.attacks().items())
    ]
    distances = table.distances()
    nearest = None if distances is None else dataclasses.asdict(nearest_neighbour_test(*distances, seed=seed))
    canaries = [{"target": target, **dataclasses.asdict(found)} for target, found in one_run.items()]
    alarms = [f"{entry['target']}, {entry['attack']}" for entry in attacks if entry["contradicts_claim"]]
    alarms += [f"{entry['target']}, canaries" for entry in canaries if entry["contradicts_claim"]]
    result = {
        "notice": NOT_FOR_CLINICAL_USE,
        "kind": "privacy audit",
        "not_private": NOT_PRIVATE_RESULT,
        "meaning": MEANING,
        "confidence": confidence,
        "delta": delta,
        "seed": seed,
        "attacks": attacks,
        "nearest_neighbour": nearest,
        "one_run": canaries,
        "skipped": list(skipped),
        "alarms": alarms,
    }
    result["statements"] = statements(result)
    return result


def _attack(
    target: str,
    attack: str,
    members: Sequence[float],
    non_members: Sequence[float],
    claim: Mapping[str, float],
    *,
    delta: float,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    low, high = auc_interval(members, non_members, confidence=confidence)
    bound = membership_epsilon(members, non_members, delta=delta, confidence=confidence, seed=seed)
    allowed = _largest_auc_of(claim) if claim else None
    fpr, tpr = roc(members, non_members)
    return {
        "target": target,
        "attack": attack,
        "members": len(members),
        "non_members": len(non_members),
        "auc": auc(members, non_members),
        "auc_interval": [low, high],
        "p_value": auc_p_value(members, non_members),
        "tail": dataclasses.asdict(tpr_at_fpr(members, non_members, fpr=TAIL_FPR, confidence=confidence)),
        "epsilon": dataclasses.asdict(bound),
        "claim": dict(claim) or None,
        "largest_auc_of_claim": allowed,
        "contradicts_claim": allowed is not None and (bound.epsilon > claim["epsilon"] or low > allowed),
        "roc": {"fpr": fpr.tolist(), "tpr": tpr.tolist()},
    }


def _largest_auc_of(claim: Mapping[str, float]) -> float:
    """AUC compares a member with a non-member, and exchanging the two alters two patients: group privacy of size 2."""
    delta = (1 + math.exp(claim["epsilon"])) * claim["delta"]
    return largest_auc(2 * claim["epsilon"], delta) if delta < 1 else 1.0


def statements(result: Mapping[str, Any]) -> list[str]:
    """The findings of `audit_run` in sentences, each with its uncertainty and its ceiling."""
    level = f"{100 * result['confidence']:g} %"
    told = []
    for entry in result["attacks"]:
        low, high = entry["auc_interval"]
        bound, tail = entry["epsilon"], entry["tail"]
        few = min(entry["members"], entry["non_members"]) < FEW_PATIENTS
        seen = "tells training patients from others" if low > 0.5 else "no membership shown"
        coarse = "" if tail["false_positives_allowed"] else ", with no false accusation, as so few cannot show 1 %"
        claim = entry["claim"]
        told.append(
            f"{entry['target']}, {entry['attack']}: AUC {entry['auc']:.2f} ({level} interval {low:.2f} to {high:.2f}), "
            f"{entry['members']} training against {entry['non_members']} held-out patients: {seen}. "
            f"{tail['tpr']:.0%} found at 1 % false positives{coarse}. "
            f"Epsilon at least {bound['epsilon']:.1f}; a perfect attack on as many would show {bound['ceiling']:.1f}"
            + ("." if claim is None else f"; claimed {claim['epsilon']:.2g}{_verdict(entry['contradicts_claim'])}.")
            + (" Few patients: the interval is wide and proves little." if few else "")
        )
    nearest = result["nearest_neighbour"]
    if nearest is not None:
        told.append(
            f"synthetic volumes: {nearest['share_nearer_train']:.0%} of {nearest['synthetic']} lie nearer to one of "
            f"{nearest['patients']} training patients than to one of as many held-out ones (50 % expected without "
            f"copying), p = {nearest['p_value']:.3g}; the least p that so many patients can give is "
            f"{nearest['smallest_p']:.2g}. A heuristic: it bounds no epsilon."
        )
    for entry in result["one_run"]:
        claimed = entry["claimed_epsilon"]
        told.append(
            f"{entry['target']}, canaries: {entry['correct']} of {entry['guesses']} guesses right on "
            f"{entry['canaries']} canaries in one training: epsilon at least {entry['epsilon_lower_bound']:.1f} "
            f"({100 * entry['confidence']:g} %); all right would show {entry['ceiling']:.1f}"
            + ("." if claimed is None else f"; claimed {claimed:.2g}{_verdict(entry['contradicts_claim'])}.")
        )
    return told


def _verdict(contradicted: bool) -> str:
    return ": CONTRADICTED, look for a fault" if contradicted else ", not contradicted"


# --- canaries ---------------------------------------------------------------------------------------------------------


def mislabelled_phantoms(sampler: PublicSampler, *, seed: int, balls: int = 3) -> list[dict[str, Any]]:
    """Canaries from public phantoms: each volume of the pool with a label map that nothing in the image explains.

    Only a network that has seen the pair can predict it. The map holds `balls` balls of random classes 1 to 3.

    Args:
        sampler: pool; one canary each.
        seed: of the balls; canaries are public.
        balls: per canary.

    Returns:
        Items as in training: `image` `(4, x, y, z)` float32, `label` `(1, x, y, z)` uint8, `public` False.
    """
    rng = np.random.default_rng(seed)
    items = []
    for image, _ in sampler.volumes():
        shape = np.array(image.shape[1:])
        points = np.moveaxis(np.indices(image.shape[1:]), 0, -1)
        inside = np.argwhere((image != 0).any(dim=0).numpy())
        label = np.zeros(image.shape[1:], dtype=np.uint8)
        for _ in range(balls):
            centre = inside[rng.integers(len(inside))]
            radius = rng.uniform(0.1, 0.2) * shape.min()
            label[((points - centre) ** 2).sum(axis=-1) <= radius**2] = rng.integers(1, len(CLASSES))
        items.append({"image": image.float(), "label": torch.from_numpy(label)[None], "public": False})
    return items
