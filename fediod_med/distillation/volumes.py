"""The volumes of a run that has ended: made by the averaged generator, or those that hospitals answered about."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fediod_med.data.sampler import PublicBatch, PublicSampler, upright
from fediod_med.distillation.generating import synthesise
from fediod_med.distillation.settings import Schedule, asking_rounds
from fediod_med.distillation.state import DistillationState


def synthetic_volumes(
    state: DistillationState,
    *,
    sampler: PublicSampler | None,
    count: int,
    size: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Volumes of the averaged generator with the class map that conditioned them, if any; one `(4, D, H, W)` a time.

    They lie as the heads do (axes right, anterior, superior); an unconditional generator names no sides.
    """
    made = final_volumes(state, sampler=sampler, count=count, size=size, seed=seed, device=device)
    return ((x, None if public is None else public.classes[0]) for x, public in made)


def final_volumes(
    state: DistillationState,
    *,
    sampler: PublicSampler | None,
    count: int,
    size: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, PublicBatch | None]]:
    """`synthetic_volumes` with the phantom each was made from, a batch of one; both lie as the heads do."""
    source = None if state.generator_average is None else state.generator_average.module
    if source is not None:
        source.eval()
        if state.generator is not None and state.generator.mode == "unconditional":
            sampler = None
    for index in range(count):
        random = torch.Generator().manual_seed(seed * 1_000_003 + index)
        public = None if sampler is None else sampler.draw(10_000_000 + index, 1)
        with torch.no_grad():
            x = synthesise(source, public, 1, size, random, device, slice(0, 1))
        assert x is not None  # the share is the whole batch of one
        x = x.cpu()
        yield (x[0], None) if public is None else (upright(x, public.mirrored)[0], public.upright())


def asked_volumes(
    state: DistillationState, *, schedule: Schedule, sampler: PublicSampler | None, count: int
) -> tuple[Tensor, PublicBatch | None]:
    """The newest volumes of the generator that hospitals answered about, from the replay buffer; nothing is made anew.

    At most one for each phantom, so that none weighs twice.

    Args:
        state: of a run with a generator.
        schedule: of that run.
        sampler: of that run; `None` for an unconditional generator.
        count: at most so many.

    Returns:
        `(N, 4, D, H, W)`, N may be 0, and the phantoms they were made from; both lie as the heads do.
    """
    chosen: list[Tensor] = []
    phantoms: dict[int, PublicBatch] = {}
    oldest = state.round - len(state.replay)  # the pair at the front is of the round after this one
    for number in reversed(asking_rounds(schedule, public=sampler is not None)):
        if not oldest < number <= state.round:
            continue
        pair = state.replay[number - oldest - 1]
        x, drawn = pair["x"].float(), None
        if sampler is not None:
            drawn = sampler.draw(number, schedule.batch * schedule.candidates).some(pair["chosen"].tolist())
        for index in range(len(x)):
            if len(chosen) == count:
                break
            if drawn is None:
                chosen.append(x[index])
                continue
            one = drawn.only(index)
            if (phantom := int(one.phantoms)) not in phantoms:
                chosen.append(upright(x[index : index + 1], one.mirrored)[0])
                phantoms[phantom] = one.upright()
    if not chosen:
        return torch.empty(0), None
    return torch.stack(chosen), PublicBatch.of(list(phantoms.values())) if phantoms else None
