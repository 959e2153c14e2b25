"""Some rows of an encoded batch are those rows encoded alone, on every backbone and wherever the prefix stands."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch

from tests import helpers
from tests.backbones import smol
from tests.backbones import test_emu3 as emu3
from tests.backbones import test_molmo2 as molmo2
from tests.backbones import test_qwen2_5_vl as qwen
from tests.helpers import action_spec, feature_stats, generators
from vlaflow.backbones.smol import SmolConfig
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.compute.base import Stopwatch
from vlaflow.compute.distance import distance
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.spec import Observation

pytest.importorskip("transformers")

ROUNDING = {"atol": 5e-5, "rtol": 1e-4}  # float32 of other batch sizes and paddings: sums in another order, three layers
TINY = TinyConfig(4, ("front", "wrist"), image_size=32, cell=16, width=32, depth=3, heads=2, ffn=64, text_bytes=64)
FAMILIES = {
    "tiny": lambda folder: TINY,
    "qwen": lambda folder: qwen.qwen_config(qwen.write_model(folder, tied=True)),
    "molmo2": lambda folder: molmo2.molmo_config(molmo2.write_model(folder)),
    "emu3": lambda folder: emu3.emu_config(emu3.write_model(folder)),
    "smol": lambda folder: SmolConfig(4, ("front", "wrist"), str(smol.write_model(folder)), image_size=32),
}


@pytest.fixture(scope="module", params=FAMILIES)
def config(request, tmp_path_factory):
    """Each family's smallest, with two views."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def observation(seed):
    """Three sentences of different lengths in turn, so that most batches are padded."""
    rng, size = np.random.default_rng(seed), (32, 32, 3)
    images = {view: rng.integers(0, 256, size, dtype=np.uint8) for view in ("front", "wrist")}
    sentence = ("Open the drawer.", "Press the red button on top.", "Close it")[seed % 3]
    return Observation(images, rng.normal(size=4).astype(np.float32), sentence)


def build(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = config.build().eval()
    backbone.processor = config.processor()
    return backbone


@torch.no_grad()
def assert_rows_are_those_rows_alone(backbone, observations, rows, depth):
    """Encoded to ``depth`` together, selected, run on: the states of the prefix and of tokens that read it."""
    together = backbone.run(helpers.embed(backbone, ObservationBatch.collate(observations)), depth)
    chosen = backbone.run(together.select(torch.tensor(rows)))
    suffix_RTW = torch.randn(len(rows), 3, backbone.spec.width, generator=torch.Generator().manual_seed(1))
    (reading_RTW,), _ = backbone.follow(suffix_RTW, chosen, (backbone.spec.depth,))
    for i, row in enumerate(rows):
        alone = backbone.run(helpers.embed(backbone, ObservationBatch.collate([observations[row]])))
        seen_P = slice(None) if chosen.padding_mask_BP is None else chosen.padding_mask_BP[i]
        torch.testing.assert_close(chosen.hidden_BPW[i][seen_P], alone.hidden_BPW[0], **ROUNDING)
        (expected_1TW,), _ = backbone.follow(suffix_RTW[i : i + 1], alone, (backbone.spec.depth,))
        torch.testing.assert_close(reading_RTW[i : i + 1], expected_1TW, **ROUNDING)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_selected_rows_are_those_rows_alone(config, depth):
    """A batch that splits, before the first layer, between two and after the last; also one row twice."""
    backbone, observations = build(config), [observation(seed) for seed in range(4)]
    for rows in ([3, 1], [2], [0, 0]):
        assert_rows_are_those_rows_alone(backbone, observations, rows, depth)


def test_as_many_observations_as_tokens(config):
    """Batch and prefix dimensions of one length: an index into the wrong one raises nothing."""
    backbone = build(config if config is TINY else replace(config, views=()))
    count = helpers.embed(backbone, ObservationBatch.collate([observation(seed) for seed in range(3)])).hidden_BPW.shape[1]
    observations = [observation(seed) for seed in range(count)]
    assert helpers.embed(backbone, ObservationBatch.collate(observations)).hidden_BPW.shape[:2] == (count, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2)).tolist()
    assert_rows_are_those_rows_alone(backbone, observations, order, 1)


@torch.no_grad()
def test_early_exit_splits_a_batch(config):
    """One observation leaves, the others go on: each takes the depth and the chunk it takes alone."""
    decoder = FlowConfig(action_dim=4, chunk_size=6)
    settings = PolicyConfig("test", config, decoder, exits=ExitTraining((1, 2, 3)), n_action_steps=3)
    stats = {"state": feature_stats(4, 1), "action": feature_stats(4, 2)}
    made = Policy.create(settings, action_spec(4), stats, seed=0)
    model, plan = made.model.eval(), ExitPlan((1, 2, 3), metric="l2", sampling=Sampling(2))

    def prefix(rows):
        return made.embed(ObservationBatch.collate([observation(row) for row in rows]))

    def generators_of(rows):
        return [generators(4)[row] for row in rows]

    chunks = [chunk for _, chunk in plan.answers(model, prefix(range(4)), generators_of(range(4)), Stopwatch(made.device))]
    gaps = sorted(distance("l2", chunks[1], chunks[0]).tolist())
    bound = (gaps[1] + gaps[2]) / 2
    assert gaps[2] - gaps[1] > 1e-3 * bound  # the threshold lies well between two values, whatever their rounding
    compute = EarlyExit(plan, (bound, inf))
    together = compute.decode(model, prefix(range(4)), generators_of(range(4)), Stopwatch(made.device))
    assert sorted(together.layers) == [2, 2, 3, 3]
    for row in range(4):
        alone = compute.decode(model, prefix([row]), generators_of([row]), Stopwatch(made.device))
        assert together.layers[row] == alone.layers[0]
        torch.testing.assert_close(together.action_BLD[row : row + 1], alone.action_BLD, **ROUNDING)
