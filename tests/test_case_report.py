"""The case report: complete, harmless whatever the ids and headers hold, and readable without any network."""

from __future__ import annotations

import base64
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fediod_med.case_report import CaseReport, case_html, write_html, write_png
from fediod_med.checkpoints import Provenance
from fediod_med.errors import InputError
from fediod_med.findings import Finding, Severity
from fediod_med.lesions import measure_lesions
from fediod_med.quality import FEATURES, QualityScore
from fediod_med.reporting.case import write_preview
from fediod_med.resources import NOT_FOR_CLINICAL_USE

EVIL = '<script src="http://x.example/a.js">alert(1)</script>"&\'$x_1$'
PROVENANCE = Provenance(
    kind="student",
    network={"backbone": "unet"},
    spacing=2.0,
    label_scheme="brats2018",
    sites=("north", "south"),
    privacy={},
    trained_on="patients",
    seed=1,
)


def finding(code: str, severity: Severity, message: str = "expected four sequences, found three") -> Finding:
    return Finding(code=code, severity=severity, case="p1", where="a.nii", message=message, fix="add the file")


def classes_of(shape=(24, 20, 16)) -> np.ndarray:
    classes = np.zeros(shape, dtype=np.uint8)
    classes[4:12, 4:12, 4:12] = 2
    classes[6:9, 6:9, 6:9] = 3
    classes[16:18, 14:16, 2:4] = 2
    return classes


@pytest.fixture
def report(tmp_path: Path) -> CaseReport:
    classes, affine = classes_of(), np.diag([2.0, 2, 2, 1])
    image = np.random.default_rng(0).random(classes.shape).astype(np.float32)
    picture = write_preview(tmp_path / "preview.png", {"T1c": image}, classes, affine, title="p1")
    return CaseReport(
        subject_id="p1",
        volumes_ml={"NCR": 0.0, "ED": 3.944, "ET": 0.216, "TC": 0.216, "WT": 4.16},
        lesions=measure_lesions(classes, affine),
        provenance=PROVENANCE,
        privacy="NOT PRIVATE: north",
        findings=(finding("W171", Severity.WARNING), finding("E140", Severity.ERROR)),
        quality=QualityScore(0.7134, 0.6, 0.8, dict.fromkeys(FEATURES, 0.25), {"input_warnings": 1.0}, "48 phantoms"),
        notes=("windows of 48 after a lack of memory",),
        pictures={"Three planes": picture},
    )


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "action", "data", "srcset"}]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_tells_everything(report: CaseReport, tmp_path: Path) -> None:
    page = Page(write_html(tmp_path / "p1.html", report).read_text(encoding="utf-8"))
    for words in (
        NOT_FOR_CLINICAL_USE,
        "NOT PRIVATE: north",
        "Segmentation of p1",
        "4.16",
        "0.71 predicted mean Dice",
        "0.60 to 0.80",
        "48 phantoms",
        "confidence TC",
        "input warnings",
        "expected four sequences, found three",
        "add the file",
        "windows of 48 after a lack of memory",
        "TC 1, WT 2, ET 1",
        "north, south",
        "mid-sagittal",
    ):
        assert words in page.text, words
    assert page.text.index("E140") < page.text.index("W171")  # errors first


def test_the_page_requests_nothing_and_runs_nothing(report: CaseReport) -> None:
    text = case_html(report)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "a", "base"} & set(page.tags)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "default-src 'none'" in text
    assert "http:" not in text and "https:" not in text and "url(" not in text


def test_the_picture_inside_is_the_file(report: CaseReport) -> None:
    (link,) = Page(case_html(report)).links
    (picture,) = report.pictures.values()
    assert base64.b64decode(link.partition(",")[2]) == picture.read_bytes()


def test_odd_values_are_shown_not_run(report: CaseReport, tmp_path: Path) -> None:
    odd = replace(
        report,
        subject_id=EVIL,
        privacy=EVIL,
        findings=(finding("E140", Severity.ERROR, EVIL),),
        notes=(EVIL,),
        provenance=replace(PROVENANCE, kind=EVIL, sites=(EVIL,), trained_on=EVIL),
        pictures={EVIL: next(iter(report.pictures.values()))},
    )
    page = Page(case_html(odd))
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 8
    assert all(link.startswith("data:image/png") for link in page.links)
    assert write_png(tmp_path / "odd.png", odd).stat().st_size > 0  # $ would start a formula


def test_a_bare_case_says_what_is_not_there(report: CaseReport) -> None:
    bare = CaseReport(
        "p2", {"WT": 0.0}, measure_lesions(np.zeros((4, 4, 4), np.uint8), np.eye(4)), PROVENANCE, "none known"
    )
    text = Page(case_html(bare)).text
    for words in ("nothing to report", "No quality score", "No tumour was found"):
        assert words in text
    assert "Pictures" not in text and "Notes" not in text


def test_many_lesions_are_cut_with_a_word_on_it(report: CaseReport) -> None:
    classes = np.zeros((40, 40, 5), dtype=np.uint8)
    classes[1::3, 1::3, 2] = 2
    page = Page(case_html(replace(report, lesions=measure_lesions(classes, np.eye(4)))))
    assert "WT 169" in page.text and "10 largest" in page.text
    assert page.tags.count("tr") < 60


def test_the_png_holds_the_preview_and_text(report: CaseReport, tmp_path: Path) -> None:
    with_picture = imread(write_png(tmp_path / "a.png", report))
    without = imread(write_png(tmp_path / "b.png", replace(report, pictures={})))
    assert with_picture.shape[1] == without.shape[1]
    assert with_picture.shape[0] > without.shape[0] + 300
    text = with_picture[-without.shape[0] :]
    assert (text[..., :3].min(axis=-1) < 0.5).mean() > 0.005  # dark letters below the picture


def test_another_format_is_no_picture(report: CaseReport, tmp_path: Path) -> None:
    fake = tmp_path / "fake.png"
    fake.write_bytes(b"GIF89a")
    for path in (fake, tmp_path / "absent.png"):
        odd = replace(report, pictures={"x": path})
        with pytest.raises(InputError, match=path.name):
            case_html(odd)
        with pytest.raises(InputError, match=path.name):
            write_png(tmp_path / "out.png", odd)
    assert not (tmp_path / "out.png").exists()
