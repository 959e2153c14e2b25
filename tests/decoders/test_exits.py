"""Multi-exit training, and the regression decoder."""

from dataclasses import replace

import pytest
import torch

from tests import helpers
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Conditioning, Targets
from vlaflow.decoders.exits import ExitTraining, every
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.stacks.expert import ExpertConfig

EXPERT = ExpertConfig(BlockConfig(24, 2, 2, 16, 48))
DECODERS = [FlowConfig(4, chunk_size=6), FlowConfig(4, chunk_size=6, expert=EXPERT), RegressionConfig(4, chunk_size=6)]


def policy(decoder, choose="all", depths=(1, 2, 3), **exits):
    config, exits = helpers.policy_config(), ExitTraining(depths, choose, **exits)
    config = replace(config, backbone=replace(config.backbone, depth=3), decoder=decoder, exits=exits)
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    return Policy.create(config, helpers.action_spec(4), stats, seed=0)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loss_of_all_exits_is_the_mean_of_theirs(decoder):
    made = policy(decoder)
    prefix, targets = made.encode(helpers.batch().observation), made.targets(helpers.batch())
    single = [
        made.model.decoder.loss(made.encode(helpers.batch().observation, depth), targets, generator()).total
        for depth in (1, 2, 3)
    ]
    together = made.model.decoder.loss(prefix, targets, generator(), (1, 2, 3))
    torch.testing.assert_close(together.total, torch.stack(single).mean())
    assert [float(loss) for loss in together.exits.values()] == [float(loss) for loss in single]
    weighted = ExitTraining((1, 2, 3), shallow=0.2).total(together).total
    torch.testing.assert_close(weighted, 0.8 * single[2] + 0.1 * single[0] + 0.1 * single[1])
    assert len(together.parts) == 4


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_random_exit_runs_no_layer_beyond_it_and_is_the_same_for_all_processes(decoder, monkeypatch):
    made = policy(decoder, "random").model and policy(decoder, "random")
    made.model.train()
    calls = helpers.count_layers(monkeypatch, made.model.backbone)
    deepest = []
    for seed in range(12):
        calls.clear()
        terms = made.loss(made.prepare(helpers.batch(seed=seed)), generator(seed), generator(seed % 6))
        deepest.append(max(index for index, _ in calls) + 1)
        terms.total.backward()
    assert deepest[:6] == deepest[6:]  # other batches and noise, same shared seed
    assert set(deepest) == {1, 2, 3}


def test_validation_measures_the_full_depth_whatever_was_trained():
    for choose in ("all", "random"):
        made = policy(DECODERS[0], choose)
        made.model.eval()
        terms = made.loss(made.prepare(helpers.batch()), generator(), generator())
        plain = made.model.decoder.loss(made.encode(helpers.batch().observation), made.targets(helpers.batch()), generator())
        assert torch.equal(terms.total, plain.total)
        assert set(terms.parts) == {"velocity", "velocity@1", "velocity@2", "velocity@3"}


def test_exits_must_end_at_the_full_depth():
    with pytest.raises(ConfigError, match="must be the backbone's depth, 3"):
        policy(DECODERS[0], depths=(1, 2))
    for wrong in ((), (0, 3), (2, 1), (1, 1)):
        with pytest.raises(ConfigError, match="ascend"):
            ExitTraining(wrong)


def test_a1s_exits():
    assert every(2, 28) == tuple(range(2, 29, 2))
    assert every(3, 4) == (3, 4)


@pytest.mark.parametrize("queries", ["dimension", "action"])
@pytest.mark.parametrize("expert", [None, EXPERT])
def test_regression_answers_the_same_for_any_steps_and_noise(queries, expert):
    made = policy(RegressionConfig(4, chunk_size=6, queries=queries, expert=expert))
    made.model.eval()
    with torch.no_grad():
        prefix = made.encode(helpers.batch().observation)
        one = made.model.decoder.sample(prefix, helpers.generators(3), Sampling(1))
        ten = made.model.decoder.sample(prefix, helpers.generators(3, seed=9), Sampling(10))
    assert one.shape == (3, 6, 4)
    assert torch.equal(one, ten)
    assert made.model.decoder.nfe(Sampling(10)) == 1


def test_regression_counts_valid_actions_only_and_learns():
    made = policy(RegressionConfig(4, chunk_size=6))
    decoder, prefix = made.model.decoder, made.encode(helpers.batch().observation).detach()
    action, valid = torch.randn(3, 6, 4, generator=generator()), torch.ones(3, 6, dtype=torch.bool)
    valid[:, 4:] = False
    with torch.no_grad():
        made_BLD = decoder.sample(prefix, helpers.generators(3), Sampling(1))
    terms = decoder.loss(prefix, Targets(action, valid), generator())
    torch.testing.assert_close(terms.total, (made_BLD - action)[:, :4].abs().mean())
    optimiser = torch.optim.Adam(decoder.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        decoder.loss(prefix, Targets(action, valid), generator()).total.backward()
        optimiser.step()
    assert decoder.loss(prefix, Targets(action, valid), generator()).total < 0.5 * terms.total


def test_regression_cannot_start_from_given_actions():
    made = policy(RegressionConfig(4, chunk_size=6))
    prefix = made.encode(helpers.batch().observation)
    with pytest.raises(CapabilityError, match="given"):
        made.model.decoder.start(
            prefix, helpers.generators(3), Sampling(1), Conditioning(torch.zeros(3, 6, 4), torch.zeros(3, 6))
        )


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_new_config_survives_the_checkpoint(decoder, tmp_path):
    made = policy(decoder)
    made.model.eval()
    made.save_pretrained(tmp_path / "ckpt")
    again = Policy.from_pretrained(tmp_path / "ckpt")
    assert again.config == made.config
    chunk = [p.act(helpers.observation(), generator=generator()).actions for p in (made, again)]
    assert (chunk[0] == chunk[1]).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_shared_head_learns_at_every_exit(decoder):
    made = policy(decoder)
    made.model.train()
    made.loss(made.prepare(helpers.batch()), generator(), generator()).total.backward()
    missing = [name for name, p in made.model.decoder.named_parameters() if p.grad is None]
    assert missing == []


OWN = "decoder.exit_heads."


def gradients(made):
    """By parameter, after one training step's loss."""
    made.model.train()
    made.loss(made.prepare(helpers.batch()), generator(), generator()).total.backward()
    return {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_detached_exits_leave_all_other_weights_to_the_full_depth(decoder, distil):
    plain = gradients(policy(decoder, depths=(3,)))
    made = gradients(policy(decoder, own_heads=1, detached=True, distil=distil))
    own = {name for name in made if name.startswith(OWN)}
    assert made.keys() - own == plain.keys()
    assert {name.removeprefix(f"{OWN}at.")[0] for name in own} == {"1", "2"}
    for name, gradient in plain.items():
        torch.testing.assert_close(made[name], gradient)
    assert all(bool((made[name] != 0).any()) for name in own)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_depth_answers_with_its_own_head(decoder, tmp_path):
    made = policy(decoder, own_heads=2)
    made.model.eval()
    made.save_pretrained(tmp_path / "ckpt")
    again = Policy.from_pretrained(tmp_path / "ckpt")

    def chunks(of):
        with torch.no_grad():
            return [
                of.model.decoder.sample(of.encode(helpers.batch().observation, depth), helpers.generators(3), Sampling(1))
                for depth in (1, 2, 3)
            ]

    before = chunks(made)
    assert all(torch.equal(one, other) for one, other in zip(before, chunks(again), strict=True))
    with torch.no_grad():
        for parameter in made.model.decoder.exit_heads.at["2"].parameters():
            parameter.zero_()
    after = chunks(made)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_shallow_depths_learn_the_answer_of_the_last():
    """One number per depth, squared error: 1 and 4 learn 3, which learns 10 and is not pulled towards them."""
    hidden = [torch.tensor(value, requires_grad=True) for value in (1.0, 4.0, 3.0)]

    def losses(exits, depths, training=True):
        return exits.losses(
            hidden[-len(depths) :], depths, lambda h, depth: h, lambda a, b: (a - b) ** 2, torch.tensor(10.0), training=training
        )

    taught = losses(ExitTraining((1, 2, 3), distil=True), (1, 2, 3))
    assert {depth: loss.item() for depth, loss in taught.items()} == {1: 4, 2: 1, 3: 49}
    sum(taught.values()).backward()
    assert [h.grad.item() for h in hidden] == [-4, 2, -14]
    validated = losses(ExitTraining((1, 2, 3), distil=True), (1, 2, 3), training=False)
    assert {depth: loss.item() for depth, loss in validated.items()} == {1: 81, 2: 36, 3: 49}


def test_what_exits_cannot_be():
    for settings in ({"detached": True}, {"detached": True, "own_heads": 1, "shallow": 0.2}):
        with pytest.raises(ConfigError, match="detached"):
            ExitTraining((1, 2), **settings)
    with pytest.raises(ConfigError, match="choose='all'"):
        ExitTraining((1, 2), "random", distil=True)
    with pytest.raises(ConfigError, match="share its head"):
        helpers.token_policy(AutoregressiveConfig, exits=ExitTraining((1, 2), own_heads=1))
