"""What passes between the centre and a hospital, and how it is written down.

A message is a flat safetensors file: float tensors as fp16 with one fp32 scale each, integers as they are, and a JSON
header of plain values; `compact` makes probabilities and gradients smaller (`encodings`) and deflates the whole.
Nothing in it can execute. Both ends check names, dtypes, sizes and finiteness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fediod_med.encodings import (
    COMPACT,
    FP16,
    check_encoding,
    deflate,
    inflate,
    quantise_probabilities,
    restore_probabilities,
    to_float8,
)
from fediod_med.errors import ProtocolError

Setting = str | int | float | bool
_HEADER = "fediod_message"
_SCALE = "/scale"
_BOX, _SHAPE = "/box", "/shape"
_PROBABILITIES = "probs"
_GRADIENT = "gradient"  # in the names of tensors that may be rounded to float8

QUERY_KINDS: Mapping[str, frozenset[str]] = {
    "describe": frozenset(),
    "answer": frozenset({"x"}),
    "pull_back": frozenset({"logit_gradient"}),
}
"""Tensor names a query of each kind carries."""

REPLY_FIELDS: Mapping[str, frozenset[str]] = {
    "describe": frozenset({"class_counts"}),
    "answer": frozenset({"probs", "realism", "x_gradient"}),
    "pull_back": frozenset({"x_gradient"}),
}
"""Everything that may leave a hospital, by kind of query."""

ADVERSARIAL_FIELDS = frozenset({"realism", "x_gradient"})
"""Fields of an `answer` that come together, and only when its discriminator was asked."""


@dataclass(frozen=True)
class Query:
    """What leaves the centre.

    Attributes:
        kind: `describe` (class counts, once), `answer` (synthetic volumes to predictions, realism and the
            discriminator's gradient) or `pull_back` (d loss / d logits to d loss / d x).
        run_id: the run; a site keeps its state per run.
        round: from 1.
        tensors: by name, as listed in `QUERY_KINDS`.
        settings: plain values (`adversarial`, `snapshot`, ...).
    """

    kind: str
    run_id: str
    round: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """Everything that leaves a hospital; constructed in `federation/node.py` alone."""

    kind: str
    site: str
    round: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class SiteFailure:
    """A hospital did not answer; the reason names no patient and no path."""

    site: str
    round: int
    reason: str


class Federation(Protocol):
    """The hospitals as the centre sees them."""

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the hospitals, in a fixed order."""

    def ask(self, queries: Mapping[str, Query], *, quorum: int, timeout_s: float) -> dict[str, Reply | SiteFailure]:
        """Send one query per named site; one reply or failure per site comes back, in the same order.

        Args:
            queries: by site name; a broadcast is `dict.fromkeys(site_names, query)`.
            quorum: good replies after which an engine may stop waiting for the rest.
            timeout_s: seconds after which a site counts as failed.
        """


def pack(message: Query | Reply, *, encoding: str = FP16) -> bytes:
    """Serialise a message.

    Float tensors are divided by their largest magnitude and stored as fp16 with that fp32 scale beside them, so that
    gradients of any size keep fp16's relative precision (2**-11, down to 2**-14 of the largest value; absolute below).
    Integer and bool tensors are stored unchanged. With `compact`, probabilities are 8-bit inside the box where a class
    but the first is left, gradients are float8, and the file is deflated.

    Raises:
        ProtocolError: unknown kind or encoding, undeclared or missing tensor, complex numbers, or a value that is not
            finite.
    """
    _check(message)
    compact = check_encoding(encoding) == COMPACT
    tensors: dict[str, Tensor] = {}
    for name, tensor in message.tensors.items():
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
            peak = tensor.abs().max() if tensor.numel() else tensor.new_zeros(())
            if not torch.isfinite(peak):
                raise ProtocolError(f"{message.kind}: expected finite values in {name!r}, found NaN or Inf")
            if compact and name == _PROBABILITIES:
                tensors |= {name + part: made for part, made in quantise_probabilities(tensor).items()}
                continue
            if compact and _GRADIENT in name:
                tensors[name], tensors[name + _SCALE] = to_float8(tensor)
                continue
            scale = torch.where(peak > 0, peak, torch.ones(()))
            tensors[name] = (tensor / scale).half().contiguous()
            tensors[name + _SCALE] = scale
        elif tensor.is_complex():
            raise ProtocolError(f"{message.kind}: expected real numbers in {name!r}, found {tensor.dtype}")
        else:
            tensors[name] = tensor.contiguous()
    header: dict[str, object] = {"kind": message.kind, "round": message.round}
    if isinstance(message, Query):
        header |= {"type": "query", "run_id": message.run_id, "settings": dict(message.settings)}
    else:
        header |= {"type": "reply", "site": message.site}
    data = save(tensors, metadata={_HEADER: json.dumps(header, sort_keys=True)})
    return deflate(data) if compact else data


def unpack(data: bytes) -> Query | Reply:
    """Read a message in any encoding; the inverse of `pack` up to rounding of float tensors (returned as float32).

    Raises:
        ProtocolError: not a message, or one that `pack` would have refused.
    """
    data = inflate(data)
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEADER])
        message = _from_header(header)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ProtocolError(f"message: expected a fediod message, found {len(data)} bytes that are none") from error
    kind = message.kind
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_SCALE)}
    restored: dict[str, Tensor] = {}
    if _PROBABILITIES + _BOX in tensors:
        parts = {part: tensors.pop(_PROBABILITIES + part, torch.zeros(0)) for part in ("", _BOX, _SHAPE)}
        restored[_PROBABILITIES] = restore_probabilities(parts)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 or (tensor.dtype == torch.float8_e4m3fn and _GRADIENT in name):
            scale = scales.pop(name + _SCALE, None)
            if scale is None or scale.shape != () or scale.dtype != torch.float32:
                raise ProtocolError(f"{kind}: expected a scale beside {name!r}, found none")
            tensor = tensor.float() * scale
            if not torch.isfinite(tensor).all():
                raise ProtocolError(f"{kind}: expected finite values in {name!r}, found NaN or Inf")
        elif tensor.is_floating_point() or tensor.is_complex():
            raise ProtocolError(
                f"{kind}: expected fp16, or float8 for gradients, or integers in {name!r}, found {tensor.dtype}"
            )
        restored[name] = tensor
    if scales:
        raise ProtocolError(f"{kind}: undeclared tensors {sorted(scales)}")
    message = replace(message, tensors=restored)
    _check(message)
    return message


def _from_header(header: Mapping[str, Any]) -> Query | Reply:
    """The message without its tensors; any of the usual errors when the header is not one of ours."""
    kind, number = str(header["kind"]), int(header["round"])
    if header["type"] == "query":
        return Query(kind, str(header["run_id"]), number, settings=dict(header["settings"]))
    if header["type"] == "reply":
        return Reply(kind, str(header["site"]), number, {})
    raise ValueError(header["type"])


def _check(message: Query | Reply) -> None:
    table = QUERY_KINDS if isinstance(message, Query) else REPLY_FIELDS
    if message.kind not in table:
        raise ProtocolError(f"message: expected kind {', '.join(table)}, found {message.kind!r}")
    undeclared = set(message.tensors) - table[message.kind]
    if undeclared:
        raise ProtocolError(f"{message.kind}: undeclared tensors {sorted(undeclared)}")
    found, expected = set(message.tensors), set(table[message.kind])
    if isinstance(message, Reply) and message.kind == "answer" and not found & ADVERSARIAL_FIELDS:
        expected -= ADVERSARIAL_FIELDS
    if found != expected:
        raise ProtocolError(f"{message.kind}: expected {sorted(expected)}, found {sorted(found)}")
    if isinstance(message, Query) and any(not isinstance(v, Setting) for v in message.settings.values()):
        raise ProtocolError(f"{message.kind}: settings are plain values, found {dict(message.settings)}")
