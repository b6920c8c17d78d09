"""Cases: one segmented scan with everything that is known about it."""

from __future__ import annotations

import streamlit as st

from fediod_med.review.case_folder import Case, CaseFolder
from fediod_med.review.content import changed_outputs
from fediod_med.review.tables import finding_rows, volume_rows
from fediod_med.review.viewing import case_images, case_maps, dice_of, volumes_of
from fediod_med.review.volumes import LoadedVolume, same_grid
from review_pages import frame, viewer


def page() -> None:
    """Draw the page."""
    folder = frame.chosen_cases()
    if folder is None:
        return
    st.title("Cases")
    case = frame.pick_case(folder)
    if case is None:
        return
    if case.status == "failed":
        st.error(frame.plain(f"{case.case_id} was not segmented: {case.reason}"))
    cache = frame.cache()
    maps = case_maps(case, cache)
    if case.images:
        viewer.show(
            f"case-{folder.name}-{case.case_id}",
            list(case.images),
            lambda sequence: case_images(case, cache, sequence),
            maps,
        )
    else:
        st.warning(frame.plain(case.why("images") or "the scan is not at hand"))
    left, right = st.columns(2)
    with left:
        _volumes(case, maps)
    with right:
        _quality(case, folder)
    st.subheader("Findings about the input")
    if case.findings:
        st.dataframe(finding_rows(case.findings), hide_index=True, alt="Findings about the input")
    else:
        st.caption("None recorded.")
    for note in case.notes:
        st.caption(frame.plain(note))


def _volumes(case: Case, maps: dict[str, LoadedVolume]) -> None:
    st.subheader("Volumes")
    reference = maps.get("reference")
    volumes = case.volumes_ml or (volumes_of(maps["model"]) if "model" in maps else None)
    if volumes is None:
        st.caption(frame.plain(case.why("label_map")))
        return
    rows = volume_rows(volumes, None if reference is None else volumes_of(reference))
    st.dataframe(rows, hide_index=True, alt="Volumes by class and region in millilitres")
    if reference is None:
        st.caption(frame.plain(f"No reference: {case.why('reference')}"))
        return
    scores = [
        {"segmentation": name, **{f"Dice {region}": round(value, 3) for region, value in dice_of(m, reference).items()}}
        for name, m in maps.items()
        if name != "reference" and same_grid(m, reference)
    ]
    st.dataframe(scores, hide_index=True, alt="Dice against the reference by region")


def _quality(case: Case, folder: CaseFolder) -> None:
    st.subheader("Quality control")
    if case.quality is None:
        st.caption("No predicted quality was recorded.")
    else:
        detail = case.quality_detail or {}
        low, high = detail.get("low"), detail.get("high")
        span = f"{low:.2f} to {high:.2f}" if isinstance(low, float) and isinstance(high, float) else "not told"
        st.metric("Predicted mean Dice", f"{case.quality:.2f}", help="Without a reference; calibrated on phantoms.")
        st.caption(f"Interval {span}.")
        rests = detail.get("rests_on")
        if isinstance(rests, dict):
            rows = [{"rests on": str(k), "value": v} for k, v in rests.items() if isinstance(v, int | float)]
            st.dataframe(rows, hide_index=True, alt="What the predicted quality rests on")
    if case.disagreement is not None:
        st.metric("Disagreement of the teachers (nats)", f"{case.disagreement:.3f}")
    changed = changed_outputs(case, folder)
    if changed:
        st.error(frame.plain(f"Changed since they were written: {', '.join(changed)}"))
    elif case.outputs_sha256:
        st.caption("All recorded files are as they were written (SHA-256).")


with frame.refusing():
    page()
