"""Folded networks and their programs give the chunks of the networks they were made of; programs run uncompiled here."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Generator

from tests import helpers
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import BelowThreshold
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.refine import Refine
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.latent_flow import LatentFlowConfig
from vlaflow.decoders.latent_reader import LatentTokensConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.model import Model
from vlaflow.decoders.rating import Rater
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.engine.deployed import DeployedModel
from vlaflow.engine.fold import folded
from vlaflow.engine.linear import in_bfloat16, transposed
from vlaflow.engine.plan import needed
from vlaflow.engine.programs import ProgramKey, Programs
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.spec import ActionPrefix
from vlaflow.stacks.expert import ExpertConfig

ROUNDING = 1e-5
"""Normalised: sums in another order."""
EXPERT = ExpertConfig(BlockConfig(16, 2, 2, 16, 32, norm="rms", gated=True))
DECODERS = {
    "flow": FlowConfig(4, 6),
    "flow with padding": FlowConfig(4, 6, padded_dim=8, head_layers=1),
    "expert": FlowConfig(4, 6, expert=EXPERT, masks="synchronous"),
    "expert with a time token": FlowConfig(4, 6, expert=EXPERT, masks="synchronous", time_token=True),
    "latent flow": LatentFlowConfig(FlowConfig(4, 6, expert=EXPERT, masks="synchronous"), LatentTokensConfig(2, 4)),
    "latent flow, code after code": LatentFlowConfig(
        FlowConfig(4, 6, expert=EXPERT, masks="synchronous"), LatentTokensConfig(2, 4, "autoregressive"), sees="prefix+latent"
    ),
    "regression": RegressionConfig(4, 6),
    "discrete flow": DiscreteFlowConfig(4, helpers.BINS, chunk_size=6),
    "discrete flow with rates and clocks": DiscreteFlowConfig(4, helpers.BINS, chunk_size=6, velocity="rate", clock_input=True),
    "discrete flow seen by the prefix": DiscreteFlowConfig(4, helpers.BINS, chunk_size=6, attention="full"),
    "discrete flow seen by the prefix now and then": DiscreteFlowConfig(
        4, helpers.BINS, chunk_size=6, attention="full", refresh=0.5
    ),
    "masked diffusion": MaskedDiffusionConfig(4, helpers.BINS, chunk_size=6),
    "autoregression": AutoregressiveConfig(4, helpers.FAST, chunk_size=6),
}
STEPS = 3


def made(decoder, rater=False):
    """A policy whose every parameter counts: norms with weights and biases of their own, exits with heads of their own."""
    config = helpers.policy_config(rater)
    backbone = dataclasses.replace(config.backbone, depth=3 if rater else 2)
    exits = ExitTraining((1, 2, 3), own_heads=1) if rater else None
    config = dataclasses.replace(config, backbone=backbone, decoder=decoder, exits=exits)
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    policy = Policy.create(config, helpers.action_spec(), stats, 0)
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    policy.model.eval()
    return policy


def deployed(policy, *computes, batches=(1,), lengths=(16, 32), network=None):
    """The policy computed by its programs, and these."""
    processor = policy.processor.backbone.bucketed(lengths)
    prepare = dataclasses.replace(policy, backbone_processor=processor).processor
    network = network or transposed(folded(policy.model))
    words = ["x" * length for length in lengths]
    inputs = [prepare(ObservationBatch.collate([helpers.observation(0, w)] * n)) for w in words for n in batches]
    depth = policy.model.backbone.spec.depth
    listed = {p.key: p for compute in computes for p in needed(network, inputs, compute.passes(depth))}

    def call(program):
        def run(tensors):
            shapes = [(t.shape, t.dtype) for t in program.examples]
            assert [(t.shape, t.dtype) for t in tensors] == shapes, program.key
            assert all(t.is_contiguous() for t in tensors), program.key
            return program.module(*tensors)

        return run

    programs = Programs({key: call(program) for key, program in listed.items()})
    return dataclasses.replace(policy, model=DeployedModel(network, programs, "test"), backbone_processor=processor), programs


def largest_difference(policy, other, compute, count=1, **more):
    """Between chunks of both, in normalised units; observations differ in length."""
    seen = [helpers.observation(i, ["Open a drawer", "Close the other one, please"][i % 2]) for i in range(count)]
    one, two = (p.act(seen, compute, generator=helpers.generators(count), **more) for p in (policy, other))
    scale = np.array(policy.stats["action"].std)
    return max(np.abs((a.actions - b.actions) / scale).max() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", DECODERS)
def test_programs_give_the_chunk_of_the_networks(name):
    """Folding is algebra: whatever the decoder, only rounding differs, for one observation and where a batch is filled up."""
    policy, compute = made(DECODERS[name]), Dense(STEPS)
    other, programs = deployed(policy, compute, batches=(1, 3))
    for count in (1, 2):
        assert largest_difference(policy, other, compute, count) < ROUNDING
    assert not programs.missed


@pytest.mark.parametrize("sampling", ["5", "2@0.5", "1-0.3-0", "3,midpoint", "3,heun"])
def test_one_set_of_programs_serves_every_sampler(sampling):
    policy = made(DECODERS["flow with padding"])
    other, programs = deployed(policy, Dense())
    grid = (1.0, 0.3, 0.0) if sampling == "1-0.3-0" else None
    chosen = {
        "5": Sampling(5),
        "2@0.5": Sampling(2, 0.5),
        "1-0.3-0": Sampling(grid=grid),
        "3,midpoint": Sampling(3, solver="midpoint"),
        "3,heun": Sampling(3, solver="heun"),
    }[sampling]
    assert largest_difference(policy, other, Dense.by(chosen)) < ROUNDING
    assert not programs.missed


class FirstActions(Rater):
    """A rater of another distribution: it looks at the state that the prefix knows, which no program of ours is given."""

    def __init__(self):
        super().__init__()
        self.judge = torch.nn.Linear(4 + 4, 1)

    def forward(self, prefix, action_BLD):
        state_BLS = prefix.state_BS[:, None].expand(-1, action_BLD.shape[1], -1)
        return self.judge(torch.cat((state_BLS, action_BLD), -1))[..., 0].sigmoid()


def test_a_rater_of_another_distribution_runs_as_it_is():
    policy = made(FlowConfig(4, 6))
    policy = dataclasses.replace(policy, model=Model(policy.model.backbone, policy.model.decoder, FirstActions()))
    compute = Refine(BelowThreshold(0.5), Sampling(STEPS), Dense(STEPS))
    other, programs = deployed(policy, compute)
    chunk = other.act(helpers.observation(), compute)
    assert chunk.layer_passes == 2 + 2 * STEPS + 1 + 2 * STEPS * bool(chunk.regenerated.any())
    assert largest_difference(policy, other, compute) < ROUNDING
    assert not programs.missed


EXITS = EarlyExit(ExitPlan((1, 2, 3), "l2", Sampling(2)), (0.3, np.inf))
SHALLOW = dataclasses.replace(EXITS, thresholds=(9.0, np.inf))
COMPUTES = {
    "consensus": Consensus(3, inner=Dense(STEPS)),
    "medoid of early exits": Consensus(2, "medoid", EXITS),
    "early exit": EXITS,
    "refine": Refine(BelowThreshold(1.0), Sampling(STEPS), Dense(STEPS)),
    "refine after an early exit": Refine(BelowThreshold(1.0), Sampling(2), SHALLOW),
}


@pytest.mark.parametrize("name", COMPUTES)
def test_a_compute_policy_names_every_pass_it_takes(name):
    """Batches of one to three, of which some rows leave early: the programs for one and four serve all of them."""
    policy, compute = made(FlowConfig(4, 6), rater=True), COMPUTES[name]
    other, programs = deployed(policy, compute, batches=(1, 4))
    for count in (1, 3):
        assert largest_difference(policy, other, compute, count) < ROUNDING
    assert not programs.missed


@pytest.mark.parametrize("guided", [False, True])
def test_committed_actions_and_guidance_are_kept(guided):
    """Given actions enter a program by their clocks and stay to the bit; guidance needs gradients and runs the networks."""
    policy = made(FlowConfig(4, 6))
    other, programs = deployed(policy, Dense(STEPS))
    prefix = [ActionPrefix(np.full((3, 4), 0.25, np.float32), 2)]
    more = {"action_prefix": prefix, "guided": guided}
    assert largest_difference(policy, other, Dense(STEPS), **more) < ROUNDING
    chunk = other.act([helpers.observation()], Dense(STEPS), **more)[0]
    assert (chunk.actions[:2] == 0.25).all()
    assert not programs.missed


def test_what_has_no_program_is_computed_by_the_networks_and_said_once(capsys):
    policy, compute = made(FlowConfig(4, 6)), Dense(STEPS)
    other, programs = deployed(policy, compute, lengths=(16,), network=folded(policy.model))
    assert largest_difference(policy, other, compute, 2) < ROUNDING
    assert {key.part for key in programs.missed} == {"embed", "run", "step"}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 observations and 32 tokens (embed-32-0-0-2)" in said


def test_bfloat16_stays_within_its_tolerance():
    """Products of 8 bits, sums and solver in float32: a hundredth of a standard deviation, not a tenth."""
    policy, compute = made(FlowConfig(4, 6)), Dense(5)
    other, _ = deployed(policy, compute, network=in_bfloat16(folded(policy.model)))
    assert 0 < largest_difference(policy, other, compute) < 0.05


def test_folding_leaves_the_policy_alone():
    policy = made(FlowConfig(4, 6))
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    deployed(policy, Dense(STEPS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


class Residual(torch.nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Halved(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


OTHERS = {
    "a row with a way around it": Residual(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)),
    "another linear layer": torch.nn.Sequential(torch.nn.LayerNorm(16), Halved(16, 16), torch.nn.Linear(16, 16)),
    "torch's own block, which reads its matrices": torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_parts_of_other_packages_compute_what_they_did(name):
    """A rule is for the class that it was written for: what derives from it may compute something else."""
    network = torch.nn.ModuleList([OTHERS[name]]).eval()
    generator = Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator)
    with torch.inference_mode():
        expected, found = network[0](x), transposed(folded(network))[0](x)
    assert (expected - found).abs().max() < ROUNDING


def test_a_smaller_batch_takes_the_next_program():
    """And a larger one has none."""
    rows = []
    key = ProgramKey("run", 7, 0, 2, 4)
    programs = Programs({key: lambda tensors: rows.append(len(tensors[0])) or [2 * tensors[0]]})
    found = programs.find(dataclasses.replace(key, batch=3))
    x = torch.arange(3.0)[:, None]
    assert torch.equal(found([x])[0], 2 * x)
    assert rows == [4]
    assert programs.find(dataclasses.replace(key, batch=5)) is None


def test_names_of_programs_can_be_read_back():
    key = ProgramKey("step", 12, 0, 4, 8)
    assert ProgramKey.named(str(key)) == key
