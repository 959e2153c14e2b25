"""The discrete flow: its clock, its metric, and the cache of its prefix."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import helpers
from tests.decoders.test_tokens import EQUAL, prefix_of, targets_of
from vlaflow.actions.fast import FastFit
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.token_metrics import EmbeddingMetric, SlotMetric
from vlaflow.flows.discrete import TrainingClocks
from vlaflow.flows.sampling import Sampling


def test_an_untrained_clock_input_changes_nothing_and_learns_from_the_first_step():
    """A random projection would be twenty times larger than the tokens' embeddings and hide which tokens they are."""
    policy = helpers.token_policy(DiscreteFlowConfig, clock_input=True)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    id_BS, _ = decoder.encode(targets_of(policy))
    early, late = (decoder._layers(id_BS, torch.full(id_BS.shape, clock), None, prefix, (2,))[0] for clock in (0.9, 0.1))
    assert torch.equal(early, late)
    decoder.loss(prefix, targets_of(policy), torch.Generator().manual_seed(0)).total.backward()
    assert decoder.clock.weight.grad.abs().max() > 0


def test_a_prediction_is_shown_to_half_of_the_examples_and_to_every_step_but_the_first():
    policy = helpers.token_policy(DiscreteFlowConfig, self_conditioning=True)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    clock_BS, _, predicted_B1 = decoder.draw(4000, torch.Generator().manual_seed(0))
    assert predicted_B1.shape == (4000, 1)
    assert float(predicted_B1.float().mean()) == pytest.approx(0.5, abs=0.04)  # five standard deviations
    shown, embed = [], decoder._embed
    decoder._embed = lambda id_BS, clock_BS, end_BSV: shown.append(end_BSV) or embed(id_BS, clock_BS, end_BSV)
    with torch.inference_mode():
        state = decoder.advance(decoder.start(prefix, helpers.generators(3), Sampling(4)), prefix, 3)
        decoder.refine_deterministic(state, prefix)
    assert shown[0] is None
    assert all(torch.allclose(end_BSV.sum(-1), torch.ones(3, decoder.slots)) for end_BSV in shown[1:])
    assert len(shown) == 4
    del shown[:]
    decoder.loss_of(
        prefix, targets_of(policy), tuple(x[:3] for x in (clock_BS, clock_BS, torch.tensor([[True], [False], [True]])))
    )
    assert shown[0] is None
    assert (shown[1].sum((1, 2)) > 0).tolist() == [True, False, True]
    assert not shown[1].requires_grad


def test_an_untrained_self_conditioning_changes_nothing_and_learns_from_the_first_step():
    plain, policy = (helpers.token_policy(DiscreteFlowConfig, self_conditioning=on) for on in (False, True))
    missing = policy.model.load_state_dict(plain.model.state_dict(), strict=False)
    assert missing.missing_keys == ["decoder.previous.weight"]
    with torch.inference_mode():
        one, other = (p.model.decoder.solve(prefix_of(p), helpers.generators(3), Sampling(4)).id_BS for p in (plain, policy))
    assert torch.equal(one, other)
    policy.model.decoder.loss(prefix_of(policy), targets_of(policy), torch.Generator().manual_seed(0)).total.backward()
    assert policy.model.decoder.previous.weight.grad.abs().max() > 0


def test_with_a_token_for_pure_noise_the_first_pass_does_not_depend_on_the_draw_and_later_ones_do():
    policy = helpers.token_policy(DiscreteFlowConfig, noise_token=True, clocks=TrainingClocks(pure=0.5))
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    with torch.inference_mode():
        states = [decoder.start(prefix, helpers.generators(3, seed=seed), Sampling(2)) for seed in (0, 50)]
        assert not torch.equal(states[0].id_BS, states[1].id_BS)
        hidden = [decoder._look(state, state.clock_at(0), prefix)[0] for state in states]
        later = [decoder._look(state, state.clock_at(1), prefix)[0] for state in states]
    assert torch.equal(*hidden)
    assert not torch.equal(*later)


def test_a_slot_metric_is_fitted_with_the_tokenizer_and_differs_by_slot():
    config = DiscreteFlowConfig(4, FastFit(4.0, None), 6, metric=SlotMetric())
    assert config.unfitted
    assert config.with_tokenizer(helpers.BINS).unfitted, "the tokenizer is there, the spread is not"
    made = config.fitted(helpers.chunks())
    assert not made.unfitted
    value_NS = np.take_along_axis(made.ready.values_SV, made.ready.encode(helpers.chunks()).T, 1).T
    assert made.metric.spread[0] == pytest.approx(np.abs(value_NS[:, :1] - value_NS[:, 0]).sum() / (64 * 63))
    assert made.metric.spread[0] > 5 * made.metric.spread[-1], "low frequencies vary more"
    decoder = helpers.token_policy(DiscreteFlowConfig, made.ready, metric=made.metric).model.decoder
    id_BS = torch.randint(decoder.vocabulary, (2, decoder.slots), generator=torch.Generator().manual_seed(0))
    found_BSV, distance_SVV = decoder.distance_to(id_BS), decoder.distance()
    for b, s in ((0, 0), (1, 5), (1, decoder.slots - 1)):
        assert torch.equal(found_BSV[b, s], distance_SVV[s, id_BS[b, s]])


def test_a_fitted_metric_is_part_of_the_checkpoint(tmp_path):
    from vlaflow.policies.base import Policy

    metric = SlotMetric().fitted(helpers.BINS, helpers.chunks())
    policy = helpers.token_policy(DiscreteFlowConfig, helpers.BINS, metric=metric)
    policy.save_pretrained(tmp_path)
    assert Policy.from_pretrained(tmp_path).config.decoder.metric == metric


@pytest.mark.parametrize("metric", [EmbeddingMetric("live"), EmbeddingMetric("frozen")])
def test_a_live_metric_follows_the_embeddings_and_a_frozen_one_does_not(metric):
    decoder = helpers.token_policy(DiscreteFlowConfig, metric=metric).model.decoder
    before = decoder.distance().clone()
    with torch.no_grad():
        decoder.embedding.weight.add_(torch.randn(decoder.embedding.weight.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(before, decoder.distance()) == (metric.table == "frozen")


def test_the_metric_has_no_gradient():
    decoder = helpers.token_policy(DiscreteFlowConfig).model.decoder
    assert not decoder.distance().requires_grad


def test_a_frozen_metric_is_part_of_the_checkpoint(tmp_path):
    from vlaflow.policies.base import Policy

    policy = helpers.token_policy(DiscreteFlowConfig, metric=EmbeddingMetric("frozen"))
    with torch.no_grad():
        policy.model.decoder.embedding.weight.mul_(torch.rand(policy.model.decoder.embedding.weight.shape))
    policy.save_pretrained(tmp_path)
    assert torch.equal(Policy.from_pretrained(tmp_path).model.decoder.distance(), policy.model.decoder.distance())


def test_exact_cache_equals_no_cache_and_counts_its_runs():
    policy = helpers.token_policy(DiscreteFlowConfig)
    decoder, prefix = policy.model.decoder, prefix_of(policy)

    with torch.inference_mode():
        state = decoder.start(prefix, helpers.generators(3), Sampling(6))
        cached = decoder.advance(state, prefix, 6)
        bare = decoder.advance(replace(decoder.start(prefix, helpers.generators(3), Sampling(6)), refresh=0.0), prefix, 6)
    assert torch.equal(cached.id_BS, bare.id_BS)
    torch.testing.assert_close(cached.probability_BS, bare.probability_BS, **EQUAL)
    assert decoder.tokens(cached).prefix_runs == (0, 0, 0)
    assert decoder.tokens(bare).prefix_runs == (6, 6, 6)


def test_full_attention_with_a_refresh_at_every_step_is_one_joint_pass_per_step():
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full")
    decoder = policy.model.decoder
    prefix = prefix_of(policy)
    assert prefix.depth == 0, "nothing is run before the tokens are there"
    with torch.inference_mode():
        state = decoder.start(prefix, helpers.generators(3), Sampling(5))
        for done in range(5):
            hidden, _ = decoder.stack.joint(decoder.embedding(state.id_BS), prefix, 2)
            guess = decoder.head(hidden).argmax(-1)
            state = decoder.advance(state, prefix)
            if done == 4:
                assert torch.equal(state.id_BS, guess)
    assert decoder.tokens(state).prefix_runs == (5, 5, 5)


def test_with_full_attention_the_prefix_sees_the_tokens_and_with_blind_it_does_not():
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full")
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    id_BS, _ = decoder.encode(targets_of(policy))
    with torch.inference_mode():
        one = decoder.stack.joint(decoder.embedding(id_BS), prefix, 2)[1]
        other = decoder.stack.joint(decoder.embedding(id_BS.flip(1)), prefix, 2)[1]
        alone = policy.model.backbone.run(prefix)
    assert torch.equal(one.kv_cache[0].key_CGPE, other.kv_cache[0].key_CGPE), "the first layer's keys are made before attention"
    assert not torch.equal(one.kv_cache[1].key_CGPE, other.kv_cache[1].key_CGPE)
    assert not torch.equal(one.kv_cache[1].key_CGPE, alone.kv_cache[1].key_CGPE)


def test_an_adaptive_cache_runs_the_prefix_less_often_and_its_keys_are_those_of_the_tokens_it_saw():
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full", refresh=0.5)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    with torch.inference_mode():
        state = decoder.advance(decoder.start(prefix, helpers.generators(3), Sampling(12)), prefix, 12)
        fresh = decoder.stack.joint(decoder.embedding(state.cached_id_BS), prefix, 2)[1]
    runs = decoder.tokens(state).prefix_runs
    assert all(1 <= r < 12 for r in runs)
    for kept, made in zip(state.prefix.kv_cache, fresh.kv_cache, strict=True):
        torch.testing.assert_close(kept.key_CGPE, made.key_CGPE, **EQUAL)
        torch.testing.assert_close(kept.value_CGPE, made.value_CGPE, **EQUAL)
    with torch.inference_mode():
        never = decoder.advance(decoder.start(prefix, helpers.generators(3), Sampling(12)), prefix, 1)
    assert decoder.tokens(never).prefix_runs == (1, 1, 1)


def test_padded_prefixes_give_the_same_joint_pass_alone_and_in_a_batch():
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full")
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    assert prefix.padding_mask_BP is not None, "the instructions differ in length"
    id_BS, _ = decoder.encode(targets_of(policy))
    with torch.inference_mode():
        whole = decoder.stack.joint(decoder.embedding(id_BS), prefix, 2)[0]
        alone = policy.embed(helpers.batch(3).observation).select(torch.tensor([1]))
        one = decoder.stack.joint(decoder.embedding(id_BS[1:2]), alone, 2)[0]
    torch.testing.assert_close(whole[1:2], one, **EQUAL)
