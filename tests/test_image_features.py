"""Features of the public prior's deepest layer: what they see, what they leave out, and what cannot be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fediod_med.errors import InputError, SettingsError
from fediod_med.image_features import Features, bottleneck_features
from fediod_med.networks import STUDENT, build_segmenter

CPU = torch.device("cpu")


def head(*, edge: int = 32, seed: int = 0) -> torch.Tensor:
    """Noise inside a ball, 0 outside."""
    at = torch.stack(torch.meshgrid(*[torch.arange(edge) - edge / 2 + 0.5] * 3, indexing="ij"))
    inside = at.norm(dim=0) < 0.55 * edge
    return torch.randn(4, edge, edge, edge, generator=torch.Generator().manual_seed(seed)) * inside


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_segmenter(**STUDENT).eval()


def test_the_features_are_what_the_network_itself_computes_at_its_bottom(network: torch.nn.Module) -> None:
    """A second route: a hook on the only module that gives 128 channels, in a whole forward pass."""
    seen: list[torch.Tensor] = []
    body: Any = network.model
    deepest = body[1].submodule[1].submodule[1].submodule
    handle = deepest.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(1, 4, 16, 16, 16)  # brain everywhere: the mean over the brain is the mean
    with torch.no_grad():
        network(x)
    handle.remove()
    found = bottleneck_features(network, [x[0]], device=CPU)
    assert seen[0].shape == (1, 128, 2, 2, 2)
    assert np.allclose(found.volumes, seen[0].mean(dim=(2, 3, 4)), atol=1e-6)
    assert np.allclose(found.patches, found.volumes, atol=1e-6)  # one patch of 2 x 2 x 2 cells


def test_shapes_and_owners(network: torch.nn.Module) -> None:
    found = bottleneck_features(network, (head(seed=seed) for seed in range(3)), device=CPU)
    assert found.volumes.shape == (3, 128) and found.patches.shape[1] == 128
    assert found.owners.tolist() == sorted(found.owners.tolist()) and set(found.owners) == {0, 1, 2}
    assert len(found.patches) == len(found.owners) == 3 * 8  # 4 cells an edge, 2 a patch: each octant holds brain
    again = bottleneck_features(network, [head(seed=1)], device=CPU)
    assert np.allclose(again.volumes[0], found.volumes[1], atol=1e-6)


def test_patches_outside_the_brain_do_not_count(network: torch.nn.Module) -> None:
    half = head(edge=64)
    half[:, 32:] = 0
    whole, left = (bottleneck_features(network, [v], device=CPU) for v in (head(edge=64), half))
    assert 0 < len(left.patches) <= 0.5 * len(whole.patches)


def test_volumes_that_look_alike_are_near(network: torch.nn.Module) -> None:
    a, b = head(seed=0), head(seed=1)
    brighter = torch.where(a != 0, a + 1, a)
    near, new, shifted = bottleneck_features(network, [a + 0.01 * b, b, brighter], device=CPU).volumes
    origin = bottleneck_features(network, [a], device=CPU).volumes[0]
    assert np.linalg.norm(near - origin) < 0.2 * np.linalg.norm(shifted - origin)
    assert np.linalg.norm(near - origin) < np.linalg.norm(new - origin)


def test_what_cannot_be_looked_at_is_said(network: torch.nn.Module) -> None:
    with pytest.raises(InputError, match="zeros only"):
        bottleneck_features(network, [head(), torch.zeros(4, 16, 16, 16)], device=CPU)
    with pytest.raises(InputError, match="at least one volume"):
        bottleneck_features(network, [], device=CPU)
    with pytest.raises(SettingsError, match="expected a unet, found SegResNet"):
        bottleneck_features(build_segmenter("segresnet"), [head()], device=CPU)


def test_standardised_features_by_hand() -> None:
    """Mean 2, deviation 1 in the first channel; the second does not vary and is only centred."""
    by = Features(np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[0.0, 0.0], [4.0, 0.0]]), np.array([0, 1]))
    found = Features(np.array([[4.0, 6.0]]), np.array([[6.0, 1.0]]), np.array([0])).standardised(by)
    assert found.volumes.tolist() == [[2.0, 1.0]] and found.patches.tolist() == [[2.0, 1.0]]
    own = by.standardised(by)
    assert own.volumes.mean(axis=0) == pytest.approx([0, 0]) and own.volumes.std(axis=0) == pytest.approx([1, 0])


def test_a_part_keeps_the_patches_of_its_volumes() -> None:
    whole = Features(np.arange(6.0).reshape(3, 2), np.arange(10.0).reshape(5, 2), np.array([0, 1, 1, 2, 2]))
    part = whole.part(1, 3)
    assert part.volumes.tolist() == [[2, 3], [4, 5]] and part.owners.tolist() == [0, 0, 1, 1]
    assert part.patches.tolist() == whole.patches[1:].tolist()
    assert whole.part(0, 1).patches.tolist() == [[0, 1]]
