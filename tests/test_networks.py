"""Networks: shapes, sizes, norms, and the generator that starts as the identity on its phantom."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fediod_med.errors import SettingsError
from fediod_med.networks import BACKBONES, Generator, PatchDiscriminator, build_segmenter, count_parameters, one_hot


def norm_names(network: nn.Module) -> set[str]:
    return {type(module).__name__ for module in network.modules() if "Norm" in type(module).__name__}


def labels(size: int = 16, batch: int = 2) -> Tensor:
    """One-hot tissues with a border of background."""
    tissues = torch.randint(1, 7, (batch, size, size, size), generator=torch.Generator().manual_seed(0))
    inner = torch.zeros_like(tissues)
    inner[:, 2:-2, 2:-2, 2:-2] = tissues[:, 2:-2, 2:-2, 2:-2]
    return one_hot(inner, 7)


def phantom(maps: Tensor) -> Tensor:
    values = torch.randn((len(maps), 4, *maps.shape[2:]), generator=torch.Generator().manual_seed(1))
    return values * (1 - maps[:, :1])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("width", "depth", "shape"), [(8, 3, (8, 12, 16)), (16, 4, (16, 8, 8))])
def test_segmenters_keep_the_grid(backbone: str, width: int, depth: int, shape: tuple[int, int, int]) -> None:
    network = build_segmenter(backbone, width=width, depth=depth)
    with torch.no_grad():
        logits = network.eval()(torch.randn(1, 4, *shape))
    assert logits.shape == (1, 4, *shape)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_segmenters_answer_each_volume_by_itself(backbone: str) -> None:
    """In training mode too: no statistic mixes the patients of a batch."""
    torch.manual_seed(0)
    network = build_segmenter(backbone, width=8, depth=3).train()
    x = torch.randn(2, 4, 8, 8, 8)
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-4)
    assert not any("Batch" in name for name in norm_names(network)) and norm_names(network)


@pytest.mark.parametrize("backbone", ["unet", "segresnet"])
def test_two_levels_suffice(backbone: str) -> None:
    assert build_segmenter(backbone, width=8, depth=2)(torch.zeros(1, 4, 6, 8, 10)).shape == (1, 4, 6, 8, 10)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_are_arguments(backbone: str) -> None:
    network = build_segmenter(backbone, width=8, depth=3, in_channels=2, out_channels=3)
    assert network(torch.zeros(1, 2, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"backbone": "vnet"}, "unet, segresnet, dynunet.*'vnet'"),
        ({"backbone": "unet", "depth": 1}, "depth"),
        ({"backbone": "unet", "width": 2}, "width"),
        ({"backbone": "segresnet", "width": 12}, "groups of 8"),
        ({"backbone": "dynunet", "depth": 2}, "depth >= 3"),
    ],
)
def test_networks_that_cannot_be_are_refused(arguments: dict, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        build_segmenter(**arguments)


def test_width_doubles_parameters_fourfold() -> None:
    narrow, wide = (count_parameters([build_segmenter("unet", width=w, depth=3)]) for w in (8, 16))
    assert 3.5 < wide / narrow < 4.1


def test_frozen_parameters_are_not_counted() -> None:
    network = build_segmenter("unet", width=4, depth=2)
    once = count_parameters([network])
    assert count_parameters([network, build_segmenter("unet", width=4, depth=2)]) == 2 * once
    assert count_parameters([network.requires_grad_(False)]) == 0


def test_an_untrained_generator_returns_the_phantom_exactly() -> None:
    maps = labels()
    base = phantom(maps)
    generator = Generator("conditional", size=16, width=4)
    assert torch.equal(generator(torch.randn(2, 32), maps, base, torch.randn(2, 1, 16, 16, 16)), base)


def test_a_trained_generator_leaves_the_background_at_zero() -> None:
    maps = labels()
    base = phantom(maps)
    generator = Generator("conditional", size=16, width=4)
    nn.init.normal_(generator.head.weight)
    nn.init.ones_(generator.head.bias)
    z, texture = torch.randn(2, 32), torch.randn(2, 1, 16, 16, 16)
    x = generator(z, maps, base, texture)
    outside = maps[:, :1].bool().expand_as(x)
    assert (x[outside] == 0).all()
    assert (x[~outside] != base[~outside]).float().mean() > 0.99
    for changed in (
        generator(-z, maps, base, texture),
        generator(z, maps, base, -texture),
        generator(z, maps, -base, texture),
    ):
        assert not torch.allclose(changed, x)


def test_a_generator_works_from_labels_and_noise_alone() -> None:
    generator = Generator("conditional", size=16, width=4)
    nn.init.normal_(generator.head.weight)
    x = generator(torch.randn(2, 32), labels())
    assert x.shape == (2, 4, 16, 16, 16) and x.std() > 0


def test_every_parameter_of_a_generator_learns_once_the_head_has_moved() -> None:
    for generator in (Generator("conditional", size=16, width=4), Generator("unconditional", size=16, width=4)):
        if generator.mode == "conditional":
            nn.init.normal_(generator.head.weight)
            x = generator(torch.randn(2, 32), labels(), phantom(labels()), torch.randn(2, 1, 16, 16, 16))
        else:
            x = generator(torch.randn(2, 32))
        (x * torch.randn_like(x)).sum().backward()
        silent = [
            name for name, p in generator.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()
        ]
        assert silent == []


def test_the_unconditional_generator_makes_bounded_volumes_from_noise() -> None:
    generator = Generator("unconditional", size=24, width=4)
    x = generator(torch.randn(3, 32))
    assert x.shape == (3, 4, 24, 24, 24)
    assert x.abs().max() < 3 and not torch.allclose(x[0], x[1])


def test_generators_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="conditional or unconditional"):
        Generator("diffusion", size=16)
    with pytest.raises(SettingsError, match="divisible by 8"):
        Generator("unconditional", size=20)
    with pytest.raises(SettingsError, match="label map"):
        Generator("conditional", size=16)(torch.randn(1, 32))


@pytest.mark.parametrize("norm", ["INSTANCE", "GROUP"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_discriminator_judges_patches_of_each_volume_by_itself(norm: str, layers: int) -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=4, layers=layers, norm=norm).train()
    x = torch.randn(2, 4, 32, 32, 32)
    logits = judge(x)
    assert logits.shape[:2] == (2, 1) and logits.dim() == 5
    assert torch.allclose(logits[:1], judge(x[:1]), atol=1e-4)
    assert norm_names(judge) <= {"InstanceNorm3d", "GroupNorm"} and norm_names(judge)


def test_batch_norm_is_refused() -> None:
    with pytest.raises(SettingsError, match="INSTANCE or GROUP"):
        PatchDiscriminator(norm="BATCH")


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34)])
def test_the_field_of_view_is_the_documented_one(layers: int, field: int) -> None:
    """Group statistics see the whole volume, so norms are switched off and the gradient of one patch is measured."""
    judge = PatchDiscriminator(width=4, layers=layers)
    for name, module in list(judge.named_modules()):
        if "Norm" in type(module).__name__:
            judge.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], nn.Identity())
    x = torch.randn(1, 4, 48, 48, 48, requires_grad=True)
    logits = judge(x)
    middle = logits.shape[2] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle, middle], x)
    reached = gradient[0].abs().sum(0).sum((1, 2)).nonzero()
    assert int(reached.max() - reached.min()) + 1 == field


def test_one_hot_puts_classes_first() -> None:
    maps = torch.tensor([[[[0, 3]]]], dtype=torch.uint8)
    expected = torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 1]]).view(1, 4, 1, 1, 2)
    assert torch.equal(one_hot(maps, 4), expected)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 3, 3, 3), (4,), (0, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_one_hot_is_torchs_own_in_values_and_in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sums over it run in the order of memory, so its layout is part of a bit-for-bit result."""
    labels = (torch.arange(math.prod(shape)) * 5 % 7).reshape(shape).to(dtype)
    expected = torch.nn.functional.one_hot(labels.long(), 7).movedim(-1, 1).float()
    found = one_hot(labels, 7)
    assert torch.equal(found, expected) and found.stride() == expected.stride() and found.dtype == expected.dtype


def test_one_hot_refuses_a_class_that_does_not_exist() -> None:
    with pytest.raises(RuntimeError):
        one_hot(torch.tensor([0, 4]), 4)


def test_a_correction_has_no_checkerboard() -> None:
    """On equal labels and no texture a correction is smooth; a strided transposed convolution fails this by far."""
    torch.manual_seed(0)
    generator = Generator("conditional", size=32).eval()
    torch.nn.init.normal_(generator.head.weight, std=0.1)
    labels = one_hot(torch.ones((1, 32, 32, 32), dtype=torch.long), 7)
    with torch.no_grad():
        x = generator(torch.randn(1, 32), labels, torch.zeros(1, 4, 32, 32, 32))[..., 4:-4, 4:-4, 4:-4]
    power = torch.fft.fftn(x - x.mean((2, 3, 4), keepdim=True), dim=(2, 3, 4)).abs().square().sum((0, 1))
    highest = torch.zeros_like(power, dtype=torch.bool)
    highest[12], highest[:, 12], highest[:, :, 12] = True, True, True  # of 24 voxels, one up and one down
    assert power[highest].sum() < 0.1 * power.sum()
