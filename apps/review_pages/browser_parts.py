"""The two parts that run in the browser: clicks on pictures, and the interactive viewer. Both are optional extras."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import streamlit as st

_VIEWER = """<div class="fediod-viewer">
<div class="canvas"><canvas role="img" tabindex="0"></canvas><span class="synthetic" hidden>SYNTHETIC</span></div>
<div class="below"><span class="place"></span><span class="notice"></span></div>
<div role="status"></div>
</div>"""


@st.cache_resource(show_spinner=False)
def _parts() -> tuple[Any, Any]:
    """The mounting commands, declared once: their files lie in the package, see `fediod_med/pyproject.toml`."""
    declare = st.components.v2.component
    clicks = declare("fediod-med.clicks", js="clicks.js", isolate_styles=False)
    viewer = declare("fediod-med.viewer", html=_VIEWER, css="viewer.css", js="viewer.js")
    return clicks, viewer


def listen(key: str, around: str, on_click: Callable[[int, float, float], None]) -> None:
    """Call `on_click` with a picture's number and the pixel (x, y, from the top left corner) where it was clicked.

    Args:
        key: of this part.
        around: key of the container that holds the pictures, and this part.
        on_click: runs before the page is drawn again.
    """

    def clicked() -> None:
        found = _told(key, "at")
        if isinstance(found, Mapping) and {"picture", "x", "y"} <= found.keys():
            on_click(int(found["picture"]), float(found["x"]), float(found["y"]))

    _parts()[0](key=key, data={"around": around}, height="content", on_at_change=clicked)


def interactive(
    key: str, message: bytes, on_voxel: Callable[[Sequence[int]], None], on_unable: Callable[[str], None]
) -> None:
    """Draw the interactive viewer.

    Args:
        key: of this part.
        message: see `review.interactive.message`.
        on_voxel: called with the voxel of the part that was sent, when the reader moved the crosshair.
        on_unable: called with a reason when the browser cannot draw it.
    """

    def moved() -> None:
        found = _told(key, "voxel")
        if isinstance(found, list) and len(found) == 3:
            on_voxel([int(value) for value in found])

    def failed() -> None:
        found = _told(key, "unable")
        if found:
            on_unable(str(found))

    _parts()[1](key=key, data=message, on_voxel_change=moved, on_unable_change=failed)


def _told(key: str, name: str) -> Any:
    return st.session_state[key].get(name)
