"""How a hospital's discriminator differs from the plain one."""

from __future__ import annotations

from dataclasses import dataclass

from fediod_med.errors import SettingsError


@dataclass(frozen=True)
class CriticDesign:
    """Design of a discriminator without privacy; by default the plain one.

    The parts can be combined; the penalty is then of what the discriminator sees, augmented and with the teacher's
    answer as an input of its own.

    A private discriminator is always the plain one: per-patient clipping bounds what a patient can change in one
    network that sees one patient's patches by themselves, and was analysed for that network alone.

    Attributes:
        scales: discriminators, of which number s sees the volume average-pooled by 2^s; realism and loss are means over
            them (Wang et al. 2018, arXiv 1711.11585).
        augment: whether real and synthetic volumes are changed at random, differentiably, before they are judged (Zhao
            et al. 2020, arXiv 2006.10738); see `augmentation.draw_augmentation`.
        penalty: gamma of the gradient penalty `gamma / 2 E |grad_x D(x)|^2` on real patches, D the mean patch logit
            (R1; Mescheder et al. 2018, arXiv 1801.04406); 0 for none.
        spectral: whether each convolution is divided by its largest singular value (Miyato et al. 2018, arXiv
            1802.05957).
        joint: whether the discriminator judges pairs of a volume and the hospital's own teacher's class probabilities
            of it.
    """

    scales: int = 1
    augment: bool = False
    penalty: float = 0.0
    spectral: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        """Refuse what no discriminator can be."""
        if self.scales < 1 or not 0 <= self.penalty < float("inf"):
            raise SettingsError(
                f"discriminator: expected at least one scale and a penalty of 0 or more, found scales {self.scales}, "
                f"penalty {self.penalty:g}"
            )

    @property
    def plain(self) -> bool:
        """Whether this is the discriminator that private hospitals have as well."""
        return self == CriticDesign()
