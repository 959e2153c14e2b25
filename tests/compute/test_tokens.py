"""Compute policies on tokens: two stages, refinement of single tokens, early exit; through the policy's public face."""

from math import inf

import numpy as np
import pytest
import torch

from tests import helpers
from vlaflow.compute.base import Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom, BelowThreshold, Spread
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.parse import able, parse
from vlaflow.compute.refine import Refine
from vlaflow.compute.refine_tokens import Improbable, RefineTokens
from vlaflow.compute.spelling import Knobs
from vlaflow.compute.two_stage import TwoStage
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.decoders.token_metrics import BinMetric
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig

SIX = [helpers.observation(seed) for seed in range(6)]


def decode(policy, compute, size=4, conditioning=None):
    with torch.inference_mode():
        prefix = policy.embed(helpers.batch(size).observation)
        return compute.decode(policy.model, prefix, helpers.generators(size), Stopwatch(policy.device), conditioning)


def test_two_stages_without_settling_are_dense_and_with_it_share_one_grid():
    policy = helpers.token_policy(DiscreteFlowConfig)
    dense, none = decode(policy, Dense(8)), decode(policy, TwoStage(8, 0))
    assert torch.equal(dense.tokens.id_BS, none.tokens.id_BS)
    split = decode(policy, TwoStage(6, 2))
    assert split.nfe == (8,) * 4
    assert torch.equal(split.tokens.revised_BN[:, :6], dense.tokens.revised_BN[:, :6]), (
        "the first six of eight strides are alike"
    )
    assert split.tokens.revised_BN.shape == (4, 8)


def test_the_last_settling_steps_ends_at_the_networks_own_best_tokens():
    policy = helpers.token_policy(DiscreteFlowConfig)
    made = decode(policy, TwoStage(3, 1))
    before = decode(policy, TwoStage(3, 0))
    assert made.tokens.id_BS.shape == before.tokens.id_BS.shape
    decoder = policy.model.decoder
    with torch.inference_mode():
        prefix = policy.encode(helpers.batch(4).observation)
        state = decoder.advance(decoder.start(prefix, helpers.generators(4), Sampling(4)), prefix, 3)
        best = decoder.head(decoder.hidden(state.id_BS, prefix, (2,))[0]).argmax(-1)
    assert torch.equal(made.tokens.id_BS, best)


def test_layer_passes_count_every_layer_that_ran(monkeypatch):
    policy = helpers.token_policy(DiscreteFlowConfig)
    for compute, prefixes in ((TwoStage(5, 2), 1), (TwoStage(5, 2, refresh=0.0), 1 + 7), (Dense(7), 1)):
        calls = helpers.count_layers(monkeypatch, policy.model.backbone)
        made = policy.act(SIX[0], compute)
        monkeypatch.undo()
        assert made.layer_passes == len(calls) == 2 * (prefixes + 7)
        assert made.nfe == 7


def test_full_attention_runs_prefix_and_tokens_together_and_counts_both(monkeypatch):
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full")
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    made = policy.act(SIX[0], TwoStage(5, 2))
    assert len(calls) == 2 * 7
    assert made.layer_passes == 2 * (7 + 7), "each joint layer is one over the prefix and one over the tokens"
    adaptive = policy.act(SIX[0], TwoStage(5, 2, refresh=1.0))
    assert adaptive.layer_passes == 2 * (1 + 7)


def test_two_stages_need_deterministic_steps():
    """Without deterministic steps, too: to an autoregressive decoder four steps of six are four tokens of a chunk."""
    for config in (AutoregressiveConfig, MaskedDiffusionConfig):
        for stages in (TwoStage(), TwoStage(4, 0), TwoStage(4, 0, refresh=0.5)):
            with pytest.raises(CapabilityError, match="does not have"):
                helpers.token_policy(config).act(SIX[0], stages)


@pytest.mark.parametrize("config", [DiscreteFlowConfig, MaskedDiffusionConfig])
def test_refining_nothing_changes_and_costs_nothing(config):
    policy = helpers.token_policy(config)
    dense, refined = decode(policy, Dense(8)), decode(policy, RefineTokens(Improbable(0.0), inner=Dense(8)))
    assert torch.equal(dense.tokens.id_BS, refined.tokens.id_BS)
    assert dense.nfe == refined.nfe
    assert dense.layer_passes == refined.layer_passes
    assert not refined.regenerated_BL.any()


@pytest.mark.parametrize("config", [DiscreteFlowConfig, MaskedDiffusionConfig])
def test_only_improbable_tokens_are_regenerated(config):
    policy = helpers.token_policy(config)
    dense = decode(policy, Dense(8))
    threshold = float(dense.tokens.probability_BS.median())
    refined = decode(policy, RefineTokens(Improbable(threshold), Sampling(4), Dense(8)))
    doubted = dense.tokens.probability_BS < threshold
    assert doubted.any()
    assert not doubted.all()
    assert torch.equal(refined.tokens.id_BS[~doubted], dense.tokens.id_BS[~doubted])
    assert not torch.equal(refined.tokens.id_BS[doubted], dense.tokens.id_BS[doubted])
    assert torch.equal(refined.draft_BLD, dense.action_BLD)
    more = [after - before for after, before in zip(refined.nfe, dense.nfe, strict=True)]
    fewest = 4 if config is DiscreteFlowConfig else 1  # masked diffusion stops when every token is revealed
    assert all(fewest <= m <= 4 if any_doubt else m == 0 for m, any_doubt in zip(more, doubted.any(1), strict=True))


@pytest.mark.parametrize("config", [DiscreteFlowConfig, MaskedDiffusionConfig])
def test_what_is_reported_of_a_chunk_depends_on_no_neighbour(config):
    """The threshold lies between the worst tokens of two and two chunks, so half of the batch has nothing to make again."""
    policy = helpers.token_policy(config)
    worst = decode(policy, Dense(8)).tokens.probability_BS.amin(1).sort().values
    assert worst[2] - worst[1] > 1e-3
    compute = RefineTokens(Improbable(float(worst[1:3].mean())), Sampling(4), Dense(8))
    together = decode(policy, compute)
    assert sorted(count > 8 for count in together.nfe) == [False, False, True, True]
    for row in range(4):
        with torch.inference_mode():
            prefix = policy.embed(helpers.batch(4).observation).select(torch.tensor([row]))
            alone = compute.decode(policy.model, prefix, [helpers.generators(4)[row]], Stopwatch(policy.device))
        for name in ("nfe", "layers", "layer_passes"):
            assert getattr(alone, name)[0] == getattr(together, name)[row], name
        assert torch.equal(alone.tokens.id_BS[0], together.tokens.id_BS[row])


def test_what_is_drawn_after_a_sequence_has_ended_depends_on_no_neighbour():
    """At the next depth new tokens are drawn, by a generator that has drawn for this observation's own tokens alone."""
    policy = helpers.token_policy(AutoregressiveConfig, depth=3, exits=ExitTraining((1, 2, 3)))
    with torch.no_grad():
        policy.model.decoder.head.bias[-1] += 1.5  # so that sequences end, each at another place
    fresh = EarlyExit(ExitPlan((1, 2, 3), "l2", Sampling(1, temperature=1.0), "fresh"), (-inf, inf))
    together = policy.act(SIX, fresh, generator=helpers.generators(6))
    assert len({chunk.nfe for chunk in together}) > 1
    for seed, chunk in enumerate(together):
        alone = policy.act(SIX[seed], fresh, generator=helpers.generators(1, seed)[0])
        assert alone.nfe == chunk.nfe
        np.testing.assert_array_equal(alone.tokens, chunk.tokens)


def test_what_is_drawn_after_the_last_token_was_revealed_depends_on_no_neighbour():
    """A third round doubts what it does by a generator that has drawn for this observation's own steps alone."""
    policy = helpers.token_policy(MaskedDiffusionConfig, helpers.BINS)
    twice = Refine(AtRandom(0.3), Sampling(12), Refine(AtRandom(0.3), Sampling(12), Dense(4)))
    together = policy.act(SIX, twice, generator=helpers.generators(6))
    assert len({chunk.nfe for chunk in together}) > 1
    for seed, chunk in enumerate(together):
        alone = policy.act(SIX[seed], twice, generator=helpers.generators(1, seed)[0])
        assert alone.nfe == chunk.nfe
        np.testing.assert_array_equal(alone.actions, chunk.actions)


def test_a_rater_rejects_the_tokens_of_the_actions_it_doubts():
    policy = helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=BinMetric())
    policy = policy.with_rater(RaterConfig(BlockConfig(32, 2, 2, 16, 64), depth=1), seed=0)
    dense = decode(policy, Dense(8))
    compute = RefineTokens(BelowThreshold(0.5), Sampling(4), Dense(8))
    refined = decode(policy, compute)
    doubted = (refined.confidence_BL < 0.5).repeat_interleave(4, 1)
    assert torch.equal(refined.tokens.id_BS[~doubted], dense.tokens.id_BS[~doubted])
    with pytest.raises(CapabilityError, match="needs a confidence rater"):
        helpers.token_policy(DiscreteFlowConfig, masks="unified").act(SIX[0], compute)


def test_any_doubt_about_actions_regenerates_all_their_tokens_and_no_others():
    """Where a token belongs to one action; where it belongs to several, it is refused in a sentence that says what works."""
    policy = helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=BinMetric())
    dense, refined = decode(policy, Dense(8)), decode(policy, RefineTokens(AtRandom(0.5), Sampling(4), Dense(8)))
    changed_BL = (refined.tokens.id_BS != dense.tokens.id_BS).unflatten(1, (-1, helpers.BINS.dim)).any(-1)
    assert torch.equal(changed_BL, refined.regenerated_BL)
    assert 0 < changed_BL.float().mean() < 1
    with pytest.raises(CapabilityError, match=r"a token belongs to several actions.*RefineTokens\(Improbable"):
        decode(helpers.token_policy(DiscreteFlowConfig), RefineTokens(AtRandom(0.5)))
    with pytest.raises(ConfigError, match="Give it a consensus"):
        RefineTokens(Spread(0.5))


def test_given_actions_are_never_doubted():
    policy = helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=BinMetric())
    action_BLD = torch.from_numpy(helpers.chunks(4))
    conditioning = Conditioning(action_BLD, torch.tensor([0.0, 0, 1, 1, 1, 1]).expand(4, -1))
    made = decode(policy, RefineTokens(Improbable(1.0), Sampling(4), Dense(8)), conditioning=conditioning)
    expected = torch.from_numpy(helpers.BINS.decode(helpers.BINS.encode(action_BLD.numpy())).action_BLD)
    assert torch.equal(made.action_BLD[:, :2], expected[:, :2])


def test_refinement_of_tokens_needs_tokens():
    with pytest.raises(CapabilityError, match="regenerates single tokens"):
        helpers.policy().act(SIX[0], RefineTokens())
    with pytest.raises(CapabilityError, match="regenerates single tokens"):
        helpers.token_policy(AutoregressiveConfig).act(SIX[0], RefineTokens())


@pytest.mark.parametrize("config", [AutoregressiveConfig, MaskedDiffusionConfig, DiscreteFlowConfig])
def test_early_exit_works_on_a_multi_exit_decoder_of_tokens_row_by_row(config):
    policy = helpers.token_policy(config, depth=3, exits=ExitTraining((1, 2, 3)))
    plan = ExitPlan((1, 2, 3), "l2", sampling=Sampling(3), warm_start="same")
    leaving = EarlyExit(plan, (1.0, float("inf")))
    whole = [policy.act(o, leaving, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(SIX)]
    batched = policy.act(SIX, leaving, generator=helpers.generators(6))
    for one, other in zip(whole, batched, strict=True):
        assert (one.layers, one.nfe, one.layer_passes) == (other.layers, other.nfe, other.layer_passes)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)
    at_two = [policy.act(o, Dense(3, depth=2), generator=torch.Generator().manual_seed(i)) for i, o in enumerate(SIX)]
    always = policy.act(SIX, EarlyExit(plan, (float("inf"), float("inf"))), generator=helpers.generators(6))
    for one, other in zip(at_two, always, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert other.layers == 2


def test_refinement_after_early_exit_continues_the_prefix_where_it_stopped():
    policy = helpers.token_policy(DiscreteFlowConfig, depth=3, exits=ExitTraining((1, 2, 3)))
    inner = EarlyExit(ExitPlan((1, 2, 3), "l2", sampling=Sampling(3), warm_start="same"), (float("inf"), float("inf")))
    out = decode(policy, RefineTokens(Improbable(1.0), Sampling(2), inner))
    assert out.layers == (3,) * 4
    assert all(group.prefix.depth == 3 for group in out.groups)
    assert out.nfe == (3 + 3 + 2,) * 4
    assert out.layer_passes == (2 + 3 * (1 + 2) + 1 + 2 * 3,) * 4


def test_full_attention_cannot_leave_early():
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full")
    with pytest.raises(CapabilityError, match="learned to answer only at"):
        policy.act(SIX[0], Dense(4, depth=1))


def test_names():
    assert parse("two-stage:14+2") == TwoStage(14, 2, label="two-stage:14+2")
    assert parse("two-stage:14+2/0.3").refresh == 0.3
    refine = parse("refine-tokens+two-stage:6+2", Knobs(steps=4, threshold=0.7))
    assert refine == RefineTokens(Improbable(0.7), Sampling(4), TwoStage(6, 2, label="two-stage:6+2"))
    assert refine.name == "refine-tokens(two-stage:6+2)"
    for wrong in ("two-stage", "two-stage:14", "two-stage:a+b"):
        with pytest.raises(ConfigError, match="as in two-stage:14"):
            parse(wrong)
    with pytest.raises(ConfigError, match="one in all"):
        parse("two-stage:0+0")


def test_what_each_decoder_is_able_to():
    names = {
        config: [c.name for c in able(helpers.token_policy(config).model)]
        for config in (AutoregressiveConfig, MaskedDiffusionConfig, DiscreteFlowConfig)
    }
    everyone = ["dense", "mean:2", "medoid:2"]
    assert names[AutoregressiveConfig] == everyone
    assert names[MaskedDiffusionConfig] == [*everyone, "refine-tokens"]
    assert names[DiscreteFlowConfig] == [*everyone, "two-stage:14+2"]


@pytest.mark.parametrize(
    ("settings", "offered"),
    [
        ({}, False),
        ({"clock_input": True}, False),
        ({"masks": "unified"}, True),
        ({"masks": "unified", "clock_input": True}, True),
        ({"velocity": "rate"}, True),
        ({"velocity": "rate", "clock_input": True}, False),
    ],
)
def test_tokens_are_refined_where_training_showed_noise_among_clean_tokens(settings, offered):
    """Unified masks give some tokens clean. So does the mixture path, unless the network is told one clock for all tokens."""
    policy = helpers.token_policy(DiscreteFlowConfig, **settings)
    assert ("refine-tokens" in [c.name for c in able(policy.model)]) is offered
    if not offered:
        with pytest.raises(CapabilityError, match="masks=unified"):
            policy.act(SIX[0], RefineTokens())


def test_a_chunk_reports_its_tokens():
    policy = helpers.token_policy(DiscreteFlowConfig)
    chunk = policy.act(SIX[0], TwoStage(5, 2))
    assert chunk.tokens.shape == chunk.token_probability.shape == (policy.model.decoder.slots,)
    assert len(chunk.revised) == 7
    made = policy.model.decoder.tokenizer.decode(chunk.tokens[None])
    assert chunk.repaired == bool(made.repaired_B[0])
    robot = policy.action_normalizer.inverse(torch.from_numpy(made.action_BLD[0])).numpy()
    np.testing.assert_allclose(chunk.actions, np.clip(robot, -1, 1), atol=1e-6)
    assert helpers.policy().act(SIX[0]).tokens is None
