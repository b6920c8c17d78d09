"""Which generation of several a training or a distillation is, and its share of what they do together."""

from __future__ import annotations

from dataclasses import dataclass

from fediod_med.errors import SettingsError


@dataclass(frozen=True)
class Generation:
    """Number `number` of `of`, counted from 1; the only one by default.

    Raises:
        SettingsError: there is no such generation.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        """Refuse what is not one of them."""
        if not 1 <= self.number <= self.of:
            raise SettingsError(f"generation: expected 1 to {max(self.of, 1)} of as many, found {self}")

    def __str__(self) -> str:
        """As on the command line, `2/3`."""
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Generation:
        """From `2/3`; `SettingsError` for anything else."""
        number, slash, of = text.partition("/")
        if not (slash and number.strip().isdecimal() and of.strip().isdecimal()):
            raise SettingsError(f"generation: expected its number and how many there are, such as 2/3, found {text!r}")
        return cls(int(number), int(of))

    @property
    def reseed(self) -> int:
        """What is added to the seed of public draws, so that each generation draws others; 0 for the first."""
        return 7_919 * (self.number - 1)

    @property
    def last(self) -> bool:
        """Whether no other follows."""
        return self.number == self.of

    def share(self, total: int) -> tuple[int, int]:
        """The part `(first, last)` of `range(total)` that this generation does; all generations together do it all.

        Raises:
            SettingsError: fewer than there are generations, so that one of them would have nothing to do.
        """
        if total < self.of:
            raise SettingsError(f"generation: expected {self.of} or more to share among as many, found {total}")
        return total * (self.number - 1) // self.of, total * self.number // self.of
