"""One page per case for people: what was found, how sure the model is, what was odd about the input, which model spoke.

The HTML file carries its pictures and styles inside, runs no script and requests nothing (its content policy forbids
it), so it can be opened, mailed or archived anywhere. The PNG holds the same on one picture.
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from fediod_med import __version__
from fediod_med.checkpoints import Provenance
from fediod_med.durable import write_atomically
from fediod_med.errors import InputError
from fediod_med.findings import Finding, Severity
from fediod_med.labels import REGIONS
from fediod_med.lesions import SIDE_RULE, CaseLesions, Lesion
from fediod_med.quality import COVERAGE, QualityScore
from fediod_med.resources import NOT_FOR_CLINICAL_USE

LISTED_LESIONS = 10
"""Lesions per region in the HTML report; the JSON beside it has more."""
VOLUME_ORDER = ("WT", "TC", "ET", "ED", "NCR")
REGION_WORDS: Mapping[str, str] = {
    "WT": "whole tumour (NCR + ED + ET)",
    "TC": "tumour core (NCR + ET)",
    "ET": "enhancing tumour",
    "ED": "oedema",
    "NCR": "necrotic or non-enhancing core",
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_WIDTH, _PNG_DPI, _LINE = 11.0, 130, 0.19  # inches, dots per inch, inches per line of text
_PNG_COLUMNS = 128
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:62rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.6rem 0}h2{font-size:1.15rem;margin:1.6rem 0 .4rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #ddd}
th{font-weight:600}td.n{text-align:right;font-variant-numeric:tabular-nums}
.banner{background:#fff3e6;border-left:.4rem solid #d55e00;padding:.5rem .8rem;margin:.4rem 0}
.error{color:#a00000;font-weight:600}.warning,.privacy{color:#8a4b00;font-weight:600}
.score{font-size:1.6rem;font-weight:600}.small{color:#555;font-size:.87rem}img{max-width:100%;height:auto}
"""


@dataclass(frozen=True)
class CaseReport:
    """What one page tells.

    Attributes:
        subject_id: the case, as it is called in the other outputs.
        volumes_ml: by class and region.
        lesions: from `lesions.measure_lesions`.
        provenance: of the model's weights.
        privacy: one line on what the model's privacy is worth.
        findings: about the input.
        quality: predicted Dice, when it was computed.
        notes: what happened on the way, such as smaller windows after a lack of memory.
        pictures: PNG files by caption, in order.
    """

    subject_id: str
    volumes_ml: Mapping[str, float]
    lesions: CaseLesions
    provenance: Provenance
    privacy: str
    findings: Sequence[Finding] = ()
    quality: QualityScore | None = None
    notes: Sequence[str] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)


def write_html(path: Path, report: CaseReport) -> Path:
    """Write the report as one self-contained HTML file, atomically.

    Raises:
        InputError: a picture cannot be read or is no PNG.
    """
    text = case_html(report)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def case_html(report: CaseReport) -> str:
    """The HTML text; every value is escaped, so an odd id or header cannot change the page."""
    title = f"Segmentation of {_text(report.subject_id)}"
    sections = [
        ("Input", _findings_html(report.findings)),
        ("Volumes", _volumes_html(report.volumes_ml)),
        ("Quality", _quality_html(report.quality)),
        ("Lesions", _lesions_html(report.lesions)),
        *(("Pictures", _pictures_html(report.pictures)) for _ in range(bool(report.pictures))),
        *(("Notes", _list(report.notes)) for _ in range(bool(report.notes))),
        ("Model", _table((), _model_rows(report))),
    ]
    body = "\n".join(f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="banner"><strong>{NOT_FOR_CLINICAL_USE}</strong><br>Privacy of the model: {_text(report.privacy)}</p>
{body}
<p class="small">fediod-med {__version__}. {NOT_FOR_CLINICAL_USE}</p>
</body>
</html>
"""


def write_png(path: Path, report: CaseReport) -> Path:
    """Write the report as one picture: the first of `pictures` on top, the numbers below.

    Raises:
        InputError: the picture cannot be read or is no PNG.
    """
    lines = _plain_lines(report)
    first = next(iter(report.pictures.values()), None)
    picture = None if first is None else imread(_checked_png(first))
    top = 0.0 if picture is None else _PNG_WIDTH * picture.shape[0] / picture.shape[1]
    height = top + _LINE * (len(lines) + 2)
    figure = Figure(figsize=(_PNG_WIDTH, height), facecolor="white")
    if picture is not None:
        axes = figure.add_axes((0, 1 - top / height, 1, top / height))
        axes.imshow(picture, interpolation="lanczos")
        axes.set_axis_off()
    for number, (line, strong) in enumerate(lines):
        figure.text(
            0.15 / _PNG_WIDTH,
            1 - (top + _LINE * (number + 1)) / height,
            line.replace("$", r"\$"),  # or matplotlib would read formulas
            family="DejaVu Sans Mono",
            fontsize=8.5,
            fontweight="bold" if strong else "normal",
            va="top",
            color="#222222",
        )
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_PNG_DPI))
    return path


# ---------------------------------------------------------------- html


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers are put to the right; with no head the first cell of each row is its heading."""
    lines = ["<table>"]
    if head:
        lines.append("<thead><tr>" + "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head) + "</tr></thead>")
    lines.append("<tbody>")
    for row in rows:
        cells = [
            f'<th scope="row">{_text(cell)}</th>'
            if not head and column == 0
            else f'<td class="n">{_text(_number(cell))}</td>'
            if isinstance(cell, int | float)
            else f"<td>{_text(cell)}</td>"
            for column, cell in enumerate(row)
        ]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table>\n"])


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>\n"


def _findings_html(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>The checks found nothing to report.</p>\n"
    rows = "".join(
        f'<tr><td class="{_text(found.severity)}">{_text(found.severity)}</td><td>{_text(found.code)}</td>'
        f"<td>{_text(found.message)}</td><td>{_text(found.fix)}</td></tr>\n"
        for found in _by_severity(findings)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Severity", "Code", "What was found", "What to do"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>\n"


def _volumes_html(volumes: Mapping[str, float]) -> str:
    rows = [(name, REGION_WORDS[name], volumes[name]) for name in VOLUME_ORDER if name in volumes]
    return _table(("Region", "Meaning", "ml"), rows)


def _quality_html(quality: QualityScore | None) -> str:
    if quality is None:
        return "<p>No quality score was computed.</p>\n"
    return (
        f'<p><span class="score">{quality.value:.2f}</span> predicted mean Dice of TC, WT and ET '
        f"({COVERAGE:.0%} of comparable cases: {quality.low:.2f} to {quality.high:.2f}). "
        "An estimate from the model's own probabilities: a model that is wrong and sure of it deceives it.</p>\n"
        + _table(("It rests on", "Value"), _named(quality.rests_on))
        + (_table(("Shown beside it", "Value"), _named(quality.beside)) if quality.beside else "")
        + f'<p class="small">Calibrated on {_text(quality.calibrated_on)}.</p>\n'
    )


def _named(values: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name.replace("_", " "), float(value)) for name, value in values.items()]


def _lesions_html(lesions: CaseLesions) -> str:
    head = ("Region", "No.", "ml", "Longest mm", "Axial mm x mm", "Centre mm (R, A, S)", "Side", "")
    rows = [
        (region, number, *_lesion_cells(lesion))
        for region in REGIONS
        for number, lesion in enumerate(lesions.regions[region][:LISTED_LESIONS], start=1)
    ]
    if not rows:
        return "<p>No tumour was found.</p>\n"
    counts = ", ".join(f"{region} {len(found)}" for region, found in lesions.regions.items())
    return (
        f"<p>Connected components: {counts}"
        + (f"; the {LISTED_LESIONS} largest of each region are listed" if len(rows) < _count(lesions) else "")
        + f".</p>\n{_table(head, rows)}"
        + f'<p class="small">{_text(SIDE_RULE)} Decided by the {_text(lesions.midline.decided_by)}.</p>\n'
    )


def _lesion_cells(lesion: Lesion) -> tuple[float | str, ...]:
    return (
        lesion.volume_ml,
        lesion.diameter_mm,
        f"{lesion.axial_diameter_mm:.1f} x {lesion.axial_perpendicular_mm:.1f}",
        ", ".join(f"{x:.1f}" for x in lesion.centroid_mm),
        lesion.side,
        "touches the border of the image" if lesion.touches_border else "",
    )


def _count(lesions: CaseLesions) -> int:
    return sum(len(found) for found in lesions.regions.values())


def _pictures_html(pictures: Mapping[str, Path]) -> str:
    figures = []
    for caption, path in pictures.items():
        content = base64.b64encode(_checked_png(path).read_bytes()).decode("ascii")
        figures.append(
            f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{content}">'
            f"<figcaption>{_text(caption)}</figcaption></figure>\n"
        )
    return "".join(figures)


def _model_rows(report: CaseReport) -> list[tuple[str, str]]:
    model = report.provenance
    return [
        ("Kind", model.kind),
        ("Trained on", model.trained_on),
        ("Hospitals behind it", ", ".join(model.sites) or "none"),
        ("Privacy", report.privacy),
        ("Working grid", f"{model.spacing:g} mm"),
        ("Version", f"{model.version}" + (f", commit {model.commit}" if model.commit else "")),
    ]


def _checked_png(path: Path) -> Path:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_PNG_SIGNATURE))
    except OSError as error:
        raise InputError(f"{path}: expected a picture for the report, it could not be read ({error})") from error
    if start != _PNG_SIGNATURE:
        raise InputError(f"{path}: expected a PNG picture for the report, found another format")
    return path


def _by_severity(findings: Sequence[Finding]) -> list[Finding]:
    order = list(Severity)
    return sorted(findings, key=lambda found: (order.index(found.severity), found.code))


# ---------------------------------------------------------------- plain text of the picture


def _plain_lines(report: CaseReport) -> list[tuple[str, bool]]:
    """Lines of the picture's lower part, each with whether it is a heading."""
    lines: list[tuple[str, bool]] = [(NOT_FOR_CLINICAL_USE, True)]

    def add(text: str, *, strong: bool = False) -> None:
        for part in textwrap.wrap(text, _PNG_COLUMNS, subsequent_indent="    ") or [""]:
            lines.append((part, strong))

    add(f"Privacy of the model: {report.privacy}")
    add(report.subject_id, strong=True)
    add("   ".join(f"{n} {report.volumes_ml[n]:.2f} ml" for n in VOLUME_ORDER if n in report.volumes_ml))
    if report.quality is not None:
        found = report.quality
        add(f"Predicted mean Dice {found.value:.2f} ({COVERAGE:.0%} interval {found.low:.2f} to {found.high:.2f})")
    add("Largest lesion of each region", strong=True)
    for region in REGIONS:
        lesions = report.lesions.regions[region]
        if lesions:
            cells = _lesion_cells(lesions[0])
            add(
                f"{region}  {cells[0]:8.2f} ml   longest {cells[1]:6.1f} mm   axial {cells[2]} mm   {cells[4]}   "
                f"({len(lesions)} in all)"
            )
        else:
            add(f"{region}  none")
    if report.findings:
        add("Input", strong=True)
        ordered = _by_severity(report.findings)
        for finding in ordered[:8]:
            add(f"{finding.severity} {finding.code}: {finding.message}")
        if len(ordered) > 8:
            add(f"and {len(ordered) - 8} more")
    for note in report.notes:
        add(f"Note: {note}")
    add(f"{report.provenance.kind}, trained on {report.provenance.trained_on}, fediod-med {__version__}")
    return lines
