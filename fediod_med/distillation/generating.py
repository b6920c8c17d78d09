"""The volumes of a round, the ensemble's weights, and one step of the generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fediod_med.data.sampler import PublicBatch
from fediod_med.devices import autocast_over
from fediod_med.distillation.asking import Hospitals
from fediod_med.distillation.learning import guess_of
from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.distillation.state import DistillationState
from fediod_med.ensemble import competence_weights, learn_weights, public_dice, site_shares
from fediod_med.losses import (
    DIVERGENCES,
    class_balance,
    mask_cross_entropy,
    prediction_entropy,
    transfer_divergence,
)
from fediod_med.networks import one_hot
from fediod_med.parallel import Workers

TISSUES = 7
COMPETENCE_MEMORY = 0.9


def hardest(
    student: nn.Module, drawn: PublicBatch, schedule: Schedule, device: torch.device, workers: Workers
) -> list[int]:
    """Which volumes of the public ones drawn a round asks about: those with the student's lowest Dice.

    Dice of the tumour classes, see `ensemble.public_dice`, on the phantom itself.
    """
    if schedule.candidates == 1:
        return list(range(schedule.batch))
    own = workers.share(len(drawn.base))
    part = guess_of(student, drawn.base[own].to(device)) if own.start < own.stop else None
    guess = workers.gather(part, len(drawn.base), device).cpu()
    dice = [public_dice(g[None, None], t[None])[0, 1:].mean() for g, t in zip(guess, drawn.classes, strict=True)]
    return torch.stack(dice).argsort(stable=True)[: schedule.batch].tolist()


def synthesise(
    generator: nn.Module | None,
    public: PublicBatch | None,
    batch: int,
    size: int,
    random: torch.Generator,
    device: torch.device,
    own: slice,
) -> Tensor | None:
    """`x = G(z, m)`, `x = G(z)` or the phantom itself: of a batch the volumes `own`, `(B, 4, size, size, size)`.

    Random numbers are drawn for the whole batch, so that they do not depend on the share. `None` for an empty share.
    """
    z = texture = None
    if generator is not None:
        z = torch.randn((batch, int(getattr(generator, "latent"))), generator=random)  # noqa: B009
        if getattr(generator, "mode") == "unconditional":  # noqa: B009
            public = None
        if public is not None:
            texture = torch.randn((batch, 1, size, size, size), generator=random)
    if own.start >= own.stop:
        return None
    base = None if public is None else public.base[own].to(device)
    if generator is None or z is None:
        assert base is not None  # checked at the start of `distill`
        return base
    with autocast_over(device, (size, size, size)):
        if public is None or texture is None:
            x: Tensor = generator(z[own].to(device))
        else:
            labels = one_hot(public.tissues[own].to(device), TISSUES)
            x = generator(z[own].to(device), labels, base, texture[own].to(device))
    return x.float()


def learn_competence(
    state: DistillationState, probs: Tensor, public: PublicBatch, present: list[int], everyone: int
) -> None:
    """Running mean of each answering hospital's Dice on phantoms; a hospital's first answer counts in full."""
    found = public_dice(probs, public.classes.to(probs.device)).cpu()
    if state.dice is None:
        state.dice = torch.full((everyone, probs.shape[2]), float("nan"))
    before = state.dice[present]
    state.dice[present] = torch.where(
        before.isnan(), found, COMPETENCE_MEMORY * before + (1 - COMPETENCE_MEMORY) * found
    )


def learn_log_weights(
    state: DistillationState,
    probs: Tensor,
    public: PublicBatch,
    counts: Tensor,
    present: list[int],
    everyone: int,
    *,
    step: float,
) -> None:
    """A step of the learned weights of the hospitals that answered; the others keep theirs."""
    if state.log_weights is None:
        state.log_weights = torch.zeros(everyone, probs.shape[2])
    before = state.log_weights[present].to(probs.device)
    classes = public.classes.to(probs.device)
    state.log_weights[present] = learn_weights(before, probs, classes, counts, step=step).cpu()


def competence_of(state: DistillationState, objective: GeneratorObjective, present: list[int]) -> Tensor | None:
    """Weights `(K, C)` of the answering hospitals by their Dice on phantoms, as learned there, or both multiplied.

    None before each of them has answered about a phantom; learned weights count from anybody's first answer, with the
    others at weight 1.
    """
    measured = learned = None
    if objective.competence and state.dice is not None and not bool(state.dice[present].isnan().any()):
        measured = competence_weights(state.dice[present], objective.competence)
    if objective.learned and state.log_weights is not None:
        learned = state.log_weights[present].exp()
    if measured is None or learned is None:
        return learned if measured is None else measured
    return measured * learned


def generator_step(
    state: DistillationState,
    hospitals: Hospitals,
    answers: Mapping[str, Mapping[str, Tensor]],
    x: Tensor,
    made: Tensor | None,
    probs: Tensor,
    realism: Tensor | None,
    counts: Tensor,
    public: PublicBatch | None,
    objective: GeneratorObjective,
    number: int,
    weigh: Callable[[Tensor], Tensor],
    workers: Workers,
) -> tuple[Tensor, dict[str, float]]:
    """One step of G; returns the ensemble `(B, C, D, H, W)` and the value of each term.

    `x` is the whole batch, `made` this process's share of it with the graph that made it. `weigh` merges
    `(K, B, C, D, H, W)` into the ensemble, as in the rounds without G.
    """
    generator, optimizer, average = state.generator, state.generator_optimizer, state.generator_average
    assert generator is not None and optimizer is not None and average is not None  # noqa: PT018
    shares = site_shares(counts, dense=probs.dim() > 3)
    leaves = probs.requires_grad_(True)
    own = workers.share(len(x))
    leaf_x = x[own].detach().requires_grad_(True)
    guess, logits = None, None  # of the student: this process's share, and of the whole batch
    q = weigh(leaves)

    terms = {"clarity": (shares * torch.stack([prediction_entropy(p) for p in leaves])).sum()}
    terms["unique"] = DIVERGENCES[objective.divergence](leaves, shares)
    if objective.mask and public is not None:
        terms["mask"] = mask_cross_entropy(q, public.classes.to(x.device))
    if objective.balance:
        uniform = torch.full((probs.shape[2],), 1 / probs.shape[2], device=x.device)
        terms["balance"] = (shares * torch.stack([class_balance(p, uniform) for p in leaves])).sum()
    if objective.transfer:
        if made is not None:
            with autocast_over(leaf_x.device, leaf_x.shape[2:]):
                guess = state.student(leaf_x).float()
        logits = workers.gather(guess, len(x), x.device).requires_grad_(True)
        terms["transfer"] = transfer_divergence(q, logits)

    loss = (
        objective.clarity * terms["clarity"]
        - objective.unique * terms["unique"]
        + objective.mask * terms.get("mask", q.new_zeros(()))
        + objective.balance * terms.get("balance", q.new_zeros(()))
        - objective.transfer * terms.get("transfer", q.new_zeros(()))
    )
    probs_gradient, *rest = torch.autograd.grad(
        loss, [leaves] if logits is None else [leaves, logits], allow_unused=True
    )
    total = torch.zeros_like(leaf_x)
    if guess is not None:
        (total,) = torch.autograd.grad(guess, leaf_x, grad_outputs=rest[0][own])

    present = list(answers)
    if objective.needs_teachers:
        logit_gradients = {
            site: softmax_pull_back(p.detach(), g) for site, p, g in zip(present, probs, probs_gradient, strict=True)
        }
        for pulled in hospitals.pull_back(number, logit_gradients).values():
            total = total + pulled["x_gradient"][own].to(x.device)
    if objective.gan:
        for site, share in zip(present, shares, strict=True):
            total = total + objective.gan * share * answers[site]["x_gradient"][own].to(x.device)

    optimizer.zero_grad(set_to_none=True)
    if made is not None:
        made.backward(gradient=total)
    workers.sum_gradients(generator)
    nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
    optimizer.step()
    average.update_parameters(generator)
    values = {name: float(term.detach()) for name, term in terms.items()}
    if realism is not None:
        values["realism"] = float(realism.mean())
        values |= {f"realism:{site}": float(score.mean()) for site, score in zip(present, realism, strict=True)}
    return q.detach(), values


def softmax_pull_back(probs: Tensor, gradient: Tensor) -> Tensor:
    """`d loss / d logits` from `d loss / d probs`, softmax over dim 1: `p (g - sum_c p_c g_c)`; all `(B, C, ...)`."""
    return probs * (gradient - (probs * gradient).sum(dim=1, keepdim=True))
