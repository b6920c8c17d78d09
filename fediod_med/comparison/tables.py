"""`results.json` as a Markdown and a LaTeX table, and the targets in words; each says NOT PRIVATE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fediod_med.comparison.rows import OURS
from fediod_med.labels import REGIONS
from fediod_med.metrics import ABSENT_REGION_POLICY
from fediod_med.resources import NOT_FOR_CLINICAL_USE

_COLUMNS = (*REGIONS, "mean")
_HEAD = (
    "row",
    *_COLUMNS,
    "95 % interval",
    "HD95",
    "worst hospital",
    "ours - row",
    "Holm p",
    "MB up",
    "MB down",
    "minutes",
)
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def markdown(results: Mapping[str, Any]) -> str:
    """The table of all rows, targets, the table of hospitals, what leaves a hospital, and how to read it."""
    sites = _site_table(results)
    leaves = [(row["name"], row["leaves"], "yes" if row["deployable"] else "no") for row in results["rows"].values()]
    parts = [
        f"**{_banner(results)}**",
        _markdown_table(_HEAD, _cells(results)),
        "\n".join(f"- {line}" for line in target_lines(results)),
        "Mean Dice per hospital (patients):\n\n" + _markdown_table(*sites),
        "What leaves a hospital, and whether hospitals that share neither scans nor weights could have the row:\n\n"
        + _markdown_table(("row", "leaves", "possible"), leaves),
        _caption(results),
        *_incomplete(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(results: Mapping[str, Any]) -> str:
    """The table of all rows for `booktabs`."""
    rows = [" & ".join(escape(cell) for cell in cells) + r" \\" for cells in _cells(results)]
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{escape(_banner(results))}. {escape(_caption(results))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(_HEAD) - 1)}}}",
        r"\toprule",
        " & ".join(escape(name) for name in _HEAD) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text with LaTeX's ten special characters made harmless."""
    return "".join(_LATEX.get(character, character) for character in text)


def target_lines(results: Mapping[str, Any]) -> list[str]:
    """One sentence per target: the value, the bound, met or missed, and by how much."""
    lines = []
    for target in results["targets"]:
        verdict = "met" if target["met"] else "missed"
        interval = " (95 % interval {:+.3f} to {:+.3f})".format(*target["ci95"]) if "ci95" in target else ""
        lines.append(
            f"{target['name']} ({target['rival']}): {target['value']:.3f}{interval}, target {target['bound']:.2f}: "
            f"{verdict}, by {abs(target['margin']):.3f}"
            + ("" if target["met"] or target["margin"] < 0 else ", but the interval holds 0")
        )
    return lines


def _banner(results: Mapping[str, Any]) -> str:
    return f"{results['privacy']}. Scores on {results['data']}. {NOT_FOR_CLINICAL_USE}"


def _caption(results: Mapping[str, Any]) -> str:
    patients = max((row.get("patients", 0) for row in results["rows"].values()), default=0)
    return (
        f"Mean Dice over {patients} cross-validated {results['data']}, {results['folds']} folds, seeds "
        f"{', '.join(map(str, results['seeds']))}; each tested once per seed and averaged over seeds before anything "
        "else. A cell is one fold and one seed. Intervals: bootstrap over patients. Paired: ours minus row in the "
        "cells that both have, with its interval, Wilcoxon signed-rank p with Holm's correction. HD95 in mm. MB: per "
        "hospital, mean over hospitals. Minutes: one cell on one worker. "
        f"{ABSENT_REGION_POLICY}"
    )


def _incomplete(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, row in results["rows"].items():
        if not row["complete"]:
            reasons = sorted({failure["reason"] for failure in row["failures"]})
            lines.append(f"{key}: {row['cells']} cells done, not complete. {' '.join(reasons)}".strip())
    return ["Rows that are not complete:\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []


def _cells(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    table = []
    for key, row in results["rows"].items():
        if "dice" not in row:
            table.append((row["name"], *["-"] * (len(_HEAD) - 1)))
            continue
        test = results["paired"].get(key)
        paired = "-" if test is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(test["difference"], *test["ci95"])
        part = f"{row['cells']} of {results['folds'] * len(results['seeds'])} cells"
        name = row["name"] if row["complete"] else f"{row['name']} ({part})"
        table.append(
            (
                f"{name} *" if key == OURS else name,
                *(f"{row['dice'][column]:.3f}" for column in _COLUMNS),
                "{:.3f} to {:.3f}".format(*row["ci95"]["mean"]),
                f"{row['hd95_mm']['mean']:.1f}",
                f"{row['worst_site']} {row['worst_site_mean']:.3f}",
                paired,
                "-" if test is None else f"{test['holm_p']:.3f}",
                _megabytes(row["bytes"]["up"]),
                _megabytes(row["bytes"]["down"]),
                f"{row['seconds'] / 60:.1f}",
            )
        )
    return table


def _site_table(results: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    scored = {key: row for key, row in results["rows"].items() if "sites" in row}
    names = list(dict.fromkeys(site for row in scored.values() for site in row["sites"]))
    counts = {name: max(row["sites"].get(name, {}).get("patients", 0) for row in scored.values()) for name in names}
    body = [
        (row["name"], *(f"{row['sites'][name]['mean']:.3f}" if name in row["sites"] else "-" for name in names))
        for row in scored.values()
    ]
    return ("row", *(f"{name} ({counts[name]})" for name in names)), body


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _megabytes(sent: Mapping[str, float]) -> str:
    return f"{sum(sent.values()) / len(sent) / 1e6:.1f}" if sent else "-"
