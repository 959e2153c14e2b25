"""The settings of the sampler as part of a compute policy: typed, checked, and heeded by every round."""

import pytest
import torch

from tests import helpers
from tests.compute.test_compute import decode
from vlaflow.compute.base import Requirements
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom
from vlaflow.compute.early_exit import ExitPlan
from vlaflow.compute.parse import parse
from vlaflow.compute.refine import Refine
from vlaflow.compute.refine_tokens import RefineTokens
from vlaflow.compute.spelling import Knobs
from vlaflow.compute.two_stage import TwoStage
from vlaflow.config import from_json, to_json
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling

HALF = Sampling(2, noise_scale=0.5)


def test_dense_as_people_type_it():
    assert parse("dense:2@0.5") == Dense(2, noise_scale=0.5, label="dense:2@0.5")
    assert parse("dense:1-0.3-0") == Dense(grid=(1.0, 0.3, 0.0), label="dense:1-0.3-0")
    assert parse("dense:5,midpoint").sampling == Sampling(5, solver="midpoint")
    assert parse("dense:2@0.5,heun,depth=3") == Dense.by(
        Sampling(2, 0.5, solver="heun"), depth=3, label="dense:2@0.5,heun,depth=3"
    )
    assert parse("dense", Knobs(7)) == Dense(7)
    assert Dense(grid=(1.0, 0.3, 0.0)).steps == 2


@pytest.mark.parametrize(
    "typed", ["dense,temperature=0", "dense@0.5", "dense,expected", "refine@0.5", "refine,clock=0.5", "dense,3"]
)
def test_settings_without_a_colon_are_told_what_to_type(typed):
    with pytest.raises(ConfigError, match="Settings follow a colon") as refusal:
        parse(typed)
    told = str(refusal.value).split("'")[1]
    assert parse(told).name == told


def test_what_once_was_the_depth_is_refused():
    with pytest.raises(ConfigError, match=r"noise_scale lies in \[0, 1\], got 3"):
        parse("dense:2@3")


def test_refinement_takes_settings_and_an_inner_policy_of_its_own():
    assert parse("refine:2@0.5") == Refine(sampling=HALF, inner=Dense.by(HALF), label="refine:2@0.5")
    both = parse("refine-random:2@0.5+dense:10")
    assert (both.sampling, both.inner) == (HALF, Dense(label="dense:10"))
    tokens = parse("refine-tokens:8,temperature=0+two-stage:14+2")
    assert tokens == RefineTokens(
        sampling=Sampling(8, temperature=0.0),
        inner=TwoStage(label="two-stage:14+2"),
        label="refine-tokens:8,temperature=0",
    )
    once = parse("two-stage:0+1,expected")
    assert (once.stochastic, once.settling, once.sampling) == (0, 1, Sampling(1, expected=True))
    staged = parse("two-stage:6+2/0.3,temperature=0")
    assert (staged.refresh, staged.sampling) == (0.3, Sampling(8, temperature=0.0))


@pytest.mark.parametrize("typed", ["dense:N", "dense:2,depth=N", "mean:N", "two-stage:N+1", "refine:executed=N"])
def test_numbers_of_thousands_of_digits_are_refused_in_one_sentence(typed):
    with pytest.raises(ConfigError):
        parse(typed.replace("N", "9" * 5000))


@pytest.mark.parametrize("wrong", ["dense:2+dense:3", "two-stage:6+2+dense", "dense+", "dense:2+", "refine+", "two-stage:6"])
def test_what_does_not_compose_is_refused(wrong):
    with pytest.raises(ConfigError):
        parse(wrong)


def test_a_grid_of_two_stages_is_of_both_together():
    assert TwoStage(1, 1, grid=(1.0, 0.3, 0.0)).sampling.steps == 2
    with pytest.raises(ConfigError, match="A grid for two stages of 3 steps has 4 clocks"):
        TwoStage(2, 1, grid=(1.0, 0.3, 0.0))


@pytest.mark.parametrize(
    ("policy", "compute", "words"),
    [
        (helpers.token_policy(DiscreteFlowConfig), Dense(2, noise_scale=0.5), "sets a noise scale .* DiscreteFlowDecoder"),
        (helpers.token_policy(MaskedDiffusionConfig), Dense(2, solver="heun"), "second-order solver"),
        (helpers.token_policy(AutoregressiveConfig), Dense(grid=(1.0, 0.3, 0.0)), "Give a number of steps"),
        (helpers.policy(), Dense(2, temperature=0), "a FlowDecoder draws no tokens"),
        (helpers.policy(), Dense(2, expected=True), "a FlowDecoder without ids ordered by value"),
        (helpers.policy(), Refine(AtRandom(), Sampling(2, temperature=0)), "a FlowDecoder draws no tokens"),
        (helpers.token_policy(MaskedDiffusionConfig), RefineTokens(sampling=HALF), "noise scale"),
    ],
)
def test_settings_that_the_decoder_cannot_heed_are_refused_before_anything_runs(policy, compute, words, monkeypatch):
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    with pytest.raises(CapabilityError, match=words):
        policy.act(helpers.observation(), compute)
    assert not calls


def test_defaults_need_nothing():
    assert Dense().needs == Requirements()


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_a_dense_chunk_reports_the_layers_that_ran(solver, monkeypatch):
    policy = helpers.policy()
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    out = decode(policy, Dense(3, solver=solver))
    assert out.layer_passes == (len(calls),) * 2
    assert out.nfe == ({"euler": 3, "midpoint": 6, "heun": 5}[solver],) * 2


def test_both_rounds_of_a_refinement_follow_their_settings(monkeypatch):
    policy = helpers.policy()
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    out = decode(policy, Refine(AtRandom(1.0), Sampling(2, solver="midpoint"), Dense(3)))
    assert out.nfe == (3 + 4,) * 2
    assert out.layer_passes == (len(calls),) * 2
    second = decode(policy, Refine(AtRandom(1.0), Sampling(2, noise_scale=0), Dense(3)))  # nothing of the noisy draft is left
    plain = decode(policy, Dense(2, noise_scale=0))
    torch.testing.assert_close(second.action_BLD, plain.action_BLD, atol=1e-6, rtol=0)


def test_an_exit_plan_with_settings_survives_its_file():
    plan = ExitPlan((1, 2), sampling=Sampling(2, 0.5, (1.0, 0.3, 0.0), "heun"))
    assert from_json(ExitPlan, to_json(plan), "x.json") == plan
