"""A data set on disk, and what was trained on it."""

from pathlib import Path

import pytest

from tests.training import flybot
from tests.training.small import write_dataset
from vlaflow.cli import train as command
from vlaflow.training.trainer import Trainer


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Six episodes of two tasks, a moving square in one view."""
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="session")
def latent(tmp_path_factory):
    return flybot.write_latent(tmp_path_factory.mktemp("flybot") / "latent")


@pytest.fixture(scope="session")
def joint(dataset, latent, tmp_path_factory):
    out = tmp_path_factory.mktemp("flybot") / "joint"
    assert command.main(flybot.joint(dataset, out, latent)) == 0
    return out


@pytest.fixture(scope="session")
def whole(dataset, tmp_path_factory):
    """All three stages, and nobody interrupted them."""
    out = tmp_path_factory.mktemp("flybot") / "demo"
    assert command.main(flybot.demo(dataset, out)) == 0
    return out


@pytest.fixture
def cut(monkeypatch):
    """A run of a recipe breaks down before a step; returns the (recipe, step) of all steps begun."""
    begun, one_step = [], Trainer._one_step

    def at(recipe, step, how):
        def watched(self, stop):
            mine = (self.identity["recipe"], self.step)
            begun.append(mine)
            if mine == (recipe, step):
                how()
            return one_step(self, stop)

        monkeypatch.setattr(Trainer, "_one_step", watched)
        return begun

    return at
