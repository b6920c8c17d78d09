"""Which device to compute on, and in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from fediod_med.errors import SettingsError

# Voxels. Below, reduced precision on a CPU was seen to leave NaN in the weights, and a GPU waits for launches anyway.
SMALLEST_REDUCED = 32


def pick_device(name: str = "auto") -> torch.device:
    """Device by name.

    Args:
        name: `auto` (CUDA, then Apple MPS, then CPU), or whatever `torch.device` takes: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        SettingsError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"device: expected auto, cpu, cuda, cuda:N or mps, found {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device: {name!r} asked for, but this machine offers {torch.cuda.device_count()} CUDA device(s); "
            "use --device auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError(f"device: {name!r} asked for, but this machine has none; use --device auto")
    return device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Reduced precision that pays on `device`: bfloat16, float16, or none where float32 is the faster choice.

    A CPU qualifies through its AVX512-BF16 (or AMX) instructions: without them bfloat16 is emulated and slower.
    """
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None


def private_precision(device: torch.device) -> str:
    """Precision of private steps: `bfloat16` where it pays, else `float32`.

    Never float16: it needs a loss scale, which would depend on the patients.
    """
    return "bfloat16" if autocast_dtype(device) is torch.bfloat16 else "float32"


def autocast(device: torch.device, *, enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Context for matrix products and convolutions in `autocast_dtype(device)`; does nothing where that is none."""
    dtype = autocast_dtype(device) if enabled else None
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def autocast_over(
    device: torch.device, size: Sequence[int], *, enabled: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """`autocast` where gradients flow, on volumes of `size` voxels; full precision for small ones.

    Never float16: without a loss scale its small gradients vanish, so older GPUs train in float32.
    """
    sound = min(size) >= SMALLEST_REDUCED and autocast_dtype(device) is not torch.float16
    return autocast(device, enabled=enabled and sound)


def _cpu_has_bf16() -> bool:
    # Private names: torch offers no public question for this; a build without them answers no and runs in float32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe)()) for probe in probes if hasattr(torch.cpu, probe))
