"""Several browsers at once on one queue."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from app_browser import CHROMIUM, RESTED, Served, serve  # type: ignore[import-not-found]

from fediod_med.review.store import ReviewStore

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="browser tests need chromium: apt-get install chromium"),
]


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
