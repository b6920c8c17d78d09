"""Synthetic volumes: what the generator asked the hospitals about, and what they answered."""

from __future__ import annotations

from collections.abc import Callable

import altair as alt
import pandas as pd
import streamlit as st

from fediod_med.labels import SEQUENCES
from fediod_med.review.run_folder import RunFolder
from fediod_med.review.synthetic_folder import SyntheticVolume, missing_words, nearest_of, quality_rows
from fediod_med.review.tables import progress_rows
from fediod_med.review.viewing import (
    synthetic_disagreement,
    synthetic_image,
    synthetic_maps,
    synthetic_phantom,
    volumes_of,
)
from fediod_med.review.volumes import LoadedVolume
from review_pages import frame, viewer
from review_pages.frame import COLOURS


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
    _quality(run)
    _progress(run)


def _browse(run: RunFolder, volumes: tuple[SyntheticVolume, ...]) -> None:
    rounds = list(dict.fromkeys(volume.round for volume in volumes))
    left, right = st.columns([1, 3])
    named = {"end of the run" if number is None else f"round {number}": number for number in rounds}
    chosen = named[left.selectbox("Round", list(named), key="synthetic-round")]
    of_round = {volume.name: volume for volume in volumes if volume.round == chosen}
    name = right.segmented_control(
        "Volume", list(of_round), default=next(iter(of_round)), key=f"synthetic-{chosen}", required=True
    )
    volume = of_round.get(name or "", next(iter(of_round.values())))
    cache = frame.cache()
    maps = synthetic_maps(volume, cache)
    disagreement = synthetic_disagreement(volume, cache)
    companions: dict[str, Callable[[str], LoadedVolume]] = {}
    if volume.phantom is not None:
        companions["public phantom it started from"] = lambda sequence: synthetic_phantom(volume, cache, sequence)
    if disagreement is not None:
        companions[disagreement.name] = lambda _: disagreement
    viewer.show(
        f"synthetic-{run.run_id}-{volume.key}",
        SEQUENCES,
        lambda sequence: synthetic_image(volume, cache, sequence),
        maps,
        companions=companions,
        synthetic=True,
    )
    for words in missing_words(volume, rounds):
        st.caption(words)
    left, right = st.columns([2, 1])
    if maps:
        rows = [{"label map": n, **{r: round(v, 2) for r, v in volumes_of(m).items()}} for n, m in maps.items()]
        left.dataframe(rows, hide_index=True, alt="Volumes of the label maps in millilitres")
        left.caption("Millilitres per class and region.")
    if disagreement is not None:
        mean = float(disagreement.array.mean())
        right.metric("Mean disagreement of the hospitals (nats)", f"{mean:.4f}")
    for row in nearest_of(run.synthetic_quality, volume):
        if row["value"] is not None:
            right.metric(frame.plain(f"Nearest public phantom: {row['measure']}"), f"{row['value']:.3g}")


def _quality(run: RunFolder) -> None:
    st.subheader("How good the volumes are")
    if run.synthetic_quality is None:
        st.info(frame.plain(run.why("synthetic_quality")))
        return
    rows = quality_rows(run.synthetic_quality)
    if not rows:
        st.info("The file of measures holds no number.")
        return
    st.dataframe(
        rows,
        hide_index=True,
        column_config={"value": st.column_config.NumberColumn(format="%.4g")},
        alt="Measures of the quality of the synthetic volumes",
    )
    notice = run.synthetic_quality.get("notice")
    if isinstance(notice, str):
        st.caption(frame.plain(notice))


def _progress(run: RunFolder) -> None:
    st.subheader("The generator over the rounds")
    rows = pd.DataFrame(progress_rows(run))
    if rows.empty:
        st.info(frame.plain(run.why("history") or "the run kept no history"))
        return
    columns = st.columns(3)
    for number, quantity in enumerate(dict.fromkeys(rows["quantity"])):
        of_one = rows[rows["quantity"] == quantity]
        split = of_one["hospital"].nunique() > 1
        colour = alt.Color("hospital:N", scale=alt.Scale(range=COLOURS)) if split else alt.value(COLOURS[0])
        columns[number % 3].altair_chart(
            alt.Chart(of_one)
            .mark_line()
            .encode(
                x="round:Q",
                y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
                color=colour,
                tooltip=list(rows.columns),
            )
            .properties(height=180, title=quantity),
            alt=f"{quantity} over the rounds",
        )


with frame.refusing():
    page()
