"""What a policy that is continued keeps, and which of its robots the data of the later stage are of."""

import json
from dataclasses import replace

import pytest

from tests.training.small import tiny_config, tiny_policy
from tests.training.two_robots import write_twin
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.mixing import known_robots
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import Base, OpenedDataset
from vlaflow.training import run
from vlaflow.training.options import Options

TWINS = {"xyz": ("front",), "abc": ("front",), "defg": ("front",), "hij": ("front", "wrist")}
"""Names of the state and views of robots whose actions mean the same."""


def config_of(views, state_dim, **changes):
    policy = tiny_policy(views=views)
    policy = replace(policy, backbone=replace(policy.backbone, state_dim=state_dim))
    return tiny_config(objective=PolicyObjective(policy), steps=1, max_excluded=1.0, validation_fraction=0.3, **changes)


def trained(config, datasets, out):
    run.train_stage(config, datasets, out, name="t", options=Options(tracker="none"))
    return out


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A folder of data sets of four robots that differ in their states and views alone."""
    root = tmp_path_factory.mktemp("twins")
    for seed, (names, views) in enumerate(TWINS.items()):
        write_twin(root / names, names, views, seed)
    return root


@pytest.fixture(scope="module")
def quadruplets(twins, tmp_path_factory):
    """A policy of all four."""
    out = tmp_path_factory.mktemp("policy") / "policy"
    return trained(config_of(("front", "wrist"), 4), [str(twins / names) for names in TWINS], out)


def robot_of(policy, *entries):
    """The robots that data sets are taken for when the policy is continued with them."""
    base = Base.open(policy)
    datasets = [OpenedDataset(entry, Dataset.open(entry.root), entry.name) for entry in run.entries(list(entries))]
    return known_robots(base, tiny_config(), datasets).names


def test_a_data_set_is_of_the_robot_that_it_was_trained_as(quadruplets, twins):
    """Whatever it is called now: its numbers are normalised by the statistics of no other robot."""
    assert robot_of(quadruplets, *(f"{names}={twins / names}" for names in TWINS)) == list(TWINS)
    assert robot_of(quadruplets, *(f"new-{names}={twins / names}" for names in TWINS)) == list(TWINS)


def test_new_data_are_of_the_robot_with_their_state_and_most_of_their_views(quadruplets, tmp_path):
    four = write_twin(tmp_path / "four", "defg", ("front",), 8)
    both = write_twin(tmp_path / "both", "hij", ("front", "wrist"), 9)
    assert robot_of(quadruplets, str(four), str(both)) == ["defg", "hij"]


def test_new_data_that_may_be_of_two_robots_are_named_after_theirs(quadruplets, tmp_path):
    other = write_twin(tmp_path / "other", "abc", ("front",), 8)
    with pytest.raises(SpecError, match=f"may be of several robots .*: xyz, abc. .* --dataset xyz={other}"):
        robot_of(quadruplets, str(other))
    assert robot_of(quadruplets, f"abc={other}") == ["abc"]


def test_data_with_a_state_of_another_size_are_refused_before_a_frame_is_decoded(quadruplets, twins, tmp_path):
    wide = write_twin(tmp_path / "wide", "klmno", ("front",), 8)
    with pytest.raises(SpecError, match=r"actions, state or views .* none of the robots"):
        robot_of(quadruplets, str(wide))
    alone = trained(config_of(("front",), 3), str(twins / "xyz"), tmp_path / "alone")
    with pytest.raises(SpecError, match=r"reads a state of 3 numbers, and that of .*wide has 5"):
        robot_of(alone, str(wide))


def test_the_record_of_a_later_stage_names_the_robot(quadruplets, twins, tmp_path):
    options = Options({"steps": "1", "max_excluded": "1"}, "none")
    run.train("asyncvla.finetune", str(twins / "hij"), tmp_path / "further", policy=quadruplets, options=options)
    state = json.loads((tmp_path / "further/training/step-000001/state.json").read_text())
    assert [member["robot"] for member in state["run"]["mixture"]] == ["hij"]


@pytest.mark.parametrize("size", ["2", "6"])
def test_chunks_keep_their_length(twins, quadruplets, tmp_path, size):
    alone = trained(config_of(("front",), 3), str(twins / "xyz"), tmp_path / "alone")
    options = Options({"steps": "1", "policy.decoder.chunk_size": size}, "none")
    for policy in (alone, quadruplets):
        with pytest.raises(ConfigError, match=f"chunks of {size} actions, but .* was trained with 4, .*keep their length"):
            run.train("asyncvla.finetune", str(twins / "xyz"), tmp_path / "other", policy=policy, options=options)


def test_a_rater_refuses_another_normalisation_as_a_later_stage_does(quadruplets, twins, tmp_path):
    options = Options({"steps": "1", "normalisation.xyz.action_normalisation": "identity"}, "none")
    for recipe in ("asyncvla.rater", "asyncvla.finetune"):
        with pytest.raises(ConfigError, match="keeps how its robots are normalised; leave normalisation out"):
            run.train(recipe, str(twins / "xyz"), tmp_path / "other", policy=quadruplets, options=options)
