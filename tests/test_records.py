"""Records whose keys others rely on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fediod_med.errors import InputError
from fediod_med.records import run_record, write_json


def test_run_record_names_versions_inputs_and_cases(tmp_path: Path) -> None:
    scan = tmp_path / "data" / "a.nii.gz"
    scan.parent.mkdir()
    scan.write_bytes(b"voxels")
    record = run_record(
        command="segment",
        device="cpu",
        commit="0123abc",
        options={"out": Path("out"), "rounds": np.int64(3)},
        privacy={"north": {"mode": "none"}},
        seeds={"student": 1},
        seconds={"teachers": 1.23456},
        inputs=[scan],
        relative_to=tmp_path,
        cases={"a": {"status": "done", "seconds": 1.5}},
    )
    content = json.loads(write_json(tmp_path / "run.json", record).read_text())
    assert content == record
    assert content["inputs_sha256"] == {"data/a.nii.gz": hashlib.sha256(b"voxels").hexdigest()}
    assert content["versions"]["torch"]
    assert content["options"] == {"out": "out", "rounds": 3}
    assert content["seconds"] == {"teachers": 1.235}
    assert content["cases"]["a"]["status"] == "done"
    assert content["notice"] == "Research software. Not for clinical use."
    with pytest.raises(InputError, match="record"):
        run_record(command="x", device="cpu", commit=None, options={}, privacy="", inputs=[tmp_path / "absent.nii.gz"])


def test_json_refuses_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finite"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
