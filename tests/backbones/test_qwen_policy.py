"""Qwen2.5-VL as part of a policy: saved, opened, trained and run in bfloat16."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.backbones.test_qwen2_5_vl import OBSERVED, ROUNDING, build, observation, observations, qwen_config, write_model
from tests.helpers import action_spec, count_layers, feature_stats
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom
from vlaflow.compute.refine import Refine
from vlaflow.config import from_json, to_json
from vlaflow.data.batch import Batch
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.errors import CheckpointError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy, PolicyConfig

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen"), tied=True)


@pytest.fixture(scope="module")
def backbone(folder):
    return build(folder)


def policy(folder, **changes):
    block = BlockConfig(64, 4, 2, 16, 96, norm="rms", gated=True)
    decoder = FlowConfig(action_dim=4, chunk_size=6, padded_dim=8)
    config = PolicyConfig("asyncvla", qwen_config(folder, **changes), decoder, RaterConfig(block, depth=1), n_action_steps=3)
    made = Policy.create(config, action_spec(4), {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}, seed=0)
    made.model.eval()
    return made


def test_a_checkpoint_needs_nothing_else(tmp_path, folder):
    """Saved, moved, opened without the model it started from, it acts the same to the bit, twice over."""
    source = shutil.copytree(folder, tmp_path / "source")
    first = policy(source)
    first.save_pretrained(tmp_path / "one")
    shutil.rmtree(source)
    second = Policy.from_pretrained(tmp_path / "one")
    second.save_pretrained(tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    third = Policy.from_pretrained(tmp_path / "two")
    compute = Refine(AtRandom(0.5), sampling=Sampling(2), inner=Dense(2))
    for one, other in zip(first.act(observations(), compute), third.act(observations(), compute), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        assert one.actions.shape == (6, 4)
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert written["backbone"]["kind"] == "QwenConfig"
    assert str(tmp_path) not in json.dumps(written)
    files = {p.suffix for p in (tmp_path / "two").rglob("*") if p.is_file()}
    assert files == {".json", ".safetensors", ".md"}


def test_a_checkpoint_without_its_processor_says_so(tmp_path, folder):
    policy(folder).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "processor")
    with pytest.raises(CheckpointError, match="processor is missing"):
        Policy.from_pretrained(tmp_path)


def test_the_prefix_is_encoded_once(monkeypatch, folder):
    """Three layers over the prompt, then three per solver step over six actions; the rater runs its own block."""
    made = policy(folder)
    calls = count_layers(monkeypatch, made.model.backbone)
    chunk = made.act(observation(), Refine(AtRandom(1.0), sampling=Sampling(2), inner=Dense(2)))
    assert len(calls) == 3 * (1 + 2 + 2)
    assert [tokens for _, tokens in calls].count(6) == 12
    assert chunk.layer_passes == len(calls)


def training_batch():
    generator = torch.Generator().manual_seed(5)
    action_BLD = torch.randn(2, 6, 4, generator=generator)
    episode_B = torch.arange(2)
    return Batch(OBSERVED, action_BLD, torch.ones(2, 6, dtype=torch.bool), episode_B, episode_B)


def gradients(made):
    made.model.train()
    made.loss(made.prepare(training_batch()), torch.Generator().manual_seed(7), torch.Generator()).total.backward()
    return {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}


def test_the_loss_reaches_every_part_and_recomputing_does_not_change_it(folder):
    """Vision tower, embeddings, all layers, state and head get gradients, the same with and without recomputation."""
    kept, recomputed = gradients(policy(folder)), gradients(policy(folder, recompute=True))
    untouched = {n for n, _ in policy(folder).model.named_parameters() if n not in kept and not n.startswith("rater")}

    assert not untouched
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(gradient, recomputed[name], **ROUNDING)


def test_bfloat16_serves_and_trains(folder):
    """Pretrained parts in bfloat16 under a float32 head, and float32 parts under bfloat16 autocast."""
    small = policy(folder, dtype="bfloat16")
    assert small.model.backbone.network.dtype == torch.bfloat16
    assert small.model.decoder.codec.project.weight.dtype == torch.float32
    assert small.model.backbone.network.language_model.rotary_emb.inv_freq.dtype == torch.float32
    exact, rough = policy(folder).act(observation()), small.act(observation(), Refine(sampling=Sampling(2)))
    assert rough.actions.dtype == np.float32
    np.testing.assert_allclose(small.act(observation()).actions, exact.actions, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        made = policy(folder)
        assert all(m.key_CGPE.dtype == torch.bfloat16 for m in made.encode(OBSERVED).kv_cache)
        assert all(g.isfinite().all() for g in gradients(made).values())


def test_the_config_survives_json(folder, backbone):
    config = PolicyConfig("asyncvla", backbone.config, FlowConfig(4, 8))
    assert from_json(PolicyConfig, json.loads(json.dumps(to_json(config))), "config.json") == config
