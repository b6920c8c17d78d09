"""Private gradients in the few directions that public gradients span, so that noise falls on dozens of numbers.

Noise on all d parameters has norm sigma * C * sqrt(d), which for a U-Net of a million parameters drowns the gradient
of a few hundred patients. The gradients of public phantoms at the same weights span k directions (k << d) in which most
of the patients' gradient lies. Each patient's gradient is projected on them, the k coefficients are clipped and noised,
and the result is mapped back. (Zhou, Wu and Banerjee 2021, ICLR, "Bypassing the ambient dimension", algorithm 1, with
the clipping after the projection; Yu et al. 2021, ICLR, "Do not let privacy overbill utility", without their residual.)

The basis is computed from public data and from weights that were released to this very mechanism before: it costs no
privacy, and the bound on a patient's influence is that of the clipped coefficients, whatever the basis is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fediod_med.errors import PrivacyError
from fediod_med.privacy.noise import NoiseSource
from fediod_med.privacy.optimizer import PatientOptimizer, mix_public

# Gradients projected in one product: reading the basis, hundreds of megabytes, is what a projection costs.
_TOGETHER = 8
# Directions of less than this share of the largest eigenvalue are rounding.
_SPANNED = 1e-5


def public_basis(gradients: Iterable[Sequence[Tensor]]) -> Tensor:
    """Orthonormal basis of the span of public gradients, each scaled to length 1 first.

    By the eigenvectors of their k x k Gram matrix, which costs one product where a QR of d x k costs ten.

    Args:
        gradients: k of them, each one tensor per trained parameter.

    Returns:
        `(k, d)` float32 with orthonormal rows, d the number of trained numbers; where the gradients span fewer than k
        directions, the other rows are zero.

    Raises:
        PrivacyError: none given, or a gradient that is not finite.
    """
    found = [flatten(gradient) for gradient in gradients]
    if not found:
        raise PrivacyError("public subspace: expected at least one public gradient, found none")
    rows = torch.stack([gradient / gradient.norm().clamp_min(1e-20) for gradient in found])
    if not bool(torch.isfinite(rows).all()):
        raise PrivacyError("public subspace: expected finite public gradients, found NaN or Inf; lower the rate")
    lengths, vectors = torch.linalg.eigh((rows @ rows.T).double())
    scale = torch.where(lengths > _SPANNED * lengths.max(), lengths.clamp_min(1e-30).rsqrt(), 0.0)
    basis: Tensor = (vectors * scale).T.float() @ rows
    return basis


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One float32 vector of all entries, tensor after tensor."""
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`, in shapes and types of `like`."""
    sizes = [tensor.numel() for tensor in like]
    return [part.reshape(t.shape).to(t.dtype) for part, t in zip(vector.split(sizes), like, strict=True)]


def signal_to_noise(*, noise_multiplier: float, expected_patients: float, dimensions: int) -> float:
    """`r = q n / (sigma sqrt(k))`: the clip norm over the norm of the noise on the k averaged coefficients.

    No step of a private training can carry a larger signal: every patient's gradient has at most the clip norm.

    Args:
        noise_multiplier: sigma.
        expected_patients: q * n.
        dimensions: k.
    """
    if noise_multiplier == 0 or dimensions == 0:
        return math.inf
    return expected_patients / (noise_multiplier * math.sqrt(dimensions))


def public_share(least: float, *, noise_multiplier: float, expected_patients: float, dimensions: int) -> float:
    """Share of the public gradient in a step, larger the more the noise drowns the private one.

    `1 - (1 - least) * min(1, r / 2)` with r of `signal_to_noise`. Below r = 2 each step leans on public data, so that
    training with few patients or a small budget falls back on rehearsal instead of following noise. Only planned
    numbers enter: it costs nothing.

    Args:
        least: share where noise is small.
        noise_multiplier: sigma.
        expected_patients: q * n.
        dimensions: k.
    """
    ratio = signal_to_noise(
        noise_multiplier=noise_multiplier, expected_patients=expected_patients, dimensions=dimensions
    )
    return 1 - (1 - least) * min(1.0, ratio / 2)


class SubspaceOptimizer:
    """`PatientOptimizer` on the coefficients of a public basis, with the same protocol of one step.

    Args:
        optimizer: of the trained parameters.
        dimensions: k.
        noise_multiplier: sigma; the noise on each summed coefficient has standard deviation `sigma * C`.
        clip_norm: C, of one patient's k coefficients.
        expected_patients: q * n.
        source: of the noise.

    Raises:
        PrivacyError: a number is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        dimensions: int,
        noise_multiplier: float,
        clip_norm: float,
        expected_patients: float,
        source: NoiseSource | None = None,
    ) -> None:
        self.original_optimizer = optimizer
        self.params: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.max_grad_norm = clip_norm
        self._basis: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._coefficients = nn.Parameter(torch.zeros(dimensions, device=self.params[0].device))
        # Never stepped: it clips, sums and noises the coefficients, with the code that noises whole gradients.
        self._private = PatientOptimizer(
            torch.optim.SGD([self._coefficients], lr=0.0),
            noise_multiplier=noise_multiplier,
            clip_norm=clip_norm,
            expected_patients=expected_patients,
            source=source,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the underlying optimiser."""
        return self.original_optimizer.param_groups

    def set_basis(self, basis: Tensor) -> None:
        """The directions of the steps to come, `(k, d)`; between two steps only."""
        expected = (self._coefficients.numel(), sum(p.numel() for p in self.params))
        if tuple(basis.shape) != expected:
            raise PrivacyError(f"public subspace: expected a basis of shape {expected}, found {tuple(basis.shape)}")
        self._basis = basis.to(self._coefficients)

    def add_patient(self) -> None:
        """Take the gradient that stands in `.grad` as one patient's, and clear `.grad`."""
        self._waiting.append(flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]))
        for p in self.params:
            p.grad = None
        if len(self._waiting) == _TOGETHER:
            self._project()

    def noised_gradient(self) -> None:
        """Close the draw: `.grad` becomes the private estimate of the mean gradient within the subspace."""
        self._project()
        self._private.noised_gradient()
        noised = self._coefficients.grad
        assert noised is not None, "just set"
        back = noised @ self._directions()
        for p, gradient in zip(self.params, unflatten(back, self.params), strict=True):
            p.grad = gradient

    def add_public(self, gradient: Sequence[Tensor], *, weight: float) -> None:
        """As `PatientOptimizer.add_public`: the public gradient is not projected."""
        mix_public(self.params, gradient, weight=weight, clip_norm=self.max_grad_norm)

    def descend(self) -> None:
        """Step of the underlying optimiser on what stands in `.grad`; then forget the draw."""
        self.original_optimizer.step()
        self.zero_grad(set_to_none=True)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget gradients and coefficients."""
        self._waiting.clear()
        self.original_optimizer.zero_grad(set_to_none=set_to_none)
        self._private.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Of the underlying optimiser; the basis is computed anew from public data."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the underlying optimiser."""
        self.original_optimizer.load_state_dict(state)

    def _project(self) -> None:
        """Coefficients of the waiting gradients, each patient's clipped and added."""
        if not self._waiting:
            return
        coefficients = torch.stack(self._waiting) @ self._directions().T
        self._waiting.clear()
        for row in coefficients:
            self._coefficients.grad = row.clone()
            self._private.add_patient()

    def _directions(self) -> Tensor:
        if self._basis is None:
            raise PrivacyError("public subspace: expected a basis before the first patient, found none")
        return self._basis
