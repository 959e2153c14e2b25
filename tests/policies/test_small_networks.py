"""The recipes for LIBERO and Meta-World MT50 on a CPU: each is built, takes a step on synthetic frames, and acts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.data.stats import FeatureStats
from vlaflow.policies.base import Policy
from vlaflow.policies.recipe import DataSpec, Pipeline, TrainConfig
from vlaflow.simulators import metaworld_tasks
from vlaflow.simulators.libero_tasks import SPEC
from vlaflow.spec import Observation
from vlaflow.training.recipes import find_recipe

DATA = DataSpec(len(SPEC.state_names), SPEC.action.dim, SPEC.views)
RECIPES = (
    "asyncvla.libero_small",
    "a1.libero_small",
    "iflybot.small_joint",
    "dfm_vla.libero_small",
    "baselines.oft_libero_small",
)
MT50 = ("asyncvla.mt50_small", "baselines.oft_mt50_small", "baselines.flow_mt50_small")


def suite_of(name):
    return metaworld_tasks.SPEC if name in MT50 else SPEC


def config_of(name) -> TrainConfig:
    suite = suite_of(name)
    return find_recipe(name).config(DataSpec(len(suite.state_names), suite.action.dim, suite.views), None)


def table(dim, seed):
    """Values as LIBERO has them: small ones, with a gripper of −1 and 1 at the end."""
    values = np.random.default_rng(seed).normal(0, 0.3, (400, dim)).clip(-1, 1).astype(np.float32)
    values[:, -1] = np.sign(values[:, -1])
    return values


def policy_of(name) -> Policy:
    policy, suite = config_of(name).objective.policy, suite_of(name)
    chunks = np.random.default_rng(0).uniform(-1, 1, (200, 16, suite.action.dim)).astype(np.float32)
    if policy.decoder.unfitted:
        policy = replace(policy, decoder=policy.decoder.fitted(chunks))
    stats = {"state": FeatureStats.of(table(len(suite.state_names), 1)), "action": FeatureStats.of(table(suite.action.dim, 2))}
    return Policy.create(policy, suite.action, stats, seed=0)


def observation(suite, seed):
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for view in suite.views}
    return Observation(images, table(len(suite.state_names), seed)[0], max(suite.tasks.values(), key=len))


def batch(suite, size=2):
    actions = torch.from_numpy(np.stack([table(suite.action.dim, 10 + i)[:16] for i in range(size)]))
    codes = torch.randint(0, 32, (size, 8), generator=torch.Generator().manual_seed(0))
    seen = ObservationBatch.collate([observation(suite, i) for i in range(size)])
    number_B = torch.arange(size)
    return Batch(seen, actions, torch.ones(size, 16, dtype=torch.bool), number_B, number_B, code_BK=codes)


@pytest.mark.parametrize("name", [*RECIPES, *MT50[:2]])
def test_a_step_is_taken_and_a_chunk_made(name):
    policy, suite = policy_of(name), suite_of(name)
    assert sum(p.numel() for p in policy.model.parameters()) < 50e6
    optimizer = torch.optim.AdamW(policy.model.parameters(), 1e-3)
    before = {key: value.clone() for key, value in policy.model.named_parameters()}
    policy.model.train()
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    terms = policy.loss(policy.prepare(batch(suite)), *generators)
    terms.total.backward()
    optimizer.step()
    assert bool(terms.total.isfinite())
    still = [key for key, value in policy.model.named_parameters() if torch.equal(value, before[key])]
    assert not [key for key in still if key.startswith("backbone.stems")], "both views are learned from"
    policy.model.eval()
    chunk = policy.act(observation(suite, 5))
    assert chunk.actions.shape == (16, suite.action.dim)
    assert np.abs(chunk.actions).max() <= 1


@pytest.mark.parametrize(("name", "first"), [*((name, RECIPES[0]) for name in RECIPES), *((name, MT50[0]) for name in MT50)])
def test_recipes_differ_in_decoder_and_exits_alone(name, first):
    """So that a difference in success is one of the decoders."""
    mine, other = config_of(name), config_of(first)
    a, b = mine.objective.policy, other.objective.policy
    assert replace(a.backbone, suffix=0) == replace(b.backbone, suffix=0)
    assert (a.action_normalisation, a.n_action_steps, a.decoder.chunk_size) == ("quantile", 8, 16)
    assert (mine.global_batch_size, mine.shift, mine.ema_decay) == (other.global_batch_size, other.shift, other.ema_decay)


def test_the_pipeline_takes_as_many_steps_of_the_policy_as_the_others():
    pipeline = find_recipe("iflybot.libero_small").call()
    assert isinstance(pipeline, Pipeline)
    assert [stage.__name__ for stage in pipeline.stages] == ["small_latent", "small_joint", "small_fine"]
    joint = config_of("iflybot.small_joint")
    fine = find_recipe("iflybot.small_fine").config(DATA, joint.objective.policy)
    assert joint.steps + fine.steps <= config_of(RECIPES[0]).steps


@pytest.mark.parametrize(("name", "others"), [("dfm_vla.libero_small", 0), ("iflybot.small_joint", 8)])
def test_the_longest_token_sequence_has_positions(name, others):
    """Tokens are at most as many as numbers in a chunk, and an end; iFlyBot writes its codes before them."""
    assert config_of(name).objective.policy.backbone.suffix >= 16 * 7 + others


def test_words_of_an_encoder_are_an_option_of_every_recipe():
    from vlaflow.config import override

    for name in RECIPES:
        changed = override(config_of(name), {"policy.backbone.text": "minilm"})
        assert changed.objective.policy.backbone.text == "minilm"
