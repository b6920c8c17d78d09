"""How fast the review app answers in a real browser: a cold page, and turning a slice, on one segmented case.

    python benchmarks/app.py --root FOLDER [--repeats 15]

FOLDER holds a folder of segmented cases with their scans inside the roots (name the scans' folder as a second --root).
Prints medians in milliseconds; needs chromium and the extra `app`.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from fediod_med.review.settings import review_settings, server_command

IDLE = '[data-testid="stApp"][data-test-script-state="notRunning"]'
IMAGES = '[data-testid="stImage"] img'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, action="append", required=True)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    cold: list[float] = []
    turned: list[float] = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for attempt in range(5):
            process, url = _serve(options.root, Path(folder))
            try:
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                began = time.perf_counter()
                page.goto(f"{url}/cases")
                _drawn(page)
                cold.append(time.perf_counter() - began)
                if attempt == 4:
                    turned = _turn(page, options.repeats)
                    size = page.get_by_role("slider", name="Axial slice").get_attribute("max")
                    print(f"slices along the axial axis: {int(size or 0) + 1}")
                page.close()
            finally:
                process.terminate()
                process.wait(20)
        browser.close()
    for name, values in (("cold page, new server, nothing cached", cold), ("slice turned, three planes", turned)):
        middle, most = statistics.median(values), max(values)
        print(f"{name}: median {1000 * middle:.0f} ms, slowest {1000 * most:.0f} ms, n {len(values)}")


def _drawn(page: Page) -> None:
    expect(page.locator(IMAGES)).to_have_count(3, timeout=180_000)
    page.wait_for_function(
        f"[...document.querySelectorAll('{IMAGES}')].every(i => i.complete && i.naturalWidth > 0)", timeout=180_000
    )


def _turn(page: Page, repeats: int) -> list[float]:
    """From the key's press until the picture of the next slice has been decoded."""
    page.wait_for_selector(IDLE)
    slider, image = page.get_by_role("slider", name="Axial slice"), page.locator(IMAGES).first
    found = []
    for number in range(repeats):
        before = image.get_attribute("src")
        slider.focus()
        began = time.perf_counter()
        page.keyboard.press("ArrowRight" if number % 2 else "ArrowLeft")
        page.wait_for_function(
            f"b => {{const i = document.querySelector('{IMAGES}');"
            "return i.getAttribute('src') !== b && i.complete && i.naturalWidth > 0}",
            arg=before,
        )
        found.append(time.perf_counter() - began)
        page.wait_for_selector(IDLE)
    return found


def _serve(roots: list[Path], folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = review_settings(roots, reviews=folder / "reviews.sqlite", work=folder / "work")
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(server_command(settings, port=port), stdout=quiet, stderr=quiet)
    url = f"http://127.0.0.1:{port}"
    for _ in range(150):
        try:
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).close()
            return process, url
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the app did not start")


if __name__ == "__main__":
    main()
