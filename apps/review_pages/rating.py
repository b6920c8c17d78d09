"""Review: one case after another, rated by mouse or keyboard, open or blinded; every press is kept for good."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

import streamlit as st

from fediod_med.errors import FediodError
from fediod_med.labels import REGIONS
from fediod_med.review.case_folder import Case, CaseFolder
from fediod_med.review.content import content_hashes
from fediod_med.review.events import RATINGS, TAGS, VERDICTS, Review
from fediod_med.review.queue import (
    ARMS,
    QueueItem,
    blind,
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
    in_words,
    next_region,
)
from fediod_med.review.viewing import case_images, case_maps
from fediod_med.review.volumes import LoadedVolume
from review_pages import frame, told, viewer

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
    mode = "Open"
    if others:
        mode = st.segmented_control("Way", modes, default="Open", key=f"way-{folder.name}", required=True) or "Open"
    other = None if mode == "Open" else others[modes.index(mode) - 1]
    if not reviewer:
        st.info("Enter a reviewer code at the side to begin.")
    else:
        _rate(folder, reviewer, other)
    told.agreement(folder, other)
    told.exchange(folder)


def _rate(folder: CaseFolder, reviewer: str, other: str | None) -> None:
    arms = (OWN,) if other is None else ARMS
    cases = [case for case in folder.cases.values() if other is None or other in case.others]
    events = frame.journal().events(folder.name)
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
    left, right = st.columns([3.3, 1.15])
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
    for event in frame.journal().current(folder.name):
        if (event.reviewer, event.case, event.arm) == (reviewer, case.case_id, arm):
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
    # a case that was rated goes to the end of the queue, so the way back is remembered
    trail = st.session_state.setdefault(f"{place}-trail", [])
    back = trail[-1] if trail else neighbour(queue, case.case_id, back=True)
    forth = neighbour(queue, case.case_id) or next_case(queue, after=case.case_id)
    columns = verdicts.columns(2)
    for column, label, shortcut, target, go in (
        (columns[0], "Previous", "p", back, _go_back),
        (columns[1], "Next", "n", forth, _go_on),
    ):
        column.button(
            label,
            key=f"{label}-{key}",
            shortcut=shortcut,
            disabled=target is None,
            on_click=go,
            args=(place, target),
            width="stretch",
        )


def _set_rating(name: str, rating: int) -> None:
    st.session_state[name] = rating


def _go_on(place: str, case_id: str) -> None:
    st.session_state[f"{place}-trail"].append(st.session_state[place])
    st.session_state[place] = case_id


def _go_back(place: str, case_id: str) -> None:
    if st.session_state[f"{place}-trail"]:
        st.session_state[f"{place}-trail"].pop()
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
        following = next_case(queue, after=case.case_id)
        if following is not None:
            _go_on(place, following)


def _said() -> None:
    said = st.session_state.pop("review-said", None)
    if said is not None:
        (st.error if said[0] == "error" else st.success)(frame.plain(said[1]))


def _names(folder: CaseFolder, case: Case, reviewer: str, other: str, item: QueueItem) -> None:
    if st.button("Show which is which", key=f"reveal-{case.case_id}", disabled=not item.done):
        found = reveal(frame.store(), reviewer=reviewer, run=folder.name, case=case.case_id, models=(OWN, other))
        st.info(frame.plain("; ".join(f"{letter} is {model}" for letter, model in found.models.items())))


with frame.refusing():
    page()
