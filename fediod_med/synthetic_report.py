"""The quality of a run's synthetic volumes in numbers: what `synthetic/quality.json` holds.

Judged are the volumes that the hospitals were asked about, taken from the replay buffer, so that nothing is generated
for it. The reference is public: phantoms that none of these volumes was made from. Each figure stands beside the same
figure of phantoms: a generator that has learnt nothing returns its phantoms and scores as they do.

A hospital's own scans are a reference only inside the hospital, and only where it promised no privacy: every such
figure is a statistic of its patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fediod_med.data.sampler import PublicBatch, PublicSampler, centre_window, pad_to
from fediod_med.image_features import Features, bottleneck_features
from fediod_med.synthetic_quality import (
    density_coverage,
    frechet_distance,
    gaussian_kernel,
    median_bandwidth,
    mmd_p_value,
    multiscale_similarity,
    nearest_neighbours,
    precision_recall,
    squared_mmd,
    typical_distance,
)

MOST_VOLUMES = 24
"""Volumes of a set that are looked at: bounds the time to a few seconds."""
FEWEST_VOLUMES = 6
"""Density and coverage look at five neighbours."""
MEASURES: Mapping[str, tuple[str, str]] = {
    "kid": ("lower", "kernel inception distance: unbiased squared MMD, cubic kernel (Binkowski et al. 2018)"),
    "kid_p": ("higher", "chance of such a distance within one source, 500 permutations (Gretton et al. 2012)"),
    "mmd_gaussian": ("lower", "unbiased squared MMD, Gaussian kernel of the median distance (Gretton et al. 2012)"),
    "frechet_patches": (
        "lower",
        "Frechet distance over patches, shrunk covariances (Heusel et al. 2017; Chen et al. 2010); biased upwards, "
        "since patches of one volume are not independent: compare, do not quote",
    ),
    "precision": ("higher", "share of volumes among the reference, 3 neighbours (Kynkaanniemi et al. 2019)"),
    "recall": ("higher", "share of the reference among the volumes, 3 neighbours (Kynkaanniemi et al. 2019)"),
    "density": ("higher", "as precision, 5 neighbours, steady against outliers (Naeem et al. 2020)"),
    "coverage": ("higher", "as recall, 5 neighbours, steady against outliers (Naeem et al. 2020)"),
    "ms_ssim": ("as phantoms", "mean similarity of two volumes of the set, 1: all alike (Wang et al. 2003)"),
}
"""Key, which way is better, and what it is."""
_PAIRS = 16
_LEAST_BRAIN = 0.05  # share of a crop below which it is left out: one from a corner of the head tells nothing
_REFERENCE_DRAWS = 30_000_000  # the sampler's draws from here on are the reference's own
_DRAWS_A_PHANTOM = 30  # tries, for each phantom of the pool, at drawing phantoms not seen yet


@dataclass(frozen=True)
class Judged:
    """The volumes to judge, all as the heads lie.

    Attributes:
        asked: `(N, 4, D, H, W)` volumes the hospitals were asked about, see `distillation.asked_volumes`.
        made_from: the phantoms of `asked`, if any.
        finals: volumes of the final generator `(4, D, H, W)` by file name, each with its phantom (a batch of one).
    """

    asked: Tensor
    made_from: PublicBatch | None
    finals: Mapping[str, tuple[Tensor, PublicBatch | None]]


def quality_report(
    judged: Judged,
    *,
    sampler: PublicSampler,
    network: nn.Module,
    scans: Mapping[str, Sequence[Tensor]],
    withheld: Mapping[str, str],
    size: int,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure about a run's synthetic volumes, as plain values.

    Args:
        judged: the volumes.
        sampler: the public phantoms of the run.
        network: the public prior.
        scans: preprocessed training scans `(4, x, y, z)` by hospital; only of those that promised no privacy.
        withheld: why a hospital is not measured, by name.
        size: edge of the synthetic volumes, voxels.
        device: where features are computed.
        seed: of permutations and pairs.

    Returns:
        `reference`, `measures` (by key of `MEASURES`: `synthetic`, `phantoms`, `better`, `what`), `per_site` (figures,
        or `absent` with the reason), `dist_fid` and `nearest` (by file name). `measures` is empty, and `reference` says
        why, where there are too few volumes or phantoms.
    """
    rows = [index for index, volume in enumerate(judged.asked) if _shows_brain(volume)][:MOST_VOLUMES]
    asked, count = judged.asked[rows], len(rows)
    behind = [] if judged.made_from is None else [judged.made_from.only(index) for index in rows]
    control = PublicBatch.of(behind) if behind else None
    used = set() if control is None else set(control.phantoms.tolist())
    if control is None:  # the pool is halved: what one half scores against the other
        half = min(MOST_VOLUMES, len(sampler) // 2)
        control = draw_phantoms(sampler, count=half, without=set(), first=_REFERENCE_DRAWS)
        used = set() if control is None else set(control.phantoms.tolist())
    reference = draw_phantoms(sampler, count=MOST_VOLUMES, without=used, first=_REFERENCE_DRAWS)

    report: dict[str, Any] = {
        "reference": {
            "what": "public phantoms that none of the synthetic volumes was made from; no patient",
            "features": "deepest layer of the public prior, mean over the brain (volumes) or over patches of it, each "
            "channel in standard deviations of the phantoms",
            "synthetic": count,
            "phantoms": 0 if reference is None else len(reference.base),
        },
        "measures": {},
        "per_site": {site: {"absent": reason} for site, reason in withheld.items()},
        "dist_fid": {"absent": "not every hospital could be measured"},
        "nearest": {},
    }
    known = [batch for batch in (control, reference) if batch is not None]
    if known:
        phantoms = PublicBatch.of(known)
        raw = bottleneck_features(network, phantoms.base, device=device)

        def features(volumes: Iterable[Tensor]) -> Features:
            return bottleneck_features(network, volumes, device=device).standardised(raw)

        looked_at = raw.standardised(raw)
        report["nearest"] = _nearest(judged.finals, phantoms, looked_at, features)
        if len(phantoms.base) > 1:
            report["reference"]["typical_distance"] = typical_distance(looked_at.volumes)
    if control is None or reference is None or min(count, len(reference.base), len(control.base)) < FEWEST_VOLUMES:
        report["reference"]["absent"] = (
            f"expected {FEWEST_VOLUMES} volumes and as many phantoms of either kind; use more rounds or a larger pool"
        )
        reason = {"absent": "too few synthetic volumes or phantoms"}
        report["per_site"] |= dict.fromkeys(scans, reason)
        return report

    synthetic = features(asked)
    base, public = looked_at.part(0, len(control.base)), looked_at.part(len(control.base), len(phantoms.base))
    kernel = gaussian_kernel(median_bandwidth(base.volumes, public.volumes))
    found = {
        name: {
            "kid": squared_mmd(public.volumes, rows.volumes),
            "kid_p": mmd_p_value(public.volumes, rows.volumes, seed=seed),
            "mmd_gaussian": squared_mmd(public.volumes, rows.volumes, kernel),
            "frechet_patches": frechet_distance(public.patches, rows.patches),
            **precision_recall(public.volumes, rows.volumes)._asdict(),
            **density_coverage(public.volumes, rows.volumes)._asdict(),
            "ms_ssim": multiscale_similarity(volumes.to(device), pairs=_PAIRS, seed=seed),
        }
        for name, rows, volumes in (("synthetic", synthetic, asked), ("phantoms", base, control.base))
    }
    report["measures"] = {
        key: {**{name: values[key] for name, values in found.items()}, "better": better, "what": what}
        for key, (better, what) in MEASURES.items()
    }
    for site, volumes in scans.items():
        if len(volumes) < FEWEST_VOLUMES:
            report["per_site"][site] = {"absent": f"fewer than {FEWEST_VOLUMES} training scans"}
            continue
        own = features(centre_crop(volume, size) for volume in volumes[:MOST_VOLUMES])
        report["per_site"][site] = {"scans": len(own.volumes), **_against(own, synthetic=synthetic, phantoms=base)}
    if all("scans" in row for row in report["per_site"].values()) and report["per_site"]:
        report["dist_fid"] = _mean_over_sites(report["per_site"].values())
    return report


def draw_phantoms(sampler: PublicSampler, *, count: int, without: set[int], first: int) -> PublicBatch | None:
    """At most `count` different phantoms of the pool, none of `without`, cut as in training and upright; or none.

    Crops that hold next to no brain are passed over.
    `first` is the number of the first draw.
    """
    found: dict[int, PublicBatch] = {}
    free = min(count, len(sampler) - len(without))
    for step in range(first, first + _DRAWS_A_PHANTOM * len(sampler)):
        if len(found) >= free:
            break
        one = sampler.draw(step, 1)
        phantom = int(one.phantoms)
        if phantom not in without and phantom not in found and _shows_brain(one.base[0]):
            found[phantom] = one.upright()
    return PublicBatch.of(list(found.values())) if found else None


def _shows_brain(volume: Tensor) -> bool:
    return float((volume != 0).any(dim=0).float().mean()) >= _LEAST_BRAIN


def centre_crop(volume: Tensor, size: int) -> Tensor:
    """Cube `(4, size, size, size)` about the middle of the brain, zero-padded where the volume is smaller."""
    padded = pad_to(torch.as_tensor(volume), size)
    return padded[(slice(None), *centre_window(padded, size))]


def _against(own: Features, **sets: Features) -> dict[str, dict[str, float]]:
    """Distances of a hospital's scans to each set."""
    return {
        "kid": {name: squared_mmd(own.volumes, rows.volumes) for name, rows in sets.items()},
        "frechet_patches": {name: frechet_distance(own.patches, rows.patches) for name, rows in sets.items()},
    }


def _mean_over_sites(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The hospitals' Frechet distances, each weighed by its scans."""
    listed = list(rows)
    weights = [row["scans"] for row in listed]
    return {
        **{
            name: float(np.average([row["frechet_patches"][name] for row in listed], weights=weights))
            for name in ("synthetic", "phantoms")
        },
        "better": "lower",
        "what": "mean of the hospitals' Frechet distances over patches, each computed where the scans are and weighed "
        "by their number, in the manner of the Dist-FID of AsynDGAN (Chang et al. 2020)",
    }


def _nearest(
    finals: Mapping[str, tuple[Tensor, PublicBatch | None]], phantoms: PublicBatch, looked_at: Features, features: Any
) -> dict[str, Any]:
    """For each final volume, how far its nearest phantom is, and how far the one it was made from."""
    report: dict[str, Any] = {}
    for name, (x, public) in finals.items():
        if not _shows_brain(x):
            report[name] = {"absent": "this crop holds next to no brain"}
            continue
        row: dict[str, Any] = {}
        own = features([x]).volumes
        numbers = phantoms.phantoms.numpy()
        others = np.ones(len(numbers), dtype=bool)
        if public is not None:
            others = numbers != int(public.phantoms)
            inside = (public.base[0] != 0).any(dim=0)
            row["made_from"] = int(public.phantoms)
            row["made_from_distance"] = float(np.linalg.norm(own - features(public.base).volumes))
            row["rms_change"] = float((x - public.base[0])[:, inside].square().mean().sqrt())
        if others.any():
            found = nearest_neighbours(own, looked_at.volumes[others])
            row["nearest_other"] = int(numbers[others][found.rows[0]])
            row["nearest_other_distance"] = float(found.distances[0])
        report[name] = row
    return report
