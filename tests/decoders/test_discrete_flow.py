"""The discrete flow: its clock, its metric, and the cache of its prefix."""

from dataclasses import replace

import pytest
import torch

from tests import helpers
from tests.decoders.test_tokens import EQUAL, prefix_of, targets_of
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig, EmbeddingMetric
from vlaflow.flows.sampling import Sampling


def test_an_untrained_clock_input_changes_nothing_and_learns_from_the_first_step():
    """A random projection would be twenty times larger than the tokens' embeddings and hide which tokens they are."""
    policy = helpers.token_policy(DiscreteFlowConfig, clock_input=True)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    id_BS, _ = decoder.encode(targets_of(policy))
    early, late = (decoder._layers(id_BS, torch.full(id_BS.shape, clock), prefix, (2,))[0] for clock in (0.9, 0.1))
    assert torch.equal(early, late)
    decoder.loss(prefix, targets_of(policy), torch.Generator().manual_seed(0)).total.backward()
    assert decoder.clock.weight.grad.abs().max() > 0


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
