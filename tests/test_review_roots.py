"""Which paths a reviewer may open, and what is found below the roots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fediod_med.errors import InputError, SettingsError
from fediod_med.review.roots import Roots, kind_of, read_json


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`inside/` (a root) with files and links, and `outside/` with a secret."""
    (tmp_path / "inside" / "run" / "deep").mkdir(parents=True)
    (tmp_path / "inside" / "run" / "file.txt").write_text("seen")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    (tmp_path / "inside-too").mkdir()  # shares the root's name as a prefix
    (tmp_path / "inside" / "leak").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "near").symlink_to(tmp_path / "inside" / "run")
    (tmp_path / "inside" / "loop").symlink_to(tmp_path / "inside" / "loop")
    return tmp_path


def test_paths_inside_resolve_whether_relative_or_absolute(tree: Path) -> None:
    roots = Roots([tree / "inside"])
    expected = (tree / "inside" / "run" / "file.txt").resolve()
    for path in ("run/file.txt", "./run//file.txt", str(expected), "near/file.txt"):
        assert roots.file(path) == expected
    assert roots.resolve("run/not-yet.txt") == tree.resolve() / "inside" / "run" / "not-yet.txt"
    assert roots.folder("run/deep").is_dir()


@pytest.mark.parametrize(
    "path",
    [
        "../outside/secret.txt",
        "run/../../outside/secret.txt",
        "run/../run/file.txt",  # harmless, and still nothing that a page asks for
        "..\\outside\\secret.txt",
        "leak/secret.txt",
        "leak",
        "/etc/passwd",
        "run/file.txt\0.png",
        "loop",
        "loop/x",
    ],
)
def test_paths_that_lead_out_are_refused(tree: Path, path: str) -> None:
    roots = Roots([tree / "inside"])
    with pytest.raises(SettingsError):
        roots.resolve(path)
    assert not roots.contains(path)


def test_a_sibling_whose_name_begins_like_the_root_is_outside(tree: Path) -> None:
    with pytest.raises(SettingsError, match="outside"):
        Roots([tree / "inside"]).resolve(tree / "inside-too")


def test_what_is_inside_but_absent_is_an_input_error(tree: Path) -> None:
    roots = Roots([tree / "inside"])
    with pytest.raises(InputError, match="expected a file"):
        roots.file("run/nothing.txt")
    with pytest.raises(InputError, match="expected a folder"):
        roots.folder("run/file.txt")


def test_a_root_must_be_a_folder(tree: Path) -> None:
    with pytest.raises(SettingsError, match="none at"):
        Roots([tree / "nowhere"])
    with pytest.raises(SettingsError, match="at least one"):
        Roots([])


_PARTS = st.lists(
    st.sampled_from(["..", ".", "", "run", "leak", "near", "deep", "file.txt", "~", "\0", "a b"]), max_size=6
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=_PARTS, absolute=st.booleans())
def test_whatever_is_accepted_lies_inside(tree: Path, parts: list[str], absolute: bool) -> None:
    roots = Roots([tree / "inside"])
    path = ("/" if absolute else "") + "/".join(parts)
    try:
        found = roots.resolve(path)
    except SettingsError:
        return
    assert found.resolve().is_relative_to((tree / "inside").resolve())


def test_names_tell_nothing_above_the_root(tree: Path) -> None:
    roots = Roots([tree / "inside"])
    assert roots.name_of(tree / "inside" / "run") == "inside/run"
    assert roots.name_of(tree / "inside") == "inside"
    (tree / "other" / "inside").mkdir(parents=True)
    both = Roots([tree / "inside", tree / "other" / "inside"])
    assert both.name_of(tree / "other" / "inside") == "inside (2)"


def test_runs_and_segmented_cases_are_found(tree: Path) -> None:
    root = tree / "inside"
    for name in ("summary.json", "run.json"):
        (root / "run" / name).write_text("{}")
    demo = root / "run" / "segmented"
    demo.mkdir()
    (demo / "c1_seg.nii.gz").touch()
    (demo / "c1_stats.json").touch()
    cohort = root / "a" / "b" / "cohort"
    (cohort / "records").mkdir(parents=True)
    for case in ("c1", "c2"):
        (cohort / "records" / f"{case}.json").write_text("{}")
    masks_only = root / "a" / "references"  # label maps without statistics are references, not an output
    masks_only.mkdir()
    (masks_only / "c1_seg.nii.gz").touch()
    (root / "run" / "hospitals" / "records").mkdir(parents=True)  # a run's patients are no segmented folder
    (root / "run" / "hospitals" / "records" / "x.json").touch()

    roots = Roots([root, root / "run"])
    assert [found.path.name for found in roots.runs()] == ["run"]
    assert {(f.path.name, f.cases) for f in roots.segmentations()} == {("segmented", 1), ("cohort", 2)}
    assert kind_of(masks_only) is None
    assert roots.folders_below("a") == (root / "a" / "b", masks_only)
    assert root / "leak" not in roots.folders_below(root)


def test_json_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json"):
        read_json(tmp_path / "bad.json", within=tmp_path)
    with pytest.raises(InputError, match="not there"):
        read_json(tmp_path / "none.json", within=tmp_path)


def test_json_behind_a_link_that_leads_out_is_not_read(tree: Path) -> None:
    (tree / "outside" / "secret.json").write_text("{}")
    (tree / "inside" / "run" / "summary.json").symlink_to(tree / "outside" / "secret.json")
    with pytest.raises(InputError, match="leads out"):
        read_json(tree / "inside" / "run" / "summary.json", within=tree / "inside" / "run")
    (tree / "inside" / "run" / "linked.json").symlink_to(tree / "inside" / "run" / "kept.json")
    (tree / "inside" / "run" / "kept.json").write_text("[1]")
    assert read_json(tree / "inside" / "run" / "linked.json", within=tree / "inside" / "run") == [1]


def test_pages_that_show_pictures_load_neither_torch_nor_a_plotting_library() -> None:
    modules = (
        "agreement audit_table case_folder content exchange ledger_timeline overlays queue run_folder slices store"
    )
    code = "import sys; " + "; ".join(f"import fediod_med.review.{name}" for name in modules.split())
    code += "; print(*[n for n in ('torch', 'monai', 'matplotlib', 'streamlit', 'opacus') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
