"""Overview: what a run is, what each hospital's promise is worth, and how well each model does."""

from __future__ import annotations

import altair as alt
import pandas as pd
import streamlit as st

from fediod_med.labels import REGIONS
from fediod_med.review.run_folder import RunFolder, differences_by_case
from fediod_med.review.tables import dice_rows, model_name, privacy_rows, score_rows, site_rows
from review_pages import frame
from review_pages.frame import COLOURS


def page() -> None:
    """Draw the page."""
    run = frame.chosen_run()
    if run is None:
        return
    st.title("Overview")
    left, right = st.columns([1, 1])
    with left:
        _about(run)
    with right:
        st.subheader("Privacy per hospital")
        if run.privacy is None:
            st.warning(frame.plain(run.why("privacy")))
        else:
            st.dataframe(privacy_rows(run), hide_index=True, alt="Privacy promise of each hospital")
    _dice(run)
    _per_site(run)
    _per_case(run)
    for name, path in (run.figures or {}).items():
        with st.expander(f"Figure: {name}"):
            st.image(path.read_bytes(), alt=f"Figure {name} of the run, as in its report", output_format="PNG")


def _about(run: RunFolder) -> None:
    st.subheader("Run")
    summary = run.summary or {}
    facts = {
        "run": run.run_id,
        "data": summary.get("data"),
        "hospitals": ", ".join(run.sites),
        "mode": summary.get("mode"),
        "rounds": summary.get("rounds"),
        "student / ensemble (Dice)": (summary.get("ratios") or {}).get("student_to_ensemble"),
        "student / best hospital": (summary.get("ratios") or {}).get("student_to_best_site"),
    }
    rows = [
        {"": name, "value": f"{value:.3f}" if isinstance(value, float) else str(value)}
        for name, value in facts.items()
        if value is not None
    ]
    st.table(rows, hide_index=True, hide_header=True, border="horizontal")


def _whom(run: RunFolder) -> str:
    """Whose scores these are: phantoms must not be taken for patients."""
    return "phantoms (no patient)" if "phantom" in str((run.summary or {}).get("data", "")) else "patients"


def _dice(run: RunFolder) -> None:
    st.subheader(f"Dice on held-out {_whom(run)} of all hospitals")
    rows = dice_rows(run)
    if not rows:
        st.warning(frame.plain(run.why("rows")))
        return
    numbers = {name: st.column_config.NumberColumn(format="%.3f") for name in rows[0] if "Dice" in name or "%" in name}
    numbers["HD95 mm"] = st.column_config.NumberColumn(format="%.1f")
    st.dataframe(rows, hide_index=True, column_config=numbers, alt="Dice and HD95 of each model by region")


def _per_site(run: RunFolder) -> None:
    rows = pd.DataFrame(site_rows(run))
    if rows.empty:
        return
    st.subheader(f"Mean Dice per hospital, held-out {_whom(run)}")
    st.altair_chart(
        alt.Chart(rows)
        .mark_point(filled=True, size=90)
        .encode(
            x=alt.X("mean Dice:Q", scale=alt.Scale(zero=False)),
            y=alt.Y("model:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color("hospital:N", scale=alt.Scale(range=COLOURS)),
            shape="hospital:N",
            tooltip=list(rows.columns),
        )
        .properties(height=240),
        alt="Mean Dice of each model on the held-out patients of each hospital",
    )


def _per_case(run: RunFolder) -> None:
    st.subheader(f"Every case of the held-out {_whom(run)}")
    if run.scores is None:
        st.info(frame.plain(run.why("scores")))
        return
    region = st.segmented_control("Region", REGIONS, default="WT", key="overview-region", required=True) or "WT"
    rows = pd.DataFrame(score_rows(run.scores, region))
    left, right = st.columns(2)
    left.altair_chart(
        alt.Chart(rows)
        .mark_point(opacity=0.7)
        .encode(
            x="Dice:Q",
            y=alt.Y("model:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color("hospital:N", scale=alt.Scale(range=COLOURS)),
            shape="reference:N",
            tooltip=list(rows.columns),
        )
        .properties(height=320),
        alt=f"Dice of every held-out case in {region}, by model",
    )
    models = [model for model in dict.fromkeys(score.model for score in run.scores) if model != "student"]
    with right:
        other = st.selectbox("Student minus", models, format_func=model_name, key="overview-other")
        pairs = differences_by_case(run.scores, "student", other, region)
        paired = pd.DataFrame(pairs, columns=["case", "hospital", "difference"]).sort_values("difference")
        st.altair_chart(
            alt.Chart(paired)
            .mark_bar()
            .encode(
                x=alt.X("case:N", sort=None, axis=None),
                y="difference:Q",
                color=alt.Color("hospital:N", scale=alt.Scale(range=COLOURS)),
                tooltip=["case", "hospital", "difference"],
            )
            .properties(height=240),
            alt=f"Student's Dice minus that of {other} for every case in {region}",
        )


with frame.refusing():
    page()
