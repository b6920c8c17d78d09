"""How the tensors of a message are made small: 8-bit probabilities inside their box, 8-bit floats for gradients.

Both are functions of what was released already, so they cost no privacy. fp16 with a scale, the default, is written in
`protocol`; `compact` is here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from fediod_med.errors import ProtocolError

FP16, COMPACT = "fp16", "compact"
ENCODINGS = (FP16, COMPACT)
LEVELS = 255
FP8_PEAK = 448.0  # largest value of float8 e4m3fn (OCP 8-bit floating point specification 1.0, table 1)
MAX_ELEMENTS = 2**31  # of one tensor: what a message may make its reader allocate
MAX_BYTES = 2**33  # of one message after inflation
_DEFLATED = b"FEDIODZ1"


def check_encoding(name: object) -> str:
    """The name, if it is one of `ENCODINGS`; `ProtocolError` otherwise."""
    if name not in ENCODINGS:
        raise ProtocolError(f"encoding: expected {' or '.join(ENCODINGS)}, found {name!r}")
    return str(name)


def quantise_probabilities(probs: Tensor) -> dict[str, Tensor]:
    """Probabilities in 255 steps, without the first class and without the rim where only the first class is left.

    Args:
        probs: `(B, C, ...)`, non-negative, summing to 1 over dim 1.

    Returns:
        `""`: `(B, C - 1, ...)` uint8 inside the box; `/box`: `(axes, 2)` first and last-plus-one index of the region of
        interest along each spatial axis; `/shape`: of `probs`. An error of at most half a step per class (.002).
    """
    steps = (probs[:, 1:].float() * LEVELS).round().clamp(0, LEVELS).to(torch.uint8)
    seen = steps.amax(dim=(0, 1)) > 0 if probs.dim() > 2 else torch.ones(())
    box = torch.zeros((probs.dim() - 2, 2), dtype=torch.int64)
    for axis in range(probs.dim() - 2):
        others = tuple(other for other in range(seen.dim()) if other != axis)
        along = torch.nonzero(seen.any(dim=others) if others else seen).flatten()
        if len(along):
            box[axis, 0], box[axis, 1] = along[0], along[-1] + 1
    region = (slice(None), slice(None), *(slice(int(a), int(b)) for a, b in box))
    shape = torch.tensor(probs.shape, dtype=torch.int64)
    return {"": steps[region].contiguous(), "/box": box, "/shape": shape}


def restore_probabilities(parts: Mapping[str, Tensor]) -> Tensor:
    """Inverse of `quantise_probabilities` up to rounding: `(B, C, ...)` float32, summing to 1 over dim 1.

    Raises:
        ProtocolError: parts that do not fit together, or a tensor beyond `MAX_ELEMENTS`.
    """
    steps, box, shape = parts[""], parts["/box"], parts["/shape"]
    whole = [int(edge) for edge in shape.flatten().tolist()] if shape.dtype == torch.int64 else []
    if (
        steps.dtype != torch.uint8
        or len(whole) < 2
        or min(whole) < 1
        or math.prod(whole) > MAX_ELEMENTS
        or box.dtype != torch.int64
        or tuple(box.shape) != (len(whole) - 2, 2)
        or any(not 0 <= int(a) <= int(b) <= edge for (a, b), edge in zip(box, whole[2:], strict=True))
        or tuple(steps.shape) != (whole[0], whole[1] - 1, *(int(b - a) for a, b in box))
    ):
        raise ProtocolError(
            f"probabilities: expected 8-bit values inside a box of a whole, found {tuple(steps.shape)} {steps.dtype}, "
            f"box {box.tolist()}, whole {whole}"
        )
    probs = torch.zeros(whole)
    region = (slice(None), slice(1, None), *(slice(int(a), int(b)) for a, b in box))
    probs[region] = steps.float() / LEVELS
    probs[:, 0] = (1 - probs[:, 1:].sum(dim=1)).clamp_min(0)
    return probs / probs.sum(dim=1, keepdim=True)


def to_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """float8 e4m3fn of `values * 448 / peak`, and that scale `peak / 448` (fp32 scalar; 1 where all is zero).

    Relative error at most 2**-4 down to 2**-14 of the peak, absolute below.
    """
    peak = values.abs().max() if values.numel() else values.new_zeros(())
    scale = torch.where(peak > 0, peak / FP8_PEAK, torch.ones(()))
    return (values / scale).clamp(-FP8_PEAK, FP8_PEAK).to(torch.float8_e4m3fn).contiguous(), scale


def deflate(data: bytes) -> bytes:
    """The bytes compressed without loss (RFC 1950), marked so that `inflate` knows them."""
    return _DEFLATED + len(data).to_bytes(8, "little") + zlib.compress(data, level=6)


def inflate(data: bytes) -> bytes:
    """What `deflate` was given; other bytes unchanged.

    Raises:
        ProtocolError: damaged, or more than it announces or may hold.
    """
    if not data.startswith(_DEFLATED):
        return data
    size = int.from_bytes(data[8:16], "little")
    if size > MAX_BYTES:
        raise ProtocolError(f"message: expected at most {MAX_BYTES} bytes, found one that announces {size}")
    reader = zlib.decompressobj()
    try:
        inflated = reader.decompress(data[16:], size + 1)
    except zlib.error as error:
        raise ProtocolError(f"message: expected compressed data, found damaged ones ({error})") from error
    if len(inflated) != size or not reader.eof or reader.unused_data:
        raise ProtocolError(f"message: expected {size} bytes when inflated, found another number")
    return inflated
