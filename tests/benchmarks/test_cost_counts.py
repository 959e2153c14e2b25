"""The cost model against torch's own counter: every part of a network has the operations and parameters that are counted."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import full_size
from benchmarks.cost_model.cost import (
    embed,
    layers,
    rating,
    step,
    step_without_cache,
)
from benchmarks.cost_model.shapes import (
    BackboneShape,
    DecoderShape,
    LayerShape,
    Linear,
    PolicyShape,
    RaterShape,
    flow_codec,
)
from benchmarks.cost_model.shapes_of import Grid, flow_decoder, qwen_backbone, regression_decoder, tiny_backbone
from tests import helpers
from vlaflow.backbones.base import Prefix
from vlaflow.backbones.qwen2_5_vl import QwenConfig
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.flow import ActionCodec, FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.attention import KeyValues
from vlaflow.nn.block import Block, BlockConfig, make_norm
from vlaflow.policies.asyncvla.policy import qwen3b, qwen3b_rater, tiny, tiny_rater
from vlaflow.policies.recipe import DataSpec
from vlaflow.stacks.expert import ExpertConfig

SAME = 1e-9
"""Both count the same products, so they agree to the last operation; the goal was 2 %."""
SENTENCE = "Open a drawer"


def counted(run):
    """Operations by torch's counter. It does not know the CPU's fused attention, so attention is made of plain products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def size(module):
    return sum(p.numel() for p in module.parameters())


# -- the tiny backbone and the flow decoder --------------------------------------------------------------------------------


def tiny_policy(stem):
    config = tiny(DataSpec(4, 4, ("image", "wrist")))
    return replace(config, backbone=replace(config.backbone, stem=stem))


def tiny_shape(config):
    spec = config.backbone.build().spec
    make = flow_decoder if isinstance(config.decoder, FlowConfig) else regression_decoder
    return PolicyShape(tiny_backbone(config.backbone, len(SENTENCE)), make(config.decoder, spec))


def observed(config):
    one = helpers.observation(0, SENTENCE, config.backbone.image_size)
    return ObservationBatch.collate([replace(one, images=dict.fromkeys(config.backbone.views, one.images["image"]))])


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_a_tiny_policy_costs_what_the_counter_says_at_every_depth(stem):
    """Stems with their convolutions, words and state, prefix layers, and a solver step that reads a KV cache of that depth."""
    config = tiny_policy(stem)
    model, shape = config.build(), tiny_shape(config)
    prefix = helpers.embed(model.backbone, observed(config))
    assert prefix.hidden_BPW.shape[1] == shape.backbone.prefix
    assert embed(shape).flops == pytest.approx(counted(lambda: helpers.embed(model.backbone, observed(config))), rel=SAME)
    x_BLX, clock_BL = torch.zeros(1, 16, 4), torch.zeros(1, 16)
    for depth in range(1, config.backbone.depth + 1):
        run = model.backbone.run(prefix, depth)
        assert layers(shape, depth).flops == pytest.approx(counted(lambda d=depth: model.backbone.run(prefix, d)), rel=SAME)
        assert step(shape, depth).flops == pytest.approx(
            counted(lambda p=run: model.decoder.velocity(x_BLX, clock_BL, p)), rel=SAME
        )
    assert shape.parameters == size(model)


TINY_EXPERT = ExpertConfig(BlockConfig(48, 8, 4, 32, 96, norm="rms", gated=True), padded_state=6)


@pytest.mark.parametrize(
    "decoder",
    [
        FlowConfig(4, 6, expert=TINY_EXPERT),
        FlowConfig(4, 6, padded_dim=8, expert=replace(TINY_EXPERT, padded_state=None, causal=True), head_layers=2),
        FlowConfig(4, 6, expert=replace(TINY_EXPERT, state_token=False)),
        RegressionConfig(4, 6),
        RegressionConfig(4, 6, queries="action", expert=TINY_EXPERT, hidden=40, head_layers=1),
    ],
)
def test_experts_and_query_tokens_cost_what_the_counter_says(decoder):
    """At every depth, with their state token, positions, queries and heads."""
    config = replace(tiny_policy("conv"), decoder=decoder, n_action_steps=3)
    model, shape = config.build(), tiny_shape(config)
    embedded = helpers.embed(model.backbone, observed(config))
    for depth in range(1, config.backbone.depth + 1):
        prefix = model.backbone.run(embedded, depth)
        state = model.decoder.start(prefix, helpers.generators(1), Sampling(10))
        assert step(shape, depth).flops == pytest.approx(
            counted(lambda s=state, p=prefix: model.decoder.advance(s, p, 1)), rel=SAME
        )
    assert shape.parameters == size(model)


def test_without_a_cache_prefix_and_suffix_are_one_pass():
    config = tiny_policy("conv")
    model, shape = config.build(), tiny_shape(config)
    tokens = shape.backbone.prefix + 16

    def velocity():
        hidden_BTW = torch.zeros(1, tokens, 128)
        hidden_BTW[:, -16:] = model.decoder.codec.encode(torch.zeros(1, 16, 4), torch.zeros(1, 16))
        for index in range(config.backbone.depth):
            hidden_BTW, _ = model.backbone.layer(index, hidden_BTW)
        model.decoder.codec.decode(hidden_BTW[:, -16:])

    assert step_without_cache(shape).flops == pytest.approx(counted(velocity), rel=SAME)


def test_a_rater_costs_what_the_counter_says():
    config = tiny_policy("conv")
    config = replace(config, rater=tiny_rater(config))
    block, model = config.rater.block, config.build()
    shape = replace(tiny_shape(config), rater=RaterShape(LayerShape.of(block), config.rater.depth, 4, 16))
    prefix = model.backbone.run(helpers.embed(model.backbone, observed(config)))
    assert rating(shape).flops == pytest.approx(counted(lambda: model.rater(prefix, torch.zeros(1, 16, 4))), rel=SAME)
    assert shape.rater.parameters == size(model.rater)
    assert shape.parameters == size(model)


# -- Qwen2.5-VL ------------------------------------------------------------------------------------------------------------

SMALL = {
    "text_config": {
        "vocab_size": 336,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def qwen(request):
    """A small random network and its shape on two images of 9 × 9 tokens and 20 others."""
    pytest.importorskip("transformers")
    architecture = {**SMALL, "tie_word_embeddings": request.param}
    with torch.random.fork_rng():
        network = QwenConfig(4, ("front", "wrist"), architecture=architecture).build()
    return network, qwen_backbone(architecture, Grid(9, 2), 20)


def test_qwen_layers_cost_what_the_counter_says(qwen):
    """Causal prefix layers at every depth, and suffix tokens that read them; a mask does not make products smaller."""
    network, own = qwen
    codec = ActionCodec(32, 64)
    shape = PolicyShape(own, DecoderShape(8, 10, *flow_codec(32, 64)))
    hidden_BPW, positions = torch.zeros(1, own.prefix, 64), torch.arange(own.prefix + 8).expand(3, 1, -1)
    rotate = network.network.language_model.rotary_emb
    rotary, after = rotate(hidden_BPW, positions[..., : own.prefix]), rotate(hidden_BPW, positions[..., own.prefix :])
    prefix = Prefix(network, hidden_BPW, rotary=rotary)
    for depth in range(1, 4):
        run = network.run(prefix, depth)
        assert layers(shape, depth).flops == pytest.approx(counted(lambda d=depth: network.run(prefix, d)), rel=SAME)

        def velocity(caches=run.kv_cache):
            hidden_BTW = codec.encode(torch.zeros(1, 8, 32), torch.zeros(1, 8))
            for index, kv_cache in enumerate(caches):
                hidden_BTW, _ = network.layer(index, hidden_BTW, after, kv_cache)
            codec.decode(hidden_BTW)

        assert step(shape, depth).flops == pytest.approx(counted(velocity), rel=SAME)


def test_the_vision_tower_costs_what_the_counter_says(qwen):
    """Nine tokens an edge make windows of 4, 4 and 1; one layer in three attends to the whole image."""
    network, own = qwen
    patches = torch.zeros(4 * 162, 3 * 2 * 14 * 14)
    grid_I3 = torch.tensor([[1, 18, 18]] * 2)
    tower = counted(lambda: network.network.get_image_features(patches, grid_I3))
    ours = sum(p.times * p.flops for p in own.embed if p.name != "state")
    assert ours == pytest.approx(tower, rel=0.02)  # rotary positions of the patches are a small product of their own
    assert own.parameters == size(network)


def test_asyncvla_at_full_size_has_the_parameters_of_the_network():
    pytest.importorskip("transformers")
    config = qwen3b(DataSpec(8, 7, ("agent", "wrist")), source=None)
    with torch.device("meta"):
        model = replace(config, rater=qwen3b_rater(config)).build()
    rater = replace(full_size.asyncvla().rater, action_dim=7)
    assert replace(full_size.asyncvla(), rater=rater).parameters == size(model)


# -- an expert next to the backbone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [
        BlockConfig(32, 4, 2, 8, 64, norm="rms", gated=True),
        BlockConfig(32, 4, 2, 8, 64, norm="rms", gated=True, qkv_bias=False),
        BlockConfig(48, 2, 2, 16, 80),
    ],
)
def test_an_expert_of_blocks_costs_what_the_counter_says(block):
    """A state token and six actions through blocks of their own width that read each layer's KV cache of eleven tokens."""
    depth, width, dim, seen = 3, block.width, 32, 11
    expert = nn.ModuleList(Block(block) for _ in range(depth))
    norm, codec, state = make_norm(block.norm, width, block.eps), ActionCodec(dim, width), nn.Linear(5, width)
    kv_cache = KeyValues(*torch.zeros(2, 1, block.kv_heads, seen, block.head_dim))

    def velocity(upto):
        token_BLW = codec.encode(torch.zeros(1, 6, dim), torch.zeros(1, 6))
        x_BTW = torch.cat((state(torch.zeros(1, 1, 5)), token_BLW), 1)
        for layer in expert[:upto]:
            x_BTW, _ = layer(x_BTW, kv_cache)
        codec.decode(norm(x_BTW[:, 1:]))

    decoder = DecoderShape(6, 10, *flow_codec(dim, width), stack=LayerShape.of(block), context=((Linear(5, width),),))
    shape = PolicyShape(BackboneShape(depth, LayerShape(16, 2, 2, 8, 32), seen), decoder)
    for upto in range(depth + 1):
        assert step(shape, upto).flops == pytest.approx(counted(lambda n=upto: velocity(n)), rel=SAME)
    assert decoder.parameters(depth) == sum(map(size, (expert, norm, codec, state)))
