"""The optimizer's moments in a checkpoint."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.training.small import Cut, Memory
from tests.training.test_trainer import run
from vlaflow.errors import CheckpointError


def test_missing_moments_are_refused(tmp_path):
    """Without them the optimizer would begin with moments of zero, and the run would not be the one that was begun."""
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path, source=Cut(Memory()))
    folder = tmp_path / "training/step-000004"
    moments = load_file(folder / "optimizer.safetensors")
    assert json.loads((folder / "state.json").read_text())["moments"] == len(moments)
    for kept in ({}, dict(list(moments.items())[:-3])):
        save_file(kept, folder / "optimizer.safetensors")
        with pytest.raises(CheckpointError, match=rf"holds {len(kept)} of the optimizer's {len(moments)} moments"):
            run(tmp_path)
    save_file(moments, folder / "optimizer.safetensors")
    assert run(tmp_path).finished
