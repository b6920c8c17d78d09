"""Files that were dropped into the page Segment: bounded, renamed to a study code, and kept in the work folder only."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SEQUENCES

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
MAX_FILE_BYTES = 64 * 2**20
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX: Mapping[str, str] = {"T1c": "t1c", "T1": "t1n", "T2": "t2w", "FLAIR": "t2f"}
_HINTS: tuple[tuple[str, str], ...] = (
    (r"t1[-_]?(ce|c|gd|post)(?![a-z])|t1contrast", "T1c"),
    (r"flair|t2f(?![a-z])", "FLAIR"),
    (r"t1(n|w)?(?![a-z0-9])", "T1"),
    (r"t2(w)?(?![a-z0-9])", "T2"),
)


def new_code() -> str:
    """A study code that says nothing about the patient."""
    return f"case-{secrets.token_hex(4)}"


def guess_sequence(name: str) -> str | None:
    """The sequence that a file's name tells, or none."""
    plain = name.lower()
    return next((sequence for pattern, sequence in _HINTS if re.search(pattern, plain)), None)


def ending_of(name: str) -> str | None:
    """The ending of a volume's file name among `ENDINGS`, or none."""
    return next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)


def keep_uploads(files: Mapping[str, tuple[str, bytes]], *, code: str, work: Path) -> dict[str, Path]:
    """Write four uploaded files as one case; only the endings of their names are kept.

    Args:
        files: name and content by sequence.
        code: study code, of letters, digits, `.`, `_` and `-`.
        work: folder; the case goes to `uploads/<code>` in it.

    Returns:
        Files by sequence.

    Raises:
        SettingsError: a sequence is missing, or the code is not one, or is in use.
        InputError: a file is empty, too large, or of another kind.
    """
    missing = [sequence for sequence in SEQUENCES if sequence not in files]
    if missing:
        raise SettingsError(f"upload: expected files for {', '.join(SEQUENCES)}, found none for {', '.join(missing)}")
    if not _CODE.fullmatch(code) or code.endswith("."):
        raise SettingsError(f"upload: expected a code of letters, digits, '.', '_' and '-', found {code!r}")
    named: dict[str, str] = {}
    for sequence in SEQUENCES:
        name, content = files[sequence]
        ending = ending_of(name)
        if ending is None:
            raise InputError(
                f"{sequence}: expected a file that ends in {', '.join(ENDINGS)}, found another; convert it"
            )
        if not 0 < len(content) <= MAX_FILE_BYTES:
            raise InputError(
                f"{sequence}: expected a file of at most {MAX_FILE_BYTES >> 20} MiB, found {len(content)} bytes"
            )
        named[sequence] = f"{code}-{_SUFFIX[sequence]}{ending}"
    folder = work / "uploads" / code
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise SettingsError(f"upload: expected a new code, found {code} in use; choose another") from error
    paths = {sequence: folder / name for sequence, name in named.items()}
    for sequence, path in paths.items():
        path.write_bytes(files[sequence][1])
    return paths
