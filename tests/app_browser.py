"""Serves the review app on made-up volumes and drives it in Debian's chromium; shared by the browser tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from app_demo import write_app_demo  # type: ignore[import-not-found]

from fediod_med.review.settings import review_settings, server_command

pytest.importorskip("streamlit", reason="the review app needs streamlit: pip install 'fediod-med[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# WebGL by software: since version 144 chromium has no such fallback unless it is asked for.
FLAGS = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
RESTED = """() => {
    const idle = document.querySelector('[data-testid="stApp"][data-test-script-state="notRunning"]');
    const fading = document.querySelector('[data-stale="true"]')
        || document.getAnimations().some(each => each.playState === "running");
    if (!idle || fading) window.restingSince = null;
    else window.restingSince ??= performance.now();
    return window.restingSince !== null && performance.now() - window.restingSince > 300;
}"""
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
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


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
