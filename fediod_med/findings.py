"""What is wrong, odd or private about an input: coded findings with a fix, for people and for programs.

Codes begin with their severity: E error (no output is made), W warning (output is made, `--strict` turns it into an
error), P privacy (the file names or may name the patient), N note. Numbers are stable: they are never reused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, field_validator

from fediod_med.errors import InputError
from fediod_med.resources import NOT_FOR_CLINICAL_USE


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    WARNING = "warning"
    PRIVACY = "privacy"
    NOTE = "note"


_BY_LETTER: Mapping[str, Severity] = {
    "E": Severity.ERROR,
    "W": Severity.WARNING,
    "P": Severity.PRIVACY,
    "N": Severity.NOTE,
}


@dataclass(frozen=True)
class Code:
    """One kind of finding: its stable code, what it means in a few words, and what to do about it."""

    code: str
    title: str
    fix: str


class Finding(BaseModel):
    """One thing found about one input.

    Attributes:
        code: a key of `CATALOGUE`.
        severity: by the code's letter.
        case: id of the case.
        where: file, series or pair of files, without identifying header values.
        message: what was expected and what was found.
        value: the number or text behind it (mm, share, count), or none; a number that is not finite becomes its name,
            since JSON has none for it.
        fix: what to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    severity: Severity
    case: str
    where: str
    message: str
    value: float | int | str | None = None
    fix: str

    @field_validator("value")
    @classmethod
    def _as_json_has_it(cls, value: float | int | str | None) -> float | int | str | None:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value


CATALOGUE: Mapping[str, Code] = {
    code.code: code
    for code in (
        Code("E101", "truncated or damaged file", "copy the file again from its source"),
        Code("E102", "name and content do not fit", "rename the file by what it holds, or export it again"),
        Code("E103", "empty file", "copy the file again from its source"),
        Code("E104", "not a scan that can be read", "give NIfTI, NRRD, MetaImage or DICOM"),
        Code("E105", "file missing or not readable", "check the path and the access rights"),
        Code("E106", "header of a .hdr/.img pair", "convert the pair to one .nii.gz"),
        Code("E107", "data lie in another file", "put header and data side by side, or export one file"),
        Code("E110", "NaN or infinite values", "set them to 0 if they are background, else export the scan again"),
        Code("E111", "4-D file", "give one 3-D file per sequence"),
        Code("E112", "not a volume", "give a 3-D scan, not a single slice"),
        Code("E113", "colour or complex values", "convert the file to one real number per voxel"),
        Code("E120", "no position and orientation", "convert the scan again from its source: sides cannot be told"),
        Code("W121", "sform and qform differ", "check the conversion; the sform is used"),
        Code("E121", "unusable geometry", "correct the header, or convert the scan again"),
        Code("E122", "sheared grid", "resample the scan to a rectangular grid"),
        Code("E123", "unit other than millimetre", "correct the unit in the header"),
        Code("E130", "slices missing from a DICOM series", "export the whole series again"),
        Code("E131", "DICOM series of several grids or several images per position", "export one stack per series"),
        Code("E132", "DICOM slices without position or orientation", "export the original images, not screenshots"),
        Code(
            "E133",
            "sequence not recognised in a DICOM study",
            "name the series of each sequence: its folder, its number or its series UID",
        ),
        Code(
            "E134",
            "pixel data that cannot be decoded",
            "convert the files to an uncompressed transfer syntax, for example with gdcmconv --raw",
        ),
        Code("E135", "several patients or studies in one folder", "give each study its own folder"),
        Code("W135", "an unused series of another patient or study", "check that the folder is the right patient's"),
        Code("W136", "several series fit one sequence", "name the series to use if another one was meant"),
        Code("W137", "the same DICOM slice more than once", "nothing to do; the copies are not used"),
        Code("W138", "a DICOM series may be incomplete", "compare the number of slices with the archive"),
        Code("N139", "DICOM objects that were passed over", "nothing to do"),
        Code("E140", "sequence missing or doubled", "name the four files by --t1c, --t1, --t2, --flair or in a table"),
        Code("E141", "two sequences are one scan", "give a different scan for each sequence"),
        Code("W142", "sequences look swapped", "compare the pictures with the names of the sequences"),
        Code("E150", "sequences on different grids", "co-register first, or add --coregister"),
        Code("W151", "sequences look out of register", "look at them on top of one another, or add --coregister"),
        Code(
            "E152",
            "sequences could not be registered to each other",
            "check that all four files are of one head and one session, register them with another tool, or leave "
            "co-registration out if they already match",
        ),
        Code("W153", "registration moved a sequence far", "look at the preview before using the result"),
        Code(
            "W154",
            "a sequence covers only part of the head",
            "do not trust the result outside its field of view, or give a scan of the whole head",
        ),
        Code("N155", "what registration did", "nothing to do"),
        Code(
            "W156",
            "series that do not share a frame of reference",
            "look at the preview, or use --coregister: the patient may have moved between them",
        ),
        Code(
            "P201",
            "the patient's identity in DICOM headers",
            "de-identify the study first if it is to leave the hospital; a DICOM SEG carries the same patient data",
        ),
        Code("N156", "sequences on different grids, to be registered", "nothing to do"),
        Code("W160", "not skull-stripped", "strip the skull first; see docs/skull_stripping.md"),
        Code("E161", "constant image", "export the sequence again"),
        Code("W162", "hardly any brain", "check that this is a whole head"),
        Code("W170", "voxels far from 1 mm isotropic", "expect coarser borders than on 1 mm scans"),
        Code("N171", "size other than that of BraTS", "nothing to do: any size is segmented"),
        Code("N172", "orientation other than RAS or LPS", "nothing to do: the label map keeps it"),
        Code("W173", "negative or odd intensities", "give intensities as scanned, zero outside the brain"),
        Code("N180", "large scan", "expect the stated memory"),
        Code("E190", "label values outside the scheme", "declare the scheme that the file uses"),
        Code("E191", "label map on another grid", "resample it to the grid of the scan, by nearest neighbour"),
        Code("E193", "no label map", "add <id>_seg.nii.gz"),
        Code("P200", "text in the header that may name the patient", "remove it before the file leaves the hospital"),
    )
}


def finding(code: str, *, case: str, where: object, message: str, value: float | int | str | None = None) -> Finding:
    """A finding with severity and fix of its code; `KeyError` for a code outside the catalogue."""
    known = CATALOGUE[code]
    return Finding(
        code=code,
        severity=_BY_LETTER[code[0]],
        case=case,
        where=str(where),
        message=message,
        value=value,
        fix=known.fix,
    )


class RefusedInput(InputError):  # noqa: N818 (it is refused, the tool is not at fault)
    """An input with findings that forbid output; its message is one line for all of them."""

    def __init__(self, case: str, findings: Sequence[Finding]) -> None:
        """`findings` are those that forbid output, at least one."""
        self.findings = tuple(findings)
        first = findings[0]
        more = "".join(f"; {found.code} {found.where}: {found.message}" for found in findings[1:3])
        rest = f" (and {len(findings) - 3} more findings)" if len(findings) > 3 else ""
        super().__init__(f"{first.code} {first.where}: {first.message}; {first.fix}{more}{rest}")
        self.case = case


def fatal(findings: Iterable[Finding], *, strict: bool = False) -> list[Finding]:
    """The findings that forbid output: errors, and with `strict` warnings too."""
    refused = {Severity.ERROR, Severity.WARNING} if strict else {Severity.ERROR}
    return [found for found in findings if found.severity in refused]


def as_json(findings: Iterable[Finding]) -> str:
    """Findings as a JSON document with the notice, ordered as given."""
    rows = [found.model_dump(mode="json") for found in findings]
    return json.dumps({"notice": NOT_FOR_CLINICAL_USE, "findings": rows}, indent=2, allow_nan=False) + "\n"
