"""Below the rating page: how the reviewers agree, ratings against Dice, exports and imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from fediod_med.labels import REGIONS
from fediod_med.review.agreement import rating_against_dice, ratings_with_dice
from fediod_med.review.case_folder import CaseFolder
from fediod_med.review.events import Event
from fediod_med.review.exchange import events_csv, export_csv, export_json, import_text
from fediod_med.review.queue import blinded_ratings
from fediod_med.review.rating import agreement_rows, open_comparisons
from fediod_med.review.viewing import case_maps, dice_of
from fediod_med.review.volumes import same_grid
from review_pages import frame

OWN_MODEL = "model"


@st.cache_data(max_entries=8, show_spinner="Comparing the reviewers")
def _agreement_rows(hashes: tuple[str, ...], _reviews: Sequence[Event]) -> list[dict[str, Any]]:
    """Agreement of reviews that their hashes name."""
    return agreement_rows(_reviews)


def agreement(folder: CaseFolder, other: str | None) -> None:
    """Agreement of the reviewers of a folder, and their ratings against Dice where a reference is known."""
    st.subheader("Agreement")
    reviews = frame.journal().current(folder.name)
    if not reviews:
        st.caption("No review yet.")
        return
    if len({event.reviewer for event in reviews}) < 2:
        st.caption("One reviewer so far; agreement needs two.")
    elif st.toggle("Agreement of the reviewers", key="agreement", help="Takes seconds where many cases are rated."):
        rows = _agreement_rows(tuple(event.hash for event in reviews), reviews)
        st.dataframe(rows, hide_index=True, alt="Agreement of the reviewers")
    scored = [case for case in folder.cases.values() if case.reference is not None and case.label_map is not None]
    if not scored:
        st.caption("No case has a reference, so ratings cannot be set against Dice.")
        return
    region = st.segmented_control("Region", REGIONS, default="WT", key="agreement-region", required=True) or "WT"
    if not st.toggle("Ratings against Dice", key="against-dice"):
        return
    dice: dict[tuple[str, str], float] = {}
    for case in scored:
        maps = case_maps(case, frame.cache())
        for name in (OWN_MODEL, *([] if other is None else [other])):
            if name in maps and same_grid(maps[name], maps["reference"]):
                dice[case.case_id, name] = dice_of(maps[name], maps["reference"])[region]
    shown = list(reviews)
    if other is not None:
        finished = open_comparisons(frame.journal().events(folder.name))
        shown = [
            replace(event, arm=model)
            for model, event in blinded_ratings(frame.journal().events(folder.name), (OWN_MODEL, other))
            if (event.reviewer, event.run, event.case) not in finished
        ]
    points = ratings_with_dice(shown, dice, region)
    if not points:
        st.caption("No rated segmentation has a known Dice yet.")
        return
    found = pd.DataFrame(points, columns=["case", "model", "rating", "Dice"])
    tau = rating_against_dice(found["rating"].tolist(), found["Dice"].tolist())
    st.altair_chart(
        alt.Chart(found)
        .mark_circle(size=90, color="#0072B2")
        .encode(
            x=alt.X("Dice:Q", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("rating:Q", scale=alt.Scale(domain=[1, 4])),
            tooltip=list(found.columns),
        )
        .properties(height=240),
        alt=f"Mean rating of {region} against its Dice, one point per segmentation",
    )
    st.caption(f"Kendall's tau {tau.value:.2f} ({tau.low:.2f} to {tau.high:.2f}), {tau.cases} segmentations.")


def exchange(folder: CaseFolder) -> None:
    """Exports, the store's witness, and the import of another store's export."""
    st.subheader("Export")
    store = frame.store()
    columns = st.columns(3)
    columns[0].download_button(
        "Ratings of these cases (CSV)",
        lambda: events_csv(store.current(run=folder.name)),
        "ratings.csv",
        "text/csv",
        key="export-current",
    )
    blinded = open_comparisons(frame.journal().events())
    for column, label, make, name, mime in (
        (columns[1], "Whole store (CSV)", export_csv, "reviews.csv", "text/csv"),
        (columns[2], "Whole store (JSON)", export_json, "reviews.json", "application/json"),
    ):
        column.download_button(
            label, lambda make=make: make(store), name, mime, key=f"export-{name}", disabled=bool(blinded)
        )
    if blinded:
        st.caption(f"The whole store tells which model was A: {len(blinded)} blinded comparisons are not revealed yet.")
    number, digest = store.head
    st.caption(f"Witness of the store: event {number}, {digest[:16]}.")
    with st.expander("Import an export of another store"):
        file = st.file_uploader("CSV or JSON", type=["csv", "json"], key="import")
        if file is not None and st.button("Import", key="import-go"):
            try:
                added = import_text(store, file.getvalue().decode("utf-8"))
            except UnicodeDecodeError:
                st.error("Expected text in UTF-8, found something else.")
            else:
                st.success(f"{added} new events.")
