"""Runs an external program on the scans of a case before they are segmented: skull stripping, as a rule.

No such program is a dependency: the user names the command, for example `hd-bet -i {input} -o {output}`. It is started
without a shell, on files of neutral names that hold the voxels and the geometry only, in a folder that is deleted after
it. Its output is believed only after it was checked; what it prints is not logged.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fediod_med.data.grids import GEOMETRY_TOLERANCE_MM, corner_distance
from fediod_med.data.nifti.reading import read_scan
from fediod_med.data.nifti.writing import write_volumes
from fediod_med.data.scans import Scan, Volume
from fediod_med.errors import GeometryError, InputError, SettingsError
from fediod_med.labels import SEQUENCES

DEFAULT_TIMEOUT_S = 1800.0
# Shares of the volume outside which what is left is no brain: nothing was removed, or nearly all.
KEPT_SHARES = (0.005, 0.95)

_PLACEHOLDERS = ("{input}", "{output}")
_REASON_LENGTH = 200


@dataclass(frozen=True)
class PreprocessCommand:
    """A command, split into words but not yet filled in.

    Attributes:
        words: program and arguments; `{input}` and `{output}` occur in them.
        each: run it on every sequence, and take its four images; otherwise on T1c only, whose mask (voxels that are not
            0 in the output, be it an image or a mask) is applied to all four.
        timeout_s: seconds that one run may take.
    """

    words: tuple[str, ...]
    each: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S


def parse_command(
    text: str, *, each: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S, check_program: bool = True
) -> PreprocessCommand:
    """Split a command as a shell would quote it; nothing in it is ever given to a shell.

    Args:
        text: for example `hd-bet -i {input} -o {output}`; both placeholders stand for a `.nii.gz` path.
        each: see `PreprocessCommand`.
        timeout_s: see `PreprocessCommand`.
        check_program: refuse a program that is not on this machine, before the first case rather than at it.

    Raises:
        SettingsError: unbalanced quotes, a placeholder missing or unknown, no such program, or no positive timeout.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise SettingsError(f"preprocess command {text!r}: expected balanced quotes, found {error}") from error
    missing = [name for name in _PLACEHOLDERS if not any(name in word for word in words)]
    if missing or not words:
        raise SettingsError(
            f"preprocess command {text!r}: expected {' and '.join(_PLACEHOLDERS)} in it, found no "
            f"{' and no '.join(missing)}; for example: hd-bet -i {{input}} -o {{output}}"
        )
    unknown = sorted({name for word in words for name in re.findall(r"\{\w+\}", word)} - set(_PLACEHOLDERS))
    if unknown:
        raise SettingsError(
            f"preprocess command {text!r}: expected only {' and '.join(_PLACEHOLDERS)}, found {', '.join(unknown)}"
        )
    if check_program and shutil.which(words[0]) is None:
        raise SettingsError(
            f"preprocess command {text!r}: expected a program on this machine, found none called {words[0]!r}; install "
            f"it, or give its full path"
        )
    if not timeout_s > 0:
        raise SettingsError(f"preprocess timeout: expected seconds above 0, found {timeout_s}")
    return PreprocessCommand(words, each, timeout_s)


def preprocess(volume: Volume, command: PreprocessCommand, *, case: str) -> Volume:
    """Run a command on a case and take over what it made, on the same grid.

    Args:
        volume: four sequences on one grid, after co-registration if there is any.
        command: from `parse_command`.
        case: id of the case, for messages; the program does not see it.

    Returns:
        A new volume; voxels that the program removed are 0, the background of a scan.

    Raises:
        InputError: the program could not be started, failed, took too long, wrote no file or an unusable one, removed
            nothing or nearly everything.
        GeometryError: its output lies on another grid.
    """
    array = np.empty_like(volume.array)
    with tempfile.TemporaryDirectory(prefix="fediod-preprocess-") as name:
        folder = Path(name)
        if command.each:
            for i, sequence in enumerate(SEQUENCES):
                array[i] = _run_on(volume, i, command, folder, f"case {case}, {sequence}").array
        else:
            kept = _run_on(volume, 0, command, folder, f"case {case}, {SEQUENCES[0]}").array != 0
            np.multiply(volume.array, kept, out=array)
    return Volume(array, volume.affine, volume.path)


def _run_on(volume: Volume, index: int, command: PreprocessCommand, folder: Path, where: str) -> Scan:
    """What the command makes of one sequence, checked."""
    given, made = folder / f"in{index}" / "scan.nii.gz", folder / f"out{index}" / "scan.nii.gz"
    made.parent.mkdir()
    write_volumes(given, volume.array[index], volume.affine)
    words = [word.replace("{input}", str(given)).replace("{output}", str(made)) for word in command.words]
    _run(words, folder, command.timeout_s, where)
    if not made.is_file():
        others = sorted(path.name for path in made.parent.iterdir())
        found = f"other files ({', '.join(others[:4])})" if others else "nothing"
        raise InputError(
            f"{where}: expected {command.words[0]} to write the file given as {{output}}, found {found}; check its "
            f"options, the output is a .nii.gz file"
        )
    try:
        scan = read_scan(made, SEQUENCES[index])
    except InputError as error:
        raise type(error)(
            f"{where}: expected a usable output of {command.words[0]}: {_without(str(error), folder)}"
        ) from error
    _require_same_place(scan, volume, command, where)
    share = np.count_nonzero(scan.array) / scan.array.size
    low, high = KEPT_SHARES
    if not low <= share <= high:
        raise InputError(
            f"{where}: expected {command.words[0]} to leave the brain, found {share:.1%} of the volume left (limits "
            f"{low:.1%} and {high:.0%}); look at its output, or leave the command out for scans that are stripped"
        )
    return scan


def _require_same_place(scan: Scan, volume: Volume, command: PreprocessCommand, where: str) -> None:
    """Refuse an output on another grid than the input had."""
    shape = volume.array.shape[1:]
    if scan.array.shape != shape:
        raise GeometryError(
            f"{where}: expected the output of {command.words[0]} to have the shape {shape} of its input, found "
            f"{scan.array.shape}; use an option that keeps the grid"
        )
    distance = corner_distance(shape, scan.affine, volume.affine)
    if not distance <= GEOMETRY_TOLERANCE_MM:
        raise GeometryError(
            f"{where}: expected the output of {command.words[0]} on the grid of its input, found corners up to "
            f"{distance:.2f} mm apart; use an option that keeps the grid"
        )


def _run(words: Sequence[str], folder: Path, timeout_s: float, where: str) -> None:
    """Run a program to its end, with everything it started; `InputError` where that is no success."""
    with (folder / "printed.txt").open("w+b") as printed:
        try:
            process = subprocess.Popen(
                words, cwd=folder, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, start_new_session=True
            )
        except OSError as error:
            raise InputError(f"{where}: expected to start {words[0]}, found {error.strerror}; check it") from error
        try:
            code = process.wait(timeout=timeout_s)
        except BaseException as error:  # also Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise InputError(
                f"{where}: expected {words[0]} to end within {timeout_s:g} s, found it still running; it was stopped"
            ) from error
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - 4096))
        said = _without(printed.read().decode("utf-8", "replace"), folder)
    if code != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1][:_REASON_LENGTH] if lines else "nothing printed"
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise InputError(f"{where}: expected {words[0]} to succeed, found {how} ({last}); try it by hand on one file")


def _without(text: str, folder: Path) -> str:
    """A text without the temporary folder's name."""
    return text.replace(f"{folder}{os.sep}", "")
