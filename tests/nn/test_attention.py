"""Attention over an injected cache equals attention over everything concatenated."""

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
@pytest.mark.parametrize("joined", [False, True])
def test_cached_and_own_tokens_share_one_softmax(kv_heads, noise_samples, causal, grad, joined):
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
        got = attend(query, own, kv_cache, mask, joined=joined)
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


def half_precision(dtype, cached_tokens):
    """Random heads of 32, where 1/√E is no power of two, with scores of up to 15: queries, own tokens, cache."""
    query, *rest = (
        draw(seed, 4, 4, n, 32).mul(scale).to(dtype)
        for seed, n, scale in ((0, 16, 3), (1, 16, 1), (2, 16, 1), (3, cached_tokens, 1), (4, cached_tokens, 1))
    )
    return query, KeyValues(*rest[:2]), KeyValues(*rest[2:]) if cached_tokens else None


def squares(query, own, kv_cache, attention):
    """The output of some attention over all tokens, and the gradients of its sum of squares."""
    key, value = own.key_CGPE, own.value_CGPE
    if kv_cache is not None:
        key, value = torch.cat((kv_cache.key_CGPE, key), 2), torch.cat((kv_cache.value_CGPE, value), 2)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    out = attention(*inputs)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cached_tokens", [0, 100])
def test_half_precision_is_as_exact_as_the_fused_kernel(dtype, cached_tokens):
    """Root mean square errors against double precision, of the result and of its gradients: within twice the fused kernel's.

    Ours also round the normalised weights and, in the gradients, the sum of the two groups, a third more in all. Scores rounded
    before the softmax cost up to six times as much.
    """
    parts = half_precision(dtype, cached_tokens)

    def ours(query, key, value):
        split = (cached_tokens, 16)
        (past_key, key), (past_value, value) = key.split(split, 2), value.split(split, 2)
        return attend(query, KeyValues(key, value), KeyValues(past_key, past_value) if cached_tokens else None)

    fused = squares(*parts, functional.scaled_dot_product_attention)
    long = (
        None if part is None else KeyValues(part.key_CGPE.double(), part.value_CGPE.double()) for part in (parts[1], parts[2])
    )
    exact = squares(parts[0].double(), *long, functional.scaled_dot_product_attention)
    for found, theirs, true in zip(squares(*parts, ours), fused, exact, strict=True):
        assert found.dtype == dtype
        assert (found.double() - true).square().mean() <= (2 * (theirs.double() - true)).square().mean()


def test_autocast_does_not_round_scores():
    """It would round every product to half precision again."""
    query, own, kv_cache = half_precision(torch.bfloat16, 20)
    plain = attend(query, own, kv_cache)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(query, own, kv_cache), plain)


def test_a_decoding_step_never_copies_the_cache():
    """The largest tensor a step allocates stays smaller than the cache's keys, which are far longer than anything else."""
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
