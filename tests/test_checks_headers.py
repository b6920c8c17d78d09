"""Damaged and unusual headers: the checks see what the reader sees, and nothing is raised past them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fediod_med.checks.case import Inspection, inspect_subject
from fediod_med.data.layouts import Subject
from fediod_med.findings import as_json, fatal, finding
from fediod_med.labels import SEQUENCES, get_scheme

AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])


@pytest.fixture
def subject(tmp_path) -> Subject:
    """Four small uncompressed scans and a label map, with sform and qform."""
    rng = np.random.default_rng(0)
    values = np.zeros((24, 24, 24), np.int16)
    images = {}
    for name in (*SEQUENCES, "seg"):
        values[6:18, 6:18, 6:18] = rng.integers(1, 900, (12, 12, 12))
        content = (values > 500).astype(np.uint8) if name == "seg" else values
        image = nib.Nifti1Image(content, AFFINE)
        image.header.set_qform(AFFINE, code=1)
        image.header.set_sform(AFFINE, code=1)
        image.header.set_xyzt_units("mm")
        images[name] = tmp_path / f"{name}.nii"
        images[name].write_bytes(image.to_bytes())
    return Subject("small", images, label=images.pop("seg"))


def patch(path: Path, **fields) -> None:
    """Change header fields in the bytes of a file, behind nibabel's back."""
    raw = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    raw[:348] = header.binaryblock
    path.write_bytes(raw)


def inspect(subject: Subject) -> Inspection:
    inspection = inspect_subject(subject, label_scheme=get_scheme("brats2018"))
    assert (inspection.volume is None) == bool(fatal(inspection.findings))
    return inspection


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("qfac", [0, 1, 7])
def test_a_handedness_that_is_left_out_is_no_defect(subject, qfac):
    """NIfTI-1 standard, method 2: `pixdim[0]` of 0 means 1."""
    patch(subject.images["T2"], pixdim=[qfac, 2, 2, 2, 1, 1, 1, 1])
    inspection = inspect(subject)
    assert {found.code for found in inspection.findings} == {"N171", "W162"}
    assert inspection.volume is not None


def test_a_half_turn_off_by_rounding_is_the_rotation_that_the_reader_takes_it_for(subject):
    patch(subject.images["T2"], quatern_b=0, quatern_c=0, quatern_d=np.float32(1 + 4e-7))
    assert "W121" not in {found.code for found in inspect(subject).findings}


@pytest.mark.parametrize(
    "fields", [{"quatern_d": np.nan}, {"quatern_d": 3.0}, {"qoffset_x": np.inf}, {"quatern_b": np.inf}]
)
def test_a_qform_beyond_use_is_said_beside_a_good_sform(subject, fields):
    patch(subject.images["T2"], **fields)
    found = {f.code: f for f in inspect(subject).findings}
    assert found["W121"].where.endswith("T2.nii")
    json.loads(as_json(found.values()), parse_constant=refuse_constant)


def test_random_damage_to_a_header_becomes_findings(subject):
    """160 damaged headers, by a fixed seed: never an exception, never findings that are no JSON."""
    chance = random.Random(7)
    assert subject.label is not None
    targets = (subject.images["T2"], subject.images["T1c"], subject.label)
    originals = {path: path.read_bytes() for path in targets}
    codes: set[str] = set()
    for _ in range(160):
        path = chance.choice(targets)
        raw = bytearray(originals[path])
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            raw[chance.randrange(352)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        path.write_bytes(raw)
        findings = inspect(subject).findings
        json.loads(as_json(findings), parse_constant=refuse_constant)
        codes |= {found.code for found in findings}
        path.write_bytes(originals[path])
    assert len({code for code in codes if code.startswith("E")}) >= 6, sorted(codes)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_written_as_its_name(number) -> None:
    found = finding("E110", case="a", where="scan.nii.gz", message="odd", value=number)
    (row,) = json.loads(as_json([found]), parse_constant=refuse_constant)["findings"]
    assert row["value"] == str(number)
