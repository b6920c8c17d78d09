"""Segment: drop four files or point to a folder; the input is checked, segmented, and opens in the viewer."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from fediod_med.errors import FediodError, InputError
from fediod_med.labels import SEQUENCES
from fediod_med.review.case_folder import read_cases
from fediod_med.review.run_folder import read_run
from fediod_med.review.settings import MAX_UPLOAD_MB
from fediod_med.review.tables import finding_rows
from fediod_med.review.uploads import ENDINGS, guess_sequence, keep_uploads, new_code
from fediod_med.review.viewing import case_images, case_maps
from review_pages import frame, viewer

PRIOR = "public prior (trained on no patient)"
PRIOR_BANNER = "Public prior: trained on phantoms, on no patient"


def page() -> None:
    """Draw the page."""
    st.title("Segment")
    runs = [entry for entry in frame.runs() if (entry.path / "bundle").is_dir()]
    name = st.selectbox("Model", [*(run.name for run in runs), PRIOR], key="segment-model")
    model = next((run.path for run in runs if run.name == name), None)
    frame.banner(PRIOR_BANNER if model is None else read_run(model).banner)
    way = st.segmented_control(
        "Input", ["Folder", "Files"], default="Folder", key="segment-way", required=True, label_visibility="collapsed"
    )
    if way == "Files":
        _from_files(model)
    else:
        _from_folder(model)
    _result()


def _from_folder(model: Path | None) -> None:
    text = st.text_input(
        "Case folder, folder of cases or DICOM study, inside the chosen folders",
        key="segment-folder",
        placeholder="for example demo/unseen",
    )
    below = [frame.roots().name_of(root) for root in frame.roots().folders]
    st.caption(frame.plain(f"Chosen folders: {', '.join(below)}."))
    if st.button("Check and segment", key="segment-go", type="primary", disabled=not text):
        _segment(frame.roots().folder(frame.below_root(text)), model)


def _from_files(model: Path | None) -> None:
    st.caption(
        f"Four files ({', '.join(ENDINGS)}), at most {MAX_UPLOAD_MB} MB each. They are kept on this machine only, "
        "under the study code; their names are dropped."
    )
    files = st.file_uploader("T1c, T1, T2 and FLAIR", accept_multiple_files=True, key="segment-files")
    st.session_state.setdefault("segment-code", new_code())
    code = st.text_input("Study code", key="segment-code", help="No name, no hospital number.")
    chosen: dict[str, tuple[str, bytes]] = {}
    for number, file in enumerate(files or []):
        guess = guess_sequence(file.name)
        sequence = st.selectbox(
            f"File {number + 1}",
            SEQUENCES,
            index=SEQUENCES.index(guess) if guess in SEQUENCES else None,
            key=f"segment-sequence-{file.file_id}",
        )
        if sequence in chosen:
            st.warning(f"{sequence} was chosen twice.")
        elif sequence is not None:
            chosen[sequence] = (file.name, file.getvalue())
    if st.button("Check and segment", key="segment-go", type="primary", disabled=len(chosen) < len(SEQUENCES)):
        paths = keep_uploads(chosen, code=code, work=frame.settings().work)
        _segment(next(iter(paths.values())).parent, model)


def _segment(source: Path, model: Path | None) -> None:
    """Check every case, segment those that pass, and remember where the result lies."""
    from fediod_med.segmentation.api import resolve, segment_scans

    st.session_state.pop("segmented", None)
    st.session_state["segment-findings"] = []
    frame.roots().require_links_inside(source)
    try:
        cases = resolve(source)
    except OSError as error:
        raise InputError(f"{source.name}: cannot be read ({error.strerror})") from error
    named = source.name if source.is_relative_to(frame.settings().work) else f"{source.parent.name}-{source.name}"
    out = frame.settings().work / named
    bar = st.progress(0.0, "Loading the model")
    done = 0

    def show(result: object) -> None:
        nonlocal done
        done += 1
        bar.progress(min(done / len(cases), 1.0), f"{done} of {len(cases)} cases")

    try:
        results = segment_scans(cases, out=out, model=model, device="auto", resume=True, on_result=show)
    except FediodError:
        bar.empty()
        raise
    bar.empty()
    frame.look_again()
    st.session_state["segmented"] = (str(out), tuple(result.case_id for result in results))


def _result() -> None:
    found = st.session_state.get("segmented")
    if found is None:
        return
    folder = read_cases(Path(found[0]), frame.roots())
    case_id = st.selectbox("Case", [case for case in found[1] if case in folder.cases], key="segmented-case")
    if case_id is None:
        return
    case = folder.cases[case_id]
    if case.findings:
        st.dataframe(finding_rows(case.findings), hide_index=True, alt="Findings about the input")
    if case.label_map is None:
        st.error(frame.plain(case.why("label_map")))
        return
    st.success(f"Segmented. It lies in {frame.plain(folder.name)}; rate it on the page Review.")
    cache = frame.cache()
    if case.images:
        viewer.show(
            f"segmented-{folder.name}-{case_id}",
            list(case.images),
            lambda sequence: case_images(case, cache, sequence),
            case_maps(case, cache),
        )
    else:
        st.info(frame.plain(case.why("images")))


with frame.refusing():
    page()
