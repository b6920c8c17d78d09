"""Reads `sites/<hospital>/site.yaml` into a `Site`: flat scalars, data and never code.

MONAI treats a config as code, so a site file is read by this module as plain data before MONAI sees it. Anything that
could act (`$`, `%`, `@`, `_target_`), nest or be misspelt is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fediod_med.data.layouts import LAYOUTS, Subject, find_subjects
from fediod_med.data.partitions import by_csv, names_a_patient, patient_id, split_fold
from fediod_med.data.transforms import DIVISOR
from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import get_scheme
from fediod_med.networks import BACKBONES
from fediod_med.plain_yaml import is_plain, read_plain

INITS = ("auto", "prior", "random")
PRIVACY_MODES = ("none", "dp-sgd", "gradient")
TRAINABLE = ("all", "decoder", "ends", "head", "norms")
PATIENT_IDS = ("visits", "subjects")
LARGEST_DELTA = 1e-5  # beyond it, a small cohort's delta permits publishing one whole patient
SITE_FILE = "site.yaml"
TEMPLATE = "template"


@dataclass(frozen=True)
class Site:
    """One hospital's settings; every field but `folder` is a key of `site.yaml`.

    Attributes:
        folder: where the site file lies.
        site_name: letters, digits and dashes.
        layout: folder layout of the data, see `data.layouts`.
        label_scheme: what the label values mean, see `labels.SCHEMES`.
        dataset_dir: root of the data; a relative path starts at the site's folder; `--data-root` overrides it.
        subject_pattern: regular expression at the start of the subject id.
        partition_csv: FeTS-style table `Partition_ID,Subject_ID`, with `partition_id` naming this site's part.
        partition_id: see `partition_csv`.
        folds: number of folds of the site's patients; 1: no held-out part.
        fold: the held-out fold.
        spacing: working grid, isotropic, mm.
        roi: training crop, voxels a side.
        backbone: teacher network, see `networks.build_segmenter`.
        width: its channels at full resolution.
        depth: its resolution levels.
        init: `prior` starts from the public prior, `random` from nothing, `auto` from the prior if it fits.
        rehearsal: share of public phantoms in each training batch's draw, 0 to below 1.
        epochs: fixed schedule; there is no early stop.
        steps_per_epoch: optimiser steps, whatever the number of patients.
        batch_size: crops a step.
        learning_rate: peak.
        seed: of training.
        num_workers: of the data loader.
        privacy_mode: `none` (every output is then stamped NOT PRIVATE), `dp-sgd` or `gradient`; a site file that sets
            `epsilon` and no mode means `dp-sgd`.
        epsilon: budget of the hospital's patients for everything that ever leaves; 0: none.
        delta: of the budget, at most 1e-5.
        clip_norm: C, of one patient's gradient (`dp-sgd`) or of one release (`gradient`).
        sample_rate: q, chance of each patient to take part in a private step.
        private_steps: T, private steps of the teacher; takes the place of epochs.
        private_rate: peak learning rate of private steps (Adam); `learning_rate` is for plain ones.
        crops: of one patient in a private step, clipped together.
        physical_batch: crops in memory at once during a private step.
        trainable: what a private step may change: `all`, `decoder`, `ends`, `head` or `norms`.
        subspace: number of public gradients whose span a private gradient is projected on; 0, or rehearsal 0: none.
        discriminator_steps: private steps of the discriminator over all rounds; it is frozen afterwards.
        discriminator_share: of the budget (share of the sum of squared GDP mu).
        counts_share: of the budget, for the noisy class counts.
        releases: planned answers and pull-backs in mode `gradient`.
        patient_ids: `visits`: a patient may have several subjects, told by the forms that `patient_id` knows;
            `subjects`: the hospital vouches that each subject is another patient.
        ledger_dir: folder of the ledger, from the site's folder or absolute.
        key_dir: folder of the ledger's key and witness; never inside `ledger_dir`.
    """

    folder: Path
    site_name: str
    layout: str
    label_scheme: str
    dataset_dir: str = ""
    subject_pattern: str = ""
    partition_csv: str = ""
    partition_id: str = ""
    folds: int = 1
    fold: int = 0
    spacing: float = 4.0
    roi: int = 48
    backbone: str = "unet"
    width: int = 16
    depth: int = 4
    init: str = "auto"
    rehearsal: float = 0.5
    epochs: int = 15
    steps_per_epoch: int = 20
    batch_size: int = 2
    learning_rate: float = 5e-4
    seed: int = 0
    num_workers: int = 0
    privacy_mode: str = "none"
    epsilon: float = 0.0
    delta: float = 1e-5
    clip_norm: float = 1.0
    sample_rate: float = 0.5
    private_steps: int = 60
    private_rate: float = 1e-3
    crops: int = 2
    physical_batch: int = 4
    trainable: str = "all"
    subspace: int = 60
    discriminator_steps: int = 40
    discriminator_share: float = 0.15
    counts_share: float = 0.05
    releases: int = 200
    patient_ids: str = "visits"
    ledger_dir: str = "privacy"
    key_dir: str = "keys"

    @property
    def private(self) -> bool:
        """Whether any privacy is promised."""
        return self.privacy_mode != "none"

    @property
    def data_root(self) -> Path:
        """Root of this hospital's data; `SettingsError` when neither the site file nor the caller names it."""
        if not self.dataset_dir:
            raise SettingsError(f"site {self.site_name}: no data folder; set dataset_dir in {SITE_FILE} or --data-root")
        return (self.folder / self.dataset_dir).resolve()

    def subjects(self) -> tuple[tuple[Subject, ...], tuple[Subject, ...]]:
        """This hospital's labelled subjects: training part and held-out fold.

        Raises:
            SettingsError: a private site whose ids do not tell patients from visits, and which does not vouch for them.
        """
        parts = split_subjects(
            self.data_root,
            layout=self.layout,
            subject_pattern=self.subject_pattern,
            partition_csv=str(self.folder / self.partition_csv) if self.partition_csv else "",
            partition_id=self.partition_id,
            folds=self.folds,
            fold=self.fold,
        )
        unknown = [s.subject_id for part in parts for s in part if not names_a_patient(s.subject_id)]
        if self.private and self.patient_ids == "visits" and unknown:
            raise SettingsError(
                f"site {self.site_name}: expected ids that tell a patient's visits apart, found {unknown[0]!r}; if "
                f"every subject is another patient, vouch for it with `patient_ids: subjects` in {SITE_FILE}"
            )
        return parts

    def network(self) -> dict[str, Any]:
        """Keywords of `networks.build_segmenter`."""
        return {
            "backbone": self.backbone,
            "width": self.width,
            "depth": self.depth,
            "in_channels": 4,
            "out_channels": 4,
        }


_TYPES: Mapping[str, str] = {f.name: str(f.type) for f in dataclasses.fields(Site) if f.name != "folder"}
_REQUIRED = tuple(f.name for f in dataclasses.fields(Site) if f.default is dataclasses.MISSING and f.name != "folder")


def load_site(folder: Path, *, data_root: Path | None = None) -> Site:
    """Read one hospital's site file.

    Args:
        folder: holds `site.yaml`.
        data_root: overrides `dataset_dir`.

    Raises:
        SettingsError: the file is missing or not plain data; the message names the key.
    """
    path = folder / SITE_FILE
    if not path.is_file():
        raise SettingsError(f"{path}: expected a site file, found nothing; run `fediod site init {folder.name}`")
    values = read_plain(path)
    unknown = [key for key in values if key not in _TYPES]
    if unknown:
        raise SettingsError(f"{path}: unknown key {unknown[0]!r}; known keys: {', '.join(_TYPES)}")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise SettingsError(f"{path}: expected key {missing[0]!r}, found none; add it")
    values.setdefault("privacy_mode", "dp-sgd" if values.get("epsilon") else "none")
    site = Site(folder=folder.resolve(), **{key: _typed(path, key, value) for key, value in values.items()})
    check_settings(site)
    return site if data_root is None else dataclasses.replace(site, dataset_dir=str(data_root.resolve()))


def load_sites(root: Path, *, data_root: Path | None = None) -> tuple[Site, ...]:
    """All hospitals below a folder, by name; the template is skipped.

    Raises:
        SettingsError: none found, a defective site file, or one name used twice.
    """
    folders = sorted(p.parent for p in root.glob(f"*/{SITE_FILE}") if p.parent.name != TEMPLATE)
    if not folders:
        raise SettingsError(f"{root}: expected folders with a {SITE_FILE}, found none; see `fediod site init`")
    sites = tuple(load_site(folder, data_root=data_root) for folder in folders)
    names = [site.site_name for site in sites]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise SettingsError(f"{root}: site_name {doubled[0]!r} is used by two site files; names must differ")
    return sites


def check_settings(site: Site) -> None:
    """Refuse settings that cannot be trained with, before any scan is read.

    `load_site` calls it; call it again after `dataclasses.replace`, which lets any value through.

    Raises:
        SettingsError: names the site file and the key.
    """
    path = site.folder / SITE_FILE
    get_scheme(site.label_scheme)
    choices = {
        "layout": (site.layout, LAYOUTS),
        "backbone": (site.backbone, BACKBONES),
        "init": (site.init, INITS),
        "privacy_mode": (site.privacy_mode, PRIVACY_MODES),
        "trainable": (site.trainable, TRAINABLE),
        "patient_ids": (site.patient_ids, PATIENT_IDS),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise SettingsError(f"{path}: key {key!r}: expected one of {', '.join(allowed)}, found {value!r}")
    for key in _TYPES:
        value = getattr(site, key)
        if isinstance(value, str) and not is_plain(value):
            raise SettingsError(f"{path}: key {key!r}: values starting with $, % or @ are not allowed: {value!r}")
    if not re.fullmatch(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*", site.site_name):
        raise SettingsError(f"{path}: site_name: expected letters, digits and dashes, found {site.site_name!r}")
    for key in ("spacing", "epochs", "steps_per_epoch", "batch_size", "learning_rate"):
        if not (math.isfinite(getattr(site, key)) and getattr(site, key) > 0):
            raise SettingsError(f"{path}: {key}: expected a positive number, found {getattr(site, key)}")
    fewest = 3 if site.backbone == "dynunet" else 2  # MONAI's DynUNet has no fewer levels
    if not fewest <= site.depth <= 4:  # the working grid has edges that are multiples of DIVISOR = 2 ** (4 - 1)
        raise SettingsError(
            f"{path}: depth: expected {fewest} to 4 levels for {site.backbone}, found {site.depth}; "
            f"change depth or backbone"
        )
    if site.width < 4 or (site.backbone == "segresnet" and site.width % 8):
        expected = "a multiple of 8 for segresnet" if site.backbone == "segresnet" else "4 or more channels"
        raise SettingsError(f"{path}: width: expected {expected}, found {site.width}")
    if site.roi % DIVISOR or site.roi < 2 * DIVISOR:
        raise SettingsError(f"{path}: roi: expected a multiple of {DIVISOR} from {2 * DIVISOR}, found {site.roi}")
    if not 0 <= site.rehearsal < 1:
        raise SettingsError(f"{path}: rehearsal: expected a share from 0 to below 1, found {site.rehearsal}")
    if site.num_workers < 0 or site.seed < 0:
        raise SettingsError(f"{path}: num_workers and seed: expected 0 or more, found {site.num_workers}, {site.seed}")
    if site.folds < 1 or not 0 <= site.fold < site.folds:
        raise SettingsError(f"{path}: expected folds >= 1 and 0 <= fold < folds, found {site.folds} and {site.fold}")
    _check_privacy(site, path)
    if bool(site.partition_csv) != bool(site.partition_id):
        raise SettingsError(f"{path}: partition_csv and partition_id belong together; found only one of them")


def _check_privacy(site: Site, path: Path) -> None:
    if not (math.isfinite(site.epsilon) and site.epsilon >= 0):
        raise SettingsError(f"{path}: epsilon: expected a finite budget of 0 or more, found {site.epsilon}")
    if site.private and site.epsilon == 0:
        raise SettingsError(f"{path}: privacy_mode {site.privacy_mode} needs a budget; set epsilon above 0")
    if not site.private and site.epsilon:
        raise SettingsError(
            f"{path}: epsilon {site.epsilon:g} with privacy_mode none would promise what nothing keeps; remove one"
        )
    if not 0 < site.delta <= LARGEST_DELTA:
        raise SettingsError(f"{path}: delta: expected above 0 and at most {LARGEST_DELTA:g}, found {site.delta}")
    for key in ("clip_norm", "private_rate"):
        if not (math.isfinite(getattr(site, key)) and getattr(site, key) > 0):
            raise SettingsError(f"{path}: {key}: expected a positive number, found {getattr(site, key)}")
    if not 0 < site.sample_rate <= 1:
        raise SettingsError(f"{path}: sample_rate: expected above 0 and at most 1, found {site.sample_rate}")
    for key in ("private_steps", "crops", "physical_batch", "discriminator_steps", "releases"):
        if getattr(site, key) < 1:
            raise SettingsError(f"{path}: {key}: expected 1 or more, found {getattr(site, key)}")
    if site.subspace < 0:
        raise SettingsError(f"{path}: subspace: expected 0 or more public gradients, found {site.subspace}")
    shares = site.discriminator_share, site.counts_share
    if min(shares) <= 0 or sum(shares) >= 1:
        raise SettingsError(
            f"{path}: discriminator_share and counts_share: expected positive shares that leave some for the teacher, "
            f"found {shares[0]:g} and {shares[1]:g}"
        )
    ledger, keys = (site.folder / site.ledger_dir).resolve(), (site.folder / site.key_dir).resolve()
    if keys == ledger or ledger in keys.parents:
        raise SettingsError(f"{path}: key_dir: expected a folder outside ledger_dir {ledger}, found {keys}")


def check_disjoint(sites: Sequence[Site]) -> None:
    """Refuse a federation in which one patient belongs to two hospitals.

    Raises:
        InputError: names the patient and both hospitals.
    """
    owner: dict[str, str] = {}
    for site in sites:
        for subject in (s for part in site.subjects() for s in part):
            patient = patient_id(subject.subject_id)
            if owner.setdefault(patient, site.site_name) != site.site_name:
                raise InputError(
                    f"patient {patient}: found at {owner[patient]} and {site.site_name}; a patient may belong to one "
                    f"hospital, change subject_pattern or partition"
                )


def split_subjects(
    dataset_dir: str | Path,
    *,
    layout: str,
    subject_pattern: str = "",
    partition_csv: str = "",
    partition_id: str = "",
    folds: int = 1,
    fold: int = 0,
) -> tuple[tuple[Subject, ...], tuple[Subject, ...]]:
    """Labelled subjects of one hospital, split into training part and held-out fold; errors as in the layout module."""
    found = find_subjects(Path(dataset_dir), layout, pattern=subject_pattern or None, require_label=True)
    if partition_csv:
        parts = by_csv(found, Path(partition_csv))
        if partition_id not in parts:
            raise SettingsError(f"{partition_csv}: expected Partition_ID {partition_id!r}, found {', '.join(parts)}")
        found = parts[partition_id]
    return split_fold(found, folds=folds, fold=fold)


def _typed(path: Path, key: str, value: Any) -> Any:
    wanted = _TYPES[key]
    if wanted == "str" and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if wanted == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    hint = " (YAML reads 1e-3 as text; write 1.0e-3 or 0.001)" if wanted == "float" and isinstance(value, str) else ""
    raise SettingsError(f"{path}: key {key!r}: expected {wanted}, found {value!r}{hint}")
