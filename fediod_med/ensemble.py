"""One prediction from many teachers: weights per hospital, class, volume and voxel; merged probabilities.

Probabilities are weighted, not logits: softmax ignores a constant added to one teacher's logits, per-class logit
weights do not, so the published logit weighting depends on arbitrary offsets (FedIOD, arXiv 2312.14478).
"""

from __future__ import annotations

import math
from itertools import chain, combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fediod_med.losses import entropy_map, soft_dice, transfer_divergence

REALISM_FLOOR = 0.05  # a saturated discriminator may not silence a hospital
PROBABILITY_FLOOR = 1e-6  # of a mixture, before its logarithm


def class_ratio_weights(counts: Tensor, *, dense: bool = True) -> Tensor:
    """`w_k^c = n_k^c / sum_j n_j^c`: each hospital's share of the patients that show class c.

    Args:
        counts: `(K, C)` patients with class c at hospital k, non-negative (noised counts are clamped at 0).
        dense: as in `site_shares`.

    Returns:
        `(K, C)`, columns sum to 1. A class that no hospital has seen is shared like the patients.
    """
    counts = counts.clamp_min(0).float()
    totals = counts.sum(dim=0)
    shares = counts / totals.clamp_min(1e-6)
    return torch.where(totals > 1e-6, shares, site_shares(counts, dense=dense)[:, None])


def site_shares(counts: Tensor, *, dense: bool = True) -> Tensor:
    """`pi_k = n_k / sum_j n_j`, `(K,)`, from `(K, C)` counts; equal where noise left no patient at all.

    Args:
        counts: `(K, C)`.
        dense: every patient shows the first class (background), so its column counts patients; otherwise each patient
            shows one class, and patients are the sum over classes.
    """
    counts = counts.clamp_min(0).float()
    patients = counts[:, 0] if dense else counts.sum(dim=1)
    total = patients.sum()
    return patients / total if total > 1e-6 else torch.full_like(patients, 1 / len(patients))


def realism_confidence(realism: Tensor) -> Tensor:
    """`sigmoid(D_k(x_b))`, floored: how much hospital k trusts itself on volume b. `(K, B)` mean logits to `(K, B)`."""
    return torch.sigmoid(realism).clamp_min(REALISM_FLOOR)


def entropy_confidence(probs: Tensor, temperature: float) -> Tensor:
    """`exp(-H_k(v) / tau)` per voxel, `(K, B, C, ...)` to `(K, B, 1, ...)`; H in nats.

    Given relative to the surest hospital of each voxel (weight 1): the factor cancels in `merge`, and a small tau does
    not underflow for all hospitals at once.
    """
    entropies = torch.stack([entropy_map(p) for p in probs])
    return torch.exp((entropies.amin(dim=0) - entropies) / temperature).unsqueeze(2)


def public_dice(probs: Tensor, classes: Tensor) -> Tensor:
    """Soft Dice of each hospital and class on volumes whose truth is public (phantoms).

    Args:
        probs: `(K, B, C, ...)`.
        classes: `(B, ...)` integers.

    Returns:
        `(K, C)`, over the whole batch; 1 where a class is absent from truth and answers alike.
    """
    truth = one_hot(classes.long(), probs.shape[2]).movedim(-1, 1).to(probs)
    axes = [1, *range(3, probs.dim())]
    overlap = (probs * truth).sum(dim=axes)
    return (2 * overlap + 1) / (probs.sum(dim=axes) + truth.sum(dim=[0, *range(2, truth.dim())]) + 1)


def competence_weights(dice: Tensor, temperature: float) -> Tensor:
    """`exp(Dice_k^c / tau)`, relative to the best hospital of each class (weight 1); `(K, C)` to `(K, C)`.

    The centre knows the label map of a phantom, so it can tell without any patient how well a hospital answers.
    """
    return torch.exp((dice - dice.amax(dim=0)) / temperature)


def learn_weights(log_weights: Tensor, probs: Tensor, classes: Tensor, counts: Tensor, *, step: float) -> Tensor:
    """One gradient step on the logarithms of the hospitals' weights, where the truth is public.

    The loss is the student's own, `-log q_m + soft Dice(q, m)`, with the mixture q in the student's place. Learning the
    weights of an ensemble follows Co-Boosting (Dai et al. 2024, arXiv 2402.15070), which has no truth and uses labels
    of its generator.

    Args:
        log_weights: `(K, C)`, start at 0.
        probs: `(K, B, C, ...)` answers about phantoms.
        classes: `(B, ...)` integers, their truth.
        counts: `(K, C)`, see `class_ratio_weights`; they stay a factor of the weights.
        step: size of the step.

    Returns:
        `(K, C)` for `merge(..., competence=result.exp())`, with the mean over hospitals that it came with, so that
        those which did not answer keep their place.
    """
    theta = log_weights.detach().clone().requires_grad_(True)
    truth = one_hot(classes.long(), probs.shape[2]).movedim(-1, 1).to(probs)
    q = merge(probs.detach(), counts, competence=theta.exp())
    loss = transfer_divergence(truth, q.clamp_min(PROBABILITY_FLOOR).log()) + soft_dice(q, truth)
    (gradient,) = torch.autograd.grad(loss, theta)
    moved = log_weights - step * gradient.to(log_weights)
    return moved - (moved - log_weights).mean(dim=0)


def merge(
    probs: Tensor,
    counts: Tensor,
    *,
    realism: Tensor | None = None,
    entropy_temperature: float | None = None,
    competence: Tensor | None = None,
) -> Tensor:
    """Ensemble `q^c ∝ sum_k w_k^c [c_k^c] [sigmoid(D_k)] [exp(-H_k / tau)] p_k^c`, renormalised over classes.

    Args:
        probs: `(K, B, C, ...)`; without voxels, `(K, B, C)`, a patient shows one class.
        counts: `(K, C)`, see `class_ratio_weights`.
        realism: `(K, B)` mean patch logits; omitted: no discriminator confidence.
        entropy_temperature: tau in nats; omitted: no voxel confidence.
        competence: `(K, C)`, see `competence_weights` and `learn_weights`; omitted: all alike.

    Returns:
        `(B, C, ...)`, summing to 1 over classes.
    """
    spatial = [1] * (probs.dim() - 3)
    by_class = class_ratio_weights(counts, dense=probs.dim() > 3).to(probs)
    if competence is not None:
        by_class = by_class * competence.to(probs)
    weights = by_class.view(probs.shape[0], 1, probs.shape[2], *spatial)
    if realism is not None:
        weights = weights * realism_confidence(realism).to(probs).view(*probs.shape[:2], 1, *spatial)
    if entropy_temperature is not None:
        weights = weights * entropy_confidence(probs, entropy_temperature)
    mixed = (weights / weights.sum(dim=0, keepdim=True) * probs).sum(dim=0)
    return mixed / mixed.sum(dim=1, keepdim=True).clamp_min(1e-12)


def mirrored_logits(network: nn.Module, x: Tensor) -> Tensor:
    """Log of one network's class probabilities averaged over all mirror images of x, each mirrored back.

    Args:
        network: `(B, S, ...)` to logits `(B, C, ...)`, edges alike.
        x: `(B, S, ...)` with any number of spatial axes.

    Returns:
        `(B, C, ...)`; its softmax is the averaged answer, so it stands for the network's logits, gradients included.
    """
    axes = range(2, x.dim())
    mirrors = list(chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1)))
    answers = [torch.log_softmax(network(x.flip(m)).float(), dim=1).flip(m) for m in mirrors]
    return torch.logsumexp(torch.stack(answers), dim=0) - math.log(len(mirrors))
