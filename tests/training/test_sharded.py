"""FSDP2: what is saved does not depend on whether a run validates, and a run continues with all that it had."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.small import Cut, Memory
from tests.training.test_trainer import run
from vlaflow.errors import CheckpointError
from vlaflow.training.pieces import Pieces


def saved(folder, name, writers=2):
    with Pieces(folder / "training/step-000006", name, writers) as pieces:
        return dict(pieces)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["weights", "average", "optimizer"])
def test_validation_leaves_no_trace_in_a_sharded_run(together, name):
    """A forward pass without a backward pass must not leave the gathered parameters in the module."""
    out = together / "sharded"
    assert same(saved(out / "alone", name), saved(out / "validated", name))
    assert same(saved(out / "alone", name), saved(out / "cut", name))


def test_a_sharded_run_saves_moments_and_keeps_weights_and_average_apart(together):
    out = together / "sharded"
    raw, average = saved(out / "validated", "weights"), saved(out / "validated", "average")
    assert not torch.equal(raw["backbone.state.weight"], average["backbone.state.weight"])
    assert same(raw, saved(out / "plain", "weights"))
    assert {f"exp_avg.{name}" for name in average} < saved(out / "validated", "optimizer").keys()


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
