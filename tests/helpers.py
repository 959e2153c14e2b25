"""Small policies and observations without files, data sets or simulators."""

import numpy as np
import torch

from vlaflow.actions.bins import BinsFit
from vlaflow.actions.fast import FastFit
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.data.stats import FeatureStats
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.spec import ActionSpec, Dimension, Observation


def action_spec(dim=4):
    dimensions = tuple(Dimension(f"d{i}", "m", "world", -1.0, 1.0, "forward") for i in range(dim))
    return ActionSpec("test arm", dimensions, "none", "none", 10.0)


def feature_stats(dim, seed=0):
    """Statistics of a random table."""
    table = np.random.default_rng(seed).normal(0.2, 0.5, (200, dim)).astype(np.float32)
    return FeatureStats.of(table)


def built(config):
    """The backbone of a config, ready to read, with its processor as an attribute."""
    backbone = config.build().eval()
    backbone.processor = config.processor()
    return backbone


def policy_config(rater=False, **decoder):
    backbone = TinyConfig(state_dim=4, image_size=16, cell=8, width=32, depth=2, heads=2, ffn=64, text_bytes=32)
    block = BlockConfig(32, 2, 2, 16, 64)
    return PolicyConfig(
        "asyncvla",
        backbone,
        FlowConfig(**{"action_dim": 4, "chunk_size": 6, **decoder}),
        RaterConfig(block, depth=1) if rater else None,
        n_action_steps=3,
    )


def policy(rater=False, seed=0, **decoder):
    config = policy_config(rater, **decoder)
    stats = {"state": feature_stats(4, 1), "action": feature_stats(config.decoder.action_dim, 2)}
    made = Policy.create(config, action_spec(config.decoder.action_dim), stats, seed)
    made.model.eval()
    return made


def observation(seed=0, instruction="Open a drawer", size=16):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Observation({"image": image}, rng.normal(size=4).astype(np.float32), instruction)


def batch(size=3, chunk_size=6, dim=4, seed=0):
    observations = [observation(seed + i, ["Open a drawer", "Close it"][i % 2]) for i in range(size)]
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        ObservationBatch.collate(observations),
        torch.randn(size, chunk_size, dim, generator=generator),
        torch.ones(size, chunk_size, dtype=torch.bool),
        torch.arange(size),
        torch.zeros(size, dtype=torch.long),
    )


def embed(backbone, observation):
    """The prefix of observations, by the processor that a test gave the backbone or its config's own."""
    processor = getattr(backbone, "processor", None) or backbone.config.processor()
    return backbone.embed(processor(observation))


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def count_layers(monkeypatch, backbone):
    """A list that grows by (layer index, tokens) at every layer call."""
    calls, run = [], backbone.layer

    def layer(index, hidden_BTW, *rest, **more):
        calls.append((index, hidden_BTW.shape[1]))
        return run(index, hidden_BTW, *rest, **more)

    monkeypatch.setattr(backbone, "layer", layer)
    return calls


def chunks(count=64, chunk_size=6, dim=4, seed=0):
    """Smooth normalised chunks in [-1, 1], float32 (count, chunk size, dim)."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, chunk_size)[None, :, None]
    start, speed = rng.uniform(-1, 1, (2, count, 1, dim))
    return np.clip(start + speed * time + 0.05 * rng.normal(size=(count, chunk_size, dim)), -1, 1).astype(np.float32)


FAST = FastFit(scale=4.0, vocabulary=64).fit(chunks())
BINS = BinsFit(8).fit(chunks())


def token_policy(decoder, tokenizer=FAST, seed=0, depth=2, exits=None, **settings):
    """A policy whose decoder makes tokens; ``decoder`` is the config's class."""
    backbone = TinyConfig(state_dim=4, image_size=16, cell=8, width=32, depth=depth, heads=2, ffn=64, text_bytes=32)
    config = PolicyConfig(
        "tokens",
        backbone,
        decoder(4, tokenizer, chunk_size=6, **settings),
        exits=exits,
        action_normalisation="min_max",
        n_action_steps=3,
    )
    made = Policy.create(config, action_spec(), {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}, seed)
    made.model.eval()
    return made


class Oracle(torch.nn.Module):
    """A head that knows the chunk, whatever the network says."""

    def __init__(self, id_BS, vocabulary):
        super().__init__()
        self.logits = 50.0 * torch.nn.functional.one_hot(id_BS, vocabulary).float()

    def forward(self, hidden_BSW):
        return self.logits[: len(hidden_BSW)]
