"""The public face: act, save, open, and the sentences when something is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import helpers
from vlaflow.compute.dense import Dense
from vlaflow.compute.parse import parse
from vlaflow.compute.refine import Refine
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.latent_flow import LatentFlowConfig
from vlaflow.decoders.latent_reader import LatentTokensConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.errors import CalibrationError, CapabilityError, CheckpointError, ConfigError, SpecError
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.spec import Observation
from vlaflow.stacks.expert import ExpertConfig


@pytest.fixture
def checkpoint(tmp_path):
    helpers.policy(rater=True).save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_a_saved_policy_acts_the_same_after_opening(checkpoint):
    chunk = helpers.policy(rater=True).act(helpers.observation(), Refine())
    again = Policy.from_pretrained(checkpoint).act(helpers.observation(), Refine())
    assert np.array_equal(chunk.actions, again.actions)
    assert np.array_equal(chunk.confidence, again.confidence)
    assert again.actions.shape == (6, 4)
    assert again.actions.dtype == np.float32


def test_compute_policies_have_the_names_of_the_command_line(checkpoint):
    policy = Policy.from_pretrained(checkpoint)
    assert policy.compute("refine:2") == parse("refine:2")
    named, built = (policy.act(helpers.observation(), each) for each in ("dense:3@0.5", Dense(3, noise_scale=0.5)))
    assert np.array_equal(named.actions, built.actions)
    with pytest.raises(ConfigError, match="did you mean 'dense'"):
        policy.act(helpers.observation(), "dence")
    with pytest.raises(CalibrationError, match=rf"vlaflow calibrate {checkpoint}"):
        policy.compute("exit:adaptive")
    with pytest.raises(ConfigError, match=r"'exit:adaptive' is measured for one checkpoint.*from_pretrained"):
        helpers.policy().compute("exit:adaptive")


def test_what_a_checkpoint_lacks_is_told_with_its_folder(tmp_path):
    helpers.policy().save_pretrained(tmp_path)
    with pytest.raises(CapabilityError, match=f"vlaflow train asyncvla.rater --policy {tmp_path} --dataset DIR"):
        Policy.from_pretrained(tmp_path).act(helpers.observation(), "refine")
    with pytest.raises(CapabilityError, match="--policy CKPT"):  # it lies nowhere
        helpers.policy().act(helpers.observation(), "refine")


def test_chunks_are_in_robot_units_within_the_spec():
    policy = helpers.policy()
    with torch.no_grad():
        policy.model.decoder.codec.head[-1].bias += 50
    actions = policy.act(helpers.observation()).actions
    assert np.all(actions >= policy.action_spec.low)
    assert np.all(actions <= policy.action_spec.high)


def test_a_batch_gives_the_same_chunks_as_one_at_a_time():
    """Items of a batch share a matrix product, never information; instructions of other lengths are masked."""
    policy = helpers.policy(rater=True)
    observations = [helpers.observation(0, "Open"), helpers.observation(1, "Open a rather large drawer")]
    together = policy.act(observations, Refine(), generator=helpers.generators(2))
    for i, observation in enumerate(observations):
        alone = policy.act(observation, Refine(), generator=helpers.generators(2)[i])
        np.testing.assert_allclose(together[i].actions, alone.actions, atol=2e-5)


def test_the_answer_depends_on_image_state_and_words():
    policy = helpers.policy()
    base = helpers.observation()
    chunk = policy.act(base).actions
    others = [
        Observation({"image": 255 - base.images["image"]}, base.state, base.instruction),
        Observation(base.images, base.state + 1, base.instruction),
        Observation(base.images, base.state, "Close the window"),
    ]
    for other in others:
        assert not np.allclose(chunk, policy.act(other).actions)


def test_acting_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    helpers.policy().act(helpers.observation())
    assert torch.equal(before, torch.random.get_rng_state())


def test_same_seed_same_weights():
    one, two = helpers.policy(seed=3).model.state_dict(), helpers.policy(seed=3).model.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["backbone.state.weight"], helpers.policy(seed=4).model.state_dict()["backbone.state.weight"])


def test_wrong_observations_get_one_sentence():
    policy, good = helpers.policy(), helpers.observation()
    with pytest.raises(SpecError, match=r"looks at view 'image'.*did you mean 'images'"):
        policy.act(Observation({"images": good.images["image"]}, good.state, "x"))
    with pytest.raises(SpecError, match="state of length 4, got 3"):
        policy.act(Observation(good.images, good.state[:3], "x"))
    with pytest.raises(SpecError, match="not finite"):
        Observation(good.images, good.state * np.nan, "x")
    with pytest.raises(SpecError, match="at most 32"):
        policy.act(Observation(good.images, good.state, "x" * 33))
    with pytest.raises(SpecError, match="differs from the first in its views, image sizes"):
        policy.act([good, helpers.observation(size=24)])


def test_damaged_checkpoints_get_one_sentence(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Policy.from_pretrained(tmp_path / "nowhere")
    weights = load_file(checkpoint / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "backbone.norm.weight"}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 'backbone\.norm\.weight'"):
        Policy.from_pretrained(checkpoint)
    save_file({**weights, "backbone.norm.weight": torch.ones(7)}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(7,\)"):
        Policy.from_pretrained(checkpoint)
    raw = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        Policy.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Policy.from_pretrained(checkpoint)


def test_nothing_to_act_on_is_told_in_a_sentence():
    with pytest.raises(ConfigError, match="no observation to act on"):
        helpers.policy().act([])


def test_a_misspelt_config_key_names_the_nearest(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["decoder"]["chunk_siz"] = config["decoder"].pop("chunk_size")
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'chunk_size'"):
        Policy.from_pretrained(checkpoint)


EXPERT = ExpertConfig(BlockConfig(width=24, heads=2, kv_heads=2, head_dim=16, ffn=32))
TIMED = FlowConfig(4, 6, masks="synchronous", expert=EXPERT, time_token=True)
FAST_AR = AutoregressiveConfig(4, helpers.FAST, chunk_size=6)
SUFFIXES = {
    "flow": (FlowConfig(4, 6), 6),
    "flow of an expert": (TIMED, 0),
    "query per action": (RegressionConfig(4, 6, queries="action"), 6),
    "query per number": (RegressionConfig(4, 6), 24),
    "bins, masked": (MaskedDiffusionConfig(4, helpers.BINS, chunk_size=6), 24),
    "bins, masked, behind a mark": (MaskedDiffusionConfig(4, helpers.BINS, chunk_size=6, marks=(0, 1)), 25),
    "bins, flow": (DiscreteFlowConfig(4, helpers.BINS, chunk_size=6), 24),
    "bins, flow, full": (DiscreteFlowConfig(4, helpers.BINS, chunk_size=6, attention="full", marks=(0, 1)), 25),
    "fast": (FAST_AR, helpers.FAST.slots),
    "codes": (LatentFlowConfig(TIMED, LatentTokensConfig(5, 8), None), 5),
    "codes in a row": (LatentFlowConfig(TIMED, LatentTokensConfig(5, 8, "autoregressive"), None), 6),
    "codes and fast": (LatentFlowConfig(TIMED, LatentTokensConfig(5, 8), FAST_AR), 5 + helpers.FAST.slots),
}


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_chunk_that_is_too_long_for_the_backbone_is_found_when_the_policy_is_created(kind):
    """At the limit it learns and acts, and one token beyond is refused before any sample is read."""
    decoder, tokens = SUFFIXES[kind]
    plain = helpers.policy_config()
    config = replace(plain, decoder=decoder, backbone=replace(plain.backbone, suffix=tokens, answers=True))
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    made = Policy.create(config, helpers.action_spec(), stats, 0)
    batch = replace(helpers.batch(), code_BK=torch.zeros(3, 5, dtype=torch.long))
    assert torch.isfinite(made.loss(made.prepare(batch), *helpers.generators(2)).total)
    made.model.eval()
    made.act(helpers.observation(), generator=torch.Generator().manual_seed(0))
    if tokens:
        short = replace(config, backbone=replace(config.backbone, suffix=tokens - 1))
        cure = rf"adds {tokens} tokens .*chunks of 6 .* {tokens - 1} positions.*--set policy\.backbone\.suffix={tokens}\b"
        with pytest.raises(ConfigError, match=cure):
            Policy.create(short, helpers.action_spec(), stats, 0)
