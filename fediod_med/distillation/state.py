"""Everything that changes during a distillation, and how it begins or is restored."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fediod_med.checkpoints import load_state
from fediod_med.distillation.settings import Schedule
from fediod_med.errors import WeightsError
from fediod_med.networks import Generator

logger = logging.getLogger(__name__)


@dataclass
class DistillationState:
    """Everything that changes during a run; saved and restored as one."""

    student: nn.Module
    student_average: AveragedModel
    student_optimizer: torch.optim.Optimizer
    generator: Generator | None
    generator_average: AveragedModel | None
    generator_optimizer: torch.optim.Optimizer | None
    replay: deque[dict[str, Tensor]]
    counts: Tensor | None = None
    dice: Tensor | None = None  # (K, C), running mean of the teachers' Dice on phantoms
    log_weights: Tensor | None = None  # (K, C), learned on phantoms
    held_out: list[dict[str, Tensor]] = field(default_factory=list)  # pairs that the student does not learn from
    best: dict[str, Any] | None = None  # the selected student: its loss on them, its round, its weights
    round: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        state: dict[str, Any] = {
            "student": self.student.state_dict(),
            "student_average": self.student_average.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "replay": list(self.replay),
            "counts": self.counts,
            "dice": self.dice,
            "log_weights": self.log_weights,
            "held_out": self.held_out,
            "best": self.best,
            "round": self.round,
            "history": self.history,
        }
        if self.generator is not None and self.generator_average is not None and self.generator_optimizer is not None:
            state["generator"] = self.generator.state_dict()
            state["generator_average"] = self.generator_average.state_dict()
            state["generator_optimizer"] = self.generator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; `WeightsError` when it stems from other networks."""
        if ("generator" in state) != (self.generator is not None):
            raise WeightsError("checkpoint: one of the runs has a generator, the other has none")
        try:
            self._load(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise WeightsError(f"checkpoint: does not fit these networks ({str(error).splitlines()[-1]})") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.student_average.load_state_dict(state["student_average"])
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        if self.generator is not None and self.generator_average is not None and self.generator_optimizer is not None:
            self.generator.load_state_dict(state["generator"])
            self.generator_average.load_state_dict(state["generator_average"])
            self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.replay.clear()
        self.replay.extend(state["replay"])
        self.counts = state["counts"]
        self.dice = state["dice"]
        self.log_weights = state.get("log_weights")  # older checkpoints have none of these three
        self.held_out = state.get("held_out", [])
        self.best = state.get("best")
        self.round = state["round"]
        self.history = state["history"]


def begin(
    student: nn.Module, generator: Generator | None, schedule: Schedule, device: torch.device
) -> DistillationState:
    """The state before the first round: networks on `device`, their optimisers and averages, an empty replay buffer."""
    student = student.to(device).train()
    average = get_ema_multi_avg_fn(schedule.ema)
    state = DistillationState(
        student=student,
        student_average=AveragedModel(student, multi_avg_fn=average),
        student_optimizer=torch.optim.AdamW(student.parameters(), lr=schedule.student_rate, weight_decay=1e-4),
        generator=None,
        generator_average=None,
        generator_optimizer=None,
        replay=deque(maxlen=schedule.replay),
    )
    if generator is not None:
        generator = generator.to(device).train()
        state.generator = generator
        # A generator takes few steps: an average that begins slow would still be the generator it started from.
        state.generator_average = AveragedModel(generator, avg_fn=partial(warmed_average, decay=schedule.ema))
        state.generator_optimizer = torch.optim.Adam(
            generator.parameters(), lr=schedule.generator_rate, betas=(0.5, 0.999)
        )
    return state


def warmed_average(average: Tensor, now: Tensor, steps: Tensor | int, *, decay: float) -> Tensor:
    """Exponential average whose decay after n steps is `min(decay, (1 + n) / (10 + n))`: it forgets the start."""
    n = torch.as_tensor(steps).double()  # read by no one, so a GPU need not wait
    return average + (now - average) * (1 - ((1 + n) / (10 + n)).clamp(max=decay)).to(now)


def resumed(state: DistillationState, checkpoint: Path | None) -> dict[str, Any]:
    """Continue from a checkpoint, if there is one; gives what the state then holds."""
    if checkpoint is not None and checkpoint.is_file():
        try:
            state.load_state_dict(load_state(checkpoint))
        except WeightsError as error:
            raise WeightsError(f"{checkpoint}: {error}; resume with the settings the run was started with") from error
        logger.info("resumed after round %d", state.round)
    return state.state_dict()
