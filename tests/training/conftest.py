"""One thread, as the killed and continued runs have, and a data set on disk."""

import os
from pathlib import Path

import pytest
import torch

from tests.training.small import write_dataset


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Six episodes of two tasks, a moving square in one view."""
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")
