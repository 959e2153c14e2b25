"""Early exit: the last exit always fires, nothing runs beyond it, and every observation decides for itself."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import helpers
from vlaflow.compute.base import Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.compute.distance import distance
from vlaflow.compute.doubts import AtRandom, BelowThreshold
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.refine import Refine
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.stacks.expert import ExpertConfig

DEPTHS = (1, 2, 3, 4)
EXPERT = ExpertConfig(BlockConfig(24, 2, 2, 16, 48))
WARM = ("fresh", "same", "anchor", "renoise")
NEVER = (-inf, -inf, inf)
ROUNDING = {"atol": 1e-6, "rtol": 1e-6}  # distances of chunks of about 1, float32, sums in another order


def policy(rater=False, decoder=None):
    config = helpers.policy_config(rater)
    backbone = replace(config.backbone, depth=4)
    config = replace(config, backbone=backbone, decoder=decoder or config.decoder, exits=ExitTraining(DEPTHS))
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    made = Policy.create(config, helpers.action_spec(4), stats, seed=0)
    made.model.eval()
    with torch.no_grad():  # answers of an untrained network hardly differ from depth to depth; make them
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return made


def decode(made, compute, count=3, rows=None, conditioning=None):
    prefix = made.embed(helpers.batch(5).observation)
    rows = list(range(count)) if rows is None else rows
    generators = [helpers.generators(5)[row] for row in rows]
    with torch.no_grad():
        return compute.decode(made.model, prefix.select(torch.tensor(rows)), generators, Stopwatch(made.device), conditioning)


def exit_at(warm="same", thresholds=NEVER, steps=3, **plan):
    return EarlyExit(ExitPlan(DEPTHS, sampling=Sampling(steps), warm_start=warm, **plan), thresholds)


def test_chunks_that_are_no_numbers_are_taken_at_the_last_exit_and_keep_their_row():
    """They change no other row; ``Policy.act`` refuses them."""
    made = policy()
    torch.nn.init.constant_(made.model.decoder.codec.head[-1].weight, float("nan"))
    found = decode(made, exit_at(thresholds=(inf, inf, inf)))
    assert found.action_BLD.shape == (3, 6, 4)
    assert found.action_BLD.isnan().all()
    assert found.layers == (4, 4, 4)


DECODERS = {
    "shared": None,
    "expert": FlowConfig(4, chunk_size=6, expert=EXPERT, head_layers=1),
    "regression": RegressionConfig(4, chunk_size=6),
    "regression, expert": RegressionConfig(4, chunk_size=6, queries="action", expert=EXPERT),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_layers_beyond_the_exit_are_never_executed(kind, monkeypatch):
    made = policy(decoder=DECODERS[kind])
    calls = helpers.count_layers(monkeypatch, made.model.backbone)
    out = decode(made, exit_at(thresholds=(inf, inf, inf)))
    assert out.layers == (2, 2, 2)
    assert {index for index, _ in calls} == {0, 1}
    assert all(group.prefix.depth == 2 for group in out.groups)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_last_exit_always_fires_and_equals_dense(kind):
    made = policy(decoder=DECODERS[kind])
    out = decode(made, exit_at("same", steps=3))
    assert out.layers == (4, 4, 4)
    assert torch.equal(out.action_BLD, decode(made, Dense(3)).action_BLD)


def test_work_is_counted_layer_by_layer(monkeypatch):
    made = policy()
    calls = helpers.count_layers(monkeypatch, made.model.backbone)
    out = decode(made, exit_at(thresholds=(-inf, inf, inf)), count=1)
    assert out.layer_passes == (len(calls),) == (3 + 3 * (1 + 2 + 3),)
    assert out.nfe == (9,)


@pytest.mark.parametrize("warm", WARM)
def test_a_decision_depends_on_nobody_else_in_the_batch(warm):
    made = policy()
    alone = [decode(made, exit_at(warm), rows=[row]) for row in range(5)]
    gaps = sorted(
        float(distance("cosine", one.action_BLD, decode(made, Dense(2), rows=[i]).action_BLD)) for i, one in enumerate(alone)
    )
    for bound in gaps:
        compute = exit_at(warm, (bound, bound, inf))
        together = decode(made, compute, rows=list(range(5)))
        single = [decode(made, compute, rows=[row]) for row in range(5)]
        assert together.layers == tuple(one.layers[0] for one in single)
        assert together.nfe == tuple(one.nfe[0] for one in single)
        torch.testing.assert_close(together.action_BLD, torch.cat([one.action_BLD for one in single]), rtol=1e-4, atol=1e-4)


def test_mixed_exits_come_back_in_the_order_of_the_batch():
    made = policy()
    probe = exit_at()
    seen = {}
    for row in range(5):
        prefix = made.embed(helpers.batch(5).observation).select(torch.tensor([row]))
        with torch.no_grad():
            chunks = [
                a for _, a in probe.plan.answers(made.model, prefix, [helpers.generators(5)[row]], Stopwatch(made.device))
            ]
        seen[row] = float(distance("cosine", chunks[1], chunks[0]))
    below, above = sorted(seen.values())[2:4]
    assert above - below > 100 * ROUNDING["atol"]  # the threshold lies between two values, whatever their rounding
    middle = (below + above) / 2
    out = decode(made, exit_at(thresholds=(middle, -inf, inf)), rows=list(range(5)))
    assert out.layers == tuple(2 if seen[row] < middle else 4 for row in range(5))
    assert len(out.groups) == 2


@pytest.mark.parametrize("warm", WARM)
def test_nothing_is_carried_to_the_next_observation(warm):
    made, compute = policy(), exit_at(warm)
    first = decode(made, compute, rows=[0])
    decode(made, compute, rows=[1])
    again = decode(made, compute, rows=[0])
    assert torch.equal(first.action_BLD, again.action_BLD)


def answers(made, plan, conditioning=None):
    prefix = made.embed(helpers.batch(2).observation)
    with torch.no_grad():
        return [a for _, a in plan.answers(made.model, prefix, helpers.generators(2), Stopwatch(made.device), conditioning)]


def test_warm_starts_begin_where_they_say():
    """With the network's velocity at zero a chunk is what it started from."""
    made = policy()
    made.model.decoder.codec.decode = lambda hidden: torch.zeros(*hidden.shape[:2], 4)
    noise = [torch.randn(6, 4, generator=g) for g in helpers.generators(2)]
    fresh = answers(made, ExitPlan(DEPTHS, warm_start="fresh"))
    assert torch.equal(fresh[0], torch.stack(noise))
    assert not torch.equal(fresh[1], fresh[0])
    same = answers(made, ExitPlan(DEPTHS, warm_start="same"))
    assert all(torch.equal(chunk, torch.stack(noise)) for chunk in same)
    anchor = answers(made, ExitPlan(DEPTHS, warm_start="anchor"))
    assert all(torch.equal(chunk, anchor[0]) for chunk in anchor)
    renoise = answers(made, ExitPlan(DEPTHS, warm_start="renoise", restart=0.25))
    new = renoise[1] - 0.75 * renoise[0]
    later = [[torch.randn(6, 4, generator=g) for _ in range(2)][1] for g in helpers.generators(2)]
    torch.testing.assert_close(new, 0.25 * torch.stack(later), rtol=1e-5, atol=1e-6)


def test_an_exact_velocity_gives_the_action_from_every_start():
    made = policy()
    action = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(9))
    decoder = made.model.decoder
    decoder.velocity = lambda x, clock, prefix: (x - action) / clock[..., None]
    for warm in WARM:
        for chunk in answers(made, ExitPlan(DEPTHS, warm_start=warm)):
            torch.testing.assert_close(chunk, action, rtol=0, atol=1e-5)


@pytest.mark.parametrize("warm", WARM)
def test_committed_actions_stay_as_they_are_at_every_depth(warm):
    action, clock = torch.randn(2, 6, 4), torch.tensor([[0.0, 0, 1, 1, 1, 1]]).expand(2, -1)
    for chunk in answers(policy(), ExitPlan(DEPTHS, warm_start=warm), Conditioning(action, clock)):
        assert torch.equal(chunk[:, :2], action[:, :2])


@pytest.mark.parametrize("doubt", [BelowThreshold(1.0), AtRandom(1.0)])
def test_refinement_of_an_early_exit_has_the_whole_depth(doubt, monkeypatch):
    made = policy(rater=True)
    calls = helpers.count_layers(monkeypatch, made.model.backbone)
    out = decode(made, Refine(doubt, Sampling(3), exit_at(thresholds=(inf, inf, inf))), count=2)
    assert out.layers == (4, 4)
    suffix = [index for index, tokens in calls if tokens == 6]
    assert [index for index, tokens in calls if tokens != 6] == [0, 1, 2, 3]  # each prefix layer once
    assert suffix == [0] * 3 + [0, 1] * 3 + [0, 1, 2, 3] * 3
    rater = made.config.rater.depth if isinstance(doubt, BelowThreshold) else 0
    assert out.layer_passes == (len(calls) + rater,) * 2
    assert out.regenerated_BL.all()


def test_what_was_not_trained_or_cannot_is_refused():
    single = helpers.policy()
    with pytest.raises(CapabilityError, match="depth 1"):
        EarlyExit(ExitPlan((1, 2)), (inf,)).needs.check(single.model, "exit")
    regression = policy(decoder=DECODERS["regression"])
    exit_at("same").needs.check(regression.model, "exit")
    with pytest.raises(CapabilityError, match="earlier answer"):
        exit_at("anchor").needs.check(regression.model, "exit")
    with pytest.raises(CapabilityError, match="regenerates"):
        Refine(AtRandom(0.5)).needs.check(regression.model, "refine-random")
    for wrong in ((0.1, 0.1), (0.1, 0.1, 0.1)):
        with pytest.raises(ConfigError, match="threshold"):
            exit_at(thresholds=wrong)
    for depths in ((4,), (2, 1), (0, 1)):
        with pytest.raises(ConfigError, match="ascending"):
            ExitPlan(depths)


def test_padded_dimensions_do_not_change_the_decision():
    made = policy(decoder=FlowConfig(4, chunk_size=6, padded_dim=9))
    before = decode(made, exit_at(thresholds=(0.3, 0.3, inf)))
    head = made.model.decoder.codec.head[-1]
    decode_real = made.model.decoder.codec.decode

    def other_padding(hidden):
        velocity = decode_real(hidden).clone()
        velocity[..., 4:] = 0
        return velocity

    plan, chunks = ExitPlan(DEPTHS), answers(made, ExitPlan(DEPTHS))
    assert chunks[0].shape[-1] == 4 != head.out_features
    assert plan.metric == "cosine"
    made.model.decoder.codec.encode = _without_padding(made.model.decoder.codec.encode)
    blind = decode(made, exit_at(thresholds=(0.3, 0.3, inf)))
    made.model.decoder.codec.decode = other_padding
    assert decode(made, exit_at(thresholds=(0.3, 0.3, inf))).layers == blind.layers
    assert len(before.layers) == 3


def _without_padding(encode):
    return lambda x, clock: encode(torch.cat((x[..., :4], torch.zeros_like(x[..., 4:])), -1), clock)


@settings(max_examples=30)
@given(st.sampled_from(["cosine", "l2", "mean_abs", "max_abs"]), st.integers(0, 1000))
def test_distances_are_distances(metric, seed):
    one, other = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    found = distance(metric, one, other)
    assert found.shape == (3,)
    assert (found > 0).all()
    assert torch.equal(found, distance(metric, other, one))
    assert float(distance(metric, one, one).max()) < 1e-5
    torch.testing.assert_close(found[1:2], distance(metric, one[1:2], other[1:2]), **ROUNDING)


@pytest.mark.parametrize("size", [0, 1e-30, 1e-4, 1e-2, 1, 1e4])
def test_equal_chunks_have_no_cosine_distance_however_small(size):
    """A robot that is told twice to stand still is told the same."""
    one = size * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distance("cosine", one, one), torch.zeros(2))


def test_the_cosine_distance_has_no_step_where_an_action_loses_its_direction():
    """Opposite directions are 2 apart, one against none is 1 apart, and what is too short for a direction is near its equal."""
    one = torch.tensor([[[1.0, 0, 0]]])
    assert float(distance("cosine", one, -one)) == pytest.approx(2)
    assert float(distance("cosine", one, 0 * one)) == pytest.approx(1)
    gaps = [float(distance("cosine", size * one, -size * one)) for size in (1e-6, 1e-4, 1e-3, 3e-3, 4e-3)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 1e-6
    assert gaps[-1] == pytest.approx(2)


def test_distances_in_closed_form():
    one = torch.tensor([[[1.0, 0], [0, 2]]])
    other = torch.tensor([[[0.0, 1], [0, 1]]])
    assert float(distance("cosine", one, other)) == pytest.approx(0.5)
    assert float(distance("mean_abs", one, other)) == pytest.approx(3 / 4)
    assert float(distance("max_abs", one, other)) == 1
    assert float(distance("l2", one, other)) == pytest.approx((1 + np.sqrt(0.5)) / 2)
