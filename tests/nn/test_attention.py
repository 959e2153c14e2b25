"""Attention over an injected memory equals attention over everything concatenated."""

import pytest
import torch
from torch.nn import functional

from vlaflow.nn.attention import KeyValues, attend
from vlaflow.nn.block import Block, BlockConfig
from vlaflow.nn.time import clock_embedding


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("noise_samples", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_memory_and_own_tokens_share_one_softmax(kv_heads, noise_samples, causal, grad):
    """Reference: torch's own attention on concatenated, repeated keys and values, in double precision."""
    c, t, p, e = 2, 5, 7, 8
    b = c * noise_samples
    query = draw(0, b, 4, t, e)
    own = KeyValues(draw(1, b, kv_heads, t, e), draw(2, b, kv_heads, t, e))
    seen = torch.ones(c, p, dtype=torch.bool)
    seen[0, 4:] = False
    kv_cache = KeyValues(draw(3, c, kv_heads, p, e), draw(4, c, kv_heads, p, e), seen)
    mask = torch.ones(t, t, dtype=torch.bool).tril() if causal else None
    with torch.set_grad_enabled(grad):
        got = attend(query, own, kv_cache, mask)
    key = torch.cat((kv_cache.key_CGPE.repeat_interleave(noise_samples, 0), own.key_CGPE), 2)
    value = torch.cat((kv_cache.value_CGPE.repeat_interleave(noise_samples, 0), own.value_CGPE), 2)
    allowed = torch.cat(
        (
            seen.repeat_interleave(noise_samples, 0)[:, None, None].expand(b, 1, t, p),
            (mask if causal else torch.ones(t, t, dtype=torch.bool)).expand(b, 1, t, t),
        ),
        -1,
    )
    expected = functional.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_training_path_equals_the_fused_one(kv_heads):
    query, own = draw(0, 2, 4, 6, 8), KeyValues(draw(1, 2, kv_heads, 6, 8), draw(2, 2, kv_heads, 6, 8))
    own = KeyValues(own.key_CGPE, own.value_CGPE, torch.tensor([[True] * 6, [True] * 4 + [False] * 2]))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    explicit = attend(query, own, None, mask)
    with torch.no_grad():
        fused = attend(query, own, None, mask)
    torch.testing.assert_close(explicit, fused)


def test_a_decoding_step_never_copies_the_memory():
    """The largest tensor a step allocates stays smaller than the memory's keys, which are far longer than anything else."""
    kv_cache = KeyValues(torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64))
    own = KeyValues(torch.randn(1, 2, 4, 64), torch.randn(1, 2, 4, 64))
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        attend(torch.randn(1, 2, 4, 64), own, kv_cache)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < kv_cache.key_CGPE.numel() * 4


def test_a_gated_block_counts_like_qwen():
    """Four blocks of Qwen2.5-VL-3B's shape hold 308.3 M parameters: the size AsyncVLA states for its rater."""
    with torch.device("meta"):
        block = Block(BlockConfig(2048, 16, 2, 128, 11008, norm="rms", gated=True))
    assert round(4 * sum(p.numel() for p in block.parameters()) / 1e6, 2) == 308.31


def test_clean_tokens_embed_alike_whatever_time_the_others_are_at():
    mask = torch.tensor([[1.0, 0, 1, 0]])
    early, late = clock_embedding(0.9 * mask, 64), clock_embedding(0.1 * mask, 64)
    assert torch.equal(early[mask == 0], late[mask == 0])
    assert not torch.equal(early[mask == 1], late[mask == 1])


def test_the_clock_embedding_tells_a_hundred_times_apart():
    """A base-10 000 embedding of the raw clock would leave neighbours nearly alike."""
    rows = clock_embedding(torch.linspace(0, 1, 101), 192)
    assert (rows[1:] - rows[:-1]).norm(dim=-1).min() > 0.5
