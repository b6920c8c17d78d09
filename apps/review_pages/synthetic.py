"""Synthetic volumes: what the generator asked the hospitals about, and what they answered."""

from __future__ import annotations

import altair as alt
import pandas as pd
import streamlit as st

from fediod_med.labels import SEQUENCES
from fediod_med.review.overlays import vote_entropy
from fediod_med.review.run_folder import RunFolder, SyntheticVolume
from fediod_med.review.tables import progress_rows
from fediod_med.review.viewing import synthetic_image, synthetic_maps, volumes_of
from review_pages import frame, viewer


def page() -> None:
    """Draw the page."""
    run = frame.chosen_run()
    if run is None:
        return
    st.title("Synthetic volumes")
    if run.synthetic is None:
        st.info(frame.plain(run.why("synthetic")))
    else:
        _browse(run, run.synthetic)
    _progress(run)


def _browse(run: RunFolder, volumes: tuple[SyntheticVolume, ...]) -> None:
    rounds = list(dict.fromkeys(volume.round for volume in volumes))
    left, right = st.columns([1, 3])
    chosen = left.selectbox(
        "Round", rounds, format_func=lambda r: "end of the run" if r is None else f"round {r}", key="synthetic-round"
    )
    of_round = {volume.name: volume for volume in volumes if volume.round == chosen}
    name = right.segmented_control(
        "Volume", list(of_round), default=next(iter(of_round)), key="synthetic", required=True
    )
    volume = of_round.get(name or "", next(iter(of_round.values())))
    cache = frame.cache()
    maps = synthetic_maps(volume, cache)
    if not volume.answers:
        st.caption("The run kept no answer of a single hospital for this volume, only the label map it was made from.")
    viewer.show(
        f"synthetic-{run.run_id}-{volume.name}",
        SEQUENCES,
        lambda sequence: synthetic_image(volume, cache, sequence),
        maps,
        synthetic=True,
    )
    answers = [labels for map_name, labels in maps.items() if map_name.startswith("teacher ")]
    if len(answers) > 1:
        disagreement = vote_entropy(answers)
        st.metric("Mean disagreement of the hospitals (nats)", f"{float(disagreement.array.mean()):.4f}")
    if maps:
        rows = [{"label map": n, **{r: round(v, 2) for r, v in volumes_of(m).items()}} for n, m in maps.items()]
        st.dataframe(rows, hide_index=True, alt="Volumes of the label maps in millilitres")
        st.caption("Millilitres per class and region.")


def _progress(run: RunFolder) -> None:
    st.subheader("The generator over the rounds")
    rows = pd.DataFrame(progress_rows(run))
    if rows.empty:
        st.info(frame.plain(run.why("history") or "the run kept no history"))
        return
    quantities = list(dict.fromkeys(rows["quantity"]))
    columns = st.columns(3)
    for number, quantity in enumerate(quantities):
        columns[number % 3].altair_chart(
            alt.Chart(rows[rows["quantity"] == quantity])
            .mark_line(color="#0072B2")
            .encode(
                x="round:Q", y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)), tooltip=["round", "value"]
            )
            .properties(height=160, title=quantity),
            alt=f"{quantity} over the rounds",
        )


with frame.refusing():
    page()
