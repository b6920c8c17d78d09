"""Review: one case after another, rated by mouse or keyboard, open or blinded; every press is kept for good."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

import altair as alt
import pandas as pd
import streamlit as st

from fediod_med.errors import FediodError
from fediod_med.labels import REGIONS
from fediod_med.review.agreement import rating_against_dice, ratings_with_dice
from fediod_med.review.case_folder import Case, CaseFolder
from fediod_med.review.content import content_hashes
from fediod_med.review.events import RATINGS, TAGS, VERDICTS, Review
from fediod_med.review.exchange import events_csv, export_csv, export_json, import_text
from fediod_med.review.queue import (
    ARMS,
    QueueItem,
    blind,
    blinded_ratings,
    neighbour,
    next_case,
    reveal,
    review_queue,
    waiting,
)
from fediod_med.review.rating import (
    RATING_SHORT,
    RATING_WORDS,
    VERDICT_KEYS,
    VERDICT_WORDS,
    agreement_rows,
    in_words,
    next_region,
    open_comparisons,
)
from fediod_med.review.viewing import case_images, case_maps, dice_of
from fediod_med.review.volumes import LoadedVolume, same_grid
from review_pages import frame, viewer

ORDER = ("WT", "TC", "ET")
OWN = "model"


def page() -> None:
    """Draw the page."""
    folder = frame.chosen_cases()
    if folder is None:
        return
    st.title("Review")
    with st.sidebar:
        reviewer = st.text_input(
            "Reviewer code",
            key="reviewer",
            bind="query-params",
            persist_state="session",
            help="A code, not a name: letters and digits.",
        ).strip()
    others = sorted({name for case in folder.cases.values() for name in case.others})
    modes = ["Open", *(f"Blinded A/B against {name}" for name in others)]
    mode = st.segmented_control("Way", modes, default="Open", key=f"way-{folder.name}", required=True) or "Open"
    other = None if mode == "Open" else others[modes.index(mode) - 1]
    if not reviewer:
        st.info("Enter a reviewer code at the side to begin.")
    else:
        _rate(folder, reviewer, other)
    _agreement(folder, other)
    _exchange(folder)


def _rate(folder: CaseFolder, reviewer: str, other: str | None) -> None:
    arms = (OWN,) if other is None else ARMS
    cases = [case for case in folder.cases.values() if other is None or other in case.others]
    events = frame.store().events(run=folder.name)
    queue = review_queue(waiting(cases), events, reviewer=reviewer, run=folder.name, arms=arms)
    if not queue:
        st.info("No case of this folder can be reviewed.")
        return
    place = f"at-{folder.name}-{other}-{reviewer}"
    at = st.session_state.get(place)
    if at not in folder.cases:
        at = next_case(queue) or queue[0].case_id
        st.session_state[place] = at
    done = sum(item.done for item in queue)
    st.progress(done / len(queue), f"{done} of {len(queue)} cases reviewed by {frame.plain(reviewer)}")
    _said()
    case = folder.cases[at]
    item = next(item for item in queue if item.case_id == at)
    st.markdown(f"**{frame.plain(at)}**: {frame.plain(item.reason)}")
    maps, hidden = _shown(folder, case, reviewer, other)
    left, right = st.columns([3, 1.25])
    with left:
        _pictures(folder, case, maps, hidden)
    with right:
        arm = arms[0]
        if other is not None:
            rated = item.rated
            start = next((name for name in arms if name not in rated), arms[0])
            arm = st.segmented_control("Rate", arms, default=start, key=f"arm-{at}-{reviewer}-{rated}") or start
        _form(folder, case, reviewer, arm, queue, place, other)
        if other is not None:
            _names(folder, case, reviewer, other, item)


def _shown(
    folder: CaseFolder, case: Case, reviewer: str, other: str | None
) -> tuple[dict[str, LoadedVolume], Mapping[str, str]]:
    """Label maps under the names that the reviewer may know, and in a comparison the model behind each letter."""
    maps = case_maps(case, frame.cache())
    if other is None:
        keep = {OWN} if not st.session_state.get("show-reference") else {OWN, "reference"}
        return {name: labels for name, labels in maps.items() if name in keep}, {}
    hidden = blind(frame.store(), reviewer=reviewer, run=folder.name, case=case.case_id, models=(OWN, other)).models
    return {letter: replace(maps[hidden[letter]], name=letter) for letter in ARMS}, hidden


def _pictures(folder: CaseFolder, case: Case, maps: Mapping[str, LoadedVolume], hidden: Mapping[str, str]) -> None:
    if not hidden:
        st.toggle("Show the reference (tells the answer)", key="show-reference")
    if not case.images:
        st.warning(frame.plain(case.why("images")))
        return
    cache = frame.cache()
    viewer.show(
        f"review-{folder.name}-{case.case_id}-{'blind' if hidden else 'open'}",
        list(case.images),
        lambda sequence: case_images(case, cache, sequence),
        maps,
        pixels=360,
    )


def _form(
    folder: CaseFolder,
    case: Case,
    reviewer: str,
    arm: str,
    queue: Sequence[QueueItem],
    place: str,
    other: str | None,
) -> None:
    key = f"{folder.name}-{case.case_id}-{arm}-{reviewer}"
    st.session_state.setdefault(f"submission-{key}", uuid.uuid4().hex)
    st.session_state.setdefault(f"began-{key}", time.time())
    last = frame.store().current(run=folder.name, case=case.case_id, reviewer=reviewer)
    for event in last:
        if event.arm == arm:
            st.success(f"You said: {frame.plain(in_words(event))}")
    for region in ORDER:
        st.segmented_control(
            region, RATINGS, key=f"rating-{region}-{key}", help="; ".join(RATING_WORDS.values()), width="stretch"
        )
    current = {region: st.session_state.get(f"rating-{region}-{key}") for region in ORDER}
    focus = next_region(current, ORDER) or ORDER[0]
    st.caption(f"Keys 1 to 4 rate {focus} now.")
    columns = st.columns(2)
    for number, rating in enumerate(RATINGS):
        columns[number % 2].button(
            RATING_SHORT[rating],
            key=f"press-{rating}-{key}",
            shortcut=str(rating),
            on_click=_set_rating,
            args=(f"rating-{focus}-{key}", rating),
            help=RATING_WORDS[rating],
            width="stretch",
        )
    verdicts = st.container()
    st.pills("Tags", TAGS, selection_mode="multi", key=f"tags-{key}", wrap=True)
    st.text_area("Comment", key=f"comment-{key}", max_chars=4000, height=70, placeholder="No names.")
    columns = verdicts.columns(2)
    for number, verdict in enumerate(VERDICTS):
        columns[number % 2].button(
            VERDICT_WORDS[verdict],
            key=f"verdict-{verdict}-{key}",
            shortcut=VERDICT_KEYS[verdict],
            on_click=_submit,
            args=(folder, case, reviewer, arm, verdict, queue, place, other),
            type="primary" if verdict == "accept" else "secondary",
            width="stretch",
        )
    back, forth = neighbour(queue, case.case_id, back=True), neighbour(queue, case.case_id)
    columns = verdicts.columns(2)
    for column, label, shortcut, target in ((columns[0], "Previous", "p", back), (columns[1], "Next", "n", forth)):
        column.button(
            label,
            key=f"{label}-{key}",
            shortcut=shortcut,
            disabled=target is None,
            on_click=_go,
            args=(place, target),
            width="stretch",
        )


def _set_rating(name: str, rating: int) -> None:
    st.session_state[name] = rating


def _go(place: str, case_id: str) -> None:
    st.session_state[place] = case_id


def _submit(
    folder: CaseFolder,
    case: Case,
    reviewer: str,
    arm: str,
    verdict: str,
    queue: Sequence[QueueItem],
    place: str,
    other: str | None,
) -> None:
    """Keep the review; then the next case, or the other arm of this one."""
    key = f"{folder.name}-{case.case_id}-{arm}-{reviewer}"
    state = st.session_state
    try:
        label_map = case.label_map
        if other is not None:
            hidden = blind(frame.store(), reviewer=reviewer, run=folder.name, case=case.case_id, models=(OWN, other))
            label_map = case.label_maps(OWN)[hidden.models[arm]]
        mask, image = content_hashes(case, label_map)
        ratings = {region: state.get(f"rating-{region}-{key}") for region in REGIONS}
        event = frame.store().submit(
            Review(
                reviewer=reviewer,
                run=folder.name,
                case=case.case_id,
                arm=arm,
                verdict=verdict,
                ratings={region: rating for region, rating in ratings.items() if rating},
                comment=state.get(f"comment-{key}") or "",
                tags=tuple(state.get(f"tags-{key}") or ()),
                seconds=max(0.0, time.time() - state.get(f"began-{key}", time.time())),
                mask_sha256=mask,
                image_sha256=image,
                detail={"way": "open" if other is None else "blinded", "reference": bool(state.get("show-reference"))},
                submission=state[f"submission-{key}"],
            )
        )
    except FediodError as error:
        state["review-said"] = ("error", str(error))
        return
    state[f"submission-{key}"] = uuid.uuid4().hex
    state.pop(f"began-{key}", None)
    state["review-said"] = ("success", f"Kept: {case.case_id}, {in_words(event)}")
    rated = {arm, *next((item.rated for item in queue if item.case_id == case.case_id), ())}
    if other is None or set(ARMS) <= rated:
        state[place] = next_case(queue, after=case.case_id) or case.case_id


def _said() -> None:
    said = st.session_state.pop("review-said", None)
    if said is not None:
        (st.error if said[0] == "error" else st.success)(frame.plain(said[1]))


def _names(folder: CaseFolder, case: Case, reviewer: str, other: str, item: QueueItem) -> None:
    if st.button("Show which is which", key=f"reveal-{case.case_id}", disabled=not item.done):
        found = reveal(frame.store(), reviewer=reviewer, run=folder.name, case=case.case_id, models=(OWN, other))
        st.info(frame.plain("; ".join(f"{letter} is {model}" for letter, model in found.models.items())))


def _agreement(folder: CaseFolder, other: str | None) -> None:
    st.subheader("Agreement")
    reviews = frame.store().current(run=folder.name)
    if not reviews:
        st.caption("No review yet.")
        return
    rows = agreement_rows(reviews)
    if rows:
        st.dataframe(rows, hide_index=True, alt="Agreement of the reviewers")
    else:
        st.caption("One reviewer so far; agreement needs two.")
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
        for name in (OWN, *([] if other is None else [other])):
            if name in maps and same_grid(maps[name], maps["reference"]):
                dice[case.case_id, name] = dice_of(maps[name], maps["reference"])[region]
    shown = list(reviews)
    if other is not None:
        finished = open_comparisons(frame.store().events(run=folder.name))
        shown = [
            replace(event, arm=model)
            for model, event in blinded_ratings(frame.store().events(run=folder.name), (OWN, other))
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


def _exchange(folder: CaseFolder) -> None:
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
    blinded = open_comparisons(store.events())
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


with frame.refusing():
    page()
