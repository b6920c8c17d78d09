"""Privacy: each hospital's ledger over time, its claim checked, and what attacks found."""

from __future__ import annotations

from dataclasses import asdict

import altair as alt
import pandas as pd
import streamlit as st

from fediod_med.review.audit_table import audit_rows, audit_words
from fediod_med.review.ledger_timeline import ledger_timeline, verified
from fediod_med.review.run_folder import RunFolder
from fediod_med.review.tables import privacy_rows
from review_pages import frame


def page() -> None:
    """Draw the page."""
    run = frame.chosen_run()
    if run is None:
        return
    st.title("Privacy")
    if run.privacy is None:
        st.warning(frame.plain(run.why("privacy")))
    else:
        st.dataframe(privacy_rows(run), hide_index=True, alt="Privacy promise of each hospital")
        for terms in run.privacy:
            with st.expander(f"Statement of {frame.plain(terms.site)}: {frame.plain(terms.words)}"):
                st.text(terms.statement or "none")
    _check(run)
    if run.sites:
        _ledger(run)
    _audit(run)


def _check(run: RunFolder) -> None:
    st.subheader("Check the claims")
    if st.button("Verify every ledger and claim", key="verify", type="primary"):
        with st.spinner("Recomputing every epsilon from the ledgers"):
            st.session_state[f"verified-{run.run_id}"] = verified(run.path)
    found = st.session_state.get(f"verified-{run.run_id}")
    if found is None:
        st.caption("Reads the ledgers again, recomputes epsilon by two accountants and compares it with the claim.")
    elif isinstance(found, str):
        st.warning(frame.plain(found))
    else:
        for result in found:
            words = frame.plain(f"{result.site}: {result.statement}")
            if result.ok:
                st.success(words)
            else:
                st.error("\n\n".join([words, *(frame.plain(problem) for problem in result.problems)]))


def _ledger(run: RunFolder) -> None:
    st.subheader("Ledger over time")
    site = st.segmented_control("Hospital", run.sites, default=run.sites[0], key="ledger-site", required=True)
    timeline = ledger_timeline(run.path, site or run.sites[0])
    if timeline.problem:
        st.warning(frame.plain(timeline.problem))
    if not timeline.events:
        return
    rows = pd.DataFrame([asdict(event) for event in timeline.events])
    spent = rows.dropna(subset=["epsilon"])
    if not spent.empty:
        line = (
            alt.Chart(spent)
            .mark_line(interpolate="step-after", point=True, color="#0072B2")
            .encode(x="sequence:Q", y=alt.Y("epsilon:Q", title="epsilon spent (RDP)"), tooltip=["words", "epsilon"])
        )
        layers = [line]
        if timeline.budget is not None:
            limit = pd.DataFrame({"epsilon": [timeline.budget]})
            layers.append(alt.Chart(limit).mark_rule(color="#D55E00", strokeDash=[6, 4]).encode(y="epsilon:Q"))
        st.altair_chart(
            alt.layer(*layers).properties(height=220),
            alt=f"Epsilon spent by {site} after each record of its ledger; the dashed line is the budget",
        )
    st.dataframe(rows, hide_index=True, alt="Records of the ledger")


def _audit(run: RunFolder) -> None:
    st.subheader("Audit")
    if run.audit is None:
        st.info(frame.plain(run.why("audit")))
        return
    for words in audit_words(run.audit):
        (st.error if words.startswith("ALARM") else st.caption)(frame.plain(words))
    st.dataframe(
        [asdict(row) for row in audit_rows(run.audit)],
        hide_index=True,
        alt="Attacks and canary audits beside the claims that they tried to contradict",
    )
    for name, path in (run.audit_figures or {}).items():
        st.image(path.read_bytes(), alt=f"Audit figure {name}", caption=name, width=700, output_format="PNG")


with frame.refusing():
    page()
