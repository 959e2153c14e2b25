"""Two processes that trained together, and a data set on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import flybot
from tests.training.small import write_dataset


@pytest.fixture(scope="session")
def together(tmp_path_factory) -> Path:
    """What two processes left that trained together; one start for all tests, for it takes longer than the trainings."""
    out = tmp_path_factory.mktemp("together")
    write_dataset(out / "flybot/dataset")
    flybot.write_latent(out / "flybot/latent")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.together", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Six episodes of two tasks, a moving square in one view."""
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")
