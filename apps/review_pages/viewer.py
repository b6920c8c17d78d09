"""Three linked slices with overlays; only this part is drawn again when a slice is turned.

Pictures are drawn on the server, and turned by sliders, arrow keys or a click on one of them. On request the browser
draws the three planes itself, at the same place and with the same overlay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from fediod_med.review.interactive import cut_of, message
from fediod_med.review.overlays import DIFFERENCE_PALETTE, REGION_PALETTE, Overlay
from fediod_med.review.slices import AXIS, PLANES, Picture, Plane, View, place, slice_picture, tri_planar
from fediod_med.review.viewing import fitting, overlay_of, point_of, slices_at, start_point
from fediod_med.review.volumes import LoadedVolume, Point, focus_mm
from review_pages import browser_parts, frame

NONE = "none"
BESIDE = 4
"""Pictures in a row, side by side."""


def show(
    key: str,
    sequences: Sequence[str],
    load: Callable[[str], LoadedVolume],
    maps: Mapping[str, LoadedVolume],
    *,
    companions: Mapping[str, Callable[[str], LoadedVolume]] | None = None,
    synthetic: bool = False,
    pixels: int = 440,
) -> None:
    """Draw the viewer.

    Args:
        key: of what is shown; the same key keeps its place and settings.
        sequences: names offered.
        load: gives the image of a name.
        maps: label maps by name; the first is drawn at first.
        companions: further images by name, drawn side by side with the label maps; each is given the sequence's name.
        synthetic: marks the pixels as synthetic.
        pixels: longest side of a slice.
    """
    with frame.refusing():
        _viewer(key, sequences, load, maps, companions or {}, synthetic, pixels)


@st.fragment
def _viewer(
    key: str,
    sequences: Sequence[str],
    load: Callable[[str], LoadedVolume],
    maps: Mapping[str, LoadedVolume],
    companions: Mapping[str, Callable[[str], LoadedVolume]],
    synthetic: bool,
    pixels: int,
) -> None:
    with frame.refusing():
        first = st.container(horizontal=True, vertical_alignment="bottom")
        sequence = first.segmented_control(
            "Sequence", list(sequences), default=sequences[0], key=f"{key}-sequence", required=True
        )
        image = load(sequence or sequences[0])
        fit, elsewhere = fitting(image, maps)
        if elsewhere:
            st.caption(f"On another grid, so not drawn: {frame.plain(', '.join(elsewhere))}.")
        names = list(fit)
        shown = first.pills(
            "Regions", list(REGION_PALETTE), default=list(REGION_PALETTE), selection_mode="multi", key=f"{key}-shown"
        )
        opacity = first.slider("Opacity", 0.0, 1.0, 0.5, 0.05, key=f"{key}-opacity", width=160)
        tools = st.container(horizontal=True, vertical_alignment="bottom")
        drawn = tools.selectbox("Overlay", [*names, NONE], key=f"{key}-map") if names else NONE
        rest = [name for name in names if name != drawn]
        against = tools.selectbox("Difference to", [NONE, *rest], key=f"{key}-against") if rest else NONE
        in_browser = _offer(key, tools)
        planes = st.container(key=f"planes-{_slug(key)}")
        state = _states(key, image, fit)
        place_of = point_of(image, {plane: st.session_state[name] for plane, name in state.items()})
        view = _view(key, image, float(opacity), synthetic, pixels)
        overlay = overlay_of(
            fit,
            None if drawn == NONE else drawn,
            against=None if against == NONE else against,
            shown=shown,
        )
        if in_browser:
            with planes:
                _interactive(key, image, overlay, view, place_of, state)
        _slices(key, planes, image, overlay, view, place_of, state, drawn=not in_browser)
        if fit:
            first_map = next(iter(fit))
            st.button(
                f"Go to the largest tumour area ({first_map})",
                on_click=_go_to,
                args=(state, image, fit[first_map]),
                key=f"{key}-largest",
            )
        _legend(against != NONE, synthetic, view, place_of)
        if len(names) > 1 or companions:
            beside = {name: give(sequence or sequences[0]) for name, give in companions.items()}
            _side_by_side(key, image, fit, beside, place_of, view, shown)


def _slices(
    key: str,
    planes: DeltaGenerator,
    image: LoadedVolume,
    overlay: Overlay | None,
    view: View,
    mm: Point,
    state: Mapping[Plane, str],
    *,
    drawn: bool,
) -> None:
    """Pictures of the three planes, unless the browser draws them, and a slider below each."""
    pictures = tri_planar(image, mm, overlay=overlay, view=view) if drawn else {}
    for column, plane in zip(planes.columns(3), PLANES, strict=True):
        if plane in pictures:
            column.image(pictures[plane].png, alt=pictures[plane].alt, width="content", output_format="PNG")
        last = max(image.shape[AXIS[plane]] - 1, 1)
        column.slider(f"{plane.capitalize()} slice", 0, last, key=state[plane])
    if drawn:
        with planes:
            browser_parts.listen(
                f"{key}-clicks", f"planes-{_slug(key)}", lambda number, x, y: _clicked(pictures, state, number, x, y)
            )


def _clicked(pictures: Mapping[Plane, Picture], state: Mapping[Plane, str], number: int, x: float, y: float) -> None:
    """Move the crosshair to the pixel of a picture; the strip with the notice below a slice is not part of it."""
    picture = pictures[PLANES[number]]
    if 0 <= x <= picture.size[0] and 0 <= y <= picture.size[1]:
        for plane, slice_number in slices_at(picture.volume, picture.mm_at(x, y)).items():
            st.session_state[state[plane]] = slice_number


def _interactive(
    key: str, image: LoadedVolume, overlay: Overlay | None, view: View, mm: Point, state: Mapping[Plane, str]
) -> None:
    cut = cut_of(image)
    content = message(image, cut, image.voxel_of(mm), overlay=overlay, view=view, cache=frame.parts())

    def moved(voxel: Sequence[int]) -> None:
        whole = cut.whole(voxel)
        for plane, name in state.items():
            st.session_state[name] = whole[AXIS[plane]]

    browser_parts.interactive(f"{key}-interactive", content, moved, _unable)


def _unable(reason: str) -> None:
    st.session_state["viewer-unable"] = reason


def _offer(key: str, place: DeltaGenerator) -> bool:
    """Whether the reader wants the interactive viewer, and the browser has not said that it cannot draw it."""
    unable = st.session_state.get("viewer-unable")
    chosen = place.toggle(
        "Interactive",
        key=f"{key}-in-browser",
        disabled=unable is not None,
        width="content",
        help="Drawn by the browser (WebGL2): drag the crosshair, wheel for slices, right button to pan.",
    )
    if unable is not None:
        st.info(f"Pictures are shown; the interactive viewer is not available here: {frame.plain(unable)}.")
    return bool(chosen) and unable is None


def _slug(key: str) -> str:
    """The key as Streamlit writes it into a class, which keeps letters, digits, `-` and `_` only."""
    return re.sub(r"[^a-zA-Z0-9_-]", "-", key.strip())


def _view(key: str, image: LoadedVolume, opacity: float, synthetic: bool, pixels: int) -> View:
    with st.expander("Window, outline, convention"):
        left, right = st.columns([2, 1])
        low, high = float(image.array.min()), float(image.array.max())
        window = None
        if high > low:
            start = max(low, image.window[0]), min(high, image.window[1])
            window = left.slider("Window (grey values)", low, high, start, key=f"{key}-window-{image.name}")
        outline = right.toggle("Outline instead of filled", key=f"{key}-outline")
        crosshair = right.toggle("Crosshair", value=True, key=f"{key}-crosshair")
        neurological = right.toggle("Neurological convention", key=f"{key}-neurological", disabled=synthetic)
    return View(
        radiological=not neurological,
        window=window if window and window[0] < window[1] else None,
        style="outline" if outline else "fill",
        opacity=opacity,
        crosshair=crosshair,
        synthetic=synthetic,
        pixels=pixels,
    )


def _states(key: str, image: LoadedVolume, maps: Mapping[str, LoadedVolume]) -> dict[Plane, str]:
    """Keys of the three sliders, set to where the tumour is largest at first.

    Pictures stand above their sliders, and take the sliders' values from the session, which has them before the
    sliders are drawn. The keys of arrows move the slider that has the focus.
    """
    state = {plane: f"{key}-{plane}-{image.shape}" for plane in PLANES}
    if any(name not in st.session_state for name in state.values()):
        for plane, number in slices_at(image, start_point(image, maps)).items():
            st.session_state[state[plane]] = number
    return state


def _go_to(state: Mapping[Plane, str], image: LoadedVolume, labels: LoadedVolume) -> None:
    target = focus_mm(labels)
    if target is not None:
        for plane, number in slices_at(image, target).items():
            st.session_state[state[plane]] = number


def _legend(difference: bool, synthetic: bool, view: View, mm: tuple[float, float, float]) -> None:
    palette = DIFFERENCE_PALETTE if difference else REGION_PALETTE
    boxes = " ".join(
        f'<span style="display:inline-block;width:.9em;height:.9em;background:{colour};border:1px solid #333;'
        f'vertical-align:-.1em"></span> {name}&nbsp;&nbsp;'
        for name, colour in palette.items()
    )
    side = "nose left in sagittal slices"
    if synthetic:
        words = "synthetic, no patient; sides have no names"
    elif view.radiological:
        words = f"radiological: patient's right on the left; {side}"
    else:
        words = f"neurological: patient's right on the right; {side}"
    st.html(f"<div>{boxes} {words}. Crosshair at {place(mm)}.</div>")


def _side_by_side(
    key: str,
    image: LoadedVolume,
    maps: Mapping[str, LoadedVolume],
    companions: Mapping[str, LoadedVolume],
    mm: Point,
    view: View,
    shown: Sequence[str],
) -> None:
    if not st.toggle("Side by side", key=f"{key}-beside"):
        return
    plane = st.segmented_control("Plane", PLANES, default="axial", key=f"{key}-plane", required=True) or "axial"
    pictures = {
        name: slice_picture(image, plane, mm, overlay=overlay_of({name: labels}, name, shown=shown), view=view)
        for name, labels in maps.items()
    }
    for name, other in companions.items():
        own = replace(view, window=None, synthetic=view.synthetic and not name.startswith("public"))
        pictures[name] = slice_picture(other, plane, mm, view=own)
    told = list(pictures.items())
    for start in range(0, len(told), BESIDE):
        for column, (name, picture) in zip(st.columns(BESIDE), told[start : start + BESIDE], strict=False):
            column.markdown(f"**{frame.plain(name)}**")
            column.image(picture.png, alt=f"{name}: {picture.alt}", width="content", output_format="PNG")
