"""One thread, as the killed and continued runs have, and a data set on disk."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.small import SPEC
from vlaflow.data.writer import Writer


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Six episodes of two tasks, a moving square in one view."""
    root = tmp_path_factory.mktemp("data") / "dataset"
    with Writer(
        root,
        fps=10,
        action_spec=SPEC,
        state_names=("x", "y", "z"),
        views={"front": (32, 32)},
        robot_type="test",
        provenance={},
    ) as writer:
        for episode in range(6):
            rng = np.random.default_rng(episode)
            length = 9 + episode
            images = rng.integers(0, 256, (length, 32, 32, 3), np.uint8)
            state = rng.standard_normal((length, 3)).astype(np.float32)
            action = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
            writer.add({"front": images}, state, action, ("push the puck", "open the drawer")[episode % 2])
    return root
