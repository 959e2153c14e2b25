"""Inference in bfloat16 is what autocast computes, with half of the layers' memory, of the same checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import helpers
from vlaflow.compute.calibration import FOLDER
from vlaflow.compute.dense import Dense
from vlaflow.compute.sampler_choice import FILE
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.nn.block import BlockConfig
from vlaflow.nn.precision import autocast
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint
from vlaflow.stacks.base import blocks_of
from vlaflow.stacks.expert import ExpertConfig

EXPERT = ExpertConfig(BlockConfig(32, 2, 2, 16, 48, norm="rms", gated=True))


def act(policy, **options):
    seen = [helpers.observation(seed) for seed in range(2)]
    return np.stack([chunk.actions for chunk in policy.act(seen, Dense(2), generator=helpers.generators(2), **options)])


@pytest.fixture(scope="module", params=["shared", "expert", "regression"])
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("policy")
    policy = helpers.policy(expert=EXPERT if request.param == "expert" else None)
    if request.param == "regression":
        config = replace(policy.config, decoder=RegressionConfig(4, 6))
        policy = Policy.create(config, policy.action_spec, policy.stats, 0)
    policy.save_pretrained(out)
    return out


def test_bf16_is_autocast_to_the_bit(folder):
    """Autocast rounds each matrix before its product; rounding it once, when it is stored, gives the same product."""
    whole, rounded = Policy.from_pretrained(folder), Policy.from_pretrained(folder, dtype="bf16")
    with autocast(True, torch.device("cpu")):
        expected = act(whole)
    np.testing.assert_array_equal(act(rounded), expected)
    assert not np.array_equal(act(whole), expected), "a test of rounding needs numbers that are rounded"
    np.testing.assert_allclose(act(whole), expected, atol=0.1)


def test_the_matrices_of_the_layers_take_half_and_nothing_else_is_rounded(folder):
    whole, rounded = Policy.from_pretrained(folder), Policy.from_pretrained(folder, dtype="bf16")
    inside = {p for block in blocks_of(rounded.model) for p in block.parameters()}
    for one, other in zip(whole.model.parameters(), rounded.model.parameters(), strict=True):
        if other.dtype == torch.bfloat16:
            assert other in inside
            assert torch.equal(one.bfloat16(), other)
        else:
            assert torch.equal(one, other)
    stored = sum(p.numel() for p in inside if p.dtype == torch.bfloat16)
    assert stored > 0.9 * sum(p.numel() for p in inside)


def test_a_rounded_policy_is_not_saved(tmp_path, folder):
    with pytest.raises(CapabilityError, match="Open it in fp32 to save it"):
        Policy.from_pretrained(folder, dtype="bf16").save_pretrained(tmp_path)


def test_a_sampler_chosen_in_another_dtype_is_used_with_a_note(tmp_path, caplog):
    from tests.compute.test_sampler_choice import MADE

    helpers.policy().save_pretrained(tmp_path)
    replace(MADE, checkpoint=fingerprint(tmp_path)).save(tmp_path / FOLDER / FILE)
    assert Policy.from_pretrained(tmp_path).default_compute.name == "dense:2"
    assert not caplog.text
    assert Policy.from_pretrained(tmp_path, dtype="bf16").default_compute.name == "dense:2"
    assert "was calibrated in fp32, and this is bf16" in caplog.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "bfloat16"}, "no dtype 'bfloat16'; did you mean 'bf16'"),
        ({"engine": "Eager"}, "no engine 'Eager'; did you mean 'eager'"),
    ],
)
def test_a_misspelt_dtype_or_engine_is_refused(options, sentence, tmp_path):
    """It would have computed in float32 and called it otherwise, or asked for programs that nothing can build."""
    helpers.policy().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        Policy.from_pretrained(tmp_path, **options)
