"""One thread per process: tests run in several side by side, and killed runs continue to the same bytes."""

import gc
import os
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    """A property holds on a busy machine as well, where hypothesis would fail an example that takes a fifth of a second."""
    from hypothesis import settings

    settings.register_profile("vlaflow", deadline=None)
    settings.load_profile("vlaflow")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch  # not above: the process that only distributes tests reads this file as well

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make millions of objects that stay: looking among them for garbage is a third of what collecting tests takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
