from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums come in another order with another number of threads, and many tests compare to the bit."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def project_root() -> Path:
    return ROOT


@pytest.fixture
def shared() -> Path:
    """Reference data that is not part of the project: $BOSSNAS_SHARED, or ../shared beside the checkout."""
    folder = Path(os.environ.get("BOSSNAS_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set BOSSNAS_SHARED)")
    return folder
