"""The four published systems at full size, as shapes for the cost model: nothing here builds a network.

Sizes are those of the papers and their public code; what neither says is an assumption named in the function's text.
Inputs are one LIBERO observation, except for DFM-VLA, which reads the images of its base model.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cost_model.shapes import (
    BackboneShape,
    DecoderShape,
    LayerShape,
    Linear,
    Piece,
    PolicyShape,
    RaterShape,
    flow_codec,
    residual_head,
)
from benchmarks.cost_model.shapes_of import Grid, qwen_backbone
from vlaflow.backbones.qwen2_5_vl import qwen2_5_vl_3b
from vlaflow.compute.thresholds import exit_shares
from vlaflow.stacks.expert import a1_expert

QWEN2_7B = LayerShape(3584, 28, 4, 128, 18944, qkv_bias=True)
"""A layer of Qwen2-7B, the language part of Molmo-7B-D."""
A1_EXPERT = LayerShape.of(a1_expert().block)
"""A layer of A1's action expert, a Qwen2 network that reads the keys and values of the layer next to it."""
A1_TOKENS = 352
"""Prefix of two views of 144 tokens with their markers, and a sentence, as A1's text says."""
A1_EXITS = tuple(range(2, 29, 2))
"""Layers run at A1's fourteen exits (after layers 1, 3, … 27, counted from 0)."""


def asyncvla() -> PolicyShape:
    """AsyncVLA on Qwen2.5-VL-3B: two views of 252 pixels (81 tokens each), 52 other tokens, chunks of 8.

    EO-1's processor, from which AsyncVLA very likely descends, leaves LIBERO's 256 pixels at 252. Four rater blocks like the
    backbone's, as the stated 308 M demand. 52 other tokens are assumed.
    """
    backbone = qwen_backbone(qwen2_5_vl_3b(), Grid(9, 2), 52)
    width = backbone.layer.width
    return PolicyShape(
        backbone, DecoderShape(8, 10, *flow_codec(32, width)), RaterShape(backbone.layer, 4, action_dim=32, chunk_size=8)
    )


def a1_flow(tokens: int = A1_TOKENS, crops: int = 2, chunk_size: int = 8, steps: int = 10) -> PolicyShape:
    """A1-FM: Molmo-7B-D and an expert of 28 layers; suffix of one state token and the chunk.

    The published head, a residual network of two layers.
    """
    enter, leave = flow_codec(32, A1_EXPERT.width, head_layers=2)
    decoder = DecoderShape(chunk_size, steps, enter, leave, stack=A1_EXPERT, context=((Linear(32, A1_EXPERT.width),),))
    return PolicyShape(molmo_7b(tokens, crops), decoder)


def a1_regression(tokens: int = A1_TOKENS, crops: int = 2) -> PolicyShape:
    """A1-MLP: the prefix ends with a state token, two markers and 8 × 7 query tokens, which an MLP turns into 8 actions."""
    head = residual_head(7 * QWEN2_7B.width, QWEN2_7B.width, 7)
    return PolicyShape(molmo_7b(tokens + 3 + 56, crops), DecoderShape(8, 1, leave=head, stack="none"))


def iflybot(latents: int = 8, written: bool = False) -> PolicyShape:
    """iFlyBot-VLA: Qwen2.5-VL-3B on three image slots of 448 pixels, and a diffusion transformer on its latent tokens.

    The third slot is empty on LIBERO but encoded all the same. 60 other tokens and biases in the expert are assumed. The
    expert reads the latent tokens only, as the paper says (its code passes it everything before them too).

    Args:
        latents: latent action tokens, K.
        written: write them one by one (see ``cost.words``) instead of asking for all with query tokens in the prefix.
    """
    backbone = qwen_backbone(qwen2_5_vl_3b(), Grid(16, 3), 60 + (0 if written else latents + 2))
    expert = LayerShape(1024, 16, 16, 64, 1024, gated=False, qkv_bias=True, out_bias=True, ffn_bias=True)
    decoder = DecoderShape(
        7,
        5,
        enter=(Linear(20, 1024),),
        leave=(Linear(1024, 20),),
        stack=expert,
        context=((Linear(20, 1024),), (Linear(1024, 1024), Linear(1024, 1024))),
        sees=latents,
        kv_projection=Linear(2 * 128, 1024),
    )
    return PolicyShape(backbone, decoder)


def dfm_vla() -> PolicyShape:
    """DFM-VLA on Emu3 8B: two views of 25 × 25 codes, 40 other tokens, 70 slots for FAST tokens, 14 + 2 passes.

    The prefix does not see the actions, so its keys and values are exact at every pass; logits are computed for the 1024
    action rows only. The image tokenizer, a network of its own, is not part of it.
    """
    layer = LayerShape(4096, 32, 8, 128, 14336)
    backbone = BackboneShape(32, layer, 2 * 625 + 40, vocabulary=184622, tied=False)
    return PolicyShape(backbone, DecoderShape(70, 16, leave=(Linear(4096, 1024, bias=False),), borrowed=True))


def molmo_7b(tokens: int, crops: int) -> BackboneShape:
    """Molmo-7B-D: 23 of the 24 layers of CLIP ViT-L/14 at 336 pixels, 2 × 2 attention pooling, Qwen2-7B.

    Args:
        tokens: of the prefix, images included.
        crops: images of 336 pixels, 576 patches and 144 pooled tokens each.
    """
    clip = LayerShape(1024, 16, 16, 64, 4096, False, qkv_bias=True, out_bias=True, ffn_bias=True, norm_bias=True)
    patches, pooled, seen = 576 * crops, 144 * crops, 577 * crops
    embed = (
        Linear(588, 1024, bias=False).piece("patches", patches),
        clip.piece("vision layer", seen, 577, seen, 23),
        Linear(2048, 1024).piece("pooling query", pooled),
        replace(Linear(2048, 1024).piece("pooling keys and values", patches), times=2),
        Piece("pooling", 4 * pooled * 4 * 1024, 0, 2 * (pooled + patches) * 1024),
        Linear(1024, 1024).piece("pooling answer", pooled),
        replace(Linear(1024, 18944, bias=False).piece("connector", pooled), times=2),
        Linear(18944, 3584, bias=False).piece("connector", pooled),
    )
    # rows for its own tokens; positions, class token and first norm of the vision tower
    added = 128 * 3584 + (577 + 1 + 2) * 1024
    return BackboneShape(28, QWEN2_7B, tokens, embed, vocabulary=152064, tied=False, tables=added)


def a1_exit_shares(budget: float) -> dict[int, float]:
    """The exit shares that A1 asks of its thresholds: p_k ∝ budgetᵏ, with the first of the exits switched off.

    Returns:
        Probability by layers run, in the order of the exits.
    """
    share_K = exit_shares("exponential", budget, len(A1_EXITS), first_exit=False)
    return dict(zip(A1_EXITS, share_K.tolist(), strict=True))
