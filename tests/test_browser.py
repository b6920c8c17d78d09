"""The review app in a real browser: Debian's chromium, driven by Playwright, on made-up volumes."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from app_demo import write_app_demo  # type: ignore[import-not-found]

from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.review.settings import review_settings, server_command
from fediod_med.review.store import ReviewStore

pytest.importorskip("streamlit", reason="the review app needs streamlit: pip install 'fediod-med[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="browser tests need chromium: apt-get install chromium"),
]
PAGES = ("Overview", "Synthetic volumes", "Cases", "Review", "Privacy", "Segment")
RESTED = """() => {
    const idle = document.querySelector('[data-testid="stApp"][data-test-script-state="notRunning"]');
    const fading = document.querySelector('[data-stale="true"]')
        || document.getAnimations().some(each => each.playState === "running");
    if (!idle || fading) window.restingSince = null;
    else window.restingSince ??= performance.now();
    return window.restingSince !== null && performance.now() - window.restingSince > 300;
}"""
AXE = Path(__file__).parent / "vendor" / "axe-4.14.1.min.js"
# Streamlit's client looks for its server below the page's own path first when a page is loaded by its address.
PROBES = ("/_stcore/health", "/_stcore/host-config")


@dataclass
class Served:
    """A running app."""

    url: str
    root: Path
    reviews: Path
    work: Path


@dataclass
class Watch:
    """What a page asked for and complained about."""

    requests: list[str]
    problems: list[str]

    def nothing_wrong(self) -> None:
        hosts = {urlsplit(url).hostname for url in self.requests if not url.startswith(("data:", "blob:"))}
        assert hosts <= {"127.0.0.1"}, hosts
        assert not self.problems, self.problems


def serve(folder: Path, cases: tuple[str, ...]) -> Iterator[Served]:
    root = write_app_demo(folder / "demo", cases=cases)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = review_settings([root], reviews=folder / "reviews.sqlite", work=folder / "work")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(server_command(settings, port=port), stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(150):
                try:
                    urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None, (folder / "log").read_text()
                    time.sleep(0.2)
            yield Served(url, root, settings.reviews, settings.work)
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("app"), ("case-a", "case-b", "case-c"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api.expect.set_options(timeout=30_000)  # as for the pages: how fast the app is, benchmarks/app.py measures
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    shown = context.new_page()
    shown.set_default_timeout(30_000)
    yield shown
    context.close()


def watch(page: Any) -> Watch:
    seen = Watch([], [])
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("websocket", lambda socket: seen.requests.append(socket.url))
    page.on("pageerror", lambda error: seen.problems.append(str(error)))

    def said(message: Any) -> None:
        probe = str((message.location or {}).get("url", "")).endswith(PROBES)
        if message.type == "error" and not probe:
            seen.problems.append(f"{message.text} {(message.location or {}).get('url')}")

    page.on("console", said)
    return seen


def go(page: Any, app: Served, name: str) -> None:
    """Open a page by its link, as a reader does."""
    if not page.url.startswith(app.url):
        page.goto(app.url)
    page.get_by_test_id("stTopNavLink").filter(has_text=name).click()
    settle(page)
    sync_api.expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()


def box(page: Any, label: str) -> Any:
    return page.get_by_role("textbox", name=label)


def settle(page: Any) -> None:
    """Wait for the script and for its pictures, which the server forgets once they have been replaced.

    A rerun begins a moment after what asked for it, and fades what it has not drawn yet: the page is at rest once it
    has been idle and whole for a while.
    """
    page.evaluate("window.restingSince = null")
    page.wait_for_function(RESTED)
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def picture(page: Any, number: int = 0) -> str:
    return str(page.locator('[data-testid="stImage"] img').nth(number).get_attribute("src"))


def changed(page: Any, before: str, number: int = 0) -> str:
    image = page.locator('[data-testid="stImage"] img').nth(number)
    sync_api.expect(image).not_to_have_attribute("src", before)
    settle(page)
    return picture(page, number)


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


def test_a_case_is_rated_by_keyboard_and_found_again(app: Served, page: Any) -> None:
    seen = watch(page)
    go(page, app, "Review")
    box(page, "Reviewer code").fill("keyboard")
    box(page, "Reviewer code").press("Enter")
    sync_api.expect(page.get_by_text("0 of 3 cases reviewed")).to_be_visible()
    page.get_by_role("heading", name="Review", exact=True).click()
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


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_browsers_rate_one_queue(tmp_path: Path) -> None:
    """500 ratings by three readers at once: none lost, none doubled."""
    ratings = int(os.environ.get("FEDIOD_BROWSER_RATINGS", "500"))
    readers = ("one", "two", "three")
    cases = tuple(f"case-{number:03d}" for number in range(-(-ratings // len(readers))))
    for app in serve(tmp_path, cases):
        shares = [ratings // len(readers) + (number < ratings % len(readers)) for number in range(len(readers))]
        asyncio.run(_rate_at_once(app, list(zip(readers, shares, strict=True))))
        events = ReviewStore(app.reviews).events(kind="review")
        assert len(events) == ratings
        assert Counter(event.reviewer for event in events) == dict(zip(readers, shares, strict=True))
        assert len({(event.reviewer, event.case) for event in events}) == ratings
        assert ReviewStore(app.reviews).verify().ok


async def _rate_at_once(app: Served, readers: list[tuple[str, int]]) -> None:
    from playwright.async_api import async_playwright, expect

    async def reader(playwright: Any, name: str, count: int) -> None:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        await page.goto(f"{app.url}/rating?reviewer={name}")
        for done in range(count):
            await expect(page.get_by_text(f"{done} of ", exact=False).first).to_be_visible(timeout=60_000)
            await page.wait_for_function(RESTED)
            if done == 0:
                await page.get_by_role("heading", name="Review", exact=True).click()
            await page.keyboard.press("a")
            await expect(page.get_by_text(f"{done + 1} of ", exact=False).first).to_be_visible(timeout=60_000)
        await browser.close()

    async with async_playwright() as playwright:
        await asyncio.gather(*(reader(playwright, name, count) for name, count in readers))
