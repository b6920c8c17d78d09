"""The figures of a run folder: the rows compared, the rounds, one case, and the synthetic volumes by round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.data.nifti.reading import read_label, read_subject
from fediod_med.reporting.run import write_figures
from fediod_med.reporting.volumes import PanelRow, RoundRow, write_rounds
from fediod_med.runs.finished import FinishedRun
from fediod_med.runs.scoring import Case, Predictor
from fediod_med.runs.volumes import Finals
from fediod_med.snapshots import read_rounds


def write_run_figures(
    out: Path,
    done: FinishedRun,
    *,
    summary: Mapping[str, Any],
    case: Case,
    predictors: Mapping[str, Predictor],
    finals: Finals,
    banner: str,
) -> None:
    """Write `figures/` of a run folder; `synthetic.png` where snapshots lie in `synthetic/`.

    Args:
        out: run folder.
        done: the distillation.
        summary: content of `summary.json`.
        case: the held-out scan to show, unless the run is discreet.
        predictors: by row.
        finals: volumes of the final generator; the first is shown.
        banner: what the model may be trusted with.
    """
    write_figures(
        out / "figures",
        summary=summary,
        # realism of each hospital (`realism:<site>`) is in history.json; the curve shows their mean
        history=[{k: v for k, v in record.items() if k != "sites" and ":" not in k} for record in done.student.history],
        panel=[_synthetic_row(done, finals)] if done.discreet else _panel(done, case, predictors, finals),
        banner=banner,
    )
    if rounds := read_rounds(out / "synthetic"):
        write_rounds(
            out / "figures" / "synthetic.png",
            [RoundRow(r.round, r.phantom, r.x, r.labels, r.ensemble, r.affine) for r in rounds],
            title="Synthetic volumes by round, made from public phantoms, radiological view",
            banner=banner,
        )


def _panel(done: FinishedRun, case: Case, predictors: Mapping[str, Predictor], finals: Finals) -> list[PanelRow]:
    """The real / synthetic / ensemble / student figure."""
    _, subject, scheme = case
    scan = read_subject(subject)
    truth = "phantom, truth" if done.data_name == "phantoms" else "real, expert"
    return [
        PanelRow(truth, scan.array, read_label(subject, scheme), scan.affine),
        _synthetic_row(done, finals),
        *[
            PanelRow(key, scan.array, predictors[key](subject), scan.affine)
            for key in ("ensemble", "student")
            if key in predictors
        ],
    ]


def _synthetic_row(done: FinishedRun, finals: Finals) -> PanelRow:
    x, public = next(iter(finals.values()))
    spacing = done.plan.spacing
    return PanelRow(
        "synthetic",
        x.numpy(),
        None if public is None else public.classes[0].numpy(),
        np.diag([spacing, spacing, spacing, 1.0]),
    )
