"""What a discriminator learns from, and what it says of a volume: means over its scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fediod_med.devices import autocast_over
from fediod_med.federation.critic_networks import mean_logit, patch_logits
from fediod_med.losses import discriminator_adversarial, generator_adversarial, gradient_penalty


def discriminator_loss(
    discriminator: nn.Module, fake: Tensor, real: Tensor, criterion: str, *, penalty: float = 0.0
) -> Tensor:
    """Adversarial loss plus `penalty / 2` times the gradient penalty on real patches (R1).

    Args:
        discriminator: see `critic_networks.patch_logits`.
        fake: `(B, channels, ...)`, what it sees of synthetic volumes, without a graph.
        real: `(R, channels, ...)`, what it sees of real patches, without a graph.
        criterion: `hinge`, `bce` or `least_squares`.
        penalty: gamma; 0 for none.
    """
    with autocast_over(fake.device, fake.shape[2:]):
        by_scale = zip(patch_logits(discriminator, fake), patch_logits(discriminator, real), strict=True)
    loss = torch.stack([discriminator_adversarial(*logits, criterion) for logits in by_scale]).mean()
    if penalty:  # in float32, for it is differentiated twice
        leaf = real.detach().clone().requires_grad_(True)
        loss = loss + penalty / 2 * gradient_penalty(mean_logit(patch_logits(discriminator, leaf)), leaf)
    return loss


def judgement(
    discriminator: nn.Module, x: Tensor, criterion: str, *, show: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Realism `(B,)` (mean patch logit) and the gradient of the adversarial loss with respect to x.

    `show` makes what the discriminator sees of x, differentiable; x itself when omitted. With several scales both are
    means over them.
    """
    leaf = x.detach().clone().requires_grad_(True)
    with autocast_over(x.device, x.shape[2:]):
        logits = patch_logits(discriminator, leaf if show is None else show(leaf))
    loss = torch.stack([generator_adversarial(scale, criterion) for scale in logits]).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"realism": mean_logit(logits).detach(), "x_gradient": gradient}
