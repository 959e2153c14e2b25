"""One result for any layout: a step's parts, their weights and the run's state do not depend on how many processes train."""

from dataclasses import replace

import pytest
import torch

from tests.training.small import CPU, Memory, Ragged, as_it_is, tiny_config
from tests.training.test_trainer import run
from vlaflow.data.augment import Augment, StateMask
from vlaflow.errors import ConfigError
from vlaflow.policies.stages import CoTraining
from vlaflow.training.loader import Loader, alternating
from vlaflow.training.metrics_log import read_log
from vlaflow.training.team import Team


def losses(folder):
    return [entry["loss"] for entry in read_log(folder)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_steps_parts_are_the_same_on_any_number_of_processes(world):
    """Samples, augmentations and noise, in the same order."""
    config = tiny_config(global_batch_size=8, accumulate=4, augment=Augment(), state_mask=StateMask(0.5))
    alone = Loader(Memory(), config, Team(), CPU, as_it_is).step(3)
    loaders = [Loader(Memory(), config, Team(rank, world), CPU, as_it_is) for rank in range(world)]
    for one, other in zip(alone, [part for loader in loaders for part in loader.step(3)], strict=True):
        assert torch.equal(one.batch.observation.images["front"], other.batch.observation.images["front"])
        assert torch.equal(one.batch.observation.known_BS, other.batch.observation.known_BS)
        assert torch.equal(one.batch.action_BLD, other.batch.action_BLD)
        assert torch.equal(one.generator.get_state(), other.generator.get_state())
        assert torch.equal(one.shared.get_state(), other.shared.get_state())


def test_a_step_has_as_many_parts_as_its_recipe_its_processes_and_its_past_ask_for():
    config = tiny_config(global_batch_size=24)
    assert config.parts() == 1
    assert config.parts(2) == 2
    assert config.parts(1, before=2) == 2
    assert replace(config, accumulate=4).parts(6) == 12


@pytest.mark.parametrize(("size", "near"), [(62, 64), (67, 64), (3, 8)])
def test_a_batch_that_cannot_be_split_names_the_nearest_that_can(size, near):
    config = tiny_config(global_batch_size=size)
    with pytest.raises(ConfigError, match=rf"{size} samples \(global_batch_size\).*8 parts.*global_batch_size={near}\."):
        config.parts(8)
    assert replace(config, global_batch_size=near).parts(8) == 8
    with pytest.raises(ConfigError, match=rf"accumulate 8\)\. The nearest .*={near}\."):
        replace(config, accumulate=8)


def test_a_begun_run_is_told_on_how_many_processes_it_can_go_on():
    with pytest.raises(ConfigError, match="Continue the run on a number of processes that divides 4"):
        tiny_config(global_batch_size=8).parts(3, before=4)


def test_questions_are_split_as_actions_are():
    acting = Loader(Memory(), tiny_config(accumulate=4), Team(), CPU, as_it_is)
    with pytest.raises(ConfigError, match=r"6 samples \(vqa\.batch_size\).*4 parts .*--set vqa\.batch_size=8\."):
        alternating(acting, CoTraining(Memory(), None, 0.5, batch_size=6))


def test_two_processes_learn_what_one_learns_in_two_parts(together, tmp_path):
    """Parts hold unequally many valid actions, and each counts by them; to rounding, for threads add in another order."""
    run(tmp_path / "p", tiny_config(accumulate=2), Ragged(), Memory(9))
    assert losses(tmp_path / "p") == pytest.approx(losses(together / "spread"), rel=1e-5)
    held = [[entry["validation"]["loss"] for entry in read_log(out)[2::3]] for out in (tmp_path / "p", together / "spread")]
    assert held[0] == pytest.approx(held[1], rel=1e-5)
