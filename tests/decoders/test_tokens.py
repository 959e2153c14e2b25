"""Decoders of discrete tokens: what they share, and what each promises about its tokens."""

import math
from dataclasses import replace

import pytest
import torch

from tests import helpers
from vlaflow.actions.bins import BinsFit
from vlaflow.data.batch import Executed
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Conditioning, Targets, TokenConditioning, Tokens
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.token_metrics import BinMetric, EmbeddingMetric, SlotMetric
from vlaflow.decoders.tokens import cross_entropy
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.discrete import TrainingClocks
from vlaflow.flows.masked import still_masked
from vlaflow.flows.sampling import Sampling

EQUAL = {"atol": 2e-5, "rtol": 1e-4}  # float32 products in another order
REVISING = [
    (MaskedDiffusionConfig, {}),
    (DiscreteFlowConfig, {}),
    (DiscreteFlowConfig, {"metric": EmbeddingMetric("frozen", 4), "guess": "sample", "jump": "exponential"}),
    (DiscreteFlowConfig, {"velocity": "rate"}),
    (DiscreteFlowConfig, {"attention": "full", "refresh": 0.3}),
    (DiscreteFlowConfig, {"clock_input": True, "masks": "unified"}),
    (
        DiscreteFlowConfig,
        {
            "tokenizer": helpers.BINS,
            "metric": SlotMetric().fitted(helpers.BINS, helpers.chunks()),
            "clocks": TrainingClocks(power=1.5, pure=0.25),
            "noise_token": True,
            "self_conditioning": True,
            "guess": "expected",
        },
    ),
]
ALL = [(AutoregressiveConfig, {}), *REVISING, (DiscreteFlowConfig, {"metric": BinMetric(), "tokenizer": helpers.BINS})]
every_decoder = pytest.mark.parametrize(("config", "settings"), ALL)
every_revising = pytest.mark.parametrize(("config", "settings"), REVISING)


def prefix_of(policy, size=3):
    return policy.encode(helpers.batch(size).observation)


def targets_of(policy, size=3, seed=0):
    batch = helpers.batch(size)
    return Targets(torch.from_numpy(helpers.chunks(size, seed=seed)), batch.valid_BL)


def oracle(policy, size=3):
    """The policy's decoder with a head that knows the chunks, and their ids."""
    decoder = policy.model.decoder
    id_BS, _ = decoder.encode(targets_of(policy, size))
    decoder.head = helpers.Oracle(id_BS, decoder.vocabulary)
    return decoder, id_BS


@every_decoder
@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_with_an_oracle_every_decoder_reaches_the_target(config, settings, steps):
    policy = helpers.token_policy(config, **settings)
    decoder, id_BS = oracle(policy)
    if config is AutoregressiveConfig:
        # The head sees one slot at a time, so it must be told which.
        decoder.head = Turning(id_BS, decoder.vocabulary)
    if settings.get("velocity") == "rate":
        torch.nn.init.constant_(decoder.rate.bias, 50.0)
    with torch.inference_mode():
        state = decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(steps))
    assert torch.equal(state.id_BS, id_BS)
    made = decoder.finish(state)
    expected = torch.from_numpy(decoder.tokenizer.decode(id_BS.numpy()).action_BLD)
    assert torch.equal(made, expected)
    assert not decoder.tokens(state).repaired_B.any()


class Turning(torch.nn.Module):
    """An oracle that answers for slot 0, 1, 2, … in turn."""

    def __init__(self, id_BS, vocabulary):
        super().__init__()
        self.logits, self.slot = 50.0 * torch.nn.functional.one_hot(id_BS, vocabulary).float(), 0

    def forward(self, hidden_B1W):
        self.slot += 1
        return self.logits[:, self.slot - 1 : self.slot]


@every_decoder
def test_same_seed_same_tokens_and_no_observation_depends_on_its_neighbours(config, settings):
    policy = helpers.token_policy(config, **settings)
    with torch.inference_mode():
        whole = policy.model.decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(6))
        again = policy.model.decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(6))
        one = policy.model.decoder.solve(
            prefix_of(policy).select(torch.tensor([1])), helpers.generators(1, seed=1), Sampling(6)
        )
    assert torch.equal(whole.id_BS, again.id_BS)
    assert torch.equal(whole.id_BS[1:2], one.id_BS)


@every_decoder
def test_the_loss_falls_on_one_batch_and_every_parameter_learns(config, settings):
    policy = helpers.token_policy(config, **settings)
    policy.model.train()
    batch, generator = helpers.batch(8), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        terms = policy.loss(policy.prepare(batch), generator, generator)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(float(terms.total.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    still = [name for name, p in policy.model.decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@every_decoder
def test_draws_are_only_corruptions_and_invalid_chunks_teach_nothing(config, settings):
    policy = helpers.token_policy(config, **settings)
    decoder, prefix, targets = policy.model.decoder, prefix_of(policy), targets_of(policy)
    nothing = Targets(targets.action_BLD, torch.zeros_like(targets.valid_BL))
    assert float(decoder.loss(prefix, nothing, torch.Generator().manual_seed(0)).total.detach()) == 0
    some = targets.valid_BL.clone()
    some[0] = False
    changed = targets.action_BLD.clone()
    changed[0] = changed[0].flip(0)
    losses = [
        decoder.loss(prefix, Targets(a, some), torch.Generator().manual_seed(0)).total for a in (targets.action_BLD, changed)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("tokenizer", [helpers.FAST, helpers.BINS])
def test_tokens_of_a_whole_chunk_teach_nothing_once_an_intervention_leaves_out_a_part(tokenizer):
    """The end of an episode leaves out a part as well, but repeats the last action; noted actions after an intervention
    mislead.
    """
    policy = helpers.token_policy(DiscreteFlowConfig, tokenizer)
    targets, decoder = targets_of(policy), policy.model.decoder
    intervened_BL, present_BL = torch.zeros_like(targets.valid_BL), targets.valid_BL.clone()
    intervened_BL[0, 2] = True
    present_BL[1, 4:] = False
    executed = Executed(targets.action_BLD, intervened_BL, present_BL)
    _, weight_BS = decoder.encode(replace(targets, valid_BL=executed.valid_after(0), executed=executed))
    if decoder.tokenizer.local:
        assert weight_BS.view(3, 6, 4).any(2).int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6]
    else:
        assert weight_BS.any(1).tolist() == [False, True, True]


@pytest.mark.parametrize("tokenizer", [helpers.FAST, helpers.BINS])
def test_tokens_of_a_whole_chunk_teach_nothing_where_a_number_is_wrong(tokenizer):
    policy = helpers.token_policy(DiscreteFlowConfig, tokenizer)
    targets, decoder = targets_of(policy), policy.model.decoder
    outlier_BL = torch.zeros_like(targets.valid_BL)
    outlier_BL[0, 2] = True
    executed = Executed(targets.action_BLD, torch.zeros_like(outlier_BL), torch.ones_like(outlier_BL), outlier_BL)
    _, weight_BS = decoder.encode(replace(targets, valid_BL=executed.valid_after(0), executed=executed))
    if decoder.tokenizer.local:
        assert weight_BS.view(3, 6, 4).any(2).int().tolist() == [[1, 1, 0, 1, 1, 1], [1] * 6, [1] * 6]
    else:
        assert weight_BS.any(1).tolist() == [False, True, True]


def test_with_bins_single_invalid_actions_teach_nothing():
    policy = helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=BinMetric())
    targets, prefix = targets_of(policy), prefix_of(policy)
    valid_BL = targets.valid_BL.clone()
    valid_BL[:, 4:] = False
    _, weight_BS = policy.model.decoder.encode(Targets(targets.action_BLD, valid_BL))
    assert weight_BS.view(3, 6, 4)[:, 4:].sum() == 0
    assert weight_BS.sum() == 3 * 4 * 4
    assert torch.isfinite(policy.model.decoder.loss(prefix, targets, torch.Generator().manual_seed(0)).total)


@every_decoder
def test_scores_that_are_no_numbers_become_no_chunk(config, settings):
    """Every id decodes to an ordinary chunk, which a robot would execute."""
    policy = helpers.token_policy(config, **settings)
    torch.nn.init.constant_(policy.model.decoder.head.weight, float("nan"))
    with torch.inference_mode():
        assert policy.model.decoder.sample(prefix_of(policy), helpers.generators(3), Sampling(3)).isnan().all()


def test_groups_that_took_other_numbers_of_steps_fit_into_one_batch():
    policy = helpers.token_policy(MaskedDiffusionConfig)
    decoder = policy.model.decoder
    with torch.inference_mode():
        parts = [decoder.tokens(decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(steps))) for steps in (2, 5)]
    joined = Tokens.cat(parts)
    assert joined.revised_BN.shape == (6, 5)
    assert torch.equal(joined.revised_BN[:3, :2], parts[0].revised_BN)
    assert not joined.revised_BN[:3, 2:].any()
    assert torch.equal(joined.revised_BN[3:], parts[1].revised_BN)


@pytest.mark.parametrize("doubt", [-2.0, 0.5, 3.0])
def test_how_often_a_token_leaves_is_the_rate_heads_alone(doubt):
    """However probable the network holds the token itself: with rho = 1 and one step every token goes to another."""
    policy = helpers.token_policy(DiscreteFlowConfig, velocity="rate", jump="linear")
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    begun = decoder.start(prefix, helpers.generators(3), Sampling(1))
    torch.nn.init.zeros_(decoder.rate.weight)
    torch.nn.init.constant_(decoder.rate.bias, math.log(math.e - 1))  # softplus is 1
    decoder.head = helpers.Oracle(begun.id_BS, decoder.vocabulary)
    decoder.head.logits *= doubt / 50
    with torch.inference_mode():
        moved = decoder.advance(begun, prefix)
    assert (moved.id_BS != begun.id_BS).all()


@every_revising
def test_given_tokens_at_clock_0_never_change_and_the_others_do(config, settings):
    policy = helpers.token_policy(config, **settings)
    decoder = policy.model.decoder
    id_BS, _ = decoder.encode(targets_of(policy))
    clock_BS = (torch.arange(decoder.slots) % 2).float().expand(3, -1)
    with torch.inference_mode():
        state = decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(5), TokenConditioning(id_BS, clock_BS))
        if Capability.DETERMINISTIC_STEPS in decoder.capabilities:
            state = decoder.refine_deterministic(state, prefix_of(policy), 2)
    kept = clock_BS == 0
    assert torch.equal(state.id_BS[kept], id_BS[kept])
    assert not torch.equal(state.id_BS[~kept], id_BS[~kept])
    assert bool((decoder.tokens(state).probability_BS[kept] == 1).all())


@every_revising
def test_nothing_to_make_changes_nothing(config, settings):
    policy = helpers.token_policy(config, **settings)
    id_BS, _ = policy.model.decoder.encode(targets_of(policy))
    with torch.inference_mode():
        conditioning = TokenConditioning(id_BS, torch.zeros(id_BS.shape))
        state = policy.model.decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(4), conditioning)
    assert torch.equal(state.id_BS, id_BS)


@every_decoder
def test_decoding_leaves_the_prefix_as_it_was(config, settings):
    """Words and images are context: neither their tokens nor their keys and values may change."""
    policy = helpers.token_policy(config, **settings)
    prefix = prefix_of(policy)
    before = [x.clone() for kv in prefix.kv_cache for x in (kv.key_CGPE, kv.value_CGPE)] + [prefix.hidden_BPW.clone()]
    with torch.inference_mode():
        state = policy.model.decoder.solve(prefix, helpers.generators(3), Sampling(4))
        if Capability.DETERMINISTIC_STEPS in policy.model.decoder.capabilities:
            policy.model.decoder.refine_deterministic(state, prefix, 2)
    after = [x for kv in prefix.kv_cache for x in (kv.key_CGPE, kv.value_CGPE)] + [prefix.hidden_BPW]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_given_actions_need_tokens_that_belong_to_one_action():
    bins = helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=BinMetric())
    action_BLD = torch.from_numpy(helpers.chunks(3))
    clock_BL = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(3, -1)
    with torch.inference_mode():
        made = bins.model.decoder.sample(
            prefix_of(bins), helpers.generators(3), Sampling(4), Conditioning(action_BLD, clock_BL)
        )
    ids = helpers.BINS.encode(action_BLD.numpy())
    expected = torch.from_numpy(helpers.BINS.decode(ids).action_BLD)
    assert torch.equal(made[:, :3], expected[:, :3])
    fast = helpers.token_policy(DiscreteFlowConfig)
    assert Capability.CONDITIONING in bins.model.decoder.capabilities
    assert Capability.CONDITIONING not in fast.model.decoder.capabilities
    with pytest.raises(CapabilityError, match="Train it with bins"):
        fast.model.decoder.start(prefix_of(fast), helpers.generators(3), Sampling(4), Conditioning(action_BLD, clock_BL))


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 8, 40])
def test_masked_diffusion_leaves_exactly_the_scheduled_numbers_masked(steps, remask):
    policy = helpers.token_policy(MaskedDiffusionConfig, remask=remask)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    state = decoder.start(prefix, helpers.generators(3), Sampling(steps))
    count_B = torch.full((3,), decoder.slots)
    before = state.hidden_BS
    with torch.inference_mode():
        for done in range(1, steps + 1):
            state = decoder.advance(state, prefix)
            assert torch.equal(state.hidden_BS.sum(1), still_masked(count_B, done, steps))
            if not remask:
                assert bool((before | ~state.hidden_BS).all()), "what is revealed stays revealed"
            before = state.hidden_BS
    assert not state.hidden_BS.any()


def test_without_remasking_a_revealed_token_is_final():
    policy = helpers.token_policy(MaskedDiffusionConfig)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    state = decoder.start(prefix, helpers.generators(3), Sampling(8))
    with torch.inference_mode():
        for _ in range(8):
            known, ids = ~state.hidden_BS, state.id_BS
            state = decoder.advance(state, prefix)
            assert torch.equal(state.id_BS[known], ids[known])


def test_the_autoregressive_cache_gives_what_one_causal_pass_gives():
    """Greedy tokens from the cache are the argmax of the uncached logits over the same tokens, probabilities alike."""
    policy = helpers.token_policy(AutoregressiveConfig)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    with torch.inference_mode():
        state = decoder.solve(prefix, helpers.generators(3), Sampling(1))
        logits_BSV = decoder.logits(state.id_BS, prefix)
    for row, length in enumerate(state.length_B.tolist()):
        assert torch.equal(logits_BSV[row, :length].argmax(-1), state.id_BS[row, :length])
        chance = logits_BSV[row, :length].softmax(-1).amax(-1)
        torch.testing.assert_close(chance, state.probability_BS[row, :length], **EQUAL)


def test_an_autoregressive_token_does_not_see_later_ones():
    policy = helpers.token_policy(AutoregressiveConfig)
    id_BS, _ = policy.model.decoder.encode(targets_of(policy))
    changed = id_BS.clone()
    changed[:, 5:] = 1
    with torch.inference_mode():
        one, other = (policy.model.decoder.logits(ids, prefix_of(policy)) for ids in (id_BS, changed))
    assert torch.equal(one[:, :6], other[:, :6])
    assert not torch.equal(one[:, 6:], other[:, 6:])


def test_a_sequence_without_an_end_stops_at_the_last_slot_and_is_counted():
    policy = helpers.token_policy(AutoregressiveConfig)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    never = torch.zeros(decoder.vocabulary)
    never[decoder.tokenizer.end], never[0] = -1e9, 1e9
    decoder.head.bias.data = never
    with torch.inference_mode():
        state = decoder.solve(prefix, helpers.generators(3), Sampling(1))
    report = decoder.tokens(state)
    assert report.nfe == (decoder.slots,) * 3
    assert report.repaired_B.all()
    assert torch.isfinite(decoder.finish(state)).all()
    always = -never
    decoder.head.bias.data = always
    with torch.inference_mode():
        ended = decoder.tokens(decoder.solve(prefix, helpers.generators(3), Sampling(1)))
    assert ended.nfe == (1,) * 3
    assert ended.repaired_B.all(), "no coefficient at all is no chunk either"


def test_of_the_end_tokens_only_the_first_is_learned_by_autoregression():
    policy = helpers.token_policy(AutoregressiveConfig)
    decoder, prefix, targets = policy.model.decoder, prefix_of(policy), targets_of(policy)
    decoder.head = helpers.Oracle(decoder.encode(targets)[0], decoder.vocabulary)
    wrong = decoder.head.logits.clone()
    for row, length in enumerate(decoder.tokenizer.lengths(decoder.encode(targets)[0].numpy())):
        wrong[row, length + 1 :] = wrong[row, length + 1 :].flip(-1)
    losses = []
    for logits in (decoder.head.logits, wrong):
        decoder.head.logits = logits
        losses.append(float(decoder.loss(prefix, targets, torch.Generator()).total))
    assert losses[0] == losses[1] < 1e-6


def test_sampling_at_a_temperature_depends_on_the_seed_alone():
    policy = helpers.token_policy(AutoregressiveConfig, temperature=1.0)
    with torch.inference_mode():
        ids = [policy.model.decoder.solve(prefix_of(policy), helpers.generators(3, s), Sampling(1)).id_BS for s in (0, 0, 5)]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])


def test_settling_is_deterministic_and_stops_where_nothing_changes():
    policy = helpers.token_policy(DiscreteFlowConfig)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    with torch.inference_mode():
        state = decoder.solve(prefix, helpers.generators(3), Sampling(4))
        one, other = decoder.refine_deterministic(state, prefix, 30), decoder.refine_deterministic(state, prefix, 30)
        assert torch.equal(one.id_BS, other.id_BS)
        if not one.revised[-1].any():
            assert torch.equal(decoder.refine_deterministic(one, prefix).id_BS, one.id_BS)
    oracled, id_BS = oracle(policy)
    with torch.inference_mode():
        settled = oracled.refine_deterministic(oracled.start(prefix, helpers.generators(3), Sampling(16)), prefix, 1)
        assert torch.equal(settled.id_BS, id_BS)
        assert not oracled.refine_deterministic(settled, prefix, 1).revised[-1].any()


def test_tokens_revised_are_counted_step_by_step():
    policy = helpers.token_policy(DiscreteFlowConfig)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    state, counted = decoder.start(prefix, helpers.generators(3), Sampling(6)), []
    with torch.inference_mode():
        for _ in range(6):
            before = state.id_BS
            state = decoder.advance(state, prefix)
            counted.append((before != state.id_BS).sum(1))
    assert torch.equal(decoder.tokens(state).revised_BN, torch.stack(counted, 1))


@pytest.mark.parametrize("config", [AutoregressiveConfig, MaskedDiffusionConfig, DiscreteFlowConfig])
def test_a_decoder_of_tokens_learns_to_answer_at_several_depths(config):
    policy = helpers.token_policy(config, exits=ExitTraining((1, 2)))
    policy.model.train()
    generator = torch.Generator().manual_seed(0)
    terms = policy.loss(policy.prepare(helpers.batch(4)), generator, generator)
    assert set(terms.exits) == {1, 2}
    assert float(terms.total.detach()) == pytest.approx(sum(float(v.detach()) for v in terms.exits.values()) / 2)


def test_configs_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="the share of them, above 0"):
        helpers.token_policy(DiscreteFlowConfig, noise_token=True)
    with pytest.raises(ConfigError, match="A SlotMetric of 3 slots does not fit a tokenizer of 24"):
        helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=SlotMetric(spread=(1.0,) * 3)).model.decoder.distance()
    with pytest.raises(ConfigError, match="This SlotMetric is not fitted yet"):
        helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=SlotMetric())
    with pytest.raises(ConfigError, match="BinMetric needs a tokenizer whose ids are ordered"):
        helpers.token_policy(DiscreteFlowConfig, metric=BinMetric())
    with pytest.raises(ConfigError, match="is not fitted yet"):
        helpers.token_policy(DiscreteFlowConfig, BinsFit(8))
    with pytest.raises(ConfigError, match="chunks of 6 actions of 4"):
        DiscreteFlowConfig(4, helpers.FAST, chunk_size=7)
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full", exits=ExitTraining((1, 2)))
    with pytest.raises(ConfigError, match="Full attention has one answer"):
        policy.loss(policy.prepare(helpers.batch(2)), torch.Generator(), torch.Generator())
    ar = helpers.token_policy(AutoregressiveConfig)
    with pytest.raises(CapabilityError, match="cannot start from given tokens"):
        ar.model.decoder.start(
            prefix_of(ar), helpers.generators(3), Sampling(1), TokenConditioning(torch.zeros(3, 1), torch.zeros(3, 1))
        )
    with pytest.raises(CapabilityError, match="no deterministic steps"):
        ar.model.decoder.refine_deterministic(None, None)


def test_cross_entropy_ignores_what_has_no_weight_even_if_it_is_not_finite():
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    bad = logits.clone()
    bad = torch.cat((bad[:, :1], bad[:, 1:] * float("nan")), 1)
    loss = cross_entropy(bad, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[1.0, 0.0]]))
    assert float(loss.detach()) == pytest.approx(torch.log(torch.tensor(3.0)).item())
