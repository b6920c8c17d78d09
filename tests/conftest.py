"""Fixtures that several test files use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _torch_uses_no_more_threads_than_cores() -> None:
    """Inside a container torch may see the cores of the whole machine; more threads than cores make it crawl."""
    import torch

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), available)))


@pytest.fixture(autouse=True)
def _main_module_stays() -> Iterator[None]:
    """Streamlit puts a page in the place of `__main__`, and processes spawned later would run that page."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans beside the checkout; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real scans are absent: ../shared/data does not exist beside this checkout")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, fresh for each test."""
    return np.random.default_rng(20261124)
