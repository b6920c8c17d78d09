"""Entry of the review app: `streamlit run apps/review.py -- --root runs`, or `fediod review`."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from review_pages import frame

st.set_page_config(page_title="fediod-med review", layout="wide", initial_sidebar_state="expanded")
PAGES = Path(__file__).parent / "review_pages"
page = st.navigation(
    [
        st.Page(PAGES / "overview.py", title="Overview", default=True),
        st.Page(PAGES / "synthetic.py", title="Synthetic volumes"),
        st.Page(PAGES / "cases.py", title="Cases"),
        st.Page(PAGES / "rating.py", title="Review"),
        st.Page(PAGES / "promises.py", title="Privacy"),
        st.Page(PAGES / "segmenting.py", title="Segment"),
    ],
    position="top",
)
frame.draw(page.title)
page.run()
