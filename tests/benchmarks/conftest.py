"""Benchmarks among other tests."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _among_other_tests(monkeypatch):
    """They get their threads back, and do not search all that other tests have imported for garbage before every round."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(gc, "collect", lambda: 0)
    yield
    gc.freeze()  # as after collecting the tests; a benchmark ends with the opposite
    torch.set_num_threads(threads)
