"""Two processes that train together keep the same numbers, stop together, and are sharded without a trace.

One group of them makes all these runs (``together``), for its start takes longer than they do.
"""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training import flybot, ranks
from tests.training.latents import latent_config, latent_stage
from tests.training.sharded import MUON
from tests.training.small import Memory, Ragged, tiny_config, weights, write_dataset
from tests.training.test_trainer import run
from tests.training.together import train_all
from vlaflow.actions.latent import LatentActionModel
from vlaflow.data.lerobot import Dataset
from vlaflow.policies.base import Policy
from vlaflow.policies.iflybot.codes import model_pairs
from vlaflow.training.metrics_log import read_log
from vlaflow.training.pieces import Pieces


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of what they left."""
    out = tmp_path_factory.mktemp("together")
    write_dataset(out / "flybot/dataset")
    flybot.write_latent(out / "flybot/latent")
    assert ranks.launch(train_all, out) == [0, 0], ranks.failures(out)
    return out


def losses(folder):
    return [entry["loss"] for entry in read_log(folder)]


def test_two_processes_learn_what_one_learns_in_two_parts(together, tmp_path):
    """Parts hold unequally many valid actions, and each counts by them; to rounding, for threads add in another order."""
    run(tmp_path / "p", tiny_config(accumulate=2), Ragged(), Memory(9))
    assert losses(tmp_path / "p") == pytest.approx(losses(together / "spread"), rel=1e-5)
    held = [[entry["validation"]["loss"] for entry in read_log(out)[2::3]] for out in (tmp_path / "p", together / "spread")]
    assert held[0] == pytest.approx(held[1], rel=1e-5)


def test_processes_that_train_together_run_the_same_random_exit(together):
    """An expert leaves the last layer without a gradient, a random exit whole layers: DDP has to know, and ranks to agree."""
    assert [entry["step"] for entry in read_log(together / "exits")] == [1, 2, 3, 4, 5, 6]
    assert Policy.from_pretrained(together / "exits")


def test_a_tracker_that_ends_leaves_the_processes_together(together):
    """The runs after the one with a tracker share their steps as well."""
    assert list((together / "exits/training").glob("**/events.out.tfevents.*"))
    assert [entry["step"] for entry in read_log(together / "latent")] == [1, 2, 3, 4, 5, 6]


def test_processes_that_find_different_checkpoints_all_refuse(together):
    """--out on each node's own disk: otherwise one would continue, and the others begin."""
    for rank in (0, 1):
        told = (together / f"ended/rank-{rank}.txt").read_text()
        assert "checkpoints of different steps (2, none)" in told
        assert "--out must be a folder that all nodes share" in told


def test_a_signal_to_one_process_ends_the_run_in_all_of_them(together):
    """Or one would wait for the other in the next stage."""
    told = [load_file(together / f"ended/of-0/rank-{rank}.safetensors") for rank in (0, 1)]
    assert [(int(t["signal"]), int(t["step"])) for t in told] == [(signal.SIGTERM, 2)] * 2


def test_two_processes_keep_one_book(together):
    """Uses are counted over both, and every draw is the same in both."""
    left = [load_file(together / f"latent/rank-{rank}.safetensors") for rank in (0, 1)]
    for name, tensor in left[0].items():
        assert torch.equal(tensor, left[1][name]), name
    assert left[0]["moved"] == 0
    alone = latent_stage(latent_config()).module.book.entry_VE
    assert not torch.equal(left[0]["book.entry_VE"], alone)
    assert [entry["step"] for entry in read_log(together / "latent")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_see_the_same_codes_and_train_together(together):
    """One makes the table of a cache that was empty, the other reads it; parameters without a gradient hold nobody up."""
    left = [load_file(together / f"flybot/rank-{rank}.safetensors") for rank in (0, 1)]
    assert torch.equal(left[0]["code_NK"], left[1]["code_NK"])
    opened = Dataset.open(together / "flybot/dataset")
    model = LatentActionModel.from_pretrained(together / "flybot/latent")
    pairs = model_pairs(model, opened)
    wanted = model.codes(*pairs.frames(np.arange(len(pairs))))
    assert torch.equal(left[0]["code_NK"][torch.from_numpy(pairs.rows)], wanted)
    assert [entry["step"] for entry in read_log(together / "flybot/policy")] == [1, 2, 3, 4]


# -- FSDP2: what is saved does not depend on whether a run validates, and a run continues with all that it had -----------


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


def test_a_sharded_run_that_was_told_to_end_makes_up_for_the_validation_it_left_out(together):
    out = together / "sharded"
    before = [json.loads(line) for line in (out / "told/before.jsonl").read_text().splitlines()]
    assert ["validation" in entry for entry in before] == [True, True, True, False]
    whole, told = ([entry["validation"] for entry in read_log(out / name)] for name in ("validated", "told"))
    assert whole == told
    assert weights(out / "validated") == weights(out / "told")


def test_muon_turns_whole_matrices_that_processes_share_by_rows(together, tmp_path):
    run(tmp_path / "p", tiny_config(accumulate=2, ema_decay=None, optim=MUON))
    assert losses(tmp_path / "p") == pytest.approx(losses(together / "sharded/turned"), rel=1e-4)
    for name in ("weights", "optimizer"):
        assert same(saved(together / "sharded/turned", name), saved(together / "sharded/turned-cut", name))
    moments = saved(together / "sharded/turned", "optimizer")
    assert "exp_avg.backbone.layers.0.qkv.weight" in moments
    assert "exp_avg_sq.backbone.layers.0.qkv.weight" not in moments


def test_a_sharded_run_saves_moments_and_keeps_weights_and_average_apart(together):
    out = together / "sharded"
    raw, average = saved(out / "validated", "weights"), saved(out / "validated", "average")
    assert not torch.equal(raw["backbone.state.weight"], average["backbone.state.weight"])
    assert same(raw, saved(out / "plain", "weights"))
    assert {f"exp_avg.{name}" for name in average} < saved(out / "validated", "optimizer").keys()
