"""Qwen2.5-VL's vision tower for a GPU: which patch belongs to which window is worked out once per size of images, on the CPU.

Layers with windows compute one attention call per length of window (at most four: whole windows, those at the right and lower
borders, and the corner), and layers without one call per size of image, in place of one call per window and image.

Shape letters: N patches of all images, V image tokens of all images (squares of patches), I images, K windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlaflow.backbones.base import Rotary
from vlaflow.engine.gpu_layers import LayerWeights, Matrix, join, rotated

Span = tuple[int, int, int]
"""The first patch, how many groups of equal length follow, and that length."""


@dataclass(frozen=True)
class VisionPlan:
    """The order in which patches pass the tower: window by window, windows of one length together.

    Args:
        order_N: the patch at each place.
        back_V: the place of each token afterwards.
        windows: of the places.
        whole_N: for layers without windows, the place of each patch of image after image, images of one size together.
        windowed_N: the inverse.
        images: of ``whole_N``.
    """

    order_N: Tensor
    back_V: Tensor
    windows: tuple[Span, ...]
    whole_N: Tensor
    windowed_N: Tensor
    images: tuple[Span, ...]

    @staticmethod
    def of(sizes: Sequence[tuple[int, int]], merge: int, window: int, device: torch.device) -> VisionPlan:
        """For images of these numbers of rows and columns of patches.

        Args:
            sizes: of every image; multiples of ``merge``.
            merge: side in patches of the square that becomes a token; a square's patches stand together, squares row by row.
            window: side of a window in such squares.
            device: of the tower.
        """
        first, windows, images = 0, [], []
        for rows, columns in sizes:
            place_RC = first + torch.arange(rows // merge * (columns // merge)).view(rows // merge, columns // merge)
            first += place_RC.numel()
            images.append(place_RC.flatten())
            windows += [part.flatten() for row in place_RC.split(window, 0) for part in row.split(window, 1)]
        unit_V, window_spans = _sorted(windows, merge**2)
        image_V, image_spans = _sorted(images, merge**2)
        place_V = _inverse(unit_V)
        whole_N = _patches(place_V[image_V], merge**2)
        indices = (_patches(unit_V, merge**2), place_V, whole_N, _inverse(whole_N))
        order_N, back_V, whole_N, windowed_N = (index.to(device) for index in indices)
        return VisionPlan(order_N, back_V, window_spans, whole_N, windowed_N, image_spans)


def _sorted(groups: list[Tensor], patches: int) -> tuple[Tensor, tuple[Span, ...]]:
    """Groups of tokens one after the other, those of one length together, the longest first; spans count patches."""
    ordered = sorted(groups, key=len, reverse=True)
    spans: list[Span] = []
    first = 0
    for length in dict.fromkeys(map(len, ordered)):
        count = sum(len(group) == length for group in ordered)
        spans.append((first * patches, count, length * patches))
        first += count * length
    return torch.cat(ordered), tuple(spans)


def _patches(token_V: Tensor, patches: int) -> Tensor:
    return (token_V[:, None] * patches + torch.arange(patches)).flatten()


def _inverse(index: Tensor) -> Tensor:
    return torch.empty_like(index).scatter_(0, index, torch.arange(len(index)))


def merged_vision(blocks: Sequence[Any]) -> list[LayerWeights]:
    """The weights of the tower's layers; gate and up become views of one matrix."""
    found = []
    for block in blocks:
        attention, mlp = block.attn, block.mlp
        found.append(
            LayerWeights(
                block.norm1.weight,
                Matrix.of(attention.qkv),
                Matrix.of(attention.proj),
                block.norm2.weight,
                join(mlp.gate_proj, mlp.up_proj),
                Matrix.of(mlp.down_proj),
            )
        )
    return found


def vision_layer(
    hidden_NW: Tensor,
    rotary: Rotary,
    spans: tuple[Span, ...],
    order: tuple[Tensor, Tensor] | None,
    w: LayerWeights,
    *,
    heads: int,
    eps: float,
) -> Tensor:
    """One layer of the tower.

    Args:
        hidden_NW: states of the patches.
        rotary: cosines and sines of their positions, float32 (N, 1, E) each.
        spans: groups of patches that see each other.
        order: indices into another order that ``spans`` count in, and back; None for the patches' own.
        w: weights.
        heads, eps: of the layer.
    """
    count, width = hidden_NW.shape
    x_NW = functional.rms_norm(hidden_NW.to(w.norm_in_W.dtype), (width,), w.norm_in_W, eps)
    qkv_N3HE = w.qkv.product(x_NW).view(count, 3, heads, -1)
    turned = rotated(qkv_N3HE[:, :2].flatten(1, 2).float(), *rotary).to(qkv_N3HE.dtype)
    qkv_N3HE = torch.cat((turned.view(count, 2, heads, -1), qkv_N3HE[:, 2:]), 1)
    if order is not None:
        qkv_N3HE = qkv_N3HE[order[0]]
    mixed = []
    for first, groups, length in spans:
        part = qkv_N3HE[first : first + groups * length].view(groups, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed.append(functional.scaled_dot_product_attention(*part).transpose(1, 2).reshape(groups * length, width))
    mixed_NW = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
    if order is not None:
        mixed_NW = mixed_NW[order[1]]
    hidden_NW = hidden_NW + w.out.product(mixed_NW)
    x_NW = functional.rms_norm(hidden_NW.to(w.norm_ffn_W.dtype), (width,), w.norm_ffn_W, eps)
    gate, up = w.gate_up.product(x_NW).chunk(2, -1)
    return hidden_NW + w.down.product(functional.silu(gate) * up)


def see(
    visual: Any,
    layers: Sequence[LayerWeights],
    patch_NC: Tensor,
    position_N2: Tensor,
    plan: VisionPlan,
    *,
    layer: Callable[..., Tensor] = vision_layer,
) -> Tensor:
    """Image tokens (V, width of the language model), image after image.

    Args:
        visual: transformers' tower.
        layers: its layers' weights.
        patch_NC: what it reads.
        position_N2: row and column of every patch.
        plan: of these images.
        layer: ``vision_layer``, or what it was compiled into.
    """
    hidden_NW = visual.patch_embed(patch_NC)[plan.order_N]
    cosine_NE, sine_NE = visual.rotary_pos_emb(hidden_NW, position_N2[plan.order_N])
    rotary = cosine_NE[:, None].float(), sine_NE[:, None].float()
    attention, eps = visual.blocks[0].attn, visual.blocks[0].norm1.variance_epsilon
    for index, weights in enumerate(layers):
        whole = index in visual.fullatt_block_indexes
        spans, order = (plan.images, (plan.whole_N, plan.windowed_N)) if whole else (plan.windows, None)
        hidden_NW = layer(hidden_NW, rotary, spans, order, weights, heads=attention.num_heads, eps=eps)
    tokens_VW: Tensor = visual.merger(hidden_NW)
    return tokens_VW[plan.back_V]
