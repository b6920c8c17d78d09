"""What every page has: settings, caches, the choice of run and cases at the side, and the banner that never leaves."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import streamlit as st

from fediod_med.errors import FediodError
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.review.case_cache import CaseFolders
from fediod_med.review.case_folder import Case, CaseFolder
from fediod_med.review.interactive import PartCache
from fediod_med.review.journal import Journal
from fediod_med.review.roots import Found, Roots
from fediod_med.review.run_folder import RunFolder, read_run
from fediod_med.review.settings import ReviewSettings, parse_arguments
from fediod_med.review.store import ReviewStore
from fediod_med.review.tables import privacy_words
from fediod_med.review.volumes import VolumeCache

RUN_PAGES = ("Overview", "Synthetic volumes", "Privacy")
CASE_PAGES = ("Cases", "Review")
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
"""Of hospitals in charts: Okabe and Ito's, which colour-blind readers tell apart."""
_STYLE = """<style>
[data-testid="stMainBlockContainer"] {padding: 3.8rem 2rem 1rem 2rem;}
[data-testid="stMainBlockContainer"] h1 {font-size: 1.5rem; padding: .1rem 0 .5rem 0;}
[data-testid="stMainBlockContainer"] h3 {font-size: 1.2rem;}
[data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] * {color: #454B55 !important; opacity: 1;}
[data-testid="stVerticalBlock"] {gap: .6rem;}
[class*="st-key-planes-"] [data-testid="stImage"] img {cursor: crosshair;}
.banner {border-left: .5rem solid; padding: .15rem .8rem; margin: 0; font-weight: 600; border-radius: .2rem;}
.bare {background: #FDECEA; border-color: #B3261E; color: #7A1A14;}
.private {background: #E8F1FB; border-color: #0B5CAD; color: #083F78;}
.detail {font-weight: 400; font-size: .9rem;}
.notice {background: #FFF6DB; border-color: #8A6100; color: #4F3800;}
</style>"""


@st.cache_resource(show_spinner=False)
def _opened(arguments: tuple[str, ...]) -> tuple[ReviewSettings, Roots, ReviewStore, VolumeCache]:
    settings = parse_arguments(arguments)
    return settings, settings.open_roots(), ReviewStore(settings.reviews), VolumeCache()


def settings() -> ReviewSettings:
    """What the app was started with."""
    return _opened(tuple(sys.argv[1:]))[0]


def roots() -> Roots:
    """The folders that may be looked into."""
    return _opened(tuple(sys.argv[1:]))[1]


def store() -> ReviewStore:
    """The reviews."""
    return _opened(tuple(sys.argv[1:]))[2]


def cache() -> VolumeCache:
    """Volumes in use, shared by all pages and browsers."""
    return _opened(tuple(sys.argv[1:]))[3]


@st.cache_resource(show_spinner=False)
def _read(arguments: tuple[str, ...]) -> tuple[Journal, CaseFolders]:
    return Journal(_opened(arguments)[2]), CaseFolders()


def journal() -> Journal:
    """The reviews, held in memory."""
    return _read(tuple(sys.argv[1:]))[0]


@st.cache_resource(show_spinner=False)
def parts() -> PartCache:
    """What the interactive viewer was sent, shared likewise."""
    return PartCache()


@st.cache_data(ttl=60, show_spinner=False)
def _found(arguments: tuple[str, ...]) -> tuple[Found, ...]:
    return _opened(arguments)[1].find()


def look_again() -> None:
    """Forget what lay in the roots, after something was written there."""
    _found.clear()


def draw(title: str) -> None:
    """Notice and choices at the side; the page draws its own privacy banner, which needs its run or cases."""
    st.html(_STYLE)
    st.html(f'<div class="banner notice" role="note">{html.escape(NOT_FOR_CLINICAL_USE)}</div>')
    with refusing():
        found = _found(tuple(sys.argv[1:]))
        runs = [entry.name for entry in found if entry.kind == "run"]
        folders = [entry.name for entry in found if entry.kind == "cases"]
        with st.sidebar:
            st.header("fediod-med review")
            st.caption("Folders are read, never written. Nothing leaves this machine.")
            if runs and title in RUN_PAGES:
                st.selectbox("Run", runs, key="run", persist_state="session")
            if folders and title in CASE_PAGES:
                st.selectbox("Segmented cases", folders, key="cases", persist_state="session")


def banner(words: str, detail: str = "") -> None:
    """The privacy banner: what the model's or run's promise is worth, and in smaller letters each hospital's."""
    look = "bare" if words.startswith("NOT PRIVATE") else "private"
    below = f'<div class="detail">{html.escape(detail)}</div>' if detail else ""
    st.html(f'<div class="banner {look}" role="note">{html.escape(words)}{below}</div>')


@contextmanager
def refusing() -> Iterator[None]:
    """Show an error of this package as one line, without a trace and without paths outside the roots."""
    try:
        yield
    except FediodError as error:
        words = str(error)
        for path in (*roots().folders, Path.home()):
            words = words.replace(f"{path}/", "").replace(str(path), path.name)
        st.error(plain(words))


def plain(text: str) -> str:
    """Text with the marks of Markdown made harmless."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|~$:" else c for c in text)


def _entry(kind: str, name: str) -> Found | None:
    return next((entry for entry in _found(tuple(sys.argv[1:])) if entry.kind == kind and entry.name == name), None)


def chosen_run() -> RunFolder | None:
    """The run chosen at the side, with its banner drawn; none, with a word about why, where there is no run."""
    entry = _entry("run", st.session_state.get("run", ""))
    if entry is None:
        st.info("No run folder lies below the chosen folders. `fediod demo` makes one of phantoms.")
        return None
    run = read_run(entry.path)
    banner(run.banner, privacy_words(run))
    return run


def runs() -> tuple[Found, ...]:
    """All run folders."""
    return tuple(entry for entry in _found(tuple(sys.argv[1:])) if entry.kind == "run")


def folder_names() -> tuple[str, ...]:
    """Names of all folders of segmented cases."""
    return tuple(entry.name for entry in _found(tuple(sys.argv[1:])) if entry.kind == "cases")


def chosen_cases(*, banner_too: bool = True) -> CaseFolder | None:
    """The folder of cases chosen at the side, with other models' answers and references, and its banner drawn."""
    name = st.session_state.get("cases", "")
    entry = _entry("cases", name)
    if entry is None:
        st.info("No segmented case lies below the chosen folders. The page Segment makes some, or `fediod segment`.")
        return None
    with st.sidebar:
        others = [other for other in folder_names() if other != name]
        beside = st.multiselect("Compare with", others, key=f"beside-{name}") if others else []
        scans = st.text_input(
            "Folder of scans and references",
            key=f"scans-{name}",
            help="Inside the chosen folders, for example demo/unseen. Needed only where no record names them.",
        )
    known = {other: _entry("cases", other) for other in beside}
    folder = _read(tuple(sys.argv[1:]))[1].read(
        entry.path,
        roots(),
        images=roots().folder(below_root(scans)) if scans else None,
        models={other: found.path for other, found in known.items() if found is not None},
    )
    if banner_too:
        banner(folder.banner)
    return folder


def pick_case(folder: CaseFolder) -> Case | None:
    """A case of the folder, chosen by the reader."""
    if not folder.cases:
        st.info("This folder holds no case.")
        return None
    case_id = st.selectbox("Case", list(folder.cases), key=f"case-{folder.name}")
    return folder.cases.get(case_id)


def below_root(text: str) -> str:
    """A path as `Roots.name_of` shows it, without the root's own name, where that leads somewhere."""
    first, _, rest = text.strip().partition("/")
    with_root = [root for root in roots().folders if root.name == first]
    return str(with_root[0] / rest) if with_root and not Path(text).is_absolute() and ".." not in text else text.strip()
