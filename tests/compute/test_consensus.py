"""Several draws made one: what is shared, what is counted, and that nothing changes where there is nothing to agree on."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import helpers
from tests.compute import test_early_exit
from tests.compute.test_compute import ROUNDING, decode
from vlaflow.compute.base import Stopwatch
from vlaflow.compute.consensus import Consensus, mean_and_spread, medoid
from vlaflow.compute.dense import Dense
from vlaflow.compute.distance import distance
from vlaflow.compute.doubts import AtRandom, BelowThreshold, Spread
from vlaflow.compute.early_exit import EarlyExit
from vlaflow.compute.parse import parse, parse_all
from vlaflow.compute.refine import Refine
from vlaflow.compute.refine_tokens import Improbable, RefineTokens
from vlaflow.compute.sampler_choice import Candidate, SamplerCalibration
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.compute.two_stage import TwoStage
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows import gaussian
from vlaflow.flows.sampling import Sampling
from vlaflow.spec import ActionPrefix

HOW = ("mean", "medoid")
seeds = st.integers(0, 2**31)


def draws(seed, batch=3, k=5):
    return torch.randn(batch, k, 6, 4, generator=torch.Generator().manual_seed(seed))


def single_draws(policy, inner, k, count=2, conditioning=None):
    """The draws of a consensus, one by one: (count, k, L, D)."""
    chunks = []
    for place in range(k):
        generators = []
        for own in helpers.generators(count):
            copy = torch.Generator().set_state(own.get_state())
            others = torch.randint(2**62, (k - 1,), generator=copy).tolist()
            generators.append(own if place == 0 else torch.Generator().manual_seed(others[place - 1]))
        prefix = policy.embed(helpers.batch(count).observation)
        with torch.no_grad():
            chunks.append(inner.decode(policy.model, prefix, generators, Stopwatch(policy.device), conditioning).action_BLD)
    return torch.stack(chunks, 1)


@given(seed=seeds, k=st.integers(1, 9))
def test_equal_draws_are_their_own_mean_to_the_bit_and_have_no_spread(seed, k):
    one_B1LD = draws(seed, k=1)
    mean_BLD, spread_BL = mean_and_spread(one_B1LD.expand(-1, k, -1, -1))
    assert torch.equal(mean_BLD, one_B1LD[:, 0])
    assert not spread_BL.any()


@given(seed=seeds)
def test_mean_and_spread_are_what_they_are_called(seed):
    draw_BKLD = draws(seed)
    mean_BLD, spread_BL = mean_and_spread(draw_BKLD)
    torch.testing.assert_close(mean_BLD, draw_BKLD.mean(1))
    torch.testing.assert_close(spread_BL.square(), draw_BKLD.var(1, correction=0).mean(-1))


@given(seed=seeds, outlier=st.integers(0, 4))
def test_the_medoid_is_never_the_draw_that_lies_far_from_all_others(seed, outlier):
    draw_BKLD = draws(seed)
    draw_BKLD[:, outlier] += 100
    assert not (medoid(draw_BKLD) == outlier).any()


def test_of_equally_central_draws_the_medoid_is_the_first():
    assert medoid(draws(0, k=2)).tolist() == [0, 0, 0]
    assert medoid(draws(0, k=1).expand(-1, 4, -1, -1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("policy", "inner"),
    [
        (helpers.policy(), Dense(4)),
        (helpers.policy(), Dense(2, noise_scale=0.5)),
        (helpers.token_policy(MaskedDiffusionConfig), Dense(4)),
        (helpers.token_policy(AutoregressiveConfig, temperature=1.0), Dense()),
        (helpers.token_policy(DiscreteFlowConfig, attention="full"), TwoStage(3, 1)),
    ],
)
def test_the_consensus_of_one_draw_is_the_draw_to_the_bit(how, policy, inner):
    found, alone = decode(policy, Consensus(1, how, inner)), decode(policy, inner)
    assert torch.equal(found.action_BLD, alone.action_BLD)
    assert (found.nfe, found.layers, found.layer_passes) == (alone.nfe, alone.layers, alone.layer_passes)
    assert not found.spread_BL.any()


def test_the_draws_are_those_of_a_generator_each_and_differ():
    policy = helpers.policy()
    each_BKLD = single_draws(policy, Dense(4), 3)
    assert torch.equal(each_BKLD[:, 0], decode(policy, Dense(4)).action_BLD)
    assert not torch.isclose(each_BKLD[:, 0], each_BKLD[:, 1]).all(-1).any()
    mean = decode(policy, Consensus(3, "mean", Dense(4)))
    torch.testing.assert_close(mean.action_BLD, each_BKLD.mean(1), **ROUNDING)
    torch.testing.assert_close(mean.spread_BL, mean_and_spread(each_BKLD)[1], **ROUNDING)


def test_draws_of_draws_begin_from_noise_of_their_own(monkeypatch):
    """The first draw keeps its observation's generator, and a consensus inside it must not seed its draws as the outer one."""
    policy, seen, standard_normal = helpers.policy(), [], gaussian.standard_normal

    def noted(*given):
        seen.append(standard_normal(*given))
        return seen[-1]

    monkeypatch.setattr(gaussian, "standard_normal", noted)
    decode(policy, Consensus(2, "medoid", Consensus(3, "mean", Refine(AtRandom(0.0), inner=Consensus(2, inner=Dense(1))))))
    noise_NX = torch.cat(seen).flatten(1)
    assert len(noise_NX) == 2 * 2 * 3 * 2
    assert len(noise_NX.unique(dim=0)) == len(noise_NX)


def test_levels_are_told_by_each_policy_and_not_found_in_its_fields():
    """A policy of another package says how many levels of draws it nests, whatever its fields are called."""

    @dataclass(frozen=True)
    class Wrapped(Dense):
        draws: Consensus = field(default_factory=lambda: Consensus(2))

        @property
        def levels(self):
            return self.draws.levels

    assert Consensus(2, inner=Refine(AtRandom(), inner=Consensus(2, inner=Wrapped()))).levels == 3
    assert RefineTokens(Improbable(), inner=Consensus(2, "medoid")).levels == 1
    assert (Dense().levels, Refine(AtRandom()).levels, TwoStage(3, 1).levels) == (0, 0, 0)


@pytest.mark.parametrize("config", [None, MaskedDiffusionConfig, DiscreteFlowConfig])
def test_the_medoid_is_one_of_the_draws(config):
    policy = helpers.policy() if config is None else helpers.token_policy(config)
    each_BKLD, found = single_draws(policy, Dense(4), 4), decode(policy, Consensus(4, "medoid", Dense(4)))
    nearest_B = (each_BKLD - found.action_BLD[:, None]).abs().amax((2, 3)).amin(1)
    assert float(nearest_B.max()) < ROUNDING["atol"]
    if config is not None:  # its tokens are reported with it
        made = policy.model.decoder.tokenizer.decode(found.tokens.id_BS.numpy()).action_BLD
        np.testing.assert_array_equal(made, found.action_BLD.numpy())


@pytest.mark.parametrize("how", HOW)
def test_the_prefix_is_read_once_for_all_draws(how, monkeypatch):
    """By layer calls and their batch: the prefix of two observations as two rows, the suffix of four draws as eight."""
    policy = helpers.policy()
    calls, run = [], policy.model.backbone.layer

    def layer(index, hidden_BTW, *rest, **more):
        calls.append(tuple(hidden_BTW.shape[:2]))
        return run(index, hidden_BTW, *rest, **more)

    monkeypatch.setattr(policy.model.backbone, "layer", layer)
    out = decode(policy, Consensus(4, how, Dense(3)))
    suffix, depth = policy.model.decoder.chunk_size, policy.model.backbone.spec.depth
    assert [rows for rows, tokens in calls if tokens != suffix] == [2] * depth
    assert [rows for rows, tokens in calls if tokens == suffix] == [8] * (3 * depth)
    assert out.nfe == (4 * 3,) * 2
    assert out.layer_passes == (depth + 4 * 3 * depth,) * 2


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("policy", [helpers.policy(), helpers.token_policy(MaskedDiffusionConfig)])
def test_a_row_of_a_batch_is_what_it_is_alone(how, policy):
    observations = [helpers.observation(seed) for seed in range(3)]
    compute = Consensus(3, how, Dense(4))
    for row, together in enumerate(policy.act(observations, compute, generator=helpers.generators(3))):
        alone = policy.act(observations[row], compute, generator=helpers.generators(3)[row])
        np.testing.assert_allclose(alone.actions, together.actions, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(alone.spread, together.spread, atol=1e-5, rtol=1e-4)
        assert (alone.nfe, alone.layer_passes) == (together.nfe, together.layer_passes)


@pytest.mark.parametrize("how", HOW)
def test_given_actions_stay_to_the_bit_and_have_no_spread(how):
    policy = helpers.policy()
    action_BLD, clock_BL = torch.randn(2, 6, 4), torch.tensor([0.0, 0, 1, 1, 1, 1]).expand(2, -1)
    out = decode(policy, Consensus(3, how, Dense(4)), conditioning=Conditioning(action_BLD, clock_BL))
    assert torch.equal(out.action_BLD[:, :2], action_BLD[:, :2])
    assert not out.spread_BL[:, :2].any()
    assert out.spread_BL[:, 2:].all()


@pytest.mark.parametrize("guided", [False, True])
def test_a_chunk_continues_the_one_before(guided):
    policy, known = helpers.policy(masks="synchronous", max_action_prefix=3), np.full((4, 4), 0.25, np.float32)
    chunk = policy.act(helpers.observation(), Consensus(3, inner=Dense(4)), action_prefix=ActionPrefix(known, 2), guided=guided)
    np.testing.assert_array_equal(chunk.actions[:2], known[:2])
    assert chunk.spread.shape == (6,)
    assert (chunk.spread[2:] > 0).all()


def test_no_noise_leaves_no_spread():
    policy = helpers.policy()
    out = decode(policy, Consensus(4, "mean", Dense(3, noise_scale=0)))
    assert float(out.spread_BL.max()) < 1e-6  # rows of one batch may round differently
    torch.testing.assert_close(out.action_BLD, decode(policy, Dense(3, noise_scale=0)).action_BLD, **ROUNDING)


def test_a_single_chunk_reports_no_spread():
    assert helpers.policy().act(helpers.observation()).spread is None


def test_every_draw_leaves_early_for_itself():
    policy, open_end = test_early_exit.policy(), (float("inf"),) * 3
    plan = test_early_exit.exit_at(warm="same").plan
    many = policy.embed(helpers.batch(2).observation).select(torch.tensor([0, 0, 0, 1, 1, 1]))
    with torch.no_grad():  # a threshold that parts the draws at the second depth
        chunks = [c for _, c in plan.answers(policy.model, many, helpers.generators(6), Stopwatch(policy.device))]
    middle = float(distance(plan.metric, chunks[1], chunks[0]).median())
    inner = EarlyExit(plan, (middle, *open_end[1:]))
    out = decode(policy, Consensus(8, "mean", inner))
    torch.testing.assert_close(out.action_BLD, single_draws(policy, inner, 8).mean(1), **ROUNDING)
    first, second = plan.sampling.steps * (1 + 2), plan.sampling.steps * (1 + 2 + 3)
    counts = []
    for row in range(2):  # some draws leave at depth 2 and the rest at depth 3; the first layer was read once
        late, rest = divmod(out.layer_passes[row] - 1 - 8 * (1 + first), 1 + second - first)
        assert rest == 0
        assert 0 <= late <= 8
        assert out.nfe[row] == plan.sampling.steps * (2 * 8 + late)
        assert out.layers[row] == (3 if late else 2)
        counts.append(late)
    assert any(0 < late < 8 for late in counts)


def test_refinement_regenerates_where_the_draws_lie_apart(monkeypatch):
    policy = helpers.policy()
    consensus = Consensus(4, "mean", Dense(3))
    plain = decode(policy, consensus)
    middle = float(plain.spread_BL.median())
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    out = decode(policy, Refine(Spread(middle), Sampling(2), consensus))
    assert torch.equal(out.draft_BLD, plain.action_BLD)
    assert torch.equal(out.spread_BL, plain.spread_BL)
    assert torch.equal(out.regenerated_BL, plain.spread_BL > middle)
    assert torch.equal((out.action_BLD != out.draft_BLD).any(-1), out.regenerated_BL)
    assert out.nfe == (12 + 2,) * 2
    assert sum(tokens != policy.model.decoder.chunk_size for _, tokens in calls) == 2  # the prefix, once
    nothing = decode(policy, Refine(Spread(float(plain.spread_BL.max())), Sampling(2), consensus))
    assert torch.equal(nothing.action_BLD, plain.action_BLD)
    assert nothing.nfe == plain.nfe


def test_a_consensus_of_refined_chunks_is_one_too():
    policy = helpers.policy(rater=True)
    inner = Refine(BelowThreshold(0.5), Sampling(2), Dense(3))
    out = decode(policy, Consensus(3, "medoid", inner))
    assert out.confidence_BL.shape == out.regenerated_BL.shape == (2, 6)
    assert decode(policy, Consensus(3, "mean", inner)).confidence_BL is None


def test_tokens_of_a_medoid_can_be_refined_and_those_of_a_mean_do_not_exist():
    policy = helpers.token_policy(MaskedDiffusionConfig)
    out = decode(policy, RefineTokens(Improbable(1.0), Sampling(2), Consensus(3, "medoid", Dense(4))))
    assert all(count > 12 for count in out.nfe)
    with pytest.raises(CapabilityError, match="mean:3 reports no tokens"):
        decode(policy, RefineTokens(Improbable(1.0), Sampling(2), Consensus(3, "mean")))


def test_names_that_people_type():
    assert parse("mean:8", Knobs(5)) == Consensus(8, "mean", Dense(5))
    both = parse("medoid:4+dense:2@0.5")
    assert both == Consensus(4, "medoid", Dense(2, noise_scale=0.5, label="dense:2@0.5"))
    staged = parse("mean:4+two-stage:6+2")
    assert staged.inner == TwoStage(6, 2, label="two-stage:6+2")
    for name in ("mean:8", "medoid:4+dense:2@0.5", "mean:4+two-stage:6+2"):
        assert parse(name).name == name
    assert parse("refine-spread").inner == Consensus(8, "mean", Dense())
    assert parse("refine-spread:2@0.5+medoid:4", Knobs(threshold=0.2)) == Refine(
        Spread(0.2), Sampling(2, 0.5), Consensus(4, "medoid"), label="refine-spread:2@0.5"
    )
    for wrong in ("mean", "mean:0", "mean:x", "mean:8@2", "mean:8+dens", "medoid:-1", "refine-spread+dense"):
        with pytest.raises(ConfigError):
            parse(wrong)


def test_names_tell_settings_apart():
    """Compute policies of one name would be one row of a table."""
    typed = ("refine", "refine:2@0.5", "refine:2@0.5+dense:10", "refine+dense:10", "refine-spread", "refine-spread+mean:4")
    typed += ("refine:2@0.5+dense", "refine-spread:2", "refine-spread:2+mean:8", "refine-tokens:2", "refine-tokens:2+dense")
    typed += ("mean:4+refine:2", "mean:4+refine:2+dense", "refine-spread:2,draws=4", "refine-spread:2,draws=4+dense")
    assert len({parse(name).name for name in typed}) == len(parse_all(typed)) == len(typed)
    assert parse("refine:2").name == "refine:2"
    assert parse("refine:2+dense").name == "refine:2(dense)"


def test_two_spellings_of_one_policy_are_one_and_two_policies_of_one_name_are_refused(tmp_path):
    assert parse_all(("mean:8", "mean:8+dense", "refine", "refine+dense")) == [parse("mean:8"), parse("refine")]
    chosen = SamplerCalibration(
        *(
            "aa",
            "dd",
            "failures",
            (Candidate("dense", 10, 30, 1, 2, 0.1),),
            "dense",
            None,
            1,
            (),
            0,
            0,
            0.0,
            "",
            "cpu",
            1,
            "",
            {},
        )
    )
    chosen.save(tmp_path / "calibration" / "sampler.json")
    home = Checkpoint(tmp_path, "aa")
    assert len(parse_all(("auto", "dense"), Knobs(10), home)) == 1
    with pytest.raises(ConfigError, match="'auto' and 'dense' differ, and tables would name both dense"):
        parse_all(("auto", "dense"), Knobs(2), home)


@pytest.mark.parametrize("make", [lambda: Consensus(0), lambda: Spread(-1), lambda: Refine(Spread(), inner=Dense(2))])
def test_impossible_settings_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_needs_are_those_of_a_draw(monkeypatch):
    policy = helpers.policy(masks="synchronous")
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    with pytest.raises(CapabilityError, match="masks='unified'"):
        policy.act(helpers.observation(), Consensus(2, inner=Refine(AtRandom())))
    with pytest.raises(CapabilityError, match="draws no tokens"):
        policy.act(helpers.observation(), Consensus(2, inner=Dense(temperature=0)))
    assert not calls
