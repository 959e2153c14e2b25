"""Latent actions in front of a flow expert: who reads what, where gradients go, and that both ways of answering agree."""

from dataclasses import replace
from math import inf

import pytest
import torch

from tests import helpers
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.refine import Refine
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Targets
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.latent_flow import LatentFlowConfig
from vlaflow.decoders.latent_reader import LatentTokensConfig
from vlaflow.errors import ConfigError
from vlaflow.flows import gaussian
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.stacks.expert import ExpertConfig

K, BOOK = 4, 8
EXPERT = ExpertConfig(BlockConfig(width=24, heads=3, kv_heads=3, head_dim=8, ffn=32), projected=True)
FLOW = FlowConfig(4, 6, masks="synchronous", expert=EXPERT, time_token=True)


def policy(answer="parallel", fast=True, flow=FLOW, exits=None, **settings):
    tokens = AutoregressiveConfig(4, helpers.FAST, chunk_size=6) if fast else None
    decoder = LatentFlowConfig(flow, LatentTokensConfig(K, BOOK, answer), tokens, **settings)
    config = replace(helpers.policy_config(), system="iflybot", decoder=decoder, exits=exits)
    made = Policy.create(
        config, helpers.action_spec(), {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}, 0
    )
    made.model.eval()
    return made


def codes(size=3, seed=0):
    return torch.randint(BOOK, (size, K), generator=torch.Generator().manual_seed(seed))


def learn(made, code_BK="known", seed=0):
    batch = helpers.batch()
    batch = replace(batch, code_BK=codes() if isinstance(code_BK, str) else code_BK)
    made.model.train()
    return made.loss(made.prepare(batch), *helpers.generators(2, seed))


def gradients(made, total):
    made.model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def encoded(made, seed=0):
    return made.encode(helpers.batch(seed=seed).observation)


@pytest.mark.parametrize("shallow", [None, 0.2])
@pytest.mark.parametrize("answer", ["parallel", "autoregressive"])
def test_exits_weigh_the_answers_and_leave_codes_and_tokens_in_the_loss(answer, shallow):
    made = policy(answer, flow=replace(FLOW, expert=EXPERT))
    made = Policy(replace(made.config, exits=ExitTraining((1, 2), shallow=shallow)), made.action_spec, made.stats, made.model)
    terms = learn(made)
    first, last = terms.exits.values()
    answers = (first + last) / 2 if shallow is None else 0.2 * first + 0.8 * last
    torch.testing.assert_close(
        terms.total, answers + terms.parts["latent"] + made.config.decoder.fast_weight * terms.parts["fast"]
    )
    reached = gradients(made, terms.total)
    assert "decoder.latent.head.weight" in reached
    assert any(name.startswith("backbone") for name in reached)
    made.model.eval()
    held_out = made.loss(made.prepare(replace(helpers.batch(), code_BK=codes())), *helpers.generators(2))
    assert held_out.total.item() > held_out.exits[2].item()


def test_codes_that_follow_each_other_are_learned_at_every_exit():
    """A shallow exit reads the codes that its own depth answers."""
    made = policy("autoregressive")
    decoder, prefix = made.model.decoder, encoded(made)
    targets = Targets(torch.randn(3, 6, 4), torch.ones(3, 6, dtype=torch.bool), codes())
    terms = decoder.loss(prefix, targets, torch.Generator().manual_seed(0), (1, 2))
    hidden = decoder.latent.teach(prefix, codes(), (1, 2)).hidden
    expected = torch.stack([decoder.latent.loss(hidden_BKW, codes()) for hidden_BKW in hidden]).mean()
    assert len(hidden) == 2
    torch.testing.assert_close(terms.parts["latent"], expected.detach())


def test_truncation_leaves_the_flow_loss_exactly_no_gradient_in_backbone_and_codes():
    for truncate in (True, False):
        made = policy(truncate=truncate, teaches=False)
        touched = gradients(made, learn(made).total)
        below = [name for name in touched if name.startswith(("backbone.", "decoder.latent."))]
        assert bool(below) != truncate
        assert any(name.startswith("decoder.flow.") for name in touched)


def test_with_truncation_the_backbone_learns_from_codes_and_fast_tokens_alone():
    made = policy(latent_weight=0.0, fast_weight=0.0)
    assert not [n for n in gradients(made, learn(made).total) if not n.startswith("decoder.flow.")]
    for weights, touched in (({"fast_weight": 0.0}, "decoder.latent.head"), ({"latent_weight": 0.0}, "decoder.fast.head")):
        names = gradients(made := policy(**weights), learn(made).total)
        assert any(n.startswith("backbone.layers.") for n in names)
        assert any(n.startswith(touched) for n in names)


def test_the_fast_tokens_change_nothing_that_the_expert_makes():
    with_fast, without = policy(), policy(fast=False)
    without.model.load_state_dict({k: v for k, v in with_fast.model.state_dict().items() if ".fast." not in k})
    one, other = learn(with_fast), learn(without)
    assert float(one.parts["velocity"]) == float(other.parts["velocity"])
    assert "fast" in one.parts
    with torch.no_grad():
        with_fast.model.decoder.fast.embedding.weight.normal_()
    assert float(learn(with_fast).parts["velocity"]) == float(one.parts["velocity"])


@pytest.mark.parametrize("answer", ["parallel", "autoregressive"])
def test_the_latent_experts_output_depends_on_the_image_through_the_codes_alone(answer):
    """Any other prefix with the same latent keys and values gives the same chunk; with the prefix in sight it does not."""
    for sees, same in (("latent", True), ("prefix+latent", False)):
        made = policy(answer, sees=sees)
        decoder, here, there = made.model.decoder, encoded(made), encoded(made, seed=9)
        there = replace(there, state_BS=here.state_BS)
        with torch.no_grad():
            written = decoder.latent.read(here)
            contexts = [decoder._context(prefix, written) for prefix in (here, there)]
            chunks = [decoder.flow.sample(prefix, helpers.generators(3), Sampling(2)) for prefix in contexts]
        assert torch.equal(chunks[0], chunks[1]) == same


def test_the_codes_depend_on_the_image():
    made = policy()
    with torch.no_grad():
        hidden = [made.model.decoder.latent.read(encoded(made, seed)).hidden[0] for seed in (0, 9)]
    assert not torch.equal(*hidden)


def test_an_autoregressive_answer_with_kept_keys_and_values_equals_the_recomputed_one():
    made = policy("autoregressive")
    prefix, latent = encoded(made), made.model.decoder.latent
    with torch.no_grad():
        cached = latent.read(prefix)
        code_BK = made.model.decoder.codes(prefix)
        again = latent.teach(prefix, code_BK, (prefix.depth,))
    torch.testing.assert_close(cached.hidden[0], again.hidden[0])
    for kept, computed in zip(cached.kv_cache, again.kv_cache, strict=True):
        torch.testing.assert_close(kept.key_CGPE, computed.key_CGPE)
        torch.testing.assert_close(kept.value_CGPE, computed.value_CGPE)


def test_where_no_code_is_known_the_expert_reads_the_codes_it_would_read_in_action():
    """Frames at the end of an episode teach actions behind the backbone's own answer, not behind a made-up code."""
    made = policy("autoregressive")
    prefix, latent, code_BK = encoded(made), made.model.decoder.latent, codes()
    code_BK[1] = -1
    with torch.no_grad():
        said, taught = latent.read(prefix), latent.teach(prefix, code_BK, (prefix.depth,))
        true = latent.teach(prefix, codes(), (prefix.depth,))
    for acted, learned, known in zip(said.kv_cache, taught.kv_cache, true.kv_cache, strict=True):
        torch.testing.assert_close(learned.key_CGPE[1], acted.key_CGPE[1])
        torch.testing.assert_close(learned.key_CGPE[[0, 2]], known.key_CGPE[[0, 2]], rtol=0, atol=0)
    assert not torch.equal(made.model.decoder.codes(prefix)[1], torch.zeros(K))


def test_a_later_code_cannot_be_seen_by_an_earlier_one():
    made = policy("autoregressive")
    prefix, latent, one = encoded(made), made.model.decoder.latent, codes()
    other = one.clone()
    other[:, 2] = (other[:, 2] + 1) % BOOK
    with torch.no_grad():
        first, second = (latent.teach(prefix, c, (prefix.depth,)).hidden[0] for c in (one, other))
    torch.testing.assert_close(first[:, :3], second[:, :3], rtol=0, atol=0)
    assert not torch.equal(first[:, 3], second[:, 3])


def test_unknown_codes_teach_nothing():
    made = policy(fast=False)
    prefix, latent = encoded(made), made.model.decoder.latent
    hidden = latent.teach(prefix, None, (prefix.depth,)).hidden[-1]
    known = codes()
    known[0] = -1
    assert float(latent.loss(hidden, known)) == pytest.approx(float(latent.loss(hidden[1:], known[1:])))
    assert float(latent.loss(hidden, torch.full((3, K), -1))) == 0


def test_several_noise_draws_on_one_prefix_equal_as_many_passes_with_these_noises():
    """One loss over five draws is the mean of five losses of one draw each, given the same noise and times."""
    made = policy(flow=replace(FLOW, noise_samples=5), fast=False, teaches=False)
    decoder, prefix = made.model.decoder, encoded(made)
    targets = Targets(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)), torch.ones(3, 6, dtype=torch.bool))
    calls = []
    velocity = decoder.flow.velocity

    def watched(x_BLX, clock_BL, seen):
        calls.append((x_BLX, clock_BL))
        return velocity(x_BLX, clock_BL, seen)

    decoder.flow.velocity = watched
    with torch.no_grad():
        together = decoder.loss(prefix, targets, torch.Generator().manual_seed(0)).total
        context = decoder._context(prefix, decoder.latent.read(prefix))
        action = targets.action_BLD.repeat_interleave(5, 0)
        generator = torch.Generator().manual_seed(0)
        time = gaussian.sample_time((15, 1), generator, 1.5, 0.001)
        noise = torch.randn(action.shape, generator=generator)
        clock = time.expand(15, 6)
        losses = []
        for draw in range(5):
            rows = torch.arange(draw, 15, 5)
            x = gaussian.interpolate(action[rows], noise[rows], clock[rows])
            losses.append((velocity(x, clock[rows], context) - (noise - action)[rows]).square().mean())
    assert float(together) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_the_time_token_leads_and_sees_itself_alone_and_the_state_only_the_time():
    made = policy()
    stack = made.model.decoder.flow.stack
    mask = stack._mask(torch.zeros(1, 8, 24))
    assert mask[0].tolist() == [True] + [False] * 7
    assert mask[1].tolist() == [True, True] + [False] * 6
    assert bool(mask[2:].all())


def test_a_chunk_is_the_same_alone_and_in_a_batch():
    made = policy()
    observations = [helpers.observation(i) for i in range(3)]
    for one, alone in zip(made.act(observations, Dense(5)), observations, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.actions), torch.tensor(made.act(alone, Dense(5)).actions), rtol=0, atol=1e-5
        )


def test_the_flow_heeds_noise_scale_grid_and_solver():
    made, quiet = policy(), Dense(grid=(1.0, 0.3, 0.0), noise_scale=0, solver="midpoint")
    one, other = (made.act(helpers.observation(), quiet, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert (one.actions == other.actions).all()
    assert one.nfe == 4
    assert (made.act(helpers.observation(), Dense(2)).actions != one.actions).any()


@pytest.mark.parametrize("answer", ["parallel", "autoregressive"])
def test_a_checkpoint_comes_back_to_the_bit(tmp_path, answer):
    made = policy(answer, sees="prefix+latent")
    made.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert again.config == made.config
    assert (again.act(helpers.observation(), Dense(2)).actions == made.act(helpers.observation(), Dense(2)).actions).all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: learn(policy(), None), "the batch has none"),
        (lambda: policy("autoregressive", teaches=False), "cannot be left untaught"),
        (lambda: policy(flow=FlowConfig(4, 6)), "needs an expert"),
        (lambda: policy(flow=replace(FLOW, chunk_size=5)), "give both the same"),
        (lambda: LatentTokensConfig(0), "at least one code"),
        (lambda: FlowConfig(4, 6, time_token=True, masks="synchronous"), "needs an expert"),
        (lambda: replace(FLOW, masks="unified"), "one clock for all"),
    ],
)
def test_what_does_not_fit_is_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


@pytest.mark.parametrize("answer", ["parallel", "autoregressive"])
@pytest.mark.parametrize(
    "compute",
    [
        Dense(3),
        Dense(3, depth=1),
        Consensus(3, inner=Dense(2)),
        Refine(AtRandom(1.0), Sampling(2), Dense(3), any_training=True),
        EarlyExit(ExitPlan((1, 2), "l2", Sampling(2)), (inf,)),
    ],
    ids=lambda compute: compute.name,
)
def test_layer_passes_count_the_latent_tokens(answer, compute, monkeypatch):
    """They pass the backbone's layers as often as the chunk is begun; the rest is prefix and expert."""
    made = policy(answer, flow=replace(FLOW, masks="unified", time_token=False), exits=ExitTraining((1, 2)))
    ran = [0]

    def counted(run):
        def layer(*arguments, **settings):
            hidden = arguments[1] if isinstance(arguments[0], int) else arguments[0]
            ran[0] += len(hidden)
            return run(*arguments, **settings)

        return layer

    monkeypatch.setattr(made.model.backbone, "layer", counted(made.model.backbone.layer))
    for layer in made.model.decoder.flow.stack.layers:
        monkeypatch.setattr(layer, "forward", counted(layer.forward))
    chunk = made.act(helpers.observation(), compute)
    assert chunk.layer_passes == ran[0]
