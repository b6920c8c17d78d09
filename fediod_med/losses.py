"""The terms of the method, one function each: tensors in, scalar out, no weights and no signs.

Weights and signs stand in one visible sum in `distillation.generating`. All functions work for any number of spatial
axes. `B` batch, `C` classes, `K` hospitals. Logarithms are natural. Source: Gong et al., FedIOD, AAAI 2024 (arXiv
2312.14478) and its published classification code; the dense forms average over voxels, where the published code sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn.functional import softplus

from fediod_med.errors import SettingsError

_FLOOR = 1e-6  # probabilities travel as fp16 and may underflow to 0, where the gradient of entropy is infinite


def generator_adversarial(fake_logits: Tensor, criterion: str) -> Tensor:
    """How unreal one hospital's discriminator finds synthetic volumes (the generator minimises it).

    Args:
        fake_logits: `(B, 1, ...)` patch logits of synthetic volumes.
        criterion: `hinge` (-d), `bce` (softplus(-d)) or `least_squares` ((d - 1)^2), mean over patches. MONAI's
            `PatchAdversarialLoss` squashes d first (tanh, leaky ReLU), which stops the gradient of a confident judge.

    Raises:
        SettingsError: unknown criterion.
    """
    if criterion == "hinge":
        return -fake_logits.mean()
    return _towards_real(fake_logits, criterion).mean()


def discriminator_adversarial(fake_logits: Tensor, real_logits: Tensor, criterion: str) -> Tensor:
    """Discriminator loss at one hospital, half for synthetic and half for real patches; logits `(B, 1, ...)`.

    `hinge` is relu(1 + d) on synthetic and relu(1 - d) on real patches, `bce` softplus(d) and softplus(-d),
    `least_squares` d^2 and (d - 1)^2; `SettingsError` on any other criterion.
    """
    return (synthetic_adversarial(fake_logits, criterion) + real_adversarial(real_logits, criterion).mean()) / 2


def synthetic_adversarial(fake_logits: Tensor, criterion: str) -> Tensor:
    """The synthetic half of `discriminator_adversarial`: mean over volumes and patches."""
    if criterion == "least_squares":
        return fake_logits.square().mean()
    return _towards_real(-fake_logits, criterion).mean()


def real_adversarial(real_logits: Tensor, criterion: str) -> Tensor:
    """The real half of `discriminator_adversarial`, one number per volume: `(B, 1, ...)` to `(B,)`."""
    return _towards_real(real_logits, criterion).flatten(1).mean(dim=1)


def gradient_penalty(scores: Tensor, x: Tensor) -> Tensor:
    """Mean over volumes of `|grad_x score|^2`, itself differentiable (R1; Mescheder et al. 2018, arXiv 1801.04406).

    Args:
        scores: `(B,)`, one number for each volume, which depends on its own volume alone.
        x: `(B, ...)`, what they were computed from, with a graph between.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()


def _towards_real(logits: Tensor, criterion: str) -> Tensor:
    if criterion == "hinge":
        return torch.relu(1 - logits)
    if criterion == "bce":
        return softplus(-logits)
    if criterion == "least_squares":
        return (logits - 1).square()
    raise SettingsError(f"adversarial loss: expected hinge, bce or least_squares, found {criterion!r}")


def prediction_entropy(probs: Tensor) -> Tensor:
    """Mean entropy of one teacher on synthetic volumes (clarity), nats per voxel.

    Args:
        probs: `(B, C, ...)`, softmax over exclusive classes.
    """
    return entropy_map(probs).mean()


def entropy_map(probs: Tensor) -> Tensor:
    """Entropy per voxel, `(B, C, ...)` to `(B, ...)`, nats."""
    entropies: Tensor = torch.special.entr(probs.clamp_min(_FLOOR)).sum(dim=1)
    return entropies


def teacher_divergence(probs: Tensor, site_weights: Tensor) -> Tensor:
    """Weighted Jensen-Shannon divergence between the teachers (uniqueness), nats per voxel.

    `H(sum_k pi_k p_k) - sum_k pi_k H(p_k)`; equal to the mutual information of hospital and label.

    Args:
        probs: `(K, B, C, ...)`.
        site_weights: `(K,)`, non-negative, summing to 1.
    """
    shape = (-1, *[1] * (probs.dim() - 1))
    mixture = (site_weights.view(shape) * probs).sum(dim=0)
    members = torch.stack([prediction_entropy(p) for p in probs])
    return prediction_entropy(mixture) - (site_weights * members).sum()


def released_divergence(probs: Tensor) -> Tensor:
    """Divergence as in the published code: mean over k of `KL(P || p_k)`, P the plain mean, both clamped to [.01, .99].

    The published code adds it to the generator's loss with a positive weight, so it pulls teachers together.

    Args:
        probs: `(K, B, C, ...)`.
    """
    clamped = probs.clamp(0.01, 0.99)
    mixture = probs.mean(dim=0).clamp(0.01, 0.99)
    return (mixture * (mixture.log() - clamped.log())).sum(dim=2).mean()


def site_label_information(probs: Tensor, site_weights: Tensor) -> Tensor:
    """Mutual information of hospital and label, `sum_k pi_k KL(p_k || sum_j pi_j p_j)`, nats per voxel.

    `I(S; Y) = H(Y) - H(Y | S)` with `P(S = k) = pi_k` and `P(Y | S = k) = p_k`: the same number as
    `teacher_divergence`, written as the divergences from the mixture (Lin 1991, IEEE Trans Inf Theory 37(1), eq. 4.1).

    Args:
        probs: `(K, B, C, ...)`.
        site_weights: `(K,)`, non-negative, summing to 1.
    """
    probs = probs.clamp_min(_FLOOR)
    mixture = _weighted_mean(probs, site_weights)
    return _weighted_mean((probs * (probs.log() - mixture.log())).sum(dim=2), site_weights).mean()


def pairwise_divergence(probs: Tensor) -> Tensor:
    """Mean over ordered pairs of hospitals of `KL(p_k || p_j)`, nats per voxel; 0 for a single hospital.

    `1 / (K (K - 1)) sum_{j != k} KL(p_k || p_j)`, from sums over k alone, so memory grows with K and not with K^2.
    Unlike the Jensen-Shannon divergence it has no upper bound.

    Args:
        probs: `(K, B, C, ...)`.
    """
    hospitals = probs.shape[0]
    probs = probs.clamp_min(_FLOOR)
    logs = probs.log()
    own = hospitals * (probs * logs).sum(dim=(0, 2))
    cross = (probs.sum(dim=0) * logs.sum(dim=0)).sum(dim=1)
    return (own - cross).mean() / max(hospitals * (hospitals - 1), 1)


def feature_contrast(probs: Tensor, site_weights: Tensor) -> Tensor:
    """How far the hospitals' answer statistics lie apart, `sum_k pi_k mean_b |f_k(x_b) - f(x_b)|^2 / dim f`.

    `f_k(x)` holds, by class, the mean and the standard deviation over voxels of the centred log-probability
    `log p_k^c - mean_c log p_k^c` (the teacher's logit up to the constant that softmax drops), `f = sum_k pi_k f_k`.
    Channel moments as in DeepInversion (Yin et al. 2020, arXiv 1912.08795, eq. 4), here of the teachers' last layer,
    the only one that leaves a hospital, and between hospitals. Answers without voxels have the mean alone.

    Args:
        probs: `(K, B, C, ...)`.
        site_weights: `(K,)`, non-negative, summing to 1.
    """
    logs = probs.clamp_min(_FLOOR).log()
    centred = logs - logs.mean(dim=2, keepdim=True)
    features = centred
    if probs.dim() > 3:
        voxels = centred.flatten(3)
        spread = (voxels.var(dim=3, correction=0) + _FLOOR).sqrt()  # the root has no gradient at 0
        features = torch.cat([voxels.mean(dim=3), spread], dim=2)
    return _weighted_mean((features - _weighted_mean(features, site_weights)).square(), site_weights).mean()


def _weighted_mean(values: Tensor, site_weights: Tensor) -> Tensor:
    """`sum_k pi_k v_k`, `(K, ...)` to `(...)`."""
    mean: Tensor = torch.tensordot(site_weights.to(values), values, dims=1)
    return mean


def class_balance(probs: Tensor, target: Tensor) -> Tensor:
    """`KL(p_mean || target)`, p_mean the batch and voxel mean of one teacher's prediction (balance).

    A uniform target gives the published term (in bits) times ln 2, up to the constant ln C.

    Args:
        probs: `(B, C, ...)`.
        target: `(C,)`, positive, summing to 1.
    """
    mean = probs.transpose(0, 1).flatten(1).mean(dim=1).clamp_min(_FLOOR)
    return (mean * (mean.log() - target.log())).sum()


def mask_cross_entropy(probs: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of the ensemble against the label map that conditioned the generator, mean over classes present.

    Averaging within each class first keeps the 1-3 % of tumour voxels from drowning in background.

    Args:
        probs: `(B, C, ...)`.
        classes: `(B, ...)` integers.
    """
    nll = -probs.clamp_min(_FLOOR).log().gather(1, classes.long().unsqueeze(1)).squeeze(1)
    present = [nll[classes == label].mean() for label in range(probs.shape[1]) if bool((classes == label).any())]
    return torch.stack(present).mean()


def transfer_divergence(target: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(q_T || softmax(s / T))`, mean over batch and voxels (distillation; Hinton et al. 2015).

    Args:
        target: `(B, C, ...)` ensemble probabilities q; sharpened or softened to `q^(1/T)`, renormalised.
        student_logits: `(B, C, ...)`.
        temperature: T.
    """
    log_student = torch.log_softmax(student_logits.float() / temperature, dim=1)
    log_target = target.clamp_min(_FLOOR).log()
    if temperature != 1:
        log_target = torch.log_softmax(log_target / temperature, dim=1)
    divergence = (log_target.exp() * (log_target - log_student)).sum(dim=1).mean()
    return temperature**2 * divergence


def soft_dice(probs: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss over the tumour classes against soft targets; both `(B, C, ...)`, background left out.

    `soft_label=True` makes the loss 0 when the prediction equals a soft target (without it the optimum is elsewhere).
    """
    loss: Tensor = DiceLoss(include_background=False, soft_label=True, smooth_nr=1.0, smooth_dr=1.0, batch=True)(
        probs, target
    )
    return loss


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "jensen_shannon": teacher_divergence,
        "released": lambda probs, site_weights: released_divergence(probs),
        "information": site_label_information,
        "pairwise": lambda probs, site_weights: pairwise_divergence(probs),
        "features": feature_contrast,
    }
)
"""How far the teachers differ on x, by name: `(K, B, C, ...)` and site weights `(K,)` to a scalar."""
