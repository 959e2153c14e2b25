"""One thread per process: tests run in several side by side, and killed runs continue to the same bytes."""

import os
from pathlib import Path

import pytest
import torch

LONG = (
    "evaluation/test_commands.py",
    "training/test_layouts.py",
    "simulators/test_libero.py",
    "evaluation/test_episode_log.py",
    "end_to_end/test_plugin.py",
    "simulators/test_libero_experts.py",
    "flows/test_discrete.py",
    "training/test_iflybot.py",
    "training/test_run.py",
    "benchmarks/test_smoke.py",
)
"""Files that take longest; they come first, so that at the end no process waits for one of them."""


def pytest_collection_modifyitems(items):
    """Order files, not the tests within them."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
