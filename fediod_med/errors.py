"""The errors a user can meet.

```
FediodError
├── InputError        a scan, label map or folder is not what it should be
│   ├── GeometryError shapes, affines or spacings contradict each other
│   └── LabelError    a label map holds a value its scheme does not know
├── SettingsError     a site file, option or combination of options is wrong
├── WeightsError      weights lack provenance or do not fit the network
├── ProtocolError     a message between centre and hospital is malformed
├── WorkerError       another process of a run with several ended
└── PrivacyError      a privacy promise cannot be made, kept or checked
    └── BudgetExceeded the next release or training would cost more than the site's budget
```

Each message says what was expected, what was found, where, and what to do. The library raises; the command line
prints the message on one line and exits with code 2.
"""

from __future__ import annotations


class FediodError(Exception):
    """Base of every error that a user can act on."""


class InputError(FediodError):
    """A scan, label map, table or folder is not what it should be.

    Attributes:
        code: of the finding that stands for it (`findings.CATALOGUE`).
    """

    def __init__(self, message: str = "", *, code: str = "E104") -> None:
        """`code` defaults to that of a file that cannot be read as a scan."""
        super().__init__(message)
        self.code = code


class GeometryError(InputError):
    """Shapes, affines or spacings contradict each other."""


class LabelError(InputError):
    """A label map holds a value that its declared scheme does not know."""


class SettingsError(FediodError):
    """A site file, an option or a combination of options is wrong."""


class WeightsError(FediodError):
    """Weights lack provenance, or do not fit the network they are loaded into."""


class ProtocolError(FediodError):
    """A message between the centre and a hospital is malformed."""


class WorkerError(FediodError):
    """Another process of a run with several processes ended; what it met stands in its own message."""


class PrivacyError(FediodError):
    """A privacy promise cannot be made, kept or checked: mechanism, policy, ledger, key or network."""


class BudgetExceeded(PrivacyError):  # noqa: N818 (an event of normal operation: the budget is spent)
    """The next release or training would cost more than the site's budget allows; nothing was computed."""
