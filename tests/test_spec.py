"""Specs refuse what does not mean the same; configs survive a round trip."""

import dataclasses

import pytest

from tests import helpers
from vlaflow.config import from_json, to_json
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.base import PolicyConfig
from vlaflow.spec import ActionSpec, Dimension


def test_specs_that_agree_match_whatever_the_chunk_size_of_the_data():
    spec = helpers.action_spec()
    spec.with_chunk_size(8).require_match(spec, "checkpoint A", "data set B")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unit": "cm"}, "unit of action dimension 'd1' is 'm' in the first and 'cm' in the second"),
        ({"mode": "absolute"}, "mode of action dimension 'd1'"),
        ({"positive": "backward"}, "positive of action dimension 'd1'"),
    ],
)
def test_a_dimension_that_means_something_else_is_named(change, words):
    spec = helpers.action_spec()
    dims = list(spec.dimensions)
    dims[1] = dataclasses.replace(dims[1], **change)
    with pytest.raises(SpecError, match=words):
        spec.require_match(dataclasses.replace(spec, dimensions=tuple(dims)), "checkpoint A", "data set B")


def test_rate_gripper_and_length_are_compared():
    spec = helpers.action_spec()
    for other in (
        dataclasses.replace(spec, rate_hz=20.0),
        dataclasses.replace(spec, gripper="+1 open"),
        dataclasses.replace(spec, dimensions=spec.dimensions[:3]),
    ):
        with pytest.raises(SpecError, match="checkpoint A and data set B"):
            spec.require_match(other, "checkpoint A", "data set B")


def test_a_blank_is_refused():
    with pytest.raises(SpecError, match="has an empty 'unit'"):
        Dimension("x", " ", "world", -1, 1, "forward")


def test_specs_and_policies_survive_json():
    spec, config = helpers.action_spec(), helpers.policy_config(rater=True)
    assert from_json(ActionSpec, to_json(spec), "here") == spec
    assert from_json(PolicyConfig, to_json(config), "here") == config


def test_wrong_types_are_named():
    data = to_json(helpers.policy_config())
    data["decoder"]["noise_samples"] = "two"
    with pytest.raises(ConfigError, match=r"'config\.decoder\.noise_samples' in here must be int, got 'two'"):
        from_json(PolicyConfig, data, "here")


def test_a_file_of_another_kind_is_refused():
    data = to_json(helpers.policy_config())
    data["decoder"]["kind"] = "DiscreteConfig"
    with pytest.raises(
        ConfigError,
        match=r"'config\.decoder\.kind' in here is 'DiscreteConfig', which nothing installed provides; installed: .*FlowConfig",
    ):
        from_json(PolicyConfig, data, "here")
