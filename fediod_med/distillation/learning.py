"""How the student learns from the replay buffer and from the simulator."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from fediod_med.data.sampler import PublicBatch, PublicSampler
from fediod_med.data.transforms import flip_together, jitter, mix_pairs
from fediod_med.devices import autocast_over
from fediod_med.distillation.settings import HELD_OUT_EVERY, Schedule
from fediod_med.distillation.state import DistillationState
from fediod_med.losses import (
    soft_dice,
    transfer_divergence,
)
from fediod_med.networks import one_hot
from fediod_med.parallel import Workers

CLASSES = 4
REHEARSAL_DRAWS = 20_000_000  # the sampler's draws from here on are the student's own; rounds count from 1


def replay_pair(x: Tensor, q: Tensor, public: PublicBatch | None, chosen: list[int]) -> dict[str, Tensor]:
    """What the replay buffer keeps of a round, fp16 on the CPU; `chosen` are its volumes among those drawn."""
    pair = {"x": x.detach().half().cpu(), "q": q.detach().half().cpu()}
    if public is not None:
        pair |= {"classes": public.classes.to(torch.uint8), "chosen": torch.tensor(chosen)}
    return pair


def is_held_out(number: int, schedule: Schedule) -> bool:
    """Whether the pair of a round is kept out of the replay buffer, to select the student by.

    Every fifth round of the first half: all candidates of the second half are judged by the same set.
    """
    return schedule.selection and number % HELD_OUT_EVERY == 0 and 2 * number <= schedule.rounds


def consider(
    state: DistillationState, schedule: Schedule, number: int, device: torch.device, workers: Workers
) -> dict[str, float]:
    """Judge the averaged student by the pairs held out, at every eighth of the run from the half on; keep the best.

    The loss is that of its training, `KL(q || S) + soft Dice(S, q)`, mean over the pairs. A student with a loss that is
    no number is never the best.
    """
    eighth = max(1, schedule.rounds // 8)
    due = number == schedule.rounds or (2 * number >= schedule.rounds and number % eighth == 0)
    if not state.held_out or not due:
        return {}
    loss = workers.led(partial(_held_out_loss, state, device))
    if math.isfinite(loss) and (state.best is None or loss < state.best["loss"]):
        weights = {name: t.detach().cpu().clone() for name, t in state.student_average.module.state_dict().items()}
        state.best = {"loss": loss, "round": number, "weights": weights}
    return {"held_out": loss}


def take_best(state: DistillationState) -> None:
    """Make the selected student the result; without a selection the last one stays."""
    if state.best is not None:
        state.student_average.module.load_state_dict(state.best["weights"])


def _held_out_loss(state: DistillationState, device: torch.device) -> float:
    student = state.student_average.module.eval()
    losses = []
    for pair in state.held_out:
        x, target = pair["x"].to(device).float(), pair["q"].to(device).float()
        with torch.no_grad(), autocast_over(x.device, x.shape[2:]):
            logits = student(x).float()
        losses.append(_agreement_loss(logits, target))
    return float(torch.stack(losses).mean())


def _agreement_loss(logits: Tensor, target: Tensor) -> Tensor:
    """`KL(q || S)`, and for voxels soft Dice besides; both `(B, C, ...)`."""
    loss = transfer_divergence(target, logits)
    return loss + soft_dice(torch.softmax(logits, dim=1), target) if target.dim() > 2 else loss


def student_steps(
    state: DistillationState,
    schedule: Schedule,
    number: int,
    sampler: PublicSampler | None,
    random: torch.Generator,
    device: torch.device,
    workers: Workers,
) -> dict[str, float]:
    """Steps on the replay buffer: `KL(q || S) + soft Dice(S, q)`, with the label map blended in by `truth`.

    A share `rehearsal` of each batch comes from the simulator instead, with its label map alone as the target. Class
    answers have no overlap, so `KL(q || S)` alone, and an image is not mirrored or changed in contrast: that may make
    it one of another class. Every process makes the whole batch, and the student sees its own share of it. Numbers are
    drawn on the CPU and volumes changed on the device, where that takes no time.
    """
    losses: list[Tensor] = []
    rehearsed = round(schedule.rehearsal * schedule.student_batch)
    volumes = [(i, j) for i, pair in enumerate(state.replay) for j in range(pair["x"].shape[0])]
    for step in range(schedule.student_steps):
        done = (number - 1) * schedule.student_steps + step
        rate = _learning_rate(done, schedule.rounds * schedule.student_steps) * schedule.student_rate
        for group in state.student_optimizer.param_groups:
            group["lr"] = rate
        public = rehearsed if sampler is not None else 0
        chosen = torch.randint(len(volumes), (schedule.student_batch - public,), generator=random).tolist()
        batch = [{name: t[j] for name, t in state.replay[i].items()} for i, j in (volumes[c] for c in chosen)]
        x = torch.stack([b["x"] for b in batch]).to(device).float()
        target = torch.stack([b["q"] for b in batch]).to(device).float()
        if schedule.truth and "classes" in batch[0]:
            truth = one_hot(torch.stack([b["classes"] for b in batch]).to(device), CLASSES)
            target = (1 - schedule.truth) * target + schedule.truth * truth
        if sampler is not None and public:
            phantoms = sampler.draw(REHEARSAL_DRAWS + done, public)
            x = torch.cat([x, phantoms.base.to(device)])
            target = torch.cat([target, one_hot(phantoms.classes.to(device), CLASSES)])
        dense = target.dim() > 2
        if dense:
            x, target = flip_together([jitter(x, random), target], random)
        if schedule.mixup:
            x, target = mix_pairs([x, target], random)
        own = workers.share(len(x))
        with autocast_over(x.device, x.shape[2:]):
            guess = state.student(x[own])
        guess = guess.float()
        logits = workers.gather(guess, len(target), device).requires_grad_(True)
        loss = _agreement_loss(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        state.student_optimizer.zero_grad(set_to_none=True)
        guess.backward(gradient=gradient[own])
        workers.sum_gradients(state.student)
        nn.utils.clip_grad_norm_(state.student.parameters(), 5.0)
        state.student_optimizer.step()
        state.student_average.update_parameters(state.student)
        losses.append(loss.detach())
    return {"student": sum(map(float, losses)) / len(losses)} if losses else {}


def _learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up over a tenth of the steps, cosine to 0 over all of them."""
    warm_up = max(1, steps // 10)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def guess_of(student: nn.Module, x: Tensor) -> Tensor:
    """The student's probabilities `(B, C, D, H, W)`; it is left in training, and no random number is drawn."""
    student.eval()
    with torch.no_grad(), autocast_over(x.device, x.shape[2:]):
        logits = student(x.detach())
    student.train()
    return torch.softmax(logits.float(), dim=1)
