"""Recognises T1c, T1, T2 and FLAIR among the series of a study, from their headers, and says why.

Three kinds of evidence, each of which a reader can check: what the series is called (description, protocol, folder),
what its timing says (echo, repetition and inversion time in ms), and whether a contrast agent is stated. Evidence that
contradicts itself is never resolved by a guess: the series is listed and the user names the right one.

Timing limits are those of clinical brain protocols at 1.5 and 3 T: T1 has short echo and repetition times or an
inversion near 0.4 to 1.3 s, T2 a long echo, FLAIR a long echo and an inversion that nulls fluid, above 1.4 s (Hajnal
et al. 1992, J Comput Assist Tomogr 16(6)).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fediod_med.data.layouts import sequence_of
from fediod_med.dicom.headers import number, text, value
from fediod_med.dicom.series import DicomSeries
from fediod_med.findings import Finding, finding
from fediod_med.labels import SEQUENCES

OTHER = "other"
_OTHER_NAMES = re.compile(
    r"\b(loc(alizer|aliser)?|scout|survey|smartbrain|aahscout|3 ?plane|dwi|dti|ep2d\w*|diff\w*|e?adc|trace\w*|fa|"
    r"tensor|perf\w*|dsc|dce|r?cbf|r?cbv|mtt|ttp|tmax|asl|pcasl|bold|fmri|resting|swi|swan|swip|venbold|phase|pha|"
    r"min ?ip|mip|tof|mra|mrv|angio\w*|field ?map|b0|b1|cal(ibration)?|asset|shim|mrs|svs|csi|spectro\w*|"
    r"sub(traction)?|subtracted|stir|ciss|fiesta|trufi\w*|bffe|dir|psir|pd|proton|mt|gre|t2 ?\*|t2 ?star|t2star|medic|"
    r"hemo\w*|screen ?save|report|dose|spine|cervical|c spine|orbit\w*)\b"
)
_T1_FLAIR = re.compile(r"\bt1w? ?(flair|tirm)\b")
_FLAIR = re.compile(r"flair|dark ?fl|tirm|fluid ?att|\bda ?fl\b|\bt2f\b|\bfla\b")
_T2 = re.compile(r"\bt2[wn]?(tse|fse|space|cube|spc)?\b|\bt2 ")
_T1 = re.compile(r"\bt1|mp ?rage|\bmpr\b|\bbravo\b|\bf?spgr\b|\bvibe\b|\btfl\w*|\bt1 ?w")
_CONTRAST = re.compile(
    r"\bpost(?! ?op)|(?<!pre)\bpost ?(con|gad|gd)|\bgado?\w*\b|\bgd\b|\bt1w? ?(gd|gad|c|ce|km|post)\b|"
    r"(?<!no )(?<!non )(?<!without )\bce\b|\+ ?(c|gd|gad|km|contrast)\b|\bc ?\+|\bkm\b|\bwith (contrast|gad)|"
    r"contrast enh|(?<!un)(?<!non )enhanced\b|\bpost$"
)
_NATIVE = re.compile(
    r"\bpre(?! ?op)\b|\bnati[vf]e?\b|without|\bw ?o\b|\bno(n|t)? ?(contrast|con|gad|gd|enh|km|ce)|"
    r"unenhanced|\bt1n\b|\bplain\b|\bohne\b"
)
_NO_AGENT = frozenset({"", "no", "none", "n", "n a", "na", "0", "without", "no contrast", "non contrast", "unknown"})
# AcquisitionContrast (0008,9209) of enhanced MR images.
_ACQUISITION_CONTRAST = {"T1": "T1", "T2": "T2", "FLUID_ATTENUATED": "FLAIR", "MIXED": None, "UNKNOWN": None}


@dataclass(frozen=True)
class SequenceMatch:
    """One sequence recognised.

    Attributes:
        sequence: of `SEQUENCES`.
        series: the series taken for it.
        reason: the evidence, for people; holds no part of the patient's name or id.
    """

    sequence: str
    series: DicomSeries
    reason: str


@dataclass(frozen=True)
class Evidence:
    """What the headers of one series say about its sequence.

    Attributes:
        weighting: `T1`, `T2`, `FLAIR`, `other`, or none where nothing tells or the evidence contradicts itself.
        contrast: whether a contrast agent is stated; none where nothing is said.
        reason: the evidence in words.
        conflict: whether it contradicts itself.
    """

    weighting: str | None
    contrast: bool | None
    reason: str
    conflict: bool = False

    @property
    def sequence(self) -> str | None:
        """The sequence that is certain; a T1 of unknown contrast is none."""
        if self.weighting == "T1":
            return None if self.contrast is None else ("T1c" if self.contrast else "T1")
        return self.weighting if self.weighting in SEQUENCES else None


def evidence_of(series: DicomSeries) -> Evidence:
    """What the headers of a series say about its sequence."""
    header = series.headers[0]
    if (modality := str(value(header, "Modality") or "MR")) != "MR":
        return Evidence(OTHER, None, f"modality {modality}")
    name = _plain(text(header, "SeriesDescription", "ProtocolName"))
    described, contrast_named = _named(name)
    folder = sequence_of(series.folder.name)
    measured, timing = _measured(header)
    agent = _agent_stated(header)
    reasons = [f"named {series.description or name!r}" if described or contrast_named is not None else "", timing]
    if folder is not None:
        reasons.append(f"in folder {series.folder.name!r}")
    contrast = contrast_named
    if contrast is None and agent:
        contrast = True
        reasons.append("contrast agent stated")
    elif contrast is None and folder in ("T1c", "T1"):
        contrast = folder == "T1c"
    said = {"T1" if folder == "T1c" else folder} if folder is not None else set()
    said |= {described} if described is not None else set()
    reason = ", ".join(part for part in reasons if part) or "nothing in its headers tells"
    if len(said) > 1 or (folder in ("T1c", "T1") and contrast is not (folder == "T1c")):
        return Evidence(None, contrast, reason, conflict=True)
    named = next(iter(said), None)
    if named == OTHER or (named is None and measured == OTHER):
        return Evidence(OTHER, contrast, reason)
    if named is None or measured is None or named == measured or (named == "FLAIR" and measured == "T2"):
        # Some scanners state no inversion time: timing then takes a FLAIR for a T2.
        return Evidence(named or measured, contrast, reason)
    return Evidence(None, contrast, reason, conflict=True)


def recognise(series: Sequence[DicomSeries], *, case: str) -> tuple[tuple[SequenceMatch, ...], tuple[Finding, ...]]:
    """Match the four sequences to the series of a study.

    An original is preferred to a derived series and a usable one to a broken one. Of several, the only 3-D acquisition
    is taken, with a warning; otherwise nothing is, and the finding lists the candidates. A single T1 without a word
    about contrast is the native one when another series states contrast.

    Args:
        series: from `find_series`.
        case: id, for findings.

    Returns:
        One match per recognised sequence in the order of `SEQUENCES`, and E133 or W136 findings.
    """
    known = {one.uid: evidence_of(one) for one in series}
    candidates: dict[str, list[DicomSeries]] = {name: [] for name in SEQUENCES}
    for one in series:
        if (found := known[one.uid].sequence) is not None:
            candidates[found].append(one)
    silent = [one for one in series if known[one.uid].weighting == "T1" and known[one.uid].contrast is None]
    by_exclusion = bool(candidates["T1c"]) and not candidates["T1"]
    if by_exclusion:
        candidates["T1"] = silent
    matches: list[SequenceMatch] = []
    findings: list[Finding] = []
    for name in SEQUENCES:
        best = _best(candidates[name])
        several = len(best) > 1
        taken = best if not several else [one for one in best if _is_3d(one)]
        if len(taken) != 1:
            findings.append(_unmatched(name, best, series, silent, known, case))
            continue
        reason = known[taken[0].uid].reason
        if name == "T1" and by_exclusion:
            reason += ", no contrast stated while another T1 states it"
        if several:
            others = "; ".join(one.name for one in best if one is not taken[0])
            message = f"took {taken[0].name} for {name}, the only 3-D acquisition; also fitting: {others}"
            findings.append(finding("W136", case=case, where=taken[0].name, message=message, value=len(best)))
        matches.append(SequenceMatch(name, taken[0], reason))
    return tuple(matches), tuple(findings)


def doubts(matches: Iterable[SequenceMatch], *, case: str) -> Iterator[Finding]:
    """W142 for each series that a user chose although its headers say something else."""
    for match in matches:
        found = evidence_of(match.series)
        wanted = "T1" if match.sequence == "T1c" else match.sequence
        other = found.sequence or found.weighting
        if found.conflict or (found.weighting not in (None, wanted)) or found.sequence not in (None, match.sequence):
            message = f"expected {match.sequence} as chosen, its headers say {other or 'two things'}: {found.reason}"
            yield finding("W142", case=case, where=match.series.name, message=message, value=other)


def _unmatched(
    name: str,
    best: Sequence[DicomSeries],
    series: Sequence[DicomSeries],
    silent: Sequence[DicomSeries],
    known: Mapping[str, Evidence],
    case: str,
) -> Finding:
    """E133 with every candidate, or with every series where there is none."""
    if best:
        listed = "; ".join(f"{one.name}: {known[one.uid].reason}" for one in best)
        message = f"expected one series for {name}, found {len(best)}: {listed}"
    else:
        doubtful = [one for one in series if known[one.uid].conflict]
        hints = [*doubtful, *(one for one in silent if name in ("T1c", "T1"))]
        listed = "; ".join(f"{one.name}: {known[one.uid].reason}" for one in hints or series)
        what = "undecided" if hints else "series in the study"
        message = f"expected one series for {name}, found none; {what}: {listed or 'none'}"
    return finding("E133", case=case, where=name, message=message, value=len(best))


def _best(candidates: Sequence[DicomSeries]) -> list[DicomSeries]:
    """The candidates that are original images and whole stacks, as far as there are such."""
    best = list(candidates)
    for wanted in (_is_original, lambda one: one.usable):
        best = [one for one in best if wanted(one)] or best
    return best


def _is_original(series: DicomSeries) -> bool:
    kind = value(series.headers[0], "ImageType")
    words = [kind] if isinstance(kind, str) else [str(word) for word in kind or ()]
    return not words or (words[0] == "ORIGINAL" and not {"MPR", "REFORMATTED", "PROJECTION IMAGE"} & set(words))


def _is_3d(series: DicomSeries) -> bool:
    return str(value(series.headers[0], "MRAcquisitionType") or "") == "3D"


def _plain(words: str) -> str:
    """Lower case, with everything but letters, digits, plus and star as one space."""
    return re.sub(r"[^a-z0-9+*]+", " ", words.lower()).strip()


def _named(name: str) -> tuple[str | None, bool | None]:
    """Weighting and contrast that a plain name states."""
    native, enhanced = bool(_NATIVE.search(name)), bool(_CONTRAST.search(_NATIVE.sub(" ", name)))
    contrast = None if native == enhanced else enhanced
    if _OTHER_NAMES.search(name):
        return OTHER, contrast
    if _T1_FLAIR.search(name):
        return "T1", contrast
    if _FLAIR.search(name):
        return "FLAIR", contrast
    t1, t2 = bool(_T1.search(name)), bool(_T2.search(name))
    if t1 == t2:
        return None, contrast
    return ("T1" if t1 else "T2"), contrast


def _agent_stated(header: Any) -> bool:
    """Whether the header states a contrast agent."""
    if value(header, "ContrastBolusAgentSequence") is not None:
        return True
    return _plain(str(value(header, "ContrastBolusAgent") or "")) not in _NO_AGENT


def _measured(header: Any) -> tuple[str | None, str]:
    """Weighting from the timing of a sequence, and the timing in words."""
    stated = str(value(header, "AcquisitionContrast", group="MRImageFrameTypeSequence") or "")
    echo = number(header, "EffectiveEchoTime", group="MREchoSequence") or number(header, "EchoTime")
    repetition = number(header, "RepetitionTime", group="MRTimingAndRelatedParametersSequence")
    inversion = number(header, "InversionTimes", group="MRModifierSequence") or number(header, "InversionTime")
    shown = (("TE", echo), ("TR", repetition), ("TI", inversion))
    words = " ".join(f"{key} {time:.4g}" for key, time in shown if time)
    timing = f"{words} ms" if words else ""
    if stated:
        weighting = _ACQUISITION_CONTRAST.get(stated, OTHER)
        if weighting is not None:
            return weighting, f"acquisition contrast {stated}"
    return _weighting(header, echo, repetition, inversion), timing


def _weighting(header: Any, echo: float | None, repetition: float | None, inversion: float | None) -> str | None:
    """Weighting from echo, repetition and inversion time in ms; none where they do not tell."""
    kind = value(header, "ScanningSequence")
    techniques = {kind} if isinstance(kind, str) else {str(word) for word in kind or ()}
    if "EP" in techniques:
        return OTHER
    if not echo or not repetition:
        return None
    if inversion and inversion >= 1400 and echo >= 60:
        return "FLAIR"
    if inversion and 350 <= inversion <= 1300 and echo <= 35:
        return "T1"
    if inversion and inversion < 350 and repetition >= 1800:
        return OTHER  # fat suppressed by inversion (STIR)
    if not inversion and echo >= 60 and repetition >= 1800:
        return "T2"
    if echo <= 35 and repetition <= 1200:
        gradient_only = techniques == {"GR"}
        return OTHER if gradient_only and echo >= 12 else "T1"
    return OTHER if not inversion and echo <= 50 and repetition >= 1800 else None
