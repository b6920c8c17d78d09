from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fediod_med.data.scans import Volume
from fediod_med.errors import FediodError, GeometryError, InputError, SettingsError
from fediod_med.preprocess import PreprocessCommand, parse_command, preprocess

AFFINE = np.array([[-1.0, 0, 0, 90], [0, -1, 0, 126], [0, 0, 2, -72], [0, 0, 0, 1]])
# A real program, run for real: it keeps what lies in the middle of the volume.
STRIP = """
import sys, nibabel, numpy
image = nibabel.load(sys.argv[1])
values = numpy.asarray(image.dataobj).copy()
kept = numpy.zeros(values.shape, bool)
kept[2:-2, 2:-2, 2:-2] = True
values[~kept] = 0
"""
SAVE = "nibabel.save(nibabel.Nifti1Image(values, image.affine), sys.argv[2])\n"


@pytest.fixture
def volume(rng) -> Volume:
    array = rng.uniform(10, 1000, (4, 8, 9, 10)).astype(np.float32)
    return Volume(array, AFFINE, Path("case_t1ce.nii.gz"))


@pytest.fixture
def command(tmp_path):
    """A command that runs a Python script with the input and output as its arguments."""

    def make(code: str, *, each: bool = False, timeout_s: float = 60.0) -> PreprocessCommand:
        script = tmp_path / "a script.py"
        script.write_text(code)
        return parse_command(f'{sys.executable} "{script}" {{input}} {{output}}', each=each, timeout_s=timeout_s)

    return make


def refused(volume, command, match, kind: type[FediodError] = InputError) -> str:
    with pytest.raises(kind, match=match) as caught:
        preprocess(volume, command, case="p1")
    return str(caught.value)


def test_the_mask_of_t1c_is_applied_to_all_four(volume, command) -> None:
    found = preprocess(volume, command(STRIP + SAVE), case="p1")
    kept = np.zeros((8, 9, 10), bool)
    kept[2:-2, 2:-2, 2:-2] = True
    assert np.array_equal(found.array, np.where(kept, volume.array, 0))
    assert found.array.dtype == np.float32
    assert np.array_equal(found.affine, AFFINE)
    assert found.path == volume.path
    assert (volume.array > 0).all()  # the input is not touched


def test_a_program_that_writes_a_mask_does_as_well(volume, command) -> None:
    as_mask = STRIP + "values = (values != 0).astype('uint8')\n" + SAVE
    image, mask = (preprocess(volume, command(code), case="p1").array for code in (STRIP + SAVE, as_mask))
    assert np.array_equal(image, mask)


def test_each_sequence_may_have_its_own_run(volume, command) -> None:
    found = preprocess(volume, command(STRIP + "values = values * 2\n" + SAVE, each=True), case="p1")
    inside = (slice(None), *[slice(2, -2)] * 3)
    assert np.array_equal(found.array[inside], 2 * volume.array[inside])
    assert (found.array[:, 0] == 0).all()


def test_the_program_sees_neutral_files_and_nothing_is_left(volume, command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    note = tmp_path / "note.txt"
    code = f"{STRIP}{SAVE}open({str(note)!r}, 'w').write(repr((sys.argv[1:], str(image.header['descrip']))))\n"
    secret = Volume(volume.array, volume.affine, Path("Doe_Jane_19500101_t1ce.nii.gz"))
    preprocess(secret, command(code), case="Doe_Jane")
    assert "Doe" not in note.read_text()
    assert "scan.nii.gz" in note.read_text()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_failing_program_is_named_with_its_code_and_last_word(volume, command) -> None:
    said = refused(volume, command("import sys; print('first'); sys.exit('no GPU found at ' + sys.argv[1])"), "case p1")
    assert "exit code 1" in said
    assert "(no GPU found at in0/scan.nii.gz)" in said
    assert "first" not in said
    refused(volume, command("import os; os.abort()"), r"signal 6 \(nothing printed\)")


def test_a_program_that_takes_too_long_is_stopped_with_its_children(volume, command, tmp_path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)
"""
    refused(volume, command(code, timeout_s=1.5), r"to end within 1\.5 s, found it still running")
    for pid in pids.read_text().split():
        assert ended(int(pid))


def ended(pid: int) -> bool:
    """Whether a process is gone or only waits to be reaped, soon."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("pass", r"write the file given as \{output\}, found nothing"),
        ("import sys; open(sys.argv[2] + '.txt', 'w')", r"found other files \(scan\.nii\.gz\.txt\)"),
        ("import sys; open(sys.argv[2], 'w')", "usable output.*empty file"),
        (STRIP + "values[:] = 0\n" + SAVE, "found 0 in every voxel"),
        (STRIP + "values[4, 4, 4] = float('nan')\n" + SAVE, "NaN or Inf in 1 voxels"),
        ("import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])", r"found 100\.0% of the volume left"),
        (STRIP + "values[:] = 0; values[4, 4, 4] = 1\n" + SAVE, r"found 0\.1% of the volume left"),
    ],
)
def test_an_unusable_output_is_refused(volume, command, code, message) -> None:
    assert "fediod-preprocess-" not in refused(volume, command(code), message)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("values = values[:-1]\n", r"to have the shape \(8, 9, 10\) of its input, found \(7, 9, 10\)"),
        ("image.affine[0, 3] += 3\n", r"corners up to 3\.00 mm apart"),
        ("image.affine[:, 0] *= -1\n", r"corners up to"),
    ],
)
def test_an_output_on_another_grid_is_refused(volume, command, code, message) -> None:
    refused(volume, command(STRIP + code + SAVE), message, GeometryError)


def test_nothing_in_a_command_reaches_a_shell(volume, command, tmp_path) -> None:
    script = tmp_path / "strip.py"
    script.write_text(STRIP + SAVE)
    trap = tmp_path / "trap"
    parsed = parse_command(f"{sys.executable} {script} {{input}} {{output}} ; touch {trap} '$(touch {trap})'")
    preprocess(volume, parsed, case="p1")  # the script ignores further arguments
    assert not trap.exists()
    assert parsed.words[4:6] == (";", "touch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected {input} and {output} in it"),
        ("true {input}", "found no {output}"),
        ("true {output}", "found no {input}"),
        ("true {input} {output} {case}", "found {case}"),
        ("true '{input} {output}", "balanced quotes"),
        ("no-such-program-here {input} {output}", "none called 'no-such-program-here'"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_any_case(text, message) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_command(text)
    assert message in str(caught.value)


def test_placeholders_may_be_part_of_a_word_and_the_program_may_come_later() -> None:
    parsed = parse_command("strip --in={input} '--out={output}'", check_program=False)
    assert parsed.words == ("strip", "--in={input}", "--out={output}")
    with pytest.raises(SettingsError, match="seconds above 0"):
        parse_command("true {input} {output}", timeout_s=0)


def test_a_program_that_vanished_is_an_input_error(volume) -> None:
    refused(volume, PreprocessCommand(("/no/such/program", "{input}", "{output}")), "No such file")
