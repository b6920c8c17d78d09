"""The private gradient step: one patient's gradient at a time, clipped in float64, summed, noised, then averaged.

The engine is Opacus' `DPOptimizer`: its protocol of skipped steps (clip and accumulate now, noise later) is used with a
physical batch of one patient. Gradients of single patients come from plain backward passes, one patient after the
other. That needs no per-patient copy of the weights, works for every architecture, cannot mix patients, and for
three-dimensional convolutions costs about as much as one batch (`benchmarks/dp_sgd.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

from fediod_med.errors import PrivacyError
from fediod_med.privacy.noise import NoiseSource, OsNoise


def clip_factor(norm: float, clip_norm: float) -> float:
    """`min(1, C / norm)` (Abadi et al. 2016, algorithm 1); 0 for a norm that is not finite: such a patient is null."""
    if not math.isfinite(norm):
        return 0.0
    return 1.0 if norm <= clip_norm else clip_norm / norm


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """`DPOptimizer` whose samples are patients and whose noise comes from the operating system.

    Per step: `add_patient` once for each patient of the Poisson draw, then `noised_gradient` and `descend`. A draw
    without patients is a step like any other: noise alone.

    Args:
        optimizer: of the trained parameters.
        noise_multiplier: sigma; the noise on the sum has standard deviation `sigma * C`.
        clip_norm: C, of the joint gradient of all trained parameters of one patient.
        expected_patients: q * n, the constant by which the noised sum is divided, whatever was drawn.
        source: of the noise.

    Raises:
        PrivacyError: a number is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_patients: float,
        source: NoiseSource | None = None,
    ) -> None:
        if not (noise_multiplier >= 0 and clip_norm > 0 and expected_patients > 0):
            raise PrivacyError(
                "private training: expected a noise multiplier of at least 0, a clip norm and q * n above 0, found "
                f"{noise_multiplier}, {clip_norm} and {expected_patients}"
            )
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_patients,
            loss_reduction="mean",
        )
        self._source: NoiseSource = OsNoise() if source is None else source

    def add_patient(self) -> float:
        """Clip the gradient that now stands in `.grad` as one patient's, add it to the sum, and clear `.grad`.

        Returns:
            Norm before clipping: private, for tests only; it must not be logged.
        """
        for p in self.params:
            p.grad_sample = (torch.zeros_like(p) if p.grad is None else p.grad).unsqueeze(0)
        self.clip_and_accumulate()
        norm = self._last_norm
        for p in self.params:
            p.grad_sample = p.grad = None
        return norm

    def clip_and_accumulate(self) -> None:
        """Clip `grad_sample` `(patients, ...)` jointly over all parameters and add to `summed_grad`, in float64."""
        samples = self.grad_samples
        factors = []
        for i in range(len(samples[0])):
            # The squares of float32 gradients are summed in float64: the bound must hold for large networks too.
            norms = [torch.linalg.vector_norm(s[i], dtype=_wide(s)) for s in samples]
            self._last_norm = float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))
            factors.append(clip_factor(self._last_norm, self.max_grad_norm))
        for p, sample in zip(self.params, samples, strict=True):
            _check_processed_flag(p.grad_sample)
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p, dtype=_wide(p))
            for row, factor in zip(sample, factors, strict=True):
                if factor > 0:  # 0 * inf would be nan
                    p.summed_grad.add_(row, alpha=factor)
            _mark_as_processed(p.grad_sample)

    def add_noise(self) -> None:
        """Set `.grad` to the sum plus noise of standard deviation sigma * C per coordinate, added in float64.

        The sum is rounded to the parameters' type (float32) and, unlike what the gate releases, not put on a grid: the
        Gaussian's guarantee holds for it up to floating-point rounding, so its low bits could tell something of the sum
        (Mironov 2012). They are not seen: weights and optimiser state never leave the site, and what does is computed
        from outputs of the network after many such steps. Whoever publishes the weights themselves gives this up.
        """
        for p in self.params:
            _check_processed_flag(p.summed_grad)
            noise = torch.from_numpy(self._source.normal(tuple(p.shape))).to(p.summed_grad)
            p.grad = p.summed_grad.add(noise, alpha=self.noise_multiplier * self.max_grad_norm).to(p.dtype)
            _mark_as_processed(p.summed_grad)

    def scale_grad(self) -> None:
        """Divide by the constant q * n; never by the number of patients that were drawn."""
        for p in self.params:
            p.grad /= self.expected_batch_size

    def noised_gradient(self) -> None:
        """Close the draw: `.grad` becomes the private estimate of the mean gradient; step hooks are called once."""
        for p in self.params:
            p.grad_sample = p.new_zeros((0, *p.shape))
        self.pre_step()

    def add_public(self, gradient: Sequence[Tensor], *, weight: float) -> None:
        """Mix a public gradient into the noised one: `(1 - w) * private + w * clip_C(public)`. Costs no privacy.

        The public gradient is clipped to the same C, so that w is the share of the two populations and not of their
        gradient norms.

        Args:
            gradient: one tensor per trained parameter, of a mean loss over public rows.
            weight: w, in [0, 1].
        """
        mix_public(self.params, gradient, weight=weight, clip_norm=self.max_grad_norm)

    def descend(self) -> None:
        """Step of the underlying optimiser on what stands in `.grad`; then forget the draw."""
        self.original_optimizer.step()
        self.zero_grad(set_to_none=True)


def patient_gradient(loss_of: Callable[[slice], Tensor], rows: int, physical_batch: int) -> None:
    """Backward pass of one patient: `.grad` becomes the gradient of the mean loss over all its rows.

    Args:
        loss_of: losses `(r,)` of a slice of the patient's rows; called for one slice after the other.
        rows: of this patient.
        physical_batch: rows in memory at once.

    Raises:
        PrivacyError: the loss is not one number per row.
    """
    for start in range(0, rows, physical_batch):
        part = slice(start, min(start + physical_batch, rows))
        losses = loss_of(part)
        if losses.shape != (part.stop - part.start,):
            raise PrivacyError(
                f"private training: expected one loss per row, shape ({part.stop - part.start},), found "
                f"{tuple(losses.shape)}; use a loss without reduction over rows"
            )
        (losses.sum() / rows).backward()


def mix_public(
    parameters: Sequence[nn.Parameter], gradient: Sequence[Tensor], *, weight: float, clip_norm: float
) -> None:
    """Replace each `.grad` by `(1 - w) * .grad + w * clip_C(gradient)`, clipped jointly."""
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient])))
    factor = clip_factor(norm, clip_norm)
    for p, g in zip(parameters, gradient, strict=True):
        assert p.grad is not None, "the private gradient comes first"
        p.grad.mul_(1 - weight)
        if factor > 0:
            p.grad.add_(g, alpha=weight * factor)


def public_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of a loss on public data; zeros for parameters that it does not reach."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
