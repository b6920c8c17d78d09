"""Pictures of every page of the review app: `python apps/screenshots.py --run RUN --out docs/images`.

Only for runs on phantoms: the pictures are published. Needs chromium, and the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from fediod_med.review.settings import review_settings, server_command

PAGES = {
    "overview": "Overview",
    "synthetic": "Synthetic volumes",
    "cases": "Cases",
    "review": "Review",
    "privacy": "Privacy",
    "segment": "Segment",
}
# At rest: the script has ended, nothing fades, and every picture is there, all for a second.
RESTED = """() => {
    const idle = document.querySelector('[data-testid="stApp"][data-test-script-state="notRunning"]');
    const fading = document.querySelector('[data-stale="true"]')
        || document.getAnimations().some(each => each.playState === "running");
    const drawn = [...document.images].every(image => image.complete && image.naturalWidth > 0);
    if (!idle || fading || !drawn) window.restingSince = null;
    else window.restingSince ??= performance.now();
    return window.restingSince !== null && performance.now() - window.restingSince > 1000;
}"""
SIZES = ((1280, 800), (1920, 1080))


def main() -> None:
    """Start the app on the run, and write `app_<page>_<width>.png`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True, help="run folder, of phantoms only")
    parser.add_argument("--root", type=Path, action="append", default=[], help="further folders, of phantoms only")
    parser.add_argument("--large", action="store_true", help="also at 1920x1080")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = json.loads((options.run / "summary.json").read_text(encoding="utf-8")).get("data")
    if "phantom" not in str(data):
        parser.error(f"expected a run on phantoms, found data {data!r}: these pictures are published")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = review_settings(
            [options.run, *options.root], reviews=Path(folder) / "reviews.sqlite", work=Path(folder) / "work"
        )
        server = subprocess.Popen(server_command(settings, port=port), stdout=subprocess.DEVNULL)
        try:
            _wait(f"http://127.0.0.1:{port}")
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for width, height in SIZES if options.large else SIZES[:1]:
                page = browser.new_page(viewport={"width": width, "height": height})
                page.set_default_timeout(120_000)
                page.goto(f"http://127.0.0.1:{port}/?reviewer=reader-1")
                for name, title in PAGES.items():
                    _shoot(page, title, options.out / f"app_{name}_{width}.png")
                page.close()
            browser.close()
        finally:
            server.terminate()
            server.wait(20)


def _shoot(page: Page, title: str, path: Path) -> None:
    page.get_by_test_id("stTopNavLink").filter(has_text=title).click()
    page.get_by_role("heading", name=title, exact=True).wait_for()
    if title == "Review":
        page.get_by_role("textbox", name="Reviewer code").fill("reader-1")
        page.get_by_role("textbox", name="Reviewer code").press("Enter")
        page.get_by_text("cases reviewed").wait_for()
    page.evaluate("window.restingSince = null")
    page.wait_for_function(RESTED)
    page.mouse.move(0, 0)
    page.screenshot(path=path, animations="disabled")
    with Image.open(path) as picture:
        # covers small patches too: a legend must keep its colours
        small = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    small.save(path, optimize=True)
    print(path)


def _wait(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the app did not start")


if __name__ == "__main__":
    main()
