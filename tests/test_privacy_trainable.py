from __future__ import annotations

import pytest
import torch
from torch import nn

from fediod_med.errors import PrivacyError
from fediod_med.networks import PatchDiscriminator, build_segmenter
from fediod_med.privacy.trainable import check_private_network, select_trainable, trainable_parameters

BACKBONES = (("unet", 16), ("segresnet", 8), ("dynunet", 16))


@pytest.mark.parametrize(("backbone", "width"), BACKBONES)
def test_own_networks_are_accepted(backbone, width):
    check_private_network(build_segmenter(backbone, width=width))


@pytest.mark.parametrize("norm", ["INSTANCE", "GROUP"])
def test_own_discriminators_are_accepted(norm):
    check_private_network(PatchDiscriminator(norm=norm))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.InstanceNorm3d(2, track_running_stats=True)],
)
def test_layers_that_mix_or_remember_patients_are_refused_by_name(layer):
    with pytest.raises(PrivacyError, match=rf"body\.1.*{type(layer).__name__}"):
        check_private_network(nn.ModuleDict({"body": nn.Sequential(nn.Conv3d(1, 2, 1), layer)}))


def test_instance_norm_without_memory_is_accepted():
    check_private_network(nn.Sequential(nn.InstanceNorm3d(2, affine=True), nn.GroupNorm(1, 2), nn.LayerNorm(2)))


@pytest.mark.parametrize(("backbone", "width"), BACKBONES)
def test_choices_are_nested_and_counted(backbone, width):
    network = build_segmenter(backbone, width=width)
    chosen = {}
    for which in ("head", "decoder", "all"):
        count = select_trainable(network, which)
        chosen[which] = {name for name, p in network.named_parameters() if p.requires_grad}
        assert count == sum(p.numel() for p in trainable_parameters(network)) > 0
    assert chosen["head"] < chosen["decoder"] < chosen["all"]
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("backbone", "width"), BACKBONES)
@pytest.mark.parametrize("depth", [3, 4])
def test_the_ends_are_the_outermost_blocks(backbone, width, depth):
    """Every chosen weight acts on a map of the scan's own size or half of it; the last block is among them."""
    network = build_segmenter(backbone, width=width, depth=depth)
    count = select_trainable(network, "ends")
    chosen = {name for name, p in network.named_parameters() if p.requires_grad}
    assert 0 < count < 0.1 * sum(p.numel() for p in network.parameters())
    edges = {}

    def note(name):
        def hook(module, inputs, output):
            edges[name] = max(inputs[0].shape[2], output.shape[2])

        return hook

    for name, module in network.named_modules():
        if any(f"{name}.{p}" in chosen for p, _ in module.named_parameters(recurse=False)):
            module.register_forward_hook(note(name))
    network(torch.zeros(1, 4, 32, 32, 32))
    assert 32 in edges.values() and set(edges.values()) <= {32, 16}
    select_trainable(network, "head")
    assert {name for name, p in network.named_parameters() if p.requires_grad} <= chosen


@pytest.mark.parametrize(("backbone", "width"), BACKBONES)
def test_the_decoder_is_what_comes_after_the_deepest_layer(backbone, width):
    """An encoder's parameter changes every decoder activation; a decoder's leaves the deepest features alone."""
    network = build_segmenter(backbone, width=width)
    deepest = {
        "unet": "model.1.submodule.1.submodule.1.submodule",
        "segresnet": "down_layers.3",
        "dynunet": "bottleneck",
    }[backbone]
    seen = []
    network.get_submodule(deepest).register_forward_hook(lambda *args: seen.append(args[2]))
    select_trainable(network, "decoder")
    logits = network(torch.randn(1, 4, 16, 16, 16))
    assert not seen[0].requires_grad
    logits.sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(network))


@pytest.mark.parametrize(("backbone", "width"), BACKBONES[:2])
def test_norms_are_the_head_and_every_vector(backbone, width):
    network = build_segmenter(backbone, width=width)
    select_trainable(network, "head")
    head = {name for name, p in network.named_parameters() if p.requires_grad}
    select_trainable(network, "norms")
    for name, p in network.named_parameters():
        assert p.requires_grad == (name in head or p.dim() == 1)


@pytest.mark.parametrize(
    ("network", "which", "message"),
    [
        (build_segmenter("dynunet"), "norms", "use head or decoder"),
        (PatchDiscriminator(), "head", "found a PatchDiscriminator; use all"),
        (build_segmenter("unet"), "adapters", "expected all, decoder, ends, norms, head"),
    ],
)
def test_what_cannot_be_chosen_is_refused(network, which, message):
    with pytest.raises(PrivacyError, match=message):
        select_trainable(network, which)


def test_a_frozen_network_cannot_be_trained():
    with pytest.raises(PrivacyError, match="frozen"):
        trainable_parameters(nn.Conv3d(1, 1, 1).requires_grad_(False))
