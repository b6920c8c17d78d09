"""The method on images and class answers: the same networks' builders, ensemble, node and critic as on volumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fediod_med.distillation import learning
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.ensemble import class_ratio_weights, merge, site_shares
from fediod_med.errors import ProtocolError, SettingsError
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.networks import Generator, PatchDiscriminator, build_classifier
from fediod_med.privacy.gate import Gate
from fediod_med.protocol import Query, Reply

CPU = torch.device("cpu")
COUNTS = torch.tensor([[1.0, 0, 5], [3, 0, 1]])


def images(count: int, *, edge: int = 8, seed: int = 0) -> Tensor:
    return torch.rand((count, 1, edge, edge), generator=torch.Generator().manual_seed(seed))


def node(folder: Path) -> SiteNode:
    torch.manual_seed(0)
    critic = PlainCritic(
        "a", list(images(6)), state_dir=folder, seed=0, device=CPU, batch=4, width=4, layers=1,
        sequences=1, spatial_dims=2, mirrored=False,
    )  # fmt: skip
    presence = torch.eye(3)[[0, 0, 1, 2, 2, 2]]
    return SiteNode(
        "a", build_classifier((1, 8, 8), 3, width=4), presence, critic=critic, gate=Gate.unprotected("a"), device=CPU,
        sequences=1, spatial_dims=2,
    )  # fmt: skip


def answer(site: SiteNode, x: Tensor) -> Reply:
    return site._reply(Query("answer", "run", 1, {"x": x}, {"adversarial": True, "differentiate": True}))


def test_a_patient_of_a_classification_is_counted_once() -> None:
    assert torch.allclose(site_shares(COUNTS, dense=False), torch.tensor([0.6, 0.4]))
    weights = class_ratio_weights(COUNTS, dense=False)
    # The class that nobody has seen is shared by patients; the others by their own counts.
    assert torch.allclose(weights, torch.tensor([[0.25, 0.6, 5 / 6], [0.75, 0.4, 1 / 6]]))


def test_class_answers_are_merged_by_class_ratio() -> None:
    p = torch.tensor([[[0.5, 0.2, 0.3]], [[0.1, 0.1, 0.8]]])
    mixed = torch.tensor([0.25 * 0.5 + 0.75 * 0.1, 0.6 * 0.2 + 0.4 * 0.1, 5 / 6 * 0.3 + 1 / 6 * 0.8])
    assert torch.allclose(merge(p, COUNTS)[0], mixed / mixed.sum())


def test_class_answers_listen_to_the_discriminator_of_each_image() -> None:
    p = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]])
    realism = torch.tensor([[50.0, -50], [-50, 50]])
    q = merge(p, torch.ones(2, 2), realism=realism)
    assert q.argmax(1).tolist() == [0, 1]


def test_generator_and_discriminator_of_images() -> None:
    torch.manual_seed(0)
    generator = Generator("unconditional", size=8, width=4, latent=6, sequences=1, spatial_dims=2, doublings=2)
    x = generator(torch.randn(5, 6))
    assert x.shape == (5, 1, 8, 8) and x.abs().max() <= 3 and x.std(0).max() > 0
    logits = PatchDiscriminator(sequences=1, width=4, layers=1, spatial_dims=2)(x)
    assert logits.shape[:2] == (5, 1) and logits.dim() == 4
    with pytest.raises(SettingsError, match="divisible by 4"):
        Generator("unconditional", size=6, spatial_dims=2, doublings=2)
    with pytest.raises(SettingsError, match="expected 3 axes"):
        Generator("conditional", size=8, spatial_dims=2)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (4, 8, 8, 8)])
def test_classifiers_answer_each_image_by_itself(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = build_classifier(shape, 5, width=4).train()
    x = torch.randn(3, *shape)
    assert network(x).shape == (3, 5)
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-5)


@pytest.mark.parametrize("settings", [{"width": 6}, {"levels": 5}, {"levels": 0}])
def test_classifiers_refuse_sizes_they_cannot_have(settings: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="classifier"):
        build_classifier((1, 8, 8), 10, **settings)


def test_a_node_answers_about_images_with_class_probabilities(tmp_path: Path) -> None:
    site, x = node(tmp_path), images(5, seed=1)
    reply = answer(site, x)
    assert reply.tensors["probs"].shape == (5, 3) and reply.tensors["x_gradient"].shape == x.shape
    assert torch.allclose(reply.tensors["probs"].sum(1), torch.ones(5))
    gradient = torch.randn(5, 3)
    pulled = site._reply(Query("pull_back", "run", 1, {"logit_gradient": gradient})).tensors["x_gradient"]
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(site._teacher(leaf), leaf, grad_outputs=gradient)
    assert torch.allclose(pulled, expected, atol=1e-6)


def test_a_node_for_images_refuses_volumes(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"\(B, 1, H, W\), found \(2, 1, 8, 8, 8\)"):
        answer(node(tmp_path), torch.zeros(2, 1, 8, 8, 8))
    with pytest.raises(ProtocolError, match=r"\(B, 1, H, W\)"):
        answer(node(tmp_path), torch.zeros(2, 3, 8, 8))


def test_handwriting_is_not_mirrored_for_the_discriminator(tmp_path: Path) -> None:
    critic = node(tmp_path)._critic
    assert isinstance(critic, PlainCritic)
    real = {tuple(image.flatten().tolist()) for image in images(6)}
    for number in range(1, 9):
        drawn = critic.real_batch((8, 8), number)
        assert drawn.shape == (4, 1, 8, 8)
        assert {tuple(image.flatten().tolist()) for image in drawn} <= real


def test_the_loop_teaches_class_answers_and_changes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the student is shown is what the teachers were asked, in half precision, with their merged answer."""
    shown: list[tuple[Tensor, Tensor]] = []

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_classifier((1, 8, 8), 3, width=4)

        def forward(self, x: Tensor) -> Tensor:
            shown.append((x.detach().clone(), torch.empty(0)))
            out: Tensor = self.inner(x)
            return out

    def noted(target: Tensor, logits: Tensor) -> Tensor:
        shown[-1] = (shown[-1][0], target.detach().clone())
        return torch.nn.functional.cross_entropy(logits, target)

    monkeypatch.setattr(learning, "transfer_divergence", noted)
    objective = GeneratorObjective(
        gan=1, clarity=1, unique=1, mask=0, balance=1, transfer=0, divergence="features", competence=0
    )
    torch.manual_seed(1)
    state = distill(
        EmbeddedFederation({"a": node(tmp_path)}),
        student=Student(),
        generator=Generator("unconditional", size=8, width=4, latent=6, sequences=1, spatial_dims=2, doublings=2),
        sampler=None,
        objective=objective,
        schedule=Schedule(rounds=2, batch=4, student_steps=2, student_batch=3, phantom_share=0, rehearsal=0),
        size=8,
        seed=0,
        run_id="images",
        device=CPU,
    )
    asked = {
        tuple(x.float().flatten().tolist()): q.float()
        for pair in state.replay
        for x, q in zip(pair["x"], pair["q"], strict=True)
    }
    assert len(asked) == 8 and len(shown) == 4
    for x, target in shown:
        for image, wanted in zip(x, target, strict=True):
            assert torch.equal(asked[tuple(image.flatten().tolist())], wanted) and wanted.shape == (3,)
    assert {"clarity", "unique", "balance", "realism"} <= set(state.history[0])
