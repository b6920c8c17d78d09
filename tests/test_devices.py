"""Devices and precision: reduced precision only where it is sound."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fediod_med.devices import SMALLEST_REDUCED, autocast, autocast_dtype, autocast_over, pick_device, private_precision
from fediod_med.errors import SettingsError
from fediod_med.networks import STUDENT, build_segmenter

CPU = torch.device("cpu")


def reduced(edge: int, *, enabled: bool = True) -> bool:
    with autocast_over(CPU, (64, edge, 64), enabled=enabled):
        return torch.is_autocast_enabled("cpu")


def test_small_volumes_are_trained_in_full_precision() -> None:
    assert not reduced(SMALLEST_REDUCED - 1)
    assert reduced(SMALLEST_REDUCED) == (autocast_dtype(CPU) is not None)
    assert not reduced(SMALLEST_REDUCED, enabled=False)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_gpu_without_bfloat16_segments_in_float16_and_trains_in_float32(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    """Nothing here scales a loss, and float16 loses gradients below 6e-8."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    gpu = torch.device("cuda")
    assert autocast_dtype(gpu) is (torch.bfloat16 if has_bf16 else torch.float16)
    assert not isinstance(autocast(gpu), contextlib.nullcontext)
    assert isinstance(autocast_over(gpu, (96, 96, 96)), contextlib.nullcontext) == (not has_bf16)
    assert isinstance(autocast_over(gpu, (16, 16, 16)), contextlib.nullcontext)
    assert private_precision(gpu) == ("bfloat16" if has_bf16 else "float32")


def test_training_on_tiny_volumes_leaves_finite_weights() -> None:
    """In bfloat16, the deepest levels of a crop of 16 voxels gave gradients that were not finite."""
    torch.manual_seed(0)
    network = build_segmenter(**STUDENT)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(3):
        x = torch.randn(2, 4, 16, 16, 16)
        with autocast_over(x.device, x.shape[2:]):
            loss = network(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(SettingsError, match="device"):
        pick_device("quantum")
