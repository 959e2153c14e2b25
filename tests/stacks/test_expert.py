"""The action expert reads the prefix layer by layer, and a shallow prefix makes a shallow expert."""

from dataclasses import replace

import pytest
import torch

from tests import helpers
from tests.backbones.test_qwen2_5_vl import OBSERVED, build, write_model
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.errors import ConfigError
from vlaflow.nn.block import BlockConfig
from vlaflow.stacks.expert import ExpertConfig, a1_expert

TOKENS = 5
BLOCK = BlockConfig(24, heads=2, kv_heads=2, head_dim=16, ffn=48)


def tiny(depth=3):
    torch.manual_seed(0)
    backbone = TinyConfig(state_dim=4, image_size=16, cell=8, width=32, depth=depth, heads=2, ffn=64, text_bytes=32).build()
    return backbone.eval(), helpers.embed(backbone, helpers.batch(2).observation)


def expert(backbone, **changes):
    torch.manual_seed(1)
    return ExpertConfig(**{"block": BLOCK, **changes}).build(backbone.spec, TOKENS).eval()


def suffix(batch=2, width=24, seed=2):
    return torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_expert_at_depth_i_equals_a_fresh_model_of_i_layers():
    backbone, embedded = tiny()
    stack = expert(backbone)
    shallow_backbone, _ = tiny(depth=2)
    shallow_backbone.load_state_dict({k: v for k, v in backbone.state_dict().items() if not k.startswith("layers.2")})
    shallow = expert(shallow_backbone)
    shallow.load_state_dict({k: v for k, v in stack.state_dict().items() if not k.startswith("layers.2")})
    at_two = stack(suffix(), backbone.run(embedded, 2))
    alone = shallow(suffix(), shallow_backbone.run(helpers.embed(shallow_backbone, helpers.batch(2).observation)))
    assert torch.equal(at_two, alone)


@torch.no_grad()
def test_exits_in_one_pass_equal_the_passes_one_by_one():
    backbone, embedded = tiny()
    stack, whole = expert(backbone), backbone.run(embedded)
    for depth, hidden in zip((1, 2, 3), stack.exits(suffix(), whole, (1, 2, 3)), strict=True):
        assert torch.equal(hidden, stack(suffix(), backbone.run(embedded, depth)))


@torch.no_grad()
def test_layer_j_reads_the_kv_cache_of_layer_j_and_no_other():
    backbone, embedded = tiny()
    stack, prefix = expert(backbone), backbone.run(embedded)
    before = stack.exits(suffix(), prefix, (1, 2, 3))
    changed = replace(prefix.kv_cache[1], value_CGPE=prefix.kv_cache[1].value_CGPE + 1)
    after = stack.exits(suffix(), replace(prefix, kv_cache=(prefix.kv_cache[0], changed, prefix.kv_cache[2])), (1, 2, 3))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]


def gradient_to(stack, prefix, read, what):
    """Whether output token ``read`` depends on input token ``what``."""
    x = suffix().requires_grad_(True)
    stack(x, prefix)[:, read].square().sum().backward()
    return bool(x.grad[:, what].abs().sum() > 0)


def test_block_mask_actions_see_each_other_and_causal_ones_only_those_before():
    backbone, embedded = tiny()
    prefix = backbone.run(embedded).detach()
    assert gradient_to(expert(backbone), prefix, read=0, what=TOKENS - 1)
    assert not gradient_to(expert(backbone, causal=True), prefix, read=0, what=TOKENS - 1)
    assert gradient_to(expert(backbone, causal=True), prefix, read=TOKENS - 1, what=0)


@torch.no_grad()
def test_the_state_token_sees_no_action_and_every_action_sees_it():
    backbone, embedded = tiny()
    stack, prefix = expert(backbone), backbone.run(embedded)
    mask = stack._mask(torch.zeros(1, 1 + TOKENS, 24))
    assert not mask[0, 1:].any()
    assert mask[1:].all()
    moved = replace(prefix, state_BS=prefix.state_BS + 1)
    assert ((stack(suffix(), moved) - stack(suffix(), prefix)).abs().amax((0, 2)) > 0).all()
    blind = expert(backbone, state_token=False)
    assert torch.equal(blind(suffix(), moved), blind(suffix(), prefix))


@torch.no_grad()
def test_draws_share_a_prefix():
    backbone, embedded = tiny()
    stack, prefix, tokens = expert(backbone), backbone.run(embedded), suffix(6)
    together = stack(tokens, prefix)
    for row in range(2):
        alone = stack(tokens[3 * row : 3 * row + 3], prefix.select(torch.tensor([row])))
        torch.testing.assert_close(together[3 * row : 3 * row + 3], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_on_a_rotating_backbone_positions_follow_the_prefix(tmp_path_factory):
    """Rotated by the backbone's own rule: moving the first suffix position changes the answer, relative ones only matter."""
    backbone = build(write_model(tmp_path_factory.mktemp("qwen"), tied=True))
    spec = backbone.spec
    block = BlockConfig(48, 4, spec.kv_heads, spec.head_dim, 96, norm="rms", gated=True)
    torch.manual_seed(1)
    stack = ExpertConfig(block).build(spec, TOKENS).eval()
    assert stack.position is None
    prefix = backbone.run(helpers.embed(backbone, OBSERVED))
    x = suffix(prefix.batch, 48)
    assert not torch.allclose(stack(x, prefix), stack(x, replace(prefix, next_position_B=prefix.next_position_B + 7)))
    for row in range(prefix.batch):
        alone = stack(x[row : row + 1], prefix.select(torch.tensor([row])))
        torch.testing.assert_close(stack(x, prefix)[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_fit_are_refused():
    backbone, _ = tiny()
    with pytest.raises(ConfigError, match="2 heads of 16"):
        expert(backbone, block=BlockConfig(24, 3, 3, 8, 48))
    with pytest.raises(ConfigError, match="padded_state 2"):
        expert(backbone, padded_state=2)


def test_the_published_expert_counts_264_million():
    from vlaflow.backbones.base import BackboneSpec

    spec = BackboneSpec(28, 3584, 28, 4, 128, "causal", state_dim=8, rotary=True)
    with torch.device("meta"):
        stack = a1_expert().build(spec, 50)
    layers = sum(p.numel() for p in stack.layers.parameters())
    assert layers == pytest.approx(264.4e6, rel=1e-3)
