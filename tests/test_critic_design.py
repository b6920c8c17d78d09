"""Designs of a hospital's discriminator: each changes what it should, and each can be rewound to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fediod_med.checkpoints import load_state
from fediod_med.errors import SettingsError
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.critic_design import CriticDesign
from fediod_med.federation.critic_losses import discriminator_loss, judgement
from fediod_med.federation.critic_networks import ScaledDiscriminator, mean_logit, patch_logits
from fediod_med.losses import discriminator_adversarial, generator_adversarial, gradient_penalty
from fediod_med.networks import PatchDiscriminator, build_segmenter
from fediod_med.protocol import Query

CPU = torch.device("cpu")
SIZE = 16
DESIGNS = {
    "plain": CriticDesign(),
    "scales": CriticDesign(scales=2),
    "augment": CriticDesign(augment=True),
    "penalty": CriticDesign(penalty=5.0),
    "spectral": CriticDesign(spectral=True),
    "joint": CriticDesign(joint=True),
    "all": CriticDesign(scales=2, augment=True, penalty=5.0, spectral=True, joint=True),
}


def volumes(edge: int = SIZE + 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((4, edge, edge, edge), generator=generator) for _ in range(3)]


def batch(seed: int, edge: int = SIZE) -> Tensor:
    return torch.randn((2, 4, edge, edge, edge), generator=torch.Generator().manual_seed(seed))


def teacher() -> nn.Module:
    torch.manual_seed(8)
    return build_segmenter("unet", width=4, depth=2)


def critic(folder: Path, design: CriticDesign | None = None, **settings: Any) -> PlainCritic:
    settings = {"volumes": volumes(), "teacher": teacher(), "seed": 5, "width": 4, "layers": 1, **settings}
    return PlainCritic("hospital-a", settings.pop("volumes"), state_dir=folder, device=CPU, design=design, **settings)


def judge(one: PlainCritic, number: int, **settings: bool) -> dict[str, Tensor]:
    x = batch(number)
    return one.judge(x, Query("answer", "run-1", number, {"x": x}, settings))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def seen_by(one: PlainCritic) -> list[Tensor]:
    """Collects whatever the discriminator is given from now on."""
    seen: list[Tensor] = []
    one.discriminator.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    return seen


@pytest.mark.parametrize("norm", ["INSTANCE", "GROUP"])
def test_the_default_is_the_plain_discriminator_bit_for_bit(tmp_path: Path, norm: str) -> None:
    """By hand: MONAI's network, two passes, Adam, and the gradient of what the updated network says."""
    one = critic(tmp_path, norm=norm)
    network = PatchDiscriminator(width=4, layers=1, norm=norm)
    network.load_state_dict(one.discriminator.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for number in (1, 2, 3):
        found = judge(one, number)
        fake, real = network(batch(number)), network(one.real_batch((SIZE,) * 3, number))
        optimizer.zero_grad()
        discriminator_adversarial(fake, real, "hinge").backward()
        optimizer.step()
        leaf = batch(number).requires_grad_(True)
        logits = network(leaf)
        (gradient,) = torch.autograd.grad(generator_adversarial(logits, "hinge"), leaf)
        assert same(found, {"realism": logits.detach().flatten(1).mean(1), "x_gradient": gradient})


def test_the_default_gives_the_numbers_that_it_gave_before_there_were_designs(tmp_path: Path) -> None:
    one = critic(tmp_path)
    expected = {
        1: ([-0.022751791, -0.030961404], 1.3701032),
        2: ([-0.059790354, -0.049815800], 1.3906438),
        3: ([-0.050845299, -0.056785438], 1.3794732),
    }
    for number, (realism, gradient) in expected.items():
        found = judge(one, number)
        assert found["realism"].tolist() == pytest.approx(realism, rel=1e-4)
        assert float(found["x_gradient"].abs().sum()) == pytest.approx(gradient, rel=1e-4)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_rewound_discriminator_repeats_its_bits(tmp_path: Path, name: str) -> None:
    """In memory, from a snapshot in the same process, and from one after a restart."""
    one = critic(tmp_path / "a", DESIGNS[name])
    replies = {number: judge(one, number, snapshot=number == 2) for number in (1, 2, 3)}
    assert same(judge(one, 3), replies[3])
    assert same(judge(critic(tmp_path / "a", DESIGNS[name]), 3), replies[3])
    other = critic(tmp_path / "b", DESIGNS[name])
    assert all(same(judge(other, number), replies[number]) for number in (1, 2, 3))


def test_each_design_changes_the_reply_in_its_values_only(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    made = {name: critic(tmp_path / name, design) for name, design in DESIGNS.items()}
    torch.manual_seed(3)
    replies = {name: [judge(one, number) for number in (1, 2)] for name, one in made.items()}
    assert torch.equal(torch.rand(1), expected)  # the centre's generator is left alone
    for name, (first, second) in replies.items():
        assert first["realism"].shape == (2,) and first["x_gradient"].shape == batch(1).shape
        assert not any(tensor.requires_grad for tensor in (*first.values(), *second.values()))
        assert all(bool(tensor.isfinite().all()) for tensor in second.values())
        assert name == "plain" or not same(second, replies["plain"][1])


def test_several_scales_report_the_mean_over_them(tmp_path: Path) -> None:
    one = critic(tmp_path, CriticDesign(scales=2))
    found = judge(one, 1)
    assert isinstance(one.discriminator, ScaledDiscriminator)
    fine, coarse = one.discriminator.scales
    leaf = batch(1).requires_grad_(True)
    blocks = leaf.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).flatten(5).mean(5)
    logits = [fine(leaf), coarse(blocks)]
    assert logits[0].shape != logits[1].shape
    realism = (logits[0].flatten(1).mean(1) + logits[1].flatten(1).mean(1)) / 2
    (gradient,) = torch.autograd.grad(-(logits[0].mean() + logits[1].mean()) / 2, leaf)
    assert torch.allclose(found["realism"], realism, atol=1e-6)
    assert torch.allclose(found["x_gradient"], gradient, atol=1e-7)


def test_scales_begin_unlike_learn_both_and_the_finest_begins_as_the_plain_one(tmp_path: Path) -> None:
    one, plain = critic(tmp_path, CriticDesign(scales=3), layers=1), critic(tmp_path)
    assert isinstance(one.discriminator, ScaledDiscriminator)
    before = [[p.clone() for p in scale.parameters()] for scale in one.discriminator.scales]
    assert torch.equal(before[0][0], next(plain.discriminator.parameters()))
    assert not torch.equal(before[0][0], before[1][0])
    judge(one, 1)
    for scale, old in zip(one.discriminator.scales, before, strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(scale.parameters(), old, strict=True) if a.dim() > 1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_coarse_volume_too_small_for_the_network_is_set_in_background(layers: int) -> None:
    judges = ScaledDiscriminator(2, channels=4, width=4, layers=layers, norm="INSTANCE", spatial_dims=3).train()
    edge = 3 * 2**layers  # the least that the fine scale can judge
    fine, coarse = judges(torch.randn(1, 4, edge, edge, edge))
    assert fine.shape == coarse.shape == (1, 1, 1, 1, 1)
    given: list[Tensor] = []
    judges.scales[1].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    x = torch.rand(1, 4, edge, edge, edge) + 1
    judges(x)
    (coarse,) = given
    assert coarse.shape == x.shape and int((coarse[0, 0] != 0).sum()) == (edge // 2) ** 3
    assert float(coarse.sum()) == pytest.approx(float(x.sum()) / 8, rel=1e-5)


def test_real_synthetic_and_judged_volumes_are_all_changed_and_not_alike(tmp_path: Path) -> None:
    flat = [torch.full((4, SIZE, SIZE, SIZE), 2.0)] * 3
    one = critic(tmp_path, CriticDesign(augment=True), volumes=flat)
    seen = seen_by(one)
    x = torch.full((2, 4, SIZE, SIZE, SIZE), 2.0)
    for number in (1, 2):
        one.judge(x, Query("answer", "run-1", number, {"x": x}))
    assert len(seen) == 6
    for given in seen:
        cut = (given == 0).flatten(2).sum(2)
        assert int(cut.min()) >= (SIZE // 4) ** 3 and int(cut.max()) < SIZE**3  # the box, and what a shift brought in
        values = {round(float(v), 4) for v in given[given != 0].unique()}
        assert len(values) == 8 and 2.0 not in values  # two volumes of four sequences, each brighter or darker
    assert not any(torch.equal(seen[i], seen[j]) for i in range(6) for j in range(i))
    again = seen_by(other := critic(tmp_path / "b", CriticDesign(augment=True), volumes=flat))
    other.judge(x, Query("answer", "run-1", 1, {"x": x}))
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], again, strict=True))


def test_the_gradient_goes_back_through_the_augmentation(tmp_path: Path) -> None:
    one = critic(tmp_path, CriticDesign(augment=True))
    seen = seen_by(one)
    found = judge(one, 1)
    leaf = batch(1).requires_grad_(True)
    changed = one._shown(leaf, 1, "x")
    assert torch.equal(changed, seen[-1]) and not torch.equal(changed, leaf)
    logits = one.discriminator(changed)
    (gradient,) = torch.autograd.grad(generator_adversarial(logits, "hinge"), leaf)
    assert torch.allclose(found["x_gradient"], gradient, atol=1e-8)
    assert torch.allclose(found["realism"], logits.flatten(1).mean(1), atol=1e-6)


def test_the_gradient_penalty_of_a_linear_judge_by_hand() -> None:
    """D(x) = mean over N voxels of w.x, so its gradient is w / N in each voxel, and the penalty |w|^2 / N."""
    network = nn.Conv3d(4, 1, kernel_size=1)
    w = network.weight
    x = batch(1).requires_grad_(True)
    penalty = gradient_penalty(mean_logit(patch_logits(network, x)), x)
    assert penalty.item() == pytest.approx(w.square().sum().item() / SIZE**3, rel=1e-5)
    (slope,) = torch.autograd.grad(penalty, w)
    assert torch.allclose(slope, 2 * w / SIZE**3, rtol=1e-4)
    nn.init.zeros_(w)
    x = batch(1).requires_grad_(True)
    assert gradient_penalty(mean_logit(patch_logits(network, x)), x).item() == 0


def test_the_penalty_of_a_network_equals_a_double_backward_by_hand() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(width=4, layers=1)
    for weights in network.parameters():
        nn.init.normal_(weights, std=0.3)
    fake, real = batch(1), batch(2)
    parameters = list(network.parameters())
    with_penalty = torch.autograd.grad(discriminator_loss(network, fake, real, "hinge", penalty=3.0), parameters)
    without = torch.autograd.grad(discriminator_loss(network, fake, real, "hinge"), parameters)
    norms = []
    for patch in real.split(1):
        leaf = patch.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(network(leaf).mean(), leaf, create_graph=True)
        norms.append(gradient.square().sum())
    by_hand = torch.autograd.grad(3.0 / 2 * torch.stack(norms).mean(), parameters, allow_unused=True)
    for both, loss, term in zip(with_penalty, without, by_hand, strict=True):
        added = torch.zeros_like(both) if term is None else term
        assert torch.allclose(both - loss, added, rtol=1e-3, atol=1e-6)
    assert max(float(term.abs().max()) for term in by_hand if term is not None) > 1e-3


def test_a_penalised_discriminator_is_flatter_around_real_patches(tmp_path: Path) -> None:
    def steepness(gamma: float) -> float:
        one = critic(tmp_path / str(gamma), CriticDesign(penalty=gamma), learning_rate=5e-3)
        for number in range(1, 16):
            judge(one, number)
        leaf = one.real_batch((SIZE,) * 3, 999).requires_grad_(True)
        return gradient_penalty(mean_logit(patch_logits(one.discriminator, leaf)), leaf).item()

    assert steepness(100.0) < 0.5 * steepness(0.0)


def largest_singular_value(layer: nn.Conv3d) -> float:
    return torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2).item()


def test_a_spectral_norm_holds_every_convolution_at_one(tmp_path: Path) -> None:
    one = critic(tmp_path, CriticDesign(spectral=True, scales=2), learning_rate=2e-3)
    for number in range(1, 16):
        judge(one, number, snapshot=True)
    layers = [layer for layer in one.discriminator.modules() if isinstance(layer, nn.Conv3d)]
    largest = [largest_singular_value(layer) for layer in layers]
    assert len(largest) == 6 and largest == pytest.approx([1.0] * 6, abs=0.05)
    plain = critic(tmp_path / "plain")
    free = [layer for layer in plain.discriminator.modules() if isinstance(layer, nn.Conv3d)]
    assert all(abs(largest_singular_value(layer) - 1) > 0.2 for layer in free)
    kept = load_state(tmp_path / "run-1-round-000015.pt")["discriminator"]
    vectors = {name: tensor for name, tensor in one.discriminator.state_dict().items() if name.endswith(("_u", "_v"))}
    assert len(vectors) == 12 and all(torch.equal(kept[name], tensor) for name, tensor in vectors.items())


def test_a_judgement_leaves_the_vectors_of_the_spectral_norm_alone(tmp_path: Path) -> None:
    one = critic(tmp_path, CriticDesign(spectral=True))
    judge(one, 1)
    before = {name: tensor.clone() for name, tensor in one.discriminator.state_dict().items()}
    judgement(one.discriminator, batch(2), "hinge")
    assert same(before, dict(one.discriminator.state_dict()))


def test_pairs_hold_the_teachers_answer_for_real_and_synthetic_volumes(tmp_path: Path) -> None:
    own = teacher()
    weights = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    one = critic(tmp_path, CriticDesign(joint=True), teacher=own)
    seen = seen_by(one)
    judge(one, 1)
    synthetic, real, judged = seen
    assert torch.equal(synthetic[:, :4], batch(1)) and torch.equal(judged[:, :4], batch(1))
    assert torch.equal(real[:, :4], one.real_batch((SIZE,) * 3, 1))
    for given in seen:
        assert torch.allclose(given[:, 4:], torch.softmax(own(given[:, :4]), dim=1), atol=1e-6)
    assert same(weights, dict(own.state_dict())) and not own.training


def test_the_gradient_of_a_pair_passes_through_the_teacher() -> None:
    """Central differences in float64 along random directions, through both ways from the volume to the logit."""
    own = teacher().double().eval().requires_grad_(False)
    torch.manual_seed(1)
    network = PatchDiscriminator(sequences=8, width=4, layers=1).double().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.normal_(layer.weight, std=0.3)

    def show(x: Tensor) -> Tensor:
        return torch.cat([x, torch.softmax(own(x), dim=1)], dim=1)

    x = batch(1).double()
    whole = judgement(network, x, "hinge", show=show)["x_gradient"]
    frozen = torch.softmax(own(x), dim=1)
    direct = judgement(network, x, "hinge", show=lambda leaf: torch.cat([leaf, frozen], dim=1))["x_gradient"]
    for seed in range(3):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        up, down = (generator_adversarial(network(show(x + step * direction)), "hinge") for step in (1e-6, -1e-6))
        slope = float(up - down) / 2e-6
        assert float((whole * direction).sum()) == pytest.approx(slope, rel=1e-4)
        assert float((direct * direction).sum()) != pytest.approx(slope, rel=1e-2)


def test_a_discriminator_of_pairs_needs_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="hospital-a: a discriminator of pairs needs the hospital's teacher"):
        critic(tmp_path, CriticDesign(joint=True), teacher=None)
