"""Shapes of the backbones and decoders that exist here, read off their configs; no network is built.

What a shape is, and its letters: ``shapes.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from benchmarks.cost_model.shapes import BackboneShape, DecoderShape, LayerShape, Linear, Piece, flow_codec, residual_head
from vlaflow.backbones.base import BackboneSpec
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.errors import CapabilityError
from vlaflow.nn.block import BlockConfig
from vlaflow.stacks.expert import ExpertConfig


def tiny_backbone(config: TinyConfig, instruction_bytes: int) -> BackboneShape:
    """``backbones.tiny`` on an instruction of that many bytes, convolutions included."""
    c, texts = config, -(-instruction_bytes // config.text_patch)
    cells = (c.image_size // c.cell) ** 2
    stem = _conv_stem(c) if c.stem == "conv" else (Linear(3 * c.cell**2, c.width).piece("stem", cells),)
    embed = [*stem] * len(c.views)
    embed += [Linear(32 * c.text_patch, c.width).piece("words", texts), Linear(c.state_dim, c.width).piece("state", 1)]
    layer = LayerShape.of(BlockConfig(c.width, c.heads, c.heads, c.width // c.heads, c.ffn))
    positions = (len(c.views) * cells + c.text_bytes // c.text_patch + 1 + c.suffix) * c.width
    return BackboneShape(c.depth, layer, len(c.views) * cells + texts + 1, tuple(embed), tables=positions + 257 * 32)


def _conv_stem(config: TinyConfig) -> tuple[Piece, ...]:
    halvings, side = (config.cell // 4).bit_length() - 1, config.image_size // 4
    channels = [max(16, config.width >> (halvings - i)) for i in range(halvings)] + [config.width]
    pieces = [Linear(48, channels[0]).piece("stem", side**2)]
    for narrow, wide in pairwise(channels):
        side //= 2
        pieces.append(Linear(9 * narrow, wide).piece("stem", side**2))
    return tuple(pieces)


@dataclass(frozen=True)
class Grid:
    """Images of one size as Qwen2.5-VL sees them.

    Args:
        side: image tokens along each edge; one token is 2 × 2 patches of 14 pixels, so 252 pixels make 9.
        images: how many.
    """

    side: int
    images: int

    @property
    def tokens(self) -> int:
        """Image tokens of all images."""
        return self.images * self.side**2

    def window_keys(self, window: int) -> float:
        """Patches that a patch sees on average when attention stays in windows of ``window`` × ``window`` tokens."""
        edges = [min(window, self.side - start) for start in range(0, self.side, window)]
        return 4 * (sum(edge**2 for edge in edges) / self.side) ** 2


def qwen_backbone(
    architecture: Mapping[str, Any], images: Grid | None, others: int, padded_state: int | None = 32
) -> BackboneShape:
    """``backbones.qwen2_5_vl`` of that architecture (text and vision config as transformers writes them).

    Args:
        architecture: for instance ``qwen2_5_vl_3b()``.
        images: what the vision tower reads; None leaves tower and image tokens out.
        others: tokens that are not images: turns, instruction, state.
        padded_state: inputs of the state projection; None where there is none.
    """
    text, vision = architecture["text_config"], architecture["vision_config"]
    width, heads = text["hidden_size"], text["num_attention_heads"]
    sizes = (width, heads, text["num_key_value_heads"], width // heads, text["intermediate_size"])
    embed = () if images is None else _qwen_tower(vision, images)
    state = () if padded_state is None else (Linear(padded_state, width).piece("state", 1),)
    return BackboneShape(
        text["num_hidden_layers"],
        LayerShape(*sizes, qkv_bias=True),
        others + (0 if images is None else images.tokens),
        (*embed, *state),
        text["vocab_size"],
        architecture["tie_word_embeddings"],
    )


def _qwen_tower(vision: Mapping[str, Any], images: Grid) -> tuple[Piece, ...]:
    """Patches, layers with windowed attention but for a few, and the merger of 2 × 2 patches into one token."""
    width, heads, patches = vision["hidden_size"], vision["num_heads"], 4 * images.tokens
    sizes = (width, heads, heads, width // heads, vision["intermediate_size"])
    layer = LayerShape(*sizes, qkv_bias=True, out_bias=True, ffn_bias=True)
    everywhere = len(vision["fullatt_block_indexes"])
    near = images.window_keys(vision["window_size"] // (2 * vision["patch_size"]))
    patch = Linear(2 * 3 * vision["patch_size"] ** 2, width, bias=False)
    return (
        patch.piece("patches", patches),
        layer.piece("vision layer", patches, near, patches, vision["depth"] - everywhere),
        layer.piece("vision layer", patches, 4 * images.side**2, patches, everywhere),
        Piece("merger norm", 0, layer.norm, 2 * patches * width),
        Linear(4 * width, 4 * width).piece("merger", images.tokens),
        Linear(4 * width, vision["out_hidden_size"]).piece("merger", images.tokens),
    )


def flow_decoder(config: FlowConfig, spec: BackboneSpec, steps: int = 10) -> DecoderShape:
    """``decoders.flow`` on its expert or the shared stack of such a backbone.

    Raises:
        CapabilityError: for a time token, or an expert that projects keys and values, as iFlyBot-VLA's does.
    """
    c = config
    if c.time_token:
        raise CapabilityError("The cost model knows no time token; count decoders whose clock is mixed into the actions.")
    width = c.expert.block.width if c.expert else spec.width
    enter, leave = flow_codec(c.padded_dim or c.action_dim, width, c.head_layers)
    return _on_stack(DecoderShape(c.chunk_size, steps, enter, leave), c.expert, spec, c.chunk_size)


def regression_decoder(config: RegressionConfig, spec: BackboneSpec) -> DecoderShape:
    """``decoders.regression``: learned queries through the stack, then the head once per action."""
    c = config
    width = c.expert.block.width if c.expert else spec.width
    head = residual_head(c.tokens // c.chunk_size * width, c.hidden or width, c.action_dim, c.head_layers)
    learned = ((),) * (c.tokens - c.chunk_size)
    decoder = DecoderShape(c.chunk_size, 1, leave=head, context=learned, tables=c.tokens * width)
    return _on_stack(decoder, c.expert, spec, c.tokens)


def _on_stack(decoder: DecoderShape, expert: ExpertConfig | None, spec: BackboneSpec, tokens: int) -> DecoderShape:
    """The decoder with an expert's layers, state token and positions."""
    if expert is None:
        return decoder
    if expert.projected:
        raise CapabilityError(
            "The cost model knows no expert with projected keys and values; count one that reads them as they are."
        )
    width = expert.block.width
    state = ((Linear(expert.padded_state or spec.state_dim, width),),) if expert.state_token else ()
    positions = 0 if spec.rotary else (len(state) + tokens) * width
    return replace(
        decoder,
        stack=LayerShape.of(expert.block),
        context=(*state, *decoder.context),
        tables=decoder.tables + positions,
    )
