"""The review app in a real browser, page by page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_browser import (  # type: ignore[import-not-found]
    CHROMIUM,
    FLAGS,
    Served,
    box,
    changed,
    go,
    picture,
    serve,
    settle,
    sync_api,
    watch,
)
from PIL import Image

from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.review.store import ReviewStore

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="browser tests need chromium: apt-get install chromium"),
]
PAGES = ("Overview", "Synthetic volumes", "Cases", "Review", "Privacy", "Segment")
AXE = Path(__file__).parent / "vendor" / "axe-4.14.1.min.js"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("app"), ("case-a", "case-b", "case-c"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api.expect.set_options(timeout=30_000)  # as for the pages: how fast the app is, benchmarks/app.py measures
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    shown = context.new_page()
    shown.set_default_timeout(30_000)
    yield shown
    context.close()


def test_slices_are_turned_and_overlays_toggled(app: Served, page: Any) -> None:
    seen = watch(page)
    go(page, app, "Synthetic volumes")
    sync_api.expect(page.get_by_text(NOT_FOR_CLINICAL_USE, exact=True)).to_be_visible()
    alt = page.locator('[data-testid="stImage"] img').first.get_attribute("alt")
    assert alt.startswith("Synthetic axial slice") and "no patient" in alt
    before = picture(page, 1)  # the coronal one, whose crosshair moves even where slices look alike
    slider = page.get_by_role("slider", name="Axial slice")
    at = int(slider.input_value())
    slider.press("ArrowRight")
    before = changed(page, before, 1)
    assert int(slider.input_value()) == at + 1
    page.get_by_role("button", name="ET", exact=True).or_(page.get_by_text("ET", exact=True)).first.click()
    changed(page, before, 1)
    go(page, app, "Cases")
    page.get_by_text("Side by side").click()
    sync_api.expect(page.locator('[data-testid="stImage"] img')).to_have_count(5)
    seen.nothing_wrong()


def place(page: Any) -> str:
    """Where the crosshair stands, as the legend says."""
    return str(page.get_by_text("Crosshair at").last.inner_text()).split("Crosshair at ")[1].rstrip(".")


def test_a_click_on_a_picture_moves_the_crosshair(app: Served, page: Any) -> None:
    seen = watch(page)
    go(page, app, "Cases")
    image = page.locator('[data-testid="stImage"] img').first
    before = picture(page)
    box_of = image.bounding_box()
    image.click(position={"x": 0.27 * box_of["width"], "y": 0.27 * box_of["height"]})
    changed(page, before)
    sliders = {plane: page.get_by_role("slider", name=f"{plane} slice") for plane in ("Axial", "Coronal", "Sagittal")}
    found = {plane: int(slider.input_value()) for plane, slider in sliders.items()}
    # 20 by 24 voxels; left in the picture is right, the high end of the first axis, and top is anterior
    height = 0.27 * box_of["height"] * image.evaluate("i => i.naturalHeight / i.height")
    assert found["Sagittal"] == round(0.73 * 20 - 0.5)
    assert found["Coronal"] == round((1 - height / image.evaluate("i => i.naturalHeight - 18")) * 24 - 0.5)
    before = picture(page, 1)
    sliders["Axial"].press("ArrowLeft")  # the keys go on from where the click led
    changed(page, before, 1)
    assert int(sliders["Axial"].input_value()) == found["Axial"] - 1
    seen.nothing_wrong()


def colours_in(canvas: Any) -> np.ndarray:
    """Pixels of a canvas, `(N, 3)`."""
    with Image.open(io.BytesIO(canvas.screenshot())) as shot:
        return np.asarray(shot.convert("RGB")).reshape(-1, 3).astype(int)


def test_the_interactive_viewer_draws_and_keeps_the_place(app: Served, page: Any) -> None:
    seen = watch(page)
    go(page, app, "Cases")
    start = place(page)
    page.get_by_text("Interactive", exact=True).click()
    viewer = page.locator(".fediod-viewer")
    sync_api.expect(viewer).to_have_attribute("data-drawn", re.compile("0.5$"), timeout=120_000)
    settle(page)
    assert viewer.locator(".place").inner_text() == f"Crosshair at {start}"
    sync_api.expect(viewer.get_by_text(NOT_FOR_CLINICAL_USE)).to_be_visible()
    canvas = viewer.locator("canvas")
    pixels = colours_in(canvas)
    green = (pixels[:, 1] > pixels[:, 0] + 25) & (pixels[:, 1] > pixels[:, 2] + 5)  # the whole tumour's colour
    assert len(np.unique(pixels, axis=0)) > 50 and green.mean() > 0.01
    size = canvas.bounding_box()
    canvas.click(position={"x": 0.12 * size["width"], "y": 0.4 * size["height"]})
    sync_api.expect(viewer.locator(".place")).not_to_have_text(f"Crosshair at {start}")
    moved = viewer.locator(".place").inner_text().removeprefix("Crosshair at ")
    sync_api.expect(page.get_by_text(f"Crosshair at {moved}.")).to_be_visible()  # the page has heard of it
    page.get_by_role("slider", name="Opacity").press("Home")
    sync_api.expect(viewer).to_have_attribute("data-drawn", re.compile(" 0(.0)?$"))
    bare = colours_in(canvas)
    assert ((bare[:, 1] > bare[:, 0] + 25) & (bare[:, 1] > bare[:, 2] + 5)).mean() < 0.001
    settle(page)
    page.get_by_text("Interactive", exact=True).click()
    sync_api.expect(page.locator('[data-testid="stImage"] img')).to_have_count(3)
    assert place(page) == moved
    seen.nothing_wrong()


def test_without_webgl_pictures_are_shown_and_the_reason_is_said(app: Served, page: Any) -> None:
    page.add_init_script(
        "const real = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext ="
        " function (kind, ...rest) { return kind === 'webgl2' ? null : real.call(this, kind, ...rest); }"
    )
    seen = watch(page)
    go(page, app, "Synthetic volumes")
    page.get_by_text("Interactive", exact=True).click()
    sync_api.expect(page.get_by_text("this browser has no WebGL2")).to_be_visible()
    sync_api.expect(page.locator('[data-testid="stImage"] img')).to_have_count(3)
    seen.nothing_wrong()


def test_a_case_is_rated_by_keyboard_and_found_again(app: Served, page: Any) -> None:
    seen = watch(page)
    go(page, app, "Review")
    box(page, "Reviewer code").fill("keyboard")
    box(page, "Reviewer code").press("Enter")
    sync_api.expect(page.get_by_text("0 of 3 cases reviewed")).to_be_visible()
    page.get_by_role("heading", name="Review", exact=True).click()
    settle(page)  # the keys are those of buttons, which come after the line on progress
    for key, region in (("4", "TC"), ("3", "ET"), ("2", "WT")):
        page.keyboard.press(key)
        sync_api.expect(page.get_by_text(f"Keys 1 to 4 rate {region} now.")).to_be_visible()
        settle(page)
    page.keyboard.press("e")
    sync_api.expect(page.get_by_text("1 of 3 cases reviewed")).to_be_visible()
    page.keyboard.press("n")
    settle(page)
    assert "reviewer=keyboard" in page.url
    page.reload()
    sync_api.expect(page.get_by_text("1 of 3 cases reviewed")).to_be_visible()
    (kept,) = ReviewStore(app.reviews).events(reviewer="keyboard")
    assert (kept.case, kept.verdict, kept.ratings) == ("case-c", "minor", {"TC": 3, "WT": 4, "ET": 2})
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Ratings of these cases (CSV)").click()
    rows = list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text(encoding="utf-8"))))
    assert [(row["case"], row["rating_wt"]) for row in rows if row["reviewer"] == "keyboard"] == [("case-c", "4")]
    seen.nothing_wrong()


def test_typing_a_comment_presses_no_button(app: Served, page: Any) -> None:
    page.goto(app.url)
    go(page, app, "Review")
    box(page, "Reviewer code").fill("typist")
    box(page, "Reviewer code").press("Enter")
    box(page, "Comment").fill("")
    box(page, "Comment").press_sequentially("axe men")
    page.get_by_role("heading", name="Review", exact=True).click()
    settle(page)
    assert box(page, "Comment").input_value() == "axe men"
    assert not ReviewStore(app.reviews).events(reviewer="typist")


def test_a_phantom_is_segmented_and_shown(app: Served, page: Any) -> None:
    from fediod_med.data.phantoms import write_cohort

    (case, *_) = write_cohort(app.root / "phantoms", count=1, seed=3, prefix="APP")
    assert case
    seen = watch(page)
    go(page, app, "Segment")
    box(page, "Case folder").fill("demo/phantoms")
    box(page, "Case folder").press("Enter")
    settle(page)
    page.get_by_role("button", name="Check and segment").click()
    sync_api.expect(page.get_by_text("Segmented. It lies in")).to_be_visible(timeout=180_000)
    sync_api.expect(page.locator('[data-testid="stImage"] img')).to_have_count(3)
    assert list(app.work.rglob("*_seg.nii.gz"))
    seen.nothing_wrong()


def test_no_serious_finding_of_accessibility(app: Served, page: Any) -> None:
    page.goto(app.url)
    found = []
    for name in PAGES:
        go(page, app, name)
        if name == "Review":
            box(page, "Reviewer code").fill("axe")
            box(page, "Reviewer code").press("Enter")
            sync_api.expect(page.get_by_text("cases reviewed")).to_be_visible()
            settle(page)
        page.evaluate(AXE.read_text(encoding="utf-8"))
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found += [
            f"{name}: {rule['id']} ({rule['impact']}): {node['html'][:200]}"
            for rule in result["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
    assert not found, "\n".join(found)
