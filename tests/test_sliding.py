"""Windows over a volume: positions, blending, empty space, and what happens when memory runs out."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from torch import nn

from fediod_med.devices import autocast
from fediod_med.errors import FediodError, SettingsError
from fediod_med.networks import build_segmenter
from fediod_med.sliding import SlidingInferer, Window, sliding_logits, with_less_memory

CPU = torch.device("cpu")


class Local(nn.Module):
    """Logits that depend on the voxel alone, so that windows cannot change them; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return torch.cat([x[:, :3] * 2, x[:, :1] - 1], dim=1)


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16, 16), (20, 33, 17), (5, 40, 16), (9, 9, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_local_network_gives_the_same_with_and_without_windows(shape, batch):
    image = noise(4, *shape)
    network = Local()
    found = sliding_logits(image, network, Window(16, 0.25, batch), device=CPU)
    assert found.dtype == torch.float32
    assert torch.allclose(found, network(image[None])[0], atol=1e-5)
    assert all(size[2:] == (16, 16, 16) and size[0] <= batch for size in network.seen[:-1])


def test_it_equals_monai_for_a_network_that_looks_around():
    torch.manual_seed(0)
    network = build_segmenter(backbone="unet", width=4, depth=2, in_channels=4, out_channels=4).eval()
    image = noise(4, 24, 40, 16)
    monai = SlidingWindowInferer(roi_size=(16,) * 3, sw_batch_size=1, overlap=0.5, mode="gaussian")
    with torch.inference_mode(), autocast(CPU):
        expected = monai(image[None], network)[0].float()
    with torch.inference_mode():
        found = sliding_logits(image, network, Window(16, 0.5), device=CPU)
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))
    assert float((found - expected).abs().mean()) < 2e-3 * float(expected.abs().max())


def test_windows_without_brain_are_not_computed_and_are_background():
    image = torch.zeros(4, 48, 16, 16)
    image[:, :10] = noise(4, 10, 16, 16)
    network = Local()
    found = sliding_logits(image, network, Window(16, 0.0), device=CPU)
    assert len(network.seen) == 1
    probabilities = torch.softmax(found, dim=0)
    assert torch.equal(probabilities[0, 16:], torch.ones(32, 16, 16))
    assert torch.allclose(found[:, :16], network(image[None, :, :16])[0], atol=1e-5)


def test_a_volume_of_zeros_is_all_background():
    network = Local()
    found = sliding_logits(torch.zeros(4, 20, 20, 20), network, Window(16), device=CPU)
    assert network.seen == []
    assert torch.equal(found.argmax(dim=0), torch.zeros(20, 20, 20, dtype=torch.long))


def test_the_inferer_gives_what_the_function_gives():
    image = noise(2, 4, 20, 20, 20)
    network = Local()
    window = Window(16, 0.25)
    batch = SlidingInferer(window)(image, network)
    assert batch.shape == (2, 4, 20, 20, 20)
    assert torch.equal(batch[1], sliding_logits(image[1], network, window, device=CPU))


def test_the_inferer_keeps_the_geometry_of_a_batch():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    batch = list_data_collate([MetaTensor(noise(4, 16, 16, 16), affine=affine)])
    found = SlidingInferer(Window(16))(batch, Local())
    assert isinstance(found, MetaTensor)
    (one,) = decollate_batch(found)
    assert torch.equal(one.affine, affine)


@pytest.mark.parametrize("settings", [{"roi": 4}, {"overlap": 1.0}, {"overlap": -0.1}, {"batch": 0}])
def test_impossible_windows_are_refused(settings):
    with pytest.raises(SettingsError, match="sliding window"):
        Window(**{"roi": 16, **settings})


def failing(limit: int, where: str = "cpu", error: type[BaseException] = MemoryError):
    """A computation that fits only with windows up to `limit` on `where`."""
    tried: list[tuple[int, int, str]] = []

    def run(window: Window, device: torch.device) -> torch.Tensor:
        tried.append((window.roi, window.batch, device.type))
        if window.roi > limit or window.batch > 1 or device.type != where:
            raise error("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
        return torch.tensor(float(window.roi))

    return run, tried


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_without_memory_the_windows_get_smaller_and_the_record_says_so(error):
    run, tried = failing(40, error=error)
    result, notes = with_less_memory(run, Window(96, 0.25, 4), CPU)
    assert float(result) == 32
    assert tried == [(96, 4, "cpu"), (96, 1, "cpu"), (48, 1, "cpu"), (32, 1, "cpu")]
    assert len(notes) == 3
    assert "out of memory on cpu with 4 window(s) of 96; went on on cpu with 1 of 96" in notes[0]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "std::bad_alloc",
        "could not create a primitive",
    ],
)
def test_every_library_has_its_own_words_for_it(words):
    def run(window: Window, device: torch.device) -> torch.Tensor:
        if window.roi > 32:
            raise RuntimeError(words)
        return torch.zeros(())

    assert len(with_less_memory(run, Window(64), CPU)[1]) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the address space of a process is limited on Linux only")
def test_a_process_that_really_has_no_memory_goes_on_with_smaller_windows():
    code = """
import resource, torch
from fediod_med.networks import build_segmenter
from fediod_med.sliding import Window, sliding_logits, with_less_memory
torch.set_num_threads(1)
network = build_segmenter(backbone="unet", width=16, depth=4, in_channels=4, out_channels=4).eval()
image = torch.randn(4, 128, 128, 128)
def run(window, device):
    with torch.inference_mode():
        return sliding_logits(image, network, window, device=device)
run(Window(32), torch.device("cpu"))  # libraries load and threads start before the limit
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
logits, notes = with_less_memory(run, Window(128, 0.25, 2), torch.device("cpu"))
print(tuple(logits.shape), bool(logits.isfinite().all()), len(notes) > 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(4, 128, 128, 128) True True"


def test_with_memory_there_is_nothing_to_tell():
    run, tried = failing(128)
    assert with_less_memory(run, Window(64), CPU)[1] == ()
    assert tried == [(64, 1, "cpu")]


def test_after_the_accelerator_comes_the_cpu():
    run, tried = failing(200)
    _, notes = with_less_memory(run, Window(64), torch.device("meta"))
    assert tried == [(64, 1, "meta"), (32, 1, "meta"), (64, 1, "cpu")]
    assert "went on on cpu" in notes[-1]


def test_when_nothing_fits_it_says_what_to_do():
    run, _ = failing(1)
    with pytest.raises(FediodError, match="--fast"):
        with_less_memory(run, Window(64), CPU)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def run(window, device):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        with_less_memory(run, Window(64), CPU)


def test_memory_of_the_result_does_not_depend_on_the_number_of_windows():
    image = noise(4, 64, 16, 16)
    few = sliding_logits(image, Local(), Window(16, 0.0), device=CPU)
    many = sliding_logits(image, Local(), Window(16, 0.75), device=CPU)
    assert few.shape == many.shape
    assert np.allclose(few.numpy(), many.numpy(), atol=1e-4)
