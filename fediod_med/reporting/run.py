"""The figures of a distillation run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fediod_med.reporting.charts import has_numbers, write_comparison, write_training_curves
from fediod_med.reporting.volumes import PanelRow, write_panel


def write_figures(
    folder: Path,
    *,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    panel: Sequence[PanelRow],
    banner: str = "",
) -> dict[str, Path]:
    """The figures of a distillation run: `comparison.png`, `curves.png`, `panel.png`.

    Args:
        folder: made when absent.
        summary: with `rows` (`evaluation.summarise` by key) and `data`, the words for what was scored.
        history: loss terms by round; no curves are drawn when it holds no numbers.
        panel: real, synthetic, ensemble, student.
        banner: as in `write_preview`.

    Returns:
        Paths by name without ending.
    """
    rows = summary["rows"]
    patients = next(iter(rows.values())).get("patients")
    note = f"{patients} held-out {summary.get('data', 'patients')}" if patients else str(summary.get("data", ""))
    paths = {
        "comparison": write_comparison(
            folder / "comparison.png", rows, title="Every row on the same held-out scans", note=note, banner=banner
        ),
        "panel": write_panel(folder / "panel.png", panel, title="Slices, radiological view", banner=banner),
    }
    if has_numbers(history):
        paths["curves"] = write_training_curves(
            folder / "curves.png", history, title="Distillation by round", banner=banner
        )
    return paths
