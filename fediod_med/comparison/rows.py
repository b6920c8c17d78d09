"""The rows of the comparison: their stable keys, their order, their words, and what leaves a hospital in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fediod_med.errors import SettingsError

OURS = "ours"
SITE = "site:"
WITHOUT = "ours_without_"
WITH = "ours_with_"
ENSEMBLES = (
    "ensemble_mean",
    "ensemble_size",
    "ensemble_class_ratio",
    "ensemble_discriminator",
    "ensemble_entropy",
    "ensemble_competence",
)
AVERAGING = ("fedavg", "fedavg_tuned", "fedprox", "fedprox_tuned")
PARTS = ("gan", "clarity", "unique", "mask", "transfer", "realism", "competence", "rehearsal", "phantoms")
"""What `ours` is run without, one part at a time; without its generator it is the row `kd_phantoms`."""
ADDITIONS = (
    "mirrors",
    "entropy",
    "search",
    "mixup",
    "learned",
    "selection",
    "rounds",
    "scales",
    "augment",
    "penalty",
    "spectral",
    "joint",
)
"""What `ours` is run with beyond its defaults, one at a time; a part becomes a default only if this table says so."""
IN_GENERATIONS = ("kd_generations", "ours_generations")
"""The rows whose teachers train on from the student."""
DISTILLED = (
    "kd_phantoms",
    "kd_generations",
    OURS,
    "ours_generations",
    "kd_real",
    "kd_noise",
    "asyndgan",
    "fediod_js_plus",
    "fediod_js_minus",
    *(WITHOUT + part for part in PARTS),
    *(WITH + part for part in ADDITIONS),
)
ALIASES = {WITHOUT + "generator": "kd_phantoms"}
"""Rows that are another row by definition, and are computed once."""

_QUERIES = "class counts once; class probabilities and gradients about synthetic volumes each round"
_NO_CRITIC = "class counts once; class probabilities about synthetic volumes each round"
_TEACHER = "the trained teacher's weights, once"
_WEIGHTS = "the network's weights after every round"
_CRITIC = "realism and gradients of a discriminator about synthetic volumes each round"
_NOTHING = "nothing"


@dataclass(frozen=True)
class RowKind:
    """What a row is.

    Attributes:
        key: stable name in `results.json`.
        name: words for tables.
        leaves: what leaves each hospital, in words.
        deployable: whether hospitals that share neither scans nor weights could have it.
    """

    key: str
    name: str
    leaves: str
    deployable: bool


_FIXED: tuple[RowKind, ...] = (
    RowKind("prior", "public prior only (no patient)", _NOTHING, True),
    RowKind("ensemble_mean", "teacher ensemble, equal weights", _TEACHER, False),
    RowKind("ensemble_size", "teacher ensemble, weights by patients", _TEACHER, False),
    RowKind("ensemble_class_ratio", "teacher ensemble, class-ratio weights", _TEACHER, False),
    RowKind("ensemble_discriminator", "teacher ensemble, class ratio x discriminator", _TEACHER, False),
    RowKind("ensemble_entropy", "teacher ensemble, class ratio x voxel entropy", _TEACHER, False),
    RowKind("ensemble_competence", "teacher ensemble, class ratio x Dice on phantoms", _TEACHER, False),
    RowKind("pooled", "all scans pooled", "every scan and label map", False),
    RowKind("fedavg", "FedAvg", _WEIGHTS, False),
    RowKind("fedavg_tuned", "FedAvg, tuned on validation", _WEIGHTS, False),
    RowKind("fedprox", "FedProx", _WEIGHTS, False),
    RowKind("fedprox_tuned", "FedProx, tuned on validation", _WEIGHTS, False),
    RowKind("one_shot", "teachers' weights averaged once", _TEACHER, False),
    RowKind("kd_phantoms", "distilled on public phantoms, no generator", _NO_CRITIC, True),
    RowKind("kd_generations", "distilled on public phantoms, in three generations", _NO_CRITIC, True),
    RowKind(OURS, "ours", _QUERIES, True),
    RowKind("ours_generations", "ours, in three generations", _QUERIES, True),
    RowKind("kd_real", "distilled on the hospitals' own training scans (ceiling)", "every training scan", False),
    RowKind("kd_noise", "distilled on smooth noise", _NO_CRITIC, True),
    RowKind("asyndgan", "AsynDGAN: discriminators and public label maps, no teachers", _CRITIC, True),
    RowKind("fediod_js_plus", "FedIOD as released: JS added, class ratio, unconditional", _QUERIES, True),
    RowKind("fediod_js_minus", "FedIOD as described: JS subtracted, class ratio, unconditional", _QUERIES, True),
)
_PART_WORDS = {
    "gan": "realism term",
    "clarity": "clarity term",
    "unique": "uniqueness term",
    "mask": "mask term",
    "transfer": "transfer term",
    "realism": "discriminators in the ensemble's weights",
    "competence": "competence in the ensemble's weights",
    "rehearsal": "rehearsal of phantoms",
    "phantoms": "rounds on phantoms",
}
_ADDITION_WORDS = {
    "mirrors": "answers averaged over mirror images",
    "entropy": "voxel entropy in the ensemble's weights",
    "search": "a search for volumes on which the student errs",
    "mixup": "mixup of the student's batches",
    "learned": "ensemble weights learned on phantoms",
    "selection": "a student selected by answers held out",
    "rounds": "one round for each student step",
    "scales": "discriminators at two scales",
    "augment": "augmentation before the discriminators",
    "penalty": "a gradient penalty on the discriminators",
    "spectral": "spectral norm in the discriminators",
    "joint": "discriminators of volume and prediction",
}


def row_kind(key: str) -> RowKind:
    """What a row is; `SettingsError` on an unknown key."""
    for kind in _FIXED:
        if kind.key == key:
            return kind
    if key.startswith(SITE):
        return RowKind(key, f"{key.removeprefix(SITE)} alone", _NOTHING, True)
    if key.startswith(WITHOUT) and (part := key.removeprefix(WITHOUT)) in PARTS:
        return RowKind(key, f"ours without the {_PART_WORDS[part]}", _QUERIES, True)
    if key.startswith(WITH) and (part := key.removeprefix(WITH)) in ADDITIONS:
        return RowKind(key, f"ours with {_ADDITION_WORDS[part]}", _QUERIES, True)
    raise SettingsError(f"row: unknown key {key!r}")


def all_rows(site_names: Sequence[str]) -> tuple[str, ...]:
    """Every row, in the order in which they are run and shown."""
    fixed = [kind.key for kind in _FIXED]
    sites, without, more = (SITE + n for n in site_names), (WITHOUT + p for p in PARTS), (WITH + p for p in ADDITIONS)
    return ("prior", *sites, *fixed[1:], *without, *more)


def chosen_rows(patterns: Sequence[str], site_names: Sequence[str]) -> tuple[str, ...]:
    """Rows that match any of the patterns (`ours*`, `site:*`), in their usual order.

    Without a pattern the comparison itself: all of them but the additions to `ours` and the rows in generations, which
    are asked for by name.

    Raises:
        SettingsError: a pattern matches nothing.
    """
    known = all_rows(site_names)
    if not patterns:
        return tuple(row for row in known if not row.startswith(WITH) and row not in IN_GENERATIONS)
    wanted = [ALIASES.get(pattern, pattern) for pattern in patterns]
    for pattern in wanted:
        if not any(fnmatchcase(row, pattern) for row in known):
            raise SettingsError(f"--rows {pattern}: expected one of {', '.join(known)} or a pattern, found no such row")
    return tuple(row for row in known if any(fnmatchcase(row, pattern) for pattern in wanted))
