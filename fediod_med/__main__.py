"""`python -m fediod_med`: the command line, as `fediod`; also what `torchrun -m` starts."""

from __future__ import annotations

from fediod_med.cli.main import main

if __name__ == "__main__":
    main()
